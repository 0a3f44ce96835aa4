"""A headless Chromium that a test drives through its debugging pipe: pages, keys, screenshots."""
import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab. Commands are those of Chromium's debugging protocol: JSON with a null byte behind each message. What the
    browser reports by itself is in `events`."""

    def __init__(self, commands, replies):
        self.commands, self.replies, self.data, self.ids = commands, replies, b"", itertools.count(1)
        self.session, self.events = {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        self.call("Page.enable")

    def call(self, method, **params):
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self.read())
            self.events += [reply] if "method" in reply else []
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    def read(self):
        deadline = time.monotonic() + 30
        while b"\0" not in self.data:
            ready = select.select([self.replies], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, "the browser says nothing"
            data = os.read(self.replies, 1 << 20)
            assert data, "the browser is gone"
            self.data += data
        message, _, self.data = self.data.partition(b"\0")
        return message

    def look(self, width, height=800, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def js(self, expression):
        """What an expression of JavaScript comes to, promises awaited."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait(self, expression):
        """Until it is true, for half a minute at most."""
        self.js(f"""new Promise((good, bad) => {{
            const end = performance.now() + 25000, look = () =>
                ({expression}) ? good(true) : performance.now() > end ? bad("not: " + document.body.innerText)
                                                                      : setTimeout(look, 20);
            look(); }})""")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "\r")

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(folder):
    """A Page of a new Chromium with a profile in `folder`."""
    (theirs_in, commands), (replies, theirs_out) = os.pipe(), os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'            # the two that it reads and writes
    process = subprocess.Popen(["bash", "-c", shell, CHROMIUM, *options], pass_fds=(theirs_in, theirs_out),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        page = Page(commands, replies)
        yield page
        page.session = {}
        page.call("Browser.close")
    finally:
        process.kill()
        process.wait(30)
        os.close(commands)
        os.close(replies)
