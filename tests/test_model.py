"""The model against transformers and peft, and against itself computed another way."""
import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

import model
import products
from data.text import Text
from data.weights import WeightsError, load_weights, write_safetensors
from model import GPTConfig, frequencies
from rlhf.logprobs import ChunkedLogProb
from rlhf.policy import Policy
from rlhf.kv_cache import KVCache
from rlhf.sampler import sample

torch.set_num_threads(1)
CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
needs_checkpoints = pytest.mark.skipif(not CHECKPOINTS.exists(), reason="needs the checkpoints in ../shared")

FAMILY = {
    "grouped queries": {},
    "as many kv heads": {"num_key_value_heads": 4},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12},
    "coarse norm": {"rms_norm_eps": .1},
    "theta": {"rope_theta": 50.},
}


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def save_llama(folder, **changes):
    """A random transformers model, saved as transformers 5 saves it."""
    transformers = pytest.importorskip("transformers")
    theta = changes.pop("rope_theta", 10000.)
    config = transformers.LlamaConfig(**tiny.SHAPE | changes, bos_token_id=None, eos_token_id=None,
                                      rope_parameters={"rope_type": "default", "rope_theta": theta})
    llama = tiny.randomise(transformers.LlamaForCausalLM(config)).eval()
    llama.save_pretrained(folder)
    return llama


def edit(folder, **changes):
    """Change keys of a config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


# --- against transformers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("name", FAMILY)
def test_logits_and_greedy_answers_equal_transformers(name, spelling, tmp_path):
    llama = save_llama(tmp_path, **FAMILY[name])
    if spelling == "rope_theta":                                # as transformers before 5 saved it
        edit(tmp_path, rope_parameters=None, rope_theta=FAMILY[name].get("rope_theta", 10000.))
    gpt, ids = model.load(tmp_path), tiny.ids(3, 20)
    with torch.no_grad():
        close(gpt(ids), llama(ids).logits)
    greedy = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    answers = sample(Policy(gpt), ids.tolist(), [61], 12, temperature=0)
    assert [response for _, response in answers] == greedy[:, 20:].tolist()


@needs_checkpoints
def test_known_answers_of_a_real_checkpoint():
    folder = CHECKPOINTS / "stories260K"
    gpt, text = model.load(folder), Text(folder)
    story = (" a time, there was a little girl named Lily. She loved to play outside in the park. "
             "One day, she saw a big, red ball.")
    ids = torch.tensor([text.encode("Once upon" + story)])
    assert F.cross_entropy(gpt(ids)[0, :-1], ids[0, 1:]).item() == pytest.approx(.3241, abs=5e-5)
    (_, told), = sample(Policy(gpt), [text.encode("Once upon")], text.stops, 70, temperature=0)
    assert ("Once upon " + text.decode(told)).startswith(
        "Once upon" + story + " She wanted to play with it, but it was too high.")


@needs_checkpoints
def test_a_real_config_of_the_hub_is_understood():
    folder = CHECKPOINTS / "real_configs"
    config = GPTConfig.from_hf(json.loads((folder / "SmolLM2-135M-Instruct" / "config.json").read_text()))
    assert (config.head_dim, config.num_key_value_heads, config.ropes[0]["rope_theta"]) == (64, 3, 1e5)
    assert config.tie_word_embeddings and config.rms_norm_eps == 1e-5


def test_a_window_that_is_null_is_none_and_an_absent_one_is_the_family_s():
    mistral = {"model_type": "mistral", **tiny.SHAPE}
    assert GPTConfig.from_hf(mistral).windows == (4096, 4096)
    assert GPTConfig.from_hf({**mistral, "sliding_window": None}).windows == (0, 0)
    assert GPTConfig.from_hf({**mistral, "sliding_window": 9}).windows == (9, 9)


# --- the cache ---------------------------------------------------------------------------------------------

def dirty_cache(gpt, slots, length, readable):
    """A cache with old junk in the columns that may be read, and NaN in those beyond them."""
    cache = KVCache(gpt.config, slots, length, "cpu", torch.float32)
    for x in (*cache.k, *cache.v):
        x[:, :, :readable], x[:, :, readable:] = 100, torch.nan
    return cache


@torch.no_grad()
@pytest.mark.parametrize("sdpa", [False, True])                 # as on CPUs, as on CUDA
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rows_of_one_cache_go_on_at_their_own_positions(heads, sdpa):
    """Ragged prompts that begin in slots of any order, one of them twice, and go on in fewer and fewer columns and
    slots: each row equals the row alone."""
    gpt, ids, lengths = tiny.gpt(num_key_value_heads=heads), tiny.ids(4, 12), [2, 7, 4, 7]
    slots, source = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 1, 2, 1])
    cache, prompts = dirty_cache(gpt, 5, 12, 7 + 3), ids[:3, :7].clone()
    cache.sdpa = sdpa
    for row, length in enumerate(lengths[:3]):
        prompts[row, length:] = 0                                                    # the right padding
    gpt.hidden(prompts, None, cache.prefill(slots, source))
    rows = {slot: ids[i, :lengths[i]] for slot, i in zip(slots.tolist(), source.tolist())}
    for step, width in enumerate((4, 4, 2)):
        new = ids[:width, 8 + step]
        pos = torch.tensor([len(rows[slot]) for slot in range(width)])
        h = gpt.hidden(new, pos, cache.decode(pos, span=7 + step + 1))
        for slot in range(width):
            rows[slot] = torch.cat((rows[slot], new[slot:slot + 1]))
            close(h[slot], gpt.hidden(rows[slot][None])[0, -1])


@torch.no_grad()
def test_a_row_that_is_moved_to_another_slot_goes_on_there():
    gpt, ids = tiny.gpt(), tiny.ids(3, 6)
    cache, pos = dirty_cache(gpt, 3, 8, 8), torch.full((2,), 5)
    gpt.hidden(ids[:, :5], None, cache.prefill(torch.arange(3), torch.arange(3)))
    cache.move([2], [0])
    close(gpt.hidden(ids[[2, 1], 5], pos, cache.decode(pos, 6)), gpt.hidden(ids[[2, 1]])[:, 5])


@torch.no_grad()
def test_attention_kernels_may_lay_out_their_result_as_they_like(monkeypatch):
    """CUDA's memory-efficient kernel (a mask selects it) returns a transposed view of (B, T, heads, hd)."""
    def efficient(*args, kernel=F.scaled_dot_product_attention, **options):
        return kernel(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", efficient)
    test_rows_of_one_cache_go_on_at_their_own_positions(2, True)


def test_right_padding_changes_nothing_for_real_tokens():
    gpt, ids = tiny.gpt(), tiny.ids(2, 9)
    close(gpt(F.pad(ids, (0, 7), value=3))[:, :9], gpt(ids))


# --- adapters ----------------------------------------------------------------------------------------------

def test_a_fresh_role_answers_as_the_base():
    gpt, ids = tiny.gpt(), tiny.ids(2, 9)
    base = gpt(ids)
    gpt.add_role("policy", rank=4, alpha=8)
    with gpt.using("policy"):
        assert torch.equal(gpt(ids), base)


def test_a_role_is_worn_inside_the_with_block_only():
    gpt, ids = tiny.policy("lora").gpt, tiny.ids(2, 9)
    gpt.add_role("other", rank=2, alpha=2)
    base = gpt(ids)
    with gpt.using("sft"):
        sft = gpt(ids)
        assert not torch.allclose(sft, base, atol=.1)
        with pytest.raises(KeyboardInterrupt), gpt.using("other"):
            raise KeyboardInterrupt
        assert torch.equal(gpt(ids), sft)
        with gpt.using(None):
            assert torch.equal(gpt(ids), base)
    assert torch.equal(gpt(ids), base)


def test_merged_weights_answer_as_the_role():
    policy, ids = tiny.policy("lora", tie_word_embeddings=True, attention_bias=True), tiny.ids(2, 9)
    with policy.gpt.using("sft"):
        worn = policy.gpt(ids)
    policy.gpt.merge("sft")
    close(policy.gpt(ids), worn)
    assert not [name for name in policy.gpt.state_dict() if "lora" in name]


def test_a_role_equals_peft_with_the_same_a_and_b(tmp_path):
    peft = pytest.importorskip("peft")
    llama, ids = save_llama(tmp_path, attention_bias=True), tiny.ids(2, 9)
    gpt = model.load(tmp_path)
    gpt.add_role("sft", rank=4, alpha=16)
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=gpt.targets())
    theirs = peft.get_peft_model(llama, lora)
    tiny.randomise(torch.nn.ParameterList(gpt.adapter("sft").values()))
    state = theirs.state_dict()
    for name, p in gpt.adapter("sft").items():
        state[f"base_model.model.{name}.default.weight"].copy_(p.data)
    with gpt.using("sft"):
        close(gpt(ids), theirs(ids).logits)


def test_every_target_of_the_worn_role_gets_gradient_and_nothing_else_does():
    policy = tiny.policy("lora", num_hidden_layers=2)
    policy.gpt.add_role("other", rank=4, alpha=8)
    policy.trainable()
    with policy.gpt.using("sft"):
        policy.gpt(tiny.ids(2, 9)).logsumexp(-1).sum().backward()
    got = {name for name, p in policy.gpt.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == {f"model.layers.{i}.{block}.{target}_proj.lora_{ab}.sft" for i in (0, 1) for ab in "AB"
                   for block, targets in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
                   for target in targets}


def test_a_copied_role_is_equal_and_independent():
    gpt, ids = tiny.policy("lora").gpt, tiny.ids(2, 9)
    gpt.add_role("policy", rank=4, alpha=8, start="sft")
    with gpt.using("sft"):
        sft = gpt(ids)
    with gpt.using("policy"):
        assert torch.equal(gpt(ids), sft)
    for p in gpt.adapter("policy").values():
        p.data.add_(1)
    with gpt.using("sft"):
        assert torch.equal(gpt(ids), sft)


def test_adapters_stay_fp32_on_a_low_precision_base_and_logits_too(tmp_path):
    save_llama(tmp_path)
    gpt, ids = model.load(tmp_path, dtype=torch.bfloat16), tiny.ids(2, 9)
    gpt.add_role("sft", rank=4, alpha=8)
    assert gpt.head.dtype == torch.bfloat16 and not any(p.requires_grad for p in gpt.weights().values())
    assert {p.dtype for p in gpt.adapter("sft").values()} == {torch.float32}
    with gpt.using("sft"):
        assert gpt(ids).dtype == torch.float32
        close(gpt(ids), model.load(tmp_path)(ids), .2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [7, 1000])
def test_logits_of_16_bits_are_rounded_to_fp32_only(dtype, part, monkeypatch):
    """Against a product in fp64, values and gradients; and in the log-probs that learners see."""
    monkeypatch.setattr(products, "VOCABULARY_PART", part)
    r = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 64, generator=r).to(dtype).requires_grad_() for n in (5, 61))
    exact = h.double() @ W.double().T
    torch.testing.assert_close(model.logits(h, W), exact.float(), rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x.logsumexp(-1).sum(), (h, W)) for x in (model.logits(h, W), exact))
    torch.testing.assert_close(ours, theirs, rtol=.05, atol=.02)
    targets = torch.arange(5)
    logp = ChunkedLogProb.apply(h, W, targets, .7, 2)
    expected = (exact / .7).log_softmax(-1)[torch.arange(5), targets].float()
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=2e-5)


def test_a_low_precision_model_is_never_held_in_fp32(tmp_path):
    """Not even empty, on its way to the device: 8B parameters in fp32 fit no 24 GB card."""
    save_llama(tmp_path).bfloat16().save_pretrained(tmp_path)
    with tiny.Watch() as made:
        gpt = model.load(tmp_path, dtype=torch.bfloat16)
    assert gpt.head.dtype == torch.bfloat16
    assert made.largest("cpu", torch.float32) < gpt.head.numel() <= made.largest("cpu", torch.bfloat16)


# --- gradient checkpointing --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_changes_neither_logits_nor_gradients(kind):
    """Not even when the backward pass, which computes the blocks again, runs while another role is on."""
    results, passes = [], []
    for checkpointing in (False, True):
        policy = tiny.policy(kind)
        policy.gpt.add_role("other", rank=4, alpha=8)
        policy.gpt.checkpointing = checkpointing
        params, count = policy.trainable(), []
        for block in policy.gpt.model.layers:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        with policy.gpt.using(policy.role):
            logits = policy.gpt(tiny.ids(2, 9))
        with policy.gpt.using("other"):
            logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), *(p.grad for p in params if p.grad is not None)])
        passes.append(len(count))
    assert passes == [2, 4]                                     # each of the two blocks once more
    for plain, recomputed in zip(*results, strict=True):
        close(recomputed, plain, 1e-6)


# --- what is refused ---------------------------------------------------------------------------------------

def test_strict_load_lists_all_that_does_not_fit_in_one_error(tmp_path):
    save_llama(tmp_path)
    weights = dict(load_weights(tmp_path))
    weights["model.stranger"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = torch.zeros(61, 31)
    write_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(WeightsError) as error:
        model.load(tmp_path)
    for part in ("missing: model.norm.weight", "unexpected: model.stranger", "misshaped: lm_head.weight",
                 "[61, 31]", "[61, 32]"):
        assert part in str(error.value)


@pytest.mark.parametrize("named, changes", [
    ("model_type 'mixtral'", {"model_type": "mixtral"}),
    ("model_type None", {"model_type": None}),
    ("hidden_act 'relu6'", {"hidden_act": "relu6"}),
    ("rope_type 'dynamic'", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.}}),
    ("rope_type 'longrope'", {"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 2.}}),
    ("low_freq_factor", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.}}),
    ("hidden_size", {"hidden_size": None}),
])
def test_a_config_that_would_compute_something_else_is_refused_by_name(named, changes, tmp_path):
    save_llama(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(WeightsError, match=named):
        model.load(tmp_path)


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    weights = dict(load_weights(tmp_path))
    assert "lm_head.weight" not in weights
    twice = weights["model.embed_tokens.weight"].clone()
    write_safetensors(tmp_path / "model.safetensors", weights | {"lm_head.weight": twice})
    assert torch.equal(model.load(tmp_path).head, twice)
    write_safetensors(tmp_path / "model.safetensors", weights | {"lm_head.weight": twice + 1})
    with pytest.raises(WeightsError, match="ties the head"):
        model.load(tmp_path)


FIGURES = (0, -1, 1 << 40, 1.5, "4", [4], {}, True, float("nan"), float("inf"), 10 ** 30)


@pytest.mark.parametrize("key", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window", "query_pre_attn_scalar",
    "rope_local_base_freq", "sliding_window_pattern", "tie_word_embeddings", "attention_bias", "hidden_activation",
    "layer_types", "rope_scaling", "rope_parameters", "auto_map", "model_type", "rope_theta"])
def test_no_value_of_a_config_is_a_traceback(key):
    """Whatever a key holds: read as a number that makes sense, or refused in a sentence with its name."""
    base = {"model_type": "gemma3_text", **tiny.SHAPE, "sliding_window_pattern": 2}
    for value in FIGURES:
        try:
            config = GPTConfig.from_hf({**base, key: value})
        except ValueError as error:
            assert key in str(error) or key == "hidden_size" and "multiple" in str(error), (value, error)
        else:
            assert value in ({}, 1.5) or isinstance(value, bool) or (key, value) == ("auto_map", 0), (key, value)
            assert config.num_hidden_layers == 2


@pytest.mark.parametrize("key", ["rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                                 "attention_factor", "mscale", "truncate"])
def test_no_number_of_rope_is_a_traceback(key):
    base = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2., "original_max_position_embeddings": 64}
    for value in FIGURES:
        config = {"model_type": "llama", **tiny.SHAPE, "rope_scaling": {**base, key: value}}
        try:
            config = GPTConfig.from_hf(config)
        except ValueError as error:
            assert key in str(error), (value, error)
        else:
            assert value == 1.5 or value is True and key == "truncate"
            assert torch.isfinite(frequencies(config.ropes[0], config.rotary_dim)[0]).all()


def test_what_does_not_fit_costs_no_memory(tmp_path):
    save_llama(tmp_path)
    edit(tmp_path, vocab_size=10 ** 9)
    with pytest.raises(WeightsError, match=r"misshaped: .*should be \[1000000000, 32\]"):
        model.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_weights_of_a_quantised_file_are_not_taken_for_numbers(tmp_path, dtype):
    save_llama(tmp_path)
    weights = dict(load_weights(tmp_path))
    weights["model.layers.1.mlp.up_proj.weight"] = (weights["model.layers.1.mlp.up_proj.weight"] * 9).to(dtype)
    write_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(WeightsError, match="no floating point: model.layers.1.mlp.up_proj.weight .is torch"):
        model.load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no config.json"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text("{")                   # a download that was cut short
    with pytest.raises(WeightsError, match="config.json"):
        model.load(tmp_path)
