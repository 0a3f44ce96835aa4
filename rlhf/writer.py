"""[kit] Answers for the clients of a server, written in one batch: an engine that keeps running, and its thread."""
import threading
from collections import deque
from itertools import groupby

import torch

from rlhf.sampler import Engine, cache_length, draw

GREEDY_BELOW = 1e-5                     # temperatures below this are greedy


class ServingEngine(Engine):
    """An engine that runs for as long as the server. Answers join and leave it one by one, each with its own
    temperature, random numbers and limit, and log-probs are computed while somebody wants them.

    There are as many rows as slots, and a row is reused: `free_rows` are those that no answer has.
    """

    def __init__(self, gpt, slots, context, stops, best=20, graph=True):
        super().__init__(gpt, slots, cache_length(gpt.device, context), stops, [context] * slots, 1., 0, graph)
        self.slots, self.best = slots, min(best, gpt.config.vocab_size)
        self.temperatures = torch.zeros(slots + 1, 1, device=gpt.device)
        self.logp = torch.zeros(self.u.shape, device=gpt.device)                         # (slots + 1, tokens)
        self.top_logp = torch.zeros(*self.u.shape, self.best, device=gpt.device)         # (slots + 1, tokens, best)
        self.top = torch.zeros(self.top_logp.shape, dtype=torch.long, device=gpt.device)
        self.want_logprobs = False
        self.captured = {wanted: None if self.graphs is None else {} for wanted in (False, True)}
        self.reset()

    def reset(self):
        """Drop all answers."""
        self.row_in, self.prompt_tokens, self.new_tokens = [None] * self.slots, [0] * self.slots, [0] * self.slots
        self.free, self.free_rows = list(range(self.slots)), list(range(self.slots))
        self.row.fill_(self.slots)
        for x in (self.pos, self.at, self.checksum):
            x.zero_()

    def join(self, prompt, uniforms, temperature):
        """Reserve rows for the answers to a prompt, one for each of the uniforms (n, limit): (prompt, rows), as
        prefill() takes them."""
        rows = [self.free_rows.pop() for _ in uniforms]
        for row, u in zip(rows, uniforms):
            self.limits[row], self.lengths[row], self.temperatures[row] = len(u), None, temperature
            self.u[row, :len(u)] = u.to(self.u.device)
        return prompt, rows

    def leave(self, row):
        """Give back the row of an answer, which may not have ended yet."""
        if row in self.row_in:
            self.release([self.row_in.index(row)])
        self.free_rows.append(row)

    def prefill(self, waiting):
        """Engine.prefill(), with as many more of the slots that compact() dropped as are needed."""
        width = len(self.row_in)
        wanted = width - len(self.free) + sum(len(rows) for _, rows in waiting)
        if self.graphs is not None:
            wanted = min(self.slots, 1 << (wanted - 1).bit_length())                     # powers of two: few graphs
        if wanted > width:
            self.row[width:] = self.slots               # these slots are idle, whatever they held before
            self.pos[width:] = self.at[width:] = 0
            for x, nothing in ((self.row_in, None), (self.prompt_tokens, 0), (self.new_tokens, 0)):
                x += [nothing] * (wanted - width)
            self.free += range(width, wanted)
        super().prefill(waiting)

    def advance(self, want_logprobs):
        self.want_logprobs, self.graphs = want_logprobs, self.captured[want_logprobs]
        super().advance()

    def choose(self, logits, row, at):
        temperature = self.temperatures[row]                                            # (B, 1)
        drawn = draw(logits / temperature.clamp(min=GREEDY_BELOW), self.u[row, at], 1.)
        token = torch.where(temperature[:, 0] < GREEDY_BELOW, logits.argmax(-1), drawn)  # (B,)
        if self.want_logprobs:
            logp = logits.log_softmax(-1)
            self.logp[row, at] = logp.gather(1, token[:, None])[:, 0]
            self.top_logp[row, at], self.top[row, at] = logp.topk(self.best)             # (B, best)
        return token

    def read(self, row, begin, logprobs):
        """What was written to a row from place `begin` on: (ids, [(log-prob, likeliest ids, their log-probs)] of each
        if logprobs, whether the answer has ended)."""
        ended = self.lengths[row] is not None
        end = self.lengths[row] if ended else self.new_tokens[self.row_in.index(row)]
        kept = (self.logp, self.top, self.top_logp) if logprobs else ()
        ids = self.written[row, begin:end].tolist()
        return ids, list(zip(*(x[row, begin:end].tolist() for x in kept))), ended


class Writer(threading.Thread):
    """The thread that runs a ServingEngine, and the queue of answers that wait for a row.

    A request has a prompt, its `answers`, uniforms `u` (n, limit) for them, a temperature, `logprobs` (whether they are
    wanted) and `live` (whether tokens are reported as they come, or only at the end). Its queue `events` gets tuples
    (answer, *read()), or the exception that ended it; `farewell` is the exception for requests that are open when the
    server closes. An answer has its `request`, its `index` in it, and `told`, the number of tokens that were reported.
    Whoever no longer wants an answer sets its `dropped`.
    """

    def __init__(self, engine, farewell, most=1024):
        super().__init__(daemon=True)
        self.engine, self.farewell, self.most, self.gate = engine, farewell, most, threading.Condition()
        self.waiting, self.answers, self.closing = deque(), {}, False       # answers: {row: answer} being written

    def submit(self, request):
        """Queue a request. False if the queue is full or the server is closing."""
        with self.gate:
            if self.closing or len(self.waiting) >= self.most:
                return False
            self.waiting += request.answers
            self.gate.notify()
            return True

    def close(self):
        with self.gate:
            self.closing = True
            self.gate.notify()
        self.join()

    def next(self):
        """The answers to start now, perhaps none; None when the server closes. Waits while there is nothing to do."""
        with self.gate:
            self.gate.wait_for(lambda: self.waiting or self.answers or self.closing)
            if self.closing:
                return None
            taken = [self.waiting.popleft() for _ in range(min(len(self.waiting), len(self.engine.free_rows)))]
        return [answer for answer in taken if not answer.dropped]

    @torch.inference_mode()
    def run(self):
        broken = False
        while (new := self.next()) is not None:
            try:
                if broken:
                    self.engine.reset()
                    broken = False
                self.write(new)
            except Exception as error:                  # these answers are lost; later ones may still succeed
                broken = True
                self.fail([*new, *self.answers.values()], error)
                self.answers.clear()
        self.fail([*self.waiting, *self.answers.values()], self.farewell)

    def fail(self, answers, error):
        for request in {id(answer.request): answer.request for answer in answers}.values():
            request.events.put(error)

    def write(self, new):
        """Start new answers, write a few tokens of all answers, and report them."""
        engine, prompts = self.engine, deque()
        for _, group in groupby(new, key=lambda answer: id(answer.request)):            # they share a prefill
            group = list(group)
            request = group[0].request
            u = request.u[[answer.index for answer in group]]
            prompts.append(engine.join(request.prompt, u, request.temperature))
            self.answers |= zip(prompts[-1][1], group)
        if prompts:
            engine.prefill(prompts)
        if self.answers:
            engine.compact()
            engine.advance(any(answer.request.logprobs for answer in self.answers.values()))
        for row, answer in list(self.answers.items()):
            ended = engine.lengths[row] is not None
            if not answer.dropped and (ended or answer.request.live):
                news = engine.read(row, answer.told, answer.request.logprobs)
                answer.told += len(news[0])
                answer.request.events.put((answer, *news))
            if ended or answer.dropped:
                engine.leave(row)
                del self.answers[row]
