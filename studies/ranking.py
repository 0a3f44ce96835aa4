"""Ranking: do methods rank alike if they are trained and judged in simulation, and with people?

Claim. AlpacaFarm (arXiv 2305.14387, section 4.2, figure 3) trains methods on simulated labels and has them judged by
simulated annotators, trains them again on people's labels and has them judged by people. The two rankings agree:
Spearman .98, R2 .87.

How it is measured. Twelve systems are trained twice: on the labels of --judge, with its usual flips, and on those of
--people, without flips. Nine are methods of the paper. The others are SimPO, best_of_4 (a twin of best_of_n) and ppo_8
(ppo with 8 steps), so these are fewer than twelve independent systems. sft and sft_more need no labels: they are the
same on both sides. The systems are judged by one verdict for each prompt, as in the paper, and in the offline world
also by the exact win rate (judge.win_probabilities), which has no noise of verdicts, and by the true reward. Intervals
are over prompts, for the mean over the seeds; the systems are fixed.
Upper bound: the agreement of two trainings that differ in the seed alone.
Anchors: base and clean demonstrations are ranked, too, in the place of the paper's LLaMA and GPT-4.
Controls, whose rankings must not agree: labels by coin; five close variants of SimPO (beta .2 to .4); people whose
tastes are twice as far from the simulated ones (barn-far), as judges and, for seven cheap systems, also as labellers.
Sweep: the models that are trained in simulation are judged by people at several distances: their mean tastes are 0 to 2
times as far from the simulated ones as those of barn-human. For each distance the study tells how often a simulated
label, with its flips, agrees with the majority of three people on pairs of SFT answers. In the paper this is 65 %, so
the ranking is also measured at the distance where it is 65 % here, or at the nearest one. This agreement depends most
of all on the noise of single labels; so the study also tells how often the likelier labels of both pools agree.

Cost: about 17 minutes on one core for each seed if `farm.py --method all` has finished in the same --out, else 25. What
would refute the claim in this world: HOLDS and FAILS have the bounds, which were fixed before seeds 2 to 4 were run.
"""
import json
import random
from dataclasses import dataclass
from itertools import combinations

import numpy as np

import eval
from data import InputError
from data.alpaca_eval import question
from data.barn.reward import true_reward
from data.barn.world import CLEAN, Instruction, demonstrate, parse
from rlhf import plan
from stats import plots
from stats.ranking import CORRELATIONS, agreement_of_rankings, agreement_over_prompts, resampled_scores
from stats.seeds import mean_and_spread
from stats.tables import between, estimate, filled, number, p_value, plus_minus, table
from stats.winrate import resample, usable
from studies import kit, sweep

SYSTEMS = {                             # {name: (what trains it, its CPU seconds)}
    "sft": ("sft", 10), "sft_more": ("sft_more", 37), "feedme": ("feedme", 27), "quark": ("quark", 89),
    "reward_conditioning": ("reward_conditioning", 56), "simpo": ("simpo", 23), "dpo": ("dpo", 48),
    "expert_iteration": ("expert_iteration", 18), "best_of_4": ("best_of_n --n 4", 5),
    "best_of_n": ("best_of_n", 18), "ppo_8": ("ppo --steps 8", 28), "ppo": ("ppo", 69)}
VARIANTS = {"simpo": ("simpo", 23)} | {f"simpo_{beta:g}": (f"simpo --beta {beta:g}", 23) for beta in (.2, .25, .35, .4)}
NEEDED = {"pairs": 15, "reward": 31}    # CPU seconds of what they need, on each side
CHEAP = ("sft", "sft_more", "feedme", "simpo", "dpo", "best_of_4", "best_of_n")         # for two of the controls
UNLABELLED = ("sft", "sft_more")
ANCHORS = ("base", "clean")
QUICK = {"quark": "--rounds 1 --rollout_batch 16 --updates 1 --batch_size 16", "expert_iteration": "--n 2 --epochs 1",
         "ppo": "--steps 1 --rollout_batch 16 --batch_size 16 --val_prompts 16"}        # flags with --quick
PAPER = {"spearman": .98, "r2": .87}
# Fixed before seeds 2 to 4 were run: {comparison: (measure, bound)}, above the bound and below it.
HOLDS = {"S sim/P people": ("spearman", .5), "with anchors, verdicts": ("r2", .75)}
FAILS = {"coins: C sim/P people": ("spearman", .2), "variants: S sim/P people": ("spearman", .5),
         "S sim/S far": ("spearman", .2)}


@dataclass
class Config(kit.Config):
    seeds: str = "2,3,4"                # everything is trained once for each
    people: str = "barn-human"          # the judge that plays people: its labels train, and its verdicts rank


# -- what is trained -----------------------------------------------------------------------------------------------

def line(cfg, name, side):
    """The line that trains a system on the labels of one side: sim, people, coin or far. It is the same for all sides
    if the system needs no labels."""
    said = {**SYSTEMS, **VARIANTS}[name][0]
    method = said.split()[0]
    words = [said, QUICK.get(method, "") * cfg.quick]
    labelled = [stage for stage in plan.order(method)[:-1] if stage != "sft"]
    if side != "sim" and labelled:
        words += [f"--name {name}_{side}", *(f"--{stage}.name {stage}_{side}" for stage in labelled)]
        words.append("--pairs.flip .5" if side == "coin" else "--pool p_eval --pairs.flip 0")
        words.append({"people": f"--judge {cfg.people}", "far": "--judge barn-far"}.get(side, ""))
    elif name != method:
        words.append(f"--name {name}")
    return " ".join(words)


def sides(cfg):
    """{what is trained: (names of systems, side)}."""
    found = {"sim": (list(SYSTEMS), "sim"), "people": (list(SYSTEMS), "people"), "coin": (list(CHEAP), "coin"),
             "variants": (list(VARIANTS), "sim"), "people's variants": (list(VARIANTS), "people")}
    return found | ({"far": (list(CHEAP), "far")} if kit.offline(cfg) else {})


def expected_minutes(cfg):
    """Minutes on one core that all unfinished stages will take."""
    takes = {name: seconds for name, (_, seconds) in {**SYSTEMS, **VARIANTS}.items()} | NEEDED
    left = {}
    for names, side in sides(cfg).values():
        for name in [*names, *NEEDED]:
            stage = name if side == "sim" or name in UNLABELLED else f"{name}_{side}"
            left |= {cfg.runs(seed) / stage: takes[name] for seed in cfg.numbers}
    return sum(seconds for folder, seconds in left.items() if not (folder / "result.json").exists()) / 60


def clean(cfg, seed):
    """The folder with good answers to eval, the second anchor; only the offline world has them."""
    folder = cfg.runs(seed) / "answers" / "clean"
    records = []
    for record in kit.shared(cfg).splits()["eval"]:
        text = record["instruction"]
        if not (parsed := parse(text)):
            raise InputError(f"the offline world has no answer to {text!r:.60}: leave out --eval_data")
        answer = demonstrate(Instruction(*parsed, text), random.Random(f"clean {seed} {text}"), CLEAN)
        records.append({"instruction": text, "input": "", "output": answer, "generator": "clean"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outputs.json").write_text(json.dumps(records, indent=1))
    return folder


# -- how it is judged ----------------------------------------------------------------------------------------------

def rows_of(cfg, folder):
    """(instruction, answer, reference answer) (N,) of a stage."""
    reference = kit.shared(cfg).splits()["eval"]
    answers = eval.matched(json.loads((folder / "outputs.json").read_text()), reference)
    return [(question(asked), answer["output"], asked["output"]) for asked, answer in zip(reference, answers)]


def judged(cfg, seed, folders, own):
    """{who judges: scores (S, N)} of S systems: win rates in %, exact ones and those by verdicts of their own side's
    judge, and true rewards."""
    judges = {"sim": ("", ""), "people": (cfg.people, "p_eval")}
    if kit.offline(cfg):
        judges["far"] = "barn-far", "p_eval"
    found = {}
    for who, judge in judges.items():
        rates_of = kit.rates(cfg, seed, folders, *judge)
        found[who] = [rates_of[folder.name] for folder in folders]
    if own in ("sim", "people"):
        records = kit.verdicts(cfg, seed, folders, *judges[own])
        found[f"{own}, verdicts"] = [usable([record["preference"] for record in records[folder.name]])
                                     for folder in folders]
    scores = {who: 100 * (np.array(each) - 1) for who, each in found.items()}
    if kit.offline(cfg):
        scores["truth"] = np.array([[true_reward(*row[:2]) for row in rows_of(cfg, folder)] for folder in folders])
    return scores


def measured(cfg, seed):
    """{(what is trained, who judges): scores (S, N)} of a seed; sim and people have the anchors at their end."""
    anchors = [kit.train(cfg, seed, "base"), *([clean(cfg, seed)] if kit.offline(cfg) else [])]
    found = {}
    for trained, (names, side) in sides(cfg).items():
        folders = [kit.train(cfg, seed, line(cfg, name, side)) for name in names]
        scores = judged(cfg, seed, folders + anchors * (trained in ("sim", "people")), trained)
        found |= {(trained, who): each for who, each in scores.items()}
    return found


# -- what is compared ----------------------------------------------------------------------------------------------

def comparisons(cfg):
    """{name: ((trained, judge), (trained, judge), names of the systems)} of rankings within a seed. In a name S, P, C
    and F mean: trained on labels of sim, people, coin and far."""
    sim, people, systems = ("sim", "sim"), ("people", "people"), list(SYSTEMS)
    by_verdicts = ("sim", "sim, verdicts"), ("people", "people, verdicts")
    found = {"S sim/P people, verdicts": (*by_verdicts, systems), "S sim/P people": (sim, people, systems),
             "with anchors, verdicts": (*by_verdicts, systems + list(ANCHORS)),
             "with anchors": (sim, people, systems + list(ANCHORS)),
             "without sft, sft_more": (sim, people, [name for name in systems if name not in UNLABELLED]),
             "the seven of the controls": (sim, people, list(CHEAP)),
             "S sim/S people": (sim, ("sim", "people"), systems), "S sim/P sim": (sim, ("people", "sim"), systems),
             "coins: C sim/P people": (("coin", "sim"), people, list(CHEAP)),
             "variants: S sim/P people": (("variants", "sim"), ("people's variants", "people"), list(VARIANTS))}
    if kit.offline(cfg):
        found |= {"S sim/S truth": (sim, ("sim", "truth"), systems),
                  "S people/S truth": (("sim", "people"), ("sim", "truth"), systems),
                  "P people/P truth": (people, ("people", "truth"), systems),
                  "S sim/P truth": (sim, ("people", "truth"), systems),
                  "S sim/S far": (sim, ("sim", "far"), systems), "S sim/F far": (sim, ("far", "far"), list(CHEAP))}
    return found


def places(cfg, trained, names):
    """The indices of systems in the order of those that are trained on one side, with the anchors at the end."""
    order = [*sides(cfg)[trained][0], *ANCHORS]
    return [order.index(name) for name in names if name != "clean" or kit.offline(cfg)]


def compared(cfg, boards):
    """{comparison: agreement_over_prompts()}. boards: {(trained, judge): (R, 1 + B, systems)}."""
    found = {}
    for name, (one, two, names) in comparisons(cfg).items():
        x, y = (boards[key][..., places(cfg, key[0], names)] for key in (one, two))
        found[name] = {"systems": x.shape[-1], **agreement_over_prompts(x, y)}
    pairs = list(combinations(range(len(cfg.numbers)), 2))
    for who in ("sim", "people") if pairs else ():
        x, y = (boards[who, who][[pair[i] for pair in pairs]][..., :len(SYSTEMS)] for i in (0, 1))
        name = f"another seed: {'S' if who == 'sim' else 'P'} {who}"
        found[name] = {"systems": len(SYSTEMS), **agreement_over_prompts(x, y)}
    return found


def swept(cfg, boards, counts):
    """The ranking in simulation beside the ranking by people at several distances: rows of sweep.sweep()."""
    answers = [[rows_of(cfg, kit.train(cfg, seed, line(cfg, name, "sim"))) for name in SYSTEMS] for seed in cfg.numbers]
    ranked = {how: boards["sim", who][..., :len(SYSTEMS)]
              for how, who in (("exact", "sim"), ("verdicts", "sim, verdicts"))}
    return sweep.sweep(answers, [sweep.labels_of(cfg, seed) for seed in cfg.numbers], ranked, counts)


# -- tables and figures --------------------------------------------------------------------------------------------

def checked(found):
    """[{comparison, measure, bound, value, holds}]: whether the bounds hold that were fixed beforehand."""
    rows = []
    for bounds, above in ((HOLDS, True), (FAILS, False)):
        for name, (measure, bound) in bounds.items():
            if name in found:
                value = found[name][measure]["value"]
                rows.append({"comparison": name, "measure": measure, "bound": bound, "value": value,
                             "above": above,
                             "holds": bool(value > bound if above else value < bound)})
    return rows


COLUMNS = {"sim by sim": ("sim", "sim"), "people by people": ("people", "people"), "sim by people": ("sim", "people"),
           "people by sim": ("people", "sim"), "sim by far": ("sim", "far"), "sim, truth": ("sim", "truth"),
           "people, truth": ("people", "truth")}


def rates(cfg, boards):
    """[{system, {column: (mean over seeds, spread)}}] of all systems and anchors."""
    order = places(cfg, "sim", [*SYSTEMS, *ANCHORS])
    return [{"system": name, **{column: mean_and_spread(boards[key][:, 0, place].tolist())
                                for column, key in COLUMNS.items() if key in boards}}
            for name, place in zip([*SYSTEMS, *ANCHORS], order)]


def rate_table(rows):
    head = [column for column in rows[0] if column != "system"]
    cells = [[plus_minus(*row[column], ".2f" if "truth" in column else ".1f") for column in head] for row in rows]
    return table(["", *head], *([row["system"], *each] for row, each in zip(rows, cells)))


def comparison_table(found):
    return table(["", "Spearman (95 %)", "spread", "Kendall", "R2 (95 %)"],
                 *([name, estimate(row["spearman"]), number(mean_and_spread(row["spearman"]["each"])[1]),
                    number(row["kendall"]["value"]), estimate(row["r2"])] for name, row in found.items()))


def check_table(rows):
    return table(["fixed before", "measure", "bound", "value", ""], *(
        [row["comparison"], row["measure"], f"{'>' if row['above'] else '<'} {row['bound']:g}", number(row["value"]),
         "holds" if row["holds"] else "fails"] for row in rows))


def scattered(boards):
    """The paper's figure, without anchors: the win rates of systems in simulation and with people, with errors over
    prompts."""
    both, points = [boards[who, who].mean(0) for who in ("sim", "people")], {}
    for place, name in enumerate(SYSTEMS):
        values = [float(board[0, place]) for board in both]
        points[name] = (*values, *(float(board[1:, place].std()) for board in both))
    kinds = {name: "no labels" if name in UNLABELLED else "trained on labels" for name in points}
    return plots.scatter(points, "Trained and judged in simulation, and with people", "win rate in simulation, %",
                         "win rate with people, %", kinds)


# -- all of it -----------------------------------------------------------------------------------------------------

def told(rows, found, by_models, swept_rows):
    """All that was found, as text."""
    parts = [filled("Win rates in % and true rewards, mean over the seeds and their standard deviation:"),
             rate_table(rows),
             filled("Do two rankings agree? S, P, C, F: trained on labels of sim, people, coins, far; behind it who "
                    "judges. By exact win rates if nothing else is said. Mean over the seeds, in brackets its interval "
                    "over prompts; spread: of Spearman, over the seeds."), comparison_table(found),
             filled(f"Over resampled systems the interval of S sim/P people (mean win rates) is "
                    f"{between(by_models['ci_low'], by_models['ci_high'], '.2f')}, p = {p_value(by_models['p'])}.")]
    if swept_rows:
        at = swept_rows[-1]
        parts += [filled("The sweep: models trained in simulation, judged in simulation and by people at a distance. "
                         "labels: how often, in %, a simulated label, with flips, agrees with the majority of three "
                         "people; majorities: how often the likelier labels of both pools agree."),
                  sweep.table_of(swept_rows),
                  filled(f"Where labels agree in {at['agreement']:.1f} % (the paper: {sweep.AGREED:g} %), at distance "
                         f"{at['distance']:.2f}, Spearman is {estimate(at['exact']['spearman'])}, by verdicts "
                         f"{estimate(at['verdicts']['spearman'])}; the paper has {PAPER['spearman']}.")]
    return "\n\n".join([*parts, check_table(checked(found))])


def csv_rows(cfg, boards):
    """Scores of each system and seed, for the CSV file."""
    names = [*SYSTEMS, *ANCHORS]
    return [{"seed": seed, "system": name, **{column: float(boards[key][i, 0, place])
                                              for column, key in COLUMNS.items() if key in boards}}
            for i, seed in enumerate(cfg.numbers) for name, place in zip(names, places(cfg, "sim", names))]


def flat(found):
    """A comparison as a row for the CSV file."""
    return {f"{name}{end}": found[name][key] for name in CORRELATIONS
            for key, end in (("value", ""), ("ci_low", "_low"), ("ci_high", "_high"))}


def run(cfg):
    kit.try_judge(cfg, cfg.people)
    if not cfg.quick:
        print(f"about {expected_minutes(cfg):.0f} minutes on one core are left to train", flush=True)
    seeds = [measured(cfg, seed) for seed in cfg.numbers]
    scores = {key: np.stack([each[key] for each in seeds]) for key in seeds[0]}              # (R, S, N)
    counts = resample(next(iter(scores.values())).shape[-1])
    boards = {key: resampled_scores(each, counts) for key, each in scores.items()}           # (R, 1 + B, S)
    found, rates_of = compared(cfg, boards), rates(cfg, boards)
    swept_rows = swept(cfg, boards, counts) if kit.offline(cfg) else []
    by_models = agreement_of_rankings(*(boards[who, who][:, 0, :len(SYSTEMS)].mean(0) for who in ("sim", "people")))
    numbers = {"paper": PAPER, "rates": rates_of, "agreement": found, "over_systems": by_models, "sweep": swept_rows,
               "fixed_before": checked(found)}
    rows = {"ranking": csv_rows(cfg, boards),
            "ranking_agreement": [{"comparison": name, **flat(row)} for name, row in found.items()]}
    figures = {"ranking": scattered(boards)}
    if swept_rows:
        rows["ranking_sweep"] = [{**{key: value for key, value in row.items() if key not in ("exact", "verdicts")},
                                  **flat(row["exact"])} for row in swept_rows]
        levels = {"another seed": "another seed: S sim", "coin labels": "coins: C sim/P people"}
        figures["ranking_sweep"] = sweep.figure(swept_rows, {
            said: found[name]["spearman"]["value"] for said, name in levels.items() if name in found})
    return kit.Result(numbers, told(rates_of, found, by_models["spearman"], swept_rows), rows, figures)
