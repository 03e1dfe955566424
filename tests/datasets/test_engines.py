"""Preparation by a Ray cluster and by jobs that claim their work gives the bytes of one process, also when one dies."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med3dvlm import VolumeProcessor
from med3dvlm.datasets import claims, engines, m3d
from med3dvlm.datasets.claims import Claims, prepare_claimed
from med3dvlm.datasets.engines import open_engine
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import PART
from med3dvlm.records import Records
from med3dvlm.search import CaseIndex

SIZE = (8, 16, 16)
FORKS = multiprocessing.get_context("fork")


def arguments(phantoms: Path, root: Path) -> tuple[Any, ...]:
    splits = [m3d.read(phantoms, split) for split in m3d.SPLITS]
    studies, questions = ([record for split in splits for record in split[part]] for part in (0, 1))
    return phantoms, Records(studies, questions), VolumeProcessor("m3d", size=SIZE), root


def tree(root: Path) -> dict[str, bytes]:
    """The files of a store, without claims and without what a killed process was writing, which a later preparation removes."""
    files = ((path.relative_to(root), path) for path in root.rglob("*") if path.is_file() and path.suffix != PART)
    return {str(name): path.read_bytes() for name, path in files if name.parts[0] != ".claims"}


@pytest.fixture(scope="module")
def alone(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    root = tmp_path_factory.mktemp("alone")
    prepare(*arguments(phantoms, root), workers=1)
    return tree(root)


@pytest.fixture
def small_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIMED", 3)
    monkeypatch.setattr(claims, "WAIT", 0.02)


def claim(phantoms: Path, root: Path, stale: float, die: bool = False) -> None:
    if die:
        claims.prepare_volumes = lambda *_: os._exit(9)  # type: ignore[assignment]
    finished = prepare_claimed(*arguments(phantoms, root), workers=1, stale=stale)
    if finished:
        with (root.parent / "finished").open("a") as file:
            file.write(f"{finished['fingerprint']}\n")


def test_any_number_of_jobs_share_the_work(phantoms: Path, alone: dict[str, bytes], small_claims: None, tmp_path: Path) -> None:
    """Two jobs finish; one dies with a claim, whose studies another takes over; a later job finds nothing left to do."""
    root = tmp_path / "store"
    dead = FORKS.Process(target=claim, args=(phantoms, root, 60.0, True))
    dead.start()
    dead.join()
    (left,) = (root / ".claims").glob("*/*")
    assert dead.exitcode == 9 and not list((root / "volumes").rglob("*.safetensors"))
    jobs = [FORKS.Process(target=claim, args=(phantoms, root, 1.0)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0] and tree(root) == alone
    assert len((tmp_path / "finished").read_text().split()) == 1
    assert [path.name for path in left.parent.iterdir()] == ["finish.done"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    claim(phantoms, root, 1.0)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before and tree(root) == alone


def test_a_claim_belongs_to_one_process_until_it_is_stale(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "claims", 0.2), Claims(tmp_path / "claims", 0.2)
    assert first.take("0") and not second.take("0") and second.take("1")
    with first.held(["0"]):
        assert not first.take("1")  # which is watched from now on
        threading.Event().wait(0.4)
        assert not second.take("0") and first.take("1")  # which nobody renewed
    assert first.is_done("0") and not second.take("0")
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["0.done", "1"]
    with pytest.raises(KeyError), first.held(["1"]):
        raise KeyError
    assert not first.is_done("1") and second.take("1")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine 'spark' is unknown; known: local, ray"):
        open_engine("spark", 1)


@pytest.fixture(scope="module")
def cluster(repository: Path) -> Iterator[Any]:
    """Ray's head and two further nodes, of one core each, on this machine."""
    ray = pytest.importorskip("ray")
    utilities = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(repository))
        options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        started = utilities.Cluster(initialize_head=True, connect=True, head_node_args=options)
        nodes = [started.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
        try:
            yield started, nodes
        finally:
            ray.shutdown()
            started.shutdown()


def on_ray(function: Callable[..., Any], *items: Any) -> list[Any]:
    with open_engine("ray", 1) as run:
        return list(run(function, *items, lost=lambda reason: reason))


def always_killed(number: int) -> int:
    if number == 1:
        os._exit(1)
    return number


def defect(number: int) -> int:
    raise RuntimeError("a defect")


@pytest.mark.slow
def test_a_ray_cluster_prepares_the_same_bytes_although_a_node_dies(
    cluster: Any, phantoms: Path, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, nodes = cluster
    root, (lost, _) = tmp_path / "store", nodes

    def kill() -> None:
        while len(list(root.rglob("*.safetensors"))) < 3:
            time.sleep(0.01)
        started.remove_node(lost, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = prepare(*arguments(phantoms, root), engine="ray")
    killer.join()
    assert summary["failures"] == 0 and tree(root) == alone and len(PreparedData(root).studies("train")) == 22
    monkeypatch.setattr(engines, "TRIES", 2)
    assert on_ray(always_killed, range(3)) == [0, "the process that worked on it was killed, 2 times on several machines", 2]
    with pytest.raises(RuntimeError, match="a defect"):
        on_ray(defect, range(2))


@pytest.mark.slow
def test_a_ray_cluster_works_at_addresses_and_embeds(
    cluster: Any, phantoms: Path, alone: dict[str, bytes], prepared: Path, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scans and volumes at file://, which only the scans' names of this disk tell apart from folders; and an index of two machines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, records, processor, root = arguments(phantoms, tmp_path / "store")
    summary = prepare(f"file://{phantoms}", records, processor, f"file://{root}", engine="ray")
    assert summary["failures"] == 0 and tree(root).keys() == alone.keys() and tree(root)["studies.jsonl"] == alone["studies.jsonl"]
    assert f'"fingerprint": "{summary["fingerprint"]}"'.encode() in alone["summary.json"]
    assert not list((tmp_path / "cache").rglob("*.part"))
    for engine in ("local", "ray"):
        CaseIndex.build(tiny_models.clip, PreparedData(prepared), tmp_path / engine, "test", 2, "cpu", engine)
    assert tree(tmp_path / "local") == tree(tmp_path / "ray")


def large(number: int) -> np.ndarray:
    return np.full(2**18, number)  # which stays on the machine that made it until it is wanted


@pytest.mark.slow
def test_a_result_that_is_lost_with_its_machine_is_made_again(cluster: Any) -> None:
    import ray

    started, (*_, last) = cluster
    with open_engine("ray", 1) as engine:
        waits = [engine.start(large, str)(number) for number in range(6)]
        ray.wait([wait.args[0] for wait in waits], num_returns=6, fetch_local=False)
        started.remove_node(last, allow_graceful=False)
        assert [int(wait().mean()) for wait in waits] == list(range(6)) and engine.workers in (2, 3)
