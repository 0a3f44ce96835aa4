"""Evaluation: win rates and their errors, models compared, judges examined.

python eval.py runs/barn                    the leaderboard of a run folder
python eval.py runs/0 runs/1 runs/2         mean and spread over seeds
python eval.py A.json B.json --baseline A   all models compared with A
python eval.py --show runs/barn             answers side by side, to be read
python eval.py --outputs OUT.json --reference REF.json --judge MODEL
                                            have answers judged first
python eval.py --judge_report LABELS.json --human HUMAN.json
                                            how far to trust a judge
python eval.py --rankings ONE.csv TWO.csv   do two leaderboards agree?
python eval.py --attack --judge MODEL       judge answers that say nothing
python eval.py --arena_hard JUDGE_FOLDER    Arena-Hard v2's judgments

--format md or latex prints the tables for READMEs and papers.

leaderboard.csv has AlpacaEval's columns, then ours. For runs that differ in
the seed it has a row for each method (means; counts are sums; n_runs is the
number of runs, *_spread the standard deviation over them) and, named like
"dpo (0)", a row for each run, with its `run` and `seed`. leaderboard.md is
the same table for people; comparisons.csv, data_sets.csv and ratings.csv are
the other tables; report.json has everything.
"""
import re
import shlex
import statistics
from pathlib import Path

import numpy as np

from annotate import CROWDS, POOLS, add_flags, annotate, connect, options, pool, price_of, probe
from data import InputError, run, run_folders, sets, writable
from data.alpaca_eval import (BASELINES, check_against, labels_of, matched, pair_of, paired, question, read_annotations,
                              read_column, read_judges, read_labels, read_length_control, read_outputs)
from data.arena_hard import ARENA_HARD, arena_hard_score, read_arena_hard
from data.attacks import ATTACKS
from data.barn.judge import TASTES, win_probabilities
from data.barn.reward import true_reward
from data.files import write_json
from data.flags import Parser, location
from stats import run_report
from stats.agreement import judge_report
from stats.length import HARDLY_ANY, length_controlled
from stats.prompts import Prompts
from stats.ranking import agreement_of_rankings, best_first, to_compare, tournament
from stats.seeds import over_runs
from stats.side_by_side import side_by_side
from stats.tables import (FORMS, NOT_PUBLISHED, check_folder, correlations, details, document, headline, write,
                          write_over_seeds, write_rows)
from stats.tables import judges as judges_table
from stats.winrate import (compare, holm, left_out, mean_and_error, paired_difference, position_flips, position_gap,
                           rate_interval, resample, resampled_means, win_rate)

# ---- judging -------------------------------------------------------------------------------------------

def evaluate(outputs, reference, annotators, judge, seed=0, both_orders=False):
    """Judge a model's outputs against the reference's -> AlpacaEval's annotations, in the reference's order.

    Both are lists of {instruction, output, generator, optional input and dataset}. InputError names the first
    instruction that only one of them answers.
    """
    return annotate(paired(matched(outputs, reference), reference), annotators, judge, seed, both_orders=both_orders)


# ---- annotations -> numbers ----------------------------------------------------------------------------

def controlled(records, prompts, m, lc, lc_data, lc_C, counts):
    """The length-controlled columns of model m."""
    if lc == "none":
        return {}
    if all(record["output_1"] == record["output_2"] for record in records):
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}        # the reference itself
    difficulty, gamed = lc_data or (None, None)
    if lc == "alpaca_eval":
        # As published: a row gets the difficulty of its row number, even if rows before it are missing; C is chosen by
        # cross-validation; the error is the spread of the fitted probabilities.
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


def report(models, asked=(), baseline="", lc="default", lc_data=None, lc_C=None, resamples=1000, seed=0, starts=None,
           costs=None, barn=()):
    """All that annotations say: {name: AlpacaEval records} of M models -> a dict that JSON can hold.

    asked       records of all instructions in their order, to know what is missing; `lc_data`, from
                data.alpaca_eval.read_length_control, follows this order
    baseline    the model that all are compared with; by default each is compared with the next on the leaderboard
    lc, lc_C    "default": aligned by instruction, with bootstrap errors; "alpaca_eval": as it was published; "none"
    starts      {name: name of the model that its training started from}; by default that is the model called sft
    costs       {name: {kl, cpu_seconds, judge_calls}}, as far as they are known
    barn        names of the models that were asked instructions of the offline world, which knows the true reward
    All intervals are from the same `resamples` draws of the instructions.

    rows        {name: row of the leaderboard}, best first
    compared    [{a, b, the row of stats.winrate.compare, holm_p: its mcnemar_p corrected for the number of
                comparisons}], for models with the same reference
    by_dataset  {name: {dataset: row}}
    position    {name: stats.winrate.position_gap}; flips: {name: stats.winrate.position_flips}, if asked in both orders
    ratings     stats.ranking.ratings, the reference at 1000
    matrix      {names, win_rate, predicted}: win rates of row over column, NaN where they never met, and the ratings'
    """
    prompts = Prompts(models, asked)
    if lc_data and lc == "default" and len(lc_data[0]) != len(asked):
        raise InputError(f"the difficulties are of {len(lc_data[0])} instructions: give the reference outputs with all "
                         "of them, in AlpacaEval's order, as --reference")
    known(baseline, models)
    counts = resample(len(prompts.datasets), resamples, seed)
    rows, position, flips = one_by_one(models, prompts, counts, lc, lc_data, lc_C, barn)
    rows = best_first(rows)
    preferences, reference = (dict(zip(models, x)) for x in (prompts.preferences, prompts.references))
    starts = dict.fromkeys(models.keys() - {"sft"}, "sft") if starts is None and "sft" in models else starts or {}
    for name, start in starts.items():
        if reference[name] == reference[start]:
            points, error = paired_difference(preferences[name], preferences[start])
            rows[name] |= {"diff_start": points, "diff_start_standard_error": error}
    for name, spent in (costs or {}).items():
        rows[name] |= spent
    datasets = list(dict.fromkeys(prompts.datasets))
    clusters = prompts.datasets if len(datasets) > 1 else None
    compared = [{"a": a, "b": b, **compare(preferences[a], preferences[b], counts, clusters)}
                for a, b in to_compare(rows, baseline) if reference[a] == reference[b]]
    for row, p in zip(compared, holm([row["mcnemar_p"] for row in compared])):
        row["holm_p"] = float(p)
    by_dataset = {name: {dataset: win_rate(preferences[name][prompts.datasets == dataset]) for dataset in datasets}
                  for name in rows}
    return {"rows": rows, "compared": compared, "by_dataset": by_dataset if len(datasets) > 1 else {},
            "position": {name: position[name] for name in rows if name in position}, "flips": flips,
            **tournament(prompts.references, prompts.players, prompts.preferences, counts)}


def one_by_one(models, prompts, counts, lc, lc_data, lc_C, barn):
    """What can be said of each model alone: rows, position and flips of `report`."""
    rows, position, flips = {}, {}, {}
    for m, (name, records) in enumerate(models.items()):
        p, there = prompts.preferences[m], prompts.there[m]
        row = win_rate(p[there])
        low, high = rate_interval(row["win_rate"], 100 * (resampled_means(p, counts) - 1), row["n_total"])
        rows[name] = {**row, "mode": "community", "avg_length": int(prompts.lengths[m, there].mean()),
                      **controlled(records, prompts, m, lc, lc_data, lc_C, counts),
                      "win_rate_ci_low": low, "win_rate_ci_high": high, **left_out(p[there], int((~there).sum()))}
        if name in barn:
            rows[name] |= expected(records)
            rows[name]["true_reward"] = statistics.mean(map(true_reward_of, records))
        if any("battles" in record for record in records):
            rows[name]["arena_hard"] = arena_hard_score(records)
        if by_order := [record["preference_by_order"] for record in records if "preference_by_order" in record]:
            flips[name] = position_flips(by_order)
        else:
            position[name] = position_gap(p, prompts.switched[m])
    return rows, position, flips


def known(baseline, models):
    """InputError if there is a baseline, but not among the models."""
    if baseline and baseline not in models:
        raise InputError(f"--baseline {baseline!r} is not among the models: {', '.join(models)}")


def true_reward_of(record):
    return true_reward(record["instruction"], record["output_2"])


def tastes_of(judge, kind):
    """{name: Taste} of the annotators of a pool, as data.barn.judge takes them. judge: of the offline world."""
    return {annotator.name: TASTES[annotator.name] for annotator in pool(judge, kind)}


def expected(records):
    """The win rate by the offline world's judge over all annotators of its pool and both orders, without the noise of a
    single verdict, and its standard error over prompts; {} for another judge or pool. Equal texts have 50 %."""
    judge, kind = (records[0].get(key) for key in ("judge", "pool"))
    if judge not in CROWDS or kind not in POOLS:
        return {}
    rows = [(question(record), record["output_2"], record["output_1"]) for record in records]
    mean, error = mean_and_error(100 * win_probabilities(tastes_of(judge, kind), rows))
    return {"expected_win_rate": mean, "expected_standard_error": error}


def averaged(result, models, stages, methods, asked=(), baseline=""):
    """report() of runs that differ in the seed, averaged over them by stats.seeds.over_runs.

    stages {name: folder of the stage}, methods {method: {seed: name}}; the other arguments as for report().
    """
    known(baseline, methods)
    runs, preferences = run_folders.labels(stages), dict(zip(models, Prompts(models, asked).preferences))
    labels = {name: runs[folder.parent] for name, folder in stages.items()}
    return over_runs(result, preferences, labels, methods, baseline)


# ---- the command ---------------------------------------------------------------------------------------

def read_all(args, reference):
    """{name: outputs in the reference's order} of the files in args.outputs; all are checked before any is judged."""
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
    """A generator's name as the name of a folder in --out, unlike the names of the files there."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-").replace(".json", "-json").replace(".csv", "-csv") or "model"


def reference_outputs(args):
    if args.reference:
        return read_outputs(args.reference)
    if args.judge not in CROWDS:
        raise InputError("which answers are these compared with? Give --reference REF.json, in AlpacaEval's format")
    return sets.load()["eval"]                          # the offline world's


def judged(args, outputs, reference):
    """{name: annotations} of {name: outputs}, each written to a folder of its own."""
    models, annotators = {}, pool(args.judge, args.pool)
    if args.attack:
        args.options["max_unusable"] = 1                # a judge that loses its head: that is a result, too
    with connect(args.judge, args.out / "judge.jsonl", **args.options) as judge:
        pairs = paired(matched(next(iter(outputs.values())), reference), reference)
        probe(judge, annotators, pairs, seed=args.seed, both_orders=args.both_orders)
        for name, records in outputs.items():
            models[name] = evaluate(records, reference, annotators, judge, args.seed, args.both_orders)
            folder = args.out / folder_of(name)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "annotations.json", models[name])
    return models


def labelled_anew(args, records):
    """Labels by args.judge of the pairs that the records are about, one for each seed."""
    keep = ("instruction", "input", "output_1", "output_2", "generator_2")
    pairs = [{key: record[key] for key in keep if key in record} for record in labels_of(records)[0].values()]
    pairs = pairs[:args.limit or None]
    with connect(args.judge, args.out / "judge.jsonl", price=price_of(), **args.options) as judge:
        probe(judge, pool(args.judge, args.pool), pairs)
        return [record for seed in range(args.seeds)
                for record in annotate(pairs, pool(args.judge, args.pool), judge, seed, costs=True)]


def examined(args):
    """The judge report of the labels in args.judge_report, as a table; also in evaluators_leaderboard.csv."""
    judges, notes = read_judges(args.judge_report), []
    if args.judge:                                      # not these labels, then, but the judge's own of the same pairs
        judges = {args.judge: labelled_anew(args, [record for records in judges.values() for record in records])}
    if len(judges) > 1:
        common = set.intersection(*({pair_of(record) for record in records} for records in judges.values()))
        if not common:
            raise InputError(f"no pair is labelled by all of {', '.join(judges)}: there is nothing to compare")
        lonely = sum(pair_of(record) not in common for records in judges.values() for record in records)
        judges = {name: [record for record in records if pair_of(record) in common]
                  for name, records in judges.items()}
        notes = [f"on the {len(common)} pairs that all of them have labelled ({lonely} labels are left out)",
                 "agrees: with people; repeats: two labels of one pair by this judge agree"]
    others = {name: read_labels(path) for name, path in (("human", args.human), ("second", args.second)) if path}
    rows = {name: judge_row(args, records, others) for name, records in judges.items()}
    write_rows([{"": name, **row} for name, row in rows.items()], args.out / "evaluators_leaderboard.csv")
    return document([judges_table(rows), *notes], args.format)


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


def correlated(args):
    """How well the two leaderboards in args.rankings agree, as a table."""
    paths = args.rankings
    one, two = map(read_column, paths)
    both = [name for name in one if name in two]
    if len(both) < 3:
        raise InputError(f"{len(both)} models are in both {paths[0]} and {paths[1]}: a ranking needs three")
    lonely = len(one) + len(two) - 2 * len(both)
    others = f" ({lonely} others are in one of the two files only)" if lonely else ""
    title = f"{len(both)} models{others}; 95 %: interval over resampled models, p: over permutations of the models:"
    for path, column in zip(paths, (one, two)):
        if len({column[name] for name in both}) == 1:
            raise InputError(f"{path}: all of the {len(both)} models in both files have the same value: no ranking")
    found = agreement_of_rankings([one[name] for name in both], [two[name] for name in both])
    return document([title, correlations(found)], args.format)


def shown(args):
    """Instructions with the answers of all models of the files and folders in args.show, as text."""
    models, stages = run_folders.named_by_run(*read_annotations(args.show, args.any_reference))
    records = {name: {question(record): record for record in records} for name, records in models.items()}
    if not set.intersection(*map(set, records.values())):
        raise InputError("there is no instruction that all of these models have answered")
    before = {name for name in models if stages.get(name, Path(name)).name in ("base", "sft")}
    worth = true_reward if run_folders.in_the_barn(stages) == models.keys() else None
    return side_by_side(records, args.n, args.seed, before, worth)


def parse(argv):
    parser = Parser("eval.py", __doc__)
    add = parser.add
    add("annotations", nargs="*", help="AlpacaEval annotations: .json, .jsonl, .gz, or folders with annotations.json")
    add("--show", nargs="+", metavar="PATH", help="print instructions from such files or folders, with the answers")
    add("--n", type=int, default=3, help="instructions that --show prints")
    add("--outputs", nargs="+", metavar="FILE", help="answers to be judged, one file for each model")
    add("--reference", default="", metavar="FILE", help="the answers to compare with (default: the offline world's); "
        "with annotations: all instructions in their order, to know which are missing")
    add("--judge", default="", metavar="MODEL", help="who judges: barn, barn-human, barn-far, serve:PATH, a model at "
        "OPENAI_BASE_URL, or me: a page asks you (default: barn)")
    add("--pool", default="p_eval", help="p_eval: thirteen annotators; p_single: one greedy one; p_pairwise: one that "
        "says one letter, with its log-probabilities; or a file of your own annotators (.json)")
    add("--judge_report", nargs="+", metavar="FILE", help="labels of pairs, several for each; a row for each judge: "
        "labels that name the same judge, pool and effort (else the file's one annotator) are of one judge, whichever "
        "file they are in; with --judge: its own labels of these pairs")
    add("--human", default="", metavar="FILE", help="people's labels of the same pairs")
    add("--second", default="", metavar="FILE", help="a second judge's labels, to correlate win rates with")
    add("--seeds", type=int, default=4, help="labels of each pair with --judge_report and --judge")
    add("--rankings", nargs=2, metavar="CSV", help="two leaderboards: FILE.csv, or FILE.csv:COLUMN for a column other "
        "than win_rate")
    add("--attack", action="store_true", help="have answers judged that say nothing")
    add("--arena_hard", nargs="+", metavar="FILE", help="Arena-Hard v2's files of judgments, or a judge's folder of "
        "them; the answers are read from model_answer, where Arena-Hard has them")
    add("--baseline", default="", metavar="NAME", help="compare all models with this one (default: each with the next "
        "on the leaderboard)")
    add("--both_orders", action="store_true", help="ask for each pair twice, in both orders")
    add("--any_reference", action="store_true", help="accept annotations against different answers of one reference")
    add("--lc", choices=["default", "alpaca_eval", "none"], default="default",
        help="length control: correct (default), as AlpacaEval published it, or none")
    add("--lc_data", default="", metavar="FILE", help="AlpacaEval's instruction difficulties (df_gamed.csv), or "
        "alpaca_eval: fetched from the hub (default: none; with --lc alpaca_eval: the hub's)")
    add("--lc_C", type=float, metavar="C", help="inverse L1 penalty of the length control (default: 100, hardly any; "
        "with --lc alpaca_eval: cross-validated)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples of the instructions")
    add("--seed", type=int, default=0, help="seed of orders, annotators, resamples, and of what --show draws")
    add("--limit", type=int, default=0, help="judge only so many instructions, 0 for all (default: 0)")
    add("--report", action="store_true", help="write report.html, too: figures, tables and answers side by side")
    add_flags(add)
    add("--format", choices=list(FORMS), default="text", help="of what is printed: 80 columns (default), Markdown, or "
        "LaTeX with the package booktabs")
    add("--out", type=location, help="folder for leaderboard.csv, report.json (runs/eval, of --attack runs/attack)")
    args = parser.parse(argv)
    args.out = Path("runs/attack" if args.attack else "runs/eval") if args.out is None else args.out
    modes = [mode for mode in MODES if getattr(args, mode)]
    if len(modes) != 1:
        raise InputError(f"give annotations, or one of {', '.join(f'--{mode}' for mode in list(MODES)[1:])}, not "
                         f"{' and '.join(modes) or 'nothing'}; --help explains them")
    (mode,) = modes
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)} - {*MODES, "out"}
    if stray := sorted(given - set(MODES[mode].split())):
        raise InputError(f"--{stray[0]} would change nothing here: it does not go with {mode}")
    if not 1 <= args.seeds <= 1000 or args.n < 1 or min(args.limit, args.seed) < 0:
        raise InputError("--seeds lies between 1 and 1000, --n is positive, --limit and --seed are not negative")
    if not 2 <= args.resamples <= 10 ** 5:
        raise InputError("--resamples lies between 2 and 100000")
    if args.pool not in POOLS:                          # a file, which names models
        args.judge = args.judge or args.pool
    if args.pool == "p_ann":
        raise InputError("--pool p_ann flips labels, to learn from: choose p_eval, p_single, or a file of annotators")
    if not 1e-6 <= (1 if args.lc_C is None else args.lc_C) <= 1e6:
        raise InputError("--lc_C lies between 1e-6 and 1e6")
    if args.arena_hard and args.lc == "alpaca_eval":
        raise InputError("--lc alpaca_eval knows the difficulty of AlpacaEval's instructions, not of Arena-Hard's")
    args.options = options(args)
    return args


ASKING = "workers max_unusable timeout max_tokens reasoning_effort judge_body ask_again"
NUMBERS = "reference baseline lc lc_data lc_C resamples seed format report"
MODES = {                                               # what is done, and the flags that go with it
    "annotations": f"{NUMBERS} any_reference",
    "show": "n seed any_reference",
    "outputs": f"{NUMBERS} judge pool both_orders limit {ASKING}",
    "attack": f"reference judge pool both_orders limit resamples seed format {ASKING.replace('max_unusable ', '')}",
    "arena_hard": "baseline lc lc_C resamples seed format",
    "judge_report": f"judge pool human second seeds limit format {ASKING}",
    "rankings": "format"}


def to_judge(args):
    """({name: annotations}, the reference's records): what --outputs and --attack ask for, judged."""
    if args.reference and not args.judge:
        raise InputError("who judges? Give --judge MODEL (barn can judge answers in its own world only)")
    args.judge = args.judge or "barn"
    asked = reference_outputs(args)[:args.limit or None]
    outputs = read_all(args, asked) if args.outputs else {
        name: [{**record, "output": text, "generator": name} for record in asked] for name, text in ATTACKS.items()}
    known(args.baseline, outputs)
    return judged(args, outputs, asked), asked


def gathered(args):
    """({name: annotations}, {name: the folder of its stage}, the reference's records): read from files, or judged."""
    if args.arena_hard:
        return read_arena_hard(args.arena_hard), {}, []
    if not args.annotations:
        models, asked = to_judge(args)
        return models, {}, asked
    models, stages = run_folders.named_by_run(*read_annotations(args.annotations, args.any_reference))
    asked = read_outputs(args.reference) if args.reference else []
    if asked and not args.any_reference:
        check_against(models, asked, args.reference)
    return models, stages, asked


def write_html(args, argv, command, result, models, stages):
    """Write report.html. argv, command: as for main(); result: of report() or averaged(); models, stages: of
    gathered()."""
    title = str(args.out) if command else ", ".join(args.annotations or args.outputs)
    typed = command or shlex.join(["python", "eval.py", *argv])
    replies = [args.out / "judge.jsonl"] if args.outputs else []
    run_report.write(args.out / "report.html", title, typed, result, models,
                     [folder.parent for folder in stages.values()],
                     run_folders.in_the_barn(stages) == models.keys(), replies)


def main(argv, command=""):
    """command: what was typed, if it was not this command but farm.py."""
    args = parse(argv)
    if args.rankings or args.show:
        return print((correlated if args.rankings else shown)(args))
    writable(args.out)
    if args.judge_report:
        return print(examined(args))
    check_folder(args.out, "attack" * args.attack)
    difficulties = args.lc_data or ("alpaca_eval" if args.lc == "alpaca_eval" else "")
    lc_data = read_length_control(difficulties) if difficulties else None
    models, stages, asked = gathered(args)
    references = sorted({records[0]["generator_1"] for records in models.values()})
    lc = "none" if args.attack else args.lc             # where all answers are one text, their length explains nothing
    what = headline(references, lc, bool(lc_data))
    methods, remarks = {}, []
    if len(references) == 1 and len(set(stages.values())) == len(models):       # each model is a stage of a run
        methods, remarks = run_folders.by_method(stages)
    if lc == "default" and not lc_data and set(references) & set(BASELINES):
        remarks = [NOT_PUBLISHED, *remarks]
    remarks += [ARENA_HARD] if args.arena_hard else []
    result = report(models, asked, "" if methods else args.baseline, lc, lc_data, args.lc_C, args.resamples, args.seed,
                    run_folders.starts_of(stages) if stages else None,
                    {name: run_folders.costs_of(folder) for name, folder in stages.items()},
                    run_folders.in_the_barn(stages))
    if methods:
        what += ", mean over runs that differ in the seed"
        result = averaged(result, models, stages, methods, asked, args.baseline)
        text, more = write_over_seeds(result, args.out, args.format), ""
    else:
        if args.attack:                                 # answers that say nothing are not compared with each other
            result |= {"kind": "attack", "compared": [], "ratings": [], "matrix": None}
        text, more = write(result, args.out, args.format), details(result, args.format)
    if args.report:
        write_html(args, argv, command, result, models, stages)
    title, beside, where = (document(parts, args.format) for parts in (
        [f"{what}:"], remarks, [f"leaderboard.csv, the other tables and report.json are in {args.out}"
                                + ", report.html shows them" * args.report]))
    print("\n\n".join(filter(None, [title, text, beside, more, where])))


if __name__ == "__main__":
    run(main, "eval.py", "what the judge answered is kept")
