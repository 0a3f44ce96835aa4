"""Direct preference optimisation: preference pairs as a classification loss on the policy itself, no reward model.

Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta ((log pi/ref)(chosen) - (log pi/ref)(rejected))).
Log-probs are sums over the answer, EOS included. The reference never changes, so its log-probs are computed once.
Left out: the loss variants (IPO, cDPO, ...): each is a file of a few lines that imports this one.

Memory: the policy with its optimizer, and the reference without: with LoRA two adapters on one frozen base.
Speed: chosen and rejected have one prompt, which is computed once for both (--no-shared_prompt computes it twice).
Questions a reader asks. Why does the loss start at log 2? Policy and reference are the same, so every margin is 0.
Why does rewards/chosen go down? Only the margin is trained; probability may move to answers that nobody sampled.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import sets
from data.text import Text
from rlhf import config, logprobs, policy, update
from rlhf.answers import answer
from rlhf.pairs import load_pairs, pair_lengths
from rlhf.sampler import sample

NEEDS = ("sft", "pairs")
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


@dataclass
class Config(config.Config):
    lr: float = 1e-5                    # peak learning rate
    beta: float = .1                    # strength of the pull to the reference: higher stays closer
    epochs: int = 2                     # passes over the pairs
    batch_size: int = 64                # pairs in an optimizer step
    shared_prompt: bool = True          # compute the prompt of the two answers once; the same loss, faster
    sample_every: int = 50              # steps between samples

    BARN = {"lr": 3e-4, "epochs": 2}
    BARN_LORA = {"lr": 5e-4}


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Log-probs of whole answers, (B,) each -> losses (B,), implicit rewards of chosen and rejected (B,) each."""
    rewards_chosen, rewards_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(rewards_chosen - rewards_rejected), rewards_chosen.detach(), rewards_rejected.detach()


def logps(model, chosen, rejected, cfg):
    """Log-probs (2, b) of b chosen answers and of the b rejected ones to the same prompts."""
    ids, mask = logprobs.pack(chosen + rejected, model.gpt.device)                         # (2b, T), (2b, T-1)
    shared = 2 if cfg.shared_prompt else 1
    return logprobs.token_logps(model, ids, mask, cfg.temperature, shared=shared).sum(-1).view(2, -1)


@torch.no_grad()
def reference(ref, chosen, rejected, cfg):
    """logps() of all pairs (2, N), without gradients."""
    out = torch.empty(2, len(chosen), device=ref.gpt.device)
    for micro in update.micro_batches(range(len(chosen)), pair_lengths(chosen, rejected), 2 * cfg.micro_batch_tokens):
        out[:, micro] = logps(ref, [chosen[i] for i in micro], [rejected[i] for i in micro], cfg)
    return out


def learn(model, updater, chosen, rejected, ref_logps, cfg, loss_fn=dpo_loss):
    """One optimizer step on a batch of pairs, whose ref_logps are (2, B). Returns what to log."""
    sums = 0.
    for micro in update.micro_batches(range(len(chosen)), pair_lengths(chosen, rejected), cfg.micro_batch_tokens):
        logp = logps(model, [chosen[i] for i in micro], [rejected[i] for i in micro], cfg)               # (2, b)
        losses, good, bad = loss_fn(*logp, *ref_logps[:, micro], cfg.beta)                               # (b,) each
        updater.add(losses.sum(), len(micro))
        sums = sums + torch.stack((losses, good, bad, good - bad, (good > bad).float(), *logp)).detach().sum(1)
    return {**dict(zip(METRICS, (sums / len(chosen)).tolist())), **updater.step()}


def run(cfg, loss_fn=dpo_loss):
    text = Text(*cfg.words)
    ref = policy.load(cfg, "sft")
    model = ref.copy("policy")
    chosen, rejected = load_pairs(cfg, text)
    ref_logps = reference(ref, chosen, rejected, cfg)                                    # (2, N)
    val = sets.load(cfg.data, cfg.eval_data, cfg.limit)["val"]

    lengths = pair_lengths(chosen, rejected)
    steps = update.batches(len(chosen), cfg.batch_size, cfg.epochs, cfg.seed)
    updater = update.Updater(model.trainable(), cfg.lr, len(steps), fp16=model.fp16)
    log = update.Log(cfg.dir(), len(steps), ("loss", "rewards/margins", "rewards/accuracies"))
    for step, batch in enumerate(steps):
        metrics = learn(model, updater, [chosen[i] for i in batch], [rejected[i] for i in batch],
                        ref_logps[:, batch], cfg, loss_fn)
        log.step(step, metrics, sum(lengths[i] for i in batch))
        if step % cfg.sample_every == 0:
            record = val[step % len(val)]
            (_, response), = sample(model, [text.prompt(record)], text.stops, cfg.max_new_tokens,
                                     cfg.temperature, cfg.seed + step, graph=cfg.graph)
            log.sample(step, record["instruction"], text.decode(response))

    policy.save(model, cfg)
    return {**metrics, **answer(model, text, cfg, ref)}
