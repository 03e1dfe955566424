"""Find the model that a released checkpoint belongs to, from the shapes of its tensors and, where these do not tell, its config.json.

Shapes are given under our names (`names.to_ours`). Where a size cannot be told, KeyError names the tensor that was looked for.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from med3dvlm.checkpoints.convert.names import Layout, Shape
from med3dvlm.encoders import Size, build_encoder
from med3dvlm.encoders.dcformer import KERNELS, SIZES
from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.projectors import build_projector

Shapes = Mapping[str, Shape]
Settings = dict[str, Any]
# The language models that the released model types wrap.
LANGUAGE_MODELS = {"vlm_qwen": "qwen2"}
# Settings of text encoders that shapes do not tell: (vocabulary, width) -> hub id, settings
TEXT_ENCODERS: dict[Shape, tuple[str, Settings]] = {
    (119547, 768): ("medicalai/ClinicalBERT", {"model_type": "distilbert", "vocab_size": 119547, "n_layers": 6, "n_heads": 12, "dim": 768}),
    (30522, 768): ("microsoft/BiomedVLP-CXR-BERT-specialized", {"model_type": "bert", "vocab_size": 30522}),
}
LEGACY_SETTINGS = ("rope_theta", "rope_scaling")  # read by transformers 5, though no longer written
NOT_LANGUAGE = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "torch_dtype")


@dataclass
class Architecture:
    """A model of ours without its weights.

    Args:
        config: what goes into config.json.
        build: makes the model, to be called under `torch.device("meta")`.
        size: (D, H, W) of the volumes.
        supplied: tensors that the released checkpoint lacks, one value each.
    """

    config: PretrainedConfig | Settings
    build: Callable[[], nn.Module]
    size: Size
    supplied: dict[str, float] = field(default_factory=dict)


def architecture(
    layout: Layout, shapes: Shapes, released: Shapes, settings: Settings, size: Size | None, text_config: PretrainedConfig | None
) -> Architecture:
    """Return the model that tensors of these shapes belong to.

    Args:
        shapes, released: the shapes under our names, and under the released ones.
        settings: the released config.json, or of the base model.
        size: (D, H, W) of the volumes, where the user gives it.
        text_config: of the text encoder of a CLIP, where the user gives it.
    """
    if size is None and "input_size" in settings:
        height, width, depth = settings["input_size"]
        size = (depth, height, width)
    if layout.makes == "projector":
        return _projector(layout, shapes, size or layout.size)
    prefix = "" if layout.makes == "encoder" else "vision_encoder."
    vision = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if layout.makes == "vlm":
        encoder, options = _dcformer(vision)
        return _vlm(layout, encoder, options, shapes, settings, size or layout.size)
    encoder, options = {"dcformer": _dcformer, "ctvit": _ctvit, "vit3d_m3d": _vit3d_m3d}[layout.part](vision)
    if layout.part == "ctvit":
        _cut_patches(options, released)
    if layout.makes == "clip":
        return _clip(layout, encoder, options, shapes, size, text_config)
    size = size or layout.size
    config = {"model_type": "med3d_encoder", "encoder": encoder, "encoder_options": options, "size": size}
    return Architecture(config, lambda: build_encoder(encoder, size, **options), size)


def _dcformer(shapes: Shapes) -> tuple[str, Settings]:
    widths = [shapes["stem.0.height.0.bias"][0]]
    blocks: list[int] = []
    kernels: list[int] = []
    while f"stages.{len(blocks)}.0.project.weight" in shapes:
        stage = f"stages.{len(blocks)}."
        widths.append(shapes[stage + "0.project.weight"][0])
        blocks.append(max(int(name.split(".")[2]) for name in shapes if name.startswith(stage)))
        kernels.append(shapes[stage + "1.mixer.height.0.weight"][-1])
    options: Settings = {"stem_activation": False}  # the released code passes it in the place of another argument
    if tuple(kernels) != KERNELS:
        options["kernels"] = kernels
    for name, known in SIZES.items():
        if known == (tuple(blocks), tuple(widths)):
            return f"dcformer_{name}", options
    return "dcformer_small", options | {"blocks": blocks, "widths": widths}


def _ctvit(shapes: Shapes) -> tuple[str, Settings]:
    codebook_size, dim = shapes["codebook"]
    depths = {kind: len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")}) for kind in ("spatial", "temporal")}
    return "ctvit", {
        "dim": dim,
        "codebook_size": codebook_size,
        "spatial_depth": depths["spatial"],
        "temporal_depth": depths["temporal"],
        "heads": shapes["position_bias.layers.4.weight"][0],
        "head_width": shapes["spatial.0.attention.query_scale"][0],
    }


def _cut_patches(options: Settings, released: Shapes) -> None:
    """Only the unused embedding of a single layer tells how many voxels of a patch lie in one layer."""
    names = {name.split("to_patch_emb")[-1]: shape for name, shape in released.items() if "to_patch_emb" in name}
    layer, patch = names["_first_frame.1.weight"][0], names[".1.weight"][0]
    options["patch"] = (patch // layer, math.isqrt(layer), math.isqrt(layer))


def _vit3d_m3d(shapes: Shapes) -> tuple[str, Settings]:
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    return "vit3d_m3d", {"depth": depth}


def _clip(
    layout: Layout, encoder: str, options: Settings, shapes: Shapes, size: Size | None, text_config: PretrainedConfig | None
) -> Architecture:
    if text_config is None:
        words = shapes["text_encoder.embeddings.word_embeddings.weight"]
        if words not in TEXT_ENCODERS:
            raise ValueError(
                f"the text encoder has {words[0]} words of width {words[1]}, which is not known; "
                "name it by --text-encoder (text_encoder=), a folder or hub id with its config.json and tokenizer"
            )
        text_config = AutoConfig.for_model(**TEXT_ENCODERS[words][1])
    projection_dim, pooled = shapes["image_projection.weight"]
    if layout.part == "ctvit":
        if size is None:
            side = math.isqrt(pooled // options["dim"])
            _, height, width = options["patch"]
            size = (layout.size[0], side * height, side * width)
        special: Settings = {"image_pooling": "frames", "projection_bias": False, "loss": "clip"}
        supplied = {"logit_bias": 0.0}  # CLIP's loss has none
    else:
        special, supplied = {"loss": "siglip"}, {}
    size = size or layout.size
    config = Med3DCLIPConfig(encoder, options, size, text_config=text_config, projection_dim=projection_dim, **special)
    return Architecture(config, lambda: Med3DCLIP(config), size, supplied)


def _vlm(layout: Layout, encoder: str, options: Settings, shapes: Shapes, settings: Settings, size: Size) -> Architecture:
    if not settings:
        raise ValueError(
            "there is no config.json beside the weights, which says what the language model is; "
            "give it by --base (base=), a folder or hub id of the language model or of the released model"
        )
    words = shapes["language_model.model.embed_tokens.weight"][0]
    depth = 1 + max((int(name.split(".")[2]) for name in shapes if re.match(r"projector\.low\.\d", name)), default=1)
    config = Med3DVLMConfig(
        encoder,
        options,
        size,
        projector=layout.part,
        projector_depth=depth,
        text_config=_language_config(settings, words),
        image_token_id=settings.get("img_token_id", 0),
        image_splice="published",
    )
    return Architecture(config, lambda: Med3DVLM(config), size)


def _language_config(settings: Settings, words: int) -> PretrainedConfig:
    """Return the part of a released config.json that is the language model's."""
    released = str(settings.get("model_type"))
    kind = LANGUAGE_MODELS.get(released, released)
    try:
        known = set(AutoConfig.for_model(kind).to_dict())
    except ValueError:
        raise ValueError(
            f"config.json names the model type {released!r}; known are {', '.join(LANGUAGE_MODELS)} and language models"
        ) from None
    own = {key: value for key, value in settings.items() if (key in known and key not in NOT_LANGUAGE) or key in LEGACY_SETTINGS}
    return AutoConfig.for_model(kind, **own | {"vocab_size": words})


def _projector(layout: Layout, shapes: Shapes, size: Size) -> Architecture:
    """The grids are those of the released encoder at that size, except where the shapes tell another number of tokens."""
    depth, height, width = size
    grids = [(-(-depth // step), -(-height // step), -(-width // step)) for step in (16, 32)]
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if re.match(r"low\.\d", name)), default=1)
    if layout.part == "mixer":
        tokens = [shapes[f"{stream}.0.token_mlp.0.weight"][1] for stream in ("low", "high")]
        grids = [grid if math.prod(grid) == number else (number, 1, 1) for grid, number in zip(grids, tokens, strict=True)]
        widths = (shapes["low.0.token_norm.weight"][0], shapes["high.0.token_norm.weight"][0])
        dim = shapes[f"low.{layers - 1}.channel_mlp.2.weight"][0]
    elif layout.part == "low_high_mlp":
        dim = shapes["low.weight"][0]
        widths = (shapes["low.weight"][1], shapes["high.weight"][1])
    else:
        dim = shapes["layers.0.weight"][0]
        widths = (0, shapes["layers.0.weight"][1])  # the penultimate stage is not used
    arguments: Settings = {"grids": grids, "widths": widths, "dim": dim, "depth": layers}
    config = {"model_type": "med3d_projector", "projector": layout.part, **arguments}
    return Architecture(config, lambda: build_projector(layout.part, **arguments), size)
