"""Ends or fails Attire at every single input/output call, and looks whether anything is lost.

    python faults/runner.py                         every call of every scenario: a process killed there, then errors
    python faults/runner.py train --every 7         one scenario, each seventh call
    python faults/runner.py --only kill             killed only; or ENOSPC, EIO, EACCES, EMFILE
    python faults/runner.py --random 100            killed at so many moments of the clock instead

A shim (shim.c, built with the system's C compiler, Linux only) is loaded under the process and counts each open for
writing, write, fsync, rename, unlink and mkdir below the scenario's folder. Each scenario is a command of `attire`, run
in a process forked for it from one that has imported everything. It is run undisturbed twice, which must give the same
bytes; then, for each call N:

kill   the process gets SIGKILL before call N (a write is torn in half). The same command, run again, must succeed and
       leave the very files of an undisturbed run, byte for byte, and not one more; at most one shard is computed twice.
errno  call N fails (ENOSPC: it and all that follow). The command must end with status 1 and one line, no traceback, and
       leave no temporary file; what was finished before is intact; run again, it must succeed as above.

The clock of the scenarios stands still, so that no file holds how long something took.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ERRORS = ("ENOSPC", "EIO", "EACCES", "EMFILE")
KILL = -1
PATIENCE = 120.0  # seconds for one command


@dataclass(frozen=True)
class Fault:
    """What happens at which call: kill, or an error. ENOSPC lasts, as a full disk does; the others come once."""

    name: str
    call: int

    def __str__(self) -> str:
        return f"{self.name} at call {self.call}"

    @property
    def action(self) -> int:
        return KILL if self.name == "kill" else int(getattr(errno, self.name))

    @property
    def last(self) -> int:
        return 2**40 if self.name == "ENOSPC" else self.call

    @property
    def reads(self) -> bool:
        """Opening for reading can fail for want of rights or of file numbers."""
        return self.name in ("EACCES", "EMFILE")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: status as a shell has it (137: killed), what it said, the calls it made."""

    status: int
    out: str
    err: str
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """A command, the folder that it starts from, and the command that goes on after it was ended.

    prepare: makes the inputs in the folder, once; again: what a user would type then, from what is on the disk.
    """

    name: str
    command: Callable[[Path], list[str]]
    prepare: Callable[[Path], None]
    again: Callable[[Path], list[str]] | None = None
    setting: Callable[[], None] = lambda: None


@dataclass
class Tally:
    """What came of the cases."""

    passed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    redone: int = 0  # shards computed twice, at most in one case


def build_shim(folder: Path) -> Path:
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    path = folder / "shim.so"
    for name in dict.fromkeys((compiler, "cc", "gcc", "clang")):
        if shutil.which(name):
            subprocess.run([name, "-shared", "-fPIC", "-O1", "-o", path, HERE / "shim.c", "-ldl"], check=True)
            return path
    raise SystemExit("error: no C compiler; install gcc")


def under_shim() -> None:
    """This program once more, with the shim loaded: from here on the process has it."""
    if os.environ.get("ATTIRE_SHIM"):
        return
    with tempfile.TemporaryDirectory(prefix="attire-shim-") as folder:
        shim = build_shim(Path(folder))
        environment = {**os.environ, "LD_PRELOAD": str(shim), "ATTIRE_SHIM": str(shim), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *sys.argv], env=environment)
        raise SystemExit(done.returncode)


def arm(root: Path, fault: Fault | None, journal: int, reads: bool) -> None:
    """Let the shim count below `root` from here on, and do what the fault says."""
    shim = ctypes.CDLL(os.environ["ATTIRE_SHIM"])
    first, last, action = (fault.call, fault.last, fault.action) if fault else (0, 0, 0)
    reads = fault.reads if fault else reads
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    shim.fault_arm(f"{root}/".encode(), first, last, action, journal, int(reads))


def attire(
    root: Path,
    arguments: list[str],
    fault: Fault | None = None,
    setting: Callable[[], None] = lambda: None,
    reads: bool = False,
    after: float | None = None,
) -> Outcome:
    """`attire` with these arguments in a forked process, its working folder and cache in `root`.

    after: seconds until it is killed, wherever it is.
    """
    with tempfile.TemporaryDirectory(prefix="attire-fault-") as scratch:
        names = [Path(scratch) / name for name in ("out", "err", "calls")]
        process = os.fork()
        if not process:
            child(root, arguments, fault, names, setting, reads)
        status = wait(process, PATIENCE if after is None else after)
        out, err, calls = (path.read_text(errors="replace") if path.exists() else "" for path in names)
    return Outcome(status, out, err, tuple(calls.splitlines()))


def wait(process: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) % 256 if status & 0x7F == 0 else 128 + (status & 0x7F)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 137


def child(
    root: Path, arguments: list[str], fault: Fault | None, names: list[Path], setting: Callable[[], None], reads: bool
) -> None:
    """Never returns."""
    status = 70
    try:
        files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for path in names]
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.chdir(root)
        os.environ["ATTIRE_CACHE"] = str(root / "cache")
        sys.argv = ["attire", *arguments]
        setting()
        time.perf_counter = lambda: 0.0
        from attire import cli

        arm(root, fault, files[2], reads)
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextmanager
def copied(source: Path, at: Path) -> Iterator[Path]:
    """A fresh copy of a scenario's folder, always under the same name: paths stand in some files."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(source, at, symlinks=True)
    try:
        yield at
    finally:
        shutil.rmtree(at, ignore_errors=True)


def contents(root: Path) -> dict[str, str]:
    """Digest of every file below `root` by its name; what is only linked to is not looked at."""
    from attire.files import sha256_file

    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(root))] = sha256_file(path)
    return found


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    told = [f"{name} is missing" for name in wanted if name not in found]
    told += [f"{name} is a stray file" for name in found if name not in wanted]
    return told + [f"{name} differs" for name in wanted if name in found and wanted[name] != found[name]]


def shards(outcome: Outcome) -> int:
    """How many shards of features a command committed."""
    return sum(" rename " in line and "/shard-" in line and line.endswith(".npy") for line in outcome.calls)


class Loop:
    """One scenario at every call."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.start, self.at = scenario, folder / "start", folder / "here"
        self.start.mkdir(parents=True)
        scenario.prepare(self.start)
        self.tally = Tally()
        first = self.undisturbed()
        self.wanted, self.calls, self.shards = first
        if told := differences(self.wanted, self.undisturbed()[0]):
            raise SystemExit(f"error: {scenario.name}: two undisturbed runs differ: {'; '.join(told[:5])}")

    def undisturbed(self) -> tuple[dict[str, str], tuple[str, ...], int]:
        with copied(self.start, self.at) as root:
            done = attire(root, self.scenario.command(root), setting=self.scenario.setting)
            if done.status:
                raise SystemExit(f"error: {self.scenario.name}: undisturbed it ends with {done.status}: {done.err}")
            return contents(root), done.calls, shards(done)

    def count(self, reads: bool) -> int:
        if not reads:
            return len(self.calls)
        with copied(self.start, self.at) as root:
            return len(attire(root, self.scenario.command(root), setting=self.scenario.setting, reads=True).calls)

    def case(self, fault: Fault | None, after: float | None = None) -> None:
        told: list[str] = []
        with copied(self.start, self.at) as root:
            before = contents(root)
            first = attire(root, self.scenario.command(root), fault, self.scenario.setting, after=after)
            if fault is None or fault.name == "kill":
                told += [] if first.status in (137, 0) else [f"ended with {first.status}: {first.err[-300:]}"]
            else:
                told += self.judge_error(fault, first, before, contents(root))
            follow = self.scenario.again or self.scenario.command
            second = attire(root, follow(root), setting=self.scenario.setting) if first.status else first
            there = "it exists already" in second.err  # an export is finished with its rename, and is not overwritten
            if second.status and not there:
                told.append(f"run again it ends with {second.status}: {second.err[-300:]}")
            else:
                told += differences(self.wanted, contents(root))
            redone = shards(first) + shards(second) - self.shards if first.status else 0
            self.tally.redone = max(self.tally.redone, redone)
            told += [f"{redone} shards were computed twice"] if redone > 1 else []
        name = fault.name if fault else "random kill"
        if told:
            where = self.calls[fault.call - 1] if fault and fault.call <= len(self.calls) and not fault.reads else ""
            self.tally.failures.append(f"{self.scenario.name}: {fault or name} {where}: {'; '.join(told[:4])}")
            print(f"  FAILED  {self.tally.failures[-1]}", flush=True)
        else:
            self.tally.passed[name] += 1

    def judge_error(self, fault: Fault, done: Outcome, before: dict[str, str], now: dict[str, str]) -> list[str]:
        """Status 1 and one line; or 0, where the call could be done without; nothing temporary, nothing old lost."""
        told = []
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        if "Traceback" in done.err:
            told.append(f"traceback: {done.err.strip().splitlines()[-1]}")
        elif done.status not in (0, 1):
            told.append(f"ended with {done.status}: {done.err[-200:]}")
        elif done.status == 1 and len(lines) != 1:
            told.append(f"{len(lines)} error lines: {done.err[-200:]}")
        elif fault.name == "ENOSPC" and done.status and "free" not in lines[0]:
            told.append(f"does not say how much is free: {lines[0]}")
        if fault.name != "ENOSPC" or not done.status:
            told += [f"{name} was left" for name in now if name.endswith(".part") and "downloads/" not in name]
        return told + [f"{name} was lost" for name in before if name not in now or before[name] != now[name]]


def run(loop: Loop, names: list[str], every: int, chance: int, seed: int) -> None:
    began = time.monotonic()
    kinds = Counter(line.split(" ")[1] for line in loop.calls)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{loop.scenario.name}: {len(loop.calls)} calls ({told}), {loop.shards} shards", flush=True)
    if chance:
        draw = random.Random(seed)
        with copied(loop.start, loop.at) as root:
            start = time.monotonic()
            attire(root, loop.scenario.command(root), setting=loop.scenario.setting)
            length = time.monotonic() - start
        for _ in range(chance):
            loop.case(None, after=draw.uniform(0, length))
    for name in () if chance else names:
        total = loop.count(Fault(name, 0).reads)
        for call in range(1 + (seed % every), total + 1, every):
            loop.case(Fault(name, call))
    passed = ", ".join(f"{count} {name}" for name, count in loop.tally.passed.items())
    bad, spent = len(loop.tally.failures), time.monotonic() - began
    print(f"  passed: {passed or 'none'}; failed: {bad}; shards redone: {loop.tally.redone}; {spent:.0f} s", flush=True)


def main() -> None:
    from scenarios import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--only", help="kill or errors, with commas between them")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th call")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N kills at random moments instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of what came of it")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else ["kill", *ERRORS]
    found = {}
    for name in given.scenarios or SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="attire-faults-") as folder:
            loop = Loop(SCENARIOS[name], Path(folder).resolve())
            run(loop, names, given.every, given.random, given.seed)
        passed, failures = dict(loop.tally.passed), loop.tally.failures
        found[name] = {
            "calls": len(loop.calls), "passed": passed, "failures": failures, "redone": loop.tally.redone
        }  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
    raise SystemExit(any(entry["failures"] for entry in found.values()))


if __name__ == "__main__":
    under_shim()
    main()
