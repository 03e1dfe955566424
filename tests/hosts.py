"""Two hosts on one machine: each a network namespace with its own address and name, and a mount namespace with its own disk.

Each sees another folder as `disk`; all else is a disk that they share. They reach each other but nothing outside.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launching import REPOSITORY, TIMEOUT, programs

NAMES = ("node1", "node2")
SETUP = """
hostname "$1"
mount --bind "$2" "$3"
mount --bind "$4/hosts" /etc/hosts
mount --bind "$4/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
echo up
exec sleep infinity
"""


class Host:
    """A host with this name, which exists until `keeper` ends.

    Attributes:
        folder: what the host sees as `disk`.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.folder, self.disk = name, root / name, root / "disk"
        self.log = root / f"{name}.log"
        self.folder.mkdir()
        command = ["unshare", "--net", "--mount", "--uts", "sh", "-ec", SETUP, "sh", name]
        command += [str(path) for path in (self.folder, self.disk, root)]
        self.keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.keeper.stdout is not None and self.keeper.stderr is not None
        if not self.keeper.stdout.readline():
            raise OSError(self.keeper.stderr.read())

    def enter(self) -> list[str]:
        """Return the prefix of a command that runs on the host."""
        return ["nsenter", "--target", str(self.keeper.pid), "--net", "--mount", "--uts", "--"]

    def start(self, *words: object, **variables: object) -> subprocess.Popen[bytes]:
        """Start a program on the host, in the repository; its output is added to the log. `python` and launchers are forks."""
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        environment["PATH"] = os.pathsep.join(map(str, (programs(), Path(sys.executable).parent, environment["PATH"])))
        with self.log.open("ab") as log:
            command = [*self.enter(), "env", f"--chdir={REPOSITORY}", *map(str, words)]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def processes(self) -> list[int]:
        """Return the ids of the processes that run on the host."""
        own = os.readlink(f"/proc/{self.keeper.pid}/ns/net")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/net") == own and int(path.name) != self.keeper.pid:
                    found.append(int(path.name))
            except OSError:
                continue  # it has ended
        return found

    def kill(self) -> None:
        """Kill all processes of the host."""
        for number in self.processes():
            os.kill(number, signal.SIGKILL)


@contextmanager
def two_hosts(root: Path) -> Iterator[list[Host]]:
    """Yield the hosts of NAMES.

    Raises:
        OSError, CalledProcessError: this machine does not allow it; root and the programs of util-linux and iproute2 are needed.
    """
    (root / "disk").mkdir()
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, 1)}
    (root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    (root / "nsswitch.conf").write_text("hosts: files\n")  # names that are not there are not asked for elsewhere
    hosts: list[Host] = []
    try:
        hosts += [Host(name, root) for name in NAMES]
        first, second = (str(host.keeper.pid) for host in hosts)
        link = ["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        subprocess.run(link, check=True, capture_output=True)
        for host in hosts:
            for words in (["ip", "address", "add", f"{addresses[host.name]}/24", "dev", "eth0"], ["ip", "link", "set", "eth0", "up"]):
                subprocess.run([*host.enter(), *words], check=True, capture_output=True)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.keeper.kill()
            host.keeper.wait()


def wait_for(path: Path, *started: subprocess.Popen[bytes]) -> None:
    """Return when the file exists, or a process has ended without writing it."""
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() and time.monotonic() < deadline and all(one.poll() is None for one in started):
        time.sleep(0.01)
    assert path.exists()
