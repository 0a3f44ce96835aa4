"""[kit] How far may people be from simulated annotators? Rankings by pools of people at several distances.

At the distance 0 the people of barn-human have the mean tastes of the simulated annotators, at 1 their own, at 2 those
of barn-far. With the distance falls how often a simulated label and the majority of three people agree; this agreement
is known for AlpacaFarm, too.
"""
import json

import numpy as np

import eval
from data.alpaca_eval import question
from data.barn.judge import make_pool, pool_at, preferences, win_probabilities
from stats import plots
from stats.agreement import of_three
from stats.ranking import agreement_over_prompts, resampled_scores
from stats.tables import estimate, number, table
from studies import kit

DISTANCES = tuple(i / 4 for i in range(9))
AGREED = 65.                            # % of labels: the paper's annotators and the majority of its people


def agreement_of(label, people):
    """How often, in %, a label agrees with the majority of three people: probabilities (N,) to prefer the first."""
    majority = of_three(people)
    return 100 * (label * majority + (1 - label) * (1 - majority))


def labels_of(cfg, seed):
    """Pairs of SFT answers (instruction, one, other) (N,), the share of labels that is flipped, and the probabilities
    (N,) that a simulated annotator prefers the first answer."""
    common, folder = kit.configs(cfg, seed, "pairs")["pairs"], kit.train(cfg, seed, "pairs")
    tastes = eval.tastes_of(common.judge, common.pool)
    pairs = json.loads((folder / "pairs.json").read_text())
    rows = [(question(pair), pair["output_1"], pair["output_2"]) for pair in pairs]
    return rows, common.flip, win_probabilities(tastes, rows)


def agreements(labels, distance):
    """{agreement, without_flips, majorities} in %, means over all seeds: how often simulated labels agree with the
    majority of three people at a distance, and how often the likelier labels of both pools agree."""
    people, found = make_pool(pool_at(distance)), []
    for rows, flip, label in labels:
        other = win_probabilities(people, rows)
        noisy = flip + (1 - 2 * flip) * label
        found.append([agreement_of(noisy, other).mean(), agreement_of(label, other).mean(),
                      100 * ((label > .5) == (other > .5)).mean()])
    return dict(zip(("agreement", "without_flips", "majorities"), np.mean(found, 0).tolist()))


def distance_of(agreement, labels):
    """The distance at which labels agree so often with people, by bisection, as agreement falls with distance; 0 or 2
    if it is not between these."""
    low, high = 0., 2.
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if agreements(labels, middle)["agreement"] > agreement else (low, middle)
    return (low + high) / 2


def judged_at(distance, answers):
    """Scores by the people at a distance, exact and by verdicts, (R, S, N) each. answers: (R, S) lists of N rows."""
    tastes = make_pool(pool_at(distance))
    exact = [[100 * win_probabilities(tastes, each) for each in of_seed] for of_seed in answers]
    said = [[[100. * (label == 1) for label in preferences(tastes, each)] for each in of_seed] for of_seed in answers]
    return np.array(exact), np.array(said)


def sweep(answers, labels, ranked, counts):
    """[{distance, **agreements(), exact, verdicts}] at all DISTANCES and, at the end, where labels agree with people as
    often as in the paper. exact, verdicts: agreement_over_prompts() with the ranking in simulation.

    answers: (R, S) lists of N rows, of each training and system; labels: labels_of() of each training; ranked: {exact,
    verdicts: (R, 1 + B, S)} in simulation; counts: the resamples behind it.
    """
    found = []
    for distance in (*DISTANCES, distance_of(AGREED, labels)):
        row = {"distance": distance, **agreements(labels, distance)}
        for how, scores in zip(("exact", "verdicts"), judged_at(distance, answers)):
            row[how] = agreement_over_prompts(ranked[how], resampled_scores(scores, counts))
        found.append(row)
    return found


# -- table and figure ----------------------------------------------------------------------------------------------

def table_of(rows):
    return table(["distance", "labels", "majorities", "Spearman (95 %)", "R2", "verdicts (95 %)"],
                 *([number(row["distance"]), number(row["agreement"], ".1f"), number(row["majorities"], ".1f"),
                    estimate(row["exact"]["spearman"]), number(row["exact"]["r2"]["value"]),
                    estimate(row["verdicts"]["spearman"])] for row in rows))


def figure(rows, references):
    """Spearman against the agreement of the pools' likelier labels; references: {name: Spearman} to compare with."""
    rows = sorted(rows, key=lambda row: row["majorities"])
    across, series = np.array([row["majorities"] for row in rows]), {}
    for name in ("exact", "verdicts"):
        series[name] = (across, *(np.array([row[name]["spearman"][key] for row in rows])
                                  for key in ("value", "ci_low", "ci_high")))
    return plots.lines(series, "When does simulation hold?", "agreement of both pools' likelier labels, %", "Spearman",
                       references=references)
