"""A web server on 127.0.0.1 whose faults a test chooses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Route = Callable[[BaseHTTPRequestHandler], object]


class Mirror:
    """`routes` maps paths to faults or contents; `requests` lists each path with its Range header."""

    def __init__(self, port: int, routes: dict[str, Route]) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.routes = routes
        self.requests: list[tuple[str, str | None]] = []


@contextmanager
def serve() -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.requests.append((self.path, self.headers["Range"]))
            route = mirror.routes.get(self.path)
            if route is None:
                self.send_error(404)
            else:
                route(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    mirror = Mirror(server.server_port, {})
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def content(data: bytes, cut: int | None = None, ranges: bool = True) -> Route:
    """Serve `data`, from the middle when asked; close the connection after `cut` bytes of each answer."""

    def route(request: BaseHTTPRequestHandler) -> None:
        start = int((request.headers["Range"] or "bytes=0-")[6:-1]) if ranges else 0
        if start and start >= len(data):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start:][:cut])

    return route


def raw(body: bytes, *headers: str) -> Route:
    """These header lines and this body, however they contradict each other."""

    def route(request: BaseHTTPRequestHandler) -> None:
        lines = ["HTTP/1.1 200 OK", *headers, "Connection: close", "", ""]
        request.wfile.write("\r\n".join(lines).encode() + body)
        request.close_connection = True

    return route
