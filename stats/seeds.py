"""Several trainings that differ in the seed: the mean over them, and their spread.

A standard error over prompts says how much a win rate would change with other prompts. It does not say how much it
would change if the model were trained again. The spread does: it is the standard deviation over the seeds.
"""
from math import nan

import numpy as np

from stats.ranking import best_first, to_compare
from stats.winrate import compare

AVERAGED = ("win_rate", "standard_error", "discrete_win_rate", "avg_length", "length_controlled_winrate",
            "lc_standard_error", "diff_start", "diff_start_standard_error", "expected_win_rate",
            "expected_standard_error", "true_reward", "kl", "cpu_seconds", "judge_calls")
ADDED = ("n_wins", "n_wins_base", "n_draws", "n_total", "n_unusable", "n_missing")
SPREAD = ("win_rate", "length_controlled_winrate", "avg_length", "diff_start", "expected_win_rate", "true_reward")


def mean_and_spread(x):
    """Mean of x (N,) and its standard deviation (n - 1); NaN where N is too small to say."""
    return float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else nan


def mean_row(rows):
    """The row of a method from its rows in N runs: means, counts added up, and the spread of what matters most.

    standard_error is the mean of the runs' standard errors, so it is about the choice of prompts, as theirs are.
    """
    row = {"mode": rows[0]["mode"], "n_runs": len(rows)}
    row |= {key: sum(each[key] for each in rows) for key in ADDED}
    row |= next(({"lc_unknown": each["lc_unknown"]} for each in rows if "lc_unknown" in each), {})
    for key in AVERAGED:
        if all(key in each for each in rows):
            row[key], spread = mean_and_spread([each[key] for each in rows])
            if key in SPREAD:
                row[f"{key}_spread"] = spread
    return row


def mean_difference(a, b):
    """Is method a better than b? Both {seed: preferences (N,)} on the same prompts, compared within each seed.

    standard_error is the mean over the seeds of the errors over prompts; n_ahead counts the seeds in which a is
    better; by_seed has each comparison. None if they have no seed in common.
    """
    by_seed = {seed: compare(a[seed], b[seed]) for seed in a if seed in b}
    if not by_seed:
        return None
    differences = [row["difference"] for row in by_seed.values()]
    mean, spread = mean_and_spread(differences)
    return {"n_runs": len(by_seed), "difference": mean, "difference_spread": spread,
            "standard_error": float(np.mean([row["standard_error"] for row in by_seed.values()])),
            "n_ahead": sum(difference > 0 for difference in differences), "by_seed": by_seed}


def over_runs(result, preferences, labels, methods, baseline=""):
    """eval.report of single runs, averaged over the seeds of each method; a dict that JSON can hold.

    preferences {name: (N,)} on the same prompts and labels {name: what its run is called}, of the runs in `result`;
    methods {method: {seed: name}}. Methods are compared within a seed only: all with the baseline, or each with the
    next.

    rows        {method: mean_row}, best first
    runs        {name: row of eval.report}, with its `run` and its `seed`, in the order of rows
    methods     in the order of rows
    compared    [{a, b, and mean_difference}]
    by_dataset, position and flips are those of eval.report, of single runs.
    """
    rows = best_first({method: mean_row([result["rows"][name] for name in names.values()])
                       for method, names in methods.items()})
    methods = {method: methods[method] for method in rows}
    runs = {name: {**result["rows"][name], "run": labels[name], "seed": seed}
            for names in methods.values() for seed, name in names.items()}
    compared = []
    for a, b in to_compare(rows, baseline):
        a_by_seed, b_by_seed = ({seed: preferences[name] for seed, name in methods[x].items()} for x in (a, b))
        if found := mean_difference(a_by_seed, b_by_seed):
            compared.append({"a": a, "b": b, **found})
    return {"rows": rows, "runs": runs, "methods": methods, "compared": compared,
            **{key: result[key] for key in ("by_dataset", "position", "flips")}}
