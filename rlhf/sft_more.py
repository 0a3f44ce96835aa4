"""SFT on more demonstrations: what would people achieve by writing answers instead of judging them?

AlpacaFarm (arXiv 2305.14387) compares its SFT model, trained on 10,000 demonstrations, with one trained on all 52,000.
Here, too, it is the SFT stage with the demonstrations of the splits preference and unlabeled beside those of sft: four
times as many. Nothing else is changed. Left out: the demonstrations of val, on which settings are chosen.

Memory: as SFT.
Questions a reader asks. Why does it need sft, whose model it does not use? It is compared with it: both stand on the
leaderboard. Why does it gain so little? The demonstrations are of mixed quality, and imitating more of them teaches the
same mixture more exactly; feedback says which part of it is good.
"""
from dataclasses import dataclass

from rlhf import sft

NEEDS = ("sft",)


@dataclass
class Config(sft.Config):
    pass


def run(cfg):
    return sft.run(cfg, ("sft", "preference", "unlabeled"))
