"""Methods that imitate: FeedME, reward conditioning, SFT on more demonstrations; and the words that mark a prompt."""
import json

import pytest
import tiny
import torch
import toy
from quick import few

from data.text import Text
from rlhf import answers, feedme, logprobs, policy, reward_conditioning, sft, sft_more
from rlhf.config import BASE

torch.set_num_threads(1)
GOOD, BAD = 11, 12                      # the toy's words for them


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders whose stages sft and pairs are done, for both kinds of training."""
    return toy.run_folders(tmp_path_factory, pairs=True)


@pytest.fixture(autouse=True)
def marks(monkeypatch):
    monkeypatch.setattr(reward_conditioning, "GOOD", f"w{GOOD} ")
    monkeypatch.setattr(reward_conditioning, "BAD", f"w{BAD} ")


def ran(folders, kind, method, **changes):
    """(settings, metrics of each step, what run() returned)."""
    usual = {"lr": 1e-2, "epochs": 6, "batch_size": 20, "max_new_tokens": 8}
    cfg = toy.settings(folders[kind], kind, method.Config, **usual | changes)
    result = method.run(cfg)
    return cfg, toy.lines(cfg), result


def sides(pairs):
    """(chosen, rejected) answers of toy pairs, each (prompt, response)."""
    found = [], []
    for pair in pairs:
        prompt = [int(word[1:]) for word in pair["instruction"].split()]
        for side, i in zip(found, (pair["preference"], 3 - pair["preference"])):
            side.append((prompt, pair[f"ids_{i}"]))
    return found


# --- FeedME ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", toy.KINDS)
def test_feedme_imitates_the_preferred_answers_from_the_sft_model_on(kind, folders):
    """The first loss is the mean over all tokens of the chosen answers; a small learning rate changes it a little."""
    cfg, metrics, result = ran(folders, kind, feedme)
    start, (chosen, _) = policy.load(cfg, "sft"), sides(toy.preferences(40))
    _, first, _ = ran(folders, kind, feedme, batch_size=40, epochs=1, micro_batch_tokens=60)
    with torch.no_grad():
        nll = -sum(logprobs.token_logps(start, *logprobs.pack([row])).sum().item() for row in chosen)
    assert first[0]["loss"] == pytest.approx(nll / sum(len(response) for _, response in chosen), rel=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - .5 and result["objective/kl"] > .1


@pytest.mark.parametrize("kind", toy.KINDS)
def test_feedme_prefers_what_is_preferred(kind, folders):
    """The trained policy's log-probs tell preferred from other answers by more than the SFT model's."""
    cfg, _, _ = ran(folders, kind, feedme)
    margins = []
    for model in (policy.load(cfg, "sft"), policy.open_checkpoint(cfg.dir() / "checkpoint")[0]):
        chosen, rejected = (answers.logps(model, side, cfg) for side in sides(toy.preferences(40)))
        margins.append((chosen - rejected).mean().item())
    assert margins[1] > margins[0] + 2, margins


# --- reward conditioning --------------------------------------------------------------------------------

def test_chosen_answers_are_marked_good_and_rejected_ones_bad(folders):
    cfg = toy.settings(folders["full"], "full", reward_conditioning.Config)
    chosen, rejected = sides(toy.preferences(40))
    assert reward_conditioning.conditioned(cfg, toy.text(cfg)) == [
        ([mark, *prompt], response) for mark, side in ((GOOD, chosen), (BAD, rejected)) for prompt, response in side]


@pytest.mark.parametrize("kind", few(toy.KINDS, "full"))
def test_the_mark_decides_what_is_answered(kind, folders, monkeypatch):
    """Whether an answer is of the good kind: asked under the mark "good" it is likelier than under "bad"."""
    asked, real = [], answers.generate
    monkeypatch.setattr(answers, "generate", lambda *args, **kind: asked.append(args[1]) or real(*args, **kind))
    cfg, metrics, result = ran(folders, kind, reward_conditioning, epochs=12)
    trained = policy.open_checkpoint(cfg.dir() / "checkpoint")[0]
    means = []
    for side in sides(toy.preferences(40)):
        under = [answers.logps(trained, [([mark, *prompt], response) for prompt, response in side], cfg)
                 for mark in (GOOD, BAD)]
        means.append((under[0] - under[1]).mean().item())
    assert means[0] > 1 and means[1] < -1
    assert metrics[-1]["loss"] < metrics[0]["loss"] and result["objective/kl"] > .1
    assert all(prompt[0] == GOOD for prompts in asked for prompt in prompts)
    written = json.loads((cfg.dir() / "outputs.json").read_text())
    assert [record["instruction"] for record in written] == [r["instruction"] for r in cfg.splits()["eval"]]


@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_reference_is_asked_without_the_mark(kind, folders, monkeypatch):
    """The KL by brute force, of a policy that is the reference itself: only the mark moves its answers."""
    rows, real = [], answers.generate
    monkeypatch.setattr(answers, "generate", lambda *args, **kind: rows.extend(real(*args, **kind)) or rows)
    cfg = toy.settings(folders[kind], kind, reward_conditioning.Config)
    ref, text = policy.load(cfg, "sft"), toy.text(cfg)
    metrics = answers.answer(ref, text.marked("w11 "), cfg, ref, text)
    kl = []
    for prompt, response in rows[0]:                    # behind them are their log-probs
        with torch.no_grad():
            marked, plain = (tiny.plain_logps(ref, *logprobs.pack([(each, response)])).sum().item()
                             for each in (prompt, prompt[1:]))
        kl.append(marked - plain)
    assert prompt[0] == GOOD and metrics["objective/kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert metrics["objective/kl"] > .01


def test_a_mark_stands_in_front_of_the_instruction_and_nowhere_else():
    text = Text(BASE)
    good = text.marked("good: ")
    assert good.render("Add up.", "2 3") == "<user>good: Add up.\n\n2 3<assistant>"
    assert text.render("Add up.") == "<user>Add up.<assistant>" and good.marked("").render("Hi") == text.render("Hi")
    record = {"instruction": "Describe a pony."}
    assert good.example(record, "It is small.") == (good.prompt(record), text.example(record, "It is small.")[1])


# --- SFT on more demonstrations -------------------------------------------------------------------------

def test_sft_more_imitates_the_demonstrations_of_three_splits(folders, monkeypatch):
    """Each of sft, preference and unlabeled once, none of val or eval, and none that is empty."""
    seen = []
    monkeypatch.setattr(sft, "train", lambda model, rows, *args: seen.append(rows) or {"loss": 0.})
    for method in (sft, sft_more):
        cfg = toy.settings(folders["full"], "full", method.Config, max_new_tokens=8)
        splits = cfg.splits()
        splits["preference"][0]["output"] = " "
        monkeypatch.setattr(type(cfg), "splits", lambda cfg, splits=splits: splits)
        cfg.stage = "demonstrated"
        method.run(cfg)
    expected = [toy.text(cfg).example(record, record["output"])
                for split in ("sft", "preference", "unlabeled") for record in splits[split]]
    few = len(splits["sft"])
    assert seen[0] == expected[:few] and seen[1] == expected[:few] + expected[few + 1:] and few < len(seen[1])
