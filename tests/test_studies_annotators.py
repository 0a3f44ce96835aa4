"""The study `annotators`: AlpacaEval's numbers on small labels, the decomposition by enumeration, a small run."""
import functools
import json

import numpy as np
import pytest
import torch
from commands import command, refused

from stats.agreement import of_three
from studies import annotators

torch.set_num_threads(1)
farm = functools.partial(command, "farm.py")


def test_error_is_bias_and_variance_by_enumeration():
    random = np.random.default_rng(0)
    p, majority = random.random(50), random.random(50)
    found = annotators.decomposed(p, majority)
    assert found["error"] == pytest.approx(found["bias"] + found["unbiased"] - found["biased"])
    assert found["variance"] == pytest.approx(found["unbiased"] + found["biased"])
    outcomes = [(label, people, (a if label else 1 - a) * (b if people else 1 - b))
                for a, b in zip(p, majority) for label in (0, 1) for people in (0, 1)]
    assert found["error"] == pytest.approx(2 * sum(w for label, people, w in outcomes if label != people))
    assert found["bias"] == pytest.approx(100 * np.where(p > .5, 1 - majority, majority).mean())


def test_a_judge_without_noise_has_no_variance_and_a_coin_has_half():
    sure = annotators.decomposed(np.array([1., 0., 1.]), np.array([1., 1., 1.]))
    assert (sure["variance"], sure["bias"]) == (0, pytest.approx(100 / 3)) and sure["error"] == sure["bias"]
    coin = annotators.decomposed(np.full(3, .5), of_three(np.array([.9, .2, .5])))
    assert (coin["variance"], coin["error"]) == (50, pytest.approx(50))


def test_tastes_are_read_from_labels_and_orders():
    given = np.array([[2., 2, 2, 1], [1, 1, 1, 1], [2, 1, 1, 1]])
    switched = np.full((3, 4), True)                                    # output_2 was shown first
    longer = np.array([50, 40, 5])                                      # output_2 minus output_1
    people = np.array([[2.] * 4, [2.] * 4, [1.] * 4])
    found = annotators.measured(given, switched, people, longer)
    assert found["first"] == pytest.approx((3 + 0 + 1) / 12)
    assert found["longer"] == pytest.approx(3 / 8)                      # the third pair is of equal length
    assert found["agreement"] == pytest.approx(100 * (3 + 0 + 3) / 12)
    assert found["bias"] == pytest.approx(100 / 3)
    assert found["variance"] == pytest.approx(100 * 2 / 12)


def test_bounds_that_were_fixed_before_can_be_broken():
    def row(agreement, variance):
        return {"agreement": (agreement, 0.), "variance": (variance, 0.)}
    near = {"people": row(66, 34), "p_ann": row(64, 36), "p_single": row(70, 8)}
    assert [holds for _, _, holds in annotators.checked(near).values()] == [True] * 3
    far = {"people": row(66, 34), "p_ann": row(60, 28), "p_single": row(70, 20)}
    assert [holds for _, _, holds in annotators.checked(far).values()] == [False] * 3
    assert annotators.checked({"people": row(66, 34), "pool.json": row(60, 30)}) == {}


@pytest.mark.parametrize("flags, code, why", [
    ("--pairs 1", 2, "--pairs is a number from 2 up"), ("--people none", 2, "none does not judge barn"),
    ("--people a-model", 3, "OPENAI_API_KEY is not set")])
def test_what_makes_no_sense_is_refused_before_anything_is_trained(flags, code, why, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    refused(farm("--study", "annotators", "--out", tmp_path / "runs", *flags.split()), code, why)
    assert not list(tmp_path.glob("runs/seed*/*"))


def test_a_small_study_runs(tmp_path):
    result = farm("--study", "annotators", "--quick", "--seeds", "9", "--out", tmp_path)
    assert result.code == 0 and not result.err, result.err
    found = json.loads((tmp_path / "quick" / "annotators.json").read_text())["numbers"]
    assert found["judges"]["people"]["bias"][0] == 0 and found["judges"]["true reward"]["variance"][0] == 0
    assert found["judges"]["p_single"]["variance"][0] < found["judges"]["p_ann"]["variance"][0]
    assert found["judges"]["longer answer"]["longer"][0] == 1
    exact = found["exact"]
    assert exact["p_eval"]["error"][0] < exact["p_ann"]["error"][0] and len(found["annotators"]) == 13 + 16 + 16
    shown = result.out[result.out.index("At most"):]
    assert max(map(len, shown.splitlines()[:-1])) <= 80 and "barn-human-15" in shown
