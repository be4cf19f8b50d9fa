"""Seconds to an accuracy on the same test images: Attire and what people use instead, one after another.

    pip install --group peers
    python benchmarks/peers.py                       all, ten minutes at most each; goes on where it was stopped
    python benchmarks/peers.py --only attire-fast,small-cnn --again
    python benchmarks/peers.py --quick               two minutes, to see that it works

Each peer runs in a process of its own and tells a JSON line at each evaluation: seconds of work so far, images trained
on so far, test accuracy. Its lines are kept in benchmarks/results/peers; one that is finished is not run again.

The frozen VGG16 at 224 px does a few images a second, so nobody finishes with it in ten minutes. For those, `rates`
measures images/s in alternating rounds, and the accuracy after each epoch is measured on cached features of the very
same frozen network (`--classic-cache`); performance.py multiplies, and marks every such figure as extrapolated.
The test set is watched here to compare speeds; nothing is chosen by it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import measuring

from attire.storage import files

GRACE = 1.5  # of the cap, and ten minutes for scoring: then a peer that does not look at the clock is ended
SCORING = 600.0


def is_finished(path: Path) -> bool:
    """Whether the last line of a peer's file says so."""
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return bool(lines) and json.loads(lines[-1])["kind"] == "finished"
    except (ValueError, KeyError, TypeError):
        return False


def run_peer(name: str, path: Path, options: list[str], limit: float) -> None:
    """One peer, its lines shown and kept as they come."""
    arguments = [sys.executable, __file__, "--child", name, *options]
    print(f"\n{name}", flush=True)
    with path.open("w") as out, subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        ends = threading.Timer(limit, child.kill)
        ends.start()
        for line in child.stdout:
            if line.startswith("{"):  # not a library's own
                out.write(line)
                out.flush()
                print(f"  {line.rstrip()}", flush=True)
        ends.cancel()
    status = child.returncode
    if status:
        print(f"  ended with status {status}; run it again with --only {name}", flush=True)


def child(given: argparse.Namespace) -> None:
    import race
    import racers

    classic = given.classic_cache or files.cache_dir()
    with measuring.scratch_cache(), tempfile.TemporaryDirectory(dir=files.cache_dir()) as folder:
        found = race.start(given.cap, given.quick, classic, Path(folder))
        how = "finished"
        try:
            racers.RACERS[given.child](found)
        except race.OverError:
            how = "cap"
        except ImportError as error:
            race.tell("note", text=f"left out: {error}; pip install --group peers")
            how = "missing"
        about = {"train": len(found.train), "test": len(found.test), "cap": given.cap}
        peak = measuring.peak_memory()
        race.tell("finished", how=how, peer=given.child, peak=peak, **about, environment=measuring.environment())


def main() -> None:
    from racers import RACERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(RACERS)}")
    parser.add_argument("--again", action="store_true", help="also those that are finished")
    parser.add_argument("--cap", type=float, default=600.0, help="seconds of work that a peer may take (600)")
    parser.add_argument("--classic-cache", type=Path, help="the cache that has the features of `classic`")
    parser.add_argument("--out", type=Path, help="folder for the lines; default: benchmarks/results/peers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.cap = min(given.cap, 5.0) if given.quick else given.cap
    if given.child:
        child(given)
        return
    names = given.only.split(",") if given.only else list(RACERS)
    if unknown := [name for name in names if name not in RACERS]:
        raise SystemExit(f"error: --only: {unknown[0]} is none of {', '.join(RACERS)}")
    folder = files.make_dir(given.out or measuring.results_folder(given.quick) / "peers")
    options = ["--cap", str(given.cap), *(["--quick"] if given.quick else [])]
    options += ["--classic-cache", str(given.classic_cache)] if given.classic_cache else []
    for name in names:
        path = folder / f"{name}.jsonl"
        if is_finished(path) and not given.again and not given.quick:
            print(f"{name}: finished before")
            continue
        run_peer(name, path, options, (4 if name == "attire-classic" else 1) * GRACE * given.cap + SCORING)


if __name__ == "__main__":
    main()
