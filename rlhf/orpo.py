"""ORPO: imitate the chosen answer and, in the same step, make it more likely than the rejected one. No reference.

Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7: NLL(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)),
where odds(p) = p / (1 - p), and p is the geometric mean of the probabilities of an answer's tokens, EOS included. The
NLL is the mean over the tokens of the chosen answer; TRL's also covers the tokens of the prompt.
Left out: starting from the base model, which is what the authors do. The pairs are the SFT model's own answers.

Memory: the policy with its optimizer, and nothing else; with LoRA, one adapter on a frozen base.
Questions a reader asks. Why odds? The log odds of likely answers differ more than their log-probs, by a factor of up to
1 / (1 - p). So the loss asks for a smaller change, and pushes the rejected answer down less. What keeps the policy near
SFT without a reference? The NLL of answers that the SFT model has written. Why does it gain so little in barn? As in
SimPO with a large beta, pairs where SFT and label disagree get most of the gradient, and many of these labels are
flipped; here beta is a weight, and does not change that.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlhf import dpo

NEEDS = dpo.NEEDS


@dataclass
class Config(dpo.Config):
    beta: float = .1                    # weight of the odds ratio; the paper's lambda

    BARN = {"lr": 3e-4, "epochs": 1, "batch_size": 64, "beta": 1.}
    BARN_LORA = {"lr": 1e-3}


def log_odds(mean_logp):
    """log p - log(1 - p) of p = exp(mean_logp) below 1, accurate near both ends."""
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def orpo_loss(logp, ref_logp, lengths, cfg):
    """As dpo.dpo_loss(): losses (b,) and implicit rewards (2, b). lengths (2, b): tokens; ref_logp is None."""
    mean = logp / lengths                                                                # (2, b)
    odds = log_odds(mean)                                                                # (2, b)
    return -mean[0] - cfg.beta * F.logsigmoid(odds[0] - odds[1]), cfg.beta * mean.detach()


def run(cfg):
    return dpo.run(cfg, orpo_loss, needs_reference=False)
