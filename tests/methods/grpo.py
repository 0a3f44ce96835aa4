"""GRPO: PPO's clipped update without a value function. The baseline of an answer is the mean of its group.

Shao et al. 2024 (arXiv 2402.03300), eq. 3 and 4: advantages are scores, standardised within the n answers to a prompt;
the KL to the reference is a loss (k3), not a part of the reward.
"""
from dataclasses import dataclass

from rlhf import config, policy, reward, update
from rlhf.answers import answer
from rlhf.experience import collect, schedule
from rlhf.logprobs import token_logps
from rlhf.ppo import KL, policy_loss

NEEDS = ("sft", "reward")


@dataclass
class Config(config.Config):
    lr: float = 1e-5                    # peak learning rate
    steps: int = 80                     # rollouts, each followed by one pass
    prompts: int = 64                   # prompts in a rollout
    n: int = 8                          # answers to each prompt: a group
    batch_size: int = 256               # answers in an optimizer step
    cliprange: float = .2               # how far the ratio of probabilities may move
    beta: float = .04                   # weight of the KL

    BARN = {"lr": 5e-4, "steps": 20, "prompts": 32, "batch_size": 64}


def advantages_of(score, n):
    """score (P * n,) -> advantages (P * n,): standardised within each prompt's n answers."""
    group = score.view(-1, n)
    return ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)).flatten()


def run(cfg, score_fn=None):
    text = cfg.text()
    prompts = text.prompts(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.load(cfg, "sft")
    model = ref.copy("policy")
    score_fn = score_fn or reward.scorer(reward.load(cfg, ref), cfg)
    updates = cfg.steps * -(-cfg.prompts * cfg.n // cfg.batch_size)
    updater = update.Updater(model.trainable(), cfg.lr, updates, fp16=model.fp16)
    log = update.Log(cfg.dir(), cfg.steps, ("reward", "kl", "clip_ratio"))
    for step, asked in enumerate(schedule(prompts, cfg.prompts, cfg.steps, cfg.seed)):
        roll = collect(asked, text, model, ref, score_fn, cfg, cfg.seed * 100_003 + step, cfg.n)
        advantages = advantages_of(roll.score, cfg.n)[:, None].expand(roll.mask.shape)   # (B, T-1)
        clipped = 0.
        for batch in update.batches(len(roll.rows), cfg.batch_size, 1, cfg.seed + step):
            for micro in update.micro_batches(batch, roll.lengths, cfg.micro_batch_tokens):
                ids, mask, old, ref_logp, a = roll.cut(micro, roll.logp, roll.ref_logp, advantages)
                logp = token_logps(model, ids, mask, cfg.temperature)                    # (b, t-1)
                weights = mask / mask.sum(1, keepdim=True)      # a mean over each answer's tokens, then over answers
                pg_loss, held = policy_loss(logp, old, a, weights, cfg.cliprange)
                kl_loss = (KL["k3"](logp - ref_logp) * weights).sum()
                updater.add(pg_loss + cfg.beta * kl_loss, len(micro))
                clipped += held.item()
            stats = updater.step()
        metrics = {"reward": roll.score.mean().item(), "kl": roll.kl(), "clip_ratio": clipped / len(roll.rows)}
        log.step(step, {**metrics, **stats}, sum(roll.lengths))
    policy.save(model, cfg)
    return {**metrics, **answer(model, text, cfg, ref)}
