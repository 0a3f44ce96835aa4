"""SimPO: DPO without a reference. The reward is the mean log-prob of a token, and the margin has to reach gamma.

Meng et al. 2024 (arXiv 2405.14734), eq. 6.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from rlhf import dpo

NEEDS = ("sft", "pairs")


@dataclass
class Config(dpo.Config):
    beta: float = 2.                    # scale of the reward
    gamma: float = .5                   # margin that the chosen answer should have over the rejected one


def simpo_loss(logp, ref_logp, lengths, cfg):
    rewards = cfg.beta * logp / lengths                                                  # (2, b)
    return -F.logsigmoid(rewards[0] - rewards[1] - cfg.gamma), rewards.detach()


def run(cfg):
    return dpo.run(cfg, simpo_loss, needs_reference=False)
