"""The study of over-optimisation: what it measures by brute force, its thresholds by hand, and its command."""
import json

import numpy as np
import pytest
import torch

import annotate
from data import InputError, sets
from data.barn.judge import TASTES, win_probabilities
from data.barn.reward import true_reward
from studies import kit, overoptimization
from studies.overoptimization import JUDGE, MANY, NOISY, checks, fall, rows_of, stored, worths

torch.set_num_threads(1)
KS = [1, 16, 32, 256]
JITTER = np.array([[-1., 1., -1., 1.], [1., -1., 1., -1.]])             # over prompts; its mean is 0


def curve(*means):
    """Values (2, points) with these means over two prompts. Errors of differences: 0 between equal columns, else 2."""
    return np.array(means) + JITTER[:, :len(means)]


def found(noisy=(50, 70, 70, 40), many=(50, 70, 70, 60), judge=(50, 72, 75, 75), own=(50, 75, 80, 79),
          ppo=(50, 70, 10)):
    best = {NOISY: {"win_rate": curve(*noisy)}, MANY: {"win_rate": curve(*many)},
            JUDGE: {"win_rate": curve(*judge), "own": curve(*own)}}
    return {one["what"]: one for one in checks(KS, best, {(MANY, 0.): {"win_rate": curve(*ppo)}})}


# ---- thresholds ----------------------------------------------------------------------------------------

def test_what_the_thresholds_were_fixed_on_passes_all():
    by_hand = [(20, 2), (30, 0), (10, 2), (1, 2), (33, 0), (20, 2), (60, 2)]
    said = list(found().values())
    assert np.array([(one["value"], one["error"]) for one in said]) == pytest.approx(np.array(by_hand))
    assert [one["passed"] for one in said] == 7 * [True]


@pytest.mark.parametrize("changes, failed", [
    ({"noisy": (60, 70, 70, 40)}, "rise from n = 1 to 16"),             # 10 = 5 errors are not over 5
    ({"noisy": (50, 70, 70, 70)}, "noisy, 2,000: fall from 16 to 256"),
    ({"many": (50, 90, 70, 70)}, "noisy, all: fall from 32 to 256"),    # it fell before 32
    ({"own": (50, 75, 82, 79)}, "fall from the peak"), ({"judge": (50, 75, 75, 45)}, "less that of one judge"),
    ({"ppo": (61, 70, 10)}, "peak over its start"), ({"ppo": (50, 70, 51)}, "peak over its end")])
def test_each_threshold_can_fail(changes, failed):
    not_passed = [what for what, one in found(**changes).items() if not one["passed"]]
    assert failed in " ".join(not_passed)


def test_a_fall_is_from_the_peak_of_the_mean_to_the_last_point():
    values = np.array([[0., 9., 2.], [4., 1., 3.]])                     # means 2, 5, 2.5
    assert fall(values).tolist() == [7, -2]
    assert fall(np.sort(values)).tolist() == [0, 0]


# ---- measures ------------------------------------------------------------------------------------------

def test_every_answer_gets_its_own_worth_for_its_own_prompt():
    records = sets.load()["eval"][:3]
    answers = [f"{record['output']} {i}" for record in records for i in ("", "yes")]
    cfg = kit.parse("overoptimization", [])
    found = worths(cfg, records, answers)
    assert {values.shape for values in found.values()} == {(3, 2)}
    for name, pool in (("win_rate", "p_eval"), ("own", "p_single")):
        tastes = {one.name: TASTES[one.name] for one in annotate.pool("barn", pool)}
        assert len(tastes) == {"win_rate": 13, "own": 1}[name]
        row = records[2]["instruction"], answers[5], records[2]["output"]
        assert found[name][2, 1] == pytest.approx(100 * win_probabilities(tastes, [row])[0])
    assert found["truth"][1, 1] == true_reward(records[1]["instruction"], answers[3])


def test_rows_are_means_and_errors_over_prompts_and_then_means_over_seeds():
    rows = rows_of({"x": {"win_rate": np.array([[1., 10.], [3., 10.]]), "score": np.array([[7., 8.]])}}, "n", [1, 4], 2)
    assert rows[0] == {"seed": 2, "curve": "x", "n": 1, "win_rate": 2, "win_rate_error": 1, "score": 7}
    assert rows[1]["win_rate"] == 10 and rows[1]["win_rate_error"] == 0
    assert kit.means([*rows, {**rows[0], "seed": 3, "win_rate": 4}], "curve", "n")["x", 1]["win_rate"] == 3


def test_an_array_is_kept_until_it_is_made_of_something_else(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.full((2, 3), len(made), np.float32)
    path = tmp_path / "new" / "array.npz"
    assert stored(path, ["a", 1], make).tolist() == stored(path, ["a", 1], make).tolist() == 2 * [3 * [1.]]
    assert stored(path, ["a", 2], make)[0, 0] == 2 and [file.name for file in path.parent.iterdir()] == ["array.npz"]


@pytest.mark.parametrize("flags", ["--kl_coefs 0,-1", "--kl_coefs nan", "--kl_coefs 0;1", "--n 0"])
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(InputError, match=flags.split()[0]):
        kit.parse("overoptimization", flags.split())


# ---- the command ---------------------------------------------------------------------------------------

@pytest.mark.slow
def test_it_runs_and_its_ends_are_the_mean_of_the_samples_and_the_winners(tmp_path, monkeypatch):
    few = {labels: overoptimization.LABELS[labels] for labels in (NOISY, MANY, JUDGE)}
    monkeypatch.setattr(overoptimization, "LABELS", few)
    cfg = kit.parse("overoptimization", ["--quick", "--seeds", "3", "--out", str(tmp_path)])
    result = overoptimization.run(cfg)
    run = cfg.runs(3)
    records, _, answers, _ = overoptimization.samples(cfg, 3)
    assert len(records) == 8 and len(answers) == 64
    worth = worths(cfg, records, answers)
    for labels, (name, _) in few.items():
        score = np.load(run / "samples" / f"reward_{name}.npz")["array"]
        rows = [row for row in result.rows["overoptimization"] if row["curve"] == labels]
        assert [row["n"] for row in rows] == [1, 2, 4, 8]
        winners = worth["win_rate"][range(8), score.argmax(1)]
        assert [rows[0]["win_rate"], rows[-1]["win_rate"]] == pytest.approx([worth["win_rate"].mean(), winners.mean()])
        assert rows[-1]["score"] == pytest.approx(score.max(1).mean())
    last = result.rows["overoptimization_ppo"][-1]
    outputs = json.loads((run / "ppo_single_kl0" / "outputs_2.json").read_text())[:8]
    expected = worths(cfg, records, [record["output"] for record in outputs])["win_rate"].mean()
    assert (last["curve"], last["steps"]) == (f"{JUDGE}, kl 0", 2) and last["win_rate"] == pytest.approx(expected)
    assert max(map(len, result.text.splitlines())) <= 80 and "NOT passed" in result.text
    assert result.figures.keys() == {"overoptimization", "overoptimization_score", "overoptimization_ppo"}
