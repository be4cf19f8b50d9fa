"""Pictures in Parquet files: the same images as from IDX, labels by number or name, bad rows named, read once."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from attire.data import parquet, table_cache
from attire.data.dataset import FASHION_CLASSES, ImageDataset
from attire.data.loading import _read_parquet, load_dataset, load_splits
from attire.errors import AttireError, AttireWarning
from attire.storage.stores import open_location
from tests.command import TINY, attire
from tests.stores import png, write_parquet

NAMES = ("coat", "hat")


def pngs(data: ImageDataset) -> list[bytes | None]:
    return [png(image) for image in data.images]


def dataset(path: Path, data: ImageDataset, **more: Any) -> Path:
    return write_parquet(path, pngs(data), data.labels.tolist(), **{"names": data.classes, **more})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose pictures were decoded."""
    names: list[str] = []
    real = parquet._tables

    def tables(sources: Any, encoder: Any) -> Iterator[Any]:
        names.extend(str(source) for source in sources)
        return real(sources, encoder)

    monkeypatch.setattr(parquet, "_tables", tables)
    return names


def test_a_file_holds_the_images_and_labels_that_went_in(synthetic: ImageDataset, tmp_path: Path) -> None:
    loaded = load_dataset(dataset(tmp_path / "mine.parquet", synthetic))
    assert np.array_equal(loaded.images, synthetic.images)
    assert np.array_equal(loaded.labels, synthetic.labels)
    assert (loaded.classes, loaded.source, loaded.digest) == (FASHION_CLASSES, "mine.parquet", synthetic.digest)


@pytest.mark.real
def test_fashion_mnist_as_pictures_in_parquet_is_the_idx_files_rows(tmp_path: Path) -> None:
    official = load_dataset(part="test").subset(range(600))
    loaded = load_dataset(dataset(tmp_path / "test.parquet", official, group=100))
    assert (loaded.digest, loaded.image_digest) == (official.digest, official.image_digest)


def test_pictures_are_decoded_once(synthetic: ImageDataset, tmp_path: Path, read: list[str]) -> None:
    path = dataset(tmp_path / "mine.parquet", synthetic)
    for _ in range(2):
        assert len(_read_parquet([path])) == 60
    assert read == [str(path)]
    copy = next(table_cache._folder().glob("*.table"))
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.warns(AttireWarning, match="the copy of Parquet files is damaged and made again"):
        assert len(_read_parquet([path])) == 60
    dataset(path, synthetic.subset(range(20)))
    assert len(_read_parquet([path])) == 20


def test_text_labels_are_the_class_names(synthetic: ImageDataset, tmp_path: Path) -> None:
    words = [("hat", "coat", "scarf")[i % 3] for i in range(60)]
    path = write_parquet(tmp_path / "a.parquet", pngs(synthetic), words)
    loaded = load_dataset(path)
    assert loaded.classes == ("coat", "hat", "scarf")
    assert loaded.labels[:3].tolist() == [1, 0, 2]
    assert load_dataset(path, classes=["scarf", "hat", "coat"]).labels[:3].tolist() == [1, 2, 0]
    coded = write_parquet(tmp_path / "b.parquet", pngs(synthetic), pa.array(words).dictionary_encode())
    assert np.array_equal(load_dataset(coded).labels, loaded.labels)
    with pytest.raises(AttireError, match=r"a\.parquet: label is 'scarf', none of the 2 classes \(row 3\)$"):
        load_dataset(path, classes=NAMES)


def test_a_plain_column_of_bytes_will_do(synthetic: ImageDataset, tmp_path: Path) -> None:
    table = pa.table({"label": synthetic.labels, "image": pngs(synthetic)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert np.array_equal(load_dataset(tmp_path / "a.parquet").images, synthetic.images)


def test_photographs_are_seen_as_predictions_see_them(tmp_path: Path) -> None:
    from attire.data.photos import prepare

    file = io.BytesIO()
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 50).convert("RGB").save(file, "JPEG")
    path = write_parquet(tmp_path / "a.parquet", [file.getvalue()] * 2, [0, 1])
    assert np.array_equal(load_dataset(path).images[1], prepare(file.getvalue()).image)


def test_a_folder_s_parts_are_read_in_order_and_training_apart_from_test(
    synthetic: ImageDataset, tmp_path: Path
) -> None:
    for i in range(3):
        dataset(tmp_path / "d" / f"train-0000{i}-of-00003.parquet", synthetic.subset(range(16 * i, 16 * i + 16)))
    whole = load_dataset(tmp_path / "d")
    assert np.array_equal(whole.images, synthetic.images[:48])
    dataset(tmp_path / "d" / "test-00000-of-00001.parquet", synthetic.subset(range(48, 60)))
    splits = load_splits(tmp_path / "d")
    assert (len(splits.train), len(splits.test), splits.method) == (48, 12, {"test": "own"})
    assert np.array_equal(load_dataset(tmp_path / "d" / "train-*.parquet").images, whole.images)
    dataset(tmp_path / "d" / "validation.parquet", synthetic)
    with pytest.raises(AttireError, match=r"validation\.parquet: a third part beside train and test"):
        load_splits(tmp_path / "d")


def test_files_that_number_their_classes_differently_are_put_right(synthetic: ImageDataset, tmp_path: Path) -> None:
    """The same names in another order: by number alone every label would be wrong, and nobody would see it."""
    dataset(tmp_path / "train.parquet", synthetic)
    turned = [9 - label for label in synthetic.labels.tolist()]
    write_parquet(tmp_path / "test.parquet", pngs(synthetic), turned, names=FASHION_CLASSES[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttireWarning)  # that they are the same images
        splits = load_splits(tmp_path)
    assert np.array_equal(splits.test.labels, synthetic.labels)
    spaced = ["T - shirt / top", *FASHION_CLASSES[1:]]
    path = write_parquet(tmp_path / "hub.parquet", pngs(synthetic), synthetic.labels.tolist(), names=spaced)
    assert load_dataset(path, classes=FASHION_CLASSES).classes == FASHION_CLASSES
    path.unlink()
    write_parquet(tmp_path / "test.parquet", pngs(synthetic), synthetic.labels.tolist(), names=list("abcdefghij"))
    with pytest.raises(AttireError, match=r"test\.parquet: its classes are a, b, .*\(expected T-shirt/top, "):
        load_splits(tmp_path)


SOUND = png(np.arange(784, dtype=np.uint8).reshape(28, 28))


@pytest.mark.parametrize(
    ("image", "label", "line"),
    [
        (None, 1, "no picture bytes, expected those of a PNG, JPEG, WebP or BMP file (row 21)"),
        (b"", 1, "empty file (row 21); expected a PNG, JPEG, WebP or BMP picture"),
        (b"GIF89a....", 1, "a GIF picture, not a picture that can be read (row 21); expected a PNG, "),
        (SOUND[:-30], 1, "damaged or cut off (row 21"),
        (SOUND, None, "no label (row 21)"),
        (SOUND, 10, "label is 10, expected 0 to 9 (row 21)"),
        (SOUND, -1, "label is -1, expected 0 to 9 (row 21)"),
    ],
)
def test_a_bad_row_is_named(image: bytes | None, label: int | None, line: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [SOUND] * 20 + [image], [0, 1] * 10 + [label])
    with pytest.raises(AttireError) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(f"{path}: {line}")
    assert not list(table_cache._folder().glob("*.table"))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def refused() -> str:
        with pytest.raises(AttireError) as caught:
            load_dataset(path)
        return str(caught.value).removeprefix(f"{path}: ")

    assert refused() == "no such file"
    path.write_bytes(b"PAR1 and nothing more")
    assert refused() == "not a Parquet file, or cut off; get the file again"
    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), path)
    assert refused() == "no column image of picture bytes (its columns: picture, label)"
    pq.write_table(pa.table({"image": ["x.png"], "label": [1]}), path)
    assert refused().startswith("no column image of picture bytes")
    write_parquet(path, [SOUND])
    assert refused() == "no column label (its columns: image)"
    write_parquet(path, [SOUND], [0.5])
    assert refused() == "column label is double, expected integers or text"
    write_parquet(path, [], pa.array([], pa.int64()))
    assert refused() == "no rows"


def test_a_damaged_page_is_noticed(tmp_path: Path) -> None:
    """A byte of a picture turned over in a file whose writer kept checksums: it would decode as another picture."""
    bmp = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(bmp, "BMP")
    table = pa.table({"image": [bmp.getvalue()] * 3, "label": [0, 1, 2]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(load_dataset(path)) == 3
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(AttireError, match=r"damaged, or its store fell silent \(rows 1 to 3\); .*checksum"):
        load_dataset(path)


def test_memory_is_bounded_by_batches(synthetic: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dataset(tmp_path / "a.parquet", synthetic, group=60)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", path.stat().st_size // 10)
    sizes = [len(batch) for batch in parquet.ParquetSource(open_location(path)).batches()]
    assert sum(sizes) == 60
    assert max(sizes) <= 7


def test_row_groups_before_the_first_row_are_not_read(synthetic: ImageDataset, tmp_path: Path) -> None:
    source = parquet.ParquetSource(open_location(dataset(tmp_path / "a.parquet", synthetic, group=20)))
    for first in (0, 7, 20, 59, 60):
        labels = [label for batch in source.batches(["label"], first) for label in batch.column(0).to_pylist()]
        assert labels == synthetic.labels[first:].tolist()


@pytest.mark.usefixtures("weights", "here")
def test_a_run_trains_from_parquet_in_a_store(bucket: str, synthetic: ImageDataset, tmp_path: Path) -> None:
    for i in range(2):
        path = dataset(tmp_path / f"p{i}.parquet", synthetic.subset(range(30 * i, 30 * i + 30)))
        open_location(f"{bucket}/in").write(path.name, path.read_bytes())
    done = attire("train", "--data", f"{bucket}/in/", *TINY, "--out", "run", "--json")
    assert done.status == 0, done
    assert load_dataset(f"{bucket}/in/p1.parquet").labels.tolist() == synthetic.labels[30:].tolist()
