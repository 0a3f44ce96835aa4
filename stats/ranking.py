"""Many models: who beat whom, Bradley-Terry and Elo ratings, and whether two leaderboards agree."""
from itertools import permutations
from math import factorial, nan
from statistics import NormalDist

import numpy as np

from stats.winrate import interval, usable

# ---- who comes first -----------------------------------------------------------------------------------

def best_first(rows):
    """{name: row} by win rate, those without one last."""
    return dict(sorted(rows.items(), key=lambda item: -np.nan_to_num(item[1]["win_rate"], nan=-1)))


def to_compare(rows, baseline=""):
    """The pairs of models (a, b) to compare: all with the baseline, or each with the next."""
    names = list(rows)
    return [(name, baseline) for name in names if name != baseline] if baseline else list(zip(names, names[1:]))


# ---- who beat whom -------------------------------------------------------------------------------------

def won_and_lost(preferences, counts=None):
    """How often the second side of each row was preferred, and how often the first, draws as halves: (B, M) each.
    Arguments as for `wins`."""
    q = np.array([usable(row) for row in preferences]) - 1                                      # (M, N)
    counts = np.ones((1, q.shape[1])) if counts is None else counts
    there = ~np.isnan(q)
    return counts @ np.where(there, q, 0).T, counts @ np.where(there, 1 - q, 0).T


def wins(preferences, first, second, size, counts=None):
    """How often model i beat model j, draws as halves: (B, size, size).

    preferences (M, N): row m compares the models numbered first[m] (preferred at 1) and second[m] (preferred at 2); NaN
    where they were not compared. counts (B, N): how often each of the N prompts counts; by default once, B = 1.
    """
    won, lost = won_and_lost(preferences, counts)                                               # (B, M)
    matrix = np.zeros((len(won), size, size))
    for m, (i, j) in enumerate(zip(first, second)):
        matrix[:, j, i] += won[:, m]
        matrix[:, i, j] += lost[:, m]
    return matrix


def connected(matrix, anchor):
    """Which models (M,) have been compared with the anchor, directly or through other models."""
    reached = np.arange(len(matrix)) == anchor
    for _ in matrix:
        reached = reached | ((matrix + matrix.T)[reached] > 0).any(0)
    return reached


def bradley_terry(wins, anchor=0, prior=1e-3):
    """Strengths theta (B, M), P(i beats j) = sigmoid(theta_i - theta_j), from wins (B, M, M); 0 for the anchor.

    Maximum likelihood (Bradley and Terry 1952; a draw is half a win for each) by Newton's method. A prior of
    exp(-prior theta^2 / 2) keeps the strength of a model that never lost finite. NaN for a model that is not compared
    with the anchor, not even through others.
    """
    played = wins + wins.swapaxes(1, 2)
    theta, eye = np.zeros(wins.shape[:2]), np.eye(wins.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))                             # (B, M, M)
        slope = (wins - played * p).sum(2) - prior * theta
        curve = played * p * (1 - p)
        H = eye * (curve.sum(2) + prior)[:, None, :] - curve
        step = np.clip(np.linalg.solve(H, slope[..., None])[..., 0], -2, 2)     # far from the maximum it overshoots
        theta += step
        if np.abs(step).max() < 1e-8:
            break
    return np.where(connected(wins.sum(0), anchor), theta - theta[:, [anchor]], nan)


def star_strengths(won, lost, prior=1e-3):
    """Strengths (B, M) of M models that were compared with one common model, the hub, and with no other.

    The same numbers as from bradley_terry() with the hub as anchor, in time and memory that grow linearly with M. won,
    lost (B, M): how often each model won and lost against the hub, draws as halves. NaN for a model that was never
    compared. The Hessian has entries only on its diagonal and in the hub's row and column, so a Newton step is solved
    by elimination.
    """
    theta, hub = np.zeros(won.shape), np.zeros((len(won), 1))
    played = won + lost
    for _ in range(100):
        p = 1 / (1 + np.exp(hub - theta))                                                       # (B, M)
        left, curve = won - played * p, played * p * (1 - p)
        slope, own = left - prior * theta, curve + prior
        rest = (left.sum(1, keepdims=True) + prior * hub) - (curve / own * slope).sum(1, keepdims=True)
        hub_step = -rest / (prior + (curve * prior / own).sum(1, keepdims=True))                # (B, 1)
        step = (slope + curve * hub_step) / own
        hub_step, step = np.clip(hub_step, -2, 2), np.clip(step, -2, 2)     # far from the maximum it overshoots
        hub, theta = hub + hub_step, theta + step
        if max(np.abs(step).max(), np.abs(hub_step).max()) < 1e-8:
            break
    return np.where(played.sum(0) > 0, theta - hub, nan)


def resampled_strengths(preferences, first, second, size, counts, anchor):
    """Strengths (B, size) in each resample, as bradley_terry() finds them. Arguments as for `wins` and `ratings`."""
    if set(first) != {anchor} or len({anchor, *second}) <= len(second):
        return bradley_terry(wins(preferences, first, second, size, counts), anchor)
    strengths = np.zeros((len(counts), size))
    strengths[:, second] = star_strengths(*won_and_lost(preferences, counts))
    return strengths


def elo(theta, anchor_rating=1000):
    """Strengths on Elo's scale: 400 points are odds of ten to one; the anchor has 1000."""
    return anchor_rating + 400 / np.log(10) * theta


def strength_errors(preferences, first, second, theta, anchor, prior=1e-3):
    """Standard errors (M,) of the differences between strengths theta (M,) and the anchor's.

    The sandwich estimator of the likelihood, with prompts as clusters. For a model that hardly ever wins, or hardly
    ever loses, it is more accurate than the spread of resamples. Other arguments as for `wins`.
    """
    q = np.array([usable(row) for row in preferences]) - 1                                      # (R, N)
    theta = np.nan_to_num(theta)                                                                # (M,)
    p = 1 / (1 + np.exp(theta[first] - theta[second]))                                          # (R,)
    played = (~np.isnan(q)).sum(1)                                                              # (R,)
    residual = np.nan_to_num(q - p[:, None])                                                    # (R, N)
    H = prior * np.eye(len(theta))                                                              # (M, M)
    scores = np.zeros((len(theta), q.shape[1]))                                                 # (M, N)
    for i, j, curve, left in zip(first, second, played * p * (1 - p), residual):
        H[[i, j], [i, j]] += curve
        H[[i, j], [j, i]] -= curve
        scores[j] += left
        scores[i] -= left
    moved = np.linalg.solve(H, scores)
    n = q.shape[1]
    return np.sqrt(((moved - moved[anchor]) ** 2).sum(1) * n / max(1, n - 1))


def ratings(names, preferences, first, second, counts, anchor):
    """[{model, elo, ci_low, ci_high, rank, rank_low, rank_high}], best first.

    Arguments as for `wins`; first, second and anchor are indices into names. The interval of a rating reaches 1.96
    standard errors to both sides; that of a rank is the percentile interval over resamples.
    """
    strengths = bradley_terry(wins(preferences, first, second, len(names)), anchor)[0]
    reach = NormalDist().inv_cdf(.975) * strength_errors(preferences, first, second, strengths, anchor)
    theta, low, high = elo(strengths), elo(strengths - reach), elo(strengths + reach)
    samples = np.nan_to_num(resampled_strengths(preferences, first, second, len(names), counts, anchor), nan=-np.inf)
    place = np.array([1 + len(row) - np.searchsorted(np.sort(row), row, "right") for row in samples])    # (B, M)
    rows = []
    for m in np.argsort(-theta, kind="stable"):         # those without a rating come last
        row = {"model": names[m], "elo": float(theta[m]), "rank": None, "rank_low": None, "rank_high": None}
        row["ci_low"], row["ci_high"] = float(low[m]), float(high[m])
        if theta[m] == theta[m]:
            best, worst = interval(place[:, m])
            row |= {"rank": 1 + int((theta > theta[m]).sum()), "rank_low": round(best), "rank_high": round(worst)}
        rows.append(row)
    return rows


def tournament(references, players, preferences, counts):
    """{ratings, matrix} of all models that were compared, references included; [] and None for a single model.

    references, players (M,): the names of the two sides of each row of preferences (M, N). The anchor of the ratings is
    the model that is the reference in most rows. matrix: how often the model of a row beats that of a column, in %:
    `win_rate` as observed (NaN if they were never compared), `predicted` from the strengths.
    """
    if len(players) < 2:
        return {"ratings": [], "matrix": None}
    names = list(dict.fromkeys([*references, *players]))
    first, second = ([names.index(name) for name in side] for side in (references, players))
    anchor = max(range(len(names)), key=first.count)
    won = wins(preferences, first, second, len(names))
    played, theta = won + won.swapaxes(1, 2), bradley_terry(won, anchor)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = {"names": names, "win_rate": (100 * won / played)[0].tolist(),
                  "predicted": (100 / (1 + np.exp(theta - theta[:, None]))).tolist()}
    return {"ratings": ratings(names, preferences, first, second, counts, anchor), "matrix": matrix}


# ---- do two leaderboards agree? ------------------------------------------------------------------------

def ranks(x):
    """Ranks (..., N) from 1; equal values share the mean of their ranks."""
    x = np.asarray(x, dtype=float)
    below = (x[..., None, :] < x[..., None]).sum(-1)
    up_to = (x[..., None, :] <= x[..., None]).sum(-1)
    return (below + up_to + 1) / 2


def centred(x):
    """x without its mean along the last axis; exactly 0 where it does not vary."""
    varies = np.ptp(x, -1, keepdims=True) > 0
    return np.where(varies, x - np.mean(x, -1, keepdims=True), 0.)


def pearson(x, y):
    """Correlation along the last axis; NaN where one side does not vary."""
    x, y = centred(x), centred(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def signs_of_pairs(x):
    """The signs (..., N, N) of the differences between all values of x (..., N)."""
    x = np.asarray(x, dtype=float)
    return np.sign(x[..., None, :] - x[..., None])


def kendall(x, y):
    """Kendall's tau-b along the last axis."""
    x, y = signs_of_pairs(x), signs_of_pairs(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum((-1, -2)) / np.sqrt((x * x).sum((-1, -2)) * (y * y).sum((-1, -2)))


def r2(x, y):
    """Share of the variance of y that a straight line through x explains: Pearson's correlation squared."""
    return pearson(x, y) ** 2


CORRELATIONS = {"spearman": spearman, "kendall": kendall, "r2": r2}


def agreement_of_rankings(x, y, times=10_000, seed=0):
    """Do two leaderboards put the same models (N,) in the same order? {spearman, kendall, r2: {...}}.

    Each has its `value`, a percentile interval over resampled models (wide, since models are few), and `p`, the share
    of the permutations of the models whose value is at least as large. A large r2 may also mean the reverse order. p is
    exact for up to eight models, above that it is from random permutations. ValueError for fewer than three models.
    """
    x, y, n = np.asarray(x, dtype=float), np.asarray(y, dtype=float), len(x)
    if n < 3:
        raise ValueError(f"{n} models are in both leaderboards; three or more have a ranking to compare")
    random = np.random.default_rng(seed)
    times = int(np.clip(4e8 / n ** 2, 200, times))      # Kendall's tau compares all models with all
    drawn = random.integers(0, n, (times, n))
    exact = factorial(n) <= 50_000
    if exact:
        order = np.array(list(permutations(range(n))))
    else:
        order = random.permuted(np.tile(np.arange(n), (times, 1)), axis=1)
    parts = max(1, times * n ** 2 // 10 ** 7)           # so that no part needs too much memory
    result = {"n": n}
    for name, correlation in CORRELATIONS.items():
        value = float(correlation(x, y))
        low, high = interval(np.concatenate([correlation(x[i], y[i]) for i in np.array_split(drawn, parts)]))
        by_chance = np.concatenate([correlation(np.broadcast_to(x, i.shape), y[i])
                                    for i in np.array_split(order, parts)])
        luck = int((by_chance >= value - 1e-12).sum())
        p = luck / len(order) if exact else (luck + 1) / (times + 1)
        result[name] = {"value": value, "ci_low": low, "ci_high": high, "p": nan if np.isnan(value) else p}
    return result


def resampled_scores(scores, counts):
    """Mean scores of S systems over all N prompts and over each of B resamples: (..., S, N) -> (..., 1 + B, S).

    counts (B, N) are those of stats.winrate.resample. NaN in the scores are left out.
    """
    there, counts = ~np.isnan(scores), np.concatenate([np.ones((1, counts.shape[1])), counts])
    with np.errstate(invalid="ignore"):
        means = np.where(there, scores, 0.) @ counts.T / (there @ counts.T)
    return means.swapaxes(-1, -2)


def agreement_over_prompts(x, y):
    """Do two leaderboards of the same systems agree? {spearman, kendall, r2: {value, ci_low, ci_high, each}}.

    x, y (R, 1 + B, S): resampled_scores() of R trainings of the systems. `each` has the value of each training, `value`
    is their mean, and its interval is over prompts: the trained systems are fixed.
    """
    found = {}
    for name, correlation in CORRELATIONS.items():
        values = correlation(x, y)                                                              # (R, 1 + B)
        low, high = interval(values[:, 1:].mean(0))
        found[name] = {"value": float(values[:, 0].mean()), "ci_low": low, "ci_high": high,
                       "each": values[:, 0].tolist()}
    return found
