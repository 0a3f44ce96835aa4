"""What is a label worth? Reward models, DPO and PPO by the number of labels and by how many of them are wrong.

Claim. AlpacaFarm (arXiv 2305.14387) flips a quarter of the simulated labels, so that they are as noisy as people's.
What that costs, and what more labels bring, is asked here: fewer wrong labels and more pairs make better models.

How it is measured. The annotators of p_ann label pairs of answers of the SFT model. With 0 and 25 % of the labels
flipped there are sets of 250, 500, 1,000, 2,000 and all pairs, which are about 5,800; with 10 and 40 % all pairs. Fewer
pairs are a random part of more. Each set trains a reward model and DPO with their defaults; three sets train PPO, too.
Of a reward model: the true accuracy, which is how often it ranks two answers to a prompt of val as the true reward
does. Of policies: the expected win rate, which is exact in the offline world (averaged over all annotators and both
orders), and the win rate by verdicts, on all prompts of eval. Errors are standard errors over prompts, paired within a
seed; how much one training differs from another shows between the seeds.

Thresholds, fixed before seeds 2 to 4 were run, of expected win rates: with all pairs, DPO with clean labels is more
than 5 points better than with a quarter flipped; with a quarter flipped, DPO with all pairs is more than 5 points
better than with 500.

Cost: about 18 minutes of one core for each seed from nothing: 5 for PPO, 5 for DPO, 4 each for reward models and pairs;
3 less after the study overoptimization, which has some of the stages.

What would refute the claim: models that get worse with more pairs or with fewer wrong labels, by more than the errors.
"""
from dataclasses import dataclass
from math import nan

import numpy as np

from data import InputError, read_json
from stats import plots
from stats.tables import plus_minus, table
from stats.winrate import paired_difference, win_rate
from studies import kit

CLEAN, NOISY, FEW, ALL = 0., .25, 500, 0        # what the thresholds compare: shares of wrong labels, numbers of pairs
WITH_PPO = ((CLEAN, ALL), (NOISY, ALL), (NOISY, FEW))
MEASURES = {"true_accuracy": "Reward model, true accuracy in %", "dpo": "DPO, expected win rate in %",
            "dpo_verdicts": "DPO, win rate by verdicts in %", "ppo": "PPO, expected win rate in %",
            "ppo_verdicts": "PPO, win rate by verdicts in %"}
TINY_PPO = "--steps 2 --rollout_batch 16 --batch_size 16 --val_prompts 16"      # with --quick


@dataclass
class Config(kit.Config):
    seeds: str = "2,3,4"                # everything is trained once for each
    flips: str = "0,.1,.25,.4"          # shares of the labels that are wrong, with all pairs
    sizes: str = "250,500,1000,2000"    # numbers of pairs beside all, with 0 and a quarter of the labels wrong

    def __post_init__(self):
        super().__post_init__()
        try:
            shares = {CLEAN, NOISY, *map(float, self.flips.split(","))}
            sizes = {FEW, *map(int, self.sizes.split(","))} - {ALL}
        except ValueError:
            raise InputError("--flips and --sizes are numbers, as in --flips 0,.25 --sizes 500,2000") from None
        if max(shares) > .5 or min(*shares, *sizes) < 0:
            raise InputError("--flips lie between 0 and 0.5, and --sizes are above 0")
        self.cells = [(flip, size) for flip in sorted(shares) for size in (*sorted(sizes), ALL)
                      if size == ALL or flip in (CLEAN, NOISY)]


def name_of(flip, size):
    """The end of the names of stages with these labels: f25_n500, or f25 with all pairs."""
    return f"f{100 * flip:g}" + f"_n{size}" * bool(size)


def line(method, flip, size):
    """The line that trains a method with `size` labels, of which the share `flip` is wrong."""
    name = name_of(flip, size)
    flags = f"--pairs.flip {flip:g} --pairs.name pairs_{name}" + f" --pairs.max_pairs {size}" * bool(size)
    flags += f" --reward.name reward_{name}" * (method == "ppo")
    return f"{method} {flags} --name {method}_{name}"


def measured(cfg, seed):
    """(rows of a seed, one for each set of labels; {(method, flip, size): preferences (N,)})."""
    rows, folders = [], {}
    for flip, size in cfg.cells:
        made = {stage: read_json(folder / "result.json")["metrics"] for stage, folder in (
            ("reward", kit.train(cfg, seed, line("reward", flip, size))),
            ("pairs", cfg.runs(seed) / f"pairs_{name_of(flip, size)}"))}
        rows.append({"seed": seed, "flip": flip, "size": size, "pairs": made["pairs"]["pairs"],
                     "true_accuracy": 100 * made["reward"].get("true_accuracy", nan)})
        folders["dpo", flip, size] = kit.train(cfg, seed, line("dpo", flip, size))
        if (flip, size) in WITH_PPO:
            folders["ppo", flip, size] = kit.train(cfg, seed, line("ppo", flip, size) + f" {TINY_PPO * cfg.quick}")
    rates, verdicts = (ask(cfg, seed, list(folders.values())) for ask in (kit.rates, kit.verdicts))
    for row in rows:
        for method in ("dpo", "ppo"):
            folder = folders.get((method, row["flip"], row["size"]))
            found = win_rate(rates[folder.name] if folder else [])
            row |= {method: found["win_rate"], f"{method}_error": found["standard_error"],
                    f"{method}_verdicts": win_rate([each["preference"] for each in verdicts[folder.name]]
                                                   if folder else [])["win_rate"]}
    return rows, {key: rates[folder.name] for key, folder in folders.items()}


def compared(rates):
    """[{what, value, error, passed}] of one seed's {(method, flip, size): preferences}; passed: None where there is no
    threshold."""
    rules = [("DPO, all pairs: clean less a quarter flipped, over 5 points", (CLEAN, ALL), (NOISY, ALL), 5),
             ("DPO, a quarter flipped: all pairs less 500, over 5 points", (NOISY, ALL), (NOISY, FEW), 5),
             ("DPO: 2,000 clean pairs less all with a quarter flipped", (CLEAN, 2000), (NOISY, ALL), None)]
    found = []
    for what, one, other, least in rules:
        if ("dpo", *one) in rates:
            value, error = paired_difference(rates["dpo", *one], rates["dpo", *other])
            found.append({"what": what, "value": value, "error": error, "passed": least and value > least})
    return found


# -- tables and figures --------------------------------------------------------------------------------------------

def matrix(means, column, error=""):
    """A table with a row for each share of wrong labels and a column for each number of pairs."""
    sizes = [size for flip, size in means if flip == NOISY]
    lines = []
    for flip in dict.fromkeys(flip for flip, _ in means):
        rows = [means.get((flip, size), {}) for size in sizes]
        lines.append([f"{100 * flip:g} % wrong", *(plus_minus(row.get(column), row.get(error)) for row in rows)])
    return table(["", *(f"{size:,}" if size else "all" for size in sizes)], *lines)


def figures(means):
    """Win rate by the number of pairs, and by the share of wrong labels where there are all pairs."""
    def band(cells, across, method):
        rows = [means[key] for key in cells]
        x, level, error = (np.array([row[column] for row in rows]) for column in (across, method, f"{method}_error"))
        return x, level, level - error, level + error
    by_size = {f"DPO, {100 * flip:g} % wrong": band([key for key in means if key[0] == flip], "pairs", "dpo")
               for flip in (CLEAN, NOISY)}
    by_flip = {"DPO": band([key for key in means if key[1] == ALL], "flip", "dpo"),
               "PPO": band([key for key in WITH_PPO if key[1] == ALL], "flip", "ppo")}
    accuracy = {name: (x, np.array([means[flip, size]["true_accuracy"] for flip, size in means if flip == share]))
                for share, (name, (x, *_)) in zip((CLEAN, NOISY), by_size.items())}
    rate = "expected win rate in %"
    return {
        "labels": plots.lines(by_size, "Win rate by the number of labels", "pairs", rate, log_x=True),
        "labels_flips": plots.lines(by_flip, "Win rate by wrong labels, all pairs", "share of wrong labels", rate),
        "labels_accuracy": plots.lines(accuracy, "Reward model by the number of labels", "pairs", "true accuracy in %",
                                       log_x=True)}


def run(cfg):
    rows, found = [], {}
    for seed in cfg.numbers:
        more, rates = measured(cfg, seed)
        rows += more
        found[seed] = compared(rates)
    means, over = kit.means(rows, "flip", "size"), f"mean over {len(cfg.numbers)} seeds"
    parts = [f"By the share of wrong labels and the number of pairs; {over}\n± standard error over prompts:"]
    for column, what in MEASURES.items():
        if any(row[column] == row[column] for row in means.values()):
            parts += [f"{what}:", matrix(means, column, f"{column}_error")]
    return kit.Result({"cells": rows, "compared": found}, "\n\n".join([*parts, kit.told(found)]), {"labels": rows},
                      figures(means))
