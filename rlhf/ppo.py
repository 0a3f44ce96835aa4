"""Proximal policy optimisation against the reward model, with a KL penalty that keeps the policy near the SFT model.

Schulman et al. 2017 (arXiv 1707.06347), eq. 7 and 11, as in Ziegler et al. 2019 (arXiv 1909.08593) and AlpacaFarm
(arXiv 2305.14387). A step: sample answers, score them, pay a KL penalty at every token and the score at the last one,
estimate advantages (Schulman et al. 2016, arXiv 1506.02438, eq. 16), then a few epochs of clipped updates.
What AlpacaFarm does or offers otherwise is an option: --kl_estimator clamped, --whiten_rewards, --adaptive_kl 6.
Left out: dropout, entropy bonus, a separate optimizer for the value function.

Memory: policy, reference, reward model and value function. With LoRA they are four adapters on one frozen base, and
only two of them have gradients; with full training they are four models, two of them with an optimizer. The best policy
so far is kept in host memory.

Questions a reader asks. Why is the KL inside the reward? As a reward, k1 gives the gradient of the true KL; as a loss,
its gradient is zero on average. Why may it be negative? It is an estimate from one sample; only its mean is a KL. Why
are log-probs computed again after sampling in 16 bits? There the sampler's differ from those of training by more than
rounding, and the first ratio has to be 1. In fp32 the sampler's are used.
"""
import math
from dataclasses import dataclass

import torch

from data import InputError
from data.alpaca_eval import question
from data.progress import say_once
from rlhf import policy, reward, rewards, update
from rlhf.answers import answer
from rlhf.experience import collect, schedule
from rlhf.logprobs import last_token, token_logps
from rlhf.rewards import scorer, spent
from rlhf.state import Kept

NEEDS = ("sft", "reward")
METRICS = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "policy/approxkl_avg",
           "val/ratio")


@dataclass
class Config(rewards.Config):
    lr: float = 2e-4                    # peak learning rate, of policy and value function
    steps: int = 80                     # rollouts, each followed by updates
    rollout_batch: int = 256            # answers in a rollout
    batch_size: int = 32                # answers in an optimizer step
    num_ppo_epochs: int = 2             # passes over a rollout
    kl_coef: float = .05                # price of a nat of KL to the reference, in deviations of the reward
    kl_estimator: str = "k1"            # k1 (unbiased), k2, k3, or clamped: AlpacaFarm's max(k1, 0)
    adaptive_kl: float = 0.             # aim at this KL by moving kl_coef (Ziegler et al. 2019, 2.2); 0: fixed kl_coef
    max_kl: float = 0.                  # stop when the KL of a rollout is above this; 0: never
    gamma: float = 1.                   # discount of later rewards
    lam: float = .95                    # GAE's lambda: 1 trusts only rewards, 0 only values
    cliprange: float = .2               # how far the ratio of probabilities may move
    cliprange_value: float = .2         # how far a value may move
    vf_coef: float = .1                 # weight of the value loss
    whiten_rewards: bool = False        # give rewards deviation 1 around their mean
    missing_eos_penalty: float = 1.     # taken from the score of an answer that did not end
    init_value: str = "reward"          # the value function starts as a copy of the reward model, or as sft with head 0
    eval_every: int = 5                 # steps between looks at val, where the best policy is chosen
    val_prompts: int = 512              # prompts of val in a look
    snapshots: bool = False             # at each look answer the eval split, too: outputs_5.json is after 5 steps

    CHOICES = {"kl_estimator": ("k1", "k2", "k3", "clamped"), "init_value": ("reward", "sft")}
    BARN = {"lr": 5e-4, "steps": 20, "rollout_batch": 256, "batch_size": 64}
    BARN_LORA = {"lr": 1e-3}

    def idle(self):
        alone = {} if self.reward == "model" else {"init_value": "there is no reward model to start from"}
        return super().idle() | alone

    def __post_init__(self):
        super().__post_init__()
        if max(self.gamma, self.lam) > 1:
            raise InputError("--gamma and --lam are at most 1, or later rewards would count more than present ones")


# -- the algorithm as functions of tensors -------------------------------------------------------------------------

KL = {  # J. Schulman, "Approximating KL divergence" (2020), with d = log pi - log ref on tokens sampled from pi
    "k1": lambda d: d,
    "k2": lambda d: d ** 2 / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
    "clamped": lambda d: d.clamp(min=0),
}


def shape_rewards(score, kl, mask, kl_coef):
    """score (B,), kl (B, T-1) per token -> rewards (B, T-1): the penalty at each token under the mask, the score at the
    last of them, and 0 elsewhere, whatever kl holds there."""
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(score), device=score.device), last_token(mask)] += score
    return rewards


def variance(x, mask):
    return update.masked_mean((x - update.masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean=True):
    """x (B, T-1) scaled to a masked standard deviation of 1, the root of variance(), and shifted to a masked mean of 0
    if shift_mean, else with the mean that it had. 0 outside the mask. If all values are equal, they are not scaled."""
    mean = update.masked_mean(x, mask)
    white = (x - mean) / (variance(x, mask).sqrt() + 1e-8)
    return (white if shift_mean else white + mean) * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): rewards, values, mask (B, T-1) -> advantages,
    returns (B, T-1), 0 outside the mask. The value after the last token is 0, whatever `values` holds there."""
    values = values * mask
    advantages, ahead, after = torch.zeros_like(values), 0., 0.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]                             # (B,)
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t], after = ahead, values[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(logp, old_logp, advantages, mask, cliprange, cliprange_high=None):
    """Clipped surrogate (Schulman et al. 2017, eq. 7) as a loss, summed over tokens, and how many tokens have a larger
    loss because they are clipped. All tensors are (B, T-1), and count nowhere outside the mask. It may hold weights
    instead of 0 and 1: they weigh the tokens in both sums. cliprange_high: how far the ratio may rise, if not as far as
    it may fall."""
    ratio = (logp - old_logp).masked_fill(mask == 0, 0).exp()
    high = cliprange if cliprange_high is None else cliprange_high
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + high)
    return (torch.max(free, clipped) * mask).sum(), ((clipped > free) * mask).sum()


def value_loss(values, old_values, returns, mask, cliprange):
    """Clipped squared error, halved and summed over tokens, and how many tokens are clipped. All (B, T-1)."""
    near = torch.max(torch.min(values, old_values + cliprange), old_values - cliprange)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return .5 * (torch.max(free, clipped) * mask).sum(), ((clipped > free) * mask).sum()


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns), both masked: 1 is a perfect value function, 0 a constant one."""
    return 1 - (variance(returns - values, mask) / variance(returns, mask)).nan_to_num(1).item()


# -- the loop ------------------------------------------------------------------------------------------------------

def run(cfg, score_fn=None):
    """score_fn: rows [(prompt ids, response ids)] -> scores (B,); by default what --reward chooses."""
    text = cfg.text()
    splits = cfg.splits()
    prompts = text.prompts(splits["unlabeled"], cfg.max_prompt_tokens)
    val = text.fitting(splits["val"], cfg.max_prompt_tokens)[:cfg.val_prompts]
    val_prompts = [text.prompt(record) for record in val]
    ref = policy.start(cfg)
    reward_model = reward.load(cfg, ref) if score_fn is None and cfg.reward == "model" else None
    score_fn = score_fn or scorer(cfg, text, ref, reward_model)
    model = ref.copy("policy")
    if reward_model and cfg.init_value == "reward":
        value = reward_model.copy("value")
    else:
        value = reward.fresh(ref.copy("value"))

    updates = cfg.steps * cfg.num_ppo_epochs * math.ceil(cfg.rollout_batch / cfg.batch_size)
    updater = update.Updater(model.trainable() + value.trainable(), cfg.lr, updates, fp16=model.fp16)
    log = update.Log(cfg, cfg.steps, ("objective/scores", "objective/kl", "objective/rlhf_reward",
                                            "policy/clipfrac_avg"))
    now = Kept(kl_coef=cfg.kl_coef, best=-math.inf, chosen_step=0, weights=[])
    asked_of = schedule(prompts, cfg.rollout_batch, cfg.steps, cfg.seed)
    for step, asked in log.resumed(asked_of, model, value, updater, score_fn, now):
        # sample answers, score them, estimate values
        roll = collect(asked, text, model, ref, score_fn, cfg, cfg.seed * 100_003 + step)
        mask = roll.mask
        values = roll.per_token(value.values, cfg)                                       # (B, T-1)
        if not values.isfinite().all():
            raise update.NotFinite("a value is not a finite number: the run stopped and saved nothing", roll.rows)

        # rewards and advantages
        kl = KL[cfg.kl_estimator](roll.logp - roll.ref_logp) * mask                      # (B, T-1)
        rewards = shape_rewards(roll.score, kl, mask, now.kl_coef)                       # (B, T-1)
        shaped = whiten(rewards, mask, shift_mean=False) if cfg.whiten_rewards else rewards
        advantages, returns = gae(shaped, values, mask, cfg.gamma, cfg.lam)              # (B, T-1)
        advantages = whiten(advantages, mask)
        if step % cfg.eval_every == 0:
            roll.keep(step, text, log, kl=kl, value=values, reward=rewards, advantage=advantages)

        # a few epochs of clipped updates; policy and value function take turns in every micro-batch
        sums = 0.
        for batch in update.batches(len(asked), cfg.batch_size, cfg.num_ppo_epochs, cfg.seed + step):
            for micro in update.micro_batches(batch, roll.lengths, cfg.micro_batch_tokens):
                ids, m, old_logp, old_v, a, r = roll.cut(micro, roll.logp, values, advantages, returns)
                logp = token_logps(model, ids, m, cfg.temperature)                       # (b, t-1)
                pg_loss, pg_clipped = policy_loss(logp, old_logp, a, m, cfg.cliprange)
                rows = [roll.rows[i] for i in micro]
                updater.add(pg_loss, sum(len(response) for _, response in rows), rows)   # per token of the answers
                v = value.values(ids, m)                                                 # (b, t-1)
                vf_loss, vf_clipped = value_loss(v, old_v, r, m, cfg.cliprange_value)
                updater.add(cfg.vf_coef * vf_loss, 0)
                d = logp - old_logp
                sums = sums + torch.stack((pg_loss, vf_loss, pg_clipped, vf_clipped, (d ** 2 / 2).sum(),
                                           (d.exp() * m).sum(), m.sum())).detach()
            stats = updater.step()

        log.step(step, {
            "objective/kl": roll.kl(), "objective/scores": roll.score.mean().item(), "objective/kl_coef": now.kl_coef,
            "objective/non_score_reward": -now.kl_coef * kl.sum(1).mean().item(),
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/entropy": -roll.logp.sum(1).mean().item(),
            **dict(zip(METRICS, (sums[:-1] / sums[-1]).tolist())), **stats,
            "val/num_eos_tokens": roll.finished.sum().item(), "response_length": (mask.sum() / len(asked)).item(),
            "explained_variance": explained_variance(values, returns, mask)}, sum(roll.lengths))
        if 2 * step >= cfg.steps and log.last["explained_variance"] <= 0:
            say_once("the value function explains nothing of the returns: try a higher --vf_coef")
        if cfg.adaptive_kl:
            now.kl_coef *= 1 + .1 * max(-.2, min(.2, roll.kl() / cfg.adaptive_kl - 1))

        # keep the policy that is best at its objective on prompts that it is not trained on
        stop = cfg.max_kl and roll.kl() > cfg.max_kl
        if stop or (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            look, i = collect(val_prompts, text, model, ref, score_fn, cfg, cfg.seed), step % len(val)
            score, val_kl = look.score.mean().item(), look.kl()
            log.sample(step, question(val[i]), text.decode(look.rows[i][1]), score=look.score[i].item(),
                       val_score=score, val_kl=val_kl)
            if cfg.snapshots:
                answer(model, text, cfg, file=f"outputs_{step + 1}.json")
            objective = score - cfg.kl_coef * val_kl
            if objective > now.best:
                now.best, now.chosen_step = objective, step
                now.weights = [p.detach().cpu().clone() for p in model.trainable()]
        if stop:
            print(f"stopped: the KL is above --max_kl {cfg.max_kl:g}")
            break

    with torch.no_grad():
        for p, best_p in zip(model.trainable(), now.weights):
            p.copy_(best_p)
    policy.save(model, cfg)
    return {"chosen_step": now.chosen_step, "val/rlhf_reward": now.best, **spent(score_fn),
            **answer(model, text, cfg, ref)}
