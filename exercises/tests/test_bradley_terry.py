"""rlhf/reward.py: bradley_terry(chosen, rejected), the loss of a reward model on pairs."""
import math

import torch

from rlhf import reward


def loss(*scores):
    """Losses of pairs from two lists of scores."""
    chosen, rejected = (torch.as_tensor(each, dtype=torch.float64) for each in scores)
    return reward.bradley_terry(chosen, rejected)


def probability(*scores):
    """The probability that the loss gives to the labels: it is a negative log-likelihood."""
    return torch.exp(-loss(*scores))


def test_one_loss_for_each_pair():
    assert loss(torch.randn(7), torch.randn(7)).shape == (7,), "a loss (B,), one for each pair"


def test_equal_scores_are_a_coin():
    assert math.isclose(loss([3.], [3.]).item(), math.log(2), rel_tol=1e-6), "equal scores: the label has 1/2"


def test_the_two_labels_of_a_pair_add_up_to_one():
    one, other = torch.randn(2, 9, dtype=torch.float64)
    total = probability(one, other) + probability(other, one)
    assert torch.allclose(total, torch.ones(9, dtype=torch.float64)), "one of the two answers is better: p + q = 1"


def test_only_the_difference_counts():
    one, other = torch.randn(2, 9, dtype=torch.float64)
    assert torch.allclose(loss(one + 5, other + 5), loss(one, other)), "5 points more for both change nothing"


def test_a_higher_score_of_the_chosen_answer_costs_less():
    losses = loss([-2., -1., 0., 1., 2.], [0.] * 5)
    assert (losses.diff() < 0).all(), "the loss falls as the chosen answer's score rises"
    assert (losses > 0).all(), "a probability is below 1, so the loss is above 0"


def test_odds_multiply_along_a_chain():
    a, b, c = torch.randn(3, 9, dtype=torch.float64)

    def odds(x, y):
        return probability(x, y) / probability(y, x)
    assert torch.allclose(odds(a, c), odds(a, b) * odds(b, c)), (
        "odds multiply in this model: if a beats b with 2 to 1, and b beats c with 3 to 1, then a beats c with 6 to 1")


def test_a_lead_of_log_3_wins_three_times_of_four():
    assert math.isclose(probability([math.log(3)], [0.]).item(), .75, rel_tol=1e-6), "scores are in units of log-odds"


def test_large_margins_are_finite():
    losses = loss([1000., 0.], [0., 1000.])
    assert losses.isfinite().all(), "a margin of 1000 must not overflow: the exponential of 1000 does"
    assert losses[0].item() < 1e-6 and math.isclose(losses[1].item(), 1000, rel_tol=1e-6), (
        "a huge margin costs nothing on the right side, and as much as the margin itself on the wrong one")


def test_it_can_be_learned_from():
    chosen = torch.zeros(3, requires_grad=True)
    assert reward.bradley_terry(chosen, torch.zeros(3)).requires_grad, "gradients must reach the scores"
