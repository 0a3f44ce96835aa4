"""Quark: sort all answers by reward, learn each under the mark of its quantile, and ask for the best quantile.

Lu et al. 2022 (arXiv 2205.13636), sec. 2. A mark is the number of a quantile, as text in front of the instruction; the
paper adds a token to the vocabulary for each. A round: sample answers under the mark of the best quantile (in the first
round from the SFT model, without a mark), score them and add them to the pool; divide the whole pool into quantiles;
learn from all of them: -log pi(token | mark, prompt) + beta KL(ref(. | prompt) || pi(. | mark, prompt)), where the KL
is exact, over the whole vocabulary at every token of an answer. AlpacaFarm (arXiv 2305.14387) has Quark, too. By
default its code learns from the best quantile alone, without marks, and takes the KL in the other direction. It also
has two defects that are absent here: answers lose their EOS before they are learned, so that the model is never taught
to stop; and padding stands between prompt and answer, so that the first token of an answer is predicted from padding.
Left out: the entropy bonus.

Memory: policy, reference and reward model; with LoRA, three adapters on one frozen base. Logits are held for 1,024
tokens at a time, and computed again for the gradient.
Questions a reader asks. Why learn bad answers? Under their own marks they do no harm, and they teach what the marks
mean. Why are quantiles of the whole pool, not of a round? As answers improve, earlier ones sink to lower quantiles, so
the best mark always means the best answers so far. Why this direction of the KL? It grows where the policy gives too
little probability to what the reference would say.
"""
import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from data import InputError
from data.alpaca_eval import question
from rlhf import config, policy, reward, update
from rlhf.answers import answer
from rlhf.experience import schedule
from rlhf.logprobs import lengths, pack
from rlhf.sampler import generate
from rlhf.state import Kept

NEEDS = ("sft", "reward")
CHUNK = 1024                            # tokens whose logits are held at a time


@dataclass
class Config(config.Config):
    lr: float = 2e-4                    # peak learning rate
    rounds: int = 20                    # how often to sample and train
    rollout_batch: int = 512            # answers that a round adds to the pool
    updates: int = 10                   # optimizer steps in a round
    batch_size: int = 256               # answers in an optimizer step
    quantiles: int = 5                  # how many quantiles, each with its mark; 1 is the worst
    beta: float = .05                   # weight of the KL
    missing_eos_penalty: float = 1.     # taken from the score of an answer that did not end

    BARN = {"lr": 1e-3, "rounds": 10, "updates": 32, "batch_size": 64}
    BARN_LORA = {"lr": 2e-3}

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.quantiles <= self.rollout_batch:
            raise InputError(f"--quantiles {self.quantiles} makes no sense: it is a number from 2 to --rollout_batch")


# -- the algorithm as functions of tensors -------------------------------------------------------------------------

def quantiles_of(scores, k):
    """scores (N,) -> the quantile (N,) of each, from 1 (lowest scores) to k; their sizes differ by 1 at most."""
    ranks = scores.argsort(stable=True).argsort()                                        # (N,): 0 is the lowest
    return ranks * k // len(scores) + 1


def nll_and_kl(logits, ref_logits, targets):
    """Sums over n tokens: -log pi(target), and the exact KL(ref || pi), from logits (n, V) and targets (n,)."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)                  # (n, V)
    nll = -logp.gather(1, targets[:, None]).sum()
    return nll, (ref_logp.exp() * (ref_logp - logp)).sum()


def quark_losses(model, ref, rows, plain, temperature):
    """nll_and_kl() of the answers in rows [(marked prompt ids, response ids)]; plain: the same rows with prompts
    without marks, for the reference."""
    h, targets = read(model, rows)                                                       # (N, D), (N,)
    with torch.no_grad():
        ref_h, _ = read(ref, plain)                                                      # (N, D)

    def losses_of(part):
        return nll_and_kl(model.gpt.logits(h[part]) / temperature, ref.gpt.logits(ref_h[part]) / temperature,
                          targets[part])
    sums = [checkpoint(losses_of, slice(i, i + CHUNK), use_reentrant=False) for i in range(0, len(h), CHUNK)]
    return (sum(part) for part in zip(*sums))


def read(model, rows):
    """Hidden states (N, D) from which the tokens of the answers are predicted, and these tokens (N,)."""
    ids, mask = pack(rows, model.gpt.device)                                             # (B, T), (B, T-1)
    where = mask.flatten().nonzero()[:, 0]                                               # (N,)
    return model.hidden(ids[:, :-1], where=where), ids[:, 1:].flatten()[where]


# -- the loop ------------------------------------------------------------------------------------------------------

def mark(quantile):
    return f"{quantile}: "


def run(cfg, score_fn=None):
    """score_fn: rows -> (B,); by default the reward model of the run."""
    text = cfg.text()
    marked = {k: text.marked(mark(k)) for k in range(1, cfg.quantiles + 1)}
    best = marked[cfg.quantiles]
    records = text.fitting(cfg.splits()["unlabeled"], cfg.max_prompt_tokens)
    ref = policy.start(cfg)
    model = ref.copy("policy")
    score_fn = score_fn or reward.scorer(reward.load(cfg, ref), cfg)

    updater = update.Updater(model.trainable(), cfg.lr, cfg.rounds * cfg.updates, fp16=model.fp16)
    log = update.Log(cfg, cfg.rounds, ("objective/scores", "loss/nll", "loss/kl"))
    pool, asked_of = Kept(rows=[], scores=torch.empty(0)), schedule(records, cfg.rollout_batch, cfg.rounds, cfg.seed)
    for round, asked in log.resumed(asked_of, model, updater, score_fn, pool):      # pool.rows: (record, response) each
        # sample under the best mark; the reward gets the prompts without marks
        form = best if round else text
        new = generate(model, [form.prompt(record) for record in asked], text, cfg, cfg.seed * 100_003 + round)
        pool.rows = pool.rows + [(record, response) for record, (_, response) in zip(asked, new)]
        score = score_fn([(text.prompt(record), response) for record, response in pool.rows[-len(asked):]]).cpu()
        unfinished = torch.tensor([response[-1] not in text.stops for _, response in new])
        pool.scores = torch.cat((pool.scores, score - cfg.missing_eos_penalty * unfinished))        # (pool,)

        # divide the pool into quantiles, and learn from all of them
        quantiles = quantiles_of(pool.scores, cfg.quantiles).tolist()
        plain = [(text.prompt(record), response) for record, response in pool.rows]
        rows = [(marked[k].prompt(record), response) for k, (record, response) in zip(quantiles, pool.rows)]
        passes = math.ceil(cfg.updates * cfg.batch_size / len(rows))
        nll_sum, kl_sum, tokens = 0., 0., 0
        for batch in update.batches(len(rows), cfg.batch_size, passes, cfg.seed + round)[:cfg.updates]:
            for micro in update.micro_batches(batch, lengths(rows), cfg.micro_batch_tokens):
                nll, kl = quark_losses(model, ref, [rows[i] for i in micro], [plain[i] for i in micro],
                                       cfg.temperature)
                updater.add(nll + cfg.beta * kl, sum(len(rows[i][1]) for i in micro),    # per token of the answers
                            [rows[i] for i in micro])
                nll_sum, kl_sum = nll_sum + nll.detach(), kl_sum + kl.detach()
            tokens += updater.denominator
            stats = updater.step()
        metrics = {"objective/scores": pool.scores[-len(asked):].mean().item(), "loss/nll": (nll_sum / tokens).item(),
                   "loss/kl": (kl_sum / tokens).item(), "val/num_eos_tokens": int((~unfinished).sum()), **stats}
        log.step(round, metrics, tokens)
        log.sample(round, question(asked[0]), text.decode(new[0][1]), score=pool.scores[-len(asked)].item())

    policy.save(model, cfg)
    return {**log.last, **answer(model, best, cfg, ref, text)}
