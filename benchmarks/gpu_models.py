"""The parts of benchmarks/gpu.py about whole models: attention, generation, and steps of every stage. See gpu_encoders for what a part is."""

import importlib
import json
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_encoders import BFLOAT16, Cases, Figures, Settings, free_memory, outcome, peak_gb, seconds_of
from med3dvlm.encoders import build_encoder

REPOSITORY = Path(__file__).resolve().parent.parent
REPORT = 512  # tokens of a report, the papers' max_text_length


# Attention


def attention(settings: Settings) -> Cases:
    """Return the attention implementation of every transformer. On a GPU none may use torch's plain formula, and without a mask it must be a
    flash kernel.
    """
    for name, size, options in (
        ("vit3d_tiny", (64, 64, 64), {}),
        ("vit3d_m3d", (8, 32, 32), {"depth": 4}),
        ("transunet3d_naive", (64, 64, 64), {}),
        ("ctvit", (20, 160, 160), {"codebook_size": 16}),
    ):
        yield name, partial(encoder_attention, settings, name, size, options)
    for name in ("distilbert", "bert"):
        yield f"{name}, reports of unequal length", partial(text_attention, settings, name)
    for rows in ("equal", "padded", "packed", "generated"):
        yield f"qwen2, {rows} rows", partial(language_attention, settings, rows)


def attended(settings: Settings, model: nn.Module, call: Callable[[], Any], masked: bool) -> Figures:
    """Return the configured attention of the sub-models, and which of torch's kernels the call used."""
    from transformers import PreTrainedModel

    configured = {type(part).__name__: part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    prefix = "aten::_scaled_dot_product_"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    kernels = {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}
    kernels = {kernel for kernel in kernels if "backward" not in kernel}
    figures: Figures = {
        "configured": ", ".join(f"{name} {value}" for name, value in configured.items()),
        "kernels": ", ".join(sorted(kernels)),
        "masked": masked,
    }
    if "eager" in configured.values():
        figures["error"] = "a sub-model is configured to run eager attention"
    elif not kernels:
        figures["error"] = "scaled_dot_product_attention was not called"
    elif settings.device != "cuda":
        figures["judged"] = "the configuration alone: kernels are judged on a GPU"
    elif any("math" in kernel for kernel in kernels):
        figures["error"] = "torch took its plain formula"
    elif not masked and not any(kernel.startswith(("flash", "cudnn")) for kernel in kernels):
        figures["error"] = "there is no mask, and yet torch took no flash kernel"
    return figures


def encoder_attention(settings: Settings, name: str, size: tuple[int, int, int], options: Figures) -> Figures:
    encoder = build_encoder(name, size=size, **options).to(settings.device, BFLOAT16)
    volumes = torch.rand(2, 1, *size, device=settings.device, dtype=BFLOAT16)
    return attended(settings, encoder, lambda: outcome(encoder, volumes, training=True), masked=name == "ctvit")


def text_attention(settings: Settings, name: str) -> Figures:
    from transformers import BertConfig, DistilBertConfig

    from benchmarks.rehearsal_models import CLINICAL_BERT, TINY_TEXT
    from med3dvlm import Med3DCLIP, Med3DCLIPConfig

    text: Any = BertConfig(num_hidden_layers=2, **({"hidden_size": 32, "num_attention_heads": 2} if settings.tiny else {}))
    if name == "distilbert":
        text = DistilBertConfig(**CLINICAL_BERT | {"n_layers": 2} | (TINY_TEXT if settings.tiny else {}))
    model = Med3DCLIP(Med3DCLIPConfig("dcformer_nano", size=(32, 64, 64), text_config=text)).to(settings.device, BFLOAT16)
    volumes = torch.rand(2, 1, 32, 64, 64, device=settings.device, dtype=BFLOAT16)
    length = 32 if settings.tiny else REPORT
    ids = torch.randint(0, 1000, (2, length), device=settings.device)
    mask = torch.arange(length, device=settings.device) < torch.tensor([[length], [length // 2]], device=settings.device)
    return attended(settings, model, lambda: model(volumes, ids, mask.long(), return_loss=False).text_embeds.sum().backward(), masked=True)


def language_attention(settings: Settings, kind: str) -> Figures:
    from benchmarks.packing import batch_of, row_of

    model = language_model_with_image(settings, layers=1, size=(32, 64, 64), encoder="dcformer_nano")
    image_tokens = model.config.num_image_tokens
    short, long = ([2] * 30, [3] * 20), ([4] * 40, [5] * 90)
    conversations = {"equal": [[long], [long]], "padded": [[long], [short]], "packed": [[long, short]], "generated": [[long], [long]]}
    rows = [row_of(asked, image_tokens) for asked in conversations[kind]]
    batch = {name: each.to(settings.device) for name, each in batch_of(rows).items()}
    volumes = torch.rand(len(rows), 1, 32, 64, 64, device=settings.device, dtype=BFLOAT16)

    def call() -> None:
        if kind == "generated":
            model.generate(batch["input_ids"], batch["attention_mask"], volumes, max_new_tokens=1)  # the prompt's attention
        else:
            model(**batch, pixel_values=volumes).loss.backward()

    return attended(settings, model, call, masked=kind in ("padded", "packed"))


# Generation


def language_model_with_image(settings: Settings, layers: int, size: tuple[int, int, int], encoder: str) -> Any:
    """A Med3DVLM in bfloat16 with a language model of Qwen2.5-7B's width and random weights that never ends by itself."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from benchmarks.packing import IMAGE_TOKEN
    from benchmarks.rehearsal_models import QWEN_7B, TINY_LANGUAGE
    from med3dvlm import Med3DVLM, Med3DVLMConfig

    endless: Figures = {"num_hidden_layers": layers, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    text = Qwen2Config(**QWEN_7B | (TINY_LANGUAGE if settings.tiny else {}) | endless)
    torch.manual_seed(0)
    with torch.device(settings.device):
        language_model = AutoModelForCausalLM.from_config(text, dtype=BFLOAT16)
        config = Med3DVLMConfig(encoder, size=size, text_config=text, image_token_id=IMAGE_TOKEN)
        return Med3DVLM(config, language_model=language_model).to(settings.device, BFLOAT16).eval()


def generation(settings: Settings) -> Cases:
    """Tokens a second and memory of answers to questions about scans."""
    build = cache(
        partial(language_model_with_image, settings, settings.layers, settings.size, "dcformer_nano" if settings.tiny else "dcformer_small")
    )
    for rows in (1, 2) if settings.tiny else (1, 8):
        yield f"{rows} at a time", partial(generate, settings, build, rows)


def generate(settings: Settings, build: Callable[[], Any], rows: int) -> Figures:
    from benchmarks.packing import batch_of, row_of

    model, new = build(), 4 if settings.tiny else 128
    row = row_of([([2] * 60, [])], model.config.num_image_tokens)
    batch = {name: each.to(settings.device) for name, each in batch_of([row] * rows).items()}
    volumes = torch.rand(rows, 1, *settings.size, device=settings.device, dtype=BFLOAT16)
    free_memory()

    def call(count: int) -> Tensor:
        return model.generate(batch["input_ids"], batch["attention_mask"], volumes, max_new_tokens=count, do_sample=False)

    if call(new).shape != (rows, new):
        raise ValueError("another number of tokens came than was asked for")
    first, all_of_them = (seconds_of(partial(call, count), settings.device) for count in (1, new))
    return {
        "layers": settings.layers,
        "tokens": rows * new,
        "seconds": all_of_them,
        "seconds_to_first": first,
        "tokens_a_second": rows * new / all_of_them,
        "gb": peak_gb(settings.device),
    }


# Stages


def data(settings: Settings) -> Cases:
    """Phantoms, prepared at the papers' sizes: abdomens with questions, and chests in CT-RATE's layout."""
    for name, layout, size in (("prepared", "m3d", settings.size), ("chests", "ct_rate", settings.chest_size)):
        yield name, partial(prepare, settings, name, layout, ",".join(map(str, size)))


def prepare(settings: Settings, name: str, layout: str, size: str) -> Figures:
    from med3dvlm.cli import main

    phantoms, workers = settings.work / f"{name}_phantoms", ("--workers", str(os.cpu_count()))
    detail = ("--detail", "0.5" if settings.tiny else "1")
    main(["--traceback", "phantom", str(phantoms), "--layout", layout, "--studies", "14", "--seed", "0", *detail, *workers])
    prepared = settings.work / name
    main(["--traceback", "prepare", layout, str(phantoms), str(prepared), "--recipe", layout, "--size", size, *workers])
    return {"size": size, "splits": json.dumps(json.loads((prepared / "summary.json").read_text(encoding="utf-8-sig"))["splits"])}


def models(settings: Settings) -> Cases:
    """The text encoder and the language model that stages begin with."""
    for name in ("text_encoder", "language_model"):
        yield name, partial(write_model, settings, name)


def write_model(settings: Settings, name: str) -> Figures:
    from benchmarks.rehearsal_models import write_language_model, write_text_encoder
    from med3dvlm.datasets.store import PreparedData

    prepared, folder = PreparedData(settings.work / "prepared"), settings.work / name
    torch.manual_seed(0)
    if name == "text_encoder":
        write_text_encoder(prepared, folder, settings.tiny)
    else:
        with torch.device(settings.device):  # random weights of this size take a minute on a CPU
            write_language_model(prepared, folder, settings.layers, settings.tiny)
    return {"gb_on_disk": sum(path.stat().st_size for path in folder.iterdir()) / 1e9}


# part -> script, recipes, further flags
STAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "stage0": ("stage0_language_model", "demo", ()),
    "stage1": ("stage1_siglip", "paper", ("--text-encoder", "{work}/text_encoder")),
    "stage2": ("stage2_projector", "paper", ("--clip", "{work}/stage1", "--language-model", "{work}/language_model")),
    "stage3": ("stage3_lora", "paper", ("--model", "{work}/stage2", "--merged", "")),
    "ct_clip": ("ct_clip", "paper", ("--text-encoder", "new")),
}


def stage(settings: Settings, name: str) -> Cases:
    yield name, partial(train, settings, name)


def train(settings: Settings, name: str) -> Figures:
    """Steps of the stage's script, as a launcher starts it, with its recipe but for the sizes of the run, under DeepSpeed's ZeRO-2 in bfloat16."""
    importlib.import_module("deepspeed")
    from benchmarks.rehearsal_report import stage_figures

    script, recipes, flags = STAGES[name]
    output = settings.work / name
    arguments: list[object] = [
        "--config", f"stages/configs/{recipes}/{script}.yaml", "--data", settings.work / ("chests" if name == "ct_clip" else "prepared"),
        "--output-dir", output, "--max-steps", 3 if settings.tiny else 8, "--bf16", "true", "--deepspeed", "ds_configs/zero2.json",
        "--logging-steps", 1, "--save-strategy", "no", "--include-num-input-tokens-seen", "true", "--disable-tqdm", "true",
        "--dataloader-num-workers", 0 if settings.tiny else 4, *(flag.format(work=settings.work) for flag in flags),
    ]  # fmt: skip
    if settings.tiny:
        arguments += ["--per-device-train-batch-size", 2]
        small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 1000}
        arguments += ["--text-options", json.dumps(small)] if name == "ct_clip" else []
    if settings.device == "cpu":
        arguments += ["--use-cpu", "true"]
    import_module(f"med3dvlm.training.{script}").main([*map(str, arguments)])
    figures = stage_figures(output) | {"peak_gb": peak_gb(settings.device)}
    figures["parameters"] = json.dumps(figures.get("parameters"))
    if not figures.pop("finite", False):
        figures["error"] = "a loss is not finite, or no step was logged"
    if name in ("stage2", "stage3"):
        figures["layers"] = settings.layers
    return figures
