"""farm.py, killed again and again: python tests/killing.py KILLS OUT FLAGS...

Each attempt is a fork of this process, which has loaded torch and done nothing. It sends itself SIGKILL at a moment
that is drawn at random: before an optimizer step, a step of sampling, an answer of the judge, or a change of a file.
Commands are run until KILLS attempts were killed; each that gets done has to leave what the first one left, which was
left alone. The last line is JSON: {"kills", "commands", "steps": optimizer steps, "alone": of the first command}.
"""
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch._dynamo  # noqa: E402, F401 - what the first step of each fork would load

import farm  # noqa: E402
from data.judges import cache  # noqa: E402
from rlhf import sampler, update  # noqa: E402

MOMENTS = [(update.Updater, "step"), (sampler.Engine, "advance"), (cache.Cache, "put"), (os, "fsync"), (os, "replace"),
           (Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")]


def attempt(argv, at):
    """Run farm.py in a fork that is killed at its moment number `at`, from 1 on; 0: never. Returns (killed, moments,
    optimizer steps)."""
    (reading, writing), seen = os.pipe(), []
    if not (child := os.fork()):
        for owner, name in MOMENTS:
            setattr(owner, name, counted(getattr(owner, name), b"s" if name == "step" else b".", writing, at, seen))
        sys.stdout = open(os.devnull, "w")
        os._exit(farm.main(argv))
    os.close(writing)
    with open(reading, "rb") as pipe:
        seen = pipe.read()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0, f"exit code {os.waitstatus_to_exitcode(status)}"
    return os.WIFSIGNALED(status), len(seen), seen.count(b"s")


def counted(function, mark, pipe, at, seen):
    """The function, which writes a mark to the pipe at each call, and kills this process at moment number `at`."""
    def counting(*args, **kwargs):
        seen.append(mark)
        os.write(pipe, mark)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counting


def left(out):
    """{file: content} of a run folder. Of what has times in it, and of reports, there is only the name."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name == "result.json":
            found[name] = json.loads(path.read_bytes())["metrics"]
        else:
            found[name] = path.read_bytes() if path.parent != out and path.name != "config.json" else None
    return found


def main(kills, out, *flags):
    out, argv, random_ = Path(out), [*flags, "--out", out, "--save_minutes", "0"], random.Random(0)
    argv = list(map(str, argv))
    killed, moments, alone = attempt(argv, 0)
    expected, counts = left(out), {"kills": 0, "commands": 0, "steps": 0, "alone": alone}
    while counts["kills"] < int(kills):
        shutil.rmtree(out)
        counts["commands"] += 1
        while True:
            killed, _, steps = attempt(argv, random_.randrange(1, moments // 2))
            counts["steps"] += steps
            counts["kills"] += killed
            if not killed:
                break
        found = left(out)
        different = [name for name in expected.keys() | found.keys()
                     if name not in expected or name not in found or expected[name] != found[name]]
        assert not different, different
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
