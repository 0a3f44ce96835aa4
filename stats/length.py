"""The length-controlled win rate: how often would the model win if its answers were as long as the reference's?

AlpacaEval 2's headline number (arXiv 2404.04475), one logistic regression for each model:

    logit P(the model wins row i)  =  a tanh(l_i / s)  +  b D_i  +  c

l_i = len(reference's answer) - len(model's) in characters, s its standard deviation, D_i how hard instruction i is. The
controlled win rate is the mean of sigmoid(b D_i + c): what is predicted if l were 0. Without difficulties, as for
instructions of your own, the term b D_i is dropped (AlpacaEval's "length_controlled_minimal").
"""
from itertools import product
from math import nan

import numpy as np

from stats.winrate import mean_and_error, rate_interval, usable

HARDLY_ANY = 100.0                      # as C: a penalty that only keeps weights finite where every row is won
GAMED_WEIGHT = 0.1                      # of a row: 0.2 / two gamed models
C_GRID = np.logspace(-4, 4, 10)         # scikit-learn's, from which AlpacaEval chooses


def sigmoid(z):
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def log_loss(y, z):
    """-log-likelihood of soft labels y in [0, 1] under sigmoid(z), each."""
    return np.logaddexp(0, z) - y * z


def minimise_quadratic(H, b, penalty, guess):
    """The u (B, K) with the least u'Hu/2 - b.u + penalty |u|_1; H (B, K, K), b (B, K), penalty (B, 1).

    With the right signs of u it is linear. As a rule `guess` (B, K) has them; else all are tried, zeros too.
    """
    u = np.linalg.solve(H, (b - penalty * np.sign(guess))[..., None])[..., 0]
    if (wrong := (np.sign(u) != np.sign(guess)).any(1)).any():
        H, b, penalty = H[wrong, None], b[wrong, None], penalty[wrong, None]
        signs = np.array(list(product((-1, 0, 1), repeat=u.shape[1])))                          # (3^K, K)
        free = np.abs(signs)
        masked = H * free[:, :, None] * free[:, None] + np.eye(len(free[0])) * (1 - free)[:, None]
        tried = np.linalg.solve(masked, ((b - penalty * signs) * free)[..., None])              # (B, 3^K, K, 1)
        value = (tried.swapaxes(2, 3) @ (H @ tried / 2 - b[..., None]))[..., 0, 0]
        tried = tried[..., 0]
        value = value + (penalty * np.abs(tried)).sum(2)
        value[(np.sign(tried) != signs).any(2)] = np.inf
        u[wrong] = np.take_along_axis(tried, value.argmin(1)[:, None, None], 1)[:, 0]
    return u


def fit(length, fixed, y, weight, C, start=None, tolerance=1e-3):
    """Weights (B, K) that minimise |w|_1 + C sum_n weight_n log_loss(y_n, w.x_n): B problems at once.

    The features are length (B, N) or (1, N), and K - 1 that all problems share, fixed (K - 1, N); y (N,) in [0, 1];
    weight (B, N); C (B,) or a number. Newton's method, the penalty kept in each of its quadratic problems: what
    scikit-learn's liblinear solves, to more digits.
    """
    B, K = len(weight), 1 + len(fixed)
    penalty = 1 / np.broadcast_to(C, B).astype(float)[:, None]                                  # (B, 1)
    products = (fixed[:, None] * fixed).reshape(-1, len(y))                                     # ((K - 1)^2, N)
    w = np.zeros((B, K)) if start is None else np.array(start, dtype=float)
    H, reach = np.empty((B, K, K)), np.array([np.abs(length).max(), *np.abs(fixed).max(1)])

    def loss(w):
        return penalty[:, 0] * np.abs(w).sum(1) + (weight * log_loss(y, w[:, :1] * length + w[:, 1:] @ fixed)).sum(1)

    for _ in range(1000):
        p = sigmoid(w[:, :1] * length + w[:, 1:] @ fixed)                                       # (B, N)
        residual = weight * (p - y)
        g = np.concatenate([np.einsum("bn,bn->b", residual, length)[:, None], residual @ fixed.T], 1)   # (B, K)
        r = weight * (p - p * p)
        H[:, 1:, 1:] = (r @ products.T).reshape(B, K - 1, K - 1)
        r *= length
        H[:, 0, 1:] = H[:, 1:, 0] = r @ fixed.T
        H[:, 0, 0] = np.einsum("bn,bn->b", r, length)
        H += 1e-10 * np.eye(K)
        step = minimise_quadratic(H, (H @ w[..., None])[..., 0] - g, penalty, w) - w
        if np.abs(step).max() < tolerance:      # what is left is of the order of its square
            return w + step
        # Where no log-odds move by more than 1, the curvature stays within a factor that makes every step a descent.
        moved = np.abs(step) @ reach            # at most
        if moved.max() > 1:
            moved = np.abs(step[:, :1] * length + step[:, 1:] @ fixed).max(1)
        if moved.max() > 1:
            worse = loss(w + step) > loss(w)
            step[worse] /= np.maximum(moved, 1)[worse, None]
        w = w + step
    return w


def choose_C(length, fixed, y, weight):
    """The C of C_GRID with the least mean loss in five-fold cross-validation, as AlpacaEval chooses it.

    The losses lie close together, and the choice moves some models by points. scikit-learn deals rows out to folds in
    the order of an unstable sort of equal keys, which depends on the processor; here it is the last row first.
    """
    fold = np.arange(len(y))[::-1] % 5
    test = np.tile(fold == np.arange(5)[:, None], (len(C_GRID), 1))                             # (50, N)
    w = fit(length, fixed, y, weight * ~test, np.repeat(C_GRID, 5))                             # (50, K)
    loss = (weight * log_loss(y, w[:, :1] * length + w[:, 1:] @ fixed) * test).sum(1) / test.sum(1)
    return C_GRID[loss.reshape(-1, 5).mean(1).argmin()]


def predicted(weights, difficulty=None):
    """P(win) at equal lengths on each instruction: weights (..., K), difficulty (N,) or None -> (..., N or 1)."""
    a, *b, c = np.moveaxis(np.asarray(weights, dtype=float)[..., None], -2, 0)
    return sigmoid(b[0] * difficulty + c if b else c)


def length_controlled(preferences, lengths, reference_lengths, difficulty=None, gamed=None, C=HARDLY_ANY, counts=None):
    """The length-controlled win rate in percent, its error, and the weights (a, b, c), or (a, c) without difficulties.

    preferences       (N,), unusable ones as NaN: not fitted, but in s and in the mean, as in AlpacaEval
    lengths           (N,) characters of the model's answers; reference_lengths of the reference's
    difficulty        (N,) D of the same instructions in the same order
    gamed             from data.alpaca_eval.read_length_control: the reference told to be brief and to be long, against
                      itself. Each such row weighs a tenth and has no c; they tie a and b to the reference's, so that
                      intervals are of AlpacaEval's regularised number, not of what a model like no other would get
    C                 inverse strength of the L1 penalty; None: chosen by cross-validation
    counts            (B, N) of winrate.resample: lc_standard_error is then the bootstrap's, of the whole fit at this C,
                      and there is an interval. Without them it is what AlpacaEval prints: the spread of the fitted
                      probabilities over instructions, which is no error of the estimate and often far too small
    """
    p = usable(preferences)
    fitted = ~np.isnan(p)
    if fitted.sum() < 2:                # says nothing of lengths
        return {}
    gap = np.subtract(reference_lengths, lengths, dtype=float)                                  # (N,)
    fixed = np.ones((1, len(p))) if difficulty is None else np.stack([difficulty, np.ones(len(p))])
    extra, extra_y = (np.zeros((1 + len(fixed), 0)), []) if gamed is None else gamed
    fixed, y = np.concatenate([fixed[:, fitted], extra[1:]], 1), np.concatenate([p[fitted] - 1, extra_y])

    def rows(counts):
        """The length feature (B, N) and the weight (B, N) of what is fitted, if row n of the model counts so often."""
        s = deviation(gap, counts)[:, None]                                                     # (B, 1)
        length = np.tanh(np.divide(gap, s, out=np.zeros((len(s), len(gap))), where=s > 0))[:, fitted]
        return (np.concatenate([length, np.broadcast_to(extra[0], (len(s), len(extra_y)))], 1),
                np.concatenate([counts[:, fitted], np.full((len(s), len(extra_y)), GAMED_WEIGHT)], 1))

    length, weight = rows(np.ones((1, len(p))))
    C = choose_C(length, fixed, y, weight) if C is None else C
    w = fit(length, fixed, y, weight, C)                                                        # (1, K)
    mean, spread = mean_and_error(100 * np.broadcast_to(predicted(w[0], difficulty), len(p)))
    row = {"length_controlled_winrate": mean, "lc_standard_error": spread,
           "lc_weights": w[0].tolist(), "lc_C": float(C)}
    row["lc_name"] = "length_controlled_" + ("minimal" if difficulty is None else "noreg" if gamed is None else "v1")
    if counts is not None:
        counts, samples = counts[counts[:, fitted].sum(1) > 1], []
        for some in np.array_split(counts, max(1, len(counts) * len(y) // 25_000)):      # what stays in the cache
            length, weight = rows(some)
            each = fit(length, fixed, y, weight, C, start=np.repeat(w, len(some), 0), tolerance=1e-2)
            samples.append((100 * predicted(each, difficulty) * some).sum(1) / some.sum(1))
        samples = np.concatenate(samples)
        row["lc_standard_error"] = float(samples.std(ddof=1)) if len(samples) > 1 else nan
        raw = float(p[fitted].mean() - 1)       # all lost, or all won: what the fit says then is up to the penalty
        row["lc_ci_low"], row["lc_ci_high"] = rate_interval(100 * raw if raw in (0, 1) else mean, samples,
                                                            int(fitted.sum()))
    return row


def deviation(x, counts):
    """Standard deviation (B,) of x (N,) when its rows count so often: (B, N). What rounding leaves of 0 is 0."""
    x, n = x - x.mean(), counts.sum(1)
    s = np.sqrt(np.maximum(counts @ x ** 2 - (counts @ x) ** 2 / n, 0) / (n - 1))
    return np.where(s > 1e-6 * np.abs(x).max(), s, 0)

