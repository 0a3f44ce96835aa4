"""IPO: DPO's margin, regressed to a finite target instead of pushed to infinity.

Azar et al. 2023 (arXiv 2310.12036), eq. 17: (h(chosen) - h(rejected) - 1 / (2 beta))^2, with h = log pi/ref. As in TRL,
h is the mean over the tokens of an answer, EOS included; the authors have confirmed that this is what they computed.
Code that sums over tokens needs a beta that is smaller by the length of an answer.

Memory: as DPO.
Questions a reader asks. Why a target? With few labels a pair is always won or always lost, and DPO's best margin for it
is infinite, whatever beta is. The square pays for a margin beyond the target, so beta always holds the policy back. Why
does the loss start at 1 / (2 beta)^2? Policy and reference are the same, so every margin is 0.
"""
from dataclasses import dataclass

from data import InputError
from rlhf import dpo

NEEDS = dpo.NEEDS


@dataclass
class Config(dpo.Config):
    beta: float = .1                    # the target of the margin, in nats a token, is 1 / (2 beta)

    BARN = {"lr": 3e-4, "batch_size": 64}
    BARN_LORA = {"lr": 3e-4}

    def __post_init__(self):
        super().__post_init__()
        if not self.beta:
            raise InputError("--beta 0 makes no sense: the target of the margin is 1 / (2 beta)")


def ipo_loss(logp, ref_logp, lengths, cfg):
    """As dpo.dpo_loss(): losses (b,) and implicit rewards (2, b). lengths (2, b): tokens."""
    h = (logp - ref_logp) / lengths                                                      # (2, b)
    return (h[0] - h[1] - 1 / (2 * cfg.beta)) ** 2, cfg.beta * h.detach()


def run(cfg):
    return dpo.run(cfg, ipo_loss)
