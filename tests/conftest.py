"""A scriptable judge on a loopback port, for every test that asks for it; and no hub for any."""
import threading

import pytest
from judged import Handler, Server, longer

from data.judges.client import Judge
from data.progress import say_once


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A name that is no folder must not send a test to the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def news():
    """What was said once is said again in another test."""
    say_once.cache_clear()


@pytest.fixture
def server():
    """`rule(body, how often this body came)` makes its answers, `requests` are all bodies it was sent."""
    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.requests, server.headers, server.connections, server.rule = [], [], 0, longer
    server.lock, server.released = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(server, tmp_path):
    """make() -> a new Judge of that server, always on the same cache file, impatient enough for a test."""
    judges = []

    def make(url=server.url, **options):
        options = {"endpoint": "test", "workers": 4, "backoff": 1e-4, "timeout": 5, "patience": 5, **options}
        if "key" in options:
            options["headers"] = {"Authorization": f"Bearer {options['key']}"}
        judges.append(Judge(url, tmp_path / "cache" / "judge.jsonl", **options))
        return judges[-1]

    yield make
    for one in judges:
        one.close()
