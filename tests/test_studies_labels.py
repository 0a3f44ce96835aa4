"""The study of what a label is worth: its sets of labels, its comparisons by hand, and its command."""
import csv
import io
from math import nan

import numpy as np
import pytest
import torch

from data import InputError
from studies import kit, labels, overoptimization
from studies.labels import compared, line, matrix

torch.set_num_threads(1)


def test_fewer_pairs_are_tried_with_clean_labels_and_with_a_quarter_flipped():
    cells = kit.parse("labels", ["--flips", ".4,.25", "--sizes", "2000,100"]).cells
    rows = {flip: [size for share, size in cells if share == flip] for flip, _ in cells}
    assert rows == {0: [100, 500, 2000, 0], .25: [100, 500, 2000, 0], .4: [0]}


@pytest.mark.parametrize("argv", [("--flips", "x"), ("--sizes", "1.5"), ("--flips", ".6"), ("--sizes", "-1")])
def test_sets_of_labels_that_make_no_sense_are_refused(argv):
    with pytest.raises(InputError, match="--flips"):
        kit.parse("labels", [*argv])


@pytest.mark.parametrize("flip, size, name", [
    (.25, 2000, "noisy, 2,000"), (.25, 0, "noisy, all"), (0., 0, "clean, all"), (0., 2000, "clean, 2,000")])
def test_stages_are_shared_with_the_study_of_over_optimisation(flip, size, name):
    ours = kit.configs(kit.parse("labels", []), 2, line("reward", flip, size))
    theirs = kit.configs(kit.parse("overoptimization", []), 2, overoptimization.line("reward", name))
    assert list(ours.values()) == list(theirs.values())
    assert [cfg.stage for cfg in ours.values()] == [cfg.stage for cfg in theirs.values()]
    assert (ours["pairs"].flip, ours["pairs"].max_pairs) == (flip, size)


def test_comparisons_by_hand():
    """Preferences of two prompts: 1 is a defeat, 2 a win."""
    rates = {("dpo", 0., 0): [1.9, 1.7], ("dpo", .25, 0): [1.6, 1.6], ("dpo", .25, 500): [1.5, 1.7],
             ("dpo", 0., 2000): [1.5, 1.5]}
    found = compared({key: np.array(values) for key, values in rates.items()})
    assert [one["value"] for one in found] == pytest.approx([20, 0, -10])
    assert [one["error"] for one in found] == pytest.approx([10, 10, 0], abs=1e-9)
    assert [one["passed"] for one in found] == [True, False, None]
    assert "NOT passed" in kit.told({2: found, 3: found}) and kit.told({2: found}).count("over 5 points") == 2


def test_tables_have_means_over_seeds_and_leave_out_what_was_not_tried():
    rows = [{"seed": seed, "flip": flip, "size": size, "dpo": dpo, "dpo_error": 1.}
            for seed, flip, size, dpo in ((2, .25, 500, 50), (3, .25, 500, 60), (2, .25, 0, 70), (3, .25, 0, 70),
                                          (2, .4, 0, nan), (3, .4, 0, 5))]
    means = kit.means(rows, "flip", "size")
    assert means[.25, 500]["dpo"] == 55
    assert [line.split() for line in matrix(means, "dpo").splitlines()] == [
        ["500", "all"], ["-" * 22], ["25", "%", "wrong", "55.0", "70.0"], ["40", "%", "wrong"]]


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "WITH_PPO", ((0., 0), (.25, 0)))
    cfg = kit.parse("labels", ["--quick", "--seeds", "3", "--flips", "0", "--sizes", "500", "--out", str(tmp_path)])
    result = labels.run(cfg)
    rows = result.rows["labels"]
    assert [(row["flip"], row["size"]) for row in rows] == cfg.cells == [(0, 500), (0, 0), (.25, 500), (.25, 0)]
    assert rows[0]["pairs"] == rows[1]["pairs"] and rows[2]["pairs"] == rows[3]["pairs"]        # all are fewer than 500
    folder = cfg.runs(3) / "dpo_f25"
    rate = kit.rates(cfg, 3, [folder])["dpo_f25"]
    assert rows[3]["dpo"] == pytest.approx(100 * (rate.mean() - 1)) and rows[2]["ppo"] != rows[2]["ppo"]
    assert max(map(len, result.text.splitlines())) <= 80 and "PPO, win rate by verdicts" in result.text
    writer = csv.DictWriter(io.StringIO(), rows[0])
    writer.writerows(rows)                              # all rows have the same columns
