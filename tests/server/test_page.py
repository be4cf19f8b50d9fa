"""The page in a real browser, against the real server over a real socket: every way in, every way it can go wrong."""

import io
import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from attire.data.dataset import ImageDataset
from attire.evaluation.png import data_uri, grey_png
from attire.inference.classifier import Classifier
from attire.inference.out_of_distribution import OODDetector
from attire.server import app, responses
from tests.visitor import PATIENCE, Visitor

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow  # a real browser

PAGE = Path(app.__file__).with_name("page.html")
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync --disable-quic --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)
REPORT = "<h1>All about it</h1>"
TOKEN = "correct horse battery"
AXE = "axe-core@4.14.1"
Visit = Callable[..., Visitor]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    sync_api.expect.set_options(timeout=1000 * PATIENCE)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield found
        found.close()


@pytest.fixture
def visit(
    browser: "Browser", classifier: Classifier, synthetic: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Visit]:
    """Opens the page of a server with these settings; samples are synthetic, and so are explanations."""
    samples = [(f"Sample {i}", image) for i, image in enumerate(synthetic.images[:4])]
    monkeypatch.setattr(responses, "read_samples", lambda: samples)
    monkeypatch.setattr(responses, "describe_explanation", explanation)
    classifier.metadata.update(
        recipe={"name": "tiny", "epochs": 3, "flips": True},
        test={"n": 2000, "correct": 1880, "accuracy": 0.94, "accuracy_low": 0.9287, "accuracy_high": 0.9496},
        backbone_digest="ab" * 32,
    )
    visitors: list[Visitor] = []

    def come(**settings: Any) -> Visitor:
        visitors.append(Visitor(browser, classifier, **{"report": REPORT, **settings}))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.leave()


def explanation(classifier: Classifier, answer: responses.Answer) -> dict[str, Any]:
    uri = data_uri(grey_png(answer.model_input.image))
    near = [{"label": f"near {i}", "distance": i + 0.25, "image": uri} for i in range(3)]
    return {"heat_map": uri, "method": "the test's own", "neighbours": near}


@pytest.fixture
def pictures(synthetic: ImageDataset, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"picture {i}.png" for i in range(5)]
    for path, image in zip(paths, synthetic.images, strict=False):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture
def damaged(pictures: list[Path]) -> Path:
    path = pictures[0].with_name("damaged.png")
    path.write_bytes(pictures[0].read_bytes()[:200])
    return path


def test_nothing_in_the_page_comes_from_elsewhere_or_slips_past_its_policy() -> None:
    text = PAGE.read_text()
    assert not re.findall(r"""(?:src|href|action)=["']?(?:https?:)?//""", text)
    assert not re.findall(r"<[^>]+\s(?:on\w+|style)=", text)
    assert "innerHTML" not in text
    assert [text.count(tag) for tag in ("<script>", "<script", "<style>", "<style", "@import")] == [1, 1, 1, 1, 0]


def test_a_chosen_picture_is_answered_as_the_classifier_answers(
    visit: Visit, classifier: Classifier, pictures: list[Path], synthetic: ImageDataset
) -> None:
    visitor = visit()
    with visitor.page.expect_file_chooser() as asked:
        visitor.page.get_by_role("button", name="Choose pictures").click()
    assert asked.value.is_multiple()
    asked.value.set_files(pictures[0])
    expected = classifier.predict(synthetic.images[0])
    assert visitor.answer() == expected.label
    bars = visitor.card().locator(".bars li")
    told = [line.split("\n") for line in bars.all_inner_texts()]
    assert [line[0] for line in told] == [label for label, _ in expected.ranking[:3]]
    assert [float(line[-1]) for line in told] == pytest.approx([p for _, p in expected.ranking[:3]], abs=6e-4)
    widths = [bar.evaluate("e => parseFloat(e.style.width)") for bar in bars.locator(".fill").all()]
    assert widths == pytest.approx([100 * p for _, p in expected.ranking[:3]], abs=0.01)
    visitor.card().get_by_role("button", name="All ten").click()
    assert bars.count() == 10
    seen = visitor.card().get_by_role("img", name="What the model saw of picture 0.png")
    assert seen.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [28, 28]
    visitor.sees(visitor.card(), "ms on the server")
    visitor.sees(visitor.page.locator("#live"), f"picture 0.png: {expected.label} {expected.probability:.2f}")


def test_pictures_are_dropped(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit()
    drop(visitor, *pictures[:2])
    assert visitor.answer(1)
    assert visitor.page.locator("#answers .name").all_inner_texts()[0].startswith("picture 0.png")
    empty = visitor.page.evaluate_handle("() => new DataTransfer()")
    visitor.page.dispatch_event("#drop", "drop", {"dataTransfer": empty})
    visitor.sees(visitor.page.locator("#said"), "That is not a file.")


def drop(visitor: Visitor, *paths: Path) -> None:
    files = [[list(path.read_bytes()), path.name] for path in paths]
    pack = """files => { const pack = new DataTransfer();
        for (const [bytes, name] of files) pack.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
        return pack; }"""
    visitor.page.dispatch_event("#drop", "drop", {"dataTransfer": visitor.page.evaluate_handle(pack, files)})


def test_a_picture_is_pasted(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit()
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = """bytes => navigator.clipboard.write([
        new ClipboardItem({"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])"""
    visitor.page.evaluate(copy, list(pictures[0].read_bytes()))
    visitor.page.keyboard.press("Control+V")
    visitor.sees(visitor.card().locator(".name"), "Pasted picture")
    assert visitor.answer()
    visitor.page.evaluate("() => navigator.clipboard.writeText('words')")
    visitor.page.keyboard.press("Control+V")
    visitor.sees(visitor.page.locator("#said"), "The clipboard holds no picture.")


def test_a_picture_is_taken_with_the_camera(visit: Visit) -> None:
    visitor = visit()
    visitor.page.get_by_role("button", name="Use the camera").click()
    visitor.page.locator("#shutter:enabled").click()
    assert visitor.answer()
    visitor.sees(visitor.card().locator(".name"), "Camera")
    assert not visitor.page.locator("#viewfinder").is_visible()
    assert visitor.page.evaluate("() => document.getElementById('video').srcObject") is None


def test_one_bad_file_says_so_in_its_own_card(visit: Visit, pictures: list[Path], damaged: Path) -> None:
    visitor = visit()
    script = {"name": "page.svg", "mimeType": "image/svg+xml", "buffer": b"<svg/>"}
    visitor.choose(*pictures[:2], damaged, *pictures[2:])
    visitor.answer()
    visitor.sees(visitor.card(2), "Damaged or cut off")
    assert visitor.page.locator("#answers .failed").count() == 1
    visitor.sees(visitor.page.locator("#tally"), "5 answered, 1 without an answer")
    assert visitor.page.locator("#progress").is_hidden()
    visitor.choose(script)
    visitor.answer()
    visitor.sees(visitor.card(), "image/png")  # what would have been taken, in the server's words
    assert visitor.card().get_by_role("button", name="Try again").count() == 0
    visitor.page.get_by_role("button", name="Clear all").click()
    assert visitor.page.locator("#answers > li").count() == 0


def test_a_stranger_is_none_of_the_ten(visit: Visit, classifier: Classifier, pictures: list[Path]) -> None:
    classifier.ood_detector = OODDetector(torch.zeros(128), torch.eye(128), torch.zeros(1, 128), 0.0, 20)
    visitor = visit()
    visitor.choose(pictures[0])
    expected = classifier.predict(pictures[0])
    assert visitor.answer() == "None of the ten"
    visitor.sees(visitor.card(), f"Closest: {expected.label} {expected.probability:.2f}")
    visitor.sees(visitor.page.locator("#live"), f"none of the ten; closest: {expected.label}")


def test_why_shows_the_heat_map_and_the_nearest_training_images(
    visit: Visit, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = visit()
    visitor.choose(pictures[0])
    label = visitor.answer()
    why = visitor.card().get_by_role("button", name="Why?")
    why.click()
    visitor.sees(visitor.card().locator(".why"), "Nearest training images")
    assert label in (visitor.card().locator(".heat img").get_attribute("alt") or "")
    assert visitor.card().locator(".near figcaption").all_inner_texts() == [f"near {i}\n{i}.25" for i in range(3)]
    why.click()
    assert visitor.card().locator(".why").is_hidden()
    monkeypatch.setattr(responses, "describe_explanation", lambda *given: 1 / 0)
    visitor.choose(pictures[1])
    visitor.answer()
    visitor.card().get_by_role("button", name="Why?").click()
    visitor.sees(visitor.card().locator(".why"), "No explanation: ")


def test_a_stopped_server_is_a_clear_line_and_a_retry(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit()
    visitor.served.stop()
    visitor.choose(*pictures[:2])
    visitor.sees(visitor.card(), "The server does not answer.")
    visitor.sees(visitor.page.locator("#gone"), "What you see here is kept.")
    visitor.served.start()
    visitor.card(1).get_by_role("button", name="Try again").click()
    visitor.sees(visitor.card(1), "ms on the server")
    assert visitor.page.locator("#gone").is_hidden()
    visitor.sees(visitor.card(0), "No answer")
    visitor.card(0).get_by_role("button", name="Try again").click()
    visitor.sees(visitor.card(0), "ms on the server")


def test_a_busy_server_is_asked_again_when_it_said(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit()
    tried = []

    def refuse_once(route: Any) -> None:
        tried.append(time.monotonic())
        full = {"status": 503, "title": "busy", "detail": "the queue is full"}
        if len(tried) > 1:
            route.continue_()
        else:
            route.fulfill(status=503, headers={"Retry-After": "1"}, body=json.dumps(full))

    visitor.page.route("**/predict*", refuse_once)
    visitor.choose(pictures[0])
    visitor.sees(visitor.card(), "The server is busy. Asking again in 1.0 s (1 of 4).")
    visitor.sees(visitor.card(), "ms on the server")
    assert len(tried) == 2
    assert tried[1] - tried[0] >= 0.9


def test_a_server_that_wants_a_token_gets_it(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit(token=TOKEN)
    visitor.page.locator("#token").fill("not this one")
    visitor.page.keyboard.press("Enter")
    visitor.sees(visitor.page.locator("#token-form"), "not the right one")
    visitor.page.locator("#token").fill(TOKEN)
    visitor.page.keyboard.press("Enter")
    visitor.sees(visitor.page.locator("#lead"), "It tells ten apart")
    visitor.choose(pictures[0])
    visitor.sees(visitor.card(), "ms on the server")
    visitor.page.get_by_role("tab", name="About this model").click()
    with visitor.page.expect_download() as saved:
        visitor.page.get_by_role("link", name="Save the report").click()
    assert "All about it" in saved.value.path().read_text()
    assert visitor.page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_what_is_over_the_server_s_limit_is_made_smaller_and_says_so(visit: Visit, tmp_path: Path) -> None:
    visitor = visit(max_upload=200_000)
    big = tmp_path / "big.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 400, 3), np.uint8)).save(big)
    assert big.stat().st_size > 200_000
    visitor.choose(big)
    visitor.sees(visitor.card(), "Made smaller here before it was sent, from 705 kB to")
    assert visitor.answer() != "No answer"
    visitor.choose({"name": "noise.png", "mimeType": "image/png", "buffer": big.read_bytes()[1:]})
    assert visitor.answer() == "No answer"  # what the browser cannot read goes out as it is


def test_the_model_and_its_report_have_a_tab(visit: Visit) -> None:
    visitor = visit()
    visitor.page.get_by_role("tab", name="About this model").click()
    about = visitor.page.locator("#about")
    for text in (
        "94.0 %",
        "95 % confidence interval 92.9-95.0 %, n = 2,000",
        "Ankle boot",
        "tiny",
        "ab" * 32,
        "/predict",
    ):
        visitor.sees(about, text)
    visitor.sees(visitor.page.frame_locator("iframe").locator("h1"), "All about it")
    visitor.page.reload()
    assert visitor.page.get_by_role("tab", name="About this model").get_attribute("aria-selected") == "true"


def test_a_model_without_a_report_has_no_empty_frame(visit: Visit) -> None:
    visitor = visit(report=None)
    visitor.page.get_by_role("tab", name="About this model").click()
    visitor.sees(visitor.page.locator("#about"), "94.0 %")
    visitor.page.wait_for_load_state("networkidle")
    assert visitor.page.locator("iframe").count() == 0
    assert visitor.page.locator("#report-part").is_hidden()


def test_the_keyboard_reaches_everything(visit: Visit) -> None:
    visitor = visit()
    keys, focused = visitor.page.keyboard, visitor.page.locator(":focus")
    reach(visitor, "Classify")
    keys.press("ArrowRight")
    assert focused.inner_text() == "About this model"
    assert visitor.page.locator("#about").is_visible()
    keys.press("Home")
    assert visitor.page.locator("#classify").is_visible()
    reach(visitor, "Choose pictures")
    reach(visitor, "Sample: Sample 2")
    assert float(focused.evaluate("e => parseFloat(getComputedStyle(e).outlineWidth)")) >= 2
    keys.press("Enter")
    label = visitor.answer()
    reach(visitor, "Why? Sample 2")
    keys.press("Space")
    visitor.sees(visitor.card().locator(".why"), label)
    reach(visitor, "All ten")
    keys.press("Enter")
    assert visitor.card().locator(".bars li").count() == 10
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    assert focused.get_attribute("aria-label") == "Remove Sample 2"
    keys.press("Enter")
    assert focused.inner_text() == "Choose pictures"


def reach(visitor: Visitor, name: str) -> None:
    """Tab until the focus is on what is called so."""
    called = "() => document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate(called) == name:
            return
    pytest.fail(f"the Tab key never came to {name}")


@pytest.mark.parametrize("width", [320, 360, 768, 1920])
def test_no_width_needs_scrolling_sideways(width: int, visit: Visit, pictures: list[Path], damaged: Path) -> None:
    visitor = visit()
    visitor.look(viewport={"width": width, "height": 700}, has_touch=width < 500)
    long = pictures[0].rename(pictures[0].with_name(60 * "w" + ".png"))
    visitor.choose(long, damaged)
    visitor.answer()
    visitor.comes_into_view(visitor.card())
    visitor.card().get_by_role("button", name="Why?").click()
    visitor.sees(visitor.card(), "Nearest training images")
    for tab in ("Classify", "About this model"):
        visitor.page.get_by_role("tab", name=tab).click()
        assert visitor.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_motion_is_for_those_who_do_not_mind_it(visit: Visit, pictures: list[Path]) -> None:
    visitor = visit()
    for motion, seconds in (("no-preference", 0.35), ("reduce", 0)):
        visitor.look(reduced_motion=motion)
        visitor.choose(pictures[0])
        visitor.answer()
        fill = visitor.card().locator(".fill").first
        assert fill.evaluate("e => parseFloat(getComputedStyle(e).transitionDuration)") == seconds


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, out of npm's package."""
    folder, npm = tmp_path_factory.mktemp("axe"), shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    if subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, capture_output=True).returncode:
        pytest.skip("npm could not fetch axe-core")
    with tarfile.open(next(folder.glob("*.tgz"))) as package:
        script = package.extractfile("package/axe.min.js")
        assert script is not None
        return io.TextIOWrapper(script, encoding="utf-8").read()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    scheme: str, width: int, visit: Visit, axe: str, pictures: list[Path], damaged: Path
) -> None:
    visitor = visit()
    page = visitor.look(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    light = page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 249)"
    assert light == (scheme == "light")
    page.evaluate(axe)
    assert serious(page) == []
    visitor.choose(pictures[0], damaged)
    visitor.answer()
    visitor.card().get_by_role("button", name="Why?").click()
    visitor.sees(visitor.card(), "Nearest training images")
    assert serious(page) == []
    page.get_by_role("button", name="Use the camera").click()
    page.locator("#shutter:enabled").wait_for()
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="About this model").click()
    visitor.sees(page.frame_locator("iframe").locator("h1"), "All about it")
    assert serious(page) == []


def serious(page: "Page") -> list[str]:
    """Rules broken, of any impact above minor; the report's frame is sandboxed and not this page's."""
    found = page.evaluate("() => axe.run(document, {iframes: false})")
    return [
        f"{rule['id']}: {rule['nodes'][0]['html'][:120]}"
        for rule in found["violations"]
        if rule["impact"] in ("moderate", "serious", "critical")
    ]
