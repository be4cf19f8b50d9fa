"""Two real nodes on this machine: what they make is what one process makes, whoever is killed meanwhile."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
import torch

from attire import cluster as clusters
from attire.errors import AttireError, UsageError
from attire.evaluation.png import grey_png
from attire.evaluation.run_result import load_result
from attire.features import backbones
from attire.features import cache as feature_cache
from attire.features.cache import Features, FeatureSpec
from attire.model import devices
from attire.progress import Epoch, NoProgress
from attire.storage import files
from attire.training import checkpoints
from tests.command import TINY, Done, attire
from tests.nodes import Nodes, free_port, nodes

if TYPE_CHECKING:
    from attire.cluster import Cluster
    from attire.inference.classifier import Classifier

ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'attire[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and another node, of one core each."""
    with nodes(tmp_path_factory.mktemp("nodes")) as found, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, found.environment[name])
        yield found


@pytest.fixture(scope="module")
def joined(two: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTIRE_CACHE", str(tmp_path_factory.mktemp("measured")))
        with clusters.connect(two.address) as found:
            yield found


@pytest.fixture
def over(joined: "Cluster", monkeypatch: pytest.MonkeyPatch) -> "Cluster":
    """What `--cluster there` finds."""

    def found(address: str, workers: int = 0) -> AbstractContextManager["Cluster"]:
        monkeypatch.setattr(joined, "workers", workers or 1)
        return nullcontext(joined)

    monkeypatch.setattr(clusters, "connect", found)
    return joined


class Work:
    """An extraction of 64 shards of 16 images, and one of 5."""

    def __init__(self, weights: Path) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (64 * 16 + 5, 28, 28), np.uint8)
        self.spec = FeatureSpec("block2", 16, 0, "random", "fp32")
        self.load = partial(backbones.load_backbone, weights, self.spec, torch.device("cpu"), len(self.images))

    def extract(
        self, make: feature_cache.ShardExtractor | None = None, progress: feature_cache.ProgressCallback | None = None
    ) -> Features:
        return feature_cache.extract(self.images, "digest", self.spec, self.load, progress, make)


@pytest.fixture
def work(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(feature_cache, "_SHARD_BYTES", 16 * 2 * 2048)
    return Work(weights)


def entry(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def alone(work: Work, monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, bytes]:
    """The same entry, made by this process."""
    monkeypatch.setenv("ATTIRE_CACHE", f"{cache}-alone")
    return entry(work.extract().folder)


@ray
def test_two_nodes_extract_what_one_process_does(
    joined: "Cluster", work: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    made = work.extract(joined.extract_shards, lambda done, total: told.append(done))
    assert joined.nodes == 2
    assert told == sorted(told)
    assert told[-1] == len(work.images)
    assert sorted(path.name for path in made.folder.parent.iterdir()) == [made.folder.name, f"{made.folder.name}.lock"]
    found = entry(made.folder)
    assert len(found) == 66
    assert found == alone(work, monkeypatch, cache)


@ray
def test_only_missing_shards_are_asked_for(joined: "Cluster", work: Work, cache: Path) -> None:
    made = work.extract(joined.extract_shards)
    before = entry(made.folder)
    kept = {path.name: path.stat().st_ino for path in made.folder.glob("*.npy")}
    for name in ("shard-00007.npy", "shard-00064.npy"):
        (made.folder / name).unlink()
    assert entry(work.extract(joined.extract_shards).folder) == before
    changed = {path.name for path in made.folder.glob("*.npy") if path.stat().st_ino != kept[path.name]}
    assert changed <= {"shard-00007.npy", "shard-00064.npy"}


@ray
def test_workers_that_are_killed_cost_what_they_held(
    two: Nodes, joined: "Cluster", work: Work, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def progress(done: int, total: int) -> None:
        if done > 160 * (1 + len(killed)) and len(killed) < 3:
            worker = two.workers()[0]
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    found = entry(work.extract(joined.extract_shards, progress).folder)
    assert len(killed) == 3
    assert found == alone(work, monkeypatch, cache)


@ray
def test_a_node_that_does_not_see_the_cache_folder_says_so(
    joined: "Cluster", work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clusters, "_token_path", lambda folder: tmp_path / "elsewhere")
    with pytest.raises(AttireError, match=r"not the same folder on .*; put ATTIRE_CACHE on a file system that all"):
        work.extract(joined.extract_shards)


@ray
def test_a_node_that_would_compute_other_bits_is_refused(
    joined: "Cluster", work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = feature_cache.compute_features
    monkeypatch.setattr(clusters, "compute_features", lambda *given: compute(*given) + np.float16(0.001))
    work.spec = FeatureSpec("block2", 16, 0, "of other bits", "fp32")  # which no worker has opened yet
    with pytest.raises(AttireError, match="computes other features than the machine that asks"):
        work.extract(joined.extract_shards)


@ray
def test_another_version_on_a_node_is_refused(joined: "Cluster", work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "__version__", "0.0.0")
    work.spec = FeatureSpec("block2", 16, 0, "of another version", "fp32")
    with pytest.raises(AttireError, match=r"has Attire .*, expected 0\.0\.0; install the same version"):
        work.extract(joined.extract_shards)


@ray
def test_answers_are_those_of_one_machine_in_their_order(over: "Cluster", tmp_path: Path) -> None:
    from attire.data.loading import write_csv
    from tests.conftest import blocks_and_noise

    write_csv(blocks_and_noise(300), tmp_path / "some.csv")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    asked = ("predict", "--json", tmp_path / "bad.png", tmp_path / "some.csv", tmp_path / "bad.png")
    there, here = attire(*asked, "--cluster", "there"), attire(*asked)
    assert (there.status, there.err) == (here.status, here.err)
    assert there.err.count("error: ") == 2
    found, expected = (list(map(json.loads, done.out.splitlines())) for done in (there, here))
    assert [line["file"] for line in found] == [f"{tmp_path / 'some.csv'}:{i}" for i in range(2, 302)]
    assert [line["label"] for line in found] == [line["label"] for line in expected]
    differences = [
        abs(line["probabilities"][name] - p)
        for line, other in zip(found, expected, strict=True)
        for name, p in other["probabilities"].items()
    ]
    assert max(differences) < 1e-5


@ray
def test_another_model_on_a_node_is_refused(joined: "Cluster", bundle: Path) -> None:
    from attire.inference.inputs import PictureInput

    asked = [PictureInput("one", np.zeros((28, 28), np.uint8))]
    answers = joined.answer(bundle, "cpu", asked)
    told = clusters._model_file(bundle)
    text = told.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: "0" * 64)
        with pytest.raises(AttireError, match="not the same model on"):
            next(answers)
    assert told.read_text() == text


@ray
def test_the_app_answers_behind_ray_serve_and_a_new_model_takes_over(
    joined: "Cluster", classifier: "Classifier", bundle: Path, tmp_path: Path
) -> None:
    image = np.full((28, 28), 200, np.uint8)
    settings = {"max_queue": 8, "workers": 0, "threads": 0, "token": "t" * 16}
    port = free_port()
    url = joined.serve(bundle, "cpu", "127.0.0.1", port, 1, settings)
    head = {"Content-Type": "image/png", "Authorization": f"Bearer {'t' * 16}"}
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            said = client.post("/predict", content=grey_png(image), headers=head)
            assert said.status_code == 200, said.text
            assert said.json()["label"] == classifier.predict(image).label
            assert (
                client.post("/predict", content=grey_png(image), headers={"Content-Type": "image/png"}).status_code
                == 401
            )
            assert client.get("/readyz", headers={"Host": "elsewhere.example"}).status_code == 421
            assert client.get("/model", headers=head).json()["name"] == "small"
            classifier.metadata = {"name": "another"}
            classifier.save(tmp_path / "other" / "model")
            joined.serve(tmp_path / "other" / "model", "cpu", "127.0.0.1", port, 1, settings)
            assert client.get("/model", headers=head).json()["name"] == "another"
    finally:
        joined.stop_serving()


@ray
@pytest.mark.real
def test_a_run_is_the_same_whether_it_is_trained_here_or_there(
    over: "Cluster", small_csv: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which convolution is faster is measured for each number of threads; the two differ in their last bits.
    monkeypatch.setattr(devices, "choose_backend", lambda *_: "torch")
    threads = torch.get_num_threads()
    there = attire("train", "--data", small_csv, *TINY, "--out", "there", "--cluster", "there")
    assert there.status == 0, there
    assert "epoch   3" in there.err
    torch.set_num_threads(1)
    try:
        assert attire("train", "--data", small_csv, *TINY, "--out", "alone").status == 0
    finally:
        torch.set_num_threads(threads)
    same = [(Path(run) / "model" / "model.safetensors").read_bytes() for run in ("there", "alone")]
    assert same[0] == same[1]
    assert sorted(path.name for path in here.iterdir()) == ["alone", "there"]


@ray
@pytest.mark.real
def test_two_workers_train_together_what_one_process_does(
    over: "Cluster", small_csv: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on each node; without dropout, which each draws for its own rows."""
    monkeypatch.setattr(devices, "choose_backend", lambda *_: "torch")
    asked = ("train", "--data", small_csv, *TINY, "--dropout", "0", "--out")
    there = attire(*asked, "two", "--cluster", "there", "--cluster-workers", "2")
    assert there.status == 0, there
    assert "epoch   3" in there.err
    assert attire(*asked, "one").status == 0
    found, expected = load_result(here / "two"), load_result(here / "one")
    assert (found.environment["processes"], expected.environment.get("processes")) == (2, None)
    assert len(found.history) == 3
    for epoch, other in zip(found.history, expected.history, strict=True):
        assert epoch["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert found.predictions.probabilities == pytest.approx(expected.predictions.probabilities, abs=1e-4)


OWN = """
import os, subprocess, sys
from attire import cluster
stray = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(ray.nodes())"
with cluster.connect("auto") as found:
    address = found.ray.get_runtime_context().gcs_address
    print(found.alone, address.rpartition(":")[0])
    strange = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}
    run = [sys.executable, "-c", stray, address]
    done = subprocess.run(run, env=strange, capture_output=True, text=True, timeout=60)
    print(done.returncode != 0, done.stdout == "", "uthent" in done.stderr)
print([name for name in os.environ if name.startswith("RAY_")])
"""


@ray
def test_a_cluster_of_our_own_is_closed_to_others(cache: Path) -> None:
    """In a process of its own: Ray reads some of what it is told only once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", OWN], env=environment, capture_output=True, text=True, timeout=150)
    assert done.stdout.splitlines() == ["True 127.0.0.1", "True True True", "[]"], done.stderr
    assert not done.stderr


@ray
def test_extract_alone_or_on_a_cluster_of_its_own_prints_the_same(
    small_csv: Path, weights: Path, over: "Cluster", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("extract", "--data", small_csv, *TINY)
    there = attire(*asked, "--cluster", "there")
    alone = cache.with_name("cache-alone")
    alone.mkdir()
    (alone / "convolutions.json").write_bytes((cache / "convolutions.json").read_bytes())  # the choice of both
    monkeypatch.setenv("ATTIRE_CACHE", str(alone))
    here = attire(*asked)
    assert there.status == here.status == 0, there
    assert there.out.replace(str(cache), f"{cache}-alone") == here.out
    assert "60 images, block2 at 16 px, plain, fp32 torch" in here.out


def refused(*arguments: object) -> Done:
    done = attire(*arguments)
    assert done.status == 2
    return done


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--cluster-workers", 2), "--cluster-workers: given without --cluster"),
        (("train", "--cluster", "auto", "--seeds", 2), "--cluster: trains one run at a time; extract there first"),
        (("train", "--cluster", "auto", "--no-cache"), "--cluster: needs cached features; leave --no-cache out"),
        (("serve", "--replicas", 2), "--replicas: given without --cluster"),
        (("serve", "--cluster", "auto", "--port", 0), "--port: 0 cannot be shared by a cluster; give a port"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together_is_said(arguments: tuple[object, ...], said: str, here: Path) -> None:
    assert refused(*arguments).error.startswith(said)


@ray
@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "127.0.0.1:", "127.0.0.1:x"])
def test_an_address_that_cannot_be_meant(address: str) -> None:
    with (
        pytest.raises(UsageError, match="expected auto or HOST:PORT of a Ray cluster, found"),
        clusters.connect(address),
    ):
        pass


@ray
def test_an_address_where_nothing_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(AttireError, match=f"{address}: no Ray cluster answers there"), clusters.connect(address):
            pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = attire("extract", "--cluster", "auto").error
    assert said == "--cluster: Ray is not installed; pip install 'attire[ray]'"


def test_epochs_that_others_write_are_told(tmp_path: Path) -> None:
    seen, first = threading.Event(), [Epoch(1, 1.0, None, None, 0.5)]
    told: list[Epoch] = []

    class Watch(NoProgress):
        def epoch(self, line: Epoch) -> None:
            told.append(line)
            seen.set()

    checkpoints.write_history(tmp_path / "history.csv", first)
    with clusters._reporting_epochs(tmp_path, Watch()):
        checkpoints.write_history(tmp_path / "history.csv", [*first, Epoch(2, 0.5, 0.6, 0.75, 0.5)])
        assert seen.wait(30)
        checkpoints.write_history(
            tmp_path / "history.csv", [*first, Epoch(2, 0.5, 0.6, 0.75, 0.5), Epoch(3, 0.1, None, None, 1.0)]
        )
    assert [line.epoch for line in told] == [2, 3]


def test_what_a_worker_refused_is_what_is_said(tmp_path: Path) -> None:
    error = RuntimeError("2 workers failed")
    error.worker_failures = {0: RuntimeError("lost"), 1: AttireError("mine.csv", "gone")}  # type: ignore[attr-defined]
    assert str(clusters._training_error(error, tmp_path)) == "mine.csv: gone"
    told = str(clusters._training_error(RuntimeError("first\nlast"), tmp_path))
    do = f"its checkpoints are kept; go on with: attire train --resume {tmp_path}"
    assert told == f"cluster: the training failed (last); {do}"


def test_the_manifest_for_kubernetes_says_what_the_text_does() -> None:
    yaml = pytest.importorskip("yaml")
    page = Path(clusters.__file__).parents[1] / "docs" / "scaling.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)
    cluster, claim = yaml.safe_load_all(block)
    assert (cluster["kind"], claim["kind"]) == ("RayCluster", "PersistentVolumeClaim")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    pods = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {one["name"]: one["value"] for one in container["env"]}["ATTIRE_CACHE"].startswith(
            container["volumeMounts"][0]["mountPath"]
        )
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
