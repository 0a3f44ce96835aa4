"""Statistics against AlpacaEval's published numbers, brute force, closed forms, and simulations with a known truth."""
import csv
import gzip
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from quick import few

from data.alpaca_eval import read_column, read_length_control
from stats import agreement, length, ranking, tables, winrate
from stats.length import fit, length_controlled, predicted
from stats.seeds import mean_row
from stats.winrate import paired_difference, usable, win_rate

ROOT = Path(__file__).parents[1]
ALPACA_EVAL = ROOT.parent / "shared" / "alpaca_eval"
needs_alpaca_eval = pytest.mark.skipif(not ALPACA_EVAL.exists(), reason="needs AlpacaEval's numbers")


def read(name):
    return json.loads(gzip.decompress((ALPACA_EVAL / name).read_bytes()))


def published(version):
    """{model: (preferences, lengths, reference lengths, index of its instructions, published row)}."""
    rows = json.loads((ALPACA_EVAL / f"leaderboard_{version}_shared.json").read_text())
    annotations = read(f"annotations_{version}_shared.json.gz")
    found = {}
    for name, model in annotations["models"].items():
        index = np.array(model.get("instruction_index", range(805)))
        theirs = np.array(model.get("len_output_1", annotations["len_output_1"]))
        theirs = theirs if len(theirs) == len(index) else theirs[index]
        found[name] = model["preference"], np.array(model["len_output_2"]), theirs, index, rows[name]
    return found


# ---- win rates -----------------------------------------------------------------------------------------

@needs_alpaca_eval
@pytest.mark.parametrize("version, count", [("ae1", 26), ("ae2", 28)])
def test_published_rows_are_reproduced(version, count):
    models = published(version)
    assert len(models) == count
    for name, (preferences, *_, expected) in models.items():
        row = win_rate(preferences)
        for column in ("win_rate", "standard_error", "discrete_win_rate"):
            assert row[column] == pytest.approx(expected[column], abs=1e-8), (name, column)
        for column in ("n_wins", "n_wins_base", "n_draws", "n_total"):
            assert row[column] == expected[column], (name, column)


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


def test_what_was_left_out_bounds_the_win_rate():
    judged = [2, 1, 1.5, 1.25, None, 3, float("nan")]
    row = winrate.left_out(judged, n_missing=2)
    assert (row["n_unusable"], row["n_missing"]) == (3, 2)
    for bound, verdict in (("win_rate_if_lost", 1), ("win_rate_if_won", 2)):
        assert row[bound] == pytest.approx(win_rate(judged[:4] + 5 * [verdict])["win_rate"])


@pytest.mark.filterwarnings("error")
def test_too_few_to_say():
    assert np.isnan(win_rate([])["win_rate"]) and win_rate([None])["n_total"] == 0
    assert win_rate([2])["win_rate"] == 100 and np.isnan(win_rate([2])["standard_error"])
    assert np.isnan(winrate.left_out([])["win_rate_if_lost"])
    assert np.isnan(winrate.compare([None], [2], winrate.resample(1, 9), ["a"])["difference"])


# ---- errors and comparisons ----------------------------------------------------------------------------

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
    bootstrap = 100 * (a[rows].mean(1) - b[rows].mean(1))
    assert error == pytest.approx(bootstrap.std(), rel=0.05)
    unpaired = (win_rate(a)["standard_error"] ** 2 + win_rate(b)["standard_error"] ** 2) ** .5
    assert error < 0.6 * unpaired
    row = winrate.compare(a, b, winrate.resample(400, 4000))
    assert (row["difference"], row["standard_error"]) == (difference, error)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(np.quantile(bootstrap, (.025, .975)), abs=.15)


def test_paired_difference_leaves_out_rows_unusable_in_either():
    with_holes = paired_difference([1, 2, None, 2, 0], [1, 1, 1, None, 2])
    assert with_holes == paired_difference([1, 2, 1.5], [1, 1, 2])
    assert paired_difference([2, 2], [2, 2]) == (0, 0)


def test_mcnemar_by_enumeration():
    """Under the hypothesis each discordant prompt is a fair coin: count the outcomes at least as lopsided."""
    for better, worse in ((0, 0), (1, 0), (3, 1), (2, 8), (5, 5), (0, 10)):
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=better + worse)]
        lopsided = [abs(2 * wins - better - worse) >= abs(better - worse) for wins in outcomes]
        assert winrate.mcnemar(better, worse) == pytest.approx(sum(lopsided) / len(lopsided))
    row = winrate.compare([2, 2, 1, 1.5, 1.9, None, 1.9], [1, 2, 2, 1, 1.1, 2, 1.8])       # two wins are no difference
    assert (row["n_better"], row["n_worse"], row["n"]) == (3, 1, 6) and row["mcnemar_p"] == winrate.mcnemar(3, 1)


def test_many_comparisons_are_corrected_for():
    assert winrate.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])       # .005 * 4, .01 * 3, .03 * 2
    assert winrate.holm([.04]) == .04 and winrate.holm([]).tolist() == [] and max(winrate.holm([.6, .9])) == 1


def test_holm_rejects_what_every_set_of_comparisons_rejects():
    """Closed testing: a difference is believed if Bonferroni rejects each set of comparisons that has it in it."""
    r = np.random.default_rng(0)
    for m in (2, 3, 5):
        p = r.random(m) ** 3
        sets = [each for size in range(1, m + 1) for each in itertools.combinations(range(m), size)]
        worst = [max(min(1, len(each) * min(p[list(each)])) for each in sets if i in each) for i in range(m)]
        assert winrate.holm(p) == pytest.approx(worst)


def test_prompts_of_one_kind_that_are_all_alike_count_once():
    means = np.array([10., 35., 80., 50.])
    assert winrate.clustered_error(np.repeat(means, 25), np.repeat(list("abcd"), 25)) == pytest.approx(
        winrate.mean_and_error(means)[1])
    x = np.random.default_rng(0).normal(size=4000)          # and if each is a cluster of its own, nothing changes
    assert winrate.clustered_error(x, np.arange(4000)) == pytest.approx(winrate.mean_and_error(x)[1])
    assert np.isnan(winrate.clustered_error(x, ["one"] * 4000))


def test_so_many_prompts_find_a_difference_four_times_in_five():
    n = winrate.prompts_needed(5, 40)
    x = np.random.default_rng(0).normal(5, 40, (4000, n))
    found = np.abs(x.mean(1)) > 1.96 * x.std(1, ddof=1) / n ** .5
    assert found.mean() == pytest.approx(.8, abs=.025)
    assert winrate.detectable_difference(n, 40) == pytest.approx(5, abs=.01)
    assert winrate.prompts_needed(0, 40) is None


def covered(low, high, truth):
    """How often intervals contain the truth, in percent."""
    return 100 * np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize("rate, n", few([(.5, 805), (.1, 805), (.5, 100), (.03, 200), (.03, 805), (.98, 805)],
                                        (.5, 100), (.98, 805)))
@pytest.mark.parametrize("soft", [False, True])
def test_bootstrap_intervals_of_a_win_rate_cover_the_truth(rate, n, soft):
    r = np.random.default_rng(5)
    data = r.beta(rate / 2, (1 - rate) / 2, (2000, n)) if soft else r.random((2000, n)) < rate
    means = 100 * (winrate.resample(n, 1000) @ data.T / n)                                      # (1000, 2000)
    both = [winrate.rate_interval(100 * one.mean(), means[:, i], n) for i, one in enumerate(data)]
    assert 93 <= covered(*np.array(both).T, 100 * rate) <= 97


@pytest.mark.parametrize("n", [200, 805])
def test_bootstrap_intervals_of_a_difference_cover_the_truth(n):
    r, counts = np.random.default_rng(6), winrate.resample(n, 1000)
    ease = r.random((2000, n))                              # some instructions are easy for both models
    a, b = (1. + (r.random((2000, n)) < .7 * ease + bonus) for bonus in (.15, .1))
    both = np.array([winrate.interval(row) for row in 100 * ((a - b) @ counts.T / n)])
    assert 93 <= covered(*both.T, 5) <= 97


def test_a_rate_that_no_resample_can_leave_has_the_exact_bound():
    low, high = winrate.rate_interval(100, np.full(9, 100.), 20)
    assert high == 100 and (low / 100) ** 20 == pytest.approx(.025)        # so lucky is one model in forty
    assert winrate.rate_interval(0, np.zeros(9), 20) == (0, pytest.approx(100 - low))


def test_resamples_draw_each_row_equally_often_and_missing_rows_nowhere():
    counts = winrate.resample(50, 2000)
    assert (counts.sum(1) == 50).all() and counts.mean(0) == pytest.approx(1, abs=.1)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=.05)               # binomial
    x = np.arange(50.)
    x[10:] = np.nan
    assert winrate.resampled_means(x, counts).mean() == pytest.approx(4.5, abs=.1)


def test_a_judge_that_likes_what_it_sees_first():
    r = np.random.default_rng(0)
    better, switched = r.random(4000) < .6, r.random(4000) < .5
    biased = r.random(4000) < .2                            # of the verdicts goes to the answer that is shown first
    p = 1. + np.where(biased, switched, better)
    row = winrate.position_gap(p, switched)
    assert row["gap"] == pytest.approx(-20, abs=3 * row["standard_error"]) and row["standard_error"] < 2
    both = np.stack([1. + np.where(biased, shown_first, better) for shown_first in (0, 1)], 1)
    flips = winrate.position_flips(both.tolist() + [[None, 2]])
    assert (flips["n"], flips["first"]) == (4000, 100)
    assert flips["flip_rate"] == pytest.approx(20, abs=3 * flips["standard_error"])


# ---- length control ------------------------------------------------------------------------------------

def optimal(w, X, y, weight, C, tolerance=1e-3):
    """Is 0 a subgradient of |w|_1 + C sum weight log_loss at w?"""
    p = 1 / (1 + np.exp(-w @ X))
    slope = C * ((p - y) * weight) @ X.T
    return all(abs(s + np.sign(x)) < tolerance * C ** .5 if x else abs(s) <= 1 + tolerance for s, x in zip(slope, w))


@pytest.mark.parametrize("C", [1e-4, 6e-3, .05, .4, 3, 100, 1e4])
def test_the_fit_is_where_the_penalised_loss_has_no_slope(C):
    r = np.random.default_rng(0)
    X = np.stack([np.tanh(r.normal(.5, 1, 300)), r.normal(0, 1.5, 300), np.ones(300)])
    y = 1 / (1 + np.exp(-(np.array([-1.5, .6, .3]) @ X + r.normal(0, 1, 300))))
    weight = r.choice([.1, 1], (2, 300))
    both = fit(X[:1], X[1:], y, weight, np.array([C, 2 * C]))
    for w, c, one in zip(both, (C, 2 * C), weight):
        assert optimal(w, X, y, one, c)
        assert fit(X[:1], X[1:], y, one[None], c)[0] == pytest.approx(w, abs=1e-5)       # alone as in company
    if C == 1e-4:
        assert (both == 0).all()                            # so strong a penalty leaves nothing


def test_the_fit_is_right_where_newton_alone_runs_away():
    """Few rows, all of them won, a feature that hardly varies: no candidate near the solution has a lower loss."""
    r = np.random.default_rng(0)

    def loss(w, X, y, C):
        return np.abs(w).sum(-1) / C + (np.logaddexp(0, w @ X) - y * (w @ X)).sum(-1)

    for i in range(120):
        n, C = r.choice([5, 12, 40, 300]), 10 ** r.uniform(-2, 4)
        X = np.stack([np.tanh(r.normal(1.5 * r.normal(), r.choice([.01, .3, 1]), n)), r.normal(0, 1.5, n), np.ones(n)])
        y = [r.choice([0, .5, 1], n), r.random(n), np.ones(n)][i % 3]
        (w,) = fit(X[:1], X[1:], y, np.ones((1, n)), C)
        candidates = w + r.normal(size=(2000, 3)) * 10 ** r.uniform(-4, 1, (2000, 1)) * (r.random((2000, 3)) < .6)
        candidates[:20] = w * (r.random((20, 3)) < .5)
        assert loss(w, X, y, C) <= loss(candidates, X, y, C).min() + 1e-9, (i, n, C)


@pytest.mark.filterwarnings("error")
def test_a_fit_without_a_finite_optimum_stays_finite():
    won = length_controlled([2] * 30, range(30), [9] * 30)
    assert 99 < won["length_controlled_winrate"] <= 100 and won["lc_standard_error"] < 1
    even = length_controlled([2, 1] * 30, [7] * 60, [7] * 60, counts=winrate.resample(60, 200))     # equal lengths
    assert even["length_controlled_winrate"] == pytest.approx(50)
    assert even["lc_standard_error"] == pytest.approx(50 / 60 ** .5, abs=1)
    assert length_controlled([None, None], [1, 2], [3, 4]) == {}
    gap = np.where(np.arange(60) < 30, 20, -20)             # the longer one wins, always: only length is seen
    assert length_controlled(1 + (gap < 0), 100 - gap, [100] * 60)["length_controlled_winrate"] == pytest.approx(50)


N = np.arange(40)
UNTOLD = {                                              # preferences, lengths, reference lengths, why not
    "eight of eight won": ([2] * 8, N[:8] * 9, [30] * 8, "every answer has won"),
    "all lost": ([1] * 40, N, [20] * 40, "every answer has lost"),
    "all drawn": ([1.5] * 40, N, [20] * 40, "all verdicts are the same"),
    "the longer one wins": (1 + N % 2, 300 * (N % 2) + N, [150] * 40, "the fit separates"),
    "the shorter one wins": (2 - N % 2, 300 * (N % 2) + N, [150] * 40, "the fit separates"),
    "but once": (np.where(N == 7, 1, 1 + N % 2), 300 * (N % 2) + N, [150] * 40, "a few rows"),
    "or half of it": (np.where(N == 7, 1.5, 1 + N % 2), 300 * (N % 2) + N, [150] * 40, "a few rows"),
    "but ten times": (np.where(N % 4 == 0, 2 - N % 2, 1 + N % 2), 300 * (N % 2) + N, [150] * 40, ""),
    "longer, all": (1 + N % 2, 300 + N * 7 % 40, [9] * 40, "every answer is longer"),
    "shorter, all": (1 + N % 2, N * 7 % 40, [90] * 40, "every answer is shorter"),
    "one is as long": (1 + N % 2, N * 7 % 40, [39] * 40, "a few rows"),
    "five are longer": (1 + N % 2, N * 7 % 40, [35] * 40, ""),
    "six rows": ([1, 2] * 3, 11 * N[:6], [30] * 6, "a few rows"),
    "all as long": (1 + N % 2, [20] * 40, [20] * 40, ""),
}


@pytest.mark.parametrize("p, ours, theirs, why", UNTOLD.values(), ids=UNTOLD)
def test_a_controlled_rate_that_only_the_penalty_decides_on_cannot_be_told(p, ours, theirs, why):
    """What the annotations determine does not change with the strength of the penalty; the rest does."""
    row = length_controlled(p, ours, theirs, counts=winrate.resample(len(p), 200))
    assert row.get("lc_unknown", "").startswith(why) and ("lc_unknown" in row) == bool(why)
    assert ("length_controlled_winrate" in row) == ("lc_ci_low" in row) == (not why)
    weak, weaker = (length_controlled(p, ours, theirs, C=C)["lc_weights"] for C in (1e4, 1e6))
    if why.startswith(("every answer has", "the fit")):
        assert np.abs(weaker).max() > 1.2 * np.abs(weak).max()
    elif not why:
        assert weaker == pytest.approx(weak, rel=.05, abs=.05)


@pytest.mark.parametrize("name", [name for name, (*_, why) in UNTOLD.items() if why in ("", "a few rows")])
def test_a_few_rows_decide_where_more_than_one_resample_in_twenty_cannot_be_told(name):
    p, ours, theirs = map(np.array, UNTOLD[name][:3])
    drawn = [np.repeat(np.arange(len(p)), row.astype(int)) for row in winrate.resample(len(p), 200)]
    alone = [length_controlled(p[i], ours[i], theirs[i], counts=np.ones((2, len(i)))) for i in drawn]
    untold = np.mean(["lc_unknown" in row for row in alone])
    assert (untold > .05) == (UNTOLD[name][-1] != "")


def test_the_gamed_baseline_can_tell_what_length_does():
    p, ours, theirs, _ = UNTOLD["longer, all"]
    gaps = np.tanh(np.linspace(-3, 3, 40))
    gamed = np.stack([gaps, np.zeros(40), np.zeros(40)]), 1 / (1 + np.exp(gaps))
    assert "lc_unknown" not in length_controlled(p, ours, theirs, np.zeros(40), gamed, counts=winrate.resample(40, 50))
    row = length_controlled([2] * 40, ours, theirs, np.zeros(40), gamed, counts=winrate.resample(40, 50))
    assert row["lc_unknown"] == "every answer has won"
    row = length_controlled(p, [30] * 40, [9] * 40, np.zeros(40), gamed, counts=winrate.resample(40, 50))
    assert row["lc_unknown"].startswith("every answer is longer")          # by as much: that looks like no difference


def test_what_cannot_be_told_is_said_once_and_so_it_is_for_the_mean_over_seeds(tmp_path):
    row = {**win_rate([2] * 9), "avg_length": 5, "n_unusable": 0, "n_missing": 0, "mode": "x"}
    unknown = {**row, "lc_unknown": "every answer has won"}
    told = {**row, "length_controlled_winrate": 50., "lc_standard_error": 1.}
    shown = tables.leaderboard({"a": unknown, "b": told, "c": unknown}, tmp_path / "l.csv")
    assert shown.count("cannot be told") == 3 and "LC of a, c cannot be told: every answer has won" in shown
    assert "every answer has won" in (tmp_path / "l.csv").read_text()
    mean = mean_row([told, unknown])
    assert mean["lc_unknown"] == "every answer has won" and "length_controlled_winrate" not in mean


def judged_by_length(n, seed, skill=.4, taste=-1.5, D=None):
    """A model whose longer answers are preferred for their length: (preferences, lengths, reference lengths)."""
    r = np.random.default_rng(seed)
    theirs = r.integers(200, 900, n)
    ours = theirs + r.normal(150, 300, n).astype(int)
    z = taste * np.tanh((theirs - ours) / 300) + skill + (0 if D is None else .6 * D)
    return 1. + (r.random(n) < 1 / (1 + np.exp(-z))), ours, theirs


def test_a_taste_for_length_is_taken_out():
    p, ours, theirs = judged_by_length(200_000, 0)
    truth = 100 / (1 + math.exp(-.4))
    row = length_controlled(p, ours, theirs)
    assert row["length_controlled_winrate"] == pytest.approx(truth, abs=.5) and win_rate(p)["win_rate"] > truth + 5
    assert row["lc_weights"] == pytest.approx([-1.5, .4], abs=.05)


@pytest.mark.slow
@pytest.mark.parametrize("difficult, skill", [(False, .4), (True, .4), (False, -3)])
def test_bootstrap_intervals_of_the_length_controlled_win_rate_cover_the_truth(difficult, skill):
    """Instructions are drawn anew each time, the fit sees difficulties as they are."""
    r, low, high = np.random.default_rng(1), [], []
    everywhere = r.normal(0, 1.5, 100_000) * difficult
    truth = 100 * (1 / (1 + np.exp(-skill - .6 * everywhere))).mean()
    for seed in range(500):
        D = r.choice(everywhere, 300)
        row = length_controlled(*judged_by_length(300, seed, skill, D=D), D if difficult else None,
                                counts=winrate.resample(300, 300, seed))
        low.append(row["lc_ci_low"])
        high.append(row["lc_ci_high"])
    assert 92.5 <= covered(np.array(low), np.array(high), truth) <= 97.5      # 95 +- 2.5: 500 data sets are +- 1 each


def test_few_rows_are_fitted_in_few_passes(monkeypatch):
    """Resamples of five soft labels leave a direction of the weights open, where single precision finds no end."""
    passes, real = [], length.minimise_quadratic
    monkeypatch.setattr(length, "minimise_quadratic", lambda *args: passes.append(0) or real(*args))
    ours, theirs = [1667, 206, 2448, 1748, 1246], [1003, 2675, 617, 1866, 205]
    difficulty = np.array([2.70051962, 1.61689711, .51595323, 1.85794343, -4.26616697])
    p = 1 + np.array([1, 0, 1, 0, 0]) * .9998 + 1e-4
    length_controlled(p, ours, theirs, difficulty, counts=winrate.resample(5, 200))
    assert 5 < len(passes) < 100


@pytest.mark.parametrize("n", [60, 160])                # in double and in single precision
def test_the_bootstrap_refits_everything(n):
    p, ours, theirs = judged_by_length(n, 3)
    p[5] = np.nan
    row = length_controlled(p, ours, theirs, counts=winrate.resample(n, 80, seed=2))
    drawn = [np.repeat(np.arange(n), counts.astype(int)) for counts in winrate.resample(n, 80, seed=2)]
    each = [length_controlled(p[i], ours[i], theirs[i])["length_controlled_winrate"] for i in drawn]
    assert row["lc_standard_error"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
    q = row["length_controlled_winrate"] / 100
    for end, sign in ((row["lc_ci_low"], -1), (row["lc_ci_high"], 1)):     # symmetric in log-odds
        reach = 1.96 * np.std(each, ddof=1) / 100 / (q * (1 - q))
        assert math.log(end / (100 - end)) == pytest.approx(math.log(q / (1 - q)) + sign * reach, abs=1e-3)


@needs_alpaca_eval
@pytest.mark.parametrize("version, most", [("ae1", .022), ("ae2", .011)])
def test_published_length_controlled_win_rates_are_reproduced(version, most):
    """In the published way: difficulties by row number, even where rows are missing."""
    difficulty, gamed = read_length_control(ALPACA_EVAL / "lc_glm.json.gz")
    chosen = []
    for name, (p, ours, theirs, _, row) in published(version).items():
        at_C = length_controlled(p, ours, theirs, difficulty[:len(p)], gamed, row["_implied_C"])
        assert at_C["length_controlled_winrate"] == pytest.approx(row["length_controlled_winrate"], abs=most), name
        if row.get("lc_standard_error"):
            assert at_C["lc_standard_error"] == pytest.approx(row["lc_standard_error"], abs=.01), name
        by_choice = length_controlled(p, ours, theirs, difficulty[:len(p)], gamed, None)
        assert by_choice["lc_C"] in length.C_GRID
        chosen.append(abs(by_choice["length_controlled_winrate"] - row["length_controlled_winrate"]))
        if weights := row.get("_published_glm_weights"):
            a, b, c = weights.values()
            assert 100 * predicted([a, b, c], difficulty[:len(p)]).mean() == pytest.approx(
                row["length_controlled_winrate"], abs=1e-6), name
    assert np.mean(chosen) < .2


@needs_alpaca_eval
def test_without_difficulties_it_is_not_the_published_number():
    """Nor near it, as eval.py says: 23 points at worst, over the models of AlpacaEval 2 that are here."""
    apart = [abs(length_controlled(p, ours, theirs)["length_controlled_winrate"] - row["length_controlled_winrate"])
             for p, ours, theirs, _, row in published("ae2").values() if row["length_controlled_winrate"]]
    assert max(apart) == pytest.approx(23, abs=.5) and np.median(apart) > 5


@needs_alpaca_eval
def test_difficulties_go_with_their_instructions():
    """What the three models with missing rows would have got without AlpacaEval's misalignment."""
    difficulty, gamed = read_length_control(ALPACA_EVAL / "lc_glm.json.gz")
    models = published("ae2")
    for name, right, wrong in (("gpt35_turbo_instruct", 14.96, 17.73), ("phi-2", 3.89, 4.40),
                               ("alpaca-7b_concise", 4.56, 4.47)):
        p, ours, theirs, index, row = models[name]
        assert row["length_controlled_winrate"] == pytest.approx(wrong, abs=.01)
        aligned = length_controlled(p, ours, theirs, difficulty[index], gamed)
        assert aligned["length_controlled_winrate"] == pytest.approx(right, abs=.1)


def test_both_files_of_difficulties_say_the_same(tmp_path):
    D, gaps, labels = [0, .5, -1], [[1., 2, 3], [-1, -2, -3]], [[0, .5, 1], [1, .2, .3]]
    document = {"instruction_difficulty": D,
                "gamed": [{"std_delta_len": gap, "preference": y} for gap, y in zip(gaps, labels)]}
    (tmp_path / "lc.json").write_text(json.dumps(document))
    with open(tmp_path / "df_gamed.csv", "w", newline="") as file:
        csv.writer(file).writerows([["model", "index", "std_delta_len", "instruction_difficulty", "preference"], *(
            [f"m{m}", i, gaps[m][i], D[i], labels[m][i]] for m in (0, 1) for i in range(3))])
    for name in ("lc.json", "df_gamed.csv"):
        difficulty, (X, y) = read_length_control(tmp_path / name)
        assert difficulty.tolist() == D and y.tolist() == sum(labels, [])
        assert X == pytest.approx(np.array([np.tanh(sum(gaps, [])), D + D, [0] * 6]))


# ---- rankings ------------------------------------------------------------------------------------------

def test_alpacafarm_s_simulated_ranking_agrees_with_its_human_one():
    """arXiv 2305.14387, Table 2: Spearman 0.98, R2 0.87 as printed."""
    simulated, human = (read_column(f"{ROOT}/data/alpacafarm.csv:{name}") for name in ("simulated", "human"))
    assert (len(simulated), len(human)) == (13, 10)
    found = ranking.agreement_of_rankings([simulated[name] for name in human], list(human.values()))
    assert found["spearman"]["value"] == pytest.approx(.976, abs=5e-4)
    assert found["r2"]["value"] == pytest.approx(.871, abs=5e-4)
    assert found["kendall"]["value"] == pytest.approx((45 - 2 * 2) / 45)       # two adjacent swaps
    for statistic in ("spearman", "kendall", "r2"):
        assert found[statistic]["ci_low"] < found[statistic]["value"] < found[statistic]["ci_high"]
        assert found[statistic]["p"] < .001
    trained = ["PPO", "Best-of-n", "Expert Iteration", "SFT 52k", "SFT 10k", "Binary FeedME"]
    found = ranking.agreement_of_rankings(*zip(*((simulated[name], human[name]) for name in trained)))
    assert (found["spearman"]["value"], found["r2"]["value"]) == pytest.approx((.943, .83), abs=.005)


@needs_alpaca_eval
def test_alpacaeval_s_ranking_agrees_with_the_arena_s():
    with open(ALPACA_EVAL / "benchmarks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    both = [(row["LC AlpacaEval 2.0"], row["Arena Elo\n[Feb 2, 2024]"]) for row in rows]
    lc, arena = zip(*((float(a), float(b)) for a, b in both if a and b))
    assert ranking.spearman(lc, arena) == pytest.approx(.98, abs=.01)


def test_correlations_by_counting():
    r = np.random.default_rng(0)
    for _ in range(20):
        x, y = r.integers(0, 5, (2, 7))                     # with ties
        order = [statistics.mean(i + 1 for i, other in enumerate(sorted(x)) if other == value) for value in x]
        assert ranking.ranks(x).tolist() == order
        pairs = list(itertools.combinations(range(7), 2))
        concordant = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
        untied = math.prod(sum(z[i] != z[j] for i, j in pairs) for z in (x, y)) ** .5
        assert ranking.kendall(x, y) == pytest.approx(concordant / untied)
        assert ranking.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert ranking.spearman(x, y) == pytest.approx(np.corrcoef(ranking.ranks(x), ranking.ranks(y))[0, 1])
    assert np.isnan(ranking.spearman([1, 1, 1], [1, 2, 3]))


def test_how_often_chance_agrees_as_well():
    x, y = [1, 2, 3, 4], [1, 3, 2, 4]
    found = ranking.agreement_of_rankings(x, y)
    as_good = [np.corrcoef(x, order)[0, 1] >= .8 - 1e-9 for order in itertools.permutations(y)]
    assert found["spearman"]["p"] == sum(as_good) / 24
    r = np.random.default_rng(0)                            # more than eight models: p is uniform without agreement
    p = [ranking.agreement_of_rankings(*r.normal(size=(2, 12)), times=200)["kendall"]["p"] for _ in range(200)]
    assert np.mean(np.array(p) < .2) == pytest.approx(.2, abs=.09)
    flat = ranking.agreement_of_rankings([1, 2, 3], [5, 5, 5])["kendall"]
    assert np.isnan(flat["value"]) and np.isnan(flat["p"])
    with pytest.raises(ValueError, match="2 models"):
        ranking.agreement_of_rankings([1, 2], [1, 2])


def test_strengths_of_two_models_are_the_odds():
    theta = ranking.bradley_terry(np.array([[[0, 30.], [10, 0]]]))
    assert theta == pytest.approx(np.array([[0, math.log(10 / 30)]]), abs=1e-3)
    assert ranking.elo(math.log(10)) == pytest.approx(1400)


@pytest.mark.parametrize("n", [200, 805])
def test_intervals_of_strengths_cover_the_truth(n):
    """Four models against one reference; one hardly ever wins."""
    r, truth, hits = np.random.default_rng(3), np.array([0, .6, -.3, -3.2, 2.]), []
    for _ in range(500):
        preferences = 1. + (r.random((4, n)) < 1 / (1 + np.exp(-truth[1:, None])))
        theta = ranking.bradley_terry(ranking.wins(preferences, [0] * 4, [1, 2, 3, 4], 5))[0]
        errors = ranking.strength_errors(preferences, [0] * 4, [1, 2, 3, 4], theta, 0)
        assert errors[0] == 0
        hits.append(np.abs(theta - truth)[1:] <= 1.96 * errors[1:])
    assert 93 <= 100 * np.mean(hits) <= 97 and (np.mean(hits, 0) > .92).all()


def test_the_error_of_a_strength_is_that_of_log_odds():
    q = 1. + (np.arange(400) % 4 == 0)                      # a win in four: the delta method, n - 1
    error = ranking.strength_errors([q], [0], [1], np.array([0, -math.log(3)]), 0)[1]
    assert error == pytest.approx(q.std(ddof=1) / 400 ** .5 / (.25 * .75), rel=1e-3)


def test_strengths_are_found_again():
    r, truth = np.random.default_rng(0), np.array([0, .8, -.5, 1.6])
    preferences, first, second = [], [], []
    for i, j in itertools.combinations(range(4), 2):
        preferences.append(1. + (r.random(20_000) < 1 / (1 + math.exp(truth[i] - truth[j]))))
        first.append(i)
        second.append(j)
    wins = ranking.wins(preferences, first, second, 4)
    assert ranking.bradley_terry(wins)[0] == pytest.approx(truth, abs=.05)
    assert wins[0, 0, 1] + wins[0, 1, 0] == 20_000 and wins[0, 1, 0] == (preferences[0] == 2).sum()
    rows = ranking.ratings(list("abcd"), preferences, first, second, winrate.resample(20_000, 100), 0)
    assert [row["model"] for row in rows] == ["d", "b", "a", "c"]
    assert all(row["ci_low"] <= row["elo"] <= row["ci_high"] for row in rows)
    assert [(row["rank_low"], row["rank_high"]) for row in rows] == [(i, i) for i in (1, 2, 3, 4)]


def test_strengths_of_a_star_are_those_of_the_whole_table(monkeypatch):
    """All were compared with one reference alone, as on most leaderboards; one never lost and one met nobody."""
    r = np.random.default_rng(0)
    preferences = 1. + (r.random((6, 60)) < np.array([.5, .2, .8, .97, 1, .5])[:, None])
    preferences[5] = np.nan
    counts, second = winrate.resample(60, 50), [0, 1, 3, 4, 5, 6]               # the reference is number 2
    whole = ranking.bradley_terry(ranking.wins(preferences, [2] * 6, second, 7, counts), 2)
    assert np.isnan(whole[:, 6]).all() and (whole[:, 5] > 4).all()
    monkeypatch.setattr(ranking, "wins", lambda *args: pytest.fail("a table of all with all was made"))
    star = ranking.resampled_strengths(preferences, [2] * 6, second, 7, counts, 2)
    np.testing.assert_allclose(star, whole, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_strengths_without_end_or_without_a_meeting():
    never_lost = np.zeros((1, 4, 4))
    never_lost[0, 1, 0] = 50                                # 1 beat the anchor each time, 2 and 3 met only each other
    never_lost[0, 2, 3] = never_lost[0, 3, 2] = 5
    theta = ranking.bradley_terry(never_lost)[0]
    assert theta[0] == 0 and 5 < theta[1] < 20 and np.isnan(theta[2:]).all()


def test_unused_prompts_and_draws_in_the_table_of_wins():
    won = ranking.wins([[1, 2, 1.5, None]], [0], [1], 2, np.array([[1., 1, 1, 1], [0, 3, 2, 9]]))
    assert won[:, 1, 0].tolist() == [1.5, 4] and won[:, 0, 1].tolist() == [1.5, 1]


# ---- judges --------------------------------------------------------------------------------------------

@needs_alpaca_eval
def test_the_published_row_of_a_judge_is_reproduced():
    data = read("crossannotations_gpt4_b1.json.gz")
    texts = [[pair[key] for pair in data["pairs"]] for key in ("output_1", "output_2")]
    human = [pair["human_preference"] for pair in data["pairs"]]
    labels = np.array(data["preference_by_seed"], dtype=float).T                                # (648, 4)
    report = agreement.judge_report(labels, *texts, human=human, prices=data["price_per_example_by_seed"],
                                    times=data["time_per_example_by_seed"])
    assert report["Variance"] == pytest.approx(14.930555555555555, abs=1e-12)
    assert report["Variance"] / 100 == pytest.approx(data["published"]["Variance"], abs=1e-14)
    assert report["Proba. prefer longer"] == data["published"]["Length preference"] == .6
    assert report["Price [$/1000 examples]"] == pytest.approx(43.73407407407408, abs=1e-12)
    assert report["Time [seconds/1000 examples]"] == pytest.approx(2717.255217875, abs=1e-8)
    assert report["# parsed"] == 2592 and report["Proba. prefer 1"] == 2 - labels.mean()
    first = agreement.judge_report(labels[:, 0], *texts, human=human)
    assert first["Human agreement"] == pytest.approx(72) and np.isnan(first["Variance"])        # of 100 with a label


def test_the_majority_and_its_ties_as_alpacaeval_breaks_them():
    nan = np.nan
    labels = [[1, 1, 2], [1, 2, nan], [2, 1.5, 1], [1.5, 1.5, 2], [nan] * 3, [1.1, 1.2, 1.9]]
    assert agreement.majority(np.array(labels)) == pytest.approx([1, 2, 1, 1.5, nan, 1.2], nan_ok=True)


def test_variance_and_bias_by_hand():
    labels = np.array([[1, 1, 1, 2], [2, 2, 2, 2]])         # the odd one is alone against three: 1 of 8 labels
    report = agreement.judge_report(labels, ["a"] * 2, ["b"] * 2, human=[[1, 1, 2], [1, 1, 1]])
    assert report["Variance"] == pytest.approx(12.5)
    assert report["Bias"] == pytest.approx(50)              # the majorities agree on the first pair only
    assert report["Human agreement"] == pytest.approx(100 * 3 / 8)
    assert report["Human agreement error"] == pytest.approx(37.5)       # of 75 and 0
    draws = agreement.judge_report([[1, 2], [2, 1], [1, 1]], ["a"] * 3, ["b"] * 3, human=[1.5] * 3)
    assert (draws["Human agreement"], draws["Human agreement error"]) == (50, 0)     # every label is half right


def test_tastes_of_a_judge():
    long, short, items = "x" * 60, "x" * 20, "Well:\n* hay\n* oats\n" + "x" * 3
    one, two = [long, short, long, "x" * 45, items, short, short], [short, long, short, short, short, items, items]
    report = agreement.judge_report([1, 2, 1.5, 1, 2, 2, None], one, two)
    assert report["Proba. prefer longer"] == 1              # a draw counts nowhere, nor do 25 characters
    assert report["Proba. prefer lists"] == .5
    assert report["Proba. prefer 1"] == pytest.approx(2 - np.mean([1, 2, 1.5, 1, 2, 2]))


def test_what_a_list_is():
    lists = ("* a", "see\n - b", "• c", "1. d", "2) e", "a. f", "B) g", "12) ok")
    assert all(map(agreement.LIST.search, lists))
    assert not any(map(agreement.LIST.search, ("a.f", "3", "x - y", "", "no. 1 of")))


def test_two_judges_are_correlated_by_the_models_win_rates():
    models = np.repeat(list("abcd"), 50)
    r = np.random.default_rng(0)
    one = 1. + (r.random((200, 2)) < np.repeat([.2, .4, .6, .9], 50)[:, None])
    two = 1. + (r.random(200) < np.repeat([.9, .7, .4, .1], 50))
    report = agreement.judge_report(one, ["a"] * 200, ["b"] * 200, models=models, second=two)
    rates = [[judge[models == model].mean() for model in "abcd"] for judge in (one, two)]
    assert report["Spearman corr."] == pytest.approx(-1)
    assert report["Pearson corr."] == pytest.approx(np.corrcoef(*rates)[0, 1])
    assert (usable(two) == two).all()
