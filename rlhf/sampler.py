"""[kit] Sampling answers: a fixed number of slots, each of which writes one answer and then takes the next prompt.

A slot whose answer has ended is refilled from the prompts that wait; when none waits, the rows that go on move together
and the rest is dropped. n answers to a prompt share one prefill. Nothing in a step waits for the GPU; only every few
steps does the host look which rows have ended. On CUDA a step is captured as a graph once and replayed: launching its
thousand small kernels one by one would take longer than running them.

Every row draws from its own stream of random numbers, so but for rounding an answer does not depend on slots or on the
rows beside it. Pure temperature sampling: no top-k, no top-p, because learners compare log-probs with what was sampled
from.

Letters: B rows, T tokens, S cache length, V vocabulary, D width, H heads, K kv heads, hd head size, P prompts.
"""
import math
from collections import deque
from functools import partial

import torch
import torch.nn.functional as F

from data import InputError
from model import causal
from rlhf.logprobs import pack
from rlhf.update import micro_batches

LOOK = {"cpu": 2, "cuda": 8}            # steps between two looks at which rows have ended; a row wastes half of that
PREFILL = {"cpu": 512, "cuda": 4096}    # tokens of prompts in one pass
MOST = {"cpu": 128, "cuda": 512}        # slots beyond which a step gets slower as fast as it gets wider


def draw(logits, u, temperature):
    """Token ids (B,) from logits (B, V) by inverting the CDF at u (B,) in [0, 1); temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)                          # (B, V)
    at = u[:, None] * cdf[:, -1:]                       # a cumsum rounds: its last entry need not be 1
    return torch.searchsorted(cdf, at, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def columns(device, longest):
    """Columns of a cache for rows of up to `longest` tokens: rows overshoot a little before they are seen to have
    ended, and kernels want multiples of 128 on a GPU."""
    length = longest + 2 * LOOK[device.type]
    return length if device.type == "cpu" else length + -length % 128


def fitting(gpt, longest):
    """How many rows of up to `longest` tokens the device has room for now, beside a pass over prompts: their cache,
    their logits in fp32 three times."""
    if gpt.device.type == "cpu":
        return MOST["cpu"]
    c, bytes = gpt.config, gpt.head.itemsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * columns(gpt.device, longest) * bytes
    row += 16 * c.vocab_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free -= PREFILL["cuda"] * bytes * (6 * c.intermediate_size + 8 * c.hidden_size)
    return max(1, min(MOST["cuda"], int(.9 * free / row)))


@torch.inference_mode()
def sample(policy, prompts, stops, max_new_tokens, temperature=1., seed=0, n=1, slots=0, graph=True):
    """n answers to each prompt (a list of token ids), in order: [(prompt ids, response ids)], n rows a prompt.

    A response ends with the id in `stops` that ended it, or after max_new_tokens (one number, or one for each row)
    without one. slots 0: as many as fit. graph: on CUDA, replay a captured step.
    """
    limits = [max_new_tokens] * len(prompts) * n if isinstance(max_new_tokens, int) else max_new_tokens
    longest, c = max(len(prompts[row // n]) + limit for row, limit in enumerate(limits)), policy.gpt.config
    if c.learned_positions and longest > c.max_position_embeddings:
        raise InputError(f"a prompt and its answer may have {longest} tokens, and the model has learned "
                         f"{c.max_position_embeddings} positions: lower --max_new_tokens")
    slots = min(slots or fitting(policy.gpt, longest), len(limits))
    share = min(n, slots)                               # rows that share one prefill
    waiting = deque(sorted(((prompt, range(i * n + j, i * n + min(j + share, n)))
                            for i, prompt in enumerate(prompts) for j in range(0, n, share)),
                           key=lambda waits: len(waits[0])))
    engine = Engine(policy.gpt, slots, columns(policy.gpt.device, longest), stops, limits, temperature, seed, graph)
    with policy.gpt.settled(policy.role):
        while waiting or engine.busy():
            engine.fill(waiting)
            if not waiting:
                engine.compact()
            engine.advance()
    return [(prompts[row // n], response) for row, response in enumerate(engine.responses())]


class KVCache:
    """Keys and values of every layer, (slots, K, S, hd) each; a slot holds a row, filled up to the row's position."""

    def __init__(self, config, slots, length, device, dtype):
        shape = (slots, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.rows = torch.arange(slots * shape[1], device=device).view(slots, -1) * length               # (slots, K)
        self.columns = torch.arange(length, device=device)                                               # (S,)
        self.windows = set(config.windows)
        self.fused = self.k[0].is_cuda          # on CPUs two products are a third faster for so few queries

    def begin(self, slots, source):
        """Rows (P, T) begin here: row source[i] in slot slots[i], from column 0. One function for each layer."""
        def attend(keys, values, q, k, v, window):
            keys[slots, :, :k.shape[1]] = k.transpose(1, 2)[source]
            values[slots, :, :v.shape[1]] = v.transpose(1, 2)[source]
            return causal(q, k, v, window)
        return [partial(attend, keys, values) for keys, values in zip(self.k, self.v)]

    def go_on(self, pos, span):
        """One token more for the rows in the first B slots, at columns pos (B,) < span: only the first `span` columns
        are read. One function for each layer, of q (B, H, hd), k and v (B, K, hd)."""
        B, (_, K, _, hd) = len(pos), self.k[0].shape
        at = (self.rows[:B] + pos[:, None]).flatten()                                    # (B * K,)
        ahead = (self.columns[:span] - pos[:, None])[:, None, None]                      # (B, 1, 1, span)
        biases = {window: torch.zeros(ahead.shape, device=pos.device, dtype=self.k[0].dtype).masked_fill_(
            (ahead > 0) | (ahead <= -window) if window else ahead > 0, -torch.inf) for window in self.windows}

        def attend(keys, values, q, k, v, window):
            keys.view(-1, hd).index_copy_(0, at, k.reshape(-1, hd))
            values.view(-1, hd).index_copy_(0, at, v.reshape(-1, hd))
            # query heads of one kv head become query rows: the cache is read once and never repeated
            folded = q.reshape(B, K, -1, hd)                                             # (B, K, H/K, hd)
            k, v, bias = keys[:B, :, :span], values[:B, :, :span], biases[window]        # (B, K, span, hd)
            if self.fused:
                y = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias.expand(-1, -1, folded.shape[2], -1))
            else:
                y = (folded @ k.mT).mul_(hd ** -.5).add_(bias).softmax(-1) @ v
            return y.reshape(q.shape)
        return [partial(attend, keys, values) for keys, values in zip(self.k, self.v)]

    def move(self, source, slots):
        """Copy the rows of some slots into others."""
        for x in (*self.k, *self.v):
            x[slots] = x[source]


class Engine:
    """Slots, and what the rows in them have written so far.

    What a step reads and writes stays at fixed addresses, as a graph needs it. Per slot: the `token` to read next, its
    column `pos` in the cache, the `row` of `written` to write to and the place `at` there. Slots that are idle write
    into one more row, which nobody reads.
    """

    def __init__(self, gpt, slots, length, stops, limits, temperature, seed, graph):
        self.gpt, self.limits, self.temperature = gpt, limits, temperature
        device, N = gpt.device, len(limits)
        self.look = look = LOOK[device.type]
        self.graphs, self.pool = {} if graph and gpt.head.is_cuda else None, None
        self.cache = KVCache(gpt.config, slots, length, device, gpt.head.dtype)
        self.stops = torch.tensor(stops, device=device)
        self.u = torch.zeros(N + 1, max(limits) + 2 * look)                              # (N + 1, tokens)
        self.u[:N, :max(limits)] = torch.rand(N, max(limits), generator=torch.Generator().manual_seed(seed))
        self.u = self.u.to(device)
        self.written = torch.zeros(self.u.shape, dtype=torch.long, device=device)        # (N + 1, tokens)
        self.token, self.pos, self.row, self.at = (torch.full((slots,), x, device=device) for x in (0, 0, N, 0))
        self.sum = torch.zeros((), device=device)
        self.nowhere, self.back = torch.zeros(0, dtype=torch.long, device=device), torch.arange(-look, 0, device=device)
        self.rows = [None] * slots                      # the row in each slot that is in use; None: idle
        self.free = list(range(slots))                  # idle slots, the one that has waited longest first
        self.start, self.age = [0] * slots, [0] * slots                                  # tokens of prompt, and written
        self.ends = [None] * N

    def busy(self):
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def fill(self, waiting):
        """Begin what waits, once there is room for enough: a pass over few prompts takes as long as one over many."""
        if waiting and not (self.busy() and len(self.free) < max(len(waiting[0][1]), len(self.rows) // 8)):
            self.begin(waiting)

    def begin(self, waiting):
        """Put waiting prompts into idle slots: all but their last token is read here, that one by the next step."""
        prompts, taken = [], []
        while waiting and len(waiting[0][1]) <= len(self.free):
            prompt, rows = waiting.popleft()
            for row in rows:
                slot = self.free.pop(0)
                self.rows[slot], self.start[slot], self.age[slot] = row, len(prompt), 0
                taken.append((slot, row, len(prompts)))
            prompts.append(prompt)
        device = self.gpt.device
        for micro in micro_batches(range(len(prompts)), [len(prompt) for prompt in prompts], PREFILL[device.type]):
            ids, _ = pack([(prompts[i], []) for i in micro], device)                     # (P, longest)
            place = {i: p for p, i in enumerate(micro)}
            slots, rows, source = torch.tensor([(slot, row, place[i]) for slot, row, i in taken if i in place],
                                               device=device).unbind(1)                  # (rows,) each
            if ids.shape[1] > 1:                        # the cache is all that is wanted of a prompt
                self.gpt.hidden(ids[:, :-1], None, self.cache.begin(slots, source), where=self.nowhere)
            last = torch.tensor([len(prompts[i]) - 1 for i in micro], device=device)     # (P,)
            self.token[slots] = ids.gather(1, last[:, None])[source, 0]
            self.pos[slots], self.row[slots], self.at[slots] = last[source], rows, 0

    def step(self, width, span):
        """One token for each of the first `width` slots; `span` columns of the cache are read."""
        token, pos, row, at = (x[:width] for x in (self.token, self.pos, self.row, self.at))
        h = self.gpt.hidden(token, pos, self.cache.go_on(pos, span))                     # (B, D)
        self.sum += h.sum(dtype=torch.float32)          # neither NaN nor infinity ever leaves a sum
        token.copy_(self.choose(F.linear(h, self.gpt.head), row, at))
        self.written[row, at] = token
        pos += 1
        at += 1

    def choose(self, logits, row, at):
        """What rows (B,) write at their places `at` (B,): token ids (B,) from logits (B, V)."""
        return draw(logits, self.u[row, at], self.temperature)

    def replay(self, width, span):
        """step() as a graph, captured when it is first needed for these sizes."""
        if (width, span) in self.graphs:
            return self.graphs[width, span].replay()
        self.step(width, span)                          # for real: it also warms up what capturing must not meet cold
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(width, span)
        self.graphs[width, span], self.pool = graph, graph.pool()

    def advance(self):
        """A few steps, then a look at which rows have ended: the only place that waits for the GPU."""
        busy, width = self.busy(), len(self.rows)
        steps = min(self.look, max(self.limits[self.rows[slot]] - self.age[slot] for slot in busy))
        span = max(self.start[slot] + self.age[slot] for slot in busy) + steps - 1
        if self.token.is_cuda:
            span += -span % 128                         # few graphs, and columns aligned as the kernel wants them
        for _ in range(steps):
            self.step(width, span) if self.graphs is None else self.replay(width, span)

        row, at = self.row[:width, None], self.at[:width, None]
        recent = self.written[row, at + self.back[-steps:]]                              # (B, steps)
        hit = (recent[..., None] == self.stops).any(-1)                                  # (B, steps)
        first = torch.where(hit.any(1), hit.int().argmax(1), steps)                      # (B,)
        *first, total = torch.cat((first, self.sum[None])).tolist()
        if not math.isfinite(total):
            raise FloatingPointError("the model's hidden states are not finite: its weights are broken, or fp16 "
                                     "overflowed")
        ended = []
        for slot in busy:
            row, self.age[slot] = self.rows[slot], self.age[slot] + steps
            end = self.age[slot] - steps + int(first[slot]) + 1
            if first[slot] < steps or end > self.limits[row]:
                self.ends[row] = min(end, self.limits[row])
                ended.append(slot)
        if ended:
            self.release(ended)
        if self.free:                                   # they go on writing where nobody reads, but not beyond the end
            self.pos[self.free] = self.at[self.free] = 0

    def release(self, slots):
        """These slots are idle now."""
        for slot in slots:
            self.rows[slot] = None
        self.free += slots
        self.row[slots] = len(self.limits)

    def compact(self):
        """Move the rows that go on into the first slots, and let the others go."""
        busy = self.busy()
        width = len(busy) if self.graphs is None else 1 << (len(busy) - 1).bit_length()  # few graphs: powers of two
        if width > .875 * len(self.rows):
            return
        source = [slot for slot in busy if slot >= width]
        holes = [slot for slot in range(width) if self.rows[slot] is None][:len(source)]
        if source:
            self.cache.move(source, holes)
            for x in (self.token, self.pos, self.row, self.at):
                x[holes] = x[source]
        for x in (self.rows, self.start, self.age):
            for slot, hole in zip(source, holes):
                x[hole] = x[slot]
            del x[width:]
        self.free = [slot for slot in range(width) if self.rows[slot] is None]

    def responses(self):
        return [row[:end].tolist() for row, end in zip(self.written.cpu(), self.ends)]
