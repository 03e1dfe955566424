"""Prepared data: the volumes of VolumeProcessor bit for bit, made once, and a bad sample named instead of replaced."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dvlm import VolumeProcessor
from med3dvlm.datasets import m3d
from med3dvlm.datasets.features import fingerprint, frozen_features
from med3dvlm.datasets.store import PreparedData, prepare, volume_path
from med3dvlm.preprocessing import dequantize
from med3dvlm.records import Question, Study, read_questions, write_records

SIZE = (8, 16, 24)


def studies(count: int = 5) -> list[Study]:
    return [Study(f"case/{n}/Axial", str(n), f"case/{n}/Axial.nii.gz", f"Report {n}.", {}, "train", "test") for n in range(count)]


def questions(count: int = 5) -> list[Question]:
    return [Question(study.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial") for study in studies(count)]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Five scans of odd size, each with a body of its own in it."""
    root = tmp_path / "scans"
    for number, study in enumerate(studies()):
        array = np.full((30, 20, 10), -1000, np.int16)  # a NIfTI counts columns first
        array[3 : 20 + number, 2:18, 1:9] = np.random.default_rng(number).integers(-100, 400, (17 + number, 16, 8))
        path = root / study.image
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.2, 3.0, 1.0])), path)
    return root


@pytest.fixture
def prepared_from(scans: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    def run(count: int = 5, size: tuple[int, int, int] = SIZE) -> dict[str, object]:
        return prepare(scans, studies(count), questions(count), VolumeProcessor("m3d", size=size), tmp_path / "prepared", workers=1)

    return run


def test_a_prepared_volume_is_the_processors(phantoms: Path, prepared: Path) -> None:
    """Real phantoms of every plane, through the folder's own processor: equal bit for bit, for the trainer and for the file."""
    data = PreparedData(prepared)
    assert data.processor.size == (32, 64, 64)
    for study in [*data.studies("train")[:4], *data.studies("test")]:
        volume = data.volume(study)
        assert volume.dtype == torch.uint8 and volume.shape == (1, 32, 64, 64)
        assert torch.equal(dequantize(volume), data.processor(phantoms / study.image)["pixel_values"][0])


def test_records_come_back(phantoms: Path, prepared: Path) -> None:
    data = PreparedData(prepared)
    for split in m3d.SPLITS:
        assert (data.studies(split), data.questions(split)) == m3d.read(phantoms, split)
    assert data.summary["splits"] == {"train": 22, "validation": 1, "test": 5}
    with pytest.raises(ValueError, match="no studies of split 'val'; it has .*validation"):
        data.studies("val")


def test_what_is_there_is_not_made_again(prepared_from: Callable[..., dict[str, object]], scans: Path, tmp_path: Path) -> None:
    """As a killed preparation leaves it: some volumes, one of them half written, no summary."""
    first = prepared_from()
    root = tmp_path / "prepared"
    (root / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished preparation.*med3dvlm prepare"):
        PreparedData(root)
    lost, *kept = (volume_path(root, study) for study in studies())
    whole = lost.read_bytes()
    lost.with_suffix(".part").write_bytes(whole[:50])
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert prepared_from() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert lost.read_bytes() == whole and not list(root.rglob("*.part"))


def test_the_fingerprint_follows_the_data(prepared_from: Callable[..., dict[str, object]], scans: Path, tmp_path: Path) -> None:
    first = prepared_from()
    assert prepared_from()["fingerprint"] == first["fingerprint"]
    assert prepared_from(count=4)["fingerprint"] != first["fingerprint"]
    shutil.rmtree(tmp_path / "prepared")
    array = np.asarray(nib.load(scans / studies()[0].image).dataobj).copy()
    array[10, 10, 5] += 500
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.2, 3.0, 1.0])), scans / studies()[0].image)
    assert prepared_from()["fingerprint"] != first["fingerprint"]


def resave(path: Path, change: int = 500) -> None:
    """Brighten one voxel within the body."""
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[10, 10, 5] += change
    nib.save(nib.Nifti1Image(array, image.affine), path)


def test_a_changed_scan_is_prepared_anew(prepared_from: Callable[..., dict[str, object]], scans: Path, tmp_path: Path) -> None:
    first, root = prepared_from(), tmp_path / "prepared"
    before = {study.id: volume_path(root, study).stat().st_mtime_ns for study in studies()}
    changed = studies()[2]
    resave(scans / changed.image)
    second = prepared_from()
    assert second["fingerprint"] != first["fingerprint"] and second["studies"] == first["studies"]
    after = {study.id: volume_path(root, study).stat().st_mtime_ns for study in studies()}
    assert [name for name in before if before[name] != after[name]] == [changed.id]
    data = PreparedData(root)
    assert torch.equal(dequantize(data.volume(changed)), data.processor(scans / changed.image)["pixel_values"][0])
    assert prepared_from() == second


def test_another_data_set_with_the_same_names_is_prepared_anew(scans: Path, tmp_path: Path) -> None:
    processor = VolumeProcessor("m3d", size=SIZE)
    first = prepare(scans, studies(), questions(), processor, tmp_path / "prepared", workers=1)
    shutil.copytree(scans, tmp_path / "other")
    for study in studies():
        resave(tmp_path / "other" / study.image)
    second = prepare(tmp_path / "other", studies(), questions(), processor, tmp_path / "prepared", workers=1)
    alone = prepare(tmp_path / "other", studies(), questions(), processor, tmp_path / "alone", workers=1)
    assert first["fingerprint"] != second["fingerprint"] == alone["fingerprint"]


def test_a_slice_added_to_a_folder_is_a_change(tmp_path: Path) -> None:
    from med3dvlm.datasets.store import _line

    study = Study("a", "a", "series", "Report.", {}, "train", "test")
    (tmp_path / "series").mkdir()
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / "series" / name).write_bytes(b"slice")
    before = _line(tmp_path, study, 7)
    assert before == _line(tmp_path, study, 7)
    (tmp_path / "series" / "2.dcm").write_bytes(b"longer slice")
    changed = _line(tmp_path, study, 7)
    (tmp_path / "series" / "3.dcm").write_bytes(b"slice")
    assert before["size"] != changed["size"] != _line(tmp_path, study, 7)["size"]


def test_a_killed_renewal_leaves_no_summary(
    prepared_from: Callable[..., dict[str, object]], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, root = prepared_from(), tmp_path / "prepared"
    resave(scans / studies()[0].image)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("med3dvlm.datasets.store.write_records", killed)
        prepared_from()
    with pytest.raises(FileNotFoundError, match="no finished preparation"):
        PreparedData(root)
    assert prepared_from()["fingerprint"] != first["fingerprint"]


def test_ids_and_places_that_collide_are_refused(scans: Path, tmp_path: Path) -> None:
    processor = VolumeProcessor("m3d", size=SIZE)
    twice = [studies()[0], replace(studies()[1], id=f"./{studies()[0].id}")]
    with pytest.raises(ValueError, match="two studies have the id './case/0/Axial'; give each its own"):
        prepare(scans, twice, [], processor, tmp_path / "prepared")
    (scans / "volumes").mkdir()
    raw = scans / "volumes" / "a.npy"
    np.save(raw, np.random.default_rng(0).integers(0, 99, (10, 20, 30)))
    content = raw.read_bytes()
    with pytest.raises(ValueError, match="a.npy would be replaced by its own preparation; prepare into another folder"):
        prepare(scans, [Study("a", "a", "volumes/a.npy", "Report.", {}, "train", "test")], [], processor, scans / "volumes" / "..")
    assert raw.read_bytes() == content and not (tmp_path / "prepared").exists()


def test_lost_records_are_noticed(prepared_from: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    prepared_from()
    path = tmp_path / "prepared" / "studies.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="counts other studies than there are"):
        PreparedData(tmp_path / "prepared")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "colour"}, "question kind 'colour' .* is unknown"),
        ({"answer": "Up"}, "answer 'Up' .* is not among"),
        ({"kind": None}, "None"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_records(tmp_path / "questions.jsonl", questions())
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"questions.jsonl line 3: .*{message}"):
        read_questions(tmp_path / "questions.jsonl")


def test_other_settings_need_another_folder(prepared_from: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    first = prepared_from()
    with pytest.raises(ValueError, match="prepared was prepared with other settings .*; choose another folder or delete it"):
        prepared_from(size=(8, 16, 16))
    assert PreparedData(tmp_path / "prepared").summary == first


def test_bad_samples_are_listed_and_the_others_prepared(
    prepared_from: Callable[..., dict[str, object]], scans: Path, tmp_path: Path
) -> None:
    """Truncated, a text, absent, not a number: four of five, each with its reason."""
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
    assert len(list(root.rglob("*.npy"))) == 1 and not list(root.rglob("*.part"))

    with pytest.raises(ValueError, match=r"4 studies of .* the first is case/0/Axial: .*prepare again, or pass --exclude_failures true"):
        PreparedData(root)
    data = PreparedData(root, exclude_failures=True)
    assert [study.id for study in data.studies("train")] == ["case/4/Axial"]
    assert [question.study for question in data.questions("train")] == ["case/4/Axial"]

    for image in images[:4]:
        shutil.copy(images[4], image)
    assert prepared_from()["failures"] == 0 and len(PreparedData(root).studies("train")) == 5


def test_a_folder_that_cannot_be_written_stops_the_preparation(prepared_from: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    """Like a full disk it is no fault of the samples: none of them is listed."""
    root = tmp_path / "prepared"
    root.mkdir()
    (root / "volumes").touch()
    with pytest.raises(OSError, match="volumes"):
        prepared_from()
    assert not (root / "summary.json").exists() and not (root / "failures.jsonl").exists()
    (root / "volumes").unlink()
    assert prepared_from()["failures"] == 0


def test_a_lost_volume_is_named(prepared_from: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    prepared_from()
    data = PreparedData(tmp_path / "prepared")
    lost = data.studies("train")[2]
    volume_path(data.root, lost).unlink()
    with pytest.raises(FileNotFoundError, match="the prepared volume of case/2/Axial, is missing; run: med3dvlm prepare"):
        data.volume(lost)


def test_frozen_features_are_computed_once_and_whole(tmp_path: Path) -> None:
    path, calls = tmp_path / "features" / "x.safetensors", []

    def compute(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(list(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        values = torch.arange(rows.start, rows.stop, dtype=torch.float32)
        return values, values.outer(torch.ones(3))

    with pytest.raises(KeyboardInterrupt):
        frozen_features(path, 7, compute, batch_size=3)
    assert not path.exists()
    first, second = frozen_features(path, 7, compute, batch_size=3)
    assert torch.equal(first, torch.arange(7.0)) and second.shape == (7, 3)
    assert calls[2:] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(frozen_features(path, 7, compute)[0], first) and len(calls) == 5


def test_a_fingerprint_follows_weights_statistics_and_data() -> None:
    module = torch.nn.BatchNorm1d(3)
    names = {fingerprint(module, "a"), fingerprint(module, "b"), fingerprint(module, "a", "")}
    module.running_mean += 1
    names.add(fingerprint(module, "a"))
    module.weight.data[0] = 2
    names.add(fingerprint(module.half(), "a"))
    assert len(names) == 5 and fingerprint(module, "a") in names
