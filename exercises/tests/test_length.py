"""stats/length.py: fit(...), the logistic regression behind the length-controlled win rate."""
import numpy as np
import pytest

from stats import length

N = 60


@pytest.fixture
def rows(rng):
    """A feature of length (1, N), the fixed features (2, N), of which the last is 1, and wins y (N,)."""
    feature, hard = rng.normal(size=(1, N)), rng.normal(size=N)
    wins = rng.random(N) < 1 / (1 + np.exp(-(feature[0] + .5 * hard + .3)))
    return feature, np.stack([hard, np.ones(N)]), wins.astype(float)


def fitted(rows, weight=None, C=10., **start):
    feature, fixed, y = rows
    return length.fit(feature, fixed, y, np.ones((1, len(y))) if weight is None else weight, C, **start)


def objective(w, rows, C):
    """What the weights w (K,) shall make as small as possible."""
    feature, fixed, y = rows
    log_odds = w[0] * feature[0] + w[1:] @ fixed
    return np.abs(w).sum() + C * length.log_loss(y, log_odds).sum()


@pytest.mark.parametrize("C", [.05, 1., 100.])
def test_no_other_weights_are_better(rows, rng, C):
    w = fitted(rows, C=C)
    assert w.shape == (1, 3), "weights (B, K): one problem, three features"
    least = objective(w[0], rows, C)
    for size in (.3, .03, .003):
        for direction in (*np.eye(3), *-np.eye(3), *rng.normal(size=(20, 3))):
            better = objective(w[0] + size * direction, rows, C)
            assert better >= least - 1e-6 * C, f"C = {C}: {size} away there are weights with a lower |w|_1 + C loss"


def test_without_features_it_is_the_share_of_wins():
    y = np.array([1., 1., 1., 0.])
    w = length.fit(np.zeros((1, 4)), np.ones((1, 4)), y, np.ones((1, 4)), 1e6)
    assert w[0] == pytest.approx([0, np.log(3)], abs=1e-3), (
        "three of four won: log-odds of log 3, and no weight for a length that is always 0")


def test_soft_labels_give_their_weights_back(rows):
    feature, fixed, _ = rows
    true = np.array([1.5, -.7, .4])
    y = 1 / (1 + np.exp(-(true[0] * feature[0] + true[1:] @ fixed)))
    assert fitted((feature, fixed, y), C=1e6)[0] == pytest.approx(true, abs=1e-2), \
        "with hardly any penalty the weights that made the labels are found again"


def test_a_row_that_weighs_2_counts_twice_and_one_that_weighs_0_not_at_all(rows):
    feature, fixed, y = rows
    weight = np.ones((1, N))
    weight[0, :5], weight[0, 5:9] = 2, 0
    kept = np.r_[0:5, 0:5, 9:N]
    again = fitted((feature[:, kept], fixed[:, kept], y[kept]))
    assert fitted(rows, weight) == pytest.approx(again, abs=1e-2), "weights of rows stand for how often they are there"


def test_several_problems_at_once_are_each_one_alone(rows, rng):
    weight = rng.integers(0, 3, (4, N)).astype(float)
    together = fitted(rows, weight, np.array([1., 3., 10., 30.]))
    for found, own, C in zip(together, weight, (1., 3., 10., 30.)):
        assert found == pytest.approx(fitted(rows, own[None], C)[0], abs=1e-2), "each problem has its own weights and C"


def test_wins_and_losses_swapped_turn_every_sign(rows):
    feature, fixed, y = rows
    assert fitted((feature, fixed, 1 - y)) == pytest.approx(-fitted(rows), abs=1e-2), "1 - y instead of y: -w"


def test_a_strong_penalty_leaves_exactly_0(rows):
    assert not fitted(rows, C=1e-4).any(), "the penalty is |w|: where it is strong, weights are 0, not only small"


def test_the_start_does_not_matter(rows):
    far = fitted(rows, start=np.array([[2., -2., 1.]]))
    assert far == pytest.approx(fitted(rows), abs=1e-2), (
        "there is one minimum, wherever one starts; a step after which the loss is larger was too long")


def rate(preferences, lengths, references):
    return length.length_controlled(preferences, lengths, references)["length_controlled_winrate"]


def test_equally_long_answers_have_their_win_rate(rng):
    preferences, lengths = 1. + (rng.random(200) < .7), rng.integers(50, 500, 200)
    assert rate(preferences, lengths, lengths) == pytest.approx(100 * (preferences - 1).mean(), abs=.2), \
        "where nothing differs in length, there is nothing to control"


def test_a_judge_that_only_likes_length_is_seen_through(rng):
    references = rng.integers(100, 300, 400)
    lengths = references + rng.integers(-60, 140, 400)
    preferences = 1 + 1 / (1 + np.exp(-(lengths - references) / 40))       # fractions: how sure the judge is
    controlled = rate(preferences, lengths, references)
    assert abs(controlled - 50) < 5, f"at equal lengths this judge throws a coin: about 50, not {controlled:.1f}"


def test_units_of_length_do_not_matter(rng):
    references, lengths = rng.integers(100, 300, (2, 200))
    preferences = 1. + (rng.random(200) < .6)
    one, other = rate(preferences, lengths, references), rate(preferences, 4 * lengths, 4 * references)
    assert one == pytest.approx(other, abs=.05), "lengths in bytes instead of characters give the same rate"
