"""Models that think before they answer: a thought has room of its own, servers tell it apart, judges are read."""
import json

import pytest
import toy
import torch
from commands import command
from test_serve import HELLO, events, post

import annotate
import serve
from data import InputError
from data.text import parted
from rlhf import policy, sft, writer

torch.set_num_threads(1)
TEMPLATE = "{{ messages[0].content }}{% if add_generation_prompt %} <think> {% endif %}"
WORDS = {"w10": "<think>", "w11": "</think>", "w12": "Output", "w13": "(a)"}
THOUGHT = list(range(20, 28))
SAID = [*THOUGHT, 11, 12, 13, 0]        # eight words, </think> Output (a), and the end


@pytest.fixture
def stage(tmp_path):
    """A finished stage of a model whose template opens a thought: six tokens for an answer, nine for a thought."""
    toy.base(tmp_path, TEMPLATE, **WORDS)
    cfg = toy.settings(tmp_path, "full", sft.Config, max_thought_tokens=9)
    policy.save(policy.fresh(cfg, "sft"), cfg)
    settings = {"id": "an id", "needs": {}, "seed": 0, "max_new_tokens": 6, "max_thought_tokens": 9}
    (cfg.dir() / "config.json").write_text(json.dumps(settings))
    return cfg


@pytest.fixture
def url(stage, monkeypatch):
    """A server of that stage, which always writes SAID."""
    script = torch.tensor(SAID + [40] * 9000)
    monkeypatch.setattr(writer.ServingEngine, "choose", lambda self, logits, row, at: script[at])
    with serve.serving(stage.dir(), slots=4) as url:
        yield url


def test_a_thought_is_no_part_of_the_content(url):
    reply = post(url, **HELLO).json()
    message = reply["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Output (a)", "reasoning_content": toy.sentence(THOUGHT)}
    assert reply["choices"][0]["finish_reason"] == "stop" and reply["usage"]["completion_tokens"] == len(SAID)
    deltas = [choice["delta"] for event in events(post(url, **HELLO, stream=True)) for choice in event["choices"]]
    assert "".join(delta["content"] for delta in deltas) == "Output (a)"
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert "".join(thoughts) == toy.sentence(THOUGHT) and len(thoughts) > 1


def test_a_thought_that_is_cut_off_leaves_no_content(url):
    choice = post(url, **HELLO, max_tokens=3).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("", "w20 w21 w22")


def test_completions_are_raw(url):
    choice = post(url, "/completions", prompt="w1 <think>", max_tokens=20).json()["choices"][0]
    assert choice["text"].split() == [*toy.sentence(THOUGHT).split(), "</think>", "Output", "(a)"]
    assert post(url, "/completions", prompt="w1").json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("kind", ["p_single", "p_pairwise"])
def test_a_judge_that_thinks_gives_verdicts(kind, url, judge, stage):
    pairs = [{"instruction": "w1", "output_1": f"w{i}", "output_2": "w5"} for i in range(30, 34)]
    with_thought = judge(url=url, brief="none", workers=1)
    records = annotate.annotate(pairs, annotate.pool(str(stage.dir()), kind), with_thought, flip=0)
    assert {record["scored_by"] for record in records} == {"text"}
    assert all(record["preference"] == 1 + record["is_switched"] for record in records)    # the one shown first


def test_one_question_has_room_for_a_thought_and_shows_none(stage, monkeypatch):
    limits = []

    def scripted(model, prompts, stops, limit, *how, **more):
        limits.append(limit)
        return [(prompts[0], SAID[:-1])]            # its end is a word in this vocabulary
    monkeypatch.setattr("rlhf.ask.sample", scripted)
    assert command("serve.py", stage.dir(), "--ask", "w1").out == "Output (a)\n"
    command("serve.py", stage.dir(), "--ask", "w1", "--max_new_tokens", 4)
    text = command("serve.py", stage.dir(), "--ask", "w1", "--form", "text").out
    assert limits == [[6 + 9], [4 + 9], [6]] and text.startswith("w20 w21")


def test_the_context_has_to_hold_the_thought_too(stage):
    context = policy.load_base(stage).config.max_position_embeddings
    stage.max_prompt_tokens = context - 6 - 9
    assert policy.fresh(stage, "sft")
    stage.max_prompt_tokens += 1
    with pytest.raises(InputError, match=f"may take {context + 1}: lower --max_prompt_tokens, --max_thought_tokens or"):
        policy.fresh(stage, "sft")


@pytest.mark.parametrize("written, opened, thought, answer", [
    ("A cow. ", False, "", "A cow."), (" <think>hm</think>\nA cow.", False, "hm", "A cow."),
    ("hm</think>A cow.</think>", True, "hm", "A cow.</think>"), ("<think>hm", True, "hm", ""),
    ("A <think>cow</think>.", False, "", "A <think>cow</think>.")])
def test_where_a_thought_ends(written, opened, thought, answer):
    assert parted(written, opened) == (thought, answer)
