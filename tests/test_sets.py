"""Data sets: the three kinds of file, AlpacaFarm's splits, and errors that name the file and the record."""
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import InputError, from_json, sets
from data.barn.world import demo
from data.sets import SHARES, demonstrations, load, preferences, read_records
from data.text import Text
from rlhf.config import BASE

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ALPACA = SHARED / "alpaca" / "alpaca_5000.json.gz"
DAVINCI = SHARED / "alpaca_eval" / "reference_text_davinci_003.json.gz"
needs_alpaca = pytest.mark.skipif(not (ALPACA.exists() and DAVINCI.exists()), reason="needs the real data")


def records(n, **changes):
    return [{"instruction": f"Say {i} é😀.", "input": "", "output": f"{i}\n", **changes} for i in range(n)]


def write(path, rows):
    """Write records in the form that the name of the file asks for."""
    lines = ".jsonl" in path.suffixes
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, ensure_ascii=False)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---- files ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.v1.json"])
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    assert read_records(write(tmp_path / name, records(30))) == records(30)
    assert read_records(str(tmp_path / name)) == records(30)


def test_a_value_may_have_fifty_levels():
    deepest = "[" * 50 + "]" * 50
    assert from_json("x", deepest) == json.loads(deepest) and from_json("x", '{"a": 1}') == {"a": 1}
    with pytest.raises(InputError, match="^x: not JSON .it is nested more than 50 levels deep.$"):
        from_json("x", f"[{deepest}]")


def test_empty_lines_between_records_are_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, records(3))) + "\n \n")
    assert read_records(tmp_path / "a.jsonl") == records(3)


GOOD = b'{"instruction": "a", "output": "b"}'
MALFORMED = {                                           # what is wrong: file, content, what the error says
    "empty": ("a.json", b"", "not JSON"),
    "cut": ("a.json", b"[" + GOOD, "not JSON"),
    "UTF-16": ("a.json", "[]".encode("utf-16"), "is not UTF-8: save it as UTF-8$"),
    "cp1252": ("a.jsonl", '{"instruction": "Grüße", "output": "x"}'.encode("cp1252"), "UTF-8: save it as UTF-8$"),
    "UTF-16, gzipped": ("a.json.gz", gzip.compress("[]".encode("utf-16")), "is not UTF-8: save it as UTF-8$"),
    "too deep": ("a.json", b"[" * 100_000, "JSON"),
    "lines in .json": ("a.json", GOOD + b"\n" + GOOD, "not JSON"),
    "no list": ("a.json", GOOD, "list of records"),
    "a number": ("a.json", b"3", "list of records"),
    "no records": ("a.json", b"[]", "records"),
    "no lines": ("a.jsonl", b"\n", "records"),
    "cut line": ("a.jsonl", GOOD + b"\n\n" + GOOD + b"\n{oops\n", "line 4|row 2"),
    "line without record": ("a.jsonl", GOOD + b"\n[]\n", "row 1 is no record"),
    "not gzipped": ("a.json.gz", b"[]", "gzip"),
    "cut gzip": ("a.json.gz", gzip.compress(b"[" + GOOD + b"]")[:-9], "."),
    "spoilt gzip": ("a.json.gz", gzip.compress(b"[]" * 99)[:10] + b"\xff" * 40, "."),
    "bad JSON in gzip": ("a.jsonl.gz", gzip.compress(b"{"), "JSON"),
    "no output": ("a.json", b"[" + GOOD + b', {"instruction": "a"}]', "row 1 .*'output'"),
    "a text as record": ("a.json", b"[" + GOOD + b', "text"]', "row 1 is no record, but 'text'"),
    "number as instruction": ("a.json", b'[{"instruction": 3, "output": "b"}]', "row 0 .*'instruction'"),
    "null as output": ("a.json", b'[{"instruction": "a", "output": null}]', "row 0 .*'output'"),
    "list as output": ("a.json", b'[{"instruction": "a", "output": ["b"]}]', "row 0 .*'output'"),
    "number as input": ("a.json", b'[{"instruction": "a", "input": 3, "output": "b"}]', "row 0 .*'input'"),
}


@pytest.mark.parametrize("name, content, complaint", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_named_and_the_record_too(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        read_records(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["nothing.json", "nothing.json.gz", "folder.json"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=f"{name}: (No such file|Is a directory)"):
        load(str(tmp_path / name))
    with pytest.raises(InputError, match=name):
        load("barn", str(tmp_path / name))


# ---- splits --------------------------------------------------------------------------------------------

def test_splits_are_alpacafarm_s_disjoint_and_always_the_same(tmp_path):
    path = str(write(tmp_path / "a.json", records(440)))
    splits = load(path)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "sft": 100, "preference": 100, "unlabeled": 200, "val": 20, "eval": 20}
    assert Counter(row["instruction"] for rows in splits.values() for row in rows) == Counter(
        row["instruction"] for row in records(440))
    assert load(path) == splits
    assert splits["sft"] != records(100)                # shuffled: files are often sorted by something


def test_a_reference_of_its_own_leaves_more_to_learn_from(tmp_path):
    data = write(tmp_path / "a.json", records(420))
    reference = write(tmp_path / "r.json", records(7, generator="r"))
    splits = load(str(data), str(reference))
    assert [len(splits[split]) for split in SHARES] == [100, 100, 200, 20]
    assert splits["eval"] == records(7, generator="r")
    assert load("barn", str(reference))["eval"] == splits["eval"]


def test_demo_is_the_second_evaluation_of_the_offline_world_and_of_no_other(tmp_path):
    assert [record["instruction"] for record in load("barn", "demo", 9)["eval"]] == [
        record["instruction"] for record in demo()[:9]]
    for data in ("alpaca_farm", str(write(tmp_path / "a.json", records(440)))):
        with pytest.raises(InputError, match="--eval_data demo is about the offline world"):
            load(data, "demo")


def test_records_get_an_empty_input_and_references_a_generator(tmp_path):
    path = write(tmp_path / "a.json", [{k: row[k] for k in ("instruction", "output")} for row in records(60)])
    splits = load(str(path))
    assert all(row["input"] == "" for rows in splits.values() for row in rows)
    assert all(row["generator"] for row in splits["eval"])


def test_demonstrations_without_an_output_teach_nothing(tmp_path):
    rows = [{**row, "output": row["output"] * (i % 4)} for i, row in enumerate(records(440))]
    splits = load(str(write(tmp_path / "a.json", rows)))
    assert 60 < len(splits["sft"]) < 90 and all(row["output"].strip() for row in splits["sft"])
    assert len(splits["preference"]) == 100             # only the instruction is used there


def test_limit_keeps_the_beginning_of_every_split(tmp_path):
    path = str(write(tmp_path / "a.json", records(440)))
    for data in (path, "barn"):
        whole, limited = load(data), load(data, limit=5)
        assert limited == {split: rows[:5] for split, rows in whole.items()}
        assert load(data, limit=10 ** 6) == whole


def test_too_few_records_name_the_split_that_is_empty(tmp_path):
    path = str(write(tmp_path / "few.json", records(5)))
    with pytest.raises(InputError, match="few.json: too few records.* val"):
        load(path)
    empty = str(write(tmp_path / "empty.json", records(100, output=" ")))
    with pytest.raises(InputError, match="empty.json: .*sft"):
        load(empty)


# ---- the real files ------------------------------------------------------------------------------------

@needs_alpaca
def test_the_real_alpaca_data_in_alpacafarm_s_splits():
    data = read_records(ALPACA)
    assert len(data) == 5000 and sum(not row["output"].strip() for row in data) == 2
    splits = load(str(ALPACA), str(DAVINCI))
    assert {split: len(rows) for split, rows in splits.items() if split != "sft"} == {
        "preference": 1190, "unlabeled": 2380, "val": 238, "eval": 805}
    assert 1188 <= len(splits["sft"]) <= 1190 and all(row["output"].strip() for row in splits["sft"])
    seen = [(row["instruction"], row["input"]) for split in SHARES for row in splits[split]]
    assert len(seen) == len(set(seen))


@needs_alpaca
def test_the_real_reference_is_davinci_s_answers_in_their_order():
    reference = load("barn", str(DAVINCI))["eval"]
    given = json.loads(gzip.decompress(DAVINCI.read_bytes()))
    assert [row["instruction"] for row in reference] == [row["instruction"] for row in given]
    assert [row["output"] for row in reference] == [row["output"] for row in given]
    assert all(row["generator"] and row["input"] == "" for row in reference)        # the file has neither


# ---- what others write ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("input", [None, float("nan")])
def test_a_cell_without_a_value_is_an_empty_input(tmp_path, name, input):
    path = write(tmp_path / name, records(3, input=input))
    assert read_records(path) == records(3)
    assert demonstrations(path) == records(3)


def turns(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def hh(*said):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(said))


PAIR = {"instruction": "Hi there", "output_1": "good one", "output_2": "bad", "preference": 1}
FORMS = {
    "HH-RLHF": lambda *asked: {name: hh(*asked, answer) for name, answer in (("chosen", "good one"),
                                                                             ("rejected", "bad"))},
    "UltraFeedback": lambda *asked: {
        "prompt": asked[0], "prompt_id": "0a", "chosen": turns(*asked, "good one"), "rejected": turns(*asked, "bad"),
        "messages": turns(*asked, "good one"), "score_chosen": 8.5, "score_rejected": 4.0},
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_others_are_pairs_and_demonstrations(tmp_path, capsys, form, name):
    """Conversations of several turns are left out, and counted once, not refused."""
    row = FORMS[form]
    rows = [row("Hi there"), row("Hi there", "Yes?", "Go on"), *(row(f"{i}") for i in range(99))]
    path = write(tmp_path / name, rows)
    pairs = preferences(path)
    assert len(pairs) == 100 and pairs[0] == {"input": "", **PAIR}
    assert preferences(path) == pairs
    learned = demonstrations(path)
    assert learned[0] == {"instruction": "Hi there", "input": "", "output": "good one"} and len(learned) == 100
    assert capsys.readouterr().out == f"1 of 101 rows of {name} are of several turns: left out\n"
    assert {record["output"] for record in load(str(path))["sft"]} == {"good one"}


def test_a_system_message_is_a_turn_of_its_own(tmp_path, capsys):
    system = [{"role": "system", "content": "Be brief."}]
    row = {"chosen": system + turns("Hi", "a"), "rejected": system + turns("Hi", "b")}
    path = write(tmp_path / "a.json", [row, FORMS["HH-RLHF"]("Hi there")])
    assert preferences(path) == [{"input": "", **PAIR}] and "1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="no pair"):
        preferences(write(tmp_path / "b.json", [row]))


@pytest.mark.parametrize("scores", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_equal_scores_are_a_tie(tmp_path, capsys, scores):
    row = FORMS["HH-RLHF"]
    rows = [{**row(f"{i}"), scores[0]: 5.0, scores[1]: 5.0 - i % 2} for i in range(4)]
    assert [pair["instruction"] for pair in preferences(write(tmp_path / "a.json", rows))] == ["1", "3"]
    assert "2 of 4 pairs are ties" in capsys.readouterr().out


@pytest.mark.parametrize("row, said", [
    ({"chosen": "no turns", "rejected": "at all"}, "row 1: expected a prompt and an answer"),
    ({"chosen": hh("a", "b", "c"), "rejected": hh("a", "b")}, "row 1: .* end with the assistant's"),
    ({"chosen": hh("a", "b"), "rejected": hh("c", "b")}, "row 1: .*the same prompt"),
    ({"chosen": "words" + hh("a", "b"), "rejected": hh("a", "b")}, "row 1: expected"),
    ({"chosen": [{"role": "user", "content": 3}, *turns("a", "b")], "rejected": hh("a", "b")}, "row 1: expected"),
    ({"instruction": "a"}, "row 1 has no text under 'output'")])
def test_a_malformed_row_of_others_is_named(tmp_path, row, said):
    path = write(tmp_path / "a.json", [FORMS["HH-RLHF"]("Hi"), row])
    with pytest.raises(InputError, match=f"a.json: {said}"):
        demonstrations(path)


# ---- pairs for others ----------------------------------------------------------------------------------

def run_with_pairs(folder, stage="pairs"):
    pairs = [{**PAIR, "input": "you", "seed": "/0", "ids_1": [1], "ids_2": [2]}, {**PAIR, "preference": 2}]
    (folder / stage).mkdir(parents=True)
    write(folder / stage / "pairs.json", pairs)
    return folder


def test_the_pairs_of_a_run_are_exported_for_trl(tmp_path):
    out = tmp_path / "pairs.jsonl"
    for run in (run_with_pairs(tmp_path / "run"), tmp_path / "run" / "pairs"):
        line = [sys.executable, "-m", "data.sets", "--export", str(out), str(run)]
        ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"2 pairs are in {out}\n", "")
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [turns("Hi there\n\nyou"), turns("Hi there")]
        assert [row["chosen"][0]["content"] for row in rows] == ["good one", "bad"]
        assert [row["rejected"][0]["content"] for row in rows] == ["bad", "good one"]
    assert [pair["output_1"] for pair in preferences(out)] == ["good one", "bad"]       # and they come back
    run_with_pairs(tmp_path / "run", "pairs_b")
    with pytest.raises(InputError, match="several stages with pairs: choose one, as in"):
        sets.main(["--export", str(out), str(tmp_path / "run")])
    with pytest.raises(InputError, match="has no pairs: give a run folder"):
        sets.main(["--export", str(out), str(tmp_path)])


def test_trl_trains_on_exported_pairs(tmp_path):
    """DPOTrainer's own preparation: the prompt is the template's, and each answer ends in its end of turn."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    sets.main(["--export", str(tmp_path / "pairs.jsonl"), str(run_with_pairs(tmp_path / "run"))])
    data = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train",
                                 cache_dir=str(tmp_path / "cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    arguments = trl.DPOConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    text = Text(BASE)
    for row, pair in zip(trainer.train_dataset, preferences(tmp_path / "pairs.jsonl")):
        prompt, chosen = text.example(pair, pair["output_1"])
        assert row["prompt_ids"] == prompt and row["chosen_ids"] == chosen
        assert row["rejected_ids"] == text.example(pair, pair["output_2"])[1]
