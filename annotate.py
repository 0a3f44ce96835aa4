"""LLM judges over raw HTTP: annotators, prompts -> requests -> verdicts, cache, noise.

An annotator is a model with a prompt and a temperature. A pool of them stands for a crowd, and labels flipped
on purpose for its disagreement (AlpacaFarm, arXiv 2305.14387). The judge is any server that speaks OpenAI's
chat completions. A pair becomes a list of messages, a reply a verdict, and is on disk before it is used.

Left out: asking for log-probs, several pairs in one prompt, prices, concurrency that adapts, locks between
processes on one cache file (no line is lost, but both may pay for the same answer).
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.packages.urllib3.exceptions import HTTPError

from data.alpaca_eval import question


class JudgeError(Exception):
    """The judge refuses, is down, is out of quota or talks nonsense. All that it answered is in the cache."""


# ---- annotators, prompts, verdicts ---------------------------------------------------------------------

@dataclass(frozen=True)
class Annotator:
    """One simulated annotator; `prompt` names a file in data/judges/."""
    name: str
    model: str
    prompt: str = "pairwise"
    temperature: float = 0.0
    max_tokens: int = 16


POOLS = {"barn": ("barn-sim", 13), "barn-human": ("barn-human", 16)}  # as many as in the paper


def pool(judge):
    """A crowd for the offline world's two judges, one greedy annotator for any other model."""
    if judge not in POOLS:
        return [Annotator(judge, judge)]
    prefix, size = POOLS[judge]
    names = [f"{prefix}-{i:02d}" for i in range(size)]
    return [Annotator(name, name) for name in names]


@functools.cache
def template(prompt):
    """The messages in data/judges/<prompt>.json, their placeholders unfilled."""
    path = Path(__file__).parent / "data" / "judges" / f"{prompt}.json"
    return json.loads(path.read_text(encoding="utf-8"))["messages"]


def fence(*texts):
    """A mark that none of the texts contains, drawn from their hash: equal pairs make equal requests."""
    for n in itertools.count():
        mark = hashlib.sha256(json.dumps([n, *texts]).encode()).hexdigest()[:8]
        if not any(mark in text for text in texts):
            return mark


def request_body(annotator, instruction, first, second):
    """The chat completion that asks which text is better; `first` is shown as Output (a)."""
    texts = {"instruction": instruction, "output_1": first, "output_2": second,
             "fence": fence(instruction, first, second)}

    def fill(content):  # in one pass: a placeholder inside an answer is text like any other
        return re.sub(r"\{(instruction|output_1|output_2|fence)\}", lambda match: texts[match[1]], content)

    messages = [{"role": m["role"], "content": fill(m["content"])} for m in template(annotator.prompt)]
    return {"model": annotator.model, "messages": messages,
            "temperature": annotator.temperature, "max_tokens": annotator.max_tokens}


VERDICT = re.compile(r"""[\s*_`'"#>-]*(?:output\s*)?\(?([ab])\)?[\s*_`'".:]*""", re.IGNORECASE)


def verdict(reply):
    """1 for "Output (a)", 2 for "Output (b)" in any dress of case, quotes and markdown; else None."""
    match = VERDICT.fullmatch(reply)
    return match and "ab".index(match[1].lower()) + 1


def logprob_preference(logprobs, first="m", second="M"):
    """A preference in [1, 2] from {token: log-probability} of a verdict in one token: 2 - P(first) / P(either).

    AlpacaEval 2's logprob_parser; `first` is the token for the answer shown first. A token that is not among the top
    ones counts as impossible; None if neither is there.
    """
    one, two = (math.exp(logprobs.get(token, -math.inf)) for token in (first, second))
    return 2 - one / (one + two) if one + two else None


# ---- pairs -> preferences ------------------------------------------------------------------------------

def draw(what, salt, choices, weights=None):
    """AlpacaEval's random_seeded_choice: the text alone decides, the same in every process."""
    return random.Random(what + salt).choices(choices, weights=weights)[0]


def annotate(pairs, annotators, judge, seed=0, flip=0.0, both_orders=False):
    """Preferences for pairs {instruction, output_1, output_2, ...}, as AlpacaEval's records.

    A record is its pair and
      annotator        the name of the one that was drawn for it
      is_switched      output_2 was shown first, as Output (a)
      preference       1: output_1 is better, 2: output_2 is, 1.5: equal texts, None: no usable verdict
      raw_completion   what the judge said, None if it was not asked
    With `both_orders` each pair is asked twice, is_switched is None, and there is
      preference_by_order  [with output_1 shown first, with output_2]; `preference` is their mean, None if either is
    and raw_completion is a list too. A fraction `flip` of the labels is wrong on purpose: 2 * flip of them are
    coins, tossed instead of asking, so they cost nothing. Pairs with one instruction share their draws, unless
    each has a "seed" string too. JudgeError if more than judge.max_unusable of those asked have no usable verdict.
    """
    if not 0 <= flip <= 0.5:
        raise ValueError(f"flip is the fraction of wrong labels, between 0 and 0.5, not {flip}")
    records, asked, bodies, coins = [], [], [], 0
    for pair in pairs:
        instruction = question(pair)
        salt = instruction + str(seed) + pair.get("seed", "")
        annotator = draw("annotator", salt, annotators)
        switched = draw("is_switched_outputs", salt, [False, True])
        coin = draw("noisy_preference", salt, [None, 1, 2], [1 - 2 * flip, flip, flip])
        record = {**pair, "annotator": annotator.name, "is_switched": None if both_orders else switched,
                  "preference": coin, "raw_completion": None}
        records.append(record)
        if pair["output_1"] == pair["output_2"]:
            record["preference"] = 1.5
        elif coin:
            coins += 1
        else:
            asked.append(record)
            for order in (False, True) if both_orders else (switched,):
                first, second = ("output_2", "output_1") if order else ("output_1", "output_2")
                bodies.append(request_body(annotator, instruction, pair[first], pair[second]))

    replies, unusable = iter(judge.complete(bodies)), []
    for record in asked:
        orders = (False, True) if both_orders else (record["is_switched"],)
        said = [next(replies) for _ in orders]
        choices = [verdict(reply) if reply else None for reply in said]
        chosen = [3 - choice if choice and switched else choice for choice, switched in zip(choices, orders)]
        unusable += [reply or judge.fault for reply, choice in zip(said, choices) if not choice][:1]
        record["raw_completion"] = said if both_orders else said[0]
        record["preference"] = statistics.mean(chosen) if all(chosen) else None
        if both_orders:
            record["preference_by_order"] = chosen

    print(f"judge: {len(bodies)} asked ({judge.hits} from the cache), {len(asked) - len(unusable)} usable, "
          f"{len(unusable)} unusable, {coins} coins, {len(pairs) - len(asked) - coins} identical", flush=True)
    if len(unusable) > judge.max_unusable * len(asked):
        example = shorten(unusable[0])
        raise JudgeError(f"{len(unusable)} of {len(asked)} verdicts are unusable, for example {example!r}; "
                         f"at most {judge.max_unusable:.0%} may be. Every answer is kept in {judge.cache}")
    return records


# ---- requests over HTTP --------------------------------------------------------------------------------

MAX_BYTES = 4 << 20     # of one reply: what is longer is cut, and no JSON any more
MAX_RETRY_AFTER = 120   # seconds: who asks for more has a daily limit
BROKE = re.compile("insufficient_quota|credit_balance|spend_limit|usage_limit")  # a 429 no waiting cures
UNANSWERABLE = re.compile("context_length|content_filter")                      # a 400 about this one pair
GARBAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what hostile JSON raises


class Judge:
    """An OpenAI-compatible endpoint, and the append-only file of all that it ever answered.

    Answers are filed under the sha256 of [endpoint, request body]; `endpoint` names the server where its URL
    does not (the offline world's port is new in every run). Seconds: tries are `backoff` apart, doubling up
    to 60; `timeout` bounds one call, and `patience` the time in which no call at all is answered.
    """

    def __init__(self, base_url, cache, endpoint, key, workers, max_unusable,
                 timeout=120.0, patience=600.0, backoff=0.5):
        self.base_url, self.url, self.endpoint = base_url, base_url + "/chat/completions", endpoint
        self.cache, self.workers, self.max_unusable = Path(cache), workers, max_unusable
        self.timeout, self.patience, self.backoff = timeout, patience, backoff
        self.key = key
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.session = requests.Session()
        self.session.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=workers))
        self.session.trust_env = not on_this_machine(base_url)  # a campus proxy cannot see our loopback
        self.settings = self.session.merge_environment_settings(self.url, {}, True, None, None)
        self.jitter = random.Random()   # the global generator belongs to the training around us
        self.lock = threading.Lock()
        self.answers = read_cache(self.cache)
        self.file = open(self.cache, "ab", buffering=0)  # one line is one write
        self.hits = 0                   # how many of the last complete() came from the cache
        self.contacted = False          # whether any reply ever came, of whatever status
        self.heard = 0.0                # when the latest answer came
        self.fault = ""                 # the latest thing that went wrong, for messages

    def knock(self):
        """JudgeError if nothing answers at the address; whatever answers will do, and costs nothing."""
        try:
            self.session.get(self.base_url, timeout=10, allow_redirects=False, **self.settings).close()
        except requests.RequestException as error:
            raise self._absent(type(error).__name__) from None

    def _absent(self, fault):
        return JudgeError(f"no judge answers at {self.base_url} ({fault}): is it running? "
                          "Set OPENAI_BASE_URL, as in http://localhost:8000/v1")

    def close(self):
        with self.lock:
            self.file.close()
        self.session.close()

    def complete(self, bodies):
        """The message contents in the order of `bodies`, None where the judge gave nothing usable.

        Equal bodies are asked once, stored ones never. An error or Ctrl-C keeps what arrived.
        """
        keys = [hashlib.sha256(json.dumps([self.endpoint, body], sort_keys=True).encode()).hexdigest()
                for body in bodies]
        self.hits = sum(key in self.answers for key in keys)
        missing = {key: body for key, body in zip(keys, bodies) if key not in self.answers}
        todo, stop, errors = iter(list(missing.items())), threading.Event(), []

        def work():
            try:
                while not stop.is_set() and (item := next(todo, None)):
                    self._ask(*item, stop)
            except Exception as error:  # belongs to the caller's thread
                errors.append(error)
                stop.set()

        # Daemons, since the interpreter does not end before an executor's threads do, nor would Ctrl-C then.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, len(missing)))]
        began = shown = self.heard = time.monotonic()
        had = len(self.answers)
        try:
            for thread in threads:
                thread.start()
            while not errors and (alive := [thread for thread in threads if thread.is_alive()]):
                alive[0].join(0.1)
                now, done = time.monotonic(), len(self.answers) - had
                if now - self.heard > self.patience:
                    if len(missing) - done <= self.max_unusable * len(bodies):
                        break  # some few pairs are beyond this judge: unusable
                    raise JudgeError(f"no answer at {self.base_url} in {self.patience:.0f} s ({self.fault}). "
                                     "Earlier answers are kept: the same command goes on from there")
                if now - shown > 10:
                    shown, rate = now, done / (now - began)
                    eta = f"{(len(missing) - done) / rate:.0f}s" if done else "unknown"
                    print(f"judge: {done}/{len(missing)}, {rate:.0f}/s, eta {eta}", flush=True)
        finally:
            stop.set()
            grace = time.monotonic() + 2  # for the calls in flight, which are paid for
            for thread in threads:
                thread.join(max(0, grace - time.monotonic()))
        if errors:
            raise errors[0]
        return [self.answers.get(key) for key in keys]

    def _ask(self, key, body, stop):
        """Ask until the answer is stored, or until this pair is seen to be hopeless."""
        payload, garbage = json.dumps(body).encode(), 0
        for tries in itertools.count():
            wait = min(60, self.backoff * 2 ** min(tries, 30)) * self.jitter.uniform(0.5, 1)
            try:
                status, headers, data = self._post(payload)
            except (requests.RequestException, HTTPError) as error:
                self.fault = type(error).__name__  # its text is three lines of urllib3
                if not self.contacted and tries == 4:
                    raise self._absent(self.fault) from None
            else:
                self.contacted = True
                if status >= 300:
                    wait = self._delay(status, headers, data, wait)
                else:
                    try:
                        return self._store(key, body["model"], data)
                    except GARBAGE:
                        self.fault = f"HTTP {status}, no message: {shorten(data.decode(errors='replace'))}"
                        garbage += 1
            if wait is None or garbage > 3 or stop.wait(wait):
                return

    def _post(self, payload):
        """One exchange -> (status, headers, body)."""
        deadline = time.monotonic() + self.timeout
        request = requests.Request("POST", self.url, headers=self.headers, data=payload).prepare()
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

    def _delay(self, status, headers, data, wait):
        """Seconds until the next try; None if this pair is hopeless; JudgeError if all of them are."""
        message, code = complaint(data)
        self.fault = f"HTTP {status}: {shorten(message)}"
        if status < 400:
            raise JudgeError(f"{self.url} redirects to {headers.get('Location')}, where the key is not sent: "
                             "set OPENAI_BASE_URL to the final address")
        if status == 400 and UNANSWERABLE.search(code):
            return None
        if status == 429 and BROKE.search(code):
            raise JudgeError(f"the judge is out of quota ({self.fault}); earlier answers are kept")
        if status < 500 and status not in (408, 409, 425, 429):
            raise JudgeError(f"the judge at {self.base_url} refuses: {self.fault}")
        rest = re.fullmatch(r"\d+(\.\d+)?", headers.get("Retry-After", ""))
        if rest and float(rest[0]) > MAX_RETRY_AFTER:
            raise JudgeError(f"the judge wants {rest[0]} s of rest ({self.fault}); earlier answers are kept")
        return float(rest[0]) if rest else wait

    def _store(self, key, model, data):
        """File the text of one reply; raises one of GARBAGE if there is none."""
        reply = json.loads(data)
        content, usage = reply["choices"][0]["message"]["content"], reply.get("usage")
        content.encode()  # no string, or half a surrogate pair: out
        line = json.dumps({"key": key, "model": model, "content": content, "usage": usage,
                           "time": time.time()})
        with self.lock:
            self.file.write(line.encode() + b"\n")
            self.answers[key] = content
            self.heard = time.monotonic()


def read_cache(path):
    """Answers {key: content} of a cache file. A torn last line is cut off, a damaged one skipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    damaged, answers = int(end < len(data)), {}
    if damaged:
        os.truncate(path, end)  # or the next line would be glued to the stump
    for line in data[:end].splitlines():
        try:
            entry = json.loads(line)
            entry["content"].encode()
            answers[entry["key"]] = entry["content"]
        except GARBAGE:
            damaged += 1
    if damaged:
        print(f"judge: {damaged} damaged lines of {path} are left out", flush=True)
    return answers


def complaint(data):
    """(message, code and type) of an error reply in OpenAI's form; of any other, its text and no code."""
    try:
        error = json.loads(data)["error"]
        return str(error.get("message") or error), f"{error.get('code')} {error.get('type')}"
    except GARBAGE:
        return data.decode(errors="replace"), ""


def shorten(text, limit=200):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."


# ---- finding the judge ---------------------------------------------------------------------------------

ADDRESS = re.compile(r"https?://(\[[0-9a-f:]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~%/-]*)?", re.IGNORECASE)


def on_this_machine(url):
    host = ADDRESS.match(url)[1]
    return host in ("localhost", "[::1]") or host.startswith("127.")


@contextlib.contextmanager
def connect(judge, cache, workers=8, max_unusable=0.02):
    """The Judge behind a name: "barn" and "barn-human" start the offline world's server, any other is a model
    at OPENAI_BASE_URL, asked with OPENAI_API_KEY. `cache` is the path of the file of its answers."""
    with contextlib.ExitStack() as stack:
        if judge in POOLS:
            from data.barn.judge import serve  # real judges do without the offline world
            base_url, endpoint, key = stack.enter_context(serve()), "barn", ""
        else:
            base_url = endpoint = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
            key = os.environ.get("OPENAI_API_KEY", "").strip()
            if not ADDRESS.fullmatch(base_url):  # not shown: URLs have been seen with passwords in them
                raise JudgeError("OPENAI_BASE_URL must look like https://host/v1 or http://localhost:8000/v1")
            if not key and not on_this_machine(base_url):
                raise JudgeError(f"OPENAI_API_KEY is not set, and {base_url} is not on this machine: export "
                                 "it (any word will do for a server without keys)")
            if not re.fullmatch(r"[!-~]*", key):  # requests would show it in its own error
                raise JudgeError("OPENAI_API_KEY holds a space or another character that no key has")
        yield stack.enter_context(contextlib.closing(
            Judge(base_url, cache, endpoint, key, workers, max_unusable)))
