"""Judges side by side: whose a label is, and what the table says of each."""
import csv
import functools
import json

import numpy as np
import pytest
from commands import command, refused
from judged import JUDGE, make_pairs, prefer_longer, preferences

from annotate import annotate, connect, pool
from data.alpaca_eval import read_judges
from stats.agreement import repeatability

evaluation = functools.partial(command, "eval.py")
PAIRS = make_pairs(40)
TRUTH = [prefer_longer(pair) for pair in PAIRS]


def labelled(labels, **keys):
    return [{**pair, "preference": label, **keys} for pair, label in zip(PAIRS, labels)]


def wrong(n, start=0):
    """The truth with n labels turned."""
    return [3 - label if start <= i < start + n else label for i, label in enumerate(TRUTH)]


@pytest.fixture
def write(tmp_path):
    def write(name, records):
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)
    return write


def test_whose_a_label_is(write):
    good, again = labelled(TRUTH, judge="big", pool="p_single", annotator="big"), labelled(wrong(1), judge="big",
                                                                                        pool="p_single")
    thinks = labelled(TRUTH, judge="big", pool="p_single", effort="high")
    mine, old = labelled(TRUTH, annotator="me"), labelled(TRUTH, annotator="gpt4")
    crowd = [{**label, "annotator": f"a{i % 3}"} for i, label in enumerate(labelled(TRUTH))]
    files = good, again + thinks, mine, old, crowd, labelled(TRUTH)
    paths = [write(f"{n}.json", labels) for n, labels in enumerate(files)]
    found = read_judges(paths)
    assert {name: len(labels) for name, labels in found.items()} == {
        "big p_single": 80, "big p_single high": 40, "me": 40, "gpt4": 40, "4": 80}
    assert found["big p_single"] == good + again and read_judges(paths[:1] * 2) == {"big p_single": good}


def test_two_labels_of_a_pair():
    assert repeatability(np.array([[1., 1], [2, 2], [1, 2], [1.5, 2]])) == pytest.approx(100 * (1 + 1 + 0 + .5) / 4)
    assert np.isnan(repeatability(np.array([[1.], [2]]))) and np.isnan(repeatability(np.array([[1., np.nan]])))
    three = np.array([[1., 1, 2]] * 5)                                  # 1 of 3 pairs of labels agrees
    assert repeatability(three) == pytest.approx(100 / 3)


def test_judges_compared_in_one_table(write, tmp_path):
    people = write("people.json", labelled(TRUTH))
    cheap = [*labelled(wrong(8), judge="cheap", price_per_example=.0001), *labelled(wrong(8, 4), judge="cheap",
                                                                              price_per_example=.0003)]
    dear = labelled(TRUTH, judge="dear", price_per_example=.01)
    paths = write("cheap1.json", cheap[:40]), write("dear.json", dear), write("cheap2.json", cheap[40:])
    done = evaluation("--judge_report", *paths, "--human", people, "--out", tmp_path)
    assert done.code == 0, done.err
    with open(tmp_path / "evaluators_leaderboard.csv", newline="") as file:
        rows = {row[""]: row for row in csv.DictReader(file)}
    assert list(rows) == ["cheap", "dear"]
    keys = "Human agreement", "Bias", "Variance", "Repeatability", "Price [$/1000 examples]"
    cheap, dear = ([row[key] and float(row[key]) for key in keys] for row in rows.values())
    assert cheap[0] == pytest.approx(80) and cheap[2:] == pytest.approx([20, 80, .2])
    assert dear[0] == 100 and dear[1:4] == ["", "", ""] and dear[4] == pytest.approx(10)
    header, _, *lines = done.out.splitlines()[:4]
    assert header.split() == ["judge", "agrees", "error", "bias", "variance", "repeats", "longer", "$/1000"]
    assert [line.split()[:2] for line in lines] == [["cheap", "80.0"], ["dear", "100.0"]]
    assert "on the 40 pairs that all of them have labelled" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_judges_are_compared_on_the_same_pairs(write, tmp_path):
    one, two = labelled(wrong(10), judge="one")[:30], labelled(TRUTH, judge="two")[10:]     # wrong where two is silent
    people = write("people.json", labelled(TRUTH))
    files = write("1.json", one), write("2.json", two)
    done = evaluation("--judge_report", *files, "--human", people, "--out", tmp_path)
    with open(tmp_path / "evaluators_leaderboard.csv", newline="") as file:
        assert [(row["Human agreement"], row["# pairs"]) for row in csv.DictReader(file)] == [("100.0", "20")] * 2
    assert done.code == 0 and "on the 20 pairs that all of them have labelled (20 labels are" in done.out
    done = evaluation("--judge_report", write("1.json", one[:5]), write("2.json", two), "--out", tmp_path)
    refused(done, 2, "no pair is labelled by all of one, two")


def test_every_label_says_by_whom_it_is_and_when(server, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    with connect("m", tmp_path / "judge.jsonl") as found:
        records = annotate(PAIRS, pool("m", "p_single"), found, flip=.25, costs=True)
        assert all(label["time"] for label in found.cache.answers.values())
    assert {(record["judge"], record["pool"], record["effort"]) for record in records} == {("m", "p_single", "")}
    dates = {record["scored_by"]: record["date"] for record in records}
    assert dates["coin"] is None and len(dates["text"]) == 10 and dates["text"].startswith("20")
    plain = annotate(PAIRS, [JUDGE], judge())                           # as a library, of an unnamed judge
    assert plain[0]["judge"] == plain[0]["pool"] == "" and preferences(plain) == TRUTH
