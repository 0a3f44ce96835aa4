"""Proximal policy optimisation against the reward model, with a KL penalty that keeps the policy near the SFT model.

Schulman et al. 2017 (arXiv 1707.06347), eq. 7 and 11, as in Ziegler et al. 2019 (arXiv 1909.08593) and AlpacaFarm
(arXiv 2305.14387). A step: sample answers, score them, pay a KL penalty at every token and the score at the last one,
estimate advantages (Schulman et al. 2016, arXiv 1506.02438, eq. 16), then a few epochs of clipped updates.
What AlpacaFarm does or offers otherwise is an option: --kl_estimator clamped, --whiten_rewards, --adaptive_kl 6.
Left out: dropout, entropy bonus, a separate optimizer for the value function.

Memory: policy, reference, reward model and value function. With LoRA they are four adapters on one frozen base, and
only two of them have gradients; with full training they are four models, two of them with an optimizer. Policy and
value function take turns in every micro-batch. The best policy so far is kept in host memory.

Questions a reader asks. Why is the KL inside the reward? Its gradient is then exactly that of the true KL if k1 is the
estimator (as a loss, k1 has none). Why may it be negative? It is an estimate from one sample; only its mean is a KL.
Why are log-probs computed again after sampling? So that the first ratio is 1 but for rounding, however was sampled.
"""
import math
from dataclasses import dataclass

import torch

from data import InputError, sets
from data.text import Text
from rlhf import config, logprobs, policy, reward, update
from rlhf.answers import answer
from rlhf.sampler import sample

NEEDS = ("sft", "reward")


@dataclass
class Config(config.Config):
    lr: float = 1e-5                    # peak learning rate, of policy and value function
    steps: int = 80                     # rollouts, each followed by updates
    rollout_batch: int = 512            # answers in a rollout
    batch_size: int = 256               # answers in an optimizer step
    num_ppo_epochs: int = 2             # passes over a rollout
    kl_coef: float = .05                # price of a nat of KL to the reference, in deviations of the reward
    kl_estimator: str = "k1"            # k1 (unbiased), k2, k3, or clamped: AlpacaFarm's max(k1, 0)
    adaptive_kl: float = 0.             # aim at this KL by moving kl_coef (Ziegler et al. 2019, 2.2); 0: fixed kl_coef
    max_kl: float = 0.                  # stop when the KL of a rollout exceeds this; 0: never
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

    BARN = {"lr": 5e-4, "steps": 20, "rollout_batch": 256, "batch_size": 64}
    BARN_LORA = {"lr": 1e-3}

    def __post_init__(self):
        super().__post_init__()
        for name, value, known in (("kl_estimator", self.kl_estimator, KL),
                                   ("init_value", self.init_value, ("reward", "sft"))):
            if value not in known:
                raise InputError(f"--{name} {value!r} is not known: choose from {', '.join(known)}")
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
    """score (B,), kl (B, T-1) per token -> rewards (B, T-1): the penalty everywhere, the score at the last token."""
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(score), device=score.device), logprobs.last_token(mask)] += score
    return rewards


def variance(x, mask):
    return update.masked_mean((x - update.masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean=True):
    """x with masked deviation 1, and masked mean 0 if shift_mean."""
    mean = update.masked_mean(x, mask)
    white = (x - mean) / (variance(x, mask).sqrt() + 1e-8)
    return (white if shift_mean else white + mean) * mask


def gae(rewards, values, mask, gamma, lam):
    """(B, T-1) each -> advantages, returns; 0 outside the mask, and nothing is worth anything after the last token."""
    values = values * mask
    advantages, ahead, after = torch.zeros_like(values), 0., 0.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]                             # (B,)
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t], after = ahead, values[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(logp, old_logp, advantages, mask, cliprange):
    """Clipped surrogate, summed over tokens, and how many tokens the clip holds back."""
    ratio = ((logp - old_logp) * mask).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return (torch.max(free, clipped) * mask).sum(), ((clipped > free) * mask).sum()


def value_loss(values, old_values, returns, mask, cliprange):
    """Clipped squared error, summed over tokens, and how many tokens the clip holds back."""
    near = torch.max(torch.min(values, old_values + cliprange), old_values - cliprange)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return .5 * (torch.max(free, clipped) * mask).sum(), ((clipped > free) * mask).sum()


# -- the loop ------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """Sampled answers and all that stays fixed while they are learned from."""
    ids: torch.Tensor                   # (B, T)
    mask: torch.Tensor                  # (B, T-1)
    old_logp: torch.Tensor              # (B, T-1) when sampled
    ref_logp: torch.Tensor              # (B, T-1)
    values: torch.Tensor                # (B, T-1) of the state before ids[:, t+1]
    score: torch.Tensor                 # (B,) of the reward model, less the penalty
    lengths: list                       # (B,) tokens of prompt and answer
    finished: list                      # (B,) whether the answer ended by itself

    def kl(self):
        """The unbiased estimate (k1) of the KL to the reference, per answer, in nats."""
        return ((self.old_logp - self.ref_logp) * self.mask).sum(1).mean().item()


@torch.no_grad()
def rollout(prompts, stops, model, ref, reward_model, value, cfg, seed):
    """Sample an answer to each prompt, and look at it with every role; FloatingPointError if a number is not finite."""
    rows = sample(model, prompts, stops, cfg.max_new_tokens, cfg.temperature, seed, 1, cfg.slots, cfg.graph)
    ids, mask = logprobs.pack(rows, model.gpt.device)
    old_logp, ref_logp, values = (torch.zeros(mask.shape, device=ids.device) for _ in range(3))
    score = torch.zeros(len(rows), device=ids.device)
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    for micro in update.micro_batches(range(len(rows)), lengths, 2 * cfg.micro_batch_tokens):
        t = max(lengths[i] for i in micro)                                               # the rest is padding
        i, m = ids[micro, :t], mask[micro, :t - 1]
        old_logp[micro, :t - 1] = logprobs.token_logps(model, i, m, cfg.temperature)
        ref_logp[micro, :t - 1] = logprobs.token_logps(ref, i, m, cfg.temperature)
        values[micro, :t - 1] = value.values(i, m)
        score[micro] = reward.score(reward_model, i, m)
    finished = [response[-1] in stops for _, response in rows]
    score -= cfg.missing_eos_penalty * ~torch.tensor(finished, device=ids.device)
    for name, x in (("reward model", score), ("value function", values)):
        if not x.isfinite().all():
            raise FloatingPointError(f"the {name} gave a number that is not finite: the run stopped and saved nothing")
    return Rollout(ids, mask, old_logp, ref_logp, values, score, lengths, finished)


def learn(model, value, updater, roll, advantages, returns, cfg, seed):
    """Passes over a rollout in batches, an optimizer step for each. Returns what to log: means over tokens."""
    sums, spoken = 0., roll.mask.sum(1).tolist()                                         # tokens of each answer
    for batch in update.batches(len(spoken), cfg.batch_size, cfg.num_ppo_epochs, seed):
        for micro in update.micro_batches(batch, roll.lengths, cfg.micro_batch_tokens):
            t = max(roll.lengths[i] for i in micro)
            ids, m = roll.ids[micro, :t], roll.mask[micro, :t - 1]
            old, v, a, r = (x[micro, :t - 1] for x in (roll.old_logp, roll.values, advantages, returns))
            logp = logprobs.token_logps(model, ids, m, cfg.temperature)                    # (b, t-1)
            pg, pg_clipped = policy_loss(logp, old, a, m, cfg.cliprange)
            updater.add(pg, sum(spoken[i] for i in micro))
            values = value.values(ids, m)                                                # (b, t-1)
            vf, vf_clipped = value_loss(values, v, r, m, cfg.cliprange_value)
            updater.add(cfg.vf_coef * vf, 0)            # the policy's activations are gone by now
            ratio = (logp - old).exp()
            each = (pg, vf, pg_clipped, vf_clipped, ((logp - old) ** 2 / 2).sum(), (ratio * m).sum(), m.sum())
            sums = sums + torch.stack(each).detach()
        stats = updater.step()
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "policy/approxkl_avg",
             "val/ratio")
    return {**dict(zip(names, (sums[:-1] / sums[-1]).tolist())), **stats}


def run(cfg):
    text = Text(*cfg.words)
    splits = sets.load(cfg.data, cfg.eval_data, cfg.limit)
    prompts, val = ([text.prompt(record) for record in text.fitting(splits[split], cfg.max_prompt_tokens)]
                    for split in ("unlabeled", "val"))
    val = val[:cfg.val_prompts]
    ref = policy.load(cfg, "sft")
    reward_model = reward.load(cfg, ref)
    model = ref.copy("policy")
    value = reward_model.copy("value") if cfg.init_value == "reward" else reward.fresh(ref.copy("value"))
    roles = model, ref, reward_model, value

    passes = math.ceil(cfg.steps * cfg.rollout_batch / len(prompts))
    order = [i for once in update.batches(len(prompts), len(prompts), passes, cfg.seed) for i in once]
    updates = cfg.num_ppo_epochs * math.ceil(cfg.rollout_batch / cfg.batch_size)
    updater = update.Updater(model.trainable() + value.trainable(), cfg.lr, cfg.steps * updates,
                             fp16=model.fp16)
    log = update.Log(cfg.dir(), cfg.steps, ("objective/scores", "objective/kl", "objective/rlhf_reward",
                                            "policy/clipfrac_avg"))
    kl_coef, best, chosen, kept = cfg.kl_coef, -math.inf, 0, []

    def look(step):
        """Keep the policy if it is the best so far at what it is trained for, on prompts that it is not trained on."""
        nonlocal best, chosen, kept
        roll = rollout(val, text.stops, *roles, cfg, cfg.seed)
        score, objective = roll.score.mean().item(), roll.score.mean().item() - cfg.kl_coef * roll.kl()
        i = step % len(val)
        response = roll.ids[i, len(val[i]):roll.lengths[i]].tolist()
        log.sample(step, text.decode(val[i]), text.decode(response), score=roll.score[i].item(), val_score=score,
                   val_kl=roll.kl())
        if objective > best:
            best, chosen, kept = objective, step, [p.detach().cpu().clone() for p in model.trainable()]

    for step in range(cfg.steps):
        # sample answers and score them
        asked = [prompts[i] for i in order[step * cfg.rollout_batch:][:cfg.rollout_batch]]
        roll = rollout(asked, text.stops, *roles, cfg, cfg.seed * 100_003 + step)
        mask = roll.mask

        # rewards and advantages
        kl = KL[cfg.kl_estimator](roll.old_logp - roll.ref_logp) * mask                  # (B, T-1)
        rewards = shape_rewards(roll.score, kl, mask, kl_coef)                           # (B, T-1)
        shaped = whiten(rewards, mask, shift_mean=False) if cfg.whiten_rewards else rewards
        advantages, returns = gae(shaped, roll.values, mask, cfg.gamma, cfg.lam)         # (B, T-1)
        advantages = whiten(advantages, mask)

        # a few epochs of clipped updates
        learned = learn(model, value, updater, roll, advantages, returns, cfg, cfg.seed + step)
        log.step(step, {
            "objective/kl": roll.kl(), "objective/scores": roll.score.mean().item(), "objective/kl_coef": kl_coef,
            "objective/non_score_reward": -kl_coef * kl.sum(1).mean().item(),
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/entropy": -roll.old_logp.sum(1).mean().item(), **learned,
            "val/num_eos_tokens": sum(roll.finished), "response_length": (mask.sum() / len(asked)).item(),
            "explained_variance": explained_variance(roll.values, returns, mask)}, sum(roll.lengths))
        if cfg.adaptive_kl:
            kl_coef *= 1 + .1 * max(-.2, min(.2, roll.kl() / cfg.adaptive_kl - 1))
        stop = cfg.max_kl and roll.kl() > cfg.max_kl
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps or stop:
            look(step)
        if stop:
            print(f"stopped: the KL is above --max_kl {cfg.max_kl:g}")
            break

    with torch.no_grad():
        for p, best_p in zip(model.trainable(), kept):
            p.copy_(best_p)
    policy.save(model, cfg)
    return {"chosen_step": chosen, "val/rlhf_reward": best, **answer(model, text, cfg, ref)}


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns), both masked: 1 is a perfect value function, 0 a constant one."""
    return 1 - (variance(returns - values, mask) / variance(returns, mask)).nan_to_num(1).item()
