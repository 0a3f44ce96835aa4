"""Data sets as lists of records {instruction, input, output}, in AlpacaFarm's splits.

`barn` is the offline world, `alpaca_farm` the paper's own data from the hub (CC BY-NC 4.0: for research); anything else
is a file of Alpaca records (.json or .jsonl, gzipped or not).
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
            "noisy": "alpaca_noisy_multi_preference.json"}          # the last is the paper's p_sim^ann
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
    """The folder with these files of the data set, downloaded if they are not there yet."""
    return hub.data_files(ALPACA_FARM, files)


def preferences(source):
    """Pairs {instruction, input, output_1, output_2, preference (1 or 2)}: those that AlpacaFarm released under a name
    in RELEASED, or a file of such pairs, or of TRL's (prompt, chosen, rejected; texts, or messages of one turn).

    Ties and pairs of equal answers teach nothing, and are left out."""
    path = alpaca_farm(RELEASED[source]) / RELEASED[source] if source in RELEASED else source
    pairs = []
    for i, record in enumerate(read_records(path, ())):
        if "chosen" in record:
            try:
                record = from_trl(record)
            except ValueError as error:
                raise InputError(f"{path}: row {i}: {error}") from None
        if missing := [key for key in ("instruction", "output_1", "output_2") if not isinstance(record.get(key), str)]:
            raise InputError(f"{path}: row {i} has no text under {', '.join(missing)}")
        if type(record.get("preference")) not in (int, float):
            raise InputError(f"{path}: row {i} has no number under 'preference'")
        pairs.append({"input": "", **record})
    if {pair["preference"] for pair in pairs} == {0, 1}:
        raise InputError(f"{path}: the preferences are 0 and 1; 1 is for output_1, and 2 for output_2")
    kept = [pair for pair in pairs if pair["preference"] in (1, 2) and pair["output_1"] != pair["output_2"]]
    if not kept:
        raise InputError(f"{path}: no pair of different answers with preference 1 or 2")
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are ties or of equal answers, and left out")
    return kept


def from_trl(record):
    """AlpacaFarm's pair of a TRL record; without a prompt, the messages under chosen and rejected begin with it."""
    asked, chosen = turn(record.get("prompt"), record.get("chosen"))
    again, rejected = turn(record.get("prompt"), record.get("rejected"))
    if asked != again:
        raise ValueError("chosen and rejected do not answer the same prompt")
    return {"instruction": asked, "output_1": chosen, "output_2": rejected, "preference": 1}


def turn(prompt, answer):
    """(what the user says, what the assistant says), as texts or as messages; those of the answer may be all."""
    whole = isinstance(answer, list) and len(answer) > 1
    messages = [{"role": role, "content": said} if isinstance(said, str) else said
                for role, given in (("user", None if whole else prompt), ("assistant", answer))
                for said in ([given] if isinstance(given, str) else given or ())]
    try:
        if [message["role"] for message in messages] == ["user", "assistant"]:
            return tuple(message["content"] for message in messages)
    except (TypeError, LookupError):
        pass
    raise ValueError("expected a prompt and an answer, as texts or as messages of one turn, without a system's")
