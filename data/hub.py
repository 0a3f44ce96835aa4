"""Downloads models and data sets from the Hugging Face hub over plain HTTP, into the cache of huggingface_hub.

The cache is shared: files that transformers downloaded are not downloaded again here, nor the other way round.
A killed download is resumed where it stopped. Each file is checked against the hash that the hub sends as its ETag (the
sha256 of a large file, git's sha1 of a small one) before it enters the cache. The layout of the cache, for org/name:

    models--org--name/refs/main                     the commit of main when it was last fetched
    models--org--name/snapshots/<commit>/<file>     a relative link to
    models--org--name/blobs/<hash>                  the bytes; <hash>.incomplete during a download

Environment: HF_HOME or HF_HUB_CACHE (the folder of the cache), HF_ENDPOINT (a mirror of the hub), HF_TOKEN (for gated
models), HF_HUB_OFFLINE=1 (use the cache only). Source: huggingface_hub 2.4.0, file_download.py. Left out: uploads, the
xet protocol, downloads of several files at a time.
"""
import hashlib
import json
import os
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests

from data import FULL, InputError, Refusal
from data.blobs import link, locked, renamed, size_of
from data.progress import Progress
from data.retries import MAX_RETRY_AFTER, delay, retry_after

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json")
INDEX = "model.safetensors.index.json"
WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO = re.compile(rf"(?=.{{1,96}}$)(?!.*(?:--|\.\.))(?:{WORD}/)?{WORD}(?<!\.git)")
NAME = re.compile(r"(?!.*(?:^|/)\.\.?(?:/|$))[A-Za-z0-9._][A-Za-z0-9._-]*(?:/[A-Za-z0-9._][A-Za-z0-9._-]*)*")
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
COMMIT, HASH = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
TRIES = 5                               # give up after this number of tries in a row without a new byte
CHUNK = 1 << 16                         # bytes read at a time; a broken connection loses no more than this
TIMEOUT = 10, 30                        # seconds to wait for a connection, and for the next bytes
QUICK = 1, 3                            # the same where the cache will do
OFFLINE = "HF_HUB_OFFLINE is set"
STRANGE = "does not answer as a hub does (the login page of a network, or a wrong HF_ENDPOINT?)"
ENDPOINT = re.compile(r"https?://(?:\[[0-9A-Fa-f:]+\]|[\w.-]+)(?::\d{1,5})?(?:/[\w.~%/-]*)?")

# `hash` is the sha256, or git's sha1 of a blob. `url` is where the bytes are: often a signed link to another host that
# expires after an hour.
_File = namedtuple("File", "name hash size url")


class HubError(Refusal):
    """The hub cannot be reached, or what it sends cannot be used."""


class DiskFull(Refusal):
    """There is too little space on the disk for the files."""
    code = 5


class _Fault(requests.RequestException):
    """One try failed, and another may succeed; a RequestException, so that it is handled like a lost connection.
    `response`: an answer that may say when to try again."""


def fetch(repo, wanted, revision="main", kind="models"):
    """Download some files of a repository, if they are not in the cache yet; returns the folder (Path) with the files.

    wanted: a function from the list of the repository's file names (offline, of the cached ones) to the names to get.
    kind: "models" or "datasets". Raises InputError if there is no such repository, revision or file, or if its licence
    has to be accepted first; HubError if the hub cannot be reached and the cache has no copy; DiskFull.
    """
    def work(snapshot):
        snapshot.download(wanted(snapshot.names))
        return snapshot.finish()
    return _first_quickly(work, repo, revision, kind)


def _first_quickly(work, repo, revision, kind):
    """What work(snapshot) returns. If the hub is not reached at once and the repository is in the cache, the cache is
    used; only if that has not all that is wanted, the hub is tried for longer."""
    snapshot = _Snapshot(repo, revision, kind, quick=True)
    try:
        return work(snapshot)
    except HubError:
        if not snapshot.quick:
            raise
    return work(_Snapshot(repo, revision, kind))


def checkpoint(name):
    """Download a model: its config, tokenizer and safetensors; returns the folder (Path). Errors as in `fetch`.

    name: `org/name` or `name`, with or without @revision. Of a PEFT adapter, its two files (adapter_config.json and
    adapter_model.safetensors) and the tokenizer are downloaded.
    """
    repo, at, revision = name.partition("@")
    return _first_quickly(_checkpoint, repo, revision if at else "main", "models")


def _checkpoint(snapshot):
    """checkpoint() of a _Snapshot."""
    small = [file for file in SMALL if file in snapshot.names]
    if "model.safetensors" in snapshot.names:
        snapshot.download(["config.json", *small, "model.safetensors"])
    elif INDEX in snapshot.names:
        snapshot.download(["config.json", *small, INDEX])
        snapshot.download(_shards(snapshot.folder / INDEX))
    elif "adapter_model.safetensors" in snapshot.names:
        snapshot.download(["adapter_config.json", *small, "adapter_model.safetensors"])
    else:
        pickles = [file for file in snapshot.names if file.endswith((".bin", ".pt", ".pth"))]
        raise snapshot.lacks(["model.safetensors"], pickles and f", only {pickles[0]}: pickles can run code and are "
                             f"never loaded, so name a revision with safetensors, perhaps {snapshot.repo}@refs/pr/1")
    return snapshot.finish()


def data_files(repo, names, revision="main"):
    """Download the files `names` of a data set; returns the folder (Path). Errors as in `fetch`."""
    return fetch(repo, lambda listed: names, revision, "datasets")


def _shards(index):
    """The shards that an index file names. A name like ../../x, which points outside the folder, is refused."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        strange = [name for name in names if not SHARD.fullmatch(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: not an index of safetensors; name another revision of the model") from None
    if strange:
        raise InputError(f"{index}: {strange[0]!r:.99} is not the plain name of a safetensors file; use another model")
    return names


def _configured_path(variable, name):
    """The path in an environment variable; if it is not set, `name` in Hugging Face's home folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    path = os.environ.get(variable) or os.path.join(home, name)
    return Path(os.path.expandvars(os.path.expanduser(path)))


def pause(failed, asked=None):
    """Sleep before another try: as long as the server asks for, or longer after each failed one, up to a minute."""
    time.sleep(delay(failed) if asked is None else asked)


class _Snapshot:
    """One commit of a repository. `names` are its files: all that the hub lists, or offline those in the cache.

    `offline` is "" if the hub was reached, and otherwise the reason why only the cache is used. quick: try the hub only
    once and briefly if the cache has this revision.
    """

    def __init__(self, repo, revision, kind, quick=False):
        if not REPO.fullmatch(repo) or not NAME.fullmatch(revision):
            raise InputError(f"{repo!r:.99} at {revision!r:.99} is no name of a repository: write org/name or "
                             "org/name@revision")
        self.repo, self.revision, self.session = repo, revision, requests.Session()
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not ENDPOINT.fullmatch(self.endpoint):
            raise InputError(f"HF_ENDPOINT={self.endpoint!r:.99} is no address: unset it for huggingface.co")
        self.path = f"/datasets/{repo}" if kind == "datasets" else f"/{repo}"
        self.root = _configured_path("HF_HUB_CACHE", "hub") / f"{kind}--{repo.replace('/', '--')}"
        switch = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        self.offline = OFFLINE if switch.lower() in ("1", "true", "yes", "on") else ""
        self.commit = revision if COMMIT.fullmatch(revision) else self._cached_commit()
        self.quick = quick and not self.offline and bool(self.commit) and self.folder.is_dir()
        self.arrived, self.progress = 0, None           # bytes of the files that are missing, and how far they are
        if not self.offline:
            self.token = self._token()
            try:
                self.commit, self.names = self._listing(f"/api/{kind}/{repo}/revision/{quote(revision, safe='')}")
                self.quick = False
            except HubError as error:
                self.offline = str(error)
        if self.offline:
            if not self.commit or not self.folder.is_dir():
                raise HubError(f"{self.offline}; {self.root} has no {revision}: fetch it once over a network")
            self.names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    @property
    def folder(self):
        return self.root / "snapshots" / self.commit

    def download(self, names):
        """Download those of the files `names` that the snapshot folder does not have yet."""
        names = list(dict.fromkeys(names))
        if absent := [name for name in names if name not in self.names]:
            raise self.lacks(absent)
        if self.offline:
            return
        files = [file for file in map(self._resolve, names) if size_of(self.folder / file.name) != file.size]
        missing = {file.hash: file for file in files if size_of(self._blob(file)) != file.size}.values()
        need = sum(file.size - max(0, size_of(self._blob(file, ".incomplete"))) for file in missing)
        existing = next(path for path in self.root.absolute().parents if path.is_dir())
        free = shutil.disk_usage(existing).free
        if need > free:
            raise DiskFull(f"need {need / 1e9:.1f} GB in {self.root.parent}, {free / 1e9:.1f} GB free: make room, "
                           "or set HF_HOME to a folder on a larger disk")
        self.progress = Progress("hub: MB", round(need / 1e6))
        for file in missing:
            self._download(file)
        Progress.close()
        for file in files:
            link(self._blob(file), self.folder / file.name)

    def finish(self):
        """Record in refs/ which commit the revision is, so that it is found offline; returns the snapshot folder."""
        if self.offline and self.offline != OFFLINE:
            print(f"hub: {self.offline}; {self.repo} is used as cached, commit {self.commit[:7]}", flush=True)
        elif self.revision != self.commit != self._cached_commit():
            try:
                with renamed(self.root / "refs" / self.revision) as temp, open(temp, "w") as file:
                    file.write(self.commit)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno in FULL:
                    raise
                # Nothing can be written to this cache: the hub is asked again the next time.
        return self.folder

    def lacks(self, names, advice=""):
        """The error to raise if the repository does not have the files `names`."""
        which = ", ".join(f"{name!r:.99}"[1:-1] for name in names[:9])
        if self.offline:
            return HubError(f"{self.offline}; {self.folder} has no {which}: fetch it once over a network")
        return InputError(f"{self.repo} at {self.revision} has no {which}{advice or ': try another revision'}")

    def _blob(self, file, suffix=""):
        return self.root / "blobs" / (file.hash + suffix)

    def _cached_commit(self):
        """The commit of the revision when it was last fetched, or "" if it was never fetched."""
        ref = self.root / "refs" / self.revision
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
        return commit if COMMIT.fullmatch(commit) else ""

    # ---- small requests to the hub ---------------------------------------------------------------------

    def _token(self):
        """The user's access token: from the environment, or the file that `hf auth login` writes; "" without one."""
        file = _configured_path("HF_TOKEN_PATH", "token")
        token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        if not token and file.is_file():
            token = file.read_text(errors="replace")
        token = (token or "").strip()
        if not re.fullmatch("[!-~]*", token):
            raise InputError(f"the token in HF_TOKEN or {file} has a character that no token has: copy it again")
        return token

    def _listing(self, path):
        """(commit, file names) of the revision. Names that could point outside the snapshot folder are dropped."""
        body = self._request("GET", path).content
        try:
            listing = json.loads(body)
            commit, names = listing["sha"], [file["rfilename"] for file in listing["siblings"]]
            if COMMIT.fullmatch(commit) and (commit == self.revision or not COMMIT.fullmatch(self.revision)):
                return commit, [name for name in names if NAME.fullmatch(name)]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise HubError(f"{self.endpoint}{path} {STRANGE}")

    def _resolve(self, name):
        """The hash, the size and the download address of one file, from the headers that the hub sends for it."""
        path = f"{self.path}/resolve/{self.commit}/{quote(name)}"
        response = self._request("HEAD", path)
        headers, moved = response.headers, response.is_redirect
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).removeprefix("W/").strip('"')
        size = headers.get("X-Linked-Size") or ("" if moved else headers.get("Content-Length", ""))
        if not HASH.fullmatch(etag) or not re.fullmatch("[0-9]{1,15}", size):
            raise HubError(f"{self.endpoint}{path} {STRANGE}")
        return _File(name, etag, int(size), urljoin(response.url, headers["Location"] if moved else ""))

    def _request(self, method, path):
        """The hub's response to a small request. Temporary faults are tried again; a refusal (4xx) is raised."""
        asked = None
        for failed in range(1 if self.quick else TRIES):
            if failed:
                pause(failed, asked)
            try:
                response = self._send(method, self.endpoint + path)
                if response.status_code < 400:
                    return response
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise self._refusal(response)
                fault, asked = f"HTTP {response.status_code}", _wait(response)
            except requests.RequestException as error:
                fault, asked = _describe(error), None
        raise HubError(f"{self.endpoint}{path} cannot be reached ({fault}): check the network or HF_ENDPOINT")

    def _send(self, method, url, download=False, **headers):
        """Send one request, follow its redirects, and return the response.

        The token is sent to the hub alone. A redirect to another host is followed only for a `download`, whose body is
        then read by the caller; otherwise the redirect itself is returned. Redirects are followed here because requests
        would add credentials from a .netrc file. X-Linked-... headers, which describe the file, are kept across them.
        """
        linked, home = {}, urlsplit(self.endpoint)[:2]
        for _ in range(TRIES):
            secret = {"Authorization": f"Bearer {self.token}"} if self.token and urlsplit(url)[:2] == home else {}
            request = requests.Request(method, url, {"Accept-Encoding": "identity", **headers, **secret}).prepare()
            settings = self.session.merge_environment_settings(url, {}, download, None, None)
            try:
                timeout = QUICK if self.quick else TIMEOUT
                response = self.session.send(request, timeout=timeout, allow_redirects=False, **settings)
                url = urljoin(url, response.headers.get("Location", ""))
            except ValueError:          # requests parses the Location even if it must not follow it
                raise _Fault("it redirects to something that is no address") from None
            linked.update((key, text) for key, text in response.headers.items() if key.lower().startswith("x-linked"))
            response.headers.update(linked)
            if not response.is_redirect or not download and urlsplit(url)[:2] != home:
                return response
            response.close()
        raise _Fault("it redirects in circles")

    def _refusal(self, response):
        """The error to raise for a 4xx response; the hub gives the reason in the header X-Error-Code."""
        code, status, page = response.headers.get("X-Error-Code", ""), response.status_code, self.endpoint + self.path
        where = f"HF_TOKEN, or in {_configured_path('HF_TOKEN_PATH', 'token')}"
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

    def _download(self, file):
        """Download one blob into the cache. Bytes that arrived stay in its .incomplete file if this process is killed,
        and the next run goes on from there."""
        blob, partial, failed = self._blob(file), self._blob(file, ".incomplete"), 0
        blob.parent.mkdir(parents=True, exist_ok=True)
        with locked(partial, file.name):
            most = size_of(partial)
            while size_of(blob) != file.size:       # another process may have finished it while this one waited
                try:
                    self._append(partial, file)
                    os.replace(partial, blob)
                except requests.RequestException as error:
                    held = size_of(partial)
                    failed, most = (0, held) if held > most else (failed + 1, most)
                    if failed == TRIES:
                        raise HubError(f"{self.endpoint}{self.path}/resolve/{self.commit}/{file.name}: "
                                       f"{_describe(error)}, {TRIES} times; {held:,} of {file.size:,} bytes are here "
                                       "and stay: check the network or wait, and run the same command again") from None
                    pause(failed, None if error.response is None else _wait(error.response))
                    file = self._resolved_again(file)

    def _resolved_again(self, file):
        """The file with a new address, as a signed link may have expired. HubError if it has become another file."""
        again = self._resolve(file.name)
        if (again.hash, again.size) != (file.hash, file.size):
            raise HubError(f"{self.endpoint}{self.path}: {file.name} has changed while it was being read: run the same "
                           "command again")
        return again

    def _append(self, partial, file):
        """Download the rest of a partial file. Returns once the file is complete and its hash is right; otherwise
        raises a RequestException, and what arrived stays in the file unless its hash is wrong."""
        fresh = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
        with open(partial, "a+b") as out:
            digest = fresh.copy()
            out.seek(0)
            while chunk := out.read(CHUNK):
                digest.update(chunk)
            if (held := out.tell()) < file.size:
                rest = {"Range": f"bytes={held}-"} if held else {}
                with self._send("GET", file.url, download=True, **rest) as response:
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
                        self._show(file.name, len(chunk))
                        if held > file.size:
                            break
            out.flush()
            held = os.fstat(out.fileno()).st_size   # where files cannot be locked, another process may write here too
            if held < file.size:
                raise _Fault("the connection ends early")
            if held > file.size or digest.hexdigest() != file.hash:
                out.truncate(0)
                raise _Fault("the bytes that arrive do not have the hash that the hub gives")
            os.fsync(out.fileno())


    def _show(self, name, new):
        """Show the progress of the download of all missing files, of which `new` bytes have arrived."""
        self.arrived += new
        rate = self.arrived / 1e6 / max(.001, time.monotonic() - self.progress.start)
        self.progress.update(round(self.arrived / 1e6), f"{name} | {rate:.1f} MB/s")


def _wait(response):
    """The seconds that a server asks to wait before another try, None if it asks for none. HubError if they are many.
    """
    asked = retry_after(response.headers)
    if asked is not None and asked > MAX_RETRY_AFTER:
        raise HubError(f"{urlsplit(response.url)[1]} asks to wait {asked:.0f} seconds (HTTP {response.status_code}): "
                       "run the same command again then")
    return asked


def _first_byte(response, size):
    """The position in the file of a response's first byte; -1 if the server gives none, or refuses the range."""
    status, headers = response.status_code, response.headers
    if status in (206, 416):
        match = re.match(r"bytes (\d{1,15})-", headers.get("Content-Range", ""))
        return int(match[1]) if match else -1
    if status != 200:
        raise _Fault(f"HTTP {status}", response=response)
    # A login page comes with status 200 too: it must not replace the bytes that are here.
    if headers.get("Content-Type", "").startswith("text/html") or headers.get("Content-Length", f"{size}") != f"{size}":
        raise _Fault("a web page or another file arrives instead of this one (does the network ask for a login?)")
    return 0


def _describe(error):
    """A short description of an error. The messages of requests are long, and contain signed links."""
    return str(error) if isinstance(error, _Fault) else type(error).__name__
