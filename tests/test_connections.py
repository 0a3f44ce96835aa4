"""Who may connect to serve.py, and what becomes of connections: other sites, a thousand that idle, half-closed ones."""
import json
import socket
import threading

import pytest
import requests
from commands import until

import serve
from data.loopback import on_this_machine
from rlhf import writer

BODY = json.dumps({"prompt": "Cows eat", "max_tokens": 3, "seed": 0}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def url():
    with serve.serving("barn", slots=4) as url:
        yield url


def connected(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2].removesuffix("/v1"))), 20)


def all_of(connection):
    """All that comes on a connection until the other side closes it."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


# --- other sites ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Host": "127.evil.example"}, {"Host": "10.0.0.1"},
    {"Host": "localhost:80@evil.example"}, {"Host": ""}, {"Host": "::1"}, {"Origin": "https://evil.example"},
    {"Origin": "null"}, {"Origin": "https://localhost.evil.example"}, {"Origin": "http://127.1.evil.example"},
    {"Host": "localhost", "Origin": "http://evil.example"}], ids=str)
def test_pages_of_other_sites_are_refused(url, headers, monkeypatch):
    monkeypatch.setattr(writer.Writer, "submit", None)              # nothing is written for them
    for method, path in (("POST", "/completions"), ("GET", "/models"), ("GET", "/nothing")):
        reply = requests.request(method, url + path, data=BODY if method == "POST" else None, headers=headers,
                                 timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden"), path


@pytest.mark.parametrize("headers", [
    {"Host": "localhost:9999"}, {"Host": "127.0.0.1"}, {"Host": "LOCALHOST"}, {"Host": "[::1]:1"},
    {"Host": "127.0.0.2:80"}, {"Origin": "http://localhost:3000"}, {"Origin": "http://127.0.0.1"}], ids=str)
def test_pages_and_programs_of_this_machine_are_answered(url, headers):
    assert requests.get(url + "/models", headers=headers, timeout=60).status_code == 200


def test_a_request_may_name_no_host(url):
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200")


def test_a_server_for_other_machines_answers_under_any_name():
    with serve.serving("barn", host="0.0.0.0", slots=1) as url:
        here = url.replace("0.0.0.0", "127.0.0.1")
        headers = {"Host": "gpu.example:8000", "Origin": "https://chat.example"}
        assert requests.get(here + "/models", headers=headers, timeout=60).status_code == 200


@pytest.mark.parametrize("address, here", [
    ("http://localhost:8000/v1", True), ("http://127.3.2.1", True), ("https://[::1]:80", True), ("null", False),
    ("http://127.evil.example/v1", False), ("http://localhost.evil.example", False), ("http://10.0.0.1", False)])
def test_which_addresses_are_on_this_machine(address, here):
    assert on_this_machine(address) == here


# --- many connections ----------------------------------------------------------------------------------------

def test_a_thousand_idle_connections_are_in_nobodys_way(url):
    """Their file descriptors are all that select() can watch; both sides of the next connection are beyond."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip("too few files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    idle = []
    try:
        with socket.socket() as one:
            idle += [one.dup() for _ in range(1100)]
            assert idle[-1].fileno() > 1024
            reply = requests.post(url + "/completions", data=BODY, timeout=60)
            streamed = requests.post(url + "/completions", data=BODY.replace(b"{", b'{"stream": true, '), timeout=60)
    finally:
        for one in idle:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert reply.status_code == 200 and streamed.text.endswith("data: [DONE]\n\n")


# --- half-closed connections ---------------------------------------------------------------------------------

@pytest.fixture
def held(monkeypatch):
    """An event: until it is set, the writer writes nothing."""
    free, write = threading.Event(), writer.Writer.write
    monkeypatch.setattr(writer.Writer, "write", lambda self, new: free.wait(60) and write(self, new))
    yield free
    free.set()


@pytest.fixture
def looks(monkeypatch):
    """How often the server has looked whether a client is still there."""
    times, look = [], serve.Handler.check_connection
    monkeypatch.setattr(serve.Handler, "check_connection", lambda self: times.append(self) or look(self))
    return times


@pytest.mark.parametrize("request_", [REQUEST, REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0")], ids=["1.1", "1.0"])
def test_a_client_that_has_said_all_it_has_to_say_gets_its_answer(url, held, looks, request_):
    """As from `nc`, which closes its side of the connection at the end of its input."""
    with connected(url) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: len(looks) > 3)
        held.set()
        said = all_of(connection)
        *interim, head, body = said.split(b"\r\n\r\n")
        assert interim == [b"HTTP/1.1 100 Continue"] * (b"HTTP/1.1" in request_)
        assert head.startswith(b"HTTP/1.1 200")
    alone = requests.post(url + "/completions", data=BODY, timeout=60).json()
    assert json.loads(body)["choices"] == alone["choices"]


def test_a_half_closed_stream_is_whole(url):
    body = BODY.replace(b"{", b'{"stream": true, ')
    with connected(url) as connection:
        connection.sendall(REQUEST.replace(BODY, body).replace(b"Length: %d" % len(BODY), b"Length: %d" % len(body)))
        connection.shutdown(socket.SHUT_WR)
        assert all_of(connection).endswith(b"data: [DONE]\n\n")
