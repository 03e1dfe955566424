"""Convert released weights to a model directory of ours, checked name by name, with little memory.

The kind of checkpoint is recognised by the names of its tensors. Every tensor is renamed and reshaped by `published`'s tables and nothing else,
except that LoRA factors are multiplied into the matrices they belong to. The result appears under its name when it is whole.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PretrainedConfig

from med3dvlm.checkpoints.convert.architecture import TEXT_ENCODERS, Architecture, architecture
from med3dvlm.checkpoints.convert.names import LAYOUTS, Layout, recognise, reshaped, shortened, to_ours, to_published
from med3dvlm.checkpoints.convert.weights import (
    ENDINGS,
    PICKLES,
    Checkpoint,
    Source,
    Stored,
    checksum,
    digest,
    find_weights,
    lacks_matrices,
    write_safetensors,
)
from med3dvlm.encoders import Size
from med3dvlm.files import atomic_folder
from med3dvlm.models.clip import Med3DCLIPConfig
from med3dvlm.models.clip_processor import Med3DCLIPProcessor, shortest
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.models.vlm_processor import Med3DVLMProcessor
from med3dvlm.preprocessing import VolumeProcessor

IMAGE_TOKEN = "<im_patch>"
# The released model reads the question directly behind the image, and its answer behind a space; there are no turns.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LORA_ALPHA = 32
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Conversion:
    """The result of `convert_published`.

    Args:
        layout: key of the released layout.
        checksum: sha256 over names, types, shapes and values of the converted tensors.
        left_out: released tensors that nothing of ours needs.
        merged: matrices into which LoRA was merged.
        verified: whether the result was read back, renamed backwards and found equal to the source, bit for bit.
        note: what a user of the weights has to know.
    """

    folder: Path
    layout: str
    checksum: str
    tensors: int
    left_out: tuple[str, ...]
    merged: int
    verified: bool
    note: str

    def __str__(self) -> str:
        lines = [f"{self.folder} holds {LAYOUTS[self.layout].title}: {self.tensors} tensors, sha256 {self.checksum}"]
        if self.merged:
            lines.append(f"LoRA was merged into {self.merged} matrices")
        if self.left_out:
            lines.append(f"{len(self.left_out)} tensors are not needed and were left out: {shortened(self.left_out, 3)}")
        if self.verified:
            lines.append("verified: renamed backwards, every tensor equals the source bit for bit")
        return "\n".join([*lines, *([self.note] if self.note else [])])


def convert_published(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    text_encoder: str | Path | None = None,
    size: Size | None = None,
    lora_alpha: float | None = None,
    verify: bool = False,
    shard_bytes: int = 2 * 10**9,
) -> Conversion:
    """Convert a released checkpoint to a directory that `load_clip`, `load_vlm`, `load_encoder` or `load_projector` takes.

    Args:
        source: a folder, a file, or the id of a model on the hub.
        destination: the new directory.
        base: for LoRA and for a Med3DVLM without config.json: the model with the other weights, the settings and the tokenizer.
        text_encoder: for a CLIP whose source has no tokenizer, or an unknown text encoder: where both lie.
        size: (D, H, W) of the volumes, if not the released one.
        lora_alpha: scale of the LoRA times its rank, where no adapter_config.json says it; the papers' 32 by default.
        verify: read the result back, rename it backwards, and compare it with the source bit for bit.
        shard_bytes: size of a file at most, in bytes.

    Raises:
        FileNotFoundError: source, base, shards or tokenizer are missing.
        ValueError: a file is damaged or holds code, the layout is unknown, or tensors are missing, unexpected or of another shape.
        FileExistsError: the destination exists.
    """
    path, base_path = _fetch(source), None if base is None else _fetch(base)
    home = path if path.is_dir() else path.parent
    own = Checkpoint(find_weights(path) if path.is_dir() else [path])
    adapter = _json(home / "adapter_config.json")
    if adapter.get("use_rslora") or adapter.get("use_dora"):
        raise ValueError(f"{home} holds a LoRA of another kind (rsLoRA or DoRA), which is not merged here; merge it with peft first")
    alpha = lora_alpha if lora_alpha is not None else adapter.get("lora_alpha", LORA_ALPHA)
    others = Checkpoint(find_weights(base_path)) if base_path is not None and lacks_matrices(own) else None
    stock = Source(own, others, alpha)

    key = recognise(stock.tensors)
    layout = LAYOUTS[key]
    found = _rename(layout, stock)
    settings = _json(home / "config.json") or (_json(base_path / "config.json") if base_path is not None else {})
    beside = home if base_path is None else base_path
    tokens = _text_files(layout, beside, text_encoder)
    text_config = _text_config(tokens) if tokens is not None and layout.makes == "clip" and text_encoder is not None else None
    shapes = {name: stored.shape for name, stored in found.tensors.items()}
    released = {name: stored.shape for name, stored in stock.tensors.items()}
    try:
        plan = architecture(layout, shapes, released, settings, size, text_config)
    except KeyError as error:
        missing = _released_name(layout, error.args[0])
        raise ValueError(f"{source} is not a whole checkpoint of {layout.title}: it lacks {missing}, which tells its size") from error
    supplied = {name: torch.tensor([value]) for name, value in plan.supplied.items()}
    tensors = found.tensors | {name: Stored(tuple(value.shape), value.dtype) for name, value in supplied.items()}
    _check(f"{source} is not a checkpoint of {layout.title} as released", plan, layout, found, tensors)

    def read(name: str) -> Tensor:
        return supplied[name] if name in supplied else stock.read(found.names[name]).reshape(tensors[name].shape)

    with atomic_folder(Path(destination)) as folder:
        total = write_safetensors(folder, tensors, read, shard_bytes)
        published = {"layout": key, "source": str(source), "sha256": total}
        _write_settings(folder, plan, layout, tokens, tensors, published, beside)
        if verify:
            _verify(folder, layout, stock, found.names, set(supplied), total)
    return Conversion(Path(destination), key, total, len(tensors), found.left_out, len(stock.merged), verify, layout.note)


@dataclass
class _Renamed:
    """A released checkpoint under our names.

    Args:
        names: our name -> released name.
        tensors: our name -> shape and type in our layout.
        left_out: released names that nothing of ours needs.
        unexpected: released names that the layout does not have.
        wrong_shapes: our name -> released name and shape, of a tensor with other axes than the layout's.
    """

    names: dict[str, str]
    tensors: dict[str, Stored]
    left_out: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shapes: dict[str, str]


def _rename(layout: Layout, stock: Source) -> _Renamed:
    names, tensors, wrong_shapes = {}, {}, {}
    left_out, unexpected = [], []
    for name, (shape, dtype) in stock.tensors.items():
        pair = to_ours(layout, name)
        if pair is None:
            unexpected.append(name)
        elif pair.ours is None:
            left_out.append(name)
        else:
            names[pair.ours] = name
            ours = reshaped(shape, pair.axes)
            if ours is None:
                wrong_shapes[pair.ours] = f"{name} {list(shape)}"
            else:
                tensors[pair.ours] = Stored(ours, dtype)
    return _Renamed(names, tensors, tuple(left_out), tuple(unexpected), wrong_shapes)


def _check(what: str, plan: Architecture, layout: Layout, found: _Renamed, tensors: Mapping[str, Stored]) -> None:
    """Compare the released tensors with those of our model, built without memory; problems are reported in released names."""
    with torch.device("meta"):
        model = plan.build()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {str(name) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    present = {*tensors, *tied, *found.wrong_shapes}
    lacking = [name for name in wanted if name not in present]
    besides = [name for name in tensors if name not in wanted]
    other = {name: shape for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape}
    problems = {
        "lacks": [_released_name(layout, name) for name in lacking],
        "has besides": [*found.unexpected, *(_released_name(layout, name) for name in besides)],
        "has in another shape": [
            *found.wrong_shapes.values(),
            *(f"{_released_name(layout, name)} {list(tensors[name].shape)} instead of {list(shape)}" for name, shape in other.items()),
        ],
    }
    if any(problems.values()):
        raise ValueError(f"{what}: " + "; ".join(f"it {verb} {shortened(listed)}" for verb, listed in problems.items() if listed))


def _released_name(layout: Layout, name: str) -> str:
    pair = to_published(layout, name)
    return name if pair is None else pair.released


def _write_settings(
    folder: Path,
    plan: Architecture,
    layout: Layout,
    tokens: Path | None,
    tensors: Mapping[str, Stored],
    published: dict[str, Any],
    home: Path,
) -> None:
    """Write config.json, the preprocessing and, for models with text, the tokenizer."""
    volumes = VolumeProcessor(layout.recipe, size=plan.size, hu_range=layout.hu_range, resize="trilinear")
    tokenizer = None if tokens is None else _tokenizer(tokens)
    config = plan.config
    if isinstance(config, Med3DVLMConfig):
        processor = Med3DVLMProcessor(volumes, tokenizer, config.num_image_tokens, IMAGE_TOKEN, CHAT_TEMPLATE)
        if config.image_token_id not in (0, processor.image_token_id):
            raise ValueError(
                f"config.json gives {IMAGE_TOKEN} the id {config.image_token_id}, the tokenizer in {tokens} {processor.image_token_id}; "
                "take the tokenizer that belongs to the weights"
            )
        config.image_token_id = processor.image_token_id
        words = tensors["language_model.model.embed_tokens.weight"].shape[0]
        if processor.image_token_id >= words:
            raise ValueError(f"the tokenizer gives {IMAGE_TOKEN} the id {processor.image_token_id}, but the model knows {words} words only")
        processor.save_pretrained(folder)
        if (home / "generation_config.json").is_file():
            (folder / "generation_config.json").write_bytes((home / "generation_config.json").read_bytes())
    elif isinstance(config, Med3DCLIPConfig) and tokenizer is not None:
        Med3DCLIPProcessor(volumes, tokenizer, shortest(tokenizer.model_max_length, config.longest_text)).save_pretrained(folder)
    else:
        volumes.save_pretrained(folder)
    if isinstance(config, PretrainedConfig):
        config.published = published
        config.dtype = max((stored.dtype for stored in tensors.values()), key=_weight_of(tensors))
        config.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(config | {"published": published}, indent=1), encoding="utf-8")


def _weight_of(tensors: Mapping[str, Stored]) -> Any:
    """Count the numbers that are stored in each type."""
    totals: dict[torch.dtype, int] = {}
    for shape, dtype in tensors.values():
        totals[dtype] = totals.get(dtype, 0) + math.prod(shape)
    return totals.__getitem__


def _verify(folder: Path, layout: Layout, stock: Source, names: Mapping[str, str], supplied: set[str], expected: str) -> None:
    """Read what was written under its own name, go back by the tables from right to left, and compare with the source."""
    written = Checkpoint(find_weights(folder))
    for here in written.tensors:
        if here in supplied:
            continue
        pair = to_published(layout, here)
        if pair is None or pair.released != names.get(here):
            raise ValueError(f"{here} should have come from {names.get(here)}, but goes back to {pair}; the tables are at fault")
        theirs, ours = stock.tensors[pair.released], written.tensors[here]
        same = (reshaped(ours.shape, pair.axes, backwards=True), ours.dtype) == theirs
        # One after the other and by their sums: two tensors of a billion bytes need not be held at once.
        if not same or digest(written.read(here)) != digest(stock.read(pair.released)):
            raise ValueError(f"{here} differs from {pair.released} of the source; the disk or the memory may be faulty, convert again")
    if set(written.tensors) != {*names, *supplied} or checksum(written) != expected:
        raise ValueError(f"what was read back from {folder} is not what was written; the disk may be faulty, convert again")


def _text_files(layout: Layout, home: Path, text_encoder: str | Path | None) -> Path | None:
    """Return the folder with the tokenizer, if the model reads text."""
    if layout.makes not in ("clip", "vlm"):
        return None
    if text_encoder is not None:
        if layout.makes != "clip":
            raise ValueError(
                f"--text-encoder is for an image-text model, but this is {layout.title}; give its tokenizer's folder by --base"
            )
        return _fetch(text_encoder, side_files=True)
    if not any(home.glob("*token*.json")) and not any(home.glob("vocab.*")):
        option, known = ("--base", "Qwen/Qwen2.5-7B-Instruct") if layout.makes == "vlm" else ("--text-encoder", _text_encoder_of(layout))
        raise FileNotFoundError(f"there is no tokenizer in {home}; give the folder or hub id that has it by {option}, as {known}")
    return home


def _text_encoder_of(layout: Layout) -> str:
    clinical, cxr = (hub_id for hub_id, _ in TEXT_ENCODERS.values())
    return cxr if layout.part == "ctvit" else clinical


def _text_config(folder: Path) -> PretrainedConfig | None:
    """Read the configuration in a folder, unless reading it takes code of its own."""
    settings = _json(folder / "config.json")
    return AutoConfig.for_model(**settings) if "model_type" in settings and "auto_map" not in settings else None


def _tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a folder. One that brings its own code is taken for the BERT tokenizer that it extends; the code is not run."""
    return (BertTokenizer if "auto_map" in _json(folder / "tokenizer_config.json") else AutoTokenizer).from_pretrained(folder)


def _fetch(name: str | Path, side_files: bool = False) -> Path:
    """Return a local file or folder, or download a model of the hub, as safetensors if it has any.

    Raises:
        FileNotFoundError: it is neither here nor to be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        if path.is_file() and path.suffix not in ENDINGS:
            raise ValueError(f"{path} is not a file of weights; known endings are {', '.join(ENDINGS)}")
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"{name} is neither a file nor a folder nor the id of a model on the hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*SIDE_FILES, *([] if side_files else ["*.safetensors"])]))
        if not side_files and not any(folder.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=[f"*{ending}" for ending in PICKLES])
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is not a folder here and could not be fetched from the hub ({type(error).__name__}); "
            "check the name and the connection, or download it elsewhere and give its folder"
        ) from error
    return folder


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON file; empty if there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8-sig"))) if file.is_file() else {}
