"""Binary FeedME: supervised fine-tuning, from the SFT model, on the preferred answer of each pair.

One of AlpacaFarm's methods (arXiv 2305.14387), after OpenAI's FeedME models, which imitate answers of their own that
people rated highest. The loss is that of sft.py. Left out: the rejected answers, of which nothing is learned.

Memory: as SFT, and the SFT model for the KL at the end.
Questions a reader asks. Why does it gain less than DPO from the same pairs? It learns that the preferred answer is
good, not what is better about it than about the other one. Why does it gain at all? The preferred answer is on average
better than an answer of the SFT model: it is best-of-2, chosen by annotators who err.
"""
import math
from dataclasses import dataclass

from rlhf import policy, sft, update
from rlhf.answers import answer, show_sample
from rlhf.pairs import load_pairs

NEEDS = ("sft", "pairs")


@dataclass
class Config(sft.Imitation):
    BARN = {"lr": 5e-4, "epochs": 2}
    BARN_LORA = {"lr": 2e-3}


def run(cfg):
    text = cfg.text()
    rows = [chosen for chosen, _ in load_pairs(cfg, text)]
    val = cfg.splits()["val"]
    ref = policy.start(cfg)
    model = ref.copy("policy")
    log = update.Log(cfg, cfg.epochs * math.ceil(len(rows) / cfg.batch_size), ("loss",))
    metrics = sft.train(model, rows, cfg, log, lambda step: show_sample(step, model, text, cfg, val, log))
    policy.save(model, cfg)
    return {**metrics, **answer(model, text, cfg, ref)}
