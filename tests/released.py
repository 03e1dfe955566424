"""Reference models on disk as their publishers store them: a state dict in safetensors or a pickle, config.json and tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from med3dvlm.checkpoints import convert_published
from tests import tiny_parts
from tests.golden_weights import GOLDEN, published_weights

IMAGE_TOKEN = "<im_patch>"
IMAGE_TOKEN_ID = 511
SMALL = (32, 64, 64)


def write_shards(folder: Path, weights: dict[str, Tensor], number: int = 1) -> Path:
    """Write model.safetensors, or as many shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights)
    if number == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for shard in range(number):
        file = f"model-{shard + 1:05}-of-{number:05}.safetensors"
        part = names[shard::number]
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": index}))
    return folder


def write_pickle(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def clip(folder: Path) -> Path:
    """Write DCFormer_SigLIP with a small DistilBERT; its config.json does not describe the text encoder."""
    write_shards(folder, published_weights("clip_siglip_tiny_text"))
    settings = {
        "model_type": "dec_clip", "architectures": ["DEC_CLIP"], "language_model_name_or_path": "medicalai/ClinicalBERT", "input_size": [64, 64, 32],
        "dim": 768, "hidden_size": 768, "loss_type": "sigmoid", "vision_encoder": "dcformer",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def text_encoder(folder: Path, golden_config: str) -> Path:
    """Write config.json and tokenizer of a text encoder as its publisher does."""
    ((kind, settings),) = json.loads((GOLDEN / golden_config).read_text(encoding="utf-8")).items()
    AutoConfig.for_model(**settings | {"model_type": kind}).save_pretrained(folder)
    tiny_parts.tokenizer().save_pretrained(folder)
    return folder


def vlm_weights() -> dict[str, Tensor]:
    return published_weights("vlm_tiny_qwen2")


def vlm_settings(folder: Path, **others: Any) -> Path:
    """Write config.json and tokenizer of Med3DVLM-Qwen-2.5-7B, with a small Qwen2."""
    folder.mkdir(parents=True, exist_ok=True)
    language = json.loads((GOLDEN / "vlm_tiny_config.json").read_text(encoding="utf-8"))
    settings = {
        **language, "model_type": "vlm_qwen", "architectures": ["VLMQwenForCausalLM"], "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "input_size": [256, 256, 128], "vision_tower": "dcformer", "mm_projector_type": "mixer", "proj_out_num": 256,
        "img_token_id": IMAGE_TOKEN_ID, "low_output_size": [192, 128], "high_output_size": [64, 128], **others,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    vlm_tokenizer().save_pretrained(folder)
    return folder


def vlm(folder: Path, shards: int = 3, **others: Any) -> Path:
    return write_shards(vlm_settings(folder, **others), vlm_weights(), shards)


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 512 tokens, the last for the image."""
    tokenizer = tiny_parts.tokenizer()
    tokenizer.add_tokens([f"<unused {number}>" for number in range(len(tokenizer), IMAGE_TOKEN_ID)])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == IMAGE_TOKEN_ID
    return tokenizer


def nano(folder: Path, **changes: Tensor | None) -> Path:
    """Write pretrained_ViT.bin of a DCFormer nano, with tensors replaced or removed."""
    weights = published_weights("dcformer_nano") | changes
    return write_pickle(folder / "pretrained_ViT.bin", {name: tensor for name, tensor in weights.items() if tensor is not None})


def refused(expected: str, source: Path | str, destination: Path, **options: Any) -> str:
    """Assert that the conversion fails with one sentence and leaves no files."""
    beside = set(destination.parent.iterdir())
    with pytest.raises((ValueError, OSError), match=expected) as failure:
        convert_published(source, destination, **options)
    assert not destination.exists()
    assert set(destination.parent.iterdir()) == beside
    return str(failure.value)
