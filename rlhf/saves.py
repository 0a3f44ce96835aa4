"""[kit] Saves: what a stage has done so far, on disk, so that the same command goes on there after a kill.

A save is a folder in <stage>/.saves/: the tensors as safetensors, everything else as JSON, and a manifest of their
hashes. It is written under a hidden name, synced to the disk and renamed. The last two are kept, and the newest
undamaged one is used. The same folder has the answers of samplings, in files to which they are appended, and
time.json, the seconds that the stage has taken.

A learner lists the objects that its loop changes: for step, batch in log.resumed(batches, model, updater). A save has
the index of the current iteration, and the state of these objects at its start. Loops may be nested: after a kill the
body of the outer loop runs again up to the inner loop. Until then nothing is logged, and answers that were sampled
before are read from their file: the saved policy has learned since, and would give others.
"""
import hashlib
import json
import os
import shutil
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import torch

from data import interrupts
from data.files import hash_of, write_json
from data.progress import Progress
from rlhf.state import randomness, read, set_randomness, write

SAVES = ".saves"                        # the folder of a stage's saves, below its own
KEPT = 2                                # saves: if the newest is damaged, the other is used
AT_END = .2                             # share of --save_minutes after which the end of a loop is saved
PART = 2e13                             # floating-point operations of a part of a sampling on a CPU: a minute


def saved(folder):
    """The saves in a folder, the oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def whole(folder):
    """The state in a save; None if the save, or a file of answers that it refers to, is damaged."""
    state = read(folder)
    answers = state["answers"].items() if state else ()
    return state if all(hash_of(folder.parent / name, size) == said for name, (size, said) in answers) else None


def save_of(path):
    """The number of the save with the weights of the answers in a file; 0 if its first line is incomplete."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.loads(file.readline())[1]
    except (ValueError, TypeError, LookupError):
        return 0


def seconds_saved(folder):
    """[wall-clock seconds, CPU seconds] of a stage up to its last save; zeros if no readable file has them."""
    try:
        return json.loads((folder / "time.json").read_text())
    except (OSError, ValueError):
        return [0., 0.]


class Saves:
    """The saves of one stage, and its running loops. Without a folder nothing is saved, and signals interrupt at once.

    minutes: between two saves. pending: the loops of the loaded save that have not been entered again yet. moved:
    whether anything has changed since the last save. number: the number of the newest save, loaded or written.
    unwritten: {file: its Answers}, if some of them are not in the file.
    """

    def __init__(self, folder=None, minutes=5.):
        self.folder, self.minutes = folder, minutes
        self.loops, self.logs, self.answered, self.unwritten, self.moved = [], {}, {}, {}, False
        self.last = self.start = time.monotonic()
        self.work, self.before = time.process_time(), [0., 0.]
        self.state, self.number = {"loops": [], "logs": {}, "answers": {}}, 0
        if folder:
            self.open()
        self.pending = self.state.pop("loops")

    def open(self):
        """Load the newest undamaged save. Remove newer ones, which are damaged, and answers that came after it."""
        self.folder.mkdir(exist_ok=True)
        for stale in self.folder.glob(".*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.before = seconds_saved(self.folder)
        for path in reversed(saved(self.folder)):
            if state := whole(path):
                self.state, self.number = state, int(path.name)
                break
            print(f"{path} is damaged and left out", flush=True)
            shutil.rmtree(path)
        for path in self.folder.glob("*.jsonl"):
            if save_of(path) > self.number:
                path.unlink()

    @property
    def behind(self):
        """Whether the stage has not yet come back to the point at which it was saved."""
        return bool(self.pending)

    def seconds(self):
        """[wall-clock seconds, CPU seconds] that the stage has taken, before a kill and since then."""
        return [self.before[0] + time.monotonic() - self.start, self.before[1] + time.process_time() - self.work]

    def due(self, share=1.):
        """Whether it is time for a save: a signal waits, or this share of --save_minutes has passed."""
        return self.folder and (interrupts.noted() or time.monotonic() - self.last >= share * 60 * self.minutes)

    def log(self, path):
        """Open a log for appending, cut back to the length that it had at the loaded save."""
        file = open(path, "a")
        file.truncate(min(path.stat().st_size, self.state["logs"].get(path.name, 0)))
        self.logs[path.name] = file
        return file

    def resumed(self, items, *kept):
        """Yield (index, item), from the index of the loaded save on. kept: the objects that the loop changes; those
        without a load_state_dict() have no state to save."""
        if not self.folder:
            yield from enumerate(items)
            return
        loop = SimpleNamespace(at=0, kept=[each for each in kept if hasattr(each, "load_state_dict")], states=[])
        self.loops.append(loop)
        depth, first = len(self.loops), self.enter(loop, len(items))
        with interrupts.finishing():    # also while a save is written
            try:
                for at in range(first, len(items)):
                    self.begin(loop, at, depth)
                    if at > first:
                        self.moved = True
                        self.pause()
                    yield at, items[at]
            finally:                    # a break ends a loop, too
                loop.kept = [None if getattr(each, "only_in_loop", False) else each for each in loop.kept]
                self.begin(loop, len(items), depth)
                self.moved = True
            self.pause(AT_END)

    def begin(self, loop, at, depth):
        """Record that the loop at this depth is at index `at`, and the state of its objects. Deeper loops are over."""
        del self.loops[depth:]
        loop.at, loop.states = at, [None if each is None else each.state_dict() for each in loop.kept]

    def enter(self, loop, total):
        """Load the saved state into the objects that a loop changes. Returns the index at which the loop continues."""
        if not self.pending:
            return 0
        there = self.pending.pop(0)
        for each, state in zip(loop.kept, there["kept"]):
            if state is not None:
                each.load_state_dict(state)
        if not self.pending:
            set_randomness(self.state["random"])
            Progress.close()
            print(f"goes on from its last save: {there['at']} of {total}", flush=True)
        return there["at"]

    def pause(self, share=1.):
        """Between two steps: save if it is time, stop if a signal has come."""
        if self.moved and self.due(share):
            self.save()
        interrupts.stop()

    def save(self):
        """Write a save, and before it the answers on which it builds. An object that several loops name is saved with
        the innermost."""
        loops, seen = [], set()
        for loop in reversed(self.loops):
            states = [None if id(each) in seen else state for each, state in zip(loop.kept, loop.states)]
            loops.insert(0, {"at": loop.at, "kept": states})
            seen |= set(map(id, loop.kept))
        for file in self.logs.values():
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self.logs.items()}
        self.number += 1
        for answers in list(self.unwritten.values()):
            answers.append()
        write(self.folder / f"{self.number:06}", {"loops": loops, "random": randomness(), "logs": sizes,
                                                  "answers": self.answered})
        for old in saved(self.folder)[:-KEPT]:
            shutil.rmtree(old)
        self.moved = False
        self.tick()

    def tick(self):
        """Write down the time that the stage has taken; the next save is due --save_minutes from now."""
        write_json(self.folder / "time.json", self.seconds())
        self.last = time.monotonic()


class Answers(dict):
    """The finished answers of one sampling, {row: [token ids, log-probs or None]}, appended to a file as they come.

    asked: everything that determines the answers except the weights, as JSON. The first line of the file has its hash,
    and the number of the save that has the weights. If that save is lost, the file is removed.
    """

    def __init__(self, saves, name, asked):
        self.saves, self.name, self.new = saves, f"{name}.jsonl", []
        if not saves.folder:
            return
        self.path, self.hash = saves.folder / self.name, hashlib.sha256()
        self.of = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if self.path.exists():
            size = self.read()
            os.truncate(self.path, size)
            self.note(size)

    def note(self, size):
        """Have the next saves record the file's size in bytes and its hash; they are checked when a save is loaded."""
        self.saves.answered[self.name] = [size, self.hash.hexdigest()]

    def read(self):
        """Read the file up to the first incomplete line. Returns the number of bytes up to there: 0 if `asked` was
        different."""
        size = 0
        with suppress(ValueError, TypeError):
            for n, line in enumerate(self.path.read_bytes().splitlines(True)):
                first, *rest = json.loads(line)
                if not line.endswith(b"\n") or n == 0 and first != self.of:
                    break
                if n:
                    self[first] = rest
                self.hash.update(line)
                size += len(line)
        return size

    def finishing(self):
        """A with block that the first signal does not interrupt: add() writes the answers and then stops."""
        return interrupts.finishing() if self.saves.folder else nullcontext()

    def add(self, answers):
        """Add answers; some may be known already. Write the new ones if a save is due; stop if a signal waits."""
        self.new += [(row, *answer) for row, answer in answers.items() if row not in self]
        self.update(answers)
        if self.new and self.saves.folder:
            self.saves.unwritten[self.name] = self
        if self.saves.due():
            self.write()
        interrupts.stop()

    def rows(self, prompts, n, logps):
        """All answers, n to each prompt, in the form that sampler.sample() returns."""
        rows = [(prompts[row // n], self[row][0]) for row in range(n * len(prompts))]
        found = [self[row][1] for row in range(len(rows))]
        return (rows, None if None in found else list(map(torch.tensor, found))) if logps else rows

    def write(self):
        """Append the new answers to the file; if weights have changed since the last save, save them, too."""
        if self.saves.moved:
            self.saves.save()
        elif self.new:
            self.append()
            self.saves.tick()

    def append(self):
        """Append the new answers to the file."""
        with open(self.path, "ab") as file:
            head = [] if file.tell() else [[self.of, self.saves.number]]
            data = "".join(json.dumps(line) + "\n" for line in [*head, *self.new]).encode()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.hash.update(data)
        self.note(self.path.stat().st_size)
        self.new = []
        del self.saves.unwritten[self.name]


def parts(gpt, prompts, longest, n, slots, done):
    """Lists of rows to sample, one after another, of n answers to each prompt.

    By rounding, an answer depends on the answers that are sampled beside it. So that a CPU gives the same answers after
    a kill, it samples each list as a whole, even if some of its rows are done. A GPU rounds differently in every run
    anyway, and takes all rows that are left as one list. longest: tokens of an answer, at most. slots: how many answers
    are sampled at the same time. done: the rows that have been sampled.
    """
    rows = size = n * len(prompts)
    if cpu := gpt.device.type == "cpu":
        work = 2 * sum(p.numel() for p in gpt.parameters()) * (max(map(len, prompts)) + longest)     # for one answer
        size = max(2 * slots, int(PART / work))
        size += -size % n                               # the answers to a prompt stay together
    for start in range(0, rows, size):
        part = range(start, min(start + size, rows))
        if left := [row for row in part if row not in done]:
            yield list(part) if cpu else left
