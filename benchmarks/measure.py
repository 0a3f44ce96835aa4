"""The clock, the memory and the floors of bench.py: what a run takes, and what it could not take less than."""
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
from rlhf.sampler import MAX_SLOTS
from rlhf.update import peak_gb


def clock(device):
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def held(device, peak=False):
    """Bytes in use now, or at the highest point since the last reset(): of the GPU, or of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():                             # not Linux: only a peak of all time is known
        return int(1e9 * peak_gb())
    field = "VmHWM:" if peak else "VmRSS:"
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


def reset(device):
    """Forget the peak, give back what is free."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def timed(args, runs):
    """{name: (median seconds, least seconds, peak bytes above what was held before)} of runs {name: function}.

    One warm-up each, then in turn, so that a machine whose speed drifts is as kind to one as to the other.
    """
    seconds, peaks = {name: [] for name in runs}, {}
    for turn in range(args.warmup + args.repeat):
        for name, run in runs.items():
            gc.collect()
            if turn == 0:                               # only once: memory that was given back has to be found again
                reset(args.device)
                before = held(args.device)
            start = clock(args.device)
            run()
            seconds[name].append(clock(args.device) - start)
            if turn == 0:
                peaks[name] = held(args.device, peak=True) - before
    return {name: (statistics.median(s[args.warmup:]), min(s[args.warmup:]), peaks[name])
            for name, s in seconds.items()}


def ceilings(args):
    """What this machine reaches: TFLOP/s of one large matrix product, GB/s of one large copy (reads and writes)."""
    n, size = (8192, 2 ** 30) if args.device == "cuda" else (1024, 2 ** 26)
    a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    x, y = (torch.empty(size, device=args.device) for _ in range(2))
    several = argparse.Namespace(**vars(args) | {"repeat": 5, "warmup": 1})
    took = timed(several, {"product": lambda: [a @ b for _ in range(5)],
                           "copy": lambda: [y.copy_(x) for _ in range(5)]})
    top = {"tflops": 5 * 2 * n ** 3 / took["product"][1] / 1e12, "gbps": 5 * 8 * size / took["copy"][1] / 1e9}
    print(f"this machine reaches {top['tflops']:.3g} TFLOP/s and {top['gbps']:.4g} GB/s", flush=True)
    return top


# -- floors --------------------------------------------------------------------------------------------------------

def size(args):
    """Weights in the linear layers, in the head; numbers of the cache a token; attention's factor."""
    V, D, mlp, L, H, K, _ = SHAPES[args.preset]
    hd = D // H
    return L * (2 * D * H * hd + 2 * D * K * hd + 3 * D * mlp), D * V, 2 * L * K * hd, 4 * L * H * hd


def pass_flops(args, rows, spoken, passes, head_passes):
    """FLOPs of rows (prompt and answer tokens) through the model: every token through the linear layers and over the
    tokens before it, `spoken` tokens through the head."""
    linear, head, _, attention = size(args)
    return sum(passes * (2 * linear * t + attention * t * t / 2) for t in rows) + head_passes * 2 * head * spoken


def at_peak(args, flops):
    """Seconds for so many FLOPs at the speed of one large product."""
    return flops / (1e12 * args.ceilings["tflops"])


def backward(args):
    """How many forward passes a training step costs: gradients of activations, of weights unless frozen, and the
    blocks once more with checkpointing; and of the head, which is frozen with LoRA."""
    return (2 if args.lora_rank else 3) + args.checkpointing, 2 if args.lora_rank else 3


def decode_floor(args, prompts, caps):
    """Seconds for the useful tokens: every step reads the weights once, and each row its cache, or computes longer."""
    linear, head, kv, attention = size(args)
    bytes = torch.empty(0, dtype=args.dtype).itemsize
    slots = min(len(caps), args.slots or MAX_SLOTS[args.device])
    steps = sum(caps) / slots
    context = sum((len(p) + c / 2) * c for p, c in zip(prompts, caps)) / sum(caps)
    read = linear * (1 if args.int8 else bytes) + head * bytes + slots * kv * bytes * context
    compute = slots * (2 * (linear + head) + attention * context)
    step = max(read / (1e9 * args.ceilings["gbps"]), at_peak(args, compute))
    return steps * step + at_peak(args, pass_flops(args, map(len, prompts), 0, 1, 0))


def processor():
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, one thread"
