"""Speedrun: how much can be won over SFT in 60 CPU seconds?

    python farm.py --study speedrun --method ppo --steps 16
    python farm.py --study speedrun --method ppo --steps 16 --on_val        to choose settings, which eval must not

Claim. There is none: this is a race, and README has the board. SFT and the pairs with their labels are given, as they
are by default. Everything else counts: the reward model if the method needs one, learning, and the answers to all
prompts of eval. Best-of-n and the like answer within the time, too.

How it is measured. CPU seconds of one thread, of the slowest seed. The result is the paired difference to SFT of the
same seed in win rate, in points, mean over four seeds. In the offline world the win rate is exact: the probability of a
win over all annotators and both orders. A run that takes longer has no row, and neither has one that looks at the
hidden true reward. Settings are chosen with --on_val or on other seeds. The split val has half as many prompts as eval,
so that a run with --on_val takes less time than the one that counts.

Cost: four minutes for training, and four for SFT and pairs if there are none in --out yet.

What would refute a row: the command in it, run again with other seeds, finds less by more than two standard errors.
"""
from dataclasses import dataclass

import torch

from data import InputError, one_of, read_json, run_folders
from rlhf import config, methods, stages
from stats.seeds import mean_difference
from stats.tables import filled, number, plus_minus, table
from studies import kit

GIVEN = {"sft", "pairs"}                # the stages that are there before the clock starts


@dataclass
class Config(kit.Config):
    seeds: str = "0,1,2,3"              # everything is trained once for each
    method: str = "ppo"                 # what runs; its own flags are flags of this command, too
    seconds: float = 60.                # what a run may take
    on_val: bool = False                # answer and judge val, not eval: to choose settings

    def __post_init__(self):
        super().__post_init__()
        one_of("--method", self.method, [name for name in methods() if name not in (*GIVEN, "base", "reward")])
        if not self.seconds > 0:
            raise InputError("--seconds is more than 0")
        if self.on_val and self.results:
            raise InputError("--on_val gives no results that are worth keeping: leave out --results or --on_val")


def checked(cfg):
    """InputError for flags that change what is given, or that look at what nobody knows."""
    for stage in GIVEN & cfg.passed.keys():
        for flag in cfg.passed[stage]:
            raise InputError(f"--{stage}.{flag} is not allowed in this race: {stage} is given")
    if cfg.passed[cfg.method].get("reward") == "true":
        raise InputError("--reward true is not allowed in this race: nobody knows the true reward")


def line(cfg):
    """What is trained, as after `farm.py --method`. The names are of these settings alone."""
    id = stages.digest(cfg.passed)[:8]
    reward = f" --reward.name reward_{id}" * bool(cfg.passed.get("reward"))
    return f"{cfg.method} --name speedrun_{cfg.method}_{id}{reward}"


def command(cfg):
    """The method and its flags, as a reader has to give them."""
    flags = [f"--{stage}.{flag} {value}" if stage not in ("", cfg.method) else f"--{flag} {value}"
             for stage, given in cfg.passed.items() for flag, value in given.items() if flag != "eval_data"]
    return " ".join([cfg.method, *flags])


def one_run(cfg, seed):
    """({what a run took}, preferences (N,) of the method, and of what it started from)."""
    folder, start = kit.train(cfg, seed, line(cfg)), kit.start(cfg, seed)
    made = kit.configs(cfg, seed, line(cfg))
    rates = kit.rates(cfg, seed, [folder, start])
    return {"seed": seed, "judge_calls": run_folders.costs_of(folder)["judge_calls"],
            "seconds": sum(kit.seconds_of(one.dir()) for method, one in made.items() if method not in GIVEN),
            "true_reward": kit.true_reward_of(folder)}, rates[folder.name], rates[start.name]


def before():
    """{command: its numbers} of all races in studies/results/, so that the file there keeps them all."""
    return read_json(kit.RESULTS / "speedrun.json").get("numbers", {})


def refused(cfg, slowest):
    """Why there is no row for the board, in a sentence; "" if there is one."""
    if slowest > cfg.seconds:
        return f"the slowest seed took {slowest:.1f} s, and {cfg.seconds:g} s are allowed."
    if cfg.on_val or cfg.quick:
        return "the board is about all prompts of eval. Without --on_val and --quick there is one."
    if other := sorted(cfg.passed[""].keys() - config.ELSEWHERE | cfg.passed[""].keys() & {"eval_data"}):
        return f"with --{other[0]} it is another race than that of the board."
    return ""


def verdict(cfg, slowest, row):
    """What comes of it, in a sentence, and the row of the board."""
    if why := refused(cfg, slowest):
        return filled(f"No row: {why}")
    return f"The row for the board in README.md:\n\n{row}"


def run(cfg):
    checked(cfg)
    cfg = kit.on_val(cfg) if cfg.on_val else cfg
    if kit.uses_cpu(kit.shared(cfg).device):
        torch.set_num_threads(1)
    rows, ours, theirs = [], {}, {}
    for seed in cfg.numbers:
        row, ours[seed], theirs[seed] = one_run(cfg, seed)
        rows.append(row)
    found = mean_difference(ours, theirs)
    for row in rows:
        row["difference"] = found["by_seed"][row["seed"]]["difference"]
        row["standard_error"] = found["by_seed"][row["seed"]]["standard_error"]
    slowest, calls = max(row["seconds"] for row in rows), max(row["judge_calls"] for row in rows)
    commit = config.provenance(kit.shared(cfg))["commit"]
    result = plus_minus(found["difference"], found["standard_error"], "+.1f")
    board = (f"| {result} | {number(found['difference_spread'], '.1f')} | {slowest:.0f} s | {calls:.0f} "
             f"| `{command(cfg)}` | {commit} |")
    text = "\n\n".join([
        filled(f"{command(cfg)}: points of win rate over {kit.start(cfg, cfg.numbers[0]).name} on the same prompts, "
               "± standard error over prompts"),
        table(["seed", "points", "seconds", "judge calls", "true reward"], *(
            [str(row["seed"]), plus_minus(row["difference"], row["standard_error"], "+.1f"),
             number(row["seconds"], ".1f"), str(row["judge_calls"]), number(row["true_reward"])] for row in rows)),
        f"mean {result}, standard deviation over {len(rows)} seeds {number(found['difference_spread'], '.1f')}",
        verdict(cfg, slowest, board)])
    found |= {"slowest": slowest, "allowed": not refused(cfg, slowest), "board": board}
    return kit.Result(before() | {command(cfg): found}, text, {f"speedrun_{cfg.method}": rows})
