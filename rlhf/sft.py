"""Supervised fine-tuning: imitate the demonstrations. Every other method starts from it and has it as reference.

Loss: the mean of -log p(token) over all tokens of the answers, EOS included. Prompts are not learned.
AlpacaFarm (arXiv 2305.14387) trains SFT10k this way. Left out: packing several examples into a row.

Memory: one model with its optimizer; with LoRA a frozen base and one adapter.
Questions a reader asks. Why is the loss a mean over tokens, not over answers? It is what most SFT code does; a long
answer weighs more than a short one. Why is EOS in it? Otherwise the model would not learn to stop.
"""
import math
from dataclasses import dataclass

import torch

from rlhf import config, logprobs, policy, update
from rlhf.answers import answer, show_sample

NEEDS = ()


@dataclass
class Imitation(config.Config):
    """What methods that imitate answers share."""
    lr: float = 2e-4                    # peak learning rate
    epochs: int = 3                     # passes over the demonstrations
    batch_size: int = 32                # demonstrations in an optimizer step
    sample_every: int = 50              # steps between samples

    BARN = {"lr": 1e-3, "epochs": 2}
    BARN_LORA = {"lr": 3e-3}


@dataclass
class Config(Imitation):
    def idle(self):
        return super().idle() | {"start": "the SFT stage starts at the checkpoint itself"}


def train(model, rows, cfg, log, show=None, start=0):
    """Maximise the likelihood of the responses in rows [(prompt ids, response ids)].

    show(step) logs a sample every cfg.sample_every steps. The log counts steps from `start`.
    """
    lengths = logprobs.lengths(rows)
    batches = update.batches(len(rows), cfg.batch_size, cfg.epochs, cfg.seed)
    updater = update.Updater(model.trainable(), cfg.lr, len(batches), fp16=model.fp16)
    for step, batch in log.resumed(batches, model, updater):
        nll = torch.zeros((), device=model.gpt.device)
        for micro in update.micro_batches(batch, lengths, cfg.micro_batch_tokens):
            ids, mask = logprobs.pack([rows[i] for i in micro], model.gpt.device)          # (b, T), (b, T-1)
            loss = -logprobs.token_logps(model, ids, mask).sum()
            updater.add(loss, sum(len(rows[i][1]) for i in micro), [rows[i] for i in micro])
            nll += loss.detach()
        mean = nll.item() / updater.denominator
        log.step(start + step, {"loss": mean, **updater.step()}, sum(lengths[i] for i in batch))
        if show and step % cfg.sample_every == 0:
            show(step)
    return {"loss": log.last["loss"]}


def cut_off(responses, cfg, what):
    """The responses (token ids), cut to --max_new_tokens. Prints how many are cut and so lose their EOS."""
    long = sum(len(response) > cfg.max_new_tokens for response in responses)
    if long:
        print(f"{long} of {len(responses)} {what} are cut off at {cfg.max_new_tokens} tokens and have no end")
    return [response[:cfg.max_new_tokens] for response in responses]


def run(cfg, imitated=("sft",)):
    """imitated: the splits whose demonstrations are learned."""
    text = cfg.text()
    splits = cfg.splits()
    given = [record for split in imitated for record in splits[split]]
    records = [record for record in given if record["output"].strip()]
    if len(records) < len(given):
        print(f"{len(given) - len(records)} of {len(given)} demonstrations are empty and left out")
    rows = [text.example(record, record["output"]) for record in text.fitting(records, cfg.max_prompt_tokens)]
    responses = cut_off([response for _, response in rows], cfg, "demonstrations")
    rows = [(prompt, response) for (prompt, _), response in zip(rows, responses)]
    model = policy.fresh(cfg, "sft")
    log = update.Log(cfg, cfg.epochs * math.ceil(len(rows) / cfg.batch_size), ("loss",))
    log.rows(rows[:2], text)
    metrics = train(model, rows, cfg, log, lambda step: show_sample(step, model, text, cfg, splits["val"], log))
    policy.save(model, cfg)
    return {**metrics, **answer(model, text, cfg)}
