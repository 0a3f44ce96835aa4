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


def wins(preferences, first, second, size, counts=None):
    """How often model i beat model j, draws as halves: (B, size, size).

    preferences (M, N), row m between the models numbered first[m] (preferred at 1) and second[m] (at 2); NaN: not
    compared. counts (B, N): how often each of the N prompts counts; by default once, B = 1.
    """
    q = np.array([usable(row) for row in preferences]) - 1                                      # (M, N)
    counts = np.ones((1, q.shape[1])) if counts is None else counts
    there = ~np.isnan(q)
    won, lost = counts @ np.where(there, q, 0).T, counts @ np.where(there, 1 - q, 0).T          # (B, M)
    matrix = np.zeros((len(counts), size, size))
    for m, (i, j) in enumerate(zip(first, second)):
        matrix[:, j, i] += won[:, m]
        matrix[:, i, j] += lost[:, m]
    return matrix


def connected(matrix, anchor):
    """Which models (M,) have been compared with the anchor, be it by way of others."""
    reached = np.arange(len(matrix)) == anchor
    for _ in matrix:
        reached = reached | ((matrix + matrix.T)[reached] > 0).any(0)
    return reached


def bradley_terry(wins, anchor=0, prior=1e-3):
    """Strengths theta (B, M), P(i beats j) = sigmoid(theta_i - theta_j), from wins (B, M, M); 0 for the anchor.

    Maximum likelihood (Bradley and Terry 1952, draws as half a win for each) by Newton's method. A prior of
    exp(-prior theta^2 / 2) keeps a model that never lost finite. NaN: never compared with the anchor, nor by way of
    others.
    """
    played = wins + wins.swapaxes(1, 2)
    theta, eye = np.zeros(wins.shape[:2]), np.eye(wins.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))                             # (B, M, M)
        slope = (wins - played * p).sum(2) - prior * theta
        curve = played * p * (1 - p)
        H = eye * (curve.sum(2) + prior)[:, None, :] - curve
        step = np.clip(np.linalg.solve(H, slope[..., None])[..., 0], -2, 2)     # far from the end it overshoots
        theta += step
        if np.abs(step).max() < 1e-8:
            break
    return np.where(connected(wins.sum(0), anchor), theta - theta[:, [anchor]], nan)


def elo(theta, anchor_rating=1000):
    """Strengths on Elo's scale: 400 points are odds of ten to one; the anchor has 1000."""
    return anchor_rating + 400 / np.log(10) * theta


def strength_errors(preferences, first, second, theta, anchor, prior=1e-3):
    """Standard errors (M,) of strengths theta (M,) over the anchor's: the likelihood's sandwich, a prompt a cluster.

    Better than the spread of resamples where a model hardly ever wins, or loses. Other arguments as for `wins`.
    """
    q, theta = np.array([usable(row) for row in preferences]) - 1, np.nan_to_num(theta)         # (R, N), (M,)
    p = 1 / (1 + np.exp(theta[first] - theta[second]))                                          # (R,)
    played, residual = (~np.isnan(q)).sum(1), np.nan_to_num(q - p[:, None])
    H, scores = prior * np.eye(len(theta)), np.zeros((len(theta), q.shape[1]))                  # (M, M), (M, N)
    for i, j, curve, left in zip(first, second, played * p * (1 - p), residual):
        H[[i, j], [i, j]] += curve
        H[[i, j], [j, i]] -= curve
        scores[j] += left
        scores[i] -= left
    moved = np.linalg.solve(H, scores)
    return np.sqrt(((moved - moved[anchor]) ** 2).sum(1) * q.shape[1] / max(1, q.shape[1] - 1))


def ratings(names, preferences, first, second, counts, anchor):
    """[{model, elo, ci_low, ci_high, rank, rank_low, rank_high}], best first.

    Arguments as for `wins`; first, second and anchor hold indices into names. The interval of a rating is 1.96 of its
    standard errors to both sides, that of a rank is the percentiles' over resamples.
    """
    strengths = bradley_terry(wins(preferences, first, second, len(names)), anchor)[0]
    reach = NormalDist().inv_cdf(.975) * strength_errors(preferences, first, second, strengths, anchor)
    theta, low, high = elo(strengths), elo(strengths - reach), elo(strengths + reach)
    samples = bradley_terry(wins(preferences, first, second, len(names), counts), anchor)
    place = 1 + (samples[:, None, :] > samples[:, :, None]).sum(2)                              # (B, M)
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
    """{ratings, matrix} of all that met, references included; of a single model there is nothing to say.

    references, players (M,): the names of the two sides of each row of preferences (M, N). The anchor of the ratings
    is the reference of most.
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
    """Ranks (..., N) from 1, ties share the mean of theirs."""
    x = np.asarray(x, dtype=float)
    return ((x[..., None, :] < x[..., None]).sum(-1) + (x[..., None, :] <= x[..., None]).sum(-1) + 1) / 2


def pearson(x, y):
    """Correlation along the last axis; NaN where one side does not vary."""
    x, y = (np.where(np.ptp(z, -1, keepdims=True) > 0, z - np.mean(z, -1, keepdims=True), 0.) for z in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def kendall(x, y):
    """Kendall's tau-b along the last axis."""
    x, y = (np.sign(z[..., None, :] - z[..., None]) for z in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum((-1, -2)) / np.sqrt((x * x).sum((-1, -2)) * (y * y).sum((-1, -2)))


def r2(x, y):
    """Share of the variance of y that a straight line through x explains: Pearson's correlation squared."""
    return pearson(x, y) ** 2


CORRELATIONS = {"spearman": spearman, "kendall": kendall, "r2": r2}


def agreement_of_rankings(x, y, times=10_000, seed=0):
    """Do two leaderboards put the same models (N,) in the same order? {spearman, kendall, r2: {...}}.

    Each with its `value`, a percentile interval over resampled models (wide: models are few), and the share `p` of
    permutations of the models that agree at least as well (for r2: or disagree), exact for up to eight models.
    """
    x, y, n, random = np.asarray(x, dtype=float), np.asarray(y, dtype=float), len(x), np.random.default_rng(seed)
    times = int(np.clip(4e8 / n ** 2, 200, times))      # Kendall's tau compares all models with all
    if n < 3:
        raise ValueError(f"{n} models are in both leaderboards; three or more have a ranking to compare")
    drawn = random.integers(0, n, (times, n))
    exact = factorial(n) <= 50_000
    order = list(permutations(range(n))) if exact else random.permuted(np.tile(np.arange(n), (times, 1)), axis=1)
    result = {"n": n}
    order, parts = np.array(order), max(1, times * n ** 2 // 10 ** 7)                           # of bearable size
    for name, correlation in CORRELATIONS.items():
        value = float(correlation(x, y))
        low, high = interval(np.concatenate([correlation(x[i], y[i]) for i in np.array_split(drawn, parts)]))
        by_chance = np.concatenate([correlation(np.broadcast_to(x, i.shape), y[i])
                                    for i in np.array_split(order, parts)])
        luck = int((by_chance >= value - 1e-12).sum())
        p = nan if value != value else luck / len(order) if exact else (luck + 1) / (times + 1)
        result[name] = {"value": value, "ci_low": low, "ci_high": high, "p": p}
    return result
