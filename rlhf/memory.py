"""[kit] Memory: what a stage will hold, said in a line before it starts; and what to lower if that is too much.

The numbers are an estimate from config.json and the flags, made before anything is loaded. They leave out the memory of
torch and Python themselves. Where memory depends on the texts, they assume full micro-batches (activations) and answers
of full length (KV cache).
"""
import os
import textwrap
from contextlib import contextmanager

import torch

from data import read_json
from data.progress import width
from model import SHORT, GPT, GPTConfig
from rlhf import policy
from rlhf.logprobs import HELD
from rlhf.sampler import MAX_SLOTS, cache_length, longest_answer
from rlhf.update import plainly

OPTIMIZER = 12                          # bytes for each trained parameter: its gradient and AdamW's two moments, fp32
ADVICE = "finished stages are kept. Try, in this order: "


def held(cfg, needs):
    """{what: bytes} that a stage will hold, though not all of it at once; {} if its model cannot be built. needs: the
    stages that it needs, {name: id}."""
    device, precision = policy.precision(cfg)
    try:
        with torch.device("meta"):
            gpt = GPT(GPTConfig.from_hf(read_json(cfg.checkpoint / "config.json")))
            gpt.add_role("policy", cfg.lora_rank or 1, cfg.lora_alpha)
    except (ValueError, RuntimeError):
        return {}                                       # model.load() says why
    bytes, idle = getattr(torch, precision).itemsize, cfg.idle()
    adapter = sum(p.numel() for p in gpt.adapter("policy").values())
    base = sum(p.numel() for p in gpt.parameters()) - adapter
    quantised = sum(linear.weight.numel() for _, linear in gpt.linears()) if cfg.int8 else 0
    trains, samples, critic = "micro_batch_tokens" not in idle, "slots" not in idle, hasattr(cfg, "vf_coef")
    models = 1 + (trains and "start" not in idle) + ("reward" in needs) + critic
    trained = (1 + critic) * (adapter if cfg.lora_rank else base) * trains
    found = {"weights": (base - quantised) * bytes + quantised}
    if cfg.lora_rank:
        found["adapters"] = models * adapter * 4
    else:
        found["weights"] *= models
    found["optimizer"] = trained * OPTIMIZER
    c, tokens = gpt.config, cfg.micro_batch_tokens * trains
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = c.hidden_size if cfg.checkpointing else 10 * c.hidden_size + 4 * c.intermediate_size + 2 * qkv
    if (device, precision) == ("cpu", "bfloat16"):      # attention in its parts keeps its scores, in fp32 and in bf16
        layer += 3 * c.num_attention_heads * SHORT
    found["activations"] = tokens * c.num_hidden_layers * layer * bytes
    found["logits"] = 2 * min(HELD, tokens * c.vocab_size * 4)
    if samples:
        found["copies for sampling"] = sampling_copies(gpt, getattr(torch, precision), device, cfg)
    if samples and (slots := cfg.slots or MAX_SLOTS["cpu"] * (device == "cpu")):        # on a GPU as many as fit
        longest = cache_length(torch.device(device), cfg.max_prompt_tokens + longest_answer(cfg.text(), cfg))
        found["cache"] = slots * longest * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * bytes
    return {what: size for what, size in found.items() if size}


def sampling_copies(gpt, dtype, device, cfg):
    """Bytes that GPT.fused() holds beside weights in this dtype: linear layers that are packed, or copied for an
    adapter; a head that is packed, or in fp32."""
    pack, stack, convert = gpt.copies(dtype, device)
    layers = dtype.itemsize * sum(layer.weight.numel() for _, layer in gpt.linears()) * (not cfg.int8)
    adapted = cfg.lora_rank > 0 and (stack or dtype == torch.float32)
    return layers * (pack or adapted) + 4 * gpt.head.numel() * (pack or convert)


def room(cfg):
    """(bytes of memory, "on the GPU" or "of RAM") of this machine; (0, "") if the system does not say."""
    device, _ = policy.precision(cfg)
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory, "on the GPU"
    if hasattr(os, "sysconf"):                          # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "of RAM"
    return 0, ""


def amount(size):
    """A number of bytes as text: 13 MB or 3.4 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def listed(found):
    return ", ".join(f"{what} {amount(size)}" for what, size in found.items())


@contextmanager
def watched(cfg, needs):
    """Print what a stage will hold. If the with block runs out of memory, the error says what to lower."""
    found = held(cfg, needs)
    if found:
        print(said(cfg, found), flush=True)
    with plainly(advice(cfg), listed(found)):
        yield


def said(cfg, found):
    """The text for the terminal. found: what held() returns."""
    size, where = room(cfg)
    there = f"; there are {amount(size)} {where}" if size else ""
    return textwrap.fill(f"memory: about {listed(found)}{there}", width(), initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False)


def advice(cfg):
    """A sentence with flags for the same command that lower its memory, in the order in which to try them."""
    idle, ways = cfg.idle(), []
    if "micro_batch_tokens" not in idle:
        ways += [f"--micro_batch_tokens {cfg.micro_batch_tokens // 2}"] * (cfg.micro_batch_tokens > 256)
        ways += ["--checkpointing"] * (not cfg.checkpointing)
    if "slots" not in idle:
        ways += [f"--slots {max(1, (cfg.slots or 64) // 2)}", f"--max_new_tokens {max(1, cfg.max_new_tokens // 2)}"]
    if not cfg.lora_rank:
        ways += ["--lora_rank 16"]
    elif not cfg.int8:
        ways += ["--int8"]
    return ADVICE + ", ".join([*ways, "a smaller --model"])
