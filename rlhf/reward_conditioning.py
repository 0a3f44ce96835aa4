"""Binary reward conditioning: imitate good and bad answers, each under its own mark, then ask for good ones.

One of AlpacaFarm's methods (arXiv 2305.14387), after Keskar et al. 2019 (CTRL, arXiv 1909.05858) and Korbak et al. 2023
(arXiv 2302.08582). The instruction of each preferred answer gets "good: " in front, that of each rejected one "bad: ",
and both are learned with the loss of sft.py, from the SFT model on. Afterwards every instruction gets "good: ". These
marks are words and not new tokens, so that the vocabulary stays as it is and any client can ask with them.

Memory: as SFT, and the SFT model for the KL at the end.
Questions a reader asks. Why is it among the paper's weakest methods? Half of what it imitates is bad, the labels are
noisy, and the two kinds of answers differ little, so a model loses little by not reading the mark. What if serve.py is
asked without the mark? The model has not learned such prompts here; write "good: " in front of the question.
"""
import math
from dataclasses import dataclass

from rlhf import policy, sft, update
from rlhf.answers import answer, show_sample
from rlhf.pairs import load_pairs

NEEDS = ("sft", "pairs")
GOOD, BAD = "good: ", "bad: "


@dataclass
class Config(sft.Imitation):
    BARN = {"lr": 5e-4, "epochs": 2}
    BARN_LORA = {"lr": 2e-3}


def conditioned(cfg, text):
    """Twice as many rows as there are pairs: the chosen answers, marked good, and the rejected ones, marked bad."""
    good = [chosen for chosen, _ in load_pairs(cfg, text.marked(GOOD))]
    bad = [rejected for _, rejected in load_pairs(cfg, text.marked(BAD))]
    return good + bad


def run(cfg):
    text = cfg.text()
    asked, rows = text.marked(GOOD), conditioned(cfg, text)
    val = cfg.splits()["val"]
    ref = policy.start(cfg)
    model = ref.copy("policy")
    log = update.Log(cfg, cfg.epochs * math.ceil(len(rows) / cfg.batch_size), ("loss",))
    metrics = sft.train(model, rows, cfg, log, lambda step: show_sample(step, model, asked, cfg, val, log))
    policy.save(model, cfg)
    return {**metrics, **answer(model, asked, cfg, ref, text)}
