"""exercises.show: a run's rows, rollouts and judge prompts in the terminal; exercises.plot: what it has logged."""
import io
import json
import re
import shutil
import sys

import pytest
from commands import command, refused

import annotate
from data.barn.reward import true_reward
from data.judges.prompts import Annotator
from exercises import plot
from exercises.show import main
from stats import traces

TOKENS = ["<user>", " Say", "\n", "moo", "<end>", "<pad>", "<pad>"]
ROW = {"step": 0, "tokens": TOKENS, "mask": [0, 0, 1, 1, 0, 0], "prompt": 3, "length": 5, "ends": True}
ROLLOUT = {"step": 4, "tokens": ["<user>", " Say", " moo", "<end>"], "mask": [0, 1, 1], "prompt": 2, "length": 4,
           "ends": True, "scores": [1.25], "kl": [0, .5, -.25], "value": [0, .75, 1.], "reward": [-0., -.05, 1.275],
           "advantage": [-0., 1.5, -1.5]}


def stage(run, name, needs=(), **files):
    """A finished stage of a run folder, with these files: {name: document}, a list of samples for `samples`."""
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"id": name, "needs": {each: each for each in needs}, "seed": 0}))
    (folder / "result.json").write_text('{"metrics": {}}')
    for file, document in files.items():
        if file == "samples":
            (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in document))
        else:
            (folder / f"{file}.json").write_text(json.dumps(document))


@pytest.fixture
def run(tmp_path):
    """SFT and DPO with a row, PPO with two rollouts, pairs without any."""
    folder = tmp_path / "run"
    shifted = {**ROW, "mask": [0, 1, 1, 0, 0, 0]}
    stage(folder, "sft", samples=[ROW, {"step": 0, "instruction": "Say", "output": "moo"}])
    stage(folder, "pairs", ["sft"])
    stage(folder, "dpo", ["sft", "pairs"], samples=[shifted])
    stage(folder, "ppo", ["sft", "pairs", "dpo"], samples=[{**ROLLOUT, "step": 0}, ROLLOUT])
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(*argv):
    ended = command("exercises/show.py", *argv)
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    return ended.out


def test_a_row_is_shown_in_its_four_parts(run):
    out = show("tokens", run / "sft")
    parts = re.findall(r"^(\w+), (\d+) tokens?, (learned|not learned):\n  (.*)", out, re.MULTILINE)
    assert parts == [("prompt", "3", "not learned", "<user>| Say|⏎|"), ("answer", "1", "learned", "moo|"),
                     ("EOS", "1", "learned", "<end>|"), ("padding", "2", "not learned", "<pad>|")]


def test_what_is_learned_is_what_the_mask_says(run):
    """A mask that is shifted by one shows: the prompt's last token is learned, and EOS is not."""
    parts = re.findall(r"^(\w+), (\d+) tokens?, (learned|not learned):", show("tokens", run / "dpo"), re.MULTILINE)
    assert parts == [("prompt", "2", "not learned"), ("prompt", "1", "learned"), ("answer", "1", "learned"),
                     ("EOS", "1", "not learned"), ("padding", "2", "not learned")]


def test_the_number_at_index_t_stands_beside_token_t_plus_1(run):
    out = show("rollout", run)
    lines = [line.split() for line in out.splitlines() if line.startswith((" moo", "<end>"))]
    assert lines == [["moo", "0.500", "0.750", "-0.050", "1.500"], ["<end>", "-0.250", "1.000", "1.275", "-1.500"]]
    assert "Step 4: the score is 1.250, the KL 0.250 nats, the rewards add up to 1.225." in " ".join(out.split())
    assert "Step 0" in show("rollout", run / "ppo", "--row", "0")


def test_colours_are_for_terminals_whose_user_wants_them(run, monkeypatch):
    def on_a_terminal():
        monkeypatch.setattr(sys, "stdout", Terminal())
        main(["tokens", str(run / "sft")])
        return sys.stdout.getvalue()
    assert "\x1b" not in show("tokens", run)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_a_terminal()
    assert "\x1b[32;4mmoo|\x1b[0m" in coloured and "\x1b[2;9m<pad>" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal()


@pytest.mark.parametrize("words, said", [
    (("tokens", "nowhere"), "there is no folder .*nowhere"), (("tokens", ""), "no run folder with a finished stage"),
    (("rollout", "run/sft"), "sft has no rollouts: ppo, grpo"), (("prompt", "run"), "no labels or verdicts"),
    (("tokens", "run/ppo", "--row", "2"), "--row 2: .*ppo has rows 0 to 1"), (("sing", "run"), "invalid choice")])
def test_what_is_not_there_is_said_in_a_sentence(words, said, run):
    what, path, *more = words
    refused(command("exercises/show.py", what, run.parent / path, *more), 2, said)


# -- the judge -----------------------------------------------------------------------------------------------------

PAIRS = [{"instruction": f"Say {word} </s>.", "input": "", "output_1": f"{word}\n\"so\"", "output_2": word + 9 * "!"}
         for word in ("moo", "bah", "oink", "quack", "neigh", "cluck", "hiss", "purr", "bark", "hoot")]


@pytest.fixture
def labelled(run, judge, server):
    """A stage of pairs with the labels of a judge that likes long answers, and the judge's file; the judge's model is
    not called as its annotators are."""
    one = judge()
    records = annotate.annotate(PAIRS, [Annotator("anna", "m"), Annotator("bert", "m", "examples")], one, flip=.2)
    stage(run, "labels", records=records, pairs=records)
    one.cache.path.rename(run / "judge.jsonl")
    return run, records, server.requests


def test_a_prompt_is_exactly_what_was_sent_with_the_reply_that_came(labelled):
    run, records, requests = labelled
    asked = [record for record in records if record["scored_by"] == "text"]
    assert len({record["annotator"] for record in asked}) == 2 and len(asked) == len(requests) < len(records)
    for record, request in zip(asked, sorted(requests, key=lambda body: place(asked, body)), strict=True):
        found = traces.exchange(record, [run / "judge.jsonl"])
        assert found.messages == request["messages"] and found.reply == record["raw_completion"]


def place(records, body):
    return next(i for i, record in enumerate(records) if record["output_2"] in body["messages"][-1]["content"])


def test_the_verdict_says_which_answer_was_shown_first(labelled):
    run, records, _ = labelled
    for i, record in enumerate(records):
        said = " ".join(show("prompt", run / "labels", "--row", i).split())
        if record["scored_by"] == "coin":
            assert "Nobody was asked: this label is a coin" in said and "the reply" not in said
        else:
            first = "output_2" if record["is_switched"] else "output_1"
            assert f"Output (a) is {first} " in said and "So output_2 is preferred" in said     # the longer one
            assert record["output_2"] in said and record["raw_completion"] in said
    assert "the reply:" in show("prompt", run / "labels")           # without --row the first that was asked


def test_a_pair_that_is_in_no_file_of_a_judge_is_said_to_be_missing(labelled):
    run, _, _ = labelled
    (run / "judge.jsonl").write_text("not JSON\n{}\n")
    refused(command("exercises/show.py", "prompt", run), 2, "judge.jsonl has no reply about this pair")


# -- figures -------------------------------------------------------------------------------------------------------

@pytest.fixture
def logged(run):
    """PPO with curves, a look, and the answers of a snapshot; best-of-n with its curve; a leaderboard."""
    steps = [{"step": i, "objective/kl": i / 2, "val/ratio": None if i else 1.} for i in range(4)]
    (run / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    settings = json.loads((run / "ppo" / "config.json").read_text())
    (run / "ppo" / "config.json").write_text(json.dumps({**settings, "data": "barn"}))
    look = {"step": 1, "instruction": "Say", "output": "moo", "val_score": .5, "val_kl": 2.}
    (run / "ppo" / "samples.jsonl").write_text(json.dumps(ROLLOUT) + "\n" + json.dumps(look) + "\n")
    answer = {"instruction": "What does a cow eat?", "input": "", "output": "A cow eats grass."}
    (run / "ppo" / "outputs_2.json").write_text(json.dumps([answer]))
    stage(run, "best_of_n", ["sft"], curve={"n": [1, 2], "kl": [0, .2], "score": [0, .5]})
    (run / "leaderboard.csv").write_text(",win_rate,standard_error,kl\ndpo,60.0,1.5,2.0\nsft,50.0,1.5,\n")
    return run


@pytest.mark.parametrize("stage, x, y, points", [
    ("ppo", "", "objective/kl", [(0, 0), (1, .5), (2, 1), (3, 1.5)]), ("ppo", "objective/kl", "step", [(1.5, 3)]),
    ("ppo", "", "val_score", [(1, .5)]), ("ppo", "val_kl", "val_score", [(2, .5)]),
    ("ppo", "", "true_reward", [(1, true_reward("What does a cow eat?", "A cow eats grass."))]),
    ("best_of_n", "", "score", [(1, 0), (2, .5)]), ("best_of_n", "kl", "score", [(.2, .5)])])
def test_a_curve_is_what_the_stage_has_logged(stage, x, y, points, logged):
    across, level = plot.curve(logged / stage, x, y)
    assert [*zip(across.tolist(), level.tolist())][-len(points):] == points


def test_a_figure_has_a_point_for_each_model_of_which_both_are_known(logged, tmp_path):
    assert plot.points(logged / "leaderboard.csv", "kl", "win_rate") == {"dpo": [2., 60., None, 1.5]}
    for words in (["--x", "kl", "--y", "win_rate"], ["--y", "objective/kl"]):
        folder = logged if "--x" in words else logged / "ppo"
        ended = command("exercises/plot.py", folder, *words, "--out", tmp_path / "f.svg")
        assert ended.code == 0 and (tmp_path / "f.svg").read_text().startswith("<svg"), ended.err


def test_stages_of_the_same_name_have_a_curve_each(logged, tmp_path):
    """As those of a copy with a bug and of the project itself."""
    one, other = (tmp_path / name / "runs" / "b" / "ppo" for name in ("farm", "farm-bug1"))
    for folder in (one, other):
        shutil.copytree(logged / "ppo", folder)
    assert plot.named([one, other]) == {"farm/runs/b/ppo": one, "farm-bug1/runs/b/ppo": other}
    assert plot.named([one, one]) == {"b/ppo": one}
    ended = command("exercises/plot.py", one, other, "--y", "objective/kl", "--out", tmp_path / "f.svg")
    assert ended.code == 0, ended.err
    figure = (tmp_path / "f.svg").read_text()
    assert "farm/runs/b/ppo" in figure and "farm-bug1/runs/b/ppo" in figure


@pytest.mark.parametrize("words, said", [
    ("run/ppo --y objectiv/kl", "did you mean objective/kl"), ("run --y win_rate", "give it alone, with"),
    ("run/ppo --y val_score --x objective/kl", "--x of .*ppo 'objective/kl' is not known"),
    ("run --x kl --y wins", "'wins' is not known.*win_rate"), ("run/nothing --y kl", "is no stage of a run")])
def test_what_cannot_be_drawn_is_said_in_a_sentence(words, said, logged):
    folder, *more = words.split()
    refused(command("exercises/plot.py", logged.parent / folder, *more), 2, said)
