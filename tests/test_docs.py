"""Documents that cannot drift: the site builds and fetches nothing, shown commands exist and run, snippets run."""

import functools
import http.server
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from attire import recipes
from attire.cli import doctor, main
from attire.data import fashion_mnist
from attire.data.loading import write_csv
from tests.command import Done, attire
from tests.conftest import blocks_and_noise
from tests.stores import png, write_parquet

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
READMES = [ROOT / folder / "README.md" for folder in ("", "research", "examples/browser")]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OPTIONS_OF_ATTIRE = {name for parameter in main.cli.params for name in parameter.opts} | {"--help", "-h"}
PROGRAMS = ("attire", "make", "python", "pip", "npm", "curl")
ENDS = ("|", ">", ">>", "&&", ";")
INLINE_ENDS = ("...",)  # what stands for the rest in running text

# Commands of Attire that are only parsed here, each with its reason. All others are run on small data.
PARSED_ONLY = {
    r"serve\b": "runs until it is stopped; tests/server",
    r"bench\b": "measures for minutes; tests/analysis/test_bench.py",
    r".* '?(s3|gs|https)://": "a store; tests/storage and tests/inference/test_parquet_predict.py",
    r"sweep": "many trials; tests/analysis/test_sweep.py",
    r"train .*--teacher": "its teachers belong to other data here; tests/training/test_distillation.py",
    r".* --cluster ": "needs a cluster; tests/test_cluster.py",
    r".* --memory-limit ": "the process of the tests holds too much itself; tests/storage/test_memory.py",
    r"export ": "proved on 2,000 images; tests/export",
}
# The recipes as `sandbox` has them: what is slow in them made small, so that every shown training can be run.
MINIATURES: dict[str, dict[str, Any]] = {
    "fast": {"epochs": 2},
    "classic": {"epochs": 1, "image_size": 32, "pool": 1, "hidden": (16,)},
}


# What the pages show.


def outside(text: str) -> str:
    """The running text: no fenced and no indented block."""
    return re.sub(r"^(?: {4}.*)$", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)


def block_lines(text: str) -> Iterator[str]:
    """Lines of fenced blocks that are not Python, and of indented ones."""
    fence = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
        elif fence not in ("python", "json") and (fence is not None or line.startswith("    ")):
            yield line.strip()


def words(line: str) -> list[str]:
    """A line of a shell up to its first pipe, redirection, comment or column of explanation."""
    typed = shlex.split(line.partition("   ")[0], comments=True)
    return typed[: next((i for i, word in enumerate(typed) if word in ENDS), len(typed))]


def commands(page: Path) -> list[list[str]]:
    """Those in blocks, to be typed as they stand."""
    lines = (line.removeprefix("$ ") for line in block_lines(page.read_text()))
    return [words(line) for line in lines if line.split(" ")[0] in PROGRAMS]


def mentions(page: Path) -> list[list[str]]:
    """Those in running text, which may leave arguments out."""
    quoted = re.findall(r"`([^`]+)`", outside(page.read_text()))
    return [words(" ".join(text.split())) for text in quoted if text.split()[0] in PROGRAMS and " " in text.strip()]


SHOWN = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]
SAID = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in mentions(page)]
OURS = sorted(
    {shlex.join(command[1:]) for page, command in SHOWN if command[0] == "attire" and "commands.md" not in page}
)


def only_parsed(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in PARSED_ONLY)


def parse(given: list[str], whole: bool) -> None:
    """As click would, without running it. whole: what it requires must be there as well."""
    rest = [word for word in given if word not in ("-h", "--help")]
    while rest and rest[0].startswith("-"):
        assert rest.pop(0) in OPTIONS_OF_ATTIRE, given
    if not rest:
        return
    assert rest[0] in main.cli.commands, given
    command = main.cli.commands[rest[0]]
    root = click.Context(main.cli, info_name="attire", **main.cli.context_settings)
    try:
        if whole and rest == given:
            command.make_context(rest[0], rest[1:], parent=root).close()
        else:
            context = click.Context(command, parent=root, info_name=rest[0])
            command.make_parser(context).parse_args(rest[1:])
    except click.UsageError as error:
        pytest.fail(f"{shlex.join(['attire', *given])}: {error.format_message()}")


def check(command: list[str], whole: bool) -> None:
    """A command that can be typed: its program, its target or its script, and its options exist."""
    program, *rest = command
    if program == "attire":
        parse(rest, whole)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all("=" in word or word in targets for word in rest), command
    elif program == "python" and rest[0] != "-m" and rest[0].endswith(".py") and "/" in rest[0]:
        script = (ROOT / rest[0]).read_text()
        for word in rest[1:]:
            assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in script, command


@pytest.fixture
def files_of_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the pages has the files that they name."""
    monkeypatch.setattr("attire.cli.options._is_missing", lambda name: False)


@pytest.mark.usefixtures("files_of_readers")
@pytest.mark.parametrize(
    ("page", "command"), SHOWN, ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_every_command_in_a_block_can_be_typed(page: str, command: list[str]) -> None:
    check(command, whole=True)


@pytest.mark.usefixtures("files_of_readers")
@pytest.mark.parametrize(
    ("page", "command"), SAID, ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_every_command_in_running_text_exists(page: str, command: list[str]) -> None:
    check([word for word in command if word not in INLINE_ENDS], whole=False)


def test_commands_are_found_in_the_pages() -> None:
    """Or the tests above would test nothing."""
    assert {"train", "predict shoe.jpg photos/ 'more/*.png'", "doctor"} <= set(OURS)
    assert ("README.md", ["make", "train"]) in SHOWN
    assert len(OURS) > 40
    assert len(SAID) > 40
    assert all(any(re.match(pattern, command) for command in OURS) for pattern in PARSED_ONLY)


# Running them.


@pytest.fixture(scope="session")
def prepared(finished: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents name, small."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = blocks_and_noise(80)
    for name in ("mine.csv", "other.csv", "fashion-mnist_train.csv"):
        write_csv(rows, folder / name)
    for i in range(24):
        place = folder / "photos" / ("coat", "scarf", "hat")[i % 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rows.images[i // 3 * 10 + i % 3]).save(place)
    (folder / "more").mkdir()
    write_parquet(folder / "mine.parquet", [png(image) for image in rows.images], rows.labels.tolist())
    garment = Image.fromarray(255 - rows.images[0]).resize((200, 200))
    for name in ("shoe.jpg", "shoe.png", "bag.png", "new.jpg", "a.png", "picture.png", "more/b.png"):
        garment.save(folder / name)
    for name in ("1", "2", "3"):
        shutil.copytree(finished[0], folder / "runs" / name)
    shutil.copy(ROOT / "examples/browser/small.onnx", folder / "model.onnx")
    subprocess.run([sys.executable, ROOT / "examples/digits.py", folder / "digits", "60"], check=True)
    return folder


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official files with sixty and forty images."""
    folder = tmp_path_factory.mktemp("official")
    for name, rows in (("train", blocks_and_noise(60)), ("t10k", blocks_and_noise(40, seed=1))):
        head = struct.pack(">IIII", 2051, len(rows), 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + rows.images.tobytes())
        labels = rows.labels.astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(rows)) + labels)
    return folder


@pytest.fixture
def sandbox(
    prepared: Path, miniature: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    folder = tmp_path / "sandbox"
    shutil.copytree(prepared, folder)
    monkeypatch.setattr(fashion_mnist, "official_data", lambda source=None, progress=None: miniature)
    monkeypatch.setattr(doctor, "_connection_problem", lambda url: "not asked")
    for name, changes in MINIATURES.items():
        monkeypatch.setitem(recipes.RECIPES, name, replace(recipes.RECIPES[name], **changes))
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in OURS if not only_parsed(command)])
def test_a_shown_command_runs(command: str, sandbox: Path) -> None:
    done = attire(*shlex.split(command))
    assert (done.status, [line for line in done.err.splitlines() if line.startswith("error")]) == (0, []), done


def test_the_example_that_needs_no_attire_runs(sandbox: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/onnx_classify.py"), "model.onnx", "picture.png"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("picture.png ")


def snippets() -> list[tuple[str, str]]:
    return [
        (page.relative_to(ROOT).as_posix(), code)
        for page in PAGES
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), snippets(), ids=[f"{page}-{i}" for i, (page, _) in enumerate(snippets())])
def test_python_in_the_documents_runs(page: str, code: str, sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, on small data; `images`, which the reader has, is given."""
    exec(compile(code, page, "exec"), {"images": blocks_and_noise(5).images})  # noqa: S102  (our own pages)


# Help.


def test_the_commands_page_is_what_the_program_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runpy.run_path(str(DOCS / "make/commands.py"))
    assert (DOCS / "commands.md").read_text() == made["page"](), "run: python docs/make/commands.py"
    monkeypatch.setenv("COLUMNS", str(made["COLUMNS"] + 2))
    for name, text in made["helps"]().items():
        assert attire(*name.split()[1:], "--help").out == f"{text}\n"


def test_help_shown_elsewhere_is_the_program_s_too() -> None:
    helps = set(runpy.run_path(str(DOCS / "make/commands.py"))["helps"]().values())
    for page in PAGES:
        for text in re.findall(r"^```\w*\n(Usage: attire.*?)\n```", page.read_text(), re.M | re.S):
            assert text in helps, page


# The site.


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.addresses.append(given.get("href", ""))
        self.addresses += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        self.addresses += re.findall(r"url\(([^)]+)\)", given.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    return folder


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.glob("*.md")))
    for page in pages:
        addresses = Loads(page.read_text()).addresses
        assert addresses
        assert not [url for url in addresses if re.match(r"\w+:|//", url) and not url.startswith("data:")], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_every_page_of_the_site_has_what_it_is_made_of(site: Path) -> None:
    import attire as package

    api = (site / "api.html").read_text()
    homes = [package._HOMES[name] for name in package.__all__]
    assert all(f'id="{module}.{name}"' in api for module, name in homes)
    assert "<!-- " not in (site / "recipes.html").read_text().partition("<h1")[2].partition("</article>")[0]
    assert not (site / "make").exists()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site over HTTP, as `python -m http.server` would."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_browser_asks_no_other_host_and_finds_words(address: str, site: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.glob("*.html")):
            page.goto(address + path.name)
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{path.name} is {wide} px wider than a phone"
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(address + "index.html")
        page.locator("[data-md-component=search-query]").fill("mahalanobis")
        page.locator(".md-search-result__link").first.wait_for()
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
