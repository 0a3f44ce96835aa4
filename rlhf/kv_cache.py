"""[kit] The cache of keys and values for sampling, which is read only as far as the rows in it reach.

Letters: B rows, S columns of the cache, H heads, K kv heads, hd head size, P prompts, T tokens.
"""
from functools import partial

import torch
import torch.nn.functional as F

from model import attention_in_parts, causal


class KVCache:
    """Keys and values of every layer, (slots, K, S, hd) each. A slot holds one row, filled up to the row's position."""

    def __init__(self, config, slots, length, device, dtype):
        shape = (slots, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.first_cell = torch.arange(slots * shape[1], device=device).view(slots, -1) * length         # (slots, K)
        self.columns = torch.arange(length, device=device)                                               # (S,)
        self.windows = set(config.windows)
        self.sdpa = self.k[0].is_cuda           # on CPUs two products are a third faster for so few queries

    def prefill(self, slots, source):
        """Attention functions, one for each layer, for prompts (P, T) from column 0 on: row source[i] of the prompts is
        kept in slot slots[i]."""
        return [partial(self.attend_to_prompt, layer, slots, source) for layer in range(len(self.k))]

    def attend_to_prompt(self, layer, slots, source, q, k, v, window, cap):
        """Keep k and v (P, T, K, hd), and attend within the prompts."""
        T = k.shape[1]
        self.k[layer][slots, :, :T] = k.transpose(1, 2)[source]
        self.v[layer][slots, :, :T] = v.transpose(1, 2)[source]
        return causal(q, k, v, window, cap)

    def decode(self, pos, span, long=()):
        """Attention functions, one for each layer, for one more token of the rows in the first B slots, at columns pos
        (B,). Only the first `span` columns are read, and all pos are below it, except those of a few long rows: these
        are read once more by themselves, up to a span of their own. long: [(their slots, their span)] or []."""
        cells = (self.first_cell[:len(pos)] + pos[:, None]).flatten()                    # (B * K,)
        parts = [(slots, self.biases(pos[slots], n)) for slots, n in [(slice(len(pos)), span), *long]]
        return [partial(self.attend_to_cache, layer, cells, parts) for layer in range(len(self.k))]

    def biases(self, pos, span):
        """{window: (B, 1, 1, span), 0 where a row at its column pos (B,) attends to a column, else -inf}."""
        ahead, found = (self.columns[:span] - pos[:, None])[:, None, None], {}           # (B, 1, 1, span)
        for window in self.windows:
            hidden = (ahead > 0) | (ahead <= -window) if window else ahead > 0
            bias = torch.zeros(ahead.shape, device=pos.device, dtype=self.k[0].dtype)
            found[window] = bias.masked_fill_(hidden, -torch.inf)
        return found

    def attend_to_cache(self, layer, cells, parts, q, k, v, window, cap):
        """q (B, H, hd), k and v (B, K, hd) of one token a row -> (B, H, hd). The H / K query heads that share a kv head
        become the rows of one product, so that the cache is read once and never repeated."""
        self.update(layer, cells, k, v)
        q_rows = q.reshape(*k.shape[:2], -1, k.shape[2])                                 # (B, K, H/K, hd)
        (slots, biases), *apart = parts
        y = self.read(layer, slots, q_rows, biases[window], cap)
        for slots, biases in apart:
            y[slots] = self.read(layer, slots, q_rows[slots], biases[window], cap)
        return y.reshape(q.shape)

    def read(self, layer, slots, q, bias, cap):
        """Attention of q (B, K, H/K, hd) to the columns of their slots that the bias (B, 1, 1, span) reaches."""
        k, v = (x[layer][slots, :, :bias.shape[-1]] for x in (self.k, self.v))           # (B, K, span, hd)
        if cap:
            return attention_in_parts(q, k, v, bias, cap)
        if self.sdpa:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, -1, q.shape[2], -1))
        return (q @ k.mT).mul_(q.shape[-1] ** -.5).add_(bias).softmax(-1) @ v

    def update(self, layer, cells, k, v):
        """Write k and v (B, K, hd) to the cells (B * K,): column s of kv head j in slot i is cell (i K + j) S + s."""
        hd = k.shape[-1]
        self.k[layer].view(-1, hd).index_copy_(0, cells, k.reshape(-1, hd))
        self.v[layer].view(-1, hd).index_copy_(0, cells, v.reshape(-1, hd))

    def move(self, source, slots):
        """Copy the rows of some slots into others."""
        for x in (*self.k, *self.v):
            x[slots] = x[source]


def apart(spans):
    """(span, long) for KVCache.decode(), so that few columns are read: a long row is read twice and copied once, and
    all others are read only as far as the longest of them. spans: {slot: columns that its row needs}."""
    slots = sorted(spans, key=spans.get)
    longest, n = spans[slots[-1]], len(slots)
    cost, first = min((n * spans[slots[i - 1]] + 3 * (n - i) * longest, i) for i in range(1, n + 1))
    if cost > .9 * n * longest:         # hardly any gain
        return longest, []
    return spans[slots[first - 1]], [(slots[first:], longest)]
