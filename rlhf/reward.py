"""The reward model: a scalar head on the SFT model, trained on preference pairs to score the better answer higher.

Bradley-Terry (Stiennon et al. 2020, arXiv 2009.01325, section 3.4): -log sigmoid(score(chosen) - score(rejected)). The
score is read at the answer's last token, which is EOS unless the answer was cut off. The loss only knows differences of
scores, so after training they are shifted and scaled to mean 0 and standard deviation 1 over answers of the SFT model.
Left out: margins from graded labels, ensembles.

Memory: full training holds a second model and its optimizer; LoRA an adapter and a head of D + 1 numbers.
Questions a reader asks. Why does the loss start at log 2? The head starts at zero, so every score is 0. Why is an
accuracy of 0.65 good? In barn 18 % of the labels are flipped at random, so even a perfect model agrees with only about
0.72 of them.
"""
import copy
import math
import random
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import InputError, classifiers, read_json
from data.alpaca_eval import question
from data.barn.reward import true_reward
from data.weights import assign, read_safetensors, write_safetensors
from model import GPTConfig
from rlhf import config, logprobs, policy, update
from rlhf.pairs import load_pairs, pair_lengths, rows_of
from rlhf.sampler import generate

NEEDS = ("sft", "pairs")


@dataclass
class Config(config.Config):
    lr: float = 2e-4                    # peak learning rate
    epochs: int = 1                     # passes over the pairs
    batch_size: int = 32                # pairs in an optimizer step
    weight_decay: float = 0.            # pull of the weights to zero
    held_out: float = .05               # share of the pairs, as whole prompts, that is kept for validation
    scale_answers: int = 1000           # new answers of the SFT model over which scores get mean 0, deviation 1

    BARN = {"lr": 1e-3, "epochs": 2, "batch_size": 64, "weight_decay": .05, "scale_answers": 4000}
    BARN_LORA = {"lr": 3e-3}

    def idle(self):
        found = super().idle() | dict.fromkeys(config.OF_ANSWERS, "this stage answers nothing that is judged")
        found.pop("merge", None)        # even without adapters --merge writes a folder that transformers loads
        return found

    def __post_init__(self):
        super().__post_init__()
        if self.held_out >= 1:
            raise InputError(f"--held_out {self.held_out} leaves nothing to train on")


@dataclass
class Critic(policy.Policy):
    """A model with a scalar head: the reward model, and PPO's value function."""
    head: nn.Linear = None

    def values(self, ids, mask):
        """The head's output (B, T-1) in fp32 where the mask is 1, and 0 elsewhere. Index t has read ids[:, :t+1]."""
        where = mask.flatten().nonzero()[:, 0]                                           # (N,)
        return logprobs.scatter(self.head(self.hidden(ids[:, :-1], where=where).float())[:, 0], where, mask.shape)

    def trainable(self):
        return super().trainable() + [p.requires_grad_() for p in self.head.parameters()]

    def copy(self, role):
        body = super().copy(role)
        return Critic(body.gpt, body.role, copy.deepcopy(self.head))


def fresh(body):
    """A Critic on the model of a policy, with a head of zeros: every score is 0."""
    head = nn.Linear(body.gpt.config.hidden_size, 1, device=body.gpt.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return Critic(body.gpt, body.role, head)


def score(model, ids, mask, shared=1):
    """The score (B,) of each response: the head at its last token. ids (B, T), mask (B, T-1).

    shared = 2: the second half of the rows has the same prompts as the first half, and each is computed once.
    """
    at = logprobs.last_token(mask) + 1                                                     # (B,): column in ids
    where = torch.arange(len(ids), device=ids.device) * ids.shape[1] + at
    read = F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))                                     # (B, T): the last token too
    return model.head(logprobs.encode(model, ids, read, where, shared).float())[:, 0]


@torch.no_grad()
def scores(model, rows, cfg):
    """score() (N,) of rows [(prompt ids, response ids)], without gradients."""
    out = torch.empty(len(rows))
    for indices in update.micro_batches(range(len(rows)), logprobs.lengths(rows), 2 * cfg.micro_batch_tokens):
        out[indices] = score(model, *logprobs.pack([rows[i] for i in indices], model.gpt.device)).cpu()
    return out


def scorer(model, cfg):
    """The reward model as a reward: a function of rows -> scores (B,)."""
    return lambda rows: scores(model, rows, cfg)


def hold_out(pairs, share, seed):
    """(pairs to train on, pairs held out). Whole prompts are drawn at random, with all their pairs, until `share` of
    the pairs is held out; at least one prompt stays for training."""
    pairs_of = {}
    for pair in pairs:
        pairs_of.setdefault(tuple(pair[0][0]), []).append(pair)
    prompts = random.Random(seed).sample(list(pairs_of), len(pairs_of))
    held_out = []
    while len(prompts) > 1 and len(held_out) < round(share * len(pairs)):
        held_out += pairs_of.pop(prompts.pop())
    return [pair for of_prompt in pairs_of.values() for pair in of_prompt], held_out


def accuracy(good, bad):
    """How often the better answer has the higher score: scores (B,) of the better and of the worse answers. None if all
    are equal, as before the first step: the model then ranks nothing."""
    return None if (good == bad).all() else (good > bad).float().mean().item()


def bradley_terry(chosen, rejected):
    """Scores (B,) of the better and of the worse answers -> losses (B,)."""
    return -F.logsigmoid(chosen - rejected)


def calibration_error(margins, bins=10):
    """Expected calibration error (Guo et al. 2017, eq. 3), from margins (N,) of chosen over rejected scores.

    The model's confidence in its choice is sigmoid(|margin|), and its choice is right where margin > 0.
    """
    confidence, right = torch.sigmoid(margins.abs()), (margins > 0).float()
    bin = ((confidence - .5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence - right)[bin == b].sum().abs() for b in range(bins)]
    return (sum(gaps) / len(margins)).item()


def correlation(x, y):
    """Pearson's correlation of x and y (N,); 0 if one of them is constant."""
    return torch.corrcoef(torch.stack((x, y)))[0, 1].nan_to_num().item()


def validate(model, pairs, cfg):
    """Metrics on pairs that were not trained on."""
    rows = rows_of(pairs)
    good, bad = scores(model, rows[:len(pairs)], cfg), scores(model, rows[len(pairs):], cfg)
    lengths = torch.tensor([float(len(response)) for _, response in rows])
    return {"eval_loss": bradley_terry(good, bad).mean().item(), "eval_accuracy": accuracy(good, bad),
            "eval_margin": (good - bad).mean().item(), "eval_calibration_error": calibration_error(good - bad),
            "length_correlation": correlation(torch.cat((good, bad)), lengths)}


def normalise(model, rows, cfg):
    """Change the head so that the scores of `rows` have mean 0 and standard deviation 1; these scores (N,).
    FloatingPointError if all of them are equal or one is not finite."""
    raw = scores(model, rows, cfg)
    mean, std = raw.mean().item(), raw.std().item()
    if not std > 1e-6 * max(1, abs(mean)):              # equal but for rounding
        raise FloatingPointError("the reward model gives every answer the same score: there is nothing to learn from")
    with torch.no_grad():
        model.head.weight /= std
        model.head.bias.copy_((model.head.bias - mean) / std)
    return (raw - mean) / std


def save(model, cfg):
    policy.save(model, cfg)
    head = {f"score.{name}": tensor for name, tensor in model.head.state_dict().items()}
    write_safetensors(cfg.dir() / "checkpoint" / policy.HEAD_FILE, head)


def load(cfg, beside):
    """The reward model of the run, frozen; with LoRA it is an adapter on the base of the policy `beside`."""
    return with_head(policy.load(cfg, "reward", beside), cfg.dir("reward") / "checkpoint")


def with_head(body, folder):
    """The frozen reward model made of a decoder `body` (a Policy) and the head in a folder."""
    model, file = fresh(body), folder / policy.HEAD_FILE
    if file.exists():
        tensors, _ = read_safetensors(file)
    else:
        weight, bias = classifiers.read_head(folder)
        tensors, file = {"score.weight": weight, "score.bias": torch.tensor([bias])}, folder
    assign({f"score.{name}": tensor for name, tensor in model.head.state_dict().items()}, tensors, str(file))
    model.head.requires_grad_(False)
    return model


# -- reward models that are there already --------------------------------------------------------------------------

def examined(path):
    """The folder of a reward model, which is a stage of a run, a folder, or a name on the hub. InputError if it is not
    a reward model or cannot be used, as far as can be seen without loading the decoder's weights."""
    folder, cfg = config.resolve(path), policy.config_of(path)
    if not (folder / policy.HEAD_FILE).exists():
        if not classifiers.is_classifier(folder):
            raise InputError(f"{path} is no reward model: its config.json names no ...{classifiers.CLASS}")
        classifiers.read_head(folder)
    cfg.text().render("")                               # its chat template is tried out
    try:
        GPTConfig.from_hf(read_json(cfg.checkpoint / "config.json"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return folder


def open_model(path, cfg):
    """(reward model, its Text, whether it was trained here) of what examined() accepts, on the device of cfg; in 16
    bits on a GPU."""
    folder, own = config.resolve(path), policy.config_of(path, cfg.device, cfg.int8)
    trained_here = (folder / policy.HEAD_FILE).exists() or classifiers.BIAS in read_json(folder / "config.json")
    return with_head(policy.body_of(path, own), folder), own.text(), trained_here


def run(cfg):
    text = cfg.text()
    pairs, held_out = hold_out(load_pairs(cfg, text), cfg.held_out, cfg.seed)
    sft = policy.start(cfg)
    model = fresh(sft.copy("reward"))

    lengths = pair_lengths(pairs)
    batches = update.batches(len(pairs), cfg.batch_size, cfg.epochs, cfg.seed)
    updater = update.Updater(model.trainable(), cfg.lr, len(batches), weight_decay=cfg.weight_decay, fp16=model.fp16)
    log = update.Log(cfg, len(batches), ("loss", "accuracy", "margin"))
    log.rows(pairs[0], text)
    for step, batch in log.resumed(batches, model, updater):
        each = []
        for micro in update.micro_batches(batch, lengths, cfg.micro_batch_tokens):
            rows = rows_of([pairs[i] for i in micro])
            ids, mask = logprobs.pack(rows, model.gpt.device)
            good, bad = score(model, ids, mask, shared=2).chunk(2)                       # (b,), (b,)
            losses = bradley_terry(good, bad)
            updater.add(losses.sum(), len(micro), rows)
            each.append(torch.stack((losses, good, bad)).detach())
        loss, good, bad = torch.cat(each, 1).cpu()                                       # (batch,) each
        both = torch.cat((good, bad))
        log.step(step, {"loss": loss.mean().item(), "accuracy": accuracy(good, bad),
                        "margin": (good - bad).mean().item(), "mean_reward": both.mean().item(),
                        "min_reward": both.min().item(), "max_reward": both.max().item(), **updater.step()},
                 sum(lengths[i] for i in batch))

    metrics = validate(model, held_out, cfg) if held_out else {}
    val = text.fitting(cfg.splits()["val"], cfg.max_prompt_tokens)
    each = math.ceil(cfg.scale_answers / len(val))                                       # answers to a prompt
    rows = generate(sft, [text.prompt(record) for record in val], text, cfg, cfg.seed + 2, each, kept="scale")
    values, answers = normalise(model, rows, cfg), [text.decode(response) for _, response in rows]
    save(model, cfg)
    for i, (answer, value) in enumerate(zip(answers[:4], values.tolist())):
        log.sample(len(batches), question(val[i // each]), answer, score=value)
    if cfg.data == "barn" and each > 1:                 # only the offline world has a true reward
        truth = torch.tensor([true_reward(val[i // each]["instruction"], answer) for i, answer in enumerate(answers)])
        metrics["true_accuracy"] = agreement(values.view(-1, each), truth.view(-1, each))
    return metrics


def agreement(scores, truth):
    """How often scores rank two answers to a prompt as the truth does: scores, truth (P, n). Neighbouring answers are
    compared, unless their truth is equal."""
    said, true = scores[:, 1:] - scores[:, :-1], truth[:, 1:] - truth[:, :-1]
    return ((said > 0) == (true > 0))[true != 0].float().mean().item()
