"""A Ray cluster of several machines on one: each node in its own network namespace, with an address, a /tmp/ray and
a /dev/shm of its own. Needs Linux, root, and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PREFIX = "10.213.77"
PORT = 6379
PATIENCE = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
"""How soon a silent machine counts as lost: see docs/cluster.md."""


def _run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=check, timeout=60)


class Machines:
    """Namespaces joined by a switch, and Ray's nodes in them. Machine 0 is the head and does no tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"{PREFIX}.10:{PORT}"
        self.store_nbytes = 120 << 20
        self._name = f"tm{os.getpid() % 10_000}"
        self._shells: dict[int, subprocess.Popen[bytes]] = {}
        token = folder / "ray-token"
        token.write_text(secrets.token_hex(32))
        self.environment = (
            os.environ
            | PATIENCE
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        )
        self.environment.pop("RAY_ADDRESS", None)
        _run("ip", "netns", "add", f"{self._name}s")
        _run("ip", "-n", f"{self._name}s", "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", f"{self._name}s", "link", "set", "br0", "up")

    def start(self, number: int, *, processors: int) -> None:
        """Start a machine."""
        name, switch = f"{self._name}n{number}", f"{self._name}s"
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch)
        _run("ip", "-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
        _run("ip", "-n", name, "address", "add", f"{PREFIX}.{10 + number}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        ray = Path(sys.executable).with_name("ray")
        where = f"--head --port={PORT} --include-dashboard=false" if number == 0 else f"--address={self.address}"
        script = (
            # Not over all of /tmp: the project itself may lie there.
            "mount -t tmpfs -o size=2g tmpfs /dev/shm && mkdir -p /tmp/ray && "
            "mount -t tmpfs -o size=4g tmpfs /tmp/ray && "
            f"exec {ray} start {where} --node-ip-address={PREFIX}.{10 + number} --num-cpus={processors} "
            f"--object-store-memory={self.store_nbytes} --disable-usage-stats --block"
        )
        with (self.folder / f"node-{number}.log").open("ab") as log:
            self._shells[number] = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", script],
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def on(self, number: int, *arguments: object) -> list[str]:
        """A command line that runs on a machine."""
        return ["nsenter", "-t", str(self._shells[number].pid), "-m", "-n", *map(str, arguments)]

    def inside(self, *arguments: object) -> list[str]:
        """A command line that runs on the head."""
        return self.on(0, *arguments)

    def await_processors(self, expected: int) -> None:
        """Wait until the cluster has so many."""
        program = (
            f"import ray; ray.init('{self.address}', logging_level='ERROR', log_to_driver=False); "
            "print(int(ray.cluster_resources().get('CPU', 0)))"
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if ended := [number for number, shell in self._shells.items() if shell.poll() is not None]:
                raise RuntimeError(f"machine {ended[0]} did not start:\n{self.log_of(ended[0])}")
            line = self.inside(sys.executable, "-c", program)
            found = subprocess.run(line, env=self.environment, capture_output=True, text=True, check=False, timeout=100)
            if found.stdout.strip() == str(expected):
                return
            time.sleep(1)
        logs = "\n".join(f"machine {number}:\n{self.log_of(number)}" for number in self._shells)
        raise TimeoutError(f"expected {expected} processors, found {found.stdout} {found.stderr[-2000:]}\n{logs}")

    def log_of(self, number: int) -> str:
        """What the start of a machine printed."""
        return (self.folder / f"node-{number}.log").read_text(errors="replace")[-3000:]

    def cut(self, number: int) -> None:
        """Cut a machine's link: nothing is refused, nothing arrives."""
        _run("ip", "-n", f"{self._name}s", "link", "set", f"p{number}", "down")

    def kill(self, number: int) -> None:
        """kill -9 of every process of a machine, which is gone then."""
        name = f"{self._name}n{number}"
        for pid in _run("ip", "netns", "pids", name, check=False).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._shells.pop(number).wait()
        _run("ip", "netns", "del", name, check=False)
        _run("ip", "-n", f"{self._name}s", "link", "del", f"p{number}", check=False)

    def kill_all(self) -> None:
        for number in sorted(self._shells, reverse=True):
            self.kill(number)

    def close(self) -> None:
        self.kill_all()
        _run("ip", "netns", "del", f"{self._name}s", check=False)


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """No machine yet, and a folder that all will share; all is gone at the end."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root, and iproute2")
    if _run("ip", "netns", "add", "tmprobe", check=False).returncode:
        pytest.skip("network namespaces cannot be made here")
    _run("ip", "netns", "del", "tmprobe")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tokenmill-") as folder:  # each has a /tmp of its own
        made = Machines(Path(folder))
        try:
            yield made
        finally:
            made.close()
