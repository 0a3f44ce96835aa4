"""Equal cost: which method wins most after the same seconds of work?

Claim. AlpacaFarm (arXiv 2305.14387, table 2) ranks PPO before best-of-n before expert iteration, each at its best,
whatever it costs. Here all of them, and GRPO, RLOO and online DPO, get the same CPU seconds.

How it is measured. SFT, pairs and reward model are shared and not counted. A run's seconds are those of one thread from
there to the answers to all prompts of eval: sampling, scoring, learning, looks at val, loading and saving. For every
budget a method is trained anew, with a learning-rate schedule that ends there. How many steps fit (for expert
iteration: prompts; for best-of-n: answers to a prompt) is calculated from the seconds of three runs with seed 100 that
answer eval, too; nobody judges these answers. Tuning is the same for all methods that train: three learning rates
(half, once and twice the default), one run each with seed 100, of as many steps as fit into --tuning seconds. The best
on val is taken for all budgets; eval decides nothing. All other settings are the defaults, which were tuned on val
before, at their own sizes. Best-of-n has nothing to tune. It trains nothing, so that it pays its seconds again for
every new set of answers.
Judge calls are the second cost. Methods with the reward model pay the labels of the pairs, online DPO its own; it has
one more run with as many calls as the pairs took. A table also has the CPU seconds with those for pairs and reward
model, which online DPO does without.
The offline judge works in the same process, so that its seconds count for online DPO.

Cost: about 50 CPU minutes for four seeds, of which 11 are tuning and 6 are shared stages. CPU seconds grow where
other work shares the core, so run it on a quiet one. On a GPU, seconds are those of the clock.

What would refute the claim: at the largest budget a method is behind one that the paper ranks lower, by more than two
standard errors of the paired difference and in most seeds.
"""
from dataclasses import dataclass
from math import floor, inf

import numpy as np
import torch

from data import InputError, one_of, run_folders
from stats import plots
from stats.seeds import mean_difference
from stats.tables import filled, number, plus_minus, table
from stats.winrate import win_rate
from studies import kit

# {method: (the flag that spends its seconds, two sizes of short runs from which the seconds are calculated)}
SPENDS = {"ppo": ("steps", 2, 6), "grpo": ("steps", 2, 6), "rloo": ("steps", 2, 6), "online_dpo": ("steps", 2, 6),
          "expert_iteration": ("prompts", 64, 256), "best_of_n": ("n", 4, 16)}
TINY = {"ppo": "--rollout_batch 16 --batch_size 16 --val_prompts 16", "grpo": "--prompts 4 --n 4 --batch_size 16",
        "rloo": "--prompts 4 --n 4 --batch_size 16", "online_dpo": "--prompts 8 --batch_size 8",
        "expert_iteration": "--n 2 --epochs 1", "best_of_n": ""}         # flags with --quick
RATES = (.5, 1., 2.)                    # learning rates that are tried, in defaults
PAPER = ("ppo", "best_of_n", "expert_iteration")        # best first
SEED = 100                              # of all runs that settings are chosen with


@dataclass
class Config(kit.Config):
    seeds: str = "0,1,2,3"              # everything is trained once for each
    budgets: str = "10,20,40"           # seconds of a run
    tuning: float = 20.                 # seconds of a run in which a learning rate is tried
    methods: str = ",".join(SPENDS)     # what is compared; the first is what the others are compared with

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.budgets, self.tuning = "1", .5
        for name in self.names:
            one_of("--methods", name, SPENDS)
        try:
            self.seconds = sorted({float(word) for word in self.budgets.split(",")})
        except ValueError:
            raise InputError(f"--budgets {self.budgets} are no seconds: give them as in --budgets 10,20") from None
        if not min(*self.seconds, self.tuning) > 0 or max(*self.seconds, self.tuning) == inf:
            raise InputError("--budgets and --tuning are seconds, more than 0")

    @property
    def names(self):
        return list(dict.fromkeys(self.methods.split(",")))


# -- what fits into a budget ---------------------------------------------------------------------------------------

def command(cfg, method, size, lr):
    """The line that runs a method with this size and learning rate (None: it has none)."""
    flag, *_ = SPENDS[method]
    said, name = f"{method} --{flag} {size}", f"{method}_{flag}{size}"
    if lr is not None:
        said, name = f"{said} --lr {lr:.3g}", f"{name}_lr{lr:.3g}"
    return f"{said} --name {name} {TINY[method] * cfg.quick}"


def line_through(one, two):
    """(seconds without any size, seconds for each unit of it) of two runs (size, seconds)."""
    slope = max((two[1] - one[1]) / (two[0] - one[0]), 1e-9)
    return max(0., one[1] - slope * one[0]), slope


def size_for(seconds, fixed, slope):
    """The largest size that fits into so many seconds, 0 if none does."""
    return max(0, floor((seconds - fixed) / slope))


def timed(cfg, method, size, lr):
    """(size, seconds) of a run that answers the prompts of eval, as those that are compared do."""
    return size, kit.seconds_of(kit.train(cfg, SEED, command(cfg, method, size, lr)))


def tuned(cfg, method):
    """The settings of a method, chosen on val: {lr, fixed, slope, tried: [{lr, size, seconds, win rate on val}]}."""
    _, small, larger = SPENDS[method]
    default, on_val = getattr(kit.configs(cfg, SEED, method)[method], "lr", None), kit.on_val(cfg)
    short = timed(cfg, method, small, default)
    size = max(small + 1, size_for(cfg.tuning, *line_through(short, timed(cfg, method, larger, default))))
    tried = []
    for lr in [default * factor for factor in RATES] if default else [None]:
        folder = kit.train(on_val, SEED, command(on_val, method, size, lr))
        rate = win_rate(kit.rates(on_val, SEED, [folder])[folder.name])["win_rate"]
        tried.append({"lr": lr, "size": size, "seconds": kit.seconds_of(folder), "win_rate": rate,
                      "judge_calls": run_folders.costs_of(folder)["judge_calls"]})
    best = max(tried, key=lambda row: row["win_rate"])
    # a long run says more than two short ones: answers get longer while a method learns
    fixed, slope = line_through(short, timed(cfg, method, size, best["lr"]))
    return {"lr": best["lr"], "fixed": fixed, "slope": slope, "tried": tried}


# -- the runs ------------------------------------------------------------------------------------------------------

def cell(cfg, seed, method, budget, size, lr):
    """One run and its costs: a row of the CSV file, and the folder."""
    folder = kit.train(cfg, seed, command(cfg, method, size, lr))
    costs, start = run_folders.costs_of(folder), run_folders.costs_of(kit.start(cfg, seed))
    return {"method": method, "budget": budget, "seed": seed, "size": size, "lr": lr,
            "seconds": kit.seconds_of(folder), "cpu_seconds_after_sft": costs["cpu_seconds"] - start["cpu_seconds"],
            "judge_calls": costs["judge_calls"], "kl": costs.get("kl")}, folder


def measured(cfg, seed, plans):
    """Rows of a seed with what their answers are worth, and {(method, budget): preferences (N,)}."""
    cells = [cell(cfg, seed, *each) for each in plans]
    folders = list(dict.fromkeys(folder for _, folder in cells))
    verdicts, rates = kit.verdicts(cfg, seed, folders), kit.rates(cfg, seed, folders)
    for row, folder in cells:
        row["verdicts"] = win_rate([record["preference"] for record in verdicts[folder.name]])["win_rate"]
        row["win_rate"] = win_rate(rates[folder.name])["win_rate"]
        row["true_reward"] = kit.true_reward_of(folder)
    return [row for row, _ in cells], {(row["method"], row["budget"]): rates[folder.name] for row, folder in cells}


def planned(cfg, settings):
    """[(method, budget, size, lr)] of all runs of a seed; the budget "calls" is that of the pairs in judge calls."""
    plans = [(method, budget, size, chosen["lr"]) for method, chosen in settings.items() for budget in cfg.seconds
             if (size := size_for(budget, chosen["fixed"], chosen["slope"]))]
    if "online_dpo" in settings:
        chosen = settings["online_dpo"]
        asked = run_folders.costs_of(kit.train(kit.on_val(cfg), SEED, "pairs"))["judge_calls"]
        each = chosen["tried"][0]["judge_calls"] / chosen["tried"][0]["size"]
        plans.append(("online_dpo", "calls", max(1, round(asked / each)), chosen["lr"]))
    return plans


# -- tables and figures --------------------------------------------------------------------------------------------

def paper_order(cfg, preferences):
    """{"better - worse": mean_difference} at the largest budget, of the methods that the paper ranks."""
    there = [name for name in PAPER if (name, cfg.seconds[-1]) in preferences]
    return {f"{better} - {worse}": mean_difference(preferences[better, cfg.seconds[-1]],
                                                   preferences[worse, cfg.seconds[-1]])
            for better, worse in zip(there, there[1:])}


def matrix(cfg, text_of):
    """A table with a row for each method and a column for each budget; text_of(method, budget) -> a cell."""
    return table(["", *(f"{budget:g} s" for budget in cfg.seconds)],
                 *([method, *(text_of(method, budget) for budget in cfg.seconds)] for method in cfg.names))


def tables(cfg, settings, means, rates, differences, order):
    """All that was found, as text."""
    def rate(method, budget):
        found = rates.get((method, budget))
        if not found:
            return ""
        spread = f" ({found['spread']:.1f})" * (found["spread"] == found["spread"])     # NaN of a single seed
        return plus_minus(found["win_rate"], found["standard_error"]) + spread

    def difference(method, budget):
        return ahead(differences.get((method, budget)))

    def mean(column, form):
        return lambda method, budget: number(means.get((method, budget), {}).get(column), form)
    sections = {
        f"Win rate in % by seconds of a run, mean over {len(cfg.numbers)} seeds ± standard error over prompts (in "
        "brackets: standard deviation over seeds):": matrix(cfg, rate),
        f"Paired difference to {cfg.names[0]} at equal seconds (in how many seeds it is ahead):":
            matrix(cfg, difference),
        f"The paper's order at {cfg.seconds[-1]:g} s:": table(["better in the paper", "difference"], *(
            [name, ahead(found)] for name, found in order.items())) if order else "",
        "True reward:": matrix(cfg, mean("true_reward", ".2f")) if has_truth(means) else "",
        "Seconds that the runs took:": matrix(cfg, mean("seconds", ".1f")),
        "Size: steps; of expert_iteration prompts, of best_of_n answers to a prompt:":
            matrix(cfg, mean("size", ".0f")),
        "Judge calls for training, and CPU seconds after SFT with those for pairs and reward model where a method "
        "needs them; at the largest budget, and of online DPO with as many calls as the pairs took:":
            costs(cfg, means, rate),
        "Learning rates tried on val with seed 100, and the win rate there:": tried(settings)}
    return "\n\n".join(f"{filled(title)}\n\n{shown}" for title, shown in sections.items() if shown)


def ahead(found):
    """A mean_difference as a cell: the points, and in how many seeds there are any."""
    if not found:
        return ""
    points = plus_minus(found["difference"], found["standard_error"], "+.1f")
    return f"{points} ({found['n_ahead']}/{found['n_runs']})"


def costs(cfg, means, rate):
    """A table of judge calls and of all seconds after SFT."""
    return table(["", "win rate", "judge calls", "seconds", "after SFT"], *(
        [f"{method}{' (calls)' * (budget == 'calls')}", rate(method, budget),
         *(number(row[column], ".0f") for column in ("judge_calls", "seconds", "cpu_seconds_after_sft"))]
        for (method, budget), row in means.items() if budget in (cfg.seconds[-1], "calls")))


def tried(settings):
    """A table of the learning rates that were tried, the chosen ones with a star."""
    return table(["", "lr", "win rate", "seconds"], *(
        [method, f"{row['lr']:.3g}{' *' * (row['lr'] == chosen['lr'])}", number(row["win_rate"], ".1f"),
         number(row["seconds"], ".1f")]
        for method, chosen in settings.items() for row in chosen["tried"] if row["lr"]))


def has_truth(means):
    return any(row["true_reward"] == row["true_reward"] for row in means.values())


def figure(cfg, rows, column, y):
    """Seconds against a column, a line for each method, and a band from the lowest to the highest seed."""
    series = {}
    for method in cfg.names:
        found = [[row for row in rows if (row["method"], row["budget"]) == (method, budget)] for budget in cfg.seconds]
        found = [each for each in found if each]
        values = [[row[column] for row in each] for each in found]
        series[method] = (np.array([np.mean([row["seconds"] for row in each]) for each in found]),
                          *(np.array([f(each) for each in values]) for f in (np.mean, np.min, np.max)))
    return plots.lines(series, "At equal cost: mean, lowest and highest seed", "seconds", y, log_x=True)


def run(cfg):
    if kit.uses_cpu(kit.shared(cfg).device):
        torch.set_num_threads(1)
    settings = {method: tuned(cfg, method) for method in cfg.names}
    plans = planned(cfg, settings)
    if not plans:
        least = min(chosen["fixed"] + chosen["slope"] for chosen in settings.values())
        raise InputError(f"nothing fits into --budgets {cfg.budgets}: the shortest run takes {least:.1f} s")
    todo = len(cfg.numbers) * sum(settings[method]["fixed"] + settings[method]["slope"] * size
                                  for method, _, size, _ in plans)
    print(f"\nsettings are chosen; {len(cfg.numbers) * len(plans)} runs, about {todo / 60:.0f} minutes, follow")
    rows, preferences = [], {}
    for seed in cfg.numbers:
        more, found = measured(cfg, seed, plans)
        rows += more
        for key, p in found.items():
            preferences.setdefault(key, {})[seed] = p
    means, rates = kit.means(rows, "method", "budget"), {key: kit.averaged(found) for key, found in preferences.items()}
    differences = {(method, budget): mean_difference(found, preferences[cfg.names[0], budget])
                   for (method, budget), found in preferences.items()
                   if method != cfg.names[0] and (cfg.names[0], budget) in preferences}
    order = paper_order(cfg, preferences)
    numbers = {"settings": settings, "paper_order": order, "cells": [
        {"method": method, "budget": budget, **means[method, budget], **rates[method, budget],
         "difference": differences.get((method, budget))} for method, budget in means]}
    figures = {"equal_cost": figure(cfg, rows, "win_rate", "win rate in %")}
    if has_truth(means):
        figures["equal_cost_truth"] = figure(cfg, rows, "true_reward", "true reward")
    return kit.Result(numbers, tables(cfg, settings, means, rates, differences, order), {"equal_cost": rows}, figures)
