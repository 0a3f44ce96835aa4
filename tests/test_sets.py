"""Data sets: the three kinds of file, AlpacaFarm's splits, and errors that name the file and the record."""
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from data import InputError
from data.sets import SHARES, load, read_records

SHARED = Path(__file__).parents[2] / "shared"
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


def test_empty_lines_between_records_are_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, records(3))) + "\n \n")
    assert read_records(tmp_path / "a.jsonl") == records(3)


GOOD = b'{"instruction": "a", "output": "b"}'
MALFORMED = {                                           # what is wrong: file, content, what the error says
    "empty": ("a.json", b"", "not JSON"),
    "cut": ("a.json", b"[" + GOOD, "not JSON"),
    "no text": ("a.json", b"\xff\xfe[]", "not JSON"),
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
