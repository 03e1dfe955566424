"""Outputs of a frozen encoder, computed once and kept on disk, so that training does not compute them again for the same volume or text."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from med3dvlm.files import atomic_file
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.processes import gathered, rank_and_count, sharing

FILES, ITEMS = (
    64,
    512,
)  # features lie in so many files, so that processes can share the work, unless more than so many items would share one


def fingerprint(module: nn.Module, *also: str) -> str:
    """Return 16 hexadecimal digits that change with the module's weights or with `also` (for example the data's fingerprint)."""
    digest = hashlib.sha256("\n".join(also).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen_features(
    path: Path, count: int, compute: Callable[[range], Sequence[Tensor]], batch_size: int = 16, description: str = "features"
) -> list[Tensor]:
    """Return the tensors of `compute` for items 0 .. count-1, each (count, ...), read from `path` if it exists.

    Args:
        path: a .safetensors file, named after everything that the features depend on; written whole or not at all.
        compute: (range of items) -> one or more tensors, first axis the items.
    """
    if not path.is_file():
        with tqdm(total=count, desc=description, unit="item") as bar:
            _write(path, range(count), compute, batch_size, bar)
    stored = load_file(path)
    return [stored[str(level)] for level in range(len(stored))]


def _write(path: Path, items: range, compute: Callable[[range], Sequence[Tensor]], batch_size: int, bar: Any) -> None:
    parts = []
    with torch.no_grad():
        for start in range(items.start, items.stop, batch_size):
            batch = range(start, min(start + batch_size, items.stop))
            parts.append([part.cpu() for part in compute(batch)])
            bar.update(len(batch))
    with atomic_file(path) as aside:
        save_file({str(level): torch.cat(batches).contiguous() for level, batches in enumerate(zip(*parts, strict=True))}, aside)


class SharedFeatures:
    """The tensors of `compute` for items 0 .. count-1, in their own type, in files of a folder that are memory-mapped item by item.

    All processes of a training that see the folder compute, each other files, so that nodes without a shared disk each compute all; what a run
    before has left is not computed again. Which items share a file and a batch does not depend on the number of processes.

    Args:
        folder: named after everything that the features depend on.
        compute: (range of items) -> one or more tensors, first axis the items.

    Raises:
        FileNotFoundError: another process computed what cannot be seen here.
    """

    def __init__(
        self, folder: Path, count: int, compute: Callable[[range], Sequence[Tensor]], batch_size: int = 16, description: str = "features"
    ) -> None:
        self.folder, self.count = folder, count
        self.per_file = min(-(-count // FILES // batch_size), ITEMS // batch_size) * batch_size
        parts = [range(start, min(start + self.per_file, count)) for start in range(0, count, self.per_file)]
        rank, _ = rank_and_count()
        workers = sharing(folder)
        share = range(workers.index(rank), len(parts), len(workers))
        wanted = [(number, parts[number]) for number in share if not self._path(number).is_file()]
        if wanted:
            with tqdm(total=sum(len(part) for _, part in wanted), desc=description, unit="item", disable=rank > 0) as bar:
                for number, part in wanted:
                    _write(self._path(number), part, compute, batch_size, bar)
        gathered(None)  # all have written
        if missing := [self._path(number).name for number in range(len(parts)) if not self._path(number).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {missing[0]}, which another process of this training wrote; start the training again when the file is there, "
                "or pass --cache-features false"
            )
        self._open: dict[int, Any] = {}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each process maps the files itself

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, ...]:
        """Return the tensors of one item."""
        number, place = divmod(item, self.per_file)
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), "pt")
        file = self._open[number]
        return tuple(file.get_slice(str(level))[place] for level in range(len(file.keys())))

    def whole(self) -> list[Tensor]:
        """Return all of them in memory, each (count, ...)."""
        files = [load_file(self._path(number)) for number in range(-(-self.count // self.per_file))]
        return [torch.cat([file[str(level)] for file in files]) for level in range(len(files[0]))]


def report_features(folder: Path, model: Med3DCLIP, processor: Med3DCLIPProcessor, reports: Sequence[str]) -> Tensor:
    """Return `pool_text` of N reports, (N, C), kept in a subfolder that is named after text encoder, reports and their length.

    Stage 1 with a frozen text encoder leaves those of the training split, and retrieval of training reports finds them there.
    """
    name = fingerprint(model.text_encoder, *reports, model.config.text_pooling, str(processor.max_text_length))

    def compute(rows: range) -> list[Tensor]:
        return [model.pool_text(**processor(text=[reports[row] for row in rows]).to(model.device))]

    return SharedFeatures(folder / f"text-{name}", len(reports), compute, description="texts").whole()[0]
