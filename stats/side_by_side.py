"""A few instructions with the answers of all models to them, for people who want to read; two answers in columns."""
import hashlib
import textwrap
from itertools import zip_longest

import numpy as np

from stats.ranking import best_first
from stats.tables import WIDTH, filled, printable, shortened
from stats.winrate import discrete, usable, win_rate

LINES = 16                              # of an answer; the rest of a longer one is left out, and said to be


def draw_instructions(verdicts, n, seed):
    """(n instructions, how many there are to draw from) of {instruction: [preference for each model]}.

    Drawn are those on which the verdicts differ: some models won, others did not. Only if there are not enough of
    them, others follow. The hash of an instruction with the seed decides, so that the draw hardly changes when a
    model is added.
    """
    def place(instruction):
        return hashlib.sha256(f"{seed} {instruction}".encode()).hexdigest()

    def differ(instruction):
        outcomes = np.nan_to_num(discrete(usable(verdicts[instruction])), nan=.5)
        return len(set(outcomes)) > 1

    first = [instruction for instruction in verdicts if differ(instruction)]
    then = [instruction for instruction in verdicts if not differ(instruction)]
    return (sorted(first, key=place) + sorted(then, key=place))[:n], len(first)


def verdict(record, reference="the reference"):
    """Who preferred which answer, in words; the record is AlpacaEval's."""
    (p,) = usable([record["preference"]])
    who = record.get("annotator") or "the judge"
    if record["output_1"] == record["output_2"]:
        return f"the same text as {reference}"
    if not p >= 1:
        return f"no usable verdict by {who}"
    said = f"{who} prefers " + ("this answer" if p > 1.5 else reference) if p != 1.5 else f"{who} sees a draw"
    return said if p in (1, 1.5, 2) else f"{said} (this one by {100 * (p - 1):.0f} %)"


def side_by_side(records, n, seed, before=(), true_reward=None):
    """n instructions with the answers of all models, as text: {model: {instruction: its AlpacaEval record}}.

    Models come in the order of their win rates, the worst first, but those in `before` come before all others.
    true_reward(instruction, answer) is known in the offline world only.
    """
    asked, *others = records.values()
    shared = [instruction for instruction in asked if all(instruction in other for other in others)]
    verdicts = {instruction: [given[instruction]["preference"] for given in records.values()] for instruction in shared}
    drawn, differ = draw_instructions(verdicts, n, seed)
    rates = {name: win_rate([record["preference"] for record in given.values()]) for name, given in records.items()}
    names = sorted(reversed(best_first(rates)), key=lambda name: name not in before)
    parts = [filled(f"{len(drawn)} of {len(shared)} instructions, drawn with --seed {seed} from the {differ} on which "
                    "some models won and others did not:")]
    for place, instruction in enumerate(drawn, 1):
        parts.append(answers({name: records[name][instruction] for name in names}, instruction, place, true_reward))
    return "\n\n".join(parts)


def answers(records, instruction, n, true_reward):
    """Instruction number n and the answers to it: the reference's, then those of {model: record}."""
    def worth(record, text):
        return f"true reward {true_reward(record['instruction'], text):.2f}" if true_reward else ""

    references = {record["generator_1"]: record for record in records.values()}
    parts = [wrapped(instruction, f"{n}. ")]
    for name, record in references.items():
        by = name if name == "reference" else f"{name} (reference)"
        parts.append(answer(by, [worth(record, record["output_1"])], record["output_1"]))
    for name, record in records.items():
        said = verdict(record, "the reference" if len(references) == 1 else record["generator_1"])
        parts.append(answer(name, [said, worth(record, record["output_2"])], record["output_2"]))
    return "\n\n".join(parts)


def answer(by, remarks, text):
    """An answer below a line that says whose it is and what is known of it."""
    remarks = "; ".join(filter(None, remarks))
    lines = wrapped(text.strip() or "(nothing)", " " * 6).splitlines()
    if len(lines) > LINES:
        lines[LINES - 1:] = [f"      ... and {len(lines) - LINES + 1} lines more"]
    return "\n".join([wrapped(f"{by}: {remarks}" if remarks else by, " " * 3), *lines])


def wrapped(text, first):
    """The text in lines of at most 80 columns: `first` in front of the first, spaces in front of the others."""
    lines = [printable(line.expandtabs(4)) for line in text.strip().splitlines()]
    indent = " " * len(first)
    filled = [textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=indent) for line in lines]
    return first + "\n".join(filled)[len(first):]


def columns(left, right):
    """Two answers (whose it is, text) in two columns of a terminal, each below a line that says whose it is."""
    width, sides = (WIDTH - 2) // 2, []
    for by, text in (left, right):
        lines = [printable(line.expandtabs(4)) for line in (text.strip() or "(nothing)").splitlines()]
        wrapped = [part for line in lines for part in textwrap.wrap(line, width) or [""]]
        sides.append([shortened(by, width), "-" * width, *wrapped])
    return "\n".join(f"{a:{width}}  {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))
