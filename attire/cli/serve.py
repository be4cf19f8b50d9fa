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
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Also answer requests for this Host name.")
@click.option("--token-file", type=PATH, help="Require the bearer token in this file, or in ATTIRE_TOKEN.")
@click.option("--max-queue", type=click.IntRange(1), default=128, show_default=True, help="Pictures that may wait.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Threads that run the model.  [default: 2 on a CPU]")
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="PyTorch threads in each.  [default: its share of cores]"
)
@click.option("--access-log", is_flag=True, help="Print a JSON line on stderr for each request.")
@cluster_option
@click.option("--replicas", type=click.IntRange(0), help="Copies on the cluster; 0 ends them.  [default: one a node]")
@click.option("--json", "as_json", is_flag=True, help="Print where it listens as one JSON object.")
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

    It listens on this machine alone unless --host says otherwise; then give it a token too. On a running cluster it
    keeps serving after the command has ended: the same command with another bundle replaces the model while it answers,
    --replicas 0 ends it.
    """
    from attire.inference.bundle_files import find_bundle
    from attire.server.guards import LOOPBACK

    if replicas is not None and cluster is None:
        raise UsageError("--replicas", "given without --cluster")
    folder = find_bundle(bundle)
    settings = {
        "hosts": (*LOOPBACK, f"[{host}]" if ":" in host else host, *hosts),
        "token": _read_token(token_file),
        "report": _read_report(folder),
        **limits,
    }
    if cluster is None:
        _serve_here(folder, device, host, port, settings, as_json)
    else:
        _serve_on_cluster(cluster, replicas, folder, device, host, port, settings, as_json)


def _serve_here(folder: Path, device: str, host: str, port: int, settings: dict[str, Any], as_json: bool) -> None:
    """`attire serve` without a cluster: until a signal ends it."""
    from attire.inference.classifier import Classifier, load_bundle
    from attire.inference.predict import open_model
    from attire.server import listener
    from attire.server.app import create_app

    with listener.bind(host, port) as sock:
        predictor = open_model(folder, device)
        classifier = predictor if isinstance(predictor, Classifier) else load_bundle(folder, device)
        app = create_app(classifier, predictor, **settings)
        announcement = _announcement(listener.url_of(sock), _describe_model(classifier, folder), as_json)
        ended_by = listener.serve(app, sock, app.state.service.start_draining, lambda: click.echo(announcement))
    if ended_by == signal.SIGINT:
        raise _stopped()


def _serve_on_cluster(
    cluster: str,
    replicas: int | None,
    folder: Path,
    device: str,
    host: str,
    port: int,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """`attire serve --cluster`: until Ctrl-C on a cluster of our own; on another one it stays."""
    from attire.inference.classifier import load_bundle

    if not port:
        raise UsageError("--port", "0 cannot be shared by a cluster", do="give a port")
    model = _describe_model(load_bundle(folder, "cpu"), folder)
    with cluster_at(cluster) as ray_cluster:
        assert ray_cluster
        if replicas == 0:
            ray_cluster.stop_serving()
            return
        url = ray_cluster.serve(folder, device, host, port, replicas or ray_cluster.nodes, settings)
        how_to_stop = f"stop with: attire serve --cluster {cluster} --replicas 0"
        click.echo(_announcement(url, model, as_json, "stop with Ctrl-C" if ray_cluster.alone else how_to_stop))
        if not ray_cluster.alone:
            return
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            raise _stopped() from None
        finally:
            ray_cluster.stop_serving()


def _stopped() -> Stopped:
    return Stopped("attire serve", "stopped; every accepted request was answered")


def _announcement(url: str, model: str, as_json: bool, how_to_stop: str = "stop with Ctrl-C") -> str:
    """The line that says where it listens."""
    if as_json:
        return json.dumps({"url": url, "model": model, "version": __version__})
    version = ".".join(__version__.split(".")[:2])
    return f"Attire {version} on {url}   model {model}   {how_to_stop}"


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


def _read_report(bundle: Path) -> str | None:
    """The report beside a bundle, or that of the run which it belongs to; None where there is none."""
    for path in (bundle / "report.html", bundle.parent / "report.html"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _describe_model(classifier: "Classifier", bundle: Path) -> str:
    """`fast (94.5 %, 11 MB)`: recipe, measured accuracy, size of the weights."""
    from attire.inference.bundle_files import WEIGHTS
    from attire.storage.files import human_size

    metadata, size = classifier.metadata, human_size((bundle / WEIGHTS).stat().st_size)
    recipe, test = metadata.get("recipe"), metadata.get("test")
    name = (recipe.get("name") if isinstance(recipe, dict) else metadata.get("name")) or bundle.name
    accuracy = f"{100 * test['accuracy']:.1f} %, " if isinstance(test, dict) and "accuracy" in test else ""
    return one_line(f"{name} ({accuracy}{size})")
