"""Expert iteration: best-of-n on new prompts, then supervised fine-tuning on the winners, --rounds times.

Anthony et al. 2017 (arXiv 1705.08439). AlpacaFarm (arXiv 2305.14387) does one round: best-of-16 on the unlabeled split,
then SFT on the winners, from the SFT model with the SFT settings. Later rounds sample from the newest model (RAFT, Dong
et al. 2023, arXiv 2304.06767). Winners that were cut off by their length are dropped, because a model that imitates
them forgets to stop.

Memory: SFT model, reward model and the model that learns, with its optimizer while it is trained.
Questions a reader asks. Why is it weaker than best-of-n? Best-of-n searches again for every prompt; this model has to
learn from a few thousand searches how to do without. Why does each round train from the SFT model? The winners of the
newest round are better examples; training on top of earlier rounds would drift further from SFT without need.
"""
import math
from dataclasses import dataclass

from data import InputError
from data.alpaca_eval import question
from rlhf import policy, rewards, sft, update
from rlhf.answers import answer
from rlhf.sampler import generate

NEEDS = ("sft", "reward")


@dataclass
class Config(rewards.Config, sft.Imitation):
    rounds: int = 1                     # how often to sample and train
    n: int = 16                         # answers to each prompt
    prompts: int = 20_000               # prompts of the unlabeled split in a round

    BARN = {**sft.Imitation.BARN, "prompts": 1000, "n": 8, "lr": 5e-4}
    BARN_LORA = {"lr": 2e-3}


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default what --reward chooses."""
    text = cfg.text()
    unlabeled = text.fitting(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.start(cfg)
    model = ref.copy("policy")
    score_fn = score_fn or rewards.scorer(cfg, text, ref)
    steps = cfg.epochs * math.ceil(min(cfg.prompts, len(unlabeled)) / cfg.batch_size)    # at most, in a round
    log = update.Log(cfg, cfg.rounds * steps, ("loss",))
    for round, _ in log.resumed(range(cfg.rounds), model, score_fn):
        # best-of-n with the newest model
        start = round * cfg.prompts % len(unlabeled)
        asked = (unlabeled + unlabeled)[start:start + min(cfg.prompts, len(unlabeled))]
        prompts = [text.prompt(record) for record in asked]
        rows = generate(model, prompts, text, cfg, cfg.seed + 10_007 * (round + 1), cfg.n, kept=f"round{round + 1}")
        scores = score_fn(rows).view(len(prompts), cfg.n)                                # (P, n)
        winners = [rows[i * cfg.n + j] for i, j in enumerate(scores.argmax(1).tolist())]
        kept = [(prompt, response) for prompt, response in winners if response[-1] in text.stops]
        print(f"round {round + 1}/{cfg.rounds}: {len(kept)} of {len(winners)} winners ended by themselves; score "
              f"{scores.max(1).values.mean():.3f}, of all answers {scores.mean():.3f}")

        if not kept:
            raise InputError("no winner ended by itself, so there is nothing to imitate: raise --max_new_tokens")

        # imitate them
        model.become(ref)
        sft.train(model, kept, cfg, log, start=round * steps)
        for record, (_, response), score in list(zip(asked, winners, scores.max(1).values.tolist()))[:3]:
            log.sample(round, question(record), text.decode(response), score=score)

    policy.save(model, cfg)
    return {"loss": log.last["loss"], **rewards.spent(score_fn), **answer(model, text, cfg, ref)}
