"""The text scores as modules of `evaluate`, defined here, so that nothing is fetched from a hub.

    import evaluate
    from med3dvlm.metrics.modules import Bleu, Meteor, Rouge

    scores = evaluate.combine([Bleu(), Rouge(), Meteor()])
    scores.compute(predictions=["a nodule"], references=["one nodule"])
    scores.compute(predictions=["a nodule"], references=["one nodule"], per_sample=True)      # lists, one value a pair

One reference a prediction. Names and values are those of the public modules `bleu`, `rouge`, `meteor` and `bertscore`,
but for two things. A text without words where the public `bleu` divides by zero scores 0. The public `rouge` by default
draws resamples and gives the median of their means, another number at each call; here it is the mean, and
`Rouge(bootstrap=True, seed=...)` gives theirs. Importing this file imports `datasets`, hence a second or two.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics import text
from med3dvlm.metrics.bertscore import bert_scorer
from med3dvlm.metrics.meteor import meteor_values

Values = dict[str, NDArray[np.float64]]


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """What the modules share: a subclass gives `values`, one figure a pair; `compute` gives their means or, with
    `per_sample=True`, the figures themselves as lists."""

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        """`{name: (N,)}` of N pairs."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions, references: N texts each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Any, references: Any, per_sample: bool = False) -> dict[str, Any]:
        values = self.values(list(predictions), list(references))
        if per_sample:
            return {name: array.tolist() for name, array in values.items()}
        return {name: float(np.mean(array)) for name, array in values.items()} | self._pooled(list(predictions), list(references))

    def _pooled(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Figures of all pairs together, which no pair has."""
        return {}


class Bleu(TextMetric):
    """BLEU, 13a words, unsmoothed: "bleu", "precisions" and lengths of all pairs pooled, with n-grams up to `max_order`,
    as the public module; "corpus_bleu1".."4", the same for each order; "bleu1".."4", the means over pairs."""

    def __init__(self, max_order: int = 4, **arguments: Any) -> None:
        if max_order not in text.ORDERS:
            raise ValueError(f"max_order={max_order}; choose one of {', '.join(map(str, text.ORDERS))}.")
        self.max_order = max_order
        super().__init__(**arguments)

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        return text.bleu_values(predictions, references)

    def _pooled(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        counts = text.bleu_counts(predictions, references).sum(axis=0)
        matches, totals = counts[: self.max_order], counts[4 : 4 + self.max_order]
        written, expected = int(counts[8]), int(counts[9])
        scores = text.bleu_of_counts(counts).tolist()
        return {f"corpus_bleu{order}": score for order, score in zip(text.ORDERS, scores, strict=True)} | {
            "bleu": scores[self.max_order - 1],
            "precisions": (matches / np.maximum(totals, 1)).tolist(),
            "brevity_penalty": float(np.exp(min(0.0, 1 - expected / written))) if written else 0.0,
            "length_ratio": written / expected if expected else None,
            "translation_length": written,
            "reference_length": expected,
        }


class Rouge(TextMetric):
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L without stemming: the means over pairs, or with `bootstrap` the median
    of the means of 1,000 resamples, the public module's aggregate, which depends on `seed`."""

    def __init__(self, bootstrap: bool = False, **arguments: Any) -> None:
        self.bootstrap = bootstrap
        super().__init__(**arguments)

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        return text.rouge_values(predictions, references)

    def _pooled(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        if not self.bootstrap:
            return {}
        from rouge_score.scoring import BootstrapAggregator, Score

        aggregator = BootstrapAggregator()
        values = self.values(predictions, references)
        for row in zip(*values.values(), strict=True):
            aggregator.add_scores({name: Score(value, value, value) for name, value in zip(values, row, strict=True)})
        return {name: float(score.mid.fmeasure) for name, score in aggregator.aggregate().items()}


class Meteor(TextMetric):
    """METEOR: alpha 0.9, beta 3, gamma 0.5, averaged over the pairs."""

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        return {"meteor": meteor_values(predictions, references)}


class BertScore(TextMetric):
    """BERTScore, without idf or rescaling: "precision", "recall" and "f1", means over the pairs, and "bertscore_model".

    The model is that of `bertscore.bert_scorer`, loaded at first use and shared by all modules of the process.
    """

    def __init__(self, model: str | None = None, layers: int | None = None, device: str | None = None, **arguments: Any) -> None:
        self.model = model, layers, device
        super().__init__(**arguments)

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        values = bert_scorer(*self.model).values(predictions, references)
        return {name.removeprefix("bertscore_"): array for name, array in values.items()}

    def _pooled(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"bertscore_model": bert_scorer(*self.model).name}


class ExactMatch(TextMetric):
    """Share of predictions equal to their reference but for case, punctuation and white space. The public module of this
    name compares them as they are."""

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        return {"exact_match": text.exact_match_values(predictions, references)}


class TokenF1(TextMetric):
    """F1 of the words that prediction and reference share, averaged over the pairs."""

    def values(self, predictions: Sequence[str], references: Sequence[str]) -> Values:
        return {"token_f1": text.token_f1_values(predictions, references)}
