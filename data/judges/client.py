"""The judge behind HTTP: one client for every server that speaks OpenAI's chat completions.

One table (`_outcome`) sorts the replies: an answer; worth another try; hopeless for this request; hopeless for all; or
a request that this server wants in another form. Every answer is counted, paid for and in the cache before it is used.
If an error, the budget or Ctrl-C ends the run, all answers that arrived are kept, and the same command continues.
"""
import datetime
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
from requests.packages.urllib3.exceptions import HTTPError, ReadTimeoutError

from data.judges import JudgeError
from data.judges.cache import GARBAGE, Cache
from data.judges.prices import dollars, tokens
from data.judges.verdicts import content, cut_off, without_thought
from data.loopback import on_this_machine
from data.retries import MAX_RETRY_AFTER, delay, retry_after

MAX_BYTES = 4 << 20     # of one reply: a longer one is cut off, and then is no valid JSON
MAX_GARBAGE = 4         # times in a row that a request is answered, but not by a chat completion
NO_MESSAGE = "no message in the reply"
BROKE = re.compile("insufficient_quota|credit_balance|spend_limit|usage_limit|billing")     # no use in waiting
TOO_LONG = re.compile(r"context_length|context length|too long|too many tokens"
                      r"|max\w*_tokens\W.{0,40}(?:large|high|at most)", re.IGNORECASE)
FILTERED = re.compile("content_filter|content_policy|content management policy", re.IGNORECASE)
OPTIONAL = {name: re.compile(spelled, re.IGNORECASE) for name, spelled in {     # what a server may refuse
    "max_tokens": r"max[\s_-]?tokens", "temperature": "temperature", "logprobs": r"log[\s_-]?prob",
    "reasoning_effort": "reasoning|thinking|effort",
    "system": r"\bsystem\b.{0,20}(?:role|messag|prompt)|roles?\b.{0,20}\bsystem\b|roles must alternate"}.items()}
ROOM, MOST_ROOM, TWENTY = 4000, 16000, 20       # tokens for a thought: twenty times max_tokens, within these bounds


class Judge:
    """An OpenAI-compatible endpoint, and the append-only file of all that it ever answered.

    Answers are filed under the sha256 of [endpoint, request body]; `endpoint` names the server where its URL does not
    (the offline world's port is new in every run). In seconds: the first retry waits `backoff`, each later one twice as
    long, up to 60; `timeout` bounds one call, and `patience` the time in which no call at all is answered. `headers`
    contain the API key; `key` is the same key, so that it can be removed from every message. `replay`: answer from the
    file alone. JudgeError ends the run after `max_calls` calls, or when the answers have cost `max_cost` $;
    `price(model)` is in $ per million tokens of (prompt, completion). `extra` goes into every request, `brief` is the
    reasoning_effort of prompts that want a single letter. `ask_again`: ask anew for answers in the file that have no
    usable verdict.
    """

    def __init__(self, base_url, cache, endpoint="", key="", headers=(), workers=8, max_unusable=0.02, timeout=120.0,
                 patience=600.0, backoff=0.5, url=None, replay=False, max_calls=None, max_cost=None,
                 price=lambda model: None, extra=(), brief="", ask_again=False):
        self.base_url, self.endpoint, self.key = base_url, endpoint or base_url, key
        self.url = url or (lambda model: base_url + "/chat/completions")
        self.workers, self.max_unusable, self.replay = workers, max_unusable, replay
        self.timeout, self.patience, self.backoff = timeout, patience, backoff
        self.max_calls, self.max_cost, self.price = max_calls, max_cost, price
        self.extra, self.brief, self.ask_again = dict(extra), brief, ask_again
        self.session = requests.Session()
        self.headers = {"Content-Type": "application/json", **dict(headers)}
        self.session.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=workers))
        self.session.trust_env = not on_this_machine(base_url)  # a campus proxy cannot see our loopback
        self.settings = self.session.merge_environment_settings(base_url, {}, True, None, None)
        self.jitter = random.Random()   # the global generator belongs to the training around us
        self.cache = Cache(Path(cache))
        self.gate = threading.Condition()
        self.limit, self.flying, self.streak = min(workers, 4), 0, 0    # calls allowed, under way, good in a row
        self.slowest, self.crowded = 0, False                   # seconds of the slowest of these; was it ever too much?
        self.terms = {}                 # {model: {what its server refuses: what is sent instead, or None}}
        self.thinkers = {line["model"] for line in self.cache.answers.values() if line.get("thinks")}   # get more room
        self.calls, self.cost = 0, 0.0  # calls sent, and $ of the answers whose price is known
        self.tokens, self.unpriced, self.uncounted = [0, 0], 0, 0   # of prompts, answers; replies without price, usage
        self.answered = 0               # replies of status 200
        self.hits = 0                   # how many of the last complete() came from the cache
        self.contacted = False          # whether any reply ever came, of whatever status
        self.heard = 0.0                # when the latest answer came
        self.fault = ""                 # the latest thing that went wrong, for messages
        self.title, self.effort = "", self.extra.get("reasoning_effort", "")    # for the records

    def knock(self):
        """Check that a server answers at the address, which costs nothing: JudgeError if none does. Returns {model:
        date of its shutdown} for models of which the server says one."""
        if self.replay:
            return {}
        try:
            data = self._exchange("GET", f"{self.base_url}/models", timeout=10)[2]
            listed = {model["id"]: model["shutdown_date"] for model in json.loads(data)["data"]
                      if model.get("shutdown_date")}
            return {name: datetime.date.fromtimestamp(when) if isinstance(when, int) else
                    datetime.date.fromisoformat(when[:10]) for name, when in listed.items()}
        except requests.ConnectionError as error:
            raise self._absent(type(error).__name__) from None
        except (requests.RequestException, HTTPError, OSError, *GARBAGE):
            return {}                   # there is a server: it is busy, or has no such list

    def _absent(self, fault):
        return JudgeError(f"no judge answers at {self.base_url} ({fault}): is it running? "
                          "Set OPENAI_BASE_URL, as in http://localhost:8000/v1")

    def close(self):
        self.cache.close()
        self.session.close()

    def name(self, body):
        """The key of a request in the cache."""
        return hashlib.sha256(json.dumps([self.endpoint, body], sort_keys=True).encode()).hexdigest()

    def complete(self, bodies, total=0):
        """For each of `bodies` the line of the cache with its answer, or {"cause": why there is none, "fault": ...}.

        Equal bodies are asked once, those in the cache never. `total`: the number of questions in the whole job, if it
        is more; max_unusable is the share of them that may stay unanswered.
        """
        keys = [self.name(body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies) if not self.cache.get(key)}
        self.hits = sum(key not in missing for key in keys)
        causes = dict.fromkeys(missing, ("no answer", ""))
        if self.replay:
            causes = dict.fromkeys(missing, ("not in the cache", ""))
        elif missing:
            self._ask_all(missing, causes, self.max_unusable * max(total, len(bodies)))
        return [self.cache.get(key) or dict(zip(("cause", "fault"), causes[key])) for key in keys]

    def _ask_all(self, missing, causes, bearable):
        items = list(missing.items())
        self.jitter.shuffle(items)      # so that another process on the same cache does not ask the same
        todo, stop, errors, done = iter(items), threading.Event(), [], [0]

        def work():
            try:
                while not stop.is_set() and (item := next(todo, None)):
                    if not self.cache.get(item[0]):
                        causes[item[0]] = self._ask(*item, stop)
                    done[0] += 1
            except Exception as error:  # raised again in the caller's thread
                errors.append(error)
                stop.set()

        # Daemon threads: the interpreter would wait for the threads of an executor, even after Ctrl-C.
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
                        break           # so few that they may stay unanswered
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
        """Tokens and cost of the new answers, as text."""
        prompt, answers = self.tokens
        if not (prompt or answers or self.uncounted or self.cost):
            return "free"
        return (f"{prompt:,} + {answers:,} tokens{f' and {self.uncounted} answers unknown' if self.uncounted else ''}, "
                + (f"${self.cost:.2f}" if not self.unpriced else "price unknown"))

    # ---- one request -----------------------------------------------------------------------------------

    def _ask(self, key, body, stop):
        """Ask until the answer is stored, and return None; or (cause, fault) as soon as this request is hopeless."""
        garbage, failed, late, began, before, share = 0, 0, 0, math.inf, [], 1
        for tries in itertools.count():
            # If others were answered meanwhile, the server works, and there is no reason to wait long.
            failed = min(failed, 2) if self.heard > began else failed
            wait = delay(failed, self.backoff, self.jitter)
            sent = self._adapted(body, share)
            if not self._enter(stop):
                return "no answer", self.fault
            failed, began, status, slow, answered = failed + 1, time.monotonic(), 0, False, self.answered
            try:
                self.cache.probe(self.flying)           # OSError if the disk has no room for the answers under way
                status, headers, data = self._exchange("POST", self.url(body["model"]), json.dumps(sent).encode(),
                                                       min(self.timeout * 2 ** late, max(self.timeout, self.patience)))
                self._bill(body["model"], data)
            except (requests.RequestException, HTTPError) as error:
                timeout = isinstance(error, (requests.Timeout, ReadTimeoutError))
                self.fault = f"{type(error).__name__}, --timeout {self.timeout:g}" if timeout else type(error).__name__
                if tries == 4 and not self.contacted and isinstance(error, requests.ConnectionError):
                    raise self._absent(type(error).__name__) from None
                slow = timeout and self.answered - answered < self.limit
                late += slow
            finally:
                self._leave(status, slow, time.monotonic() - began)
            if 200 <= status < 300:
                try:
                    if not self._store(key, body, sent, data, time.monotonic() - began, before):
                        return None
                    wait = 0
                except GARBAGE:
                    self.fault = f"HTTP {status}, no message: {shorten(data.decode(errors='replace'))}"
                    garbage += 1
                    if garbage == MAX_GARBAGE:
                        return NO_MESSAGE, self.fault
            elif status:
                garbage = 0
                wait, cause = self._outcome(status, headers, data, sent, wait)
                extra = body["model"] in self.thinkers or body["max_tokens"] == MOST_ROOM
                if cause == "too long" and extra and limit_of(sent) > ROOM // 8:
                    share, cause = share / 2, ""            # may fit with less room for the thought
                if cause:
                    return cause, self.fault
            if stop.wait(wait):
                return "no answer", self.fault

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

    def _leave(self, status, slow, seconds):
        """Adapt the number of calls that may be under way: half as many when the server is overloaded (429, 503 or
        `slow`), one more after twenty good calls in a row.

        Before the first overload the limit changes after as many good calls as it allows: it is doubled if each took
        less than a quarter of `timeout`, one more if less than half, else kept. `slow`: this call timed out, and
        meanwhile fewer calls were answered than may be under way.
        """
        with self.gate:
            self.flying, self.contacted = self.flying - 1, self.contacted or status > 0
            if status in (429, 503) or slow:
                self.limit, self.streak, self.crowded = max(1, self.limit / 2), 0, True
            elif 200 <= status < 300:
                self.streak, self.answered = self.streak + 1, self.answered + 1
                self.slowest = max(self.slowest, seconds)
                if self.streak >= (20 if self.crowded else self.limit):
                    quick = self.slowest < self.timeout / 4 and not self.crowded
                    more = self.limit if quick else int(self.slowest < self.timeout / 2)
                    self.limit, self.streak, self.slowest = min(self.workers, self.limit + more), 0, 0
            self.gate.notify()

    def _exchange(self, method, url, payload=None, timeout=None):
        """One exchange -> (status, headers, body). An error in a reply with status 200 counts with its own status."""
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout
        request = requests.Request(method, url, headers=self.headers, data=payload).prepare()    # ignores netrc
        with self.session.send(request, timeout=(min(10, timeout), timeout), allow_redirects=False,
                               **self.settings) as response:
            data = b""
            # A socket's timeout starts anew with each byte; read1 returns what there is, so we see the deadline.
            # (It raises urllib3's own HTTPError, which requests wraps only in its slower ways of reading.)
            while len(data) <= MAX_BYTES and (chunk := response.raw.read1(1 << 16, decode_content=True)):
                data += chunk
                if time.monotonic() > deadline:
                    raise requests.Timeout
        if len(self.key) >= 8:  # a server may echo it; a shorter one is no secret, and may be a common word
            data = data.replace(self.key.encode(), b"***")
        status = response.status_code
        return complaint(data)[2] or status if status < 300 and b'"error"' in data else status, response.headers, data

    def _outcome(self, status, headers, data, sent, wait):
        """(seconds until the next try, ""), or (0, cause) if this request is hopeless; JudgeError if all requests are.

        200 with a message         an answer (`_store`); what it says is for verdicts.py
        200, cut off or thinking   filed and paid; again with room for a thought, and so for this model from now on
        200, empty                 filed and paid; again at once, one time
        200 with an error's code   as that code
        200 with anything else     again, four times in a row at most
        408, 409, 425, 429, 5xx    again, after Retry-After if that is bearable
        no reply in time           again, and fewer calls at a time if the server cannot keep up
        429 out of quota           JudgeError
        4xx of a parameter         again without it, or by its other name, from now on
        400 too long, filtered     hopeless; but if it had room for a thought, again with less room
        3xx, other 4xx             JudgeError: no key is sent to another address, nothing after a refusal
        """
        message, code, _ = complaint(data)
        self.fault = f"HTTP {status}: {shorten(message)}"
        if status < 400:
            raise JudgeError(f"{self.base_url} redirects to {headers.get('Location')}, where the key is not sent: "
                             "set OPENAI_BASE_URL to the final address")
        if status in (400, 413, 422):
            if FILTERED.search(code + message):
                return 0, "refusal"
            if status == 413 or TOO_LONG.search(code + message):
                return 0, "too long"
        refused = status in (400, 403, 422) or status == 500 and "role" in message     # llama.cpp's template errors
        if refused and self._adapt(f"{code} {message}", sent):
            self.fault = ""
            return 0, ""
        if status == 429 and BROKE.search(code):
            raise JudgeError(f"the judge is out of quota ({self.fault}); earlier answers are kept")
        if status < 500 and status not in (408, 409, 425, 429):
            hint = "" if status != 404 or "/v1" in self.base_url else " (most addresses end in /v1)"
            raise JudgeError(f"the judge at {self.base_url} refuses {sent['model']}: {self.fault}{hint}")
        rest = retry_after(headers)
        if rest is not None and rest > MAX_RETRY_AFTER:
            raise JudgeError(f"the judge wants {rest:.0f} s of rest ({self.fault}); earlier answers are kept")
        return max(rest or wait, min(wait, 1)), ""

    def _adapt(self, complaint, sent):
        """Leave out or replace what the server complains about, in all further requests for this model. False if the
        complaint names nothing that was sent."""
        there = {*sent, sent["messages"][0]["role"]} - (self.extra.keys() - {"max_tokens"})
        with self.gate:
            terms = self.terms.setdefault(sent["model"], {})
            names = [name for name, spelled in OPTIONAL.items() if name in there and spelled.search(complaint)]
            for name in names:
                instead = {"max_tokens": "max_completion_tokens", "system": "the first user message"}.get(name)
                top = sent.get("top_logprobs", 0) if name == "logprobs" else 0
                fewer = [int(n) for n in re.findall(r"\b\d{1,2}\b", complaint) if 1 < int(n) < top]
                if fewer or top > 5 and "top" in complaint:
                    name, instead = "top_logprobs", max(fewer, default=5)
                if terms.get(name, terms) != instead:
                    terms[name] = instead
                    print(f"judge: {sent['model']} refuses {name}; {instead or 'nothing'} is sent instead", flush=True)
            return bool(names)

    def _adapted(self, body, share):
        """The request as this server takes it, with `share` of the room for an answer."""
        sent, terms = dict(body), dict(self.terms.get(body["model"], ()))
        sent["max_tokens"] = int(max(body["max_tokens"], room(body) * (body["model"] in self.thinkers)) * share)
        if "system" in terms and body["messages"][0]["role"] == "system":
            system, user, *others = body["messages"]
            sent["messages"] = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
        for name in sent.keys() & terms.keys():
            value = sent.pop(name)
            if name == "top_logprobs":
                sent[name] = terms[name]
            elif terms[name]:
                sent[terms[name]] = value
        if "logprobs" not in sent:
            sent.pop("top_logprobs", None)
        return sent

    def _bill(self, model, data):
        """Add the cost and tokens that a reply's usage states, even if the reply has no usable answer."""
        try:
            usage = json.loads(data)["usage"]
        except GARBAGE:
            return
        with self.gate:
            self.cost += dollars(usage, self.price(model)) or 0
            self.tokens = [n + more for n, more in zip(self.tokens, tokens(usage) or (0, 0))]

    def _store(self, key, body, sent, data, seconds, before):
        """File one reply, and say whether it is to be asked for again; raises one of GARBAGE if it has no message.

        `before`: the usages of earlier replies to this request; this one's is added.
        """
        reply = json.loads(data, parse_constant=lambda name: None)          # NaN, Infinity
        choice, usage, model = reply["choices"][0], reply.get("usage"), body["model"]
        said, cut = content(choice["message"]), cut_off(choice, usage)
        said.encode()           # raises if it is no string, or has half a surrogate pair
        refused = choice["message"].get("refusal") or choice.get("finish_reason") == "content_filter"
        with self.gate:
            self.heard, self.fault = time.monotonic(), ""
            self.uncounted += tokens(usage) is None
            self.unpriced += dollars(usage, self.price(model)) is None
            # A long answer that was cut is not asked for again: only a verdict, or a thought.
            short = body["max_tokens"] < ROOM // 4 or not without_thought(said)[0].strip()
            more = cut and short and limit_of(sent) < min(room(body), MOST_ROOM) and not before
            if more and model not in self.thinkers:
                self.thinkers.add(model)
                print(f"judge: {model} was cut off at {limit_of(sent)} tokens; {room(body)} from now on", flush=True)
        self.cache.put(key, model=model, choice=choice, usage=usage, before=list(before), seconds=seconds, request=sent,
                       thinks=model in self.thinkers, dropped=[name for name in body if name not in sent])
        before.append(usage)
        return more or not (said.strip() or cut or refused) and len(before) == 1


def room(body):
    """The max_tokens of a request to a model that thinks before it answers."""
    return max(body["max_tokens"], ROOM, min(TWENTY * body["max_tokens"], MOST_ROOM))


def limit_of(sent):
    """The longest answer, in tokens, that a request allows."""
    return sent.get("max_tokens") or sent["max_completion_tokens"]


def complaint(data):
    """(message, code with type and parameter, status or None) of an error reply in any of the forms that there are."""
    try:
        reply = json.loads(data)
        error = reply.get("error") or (reply.get("choices") or [{}])[0].get("error") or reply
        if isinstance(error, str):
            return error, "", None
        code = " ".join(str(error.get(key)) for key in ("code", "type", "param"))
        status = str(error.get("code"))
        return (str(error.get("message") or error.get("detail") or error), code,
                int(status) if re.fullmatch("[45][0-9][0-9]", status) else None)
    except GARBAGE:
        return data.decode(errors="replace"), "", None


def shorten(text, limit=200):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."
