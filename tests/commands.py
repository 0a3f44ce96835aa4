"""Commands of the project, in this process or in a child; what they may say when they refuse; a judge for them."""
import contextlib
import io
import json
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def command(script, *argv):
    """`python <script> ...` in this process -> exit code, stdout and stderr; an exception is a traceback. The script
    may be -m, and a module the next word."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    script, *argv = argv if script == "-m" else (str(ROOT / script), *argv)
    start = runpy.run_path if script.endswith(".py") else runpy.run_module
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with pytest.MonkeyPatch.context() as patch, redirected[0], redirected[1]:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        try:
            start(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@contextlib.contextmanager
def child(line, limit=120, **options):
    """A process for the length of a with block, for tests that read from it or send it signals.

    Ctrl-C's signal interrupts it even if this process ignores that signal, as it does under nohup and in many CI
    systems. `limit`: seconds after which the process is killed, so that no read and no wait lasts for ever.
    """
    with started(line, limit, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def started(line, limit=120, **options):
    """The process of child(), for a test that ends it itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a child inherits no handler
    try:
        process = subprocess.Popen(line, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    return process


def until(true, limit=60):
    """Wait for true() to be so, at most `limit` seconds."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"still not so after {limit} seconds"


def refused(result, code, *said):
    """Ended with this exit code and one sentence for the user, which says all of this."""
    *before, sentence = result.err.strip().splitlines() or [""]
    assert result.code == code, (result.code, sentence)
    assert not before or before[0].startswith("usage:"), result.err         # argparse shows its usage first
    for text in said:
        assert re.search(text, sentence), (text, sentence)


PAIR = re.compile(r"<<<(\w+) instruction\n(.*?)\n\1>>>\s*<<<\1 output \(a\)\n(.*?)\n\1>>>\s*"
                  r"<<<\1 output \(b\)\n(.*?)\n\1>>>", re.DOTALL)


def said(body, choose):
    """What a judge says to any prompt in data/judges/, in its form: choose(instruction, a, b) -> "a" or "b"."""
    *before, last = [message["content"] for message in body["messages"]]
    at = last.rfind("Pair 1\n")
    pairs = [match.groups()[1:] for match in PAIR.finditer(last, max(0, at))]
    if at < 0:
        return f"Output ({choose(*pairs[-1])})"
    if any("JSON list" in content for content in [*before, last]):
        return json.dumps([{"pair": n, "reason": 'It is "better": {so}.', "better": choose(*pair)}
                           for n, pair in enumerate(pairs, 1)])
    return "\n".join(f"{n}: Output ({choose(*pair)})" for n, pair in enumerate(pairs, 1))
