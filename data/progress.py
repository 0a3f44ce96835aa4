"""Progress of long work: one line that is updated in place on a terminal, and a line every ten seconds elsewhere."""
import shutil
import sys
import time
from functools import lru_cache

EVERY = 10                              # seconds between two lines where nothing can be updated in place
WIDTH = 79                              # columns of a line, at most


def width():
    """Columns that a line may take: a longer one could not be updated in place."""
    return min(WIDTH, shutil.get_terminal_size().columns - 1)


def cut(text, columns):
    """The beginning of a text that would be too long."""
    return text if len(text) <= columns else f"{text[:columns - 3]}..."


def fitted(parts, tail=""):
    """"a | b | c" and a tail; the last of the parts are left out where there is no room for them."""
    while len(parts) > 1 and len(" | ".join(parts) + tail) > width():
        parts = parts[:-1]
    return cut(" | ".join(parts) + tail, width())


def duration(seconds):
    """12s, 34m or 5.6h."""
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 100 * 60 else f"{seconds / 3600:.1f}h"


def amount(x):
    """41 or 3.2k."""
    return f"{x:.0f}" if x < 1000 else f"{x / 1000:.1f}k"


class Progress:
    """How far some work is: "sft: sampling 120/805 | 3.2k tok/s | eta 12s". Short work prints nothing.

    name, total: what is counted, and how much of it there is. before: how much of it an earlier process has done.
    """
    drawn = False                       # whether the terminal's last line will be overwritten; there is one terminal

    def __init__(self, name, total, before=0):
        self.name, self.total, self.before = name, total, before
        self.start = self.last = time.monotonic()

    def update(self, done, text="", keep=False):
        """Say that `done` of the total is finished. `text` is shown beside it: parts with " | " between them, of which
        the last are left out where there is no room. keep: show it now, in a line that stays."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if not keep and now - self.last < (.2 if terminal else EVERY):
            return
        self.last = now
        line = self.line(done, text, now)
        if not terminal:
            print(line, flush=True)
            return
        print(f"\r{line:<{width()}}", end="\n" if keep else "", flush=True)
        Progress.drawn = not keep

    def line(self, done, text, now):
        parts = [f"{self.name} {done:>{len(str(self.total))}}/{self.total}", *filter(None, text.split(" | "))]
        new, left = done - self.before, self.total - done
        return fitted(parts, f" | eta {duration((now - self.start) / new * left)}" if new > 0 and left > 0 else "")

    @staticmethod
    def close():
        """Clear the updated line, so that what is printed next stands alone."""
        if Progress.drawn:
            print(f"\r{'':<{width()}}\r", end="", flush=True)
            Progress.drawn = False


@lru_cache(None)
def say_once(line):
    """Print a line; but not again in the same process, when the same is found out again."""
    Progress.close()
    print(line, flush=True)
