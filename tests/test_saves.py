"""Nothing is lost: after a kill at any moment the same command goes on, and ends bit for bit as if nothing had been."""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import moments
import numpy
import pytest
import tiny
import torch
import toy
from commands import child
from judged import JUDGE
from quick import few, slowly

import annotate
from data import InputError, Refusal, attempt, interrupts
from rlhf import dpo, experience, online_dpo, ppo, sampler, saves, state, stages, update
from rlhf.saves import Saves
from rlhf.state import Kept

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]

# Each method on its smallest settings, with full training or adapters.
METHODS = {
    "sft": ("full", {"batch_size": 16, "epochs": 1, "sample_every": 2}),
    "reward": ("lora", {"batch_size": 16, "epochs": 1, "scale_answers": 16}),
    "dpo": ("full", {"batch_size": 16, "epochs": 1, "sample_every": 2}),
    "kto": ("lora", {"batch_size": 16, "epochs": 1}),
    "feedme": ("lora", {"batch_size": 16, "epochs": 1}),
    "ppo": ("full", {"steps": 3, "rollout_batch": 8, "batch_size": 4, "eval_every": 2, "adaptive_kl": 1.}),
    "grpo": ("lora", {"steps": 3, "prompts": 4, "n": 2, "batch_size": 4}),
    "online_dpo": ("full", {"reward": "model", "steps": 3, "prompts": 4, "batch_size": 4}),
    "iterated_dpo": ("lora", {"reward": "model", "rounds": 2, "prompts": 16, "batch_size": 8, "epochs": 1}),
    "expert_iteration": ("full", {"rounds": 2, "n": 3, "prompts": 16, "batch_size": 8, "epochs": 1}),
    "quark": ("lora", {"rounds": 3, "rollout_batch": 8, "updates": 2, "batch_size": 4, "quantiles": 2}),
    "best_of_n": ("lora", {"n": 3}),
    "base": ("full", {}),
}


# Flags that keep a command of farm.py short.
TINY = {"dpo": [], "dpo,ppo,grpo,best_of_n,expert_iteration": [
    "--ppo.steps", 2, "--ppo.rollout_batch", 8, "--ppo.val_prompts", 4, "--grpo.steps", 2, "--grpo.prompts", 4,
    "--best_of_n.n", 2, "--expert_iteration.n", 2, "--expert_iteration.batch_size", 4, "--reward.scale_answers", 16]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return toy.run_folders(tmp_path_factory, pairs=True)


@pytest.fixture
def staged(folders):
    """staged(method) -> its Stage, in a folder that goes away afterwards."""
    made = []

    def stage(method, **changes):
        kind, settings = METHODS[method]
        learns = {} if method in ("best_of_n", "base") else {"lr": 1e-2}
        made.append(moments.stage(folders[kind], kind, method, **{**learns, **settings, **changes}))
        return made[-1]
    yield stage
    for one in made:
        shutil.rmtree(one.folder, ignore_errors=True)


# ---- kills ---------------------------------------------------------------------------------------------

def resumes(one, copies, steps, expected):
    """After a kill that left one of these copies, the stage ends as expected, and repeats no step that was saved."""
    for copy in copies:
        saved = moments.steps_saved(copy)
        moments.put_back(one, copy)
        assert moments.make(one) <= steps - saved, copy
        assert moments.result(one) == expected, copy


@pytest.mark.parametrize("method", few(METHODS, "dpo", "ppo"))
def test_a_kill_at_any_change_of_a_file_changes_nothing(method, staged, monkeypatch, tmp_path):
    """At every moment each save that is there is whole, and none is older than the step before. From some moments the
    stage is really run to its end."""
    one = staged(method)
    copies, steps = moments.copies(one, monkeypatch, tmp_path)
    expected = moments.result(one)
    amid = [copy for copy in copies if moments.steps_saved(copy)]
    assert len(copies) > 20 and len(amid) >= 20 * (steps > 0)
    some = random.Random(method).sample(copies, 1) + random.Random(method).sample(amid, 2 * (steps > 0))
    resumes(one, some, steps, expected)


@pytest.mark.parametrize("method, settings", [
    ("online_dpo", {}), slowly("iterated_dpo", {"batch_size": 4}), slowly("grpo", {})],
    ids=["online_dpo", "iterated_dpo", "grpo"])
def test_annotators_go_on_counting_and_drawing_where_they_were(method, settings, staged, server, monkeypatch, tmp_path):
    """Who is drawn for a pair, and which labels are flipped, depends on how many pairs there were before."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setattr(annotate, "pool", lambda judge, kind: [JUDGE])
    one = staged(method, **settings, reward="judge", judge="m", flip=.25, cache=str(tmp_path / "judge.jsonl"))
    copies, steps = moments.copies(one, monkeypatch, tmp_path / "copies")
    resumes(one, random.Random(0).sample(copies, 6), steps, moments.result(one))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_change_nothing(method, staged, monkeypatch, tmp_path):
    one = staged(method)
    copies, steps = moments.copies(one, monkeypatch, tmp_path)
    resumes(one, random.Random(1).sample(copies, 20), steps, moments.result(one))


def test_a_stage_that_is_killed_again_and_again_gets_done(staged, monkeypatch):
    """Each attempt is killed before a later change of a file than the one before it."""
    one, left, kills = staged("expert_iteration"), [math.inf], 0
    moments.make(one)
    expected = moments.result(one)
    shutil.rmtree(one.folder)

    def see():
        left[0] -= 1
        if left[0] < 0:
            raise moments.Killed
    moments.watch(one, monkeypatch, see)
    while not (one.folder / "result.json").exists():
        left[0] = 20 + 15 * kills
        with contextlib.suppress(moments.Killed):
            moments.make(one)
        kills += 1
    left[0] = math.inf
    moments.make(one)                   # the last kill may have come right after it was finished
    assert kills > 4 and moments.result(one) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kills, methods", [(3, "dpo"), (40, "dpo,ppo,grpo,best_of_n,expert_iteration")])
def test_a_command_that_is_really_killed_leaves_the_same_files_and_repeats_at_most_a_step(kills, methods, tmp_path):
    """The judge's verdicts among them, and no temporary files."""
    command = [sys.executable, ROOT / "tests" / "killing.py", kills, tmp_path / "run", "--method", methods,
               "--limit", 8, "--max_new_tokens", 8, *TINY[methods]]
    with child(list(map(str, command)), 1200, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    counts = json.loads(said.splitlines()[-1])
    assert counts["kills"] >= kills and counts["alone"] > 3
    assert counts["steps"] <= counts["commands"] * counts["alone"] + counts["kills"]
    hidden = {path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")}
    assert all(name.endswith(".lock") for name in hidden), hidden


# ---- one save ------------------------------------------------------------------------------------------

def drawing(folder, until=math.inf, minutes=0.):
    """A loop within a loop that adds up random numbers of all three kinds; it stops after `until` draws, which is
    None, or gives all it has added up."""
    found, outer, inner, draws = Saves(folder, minutes), Kept(sums=[]), Kept(sum=torch.zeros(2), n=-math.inf), 0
    for seed, generator in enumerate((random.seed, numpy.random.seed, torch.manual_seed)):
        generator(seed)
    for _, items in found.resumed([range(3), range(2), range(4)], outer, inner):
        for _, item in found.resumed(items, inner):
            if draws == until:
                return None
            inner.sum = inner.sum + item + random.random() + numpy.random.rand() + torch.rand(2)
            draws += 1
        outer.sums.append(inner.sum.tolist())
    return outer.sums


@pytest.mark.parametrize("until", range(1, 9))
def test_a_loop_in_a_loop_goes_on_with_its_random_numbers(tmp_path, until):
    expected = drawing(tmp_path / "whole")
    assert drawing(tmp_path / "cut", until) is None
    assert drawing(tmp_path / "cut") == expected and len(expected) == 3
    assert drawing(tmp_path / "cut") == expected        # at its end, too
    assert drawing(None) == expected                    # without a folder nothing is saved, and nothing else changes


@pytest.mark.parametrize("name", [state.TENSORS, state.REST, state.MANIFEST])
def test_two_saves_are_kept_and_a_damaged_one_is_said_and_left_out(name, tmp_path, capsys):
    expected = drawing(tmp_path / "whole")
    drawing(tmp_path / "cut", 5)
    older, newest = saves.saved(tmp_path / "cut")
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    assert drawing(tmp_path / "cut") == expected
    assert f"{newest} is damaged and left out" in capsys.readouterr().out
    for path in saves.saved(tmp_path / "cut"):
        (path / name).unlink()
    assert drawing(tmp_path / "cut") == expected        # from the start


def test_a_state_comes_back_as_it_was(tmp_path):
    tensors = [torch.randn(3, 2).T, torch.tensor(-math.inf), torch.ones(2, dtype=torch.bfloat16), torch.empty(0),
               torch.tensor([1, 255], dtype=torch.uint8)]
    told = {"a": {"list": [1, "x", None, True, -math.inf, 1 / 3]}, "tensors": tensors, "pair": (1, tensors[0])}
    state.write(tmp_path / "here", told)
    back = state.read(tmp_path / "here")
    assert back["a"] == told["a"] and back["pair"][0] == 1 and torch.equal(back["pair"][1], tensors[0])
    for one, other in zip(back["tensors"], tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and state.read(tmp_path / "there") is None


def test_stages_that_take_seconds_never_save(staged):
    one, seen = staged("dpo", save_minutes=5.), []
    with pytest.MonkeyPatch.context() as patch:
        moments.watch(one, patch, lambda: seen.extend(path.name for path in (one.folder / ".saves").glob("*")))
        moments.make(one)
    assert seen == [] and not (one.folder / ".saves").exists()


def test_the_end_of_a_loop_is_saved_after_a_fifth_of_the_time(tmp_path, monkeypatch):
    clock = [0.]
    monkeypatch.setattr(saves.time, "monotonic", lambda: clock[0])
    for seconds in (11, 13):
        for _ in (found := Saves(tmp_path, 1.)).resumed([1], Kept(x=0)):
            clock[0] += seconds
        assert len(saves.saved(tmp_path)) == (seconds > 12) == (not found.moved)


def test_the_time_before_a_kill_counts(tmp_path, monkeypatch):
    clock = [0.]
    monkeypatch.setattr(saves.time, "monotonic", lambda: clock[0])
    for before in (0, 100):
        found = Saves(tmp_path, 1.)
        assert not found.due()
        clock[0] += 100
        assert found.due() and found.seconds()[0] == before + 100
        found.tick()
        assert not found.due()


# ---- answers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", toy.KINDS)
def test_answers_of_finished_parts_are_not_sampled_again(kind, folders, tmp_path, monkeypatch):
    """Twelve prompts with three answers each in parts of two prompts; the kill comes in the third part."""
    monkeypatch.setattr(saves, "PART", 1)
    cfg = toy.settings(folders[kind], kind, dpo.Config, slots=3)
    text, model, sampled = cfg.text(), tiny.policy(kind), []
    prompts, real = tiny.texts([1 + i % 5 for i in range(12)]), sampler.sample

    def counted(*args, only, **kwargs):
        if len(sampled) == 2 and not (tmp_path / "again").exists():
            raise moments.Killed
        sampled.append(list(only))
        return real(*args, only=only, **kwargs)

    def generated(folder):
        cfg.saves = Saves(folder, 0.)
        rows, logps = sampler.generate(model, prompts, text, cfg, 3, 3, logps=True, kept="x")
        return rows, [logp.tolist() for logp in logps]
    expected = generated(tmp_path / "whole")
    plain, logps = sampler.generate(model, prompts, text, cfg, 3, 3, logps=True)
    assert expected[0] == plain and torch.allclose(torch.cat(logps), torch.cat(list(map(torch.tensor, expected[1]))))
    monkeypatch.setattr(sampler, "sample", counted)
    with pytest.raises(moments.Killed):
        generated(tmp_path / "cut")
    file = tmp_path / "cut" / "x.jsonl"
    file.write_bytes(file.read_bytes()[:-9])            # torn: the part is sampled as a whole
    (tmp_path / "again").touch()
    assert generated(tmp_path / "cut") == expected
    assert sampled == [list(range(6 * i, 6 * i + 6)) for i in (0, 1, 1, 2, 3, 4, 5)]
    assert generated(tmp_path / "cut") == expected and len(sampled) == 7


def test_answers_to_something_else_or_of_lost_weights_are_not_taken(tmp_path):
    def answers(asked):
        return saves.Answers(Saves(tmp_path, 0.), "x", asked)
    for lose in (lambda: answers("other"), lambda: shutil.rmtree(tmp_path / "000001")):
        found = Saves(tmp_path, 0.)
        found.moved = True              # so the weights of these answers are saved with them
        saves.Answers(found, "x", "one").add({0: [[1, 2], None]})
        assert answers("one") == {0: [[1, 2], None]} and len(saves.saved(tmp_path)) == 1
        lose()
        assert answers("one") == {}


def test_a_kill_between_answers_and_the_save_of_their_weights_loses_both(staged, monkeypatch):
    """No save was due during training; the first is when the trained policy has answered."""
    def killed(*args):
        raise moments.Killed
    one = staged("dpo", save_minutes=5.)
    with monkeypatch.context() as patch, pytest.raises(moments.Killed):
        patch.setattr(Saves, "due", lambda self, share=1.: bool(self.unwritten))
        patch.setattr(saves, "write", killed)
        moments.make(one)
    folder = one.folder / ".saves"
    assert (folder / "answers.jsonl").exists() and not saves.saved(folder)
    Saves(folder)
    assert not (folder / "answers.jsonl").exists()


@pytest.mark.parametrize("method, first", [("iterated_dpo", 3), ("expert_iteration", 6)])
def test_answers_of_a_round_are_in_its_saves_although_none_was_due_while_they_were_sampled(
        method, first, staged, monkeypatch):
    """The policy that gave them is in no save: in its place the round would begin with the SFT model. The kill comes
    in the step after the only save, which is in round 2, after so many steps."""
    one = staged(method, save_minutes=5., batch_size=8 if method == "iterated_dpo" else 2)
    moments.make(one)
    expected = moments.result(one)
    shutil.rmtree(one.folder)
    with monkeypatch.context() as patch:
        taken, step = [], update.Updater.step

        def killed(self):
            if len(taken) == first:
                raise moments.Killed
            taken.append(0)
            return step(self)
        patch.setattr(update.Updater, "step", killed)
        patch.setattr(Saves, "due", lambda self, share=1.: len(taken) == first)
        with pytest.raises(moments.Killed):
            stages.run(one, stages.Again(one.cfg.out, {}), "stage 1 of 1")
    state = saves.whole(saves.saved(one.folder / ".saves")[-1])
    assert [loop["at"] for loop in state["loops"]] == [1, 1]
    moments.make(one)
    assert moments.result(one) == expected


# ---- signals -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_finishes_the_step_saves_and_ends_with_its_code(name, code, staged, monkeypatch, capsys):
    one, step, taken = staged("sft", save_minutes=5.), update.Updater.step, []
    moments.make(one)
    expected = moments.result(one)
    shutil.rmtree(one.folder)

    def interrupted(self):
        taken.append(0)
        if len(taken) == 2:
            signal.raise_signal(getattr(signal, name))
        return step(self)
    monkeypatch.setattr(update.Updater, "step", interrupted)
    assert attempt(lambda argv: moments.make(one), [], "farm.py", "all is kept") == code
    assert len(taken) == moments.steps_saved(one.folder) == 2
    assert "farm.py: interrupted; all is kept" in capsys.readouterr().err
    assert moments.make(one) == 1 and moments.result(one) == expected


def test_a_signal_while_a_save_is_written_waits_until_it_is(tmp_path, monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        state.write(*args)
    monkeypatch.setattr(saves, "write", interrupted)
    assert attempt(lambda argv: list(Saves(tmp_path, 0.).resumed(range(3), Kept(x=0))), [], "farm.py", "") == 143
    assert len(saves.saved(tmp_path)) == 1


def test_a_second_signal_ends_it_now(staged, monkeypatch):
    one, taken = staged("sft"), []

    def interrupted(self):
        taken.append(0)
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(update.Updater, "step", interrupted)
    assert attempt(lambda argv: moments.make(one), [], "farm.py", "") == 143
    assert len(taken) == 1 and moments.steps_saved(one.folder) == 0


def test_a_signal_while_nothing_can_be_saved_ends_it_at_once_and_handlers_are_put_back():
    def hang_up(argv):
        signal.raise_signal(signal.SIGHUP)
        raise AssertionError("not reached")
    before = signal.getsignal(signal.SIGHUP)
    assert attempt(hang_up, [], "farm.py", "") == 129
    assert signal.getsignal(signal.SIGHUP) == before and not interrupts.noted()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)        # nohup
    try:
        assert attempt(lambda argv: signal.raise_signal(signal.SIGHUP), [], "farm.py", "") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_in_a_thread_of_a_notebook_does_without_signals():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(attempt(lambda argv: None, [], "farm.py", "")), daemon=True)
    thread.start()
    thread.join(60)
    assert codes == [0]


# ---- files of a finished stage -------------------------------------------------------------------------

def test_all_files_are_on_the_disk_before_the_stage_is_finished(staged, monkeypatch):
    one, synced, fsync, replace = staged("dpo"), set(), os.fsync, os.replace

    def finishing(source, target):
        if target.name == "result.json":
            wanted = {path.stat().st_ino for path in one.folder.rglob("*")
                      if path.is_file() and path != source and ".saves" not in path.parts}
            assert wanted and wanted <= synced
        replace(source, target)
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", finishing)
    moments.make(one)


def test_damage_that_keeps_the_size_is_named(staged):
    one = staged("dpo")
    moments.make(one)
    path = one.folder / "outputs.json"
    path.write_bytes(path.read_bytes().replace(b"w", b"v", 1))
    with pytest.raises(InputError, match=r"outputs.json is damaged: its content has changed; --rerun dpo_new"):
        moments.make(one)


def test_other_settings_overwrite_little_saved_work_and_refuse_to_lose_much(staged, monkeypatch):
    def started():
        with monkeypatch.context() as patch:
            patch.setattr(update.Updater, "step", lambda self: signal.raise_signal(signal.SIGINT) or {})
            assert attempt(lambda argv: moments.make(staged("dpo", lr=.5)), [], "", "") == 130
    started()
    moments.make(staged("dpo", lr=.25))
    shutil.rmtree(staged("dpo").folder)
    monkeypatch.setattr(stages, "LITTLE", 1e-9)
    started()
    with pytest.raises(InputError, match="left from an interrupted run with other settings.*lr is 0.5 there"):
        stages.place(staged("dpo", lr=.25), stages.Again("runs", {}))


# ---- numbers -------------------------------------------------------------------------------------------

def test_a_number_that_is_not_finite_leaves_its_batch_and_no_weights(staged):
    """The first step makes the weights so large that the second overflows."""
    one = staged("dpo", lr=9e18)
    with pytest.raises(Refusal, match=r"step 1: .* nan, so the step was not taken.*dpo_new/bad_batch.json"):
        moments.make(one)
    batch = json.loads((one.folder / "bad_batch.json").read_text())
    assert batch["step"] == 1 and batch["lr"] > 0 and batch["last_finite_loss"] == pytest.approx(math.log(2))
    assert len(batch["rows"]) == 2 * 16
    for row in batch["rows"]:
        assert row["prompt"].split() == [f"w{i}" for i in row["prompt_ids"]] and row["response_ids"]
    assert not (one.folder / "checkpoint").exists() and not (one.folder / "outputs.json").exists()
    moments.make(staged("dpo"))                         # what is left keeps nobody from other settings
    assert not (one.folder / "bad_batch.json").exists()


def test_a_loss_that_is_infinite_while_its_gradient_is_not_stops_the_run_too():
    p = torch.nn.Parameter(torch.ones(2))
    updater = update.Updater([p], .1, 2)
    updater.add(p.sum() + math.inf, 1, [([1], [2])])
    with pytest.raises(update.NotFinite, match="the loss is inf") as error:
        updater.step()
    assert error.value.batch["rows"] == [([1], [2])] and torch.equal(p.detach(), torch.ones(2))


def test_overflow_in_fp16_while_sampling_names_the_way_out():
    model = tiny.policy()
    assert "float32" not in sampler.not_finite(model.gpt)
    assert sampler.not_finite(model.gpt.half()).endswith("or fp16 overflowed: try --dtype float32")


def test_what_cannot_learn_is_said_once(folders, capsys, monkeypatch):
    monkeypatch.setattr(experience, "MUCH_KL", 10)
    settings = {"lr": 1e-3, "steps": 4, "rollout_batch": 8, "batch_size": 8, "val_prompts": 2,
                "missing_eos_penalty": 0.}
    ppo.run(toy.settings(folders["full"], "full", ppo.Config, **settings), lambda rows: torch.zeros(len(rows)))
    said = capsys.readouterr().out
    assert said.count("all answers that are compared have the same reward: nothing can be learned") == 1
    assert "runs away" not in said
    ppo.run(toy.settings(folders["full"], "full", ppo.Config, **settings | {"lr": 3., "vf_coef": 0.}),
            lambda rows: torch.tensor([float(len(response)) for _, response in rows]))
    said += capsys.readouterr().out
    assert said.count("the KL to the reference is above 10 nats an answer and runs away") == 1
    assert said.count("the value function explains nothing of the returns") == 1
    assert max(map(len, said.splitlines())) < 80
    changes = {"reward": "model", "lr": 1e-3, "steps": 2, "prompts": 4, "batch_size": 4}
    online_dpo.run(toy.settings(folders["full"], "full", online_dpo.Config, **changes),
                   lambda rows: torch.zeros(len(rows)))
    assert capsys.readouterr().out.count("no answer of a step is preferred to the other") == 1
