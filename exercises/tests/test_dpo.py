"""rlhf/dpo.py: dpo_loss(logp, ref_logp, lengths, cfg), a loss on pairs without a reward model."""
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf import dpo

LENGTHS = torch.tensor([[3, 9, 4, 7], [8, 2, 4, 6]])


@pytest.fixture
def logps():
    """Log-probs (2, 4) of chosen and rejected answers, by the policy and by the reference."""
    return -10 * torch.rand(2, 2, 4, dtype=torch.float64)


def loss(logp, ref_logp, beta=.1, lengths=LENGTHS):
    return dpo.dpo_loss(logp, ref_logp, lengths, SimpleNamespace(beta=beta))


def test_shapes(logps):
    losses, rewards = loss(*logps)
    assert losses.shape == (4,), "a loss for each pair"
    assert rewards.shape == (2, 4), "an implicit reward for each answer, chosen ones first"


def test_it_starts_at_log_2(logps):
    losses, rewards = loss(logps[0], logps[0])
    assert torch.allclose(losses, torch.full_like(losses, math.log(2))), "policy = reference: every loss is log 2"
    assert not rewards.any(), "policy = reference: every implicit reward is 0"


def test_only_the_distance_to_the_reference_counts(logps):
    logp, ref = logps
    shift = torch.randn(2, 4, dtype=torch.float64)
    for one, other in zip(loss(logp + shift, ref + shift), loss(logp, ref)):
        assert torch.allclose(one, other), "an answer that is likelier for policy and reference alike changes nothing"
    assert not torch.allclose(loss(logp, ref + shift)[0], loss(logp, ref)[0]), "the reference must count"


def test_the_implicit_reward_is_in_units_of_beta(logps):
    logp, ref = logps
    gained = loss(logp + 1, ref, beta=.3)[1] - loss(logp, ref, beta=.3)[1]
    assert torch.allclose(gained, torch.full_like(gained, .3)), "one nat more for an answer is a reward of beta more"


def test_the_loss_knows_only_the_margin(logps):
    logp, ref = logps
    assert torch.allclose(loss(logp + 1, ref)[0], loss(logp, ref)[0]), "a nat more for both answers changes no loss"


def test_a_likelier_chosen_answer_costs_less(logps):
    logp, ref = logps
    better = logp + torch.tensor([[1.], [0.]])
    assert (loss(better, ref)[0] < loss(logp, ref)[0]).all(), "the first row is the chosen answer"


def test_swapped_labels_have_the_other_probability(logps):
    logp, ref = logps
    one, other = loss(logp, ref)[0], loss(logp.flip(0), ref.flip(0))[0]
    assert torch.allclose((-one).exp() + (-other).exp(), torch.ones_like(one)), "one of the two answers is better"


def test_a_margin_of_log_3_is_three_to_one():
    logp = torch.tensor([[math.log(3) / .5], [0.]])
    losses, _ = loss(logp, torch.zeros(2, 1), beta=.5, lengths=torch.ones(2, 1))
    assert math.isclose(losses.item(), math.log(4 / 3), rel_tol=1e-5), "beta times the log-ratio is in log-odds"


def test_long_answers_count_whole(logps):
    for one, other in zip(loss(*logps, lengths=LENGTHS), loss(*logps, lengths=3 * LENGTHS)):
        assert torch.equal(one, other), "DPO takes log-probs of whole answers, not means over their tokens"


def test_far_margins_are_finite():
    losses, _ = loss(torch.tensor([[0., -2000.], [-2000., 0.]]), torch.zeros(2, 2), 1., torch.ones(2, 2))
    assert losses.isfinite().all(), "a margin of 2000 nats must not overflow"


def test_losses_have_gradients_and_rewards_have_none(logps):
    losses, rewards = loss(logps[0].clone().requires_grad_(), logps[1])
    assert losses.requires_grad, "gradients must reach the policy's log-probs"
    assert not rewards.requires_grad, "the rewards are only logged: detach them"
