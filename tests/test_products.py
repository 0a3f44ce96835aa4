"""Products by oneDNN and with packed weights are the same numbers, and are used where they pay."""
import os

import pytest
import tiny
import torch

import model
import products
from rlhf.logprobs import pack, token_logps
from rlhf.sampler import sample

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 300}
ROWS = [(prompt, answer) for prompt, answer in zip(tiny.texts([5, 9, 2]), tiny.texts([8, 3, 6], seed=9))]


@pytest.fixture(params=[True, False])
def pays(request, monkeypatch):
    """On every processor, once as if oneDNN and bf16 paid and once as if they did not; for small products, too."""
    for name in ("onednn_pays", "bf16_pays"):
        monkeypatch.setattr(products, name, lambda: request.param)
    monkeypatch.setattr(products, "LARGE", 1)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_those_in_fp64(pays, bias):
    r = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=r).requires_grad_() for shape in ((3, 100, 256), (300, 256), (300,)))
    y = products.linear(x, W, b if bias else None)
    exact = x.double() @ W.double().T + (b.double() if bias else 0)
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-4)
    leaves, grad = (x, W, b) if bias else (x, W), torch.randn(y.shape, generator=r)
    ours, theirs = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(exact, leaves, grad.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    names, node = set(), y.grad_fn
    while node is not None:
        names.add(node.name())
        node = next((before for before, _ in node.next_functions if before), None)
    assert ("OneDNNProductBackward" in names) == pays


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_log_probs_and_gradients_of_a_model_do_not_depend_on_what_multiplies(pays, kind):
    """Against the textbook's formula with torch's own products, also of the weights that learn."""
    policy, (ids, mask) = tiny.policy(kind, **WIDE), pack(ROWS)
    weights = policy.trainable()
    logp = token_logps(policy, ids, mask)
    ours = torch.autograd.grad(logp.sum(), weights)
    products.LARGE = 1 << 60                            # monkeypatch puts it back
    plain = tiny.plain_logps(policy, ids, mask)
    torch.testing.assert_close(logp, plain, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours, torch.autograd.grad(plain.sum(), weights)):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
def test_packed_weights_give_the_logits_of_plain_ones(kind, dtype, biases, monkeypatch):
    """Up to rounding, which happens as often: a bias is added before. No product reads a plain weight then."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 products")
    policy, ids = tiny.policy(kind, **WIDE, attention_bias=biases, o_bias=biases, mlp_bias=biases), tiny.ids(2, 7)
    policy.gpt.to(dtype)
    found = []
    for pays in (True, False):
        for name in ("onednn_pays", "bf16_pays"):
            monkeypatch.setattr(products, name, lambda answer=pays: answer)
        with torch.inference_mode(), policy.gpt.fused(policy.role):
            head = policy.gpt.head if policy.gpt.fused_head is None else policy.gpt.fused_head
            weights = [layers.fused[0] for layers in policy.gpt.fused_linears()] + [head]
            assert {W.is_mkldnn for W in weights} == {pays} and head.dtype == torch.float32
            found.append(policy.gpt(ids))
        assert policy.gpt.fused_head is None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert (found[0] - found[1]).norm() <= tolerance * found[1].norm()


def test_sampling_with_packed_weights_writes_the_same_answers_with_their_log_probs(pays):
    policy, prompts = tiny.policy("lora", **WIDE), tiny.texts([5, 9, 2, 4])
    rows, logps = sample(policy, prompts, [7], 12, logps=True)
    ids, mask = pack(rows)
    plain = tiny.plain_logps(policy, ids, mask)
    for row, logp in enumerate(logps):
        torch.testing.assert_close(logp, plain[row][mask[row]], rtol=1e-4, atol=1e-4)


def test_narrow_weights_small_products_and_other_devices_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    wide, narrow = torch.ones(512, 512), torch.ones(512, 255)
    rows = products.LARGE // 512 ** 2
    assert products.to_onednn(torch.ones(rows, 512), wide) and not products.to_onednn(torch.ones(rows - 1, 512), wide)
    assert not products.to_onednn(torch.ones(100_000, 255), narrow) and not products.packed(narrow).is_mkldnn
    assert not products.to_onednn(torch.ones(rows, 512).bfloat16(), wide.bfloat16())
    assert not products.to_onednn(torch.ones(rows, 512, device="meta"), wide.to("meta"))
    assert not products.packed(wide.to(torch.int8)).is_mkldnn and products.packed(wide).is_mkldnn


def test_a_model_without_room_for_a_second_copy_is_not_packed(monkeypatch):
    monkeypatch.setattr(products, "MOST_COPIED", 1000)
    for fp32, bf16 in ((True, False), (False, True)):
        monkeypatch.setattr(products, "onednn_pays", lambda answer=fp32: answer)
        monkeypatch.setattr(products, "bf16_pays", lambda answer=bf16: answer)
        assert products.packs(torch.float32, 1000) == fp32 and products.packs(torch.bfloat16, 1000) == bf16
        assert not any(products.packs(dtype, 1001) for dtype in (torch.float32, torch.bfloat16))
        assert not products.packs(torch.float16, 1000)


def test_weights_are_apart_again_after_an_error_while_they_were_packed(monkeypatch):
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    policy, packed = tiny.policy(**WIDE), iter([1, 2, 3])
    monkeypatch.setattr(model, "packed", lambda W: next(packed))
    with pytest.raises(RuntimeError, match="StopIteration"), policy.gpt.fused(None):
        pass
    assert all(layers.fused is None for layers in policy.gpt.fused_linears()) and policy.gpt.fused_head is None


def test_no_gradient_of_a_gradient():
    """Plain autograd would take the product in the backward pass for a constant."""
    x, W = torch.ones(2, 256, requires_grad=True), torch.ones(256, 256)
    grad, = torch.autograd.grad(products.OneDNNProduct.apply(x, W).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("seconds", "onednn", "bf16"), [
    ({"onednn": 1., "fp32": 2., "bf16": 1.}, True, True), ({"onednn": 1., "fp32": 1.1, "bf16": 10.}, False, False)])
def test_a_trial_on_this_processor_decides(seconds, onednn, bf16, monkeypatch):
    def least_seconds(product, dtype):
        kind = "onednn" if product is products.onednn else "bf16" if dtype == torch.bfloat16 else "fp32"
        return seconds[kind]
    monkeypatch.setattr(products, "least_seconds", least_seconds)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not products.bf16_pays.__wrapped__()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert products.onednn_pays.__wrapped__() == onednn and products.bf16_pays.__wrapped__() == bf16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products.onednn_pays.__wrapped__() and not products.bf16_pays.__wrapped__()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read where Linux shows it")
def test_kernels_for_many_shapes_do_not_pile_up():
    """Once the caches are full. Without a bound 200 further shapes take 240 MB."""
    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    x, W, before = torch.ones(1500, 128), torch.ones(640, 128), 0
    for rows in range(1000, 1400):
        products.onednn(x[:rows], W)
        before = held() if rows == 1200 else before
    assert held() - before < 100e6
