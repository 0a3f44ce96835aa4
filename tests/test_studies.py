"""Studies: which there are, their flags, what they train and reuse, what they write."""
import csv
import functools
import json
import re
import shutil
from math import nan

import numpy as np
import pytest
import torch
from commands import command, refused

import studies
from data import InputError
from data.barn import world
from data.barn.judge import TASTES, probability_first
from data.barn.reward import true_reward
from rlhf import config
from stats.tables import table
from studies import kit

torch.set_num_threads(1)
farm = functools.partial(command, "farm.py")
STUDY = '''"""A trial: nothing is claimed.

It takes no time."""
from dataclasses import dataclass

from studies import kit


@dataclass
class Config(kit.Config):
    shout: str = "x"                    # a flag of its own


def run(cfg):
    folders = [kit.train(cfg, 0, line) for line in ("sft --epochs 1", "sft --epochs 1 --lr 1e-4 --name sft_slow")]
    wins = {name: sum(r["preference"] - 1 for r in records) for name, records in kit.verdicts(cfg, 0, folders).items()}
    return kit.Result({"wins": wins, "said": cfg.shout}, "the table", {"wins": [wins, wins]}, {"trial": "<svg/>"})
'''


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """A study of its own, in a folder of studies of its own; the kit's results go there, too."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("__init__", "kit"):
        shutil.copy(studies.FOLDER / f"{name}.py", folder)
    (folder / "trial.py").write_text(STUDY)
    monkeypatch.setattr(studies, "FOLDER", folder)
    monkeypatch.setattr(kit, "RESULTS", folder / "results")
    monkeypatch.setattr(studies, "__path__", [str(folder)])
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name[0] != "."}


# ---- finding them --------------------------------------------------------------------------------------

def test_every_file_but_the_kit_is_a_study_and_farm_lists_it():
    files = {path.stem for path in studies.FOLDER.glob("*.py") if '"""[kit]' not in path.read_text()} - {"__init__"}
    assert studies.studies().keys() == files
    listed = farm().out
    for name, about in studies.studies().items():
        assert f"\n  {name} " in listed and about.split()[0] in listed, name


def test_a_study_is_one_file_and_what_is_none_says_what_it_lacks(trial):
    assert studies.studies() == {"trial": "A trial: nothing is claimed."}
    refused(farm("--study", "trail"), 2, "study 'trail' is not known .did you mean trial")
    refused(farm("--study", "kit"), 2, "studies/kit.py is no study: it has no run")
    (trial / "half.py").write_text("def run(cfg:\n")
    refused(farm("--study", "half"), 2, "studies/half.py, line 1: ")
    assert studies.studies().keys() == {"trial"}


# ---- flags ---------------------------------------------------------------------------------------------

def test_flags_are_the_study_s_own_or_of_stages(trial):
    cfg = kit.parse("trial", "--shout y --pool p_single --sft.lr 1e-4 --seeds 3,5,3 --sft.no-checkpointing".split())
    assert (cfg.shout, cfg.numbers) == ("y", [3, 5])
    assert cfg.passed[""] == {"pool": "p_single"} and cfg.passed["sft"] == {"lr": 1e-4, "checkpointing": False}
    made = kit.configs(cfg, 5, "dpo --beta .3 --sft.lr 1e-5")
    assert list(made) == ["sft", "pairs", "dpo"] and made["dpo"].beta == .3 and made["sft"].lr == 1e-5
    assert {(one.pool, one.seed, one.out) for one in made.values()} == {("p_single", 5, "runs/studies/seed5")}
    assert kit.configs(cfg, 5, "dpo")["sft"].lr == 1e-4
    assert made["pairs"].flip == 0 and kit.configs(kit.parse("trial", []), 0, "pairs")["pairs"].flip > 0


def test_a_flag_for_a_stage_is_ignored_by_methods_that_do_without_it_but_not_in_a_line(trial):
    cfg = kit.parse("trial", ["--reward.epochs", "1"])
    assert list(kit.configs(cfg, 0, "dpo")) == ["sft", "pairs", "dpo"]
    assert kit.configs(cfg, 0, "ppo")["reward"].epochs == 1
    with pytest.raises(InputError, match="dpo does not need reward"):
        kit.configs(cfg, 0, "dpo --reward.epochs 1")


@pytest.mark.parametrize("argv, why", [
    ("--shuot x", "--shuot is not a flag of this study .did you mean shout"), ("--seed 1", "but --seeds is"),
    ("--rerun sft", "--rerun is not a flag of this study"), ("--lr 1", "--lr is not a flag"),
    ("--limt 3", "did you mean limit"), ("--sft.beta 1", "--beta is not known"), ("--seeds 1;2", "are no numbers"),
    ("--pool p_singel", "did you mean p_single"), ("--quick --results", "worth keeping"),
    ("--judge none", "needs them")])
def test_a_wrong_flag_is_refused_before_anything_runs(trial, argv, why, tmp_path):
    refused(farm("--study", "trial", "--out", tmp_path / "runs", *argv.split()), 2, why)
    assert not (tmp_path / "runs").exists()


def test_help_shows_what_is_claimed_and_the_flags(trial):
    shown = farm("--study", "trial", "--help").out
    assert "A trial: nothing is claimed." in shown and "a flag of its own [x]" in shown and "--seeds" in shown
    assert max(map(len, shown.splitlines())) <= 80


# ---- running them --------------------------------------------------------------------------------------

def test_a_study_writes_its_files_and_goes_on_where_it_was(trial, tmp_path):
    argv = ("--study", "trial", "--quick", "--shout", "hey", "--out", tmp_path / "runs")
    first = farm(*argv)
    assert first.code == 0 and not first.err and "the table" in first.out, first.err
    out = tmp_path / "runs" / "quick"
    document = json.loads((out / "trial.json").read_text())
    assert document["numbers"]["said"] == "hey" and document["settings"]["limit"] == 16 and document["quick"] is True
    assert document["seconds"] > 0 and document["settings"]["versions"]["torch"] == torch.__version__
    with open(out / "wins.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wins = document["numbers"]["wins"]
    assert rows == 2 * [{name: str(n) for name, n in wins.items()}] and wins.keys() == {"sft", "sft_slow"}
    assert (out / "trial.svg").read_text() == "<svg/>"
    for name in wins:
        records = json.loads((out / "seed0" / name / "verdicts_barn-p-eval.json").read_text())["value"]
        assert wins[name] == sum(record["preference"] - 1 for record in records) and len(records) == 16
    before = tree(out / "seed0")
    again = farm(*argv)
    assert again.code == 0 and tree(out / "seed0") == before
    assert json.loads((out / "trial.json").read_text())["numbers"] == document["numbers"]
    assert "seed 0: " not in again.out
    assert not (trial / "results").exists()


def test_results_go_beside_the_studies_when_they_are_wanted(trial, tmp_path):
    cfg = kit.parse("trial", ["--results", "--out", str(tmp_path / "runs")])
    result = kit.Result({"x": 1, "spread": (2., nan)}, "", {"rows": [{"a": 1}]}, {"figure": "<svg/>"})
    names = kit.write(cfg, result, {"seconds": 1.})
    assert set(names) == tree(tmp_path / "runs").keys() == {"trial.json", "trial.html", "rows.csv", "figure.svg"}
    assert tree(trial / "results").keys() == {"trial.json", "figure.svg"}
    written = (trial / "results" / "trial.json").read_text()
    assert json.loads(written)["numbers"] == {"x": 1, "spread": [2, None]} and "NaN" not in written


def test_the_page_of_a_study_has_all_that_it_found_and_how(trial, tmp_path):
    cfg = kit.parse("trial", ["--shout", "a b", "--sft.lr", "1e-4", "--out", str(tmp_path)])
    shown = table(["", "win rate", "order"], ["sft & co", "48.3 ± 1.7 (0.2)", "-1"], ["dpo", "", "2"])
    text = f"Win rates < all:\n\n{shown}\n\nThresholds:\n  seed 2: passed"
    kit.write(cfg, kit.Result({}, text, {"figure": [{"a": 1.5}], "rows": [{"b": 2}]}, {"figure": "<svg>x</svg>"}),
              {"seconds": 7.})
    page = re.sub(r"<(td|th) class=\"\w*\">", r"<\1>", (tmp_path / "trial.html").read_text())
    assert "<h1>A trial: nothing is claimed.</h1>" in page and "It takes no time." in page and "<svg>x</svg>" in page
    for row in (["sft &amp; co", "48.3 ± 1.7 (0.2)", "−1"], ["dpo", "", "2"], ["1.5"], ["2"], ["sft.lr", "0.0001"],
                ["seconds", "7"], ["shout", "a b"]):
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page, row
    assert "Win rates &lt; all:" in page and "<pre>Thresholds:\n  seed 2: passed</pre>" in page
    assert f"<pre>python farm.py --study trial --shout &#x27;a b&#x27; --sft.lr 1e-4 --out {tmp_path}</pre>" in page


@pytest.mark.parametrize("name", ["ranking", "annotators"])
def test_who_plays_people_must_know_the_data(name):
    assert kit.offline(kit.parse(name, [])) and not kit.offline(kit.parse(name, ["--judge", "gpt"]))
    refused(farm("--study", name, "--data", "x.json", "--judge", "gpt"), 2, "barn-human does not judge x.json")
    assert not kit.offline(kit.parse(name, "--data x.json --judge gpt --people serve:x".split()))


def test_what_is_kept_is_made_again_only_if_it_is_made_of_something_else(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made), 3: [None]}
    path = tmp_path / "new" / "value.json"
    first = kit.kept(path, ["a", 1], make)
    assert first == {"n": 1, "3": [None]} == kit.kept(path, ["a", 1], make)
    assert kit.kept(path, ["a", 2], make)["n"] == 2 and len(made) == 2


def test_a_pool_is_known_by_its_name_and_one_of_the_user_by_what_is_in_its_file(tmp_path):
    file = tmp_path / "pool.json"
    seen = []
    for temperature in (0, .5):
        file.write_text(json.dumps([{"name": "a", "model": "m", "prompt": "pairwise", "temperature": temperature}]))
        seen.append(kit.annotators_of("", str(file)))
    assert seen[0] != seen[1] and json.dumps(seen) and kit.annotators_of("barn", "p_eval") == "p_eval"


def test_rates_are_the_mean_over_all_annotators_and_both_orders_and_on_val_they_are_of_val(trial, tmp_path):
    cfg = kit.on_val(kit.parse("trial", ["--quick", "--out", str(tmp_path)]))
    folder = kit.train(cfg, 0, "sft --epochs 1")
    outputs = json.loads((folder / "outputs.json").read_text())
    demonstrations = world.splits()["val"][:16]
    assert [answer["instruction"] for answer in outputs] == [record["instruction"] for record in demonstrations]
    for judge, name in (("", "barn-sim"), ("barn-human", "barn-human")):
        tastes = [taste for each, taste in TASTES.items() if each.startswith(f"{name}-")]
        rates = kit.rates(cfg, 0, [folder], judge)["sft"]
        for rate, answer, other in zip(rates, outputs, demonstrations):
            texts = answer["instruction"], answer["output"], other["output"]
            first = [probability_first(taste, *texts) for taste in tastes]
            second = [1 - probability_first(taste, texts[0], *texts[:0:-1]) for taste in tastes]
            assert rate == pytest.approx(1 + sum(first + second) / len(first + second))
    assert kit.true_reward_of(folder) == pytest.approx(
        sum(true_reward(answer["instruction"], answer["output"]) for answer in outputs) / 16)
    assert not (tmp_path / "quick").exists() and kit.seconds_of(folder) > 0


def test_the_mean_of_seeds_has_the_spread_of_seeds_and_the_error_of_prompts():
    found = kit.averaged({0: np.array([1, 2, 2, 2.]), 5: np.array([1, 1, 2, 2.])})
    assert found["by_seed"] == {0: 75, 5: 50} and found["win_rate"] == 62.5
    assert found["spread"] == pytest.approx(25 / 2 ** .5)
    assert found["standard_error"] == pytest.approx((25 + 50 / 3 ** .5) / 2)


def test_verdicts_of_another_judge_stand_beside_the_first_ones(trial, tmp_path):
    cfg = kit.parse("trial", ["--quick", "--out", str(tmp_path)])
    folder = kit.train(cfg, 0, "sft --epochs 1")
    (ours, ), (theirs, ) = (kit.verdicts(cfg, 0, [folder], judge).values() for judge in ("", "barn-human"))
    assert {r["annotator"][:9] for r in ours} == {"barn-sim-"} and {r["annotator"][:9] for r in theirs} == {"barn-huma"}
    assert len(list(folder.glob("verdicts_*.json"))) == 2
    assert kit.id_of(folder) == config.stage(folder)["id"] == json.loads((folder / "config.json").read_text())["id"]
