"""Win rates against AlpacaEval's published numbers, paired errors against a bootstrap, files read back."""
import csv
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from annotate import pool
from eval import COLUMNS, evaluate, leaderboard, paired_difference, win_rate

ALPACA_EVAL = Path(__file__).parents[2] / "shared" / "alpaca_eval"


@pytest.mark.skipif(not ALPACA_EVAL.exists(), reason="needs AlpacaEval's numbers")
@pytest.mark.parametrize("version, count", [("ae1", 26), ("ae2", 28)])
def test_published_rows_are_reproduced(version, count):
    published = json.loads((ALPACA_EVAL / f"leaderboard_{version}_shared.json").read_text())
    annotations = gzip.decompress((ALPACA_EVAL / f"annotations_{version}_shared.json.gz").read_bytes())
    models = json.loads(annotations)["models"]
    assert len(models) == len(published) == count
    for name, model in models.items():
        row = win_rate(model["preference"])
        for column in ("win_rate", "standard_error", "discrete_win_rate"):
            assert row[column] == pytest.approx(published[name][column], abs=1e-8), (name, column)
        for column in ("n_wins", "n_wins_base", "n_draws", "n_total"):
            assert row[column] == published[name][column], (name, column)


def test_a_row_by_hand():
    row = win_rate([1, 2, 2, 1.5, 0, 1.25])
    q = [0, 1, 1, .5, .5, .25]
    mean = sum(q) / 6
    error = (sum((x - mean) ** 2 for x in q) / 5 / 6) ** .5
    assert row == {"win_rate": pytest.approx(100 * mean), "standard_error": pytest.approx(100 * error),
                   "n_wins": 2, "n_wins_base": 2, "n_draws": 2, "n_total": 6,
                   "discrete_win_rate": pytest.approx(100 * 3 / 6)}
    assert all(type(value) in (int, float) for value in row.values())       # so that json can write it


def test_what_is_no_preference_counts_nowhere():
    assert win_rate([1, 2, None, float("nan"), 3, -1, 0.5, 2.0001]) == win_rate([1, 2])


@pytest.mark.filterwarnings("error")
def test_too_few_to_say():
    assert np.isnan(win_rate([])["win_rate"]) and win_rate([None])["n_total"] == 0
    assert win_rate([2])["win_rate"] == 100 and np.isnan(win_rate([2])["standard_error"])


def correlated_preferences(n, seed=0):
    """Two models on n instructions, some of which are easy for both."""
    r = np.random.default_rng(seed)
    ease = r.normal(0, .3, n)
    return (np.clip(1.5 + shift + ease + r.normal(0, .1, n), 1, 2) for shift in (.1, 0))


def test_paired_difference_is_the_difference_with_the_bootstrap_s_error():
    a, b = correlated_preferences(400)
    difference, error = paired_difference(a, b)
    assert difference == pytest.approx(win_rate(a)["win_rate"] - win_rate(b)["win_rate"])
    r = np.random.default_rng(1)
    rows = r.integers(0, 400, (4000, 400))
    bootstrap = 100 * (a[rows].mean(1) - b[rows].mean(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.05)
    unpaired = (win_rate(a)["standard_error"] ** 2 + win_rate(b)["standard_error"] ** 2) ** .5
    assert error < 0.6 * unpaired


def test_paired_difference_leaves_out_rows_unusable_in_either():
    with_holes = paired_difference([1, 2, None, 2, 0], [1, 1, 1, None, 2])
    assert with_holes == paired_difference([1, 2, 1.5], [1, 1, 2])
    assert paired_difference([2, 2], [2, 2]) == (0, 0)


class Prefers:
    """In place of a Judge: says what `choose(text shown as (a), text shown as (b))` returns."""

    def __init__(self, choose):
        self.choose, self.hits, self.max_unusable, self.fault, self.cache = choose, 0, 0.5, "", "no file"

    def complete(self, bodies):
        shown = r"<<<(\w+) output \(a\)\n(.*)\n\1>>>\n\n<<<\1 output \(b\)\n(.*)\n\1>>>"
        matches = (re.search(shown, body["messages"][-1]["content"], re.DOTALL) for body in bodies)
        return [self.choose(match[2], match[3]) for match in matches]


def outputs(generator, lengths):
    return [{"instruction": f"Sing {i}.", "output": "la" * n, "generator": generator, "dataset": "songs"}
            for i, n in enumerate(lengths)]


def test_evaluate_asks_whether_the_model_beats_the_reference():
    seen = []

    def longer(a, b):
        seen.append((a, b))
        return "Output (a)" if len(a) > len(b) else "Output (b)"

    ours, theirs = outputs("ours", [9, 9, 9, 1, 5] * 8), outputs("theirs", [2, 3, 4, 5, 5] * 8)
    row, annotations = evaluate(ours, theirs, pool("m"), Prefers(longer))
    assert row == {**win_rate([2, 2, 2, 1, 1.5] * 8), "avg_length": 13}     # 2 * 33 / 5 characters, cut
    assert [a["preference"] for a in annotations] == [2, 2, 2, 1, 1.5] * 8
    assert annotations[3].items() >= {"output_1": theirs[3]["output"], "generator_1": "theirs",
                                      "output_2": ours[3]["output"], "generator_2": "ours",
                                      "instruction": "Sing 3.", "dataset": "songs"}.items()
    assert len(seen) == 32 and {ours[0]["output"] == a for a, _ in seen[::4]} == {True, False}  # both orders


def test_average_length_is_over_unjudged_outputs_too():
    row, _ = evaluate(outputs("a", [1, 2, 3, 40]), outputs("b", [9] * 4), pool("m"),
                      Prefers(lambda a, b: "both" if 80 in (len(a), len(b)) else "Output (a)"))
    assert row["n_total"] == 3 and row["avg_length"] == 2 * 46 // 4


def test_evaluate_names_the_first_row_that_does_not_match():
    ours, theirs = outputs("ours", [1, 2, 3]), outputs("theirs", [1, 2, 3])
    theirs[1]["instruction"], theirs[2]["instruction"] = "Dance.", "Jump."
    with pytest.raises(ValueError, match="row 1: .*'Sing 1.'.*'Dance.'"):
        evaluate(ours, theirs, pool("m"), None)
    with pytest.raises(ValueError, match="3 outputs, but 2 reference outputs"):
        evaluate(ours, theirs[:2], pool("m"), None)


def make_row(wins, length, **extra):
    return {**win_rate([2] * wins + [1] * (100 - wins)), "avg_length": length, **extra}


def test_the_leaderboard_is_alpacaeval_s_csv_best_first(tmp_path):
    rows = {"sft, plain": make_row(40, 300), "ppo": make_row(60, 400), "dpo": make_row(55, 350)}
    table = leaderboard(rows, tmp_path / "leaderboard.csv")
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["", "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
                      "discrete_win_rate", "mode", "avg_length"] == ["", *COLUMNS]
    assert [line[0] for line in lines] == ["ppo", "dpo", "sft, plain"]
    for line in lines:
        cells = dict(zip(header, line))
        assert cells.pop("mode") == "community"
        row = rows[cells.pop("")]
        assert {name: type(row[name])(text) for name, text in cells.items()} == row     # to the last digit
    printed = table.splitlines()
    assert [line.split("  ")[0] for line in printed[2:]] == ["ppo", "dpo", "sft, plain"]
    assert "60.00" in printed[2] and "4.92" in printed[2] and "400" in printed[2]
    assert len({len(line) for line in printed}) == 1


def test_differences_to_the_baseline_come_after_alpacaeval_s_columns(tmp_path):
    rows = {"sft": make_row(40, 300), "ppo": make_row(60, 400, diff_sft=20.0, diff_sft_standard_error=3.5)}
    table = leaderboard(rows, tmp_path / "leaderboard.csv")
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][-2:] == ["diff_sft", "diff_sft_standard_error"]
    assert [line[-2:] for line in lines[1:]] == [["20.0", "3.5"], ["", ""]]
    assert "+20.00" in table and "3.50" in table
