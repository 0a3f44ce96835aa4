"""The file of everything a judge ever answered: append-only, one line an answer, shared by processes.

A line is {"key", "model", "choice", "usage", "before", "seconds", "thinks", "dropped", "time", "request"}: the choice
of the reply as it came, so that a better parser reads old answers for free; the request as it was sent, where `dropped`
names what the server had refused; `before` holds the usages of earlier replies to it, cut off or empty; `thinks` says
that the model needs room for a thought. Of several lines with one key the last counts.
"""
import contextlib
import json
import os
import threading
import time

from data.judges.verdicts import content

try:
    import fcntl
except ImportError:                     # Windows: one process at a time, then
    fcntl = None

# What hostile JSON raises.
GARBAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Cache:
    """Answers {key: line} of a file, and of other processes that write to it meanwhile."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.answers, self.end, self.damaged = path, {}, 0, 0
        self.lock = threading.Lock()
        self.file = open(path, "a+b", buffering=0)      # one line is one write, at the end whoever else has written
        with self.alone():
            self._read()
            if self.end < os.fstat(self.file.fileno()).st_size:     # a line torn by a kill: the next one would be
                os.truncate(path, self.end)                         # glued to the stump
                self.damaged += 1
        if self.damaged:
            print(f"judge: {self.damaged} damaged lines of {path} are left out", flush=True)

    @contextlib.contextmanager
    def alone(self):
        """No other thread, and no other process, is in here."""
        with self.lock:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if fcntl:
                    fcntl.flock(self.file, fcntl.LOCK_UN)

    def _read(self):
        """Take in the whole lines after self.end."""
        self.file.seek(self.end)
        data = self.file.read()
        data = data[:data.rfind(b"\n") + 1]
        self.end += len(data)
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                content(entry["choice"]["message"]).encode()
                entry.pop("request", None)              # for people; it need not be in memory
                self.answers[entry["key"]] = entry
            except GARBAGE:
                self.damaged += 1

    def get(self, key):
        """The line of a key, None if nobody has it. Looks at what others have written since."""
        if key not in self.answers and os.fstat(self.file.fileno()).st_size > self.end:
            with self.alone():
                self._read()
        return self.answers.get(key)

    def put(self, key, request, **answer):
        """File an answer before it is used."""
        entry = {"key": key, **answer, "time": time.time()}
        line = json.dumps({**entry, "request": request}).encode() + b"\n"
        with self.alone():
            self._read()
            self.file.write(line)
            self.end += len(line)
            self.answers[key] = entry

    def forget(self, keys):
        """Ask for these again: another answer will be filed below the one that is there."""
        for key in keys:
            self.answers.pop(key, None)

    def close(self):
        with self.lock:
            self.file.close()
