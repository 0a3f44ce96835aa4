"""What learners and judges saw: rows token by token, rollouts with their numbers, and what a judge was asked.

Each stage logs rows in samples.jsonl (rlhf.update.Log.rows), and a judge's file holds every request with its reply.
They are data here, which report.html and exercises.show write in their own ways.
"""
import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data.alpaca_eval import question
from data.judges.cache import GARBAGE
from data.judges.prompts import SPECIAL
from data.judges.verdicts import content

NUMBERS = {"kl": "KL", "value": "value", "reward": "reward", "advantage": "advantage"}
LEGEND = {"kl": "KL: the log-prob of the token less that of the reference.",
          "value": "Value: what the whole answer was expected to be worth before this token.",
          "reward": "Reward: the price of the KL, and at the last token the score.",
          "advantage": "An advantage above 0 makes a token likelier, one below 0 less likely."}
NOBODY_ASKED = {"coin": "Nobody was asked: this label is a coin, noise on purpose.",
                "equal": "Nobody was asked: the two answers are equal."}


# ---- rows ----------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """Neighbouring tokens of a row that are the same to its learner."""
    kind: str                           # prompt, answer, EOS or padding
    learned: bool                       # what the mask says
    texts: list


def rows(stage):
    """The rows that a stage has logged: samples with their tokens."""
    return [sample for sample in stage["samples"] if {"tokens", "mask", "prompt", "length"} <= sample.keys()]


def rollouts(stage):
    """Those rows of a stage that are answers of its policy, with numbers per token."""
    return [row for row in rows(stage) if "kl" in row]


def parts(row):
    """The Parts of a row, in order. Index t of its mask is about token t+1: the first token is never learned."""
    end = row["length"]
    answer, last = end - row["prompt"] - row["ends"], int(row["ends"])
    kinds = row["prompt"] * ["prompt"] + answer * ["answer"] + last * ["EOS"]
    kinds += (len(row["tokens"]) - end) * ["padding"]
    marks = zip(kinds, map(bool, [0, *row["mask"]]), row["tokens"])
    return [Part(*mark, [text for *_, text in group]) for mark, group in groupby(marks, key=lambda each: each[:2])]


def numbers(row):
    """[head, *lines] of a rollout: every token of the answer with the numbers that the learner has for it, as text."""
    known = [name for name in NUMBERS if name in row]
    lines = [[text, *(f"{round(row[name][t - 1], 3) + 0:.3f}" for name in known)]
             for t, text in enumerate(row["tokens"][:row["length"]]) if t >= row["prompt"]]
    return [["token", *(NUMBERS[name] for name in known)], *lines]


def legend(rows):
    """What the numbers of some rollouts are, in sentences."""
    known = [said for name, said in LEGEND.items() if any(name in row for row in rows)]
    return " ".join(["One answer of the policy, with the numbers that it was learned with.", *known])


def outcome(row):
    """What a rollout's scores and sums are, in a sentence or two."""
    score, *others = row["scores"]
    said = [f"Step {row['step']}: the score is {score:.3f}, the KL {sum(row['kl']) + 0:.3f} nats"]
    if "reward" in row:
        said.append(f", the rewards add up to {sum(row['reward']):.3f}")
    if others:
        mean = sum(row["scores"]) / len(row["scores"])
        said.append(f". The other answers to the prompt score {', '.join(f'{x:.2f}' for x in others)}: "
                    f"the mean of all is {mean:.3f}")
    return "".join(said) + "."


# ---- the judge -----------------------------------------------------------------------------------------

class Exchange(NamedTuple):
    """What a judge was asked about a record, and what it said."""
    messages: list                      # as they were sent
    reply: str


def exchange(record, files):
    """The Exchange in which an annotated record got its verdict, found in files of judges; None if it is in none of
    them. Several pairs may have been asked about in one request."""
    sent = [SPECIAL.sub(lambda match: match[0] + " ", text)
            for text in (question(record), record["output_1"], record["output_2"])]
    sent, found = [json.dumps(text)[1:-1] for text in sent], {}
    for path in filter(Path.exists, map(Path, files)):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not all(text in line for text in sent):
                continue
            try:
                entry = json.loads(line)
                reply = content(entry["choice"]["message"])
                if reply in record["raw_completion"]:               # a text, or one for each order
                    found[entry["model"]] = Exchange(entry["request"]["messages"], reply)
            except GARBAGE:
                continue
    return found.get(record["annotator"]) or next(iter(found.values()), None)


def ruling(record):
    """Who was shown which answer first, and what the verdict is, in sentences."""
    if record["scored_by"] in NOBODY_ASKED:
        return f"{NOBODY_ASKED[record['scored_by']]} The preference is {record['preference']:g}."
    one, two = (f"output_{i} ({record[f'generator_{i}']})" if f"generator_{i}" in record else f"output_{i}"
                for i in "12")
    first, second = (two, one) if record["is_switched"] else (one, two)
    order = ("It was asked in both orders" if record["is_switched"] is None else
             f"Output (a) is {first} and Output (b) is {second}; a hash has drawn the order")
    shown = f"{record['annotator']} was asked. {order}"
    if (p := record["preference"]) is None:
        return f"{shown}. There is no usable verdict: {record['scored_by']}."
    if p not in (1, 2):
        return f"{shown}. The preference is {p:.3g}, where 1 is output_1 and 2 is output_2."
    return f"{shown}. So {one if p == 1 else two} is preferred."
