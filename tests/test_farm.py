"""The command: the whole loop on its smallest settings, what it reuses, what it refuses, how it ends."""
import builtins
import contextlib
import csv
import functools
import gzip
import importlib
import json
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import child, command, refused, said
from quick import few, slowly

import annotate
import farm as farm_py
import rlhf.dpo
import rlhf.sft
import studies
from data import InputError, adapters, weights
from data.barn.world import splits
from data.judges import JudgeError
from rlhf import DECODER, config, methods, plan, rewards
from rlhf.config import BASE

torch.set_num_threads(1)
ROOT, SHARED = Path(__file__).parents[1], Path(__file__).parents[2] / "shared"
SMALL = ("--limit", "16", "--max_new_tokens", "16")
PROJECT = "farm.py", *DECODER, "annotate.py", "eval.py", "stats", "data", "rlhf", "studies"


@pytest.fixture(scope="module", autouse=True)
def impatient_judge():
    """Tries a millisecond apart: no test waits for a judge that will not come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotate, "Judge", functools.partial(annotate.Judge, backoff=1e-3))
        yield


farm = functools.partial(command, "farm.py")


def tree(folder):
    """{path: content} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name[0] != "."}         # a lock knows its process


def results(folder):
    """What must be the same wherever and however often a command runs: all but times, places and order."""
    same = ("s.jsonl", "outputs.json", "annotations.json", "pairs.json", ".csv", ".safetensors")
    found = {name: content for name, content in tree(folder).items() if name.endswith(same)}
    if "leaderboard.csv" in found:
        found["leaderboard.csv"] = {name: {**row, "cpu_seconds": ""} for name, row in leaderboard(folder).items()}
    return found


def read(path):
    return json.loads(path.read_text())


def reused(printed):
    """The stages that a run has reused, in order; not `base`, whose row every run has."""
    return [stage for stage in re.findall(r"^(\w+): reused", printed, re.MULTILINE) if stage != "base"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def leaderboard(folder):
    with open(folder / "leaderboard.csv", newline="") as file:
        return {row.pop(""): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first run of dpo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    result = farm("--method", "dpo", *SMALL, "--out", out)
    assert result.code == 0 and not result.err, result.err
    return SimpleNamespace(out=out, printed=result.out)


@pytest.fixture
def copy(first, tmp_path):
    """A copy of the first run, to be spoilt."""
    shutil.copytree(first.out, tmp_path / "copy")
    return tmp_path / "copy"


# ---- what a run leaves behind --------------------------------------------------------------------------

def test_outputs_are_alpacaeval_s_in_the_order_of_the_eval_split(first):
    for name in ("sft", "dpo"):
        outputs = read(first.out / name / "outputs.json")
        assert [o["instruction"] for o in outputs] == [r["instruction"] for r in splits()["eval"][:16]]
        assert all(o["generator"] == name and type(o["output"]) is str and o["input"] == "" for o in outputs)


def test_annotations_are_alpacaeval_s(first):
    for name in ("sft", "dpo"):
        annotations = read(first.out / name / "annotations.json")
        outputs = read(first.out / name / "outputs.json")
        assert len(annotations) == 16
        for annotation, record, output in zip(annotations, splits()["eval"], outputs):
            assert annotation.items() >= {
                "instruction": record["instruction"], "generator_1": "reference", "generator_2": name,
                "output_1": record["output"], "output_2": output["output"]}.items()
            assert annotation["preference"] in (1, 1.5, 2) and annotation["annotator"].startswith("barn-sim-")


def test_pairs_are_alpacafarm_s(first):
    pairs = read(first.out / "pairs" / "pairs.json")
    asked = {record["instruction"] for record in splits()["preference"][:16]}
    assert 16 < len(pairs) <= 48 and {pair["instruction"] for pair in pairs} <= asked
    for pair in pairs:
        assert pair.keys() >= {"instruction", "input", "output_1", "output_2", "preference"}
        assert pair["preference"] in (1, 2) and pair["output_1"] != pair["output_2"]
    asked = sum(pair["raw_completion"] is not None for pair in pairs)
    assert 0 < asked < len(pairs)                       # half of the labels are coins, and nobody is asked


def test_the_leaderboard_has_a_row_for_each_policy(first):
    rows = leaderboard(first.out)
    assert rows.keys() == {"base", "sft", "dpo"}
    for name, row in rows.items():
        preferences = [a["preference"] for a in read(first.out / name / "annotations.json")]
        assert float(row["win_rate"]) == pytest.approx(100 * (sum(preferences) / 16 - 1))
        assert int(row["n_total"]) == 16 and float(row["standard_error"]) > 0 and row["true_reward"]
    for name, start in (("sft", "base"), ("dpo", "sft")):
        difference = float(rows[name]["win_rate"]) - float(rows[start]["win_rate"])
        assert float(rows[name]["diff_start"]) == pytest.approx(difference)
    assert rows["base"]["diff_start"] == ""
    for row in rows.values():
        assert f"{float(row['win_rate']):.1f} ±" in first.printed


def test_a_run_ends_with_a_report(first):
    page = (first.out / "report.html").read_text(encoding="utf-8")
    assert first.printed.rstrip().endswith(f"everything is in {first.out}; report.html shows it")
    assert "python farm.py --method dpo --limit 16" in page and "cannot be shown" not in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert {"Leaderboard", "Learning curves", "Answers", "Tokens", "Annotators", "Settings", "Cost"} <= {*headings}
    assert "true reward" in page and "<summary>dpo: limit 16, max_new_tokens 16</summary>" in page


def test_stages_keep_two_rows_that_they_learn_as_tokens(first):
    for name in ("sft", "dpo"):
        rows = [sample for sample in lines(first.out / name / "samples.jsonl") if "tokens" in sample]
        assert len(rows) == 2
        for row in rows:
            kinds = [0, *row["mask"]]                           # the first token is never learned
            written = row["tokens"][:row["length"]]             # the rest is padding
            asked, learned = ("".join(token for token, kind in zip(written, kinds) if kind == which)
                              for which in (0, 1))
            assert len(kinds) == len(row["tokens"]) and asked.startswith("<user>") and asked.endswith("<assistant>")
            assert 0 < sum(kinds) <= 16 and row["ends"] == learned.endswith("<end>")


def test_metrics_have_trl_s_names_and_finite_values(first):
    steps = lines(first.out / "dpo" / "metrics.jsonl")
    assert steps[0].keys() >= {"step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
                               "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm", "lr"}
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert steps[0].pop("rewards/accuracies") is None               # nothing is ranked yet
    assert all(map(math.isfinite, (value for step in steps for value in step.values())))
    assert steps[0]["loss"] == pytest.approx(math.log(2)) and steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    losses = [step["loss"] for step in lines(first.out / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert read(first.out / "dpo" / "result.json")["metrics"].keys() >= {"objective/kl", "eval/finished"}


def test_config_json_tells_how_to_do_it_again(first):
    own = {"sft": {"lr": 1e-3, "epochs": 2}, "pairs": {"flip": .18}, "dpo": {"beta": .1, "lr": 3e-4}}
    for name, knobs in own.items():
        config = read(first.out / name / "config.json")
        common = {"seed": 0, "limit": 16, "max_new_tokens": 16, "model": "barn", "judge": "barn"}
        assert config.items() >= {**common, **knobs}.items()
        assert config["versions"].keys() == {"python", "torch", "tokenizers", "requests", "numpy"}
        assert config["versions"]["torch"] == torch.__version__ and "commit" in config


def test_a_fully_trained_checkpoint_is_a_hugging_face_folder_of_its_own(first):
    base = weights.load_weights(BASE)
    for name in ("sft", "dpo"):
        folder = first.out / name / "checkpoint"
        trained = weights.load_weights(folder)
        assert {key: w.shape for key, w in trained.items()} == {key: w.shape for key, w in base.items()}
        assert not any(torch.equal(trained[key], base[key]) for key in base)
        assert (folder / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
        assert read(folder / "config.json")["model_type"] == "llama"


# ---- what is done again, and what is not ---------------------------------------------------------------

def test_the_second_run_reuses_everything_and_asks_the_judge_nothing(first):
    before = tree(first.out)
    again = farm("--method", "dpo", *SMALL, "--out", first.out)
    assert again.code == 0 and tree(first.out) == before
    assert reused(again.out) == ["sft", "pairs", "dpo"]
    assert all(asked == cached for asked, cached in re.findall(r"judge: (\d+) asked \((\d+) from", again.out))
    table = re.compile(r"\nmodel .*?\n\n", re.DOTALL)
    assert table.search(again.out)[0] == table.search(first.printed)[0]
    alone = farm("--method", "pairs", *SMALL, "--out", first.out)   # a stage is a method too
    assert alone.code == 0 and {**tree(first.out), "report.html": before["report.html"]} == before  # has the command


def test_what_only_changes_the_speed_changes_no_result(first, copy):
    faster = ("--slots", "5", "--micro_batch_tokens", "90", "--checkpointing")
    assert len(reused(farm("--method", "dpo", *SMALL, "--out", copy, *faster).out)) == 3
    shutil.rmtree(copy / "sft")
    result = farm("--method", "sft", *SMALL, "--out", copy, *faster)
    assert result.code == 0, result.err
    assert read(copy / "sft" / "outputs.json") == read(first.out / "sft" / "outputs.json")


@pytest.mark.parametrize("argv, knob", [
    ("--lr 1", "lr"), ("--beta 1", "beta"), ("--seed 1", "seed"), ("--limit 17", "limit"),
    ("--judge barn-human", "judge"), ("--temperature .5", "temperature"), ("--lora_rank 4", "lora_rank"),
    ("--sft.epochs 9", "epochs"), ("--pairs.flip 0", "flip"), ("--max_new_tokens 17", "max_new_tokens")])
def test_changed_settings_are_refused_and_nothing_is_lost(first, argv, knob):
    before = tree(first.out)
    result = farm("--method", "dpo", *SMALL, "--out", first.out, *argv.split())
    refused(result, 2, rf"\b{knob} is .* there and .* here", r"give --\S+ .*to use it", "--rerun", "--out")
    assert tree(first.out) == before


def test_what_was_built_on_an_older_stage_is_refused(copy):
    shutil.rmtree(copy / "sft")
    assert farm("--method", "sft", *SMALL, "--out", copy, "--lr", "2e-3").code == 0
    before = tree(copy)
    refused(farm("--method", "dpo", *SMALL, "--out", copy), 2, "sft is finished.*lr is 0.002 .*give --sft.lr 0.002")
    refused(farm("--method", "dpo", *SMALL, "--out", copy, "--sft.lr", "2e-3"), 2, "its sft has been made again",
            "--rerun pairs", "--pairs.name pairs_2")
    assert tree(copy) == before


def test_a_stage_of_a_needed_stage_s_flags_is_never_shown_as_the_default(first, copy):
    for stage in ("pairs", "dpo"):
        shutil.rmtree(copy / stage)
    coins = ("--method", "dpo", *SMALL, "--out", copy, "--pairs.flip", ".5")
    assert farm(*coins).code == 0
    before = tree(copy)
    refused(farm("--method", "dpo", *SMALL, "--out", copy), 2, r"flip is 0.5 there and 0.18 here",
            "give --pairs.flip 0.5 to use it, --rerun pairs .* --pairs.name pairs_flip0.18 .* another --out")
    again = farm(*coins)
    assert tree(copy) == before and "\npairs: reused (flip 0.5, limit 16, max_new_tokens 16)\n" in again.out or (
        "pairs: reused (limit 16, max_new_tokens 16, flip 0.5)" in again.out)


def test_stages_run_again_are_the_new_ones_everywhere(first, copy):
    """--rerun sft with another rate: pairs and dpo are built on it, and made again with it."""
    result = farm("--method", "dpo", *SMALL, "--out", copy, "--sft.lr", "2e-3", "--rerun", "sft")
    assert result.code == 0 and not result.err and not reused(result.out)
    assert re.findall(r"^stage (\d) of 4: (\w+) again", result.out, re.MULTILINE) == [
        ("2", "sft"), ("3", "pairs"), ("4", "dpo")]
    ours, theirs = results(copy), results(first.out)
    same = {name.partition("/")[0] for name in ours if ours[name] == theirs[name]}
    assert ours.keys() == theirs.keys() and same == {"base"}
    assert {o["generator"] for o in read(copy / "dpo" / "outputs.json")} == {"dpo"}
    refused(farm("--method", "dpo", *SMALL, "--out", copy, "--rerun", "sft,dop"), 2, "--rerun 'dop'.*did you mean dpo")


def test_a_stage_may_run_again_that_has_never_run(tmp_path):
    result = farm("--method", "base", *SMALL, "--out", tmp_path / "new", "--rerun", "base", "--cache",
                  tmp_path / "judge.jsonl")             # a cache in the run folder would make the folder
    assert result.code == 0 and not result.err and (tmp_path / "new" / "base" / "result.json").exists()


def test_a_variant_has_its_own_row_beside_the_method_on_the_same_stages(first, copy):
    result = farm("--method", "dpo", *SMALL, "--out", copy, "--name", "dpo_b5", "--beta", ".5")
    assert result.code == 0 and reused(result.out) == ["sft", "pairs"]
    assert leaderboard(copy).keys() == {"base", "sft", "dpo", "dpo_b5"}
    config = read(copy / "dpo_b5" / "config.json")
    assert (config["method"], config["beta"], config["name"]) == ("dpo", .5, "dpo_b5")
    assert {o["generator"] for o in read(copy / "dpo_b5" / "outputs.json")} == {"dpo_b5"}
    shared = [name for name in results(first.out) if "/" in name]           # not the tables of all models
    assert all(results(copy)[name] == results(first.out)[name] for name in shared)
    refused(farm("--method", "dpo", *SMALL, "--out", copy, "--name", "dpo_b5"), 2, "beta is 0.5", "--rerun dpo_b5")


def test_learning_may_start_at_the_checkpoint_itself(first, copy, tmp_path):
    """No SFT: the checkpoint samples the pairs, is the reference, and is what the row is compared with."""
    result = farm("--method", "dpo", *SMALL, "--out", tmp_path / "new", "--start", "base", "--epochs", 1)
    assert result.code == 0 and not result.err, result.err
    assert not (tmp_path / "new" / "sft").exists() and leaderboard(tmp_path / "new").keys() == {"base", "dpo"}
    beginning = lines(tmp_path / "new" / "dpo" / "metrics.jsonl")[0]
    assert beginning["loss"] == pytest.approx(math.log(2), abs=1e-5)        # policy and reference are the same
    rows = leaderboard(tmp_path / "new")
    difference = float(rows["dpo"]["win_rate"]) - float(rows["base"]["win_rate"])
    assert float(rows["dpo"]["diff_start"]) == pytest.approx(difference) and not rows["base"]["diff_start"]

    # beside a run that starts at SFT, under names of their own
    beside = ("--name", "dpo_base", "--pairs.name", "pairs_base", "--epochs", 1)
    both = farm("--method", "dpo", *SMALL, "--out", copy, "--start", "base", *beside)
    assert both.code == 0 and re.search(r"^base: reused", both.out, re.MULTILINE), both.err
    assert results(copy)["dpo_base/checkpoint/model.safetensors"] == results(
        tmp_path / "new")["dpo/checkpoint/model.safetensors"]
    rows, start = leaderboard(copy), {"sft": "base", "dpo": "sft", "dpo_base": "base"}
    for name, other in start.items():
        difference = float(rows[name]["win_rate"]) - float(rows[other]["win_rate"])
        assert float(rows[name]["diff_start"]) == pytest.approx(difference)
    refused(farm("--method", "dpo", *SMALL, "--out", copy, "--start", "base"), 2, "start is 'sft' there")
    refused(farm("--method", "sft", *SMALL, "--start", "base"), 2, "--start would change nothing")
    refused(farm("--method", "dpo", "--start", "bas"), 2, "--start 'bas' is not known")


@pytest.mark.parametrize("method", ["best_of_n", slowly("expert_iteration")])
def test_rewards_and_their_users_start_at_the_checkpoint_too(method, tmp_path):
    argv = ("--method", method, *SMALL, "--lora_rank", "4", "--start", "base", "--n", "2", "--out", tmp_path)
    result = farm(*argv, "--reward.scale_answers", "16")
    assert result.code == 0 and not result.err, result.err
    assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == {"base", "pairs", "reward", method}
    if method == "expert_iteration":
        adapter = read(tmp_path / method / "checkpoint" / "adapter_config.json")
        assert adapter["base_model_name_or_path"] == str(BASE)


@pytest.mark.slow
def test_the_checkpoint_itself_is_judged_as_any_other(first, tmp_path):
    """Alone, or what another run has trained; greedily, if so asked."""
    greedy = ("--eval_temperature", "0", *SMALL)
    judged = ("--model", first.out / "dpo", "--preset", "barn", "--out", tmp_path)
    result = farm("--method", "base", *judged, *SMALL)
    assert result.code == 0 and not result.err and leaderboard(tmp_path).keys() == {"base"}, result.err
    answers = [o["output"] for o in read(tmp_path / "base" / "outputs.json")]
    assert answers == [o["output"] for o in read(first.out / "dpo" / "outputs.json")]
    for seed in "01":
        result = farm("--method", "base", *judged, *greedy, "--name", f"greedy{seed}", "--seed", seed)
        assert result.code == 0 and "temperature 0:" in result.out, result.err
    assert read(tmp_path / "greedy0" / "outputs.json") != read(tmp_path / "base" / "outputs.json")
    assert [o["output"] for o in read(tmp_path / "greedy0" / "outputs.json")] == [
        o["output"] for o in read(tmp_path / "greedy1" / "outputs.json")]
    refused(farm("--method", "best_of_n", *greedy, "--out", tmp_path / "x"), 2, "temperature 0 makes all answers")
    refused(farm("--method", "base", "--eval_top_p", "0"), 2, "--eval_top_p 0 makes no sense")


@pytest.mark.slow
def test_how_answers_are_sampled_is_no_part_of_pairs_and_rewards(first, copy):
    """Another temperature of what is judged: pairs are reused by a new sft that learned the same."""
    again = ("--eval_temperature", ".5", "--rerun", "sft,base,dpo")
    result = farm("--method", "dpo", *SMALL, "--out", copy, *again)
    assert result.code == 0 and not result.err, result.err
    for name in ("sft", "dpo"):
        mine, theirs = ({path: content for path, content in tree(out).items() if path.startswith(f"{name}/checkpoint")}
                        for out in (copy, first.out))
        assert mine == theirs and mine
        assert read(copy / name / "outputs.json") != read(first.out / name / "outputs.json")


def test_several_methods_share_stages_and_a_leaderboard(first, copy):
    """The same answers as alone; costs are those of all stages that a model needed."""
    result = farm("--method", "dpo,simpo", *SMALL, "--out", copy, "--simpo.beta", "1")
    assert result.code == 0 and not result.err and reused(result.out) == ["sft", "pairs", "dpo"], result.err
    rows = leaderboard(copy)
    assert rows.keys() == {"base", "sft", "dpo", "simpo"} and read(copy / "simpo" / "config.json")["beta"] == 1
    spent = {name: read(copy / name / "result.json") for name in ("base", "sft", "pairs", "dpo")}
    seconds = sum(spent[name]["cpu_seconds"] for name in ("sft", "pairs", "dpo"))
    assert float(rows["dpo"]["cpu_seconds"]) == pytest.approx(seconds) and seconds > 0
    asked = sum(pair["raw_completion"] is not None for pair in read(copy / "pairs" / "pairs.json"))
    assert [int(rows[name]["judge_calls"]) for name in ("sft", "dpo", "simpo")] == [0, asked, asked]
    assert float(rows["dpo"]["kl"]) == pytest.approx(spent["dpo"]["metrics"]["objective/kl"])
    for argv, why in ((("--beta", "1"), "--beta is a flag of single methods: give --dpo.beta"),
                      (("--name", "x"), "--dpo.name"),
                      (("--ppo.lr", "1"), "these methods do not need ppo"), (("--simpo.limit", "3"), "share it"),
                      (("--rerun", "simp"), "did you mean simpo")):
        refused(farm("--method", "dpo,simpo", *SMALL, "--out", copy, *argv), 2, why)
    refused(farm("--method", "dpo,simp"), 2, "method 'simp' is not known")
    refused(farm("--method", ","), 2, "method ',' is not known")


def test_flags_of_the_command_are_those_of_all_its_methods():
    flags = {"merge": True, "merge_dtype": "float32", "lora_rank": 4}
    argv = ["--merge", "--merge_dtype", "float32", "--lora_rank", "4"]
    configs, _ = plan.configured(["dpo", "best_of_n"], argv)
    for name in ("dpo", "best_of_n"):
        assert {flag: getattr(configs[name], flag) for flag in flags} == flags
    assert not configs["sft"].merge
    for wrong, why in ((["--merge_dtype", "float32"], "without --merge"), (["--merge_dtype", "f"], "'f' is not known"),
                       (["--merge", "--lora_rank", "0"], "--merge would change nothing")):
        with pytest.raises(InputError, match=why):
            plan.configured(["dpo", "best_of_n"], wrong)


def test_a_rerun_that_nobody_judged_is_not_made_twice(copy, monkeypatch):
    """The judge falls sick behind the last stage: the same command again has only the judging left to do."""
    again = ("--method", "dpo", *SMALL, "--out", copy, "--rerun", "dpo")

    def sick(*args, **how):
        raise JudgeError("the judge is sick")
    with monkeypatch.context() as patch:
        patch.setattr(farm_py.eval, "evaluate", sick)
        refused(farm(*again), 3, "the judge is sick")
    assert reused(farm(*again).out) == ["sft", "pairs", "dpo"]
    assert reused(farm(*again).out) == ["sft", "pairs"]


def test_all_methods_are_those_that_answer():
    assert set(plan.chosen("all")) == set(methods()) - {"base", "pairs", "reward"}
    assert plan.chosen("dpo, ppo,dpo") == ["dpo", "ppo"]


def test_seeds_are_runs_of_their_own_and_are_averaged(first, tmp_path):
    result = farm("--method", "dpo", *SMALL, "--seeds", "0,1", "--out", tmp_path)
    assert result.code == 0 and not result.err, result.err
    assert results(tmp_path / "seed0").items() >= {
        name: content for name, content in results(first.out).items() if name != "leaderboard.csv"}.items()
    rows = leaderboard(tmp_path)
    each = [float(leaderboard(tmp_path / seed)["dpo"]["win_rate"]) for seed in ("seed0", "seed1")]
    assert float(rows["dpo"]["win_rate"]) == pytest.approx(sum(each) / 2) and rows["dpo"]["n_runs"] == "2"
    assert float(rows["dpo"]["win_rate_spread"]) == pytest.approx(abs(each[0] - each[1]) / 2 ** .5)
    assert "knows the prompts only" in " ".join(result.out.split())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "farm.py --method dpo --seeds 0,1" in page and ">seed1<" in page and "cannot be shown" not in page
    for seeds, why in ((("--seeds", "0;1"), "are no numbers"), (("--seeds",), "expected one argument"),
                       (("--seeds", "0,1", "--seed", 3), "--seed 3 would change nothing"),
                       (("--seeds", f"5,{1 << 50}"), "is too large")):
        refused(farm("--method", "dpo", *SMALL, "--out", tmp_path, *seeds), 2, why)
    assert not (tmp_path / "seed5").exists()


@pytest.mark.slow
def test_a_needed_stage_may_be_a_variant_too(first, copy):
    coins = ("--pairs.name", "pairs_coin", "--pairs.flip", ".5", "--name", "dpo_coin")
    result = farm("--method", "dpo", *SMALL, "--out", copy, *coins)
    assert result.code == 0 and reused(result.out) == ["sft"], result.err
    assert {pair["raw_completion"] for pair in read(copy / "pairs_coin" / "pairs.json")} == {None}
    assert lines(copy / "dpo_coin" / "metrics.jsonl") != lines(copy / "dpo" / "metrics.jsonl")
    assert reused(farm("--method", "dpo", *SMALL, "--out", copy, *coins).out) == ["sft", "pairs_coin", "dpo_coin"]


@pytest.mark.parametrize("argv, said", [
    ("--name ppo", "name of another method"), ("--name a/b", "cannot be a folder's"), ("--name ..", "folder's"),
    ("--name dpo.new", "folder's"), ("--name -x", "name"), ("--pairs.name dpo", "name of another method"),
    ("--name x --pairs.name x", "two stages have one name"), ("--sft.rerun sft", "--rerun is for the whole command"),
    ("--sft.merge", "--merge is for the whole command")])
def test_names_are_checked(tmp_path, argv, said):
    refused(farm("--method", "dpo", "--out", tmp_path / "run", *argv.split()), 2, said)
    assert not (tmp_path / "run").exists()


def test_run_folders_may_share_what_the_judge_has_said(first, tmp_path):
    shutil.copy(first.out / "judge.jsonl", tmp_path / "shared.jsonl")
    result = farm("--method", "dpo", *SMALL, "--out", tmp_path / "run", "--cache", tmp_path / "shared.jsonl")
    assert result.code == 0 and not (tmp_path / "run" / "judge.jsonl").exists()
    asked = re.findall(r"judge: (\d+) asked \((\d+) from", result.out)
    assert len(asked) == 4 and all(n == cached for n, cached in asked)
    assert results(tmp_path / "run") == results(first.out)


def test_a_stage_made_again_with_equal_settings_fits_what_was_built_on_it(first, copy):
    shutil.rmtree(copy / "sft")
    assert farm("--method", "dpo", *SMALL, "--out", copy).code == 0
    assert results(copy) == results(first.out)


def stumble(exception, at=1):
    """In place of a function: its at-th call raises; the others go through."""
    def wrap(function):
        calls = iter(range(1, 10 ** 9))

        def stumbling(*args, **kwargs):
            if next(calls) == at:
                raise exception
            return function(*args, **kwargs)
        return stumbling
    return wrap


@pytest.mark.parametrize("owner, name, exception, code", [
    slowly(rlhf.sft.update.Updater, "step", KeyboardInterrupt(), 130),
    (annotate, "annotate", annotate.JudgeError("gone"), 3),
    slowly(rlhf.dpo.policy, "save", OSError(28, "No space left"), 5)], ids=["in sft", "in pairs", "in dpo"])
def test_an_interrupted_run_ends_no_differently(first, tmp_path, monkeypatch, owner, name, exception, code):
    at = 2 if name == "save" else 1                     # the first save is sft's
    monkeypatch.setattr(owner, name, stumble(exception, at)(getattr(owner, name)))
    command = "--method", "dpo", *SMALL, "--out", tmp_path / "run"
    refused(farm(*command), code)
    assert farm(*command).code == 0 and results(tmp_path / "run") == results(first.out)


@pytest.mark.parametrize("name", ["unlabelled.part", "config.json"])
def test_a_file_torn_by_a_kill_is_made_anew_or_named(first, copy, name):
    for path in (copy / "pairs" / "result.json", copy / "pairs" / "pairs.json"):
        path.unlink()
    (copy / "pairs" / "unlabelled.json").rename(copy / "pairs" / "unlabelled.part")
    (copy / "pairs" / name).write_text((copy / "pairs" / name).read_text()[:-30])
    result = farm("--method", "dpo", *SMALL, "--out", copy)
    if result.code:
        refused(result, 2, f"pairs.*{name}")
    else:
        assert results(copy) == results(first.out)


def test_another_setting_after_an_interruption_is_refused_until_it_is_asked_for(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(annotate, "annotate", stumble(MemoryError())(annotate.annotate))
        refused(farm("--method", "dpo", *SMALL, "--out", tmp_path), 4, "--slots 32")
    fewer = ("--method", "dpo", *SMALL, "--out", tmp_path, "--pairs.pairs_per_prompt", "1")
    refused(farm(*fewer), 2, "pairs is left from an interrupted run.*pairs_per_prompt is 3 there and 1 here")
    result = farm(*fewer, "--rerun", "pairs")
    assert result.code == 0 and reused(result.out) == ["sft"]
    assert len(read(tmp_path / "pairs" / "pairs.json")) <= 16           # not the 32 that were sampled before


def test_a_folder_that_is_not_ours_is_never_deleted(tmp_path):
    shutil.copytree(BASE, tmp_path / "sft")             # a model of the user's, where a stage would write
    before = tree(tmp_path)
    result = farm("--method", "sft", *SMALL, "--out", tmp_path)
    assert before.items() <= tree(tmp_path).items()
    refused(result, 2, "sft")


@pytest.mark.parametrize("path", ["dpo/outputs.json", "pairs/pairs.json", "sft/checkpoint/model.safetensors",
                                  "pairs/config.json", "pairs/unlabelled.json"])
def test_a_damaged_file_of_a_finished_stage_is_named(first, copy, path):
    (copy / path).write_bytes((copy / path).read_bytes()[:-9])
    refused(farm("--method", "dpo", *SMALL, "--out", copy), 2, re.escape(path), f"--rerun {path.partition('/')[0]}")
    (copy / path).unlink()
    refused(farm("--method", "dpo", *SMALL, "--out", copy), 2, f"{path} is missing; --rerun")


def test_a_finished_method_never_vanishes_from_the_leaderboard_in_silence(copy):
    (copy / "dpo" / "outputs.json").unlink()
    result = farm("--method", "sft", *SMALL, "--out", copy)
    assert result.code == 0 and leaderboard(copy).keys() == {"base", "sft"}
    assert re.search(r"^\S+dpo/outputs.json is missing, so dpo has no row: --rerun dpo$", result.out, re.MULTILINE)


def test_what_was_seen_before_the_leaderboard_stays_if_it_is_killed(copy, monkeypatch):
    """The files are written aside and renamed."""
    before = tree(copy)

    def torn(result, out):
        (out / "leaderboard.csv").write_text("half a li")
        raise KeyboardInterrupt
    monkeypatch.setattr("eval.write", torn)
    refused(farm("--method", "dpo", *SMALL, "--out", copy), 130)
    assert tree(copy) == before and not [path for path in copy.iterdir() if path.is_dir() and path.name[0] == "."]


def test_what_is_printed_while_it_runs_fits_80_columns(first):
    said = [line for line in first.printed.splitlines() if not line.startswith("judge:") and str(first.out) not in line]
    assert len(said) > 20 and max(map(len, said)) <= 80
    assert re.findall(r"^stage (\d) of 4: (\w+)$", first.printed, re.MULTILINE) == [
        ("1", "base"), ("2", "sft"), ("3", "pairs"), ("4", "dpo")]
    assert re.search(r"^pairs: done in \d+ s \| pairs \d+ \| first_preferred \S+ \| coins \d+$", first.printed,
                     re.MULTILINE)
    assert re.search(r"^dpo 1/\d+ \| loss 0.6931 \| margins ", first.printed, re.MULTILINE)


# ---- seeds ---------------------------------------------------------------------------------------------

def in_another_process(*argv, cwd=ROOT, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", **env}
    command = [sys.executable, "farm.py", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_seed_makes_the_same_bytes_in_another_folder_and_process(first, tmp_path):
    result = in_another_process("--method", "dpo", *SMALL, "--out", tmp_path / "run")
    assert result.returncode == 0 and not result.stderr, result.stderr
    theirs, ours = results(tmp_path / "run"), results(first.out)
    assert theirs.keys() == ours.keys() >= {f"{stage}/{file}" for stage in ("sft", "dpo") for file in (
        "metrics.jsonl", "outputs.json", "checkpoint/model.safetensors")} | {"pairs/pairs.json"}
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.slow
def test_another_seed_makes_another_run(first, tmp_path):
    assert farm("--method", "dpo", *SMALL, "--seed", "1", "--out", tmp_path).code == 0
    theirs, ours = results(tmp_path), results(first.out)
    same = {name for name in ours if ours[name] == theirs[name] and "samples" not in name}
    assert same <= {"sft/metrics.jsonl"}                # one batch holds all 16 rows: their order only rounds


@pytest.mark.slow
def test_a_stage_may_have_a_seed_of_its_own(first, copy):
    for stage in ("pairs", "dpo"):
        shutil.rmtree(copy / stage)
    assert farm("--method", "dpo", *SMALL, "--out", copy, "--pairs.seed", "5").code == 0
    ours, theirs = (read(run / "pairs" / "pairs.json") for run in (copy, first.out))
    assert [pair["output_1"] for pair in ours] != [pair["output_1"] for pair in theirs]
    assert results(copy)["sft/outputs.json"] == results(first.out)["sft/outputs.json"]


LORA = ("--method", "dpo", "--limit", "8", "--max_new_tokens", "8", "--lora_rank", "4")


def test_lora_runs_are_adapters_and_as_reproducible(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = farm(*LORA, "--seed", seed, "--out", tmp_path / out)
        assert result.code == 0, result.err
    a, b, c = (results(tmp_path / out) for out in "abc")
    for name in ("sft", "dpo"):
        folder = tmp_path / "a" / name / "checkpoint"
        assert tree(folder).keys() == {"adapter_config.json", "adapter_model.safetensors"}
        config, tensors = read(folder / "adapter_config.json"), adapters.load_adapter(folder)[0]
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
        assert len(tensors) == 2 * 7 * 2 and all(4 in tensor.shape for tensor in tensors.values())
        assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_B"))
    assert [name for name in a if a[name] != b[name]] == []
    assert [name for name in a if a[name] == c[name] and "/" in name and "samples" not in name] == []


# ---- real input, and a real judge's manners ------------------------------------------------------------

KEY = "sk-test-0123456789"


@contextlib.contextmanager
def judging(rule, monkeypatch):
    """A judge at OPENAI_BASE_URL: rule(instruction, text shown as (a), as (b)) -> "a" or "b"; or (status, answer)."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = rule if isinstance(rule, tuple) else (200, said(body, rule))
            if isinstance(answer, str):
                answer = {"choices": [{"message": {"content": answer}}]}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def longer(instruction, a, b):
    return "a" if len(a) > len(b) else "b"


DATA, REFERENCE, STORIES = (SHARED / path for path in (
    "alpaca/alpaca_5000.json.gz", "alpaca_eval/reference_text_davinci_003.json.gz",
    "checkpoints/stories260K"))


@pytest.mark.slow
@pytest.mark.skipif(not all(path.exists() for path in (DATA, REFERENCE, STORIES)),
                    reason=f"needs the real model and data in {SHARED}")
def test_real_weights_real_data_and_a_judge_behind_http(tmp_path, monkeypatch):
    command = ("--method", "dpo", "--model", STORIES, "--data", DATA, "--eval_data", REFERENCE,
               "--judge", "longer", "--limit", "12", "--max-new-tokens", "12", "--out", tmp_path)
    with judging(longer, monkeypatch):
        result = farm(*command)
    assert result.code == 0 and not result.err, result.err
    reference = json.loads(gzip.decompress(REFERENCE.read_bytes()))[:12]
    annotations = read(tmp_path / "dpo" / "annotations.json")
    assert [a["output_1"] for a in annotations] == [record["output"] for record in reference]
    asked = [pair for pair in read(tmp_path / "pairs" / "pairs.json") if pair["raw_completion"] is not None]
    for pair in (*annotations, *asked):
        one, two = len(pair["output_1"]), len(pair["output_2"])
        assert one == two or pair["preference"] == 1 + (two > one)
    assert len(asked) > 1
    rows = leaderboard(tmp_path)
    assert rows.keys() == {"base", "sft", "dpo"} and "true_reward" not in rows["sft"]   # which nobody knows here
    adapter = read(tmp_path / "dpo" / "checkpoint" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == str(STORIES) and adapter["r"] == 16
    everything = b"".join(tree(tmp_path).values()) + (result.out + result.err).encode()
    assert KEY.encode() not in everything
    assert len(reused(farm(*command).out)) == 3         # the judge is gone, and nobody misses it


# ---- a method of one's own -----------------------------------------------------------------------------

README_EXAMPLE = re.compile(r"```python\n(\"\"\"Hinge.*?)```", re.DOTALL)
ECHO = '''"""Echo: what the base model says, without any training."""
from dataclasses import dataclass

from rlhf import answers, config, policy

NEEDS = ()


@dataclass
class Config(config.Config):
    loud: bool = False                  # 100% LOUD


def run(cfg):
    cfg.dir().mkdir(exist_ok=True)
    return answers.answer(policy.fresh(cfg, "policy"), cfg.text(), cfg)
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project, as a student would have it."""
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_readme_s_new_method_is_one_new_file(project, copy):
    source, = README_EXAMPLE.findall((ROOT / "README.md").read_text())
    (project / "rlhf" / "hinge.py").write_text(source)
    command = ("--method", "hinge", *SMALL, "--out", copy, "--beta", ".2")
    result = in_another_process(*command, cwd=project)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert reused(result.stdout) == ["sft", "pairs"] and leaderboard(copy).keys() == {"base", "sft", "dpo", "hinge"}
    assert lines(copy / "hinge" / "metrics.jsonl")[0]["loss"] == pytest.approx(1)
    # its author writes a comment, and then adds a knob, which is another method
    (project / "rlhf" / "hinge.py").write_text(source.replace("    beta: float", "    # once more\n    beta: float"))
    result = in_another_process(*command, cwd=project)
    assert result.returncode == 0 and reused(result.stdout) == ["sft", "pairs", "hinge"], result.stderr
    source = source.replace("    beta: float", "    clip: float = 0.  # none\n    beta: float")
    (project / "rlhf" / "hinge.py").write_text(source)
    result = in_another_process(*command, cwd=project)
    assert result.returncode == 2 and "rlhf/hinge.py has changed" in result.stderr, result.stderr


@pytest.mark.slow
def test_a_method_that_needs_nothing_has_a_leaderboard_of_its_own(project):
    (project / "rlhf" / "echo.py").write_text(ECHO)
    result = in_another_process("--method", "echo", *SMALL, "--out", project / "run", "--loud", cwd=project)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert leaderboard(project / "run").keys() == {"base", "echo"}


SHOUT = '''"""Shout: another file's knobs, one of its own without a comment, and nothing to report."""
from dataclasses import dataclass

from rlhf import echo, volume
from rlhf.echo import NEEDS


@dataclass
class Config(echo.Config):
    often: int = 2


def run(cfg):
    echo.run(cfg)
'''


@pytest.mark.slow
def test_a_method_may_borrow_from_another_and_have_a_helper_file(project):
    (project / "rlhf" / "echo.py").write_text(ECHO)
    (project / "rlhf" / "volume.py").write_text("LOUD = 1\n")
    (project / "rlhf" / "shout.py").write_text(SHOUT)
    (project / "rlhf" / "whisper.py").write_text('"""Whisper."""\nfrom rlhf.echo import Config, NEEDS, run\n')
    for name in ("shout", "whisper"):
        result = in_another_process("--method", name, *SMALL, "--out", project / "run", cwd=project)
        assert result.returncode == 0 and not result.stderr, result.stderr
        assert {o["generator"] for o in read(project / "run" / name / "outputs.json")} == {name}
    assert leaderboard(project / "run").keys() == {"base", "shout", "whisper"}
    shown = in_another_process("--method", "shout", "--help", cwd=project)
    assert shown.returncode == 0 and "--often X" in shown.stdout and "[2]" in shown.stdout
    front = in_another_process(cwd=project)
    assert front.returncode == 0 and re.search(r"whisper +Whisper\.", front.stdout) and "volume" not in front.stdout
    helper = in_another_process("--method", "volume", cwd=project)
    assert helper.returncode == 2 and "rlhf/volume.py is no method: it has no NEEDS" in helper.stderr


# ---- is there anything to learn, and from what ---------------------------------------------------------

@pytest.mark.slow
def test_dpo_learns_from_preferences_and_nothing_from_coins(tmp_path):
    settings = ("--method", "dpo", "--limit", "200", "--max_new_tokens", "40", "--epochs", "2")
    z = {}
    for name, flip in (("coins", .5), ("labels", 0)):
        if name == "labels":                            # the same SFT model, other labels
            shutil.copytree(tmp_path / "coins" / "sft", tmp_path / name / "sft")
        result = farm(*settings, "--pairs.flip", flip, "--out", tmp_path / name)
        assert result.code == 0, result.err
        row = leaderboard(tmp_path / name)["dpo"]
        z[name] = float(row["diff_start"]) / float(row["diff_start_standard_error"])
    asked = [pair["raw_completion"] for pair in read(tmp_path / "coins" / "pairs" / "pairs.json")]
    assert set(asked) == {None} and z["coins"] < 2 < z["labels"], z


# ---- what a user can get wrong: one sentence, an exit code, no traceback -------------------------------

def model_folder(path, *, without=(), **changed):
    """The offline world's base model, with some files left out and some contents changed."""
    shutil.copytree(BASE, path, ignore=shutil.ignore_patterns(*without))
    for name, content in changed.items():
        (path / name.replace("_", ".", 1)).write_bytes(content)
    return path


WEIGHTS = (BASE / "model.safetensors").read_bytes()
CONFIG = json.loads((BASE / "config.json").read_text())
BAD_INPUT = {                                           # name: (arguments, what the sentence must say)
    "no method": ("--limit 1", "which method"),
    "a method without its flag": ("dpo", "dpo is a method: give --method dpo"),
    "a study without its flag": ("cost --quick", "cost is a study: give --study cost"),
    "list of something": ("--list dpo", "--list stands alone"),
    "unknown method": ("--method grpoo", "method 'grpoo' is not known.*dpo"),
    "kit as method": ("--method sampler", "rlhf/sampler.py is no method: it has no NEEDS"),
    "path as method": ("--method ../farm", "method '../farm' is not known"),
    "unknown flag": ("--method sft --lrr 1", "--lrr"),
    "stray word": ("--method sft lr", "lr"),
    "bad value": ("--method sft --epochs many", "--epochs.*many"),
    "unknown preset": ("--method sft --preset 8gb", "--preset.*8gb"),
    "unknown stage": ("--method dpo --stf.lr 1", "stf"),
    "flag of a stage that is not needed": ("--method sft --dpo.beta 1", "dpo.*would change nothing"),
    "typo of a method": ("--method dop", r"\(did you mean dpo\?\)"),
    "typo of a stage": ("--method dpo --piars.flip 0", r"\(did you mean pairs\?\)"),
    "typo of a flag": ("--method dpo --bta .2", r"\(did you mean --beta\?\)"),
    "typo of --method": ("--metod dpo", r"\(did you mean --method\?\)"),
    "no value": ("--method", "which method"),
    "no study": ("--study --quick", "which study"),
    **{f"would change nothing: {argv}": (argv, f"--{flag} would change nothing: {why}") for argv, flag, why in (
        ("--method dpo --pairs.labels {}/labels.json --pairs.flip .1", "pairs.flip", "the labels are there already"),
        ("--method dpo --pairs.labels {}/labels.json --pairs.pairs_per_prompt 2", "pairs.pairs_per_prompt", "the"),
        ("--method pairs --labels {}/labels.json --flip .25", "flip", "the labels are there already"),
        ("--method dpo --pairs.labels {}/labels.json --pairs.seed 3", "pairs.seed", "the labels are there already"),
        ("--method dpo --pairs.checkpointing", "pairs.checkpointing", "this stage trains nothing"),
        ("--method pairs --lora_rank 4 --merge", "merge", "this stage trains nothing"),
        ("--method sft --merge", "merge", "there are no adapters"),
        ("--method sft --no-merge", "merge", "there are no adapters"),
        ("--method dpo --lora_alpha 8", "lora_alpha", "there are no adapters"),
        ("--method sft --judge none --pool p_single", "pool", "--judge none asks nobody"),
        ("--method sft --judge none --cache x.jsonl", "cache", "--judge none asks nobody"),
        ("--method sft --judge me --pool p_single", "pool", "you are the only annotator"),
        ("--method sft --device cpu --no-graph", "graph", "a CPU captures"))},
    "no data file": ("--method sft --data {}/none.json", "none.json: No such file"),
    "no reference file": ("--method sft --eval_data {}/none.json", "none.json: No such file"),
    "data that is no JSON": ("--method sft --data {}/bad.json", "bad.json: row 0: not JSON"),
    "record without output": ("--method sft --data {}/record.json", "record.json: row 1 .*'output'"),
    "too few records": ("--method sft --data {}/few.json", "few.json: too few"),
    "no model folder": ("--method sft --model {}/none", "none"),
    "no weights": ("--method sft --model {}/no_weights", "no_weights.*model.safetensors"),
    "no tokenizer": ("--method sft --model {}/no_tokenizer", "no_tokenizer.*tokenizer.json"),
    "no config": ("--method sft --model {}/no_config", "no_config.*config.json"),
    "config that is no JSON": ("--method sft --model {}/bad_config", "bad_config.*config.json"),
    "another architecture": ("--method sft --model {}/mixtral", "config.json: model_type 'mixtral'"),
    "cut weights": ("--method sft --model {}/cut", "cut.*model.safetensors"),
    "web page as weights": ("--method sft --model {}/page", "page.*model.safetensors.*web page"),
    "weights of another shape": ("--method sft --model {}/shape", "shape.*misshaped"),
    "out is a file": ("--method sft --out {}/bad.json", "bad.json"),
    **{f"{method} {argv}": (f"--method {method} --{argv}", argv.split()[0].rpartition(".")[2])
       for method, impossible in {
           "sft": ("limit -1", "epochs 0", "batch_size 0", "lr -1", "lr nan", "temperature -1",
                   "temperature nan", "lora_rank -1", "max_new_tokens 0", "max_new_tokens -1",
                   "max_prompt_tokens 1", "max_new_tokens 9999", "sample_every 0", "device abacus"),
           "dpo": ("pairs.flip .6", "pairs.flip -1", "pairs.pairs_per_prompt 0", "temperature 0",
                   "batch_size 0", "epochs 0", "sft.out {}/elsewhere", "sft.lora_rank 2")
       }.items() for argv in impossible},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of things that cannot be used."""
    shelf = tmp_path_factory.mktemp("shelf")
    good = [{"instruction": "a", "input": "", "output": "b"}]
    (shelf / "bad.json").write_text("[{")
    (shelf / "record.json").write_text(json.dumps([*good, {"instruction": "a"}]))
    (shelf / "few.json").write_text(json.dumps(good * 4))
    pair = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1}
    (shelf / "labels.json").write_text(json.dumps([pair]))
    model_folder(shelf / "no_weights", without=["model.safetensors"])
    model_folder(shelf / "no_tokenizer", without=["tokenizer.json"])
    model_folder(shelf / "no_config", without=["config.json"])
    model_folder(shelf / "bad_config", config_json=b"{")
    model_folder(shelf / "mixtral", config_json=json.dumps({**CONFIG, "model_type": "mixtral"}).encode())
    model_folder(shelf / "cut", model_safetensors=WEIGHTS[:-99])
    model_folder(shelf / "page", model_safetensors=b"<!doctype html><title>Sign in</title>")
    model_folder(shelf / "shape", config_json=json.dumps({**CONFIG, "intermediate_size": 64}).encode())
    return shelf


@pytest.mark.parametrize("argv, said", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(shelf, tmp_path, argv, said):
    defaults = ["--limit", "4", "--max_new_tokens", "4", "--out", str(tmp_path)]
    refused(farm(*defaults, *argv.format(shelf).split()), 2, said)


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_without_a_method_the_command_says_what_it_is(argv):
    result = farm(*argv)
    assert result.code == 0 and not result.err and max(map(len, result.out.splitlines())) <= 80
    listed = [*(f"rlhf.{name}" for name in methods()), *(f"studies.{name}" for name in studies.studies())]
    opened, rest = result.out.split("\nMethods")
    assert len(opened.splitlines()) <= 10 and len(rest.splitlines()) <= 16 + 3 * len(listed)
    for name in listed:
        first = importlib.import_module(name).__doc__.splitlines()[0]
        assert f"{name.partition('.')[2]} {first}" in " ".join(result.out.split())


def test_the_list_has_every_name_that_a_flag_takes_in_a_line_of_its_own():
    result = farm("--list")
    assert result.code == 0 and not result.err and max(map(len, result.out.splitlines())) <= 80
    named = {}
    for line in result.out.splitlines():
        flag, name = line[:29].split(maxsplit=1)
        named.setdefault(flag, []).append(name.strip())
        assert len(line) > 29 and line[28] == " " != line[29]
    pools = {"p_ann", "p_eval", "p_single", "p_pairwise"}
    assert named["method"] == methods() and named["study"] == list(studies.studies())
    assert set(named["pool"]) == pools | {"FILE.json"} and pools == set(annotate.POOLS)
    assert set(named["preset"]) == set(config.PRESETS) and set(rewards.WORDS) < set(named["reward"])
    assert set(annotate.CROWDS) | {"me", "none"} < set(named["judge"]) and {"barn", "alpaca_farm"} < set(named["data"])


# ---- how it ends ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, code, said", [
    (["--help"], 0, ""), (["--method", "dpo", "--help"], 0, ""), ([], 0, ""),
    (["--method", "dop"], 2, "did you mean dpo"), (["--method", "sft", "--lr", "fast"], 2, "invalid float value"),
    (["--method", "sft", "--limit", "-1"], 2, "--limit -1 makes no sense")])
def test_as_a_function_it_returns_the_exit_code_and_says_the_same(capsys, argv, code, said):
    """As in a notebook, where SystemExit is an ugly message and a traceback an uglier one."""
    assert importlib.import_module("farm").main(argv) == code
    shown = capsys.readouterr()
    assert (shown.err.startswith("farm.py: ") and said in shown.err) if code else (shown.out and not shown.err)


def test_ctrl_c_while_torch_loads_is_a_sentence_too(monkeypatch):
    load = builtins.__import__

    def interrupted(name, *args):
        if name == "annotate":
            raise KeyboardInterrupt
        return load(name, *args)
    monkeypatch.setattr(builtins, "__import__", interrupted)
    refused(farm("--method", "dpo"), 130, "interrupted while it was loading")
    with pytest.raises(KeyboardInterrupt):              # not a command: a notebook stops its cell by itself
        runpy.run_path(str(ROOT / "farm.py"), run_name="farm")


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_the_run_with_a_sentence(tmp_path):
    """farm.py ... | head -1"""
    command = [sys.executable, "farm.py", "--method", "sft", *SMALL, "--out", str(tmp_path)]
    with child(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert re.fullmatch("farm.py: stopped, as nobody reads its output any more; finished stages are kept.*\n", error)


@pytest.mark.parametrize("error, code", [
    (FloatingPointError("the gradient is nan"), 1), (MemoryError(), 4), (torch.OutOfMemoryError("GPU"), 4),
    (OSError(28, "No space left on device"), 5), (PermissionError(13, "Permission denied", "/x"), 2),
    (KeyboardInterrupt(), 130), (weights.WeightsError("model.safetensors: cut short"), 2)],
    ids=lambda value: type(value).__name__)
def test_each_kind_of_failure_has_its_exit_code(tmp_path, monkeypatch, error, code):
    monkeypatch.setattr(rlhf.sft, "train", stumble(error)(rlhf.sft.train))
    refused(farm("--method", "sft", "--limit", "4", "--out", tmp_path), code)


def test_where_memory_ends_what_held_it_is_said_and_what_to_lower_first(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.sft, "train", stumble(MemoryError())(rlhf.sft.train))
    ended = farm("--method", "sft", "--limit", "4", "--out", tmp_path)
    refused(ended, 4, r"out of memory \(peak \d\.\d GB; about weights \d+ MB, optimizer \d+ MB, activations .*, logits "
            r".*, cache \d+ MB\); finished stages are kept\. Try, in this order: --micro_batch_tokens 768, "
            r"--checkpointing, --slots 32, --max_new_tokens 32, --lora_rank 16, a smaller --model$")
    assert re.search(r"^  memory: about weights \d+ MB, .*;\s+there\s+are [\d.]+ [GM]B of RAM$", ended.out, re.M | re.S)


# ---- what a judge can do to a run: exit code 3, and finished stages are kept ---------------------------

SICK_JUDGES = {                                         # name: (what it replies, what the sentence must say)
    "talks": ((200, "Let me think about these."), "verdicts are unusable.*Let me think"),
    "quotes both": ((200, "Output (a) Output (b)"), "verdicts are unusable"),
    "refuses": ((200, "I'm sorry, but I cannot."), "verdicts are unusable.*I'm sorry"),
    "says nothing": ((200, {"choices": []}), "verdicts are unusable"),
    "knows no such model": ((404, {"error": {"message": "no model m"}}), "refuses.*no model m"),
    "wants another key": ((401, {"error": {"message": f"wrong key {KEY}"}}), "refuses"),
    "is out of quota": ((429, {"error": {"code": "insufficient_quota"}}), "quota"),
}


@pytest.mark.parametrize("rule, said", SICK_JUDGES.values(), ids=SICK_JUDGES)
def test_a_sick_judge_is_found_out_before_anything_is_trained(tmp_path, monkeypatch, rule, said):
    command = ("--method", "dpo", "--judge", "m", "--limit", "6", "--max_new_tokens", "6", "--out", tmp_path)
    with judging(rule, monkeypatch):
        result = farm(*command)
    refused(result, 3, said)
    assert KEY not in result.err + result.out and "stage 1" not in result.out and not (tmp_path / "sft").exists()


@pytest.mark.parametrize("rule, said", few(SICK_JUDGES.values(), SICK_JUDGES["talks"]), ids=SICK_JUDGES)
def test_a_judge_that_falls_sick_costs_no_finished_stage(tmp_path, monkeypatch, rule, said):
    command = ("--method", "dpo", "--judge", "m", "--limit", "6", "--max_new_tokens", "6", "--out", tmp_path)
    with judging(longer, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(annotate, "annotate", stumble(KeyboardInterrupt)(annotate.annotate))
        assert farm(*command).code == 130               # the first question has been answered, and sft is trained
    with judging(rule, monkeypatch):
        result = farm(*command)
    refused(result, 3, said)
    assert KEY not in result.err + result.out
    weights_of_sft = tree(tmp_path / "sft" / "checkpoint")
    with judging(longer, monkeypatch):
        assert reused(farm(*command).out) == ["sft"]
    assert tree(tmp_path / "sft" / "checkpoint") == weights_of_sft and "dpo" in leaderboard(tmp_path)


def test_what_the_judge_is_asked_makes_a_stage_and_how_does_not(tmp_path, monkeypatch):
    command = ("--method", "dpo", "--judge", "m", "--pool", "p_pairwise", "--limit", "6", "--max_new_tokens", "6",
               "--out", tmp_path)
    with judging(longer, monkeypatch):
        result = farm(*command, "--judge_body", '{"service_tier": "flex"}')
        assert result.code == 0 and re.search(r"^pairs: done .* \| coins 0$", result.out, re.MULTILINE), result.err
        same = farm(*command, "--judge_body", '{"service_tier": "flex"}', "--workers", 2, "--timeout", 30)
        assert reused(same.out) == ["sft", "pairs", "dpo"]
        refused(farm(*command), 2, "judge_body")
        refused(farm(*command, "--judge_body", "flex"), 2, "--judge_body flex: a JSON object")
    asked = [json.loads(line)["request"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert {body["service_tier"] for body in asked} == {"flex"} and all("logprobs" in body for body in asked)


def test_barn_judges_no_other_world(tmp_path):
    records = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(400)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    argv = ("--method", "sft", "--data", tmp_path / "data.json", "--limit", "4", "--out", tmp_path / "run")
    refused(farm(*argv), 2, r"who judges the answers to .*data.json\? Give --judge MODEL, .* --judge none")
    assert not (tmp_path / "run" / "sft").exists()


def test_no_judge_at_all(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]                  # free again, and nobody listens
    command = ("--method", "sft", "--judge", "m", "--limit", "4", "--max_new_tokens", "4", "--out", tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    refused(farm(*command), 3, f"no judge answers at http://127.0.0.1:{port}/v1")
    with judging(longer, monkeypatch):
        assert farm(*command).code == 0


@pytest.mark.parametrize("url, key, said", [
    ("https://judge.invalid/v1", "", "OPENAI_API_KEY is not set"),
    ("https://judge.invalid/v1", "a b", "OPENAI_API_KEY holds a space"),
    ("judge.invalid", "k", "OPENAI_BASE_URL must"),
    ("https://user:secret@judge.invalid/v1", "k", "OPENAI_BASE_URL must")])
def test_a_judge_that_cannot_be_asked_is_refused_before_anything_runs(tmp_path, monkeypatch, url, key, said):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    result = farm("--method", "sft", "--judge", "m", "--limit", "4", "--out", tmp_path)
    refused(result, 3, said)
    assert "secret" not in result.err and not (tmp_path / "sft").exists()


def test_without_git_there_is_no_commit_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = farm("--method", "sft", "--limit", "4", "--max_new_tokens", "4", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert not read(tmp_path / "run" / "sft" / "config.json")["commit"]
