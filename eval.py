"""Evaluation: win rates with honest errors from AlpacaEval's files, models ranked and compared, judges examined.

    python eval.py runs/barn                            leaderboard of annotations: files, or folders that hold them
    python eval.py A.json B.json --baseline A           and every model compared with A on the same prompts
    python eval.py --outputs OUT.json --reference REF.json --judge MODEL        have answers judged first
    python eval.py --judge_report LABELS.json --human HUMAN.json                how far to trust a judge
    python eval.py --rankings SIMULATED.csv HUMAN.csv   do two leaderboards agree? (FILE.csv:COLUMN for another column)
    python eval.py --attack --judge MODEL               what the judge gives to answers that say nothing

Everything is computed from files, in numpy, without torch. As a library: `report`, and the parts in stats/.
"""
import argparse
import csv
import json
import re
from pathlib import Path

import numpy as np

from annotate import POOLS, annotate, connect, draw, pool, price_of
from data import InputError, run, sets, underscored
from data.alpaca_eval import (matched, paired, question, read_annotations, read_column, read_judges, read_labels,
                              read_length_control, read_outputs)
from data.attacks import ATTACKS
from stats.agreement import judge_report
from stats.length import HARDLY_ANY, length_controlled
from stats.ranking import CORRELATIONS, agreement_of_rankings, bradley_terry, ratings, wins
from stats.tables import best_first, between, details, number, table, write
from stats.tables import judges as judges_table
from stats.winrate import (compare, left_out, position_flips, position_gap, rate_interval, resample, resampled_means,
                           usable, win_rate)

# ---- judging -------------------------------------------------------------------------------------------

def evaluate(outputs, reference, annotators, judge, seed=0, both_orders=False):
    """Judge a model's outputs against the reference's -> AlpacaEval's annotations, in the reference's order.

    Both are lists of {instruction, output, generator, optional input and dataset} that answer the same instructions;
    InputError names the first that does not.
    """
    return annotate(paired(matched(outputs, reference), reference), annotators, judge, seed, both_orders=both_orders)


# ---- annotations -> numbers ----------------------------------------------------------------------------

class Prompts:
    """The annotations of M models, brought to the same N instructions in one order: arrays (M, N).

    `asked` gives the instructions and their order; by default they are those of all models, as they come. preferences,
    lengths and reference_lengths are NaN where a model has no annotation, which `there` says too.
    """

    def __init__(self, models, asked=()):
        keys = {question(record): None for records in [asked, *models.values()] for record in records}
        self.place = {key: n for n, key in enumerate(keys)}
        self.names, shape = list(models), (len(models), len(keys))
        self.preferences, self.lengths, self.reference_lengths = (np.full(shape, np.nan) for _ in range(3))
        self.switched, self.datasets = np.zeros(shape, dtype=bool), np.full(len(keys), "", dtype=object)
        for m, records in enumerate(models.values()):
            rows = [self.place[question(record)] for record in records]
            self.preferences[m, rows] = usable([record["preference"] for record in records])
            self.lengths[m, rows] = [len(record["output_2"]) for record in records]
            self.reference_lengths[m, rows] = [len(record["output_1"]) for record in records]
            self.switched[m, rows] = [shown_first(record) for record in records]
        for record in [record for records in [asked, *models.values()] for record in records]:
            n = self.place[question(record)]
            self.datasets[n] = self.datasets[n] or record.get("dataset") or ""
        self.there = ~np.isnan(self.lengths)
        self.references = [records[0]["generator_1"] for records in models.values()]


def shown_first(record):
    """Was the model's answer shown first? AlpacaEval does not store it, but drew it from the instruction (seed 0)."""
    switched = record.get("is_switched")
    return draw("is_switched_outputs", question(record) + "0", [False, True]) if switched is None else switched


def controlled(records, prompts, m, lc, lc_data, lc_C, counts):
    """The length-controlled columns of model m."""
    if lc == "none":
        return {}
    if all(record["output_1"] == record["output_2"] for record in records):
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}        # by definition
    difficulty, gamed = lc_data or (None, None)
    if lc == "alpaca_eval":
        # As published: rows in the file's order, the difficulties by row number even where rows are missing before it,
        # C chosen by cross-validation, and as the error the spread of what was fitted.
        if difficulty is None or len(records) > len(difficulty):
            raise InputError("--lc alpaca_eval needs AlpacaEval's own difficulties (--lc_data), and as many rows")
        place = [prompts.place[question(record)] for record in records]
        if place != sorted(place):
            raise InputError(f"--lc alpaca_eval: annotations of {prompts.names[m]!r} are not in the reference's order")
        p, ours, theirs = zip(*((r["preference"], len(r["output_2"]), len(r["output_1"])) for r in records))
        return length_controlled(p, ours, theirs, difficulty[:len(p)], gamed, lc_C)
    there = prompts.there[m]
    p, ours, theirs = (x[m, there] for x in (prompts.preferences, prompts.lengths, prompts.reference_lengths))
    return length_controlled(p, ours, theirs, None if difficulty is None else difficulty[there], gamed,
                             lc_C or HARDLY_ANY, counts[:, there])


def report(models, asked=(), baseline="", lc="default", lc_data=None, lc_C=None, resamples=1000, seed=0):
    """All that annotations say: {name: AlpacaEval records} of M models -> a dict that JSON can hold.

    asked       records of all instructions in their order, for what is missing; `lc_data`, from
                data.alpaca_eval.read_length_control, follows this order
    baseline    the model that all are compared with; by default each is compared with the next on the leaderboard
    lc, lc_C    "default": aligned by instruction, with bootstrap errors; "alpaca_eval": as it was published; "none"
    Every interval is of the same `resamples` draws of the instructions.

    rows        {name: row of the leaderboard}, best first
    compared    [{a, b, and what stats.winrate.compare says}], for models with the same reference
    by_dataset  {name: {dataset: row}}
    position    {name: stats.winrate.position_gap}; flips: {name: stats.winrate.position_flips}, if asked in both orders
    ratings     stats.ranking.ratings, the reference at 1000
    matrix      {names, win_rate, predicted}: win rates of row over column, NaN where they never met, and the ratings'
    """
    prompts = Prompts(models, asked)
    if lc_data and lc == "default" and len(lc_data[0]) != len(asked):
        raise InputError(f"the difficulties are of {len(lc_data[0])} instructions: give the reference outputs with all "
                         "of them, in AlpacaEval's order, as --reference")
    if baseline and baseline not in models:
        raise InputError(f"--baseline {baseline!r} is not among the models: {', '.join(models)}")
    counts, rows, position, flips = resample(len(prompts.datasets), resamples, seed), {}, {}, {}
    for m, (name, records) in enumerate(models.items()):
        p, there = prompts.preferences[m], prompts.there[m]
        row = win_rate(p[there])
        low, high = rate_interval(row["win_rate"], 100 * (resampled_means(p, counts) - 1), row["n_total"])
        rows[name] = {**row, "mode": "community", "avg_length": int(prompts.lengths[m, there].mean()),
                      **controlled(records, prompts, m, lc, lc_data, lc_C, counts),
                      "win_rate_ci_low": low, "win_rate_ci_high": high, **left_out(p[there], int((~there).sum()))}
        if by_order := [record["preference_by_order"] for record in records if "preference_by_order" in record]:
            flips[name] = position_flips(by_order)
        else:
            position[name] = position_gap(p, prompts.switched[m])
    rows = best_first(rows)

    preferences, reference = (dict(zip(models, x)) for x in (prompts.preferences, prompts.references))
    pairs = [(name, baseline) for name in rows if name != baseline] if baseline else zip(rows, list(rows)[1:])
    datasets = list(dict.fromkeys(prompts.datasets))
    clusters = prompts.datasets if len(datasets) > 1 else None
    compared = [{"a": a, "b": b, **compare(preferences[a], preferences[b], counts, clusters)}
                for a, b in pairs if reference[a] == reference[b]]
    by_dataset = {name: {dataset: win_rate(preferences[name][prompts.datasets == dataset]) for dataset in datasets}
                  for name in rows}
    return {"rows": rows, "compared": compared, "by_dataset": by_dataset if len(datasets) > 1 else {},
            "position": {name: position[name] for name in rows if name in position}, "flips": flips,
            **tournament(models, prompts, counts)}


def tournament(models, prompts, counts):
    """Ratings and matrix of all that met, references included; nothing for a single model."""
    if len(models) < 2:
        return {"ratings": [], "matrix": None}
    players = [records[0]["generator_2"] for records in models.values()]
    if len(set(prompts.references)) == 1:               # one reference: a model is a row of the leaderboard
        players = prompts.names
    names = list(dict.fromkeys([*prompts.references, *players]))
    first, second = ([names.index(name) for name in side] for side in (prompts.references, players))
    anchor = max(range(len(names)), key=first.count)    # the reference of most
    won = wins(prompts.preferences, first, second, len(names))
    played, theta = won + won.swapaxes(1, 2), bradley_terry(won, anchor)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = {"names": names, "win_rate": (100 * won / played)[0].tolist(),
                  "predicted": (100 / (1 + np.exp(theta - theta[:, None]))).tolist()}
    return {"ratings": ratings(names, prompts.preferences, first, second, counts, anchor), "matrix": matrix}


# ---- the command ---------------------------------------------------------------------------------------

def read_all(args, reference):
    """{name: outputs in the reference's order} of the files in args.outputs, before a cent is spent on the first."""
    asked, models = {question(record) for record in reference}, {}
    for path in args.outputs:
        outputs = read_outputs(path)
        if args.limit:                                  # of the others' answers, too
            outputs = [record for record in outputs if question(record) in asked]
        name = outputs[0]["generator"] if outputs else ""
        if name in models:
            raise InputError(f"{path}: the answers of {name!r} have been read already")
        models[name] = matched(outputs, reference, path, args.reference or "the reference")
    folders = [folder_of(name) for name in models]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise InputError(f"two generators have names too much alike: both would go to {args.out / twice[0]}")
    return models


def folder_of(name):
    """A generator's name as the name of a folder, below --out and beside its other files."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-").replace(".json", "-json").replace(".csv", "-csv") or "model"


def reference_outputs(args):
    if args.reference:
        return read_outputs(args.reference)
    if args.judge != "barn":
        raise InputError("which answers are the others compared with? --reference REF.json, in AlpacaEval's format")
    return sets.load()["eval"]                          # the offline world's


def judged(args, outputs, reference):
    """{name: annotations} of {name: outputs}, each written to a folder of its own."""
    models, annotators = {}, pool(args.judge, args.pool)
    max_unusable = 1 if args.attack else args.max_unusable          # a judge that loses its head: that is a result, too
    with connect(args.judge, args.out / "judge.jsonl", args.workers, max_unusable) as judge:
        for name, records in outputs.items():
            models[name] = evaluate(records, reference, annotators, judge, args.seed, args.both_orders)
            folder = args.out / folder_of(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "annotations.json").write_text(json.dumps(models[name], indent=1))
    return models


def check_against(models, reference, path):
    """InputError unless annotations are of the reference's instructions, and were judged against its answers."""
    theirs = {question(record): record["output"] for record in reference}
    for name, records in models.items():
        for i, record in enumerate(records):
            if theirs.get(question(record)) != record["output_1"]:
                how = "was judged against another answer" if question(record) in theirs else "asks something else"
                raise InputError(f"annotations of {name!r}: row {i} {how} than {path} (--any_reference: never mind)")


def pair_of(record):
    return question(record), record["output_1"], record["output_2"]


def labels_of(records, pairs=None):
    """({pair: its first record}, labels (N, K)): K labels of each of N pairs, NaN where a pair has fewer.

    With `pairs` given, of these pairs in this order, whatever else there is."""
    first, labels = {}, {}
    for record in records:
        first.setdefault(pair_of(record), record)
        labels.setdefault(pair_of(record), []).append(record["preference"])
    rows = [usable(labels.get(key, [])) for key in pairs or first]
    longest = max(1, max(map(len, rows)))
    return first, np.array([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows])


def labelled_anew(args, records):
    """Labels by args.judge of the pairs that the records are about, one for each seed."""
    keep = ("instruction", "input", "output_1", "output_2", "generator_2")
    pairs = [{key: record[key] for key in keep if key in record} for record in labels_of(records)[0].values()]
    pairs = pairs[:args.limit or None]
    with connect(args.judge, args.out / "judge.jsonl", args.workers, args.max_unusable, price=price_of()) as judge:
        return [record for seed in range(args.seeds)
                for record in annotate(pairs, pool(args.judge, args.pool), judge, seed, costs=True)]


def examined(args):
    """The judge report of the labels in args.judge_report, as a table; also in evaluators_leaderboard.csv."""
    judges, note = read_judges(args.judge_report), ""
    if args.judge:                                      # not these labels, then, but the judge's own of the same pairs
        judges = {args.judge: labelled_anew(args, [record for records in judges.values() for record in records])}
    if len(judges) > 1:
        common = set.intersection(*({pair_of(record) for record in records} for records in judges.values()))
        if not common:
            raise InputError(f"no pair is labelled by all of {', '.join(judges)}: there is nothing to compare")
        lonely = sum(pair_of(record) not in common for records in judges.values() for record in records)
        judges = {name: [record for record in records if pair_of(record) in common]
                  for name, records in judges.items()}
        note = (f"\n\non the {len(common)} pairs that all of them have labelled ({lonely} labels are left out)"
                "\nagrees: with people; repeats: two labels of one pair by this judge agree")
    others = {name: read_labels(path) for name, path in (("human", args.human), ("second", args.second)) if path}
    rows = {name: judge_row(args, records, others) for name, records in judges.items()}
    with open(args.out / "evaluators_leaderboard.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *next(iter(rows.values()))])
        writer.writerows([name, *("" if x != x else x for x in row.values())] for name, row in rows.items())
    if len(rows) > 1:
        return judges_table(rows) + note
    (name, row), = rows.items()
    return table(["", name], *([key, number(value, "d" if isinstance(value, int) else ".2f")]
                               for key, value in row.items() if value == value))


def judge_row(args, records, others):
    """stats.agreement.judge_report of one judge's labels; `others`: those of people and of a second judge."""
    first, labels = labels_of(records)
    found = {name: labels_of(theirs, first)[1] for name, theirs in others.items()}
    for name, other in found.items():
        if np.isnan(other).all():
            raise InputError(f"{getattr(args, name)}: has labels of none of the pairs in {args.judge_report[0]}")
    money = [[record.get(key, record.get("preference_" + key)) for record in records]
             for key in ("price_per_example", "time_per_example")]
    writers = [record.get("generator_2") for record in first.values()]
    return judge_report(labels, [key[1] for key in first], [key[2] for key in first], found.get("human"),
                        writers if len(set(writers)) > 2 else None, found.get("second"),
                        *(values if any(values) else None for values in money))


def correlated(paths):
    """Do two leaderboards agree? As a table."""
    one, two = map(read_column, paths)
    both = [name for name in one if name in two]
    if len(both) < 3:
        raise InputError(f"{len(both)} models are in both {paths[0]} and {paths[1]}: a ranking needs three")
    found = agreement_of_rankings([one[name] for name in both], [two[name] for name in both])
    lines = [[name, number(found[name]["value"], ".3f"), between(found[name]["ci_low"], found[name]["ci_high"], ".2f"),
              number(found[name]["p"], ".2g")] for name in CORRELATIONS]
    lonely = len(one) + len(two) - 2 * len(both)
    return (f"{len(both)} models{f' (and {lonely} in one of the two only)' if lonely else ''}; 95 % over resampled "
            "models, p over permutations of them:\n\n" +
            table(["", "value", "95 %", "p"], *lines))


def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("annotations", nargs="*", help="AlpacaEval annotations: .json, .jsonl, .gz, or folders with annotations.json")
    add("--outputs", nargs="+", metavar="FILE", help="answers to be judged, one file for each model")
    add("--reference", default="", metavar="FILE", help="the answers to compare with (default: the offline world's); "
        "with annotations: all instructions in their order, for what is missing")
    add("--judge", default="", metavar="MODEL", help="who judges: barn, barn-human, a model at OPENAI_BASE_URL, or me: "
        "a page asks you")
    add("--pool", default="p_eval", help="p_eval: thirteen annotators, p_single: one greedy one; or a file of your own "
        "annotators (.json)")
    add("--judge_report", nargs="+", metavar="FILE", help="labels of pairs, several for each; a row for each judge: "
        "labels that name the same judge, pool and effort (else the file's one annotator) are of one judge, whichever "
        "file they are in; with --judge: its own labels of these pairs")
    add("--human", default="", metavar="FILE", help="people's labels of the same pairs")
    add("--second", default="", metavar="FILE", help="a second judge's labels, to correlate win rates with")
    add("--seeds", type=int, default=4, help="labels of each pair with --judge_report and --judge")
    add("--rankings", nargs=2, metavar="CSV", help="two leaderboards, FILE.csv or FILE.csv:COLUMN")
    add("--attack", action="store_true", help="score answers that say nothing")
    add("--baseline", default="", metavar="NAME", help="compare all with this model (default: each with the next)")
    add("--both_orders", action="store_true", help="ask for each pair twice, in both orders")
    add("--any_reference", action="store_true", help="take annotations against different reference answers together")
    add("--lc", choices=["default", "alpaca_eval", "none"], default="default",
        help="length control: correct, as AlpacaEval published it, or none")
    add("--lc_data", default="", metavar="FILE", help="AlpacaEval's difficulties and gamed baseline (df_gamed.csv)")
    add("--lc_C", type=float, metavar="C", help="inverse L1 penalty (default: none; as published: cross-validated)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples of the instructions")
    add("--seed", type=int, default=0, help="of orders, annotators and resamples")
    add("--limit", type=int, default=0, help="judge only so many instructions (0: all)")
    add("--workers", type=int, default=8, help="questions to the judge at a time")
    add("--max_unusable", type=float, default=.02, help="share of unusable verdicts that is put up with")
    add("--out", type=Path, default=Path("runs/eval"), help="folder for leaderboard.csv, report.json and annotations")
    args = parser.parse_args(underscored(argv))
    modes = [mode for mode in MODES if getattr(args, mode)]
    if len(modes) != 1:
        raise InputError(f"give annotations, or one of --outputs, --judge_report, --rankings, --attack, not "
                         f"{' and '.join(modes) or 'nothing'}; --help explains them")
    (mode,) = modes
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)} - {*MODES, "out"}
    if stray := sorted(given - set(MODES[mode].split())):
        raise InputError(f"--{stray[0]} would change nothing here: it does not go with {mode}")
    if args.pool not in POOLS:                          # a file, which names models
        args.judge = args.judge or args.pool
    if args.pool == "p_ann":
        raise InputError("--pool p_ann flips labels, to learn from: choose p_eval, p_single, or a file of annotators")
    if min(args.seeds, args.workers) < 1 or min(args.limit, args.seed) < 0 or not 2 <= args.resamples <= 10 ** 5:
        raise InputError("--seeds and --workers are positive, --limit and --seed not negative, --resamples 2 to 100000")
    if not 0 <= args.max_unusable <= 1 or not 1e-6 <= (1 if args.lc_C is None else args.lc_C) <= 1e6:
        raise InputError("--max_unusable lies between 0 and 1, --lc_C between 1e-6 and 1e6")
    return args


NUMBERS = "reference baseline lc lc_data lc_C resamples seed"
MODES = {                                               # what goes with each
    "annotations": f"{NUMBERS} any_reference",
    "outputs": f"{NUMBERS} judge pool both_orders limit workers max_unusable",
    "attack": "reference judge pool both_orders limit workers resamples seed",
    "judge_report": "judge pool human second seeds limit workers max_unusable",
    "rankings": ""}


def main(argv):
    args = parse(argv)
    if args.rankings:
        return print(correlated(args.rankings))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.judge_report:
        return print(examined(args))
    lc_data = read_length_control(args.lc_data) if args.lc_data else None
    if args.annotations:
        models = read_annotations(args.annotations, args.any_reference)
        asked = read_outputs(args.reference) if args.reference else []
        if asked and not args.any_reference:
            check_against(models, asked, args.reference)
    else:
        if args.reference and not args.judge:
            raise InputError("who judges? --judge MODEL (barn knows its own world only)")
        args.judge = args.judge or "barn"
        asked = reference_outputs(args)[:args.limit or None]
        outputs = read_all(args, asked) if args.outputs else {
            name: [{**record, "output": text, "generator": name} for record in asked] for name, text in ATTACKS.items()}
        if args.baseline and args.baseline not in outputs:
            raise InputError(f"--baseline {args.baseline!r} is not among the models: {', '.join(outputs)}")
        models = judged(args, outputs, asked)
    lc = "none" if args.attack else args.lc             # one text for everything has no length to control for
    result = report(models, asked, args.baseline, lc, lc_data, args.lc_C, args.resamples, args.seed)
    references = sorted({records[0]["generator_1"] for records in models.values()})
    print(f"win rate over {', '.join(references)} in %{LC[lc, bool(lc_data)]}:\n\n{write(result, args.out)}\n")
    if more := details({**result, "compared": [], "ratings": [], "matrix": None} if args.attack else result):
        print(f"{more}\n")
    print(f"leaderboard.csv and report.json are in {args.out}")


LC = {("default", True): ", LC: length-controlled, by instruction", ("none", True): "", ("none", False): "",
      ("default", False): ", LC: length-controlled, without the difficulty of instructions",
      ("alpaca_eval", True): ", LC: length-controlled, as AlpacaEval published it", ("alpaca_eval", False): ""}


if __name__ == "__main__":
    run(main, "eval.py", "what the judge answered is kept")
