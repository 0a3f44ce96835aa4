"""[kit] Sampling answers: a fixed number of slots, each of which writes one answer and then takes the next prompt.

When an answer ends, its slot is refilled from the waiting prompts. When no prompt waits, the unfinished answers are
moved into the first slots, and the empty slots are given up. n answers to one prompt share one pass over the prompt
(prefill). No step waits for the GPU; the host checks every few steps which answers have ended. On CUDA a step is a
graph (graphs.py).

Every answer has its own stream of random numbers, so that up to rounding it does not depend on the slots or on the
answers beside it. Learners need the log-probs of exactly the distribution that was sampled from, so what they learn
from is sampled with a temperature alone. Answers that are judged may also have a top-p, and those of serve.py a top-k
and a min-p.

Letters: B rows, T tokens, V vocabulary, D width, P prompts, N answers.
"""
import math
from collections import deque
from functools import partial
from itertools import groupby

import torch

from data import InputError
from data.progress import Progress
from rlhf.graphs import Graphs, kept_engine
from rlhf.kv_cache import KVCache
from rlhf.logprobs import pack
from rlhf.saves import Answers, parts
from rlhf.update import micro_batches

CHECK_EVERY = {"cpu": 2, "cuda": 8}             # steps between two checks; a finished answer runs on for half of them
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}     # tokens of prompts in one pass
CANDIDATES = 1024                               # likeliest tokens that are ranked, where these are enough
ALL = 1., 0, 0.                                 # top-p, top-k and min-p with which all tokens may be drawn
LEAST_WIDTH = 8                                 # of a captured step; one for a single row takes as long
MAX_SLOTS = {"cpu": 128, "cuda": 512}           # with more slots, a step only takes longer in proportion


def generate(model, prompts, text, cfg, seed, n=1, judged=False, logps=False, kept=""):
    """sample() with the settings of a run. judged: whether the answers are to be judged, and not to be learned from.
    kept: a name under which finished answers are kept on disk as they come, in a sampling that may take long."""
    temperature, top_p = (cfg.eval_temperature, cfg.eval_top_p) if judged else (cfg.temperature, 1.)
    longest, progress = longest_answer(text, cfg), Progress("sampling", n * len(prompts))
    settings = text.stops, longest, temperature, seed, n, cfg.slots, cfg.graph, progress, top_p
    if not kept:
        return sample(model, prompts, *settings, logps=logps)
    done = Answers(cfg.saves, kept, [prompts, sorted(text.stops), longest, temperature, seed, n, top_p])
    progress.before = len(done)
    with done.finishing():
        for left in parts(model.gpt, prompts, longest, n, cfg.slots or MAX_SLOTS["cpu"], done):
            sample(model, prompts, *settings, only=left, done=done)
    return done.rows(prompts, n, logps)


def not_finite(gpt):
    """What is to be said of hidden states that are not finite."""
    fp16 = ", or fp16 overflowed: try --dtype float32" * (gpt.head.dtype == torch.float16)
    return f"the model's hidden states are not finite: its weights are broken{fp16}"


def longest_answer(text, cfg):
    """The most tokens of an answer, with the thought before it if the template expects one."""
    return cfg.max_new_tokens + cfg.max_thought_tokens if text.thinks else cfg.max_new_tokens


@torch.inference_mode()
def sample(policy, prompts, stops, max_new_tokens, temperature=1., seed=0, n=1, slots=0, graph=True, progress=None,
           top_p=1., top_k=0, min_p=0., logps=False, only=None, done=None):
    """n answers to each prompt: rows [(prompt ids, response ids)], n for each prompt, in order.

    A response ends with the id in `stops` that ended it, or has max_new_tokens (one number, or a list with one for each
    row) and no such id. temperature 0 is greedy. slots: 0 for as many as fit into memory. graph: on CUDA, replay a
    captured step. top_p, top_k, min_p: see likely(). InputError if the model has too few positions.

    logps: return (rows, log-probs) with a tensor (tokens,) for each row, computed at this temperature; None instead if
    training would compute others: in 16 bits, where they differ by more than rounding, or if not all tokens could be
    drawn.

    only: the indices of the rows that are sampled (default: all); up to rounding they are the same as if all were
    sampled. done: the Answers that get them.
    """
    limits = [max_new_tokens] * len(prompts) * n if isinstance(max_new_tokens, int) else max_new_tokens
    only = range(len(limits)) if only is None else only
    before = len(done or ())
    longest, c = max(len(prompts[row // n]) + limit for row, limit in enumerate(limits)), policy.gpt.config
    if c.limited and longest > c.max_position_embeddings:
        raise InputError(f"a prompt and its answer may have {longest} tokens, and the model has "
                         f"{c.max_position_embeddings} positions: lower --max_new_tokens")
    N, longest_limit = len(only), max(limits)
    u = torch.rand(len(limits), longest_limit, generator=torch.Generator().manual_seed(seed))[list(only)]
    with policy.gpt.fused(policy.role):
        narrow = top_p, top_k, min_p
        slots = min(slots or slots_that_fit(policy.gpt, longest, narrow), N)
        fixed = (slots, cache_length(policy.gpt.device, longest), tuple(stops), N, longest_limit, temperature, graph,
                 narrow)
        waiting = shared_prompts(prompts, only, n, slots)
        with kept_engine(policy, Engine, fixed) as engine:
            engine.begin([limits[row] for row in only], u)
            while waiting or engine.busy():
                engine.refill(waiting)
                if not waiting:
                    engine.compact()
                engine.advance()
                if progress:
                    progress.update(before + engine.finished)
                if done is not None and done.saves.due():
                    done.add({} if policy.gpt.device.type == "cpu" else engine.ended(only))     # see saves.parts()
            if progress:
                progress.close()
            if done is not None:
                done.add(engine.ended(only))
            rows = [(prompts[row // n], response) for row, response in zip(only, engine.responses())]
            return (rows, engine.logps()) if logps else rows


def shared_prompts(prompts, rows, n, slots):
    """A queue of (prompt, its places in `rows`), short prompts first. Row i is an answer to prompt i // n; the rows of
    a prompt stay together as far as slots go."""
    share, queue = min(n, slots), []
    for i, places in groupby(range(len(rows)), key=lambda place: rows[place] // n):
        places = list(places)
        queue += [(prompts[i], places[j:j + share]) for j in range(0, len(places), share)]
    return deque(sorted(queue, key=lambda item: len(item[0])))


def draw(probs, u):
    """Token ids (B,) from probs (B, V), by inverting their CDF at u (B,) in [0, 1)."""
    cdf = probs.cumsum(-1)                                                               # (B, V)
    at = u[:, None] * cdf[:, -1:]                       # the last entry of a cumsum is 1 only up to rounding
    return torch.searchsorted(cdf, at, right=True)[:, 0].clamp(max=probs.shape[1] - 1)


def likely(logits, top_p, top_k, min_p):
    """Logits (B, V), already divided by the temperature, with -inf for the tokens that are too unlikely to be drawn.

    top_k, top_p and min_p are numbers for all rows, or (B, 1). top_k: only so many tokens stay (0: all). top_p: of
    these, only the likeliest stay, as few as together have this share of their probability (1: all; Holtzman et al.
    2019, 3.1). min_p: only tokens with at least this share of the likeliest token's probability stay (0: all; Nguyen
    et al. 2024). The likeliest token always stays.
    """
    probs = logits.softmax(-1)                                                           # (B, V)
    ranked, ids = rank(probs, top_p, top_k)                                              # (B, C), sorted
    place, every = torch.arange(ranked.shape[1], device=logits.device), (top_p >= 1) & (top_k == 0)
    of_k = ranked.masked_fill((top_k > 0) & (place >= top_k), 0)
    whole = of_k.sum(-1, keepdim=True) * (top_k > 0) + (top_k == 0)                      # (B, 1): 1 without top_k
    stays = (of_k > 0) & ((of_k.cumsum(-1) - of_k < top_p * whole) | (top_p >= 1)) | (place == 0)
    stays = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, stays) | every
    return logits.masked_fill(~stays | (probs < min_p * ranked[:, :1]), -torch.inf)


def rank(probs, top_p, top_k):
    """The largest of probs (B, V) and their ids, sorted, (B, C) each: as many as top_p and top_k may want.

    On a CPU, sorting 50,000 numbers takes as long as a step of a small model, and the CANDIDATES likeliest are found in
    a tenth of that. On a GPU sorting is quick, and a check whether they are enough would make the host wait.
    """
    if not probs.is_cuda:
        ranked, ids = probs.topk(min(CANDIDATES, probs.shape[1]))
        enough = (top_k > 0) & (top_k <= CANDIDATES) | (top_k == 0) & (ranked.sum(-1, keepdim=True) >= top_p)
        if (enough | (top_p >= 1) & (top_k == 0)).all():
            return ranked, ids
    return probs.sort(-1, descending=True)


# -- memory --------------------------------------------------------------------------------------------------------

def cache_length(device, longest):
    """Columns of a cache for rows of up to `longest` tokens. A finished row runs on until the next check, and CUDA
    kernels want multiples of 128."""
    length = longest + 2 * CHECK_EVERY[device.type]
    return length if device.type == "cpu" else length + -length % 128


def logits_bytes(gpt, narrow):
    """Bytes for the logits of a row, and for what choose() makes of them; more if they have to be sorted."""
    return (16 if narrow == ALL else 48) * gpt.config.vocab_size


def slots_that_fit(gpt, longest, narrow):
    """How many rows of up to `longest` tokens the device has memory for: each takes its cache and its logits, beside
    one pass over prompts. narrow: (top_p, top_k, min_p); None if each row has its own."""
    if gpt.device.type == "cpu":
        return MAX_SLOTS["cpu"]
    c, bytes = gpt.config, gpt.head.itemsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * cache_length(gpt.device, longest) * bytes
    row += logits_bytes(gpt, narrow)
    torch.cuda.empty_cache()            # what torch then still reserves is in use, or belongs to a graph
    free = torch.cuda.mem_get_info()[0]
    free -= PREFILL_TOKENS["cuda"] * bytes * (6 * c.intermediate_size + 8 * c.hidden_size)
    return max(1, min(MAX_SLOTS["cuda"], int(.9 * free / row)))


# -- the engine ----------------------------------------------------------------------------------------------------

class Engine:
    """The slots, and what has been written of every row. A row is one answer, of N, and has up to `longest` tokens; a
    slot holds a row while it is written, in `length` columns of the cache. begin() is called before anything else.

    What a step reads and writes are tensors at fixed addresses, as a CUDA graph needs them. For each slot: the `token`
    to read next, its column `pos` in the cache, its `row` in `written` and the place `at` in that row. Idle slots write
    to row N, which nobody reads. narrow: (top_p, top_k, min_p), as in likely().
    """

    def __init__(self, gpt, slots, length, stops, N, longest, temperature, graph, narrow=ALL):
        self.gpt, self.slots, self.N, self.temperature, self.narrow = gpt, slots, N, temperature, narrow
        self.row_logits = logits_bytes(gpt, narrow)
        device, self.check_every = gpt.device, CHECK_EVERY[gpt.device.type]
        self.graphs, self.variant = Graphs() if graph and device.type != "cpu" else None, ()
        self.weights = None                             # of the fused layers, as the graphs read them
        self.cache = KVCache(gpt.config, slots, length, device, gpt.head.dtype)
        self.stops = set(stops)
        self.u = torch.zeros(N + 1, longest + 2 * self.check_every, device=device)       # (N + 1, tokens)
        self.written = torch.zeros(self.u.shape, dtype=torch.long, device=device)        # (N + 1, tokens)
        self.p = torch.ones(self.u.shape, device=device)                                 # their probabilities
        self.token, self.pos, self.row, self.at = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(4))
        self.checksum = torch.zeros((), device=device)          # of hidden states: NaN and infinity stay in a sum
        self.recent = torch.arange(-self.check_every, 0, device=device)

    def begin(self, limits, u):
        """Forget all rows, and get ready for N new ones of up to limits[i] tokens. u (N, tokens): their random numbers.
        """
        self.u[:self.N, :u.shape[1]] = u.to(self.u.device)
        for x in (self.token, self.pos, self.at, self.checksum):
            x.zero_()
        self.row.fill_(self.N)
        self.limits = limits
        self.row_in = [None] * self.slots               # the row in each slot; None: the slot is idle
        self.free = list(range(self.slots))             # idle slots, the one that has been idle longest first
        self.prompt_tokens, self.new_tokens = [0] * self.slots, [0] * self.slots         # of the row in each slot
        self.lengths = [None] * self.N                  # tokens of each finished response
        self.finished = 0                               # how many are

    def busy(self):
        return [slot for slot, row in enumerate(self.row_in) if row is not None]

    def refill(self, waiting):
        """Start waiting prompts once enough slots are idle: a pass over few prompts takes as long as one over many."""
        if not waiting:
            return
        enough = max(len(waiting[0][1]), len(self.row_in) // 8)
        if len(self.free) >= enough or not self.busy():
            self.prefill(waiting)

    def prefill(self, waiting):
        """Put waiting prompts into idle slots. The keys and values of all their tokens but the last go into the cache;
        the next step reads the last token."""
        prompts, placed = [], []                        # placed: (slot, row, index in prompts)
        while waiting and len(waiting[0][1]) <= len(self.free):
            prompt, rows = waiting.popleft()
            for row in rows:
                slot = self.free.pop(0)
                self.row_in[slot], self.prompt_tokens[slot], self.new_tokens[slot] = row, len(prompt), 0
                placed.append((slot, row, len(prompts)))
            prompts.append(prompt)
        device, sizes = self.gpt.device, [len(prompt) for prompt in prompts]
        nowhere = torch.zeros(0, dtype=torch.long, device=device)           # no hidden state is wanted, only the cache
        for micro in micro_batches(range(len(prompts)), sizes, PREFILL_TOKENS[device.type]):
            ids, _ = pack([(prompts[i], []) for i in micro], device)                     # (P, T)
            index = {i: p for p, i in enumerate(micro)}         # place of each prompt in this pass
            here = [(slot, row, index[i]) for slot, row, i in placed if i in index]
            slots, rows, source = torch.tensor(here, device=device).unbind(1)            # (rows,) each
            if ids.shape[1] > 1:
                self.gpt.hidden(ids[:, :-1], None, self.cache.prefill(slots, source), where=nowhere)
            last = torch.tensor([sizes[i] - 1 for i in micro], device=device)            # (P,)
            self.token[slots] = ids.gather(1, last[:, None])[source, 0]
            self.pos[slots], self.row[slots], self.at[slots] = last[source], rows, 0

    def step(self, width, span, long=()):
        """Write one token in each of the first `width` slots, reading `span` columns of the cache; long: see decode().
        """
        token, pos, row, at = (x[:width] for x in (self.token, self.pos, self.row, self.at))
        h = self.gpt.hidden(token, pos, self.cache.decode(pos, span, long))              # (B, D)
        self.checksum += h.sum(dtype=torch.float32)
        token.copy_(self.choose(self.gpt.logits(h), row, at))
        self.written[row, at] = token
        pos += 1
        at += 1

    def choose(self, logits, row, at):
        """The next token ids (B,) of rows (B,) at their places `at` (B,), from logits (B, V)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        tempered = logits / self.temperature
        probs = (tempered if self.narrow == ALL else likely(tempered, *self.narrow)).softmax(-1)         # (B, V)
        token = draw(probs, self.u[row, at])
        self.p[row, at] = probs.gather(1, token[:, None])[:, 0]
        return token

    def advance(self):
        """Take a few steps, then check which answers have ended. Nothing else waits for the GPU."""
        busy, width = self.busy(), len(self.row_in)
        most = max(self.limits[self.row_in[slot]] - self.new_tokens[slot] for slot in busy)
        steps = min(self.check_every, most)
        needed = {slot: self.prompt_tokens[slot] + self.new_tokens[slot] + steps - 1 for slot in busy}
        span, long = self.cache.extent(needed)
        for _ in range(steps):
            if self.graphs is None:
                self.step(width, span, long)
            else:                                       # on CUDA no row is read by itself
                self.graphs.run((width, span, *self.variant), partial(self.step, width, span))

        ended = []
        for slot, first in zip(busy, self.first_stops(steps, width, busy)):
            row, before = self.row_in[slot], self.new_tokens[slot]
            self.new_tokens[slot] += steps
            if first < steps or before + first + 1 > self.limits[row]:      # a stop token, or the limit
                self.lengths[row] = min(before + first + 1, self.limits[row])
                ended.append(slot)
        if ended:
            self.release(ended)
        if self.free:                                   # idle slots go on writing: keep them within their tensors
            self.pos[self.free] = self.at[self.free] = 0

    def first_stops(self, steps, width, slots):
        """Which of the last `steps` steps wrote the first stop token in each of these slots: 0 for the first step,
        `steps` if none did. FloatingPointError if a hidden state was not finite."""
        row, at = self.row[:width, None], self.at[:width, None]
        tokens = self.written[row, at + self.recent[-steps:]]       # (B, steps); steps 2 read places at - 2 and at - 1
        *tokens, checksum = torch.cat((tokens.flatten(), self.checksum[None])).tolist()  # one wait for both
        if not math.isfinite(checksum):
            raise FloatingPointError(not_finite(self.gpt))
        rows = (tokens[slot * steps:(slot + 1) * steps] for slot in slots)
        return [next((i for i, token in enumerate(row) if token in self.stops), steps) for row in rows]

    def release(self, slots):
        """Make these slots idle."""
        for slot in slots:
            self.row_in[slot] = None
        self.free += slots
        self.finished += len(slots)
        self.row[slots] = self.N

    def compact(self):
        """Move the rows that are still written into the first slots, and drop the other slots."""
        busy = self.busy()
        width = len(busy)
        if self.graphs is not None:
            width = self.graph_width(width)
        if width > .875 * len(self.row_in):
            return
        source = [slot for slot in busy if slot >= width]
        holes = [slot for slot in range(width) if self.row_in[slot] is None][:len(source)]
        if source:
            self.cache.move(source, holes)
            for x in (self.token, self.pos, self.row, self.at):
                x[holes] = x[source]
        for x in (self.row_in, self.prompt_tokens, self.new_tokens):
            for slot, hole in zip(source, holes):
                x[hole] = x[slot]
            del x[width:]
        self.free = [slot for slot in range(width) if self.row_in[slot] is None]

    def graph_width(self, n):
        """How many slots a captured step has for n rows: a power of two, from LEAST_WIDTH on, so that there are few
        graphs."""
        return min(self.slots, max(LEAST_WIDTH, 1 << (n - 1).bit_length()))

    def responses(self):
        return [row[:length].tolist() for row, length in zip(self.written.cpu(), self.lengths)]

    def logps(self):
        """The log-probs of each response, or None: see sample()."""
        if self.temperature == 0 or self.narrow != ALL or self.gpt.head.dtype != torch.float32:
            return None
        return [row[:length].log() for row, length in zip(self.p, self.lengths)]

    def ended(self, rows):
        """{row: [its response, a list of its log-probs or None]} of those that have ended. rows: what the N rows are
        called."""
        written, logps = self.written.cpu(), self.logps() or [None] * len(self.lengths)
        return {row: [ids[:length].tolist(), logp if logp is None else logp.tolist()]
                for row, ids, length, logp in zip(rows, written, self.lengths, logps) if length is not None}
