"""Iterated DPO: DPO --rounds times, each time on new pairs of answers of the newest policy that annotators label.

Xiong et al. 2024 (arXiv 2312.11456) and Yuan et al. 2024 (arXiv 2401.10020). It lies between DPO, which has one round,
and online DPO, which has one for every few optimizer steps: people can be asked between rounds, not between steps.
Every round has its own prompts and its own learning rate schedule; the reference is the SFT model in all of them.
Left out: labels by the policy itself, more than two answers to a prompt.

Memory and money: as online DPO.
Questions a reader asks. Why does a round go on from the newest policy, and not from SFT as in expert iteration? Its
pairs say what is wrong with the answers of that policy. Why is the reference not the policy of the round before? Then
nothing would hold the last policy near the SFT model, only each near the one before it.
"""
from dataclasses import dataclass

from data import InputError
from rlhf import online_dpo, policy, rewards, update
from rlhf.answers import answer
from rlhf.dpo import all_logps
from rlhf.experience import schedule
from rlhf.pairs import pair_lengths

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    reward: str = "judge"               # judge, model, rule, true (barn), FILE.py:function, or a reward model's name
    rounds: int = 3                     # how often to sample, label and train
    prompts: int = 6000                 # prompts in a round, with one pair each
    lr: float = 2e-4                    # peak learning rate of a round
    beta: float = .1                    # strength of the pull to the reference: higher stays closer
    epochs: int = 2                     # passes over the pairs of a round
    batch_size: int = 16                # pairs in an optimizer step
    shared_prompt: bool = True          # compute the prompt of the two answers once; the same loss, faster

    BARN = {"prompts": 2000, "lr": 3e-4, "batch_size": 64}
    BARN_LORA = {"lr": 5e-4}


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,), by which answers are compared; by default what --reward chooses."""
    text = cfg.text()
    records = text.fitting(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.start(cfg)
    model = ref.copy("policy")
    compare, costs = rewards.comparer(cfg, text, ref, score_fn)
    steps = cfg.epochs * -(-cfg.prompts // cfg.batch_size)                               # at most, in a round
    log = update.Log(cfg, cfg.rounds * steps, ("loss", "rewards/margins", "rewards/accuracies"))
    for round, asked in log.resumed(schedule(records, cfg.prompts, cfg.rounds, cfg.seed), model, compare):
        # new pairs of the newest policy
        pairs = online_dpo.fresh_pairs(model, asked, text, compare, cfg, cfg.seed + 10_007 * (round + 1),
                                       kept=f"round{round + 1}")
        print(f"round {round + 1}/{cfg.rounds}: of {len(pairs)} of {len(asked)} pairs one answer is preferred")
        if not pairs:
            raise InputError("no answer of a pair is preferred to the other: raise --prompts or --temperature")
        online_dpo.show(round * steps, pairs[0], asked, text, log)

        # learn them
        ref_logps = all_logps(ref, pairs, cfg)                                           # (2, N)
        batches = update.batches(len(pairs), cfg.batch_size, cfg.epochs, cfg.seed + round)
        updater = update.Updater(model.trainable(), cfg.lr, len(batches), fp16=model.fp16)
        for step, batch in log.resumed(batches, model, updater):
            metrics = online_dpo.learn(model, pairs, ref_logps, batch, updater, cfg)
            log.step(round * steps + step, {**metrics, **costs()}, sum(pair_lengths([pairs[i] for i in batch])))

    policy.save(model, cfg)
    return {**log.last, **costs(), **answer(model, text, cfg, ref)}
