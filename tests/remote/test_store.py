"""Prepared data on a server: the same tensors in the same order as from the disk, whatever the server does, or one error."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from med3dvlm import VolumeProcessor, cli
from med3dvlm.datasets.ahead import AheadSampler, OwnRows, fetched_ahead
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData, volume_path
from med3dvlm.datasets.torch import PairDataset, load_volumes
from med3dvlm.programs import run
from med3dvlm.records import Records
from med3dvlm.remote import address
from med3dvlm.remote.cache import Cache
from med3dvlm.training.trainer import WholeBatches
from tests.datasets.five import SIZE, questions, studies, write_scans
from tests.remote.server import Server, serving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(address, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("five")
    prepare(write_scans(root / "scans"), Records(studies(), questions()), VolumeProcessor("m3d", size=SIZE), root / "data", workers=1)
    return root / "data"


@pytest.fixture
def server(five: Path) -> Iterator[Server]:
    with serving(five) as one:
        yield one


@pytest.fixture
def opened(server: Server, tmp_path: Path) -> PreparedData:
    return PreparedData(server.address, cache=Cache(tmp_path / "cache"))


def same(found: PreparedData, local: PreparedData) -> None:
    assert found.summary == local.summary and found.studies("train") == local.studies("train")
    for study in local.studies("train"):
        assert torch.equal(found.volume(study), local.volume(study))


def test_records_and_volumes_are_read_once(five: Path, server: Server, opened: PreparedData, tmp_path: Path) -> None:
    same(opened, PreparedData(five))
    same(pickle.loads(pickle.dumps(opened)), PreparedData(five))
    again = PreparedData(f"{server.address}/", cache=Cache(tmp_path / "cache"))
    same(again, PreparedData(five))
    asked = {path.lstrip("/"): times for path, times in server.asked.items()}
    assert asked == {name: 1 for name in asked} | {"summary.json": 2, "preprocessor_config.json": 2} and len(asked) == 5 + 1 + 5
    assert (again.root, again.folder) == (server.address, opened.folder) and opened.folder.parent == tmp_path / "cache"


def test_every_file_system_of_fsspec(five: Path, tmp_path: Path) -> None:
    """Including one that is not asynchronous."""
    memory = fsspec.filesystem("memory")
    memory.put(str(five), "/bucket/data", recursive=True)
    same(PreparedData("memory://bucket/data", cache=Cache(tmp_path)), PreparedData(five))


def test_masks_and_volumes_of_a_prepared_data_set(prepared: Path, tmp_path: Path) -> None:
    with serving(prepared) as server:
        found, local = PreparedData(server.address, cache=Cache(tmp_path)), PreparedData(prepared)
        few = local.studies("train")[:3]
        assert any(local.mask_names(study) for study in few)
        assert torch.equal(load_volumes(found, few), load_volumes(local, few))
        for study in few:
            assert torch.equal(found.masks(study), local.masks(study))


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_rows_equal_those_of_the_disk(five: Path, opened: PreparedData, server: Server, workers: int) -> None:
    """Forked workers of a process that has used the file system read two epochs; each of two ranks reads its own batches."""

    def epochs(data: PreparedData) -> list[dict[str, torch.Tensor]]:
        rows = PairDataset(data, "train", seed=3)
        sampler = fetched_ahead(WholeBatches(len(rows), 2, seed=1), rows, OwnRows(2, 1, 0), 1)
        assert isinstance(sampler, AheadSampler) == (data.remote is not None)
        loader = DataLoader(rows, 2, sampler=sampler, num_workers=workers, multiprocessing_context="fork" if workers else None)
        batches = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches += list(loader)
        if data.remote is not None:
            sampler.fetching.close()
        return batches

    found, local = epochs(opened), epochs(PreparedData(five))
    assert [batch["id"] for batch in found] == [batch["id"] for batch in local]
    assert all(torch.equal(one["volume"], other["volume"]) for one, other in zip(found, local, strict=True))
    assert all(times == 1 for path, times in server.asked.items() if "volumes" in path)


def test_volumes_are_fetched_ahead(five: Path, opened: PreparedData, server: Server) -> None:
    """The second of two ranks requests its first five rows of the epoch, in order, before any is read."""
    rows = PairDataset(opened, "train")
    sampler = AheadSampler(WholeBatches(5, 5, seed=2), rows, OwnRows(1, 2, 1), ahead=2)
    order = list(WholeBatches(5, 5, seed=2))
    assert list(sampler) == order
    for _ in range(1000):
        if sum("volumes" in path for path in server.asked) == 2:
            break
        Event().wait(0.01)
    sampler.fetching.close()
    wanted = {f"/volumes/{rows.studies[row].id}.safetensors" for row in order[1::2]}
    assert {path for path in server.asked if "volumes" in path} == wanted


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "short", "flipped", "slow"])
def test_temporary_errors_are_retried(five: Path, server: Server, tmp_path: Path, fault: object, caplog: pytest.LogCaptureFixture) -> None:
    data = PreparedData(server.address, cache=Cache(tmp_path))
    assert data.remote is not None
    data.remote.address.patience = 0.1
    study = data.studies("train")[0]
    server.faults[f"{study.id}.safetensors"] = [fault, fault]
    assert torch.equal(data.volume(study), PreparedData(five).volume(study))
    assert server.asked[f"/volumes/{study.id}.safetensors"] == 3 and caplog.text.count("trying again") == 2
    assert not list(tmp_path.rglob("*.part"))


def test_permanent_errors(server: Server, tmp_path: Path, opened: PreparedData, five: Path) -> None:
    first, second, third, fourth, *_ = opened.studies("train")
    for study, faults in ((first, [503] * 8), (second, ["short"] * 8), (third, [404]), (fourth, [403])):
        server.faults[f"{study.id}.safetensors"] = list(faults)
    for study, kind, sentence in (
        (first, OSError, "status 503; check address and network, and run the command again"),
        (second, OSError, "it arrived damaged; check"),
        (third, FileNotFoundError, "Axial.safetensors is not there; check the address"),
        (fourth, PermissionError, "Axial.safetensors: access is refused; check the rights, and the credentials"),
    ):
        with pytest.raises(kind, match=sentence):
            opened.volume(study)
    assert not any(server.faults.values()) and server.asked[f"/volumes/{third.id}.safetensors"] == 1


def open_at(place: str, folder: Path) -> PreparedData:
    return PreparedData(place, cache=Cache(folder))


def test_a_wrong_address_is_refused_at_the_start(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no finished preparation \(no summary.json\); check the address"):
        open_at(f"{server.address}/nowhere", tmp_path)
    server.faults["summary.json"] = [401]
    with pytest.raises(PermissionError, match="summary.json: access is refused; check the rights"):
        open_at(server.address, tmp_path)
    server.faults["summary.json"] = [503] * 4
    with pytest.raises(OSError, match="summary.json: the server answers with status 503; check address and network"):
        open_at(server.address, tmp_path)
    with pytest.raises(OSError, match="the connection fails .*; check address and network"):
        open_at("http://127.0.0.1:9/data", tmp_path)
    with pytest.raises(
        ValueError, match="s4://bucket: s4:// is not a kind of address that fsspec knows; write s3://, gs://, https:// or a path"
    ):
        open_at("s4://bucket", tmp_path)
    for secret in ("https://me:word@host/data", "https://host/data?sig=word"):
        with pytest.raises(ValueError, match="https://host/data comes with a password, a query or a fragment") as caught:
            open_at(secret, tmp_path)
        assert "word=" not in str(caught.value) and ":word" not in str(caught.value)


def test_inconsistent_records_are_refused(five: Path, tmp_path: Path) -> None:
    shutil.copytree(five, tmp_path / "data")
    with (tmp_path / "data" / "studies.jsonl").open("a") as file:
        file.write("\n")
    with serving(tmp_path / "data") as server, pytest.raises(OSError, match="studies.jsonl: it is not the file that was written with"):
        open_at(server.address, tmp_path / "cache")


def test_a_damaged_processor_is_named_by_its_address(five: Path, tmp_path: Path) -> None:
    shutil.copytree(five, tmp_path / "data")
    (tmp_path / "data" / "preprocessor_config.json").write_text('{"size": "ab"}')
    with serving(tmp_path / "data") as server:
        with pytest.raises(ValueError, match=f"^{server.address}/preprocessor_config.json does not hold .*size is ab but") as caught:
            open_at(server.address, tmp_path / "cache")
        assert str(tmp_path) not in str(caught.value)
        shutil.copy(five / "preprocessor_config.json", tmp_path / "data")  # mended there
        same(open_at(server.address, tmp_path / "cache"), PreparedData(five))
    (tmp_path / "data" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError):  # which is not a damaged one
        PreparedData(tmp_path / "data")


def test_data_prepared_again_are_fetched_again(five: Path, tmp_path: Path) -> None:
    """Records and volumes keep their names and address."""
    shutil.copytree(five, tmp_path / "data")
    with serving(tmp_path / "data") as server:
        same(open_at(server.address, tmp_path / "cache"), PreparedData(five))
        scans = write_scans(tmp_path / "scans")
        reversed_ids = [one.id for one in studies()][::-1]
        for one, image in zip(reversed_ids, [study.image for study in studies()], strict=True):
            shutil.copy(five.parent / "scans" / f"{one}.nii.gz", scans / image)
        prepare(scans, Records(studies(), questions()), VolumeProcessor("m3d", size=SIZE), tmp_path / "data", workers=1)
        same(open_at(server.address, tmp_path / "cache"), PreparedData(tmp_path / "data"))


def test_a_damaged_or_deleted_copy_is_fetched_again(five: Path, opened: PreparedData, server: Server) -> None:
    local = PreparedData(five)
    first, second, *_ = local.studies("train")
    same(opened, local)
    path = volume_path(opened.folder, first)
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    volume_path(opened.folder, second).unlink()
    same(opened, local)
    assert [server.asked[f"/volumes/{study.id}.safetensors"] for study in local.studies("train")] == [2, 2, 1, 1, 1]


def test_a_small_cache_keeps_files_in_use(five: Path, server: Server, tmp_path: Path) -> None:
    file_size = volume_path(five, studies()[0]).stat().st_size
    data = PreparedData(server.address, cache=Cache(tmp_path, str(3 * file_size)))
    for _ in range(3):
        same(data, PreparedData(five))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * file_size
    data.require_room(3)
    with pytest.raises(ValueError, match="--data-cache-size is .*, but the volumes that are read at a time take .*; pass a larger one"):
        data.require_room(20)
    with pytest.raises(ValueError, match="--data-cache-size is 2KB"):
        PreparedData(server.address, cache=Cache(tmp_path, "2KB"))


def test_an_error_in_a_worker_of_the_loader(opened: PreparedData, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults[".safetensors"] = [403] * 5
    loader = DataLoader(PairDataset(opened, "train"), 2, num_workers=1, multiprocessing_context="fork")
    assert run(lambda _: list(loader) and None, [], "program") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"program: error: {server.address}/volumes/case/") and said.count("\n") == 1 and "access is refused" in said


def test_a_split_file_beside_the_data(five: Path, tmp_path: Path) -> None:
    shutil.copytree(five, tmp_path / "data")
    (tmp_path / "data" / "split.json").write_text(json.dumps({"test": [studies()[1].id]}))
    with serving(tmp_path / "data") as server:
        data = PreparedData(server.address, split_file=f"{server.address}/split.json", cache=Cache(tmp_path / "cache"))
    assert [study.id for study in data.studies("test")] == [studies()[1].id]


def test_an_audit_finds_what_it_finds_on_the_disk(five: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-cache", str(tmp_path / "cache"), "--workers", "1"]
    assert cli.main(["audit", server.address, *words]) == 2
    assert "an audit is written to a folder of this machine" in capsys.readouterr().err
    for data, out in ((server.address, "there"), (str(five), "here")):
        assert cli.main(["audit", data, "--out", str(tmp_path / out), *words]) == 0
    here, there = ((tmp_path / out / "audit.json").read_text() for out in ("here", "there"))
    assert here == there and json.loads(here)["data"] == PreparedData(five).summary["fingerprint"]
