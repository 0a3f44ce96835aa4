"""Grade a student's folder: a table for the teaching assistant, in two CPU minutes.

python -m exercises.grade ../farm-gae --seed 7   all of it
python -m exercises.grade ../farm-gae --quick    without training, in 15 s

Run it from your own copy of the project: the tests, the instructions and the
code that examines models are yours, and only functions and trained weights
are the student's. Another --seed gives other numbers, instructions and
trainings. The exit code is 0 for full marks, else 1.

What was measured with the project's own functions, seeds 0 to 4, 78 to 86 CPU
seconds each on one thread (error: over 400 instructions):

                      seed 0      1      2      3      4  error  wanted
reward model, %         67.4   66.9   68.1   73.5   68.6    1.4   >= 60
dpo, points over SFT   +13.7   +8.5  +13.5   +9.7  +17.1    2.0    >= 3
ppo, points over SFT   +19.6  +15.0  +19.2  +14.6  +14.7    1.8    >= 7
dpo on coins            -7.3  -12.3   -8.9   -9.1  -13.2    1.9    <= 0

Results alone find few mistakes. With seed 0, DPO without its reference has
-1.8 and a reward model with the sign swapped 32.6 %, but PPO gains 22.4 with
padding in its whitening, and 17.6 with the sign of the KL swapped. The
property tests fail all of these.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import nan
from pathlib import Path
from xml.etree import ElementTree

from data import InputError, run
from data.flags import Parser
from data.weights import write_whole
from exercises import BLANKS, trained
from exercises.tree import ROOT, changed
from stats.tables import filled, plain, plus_minus, table

FOR_TESTS, FOR_RESULTS = 5, 10          # points
ACCURACY, DPO, PPO, OFF = 60, 3, 7, .05          # what is wanted; see the table in the docstring


@dataclass
class Row:
    """A line of the table."""
    what: str
    found: str                          # what was measured
    wanted: str
    points: int
    of: int
    why: str = ""                       # what is wrong, in a sentence
    value: float = nan                  # what was measured, as a number, and its standard error
    error: float = nan


# -- property tests ------------------------------------------------------------------------------------------------

def property_tests(folder, seed, out):
    """A Row for each function: the tests run here, and call the student's functions in a process of their own."""
    report = out / "tests.xml"
    given = {"FARM_STUDENT": str(folder.resolve()), "FARM_SEED": str(seed), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "exercises/tests", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | given, stdin=subprocess.DEVNULL, capture_output=True)
    cases = list(ElementTree.parse(report).iter("testcase"))
    return [row_of_tests(blank, [case for case in cases if case.get("classname").endswith(f".test_{blank.name}")])
            for blank in BLANKS.values()]


def row_of_tests(blank, cases):
    """The Row of a function from pytest's report about its tests. It is right or wrong: there are no points between."""
    said = [problem.get("message") for case in cases for problem in (*case.findall("failure"), *case.findall("error"))]
    missing = any(message.startswith("NotImplementedError") for message in said)
    found = "blank" if missing else f"{len(cases) - len(said)} of {len(cases)} tests"
    why = re.sub(r"^\w+Error: ", "", said[0]).partition("\nassert ")[0] if said else ""
    return Row(blank.name, found, "all", 0 if said else FOR_TESTS, FOR_TESTS, why)


# -- results -------------------------------------------------------------------------------------------------------

def row_of(what, measure, wanted, good, form=".1f"):
    """The Row of a result. measure() -> trained.Measured; good(value, error): whether that is enough. What goes wrong
    with a student's files is told in the row."""
    try:
        value, error = measure()
    except Exception as problem:        # the files may hold anything
        return Row(what, "none", wanted, 0, FOR_RESULTS, str(problem) or type(problem).__name__)
    enough = bool(good(value, error))
    return Row(what, plus_minus(value, error, form), wanted, FOR_RESULTS * enough, FOR_RESULTS,
               "" if enough else "the number is not as wanted", value, error)


def results(folder, seed, out, limit):
    """The Rows of what was trained with the student's code."""
    missing, examiner = trained.train(folder, out, seed, limit), trained.Examiner(out, seed)

    def of(stage, measure):
        if not trained.there(out, stage):
            raise InputError(missing[stage] or "nothing was trained")
        return measure()

    return [
        row_of("reward model: true accuracy, %", lambda: of("reward", examiner.true_accuracy), f">= {ACCURACY}",
               lambda value, _: value >= ACCURACY),
        row_of("dpo: points over SFT", lambda: of("dpo", lambda: examiner.gain("dpo")), f">= {DPO}",
               lambda value, _: value >= DPO, "+.1f"),
        row_of("ppo: points over SFT", lambda: of("ppo", lambda: examiner.gain("ppo")), f">= {PPO}",
               lambda value, _: value >= PPO, "+.1f"),
        row_of("dpo on coins: points over SFT", lambda: of("coins", lambda: examiner.gain("coins")), "<= 0 + 2 errors",
               lambda value, error: value <= 2 * error, "+.1f")]


# -- the folder ----------------------------------------------------------------------------------------------------

def checked(folder):
    """InputError unless this is a copy of the project."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    wanted = {"farm.py", "eval.py", *(blank.file for blank in BLANKS.values())}
    if lacking := sorted(file for file in wanted if not (folder / file).is_file()):
        raise InputError(f"{folder} is no copy of the project: it has no {lacking[0]}")


# -- the command ---------------------------------------------------------------------------------------------------

def graded(args, out):
    """All Rows."""
    print("the property tests run ...", flush=True)
    rows = property_tests(args.folder, args.seed, out)
    rows.append(row_of("LC: points away from ours", lambda: trained.length_control(
        args.folder.resolve(), out, args.seed, args.limit), f"<= {OFF}", lambda value, _: value <= OFF, ".3f"))
    if args.quick:
        return rows
    print("models are trained with the student's code, which takes a minute or two ...", flush=True)
    return rows + results(args.folder.resolve(), args.seed, out, args.limit)


def shown(rows, other):
    """The table, what is wrong, and what else has changed, as text."""
    points, of = sum(row.points for row in rows), sum(row.of for row in rows)
    lines = [[row.what, row.found, row.wanted, f"{row.points} / {row.of}"] for row in rows]
    parts = [table(["", "found", "wanted", "points"], *lines, ["total", "", "", f"{points} / {of}"])]
    parts += [filled(f"{row.what}: {' '.join(row.why.split())}") for row in rows if row.why]
    if other:
        parts.append(filled(f"Not only the functions to be written differ from this project, but also "
                            f"{', '.join(other)}."))
    return "\n\n".join(parts)


def main(argv):
    parser = Parser("exercises.grade", __doc__)
    parser.add("folder", type=Path, metavar="FOLDER", help="a student's copy of the project")
    parser.add("--seed", type=int, default=0, help="of the tests' numbers, the instructions, and the trainings")
    parser.add("--quick", action="store_true", help="train nothing: property tests and length control only")
    parser.add("--limit", type=float, default=300., help="seconds that one command of the student's may take")
    parser.add("--json", type=Path, metavar="FILE", help="write the table for scripts, too")
    args = parser.parse(argv)
    checked(args.folder)
    if not find_spec("pytest"):
        raise InputError("the property tests need pytest: pip install pytest")
    if args.seed < 0 or not args.limit > 0:
        raise InputError("--seed is a number from 0 up, and --limit is above 0")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        rows, other = graded(args, Path(out)), changed(args.folder)
    print(f"\n{shown(rows, other)}")
    points, of = sum(row.points for row in rows), sum(row.of for row in rows)
    if args.json:
        document = {"folder": str(args.folder), "seed": args.seed, "points": points, "of": of, "changed": other,
                    "rows": [asdict(row) for row in rows]}
        write_whole(args.json, [json.dumps(plain(document), indent=1).encode()])
    if points < of:
        sys.exit(1)


if __name__ == "__main__":
    run(main, "exercises.grade", "the student's folder is as it was")
