"""The Ray adapter: extraction, training, answers and serving on several machines. The only code that knows a cluster.

What is computed is decided elsewhere. The cache folder, which every node must see, is the truth of what is done: tasks
commit shards into it, and whoever is killed, the same command goes on from there.
"""

import asyncio
import logging
import os
import platform
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attire.errors import AttireError, Stopped, UsageError
from attire.evaluation import run_result
from attire.features.cache import FeatureExtractor, FeatureSpec, ProgressCallback, ShardRecords, compute_features, extract_shard, forward_batch_size
from attire.inference import predict
from attire.inference.bundle_files import MODEL_JSON, find_bundle, is_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.inputs import PictureInput
from attire.inference.prediction import Prediction
from attire.model import devices
from attire.progress import Epoch, Progress
from attire.server.app import Seen, create_app
from attire.storage import files, memory
from attire.training import run
from attire.version import __version__

_RETRIES = 5  # of a task whose process or node was lost; what Attire itself refuses is never tried again
_AHEAD = 2  # tasks in flight a core: one that runs and one whose images have already arrived
_RESTARTS = 5  # of a training whose process or node was lost, each from the run's newest checkpoint
_STORE_BYTES, _STORE_SHARE = 10**9, 0.3  # of a cluster of our own: images in flight, 1.6 MB a shard, are all it holds
_ANSWER_SECONDS = 5.0  # for a cluster to accept a connection
_DRAIN_SECONDS = 60.0  # for what a replica is answering when it is replaced
_APP = "attire"

_MORE = 64  # requests to a replica besides the pictures that may wait in it: the page, its samples, health
_LOCAL = ("127.0.0.1", "localhost", "::1")

# Of a cluster of our own: nothing in it listens beyond this machine (so Ray calls it, on Linux as well), it reports to
# nobody, and its workers do not give way to all else here, as Ray's otherwise do (niceness 15). That nobody without a
# token may use it is Ray's default there, which a test holds it to.
_PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
_QUIET = {"RAY_ENABLE_AUTO_CONNECT": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}


@contextmanager
def connect(address: str = "auto", workers: int = 0) -> Iterator["Cluster"]:
    """A cluster to work on until the block ends.

    address: `HOST:PORT` of one that runs; "auto": the one that RAY_ADDRESS names, else one on this machine alone that
    is started now and ended with the block. workers: processes that train, 0 for one a GPU, else one. Raises
    AttireError where Ray is not installed or nothing answers at the address.
    """
    there = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    private = {} if there else {**_PRIVATE, "RAY_AUTH_TOKEN": _token_of_our_own()}
    with _environment({**_QUIET, **private}), ExitStack() as held:
        ray = _import_ray()
        if there:
            _check_address(there)
        if ray.is_initialized():
            raise AttireError("Ray", "this process is part of a cluster already")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": _APP}
        options["runtime_env"] = {"env_vars": {"ATTIRE_CACHE": str(files.cache_dir())}}
        if not there:
            # A folder of mode 0700: the sockets in it are Ray's doors, and it makes what is below open to everybody.
            folder = Path(
                held.enter_context(tempfile.TemporaryDirectory(prefix="attire-ray-", ignore_cleanup_errors=True))
            )
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_temp_dir": str(folder / "r")}
            options["object_store_memory"] = int(min(_STORE_BYTES, _STORE_SHARE * (memory.total_memory() or _STORE_BYTES)))
        held.callback(ray.shutdown)
        try:
            ray.init(there or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            do = "if it wants a token: RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
            raise AttireError(there or "Ray", "cannot be used as a cluster", str(error).strip()[:120], do) from error
        yield Cluster(workers, alone=not there)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise AttireError("--cluster", "Ray is not installed", do="pip install 'attire[ray]'") from error
    return ray


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """These variables where the user has set none, until the block ends; what Ray adds goes with them."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in wanted.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if name.startswith("RAY_"):
                del os.environ[name]


@cache
def _token_of_our_own() -> str:
    """One for the whole process: Ray reads it once."""
    return secrets.token_hex(32)


def _check_address(address: str) -> None:
    """Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UsageError("--cluster", f"expected auto or HOST:PORT of a Ray cluster, found {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise AttireError(address, "no Ray cluster answers there", str(error)) from error


class Cluster:
    """Work for the nodes that `connect` found. alone: whether they end with this process."""

    def __init__(self, workers: int = 0, alone: bool = False) -> None:
        self.ray, self.alone = _import_ray(), alone
        self.gpus = int(self.resources("GPU"))
        self.workers = workers or max(1, self.gpus)

    @property
    def nodes(self) -> int:
        return sum(node["Alive"] for node in self.ray.nodes())

    def resources(self, kind: str) -> float:
        """Of all nodes that are alive now."""
        return float(self.ray.cluster_resources().get(kind, 0))

    def most_in_flight(self, gpu: bool = False) -> int:
        return _AHEAD * max(1, int(self.resources("GPU" if gpu else "CPU")))

    def remote(self, function: Callable[..., Any], gpu: bool = False) -> Callable[..., Any]:
        """A task that is tried again where its process or node is lost, on a core or a GPU of its own."""
        options = {"max_retries": _RETRIES, "retry_exceptions": False, "num_cpus": 1, "num_gpus": int(gpu)}
        return self.ray.remote(**options)(function).remote  # type: ignore[no-any-return]

    def result(self, reference: Any) -> Any:
        """Of a task. Raises what Attire refused there, as it would have been raised here."""
        wrong = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except wrong.RayTaskError as error:
            if isinstance(error.cause, AttireError):
                raise error.cause from None
            raise
        except wrong.RayError as error:
            what = f"work was lost {_RETRIES + 1} times, or the cluster was"
            do = "what was finished is kept: the same command goes on"
            raise AttireError("cluster", what, type(error).__name__, do) from error

    # Extraction.

    def extract_shards(
        self,
        parts: dict[int, NDArray[np.uint8]],
        spec: FeatureSpec,
        load_backbone: Callable[[], FeatureExtractor],
        folder: Path,
        total: int,
        report: ProgressCallback,
    ) -> ShardRecords:
        """A `features.Maker`: a task for each shard, which commits it; few of them under way at a time."""
        if not spec.backend.startswith("torch"):
            raise UsageError("--backend", f"{spec.backend} runs on one machine", do="leave --cluster out")
        done = total - sum(map(len, parts.values()))
        report(done, total)
        files.make_dir(folder)
        with _token_beside(folder) as token:
            gpu = spec.backend == "torch-cuda"
            order = self.ray.put(_make_order(next(iter(parts.values())), spec, load_backbone, folder, token))
            task, waiting, lines = self.remote(_make_shard, gpu), dict[Any, int](), ShardRecords()
            todo = list(reversed(parts))
            try:
                while todo or waiting:
                    while todo and len(waiting) < self.most_in_flight(gpu):
                        index = todo.pop()
                        waiting[task(order, parts[index], index)] = index
                        files.release_pages(parts[index])
                    for ready in self.ray.wait(list(waiting))[0]:
                        index = waiting.pop(ready)
                        lines[index] = self.result(ready)
                        done += lines[index]["rows"]
                        report(done, total)
            finally:
                for left in waiting:
                    self.ray.cancel(left)
        return lines

    # Training.

    def resume(self, folder: Path, progress: Progress) -> None:
        """Carry out the run in `folder` by `runs.resume` in each of the workers, which train it together."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        place, gpu = folder.absolute(), self.gpus >= self.workers
        alive = [node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]]
        cores = max(1, int(max(alive) // -(-self.workers // len(alive))))  # those of a node, shared by its workers
        with tempfile.TemporaryDirectory(prefix=".ray-", dir=place.parent) as storage, _following(place, progress):
            trainer = TorchTrainer(
                _train_part,
                train_loop_config={"folder": str(place), "here": str(Path.cwd()), "cores": str(cores)},
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self.workers, use_gpu=gpu, resources_per_worker={"CPU": cores}
                ),
                run_config=RunConfig(
                    name=_APP, storage_path=storage, failure_config=FailureConfig(max_failures=_RESTARTS)
                ),
            )
            with _interruptible(), _quiet():
                try:
                    trainer.fit()
                except SystemExit:  # what Ray Train makes of Ctrl-C, once its workers have ended
                    raise Stopped(folder, "stopped, its checkpoints are kept") from None
                except Exception as error:
                    raise _refused(error, folder) from error

    # Answers.

    def answer(
        self, model: Path | None, device: str, asked: Iterable[PictureInput | AttireError]
    ) -> Iterator[list[predict.Answer]]:
        """As `answers.answer`, each batch by a task, in the order of what is asked, few of them under way at a time."""
        about = _model_file(model)
        task = self.remote(_predict_batch, device == "cuda")
        told, waiting = (model and model.absolute(), device, files.sha256_file(about)), deque[Any]()
        for batch in predict.batch_inputs(asked):
            images = batch.images()
            waiting.append((batch, task(*told, images) if len(images) else None))
            if len(waiting) >= self.most_in_flight():
                yield self.answered(*waiting.popleft())
        while waiting:
            yield self.answered(*waiting.popleft())

    def answered(self, batch: predict.InputBatch, reference: Any) -> list[predict.Answer]:
        return batch.answers(self.result(reference) if reference is not None else [])

    # Serving.

    def serve(self, bundle: Path, device: str, host: str, port: int, replicas: int, settings: dict[str, Any]) -> str:
        """The app behind Ray Serve, each replica with the bundle's model of its own; its address.

        Called again, it replaces one replica after the other, and no request fails: old ones answer until new ones
        are ready. settings: those of `server.create_app`.
        """
        from ray import serve
        from ray.serve.config import BackpressureConfig, HTTPOptions

        cores, gpus = self.resources("CPU") / replicas, self.gpus / replicas if device == "cuda" else 0
        share = {"num_cpus": min(1.0, cores / 2), "num_gpus": min(1.0, gpus / 2)}  # half: those to come fit beside
        settings["workers"] = settings["workers"] or 1
        settings["threads"] = settings["threads"] or max(1, int(cores) // settings["workers"])
        queue = settings["max_queue"]
        replica: Any = serve.deployment(
            serve.ingress()(_Replica),
            name="replica",
            num_replicas=replicas,
            ray_actor_options=share,
            max_ongoing_requests=queue + _MORE,
            max_queued_requests=queue,
            backpressure_config=BackpressureConfig(retry_after_s=1),
            graceful_shutdown_timeout_s=_DRAIN_SECONDS,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=2,
            health_check_timeout_s=10,
            max_constructor_retry_count=3,
            rolling_update_percentage=1.0,
            max_surge_percent=100,
        )
        told = (bundle.absolute(), files.sha256_file(_model_file(bundle)), device, settings)
        try:
            with _quiet():
                serve.start("HeadOnly" if host in _LOCAL else "EveryNode", HTTPOptions(host=host, port=port))
                serve.run(replica.bind(*told), name=_APP)
        except RuntimeError as error:
            found = serve.status().applications[_APP].deployments
            text = "\n".join([str(error), *(part.message for part in found.values())]).strip()
            why = re.findall(r"(?:Attire|Usage)Error: (.*)", text) or text.splitlines()
            raise AttireError("Ray Serve", "cannot run the model", why[-1][:300]) from error
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop_serving(self) -> None:
        """What has been accepted is answered first."""
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            with _quiet():
                serve.delete(_APP)
        except RayServeException as error:
            raise AttireError("Ray Serve", "nothing is served on this cluster") from error


# What runs in the workers' processes.


@dataclass(frozen=True, eq=False)
class _Order:
    """What every task of one extraction is told, and how it shows that it can be trusted with it.

    token: what lies beside `folder`, as long as the extraction goes on; probe: images (n, 28, 28), and the digest that
    their features have where the extraction was asked for.
    """

    spec: FeatureSpec
    load_backbone: Callable[[], FeatureExtractor]
    folder: Path
    token: str
    version: str
    probe: NDArray[np.uint8]
    expected: str

    def check_place(self) -> None:
        """Raises AttireError where this node does not see the cache folder, or the extraction is over."""
        try:
            seen = _token_path(self.folder).read_text()
        except OSError:
            seen = ""
        if seen != self.token:
            what = f"not the same folder on {platform.node()} as where the command was given"
            raise AttireError(self.folder, what, do="put ATTIRE_CACHE on a file system that all nodes share")

    def check_backbone(self, backbone: FeatureExtractor) -> None:
        """Raises AttireError where this node would make other shards: the cache may not depend on who was free."""
        if files.sha256(compute_features(self.probe, self.spec, backbone).tobytes()) != self.expected:
            where = f"{devices.processor_name()}, torch {torch.__version__}"
            do = "give it nodes with one kind of processor and one version of torch"
            raise AttireError(platform.node(), "computes other features than the machine that asks", where, do)


def _make_order(
    images: NDArray[np.uint8], spec: FeatureSpec, load_backbone: Callable[[], FeatureExtractor], folder: Path, token: str
) -> _Order:
    """The probe is computed as one machine alone would compute it, with all its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load_backbone()  # measures how one thread is fastest: the workers find that in the cache folder
    finally:
        torch.set_num_threads(threads)
    probe = np.array(images[: max(1, forward_batch_size(spec.image_size) // 8)])
    expected = files.sha256(compute_features(probe, spec, load_backbone()).tobytes())
    return _Order(spec, load_backbone, folder, token, __version__, probe, expected)


def _token_path(folder: Path) -> Path:
    return folder.with_suffix(".token")


@contextmanager
def _token_beside(folder: Path) -> Iterator[str]:
    token = secrets.token_hex(16)
    files.write_text(_token_path(folder), token)
    try:
        yield token
    finally:
        _token_path(folder).unlink(missing_ok=True)


_BACKBONES: dict[FeatureSpec, FeatureExtractor] = {}  # of this process, proved to be the driver's


def _make_shard(order: _Order, images: NDArray[np.uint8], index: int) -> dict[str, Any]:
    """One shard, computed and committed; its ledger line. Made twice it is the same, byte for byte."""
    order.check_place()
    told = (order.spec, _open_backbone(order), order.folder, index)
    return extract_shard(images, *told, check=order.check_place)  # tasks outlive a killed driver for a moment


def _open_backbone(order: _Order) -> FeatureExtractor:
    """Once a process. One thread each: as many tasks as cores keep them busy without waiting for each other."""
    known = replace(order.spec, view="plain")
    if known not in _BACKBONES:
        _check_version(order.version)
        _set_threads(1)
        backbone = order.load_backbone()
        order.check_backbone(backbone)
        _BACKBONES[known] = backbone
    return _BACKBONES[known]


def _set_threads(count: int) -> None:
    """Of torch, and of ONNX Runtime where it is opened after this."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def _check_version(version: str) -> None:
    if version != __version__:
        what = f"has Attire {__version__}, expected {version}"
        raise AttireError(platform.node(), what, do="install the same version on every node")


def _train_part(config: dict[str, str]) -> None:
    """In each worker of Ray Train, where torch's process group is set up."""
    os.chdir(config["here"])  # what a run's data is called may be relative to it
    _set_threads(int(config["cores"]))
    run.resume(config["folder"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's libraries tell each step on stderr, and set their own levels."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train keeps Ctrl-C to itself from its first training on: not longer than this."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def _following(folder: Path, progress: Progress) -> Iterator[None]:
    """Tells of the epochs that others add to the run's history."""
    path, over = folder / "history.csv", threading.Event()
    before = len(run_result.read_history(path)) if path.exists() else 0

    def follow(told: int = before) -> None:
        ended = False
        while not ended:
            ended = over.wait(0.5)
            with suppress(OSError, AttireError):
                lines = run_result.read_history(path)
                for line in lines[told:]:
                    progress.epoch(Epoch(**line))
                told = max(told, len(lines))

    thread = threading.Thread(target=follow, name="attire-history", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _refused(error: BaseException, folder: Path) -> AttireError:
    """What Attire refused in a worker, else that the training failed too often."""
    for found in (*getattr(error, "worker_failures", {}).values(), error):
        cause = getattr(found, "_base_exc", None) or getattr(found, "cause", None) or found
        if isinstance(cause, AttireError):
            return cause
    told = str(error).strip().splitlines() or [type(error).__name__]
    do = f"its checkpoints are kept; go on with: attire train --resume {folder}"
    return AttireError("cluster", "the training failed", told[-1][:200], do)


@cache
def _opened_model(model: Path | None, device: str, digest: str) -> predict.Model:
    """Once a process. Raises AttireError where it is another model here than where it was asked for."""
    _check_model(model, digest)
    _set_threads(1)
    return predict.open_model(model, device)


def _predict_batch(model: Path | None, device: str, digest: str, images: NDArray[np.uint8]) -> list[Prediction]:
    return _opened_model(model, device, digest).predict(images)


def _model_file(model: Path | None) -> Path:
    """The file whose digest stands for the model: an exported file, or `model.json`, which holds those of the rest."""
    return find_bundle(model) / MODEL_JSON if model is None or is_bundle(model) else model


def _check_model(model: Path | None, digest: str) -> None:
    try:
        same = files.sha256_file(_model_file(model)) == digest
    except OSError:
        same = False
    if not same:
        what = f"not the same model on {platform.node()} as where the command was given"
        raise AttireError(model or "the shipped model", what, do="put it on a file system that all nodes share")


class _Replica:
    """What Ray Serve runs: the app of `server.create_app` around a model of its own."""

    def __init__(self, bundle: Path, digest: str, device: str, settings: dict[str, Any]) -> None:
        _check_model(bundle, digest)
        _set_threads(settings["threads"] * settings["workers"])
        predictor = predict.open_model(bundle, device)
        classifier = predictor if isinstance(predictor, Classifier) else load_bundle(bundle, device)
        self.attire = create_app(classifier, predictor, **settings)

    def __serve_build_asgi_app__(self) -> Any:
        return self.attire  # `app` is Ray Serve's own

    async def check_health(self) -> None:
        """Raises where the model no longer answers; the replica is then replaced."""
        blank = Seen(np.zeros((28, 28), np.uint8), "")
        await asyncio.to_thread(self.attire.state.service.answer, [blank])
