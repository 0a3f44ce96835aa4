"""Arena-Hard v2's judgments: a tiny folder by hand, its scores by hand, and files that cannot be read."""
import json
import re

import pytest
from commands import refused
from test_eval import evaluation

from data.arena_hard import arena_hard_score, read_arena_hard

JUDGED = {                              # uid: baseline is A, model is A, preference
    "q1": ("B>>A", "A>B", 2),           # won: strongly, weakly
    "q2": ("A>B", "B>A", 1),            # lost twice
    "q3": ("A=B", "A=B", 1.5),
    "q4": ("B>A", "B>>A", 1.25),        # won weakly, lost strongly: 1 of 4
    "q5": ("A>>B", None, None),         # the judge gave no verdict
}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judgment(uid, games, model="mine", baseline="o3", category="hard_prompt"):
    return {"uid": uid, "category": category, "judge": "gpt", "model": model, "baseline": baseline,
            "games": [{"score": score} for score in games]}


@pytest.fixture
def folder(tmp_path):
    """The judge's folder, in one of Arena-Hard's form."""
    for model, length, wrapped in (("mine", 30, True), ("o3", 20, True), ("gemini", 25, False)):
        answers = [(f"q{i}", "x" * (length + i)) for i in range(1, 41)]
        lines(tmp_path / "model_answer" / f"{model}.jsonl", [
            {"uid": uid, "model": model, "messages": [{"role": "user", "content": "?"}, {
                "role": "assistant", "content": {"answer": text} if wrapped else text}]} for uid, text in answers])
    lines(tmp_path / "model_judgment" / "gpt" / "mine.jsonl",
          [judgment(uid, games) for uid, (*games, _) in JUDGED.items()])
    return tmp_path / "model_judgment" / "gpt"


def test_judgments_are_read_as_preferences(folder):
    (name, records), = read_arena_hard([folder / "mine.jsonl"]).items()
    assert name == "mine" and [record["preference"] for record in records] == [p for *_, p in JUDGED.values()]
    assert records[0].items() >= {"instruction": "q1", "dataset": "hard_prompt", "generator_1": "o3",
                                  "generator_2": "mine", "output_1": "x" * 21, "output_2": "x" * 31,
                                  "preference_by_order": [2, 2]}.items()
    assert records[3]["preference_by_order"] == [2, 1] and "preference_by_order" not in records[4]
    # Arena-Hard's: 4 of 4 verdicts in q1, 0 of 2, 1 of 2, 1 of 4
    assert arena_hard_score(records) == pytest.approx(100 * (4 + 0 + 1 + 1) / (4 + 2 + 2 + 4))
    twice = [folder, folder / ".." / "gpt" / "mine.jsonl"]
    assert read_arena_hard([folder]) == read_arena_hard(twice) == {name: records}


def test_every_label_means_the_same_from_both_sides(folder):
    for one, other in (("A>>B", "B>>A"), ("A>B", "B>A"), ("A=B", "A=B"), ("A<B", "A>B"), ("A<<B", "A>>B")):
        lines(folder / "mine.jsonl", [judgment("q1", (one, other))])
        (record,) = read_arena_hard([folder])["mine"]
        won = {">": 0, "=": .5, "<": 1}[one[1]]             # as A the baseline won, as B it did
        assert record["preference"] == 1 + won and record["preference_by_order"] == [1 + won, 1 + won]


def test_the_leaderboard_of_a_judge_with_a_baseline_for_each_category(folder, tmp_path):
    hard = [judgment(f"q{i}", ("B>A", "A>B") if i % 2 else ("A>B", "A>B")) for i in range(1, 21)]
    creative = [judgment(f"q{i}", ("A>B", "B>A") if i % 3 else ("B>>A", "A>>B"), baseline="gemini",
                         category="creative_writing") for i in range(21, 41)]
    lines(folder / "mine.jsonl", hard + creative)
    ended = evaluation("--arena_hard", folder, "--resamples", 50, "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert list(rows) == ["mine vs o3", "mine vs gemini"]
    assert rows["mine vs o3"]["win_rate"] == rows["mine vs o3"]["arena_hard"] == 75
    # 7 of 20 prompts are won, with strong verdicts: 7 * 6 of 7 * 6 + 13 * 2
    assert rows["mine vs gemini"]["win_rate"] == 35 and rows["mine vs gemini"]["arena_hard"] == 100 * 42 / 68
    assert rows["mine vs o3"]["lc_unknown"] == "every answer is longer than the reference's"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["flips"]["mine vs o3"]["flip_rate"] == 50 and report["flips"]["mine vs gemini"]["flip_rate"] == 0
    for said in ("Arena-Hard: its own score", "creative_writing", "win rate over gemini, o3", "61.8"):
        assert said in ended.out
    assert all(len(line) <= 80 for line in ended.out.splitlines())


@pytest.mark.parametrize("row, said", [
    ({**judgment("q1", ("A>B", "B>A")), "games": []}, "row 0 has no list of two games"),
    (judgment("q1", ("A>B", "A>C")), "row 0 has the score 'A>C', which is none of A>>B"),
    (judgment("q1", ("A>B", ["A>B"])), "row 0 has the score"),
    (judgment("q99", ("A>B", "B>A")), "o3.jsonl: has no answer to q99"),
    (judgment("q1", ("A>B", "B>A"), model="other"), "there is no .*other.jsonl: the lengths"),
    ({**judgment("q1", ("A>B", "B>A")), "uid": 7}, "row 0 has no text under 'uid'"),
    (judgment("q1", ("A>B", "B>A"), category={"a": 1}), "row 0 has no text under 'category', but {'a': 1}")])
def test_what_cannot_be_read_is_said(folder, tmp_path, row, said):
    lines(folder / "mine.jsonl", [row])
    refused(evaluation("--arena_hard", folder, "--out", tmp_path), 2, said)


def test_what_does_not_go_with_arena_hard_is_refused(folder, tmp_path):
    lines(tmp_path / "model_answer" / "o3.jsonl", [{"uid": "q1", "messages": [{"content": 7}]}])
    refused(evaluation("--arena_hard", folder, "--out", tmp_path), 2, re.escape("o3.jsonl: row 0 has no text under"))
    refused(evaluation("--arena_hard", folder, "--lc", "alpaca_eval"), 2, "not of Arena-Hard's")
    refused(evaluation("--arena_hard", folder, "--lc_data", "x"), 2, "lc_data would change nothing")
    lines(folder / "mine.jsonl", 2 * [judgment("q1", ("A>B", "B>A"))])
    refused(evaluation("--arena_hard", folder, "--out", tmp_path), 2, "row 0 has no text|rows 0 and 1 have the same")
    (tmp_path / "empty").mkdir()
    refused(evaluation("--arena_hard", tmp_path / "empty"), 2, "no .jsonl file in this folder")
