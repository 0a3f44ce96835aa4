"""The study of cost: tokens and dollars by hand, and its command."""
import functools
import json

import pytest
from commands import command, refused

import annotate
from data.judges.prompts import Annotator
from studies import cost
from studies.cost import TIERS, dollars, judges, per_thousand

farm = functools.partial(command, "farm.py")
PAIRS = [{"instruction": f"Say {i}.", "input": "", "output_1": "one " * i, "output_2": "two " * i}
         for i in range(1, 301)]


def test_tokens_by_hand(monkeypatch):
    """One annotator, one pair in a request: what is around the texts, which is the same each time, and the texts."""
    monkeypatch.setattr(annotate, "pool", lambda judge, kind: [Annotator("x", "mid", "pairwise", max_tokens=7)])
    found, longer = (per_thousand([{**pair, "output_1": pair["output_1"] + more} for pair in PAIRS], "p_eval", [0])
                     for more in ("", "12345678"))
    assert found["requests"] == pytest.approx(1000) and found["coins"] == 0
    assert found["reply"] == pytest.approx({"big": 0, "mid": 7000, "small": 0})
    assert longer["prompt"]["mid"] - found["prompt"]["mid"] == pytest.approx(2 * 1000)  # two tokens more in each
    texts = sum(len(pair["instruction"] + pair["output_1"] + pair["output_2"]) for pair in PAIRS) / 300 / 4
    assert texts < found["prompt"]["mid"] / 1000 < texts + 500


def test_coins_cost_nothing_and_a_batch_shares_its_prompt():
    found = {kind: per_thousand(PAIRS, kind, [0, 1]) for kind in annotate.POOLS}
    assert found["p_ann"]["coins"] == pytest.approx(500, abs=60) and found["p_eval"]["coins"] == 0
    share = sum(found["p_ann"]["prompt"].values()) / sum(found["p_eval"]["prompt"].values())
    assert share == pytest.approx(1 - found["p_ann"]["coins"] / 1000, abs=.06)
    assert [found[kind]["requests"] for kind in ("p_single", "p_pairwise")] == pytest.approx([200, 1000])
    assert min(found["p_eval"]["prompt"].values()) > 0 == found["p_single"]["prompt"]["small"]


def test_dollars_by_hand():
    tokens = {"prompt": dict(zip(TIERS, (1e6, 2e6, 3e6))), "reply": dict(zip(TIERS, (1e5, 0, 1e6)))}
    price = {"a": (2, 10), "b": (1, 1), "c": (.1, .5)}.get
    assert dollars(tokens, ("a", "b", "c"), price) == pytest.approx(2 + 1 + 2 + .3 + .5)
    assert dollars(tokens, ("a", "a", "a"), price) == pytest.approx(12 + 11)


def test_a_judge_is_one_model_or_three_or_all_that_have_a_price():
    price = {"a": (1, 1), "b": (1, 1), "c": (1, 1)}.get
    assert judges("a", price) == {"a": ("a", "a", "a")} and judges("a,b,c", price) == {"a,b,c": ("a", "b", "c")}
    listed = judges("barn", price)
    assert judges("", price) == listed                  # as with --data alpaca_farm, which has no judge of its own
    assert len(listed) > 20 and "shutdown" not in listed


def test_the_command(tmp_path):
    out = ("--study", "cost", "--quick", "--out", tmp_path)
    refused(farm(*out, "--judge", "mine"), 2, "the price of mine is not in .*give --price IN,OUT")
    refused(farm(*out, "--judge", "a,b"), 2, "one model, or three")
    refused(farm(*out, "--price", "1,2"), 2, "name it with --judge MODEL")
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(PAIRS))
    ran = farm(*out, "--judge", "mine", "--price", "4,20", "--pairs", file)
    assert ran.code == 0 and not ran.err and max(map(len, ran.out.splitlines()[:-1])) <= 80, ran.err
    (row,), numbers = (found := json.loads((tmp_path / "quick" / "cost.json").read_text())["numbers"])["dollars"], found
    tokens = numbers["tokens"]["p_ann"]
    expected = (4 * sum(tokens["prompt"].values()) + 20 * sum(tokens["reply"].values())) / 1e6
    assert numbers["pairs"] == 300 and row["p_ann"] == pytest.approx(expected)
    assert row["study"] == pytest.approx(10 * row["p_ann"] + .805 * row["p_eval"])
    assert row["times_cheaper"] == pytest.approx(cost.PEOPLE / row["p_ann"])
