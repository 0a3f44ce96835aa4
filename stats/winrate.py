"""Win rates and their errors: one model against the reference, and two models on the same prompts.

A preference lies in [1, 2]: at 1 the reference is better, at 2 the model; 1.5 (or 0, in old files) is a draw.
Everything is in percent. Every error here is about the choice of instructions. How much one training differs from
another is not in it: see stats/seeds.py.
"""
from math import comb, exp, log, nan
from statistics import NormalDist

import numpy as np

# ---- one model against the reference -------------------------------------------------------------------


def usable(preferences):
    """Preferences (N,) as floats: 0 becomes 1.5, and whatever is not in [1, 2] becomes NaN."""
    p = np.array(preferences, dtype=float)              # None becomes NaN
    p[p == 0] = 1.5
    p[~((p >= 1) & (p <= 2))] = np.nan
    return p


def discrete(p):
    """Usable preferences as 0 (lost), 0.5 (drawn) and 1 (won)."""
    return np.where(p == 1.5, 0.5, p.round() - 1)


def mean_and_error(x):
    """Mean of x (N,) and its standard error; NaN where N is too small to say."""
    mean = x.mean() if len(x) else np.nan
    error = x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return float(mean), float(error)


def win_rate(preferences):
    """AlpacaEval's row for one model; unusable preferences count nowhere, not even in n_total."""
    p = usable(preferences)
    p = p[~np.isnan(p)]
    mean, error = mean_and_error(100 * (p - 1))
    return {"win_rate": mean, "standard_error": error,
            "n_wins": int((p > 1.5).sum()), "n_wins_base": int((p < 1.5).sum()), "n_draws": int((p == 1.5).sum()),
            "n_total": len(p), "discrete_win_rate": mean_and_error(100 * discrete(p))[0]}


def left_out(preferences, n_missing=0):
    """How many rows AlpacaEval leaves out without saying so, and the win rate if these were all lost, or all won.

    They are unusable preferences, and the `n_missing` instructions that have no annotation at all.
    """
    p = usable(preferences)
    n_unusable, won, total = int(np.isnan(p).sum()), np.nansum(p - 1), len(p) + n_missing
    if_lost = 100 * won / total if total else nan
    if_won = 100 * (won + n_unusable + n_missing) / total if total else nan
    return {"n_unusable": n_unusable, "n_missing": n_missing, "win_rate_if_lost": if_lost, "win_rate_if_won": if_won}


# ---- errors --------------------------------------------------------------------------------------------

def resample(n, times=1000, seed=0):
    """How often each of n rows is drawn in each of `times` bootstrap resamples: (times, n), each row sums to n.

    All statistics of all models use one such matrix, so that the same instructions are drawn for all of them.
    """
    drawn = np.random.default_rng(seed).integers(0, n, (times, n)) + n * np.arange(times)[:, None]
    return np.bincount(drawn.ravel(), minlength=times * n).reshape(times, n).astype(float)


def interval(samples, level=0.95):
    """The percentile interval (low, high) of bootstrap samples."""
    if np.isnan(samples).all():
        return nan, nan
    return tuple(map(float, np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])))


def rate_interval(rate, samples, n, level=0.95):
    """The interval (low, high) of a rate of n rows in percent, from its bootstrap samples.

    It is symmetric in log-odds; its width there is from the samples' standard deviation (delta method). The percentile
    interval is too narrow near 0 and 100: it covers a rate of 3 % on 200 prompts in 83 to 93 % of the cases, this one
    in 94 %. If the rate is 0 or 100, so is that of every resample; the interval then has the exact binomial bound.
    """
    alpha, p = (1 - level) / 2, rate / 100
    error = float(np.nanstd(samples, ddof=1)) / 100 if n > 1 else nan
    if min(p, 1 - p) < 1e-12:
        bound = 100 * alpha ** (1 / n)
        return (bound, 100.0) if p > .5 else (0.0, 100 - bound)
    if not error >= 0:
        return nan, nan
    logit = log(p / (1 - p))
    reach = NormalDist().inv_cdf(1 - alpha) * error / (p * (1 - p))
    return percent(logit - reach), percent(logit + reach)


def percent(logit):
    """The rate of these log-odds; beyond 700 exp() would overflow."""
    return 100 / (1 + exp(-min(700, max(-700, logit))))


def resampled_means(x, counts):
    """Means (B,) of x (N,) in each resample of counts (B, N); NaN in x are left out."""
    there = ~np.isnan(x)
    with np.errstate(invalid="ignore"):
        return counts @ np.where(there, x, 0) / (counts @ there.astype(float))


def clustered_error(x, clusters):
    """Standard error of the mean of x (N,) when rows of one cluster (a data set, say) are alike.

    The cluster-robust sandwich with its small-sample factor G / (G - 1) for G clusters. With few clusters, five say,
    the error itself is inaccurate. NaN for one cluster.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    n = len(names)
    if n < 2:
        return nan
    sums = np.bincount(index, x - x.mean())
    return float((n / (n - 1) * (sums ** 2).sum()) ** 0.5 / len(x))


# ---- two models on the same prompts --------------------------------------------------------------------

def paired_difference(preferences_a, preferences_b):
    """(win rate of a - win rate of b, its standard error), in points, for the same instructions in one order.

    Rows that are unusable in either are left out. Some instructions are easy for both models; this cancels, so that the
    error is usually smaller than the errors of the two win rates suggest.
    """
    difference = usable(preferences_a) - usable(preferences_b)
    return mean_and_error(100 * difference[~np.isnan(difference)])


def mcnemar(better, worse):
    """The exact two-sided p-value of McNemar's test (1947) that two models are equally good.

    better, worse: the numbers of prompts on which one model is better than the other, and worse. If the models are
    equally good, each of these prompts is the toss of a fair coin.
    """
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2 ** n)


def holm(p):
    """p-values (M,) of M comparisons, corrected for their number.

    If no two models differ, the probability that any of the M corrected p is below 5 % is at most 5 %; without
    correction it is larger. If some do differ, this holds for the comparisons of those that do not. The comparisons may
    depend on each other.

    Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6: the k-th
    smallest p is multiplied by M - k + 1, and is at least as large as the one before it.
    """
    p = np.asarray(p, dtype=float)
    order = p.argsort()
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def errors_apart(level, power):
    """How many standard errors a difference must be from 0 so that a two-sided test finds it with this power."""
    return NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)


def prompts_needed(difference, deviation, level=0.95, power=0.8):
    """How many prompts a two-sided test needs to tell a `difference` from 0; None if it is 0.

    `deviation` is the standard deviation of the difference over prompts. The normal approximation is good for large
    numbers; if it gives less than ten, add two.
    """
    if not difference:
        return None
    return max(2, int(np.ceil((errors_apart(level, power) * deviation / difference) ** 2)))


def detectable_difference(n, deviation, level=0.95, power=0.8):
    """The smallest difference that n prompts can tell from 0: the inverse of prompts_needed()."""
    return errors_apart(level, power) * deviation / n ** 0.5


def compare(preferences_a, preferences_b, counts=None, clusters=None):
    """Is a better than b? Everything that can be said of two models on the same instructions, in the same order.

    `n_better` and `n_worse` count the prompts on which the outcome (won, drawn, lost) is better for a, and worse.
    `prompts_needed` and `detectable_difference` are for a confidence of 95 % and a power of 80 %. counts (B, N) of
    `resample` add an interval, clusters (N,) a clustered standard error.
    """
    a, b = usable(preferences_a), usable(preferences_b)
    x = 100 * (a - b)
    both = ~np.isnan(x)
    difference, error = paired_difference(a, b)
    outcomes = discrete(a[both]) - discrete(b[both])
    better, worse = int((outcomes > 0).sum()), int((outcomes < 0).sum())
    deviation = error * both.sum() ** 0.5
    row = {"n": int(both.sum()), "difference": difference, "standard_error": error,
           "n_better": better, "n_worse": worse, "mcnemar_p": mcnemar(better, worse),
           "prompts_needed": prompts_needed(difference, deviation) if deviation == deviation else None,
           "detectable_difference": detectable_difference(both.sum(), deviation) if both.any() else nan}
    if counts is not None:
        row["ci_low"], row["ci_high"] = interval(resampled_means(x, counts))
    if clusters is not None:
        row["clustered_standard_error"] = clustered_error(x[both], np.asarray(clusters)[both]) if both.any() else nan
    return row


# ---- position ------------------------------------------------------------------------------------------

def position_gap(preferences, switched):
    """The win rate of one model where its answer was shown first and where second, and the gap, second - first.

    `switched` (N,): the model was shown first. If the order was drawn at random, a fair judge has a gap of 0.
    """
    p, switched = 100 * (usable(preferences) - 1), np.asarray(switched, dtype=bool)
    there = ~np.isnan(p)
    first, first_error = mean_and_error(p[there & switched])
    second, second_error = mean_and_error(p[there & ~switched])
    return {"shown_first": first, "shown_second": second, "gap": second - first,
            "standard_error": (first_error ** 2 + second_error ** 2) ** 0.5}


def position_flips(by_order):
    """How often the verdict on a pair changes with the order of its answers.

    by_order (N, 2): preferences of pairs that were judged in both orders, output_1 first and output_2 first.
    `flip_rate` is the share of pairs, in %, whose winner changes with the order. `first` is the share of these in which
    the answer shown first won both times: 50 would be noise, 100 a judge that prefers what comes first.
    """
    p = usable(by_order).reshape(-1, 2)
    p = p[~np.isnan(p).any(1)]
    flipped = (p[:, 0] - 1.5) * (p[:, 1] - 1.5) < 0
    rate, error = mean_and_error(100.0 * flipped)
    first = mean_and_error(100.0 * (p[flipped, 0] < 1.5))[0]
    return {"n": len(p), "flip_rate": rate, "standard_error": error, "first": first}
