"""`med3dvlm run`: answers equal to `ask`, equal bytes however it is run, and a line for each unreadable scan."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from med3dvlm import Med3DChat, cli
from med3dvlm.datasets import engines
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
from med3dvlm.worklist import running
from med3dvlm.worklist.reading import Failure, read_on_any_machine
from med3dvlm.worklist.records import findings_of
from med3dvlm.worklist.scans import Scan
from tests import random_chat

OUTPUTS = ("results.jsonl", "results.csv", "failures.jsonl", "manifest.json", "run.json", "embeddings.parquet")
QUESTION = "Which organ has a lesion?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chat = tmp_path_factory.mktemp("models") / "random", random_chat.build("qwen2")
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


def write(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-1000, 1000, (30, 20, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 3.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("a/one.nii.gz", "a/two.nii", "b/three.nii.gz", "b/three.nii", "five.nii.gz")):
        write(root / name, seed)
    (root / "b" / "broken.nii.gz").write_bytes(b"This is a letter, not a scan." * 20)
    (root / "notes.md").write_text("no scan")
    (root / "linked").symlink_to(root / "a")
    for name in ("run.json", "progress.jsonl", "mask.nii.gz"):  # results of another run
        (root / "old" / name).parent.mkdir(exist_ok=True)
        (root / "old" / name).touch()
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    def call(*arguments: object, tokens: int = 7) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["run", str(model), *map(str, arguments), "--max-new-tokens", str(tokens)])
        return code, *capsys.readouterr()

    return call


def content(out: Path) -> dict[str, bytes]:
    """Return the files that must be equal between runs, by path."""
    found = {name: (out / name).read_bytes() for name in OUTPUTS if (out / name).is_file()}
    return found | {str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "cases").rglob("*.json"))}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]


def test_answers_equal_ask_for_any_number_of_workers_and_batch(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    options = ("--question", QUESTION, "--embed")
    code, said, error = run(scans, "--out", tmp_path / "one", "--workers", 1, *options)
    assert f"Links to folders are not followed: {scans}/linked" in error
    assert code == 1 and "5 cases of 6 scans" in said and "1 scan without a result" in error and "answers of 5 cases were cut" in error
    assert run(scans, "--out", tmp_path / "other", "--workers", 2, "--batch-size", 2, *options)[0] == 1
    assert content(tmp_path / "one") == content(tmp_path / "other")

    chat = Med3DChat.from_pretrained(model)
    records = lines(tmp_path / "one" / "results.jsonl")
    ids = ["a/one", "a/two", "b/three.nii", "b/three.nii.gz", "five"]
    assert [record["id"] for record in records] == ids
    for record, name in zip(records, ("a/one.nii.gz", "a/two.nii", "b/three.nii", "b/three.nii.gz", "five.nii.gz"), strict=True):
        report, answer = (chat.ask(scans / name, prompt, max_new_tokens=7) for prompt in (REPORT_PROMPTS[0], QUESTION))
        assert (record["report"]["text"], record["report"]["tokens"]) == (report.text, report.tokens)
        assert record["report"]["confidence"] == pytest.approx(report.confidence, abs=0.006)
        assert [(each["question"], each["text"]) for each in record["answers"]] == [(QUESTION, answer.text)]
        assert record == json.loads((tmp_path / "one" / "cases" / f"{record['id']}.json").read_text(encoding="utf-8-sig"))
        assert record["notice"] == RESEARCH_NOTICE and record["scan"]["shape"] == [10, 20, 30]
    with (tmp_path / "one" / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["report"], row["answer_1"]) for row in rows] == [
        (record["id"], record["report"]["text"], record["answers"][0]["text"]) for record in records
    ]
    (failure,) = lines(tmp_path / "one" / "failures.jsonl")
    assert failure["id"] == "b/broken" and "cannot be read as NIfTI" in str(failure["reason"]) and str(scans) not in str(failure["reason"])

    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "one" / "embeddings.parquet")
    assert table["id"].to_pylist() == ids
    for vector, name in zip(table["embedding"].to_pylist(), ("a/one.nii.gz", "a/two.nii"), strict=False):
        low, high = chat.encode(scans / name)
        np.testing.assert_allclose(vector, [*low[0].mean(0).tolist(), *high[0].mean(0).tolist()], rtol=1e-5, atol=1e-6)


def test_a_killed_run_continues_with_the_same_bytes(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "scans", tmp_path / "out"
    shutil.copytree(scans, mine, symlinks=True)
    words = ("run", model, mine, "--out", out, "--batch-size", 2, "--workers", 1, "--max-new-tokens", 7)
    process = multiprocessing.get_context("fork").Process(target=cli.main, args=([str(word) for word in words],))
    process.start()
    while process.is_alive() and not ((out / "progress.jsonl").is_file() and (out / "progress.jsonl").stat().st_size):
        time.sleep(0.001)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in (out / "cases").rglob("*.json")}
    assert before and not (out / "results.jsonl").exists()
    with (out / "progress.jsonl").open("a") as file:  # as a power cut leaves it
        file.write('{"scan": "b/')
    write(mine / "b" / "broken.nii.gz", 9)
    assert run(mine, "--out", out, "--batch-size", 2)[0] == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert run(mine, "--out", tmp_path / "fresh", "--batch-size", 2)[0] == 3
    assert content(out) == content(tmp_path / "fresh") and len(content(out)) == 5 + 6

    write(mine / "five.nii.gz", 10)  # another scan under the same name is seen
    assert run(mine, "--out", out, "--batch-size", 2)[0] == 3
    assert content(out)["results.jsonl"] != content(tmp_path / "fresh")["results.jsonl"]
    code, _, error = run(mine, "--out", out, tokens=8)
    assert code == 2 and "made with another max_new_tokens (7, not 8); delete it or choose another --out" in error


def read_or_die(*arguments: Any, **settings: Any) -> Any:
    """Read, but kill this process whenever it reads one scan, and when another one is read for the first time."""
    _, scan = arguments
    died = scan.path.with_name("died")
    if scan.id == "five" or (scan.id == "b/three.nii.gz" and not died.exists()):
        died.touch()
        os._exit(1)
    return read_on_any_machine(*arguments, **settings)


KILLED = """
import os, signal, sys
from med3dvlm import cli
from med3dvlm.worklist.journal import Journal
add = Journal.add
Journal.add = lambda *lines: (add(*lines), os.kill(os.getpid(), signal.SIGKILL))
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ray_reads_the_same_although_run_and_processes_are_killed(
    run: Run, model: Path, scans: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed after its first batch, with its scans named from its own working folder."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    shutil.copytree(scans, tmp_path / "scans", symlinks=True)
    out, options = tmp_path / "ray", ("--batch-size", 2, "--embed")
    words = ("run", model, "scans", "--out", out, *options, "--max-new-tokens", 7, "--workers-on", "ray")
    ray.init(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    try:
        environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], cwd=tmp_path, env=environment, timeout=300, check=False)
        assert killed.returncode == -signal.SIGKILL and [line["scan"] for line in lines(out / "progress.jsonl")] == ["a/one", "a/two"]
        before = {file: file.stat().st_mtime_ns for file in (out / "cases").rglob("*.json")}
        monkeypatch.setattr(engines, "TRIES", 2)
        with monkeypatch.context() as patch:
            patch.setattr(running, "read_on_any_machine", read_or_die)
            code, said, _ = run(tmp_path / "scans", "--out", out, *options, "--workers-on", "ray")
    finally:
        ray.shutdown()
    assert code == 1 and "4 cases of 6 scans" in said and (tmp_path / "scans" / "b" / "died").exists()
    assert lines(out / "failures.jsonl")[1] == {
        "id": "five", "reason": "the process that worked on it was killed, 2 times on several machines"
    }  # fmt: skip
    assert run(tmp_path / "scans", "--out", out, *options)[0] == run(tmp_path / "scans", "--out", tmp_path / "local", *options)[0] == 1
    assert content(out) == content(tmp_path / "local") and {file: file.stat().st_mtime_ns for file in before} == before


def test_a_machine_that_does_not_see_the_scans_ends_the_run(scans: Path, tmp_path: Path) -> None:
    found = [Scan("a", scans / "a" / "one.nii.gz"), Scan("b", scans / "b" / "gone.nii.gz")]
    assert running._root(found) == scans and running._root(found[:1]) == scans / "a"
    assert running._root([Scan("c", tmp_path / "no" / "where.nii")]) == tmp_path
    with pytest.raises(FileNotFoundError, match="does not see .*gone; put it on a disk that all machines share"):
        read_on_any_machine(tmp_path / "gone", found[0], [], "all")
    ((failure,),) = [read_on_any_machine(scans, found[1], [], "all")]
    assert isinstance(failure, Failure) and failure.id == "b"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_gives_ids_and_questions(run: Run, model: Path, scans: Path, tmp_path: Path, ending: str) -> None:
    rows = [
        {"Image": str(scans / "five.nii.gz"), "id": "case-5", "question": QUESTION, "ward": "3"},
        {"Image": str(scans / "five.nii.gz"), "id": "case-5", "question": "Is there an effusion?", "ward": "3"},
        {"Image": str(scans / "a" / "one.nii.gz"), "id": "case-1", "question": None, "ward": "4"},
        {"Image": str(scans / "b" / "broken.nii.gz"), "id": "case-0", "question": None, "ward": "4"},
    ]
    path = tmp_path / f"table.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    code, _, error = run(path, "--out", tmp_path / "out", "--no-report")
    assert code == 1 and "Columns that are not used: ward" in error
    records = lines(tmp_path / "out" / "results.jsonl")
    assert [(record["id"], [answer["question"] for answer in record["answers"]]) for record in records] == [
        ("case-5", [QUESTION, "Is there an effusion?"]),
        ("case-1", []),
    ]
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert b"case-0" in written and not any(name.encode() in written for name in (str(scans), "five.nii", "one.nii", "broken"))


@pytest.mark.parametrize("text", [None, "", "\x01\x02", "Findings:"])
def test_an_empty_report_states_nothing(text: str | None) -> None:
    assert findings_of(text, {}) == {}
    assert findings_of(text, {"pleural_effusion": 0.25}) == {"pleural_effusion": {"stated": None, "probability": 0.25}}
    assert findings_of("No pleural effusion.", {"pleural_effusion": 0.25})["pleural_effusion"]["stated"] == "absent"


def test_wrong_input(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.csv").write_text(f"image,id\n{scans}/five.nii.gz,x\n{scans}/a/two.nii,x\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for source, out, options, reason in (
        (tmp_path / "empty", "new", (), "there is no scan below"),
        (tmp_path / "nothing", "new", (), "is not there; name a folder of scans"),
        (tmp_path / "twice.csv", "new", (), "1 ids are those of several scans, the first is 'x'"),
        (scans, "out", (), "exists and is not a folder of results"),
        (scans, "new", ("--no-report",), "nothing is asked"),
        (scans, "new", ("--masks",), "cannot point, so there are no masks"),
        (scans, "new", ("--workers", 0), "--workers is 0"),
        (scans, "new", ("--contrastive", tmp_path / "nothing"), "is not a directory"),
        (scans, "new", ("--contrastive", model), "holds a model of type med3dvlm, but one of type med3d_clip is needed there"),
    ):
        code, said, error = run(source, "--out", tmp_path / out, *options)
        assert (code, said) == (2, "") and reason in error and error.strip().splitlines()[-1].startswith("med3dvlm: error: "), error
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]
