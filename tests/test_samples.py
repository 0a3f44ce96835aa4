"""What AlpacaFarm's python calls do: head to head, several samples of one model, a completion for every instruction."""
import functools
import itertools
import json
from collections import Counter

import pytest
from commands import command, refused, said
from judged import make_pairs, prefer_longer, preferences

from data.alpaca_eval import couples, read_outputs, read_pairs

annotating = functools.partial(command, "annotate.py")


@pytest.fixture
def write(server, tmp_path, monkeypatch):
    """write(name, records) -> path; a judge that prefers the longer text is at OPENAI_BASE_URL."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.rule = lambda body, nth: said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b")

    def write(name, records):
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name
    return write


def test_head_to_head_of_two_files_either_way(write, tmp_path):
    pairs = make_pairs(30)
    files, found = [], {}
    for key, order in (("output_1", pairs), ("output_2", pairs[::-1])):
        files.append(write(f"{key}.json", [{"instruction": pair["instruction"], "output": pair[key], "generator": key}
                                           for pair in order]))
    one, two = files
    for name, ours, theirs in (("there", two, one), ("back", one, two)):
        done = annotating(ours, "--reference", theirs, "--judge", "m", "--pool", "p_eval", "--out", tmp_path / name)
        assert done.code == 0, done.err
        found[name] = {record["instruction"]: record for record in json.loads((tmp_path / name).read_text())}
    assert [found["there"][pair["instruction"]]["preference"] for pair in pairs] == list(map(prefer_longer, pairs))
    for instruction, record in found["there"].items():
        other = found["back"][instruction]
        assert (record["preference"], record["generator_1"]) == (3 - other["preference"], other["generator_2"])
    short = write("short.json", json.loads(two.read_text())[1:])
    for files in ((short, one), (one, short)):
        refused(annotating(files[0], "--reference", files[1], "--out", tmp_path / "no"), 2, "cow 29")


def test_every_two_samples_of_an_instruction_are_compared(write):
    many = [{"instruction": "Moo?", "output": ["a", "b", "c", "a"], "dataset": "x", "generator": "g"},
            {"instruction": "Baa?", "output": "d", "generator": "g"},
            {"instruction": "Baa?", "output": "e", "generator": "h"}]
    pairs = read_pairs(write("many.json", many))
    assert [(pair["output_1"], pair["output_2"]) for pair in pairs] == [*itertools.combinations("abca", 2), ("d", "e")]
    assert pairs[-1] == {"instruction": "Baa?", "output_1": "d", "output_2": "e", "generator_1": "g",
                         "generator_2": "h"}
    assert pairs[0]["dataset"] == "x" and "output" not in pairs[0] and len({pair.get("seed") for pair in pairs}) == 6


def test_a_derangement_compares_each_sample_with_one_other(write):
    for n, salt in itertools.product((2, 3, 7, 20), "abc"):
        found = couples(n, "derangement", salt)
        assert sorted(i for i, _ in found) == sorted(j for _, j in found) == list(range(n))
        assert all(i != j for i, j in found) and found == couples(n, "derangement", salt)
    assert len({str(couples(7, "derangement", str(salt))) for salt in range(20)}) > 15
    share = Counter(couples(4, "derangement", str(salt))[0][1] for salt in range(600))
    assert share.keys() == {1, 2, 3} and min(share.values()) > 150                  # of 200 each
    many = write("many.json", [{"instruction": "Moo?", "output": list("abcde")}])
    pairs = read_pairs(many, samples="derangement")
    assert sorted(pair["output_1"] for pair in pairs) == sorted(pair["output_2"] for pair in pairs) == list("abcde")


def test_samples_from_the_command_line_and_none_is_left_out(write, tmp_path):
    outputs = [["x" * (1 + (7 * i + 3 * j) % 11) for j in range(4)] for i in range(6)]
    path = write("many.json", [{"instruction": f"Say x {i}.", "output": texts} for i, texts in enumerate(outputs)])
    for flag, n in ((), 36), (("--samples", "derangement"), 24):
        done = annotating(path, "--judge", "m", "--pool", "p_single", "--out", tmp_path / "out.json", *flag)
        assert done.code == 0, done.err
        records = json.loads((tmp_path / "out.json").read_text())
        assert len(records) == n
        assert preferences(records) == [1.5 if r["output_1"] == r["output_2"] else prefer_longer(r) for r in records]
    lonely = write("lonely.json", [{"instruction": "a", "output": ["b", "c"]}, {"instruction": "d", "output": ["e"]}])
    refused(annotating(lonely, "--judge", "m", "--out", tmp_path / "no.json"), 2, "row 1 has no two outputs")


def test_a_completion_for_every_instruction(write, server, tmp_path):
    records = [{"instruction": f"Count to {i}.", "input": "Slowly." if i % 2 else "", "dataset": "d", "output": "old"}
               for i in range(30)]
    server.rule = lambda body, nth: body["messages"][-1]["content"].upper()
    argv = write("asked.json", records), "--complete", "writer", "--out", tmp_path / "answers.json"
    done = annotating(*argv)
    assert done.code == 0, done.err
    assert read_outputs(tmp_path / "answers.json") == [
        {"instruction": f"Count to {i}.", "input": "Slowly." if i % 2 else "", "dataset": "d", "generator": "writer",
         "output": f"COUNT TO {i}." + "\n\nSLOWLY." * (i % 2)} for i in range(30)]
    assert {body["model"] for body in server.requests} == {"writer"} and len(server.requests) == 30
    assert "30 answers are in" in done.out and annotating(*argv).code == 0 and len(server.requests) == 30


def test_a_completion_that_does_not_come_is_an_error_that_keeps_the_others(write, server, tmp_path):
    records = [{"instruction": f"Count to {i}."} for i in range(9)]
    too_long = 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, {}
    server.rule = lambda body, nth: too_long if "to 4." in body["messages"][0]["content"] else "one, two"
    argv = write("asked.json", records), "--complete", "writer", "--out", tmp_path / "answers.json"
    refused(annotating(*argv), 3, "1 of 9 instructions have no answer by writer \\(too long.*the others are kept")
    assert not (tmp_path / "answers.json").exists() and len(server.requests) == 9
    server.rule = lambda body, nth: "one, two"
    assert annotating(*argv).code == 0 and len(server.requests) == 10
    for name in ("barn", "me"):
        refused(annotating(argv[0], "--complete", name), 2, "that is a judge; name a model")
