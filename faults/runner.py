"""Ends or fails Attire at every single input/output call, and looks whether anything is lost.

    python faults/runner.py                         every call of every scenario: a process killed there, then errors
    python faults/runner.py train --every 7         one scenario, each seventh call
    python faults/runner.py --only kill             killed only; or ENOSPC, EIO, EACCES, EMFILE, random
    python faults/runner.py --only random           killed at 100 moments of the clock; --random says how many
    python faults/runner.py --journal faults.jsonl  each case is written down, and is not done again by the next start
    python faults/runner.py --journal faults.jsonl --part 1/2     half of the cases; 2/2 beside it has the others
    python faults/runner.py --journal faults.jsonl --table        what came of them so far

A shim (shim.c, built with the system's C compiler, Linux only) is loaded under the process and counts each open for
writing, write, fsync, rename, unlink and mkdir below the scenario's folder. Each scenario is a command of `attire`, run
in a process forked for it from one that has imported everything. It is run undisturbed twice, which must give the same
bytes; then, for each call N:

kill   the process gets SIGKILL before call N (a write is torn in half). The same command, run again, must succeed and
       leave the very files of an undisturbed run, byte for byte, and not one more; at most one shard is computed twice.
random the process gets SIGKILL at a moment of the clock; what must be true is the same.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from journal import ERRORS, Case, Journal

HERE = Path(__file__).parent
KILL = -1
PATIENCE = 120.0  # seconds for one command


@dataclass(frozen=True)
class Fault:
    """What happens at which call: kill, or an error. ENOSPC lasts, as a full disk does; the others come once.

    A random one is a kill at a moment, a share of the time that the command takes, and its call is only a number.
    """

    name: str
    call: int
    moment: float = 0.0

    def __str__(self) -> str:
        return f"kill at {self.moment:.3f} of the time" if self.name == "random" else f"{self.name} at call {self.call}"

    @property
    def kills(self) -> bool:
        return self.name in ("kill", "random")

    @property
    def action(self) -> int:
        return KILL if self.kills else int(getattr(errno, self.name))

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
        status = wait(process, PATIENCE, 124) if after is None else wait(process, after, 137)
        out, err, calls = (path.read_text(errors="replace") if path.exists() else "" for path in names)
    return Outcome(status, out, err, tuple(calls.splitlines()))


def wait(process: int, seconds: float, late: int) -> int:
    """Its status; `late` where it had to be killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) % 256 if status & 0x7F == 0 else 128 + (status & 0x7F)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return late


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
        from attire.cli import main as cli_main

        arm(root, fault, files[2], reads)
        try:
            cli_main.main()
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
    """Digest of every file below `root` by its name; not of what is only linked to, nor of empty files to lock, which
    stay: whoever removed one would take it from under another who waits for it."""
    from attire.storage.files import sha256_file

    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and (path.suffix != ".lock" or path.stat().st_size):
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
        self.wanted, first, _ = self.undisturbed()
        self.calls, self.shards = first.calls, shards(first)
        again, _, self.seconds = self.undisturbed()
        if told := differences(self.wanted, again):
            raise SystemExit(f"error: {scenario.name}: two undisturbed runs differ: {'; '.join(told[:5])}")

    def undisturbed(self, reads: bool = False) -> tuple[dict[str, str], Outcome, float]:
        """What the command leaves, what it said, and how many seconds it took. reads: opens for reading count too."""
        with copied(self.start, self.at) as root:
            began = time.monotonic()
            done = attire(root, self.scenario.command(root), setting=self.scenario.setting, reads=reads)
            if done.status:
                raise SystemExit(f"error: {self.scenario.name}: undisturbed it ends with {done.status}: {done.err}")
            took = time.monotonic() - began
            return contents(root), done, took

    def faults(self, names: Sequence[str], every: int, chance: int, seed: int) -> Iterator[Fault]:
        """Every case: calls first, then moments."""
        for name in names:
            if name != "random":
                reads = Fault(name, 0).reads
                total = len(self.undisturbed(reads=True)[1].calls if reads else self.calls)
                yield from (Fault(name, call) for call in range(1 + seed % every, total + 1, every))
        draw = random.Random(seed)
        for number in range(1, 1 + chance if "random" in names else 1):
            yield Fault("random", number, draw.random())

    def case(self, fault: Fault) -> Case:
        told: list[str] = []
        began = time.monotonic()
        with copied(self.start, self.at) as root:
            before = contents(root)
            command, setting = self.scenario.command(root), self.scenario.setting
            if fault.name == "random":
                first = attire(root, command, setting=setting, after=fault.moment * self.seconds)
            else:
                first = attire(root, command, fault, setting)
            if fault.kills:
                told += [] if first.status in (137, 0) else [f"ended with {first.status}: {first.err[-300:]}"]
            else:
                told += self.judge_error(fault, first, before, contents(root))
            follow = self.scenario.again or self.scenario.command
            # What could not be removed does not fail a command that did its work: the next one removes it.
            ended = not first.status and not any(".attire." in name for name in contents(root))
            second = first if ended else attire(root, follow(root), setting=self.scenario.setting)
            # What is finished with its rename is not overwritten: then all of it must be there.
            there = any(said in second.err for said in ("it exists already", "the folder is not empty"))
            if second.status and not there:
                told.append(f"run again it ends with {second.status}: {second.err[-300:]}")
            else:
                told += differences(self.wanted, contents(root))
            redone = shards(first) + shards(second) - self.shards if first.status else 0
            told += [f"{redone} shards were computed twice"] if redone > 1 else []
        if told and fault.name in (*ERRORS, "kill") and not fault.reads and fault.call <= len(self.calls):
            told.insert(0, self.calls[fault.call - 1])
        said = "; ".join(told[:4])
        return Case(self.scenario.name, fault.name, fault.call, said, redone, round(time.monotonic() - began, 2))

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


def run(loop: Loop, faults: Sequence[Fault], journal: Journal) -> None:
    """The cases that the journal does not have yet."""
    began, name = time.monotonic(), loop.scenario.name
    kinds = Counter(line.split(" ")[1] for line in loop.calls)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    left = [fault for fault in faults if (name, fault.name, fault.call) not in journal.cases]
    print(f"{name}: {len(loop.calls)} calls ({told}), {loop.shards} shards; {len(left)} cases to do", flush=True)
    for number, fault in enumerate(left, 1):
        case = loop.case(fault)
        journal.add(case)
        if case.failed:
            print(f"  FAILED  {name}: {fault}: {case.failed}", flush=True)
        if number % 50 == 0:
            spent = (time.monotonic() - began) / 60
            print(f"  {number} of {len(left)}, {spent:.0f} of {spent * len(left) / number:.0f} min", flush=True)


def part_of(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


def main() -> None:
    from scenarios import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--only", help=f"kill, random, {', '.join(ERRORS)}; several with commas")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th call")
    parser.add_argument("--random", type=int, default=100, metavar="N", help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="each N-th case, from the I-th on")
    parser.add_argument("--journal", type=Path, help="a line for each case; those that are there are not done again")
    parser.add_argument("--table", action="store_true", help="only say what is in the journal")
    parser.add_argument("--out", type=Path, help="a JSON file of what came of it")
    given = parser.parse_args()
    journal = Journal(given.journal)
    if given.table:
        print(journal.table())
        return
    names = given.only.split(",") if given.only else ["kill", *ERRORS, "random"]
    if unknown := set(names) - {"kill", *ERRORS, "random"}:
        parser.error(f"--only: unknown {sorted(unknown)[0]}")
    chosen, calls, (first, count) = given.scenarios or list(SCENARIOS), {}, given.part
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="attire-faults-") as folder:
            loop = Loop(SCENARIOS[name], Path(folder).resolve())
            calls[name] = len(loop.calls)
            faults = list(loop.faults(names, given.every, given.random, given.seed))
            run(loop, faults[first - 1 :: count], journal)
    print(f"\n{journal.table()}")
    found = {name: {"calls": calls[name], **journal.summary(name)} for name in chosen}
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
    raise SystemExit(any(entry["failures"] for entry in found.values()))


if __name__ == "__main__":
    under_shim()
    main()
