import base64
import gzip
import io
import json
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from attire.data.dataset import FASHION_CLASSES
from attire.data.photos import prepare
from attire.errors import UsageError
from attire.inference.prediction import Prediction
from attire.server import app, responses, service
from attire.server.app import create_app
from attire.server.content_policy import page_policy
from attire.server.settings import Settings
from tests.serving import PATIENCE, Fake, Live, head, picture, received, running, statuses

if TYPE_CHECKING:
    from attire.data.dataset import ImageDataset
    from attire.inference.classifier import Classifier

GETS = ("/samples", "/model", "/healthz", "/readyz", "/metrics", "/openapi.json")
POSTS = ("/predict", "/predict/batch", "/explain")


@pytest.fixture(scope="module")
def fake() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def live(fake: Fake) -> Iterator[Live]:
    with running(fake, max_upload=100_000, max_json=200_000) as found:
        yield found


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of a problem, in which nothing from inside the server may stand."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert set(found) == {"type", "title", "status", "detail", "code"}
    assert (found["status"], found["code"]) == (status, code)
    for inside in ("PIL", "BytesIO", "0x", "Traceback", ".py", "/home", "site-packages", "Error:"):
        assert inside not in answer.text
    return found


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_a_picture_is_answered(live: Live, kind: str) -> None:
    data = picture(7, kind=kind.upper())
    answer = live.client.post("/predict", content=data, headers={"Content-Type": f"Image/{kind}; q=1"})
    found = answer.json()
    assert answer.status_code == 200
    assert (found["label"], found["polarity"]) == (FASHION_CLASSES[7], "light on dark")
    assert found["probability"] == pytest.approx(0.91)
    assert found["ranking"][0]["label"] == FASHION_CLASSES[7]
    assert len(found["ranking"]) == 10
    assert (found["out_of_distribution"], found["distance"], found["verdict"]) == (None, None, "Sneaker")
    model_input = base64.b64decode(found["model_input"].removeprefix("data:image/png;base64,"))
    assert (prepare(model_input).image == prepare(data).image).all()
    assert found["milliseconds"] > 0


def test_every_response_carries_the_headers(live: Live) -> None:
    for answer in (live.client.get("/model"), live.client.get("/nothing"), live.post(b"x"), live.post(picture())):
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert "camera=(self)" in answer.headers["permissions-policy"]
        assert "server" not in answer.headers


@pytest.mark.parametrize("path", POSTS[:2])
def test_top_k_cuts_the_ranking(live: Live, path: str) -> None:
    body = {"images": [base64.b64encode(picture(3)).decode()]}
    if path == "/predict":
        found = live.post(picture(3), "/predict?top_k=2").json()
    else:
        found = live.client.post("/predict/batch?top_k=2", json=body).json()["predictions"][0]
    assert [len(found["ranking"]), found["ranking"][0]["label"]] == [2, FASHION_CLASSES[3]]


@pytest.mark.parametrize("top", ["0", "11", "-1", "x", "", "1.0", "１", "9" * 5000, "1&top_k=1"])
def test_a_wrong_top_k_is_refused(live: Live, top: str) -> None:
    problem(live.post(picture(), f"/predict?top_k={top}"), 400, "top_k")


def test_a_batch_is_answered_in_its_order_and_errors_stay_in_their_place(live: Live) -> None:
    parts = [picture(2), b"no picture", picture(9)]
    texts = [base64.b64encode(part).decode() for part in parts]
    answer = live.client.post("/predict/batch", json={"images": [*texts, "%%%"]})
    assert answer.status_code == 200
    first, text, last, bad = answer.json()["predictions"]
    assert (first["label"], last["label"]) == (FASHION_CLASSES[2], FASHION_CLASSES[9])
    assert (text["error"]["status"], text["error"]["code"]) == (422, "picture")
    assert (bad["error"]["status"], bad["error"]["code"]) == (422, "base64")


def test_a_batch_without_one_picture_is_answered_and_the_server_can_end(fake: Fake) -> None:
    with running(fake) as live:
        found = live.client.post("/predict/batch", json={"images": ["%", "%"]}).json()
        assert [one["error"]["code"] for one in found["predictions"]] == ["base64", "base64"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "json"),
        (b'{"images": [NaN]}', 400, "json"),
        (b"\xff\xfe", 400, "json"),
        (b"[" * 100_000, 400, "json"),
        (b"1" * 5000, 400, "json"),
        (b"[]", 422, "batch"),
        (b"{}", 422, "batch"),
        (b'{"images": "aaaa"}', 422, "batch"),
        (b'{"images": ["aaaa", 1]}', 422, "batch"),
        (b'{"images": ["aaaa"], "url": "http://localhost/"}', 422, "batch"),
        (b'{"images": []}', 422, "batch-size"),
        (json.dumps({"images": ["aaaa"] * 65}).encode(), 422, "batch-size"),
        (b" " * 200_001, 413, "body-too-large"),
        (b"", 400, "empty-body"),
    ],
)
def test_what_is_no_batch_is_refused(live: Live, body: bytes, status: int, code: str) -> None:
    headers = {"Content-Type": "application/json"}
    problem(live.client.post("/predict/batch", content=body, headers=headers), status, code)


@pytest.mark.parametrize("given", [None, "", "text/plain", "image/gif", "image/svg+xml", "multipart/form-data", "png"])
@pytest.mark.parametrize("path", POSTS)
def test_other_content_types_are_refused(live: Live, path: str, given: str | None) -> None:
    headers = {"Content-Type": given} if given is not None else {}
    answer = live.client.post(path, content=picture(), headers=headers)
    problem(answer, 415, "media-type")
    assert answer.headers["accept"].startswith("application/json" if "batch" in path else "image/png")


def test_an_encoded_body_is_refused(live: Live) -> None:
    problem(live.post(zlib.compress(picture()), **{"Content-Encoding": "deflate"}), 415, "content-encoding")


def test_an_empty_body_is_refused_however_it_is_framed(live: Live) -> None:
    problem(live.post(b""), 400, "empty-body")
    assert statuses(live.raw(head())) == [400]
    assert statuses(live.raw(head(headers=["Transfer-Encoding: chunked"]), b"0\r\n\r\n")) == [400]


def test_a_body_over_the_limit_is_refused_from_its_length_before_it_is_sent(live: Live) -> None:
    with live.connect(head(headers=["Content-Length: 100001"], close=False)) as connection:
        assert b"413" in connection.recv(4096)
        connection.sendall(b"x" * 100_001)  # is thrown away, and the connection goes on
        connection.sendall(head("GET", "/healthz"))
        assert statuses(received(connection)) == [200]
    problem(live.post(b"x" * 100_001), 413, "body-too-large")


def test_a_body_over_the_limit_is_refused_by_its_chunks(live: Live) -> None:
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    with live.connect(head(headers=["Transfer-Encoding: chunked"]), chunk * 7) as connection:
        assert b"413" in connection.recv(4096)
    assert live.service.uploads.used == 0


def test_a_body_is_not_asked_for_that_is_refused(live: Live) -> None:
    answer = live.raw(head(headers=["Content-Length: 100001", "Expect: 100-continue"], close=False))
    assert statuses(answer) == [413]  # and closed: what comes next would be taken for the body
    answer = live.raw(head(headers=[f"Content-Length: {len(picture())}", "Expect: 100-continue"]), picture())
    assert statuses(answer) == [100, 200]


def test_uploads_together_have_a_limit(fake: Fake) -> None:
    with running(fake, max_arriving=50_000) as live:
        with live.connect(head(headers=["Content-Length: 90000"]), b"x" * 40_000):
            wait_until(lambda: live.service.uploads.used == 40_000)
            problem(live.post(b"x" * 20_000), 503, "uploads-full")
            assert live.post(picture()).status_code == 200
        wait_until(lambda: live.service.uploads.used == 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels: a header, then a little of data."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 1000)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def stuffed(kind: bytes, before: bytes, size: int) -> bytes:
    """A sound picture with a chunk of metadata that expands to so many bytes."""
    data, stuff = picture(1), zlib.compress(b"\0" * size)
    return data[:33] + chunk(kind, before + stuff) + data[33:]


@pytest.mark.parametrize(("kind", "before"), [(b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")])
@pytest.mark.parametrize("count", [1, 8])
def test_metadata_that_expands_fills_no_memory(live: Live, kind: bytes, before: bytes, count: int) -> None:
    """80 MB behind 80 kB, in one piece or in eight: refused, or passed over."""
    data = stuffed(kind, before, 80_000_000 // count)
    end = data.index(b"IDAT") - 4
    data = data[:33] + count * data[33:end] + data[end:]
    tracemalloc.start()
    try:
        assert live.post(data).status_code in (200, 422)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


def flipped() -> bytes:
    data = bytearray(picture(1))
    data[45] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        gzip.compress(picture(), mtime=0),
        b"<html></html>",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a" + bytes(50),
        picture()[:60],
        picture(side=200, kind="JPEG")[:300],
        flipped(),
        bomb(50_000, 50_000),
        bomb(1, 1),
        bomb(1, 20_000),
        bomb(7000, 7000),
        animated(),
        b"file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_what_is_no_sound_picture_is_refused_in_words(live: Live, path: str, data: bytes) -> None:
    assert problem(live.post(data, path), 422, "picture")["detail"]
    assert live.service.predictions.waiting == 0


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/predict/", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//", "/report%00", "/samples/../model",
     "/static/..%5c..%5cwin.ini", "/predict%2Fbatch/x", "/" + "a" * 4000],
)  # fmt: skip
def test_unknown_paths_and_traversals_find_nothing(live: Live, path: str) -> None:
    answer = live.raw(head("GET", path))
    assert statuses(answer) == [404]
    assert b"root:" not in answer


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", [*GETS, *POSTS, "/", "/report"])
def test_wrong_methods_are_refused_with_the_right_ones(live: Live, path: str, method: str) -> None:
    answer = live.client.request(method, path)
    problem(answer, 405, "method")
    assert set(answer.headers["allow"].split(", ")) == ({"POST"} if path in POSTS else {"GET", "HEAD"})


def test_a_stalled_body_times_out(fake: Fake) -> None:
    with running(fake, stall_seconds=0.1) as live:
        answer = live.raw(head(headers=["Content-Length: 100"], close=False), b"x" * 10)
        assert statuses(answer) == [408]
        assert b"connection: close" in answer
        assert live.service.uploads.used == 0


def test_a_body_that_trickles_times_out_as_a_whole(fake: Fake) -> None:
    with running(fake, body_seconds=0.3) as live, live.connect(head(headers=["Content-Length: 100000"])) as connection:
        over = threading.Event()

        def trickle() -> None:
            while not over.wait(0.02):
                connection.sendall(b"x")

        with ThreadPoolExecutor(1) as pool:
            trickling = pool.submit(trickle)
            try:
                assert b"408" in connection.recv(4096)
            finally:
                over.set()
            trickling.exception(PATIENCE)  # the server may have closed in the middle of a write


def test_a_full_queue_refuses_before_the_body_is_there_and_the_rest_goes_on(fake: Fake) -> None:
    with running(fake, max_queue=2) as live, ThreadPoolExecutor(3) as pool:
        fake.shut()
        asked = [pool.submit(live.post, picture(i)) for i in range(2)]
        wait_until(lambda: live.service.predictions.waiting == 2)
        with live.connect(head(headers=["Content-Length: 50000"])) as connection:
            told = connection.recv(4096)
        assert statuses(told) == [503]
        assert b"retry-after: 1" in told
        problem(live.post(picture()), 503, "queue-full")
        problem(live.client.post("/predict/batch", json={"images": ["aaaa"]}), 503, "queue-full")
        problem(live.post(picture(), "/explain"), 503, "queue-full")
        assert live.client.get("/healthz").json() == {"status": "ok"}
        assert live.client.get("/readyz").status_code == 200
        fake.gate.set()
        assert [future.result().json()["label"] for future in asked] == list(FASHION_CLASSES[:2])
        assert live.post(picture()).status_code == 200


def test_a_batch_takes_its_room_as_a_whole(fake: Fake) -> None:
    with running(fake, max_queue=3) as live, ThreadPoolExecutor(1) as pool:
        fake.shut()
        asked = pool.submit(live.post, picture(1))
        wait_until(lambda: live.service.predictions.waiting == 1)
        body = {"images": [base64.b64encode(picture(i)).decode() for i in range(3)]}
        problem(live.client.post("/predict/batch", json=body), 503, "queue-full")
        fake.gate.set()
        assert asked.result().status_code == 200
        assert len(live.client.post("/predict/batch", json=body).json()["predictions"]) == 3


def test_after_the_deadline_no_model_time_is_spent(fake: Fake) -> None:
    with running(fake, seconds=0.3) as live, ThreadPoolExecutor(1) as pool:
        fake.shut()
        running_one = pool.submit(live.post, picture(1))
        assert fake.entered.acquire(timeout=PATIENCE)
        problem(live.post(picture(2)), 503, "deadline")
        problem(running_one.result(), 503, "deadline")
        fake.gate.set()
        wait_until(lambda: live.service.predictions.waiting == 0)
        assert fake.batches == [1]  # the second never reached it


def test_whoever_leaves_while_waiting_costs_no_model_time(fake: Fake) -> None:
    with running(fake) as live, ThreadPoolExecutor(1) as pool:
        fake.shut()
        asked = pool.submit(live.post, picture(1))
        assert fake.entered.acquire(timeout=PATIENCE)
        with live.connect(head(headers=[f"Content-Length: {len(picture())}"]), picture()):
            wait_until(lambda: live.service.predictions.waiting == 2)
        with live.connect(head(headers=["Content-Length: 1000"]), picture()):
            wait_until(lambda: live.service.uploads.used == 2 * len(picture()))  # and leaves in the middle of the body
        wait_until(lambda: live.service.uploads.used == len(picture()))
        assert b'route="/predict",status="499"} 2.0' in live.service.metrics.text()
        fake.gate.set()
        assert asked.result().status_code == 200
        wait_until(lambda: live.service.predictions.waiting == 0)
        assert fake.batches == [1]


def test_a_failure_inside_says_nothing_and_the_server_goes_on(fake: Fake, live: Live, caplog: Any) -> None:
    fake.error = ValueError("secret of /home/someone")
    try:
        problem(live.post(picture()), 500, "failed")
        images = [base64.b64encode(picture()).decode()]
        problem(live.client.post("/predict/batch", json={"images": images}), 500, "failed")
    finally:
        fake.error = None
    assert "secret of" in caplog.text
    assert live.post(picture()).status_code == 200


def test_an_explanation_is_a_prediction_and_more(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def explanation(classifier: Any, answer: responses.Answer) -> dict[str, Any]:
        asked.append((classifier, answer.model_input.image.shape, answer.prediction.label))
        return {"heat_map": "data:image/png;base64,aaaa", "method": "by hand", "neighbours": []}

    monkeypatch.setattr(responses, "describe_explanation", explanation)
    found = live.post(picture(4), "/explain?top_k=1").json()
    assert (found["label"], found["method"], len(found["ranking"])) == (FASHION_CLASSES[4], "by hand", 1)
    ((classifier, shape, label),) = asked
    assert (shape, label) == ((28, 28), FASHION_CLASSES[4])
    assert classifier is live.service._explaining_copy is not live.service.classifier


def test_explaining_has_a_queue_of_its_own(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(responses, "describe_explanation", lambda *_: {"method": str(gate.wait(PATIENCE))})
    with running(fake, max_explain=1) as live, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(live.post, picture(), "/explain")
        wait_until(lambda: live.service.explanations.waiting == 1)
        problem(live.post(picture(), "/explain"), 503, "queue-full")
        assert live.post(picture()).status_code == 200
        gate.set()
        assert asked.result().json()["method"] == "True"


def test_explaining_works_on_modules_of_its_own_with_the_same_weights(classifier: "Classifier") -> None:
    own = service._copy_sharing_weights(classifier)
    pairs = list(zip(own.model.modules(), classifier.model.modules(), strict=True))
    assert all(mine is not theirs for mine, theirs in pairs)
    weights = zip(own.model.parameters(), classifier.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in weights)


def test_batched_answers_are_the_single_ones(classifier: "Classifier", synthetic: "ImageDataset") -> None:
    pictures = []
    for image in synthetic.images[:17]:
        out = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(out, "PNG")
        pictures.append(out.getvalue())
    texts = [base64.b64encode(data).decode() for data in pictures]
    with running(classifier) as live:
        single = [live.post(data).json() for data in pictures]
        for count in range(1, 18):
            found = live.client.post("/predict/batch", json={"images": texts[:count]}).json()["predictions"]
            assert [one["label"] for one in found] == [one["label"] for one in single[:count]]
            for one, alone in zip(found, single, strict=False):
                assert one["probability"] == pytest.approx(alone["probability"], abs=1e-5)
        with ThreadPoolExecutor(8) as pool:
            together = [answer.json() for answer in pool.map(live.post, pictures)]
    assert [one["label"] for one in together] == [one["label"] for one in single]
    assert len({one["probability"] for one in single}) == 17


def test_requests_that_wait_share_a_forward_pass(fake: Fake) -> None:
    with running(fake, max_batch=4) as live, ThreadPoolExecutor(8) as pool:
        fake.shut()
        first = pool.submit(live.post, picture(1))
        assert fake.entered.acquire(timeout=PATIENCE)
        rest = [pool.submit(live.post, picture(i)) for i in range(7)]
        wait_until(lambda: live.service.predictions._ready.qsize() == 7)
        fake.gate.set()
        assert [future.result().json()["label"] for future in rest] == list(FASHION_CLASSES[:7])
        assert first.result().status_code == 200
        assert fake.batches == [1, 4, 3]


def test_metrics_count_and_hold_nothing_of_the_clients(live: Live) -> None:
    live.post(picture())
    live.client.request("BREW", "/secret-path")
    live.client.request("BREW", "/predict")
    answer = live.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'attire_requests_total{method="POST",route="/predict",status="200"}' in answer.text
    assert 'attire_requests_total{method="other",route="other",status="404"}' in answer.text
    assert "attire_waiting_images 0.0" in answer.text
    assert "secret" not in answer.text
    assert "BREW" not in answer.text


def test_the_model_s_card_says_what_it_is_and_passes_on_nothing_else(live: Live) -> None:
    found = live.client.get("/model").json()
    assert found["classes"] == list(FASHION_CLASSES)
    assert found["limits"]["upload_bytes"] == 100_000
    assert "someone" not in json.dumps(found)


def test_the_page_and_the_report_have_policies_of_their_own(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<style>p { color: red }</style><script>alert(1)</script>"
    monkeypatch.setattr(app, "_read_page", lambda: app._html_response(text, page_policy(text)))
    with running(fake, report="<p>report</p>") as live:
        page, report = live.client.get("/"), live.client.get("/report")
        assert page.text == text
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert report.text == "<p>report</p>"
        assert "frame-ancestors 'self'" in report.headers["content-security-policy"]
        assert "script" not in report.headers["content-security-policy"]
    with running(fake) as live:
        problem(live.client.get("/report"), 404, "report")


def test_the_description_knows_every_path_and_method(live: Live) -> None:
    told = live.client.get("/openapi.json").json()["paths"]
    routes = {
        (route.path, method.lower())
        for route in app._Endpoints(live.service).routes()
        for method in set(route.methods or ()) - {"HEAD"}
    }
    assert {(path, method) for path, methods in told.items() for method in methods} == routes


def test_when_draining_it_is_not_ready_and_connections_end(fake: Fake) -> None:
    with running(fake) as live:
        assert "connection" not in live.post(picture()).headers
        live.service.start_draining()
        answer = live.client.get("/readyz")
        problem(answer, 503, "draining")
        assert answer.headers["connection"] == "close"
        answer = live.post(picture())
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("settings", [{"max_queue": 0}, {"max_batch": 0}, {"token": "short"}, {"threads": -1}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**settings)


def test_small_queues_take_small_batches() -> None:
    assert (Settings(max_queue=5).batch_images, Settings().batch_images) == (5, 64)


@pytest.mark.parametrize(
    ("probability", "words"),
    [(0.95, "Trouser"), (0.7, "probably Trouser; else Coat"), (0.4, "perhaps Trouser; else Coat")],
)
def test_the_verdict_says_how_sure_it_is(probability: float, words: str) -> None:
    ranking = (("Trouser", probability), ("Coat", 1 - probability))
    prediction = Prediction("Trouser", probability, ranking)
    assert responses._verdict(prediction) == words
    rejected = Prediction("Trouser", probability, ranking, 30.0, True)
    assert responses._verdict(rejected) == f"none of the two (closest: Trouser {probability:.2f})"


def test_websockets_are_not_spoken(fake: Fake, live: Live) -> None:
    told = head("GET", "/predict", ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"])
    assert statuses(live.raw(told)) == [405]


def test_an_app_is_plain_asgi(fake: Fake) -> None:
    assert create_app(fake).state.service.settings == Settings()  # type: ignore[arg-type]
