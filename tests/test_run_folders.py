"""Run folders as eval.py reads them: means over seeds, what may be averaged, answers side by side, 80 columns."""
import csv
import functools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from commands import command, refused
from test_eval import annotations, write

from data.alpaca_eval import different_parts
from data.barn.judge import TASTES, win_probabilities
from data.barn.reward import true_reward
from data.barn.world import splits
from data.run_folders import by_method, costs_of, starts_of
from stats.seeds import mean_difference, mean_row
from stats.side_by_side import draw_instructions, side_by_side, verdict
from stats.tables import WIDTH, pair_name, shortened, table
from stats.winrate import paired_difference, win_rate

evaluation = functools.partial(command, "eval.py")
RATES = {"sft": .4, "dpo": .6, "ppo": .7}


def preferences(method, seed, n=60):
    """Of a training: the rate of its method, moved by the seed."""
    r = np.random.default_rng([seed, *map(ord, method)])
    return (1. + (r.random(n) < RATES[method] + .05 * seed)).tolist()


def stage(folder, seed=0, given=None, **settings):
    """What farm.py leaves of a stage that evaluation needs; its settings and its verdicts."""
    method = folder.name
    needs = {} if method == "sft" else {"sft": f"{folder.parent.name} sft"}
    config = {"lr": .1, "data": "mine", "slots": 0, "out": str(folder.parent), **settings, "seed": seed,
              "needs": needs, "id": f"{folder.parent.name} {method}"}
    write(folder / "config.json", json.dumps(config))
    rows = annotations(method, preferences(method, seed) if given is None else given)
    write(folder / "annotations.json", rows)
    return folder


def run_folder(folder, seed, methods=("sft", "dpo", "ppo"), **settings):
    for method in methods:
        stage(folder / method, seed, **settings)
    return folder


@pytest.fixture
def three(tmp_path):
    """Run folders that differ in the seed only."""
    return [run_folder(tmp_path / f"seed{seed}", seed) for seed in range(3)]


def rows_of(path):
    with open(path, newline="") as file:
        return {row.pop(""): row for row in csv.DictReader(file)}


def fits(text):
    too_wide = [line for line in text.splitlines() if len(line) > WIDTH]
    assert not too_wide, too_wide


# ---- what a stage needed -------------------------------------------------------------------------------

def finished(folder, method, seconds=None, asked=0, needs=None, **settings):
    """A finished stage as farm.py leaves it; of an older one the seconds are not known."""
    made = {"id": f"id of {folder.name}", "method": method, "needs": needs or {}, "seed": 0, **settings}
    spent = {} if seconds is None else {"cpu_seconds": seconds}
    write(folder / "config.json", json.dumps(made))
    write(folder / "result.json", json.dumps({"metrics": {"judge/asked": asked}, **spent}))
    return folder


@pytest.fixture
def run(tmp_path):
    finished(tmp_path / "sft", "sft", 1)
    finished(tmp_path / "pairs", "pairs", 2, 30, {"sft": "id of sft"})
    finished(tmp_path / "dpo", "dpo", 4, needs={"sft": "id of sft", "pairs": "id of pairs"})
    return tmp_path


def test_costs_are_those_of_finished_stages(run):
    """Not of one that is made again, or a variant with the same settings, and was interrupted; whatever else lies
    there."""
    whole = {"cpu_seconds": 7, "judge_calls": 30}
    assert costs_of(run / "dpo") == whole
    for name, same in (("pairs.new", "pairs"), ("sft_2", "sft")):
        write(run / name / "config.json", (run / same / "config.json").read_text())
    write(run / "broken" / "config.json", "{")
    write(run / "broken" / "result.json", "{")
    assert costs_of(run / "dpo") == whole


def test_seconds_that_are_not_known_are_not_said(run):
    finished(run / "pairs", "pairs", None, 30, {"sft": "id of sft"})
    assert costs_of(run / "dpo") == {"judge_calls": 30} and costs_of(run / "sft")["cpu_seconds"] == 1


def test_a_model_is_compared_with_the_variant_that_it_started_from(run):
    finished(run / "sft_long", "sft", 3)
    finished(run / "dpo_long", "dpo", 3, needs={"sft": "id of sft_long"})
    finished(run / "alone", "dpo", 3, start="base")
    finished(run / "base", "base", 1)
    finished(run / "another", "base", 1)                # another checkpoint: nothing was trained
    stages = {path.name: path for path in run.iterdir() if path.name != "pairs"}
    assert starts_of(stages) == {"dpo": "sft", "dpo_long": "sft_long", "alone": "base", "sft": "base",
                                 "sft_long": "base"}


# ---- means over seeds ----------------------------------------------------------------------------------

def test_methods_are_averaged_over_the_seeds(three, tmp_path):
    ended = evaluation(*three, "--out", tmp_path / "out", "--resamples", 20)
    assert ended.code == 0, ended.err
    rows = rows_of(tmp_path / "out" / "leaderboard.csv")
    assert list(rows)[:3] == ["ppo", "dpo", "sft"] and len(rows) == 3 + 9
    for method in RATES:
        single = [win_rate(preferences(method, seed)) for seed in range(3)]
        for seed in range(3):
            row = rows[f"{method} (seed{seed})"]
            assert float(row["win_rate"]) == pytest.approx(single[seed]["win_rate"])
            assert (row["run"], row["seed"], row["n_runs"]) == (f"seed{seed}", str(seed), "")
        rates = [row["win_rate"] for row in single]
        row = rows[method]
        assert float(row["win_rate"]) == pytest.approx(statistics.mean(rates))
        assert float(row["win_rate_spread"]) == pytest.approx(statistics.stdev(rates))
        assert float(row["standard_error"]) == pytest.approx(statistics.mean(s["standard_error"] for s in single))
        assert (row["n_runs"], row["n_total"], row["run"]) == ("3", "180", "")
        assert f"{statistics.mean(rates):.1f} ({statistics.stdev(rates):.1f})" in ended.out
    assert "knows the prompts only" in re.sub(r"\s+", " ", ended.out)
    fits(ended.out.rpartition("\n\n")[0])               # without the path


def test_methods_are_compared_within_a_seed_only(three, tmp_path):
    evaluation(*three, "--out", tmp_path / "out", "--resamples", 9)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["a"], row["b"]) for row in report["compared"]] == [("ppo", "dpo"), ("dpo", "sft")]
    for row in report["compared"]:
        each = [paired_difference(preferences(row["a"], seed), preferences(row["b"], seed)) for seed in range(3)]
        differences, errors = zip(*each)
        assert row["difference"] == pytest.approx(statistics.mean(differences))
        assert row["difference_spread"] == pytest.approx(statistics.stdev(differences))
        assert row["standard_error"] == pytest.approx(statistics.mean(errors))
        assert row["n_ahead"] == sum(difference > 0 for difference in differences) and row["n_runs"] == 3
    for method in ("dpo", "ppo"):                       # and with the SFT model of the same run
        differences = [paired_difference(preferences(method, seed), preferences("sft", seed))[0] for seed in range(3)]
        for seed in range(3):
            assert report["runs"][f"{method} (seed{seed})"]["diff_start"] == pytest.approx(differences[seed])
        assert report["rows"][method]["diff_start"] == pytest.approx(statistics.mean(differences))
        assert report["rows"][method]["diff_start_spread"] == pytest.approx(statistics.stdev(differences))
    assert "diff_start" not in report["rows"]["sft"]


def test_a_method_has_as_many_runs_as_there_are(three, tmp_path):
    run_folder(tmp_path / "seed3", 3, methods=("sft", "dpo"))
    evaluation(tmp_path, "--out", tmp_path / "out", "--resamples", 9, "--baseline", "sft")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: row["n_runs"] for name, row in report["rows"].items()} == {"dpo": 4, "ppo": 3, "sft": 4}
    assert {row["a"]: row["n_runs"] for row in report["compared"]} == {"dpo": 4, "ppo": 3}
    refused(evaluation(*three, "--out", tmp_path, "--baseline", "dpo (seed0)"), 2, "not among the models: ")


def test_one_run_has_no_spread_and_methods_without_a_common_seed_no_difference():
    row = {**win_rate([1, 2, 2]), "mode": "community", "avg_length": 7, "n_unusable": 1, "n_missing": 0}
    mean = mean_row([row])
    assert mean["win_rate"] == row["win_rate"] and np.isnan(mean["win_rate_spread"]) and mean["n_unusable"] == 1
    assert mean_row([{**row, "true_reward": 1.}, row]).keys() & {"true_reward", "diff_start"} == set()
    assert mean_difference({0: [1, 2]}, {1: [2, 2]}) is None
    both = mean_difference({0: [1, 2], 1: [2, 2]}, {1: [1, 2], 2: [2, 1]})
    assert (both["n_runs"], both["difference"], list(both["by_seed"])) == (1, 50, [1])


# ---- what is averaged ----------------------------------------------------------------------------------

def grouped(tmp_path, changes, method="dpo"):
    """by_method of a method in several run folders: (seed, settings of sft, settings of the method)."""
    stages = {}
    for n, (seed, of_sft, own) in enumerate(changes):
        stage(tmp_path / f"run{n}" / "sft", seed, **of_sft)
        stages[f"{method}{n}"] = stage(tmp_path / f"run{n}" / method, seed, **own)
    return by_method(stages)


def test_what_runs_may_differ_in(tmp_path):
    methods, said = grouped(tmp_path, [(0, {}, {"slots": 4, "out": "x"}), (1, {"slots": 8}, {"commit": "abc"})])
    assert (methods, said) == ({"dpo": {0: "dpo0", 1: "dpo1"}}, [])


@pytest.mark.parametrize("change, said", [
    ((1, {}, {"lr": .2}), r"run1 and run0 differ in more than the seed \(lr 0.2 instead of 0.1\)"),
    ((1, {"lr": .2}, {}), r"\(sft.lr 0.2 instead of 0.1\)"), ((1, {}, {"beta": 3}), r"\(beta 3 instead of None\)"),
    ((1, {"lr": 0}, {"lr": 0}), r"\(lr 0 instead of 0.1\)"),
    ((1, {}, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}), r"a 1 .*, b 2 .*, c 3 instead of None, 2 more\)"),
    ((1, {}, {"sources": {"dpo.py": "a1"}}), r"\(sources\)"),
    ((0, {}, {}), "run1 and run0 have the same seed, 0$")])
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, change, said):
    methods, sentences = grouped(tmp_path, [(0, {}, {}), change])
    assert methods == {} and len(sentences) == 1 and re.search(f"^not averaged: .*{said}", sentences[0]), sentences


def test_a_needed_stage_is_found_by_its_id_whatever_its_folder_is_called(tmp_path):
    stages = {}
    for n, lr in enumerate((.1, .2)):
        stages[f"dpo{n}"] = stage(tmp_path / f"run{n}" / "dpo", n)
        made = stage(tmp_path / f"run{n}" / "sft", n, lr=lr)
        made.rename(made.with_name("sft_slow"))
    assert by_method(stages) == ({}, ["not averaged: run1 and run0 differ in more than the seed (sft.lr 0.2 instead of "
                                      "0.1)"])


def test_other_settings_are_a_row_of_their_own(tmp_path):
    one, two = ({}, {}), ({}, {"lr": .2})
    methods, sentences = grouped(tmp_path, [(0, *two), (0, *one), (1, *two), (1, *one), (2, *one)])
    assert methods == {"dpo": {0: "dpo1", 1: "dpo3", 2: "dpo4"}, "dpo [2]": {0: "dpo0", 1: "dpo2"}}
    assert sentences == ["dpo [2]: run0, run2 and run1 differ in more than the seed (lr 0.2 instead of 0.1)"]


def test_runs_that_are_not_averaged_are_models_like_others(tmp_path):
    folders = [run_folder(tmp_path / f"lr{lr}", 0, lr=lr) for lr in (1, 2)]
    ended = evaluation(*folders, "--out", tmp_path / "out", "--resamples", 9)
    assert ended.code == 0 and "not averaged: lr2 and lr1 differ in more than the seed (lr 2 instead of 1" in ended.out
    rows = rows_of(tmp_path / "out" / "leaderboard.csv")
    assert rows.keys() == {f"{method} (lr{lr})" for method in RATES for lr in (1, 2)}
    assert rows["dpo (lr1)"]["diff_start"] and not rows["sft (lr2)"]["diff_start"] and "n_runs" not in rows["sft (lr1)"]


def test_files_beside_run_folders_are_models_like_others(three, tmp_path):
    write(tmp_path / "other.json", annotations("other", [2] * 60))
    ended = evaluation(*three, tmp_path / "other.json", "--out", tmp_path / "out", "--resamples", 9)
    rows = rows_of(tmp_path / "out" / "leaderboard.csv")
    assert ended.code == 0 and rows.keys() == {"other", *(f"{m} (seed{seed})" for m in RATES for seed in range(3))}


def test_paths_by_what_differs_in_them():
    def short(*paths):
        return list(different_parts(list(map(Path, paths))).values())

    assert short("/r/a/dpo/x.json", "/r/b/dpo/x.json") == ["a", "b"]
    assert short("/r/a/dpo/x.json", "/r/b/ppo/x.json") == ["a/dpo", "b/ppo"]
    assert short("/r/x.json", "/r/a/x.json") == [".", "a"] and short("/r/a.json", "/r/b.json") == ["a.json", "b.json"]
    assert short("/r/a/a/x.json", "/r/a/x.json") == ["a", "."]


# ---- the offline world ---------------------------------------------------------------------------------

def barn_stage(folder, texts, verdicts, data="barn"):
    """A stage that answered the first instructions of the offline world with these texts."""
    rows = [{"instruction": record["instruction"], "output_1": record["output"], "generator_1": "reference",
             "output_2": text, "generator_2": folder.name, "preference": verdict, "annotator": "barn-sim-01"}
            for record, text, verdict in zip(splits()["eval"], texts, verdicts)]
    stage(folder, data=data)
    write(folder / "annotations.json", rows)
    return rows


@pytest.fixture
def barn(tmp_path):
    """A run folder in which dpo wins on all instructions but the third of eight, sft on the third only."""
    barn_stage(tmp_path / "barn" / "sft", ["Meow."] * 8, [1, 1, 2] + [1] * 5)
    barn_stage(tmp_path / "barn" / "dpo", ["A cow eats grass. " * 30 + "\x1b[31m"] * 8, [2, 2, 1, 1] + [2] * 4)
    return tmp_path / "barn"


def test_the_true_reward_and_the_difference_to_sft_are_in_every_leaderboard_of_a_run_folder(barn, tmp_path):
    ended = evaluation(barn, "--out", tmp_path / "out", "--resamples", 9)
    rows = rows_of(tmp_path / "out" / "leaderboard.csv")
    expected = statistics.mean(true_reward(record["instruction"], "Meow.") for record in splits()["eval"][:8])
    assert float(rows["sft"]["true_reward"]) == expected and f"{expected:.2f}" in ended.out
    assert float(rows["dpo"]["diff_start"]) == 100 * (6 - 1) / 8 and rows["sft"]["diff_start"] == ""
    assert "+62.5 ±" in ended.out
    write(barn / "sft" / "config.json", "{}")           # no stage of a run: whose instructions these are is not known
    evaluation(barn, "--out", tmp_path / "out", "--resamples", 9)
    assert rows_of(tmp_path / "out" / "leaderboard.csv")["sft"]["true_reward"] == ""


@pytest.mark.parametrize("judge, pool, names", [("barn", "p_eval", "barn-sim-.."), ("barn", "p_single", "barn-sim-00"),
                                                ("barn-human", "p_eval", "barn-human-.."), ("gpt-4", "p_eval", ""),
                                                ("barn", None, ""), ("barn", "own.json", "")])
def test_the_expected_win_rate_is_over_all_annotators_of_the_judge_s_pool(barn, tmp_path, judge, pool, names):
    path = barn / "sft" / "annotations.json"
    records = [{**record, "judge": judge, "pool": pool} for record in json.loads(path.read_text())]
    write(path, records)
    ended = evaluation(barn / "sft", "--out", tmp_path / "out", "--resamples", 9)
    fits(ended.out)
    row = rows_of(tmp_path / "out" / "leaderboard.csv")["sft"]
    assert ("  expected" in ended.out) == bool(names)
    if not names:
        assert "expected_win_rate" not in row
        return
    wins = 100 * win_probabilities({name: taste for name, taste in TASTES.items() if re.fullmatch(names, name)}, [
        (record["instruction"], record["output_2"], record["output_1"]) for record in records])
    assert float(row["expected_win_rate"]) == pytest.approx(wins.mean())
    assert float(row["expected_standard_error"]) == pytest.approx(statistics.stdev(wins) / len(wins) ** .5)
    assert f"{wins.mean():.1f} ± {statistics.stdev(wins) / len(wins) ** .5:.1f}" in ended.out


def test_answers_side_by_side(barn):
    ended = evaluation("--show", barn, "--n", 7)
    assert ended.code == 0, ended.err
    fits(ended.out)
    assert "\x1b" not in ended.out and "7 of 8 instructions, drawn with --seed 0 from the 7 on" in ended.out
    differ = [record for i, record in enumerate(splits()["eval"][:8]) if i != 3]
    for record in differ:
        reward = true_reward(record["instruction"], record["output"])
        assert re.sub(r"\s+", " ", record["instruction"]) in re.sub(r"\s+", " ", ended.out)
        assert f"reference: true reward {reward:.2f}" in ended.out
    assert ended.out.count("sft: barn-sim-01 prefers this answer") == 1
    assert ended.out.count("sft: barn-sim-01 prefers the reference") == 6
    assert ended.out.count("dpo: barn-sim-01 prefers this answer") == 6
    first = ended.out.index("1. ")
    order = [ended.out.index(f"\n   {name}: ", first) for name in ("reference", "sft", "dpo")]
    assert order == sorted(order)


def test_the_draw_is_the_seed_s(barn):
    shown = [evaluation("--show", barn, "--seed", seed).out for seed in (0, 0, 1, 2, 3)]
    assert shown[0] == shown[1] and len(set(shown)) > 2 and shown[0].count("reference: ") == 3


def test_instructions_are_drawn_where_verdicts_differ_and_stay_when_a_model_is_added():
    verdicts = {f"q{i}": [1, 2] if i % 3 else [2, 2] for i in range(60)}
    drawn, differ = draw_instructions(verdicts, 10, 0)
    assert differ == 40 and all(verdicts[text] == [1, 2] for text in drawn)
    more = {text: [*given, given[0]] for text, given in verdicts.items()}
    assert draw_instructions(more, 10, 0)[0] == drawn != draw_instructions(verdicts, 10, 1)[0]
    assert set(draw_instructions(verdicts, 60, 0)[0]) == set(verdicts)              # the others follow
    unusable = {"a": [None, 1.5], "b": [None, 2]}
    assert draw_instructions(unusable, 1, 0) == (["b"], 1)


def test_what_a_verdict_says():
    record = {"output_1": "a", "output_2": "b", "annotator": "j"}
    said = {p: verdict({**record, "preference": p}) for p in (1, 1.5, 2, None, 1.8)}
    assert said == {1: "j prefers the reference", 1.5: "j sees a draw", 2: "j prefers this answer",
                    None: "no usable verdict by j", 1.8: "j prefers this answer (this one by 80 %)"}
    assert verdict({**record, "output_2": "a", "preference": 1.5}) == "the same text as the reference"


def test_long_answers_are_cut_and_several_references_named():
    def record(text, reference="gpt"):
        return {"output_1": "Yes.\n\nNo.", "output_2": text, "generator_1": reference, "preference": 2}

    text = side_by_side({"a": {"Sing.": record("la " * 900)}, "b": {"Sing.": record("", "llama")}}, 1, 0)
    fits(text)
    assert "... and 21 lines more" in text and text.count("la " * 20) == 15 and "(nothing)" in text
    assert "gpt (reference)\n      Yes.\n\n      No." in text and "llama (reference)" in text
    assert "b: the judge prefers this answer" in text


def test_models_come_in_the_order_of_their_win_rates_after_what_they_started_from():
    def records(preference):
        return {"Sing.": {"output_1": "a", "output_2": "b", "generator_1": "reference", "preference": preference}}

    models = {"ppo": records(1.9), "sft": records(1.7), "dpo": records(1.2)}
    for before, names in (((), ["dpo", "sft", "ppo"]), ({"sft"}, ["sft", "dpo", "ppo"])):
        assert re.findall(r"^   (\w+):", side_by_side(models, 1, 0, before), re.MULTILINE) == names


def test_models_without_a_common_instruction_are_not_shown(tmp_path):
    one = write(tmp_path / "a.json", annotations("a", [1, 2]))
    two = write(tmp_path / "b.json", annotations("b", [1, 2], start=5))
    refused(evaluation("--show", one, two), 2, "no instruction that all of these models")
    refused(evaluation("--show", one, "--n", 0), 2, "--n.*positive")
    refused(evaluation(one, "--n", 2), 2, "--n would change nothing")


# ---- 80 columns ----------------------------------------------------------------------------------------

def test_a_wide_table_is_split_and_long_names_shortened():
    names = ["a model whose name is longer than anybody can say", "b"]
    lines = [["model", *(f"column {i}" for i in range(12))], *([name, *(f"{i}.{len(name)}" for i in range(12))]
                                                                 for name in names)]
    text = table(*lines)
    fits(text)
    blocks = text.split("\n\n")
    assert len(blocks) == 2 and all("a model" in each and "ody can say"[-5:] in each for each in blocks)
    assert re.findall(r"column \d+", text) == lines[0][1:]
    assert re.findall(r"\d+\.1\b", text) == lines[2][1:]
    narrow = table(["model", "n"], [names[0], "1"])
    assert names[0] in narrow and "…" not in narrow        # where there is room, a name is whole
    assert shortened("abcdefghij", 5) == "ab…ij"[:5] and shortened("abc", 3) == "abc"


def test_names_of_a_pair_share_their_room():
    assert pair_name("best_of_n", "expert_iteration") == "best_of_n - expert_iteration"
    assert len(pair_name("x" * 50, "y" * 50)) <= 28 >= len(pair_name("x" * 50, "dpo"))
    assert pair_name("x" * 50, "dpo").endswith("x - dpo")


def test_the_widest_leaderboard_fits_the_terminal(barn, tmp_path):
    name = "dpo_with_a_name_that_says_everything_about_its_settings"
    rows = barn_stage(barn / "dpo", ["Meow. " * 1000] * 8, [2] * 8)
    rows[0]["preference"] = rows[1]["preference"] = None
    for row in rows:
        row["generator_2"] = name
    write(barn / "dpo" / "annotations.json", rows)
    for n in range(6):                                  # a matrix and data sets of nine
        write(barn / f"model{n}" / "annotations.json", [
            {**row, "generator_2": f"{name}_{n}", "dataset": f"set {i % 4}"} for i, row in enumerate(rows)])
    ended = evaluation(barn, "--out", tmp_path / "out", "--resamples", 9)
    assert ended.code == 0
    fits(ended.out.rpartition("\n\n")[0])
    assert all(text in ended.out for text in ("vs start", "true reward", "verdicts left out", "all won"))
    assert name in rows_of(tmp_path / "out" / "leaderboard.csv")


# ---- flags ---------------------------------------------------------------------------------------------

def test_every_flag_is_explained_once_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = evaluation("--help")
    fits(ended.out)
    options = ended.out.partition("options:")[2]
    explained = re.split(r"\n  (?=-)", options)[2:]
    flags = [re.match(r"--\w+", each)[0] for each in explained]
    assert len(flags) == len(set(flags)) > 20
    for flag, text in zip(flags, explained):
        assert re.search(r"[a-z]{4}.*default", text, re.DOTALL), flag
    assert "(default: 0)" in explained[flags.index("--seed")] or "default:\n" in explained[flags.index("--seed")]


@pytest.mark.parametrize("given, meant", [("--basline=sft", "--baseline"), ("--max-unusabel", "--max_unusable"),
                                          ("--shwo", "--show")])
def test_a_typo_is_told_what_was_meant(given, meant):
    refused(evaluation("a.json", given), 2, rf"there is no --\w+.*did you mean {meant}\?")
    ended = evaluation("a.json", "--xyzzy")
    assert ended.code == 2 and "did you mean" not in ended.err
