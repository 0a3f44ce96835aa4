"""Best-of-n: sample n answers and give the one with the highest reward. Nothing is trained.

Stiennon et al. 2020 (arXiv 2009.01325); one of AlpacaFarm's methods (arXiv 2305.14387). Its KL to the SFT model is at
most log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879). curve.json has the expected result for every k up to
n: the score of the best of k answers, in the offline world also its true reward, and as a control the same of a random
one of the k.
Left out: training on the winners (expert_iteration.py).

Memory: the SFT model and the reward model, without gradients.
Questions a reader asks. Why does the curve need no further samples? Any k of the n answers are a sample of size k, and
the probability that a given one is the best of k is a ratio of binomial coefficients. Why may the true reward fall
while the score still rises? Choosing the highest of many scores also chooses the reward model's largest errors.
"""
import math
from dataclasses import dataclass

import torch

from data import InputError
from data.barn.reward import true_reward
from data.files import write_json
from rlhf import policy, rewards
from rlhf.answers import questions, write_outputs
from rlhf.sampler import generate

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    n: int = 16                         # answers to each prompt

    def __post_init__(self):
        super().__post_init__()
        if self.eval_temperature == 0 and self.n > 1:
            raise InputError("--eval_temperature 0 makes all answers to a prompt equal: there is no best one")

    def idle(self):
        return super().idle() | dict.fromkeys(("merge", "tensorboard"), "this method trains nothing")


def kl_bound(n):
    """Upper bound of KL(best-of-n || policy) in nats. It is exact if no two answers have the same score."""
    return math.log(n) - (n - 1) / n


def best_of_k(scores, worth):
    """Expected worth of the answer with the highest score among k, for each prompt and k = 1 .. n: scores, worth (P, n)
    -> (P, n).

    The mean over all subsets of k answers, which is unbiased. The answer with the i-th lowest score (i from 1) is the
    best of a random subset with probability C(i - 1, k - 1) / C(n, k).
    """
    n = scores.shape[1]
    ranked = worth.gather(1, scores.argsort(1)).double()                                 # (P, n): worth by rank
    i = torch.arange(1, n + 1, dtype=torch.double)
    k = i[:, None]
    weights = (log_binomial(i - 1, k - 1) - log_binomial(torch.full_like(k, n), k)).exp()            # (k, rank)
    return ranked @ weights.T


def log_binomial(n, k):
    """log of n over k, -inf where k > n."""
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default what --reward chooses."""
    text = cfg.text()
    sft = policy.start(cfg)
    score_fn = score_fn or rewards.scorer(cfg, text, sft)
    records, prompts = questions(sft, text, cfg)
    rows = generate(sft, prompts, text, cfg, cfg.seed, cfg.n, judged=True, kept="answers")
    scores = score_fn(rows).view(len(prompts), cfg.n)                                    # (P, n)
    outputs = [text.decode(response) for _, response in rows]
    best = scores.argmax(1)                                                              # (P,)
    write_outputs(cfg, records, [outputs[i * cfg.n + j] for i, j in enumerate(best.tolist())])

    curve = {"n": list(range(1, cfg.n + 1)), "kl": [kl_bound(k) for k in range(1, cfg.n + 1)],
             "score": best_of_k(scores, scores).mean(0).tolist(), "random_score": [scores.mean().item()] * cfg.n}
    if cfg.data == "barn":
        truth = torch.tensor([true_reward(records[i // cfg.n]["instruction"], o) for i, o in enumerate(outputs)])
        truth = truth.view(scores.shape)                                                 # (P, n)
        curve |= {"true_reward": best_of_k(scores, truth).mean(0).tolist(),
                  "random_true_reward": [truth.mean().item()] * cfg.n}
    write_json(cfg.dir() / "curve.json", curve)
    for k in (2 ** i for i in range(cfg.n.bit_length())):
        print(" | ".join(f"{name} {values[k - 1]:.3g}" for name, values in curve.items()))
    for j in scores[0].argsort(descending=True).tolist():
        print(f"      {records[0]['instruction']!r} -> {outputs[j]!r} (score {scores[0, j]:.2f})")
    return {"objective/kl": kl_bound(cfg.n), "objective/scores": scores.max(1).values.mean().item(),
            "random/scores": scores.mean().item(), **rewards.spent(score_fn)}
