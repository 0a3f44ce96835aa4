"""The judge report: how far to trust a judge, from labels of the same pairs by judges and people.

AlpacaEval's evaluator table (`analyze_evaluators`), its definitions and its names. Labels are preferences (N, K): K
labels of each of N pairs, by several people or by one judge with K seeds; NaN where there is none. (Pairs with some of
their labels count with those; AlpacaEval leaves them out. A draw coded as 0 is 1.5 everywhere.)
"""
import re
from collections import Counter
from math import nan

import numpy as np

from stats.ranking import pearson, spearman
from stats.winrate import mean_and_error, usable

LONGER = 30                             # characters: less is no difference in length
LIST = re.compile(r"^\s*(?:[*•-]\s*|\d+[.)]\s*|[a-zA-Z][.)]\s+)[^\w]*\w", re.MULTILINE)


def majority(labels):
    """The most frequent of each row of labels (N, K); (N,). Soft labels: their median.

    AlpacaEval breaks ties at random, but with the same seed each time: of two labels it is always the higher one, of
    three the lowest. So it is here, since its published numbers contain it.
    """
    out = []
    for row in labels:
        row = row[~np.isnan(row)]
        counted = Counter(row.tolist())
        if counted.keys() <= {1, 1.5, 2}:
            tied = sorted(label for label, n in counted.items() if n == max(counted.values()))
            out.append(tied[len(tied) == 2] if tied else nan)
        else:
            out.append(float(np.median(row)))
    return np.array(out)


def agreement(labels, other):
    """100 (1 - mean |difference|) of two columns of labels (N,), and its standard error over pairs."""
    same = 100 * (1 - np.abs(labels - other))
    return mean_and_error(same[~np.isnan(same)])


def one_against_rest(labels):
    """Mean agreement of each label with the majority of the other labels of its pair: (N, K) -> a number."""
    each = range(labels.shape[1])
    return float(np.mean([agreement(labels[:, k], majority(np.delete(labels, k, 1)))[0] for k in each]))


def repeatability(labels):
    """Mean agreement of two labels of a pair: (N, K) -> a number, NaN if no pair has two."""
    each = [agreement(labels[:, i], labels[:, j])[0] for i in range(labels.shape[1]) for j in range(i)]
    return rate(np.array(each)) if each else nan


def preferred_share(preferences, one, two):
    """Of the pairs in which exactly one answer has a property, how often the judge prefers it. All (N,)."""
    p, one, two = usable(preferences), np.asarray(one, dtype=bool), np.asarray(two, dtype=bool)
    asked = (one ^ two) & (np.abs(p - 1.5) > 0)
    return float(((p > 1.5) == two)[asked].mean()) if asked.any() else nan


def rate(x):
    """Mean of what is there in x, of any shape."""
    return float(np.nanmean(x)) if not np.isnan(x).all() else nan


def judge_report(labels, outputs_1, outputs_2, human=None, models=None, second=None, prices=None, times=None):
    """{name in AlpacaEval's evaluators_leaderboard.csv: number} for one judge.

    labels, human   (N, K), (N, H) preferences; one person or one seed is enough for some of the numbers
    outputs_1, _2   (N,) the texts
    models          (N,) who wrote output_2: correlated are the win rates of each by this judge and by `second`, the
                    labels (N, ...) of a second judge (default: the people)
    prices, times   in $ and seconds for one label each, any shape
    """
    labels = usable(labels).reshape(len(outputs_1), -1)
    first, several = labels[:, 0], labels.shape[1] > 1
    report = dict.fromkeys(("Human agreement", "Human agreement error", "Price [$/1000 examples]",
                            "Time [seconds/1000 examples]", "Spearman corr.", "Pearson corr.", "Bias", "Variance"), nan)
    if human is not None:
        human = usable(human).reshape(len(labels), -1)
        gold = majority(human)
        each = [agreement(labels[:, k], gold)[0] for k in range(labels.shape[1])]
        report["Human agreement"] = float(np.mean(each))
        there = ~np.isnan(labels).all(1) & ~np.isnan(gold)
        same = 100 * (1 - np.abs(labels - gold[:, None]))[there]
        report["Human agreement error"] = mean_and_error(np.nanmean(same, 1))[1] if there.any() else nan
        if several:
            report["Bias"] = 100 - agreement(majority(labels), gold)[0]
    if several:
        report["Variance"] = 100 - one_against_rest(labels)
    for name, values in (("Price [$/1000 examples]", prices), ("Time [seconds/1000 examples]", times)):
        if values is not None:
            report[name] = 1000 * rate(np.array(values, dtype=float))
    second = human if second is None else usable(second).reshape(len(labels), -1)
    if second is not None and models is not None:
        models = np.asarray(models)
        rates = [[rate(judge[models == model]) for model in sorted(set(models))] for judge in (labels, second)]
        both = ~np.isnan(np.sum(rates, 0))
        if both.sum() > 2:
            one, two = np.array(rates)[:, both]
            report["Spearman corr."], report["Pearson corr."] = float(spearman(one, two)), float(pearson(one, two))
    longer = np.array([len(a) - len(b) for a, b in zip(outputs_1, outputs_2)])
    report["Proba. prefer longer"] = preferred_share(first, longer > LONGER, longer < -LONGER)
    report["Proba. prefer lists"] = preferred_share(first, *([bool(LIST.search(text)) for text in texts]
                                                             for texts in (outputs_1, outputs_2)))
    report["Proba. prefer 1"] = 2 - rate(labels)
    report["Repeatability"] = repeatability(labels)
    report["# parsed"], report["# pairs"] = int((~np.isnan(labels)).sum()), len(labels)
    if human is not None:
        report["# pairs with people's labels"] = int((~np.isnan(gold)).sum())
    return report
