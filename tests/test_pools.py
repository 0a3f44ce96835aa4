"""The user's own annotators: what a pool's file may say, what is refused, and that they are asked as written."""
import functools
import json
from collections import Counter

import pytest
from commands import command, refused, said
from judged import make_pairs, prefer_longer, preferences

from annotate import pool
from data import InputError
from data.judges.pools import read_pool
from data.judges.prompts import Annotator

MINE = {"verdict": "numbered", "pair": ["Pair {n}", "", "<<<{fence} instruction", "{instruction}", "{fence}>>>", "",
                                        "<<<{fence} output (a)", "{output_1}", "{fence}>>>", "",
                                        "<<<{fence} output (b)", "{output_2}", "{fence}>>>"],
        "messages": [{"role": "system", "content": "You are strict."},
                     {"role": "user", "content": ["{number} pairs:", "", "{pairs}", "", "One line for each."]}]}
STRICT = {"name": "strict", "model": "large", "prompt": "prompts/mine.json", "batch": 5, "temperature": .5,
          "max_tokens": 60}
QUICK = {"name": "quick", "model": "little"}
annotating = functools.partial(command, "annotate.py")


@pytest.fixture
def write(tmp_path):
    """write(annotators, prompt) -> the path of a pool whose prompt lies in a folder beside it."""
    def write(annotators, prompt=MINE):
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / "mine.json").write_text(prompt if isinstance(prompt, str) else json.dumps(prompt))
        (tmp_path / "pool.json").write_text(json.dumps(annotators))
        return str(tmp_path / "pool.json")
    return write


def test_a_pool_is_what_its_file_says(write, tmp_path):
    path = write([STRICT, QUICK, {"name": "open", "prompt": "criteria"}])
    prompt = str(tmp_path / "prompts" / "mine.json")
    assert read_pool(path, "some") == [Annotator("strict", "large", prompt, 5, .5, 60, path),
                                       Annotator("quick", "little", "pairwise", 1, 0, 16, path),
                                       Annotator("open", "some", "criteria", 1, 0, 16, path)]
    assert pool("serve:x", path)[2].model == "serve:x"
    assert [one.pool for one in pool("m", "p_single")] == ["p_single"]


MISTAKES = [
    ("not a list", {"name": "x"}, MINE, "expected a list"),
    ("empty", [], MINE, "expected a list"),
    ("no name", [{"model": "m"}], MINE, "row 0 has no text under 'name'"),
    ("no model", [{"name": "x"}], MINE, r"row 0 \(x\) has no 'model' \(--judge MODEL"),
    ("unknown key", [QUICK, {**STRICT, "temprature": 1}], MINE,
     r"row 1 \(strict\) has an unknown key 'temprature': did you mean temperature\?"),
    ("a batch of text", [{**STRICT, "batch": "5"}], MINE, "'batch' must be a number of pairs from 1, not '5'"),
    ("a batch of truth", [{**STRICT, "batch": True}], MINE, "'batch' must be"),
    ("no tokens", [{**STRICT, "max_tokens": 0}], MINE, "'max_tokens' must be a number of tokens from 1, not 0"),
    ("too hot", [{**STRICT, "temperature": 3}], MINE, "'temperature' must be a number from 0 to 2, not 3"),
    ("a model of numbers", [{**STRICT, "model": 4}], MINE, "'model' must be a text, not 4"),
    ("no name at all", [{**STRICT, "name": " "}], MINE, "'name' must be a text"),
    ("twice", [STRICT, QUICK, STRICT], MINE, r"row 2 \(strict\) is not the only one of this name"),
    ("no such prompt", [{**STRICT, "prompt": "theirs.json"}], MINE, "there is no prompt 'theirs.json'.*pairwise"),
    ("no prompt", [{**STRICT, "prompt": "prices"}], MINE, "there is no prompt 'prices'"),
    ("one letter for five", [{**STRICT, "prompt": "pairwise"}], MINE, "a batch of 5 pairs needs the place {n}"),
    ("no number", [STRICT], {**MINE, "pair": [line for line in MINE["pair"] if "{n}" not in line]}, "the place {n}"),
    ("letter", [STRICT], {**MINE, "verdict": "letter"}, "another 'verdict' than one letter"),
    ("verdict", [STRICT], {**MINE, "verdict": "logprobs"}, "'verdict' must be one of letter, numbered, json"),
    ("not JSON", [STRICT], "{", "mine.json: not JSON"),
    ("no object", [STRICT], [], "mine.json is no object"),
    ("no pair", [STRICT], {key: MINE[key] for key in ("messages", "verdict")}, "mine.json has no 'pair'"),
    ("prompt's key", [STRICT], {**MINE, "pairs": ""}, "unknown key 'pairs': did you mean pair"),
    ("no messages", [STRICT], {**MINE, "messages": []}, "'messages' must be a list of messages"),
    ("message", [STRICT], {**MINE, "messages": ["{pairs}"]}, "message 0 is no object"),
    ("role", [STRICT], {**MINE, "messages": [{"role": "judge", "content": "{pairs}"}]}, "'role' must be system"),
    ("content", [STRICT], {**MINE, "messages": [{"role": "user"}]}, "message 0 has no 'content'"),
    ("content of numbers", [STRICT], {**MINE, "messages": [{"role": "user", "content": [1]}]}, "'content' must be"),
    ("no pairs", [STRICT], {**MINE, "messages": MINE["messages"][:1]}, "must have the place {pairs}, once"),
    ("pairs twice", [STRICT], {**MINE, "messages": MINE["messages"][1:] * 2}, "{pairs}, once, and no other"),
    *[(f"no {place}", [STRICT], {**MINE, "pair": [line.replace(place, "") for line in MINE["pair"]]},
       f"'pair' must have the place {place}") for place in ("{instruction}", "{output_1}", "{output_2}", "{fence}")],
]


@pytest.mark.parametrize("annotators, prompt, sentence", [case[1:] for case in MISTAKES], ids=[x[0] for x in MISTAKES])
def test_a_sentence_for_every_mistake(write, annotators, prompt, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        read_pool(write(annotators, prompt))
    assert "\n" not in str(error.value)


def test_own_annotators_are_asked_as_they_are_written(write, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.rule = lambda body, nth: said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b")
    path, pairs = write([STRICT, QUICK]), make_pairs(40)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    done = annotating(tmp_path / "pairs.json", "--pool", path, "--out", tmp_path / "out.json")
    assert done.code == 0, done.err
    records = json.loads((tmp_path / "out.json").read_text())
    assert preferences(records) == [prefer_longer(pair) for pair in pairs]          # and none is flipped
    asked = Counter((body["model"], body["temperature"], body["max_tokens"]) for body in server.requests)
    share = Counter(record["annotator"] for record in records)
    assert share.keys() == {"strict", "quick"}
    assert asked == {("large", .5, 60): -(-share["strict"] // 5), ("little", 0, 16): share["quick"]}
    strict = next(body for body in server.requests if body["model"] == "large")
    assert strict["messages"][0] == {"role": "system", "content": "You are strict."}
    assert strict["messages"][1]["content"].startswith("5 pairs:\n\nPair 1\n\n<<<")


def test_own_annotators_from_eval_and_what_does_not_go_with_them(write, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.rule = lambda body, nth: said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b")
    path, files = write([STRICT, QUICK]), []
    for key in ("output_1", "output_2"):
        files.append(tmp_path / f"{key}.json")
        files[-1].write_text(json.dumps([{"instruction": pair["instruction"], "output": pair[key], "generator": key}
                                         for pair in make_pairs(10)]))
    argv = "eval.py", "--outputs", files[1], "--reference", files[0], "--out", tmp_path / "eval"
    done = command(*argv, "--pool", path)
    assert done.code == 0, done.err
    judged = json.loads((tmp_path / "eval" / "output_2" / "annotations.json").read_text())
    assert preferences(judged) == [prefer_longer(pair) for pair in make_pairs(10)]
    refused(command(*argv, "--pool", "p_all"), 2, "--pool p_all: choose p_ann, .*or a file of annotators")
    refused(command(*argv, "--pool", "p_ann", "--judge", "m"), 2, "p_ann flips labels")
    refused(command(*argv, "--pool", "none.json"), 2, "none.json: No such file")
    for judge in ("barn", "a,b,c"):
        refused(command(*argv, "--pool", path, "--judge", judge), 2, "does not go with the annotators")


def test_own_annotators_label_and_evaluate_a_farm_run(write, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.rule = lambda body, nth: said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b")
    path = write([STRICT, QUICK])
    argv = "farm.py", "--method", "dpo", "--limit", 8, "--max_new_tokens", 8, "--out", tmp_path / "run", "--pool"
    done = command(*argv, path)
    assert done.code == 0, done.err
    for file in ("pairs/pairs.json", "dpo/annotations.json"):
        records = json.loads((tmp_path / "run" / file).read_text())
        assert {record["annotator"] for record in records} <= {"strict", "quick"}
        assert {(record["judge"], record["pool"]) for record in records} == {(path, path)}
    assert {body["model"] for body in server.requests} == {"large", "little"}
    refused(command(*argv, "p_all"), 2, "--pool .p_all. is not known")
