"""The linear classifier: learns deciding words, and is saved without code and loaded again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from med3dvlm.reports.classifiers import LinearClassifier

NAMES = ["lung_nodule", "fracture"]
TEXTS = [
    f"{nodule} in lobe {place}. {bone} of rib {place}."
    for nodule in ("Nodule", "No nodule")
    for bone in ("Fracture", "Callus")
    for place in range(9)
]
LABELS = np.array([[text.startswith("Nodule"), "Fracture" in text] for text in TEXTS], dtype=int)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    return LinearClassifier.train(TEXTS, LABELS, NAMES, rules=["lung_nodule"])


def test_learns_and_reads_reports_it_has_not_seen(classifier: LinearClassifier) -> None:
    unseen = ["Fracture of rib 12. No nodule in lobe 3.", "Nodule in lobe 30. Callus of rib 4.", "Nodule. Fracture."]
    assert classifier.table(unseen).tolist() == [[0, 1], [1, 0], [1, 1]]
    assert classifier.table([]).shape == (0, 2)


def test_probabilities_are_the_formula_in_plain_loops(classifier: LinearClassifier) -> None:
    text = "nodule in lobe 3 nodule"
    words = text.split()
    terms = words + [f"{one} {two}" for one, two in zip(words, words[1:], strict=False)]
    values = [
        (1 + np.log(terms.count(term))) * rarity if term in terms else 0.0
        for term, rarity in zip(classifier.vocabulary, classifier.rarity, strict=True)
    ]
    inputs = [*(np.array(values) / np.linalg.norm(values)), 1.0]  # the last: what the rules read
    expected = [
        expit(sum(weight * value for weight, value in zip(row, inputs, strict=True)) + bias)
        for row, bias in zip(classifier.weights, classifier.bias, strict=True)
    ]
    np.testing.assert_allclose(classifier.probabilities([text])[0], expected, rtol=1e-12)


def test_save_and_load_give_equal_predictions(classifier: LinearClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"classifier.json", "classifier.safetensors"}
    np.testing.assert_array_equal(LinearClassifier.load(tmp_path).probabilities(TEXTS), classifier.probabilities(TEXTS))


def test_training_is_reproducible(classifier: LinearClassifier) -> None:
    np.testing.assert_array_equal(LinearClassifier.train(TEXTS, LABELS, NAMES, rules=["lung_nodule"]).weights, classifier.weights)


def test_labels_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(ValueError, match="fracture: present in every report or in none"):
        LinearClassifier.train(TEXTS, np.stack([LABELS[:, 0], np.ones(len(TEXTS))], axis=1), NAMES)
    with pytest.raises(ValueError, match=r"\(35, 2\), but there are 36 reports"):
        LinearClassifier.train(TEXTS, LABELS[1:], NAMES)


def test_files_that_do_not_fit_are_refused(classifier: LinearClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path)
    settings = json.loads((tmp_path / "classifier.json").read_text())
    with pytest.raises(FileNotFoundError, match="med3dvlm findings train"):
        LinearClassifier.load(tmp_path / "nowhere")
    changed = shutil.copytree(tmp_path, tmp_path / "changed")
    (changed / "classifier.json").write_text(json.dumps(settings | {"rules_sha256": "0"}))
    with pytest.raises(ValueError, match="rules.yaml has changed since"):
        LinearClassifier.load(changed)
    (changed / "classifier.json").write_text(json.dumps(settings | {"names": ["lung_nodule"]}))
    with pytest.raises(ValueError, match="does not belong to"):
        LinearClassifier.load(changed)
    numbers = load_file(tmp_path / "classifier.safetensors")
    del numbers["bias"]
    save_file(numbers, tmp_path / "classifier.safetensors")
    with pytest.raises(ValueError, match="bias"):
        LinearClassifier.load(tmp_path)
