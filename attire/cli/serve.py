"""serve: answers over HTTP, from this machine or a cluster."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attire.cli.options import BUNDLE, PATH, cluster_at, cluster_option, device_option
from attire.cli.shell import Command
from attire.errors import AttireError, Stopped, UsageError, one_line
from attire.version import __version__

if TYPE_CHECKING:
    from attire.inference.classifier import Classifier


@click.command(cls=Command)
@click.argument("bundle", required=False, type=BUNDLE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of this machine to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Also answer to this Host name.")
@click.option("--token-file", type=PATH, help="Want the token in this file, or in ATTIRE_TOKEN.")
@click.option("--max-queue", type=click.IntRange(1), default=128, show_default=True, help="Pictures that may wait.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Threads that run the model.  [default: 2 on a CPU]")
@click.option("--threads", type=click.IntRange(0), default=0, help="PyTorch's in each.  [default: its share of cores]")
@click.option("--access-log", is_flag=True, help="A JSON line on stderr for each request.")
@cluster_option
@click.option("--replicas", type=click.IntRange(0), help="Copies on the cluster; 0 ends them.  [default: one a node]")
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as one JSON object.")
@device_option
def serve(
    bundle: Path | None,
    host: str,
    port: int,
    hosts: tuple[str, ...],
    token_file: Path | None,
    cluster: str | None,
    replicas: int | None,
    as_json: bool,
    device: str,
    **limits: Any,
) -> None:
    """Answer over HTTP: a page for people, predictions for programs.

    \b
    attire serve                         the model that ships
    attire serve runs/1/model
    curl --data-binary @shoe.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict

    It listens on this machine alone unless --host says otherwise; then give it a token too. On a cluster that stays, it
    stays too: the same command with another bundle replaces the model while it answers, --replicas 0 ends it.
    """
    from attire.inference.bundle_files import find_bundle
    from attire.inference.classifier import Classifier, load_bundle
    from attire.inference.predict import open_model
    from attire.server import guards, listener
    from attire.server.app import create_app

    if replicas is not None and cluster is None:
        raise UsageError("--replicas", "given without --cluster")
    folder = find_bundle(bundle)
    settings = {
        "hosts": (*guards.LOOPBACK, f"[{host}]" if ":" in host else host, *hosts),
        "token": _read_token(token_file),
        "report": _report_of(folder),
        **limits,
    }
    if cluster is not None:
        _serve_on(cluster, folder, host, port, replicas, settings, device, as_json)
        return
    with listener.bind(host, port) as found:
        predictor = open_model(folder, device)
        classifier = predictor if isinstance(predictor, Classifier) else load_bundle(folder, device)
        app = create_app(classifier, predictor, **settings)
        told = _where_it_serves(listener.url_of(found), _described(classifier, folder), as_json)
        leave = app.state.service.leave
        ended = listener.serve(app, found, leave, lambda: click.echo(told))
    if ended == signal.SIGINT:
        raise Stopped("attire serve", "stopped; every accepted request was answered")


def _serve_on(
    cluster: str,
    folder: Path,
    host: str,
    port: int,
    replicas: int | None,
    settings: dict[str, Any],
    device: str,
    as_json: bool,
) -> None:
    """`attire serve --cluster`: until Ctrl-C on a cluster of our own, else it stays there."""
    from attire.inference.classifier import load_bundle

    if not port:
        raise UsageError("--port", "0 cannot be shared by a cluster", do="give a port")
    model = _described(load_bundle(folder, "cpu"), folder)
    with cluster_at(cluster) as machines:
        assert machines
        if replicas == 0:
            machines.stop_serving()
            return
        url = machines.serve(folder, device, host, port, replicas or machines.nodes, settings)
        ends = "stop with Ctrl-C" if machines.alone else f"stop with: attire serve --cluster {cluster} --replicas 0"
        click.echo(_where_it_serves(url, model, as_json, ends))
        if not machines.alone:
            return
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            raise Stopped("attire serve", "stopped; every accepted request was answered") from None
        finally:
            machines.stop_serving()


def _where_it_serves(url: str, model: str, as_json: bool, ends: str = "stop with Ctrl-C") -> str:
    if as_json:
        return json.dumps({"url": url, "model": model, "version": __version__})
    return f"Attire {_short_version()} on {url}   model {model}   {ends}"


def _read_token(path: Path | None) -> str | None:
    """From a file or the environment, never from argv, which every user of the machine can read."""
    if path is None:
        return os.environ.get("ATTIRE_TOKEN") or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise AttireError(path, "cannot read the token", getattr(error, "strerror", None) or "not UTF-8") from error
    if not token:
        raise AttireError(path, "holds no token", do="make one with: openssl rand -hex 16")
    return token


def _report_of(bundle: Path) -> str | None:
    """The report beside a bundle, or of the run that it belongs to."""
    for path in (bundle / "report.html", bundle.parent / "report.html"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _short_version() -> str:
    return ".".join(__version__.split(".")[:2])


def _described(classifier: "Classifier", bundle: Path) -> str:
    """`fast (94.5 %, 11 MB)`: recipe, measured accuracy, size of the weights."""
    from attire.inference.bundle_files import WEIGHTS
    from attire.storage.files import human_size

    facts = classifier.metadata
    recipe, test = facts.get("recipe"), facts.get("test")
    name = recipe.get("name") if isinstance(recipe, dict) else facts.get("name")
    told = [f"{100 * test['accuracy']:.1f} %"] if isinstance(test, dict) and "accuracy" in test else []
    told.append(human_size((bundle / WEIGHTS).stat().st_size))
    return one_line(f"{name or bundle.name} ({', '.join(told)})" if told else f"{name or bundle.name}")
