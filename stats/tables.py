"""Numbers as text: the leaderboard in AlpacaEval's CSV, tables for the terminal, report.json."""
import csv
import json

import numpy as np

COLUMNS = ["win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode",
           "avg_length", "length_controlled_winrate", "lc_standard_error"]      # AlpacaEval's, in its order
EXTRA = ["lc_name",                                                             # ours: AlpacaEval's name of the fit,
         "win_rate_ci_low", "win_rate_ci_high", "lc_ci_low", "lc_ci_high",      # bootstrap intervals,
         "n_unusable", "n_missing", "win_rate_if_lost", "win_rate_if_won",      # what was left out,
         "diff_sft", "diff_sft_standard_error",                                 # points over the SFT model,
         "true_reward"]                                                         # what only the offline world knows
MANY = 12                               # models: more of them, and the terminal shows only the most important tables


def table(*lines):
    """Lines of cells, the first is the header, in columns: the first to the left, others to the right, none empty."""
    lines = [["".join(c if c.isprintable() else "?" for c in cell) for cell in line] for line in lines]
    lines = list(zip(*(column for column in zip(*lines) if any(column[1:]))))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in lines]
    return "\n".join(line.rstrip() for line in [text[0], "-" * len(text[0]), *text[1:]])


def number(x, form=".2f"):
    return "" if x is None or x != x else format(x, form)


def between(low, high, form=".1f"):
    return "" if low is None or low != low else f"{low:{form}} to {high:{form}}"


def plus_minus(row):
    error = number(row["standard_error"], ".1f")
    return number(row["win_rate"], ".1f") + (f" ± {error}" if error else "")


def best_first(rows):
    """{name: row} by win rate, those without one last."""
    return dict(sorted(rows.items(), key=lambda item: -np.nan_to_num(item[1]["win_rate"], nan=-1)))


def leaderboard(rows, path):
    """Write {name: row} as AlpacaEval's leaderboard CSV, best first; returns a table for the terminal."""
    ranked = best_first(rows).items()
    extra = [column for column in EXTRA if any(column in row for row in rows.values())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["", *COLUMNS, *extra], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"": name, **row} for name, row in ranked)

    lines = [["model", "win rate", "error", "LC", "error", "LC 95 %", "length", "n", "left out", "if lost, won",
              "vs sft", "error", "true reward"]]
    for name, row in ranked:
        out = row.get("n_unusable", 0) + row.get("n_missing", 0)
        lines.append([name, number(row["win_rate"]), number(row["standard_error"]),
                      number(row.get("length_controlled_winrate")), number(row.get("lc_standard_error")),
                      between(row.get("lc_ci_low"), row.get("lc_ci_high")), str(row["avg_length"]),
                      str(row["n_total"]), str(out or ""),
                      between(row["win_rate_if_lost"], row["win_rate_if_won"]) if out else "",
                      number(row.get("diff_sft"), "+.2f"), number(row.get("diff_sft_standard_error")),
                      number(row.get("true_reward"))])
    return table(*lines)


def judges(rows):
    """A table of {judge: row of stats.agreement.judge_report}."""
    columns = {"agrees": "Human agreement", "error": "Human agreement error", "bias": "Bias", "variance": "Variance",
               "repeats": "Repeatability", "longer": "Proba. prefer longer", "$/1000": "Price [$/1000 examples]"}
    lines = [[name, *(number(row[key], ".2f" if short in ("$/1000", "longer") else ".1f")
                      for short, key in columns.items())] for name, row in rows.items()]
    return table(["judge", *columns], *lines)


def plain(x):
    """For JSON, which knows no NaN: null."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and x != x else x


def write(result, out):
    """leaderboard.csv, and the whole of eval.report in report.json, in the folder `out`; returns the leaderboard."""
    (out / "report.json").write_text(json.dumps(plain(result), indent=1, allow_nan=False))
    return leaderboard(result["rows"], out / "leaderboard.csv")


def details(result):
    """What eval.report says beyond the leaderboard, as text."""
    parts = [("on the same prompts, in points (clustered: the error if prompts of one data set are alike)", [
        ["", "n", "difference", "error", "95 %", "clustered", "better", "worse", "McNemar p", "prompts needed"],
        *([f"{row['a']} over {row['b']}", str(row["n"]),
           number(row["difference"], "+.2f"), number(row["standard_error"]),
           between(row["ci_low"], row["ci_high"], "+.1f"), number(row.get("clustered_standard_error")),
           str(row["n_better"]), str(row["n_worse"]), number(row["mcnemar_p"], ".2g"),
           number(row["prompts_needed"], ",d")] for row in result["compared"])])]
    if len(result["rows"]) <= MANY:
        by_dataset, matrix = result["by_dataset"], result["matrix"] or {"names": [], "win_rate": [], "predicted": []}
        parts += [
            ("win rate by data set", [
                ["data set", *by_dataset],
                *([dataset, *(plus_minus(rows[dataset]) for rows in by_dataset.values())]
                  for dataset in next(iter(by_dataset.values()), ()))]),
            ("win rate by the place of the answer (as AlpacaEval draws it, where the file does not say)", [
                ["model", "shown first", "second", "gap", "error"],
                *([name, *(number(row[key]) for key in ("shown_first", "shown_second", "gap", "standard_error"))]
                  for name, row in result["position"].items())]),
            ("asked in both orders: % of verdicts that turn with it, % of those that go to what is first", [
                ["model", "turned", "error", "to the first"],
                *([name, *(number(row[key]) for key in ("flip_rate", "standard_error", "first"))]
                  for name, row in result["flips"].items())]),
            ("Bradley-Terry ratings on Elo's scale", [
                ["model", "Elo", "95 %", "rank", "95 %"],
                *([row["model"], number(row["elo"], ".0f"), between(row["ci_low"], row["ci_high"], ".0f"),
                   number(row["rank"], "d"), between(row["rank_low"], row["rank_high"], "d")]
                  for row in result["ratings"])]),
            ("win rate of row over column (~: never met, predicted by the ratings)", [
                ["", *matrix["names"]],
                *([name, *("" if i == j else number(won, ".1f") or f"{number(predicted, '.1f')}~"
                           for j, (won, predicted) in enumerate(zip(matrix["win_rate"][i], matrix["predicted"][i])))]
                  for i, name in enumerate(matrix["names"]))])]
    shown = [f"{title}:\n\n{table(*lines)}" for title, lines in parts if len(lines) > 1]
    if len(result["rows"]) > MANY:
        shown.append("data sets, positions, ratings and who beats whom are in report.json")
    return "\n\n".join(shown)
