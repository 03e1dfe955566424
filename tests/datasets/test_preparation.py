"""Preparation: each volume is made once, changes are detected, bad samples are listed, and a second run writes nothing."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.datasets.preparation import prepare, prepare_shard
from med3dvlm.datasets.statistics import kind_of
from med3dvlm.datasets.store import PreparedData, volume_path
from med3dvlm.files import read_lines
from med3dvlm.records import Records, Study, nested_splits
from tests.datasets.five import SIZE, abandon, questions, resave, studies, times, tree, write_scans


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return write_scans(tmp_path / "scans")


@pytest.fixture
def prepared_from(scans: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """prepared_from() prepares the five scans, or other records about them, into tmp_path / "prepared"."""

    def run(records: list[Study] | None = None, count: int = 5, size: tuple[int, int, int] = SIZE, **options: Any) -> dict[str, Any]:
        records = records or studies(count)
        return prepare(
            scans, Records(records, questions(count)), VolumeProcessor("m3d", size=size), tmp_path / "prepared", workers=1, **options
        )

    return run


def test_existing_volumes_are_kept(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    """A killed preparation left some volumes, one of them incomplete, and no summary."""
    first = prepared_from()
    root = tmp_path / "prepared"
    (root / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished preparation.*med3dvlm prepare"):
        PreparedData(root)
    lost, *kept = (volume_path(root, study) for study in studies())
    whole = lost.read_bytes()
    lost.with_name(".0123.part").write_bytes(whole[:50])
    abandon(root)
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert prepared_from() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert lost.read_bytes() == whole and not list(root.rglob("*.part"))


def test_the_fingerprint_follows_the_data(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    first = prepared_from()
    assert prepared_from()["fingerprint"] == first["fingerprint"]
    assert prepared_from(count=4)["fingerprint"] != first["fingerprint"]
    shutil.rmtree(tmp_path / "prepared")
    array = np.asarray(nib.load(scans / studies()[0].image).dataobj).copy()
    array[10, 10, 5] += 500
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.2, 3.0, 1.0])), scans / studies()[0].image)
    assert prepared_from()["fingerprint"] != first["fingerprint"]


def test_a_changed_scan_is_prepared_again(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    first, root = prepared_from(), tmp_path / "prepared"
    before = {study.id: volume_path(root, study).stat().st_mtime_ns for study in studies()}
    changed = studies()[2]
    resave(scans / changed.image)
    second = prepared_from()
    assert second["fingerprint"] != first["fingerprint"] and second["studies"] == first["studies"]
    after = {study.id: volume_path(root, study).stat().st_mtime_ns for study in studies()}
    assert [name for name in before if before[name] != after[name]] == [changed.id]
    data = PreparedData(root)
    assert torch.equal(data.processor.dequantize(data.volume(changed)), data.processor(scans / changed.image)["pixel_values"][0])
    assert prepared_from() == second


def test_another_data_set_with_the_same_names_is_prepared_again(scans: Path, tmp_path: Path) -> None:
    processor = VolumeProcessor("m3d", size=SIZE)
    first = prepare(scans, Records(studies(), questions()), processor, tmp_path / "prepared", workers=1)
    shutil.copytree(scans, tmp_path / "other")
    for study in studies():
        resave(tmp_path / "other" / study.image)
    second = prepare(tmp_path / "other", Records(studies(), questions()), processor, tmp_path / "prepared", workers=1)
    alone = prepare(tmp_path / "other", Records(studies(), questions()), processor, tmp_path / "alone", workers=1)
    assert first["fingerprint"] != second["fingerprint"] == alone["fingerprint"]


def test_a_slice_added_to_a_folder_is_a_change(tmp_path: Path) -> None:
    """One slice is added to a folder of pictures, and one is rewritten."""
    study = Study("a", "a", "series", "Report.", {}, "train", "test")
    (tmp_path / "series").mkdir()
    random = np.random.default_rng(0)

    def slice_(number: int, **options: Any) -> None:
        Image.fromarray(random.integers(0, 255, (20, 30), np.uint8)).save(tmp_path / "series" / f"{number}.png", **options)

    def run() -> int:
        prepare(tmp_path, Records([study]), VolumeProcessor("m3d", size=SIZE), tmp_path / "store", workers=1)
        return volume_path(tmp_path / "store", study).stat().st_mtime_ns

    for number in range(1, 7):
        slice_(number)
    first = run()
    assert run() == first
    slice_(7)
    second = run()
    assert first < second == run()
    slice_(3, compress_level=0)
    assert run() > second


@pytest.mark.parametrize("kept", [True, False])
def test_voxels_beside_a_header_are_a_part_of_the_scan(tmp_path: Path, kept: bool) -> None:
    """Their file has another name than the header; other voxels of the same size and date are a change, a copy is not."""
    import SimpleITK as sitk

    study, random = Study("a", "a", "in/scan.mhd", "Report.", {}, "train", "test"), np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(random.integers(-1000, 1000, (10, 20, 30), np.int16)), tmp_path / "in" / "scan.mhd")
    voxels = (tmp_path / "in" / "scan.raw").rename(tmp_path / "in" / "0001.img")
    header = tmp_path / "in" / "scan.mhd"
    header.write_text(header.read_text().replace("scan.raw", "0001.img"))

    def run() -> str:
        prepare(tmp_path, Records([study]), VolumeProcessor("m3d", size=SIZE), tmp_path / "store", workers=1)
        return str(read_lines(tmp_path / "store" / "index.jsonl")[0]["checksum"])

    first, state = run(), voxels.stat()
    made = volume_path(tmp_path / "store", study).stat().st_mtime_ns
    if kept:
        shutil.copytree(tmp_path / "in", tmp_path / "copy")
        shutil.rmtree(tmp_path / "in")
        (tmp_path / "copy").rename(tmp_path / "in")
        assert run() == first and volume_path(tmp_path / "store", study).stat().st_mtime_ns == made
    else:
        voxels.write_bytes(random.integers(-1000, 1000, 6000, np.int16).tobytes())
        os.utime(voxels, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert run() != first


def test_another_version_of_the_readers_is_a_change(
    prepared_from: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared_from()
    before = times(tmp_path / "prepared", "*.safetensors")
    monkeypatch.setattr("med3dvlm.datasets.study_volume.VERSION", 99)
    prepared_from()
    after = times(tmp_path / "prepared", "*.safetensors")
    assert len(before) == 5 and all(after[path] > before[path] for path in before)


def test_a_scan_too_large_for_the_memory_is_a_failure(
    prepared_from: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy and torch raise different errors; any other RuntimeError is a defect."""

    def read(path: Path, **options: Any) -> Any:
        if "/1/" in str(path):
            np.empty(1 << 50)
        if "/2/" in str(path):
            torch.empty(1 << 50)
        if "/3/" in str(path) and defect:
            raise RuntimeError("a defect")
        return read_volume(path, **options)

    defect = False
    monkeypatch.setattr("med3dvlm.datasets.study_volume.read_volume", read)
    assert prepared_from()["failures"] == 2
    failures = read_lines(tmp_path / "prepared" / "failures.jsonl")
    assert [failure["study"] for failure in failures] == ["case/1/Axial", "case/2/Axial"]
    assert all("Axial.nii.gz: there is too little memory for this scan; prepare with fewer workers" in line["reason"] for line in failures)
    defect = True
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(RuntimeError, match="a defect"):
        prepared_from()


def test_temporary_files_of_other_processes_are_kept(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    volumes = tmp_path / "prepared" / "volumes"
    volumes.mkdir(parents=True)
    young, old = volumes / ".1.part", volumes / ".2.part"
    old.touch()
    abandon(volumes)
    young.touch()
    prepared_from()
    assert young.exists() and not old.exists()


def test_volumes_without_a_study_are_kept_and_counted(
    prepared_from: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert prepared_from()["volumes_of_no_study"] == 0 and not caplog.messages
    summary = prepared_from(count=3)
    assert summary["studies"] == 3 and summary["volumes_of_no_study"] == 2
    assert "kept 2 volumes of studies that are no longer in the data set" in caplog.text
    before = times(tmp_path / "prepared", "*.safetensors")
    assert len(before) == 5 and prepared_from()["volumes_of_no_study"] == 0
    assert times(tmp_path / "prepared", "*.safetensors") == before


def test_nested_splits_by_hand() -> None:
    a, b, c, d = studies(4)
    splits = {"small": [c], "test1k": [b], "train": [a], "test": [b, c], "again": [b, c], "none": [], "other": [c, d]}
    assert nested_splits(splits) == {
        "small": {"train": [a.id], "small": [c.id], "other": [c.id, d.id], "none": []},
        "test1k": {"train": [a.id], "test1k": [b.id], "other": [c.id, d.id], "none": []},
        "again": {"train": [a.id], "again": [b.id, c.id], "other": [c.id, d.id], "none": []},
    }


def test_a_killed_update_leaves_no_summary(
    prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, root = prepared_from(), tmp_path / "prepared"
    resave(scans / studies()[0].image)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("med3dvlm.datasets.outputs.LocalVolumes.sweep", killed)
        prepared_from()
    with pytest.raises(FileNotFoundError, match="no finished preparation"):
        PreparedData(root)
    assert prepared_from()["fingerprint"] != first["fingerprint"]


def test_colliding_ids_and_paths_are_refused(scans: Path, tmp_path: Path) -> None:
    processor = VolumeProcessor("m3d", size=SIZE)
    twice = [studies()[0], replace(studies()[1], id=f"./{studies()[0].id}")]
    with pytest.raises(ValueError, match="two studies have the id './case/0/Axial'; give each its own"):
        prepare(scans, Records(twice), processor, tmp_path / "prepared")
    (scans / "volumes").mkdir()
    raw = scans / "volumes" / "a.safetensors"
    raw.write_bytes(b"a scan")
    content = raw.read_bytes()
    with pytest.raises(ValueError, match="a.safetensors would be overwritten by its prepared volume; prepare into another folder"):
        prepare(
            scans, Records([Study("a", "a", "volumes/a.safetensors", "Report.", {}, "train", "test")]), processor, scans / "volumes" / ".."
        )
    assert raw.read_bytes() == content and not (tmp_path / "prepared").exists()


def test_other_settings_need_another_folder(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = prepared_from()
    with pytest.raises(ValueError, match="prepared was prepared with other settings .*; choose another folder or delete it"):
        prepared_from(size=(8, 16, 16))
    assert PreparedData(tmp_path / "prepared").summary == first


def test_bad_samples_are_listed_and_the_others_prepared(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    """Four of five are truncated, a text, missing, or NaN; each is listed with its reason."""
    images = [scans / study.image for study in studies()]
    images[0].write_bytes(images[0].read_bytes()[:-2000])
    images[1].write_text("not a scan")
    images[2].unlink()
    nib.save(nib.Nifti1Image(np.full((30, 20, 10), np.nan, np.float32), np.eye(4)), images[3])
    summary = prepared_from()
    assert (summary["studies"], summary["questions"], summary["failures"]) == (1, 1, 4)
    root = tmp_path / "prepared"
    failures = [json.loads(line) for line in (root / "failures.jsonl").read_text().splitlines()]
    assert [failure["study"] for failure in failures] == [study.id for study in studies()[:4]]
    assert [failure["file"] for failure in failures] == [study.image for study in studies()[:4]]
    assert all(str(image) in failure["reason"] and "\n" not in failure["reason"] for image, failure in zip(images, failures, strict=False))
    for failure, word in zip(failures, ("cut short", "cannot be read as NIfTI", "no such file", "NaN"), strict=True):
        assert word in failure["reason"]
    assert len(list(root.rglob("*.safetensors"))) == 1 and not list(root.rglob("*.part"))

    with pytest.raises(
        ValueError,
        match=r"4 studies of .* the first is case/0/Axial: .*[^.]; mend the files and prepare again, or pass --exclude-failures true$",
    ):
        PreparedData(root)
    data = PreparedData(root, exclude_failures=True)
    assert [study.id for study in data.studies("train")] == ["case/4/Axial"]
    assert [question.study for question in data.questions("train")] == ["case/4/Axial"]

    for image in images[:4]:
        shutil.copy(images[4], image)
    assert prepared_from()["failures"] == 0 and len(PreparedData(root).studies("train")) == 5


def test_an_unwritable_folder_stops_the_preparation(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As with a full disk, no sample is listed as bad."""
    root = tmp_path / "prepared"
    root.mkdir()
    (root / "volumes").touch()
    with pytest.raises(OSError, match="volumes"):
        prepared_from()
    assert not (root / "summary.json").exists() and not (root / "failures.jsonl").exists()
    (root / "volumes").unlink()
    assert prepared_from()["failures"] == 0


def test_a_second_run_writes_nothing(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    """This holds although a study fails again."""
    (scans / studies()[1].image).unlink()
    first, before = prepared_from(), times(tmp_path / "prepared")
    assert first["failures"] == 1 and {path.name for path in before} >= {"summary.png", "summary.json", "index.jsonl", "failures.jsonl"}
    assert prepared_from() == first and times(tmp_path / "prepared") == before


def test_damaged_volumes_are_prepared_again_by_verify(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first, root = prepared_from(), tmp_path / "prepared"
    whole, path = tree(root), volume_path(root, studies()[3])
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    before = times(root, "*.safetensors")
    assert prepared_from() == first and times(root, "*.safetensors") == before
    assert prepared_from(verify=True) == first and tree(root) == whole
    after = times(root, "*.safetensors")
    assert [place for place in before if before[place] != after[place]] == [path]


def test_other_reading_settings_are_a_change(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    prepared_from()
    before = times(tmp_path / "prepared", "*.safetensors")
    other = [replace(studies()[0], reading={"spacing": [5.0, 1.2, 1.0]}), *studies()[1:]]
    summary = prepared_from(other)
    after = times(tmp_path / "prepared", "*.safetensors")
    assert [path.parent.name for path in before if before[path] != after[path]] == ["0"]
    assert summary["spacings"]["greatest"] == [5.0, 1.2, 1.0] and summary["spacings"]["median"] == [3.0, 1.2, 1.0]
    assert prepared_from(other) == summary


def test_volumes_of_other_settings_are_prepared_again(prepared_from: Callable[..., dict[str, Any]], scans: Path, tmp_path: Path) -> None:
    """Two shards that start at the same moment with different settings write such volumes."""
    expected, root = prepared_from(), tmp_path / "prepared"
    whole = tree(root)
    shutil.rmtree(root)
    prepare_shard(scans, studies(), VolumeProcessor("m3d", size=(8, 16, 16)), root, (1, 2), workers=1)
    (root / "preprocessor_config.json").unlink()
    assert prepared_from() == expected and tree(root) == whole


def test_the_summary(prepared_from: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = prepared_from()
    assert (summary["recipe"], summary["size"], summary["dtype"]) == ("m3d", list(SIZE), "uint8")
    assert summary["shapes"] == dict.fromkeys(("least", "5 %", "median", "95 %", "greatest"), [10, 20, 30])
    assert summary["spacings"] == dict.fromkeys(("least", "5 %", "median", "95 %", "greatest"), [3.0, 1.2, 1.0]) | {"unknown": 0}
    assert (summary["orientations"], summary["units"], summary["warnings"]) == ({"SAR": 5}, {"HU": 5}, {})
    lines = read_lines(tmp_path / "prepared" / "index.jsonl")
    data = PreparedData(tmp_path / "prepared")
    for line, study in zip(lines, data.studies("train"), strict=True):
        values = [int(value) for value in data.volume(study)[0, ::2, ::2, ::2].flatten()]
        counts = [0] * 50
        for value in values:
            counts[min(49, value * 50 // 255)] += 1
        assert line["histogram"] == [round(1e4 * count / len(values)) for count in counts]
    with Image.open(tmp_path / "prepared" / "summary.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 1


def test_warnings_are_counted_by_kind() -> None:
    first, second = "slices are tilted by 20 degrees; so.", "slices are tilted by 7.5 degrees; so."
    assert kind_of(first) == kind_of(second) == "slices are tilted by # degrees; so."
    one, two = (f"there are 3 series (1: 5 mm (B30f); 2: {size} x 512); number 1 is read." for size in (40, 80))
    assert kind_of(one) == kind_of(two) == "there are # series (...); number # is read."
    assert kind_of("2 series with 30, 20, 4 slices of 1.5 x 2 mm") == kind_of("5 series with 3, 2 slices of 9 x 2 x 1 mm")
