"""[kit] One optimizer step: batches, micro-batches, exact accumulation, clipped AdamW; and the log of a run."""
import json
import math
import random
import re
import sys
import time
from contextlib import contextmanager

import torch

from data import OutOfMemory, Refusal
from data.choices import speller
from data.progress import Progress, amount, cut, width
from rlhf.logprobs import pack

try:
    import resource
except ImportError:                     # Windows
    resource = None


def batches(n, batch_size, epochs, seed):
    """Lists of indices below n, one for each optimizer step. Every epoch has each index once, in a new random order."""
    r = random.Random(seed)
    out = []
    for _ in range(epochs):
        order = r.sample(range(n), n)
        out += [order[i:i + batch_size] for i in range(0, n, batch_size)]
    return out


def micro_batches(indices, lengths, tokens):
    """Split a batch into lists of rows of similar length, each of at most `tokens` tokens with its padding, of which at
    most 15 % of the rest are padding. A row that is longer than `tokens` is alone.

    lengths[i]: tokens of row i. Gradients are accumulated exactly, so the split changes speed and memory, never the
    result.
    """
    out, filled = [], 0                                 # filled: tokens of the newest list that are not padding
    for i in sorted(indices, key=lambda i: lengths[i]):
        filled += lengths[i]
        if out and (len(out[-1]) + 1) * lengths[i] <= min(tokens, 1.15 * filled):
            out[-1].append(i)
        else:
            out.append([i])
            filled = lengths[i]
    return out


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


class NotFinite(FloatingPointError):
    """A number is not finite; `batch` is what is known about it, among it the rows [(prompt ids, response ids)]."""

    def __init__(self, said, rows, **known):
        super().__init__(said)
        self.batch = {**known, "rows": rows}


class Updater:
    """AdamW with warm-up, cosine decay to a tenth of lr, and gradient clipping.

    add() takes a loss as (sum, denominator). step() divides the gradient by the denominators of all micro-batches
    together, so that accumulation equals one big batch, whatever the lengths.

    fp16: activations are in fp16, in which gradients may underflow or overflow. The loss is multiplied by a scale
    (Micikevicius et al. 2018, section 3.2) that is halved after an overflow, whose step is left out, and doubled after
    100 good steps. It starts low, because gradients of sums are large already.
    """

    only_in_loop = True                 # no save after the last step has its state

    def __init__(self, params, lr, steps, warmup=.05, betas=(.9, .98), weight_decay=0., max_grad_norm=1., fp16=False):
        self.params, self.lr, self.steps, self.max_grad_norm = list(params), lr, steps, max_grad_norm
        self.warmup = max(1, round(warmup * steps))
        self.optimizer = torch.optim.AdamW(self.params, lr, betas, weight_decay=weight_decay, fused=True)
        self.taken, self.denominator, self.overflows = 0, 0, 0
        self.total, self.rows, self.last_loss = 0., [], None
        self.scaler = torch.amp.GradScaler(self.params[0].device.type, 1024., growth_interval=100, enabled=fp16)

    def state_dict(self):
        return {"taken": self.taken, "overflows": self.overflows, "last_loss": self.last_loss,
                "scaler": self.scaler.state_dict(), "moments": [self.optimizer.state.get(p, {}) for p in self.params]}

    def load_state_dict(self, state):
        self.taken, self.overflows, self.last_loss = state["taken"], state["overflows"], state["last_loss"]
        self.scaler.load_state_dict(state["scaler"])
        for p, moments in zip(self.params, state["moments"], strict=True):
            self.optimizer.state[p] = {name: x.to(p.device) for name, x in moments.items()}

    def add(self, loss_sum, denominator, rows=()):
        """rows: [(prompt ids, response ids)] that the loss is about."""
        self.scaler.scale(loss_sum).backward()
        self.denominator += denominator
        self.total = self.total + loss_sum.detach()
        self.rows += rows

    def step(self):
        """Take the step and return what to log. NotFinite if the loss or the gradient is not finite; in fp16, if the
        gradient is not for the twentieth time in a row. No step is taken with such a gradient."""
        self.scaler.unscale_(self.optimizer)
        torch._foreach_div_([p.grad for p in self.params if p.grad is not None], self.denominator)
        decay = .5 * (1 + math.cos(math.pi * min(1., self.taken / self.steps)))
        lr = self.lr * min(1., (self.taken + 1) / self.warmup) * (.1 + .9 * decay)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        norm, loss = torch.stack((norm, self.total / self.denominator)).tolist()
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        fp16 = self.scaler.is_enabled()
        if self.overflows >= (20 if fp16 else 1) or not (self.overflows or math.isfinite(loss)):
            what = f"norm of the gradient is {norm}" if self.overflows else f"loss is {loss}"
            raise NotFinite(f"step {self.taken}: the {what}, so the step was not taken and nothing is saved; try a "
                            "lower --lr" + ", or --dtype float32" * fp16, self.rows, step=self.taken, lr=lr, loss=loss,
                            grad_norm=norm, last_finite_loss=self.last_loss)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.last_loss = self.last_loss if self.overflows else loss
        self.taken, self.denominator, self.total, self.rows = self.taken + 1, 0, 0., []
        scale = {"loss_scale": self.scaler.get_scale()} if fp16 else {}
        return {"lr": lr, "grad_norm": None if self.overflows else norm, **scale}


class Log:
    """metrics.jsonl (one object a step), samples.jsonl, and how far the training is on the terminal; event files for
    TensorBoard, if cfg asks for them. `last` are the metrics of the newest step.

    A run that goes on from a save logs nothing until it is where it was saved: that is in the files already."""

    def __init__(self, cfg, steps, shown):
        """`shown` names the metrics of the terminal line, the most important first; the files have all."""
        folder = cfg.dir()
        folder.mkdir(parents=True, exist_ok=True)
        self.saves, self.last, self.done = cfg.saves, {}, 0
        self.metrics, self.samples = (self.saves.log(folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
        for old in folder.glob("events.out.tfevents*"):                                  # of an interrupted attempt
            if not self.saves.behind:
                old.unlink()
        self.progress, self.steps, self.shown = Progress(folder.name, steps), steps, shown
        self.start, self.tokens, self.events = time.perf_counter(), 0, None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(folder)

    def resumed(self, items, *changed):
        """(step, item) of each of the items, from where the last save was. changed: all that the steps change, from
        which a save is made; see saves.py."""
        return self.saves.resumed(items, self, *changed)

    def state_dict(self):
        return {"last": self.last, "done": self.done}

    def load_state_dict(self, state):
        self.last, self.done = state["last"], state["done"]
        self.progress.before = self.done

    def write(self, file, record):
        if not self.saves.behind:
            print(json.dumps(record), file=file, flush=True)

    def step(self, step, metrics, tokens):
        """Log one step: `metrics` by name, `tokens` that it processed."""
        self.tokens, self.last, self.done = self.tokens + tokens, metrics, step + 1
        self.write(self.metrics, {"step": step, **metrics})
        if self.events:
            for name, value in metrics.items():
                if value is not None:
                    self.events.add_scalar(name, value, step)
            self.events.flush()
        shown = [f"{name.rpartition('/')[2]} {metrics[name]:.4g}" for name in self.shown if metrics[name] is not None]
        speed = self.tokens / (time.perf_counter() - self.start)
        text = " | ".join([*shown, f"{amount(speed)} tok/s", f"{peak_gb():.2f} GB" if peak_gb() else ""])
        self.progress.update(step + 1, text, keep=step in (0, self.steps - 1))

    def rows(self, rows, text, step=0, **known):
        """Keep N rows that are learned as the learner sees them, packed together: tokens, the lengths of prompt and
        row, the mask, and what else is `known` of them: a list (N,), or a tensor (N, T-1) of numbers per token. Index t
        of the mask, and of these, is about token t+1."""
        spell = speller(text.tokenizer)
        ids, mask = pack(rows)                                                           # (N, T), (N, T-1)
        known = {name: x if isinstance(x, list) else x.double().round(decimals=6).tolist() for name, x in known.items()}
        for i, (prompt, response) in enumerate(rows):
            tokens = [spell(id).decode(errors="replace") for id in ids[i].tolist()]
            record = {"step": step, "tokens": tokens, "mask": mask[i].int().tolist(), "prompt": len(prompt),
                      "length": len(prompt) + len(response), "ends": response[-1] in text.stops,
                      **{name: x[i] for name, x in known.items()}}
            self.write(self.samples, record)

    def sample(self, step, instruction, output, **scores):
        """Keep one answer, and show it in two lines."""
        record = {"step": step, "instruction": instruction, "output": output, **scores}
        self.write(self.samples, record)
        if self.saves.behind:
            return
        marks = "".join(f" ({name} {value:.2f})" for name, value in scores.items())
        self.progress.close()
        print(f"    {cut(repr(instruction), width() - 4)}")
        print(f"    -> {cut(repr(output), width() - 7 - len(marks))}{marks}", flush=True)


def peak_gb():
    """Most memory held so far, in GB: of the GPU where there is one, else of the process; 0 where nobody counts it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return 0.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextmanager
def plainly(advice, held=""):
    """What torch and the numbers may raise in a with block, said for the user. advice: what takes less memory; held:
    what takes how much of it."""
    try:
        yield
    except FloatingPointError as error:
        raise Refusal(error) from None
    except (MemoryError, RuntimeError) as error:        # on CPUs, torch has no exception of its own for it
        kinds = MemoryError, torch.OutOfMemoryError
        if not isinstance(error, kinds) and not re.search("can't allocate memory|not enough memory", str(error)):
            raise
        took = [f"peak {peak_gb():.1f} GB"] * bool(peak_gb()) + [f"about {held}"] * bool(held)
        said = f" ({'; '.join(took)})" if took else ""
        raise OutOfMemory(f"out of memory{said}; {advice}") from None
