import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from attire.errors import AttireError
from attire.server import listener
from tests.command import attire
from tests.serving import PATIENCE, Fake, Live, head, picture, received, running, statuses

ROOT = Path(__file__).parents[2]
BODY = picture(5)
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(Fake()) as found:
        yield found


def problems(answer: bytes) -> list[str]:
    return [json.loads(body)["code"] for body in re.findall(rb"\r\n\r\n(\{[^}]*\})", answer)]


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([head(headers=[LENGTH, "Transfer-Encoding: chunked"]), b"0\r\n\r\n"], 400),
        ([head(headers=[LENGTH, "Content-Length: 3"]), BODY], 400),
        ([head(headers=["Content-Length: 3, 4"]), b"abcd"], 400),
        ([head(headers=["Content-Length: +3"]), b"abc"], 400),
        ([head(headers=["Content-Length: -1"])], 400),
        ([head(headers=["Content-Length: 0x3"]), b"abc"], 400),
        ([head(headers=["Transfer-Encoding: gzip, chunked"]), b"0\r\n\r\n"], 501),
        ([head(headers=["Transfer-Encoding: xchunked"]), b"0\r\n\r\n"], 501),
        ([head(headers=["Transfer-Encoding : chunked"]), b"0\r\n\r\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"zz\r\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"-1\r\n"], 400),
        ([head(headers=["X: a\0b"])], 400),
        ([head(headers=["X: " + "a" * 20_000])], 431),
        ([head(headers=[f"X{i}: a" for i in range(5000)])], 431),
        ([head("GET", "/" + "a" * 20_000)], 431),
        ([b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"], 400),
        ([b"GET / HTTP/1.1\r\n\r\n"], 400),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"], 400),
        ([b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n"], 400),
        ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400),
        ([b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"], 400),
        ([b"GET /healthz\r\n\r\n"], 400),
        ([b"GET  /healthz  HTTP/1.1\r\nHost: localhost\r\n\r\n"], 400),
        ([b"GET\t/healthz\tHTTP/1.1\r\nHost: localhost\r\n\r\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"]), CHUNKED], 501),
        ([head(headers=["Transfer-Encoding: chunked, identity"]), CHUNKED], 501),
        ([head(headers=["Transfer-Encoding: \x0bchunked"]), CHUNKED], 400),
        ([head(headers=["Transfer-Encoding:\r\n chunked", LENGTH]), BODY], 400),
        ([head(headers=["X: a\rTransfer-Encoding: chunked", LENGTH]), BODY], 400),
        ([head(headers=[": a", LENGTH]), BODY], 400),
        ([head(headers=["X\0: a", LENGTH]), BODY], 400),
        ([head(headers=["Content-Length: 1_0"]), BODY], 400),
        ([head(headers=["Content-Length: ７"]), BODY], 400),
        ([head(headers=["Content-Length: " + "9" * 30]), BODY], 400),
        ([head(headers=[f"Content-Length : {len(BODY)}"]), BODY], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"0x5\r\nabcde\r\n0\r\n\r\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"+5\r\nabcde\r\n0\r\n\r\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"5\nabcde\n0\n\n"], 400),
        ([head(headers=["Transfer-Encoding: chunked"]), b"5\r\nabcdeXX0\r\n\r\n"], 400),
    ],
)
def test_what_is_no_sound_http_ends_the_connection(
    live: Live, parts: list[bytes], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    second = head("GET", "/healthz")  # would be answered if the first request had another end than the server saw
    answer = live.raw(b"".join(parts) + second)
    assert statuses(answer) == [status]
    assert b"content-type: application/problem+json" in answer
    assert problems(answer)[0] in ("http", "framing")
    assert not caplog.records  # nobody can fill a log with what is no HTTP


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Transfer-Encoding:\tchunked"], b""),
        (["transfer-ENCODING: ChunKed"], b""),
        ([f"Content-Length: 000{len(BODY)}"], BODY),
        ([LENGTH, LENGTH], BODY),
        ([LENGTH, "X: a", "\tTransfer-Encoding: chunked"], BODY),  # an old form of a long header: part of X
        ([LENGTH, "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"], BODY),
    ],
)
def test_odd_but_sound_framing_has_the_end_that_it_says(live: Live, headers: list[str], body: bytes) -> None:
    answer = live.raw(head(headers=headers, close=False) + (body or CHUNKED) + head("GET", "/nothing"))
    assert statuses(answer) == [200, 404]


def test_what_follows_the_last_chunk_changes_nothing(live: Live) -> None:
    trailer = CHUNKED.removesuffix(b"\r\n") + b"Content-Length: 5\r\nHost: evil\r\nAuthorization: x\r\n\r\n"
    sent = head(headers=["Transfer-Encoding: chunked"], close=False) + trailer + head("GET", "/nothing")
    assert statuses(live.raw(sent)) == [200, 404]


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://evil.example/healthz", "localhost", 404),  # a proxy's form: we are none, and nothing lies there
        ("http://localhost/healthz", "evil.example", 421),
        ("evil.example:443", "localhost", 404),
        ("//evil.example/healthz", "localhost", 404),
        ("/healthz#x", "localhost", 404),
        ("/healthz", "localhost:99999999", 400),
        ("/healthz", "localhost\tevil.example", 400),
        ("/healthz", "user@localhost", 400),
        ("/healthz", "localhost#@evil.example", 400),
        ("/healthz", "xn--localhost-", 421),
        ("/healthz", "0x7f000001", 421),
        ("/healthz", "127.1", 421),
        ("/healthz", "localhost.", 421),
    ],
)
def test_who_is_meant_is_what_the_host_header_says_and_nothing_else(
    live: Live, target: str, host: str, status: int
) -> None:
    answer = live.raw(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert statuses(answer) == [status]


def test_whoever_sends_slowly_keeps_nobody_waiting(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred heads that never end; a request beside them is answered, and they are sent away."""
    monkeypatch.setattr(listener, "_HEAD_SECONDS", 1.0)
    with ExitStack() as held:
        slow = [held.enter_context(live.connect(b"GET / HTTP/1.1\r\nX: ")) for _ in range(200)]
        assert statuses(live.raw(head(headers=[LENGTH]) + BODY)) == [200]
        for connection in slow:
            with suppress(ConnectionError):  # one that was closed already
                connection.sendall(b"a")
        assert {tuple(statuses(received(connection))) for connection in slow} <= {(408,), ()}


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    first = head(headers=[LENGTH], close=False) + BODY
    assert statuses(live.raw(first, first, head("GET", "/nothing"))) == [200, 200, 404]


def test_headers_that_do_not_end_time_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_HEAD_SECONDS", 0.1)
    answer = live.raw(b"GET / HTTP/1.1\r\nHost: local")
    assert (statuses(answer), problems(answer)) == ([408], ["slow-head"])
    assert live.raw() == b""  # nothing was asked, nothing is said
    again = live.raw(head(headers=[LENGTH], close=False) + BODY, b"GET / HT")
    assert statuses(again) == [200, 408]


def test_the_rest_of_a_refused_body_has_a_time_limit(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_LINGER_SECONDS", 0.1)
    answer = live.raw(head(headers=["Content-Length: 999999999"], close=False), b"x" * 1000)
    assert statuses(answer) == [413]


def test_connections_have_a_limit(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_CONNECTIONS", 0)
    with suppress(ConnectionError):
        assert live.raw(head("GET", "/healthz")) == b""
    monkeypatch.undo()
    assert statuses(live.raw(head("GET", "/healthz"))) == [200]


def test_a_port_in_use_is_one_line() -> None:
    with listener.bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(AttireError, match=rf"^127\.0\.0\.1:{port}: the port is in use; give another to --port"):
            listener.bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300, ""])
def test_an_address_that_is_not_here_is_one_line(host: str) -> None:
    with pytest.raises(AttireError, match=r"no such address|cannot listen there"):
        listener.bind(host or "\0", 0)


def test_the_url_has_the_port_that_was_found() -> None:
    with listener.bind("127.0.0.1", 0) as found:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", listener.url_of(found))


@contextmanager
def served(bundle: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`attire serve` in a process of its own, and the line it begins with."""
    run = "from attire.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", run, "serve", str(bundle), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        assert process.stdout
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def port_of(line: str) -> int:
    found = re.fullmatch(r"Attire 0\.1 on http://127\.0\.0\.1:(\d+)   model (\S.*)   stop with Ctrl-C\n", line)
    assert found, line
    return int(found[1])


def test_sigterm_under_load_loses_no_accepted_request(bundle: Path) -> None:
    """Accepted: sent whole on a connection that was open. Each client goes on until it can no longer connect."""
    with served(bundle) as (process, line):
        port, answers, lost = port_of(line), [0] * 6, [0] * 6
        going, not_ready = threading.Event(), threading.Event()

        def client(number: int) -> None:
            while True:
                try:
                    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
                except OSError:
                    return
                with connection:
                    open_still = True
                    while open_still:
                        connection.sendall(head(headers=[LENGTH], close=False) + BODY)
                        answer = b""
                        while b"}" not in answer[-4:] and (part := connection.recv(65536)):
                            answer += part
                        if statuses(answer) == [200]:
                            answers[number] += 1
                        else:
                            lost[number] += 1
                        open_still = bool(answer) and b"connection: close" not in answer
                going.set()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        while min(answers) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as probe:
            end = time.monotonic() + PATIENCE
            while not not_ready.is_set() and time.monotonic() < end:
                try:
                    if probe.get("/readyz").status_code == 503:
                        not_ready.set()
                except httpx.TransportError:
                    break
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert process.wait(PATIENCE) == 0
        assert process.stderr
        assert process.stderr.read() == ""
        assert not_ready.is_set()
        assert lost == [0] * 6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel may still take one")
def test_who_was_taken_is_answered_and_who_comes_later_is_refused() -> None:
    with listener.bind("127.0.0.1", 0) as found:
        found.listen(16)
        found.settimeout(PATIENCE)
        taken = [socket.create_connection(found.getsockname(), PATIENCE) for _ in range(3)]
        listener._refuse_new_connections(found)
        with pytest.raises(TimeoutError):  # dropped, not reset: the socket is still open
            socket.create_connection(found.getsockname(), 0.2)
        accepted = [found.accept()[0] for _ in taken]
        for ours, theirs in zip(taken, accepted, strict=True):
            ours.sendall(b"asked")
            assert theirs.recv(5) == b"asked"
            theirs.sendall(b"told")
            assert ours.recv(4) == b"told"
            ours.close()
            theirs.close()


def test_ctrl_c_ends_it_in_one_line(bundle: Path) -> None:
    with served(bundle, "--access-log") as (process, line):
        assert httpx.get(f"http://127.0.0.1:{port_of(line)}/healthz", trust_env=False).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr
        access, last = process.stderr.read().splitlines()
        assert json.loads(access)["path"] == "/healthz"
        assert last == "attire serve: stopped; every accepted request was answered"


def test_a_token_from_the_environment_is_wanted(bundle: Path) -> None:
    right = {"Authorization": "Bearer 0123456789abcdef"}
    with served(bundle, ATTIRE_TOKEN="0123456789abcdef") as (_, line):
        url = f"http://127.0.0.1:{port_of(line)}/model"
        assert httpx.get(url, trust_env=False).status_code == 401
        assert httpx.get(url, headers=right, trust_env=False).status_code == 200


@pytest.mark.parametrize("port", ["70000", "-1", "x"])
def test_a_port_that_cannot_be_is_a_usage_error(bundle: Path, port: str) -> None:
    done = attire("serve", bundle, "--port", port)
    assert done.status == 2
    assert "--port" in done.error


def test_serve_ends_with_one_line_where_it_cannot_begin(bundle: Path, tmp_path: Path) -> None:
    with listener.bind("127.0.0.1", 0) as taken:
        taken.listen()
        done = attire("serve", bundle, "--port", taken.getsockname()[1])
        assert (done.status, "the port is in use" in done.error) == (1, True)
    assert attire("serve", tmp_path / "nothing", "--port", 0).status == 1
    for text, told in (("", "holds no token"), ("short\n", "shorter than 16 characters")):
        (tmp_path / "token").write_text(text)
        assert told in attire("serve", bundle, "--port", 0, "--token-file", tmp_path / "token").error
    done = attire("serve", bundle, "--port", 0, "--token-file", tmp_path / "none")
    assert (done.status, "cannot read the token" in done.error) == (1, True)


def test_a_half_closed_connection_is_over(live: Live) -> None:
    with live.connect(head(headers=["Content-Length: 10"])) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert received(connection) == b""
