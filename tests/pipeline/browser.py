"""A real browser without a library for it: headless Chromium over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

PATIENCE = 60


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no browser: install chromium to run this test")


class BrowserError(RuntimeError):
    """What the browser answers in place of a result, such as between two documents."""


class Browser:
    """One page."""

    def __init__(self, folder: Path) -> None:
        flags = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium has none for root
        self._process = subprocess.Popen(
            [chromium(), *flags, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._count = 0
        try:
            port_file = folder / "DevToolsActivePort"
            port = self._until(lambda: port_file.exists() and port_file.read_text().split("\n")[0])
            pages = self._until(lambda: [one for one in self._pages(port) if one["type"] == "page"])
            self._socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _pages(self, port: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = httpx.get(f"http://127.0.0.1:{port}/json").json()
        except httpx.TransportError:
            return []
        return found

    def _until(self, asked: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while not (value := asked()):
            assert time.monotonic() < end, "the browser does not get there"
            time.sleep(0.05)
        return value

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(PATIENCE))
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserError(answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def go(self, url: str) -> None:
        self.js("window.left = true")
        self.call("Page.navigate", url=url)
        self.loaded()

    def loaded(self) -> None:
        """Wait for another document than the one that was marked as left."""
        self._until(self._is_loaded)

    def _is_loaded(self) -> bool:
        try:
            return bool(self.js("!window.left && document.readyState === 'complete'"))
        except BrowserError:
            return False

    def click(self, selector: str) -> None:
        """Click what leads to another document."""
        self.js(f"window.left = true; document.querySelector({json.dumps(selector)}).click()")
        self.loaded()

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
