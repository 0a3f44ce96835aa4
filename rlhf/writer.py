"""[kit] Writing answers for whoever asks, all together: an engine that never ends, and the thread in which it works."""
import threading
from collections import deque
from itertools import groupby

import torch

from rlhf.sampler import Engine, columns, draw

COLD = 1e-5                             # a temperature below is greedy


class Standing(Engine):
    """An engine that never ends: answers join it and leave it, each with its own temperature, random numbers and limit,
    and the log-probs of what is written are kept while somebody wants them.

    A row is a place for one answer; `places` are those that nobody has.
    """

    def __init__(self, gpt, slots, context, stops, best=20, graph=True):
        super().__init__(gpt, slots, columns(gpt.device, context), stops, [context] * slots, 1., 0, graph)
        self.slots, self.best = slots, min(best, gpt.config.vocab_size)
        self.temperatures = torch.zeros(slots + 1, 1, device=gpt.device)
        self.logp = torch.zeros(self.u.shape, device=gpt.device)                         # (slots + 1, tokens)
        self.top_logp = torch.zeros(*self.u.shape, self.best, device=gpt.device)         # (slots + 1, tokens, best)
        self.top = torch.zeros(self.top_logp.shape, dtype=torch.long, device=gpt.device)
        self.explained = False                          # whether log-probs are kept
        self.captured = {explained: None if self.graphs is None else {} for explained in (False, True)}
        self.reset()

    def reset(self):
        """Everybody out, whatever has happened."""
        self.rows, self.start, self.age = [None] * self.slots, [0] * self.slots, [0] * self.slots
        self.free, self.places = list(range(self.slots)), list(range(self.slots))
        self.row.fill_(self.slots)
        for x in (self.pos, self.at, self.sum):
            x.zero_()

    def join(self, prompt, uniforms, temperature):
        """Rows that answer a prompt, one for each of the uniforms (n, limit): (prompt, rows), as begin() takes them."""
        rows = [self.places.pop() for _ in uniforms]
        for row, u in zip(rows, uniforms):
            self.limits[row], self.ends[row], self.temperatures[row] = len(u), None, temperature
            self.u[row, :len(u)] = u.to(self.u.device)
        return prompt, rows

    def leave(self, row):
        """The answer in this row is done with, whether it has ended or not."""
        if row in self.rows:
            self.release([self.rows.index(row)])
        self.places.append(row)

    def begin(self, waiting):
        """As many slots more as are needed, of those that compact() let go."""
        width = len(self.rows)
        wide = width - len(self.free) + sum(len(rows) for _, rows in waiting)
        if self.graphs is not None:
            wide = min(self.slots, 1 << (wide - 1).bit_length())                         # few graphs: powers of two
        if wide > width:
            self.row[width:] = self.slots               # some row was there before
            self.pos[width:] = self.at[width:] = 0
            for x, nothing in ((self.rows, None), (self.start, 0), (self.age, 0)):
                x += [nothing] * (wide - width)
            self.free += range(width, wide)
        super().begin(waiting)

    def advance(self, explained):
        self.explained, self.graphs = explained, self.captured[explained]
        super().advance()

    def choose(self, logits, row, at):
        logits, temperature = logits.float(), self.temperatures[row]                     # (B, V), (B, 1)
        drawn = draw(logits / temperature.clamp(min=COLD), self.u[row, at], 1.)
        token = torch.where(temperature[:, 0] < COLD, logits.argmax(-1), drawn)          # (B,)
        if self.explained:
            logp = logits.log_softmax(-1)
            self.logp[row, at] = logp.gather(1, token[:, None])[:, 0]
            self.top_logp[row, at], self.top[row, at] = logp.topk(self.best)             # (B, best)
        return token

    def read(self, row, begin, explained):
        """What the row has written from place `begin` on: ids, and for each its log-prob, the likeliest ids and
        theirs; and whether it has ended."""
        ended = self.ends[row] is not None
        new = slice(begin, self.ends[row] if ended else self.age[self.rows.index(row)])
        kept = (self.logp, self.top, self.top_logp) if explained else ()
        return self.written[row, new].tolist(), list(zip(*(x[row, new].tolist() for x in kept))), ended


class Writer(threading.Thread):
    """The thread in which a Standing engine works, and the queue of answers for which it has no place yet.

    A request has a prompt, `answers`, uniforms `u` (n, limit) for them, and a temperature; it says if `logprobs` are
    wanted, and if it is `live`: told of every token as it comes, not only at the end. Its `events` are a queue of
    (answer, *what read() says), or an exception: what went wrong, or at the end of all `farewell`. An answer has its
    request, its `index`, how much it has been `told`, and is `dropped` when nobody listens any more.
    """

    def __init__(self, engine, farewell, most=1024):
        super().__init__(daemon=True)
        self.engine, self.farewell, self.most, self.gate = engine, farewell, most, threading.Condition()
        self.waiting, self.answers, self.closing = deque(), {}, False       # answers: those in the batch, by row

    def submit(self, request):
        """Queue a request; False if there are too many already, or no more will be answered."""
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
        """The answers that begin now, perhaps none; None at the end. Waits while there is nothing to do."""
        with self.gate:
            self.gate.wait_for(lambda: self.waiting or self.answers or self.closing)
            if self.closing:
                return None
            taken = [self.waiting.popleft() for _ in range(min(len(self.waiting), len(self.engine.places)))]
        return [answer for answer in taken if not answer.dropped]

    @torch.inference_mode()
    def run(self):
        broken = False
        while (begin := self.next()) is not None:
            try:
                if broken:
                    self.engine.reset()
                    broken = False
                self.write(begin)
            except Exception as error:                  # these answers are lost, but the next ones need not be
                broken = True
                self.fail([*begin, *self.answers.values()], error)
                self.answers.clear()
        self.fail([*self.waiting, *self.answers.values()], self.farewell)

    def fail(self, answers, error):
        for request in {id(answer.request): answer.request for answer in answers}.values():
            request.events.put(error)

    def write(self, begin):
        """Begin some answers, write a few tokens of all, and hand them out."""
        engine, prompts = self.engine, deque()
        for _, group in groupby(begin, key=lambda answer: id(answer.request)):          # they share a prefill
            group = list(group)
            request = group[0].request
            u = request.u[[answer.index for answer in group]]
            prompts.append(engine.join(request.prompt, u, request.temperature))
            self.answers |= zip(prompts[-1][1], group)
        if prompts:
            engine.begin(prompts)
        if self.answers:
            engine.compact()
            engine.advance(any(answer.request.logprobs for answer in self.answers.values()))
        for row, answer in list(self.answers.items()):
            ended = engine.ends[row] is not None
            if not answer.dropped and (ended or answer.request.live):
                news = engine.read(row, answer.told, answer.request.logprobs)
                answer.told += len(news[0])
                answer.request.events.put((answer, *news))
            if ended or answer.dropped:
                engine.leave(row)
                del self.answers[row]
