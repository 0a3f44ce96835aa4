"""A pool of the user's own: annotators in a file, each with its prompt, checked before anybody is asked.

    [{"name": "strict", "model": "gpt-4.1-mini", "prompt": "strict.json", "batch": 5, "max_tokens": 60},
     {"name": "quick", "model": "gpt-4.1-nano", "prompt": "pairwise", "temperature": 1.0}]

A prompt is the name of one in data/judges/, or a file of that form, found from the folder of the pool's file. What is
left out is as in Annotator; a model may be left out if --judge names one.
"""
import difflib
import json
from pathlib import Path

from data import InputError, check_kinds, from_json, is_number, read_text
from data.judges.prompts import FORMS, HERE, Annotator, joined, template
from data.sets import read_records


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_lines(value):
    return is_text(joined(value) if isinstance(value, list) and all(isinstance(line, str) for line in value) else value)


def is_count(value):
    return type(value) is int and value > 0


# {key: (what it must be, does a value fit?)} of an annotator, a prompt and a message
ANNOTATOR = {"name": ("a text", is_text), "model": ("a text", is_text),
             "prompt": ("the name of a prompt", lambda value: is_text(value) and "\0" not in value),
             "batch": ("a number of pairs from 1", is_count), "max_tokens": ("a number of tokens from 1", is_count),
             "temperature": ("a number from 0 to 2", lambda value: is_number(value) and 0 <= value <= 2)}
PROMPT = {"messages": ("a list of messages", lambda value: isinstance(value, list) and value),
          "pair": ("a text or a list of lines", is_lines),
          "verdict": (f"one of {', '.join(FORMS)}", lambda value: is_text(value) and value in FORMS)}
MESSAGE = {"role": ("system, user or assistant", lambda value: value in ("system", "user", "assistant")),
           "content": ("a text or a list of lines", is_lines)}


def check(where, document, keys, needed):
    """InputError unless a document has the keys `needed`, and only keys among `keys`, with values that fit."""
    if not isinstance(document, dict):
        raise InputError(f"{where} is no object, but {document!r:.60}")
    for key in document:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1) or keys
            raise InputError(f"{where} has an unknown key {key!r:.40}: did you mean {' or '.join(near)}?")
    check_kinds(where, document, keys)
    for key in needed:
        if key not in document:
            raise InputError(f"{where} has no {key!r}{' (--judge MODEL names one for all)' if key == 'model' else ''}")


def read_pool(path, model=""):
    """The annotators in a file; `model` is for those that name none. InputError says the first mistake."""
    annotators = {}
    for i, row in enumerate(read_records(path, ("name",))):
        where, row = f"{path}: row {i} ({row['name']:.40})", {**({"model": model} if model else {}), **row}
        check(where, row, ANNOTATOR, ("model",))
        if row["name"] in annotators:
            raise InputError(f"{where} is not the only one of this name")
        prompt = find_prompt(where, row.pop("prompt", Annotator.prompt), Path(path).parent)
        annotators[row["name"]] = one = Annotator(prompt=prompt, pool=str(path), **row)
        if one.batch > 1 and "{n}" not in template(prompt)["pair"]:
            raise InputError(f"{where}: a batch of {one.batch} pairs needs the place {{n}} in the prompt's 'pair'")
        if one.batch > 1 and template(prompt)["verdict"] == "letter":
            raise InputError(f"{where}: a batch of {one.batch} pairs needs another 'verdict' than one letter")
    return list(annotators.values())


def find_prompt(where, prompt, folder):
    """The prompt of this name in data/judges/, or the path of the user's file, which is checked."""
    shipped = [path.stem for path in sorted(HERE.glob("*.json")) if "verdict" in json.loads(path.read_text())]
    if prompt in shipped:
        return prompt
    path = (folder / prompt).resolve()
    if not path.is_file() or path.suffix != ".json":
        raise InputError(f"{where}: there is no prompt {prompt!r}, neither a .json file in {folder} nor one of "
                         f"{', '.join(shipped)}")
    document = from_json(path, read_text(path))
    check(path, document, PROMPT, PROMPT)
    for n, message in enumerate(document["messages"]):
        check(f"{path}: message {n}", message, MESSAGE, MESSAGE)
    *before, last = [joined(message["content"]) for message in document["messages"]]
    if last.count("{pairs}") != 1 or any("{pairs}" in content for content in before):
        raise InputError(f"{path}: the last message must have the place {{pairs}}, once, and no other may have it")
    for place in ("{instruction}", "{output_1}", "{output_2}", "{fence}"):      # the fence: where a text ends
        if place not in joined(document["pair"]):
            raise InputError(f"{path}: 'pair' must have the place {place}")
    return str(path)
