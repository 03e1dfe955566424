"""The planned memory of a step, against the peak of torch's allocator while the same step runs on the CPU."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DistilBertConfig, Qwen2Config

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMConfig
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.training.memory import peak_of_step

SIZE = (32, 64, 64)
QWEN = Qwen2Config(
    vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=False,
)  # fmt: skip
# On a CPU, unlike on a GPU, attention with dropout holds the scores of all pairs.
BERT = DistilBertConfig(vocab_size=500, max_position_embeddings=64, dim=64, hidden_dim=128, n_layers=2, n_heads=4, attention_dropout=0.0)
DCFORMER = {"widths": [8, 8, 16, 24, 32], "stem_layers": 1}


def vlm() -> Med3DVLM:
    model = Med3DVLM(Med3DVLMConfig("dcformer_nano", DCFORMER, SIZE, text_config=QWEN, image_token_id=2000))
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    return model


def clip() -> Med3DCLIP:
    return Med3DCLIP(Med3DCLIPConfig("dcformer_nano", DCFORMER, SIZE, text_config=BERT, projection_dim=32))


def segmenter() -> Med3DSegmenter:
    model = Med3DSegmenter.from_clip(clip(), embedding_dim=16, embedding_stride=2, attention_level=3, token_levels=[-1])
    model.requires_grad_(True)
    for part in (model.clip.text_encoder, model.clip.image_projection, model.clip.text_projection):
        part.requires_grad_(False)
    model.clip.logit_scale.requires_grad_(False)
    return model


def batch_for(model: nn.Module, rows: int, device: str) -> dict[str, Any]:
    volumes = torch.zeros(rows, 1, *SIZE, device=device)
    if isinstance(model, Med3DSegmenter):
        ids, masks = torch.randint(3, 500, (rows * 4, 12)), torch.zeros(rows, 4, *SIZE, dtype=torch.bool, device=device)
        masks[..., :8, :8] = True
        return {
            "pixel_values": volumes,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "masks": masks,
            "counts": torch.full((rows,), 4),
        }
    if isinstance(model, Med3DCLIP):
        ids = torch.randint(3, 500, (rows, 60))
        return {"pixel_values": volumes, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids = torch.randint(3, 2000, (rows, 300))
    ids[:, : model.config.num_image_tokens] = 2000
    labels = ids.masked_fill(ids == 2000, -100)
    return {"pixel_values": volumes, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measured(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return the peak of allocated bytes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model(**batch).loss.backward()  # what a library makes once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(**batch).loss.backward()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [vlm, clip, segmenter])
def test_the_planned_peak_equals_the_allocators(make: Any, checkpointing: bool, rows: int) -> None:
    """Measured ratios lie between 0.999 and 1.03."""
    model = make().train()
    with torch.device("meta"):
        shapes = make().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        shapes.gradient_checkpointing_enable()
    counted = peak_of_step(shapes, batch_for(shapes, rows, "meta"), 0).total()
    found = measured(model, batch_for(model, rows, "cpu"))
    assert counted == pytest.approx(found, rel=0.15)
