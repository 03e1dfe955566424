"""The reference models of tests/golden, whose weights are computed from their names (tests/golden/README.md)."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def published_weights(model: str) -> dict[str, Tensor]:
    """The state dict of a reference model in the published layout."""
    return {name: _tensor(name, tuple(shape)) for name, shape in manifest()[model].items()}


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    n = generator(name).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_mean":
        values = 0.1 * n
    elif last == "running_var":
        values = 1 + 0.5 * np.tanh(n)
    elif last in ("t_prime", "logit_scale"):
        values = np.log(10)
    elif name == "bias":
        values = -10
    elif last in ("scale", "gamma"):
        values = 0.5 + 0.1 * n
    elif last == "weight" and len(shape) == 1:
        values = 1 + 0.1 * n
    elif last == "bias":
        values = 0.02 * n
    else:
        values = n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(shape)


def volume(key: str) -> Tensor:
    """(B, 1, D, H, W) float32 in [0, 1)."""
    shape = {"volume-small": (2, 1, 32, 64, 64), "volume-full": (1, 1, 128, 256, 256), "volume-ctvit": (1, 1, 40, 80, 80)}[key]
    return torch.from_numpy(generator(key).random(shape, dtype=np.float32))


@cache
def manifest() -> dict[str, Any]:
    """Reference model -> {tensor name: shape}."""
    return json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))


@cache
def golden() -> dict[str, np.ndarray]:
    """The reference numbers by name."""
    with np.load(GOLDEN / "golden.npz") as file:
        return {name: file[name] for name in file.files}


def difference(ours: Tensor, reference: np.ndarray, every: int = 1) -> float:
    """Return the largest difference between the sampled values of ours and the reference, relative to the reference's spread."""
    values = ours.detach().flatten()[::every].double().numpy()
    reference = reference.astype(np.float64).ravel()
    assert values.shape == reference.shape
    return float(np.abs(values - reference).max() / reference.std())
