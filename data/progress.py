"""Progress of long work: one line that is updated in place on a terminal, and a line every ten seconds elsewhere."""
import sys
import time

EVERY = 10                              # seconds between two lines where nothing can be updated in place


class Progress:
    """How far some work is: "sft: sampling 120/805 | 3.2k tok/s | eta 12s". Short work prints nothing.

    name, total: what is counted, and how much of it there is.
    """

    def __init__(self, name, total):
        self.name, self.total = name, total
        self.start = self.last = time.monotonic()
        self.open = False               # whether the terminal's last line is ours and will be overwritten

    def update(self, done, text=""):
        """Say that `done` of the total is finished; `text` is shown beside it."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.last < (.2 if terminal else EVERY):
            return
        self.last = now
        left = (now - self.start) / done * (self.total - done) if done else None
        line = " | ".join(filter(None, (f"{self.name} {done}/{self.total}", text, left and f"eta {left:.0f}s")))
        print(f"\r{line[:79]:<79}" if terminal else line[:80], end="" if terminal else "\n", flush=True)
        self.open = terminal

    def close(self):
        """Clear the updated line, so that what is printed next stands alone."""
        if self.open:
            print(f"\r{'':<79}\r", end="", flush=True)
            self.open = False
