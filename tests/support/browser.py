"""A page in headless Chromium, over its debugging protocol."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """Opens one page and evaluates expressions in it."""

    def __init__(self, folder: Path):
        """`folder` for its profile."""
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             f"--user-data-dir={folder}", "--no-first-run", "--window-size=1280,900", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port, end = folder / "DevToolsActivePort", time.monotonic() + 600
        while not (port.exists() and port.read_text().strip()):
            assert time.monotonic() < end, "the browser does not start"
            time.sleep(0.05)
        self._address = f"http://127.0.0.1:{port.read_text().split()[0]}"
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        #: What the page wrote to its console, errors and refused requests among it.
        self.console: list[str] = []
        self._loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"{self._address}/json/list") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Performance"):
            await self._send(f"{domain}.enable")

    async def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=600)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method == "Log.entryAdded":
            self.console.append(message["params"]["entry"]["text"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening"):
            self.console.append(f"{method}: {message['params']}")

    def open(self, page: Path) -> None:
        """Open a file, and wait until its scripts have run."""
        self.open_url(page.as_uri())

    def open_url(self, url: str) -> None:
        """The same of a URL."""
        self._loop.run_until_complete(self._send("Page.navigate", url=url))
        while self.evaluate("document.readyState") != "complete":
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """Seconds of a CPU that the thread of pages has taken so far, however busy the machine is."""
        metrics = self._loop.run_until_complete(self._send("Performance.getMetrics"))["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime")

    def click(self, selector: str) -> None:
        """Click on an element as a person does: a page may play sound after that."""
        found = f"document.querySelector({selector!r})"
        self.evaluate(f"{found}.scrollIntoView({{ block: 'center', behavior: 'instant' }})")
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        x, y = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._loop.run_until_complete(self._send("Input.dispatchMouseEvent", **event))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it gives."""
        result = self._loop.run_until_complete(
            self._send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.kill()
        self._process.wait()
