"""The linear probe: its optimum equals scikit-learn's, it learns from true labels only, and it is saved completely."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.encoders import Encoder
from med3dvlm.evaluation.probe import FrozenEncoder, LinearProbe, fit
from med3dvlm.reports.findings import FINDINGS_CT_RATE

pytestmark = pytest.mark.usefixtures("without_pictures")
Run = Callable[..., None]
FILES = ("predictions.jsonl", "predictions_thresholds.jsonl", "predictions_blind.jsonl", "probabilities.csv", "scores.json", "scores.md")
FILES += ("probe.safetensors", "probe.json")


@pytest.fixture(scope="module")
def arguments(chests: SimpleNamespace) -> list[object]:
    return ["--model", chests.clip, "--data", chests.root / "prepared", "--split", "valid_fixed", "--controls", 3]


@pytest.fixture(scope="module")
def whole(arguments: list[object], run_whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linear_probe")
    run_whole("linear_probe", *arguments, "--output", out)
    return out


def made_up(seed: int, studies: int = 80) -> tuple[torch.Tensor, np.ndarray]:
    """Return features of unequal spread, one constant, and four findings with unknown labels; the third is always present, the last unlabelled."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(studies, 6)) * (1, 10, 0.1, 3, 1, 0) + 5
    logits = np.stack([features[:, 0] - 5, 0.2 * (features[:, 1] - 5) - 1, np.full(studies, 99), np.zeros(studies)], axis=1)
    labels = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    labels[random.random(labels.shape) < 0.2] = np.nan
    labels[:, 3] = np.nan
    return torch.from_numpy(features).float(), labels


@pytest.mark.parametrize("balanced", [True, False])
def test_the_optimum_is_that_of_scikit_learn(balanced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without early stopping, each finding is fitted to the studies that have its label."""
    monkeypatch.setattr("med3dvlm.evaluation.probe.PATIENCE", 10**6)
    train, validation = made_up(0), made_up(0)  # the same, so that the last round is the best one
    probe, found = fit("abcd", (train[0], validation[0]), (train[1], validation[1]), [0.003], balanced)
    assert probe.names == ("a", "b") and found["decay"] == 0.003
    inputs = StandardScaler().fit_transform(train[0].double().numpy())
    for finding in range(2):
        rows = ~np.isnan(train[1][:, finding])
        model = LogisticRegression(C=1 / (0.003 * rows.sum()), class_weight="balanced" if balanced else None, tol=1e-10, max_iter=1000)
        model.fit(inputs[rows], train[1][rows, finding])
        np.testing.assert_allclose(probe.log_odds(train[0])[:, finding], model.decision_function(inputs), atol=2e-4)  # 4e-5 measured


def test_training_ends_where_the_validation_loss_is_lowest() -> None:
    """With much noise and little decay the best round is not the last; the best of several decays is taken."""
    random = np.random.default_rng(0)
    features = [torch.from_numpy(random.normal(size=(40, 60))) for _ in range(2)]
    labels = [((part[:, :1] + torch.from_numpy(random.normal(size=(40, 1)))) > 0).double().numpy() for part in features]
    early, found = fit("a", features, labels, [1e-6])
    assert found["rounds"] == 1
    values = {}
    for decay in (10.0, 0.1, 1e-6):
        probe, alone = fit("a", features, labels, [decay])
        odds, truth = torch.from_numpy(probe.log_odds(features[1])), torch.from_numpy(labels[1])
        share = float(labels[0].mean())
        weights = torch.where(truth == 1, 0.5 / share, 0.5 / (1 - share))
        losses = torch.nn.functional.binary_cross_entropy_with_logits(odds, truth, weights)
        assert alone["validation_loss"] == pytest.approx(float(losses))
        values[decay] = alone["validation_loss"]
    _, chosen = fit("a", features, labels, list(values))
    assert chosen["decay"] == min(values, key=values.__getitem__)
    assert [entry["decay"] for entry in chosen["tried"]] == list(values)


def test_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="there is nothing to learn"):
        fit("a", (torch.ones(3, 2), torch.ones(3, 2)), (np.ones((3, 1)), np.ones((3, 1))))
    with pytest.raises(ValueError, match="there is nothing to learn"):
        fit("a", (torch.ones(2, 2), torch.ones(1, 2)), (np.array([[0.0], [1.0]]), np.array([[np.nan]])))


def test_it_learns_and_shuffled_labels_teach_nothing(whole: Path) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["macro"]["auroc"] > 0.62 and scores["permuted_labels"]["p_value"] < 0.02
    assert scores["shuffled_labels"]["probes"] == 3 and scores["shuffled_labels"]["macro_auroc"] == pytest.approx(0.5, abs=0.06)
    assert scores["task"] == "linear_probe" and scores["blind"]["macro"]["auroc"] == 0.5
    text = (whole / "published.md").read_text()
    assert "DCFormer, Table 2" in text and "Table 1" not in text
    about = json.loads((whole / "probe.json").read_text())
    assert about["training"]["decay"] in [entry["decay"] for entry in about["training"]["tried"]]


def test_predictions_are_the_layer_on_the_mean_of_the_last_stage(chests: SimpleNamespace, whole: Path) -> None:
    model, _ = load_clip(chests.clip)
    stored = load_file(whole / "probe.safetensors")
    names = json.loads((whole / "probe.json").read_text())["names"]
    assert names == list(FINDINGS_CT_RATE)
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    for study, line in list(zip(chests.data.studies("valid_fixed"), lines, strict=True))[::9]:
        with torch.no_grad():
            tokens = model.vision_encoder(load_volumes(chests.data, [study]))[-1][0]
        odds = stored["weight"] @ tokens.double().mean(dim=0) + stored["bias"]
        assert list(line["log_odds"].values()) == pytest.approx(odds.tolist(), abs=1e-5)
        assert len(line["control"]) == 3


def test_validation_and_test_studies_do_not_train_the_probe(chests: SimpleNamespace, whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    chosen = [json.loads(line)["id"] for line in (whole / "predictions_thresholds.jsonl").read_text().splitlines()]
    train = chests.data.studies("train_fixed")
    patients = {study.patient for study in train if study.id in chosen}
    assert record["identity"]["train"] == sum(study.patient not in patients for study in train) == 52
    assert record["seconds"] > 0


def test_results_are_reproducible_and_features_computed_once(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    before = {name: (whole / name).read_bytes() for name in FILES}
    run("linear_probe", *arguments[2:], "--output", whole, "--score-only")
    assert {name: (whole / name).read_bytes() for name in FILES} == before
    seen: list[int] = []
    encode = Encoder.forward

    def counted(self: Encoder, volume: torch.Tensor) -> list[torch.Tensor]:
        seen.append(len(volume))
        return encode(self, volume)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "forward", counted)
        run("linear_probe", *arguments, "--output", tmp_path / "shared", "--cache", whole / "features")
        assert seen == [1, 1]  # counting operations, and air
        run("linear_probe", *arguments, "--output", tmp_path / "anew", "--batch-size", 3)
    assert sum(seen) == 4 + 52 + 12 + 32
    for folder in ("shared", "anew"):
        assert {name: (tmp_path / folder / name).read_bytes() for name in FILES} == before


def test_a_saved_probe_is_applied_to_other_data(
    whole: Path, run: Run, arguments: list[object], demo: SimpleNamespace, tmp_path: Path
) -> None:
    run("linear_probe", *arguments, "--output", tmp_path / "out", "--probe", whole)
    one, other = (
        [json.loads(line)["log_odds"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path / "out")
    )
    assert one == other
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["shuffled_labels"] is None
    with pytest.raises(ValueError, match="a probe of another encoder"):
        run("linear_probe", "--model", demo.clip, "--data", demo.root / "prepared", "--output", tmp_path / "b", "--probe", whole)
    with pytest.raises(FileNotFoundError, match="probe.safetensors is missing; name the output of a run"):
        run("linear_probe", *arguments, "--output", tmp_path / "c", "--probe", tmp_path)
    probe, _ = LinearProbe.load(whole)
    with pytest.raises(ValueError, match="the probe takes 32 features, but the encoder gives 33"):
        probe.log_odds(torch.zeros(2, 33))


def test_any_model_with_an_encoder_and_wrong_input(
    demo: SimpleNamespace, chests: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path
) -> None:
    clip, vlm = (FrozenEncoder(str(path), demo.data, "cpu") for path in (demo.clip, demo.model))
    volume = load_volumes(demo.data, demo.data.studies("test")[:1])
    assert torch.equal(clip.pooled(volume), vlm.pooled(volume)) and clip.name == vlm.name == "dcformer_nano"
    with pytest.raises(ValueError, match="was prepared with"):
        FrozenEncoder(str(demo.clip), chests.data, "cpu")
    out = ("--output", tmp_path / "out")
    with pytest.raises(ValueError, match="to stop the training by .*; name a --threshold-split"):
        run("linear_probe", *arguments, *out, "--threshold-split", "none")
    with pytest.raises(ValueError, match="24 patients of split 'valid_fixed' are in 'valid_fixed', too"):
        run("linear_probe", *arguments, *out, "--train-split", "valid_fixed")
    with pytest.raises(ValueError, match="is left to learn from; name another --threshold-split"):
        run("linear_probe", *arguments, *out, "--threshold-split", "train_fixed")
    assert not (tmp_path / "out").exists()
