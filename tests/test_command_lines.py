"""Command lines that nobody would type on purpose: each ends with a result or a sentence, never with a traceback.

The commands run in this process. What takes long behind the flags (training, sampling, serving) does nothing here.
"""
import contextlib
import io
import json
import random
import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy
from test_bad_input import OUTPUTS, PAIRS, POOL, PROMPT, fixed
from test_eval import annotations
from test_report import made_in

import annotate
import eval
import farm
import serve
from data import attempt
from data.judges import JudgeError
from data.judges.person import Person
from rlhf import policy, stages
from stats import run_report
from studies import kit, studies

LIMIT = 60                              # seconds that one may take
NUMBERS = ("0", "1", "2", "3", "0.5", "1e-3", "7", "100", "1e9", "1000000000")
VALUES = ("", " ", "0", "1", "-1", "2", "0.5", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "x", "--", "-", "é",
          "\udcff", "a,b,c", ",", "0,1", "[]", "{}", '{"a": NaN}', "[" * 5000, "x" * 5000, ".", "..", "/",
          "/dev/null", "/nowhere/at/all", "~", "none", "barn", "me", "serve:barn", "sft", "p_eval", "p_ann", "float16",
          "org/name", "org/name@v1", "https://huggingface.co/org/name", "demo", "alpaca_farm", "unusable", "\u202e")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with files and folders that are good, for some command."""
    folder = tmp_path_factory.mktemp("files")
    toy.base(folder)
    fixed(folder / "pairs.json", PAIRS), fixed(folder / "mine.json", OUTPUTS), fixed(folder / "pool.json", POOL)
    fixed(folder / "prompt.json", PROMPT), fixed(folder / "a.json", annotations("a", [1., 2.] * 9))
    fixed(folder / "ref.json", [{**record, "output": "No.", "generator": "ref"} for record in OUTPUTS])
    (folder / "board.csv").write_text("name,win_rate\na,50\nb,20\nc,70\n")
    (folder / "broken.json").write_text("[{]")
    made_in(folder / "run")
    return folder


@pytest.fixture(autouse=True)
def nothing_takes_long(monkeypatch, tmp_path):
    """No stage is run, no study, no server; a person gives no answers; no judge outside of this machine is there."""
    @contextmanager
    def served(judge):
        raise JudgeError("it is not served here")
        yield

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run", lambda stage, again, step: None)
    monkeypatch.setattr(farm, "leaderboard", lambda cfg, said: "")
    monkeypatch.setattr(policy, "merge", lambda cfg: "")
    monkeypatch.setattr(run_report, "write", lambda *args: None)
    monkeypatch.setattr(annotate, "served", served)
    monkeypatch.setattr(serve, "end_with_input", lambda: None)         # would end this process
    monkeypatch.setattr(Person, "waiting", lambda self: False)
    monkeypatch.setattr(serve.time, "sleep", lambda seconds, real=time.sleep: interrupted(0) if seconds == 60 else
                        real(seconds))
    for name in studies():
        monkeypatch.setattr(kit.load(name), "run", lambda cfg: kit.Result({}, "nothing"))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


COMMANDS = {                            # a command, and lines for it that work
    "annotate.py": (annotate.main, [
        "pairs.json --judge barn", "mine.json --reference ref.json --judge barn --pool p_single",
        "pairs.json --pool pool.json --dry_run --replay", "mine.json --complete m", "pairs.json --judge me --replay"]),
    "eval.py": (eval.main, [
        "a.json --resamples 9", "run --resamples 9 --report", "--outputs mine.json --reference ref.json --judge barn",
        "--judge_report a.json --human a.json", "--rankings board.csv board.csv", "--attack --limit 1", "--show run",
        "--arena_hard run"]),
    "farm.py": (farm.command, [
        "--method dpo", "--method dpo,ppo", "--method sft --seeds 0,1", "--method all", "--study labels --quick",
        "--method pairs --model base", "--method grpo --judge none", "--method sft --data mine.json --judge none"]),
    "serve.py": (serve.main, ["barn --ask hi --max_new_tokens 2", "base --ask w8 --max_new_tokens 2", "barn"])}


def outcome(main, argv):
    """(exit code, what is said on standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = attempt(main, argv, "command", "nothing is lost")
    return code, err.getvalue()


def flags_of(main, *argv):
    """All flags that --help names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        attempt(main, [*argv, "--help"], "command", "")
    return sorted(set(re.findall(r"--[a-z][\w.-]+", out.getvalue())) - {"--help"})


def strange(line, flags, files, r):
    """A line that works, with some flags more, fewer, or with values that they were not made for."""
    there = {path.name: str(path) for path in files.iterdir()}
    argv = [there.get(word, word) for word in line.split()]
    for _ in range(r.choice((1, 1, 2))):
        flag, how, at = r.choice(flags), r.random(), r.randrange(len(argv) + 1)
        value = r.choice((r.choice(VALUES), r.choice(list(there.values())), r.choice(NUMBERS)))
        if how < .6:
            argv += [flag, value]
        elif how < .75:
            argv.append(f"{flag}={value}")
        elif how < .85:
            argv.append(flag)
        elif how < .95:
            argv[at:at + 1] = [value]
        else:
            del argv[at:at + 1]
    return argv


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer, so that no command runs for ever")
@pytest.mark.parametrize("many", [8, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", COMMANDS)
def test_a_strange_command_line_ends_with_a_result_or_a_sentence(script, many, files, tmp_path):
    def late(number, frame):
        raise AssertionError(f"still running after {LIMIT} s")

    (main, lines), r = COMMANDS[script], random.Random(f"{script} {many}")
    flags = flags_of(main, *(["--method", "ppo"] if script == "farm.py" else []))
    flags += ["--sft.lr", "--dpo.name", "--pairs.flip", "--metod", "--seeds", "--study"] * (script == "farm.py")
    before = signal.signal(signal.SIGALRM, late)
    try:
        for _ in range(many):
            for path in Path.cwd().iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            argv = strange(r.choice(lines), flags, files, r)
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            code, err = outcome(main, argv)
            signal.setitimer(signal.ITIMER_REAL, 0)
            offline = code == 1 and "HF_HUB_OFFLINE" in err
            assert code in (0, 2, 3) or offline or code == 130 and script == "serve.py", (argv, code, err)
            *usage, said = err.strip().splitlines() or [""]
            assert code == 0 or said.startswith(("command: ", script)) or code == 130, (argv, err)
            assert not usage or usage[0].startswith("usage:"), (argv, err)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert json.loads((files / "pairs.json").read_text()) == PAIRS          # nothing was overwritten
