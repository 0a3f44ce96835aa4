"""The length-controlled win rate: how often would the model win if its answers were as long as the reference's?

AlpacaEval 2's headline number (arXiv 2404.04475), one logistic regression for each model:

    logit P(the model wins row i)  =  a tanh(l_i / s)  +  b D_i  +  c

l_i is the length of the reference's answer minus that of the model's, in characters, s the standard deviation of l,
and D_i the difficulty of instruction i. The controlled win rate is the mean of sigmoid(b D_i + c), what is predicted
for l = 0.
Without difficulties, as for instructions of your own, the term b D_i is dropped (AlpacaEval's
"length_controlled_minimal").

Some annotations do not determine the weights. The small penalty alone would then decide the number, and its error would
be far too small. In these cases why_unknown() says why the rate cannot be told:
- every row was won, or every row was lost, so that the likelihood has no maximum at a finite c; or all verdicts are
  the same in another way (all draws, say), so that nothing shows the effect of length;
- the fitted line puts all wins on one side and all losses on the other, so that a steeper line is always likelier
  (complete separation: Albert and Anderson 1984, Biometrika 71). An answer then won if and only if it was longer, say;
- all answers are longer than the reference's, or all are shorter, so that l = 0 lies outside of the data.
If this holds for more than one bootstrap resample in twenty, a few rows alone determine the weights, and the rate
cannot be told either: the penalty would decide where its 95 % interval ends.
"""
from itertools import product
from math import nan

import numpy as np

from stats.winrate import mean_and_error, rate_interval, usable

HARDLY_ANY = 100.0                      # a value of C: this penalty is so small that it only keeps weights finite
GAMED_WEIGHT = 0.1                      # weight of a row of the gamed baseline: 0.2, shared by its two models
FEW = 0.05                              # share of resamples in which the weights may be undetermined
MANY = 100                              # so many rows determine the weights well enough for single precision
C_GRID = np.logspace(-4, 4, 10)         # scikit-learn's grid, from which AlpacaEval chooses C


def sigmoid(z):
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def log_loss(y, z):
    """-log-likelihood of each soft label y in [0, 1] under sigmoid(z)."""
    return np.logaddexp(0, z) - y * z


def minimise_quadratic(H, b, penalty, guess):
    """The u (B, K) with the least u'Hu/2 - b.u + penalty |u|_1; H (B, K, K), b (B, K), penalty (B, 1).

    If the signs of u are known, the slope of the penalty is, too, and u solves a linear system. Usually u has the signs
    of `guess` (B, K); for the problems where it has not, all signs are tried.
    """
    u = np.linalg.solve(H, (b - penalty * np.sign(guess))[..., None])[..., 0]
    wrong = (np.sign(u) != np.sign(guess)).any(1)
    if wrong.any():
        u[wrong] = best_of_all_signs(H[wrong], b[wrong], penalty[wrong])
    return u


def best_of_all_signs(H, b, penalty):
    """`minimise_quadratic` by brute force: solve for each choice of signs (-1, 0, 1), and take the best that fits."""
    H, b, penalty = H[:, None], b[:, None], penalty[:, None]
    signs = np.array(list(product((-1, 0, 1), repeat=b.shape[-1])))                             # (3^K, K)
    free = np.abs(signs)                                # 0 where u is held at 0: its row of H becomes u = 0
    held = np.eye(len(free[0])) * (1 - free)[:, None]
    masked = H * free[:, :, None] * free[:, None] + held
    tried = np.linalg.solve(masked, ((b - penalty * signs) * free)[..., None])                  # (B, 3^K, K, 1)
    value = (tried.swapaxes(2, 3) @ (H @ tried / 2 - b[..., None]))[..., 0, 0]
    tried = tried[..., 0]
    value = value + (penalty * np.abs(tried)).sum(2)
    value[(np.sign(tried) != signs).any(2)] = np.inf    # these signs are not those that were assumed
    best = value.argmin(1)
    return np.take_along_axis(tried, best[:, None, None], axis=1)[:, 0]


def fit(length, fixed, y, weight, C, start=None, tolerance=1e-3):
    """Weights (B, K) that minimise |w|_1 + C sum_n weight_n log_loss(y_n, w.x_n): B problems at once.

    The first feature is length (B, N) or (1, N); the other K - 1 are the same for all problems, fixed (K - 1, N). y
    (N,) in [0, 1]; weight (B, N); C (B,) or a number. Newton's method: a step minimises the quadratic approximation of
    the log-loss plus the penalty itself, see minimise_quadratic(). start (B, K): the weights to begin with (default:
    0). tolerance: the fit ends when a step changes no weight by that much. Sums over rows are computed in the precision
    of `length`, which is that of `weight`, too. scikit-learn's liblinear solves the same problem, to fewer digits.
    """
    B, K = len(weight), 1 + len(fixed)
    penalty = 1 / np.broadcast_to(C, B).astype(float)[:, None]                                  # (B, 1)
    fixed, y = np.asarray(fixed, length.dtype), np.asarray(y, length.dtype)
    products = (fixed[:, None] * fixed).reshape(-1, len(y))                                     # ((K - 1)^2, N)
    w = np.zeros((B, K)) if start is None else np.array(start, dtype=float)
    H = np.empty((B, K, K))
    largest = np.array([np.abs(length).max(), *np.abs(fixed).max(1)])                           # of each feature, (K,)

    def log_odds(w):
        w = w.astype(length.dtype)
        return w[:, :1] * length + w[:, 1:] @ fixed                                             # (B, N)

    def loss(w):
        return penalty[:, 0] * np.abs(w).sum(1) + (weight * log_loss(y, log_odds(w))).sum(1)

    for _ in range(1000):
        p = sigmoid(log_odds(w))
        residual = weight * (p - y)
        of_length = np.einsum("bn,bn->b", residual, length)[:, None]
        g = np.concatenate([of_length, residual @ fixed.T], axis=1)                             # the slope (B, K)
        r = weight * (p - p * p)                                                                # the curvature (B, N)
        H[:, 1:, 1:] = (r @ products.T).reshape(B, K - 1, K - 1)
        r *= length
        H[:, 0, 1:] = H[:, 1:, 0] = r @ fixed.T
        H[:, 0, 0] = np.einsum("bn,bn->b", r, length)
        H += 1e-10 * np.eye(K)
        step = minimise_quadratic(H, (H @ w[..., None])[..., 0] - g, penalty, w) - w
        if np.abs(step).max() < tolerance:      # the next step would be of the order of its square
            return w + step
        # A step that moves no log-odds by more than 1 always lowers the loss: the curvature changes little on the way.
        moved = np.abs(step) @ largest          # a bound, quickly computed
        if moved.max() > 1:
            moved = np.abs(log_odds(step)).max(1)
        if moved.max() > 1:
            worse = loss(w + step) > loss(w)
            step[worse] /= np.maximum(moved, 1)[worse, None]
        w = w + step
    return w


def choose_C(length, fixed, y, weight):
    """The C of C_GRID with the least mean loss in five-fold cross-validation, as AlpacaEval chooses it.

    The losses of different C are nearly the same, but the choice changes the rates of some models by percentage points.
    scikit-learn assigns rows to folds in the order of an unstable sort of equal keys, which depends on the processor;
    here row n is in fold (N - 1 - n) mod 5.
    """
    fold = np.arange(len(y))[::-1] % 5
    test = np.tile(fold == np.arange(5)[:, None], (len(C_GRID), 1))                             # (50, N)
    w = fit(length, fixed, y, weight * ~test, np.repeat(C_GRID, 5))                             # (50, K)
    losses = weight * log_loss(y, w[:, :1] * length + w[:, 1:] @ fixed)                         # (50, N)
    held_out = (losses * test).sum(1) / test.sum(1)
    return C_GRID[held_out.reshape(-1, 5).mean(1).argmin()]


def predicted(weights, difficulty=None):
    """P(win) at equal lengths on each instruction: weights (..., K), difficulty (N,) or None -> (..., N or 1)."""
    a, *b, c = np.moveaxis(np.asarray(weights, dtype=float)[..., None], -2, 0)
    return sigmoid(b[0] * difficulty + c if b else c)


def length_controlled(preferences, lengths, reference_lengths, difficulty=None, gamed=None, C=HARDLY_ANY, counts=None):
    """The length-controlled win rate in percent, its error, and the weights (a, b, c), or (a, c) without difficulties.

    preferences       (N,); unusable ones (NaN) are not fitted, but count in s and in the mean, as in AlpacaEval
    lengths           (N,) characters of the model's answers; reference_lengths of the reference's
    difficulty        (N,) D of the same instructions in the same order
    gamed             from data.alpaca_eval.read_length_control: the reference, told to be brief and told to be long,
                      against itself. Each such row has the weight 0.1, and no term c. These rows pull a and b to
                      the reference's values, so that intervals are those of AlpacaEval's regularised rate
    C                 inverse strength of the L1 penalty; None: chosen by cross-validation
    counts            (B, N) of winrate.resample, for a bootstrap of the whole fit at this C: it gives lc_standard_error
                      and an interval. If the rate cannot be told, lc_unknown says why and replaces all numbers. Without
                      counts, lc_standard_error is what AlpacaEval prints, the spread of the fitted probabilities over
                      instructions. That is no error of the estimate, and often far too small
    """
    p = usable(preferences)
    fitted = ~np.isnan(p)
    if fitted.sum() < 2:                                # too few to fit
        return {}
    gap = np.subtract(reference_lengths, lengths, dtype=float)                                  # (N,)
    fixed = np.ones((1, len(p))) if difficulty is None else np.stack([difficulty, np.ones(len(p))])
    extra, extra_y = (np.zeros((1 + len(fixed), 0)), []) if gamed is None else gamed
    fixed = np.concatenate([fixed[:, fitted], extra[1:]], axis=1)
    y = np.concatenate([p[fitted] - 1, extra_y])

    def rows(counts, dtype=float):
        """The length feature and the weight of all rows that are fitted, both (B, N + G), if row n of the model counts
        counts[b, n] times. G: rows of the gamed baseline."""
        s = deviation(gap, counts).astype(dtype)[:, None]                                       # (B, 1)
        counts = counts.astype(dtype)
        length = np.tanh(gap.astype(dtype) / np.where(s > 0, s, np.inf))
        extra_length = np.broadcast_to(extra[0].astype(dtype), (len(s), len(extra_y)))
        extra_weight = np.full((len(s), len(extra_y)), GAMED_WEIGHT, dtype)
        if fitted.all() and not len(extra_y):           # nothing to leave out or to add
            return length, counts
        return (np.concatenate([length[:, fitted], extra_length], axis=1),
                np.concatenate([counts[:, fitted], extra_weight], axis=1))

    length, weight = rows(np.ones((1, len(p))))
    C = choose_C(length, fixed, y, weight) if C is None else C
    w = fit(length, fixed, y, weight, C)                                                        # (1, K)
    mean, spread = mean_and_error(100 * np.broadcast_to(predicted(w[0], difficulty), len(p)))
    name = "minimal" if difficulty is None else "noreg" if gamed is None else "v1"
    row = {"length_controlled_winrate": mean, "lc_standard_error": spread,
           "lc_weights": w[0].tolist(), "lc_C": float(C), "lc_name": f"length_controlled_{name}"}
    if counts is None:
        return row
    unknown = {"lc_name": row["lc_name"]}
    if why := why_unknown(y, w[:, :1] * length + w[:, 1:] @ fixed, gap[fitted], weight)[0]:
        return unknown | {"lc_unknown": str(why)}

    counts, samples, left_open = counts[counts[:, fitted].sum(1) > 1], [], 0
    dtype = np.float32 if fitted.sum() >= MANY else float       # twice as quick, and exact enough for an error
    for some in np.array_split(counts, max(1, len(counts) * len(y) // 200_000)):                 # parts fit the cache
        length, weight = rows(some, dtype)
        each = fit(length, fixed, y, weight, C, start=np.repeat(w, len(some), 0), tolerance=1e-2)
        rates = predicted(each, difficulty)                                                     # (b, N or 1)
        samples.append(100 * (rates[:, 0] if difficulty is None else (rates * some).sum(1) / some.sum(1)))
        left_open += (why_unknown(y, each[:, :1] * length + each[:, 1:] @ fixed, gap[fitted], weight) != "").sum()
    if left_open > FEW * len(counts):
        return unknown | {"lc_unknown": "a few rows alone decide it, and many resamples lack them"}
    samples = np.concatenate(samples)
    row["lc_standard_error"] = float(samples.std(ddof=1)) if len(samples) > 1 else nan
    row["lc_ci_low"], row["lc_ci_high"] = rate_interval(mean, samples, int(fitted.sum()))
    return row


def why_unknown(y, z, gap, weight):
    """Why the rate cannot be told in each of B problems, or "": (B,) texts.

    y (N + G,): wins in [0, 1] of the model's N rows and of the G rows of the gamed baseline. z, weight (B, N + G):
    their fitted log-odds and weights; a row of weight 0 is not there. gap (N,): lengths l of the model's rows.
    """
    n = len(gap)
    wins, own = y[:n], weight[:, :n]

    def none(holds):
        return own @ holds.astype(float) == 0           # of the model's rows

    certain = np.select([y == 1, y == 0], [1., -1.])    # 0: a fraction, which rules separation out
    separated = np.ones(len(z), dtype=bool)
    for part in (slice(64), slice(64, None)):           # the first 64 rows nearly always rule it out
        left = separated.nonzero()[0]
        separated[left] = ~((z[left, part] * certain[part] <= 0) & (weight[left, part] > 0)).any(1)
    open_ended = (n == len(y)) | (deviation(gap, own) == 0)     # else the gamed baseline shows what length does
    reasons = {"every answer has won": none(wins < 1), "every answer has lost": none(wins > 0),
               "all verdicts are the same": deviation(wins, own) == 0,
               "the fit separates all wins from all losses": separated,
               "every answer is shorter than the reference's": open_ended & none(gap <= 0),
               "every answer is longer than the reference's": open_ended & none(gap >= 0)}
    return np.select(list(reasons.values()), list(reasons), "")


def deviation(x, counts):
    """Standard deviation (B,) of x (N,) if x[n] counts counts[b, n] times; 0 where only rounding is left."""
    x, n = x - x.mean(), counts.sum(1)
    s = np.sqrt(np.maximum(counts @ x ** 2 - (counts @ x) ** 2 / n, 0) / (n - 1))
    return np.where(s > 1e-6 * np.abs(x).max(), s, 0)
