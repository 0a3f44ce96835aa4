"""Online DPO: the newest policy answers each prompt twice, annotators say which answer is better, and DPO learns it.

Guo et al. 2024 (arXiv 2402.04792). The loss is DPO's (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), the pairs are the
policy's own, so what is labelled is what it would say now. --reward model has the reward model label instead.
Left out: more than two answers to a prompt, tools against a reward model that likes long answers.

Memory: as DPO. Money: a label for each pair that no coin decides; judge/asked and judge/cost count what was paid for.
Questions a reader asks. Why does it need fewer labels than DPO? Pairs of the SFT model become pairs of answers that the
policy no longer gives. Why is the reward model not needed? Annotators compare the answers themselves; a reward model
would have to guess what they say, and could be fooled.
"""
from dataclasses import dataclass

import torch

from data.alpaca_eval import question
from data.progress import say_once
from rlhf import policy, rewards, update
from rlhf.answers import answer
from rlhf.dpo import all_logps, dpo_loss, logps, means
from rlhf.experience import schedule
from rlhf.pairs import pair_lengths, rows_of
from rlhf.sampler import generate

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config):
    reward: str = "judge"               # judge, model, rule, true (barn), FILE.py:function, or a reward model's name
    lr: float = 2e-4                    # peak learning rate
    beta: float = .1                    # strength of the pull to the reference: higher stays closer
    steps: int = 80                     # rounds of new pairs, each followed by updates
    prompts: int = 256                  # prompts in a step, with one pair each
    batch_size: int = 32                # pairs in an optimizer step
    num_iterations: int = 1             # passes over the pairs of a step
    shared_prompt: bool = True          # compute the prompt of the two answers once; the same loss, faster

    BARN = {"lr": 5e-4, "beta": .05, "steps": 40, "prompts": 128}
    BARN_LORA = {"lr": 1e-3}


def fresh_pairs(model, records, text, compare, cfg, seed, kept=""):
    """Pairs [(chosen row, rejected row)] of the policy's answers to these records, without ties; each record once.
    kept: as for generate()."""
    rows = generate(model, [text.prompt(record) for record in records], text, cfg, seed, 2, kept=kept)
    ones, twos = rows[::2], rows[1::2]
    return [(one, two) if preference < 1.5 else (two, one)
            for one, two, preference in zip(ones, twos, compare(ones, twos)) if preference != 1.5]


def show(step, pair, asked, text, log):
    """Log the two answers of a pair, which are answers to one of the records in `asked`."""
    record = next(record for record in asked if text.prompt(record) == pair[0][0])
    for name, (_, response) in zip(("chosen", "rejected"), pair):
        log.sample(step, question(record), f"{name}: {text.decode(response)}")


def learn(model, pairs, ref_logps, batch, updater, cfg):
    """One optimizer step of DPO on those of the pairs that are in the batch; DPO's metrics. ref_logps (2, N)."""
    lengths = pair_lengths(pairs)
    tokens = torch.tensor([[len(response) for _, response in pair] for pair in pairs], device=model.gpt.device).T
    sums = 0.
    for micro in update.micro_batches(batch, lengths, cfg.micro_batch_tokens):
        logp = logps(model, [pairs[i] for i in micro], cfg)                              # (2, b)
        losses, implicit = dpo_loss(logp, ref_logps[:, micro], tokens[:, micro], cfg)    # (b,), (2, b)
        updater.add(losses.sum(), len(micro), rows_of([pairs[i] for i in micro]))
        margins, right = implicit[0] - implicit[1], implicit[0] > implicit[1]
        sums = sums + torch.stack((losses, *implicit, margins, right.float(), *logp)).detach().sum(1)
    return {**means(sums, len(batch)), **updater.step()}


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,), by which answers are compared; by default what --reward chooses."""
    text = cfg.text()
    records = text.fitting(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.start(cfg)
    model = ref.copy("policy")
    compare, costs = rewards.comparer(cfg, text, ref, score_fn)
    updates = cfg.steps * cfg.num_iterations * -(-cfg.prompts // cfg.batch_size)
    updater = update.Updater(model.trainable(), cfg.lr, updates, fp16=model.fp16)
    log = update.Log(cfg, cfg.steps, ("loss", "rewards/margins", "rewards/accuracies"))
    for step, asked in log.resumed(schedule(records, cfg.prompts, cfg.steps, cfg.seed), model, updater, compare):
        pairs = fresh_pairs(model, asked, text, compare, cfg, cfg.seed * 100_003 + step)
        if not pairs:
            say_once("no answer of a step is preferred to the other: nothing is learned from it")
            continue
        ref_logps = all_logps(ref, pairs, cfg)                                           # (2, N)
        for batch in update.batches(len(pairs), cfg.batch_size, cfg.num_iterations, cfg.seed + step):
            metrics = learn(model, pairs, ref_logps, batch, updater, cfg)
        log.step(step, {**metrics, "pairs": len(pairs), **costs()}, sum(pair_lengths(pairs)))
        show(step, pairs[0], asked, text, log)
    policy.save(model, cfg)
    return {**log.last, **costs(), **answer(model, text, cfg, ref)}
