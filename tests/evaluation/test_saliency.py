"""Saliency evaluation: peaks judged by plain loops, chance by drawing cells, continuation, wrong input."""

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from med3dvlm import Volume
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.files import read_lines
from med3dvlm.inference.saliency import SaliencyMap

Run = Callable[..., None]


@pytest.fixture(scope="module")
def script(repository: Path) -> dict[str, Any]:
    return vars(importlib.import_module("med3dvlm.evaluation.saliency"))


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.model, "--clip", demo.clip, "--data", demo.root / "prepared", "--scans", demo.root / "phantoms", "--limit", 3]


@pytest.fixture(scope="module")
def whole(arguments: list[object], run_whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounding")
    run_whole("saliency", *arguments, "--output", folder)
    return folder


def test_peaks_are_judged_as_by_plain_loops(script: dict[str, Any]) -> None:
    """With a flipped and scaled placement and odd sizes, lesion voxels are mapped to cells and cell centres to the scan."""
    generator = np.random.default_rng(0)
    shape, spacing, grid = (11, 14, 17), (3.0, 1.5, 1.0), (3, 4, 5)
    placement = np.array([[1.2, 0, 0, 0.1], [0, 0, -0.9, 13.2], [0, 1.1, 0, -0.3], [0, 0, 0, 1]])  # of model voxels 9 x 16 x 15
    cells = np.diag([3.0, 4.0, 3.0, 1.0])
    cells[:3, 3] = (1.0, 1.5, 1.0)
    mask = np.zeros(shape, bool)
    mask[3:6, 2:5, 10:13] = True
    volume = Volume(generator.random(shape).astype(np.float32), spacing, "SPL")
    to_scan = placement @ cells
    peaks = [(0, 0, 0), (1, 2, 3), (1, 3, 4), (2, 3, 4)]
    for peak in peaks:
        values = generator.random(grid).astype(np.float32)
        values[peak] = 2
        found = script["judge"](SaliencyMap(values, cells, (9, 16, 15)), mask, volume, placement)
        lesion = set()
        for voxel in np.argwhere(mask):
            cell = (np.linalg.inv(to_scan) @ [*voxel, 1])[:3]
            lesion.add(tuple(int(min(max(round(place), 0), length - 1)) for place, length in zip(cell, grid, strict=True)))
        inside, near, far = [], [], []
        for cell in itertools.product(*map(range, grid)):
            inside.append(cell in lesion)
            near.append(any(max(abs(a - b) for a, b in zip(cell, other, strict=True)) <= 1 for other in lesion))
            middle = np.clip(np.rint((to_scan @ [*cell, 1])[:3]), 0, np.array(shape) - 1)
            far.append(min(np.linalg.norm((voxel - middle) * spacing) for voxel in np.argwhere(mask)))
        place = int(np.ravel_multi_index(peak, grid))
        assert (found["inside"], found["near"], found["mm"]) == (inside[place], near[place], pytest.approx(far[place]))
        assert found["chance"] == {"inside": np.mean(inside), "near": np.mean(near), "mm": pytest.approx(np.mean(far))}
        assert tuple(found["peak"]) == peak


def test_the_middle_is_the_cell_nearest_to_it(script: dict[str, Any]) -> None:
    cells = np.diag([4.0, 4.0, 4.0, 1.0])  # cells look at voxels 0, 4, 8, ...
    heat = script["middle"](SaliencyMap(np.zeros((3, 5, 7), np.float32), cells, (12, 20, 27)))
    assert heat.peak == (1, 2, 3)  # voxels 4, 8, 12 of middles 5.5, 9.5, 13


def test_every_finding_is_a_case_and_its_figures_are_means(demo: SimpleNamespace, whole: Path) -> None:
    rows = read_lines(whole / "predictions.jsonl")
    studies = demo.data.studies("test")[:3]
    assert [(row["id"], row["finding"]) for row in rows] == [
        (study.id, kind) for study in studies for kind, present in study.labels.items() if present
    ]
    scores = json.loads((whole / "scores.json").read_text())
    for way in ("phrase", "other phrase", "answer", "other answer", "middle"):
        for figure in ("inside", "near", "mm"):
            entry = scores["all"][way][figure]
            assert entry["value"] == pytest.approx(np.mean([row[way][figure] for row in rows]), abs=1e-6)
            assert entry["chance"] == pytest.approx(np.mean([row[way]["chance"][figure] for row in rows]), abs=1e-6)
        for row in rows:
            assert row[way]["inside"] <= row[way]["near"] and row[way]["chance"]["inside"] <= row[way]["chance"]["near"]
    by_kind = scores["findings"]
    assert sum(entry["cases"] for entry in by_kind.values()) == len(rows) == scores["all"]["cases"]
    labels = {study.id: study.labels for study in studies}
    assert not any(labels[row["id"]][row["other"]] for row in rows)
    assert "looked by" in (whole / "scores.md").read_text()


def test_an_interrupted_run_continues_and_is_scored_again(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    content = (whole / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(content[: content.index(b"\n") + 30])
    run("saliency", *arguments, "--output", tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == content
    (tmp_path / "scores.json").unlink()
    run("saliency", *arguments[4:6], "--limit", 3, "--output", tmp_path, "--score-only")
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_wrong_input(demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path, capsys: Any) -> None:
    without = [*arguments[:6], "--limit", 3, "--output", tmp_path]
    others = write_phantoms(tmp_path / "others", studies=10, seed=9, detail=0.4) and tmp_path / "others"
    wrong = {
        "--scans is missing": without,
        "phantoms.json is missing": [*without, "--scans", tmp_path],
        "not one of the phantoms": [*without, "--scans", others],
        "holds no model": ["--model", demo.root, *arguments[4:], "--output", tmp_path],
    }
    for sentence, given in wrong.items():
        with pytest.raises(SystemExit) as ended:
            run("saliency", *given, checked=True)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "predictions.jsonl").exists()
