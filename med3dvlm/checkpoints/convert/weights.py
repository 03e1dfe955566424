"""Checkpoint files: read tensor by tensor, written shard by shard, with little more than one tensor in memory.

`Checkpoint` is what lies in files; `Source` is the same without what wrappers put into the names, and with LoRA merged.
safetensors and torch's own format (.bin, .pt, .pth) are read; the latter holds a pickle, of which only tensors and plain data are
accepted, never code. What is written is safetensors.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from med3dvlm.checkpoints.convert.names import Shape, shortened

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAPPED_AT_MOST = 2**27  # bytes read from mapped files, which stay in memory, before the files are closed and opened again
PICKLES = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *PICKLES)
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which training scripts keep the weights
# Prefixes that PEFT, and training on several processes, add to the names of tensors.
WRAPPERS = ((r"^module\.", ""), (r"^base_model\.model\.", ""), (r"\.base_layer\.", "."), (r"\.modules_to_save\.default\.", "."))
REPLACED = re.compile(r".*\.original_module\..*")
FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*|.*_optim_states")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")


class Stored(NamedTuple):
    """Shape and type of a tensor that was not read yet."""

    shape: Shape
    dtype: torch.dtype


class Checkpoint:
    """The tensors of some files under their names.

    Args:
        files: one file, or all shards of one checkpoint.

    Attributes:
        tensors: name -> shape and dtype.

    Raises:
        ValueError: a file is damaged, holds code, or holds no tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors: dict[str, Stored] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Mapping[str, Callable[[], Tensor]]] = {}
        self._mapped = 0
        for file in files:
            for name, stored in _contents(file):
                self.tensors[name], self._file_of[name] = stored, file
        if not self.tensors:
            raise ValueError(f"{shortened(map(str, files))} holds no tensors")

    def read(self, name: str) -> Tensor:
        """Read one tensor, to be dropped before many more are read."""
        stored = self.tensors[name]
        self._mapped += math.prod(stored.shape) * stored.dtype.itemsize
        if self._mapped > MAPPED_AT_MOST:
            self._open.clear()
            self._mapped = 0
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _readers(file)
        return self._open[file][name]()


class Source:
    """The tensors of a released checkpoint under its names, without those of wrappers, LoRA merged, and a base model's where it lacks them.

    Merged is W + alpha / r * B A, in float32; the rank r is the factors' own.

    Raises:
        ValueError: factors lack their matrix or their partner, or a file was saved in pieces.
    """

    def __init__(self, own: Checkpoint, base: Checkpoint | None, alpha: float) -> None:
        self.alpha = alpha
        self._factors: dict[str, dict[str, str]] = {}
        self._places: dict[str, tuple[Checkpoint, str]] = {}
        for checkpoint in (base, own):
            for stored in checkpoint.tensors if checkpoint is not None else ():
                name = stored
                for pattern, replacement in WRAPPERS:
                    name = re.sub(pattern, replacement, name)
                if factor := FACTOR.fullmatch(name):
                    self._factors.setdefault(f"{factor[1]}.weight", {})[factor[2]] = stored
                elif checkpoint is not None and not REPLACED.fullmatch(name):
                    self._places[name] = (checkpoint, stored)
        self.own = own
        self.tensors: dict[str, Stored] = {name: checkpoint.tensors[stored] for name, (checkpoint, stored) in self._places.items()}
        empty = [name for name, stored in self.tensors.items() if stored.shape == (0,)]
        if empty:
            raise ValueError(
                f"{len(empty)} tensors have the shape [0] ({shortened(empty, 3)}): the file was saved under ZeRO-3 without gathering the parts "
                "of each tensor; run zero_to_fp32.py, which DeepSpeed leaves beside its checkpoint, and convert what that writes"
            )
        for name, factors in self._factors.items():
            if set(factors) != {"A", "B"}:
                raise ValueError(f"the LoRA of {name} has only one of its two factors; the file is not whole")
            if name not in self.tensors:
                raise ValueError(f"the file holds LoRA for {name}, but not the matrix itself; give the base model by --base (base=)")

    @property
    def merged(self) -> set[str]:
        """Return the names of the matrices with LoRA."""
        return set(self._factors)

    def read(self, name: str) -> Tensor:
        checkpoint, stored = self._places[name]
        tensor = checkpoint.read(stored)
        if name in self._factors:
            down, up = (self.own.read(self._factors[name][factor]).float() for factor in "AB")
            tensor = torch.addmm(tensor.float(), up, down, alpha=self.alpha / down.shape[0]).to(tensor.dtype)
        return tensor


def lacks_matrices(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds LoRA factors without their matrices, as an adapter does."""
    names = checkpoint.tensors
    return any(FACTOR.fullmatch(name) for name in names) and not any(name.endswith(".base_layer.weight") for name in names)


def find_weights(folder: Path) -> list[Path]:
    """Return the files of the one checkpoint in a folder: safetensors before pickles, shards before single files.

    Raises:
        FileNotFoundError: there is none, or shards are missing.
        ValueError: there are several.
    """
    for ending in ENDINGS:
        for index in sorted(folder.glob(f"*{ending}.index.json")):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
            return _complete([folder / name for name in names])
        files = sorted(path for path in folder.glob(f"*{ending}") if not NOT_WEIGHTS.fullmatch(path.stem))
        if shards := [path for path in files if SHARD.fullmatch(path.stem)]:
            stem, _, number = SHARD.fullmatch(shards[0].stem).groups()  # type: ignore[union-attr]
            return _complete([folder / f"{stem}-{shard:05}-of-{number}{ending}" for shard in range(1, int(number) + 1)])
        if len(files) > 1:
            raise ValueError(f"{folder} holds several checkpoints ({shortened(path.name for path in files)}); name one of the files")
        if files:
            return files
    raise FileNotFoundError(f"{folder} holds no weights ({', '.join(ENDINGS)})")


def _complete(files: list[Path]) -> list[Path]:
    if missing := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} shards are missing in {files[0].parent}: {shortened(missing)}; download them again"
        )
    return files


def _contents(file: Path) -> Iterable[tuple[str, Stored]]:
    if file.suffix == ".safetensors":
        with _safetensors(file) as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{file} holds {name} as {part.get_dtype()}; known are {', '.join(DTYPES)}")
                yield name, Stored(tuple(part.get_shape()), DTYPES[part.get_dtype()])
    else:
        for name, tensor in _unpickled(file).items():
            yield name, Stored(tuple(tensor.shape), tensor.dtype)


def _readers(file: Path) -> Mapping[str, Callable[[], Tensor]]:
    if file.suffix == ".safetensors":
        opened = _safetensors(file)
        return {name: partial(opened.get_tensor, name) for name in opened.keys()}
    return {name: tensor.detach for name, tensor in _unpickled(file).items()}


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); download or copy it again") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that torch.save wrote, memory-mapped where the format allows."""
    zipped = zipfile.is_zipfile(file)
    with file.open("rb") as opened:
        beginning = opened.read(2)
    if not beginning or (beginning == b"PK" and not zipped):
        raise ValueError(f"{file} is damaged (its end is missing); download or copy it again")
    try:
        # Some training scripts keep their arguments beside the weights; a namespace of plain values is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} holds code ({found[1]}), which might do anything and is not run; only tensors are read: "
                "save the bare state_dict again, or take a safetensors file"
            ) from error
        raise ValueError(f"{file} is damaged or no file of weights; download or copy it again") from error
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state_dict of named tensors")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def write_safetensors(folder: Path, tensors: Mapping[str, Stored], read: Callable[[str], Tensor], largest: int = 2 * 10**9) -> str:
    """Write tensors to `folder` as model.safetensors, or as shards of at most `largest` bytes with their index; gives their `checksum`.

    Args:
        read: gives a tensor of that shape and type; called once for each, when its turn comes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name in sorted(tensors)}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=largest)
    digests: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        # The widest types first, so that every tensor begins at a multiple of its own width.
        names = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
        digests |= _write_file(folder / file, {name: tensors[name] for name in names}, read)
    if plan.is_sharded:
        index = json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return _combined(digests, tensors)


def _write_file(file: Path, tensors: Mapping[str, Stored], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Write one file in the documented format of safetensors; returns the digest of each tensor.

    safetensors' own `save_file` wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + _bytes_of(stored)
        header[name] = {"dtype": CODES[stored.dtype], "shape": stored.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name, stored in tensors.items():
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != stored:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {stored.dtype} {stored.shape}")
            output.write(_raw(tensor))
            digests[name] = digest(tensor)
            del tensor  # before the next is read
    return digests


def _raw(tensor: Tensor) -> memoryview:
    """Return the tensor's values as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's values."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def checksum(checkpoint: Checkpoint) -> str:
    """Return a sha256 over names, types, shapes and values, independent of how they are spread over files."""
    return _combined({name: digest(checkpoint.read(name)) for name in checkpoint.tensors}, checkpoint.tensors)


def _combined(digests: Mapping[str, str], tensors: Mapping[str, Stored]) -> str:
    lines = (f"{name} {CODES[tensors[name].dtype]} {list(tensors[name].shape)} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bytes_of(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize
