"""What speed rests on, by exact counts instead of clocks: FLOPs, sizes of tensors, steps, looks at the GPU, padding."""
import random

import pytest
import tiny
import torch
import toy
from quick import few
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import products
from benchmarks.bench import lengths
from benchmarks.plans import LENGTHS
from products import Int8Product
from rlhf import dpo, experience, logprobs, ppo, reward, sampler
from rlhf.logprobs import pack, token_logps
from rlhf.update import Updater, micro_batches

torch.set_num_threads(1)
c = tiny.SHAPE
LINEAR = c["num_hidden_layers"] * c["hidden_size"] * (2 * 32 + 2 * 16 + 3 * c["intermediate_size"])     # weights
LAST = c["hidden_size"] * (32 + 3 * c["intermediate_size"])                 # of these, after the last attention
HEAD = c["hidden_size"] * c["vocab_size"]
KINDS = pytest.mark.parametrize("kind", ["full", "lora"])
ROWS = [(prompt, answer) for prompt, answer in zip(tiny.texts([24] * 8), tiny.texts([40] * 8, seed=50))]


def forward(kind, tokens, spoken):
    """FLOPs of the linear layers in a pass over so many tokens of which `spoken` are wanted."""
    rank = 4 if kind == "lora" else 0
    inputs_and_outputs = c["num_hidden_layers"] * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + c["intermediate_size"]))
    last = (32 + 32) + 3 * (32 + c["intermediate_size"])
    return 2 * (LINEAR + rank * inputs_and_outputs) * tokens - 2 * (LAST + rank * last) * (tokens - spoken)


def counted(run):
    """FLOPs of all products but those inside attention kernels, of which the counter knows only some."""
    aten, nothing = torch.ops.aten, lambda *args, **kwargs: 0
    kernels = {aten._scaled_dot_product_flash_attention_for_cpu: nothing,
               aten._scaled_dot_product_flash_attention_for_cpu_backward: nothing}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    return counter.get_total_flops()


# --- training ----------------------------------------------------------------------------------------------

@KINDS
def test_scoring_costs_a_forward_pass_and_the_head_of_the_answer(kind):
    model, (ids, mask) = tiny.policy(kind), pack(ROWS)
    spoken = mask.sum().item()
    with torch.no_grad():
        flops = counted(lambda: token_logps(model, ids, mask))
    expected = forward(kind, 63 * 8, spoken) + 2 * HEAD * spoken
    assert .95 * expected < flops <= 1.05 * expected


@KINDS
def test_a_step_of_sft_costs_what_the_formula_says(kind):
    """Full: three passes. LoRA: two, as frozen weights have no gradient, and the adapters' own; the head is read twice
    (logits, and their gradient's way back), thrice where it learns."""
    model, (ids, mask) = tiny.policy(kind), pack(ROWS)
    params, spoken = model.trainable(), mask.sum().item()
    updater = Updater(params, 1e-4, 10)
    flops = counted(lambda: updater.add(-token_logps(model, ids, mask).sum(), spoken))
    once, frozen = forward(kind, 63 * 8, spoken), forward("full", 63 * 8, spoken) if kind == "lora" else 0
    expected = 3 * once - frozen + (2 if kind == "lora" else 3) * 2 * HEAD * spoken
    assert .9 * expected < flops <= 1.05 * expected


def test_a_step_of_dpo_computes_the_prompt_once():
    pairs = [((prompt, one), (prompt, two)) for (prompt, one), two in zip(ROWS, tiny.texts([40] * 8, seed=90))]
    flops = {}
    for shared in (False, True):
        model, cfg = tiny.policy(), dpo.Config(shared_prompt=shared)
        model.trainable()
        flops[shared] = counted(lambda model=model, cfg=cfg: dpo.logps(model, pairs, cfg).sum().backward())
    saved = 3 * 2 * (LINEAR - LAST) * 24 * 8 + 3 * 2 * LAST * 8         # the last block had skipped the prompt already
    assert .9 * saved < flops[False] - flops[True] < 1.05 * saved


def test_a_pass_of_ppo_costs_a_step_of_two_models(tmp_path, monkeypatch):
    """And nothing else: no reference, no old log-probs, no head where it is not wanted. Two passes more cost twice
    that; the answers are prescribed, so that nothing else differs. If their log-probs are known, collecting them costs
    one pass of the policy less."""
    rows = [(prompt, [*answer[:-1], 0]) for prompt, answer in ROWS]
    known = []
    monkeypatch.setattr(experience, "generate", lambda *args, logps: (rows, known))
    monkeypatch.setattr(ppo, "answer", lambda *args: {})
    folder, flops = toy.run_folder(tmp_path, "full"), {}
    for epochs in (1, 3):
        cfg = toy.settings(folder, "full", ppo.Config, steps=1, rollout_batch=8, batch_size=8, num_ppo_epochs=epochs,
                           micro_batch_tokens=10_000)
        flops[epochs] = counted(lambda cfg=cfg: ppo.run(cfg))
    spoken = sum(len(answer) for _, answer in rows)
    expected = 2 * 3 * forward("full", 63 * 8, spoken) + 3 * 2 * HEAD * spoken
    assert .95 * 2 * expected < flops[3] - flops[1] <= 1.05 * 2 * expected
    known += [torch.zeros(len(answer)) for _, answer in rows]
    twice = 2 * (forward("full", 63 * 8, spoken) + 2 * HEAD * spoken)   # the rollout's, and that of the look at its end
    saved = flops[3] - counted(lambda: ppo.run(cfg))
    assert .95 * twice < saved < 1.05 * twice


def test_logits_that_are_held_are_so_many_bytes(monkeypatch):
    held, real = [], logprobs.logp_and_gradient
    monkeypatch.setattr(logprobs, "HELD", 100_000)
    monkeypatch.setattr(logprobs, "logp_and_gradient", lambda h, *rest: held.append(len(h)) or real(h, *rest))
    ids, mask = pack(ROWS)
    for size in (61, 4000):
        held.clear()
        token_logps(tiny.policy(vocab_size=size), ids, mask)
        assert sum(held) == mask.sum() and max(held) == min(mask.sum(), 100_000 // (4 * size)), held


@KINDS
def test_no_tensor_of_tokens_times_vocabulary_in_training(kind):
    model, (ids, mask) = tiny.policy(kind, vocab_size=4000), pack(ROWS)
    model.trainable()
    with tiny.Watch() as made:
        token_logps(model, ids, mask, chunk=64).sum().backward()
    assert made.largest("cpu", torch.float32) <= max(64, c["hidden_size"]) * 4000 < mask.sum().item() * 4000


@pytest.mark.parametrize("kind", ["alpaca", "rlhf"])
def test_micro_batches_hold_little_padding(kind):
    sizes = [93 + length for length in lengths(512, 300, kind, 1)]
    for batch in (64, 512):
        for tokens in (4096, 16384):
            micro = micro_batches(range(batch), sizes, tokens)
            padded = sum(len(m) * max(sizes[i] for i in m) for m in micro)
            assert padded <= 1.15 * sum(sizes[:batch])
            assert len(micro) <= 8 + 1.15 * sum(sizes[:batch]) / tokens             # and they are not small


# --- sampling ----------------------------------------------------------------------------------------------

class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers that are read, and sizes that depend on values."""
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in self.WAITS
        return function(*args, **kwargs or {})


@pytest.fixture
def engine(monkeypatch):
    """Counts of the engine at work: row-steps, looks, waits within steps."""
    seen = {"row_steps": 0, "steps": 0, "looks": 0, "waits": 0, "prefilled": 0}
    step, advance, hidden = sampler.Engine.step, sampler.Engine.advance, tiny.GPT.hidden

    def count_step(self, width, span, *long):
        seen["row_steps"] += width
        seen["steps"] += 1
        with Syncs() as syncs:
            step(self, width, span, *long)
        seen["waits"] += syncs.count

    def count_look(self):
        seen["looks"] += 1
        advance(self)

    def count_prefill(self, ids, pos=None, attends=None, where=None):
        seen["prefilled"] += ids.numel() if where is not None and not len(where) else 0
        return hidden(self, ids, pos, attends, where)
    monkeypatch.setattr(sampler.Engine, "step", count_step)
    monkeypatch.setattr(sampler.Engine, "advance", count_look)
    monkeypatch.setattr(tiny.GPT, "hidden", count_prefill)
    return seen


@pytest.mark.parametrize("look, kind, slots", few(
    [(look, *of) for look in (2, 8) for of in (("alpaca", 32), ("alpaca", 256), ("rlhf", 32), ("rlhf", 64))],
    (2, "alpaca", 256), (8, "rlhf", 64)))
def test_few_steps_are_wasted_on_rows_that_have_ended(kind, slots, look, engine, monkeypatch):
    """AlpacaFarm's lengths: at most 1.35 row-steps for a useful token, where batches that wait for their longest row
    take 2 to 5; with the looks of a GPU too."""
    monkeypatch.setitem(sampler.CHECK_EVERY, "cpu", look)
    caps = lengths(256, 300, kind, 0)
    sampler.sample(tiny.policy(num_hidden_layers=1), tiny.texts([5] * 256), [61], caps, slots=slots)
    padded = sum(slots * max(caps[i:i + slots]) for i in range(0, 256, slots))
    assert engine["row_steps"] <= 1.35 * sum(caps) < .75 * padded
    assert engine["waits"] == 0
    assert engine["looks"] <= engine["steps"] / look + 256 / slots * 8 + 8


def test_the_host_waits_once_in_k_steps(engine, monkeypatch):
    """Once is exactly: no step of the engine reads a value, and each look reads one tensor."""
    read, tolist, prompts = [], torch.Tensor.tolist, tiny.texts([5] * 16)
    monkeypatch.setitem(sampler.CHECK_EVERY, "cpu", 8)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(len(x)) or tolist(x))
    sampler.sample(tiny.policy(), prompts, [61], 64)
    assert engine["steps"] == 64 and engine["looks"] == 8 and engine["waits"] == 0
    assert read.count(16 * 8 + 1) == 8 and len(read) == 8 + 16  # tokens and one sum; and the answers at the end


def test_a_prompt_is_read_once_for_all_its_answers(engine):
    """All but its last token, which is the first to be decoded: n answers read the prompt as often as one does."""
    sampler.sample(tiny.policy(), tiny.texts([20] * 4), [61], 6, n=16, slots=64)
    assert engine["prefilled"] == 4 * 19


def test_sampling_never_holds_the_logits_of_more_than_one_step():
    model = tiny.policy(vocab_size=4000)
    with tiny.Watch() as made:
        sampler.sample(model, tiny.texts([30] * 8), [4000], 20)
    assert made.largest("cpu", torch.float32) == 8 * 4000


def test_lengths_are_what_they_are_called():
    """Median and ninth decile of AlpacaFarm's SFT answers, as shares of the cap."""
    sizes = sorted(lengths(20_000, 1000, "alpaca", 0))
    assert sizes[10_000] == pytest.approx(153, rel=.03) and sizes[18_000] == pytest.approx(410, rel=.03)
    assert set(lengths(5, 7, "fixed", 0)) == {7} and LENGTHS.keys() == {"fixed", "alpaca", "rlhf"}


# --- the same numbers, whatever is switched on --------------------------------------------------------------

def test_any_slots_limits_and_stops_give_the_answers_of_one_row_at_a_time():
    """Fuzzed against the definition: the whole text through the model for every token, with the row's own uniforms."""
    r = random.Random(0)
    for trial in range(12):
        model = tiny.policy(r.choice(["full", "lora"]), seed=trial)
        if model.role and trial % 2:
            model.gpt.quantise()
            model.gpt.make_contiguous()
        prompts, n = tiny.texts([r.randint(1, 9) for _ in range(r.randint(1, 6))], seed=trial), r.randint(1, 5)
        limits = [r.randint(1, 14) for _ in range(len(prompts) * n)]
        stops, temperature = r.sample(range(61), r.randint(0, 6)), r.choice([0, .7, 1., 2.])
        u = torch.rand(len(limits), max(limits), generator=torch.Generator().manual_seed(trial))
        expected = []
        for row, limit in enumerate(limits):
            answer = []
            while len(answer) < limit and (not answer or answer[-1] not in stops):
                with model.gpt.using(model.role), torch.no_grad():
                    logits = model.gpt(torch.tensor([prompts[row // n] + answer]))[:, -1]
                probs = (logits / (temperature or 1e-4)).softmax(-1)                 # temperature 0 is greedy
                answer.append(sampler.draw(probs, u[row, len(answer)][None]).item())
            expected.append((prompts[row // n], answer))
        slots = r.randint(1, len(limits) + 3)
        assert sampler.sample(model, prompts, stops, limits, temperature, trial, n, slots) == expected


def test_a_slot_that_idles_long_stays_within_its_tensors():
    """24 slots that wait for room for 24 answers at once, beside rows that take very long: some idle for more steps
    than any row is long."""
    limits = [1, 1, 40] + [60] * 22 + [1] * 25
    rows = sampler.sample(tiny.policy(), tiny.texts([2, 3]), [61], limits, n=25, slots=24)
    assert [len(response) for _, response in rows] == limits


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_prompt_changes_neither_log_probs_scores_nor_gradients(kind, checkpointing):
    """Ragged prompts and answers, one of a single token; against every row on its own."""
    prompts, sizes = tiny.texts([3, 1, 9, 5]), [[4, 1, 6, 12], [2, 7, 1, 3]]
    rows = [row for seed, size in enumerate(sizes) for row in zip(prompts, tiny.texts(size, seed=10 * seed))]
    results = []
    for shared in (1, 2):
        model = reward.fresh(tiny.policy(kind))
        model.gpt.checkpointing = checkpointing
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        params, (ids, mask) = model.trainable(), pack(rows)
        logp, score = token_logps(model, ids, mask, shared=shared), reward.score(model, ids, mask, shared)
        ((logp ** 2).sum() + (score ** 2).sum()).backward()
        results.append([logp.detach(), score.detach(), *(p.grad for p in params)])
    for plain, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


def test_states_that_nobody_wants_change_nothing_for_the_others():
    model, ids = tiny.policy("lora"), tiny.ids(3, 9)
    where = torch.tensor([0, 5, 11, 26])
    torch.testing.assert_close(model.hidden(ids, where=where), model.hidden(ids).flatten(0, 1)[where])
    assert model.hidden(ids, where=where[:0]).shape == (0, c["hidden_size"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_a_fused_role_answers_as_the_separate_layers(dtype, int8):
    """Biases, grouped heads, weights that lie one after the other and copied ones; afterwards all is as before."""
    model, ids = tiny.policy("lora", attention_bias=True, mlp_bias=True), tiny.ids(2, 9)
    model.gpt.to(dtype)
    for p in model.gpt.adapter("sft").values():
        p.data = p.data.float()
    if int8:
        model.gpt.quantise()
    tolerance = 2e-5 if dtype == torch.float32 else .15         # bf16: another order of roundings
    with torch.no_grad():
        separate = model.hidden(ids)
        for contiguous in (False, True):
            if contiguous:
                model.gpt.make_contiguous()
            with model.gpt.fused("sft"):
                torch.testing.assert_close(model.gpt.hidden(ids), separate, atol=tolerance, rtol=tolerance)
                assert model.gpt.model.layers[0].mlp.down.fused[0].dtype == (torch.int8 if int8 else dtype)
            assert torch.equal(model.hidden(ids), separate)


@pytest.mark.parametrize("rank, stacked", [(8, True), (3, False)])
def test_a_product_with_an_adapter_below_the_weights_gives_the_same(rank, stacked):
    """As on a GPU with room for a copy: q, k and v with biases, and a layer alone; a rank that kernels like, and one
    that would leave rows at odd places."""
    gpt = tiny.gpt(attention_bias=True).bfloat16()
    gpt.add_role("sft", rank, 16)
    for A_or_B in gpt.adapter("sft").values():
        A_or_B.data.normal_(0, .1)
    with torch.no_grad():
        for layers in (gpt.model.layers[0].self_attn.qkv, gpt.model.layers[0].mlp.down):
            x = torch.randn(2, 5, layers.layers[0].in_features).bfloat16()
            expected, before = layers(x, "sft"), x.clone()
            layers.fuse("sft", stack=True)
            assert len(layers.fused[0]) == sum(layers.sizes) + rank * len(layers.layers) * stacked
            for y, known in zip(layers(x, "sft"), expected, strict=True):
                torch.testing.assert_close(y, known, atol=.05, rtol=.05)
            assert torch.equal(x, before)


def test_contiguous_weights_are_read_where_they_are_and_still_learn():
    """Fusing a model without a role copies nothing, and sees what the optimizer has done since."""
    model = tiny.policy()
    model.gpt.make_contiguous()
    attention, optimizer = model.gpt.model.layers[0].self_attn, torch.optim.AdamW(model.trainable(), 1e-2)
    before = attention.v_proj.weight.detach().clone()
    with model.gpt.fused(None):
        W = attention.qkv.fused[0]
    assert W.data_ptr() == attention.q_proj.weight.data_ptr() and W.shape == (32 + 16 + 16, 32)
    model.hidden(tiny.ids(2, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(W[-16:], attention.v_proj.weight) and (W[-16:] - before).abs().min() > 1e-3


def test_weights_that_only_share_a_storage_are_not_taken_for_contiguous():
    """As the tensors of one file may, in an order of their own."""
    model, ids = tiny.policy(), tiny.ids(2, 9)
    with torch.no_grad():
        before = model.hidden(ids)
        for fused in model.gpt.fused_linears():
            layers = fused.layers[::-1]
            rows = torch.cat([layer.weight for layer in layers]).split([layer.out_features for layer in layers])
            for layer, W in zip(layers, rows):
                layer.weight.data = W
        with model.gpt.fused(None):
            torch.testing.assert_close(model.gpt.hidden(ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_int8_product_and_its_gradient_are_those_of_the_scaled_weights_in_every_precision(dtype):
    """Also where sums that are not scaled would overflow in fp16, and gradients that are scaled first underflow."""
    W, scale = torch.full((3, 1024), 127, dtype=torch.int8), torch.tensor([[1e-4], [2e-4], [4e-4]], dtype=dtype)
    x, grad = torch.full((2, 1024), 16., dtype=dtype, requires_grad=True), torch.full((2, 3), .01, dtype=dtype)
    y = Int8Product.apply(x, W, scale)
    y.backward(grad)
    true, rounding = W.double() * scale.double(), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), x.detach().double() @ true.T, rtol=rounding, atol=0)
    torch.testing.assert_close(x.grad.double(), grad.double() @ true, rtol=rounding, atol=0)


def test_int8_rounds_by_half_a_step_and_its_gradient_is_that_of_the_rounded_weights():
    model, exact = tiny.policy("lora"), tiny.policy("lora")
    model.gpt.quantise()
    for (_, low), (_, high) in zip(model.gpt.linears(), exact.gpt.linears()):
        rounded = low.weight.float() * low.int8_scale
        assert (rounded - high.weight).abs().max() <= .5001 * low.int8_scale.max()
        assert low.weight.dtype == torch.int8 and low.weight.abs().max() == 127
        high.weight.data = rounded
    grads = []
    for policy_ in (model, exact):
        params = policy_.trainable()
        h = policy_.hidden(tiny.ids(2, 9))
        (h ** 2).sum().backward()
        grads.append([h.detach(), *(p.grad for p in params)])
    for low, high in zip(*grads, strict=True):
        torch.testing.assert_close(low, high, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, checkpointing", few([(kind, how) for kind in toy.KINDS for how in (False, True)],
                                                    ("full", True)))
def test_compiled_blocks_compute_the_same_and_one_graph_serves_them_all(kind, checkpointing, monkeypatch):
    """Without a compiler's code, only its graphs: a break in one would be an error, and blocks share them."""
    graphs, results = [], []
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    monkeypatch.setattr(products, "LARGE", 40 * 32)                         # would ask how many rows there are
    monkeypatch.setattr(products, "LEAST_SIDE", 16)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(
        f, dynamic=dynamic, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny.policy(kind, num_hidden_layers=6)
        model.gpt.checkpointing = checkpointing
        if compiled:
            model.gpt.compile_blocks()
        params = model.trainable()
        rows = ROWS[:4] + [(prompt, answer[:7]) for prompt, answer in ROWS[:4]]
        loss = sum(token_logps(model, *pack(rows[:size]), shared=shared).sum()
                   for size, shared in ((8, 2), (8, 1), (6, 1)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in params)])
    torch._dynamo.reset()
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-3)
    assert 1 <= len(graphs) <= 8                                # rows and packed tokens, with `where` and without


def test_the_cache_is_sized_to_what_is_free(monkeypatch):
    """Of nothing there is still one slot; twice the memory is twice the slots, up to a bound. Blocks that torch keeps
    for later are given back first, and logits that are to be sorted take more."""
    gpt, free, kept = tiny.gpt(), {"bytes": 0}, [7]
    monkeypatch.setattr(type(gpt), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["bytes"] - 10 ** 9 * sum(kept), 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    prompts = sampler.PREFILL_TOKENS["cuda"] * 4 * (6 * 48 + 8 * 32)
    for narrow, each in ((sampler.ALL, 16), ((.9, 0, 0.), 48), (None, 48)):
        row = 2 * 2 * 2 * 8 * 128 * 4 + each * 61               # 100 tokens, in columns of 128
        for rows, slots in ((0, 1), (100, 90), (200, 180), (10 ** 6, sampler.MAX_SLOTS["cuda"])):
            kept.append(7)
            free["bytes"] = prompts + rows * row + 1
            assert sampler.slots_that_fit(gpt, 100, narrow) == slots
