"""[kit] Knobs: a dataclass field is a flag, the comment behind it is its help; defaults < preset < flags."""
import argparse
import inspect
import json
import platform
import re
import shutil
import subprocess
import textwrap
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy
import requests
import tokenizers
import torch

from data import (PATH, InputError, Refusal, check_kinds, did_you_mean, from_json, hub, one_of, read_json, sets,
                  underscored)
from data.judges.person import PERSON
from data.run_folders import settings as stage
from data.text import TODAY, Text
from rlhf.saves import Saves

BASE = Path(__file__).parent.parent / "data" / "barn" / "base"

# What fits the machine: memory and lengths. The preset `barn` then also takes each method's own BARN settings.
PRESETS = {
    "barn": {"lora_rank": 0, "max_new_tokens": 64, "max_prompt_tokens": 64, "micro_batch_tokens": 1536,
             "eval_temperature": 1., "eval_top_p": 1.},
    "cpu": {"max_new_tokens": 128, "micro_batch_tokens": 1536},
    "t4": {"micro_batch_tokens": 2048, "checkpointing": True},
    "24gb": {"micro_batch_tokens": 4096, "checkpointing": True},
    "80gb": {"micro_batch_tokens": 16384, "checkpointing": True},
}
ASKED = {"max_tokens", "reasoning_effort", "judge_body"}                # part of every request to the judge
ASKING = {"workers", "timeout", "max_unusable", "ask_again"}            # how requests are sent, not what is in them
WHOLE_RUN = {"out", "model", "data", "eval_data", "limit", "judge", "pool", "cache", "preset", "lora_rank",
             "lora_alpha", "template", "temperature", "int8", "dtype", "start", "eval_temperature",
             "eval_top_p"} | ASKED | ASKING
COMMAND = {"name", "rerun", "merge", "merge_dtype"}     # of the method of a command, not of stages that it needs
MAY_BE_ZERO = {"seed", "limit", "lora_rank", "slots", "max_tokens", "max_thought_tokens"}
OF_ANSWERS = {"eval_temperature", "eval_top_p"}          # how answers that are judged are sampled
# Flags that do not change what a stage computes, only where it goes, how fast it is, and how much memory it takes.
# eval_data is here since the content of that file is compared, not its name.
ELSEWHERE = {"out", "name", "rerun", "cache", "device", "preset", "slots", "micro_batch_tokens", "checkpointing",
             "graph", "compile", "merge", "merge_dtype", "shared_prompt", "eval_data", "tensorboard",
             "save_minutes"} | ASKING


def in_cache(folder):
    """Whether a checkpoint lies where the hub's are kept; the folder is then named after its commit."""
    return folder.parent.name == "snapshots"


@lru_cache(None)
def resolve(name):
    """The folder of a checkpoint: barn, a path, a stage of a run, or a name on the hub, downloaded if need be."""
    if name == "barn":
        return BASE
    check_kinds("a model's name", {"name": name}, {"name": PATH})
    if (folder := Path(name)).exists():
        if stage(folder):
            return folder / "checkpoint"
        if stages := sorted(each.parent.name for each in folder.glob("*/checkpoint")):
            raise InputError(f"{name} is a whole run: choose a stage, as in {folder / stages[0]}")
        return folder
    if not hub.REPO.fullmatch(name.partition("@")[0]):
        raise InputError(f"there is no folder {name}")
    try:
        return hub.checkpoint(name)
    except Refusal as error:
        raise type(error)(f"there is no folder {name}, and as a name on the hub: {error}") from None


def variables(said):
    """The variables of a chat template (a dict) that --template says as JSON; InputError if it is no JSON object."""
    try:
        found = from_json("--template", said or "{}")
    except InputError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--template {said} is no JSON object: write it as in --template '{{\"enable_thinking\": "
                         "false}'")
    return found


@dataclass
class Config:
    """The knobs that all stages share. A method's own Config adds to them; BARN holds what it tuned for `barn`, with
    all weights trained, and BARN_LORA what is different with adapters."""
    model: str = "barn"                 # a folder or hub name (org/name@revision), HF or PEFT; barn: a small base
    template: str = ""                  # JSON: variables of the chat template, as in {"enable_thinking": false}
    start: str = "sft"                  # where learning starts: sft (trained first), or base (--model as it is)
    data: str = "barn"                  # a file of Alpaca records, alpaca_farm (the hub's), or barn: the offline world
    eval_data: str = ""                 # file of reference answers (default: the data's), or demo: barn's second set
    judge: str = ""                     # one or three at OPENAI_BASE_URL, serve:PATH, me, none; barn for barn's data
    pool: str = "p_eval"                # thirteen annotators; p_single, p_pairwise: one; or a file of your own (.json)
    max_tokens: int = 0                 # longest reply of the judge (0: what the annotator needs)
    reasoning_effort: str = ""          # of the judge: none, low, ... (default: its own; none for a single letter)
    judge_body: str = ""                # JSON that goes into every request to the judge
    workers: int = 8                    # requests to the judge at the same time, at most
    timeout: float = 120.               # seconds that one reply of the judge may take
    max_unusable: float = .02           # stop if a larger share of the verdicts is unusable
    ask_again: str = ""                 # unusable: ask again where the judge's cached reply is unusable
    cache: str = ""                     # file of the judge's answers; runs may share it (default: judge.jsonl in --out)
    out: str = "runs/barn"              # the run folder; finished stages in it are reused
    name: str = ""                      # of a variant in the same run folder, as in dpo_b05 (default: the method's)
    rerun: str = ""                     # stages to run again, as in sft,dpo; old ones are kept until new ones are done
    seed: int = 0                       # of everything that is random
    limit: int = 0                      # keep only so many records of each split (0: all)
    preset: str = ""                    # memory and lengths: barn, cpu, t4, 24gb, 80gb (default: as the machine is)
    device: str = ""                    # cpu or cuda (default: cuda where there is one)
    lora_rank: int = 16                 # rank of the adapters on the frozen base; 0 trains all weights, at lr / 10
    lora_alpha: float = 32.             # adapters are scaled by lora_alpha / lora_rank
    temperature: float = 1.             # of every answer that is sampled to learn from
    eval_temperature: float = .7        # of the answers that are judged; 0: the likeliest token each time
    eval_top_p: float = .9              # of these: the likeliest tokens with this probability together are drawn from
    max_prompt_tokens: int = 192        # longer prompts are left out of training
    max_new_tokens: int = 300           # longest answer
    max_thought_tokens: int = 1024      # longest thought before it, where the chat template expects one
    micro_batch_tokens: int = 4096      # tokens, padding included, in one forward and backward pass
    slots: int = 0                      # answers that are sampled at the same time; 0: as many as fit
    checkpointing: bool = False         # recompute activations in the backward pass: slower, far less memory
    graph: bool = True                  # on a GPU, replay a captured decoding step
    compile: bool = False               # compile the blocks for training: minutes once, then faster
    dtype: str = ""                     # of the base: float32, bfloat16, float16 (default: what suits the machine)
    merge: bool = False                 # write the trained adapter merged into its base, too: a Hugging Face folder
    merge_dtype: str = ""               # of that folder: float32, bfloat16, float16 (default: as the base)
    int8: bool = False                  # keep the frozen base in int8: half the memory, a little rounding
    save_minutes: float = 5.            # between saves, from which an interrupted stage goes on; 0: after each step
    tensorboard: bool = False           # write metrics for TensorBoard, too; needs the package tensorboard

    CHOICES: ClassVar[dict] = {}        # {flag: its values}, of a method's own flags that are words
    LEAST: ClassVar[dict] = {}          # {flag: its least value}, where that is more than 1
    BARN: ClassVar[dict] = {}
    BARN_LORA: ClassVar[dict] = {}
    stage: ClassVar[str] = ""           # the name of the stage that this object is for, set by farm.py
    folders: ClassVar[dict] = {}        # {stage: its folder}, of the stages whose folder has another name
    saves: ClassVar[Saves] = Saves()    # of this stage, set by stages.make(); without a stage nothing is saved
    day: ClassVar[str] = TODAY          # what chat templates take for today; set to the day of the run's first stage

    def __post_init__(self):
        self.model = self.model.removeprefix("https://huggingface.co/")
        for f in fields(self):
            value = getattr(self, f.name)
            least = self.LEAST.get(f.name, 1 if f.type is int and f.name not in MAY_BE_ZERO else 0)
            if f.type in (int, float) and not least <= value < 1 << 63:
                raise InputError(f"--{f.name} {value} makes no sense: it is a number from {least} up")
        if self.seed >= 1 << 46:
            raise InputError(f"--seed {self.seed} is too large: it is a number below {1 << 46}")
        if self.temperature == 0:
            raise InputError("--temperature 0 makes no sense: learners need the probabilities of what was sampled")
        if self.int8 and not self.lora_rank:
            raise InputError("--int8 needs adapters, since all of an int8 base is frozen: give --lora_rank 16")
        for flag, dtype in (("--dtype", self.dtype), ("--merge_dtype", self.merge_dtype)):
            one_of(flag, dtype, ("", "float32", "bfloat16", "float16"))
        if self.dtype in ("bfloat16", "float16") and not self.lora_rank:
            raise InputError(f"--dtype {self.dtype} would swallow small updates of the weights: give --lora_rank 16")
        if self.tensorboard and not find_spec("tensorboard"):
            raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard")
        if self.pool.endswith(".json"):             # a file of annotators, which names models
            self.judge = self.judge or self.pool
        else:
            one_of("--pool", self.pool, ("p_eval", "p_single", "p_pairwise"))
        self.judge = self.judge or ("barn" if self.data == "barn" else "")      # it knows its own world only
        one_of("--device", self.device, ("", "cpu", "cuda"))
        one_of("--start", self.start, ("sft", "base"))
        if self.template:                           # in one spelling, as it is part of what makes a stage
            self.template = json.dumps(variables(self.template), sort_keys=True)
        if not 0 < self.eval_top_p <= 1:
            raise InputError(f"--eval_top_p {self.eval_top_p:g} makes no sense: it is a probability above 0")
        for name, known in self.CHOICES.items():
            one_of(f"--{name}", getattr(self, name), known)

    @classmethod
    def suits(cls, given):
        """{field: default} of the fields whose default depends on the flags that are given."""
        return {}

    @property
    def asks_judge(self):
        """Whether this stage itself asks the judge; a method's Config that does says so."""
        return False

    def unneeded(self):
        """The stages in NEEDS that these settings do without; a method's Config adds its own."""
        return ("sft",) if self.start == "base" else ()

    def reads(self):
        """{flag: content, or the folder of a checkpoint} of what a stage reads beside the records and the base; a
        method's Config adds its files."""
        served = self.asks_judge and self.judge.startswith("serve:")
        return {"judge": resolve(self.judge.removeprefix("serve:"))} if served else {}

    def idle(self):
        """{flag: why it would change nothing}; a method's Config adds its own."""
        found = {}
        if self.judge == "none":
            found |= dict.fromkeys({"pool", "cache"} | ASKING | ASKED, "--judge none asks nobody")
        elif PERSON.fullmatch(self.judge):
            found |= dict.fromkeys({"pool"} | ASKED, "you are the only annotator")
        if not self.lora_rank:
            found |= dict.fromkeys(("lora_alpha", "merge"), "there are no adapters without --lora_rank")
        if not self.merge:
            found["merge_dtype"] = "without --merge nothing is merged"
        if self.device == "cpu":
            found["graph"] = "a CPU captures no decoding steps"
        return found

    @property
    def judge_cache(self):
        """The file of all that the judge has answered."""
        return Path(self.cache or Path(self.out) / "judge.jsonl")

    def dir(self, stage=""):
        """The folder of this stage, or of another one of the same run."""
        name = stage or self.stage
        return Path(self.out) / self.folders.get(name, name)

    def splits(self):
        """{split: records} of the data: sft, preference, unlabeled, val, eval."""
        return sets.load(self.data, self.eval_data, self.limit)

    @property
    def adapter(self):
        """The PEFT folder that --model is, if it is one."""
        folder = resolve(self.model)
        return folder if (folder / "adapter_config.json").exists() else None

    @property
    def base(self):
        """What --model, or the model that it is an adapter of, is called: a whole path, or a name on the hub."""
        if self.adapter is None:
            folder = resolve(self.model)
            return self.model if in_cache(folder) and not Path(self.model).exists() else str(folder.absolute())
        adapter = read_json(self.adapter / "adapter_config.json")
        name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not isinstance(name, str) or not name:
            raise InputError(f"{self.model}: its adapter_config.json does not say which model it adapts")
        return f"{name}@{revision}" if revision and not Path(name).exists() else name

    @property
    def checkpoint(self):
        """The folder of the base checkpoint."""
        base = self.base
        try:
            return resolve(base)
        except Refusal as error:
            where = self.adapter / "adapter_config.json"
            raise type(error)(f"{self.model} adapts {base}: {error}. If it has moved, write where it is now under "
                              f"base_model_name_or_path in {where}") from None

    def text(self):
        """The tokenizer and prompt form of the model."""
        text = Text(*self.tokenizer, self.day, variables(self.template))
        if self.template and not text.template:
            raise InputError(f"--template would change nothing: {self.model} has no chat template")
        return text

    @property
    def tokenizer(self):
        """The folder of the tokenizer (an adapter may bring its own), and the folder of the model."""
        own = self.adapter and (self.adapter / "tokenizer.json").exists()
        return self.adapter if own else self.checkpoint, self.checkpoint

    @property
    def revision(self):
        """The commit of a base checkpoint that came from the hub."""
        return self.checkpoint.name if in_cache(self.checkpoint) else ""


@lru_cache(None)
def helps(cls):
    """{field: the comment behind it}, over a Config and its parents."""
    found = {}
    for c in reversed(cls.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(c), re.MULTILINE))
    return {f.name: found.get(f.name, "") for f in fields(cls)}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a mistake."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help lists all flags")


def wrapped(text, room=117):
    """A docstring for the terminal, in lines of 79 columns. A line break is kept where it was made on purpose: where
    the first word of the next line would still have fitted into `room` columns."""
    lines = []
    for line in inspect.cleandoc(text).splitlines():
        before = lines[-1].rpartition("\n")[2] if lines else ""
        if before and line and len(before) + 1 + len(line.split()[0]) > room:
            lines[-1] += f"\n{line}"
        else:
            lines.append(line)
    return "\n".join(textwrap.fill(line, 79) for line in lines)


def parser_for(prog, about):
    """A Parser for a command and its description, both for --help. It returns only the flags that were given."""
    return Parser(prog, usage=f"{prog} [--flag value ...]", description=wrapped(about), allow_abbrev=False,
                  argument_default=argparse.SUPPRESS, formatter_class=lambda prog: (
                      argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=79)))


def add_flag(group, field, shown):
    """Add the flag of a dataclass field to a Parser or to a group of its flags. shown: its help."""
    kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "X"}
    group.add_argument(f"--{field.name}", help=shown.strip().replace("%", "%%"), **kind)


def spelled(argv):
    """Flags as a Parser knows them: --no_merge and --no-merge are both --no-merge."""
    return [re.sub("^--no_", "--no-", flag) for flag in underscored(argv)]


def parse(cls, argv, prog, about=""):
    """{field: value} of the flags in argv. prog, about: the command and its description, for --help."""
    parser = parser_for(prog, about)
    own = parser.add_argument_group("its own knobs")
    shared = parser.add_argument_group("shared by all stages (--sft.seed 1 is for sft alone)")
    common, help, barn = {f.name for f in fields(Config)}, helps(cls), {**PRESETS["barn"], **cls.BARN}
    for f in fields(cls):
        default = f"{f.default}" + (f"; {barn[f.name]} in barn" if barn.get(f.name, f.default) != f.default else "")
        add_flag(shared if f.name in common else own, f, help[f.name] + f" [{default}]" * bool(default))
    given, unknown = parser.parse_known_args(spelled(argv))
    if unknown:
        flag = re.sub("^--no-", "--no_", unknown[0].partition("=")[0])
        parser.error(f"{flag} is not known{did_you_mean(flag, [f'--{f.name}' for f in fields(cls)])}")
    return vars(given)


def machine(device=""):
    """The preset for the device that a run uses."""
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    return "80gb" if gigabytes > 70 else "24gb" if gigabytes > 20 else "t4"


def build(cls, given):
    """A Config: defaults < preset < what was given."""
    preset = given.get("preset") or ("barn" if given.get("model", "barn") == "barn" else machine(given.get("device")))
    one_of("--preset", preset, PRESETS)
    tuned = {}
    if given.get("lora_rank") == 0 and hasattr(cls, "lr"):          # adapters want about ten times the learning rate
        tuned = {"lr": cls.lr / 10}                                 # (Schulman et al. 2025, LoRA Without Regret)
    if preset == "barn":
        tuned = {**cls.BARN, **(cls.BARN_LORA if given.get("lora_rank") else {})}
    return cls(**{**PRESETS[preset], **tuned, **cls.suits(given), **given, "preset": preset})


def changed(cfg, settings):
    """The settings of a stage that are not the defaults, of {name: value}."""
    given = {key: getattr(cfg, key) for key in ("model", "data", "preset", "lora_rank")}
    defaults = asdict(build(type(cfg), given))
    return {key: value for key, value in settings.items() if value != defaults[key]}


def provenance(cfg):
    """What config.json keeps beside the options: versions, our commit, and that of a model from the hub."""
    commit = ""
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=BASE, capture_output=True, text=True)
        commit = git.stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, tokenizers, requests, numpy)}
    return {**asdict(cfg), "revision": cfg.revision, "day": cfg.day, "commit": commit,
            "versions": {"python": platform.python_version(), **versions}}
