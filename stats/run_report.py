"""What report.html says of a run, or of any annotations: one function for each section.

A section is left out where there is nothing to show, as are stages whose files are missing.
"""
import hashlib
from collections.abc import Callable
from math import ceil, isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import run_folders
from data.barn.reward import true_reward
from data.judges.prices import price_of, spent
from data.sets import question
from stats import report, run_traces, tables
from stats.agreement import LONGER
from stats.plots import bars, lines, scatter
from stats.side_by_side import verdict
from stats.winrate import mean_and_error, usable

SHOWN = 60                              # instructions whose answers are shown; up to twice as many are all shown
POINTS = 60                             # of a learning curve; of a longer one each point is a mean over several steps
PANELS = 6                              # curves of a stage, at most
CURVES = (("objective/scores",), ("reward",), ("objective/kl",), ("objective/rlhf_reward",), ("loss",), ("loss/nll",),
          ("rewards/margins",), ("rewards/chosen", "rewards/rejected"), ("rewards/accuracies",), ("accuracy",),
          ("margin",), ("kl",), ("loss/kl",), ("objective/entropy",), ("entropy",), ("response_length",),
          ("completions/mean_length",), ("val/ratio",), ("explained_variance",))
NO_CURVE = {"step", "lr", "loss_scale", "objective/kl_coef"}
BOARD = (("win rate", "win_rate", "standard_error", ".1f"),
         ("expected", "expected_win_rate", "expected_standard_error", ".1f"),
         ("LC", "length_controlled_winrate", "lc_standard_error", ".1f"),
         ("vs start", "diff_start", "diff_start_standard_error", "+.1f"), ("length", "avg_length", "", ".0f"),
         ("true reward", "true_reward", "", ".2f"), ("KL", "kl", "", ".1f"), ("CPU s", "cpu_seconds", "", ".0f"),
         ("labels", "judge_calls", "", ".0f"))
KEPT_ELSEWHERE = {"sources", "contents", "needs", "versions", "id", "changed", "method", "day", "commit", "revision"}


class Run(NamedTuple):
    """All that a report is about."""
    command: str
    result: dict                        # of eval.report, or of eval.averaged
    models: dict                        # {name: AlpacaEval's annotations}
    stages: list                        # of data.run_folders.contents
    spent: dict                         # of data.judges.prices.spent
    worth: Callable | None              # worth(instruction, answer): the true reward, in the offline world
    replies: tuple = ()                 # files of what judges replied

    def runs(self):
        """{run folder: what it is called in figures}; "" if there is one run alone."""
        found = list(dict.fromkeys(stage["run"] for stage in self.stages))
        return {run: run.name if len(found) > 1 else "" for run in found}

    def called(self, stage):
        return " ".join(filter(None, [stage["name"], self.runs()[stage["run"]]]))


def write(path, title, command, result, models, runs=(), barn=False, replies=()):
    """Write report.html to a path.

    title, command  what it is about, and the command that made it, as it is typed
    result, models  of eval.report or eval.averaged, {} if nobody judged; {name: AlpacaEval's annotations}
    runs            run folders, whose stages are shown
    barn            whether all instructions are the offline world's
    replies         files of what judges replied, beside those of the runs
    """
    stages = run_folders.contents(dict.fromkeys(runs))
    files = {*map(Path, replies), *(Path(stage["settings"].get("cache") or stage["run"] / "judge.jsonl")
                                    for stage in stages)}
    run = Run(command, result, models, stages, spent(files, price_of()), true_reward if barn else None, tuple(files))
    sections = {}
    for heading, section in SECTIONS.items():
        try:
            sections[heading] = section(run)
        except Exception as error:      # a file of another program's may hold anything, and must not end a run of hours
            sections[heading] = [report.prose(f"This section cannot be shown: {type(error).__name__}: {error}")]
    report.write(path, title, sections, lead(run))


def lead(run):
    if not run.models:
        return "Nobody has judged the answers."
    judges = sorted({str(record.get("judge") or record.get("annotator") or "an unknown judge")
                     for records in run.models.values() for record in records[:50]})
    asked = max(map(len, run.models.values()), default=0)
    models = f"{len(run.models)} model{'s' * (len(run.models) != 1)}"
    return f"{models}, {asked:,} instructions, judged by {', '.join(judges[:4])}{' and others' * (len(judges) > 4)}."


# ---- win rates -----------------------------------------------------------------------------------------

def leaderboard(run):
    result, seeds = run.result, "methods" in run.result
    if not result:
        return []
    what = ("Means over runs that differ in the seed; ± is the standard deviation over the seeds: how much a training "
            "differs from another one." if seeds else
            "± is the standard error over the instructions, without the noise of training.")
    error = "win_rate_spread" if seeds else "standard_error"
    values = {name: (row["win_rate"], row[error] if isfinite(row.get(error, float("nan"))) else None)
              for name, row in result["rows"].items()}
    heads = ["model", *(["runs"] if seeds else []), *(head for head, *_ in BOARD)]
    lines = [[name, *([row["n_runs"]] if seeds else []), *board_cells(row, seeds)]
             for name, row in result["rows"].items()]
    svg = bars(values, "Win rates", "win rate in %", references={"as good as the reference": 50})
    note = ("LC: length-controlled. vs start: points more than the model that training started from. KL: to that one, "
            "in nats an answer. CPU s and labels: of all stages that a model needed.")
    return [report.figure(svg, f"How often the judge preferred a model's answer to the reference's. {what}"),
            report.table(heads, lines), report.prose("\n\n".join([note, *tables.reasons(result["rows"])]), "faint"),
            *(report.details(summary, report.prose(title), report.table(head, lines))
              for summary, (title, head, *lines) in more_tables(result, seeds).items() if lines)]


def board_cells(row, seeds=False):
    """The numbers of BOARD for a model; over seeds, errors are standard deviations."""
    return [tables.plus_minus(row.get(key), row.get(f"{key}_spread" if seeds else error), form)
            for _, key, error, form in BOARD]


def more_tables(result, seeds):
    """{summary: [title, head, *lines]} of what else eval.report or eval.averaged says."""
    if seeds:
        return {"Differences between methods": tables.differences(result["compared"]), "Each run": each_run(result)}
    return {"Differences between models": tables.comparisons(result["compared"]),
            "Kinds of instructions": tables.data_sets(result["by_dataset"]),
            "The order in which answers are shown": tables.positions(result["position"]),
            "Both orders": tables.flips(result["flips"]), "Ratings": tables.ratings(result["ratings"]),
            "Who beats whom": tables.everyone(result["matrix"])}


def each_run(result):
    """[title, head, *lines] of the single runs that were averaged."""
    lines = [[name, *board_cells(row)] for name, row in result["runs"].items()]
    return ["The single runs; ± is the standard error over the instructions.", ["model", *(each[0] for each in BOARD)],
            *lines]


# ---- training ------------------------------------------------------------------------------------------

def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def curve(stage, key):
    """(steps, values) of a metric, (N,) each: at most POINTS, each the mean of as many steps."""
    found = [(line.get("step"), line.get(key)) for line in stage["metrics"]]
    found = np.array([pair for pair in found if all(map(is_number, pair))], float).reshape(-1, 2)
    size = each_point(len(found))
    return np.array([found[i:i + size].mean(0) for i in range(0, len(found), size)]).reshape(-1, 2).T


def each_point(n):
    """Of how many steps a point of a curve is the mean."""
    return max(1, ceil(n / POINTS))


def curves_of(stage):
    """Which metrics of a stage are shown, the most important first: tuples of those that share a figure."""
    there = {key for line in stage["metrics"] for key, value in line.items() if is_number(value)} - NO_CURVE
    known = [panel for panel in CURVES if there >= {*panel}]
    others = [(key,) for key in sorted(there - {key for panel in CURVES for key in panel})]
    return (known + (others if len(known) < 3 else []))[:PANELS]


def learning(run):
    """Figures of each stage that logs its steps, a line for each run."""
    parts, runs = [], run.runs()
    for name in dict.fromkeys(stage["name"] for stage in run.stages):
        alike = [stage for stage in run.stages if stage["name"] == name and stage["metrics"]]
        panels = curves_of(alike[0]) if alike else []
        svgs = []
        for panel in panels:
            series = {}
            for stage in alike:
                for key in panel:
                    short = [key.rpartition("/")[2]] * (len(panel) > 1)
                    series[" ".join(filter(None, [*short, runs[stage["run"]]]))] = curve(stage, key)
            svgs.append(lines(series, " and ".join(panel), "step", "", width=300, height=200))
        keys = [key for panel in panels for key in panel]
        table = [[runs[stage["run"]], *(line.get(key) for key in ("step", *keys))]
                 for stage in alike for line in a_few(stage["metrics"])]
        if svgs:
            steps = max(len(stage["metrics"]) for stage in alike)
            means = f" Each point is the mean of {each_point(steps)} steps." if each_point(steps) > 1 else ""
            parts += [report.heading(name), report.figure(svgs, f"{steps:,} steps.{means}", ["run", "step", *keys],
                                                          table, small=True)]
    return parts


def a_few(rows, n=12):
    """n of the rows, evenly, with the first and the last."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))] if rows else []


def reward_and_kl(run):
    """The score against the KL along the training of online methods, and along n of best-of-n."""
    series, table, online = {}, [], False
    for stage in run.stages:
        for key in ("objective/scores", "reward"):
            pairs = [(line["objective/kl"], line[key]) for line in stage["metrics"]
                     if is_number(line.get("objective/kl")) and is_number(line.get(key))]
            if pairs and run.called(stage) not in series:
                series[run.called(stage)], online = np.array(pairs).T, True
        if {"kl", "score"} <= stage["curve"].keys():
            series[run.called(stage)] = np.array([stage["curve"]["kl"], stage["curve"]["score"]], float)
    if not online:
        return []
    for name, (kl, score) in series.items():
        table += [[name, *pair] for pair in a_few(list(zip(kl.tolist(), score.tolist())))]
    svg = lines(series, "Score and KL at each step", "KL to the start, in nats an answer", "score", height=340)
    return [report.figure(svg, "What a method gains in the reward that it is trained on, and how far it goes for it. "
                          "Each point is a step; those of best-of-n are its n, with the bound of its KL.",
                          ["", "KL", "score"], table)]


def best_of_n(run):
    """What the best of n answers is worth, for each n: the score that chooses it, and the truth where it is known."""
    parts = []
    for stage in run.stages:
        points = stage["curve"]
        keys = [key for key in points if key not in ("n", "kl") and not key.startswith("random_")]
        if not {"n"} < points.keys() or len(points["n"]) < 2:
            continue
        svgs = [lines({"best of n": (points["n"], points[key])}, key.replace("_", " "), "n", "", log_x=True,
                      references={"random": points[f"random_{key}"][0]} if f"random_{key}" in points else {})
                for key in keys]
        rows = [[points[key][i] for key in ("n", "kl", *keys)] for i in log_spaced(len(points["n"]))]
        parts.append(report.figure(svgs, f"{run.called(stage)}: the answer with the highest score among n. If its true "
                                   "reward falls while its score rises, the reward model is over-optimised.",
                                   ["n", "KL, at most", *keys], rows))
    return parts


def log_spaced(n):
    """Indices 0, 1, 3, 7, ... below n, and the last."""
    return sorted({2 ** i - 1 for i in range(n.bit_length())} | {n - 1})


# ---- texts ---------------------------------------------------------------------------------------------

def answers(run):
    """The answers to some instructions side by side, drawn by their hash, or to all if they are few."""
    best_first = [*run.result.get("rows", {})]
    if seeds := run.result.get("methods"):              # of each method the first run alone
        best_first = [next(iter(seeds[name].values())) for name in best_first]
    models = {name: {question(record): record for record in run.models[name]} for name in best_first}
    asked = list(dict.fromkeys(key for records in models.values() for key in records))
    drawn = asked
    if len(asked) > 2 * SHOWN:
        drawn = sorted(asked, key=lambda key: hashlib.sha256(key.encode(errors="replace")).digest())[:SHOWN]
    cases = [case(key, {name: records[key] for name, records in models.items() if key in records}, run.worth)
             for key in drawn]
    which = f"{len(drawn)} of {len(asked):,} instructions, drawn at random." if len(drawn) < len(asked) else ""
    return [report.prose(which), report.browser(models, cases)] if cases else []


def case(asked, records, worth):
    """One instruction for report.browser: the answers of the references, then those of {model: record}."""
    def answer(by, text, said="", won=None):
        value = worth(next(iter(records.values()))["instruction"], text) if worth else None
        return {"by": by, "text": text, "verdict": said, "won": won, "worth": value}

    references = {record["generator_1"]: record["output_1"] for record in records.values()}
    found = [answer(name if name == "reference" else f"{name} (reference)", text) for name, text in references.items()]
    for name, record in records.items():
        (p,) = usable([record["preference"]])
        won = None if not p >= 1 else 1 if p > 1.5 else 0 if p < 1.5 else .5
        found.append(answer(name, record["output_2"], verdict(record), won))
    kinds = [record.get("dataset") for record in records.values() if record.get("dataset")]
    return {"asked": asked, "kind": kinds[0] if kinds else "", "answers": found}


# ---- annotators ----------------------------------------------------------------------------------------

def share(hits):
    """(percent, standard error) of an array of booleans."""
    return mean_and_error(100. * np.asarray(hits)) if len(hits) else (float("nan"), None)


def tastes(records):
    """What one annotator's verdicts say of it: how many `labels`, and how often it prefers output_2 (`second`), the
    answer that it was shown first (`first`), and the longer one (`longer`), with standard errors. Draws are left out.
    """
    p = usable([record["preference"] for record in records])
    decided = [(record, x > 1.5) for record, x in zip(records, p) if x >= 1 and x != 1.5]
    ordered = [(record["is_switched"], two) for record, two in decided if record.get("is_switched") is not None]
    longer = [(len(record["output_2"]) - len(record["output_1"]), two) for record, two in decided]
    return {"labels": len(decided), "second": share([two for _, two in decided]),
            "first": share([two == switched for switched, two in ordered]),
            "longer": share([(more > 0) == two for more, two in longer if abs(more) > LONGER])}


def annotators(run):
    """What is known of the annotators: from the verdicts on answers, and from the labels that were learned from."""
    judged = [record for records in run.models.values() for record in records]
    learned = [pair for stage in run.stages for pair in stage["pairs"] if pair.get("scored_by") != "coin"]
    parts = []
    for records, what, second in ((judged, "Verdicts on the models' answers", "prefers the model"),
                                  (learned, "Labels to learn from, without those that are coins", "prefers output 2")):
        by = {}
        for record in records:
            if record.get("annotator") and record["output_1"] != record["output_2"]:
                by.setdefault(record["annotator"], []).append(record)
        found = {name: tastes(by[name]) for name in sorted(by)}
        found = {name: row for name, row in found.items() if row["labels"]}
        if found:
            parts += [report.heading(what), in_figures(found, second)]
    return parts


def in_figures(found, second):
    """A figure and a table of {annotator: tastes()}; of one annotator alone, the table."""
    heads = ["annotator", "labels", f"{second} %", "prefers the first shown %", "prefers the longer %"]
    rows = [[name, row["labels"], *(tables.plus_minus(*row[key]) for key in ("second", "first", "longer"))]
            for name, row in found.items()]
    points = {name: (*(row[key][0] for key in ("first", "longer")), *(row[key][1] for key in ("first", "longer")))
              for name, row in found.items()}
    points = {name: point for name, point in points.items() if isfinite(point[0]) and isfinite(point[1])}
    if len(points) < 2:
        return report.table(heads, rows)
    svgs = [scatter(points, "Order and length", "prefers the answer shown first, in %",
                    "prefers the longer answer, in %"),
            bars({name: row["second"] for name, row in found.items()}, "Verdicts", f"{second}, in %",
                 references={"half": 50})]
    return report.figure(svgs, "Each annotator with standard errors over its labels. Without a taste for the order it "
                         "prefers the first answer in 50 % of the pairs. Length: pairs whose answers differ by more "
                         f"than {LONGER} characters.", heads, rows)


# ---- how it was made -----------------------------------------------------------------------------------

def said(value):
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def settings(run):
    """The settings of each stage of the first run, those that are not the defaults first."""
    parts = []
    for stage in run.stages:
        if stage["run"] != run.stages[0]["run"]:
            continue
        given = {key: value for key, value in stage["settings"].items() if key not in KEPT_ELSEWHERE}
        changed = [key for key in stage["settings"].get("changed", []) if key in given]
        own = ", ".join(f"{key} {said(given[key])}" for key in changed)
        rows = [[key, said(given[key])] for key in (*changed, *(key for key in given if key not in changed))]
        parts.append(report.details(f"{stage['name']}: {own or 'the defaults'}", report.table(["setting", ""], rows)))
    return parts


def cost(run):
    """Seconds, labels and distance of each stage; what the judge's models counted."""
    heads = ["stage", "seconds", "CPU s", "labels", "KL", "answers that ended", "tokens an answer"]
    rows = [costs_of(run.called(stage), stage["result"], stage["result"].get("metrics", {})) for stage in run.stages]
    known = [stage["result"]["seconds"] for stage in run.stages if "seconds" in stage["result"]]
    total = f"All stages: {sum(known):,.0f} seconds."
    parts = [report.table(heads, rows), report.prose(total, "faint")] if rows else []
    lines = [[model, row["replies"], row["prompt"], row["completion"], dollars(row)]
             for model, row in sorted(run.spent.items()) if row["prompt"] or row["dollars"] is None]
    if lines:
        parts += [report.heading("The judge"),
                  report.table(["model", "replies", "tokens of prompt", "tokens of replies", "cost"], lines),
                  report.prose("All replies in the judge's file, for labels and for verdicts.", "faint")]
    elif run.spent:
        replies = sum(row["replies"] for row in run.spent.values())
        parts.append(report.prose(f"The judge gave {replies:,} replies and counted no tokens: free.", "faint"))
    return parts


def costs_of(name, result, metrics):
    """A line of the table of costs."""
    ended = metrics.get("eval/finished")
    return [name, tables.number(result.get("seconds"), ",.1f"), tables.number(result.get("cpu_seconds"), ",.1f"),
            metrics.get("judge/asked"), tables.number(metrics.get("objective/kl"), ".2f"),
            "" if ended is None else f"{100 * ended:.0f} %", tables.number(metrics.get("eval/mean_length"), ".1f")]


def dollars(row):
    return "unknown" if row["dollars"] is None else f"${row['dollars']:.2f}"


def again(run):
    """The command, and what it ran on. A run folder may hold stages of earlier commands."""
    parts = [report.code(run.command)]
    if run.stages:
        parts.append(report.prose("The last command here. Stages that were there before it were reused: what made them "
                                  "is said under Settings.", "faint"))
    for stage in run.stages[:1]:
        made = stage["settings"]
        rows = [["day", made.get("day")], ["commit", made.get("commit")], ["model", made.get("model")],
                ["revision of the model", made.get("revision")], ["data", made.get("data")],
                *([f"hash of {what}", hash] for what, hash in made.get("contents", {}).items()),
                *([name, version] for name, version in made.get("versions", {}).items())]
        parts.append(report.table(["", ""], [row for row in rows if row[1]]))
    return parts


SECTIONS = {"Leaderboard": leaderboard, "Learning curves": learning, "Reward against KL": reward_and_kl,
            "Best of n": best_of_n, "Answers": answers, "Tokens": run_traces.tokens,
            "Rollouts": run_traces.rollouts, "The judge": run_traces.judge, "Annotators": annotators,
            "Settings": settings, "Cost": cost, "How to make it again": again}
