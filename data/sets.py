"""Data sets as lists of records {instruction, input, output}, in AlpacaFarm's splits.

There are three sources: `barn` is the offline world; `alpaca_farm` is the paper's own data from the hub (licence
CC BY-NC 4.0: no commercial use); any other name is a file of Alpaca records (.json or .jsonl, gzipped or not).
"""
import gzip
import json
import random
import re
import zlib
from functools import lru_cache
from pathlib import Path

from data import InputError, hub
from data.barn import world

SURROGATE = re.compile("[\ud800-\udfff]")
ALPACA_FARM = "tatsu-lab/alpaca_farm"
SPLITS = {**{split: f"alpaca_instructions/{split}.json" for split in ("sft", "preference", "unlabeled", "val")},
          "eval": "alpaca_farm_evaluation.json"}
RELEASED = {"human": "alpaca_human_preference.json", "gpt4": "alpaca_gpt4_preference.json",
            "noisy": "alpaca_noisy_multi_preference.json"}          # noisy: the paper's p_sim^ann
SHARES = {"sft": 10, "preference": 10, "unlabeled": 20, "val": 2}     # AlpacaFarm's 10k, 10k, 20k, 2k


def read_records(path, texts=("instruction", "output")):
    """The records (dicts) of a .json file, which holds a list of them, or of a .jsonl file; either may end in .gz.

    A record must have a string under each of the keys `texts`, and under "input" if it has that key. InputError if the
    file cannot be read, or for the first record that is unusable.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            records = read_lines(file) if ".jsonl" in path.suffixes else json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a list of records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}: row {i} is no record, but {record!r:.60}")
        for key in (*texts, "input"):
            if not isinstance(record.get(key, "" if key == "input" else None), str):
                raise InputError(f"{path}: row {i} has no text under {key!r}")
        for key, value in record.items():
            if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
                raise InputError(f"{path}: row {i} has half a surrogate pair under {key!r}, which is no text")
    return records


def read_lines(file):
    """The JSON values of an open .jsonl file, one in a line; empty lines are skipped. ValueError names a bad line."""
    records = []
    for number, line in enumerate(file, 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return records


def load(data="barn", eval_data="", limit=0):
    """{split: records} for the splits sft, preference, unlabeled, val and eval; the same in every run.

    data: barn, alpaca_farm, or a file, which is shuffled with a fixed seed and divided by SHARES. The outputs of `eval`
    are the reference answers of the win rate; eval_data is a file in AlpacaEval's format to use for this split instead.
    limit: how many records of each split to keep; 0 keeps all. InputError if a file is unusable or a split is empty.
    """
    if data == "barn":
        splits = dict(world.splits())
    elif data == "alpaca_farm":
        folder = alpaca_farm(*SPLITS.values())
        splits = {split: [{"input": "", **record} for record in read_records(folder / file)]
                  for split, file in SPLITS.items()}
    else:
        records = [{"input": "", **record} for record in read_records(data)]
        random.Random("splits").shuffle(records)
        shares = SHARES if eval_data else {**SHARES, "eval": 2}
        splits, start = {}, 0
        for split, share in shares.items():
            size = len(records) * share // sum(shares.values())
            splits[split], start = records[start:start + size], start + size
    splits["sft"] = [record for record in splits["sft"] if record["output"].strip()]
    if eval_data:
        splits["eval"] = read_records(eval_data)
    splits["eval"] = [{"input": "", "generator": "reference", **record} for record in splits["eval"]]
    if empty := [split for split, records in splits.items() if not records]:
        raise InputError(f"{data}: too few records, nothing is left for {', '.join(empty)}")
    return {split: records[:limit or None] for split, records in splits.items()}


@lru_cache(None)
def alpaca_farm(*files):
    """The folder with these files of AlpacaFarm's data set; files that are not in the cache are downloaded."""
    return hub.data_files(ALPACA_FARM, files)


def preferences(source):
    """Preference pairs: [{instruction, input, output_1, output_2, preference}]; preference is 1 or 2.

    source: a name in RELEASED, for pairs that AlpacaFarm released; or a file of such pairs, or of TRL's records
    {prompt, chosen, rejected}. Pairs without a preference or with two equal answers cannot be learned from: they are
    left out, and their number is printed. InputError for an unusable record, or if no pair is left.
    """
    path = alpaca_farm(RELEASED[source]) / RELEASED[source] if source in RELEASED else source
    pairs = []
    for i, record in enumerate(read_records(path, ())):
        if "chosen" in record:
            try:
                record = from_trl(record)
            except ValueError as error:
                raise InputError(f"{path}: row {i}: {error}") from None
        texts = ("instruction", "output_1", "output_2")
        if missing := [key for key in texts if not isinstance(record.get(key), str)]:
            raise InputError(f"{path}: row {i} has no text under {', '.join(missing)}")
        if type(record.get("preference")) not in (int, float):
            raise InputError(f"{path}: row {i} has no number under 'preference'")
        pairs.append({"input": "", **record})
    if {pair["preference"] for pair in pairs} == {0, 1}:
        raise InputError(f"{path}: the preferences are 0 and 1, but should be 1 for output_1 and 2 for output_2")
    kept = [pair for pair in pairs if pair["preference"] in (1, 2) and pair["output_1"] != pair["output_2"]]
    if not kept:
        raise InputError(f"{path}: no pair of different answers with preference 1 or 2")
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are ties or have two equal answers, and are left out")
    return kept


def from_trl(record):
    """AlpacaFarm's pair for a TRL record {prompt, chosen, rejected}; ValueError if it is no conversation of one turn.

    Each value is a text or a list of messages {role, content}. Without a prompt, the messages under chosen and rejected
    begin with it.
    """
    instruction, chosen = read_turn(record.get("prompt"), record.get("chosen"))
    other_instruction, rejected = read_turn(record.get("prompt"), record.get("rejected"))
    if instruction != other_instruction:
        raise ValueError("chosen and rejected do not answer the same prompt")
    return {"instruction": instruction, "output_1": chosen, "output_2": rejected, "preference": 1}


def read_turn(prompt, answer):
    """(the user's text, the assistant's text). prompt and answer are texts or lists of messages. If the answer has
    several messages, the first one is the prompt. ValueError unless there is one message of each."""
    if isinstance(answer, list) and len(answer) > 1:
        messages = as_messages("assistant", answer)
    else:
        messages = [*as_messages("user", prompt), *as_messages("assistant", answer)]
    try:
        if [message["role"] for message in messages] == ["user", "assistant"]:
            return tuple(message["content"] for message in messages)
    except (TypeError, LookupError):
        pass
    raise ValueError("expected a prompt and an answer, as texts or as messages of one turn, without a system message")


def as_messages(role, given):
    """The messages {role, content} for a text, or for a list of texts or messages; none for None."""
    listed = [given] if isinstance(given, str) else given or ()
    return [{"role": role, "content": each} if isinstance(each, str) else each for each in listed]
