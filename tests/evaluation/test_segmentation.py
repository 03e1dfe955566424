"""Segmentation evaluation: figures by plain means, a perfect segmenter, controls, continuation, wrong input."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.page_masks import COLOURS, outlined
from med3dvlm.evaluation.segmentation import Judge, packed, predicted, tasks_of, unpacked
from med3dvlm.evaluation.segmentation_scores import scores_of, table
from med3dvlm.files import read_lines
from med3dvlm.inference.segmentation import PRESENCE
from med3dvlm.metrics.segmentation import dice
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.reports.findings import finding_of

Run = Callable[..., None]


@pytest.fixture(scope="module")
def segmenter(demo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip, processor = load_clip(demo.clip)
    torch.manual_seed(0)
    model = Med3DSegmenter.from_clip(clip, embedding_dim=4, attention_heads=2, dual_cross_attention=False)
    with torch.no_grad():
        model.head.bias.fill_(0.0)  # some voxels above, some below
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace, segmenter: Path) -> list[object]:
    return ["--model", segmenter, "--data", demo.root / "prepared", "--limit", 4]


@pytest.fixture(scope="module")
def whole(arguments: list[object], run_whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmentation")
    run_whole("segmentation", *arguments, "--output", folder)
    return folder


def test_every_labelled_finding_is_segmented_and_figures_are_means(demo: SimpleNamespace, whole: Path) -> None:
    rows = read_lines(whole / "predictions.jsonl")
    studies = demo.data.studies("test")[:4]
    names = {name for study in studies for name in demo.data.mask_names(study) if study.masks[name].kind == "finding"}
    for study, row in zip(studies, rows, strict=True):
        assert row["id"] == study.id
        for finding in row["findings"]:
            assert finding["finding"] in names and finding["present"] == study.labels[finding_of(finding["finding"])]
    cases = [finding for row in rows for finding in row["findings"]]
    present = [case for case in cases if case["present"]]
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["studies"] == 4 and scores["all"]["present"] == len(present) and scores["all"]["absent"] == len(cases) - len(present)

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known)

    figures = scores["all"]["figures"]
    for name in ("dice", "nsd", "pointing"):
        assert figures[name]["value"] == pytest.approx(mean([case[name] for case in present]), abs=1e-6)
    for control, name in (("mean_mask", "dice"), ("one_mask", "dice"), ("middle", "pointing"), ("chance", "pointing")):
        expected = mean([case.get(control, {}).get(name) for case in present])
        assert figures[f"{control}.{name}"]["value"] == pytest.approx(expected, abs=1e-6)
    absent = [case for case in cases if not case["present"]]
    assert figures["absent"]["value"] == pytest.approx(mean([float(case["voxels"] > 0) for case in absent]), abs=1e-6)
    pairs, extra, missed = (sum(case["components"][place] for case in cases) for place in range(3))
    assert figures["f1"]["value"] == pytest.approx(2 * pairs / (2 * pairs + extra + missed), abs=1e-6)
    for point in scores["operating_points"]:
        shown = {id(case): case["at_any_presence"]["voxels"] > 0 and case["presence"] > point["presence"] for case in cases}
        assert point["drawn"] == pytest.approx(mean([float(shown[id(case)]) for case in present]), abs=1e-6)
        assert point["dice"] == pytest.approx(
            mean([case["at_any_presence"]["dice"] if shown[id(case)] else 0.0 for case in present]), abs=1e-6
        )
        assert point["absent"] == pytest.approx(mean([float(shown[id(case)]) for case in absent]), abs=1e-6)
        wrong = [[shown[id(case)] for case in row["findings"] if not case["present"]] for row in rows]
        assert point["studies"] == pytest.approx(mean([float(True in each) for each in wrong if each]), abs=1e-6)
    (own,) = [point for point in scores["operating_points"] if point["presence"] == PRESENCE]
    assert own["dice"] == figures["dice"]["value"]
    assert own["studies"] == scores["studies_with_an_absent_finding_drawn"]["value"]
    large = [case for case in present if case["mm"] >= 8]
    assert scores["large"]["present"] == len(large)
    assert sum(entry["present"] for entry in scores["findings"].values()) == len(present)
    for study, row in zip(studies, rows, strict=True):
        for case in (case for case in row["findings"] if case["present"]):
            area = demo.data.masks(study, [case["finding"]])[0].sum(dim=(1, 2))
            assert area[case["slice"]] == area.max() > 0
            drawn = unpacked(case["drawn_slice"], demo.data.processor.size[1:])
            assert drawn.sum() <= case["voxels"]
    assert "mean mask" in (whole / "scores.md").read_text()


class Knowing:
    """A segmenter that draws the true masks, and one too many on request."""

    def __init__(self, data: PreparedData, task: Any, wrongly: bool = False) -> None:
        self.data, self.task, self.wrongly = data, task, wrongly

    def probabilities(self, pixel_values: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        assert tuple(pixel_values.shape[2:]) == tuple(self.data.processor.size)
        empty = torch.zeros(self.data.processor.size)
        masks = [
            self.data.masks(self.task.study, [text])[0].float() if text in self.task.present else empty + self.wrongly for text in texts
        ]
        return torch.stack(masks), torch.tensor([1.0 if mask.any() else 0.0 for mask in masks])


def test_a_perfect_segmenter(demo: SimpleNamespace) -> None:
    """Dice, surface distance and pointing are perfect, there is no extra component, and the controls are worse."""
    data, tasks = demo.data, tasks_of(demo.data, demo.data.studies("test"))
    judge, patients = Judge(data, tasks, "train", 0.5, 0.5, 2.0), [task.study.patient for task in tasks]
    scores = scores_of([predicted(task, data, Knowing(data, task), judge) for task in tasks], patients)
    figures = scores["all"]["figures"]
    assert figures["dice"]["value"] == figures["nsd"]["value"] == figures["pointing"]["value"] == figures["f1"]["value"] == 1
    assert figures["hd95"]["value"] == 0 and figures["absent"]["value"] == 0 and scores["calibration"]["ece"] == pytest.approx(0, abs=1e-5)
    assert all(figures[name]["value"] < 1 for name in figures if name.startswith(("mean_mask", "other_patient")))
    assert figures["one_mask.dice"]["value"] > 0
    assert 0 < figures["chance.pointing"]["value"] < 0.5
    records = [predicted(task, data, Knowing(data, task, wrongly=True), judge) for task in tasks]
    wrong = scores_of(records, patients)
    assert wrong["all"]["figures"]["absent"]["value"] == 1 and wrong["studies_with_an_absent_finding_drawn"]["value"] == 1
    assert wrong["all"]["figures"]["dice"]["value"] == 1 and wrong["all"]["figures"]["f1"]["value"] < 1
    assert "Mask drawn for an absent finding: 1.000" in table(wrong)


def test_controls_by_hand(demo: SimpleNamespace) -> None:
    """The other patient's mask is that of the next patient with the finding; the mean mask is that of the training studies."""
    data, tasks = demo.data, tasks_of(demo.data, demo.data.studies("test"))
    judge = Judge(data, tasks, "train", 0.5, 0.5, 2.0)
    checked = 0
    for task in tasks:
        for name in task.present:
            row = judge._without_scan(task.study, name, data.masks(task.study, [name])[0].numpy())
            true = data.masks(task.study, [name])[0].numpy()
            train = [data.masks(study, [name])[0].numpy() for study in data.studies("train") if name in data.mask_names(study)]
            if train:
                mean = np.mean(train, axis=0)
                expected = dice(mean >= mean.max() / 2 - 1e-6, true)
                assert row["mean_mask"]["dice"] == pytest.approx(expected, abs=1e-6)
                checked += 1
            if (other := judge.others.get((task.study.id, name))) is not None:
                assert other.patient != task.study.patient and name in data.mask_names(other)
                assert row["other_patient"]["dice"] == dice(data.masks(other, [name])[0].numpy(), true)
    assert checked


def test_an_interrupted_run_continues_and_is_scored_again(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    content = (whole / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(content[: content.index(b"\n") + 30])
    run("segmentation", *arguments, "--output", tmp_path, "--batch-size", 3)
    assert (tmp_path / "predictions.jsonl").read_bytes() == content
    (tmp_path / "scores.json").unlink()
    run("segmentation", *arguments[2:], "--output", tmp_path, "--score-only")
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_wrong_input(demo: SimpleNamespace, run: Run, arguments: list[object], whole: Path, tmp_path: Path, capsys: Any) -> None:
    wrong = {
        "holds a model of type med3d_clip, not med3d_segmenter": ["--model", demo.clip, *arguments[2:], "--output", tmp_path],
        "made with another threshold (0.5, not 0.3)": [*arguments, "--output", whole, "--threshold", 0.3],
        "made with another presence (0.75, not 0.6)": [*arguments[2:], "--output", whole, "--score-only", "--presence", 0.6],
    }
    for sentence, given in wrong.items():
        with pytest.raises(SystemExit) as ended:
            run("segmentation", *given, checked=True)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "predictions.jsonl").exists()


def test_the_page_shows_figures_controls_and_cases(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    run("page", whole, "--data", demo.root / "prepared", "--output", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    scores = json.loads((whole / "scores.json").read_text())
    for label in ("model, all findings", "middle, 8 mm and more", "mean mask, 8 mm and more", "another", "one mask, 8 mm and more"):
        assert label in text
    assert f'<td class="n">{scores["all"]["figures"]["dice"]["value"]:.2f}</td>' in text
    assert text.count("data:image/") == min(24, scores["all"]["present"]) and text.count(", outlined") == text.count("data:image/")
    with pytest.raises(SystemExit):
        run("compare", whole, whole, checked=True)
    assert "cannot be compared" in capsys.readouterr().err


def test_outlines_are_the_edge_voxels() -> None:
    plane, mask = np.zeros((64, 96), np.float32), np.zeros((64, 96), bool)
    mask[10:20, 30:50] = True
    np.testing.assert_array_equal(unpacked(packed(mask), mask.shape), mask)
    image = outlined(plane, {"true": mask, "drawn": np.zeros_like(mask)}, (0, 1))
    assert image.shape == (128, 192, 3)
    for row, column in np.ndindex(mask.shape):
        inside = [mask[place] for place in ((row, column), (row - 1, column), (row, column - 1)) if min(place) >= 0]
        pixel = tuple(image[2 * row, 2 * column])
        assert (pixel == COLOURS["true"]) == (mask[row, column] and not all(inside)), (row, column)
