"""The published text classifier that labelled CT-RATE: RadBERT with one linear layer on its pooled output, 18 findings.

Source: CT-CLIP's `text_classifier` (Hamamci et al. 2024), weights `models/RadBertClassifier.pth` of the CT-RATE data set, which ask for
its terms to be accepted; encoder and tokenizer `zzxslp/RadBERT-RoBERTa-4m`. Reports are cut at 512 tokens, and a finding is stated from
a probability of 0.5, as there. In the file, the encoder's tensors begin with "model." and the layer is "classifier.weight" (18, width),
"classifier.bias" (18,).

Shapes: N = reports, K = 18.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.reports.findings import FINDINGS_CT_RATE
from med3dvlm.special_tokens import only_words

ENCODER = "zzxslp/RadBERT-RoBERTa-4m"
MAX_TOKENS = 512
WHERE = "it is models/RadBertClassifier.pth of the data set ibrahimhamamci/CT-RATE on the Hugging Face hub, once its terms are accepted"


class RadBertClassifier:
    """The classifier of the 18 findings that a report states.

    Args:
        weights: `RadBertClassifier.pth`.
        encoder: folder or hub id of RadBERT's settings and tokenizer (its own weights are not needed).
        device: where it runs, as torch names devices.

    Raises:
        FileNotFoundError: there is no such file of weights; the message says where it is published.
        ValueError: the file is damaged, holds code, or holds another model.
    """

    names = FINDINGS_CT_RATE

    def __init__(self, weights: str | Path, encoder: str | Path = ENCODER, device: str = "cpu") -> None:
        from torch import nn
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        tensors = _read(Path(weights))
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.encoder = AutoModel.from_config(AutoConfig.from_pretrained(encoder))
        self.layer = nn.Linear(self.encoder.config.hidden_size, len(self.names))
        for module, prefix in ((self.encoder, "model."), (self.layer, "classifier.")):
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            _fill(module, own, weights)
            module.eval().requires_grad_(False).to(device)

    def probabilities(self, texts: Sequence[str], batch_size: int = 16) -> NDArray[np.float64]:
        """Return probabilities (N, K); the batch size changes the time only."""
        import torch
        from tqdm import tqdm

        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike lengths need little padding
        result = np.zeros((len(texts), len(self.names)))
        for start in tqdm(range(0, len(order), batch_size), desc="RadBERT", unit="batch", disable=None):
            rows = order[start : start + batch_size]
            tokens = self.tokenizer(
                [only_words(self.tokenizer, texts[row]) for row in rows],
                max_length=MAX_TOKENS,
                truncation=True,
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                pooled = self.encoder(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output  # (batch, width)
                result[rows] = self.layer(pooled).sigmoid().double().cpu().numpy()
        return result

    def table(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return (N, K) of 0 and 1, columns in the order of `names`."""
        return (self.probabilities(texts) >= 0.5).astype(np.int64)


def _read(file: Path) -> dict[str, Any]:
    import torch

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {WHERE}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the unpickler fail in any way
        raise ValueError(f"{file} is damaged or holds more than tensors, which is not run; {WHERE}") from error
    if not isinstance(tensors, dict) or not {"classifier.weight", "classifier.bias"} <= set(tensors):
        raise ValueError(f"{file} holds no RadBertClassifier: classifier.weight and classifier.bias are not in it; {WHERE}")
    # Older transformers stored the numbers of the positions; they are computed now.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}


def _fill(module: Any, tensors: dict[str, Any], file: str | Path) -> None:
    """Load exactly: a tensor too many, too few or of another shape means another model."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not fit {type(module).__name__} with {len(FINDINGS_CT_RATE)} findings: {reason}") from error
