"""Evaluation: do win rates on one set of instructions tell those on another, and how many prompts does it take?

Claim. AlpacaFarm (arXiv 2305.14387, section 4.4, figure 5): win rates on its 805 evaluation instructions and on
instructions that people have put to a public demo correlate over methods: R2 .97, Spearman .90.

How it is measured. All methods (--methods) answer two more sets of 500 instructions that no split has. The offline
world makes them: another mix of kinds (more stories and notes, fewer lists), phrasings that no learner has seen, and
both, which plays the demo. Elsewhere --demo names a file with one. The judge compares the answers with references, by
one verdict for each prompt, and in the offline world also by the exact win rate. Intervals are over prompts, drawn
anew on both sides, for the mean over the seeds; the trained models are fixed.
How many prompts: n prompts of eval and n of the other set are drawn at random, without replacement. How well do the
two rankings by verdicts agree, and how well does that of eval agree with the ranking of all its prompts? The draws are
parts of these sets: the more of a set is drawn, the less its draws differ, and the interval gets too narrow.

Cost: 3 minutes on one core for each seed after `farm.py --method all` in the same --out, which takes about 25.
What would refute the claim, fixed before seeds 2 to 4 were run: R2 under .75 or Spearman under .8 on a set. Measured
before, on seed 0 with ten methods: R2 .93 with another mix, .93 with new phrasings, .89 with both.
"""
import copy
import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from data import InputError, one_of
from data.barn.world import EVEN, demo
from data.sets import read_records
from rlhf import plan, policy, quark, reward_conditioning, rewards
from rlhf.answers import room
from rlhf.sampler import generate
from stats import plots
from stats.ranking import CORRELATIONS, agreement_over_prompts, resampled_scores, spearman
from stats.seeds import mean_and_spread
from stats.tables import estimate, filled, number, plus_minus, table
from stats.winrate import interval, resample, usable
from studies import kit

PAPER = {"spearman": .90, "r2": .97}
BOUNDS = {"r2": .75, "spearman": .8}    # fixed before; each set's value lies above them if the claim holds
QUICK = "sft,simpo,reward_conditioning,best_of_n"       # methods with --quick
SIZES = (25, 50, 100, 200, 400, 800)    # prompts that are drawn
SEED = 3                                # beside that of the stage, of its answers to another set
DRAWS = 1000                            # of so many prompts


@dataclass
class Config(kit.Config):
    seeds: str = "2,3,4"                # everything is trained once for each
    methods: str = "all"                # what is compared: all, or names with commas
    demo: str = ""                      # file with the second set, in AlpacaEval's format (default: the world's own)

    def __post_init__(self):
        super().__post_init__()
        for name in self.names:
            one_of("--methods", name, plan.chosen("all"))

    @property
    def names(self):
        return plan.chosen(QUICK if self.quick and self.methods == "all" else self.methods)


# -- the other sets ------------------------------------------------------------------------------------------------

def sets(cfg):
    """{name: records} of the sets beside eval."""
    common = kit.shared(cfg)
    if not cfg.demo and common.data != "barn":
        raise InputError("which is the second set? Give --demo FILE; only the offline world makes one")
    found = {"demo": read_records(cfg.demo)} if cfg.demo else {
        "other mix": demo(phrasings="old"), "new phrasings": demo(phrasings="new", mix=EVEN), "demo": demo()}
    return {name: records[:common.limit or None] for name, records in found.items()}


def asking(cfg, name, records):
    """The same study with the records of a set in the place of eval, for kit.verdicts and kit.rates."""
    path = cfg.folder / "evaluation" / f"{name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    other = copy.copy(cfg)
    other.passed = {**cfg.passed, "": {**cfg.passed.get("", {}), "eval_data": str(path)}}
    return other


@torch.no_grad()
def answers(method, own, records):
    """The answers (texts) of a finished stage to records, as it answers the eval split. own: its Config."""
    text, n = own.text(), 1
    if method == "reward_conditioning":
        text = text.marked(reward_conditioning.GOOD)
    if method == "quark":
        text = text.marked(quark.mark(own.quantiles))
    if method == "best_of_n":
        model, n = policy.start(own), own.n
    else:
        model = policy.load(own, method)
    rows = generate(model, text.shortened(records, room(model, text, own)), text, own, own.seed + SEED, n, judged=True)
    best = torch.zeros(len(records), dtype=torch.long)
    if method == "best_of_n":
        best = rewards.scorer(own, text, model)(rows).view(-1, n).argmax(1)
    return [text.decode(rows[i * n + j][1]) for i, j in enumerate(best.tolist())]


def answered(cfg, seed, name, records):
    """The folders with the answers of all methods to a set."""
    folders = []
    for method in cfg.names:
        made_of = [kit.id_of(kit.train(cfg, seed, method)), records]
        make = partial(answers, method, kit.configs(cfg, seed, method)[method], records)
        folder = cfg.runs(seed) / "answers" / name.replace(" ", "_") / method
        texts = kit.kept(folder / "answers.json", made_of, make)
        outputs = [{"instruction": record["instruction"], "input": record.get("input", ""), "output": text,
                    "generator": method} for record, text in zip(records, texts)]
        (folder / "outputs.json").write_text(json.dumps(outputs, indent=1), encoding="utf-8")
        folders.append(folder)
    return folders


def judged(cfg, seed, folders):
    """{how: win rates in % on each prompt (S, N)}: exact, as far as can be known, and by verdicts."""
    exact, records = kit.rates(cfg, seed, folders), kit.verdicts(cfg, seed, folders)
    found = {"exact": [exact[folder.name] for folder in folders],
             "verdicts": [usable([record["preference"] for record in records[folder.name]]) for folder in folders]}
    return {how: 100 * (np.array(preferences) - 1) for how, preferences in found.items()}


def measured(cfg):
    """{set: {how: scores (R, S, N)}} of all seeds; the first set is eval."""
    others = {name: (asking(cfg, name, records), records) for name, records in sets(cfg).items()}
    each = []
    for seed in cfg.numbers:
        stages = [kit.train(cfg, seed, method) for method in cfg.names]
        each.append({"eval": judged(cfg, seed, stages)} | {
            name: judged(other, seed, answered(cfg, seed, name, records)) for name, (other, records) in others.items()})
    return {name: {how: np.stack([found[name][how] for found in each]) for how in ("exact", "verdicts")}
            for name in each[0]}


# -- how many prompts ----------------------------------------------------------------------------------------------

def drawn(n, size, random):
    """DRAWS random choices of `size` prompts from n, as counts (DRAWS, n) of 0 and 1."""
    return random.permuted(np.tile(np.arange(n) < size, (DRAWS, 1)), axis=1).astype(float)


def errors(scores, n):
    """Standard errors with n prompts, means over the systems of scores (R, S, N): of a win rate, and of the difference
    between two systems on the same prompts."""
    deviation = np.nanstd(scores, axis=-1, ddof=1)                                           # (R, S)
    apart = scores[:, :, None] - scores[:, None]                                             # (R, S, S, N)
    different = ~np.eye(scores.shape[1], dtype=bool)
    paired = np.nanstd(apart, axis=-1, ddof=1)[:, different]
    return float(deviation.mean() / n ** .5), float(paired.mean() / n ** .5)


def by_size(scores, other):
    """[{prompts, error, paired_error, to_other, to_all}] for so many random prompts of eval and of another set.
    scores, other: {how: (R, S, N)}. Rankings are by verdicts; that of all prompts of eval is exact."""
    said, whole = scores["verdicts"], np.nanmean(scores["exact"], -1)[:, None]
    random, rows = np.random.default_rng(0), []
    most = min(said.shape[-1], other["verdicts"].shape[-1])
    for n in [size for size in SIZES if size < most] + [most]:
        ours = resampled_scores(said, drawn(said.shape[-1], n, random))[:, 1:]               # (R, DRAWS, S)
        theirs = resampled_scores(other["verdicts"], drawn(other["verdicts"].shape[-1], n, random))[:, 1:]
        error, paired = errors(said, n)
        row = {"prompts": n, "error": error, "paired_error": paired}
        for name, values in (("to_other", spearman(ours, theirs)), ("to_all", spearman(ours, whole))):
            low, high = interval(values)
            row[name] = {"value": float(np.nanmean(values)), "ci_low": low, "ci_high": high}
        rows.append(row)
    return rows


# -- tables and figures --------------------------------------------------------------------------------------------

def compared(boards):
    """{set: {how: agreement_over_prompts() with eval}}. boards: {set: {how: (R, 1 + B, S)}}."""
    return {name: {how: agreement_over_prompts(boards["eval"][how], board) for how, board in each.items()}
            for name, each in boards.items() if name != "eval"}


def checked(found):
    """[{set, measure, bound, value, holds}] of what was fixed before, by exact win rates."""
    return [{"set": name, "measure": measure, "bound": bound, "value": each["exact"][measure]["value"],
             "holds": each["exact"][measure]["value"] > bound}
            for name, each in found.items() for measure, bound in BOUNDS.items()]


def told(cfg, boards, found, sizes):
    """All that was found, as text."""
    lines = [["", *boards]]
    for place, method in enumerate(cfg.names):
        lines.append([method, *(plus_minus(*mean_and_spread(board["exact"][:, 0, place].tolist()))
                                for board in boards.values())])
    agreed = [["", "Spearman (95 %)", "Kendall (95 %)", "R2 (95 %)"]]
    for name, each in found.items():
        agreed += [[f"{name}, {how}", *(estimate(row[key]) for key in CORRELATIONS)] for how, row in each.items()]
    most = [["prompts", "error", "paired", "other (95 %)", "all (95 %)"]]
    for row in sizes:
        most.append([str(row["prompts"]), number(row["error"], ".1f"), number(row["paired_error"], ".1f"),
                     estimate(row["to_other"]), estimate(row["to_all"])])
    return "\n\n".join([
        "Win rates in %, exact where they can be, mean over the seeds and their standard\ndeviation:", table(*lines),
        filled("Do the rankings agree with that on eval? Mean over the seeds, intervals over prompts. The paper: "
               f"Spearman {PAPER['spearman']}, R2 {PAPER['r2']}."), table(*agreed),
        filled("With so many prompts of eval and one verdict for each: the standard errors of a win rate and of a "
               f"paired difference, Spearman with the ranking by as many of {list(found)[-1]} (other), and with that "
               "by exact win rates on all of eval (all). Intervals are over draws of prompts and seeds:"), table(*most),
        table(["fixed before", "measure", "bound", "value", ""], *(
            [row["set"], row["measure"], f"> {row['bound']:g}", number(row["value"]),
             "holds" if row["holds"] else "fails"] for row in checked(found)))])


def figures(cfg, boards, sizes):
    """Win rates on eval against those on the last set, and Spearman against the number of prompts."""
    x, y = (boards[name]["exact"].mean(0) for name in ("eval", list(boards)[-1]))            # (1 + B, S)
    points = {method: (float(x[0, i]), float(y[0, i]), float(x[1:, i].std()), float(y[1:, i].std()))
              for i, method in enumerate(cfg.names)}
    prompts = np.array([row["prompts"] for row in sizes])
    series = {said: (prompts, *(np.array([row[key][of] for row in sizes]) for of in ("value", "ci_low", "ci_high")))
              for said, key in (("other set", "to_other"), ("all of eval", "to_all"))}
    return {"evaluation": plots.scatter(points, "Two sets of instructions", "win rate on eval, %",
                                        f"win rate on {list(boards)[-1]}, %", width=600, height=480),
            "evaluation_prompts": plots.lines(series, "How many prompts?", "prompts", "Spearman", log_x=True)}


def flat(sizes):
    """by_size() as rows for the CSV file."""
    return [{**{key: row[key] for key in ("prompts", "error", "paired_error")},
             **{f"{key}_{of}": value for key in ("to_other", "to_all") for of, value in row[key].items()}}
            for row in sizes]


def run(cfg):
    scores = measured(cfg)
    boards = {name: {how: resampled_scores(each, resample(each.shape[-1], seed=k)) for how, each in of_set.items()}
              for k, (name, of_set) in enumerate(scores.items())}
    last = list(scores)[-1]
    found, sizes = compared(boards), by_size(scores["eval"], scores[last])
    rows = [{"seed": seed, "method": method, **{f"{name}, {how}": float(board[i, 0, place])
                                                for name, each in boards.items() for how, board in each.items()}}
            for i, seed in enumerate(cfg.numbers) for place, method in enumerate(cfg.names)]
    numbers = {"paper": PAPER, "rates": rows, "agreement": found, "prompts": sizes, "fixed_before": checked(found)}
    return kit.Result(numbers, told(cfg, boards, found, sizes), {"evaluation": rows, "evaluation_prompts": flat(sizes)},
                      figures(cfg, boards, sizes))
