"""The Ray adapter: extraction, training, prediction and serving on several machines. The only code that knows Ray.

Other modules decide what is computed. The cache folder, which every node must see, records what is done: tasks commit
shards into it. When a process is killed, the same command goes on from there.
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
from attire.features.cache import (
    FeatureExtractor,
    FeatureSpec,
    ProgressCallback,
    ShardRecords,
    compute_features,
    extract_shard,
    forward_batch_size,
)
from attire.inference import predict
from attire.inference.bundle_files import MODEL_JSON, find_bundle, is_bundle
from attire.inference.classifier import Classifier, load_bundle
from attire.inference.inputs import PictureInput
from attire.inference.prediction import Prediction
from attire.model import devices
from attire.progress import Epoch, Progress
from attire.server.app import create_app
from attire.storage import files, memory
from attire.training import run
from attire.version import __version__

_RETRIES = 5  # of a task whose process or node was lost; an error of Attire's own is never tried again
_TASKS_PER_CORE = 2  # in flight: one that runs and one whose images have already arrived
_RESTARTS = 5  # of a training whose process or node was lost, each from the run's newest checkpoint
_STORE_BYTES, _STORE_FRACTION = 10**9, 0.3  # of a private cluster's object store: it holds images, 1.6 MB a shard
_CONNECT_SECONDS = 5.0  # for a cluster to accept a connection
_DRAIN_SECONDS = 60.0  # for the requests that a replica is answering when it is replaced
_APP = "attire"
_OTHER_REQUESTS = 64  # to a replica, besides the pictures that may wait in it: the page, its samples, health
_LOCAL = ("127.0.0.1", "localhost", "::1")

# A private cluster listens on this machine alone (the variable holds on Linux as well), reports to nobody, and runs its
# workers at normal niceness, where Ray's default is 15. Ray's default also wants a token of everyone who uses such a
# cluster, which a test checks.
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
    address = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    private = {} if address else {**_PRIVATE, "RAY_AUTH_TOKEN": _private_token()}
    with _environment({**_QUIET, **private}), ExitStack() as stack:
        ray = _import_ray()
        if address:
            _check_address(address)
        if ray.is_initialized():
            raise AttireError("Ray", "this process is part of a cluster already")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": _APP}
        options["runtime_env"] = {"env_vars": {"ATTIRE_CACHE": str(files.cache_dir())}}
        if not address:
            # Of mode 0700: Ray's sockets lie in it, in folders that Ray makes open to every user.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attire-ray-", ignore_cleanup_errors=True))
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_temp_dir": f"{folder}/r"}
            options["object_store_memory"] = int(
                min(_STORE_BYTES, _STORE_FRACTION * (memory.total_memory() or _STORE_BYTES))
            )
        stack.callback(ray.shutdown)
        try:
            ray.init(address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            do = "if it wants a token: RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
            raise AttireError(address or "Ray", "cannot be used as a cluster", str(error).strip()[:120], do) from error
        yield Cluster(workers, alone=not address)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise AttireError("--cluster", "Ray is not installed", do="pip install 'attire[ray]'") from error
    return ray


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set the variables that the user has not set; at the end of the block remove them and those that Ray has added."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in defaults.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if name.startswith("RAY_"):
                del os.environ[name]


@cache
def _private_token() -> str:
    """One for the whole process, since Ray reads it once."""
    return secrets.token_hex(32)


def _check_address(address: str) -> None:
    """Raises UsageError for no address and AttireError where no cluster answers; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UsageError("--cluster", f"expected auto or HOST:PORT of a Ray cluster, found {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise AttireError(address, "no Ray cluster answers there", str(error)) from error


class Cluster:
    """A cluster to work on; `connect` makes it. alone: it is a private one and ends with this process."""

    def __init__(self, workers: int = 0, alone: bool = False) -> None:
        self.ray, self.alone = _import_ray(), alone
        self.gpus = int(self.resources("GPU"))
        self.workers = workers or max(1, self.gpus)

    @property
    def nodes(self) -> int:
        return sum(node["Alive"] for node in self.ray.nodes())

    def resources(self, kind: str) -> float:
        """How many of \"CPU\" or \"GPU\" all living nodes have."""
        return float(self.ray.cluster_resources().get(kind, 0))

    def max_in_flight(self, gpu: bool = False) -> int:
        return _TASKS_PER_CORE * max(1, int(self.resources("GPU" if gpu else "CPU")))

    def remote(self, function: Callable[..., Any], gpu: bool = False) -> Callable[..., Any]:
        """A task with a core or a GPU of its own, which Ray runs again where its process or node is lost."""
        options = {"max_retries": _RETRIES, "retry_exceptions": False, "num_cpus": 1, "num_gpus": int(gpu)}
        return self.ray.remote(**options)(function).remote  # type: ignore[no-any-return]

    def result(self, reference: Any) -> Any:
        """The result of a task. Raises its AttireError as if it had been raised here."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, AttireError):
                raise error.cause from None
            raise
        except exceptions.RayError as error:
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
        """A `features.cache.ShardExtractor`: extracts and commits each shard by a task, a few at a time."""
        if not spec.backend.startswith("torch"):
            raise UsageError("--backend", f"{spec.backend} runs on one machine", do="leave --cluster out")
        done = total - sum(map(len, parts.values()))
        report(done, total)
        files.make_dir(folder)
        with _written_token(folder) as token:
            gpu = spec.backend == "torch-cuda"
            job = self.ray.put(_make_job(next(iter(parts.values())), spec, load_backbone, folder, token))
            task, running, records = self.remote(_extract_shard, gpu), dict[Any, int](), ShardRecords()
            todo = list(reversed(parts))
            try:
                while todo or running:
                    while todo and len(running) < self.max_in_flight(gpu):
                        index = todo.pop()
                        running[task(job, parts[index], index)] = index
                        files.release_pages(parts[index])
                    for ready in self.ray.wait(list(running))[0]:
                        index = running.pop(ready)
                        records[index] = self.result(ready)
                        done += records[index]["rows"]
                        report(done, total)
            finally:
                for reference in running:
                    self.ray.cancel(reference)
        return records

    # Training.

    def resume(self, folder: Path, progress: Progress) -> None:
        """Carry out the run in `folder`: each of the workers calls `run.resume`, and they train it together."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        run_folder, gpu = folder.absolute(), self.gpus >= self.workers
        alive = [node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]]
        cores = max(1, int(max(alive) // -(-self.workers // len(alive))))  # those of a node, shared by its workers
        with (
            tempfile.TemporaryDirectory(prefix=".ray-", dir=run_folder.parent) as storage,
            _reporting_epochs(run_folder, progress),
        ):
            trainer = TorchTrainer(
                _train_worker,
                train_loop_config={
                    "folder": str(run_folder),
                    "working_directory": str(Path.cwd()),
                    "cores": str(cores),
                },
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
                    raise _training_error(error, folder) from error

    # Prediction.

    def answer(
        self, model: Path | None, device: str, inputs: Iterable[PictureInput | AttireError]
    ) -> Iterator[list[predict.Answer]]:
        """Answers to all inputs in their order, each batch by a task, a few batches at a time."""
        digest, task = files.sha256_file(_model_file(model)), self.remote(_predict_batch, device == "cuda")
        running = deque[tuple[predict.InputBatch, Any]]()
        for batch in predict.batch_inputs(inputs):
            images = batch.images()
            running.append((batch, task(model and model.absolute(), device, digest, images) if len(images) else None))
            if len(running) >= self.max_in_flight():
                yield self._answers(running.popleft())
        while running:
            yield self._answers(running.popleft())

    def _answers(self, running: tuple[predict.InputBatch, Any]) -> list[predict.Answer]:
        """The answers to a batch. running: the batch and the task that predicts it, None where no picture is in it."""
        batch, task = running
        return batch.answers(self.result(task) if task is not None else [])

    # Serving.

    def serve(self, bundle: Path, device: str, host: str, port: int, replicas: int, settings: dict[str, Any]) -> str:
        """Run the app behind Ray Serve, each replica with a model of its own; returns its address.

        A second call replaces one replica after the other, and no request fails: an old one answers until the new one
        is ready. settings: those of `server.app.create_app`. Raises AttireError where the model cannot run.
        """
        from ray import serve
        from ray.serve.config import BackpressureConfig, HTTPOptions

        cores, gpus = self.resources("CPU") / replicas, self.gpus / replicas if device == "cuda" else 0
        share = {
            "num_cpus": min(1.0, cores / 2),
            "num_gpus": min(1.0, gpus / 2),
        }  # half, so that the next replicas fit beside these
        settings["workers"] = settings["workers"] or 1
        settings["threads"] = settings["threads"] or max(1, int(cores) // settings["workers"])
        queue = settings["max_queue"]
        replica: Any = serve.deployment(
            serve.ingress()(_Replica),
            name="replica",
            num_replicas=replicas,
            ray_actor_options=share,
            max_ongoing_requests=queue + _OTHER_REQUESTS,
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
        digest = files.sha256_file(_model_file(bundle))
        try:
            with _quiet():
                serve.start("HeadOnly" if host in _LOCAL else "EveryNode", HTTPOptions(host=host, port=port))
                serve.run(replica.bind(bundle.absolute(), digest, device, settings), name=_APP)
        except RuntimeError as error:
            deployments = serve.status().applications[_APP].deployments
            text = "\n".join([str(error), *(deployment.message for deployment in deployments.values())]).strip()
            reasons = re.findall(r"(?:Attire|Usage)Error: (.*)", text) or text.splitlines()
            raise AttireError("Ray Serve", "cannot run the model", reasons[-1][:300]) from error
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop_serving(self) -> None:
        """End the app, once every accepted request is answered."""
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            with _quiet():
                serve.delete(_APP)
        except RayServeException as error:
            raise AttireError("Ray Serve", "nothing is served on this cluster") from error


# What runs in the processes of the workers.


@dataclass(frozen=True, eq=False)
class _ExtractionJob:
    """What all tasks of one extraction share, and the checks that a worker must pass before it commits a shard.

    token: text of a file beside `folder`, which is there as long as the extraction goes on; probe: images (n, 28, 28);
    expected: digest of the features that the driver, the process which asks, computes of the probe.
    """

    spec: FeatureSpec
    load_backbone: Callable[[], FeatureExtractor]
    folder: Path
    token: str
    version: str
    probe: NDArray[np.uint8]
    expected: str

    def check_folder(self) -> None:
        """Raises AttireError where this node does not see the cache folder, or the extraction is over."""
        try:
            token = _token_path(self.folder).read_text()
        except OSError:
            token = ""
        if token != self.token:
            what = f"not the same folder on {platform.node()} as where the command was given"
            raise AttireError(self.folder, what, do="put ATTIRE_CACHE on a file system that all nodes share")

    def check_backbone(self, backbone: FeatureExtractor) -> None:
        """Raises AttireError where this node would compute other features: the cache must not depend on the node."""
        if files.sha256(compute_features(self.probe, self.spec, backbone).tobytes()) != self.expected:
            where = f"{devices.processor_name()}, torch {torch.__version__}"
            do = "give it nodes with one kind of processor and one version of torch"
            raise AttireError(platform.node(), "computes other features than the machine that asks", where, do)


def _make_job(
    images: NDArray[np.uint8],
    spec: FeatureSpec,
    load_backbone: Callable[[], FeatureExtractor],
    folder: Path,
    token: str,
) -> _ExtractionJob:
    """A job for such images. The driver computes the probe with all its threads, as it would without a cluster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load_backbone()  # measures what is fastest with one thread; workers read the result from the cache folder
    finally:
        torch.set_num_threads(threads)
    probe = np.array(images[: max(1, forward_batch_size(spec.image_size) // 8)])
    expected = files.sha256(compute_features(probe, spec, load_backbone()).tobytes())
    return _ExtractionJob(spec, load_backbone, folder, token, __version__, probe, expected)


def _token_path(folder: Path) -> Path:
    return folder.with_suffix(".token")


@contextmanager
def _written_token(folder: Path) -> Iterator[str]:
    token = secrets.token_hex(16)
    files.write_text(_token_path(folder), token)
    try:
        yield token
    finally:
        _token_path(folder).unlink(missing_ok=True)


_BACKBONES: dict[FeatureSpec, FeatureExtractor] = {}  # of this process, which have passed `check_backbone`


def _extract_shard(job: _ExtractionJob, images: NDArray[np.uint8], index: int) -> dict[str, Any]:
    """Compute and commit one shard; returns its record. A second time the shard is the same, byte for byte."""
    job.check_folder()
    backbone = _open_backbone(job)
    # A task may outlive a killed driver for a moment, hence the check.
    return extract_shard(images, job.spec, backbone, job.folder, index, check=job.check_folder)


def _open_backbone(job: _ExtractionJob) -> FeatureExtractor:
    """Opened once in a process, with one thread: as many tasks as cores keep all cores busy."""
    known = replace(job.spec, view="plain")
    if known not in _BACKBONES:
        _check_version(job.version)
        _set_threads(1)
        backbone = job.load_backbone()
        job.check_backbone(backbone)
        _BACKBONES[known] = backbone
    return _BACKBONES[known]


def _set_threads(count: int) -> None:
    """Threads of PyTorch, and of ONNX Runtime where it is opened afterwards."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def _check_version(version: str) -> None:
    if version != __version__:
        what = f"has Attire {__version__}, expected {version}"
        raise AttireError(platform.node(), what, do="install the same version on every node")


def _train_worker(config: dict[str, str]) -> None:
    """Runs in each worker of Ray Train, which has set up PyTorch's process group."""
    os.chdir(config["working_directory"])  # the path of the run's data may be relative
    _set_threads(int(config["cores"]))
    run.resume(config["folder"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that Ray's libraries log at every step, at levels of their own."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Give Ctrl-C back to this process after the block: Ray Train takes it over and keeps it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def _reporting_epochs(folder: Path, progress: Progress) -> Iterator[None]:
    """Report the epochs that the workers add to the run's history."""
    path, over = folder / "history.csv", threading.Event()
    before = len(run_result.read_history(path)) if path.exists() else 0

    def follow(reported: int = before) -> None:
        ended = False
        while not ended:
            ended = over.wait(0.5)
            with suppress(OSError, AttireError):
                epochs = run_result.read_history(path)
                for epoch in epochs[reported:]:
                    progress.epoch(Epoch(**epoch))
                reported = max(reported, len(epochs))

    thread = threading.Thread(target=follow, name="attire-history", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _training_error(error: BaseException, folder: Path) -> AttireError:
    """The AttireError of a worker, else one that says how the training failed."""
    for failure in (*getattr(error, "worker_failures", {}).values(), error):
        cause = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
        if isinstance(cause, AttireError):
            return cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    do = f"its checkpoints are kept; go on with: attire train --resume {folder}"
    return AttireError("cluster", "the training failed", lines[-1][:200], do)


@cache
def _open_model(model: Path | None, device: str, digest: str) -> predict.Model:
    """Opened once in a process. Raises AttireError where this node has another model than the driver."""
    _check_model(model, digest)
    _set_threads(1)
    return predict.open_model(model, device)


def _predict_batch(model: Path | None, device: str, digest: str, images: NDArray[np.uint8]) -> list[Prediction]:
    return _open_model(model, device, digest).predict(images)


def _model_file(model: Path | None) -> Path:
    """The file whose digest identifies the model: an export, or `model.json`, which holds the others' digests."""
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
    """What Ray Serve runs: the app of `server.app.create_app` around a model of its own."""

    def __init__(self, bundle: Path, digest: str, device: str, settings: dict[str, Any]) -> None:
        _check_model(bundle, digest)
        _set_threads(settings["threads"] * settings["workers"])
        predictor = predict.open_model(bundle, device)
        classifier = predictor if isinstance(predictor, Classifier) else load_bundle(bundle, device)
        self.asgi_app = create_app(classifier, predictor, **settings)

    def __serve_build_asgi_app__(self) -> Any:
        return self.asgi_app  # the attribute `app` is Ray Serve's own

    async def check_health(self) -> None:
        """Raises where the model no longer predicts; Ray Serve then replaces the replica."""
        await asyncio.to_thread(self.asgi_app.state.service.predict_blank)
