"""The text scores as a module of `evaluate`, which needs no network: the name of the score is the configuration.

import evaluate
from med3dvlm.metrics import evaluate_module

scores = evaluate.combine([evaluate.load(evaluate_module.__file__, name) for name in ("bleu", "rouge", "meteor")])
scores.compute(predictions=["a nodule"], references=["one nodule"])                      # {"bleu1": ..., "corpus_bleu4": ..., "rouge1": ...}
scores.compute(predictions=["a nodule"], references=["one nodule"], per_sample=True)      # {"bleu1": [one value a pair], ...}
"""

from typing import Any

import datasets
import evaluate

from med3dvlm.metrics.bertscore import bert_scorer
from med3dvlm.metrics.text import TEXT_METRICS, corpus_bleu


class TextScore(evaluate.Metric):  # type: ignore[misc]
    """One of `TEXT_METRICS` or "bertscore", with one reference a prediction: means over the pairs, or the values themselves.

    "bleu" has the BLEU of all pairs together besides, "bertscore" the name of its model.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in (*TEXT_METRICS, "bertscore"):
            raise ValueError(f"there is no text score {self.config_name!r}; known are {', '.join(TEXT_METRICS)} and bertscore")
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _compute(self, predictions: list[str], references: list[str], per_sample: bool = False) -> dict[str, Any]:
        scorer = bert_scorer() if self.config_name == "bertscore" else None
        values = scorer.values(predictions, references) if scorer else TEXT_METRICS[self.config_name](predictions, references)
        if per_sample:
            return {name: column.tolist() for name, column in values.items()}
        together: dict[str, Any] = corpus_bleu(predictions, references) if self.config_name == "bleu" else {}
        return (
            {name: float(column.mean()) for name, column in values.items()}
            | together
            | ({"bertscore_model": scorer.name} if scorer else {})
        )
