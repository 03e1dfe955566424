"""Stage 1 with a dense loss: beside pairs of volume and report it trains on text prompts with masks."""

from pathlib import Path
from typing import Any

from torch import Tensor

from med3dvlm.models.clip import Med3DCLIPOutput
from med3dvlm.models.segmentation import Med3DSegmenter

SEGMENTER = "segmenter"  # folder of the Med3DSegmenter within that of the Med3DCLIP


class DenselySupervisedCLIP(Med3DSegmenter):
    """A Med3DSegmenter that also trains on pairs, in one pass through the vision encoder.

    Attributes:
        dense_weight: of the segmenter's loss, added to that of its Med3DCLIP.
        decoded: volumes of a batch whose masks are decoded; None for all.
    """

    dense_weight = 1.0
    decoded: int | None = None

    def forward(self, pixel_values: Tensor, prompts: dict[str, Tensor], **pairs: Any) -> Med3DCLIPOutput:  # type: ignore[override]
        """Return the Med3DCLIP's output for volumes and `pairs`, with the loss of both.

        Args:
            prompts: arguments of Med3DSegmenter.forward besides the volumes.
        """
        stages = self.clip.vision_encoder(pixel_values)
        output: Med3DCLIPOutput = self.clip(pixel_values, stages=stages, **pairs)
        dense = super().forward(pixel_values, **prompts, stages=stages, decoded=self.decoded).loss
        assert output.loss is not None and dense is not None
        output.loss = output.loss + self.dense_weight * dense
        return output


def save_both(model: DenselySupervisedCLIP, folder: Path, state: dict[str, Tensor] | None, processor: Any) -> None:
    """Write the Med3DCLIP to the folder, as without a dense loss, and the whole Med3DSegmenter to a folder within, each with the processor.

    Args:
        state: the model's weights, where an engine has them; None takes the model's own.
    """
    state = model.state_dict() if state is None else state
    segmenter = folder / SEGMENTER
    own = {name.removeprefix("clip."): weight for name, weight in state.items() if name.startswith("clip.")}
    model.clip.save_pretrained(folder, state_dict=own)
    model.save_pretrained(segmenter, state_dict=state)
    for place in (folder, segmenter):
        processor.save_pretrained(place)
