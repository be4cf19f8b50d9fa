"""What came of each case of runner.py: kept line by line, so that an interrupted loop goes on; and as a table."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ERRORS = ("ENOSPC", "EIO", "EACCES", "EMFILE")


@dataclass(frozen=True)
class Case:
    """What came of one fault in one scenario; failed: what was not as it must be, empty where all was."""

    scenario: str
    fault: str
    call: int
    failed: str
    redone: int  # shards computed twice
    seconds: float


class Journal:
    """What came of each case. With a file, a line a case as it ends; lines of another state of the code are passed
    over, so that an interrupted loop goes on and a mended program is tried anew."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.state, self.cases = path, code_state(), dict[tuple[str, str, int], Case]()
        for line in path.read_text().splitlines() if path and path.exists() else []:
            found = json.loads(line)
            if found.pop("state") == self.state:
                self.keep(Case(**found))

    def keep(self, case: Case) -> None:
        self.cases[case.scenario, case.fault, case.call] = case

    def add(self, case: Case) -> None:
        self.keep(case)
        if self.path:
            with self.path.open("a") as file:  # one write below 4 KB: two processes may share the file
                file.write(json.dumps({**asdict(case), "failed": case.failed[:2000], "state": self.state}) + "\n")

    def summary(self, name: str) -> dict[str, Any]:
        own = [case for case in self.cases.values() if case.scenario == name]
        passed = Counter(case.fault for case in own if not case.failed)
        failures = [f"{case.scenario}: {case.fault} {case.call}: {case.failed}" for case in own if case.failed]
        redone = max((case.redone for case in own), default=0)
        return {"passed": dict(passed), "failures": failures, "redone": redone, "seconds": sum(c.seconds for c in own)}

    def table(self) -> str:
        """In Markdown: what came through of what was tried, by scenario and fault; shards computed twice at most."""
        names = ("kill", *ERRORS, "random")
        lines = [f"| scenario | {' | '.join(names)} | shards twice | minutes |", "|---|" + "---:|" * (len(names) + 2)]
        for scenario in dict.fromkeys(case.scenario for case in self.cases.values()):
            found, cells = self.summary(scenario), []
            for name in names:
                tried = sum(key[:2] == (scenario, name) for key in self.cases)
                cells.append(f"{found['passed'].get(name, 0)} of {tried}" if tried else "")
            lines.append(f"| {scenario} | {' | '.join(cells)} | {found['redone']} | {found['seconds'] / 60:.0f} |")
        return "\n".join(lines)


def code_state() -> str:
    """Digest of the program and of what tries it."""
    found = hashlib.sha256()
    for path in sorted([*(HERE.parent / "attire").rglob("*.py"), *HERE.glob("*.py"), HERE / "shim.c"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
