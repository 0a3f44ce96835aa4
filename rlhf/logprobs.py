"""[kit] Token log-probs: rows packed into tensors, and the log-prob of every token that the policy wrote.

The convention of the whole project: a row is a prompt and a response, right-padded, in `ids (B, T)`. Everything per
token is (B, T-1), and index t is about the token ids[:, t+1]. `mask` is 1 where the policy wrote ids[:, t+1], EOS
included.
"""
from itertools import repeat

import torch

from model import PackedRows, logits
from products import product

HELD = 1 << 28                          # bytes of logits in fp32 that are held at a time


def pack(rows, device="cpu"):
    """[(prompt ids, response ids)] -> ids (B, T) right-padded with 0, mask (B, T-1)."""
    assert all(prompt for prompt, _ in rows), "a response needs a token before it, from which it is predicted"
    T = max(lengths(rows))
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        ids[row, :len(prompt) + len(response)] = torch.tensor(prompt + response)
    return ids.to(device), response_mask(rows, T).to(device)


def response_mask(rows, T):
    """mask (B, T-1), bool, of B rows [(prompt ids, response ids)] that are padded to T tokens: true at t if token t + 1
    is of the response, EOS included. For example the prompt "p q", the answers "x" and "y z", T = 5, "." for padding:

        p q x . .    mask 0 1 0 0
        p q y z .         0 1 1 0
    """
    mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        mask[row, len(prompt) - 1:len(prompt) + len(response) - 1] = True
    return mask


def lengths(rows):
    """Tokens of each row, prompt and response together: a list (B,)."""
    return [len(prompt) + len(response) for prompt, response in rows]


def last_token(mask):
    """(B,): the index in mask (B, T-1) of each response's last token; in ids its index is one higher."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


class ChunkedLogProb(torch.autograd.Function):
    """log softmax(logits / temperature)[target] for a chunk of rows at a time, so that N x V numbers never exist,
    neither in the forward nor in the backward pass. The logits are model.logits(h, W, divisor, cap).

    h (N, D), W (V, D), targets (N,) -> (N,) in fp32. The gradient with respect to h is computed in the forward pass,
    where the logits are at hand. So with a frozen W they are computed once. If W learns, the backward pass computes
    them again, except when one chunk held all rows: then their gradient was kept.
    """

    @staticmethod
    def forward(ctx, h, W, targets, temperature, chunk, divisor=1., cap=0.):
        logp = torch.empty(len(h), device=h.device)                                      # (N,), fp32
        learns, frozen = ctx.needs_input_grad[0], not ctx.needs_input_grad[1]
        dh, kept = torch.empty_like(h) if learns else None, (None, None)
        settings = temperature, divisor, cap
        for i in range(0, len(h), chunk):
            rows = slice(i, i + chunk)
            logp[rows], d, factor = logp_and_gradient(h[rows], W, targets[rows], *settings)
            if learns:
                dh[rows] = factor * product(d.to(W.dtype), W.T)                          # (chunk, D)
                kept = (d, factor) if len(h) <= chunk and not frozen else kept
        ctx.save_for_backward(dh, *(() if frozen else (h, W, targets, *kept)))
        ctx.chunk, ctx.settings = chunk, settings
        return logp

    @staticmethod
    def backward(ctx, grad):
        dh, *learning = ctx.saved_tensors
        dW = None
        if learning:
            h, W, targets, *kept = learning
            for i in range(0, len(h), ctx.chunk):
                rows = slice(i, i + ctx.chunk)
                d, factor = kept
                if d is None:
                    _, d, factor = logp_and_gradient(h[rows], W, targets[rows], *ctx.settings)
                dx = (grad[rows, None] * factor * h[rows]).T                             # (D, chunk)
                dW = product(d.T, dx) if dW is None else dW.add_(product(d.T, dx))       # (V, D)
            dW = torch.zeros_like(W) if dW is None else dW.to(W.dtype)
        return dh * grad[:, None].to(dh.dtype), dW, None, None, None, None, None


def logp_and_gradient(h, W, targets, temperature, divisor, cap):
    """Log-probs (n,) of the targets (n,), and the gradient of each with respect to its row of h W', in two factors: d
    (n, V) and factor (n, 1). h (n, D), W (V, D).

    With p = softmax(x), x = logits / temperature: the gradient with respect to x is 1[target] - p, and the slope of a
    cap is 1 - (logit / cap)^2. Done in place, for the time goes into passes over n x V numbers.
    """
    x = logits(h, W, divisor, cap)                                                       # (n, V)
    slope = 1 - (x / cap) ** 2 if cap else None
    x.div_(temperature)
    at_target, largest = x.gather(1, targets[:, None]), x.amax(-1, keepdim=True)
    d = x.sub_(largest).exp_()
    total = d.sum(-1, keepdim=True)                                                      # p is d / total
    d.scatter_add_(1, targets[:, None], -total)
    if cap:
        d.mul_(slope)
    return (at_target - largest - total.log())[:, 0], d, -1 / (total * temperature * divisor)


def token_logps(policy, ids, mask, temperature=1.0, chunk=0, shared=1):
    """Log-probs (B, T-1) of the tokens that the mask marks, 0 elsewhere. temperature: the one they were sampled with.

    chunk: for how many tokens logits are held at a time (default: as many as take 256 MB).
    shared = 2: the second half of the rows has the same prompts as the first half, and each is computed once.
    """
    where = mask.flatten().nonzero()[:, 0]              # (N,); first, because this waits for the GPU
    h = encode(policy, ids[:, :-1], mask, where, shared)                                 # (N, D)
    c = policy.gpt.config
    chunk = chunk or max(1, HELD // (4 * c.vocab_size))
    logp = ChunkedLogProb.apply(h, policy.gpt.head, ids[:, 1:].flatten()[where], temperature, chunk, c.logits_scaling,
                                c.final_logit_softcapping)
    return scatter(logp, where, mask.shape)                                              # (B, T-1)


def scatter(x, where, shape):
    """A tensor of this shape with x (N,) at the places `where` (N,), which count over all of it, and 0 elsewhere."""
    return torch.zeros(shape.numel(), device=x.device).index_copy(0, where, x).view(shape)


def encode(policy, ids, mask, where, shared=1):
    """Hidden states (N, D) at the places `where` (N,), which count over the rows ids (B, T) laid end to end.

    With shared > 1, rows b, b + B / shared, ... have one prompt, which is computed once, and padding is not computed.
    Where prompt and row end is read off mask (B, T), whose first 1 is at the prompt's last token. For example shared =
    2, the prompt "p q", the answers "x" and "y z", and "." for padding:

        ids      p q x .        computed:  p q x y z   (tokens 0 to 4)
                 p q y z
        token    0 1 2 2        which of the computed tokens stands at each place; at padding, any
                 0 1 3 4
        place    0 1 2 6 7      where each computed token stands in the rows laid end to end
    """
    if shared == 1:
        return policy.hidden(ids, where=where)
    B, T = ids.shape
    t = torch.arange(T, device=ids.device)
    in_prompt = t <= mask.int().argmax(1)[:, None]                                       # (B, T)
    computed = (t <= last_token(mask)[:, None]) & ~in_prompt
    computed[:B // shared] |= in_prompt[:B // shared]
    place = computed.flatten().nonzero()[:, 0]                                           # (tokens,)
    token = computed.flatten().cumsum(0).view(B, T) - 1
    token = torch.where(in_prompt, token[:B // shared].repeat(shared, 1), token)         # (B, T)
    attends = repeat(PackedRows(token, place))
    return policy.hidden(ids.flatten()[place], place % T, attends, token.flatten()[where])
