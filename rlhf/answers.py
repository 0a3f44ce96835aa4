"""[kit] What a method answers: single samples while it trains, and at its end the eval split in AlpacaEval's format."""
import torch

from data import InputError
from data.alpaca_eval import question
from data.files import write_json
from data.progress import say_once
from rlhf.logprobs import lengths, pack, token_logps
from rlhf.sampler import generate, longest_answer
from rlhf.update import micro_batches

# The estimate of the KL, k1, is unbiased only on samples of the policy itself. If the judged answers were sampled with
# another temperature or top-p, so many others are sampled for the KL.
KL_ANSWERS = 128


def show_sample(step, model, text, cfg, records, log):
    """Log an answer to one of the records, each in turn."""
    record = records[step % len(records)]
    (_, response), = generate(model, text.shortened([record], room(model, text, cfg)), text, cfg, cfg.seed + step)
    log.sample(step, question(record), text.decode(response))


@torch.no_grad()
def logps(policy, rows, cfg):
    """Log-prob (N,) of the whole response of each row, without gradients."""
    out = torch.empty(len(rows))
    for indices in micro_batches(range(len(rows)), lengths(rows), 2 * cfg.micro_batch_tokens):
        ids, mask = pack([rows[i] for i in indices], policy.gpt.device)
        out[indices] = token_logps(policy, ids, mask, cfg.temperature).sum(-1).cpu()
    return out


def room(policy, text, cfg):
    """The most tokens that a prompt may have if the longest answer is to fit behind it."""
    context, answer = policy.gpt.config.max_position_embeddings, longest_answer(text, cfg)
    if answer >= context:
        flags = "--max_new_tokens and --max_thought_tokens" if text.thinks else "--max_new_tokens"
        raise InputError(f"answers of {answer} tokens leave no room for a prompt in {context} tokens: lower {flags}")
    return context - answer


def questions(policy, text, cfg):
    """The records of the eval split, and their prompts as token ids. Of texts that are too long the middle is cut out.
    """
    records = cfg.splits()["eval"]
    return records, text.shortened(records, room(policy, text, cfg))


@torch.no_grad()
def answer(policy, text, cfg, ref=None, ref_text=None, file="outputs.json"):
    """Answer the eval split and write `file`. Returns metrics: mean length in tokens, the share of answers that
    ended by themselves, and the KL to `ref` in nats per answer if it is given. ref_text: the Text that
    writes the prompts of `ref`, if not `text`."""
    records, prompts = questions(policy, text, cfg)
    rows, logp = generate(policy, prompts, text, cfg, cfg.seed, judged=True, logps=True,
                          kept="answers" * (file == "outputs.json"))
    outputs = [text.decode(response) for _, response in rows]
    if empty := outputs.count(""):
        why = ": thoughts that did not end, perhaps (--max_thought_tokens)" * text.thinks
        say_once(f"{cfg.stage}: {empty} of {len(outputs)} answers are empty{why}")
    write_outputs(cfg, records, outputs, file)
    metrics = {"eval/mean_length": sum(len(response) for _, response in rows) / len(rows),
               "eval/finished": sum(response[-1] in text.stops for _, response in rows) / len(rows)}
    if ref is not None:
        if (cfg.eval_temperature, cfg.eval_top_p) != (cfg.temperature, 1):
            rows, logp = generate(policy, prompts[:KL_ANSWERS], text, cfg, cfg.seed, logps=True)
        _, asked = questions(ref, ref_text or text, cfg)
        ref_rows = [(prompt, response) for prompt, (_, response) in zip(asked, rows)]
        own = torch.stack([x.sum() for x in logp]).cpu() if logp else logps(policy, rows, cfg)           # (N,)
        metrics["objective/kl"] = (own - logps(ref, ref_rows, cfg)).mean().item()
    return metrics


def write_outputs(cfg, records, outputs, file="outputs.json"):
    """Write outputs.json, or another `file`, of the stage: AlpacaEval records, one for each record of the eval split,
    in its order."""
    keep = ("instruction", "input", "dataset", "datasplit")
    write_json(cfg.dir() / file,
               [{**{key: record[key] for key in keep if key in record}, "output": output, "generator": cfg.stage}
                for record, output in zip(records, outputs, strict=True)])
