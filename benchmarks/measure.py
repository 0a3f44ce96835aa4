"""Measures time and memory for bench.py, and computes floors: the least time that the hardware would need.

FLOPs are counted as 2 for each weight and token of a forward pass, plus attention.
"""
import argparse
import ctypes
import gc
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from benchmarks.plans import SHAPES
from products import product
from rlhf.sampler import MAX_SLOTS
from rlhf.update import peak_gb


def clock(device):
    """Seconds for differences: CPU time of this process, or with a GPU, wall time once the GPU has nothing to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory_in_use(device, peak=False):
    """Bytes in use now, or with `peak` the most since the last reset(): on the GPU, or by this process on the CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():                             # elsewhere than on Linux, only the peak since the start
        return int(1e9 * peak_gb())
    field = "VmHWM:" if peak else "VmRSS:"
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


def reset(device):
    """Return free memory to the system, and start to measure the peak anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def timed(args, runs):
    """{name: (median seconds, least seconds, peak bytes above those in use before)} for runs {name: function}.

    The runs take turns, so that a machine whose speed drifts does not favour one of them. The first --warmup rounds do
    not count. The peak is that of the first round.
    """
    seconds, peaks = {name: [] for name in runs}, {}
    for turn in range(args.warmup + args.repeat):
        for name, run in runs.items():
            gc.collect()
            if turn == 0:                               # not in each round: to allocate memory again takes time
                reset(args.device)
                before = memory_in_use(args.device)
            start = clock(args.device)
            run()
            seconds[name].append(clock(args.device) - start)
            if turn == 0:
                peaks[name] = memory_in_use(args.device, peak=True) - before
    counted = {name: s[args.warmup:] for name, s in seconds.items()}
    return {name: (statistics.median(s), min(s), peaks[name]) for name, s in counted.items()}


def ceilings(args):
    """The speeds that this machine reaches: TFLOP/s in one large matrix product, GB/s (reads plus writes) in one large
    copy. Prints them; returns {"tflops", "gbps"}."""
    n, size = (8192, 2 ** 30) if args.device == "cuda" else (1024, 2 ** 26)
    a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    x, y = (torch.empty(size, device=args.device) for _ in range(2))
    repeated = argparse.Namespace(**vars(args) | {"repeat": 5, "warmup": 1})
    took = timed(repeated, {"product": lambda: [product(a, b) for _ in range(5)],
                           "copy": lambda: [y.copy_(x) for _ in range(5)]})
    top = {"tflops": 5 * 2 * n ** 3 / took["product"][1] / 1e12, "gbps": 5 * 8 * size / took["copy"][1] / 1e9}
    print(f"this machine reaches {top['tflops']:.3g} TFLOP/s in {str(args.dtype).removeprefix('torch.')} and "
          f"{top['gbps']:.4g} GB/s", flush=True)
    return top


# -- floors --------------------------------------------------------------------------------------------------------

def size(args):
    """(linear, head, kv, attention) of the model: weights in the linear layers, weights in the head, numbers that a
    token adds to the KV cache, and the FLOPs of attention for one token that attends to one other."""
    V, D, mlp, L, H, K, _ = SHAPES[args.preset]
    hd = D // H
    return L * (2 * D * H * hd + 2 * D * K * hd + 3 * D * mlp), D * V, 2 * L * K * hd, 4 * L * H * hd


def pass_flops(args, rows, answer_tokens, passes, head_passes):
    """FLOPs of `passes` passes through the blocks and `head_passes` through the head.

    rows: the length of each row, prompt and answer. All tokens go through the linear layers and attend to the tokens
    before them; only `answer_tokens` tokens go through the head.
    """
    linear, head, _, attention = size(args)
    blocks = sum(passes * (2 * linear * t + attention * t * t / 2) for t in rows)
    return blocks + head_passes * 2 * head * answer_tokens


def seconds_for(args, flops):
    """Seconds for so many FLOPs at the speed of one large matrix product."""
    return flops / (1e12 * args.ceilings["tflops"])


def backward(args):
    """(passes through the blocks, through the head) that a training step costs, counted in forward passes.

    The forward pass is one. The gradients of the activations cost one more, and those of the weights another one, which
    LoRA saves, since the weights are frozen. Checkpointing repeats the forward pass of the blocks.
    """
    return (2 if args.lora_rank else 3) + args.checkpointing, 2 if args.lora_rank else 3


def decode_floor(args, prompts, caps):
    """The least seconds for sampling: caps[i] tokens after prompts[i].

    Each step decodes one token for as many rows as there are slots. It takes as long as the slower of two things: to
    read all weights once and the KV cache of each row, or to compute. The forward pass of the prompts is added.
    """
    linear, head, kv, attention = size(args)
    bytes = torch.empty(0, dtype=args.dtype).itemsize
    slots = min(len(caps), args.slots or MAX_SLOTS[args.device])
    steps = sum(caps) / slots
    context = sum((len(p) + c / 2) * c for p, c in zip(prompts, caps)) / sum(caps)
    read = linear * (1 if args.int8 else bytes) + head * bytes + slots * kv * bytes * context
    compute = slots * (2 * (linear + head) + attention * context)
    step = max(read / (1e9 * args.ceilings["gbps"]), seconds_for(args, compute))
    return steps * step + seconds_for(args, pass_flops(args, map(len, prompts), 0, 1, 0))


def processor():
    """The name of the CPU on Linux, elsewhere that of its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, one thread"
