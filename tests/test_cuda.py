"""What only a GPU can show: captured steps, waits, low precision, compiled code. Skipped where there is none."""
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import tiny
import torch

from model import FLASH, logits
from rlhf import reward, sampler, writer
from rlhf.kv_cache import KVCache
from rlhf.logprobs import ChunkedLogProb, pack, token_logps
from rlhf.update import Updater

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[1]
SHAPE = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
         "num_key_value_heads": 2}                              # heads of 32, as kernels want them
PROMPTS = tiny.texts([3, 9, 1, 5, 40, 2, 7, 30, 11, 4], vocab=500)
ROWS = [(prompt, answer) for prompt, answer in zip(PROMPTS, tiny.texts([20, 7, 1, 33, 9, 15, 3, 8, 2, 40], 90, 500))]


FAMILIES = {  # what is not Llama's, several at a time
    "windows": {"windows": (0, 9), "norm": "rms+1", "qk_norm": "head", "norm_after": True,
                "embedding_multiplier": 128 ** .5},
    "caps": {"windows": (0, 9), "attn_logit_softcapping": 3., "final_logit_softcapping": 5., "norm": "bare",
             "norm_embedding": True, "qk_norm": "head", "backwards": True, "gated": False, "hidden_act": "relu2",
             "residual_multiplier": .5, "logits_scaling": 2.},
    "mixture": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gpt2": {"norm": "layer", "gated": False, "fused_qkv": "rows", "learned_positions": True, "ropes": (),
             "layer_ropes": (-1, -1), "hidden_act": "gelu_tanh", "num_key_value_heads": 4},
    "neox": {"norm": "layer", "gated": False, "fused_qkv": "heads", "rotary_dim": 8, "parallel_residual": True,
             "hidden_act": "gelu", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
}


def on_gpu(kind, dtype=torch.float32, **changes):
    model = tiny.policy(kind, **SHAPE | changes)
    model.gpt.to("cuda", dtype)
    if kind == "lora":
        for p in model.gpt.adapter("sft").values():
            p.data = p.data.float()
    model.gpt.make_contiguous()
    return model


@pytest.mark.parametrize("slots", [1, 3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_captured_step_samples_what_an_eager_one_does(kind, dtype, slots):
    """Refill, compaction and spans of more than one size; twice, as a second call captures anew."""
    model, limits = on_gpu(kind, dtype), [5 + 13 * i % 150 for i in range(20)]
    eager, graph, again = (sampler.sample(model, PROMPTS, [7], limits, 1.5, 0, 2, slots, graph)
                           for graph in (False, True, True))
    assert eager == graph == again


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_other_families_are_captured_and_trained_as_well(kind, family):
    model, limits = on_gpu(kind, **family), [5 + 13 * i % 150 for i in range(20)]
    eager, graph = (sampler.sample(model, PROMPTS, [7], limits, 1.5, 0, 2, 8, graph) for graph in (False, True))
    assert eager == graph
    there, here = (token_logps(m, *pack(ROWS, device)).sum() for m, device in (
        (model, "cuda"), (tiny.policy(kind, **SHAPE | family), "cpu")))
    torch.testing.assert_close(there.cpu(), here, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("family", [{}, *FAMILIES.values()], ids=["llama", *FAMILIES])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_greedy_answers_equal_a_full_forward_pass_per_token(kind, family):
    model = on_gpu(kind, **family)
    for prompt, response in sampler.sample(model, PROMPTS, [500], 12, temperature=0, slots=4):
        with model.gpt.using(model.role), torch.no_grad():
            logits = model.gpt(torch.tensor([prompt + response], device="cuda"))[0, len(prompt) - 1:-1]
        best = logits.max(-1).values
        chosen = logits.gather(1, torch.tensor(response, device="cuda")[:, None])[:, 0]
        assert (best - chosen).max() < 1e-3                     # equal, or a tie within rounding


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}, {"windows": (0, 9)}])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rows_that_are_read_by_their_length_give_the_answers_of_a_full_forward_pass(kind, shape):
    """Also with the adapters below the weights, in bf16."""
    model = on_gpu(kind, torch.bfloat16, **shape)
    assert KVCache(model.gpt.config, 2, 128, model.gpt.device, torch.bfloat16).by_length == FLASH
    for prompt, response in sampler.sample(model, PROMPTS, [500], 40, temperature=0, slots=4):
        with model.gpt.using(model.role), torch.no_grad():
            logits = model.gpt(torch.tensor([prompt + response], device="cuda"))[0, len(prompt) - 1:-1]
        chosen = logits.gather(1, torch.tensor(response, device="cuda")[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < .2 * logits.std()        # ties within the rounding of bf16


@pytest.mark.parametrize("kind, dtype", [("full", torch.float32), ("lora", torch.float32), ("lora", torch.bfloat16)])
def test_graphs_that_are_kept_read_the_weights_of_today(kind, dtype):
    model, answers = on_gpu(kind, dtype), []
    for _ in range(3):
        kept = sampler.sample(model, PROMPTS, [7], 30, 1.5, 0, 2, 16)
        assert len(model.engines) == 1
        model.engines.clear()
        answers.append(sampler.sample(model, PROMPTS, [7], 30, 1.5, 0, 2, 16))
        assert kept == answers[-1]
        with torch.no_grad():
            for p in model.params():
                p.mul_(1.1)
    assert answers[0] != answers[1] != answers[2]


LIKELY = {"top_p": .8, "top_k": 30, "min_p": .02}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likely_tokens_are_drawn_in_captured_steps(dtype):
    model = on_gpu("lora", dtype)
    eager, graph = (sampler.sample(model, PROMPTS, [7], 30, 1.5, 0, 2, 8, graph, **LIKELY) for graph in (False, True))
    assert eager == graph != sampler.sample(model, PROMPTS, [7], 30, 1.5, 0, 2, 8)


@pytest.mark.parametrize("graph", [False, True])
def test_a_server_s_rows_have_their_own_likely_tokens_on_the_gpu(graph):
    """Three of one prompt beside each other, each as sampler.sample draws it alone."""
    model, u = on_gpu("lora"), torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    hows = [(1.5, *LIKELY.values()), (1.5, 1., 0, 0.), (0., .5, 0, 0.)]
    with torch.inference_mode(), model.gpt.fused(model.role):
        engine = writer.ServingEngine(model.gpt, 4, 64, [500], graph=graph)
        joined = [engine.join(PROMPTS[0], u[i:i + 1], how) for i, how in enumerate(hows)]
        engine.prefill(deque(joined))
        while engine.busy():
            engine.advance(want_logprobs=True, want_likely=True)
        written = [engine.read(row, 0, False)[0] for _, (row,) in joined]
    for response, how, row in zip(written, hows, range(3)):
        rows = sampler.sample(model, [PROMPTS[0]], [500], 20, how[0], 0, 3, 4, graph, None, *how[1:])
        assert rows[row][1] == response


@pytest.mark.parametrize("narrow", [{}, LIKELY], ids=["all", "likely"])
def test_nothing_in_a_step_waits_for_the_gpu(monkeypatch, narrow):
    step = sampler.Engine.step

    def watched(self, width, span, *long):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, width, span, *long)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(sampler.Engine, "step", watched)
    sampler.sample(on_gpu("lora", torch.bfloat16), PROMPTS, [7], 20, slots=4, graph=False, **narrow)


@pytest.mark.parametrize("kind, dtype", [("full", torch.float32), ("lora", torch.float32), ("lora", torch.bfloat16),
                                         ("lora", torch.float16)])
def test_log_probs_and_gradients_are_those_of_a_cpu(kind, dtype):
    """fp32 throughout on the CPU; low precision on the GPU is close, with checkpointing there and without here."""
    torch.set_float32_matmul_precision("highest")
    results = []
    for model in (tiny.policy(kind, **SHAPE), on_gpu(kind, dtype)):
        model.gpt.checkpointing = model.gpt.device.type == "cuda"
        params = model.trainable()
        logp = token_logps(model, *pack(ROWS, model.gpt.device))
        logp.sum().backward()
        results.append([logp.detach().cpu(), *(p.grad.cpu() for p in params)])
    for cpu, gpu in zip(*results, strict=True):
        error = (cpu - gpu).norm() / cpu.norm().clamp(min=1e-3)
        assert error < (1e-3 if dtype == torch.float32 else .15)


def test_chunked_gradients_where_head_and_states_are_bf16():
    h, W = (torch.randn(n, 64, device="cuda").bfloat16().requires_grad_(n == 300) for n in (300, 1000))
    targets = torch.randint(1000, (300,), device="cuda")
    ChunkedLogProb.apply(h, W, targets, 1., 128).sum().backward()
    chunked, h.grad = h.grad.float(), None
    (h.float() @ W.float().T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert (chunked - h.grad.float()).norm() < .02 * h.grad.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_rounded_to_fp32_only(dtype):
    """With and without gradients, which are two ways to compute them."""
    h, W = (torch.randn(n, 256, device="cuda", dtype=dtype) for n in (40, 1000))
    exact = (h.double() @ W.double().T).float()
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            torch.testing.assert_close(logits(h, W), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_shared_prompt_and_int8_on_the_gpu(dtype):
    model = on_gpu("lora", dtype)
    rows = ROWS[:5] + [(prompt, answer) for (prompt, _), (_, answer) in zip(ROWS[:5], ROWS[5:])]
    with torch.no_grad():
        plain, shared = (token_logps(model, *pack(rows, "cuda"), shared=shared) for shared in (1, 2))
        model.gpt.quantise()
        model.gpt.make_contiguous()
        low = token_logps(model, *pack(rows, "cuda"), shared=2)
    assert (plain - shared).norm() < .05 * plain.norm() and (plain - low).norm() < .15 * plain.norm()
    eager, graph = (sampler.sample(model, PROMPTS, [7], 30, slots=4, graph=graph) for graph in (False, True))
    assert eager == graph


def test_fused_adamw_learns_adapters_and_heads_in_fp32():
    critic = reward.fresh(on_gpu("lora", torch.bfloat16))
    updater = Updater(critic.trainable(), 1e-2, 20)
    ids, mask = pack(ROWS, "cuda")
    losses = []
    for _ in range(20):
        loss = ((reward.score(critic, ids, mask) - 1) ** 2).sum()
        updater.add(loss, len(ROWS))
        updater.step()
        losses.append(loss.item())
    assert losses[-1] < .5 * losses[0]


def test_compiled_blocks_compute_the_same():
    results = []
    for compiled in (False, True):
        model = on_gpu("lora", torch.bfloat16)
        model.gpt.checkpointing = True
        if compiled:
            model.gpt.compile_blocks()
        params = model.trainable()
        logp = token_logps(model, *pack(ROWS, "cuda"))
        logp.sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in params]))
    assert (results[0] - results[1]).norm() < .1 * results[0].norm()


def test_memory_is_given_back_after_sampling():
    model = on_gpu("lora", torch.bfloat16)
    sampler.sample(model, PROMPTS, [7], 30)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        sampler.sample(model, PROMPTS, [7], 30)
    assert torch.cuda.memory_allocated() <= held + 2 ** 20


@pytest.mark.parametrize("flags", [["--method", "ppo", "--steps", "2"],
                                   ["--method", "dpo", "--lora_rank", "8", "--int8", "--checkpointing"],
                                   ["--method", "ppo", "--steps", "2", "--lora_rank", "8", "--no_graph"]])
def test_the_command_runs_on_the_gpu(flags, tmp_path):
    done = subprocess.run([sys.executable, "farm.py", *flags, "--limit", "64", "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "vs sft" in done.stdout
