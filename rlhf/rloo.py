"""REINFORCE leave-one-out: an answer's baseline is the mean reward of the other answers to its prompt.

Ahmadian et al. 2024 (arXiv 2402.14740), eq. 4, after Kool et al. 2019. A whole answer is one action: it has one reward,
its score less the price of its KL (k1), and one ratio, which is clipped as in TRL's RLOOTrainer. The loop is GRPO's.
Left out: normalised advantages, TRL's option.

Memory: as GRPO.
Questions a reader asks. Why leave the answer itself out? A baseline that depends on the action biases the gradient;
with the mean of all n it would be (n - 1) / n times as long. How does it differ from GRPO? No division by the group's
deviation, the KL in the reward, and long answers do not count less per token.
"""
from dataclasses import dataclass

import torch

from rlhf import grpo, rewards

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    lr: float = 2e-4                    # peak learning rate
    steps: int = 80                     # rollouts, each followed by updates
    prompts: int = 128                  # prompts in a rollout
    n: int = 4                          # answers to each prompt
    batch_size: int = 256               # answers in an optimizer step
    num_iterations: int = 1             # passes over a rollout
    kl_coef: float = .05                # price of a nat of KL to the reference, in deviations of the reward
    cliprange: float = .2               # how far the ratio of an answer's probabilities may move
    missing_eos_penalty: float = 1.     # taken from the score of an answer that did not end

    LEAST = {"n": 2}
    BARN = {"lr": 5e-4, "steps": 40, "prompts": 64, "batch_size": 64}
    BARN_LORA = {"lr": 1e-3}


def leave_one_out(roll, cfg):
    """Advantages (B,): total rewards less the mean of the others in their group."""
    total = roll.total(cfg.kl_coef).view(-1, cfg.n)                                      # (P, n)
    others = (total.sum(1, keepdim=True) - total) / (cfg.n - 1)
    return (total - others).flatten()


def rloo_loss(logp, old_logp, ref_logp, advantages, mask, cfg):
    """Arguments and results as of grpo.grpo_loss()."""
    ratio = ((logp - old_logp) * mask).sum(1).exp()                                      # (b,)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
    return torch.max(free, clipped).sum(), len(mask), (clipped > free).float().sum()


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default what --reward chooses."""
    return grpo.run(cfg, score_fn, leave_one_out, rloo_loss)
