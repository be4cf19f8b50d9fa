"""A cache of its own for every test, random weights of VGG16's true shapes, and sixty images that can be learnt."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from attire.blocks import WEIGHT_SHAPES
from attire.data import fashion_mnist
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import write_csv
from attire.features import remote_cache
from attire.model import devices, pretrained
from attire.model.weights import Tensors, write_weights
from attire.recipes import Recipe
from attire.storage import files
from attire.storage.files import cache_dir
from tests import stores

if TYPE_CHECKING:
    from attire.inference.classifier import Classifier
    from tests.command import Done

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("few", derandomize=True, max_examples=60, deadline=None, suppress_health_check=slow)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=slow, print_blob=True)
settings.load_profile("few")


@pytest.fixture(scope="session")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `devices` measured, once for all tests: on a busy machine the next measurement may choose otherwise."""
    folder = tmp_path_factory.mktemp("convolutions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTIRE_CACHE", str(folder))
        devices._measured_seconds(("direct", "winograd", "bf16") if devices.has_bf16() else ("direct", "winograd"))
    return folder / "convolutions.json"


@pytest.fixture(autouse=True, scope="session")
def heeded_signals() -> None:
    """Attire heeds that a signal is ignored, and who starts the tests (nohup, a shell's `&`) may have had it so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convolutions: Path) -> Path:
    """An empty cache folder; for tests marked `real` one that holds the official data and weights, and no features."""
    folder = tmp_path / "cache"
    if request.node.get_closest_marker("real"):
        fashion_mnist.official_data(), pretrained.vgg16_weights()
        folder.mkdir()
        for part in ("data", "weights"):
            (folder / part).symlink_to(cache_dir() / part)
        shutil.copy(convolutions, folder)
    monkeypatch.setenv("ATTIRE_CACHE", str(folder))
    monkeypatch.delenv(remote_cache._VARIABLE, raising=False)
    remote_cache._unreadable.clear()
    remote_cache._unwritable.clear()
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with stores.serve() as url:
        yield url


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of a real S3 server, and what makes everybody find it: `s3://<name>`."""
    from pyarrow import fs

    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for name, value in {**known, "AWS_ENDPOINT_URL": s3_server, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{files.sha256(str(tmp_path).encode())[:16]}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def random_tensors() -> Tensors:
    """He initialisation, so that features stay of order one through all thirteen layers; small biases."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in WEIGHT_SHAPES.items():
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)
        tensors[name] = rng.standard_normal(shape, np.float32) * scale
    return tensors


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory, random_tensors: Tensors) -> Iterator[Path]:
    """A safetensors file of 59 MB, made once, removed at the end."""
    path = tmp_path_factory.mktemp("weights") / "vgg16-features-random.safetensors"
    write_weights(path, random_tensors, "random")
    yield path
    path.unlink()


@pytest.fixture
def weights(random_weights: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, convolutions: Path) -> Path:
    """`random_weights`, given to whoever asks for VGG16's: no network."""
    cache.mkdir(exist_ok=True)
    shutil.copy(convolutions, cache)
    monkeypatch.setattr(pretrained, "vgg16_weights", lambda source=None, progress=None: random_weights)
    return random_weights


def blocks_and_noise(rows: int, seed: int = 0) -> ImageDataset:
    """Each class in turn is a bright block at a place of its own on noise; all images differ."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (rows, 28, 28), np.uint8)
    labels = np.arange(rows, dtype=np.int64) % 10
    for image, label in zip(images, labels, strict=True):
        top, left = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
        image[top : top + 11, left : left + 5] += 180
    return ImageDataset(images, labels, FASHION_CLASSES, "synthetic")


@pytest.fixture
def synthetic() -> ImageDataset:
    return blocks_and_noise(60)


@pytest.fixture
def small_csv(synthetic: ImageDataset, tmp_path: Path) -> Path:
    """The sixty images in the Kaggle format: split 80/20, every class is in both parts."""
    path = tmp_path / "small.csv"
    write_csv(synthetic, path)
    return path


@pytest.fixture
def tiny() -> Recipe:
    """The default recipe in miniature: a run on `small_csv` takes about a second."""
    return Recipe(
        name="tiny",
        freeze_to="block2",
        image_size=16,
        hidden=(16,),
        epochs=3,
        batch_size=16,
        precision="fp32",
        tta=1,
    )


@pytest.fixture
def classifier(weights: Path) -> "Classifier":
    """Not trained: the random backbone up to block2, a random head, a temperature that is not 1."""
    import torch  # not for the many tests that need none of it

    from attire.inference.classifier import Architecture, Classifier
    from attire.model import vgg

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture = Architecture("block2", 16, 0, (8,), 0.5)
        head = architecture.build_head(10)
        for weight in head[-1].parameters():
            torch.nn.init.normal_(weight)  # answers that differ
    model = vgg.vgg16(weights, "block2", 0, head)
    return Classifier(model, architecture, FASHION_CLASSES, 1.7, {"name": "small"})


@pytest.fixture
def bundle(classifier: "Classifier", tmp_path: Path) -> Path:
    """`classifier`, saved where a run would leave it: in the folder `model`."""
    classifier.save(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def finished(random_weights: Path, convolutions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "Done"]:
    """A run of `tiny`, made once, in the folder `run` beside its `small.csv`; and what `attire train --json` said."""
    from tests.command import TINY, attire

    folder = tmp_path_factory.mktemp("finished")
    write_csv(blocks_and_noise(60), folder / "small.csv")
    (folder / "cache").mkdir()
    shutil.copy(convolutions, folder / "cache")  # the choice that the tests which make this run again have
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTIRE_CACHE", str(folder / "cache"))
        patch.setattr(pretrained, "vgg16_weights", lambda source=None, progress=None: random_weights)
        said = attire("train", "--data", folder / "small.csv", *TINY, "--out", folder / "run", "--json")
    return folder / "run", said
