"""rlhf/ppo.py: policy_loss(logp, old_logp, advantages, mask, cliprange, cliprange_high), PPO's clipped surrogate."""
import math

import pytest
import torch

from rlhf import ppo

ONE = torch.ones(1, 1)


def of_token(ratio, advantage, **high):
    """The loss of one token, and whether it counts as clipped, from its ratio of probabilities."""
    loss, clipped = ppo.policy_loss(math.log(ratio) * ONE, 0 * ONE, advantage * ONE, ONE, .2, **high)
    return float(loss), float(clipped)


@pytest.fixture
def batch():
    """logp, old_logp, advantages (3, 5), and a mask."""
    old = -torch.rand(3, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    return old + .5 * torch.randn(3, 5, dtype=torch.float64), old, torch.randn(3, 5, dtype=torch.float64), mask


def test_before_the_first_step_it_is_the_policy_gradient(batch):
    _, old, advantages, mask = batch
    loss, clipped = ppo.policy_loss(old, old, advantages, mask, .2)
    assert torch.isclose(loss, -(advantages * mask).sum()), "at a ratio of 1 the loss is minus the advantages, summed"
    assert clipped == 0, "at a ratio of 1 nothing is clipped"


def test_a_good_token_gains_nothing_beyond_the_range():
    assert of_token(1.5, 2.)[0] == pytest.approx(of_token(1.2, 2.)[0], rel=1e-5), \
        "advantage above 0: a ratio beyond 1 + cliprange must not pay more"
    assert of_token(1.1, 2.)[0] < of_token(1., 2.)[0], "within the range a likelier good token pays"


def test_a_bad_token_gains_nothing_beyond_the_range():
    assert of_token(.5, -2.)[0] == pytest.approx(of_token(.8, -2.)[0], rel=1e-5), \
        "advantage below 0: a ratio below 1 - cliprange must not pay more"
    assert of_token(.9, -2.)[0] < of_token(1., -2.)[0], "within the range an unlikelier bad token pays"


def test_a_step_in_the_wrong_direction_is_never_forgiven():
    assert of_token(.3, 2.)[0] > of_token(.8, 2.)[0] + .5, "a good token that became unlikely costs without limit"
    assert of_token(3., -2.)[0] > of_token(1.2, -2.)[0] + .5, "a bad token that became likely costs without limit"


@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.5, 2., 1), (.5, 2., 0), (1.5, -2., 0), (.5, -2., 1), (1.1, 2., 0), (.9, -2., 0)])
def test_clipped_tokens_are_counted(ratio, advantage, clipped):
    assert of_token(ratio, advantage)[1] == clipped, (
        f"ratio {ratio}, advantage {advantage}: a token counts as clipped where the clipped loss is the larger one")


def test_it_is_a_pessimistic_bound(batch):
    logp, old, advantages, mask = batch
    free = -(advantages * (logp - old).exp() * mask).sum()
    assert ppo.policy_loss(logp, old, advantages, mask, .2)[0] >= free, "clipping may only make the loss larger"
    assert torch.isclose(ppo.policy_loss(logp, old, advantages, mask, 1e9)[0], free), "a huge range clips nothing"


def test_padding_does_not_count(batch):
    logp, old, advantages, mask = batch
    loss, clipped = ppo.policy_loss(logp, old, advantages, mask, .2)
    garbage = [torch.where(mask > 0, x, value) for x, value in ((logp, 2000.), (old, -5.), (advantages, -9.))]
    for one, other in zip(ppo.policy_loss(*garbage, mask, .2), (loss, clipped)):
        assert torch.isclose(torch.as_tensor(one).double(), torch.as_tensor(other).double()), \
            "what stands outside the mask changes the loss or the count; if it is NaN: inf times 0 is NaN, not 0"


def test_a_mask_may_weigh(batch):
    logp, old, advantages, mask = batch
    loss, clipped = ppo.policy_loss(logp, old, advantages, mask.double(), .2)
    half, half_clipped = ppo.policy_loss(logp, old, advantages, .5 * mask.double(), .2)
    assert torch.isclose(half, .5 * loss), "weights of a half give half of the loss: they weigh it, and not the ratio"
    assert float(half_clipped) == .5 * float(clipped), "a clipped token counts as much as it weighs"


def test_the_range_may_be_wider_above():
    assert of_token(1.5, 2., cliprange_high=.6)[0] < of_token(1.2, 2.)[0], "cliprange_high .6 lets a ratio rise to 1.6"
    assert of_token(.5, -2., cliprange_high=.6)[0] == pytest.approx(of_token(.8, -2.)[0], rel=1e-5), \
        "cliprange_high is for rising ratios only"


def test_it_can_be_learned_from(batch):
    logp, old, advantages, mask = batch
    assert ppo.policy_loss(logp.requires_grad_(), old, advantages, mask, .2)[0].requires_grad, \
        "gradients must reach the log-probs"
