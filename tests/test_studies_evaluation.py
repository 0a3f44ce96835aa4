"""The study `evaluation`: answers to a second set are those of the stage, subsets of prompts, a small run."""
import functools
import json

import numpy as np
import pytest
import torch
from commands import command, refused

from studies import evaluation, kit

torch.set_num_threads(1)
farm = functools.partial(command, "farm.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


def study(out, *flags):
    return kit.parse("evaluation", ["--quick", "--seeds", "9", "--out", str(out), *flags])


QUARK = "--quark.rounds 1 --quark.rollout_batch 16 --quark.updates 1 --quark.batch_size 16".split()


@pytest.mark.parametrize("method", ["sft", "reward_conditioning", "quark", "best_of_n"])
def test_a_stage_answers_other_records_as_it_answers_eval(out, method):
    """Asked for eval with its own seed, it gives the answers that it gave when it was trained."""
    cfg = study(out, *QUARK * (method == "quark"))
    folder = kit.train(cfg, 9, method)
    own = kit.configs(cfg, 9, method)[method]
    own.seed -= evaluation.SEED
    given = [record["output"] for record in json.loads((folder / "outputs.json").read_text())]
    assert evaluation.answers(method, own, kit.shared(cfg).splits()["eval"]) == given


def test_prompts_are_drawn_without_replacement():
    counts = evaluation.drawn(10, 4, np.random.default_rng(0))
    assert counts.shape == (evaluation.DRAWS, 10) and set(np.unique(counts)) == {0, 1} and (counts.sum(1) == 4).all()
    assert counts.mean(0) == pytest.approx([.4] * 10, abs=.08)


def test_errors_are_those_of_a_win_rate_and_of_a_paired_difference():
    random = np.random.default_rng(0)
    common = random.normal(size=(1, 1, 4000))
    scores = 3 * common + 4 * random.normal(size=(1, 3, 4000))
    error, paired = evaluation.errors(scores, 100)
    assert error == pytest.approx(5 / 10, rel=.05) and paired == pytest.approx(4 * 2 ** .5 / 10, rel=.05)


def test_more_prompts_rank_better_and_all_of_them_as_well_as_can_be():
    random = np.random.default_rng(0)
    level = np.linspace(30, 70, 6)[None, :, None]
    said = 100. * (random.random((2, 6, 300)) < level / 100)
    rows = evaluation.by_size({"exact": np.broadcast_to(level, said.shape), "verdicts": said},
                              {"verdicts": said[..., :250]})
    assert [row["prompts"] for row in rows] == [25, 50, 100, 200, 250]
    to_all = [row["to_all"]["value"] for row in rows]
    assert to_all[0] < to_all[1] < to_all[2] < to_all[-1] and to_all[0] < .9 < .95 < to_all[-1]
    said[0, 0, 7] = np.nan                              # a verdict that was unusable
    rated = evaluation.by_size({"exact": said, "verdicts": said}, {"verdicts": said})
    assert rated[0]["to_all"]["value"] > .5 and rated[-1]["to_all"]["value"] == pytest.approx(1)
    assert all(row["to_other"]["ci_low"] <= row["to_other"]["value"] <= row["to_other"]["ci_high"] for row in rows)


@pytest.mark.slow
def test_a_small_study_runs_with_sets_that_no_split_has(out):
    result = farm("--study", "evaluation", "--quick", "--seeds", "9", "--out", out)
    assert result.code == 0 and not result.err, result.err
    found = json.loads((out / "quick" / "evaluation.json").read_text())["numbers"]
    assert found["agreement"].keys() == {"other mix", "new phrasings", "demo"}
    assert [row["method"] for row in found["rates"]] == evaluation.QUICK.split(",")
    asked = {record["instruction"] for record in kit.shared(study(out)).splits()["eval"]}
    for name in ("other_mix", "new_phrasings", "demo"):
        records = json.loads((out / "quick" / "evaluation" / f"{name}.json").read_text())
        assert len(records) == 16 and not asked & {record["instruction"] for record in records}
    assert max(map(len, result.out[result.out.index("Win rates in %"):].splitlines()[:-1])) <= 80


def test_a_second_set_may_be_a_file_and_methods_are_checked(out, tmp_path):
    own = tmp_path / "own.json"
    records = [{"instruction": f"Describe {x}.", "output": "It is small."} for x in ("a cow", "a hen")]
    own.write_text(json.dumps(records))
    cfg = study(out, "--demo", str(own), "--methods", "sft,dpo")
    assert {name: len(records) for name, records in evaluation.sets(cfg).items()} == {"demo": 2}
    assert kit.shared(evaluation.asking(cfg, "demo", evaluation.sets(cfg)["demo"])).splits()["eval"][1][
        "instruction"] == "Describe a hen."
    refused(farm("--study", "evaluation", "--methods", "sft,reward"), 2, "--methods")
