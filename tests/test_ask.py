"""serve.py --ask and --compare: what the terminal shows of one checkpoint, and of two side by side."""
import copy
import gc
import io
import weakref

import pytest
import tiny
import toy
from commands import command, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve import stage

from rlhf import ask, policy, sampler
from stats.side_by_side import columns

QUESTIONS = [toy.sentence(ids) for ids in tiny.texts([3, 9, 5])]
HALF = 39                               # columns of each side


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stage with an adapter, and beside it one with another adapter of the same base."""
    cfg = stage(tmp_path_factory.mktemp("run"), "lora")
    other, changed = policy.load(cfg, "sft"), copy.copy(cfg)
    toy.moved(other.trainable(), 9)
    changed.stage = "changed"
    changed.dir().mkdir()
    policy.save(other, changed)
    (changed.dir() / "config.json").write_text((cfg.dir() / "config.json").read_text())
    return cfg, changed


def asked(checkpoint, prompts, n=1, **how):
    """What the sampler writes for the prompts, n answers to each."""
    opened, cfg, _ = policy.open_checkpoint(checkpoint)
    text = cfg.text()
    ids = [text.prompt({"instruction": prompt}) for prompt in prompts]
    rows = [text.decode(response) for _, response in sampler.sample(opened, ids, text.stops, 8, n=n, **how)]
    return [rows[i:i + n] for i in range(0, len(rows), n)]


def sides(text):
    """[(prompt, [(whose, answer) left, right])] of the printed comparison."""
    assert all(len(line) <= 80 and line == line.rstrip() for line in text.splitlines())
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and set(lines[1]) == {"-", " "}:
            halves = ([line[:HALF].rstrip() for line in lines], [line[HALF + 2:] for line in lines])
            found[-1][1].append([(head, " ".join(rest).strip()) for head, _, *rest in halves])
        else:
            found.append((block.partition(". ")[2], []))
    return found


def compared(run, *argv):
    one, other = (str(cfg.dir()) for cfg in run)
    done = command("serve.py", one, "--compare", other, "--max_new_tokens", 8, *argv)
    assert (done.code, done.err) == (0, "")
    return sides(done.out)


def test_one_prompt_with_several_answers(run):
    ((prompt, pairs),) = compared(run, "--ask", QUESTIONS[0], "--n", 3, "--seed", 4)
    before, after = (asked(cfg.dir(), [QUESTIONS[0]], 3, seed=4)[0] for cfg in run)
    assert prompt == QUESTIONS[0] and before != after
    assert [[said or "(nothing)" for said in both] for both in zip(before, after)] == \
        [[text for _, text in pair] for pair in pairs]
    assert {pair[0][0][-3:] for pair in pairs} == {"sft"} and {pair[1][0][-7:] for pair in pairs} == {"changed"}


def test_each_line_of_standard_input_is_a_prompt(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([QUESTIONS[0], "", *QUESTIONS[1:]]) + "\n"))
    found = compared(run, "--ask", "-", "--temperature", 0)
    assert [prompt for prompt, _ in found] == QUESTIONS
    before, after = (asked(cfg.dir(), QUESTIONS, temperature=0) for cfg in run)
    assert [[text for _, text in pair] for _, (pair,) in found] == \
        [[one or "(nothing)", two or "(nothing)"] for (one,), (two,) in zip(before, after)]


def test_a_base_that_both_adapt_is_loaded_once(run, monkeypatch):
    loaded, load = [], policy.load_base
    monkeypatch.setattr(policy, "load_base", lambda cfg, *how: loaded.append(str(cfg.checkpoint)) or load(
        cfg, *how))
    sft, changed = (str(cfg.dir()) for cfg in run)
    base = run[0].model
    expected = {checkpoint: asked(checkpoint, QUESTIONS, temperature=0) for checkpoint in (sft, changed, base)}
    seen = []
    monkeypatch.setattr(ask, "columns", lambda left, right: seen.append((left[1], right[1])) or "")
    for one, other in ((sft, changed), (sft, base), (base, sft)):
        loaded.clear()
        seen.clear()
        ask.compare(one, other, QUESTIONS, temperature=0, max_new_tokens=8)
        assert loaded == [base]
        assert seen == [(a, b) for (a,), (b,) in zip(expected[one], expected[other])]


def test_checkpoints_that_share_nothing_are_not_in_memory_together(run, monkeypatch):
    alive, load = [], policy.load_base

    def watched(*how):
        gc.collect()
        assert not [one for one in alive if one()]
        gpt = load(*how)
        alive.append(weakref.ref(gpt))
        return gpt
    monkeypatch.setattr(policy, "load_base", watched)
    ask.compare(str(run[0].dir()), "barn", ["w1"], max_new_tokens=2)
    assert len(alive) == 2


@pytest.mark.parametrize("flags", [("--top_k", 1), ("--top_p", 0), ("--min_p", 1)])
def test_only_the_likeliest_token_is_asked_for(run, flags):
    drawn = command("serve.py", run[0].dir(), "--ask", QUESTIONS[0], *flags)
    greedy = command("serve.py", run[0].dir(), "--ask", QUESTIONS[0], "--temperature", 0)
    assert drawn.code == 0 and drawn.out == greedy.out


@pytest.mark.parametrize("flags, said", [
    (("--compare", "barn"), "--compare would change nothing without --ask"),
    (("--ask", "x", "--until_eof"), "--until_eof would change nothing with --ask"),
    (("--ask", "x", "--top_p", 1.1), "--top_p and --min_p must be from 0 to 1"),
    (("--ask", "x", "--top_k", -1), "--top_k 0 or more"),
    (("--ask", "-", "--compare", "barn"), "standard input has no prompt"),
    (("--ask", "x", "--compare", "nowhere/at all"), "there is no folder nowhere/at all")])
def test_flags_that_make_no_sense(flags, said, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused(command("serve.py", "barn", *flags), 2, said)


TEXTS = st.text(alphabet="ab \n\t\u00e9", max_size=200)


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_columns_hold_all_words_of_both(left, right):
    lines = columns(("one", left), ("a/very/long/path" * 5, right)).splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("one") and len(lines[0]) == 80
    for side, text in ((slice(HALF), left), (slice(HALF + 2, None), right)):
        words = "".join(line[side] for line in lines[2:]).split()
        assert "".join(words) == ("".join(text.split()) or "(nothing)")
