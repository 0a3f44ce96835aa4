"""Data sets as lists of records {instruction, input, output}, in AlpacaFarm's splits.

There are three sources: `barn` is the offline world; `alpaca_farm` is the paper's own data from the hub (licence
CC BY-NC 4.0: no commercial use); any other name is a file (.json or .jsonl, gzipped or not). A file has Alpaca
records, or pairs in the form of TRL, UltraFeedback or HH-RLHF, whose preferred answers become the outputs.

    python -m data.sets --export pairs.jsonl runs/barn

writes the pairs of a run for TRL.
"""
import itertools
import json
import random
import re
from functools import lru_cache
from pathlib import Path

from data import HALF, ROWS, InputError, check_value, decode, hub, read_text, run, writable
from data.barn import world
from data.files import write_whole
from data.flags import Parser, location
from data.progress import say_once

SPACE = re.compile(r"\s*")
ALPACA_FARM = "tatsu-lab/alpaca_farm"
SPLITS = {**{split: f"alpaca_instructions/{split}.json" for split in ("sft", "preference", "unlabeled", "val")},
          "eval": "alpaca_farm_evaluation.json"}
RELEASED = {"human": "alpaca_human_preference.json", "gpt4": "alpaca_gpt4_preference.json",
            "noisy": "alpaca_noisy_multi_preference.json"}          # noisy: the paper's p_sim^ann
SHARES = {"sft": 10, "preference": 10, "unlabeled": 20, "val": 2}     # AlpacaFarm's 10k, 10k, 20k, 2k


def read_records(path, texts=("instruction", "output"), optional=()):
    """The records (dicts) of a .json file, which holds a list of them, or of a .jsonl file; either may end in .gz.

    A record must have a string under each of the keys `texts`, and under those of the keys `optional` that it has; of
    these, a null is left out, and a null as its input becomes "". InputError if the file cannot be read, or for the
    first record that is unusable.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise InputError(f"{path}: Parquet cannot be read without another package; convert it to JSON lines, as in "
                         f"pandas.read_parquet({path.name!r}).to_json('rows.jsonl', orient='records', lines=True)")
    text = read_text(path)
    try:
        records = read_lines(text) if ".jsonl" in path.suffixes else decode(text, rows=True)
    except (ValueError, RecursionError) as error:
        where = "" if ".jsonl" in path.suffixes else failing_row(text)
        raise InputError(f"{path}: {where}not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a list of records")
    halves = HALF.search(text)
    for i, record in enumerate(records):
        try:
            check_value(record, halves)
        except ValueError as error:
            raise InputError(f"{path}: row {i} cannot be used: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}: row {i} is no record, but {record!r:.60}")
        if record.get("input", "") is None:
            record["input"] = ""
        for key in optional:
            if record.get(key, "") is None:
                del record[key]
        require(path, i, record, (*texts, *({"input", *optional} & record.keys())))
    return records


def require(path, i, record, texts):
    """InputError unless row i of a file has a string under each of the keys `texts`."""
    for key in texts:
        if not isinstance(record.get(key), str):
            instead = f", but {record[key]!r:.60}" if key in record else ""
            raise InputError(f"{path}: row {i} has no text under {key!r}{instead}")


def failing_row(text):
    """Which row of a JSON list cannot be read, as the beginning of a sentence; "" for what is no list."""
    at = SPACE.match(text).end()
    if not text.startswith("[", at):
        return ""
    for row in itertools.count():
        try:
            _, at = ROWS.raw_decode(text, SPACE.match(text, at + 1).end())
        except (ValueError, RecursionError):
            return f"row {row}: "
        at = SPACE.match(text, at).end()
        if not text.startswith(",", at):
            return f"row {row}: "


def read_lines(text):
    """The JSON values of a .jsonl file, one in a line; empty lines are skipped. ValueError names a bad line."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                records.append(decode(line, rows=True))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
    return records


def demonstrations(path):
    """Records {instruction, input, output} of a file. Of pairs, the preferred answers are the outputs."""
    records, several = [], 0
    for i, record in enumerate(read_records(path, ())):
        if "chosen" in record:
            pair = pair_of(path, i, record)
            several += pair is None
            records += [{"instruction": pair["instruction"], "output": pair["output_1"]}] if pair else []
        else:
            require(path, i, record, ("instruction", "output"))
            records.append(record)
    say_several(path, several, several + len(records))
    return [{"input": "", **record} for record in records]


def question(record):
    """An instruction with its input, as one text. It identifies the instruction, and it is what a judge is shown."""
    return record["instruction"] + ("\n\n" + record["input"] if record.get("input") else "")


def load(data="barn", eval_data="", limit=0):
    """{split: records} for the splits sft, preference, unlabeled, val and eval; the same in every run.

    data: barn, alpaca_farm, or a file, which is shuffled with a fixed seed and divided by SHARES. The outputs of `eval`
    are the reference answers of the win rate; eval_data is a file in AlpacaEval's format to use for this split instead,
    or, with barn, demo: its second evaluation (data.barn.world.demo).
    limit: how many records of each split to keep; 0 keeps all. InputError if a file is unusable or a split is empty.
    """
    if eval_data == "demo" and data != "barn":
        raise InputError(f"--eval_data demo is about the offline world, and --data {data} is not: give a file")
    if data == "barn":
        splits = dict(world.splits())
    elif data == "alpaca_farm":
        folder = alpaca_farm(*SPLITS.values())
        splits = {split: [{"input": "", **record} for record in read_records(folder / file)]
                  for split, file in SPLITS.items()}
    else:
        records = demonstrations(data)
        random.Random("splits").shuffle(records)
        shares = SHARES if eval_data else {**SHARES, "eval": 2}
        splits, start = {}, 0
        for split, share in shares.items():
            size = len(records) * share // sum(shares.values())
            splits[split], start = records[start:start + size], start + size
    splits["sft"] = [record for record in splits["sft"] if record["output"].strip()]
    if eval_data == "demo":
        splits["eval"] = world.demo()
    elif eval_data:
        splits["eval"] = read_records(eval_data, optional=("dataset", "generator"))
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

    source: a name in RELEASED, for pairs that AlpacaFarm released; or a file of such pairs, or of records {chosen,
    rejected} of TRL, UltraFeedback or HH-RLHF, see pair_of(). Pairs without a preference or with two equal answers
    cannot be learned from: they are left out, and so are conversations of several turns. How many is printed.
    InputError for an unusable record, or if no pair is left.
    """
    path = alpaca_farm(RELEASED[source]) / RELEASED[source] if source in RELEASED else source
    pairs, several = [], 0
    for i, record in enumerate(read_records(path, ())):
        if "chosen" in record and (record := pair_of(path, i, record)) is None:
            several += 1
            continue
        require(path, i, record, ("instruction", "output_1", "output_2"))
        if type(record.get("preference", "")) not in (int, float, type(None)):
            raise InputError(f"{path}: row {i} has no number under 'preference'")
        pairs.append({"input": "", **record})
    say_several(path, several, several + len(pairs))
    if {pair["preference"] for pair in pairs} == {0, 1}:
        raise InputError(f"{path}: the preferences are 0 and 1, but should be 1 for output_1 and 2 for output_2")
    kept = [pair for pair in pairs if pair["preference"] in (1, 2) and pair["output_1"] != pair["output_2"]]
    if not kept:
        raise InputError(f"{path}: no pair of different answers with preference 1 or 2")
    if len(kept) < len(pairs):
        say_once(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are ties or have two equal answers, and are left out")
    return kept


# ---- other people's pairs ------------------------------------------------------------------------------

SCORES = ("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")       # in UltraFeedback's files
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def say_several(path, several, total):
    if several:
        say_once(f"{several} of {total} rows of {Path(path).name} are of several turns: left out")


def pair_of(path, i, record):
    """AlpacaFarm's pair for row i of a file with {chosen, rejected}; None for a conversation of several turns.

    TRL: with a prompt; each value is a text or a list of messages {role, content}. Without a prompt, the messages under
    chosen and rejected begin with it. UltraFeedback: such messages beside the prompt, and scores, which may be equal.
    HH-RLHF: texts like "\n\nHuman: ...\n\nAssistant: ...". InputError for anything else.
    """
    try:
        chosen, rejected = (read_turn(record.get("prompt"), record.get(name)) for name in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            return None
        if chosen[0] != rejected[0]:
            raise ValueError("chosen and rejected do not answer the same prompt")
    except ValueError as error:
        raise InputError(f"{path}: row {i}: {error}") from None
    tie = any(one in record and record[one] == record.get(two) for one, two in SCORES)
    return {"instruction": chosen[0], "output_1": chosen[1], "output_2": rejected[1], "preference": 1.5 if tie else 1}


def read_turn(prompt, answer):
    """(the user's text, the assistant's text), or None if there are more turns or a system message.

    prompt and answer are texts or lists of messages. If the answer has several messages, the first ones are the prompt.
    ValueError if it is no conversation that ends with an answer.
    """
    if prompt is None and isinstance(answer, str):
        answer = hh_messages(answer)
    if isinstance(answer, list) and len(answer) > 1:
        messages = as_messages("assistant", answer)
    else:
        messages = [*as_messages("user", prompt), *as_messages("assistant", answer)]
    try:
        said = [(message["role"], message["content"]) for message in messages]
    except (TypeError, LookupError):
        said = []
    roles = [role for role, content in said if isinstance(content, str)]
    if len(roles) < max(2, len(said)) or roles[-1] != "assistant":
        raise ValueError("expected a prompt and an answer, as texts or as messages that end with the assistant's")
    return (said[0][1], said[1][1]) if roles == ["user", "assistant"] else None


def as_messages(role, given):
    """The messages {role, content} for a text, or for a list of texts or messages; [] for None."""
    listed = [given] if isinstance(given, str) else given if isinstance(given, list) else ()
    return [{"role": role, "content": each} if isinstance(each, str) else each for each in listed]


def hh_messages(text):
    """The messages of a conversation in HH-RLHF's form; the text itself if it is not in this form."""
    before, *turns = HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2])]
    return text if before.strip() or not turns else messages


# ---- where records are written -------------------------------------------------------------------------

def check_target(path, keys, sources=(), flag="--out"):
    """InputError unless records that have these keys may be written to the file `path`: if there is one, it must hold
    such records itself, and must not be one of the files that are read."""
    if path.is_dir() or path.is_symlink() and not path.exists():
        what = "folder" if path.is_dir() else "link that leads nowhere"
        raise InputError(f"{path} is a {what}: choose another {flag}")
    writable(path.parent)
    if path.resolve() in [Path(source).resolve() for source in sources]:
        raise InputError(f"{path} is read, and would be overwritten: choose another {flag}")
    if path.exists() and path.stat().st_size:
        try:
            ours = all(record.keys() >= set(keys) for record in read_records(path, ()))
        except InputError:
            ours = False
        if not ours:
            raise InputError(f"{path} is there, and would be overwritten by other things: choose another {flag}")


# ---- pairs for others ----------------------------------------------------------------------------------

def pairs_file(folder):
    """The pairs.json of a run folder, or of the stage in it that made pairs. InputError if there is not one."""
    found = [folder / "pairs.json"] if (folder / "pairs.json").exists() else sorted(folder.glob("[!.]*/pairs.json"))
    if not found:
        raise InputError(f"{folder} has no pairs: give a run folder in which farm.py has made some, as in runs/barn")
    if len(found) > 1:
        raise InputError(f"{folder} has several stages with pairs: choose one, as in {found[0].parent}")
    return found[0]


def to_trl(pair):
    """TRL's record for a pair: messages under prompt, chosen and rejected."""
    answers = [[{"role": "assistant", "content": pair[f"output_{i}"]}] for i in (1, 2)]
    chosen, rejected = answers if pair["preference"] < 1.5 else answers[::-1]
    return {"prompt": [{"role": "user", "content": question(pair)}], "chosen": chosen, "rejected": rejected}


def main(argv):
    parser = Parser("data.sets", __doc__)
    parser.add_argument("run", type=location, help="a run folder, or a stage in it that made pairs")
    parser.add_argument("--export", type=location, required=True, metavar="FILE.jsonl",
                        help="write the run's pairs as TRL reads them: prompt, chosen, rejected, each as messages")
    args = parser.parse(argv)
    check_target(args.export, ("prompt", "chosen", "rejected"), flag="--export")
    pairs = read_records(pairs_file(args.run), ("instruction", "output_1", "output_2"))
    write_whole(args.export, [json.dumps(to_trl(pair)).encode() + b"\n" for pair in pairs])
    print(f"{len(pairs)} pairs are in {args.export}")


if __name__ == "__main__":
    run(main, "data.sets", "nothing is lost")
