"""RewardBench 2: its scores by hand, the command against the reward model itself, and files that cannot be read."""
import json
import math
import re
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
import toy

from data import InputError
from data.reward_bench import read_reward_bench
from rlhf import reward, reward_bench
from rlhf.reward_bench import best_of, scored, subset_score, ties_score

torch.set_num_threads(1)


def record(id, right, wrong, subset="Focus", prompt="w1 w2"):
    return {"id": id, "prompt": prompt, "chosen": right, "rejected": wrong, "subset": subset, "num_correct": len(right)}


@pytest.mark.parametrize("right, wrong, counts", [
    ([3.], [1., 2., 0.], 1), ([1.], [1., 2., 0.], 0), ([2.], [2., 1., 0.], 1 / 2), ([2.], [2., 2., 2.], 1 / 4)])
def test_the_best_of_four(right, wrong, counts):
    assert best_of(right, wrong) == counts


def test_a_subset_is_the_mean_over_its_prompts():
    records = [record(str(i), ["a"], ["b"] * 3) for i in range(4)]
    score, error = subset_score(records, [([3.], [1, 2, 0]), ([2.], [2, 1, 0]), ([0.], [1, 2, 3]), ([9.], [1, 2, 3])])
    assert score == pytest.approx(100 * 2.5 / 4)
    assert error == pytest.approx(100 * math.sqrt((2 * .375 ** 2 + .125 ** 2 + .625 ** 2) / 3 / 4))


def test_ties_by_hand():
    ref = {"1": ([4.], [1., 0.]), "2": ([1.], [3.]), "3": ([5.], [4.])}
    tied = {"1": ([5., 4.], [2., 1.]),                  # gap 2, of both 2, spread 1
            "2": ([5., 3.], [2.]),                      # gap 1, of both -2, spread 2
            "3": ([6., 6.], [3.]),                      # gap 3, of both 1, spread 0
            "4": ([1., 2.], [3.])}                      # gap -2, without a partner
    above, ahead, ahead_of_both = 3 / 4, 2 / 3, 2 / 3
    spread = (math.tanh(2 / 1 - 1) + math.tanh(-2 / 2 - 1)) / 2
    assert ties_score(ref, tied) == pytest.approx(.3 * above + .3 * 2 / 3 + .2 * ahead + .2 * ahead_of_both +
                                                  .01 * spread)
    assert ties_score({}, {"1": ([1.], [0.])}) == pytest.approx(.3)
    records = [record(f"{kind}:{n}", ["a"], ["b"], "Ties") for kind in ("ref", "tied") for n in "123"]
    del tied["4"]
    score, error = subset_score(records, [*ref.values(), *tied.values()])
    assert score == 100 * ties_score(ref, tied) and math.isnan(error)


def test_each_score_goes_back_to_its_answer():
    records = [record("x", ["a" * i], ["b" * (i + 1)] * (1 + i % 3)) for i in range(70)]
    model = SimpleNamespace(tokens=lambda record, text: text,
                            scores=lambda texts: torch.tensor([float(len(text)) for text in texts]))
    assert scored(model, records) == [([i], [i + 1] * (1 + i % 3)) for i in range(70)]


def command(*argv):
    out = StringIO()
    with redirect_stdout(out):
        reward_bench.main(list(map(str, argv)))
    return out.getvalue()


def lines(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_the_command_scores_with_the_reward_model(tmp_path):
    run = toy.run_folder(tmp_path, "full")
    cfg = toy.settings(run, "full", reward.Config)
    records = [record(str(i), [f"w{30 + i}"], [f"w{40 + i} w{i + 9}", f"w{50 - i}", "w20"], prompt=f"w{i} w3")
               for i in range(8)]
    ties = [record("ref:0", ["w30"], ["w41"], "Ties"), record("tied:0", ["w33", "w34"], ["w42", "w43"], "Ties")]
    shown = command(cfg.dir() / "checkpoint", lines(tmp_path / "rb.jsonl", records + ties), "--device", "cpu")

    text, model = cfg.text(), reward.load(cfg, None)

    def worth(row):
        rows = [text.example({"instruction": row["prompt"]}, answer) for answer in row["chosen"] + row["rejected"]]
        scores = reward.scores(model, rows, cfg).tolist()
        return scores[:len(row["chosen"])], scores[len(row["chosen"]):]

    focus = 100 * sum(max(right) > max(wrong) for right, wrong in map(worth, records)) / 8
    tied = 100 * ties_score({"0": worth(ties[0])}, {"0": worth(ties[1])})
    cells = [re.split(r"  +", line) for line in shown.splitlines()]
    assert [cell[:2] for cell in cells[2:4]] == [["Focus", "8"], ["Ties", "2"]]
    assert [cells[2][2].split(" ")[0], cells[3][2], cells[4][1]] == [
        f"{focus:.1f}", f"{tied:.1f}", f"{(focus + tied) / 2:.1f}"] and 0 < focus < 100


@pytest.mark.parametrize("records, said", [
    ([{**record("1", ["a"], ["b"]), "chosen": "a"}], "row 0 has no list of texts under 'chosen'"),
    ([record("1", ["a"], ["b"]), record("2", ["a"], [])], "row 1 has no list of texts under 'rejected'"),
    ([record("17", ["a"], ["b"], "Ties")], "row 0 is of the subset Ties, and its id is not like ref:7"),
    ([{**record("1", ["a"], ["b"]), "subset": None}], "row 0 has no text under 'subset'")])
def test_a_malformed_row_is_named(tmp_path, records, said):
    with pytest.raises(InputError, match=said):
        read_reward_bench(lines(tmp_path / "rb.jsonl", records))


def test_parquet_and_policies_are_refused(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="Parquet cannot be read without another package; .*read_parquet"):
        command("barn", tmp_path / "test.parquet")
    with pytest.raises(InputError, match="barn is no reward model"):
        command("barn", lines(tmp_path / "rb.jsonl", [record("1", ["a"], ["b"])]))
