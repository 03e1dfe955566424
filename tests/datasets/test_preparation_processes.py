"""Preparation by several processes and jobs, some of which are killed, equals preparation by one."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from med3dvlm import VolumeProcessor
from med3dvlm.datasets import m3d
from med3dvlm.datasets.preparation import prepare, prepare_shard
from med3dvlm.datasets.store import PreparedData
from med3dvlm.records import Records
from tests.datasets.five import abandon, times, tree


def prepare_phantoms(phantoms: Path, destination: Path, workers: int = 2, **options: Any) -> dict[str, Any]:
    splits = [m3d.read(phantoms, split) for split in m3d.splits(phantoms)]
    studies, questions = ([record for split in splits for record in split[part]] for part in (0, 1))
    processor = VolumeProcessor("m3d", size=(48, 64, 56))
    if "shard" in options:
        return prepare_shard(phantoms, studies, processor, destination, workers=workers, **options)
    return prepare(phantoms, Records(studies, questions), processor, destination, workers, **options)


@pytest.fixture(scope="module")
def uninterrupted(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("uninterrupted") / "store"
    prepare_phantoms(phantoms, destination)
    return destination


@pytest.mark.parametrize("victim", ["all", "the program", "a worker"])
def test_a_killed_preparation_continues(phantoms: Path, uninterrupted: Path, tmp_path: Path, victim: str) -> None:
    """After a kill at the third of 28 volumes no process stays, the three are kept, and the result equals an uninterrupted run."""
    root = tmp_path / "store"

    def run() -> None:
        os.setsid()
        prepare_phantoms(phantoms, root)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 120
    while len(times(root, "*.safetensors")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if victim == "the program" else workers[0].pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not (root / "summary.json").exists()
    (root / "volumes" / ".0123.part").write_bytes(b"half a volume")
    abandon(root)
    done = times(root, "*.safetensors")
    assert 3 <= len(done) < 28
    prepare_phantoms(phantoms, root)
    assert tree(root) == tree(uninterrupted)
    assert done.items() <= times(root).items()


def test_concurrent_shards_equal_one_run(phantoms: Path, uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        parts = [pool.submit(prepare_phantoms, phantoms, root, 1, shard=(part, 3)) for part in (1, 2, 3)]
        results = [part.result() for part in parts]
    assert [result["shard"] for result in results] == ["1/3", "2/3", "3/3"] and [result["made"] for result in results] == [10, 9, 9]
    assert [result["failures"] for result in results] == [[], [], []]
    with pytest.raises(FileNotFoundError, match="no finished preparation"):
        PreparedData(root)
    done = times(root, "*.safetensors")
    assert len(done) == 28
    prepare_phantoms(phantoms, root)
    assert tree(root) == tree(uninterrupted) and done.items() <= times(root).items()


def test_missing_shards_are_prepared_by_the_final_run(phantoms: Path, uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert prepare_phantoms(phantoms, root, shard=(2, 4))["made"] == 7
    assert prepare_phantoms(phantoms, root, shard=(2, 4))["made"] == 0
    prepare_phantoms(phantoms, root)
    assert tree(root) == tree(uninterrupted)
    for wrong in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"no shard {wrong[0]}/4; they count from 1/4 to 4/4"):
            prepare_phantoms(phantoms, root, shard=wrong)


def test_the_result_does_not_depend_on_the_number_of_workers(phantoms: Path, uninterrupted: Path, tmp_path: Path) -> None:
    prepare_phantoms(phantoms, tmp_path / "store", workers=1)
    assert tree(tmp_path / "store") == tree(uninterrupted)
