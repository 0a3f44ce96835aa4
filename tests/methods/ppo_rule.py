"""PPO against a rule written by hand: answers of eight words, and no reward model."""
from dataclasses import dataclass

import torch

from rlhf import ppo

NEEDS = ("sft",)


@dataclass
class Config(ppo.Config):
    words: int = 8                      # words that an answer should have


def run(cfg):
    text = cfg.text()

    def reward(rows):
        return torch.tensor([-abs(len(text.decode(response).split()) - cfg.words) / 4 for _, response in rows])
    return ppo.run(cfg, reward)
