"""METEOR (Banerjee and Lavie 2005; Lavie and Agarwal 2007) by nltk, with the data that it needs found on this machine.

It needs two data sets: WordNet 3.0, for synonyms, without which there is no METEOR, and the English Punkt model, which tells the period of an
abbreviation from that of a sentence. Nothing is downloaded.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDNET_DIRECTORIES = ("/usr/share/wordnet",)  # where Debian's wordnet-base puts the WordNet 3.0 files
WORDNET_MISSING = (
    "METEOR needs WordNet, which is neither in nltk's data nor in /usr/share/wordnet nor in $WNSEARCHDIR: "
    "run `python -m nltk.downloader wordnet` or `apt-get install wordnet-base`."
)
# Where llama-index-core, a package on PyPI, carries a part of nltk's data: for machines that reach nothing else.
PUNKT_PACKAGE, PUNKT_FOLDER = "llama_index", "core/_static/nltk_cache"


def meteor_available() -> str | None:
    """Return None where METEOR can be computed, else one sentence that says what to install."""
    return None if _find_wordnet() is not None else WORDNET_MISSING


def meteor_values(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return METEOR (N,) of each pair: alpha 0.9, beta 3, gamma 0.5; 0 where either text is empty.

    Words are those of nltk's `word_tokenize`, as in the `meteor` module of `evaluate`: to the digit with the trained
    Punkt model, and without it except at abbreviations ("approx. 5 mm"); `punkt_model` says which was used.

    Raises:
        RuntimeError: if WordNet is not on this machine.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    find = _find_wordnet()
    if find is None:
        raise RuntimeError(WORDNET_MISSING)
    wordnet, stemmer = _Synonyms(find()), _Stemmer()
    _, sentences = _punkt()
    words = NLTKWordTokenizer()

    def tokens(text: str) -> list[str]:
        return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]

    cached = lru_cache(maxsize=None)(tokens)  # a reference, or a collapsed model's only report, comes many times
    return np.array(
        [
            single_meteor_score(cached(reference), cached(prediction), stemmer=stemmer, wordnet=wordnet)
            for prediction, reference in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    )


def punkt_model() -> str:
    """Return "trained", or "untrained" where nltk's `punkt_tab` is neither in its data nor in llama-index-core.

    `python -m nltk.downloader punkt_tab` or `pip install --no-deps llama-index-core` brings it.
    """
    return _punkt()[0]


@lru_cache(maxsize=1)
def _punkt() -> tuple[str, Any]:
    import nltk
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer

    spec = importlib.util.find_spec(PUNKT_PACKAGE)
    carried = [Path(place) / PUNKT_FOLDER for place in (spec.submodule_search_locations or [])] if spec else []
    nltk.data.path += [str(folder) for folder in carried if str(folder) not in nltk.data.path]  # last: nltk's own data go first
    try:
        return "trained", PunktTokenizer("english")
    except LookupError:
        return "untrained", PunktSentenceTokenizer()


class _Stemmer:
    """Porter's stemmer that stems each word once, since reports repeat their words."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=None)(PorterStemmer().stem)


class _Synonyms:
    """WordNet with the interface that METEOR uses, each word looked up once: `synsets(word)`, of each `lemmas()`, of each `name()`."""

    def __init__(self, wordnet: Any) -> None:
        def synsets(word: str) -> list[SimpleNamespace]:
            names = {lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()}
            lemmas = [SimpleNamespace(name=partial(str, name)) for name in names]
            return [SimpleNamespace(lemmas=lambda: lemmas)]

        self.synsets = lru_cache(maxsize=None)(synsets)


def _find_wordnet() -> Callable[[], Any] | None:
    """Return the function that opens this machine's WordNet, or None. Finding is quick, opening takes two seconds."""
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
    """Return nltk's WordNet reader over the plain WordNet files in `directory`."""
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
