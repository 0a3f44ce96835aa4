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
from rlhf import update
from rlhf.logprobs import lengths, pack, token_logps
from rlhf.sampler import generate


@dataclass
class Experience:
    """B sampled answers."""
    rows: list                          # B times (prompt ids, response ids)
    ids: torch.Tensor                   # (B, T)
    mask: torch.Tensor                  # (B, T-1)
    logp: torch.Tensor                  # (B, T-1) of the policy that sampled them
    ref_logp: torch.Tensor              # (B, T-1) of the reference
    score: torch.Tensor                 # (B,) the reward of each answer, less the penalty for no end
    finished: torch.Tensor              # (B,) whether it ended by itself, not by its length
    n: int = 1                          # answers to each prompt; they stand one after the other

    @property
    def lengths(self):
        """Tokens of each row, prompt and response together: a list (B,)."""
        return lengths(self.rows)

    def kl(self):
        """Mean KL to the reference per answer, in nats: k1, the unbiased estimate."""
        return (self.logp - self.ref_logp).sum(1).mean().item()

    def total(self, kl_coef):
        """The score (B,) of each answer less the price of its KL (k1), as methods without a value function pay it."""
        return self.score - kl_coef * (self.logp - self.ref_logp).sum(1)

    def metrics(self):
        """TRL's names. The spread is within the answers to a prompt, if there are several."""
        spread = self.score.view(-1, self.n if self.n > 1 else len(self.score)).std(1)
        tokens = self.mask.sum().item()
        return {"reward": self.score.mean().item(), "reward_std": spread.mean().item(),
                "frac_reward_zero_std": (spread == 0).float().mean().item(), "objective/kl": self.kl(),
                "entropy": -self.logp.sum().item() / tokens, "completions/mean_length": tokens / len(self.rows),
                "completions/clipped_ratio": (~self.finished).float().mean().item()}

    def show(self, step, record, text, log):
        """Log the first answer, which is one to `record`."""
        _, response = self.rows[0]
        log.sample(step, question(record), text.decode(response), score=self.score[0].item())

    def cut(self, indices, *per_token):
        """A micro-batch without the columns in which all of its rows are padding: ids (b, t), mask (b, t-1), and of
        each tensor (B, T-1) in `per_token` its part (b, t-1)."""
        t = max(len(self.rows[i][0]) + len(self.rows[i][1]) for i in indices)
        return self.ids[indices, :t], *(x[indices, :t - 1] for x in (self.mask, *per_token))

    @torch.no_grad()
    def per_token(self, f, cfg):
        """f(ids (b, t), mask (b, t-1)) -> (b, t-1) for all rows: (B, T-1), in micro-batches, without gradients."""
        out = torch.zeros(self.mask.shape, device=self.ids.device)
        for micro in update.micro_batches(range(len(self.rows)), self.lengths, 2 * cfg.micro_batch_tokens):
            ids, mask = self.cut(micro)
            out[micro, :mask.shape[1]] = f(ids, mask)
        return out


def collect(prompts, text, model, ref, score_fn, cfg, seed, n=1):
    """n answers of the policy `model` to each prompt (token ids), scored by score_fn, as an Experience.

    cfg.missing_eos_penalty is taken from the score of an answer that did not end. The policy's log-probs are those of
    sampling if training would compute the same. FloatingPointError if a score is not finite.
    """
    rows, logp = generate(model, prompts, text, cfg, seed, n, logps=True)
    ids, mask = pack(rows, model.gpt.device)
    score = score_fn(rows).to(ids.device)                                                # (B,)
    if not score.isfinite().all():
        raise FloatingPointError("the reward of an answer is not a finite number: the run stopped and saved nothing")
    finished = torch.tensor([response[-1] in text.stops for _, response in rows], device=ids.device)
    score = score - cfg.missing_eos_penalty * ~finished
    roll = Experience(rows, ids, mask, None, None, score, finished, n)
    roll.ref_logp = roll.per_token(partial(token_logps, ref, temperature=cfg.temperature), cfg)
    if logp:
        roll.logp = torch.zeros_like(roll.ref_logp)
        roll.logp[mask] = torch.cat(logp)
    else:
        roll.logp = roll.per_token(partial(token_logps, model, temperature=cfg.temperature), cfg)
    return roll


def schedule(prompts, size, steps, seed):
    """`steps` lists of `size` prompts. Every prompt comes once before any comes again, each time in a new order."""
    passes = math.ceil(steps * size / len(prompts))
    order = [i for once in update.batches(len(prompts), len(prompts), passes, seed) for i in once]
    return [[prompts[i] for i in order[step * size:][:size]] for step in range(steps)]
