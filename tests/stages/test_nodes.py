"""Training on two hosts with their own addresses, names and disks: launchers, losses, a lost host, and nodes that differ."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hosts import Host, two_hosts, wait_for
from tests.launching import REPOSITORY, launch

pytestmark = pytest.mark.slow
STEPS = 6
FLAGS = (
    "--lora-dropout", 0, "--lr-scheduler-type", "constant", "--learning-rate", 0.01, "--save-steps", 1, "--max-steps", STEPS, "--merged=",
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(prepared: Path, tiny_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts, each with the prepared data and the output of stage 2 on its own disk."""
    root = tmp_path_factory.mktemp("hosts")
    try:
        with two_hosts(root) as hosts:
            for host in hosts:
                shutil.copytree(prepared, host.folder / "data", ignore=shutil.ignore_patterns("features"))
                shutil.copytree(tiny_models.vlm, host.folder / "vlm")
            yield hosts
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no hosts can be made of namespaces here, which takes root, iproute2 and util-linux: {error}")


@pytest.fixture(scope="module")
def expected(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same training by four processes on one host."""
    root = tmp_path_factory.mktemp("whole")
    codes = launch(
        "torchrun", 4, "stages/stage3_lora.py", "--config", "stages/configs/smoke/stage3_lora.yaml", "--data", hosts[0].folder / "data",
        "--model", hosts[0].folder / "vlm", "--output-dir", root / "out", "--per-device-train-batch-size", 1, *FLAGS, log=root / "log",
    )  # fmt: skip
    assert codes == [0] * 4, (root / "log").read_text()[-3000:]
    return losses(root / "out")


Start = Callable[..., list["subprocess.Popen[bytes]"]]


@pytest.fixture
def start(hosts: list[Host]) -> Iterator[Start]:
    """start(script, output, "--flag", ..., VARIABLE=value) runs the script on both hosts, with two processes each, which write to their own disks.

    `second` are flags of the second host alone.
    """
    for host in hosts:
        host.log.write_text("")

    def run(
        script: str, output: str, *flags: object, only_first: bool = False, second: Sequence[object] = (), **variables: object
    ) -> list["subprocess.Popen[bytes]"]:
        words = ["--config", "smoke/stage3_lora", "--data", hosts[0].disk / "data", "--model", hosts[0].disk / "vlm", *FLAGS]
        words += ["--output-dir", hosts[0].disk / output, "--per-device-train-batch-size", 1, *flags]
        variables = {"NODES": 2, "FIRST": "node1", "GPUS": 2, **variables}
        started = []
        for rank, host in enumerate(hosts[:1] if only_first else hosts):
            alone: dict[str, object] = {} if only_first else {"NODE_RANK": rank}
            own = second if rank else ()
            started.append(host.start("bash", f"stages/cluster/{script}.sh", "stage3", *words, *own, **variables | alone))
        return started

    yield run
    for host in hosts:
        host.kill()


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def ended(*started: "subprocess.Popen[bytes]") -> list[int]:
    return [one.wait(120) for one in started]


def said(hosts: list[Host]) -> str:
    return "\n\n".join(host.log.read_text(errors="replace") for host in hosts)


def test_two_hosts_train_as_one(hosts: list[Host], expected: list[float], start: Start) -> None:
    """There is no shared disk; only the first process logs and writes."""
    assert ended(*start("torchrun", "whole")) == [0, 0], said(hosts)
    first, second = hosts
    assert losses(first.folder / "whole") == pytest.approx(expected, abs=1e-5)
    assert (first.folder / "whole" / "adapter_config.json").is_file() and not any((second.folder / "whole").iterdir())
    assert "does not lie on a disk that all nodes share" in first.log.read_text()
    assert not re.search(r"loss|%|share", re.sub(r"\[rank.*", "", second.log.read_text()))


def test_a_lost_host_ends_the_other_and_both_continue(hosts: list[Host], expected: list[float], start: Start) -> None:
    """The second host is killed after two steps and returns for three; a single process takes the last."""
    first, second = hosts
    started = start("torchrun", "lost")
    wait_for(first.folder / "lost" / "checkpoint-2" / "complete", *started)
    second.kill()
    killed = time.monotonic()
    assert ended(*started)[0] == 1 and time.monotonic() - killed < 60
    assert "med3dvlm/training" not in (log := first.log.read_text())  # no frames of a traceback
    assert "on node node1 lost the connection to another one" in log and "continues from the last checkpoint" in log
    assert ended(*start("torchrun", "lost", "--max-steps", STEPS - 1)) == [0, 0], said(hosts)
    assert not any((second.folder / "lost").iterdir())  # the copy of the checkpoint is gone
    words = [
        "--config",
        "smoke/stage3_lora",
        "--data",
        first.disk / "data",
        "--model",
        first.disk / "vlm",
        "--output-dir",
        first.disk / "lost",
    ]
    assert ended(first.start("med3dvlm", "train", "stage3", *words, *FLAGS, "--per-device-train-batch-size", 4)) == [0], said(hosts)
    assert losses(first.folder / "lost") == pytest.approx(expected, abs=1e-5)


def test_torchrun_starts_a_killed_process_again(hosts: list[Host], expected: list[float], start: Start) -> None:
    first, second = hosts
    started = start("torchrun", "again", RESTARTS=1)
    wait_for(first.folder / "again" / "checkpoint-2" / "complete", *started)
    (process,) = [number for number in second.processes() if b"\0RANK=3\0" in Path(f"/proc/{number}/environ").read_bytes()]
    os.kill(process, signal.SIGKILL)
    assert ended(*started) == [0, 0], said(hosts)
    assert losses(first.folder / "again") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ssh", [False, True], ids=["no_ssh", "hostfile"])
def test_deepspeed_on_two_hosts(ssh: bool, hosts: list[Host], expected: list[float], start: Start, tmp_path: Path) -> None:
    """The hosts share a disk; a program that enters them replaces ssh."""
    if ssh and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed, by which DeepSpeed starts processes on other hosts")
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    program(tmp_path / "ssh", "while [[ $1 != node? ]]; do shift; done; host=$1; shift; [[ $1 != hostname ]] || exec echo 10.77.0.1", hosts)
    flags = ("--deepspeed", "deepspeed/zero2", "--max-steps", 2, "--output-dir", tmp_path / "out")
    started = start("deepspeed", "", *flags, only_first=ssh, HOSTS=tmp_path / "hosts", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert ended(*started) == [0] * len(started), said(hosts)
    assert losses(tmp_path / "out") == pytest.approx(expected[:2], abs=1e-3)
    assert "does not lie" not in said(hosts)


def test_slurm_starts_the_script_on_every_host(hosts: list[Host], expected: list[float], start: Start, tmp_path: Path) -> None:
    """Stand-ins for Slurm's programs set the variables that the script reads, and enter the hosts."""
    program(
        tmp_path / "srun",
        'shift; for host in node1 node2; do SLURM_NODEID=$((i++)) enter "$host" "$@" & done; wait -n; wait -n; exit',
        hosts,
    )
    program(tmp_path / "scontrol", "printf 'node1\\nnode2\\n'; exit", hosts)
    slurm = {"SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": 2}
    started = start("slurm", "slurm", "--max-steps", 2, only_first=True, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **slurm)
    assert ended(*started) == [0], said(hosts)
    assert losses(hosts[0].folder / "slurm") == pytest.approx(expected[:2], abs=1e-5)


def program(path: Path, before: str, hosts: list[Host]) -> None:
    """Write a program that runs its remaining arguments on the host named $host."""
    cases = "".join(f'{host.name}) exec {shlex.join(host.enter())} env "--chdir={REPOSITORY}" "${{@:2}}" ;; ' for host in hosts)
    path.write_text(f'#!/usr/bin/env bash\nset -e\nenter() {{ case $1 in {cases}esac; }}\n{before}\nenter "$host" sh -c "$*"\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            "data",
            "the fingerprint of the prepared data is other on node node2 (process 1), but {fingerprint} on node node1; copy the prepared",
        ),
        ("volume", "node node2 (process 1 of 2): {volume}, a prepared volume, is missing"),
        ("settings", "max_grad_norm is 0.5 on node node2 (process 1), but 1.0 on node node1; pass the same settings on every node"),
    ],
)
def test_differences_between_nodes_are_named_before_the_first_step(wrong: str, sentence: str, hosts: list[Host], start: Start) -> None:
    first, second = hosts
    summary = json.loads((first.folder / "data" / "summary.json").read_text())
    path = next((second.folder / "data" / "volumes").rglob("*.safetensors"))
    said_of = {"fingerprint": summary["fingerprint"], "volume": first.disk / path.relative_to(second.folder)}
    changed, was = (second.folder / "data" / "summary.json", json.dumps(summary).encode())
    if wrong == "data":
        changed.write_text(json.dumps(summary | {"fingerprint": "other"}))
    if wrong == "volume":
        changed, was = path, path.read_bytes()
        path.unlink()
    own = {"second": ("--max-grad-norm", 0.5)} if wrong == "settings" else {}
    try:
        assert ended(*start("torchrun", f"wrong-{wrong}", GPUS=1, **own)) == [1, 1]
    finally:
        changed.write_bytes(was)
    assert sentence.format(**said_of) in first.log.read_text() and "med3dvlm/training" not in said(hosts)
    assert not (first.folder / f"wrong-{wrong}").exists()
