"""model.py: adapted(y, x, A, B, scale), what an adapter adds to the output of a frozen layer."""
import pytest
import torch

import model

IN, OUT, R = 6, 5, 2


@pytest.fixture
def layer():
    """x (3, 4, in), W (out, in), A (r, in), B (out, r)."""
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, IN), (OUT, IN), (R, IN), (OUT, R))]


def adapted(layer, scale=2.):
    x, W, A, B = layer
    return model.adapted(x @ W.T, x, A, B, scale)


def test_the_shape_is_that_of_the_layer(layer):
    assert adapted(layer).shape == (3, 4, OUT), "(..., out), whatever comes before"


@pytest.mark.parametrize("zero", ["A", "B", "scale"])
def test_a_fresh_adapter_changes_nothing(layer, zero):
    x, W, A, B = layer
    found = model.adapted(x @ W.T, x, A * (zero != "A"), B * (zero != "B"), 2. * (zero != "scale"))
    assert torch.allclose(found, x @ W.T), f"{zero} = 0: the layer answers as it did without the adapter"


def test_it_acts_as_another_weight_matrix(layer):
    x, W, *_ = layer
    nothing, unit = torch.zeros(OUT, dtype=torch.float64), torch.eye(IN, dtype=torch.float64)
    other = torch.stack([adapted((e[None], W, *layer[2:]))[0] - nothing for e in unit], 1)         # (out, in)
    assert torch.allclose(adapted(layer), x @ other.T), "an adapter can be merged: there is a W' that gives the same"
    rank = torch.linalg.matrix_rank(other - W)
    assert rank == R, f"W' - W has rank r = {R}, not {rank}: r numbers lie between A and B"


def test_the_scale_scales_only_the_adapter(layer):
    x, W, *_ = layer
    once, twice = (adapted(layer, scale) - x @ W.T for scale in (1., 2.))
    assert torch.allclose(twice, 2 * once) and once.any(), "twice the scale: twice what the adapter adds"


def test_one_number_by_hand():
    one = torch.ones(1, 1)
    assert model.adapted(10 * one, 3 * one, 2 * one, 5 * one, .5).item() == pytest.approx(25), \
        "x = 3, A = 2, B = 5, scale 1/2: 15 more than the layer's 10"


def test_the_product_of_a_and_b_is_not_made():
    huge = 1e30 * torch.ones(1, 2)      # in fp32, B A would be infinite
    found = model.adapted(torch.zeros(1, 2), torch.tensor([[1., -1.]]), huge, huge.T, 1.)
    assert not found.any(), "A x is 0, so B (A x) is: B A is as large as W, and here too large for fp32"


def test_a_and_b_are_learned(layer):
    x, W, A, B = layer
    for learned in (A, B):
        assert adapted((x, W, A, B)).requires_grad is False
        learned.requires_grad_()
        assert adapted((x, W, A, B)).requires_grad, "gradients must reach both A and B"
        learned.requires_grad_(False)
