"""The cache of a node: each file is fetched once, the folder keeps its limit, and killed processes do not block others."""

import argparse
import errno
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from med3dvlm.remote.cache import Cache, add_cache, parse_bytes


def write(size: int, path: Path) -> None:
    path.write_bytes(b"x" * size)


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.rglob("volumes/*"))


@pytest.mark.parametrize(("text", "size"), [("50GB", 50e9), ("1.5 tb", 1.5e12), ("800MB", 8e8), ("7K", 7000), ("123", 123)])
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == int(size)
    for wrong in ("", "GB", "-1GB", "0", "5 GiB", "many"):
        with pytest.raises(ValueError, match="is no size; write a number and a unit, as 50GB"):
            parse_bytes(wrong)


def test_the_least_recently_used_files_are_deleted_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "1000")
    for number in range(10):
        cache.get(f"s/volumes/{number}", lambda path: write(100, path), 100)
        os.utime(tmp_path / "s" / "volumes" / str(number), (number, number))
    assert len(names(cache)) == 10
    assert cache.get("s/volumes/0", pytest.fail) == tmp_path / "s" / "volumes" / "0"  # which is used now
    cache.get("s/volumes/new", lambda path: write(150, path), 100)
    assert "0" in names(cache) and "new" in names(cache) and "1" not in names(cache)
    for number in range(100):
        cache.get(f"s/volumes/more {number}", lambda path: write(90, path), 100)
        assert sum(path.stat().st_size for path in tmp_path.rglob("volumes/*")) <= 1000
    (tmp_path / "used").unlink()  # counted anew
    cache.get("s/volumes/last", lambda path: write(90, path), 100)
    assert int((tmp_path / "used").read_text()) == sum(path.stat().st_size for path in tmp_path.rglob("volumes/*"))


def test_features_are_results_that_the_limit_does_not_cover(tmp_path: Path) -> None:
    (tmp_path / "s" / "features").mkdir(parents=True)
    write(5000, tmp_path / "s" / "features" / "image")
    cache = Cache(tmp_path, "1000")
    for number in range(20):
        cache.get(f"s/volumes/{number}", lambda path: write(100, path), 100)
    assert (tmp_path / "s" / "features" / "image").stat().st_size == 5000
    assert int((tmp_path / "used").read_text()) == sum(path.stat().st_size for path in tmp_path.rglob("volumes/*")) >= 900
    parser = argparse.ArgumentParser()
    add_cache(parser)
    assert "features that a training keeps there, are not counted" in " ".join(parser.format_help().split())


def fetch_all(folder: Path, order: int) -> None:
    def fetch(path: Path) -> None:
        with (folder / "fetched").open("a") as file:
            file.write(f"{path.parent.name}\n")
        time.sleep(0.005)
        write(100, path)

    cache = Cache(folder, "1MB")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: cache.get(f"s/volumes/{number}/x", fetch, 100), range(0, 20)[::order]))


def test_processes_and_threads_fetch_once(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=fetch_all, args=(tmp_path, order)) for order in (1, -1, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "fetched").read_text().split(), key=int) == [str(number) for number in range(20)]
    assert (tmp_path / "used").read_text() == "2000"


def killed_within(folder: Path) -> None:
    def fetch(path: Path) -> None:
        write(50, path)
        os._exit(9)

    Cache(folder, "1000").get("s/volumes/1", fetch, 600)


def test_a_killed_process_frees_its_lock_and_its_room(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_within, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and (tmp_path / "used").read_text() == "600"
    (left,) = tmp_path.rglob("*.part")
    cache = Cache(tmp_path, "1000")
    cache.get("s/volumes/1", lambda path: write(700, path), 700)  # for which files are counted
    assert names(cache) == [left.name, "1"] and (tmp_path / "used").read_text() == "750"
    os.utime(left, (1, 1))
    cache.get("s/volumes/2", lambda path: write(280, path), 280)
    assert names(cache) == ["2"]


def test_a_full_disk_is_an_error_unless_the_cache_can_be_cleared(tmp_path: Path) -> None:
    cache, tries = Cache(tmp_path, "1000"), 0
    for number in range(5):
        cache.get(f"s/volumes/{number}", lambda path: write(100, path), 100)

    def full(path: Path) -> None:
        nonlocal tries
        tries += 1
        write(10, path)
        if tries < 2 or len(names(cache)) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    cache.get("s/volumes/new", full, 100)
    assert tries == 2 and len(names(cache)) == 5

    def always(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match="the cache of the data, lies on a disk that is full; free some space, or name another by --data-cache"
    ):
        cache.get("s/volumes/newer", always, 100)
    assert not list(tmp_path.rglob("*.part"))


def test_a_too_small_cache_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--data-cache-size is 1MB, but the volumes that are read at a time take 2 MB; pass a larger one"):
        Cache(tmp_path, "1MB").require(10**9, 2 * 10**6)
    with pytest.raises(ValueError, match="has .* GB of disk, but --data-cache-size is 5000TB; pass a smaller one"):
        Cache(tmp_path, "5000TB").require(10**18, 1)
    Cache(tmp_path, "5000TB").require(10**6, 1)  # all that there is fits
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Cache(tmp_path / "file" / "in").require(1, 1)
