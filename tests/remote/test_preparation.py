"""`prepare` from an address and into one: the bytes of a preparation on one disk, nothing half-written or left behind, or one sentence."""

import errno
import multiprocessing
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from med3dvlm import cli
from med3dvlm.datasets import claims
from med3dvlm.datasets.store import PreparedData
from med3dvlm.remote import address
from med3dvlm.remote.cache import Cache
from tests.datasets.test_engines import tree
from tests.remote.server import Server, serving

WHEN = 1_700_000_000  # a whole second: HTTP tells no others
FORKS = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between tries, and nobody asks of the files of a disk what a copy elsewhere cannot have."""
    monkeypatch.setattr(address, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("med3dvlm.datasets.study_volume.states", untouched)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")  # the cache is named


def untouched(root: Path, names: list[str], contents: bool = False) -> str:
    from med3dvlm.datasets.sources import states

    return states(root, names, contents) if contents else "of this disk"


def write_table(root: Path) -> Path:
    """A table with a file, a folder of slices, a header with its voxels elsewhere, masks, and a scan that is missing."""
    random = np.random.default_rng(0)
    (root / "scans" / "slices").mkdir(parents=True)
    (root / "masks").mkdir()
    voxels = random.integers(-1000, 400, (10, 20, 30)).astype(np.int16)
    np.save(root / "scans" / "a b.npy", voxels)
    np.save(root / "masks" / "a.npy", (voxels > 0).astype(np.uint8))
    (root / "scans" / "c.raw").write_bytes(voxels.tobytes())
    (root / "scans" / "head.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementSpacing = 1 1 3\nElementType = MET_SHORT\nElementDataFile = c.raw\n"
    )
    (root / "table.csv").write_text(
        "image,report,split,unit,mask:bright\nscans/a b.npy,One.,train,arbitrary,masks/a.npy\nscans/head.mhd,Two.,train,,\n"
        "scans/gone.npy,Three.,test,,\n"
    )
    for path in (root, *root.rglob("*")):
        os.utime(path, (WHEN, WHEN))
    return root


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table")


@pytest.fixture
def server(table: Path) -> Iterator[Server]:
    with serving(table) as one:
        one.lists = True
        yield one


def prepare(source: object, destination: object, cache: Path, *options: str) -> int:
    words = ["prepare", "table", str(source), str(destination), "--size", "8,16,24", "--workers", "1", "--data-cache", str(cache)]
    return cli.main([*words, *options])


def same(found: dict[str, bytes], local: dict[str, bytes], source: str, root: Path) -> None:
    """All bytes but the state that the source's own file system gives, and the source's name in sentences."""
    assert found.keys() == local.keys()
    for name in found:
        if not name.endswith((".safetensors", "index.jsonl", "summary.json")):
            assert found[name].replace(source.encode(), str(root).encode()) == local[name], name


def test_http_to_a_disk_as_if_it_were_one(server: Server, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med3dvlm.datasets.sources.state_of_all", lambda files: "of this disk")
    assert prepare(table, tmp_path / "local", tmp_path / "cache") == 1  # one scan is missing
    server.faults["/scans/a%20b.npy"] = [503, "cut"]
    assert prepare(server.address, tmp_path / "out", tmp_path / "cache") == 1
    found, local = tree(tmp_path / "out"), tree(tmp_path / "local")
    same(found, local, server.address, table)
    assert [found[name] for name in found if name.endswith(".safetensors")] == [
        local[name] for name in found if name.endswith(".safetensors")
    ]
    assert found["index.jsonl"] == local["index.jsonl"] and len([name for name in found if name.endswith(".safetensors")]) == 2
    assert not list((tmp_path / "cache" / "scans").iterdir())
    before = server.asked.copy()
    assert prepare(server.address, tmp_path / "out", tmp_path / "cache") == 1
    assert server.asked["/scans/a%20b.npy"] == before["/scans/a%20b.npy"] and server.asked["/scans/c.raw"] == before["/scans/c.raw"]


def test_into_an_address_and_again(table: Path, tmp_path: Path) -> None:
    """file://, whose files are written aside and renamed; a second run makes what has changed alone."""
    assert prepare(table, tmp_path / "local", tmp_path / "cache") == 1
    place = f"file://{tmp_path / 'out'}"
    assert prepare(f"file://{table}", place, tmp_path / "cache") == 1
    found = tree(tmp_path / "out")
    same(found, tree(tmp_path / "local"), f"file://{table}", table)
    local, remote = PreparedData(tmp_path / "local", True), PreparedData(place, True, cache=Cache(tmp_path / "data"))
    assert remote.summary["fingerprint"] == local.summary["fingerprint"] and not [name for name in found if ".part" in name]
    volumes = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    (tmp_path / "out" / "summary.json").unlink()
    os.utime(table / "scans" / "c.raw", (WHEN + 5, WHEN + 5))  # which no other name than the header's tells
    os.utime(table / "scans" / "head.mhd", (WHEN + 5, WHEN + 5))
    assert prepare(f"file://{table}", place, tmp_path / "cache", "--verify") == 1
    changed = {path.name for path, time in volumes.items() if path.stat().st_mtime_ns != time}
    assert changed == {"head.safetensors"} and not list((tmp_path / "cache" / "scans").iterdir())


def job(table: Path, root: Path) -> None:
    os._exit(prepare(f"file://{table}", f"file://{root / 'out'}", root / "cache", "--shard", "auto"))


def test_jobs_claim_at_an_address(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIMED", 1)
    monkeypatch.setattr(claims, "WAIT", 0.02)
    jobs = [FORKS.Process(target=job, args=(table, tmp_path)) for _ in range(2)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert sorted(each.exitcode or 0 for each in jobs) == [0, 1]  # the one that finished tells of the missing scan
    assert prepare(table, tmp_path / "local", tmp_path / "cache") == 1
    same(tree(tmp_path / "out"), tree(tmp_path / "local"), f"file://{table}", table)
    place = claims.Bucket(address_of(tmp_path), ".claims/x")
    assert place.create("0", b"") and not place.create("0", b"") and place.names() == ["0"]
    before = place.state("0")
    place.renew("0")
    assert before is not None and place.state("0") not in (None, before) and place.state("1") is None
    first = claims.Claims(place, stale=-1.0)  # a claim is stale at once
    assert first.take("0") and not claims.Claims(place).take("0")
    assert [path.name for path in (tmp_path / "out" / ".claims" / "x").iterdir()] == ["0"]


class SlowPlace(claims.Folder):
    """Renewing a claim takes until it is deleted, if that happens meanwhile."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.renewing, self.deleted = threading.Event(), threading.Event()

    def renew(self, name: str) -> None:
        self.renewing.set()
        self.deleted.wait(0.1)
        (self.root / name).touch()

    def remove(self, name: str) -> None:
        super().remove(name)
        self.deleted.set()


def test_a_claim_that_is_given_up_is_not_written_again(tmp_path: Path) -> None:
    place = SlowPlace(tmp_path)
    mine = claims.Claims(place, stale=0.01)
    with pytest.raises(KeyError), mine.held(["0"]):
        assert mine.take("0") and place.renewing.wait(10)
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert place.state("0") is None  # as where another process, which has finished, has deleted all


def address_of(root: Path) -> "address.Address":
    from med3dvlm.remote.files import Files

    return Files(f"file://{root / 'out'}")


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert prepare(*words) == 2  # type: ignore[arg-type]
    return capsys.readouterr().err


def test_wrong_places_are_one_sentence_before_anything(
    server: Server, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    assert "can be read but not written; write to s3://, gs:// or a folder" in error_of(capsys, table, server.address, cache)
    assert "memory of this process" in error_of(capsys, table, "memory://out", cache)
    assert "holds no files; check the address" in error_of(capsys, "memory://nothing", out, cache)
    assert "--data-cache-size is 1KB" in error_of(capsys, server.address, out, cache, "--data-cache-size", "1KB")
    server.lists = False
    assert "holds no files; its server must give a list" in error_of(capsys, server.address, out, cache)
    server.lists, server.faults["/"] = True, [403]
    assert f"{server.address}: access is refused" in error_of(capsys, server.address, out, cache)
    for operation in ("pipe_file", "rm_file"):
        with monkeypatch.context() as patch:
            patch.setattr(fsspec.implementations.local.LocalFileSystem, operation, refused)
            assert "access is refused; check the rights" in error_of(capsys, table, f"file://{out}", cache)
    address_of(tmp_path).require_writable()
    assert not list(out.iterdir())  # a file that could not be deleted is gone with the next
    full = fsspec.implementations.local.LocalFileSystem.get_file

    def fetched(self: object, source: str, path: str, *rest: object, **more: object) -> None:
        if source.endswith(".npy"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        full(self, source, path, *rest, **more)

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "get_file", fetched)
    assert f"{cache}/scans, the cache of the data, lies on a disk that is full" in error_of(capsys, f"file://{table}", out, cache)
    (table / "table.csv").write_text("image,report,colour\na,b,c\n")
    message = error_of(capsys, server.address, tmp_path / "other", cache)
    assert message.startswith(f"med3dvlm: error: {server.address}/table.csv has the unknown columns")
    assert not list(tmp_path.rglob("summary.json")) and not list((cache / "scans").iterdir())


def test_a_damaged_processor_is_named_by_its_address(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    for content, reason in (
        (b"{", "it is no JSON object"),
        (b"[]", "it is no JSON object"),
        (b'{"recipe": "x"}', "Unknown recipe 'x'; known are"),
    ):
        (tmp_path / "out" / "preprocessor_config.json").write_bytes(content)
        for place in (f"file://{tmp_path / 'out'}", str(tmp_path / "out")):
            message = error_of(capsys, table, place, tmp_path / "cache")
            assert message.startswith(
                f"med3dvlm: error: {place}/preprocessor_config.json does not hold the settings of a preprocessing ({reason}"
            )
            assert message.endswith("; copy it anew, or delete it and run: med3dvlm prepare\n") and str(tmp_path / "cache") not in message


def refused(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_an_upload_that_fails_leaves_nothing(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written under a final name; what a killed process has left here is deleted."""
    from med3dvlm.datasets.outputs import open_volumes
    from med3dvlm.remote.files import Files

    def half(_: object, path: str, place: str, **__: object) -> None:
        Path(place).write_bytes(Path(path).read_bytes()[:5])
        raise ConnectionResetError

    files = Files(f"file://{tmp_path / 'out'}")
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", half)
    with pytest.raises(OSError, match=r"out/b/volume: the connection fails \(.*\); check address and network, and run the command again"):
        files.put(table / "table.csv", "b/volume")
    left = tmp_path / "cache" / "scans" / ".a.part"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    open_volumes(files.address, Cache(tmp_path / "cache")).sweep()
    assert not left.exists() and not list((tmp_path / "out" / "b").iterdir()) and stat.S_ISDIR((tmp_path / "out").stat().st_mode)
