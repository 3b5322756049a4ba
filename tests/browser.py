"""A real browser: Chromium without a window, driven over its DevTools protocol.

    with browser.Page(f"http://127.0.0.1:{port}/") as page:
        page.wait_for("document.title === 'Verve'")

Each page has a Chromium of its own, with a new profile in a temporary folder. What the page complains of (errors,
breaches of its Content-Security-Policy) is kept in `complaints`, what it asked for in `requests`.
"""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import support
from websockets.sync.client import connect

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
]


class Page:
    """One page in a browser of its own."""

    def __init__(self, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        assert program, "no Chromium: apt-get install chromium"
        self._folder = tempfile.TemporaryDirectory(prefix="verve-browser-", ignore_cleanup_errors=True)
        self._stack = contextlib.ExitStack()
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        self._log = support.Lines(self._process.stderr)
        self._numbers = itertools.count(1)
        self._session = ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        try:
            address = self._log.wait_for(r"DevTools listening on (ws://\S+)")[1]
            self._socket = self._stack.enter_context(connect(address, max_size=None, proxy=None))
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.call("Emulation.setScrollbarsHidden", hidden=True)
            self.size(width, height)
            self.prefer(scheme)
            self.call("Page.navigate", url=url)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(support.DEADLINE)
        self._log.join()
        self._folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Have the browser do something, and return what it says."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": number, "method": method, "params": params, **session}))
        while True:
            message = json.loads(self._socket.recv(support.DEADLINE))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.complaints.append(params["entry"]["text"])

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Have the user like it `light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """Return what an expression is on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        """Return the text of an element as the user sees it."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def wait_for(self, script: str) -> Any:
        """Return what an expression is, as soon as it is something; an error is nothing, since the page may load."""
        script = f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
        until = time.monotonic() + support.DEADLINE
        while True:
            found = self.evaluate(script)
            if found:
                return found
            assert time.monotonic() < until, f"waited for {script} on a page that says {self.text('body')!r}"
            time.sleep(0.05)  # the page tells nobody

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path) -> None:
        """Write what the user sees into a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
