"""Annotators: pairs -> a chat completion.

An annotator is a model with a prompt, a temperature and a number of pairs that it sees at a time. Its prompt is a file
in data/judges/: "messages" with a place {pairs}, the form of one "pair", and the form of its "verdict"; a list of
strings is lines. Texts go in in one pass, fenced: nothing in an answer can become a placeholder, a message or its end.
"""
import functools
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from data import InputError, from_json, read_text

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Annotator:
    """One simulated annotator; `prompt` names a file in data/judges/, or is a path that ends in .json."""
    name: str
    model: str
    prompt: str = "pairwise"
    batch: int = 1                      # pairs in one request
    temperature: float = 0.0
    max_tokens: int = 16
    pool: str = ""                      # what it belongs to, for the records
    logprobs: bool = False              # ask for the token log-probabilities of its letter


def paper_pool(models):
    """AlpacaFarm's thirteen (arXiv 2305.14387, appendix): a big, a mid and a small model, or one for all."""
    tiers = dict(zip(("big", "mid", "small"), models if len(models) == 3 else 3 * list(models)))
    rows = json.loads((HERE / "annotators.json").read_text(encoding="utf-8"))
    return [Annotator(model=tiers[row.pop("tier")], **row) for row in rows]


def single(model):
    """AlpacaFarm's p_sim^GPT-4: one judge, greedy, with a batch of five and criteria spelled out."""
    return [Annotator(model, model, "criteria", 5, 0.0, 60)]


def pairwise(model):
    """AlpacaEval 2's judge: one pair, one letter, as sure of it as the log-probabilities of its token say."""
    return [Annotator(model, model, logprobs=True)]


# ---- prompts -------------------------------------------------------------------------------------------

@functools.cache
def template(prompt):
    """The document data/judges/<prompt>.json, its lines joined and its placeholders unfilled."""
    path = Path(prompt) if prompt.endswith(".json") else HERE / f"{prompt}.json"
    document = from_json(path, read_text(path))
    for message in document["messages"]:
        message["content"] = joined(message["content"])
    return {**document, "pair": joined(document["pair"])}


def joined(text):
    """A text, or a list of its lines, as a text."""
    return text if isinstance(text, str) else "\n".join(text)


def fence(*texts):
    """A mark that none of the texts contains, drawn from their hash: equal pairs make equal requests."""
    for n in itertools.count():
        mark = hashlib.sha256(json.dumps([n, *texts]).encode()).hexdigest()[:8]
        if not any(mark in text for text in texts):
            return mark


# What servers read as the start or end of a message, even inside one.
SPECIAL = re.compile(r"<(?=\|[^|>\n]{1,40}\|>|/?s>|(?:start|end)_of_turn>|</?SYS>>)|\[(?=/?INST\])")


def request_body(annotator, pairs, max_tokens=0, logprobs=False):
    """The chat completion that asks which text is better, of each pair (instruction, text shown first, second)."""
    form = template(annotator.prompt)
    values = {"fence": fence(*itertools.chain(*pairs)), "number": str(len(pairs))}

    def fill(text, values):             # in one pass: a placeholder inside an answer is text like any other
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)

    shown = [[SPECIAL.sub(lambda match: match[0] + " ", text) for text in pair] for pair in pairs]
    values["pairs"] = "\n\n".join(
        fill(form["pair"], {**values, "n": str(n), "instruction": instruction, "output_1": first, "output_2": second})
        for n, (instruction, first, second) in enumerate(shown, 1))
    body = {"model": annotator.model,
            "messages": [{"role": m["role"], "content": fill(m["content"], values)} for m in form["messages"]],
            "temperature": annotator.temperature, "max_tokens": max_tokens or annotator.max_tokens}
    return {**body, "logprobs": True, "top_logprobs": 20} if logprobs else body


FORMS = {                               # of verdicts, as a judge is told that did not keep to it
    "letter": "`Output (a)` or `Output (b)`", "numbered": "`1: Output (a)` or `1: Output (b)`",
    "json": '`[{"pair": 1, "better": "a"}]` or `[{"pair": 1, "better": "b"}]`'}


def once_more(body, reply, form):
    """A request about one pair with its form said again: after a `reply` to it that had none, or before any ("")."""
    exactly = f"Reply with exactly {FORMS[form]} and nothing else."
    *before, last = body["messages"]
    if not reply:
        return {**body, "messages": [*before, {**last, "content": f"{last['content']}\n\n{exactly}"}]}
    said = SPECIAL.sub(lambda match: match[0] + " ", reply.strip()[:2000])
    return {**body, "messages": [*body["messages"], {"role": "assistant", "content": said}, {
        "role": "user", "content": f"I read no verdict in that. Which output is better? {exactly}"}]}


def prompts_shown(annotators, pairs, name=""):
    """The filled prompt of the annotator or the prompt file of this name, or one of each prompt, to be read."""
    chosen = {one.prompt: one for one in reversed(annotators) if name in ("", one.name, one.prompt)}
    if not chosen:
        raise InputError(f"--show_prompt {name}: choose {', '.join(one.name for one in annotators)}")
    lines = []
    for one in chosen.values():
        lines += ["", f"==== {one.name} ({one.prompt}) ===="]
        for message in request_body(one, pairs)["messages"]:
            lines += ["", f"-- {message['role']}:", message["content"]]
    return "\n".join(lines)
