"""data/hub.py against a hub and a CDN on loopback ports that misbehave on demand; huggingface_hub is the witness."""
import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from commands import command, refused

from data import InputError, Refusal, blobs, hub, progress

if importlib.util.find_spec("huggingface_hub"):         # it reads HF_HUB_OFFLINE when it is loaded, and tests set that
    importlib.import_module("huggingface_hub")

ROOT = Path(__file__).parents[1]
TOKEN = "hf_averysecrettoken"
WEIGHTS = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(WEIGHTS).hexdigest()
MODEL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": WEIGHTS,
         "README.md": b"# A model", "pytorch_model.bin": b"pickle"}
COMMIT, OLDER = "c0ffee" * 6 + "abcd", "0" * 40
HELD = 100_000                                          # bytes of the weights that an earlier run left


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def name_of(data, name):
    large = name.endswith((".safetensors", ".bin"))
    return hashlib.sha256(data).hexdigest() if large else git_sha1(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        world, where = self.server.world, self.server.where
        path = unquote(urlsplit(self.path).path)
        with world.lock:
            world.seen.append((where, self.command, path, {**self.headers, "raw": self.path}))
            faults = world.faults[where, self.command] if (where, self.command) in world.faults else []
            fault = faults.pop(0) if faults else None
        (fault or (world.hub if where == "hub" else world.cdn))(self, path)

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        headers = {"Content_Length": len(body), **headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        if headers["Content_Length"] is None:
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        pass                                            # a client that is killed is part of these tests


class World:
    """`repos` are {"models/org/name": {file: bytes}}; `faults` {("hub" or "cdn", method): what the next calls get}."""

    def __init__(self):
        self.repos, self.moved, self.faults, self.seen = {"models/org/name": dict(MODEL)}, {}, {}, []
        self.evil, self.commit, self.lock, self.stopped = [], COMMIT, threading.Lock(), False
        self.servers = {}
        for where in ("hub", "cdn"):
            server = self.servers[where] = Server(("127.0.0.1", 0), Handler)
            server.world, server.where, server.url = self, where, f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = self.servers["hub"].url

    def close(self):
        for server in self.servers.values():
            if not self.stopped:
                server.shutdown()
                server.server_close()
        self.stopped = True

    def hub(self, handler, path):
        match = re.fullmatch(r"/api/(models|datasets)/(.+)/revision/(.+)", path)
        match = match or re.fullmatch(r"/(datasets/)?(.+)/resolve/([^/]+)/(.+)", path)
        repo = match[2]
        kind = "datasets" if (match[1] or "").startswith("datasets") else "models"
        if repo in self.moved:
            return handler.reply(307, Location=path.replace(repo, self.moved[repo]))
        files = self.repos.get(f"{kind}/{repo}")
        if files is None:
            return handler.reply(404, X_Error_Code="RepoNotFound")
        if match[3] not in ("main", "refs/pr/1", self.commit):
            return handler.reply(404, X_Error_Code="RevisionNotFound")
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in (*files, *self.evil)]
            listing = {"sha": self.commit, "id": repo, "siblings": siblings}
            return handler.reply(200, json.dumps(listing).encode(), Content_Type="application/json")
        data = files.get(match[4])
        if data is None:
            return handler.reply(404, X_Error_Code="EntryNotFound")
        etag = name_of(data, match[4])
        if len(etag) == 64:
            return handler.reply(302, b"Found", X_Repo_Commit=self.commit, X_Linked_Etag=f'"{etag}"',
                                 X_Linked_Size=len(data), ETag='"another"',
                                 Location=f"{self.servers['cdn'].url}/{etag}?signature=abc")
        handler.reply(200, data, X_Repo_Commit=self.commit, ETag=f'W/"{etag}"')

    def cdn(self, handler, path):
        data = self.bytes_of(path)
        start = asked(handler)
        if start:
            return handler.reply(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.reply(200, data)

    def bytes_of(self, path):
        return next(data for files in self.repos.values() for name, data in files.items()
                    if name_of(data, name) == path[1:])

    def asked_for(self, where, method):
        """The last parts of the paths that were asked for so far, in order."""
        return [path.split("/")[-1] for *call, path, _ in self.seen if call == [where, method]]

    def ranges(self):
        """Where the CDN was asked to begin, call by call."""
        return [int(re.fullmatch(r"bytes=(\d+)-", headers.get("Range", "bytes=0-"))[1])
                for where, _, _, headers in self.seen if where == "cdn"]


def asked(handler):
    return int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])


@pytest.fixture
def world(monkeypatch, tmp_path):
    world = World()
    for name in [name for name in os.environ if re.match("HF_|HUGGING|TRANSFORMERS_|XDG_CACHE", name)
                 or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", world.url)
    monkeypatch.setattr(hub, "pause", lambda failed, asked=None: None)
    yield world
    world.close()


@pytest.fixture
def cache(tmp_path):
    """The repository org/name in the cache."""
    return tmp_path / "hf" / "hub" / "models--org--name"


def everything(names):
    return names


def weights_only(names):
    return ["model.safetensors"]


def left_behind(cache, data=WEIGHTS[:HELD]):
    """What a killed run leaves."""
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / f"{SHA}.incomplete").write_bytes(data)


def litter(cache):
    """Files that are neither blobs nor refs nor what a snapshot has."""
    return [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()
            and not (path.parent.name == "blobs" and hub.HASH.fullmatch(path.name)) and "refs" not in path.parts]


def refuses(call, kind=Refusal, *said):
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and TOKEN not in sentence and "signature" not in sentence
    for text in said:
        assert text in sentence, (text, sentence)
    return sentence


# ---- what arrives --------------------------------------------------------------------------------------

def test_files_lie_as_huggingface_hub_lays_them(world, cache):
    world.repos["models/org/name"]["sub/deep/notes.json"] = b"[1]"
    folder = hub.fetch("org/name", lambda names: [name for name in names if name != "pytorch_model.bin"])
    assert folder == cache / "snapshots" / COMMIT and (cache / "refs" / "main").read_text() == COMMIT
    for name, data in world.repos["models/org/name"].items():
        if name == "pytorch_model.bin":
            assert not (folder / name).exists()
            continue
        assert (folder / name).read_bytes() == data
        up = "../" * (2 + name.count("/"))
        assert os.readlink(folder / name) == f"{up}blobs/{name_of(data, name)}"
    assert not litter(cache) and "pytorch_model.bin" not in world.asked_for("hub", "HEAD")


def test_what_is_there_is_not_fetched_again_nor_written(world, cache):
    hub.fetch("org/name", everything)
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    world.seen.clear()
    hub.fetch("org/name", everything)
    assert {method for _, method, path, _ in world.seen if "/api/" not in path} == {"HEAD"}
    assert before == {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}


def test_a_new_commit_fetches_only_what_changed(world, cache):
    old = hub.fetch("org/name", everything)
    world.commit, world.repos["models/org/name"]["config.json"] = OLDER, b"new"
    world.seen.clear()
    new = hub.fetch("org/name", everything)
    assert world.asked_for("hub", "GET") == ["main", "config.json"] and not world.asked_for("cdn", "GET")
    assert (new / "config.json").read_bytes() == b"new" and (old / "config.json").read_bytes() == MODEL["config.json"]
    assert new.name == (cache / "refs" / "main").read_text() == OLDER


def test_a_file_cut_short_on_disk_is_fetched_again(world, cache):
    folder = hub.fetch("org/name", everything)
    os.truncate(cache / "blobs" / SHA, 5)
    assert (hub.fetch("org/name", everything) / "model.safetensors").read_bytes() == WEIGHTS
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"cut")
    assert (hub.fetch("org/name", everything) / "config.json").read_bytes() == MODEL["config.json"]


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_theirs_is_ours(world, kind, tmp_path):
    theirs = pytest.importorskip("huggingface_hub")
    files = world.repos[f"{kind}/org/set"] = {"config.json": b"{}", "sub/a.json": b"[]", "model.safetensors": WEIGHTS}
    for name in files:
        path = theirs.hf_hub_download("org/set", name, repo_type=kind[:-1], endpoint=world.url, token=False,
                                      cache_dir=tmp_path / "hf" / "hub")
    world.seen.clear()
    folder = hub.fetch("org/set", everything, kind=kind)
    assert [method for _, method, *_ in world.seen] == ["GET", "HEAD", "HEAD", "HEAD"]      # GET is the listing
    assert folder / "model.safetensors" == Path(path)


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_ours_is_theirs(world, kind, tmp_path):
    theirs = pytest.importorskip("huggingface_hub")
    files = world.repos[f"{kind}/org/set"] = {"config.json": b"{}", "sub/a.json": b"[]", "model.safetensors": WEIGHTS}
    folder = hub.fetch("org/set", everything, kind=kind)
    world.close()
    place = {"repo_type": kind[:-1], "cache_dir": tmp_path / "hf" / "hub", "local_files_only": True}
    assert Path(theirs.snapshot_download("org/set", **place)) == folder
    for name in files:
        assert Path(theirs.hf_hub_download("org/set", name, **place)) == folder / name
    (repo,) = theirs.scan_cache_dir(tmp_path / "hf" / "hub").repos
    assert not theirs.scan_cache_dir(tmp_path / "hf" / "hub").warnings and repo.repo_id == "org/set"
    assert [*repo.refs] == ["main"] and repo.nb_files == 3


def test_theirs_online_downloads_nothing_of_ours(world, tmp_path):
    theirs = pytest.importorskip("huggingface_hub")
    hub.fetch("org/name", everything)
    world.seen.clear()
    for name in MODEL:
        theirs.hf_hub_download("org/name", name, endpoint=world.url, token=False, cache_dir=tmp_path / "hf" / "hub")
    assert {method for _, method, *_ in world.seen} == {"HEAD"} and not world.asked_for("cdn", "HEAD")


def test_the_cache_is_where_the_environment_says(world, monkeypatch, tmp_path):
    def root():
        return hub.fetch("org/name", lambda names: ["config.json"]).parents[2]

    assert root() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "$HF_HOME/elsewhere")
    assert root() == tmp_path / "hf" / "elsewhere"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert root() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert root() == tmp_path / "me" / ".cache" / "huggingface" / "hub"


def test_a_revision_in_a_folder_and_a_commit(world, cache):
    assert hub.fetch("org/name", weights_only, "refs/pr/1").name == COMMIT
    assert (cache / "refs" / "refs" / "pr" / "1").read_text() == COMMIT
    assert world.seen[0][3]["raw"].endswith("/revision/refs%2Fpr%2F1")
    hub.fetch("org/name", weights_only, COMMIT)
    assert [path.name for path in (cache / "refs").rglob("*") if path.is_file()] == ["1"]
    world.faults["hub", "GET"] = [lambda handler, path: handler.reply(200, json.dumps(
        {"sha": COMMIT, "siblings": [{"rfilename": "model.safetensors"}]}).encode())]
    refuses(lambda: hub.fetch("org/name", weights_only, OLDER), hub.HubError, "does not answer as a hub")


def test_a_renamed_repository_is_followed(world):
    world.moved["old"] = "org/name"
    assert (hub.checkpoint("old") / "model.safetensors").read_bytes() == WEIGHTS
    world.moved["org/name"] = "org/name"
    refuses(lambda: hub.checkpoint("org/name@refs/pr/1"), hub.HubError, "circles")


def test_large_files_from_the_same_host_keep_their_hash(world, monkeypatch):
    """An endpoint that is its own CDN: the last hop has an ETag of its own."""
    def redirect(handler, path):
        handler.reply(302, b"Found", X_Linked_Etag=f'"{SHA}"', X_Linked_Size=len(WEIGHTS), Location="/cdn")

    def stored(handler, path):
        handler.reply(200, WEIGHTS, ETag='"0123456789abcdef"')

    world.faults["hub", "HEAD"] = [redirect, stored]
    listing = world.hub
    world.hub = lambda handler, path: (stored if path == "/cdn" else listing)(handler, path)
    assert (hub.fetch("org/name", weights_only) / "model.safetensors").read_bytes() == WEIGHTS
    assert world.asked_for("hub", "GET") == ["main", "cdn"]


# ---- what goes wrong on the way ------------------------------------------------------------------------

KILLED = """
import os, sys
from data import hub
arrived = []
hub._Snapshot._show = lambda self, name, new: arrived.append(new) or sum(arrived) > 150_000 and os.kill(os.getpid(), 9)
hub.fetch("org/name", lambda names: ["config.json", "model.safetensors"])
"""


def test_a_killed_download_goes_on_where_it_stopped(world, cache):
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, timeout=60).returncode == -9
    held = (cache / "blobs" / f"{SHA}.incomplete").stat().st_size
    assert 100_000 <= held < 300_000
    assert not (cache / "refs").exists() and not (cache / "blobs" / SHA).exists()
    folder = hub.fetch("org/name", weights_only)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and world.ranges() == [0, held]
    assert not litter(cache)


def whole(handler, path):
    handler.reply(200, WEIGHTS)


def half(handler, path):
    start = asked(handler)
    body = WEIGHTS[start:start + 70_000]
    handler.reply(206, body, Content_Range=f"bytes {start}-299999/300000", Content_Length=300_000 - start)
    handler.close_connection = True


def half_unannounced(handler, path):
    start = asked(handler)
    handler.reply(206, WEIGHTS[start:start + 70_000], Content_Range=f"bytes {start}-299999/300000", Content_Length=None)


def elsewhere(handler, path):
    handler.reply(206, WEIGHTS[7:], Content_Range="bytes 7-299999/300000")


def from_zero(handler, path):
    handler.reply(206, WEIGHTS, Content_Range="bytes 0-299999/300000")


def unsatisfiable(handler, path):
    handler.reply(416, Content_Range="bytes */300000")


def expired(handler, path):
    handler.reply(403, b"<Error>Request has expired</Error>", Content_Type="application/xml")


def broken(handler, path):
    handler.reply(503)


def busy(handler, path):
    handler.reply(429)


def hung_up(handler, path):
    handler.connection.shutdown(socket.SHUT_RDWR)


def login_page(handler, path):
    handler.reply(200, b"<html>Welcome to Hotel Wifi</html>", Content_Type="text/html; charset=utf-8")


def padded_page(handler, path):
    handler.reply(200, b"<html>".ljust(300_000), Content_Type="text/html")


def another_size(handler, path):
    handler.reply(200, b"x" * 77)


def too_long(handler, path):
    handler.reply(200, WEIGHTS + b"more", Content_Length=None)


def flipped(handler, path):
    start = asked(handler)
    handler.reply(206, WEIGHTS[start:-1] + b"?", Content_Range=f"bytes {start}-299999/300000")


@pytest.mark.parametrize("fault, begins", [
    (whole, [HELD]), (from_zero, [HELD]), (half, [HELD, HELD + 65_536]), (half_unannounced, [HELD, HELD + 70_000]),
    (elsewhere, [HELD, 0]), (unsatisfiable, [HELD, 0]), (too_long, [HELD, 0]), (flipped, [HELD, 0]),
    *((fault, [HELD, HELD]) for fault in (expired, broken, busy, hung_up, login_page, padded_page, another_size)),
], ids=lambda value: getattr(value, "__name__", ""))
def test_whatever_the_server_does_to_a_range_the_file_is_right(world, cache, fault, begins):
    left_behind(cache)
    world.faults["cdn", "GET"] = [fault]
    folder = hub.fetch("org/name", weights_only)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and not litter(cache)
    assert [round(start, -5) if fault is half else start for start in world.ranges()] == \
        [round(start, -5) if fault is half else start for start in begins]
    if len(begins) > 1:
        assert world.asked_for("hub", "HEAD") == ["model.safetensors"] * 2      # a signed link is made anew


def test_what_lies_there_is_not_believed(world, cache):
    left_behind(cache, WEIGHTS)
    assert hub.fetch("org/name", weights_only) and world.ranges() == []          # complete: only the rename was missing
    for lies, begins in [(b"?" + WEIGHTS[1:HELD], [HELD, 0]), (b"?" + WEIGHTS[1:], [0]), (WEIGHTS + b"more", [0])]:
        (cache / "blobs" / SHA).unlink()
        (cache / "blobs" / f"{SHA}.incomplete").write_bytes(lies)
        world.seen.clear()
        assert (hub.fetch("org/name", weights_only) / "model.safetensors").read_bytes() == WEIGHTS
        assert world.ranges() == begins and not litter(cache)


def test_a_flipped_byte_is_refused_in_large_files_and_small_ones(world, cache):
    world.faults["cdn", "GET"] = [flipped] * 5
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, "the hash that the hub gives, 5 times",
            f"/org/name/resolve/{COMMIT}/model.safetensors", "of 300,000 bytes")
    assert len(world.ranges()) == 5 and not world.faults["cdn", "GET"]
    config = bytes(reversed(MODEL["config.json"]))
    listing = world.hub
    world.hub = lambda handler, path: (handler.reply(200, config) if handler.command == "GET" and "resolve" in path
                                       else listing(handler, path))
    refuses(lambda: hub.fetch("org/name", lambda names: ["config.json"]), hub.HubError, "config.json", "hash")
    assert not list(cache.glob("snapshots/*/*")) and not (cache / "refs").exists()
    assert not [path for path in (cache / "blobs").iterdir() if path.stat().st_size]


def test_tries_end_only_where_nothing_arrives(world, cache, monkeypatch):
    pauses = []
    monkeypatch.setattr(hub, "pause", lambda failed, asked=None: pauses.append(failed))
    world.faults["cdn", "GET"] = [half_unannounced, *[broken] * 4, half_unannounced, *[hung_up] * 4]
    hub.fetch("org/name", weights_only)
    assert pauses == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    (cache / "blobs" / SHA).unlink()
    world.faults["cdn", "GET"] = [half_unannounced, *[expired] * 5]
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, "HTTP 403, 5 times", "70,000 of 300,000 bytes",
            "the same command again")
    assert (cache / "blobs" / f"{SHA}.incomplete").read_bytes() == WEIGHTS[:70_000]


@pytest.mark.parametrize("location", ["http://[", "http://127.0.0.1:99999/", "file:///etc/passwd", "http://\xe9..x/",
                                      "javascript:0", "http://%/"], ids=range(6))
def test_a_redirect_to_nowhere_is_another_try(world, location):
    def lost(handler, path):
        handler.reply(302, Location=location, X_Linked_Etag=SHA, X_Linked_Size=len(WEIGHTS))

    world.faults["hub", "HEAD"] = [lost]
    assert hub.fetch("org/name", weights_only)
    for method in ("GET", "HEAD"):
        (hub.fetch("org/name", weights_only) / "model.safetensors").unlink()
        for blob in Path(os.environ["HF_HOME"]).rglob(SHA):
            blob.unlink()
        world.faults["hub", method] = [lost] * 20
        refuses(lambda: hub.fetch("org/name", weights_only, "refs/pr/1"), hub.HubError)
        world.faults.clear()


@pytest.mark.parametrize("endpoint", ["huggingface.co", "http://[", "ftp://x", "https://me:secret@x", "https://x y"])
def test_an_endpoint_that_is_none_is_refused(world, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refuses(lambda: hub.checkpoint("org/name"), InputError, "HF_ENDPOINT", "unset it")


def test_a_pause_grows_and_has_an_end(monkeypatch):
    slept = []
    monkeypatch.setattr(hub.time, "sleep", slept.append)
    for failed in range(12):
        hub.pause(failed)
    assert 0.25 <= slept[0] <= 0.5 and all(4 <= one <= 60 for one in slept[4:]) and max(slept) > 30


def later(seconds, status=429):
    return lambda handler, path: handler.reply(status, Retry_After=seconds)


def test_a_hub_says_when_to_ask_again(world, cache, monkeypatch):
    pauses = []
    monkeypatch.setattr(hub, "pause", lambda failed, asked=None: pauses.append(asked))
    world.faults = {("hub", "GET"): [later(7), broken, later("soon")], ("hub", "HEAD"): [later(0, 503)],
                    ("cdn", "GET"): [later(60), broken, later(120)]}
    assert hub.fetch("org/name", weights_only)
    assert pauses == [7, None, None, 0, 60, None, 120]


@pytest.mark.parametrize("call", [("hub", "GET"), ("hub", "HEAD"), ("cdn", "GET")])
def test_who_asks_to_wait_for_long_is_not_asked_again(world, cache, monkeypatch, call):
    monkeypatch.setattr(hub, "pause", None)
    world.faults[call] = [later(3600)]
    host = urlsplit(world.servers[call[0]].url).netloc
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, f"{host} asks to wait 3600 seconds (HTTP 429)")
    assert hub.fetch("org/name", weights_only)


def test_a_file_that_becomes_another_one_is_said_to_have_changed(world, cache):
    def changed(handler, path):
        world.repos["models/org/name"]["model.safetensors"] = WEIGHTS[::-1]
        handler.reply(503)

    world.faults["cdn", "GET"] = [changed]
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, "model.safetensors has changed while it was")
    assert (hub.fetch("org/name", weights_only) / "model.safetensors").read_bytes() == WEIGHTS[::-1]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_small_requests_are_tried_again(world, method):
    world.faults["hub", method] = [broken, busy, hung_up, broken]
    assert hub.fetch("org/name", lambda names: ["config.json"])
    world.faults["hub", method] = [broken] * 6          # of a listing the first try is the brief one
    refuses(lambda: hub.fetch("org/name", lambda names: ["model.safetensors"], COMMIT), hub.HubError, "HTTP 503")


def test_two_at_once_fetch_once(world, cache, monkeypatch):
    release, said = threading.Event(), []

    def slowly(handler, path):
        handler.reply(200, WEIGHTS[:HELD], Content_Length=len(WEIGHTS))
        release.wait(10)
        handler.wfile.write(WEIGHTS[HELD:])

    def say(text, **options):
        said.append(text)
        release.set()

    monkeypatch.setattr(blobs, "print", say, raising=False)
    world.faults["cdn", "GET"] = [slowly]
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(hub.fetch("org/name", weights_only)), daemon=True)
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(folders) == 2 and world.ranges() == [0] and "another process" in said[0]
    assert (folders[0] / "model.safetensors").read_bytes() == WEIGHTS and not litter(cache)


def test_without_locks_and_links_it_works_with_copies(world, cache, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    def replace(source, target, real=os.replace):       # as on Windows: no open file is renamed
        if os.path.isdir("/proc/self/fd"):
            links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
            assert os.path.realpath(source) not in [os.path.realpath(link) for link in links]
        real(source, target)

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(hub.os, "replace", replace)
    monkeypatch.setattr(blobs, "fcntl", None)
    left_behind(cache)
    folder = hub.fetch("org/name", everything)
    assert not any(path.is_symlink() for path in folder.iterdir()) and world.ranges()[:1] == [HELD]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL
    world.seen.clear()
    hub.fetch("org/name", everything)
    assert {method for _, method, path, _ in world.seen if "/api/" not in path} == {"HEAD"}


def test_a_full_disk_is_seen_before_and_an_error_of_it_goes_through(world, cache, monkeypatch):
    world.repos["models/org/name"]["model.safetensors"] = WEIGHTS * 2
    free = SimpleNamespace(free=500_000)
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda path: free)
        sentence = refuses(lambda: hub.checkpoint("org/name"), hub.DiskFull, "HF_HOME", str(cache.parent))
        assert re.match(r"need 0\.0 GB in .*, 0\.0 GB free", sentence) and hub.DiskFull.code == 5
        assert not cache.exists() and world.asked_for("hub", "GET") == ["main"] and not world.ranges()
        big = cache / "blobs" / f"{name_of(WEIGHTS * 2, '.bin')}.incomplete"
        big.parent.mkdir(parents=True)
        big.write_bytes((WEIGHTS * 2)[:400_000])
        folder = hub.checkpoint("org/name")             # what is here needs no room
        (folder / "model.safetensors").unlink()
        free.free = 0
        assert hub.checkpoint("org/name")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    world.repos["models/org/name"]["model.safetensors"] = WEIGHTS
    monkeypatch.setattr(hub.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        hub.fetch("org/name", weights_only)
    assert (cache / "blobs" / f"{SHA}.incomplete").read_bytes() == WEIGHTS and not (cache / "blobs" / SHA).exists()
    (cache / "blobs" / f"{SHA}.incomplete").rename(cache / "blobs" / SHA)
    with pytest.raises(OSError, match="No space"):
        hub.fetch("org/name", weights_only, "refs/pr/1")
    assert not list((cache / "refs" / "refs" / "pr").iterdir())


def test_a_file_that_another_process_wrote_into_is_not_promoted(world, cache, monkeypatch):
    promoted = []
    monkeypatch.setattr(hub.os, "replace", lambda source, target, real=os.replace: (
        promoted.append(source.stat().st_size), real(source, target)))

    def meddled(handler, path):
        handler.reply(200, WEIGHTS[:HELD], Content_Length=len(WEIGHTS))
        with open(cache / "blobs" / f"{SHA}.incomplete", "ab") as file:     # where locks do not hold
            file.write(b"from elsewhere")
        handler.wfile.write(WEIGHTS[HELD:])

    world.faults["cdn", "GET"] = [meddled]
    assert (hub.fetch("org/name", weights_only) / "model.safetensors").read_bytes() == WEIGHTS
    assert world.ranges() == [0, 0] and 300_014 not in promoted


def test_a_file_that_another_process_brought_meanwhile_is_taken(world, cache, monkeypatch):
    def flock(file, how):
        (cache / "blobs" / SHA).write_bytes(WEIGHTS)

    monkeypatch.setattr(blobs, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    assert hub.fetch("org/name", weights_only) and not world.ranges() and not litter(cache)


def test_an_endless_body_is_left(world):
    sent = []

    def endless(handler, path):
        handler.reply(200, Content_Length=None)
        while len(sent) < 1000:
            handler.wfile.write(b"x" * 65_536)
            sent.append(1)

    world.faults["cdn", "GET"] = [endless]
    assert hub.fetch("org/name", weights_only) and len(sent) < 500


# ---- whom to trust -------------------------------------------------------------------------------------

def bearers(world):
    return {(where, headers.get("Authorization")) for where, _, _, headers in world.seen}


def test_the_token_goes_to_the_endpoint_and_nowhere_else(world, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    hub.fetch("org/name", everything)
    assert bearers(world) == {("hub", None), ("cdn", None)}
    sources = [("file", "HF_TOKEN_PATH"), ("home", None), ("env", "HUGGING_FACE_HUB_TOKEN"), ("env", "HF_TOKEN")]
    for n, (kind, variable) in enumerate(sources):      # each one wins over those before
        token = f"{TOKEN}{n}"
        if kind == "env":
            monkeypatch.setenv(variable, token)
        elif kind == "file":
            (tmp_path / "mytoken").write_text(token + "\n")
            monkeypatch.setenv(variable, str(tmp_path / "mytoken"))
        else:
            monkeypatch.delenv("HF_TOKEN_PATH")
            (tmp_path / "hf" / "token").write_text(token + "\n")
        world.seen.clear()
        for blob in (tmp_path / "hf" / "hub").rglob("blobs/*"):
            blob.unlink()
        hub.fetch("org/name", everything)
        assert bearers(world) == {("hub", f"Bearer {token}"), ("cdn", None)}
    monkeypatch.setenv("HF_TOKEN", "hf_“quoted”")
    refuses(lambda: hub.fetch("org/name", everything), InputError, "copy it again")


def test_a_listing_that_leads_off_the_host_is_not_followed(world):
    other = world.servers["cdn"].url
    world.faults["hub", "GET"] = [lambda handler, path: handler.reply(302, Location=other + path)]
    refuses(lambda: hub.fetch("org/name", everything), hub.HubError, "does not answer as a hub")
    assert [where for where, *_ in world.seen] == ["hub"]


@pytest.mark.parametrize("status, code, kind, said", [
    (401, "GatedRepo", InputError, ["accept its licence at {url}/org/name", "HF_TOKEN", "hf/token"]),
    (403, "GatedRepo", InputError, ["accept its licence at {url}/org/name", "HF_TOKEN"]),
    (401, "RepoNotFound", InputError, ["there is no {url}/org/name", "private", "HF_TOKEN"]),
    (404, "RevisionNotFound", InputError, ["org/name has no revision main"]),
    (404, "EntryNotFound", InputError, ["org/name at main has no"]),
    (404, "", InputError, ["there is no {url}/org/name"]),
    (401, "", InputError, ["does not accept the token in HF_TOKEN"]),
    (403, "", hub.HubError, ["HTTP 403"]),
], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_the_hub_refuses_is_one_sentence(world, monkeypatch, status, code, kind, said, method):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    world.faults["hub", method] = [lambda handler, path: handler.reply(status, b"No.", **(
        {"X_Error_Code": code} if code else {}))]
    refuses(lambda: hub.fetch("org/name", weights_only), kind, *(text.format(url=world.url) for text in said))
    assert world.asked_for("hub", method) in (["main"], ["model.safetensors"])  # hopeless: not asked again


def test_without_a_token_a_401_is_a_wrong_name(world):
    world.faults["hub", "GET"] = [lambda handler, path: handler.reply(401)]
    refuses(lambda: hub.fetch("org/name", weights_only), InputError, f"there is no {world.url}/org/name")


NO_LISTINGS = [b"<html>login</html>", b"", b"[]", b"{}", b'{"sha": "main", "siblings": []}', b"[" * 100_000,
               json.dumps({"sha": COMMIT, "siblings": None}).encode(), b'{"sha": 7, "siblings": []}',
               json.dumps({"sha": COMMIT, "siblings": [{"rfilename": 7}]}).encode(),
               json.dumps({"sha": f"../{COMMIT}", "siblings": []}).encode()]


@pytest.mark.parametrize("body", NO_LISTINGS, ids=range(len(NO_LISTINGS)))
def test_a_login_page_is_no_listing(world, cache, body):
    world.faults["hub", "GET"] = [lambda handler, path: handler.reply(200, body)]
    refuses(lambda: hub.fetch("org/name", everything), hub.HubError, "does not answer as a hub does", "login page")
    assert not cache.exists()


def test_the_length_of_a_redirect_is_not_that_of_the_file(world):
    world.faults["hub", "HEAD"] = [lambda handler, path: handler.reply(
        302, b"Found", X_Linked_Etag=SHA, Location=world.servers["cdn"].url + "/" + SHA)]
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, "does not answer as a hub does")


@pytest.mark.parametrize("headers", [
    {}, {"ETag": '"not-a-hash"'}, {"ETag": f'"../../{SHA}"'}, {"ETag": f'"{SHA}"', "Content_Length": None},
    {"X_Linked_Etag": f'"{SHA}"', "X_Linked_Size": "-1"}, {"ETag": f'"{SHA}/../../../x"'}, {"ETag": f'"{SHA.upper()}"'},
], ids=str)
def test_a_file_without_hash_or_size_is_not_fetched(world, cache, headers):
    world.faults["hub", "HEAD"] = [lambda handler, path: handler.reply(200, b"<html>", **headers)]
    refuses(lambda: hub.fetch("org/name", weights_only), hub.HubError, "does not answer as a hub does")
    assert not cache.exists() and world.asked_for("hub", "GET") == ["main"]


EVIL = ["../x", "a/../../x", "/etc", "-rf", "a\\b", "C:x", "x\0y", "a//b", "a/", "./x", "..", ".", "", "x\ny", "é"]


def test_evil_names_are_never_touched(world, cache):
    world.evil = EVIL
    folder = hub.fetch("org/name", everything)
    assert {path.name for path in folder.iterdir()} == MODEL.keys()
    for name in EVIL:
        assert not hub.NAME.fullmatch(name)
        refuses(lambda name=name: hub.fetch("org/name", lambda names: [name]), InputError, "main has no")
    for name in (".gitattributes", "a/b-c.json", "_x", "1.0", "a.b/..c"):
        assert hub.NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "-a", "a--b", "a..b", "a.git", ".a/b", "a/b@", "a/b@../x", "a b",
                                  "a/b@-x", "/a", "a/", "x" * 97, "a/b\n", "datasets/a/b", "https://huggingface.co/a"])
def test_names_that_no_hub_has_are_refused_without_asking(world, name):
    refuses(lambda: hub.checkpoint(name), InputError, "write org/name")
    assert not world.seen


# ---- without a network ---------------------------------------------------------------------------------

@pytest.fixture
def no_sockets(monkeypatch):
    def connect(*args):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("variable, value", [("HF_HUB_OFFLINE", "YES"), ("TRANSFORMERS_OFFLINE", "1"), (None, None)])
def test_offline_is_what_is_cached(world, cache, monkeypatch, capsys, variable, value):
    folder = hub.checkpoint("org/name")
    world.seen.clear()
    monkeypatch.setenv(variable or "HF_HUB_OFFLINE", value or "0")
    assert hub.checkpoint("org/name") == hub.checkpoint(f"org/name@{COMMIT}") == folder
    assert bool(world.seen) == (variable is None) and capsys.readouterr().out == ""


def test_offline_says_where_it_looked(world, cache, no_sockets):
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, "HF_HUB_OFFLINE is set", str(cache), "main")
    refuses(lambda: hub.checkpoint(f"org/name@{COMMIT}"), hub.HubError, str(cache))
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("")            # what a crash may leave of other programs' refs
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, str(cache), "main")
    (cache / "refs" / "main").write_text(COMMIT)
    refuses(lambda: hub.fetch("org/name", everything), hub.HubError, "has no main")
    folder = cache / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("../refs")
    refuses(lambda: hub.fetch("org/name", everything), hub.HubError, "has no main")
    (cache / "refs" / "main").write_text(COMMIT)
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, str(folder), "model.safetensors")
    (folder / "model.safetensors").symlink_to("../../blobs/" + SHA)             # leads nowhere
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, str(folder), "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, str(folder), "config.json")
    refuses(lambda: hub.data_files("org/name", ["a.json"]), hub.HubError, "datasets--org--name")


def test_offline_a_missing_shard_is_noticed(world, cache, monkeypatch):
    sharded(world)
    folder = hub.checkpoint("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.checkpoint("org/name") == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, str(folder), "model-00002-of-00002.safetensors")


def test_a_network_that_is_gone_is_no_reason_to_stop(world, cache, capsys):
    folder = hub.checkpoint("org/name")
    world.close()
    assert hub.checkpoint("org/name") == folder
    said = capsys.readouterr().out
    assert re.fullmatch(rf"hub: {world.url}\S* cannot be reached \(ConnectionError\): check the network or "
                        "HF_ENDPOINT; org/name is used as cached, commit c0ffeec\n", said)
    refuses(lambda: hub.checkpoint("org/other"), hub.HubError, "cannot be reached (ConnectionError)", "org--other")
    (folder / "model.safetensors").unlink()
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, "cannot be reached", str(folder), "model.safetensors")


def test_without_a_network_a_full_cache_is_used_at_once_and_a_poor_one_after_all_tries(world, cache, monkeypatch):
    folder, pauses = hub.fetch("org/name", lambda names: ["config.json"]), []
    monkeypatch.setattr(hub, "pause", lambda failed, asked=None: pauses.append(failed))
    world.close()
    assert hub.fetch("org/name", lambda names: ["config.json"]) == folder and not pauses
    refuses(lambda: hub.checkpoint("org/name"), hub.HubError, "cannot be reached", "has no model.safetensors")
    assert pauses == [1, 2, 3, 4]


def test_a_hub_that_is_slow_once_is_waited_for_where_the_cache_lacks_something(world, cache):
    hub.fetch("org/name", lambda names: ["config.json"])
    world.faults["hub", "GET"] = [hung_up, broken]
    assert (hub.checkpoint("org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_tag_is_found_in_a_cache_that_cannot_be_written(world, cache, monkeypatch):
    folder = hub.checkpoint("org/name")
    shutil.rmtree(cache / "refs")
    (cache / "refs").write_text("in the way of every ref")
    assert hub.checkpoint("org/name@refs/pr/1") == folder
    monkeypatch.setattr(blobs, "renamed", None)
    assert hub.checkpoint("org/name@refs/pr/1") == folder


# ---- checkpoints and data ------------------------------------------------------------------------------

def sharded(world, *names):
    shards = names or [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(shards)}}).encode()
    files = {name: name.encode() for name in shards if not names}
    world.repos["models/org/name"] = {"config.json": b"{}", hub.INDEX: index, "model-extra.safetensors": b"x", **files}


def fetched(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_checkpoint_is_what_it_takes_and_no_more(world):
    optional = {"generation_config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
    assert fetched(hub.checkpoint("org/name")) == {"config.json", "tokenizer.json", "model.safetensors"}
    world.repos["models/gpt2"] = {**MODEL, hub.INDEX: b"{}", "onnx/model.onnx": b"", **dict.fromkeys(optional, b"[]")}
    folder = hub.checkpoint("gpt2")
    assert fetched(folder) == {"config.json", "tokenizer.json", "model.safetensors", *optional}
    assert folder.parents[1].name == "models--gpt2"


def test_a_checkpoint_in_shards_is_what_its_index_names(world, cache):
    sharded(world)
    assert fetched(hub.checkpoint("org/name@main")) == {
        "config.json", hub.INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("shard", ["../x", "/x.safetensors", "sub/x.safetensors", "..safetensors", "x.bin", 7, ["x"],
                                   "-x.safetensors", "../../../x.safetensors", "x.safetensors/../y"], ids=str)
def test_an_index_cannot_name_anything_else(world, cache, shard):
    sharded(world, shard)
    refuses(lambda: hub.checkpoint("org/name"), InputError, "model.safetensors.index.json")
    assert not (cache / "refs").exists() and "x" not in world.asked_for("hub", "HEAD")


def test_an_index_that_is_none_or_names_a_file_that_is_missing(world, cache):
    for index in (b"[]", b"{}", b"\xff", b'{"weight_map": 7}'):
        world.repos["models/org/name"] = {"config.json": b"{}", hub.INDEX: index}
        refuses(lambda: hub.checkpoint("org/name"), InputError, "not an index")
    sharded(world, "model-1.safetensors")
    refuses(lambda: hub.checkpoint("org/name"), InputError, "org/name at main has no model-1.safetensors")
    assert not (cache / "refs").exists()


def test_an_adapter_is_a_checkpoint_and_pickles_are_none(world):
    files = world.repos["models/org/name"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w",
                                              "tokenizer.json": b"{}", "training_args.bin": b"p"}
    assert fetched(hub.checkpoint("org/name")) == files.keys() - {"training_args.bin"}
    del files["adapter_model.safetensors"]
    refuses(lambda: hub.checkpoint("org/name"), InputError, "no model.safetensors", "pickle", "org/name@refs/pr/1")
    world.repos["models/org/name"] = {"config.json": b"{}"}
    assert "pickle" not in refuses(lambda: hub.checkpoint("org/name"), InputError, "no model.safetensors")
    world.repos["models/org/name"] = {"model.safetensors": b"w"}
    refuses(lambda: hub.checkpoint("org/name"), InputError, "no config.json")


def test_files_of_a_data_set(world):
    world.repos["datasets/tatsu-lab/alpaca_farm"] = {"alpaca_instructions/sft.json": b"[]", "README.md": b"#"}
    folder = hub.data_files("tatsu-lab/alpaca_farm", ["alpaca_instructions/sft.json"])
    assert (folder / "alpaca_instructions" / "sft.json").read_bytes() == b"[]" and not (folder / "README.md").exists()
    assert folder.parents[1].name == "datasets--tatsu-lab--alpaca_farm"
    refuses(lambda: hub.data_files("tatsu-lab/alpaca_farm", ["README.md", "sft.json"]), InputError, "no sft.json")
    refuses(lambda: hub.data_files("tatsu-lab/other", ["a"]), InputError, "there is no", "/datasets/tatsu-lab/other")


def test_alpacaeval_s_difficulties_are_fetched_where_they_are_asked_for(world, tmp_path):
    rows = [f"{model},{i},{gap / 10},{i % 5 - 2},{.5 + gap / 40}\n" for gap, model in ((-9, "long"), (9, "brief"))
            for i in range(20)]
    text = "model,index,std_delta_len,instruction_difficulty,preference\n" + "".join(rows)
    world.repos["datasets/tatsu-lab/alpaca_eval"] = {"df_gamed.csv": text.encode(), "README.md": b"#"}
    pairs = [{"instruction": f"Sing {i}.", "output_1": "la" * (9 + i % 3), "generator_1": "gpt4_1106_preview",
              "output_2": "la" * (5 + i % 7), "generator_2": "mine", "preference": 1 + i % 2} for i in range(20)]
    answers = [{"instruction": pair["instruction"], "output": pair["output_1"]} for pair in pairs]
    for name, records in (("mine", pairs), ("ref", answers)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))

    def evaluated(*flags):
        ended = command("eval.py", tmp_path / "mine.json", "--resamples", 9, "--out", tmp_path, *flags)
        assert ended.code == 0, ended.err
        name = json.loads((tmp_path / "report.json").read_text())["rows"]["mine"]["lc_name"]
        return name, world.asked_for("hub", "GET").count("df_gamed.csv"), "is not the one that" in ended.out

    assert evaluated() == ("length_controlled_minimal", 0, True)
    assert evaluated("--lc_data", "alpaca_eval", "--reference", tmp_path / "ref.json") == (
        "length_controlled_v1", 1, False)
    assert evaluated("--lc", "alpaca_eval") == ("length_controlled_v1", 1, False)       # from the cache
    ended = command("eval.py", tmp_path / "mine.json", "--lc_data", "alpaca_eval", "--out", tmp_path)
    refused(ended, 2, "difficulties are of 20 instructions: give the reference outputs")


def test_progress_is_of_what_has_to_come(world, monkeypatch, capsys, cache):
    clock = iter(range(0, 100_000, 11))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    world.repos["models/org/name"]["model.safetensors"] = data = bytes(12_000_000)
    left_behind(cache, b"")
    (cache / "blobs" / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(data[:7_000_000])
    hub.checkpoint("org/name")
    lines = [line for line in capsys.readouterr().out.splitlines() if "model.safetensors" in line]
    assert [re.match(r"hub: MB (\d)/5 \| model.safetensors \| \d+\.\d MB/s", line)[1] for line in lines]
    assert len({line[:11] for line in lines}) == 6 and lines[-1].startswith("hub: MB 5/5")
