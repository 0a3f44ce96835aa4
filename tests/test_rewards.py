"""Rewards: rules against answers of the generator and by hand, the user's function, the annotators; and the command."""
import gc
import json
import random
import re

import pytest
import torch
import toy
from commands import refused
from judged import JUDGE, shown
from quick import slowly
from test_farm import farm, reused

import annotate
from data import InputError
from data.barn import world
from data.barn.reward import EXACT, correct, true_reward
from rlhf import best_of_n, expert_iteration, grpo, online_dpo, plan, policy, ppo, rewards

torch.set_num_threads(1)


# --- rules -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("instruction, right, wrong", [
    ("List three animals.", ["Cow, hen and goat.", "1. cow 2. hen 3. goat", "Sure! Cow, hen and goat."],
     ["Cow and hen.", "Cow, hen and fig.", "Cow, hen, goat and pig.", "Cow, cow and hen.", "Cow, hen, goat and", ""]),
    ("Anna asks: What does a cow eat?", ["A cow eats grass."], ["A cow eats hay.", "A hen eats grain.", "A cow."]),
    ("Use these words in a sentence: cow, rake, pond.", ["The cow found the rake near the pond."],
     ["The cow found the rake.", "The cow saw a rake. It was near the pond."]),
    ("Is a fig a tool?", ["No, a fig is a fruit."],
     ["Yes, a fig is a tool.", "Yes, a fig is a fruit.", "A fig is a fruit."]),
    ("How do I plant a pea?",
     ["First, dig a small hole. Then, put the pea in. Next, cover it with soil. Finally, water it well."],
     ["First, dig a small hole. Then, put the pea in.", "Water it well, pea."]),
    ("Write a short story about a cow and a hen.", ["Once there was a cow."], ["Once there was a"]),
    ("Make me a sandwich.", ["No."], ["No"])])
def test_what_is_right_in_the_barn(instruction, right, wrong):
    assert [correct(instruction, output) for output in right] == [True] * len(right)
    assert [correct(instruction, output) for output in wrong] == [False] * len(wrong)


def test_plain_answers_of_the_generator_are_right_and_answers_to_other_questions_are_wrong():
    r = random.Random(0)
    for _ in range(400):
        instruction = world.draw_instruction(r)
        assert correct(instruction.text, world.demonstrate(instruction, r, world.PLAIN)), instruction
        if instruction.kind in EXACT:
            mistaken = world.demonstrate(instruction, r, {**world.PLAIN, "wrong": 1.})
            assert not correct(instruction.text, mistaken) or instruction.kind in ("eats", "lives", "gives"), mistaken
            assert not correct(instruction.text, "Sure!")


@pytest.mark.parametrize("text, number", [
    ("The answer is 42.", 42), ("3 + 4 = 7", 7), ("#### 1,234", 1234), ("$2.50.", 2.5), ("it is -3", -3), ("5-3", 3),
    ("(12) and", 12), ("no number", None), ("", None), ("10 apples cost 3.", 3), ("1,2", 2), ("7.", 7),
    ("x=-0.5!", -.5)])
def test_the_last_number(text, number):
    assert rewards.last_number(text) == number


@pytest.mark.parametrize("answer, output, worth", [
    ("She has 3 + 4 = 7. #### 7", "3 and 4 make 7.", 1), ("#### 7", "7 is wrong, it is 8", 0), (24, "(1+2)*8 = 24", 1),
    ("1,000", "1000.0", 1), ("#### 7", "seven", 0)])
def test_the_rule_of_a_file_compares_last_numbers(answer, output, worth):
    assert rewards.same_number({"instruction": "?", "answer": answer}, output) == worth


# --- a reward is a function of rows ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.run_folder(tmp_path_factory.mktemp("rewards"), "full")


def rows_of(cfg, split="unlabeled", n=6):
    """Rows whose answers are w30 w<i>, and the records that they answer."""
    text, records = toy.text(cfg), cfg.splits()[split][:n]
    return [(text.prompt(record), [30, i, 0]) for i, record in enumerate(records)], records


@pytest.mark.parametrize("split", ["unlabeled", "val", "eval", "preference"])
def test_a_function_of_the_user_s_gets_the_instruction_and_the_answer(split, folder, tmp_path):
    (tmp_path / "mine.py").write_text("def worth(instruction, output):\n    return len(output + instruction)\n")
    cfg = toy.settings(folder, "full", ppo.Config, reward=f"{tmp_path / 'mine.py'}:worth")
    rows, records = rows_of(cfg, split)
    scores = rewards.scorer(cfg, toy.text(cfg), policy.load(cfg, "sft"))(rows)
    outputs = [toy.text(cfg).decode(response) for _, response in rows]
    assert scores.tolist() == [len(output + record["instruction"]) for output, record in zip(outputs, records)]
    assert scores.dtype == torch.float and cfg.reads()["reward"].startswith("def worth")


@pytest.mark.parametrize("source, name, said", [
    (None, "f", "No such file"), ("def f(i, o): pass", "g", "has no function 'g'"), ("f = 1", "f", "no function 'f'"),
    ("def f(:", "f", "SyntaxError"), ("import nothing_of_this_name", "f", "ModuleNotFoundError"),
    ("def f(i, o): return 1", "", "names no function|no function ''")])
def test_a_file_that_cannot_be_used_is_said_before_anything_is_trained(source, name, said, tmp_path):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    result = farm("--method", "ppo", "--reward", f"{tmp_path / 'mine.py'}:{name}", "--out", tmp_path / "run")
    refused(result, 2, said)
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize("body, said", [("1 / 0", "ZeroDivisionError"), ("None", "TypeError"), ("'x'", "ValueError")])
def test_a_function_that_fails_is_the_user_s(body, said, tmp_path):
    (tmp_path / "mine.py").write_text(f"def f(instruction, output):\n    return {body}\n")
    worth = rewards.own_function(f"{tmp_path / 'mine.py'}:f")
    with pytest.raises(InputError, match=f"{said}.*of the answer 'so'"):
        worth({"instruction": "?"}, "so")


def test_in_the_barn_the_truth_and_the_rule_are_those_of_the_world(tmp_path):
    record = world.splits()["val"][0]
    worth = {name: rewards.of_text(ppo.Config(reward=name)) for name in ("true", "rule")}
    for other in world.splits()["val"][:40]:
        assert worth["true"](record, other["output"]) == (
            true_reward(record["instruction"], other["output"]) - 7) / 2
        assert worth["rule"](record, other["output"]) == correct(record["instruction"], other["output"])
    scores = torch.tensor([worth["true"](each, each["output"]) for each in world.splits()["sft"]])
    assert abs(scores.mean()) < .3 and .8 < scores.std() < 1.3


# --- the annotators --------------------------------------------------------------------------------------

@pytest.fixture
def asked(folder, server, monkeypatch, tmp_path):
    """Settings whose judge prefers the answer with the higher second word, whose labels are not flipped."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setattr(annotate, "pool", lambda judge, kind: [JUDGE])

    def higher(body, nth):
        a, b = (int(re.findall(r"\d+", text)[1]) for text in shown(body)[1:])
        return "Output (a)" if a > b else "Output (b)"
    server.rule = higher
    return lambda cls, **changes: toy.settings(folder, "full", cls, judge="m", cache=str(tmp_path / "judge.jsonl"),
                                               **{"reward": "judge", "flip": 0.} | changes)


def test_the_judge_s_score_is_whether_an_answer_beats_one_of_the_sft_model(asked, server, monkeypatch):
    monkeypatch.setattr(rewards, "generate", lambda ref, prompts, *rest: [(prompt, [30, 3, 0]) for prompt in prompts])
    cfg = asked(ppo.Config)
    rows, records = rows_of(cfg)
    score_fn = rewards.scorer(cfg, toy.text(cfg), policy.load(cfg, "sft"))
    assert score_fn(rows).tolist() == [0, 0, 0, .5, 1, 1]
    assert len(server.requests) == 5                    # equal answers are not asked about
    assert {shown(body)[0] for body in server.requests} == {record["instruction"] for record in records} - {
        records[3]["instruction"]}


def test_each_prompt_s_opponent_is_sampled_once(asked, monkeypatch):
    """Also when all of them are known, as in a second look at val."""
    real, sampled = rewards.generate, []
    monkeypatch.setattr(rewards, "generate", lambda ref, prompts, *rest: sampled.extend(prompts) or [
        (prompt, [30, 3, 0]) for prompt, _ in real(ref, prompts, *rest)])
    cfg = asked(grpo.Config)
    rows, _ = rows_of(cfg)
    score_fn = rewards.scorer(cfg, toy.text(cfg), policy.load(cfg, "sft"))
    score_fn(rows[:4] + rows[:4]), score_fn(rows)
    assert score_fn(rows).tolist() == score_fn(rows).tolist()
    assert sorted(sampled) == sorted({tuple(prompt): prompt for prompt, _ in rows}.values())


def test_online_dpo_has_two_answers_compared_and_counts_what_it_pays_for(asked, server):
    cfg = asked(online_dpo.Config)
    compare, costs = rewards.comparer(cfg, toy.text(cfg), policy.load(cfg, "sft"))
    rows, _ = rows_of(cfg)
    better = [(prompt, [30, 9, 0]) for prompt, _ in rows]
    assert compare(rows, better) == [2] * 6 and compare(better, rows) == [1] * 6 and compare(rows, rows) == [1.5] * 6
    assert costs() == {"judge/asked": 12, "judge/cost": None}           # nobody knows what the model "m" costs
    assert len(server.requests) <= 12                   # a question in the cache costs nothing


def test_a_quarter_of_the_labels_is_wrong_and_half_of_them_are_not_paid_for(asked, server):
    cfg = asked(online_dpo.Config, flip=.25)
    compare, costs = rewards.comparer(cfg, toy.text(cfg), policy.load(cfg, "sft"))
    (prompt, _), *_ = rows_of(cfg)[0]
    worse, better = [(prompt, [30, 4, 0])] * 80, [(prompt, [30, 9, 0])] * 80        # each pair has its own draws
    said = [preference for _ in range(4) for preference in compare(worse, better)]
    assert .17 < said.count(1) / 320 < .33 and .4 < costs()["judge/asked"] / 320 < .6
    assert costs()["judge/asked"] >= len(server.requests)               # equal requests are paid for once


def test_the_connection_to_the_judge_ends_with_the_reward(asked, monkeypatch):
    closed, real = [], annotate.Judge.close
    monkeypatch.setattr(annotate.Judge, "close", lambda self: closed.append(1) or real(self))
    cfg = asked(ppo.Config)
    score_fn = rewards.scorer(cfg, toy.text(cfg), policy.load(cfg, "sft"))
    assert not closed
    del score_fn
    gc.collect()
    assert closed


# --- the command -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo", "reinforce", "best_of_n", "expert_iteration"])
def test_only_the_reward_model_needs_to_be_trained(name):
    assert plan.order(name) == ["sft", "pairs", "reward", name]
    for other in ("rule", "true", "judge"):
        assert plan.order(name, {name: {"reward": other}}) == ["sft", name]


def test_methods_that_compare_ask_the_judge_by_default():
    for name in ("online_dpo", "iterated_dpo"):
        assert plan.order(name) == ["sft", name]
        assert plan.order(name, {name: {"reward": "model"}}) == ["sft", "pairs", "reward", name]


SMALL = ("--limit", "16", "--max_new_tokens", "12")
OWN = {"ppo": ("--steps", "2", "--eval_every", "1", "--rollout_batch", "16"),
       "grpo": ("--steps", "1", "--prompts", "4"), "rloo": ("--steps", "1", "--prompts", "4"),
       "reinforce": ("--steps", "1", "--prompts", "16"),
       "best_of_n": ("--n", "2"), "expert_iteration": ("--n", "2"), "online_dpo": ("--steps", "1", "--prompts", "16"),
       "iterated_dpo": ("--rounds", "1", "--prompts", "16")}


@pytest.mark.parametrize("reward, names", [("true", ("ppo", "online_dpo", "best_of_n")), slowly("true", (*OWN,)),
                                           slowly("judge", (*OWN,))])
def test_every_method_learns_from_every_reward_without_a_reward_model(reward, names, tmp_path):
    for name in names:
        result = farm("--method", name, *SMALL, *OWN[name], "--reward", reward, "--out", tmp_path)
        assert result.code == 0 and not result.err, result.err
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["needs"].keys() == {"sft"} and config["reward"] == reward
    assert not (tmp_path / "reward").exists() and not (tmp_path / "pairs").exists()
    for name in names:
        result = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        assert (result.get("judge/asked", 0) > 0) == (reward == "judge"), name


def test_a_changed_function_is_another_stage(tmp_path):
    mine = tmp_path / "mine.py"
    argv = ("--method", "best_of_n", *SMALL, "--n", "2", "--reward", f"{mine}:worth", "--out", tmp_path / "run")
    mine.write_text("def worth(instruction, output):\n    return len(output)\n")
    assert farm(*argv).code == 0 and reused(farm(*argv).out) == ["sft", "best_of_n"]
    mine.write_text("def worth(instruction, output):\n    return -len(output)\n")
    refused(farm(*argv), 2, "the content of --reward has changed", "--rerun best_of_n")


def problems(folder, n=176, answer=True):
    """A file of sums; the SFT model's first words are numbers."""
    records = [{"instruction": f"What is {i} and {i % 7}?", "output": f"It is {i + i % 7}."} for i in range(n)]
    if answer:
        records = [{**record, "answer": f"#### {i + i % 7}"} for i, record in enumerate(records)]
    (folder / "sums.json").write_text(json.dumps(records))
    return folder / "sums.json"


def test_answers_of_a_file_are_checked_by_a_rule(tmp_path):
    data = problems(tmp_path)
    argv = ("--method", "grpo", "--data", data, "--judge", "none", "--max_new_tokens", "12", "--reward", "rule",
            *OWN["grpo"], "--out", tmp_path / "run")
    result = farm(*argv)
    assert result.code == 0 and not result.err, result.err
    metrics = json.loads((tmp_path / "run" / "grpo" / "metrics.jsonl").read_text())
    assert 0 <= metrics["reward"] + metrics["completions/clipped_ratio"] <= 1
    result = farm(*argv[:2], "--data", problems(tmp_path, answer=False), *argv[4:-1], tmp_path / "other")
    refused(result, 2, "a number under 'answer' in each record")
    assert not (tmp_path / "other" / "sft").exists()


@pytest.mark.parametrize("argv, said", [
    ("--reward rulee", "--reward 'rulee' is not known.*did you mean rule"),
    ("--reward mine.py", "names no function.*mine.py:function"),
    ("--reward rule --reward.lr 1", "ppo does not need reward"),
    ("--reward rule --pairs.flip .1", "ppo does not need pairs"),
    ("--flip .1", "--flip would change nothing: --reward model asks no judge"),
    ("--reward true --init_value sft", "--init_value would change nothing"),
    ("--reward judge --judge none", "--judge none prefers no answer"), ("--reward judge --flip .6", "--flip 0.6"),
    ("--reward true --data sums.json", "only the offline world has a true reward")])
def test_flags_that_make_no_sense(argv, said, tmp_path):
    refused(farm("--method", "ppo", *argv.split(), "--out", tmp_path / "run"), 2, said)


def test_settings_of_the_judge_are_part_of_a_stage_only_if_it_is_asked():
    for cls in (ppo.Config, grpo.Config, best_of_n.Config, expert_iteration.Config):
        assert not cls().asks_judge and cls(reward="judge").asks_judge
