import base64
import hashlib

from attire.server import content_policy
from attire.server.content_policy import page_policy


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_a_policy_allows_what_is_in_the_page_and_nothing_else() -> None:
    script, style = "\nlet a = '<b>' && 1 < 2;\n", "p > a { color: red }"
    text = f"<style>{style}</style><p style='top: 1px'>a</p><script>{script}</script><script>{script}</script>"
    directives = dict(part.split(" ", 1) for part in page_policy(text).split("; "))
    assert (
        directives["default-src"]
        == directives["frame-ancestors"]
        == directives["base-uri"]
        == directives["form-action"]
        == "'none'"
    )
    assert directives["script-src"] == digest(script)
    assert directives["style-src"] == f"{digest(style)} 'unsafe-hashes' {digest('top: 1px')}"
    assert "unsafe-inline" not in page_policy(text)


def test_a_page_without_scripts_allows_none() -> None:
    assert "script-src 'none'; style-src 'none'" in page_policy("<p>a</p>")


def test_digests_are_of_what_a_browser_reads() -> None:
    assert content_policy._digests(["a\r\nb\rc"]) == [digest("a\nb\nc")]
