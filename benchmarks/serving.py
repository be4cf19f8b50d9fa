"""The server against the same pictures without one: throughput, latency, overload, drain, memory, equality.

    python benchmarks/serving.py runs/1/model                 the table for docs/performance.md
    python benchmarks/serving.py runs/1/model --soak 600      memory over ten minutes of load
    python benchmarks/serving.py runs/1/model --equal 1000    batched answers against single ones

Server, clients and the comparison without a server are three processes on the same cores; only one kind of work runs
at a time, in turn in each round. Offline means: decode every PNG, then `predict` in batches, in the server's runtime.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from load import pngs
from measuring import command, environment, spread, told

from attire.inference.predict import Model, open_model
from attire.inference.prediction import read_picture
from attire.server.settings import Settings

HERE = Path(__file__).parent
OVERLOAD = 3.0
BATCHES = (16, 32, 512)


@contextmanager
def served(bundle: str, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`attire serve` as a user starts it, and its port."""
    run = [sys.executable, "-c", "from attire.cli.main import main; main()", "serve", bundle, "--port", "0", *arguments]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process, int(re.findall(r"http://127\.0\.0\.1:(\d+) ", process.stdout.readline())[0])
    finally:
        process.kill()
        process.wait()


def start_load(port: int, **options: float) -> "subprocess.Popen[str]":
    given = [word for name, value in options.items() for word in (f"--{name}", f"{value:g}")]
    return subprocess.Popen(
        [sys.executable, str(HERE / "load.py"), str(port), *given], stdout=subprocess.PIPE, text=True
    )


def load(port: int, **options: float) -> dict[str, Any]:
    out, _ = start_load(port, **options).communicate()
    found: dict[str, Any] = json.loads(out)
    return found


def offline(classifier: Model, pictures: list[bytes], batch: int) -> float:
    """Pictures a second."""
    start = time.perf_counter()
    for i in range(0, len(pictures), batch):
        classifier.predict(np.stack([read_picture(data) for data in pictures[i : i + batch]]))
    return len(pictures) / (time.perf_counter() - start)


def forward(classifier: Model, pictures: list[bytes]) -> float:
    """Median milliseconds of `predict` for one image that is decoded already."""
    times = []
    for data in pictures[:200]:
        image = read_picture(data)[None]
        start = time.perf_counter()
        classifier.predict(image)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def one_round(classifier: Model, pictures: list[bytes], port: int, seconds: float) -> dict[str, float]:
    found = {f"offline {batch}": offline(classifier, pictures, batch) for batch in BATCHES}
    found["forward"] = forward(classifier, pictures)
    single = load(port, clients=1, seconds=seconds / 2)
    full = load(port, clients=32, seconds=seconds)
    over = load(port, rate=OVERLOAD * full["rate"], seconds=seconds)
    unsent = over["statuses"].get("-1", 0)
    refused = over["refused"] or {"p50": float("nan"), "p99": float("nan")}
    return {
        **found,
        "single p50": single["good"]["p50"],
        "single p99": single["good"]["p99"],
        "full rate": full["rate"],
        "full p50": full["good"]["p50"],
        "full p99": full["good"]["p99"],
        "over rate": over["rate"],
        "over p99": over["good"]["p99"],
        "refused p50": refused["p50"],
        "refused p99": refused["p99"],
        "healthz p99": over["healthz"]["p99"],
        "unsent": unsent / sum(over["statuses"].values()),
        "other": sum(n for status, n in over["statuses"].items() if status not in ("200", "503", "-1")),
    }


def table(rounds: list[dict[str, float]]) -> str:
    of = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    best = max((f"offline {batch}" for batch in BATCHES), key=lambda name: of[name]["median"])

    def share(upper: str, lower: str) -> str:
        return told(spread([one[upper] / one[lower] for one in rounds]))

    rows = [
        *((f"Without a server, batches of {b}, pictures/s", told(of[f"offline {b}"]), "") for b in BATCHES),
        ("32 clients, pictures/s", told(of["full rate"]), f"{share('full rate', best)} of the best without (aim 0.8)"),
        ("32 clients, p50 / p99, ms", f"{told(of['full p50'])} / {told(of['full p99'])}", ""),
        ("One image, `predict`, p50, ms", told(of["forward"]), ""),
        ("One client, p50, ms", told(of["single p50"]), f"{share('single p50', 'forward')} times that (aim 1.3)"),
        ("One client, p99, ms", told(of["single p99"]), ""),
        (f"{OVERLOAD:g} times that many arrivals, answered, pictures/s", told(of["over rate"]),
         f"{share('over rate', 'full rate')} of 32 clients (aim 0.75)"),
        ("  answered, p99, ms", told(of["over p99"]), ""),
        ("  refused, p50 / p99, ms", f"{told(of['refused p50'])} / {told(of['refused p99'])}", "aim 100"),
        ("  /healthz, p99, ms", told(of["healthz p99"]), "aim 250"),
        ("  answers that were neither 200 nor 503", told(of["other"]), "aim 0"),
        ("  not sent: the clients could not keep up, share", told(of["unsent"]), ""),
    ]  # fmt: skip
    return "\n".join(["| | median (range) | |", "|---|---:|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def drain(bundle: str, times: int) -> str:
    """SIGTERM in the middle of 32 clients' load, so many times."""
    answered = lost = 0
    for _ in range(times):
        with served(bundle) as (process, port):
            clients = start_load(port, clients=32, seconds=60)
            time.sleep(4)
            process.send_signal(signal.SIGTERM)
            out, _ = clients.communicate(timeout=60)
            found = json.loads(out)
            answered += found["statuses"].pop("200")
            lost += sum(found["statuses"].values())
            assert process.wait(30) == 0
    return f"SIGTERM under load, {times} times: {answered:,} requests answered, {lost} lost"


def resident(pid: int) -> float:
    """MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def soak(bundle: str, seconds: float) -> str:
    """Resident memory every second under 32 clients; the last half against the half before, without the first tenth."""
    memory = []
    with served(bundle) as (process, port):
        clients = start_load(port, clients=32, seconds=seconds)
        while clients.poll() is None:
            memory.append(resident(process.pid))
            time.sleep(1)
        assert clients.stdout
        found = json.loads(clients.stdout.read())
    kept = memory[len(memory) // 10 :]
    half = len(kept) // 2
    before, after = np.mean(kept[:half]), np.mean(kept[half:])
    slope = 60 * np.polyfit(np.arange(len(kept)), kept, 1)[0]
    return (
        f"{seconds:g} s of 32 clients: {found['rate']:.0f} pictures/s, statuses {found['statuses']}\n"
        f"resident: start {memory[0]:.0f} MB, first half {before:.1f} MB, second half {after:.1f} MB, "
        f"end {memory[-1]:.1f} MB, most {max(memory):.1f} MB, slope {slope:+.2f} MB a minute"
    )


def equal(classifier: Model, count: int, most: int) -> str:
    """Every batch size up to `most` against batches of one: the largest difference, and labels that differ."""
    images = np.stack([read_picture(data) for data in pngs(count)])
    single = [classifier.predict(image[None])[0] for image in images]
    worst, differ = 0.0, 0
    for size in range(2, most + 1):
        found = [one for i in range(0, count, size) for one in classifier.predict(images[i : i + size])]
        pairs = list(zip(found, single, strict=True))
        differ += sum(one.label != alone.label for one, alone in pairs)
        ours = np.array([[dict(told.ranking)[name] for name in classifier.classes] for told, _ in pairs])
        theirs = np.array([[dict(told.ranking)[name] for name in classifier.classes] for _, told in pairs])
        worst = max(worst, float(np.abs(ours - theirs).max()))
    return (
        f"{count:,} images in batches of 2 to {most} against one by one: {differ} labels differ, "
        f"probabilities by {worst:.2g} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--equal", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--drain", type=int, default=0, metavar="TIMES")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.soak:
        print(soak(chosen.bundle, chosen.soak))
    elif chosen.equal:
        print(equal(open_model(Path(chosen.bundle), "auto"), chosen.equal, Settings().max_batch))
    elif chosen.drain:
        print(drain(chosen.bundle, chosen.drain))
    else:
        classifier, pictures = open_model(Path(chosen.bundle), "auto"), pngs(500)  # in the runtime that serves
        offline(classifier, pictures, 16)
        with served(chosen.bundle, "--workers", str(chosen.workers), "--threads", str(chosen.threads)) as (_, port):
            load(port, clients=32, seconds=1)
            rounds = [one_round(classifier, pictures, port, chosen.seconds) for _ in range(chosen.rounds)]
        print(table(rounds))
    about = environment()
    print(f"\n{command()}\n{about['processor']}, {about['cores']} cores, torch {about['torch']}")


if __name__ == "__main__":
    main()
