"""A server that can be stopped and started again, and a browser's tab on its page, with what goes wrong in it."""

import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from attire.inference.classifier import Classifier
from attire.server.app import create_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PATIENCE = 20.0  # seconds; only a test that fails waits so long
SAID = "Failed to load resource"  # how Chromium's console tells of an answer that is not 2xx: wanted in some tests


class Served:
    """The app on a port of its own, which it keeps when it is stopped and started again."""

    def __init__(self, classifier: Classifier, **settings: Any) -> None:
        self.classifier, self.settings, self.port = classifier, settings, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        app = create_app(self.classifier, **self.settings)
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listening]})
        self.thread.start()
        end = time.monotonic() + PATIENCE
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


class Visitor:
    """A browser tab on the page of a server, and what went wrong in it."""

    def __init__(self, browser: "Browser", classifier: Classifier, **settings: Any) -> None:
        self.served = Served(classifier, **settings)
        self.browser, self.wrong, self.elsewhere = browser, list[str](), list[str]()
        self.page = self.look()

    def look(self, **how: Any) -> "Page":
        """Another tab, in another window size or colour scheme."""
        self.page = page = self.browser.new_context(**how).new_page()
        page.on("console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda asked: self.elsewhere.append(asked.url))
        page.goto(self.served.url)
        if self.served.settings.get("token") is None:
            self.sees(page.locator("#lead"), "It tells ten apart")
        return page

    def sees(self, where: "Locator", text: str) -> None:
        from playwright.sync_api import expect

        expect(where).to_contain_text(text)

    def comes_into_view(self, what: "Locator") -> None:
        from playwright.sync_api import expect

        expect(what).to_be_in_viewport()

    def choose(self, *files: Path | dict[str, Any]) -> None:
        self.page.set_input_files("#files", list(files))  # type: ignore[arg-type]

    def card(self, index: int = 0) -> "Locator":
        return self.page.locator("#answers > li").nth(index)

    def answer(self, index: int = 0) -> str:
        """The heading of an answer, once it is there."""
        from playwright.sync_api import expect

        expect(self.page.locator("[aria-busy]")).to_have_count(0)
        return self.card(index).locator("h3").inner_text()

    def leave(self) -> None:
        for context in self.browser.contexts:
            context.close()
        self.served.stop()
        foreign = [url for url in self.elsewhere if not url.startswith((self.served.url, "data:", "blob:"))]
        assert not foreign
        assert not [line for line in self.wrong if not line.startswith(SAID)]
