"""Chromium without a screen, by its own protocol: messages of JSON on two pipes, each with a zero byte at its end.

Source: the Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/, and Chromium's option
``--remote-debugging-pipe``: it reads from file descriptor 3 and writes to 4.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time


class Chromium:
    """A browser with one page; use it as a context manager.

    Parameters
    ----------
    program : str
    seconds : float
        The longest time that anything may take.
    """

    def __init__(self, program, seconds=60):
        self._seconds = seconds
        self._number, self._rest, self.requested = 0, b"", []
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        command_read, self._write = os.pipe()
        self._read, reply_write = os.pipe()
        # Root has no sandbox, and a container has a small /dev/shm.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._folder}", "--disable-background-networking"]

        def pipes():
            # Through numbers above 4, so that neither is overwritten before it is copied.
            os.dup2(command_read, 8), os.dup2(reply_write, 9)
            os.dup2(8, 3), os.dup2(9, 4)

        self._process = subprocess.Popen(
            [program, *options, "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(reply_write)
        self._session = None
        targets = self._wait_for(self._pages, "a page")
        self._session = self.call("Target.attachToTarget", targetId=targets[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write)
            os.close(self._read)
            shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method, **params):
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._seconds
        while True:
            reply = self._receive(deadline)
            if reply.get("method") == "Network.requestWillBeSent":
                self.requested.append(reply["params"]["request"]["url"])
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]

    def open(self, url):
        """Go to a page, and wait until it is complete."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression):
        """The value of JavaScript on the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression):
        """Wait until an expression holds."""
        return self._wait_for(lambda: self.value(expression), expression)

    def click(self, selector):
        """Click into the middle of an element, as a mouse does."""
        x, y = self.value(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press_enter(self):
        """The key Enter."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def _pages(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        return [target for target in targets if target["type"] == "page"]

    def _wait_for(self, condition, words):
        deadline = time.monotonic() + self._seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not after {self._seconds} seconds: {words}"
            time.sleep(0.02)
        return value

    def _receive(self, deadline):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no reply after {self._seconds} seconds"
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
