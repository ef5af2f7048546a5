"""Headless Chromium through its debugging pipe: NUL-ended JSON on two file descriptors, no port, no library.

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_DEADLINE = 60.0


@dataclass
class Browser:
    """A running Chromium; one page at a time."""

    to: int
    back: int
    sent: int = 0
    buffer: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        os.write(self.to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer["error"])
                found: dict[str, Any] = answer["result"]
                return found

    def receive(self, patience: float = _DEADLINE) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium doesn't answer"
            data = os.read(self.back, 1 << 20)
            assert data, "Chromium has gone"
            self.buffer += data
        whole, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        if "method" in message:
            self.events.append(message)
        return message

    @contextlib.contextmanager
    def page(
        self, path: Path, width: int, height: int = 900, scheme: Literal["light", "dark"] = "light"
    ) -> Iterator[Page]:
        """The file, loaded, in a window of this many CSS pixels."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, path)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        phone = width < 500
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        page.call("Emulation.setEmulatedMedia", features=media)
        page.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        yield page
        self.call("Target.closeTarget", targetId=target)


@dataclass
class Page:
    """A loaded page."""

    browser: Browser
    session: str
    path: Path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and what the page's policy refused."""
        self.value("1")  # whatever was on its way has come
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.browser.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for the page itself and what lies within it."""
        asked = [e["params"]["request"]["url"] for e in self.browser.events if e["method"] == _ASKED]
        return [url for url in asked if url != self.path.as_uri() and not url.startswith("data:")]

    def screenshot(self, to: Path) -> None:
        """The whole page as PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(taken["data"]))


_ASKED = "Network.requestWillBeSent"


@contextlib.contextmanager
def chromium(program: str) -> Iterator[Browser]:
    """Start it, and end it."""
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    arguments = [
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
    ]
    arguments += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        # The pipe is to be on descriptors 3 and 4, which the shell puts in place.
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["bash", "-c", script, program, *arguments, f"--user-data-dir={home}/profile"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            browser = Browser(to, back)
            yield browser
            with contextlib.suppress(AssertionError, OSError):
                browser.call("Browser.close")
        finally:
            os.close(to)
            os.close(back)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
