"""rlhf/ppo.py: whiten(x, mask, shift_mean), numbers under a mask with mean 0 and deviation 1."""
import pytest
import torch

from rlhf import ppo

MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])


@pytest.fixture
def x():
    return 3 + 5 * torch.randn(3, 6, dtype=torch.float64)


def mean_and_deviation(white):
    tokens = white[MASK > 0]
    return tokens.mean().item(), tokens.std(correction=0).item()


def test_mean_0_and_deviation_1_over_the_tokens(x):
    mean, deviation = mean_and_deviation(ppo.whiten(x, MASK))
    assert mean == pytest.approx(0, abs=1e-6), "the mean is over the tokens under the mask, of all rows together"
    assert deviation == pytest.approx(1, abs=1e-4), "so is the deviation, which divides by the number of these tokens"


def test_what_stands_outside_the_mask_does_not_matter(x):
    garbage = torch.where(MASK > 0, x, 1000.)
    assert torch.allclose(ppo.whiten(garbage, MASK), ppo.whiten(x, MASK)), "padding counts in the mean or the deviation"
    assert not ppo.whiten(garbage, MASK)[MASK == 0].any(), "outside the mask the result is 0"


def test_shift_and_scale_are_taken_out(x):
    assert torch.allclose(ppo.whiten(7 * x + 2, MASK), ppo.whiten(x, MASK)), "7 x + 2 and x are the same when whitened"
    assert torch.allclose(ppo.whiten(-x, MASK), -ppo.whiten(x, MASK)), "the sign stays"


@pytest.mark.parametrize("shift_mean", [True, False])
def test_differences_keep_their_proportions(x, shift_mean):
    kept, white = x[MASK > 0], ppo.whiten(x, MASK, shift_mean)[MASK > 0]
    ratio = (white[1:] - white[0]) / (kept[1:] - kept[0])
    assert torch.allclose(ratio, ratio[0]), "all numbers are scaled by the same factor, in every row"


def test_without_the_shift_the_mean_stays(x):
    mean, deviation = mean_and_deviation(ppo.whiten(x, MASK, shift_mean=False))
    assert mean == pytest.approx(x[MASK > 0].mean().item(), abs=1e-6), "shift_mean=False: the mean is as it was"
    assert deviation == pytest.approx(1, abs=1e-4), "shift_mean=False: the deviation is 1 all the same"


def test_equal_numbers_become_0():
    white = ppo.whiten(torch.full((3, 6), 4.), MASK)
    assert white.isfinite().all() and not white.any(), "without any spread there is nothing to scale: 0, and no NaN"
