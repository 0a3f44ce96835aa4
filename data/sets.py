"""Data sets as lists of records {instruction, input, output}, in AlpacaFarm's splits.

`barn` is the offline world; anything else is a file of Alpaca records (.json or .jsonl, gzipped or not).
"""
import gzip
import json
import random
import re
import zlib
from pathlib import Path

from data import InputError
from data.barn import world

SURROGATE = re.compile("[\ud800-\udfff]")
SHARES = {"sft": 10, "preference": 10, "unlabeled": 20, "val": 2}     # AlpacaFarm's 10k, 10k, 20k, 2k


def read_records(path, texts=("instruction", "output")):
    """The records of a .json (a list) or .jsonl file, .gz or not; InputError names the first one that is unusable.

    A record is an object with a string under each of the keys `texts`, and under "input" if it has one.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            if ".jsonl" in path.suffixes:
                records = []
                for number, line in enumerate(file, 1):
                    try:
                        records += [json.loads(line)] if line.strip() else []
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from None
            else:
                records = json.load(file)
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


def load(data="barn", eval_data="", limit=0):
    """{split: records} for sft, preference, unlabeled, val, eval; the same in every run.

    The outputs of `eval` are the reference answers: those of the file `eval_data` (AlpacaEval's format) if it is given,
    else the data's own. `limit` keeps the first so many records of each split (0: all).
    """
    if data == "barn":
        splits = dict(world.splits())
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
