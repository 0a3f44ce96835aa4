"""What models learn with a student's code: trained in the student's folder, examined by the grader's own code.

The student's tree runs `farm.py`, in a process with a time limit, on small settings. Only the weights that it leaves
count: they are loaded here, as numbers, and asked instructions that are made from the grader's seed and that stand
nowhere in the student's folder. Win rates are exact: the probability over all annotators of the offline world.
"""
import json
import random
import shlex
import subprocess
import sys
import threading
from collections import namedtuple
from functools import cached_property

import numpy as np
import torch

from data import InputError
from data.alpaca_eval import read_column
from data.barn import world
from data.barn.judge import win_probabilities
from data.barn.reward import true_reward
from data.sets import read_records
from eval import tastes_of
from exercises.student import environment
from rlhf import config, policy, reward
from rlhf.sampler import generate
from stats.length import length_controlled
from stats.winrate import mean_and_error

ASKED = 400                             # instructions for each model
RANKED = 4                              # answers to each of them that the reward model ranks
SMALL = {"sft": {"epochs": 1}, "pairs": {"pairs_per_prompt": 1},               # {stage: {flag: value}}
         "dpo": {"lr": 1e-3, "batch_size": 32, "epochs": 1},
         "reward": {"scale_answers": 800}, "ppo": {"steps": 8, "val_prompts": 128}}
KEPT_BYTES = 4000                       # of what a student's command writes last, to tell why it ended

Measured = namedtuple("Measured", "value error")


# -- the student's tree at work ------------------------------------------------------------------------------------

class Tail(threading.Thread):
    """Reads a pipe to its end, however much comes, and keeps the last bytes."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe, self.kept = pipe, b""
        self.start()

    def run(self):
        while some := self.pipe.read1(1 << 16):
            self.kept = (self.kept + some)[-KEPT_BYTES:]

    def last_line(self):
        self.join(5)
        lines = self.kept.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def run(folder, command, limit):
    """Run `python <command>` in a student's folder. Why it failed, in a sentence; "" if it did not."""
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=folder, env=environment(),
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    tail = Tail(process.stderr)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"not finished after {limit:g} seconds"
    finally:
        process.kill()
        process.wait()
    return f"exit code {code}: {tail.last_line()[:300]}" if code else ""


def line(methods, stages, *flags):
    """`farm.py` for these methods, with the small settings of the stages that it runs."""
    small = [f"--{stage}.{flag}={value}" for stage in stages for flag, value in SMALL[stage].items()]
    return shlex.join(["farm.py", "--method", methods, *flags, *small])


def train(folder, out, seed, limit):
    """Train DPO, PPO, and DPO on coins in a student's folder, into the folder `run` of `out`. {stage: why it is not
    there}. If DPO ends the first command, PPO gets one of its own."""
    few, coins = out / "few.json", out / "coins.json"
    few.write_text(json.dumps(world.splits()["val"][:16]))             # farm.py's own leaderboard is not needed
    common = ["--seed", str(seed), "--out", str(out / "run"), "--eval_data", str(few), "--device", "cpu"]
    why = run(folder, line("dpo,ppo", ("sft", "pairs", "dpo", "reward", "ppo"), *common), limit)
    missing = {"dpo": why, "ppo": why}
    if why and not there(out, "ppo"):
        missing["ppo"] = run(folder, line("ppo", ("sft", "pairs", "reward", "ppo"), *common), limit)
    missing["reward"] = missing["ppo"]
    try:
        coins.write_text(json.dumps(on_coins(out / "run" / "pairs" / "pairs.json", seed)))
    except InputError as error:
        return missing | {"coins": missing["dpo"] or str(error)}
    named = ["--name", "coins", "--pairs.name", "pairs_coins", "--pairs.labels", str(coins)]
    return missing | {"coins": run(folder, line("dpo", ("sft", "dpo"), *common, *named), limit)}


def there(out, stage):
    return (out / "run" / stage / "checkpoint").exists()


def on_coins(path, seed):
    """The pairs in a file as texts, each preferred answer drawn by a coin."""
    r, texts = random.Random(f"coins {seed}"), ("instruction", "output_1", "output_2")
    return [{**{key: pair[key] for key in texts}, "preference": r.choice((1, 2))} for pair in read_records(path, texts)]


# -- examined by the grader ----------------------------------------------------------------------------------------

def instructions(seed):
    """Records of instructions that are in no split, with reference answers."""
    r = random.Random(f"barn grading {seed}")
    known = {record["instruction"] for records in world.splits().values() for record in records}
    return [world.record(one, r) for one in world.unique(ASKED, lambda: world.draw_instruction(r), known)]


class Examiner:
    """Asks the models in a run folder the instructions of a seed."""

    def __init__(self, out, seed):
        torch.set_num_threads(1)
        self.run, self.seed, self.asked = out / "run", seed, instructions(seed)
        self.cfg = config.build(config.Config, {"device": "cpu"})
        self.text = self.cfg.text()

    def load(self, stage):
        """The weights of a stage as a Policy."""
        folder = self.run / stage / "checkpoint"
        return policy.Policy(policy.load_base(config.build(config.Config, {
            "model": str(folder), "device": "cpu", "lora_rank": 0, "preset": "barn"})))

    def answers(self, stage, n=1):
        """n answers to each instruction: rows [(prompt ids, response ids)], and their texts."""
        prompts = [self.text.prompt(record) for record in self.asked]
        rows = generate(self.load(stage), prompts, self.text, self.cfg, self.seed, n)
        return rows, [self.text.decode(response) for _, response in rows]

    def wins(self, stage):
        """The probability (N,) that the answer of a model is preferred to the reference answer."""
        _, texts = self.answers(stage)
        return win_probabilities(tastes_of("barn", "p_eval"), [
            (record["instruction"], text, record["output"]) for record, text in zip(self.asked, texts)])

    @cached_property
    def sft(self):
        return self.wins("sft")

    def gain(self, stage):
        """By how many points a model wins more often than SFT."""
        return Measured(*mean_and_error(100 * (self.wins(stage) - self.sft)))

    def true_accuracy(self):
        """How often the reward model ranks two answers of the SFT model as the true reward does, in percent."""
        rows, texts = self.answers("sft", RANKED)
        model = reward.with_head(self.load("reward"), self.run / "reward" / "checkpoint")
        scores = reward.scores(model, rows, self.cfg).view(-1, RANKED)
        truth = torch.tensor([true_reward(self.asked[i // RANKED]["instruction"], text)
                              for i, text in enumerate(texts)]).view(-1, RANKED)
        share, n = reward.agreement(scores, truth), int((truth.diff() != 0).sum())
        return Measured(100 * share, 100 * (share * (1 - share) / n) ** .5)


# -- length control ------------------------------------------------------------------------------------------------

def annotations(seed):
    """{model: AlpacaEval annotations} of two models by a judge that likes long answers: one is brief, one is wordy."""
    r, found = np.random.default_rng(seed), {}
    reference = r.integers(20, 60, 300)
    for model, longer in (("brief", .7), ("wordy", 1.5)):
        own = np.maximum(1, reference * longer + r.normal(0, 12, 300)).astype(int)
        wins = r.random(300) < 1 / (1 + np.exp(-(own - reference) / 25 - .3))
        found[model] = [{"instruction": f"Question {i}", "output_1": "word " * int(a), "output_2": "word " * int(b),
                         "generator_1": "reference", "generator_2": model, "preference": 1. + float(win)}
                        for i, (a, b, win) in enumerate(zip(reference, own, wins))]
    return found


def length_control(folder, out, seed, limit):
    """By how many points the LC of the student's eval.py is off, at most; InputError if it has none."""
    found, files = annotations(seed), []
    for model, records in found.items():
        files.append(out / f"{model}.json")
        files[-1].write_text(json.dumps(records))
    command = shlex.join(["eval.py", *map(str, files), "--resamples", "50", "--out", str(out / "eval")])
    if why := run(folder, command, limit):
        raise InputError(why)
    theirs = read_column(f"{out / 'eval' / 'leaderboard.csv'}:length_controlled_winrate")
    if lacking := found.keys() - theirs.keys():
        raise InputError(f"eval.py cannot tell the length-controlled win rate of {', '.join(sorted(lacking))}")
    return Measured(max(abs(theirs[model] - own_rate(records)) for model, records in found.items()), np.nan)


def own_rate(records):
    """The length-controlled win rate by the grader's own code."""
    p, own, reference = zip(*((r["preference"], len(r["output_2"]), len(r["output_1"])) for r in records))
    return length_controlled(p, own, reference)["length_controlled_winrate"]
