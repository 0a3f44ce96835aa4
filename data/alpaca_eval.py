"""AlpacaEval's files: model outputs, annotations, leaderboards, and what its length control needs; checked row by row.

Rows are counted from 0, as in the file. Files may be .json or .jsonl, gzipped or not.
"""
import csv
import io
import itertools
import os
import random
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import InputError, from_json, hub, is_number, read_text
from data.sets import question, read_records

HUB, DIFFICULTIES = "tatsu-lab/alpaca_eval", "df_gamed.csv"
BASELINES = "gpt4_1106_preview", "text_davinci_003"     # the references of AlpacaEval 2 and 1


@lru_cache(4096)
def switched_by_default(instruction):
    """What AlpacaEval's seed 0 decides for an instruction. Kept, since the files of all models have the same ones."""
    return draw("is_switched_outputs", instruction + "0", [False, True])


def draw(what, salt, choices, weights=None):
    """AlpacaEval's random_seeded_choice: the text alone decides, the same in every process."""
    return random.Random(what + salt).choices(choices, weights=weights)[0]


def shown_first(record):
    """Whether the judge saw the model's answer first. AlpacaEval's files do not say it, but the instruction decides
    it there (with seed 0)."""
    switched = record.get("is_switched")
    return switched_by_default(question(record)) if switched is None else switched


def shown(text):
    return repr(text if len(text) <= 60 else text[:60] + "...")


def once(path, records, keys=lambda record: ()):
    """InputError if two records have the same instruction and the same `keys`."""
    seen = {}
    for i, record in enumerate(records):
        first = seen.setdefault((question(record), keys(record)), i)
        if first != i:
            raise InputError(f"{path}: rows {first} and {i} have the same instruction, {shown(question(record))}")


def read_outputs(path):
    """A model's answers [{instruction, output, generator, ...}], by one generator (default: the file's name)."""
    records = [{"generator": Path(path).name.partition(".")[0], **record} for record in
               read_records(path, optional=("dataset", "generator"))]
    for i, record in enumerate(records):
        if record["generator"] != records[0]["generator"]:
            raise InputError(f"{path}: row {i} is by {record['generator']!r}, row 0 by {records[0]['generator']!r}: "
                             "one file holds the answers of one model")
    once(path, records)
    return records


def matched(outputs, reference, path="the outputs", reference_path="the reference"):
    """The records of `outputs` in the reference's order; InputError if they do not answer the same instructions."""
    by_question = {question(record): record for record in outputs}
    asked = {question(record) for record in reference}
    for i, record in enumerate(reference):
        if question(record) not in by_question:
            raise InputError(f"{path}: no answer to row {i} of {reference_path}, {shown(question(record))}")
    for i, record in enumerate(outputs):
        if question(record) not in asked:
            raise InputError(f"{path}: row {i} answers {shown(question(record))}, which is not in {reference_path}")
    return [by_question[question(record)] for record in reference]


KINDS = {                                               # key: (what it is, unless null)
    **dict.fromkeys(("preference", "price_per_example", "time_per_example", "preference_price_per_example",
                     "preference_time_per_example"), ("number", is_number)),
    **dict.fromkeys(("dataset", "annotator", "judge", "pool", "effort", "generator_1", "generator_2"),
                    ("text", lambda x: isinstance(x, str))),
    "is_switched": ("true or false", lambda x: isinstance(x, bool)),
    "preference_by_order": ("two numbers", lambda x: isinstance(x, list) and len(x) == 2
                            and all(each is None or is_number(each) for each in x))}


def check(path, records):
    """InputError, which names the first row, if a preference is missing or a value is of the wrong kind."""
    for i, record in enumerate(records):
        for key in record.keys() & KINDS.keys() | {"preference"}:
            kind, fits = KINDS[key]
            value = record.get(key, "missing" if key == "preference" else None)
            if value is not None and not fits(value):
                raise InputError(f"{path}: row {i} has no {kind} or null under {key!r}, but {value!r:.60}")


TEXTS = ("instruction", "output_1", "output_2")
OPTIONAL = ("dataset", "generator", "generator_1", "generator_2", "seed")      # texts, where a pair has them


def read_pairs(path, reference="", samples="all"):
    """Pairs {instruction, output_1, output_2, ...} to be annotated, from any of

    AlpacaFarm's pairs; AlpacaEval's outputs, whose output_1 are then those of `reference`; several outputs to one
    instruction, {instruction, output: [text, ...]} or a row for each: `couples` says which are compared.
    """
    if reference:
        outputs, theirs = read_outputs(path), read_outputs(reference)
        return paired(matched(outputs, theirs, path, reference), theirs)
    pairs, groups = [], {}
    for i, record in enumerate(read_records(path, ("instruction",), OPTIONAL)):
        if isinstance(record.get("output_1"), str) and isinstance(record.get("output_2"), str):
            pairs.append(record)
        else:
            groups.setdefault(question(record), []).append((i, record))
    return pairs + [pair for rows in groups.values() for pair in sampled(path, rows, samples)]


def sampled(path, rows, samples):
    """Pairs of all outputs to one instruction, in `rows` [(number in the file, record)]."""
    outputs = []
    for i, record in rows:
        texts = record["output"] if isinstance(record.get("output"), list) else [record.get("output")]
        if len(rows) == 1 and len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: row {i} has no two outputs, neither output_1 and output_2 nor a list under "
                             "'output' nor rows with the same instruction (for outputs of one model give the others, "
                             "too: --reference REF.json)")
        outputs += [(text, record.get("generator")) for text in texts]
    kept = {key: value for key, value in rows[0][1].items() if key not in ("output", "generator")}
    if len(outputs) < 2:                                # of several rows with empty lists
        raise InputError(f"{path}: row {rows[0][0]} has fewer than two outputs, even with the rows like it")
    pairs = []
    for j, (one, two) in enumerate(couples(len(outputs), samples, question(kept))):
        pairs.append({**kept, **({"seed": f"/{j}"} if j else {}), "output_1": outputs[one][0],
                      "output_2": outputs[two][0]})
        if outputs[one][1] and outputs[two][1]:
            pairs[-1] |= {"generator_1": outputs[one][1], "generator_2": outputs[two][1]}
    return pairs


def couples(n, samples, salt):
    """Which of n outputs are compared, [(i, j), ...]: "all" pairs of them, or a "derangement".

    In a derangement each is output_1 once and output_2 once, of n pairs, as in AlpacaFarm's annotate_samples, which
    then keeps one pair for each instruction. It is drawn by `salt`, the same in every run.
    """
    if samples == "all":
        return list(itertools.combinations(range(n), 2))
    circle = random.Random("samples" + salt).sample(range(n), n)
    return sorted(zip(circle, circle[1:] + circle[:1]))


def paired(outputs, reference):
    """Records of a model and of the reference, in one order, as pairs: the reference's answer is output_1."""
    return [{**{key: theirs[key] for key in ("instruction", "input", "dataset") if key in theirs},
             "output_1": theirs["output"], "generator_1": theirs["generator"],
             "output_2": ours["output"], "generator_2": ours["generator"]} for ours, theirs in zip(outputs, reference)]


def read_labels(path):
    """Labels of pairs: records {instruction, output_1, output_2, preference}; a pair may come several times."""
    records = read_records(path, TEXTS)
    check(path, records)
    return records


def pair_of(record):
    return question(record), record["output_1"], record["output_2"]


def labels_of(records, pairs=None):
    """({pair: its first record}, labels (N, K)): K labels of each of N pairs, NaN where a pair has fewer.

    With `pairs` given, of these pairs in this order, whatever else there is."""
    first, labels = {}, {}
    for record in records:
        first.setdefault(pair_of(record), record)
        labels.setdefault(pair_of(record), []).append(record["preference"])
    rows = [np.array(labels.get(key, []), dtype=float) for key in pairs or first]               # None becomes NaN
    longest = max(1, max(map(len, rows)))
    return first, np.array([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows])


def read_judges(paths):
    """{name: labels} of the judges in files: labels of one name belong together, wherever they stand.

    A label's judge is what annotate.py writes under judge, pool and effort. Without these it is the annotator, if the
    file has only one; all that is left is of one judge, named after the first file of its labels.
    """
    judges = {}
    for path in dict.fromkeys(paths):
        records = read_labels(path)
        annotators = {record.get("annotator") for record in records}
        alone = annotators.pop() if len(annotators) == 1 else None
        for record in records:
            said = (record.get(key) for key in ("judge", "pool", "effort"))
            name = " ".join(dict.fromkeys(filter(None, said))) if record.get("judge") else alone
            judges.setdefault(name, []).append((path, record))
    return {name or Path(labels[0][0]).stem: [record for _, record in labels] for name, labels in judges.items()}


def read_annotations(paths, any_reference=False):
    """({name: records}, {name: path}) of all models that were judged, from files, or from folders that have an
    annotations.json in them or below.

    A model is a generator_2 with its generator_1. Its name is that of generator_2; where this is not unique, the
    reference or the part of the path that differs is added. A reference must have given the same answer to an
    instruction in all files (unless `any_reference`), as win rates over different answers cannot be compared.
    """
    files = {}
    for path in map(Path, paths):
        found = sorted(path.glob("**/annotations.json")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: no annotations.json in this folder")
        files |= {each.resolve(): each for each in found}       # named twice, read once
    models, references = {}, {}
    for whole, path in files.items():
        records = read_records(path, (*TEXTS, "generator_1", "generator_2"))
        once(path, records, lambda record: (record["generator_1"], record["generator_2"]))
        check(path, records)
        for i, record in enumerate(records):
            models.setdefault((record["generator_2"], record["generator_1"], whole), []).append(record)
            key = record["generator_1"], question(record)
            text, where = references.setdefault(key, (record["output_1"], f"row {i} of {path}"))
            if text != record["output_1"] and not any_reference:
                raise InputError(f"{path}: row {i} was judged against another answer of {key[0]!r} than {where}: such "
                                 "win rates do not compare (--any_reference prints them all the same)")
    names = names_of(models)
    return {names[key]: records for key, records in models.items()}, {names[key]: key[2] for key in models}


def check_against(models, reference, path):
    """InputError unless annotations are of the reference's instructions, and were judged against its answers."""
    theirs = {question(record): record["output"] for record in reference}
    for name, records in models.items():
        for i, record in enumerate(records):
            if theirs.get(question(record)) != record["output_1"]:
                how = "was judged against another answer" if question(record) in theirs else "asks something else"
                raise InputError(f"annotations of {name!r}: row {i} {how} than {path} (--any_reference: never mind)")


def names_of(models):
    """{(model, reference, path): a short name that no other has}."""
    several = len({reference for _, reference, _ in models}) > 1
    names = {}
    for model, reference, path in models:
        name = f"{model} vs {reference}" if several else model
        alike = [key[2] for key in models if key[:2] == (model, reference)]
        names[model, reference, path] = name if len(alike) == 1 else f"{name} ({different_parts(alike)[path]})"
    return names


def different_parts(paths):
    """{path: the part of it that differs}: of runs/a/dpo/x.json and runs/b/dpo/x.json these are a and b."""
    parts = [path.parts for path in paths]
    start = len(os.path.commonprefix(parts))
    rest = [each[start:] for each in parts]
    end = len(os.path.commonprefix([each[::-1] for each in rest]))
    return {path: "/".join(each[:len(each) - end]) or "." for path, each in zip(paths, rest)}


def read_column(path):
    """{name: number} of a leaderboard CSV: FILE.csv (its column win_rate) or FILE.csv:COLUMN; names come first."""
    path, found, column = str(path).partition(".csv:")
    path, column = (path + ".csv", column) if found else (path, "win_rate")
    text = read_text(path)
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except (ValueError, csv.Error):
        raise InputError(f"{path}: not a CSV file with a header") from None
    if column not in header[1:]:
        raise InputError(f"{path}: no column {column!r} among {header!r:.200}")
    numbers = {}
    for i, row in enumerate(rows):
        cell = (row + [""] * len(header))[header.index(column)]
        try:
            if cell.strip():
                numbers[row[0]] = float(cell)
            bad = not np.isfinite(numbers.get(row[0], 0))
        except ValueError:
            bad = True
        if bad:
            raise InputError(f"{path}: row {i}, {row[0]!r}, has no number under {column!r}, but {cell!r}")
        if [other[0] for other in rows].count(row[0]) > 1:
            raise InputError(f"{path}: row {i} is not the only one named {row[0]!r}")
    return numbers


def read_length_control(path):
    """(difficulty (805,), (X (3, G), y (G,))) for stats.length.length_controlled, from AlpacaEval.

    path: its df_gamed.csv; "alpaca_eval", for that file from the hub; or JSON {"instruction_difficulty": [805],
    "gamed": [{"std_delta_len": [805], "preference": [805] in [0, 1]}, ...]}. All follow the order of the instructions
    in AlpacaEval's reference file.
    """
    path = hub.data_files(HUB, [DIFFICULTIES]) / DIFFICULTIES if path == "alpaca_eval" else path
    text = read_text(path)
    try:
        if ".csv" in Path(path).suffixes:
            rows = list(csv.DictReader(io.StringIO(text)))
            index, hard, gap, y = (np.array([float(row[name]) for row in rows]) for name in (
                "index", "instruction_difficulty", "std_delta_len", "preference"))
            difficulty = hard[[list(index).index(i) for i in range(len(set(index)))]]
        else:
            document = from_json(path, text)
            difficulty = np.array(document["instruction_difficulty"], dtype=float)
            gap, y = (np.concatenate([model[key] for model in document["gamed"] for key in model
                                      if key.startswith(name)]).astype(float)
                      for name in ("std_delta_len", "preference"))
            hard = np.tile(difficulty, len(document["gamed"]))
        features = np.stack([np.tanh(gap), hard, 0 * gap])
        if not np.isfinite(features).all() or not ((y >= 0) & (y <= 1)).all() or len(y) != len(gap):
            raise ValueError("numbers are missing or out of range")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not AlpacaEval's difficulties and gamed baseline ({type(error).__name__}: {error})"
                         ) from None
    return difficulty, (features, y)
