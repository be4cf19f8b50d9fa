"""fetch, cache, export-csv: the official data, and what is kept on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attire.cli.options import PATH, get_sources, json_option, source_options
from attire.cli.shell import Command
from attire.errors import one_line

if TYPE_CHECKING:
    from attire.features.cache import CacheEntry


@click.command(cls=Command)
@source_options
@json_option
def fetch(data_from: Path | None, weights_from: Path | None, as_json: bool) -> None:
    """Download and verify the official data and VGG16's weights; files that are already here are only verified.

    \b
    attire fetch
    attire fetch --data-from FOLDER --weights-from FILE     without a network
    """
    from attire.data import fashion_mnist
    from attire.model import pretrained
    from attire.terminal import Terminal, print_result

    terminal = Terminal(as_json)
    data = fashion_mnist.official_data(data_from, terminal.advance)
    weights = pretrained.vgg16_weights(weights_from, terminal.advance)
    terminal.close()
    if as_json:
        click.echo(json.dumps({"data": str(data), "weights": str(weights)}))
    else:
        print_result(f"Data      {data}   verified\nWeights   {weights}   verified")


@click.command("export-csv", cls=Command)
@click.argument("folder", type=PATH)
@source_options
@json_option
def export_csv(folder: Path, data_from: Path | None, weights_from: Path | None, as_json: bool) -> None:
    """Write the official sets in Kaggle's form: fashion-mnist_train.csv and fashion-mnist_test.csv.

    \b
    attire export-csv data/
    """
    from attire.data.loading import load_dataset, write_csv
    from attire.storage import files

    get_sources(data_from, weights_from)
    files.make_dir(folder)
    written = {}
    for part in ("train", "test"):
        path = folder / f"fashion-mnist_{part}.csv"
        dataset = load_dataset(None, part=part)
        write_csv(dataset, path)
        written[part] = {"file": str(path), "rows": len(dataset)}
        if not as_json:
            click.echo(f"{path}   {len(dataset):,} rows")
    if as_json:
        click.echo(json.dumps(written))


@click.command(cls=Command)
@click.option("--delete", "keys", metavar="KEY", multiple=True, help="Delete the entry whose key begins with KEY.")
@click.option("--clear", is_flag=True, help="Delete all of them.")
@json_option
def cache(keys: tuple[str, ...], clear: bool, as_json: bool) -> None:
    """List or delete what is cached: features with their size and origin, copies of tables and of URLs' objects.

    \b
    attire cache
    attire cache --delete 3f2a     the entry whose key begins so
    """
    from attire.data import table_cache
    from attire.features import row_lookup
    from attire.features.cache import cache_entries, delete_entry
    from attire.storage import url_copies
    from attire.storage.files import human_size

    freed = table_cache.delete_copies() + url_copies.delete_copies() if clear else 0
    if clear:
        keys = tuple(entry.key for entry in cache_entries())
    freed += sum(delete_entry(key) for key in keys) + row_lookup.delete_stale()
    entries, tables, objects = cache_entries(), dict(table_cache.copies()), list(url_copies.copies())
    if not as_json:
        if keys or clear:
            click.echo(f"freed {human_size(freed)}")
        for key, size in tables.items():
            click.echo(f"{key[:12]}  {human_size(size):>9}  a CSV file or Parquet files, parsed")
        for key, url, size in objects:
            click.echo(f"{key[:12]}  {human_size(size):>9}  a copy of {one_line(url)}")
    sizes = {url: size for _, url, size in objects}
    show_entries(entries, as_json, freed=freed, tables=tables, objects=sizes)


def show_entries(entries: "list[CacheEntry]", as_json: bool, **more: Any) -> None:
    """Print these entries of the feature cache, or `more` and the entries as JSON."""
    from attire.features.cache import cache_folder
    from attire.storage.files import human_size

    if as_json:
        click.echo(json.dumps({**more, "entries": [entry.to_json() for entry in entries]}))
        return
    for entry in entries:
        click.echo(f"{entry.key[:12]}  {human_size(entry.size):>9}  {entry.describe()}")
    click.echo(f"{len(entries)} entries, {human_size(sum(e.size for e in entries))} in {cache_folder()}")
