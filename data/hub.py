"""Models and data sets from the Hugging Face hub, over plain HTTP, into the cache that its own library keeps.

What huggingface_hub or transformers fetched is found here, and the reverse. Unlike that library this file goes on where
a killed download stopped, and lets nothing into the cache whose hash is not the hub's: an ETag is the sha256 of a large
file, and git's sha1 of a small one. The layout, for org/name:

    models--org--name/refs/main                     the commit that main was when it was last fetched
    models--org--name/snapshots/<commit>/<file>     a relative link to
    models--org--name/blobs/<hash>                  the bytes; <hash>.incomplete while some are missing

Environment: HF_HOME or HF_HUB_CACHE (where), HF_ENDPOINT (a mirror), HF_TOKEN (for gated models), HF_HUB_OFFLINE (no
network). Source: huggingface_hub 2.4.0, file_download.py. Left out: uploads, the xet protocol, several files at a time.
"""
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests

from data import InputError, Refusal

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json")
INDEX = "model.safetensors.index.json"
WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO = re.compile(rf"(?=.{{1,96}}$)(?!.*(?:--|\.\.))(?:{WORD}/)?{WORD}(?<!\.git)")
NAME = re.compile(r"(?!.*(?:^|/)\.\.?(?:/|$))[A-Za-z0-9._][A-Za-z0-9._-]*(?:/[A-Za-z0-9._][A-Za-z0-9._-]*)*")
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
COMMIT, HASH = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
TRIES = 5                               # in a row without a new byte
CHUNK = 1 << 16                         # bytes; at most so many are lost with a connection
TIMEOUT = 10, 30                        # seconds to connect, and of silence
OFFLINE = "HF_HUB_OFFLINE is set"
STRANGE = "does not answer as a hub does (the login page of a network, or a wrong HF_ENDPOINT?)"
ENDPOINT = re.compile(r"https?://(?:\[[0-9A-Fa-f:]+\]|[\w.-]+)(?::\d{1,5})?(?:/[\w.~%/-]*)?")

# `hash` is the sha256, or git's sha1 of a blob; `url` is mostly on another host, signed, and good for an hour.
_File = namedtuple("File", "name hash size url")


class HubError(Refusal):
    """The hub cannot be reached, or what it sends cannot be used."""


class DiskFull(Refusal):
    """The files would not fit."""
    code = 5


class _Fault(requests.RequestException):
    """One try went wrong in a way that another one may not, as in all errors of requests."""


def fetch(repo, wanted, revision="main", kind="models"):
    """The snapshot folder of a repository, once all files are in it that `wanted` picks from the list of its names.

    `kind` is "models" or "datasets". Offline, the list is what the cached snapshot has. InputError: no such repository,
    revision or file, or a licence to accept first; HubError: no network and nothing cached, or a broken hub; DiskFull.
    """
    snapshot = _Snapshot(repo, revision, kind)
    snapshot.get(wanted(snapshot.names))
    return snapshot.settle()


def checkpoint(name):
    """The snapshot folder of the model `org/name`, `name`, or either with @revision: config, tokenizer, safetensors.

    Of a PEFT adapter, adapter_config.json and adapter_model.safetensors. Errors as in `fetch`.
    """
    repo, at, revision = name.partition("@")
    snapshot = _Snapshot(repo, revision if at else "main", "models")
    small = [file for file in SMALL if file in snapshot.names]
    if "model.safetensors" in snapshot.names:
        snapshot.get(["config.json", *small, "model.safetensors"])
    elif INDEX in snapshot.names:
        snapshot.get(["config.json", *small, INDEX])
        snapshot.get(_shards(snapshot.folder / INDEX))
    elif "adapter_model.safetensors" in snapshot.names:
        snapshot.get(["adapter_config.json", *small, "adapter_model.safetensors"])
    else:
        pickles = [file for file in snapshot.names if file.endswith((".bin", ".pt", ".pth"))]
        raise snapshot.lacks(["model.safetensors"], pickles and f", only {pickles[0]}: pickles can run code and are "
                             f"never loaded, so name a revision with safetensors, perhaps {repo}@refs/pr/1")
    return snapshot.settle()


def data_files(repo, names, revision="main"):
    """The snapshot folder of a data set, once the files `names` are in it; errors as in `fetch`."""
    return fetch(repo, lambda listed: names, revision, "datasets")


def _shards(index):
    """The files that an index names; it comes from the network, and may name anything."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        strange = [name for name in names if not SHARD.fullmatch(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: not an index of safetensors; name another revision of the model") from None
    if strange:
        raise InputError(f"{index}: {strange[0]!r:.99} is not the plain name of a safetensors file; use another model")
    return names


def _place(variable, *default):
    """A path from the environment; by default, what lies there in Hugging Face's home."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get(variable) or os.path.join(home, *default))))


def pause(failed):
    """Wait before another try, longer with each one that failed."""
    time.sleep(min(60, 0.5 * 2 ** failed) * random.uniform(0.5, 1))


class _Snapshot:
    """One commit of a repository: `names` are its files as the hub, or without a network the cache, has them."""

    def __init__(self, repo, revision, kind):
        if not REPO.fullmatch(repo) or not NAME.fullmatch(revision):
            raise InputError(f"{repo!r:.99} at {revision!r:.99} is on no hub: write org/name or org/name@revision")
        self.repo, self.revision, self.session = repo, revision, requests.Session()
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not ENDPOINT.fullmatch(self.endpoint):
            raise InputError(f"HF_ENDPOINT={self.endpoint!r:.99} is no address: unset it for huggingface.co")
        self.path = f"/datasets/{repo}" if kind == "datasets" else f"/{repo}"
        self.root = _place("HF_HUB_CACHE", "hub") / f"{kind}--{repo.replace('/', '--')}"
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        self.away = OFFLINE if offline.lower() in ("1", "true", "yes", "on") else ""      # why the hub is not asked
        if not self.away:
            self.token = self._token()
            try:
                self.commit, self.names = self._listing(f"/api/{kind}/{repo}/revision/{quote(revision, safe='')}")
            except HubError as error:
                self.away = str(error)
        if self.away:
            self.commit = revision if COMMIT.fullmatch(revision) else self._noted()
            if not self.commit or not self.folder.is_dir():
                raise HubError(f"{self.away}; {self.root} has no {revision}: fetch it once over a network")
            self.names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    @property
    def folder(self):
        return self.root / "snapshots" / self.commit

    def get(self, names):
        """Have these files in the snapshot, however many tries it takes."""
        names = list(dict.fromkeys(names))
        if absent := [name for name in names if name not in self.names]:
            raise self.lacks(absent)
        if self.away:
            return
        files = [file for file in map(self._resolve, names) if _size_of(self.folder / file.name) != file.size]
        missing = {file.hash: file for file in files if _size_of(self._blob(file)) != file.size}.values()
        need = sum(file.size - max(0, _size_of(self._blob(file, ".incomplete"))) for file in missing)
        free = shutil.disk_usage(next(path for path in self.root.absolute().parents if path.is_dir())).free
        if need > free:
            raise DiskFull(f"need {need / 1e9:.1f} GB in {self.root.parent}, {free / 1e9:.1f} GB free: make room, "
                           "or set HF_HOME to a folder on a larger disk")
        progress = _Progress(sum(file.size for file in missing))
        for file in missing:
            self._download(file, progress)
        for file in files:
            _link(self._blob(file), self.folder / file.name)

    def settle(self):
        """All is there: note which commit the revision is, for those who come without a network -> the folder."""
        if self.away and self.away != OFFLINE:
            print(f"hub: {self.away}; {self.repo} is used as cached, commit {self.commit[:7]}", flush=True)
        elif self.revision != self.commit != self._noted():
            with _renamed(self.root / "refs" / self.revision) as temp, open(temp, "w") as file:
                file.write(self.commit)
                file.flush()
                os.fsync(file.fileno())
        return self.folder

    def lacks(self, names, advice=""):
        """The error for files that are not there."""
        which = ", ".join(f"{name!r:.99}"[1:-1] for name in names[:9])
        if self.away:
            return HubError(f"{self.away}; {self.folder} has no {which}: fetch it once over a network")
        return InputError(f"{self.repo} at {self.revision} has no {which}{advice or ': try another revision'}")

    def _blob(self, file, suffix=""):
        return self.root / "blobs" / (file.hash + suffix)

    def _noted(self):
        """The commit that the revision was when it was last fetched, or "" if it never was."""
        ref = self.root / "refs" / self.revision
        commit = ref.read_text().strip() if ref.is_file() else ""
        return commit if COMMIT.fullmatch(commit) else ""

    # ---- what the hub says -----------------------------------------------------------------------------

    def _token(self):
        file = _place("HF_TOKEN_PATH", "token")
        token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        token = (token or (file.read_text(errors="replace") if file.is_file() else "")).strip()
        if not re.fullmatch("[!-~]*", token):
            raise InputError(f"the token in HF_TOKEN or {file} has a character that no token has: copy it again")
        return token

    def _listing(self, path):
        """(commit, names); a name that could lead anywhere else is left out, for nobody needs it."""
        body = self._ask("GET", path).content
        try:
            listing = json.loads(body)
            commit, names = listing["sha"], [file["rfilename"] for file in listing["siblings"]]
            if COMMIT.fullmatch(commit) and (commit == self.revision or not COMMIT.fullmatch(self.revision)):
                return commit, [name for name in names if NAME.fullmatch(name)]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise HubError(f"{self.endpoint}{path} {STRANGE}")

    def _resolve(self, name):
        """What it says of one file."""
        path = f"{self.path}/resolve/{self.commit}/{quote(name)}"
        response = self._ask("HEAD", path)
        headers, moved = response.headers, response.is_redirect
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).removeprefix("W/").strip('"')
        size = headers.get("X-Linked-Size") or ("" if moved else headers.get("Content-Length", ""))
        if not HASH.fullmatch(etag) or not re.fullmatch("[0-9]{1,15}", size):
            raise HubError(f"{self.endpoint}{path} {STRANGE}")
        return _File(name, etag, int(size), urljoin(response.url, headers["Location"] if moved else ""))

    def _ask(self, method, path):
        """The answer to a small request; what may pass is tried again, and a refusal is raised."""
        for failed in range(TRIES):
            if failed:
                pause(failed)
            try:
                response = self._send(method, self.endpoint + path)
                if response.status_code < 400:
                    return response
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise self._refusal(response)
                fault = f"HTTP {response.status_code}"
            except requests.RequestException as error:
                fault = _in_short(error)
        raise HubError(f"{self.endpoint}{path} cannot be reached ({fault}): check the network or HF_ENDPOINT")

    def _send(self, method, url, away=False, **headers):
        """One exchange. Only the endpoint sees the token; other hosts, and with an unread body, only if it goes `away`.

        Redirects are followed by hand: requests would add what a .netrc says, and a renamed repository moves on its own
        host. What the hub says of the file itself (X-Linked-...) survives such hops.
        """
        linked, home = {}, urlsplit(self.endpoint)[:2]
        for _ in range(TRIES):
            secret = {"Authorization": f"Bearer {self.token}"} if self.token and urlsplit(url)[:2] == home else {}
            request = requests.Request(method, url, {"Accept-Encoding": "identity", **headers, **secret}).prepare()
            settings = self.session.merge_environment_settings(url, {}, away, None, None)
            try:
                response = self.session.send(request, timeout=TIMEOUT, allow_redirects=False, **settings)
                url = urljoin(url, response.headers.get("Location", ""))
            except ValueError:          # requests looks at a Location, too, although it is told not to follow it
                raise _Fault("it redirects to no address") from None
            linked.update((key, text) for key, text in response.headers.items() if key.lower().startswith("x-linked"))
            response.headers.update(linked)
            if not response.is_redirect or not away and urlsplit(url)[:2] != home:
                return response
            response.close()
        raise _Fault("it redirects in circles")

    def _refusal(self, response):
        """What a 4xx means; the hub's own word for it is X-Error-Code."""
        code, status, page = response.headers.get("X-Error-Code", ""), response.status_code, self.endpoint + self.path
        where = f"HF_TOKEN, or in {_place('HF_TOKEN_PATH', 'token')}"
        if code == "GatedRepo":
            return InputError(f"{self.repo} is gated: accept its licence at {page}, and put your token in {where}")
        if code == "RevisionNotFound":
            return InputError(f"{self.repo} has no revision {self.revision}: try main")
        if code == "EntryNotFound":
            return InputError(f"{self.repo} at {self.revision} has no {urlsplit(response.url).path}: try again")
        if code == "RepoNotFound" or status == 404 or status == 401 and not self.token:
            return InputError(f"there is no {page}, or it is private: check its name, or put a token in {where}")
        if status == 401:
            return InputError(f"{self.endpoint} does not accept the token in {where}: make another one in its settings")
        return HubError(f"{page} is refused (HTTP {status}): try another network, or another hub in HF_ENDPOINT")

    # ---- one file --------------------------------------------------------------------------------------

    def _download(self, file, progress):
        """Bring one blob into the cache; what arrived stays for the next run, whatever happens to this one."""
        blob, partial, failed = self._blob(file), self._blob(file, ".incomplete"), 0
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial, file.name):
            most = _size_of(partial)
            while _size_of(blob) != file.size:       # another process may have finished it while this one waited
                try:
                    self._append(partial, file, progress)
                    os.replace(partial, blob)
                except requests.RequestException as error:
                    held = _size_of(partial)
                    failed, most = (0, held) if held > most else (failed + 1, most)
                    if failed == TRIES:
                        raise HubError(f"{self.endpoint}{self.path}/resolve/{self.commit}/{file.name}: "
                                       f"{_in_short(error)}, {TRIES} times; {held:,} of {file.size:,} bytes are here "
                                       "and stay: check the network or wait, and run the same command again") from None
                    pause(failed)
                    file = file._replace(url=self._resolve(file.name).url)      # a signed link may have expired
        progress.before += file.size

    def _append(self, partial, file, progress):
        """One try to go on where a partial file ends; afterwards it is whole and right, or an error is raised."""
        fresh = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
        with open(partial, "a+b") as out:
            digest = fresh.copy()
            out.seek(0)
            while chunk := out.read(CHUNK):
                digest.update(chunk)
            if (held := out.tell()) < file.size:
                ask = {"Range": f"bytes={held}-"} if held else {}
                with self._send("GET", file.url, away=True, **ask) as response:
                    start = _first_byte(response, file.size)
                    if start != held:
                        out.truncate(0)
                        digest, held = fresh.copy(), 0
                    if start != held:
                        raise _Fault("the server does not send the part that it was asked for")
                    for chunk in response.iter_content(CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
                        held += len(chunk)
                        progress.show(file.name, held, len(chunk))
                        if held > file.size:
                            break
            out.flush()
            held = os.fstat(out.fileno()).st_size   # not what came: without locks, another may write here, too
            if held < file.size:
                raise _Fault("the connection ends early")
            if held > file.size or digest.hexdigest() != file.hash:
                out.truncate(0)
                raise _Fault("what arrives does not have the hash that the hub gives")
            os.fsync(out.fileno())


def _first_byte(response, size):
    """Where in the file a body begins; -1 if the server does not say, or cannot send what it was asked for."""
    status, headers = response.status_code, response.headers
    if status in (206, 416):
        match = re.match(r"bytes (\d{1,15})-", headers.get("Content-Range", ""))
        return int(match[1]) if match else -1
    if status != 200:
        raise _Fault(f"HTTP {status}")
    # A page that says 200 must not cost the bytes that are here.
    if headers.get("Content-Type", "").startswith("text/html") or headers.get("Content-Length", f"{size}") != f"{size}":
        raise _Fault("something else arrives than the file (a web page, of a network that wants a login?)")
    return 0


def _in_short(error):
    """Few words: requests has many, and shows signed links in them."""
    return str(error) if isinstance(error, _Fault) else type(error).__name__


def _size_of(path):
    """Bytes of a file, or -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


@contextmanager
def _claimed(path, name):
    """Inside, no other process downloads to this path: it waits for our lock to end, with us if need be.

    Where there are no locks, as on Windows and some network disks, two at a time cost each other tries, for the hash
    of what they mix is wrong.
    """
    with open(path, "ab") if fcntl else nullcontext() as file:      # Windows cannot rename an open file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"hub: another process downloads {name}, waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (AttributeError, OSError):
            pass
        yield
        path.unlink(missing_ok=True)            # an empty one, if another process had brought the file


@contextmanager
def _renamed(path):
    """Another name to write under, which becomes `path` at the end: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temp
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def _link(blob, pointer):
    with _renamed(pointer) as temp:
        try:
            os.symlink(os.path.relpath(blob, pointer.parent), temp)
        except OSError:                         # Windows without the privilege, Google Drive
            shutil.copyfile(blob, temp)


class _Progress:
    """How far all files of one call are: a line that updates on a terminal, elsewhere a new one every few seconds."""

    def __init__(self, total):
        self.total, self.before, self.arrived = total, 0, 0     # bytes: of all files, of those that are done, new ones
        self.began = self.shown = time.monotonic()

    def show(self, name, held, new):
        self.arrived += new
        now, done, terminal = time.monotonic(), self.before + held, sys.stdout.isatty()
        if now - self.shown > (0.2 if terminal else 5):
            self.shown, rate = now, self.arrived / (now - self.began)
            line = (f"hub: {name} {done / 1e6:.0f}/{self.total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                    f"eta {(self.total - done) / rate:.0f} s")
            print(f"\r{line:<79}\r" if terminal else line, end="" if terminal else "\n", flush=True)
