"""REINFORCE with a baseline: raise the probability of answers that are better than the others of the same rollout.

Williams 1992, "Simple statistical gradient-following algorithms"; for language models Ahmadian et al. 2024 (arXiv
2402.14740), eq. 3. A step: one answer to each prompt, its score less the price of its KL (k1), and one update by
-(reward - baseline) log pi(answer). The baseline is the mean reward of the other answers. The loop is GRPO's.
Left out: several updates from a rollout, for which ratios and clipping (rloo.py, ppo.py) are made.

Memory: as GRPO.
Questions a reader asks. Why any baseline? It does not change the mean of the gradient, and lowers its variance. What
does a baseline of all prompts miss? Some prompts are harder than others, and that difference stays in the variance:
answers to the same prompt (rloo.py) or a value function (ppo.py) take it out.
"""
from dataclasses import dataclass

from rlhf import grpo, rewards

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    lr: float = 2e-4                    # peak learning rate
    steps: int = 160                    # rollouts, each followed by one update
    prompts: int = 256                  # prompts in a rollout, one answer to each
    kl_coef: float = .05                # price of a nat of KL to the reference, in deviations of the reward
    missing_eos_penalty: float = 1.     # taken from the score of an answer that did not end

    n = num_iterations = 1              # one answer to each prompt, and one update from it

    LEAST = {"prompts": 2}
    BARN = {"lr": 5e-4, "steps": 120, "prompts": 64}
    BARN_LORA = {"lr": 1e-3}

    @property
    def batch_size(self):
        return self.prompts


def others_mean(roll, cfg):
    """Advantages (B,): total rewards less the mean of all others."""
    total = roll.total(cfg.kl_coef)                                                      # (B,)
    return total - (total.sum() - total) / (len(total) - 1)


def reinforce_loss(logp, old_logp, ref_logp, advantages, mask, cfg):
    """Arguments and results as of grpo.grpo_loss(). Nothing is clipped."""
    return -(advantages * (logp * mask).sum(1)).sum(), len(mask), logp.new_zeros(())


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default what --reward chooses."""
    return grpo.run(cfg, score_fn, others_mean, reinforce_loss)
