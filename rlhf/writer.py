"""[kit] Answers for the clients of a server, written in one batch: an engine that keeps running, and its thread."""
import threading
from collections import deque
from itertools import groupby

import torch

from rlhf.logprobs import pack
from rlhf.sampler import PREFILL_TOKENS, Engine, cache_length, draw, likely, not_finite
from rlhf.update import micro_batches

GREEDY_BELOW = 1e-5                     # temperatures below this are greedy
SCORED = 128                            # tokens of prompts whose logits are held at a time


class ServingEngine(Engine):
    """An engine that runs for as long as the server. Answers join and leave it one by one, each with its own
    temperature, top_p, top_k, min_p, random numbers and limit. Log-probs are computed, and logits sorted, only while a
    request needs it.

    There are as many rows as slots, and rows are reused: `free_rows` are those without an answer.
    """

    def __init__(self, gpt, slots, context, stops, best=20, graph=True):
        super().__init__(gpt, slots, cache_length(gpt.device, context), stops, slots, context, 1., graph)
        self.context, self.best = context, min(best, gpt.config.vocab_size)
        self.temperatures, self.top_p, self.top_k, self.min_p = torch.zeros(4, slots + 1, 1, device=gpt.device)
        self.logp = torch.zeros(self.u.shape, device=gpt.device)                         # (slots + 1, tokens)
        self.top_logp = torch.zeros(*self.u.shape, self.best, device=gpt.device)         # (slots + 1, tokens, best)
        self.top = torch.zeros(self.top_logp.shape, dtype=torch.long, device=gpt.device)
        self.reset()

    def reset(self):
        """Drop all answers."""
        self.begin([self.context] * self.slots, torch.zeros(self.slots, self.context))
        self.free_rows = list(range(self.slots))

    def join(self, prompt, uniforms, how):
        """Reserve rows for the answers to a prompt, one for each of the uniforms (n, limit): (prompt, rows), as
        prefill() takes them. how: the temperature, top_p, top_k and min_p of these answers."""
        rows = [self.free_rows.pop() for _ in uniforms]
        for row, u in zip(rows, uniforms):
            self.limits[row], self.lengths[row] = len(u), None
            self.temperatures[row], self.top_p[row], self.top_k[row], self.min_p[row] = how
            self.u[row, :len(u)] = u.to(self.u.device)
        return prompt, rows

    def leave(self, row):
        """Give back the row of an answer, which may not have ended yet."""
        if row in self.row_in:
            self.release([self.row_in.index(row)])
        self.free_rows.append(row)

    def prefill(self, waiting):
        """Engine.prefill(), after taking back slots that compact() has dropped, as far as they are needed."""
        width = len(self.row_in)
        wanted = width - len(self.free) + sum(len(rows) for _, rows in waiting)
        if self.graphs is not None:
            wanted = self.graph_width(wanted)
        if wanted > width:
            self.row[width:] = self.slots               # these slots are idle, whatever they held before
            self.pos[width:] = self.at[width:] = 0
            for x, nothing in ((self.row_in, None), (self.prompt_tokens, 0), (self.new_tokens, 0)):
                x += [nothing] * (wanted - width)
            self.free += range(width, wanted)
        super().prefill(waiting)

    def advance(self, want_logprobs, want_likely):
        self.want_logprobs, self.want_likely = self.variant = want_logprobs, want_likely
        super().advance()

    def choose(self, logits, row, at):
        temperature = self.temperatures[row]                                             # (B, 1)
        tempered = logits / temperature.clamp(min=GREEDY_BELOW)
        if self.want_likely:
            tempered = likely(tempered, self.top_p[row], self.top_k[row], self.min_p[row])
        drawn = draw(tempered.softmax(-1), self.u[row, at])
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

    def score(self, prompts):
        """The log-probs of the tokens of each prompt: a list as read() returns it, with None for the first token."""
        sizes, scores = [len(prompt) for prompt in prompts], [[None] for _ in prompts]
        longer = [i for i, size in enumerate(sizes) if size > 1]
        for micro in micro_batches(longer, sizes, PREFILL_TOKENS[self.gpt.device.type]):
            ids, mask = pack([(prompts[i][:1], prompts[i][1:]) for i in micro], self.gpt.device)
            where = mask.flatten().nonzero()[:, 0]                                       # (N,)
            h, targets = self.gpt.hidden(ids[:, :-1], where=where), ids[:, 1:].flatten()[where]
            if not h.isfinite().all():
                raise FloatingPointError(not_finite(self.gpt))
            scored = [each for i in range(0, len(h), SCORED)
                      for each in self.score_tokens(h[i:i + SCORED], targets[i:i + SCORED])]
            for i in micro:
                scores[i] += scored[:sizes[i] - 1]
                del scored[:sizes[i] - 1]
        return scores

    def score_tokens(self, h, targets):
        """[(log-prob, likeliest ids, their log-probs)] of the tokens `targets` (N,) after the states h (N, D)."""
        logp = self.gpt.logits(h).log_softmax(-1)                                        # (N, V)
        best = logp.topk(self.best)                                                      # (N, best)
        columns = logp.gather(1, targets[:, None])[:, 0], best.indices, best.values
        return list(zip(*(x.tolist() for x in columns)))


class Writer(threading.Thread):
    """The thread that runs a ServingEngine, and the queue of answers that wait for a row.

    A request has its `answers`, `how` (as ServingEngine.join() takes it), `sorts` (whether that is more than a
    temperature), `logprobs` (whether they are wanted), `echo` (whether those of the prompt are wanted, too) and `live`
    (whether tokens are reported as they come, or only at the end). Its queue `events` gets tuples (answer, *read()), or
    the exception that ended it; `farewell` is the exception for requests that are open when the server closes.

    An answer has its `request`, its `prompt` (one list object, which all answers to a prompt share), uniforms `u`
    (limit,), and `told`, the number of tokens that were reported. If the prompt's log-probs are wanted, `scores` is set
    to them before anything is reported; with a limit of 0 nothing else is computed. Whoever no longer wants an answer
    sets its `dropped`.
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
        self.score([answer for answer in new if answer.request.echo and answer.request.logprobs])
        for answer in new:
            if not len(answer.u):
                answer.request.events.put((answer, [], [], True))
        self.begin([answer for answer in new if len(answer.u)])
        if self.answers:
            requests = [answer.request for answer in self.answers.values()]
            self.engine.compact()
            self.engine.advance(any(each.logprobs for each in requests), any(each.sorts for each in requests))
        for row, answer in list(self.answers.items()):
            self.report(row, answer)

    def score(self, answers):
        """Score the prompts of these answers, each prompt once."""
        prompts = {id(answer.prompt): answer.prompt for answer in answers}
        scores = dict(zip(prompts, self.engine.score([*prompts.values()])))
        for answer in answers:
            answer.scores = scores[id(answer.prompt)]

    def begin(self, new):
        """Give new answers their rows and their prompts' keys and values. Those to one prompt share its prefill."""
        prompts = deque()
        for _, group in groupby(new, key=lambda answer: id(answer.prompt)):
            group = list(group)
            prompts.append(self.engine.join(group[0].prompt, [answer.u for answer in group], group[0].request.how))
            self.answers |= zip(prompts[-1][1], group)
        if prompts:
            self.engine.prefill(prompts)

    def report(self, row, answer):
        """Tell the request of an answer what is new in its row, and free the row if the answer has ended."""
        ended = self.engine.lengths[row] is not None
        if not answer.dropped and (ended or answer.request.live):
            news = self.engine.read(row, answer.told, answer.request.logprobs)
            answer.told += len(news[0])
            answer.request.events.put((answer, *news))
        if ended or answer.dropped:
            self.engine.leave(row)
            del self.answers[row]
