"""[kit] Token log-probs: rows packed into tensors, and log pi of every token that the policy wrote.

The alignment rule of the whole project: rows are right-padded prompt + response, `ids (B, T)`; everything per token is
(B, T-1), and index t speaks of ids[:, t+1]. `mask` is 1 where the policy wrote ids[:, t+1], EOS included.
"""
from itertools import repeat

import torch

from model import Packing


def pack(rows, device="cpu"):
    """[(prompt ids, response ids)] -> ids (B, T) right-padded with 0, mask (B, T-1)."""
    assert all(prompt for prompt, _ in rows), "the first token of a response has nothing to be predicted from"
    T = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) - 1:end - 1] = True
    return ids.to(device), mask.to(device)


def last_token(mask):
    """(B,): the index in mask (B, T-1) of each response's last token; in ids it stands one further."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


class ChunkedLogProb(torch.autograd.Function):
    """log softmax(h W' / temperature)[target], a chunk of rows at a time: N x V never exists, forward or backward.

    h (N, D), W (V, D), targets (N,) -> (N,) in fp32. The gradient of a log-prob with respect to h is known up to its
    factor when it is computed: (W[target] - sum_v p_v W_v) / temperature. A frozen head therefore needs its logits
    once; one that learns needs them again in the backward pass, unless one chunk was enough and is still there.
    """

    @staticmethod
    def forward(ctx, h, W, targets, temperature, chunk):
        logp = torch.empty(len(h), device=h.device)                                      # (N,), fp32
        learns, frozen = ctx.needs_input_grad[0], not ctx.needs_input_grad[1]
        dh, kept = torch.empty_like(h) if learns else None, (None, None)
        for i in range(0, len(h), chunk):
            rows, target = slice(i, i + chunk), targets[i:i + chunk]
            p, total, logp[rows] = softmax(h[rows], W, target, temperature)
            if learns:
                dh[rows] = (W[target] - p.to(W.dtype) @ W / total).div_(temperature)
                kept = (p, total) if len(h) <= chunk and not frozen else kept
        ctx.save_for_backward(dh, *(() if frozen else (h, W, targets, *kept)))
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp

    @staticmethod
    def backward(ctx, grad):
        dh, *learning = ctx.saved_tensors
        dW = None
        if learning:
            h, W, targets, *kept = learning
            dW = torch.zeros(W.shape, device=W.device)
            for i in range(0, len(h), ctx.chunk):
                rows, target = slice(i, i + ctx.chunk), targets[i:i + ctx.chunk]
                p, total = kept if kept[0] is not None else softmax(h[rows], W, target, ctx.temperature)[:2]
                g = grad[rows, None] / ctx.temperature                                   # (chunk, 1)
                d = p.mul_(-g / total).scatter_add_(1, target[:, None], g)               # (chunk, V): g (1[target] - p)
                dW += d.T @ h[rows].float()
            dW = dW.to(W.dtype)
        return dh * grad[:, None].to(dh.dtype), dW, None, None, None


def softmax(h, W, targets, temperature):
    """Of h (n, D) and W (V, D), with few passes over n x V numbers: e^(logit - the largest) (n, V), their sum (n, 1),
    and the log-probs (n,) of the targets (n,)."""
    logits = (h @ W.T).float().div_(temperature)                                         # (n, V)
    at_target, largest = logits.gather(1, targets[:, None]), logits.amax(-1, keepdim=True)
    p = logits.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)
    return p, total, (at_target - largest - total.log())[:, 0]


def token_logps(policy, ids, mask, temperature=1.0, chunk=1024, shared=1):
    """Log-probs (B, T-1) of the tokens that the mask marks, 0 elsewhere; the same temperature as when sampling.

    shared 2: the second half of the rows answers the prompts of the first half, and these are computed only once.
    """
    where = mask.flatten().nonzero()[:, 0]              # (N,), before all else: this waits for the GPU
    h = encode(policy, ids[:, :-1], mask, where, shared)                                 # (N, D)
    logp = ChunkedLogProb.apply(h, policy.gpt.head, ids[:, 1:].flatten()[where], temperature, chunk)
    return spread(logp, where, mask.shape)                                               # (B, T-1)


def spread(x, where, shape):
    """Zeros of this shape, with x (N,) at the places `where` (N,), counted over all."""
    return torch.zeros(shape.numel(), device=x.device).index_copy(0, where, x).view(shape)


def encode(policy, ids, mask, where, shared=1):
    """Hidden states (N, D) at the places `where` (N,) of the rows ids (B, T) laid end to end.

    shared > 1: rows b, b + B / shared, ... have one prompt, which is computed once; padding is not computed at all.
    The prompt ends where mask (B, T) begins, and the row where it ends.
    """
    if shared == 1:
        return policy.hidden(ids, where=where)
    B, T = ids.shape
    t = torch.arange(T, device=ids.device)
    prompt = t <= mask.int().argmax(1)[:, None]                                          # (B, T)
    own = (t <= last_token(mask)[:, None]) & ~prompt
    own[:B // shared] |= prompt[:B // shared]
    source = own.flatten().nonzero()[:, 0]                                               # (tokens,)
    at = own.flatten().cumsum(0).view(B, T) - 1
    at = torch.where(prompt, at[:B // shared].repeat(shared, 1), at)                     # (B, T)
    return policy.hidden(ids.flatten()[source], source % T, repeat(Packing(at, source)), at.flatten()[where])
