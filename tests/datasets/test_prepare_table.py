"""`med3dvlm prepare table`: settings of scans on the command line and in the table, and the summary of the studies."""

import json
from pathlib import Path

import numpy as np
import pytest

from med3dvlm import VolumeProcessor, cli, read_volume
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import read_lines
from tests.formats.dicom_files import scan, write_series

SIZE = (8, 16, 24)


def prepare(root: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    arguments = ["prepare", "table", str(root), str(root / "out"), "--size", ",".join(map(str, SIZE)), "--workers", "1", *options]
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def seen(root: Path, name: str) -> np.ndarray:
    data = PreparedData(root / "out")
    (study,) = (study for split in data.summary["splits"] for study in data.studies(split) if study.id == name)
    return data.processor.dequantize(data.volume(study)).numpy()


def direct(path: Path, **reading: object) -> np.ndarray:
    return VolumeProcessor("m3d", size=SIZE).transform(read_volume(path, **reading)).numpy()  # type: ignore[arg-type]


def test_the_command_line_sets_all_scans_and_the_table_single_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", random.integers(0, 2000, (10, 20, 30)).astype(np.int16))
    head = "image,report,split,hu,rescale,unit,spacing\n"
    (tmp_path / "table.csv").write_text(head + 'a.npy,x,train,,,,\nb.npy,x,train,csv,"1,-500",,"3,1,1"\nc.npy,x,train,,,arbitrary,\n')
    code, _, _ = prepare(tmp_path, "--hu", "csv", "--rescale", "1,-1024", capsys=capsys)
    assert code == 0
    readings = {study.id: study.reading for study in PreparedData(tmp_path / "out").studies("train")}
    assert readings == {
        "a": {"hu": "csv", "rescale": [1, -1024]},
        "b": {"hu": "csv", "rescale": [1, -500], "spacing": [3, 1, 1]},
        "c": {"unit": "arbitrary"},
    }
    index = {line["study"]: line for line in read_lines(tmp_path / "out" / "index.jsonl")}
    assert [index[name]["unit"] for name in "abc"] == ["HU", "HU", "arbitrary"] and index["b"]["spacing"] == [3, 1, 1]
    with pytest.raises(SystemExit):
        prepare(tmp_path, "--spacing", "1,1,1", capsys=capsys)
    assert "for that of the prepared volumes use --target-spacing" in capsys.readouterr().err


def test_the_chosen_series_is_listed_for_each_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write_series(tmp_path / name / "one", scan())
        write_series(tmp_path / name / "two", scan()[::-1][:-1])
    (tmp_path / "table.csv").write_text("image,report,split,series\na,x,train,\nb,x,train,2\n")
    code, output, _ = prepare(tmp_path, capsys=capsys)
    assert code == 0 and f"{tmp_path / 'out' / 'warnings.jsonl'}" in output and "Warnings     there are # series (...)" in output
    told = {line["study"]: (line["file"], " ".join(line["warnings"])) for line in read_lines(tmp_path / "out" / "warnings.jsonl")}
    assert "there are 2 series" in told["a"][1] and "number 1 is read" in told["a"][1] and told["a"][0] == "a"
    assert "number 2 is read" in told["b"][1]
    for name, series in (("a", 1), ("b", 2)):
        assert np.array_equal(seen(tmp_path, name), direct(tmp_path / name, series=series))
    before = (tmp_path / "out" / "warnings.jsonl").stat().st_mtime_ns
    assert prepare(tmp_path, capsys=capsys)[0] == 0 and (tmp_path / "out" / "warnings.jsonl").stat().st_mtime_ns == before


def test_a_study_left_out_is_listed_and_the_exit_code_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(-1000, 400, (10, 20, 30)).astype(np.int16))
    lines = [{"image": name, "report": report} for name, report in (("a.npy", "x"), ("b.npy", "x"), ("c.npy", float("nan")))]
    (tmp_path / "Table.JSONL").write_text("\n".join(map(json.dumps, lines)))
    code, output, error = prepare(tmp_path, capsys=capsys)
    assert code == 1 and "Prepared     1 studies" in output and "Warning: 2 of 3 studies could not be prepared" in error
    failures = {line["study"]: line["reason"] for line in read_lines(tmp_path / "out" / "failures.jsonl")}
    assert "Table.JSONL line 3: the report of c.npy is empty" in failures["c"] and "b.npy: there is no such file" in failures["b"]


def test_hu_settings_are_refused_for_ct_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "ct_rate", str(tmp_path), str(tmp_path / "out"), "--hu", "already_hu"]) == 2
    assert "--hu is for scans without metadata, but CT-RATE's metadata state it; leave it out" in capsys.readouterr().err
