"""A person as the judge: a page on a loopback port that shows an instruction and two answers, and takes keys.

`--judge me` prints the address of the page. The browser does not learn who wrote an answer, and the order is the drawn
one. A click is a line of an append-only file before the next pair is shown: close the page, kill the command, start it
again, and nothing is lost. `me:NAME` is another person, who does not get your answers for theirs.

In a notebook (`%run annotate.py PAIRS.json --judge me`) the pairs are printed below the cell, and the keys are typed
there: the browser may be on another machine than the page.
"""
import hashlib
import json
import os
import re
import secrets
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

from data import loopback
from data.judges import JudgeError, verdicts
from data.judges.cache import GARBAGE, Cache

PERSON = re.compile("me(:.+)?")                         # names of this judge
SAID = {"a": "Output (a)", "b": "Output (b)", "=": "tie"}               # key: what the file says of it
PREFERENCES = {"Output (a)": 1, "Output (b)": 2, "tie": 1.5}            # "undo" is none of them
PAGE = Path(__file__).with_suffix(".html")
LONGEST = 1000                                          # bytes of a click
KEYS = "a: answer a is better, b: answer b is, =: they are alike, u: undo the last one"
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'none'; style-src 'nonce-NONCE'; script-src 'nonce-NONCE'; "
                                      "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


class Person:
    """The person behind the page, with what `annotate` wants to know of a judge.

    `cache` is the path of the file of clicks. Its lines are Cache's, and the last one of a key counts: "Output (a)" if
    what was shown first is better, "Output (b)", "tie", or "undo"; `request` holds the texts as they were shown,
    `seconds` how long they were looked at. `replay` takes what the file knows and shows no page.
    """

    def __init__(self, name, cache, replay=False, max_unusable=0.02):
        self.title, self.replay, self.max_unusable, self.effort = name, replay, max_unusable, ""
        self.cache, self.price = Cache(Path(cache)), lambda model: None     # nobody knows what a person costs
        self.calls, self.hits, self.fault = 0, 0, ""
        self.pairs, self.shown = {}, {}                 # {key: texts} of what is asked now, {key: since when}
        self.lock, self.error = threading.Lock(), None
        self.token, self.server = secrets.token_urlsafe(16), None

    def knock(self):
        """A person is there: they have started the command."""

    def spent(self):
        return "free"

    def close(self):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
        self.cache.close()

    def answer(self, questions):
        """Show the page, or in a notebook ask below the cell, until the person has handed in an answer to each of the
        questions (annotate.Question), which takes it up. OSError if a click could not be written."""
        keys = self.keys(questions)
        self.hits = sum(map(self.answered, keys))
        if self.hits < len(keys) and not self.replay:
            with self.lock:
                self.pairs = {key: one.texts for key, one in zip(keys, questions)}
            if in_a_notebook():
                self.ask_here(self.estimate(questions))
            else:
                self.ask_on_page(self.estimate(questions))
        for key, one in zip(keys, questions):
            if not self.answered(key):
                one.cause = self.fault = "not in the cache"
                continue
            one.answer = self.cache.get(key)
            preference = PREFERENCES[content(one.answer)]
            one.preference = 3 - preference if one.switched else preference

    def keys(self, questions):
        """The key in the cache of each question: a pair that comes twice is asked twice."""
        seen, keys = Counter(), []
        for one in questions:
            asked = json.dumps([self.title, one.salt, *one.texts])
            seen[asked] += 1
            keys.append(hashlib.sha256(f"{asked} {seen[asked]}".encode()).hexdigest())
        return keys

    def estimate(self, questions):
        known = sum(map(self.answered, self.keys(questions)))
        return f"{len(questions)} pairs for {self.title}, {known} answered before"

    def ask_here(self, estimate):
        """Print each pair and read a key below it, until all are answered and handed in."""
        print(f"judge: {estimate}; stop the cell to go on later\n{KEYS}", flush=True)
        while self.pairs:
            now = self.state()
            if now["id"]:
                print("", *map(shown, ("Instruction", "Answer a", "Answer b"), now["texts"]), sep="\n", flush=True)
                key = typed(f"{now['answered'] + 1} of {now['total']}: a, b, = or u? ")
            else:
                key = typed("all are answered; Enter: hand in, u: undo ") or "done"
            self.act(now["id"], {"u": "undo"}.get(key, key))

    def ask_on_page(self, estimate):
        """Show the page until all are answered and handed in."""
        print(f"judge: {estimate}; the page (Ctrl-C: go on later):\n  {self.address()}", flush=True)
        while self.waiting():
            time.sleep(.1)
        if self.error:
            raise self.error

    def waiting(self):
        with self.lock:                                 # the reply to the last click is out, then
            return self.pairs and not self.error

    def answered(self, key):
        return content(self.cache.get(key)) in PREFERENCES

    # ---- the page --------------------------------------------------------------------------------------

    def address(self):
        if not self.server:
            self.server = loopback.Server(("127.0.0.1", 0), Handler)
            self.server.person = self
            threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/{self.token}/"

    def state(self):
        """What the page shows: the first pair without an answer; id "" if there is none, total 0 once all is handed in.
        """
        left = [key for key in self.pairs if not self.answered(key)]
        key = left[0] if left else ""
        self.shown.setdefault(key, time.monotonic())
        return {"total": len(self.pairs), "answered": len(self.pairs) - len(left), "id": key,
                "texts": self.pairs.get(key, ())}

    def act(self, key, action):
        """One click at the pair `key` ("" where all are answered), written to the file -> the new state.

        A click at another pair than the one to be answered now comes from a page that is behind (a second tab, a
        second press): it does nothing, and that page is brought up to date.
        """
        now = self.state()
        if key != now["id"]:
            return {**now, "stale": True}
        done = [each for each in self.pairs if self.answered(each)]
        if action in SAID and key:
            self.write(key, SAID[action])
        elif action == "undo" and done:
            self.write(max(done, key=lambda each: self.cache.get(each).get("time", 0)), "undo")
        elif action == "done" and not key:
            self.pairs = {}
        return self.state()

    def write(self, key, text):
        seconds = time.monotonic() - self.shown.pop(key, time.monotonic())
        self.cache.put(key, model=self.title, choice={"message": {"content": text}}, request=self.pairs[key],
                       scored_by="person", seconds=seconds)
        os.fsync(self.cache.file.fileno())
        self.calls += 1


def in_a_notebook():
    """Whether what is printed goes below the cell of a notebook."""
    return type(sys.stdout).__module__.startswith("ipykernel")


def shown(title, text):
    """A text and its title in lines of 79 columns."""
    lines = [textwrap.fill(line, 79, initial_indent="  ", subsequent_indent="  ") for line in text.splitlines()]
    return "\n".join([f"{title}:", *(lines or ["  (empty)"])])


def typed(asks):
    """What the person types. JudgeError where nobody can type anything, as where a program runs the notebook."""
    try:
        return input(asks).strip().lower()
    except (EOFError, NotImplementedError):             # the latter by a kernel whose front end has no keyboard
        raise JudgeError("--judge me: nobody can type an answer here; name another judge") from None


def content(line):
    """What a line of the cache says; "" if there is none."""
    return verdicts.content(line["choice"]["message"]) if line else ""


class Handler(loopback.Handler):
    """The page at /TOKEN/, and its state at /TOKEN/pair: GET to see it, POST {"id", "action"} to click."""

    def route(self):
        try:
            body = self.body(LONGEST)
        except loopback.Unread as error:
            return self.reply(error.status, {"error": str(error)})
        person, asked, home = self.server.person, (self.command, self.path), f"http://{self.headers.get('Host', '')}"
        page, pair = f"/{person.token}/", f"/{person.token}/pair"
        if self.is_from_elsewhere() or self.headers.get("Origin", home) != home:        # its own page alone may ask
            self.reply(403, {"error": "this page is for the browser on this machine"})
        elif asked == ("GET", page):
            self.reply(200, PAGE.read_bytes().replace(b"NONCE", person.token.encode()), "text/html; charset=utf-8")
        elif asked in (("GET", pair), ("POST", pair)):
            with person.lock:
                self.reply(*self.click(person, body) if self.command == "POST" else (200, person.state()))
        else:
            self.reply(404, {"error": "there is nothing here: open the address that the command printed"})
    do_GET = do_POST = route

    def click(self, person, body):
        try:
            click = json.loads(body)
            return 200, person.act(click["id"], click["action"])
        except GARBAGE:
            return 400, {"error": 'a click is {"id": ..., "action": ...}'}
        except OSError as error:                        # the command ends by it
            person.error = error
            return 500, {"error": f"this click could not be saved: {error.strerror}"}

    def reply(self, status, document, kind="application/json"):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        if status != 200:                               # what is left of its body is no request
            self.send_header("Connection", "close")
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value.replace("NONCE", self.server.person.token))
        self.end_headers()
        self.wfile.write(data)
