"""rlhf/ppo.py: shape_rewards(score, kl, mask, kl_coef), a score and a KL penalty as rewards of tokens."""
import pytest
import torch

from rlhf import ppo

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
LAST = [3, 2, 4]                        # where each answer ends


@pytest.fixture
def given():
    """Scores (3,) and KL (3, 5), with garbage outside the mask."""
    return torch.randn(3), torch.rand(3, 5) + 100 * (1 - MASK)


def test_rewards_are_of_tokens(given):
    assert ppo.shape_rewards(*given, MASK, .1).shape == (3, 5), "a reward for each token, (B, T-1)"


def test_nothing_is_paid_outside_the_mask(given):
    rewards = ppo.shape_rewards(*given, MASK, .1)
    assert not rewards[MASK == 0].any(), "prompts and padding have no rewards, whatever stands there"


def test_a_row_adds_up_to_its_score_less_the_price_of_its_kl(given):
    score, kl = given
    paid = score - (ppo.shape_rewards(score, kl, MASK, .1) * MASK).sum(1)
    assert torch.allclose(paid, .1 * (kl * MASK).sum(1), atol=1e-5), (
        "a nat of KL costs kl_coef: the further the policy is from the reference, the lower are the rewards")


def test_the_score_comes_with_the_last_token(given):
    score, kl = given
    added = ppo.shape_rewards(score + 1, kl, MASK, .1) - ppo.shape_rewards(score, kl, MASK, .1)
    for row, last in zip(added, LAST):
        expected = torch.zeros(5)
        expected[last] = 1
        assert torch.allclose(row, expected, atol=1e-5), "the score is paid once, at the last token under the mask"


def test_the_penalty_comes_with_each_token(given):
    score, kl = given
    more = torch.rand(3, 5)
    added = ppo.shape_rewards(score, kl + more, MASK, .5) - ppo.shape_rewards(score, kl, MASK, .5)
    assert torch.allclose(added * MASK, -.5 * more * MASK, atol=1e-4), \
        "each token pays for its own KL, at once"


def test_without_a_price_only_scores_are_left(given):
    score, kl = given
    rewards = ppo.shape_rewards(score, kl, MASK, 0.)
    assert torch.allclose(rewards.sum(1), score), "kl_coef 0: a row's rewards are its score"
    assert (rewards != 0).sum() == 3, "kl_coef 0: one reward in each row"
