"""Scores of generated text against reference text.

Predictions and references are equally long lists of strings, one reference a prediction; every score lies in 0..1.
Nothing is fetched from a hub: `evaluate.load("bleu")` downloads code, so BLEU is computed here as that code does it
(13a tokenisation, no smoothing), ROUGE comes from rouge-score and METEOR from nltk. METEOR needs WordNet on the
machine; `meteor_available` says what is missing.
"""

import math
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

WORDNET_DIRECTORIES = ("/usr/share/wordnet",)  # where Debian's wordnet-base puts the WordNet 3.0 files
WORDNET_MISSING = (
    "METEOR needs WordNet, which is neither in nltk's data nor in /usr/share/wordnet nor in $WNSEARCHDIR: "
    "run `python -m nltk.downloader wordnet` or `apt-get install wordnet-base`."
)


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Every score of this module by name, over all pairs.

    `bleu1` and `rouge1` are the "BLEU" and "ROUGE" of the Med3DVLM and M3D papers; `corpus_bleu1`..`4` pool the
    n-grams of all pairs, as machine translation does. A score that cannot be computed here has no entry and its reason
    stands in `unavailable`.

    Raises:
        ValueError: if there are no pairs or the lists differ in length.
    """
    _check_pairs(predictions, references)
    scores: dict[str, Any] = {"bleu1": bleu(predictions, references), **corpus_bleu(predictions, references)}
    scores |= rouge(predictions, references)
    unavailable: dict[str, str] = {}
    reason = meteor_available()
    if reason is None:
        scores["meteor"] = meteor(predictions, references)
    else:
        unavailable["meteor"] = reason
    scores["exact_match"] = exact_match(predictions, references)
    scores["token_f1"] = token_f1(predictions, references)
    return scores | {"samples": len(predictions), "unavailable": unavailable}


def bleu(predictions: Sequence[str], references: Sequence[str], order: int = 1) -> float:
    """BLEU of n-grams up to `order`, computed for each pair and averaged; the papers' tables print `order=1`."""
    _check_pairs(predictions, references)
    return _mean(_bleu([prediction], [reference], order) for prediction, reference in zip(predictions, references, strict=True))


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`corpus_bleu1` .. `corpus_bleu4`: n-gram matches and lengths summed over all pairs (Papineni et al. 2002)."""
    _check_pairs(predictions, references)
    return {f"corpus_bleu{order}": _bleu(predictions, references, order) for order in (1, 2, 3, 4)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F-measures of `rouge1`, `rouge2` and `rougeL` by rouge-score without stemming, averaged over the pairs."""
    from rouge_score.rouge_scorer import RougeScorer

    _check_pairs(predictions, references)
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    return {name: _mean(score[name].fmeasure for score in scores) for name in names}


def meteor_available() -> str | None:
    """None where METEOR can be computed, else one sentence that says what to install."""
    return None if _find_wordnet() is not None else WORDNET_MISSING


def meteor(predictions: Sequence[str], references: Sequence[str]) -> float:
    """METEOR (nltk; alpha 0.9, beta 3, gamma 0.5, as `evaluate` uses it), averaged over the pairs.

    Words are split by nltk's word tokenizer after an untrained Punkt sentence splitter; the trained one that
    `evaluate` uses is a download and differs only at abbreviations.

    Raises:
        RuntimeError: if WordNet is not on this machine.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    _check_pairs(predictions, references)
    find = _find_wordnet()
    if find is None:
        raise RuntimeError(WORDNET_MISSING)
    wordnet = find()
    sentences, words = PunktSentenceTokenizer(), NLTKWordTokenizer()

    def tokens(text: str) -> list[str]:
        return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]

    return _mean(
        single_meteor_score(tokens(reference), tokens(prediction), wordnet=wordnet)
        for prediction, reference in zip(predictions, references, strict=True)
    )


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference once case, punctuation and white space are set aside."""
    _check_pairs(predictions, references)
    return _mean(_words(prediction) == _words(reference) for prediction, reference in zip(predictions, references, strict=True))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the words shared by prediction and reference, in any order, articles kept, averaged over the pairs."""
    _check_pairs(predictions, references)
    return _mean(_token_f1(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True))


def collapse(predictions: Sequence[str]) -> dict[str, float]:
    """How far a model writes the same for every scan: `distinct`, the share of different texts, `commonest`, the share
    of the most frequent.

    Texts that differ only in case, punctuation or white space count as the same.
    """
    if not predictions:
        raise ValueError("collapse needs at least one prediction, got none.")
    counts = Counter(tuple(_words(prediction)) for prediction in predictions)
    return {"distinct": len(counts) / len(predictions), "commonest": max(counts.values()) / len(predictions)}


def tokenize_13a(text: str) -> list[str]:
    """Words and punctuation as mteval-v13a and sacrebleu's "13a" split them; case is kept."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)  # a period or comma, unless a digit stands before it
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)  # ... or after it
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash after a digit
    return text.split()


def _bleu(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    matches, totals = [0] * order, [0] * order
    written = expected = 0
    for prediction, reference in zip(predictions, references, strict=True):
        ours, theirs = tokenize_13a(prediction), tokenize_13a(reference)
        written, expected = written + len(ours), expected + len(theirs)
        for n in range(1, order + 1):
            grams = Counter(_ngrams(ours, n))
            matches[n - 1] += (grams & Counter(_ngrams(theirs, n))).total()
            totals[n - 1] += grams.total()
    if min(matches) == 0:
        return 0.0
    brevity = min(1.0, math.exp(1 - expected / written))
    return brevity * math.exp(sum(math.log(match / total) for match, total in zip(matches, totals, strict=True)) / order)


def _ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _words(text: str) -> list[str]:
    """Lower-case words; decimals such as 1.5 stay whole, every other punctuation mark separates."""
    punctuation = re.escape(string.punctuation)
    return re.findall(rf"\d+(?:[.,]\d+)+|[^\s{punctuation}]+", text.lower())


def _token_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _find_wordnet() -> Callable[[], Any] | None:
    """The function that opens this machine's WordNet, or None. Finding is quick, opening takes two seconds."""
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return _nltk_wordnet
    directories = [*filter(None, [os.environ.get("WNSEARCHDIR")]), *WORDNET_DIRECTORIES]
    for directory in directories:
        if (Path(directory) / "data.noun").is_file():
            return lambda: _wordnet_in(directory)
    return None


def _nltk_wordnet() -> Any:
    from nltk.corpus import wordnet

    return wordnet


@lru_cache(maxsize=1)
def _wordnet_in(directory: str) -> Any:
    """nltk's WordNet reader over the plain WordNet files in `directory`."""
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader

    if directory not in nltk.data.path:  # nltk reads only below the folders registered there
        nltk.data.path.append(directory)

    class PlainWordNet(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            # Debian leaves this file out. Its 45 category names are looked up when a synset is read but never used by
            # METEOR.
            if file == "lexnames" and not (Path(directory) / file).is_file():
                return StringIO("".join(f"{number:02d}\tcategory{number}\t0\n" for number in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """No map to nltk's own copy of WordNet: it serves other languages and wants that copy's data."""

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")  # English only
        return PlainWordNet(directory, None)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"The {name} must be a list of strings, got one string; put it in a list.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} references; pass equally many, at least one, in the same order."
        )


def _mean(values: Iterator[Any]) -> float:
    collected = [float(value) for value in values]
    return math.fsum(collected) / len(collected)
