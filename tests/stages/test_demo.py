"""stages/demo/demo.sh with stand-in programs: the steps that it runs when it is started again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stand_ins import run_script

STEPS = ("phantom", "prepare", "stage0", "stage1", "stage2", "stage3", "retrieval", "segmentation", "vqa", "report_gen")
Demo = Callable[..., list[str]]


@pytest.fixture
def demo(repository: Path, tmp_path: Path) -> Demo:
    """demo() returns the steps that ran, by a word of their command; `FAILS` names one that fails."""

    def run(**environment: str) -> list[str]:
        done, commands = run_script(repository, tmp_path, "stages/demo/demo.sh", "demo", **environment)
        assert (done.returncode != 0) == ("FAILS" in environment), done.stderr
        commands = [command for command in commands if command[1] not in ("ask", "stages/demo/summary.py")]
        return [next(word for word in STEPS if word in command[1]) for command in commands]

    return run


def test_every_step_once(demo: Demo) -> None:
    assert demo() == list(STEPS)
    assert demo() == []


@pytest.mark.parametrize(
    ("step", "product"),
    [("phantom", "phantoms"), ("prepare", "prepared"), ("stage1", "stage1"), ("stage3", "model"), ("vqa", "eval/vqa/scores.json")],
)
def test_a_step_without_its_output_runs_again_with_all_later_ones(step: str, product: str, demo: Demo, tmp_path: Path) -> None:
    demo()
    path = tmp_path / "outputs" / "demo" / product
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert demo() == list(STEPS[STEPS.index(step) :])
    assert demo() == []


def test_a_failed_step_and_all_later_ones_run_again(demo: Demo, tmp_path: Path) -> None:
    """This includes later steps that were finished before."""
    demo()
    (tmp_path / "outputs" / "demo" / "done" / "stage1").unlink()
    assert demo(FAILS="stage2") == ["stage1", "stage2"]
    assert demo() == list(STEPS[STEPS.index("stage2") :])
