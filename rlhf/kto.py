"""KTO: each answer is good or bad by itself, and is compared with how far the policy has moved in general.

Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8: w_good (1 - sigmoid(beta (h - z))) for a good answer, w_bad (1 -
sigmoid(beta (z - h))) for a bad one, with h = log pi/ref summed over the answer, EOS included. The reference point z is
an estimate of KL(pi || ref): the mean of h over answers of other pairs (nearly always to other prompts), at least 0,
without gradient.
Chosen answers are the good ones, rejected the bad ones. Left out: good and bad answers to different prompts, which is
what KTO is made for, and weights that balance unequal numbers of them.

Memory: as DPO. Each step needs z first: two more forward passes.
Questions a reader asks. Why mismatched answers? The mean of h over the batch's own answers would rise with all of them
and hide what was learned. Why clamped? A KL is not negative, but its estimate can be. Why is the loss 0.5 at first? All
h and z are 0. Why is --batch_size at least 2? A single pair has no others, and z would always be 0.
"""
from dataclasses import dataclass

import torch

from data import InputError
from rlhf import dpo

NEEDS = dpo.NEEDS


@dataclass
class Config(dpo.Config):
    desirable_weight: float = 1.        # of the good answers
    undesirable_weight: float = 1.      # of the bad ones

    BARN = {"lr": 3e-4, "batch_size": 64}
    BARN_LORA = {"lr": 5e-4}

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size == 1:
            raise InputError("--batch_size 1 makes no sense: KTO compares answers with those to other prompts")


def reference_point(model, ref, pairs, cfg):
    """z of a batch of pairs, in nats: each prompt gets the answers of the pair before it. A batch of one pair, as the
    last of an epoch may be, has no other answers: z is 0."""
    if len(pairs) == 1:
        return torch.zeros((), device=model.gpt.device)
    mismatched = [tuple((prompt, response) for _, response in other)
                  for ((prompt, _), _), other in zip(pairs, [pairs[-1], *pairs])]
    h = dpo.all_logps(model, mismatched, cfg) - dpo.all_logps(ref, mismatched, cfg)      # (2, b)
    return h.mean().clamp(min=0)


def kto_loss(logp, ref_logp, lengths, cfg, z):
    """As dpo.dpo_loss(): losses (b,), each the mean of a good and a bad answer's, and implicit rewards (2, b)."""
    h = logp - ref_logp                                                                  # (2, b)
    good = cfg.desirable_weight * (1 - torch.sigmoid(cfg.beta * (h[0] - z)))             # (b,)
    bad = cfg.undesirable_weight * (1 - torch.sigmoid(cfg.beta * (z - h[1])))
    return (good + bad) / 2, cfg.beta * h.detach()


def run(cfg):
    return dpo.run(cfg, kto_loss, kl_fn=reference_point)
