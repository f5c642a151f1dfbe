"""A real browser for tests: Debian's chromium without a window, driven over a pipe by its own protocol.

Source: Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

CHROMIUM = shutil.which("chromium")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")


class Page:
    """One open page. `errors` collects script errors, blocked parts and failed requests."""

    def __init__(
        self, to: IO[bytes], back: BufferedReader, numbers: Iterator[int], beside: "Page | None" = None
    ) -> None:
        """beside: another page of the same browser. Each hears what both tell, so they have one list of errors."""
        self._to, self._back, self._numbers = to, back, numbers
        self._session: dict[str, str] = {}
        self.errors: list[str] = beside.errors if beside else []
        self.allowed: tuple[str, ...] = beside.allowed if beside else ("file:", "data:", "about:")
        """How addresses may begin that the page asks for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def other_tab(self) -> "Page":
        """A second page of the same browser."""
        return Page(self._to, self._back, self._numbers, self)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(command).encode() + b"\0")
        while (told := self._next()).get("id") != number:
            pass
        assert "error" not in told, told
        return told["result"]

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while not message.endswith(b"\0"):
            there = self._back.peek()
            assert there, "the browser has ended"
            message += self._back.read(there.find(b"\0") + 1 or len(there))
        told = json.loads(message[:-1])
        method, about = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(self.allowed):
            self.errors.append("asks for " + about["request"]["url"])
        return told

    def open(self, path: Path, *, scripts: bool = True) -> None:
        """Load a file, and wait until it is complete."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def visit(self, address: str, path: str = "/") -> None:
        """Load an address of a server, from which alone the page may then ask for anything."""
        self.allowed = (f"{address}/", "data:", "blob:", "about:")
        self.call("Page.navigate", url=address + path)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def until(self, expression: str, *, seconds: float = 120) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.2)

    def attach(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files for the file input that `selector` names."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.absolute()) for file in files])

    def write(self, text: str) -> None:
        """Type a text where the focus is, as a paste would."""
        self.call("Input.insertText", text=text)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as "ArrowRight"."""
        code = {
            "ArrowLeft": 37,
            "ArrowRight": 39,
            "Home": 36,
            "End": 35,
            "Enter": 13,
            "Tab": 9,
            "Escape": 27,
        }[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    def drag(self, selector: str, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """Pull the mouse over an element, between places in shares of its width and height."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        (x0, y0), (x1, y1) = (
            (box["x"] + across * box["width"], box["y"] + down * box["height"])
            for across, down in (begin, end)
        )
        for kind, x, y in (
            ("mouseMoved", x0, y0),
            ("mousePressed", x0, y0),
            ("mouseMoved", (x0 + x1) / 2, (y0 + y1) / 2),
            ("mouseMoved", x1, y1),
            ("mouseReleased", x1, y1),
        ):
            held = {"button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def resize(self, width: int, height: int = 900, *, scale: float = 1) -> None:
        """Show the page in a window of this size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500},
        )

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """Show the page as in dark mode, or for a medium such as "print"."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as png."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Close the pipes, which ends a browser that still runs."""
        self._to.close()
        self._back.close()


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """Start chromium, and end it."""
    assert CHROMIUM
    their_in, to = os.pipe()
    back, their_out = os.pipe()
    # The protocol is on descriptors 3 and 4. The shell exchanges them, since it starts with other numbers.
    move = f"exec {CHROMIUM} {' '.join(_FLAGS)} --user-data-dir=$0 3<&{their_in} 4>&{their_out} 2>/dev/null"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(["bash", "-c", move, profile], pass_fds=(their_in, their_out))
        os.close(their_in)
        os.close(their_out)
        page = Page(os.fdopen(to, "wb", 0), os.fdopen(back, "rb"), itertools.count(1))
        try:
            yield page
        finally:
            with contextlib.suppress(AssertionError, OSError):
                page.call("Browser.close")
            page.close()
            process.wait(30)
