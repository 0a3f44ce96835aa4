"""The judge report: how far to trust a judge, from labels of the same pairs by judges and people.

Names and definitions are those of AlpacaEval's table of evaluators (`analyze_evaluators`). Labels are preferences
(N, K): K labels of each of N pairs, by several people or by one judge with K seeds; NaN where there is none. A pair
that has only some of its labels counts with these, while AlpacaEval leaves it out. A draw coded as 0 becomes 1.5.
"""
import re
from collections import Counter
from math import nan

import numpy as np

from stats.ranking import pearson, spearman
from stats.winrate import mean_and_error, usable

LONGER = 30                             # characters; a smaller difference in length does not count
LIST = re.compile(r"^\s*(?:[*•-]\s*|\d+[.)]\s*|[a-zA-Z][.)]\s+)[^\w]*\w", re.MULTILINE)


def majority(labels):
    """The most frequent label in each row of labels (N, K); (N,). If a row has soft labels, their median.

    AlpacaEval breaks ties at random, but with the same seed each time, so that of two labels the higher one always
    wins, and of three the lowest. Ties are broken alike here, because its published numbers depend on it.
    """
    return np.array([most_frequent(row[~np.isnan(row)]) for row in labels])


def most_frequent(row):
    """`majority` of the labels (K,) of one pair."""
    counted = Counter(row.tolist())
    if not counted:
        return nan
    if not counted.keys() <= {1, 1.5, 2}:
        return float(np.median(row))
    tied = sorted(label for label, n in counted.items() if n == max(counted.values()))
    return tied[1] if len(tied) == 2 else tied[0]


def of_three(q):
    """The probability that a majority of three prefers what one of them prefers with probability q."""
    return q * q * (3 - 2 * q)


def agreement(labels, other):
    """100 (1 - mean |difference|) of two columns of labels (N,), and its standard error over pairs."""
    same = agreements(labels, other)
    return mean_and_error(same[~np.isnan(same)])


def agreements(labels, other):
    """How far labels agree, each by itself, in percent: 100 (1 - |difference|)."""
    return 100 * (1 - np.abs(labels - other))


def one_against_rest(labels):
    """Mean agreement of each label with the majority of the other labels of its pair: (N, K) -> a number."""
    agreed = []
    for k in range(labels.shape[1]):
        rest = majority(np.delete(labels, k, axis=1))
        agreed.append(agreement(labels[:, k], rest)[0])
    return float(np.mean(agreed))


def repeatability(labels):
    """Mean agreement of two labels of a pair: (N, K) -> a number, NaN if no pair has two."""
    each = [agreement(labels[:, i], labels[:, j])[0] for i in range(labels.shape[1]) for j in range(i)]
    return rate(np.array(each)) if each else nan


def preferred_share(preferences, one, two):
    """How often the judge prefers the answer with a property, over the pairs in which just one answer has it.

    preferences (N,); one and two (N,) say whether the first and the second answer have the property. Draws are left
    out.
    """
    p, one, two = usable(preferences), np.asarray(one, dtype=bool), np.asarray(two, dtype=bool)
    counts = (one ^ two) & (np.abs(p - 1.5) > 0)
    prefers_it = (p > 1.5) == two
    return float(prefers_it[counts].mean()) if counts.any() else nan


def rate(x):
    """Mean of the numbers in x, of any shape, without its NaN."""
    return float(np.nanmean(x)) if not np.isnan(x).all() else nan


def judge_report(labels, outputs_1, outputs_2, human=None, models=None, second=None, prices=None, times=None):
    """{name in AlpacaEval's evaluators_leaderboard.csv: number} for one judge.

    labels, human   (N, K), (N, H) preferences; some of the numbers need only one person or one seed
    outputs_1, _2   (N,) the texts
    models          (N,) who wrote output_2. The win rates of the models by this judge are correlated with those by
                    `second`, the labels (N, ...) of a second judge (default: the people)
    prices, times   in $ and seconds for one label each, any shape
    """
    labels = usable(labels).reshape(len(outputs_1), -1)
    human = None if human is None else usable(human).reshape(len(labels), -1)
    second = human if second is None else usable(second).reshape(len(labels), -1)
    several = labels.shape[1] > 1
    report = dict.fromkeys(("Human agreement", "Human agreement error", "Price [$/1000 examples]",
                            "Time [seconds/1000 examples]", "Spearman corr.", "Pearson corr.", "Bias", "Variance"), nan)
    if human is not None:
        report |= beside_people(labels, human)
    if several:
        report["Variance"] = 100 - one_against_rest(labels)
    if prices is not None:
        report["Price [$/1000 examples]"] = 1000 * rate(np.array(prices, dtype=float))
    if times is not None:
        report["Time [seconds/1000 examples]"] = 1000 * rate(np.array(times, dtype=float))
    if second is not None and models is not None:
        report |= correlated_win_rates(labels, second, np.asarray(models))
    report |= tastes(labels[:, 0], outputs_1, outputs_2)
    report["Proba. prefer 1"] = 2 - rate(labels)
    report["Repeatability"] = repeatability(labels)
    report["# parsed"] = int((~np.isnan(labels)).sum())
    report["# pairs"] = len(labels)
    if human is not None:
        report["# pairs with people's labels"] = int((~np.isnan(human)).any(1).sum())
    return report


def beside_people(labels, human):
    """Agreement of a judge with the majority of people, its error over pairs, and the bias of its own majority."""
    gold = majority(human)
    each = [agreement(labels[:, k], gold)[0] for k in range(labels.shape[1])]
    found = {"Human agreement": float(np.mean(each)), "Human agreement error": nan}
    there = ~np.isnan(labels).all(1) & ~np.isnan(gold)
    if there.any():
        by_pair = np.nanmean(agreements(labels, gold[:, None])[there], axis=1)
        found["Human agreement error"] = mean_and_error(by_pair)[1]
    if labels.shape[1] > 1:
        found["Bias"] = 100 - agreement(majority(labels), gold)[0]
    return found


def correlated_win_rates(labels, second, models):
    """Correlations of the models' win rates by two judges; {} for fewer than three models."""
    names = sorted(set(models))
    rates = np.array([[rate(judge[models == name]) for name in names] for judge in (labels, second)])
    one, two = rates[:, ~np.isnan(rates).any(0)]
    if len(one) < 3:
        return {}
    return {"Spearman corr.": float(spearman(one, two)), "Pearson corr.": float(pearson(one, two))}


def tastes(preferences, outputs_1, outputs_2):
    """How often a judge prefers the longer answer, and the one with a list, where only one is such."""
    longer = np.array([len(one) - len(two) for one, two in zip(outputs_1, outputs_2)])
    lists = ([bool(LIST.search(text)) for text in texts] for texts in (outputs_1, outputs_2))
    return {"Proba. prefer longer": preferred_share(preferences, longer > LONGER, longer < -LONGER),
            "Proba. prefer lists": preferred_share(preferences, *lists)}
