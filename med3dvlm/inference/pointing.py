"""The places that an answer points to: one for each pointing token, with its mask on the scan.

    answer = chat.ask("scan.nii.gz", "What abnormality is seen?")
    [(found.name, found.volume_ml, found.side) for found in answer.masks]

Shapes: L tokens of prompt and answer; K places; P width of queries; D', H', W' the model's voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from med3dvlm.datasets.torch import SENTENCE_END
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.inference.segmentation import PRESENCE_WHERE_STATED, THRESHOLD, Segmentation, segment_scan
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import Med3DVLMProcessor
from med3dvlm.preprocessing import Scan


@dataclass(frozen=True, eq=False)
class Place:
    """A place that an answer points to: the sentence that does, and the query (P) from which the model draws its mask."""

    sentence: str
    query: Tensor


def places_in(
    model: Med3DVLM, processor: Med3DVLMProcessor, prompt: Sequence[int], answer: Sequence[int], features: Features
) -> tuple[Place, ...]:
    """Return the places of an answer, from its tokens and those of the prompt before it; none where it does not point, or the model cannot."""
    at = [place for place, token in enumerate(answer) if model.pointing is not None and token == processor.pointing_token_id]
    if not at:
        return ()
    low, high = features
    with torch.no_grad():
        queries = model.point(torch.tensor([[*prompt, *answer]], device=model.device), (low.to(model.device), high.to(model.device)))
    beginnings = [processor.tokenizer.decode(answer[:place], skip_special_tokens=True, clean_up_tokenization_spaces=False) for place in at]
    return tuple(Place(SENTENCE_END.split(words.strip())[-1], query) for words, query in zip(beginnings, queries[-len(at) :], strict=True))


def draw_places(model: Med3DVLM, encoder: Any, processor: Med3DVLMProcessor, scan: Scan, places: Sequence[Place]) -> list[Segmentation]:
    """Return a mask for each place, named by its sentence, as `Segmenter.segment_all` returns it.

    Args:
        encoder: the model's vision encoder, as it runs.
        scan: a path or a Volume.
    """
    if not places:
        return []
    assert model.pointing is not None
    pointing = model.pointing

    @torch.no_grad()
    def predict(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        pixel_values = pixel_values.to(model.device, model.dtype)
        queries = torch.stack([place.query for place in places]).unsqueeze(0)  # (1, K, P)
        drawn = pointing.draw(model.vision_encoder, encoder(pixel_values), queries, pixel_values)
        assert drawn.logits is not None and drawn.presence is not None
        return drawn.logits[0].float().sigmoid(), drawn.presence[0].float().sigmoid()

    return segment_scan(scan, [place.sentence for place in places], processor.image_processor, predict, THRESHOLD, PRESENCE_WHERE_STATED)
