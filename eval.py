"""Win rates and their errors, leaderboard: AlpacaEval's statistics and files, in numpy.

A preference lies in [1, 2]: at 1 the reference is better, at 2 the model; 1.5 (or 0, in old files) is a draw.
A standard error is about the choice of instructions; of the noise between two trainings it knows nothing.
Left out: the length-controlled win rate, asking both orders, agreement between judges.
"""
import csv

import numpy as np

from annotate import annotate

COLUMNS = ["win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate",
           "mode", "avg_length"]                        # AlpacaEval's, in its order
EXTRA = ["diff_sft", "diff_sft_standard_error",        # ours: points of win rate over the SFT model,
         "true_reward"]                                 # and what only the offline world can know


def usable(preferences):
    """Preferences (N,) as floats: 0 becomes 1.5, what is no number in [1, 2] becomes NaN."""
    p = np.array(preferences, dtype=float)              # None becomes NaN
    p[p == 0] = 1.5
    p[~((p >= 1) & (p <= 2))] = np.nan
    return p


def mean_and_error(x):
    """Mean of x (N,) and its standard error; NaN where N is too small to say."""
    mean = x.mean() if len(x) else np.nan
    error = x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return float(mean), float(error)


def win_rate(preferences):
    """AlpacaEval's row for one model, in percent; unusable preferences count nowhere, not even in n_total."""
    p = usable(preferences)
    p = p[~np.isnan(p)]
    mean, error = mean_and_error(100 * (p - 1))
    discrete, _ = mean_and_error(100 * np.where(p == 1.5, 0.5, p.round() - 1))
    wins, losses, draws = (int(x.sum()) for x in (p > 1.5, p < 1.5, p == 1.5))
    return {"win_rate": mean, "standard_error": error, "n_wins": wins, "n_wins_base": losses,
            "n_draws": draws, "n_total": len(p), "discrete_win_rate": discrete}


def paired_difference(preferences_a, preferences_b):
    """(win rate of a - win rate of b, its standard error), in points, for the same instructions in one order.

    Rows unusable in either are left out. What makes an instruction easy for both models cancels, so the error
    is usually smaller than the errors of the two win rates suggest.
    """
    difference = usable(preferences_a) - usable(preferences_b)
    return mean_and_error(100 * difference[~np.isnan(difference)])


def evaluate(outputs, reference, annotators, judge, seed=0):
    """Judge a model's outputs against the reference's -> (leaderboard row, annotations).

    Both are lists of {instruction, output, generator, optional input and dataset} on the same instructions in
    the same order; ValueError names the first that differs.
    """
    if len(outputs) != len(reference):
        raise ValueError(f"{len(outputs)} outputs, but {len(reference)} reference outputs")
    pairs = []
    for i, (ours, theirs) in enumerate(zip(outputs, reference)):
        if any(ours.get(key, "") != theirs.get(key, "") for key in ("instruction", "input")):
            raise ValueError(f"row {i}: the output answers {ours['instruction']!r}, "
                             f"the reference {theirs['instruction']!r}")
        asked = {key: ours[key] for key in ("instruction", "input", "dataset") if key in ours}
        pairs.append({**asked, "output_1": theirs["output"], "generator_1": theirs["generator"],
                      "output_2": ours["output"], "generator_2": ours["generator"]})
    annotations = annotate(pairs, annotators, judge, seed)
    row = win_rate([annotation["preference"] for annotation in annotations])
    # Over all outputs, judged or not. In characters, as AlpacaEval counts: tokens would depend on the model.
    return {**row, "avg_length": int(np.mean([len(output["output"]) for output in outputs]))}, annotations


def leaderboard(rows, path):
    """Write {name: row} as AlpacaEval's leaderboard CSV, best first; returns a table for the terminal."""
    ranked = sorted(rows.items(), key=lambda item: -item[1]["win_rate"])
    extra = [column for column in EXTRA if any(column in row for row in rows.values())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["", *COLUMNS, *extra])
        writer.writeheader()
        for name, row in ranked:
            cells = {"": name, "mode": "community", **row}
            writer.writerow({column: cells.get(column, "") for column in writer.fieldnames})

    width = max(len(name) for name in ["model", *rows])
    lines = [f"{'model':{width}}  win rate   error   length      n"
             + "   vs sft   error" * ("diff_sft" in extra) + "  true reward" * ("true_reward" in extra)]
    lines.append("-" * len(lines[0]))
    for name, row in ranked:
        line = (f"{name:{width}}  {row['win_rate']:8.2f}  {row['standard_error']:6.2f}"
                f"  {row['avg_length']:7}  {row['n_total']:5}")
        if "diff_sft" in extra:
            line += (f"  {row['diff_sft']:+7.2f}  {row['diff_sft_standard_error']:6.2f}" if "diff_sft" in row
                     else " " * 17)
        if "true_reward" in row:
            line += f"  {row['true_reward']:11.2f}"
        lines.append(line.rstrip())
    return "\n".join(lines)
