"""Prepared data: volumes equal to those of VolumeProcessor bit for bit, and lost or damaged files named."""

import json
import pickle
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from med3dvlm import VolumeProcessor
from med3dvlm.datasets import features as features_module
from med3dvlm.datasets import m3d
from med3dvlm.datasets.features import SharedFeatures, fingerprint, frozen_features
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData, volume_path
from med3dvlm.files import write_lines
from med3dvlm.records import Records, fields_of, read_questions
from tests.datasets.five import SIZE, questions, studies, write_scans


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("five")
    prepare(write_scans(root / "scans"), Records(studies(), questions()), VolumeProcessor("m3d", size=SIZE), root / "store", workers=1)
    return root / "store"


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """Five prepared volumes that a test may damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


def test_a_prepared_volume_is_the_processors(phantoms: Path, prepared: Path) -> None:
    """Phantoms of every plane are equal bit for bit, as stored and as given to the trainer."""
    data = PreparedData(prepared)
    assert data.processor.size == (32, 64, 64)
    for study in [*data.studies("train")[:4], *data.studies("test")]:
        volume = data.volume(study)
        assert volume.dtype == torch.uint8 and volume.shape == (1, 32, 64, 64)
        assert torch.equal(data.processor.dequantize(volume), data.processor(phantoms / study.image)["pixel_values"][0])


def test_records_round_trip(phantoms: Path, prepared: Path) -> None:
    data = PreparedData(prepared)
    for split in m3d.SPLITS:
        assert (data.studies(split), data.questions(split)) == m3d.read(phantoms, split)
    assert data.summary["splits"] == {"train": 22, "validation": 1, "test": 5}
    with pytest.raises(ValueError, match="no studies of split 'val'; it has .*validation"):
        data.studies("val")


@pytest.mark.parametrize("name", ["studies.jsonl", "questions.jsonl", "index.jsonl", "failures.jsonl"])
def test_lost_or_changed_records_are_noticed(store: Path, name: str) -> None:
    path = store / name
    path.write_bytes(path.read_bytes()[:-5] if path.stat().st_size else b"{}\n")
    with pytest.raises(ValueError, match=f"{name} is not the file that was written with summary.json; run: med3dvlm prepare"):
        PreparedData(store)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is not the file"):
        PreparedData(store)


def test_a_lost_volume_is_named(store: Path) -> None:
    data = PreparedData(store)
    lost = data.studies("train")[2]
    volume_path(data.root, lost).unlink()
    with pytest.raises(FileNotFoundError, match="Axial.safetensors, a prepared volume, is missing; run: med3dvlm prepare"):
        data.volume(lost)


# Length of the header, header, first, middle and last voxel; the file is eight bytes, the header and the voxels.
@pytest.mark.parametrize("place", [1, 9, -8 * 16 * 24, -1000, -1])
def test_a_flipped_bit_is_found(store: Path, place: int) -> None:
    data = PreparedData(store)
    damaged, *others = data.studies("train")
    path = volume_path(store, damaged)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="0/Axial.safetensors, a prepared volume, (is damaged|does not have the checksum).*--verify"):
        data.volume(damaged)
    assert all(data.volume(study).shape == (1, *SIZE) for study in others)


def test_truncated_and_exchanged_volumes_are_named(store: Path) -> None:
    data = PreparedData(store)
    first, second, *_ = data.studies("train")
    volume_path(store, first).write_bytes(volume_path(store, first).read_bytes()[:-1])
    shutil.copy(volume_path(store, data.studies("train")[2]), volume_path(store, second))
    with pytest.raises(ValueError, match="is damaged"):
        data.volume(first)
    with pytest.raises(ValueError, match="does not have the checksum"):
        data.volume(second)


def test_workers_share_a_store_without_open_files(store: Path) -> None:
    """Workers are forked by a DataLoader or receive the pickled store; volumes are read repeatedly and no file stays open."""
    data = PreparedData(store)
    studies = data.studies("train")
    expected = torch.stack([data.volume(study) for study in studies])
    copy = pickle.loads(pickle.dumps(data))
    open_files = psutil.Process().num_fds()
    for _ in range(20):
        assert torch.equal(torch.stack([copy.volume(study) for study in studies]), expected)
    assert psutil.Process().num_fds() == open_files
    loader = DataLoader(Volumes(data), batch_size=5, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(next(iter(loader)), expected)


class Volumes(Dataset[torch.Tensor]):
    def __init__(self, data: PreparedData) -> None:
        self.data, self.studies = data, data.studies("train")

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data.volume(self.studies[index])


def test_hounsfield_units_are_kept_as_int16(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans")
    processor = VolumeProcessor("ct_rate", size=(24, 36, 44))  # of 20 x 32 x 40 voxels: padded with air
    prepare(scans, Records(studies(), questions()), processor, tmp_path / "store", workers=1)
    data = PreparedData(tmp_path / "store")
    for study in data.studies("train"):
        volume = data.volume(study)
        assert volume.dtype == torch.int16 and volume.min() == -1000 < 0 < volume.max()
        assert torch.equal(data.processor.dequantize(volume), processor(scans / study.image)["pixel_values"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "colour"}, "question kind 'colour' .* is unknown"),
        ({"answer": "Up"}, "answer 'Up' .* is not among"),
        ({"kind": None}, "None"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_lines(tmp_path / "questions.jsonl", map(fields_of, questions()))
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"questions.jsonl line 3: .*{message}"):
        read_questions(tmp_path / "questions.jsonl")


def test_frozen_features_are_computed_once_and_completely(tmp_path: Path) -> None:
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


def test_shared_features_equal_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes compute half of the files each, and a worker reads both; a lost file is computed again. Types are kept."""
    table = torch.randn(150, 3, 2).bfloat16()
    calls: list[int] = []

    def compute(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        calls.extend(rows)
        return table[rows.start : rows.stop], table[rows.start : rows.stop, 0].float()

    monkeypatch.setattr(features_module, "sharing", lambda folder: [0, 1])
    monkeypatch.setattr(features_module, "rank_and_count", lambda: (1, 2))
    with pytest.raises(FileNotFoundError, match="00000.safetensors, which another process"):
        SharedFeatures(tmp_path / "x", 150, compute, batch_size=4)
    second = sorted(calls)
    monkeypatch.setattr(features_module, "rank_and_count", lambda: (0, 2))
    features = SharedFeatures(tmp_path / "x", 150, compute, batch_size=4)
    assert 60 < len(second) < 90 and sorted(calls) == list(range(150))
    features[7]
    read = pickle.loads(pickle.dumps(features))
    assert len(read) == 150 and all(torch.equal(read[row][0], table[row]) for row in range(150))
    whole = read.whole()
    assert whole[0].dtype == torch.bfloat16 and torch.equal(whole[0], table) and torch.equal(whole[1], table[:, 0].float())
    (tmp_path / "x" / "00001.safetensors").unlink()
    calls.clear()
    monkeypatch.undo()
    SharedFeatures(tmp_path / "x", 150, compute, batch_size=4)
    assert calls == list(range(4, 8))


def test_a_fingerprint_follows_weights_statistics_and_data() -> None:
    module = torch.nn.BatchNorm1d(3)
    names = {fingerprint(module, "a"), fingerprint(module, "b"), fingerprint(module, "a", "")}
    module.running_mean += 1
    names.add(fingerprint(module, "a"))
    module.weight.data[0] = 2
    names.add(fingerprint(module.half(), "a"))
    assert len(names) == 5 and fingerprint(module, "a") in names
