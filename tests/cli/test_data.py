"""`phantom` and `prepare`: bad samples, nested splits, shards."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from med3dvlm.cli import main
from med3dvlm.datasets.store import PreparedData
from med3dvlm.recipes import RECIPES
from tests.cli.scans import Run, sentence


def test_phantoms_and_their_baselines(run: Run, phantoms: Path) -> None:
    code, output, error = run("phantom", phantoms, "--studies", 12, "--detail", 0.3, "--workers", 1)  # again: nothing is drawn anew
    assert code == 0 and "Traceback" not in error
    assert re.search(r"12 studies of \d+ patients in .*phantoms: 9 train, 1 validation, 2 test\n", output)
    assert set(re.findall(r"^  (\S+) +[01]\.\d{3}$", output, re.MULTILINE)) >= {"plane", "phase", "organ"}
    assert len(list(phantoms.rglob("*.nii.gz"))) == 12


def test_prepare_continues_after_bad_samples_and_names_them(run: Run, phantoms: Path, tmp_path: Path) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    bad = sorted(source.rglob("*.nii.gz"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:500])
    bad[1].unlink()
    arguments = ("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    code, output, error = run(*arguments)
    summary = json.loads((prepared / "summary.json").read_text())
    assert code == 1
    assert (summary["studies"], summary["failures"]) == (10, 2)
    assert "Warning: 2 of 12 studies could not be prepared" in error and "Traceback" not in error
    for path in bad:
        assert str(path.relative_to(source / "M3D_Cap")).removesuffix(".nii.gz") in error
    with pytest.raises(ValueError, match="could not be prepared"):
        PreparedData(prepared)
    assert f"Prepared     10 studies, {summary['questions']} questions, fingerprint {summary['fingerprint']}" in output
    assert run(*arguments)[1] == output

    for path in source.rglob("*.nii.gz"):
        path.unlink()
    code, _, error = run("prepare", "m3d", source, tmp_path / "nothing", "--size", "16,32,24", "--workers", 1)
    assert code == 2 and "none of the 12 studies" in sentence(error)


def test_a_split_within_another_is_prepared_once(run: Run, phantoms: Path, tmp_path: Path) -> None:
    """M3D's test1k is such a split; one of its scans is missing here."""
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    path = source / "M3D_Cap" / "M3D_Cap.json"
    listing = json.loads(path.read_text())
    path.write_text(json.dumps({"part": listing["train"][:3], **listing}))
    (source / listing["train"][0]["image"]).unlink()
    code, _, error = run("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    summary, split_file = json.loads((prepared / "summary.json").read_text()), prepared / "split_part.json"
    assert (code, summary["studies"], summary["failures"]) == (1, 11, 1) and "part" not in summary["splits"]
    assert f"pass --split-file {split_file}" in error
    whole, part = PreparedData(prepared, True), PreparedData(prepared, True, split_file)
    assert [study.id for study in part.studies("part")] == [study.id for study in whole.studies("train")[:2]]
    assert {q.study for q in part.questions("part")} == {study.id for study in part.studies("part")}


def test_shards_are_finished_by_a_run_without_shard(run: Run, phantoms: Path, tmp_path: Path) -> None:
    arguments = ("prepare", "m3d", phantoms, tmp_path / "prepared", "--size", "16,32,24", "--workers", 1)
    for part in (1, 2):
        code, output, error = run(*arguments, "--shard", f"{part}/2")
        assert code == 0 and json.loads(output) == {"shard": f"{part}/2", "studies": 6, "made": 6}
        assert f"When all 2 shards are done, run the command without --shard to finish {tmp_path / 'prepared'}." in error
    assert "Prepared     12 studies" in run(*arguments)[1]
    assert len(PreparedData(tmp_path / "prepared").studies("train")) == 9
    assert "no shard 3/2" in sentence(run(*arguments, "--shard", "3/2")[2])


def test_prepare_continues_after_missing_reports(run: Run, phantoms: Path, tmp_path: Path) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    lost, empty = sorted((source / "M3D_Cap" / "ct_case").rglob("*.txt"))[:2]
    lost.unlink()
    empty.write_text(" ")
    code, _, error = run("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    summary = json.loads((prepared / "summary.json").read_text())
    assert (code, summary["studies"], summary["failures"]) == (1, 10, 2)
    assert "Warning: 2 of 12 studies could not be prepared" in error
    assert f"{lost}, the report of" in error and "is missing" in error and f"{empty}, the report of" in error and "is empty" in error
    assert len(PreparedData(prepared, exclude_failures=True).questions("train")) > 0


def test_the_help_of_prepare_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"recipe of preprocessing: {', '.join(list(RECIPES)[:-1])} or {list(RECIPES)[-1]} " in said
