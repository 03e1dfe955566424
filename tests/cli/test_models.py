"""`ask`, `report`, `merge` and `chat`: answers on stdout, everything else on stderr."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from med3dvlm.prompts import RESEARCH_NOTICE
from tests.cli.scans import Run, adapter_of, sentence, write
from tests.inference.learned_chat import REPORTS


def test_ask_and_report_from_a_shell(model: Path, scan: Path, tmp_path: Path) -> None:
    """stdout holds the answer and nothing else."""
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "med3dvlm.cli", "report", str(model), str(scan)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, REPORTS[0] + "\n"), done.stderr
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"\d+\.\d s, \d+ tokens, confidence (0\.\d\d|1\.00)", lines[-2]), done.stderr
    assert lines[-1] == RESEARCH_NOTICE
    assert "Loading" not in done.stderr and "outside" not in done.stderr


def test_a_scan_out_of_distribution_gives_a_warning(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    code, output, error = run("ask", model, scan, "Which organ has a lesion?")
    assert (code, output) == (0, "Liver\n")
    assert "outside the data" not in error and RESEARCH_NOTICE in error
    stripes = np.tile(np.float32([0, 1000, 300, 0, 50]), (24, 20, 6)).transpose()
    code, output, error = run("ask", model, write(tmp_path / "stripes.nii", stripes), "Which organ has a lesion?")
    assert code == 0 and output
    assert re.search(
        r"lies outside the data that the model was trained on \(distance .*, limit .*\): its answer is not to be relied on\.", error
    )


def test_a_model_without_a_detector_gives_a_warning(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        if "out_of_distribution" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    code, output, error = run("ask", tmp_path, scan, "Plane?", "--max-new-tokens", "5")
    assert (code, output) == (0, "Axial\n")
    assert f"{tmp_path} holds no out_of_distribution.safetensors" in error


def test_a_merge_overwrites_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    code, _, error = run("merge", tmp_path, model)
    assert code == 2 and "exists and would be overwritten" in sentence(error)
    assert before == {file.name: file.stat().st_mtime_ns for file in model.iterdir()}


def test_a_merged_model_answers(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "adapter")
    code, output, error = run("merge", adapter, tmp_path / "new" / "merged")
    assert (code, output) == (0, f"{tmp_path / 'new' / 'merged'} holds the merged model\n"), error
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    assert (tmp_path / "new" / "merged").stat().st_mode & 0o777 == tmp_path.joinpath("new").stat().st_mode & 0o777
    assert run("ask", tmp_path / "new" / "merged", scan, "Plane?")[0] == 0


def test_public_names_register_their_auto_classes(model: Path) -> None:
    """Each name is imported in a separate process, where nothing else has imported the models."""
    code = """
import os, sys
import torch
from transformers import AutoModel, AutoProcessor
for name in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    __import__("med3dvlm", fromlist=[name])
    getattr(sys.modules["med3dvlm"], name)
    print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__, flush=True)
    os._exit(0)
"""
    command = [sys.executable, "-c", code, str(model), "Med3DVLM", "Med3DVLMProcessor", "Med3DChat"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Med3DVLM Med3DVLMProcessor"] * 3, done.stderr


def test_chat_without_a_model(run: Run, tmp_path: Path) -> None:
    """The error of the page is shown, with its exit code."""
    code, _, error = run("chat", tmp_path / "none", "--port", 7999)
    assert code == 2 and "none" in error and len(error.strip().splitlines()) == 1, error
