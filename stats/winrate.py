"""Win rates and their errors: one model against the reference, and two models on the same prompts.

A preference lies in [1, 2]: at 1 the reference is better, at 2 the model; 1.5 (or 0, in old files) is a draw.
Everything is in percent. Every error here is about the choice of instructions; of the noise between two trainings it
knows nothing.
"""
from math import comb, exp, log, nan
from statistics import NormalDist

import numpy as np

# ---- one model against the reference -------------------------------------------------------------------


def usable(preferences):
    """Preferences (N,) as floats: 0 becomes 1.5, what is no number in [1, 2] becomes NaN."""
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
    wins, losses, draws = (int(x.sum()) for x in (p > 1.5, p < 1.5, p == 1.5))
    return {"win_rate": mean, "standard_error": error, "n_wins": wins, "n_wins_base": losses,
            "n_draws": draws, "n_total": len(p), "discrete_win_rate": mean_and_error(100 * discrete(p))[0]}


def left_out(preferences, n_missing=0):
    """How many rows AlpacaEval leaves out in silence, and the win rate if they were all lost, and all won.

    `n_missing` of them are not even among the preferences: instructions without an annotation.
    """
    p = usable(preferences)
    bad, won = int(np.isnan(p).sum()), np.nansum(p - 1)
    total = len(p) + n_missing
    low, high = (100 * (won + extra) / total if total else nan for extra in (0, bad + n_missing))
    return {"n_unusable": bad, "n_missing": n_missing, "win_rate_if_lost": low, "win_rate_if_won": high}


# ---- errors --------------------------------------------------------------------------------------------

def resample(n, times=1000, seed=0):
    """How often each of n rows is drawn in each of `times` bootstrap resamples: (times, n), each row sums to n.

    One such matrix for all statistics of all models keeps what they share: the same instructions are drawn for all.
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

    Symmetric in log-odds, with the error of the samples: near 0 and 100 the percentile interval is too short (a rate of
    3 % on 200 prompts is in it 83 to 93 times in a hundred, here 94). A rate of 0 or 100, which no resample can leave,
    has the exact binomial bound.
    """
    alpha, p = (1 - level) / 2, rate / 100
    error = float(np.nanstd(samples, ddof=1)) / 100 if n > 1 else nan
    if min(p, 1 - p) < 1e-12:
        bound = 100 * alpha ** (1 / n)
        return (bound, 100.0) if p > .5 else (0.0, 100 - bound)
    if not error >= 0:
        return nan, nan
    logit, reach = log(p / (1 - p)), NormalDist().inv_cdf(1 - alpha) * error / (p * (1 - p))
    return tuple(100 / (1 + exp(-min(700, max(-700, x)))) for x in (logit - reach, logit + reach))


def resampled_means(x, counts):
    """Means of x (N,), its NaN left out, in each resample of counts (B, N): (B,)."""
    there = ~np.isnan(x)
    with np.errstate(invalid="ignore"):
        return counts[:, there] @ x[there] / counts[:, there].sum(1)


def clustered_error(x, clusters):
    """Standard error of the mean of x (N,) when rows of one cluster (a data set, say) are alike.

    The cluster-robust sandwich with its small-sample factor G / (G - 1). With five clusters it is itself uncertain.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return nan
    sums = np.bincount(index, x - x.mean())
    return float((len(names) / (len(names) - 1) * (sums ** 2).sum()) ** 0.5 / len(x))


# ---- two models on the same prompts --------------------------------------------------------------------

def paired_difference(preferences_a, preferences_b):
    """(win rate of a - win rate of b, its standard error), in points, for the same instructions in one order.

    Rows unusable in either are left out. What makes an instruction easy for both models cancels, so the error
    is usually smaller than the errors of the two win rates suggest.
    """
    difference = usable(preferences_a) - usable(preferences_b)
    return mean_and_error(100 * difference[~np.isnan(difference)])


def mcnemar(better, worse):
    """Exact two-sided p-value that a beats b on `better` prompts and b beats a on `worse` by luck (McNemar 1947)."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2 ** n)


def errors_apart(level, power):
    """How many standard errors from 0 a difference must lie for a two-sided test to find it so often."""
    return NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)


def prompts_needed(difference, deviation, level=0.95, power=0.8):
    """How many prompts tell a `difference` from 0 in a two-sided test, when differences deviate so much per prompt.

    For large numbers, as are needed: where it is below ten, add two.
    """
    return max(2, int(np.ceil((errors_apart(level, power) * deviation / difference) ** 2))) if difference else None


def detectable_difference(n, deviation, level=0.95, power=0.8):
    """The smallest difference that n prompts tell from 0: prompts_needed the other way round."""
    return errors_apart(level, power) * deviation / n ** 0.5


def compare(preferences_a, preferences_b, counts=None, clusters=None):
    """Is a better than b? Everything that can be said of two models on the same instructions, in the same order.

    `n_better` and `n_worse` count the prompts with a better and a worse outcome (won, drawn, lost) for a; without draws
    they are McNemar's two cells. `prompts_needed` is for this difference, at 95 % and power 80 %.
    """
    a, b = usable(preferences_a), usable(preferences_b)
    both = ~np.isnan(a - b)
    x = 100 * (a - b)
    difference, error = paired_difference(a, b)
    better, worse = (int((sign * (discrete(a[both]) - discrete(b[both])) > 0).sum()) for sign in (1, -1))
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
    """(win rate shown first, shown second, the difference second - first, its error) of one model.

    `switched` (N,): the model was shown first. If the order was drawn at random, a fair judge has a gap of 0.
    """
    p, switched = 100 * (usable(preferences) - 1), np.asarray(switched, dtype=bool)
    there = ~np.isnan(p)
    (first, first_error), (second, second_error) = (mean_and_error(p[there & side]) for side in (switched, ~switched))
    return {"shown_first": first, "shown_second": second, "gap": second - first,
            "standard_error": (first_error ** 2 + second_error ** 2) ** 0.5}


def position_flips(by_order):
    """Of pairs judged in both orders, (N, 2) preferences for [output_1 first, output_2 first]: how many verdicts turn.

    `flip_rate` is the share whose winner changes with the order; `first` the share of those that went to the answer
    shown first both times (50 would be noise, not position).
    """
    p = usable(by_order).reshape(-1, 2)
    p = p[~np.isnan(p).any(1)]
    flipped = (p[:, 0] - 1.5) * (p[:, 1] - 1.5) < 0
    rate, error = mean_and_error(100.0 * flipped)
    first = mean_and_error(100.0 * (p[flipped, 0] < 1.5))[0]
    return {"n": len(p), "flip_rate": rate, "standard_error": error, "first": first}
