"""The evaluation: judging, the report of annotations, its files and tables, and what the command refuses."""
import csv
import functools
import gzip
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import command, refused
from test_stats import ALPACA_EVAL, needs_alpaca_eval, published, read

from data import InputError
from data.alpaca_eval import draw, read_annotations, read_column
from data.attacks import ATTACKS
from data.judges.prompts import Annotator
from data.judges.verdicts import logprob_preference
from eval import evaluate, folder_of, parse, report
from stats.tables import COLUMNS, details, leaderboard
from stats.winrate import compare, paired_difference, resample, win_rate

evaluation = functools.partial(command, "eval.py")
ONE = Annotator("m", "m")


# ---- judging -------------------------------------------------------------------------------------------

class Prefers:
    """In place of a Judge: says what `choose(text shown as (a), text shown as (b))` returns."""

    def __init__(self, choose):
        self.choose, self.hits, self.max_unusable, self.fault = choose, 0, 0.5, ""
        self.title = self.effort = self.brief = ""
        self.cache, self.extra, self.ask_again = SimpleNamespace(path="no file"), {}, False

    def complete(self, bodies, total):
        shown = r"<<<(\w+) output \(a\)\n(.*)\n\1>>>\n\n<<<\1 output \(b\)\n(.*)\n\1>>>"
        texts = ("\n".join(message["content"] for message in body["messages"]) for body in bodies)
        matches = (re.search(shown, text, re.DOTALL) for text in texts)
        return [{"choice": {"message": {"content": self.choose(match[2], match[3])}}} for match in matches]


def outputs(generator, lengths):
    return [{"instruction": f"Sing {i}.", "output": "la" * n, "generator": generator, "dataset": "songs"}
            for i, n in enumerate(lengths)]


def longer(a, b):
    return "Output (a)" if len(a) > len(b) else "Output (b)"


def test_evaluate_asks_whether_the_model_beats_the_reference():
    seen = []

    def choose(a, b):
        seen.append((a, b))
        return longer(a, b)

    ours, theirs = outputs("ours", [9, 9, 9, 1, 5] * 8), outputs("theirs", [2, 3, 4, 5, 5] * 8)
    annotations = evaluate(ours[::-1], theirs, [ONE], Prefers(choose))      # matched by instruction, not by row
    assert [a["preference"] for a in annotations] == [2, 2, 2, 1, 1.5] * 8
    assert annotations[3].items() >= {"output_1": theirs[3]["output"], "generator_1": "theirs",
                                      "output_2": ours[3]["output"], "generator_2": "ours",
                                      "instruction": "Sing 3.", "dataset": "songs"}.items()
    assert len(seen) == 32 and {ours[0]["output"] == a for a, _ in seen[::4]} == {True, False}  # both orders
    row = report({"ours": annotations})["rows"]["ours"]
    assert row.items() >= {**win_rate([2, 2, 2, 1, 1.5] * 8), "avg_length": 13}.items()     # 2 * 33 / 5 characters, cut


def test_average_length_is_over_unjudged_outputs_too():
    annotations = evaluate(outputs("a", [1, 2, 3, 40]), outputs("b", [9] * 4), [ONE],
                           Prefers(lambda a, b: "both" if 80 in (len(a), len(b)) else "Output (a)"))
    row = report({"a": annotations})["rows"]["a"]
    assert row["n_total"] == 3 and row["n_unusable"] == 1 and row["avg_length"] == 2 * 46 // 4


def test_in_both_orders_a_judge_that_only_sees_the_place_draws():
    ours, theirs = outputs("ours", [9, 9, 4, 5] * 5), outputs("theirs", [2, 3, 5, 5] * 5)
    annotations = evaluate(ours, theirs, [ONE], Prefers(lambda a, b: "Output (b)"), both_orders=True)
    assert [a["preference"] for a in annotations] == [1.5] * 20
    assert [a.get("preference_by_order") for a in annotations] == [[2, 1], [2, 1], [2, 1], None] * 5    # one is equal
    assert all(a["is_switched"] is None for a in annotations)
    flips = report({"ours": annotations})["flips"]["ours"]
    assert (flips["n"], flips["flip_rate"], flips["first"]) == (15, 100, 0)
    fair = evaluate(ours, theirs, [ONE], Prefers(longer), both_orders=True)
    assert [a["preference"] for a in fair] == [2, 2, 1, 1.5] * 5
    assert report({"ours": fair})["flips"]["ours"]["flip_rate"] == 0 and not report({"ours": fair})["position"]
    asked = Prefers(lambda a, b: "Output (a)" if len(a) > len(b) else "?")
    asked.max_unusable = 1
    half = evaluate(ours, theirs, [ONE], asked, both_orders=True)
    assert [a["preference"] for a in half] == [None, None, None, 1.5] * 5
    assert half[0]["raw_completion"] == ["?", "Output (a)"]


def test_evaluate_names_the_first_row_that_does_not_match():
    ours, theirs = outputs("ours", [1, 2, 3]), outputs("theirs", [1, 2, 3])
    theirs[1]["instruction"], theirs[2]["instruction"] = "Dance.", "Jump."
    with pytest.raises(InputError, match="no answer to row 1 of the reference, 'Dance.'"):
        evaluate(ours, theirs, [ONE], None)
    with pytest.raises(InputError, match="row 2 answers 'Sing 2.', which is not in the reference"):
        evaluate(ours, outputs("theirs", [1, 2]), [ONE], None)


@needs_alpaca_eval
def test_published_preferences_come_from_the_judge_s_log_probs():
    switched = {row["index"]: draw("is_switched_outputs", row["instruction"] + "0", [False, True])
                for row in read("instructions.json.gz")}
    rows = list(itertools.chain(*read("judge_logprobs_shared.json.gz").values()))
    assert len(rows) == 3220
    for row in rows:
        if not row["identical_outputs"]:
            seen = logprob_preference(dict(row["top_logprobs"]))
            assert (3 - seen if switched[row["index"]] else seen) == pytest.approx(row["preference"], abs=1e-8)
    assert logprob_preference({"x": -1.}) is None and logprob_preference({"m": -3.}) == 1


# ---- annotations -> report -----------------------------------------------------------------------------

def annotations(generator, preferences, start=0, reference="ref", length=10):
    return [{"instruction": f"Sing {start + i}.", "output_1": "la" * (5 + i % 3), "generator_1": reference,
             "output_2": "o" * (length + i % 5), "generator_2": generator, "preference": p,
             "dataset": ("songs", "hymns")[i % 2]} for i, p in enumerate(preferences)]


def random_preferences(rate, n=60, seed=0):
    return (1. + (np.random.default_rng(seed).random(n) < rate)).tolist()


def test_models_are_compared_on_the_instructions_that_they_share():
    a, b = random_preferences(.8), random_preferences(.5, seed=1)
    models = {"a": annotations("a", a), "b": annotations("b", b[10:], start=10)[::-1]}      # fewer, in another order
    found = report(models, resamples=200)
    assert list(found["rows"]) == ["a", "b"]
    (row,) = found["compared"]
    assert (row["a"], row["b"], row["n"]) == ("a", "b", 50)
    assert (row["difference"], row["standard_error"]) == pytest.approx(paired_difference(a[10:], b[10:]))
    assert row.items() >= {key: value for key, value in compare(a[10:], b[10:]).items()
                           if key in ("n_better", "n_worse", "mcnemar_p", "prompts_needed")}.items()
    assert row["ci_low"] < row["difference"] < row["ci_high"] and row["clustered_standard_error"] > 0
    assert found["rows"]["b"]["n_missing"] == 10 and found["rows"]["a"]["n_missing"] == 0
    assert found["rows"]["b"]["win_rate_if_won"] == pytest.approx(100 * (sum(b[10:]) - 50 + 10) / 60)
    assert found["by_dataset"]["b"]["hymns"] == win_rate(b[11::2])
    asked = [{"instruction": f"Sing {i}."} for i in range(100)]
    assert report(models, asked, resamples=9)["rows"]["a"]["n_missing"] == 40
    found = report({**models, "c": annotations("c", a)}, baseline="b", resamples=9)
    assert [row["b"] for row in found["compared"]] == ["b", "b"]
    small, large = sorted(row["mcnemar_p"] for row in found["compared"])
    assert sorted(row["holm_p"] for row in found["compared"]) == [2 * small, max(2 * small, large)]


def test_models_do_not_move_each_other():
    a, b = annotations("a", random_preferences(.8)), annotations("b", random_preferences(.5, seed=1))
    assert report({"a": a}, resamples=50)["rows"]["a"] == report({"a": a, "b": b}, resamples=50)["rows"]["a"]


def test_every_row_has_intervals_around_its_numbers():
    row = report({"a": annotations("a", random_preferences(.7))})["rows"]["a"]
    assert row["win_rate_ci_low"] < row["win_rate"] < row["win_rate_ci_high"]
    assert row["win_rate_ci_high"] - row["win_rate_ci_low"] == pytest.approx(3.92 * row["standard_error"], rel=.15)
    assert row["lc_ci_low"] < row["length_controlled_winrate"] < row["lc_ci_high"]


def test_ratings_against_one_reference_are_the_log_odds_of_the_win_rates():
    rates = {"a": [2] * 30 + [1] * 10, "b": [2] * 10 + [1.5] * 20 + [1] * 10}
    found = report({name: annotations(name, p) for name, p in rates.items()}, resamples=100)
    elo = {row["model"]: row["elo"] for row in found["ratings"]}
    assert elo == {"ref": 1000, "b": pytest.approx(1000, abs=.1), "a": pytest.approx(1000 + 400 * np.log10(3), abs=.5)}
    matrix = found["matrix"]
    i, j = matrix["names"].index("a"), matrix["names"].index("b")
    assert np.isnan(matrix["win_rate"][i][j]) and matrix["predicted"][i][j] == pytest.approx(75, abs=.1)
    assert matrix["win_rate"][i][matrix["names"].index("ref")] == 75


def test_position_is_stored_or_redrawn_as_alpacaeval_drew_it():
    rows = annotations("a", [1] * 400)
    for row in rows:                                        # wins exactly where it was shown second
        row["preference"] = 1 if draw("is_switched_outputs", row["instruction"] + "0", [False, True]) else 2
    assert report({"a": rows}, resamples=9)["position"]["a"]["gap"] == 100
    for row in rows:
        row["is_switched"] = row["preference"] == 2
    assert report({"a": rows}, resamples=9)["position"]["a"]["gap"] == -100


def test_the_baseline_against_itself_has_50_by_definition():
    rows = [{**row, "output_2": row["output_1"]} for row in annotations("ref", [1.5] * 20)]
    row = report({"ref": rows})["rows"]["ref"]
    assert (row["length_controlled_winrate"], row["lc_standard_error"], row["win_rate"]) == (50, 0, 50)


@needs_alpaca_eval
def test_whole_files_are_evaluated_as_published(tmp_path):
    """Three AlpacaEval 2 models, one with a missing row, as files of annotations."""
    asked = read("reference_gpt4_1106_preview.json.gz")
    (tmp_path / "ref.json").write_text(json.dumps(asked))
    names = ("claude-2", "gpt35_turbo_instruct", "alpaca-7b")
    models = published("ae2")
    for name in names:
        p, ours, _, index, _ = models[name]
        (tmp_path / name).mkdir()
        (tmp_path / name / "annotations.json").write_text(json.dumps([
            {"instruction": asked[i]["instruction"], "dataset": asked[i]["dataset"], "output_1": asked[i]["output"],
             "generator_1": "gpt4_1106_preview", "output_2": "x" * length, "generator_2": name, "preference": x}
            for i, x, length in zip(index, p, ours)]))
    with_data = ("--lc_data", ALPACA_EVAL / "lc_glm.json.gz", "--reference", tmp_path / "ref.json", "--out", tmp_path)
    assert evaluation(tmp_path, "--lc-C", 2.782559402207126, "--lc=alpaca_eval", *with_data).code == 0
    for row in csv.DictReader(open(tmp_path / "leaderboard.csv")):
        expected = models[row[""]][-1]
        for column in COLUMNS:
            if expected.get(column) is not None and column not in ("mode", "lc_standard_error"):
                accuracy = .2 if column.startswith("length") else 1 if column == "avg_length" else 1e-8
                assert float(row[column]) == pytest.approx(expected[column], abs=accuracy), (row[""], column)
    assert row["n_missing"] == "0" and evaluation(tmp_path, *with_data, "--resamples", 20).code == 0
    rows = {row[""]: row for row in csv.DictReader(open(tmp_path / "leaderboard.csv"))}
    assert float(rows["gpt35_turbo_instruct"]["length_controlled_winrate"]) == pytest.approx(14.96, abs=.1)
    assert rows["gpt35_turbo_instruct"]["n_missing"] == "1"
    refused(evaluation(tmp_path / "alpaca-7b", "--lc", "alpaca_eval", "--out", tmp_path), 1, "HF_HUB_OFFLINE.*once")
    refused(evaluation(tmp_path / "gpt35_turbo_instruct", *with_data[:2], "--out", tmp_path), 2, "805.*--reference")


# ---- leaderboards as files -----------------------------------------------------------------------------

def make_row(wins, length, **extra):
    return {**win_rate([2] * wins + [1] * (100 - wins)), "mode": "community", "avg_length": length, **extra}


def test_the_leaderboard_is_alpacaeval_s_csv_best_first(tmp_path):
    rows = {"sft, plain": make_row(40, 300), "ppo": make_row(60, 400), "dpo": make_row(55, 350)}
    table = leaderboard(rows, tmp_path / "leaderboard.csv")
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["", "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
                      "discrete_win_rate", "mode", "avg_length", "length_controlled_winrate",
                      "lc_standard_error"] == ["", *COLUMNS]
    assert [line[0] for line in lines] == ["ppo", "dpo", "sft, plain"]
    for line in lines:
        cells = {name: text for name, text in zip(header, line) if text}
        row = rows[cells.pop("", "") or line[0]]
        assert {name: type(row[name])(text) for name, text in cells.items()} == row     # to the last digit
    printed, note = table.split("\n\n")
    printed = printed.splitlines()
    assert [line.split("  ")[0] for line in printed[2:]] == ["ppo", "dpo", "sft, plain"]
    assert "60.0 ± 4.9" in printed[2] and "400" in printed[2] and "100 prompts" in note
    assert len({len(line) for line in printed}) == 1 and "LC" not in table
    assert read_column(tmp_path / "leaderboard.csv") == {"ppo": 60, "dpo": 55, "sft, plain": 40}
    assert read_column(f"{tmp_path}/leaderboard.csv:avg_length")["dpo"] == 350


def test_differences_to_the_baseline_come_after_alpacaeval_s_columns(tmp_path):
    rows = {"sft": make_row(40, 300), "ppo": make_row(60, 400, diff_start=20.0, diff_start_standard_error=3.5)}
    table = leaderboard(rows, tmp_path / "leaderboard.csv")
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][-2:] == ["diff_start", "diff_start_standard_error"]
    assert [line[-2:] for line in lines[1:]] == [["20.0", "3.5"], ["", ""]]
    assert "+20.0 ± 3.5" in table


# ---- the command ---------------------------------------------------------------------------------------

def write(path, records):
    text = records if isinstance(records, str) else json.dumps(records)
    path.parent.mkdir(exist_ok=True, parents=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write(text)
    return path


def test_the_whole_report_of_a_few_models(tmp_path):
    a, b, c = (annotations(name, random_preferences(rate, seed=seed)) for seed, (name, rate) in
               enumerate({"alpha": .8, "beta": .5, "gamma": .3}.items()))
    c[3]["preference"], c[4]["preference"], c[5]["preference"] = None, float("nan"), 0
    write(tmp_path / "runs" / "alpha" / "annotations.json", a)
    write(tmp_path / "beta.json.gz", b)
    write(tmp_path / "gamma.jsonl", "\n".join(map(json.dumps, c)))
    files = (tmp_path / "runs", tmp_path / "beta.json.gz", tmp_path / "gamma.jsonl")
    ended = evaluation(*files, "--out", tmp_path / "new" / "folder", "--resamples", "200")
    assert (ended.code, ended.err) == (0, "")
    for text in ("win rate over ref in %", "alpha - beta", "beta - gamma", "hymns", "shown first", "Elo",
                 "2 comparisons (Holm", "left out", "clustered", "~"):
        assert text in ended.out, text
    assert ended.out.index("alpha") < ended.out.index("beta") < ended.out.index("gamma")
    found = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(), parse_constant=pytest.fail)
    rows = found["rows"]
    assert rows["gamma"]["n_unusable"] == 2 and rows["gamma"]["n_draws"] == 1 and rows["gamma"]["n_total"] == 58
    with open(tmp_path / "new" / "folder" / "leaderboard.csv") as file:
        for line in csv.DictReader(file):
            assert float(line["win_rate"]) == rows[line[""]]["win_rate"]
    ended = evaluation(*files, "--out", tmp_path, "--baseline", "gamma", "--resamples", "9", "--lc", "none")
    assert "alpha - gamma" in ended.out and "alpha - beta" not in ended.out and "LC" not in ended.out


def test_models_of_the_same_name_and_of_several_references_are_told_apart(tmp_path):
    paths = [write(tmp_path / f"{i}.json", annotations("m", random_preferences(.4 + .2 * i))) for i in (0, 1)]
    assert list(read_annotations(paths)[0]) == ["m (0.json)", "m (1.json)"]
    both = annotations("m", [2] * 9) + annotations("m", [1] * 9, 0, "n")
    models, _ = read_annotations([write(tmp_path / "all.json", both)])
    assert {name: len(rows) for name, rows in models.items()} == {"m vs ref": 9, "m vs n": 9}
    ratings = {row["model"]: row["elo"] for row in report(models, resamples=9)["ratings"]}
    assert ratings["n"] > ratings["m"] > ratings["ref"] == 1000 and report(models, resamples=9)["compared"] == []


def spoilt(row, **changes):
    """Annotations of which one row is changed; ... takes a key away."""
    rows = annotations("m", [2, 1] * 5)
    rows[row] = {key: value for key, value in {**rows[row], **changes}.items() if value is not ...}
    return rows


@pytest.mark.parametrize("records, said", [
    ("", "not JSON"), ("[]", "expected a list of records"), ("{}", "expected a list"), ('[{"instruction"', "not JSON"),
    ([1], "row 0"), (spoilt(3, instruction=7), "row 3 has no text under 'instruction'"),
    (spoilt(3, output_2=None), "row 3 has no text under 'output_2'"),
    (spoilt(3, generator_1=...), "row 3.*generator_1"),
    (spoilt(4, preference="2"), "row 4 has no number or null under 'preference', but '2'"),
    (spoilt(4, preference=True), "row 4.*True"), (spoilt(4, preference=...), "row 4.*'missing'"),
    (spoilt(4, preference=[2]), r"row 4.*\[2\]"), (spoilt(4, preference=10 ** 400), "row 4.*100000"),
    (spoilt(4, dataset=5), "row 4 has no text or null under 'dataset', but 5"),
    (spoilt(4, is_switched="False"), "row 4 has no true or false"),
    (spoilt(4, preference_by_order=[1]), r"row 4 has no two numbers.*\[1\]"),
    (spoilt(4, price_per_example="x"), "row 4 has no number.*price"), (spoilt(4, output_1="\ud800"), "row 4 .*half"),
    (spoilt(5, instruction="Sing 2."), "rows 2 and 5 have the same instruction, 'Sing 2.'")])
def test_a_malformed_row_is_named(tmp_path, records, said):
    path = write(tmp_path / "bad.json", records)
    refused(evaluation(path, "--out", tmp_path), 2, re.escape(str(path)), said)


def test_annotations_against_different_answers_of_one_reference_are_refused(tmp_path):
    one, two = write(tmp_path / "a.json", annotations("a", [2] * 9)), spoilt(7, output_1="another answer")
    two = write(tmp_path / "b.json", two)
    refused(evaluation(one, two, "--out", tmp_path), 2, "b.json: row 7.*another answer of 'ref' than row 7 of .*a.json")
    assert evaluation(one, two, "--out", tmp_path, "--any_reference").code == 0


@pytest.mark.parametrize("argv, said", [
    ((), "give annotations"), (("a.json", "--attack"), "not annotations and attack"), (("nowhere",), "nowhere"),
    (("--resamples", 0, "--attack"), "between 2 and 100000"), (("--outputs", "o.json", "--judge", "m"), "--reference"),
    (("--rankings", "one.csv", "two.csv"), "one.csv: No such file"), (("--lc", "best", "x"), "invalid choice")])
def test_what_makes_no_sense_is_said_in_one_sentence(tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    refused(evaluation(*argv), 2, said)


def test_answers_are_judged_first(tmp_path):
    from data.barn.world import splits
    reference = splits()["eval"][:40]
    write(tmp_path / "ref.json", [{**record, "generator": "barn"} for record in reference])
    for name, text in (("cat", "Meow."), ("hen", "A hen lays eggs. It lives in the barn.")):
        write(tmp_path / f"{name}.json", [{"instruction": record["instruction"], "output": text, "generator": name}
                                          for record in reference[::-1]])
    argv = ("--outputs", tmp_path / "cat.json", tmp_path / "hen.json", "--reference", tmp_path / "ref.json",
            "--out", tmp_path)
    ended = evaluation(*argv, "--judge", "barn")
    assert ended.code == 0 and ended.out.count("40 asked (0 from the cache)") == 2
    assert "win rate over barn" in ended.out
    again = evaluation(*argv, "--judge", "barn", "--both-orders", "--limit", "20")
    assert again.code == 0 and "turned" in again.out
    assert again.out.count("20 asked in 40 requests (20 from the cache)") == 2
    rows = json.loads((tmp_path / "cat" / "annotations.json").read_text())
    assert len(rows) == 20 and rows[0]["instruction"] == reference[0]["instruction"]
    write(tmp_path / "hen.json", [{**record, "output": "?", "generator": "hen"} for record in reference[:39]])
    refused(evaluation(*argv), 2, "who judges")
    refused(evaluation(*argv, "--judge", "barn"), 2, "hen.json: no answer to row 39 of .*ref.json")
    assert evaluation(*argv, "--judge", "barn", "--limit", "39").code == 0


def test_what_is_meant_by_a_path_a_name_and_a_flag(tmp_path):
    path = write(tmp_path / "a.json", annotations("m", random_preferences(.5)))
    ended = evaluation(path, f"{tmp_path}/../{tmp_path.name}/a.json", f"--out={tmp_path}/out-put", "--lc=none")
    assert ended.code == 0 and (tmp_path / "out-put" / "leaderboard.csv").exists()
    assert list(json.loads((tmp_path / "out-put" / "report.json").read_text())["rows"]) == ["m"]
    for flags in (("--judge", "m"), ("--limit", 3), ("--human", path)):
        refused(evaluation(path, *flags), 2, "would change nothing here: it does not go with annotations")
    reference = [{"instruction": row["instruction"], "output": row["output_1"]} for row in annotations("m", [1] * 60)]
    for changed, said in ((reference[1:], "row 0 asks something else"),
                          ([{**reference[0], "output": "?"}, *reference[1:]], "row 0 was judged against another")):
        ref = write(tmp_path / "ref.json", changed)
        refused(evaluation(path, "--reference", ref, "--out", tmp_path), 2, said)
        assert evaluation(path, "--reference", ref, "--out", tmp_path, "--any-reference").code == 0
    assert [folder_of(name) for name in ("meta/x y", "..", "leaderboard.csv", "gpt-3.5")] == [
        "meta-x-y", "model", "leaderboard-csv", "gpt-3.5"]


def test_data_sets_are_known_from_whoever_says_them():
    rows = annotations("a", random_preferences(.5))
    silent = [{**row, "generator_2": "b", "dataset": None} for row in rows]
    found = report({"a": rows, "b": silent}, resamples=9)["by_dataset"]
    assert found["a"] == found["b"] and list(found["b"]) == ["songs", "hymns"]
    asked = [{"instruction": row["instruction"], "dataset": row["dataset"]} for row in rows]
    assert report({"b": silent[:1]}, asked, resamples=9)["by_dataset"]["b"]["songs"]["n_total"] == 1


@pytest.mark.filterwarnings("error")
def test_a_model_with_next_to_no_rows_is_no_trouble():
    models = {"a": annotations("a", random_preferences(.5)), "b": annotations("b", [2, 1, None]),
              "c": annotations("c", [None])}
    found = report(models, resamples=50)
    assert found["rows"]["c"]["n_total"] == 0 and "length_controlled_winrate" not in found["rows"]["c"]
    ranks = {row["model"]: row["rank"] for row in found["ratings"]}
    assert ranks["c"] is None and sorted(rank for rank in ranks.values() if rank) in ([1, 2, 3], [1, 1, 3], [1, 2, 2])
    assert "c" in details(found)


def test_an_attack_goes_to_a_folder_of_its_own():
    """So that its tables do not meet those of a leaderboard in the usual folder."""
    usual = {mode: parse([mode, *files, "--judge", "barn"]).out
             for mode, files in (("--attack", []), ("--outputs", ["o.json", "--reference", "r.json"]))}
    assert usual == {"--attack": Path("runs/attack"), "--outputs": Path("runs/eval")}


def test_an_attack_is_scored_by_the_judge(tmp_path):
    ended = evaluation("--attack", "--limit", "10", "--out", tmp_path)
    assert ended.code == 0 and all(name in ended.out for name in ATTACKS)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows.keys() == ATTACKS.keys() and all(row["win_rate"] <= 20 for row in rows.values())
    assert rows["empty"]["avg_length"] == 0 and rows["filler, 4,000 characters"]["avg_length"] > 3900
    assert {row["n_total"] + row["n_unusable"] for row in rows.values()} == {10}


def test_the_judge_report_as_a_command(tmp_path):
    pairs = [{**row, "generator_2": "abc"[i % 3]} for i, row in enumerate(annotations("x", [1] * 30))]
    labels = [{**pair, "preference": 1 + (i * k) % 2, "price_per_example": .01}
              for k in (1, 2, 3) for i, pair in enumerate(pairs)]
    path, people = write(tmp_path / "labels.json", labels), write(tmp_path / "people.json", labels[:30][::-1])
    ended = evaluation("--judge-report", path, "--human", people, "--out", tmp_path)
    assert ended.code == 0, ended.err
    with open(tmp_path / "evaluators_leaderboard.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["Human agreement"]) == pytest.approx(100 * (1 + .5 + 1) / 3)
    assert float(row["Price [$/1000 examples]"]) == pytest.approx(10) and row["# parsed"] == "90"
    assert "Human agreement" in ended.out and "Bias" in ended.out and "Time" not in ended.out
    second = write(tmp_path / "2.json", [{**pair, "preference": 1 + (pair["generator_2"] < "b")} for pair in pairs])
    ended = evaluation("--judge_report", path, "--judge=barn", "--second", second, "--out", tmp_path, "--seeds", 2)
    assert ended.code == 0 and ended.out.count("30 asked") == 2
    assert "Spearman" in ended.out and "Price" not in ended.out
    others = write(tmp_path / "others.json", annotations("x", [1] * 3, start=90))
    refused(evaluation("--judge_report", path, "--human", others, "--out", tmp_path), 2, "others.json: has.*none")


def test_two_leaderboards_as_files(tmp_path):
    write(tmp_path / "sim.csv", ",win_rate\nppo,46.8\nbest,45\nexpert,41.9\nsft52,39.2\nsft10,36.7\nfeedme,36.6\nx,1\n")
    write(tmp_path / "human.csv", ",n,win_rate\nfeedme,1,37.9\nsft10,1,44.3\nsft52,1,40.7\nexpert,1,45.7\nbest,1,50.7\n"
                                  "ppo,1,55.1\n")
    ended = evaluation("--rankings", tmp_path / "sim.csv", tmp_path / "human.csv")
    assert ended.code == 0 and "6 models" in ended.out and "0.943" in ended.out and "0.833" in ended.out
    for text, said in ((",win_rate\na,nan\n", "row 0, 'a',.*'nan'"), (",win_rate\na,x\n", "'x'"),
                       (",n\na,1\n", "no column"), (",win_rate\nppo,1\nppo,2\n", "only one named 'ppo'"),
                       (",win_rate\nppo,1\n", "needs three"), ("", "header"),
                       (",win_rate\nppo,5\nbest,5\nsft10,5\nother,6\n", "all of the 3 models .* the same value")):
        write(tmp_path / "bad.csv", text)
        refused(evaluation("--rankings", tmp_path / "sim.csv", tmp_path / "bad.csv"), 2, "bad.csv", said)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    path = write(tmp_path / "a.json", annotations("a", random_preferences(.6)))
    for name in "xy":
        evaluation(path, "--out", tmp_path / name)
    assert (tmp_path / "x" / "report.json").read_bytes() == (tmp_path / "y" / "report.json").read_bytes()
    assert resample(9, 5, 1).tolist() != resample(9, 5, 2).tolist()
