"""The Content-Security-Policy of a page whose scripts and styles are inside it."""

from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser


class _InlineParts(HTMLParser):
    """The parts inside a page that its policy must allow: scripts, styles and style attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.attributes: list[str] = []
        self._open: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [value for name, value in attrs if name == "style" and value]
        self._open = {"script": self.scripts, "style": self.styles}.get(tag)
        if self._open is not None:
            self._open.append("")

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def page_policy(html: str) -> str:
    """The Content-Security-Policy of a page: it may use its inline parts, named by digest, and this server only."""
    inline = _InlineParts(html)
    attributes = ["'unsafe-hashes'", *_digests(inline.attributes)] if inline.attributes else []
    parts = {
        "default-src": ["'none'"],
        "script-src": _digests(inline.scripts) or ["'none'"],
        "style-src": [*_digests(inline.styles), *attributes] or ["'none'"],
        "img-src": ["'self'", "data:", "blob:"],
        "media-src": ["blob:"],
        "connect-src": ["'self'"],
        "frame-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return "; ".join(f"{name} {' '.join(values)}" for name, values in parts.items())


def _digests(texts: list[str]) -> list[str]:
    """Of each text once. Browsers turn CR LF into LF before they take a digest."""
    lines = dict.fromkeys(text.replace("\r\n", "\n").replace("\r", "\n") for text in texts)
    return [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in lines]
