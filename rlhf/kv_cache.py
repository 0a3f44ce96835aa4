"""[kit] The cache of keys and values for sampling, which is read as far as the rows in it reach, or nearly so.

Letters: B rows, S columns of the cache, H heads, K kv heads, hd head size, P prompts, T tokens.
"""
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from model import FLASH, attention_in_parts, causal


class KVCache:
    """Keys and values of every layer, (slots, K, S, hd) each. A slot holds one row, filled up to the row's position."""

    def __init__(self, config, slots, length, device, dtype):
        shape = (slots, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        # Each kv head of a slot is a row of its own to flash(): its one query, and its first cell.
        self.query = torch.arange(slots * shape[1] + 1, device=device, dtype=torch.int32)
        self.begin = self.query * length                                               # (slots * K + 1,)
        self.first_cell = self.begin[:-1].long().view(slots, -1)                         # (slots, K)
        self.columns = torch.arange(length, device=device)                                               # (S,)
        self.windows = set(config.windows)
        self.sdpa = self.k[0].is_cuda           # on CPUs two products are a third faster for so few queries
        groups = config.num_attention_heads // config.num_key_value_heads
        # whether each row is read to its own end; a kernel starts fewer than 65,536 rows
        self.by_length = FLASH and not config.attn_logit_softcapping and slots * shape[1] < 65536 and all(
            flash_reads_lengths(self.begin.device, dtype, groups, config.head_dim, window > 0)
            for window in self.windows)

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
        (B,). span, long: how far the cache is read, from extent()."""
        cells = (self.first_cell[:len(pos)] + pos[:, None]).flatten()                    # (B * K,)
        if self.by_length:
            lengths = (pos + 1)[:, None].expand(-1, self.first_cell.shape[1]).flatten().int()            # (B * K,)
            read = partial(self.read_lengths, lengths)
        else:
            parts = [(slots, self.biases(pos[slots], n)) for slots, n in [(slice(len(pos)), span), *long]]
            read = partial(self.read_spans, parts)
        return [partial(self.attend_to_cache, layer, cells, read) for layer in range(len(self.k))]

    def extent(self, needed):
        """How far decode() is to read: (span, long). Of all rows the first `span` columns are read. A few long rows are
        read once more by themselves, up to a span of their own; long: [(their slots, their span)] or []. needed: {slot:
        columns that its row has}."""
        if self.by_length:
            return len(self.columns), []
        if self.columns.device.type != "cpu":
            longest = max(needed.values())
            return longest + -longest % 128, []         # few graphs, and columns aligned for the kernel
        return apart(needed)

    def biases(self, pos, span):
        """{window: (B, 1, 1, span), 0 where a row at its column pos (B,) attends to a column, else -inf}."""
        ahead, found = (self.columns[:span] - pos[:, None])[:, None, None], {}           # (B, 1, 1, span)
        for window in self.windows:
            hidden = (ahead > 0) | (ahead <= -window) if window else ahead > 0
            bias = torch.zeros(ahead.shape, device=pos.device, dtype=self.k[0].dtype)
            found[window] = bias.masked_fill_(hidden, -torch.inf)
        return found

    def attend_to_cache(self, layer, cells, read, q, k, v, window, cap):
        """q (B, H, hd), k and v (B, K, hd) of one token a row -> (B, H, hd). The H / K query heads that share a kv head
        become the rows of one product, so that the cache is read once and never repeated."""
        self.update(layer, cells, k, v)
        return read(layer, q.reshape(*k.shape[:2], -1, k.shape[2]), window, cap).reshape(q.shape)

    def read_lengths(self, lengths, layer, q, window, cap):
        """Attention of q (B, K, H/K, hd) to the first lengths (B * K,) columns of each kv head."""
        k, v = (x[layer].view(-1, 1, q.shape[-1]) for x in (self.k, self.v))             # (slots * K * S, 1, hd)
        query, begin = (x[:len(lengths) + 1] for x in (self.query, self.begin))
        return flash(q.flatten(0, 1), k, v, query, begin, lengths, len(self.columns), window)

    def read_spans(self, parts, layer, q, window, cap):
        """Attention of q (B, K, H/K, hd) in parts [(slots, biases)], of which the first has all slots."""
        (slots, biases), *long = parts
        y = self.read(layer, slots, q, biases[window], cap)
        for slots, biases in long:
            y[slots] = self.read(layer, slots, q[slots], biases[window], cap)
        return y

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
    """What KVCache.extent() returns, so that few columns are read: all rows as far as the longest of those that are not
    long; then each long row by itself, after it was copied, which costs as much as reading it twice. spans: {slot:
    columns that its row needs}."""
    slots = sorted(spans, key=spans.get)
    longest, n = spans[slots[-1]], len(slots)
    cost, first = min((n * spans[slots[i - 1]] + 3 * (n - i) * longest, i) for i in range(1, n + 1))
    if cost > .9 * n * longest:         # hardly any gain
        return longest, []
    return spans[slots[first - 1]], [(slots[first:], longest)]


# -- torch's FlashAttention kernel ---------------------------------------------------------------------------------

def flash(q, k, v, query, begin, lengths, longest, window):
    """Attention of one query to as many keys as its row has: q (N, heads, hd) -> (N, heads, hd).

    k, v (cells, 1, hd): row i begins at cell begin[i] and has lengths[i] keys, of at most `longest`; its query is at
    query[i], which is i. begin (N + 1,), lengths (N,) and query (N + 1,) are int32. With a window, only the last keys
    of a row are read. If there is no window that hides a key, and more than one head, several parts of the GPU share a
    long row, which torch's kernels with a mask never do.
    """
    left = window - 1 if 0 < window < longest else None
    return torch.ops.aten._flash_attention_forward(
        q, k, v, query, begin, 1, longest, 0., False, False, window_size_left=left, seqused_k=lengths)[0]


@lru_cache
def flash_reads_lengths(device, dtype, heads, hd, windowed):
    """Whether flash() gives what masked attention gives, on this device. torch's interface for lengths is not a public
    one, so the kernel is tried: where a row is one block of keys, and where several parts of the GPU share it."""
    if device.type == "cpu" or dtype == torch.float32 or hd % 8 or hd > 256:
        return False
    window = 3 if windowed else 0
    try:
        return all(flash_agrees(device, dtype, heads, hd, window, longest) for longest in (64, 1024))
    except (AttributeError, RuntimeError, TypeError):   # torch has no such kernel, or none for this GPU
        return False


def flash_agrees(device, dtype, heads, hd, window, longest):
    """Whether flash() and masked attention agree on four rows with other keys behind them. The last key of the longest
    has most of the weight."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 5, longest * 2 // 3], device=device, dtype=torch.int32)
    query = torch.arange(5, device=device, dtype=torch.int32)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (
        (4, heads, hd), (4, longest, hd), (4, longest, hd)))
    k[3, longest * 2 // 3 - 1] = 10 * hd ** -.5 * q[3, 0]
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    cells = (x.view(-1, 1, hd) for x in (k, v))                                          # (4 * longest, 1, hd)
    y = flash(q, *cells, query, query * longest, lengths, longest, window)               # (4, heads, hd)
    ahead = torch.arange(longest, device=device) - lengths[:, None]                      # (4, longest)
    hidden = (ahead >= 0) | (ahead < -window) if window else ahead >= 0
    bias = torch.zeros(ahead.shape, device=device).masked_fill_(hidden, -torch.inf)
    return torch.allclose(y, attention_in_parts(q, k, v, bias[:, None], 0), atol=.05, rtol=.05)
