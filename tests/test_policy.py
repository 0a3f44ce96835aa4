"""Token log-probs against the textbook, copies that move alone, folders that transformers and peft load."""
import dataclasses
import json

import pytest
import tiny
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from data.adapters import load_adapter
from rlhf import dpo, policy, sft
from rlhf.logprobs import ChunkedLogProb, pack, token_logps
from rlhf.policy import Policy

torch.set_num_threads(1)
KINDS = {"full": {}, "tied": {"tie_word_embeddings": True}, "lora": {}}
ROWS = list(zip(tiny.texts([3, 5, 1, 4]), tiny.texts([4, 1, 7, 2], seed=9)))


def make(kind):
    return tiny.policy("lora" if kind == "lora" else "full", **KINDS[kind])


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- alignment ---------------------------------------------------------------------------------------------

def test_pack_by_hand_where_pad_and_eos_share_an_id():
    """The mask comes from lengths: it holds the EOS (0) that was written, once, and no pad (0)."""
    ids, mask = pack([([5, 6], [7, 0]), ([5], [8]), ([6, 6, 6], [0, 0])])
    assert ids.tolist() == [[5, 6, 7, 0, 0], [5, 8, 0, 0, 0], [6, 6, 6, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]


token_ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(st.lists(st.tuples(token_ids, token_ids | st.just([])), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_mask_marks_the_response_and_the_rows_are_right_padded(rows):
    ids, mask = pack(rows)
    assert mask.shape == (len(rows), ids.shape[1] - 1)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        assert ids[row].tolist() == prompt + response + [0] * (ids.shape[1] - length)
        assert ids[row, 1:][mask[row]].tolist() == response
        assert mask[row].nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, length - 1))


# --- token log-probs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1., .7, 2.])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_token_logps_and_gradients_equal_the_textbook(kind, chunk, temperature):
    model, (ids, mask) = make(kind), pack(ROWS)
    weight, params = torch.randn(mask.shape), model.trainable()          # a different pull on each token
    mine = token_logps(model, ids, mask, temperature, chunk)
    plain = tiny.plain_logps(model, ids, mask, temperature)
    assert mine.dtype == torch.float32
    close(mine, plain)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), params) for x in (mine, plain)), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("chunk", [3, 7])
@pytest.mark.parametrize("divisor, cap", [(1., 0.), (3., 0.), (1., 2.), (.5, 2.)])
def test_chunked_gradients_are_exact_to_fp32(frozen_head, chunk, divisor, cap):
    """Against autograd in fp64, so that the tolerance is about rounding alone; also with a divisor and a cap."""
    r = torch.Generator().manual_seed(0)
    h, W, targets, pull = (torch.randn(7, 5, generator=r), torch.randn(11, 5, generator=r),
                           torch.randint(11, (7,), generator=r), torch.randn(7, generator=r))
    h, W = h.requires_grad_(), W.requires_grad_(not frozen_head)
    inputs = [h] if frozen_head else [h, W]
    logp = ChunkedLogProb.apply(h, W, targets, 1.5, chunk, divisor, cap)
    exact = h.double() @ W.double().T / divisor
    if cap:
        exact = cap * (exact / cap).tanh()
    exact = (exact / 1.5).log_softmax(-1)[range(7), targets]
    assert (logp - exact).abs().max() < 1e-6
    gradients = (torch.autograd.grad(x, inputs) for x in (logp @ pull, exact @ pull.double()))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_logits_of_all_tokens_never_exist():
    """16 chunks of 4 rows: nothing as large as N x V, neither on the way there nor back."""
    N, V, D = 64, 97, 8
    h, W = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.arange(N)
    with tiny.Watch() as chunked:
        ChunkedLogProb.apply(h, W, targets, 1., 4).sum().backward()
    with tiny.Watch() as plain:
        (h @ W.T).log_softmax(-1)[range(N), targets].sum().backward()
    seen, all_logits = (watch.largest("cpu", torch.float32) for watch in (chunked, plain))
    assert seen == V * D < N * V == all_logits


def test_index_t_speaks_of_token_t_plus_1():
    """Another last token changes the last log-prob and no other; another first one leaves none as it was."""
    model, (ids, mask) = make("full"), pack([ROWS[0]])
    logp, (last, first) = token_logps(model, ids, mask), (ids.clone(), ids.clone())
    last[0, -1], first[0, 0] = (ids[0, -1] + 1) % 61, (ids[0, 0] + 1) % 61
    moved = (token_logps(model, last, mask) - logp).abs() > 1e-4
    assert moved[0].tolist() == [False] * (mask.shape[1] - 1) + [True]
    assert torch.equal((token_logps(model, first, mask) - logp).abs() > 1e-4, mask)


def test_log_probs_of_a_row_depend_on_no_other_row_and_on_no_padding():
    model, (ids, mask) = make("lora"), pack(ROWS)
    logp = token_logps(model, ids, mask)
    wide = token_logps(model, torch.nn.functional.pad(ids, (0, 7)), torch.nn.functional.pad(mask, (0, 7)))
    close(wide[:, :mask.shape[1]], logp)
    assert (wide[:, mask.shape[1]:] == 0).all()
    for row, (prompt, response) in enumerate(ROWS):
        alone = token_logps(model, *pack([(prompt, response)]))[0]
        close(logp[row, :len(alone)], alone)


def test_a_mask_without_tokens_gives_zeros_and_no_nan():
    model, (ids, mask) = make("full"), pack(ROWS)
    params = model.trainable()
    logp = token_logps(model, ids, torch.zeros_like(mask))
    logp.sum().backward()
    assert (logp == 0).all() and all(p.grad is None or (p.grad == 0).all() for p in params)


# --- copies ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_starts_equal_and_moves_alone(kind):
    """The reference stays bit for bit where it is while the policy learns."""
    ref, (ids, mask) = make(kind), pack(ROWS)
    before, state = token_logps(ref, ids, mask), {k: v.clone() for k, v in ref.gpt.state_dict().items()}
    model = ref.copy("policy")
    assert torch.equal(token_logps(model, ids, mask), before)
    optimizer = torch.optim.SGD(model.trainable(), lr=1e-4, maximize=True)
    for _ in range(3):
        optimizer.zero_grad()
        token_logps(model, ids, mask).sum().backward()
        optimizer.step()
    assert token_logps(model, ids, mask).sum() > before.sum() + .1
    assert torch.equal(token_logps(ref, ids, mask), before)
    assert all(torch.equal(ref.gpt.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_trained_is_fp32(kind):
    model = tiny.policy(kind)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.trainable())
    model.gpt.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="low precision"):
        model.trainable()


# --- on disk -----------------------------------------------------------------------------------------------

@pytest.fixture
def base(tmp_path):
    """The folder of a base checkpoint that transformers has written."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**tiny.SHAPE, bos_token_id=None, eos_token_id=None)
    tiny.randomise(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
    toy.tokenizer(tmp_path / "base")
    return tmp_path / "base"


def trained(base, kind):
    """(settings, a policy that has moved away from the base, and is saved)."""
    rank = {"full": 0, "lora": 4}[kind]
    cfg = dpo.Config(model=str(base), out=str(base.parent), device="cpu", lora_rank=rank, lora_alpha=12.)
    cfg.stage = "dpo"
    model = policy.fresh(cfg, "policy")
    for p in model.trainable():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * .05)
    cfg.dir().mkdir(parents=True)
    policy.save(model, cfg)
    return cfg, model


def logits(model):
    with model.gpt.using(model.role), torch.no_grad():
        return model.gpt(tiny.ids(2, 9))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_saved_policy_comes_back_frozen_and_equal(kind, base):
    cfg, model = trained(base, kind)
    back, fresh = policy.load(cfg, "dpo"), policy.fresh(cfg, "sft")
    assert back.role == ("dpo" if kind == "lora" else None)
    assert torch.equal(logits(back), logits(model))
    assert not any(p.requires_grad for p in back.gpt.parameters())
    assert torch.equal(logits(fresh), logits(Policy(policy.load_base(cfg))))
    assert (logits(back) - logits(fresh)).abs().max() > .1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_transformers_and_peft_load_what_was_saved(kind, base):
    cfg, model = trained(base, kind)
    folder, auto = cfg.dir() / "checkpoint", pytest.importorskip("transformers").AutoModelForCausalLM
    if kind == "full":
        theirs = auto.from_pretrained(folder)
    else:
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(auto.from_pretrained(base), folder)
        assert load_adapter(folder)[1]["base_model_name_or_path"] == str(base)
    with torch.no_grad():
        close(logits(model), theirs(tiny.ids(2, 9)).logits, 2e-5)


def test_an_adapter_keeps_the_scale_it_was_trained_with(base):
    """After `--sft.lora_alpha 12` a later stage with alpha 32 must not scale what it loads."""
    cfg, model = trained(base, "lora")
    later = dataclasses.replace(cfg, lora_alpha=32.)
    back = policy.load(later, "dpo")
    assert torch.equal(logits(back), logits(model))
    assert torch.equal(logits(back.copy("policy")), logits(model))
    policy.save(back.copy("again"), later)
    assert torch.equal(logits(policy.load(cfg, "dpo")), logits(model))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_a_full_checkpoint_of_a_bf16_base_is_fp32_to_transformers_too(spelling, base):
    """Learning moves weights by less than bf16 can hold, so whoever loads them must not round them back."""
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    auto.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config[spelling] = config.pop("dtype")              # transformers 5 and before
    (base / "config.json").write_text(json.dumps(config))
    cfg, model = trained(base, "full")
    assert torch.equal(auto.from_pretrained(cfg.dir() / "checkpoint").lm_head.weight, model.gpt.head)


@pytest.mark.parametrize(("pays", "wide", "kind", "expected"), [
    (True, 16, "lora", torch.bfloat16), (True, 16, "full", torch.float32), (True, 512, "lora", torch.float32),
    (False, 16, "lora", torch.float32)])
def test_a_frozen_base_is_bf16_where_this_is_quicker(pays, wide, kind, expected, tmp_path, monkeypatch):
    """Not for narrow models, where nothing is gained, and not for weights that are trained."""
    toy.base(tmp_path)
    monkeypatch.setattr(policy, "bf16_pays", lambda: pays)
    monkeypatch.setattr(policy, "WIDE", wide)
    cfg = toy.settings(tmp_path, kind, sft.Config)
    assert policy.load_base(cfg).head.dtype == expected
    cfg.dtype = "float32"
    assert policy.load_base(cfg).head.dtype == torch.float32
