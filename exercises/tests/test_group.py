"""rlhf/grpo.py: group_advantages(roll, cfg), advantages of answers within the group of their prompt."""
from types import SimpleNamespace

import pytest
import torch

from rlhf import grpo

P, N = 5, 4                             # prompts, and answers to each


def advantages(scores, scale=True):
    """Advantages (P, n) from scores (P, n)."""
    roll = SimpleNamespace(score=scores.flatten(), n=scores.shape[1])
    found = grpo.group_advantages(roll, SimpleNamespace(n=scores.shape[1], scale_rewards=scale))
    assert found.shape == (scores.numel(),), "an advantage for each answer, (B,)"
    return found.view(scores.shape)


@pytest.fixture
def scores():
    return 2 + 3 * torch.randn(P, N)


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_adds_up_to_0(scores, scale):
    assert torch.allclose(advantages(scores, scale).sum(1), torch.zeros(P), atol=1e-4), (
        "what is above the mean of a group and what is below it cancel, in each group")


@pytest.mark.parametrize("scale", [True, False])
def test_an_easy_prompt_has_no_advantage(scores, scale):
    shifted = scores.clone()
    shifted[0] += 10
    assert torch.allclose(advantages(shifted, scale), advantages(scores, scale), atol=1e-4), \
        "10 points more for all answers to one prompt change nothing"


@pytest.mark.parametrize("scale", [True, False])
def test_groups_do_not_see_each_other(scores, scale):
    other = scores.clone()
    other[1:] = 7 * torch.randn(P - 1, N)
    assert torch.allclose(advantages(other, scale)[0], advantages(scores, scale)[0], atol=1e-4), \
        "the answers to other prompts change the advantages of the first group"


def test_units_do_not_matter_if_advantages_are_scaled(scores):
    larger = scores.clone()
    larger[2] *= 10
    assert torch.allclose(advantages(larger), advantages(scores), atol=1e-2), "scores ten times as large in one group"
    deviations = advantages(scores).std(1)
    assert torch.allclose(deviations, torch.ones(P), atol=1e-2), "each group has deviation 1, which divides by n - 1"


def test_units_matter_if_advantages_are_not_scaled(scores):
    assert torch.allclose(advantages(10 * scores, False), 10 * advantages(scores, False), atol=1e-3), \
        "scale_rewards False: advantages are in the units of the scores"
    best, second = advantages(scores, False)[0].topk(2).values
    assert torch.isclose(best - second, -scores[0].topk(2).values.diff()[0], atol=1e-4), \
        "scale_rewards False: differences of advantages are those of scores"


def test_better_answers_have_higher_advantages(scores):
    assert torch.equal(advantages(scores).argsort(1), scores.argsort(1)), "the order within a group stays"


def test_of_two_answers_one_wins_what_the_other_loses():
    found = advantages(torch.tensor([[1., 3.], [-8., 100.]]))
    assert torch.allclose(found, torch.tensor([-1., 1.]) * .5 ** .5, atol=1e-3), (
        "two answers have -0.707 and 0.707, however far apart they are")


def test_equal_scores_teach_nothing():
    assert not advantages(torch.full((P, N), 3.)).any(), "a group of equal scores has advantages 0, and no NaN"
