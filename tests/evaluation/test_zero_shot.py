"""Zero-shot detection: probabilities of the literal protocol; labels, thresholds and figures computed independently."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from med3dvlm import Med3DCLIP
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets import ct_rate
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.evaluation.detection import threshold_studies, whole_patients
from med3dvlm.prompts import FINDING_PROMPTS, finding_prompts
from med3dvlm.records import Study
from med3dvlm.reports.findings import FINDINGS_CT_RATE
from tests.evaluation.chests import EVERYWHERE, NOWHERE
from tests.launching import launch

pytestmark = pytest.mark.usefixtures("without_pictures")
Run = Callable[..., None]
FILES = ("predictions.jsonl", "predictions_thresholds.jsonl", "predictions_blind.jsonl", "probabilities.csv", "scores.json", "scores.md")


@pytest.fixture(scope="module")
def arguments(chests: SimpleNamespace) -> list[object]:
    return ["--model", chests.clip, "--data", chests.root / "prepared", "--split", "valid_fixed"]


@pytest.fixture(scope="module")
def whole(arguments: list[object], run_whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero_shot")
    run_whole("zero_shot", *arguments, "--output", out, "--batch-size", 4)
    return out


@pytest.fixture
def stated(whole: Path) -> list[dict[str, str]]:
    with (whole / "probabilities.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def label_file(chests: SimpleNamespace) -> dict[str, dict[str, str]]:
    path = chests.root / "CT-RATE" / "multi_abnormality_labels" / "valid_predicted_labels.csv"
    with path.open(newline="") as file:
        return {row["VolumeName"]: row for row in csv.DictReader(file)}


def test_probabilities_are_those_of_the_literal_protocol(chests: SimpleNamespace, stated: list[dict[str, str]]) -> None:
    """The protocol encodes the volume again with each of the 18 pairs; the softmax is over temperature times the two similarities."""
    model, processor = load_clip(chests.clip)
    tokenizer = processor.tokenizer
    studies = chests.data.studies("valid_fixed")
    assert [row["VolumeName"] for row in stated] == [Path(study.image).name for study in studies]
    for study, row in list(zip(studies, stated, strict=True))[::7]:
        for column in ct_rate.LABEL_COLUMNS:
            texts = tokenizer([f"{column} is present.", f"{column} is not present."], padding=True, return_tensors="pt")
            with torch.no_grad():
                image = model.encode_image(load_volumes(chests.data, [study]))
                similar = model.encode_text(texts["input_ids"], texts["attention_mask"]) @ image[0]
                expected = (model.logit_scale.exp() * similar).softmax(dim=0)[0]
            assert float(row[column]) == pytest.approx(float(expected), abs=2e-6)  # 4e-7 measured


def test_the_areas_are_scikit_learns_from_the_published_files(chests: SimpleNamespace, whole: Path, stated: list[dict[str, str]]) -> None:
    """Labels are read from the CSV by name; a study with an empty cell counts only for the other findings."""
    truth, scores = label_file(chests), json.loads((whole / "scores.json").read_text())
    areas = []
    for place, (name, column) in enumerate(zip(FINDINGS_CT_RATE, ct_rate.LABEL_COLUMNS, strict=True)):
        rows = [(int(truth[row["VolumeName"]][column]), float(row[column])) for row in stated if truth[row["VolumeName"]][column]]
        assert len(rows) == (25 if place == 5 else 32)
        entry = scores["per_class"][name]
        assert (entry["studies"], entry["support"]) == (len(rows), sum(label for label, _ in rows))
        if place in (EVERYWHERE, NOWHERE):
            assert entry["auroc"] is None
            continue
        labels, values = zip(*rows, strict=True)
        assert entry["auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-6)
        assert entry["auprc"] == pytest.approx(average_precision_score(labels, values), abs=1e-6)
        areas.append(entry["auroc"])
    assert scores["macro"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    low, high = scores["intervals"]["macro.auroc"]
    assert low < scores["macro"]["auroc"] < high
    assert scores["one_class"] == [FINDINGS_CT_RATE[EVERYWHERE], FINDINGS_CT_RATE[NOWHERE]]
    whole_rows = [row for row in stated if all(truth[row["VolumeName"]].values())]
    matrix = np.array([[int(truth[row["VolumeName"]][column]) for column in ct_rate.LABEL_COLUMNS] for row in whole_rows])
    above = np.array([[float(row[column]) > 0.5 for column in ct_rate.LABEL_COLUMNS] for row in whole_rows])
    found = scores["published"]["dcformer"]
    assert scores["published"]["studies"] == 25 and found["accuracy"] == pytest.approx(np.mean(matrix == above), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(matrix, above, average="weighted", zero_division=0), abs=1e-6)


def test_thresholds_are_of_other_patients_of_the_training_split(chests: SimpleNamespace, whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "predictions_thresholds.jsonl").read_text().splitlines()]
    chosen = {line["id"] for line in lines}
    train = chests.data.studies("train_fixed")
    assert len(chosen) == 12 <= len(train) // 5 and chosen < {study.id for study in train}
    patients = {study.patient for study in train if study.id in chosen}
    assert {study.id for study in train if study.patient in patients} == chosen
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["thresholds"]["from"].startswith("chosen on 12 studies of split 'train_fixed', whole patients")
    by_id = {study.id: study for study in train}
    name = "atelectasis"  # highest recall + specificity, by trying all
    rows = [(line["log_odds"][name], by_id[line["id"]].labels[name]) for line in lines]

    def merit(cut: float) -> float:
        hits = [value >= cut for value, label in rows if label]
        alarms = [value >= cut for value, label in rows if not label]
        return sum(hits) / len(hits) - sum(alarms) / len(alarms)

    best = max(sorted((value for value, _ in rows), reverse=True), key=merit)
    assert scores["per_class"][name]["threshold"] == pytest.approx(1 / (1 + np.exp(-best)), abs=1e-6)


def test_controls_without_the_scan_and_with_permuted_labels(whole: Path, chests: SimpleNamespace) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["blind"]["macro"]["auroc"] == scores["everything"]["macro"]["auroc"] == 0.5
    assert scores["everything"]["published"]["dcformer"]["recall"] == 1
    control = scores["permuted_labels"]
    assert control["macro_auroc"] == pytest.approx(0.5, abs=0.04) and control["range"][0] < 0.5 < control["range"][1]
    assert scores["shuffled"]["macro"] != scores["macro"]
    air = json.loads((whole / "predictions_blind.jsonl").read_text())["log_odds"]
    model, processor = load_clip(chests.clip)
    tokenizer = processor.tokenizer
    texts = tokenizer(["Emphysema is present.", "Emphysema is not present."], padding=True, return_tensors="pt")
    with torch.no_grad():
        similar = (
            model.encode_text(texts["input_ids"], texts["attention_mask"]) @ model.encode_image(torch.full((1, 1, 32, 64, 64), -1.0))[0]
        )
    assert air["emphysema"] == pytest.approx(float(model.logit_scale.detach().exp() * (similar[0] - similar[1])), abs=2e-5)


def test_results_do_not_depend_on_the_batch_size_or_on_scoring_again(
    whole: Path, run: Run, arguments: list[object], chests: SimpleNamespace, tmp_path: Path
) -> None:
    before = {name: (whole / name).read_bytes() for name in FILES}
    run("zero_shot", *arguments, "--output", tmp_path, "--batch-size", 7)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    run("zero_shot", *arguments[2:], "--output", whole, "--score-only")
    assert {name: (whole / name).read_bytes() for name in FILES} == before
    pictures = {path.name for path in whole.glob("*.png")}
    assert pictures == {"roc.png", "precision_recall.png", "calibration.png"}


def test_a_killed_run_continues_to_the_same_bytes(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    encode, calls = Med3DCLIP.encode_image, []

    def encode_nine(self: Med3DCLIP, volumes: torch.Tensor) -> torch.Tensor:
        calls.append(len(volumes))
        if len(calls) > 9:
            raise Killed
        return encode(self, volumes)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Med3DCLIP, "encode_image", encode_nine)
        run("zero_shot", *arguments, "--output", tmp_path, "--batch-size", 4)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 8
    calls.clear()

    def counted(self: Med3DCLIP, volumes: torch.Tensor) -> torch.Tensor:
        calls.append(len(volumes))
        return encode(self, volumes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Med3DCLIP, "encode_image", counted)
        run("zero_shot", *arguments, "--output", tmp_path, "--batch-size", 4)
    assert calls == [1] * (32 - 8 + 12 + 1)  # each volume once, one by one, and air
    assert all((tmp_path / name).read_bytes() == (whole / name).read_bytes() for name in FILES)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(whole: Path, arguments: list[object], tmp_path: Path) -> None:
    output, log = tmp_path / "two", tmp_path / "log"
    flags = ("--output", output, "--batch-size", 4)
    assert launch("torchrun", 2, "eval/zero_shot.py", *arguments, *flags, log=log) == [0, 0], log.read_text()
    assert all((output / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    assert not list(output.glob("*.part"))


def test_templates_are_averaged_as_embeddings(chests: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("zero_shot", *arguments, "--output", tmp_path, "--templates", 3, "--threshold-split", "none", "--limit", 2)
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[1])
    model, processor = load_clip(chests.clip)
    tokenizer = processor.tokenizer
    with torch.no_grad():
        image = model.encode_image(load_volumes(chests.data, [chests.data.studies("valid_fixed")[1]]))[0]
        sides = []
        for side in (0, 1):
            total = torch.zeros(24)
            for pair in finding_prompts("lung_nodule", 3):
                total += model.encode_text(**tokenizer(pair[side], return_tensors="pt", return_token_type_ids=False))[0]
            sides.append(total / total.norm())
    expected = float(model.logit_scale.detach().exp() * (image @ sides[0] - image @ sides[1]))
    assert line["log_odds"]["lung_nodule"] == pytest.approx(expected, abs=2e-5)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["thresholds"] == {"from": "0.5 for every finding, as asked", "rule": None, "studies": 0}
    assert {entry["threshold"] for entry in scores["per_class"].values()} == {0.5}


def test_prompts() -> None:
    assert finding_prompts("lung_nodule") == [("Lung nodule is present.", "Lung nodule is not present.")]
    pairs = finding_prompts("lung_nodule", 9)
    assert len(pairs) == len(FINDING_PROMPTS) == len(set(pairs)) and all("ung nodule" in text for pair in pairs for text in pair)


def test_the_table_shows_the_papers_figures(whole: Path) -> None:
    text = (whole / "published.md").read_text()
    assert "DCFormer, Table 1" in text and "Table 2" not in text and "not a medical device" in text
    last = [line for line in text.splitlines() if line.startswith("| this run, this data")]
    scores = json.loads((whole / "scores.json").read_text())
    figures = [cell.strip() for cell in last[0].strip("|").split("|")][2:]
    encoder = load_clip(json.loads((whole / "run.json").read_text())["model"])[0].vision_encoder
    count = sum(parameter.numel() for parameter in encoder.parameters())
    shown = [100 * scores["published"]["dcformer"][name] for name in ("accuracy", "f1", "precision", "recall")]
    assert figures == [f"{count / 1e6:.2f}", f"{scores['encoder']['operations'] / 1e9:.2f}", *(f"{value:.1f}" for value in shown)]
    assert "| 0.448              |" in (whole / "scores.md").read_text()  # lung nodules in CT-RATE's validation split


def study(patient: str, split: str, number: int = 0, **labels: int) -> Study:
    return Study(f"{split}/{patient}_{number}", patient, "x", "", labels, split, "ct_rate")


def made_up(*studies: Study) -> SimpleNamespace:
    splits = {one.split: sum(other.split == one.split for other in studies) for one in studies}

    def of(split: str) -> list[Study]:
        found = [one for one in studies if one.split == split]
        if not found:
            raise ValueError(f"no studies of split {split!r}")
        return found

    return SimpleNamespace(summary={"splits": splits}, studies=of, root="data")


def test_where_thresholds_come_from() -> None:
    train = [study(f"t{n // 2}", "train", n, emphysema=n % 2) for n in range(40)]
    valid = [study(f"v{n}", "valid", n, emphysema=n % 2) for n in range(6)]
    again = [replace(one, id=f"again/{one.id}", split="valid_fixed") for one in valid]
    test = [study(f"e{n}", "test", n, emphysema=n % 2) for n in range(5)]
    assert threshold_studies(made_up(*train, *valid, *test), "test", test, None) == (valid, "chosen on split 'valid', 6 studies")
    # the same patients in two versions are no third split
    found, words = threshold_studies(made_up(*train, *valid, *again), "valid_fixed", again, None)
    assert len(found) == 6 and {one.split for one in found} == {"train"} and "no third split" in words
    assert found == whole_patients(train, 6)
    unlabelled = [replace(one, labels={}) for one in valid]
    assert {one.split for one in threshold_studies(made_up(*train, *unlabelled, *test), "test", test, None)[0]} == {"train"}
    assert threshold_studies(made_up(*test), "test", test, None)[0] == []
    assert threshold_studies(made_up(*train, *test), "test", test, "train")[0] == train
    with pytest.raises(ValueError, match="has 6 patients of split 'valid_fixed'; thresholds may not come from what is scored"):
        threshold_studies(made_up(*valid, *again), "valid_fixed", again, "valid")
    with pytest.raises(ValueError, match="thresholds may not come from what is scored"):
        threshold_studies(made_up(*train, *test), "test", test[:2], "test")
    with pytest.raises(ValueError, match="none of the 6 studies of split 'valid' in data has a label"):
        threshold_studies(made_up(*unlabelled, *test), "test", test, "valid")


def test_a_part_of_the_patients() -> None:
    studies = [study(f"p{n % 7}", "train", n) for n in range(21)]
    part = whole_patients(studies, 7)
    assert len(part) == 6 and len({one.patient for one in part}) == 2
    assert part == whole_patients(studies[::-1], 7)[::-1]  # by name, not by order
    assert len(whole_patients(studies, 1)) == 3  # one patient at least


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run("zero_shot", *arguments, checked=True)
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return line

    return call


def test_wrong_input(
    refused: Callable[..., str], demo: SimpleNamespace, chests: SimpleNamespace, arguments: list[object], tmp_path: Path
) -> None:
    out = ("--output", tmp_path / "out")
    assert "prepare" in refused("--model", demo.clip, *arguments[2:], *out)  # made for another recipe
    assert "holds a med3dvlm model, which does not embed" in refused("--model", demo.model, *arguments[2:], *out)
    assert "there are 4 pairs of prompts" in refused(*arguments, *out, "--templates", 5)
    assert "no studies of split 'validation'" in refused(*arguments, *out, "--threshold-split", "validation")
    assert "thresholds may not come from what is scored" in refused(*arguments, *out, "--threshold-split", "valid_fixed")
    studies = PreparedData.studies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedData, "studies", lambda self, split: [replace(one, labels={}) for one in studies(self, split)])
        assert "none of the 32 studies of split 'valid_fixed'" in refused(*arguments, *out)
    assert not (tmp_path / "out").exists()


def test_a_label_of_minus_one_is_refused_by_name(chests: SimpleNamespace, tmp_path: Path) -> None:
    """Some label files mark uncertain findings so; the user has to decide whether they count as present."""
    root = tmp_path / "CT-RATE"
    for source in (chests.root / "CT-RATE").iterdir():
        (root / source.name).parent.mkdir(exist_ok=True)
        (root / source.name).symlink_to(source)
    (root / "multi_abnormality_labels").unlink()
    (root / "multi_abnormality_labels").mkdir()
    text = (chests.root / "CT-RATE/multi_abnormality_labels/valid_predicted_labels.csv").read_text().splitlines()
    text[3] = text[3].replace(",1,", ",-1,", 1)
    (root / "multi_abnormality_labels/valid_predicted_labels.csv").write_text("\n".join(text) + "\n")
    with pytest.raises(ValueError, match="line 4: .* is '-1' but must be 0, 1 or empty"):
        ct_rate.read(root, "valid_fixed")
