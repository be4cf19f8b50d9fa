from collections.abc import Iterator

import pytest

from attire.server import guards
from tests.serving import Fake, Live, picture, running

TOKEN = "0123456789abcdef-ü"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(Fake(), hosts=("localhost", "127.0.0.1", "[::1]", "Garments.example")) as found:
        yield found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("garments.example", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("2130706433", 421),
        ("[::2]", 421),
        ("localhost@evil.example", 400),
        ("localhost:80:80", 400),
        ("localhost, evil.example", 400),
        ("localhost/..", 400),
        ("", 400),
    ],
)
def test_only_known_hosts_are_answered(live: Live, host: str, status: int) -> None:
    answer = live.client.get("/healthz", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or answer.json()["code"] == "host"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "anything"},
    ],
)
def test_pages_of_other_sites_cannot_ask(live: Live, headers: dict[str, str]) -> None:
    answer = live.post(picture(), **headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "origin")
    assert live.client.get("/healthz", headers=headers).status_code == 200


def test_its_own_page_and_programs_can_ask(live: Live) -> None:
    own = {"Origin": f"http://127.0.0.1:{live.port}", "Sec-Fetch-Site": "same-origin"}
    assert live.post(picture(), **own).status_code == 200
    assert live.post(picture(), **{"Sec-Fetch-Site": "none"}).status_code == 200
    assert live.post(picture()).status_code == 200


def test_a_token_is_wanted_for_all_that_is_not_open() -> None:
    with running(Fake(), token=TOKEN) as live:
        for path in ("/model", "/samples", "/metrics", "/report", "/nothing"):
            answer = live.client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (401, "token")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert live.client.get("/healthz").status_code == 200
        assert live.client.get("/readyz").status_code == 200
        assert live.client.get("/openapi.json").json()["security"] == [{"bearer": []}]
        for wrong in ("", "Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"):
            assert live.client.get("/model", headers={b"Authorization": wrong.encode()}).status_code == 401
        for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
            assert live.client.get("/model", headers={b"Authorization": right.encode()}).status_code == 200
            headers = {b"Authorization": right.encode(), b"Content-Type": b"image/png"}
            assert live.client.post("/predict", content=picture(), headers=headers).status_code == 200


def test_a_log_line_cannot_be_broken() -> None:
    scope = {"method": "GET", "path": '/a\n{"status": 200}' + "x" * 1000}
    line = guards._access_line(scope, 404, 0.001)
    assert "\n" not in line
    assert len(line) < 400
