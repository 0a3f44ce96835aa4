"""Annotators: do simulated labels agree with people, and vary, as people do?

Claim. AlpacaFarm (arXiv 2305.14387, section 4.1, figure 2): thirteen simulated annotators, with a quarter of the labels
flipped, agree with the majority of people in 65 % of pairs, as people do among each other (66 %), and vary as people
do; one consistent judge (GPT-4) agrees as often and hardly varies. PAPER has AlpacaEval's numbers for its 650 pairs.

How it is measured. Each judge labels --pairs pairs of SFT answers four times: by four different annotators if its pool
has so many, and each time in an order that is drawn anew.
Definitions are AlpacaEval's (stats/agreement.py): agreement with the majority of four people; bias, how often the
judge's own majority differs from theirs; variance, how often a label differs from the majority of the judge's others.
People are compared one against the other three, as AlpacaEval does it.
In the offline world the probability of every label is known, too (of people drawn with replacement). How often a label
and the majority of three people differ is then exactly the bias of the likelier label, plus the variance where that
label is right, minus the variance where it is wrong (Domingos 2000, ICML). Each annotator is shown by itself as well.

Cost: 2 minutes on one core for each seed after the pairs stage. What would refute the claim in this world: p_ann
differs from people by more than 3 points in agreement or 5 in variance, or the single judge varies more than half as
much as people do. These bounds were fixed before seeds 2 to 4 were run.
"""
import json
from dataclasses import dataclass

import numpy as np

import annotate
import eval
from data import InputError
from data.alpaca_eval import question
from data.barn.judge import probability_first, win_probabilities
from data.barn.reward import true_reward
from stats import plots
from stats.agreement import beside_people, of_three, one_against_rest, preferred_share
from stats.seeds import mean_and_spread
from stats.tables import filled, number, table
from stats.winrate import usable
from studies import kit

LABELS = 4                              # of each pair by each judge, as AlpacaEval has of people
# {judge: (agreement, bias, variance, prefers longer)} in AlpacaEval's evaluators_leaderboard.csv; the paper says that
# p_ann agrees in 65 %. greedy GPT-4 is the paper's single judge.
PAPER = {"people": (65.7, 0., 34.3, .64), "p_eval": (57.8, None, None, .59),
         "p_ann": (65., None, None, None), "p_single": (66.4, 30.2, 19.3, .60), "longer answer": (62.2, 37.8, 0., 1.)}
COLUMNS = ("agreement", "bias", "variance", "longer", "first")
AGREES, VARIES, QUIET = 3., 5., .5      # p_ann and people: points; the single judge: share of people's variance


@dataclass
class Config(kit.Config):
    seeds: str = "2,3,4"                # of the runs whose pairs are labelled
    people: str = "barn-human"          # the judge that plays people
    pairs: int = 2000                   # pairs of SFT answers that are labelled

    def __post_init__(self):
        super().__post_init__()
        if self.pairs < 2:
            raise InputError("--pairs is a number from 2 up")


# -- labels --------------------------------------------------------------------------------------------------------

def sampled(cfg, seed):
    """Pairs of SFT answers, without labels."""
    folder = kit.train(cfg, seed, "pairs")
    keep = ("instruction", "input", "seed", "output_1", "output_2")
    return [{key: pair[key] for key in keep if key in pair}
            for pair in json.loads((folder / "pairs.json").read_text())[:cfg.pairs]]


def judges(cfg):
    """{name: (judge, pool, share of flips, first seed of its labels)} of all that label."""
    common = kit.shared(cfg)
    sim, flip = common.judge, annotate.usual_flip(common.judge, "p_ann")
    found = {"people": (cfg.people, "p_eval", 0., 0), "other people": (cfg.people, "p_eval", 0., LABELS),
             common.pool: (sim, common.pool, 0., 0)}
    if common.pool == "p_eval":
        found |= {"p_ann": (sim, "p_eval", flip, 0), "p_single": (sim, "p_single", 0., 0),
                  "p_single with flips": (sim, "p_single", flip, 0)}
    if sim in annotate.CROWDS:
        found["far people"] = ("barn-far", "p_eval", 0., 0)
    return found


def labels(cfg, seed, pairs, who):
    """What a judge prefers: labels (N, LABELS), and whether output_2 was shown first (N, LABELS)."""
    judge, pool, flip, first = who
    common, everyone = kit.shared(cfg), annotate.pool(judge, pool)
    several = len(everyone) >= LABELS   # then nobody labels a pair twice: each label has a part of the pool

    def ask():
        with annotate.connect(judge, kit.verdict_cache(cfg, seed), **annotate.options(common)) as asked:
            found = [annotate.annotate(pairs, everyone[k::LABELS] if several else everyone, asked, first + k, flip)
                     for k in range(LABELS)]
        return [[[record[key] for key in ("preference", "is_switched")] for record in records] for records in found]
    who = (judge, kit.annotators_of(judge, pool), flip, first)
    path = cfg.runs(seed) / "annotators" / f"{judge} {pool} {flip:g} {first}.json".replace("/", "_").replace(" ", "_")
    found = np.array(kit.kept(path, [pairs, who, common.max_tokens, common.reasoning_effort, common.judge_body], ask))
    return usable(found[..., 0].T), found[..., 1].T.astype(float) == 1


# -- numbers -------------------------------------------------------------------------------------------------------

def prefers_first(preferences, switched):
    """How often, of all labels, the answer is preferred that was shown first."""
    there = np.abs(preferences - 1.5) > 0
    return float(((preferences > 1.5) == switched)[there].mean())


def measured(given, switched, people, longer):
    """{column: number} of a judge from its labels (N, LABELS). longer (N,): characters of output_2 minus output_1."""
    found = beside_people(given, people)
    taste = np.mean([preferred_share(column, longer < -30, longer > 30) for column in given.T])
    return {"agreement": found["Human agreement"], "error": found["Human agreement error"], "bias": found["Bias"],
            "variance": 100 - one_against_rest(given), "longer": float(taste),
            "first": prefers_first(given, switched)}


def of_seed(cfg, seed):
    """{judge: measured()} for the pairs of a seed."""
    pairs = sampled(cfg, seed)
    longer = np.array([len(pair["output_2"]) - len(pair["output_1"]) for pair in pairs])
    given = {name: labels(cfg, seed, pairs, who) for name, who in judges(cfg).items()}
    people = given["other people"][0]
    found = {name: measured(*each, people, longer) for name, each in given.items() if name != "other people"}
    alone = given["people"][0]
    found["people"] = {**found["people"], "agreement": one_against_rest(alone), "bias": 0.}
    fixed = {"longer answer": longer}
    if kit.shared(cfg).data == "barn":
        worth = [[true_reward(question(pair), pair[f"output_{i}"]) for i in (1, 2)] for pair in pairs]
        fixed["true reward"] = np.diff(worth)[:, 0]
    for name, difference in fixed.items():
        label = np.repeat((1.5 + .5 * np.sign(difference))[:, None], LABELS, 1)
        found[name] = measured(label, np.zeros_like(label) == 1, people, longer) | {"first": .5}
    return found


# -- exact numbers, in the offline world ---------------------------------------------------------------------------

def decomposed(p, majority):
    """{error, bias, variance, unbiased, biased} in % of a judge that prefers the first answer with probability p (N,),
    against a majority that does so with the probability `majority` (N,).

    error: how often a label and the majority differ. It is bias + unbiased - biased: the bias of the judge's likelier
    label, and its variance, how often a label is not that one, where it agrees with the majority and where not.
    """
    right = np.where(p > .5, majority, 1 - majority)
    spread = np.minimum(p, 1 - p)
    found = {"error": p * (1 - majority) + (1 - p) * majority, "bias": 1 - right, "variance": spread,
             "unbiased": right * spread, "biased": (1 - right) * spread}
    return {name: float(100 * values.mean()) for name, values in found.items()}


def exact(cfg, seed):
    """({pool: decomposed()}, {annotator: {agreement, variance, longer, first}}) for the pairs of a seed."""
    pairs = sampled(cfg, seed)
    rows = [(question(pair), pair["output_1"], pair["output_2"]) for pair in pairs]
    longer = np.array([len(one) - len(two) for _, one, two in rows])
    tastes, pools = {}, {}
    for name, (judge, pool, flip, _) in judges(cfg).items():
        pools[name] = flip, eval.tastes_of(judge, pool)
        tastes |= pools[name][1]
    majority = of_three(win_probabilities(pools["people"][1], rows))
    found = {name: decomposed(flip + (1 - 2 * flip) * win_probabilities(each, rows), majority)
             for name, (flip, each) in pools.items() if name != "other people"}
    alone = {}
    for name, taste in tastes.items():
        p = win_probabilities({name: taste}, rows)
        first = [probability_first(taste, *row) + probability_first(taste, row[0], row[2], row[1]) for row in rows]
        ours = decomposed(p, majority)
        alone[name] = {"agreement": 100 - ours["error"], "variance": ours["variance"],
                       "longer": float(np.where(longer > 0, p, 1 - p)[np.abs(longer) > 30].mean()),
                       "first": float(np.mean(first) / 2)}
    return found, alone


# -- tables --------------------------------------------------------------------------------------------------------

def averaged(each):
    """[{row: {column: number}}] of the seeds -> {row: {column: (mean, spread)}}."""
    return {name: {column: mean_and_spread([seed[name][column] for seed in each]) for column in row}
            for name, row in each[0].items()}


def judge_table(found):
    """A row for each judge, and the paper's numbers in brackets."""
    lines = [["", *COLUMNS]]
    for name, row in found.items():
        forms = [".2f" if column in ("longer", "first") else ".1f" for column in COLUMNS]
        paper = (*PAPER.get(name, ()), *[None] * len(COLUMNS))
        lines.append([name, *(number(row[column][0], form) + f" ({number(theirs, form)})" * (theirs is not None)
                              for column, form, theirs in zip(COLUMNS, forms, paper))])
    return table(*lines)


def mean_table(found, form):
    columns = list(next(iter(found.values())))
    return table(["", *columns], *([name, *(number(row[column][0], form[column]) for column in columns)]
                                   for name, row in found.items()))


def checked(found):
    """{what was fixed before: (value, bound, whether it holds)}."""
    people, crowd, single = (found.get(name) for name in ("people", "p_ann", "p_single"))
    if not crowd:
        return {}
    apart = {column: abs(crowd[column][0] - people[column][0]) for column in ("agreement", "variance")}
    share = single["variance"][0] / people["variance"][0]
    return {"p_ann and people: agreement": (apart["agreement"], AGREES, apart["agreement"] <= AGREES),
            "p_ann and people: variance": (apart["variance"], VARIES, apart["variance"] <= VARIES),
            "variance of p_single / people": (share, QUIET, share <= QUIET)}


def told(cfg, found, pools, alone):
    """All that was found, as text."""
    parts = [filled(f"At most {cfg.pairs} pairs of SFT answers a seed, {LABELS} labels of each, mean over the seeds; "
                    "in brackets AlpacaEval's numbers for its pairs. People: each against the other three. longer, "
                    "first: how often the longer answer, and the one shown first, is preferred:"), judge_table(found)]
    if pools:
        exact_form = dict.fromkeys(next(iter(pools.values())), ".1f")
        forms = {"agreement": ".1f", "variance": ".1f", "longer": ".2f", "first": ".2f"}
        parts += [filled("Exact, in %: how often a label and the majority of three people differ (error) is the bias, "
                         "plus the variance where the likelier label is right (unbiased), minus that where it is wrong "
                         "(biased):"), mean_table(pools, exact_form),
                  "Each annotator, exact:", mean_table(alone, forms)]
    if checks := checked(found):
        parts.append(table(["fixed before", "value", "at most", ""], *(
            [name, number(value), number(bound), "holds" if holds else "fails"]
            for name, (value, bound, holds) in checks.items())))
    return "\n\n".join(parts)


def figure(found):
    """Agreement with its error over pairs against variance, as in the paper's figure 2."""
    points = {name: (row["variance"][0], row["agreement"][0], None, row["error"][0]) for name, row in found.items()}
    return plots.scatter(points, "Agreement with people, and variance", "variance, %",
                         "agreement with the majority of people, %")


def run(cfg):
    kit.try_judge(cfg, cfg.people)
    found = averaged([of_seed(cfg, seed) for seed in cfg.numbers])
    pools, alone = map(averaged, zip(*(exact(cfg, seed) for seed in cfg.numbers))) if kit.offline(cfg) else ({}, {})
    rows = [{"judge": name, **{column: mean for column, (mean, _) in row.items()}} for name, row in found.items()]
    numbers = {"paper": PAPER, "judges": found, "exact": pools, "annotators": alone, "fixed_before": checked(found)}
    return kit.Result(numbers, told(cfg, found, pools, alone), {"annotators": rows}, {"annotators": figure(found)})
