"""The file of everything a judge ever answered: append-only, one line an answer, shared by processes.

A line is {"key", "model", "choice", "usage", "before", "seconds", "thinks", "dropped", "time", "request"}: the choice
of the reply as it came, so that a better parser reads old answers for free; the request as it was sent, where `dropped`
names what the server had refused; `before` holds the usages of earlier replies to it, cut off or empty; `thinks` says
that the model needs room for a thought. Of several lines with one key the last counts.
"""
import contextlib
import errno
import json
import os
import tempfile
import threading
import time

from data import NUMBER, TEXT, check_kinds, decode, is_number
from data.judges.verdicts import content

try:
    import fcntl
except ImportError:                     # Windows: one process at a time, then
    fcntl = None

# What hostile JSON raises.
GARBAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


ROOM = 1 << 14                          # bytes that a line may take; most take a few thousand
LINE = {"key": TEXT, "model": TEXT, "scored_by": TEXT, "before": ("a list", lambda value: isinstance(value, list)),
        "seconds": NUMBER, "time": ("seconds since 1970", lambda value: is_number(value) and 0 <= value < 1e11)}


class Cache:
    """Answers {key: line} of a file, and of other processes that write to it meanwhile."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.answers, self.end, self.damaged = path, {}, 0, 0
        self.lock, self.room = threading.Lock(), None
        self.file = open(path, "a+b", buffering=0)      # one line is one write, at the end whoever else has written
        with self.alone():
            self._read()
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
        """Take in the whole lines after self.end, and cut off one that a kill has torn: the next one would be glued to
        it. Only within alone(), where nobody is writing a line."""
        self.file.seek(self.end)
        data = self.file.read()
        data = data[:data.rfind(b"\n") + 1]
        self.end += len(data)
        for line in data.splitlines():
            try:
                entry = decode(line.decode(), rows=True)
                content(entry["choice"]["message"]).encode()
                check_kinds(self.path, entry, LINE)
                entry.pop("request", None)              # for people; it need not be in memory
                self.answers[entry["key"]] = entry
            except GARBAGE:
                self.damaged += 1
        if self.end < os.fstat(self.file.fileno()).st_size:
            os.ftruncate(self.file.fileno(), self.end)
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
            self._append(line)
            self.end += len(line)
            self.answers[key] = entry

    def _append(self, data):
        """Write at the end of the file, all or nothing; OSError if the disk is full."""
        end = os.fstat(self.file.fileno()).st_size
        try:
            write_all(self.file, data)
        except OSError:
            os.ftruncate(self.file.fileno(), end)
            raise

    def probe(self, answers):
        """OSError if the disk has no room for so many more answers: called before they are asked for, and paid for.

        It writes to a file beside that has no name, at the place where the next answer would stand in this one, in case
        the size of files is limited."""
        with self.lock:
            self.room = self.room or tempfile.TemporaryFile(dir=self.path.parent, buffering=0)
            self.room.seek(os.fstat(self.file.fileno()).st_size)
            try:
                write_all(self.room, bytes(answers * ROOM))
            finally:
                self.room.truncate(0)

    def forget(self, keys):
        """Ask for these again: another answer will be filed below the one that is there."""
        for key in keys:
            self.answers.pop(key, None)

    def close(self):
        with self.lock:
            self.file.close()
            if self.room:
                self.room.close()


def write_all(file, data):
    """Write to an unbuffered file. OSError if the disk has taken only a part."""
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
