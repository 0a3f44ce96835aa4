"""A run folder around a tiny random model: what earlier stages would have left there, without their training.

61 words, of which eight end an answer; w0 among them has the id that rows are padded with.
"""
import json
from types import SimpleNamespace

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from data.adapters import load_adapter
from data.weights import load_weights, save_pretrained
from rlhf import policy, reward, sft, update

STOPS = list(range(8))
KINDS = {"full": 0, "lora": 4}


def tokenizer(source, template="{{ messages[0].content }}", **named):
    """Write a word-level tokenizer, whose prompts are by default the instruction and nothing else. named: other words
    than w5 and so on, as in w5="cow"."""
    source.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel({named.get(f"w{i}", f"w{i}"): i for i in range(61)}, unk_token="w60"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w0", "chat_template": template}))


def base(folder, *template, **named):
    """A checkpoint with the words and the template of tokenizer()."""
    source = folder / "tokenizer"
    tokenizer(source, *template, **named)
    shape = {**tiny.SHAPE, "model_type": "llama", "eos_token_id": STOPS}
    save_pretrained(folder / "base", tiny.gpt().weights(), shape, source)


def preferences(n=40):
    """n pairs {instruction, ids_1, ids_2, preference}: what is preferred has a word of w30 to w39; half prefer 1."""
    prompts, ones, twos = (tiny.texts([1 + (i + j) % 5 for i in range(n)], 99 * j) for j in (1, 2, 3))
    made = []
    for i, (prompt, one, two) in enumerate(zip(prompts, ones, twos)):
        answers = [*one, 30 + i % 10, 0], [10 + t % 20 for t in two] + [0]
        one, two = answers[::1 - 2 * (i % 2)]
        made.append({"instruction": sentence(prompt), "ids_1": one, "ids_2": two, "preference": 1 + i % 2})
    return made


def write_pairs(folder, pairs):
    """Leave pairs in the run folder as the stage does."""
    (folder / "run" / "pairs").mkdir(exist_ok=True)
    (folder / "run" / "pairs" / "pairs.json").write_text(json.dumps(pairs))


def steps_of(monkeypatch, owner, name, used):
    """Watch a run: a list that gets, for each optimizer step, all that `used` says of the calls of owner.name."""
    batches, now, real, step = [], [], getattr(owner, name), update.Updater.step
    monkeypatch.setattr(owner, name, lambda *args: now.extend(used(*args)) or real(*args))

    def watched(self):
        batches.append(tuple(sorted(now)))
        now.clear()
        return step(self)
    monkeypatch.setattr(update.Updater, "step", watched)
    return batches


def sentence(ids):
    return " ".join(f"w{i}" for i in ids)


def settings(folder, kind, cls, **changes):
    """The settings of one stage of the run in `folder`; its folder is there."""
    common = {"model": str(folder / "base"), "data": str(folder / "data.json"), "out": str(folder / "run"),
              "device": "cpu", "lora_rank": KINDS[kind], "max_new_tokens": 6, "slots": 64,
              "eval_temperature": 1., "eval_top_p": 1.}
    cfg = cls(**common | changes)
    cfg.stage = cls.__module__.rpartition(".")[2]
    cfg.dir().mkdir(parents=True, exist_ok=True)
    return cfg


def run_folder(folder, kind):
    """The base, data (80 prompts unlabeled, 8 each in val and eval), and the stages sft and reward."""
    base(folder)
    records = [{"instruction": sentence(ids), "output": sentence(ids[:1])}
               for ids in tiny.texts([1 + i % 7 for i in range(176)])]
    (folder / "data.json").write_text(json.dumps(records))
    cfg = settings(folder, kind, sft.Config)
    model = policy.fresh(cfg, "sft")
    moved(model.trainable(), 1)
    policy.save(model, cfg)
    critic = reward.fresh(model.copy("reward"))
    moved(critic.trainable(), 2)
    reward.save(critic, settings(folder, kind, reward.Config))
    return folder


def run_folders(tmp_path_factory, pairs=False):
    """{kind: run_folder()} for both kinds of training; pairs: with the stage pairs, too."""
    made = {kind: run_folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    for folder in made.values() if pairs else ():
        write_pairs(folder, preferences())
    return made


def log(keep):
    """A log of which nothing is left but what keep(metrics) keeps of each step."""
    return SimpleNamespace(step=lambda step, metrics, tokens: keep(metrics), last={"loss": None},
                           resumed=lambda items, *changed: enumerate(items))


@torch.no_grad()
def moved(params, seed):
    r = torch.Generator().manual_seed(seed)
    for p in params:
        p += torch.randn(p.shape, generator=r) * .1


def text(cfg):
    return cfg.text()


def saved(cfg):
    """The tensors of the checkpoint that a stage has written."""
    folder = cfg.dir() / "checkpoint"
    return load_adapter(folder)[0] if cfg.lora_rank else dict(load_weights(folder))


def lines(cfg, name="metrics.jsonl"):
    return [json.loads(line) for line in (cfg.dir() / name).read_text().splitlines()]


def known(metrics):
    """The metrics of a step without those that were None, for pytest.approx."""
    return {name: value for name, value in metrics.items() if value is not None}


def samples(cfg):
    """The answers that a stage has logged, without the rows of tokens."""
    return [line for line in lines(cfg, "samples.jsonl") if "output" in line]


def thirties(rows):
    """A reward (B,) that is a rule: how many words of each answer are one of w30 to w39."""
    return torch.tensor([float(sum(i // 10 == 3 for i in response)) for _, response in rows])
