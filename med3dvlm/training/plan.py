"""Plan a training before it is started: trained parameters, memory by part, the largest batch that fits, checkpoints, /dev/shm, steps and
hours.

    med3dvlm plan --config paper/stage3_lora --gpus 8 --gpu-memory 80
    med3dvlm plan --config single_gpu/stage3_lora --gpu-memory 24 --rows 749000 --volumes-per-second 2

It builds the models without weights and counts what a step of theirs would hold (see training/memory.py); nothing is downloaded, and no data is read.
The exit code is 1 where the training does not fit.
"""

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.quantized import BLOCK
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.programs import Parser, positive
from med3dvlm.training.arguments import CONFIGS, find_config, parse_arguments
from med3dvlm.training.contrastive import NEW, ContrastiveArguments
from med3dvlm.training.memory import ACTIVATIONS, LOGITS, peak_of_step
from med3dvlm.training.run import train_only
from med3dvlm.training.stage2_projector import Stage2Arguments
from med3dvlm.training.stage3_lora import Stage3Arguments, add_lora

GB = 1e9
STAGES: dict[str, Any] = {"stage1_siglip": ContrastiveArguments, "stage2_projector": Stage2Arguments, "stage3_lora": Stage3Arguments}
# Models of the papers, whose shapes the package knows.
KNOWN = {"Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-instruct", "medicalai/ClinicalBERT": "clinicalbert"}
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / BLOCK / 256  # of a weight: its code, and its shares of an 8-bit scale and of the scale's scale
PROMPT = 16  # tokens between image and answer that are not learned


@dataclass(frozen=True)
class Engine:
    """How weights are sharded.

    Attributes:
        stage: of ZeRO; 0 is plain data parallelism.
        settings: DeepSpeed's of `zero_optimization`.
    """

    stage: int
    settings: dict[str, Any]

    @classmethod
    def read(cls, name: str | None) -> "Engine":
        if not name:
            return cls(0, {})
        settings = json.loads(find_config(name, ".json").read_text(encoding="utf-8-sig"))["zero_optimization"]
        return cls(int(settings["stage"]), settings)

    def offloads(self, part: str) -> bool:
        return self.settings.get(f"offload_{part}", {}).get("device") == "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part: fixed ones, and those of each volume, or conversation, of a batch."""

    fixed: dict[str, float]
    each: dict[str, float]

    def total(self, batch: int) -> float:
        return sum(self.fixed.values()) + batch * sum(self.each.values())

    def fits(self, room: float) -> int:
        """Return the largest batch in so many bytes."""
        return max(0, math.floor((room - sum(self.fixed.values())) / sum(self.each.values())))


def shapes_of(name: str) -> PretrainedConfig:
    """Return the configuration of a language model or text encoder: one of those that the package knows, or that of a folder here.

    Raises:
        ValueError: it is neither; nothing is downloaded.
    """
    known = CONFIGS / "models" / f"{KNOWN.get(name, name)}.json"
    path = known if known.is_file() else Path(name) / "config.json"
    if not path.is_file():
        raise ValueError(f"the shapes of {name} are not known here: name a folder with its config.json, or one of {', '.join(KNOWN)}")
    settings = json.loads(path.read_text(encoding="utf-8-sig"))
    return AutoConfig.for_model(**settings)


def build(arguments: Any, asked: Namespace) -> nn.Module:
    """Build the stage's model without weights, in the type of its frozen weights, with the trained ones marked."""
    with torch.device("meta"):
        if isinstance(arguments, ContrastiveArguments):
            text = AutoConfig.for_model("bert") if arguments.text_encoder == NEW else shapes_of(arguments.text_encoder)
            pairs = Med3DCLIPConfig(
                asked.encoder or arguments.encoder, arguments.encoder_options, asked.size, arguments.image_stages, text, arguments.text_pooling,  # type: ignore[arg-type]
                arguments.projection_dim, arguments.loss, image_pooling=arguments.image_pooling,
            )  # fmt: skip
            clip: nn.Module = Med3DCLIP(pairs, AutoModel.from_config(text))
            trains = {name for name, one in clip.named_parameters() if one.requires_grad}
            train_only(clip, lambda name: name in trains and (arguments.train_text or not name.startswith("text_encoder.")))
            return clip.to(arguments.weights_dtype)
        folder = Path(getattr(arguments, "model", "") or ".") / "config.json"
        if isinstance(arguments, Stage3Arguments) and folder.is_file():
            vlm = Med3DVLM(Med3DVLMConfig.from_pretrained(folder.parent, language_model_source=None))
        else:
            second = {name: getattr(arguments, name) for name in ("projector", "projector_depth") if hasattr(arguments, name)}
            text = shapes_of(asked.language_model or getattr(arguments, "language_model", next(iter(KNOWN))))
            vlm = Med3DVLM(
                Med3DVLMConfig(
                    asked.encoder or "dcformer_small", size=asked.size, text_config=text, image_token_id=text.vocab_size, **second
                )
            )
        vlm.to(arguments.weights_dtype)
        train_only(vlm, lambda name: name.startswith("projector."))
        return add_lora(vlm, arguments).to(arguments.weights_dtype) if isinstance(arguments, Stage3Arguments) else vlm


def batch_of(model: nn.Module, arguments: Any, asked: Namespace, count: int) -> dict[str, Any]:
    """Return a batch of the longest texts that the settings allow."""
    volumes = torch.empty(count, 1, *asked.size, dtype=arguments.weights_dtype, device="meta")
    if isinstance(arguments, ContrastiveArguments):
        ids = torch.full((count, asked.length or arguments.max_text_length), 1)
        if not arguments.train_text and arguments.cache_features:
            width: Any = model.text_encoder.config.hidden_size  # type: ignore[union-attr]
            return {"pixel_values": volumes, "text_features": torch.empty(count, width, dtype=arguments.weights_dtype, device="meta")}
        return {"pixel_values": volumes, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = model.config
    length = asked.length or (arguments.max_row_length if arguments.rows == "study" else arguments.max_length)
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, : config.num_image_tokens] = config.image_token_id
    labels = ids.clone()
    labels[:, : config.num_image_tokens + PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": volumes}


def growth_of(model: Any, arguments: Any, asked: Namespace, checkpointing: bool) -> tuple[float, dict[str, float]]:
    """Return the bytes of a step that do not grow with the batch, and those of each further row: from a step of two and of three (of one,
    batch norm may learn nothing).
    """
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    model.train()
    vocabulary = 0 if isinstance(arguments, ContrastiveArguments) else int(model.config.text_config.vocab_size)
    two, three = (peak_of_step(model, batch_of(model, arguments, asked, count), vocabulary) for count in (2, 3))
    each = {name: float(max(three[name] - two[name], 0)) for name in (ACTIVATIONS, LOGITS)}
    return sum(max(two[name] - 2 * each[name], 0) for name in each), each


def memory_of(
    model: nn.Module, arguments: Any, asked: Namespace, engine: Engine, quantized: bool, growth: tuple[float, dict[str, float]]
) -> Memory:
    """Return the memory on one GPU, with the `growth_of` activations."""
    base, each = growth
    volume = 4.0 * math.prod(asked.size)  # float32, beside what the model is given of it
    chunked = getattr(arguments, "chunk_size", None) is not None  # then all volumes of the batch are there
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    wide = torch.finfo(arguments.weights_dtype).bits / 8
    layers = [module for name, module in model.named_modules() if _is_quantizable(name, module)] if quantized else []
    codes = sum(layer.weight.numel() for layer in layers)
    largest = max((layer.weight.numel() for layer in layers), default=0) * wide
    parts, each_grad = asked.gpus, wide if engine.stage else 4.0
    weights = (frozen - codes) * wide + codes * NF4_BYTES + trained * (wide if engine.stage else 4.0 + (wide if wide < 4 else 0))
    fixed = {
        "weights": weights / (parts if engine.stage == 3 else 1) * (not engine.offloads("param")),
        "gradients": trained * each_grad / (parts if engine.stage > 1 else 1),
        "optimiser": trained * (12 if engine.stage else 8) / (parts if engine.stage else 1) * (not engine.offloads("optimizer")),
        "communication": _buffers(engine, trained, frozen, wide, parts),
        "other": base + largest,  # what does not grow with the batch, and a 4-bit layer while it is computed
    }
    if chunked:
        return Memory(fixed | {"volumes": volume * arguments.per_device_train_batch_size}, each)
    return Memory(fixed, each | {"volumes": volume})


def _is_quantizable(name: str, module: nn.Module) -> bool:
    named = "language_model." in name and not name.endswith("lm_head") and "lora_" not in name
    return named and isinstance(module, nn.Linear) and module.in_features % BLOCK == 0


def _buffers(engine: Engine, trained: int, frozen: int, wide: float, processes: int) -> float:
    """Return the bytes of gradients in transfer, and of weights that ZeRO gathers."""
    if processes == 1 and engine.stage == 0:
        return 0.0
    if engine.stage == 0:
        return 4.0 * trained  # DistributedDataParallel's buckets
    reduce = min(float(engine.settings.get("reduce_bucket_size", 5e8)), trained) * wide * (2 if engine.settings.get("overlap_comm") else 1)
    if engine.stage < 3:
        return reduce + min(float(engine.settings.get("allgather_bucket_size", 5e8)), trained) * wide
    return reduce + min(float(engine.settings.get("stage3_max_live_parameters", 1e9)), trained + frozen) * wide


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    asked, flags = parser.parse_known_args(argv)
    path = find_config(asked.config, ".yaml")
    if not path.is_file() or (asked.stage or path.stem) not in STAGES:
        parser.error(f"{asked.config} is no configuration of {', '.join(STAGES)}; name one, and with a name of your own its --stage")
    settings = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    given = Parser(add_help=False, allow_abbrev=False)
    given.add_argument("--deepspeed", default=settings.get("deepspeed"))
    chosen, flags = given.parse_known_args(flags)
    arguments = parse_arguments(
        STAGES[asked.stage or path.stem], ["--config", str(path), "--data", "planned", *flags, "--deepspeed", "", "--use-cpu", "true"]
    )
    engine, quantized = Engine.read(chosen.deepspeed), bool(getattr(arguments, "quantize", None))
    model = build(arguments, asked)
    room = asked.gpu_memory * GB * (1 - asked.reserve)
    batch = getattr(arguments, "chunk_size", None) or arguments.per_device_train_batch_size
    growths = {checkpointing: growth_of(model, arguments, asked, checkpointing) for checkpointing in (False, True)}
    memory = memory_of(model, arguments, asked, engine, quantized, growths[arguments.gradient_checkpointing])
    _print_plan(model, arguments, asked, engine, memory, batch, room)
    for line in _choices(model, arguments, asked, engine, quantized, room, growths):
        print(line)
    if memory.total(batch) <= room:
        return 0
    print(
        f"\nIt does not fit: a batch of {batch} takes {memory.total(batch) / GB:.1f} GB, and {room / GB:.1f} are free; {_remedy(arguments)}."
    )
    return 1


def _parser() -> ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0], epilog="Other flags are settings of the stage.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="settings of the stage: a file, or a recipe of the package, as paper/stage3_lora")
    add("--stage", choices=STAGES, help="whose settings these are (default: by the name of the file)")
    add("--gpus", type=positive, default=1, metavar="N", help="GPUs in all (default: %(default)s)")
    add("--gpu-memory", type=float, required=True, metavar="GB", help="of each, in units of 10^9 bytes")
    add(
        "--reserve", type=float, default=0.1, metavar="SHARE", help="kept free for CUDA and for gaps between tensors (default: %(default)s)"
    )
    add("--size", type=_size, default=(128, 256, 256), metavar="D,H,W", help="voxels of a volume (default: the paper's)")
    add("--encoder", metavar="NAME", help="the vision encoder (default: stage 1's setting; for stages 2 and 3 the paper's)")
    add("--language-model", metavar="NAME", help="a folder with a config.json, or one that the package knows (default: the stage's)")
    add("--length", type=positive, metavar="TOKENS", help="of a text (default: the longest that the settings allow)")
    add("--rows", type=positive, metavar="N", help="rows of an epoch, for steps")
    add("--volumes-per-second", type=float, metavar="N", help="of all GPUs, for hours; a log has it")
    return parser


def _size(text: str) -> tuple[int, int, int]:
    depth, height, width = (int(number) for number in text.split(","))
    return depth, height, width


def _print_plan(model: nn.Module, arguments: Any, asked: Namespace, engine: Engine, memory: Memory, batch: int, room: float) -> None:
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = next(one for one in name.removeprefix("base_model.model.").split(".") if one)
        part = f"{part} (LoRA)" if "lora_" in name else part
        counts.setdefault(part, [0, 0])[not parameter.requires_grad] += parameter.numel()
    for part, (trains, frozen) in counts.items():
        print(f"{part:28} {trains / 1e6:10.2f} M train  {frozen / 1e6:10.2f} M frozen")
    print(
        f"\nMemory of one GPU for {batch} at a time, {'ZeRO-' + str(engine.stage) if engine.stage else 'without ZeRO'}, {asked.gpus} GPUs:"
    )
    for name, size in (memory.fixed | {name: batch * size for name, size in memory.each.items()}).items():
        print(f"  {name:16} {size / GB:8.2f} GB")
    print(f"  {'in all':16} {memory.total(batch) / GB:8.2f} GB of {room / GB:.1f} (a share of {asked.reserve:g} is reserved)")
    trained = sum(trains for trains, _ in counts.values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    wide = torch.finfo(arguments.weights_dtype).bits / 8
    print(f"\ncheckpoint      {12 * trained / GB:8.2f} GB, {arguments.save_total_limit} are kept; a whole model {wide * whole / GB:.2f} GB")
    ahead = arguments.dataloader_num_workers * (arguments.dataloader_prefetch_factor or 2) * arguments.per_device_train_batch_size
    print(f"/dev/shm        {ahead * math.prod(asked.size) * asked.gpus / GB:8.2f} GB for all loaders, a byte a voxel")
    if asked.rows:
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * asked.gpus
        steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(asked.rows / step) * math.ceil(arguments.num_train_epochs)
        hours = f", {steps * step / asked.volumes_per_second / 3600:.1f} hours" if asked.volumes_per_second else ""
        print(f"steps           {steps:8d} of {step}{hours}")


def _choices(model: nn.Module, arguments: Any, asked: Namespace, engine: Engine, quantized: bool, room: float, growths: Any) -> list[str]:
    """Return the lines of a table of the largest batches."""
    lines = ["\nLargest batch of a GPU:", "| engine | weights | kept | with checkpointing |", "|---|---|---|---|"]
    names: dict[str, str | None] = {"none": None, "ZeRO-2": "deepspeed/zero2", "ZeRO-3": "deepspeed/zero3"}
    held = (False,) if isinstance(arguments, ContrastiveArguments) else (False, True)
    for bits in held:
        for name, config in names.items():
            if bits and name == "ZeRO-3":
                continue  # which does not hold 4-bit weights
            other = Engine.read(config)
            fit = [memory_of(model, arguments, asked, other, bits, growths[one]).fits(room) for one in (False, True)]
            here = other.stage == engine.stage and bits == quantized
            lines.append(f"| {name}{' *' if here else ''} | {'NF4' if bits else 'whole'} | {fit[0] or '-'} | {fit[1] or '-'} |")
    return [*lines, "(* the settings' own)"]


def _remedy(arguments: Any) -> str:
    ways = [] if arguments.gradient_checkpointing else ["--gradient-checkpointing true"]
    if isinstance(arguments, ContrastiveArguments):
        ways.append("--chunk-size 1" if arguments.chunk_size is None else "a smaller --chunk-size")
    elif not arguments.quantize:
        ways.append("--quantize nf4")
    return f"pass {', '.join([*ways, '--deepspeed deepspeed/zero3 with more GPUs'])} or a smaller --per-device-train-batch-size"
