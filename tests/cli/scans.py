"""Helpers of the command line's tests: scans, an adapter, and the check of an error message."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from med3dvlm import Med3DChat
from tests.inference.learned_chat import volume

Run = Callable[..., tuple[int, str, str]]


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> Path:
    """Write an array with NIfTI's axes (W, H, D), stored LPS."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def noisy(seed: int) -> np.ndarray:
    """Return one of the two scans that the tiny model knows, with noise."""
    noise = np.random.default_rng(100 + seed).normal(0, 20, (10, 20, 30))
    return (volume(seed % 2).array + noise).astype(np.float32)


def sentence(error: str) -> str:
    """Return the one line on stderr with which a command fails."""
    lines = [line for line in error.splitlines() if line.startswith("med3dvlm:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error and "Error:" not in error and "errno" not in error.lower()
    assert error.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("med3dvlm: ")


def adapter_of(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    trained = Med3DChat.from_pretrained(model, device="cpu").model
    trained.name_or_path = str(model)
    adapted = get_peft_model(trained, LoraConfig(r=2, target_modules=r"language_model\..*_proj", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return folder
