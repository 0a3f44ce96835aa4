"""[kit] Experience: sampled answers, and the numbers that stay fixed while a policy learns from them.

An online method repeats two things: collect() samples answers with the newest policy and scores them, and the method's
own loop takes a few optimizer steps on what was collected. A reward is a function: rows [(prompt ids, response ids)] ->
scores (B,). It may be the reward model (reward.scorer), a rule, or anything else that gives a row a number.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch

from data.alpaca_eval import question
from data.progress import say_once
from rlhf import update
from rlhf.logprobs import lengths, pack, token_logps
from rlhf.sampler import generate

MUCH_KL = 100                           # nats an answer, above which warn() says that the KL runs away


@dataclass
class Experience:
    """B sampled answers."""
    rows: list                          # B times (prompt ids, response ids)
    ids: torch.Tensor                   # (B, T)
    mask: torch.Tensor                  # (B, T-1)
    logp: torch.Tensor                  # (B, T-1) of the policy that sampled them
    ref_logp: torch.Tensor              # (B, T-1) of the reference
    score: torch.Tensor                 # (B,) the reward of each answer, less missing_eos_penalty if it did not end
    finished: torch.Tensor              # (B,) whether it ended with a stop token, not at the length limit
    n: int = 1                          # answers to each prompt, in consecutive rows

    @property
    def lengths(self):
        """Tokens of each row, prompt and response together: a list (B,)."""
        return lengths(self.rows)

    def kl(self):
        """Mean KL to the reference per answer, in nats, by its unbiased estimate k1: log pi/ref of the answer."""
        return (self.logp - self.ref_logp).sum(1).mean().item()

    def total(self, kl_coef):
        """score - kl_coef * KL (k1: log pi/ref of the answer), (B,): the reward that RLOO and REINFORCE use."""
        return self.score - kl_coef * (self.logp - self.ref_logp).sum(1)

    def spread(self):
        """Standard deviation of the scores: (B/n,) among the n answers to each prompt; (1,) among all if n is 1. That
        of a single answer is 0."""
        compared = self.score.view(-1, self.n if self.n > 1 else len(self.score))
        return compared.std(1, correction=min(1, compared.shape[1] - 1))

    def metrics(self):
        """Means for the log, under TRL's names; entropy is per token, the others are per answer or group of answers."""
        spread, tokens = self.spread(), self.mask.sum().item()
        return {"reward": self.score.mean().item(), "reward_std": spread.mean().item(),
                "frac_reward_zero_std": (spread == 0).float().mean().item(), "objective/kl": self.kl(),
                "entropy": -self.logp.sum().item() / tokens, "completions/mean_length": tokens / len(self.rows),
                "completions/clipped_ratio": (~self.finished).float().mean().item()}

    def warn(self):
        """Say once what stops learning: a KL that runs away, or rewards that do not differ."""
        if self.kl() > MUCH_KL:
            say_once(f"the KL to the reference is above {MUCH_KL} nats an answer and runs away: raise\nits price "
                     "(--kl_coef, --beta) or lower --lr")
        if (self.spread() == 0).all():
            say_once("all answers that are compared have the same reward: nothing can be learned")

    def show(self, step, record, text, log, **numbers):
        """Log the text of the first answer, and its tokens with keep(). record: the record that it answers."""
        self.keep(step, text, log, **numbers)
        _, response = self.rows[0]
        log.sample(step, question(record), text.decode(response), score=self.score[0].item())

    def keep(self, step, text, log, **numbers):
        """Log the first answer token by token, with the scores of all answers to its prompt. numbers: {name: (B, T-1)},
        what the learner has computed for each token."""
        first = {name: x[:1, :self.lengths[0] - 1] for name, x in numbers.items()}       # (1, t-1) each
        log.rows(self.rows[:1], text, step, scores=[self.score[:self.n].tolist()], **first)

    def cut(self, indices, *tensors):
        """A micro-batch without the columns in which all of its rows are padding: ids (b, t), mask (b, t-1), and of
        each of the tensors (B, T-1) its part (b, t-1)."""
        t = max(len(self.rows[i][0]) + len(self.rows[i][1]) for i in indices)
        return self.ids[indices, :t], *(x[indices, :t - 1] for x in (self.mask, *tensors))

    @torch.no_grad()
    def per_token(self, f, cfg):
        """Apply f(ids (b, t), mask (b, t-1)) -> (b, t-1) to all rows: (B, T-1), in micro-batches without
        gradients, which may have twice the tokens."""
        out = torch.zeros(self.mask.shape, device=self.ids.device)
        for micro in update.micro_batches(range(len(self.rows)), self.lengths, 2 * cfg.micro_batch_tokens):
            ids, mask = self.cut(micro)
            out[micro, :mask.shape[1]] = f(ids, mask)
        return out


def collect(prompts, text, model, ref, score_fn, cfg, seed, n=1):
    """n answers of the policy `model` to each prompt (token ids), scored by score_fn, as an Experience.

    cfg.missing_eos_penalty is subtracted from the score of an answer that did not end. The policy's log-probs are those
    of sampling if training would compute the same ones, else they are computed again. FloatingPointError if a score is
    not finite.
    """
    rows, logp = generate(model, prompts, text, cfg, seed, n, logps=True)
    ids, mask = pack(rows, model.gpt.device)
    score = score_fn(rows).to(ids.device)                                                # (B,)
    if not score.isfinite().all():
        raise update.NotFinite("the reward of an answer is not a finite number: the run stopped and saved nothing",
                               [row for row, value in zip(rows, score.tolist()) if not math.isfinite(value)])
    finished = torch.tensor([response[-1] in text.stops for _, response in rows], device=ids.device)
    score = score - cfg.missing_eos_penalty * ~finished
    roll = Experience(rows, ids, mask, None, None, score, finished, n)
    roll.ref_logp = roll.per_token(partial(token_logps, ref, temperature=cfg.temperature), cfg)
    if logp:
        roll.logp = torch.zeros_like(roll.ref_logp)
        roll.logp[mask] = torch.cat(logp)
    else:
        roll.logp = roll.per_token(partial(token_logps, model, temperature=cfg.temperature), cfg)
    roll.warn()
    return roll


def schedule(prompts, size, steps, seed):
    """`steps` lists of `size` prompts. Every prompt comes once before any comes again, each time in a new order."""
    passes = math.ceil(steps * size / len(prompts))
    order = [i for once in update.batches(len(prompts), len(prompts), passes, seed) for i in once]
    return [[prompts[i] for i in order[step * size:][:size]] for step in range(steps)]
