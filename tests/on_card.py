"""What a GPU does, on a pretend one: nothing is on the wrong device, results are the CPU's, and waits are counted."""
import json
from functools import partial

import pytest
import tiny
import torch
import toy
from card import Card, Graph, address, capture
from quick import few

import model
import rlhf.graphs
from rlhf import dpo, kv_cache, policy, ppo, reward, sampler, sft, update

torch.set_num_threads(1)
PROMPTS = tiny.texts([3, 9, 1, 5])


@pytest.fixture(autouse=True)
def steps_of_a_gpu(monkeypatch):
    for table in (sampler.CHECK_EVERY, sampler.PREFILL_TOKENS):
        monkeypatch.setitem(table, "card", table["cuda"])
    monkeypatch.setattr(model, "is_adjacent", lambda x, y: False)               # its tensors have no storage


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The pretend graphs that are captured in a test."""
    found = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found.append(Graph()) or found[-1])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(rlhf.graphs, "address", lambda x: getattr(x, "held", x).data_ptr())
    monkeypatch.setattr(rlhf.graphs, "storage", lambda x: address(getattr(x, "held", x)))
    monkeypatch.setattr(rlhf.graphs, "gpu_memory", lambda: 1e9)
    return found


def made(kind, device):
    """The same weights on both devices."""
    policy = tiny.policy("full" if kind == "full" else "lora")
    if kind == "int8":
        policy.gpt.quantise()
    policy.gpt.to(device)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "int8"])
def test_samples_are_those_of_a_cpu_and_cost_a_wait_for_each_check(kind):
    sample = sampler.sample.__wrapped__                                         # without inference_mode
    with torch.no_grad():
        expected = sample(made(kind, "cpu"), PROMPTS, [5, 17], 40, 1., 3, n=2, slots=5)
    with Card() as waits, torch.no_grad():
        on_card = made(kind, "card")
        checks, real = [], sampler.Engine.first_stops
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler.Engine, "first_stops", lambda *args: checks.append(1) or real(*args))
            waits.clear()
            rows = sample(on_card, PROMPTS, [5, 17], 40, 1., 3, n=2, slots=5)
    assert rows == expected
    assert waits.count("tolist") <= len(checks) + len(rows) and len(checks) < 20, waits


def sampled(policy, limits, slots, graph=True, seed=3, stops=(5, 17)):
    with torch.no_grad():
        return sampler.sample.__wrapped__(policy, PROMPTS, stops, limits, 1., seed, len(limits) // 4, slots, graph)


@pytest.mark.parametrize("slots", few([1, 3, 5, 8], 5))
@pytest.mark.parametrize("kind", few(["lora", "int8"], "lora"))
def test_captured_steps_sample_what_eager_ones_do(kind, slots, graphs):
    limits = [5 + 13 * i % 150 for i in range(8)]
    with Card():
        eager, captured = (sampled(made(kind, "card"), limits, slots, graph) for graph in (False, True))
    assert captured == eager and sum(graph.replayed for graph in graphs) > 20


LIMITS = [5 + 13 * i % 50 for i in range(8)]


def changed(policy):
    """Every weight, where it is, as an optimizer does it."""
    with torch.no_grad():
        for i, p in enumerate(p for p in policy.gpt.parameters() if p.is_floating_point()):
            p.mul_(1 + .1 * (i % 3)).add_(.02)


@pytest.mark.parametrize("kind", ["full", "lora", "int8"])
def test_graphs_that_are_kept_read_the_weights_of_today(kind, graphs, monkeypatch):
    """And the limits and random numbers of today, also those that the second sampling captures. What an interrupted
    sampling has captured is not kept."""
    here, limits, expected = made(kind, "cpu"), [[46] * 16, 2 * LIMITS, 2 * LIMITS[::-1]], []
    for seed in range(3):
        expected.append(sampled(here, limits[seed], 16, seed=seed, stops=[]))
        changed(here)
    with Card():
        there, captured = made(kind, "card"), []
        for seed in range(3):
            assert sampled(there, limits[seed], 16, seed=seed, stops=[]) == expected[seed]
            captured.append(len(graphs))
            changed(there)
        assert captured[0] < captured[1] == captured[2] and len(there.engines) == 1
        with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
            patch.setattr(sampler.Engine, "compact", lambda self: 1 / 0)
            sampled(there, 2 * LIMITS, 16, stops=[])
    assert not there.engines


def test_graphs_are_made_anew_if_weights_have_moved_or_another_role_answers(graphs):
    with Card():
        model = made("lora", "card")
        model.gpt.add_role("other", 4, 8)
        other = policy.Policy(model.gpt, "other", engines=model.engines)
        first = [sampled(one, LIMITS, 5) for one in (model, other)]
        old = list(model.engines.values())
        for p in model.gpt.parameters():
            p.held = p.held.clone()
        assert [sampled(one, LIMITS, 5) for one in (model, other)] == first and first[0] != first[1]
    assert len(old) == len(model.engines) == 2 and not set(old) & set(model.engines.values())


def test_engines_are_kept_in_a_small_part_of_the_memory(monkeypatch):
    """The newest of them; one that is too large drops no other; and nothing that is kept holds the model."""
    with Card():
        model = made("lora", "card")
        sampled(model, LIMITS, 4)
        one, = model.engines.values()
        assert one.gpt is None and one.bytes > 16 * 4 * 61 + sum(x.nbytes for x in one.cache.k)
        monkeypatch.setattr(rlhf.graphs, "gpu_memory", lambda: 1.3 * one.bytes / rlhf.graphs.KEPT)
        for slots in (3, 2, 1, 8):
            sampled(model, LIMITS, slots)
        assert [engine.slots for engine in model.engines.values()] == [2, 1]


def attention_of_lengths(q, k, v, begin_q, begin_k, max_q, max_k, dropout, is_causal, debug, *, scale=None,
                         window_size_left=None, window_size_right=None, seqused_k=None, more=0, **others):
    """torch's FlashAttention kernel, as torch.nn.attention.varlen describes it. more: columns it reads too many."""
    assert begin_q.dtype == begin_k.dtype == seqused_k.dtype == torch.int32 and max_q == 1 and not is_causal
    out = torch.empty_like(q)
    for row, (first, n) in enumerate(zip(begin_k.tolist(), seqused_k.tolist())):
        assert begin_q[row] == row and n <= max_k and first + max_k <= len(k) and not others
        end, left = first + n + more, n if window_size_left is None else window_size_left
        start = first + max(0, n - 1 - left)
        scores = q[row].float() @ k[start:end, 0].float().T * (scale or q.shape[-1] ** -.5)             # (heads, n)
        out[row] = (scores.softmax(-1) @ v[start:end, 0].float()).to(q.dtype)
    return out, *4 * [torch.empty(0)]


@pytest.fixture
def kernel(monkeypatch):
    """Puts a kernel where the GPU's would be."""
    library = torch.library.Library("aten", "IMPL")
    monkeypatch.setattr(kv_cache, "FLASH", True)
    monkeypatch.setattr(kv_cache, "flash_reads_lengths", kv_cache.flash_reads_lengths.__wrapped__)
    yield lambda kernel: library.impl("_flash_attention_forward", kernel, "CPU")
    library._destroy()


WINDOWS = {"all": {}, "windows": {"windows": (0, 9), "num_attention_heads": 4, "num_key_value_heads": 2}}


@pytest.mark.parametrize("shape", WINDOWS.values(), ids=WINDOWS)
def test_a_kernel_that_takes_lengths_gives_the_same_answers_with_a_graph_for_each_width(shape, kernel, graphs,
                                                                                       monkeypatch):
    limits = [5 + 13 * i % 150 for i in range(8)]
    expected = sampled(tiny.policy("lora", **shape), limits, 5)
    kernel(attention_of_lengths)
    monkeypatch.setattr(kv_cache, "flash_reads_lengths", lambda *args: True)            # in fp32, too
    with Card():
        policy = tiny.policy("lora", **shape)
        policy.gpt.to("card")
        assert sampled(policy, limits, 5) == sampled(policy, limits, 5, graph=False) == expected
    assert len(graphs) <= 4


def short_of(least, most):
    """The kernel without the last two keys of rows with more than five, if it is told of least to most columns."""
    def kernel(*args, seqused_k, **how):
        less = (seqused_k > 5) * 2 * (least <= args[6] <= most)
        return attention_of_lengths(*args, seqused_k=seqused_k - less.int(), **how)
    return kernel


BROKEN = {"reads one more": partial(attention_of_lengths, more=1), "is not there": None,
          "loses the last keys": short_of(0, 100), "loses the last keys of what is shared": short_of(300, 10 ** 4),
          "ignores lengths": lambda *args, seqused_k, **how: attention_of_lengths(
              *args, seqused_k=torch.full_like(seqused_k, args[6]), **how),
          "ignores windows": lambda *args, window_size_left=None, **how: attention_of_lengths(*args, **how)}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_kernel_is_used_only_if_it_gives_what_masked_attention_gives(broken, kernel):
    def works(windowed):
        with Card(), torch.no_grad():
            return kv_cache.flash_reads_lengths(torch.device("card:0"), torch.bfloat16, 2, 16, windowed)
    if BROKEN[broken]:
        kernel(BROKEN[broken])
    assert not works(True) and works(False) == (broken == "ignores windows")


@pytest.mark.parametrize("windowed", [False, True])
def test_a_kernel_that_works_is_used(windowed, kernel):
    kernel(attention_of_lengths)
    with Card(), torch.no_grad():
        used = [kv_cache.flash_reads_lengths(torch.device("card:0"), dtype, 2, hd, windowed) for dtype, hd in (
            (torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 16), (torch.bfloat16, 12))]
    assert used == [True, True, False, False]


@pytest.mark.parametrize("slots, window, by_length, left", [
    (4, 9, True, 8), (4, 64, True, None), (2 ** 15, 9, False, 0)])
def test_windows_that_hide_nothing_are_none_and_rows_are_few(slots, window, by_length, left, kernel, monkeypatch):
    told = []
    monkeypatch.setattr(kv_cache, "flash_reads_lengths", lambda *args: True)
    kernel(lambda *args, window_size_left=None, **how: told.append(window_size_left) or attention_of_lengths(
        *args, window_size_left=window_size_left, **how))
    cache = kv_cache.KVCache(tiny.gpt(windows=(window,) * 2).config, slots, 40, torch.device("cpu"), torch.float32)
    assert cache.by_length == by_length
    if by_length:
        cache.read_lengths(torch.full((2 * slots,), 30).int(), 0, torch.randn(slots, 2, 2, 8), window, 0)
        assert told == [left]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = toy.run_folder(tmp_path_factory.mktemp("card"), "lora")
    toy.write_pairs(folder, toy.preferences(24))
    return folder


# {method: (its file, its settings, waits for each micro-batch: for where tokens are, and where prompts end)}
RUNS = {"sft": (sft, {"epochs": 1, "batch_size": 4}, 1),
        "reward": (reward, {"epochs": 1, "batch_size": 8, "scale_answers": 16}, 1),
        "dpo": (dpo, {"epochs": 1, "batch_size": 8, "sample_every": 100}, 2),
        "ppo": (ppo, {"steps": 2, "rollout_batch": 8, "batch_size": 8, "num_ppo_epochs": 1, "val_prompts": 4}, 2)}


@pytest.mark.parametrize("name, int8", few([(name, int8) for name in RUNS for int8 in (False, True)], ("dpo", False)))
def test_a_run_learns_what_it_learns_on_a_cpu(name, int8, folder, monkeypatch):
    """The same metrics and the same answers; and each step waits for the GPU a few times only."""
    module, how, each = RUNS[name]
    load_base, found, micro_batches, waited = policy.load_base, {}, [0], [0]
    add, step = update.Updater.add, update.Updater.step

    def counted_add(self, *args):
        micro_batches[-1] += 1
        add(self, *args)

    def counted_step(self):
        micro_batches.append(0)
        waited.append(len(waits))
        return step(self)
    monkeypatch.setattr(sampler, "sample", torch.no_grad()(sampler.sample.__wrapped__))
    for device in ("cpu", "card"):
        cfg = toy.settings(folder, "lora", module.Config, **how, int8=int8, max_new_tokens=6, slots=8)
        cfg.stage = f"{name}_{device}"
        cfg.dir().mkdir(exist_ok=True)
        monkeypatch.setattr(policy, "load_base", lambda *args, device=device: load_base(*args).to(device))
        if device == "cpu":
            module.run(cfg)
        else:
            monkeypatch.setattr(update.Updater, "add", counted_add)
            monkeypatch.setattr(update.Updater, "step", counted_step)
            with Card() as waits:
                module.run(cfg)
        found[device] = toy.lines(cfg), *(json.loads(path.read_text()) for path in cfg.dir().glob("outputs.json"))
    for there, here in zip(found["card"][0], found["cpu"][0], strict=True):
        assert toy.known(there) == pytest.approx(toy.known(here), rel=1e-4, abs=1e-5)
    assert [[record["output"] for record in answers] for answers in found["card"][1:]] == \
        [[record["output"] for record in answers] for answers in found["cpu"][1:]]
    if name == "ppo":                                   # with a rollout in between
        assert waited[2] - waited[1] <= 40
    else:                                               # the norm of the gradient and the metrics, besides
        assert [b - a for a, b in zip(waited[2:], waited[3:])] == [2 + each * n for n in micro_batches[2:-1]]
