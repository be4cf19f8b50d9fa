"""A Ray cluster of real processes on this machine, whose nodes can be killed one by one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_SECONDS = 60


class Nodes:
    """A head and other nodes, each `ray start --block` in a session of its own; only who has the token gets in."""

    def __init__(self, folder: Path, cpus: int = 1) -> None:
        self.folder, self.cpus, self.port = folder, cpus, free_port()
        self.temp = Path(tempfile.mkdtemp(prefix="attire-nodes-"))  # short: sockets lie below it
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 64,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # 15 by default: beside other work nothing would be done
            "RAY_ADDRESS": "",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, name: str) -> None:
        """A node; the one called head holds the rest together."""
        role = ["--head", f"--port={self.port}", f"--temp-dir={self.temp}/r", "--include-dashboard=false"]
        if name != "head":
            role = [f"--address={self.address}"]
        ports = ["--node-manager-port=0", "--object-manager-port=0", "--dashboard-agent-listen-port=0"]
        size = [f"--num-cpus={self.cpus}", "--num-gpus=0", f"--object-store-memory={100 * 2**20}"]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *ports, *size],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self.wait_for(name)

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                break
            if b"--block" in (self.folder / f"{name}.log").read_bytes():
                return
            time.sleep(0.2)
        raise RuntimeError((self.folder / f"{name}.log").read_text()[-2000:])

    def raylet(self, name: str) -> int:
        return next(pid for pid in below(self.running[name].pid) if command(pid)[:1] and "raylet" in command(pid)[0])

    def workers(self, name: str = "") -> list[int]:
        """Processes that run a task, or wait for one."""
        raylets = [self.raylet(key) for key in self.running if name in ("", key)]
        return [pid for raylet in raylets for pid in children(raylet) if is_worker(command(pid))]

    def kill(self, name: str) -> None:
        """Everything of a node at once, as if its plug were pulled."""
        node = self.running.pop(name)
        for pid in [node.pid, *below(node.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        for name in sorted(self.running, key=lambda name: name == "head"):
            self.kill(name)
        subprocess.run(["rm", "-rf", str(self.temp)], check=True)


@contextmanager
def nodes(folder: Path, names: tuple[str, ...] = ("head", "other"), cpus: int = 1) -> Iterator[Nodes]:
    found = Nodes(folder, cpus)
    try:
        for name in names:
            found.start(name)
        yield found
    finally:
        found.stop()


def below(pid: int) -> list[int]:
    """Processes that this one has started, those that they have, and so on."""
    found = []
    for child in children(pid):
        found += [child, *below(child)]
    return found


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return []


def command(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
    return []


def is_worker(told: list[str]) -> bool:
    return bool(told) and told[0].startswith("ray::") and not told[0].endswith("Agent")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
