"""Tiny random models for the tests: quick, and loud enough that every part of them shows in the logits."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from rlhf.policy import Policy

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}


@torch.no_grad()
def randomise(module, seed=0):
    """Norms near 1, everything else (biases and LoRA's B too) far from 0."""
    r = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.copy_(torch.randn(p.shape, generator=r) * .3 + ("norm" in name))
    return module


def gpt(seed=0, **changes):
    """A frozen random model, as load() hands one out."""
    return randomise(GPT(GPTConfig(**SHAPE | changes)), seed).requires_grad_(False)


def policy(kind="full", seed=0, **changes):
    """A policy of which everything is trained, or a random adapter (role "sft") on a random base."""
    base = gpt(seed, **changes)
    if kind == "full":
        return Policy(base)
    base.add_role("sft", rank=4, alpha=8)
    with torch.no_grad():
        for p in base.adapter("sft").values():
            p.normal_(0, .1, generator=torch.Generator().manual_seed(seed + p.numel()))
    return Policy(base.requires_grad_(False), "sft")


class Watch(TorchDispatchMode):
    """Sees every tensor that any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.sizes = {}                     # (device, dtype): elements of the largest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                kind = x.device.type, x.dtype
                self.sizes[kind] = max(self.sizes.get(kind, 0), x.numel())
        return out

    def largest(self, device, dtype):
        return self.sizes.get((device, dtype), 0)


def ids(rows, length, seed=0, vocab=61):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def texts(lengths, seed=0, vocab=61):
    """Lists of token ids of these lengths."""
    return [ids(1, length, seed + i, vocab)[0].tolist() for i, length in enumerate(lengths)]


def plain_logps(policy, ids, mask, temperature=1.):
    """What token_logps must equal, as the textbook writes it."""
    with policy.gpt.using(policy.role):
        logp = (policy.gpt(ids[:, :-1]) / temperature).log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0] * mask
