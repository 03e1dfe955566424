"""Communication between processes, seen from the first of three; tests/stages/test_nodes.py has real ones on two hosts."""

from pathlib import Path
from typing import Any

import pytest

from med3dvlm import processes
from med3dvlm.processes import connected, require_all, sharing, together
from med3dvlm.training import nodes


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Set the messages of the two other processes, one for each exchange."""
    told: list[Any] = []
    monkeypatch.setattr(processes, "rank_and_count", lambda: (0, 3))
    for module in (processes, nodes):
        monkeypatch.setattr(module, "gathered", lambda value: [value, *(told.pop(0) if told else (None, None))])
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    return told


def test_the_first_error_is_raised_with_its_node(others: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    others.append((None, ("the disk is full", "node2")))
    with pytest.raises(SystemExit, match="2"):
        together(int, "3")
    assert capsys.readouterr().err.endswith(": error: node node2 (process 2 of 3): the disk is full\n")


def test_an_error_of_all_processes_is_raised_without_a_node(others: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    others.append((("no such folder", "node1"), ("no such folder", "node2")))
    with pytest.raises(SystemExit, match="2"):
        require_all("no such folder")
    assert capsys.readouterr().err.endswith(": error: no such folder\n")
    assert together(int, "3") == 3  # nobody complains


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ({"install": {"torch": "2.13"}, "pass": {"seed": 1}}, "torch is 2.13 on node node3 (process 2), but 2.14 on node node1; install"),
        ({"install": {"torch": "2.14"}, "pass": {"seed": 2}}, "seed is 2 on node node3 (process 2), but 1 on node node1; pass"),
        ({"install": {"torch": "2.14"}, "pass": {"seed": 1, "new": 3}}, "new is 3 on node node3 (process 2), but None on node node1; pass"),
    ],
)
def test_the_first_difference_is_named(theirs: Any, sentence: str, others: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []
    monkeypatch.setattr(nodes, "require_all", said.append)
    own = {"install": {"torch": "2.14"}, "pass": {"seed": 1}}
    others.append((("node1", own), ("node3", own)))
    nodes.require_same(own)
    assert said == []
    others.append((("node1", own), ("node3", theirs)))
    nodes.require_same(own)
    assert said == [sentence]


def test_a_lost_connection_is_distinguished_from_other_errors(others: list[Any]) -> None:
    with pytest.raises(ConnectionError, match=r"process 0 on node node1 lost the connection to another one, .* says why; go on \(\[gloo"):
        with connected("go on"):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:5")
    with pytest.raises(RuntimeError, match="shapes"):
        with connected():
            raise RuntimeError("shapes cannot be multiplied")


def test_a_single_process(tmp_path: Path) -> None:
    assert sharing(tmp_path) == [0] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="invalid literal"):
        together(int, "x")
