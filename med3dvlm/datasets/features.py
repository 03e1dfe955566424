"""Outputs of a frozen tower, computed once and kept on disk, so that training does not run the tower again for the same volume or text."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from med3dvlm.files import whole_file


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
