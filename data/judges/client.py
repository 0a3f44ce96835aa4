"""The judge behind HTTP: one client for every server that speaks OpenAI's chat completions.

Faults are told apart by one table (`_outcome`): worth another try, hopeless for this request, hopeless for all, or a
parameter that this server does not know. Every answer is in the cache before it is used; an end by error, budget or
Ctrl-C keeps what arrived, and the same command goes on from there.
"""
import email.utils
import hashlib
import itertools
import json
import math
import random
import re
import threading
import time
from pathlib import Path

import requests
from requests.packages.urllib3.exceptions import HTTPError

from data.judges import JudgeError
from data.judges.cache import GARBAGE, Cache

MAX_BYTES = 4 << 20     # of one reply: what is longer is cut, and no JSON any more
MAX_RETRY_AFTER = 120   # seconds: who asks for more has a daily limit
MAX_GARBAGE = 4         # times in a row that a request is answered, but not by a chat completion
NO_MESSAGE = "no message in the reply"
BROKE = re.compile("insufficient_quota|credit_balance|spend_limit|usage_limit|billing")     # a 429 no waiting cures
TOO_LONG = re.compile("context_length|context length|too long|too many tokens", re.IGNORECASE)
FILTERED = re.compile("content_filter|content_policy|content management policy", re.IGNORECASE)
OPTIONAL = ("max_tokens", "temperature", "logprobs", "top_logprobs")        # what a server may do without


class Judge:
    """An OpenAI-compatible endpoint, and the append-only file of all that it ever answered.

    Answers are filed under the sha256 of [endpoint, request body]; `endpoint` names the server where its URL does not
    (the offline world's port is new in every run). Seconds: tries are `backoff` apart, doubling up to 60; `timeout`
    bounds one call, and `patience` the time in which no call at all is answered. `headers` carry the key, which is
    `key`, too, so that it can be kept out of every message. `replay` answers from the file alone. `max_calls` and
    `max_cost` ($, by `price`: a model's $ per million tokens of prompt and completion) end it before it gets dearer.
    """

    def __init__(self, base_url, cache, endpoint="", key="", headers=(), workers=8, max_unusable=0.02, timeout=120.0,
                 patience=600.0, backoff=0.5, url=None, replay=False, max_calls=None, max_cost=None,
                 price=lambda model: None):
        self.base_url, self.endpoint, self.key = base_url, endpoint or base_url, key
        self.url = url or (lambda model: base_url + "/chat/completions")
        self.workers, self.max_unusable, self.replay = workers, max_unusable, replay
        self.timeout, self.patience, self.backoff = timeout, patience, backoff
        self.max_calls, self.max_cost, self.price = max_calls, max_cost, price
        self.session = requests.Session()
        self.headers = {"Content-Type": "application/json", **dict(headers)}
        self.session.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=workers))
        self.session.trust_env = not on_this_machine(base_url)  # a campus proxy cannot see our loopback
        self.settings = self.session.merge_environment_settings(base_url, {}, True, None, None)
        self.jitter = random.Random()   # the global generator belongs to the training around us
        self.cache = Cache(Path(cache))
        self.gate = threading.Condition()
        self.limit, self.flying, self.streak = workers, 0, 0    # calls allowed at a time, under way, good in a row
        self.dropped = {}               # {parameter this server refuses: its other name, or None}
        self.calls, self.cost = 0, 0.0  # that were sent, and $ that the answers came to as far as is known
        self.tokens, self.unpriced, self.uncounted = [0, 0], 0, 0   # of prompts and answers; answers without
        self.hits = 0                   # how many of the last complete() came from the cache
        self.contacted = False          # whether any reply ever came, of whatever status
        self.heard = 0.0                # when the latest answer came
        self.fault = ""                 # the latest thing that went wrong, for messages
        self.title = self.effort = ""   # what it is called, and how long it may think, for the records

    def knock(self):
        """JudgeError if nothing answers at the address; whatever answers will do, and costs nothing."""
        if self.replay:
            return
        try:
            self.session.get(self.base_url, timeout=10, allow_redirects=False, **self.settings).close()
        except requests.RequestException as error:
            raise self._absent(type(error).__name__) from None

    def _absent(self, fault):
        return JudgeError(f"no judge answers at {self.base_url} ({fault}): is it running? "
                          "Set OPENAI_BASE_URL, as in http://localhost:8000/v1")

    def close(self):
        self.cache.close()
        self.session.close()

    def name(self, body):
        """The key of a request in the cache."""
        return hashlib.sha256(json.dumps([self.endpoint, body], sort_keys=True).encode()).hexdigest()

    def complete(self, bodies):
        """For each of `bodies` the line of the cache with its answer, or {"cause": why there is none}.

        Equal bodies are asked once, stored ones never.
        """
        keys = [self.name(body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies) if not self.cache.get(key)}
        self.hits = sum(key not in missing for key in keys)
        causes = dict.fromkeys(missing, "no answer")
        if self.replay:
            causes = dict.fromkeys(missing, "not in the cache")
        elif missing:
            self._ask_all(missing, causes, self.max_unusable * len(bodies))
        return [self.cache.get(key) or {"cause": causes[key]} for key in keys]

    def _ask_all(self, missing, causes, bearable):
        items = list(missing.items())
        self.jitter.shuffle(items)      # another process on the same cache begins elsewhere
        todo, stop, errors, done = iter(items), threading.Event(), [], [0]

        def work():
            try:
                while not stop.is_set() and (item := next(todo, None)):
                    if not self.cache.get(item[0]):
                        causes[item[0]] = self._ask(*item, stop)
                    done[0] += 1
            except Exception as error:  # belongs to the caller's thread
                errors.append(error)
                stop.set()

        # Daemons, since the interpreter does not end before an executor's threads do, nor would Ctrl-C then.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, len(items)))]
        began = shown = self.heard = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            while not errors and (alive := [thread for thread in threads if thread.is_alive()]):
                alive[0].join(0.1)
                now = time.monotonic()
                if now - self.heard > self.patience:
                    if len(items) - done[0] <= bearable:
                        break           # some few pairs are beyond this judge: unusable
                    raise JudgeError(f"no answer at {self.base_url} in {self.patience:.0f} s ({self.fault}). "
                                     "Earlier answers are kept: the same command goes on from there")
                if now - shown > 10:
                    shown, rate = now, done[0] / (now - began)
                    eta = f"{(len(items) - done[0]) / rate:.0f}s" if done[0] else "unknown"
                    spent = f", ${self.cost:.2f}" if self.cost else ""
                    print(f"judge: {done[0]}/{len(items)}, {rate:.0f}/s, eta {eta}{spent}", flush=True)
        finally:
            stop.set()
            grace = time.monotonic() + 2    # for the calls in flight, which are paid for
            for thread in threads:
                if thread.ident:            # Ctrl-C may come while they are being started
                    thread.join(max(0, grace - time.monotonic()))
        if errors:
            raise errors[0]

    def spent(self):
        """What the new answers took, as text."""
        prompt, answers = self.tokens
        if not (prompt or self.uncounted or self.cost):
            return "free"
        return (f"{prompt:,} + {answers:,} tokens{f' and {self.uncounted} answers unknown' if self.uncounted else ''}, "
                + (f"${self.cost:.2f}" if not self.unpriced else "price unknown"))

    # ---- one request -----------------------------------------------------------------------------------

    def _ask(self, key, body, stop):
        """Ask until the answer is stored; else the cause, once this request is seen to be hopeless."""
        garbage, failed, began = 0, 0, math.inf
        for tries in itertools.count():
            # While others are answered the server is well, and this request was unlucky: no reason to wait long.
            failed = min(failed, 2) if self.heard > began else failed
            wait = min(60, self.backoff * 2 ** min(failed, 30)) * self.jitter.uniform(0.5, 1)
            sent = self._adapted(body)
            if not self._enter(stop):
                return "no answer"
            failed, began, status = failed + 1, time.monotonic(), 0
            try:
                status, headers, data = self._post(self.url(body["model"]), json.dumps(sent).encode())
            except (requests.RequestException, HTTPError) as error:
                self.fault = type(error).__name__   # its text is three lines of urllib3
                if not self.contacted and tries == 4:
                    raise self._absent(self.fault) from None
            finally:
                self._leave(status)
            if 200 <= status < 300:
                try:
                    return self._store(key, body, sent, data, time.monotonic() - began)
                except GARBAGE:
                    self.fault = f"HTTP {status}, no message: {shorten(data.decode(errors='replace'))}"
                    garbage += 1
                    if garbage == MAX_GARBAGE:
                        return NO_MESSAGE
            else:
                garbage = 0
            if status >= 300:
                wait, cause = self._outcome(status, headers, data, sent, wait)
                if cause:
                    return cause
            if stop.wait(wait):
                return "no answer"

    def _enter(self, stop):
        """Wait until another call may be under way; False if there will be none."""
        with self.gate:
            while self.flying >= max(1, int(self.limit)) and not stop.is_set():
                self.gate.wait(0.1)
            if stop.is_set():
                return False
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise JudgeError(f"stopped after {self.calls} calls, as --max_calls says; every answer is kept")
            if self.max_cost is not None and self.cost >= self.max_cost:
                raise JudgeError(f"stopped at ${self.cost:.2f}, as --max_cost says; every answer is kept")
            self.calls, self.flying = self.calls + 1, self.flying + 1
            return True

    def _leave(self, status):
        """Half as many calls at a time when the server says that it is too much, one more after twenty good ones."""
        with self.gate:
            self.flying, self.contacted = self.flying - 1, self.contacted or status > 0
            if status in (429, 503):
                self.limit, self.streak = max(1, self.limit / 2), 0
            elif 200 <= status < 300:
                self.streak += 1
                if self.streak % 20 == 0:
                    self.limit = min(self.workers, self.limit + 1)
            self.gate.notify()

    def _post(self, url, payload):
        """One exchange -> (status, headers, body)."""
        deadline = time.monotonic() + self.timeout
        request = requests.Request("POST", url, headers=self.headers, data=payload).prepare()    # knows no netrc
        with self.session.send(request, timeout=(min(10, self.timeout), self.timeout), allow_redirects=False,
                               **self.settings) as response:
            data = b""
            # A socket's timeout starts anew with each byte; read1 returns what there is, so a clock can look.
            # (It raises urllib3's own HTTPError, which requests wraps only in its slower ways of reading.)
            while len(data) <= MAX_BYTES and (chunk := response.raw.read1(1 << 16, decode_content=True)):
                data += chunk
                if time.monotonic() > deadline:
                    raise requests.Timeout
        if len(self.key) >= 8:  # a server may echo it; a shorter one is no secret, and may be a common word
            data = data.replace(self.key.encode(), b"***")
        return response.status_code, response.headers, data

    def _outcome(self, status, headers, data, sent, wait):
        """What an error means: (seconds until the next try, ""), or (_, cause) for this request; JudgeError for all.

        408, 409, 425, 429, 5xx    again, after Retry-After if that is bearable
        429 out of quota           the end
        400, 422 of a parameter    again without it, or by its other name, from now on
        400 too long, filtered     hopeless, this request
        3xx, other 4xx             the end: the key is not sent elsewhere, nor anything after a refusal
        """
        message, code = complaint(data)
        self.fault = f"HTTP {status}: {shorten(message)}"
        if status < 400:
            raise JudgeError(f"{self.base_url} redirects to {headers.get('Location')}, where the key is not sent: "
                             "set OPENAI_BASE_URL to the final address")
        if status in (400, 413, 422):
            if FILTERED.search(code + message):
                return 0, "refusal"
            if status == 413 or TOO_LONG.search(code + message):
                return 0, "too long"
            if self._drop(code + message, sent):
                return 0, ""
        if status == 429 and BROKE.search(code):
            raise JudgeError(f"the judge is out of quota ({self.fault}); earlier answers are kept")
        if status < 500 and status not in (408, 409, 425, 429):
            raise JudgeError(f"the judge at {self.base_url} refuses: {self.fault}")
        rest = retry_after(headers)
        if rest is not None and rest > MAX_RETRY_AFTER:
            raise JudgeError(f"the judge wants {rest:.0f} s of rest ({self.fault}); earlier answers are kept")
        return wait if rest is None else rest, ""

    def _drop(self, complaint, sent):
        """Do without a parameter that the server complains about, from now on; False if it names none."""
        with self.gate:
            named = [name for name in OPTIONAL if re.search(rf"\b{name}\b", complaint) and name in sent]
            for name in named:
                if name not in self.dropped:
                    self.dropped[name] = "max_completion_tokens" if name == "max_tokens" else None
                    instead = self.dropped[name] or "nothing"
                    print(f"judge: the server refuses {name}; {instead} is sent instead", flush=True)
            return bool(named)

    def _adapted(self, body):
        """The request as this server takes it."""
        sent = dict(body)
        for name, other in list(self.dropped.items()):
            value = sent.pop(name, None)
            if other and value is not None:
                sent[other] = value
        if "logprobs" not in sent:
            sent.pop("top_logprobs", None)
        return sent

    def _store(self, key, body, sent, data, seconds):
        """File one reply; raises one of GARBAGE if it is none."""
        reply = json.loads(data)
        choice, usage = reply["choices"][0], reply.get("usage")
        message = choice["message"]
        refused = message.get("refusal") or choice.get("finish_reason") == "content_filter"
        if message.get("content") is None and refused:
            message["content"] = ""
        message["content"].encode()     # no string, or half a surrogate pair: out
        json.dumps(choice, allow_nan=False)
        self.cache.put(key, model=body["model"], choice=choice, usage=usage, seconds=seconds,
                       dropped=[name for name in body if name not in sent])
        counted, cost = tokens(usage), dollars(usage, self.price(body["model"]))
        with self.gate:
            self.heard = time.monotonic()
            self.cost += cost or 0
            self.tokens = [n + more for n, more in zip(self.tokens, counted or (0, 0))]
            self.uncounted, self.unpriced = self.uncounted + (counted is None), self.unpriced + (cost is None)


def tokens(usage):
    """(prompt, completion) tokens of a reply's usage, None where the server does not say."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return None if any(type(count) is not int or count < 0 for count in counts) else tuple(counts)


def dollars(usage, price):
    """What a reply cost at `price` ($ per million tokens of prompt and completion); None if that is not known."""
    counted = tokens(usage)
    return sum(n * each for n, each in zip(counted, price)) / 1e6 if counted and price else None


def retry_after(headers):
    """Seconds that a server asks for: retry-after-ms, or Retry-After as a number or a date; None for anything else."""
    said = headers.get("retry-after-ms", ""), headers.get("Retry-After", "")
    for text, unit in zip(said, (1e-3, 1)):
        if re.fullmatch(r"\d{1,9}(\.\d+)?", text.strip()):
            return float(text) * unit
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said[1]).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def complaint(data):
    """(message, code, type and parameter) of an error reply in OpenAI's form; of any other, its text and no code."""
    try:
        error = json.loads(data)["error"]
        if isinstance(error, str):
            return error, ""
        return str(error.get("message") or error), " ".join(str(error.get(key)) for key in ("code", "type", "param"))
    except GARBAGE:
        return data.decode(errors="replace"), ""


def shorten(text, limit=200):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."


ADDRESS = re.compile(r"https?://(\[[0-9a-f:]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~%/-]*)?", re.IGNORECASE)


def on_this_machine(url):
    host = ADDRESS.match(url)[1]
    return host in ("localhost", "[::1]") or host.startswith("127.")
