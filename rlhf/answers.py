"""[kit] What every method ends in: the eval split, answered, in AlpacaEval's format."""
import json

import torch

from data import InputError, sets
from rlhf.logprobs import pack, token_logps
from rlhf.sampler import sample
from rlhf.update import micro_batches


@torch.no_grad()
def logps(policy, rows, cfg):
    """Log-prob (N,) of each row's whole response, in the rows' order, without gradients."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    out = torch.empty(len(rows))
    for indices in micro_batches(range(len(rows)), lengths, 2 * cfg.micro_batch_tokens):
        ids, mask = pack([rows[i] for i in indices], policy.gpt.device)
        out[indices] = token_logps(policy, ids, mask, cfg.temperature).sum(-1).cpu()
    return out


def questions(policy, text, cfg):
    """The records of the eval split, and their prompts as token ids."""
    context = policy.gpt.config.max_position_embeddings
    room = context - cfg.max_new_tokens
    if room <= 0:
        raise InputError(f"--max_new_tokens {cfg.max_new_tokens} leaves no room for a prompt in {context} tokens")
    records = sets.load(cfg.data, cfg.eval_data, cfg.limit)["eval"]
    return records, [text.prompt(record)[-room:] for record in records]    # too long for the model: the end counts


@torch.no_grad()
def answer(policy, text, cfg, ref=None):
    """Answer the eval split, write outputs.json, and say how: mean length, share that ended, KL to `ref`."""
    records, asked = questions(policy, text, cfg)
    rows = sample(policy, asked, text.stops, cfg.max_new_tokens, cfg.temperature, cfg.seed, 1, cfg.slots, cfg.graph)
    outputs = [text.decode(response) for _, response in rows]
    write_outputs(cfg, records, outputs)
    metrics = {"eval/mean_length": sum(len(response) for _, response in rows) / len(rows),
               "eval/finished": sum(response[-1] in text.stops for _, response in rows) / len(rows)}
    if ref is not None:                                                # k1: unbiased on the policy's own samples
        metrics["objective/kl"] = (logps(policy, rows, cfg) - logps(ref, rows, cfg)).mean().item()
    return metrics


def write_outputs(cfg, records, outputs):
    """outputs.json of the stage: AlpacaEval records, one for each of the eval split, in its order."""
    keep = ("instruction", "input", "dataset", "datasplit")
    name = cfg.dir().name
    (cfg.dir() / "outputs.json").write_text(json.dumps(
        [{**{key: record[key] for key in keep if key in record}, "output": output, "generator": name}
         for record, output in zip(records, outputs, strict=True)], indent=1))
