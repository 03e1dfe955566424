"""Embed scans and texts by a Med3DCLIP.

Shapes: B scans or texts, P the width of the space that they share.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from med3dvlm.checkpoints import load_clip, model_type
from med3dvlm.models.clip_processor import shortest
from med3dvlm.prompts import finding_prompts
from med3dvlm.reports.findings import FINDINGS_CT_RATE


class Embedder:
    """A Med3DCLIP with its processor, on a device.

    Args:
        device: by default the GPU where there is one.
        max_text_length: tokens of a text, at most those of the processor, which is the default; the rest of a longer one is cut.

    Raises:
        FileNotFoundError, ValueError: the directory holds no model, or one of another kind.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None, max_text_length: int | None = None) -> None:
        if (kind := model_type(path)) != "med3d_clip":
            raise ValueError(f"{path} holds a {kind} model, which does not embed; name the output of stage 1")
        self.model, self.processor = load_clip(path)
        self.model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))  # type: ignore[arg-type]
        self.processor.max_text_length = shortest(self.processor.max_text_length, max_text_length)

    @torch.no_grad()
    def volumes(self, pixel_values: Tensor) -> Tensor:
        """Embed scans as the processor makes them (B, 1, D, H, W) to (B, P) float32 on the CPU, of length 1."""
        return self.model.encode_image(pixel_values.to(self.model.device, self.model.dtype)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts to (B, P) float32 on the CPU, of length 1."""
        return self.model.encode_text(**self.processor(text=texts).to(self.model.device)).float().cpu()

    @cached_property
    def _findings(self) -> Tensor:
        return prompt_directions(self, FINDINGS_CT_RATE, 1)

    def probabilities(self, embedding: Tensor) -> dict[str, float]:
        """Return zero-shot scores of the findings of CT-RATE: how much nearer a scan's embedding (P) is to "... is present" than to
        "... is not present"."""
        odds = self._findings @ embedding.double()
        return dict(zip(FINDINGS_CT_RATE, odds.sigmoid().tolist(), strict=True))


def prompt_directions(embedder: Embedder, names: Sequence[str], templates: int) -> Tensor:
    """Return (K, P) float64: temperature times the difference of the present and the absent prompt's embedding. Times a volume's embedding it
    is a finding's log-odds.
    """
    prompts = [finding_prompts(name, templates) for name in names]
    sides = []
    for side in (0, 1):
        embedded = [embedder.texts([pairs[number][side] for pairs in prompts]).double() for number in range(templates)]  # (K, P) each
        sides.append(torch.nn.functional.normalize(torch.stack(embedded).mean(dim=0), dim=-1))
    return embedder.model.temperature.detach().double().cpu() * (sides[0] - sides[1])
