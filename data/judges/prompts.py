"""Annotators: pairs -> a chat completion -> verdicts.

An annotator is a model with a prompt, a temperature and a number of pairs that it sees at a time. Its prompt is a file
in data/judges/: "messages" with a place {pairs}, the form of one "pair", and the form of its "verdict"; a list of
strings is lines. Texts go in in one pass, fenced: nothing in an answer can become a placeholder, a message or its end.
"""
import ast
import functools
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

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


def paper_pool(models):
    """AlpacaFarm's thirteen (arXiv 2305.14387, appendix): a big, a mid and a small model, or one for all."""
    tiers = dict(zip(("big", "mid", "small"), models if len(models) == 3 else 3 * list(models)))
    rows = json.loads((HERE / "annotators.json").read_text(encoding="utf-8"))
    return [Annotator(model=tiers[row.pop("tier")], **row) for row in rows]


def single(model):
    """AlpacaFarm's p_sim^GPT-4: one judge, greedy, with a batch of five and criteria spelled out."""
    return [Annotator(model, model, "criteria", 5, 0.0, 60)]


# ---- prompts -------------------------------------------------------------------------------------------

@functools.cache
def template(prompt):
    """The document data/judges/<prompt>.json, its lines joined and its placeholders unfilled."""
    path = Path(prompt) if prompt.endswith(".json") else HERE / f"{prompt}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
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


# ---- verdicts ------------------------------------------------------------------------------------------

MARKS = r"[\s*_`'\"#>.:-]*"             # what a letter may be dressed in, besides "Output" and brackets
LETTER = re.compile(rf"{MARKS}(?:(?:the\ better\ one|better)\W+)?(?:output\s*)?{MARKS}\(?([ab])\)?{MARKS}",
                    re.IGNORECASE | re.VERBOSE)
NUMBERED = re.compile(r"[\s*_`'\"#>-]*(?:pair\s*)?(\d+)[\s*_`.:)-]+(?:output\s*)?\(?([ab])\)?[\s*_`'\",.]*",
                      re.IGNORECASE)
REFUSAL = re.compile(r"\s*(?:i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t\b|i(?: a|['’])m unable)", re.IGNORECASE)
BARE = re.compile(r"\W*([ab])\W*", re.IGNORECASE)
MAX_LINE, MAX_LITERAL = 300, 2048       # characters that the patterns, and that ast, may look at


def letters(reply):
    """{pair's number: "a" or "b"} of a reply in one letter, in any dress of case, quotes and markdown."""
    match = LETTER.fullmatch(reply) if len(reply) <= MAX_LINE else None
    return {1: match[1].lower()} if match else {}


def numbered(reply):
    """{pair's number: letter} of the lines "3: Output (a)"; other lines may say why. Two for a pair are none."""
    found = {}
    lines = (line for line in reply.splitlines() if len(line) <= MAX_LINE)
    for match in filter(None, map(NUMBERED.fullmatch, lines)):
        found.setdefault(int(match[1]), set()).add(match[2].lower())
    return {n: said.pop() for n, said in found.items() if len(said) == 1}


def objects(reply):
    """{pair's number: letter} of a JSON list of {"pair", "better"}, or of a single one; what comes before may think."""
    starts = itertools.islice(re.finditer(r"\[\s*\{|\{", reply), 100)
    for start in (match.start() for match in starts):
        text = re.sub(r"\s*```\s*$", "", reply[start:].strip())
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            try:
                document = ast.literal_eval(text) if len(text) <= MAX_LITERAL else None
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                document = None
        if document is not None:
            break
    else:
        return letters(reply)
    found = {}
    for n, item in enumerate(document if isinstance(document, list) else [document], 1):
        if isinstance(item, dict) and isinstance(item.get("better"), str):
            found.setdefault(item.get("pair", n), []).extend(letters(item["better"]).values())
    return {n: said[0] for n, said in found.items() if isinstance(n, int) and len(said) == 1}


VERDICTS = {"letter": letters, "numbered": numbered, "json": objects}


def verdicts(annotator, choice, number, cause=""):
    """What a judge said of `number` pairs, from one of the `choices` of its reply: [(preference or None, cause)].

    1: the text shown first, 2: the second; fractions if the choice has log-probabilities of the deciding token, which
    goes for single letters only. The cause says why there is none: "refusal", "cut off", "no verdict"; or the one
    given, if there is no choice at all.
    """
    if choice is None:
        return number * [(None, cause)]
    message = choice["message"]
    reply = message["content"]
    found = VERDICTS[template(annotator.prompt)["verdict"]](reply)
    if not found and number == 1:       # a batch of one may be answered like any single pair
        found = letters(reply)
    cause = ("refusal" if message.get("refusal") or choice.get("finish_reason") == "content_filter"
             or REFUSAL.match(reply) else "cut off" if choice.get("finish_reason") == "length" else "no verdict")
    soft = letter_preference(choice) if number == 1 and found.keys() == {1} else None
    return [(soft or 1 + "ab".index(found[n]), "") if n in found else (None, cause) for n in range(1, number + 1)]


def letter_preference(choice):
    """2 - P(a) at the token that decides between a and b, from the log-probabilities of a choice; None without them.

    The last token that is nothing but the letter counts, with all its dresses (" a", "(A") together.
    """
    for token in reversed((choice.get("logprobs") or {}).get("content") or []):
        if BARE.fullmatch(token["token"]):
            mass = {"a": 0.0, "b": 0.0}
            for top in token.get("top_logprobs") or []:
                if match := BARE.fullmatch(top["token"]):
                    mass[match[1].lower()] += math.exp(top["logprob"])
            return 2 - mass["a"] / sum(mass.values()) if any(mass.values()) else None
    return None


def logprob_preference(logprobs, first="m", second="M"):
    """A preference in [1, 2] from {token: log-probability} of a verdict in one token: 2 - P(first) / P(either).

    AlpacaEval 2's logprob_parser; `first` is the token for the answer shown first. A token that is not among the top
    ones counts as impossible; None if neither is there.
    """
    one, two = (math.exp(logprobs.get(token, -math.inf)) for token in (first, second))
    return 2 - one / (one + two) if one + two else None
