"""Conservative and robust DPO: DPO for labels of which a known share is flipped.

Conservative (Mitchell 2023, "A note on DPO with noisy preferences"): each label counts as right with probability 1 - e
and as wrong with e, so (1 - e) dpo(margin) + e dpo(-margin), where dpo(m) = -log sigmoid(m) and e = label_smoothing.
Robust (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12), with --robust: ((1 - e) dpo(margin) - e dpo(-margin)) /
(1 - 2 e). Its mean over flipped labels is the DPO loss on the true ones. TRL has only the robust one.

Memory: as DPO.
Questions a reader asks. Why do the two differ in a sign? The conservative loss fits the flipped labels, whose best
margin is finite: log((1 - e) / e). The robust one undoes the flips, so its margin is as boundless as DPO's, and its
gradient is larger. How large is e? The share of wrong labels: --pairs.flip, and the annotators' own mistakes.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from data import InputError
from rlhf import dpo

NEEDS = dpo.NEEDS


@dataclass
class Config(dpo.Config):
    label_smoothing: float = .1         # e: share of the labels that are wrong
    robust: bool = False                # undo the flips instead of expecting them

    BARN = {"lr": 3e-4, "batch_size": 64, "label_smoothing": .25}
    BARN_LORA = {"lr": 5e-4}

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing >= .5:
            raise InputError(f"--label_smoothing {self.label_smoothing} makes no sense: at 0.5 every label is a coin")


def cdpo_loss(logp, ref_logp, lengths, cfg):
    """As dpo.dpo_loss(): losses (b,) and implicit rewards (2, b)."""
    rewards, e = cfg.beta * (logp - ref_logp), cfg.label_smoothing                       # (2, b)
    as_labelled, flipped = -F.logsigmoid(rewards[0] - rewards[1]), -F.logsigmoid(rewards[1] - rewards[0])
    if cfg.robust:
        losses = ((1 - e) * as_labelled - e * flipped) / (1 - 2 * e)                     # (b,)
    else:
        losses = (1 - e) * as_labelled + e * flipped
    return losses, rewards.detach()


def run(cfg):
    return dpo.run(cfg, cdpo_loss)
