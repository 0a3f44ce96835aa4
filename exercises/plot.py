"""A figure of what runs have logged, as an SVG file that a browser shows.

python -m exercises.plot runs/barn/dpo runs/barn/dpo_b1 --y rewards/margins
    a curve for each stage: a metric by step, or with --x by another metric;
    of best-of-n by n; PPO has val_score, val_kl and, where it was run with
    --snapshots in the offline world, true_reward at its looks at val, too
python -m exercises.plot runs/barn --x kl --y win_rate
    a point for each model of a run folder: columns of its leaderboard.csv
"""
import csv
from pathlib import Path

import numpy as np

from data import InputError, one_of, run, run_folders
from data.alpaca_eval import question
from data.barn.reward import true_reward
from data.flags import Parser
from stats import plots

ERRORS = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error",
          "expected_win_rate": "expected_standard_error", "diff_start": "diff_start_standard_error"}


def column(rows):
    """{metric: values (N,)} of N dicts. NaN where a dict has no number."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name) for row in rows], float) for name in names}


def looks(folder):
    """What PPO has seen at its looks at val, and the true reward of the answers to the eval split if it has kept them
    (--snapshots, in the offline world)."""
    rows = []
    for sample in run_folders.json_lines(folder / "samples.jsonl"):
        if "val_score" in sample:
            rows.append({name: sample[name] for name in ("step", "val_score", "val_kl")})
            answers = run_folders.document(folder / f"outputs_{sample['step'] + 1}.json", [])
            if answers and run_folders.settings(folder)["data"] == "barn":
                worth = [true_reward(question(answer), answer["output"]) for answer in answers]
                rows[-1]["true_reward"] = sum(worth) / len(worth)
    return column(rows)


def named(folders):
    """{name: folder}. A name is the end of the folder's path: its run and its stage, and more if they are alike."""
    paths, found, parts = {folder.resolve(): folder for folder in folders}, {}, 2
    while len(found) < len(paths):
        found = {"/".join(path.parts[-parts:]): folder for path, folder in paths.items()}
        parts += 1
    return found


def curve(folder, x, y):
    """(x, y) of a stage; x "" is the step, or n."""
    if not run_folders.settings(folder):
        raise InputError(f"{folder} is no stage of a run")
    best = run_folders.document(folder / "curve.json", {})
    found = [column(run_folders.json_lines(folder / "metrics.jsonl")), looks(folder),
             {name: np.array(values, float) for name, values in best.items()}]
    one_of(f"--y of {folder}", y, list(dict.fromkeys(name for table in found for name in table)))
    table = next(table for table in found if y in table)
    x = x or next(iter(table))
    one_of(f"--x of {folder}", x, table)
    return table[x], table[y]


def points(board, x, y):
    """{model: (x, y, error of x, error of y)} of a leaderboard.csv."""
    with open(board, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for flag, name in (("--x", x), ("--y", y)):
        one_of(flag, name, [name for name in rows[0] if name])
    numbers = {row[""]: [float(row[name] or "nan") if name in row else None
                         for name in (x, y, ERRORS.get(x), ERRORS.get(y))] for row in rows}
    return {name: row for name, row in numbers.items() if np.isfinite(row[:2]).all()}


def main(argv):
    parser = Parser("exercises.plot", __doc__)
    parser.add("folders", nargs="+", type=Path, metavar="FOLDER", help="stages of runs, or one run folder")
    parser.add("--y", required=True, metavar="METRIC", help="what is shown, as in metrics.jsonl or leaderboard.csv")
    parser.add("--x", default="", metavar="METRIC", help="against what (default: the step, or n)")
    parser.add("--out", type=Path, default=Path("plot.svg"), metavar="FILE", help="where the figure goes")
    args = parser.parse(argv)
    board = args.folders[0] / "leaderboard.csv"
    if board.exists():
        if len(args.folders) > 1 or not args.x:
            raise InputError(f"{args.folders[0]} is a run folder: give it alone, with --x and --y, or name its stages")
        svg = plots.scatter(points(board, args.x, args.y), f"{args.y} by {args.x}", args.x, args.y)
    else:
        series = {name: curve(folder, args.x, args.y) for name, folder in named(args.folders).items()}
        svg = plots.lines(series, f"{args.y} by {args.x or 'step'}", args.x or "step", args.y)
    args.out.write_text(svg, encoding="utf-8")
    print(f"{args.out} shows it; a browser opens it")


if __name__ == "__main__":
    run(main, "exercises.plot", "nothing is changed by it")
