"""Outputs of a frozen tower, computed once and kept on disk, so that training does not run the tower again for the same volume or text."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from med3dvlm.files import whole_file
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.clip_processor import Med3DCLIPProcessor


def fingerprint(module: nn.Module, *also: str) -> str:
    """16 hexadecimal digits that change with the module's weights or with `also` (the data's fingerprint, say)."""
    digest = hashlib.sha256("\n".join(also).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen_features(
    path: Path, count: int, compute: Callable[[range], Sequence[Tensor]], batch_size: int = 16, description: str = "features"
) -> list[Tensor]:
    """The tensors that `compute` gives for items 0 .. count-1, each (count, ...), from `path` if they are there.

    Args:
        path: a .safetensors file, named after everything that the features depend on; written whole or not at all.
        compute: (range of items) -> one or more tensors, first axis the items.
    """
    if not path.is_file():
        parts = []
        with torch.no_grad():
            for start in tqdm(range(0, count, batch_size), desc=description, unit="batch"):
                parts.append([part.cpu() for part in compute(range(start, min(start + batch_size, count)))])
        levels = {str(level): torch.cat(batches).contiguous() for level, batches in enumerate(zip(*parts, strict=True))}
        with whole_file(path) as aside:
            save_file(levels, aside)
    stored = load_file(path)
    return [stored[str(level)] for level in range(len(stored))]


def report_features(folder: Path, model: Med3DCLIP, processor: Med3DCLIPProcessor, reports: Sequence[str]) -> Tensor:
    """(N, C), what `pool_text` gives for N reports, kept in a file of the folder that is named after text encoder, reports and their length.

    Stage 1 with a frozen text encoder leaves those of the training split, and retrieval of training reports finds them there.
    """
    name = fingerprint(model.text_encoder, *reports, model.config.text_pooling, str(processor.max_text_length))

    def compute(rows: range) -> list[Tensor]:
        return [model.pool_text(**processor(text=[reports[row] for row in rows]).to(model.device))]

    return frozen_features(folder / f"text-{name}.safetensors", len(reports), compute, description="texts")[0]
