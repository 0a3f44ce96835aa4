"""What a run did, token by token: what was learned, what the judge read, what a rollout was worth.

python -m exercises.show tokens RUN       a row as a learner sees it
python -m exercises.show prompt RUN       a judge's prompt, its reply, its verdict
python -m exercises.show rollout RUN      an answer with its reward, KL, value
                                          and advantage at each token

RUN is a run folder (runs/barn) or one of its stages (runs/barn/ppo). Of a run
folder, the last stage that has what is asked for is shown. report.html shows
the same.
"""
import os
import sys
from pathlib import Path

from data import InputError, run, run_folders
from data.flags import Parser
from data.judges.person import PERSON
from stats import traces
from stats.side_by_side import wrapped
from stats.tables import WIDTH, filled, printable, table

# Of ANSI: dim, green, inverse, struck out; and underlined.
COLOURS, LEARNED = {"prompt": "2", "answer": "32", "EOS": "1;7", "padding": "2;9"}, "4"
WHAT = {"tokens": "rows of tokens: sft, reward, dpo and its variants have some",
        "rollout": "rollouts: ppo, grpo, rloo and reinforce have some",
        "prompt": "labels or verdicts by a judge"}


def stages_at(path):
    """The finished stages that RUN names, in the order in which they need each other."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}")
    inside = bool(run_folders.settings(path))
    found = run_folders.contents([path.parent if inside else path])
    found = [stage for stage in found if not inside or stage["name"] == path.name]
    if not found:
        raise InputError(f"{path} is no run folder with a finished stage, and no finished stage of one")
    return found


def labels(stage):
    """The pairs of a stage that were labelled, or its answers that were judged."""
    return stage["pairs"] or run_folders.document(stage["run"] / stage["name"] / "annotations.json", [])


FIND = {"tokens": traces.rows, "rollout": traces.rollouts, "prompt": labels}


def chosen(what, path, number):
    """(stage, row) of what is to be shown; number: which row, None: the last rollout, the first of anything else."""
    found = [(stage, rows) for stage in stages_at(path) if (rows := FIND[what](stage))]
    if not found:
        raise InputError(f"{path} has no {WHAT[what]}")
    stage, rows = found[-1]
    if number is None:
        number = {"tokens": 0, "rollout": len(rows) - 1, "prompt": first_asked(rows)}[what]
    if not 0 <= number < len(rows):
        raise InputError(f"--row {number}: {stage['run'] / stage['name']} has rows 0 to {len(rows) - 1}")
    print(filled(f"{stage['run'] / stage['name']}, row {number} (of 0 to {len(rows) - 1})"))
    return stage, rows[number]


def first_asked(records):
    """Which record is the first that a judge has said something about."""
    return next((i for i, record in enumerate(records) if record.get("raw_completion")), 0)


# -- as text -------------------------------------------------------------------------------------------------------

def coloured(text, code):
    """The text in ANSI's colours, if this is a terminal whose user has not set NO_COLOR (no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def lines_of(texts):
    """Tokens in lines of at most 80 columns, with | between them."""
    lines = [""]
    for text in texts:
        text = printable(text.replace("\n", "⏎"))
        if len(lines[-1]) + len(text) + 1 > WIDTH - 2:
            lines.append("")
        lines[-1] += f"{text}|"
    return lines


def show_tokens(stage, row):
    for kind, learned, texts in traces.parts(row):
        print(f"\n{kind}, {len(texts)} token{'s' * (len(texts) > 1)}, {'learned' if learned else 'not learned'}:")
        code = COLOURS[kind] + f";{LEARNED}" * learned
        for line in lines_of(texts[:1] if kind == "padding" else texts):
            print(f"  {coloured(line, code)}")


def show_rollout(stage, row):
    head, *lines = traces.numbers(row)
    lines = [[text.replace("\n", "⏎"), *numbers] for text, *numbers in lines]
    asked = "".join(row["tokens"][:row["prompt"]])
    print()
    print(filled(traces.legend([row])), wrapped(asked, "prompt: "), table(head, *lines), filled(traces.outcome(row)),
          sep="\n\n")


def show_prompt(stage, record):
    settings = stage["settings"]
    file = Path(settings.get("cache") or stage["run"] / "judge.jsonl")
    if PERSON.fullmatch(record.get("annotator") or ""):
        raise InputError(f"a person has judged {stage['name']}: no prompt was sent")
    if record.get("raw_completion"):
        found = traces.exchange(record, [file])
        if not found:
            raise InputError(f"{file} has no reply about this pair: was the run made with --cache?")
        for message in found.messages:
            print(f"\n{coloured(message['role'] + ':', '1')}\n{wrapped(message['content'], '  ')}")
        print(f"\n{coloured('the reply:', '1')}\n{wrapped(found.reply, '  ')}")
    print(f"\n{filled(traces.ruling(record))}")


SHOW = {"tokens": show_tokens, "rollout": show_rollout, "prompt": show_prompt}


def main(argv):
    parser = Parser("exercises.show", __doc__)
    parser.add("what", choices=list(SHOW), help="what to show")
    parser.add("run", type=Path, metavar="RUN", help="a run folder, or one of its stages")
    parser.add("--row", type=int, metavar="N", help="which row, counted from 0 (default: the first; the last rollout)")
    args = parser.parse(argv)
    SHOW[args.what](*chosen(args.what, args.run, args.row))


if __name__ == "__main__":
    run(main, "exercises.show", "nothing is changed by it")
