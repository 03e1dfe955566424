"""A linear classifier of the findings that a report states, trained on labelled reports.

Its features are the TF-IDF of words and pairs of words, and optionally the findings that the rules of `med3dvlm.reports.findings` read (a
column of 0 and 1 per rule). One logistic regression per finding. Stored are numbers and words alone, no code: `classifier.json` (names,
settings, vocabulary) and `classifier.safetensors`.

Shapes: N = reports, K = findings, V = terms of the vocabulary, R = findings that the rules read for it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.reports.findings import RULES_FILE, findings_table

SETTINGS_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"
WORDS = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True, "token_pattern": r"(?u)\b\w+\b"}


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier, made by `train` or `load`."""

    names: tuple[str, ...]  # K
    rules: tuple[str, ...]  # R
    vocabulary: tuple[str, ...]  # V
    rarity: NDArray[np.float64]  # (V,) inverse document frequency
    weights: NDArray[np.float64]  # (K, V + R)
    bias: NDArray[np.float64]  # (K,)

    @classmethod
    def train(
        cls, texts: Sequence[str], labels: Any, names: Sequence[str], rules: Sequence[str] = (), strength: float = 10.0
    ) -> "LinearClassifier":
        """Learn from N labelled reports.

        Args:
            labels: (N, K) of 0 and 1, columns in the order of `names`.
            rules: the findings whose reading by the rules is an input too.
            strength: scikit-learn's C: the larger, the closer to the training reports.

        Raises:
            ValueError: if the numbers of texts and labels differ, or a finding is present in every report or in none.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        labels = np.asarray(labels)
        if labels.shape != (len(texts), len(names)):
            raise ValueError(f"labels are {labels.shape}, but there are {len(texts)} reports and {len(names)} findings")
        if constant := [name for name, column in zip(names, labels.T, strict=True) if len(set(column.tolist())) < 2]:
            raise ValueError(f"{', '.join(constant)}: present in every report or in none; add reports of the other kind or drop the column")
        vectorizer = TfidfVectorizer(**WORDS)
        seen = _beside(vectorizer.fit_transform(texts), texts, rules)
        # The larger class would drown the rarer one: a finding of one report in twenty counts as much as its absence.
        fits = [
            LogisticRegression(C=strength, class_weight="balanced", solver="liblinear", random_state=0).fit(seen, column)
            for column in labels.T
        ]
        return cls(
            tuple(names),
            tuple(rules),
            tuple(vectorizer.get_feature_names_out().tolist()),
            vectorizer.idf_,
            np.concatenate([fit.coef_ for fit in fits]),
            np.concatenate([fit.intercept_ for fit in fits]),
        )

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return probabilities (N, K)."""
        from scipy.special import expit
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not texts:
            return np.zeros((0, len(self.names)))
        vectorizer = TfidfVectorizer(**WORDS, vocabulary={term: index for index, term in enumerate(self.vocabulary)})
        vectorizer.idf_ = self.rarity
        seen = _beside(vectorizer.transform(texts), texts, self.rules)
        return np.asarray(expit(seen @ self.weights.T + self.bias))

    def table(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return (N, K) of 0 and 1, as `findings_table`, columns in the order of `names`."""
        return (self.probabilities(texts) >= 0.5).astype(np.int64)

    def save(self, folder: Path) -> None:
        """Write the two files into a folder that exists."""
        from safetensors.numpy import save_file

        settings = {
            "format": "med3dvlm linear report classifier",
            "names": self.names,
            "rules": self.rules,
            "rules_sha256": _rules_digest() if self.rules else None,
            "vocabulary": self.vocabulary,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({"rarity": self.rarity, "weights": self.weights, "bias": self.bias}, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "LinearClassifier":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not belong together, or the rules have changed since it was trained on what they read.
        """
        from safetensors.numpy import load_file

        settings_file, weights_file = Path(folder) / SETTINGS_FILE, Path(folder) / WEIGHTS_FILE
        for file in (settings_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; a classifier is the folder that `med3dvlm findings train` wrote")
        settings = json.loads(settings_file.read_text(encoding="utf-8-sig"))
        if settings["rules"] and settings["rules_sha256"] != _rules_digest():
            raise ValueError(f"{folder} was trained on what other rules read ({RULES_FILE.name} has changed since); train it again")
        names, rules, vocabulary = (tuple(settings[key]) for key in ("names", "rules", "vocabulary"))
        numbers = load_file(weights_file)
        wanted = {"rarity": (len(vocabulary),), "weights": (len(names), len(vocabulary) + len(rules)), "bias": (len(names),)}
        if found := {key: array.shape for key, array in numbers.items() if array.shape != wanted.get(key)} or set(wanted) - set(numbers):
            raise ValueError(f"{weights_file} does not belong to {settings_file}: {found} where {wanted} is needed; train it again")
        return cls(names, rules, vocabulary, numbers["rarity"], numbers["weights"], numbers["bias"])


def _beside(terms: Any, texts: Sequence[str], rules: Sequence[str]) -> Any:
    """Return (N, V + R): the terms, then what the rules read."""
    from scipy.sparse import csr_matrix, hstack

    return hstack([terms, csr_matrix(findings_table(texts, rules))]).tocsr() if rules else terms


def _rules_digest() -> str:
    return hashlib.sha256(RULES_FILE.read_bytes()).hexdigest()
