"""Slurm's own daemons share a preparation between the jobs of an array (Debian: slurmctld, slurmd, slurm-client)."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from med3dvlm.cli import main
from tests.datasets.test_engines import tree

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sinfo")
PATHS = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(shutil.which(name, path=PATHS) for name in PROGRAMS), reason="Slurm's programs are not installed here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root starts jobs of others"),
]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=3
SlurmdParameters=config_overrides
PartitionName=all Nodes={host} Default=YES State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables by which Slurm's programs find the daemons of one machine of three cores."""
    root = tmp_path / "slurm"
    for name in ("state", "spool"):
        (root / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    (root / "slurm.conf").write_text(CONFIGURATION.format(host=host, root=root, controller=free_port(), node=free_port()))
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    variables = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": PATHS}
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            with (root / f"{name}.log").open("w") as log:
                command = [str(shutil.which(name, path=PATHS)), "-D", "-f", variables["SLURM_CONF"]]
                daemons.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=variables, capture_output=True, text=True, check=False).stdout:
            logs = [(root / f"{name}.log").read_text() for name in ("slurmctld", "slurmd")]
            assert time.monotonic() < deadline and all(daemon.poll() is None for daemon in daemons), logs
            time.sleep(0.2)
        yield variables
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()


def test_an_array_of_jobs_writes_the_bytes_of_one_process(
    slurm: dict[str, str], phantoms: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prepare", "m3d", str(phantoms)]
    options = ["--size", "8,16,16", "--workers", "1"]
    script = tmp_path / "job.sh"
    command = [sys.executable, "-m", "med3dvlm.cli", *words, str(tmp_path / "array"), *options, "--shard", "auto"]
    script.write_text(f"#!/bin/sh\n{' '.join(command)}\n")
    monkeypatch.chdir(repository)
    submitted = subprocess.run(
        ["sbatch", "--wait", "--array=1-3", "-c", "1", f"--output={tmp_path}/%a.out", str(script)],
        env=slurm | {"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    assert submitted.returncode == 0, (submitted.stderr, said)
    assert sum("Prepared     28 studies" in each for each in said) == 1 and sum("another job has finished" in each for each in said) == 2
    assert main([*words, str(tmp_path / "alone"), *options]) == 0
    assert tree(tmp_path / "array") == tree(tmp_path / "alone")
