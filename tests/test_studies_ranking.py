"""The study `ranking`: who is trained on what, agreement of rankings over prompts, the sweep of distances."""
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from commands import command

from data import InputError
from data.barn.judge import SIM, make_pool, pool_at, win_probabilities
from data.barn.world import splits
from stats.agreement import of_three
from stats.ranking import agreement_over_prompts, kendall, resampled_scores, spearman
from stats.tables import estimate
from stats.winrate import resample
from studies import kit, ranking, sweep

torch.set_num_threads(1)
farm = functools.partial(command, "farm.py")


def study(out, *flags):
    return kit.parse("ranking", ["--quick", "--seeds", "9", "--out", str(out), *flags])


# ---- agreement over prompts ----------------------------------------------------------------------------

def test_scores_are_resampled_by_prompts_without_those_that_are_missing():
    scores = np.random.default_rng(0).normal(size=(2, 3, 7))
    scores[0, 1, 4] = np.nan
    counts = resample(7, 5)
    found = resampled_scores(scores, counts)
    assert found.shape == (2, 6, 3) and np.allclose(found[:, 0], np.nanmean(scores, -1))
    drawn = [n for n, times in enumerate(counts[2]) for _ in range(int(times))]
    assert np.allclose(found[:, 3], np.nanmean(scores[..., drawn], -1))


def test_agreement_over_prompts_is_the_mean_over_trainings_and_its_interval():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 2, 201, 5))
    found = agreement_over_prompts(x, y)
    assert found["kendall"]["each"] == pytest.approx([kendall(x[r, 0], y[r, 0]) for r in (0, 1)])
    assert found["spearman"]["value"] == pytest.approx(np.mean([spearman(x[r, 0], y[r, 0]) for r in (0, 1)]))
    means = np.mean([spearman(x[r, 1:], y[r, 1:]) for r in (0, 1)], axis=0)
    assert found["spearman"]["ci_low"] == pytest.approx(np.quantile(means, .025))
    same = agreement_over_prompts(x, 3 * x + 1)
    assert [row[key] for row in same.values() for key in ("value", "ci_low", "ci_high")] == pytest.approx([1] * 9)


def test_an_estimate_is_written_with_its_interval_and_without_needless_zeros():
    assert estimate({"value": -.804, "ci_low": -1., "ci_high": 0.25}) == "-.80 (-1.00 to .25)"
    assert estimate({"value": .1, "ci_low": 0., "ci_high": 10.05}) == ".10 (.00 to 10.05)"


# ---- who is trained on what ----------------------------------------------------------------------------

def test_each_side_has_labels_of_its_own_and_shares_what_needs_none(tmp_path):
    cfg = study(tmp_path)

    def configs(name, side):
        return kit.configs(cfg, 9, ranking.line(cfg, name, side))
    people, coin, sim = (configs("ppo_8", side) for side in ("people", "coin", "sim"))
    assert {stage: made.stage for stage, made in people.items()} == {
        "sft": "sft", "pairs": "pairs_people", "reward": "reward_people", "ppo": "ppo_8_people"}
    assert (people["pairs"].judge, people["pairs"].flip) == ("barn-human", 0)
    assert (coin["pairs"].judge, coin["pairs"].flip, coin["pairs"].stage) == ("barn", .5, "pairs_coin")
    assert sim["pairs"].stage == "pairs" and sim["pairs"].flip not in (0, .5) and sim["ppo"].stage == "ppo_8"
    assert configs("dpo", "far")["pairs"].judge == "barn-far" and configs("dpo", "sim")["dpo"].stage == "dpo"
    for name in ("sft", "sft_more"):
        assert len({ranking.line(cfg, name, side) for side in ("sim", "people", "coin", "far")}) == 1
    assert kit.configs(cfg, 9, ranking.line(cfg, "simpo_0.2", "sim"))["simpo"].beta == .2


def test_the_second_anchor_answers_only_what_the_offline_world_knows(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps([{"instruction": "Prove Fermat's last theorem.", "output": "No."}]))
    with pytest.raises(InputError, match="no answer to .*Fermat"):
        ranking.clean(study(tmp_path, "--eval_data", str(file)), 9)


def test_the_expected_minutes_count_each_unfinished_stage_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "SYSTEMS", {"sft": ("sft", 60), "simpo": ("simpo", 120)})
    monkeypatch.setattr(ranking, "VARIANTS", {"simpo": ("simpo", 120)})
    monkeypatch.setattr(ranking, "CHEAP", ("sft", "simpo"))
    monkeypatch.setattr(ranking, "NEEDED", {"pairs": 30})
    cfg = study(tmp_path)
    assert ranking.expected_minutes(cfg) == 1 + 4 * 2.5         # of sim, people, coin and far
    for name in ("simpo_far", "sft"):
        (cfg.runs(9) / name).mkdir(parents=True)
        (cfg.runs(9) / name / "result.json").write_text("{}")
    assert ranking.expected_minutes(cfg) == 4 * 2.5 - 2


def test_comparisons_find_their_systems_and_seeds(tmp_path):
    """Boards in which a system's score is known from its name, side and judge."""
    cfg = study(tmp_path, "--seeds", "1,2,3")
    value = {name: i for i, name in enumerate(sorted({*ranking.SYSTEMS, *ranking.VARIANTS, *ranking.ANCHORS}))}
    turned = {("people", "people"), ("far", "far")}
    boards = {}
    for trained, (names, _) in ranking.sides(cfg).items():
        names = [*names, *ranking.ANCHORS * (trained in ("sim", "people"))]
        for who in ("sim", "people", "far", "truth", "sim, verdicts", "people, verdicts"):
            sign = -1 if (trained, who) in turned else 1
            boards[trained, who] = np.tile(sign * np.array([float(value[name]) for name in names]), (3, 4, 1))
    found = ranking.compared(cfg, boards)
    negative = {"S sim/P people", "with anchors", "without sft, sft_more", "the seven of the controls", "S sim/F far",
                "coins: C sim/P people", "P people/P truth"}
    assert {name for name, row in found.items() if row["spearman"]["value"] < 0} == negative
    assert all(abs(row["spearman"]["value"]) == pytest.approx(1) for row in found.values())
    assert (found["with anchors"]["systems"], found["S sim/F far"]["systems"]) == (14, 7)
    assert len(found["another seed: P people"]["spearman"]["each"]) == 3


def test_a_bound_is_met_only_by_a_number_on_its_side():
    def holds(value):
        found = {name: {"spearman": {"value": value}} for name in ("S sim/P people", "coins: C sim/P people")}
        return [row["holds"] for row in ranking.checked(found)]
    assert (holds(.9), holds(.1), holds(float("nan"))) == ([True, False], [False, True], [False, False])


# ---- the sweep -----------------------------------------------------------------------------------------

def test_agreement_with_a_majority_of_three_by_enumeration():
    q, label = .7, .4
    votes = list(itertools.product((1, 0), repeat=3))
    weights = [np.prod([q if vote else 1 - q for vote in each]) for each in votes]
    majority = sum(weight for weight, each in zip(weights, votes) if sum(each) > 1)
    assert of_three(q) == pytest.approx(majority)
    assert sweep.agreement_of(label, q) == pytest.approx(100 * (label * majority + .6 * (1 - majority)))
    assert sweep.agreement_of(np.array([1., 0.]), np.array([1., 0.])).tolist() == [100, 100]


@pytest.fixture(scope="module")
def labels():
    records = splits()["val"][:120]
    rows = [(one["instruction"], one["output"], other["output"]) for one, other in zip(records, records[1:])]
    return [(rows, .1, win_probabilities(make_pool(SIM), rows))]


def test_the_distance_at_which_pools_agree_so_often_is_found(labels):
    near, far = (sweep.agreements(labels, distance)["agreement"] for distance in (0, 2))
    assert near > far
    distance = sweep.distance_of((near + far) / 2, labels)
    assert 0 < distance < 2 and sweep.agreements(labels, distance)["agreement"] == pytest.approx((near + far) / 2,
                                                                                                abs=.01)
    assert sweep.distance_of(near + 1, labels) < .001 and sweep.distance_of(far - 1, labels) > 1.999
    quiet = sweep.agreements([(labels[0][0], 0., labels[0][2])], 1)
    assert quiet["agreement"] == quiet["without_flips"]


def test_people_at_a_distance_judge_exactly_and_by_verdicts(labels):
    rows = [[labels[0][0], [(asked, other, one) for asked, one, other in labels[0][0]]]]
    exact, said = sweep.judged_at(1, rows)
    assert exact.shape == said.shape == (1, 2, 119) and set(np.unique(said)) == {0, 100}
    assert np.allclose(exact[0, 0], 100 * win_probabilities(make_pool(pool_at(1)), labels[0][0]))
    assert np.allclose(exact[0, 0] + exact[0, 1], 100)
    assert said[0].mean() == pytest.approx(50, abs=4 * 50 / 238 ** .5)
    _, said = sweep.judged_at(0, [[[(asked, one, "zzz zzz zzz") for asked, one, _ in labels[0][0]]]])
    assert said.mean() > 80


# ---- all of it -----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_small_study_runs_and_goes_on_where_it_was(monkeypatch, tmp_path):
    few = ("sft", "feedme", "simpo", "best_of_4")
    for table in ("SYSTEMS", "VARIANTS"):
        kept = few if table == "SYSTEMS" else ("simpo", "simpo_0.2", "simpo_0.4")
        monkeypatch.setattr(ranking, table, {name: getattr(ranking, table)[name] for name in kept})
    monkeypatch.setattr(ranking, "CHEAP", few)
    argv = ("--study", "ranking", "--quick", "--seeds", "9", "--out", tmp_path)
    first = farm(*argv)
    assert first.code == 0 and not first.err, first.err
    out = tmp_path / "quick"
    found = json.loads((out / "ranking.json").read_text())["numbers"]
    assert [row["system"] for row in found["rates"]] == [*few, "base", "clean"]
    assert found["agreement"]["S sim/S truth"]["systems"] == 4 and len(found["sweep"]) == 10
    rates = {row["system"]: row for row in found["rates"]}
    assert rates["clean"]["sim by sim"][0] > 60 > rates["sft"]["sim by sim"][0]
    assert rates["sft"]["sim by sim"] == rates["sft"]["people by sim"]          # no label made it
    assert max(map(len, first.out[first.out.index("Win rates in %"):].splitlines()[:-1])) <= 80
    assert {path.suffix for path in out.glob("ranking*")} == {".json", ".html", ".csv", ".svg"}
    again = farm(*argv)
    assert json.loads((out / "ranking.json").read_text())["numbers"] == found and "stage 1 of" not in again.out
    monkeypatch.setattr(kit, "offline", lambda cfg: False)          # as with other data, or other judges
    elsewhere = farm(*argv)
    assert elsewhere.code == 0 and not elsewhere.err and "far" not in elsewhere.out.partition("Do two")[0]
    known = json.loads((out / "ranking.json").read_text())["numbers"]
    assert known["agreement"]["S sim/P people"] == found["agreement"]["S sim/P people"] and known["sweep"] == []
    assert known["agreement"]["with anchors"]["systems"] == 5
