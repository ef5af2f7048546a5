"""A headless Chromium to look at pages with, through its own debugging protocol."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    """Path of an installed Chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was looked at."""

    width: int  # of the window
    needed: int  # of the document: more than `width` has to be scrolled sideways
    overflowing: list[str]  # elements that stick out of the window, those that scroll by themselves aside
    requests: list[str]  # addresses asked for, that of the page and data: aside
    complaints: list[str]  # errors and warnings of the console, and exceptions
    facts: Any = None  # what the script gave


OUTSIDE = """(() => [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  const scrolls = e.closest('.wide, pre, svg, script, .tip');
  return box.width && box.right > innerWidth + 1 && !scrolls;
}).map(e => e.outerHTML.slice(0, 80)))()"""


def look(page: Path, width: int, script: str = "null") -> Seen:
    """Open `page` in a window of `width` pixels, run `script`, and tell what happened."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            str(program()), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0",
            f"--user-data-dir={profile}", f"--window-size={width},900", "about:blank",
        ]  # fmt: skip
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(_look(Path(profile), page, width, script))
        finally:
            browser.terminate()
            browser.wait(20)


async def _look(profile: Path, page: Path, width: int, script: str) -> Seen:
    port_file = profile / "DevToolsActivePort"
    for _ in range(300):
        if port_file.exists() and len(port_file.read_text().split("\n")) >= 2:
            break
        await asyncio.sleep(0.1)
    port = port_file.read_text().split("\n")[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            [target] = [each for each in await answer.json() if each["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 27) as socket:
            return await _Talk(socket).look(page, width, script)


class _Talk:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number, self.events = socket, 0, list[dict[str, Any]]()

    async def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            told = await self.socket.receive_json(timeout=60)
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    async def value(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def look(self, page: Path, width: int, script: str) -> Seen:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **phone)
        await self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self.socket.receive_json(timeout=60))
        facts = await self.value(script)
        needed = await self.value("document.documentElement.scrollWidth")
        outside = await self.value(OUTSIDE)
        return Seen(width, needed, outside, self._requests(page), self._complaints(), facts)

    def _requests(self, page: Path) -> list[str]:
        sent = (e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        asked = [each["request"]["url"] for each in sent]
        return [url for url in asked if not url.startswith("data:") and url != page.absolute().as_uri()]

    def _complaints(self) -> list[str]:
        bad = []
        for event in self.events:
            match event["method"]:
                case "Runtime.exceptionThrown":
                    bad.append(json.dumps(event["params"]["exceptionDetails"]))
                case "Log.entryAdded":
                    bad.append(json.dumps(event["params"]["entry"]))
                case "Runtime.consoleAPICalled":
                    bad.append(json.dumps(event["params"]["args"]))
        return bad
