"""rlhf/ppo.py: gae(rewards, values, mask, gamma, lam), generalised advantage estimation."""
import pytest
import torch

from rlhf import ppo

MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
ANSWERS = [(1, 5), (2, 4), (0, 6)]      # the columns of each answer


@pytest.fixture
def given():
    """Rewards (3, 6), 0 outside the mask, and values (3, 6), which are garbage there."""
    values = torch.randn(3, 6, dtype=torch.float64)
    return torch.randn(3, 6, dtype=torch.float64) * MASK, torch.where(MASK > 0, values, 50.)


def by_hand(rewards, values, gamma, lam):
    """Advantages of one answer by the definition: the mean of the advantages with 1, 2, ... rewards and then a value,
    each weighed lam times as much as the one before; the last one, to the answer's end, has all that is left."""
    n, found = len(rewards), []
    for t in range(n):
        total, weight = 0., 1.
        for k in range(1, n - t + 1):
            to_the_end = k == n - t
            ahead = 0. if to_the_end else gamma ** k * values[t + k]
            advantage = sum(gamma ** i * rewards[t + i] for i in range(k)) + ahead - values[t]
            total += weight * (1 if to_the_end else 1 - lam) * advantage
            weight *= lam
        found.append(total)
    return found


def test_padding_and_prompts_count_nowhere(given):
    rewards, values = given
    for one, other in zip(ppo.gae(rewards, values, MASK, .9, .8),
                          ppo.gae(rewards, torch.where(MASK > 0, values, -7.), MASK, .9, .8)):
        assert torch.allclose(one, other), (
            "values outside the mask, such as the one after the last token, change something")
        assert not one[MASK == 0].any(), "outside the mask everything is 0"


@pytest.mark.parametrize("gamma, lam", [(1., .95), (.9, .5), (1., 0.), (.8, 1.)])
def test_the_definition_on_small_cases(given, gamma, lam):
    rewards, values = given
    advantages, _ = ppo.gae(rewards, values, MASK, gamma, lam)
    for row, (start, end) in enumerate(ANSWERS):
        expected = by_hand(rewards[row, start:end].tolist(), values[row, start:end].tolist(), gamma, lam)
        assert torch.allclose(advantages[row, start:end], torch.tensor(expected, dtype=torch.float64)), \
            f"gamma {gamma}, lambda {lam}: not the weighted mean of n-step advantages that by_hand() adds up"


def test_without_values_an_advantage_is_what_is_still_to_come(given):
    rewards, values = given
    advantages, _ = ppo.gae(rewards, 0 * values, MASK, 1., 1.)
    for row, (start, end) in enumerate(ANSWERS):
        for t in range(start, end):
            assert torch.isclose(advantages[row, t], rewards[row, t:end].sum()), "lambda = gamma = 1, values 0"


@pytest.mark.parametrize("lam", [0., .5, 1.])
def test_perfect_values_leave_no_advantage(given, lam):
    rewards, _ = given
    values = torch.full_like(rewards, 50.)
    for row, (start, end) in enumerate(ANSWERS):
        for t in range(start, end):
            values[row, t] = sum(.9 ** (u - t) * rewards[row, u] for u in range(t, end))
    advantages, _ = ppo.gae(rewards, values, MASK, .9, lam)
    assert torch.allclose(advantages, torch.zeros_like(advantages), atol=1e-9), (
        "values that know all rewards to come are never surprised; and after an answer's last token nothing comes")


def test_more_padding_changes_nothing(given):
    def wider(x):
        return torch.cat((x, x.new_full((3, 4), 9)), 1)
    mask = torch.cat((MASK, torch.zeros(3, 4, dtype=MASK.dtype)), 1)
    rewards, values = given
    for one, other in zip(ppo.gae(wider(rewards), wider(values), mask, .9, .8), ppo.gae(*given, MASK, .9, .8)):
        assert torch.allclose(one[:, :6], other), "four more columns of padding change the answer"


def test_returns_are_what_the_values_should_have_been(given):
    rewards, values = given
    advantages, returns = ppo.gae(rewards, values, MASK, .9, .8)
    assert torch.allclose(returns - values * MASK, advantages), "a return less its value is the advantage"
    _, returns = ppo.gae(rewards, values, MASK, 1., 1.)
    for row, (start, _) in enumerate(ANSWERS):
        assert torch.isclose(returns[row, start], rewards[row].sum()), "lambda 1: a return is made of rewards alone"
