"""The models and batches of a training that is planned: shapes without numbers."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.training.arguments import CONFIGS
from med3dvlm.training.contrastive import NEW, ContrastiveArguments
from med3dvlm.training.ct_clip import CTCLIPArguments
from med3dvlm.training.dense import DenselySupervisedCLIP
from med3dvlm.training.run import train_only
from med3dvlm.training.segmentation import SegmentationArguments, train_segmenter_only
from med3dvlm.training.stage2_projector import Stage2Arguments
from med3dvlm.training.stage3_lora import Stage3Arguments, add_lora

STAGES: dict[str, Any] = {
    "stage1_siglip": ContrastiveArguments,
    "ct_clip": CTCLIPArguments,
    "segmentation": SegmentationArguments,
    "stage2_projector": Stage2Arguments,
    "stage3_lora": Stage3Arguments,
}
# Models of the papers, whose shapes the package knows.
KNOWN = {
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-instruct",
    "medicalai/ClinicalBERT": "clinicalbert",
    "microsoft/BiomedVLP-CXR-BERT-specialized": "cxr-bert-specialized",
}
PROMPT = 16  # tokens between image and answer that are not learned; of a prompt for a mask


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


def draws_masks(arguments: Any) -> bool:
    """Return whether the stage learns from masks."""
    return isinstance(arguments, SegmentationArguments) or bool(getattr(arguments, "dense_weight", 0))


def build(arguments: Any, asked: Namespace) -> nn.Module:
    """Build the stage's model without weights, in the type of its frozen weights, with the trained ones marked."""
    with torch.device("meta"):
        if isinstance(arguments, SegmentationArguments):
            segmenter: Any = Med3DSegmenter.from_clip(_clip(arguments, asked), **arguments.decoder)
            train_segmenter_only(segmenter, arguments)
            return segmenter.to(arguments.weights_dtype)
        if isinstance(arguments, ContrastiveArguments):
            clip: Any = _clip(arguments, asked)
            if arguments.dense_weight:
                clip = DenselySupervisedCLIP.from_clip(clip, **arguments.decoder)
                clip.decoded = arguments.dense_studies
            trains = {name for name, one in clip.named_parameters() if one.requires_grad}
            train_only(
                clip, lambda name: name in trains and (arguments.train_text or not name.removeprefix("clip.").startswith("text_encoder."))
            )
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


def _clip(arguments: Any, asked: Namespace) -> Med3DCLIP:
    """Build the Med3DCLIP of these settings, or of those of its folder, or the paper's."""
    folder = Path(getattr(arguments, "clip", "") or ".")
    if (folder / "config.json").is_file():
        found = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        config = Med3DCLIPConfig(**found.get("clip_config", found))
        return Med3DCLIP(config, AutoModel.from_config(config.text_config))
    if not isinstance(arguments, ContrastiveArguments):
        text = shapes_of("medicalai/ClinicalBERT")
        return Med3DCLIP(
            Med3DCLIPConfig(asked.encoder or "dcformer_small", None, asked.size, text_config=text), AutoModel.from_config(text)
        )
    text = AutoConfig.for_model("bert") if arguments.text_encoder == NEW else shapes_of(arguments.text_encoder)
    config = Med3DCLIPConfig(
        asked.encoder or arguments.encoder, arguments.encoder_options, asked.size, arguments.image_stages, text, arguments.text_pooling,  # type: ignore[arg-type]
        arguments.projection_dim, arguments.loss, image_pooling=arguments.image_pooling,
    )  # fmt: skip
    return Med3DCLIP(config, AutoModel.from_config(text))


def _prompts(model: Any, arguments: Any, asked: Namespace, count: int) -> dict[str, Any]:
    """Return prompts and masks of as many as the settings allow; the text encoder has read them where it does not train and that is kept."""
    masks = torch.zeros(count, arguments.prompts, *asked.size, dtype=torch.bool, device="meta")
    counts = torch.full((count,), arguments.prompts)
    if arguments.cache_features and not arguments.train_text:
        width = model.clip.text_encoder.config.hidden_size
        read = torch.empty(count * arguments.prompts, width, dtype=arguments.weights_dtype, device="meta")
        return {"text_features": read, "masks": masks, "counts": counts}
    ids = torch.full((count * arguments.prompts, PROMPT), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "masks": masks, "counts": counts}


def batch_of(model: nn.Module, arguments: Any, asked: Namespace, count: int) -> dict[str, Any]:
    """Return a batch of the longest texts that the settings allow."""
    volumes = torch.empty(count, 1, *asked.size, dtype=arguments.weights_dtype, device="meta")
    if isinstance(arguments, SegmentationArguments):
        return {"pixel_values": volumes, **_prompts(model, arguments, asked, count)}
    if isinstance(arguments, ContrastiveArguments):
        prompts = {"prompts": _prompts(model, arguments, asked, count)} if arguments.dense_weight else {}
        ids = torch.full((count, asked.length or arguments.max_text_length), 1)
        if not arguments.train_text and arguments.cache_features:
            clip: Any = getattr(model, "clip", model)
            features = torch.empty(count, clip.text_encoder.config.hidden_size, dtype=arguments.weights_dtype, device="meta")
            return {"pixel_values": volumes, "text_features": features, **prompts}
        return {"pixel_values": volumes, "input_ids": ids, "attention_mask": torch.ones_like(ids), **prompts}
    config: Any = model.config
    length = asked.length or (arguments.max_row_length if arguments.rows == "study" else arguments.max_length)
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, : config.num_image_tokens] = config.image_token_id
    labels = ids.clone()
    labels[:, : config.num_image_tokens + PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": volumes}
