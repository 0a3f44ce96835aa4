"""Best-of-n: sample n answers, give the one that the reward model likes best. No training: the method is all sampling.

Stiennon et al. 2020 (arXiv 2009.01325); one of AlpacaFarm's methods (arXiv 2305.14387). Its
KL to the SFT model is at most log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879). One pool of answers gives
the whole curve over n: how good the best of k is on average, for every k up to n, by the scores and (in the offline
world) by the true reward, beside a random one of the k as control. The curve is in curve.json.
Left out: training on the winners (expert_iteration.py).

Memory: the SFT model and the reward model, without gradients.
Questions a reader asks. Why does the curve need no further samples? Any k of the n are a sample of size k; the
probability that the i-th best of n is the best of k is a quotient of binomials. Why may the true reward fall where the
score still rises? The best of many is also the one that the reward model is most wrong about.
"""
import json
import math
from dataclasses import dataclass

import torch

from data.barn.reward import true_reward
from rlhf import config, policy, reward
from rlhf.answers import questions, write_outputs
from rlhf.sampler import generate

NEEDS = ("sft", "reward")


@dataclass
class Config(config.Config):
    n: int = 16                         # answers to each prompt


def kl_bound(n):
    """Upper bound of KL(best-of-n || policy) in nats, tight where no two answers tie."""
    return math.log(n) - (n - 1) / n


def best_of_k(scores, worth):
    """Expected worth of the best-scored of k answers, for k = 1 .. n: scores, worth (P, n) -> (n,).

    Unbiased, from all subsets at once: the i-th worst of n (i from 1) is the best of a random k-subset with probability
    C(i - 1, k - 1) / C(n, k).
    """
    n = scores.shape[1]
    ranked = worth.gather(1, scores.argsort(1)).double().mean(0)                         # (n,): mean worth by rank
    i = torch.arange(1, n + 1, dtype=torch.double)
    k = i[:, None]
    weights = (log_binomial(i - 1, k - 1) - log_binomial(torch.full_like(k, n), k)).exp()            # (k, rank)
    return weights @ ranked


def log_binomial(n, k):
    """log of n over k, -inf where k > n."""
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default the reward model of the run."""
    text = cfg.text()
    sft = policy.load(cfg, "sft")
    score_fn = score_fn or reward.scorer(reward.load(cfg, sft), cfg)
    records, prompts = questions(sft, text, cfg)
    rows = generate(sft, prompts, text, cfg, cfg.seed, cfg.n)
    scores = score_fn(rows).view(len(prompts), cfg.n)                                    # (P, n)
    outputs = [text.decode(response) for _, response in rows]
    best = scores.argmax(1)                                                              # (P,)
    write_outputs(cfg, records, [outputs[i * cfg.n + j] for i, j in enumerate(best.tolist())])

    curve = {"n": list(range(1, cfg.n + 1)), "kl": [kl_bound(k) for k in range(1, cfg.n + 1)],
             "score": best_of_k(scores, scores).tolist(), "random_score": [scores.mean().item()] * cfg.n}
    if cfg.data == "barn":
        truth = torch.tensor([true_reward(records[i // cfg.n]["instruction"], o) for i, o in enumerate(outputs)])
        truth = truth.view(scores.shape)                                                 # (P, n)
        curve |= {"true_reward": best_of_k(scores, truth).tolist(),
                  "random_true_reward": [truth.mean().item()] * cfg.n}
    (cfg.dir() / "curve.json").write_text(json.dumps(curve, indent=1))
    for k in (2 ** i for i in range(cfg.n.bit_length())):
        print(" | ".join(f"{name} {values[k - 1]:.3g}" for name, values in curve.items()))
    for j in scores[0].argsort(descending=True).tolist():
        print(f"      {records[0]['instruction']!r} -> {outputs[j]!r} (score {scores[0, j]:.2f})")
    return {"objective/kl": kl_bound(cfg.n), "objective/scores": scores.max(1).values.mean().item(),
            "random/scores": scores.mean().item()}
