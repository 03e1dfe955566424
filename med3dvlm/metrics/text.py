"""Scores of generated text against reference text.

Predictions and references are equally long lists of N strings, one reference a prediction; every score lies in 0..1 and
grows with agreement. `text_values` gives one figure a pair, for intervals and galleries, `text_scores` their means.
Each equals the public module of the same name of `evaluate`; where that divides by zero, at a lone empty text, the score here is 0.
`metrics/evaluate_module.py` is a module for `evaluate.load` with these scores.

To add a score, write a function of predictions and references and name it in TEXT_METRICS: it then stands in scores.json with its interval,
and on the page where LABELS gives it a label.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics.meteor import meteor_available, meteor_values, punkt_model

if TYPE_CHECKING:
    from med3dvlm.metrics.bertscore import BertScorer

Values = dict[str, NDArray[np.float64]]  # (N,) by the name of the figure
ORDERS = (1, 2, 3, 4)


def text_values(predictions: Sequence[str], references: Sequence[str], bert_scorer: "BertScorer | None" = None) -> Values:
    """Return each score of each pair, (N,) by name: bleu1..4, rouge1, rouge2, rougeL, meteor, exact_match, token_f1.

    `meteor` is missing where `meteor_available` says why; with a `bert_scorer` (see `metrics.bertscore`) there are
    bertscore_precision, bertscore_recall and bertscore_f1 too.

    Raises:
        ValueError: if there are no pairs, the lists differ in length, or an entry is no text.
    """
    _check_pairs(predictions, references)
    values: Values = {}
    for name, metric in TEXT_METRICS.items():
        if name != "meteor" or meteor_available() is None:
            values |= metric(predictions, references)
    return values if bert_scorer is None else values | bert_scorer.values(predictions, references)


def text_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    bert_scorer: "BertScorer | None" = None,
    values: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, Any]:
    """Return the mean of each of `text_values` by name, the scores of all pairs together, and notes on how scores were computed.

    `bleu1` and `rouge1` are the "BLEU" and "ROUGE" of the Med3DVLM and M3D papers; `corpus_bleu1`..`4` pool the
    n-grams of all pairs, as machine translation does. `bertscore_model` names the model of the BERTScore: figures of
    two models must not be compared. `punkt_model` is "trained" where METEOR equals the published module. A score that
    cannot be computed here has no entry and its reason stands in `unavailable`.

    Args:
        values: what `text_values` gave for the same texts, where that is known already.

    Raises:
        ValueError: as `text_values`.
    """
    values = text_values(predictions, references, bert_scorer) if values is None else values
    scores: dict[str, Any] = {name: _mean(column) for name, column in values.items()}
    scores |= corpus_bleu(predictions, references)
    if bert_scorer is not None:
        scores["bertscore_model"] = bert_scorer.name
    reason = meteor_available()
    if reason is None:
        scores["punkt_model"] = punkt_model()
    return scores | {"samples": len(predictions), "unavailable": {} if reason is None else {"meteor": reason}}


def bleu_values(predictions: Sequence[str], references: Sequence[str]) -> Values:
    """Return `bleu1` .. `bleu4`, (N,) each: of each pair alone, without smoothing, so that a short text often has no BLEU-4."""
    values = bleu_of_counts(bleu_counts(predictions, references))
    return {f"bleu{order}": values[:, order - 1] for order in ORDERS}


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return `corpus_bleu1` .. `corpus_bleu4`: n-gram matches and lengths summed over all pairs (Papineni et al. 2002)."""
    values = bleu_of_counts(bleu_counts(predictions, references).sum(axis=0))
    return {f"corpus_bleu{order}": float(values[order - 1]) for order in ORDERS}


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return the counts (N, 10) behind BLEU: matching n-grams and all n-grams of the prediction for n = 1..4, then both lengths.

    The sum over pairs is the count of the corpus; any weighted sum is that of a resample.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check_pairs(predictions, references)
    scorer = BLEU(effective_order=True)  # the mteval-v13a tokenizer
    scores = [scorer.sentence_score(prediction, [reference]) for prediction, reference in zip(predictions, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=np.float64)


def bleu_of_counts(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return BLEU-1 to BLEU-4 (..., 4) of (..., 10) `bleu_counts`: 0 where an n-gram order has no match."""
    matches, totals, written, expected = counts[..., :4], counts[..., 4:8], counts[..., 8:9], counts[..., 9:]
    with np.errstate(divide="ignore"):
        logarithms = np.log(matches / np.maximum(totals, 1))  # minus infinity where nothing matches
    geometric_means = np.exp(np.cumsum(logarithms, axis=-1) / np.arange(1, 5))
    brevity = np.exp(np.minimum(0, 1 - expected / np.maximum(written, 1)))  # nothing written: nothing matches either
    result: NDArray[np.float64] = geometric_means * brevity
    return result


def rouge_values(predictions: Sequence[str], references: Sequence[str]) -> Values:
    """Return `rouge1`, `rouge2` and `rougeL`, (N,) each: F-measures on rouge-score's lower-case ASCII words, without stemming.

    rouge-score fills a table of words times words in Python for ROUGE-L, seconds for two long reports; the same length
    comes here from a row of bits (Hyyrö 2004).
    """
    from rouge_score.tokenize import tokenize

    _check_pairs(predictions, references)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        ours, theirs = tokenize(prediction, None), tokenize(reference, None)
        shared = [(Counter(_ngrams(ours, n)) & Counter(_ngrams(theirs, n))).total() for n in (1, 2)]
        common = _longest_common_subsequence(ours, theirs)
        rows.append([_f1(shared[0], ours, theirs), _f1(shared[1], ours[1:], theirs[1:]), _f1(common, ours, theirs)])
    return dict(zip(("rouge1", "rouge2", "rougeL"), np.array(rows).T, strict=True))


def exact_match_values(predictions: Sequence[str], references: Sequence[str]) -> Values:
    """Return `exact_match`, (N,): 1 where prediction and reference are equal but for case, punctuation and white space, else 0."""
    return {"exact_match": np.array([float(_words(p) == _words(r)) for p, r in zip(predictions, references, strict=True)])}


def token_f1_values(predictions: Sequence[str], references: Sequence[str]) -> Values:
    """Return `token_f1`, (N,): F1 of the words that both share, in any order, articles kept; of two texts without words 1, of one 0."""
    return {"token_f1": np.array([_token_f1(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True)])}


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Values]] = {
    "bleu": bleu_values,
    "rouge": rouge_values,
    "meteor": lambda predictions, references: {"meteor": meteor_values(predictions, references)},
    "exact_match": exact_match_values,
    "token_f1": token_f1_values,
}
LABELS = {  # of the figures that a page shows
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "bertscore_f1": "BERTScore",
}


def collapse(predictions: Sequence[str]) -> dict[str, float]:
    """Measure how often a model writes the same for every scan: `distinct`, the share of different texts, `commonest`, the share of the most
    frequent, and `similarity`, the mean over all pairs of predictions of their share of common words.

    Texts that differ only in case, punctuation or white space count as the same. The share of common words is Dice's,
    2 |A and B| / (|A| + |B|) of the sets of words; of a single prediction it is 1.
    """
    if not predictions:
        raise ValueError("collapse needs at least one prediction, got none.")
    texts = [tuple(_words(prediction)) for prediction in predictions]
    counts = Counter(texts)
    return {
        "distinct": len(counts) / len(predictions),
        "commonest": max(counts.values()) / len(predictions),
        "similarity": _mean_dice(counts),
    }


def _ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _f1(shared: int, ours: list[str], theirs: list[str]) -> float:
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence. Bit i of `row` is 0 where it grows at word i of `first`."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        found = row & places.get(word, 0)
        row = (row + found | row - found) & everything
    return len(first) - row.bit_count()


def _words(text: str) -> list[str]:
    """Return lower-case words; decimals such as 1.5 stay whole, every other punctuation mark separates."""
    punctuation = re.escape(string.punctuation)
    return re.findall(rf"\d+(?:[.,]\d+)+|[^\s{punctuation}]+", text.lower())


def _token_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), ours, theirs)


def _mean_dice(counts: Counter[tuple[str, ...]]) -> float:
    from scipy.sparse import csr_array

    times = np.array(list(counts.values()), dtype=np.float64)  # (T,) of T different texts
    total = times.sum()
    if total == 1:
        return 1.0
    vocabulary: dict[str, int] = {}
    columns = [[vocabulary.setdefault(word, len(vocabulary)) for word in sorted(set(text))] for text in counts]
    sizes = np.array([len(row) for row in columns])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    holds = csr_array((np.ones(starts[-1]), np.concatenate([*columns, []]).astype(int), starts), shape=(len(counts), len(vocabulary)))
    likeness = 0.0
    for row in range(len(counts)):  # a row at a time: all pairs of 50,000 reports would not fit
        shared = (holds @ holds[[row]].toarray()[0]) if vocabulary else np.zeros(len(counts))
        union = np.maximum(sizes + sizes[row], 1)
        dice = np.where(sizes + sizes[row] == 0, 1.0, 2 * shared / union)
        likeness += times[row] * float(dice @ times)
    return float((likeness - total) / (total * (total - 1)))  # without the pairs of a prediction and itself


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"The {name} must be a list of strings, got one string; put it in a list.")
        if wrong := [index for index, text in enumerate(texts) if not isinstance(text, str)]:
            kind = type(texts[wrong[0]]).__name__
            raise ValueError(f"{len(wrong)} of the {name} are no text, the first is number {wrong[0]}, of type {kind}; pass strings.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} references; pass equally many, at least one, in the same order."
        )


def _mean(values: Any) -> float:
    return math.fsum(values) / len(values)
