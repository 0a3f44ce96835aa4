"""[kit] Sampling answers: one prefill per prompt, then a token per step for all rows of a static cache.

Rows are right-padded and each has its own position, finished rows are dropped. Every row draws from its own stream of
random numbers, so an answer does not depend on which rows share its batch. Pure temperature sampling: no top-k, no
top-p, because learners compare log-probs with the distribution that was sampled from.
"""
import torch
import torch.nn.functional as F

from model import KVCache
from rlhf.policy import pack


def draw(logits, u, temperature):
    """Token ids (B,) from logits (B, V) by inverting the CDF at u (B,) in [0, 1); temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)                          # (B, V)
    at = u[:, None] * cdf[:, -1:]                       # a cumsum rounds: its last entry need not be 1
    return torch.searchsorted(cdf, at, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(policy, prompts, stops, max_new_tokens, temperature=1., seed=0, n=1, slots=256):
    """n answers to each prompt (a list of token ids), in order: [(prompt ids, response ids)], n rows a prompt.

    A response ends with the id in `stops` that ended it, or after max_new_tokens without one.
    """
    device = policy.gpt.device
    u = torch.rand(len(prompts) * n, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = [None] * (len(prompts) * n)
    width = min(n, slots)                               # rows that share one prefill
    shares = [(i, range(i * n + j, i * n + min(j + width, n))) for i in range(len(prompts)) for j in range(0, n, width)]
    shares.sort(key=lambda share: len(prompts[share[0]]))
    for start in range(0, len(shares), slots // width):
        group = shares[start:start + slots // width]
        at = [row for _, share in group for row in share]                                # (B,): where rows go
        responses = decode(policy, [prompts[i] for i, _ in group], [len(share) for _, share in group], stops, u[at],
                           temperature)
        for row, response in zip(at, responses):
            rows[row] = (prompts[row // n], response)
    return rows


def decode(policy, prompts, copies, stops, u, temperature):
    """One group of rows to the end: P prompts in copies (P,) rows each, B in all; u (B, tokens) -> B responses."""
    device, c = policy.gpt.device, policy.gpt.config
    B, max_new_tokens = u.shape
    ids, _ = pack([(prompt, []) for prompt in prompts], device)                          # (P, longest)
    pos = torch.tensor([len(prompt) for prompt in prompts], device=device)               # (P,): next free column
    span = ids.shape[1]
    stop_ids = torch.tensor(stops, device=device)

    cache = KVCache(c, len(prompts), span + max_new_tokens, device, policy.gpt.head.dtype)
    h = policy.hidden(ids, cache)[torch.arange(len(prompts), device=device), pos - 1]    # (P, D): last real token
    rows = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(copies, device=device))
    cache.keep(rows)                                                                     # one prefill for all copies
    h, pos = h[rows], pos[rows]

    written = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    alive = torch.arange(B, device=device)                                               # the rows still in the cache
    done = torch.zeros(B, dtype=torch.bool, device=device)                               # ended, but not yet dropped
    finite = torch.ones((), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        finite &= h.isfinite().all()
        token = draw(F.linear(h, policy.gpt.head), u[alive, t], temperature)             # (rows,)
        written[alive, t] = token
        ended = torch.isin(token, stop_ids) & ~done
        length[alive[ended]] = t + 1
        done |= ended
        if done.all() or t + 1 == max_new_tokens:
            break
        if done.float().mean() > .1:                                                     # drop rows, but not one by one
            cache.keep(~done)
            alive, token, pos, done = alive[~done], token[~done], pos[~done], done[~done]
        span += 1
        h = policy.hidden(token[:, None], cache, pos, span)[:, 0]                        # (rows, D)
        pos = pos + 1
    if not finite:
        raise FloatingPointError("the model's hidden states are not finite: its weights are broken, or fp16 overflowed")
    return [row[:end] for row, end in zip(written.tolist(), length.tolist())]
