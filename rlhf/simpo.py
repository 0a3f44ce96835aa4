"""SimPO: DPO without a reference. The reward is the mean log-prob of a token, and the margin has to reach gamma.

Meng et al. 2024 (arXiv 2405.14734), eq. 6: -log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma).
Means are over the tokens of an answer, EOS included. gamma is absolute, as in the paper and in TRL; where a code writes
beta (difference - gamma), its gamma is our gamma / beta.
Left out: the NLL of the chosen answer, which TRL's CPOTrainer adds by default (cpo_alpha).

Memory: the policy with its optimizer, and nothing else; with LoRA, one adapter on a frozen base.
Questions a reader asks. Why means and not sums? What is maximised is then what ranks the answers of one prompt by the
policy itself, and a long answer is not worse for being long. What keeps the policy near SFT without a reference? Only
the learning rate and the number of steps: watch logps/chosen. Why is beta so small in barn? Without a reference the
margin begins with what SFT finds likely. A large beta then spends the gradient on pairs where SFT and label disagree,
and many of these labels are flipped; a small one treats all pairs alike.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from rlhf import dpo

NEEDS = dpo.NEEDS


@dataclass
class Config(dpo.Config):
    epochs: int = 1                     # passes over the pairs
    beta: float = 2.                    # scale of the reward
    gamma: float = .5                   # margin that the chosen answer should have over the rejected one

    BARN = {"lr": 5e-4, "batch_size": 64, "beta": .3, "gamma": .1}
    BARN_LORA = {"lr": 8e-4}


def simpo_loss(logp, ref_logp, lengths, cfg):
    """As dpo.dpo_loss(): losses (b,) and implicit rewards (2, b). lengths (2, b): tokens; ref_logp is None."""
    rewards = cfg.beta * logp / lengths                                                  # (2, b)
    return -F.logsigmoid(rewards[0] - rewards[1] - cfg.gamma), rewards.detach()


def run(cfg):
    return dpo.run(cfg, simpo_loss, needs_reference=False)
