"""Answer with a language model of 8 or 4 bits, and check when it is loaded how often it still gives the same next token.

The check compares the model before and after on three reports of an empty volume, token by token: whatever was said before a place, both are
asked for the next token there. It takes two passes over a few hundred tokens. `python -m benchmarks.quantized MODEL` measures more.
"""

import logging

import torch
from torch import Tensor

from med3dvlm.models.quantized import quantize
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import Med3DVLMProcessor
from med3dvlm.prompts import REPORT_PROMPTS

logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.9  # below it, one next token in ten is another one
REPORTS = (
    "Findings: The lungs are clear. No pleural effusion or pneumothorax. The heart is not enlarged. No enlarged lymph nodes. "
    "Impression: No acute finding in the chest.",
    "Findings: A nodule of 8 mm lies in the right upper lobe. Moderate emphysema. Small pleural effusion on the left with atelectasis of the "
    "lower lobe. Calcified coronary arteries. Impression: Pulmonary nodule, follow-up in three months.",
    "Findings: The liver holds a round mass of 12 mm in its right lobe. Gallbladder, pancreas and spleen are normal. A cyst in the left kidney. "
    "No free fluid. Impression: Liver mass, further examination by MRI.",
)


def quantize_checked(model: Med3DVLM, processor: Med3DVLMProcessor, method: str, device: torch.device) -> float:
    """Quantise the language model, move the whole model to the device, and return the agreement of next tokens, from 0 to 1.

    An agreement below LEAST_AGREEMENT is logged as a warning.
    """
    volume = torch.full((1, 1, *processor.image_processor.size), processor.image_processor.grid.values[0], dtype=model.dtype)
    with torch.no_grad():
        features = model.encode_image(volume.to(model.device))
    before = [logits.argmax(dim=-1).cpu() for logits in next_tokens(model, processor, features, REPORTS)]
    quantize(model.language_model, device, method)
    model.to(device)  # type: ignore[arg-type]
    after = [logits.argmax(dim=-1).cpu() for logits in next_tokens(model, processor, features, REPORTS)]
    same = torch.cat([one == other for one, other in zip(before, after, strict=True)])
    agreement = float(same.float().mean())
    if agreement < LEAST_AGREEMENT:
        logger.warning(
            "In %s this language model gives another next token than before at %.0f %% of %d places of three reports, more than the %.0f %% that "
            "are usual: compare its answers with those of the model as it was before you rely on it.",
            method, 100 * (1 - agreement), len(same), 100 * (1 - LEAST_AGREEMENT),
        )  # fmt: skip
    return agreement


@torch.no_grad()
def next_tokens(
    model: Med3DVLM, processor: Med3DVLMProcessor, features: tuple[Tensor, Tensor], reports: tuple[str, ...] | list[str]
) -> list[Tensor]:
    """Return logits (tokens of the report, V) for each report, where every token is predicted from those that precede it in the report."""
    image = tuple(level.to(model.device) for level in features)
    found = []
    for report in reports:
        messages = [{"role": "user", "content": REPORT_PROMPTS[0]}, {"role": "assistant", "content": report}]
        coded = processor.encode(messages)
        ids, labels = (torch.tensor([coded[name]], device=model.device) for name in ("input_ids", "labels"))
        found.append(model(input_ids=ids, image_features=image, labels=labels).logits)
    return found
