"""stages/demo/ct_clip.sh: its steps with stand-in programs, and a real run of a few training steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stand_ins import run_script

EVALUATIONS = ["eval/zero_shot.py", "eval/linear_probe.py", "eval/retrieval.py"]


def test_every_step_once(repository: Path, tmp_path: Path) -> None:
    done, commands = run_script(repository, tmp_path, "stages/demo/ct_clip.sh", "demo")
    assert done.returncode == 0, done.stderr
    steps = [command[1] for command in commands]
    assert steps == ["phantom", "prepare", "stages/ct_clip.py", *EVALUATIONS, "index", "stages/demo/summary_ct_clip.py", "search"]
    _, again = run_script(repository, tmp_path, "stages/demo/ct_clip.sh", "demo")
    assert [command[1] for command in again] == ["stages/demo/summary_ct_clip.py", "search"]


def test_every_encoder_has_the_same_steps_seed_and_data(repository: Path, tmp_path: Path) -> None:
    done, commands = run_script(repository, tmp_path, "stages/demo/ct_clip.sh", "encoders", ROWS="dcformer vit3d")
    assert done.returncode == 0, done.stderr
    trained = [command for command in commands if command[1] == "stages/ct_clip.py"]
    assert len(trained) == 2 and "vit3d_naive" in trained[1] and "vit3d_naive" not in trained[0]
    for flag in ("--data", "--max-steps", "--config"):
        assert trained[0][trained[0].index(flag) + 1] == trained[1][trained[1].index(flag) + 1]
    assert [command[1] for command in commands if command[1] in EVALUATIONS] == EVALUATIONS * 2
    compared = commands[-1]
    assert compared[1] == "eval/compare.py" and [part for part in compared if part.endswith(("/dcformer", "/vit3d"))] == compared[3:5]


def test_unknown_choices_are_refused(repository: Path, tmp_path: Path) -> None:
    done, _ = run_script(repository, tmp_path, "stages/demo/ct_clip.sh", "huge")
    assert done.returncode == 2 and "demo, encoders or smoke, not 'huge'" in done.stderr
    done, _ = run_script(repository, tmp_path, "stages/demo/ct_clip.sh", "encoders", ROWS="resnet")
    assert done.returncode == 2 and "row 'resnet' is unknown; known: dcformer" in done.stderr


@pytest.mark.slow
def test_the_path_from_phantoms_to_a_search(shell: Callable[..., str], tmp_path: Path) -> None:
    printed = shell("bash", "stages/demo/ct_clip.sh", "smoke", OUTPUTS=str(tmp_path))
    root = tmp_path / "demo-ct-clip-smoke"
    summary = json.loads((root / "summary.json").read_text())
    assert 0 <= summary["zero_shot"]["auroc"] <= 1 and 0 <= summary["linear_probe"]["auroc"] <= 1
    assert summary["retrieval"]["pool"] == 8 and summary["reached"]["zero_shot.auroc"]["reached"] is None
    assert "not a medical device" in (root / "report.md").read_text()
    assert "train_fixed/" in printed.split("Emphysema is present.")[-1]
