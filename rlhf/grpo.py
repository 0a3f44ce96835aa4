"""Group-relative policy optimisation: PPO without a value function. An answer's baseline is the mean of its group.

Shao et al. 2024 (arXiv 2402.03300), eq. 3 and 4: n answers to each prompt, scores standardised within each group, then
clipped updates; the KL to the reference is a part of the loss, not of the reward. Flags make it Dr. GRPO (2503.20783),
DAPO (2503.14476) or GSPO (2507.18071). Left out: PPO's choice of the best step, DAPO's resampling of even groups.

Memory: as PPO without the value function and its optimizer. Questions a reader asks. Why is the loss near 0? A group's
advantages add up to 0 at ratios of 1. How is beta not PPO's kl_coef? It weighs the KL of a token, not of an answer.
"""
from dataclasses import dataclass

import torch

from rlhf import policy, rewards, update
from rlhf.answers import answer
from rlhf.experience import collect, schedule
from rlhf.logprobs import token_logps
from rlhf.ppo import KL, policy_loss

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    lr: float = 2e-4                    # peak learning rate
    steps: int = 80                     # rollouts, each followed by updates
    prompts: int = 64                   # prompts in a rollout
    n: int = 8                          # answers to each prompt: a group
    batch_size: int = 256               # answers in an optimizer step
    num_iterations: int = 1             # passes over a rollout
    beta: float = .05                   # weight of the KL to the reference in the loss; 0 will do for a rule
    kl_estimator: str = "k3"            # of that KL: k3, or k2, whose gradient is that of the true KL
    cliprange: float = .2               # how far the ratio of probabilities may fall
    cliprange_high: float = .2          # how far it may rise; DAPO: 0.28
    scale_rewards: bool = True          # divide advantages by the deviation of their group; Dr. GRPO does not
    loss_type: str = "grpo"             # mean over tokens, then answers; dapo: over all tokens; dr_grpo: sum / longest
    level: str = "token"                # a ratio for each token, or for each sequence, as in GSPO: the geometric mean
    missing_eos_penalty: float = 1.     # taken from the score of an answer that did not end

    LEAST = {"n": 2}
    CHOICES = {"kl_estimator": ("k2", "k3"), "loss_type": ("grpo", "dapo", "dr_grpo"), "level": ("token", "sequence")}
    BARN = {"lr": 5e-4, "steps": 40, "prompts": 32, "batch_size": 64, "scale_rewards": False}   # or 5 points less
    BARN_LORA = {"lr": 1e-3}


def group_advantages(roll, cfg):
    """Advantages (B,): scores less the mean of their group, if cfg.scale_rewards in its standard deviations (n - 1).
    roll.score (B,): the cfg.n answers to a prompt, a group, are neighbours. If all are equal, all advantages are 0."""
    group = roll.score.view(-1, cfg.n)                                                   # (P, n)
    centred = group - group.mean(1, keepdim=True)
    return (centred / (group.std(1, keepdim=True) + 1e-4) if cfg.scale_rewards else centred).flatten()


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, cfg):
    """The loss of b answers as (sum, denominator), and what of it is clipped, likewise a sum; log-probs (b, t-1)."""
    tokens, change = mask.sum(1, keepdim=True), (logp - old_logp) * mask
    if cfg.level == "sequence":
        change = (change.sum(1, keepdim=True) / tokens).expand(mask.shape)
    weights = mask / {"grpo": tokens, "dapo": 1, "dr_grpo": cfg.max_new_tokens}[cfg.loss_type]
    loss, clipped = policy_loss(change, 0 * change, advantages[:, None], weights, cfg.cliprange, cfg.cliprange_high)
    loss = loss + cfg.beta * (KL[cfg.kl_estimator]((logp - ref_logp) * mask) * weights).sum()
    return loss, mask.sum().item() if cfg.loss_type == "dapo" else len(mask), clipped


def run(cfg, score_fn=None, advantage_fn=group_advantages, loss_fn=grpo_loss):
    """score_fn: rows -> (B,); by default what --reward chooses. The two other functions may be a variant's own."""
    text = cfg.text()
    unlabeled = text.fitting(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.start(cfg)
    model = ref.copy("policy")
    score_fn = score_fn or rewards.scorer(cfg, text, ref)
    updates = cfg.steps * cfg.num_iterations * -(-cfg.prompts * cfg.n // cfg.batch_size)
    updater = update.Updater(model.trainable(), cfg.lr, updates, fp16=model.fp16)
    log = update.Log(cfg, cfg.steps, ("reward", "objective/kl", "clip_ratio/region_mean"))
    for step, asked in log.resumed(schedule(unlabeled, cfg.prompts, cfg.steps, cfg.seed), model, updater, score_fn):
        roll = collect(list(map(text.prompt, asked)), text, model, ref, score_fn, cfg, cfg.seed * 100_003 + step, cfg.n)
        advantages, sums = advantage_fn(roll, cfg), 0.                                   # (B,)
        for batch in update.batches(len(roll.rows), cfg.batch_size, cfg.num_iterations, cfg.seed + step):
            for micro in update.micro_batches(batch, roll.lengths, cfg.micro_batch_tokens):
                ids, mask, old_logp, ref_logp = roll.cut(micro, roll.logp, roll.ref_logp)
                logp = token_logps(model, ids, mask, cfg.temperature)                    # (b, t-1)
                loss, denominator, clipped = loss_fn(logp, old_logp, ref_logp, advantages[micro], mask, cfg)
                updater.add(loss, denominator, [roll.rows[i] for i in micro])
                sums = sums + torch.stack((loss, clipped, loss.new_tensor(denominator))).detach()
            stats = updater.step()
        loss, clipped = (sums[:2] / sums[2]).tolist()
        log.step(step, {**roll.metrics(), "loss": loss, "clip_ratio/region_mean": clipped, **stats}, sum(roll.lengths))
        roll.show(step, asked[0], text, log, kl=roll.logp - roll.ref_logp, advantage=advantages[:, None] * roll.mask)
    policy.save(model, cfg)
    return {**log.last, **rewards.spent(score_fn), **answer(model, text, cfg, ref)}
