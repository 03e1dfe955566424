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
from itertools import product
from typing import Any

import torch
import yaml
from torch import nn

from med3dvlm.models.quantized import BLOCK
from med3dvlm.programs import Parser, positive
from med3dvlm.training.arguments import find_config
from med3dvlm.training.ct_clip import CTCLIPArguments
from med3dvlm.training.language import ConversationArguments
from med3dvlm.training.memory import ACTIVATIONS, LOGITS, peak_of_step
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.planned import STAGES, batch_of, build, draws_masks

GB = 1e9
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / BLOCK / 256  # of a weight: its code, and its shares of an 8-bit scale and of the scale's scale


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


def growth_of(model: Any, arguments: Any, asked: Namespace, checkpointing: bool) -> tuple[float, dict[str, float]]:
    """Return the bytes of a step that do not grow with the batch, and those of each further row: from a step of two and of three (of one,
    batch norm may learn nothing).
    """
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    model.train()
    vocabulary = int(model.config.text_config.vocab_size) if isinstance(arguments, ConversationArguments) else 0
    two, three = (peak_of_step(model, batch_of(model, arguments, asked, count), vocabulary) for count in (2, 3))
    each = {name: float(max(three[name] - two[name], 0)) for name in (ACTIVATIONS, LOGITS)}
    return sum(max(two[name] - 2 * each[name], 0) for name in each), each


def memory_of(
    model: nn.Module, arguments: Any, asked: Namespace, engine: Engine, quantized: bool, growth: tuple[float, dict[str, float]]
) -> Memory:
    """Return the memory on one GPU, with the `growth_of` activations."""
    base, each = growth
    prompts = arguments.prompts if draws_masks(arguments) else 0
    volume = (4.0 + prompts) * math.prod(asked.size)  # float32, beside what the model is given of it, and a byte a voxel of a mask
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
        parser.error(
            f"{asked.config} is not the settings of a stage ({', '.join(STAGES)}); name a file of settings, and by --stage whose they are"
        )
    settings = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    given = Parser(add_help=False, allow_abbrev=False)
    given.add_argument("--deepspeed", default=settings.get("deepspeed"))
    chosen, flags = given.parse_known_args(flags)
    arguments = parse_arguments(
        STAGES[asked.stage or path.stem], ["--config", str(path), "--data", "planned", *flags, "--deepspeed", "", "--use-cpu", "true"]
    )
    asked.size = asked.size or ((256, 512, 512) if isinstance(arguments, CTCLIPArguments) else (128, 256, 256))
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
    ways = _ways(model, arguments, asked, engine, quantized, growths)
    taken, remedy = memory.total(batch) / GB, _remedy(ways, arguments, batch, room)
    print(f"\nIt does not fit: a batch of {batch} takes {taken:.1f} GB, and {room / GB:.1f} are free; {remedy}.")
    return 1


def _parser() -> ArgumentParser:
    parser = Parser(description=__doc__.partition("\n\n")[0], epilog="Other flags are settings of the stage.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="FILE",
        help="settings of the stage: a file, or a configuration of the package, as paper/stage3_lora",
    )
    add("--stage", choices=STAGES, help="stage of the settings (default: the name of the file)")
    add("--gpus", type=positive, default=1, metavar="N", help="GPUs in all (default: %(default)s)")
    add("--gpu-memory", type=float, required=True, metavar="GB", help="memory of one GPU, in units of 10^9 bytes")
    add(
        "--reserve",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share kept free for CUDA and for gaps between tensors (default: %(default)s)",
    )
    add("--size", type=_size, metavar="D,H,W", help="voxels of a volume (default: 128,256,256, and 256,512,512 for ct_clip)")
    add("--encoder", metavar="NAME", help="the vision encoder (default: stage 1's setting; for stages 2 and 3 the paper's)")
    add("--language-model", metavar="NAME", help="a folder with a config.json, or one that the package knows (default: the stage's)")
    add("--length", type=positive, metavar="TOKENS", help="length of a text (default: the longest that the settings allow)")
    add("--rows", type=positive, metavar="N", help="rows of an epoch, to show the number of steps")
    add("--volumes-per-second", type=float, metavar="N", help="speed of all GPUs, as a log has it, to show the hours")
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
    held = (False, True) if isinstance(arguments, ConversationArguments) else (False,)
    for bits in held:
        for name, config in names.items():
            if bits and name == "ZeRO-3":
                continue  # which does not hold 4-bit weights
            other = Engine.read(config)
            fit = [memory_of(model, arguments, asked, other, bits, growths[one]).fits(room) for one in (False, True)]
            here = other.stage == engine.stage and bits == quantized
            lines.append(f"| {name}{' *' if here else ''} | {'NF4' if bits else 'whole'} | {fit[0] or '-'} | {fit[1] or '-'} |")
    return [*lines, "(* the settings' own)"]


def _ways(
    model: nn.Module, arguments: Any, asked: Namespace, engine: Engine, quantized: bool, growths: dict[bool, tuple[float, dict[str, float]]]
) -> list[tuple[str, Memory]]:
    """Return further settings, as words, and the memory with them, the fewest settings first."""
    kept = arguments.gradient_checkpointing
    ways = []
    for checkpointing, bits, stage in product((False, True), (False, True), (0, 2, 3)):
        words = ["--gradient-checkpointing true"] * (checkpointing > kept) + ["--quantize nf4"] * (bits > quantized)
        words += [f"--deepspeed deepspeed/zero{stage}"] * (stage > engine.stage)
        unknown = bits > isinstance(arguments, ConversationArguments) or (bits and stage == 3) or (stage > engine.stage and asked.gpus == 1)
        if unknown or checkpointing < kept or bits < quantized or stage < min(engine.stage, 2):
            continue
        other = engine if stage <= engine.stage else Engine.read(f"deepspeed/zero{stage}")
        ways.append((" ".join(words), memory_of(model, arguments, asked, other, bits, growths[checkpointing])))
    return sorted(ways, key=lambda way: way[0].count("--"))


def _remedy(ways: list[tuple[str, Memory]], arguments: Any, batch: int, room: float) -> str:
    """Say what would fit: the whole batch with some settings, or else the largest that does."""
    size = "--per-device-train-batch-size" if getattr(arguments, "chunk_size", None) is None else "--chunk-size"
    fitting = []
    if (own := ways[0][1].fits(room)) > 0:
        fitting.append(f"{size} {own} fits")
    if whole := [words for words, memory in ways[1:] if memory.fits(room) >= batch]:
        fitting.append(f"a batch of {batch} fits with {whole[0]}")
    elif len(ways) > 1:
        words, memory = max(ways[1:], key=lambda way: way[1].fits(room))
        fitting += [f"{size} {memory.fits(room)} fits with {words}"] * (memory.fits(room) > own)
    if not fitting:
        words, memory = min(ways, key=lambda way: way[1].total(1))
        fitting.append(f"not even a batch of 1 fits: it takes at least {memory.total(1) / GB:.1f} GB{' with ' * bool(words)}{words}")
    return ", and ".join(fitting)
