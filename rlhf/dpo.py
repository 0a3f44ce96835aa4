"""Direct preference optimisation: preference pairs as a classification loss on the policy itself, no reward model.

Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta ((log pi/ref)(chosen) - (log pi/ref)(rejected))).
Log-probs are sums over the answer, EOS included. The reference never changes, so its log-probs are computed once,
in fp32 when it samples the pairs.
A variant of the loss is a file of a few lines that imports this one and hands its own loss to run().

Memory: the policy with its optimizer, and the reference without; with LoRA, two adapters on one frozen base.
Speed: chosen and rejected have one prompt, which is computed once for both (--no-shared_prompt computes it twice).
Questions a reader asks. Why does the loss start at log 2? Policy and reference are the same, so every margin is 0.
Why does rewards/chosen go down? Only the margin is trained; probability may move to answers that nobody sampled.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlhf import config, policy, update
from rlhf.answers import answer, show_sample
from rlhf.logprobs import pack, token_logps
from rlhf.pairs import load_pairs, pair_lengths, rows_of, sampled_logps

NEEDS = ("sft", "pairs")
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")
ROUNDING = 1e-5                         # a reward of this size may be a rounding error


@dataclass
class Config(config.Config):
    lr: float = 2e-4                    # peak learning rate
    beta: float = .1                    # strength of the pull to the reference: higher stays closer
    epochs: int = 2                     # passes over the pairs
    batch_size: int = 16                # pairs in an optimizer step
    shared_prompt: bool = True          # compute the prompt of the two answers once; the same loss, faster
    sample_every: int = 50              # steps between samples

    BARN = {"lr": 3e-4, "batch_size": 64}
    BARN_LORA = {"lr": 5e-4}


def dpo_loss(logp, ref_logp, lengths, cfg):
    """Losses (b,) of b pairs, and implicit rewards (2, b) of their chosen and rejected answers, without gradients.

    logp, ref_logp (2, b): log-probs of the whole answers, chosen first. lengths (2, b): their tokens, not used here.
    """
    rewards = cfg.beta * (logp - ref_logp)                                               # (2, b)
    return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()


def logps(model, pairs, cfg):
    """Log-probs (2, b) of the chosen and the rejected answers of b pairs."""
    ids, mask = pack(rows_of(pairs), model.gpt.device)                                   # (2b, T), (2b, T-1)
    shared = 2 if cfg.shared_prompt else 1
    return token_logps(model, ids, mask, cfg.temperature, shared=shared).sum(-1).view(2, -1)


def means(sums, n):
    """METRICS of n pairs from their sums over the pairs. Before the first step all rewards are 0 but for rounding, so
    that there is no accuracy (None): no pair is ranked."""
    metrics = dict(zip(METRICS, (sums / n).tolist()))
    if max(abs(metrics[f"rewards/{name}"]) for name in ("chosen", "rejected", "margins")) < ROUNDING:
        metrics["rewards/accuracies"] = None
    return metrics


@torch.no_grad()
def all_logps(model, pairs, cfg):
    """logps() of all pairs (2, N), without gradients."""
    out = torch.empty(2, len(pairs), device=model.gpt.device)
    for micro in update.micro_batches(range(len(pairs)), pair_lengths(pairs), 2 * cfg.micro_batch_tokens):
        out[:, micro] = logps(model, [pairs[i] for i in micro], cfg)
    return out


def reference_logps(ref, pairs, cfg):
    """all_logps() of the reference. If it has sampled the pairs, they are known since then."""
    known = sampled_logps(cfg) if ref.gpt.head.dtype == torch.float32 else None
    return all_logps(ref, pairs, cfg) if known is None else known.to(ref.gpt.device)


def run(cfg, loss_fn=dpo_loss, needs_reference=True, kl_fn=None):
    """loss_fn has the arguments and results of dpo_loss(). A loss that needs no reference gets None for ref_logp; with
    all weights trained, the reference is then only loaded at the end, to measure the KL to it. kl_fn(model, ref, pairs,
    cfg) -> the KL to the reference on the pairs of a step: if it is given, its result is loss_fn's last argument, and
    is logged."""
    text = cfg.text()
    model, ref, ref_logps = policy.start(cfg), None, None
    pairs = load_pairs(cfg, text)
    if needs_reference or cfg.lora_rank:                # a frozen adapter takes little memory
        model, ref = model.copy("policy"), model
    if needs_reference:
        ref_logps = reference_logps(ref, pairs, cfg)                                         # (2, N)
    answer_tokens = torch.tensor([[len(r) for _, r in pair] for pair in pairs], device=model.gpt.device).T   # (2, N)
    val = cfg.splits()["val"]

    lengths = pair_lengths(pairs)
    batches = update.batches(len(pairs), cfg.batch_size, cfg.epochs, cfg.seed)
    updater = update.Updater(model.trainable(), cfg.lr, len(batches), fp16=model.fp16)
    log = update.Log(cfg, len(batches), ("loss", "rewards/margins", "rewards/accuracies"))
    log.rows(pairs[0], text)
    for step, batch in log.resumed(batches, model, updater):
        sums, kl = 0., [kl_fn(model, ref, [pairs[i] for i in batch], cfg)] if kl_fn else []
        for micro in update.micro_batches(batch, lengths, cfg.micro_batch_tokens):
            logp = logps(model, [pairs[i] for i in micro], cfg)                          # (2, b)
            ref_logp = ref_logps[:, micro] if needs_reference else None
            losses, rewards = loss_fn(logp, ref_logp, answer_tokens[:, micro], cfg, *kl)     # (b,), (2, b)
            updater.add(losses.sum(), len(micro), rows_of([pairs[i] for i in micro]))
            margins, right = rewards[0] - rewards[1], rewards[0] > rewards[1]
            sums = sums + torch.stack((losses, *rewards, margins, right.float(), *logp)).detach().sum(1)
        metrics = {**means(sums, len(batch)), **updater.step()}
        metrics |= {"kl": kl[0].item()} if kl else {}
        log.step(step, metrics, sum(lengths[i] for i in batch))
        if step % cfg.sample_every == 0:
            show_sample(step, model, text, cfg, val, log)

    del updater                                         # its moments are as large as another model
    policy.save(model, cfg)
    return {**log.last, **answer(model, text, cfg, ref or policy.start(cfg))}
