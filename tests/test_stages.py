"""A stage is what made it: what is reused, what is refused, how it is run again, and what a kill leaves behind."""
import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import child

from data import InputError
from rlhf import config, pairs, sft, stages

ROOT = Path(__file__).parents[1]


def made(cfg):
    """In place of a method's run(): a checkpoint, answers and a log, which tell what they were made with."""
    (cfg.dir() / "checkpoint").mkdir(exist_ok=True)
    (cfg.dir() / "checkpoint" / "weights").write_text(f"lr {cfg.lr}")
    (cfg.dir() / "outputs.json").write_text(json.dumps([{"generator": cfg.stage}]))
    (cfg.dir() / "metrics.jsonl").write_text("{}")
    return {"loss": cfg.lr}


def stage(out, run=made, needs=(), contents=(), name="sft", **settings):
    """A stage with the settings and the source of sft, and a run() of the test's own."""
    cfg = config.build(sft.Config, {"out": str(out), **settings})
    cfg.stage = name
    module = SimpleNamespace(__name__="rlhf.sft", __doc__="Pretends to train.", run=run)
    return stages.Stage(module, cfg, dict(needs), {"data": "d", "eval_data": "e", **dict(contents)}, "")


def again(out, *named):
    return stages.Again(out, {one.method: one.id for one in named})


def run(one, rerun=False):
    """Run one stage as farm.py does."""
    named = again(one.cfg.out, *[one] * rerun)
    stages.place(one, named)
    named.begin()
    stages.run(one, named, "stage 1 of 1")
    named.end()


def weights(out, name="sft"):
    return (out / name / "checkpoint" / "weights").read_text()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name[0] != "."}


class Killed(BaseException):
    """The process ends here: nothing catches it."""


def killed(cfg):
    made(cfg)
    raise Killed


# ---- what makes a stage --------------------------------------------------------------------------------

def test_the_same_stage_is_reused_and_says_which_settings_are_not_the_defaults(tmp_path, capsys):
    run(stage(tmp_path, lr=.5))
    before = tree(tmp_path)
    capsys.readouterr()
    run(stage(tmp_path, run=killed, lr=.5, slots=3, device="cpu"))      # where and how fast: not what
    assert capsys.readouterr().out == "sft: reused (lr 0.5)\n"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("changed, said", [
    ({"lr": .25}, r"lr is 0.5 there and 0.25 here\): give --lr 0.5 to use it, .*--name sft_lr0.25"),
    ({"seed": 3}, "seed is 0 there and 3 here"),
    ({"contents": {"data": "other"}}, "the content of --data has changed"),
    ({"contents": {"eval_data": "other"}}, "the content of --eval_data has changed"),
    ({"contents": {"eval_data": "other"}, "eval_data": "b.json"}, "eval_data is '' there and 'b.json' here"),
    ({"contents": {"data": "x", "eval_data": "y"}, "limit": 3}, r"\(limit is 0 there and 3 here\)"),
    ({"needs": {"base": "b"}}, "its base has been made again since")], ids=str)
def test_a_finished_stage_that_was_made_otherwise_is_refused_with_three_ways_out(tmp_path, changed, said):
    run(stage(tmp_path, **{"lr": .5, "needs": {"base": "a"}}))
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said) as refused:
        run(stage(tmp_path, **{"lr": .5, "needs": {"base": "a"}, **changed}))
    assert re.search(r"--rerun sft .*--name \S+ .*another --out", str(refused.value))
    assert tree(tmp_path) == before


def test_a_reference_with_other_answers_makes_no_other_stage(tmp_path):
    """Under another name, or the same: answers are judged anew every time."""
    asked = [{"instruction": f"Say {n}.", "input": "", "output": "no"} for n in range(5)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(asked * 20))
    hashes = {}
    for name, answer, question in (("a", "yes", "Say"), ("b", "no", "Say"), ("c", "yes", "Sing")):
        records = [{"instruction": f"{question} it.", "output": answer}]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        hashes[name] = stages.records_of(sft.Config(data=str(data), eval_data=str(tmp_path / f"{name}.json")))
    assert hashes["a"] == hashes["b"] and hashes["a"]["data"] == hashes["c"]["data"]
    assert hashes["a"]["eval_data"] != hashes["c"]["eval_data"]
    asked[0]["output"] = "maybe"                        # of one demonstration
    data.write_text(json.dumps(asked * 20))
    again = stages.records_of(sft.Config(data=str(data), eval_data=str(tmp_path / "a.json")))
    assert again["data"] != hashes["a"]["data"] and again["eval_data"] == hashes["a"]["eval_data"]


def test_other_weights_in_the_folder_of_the_base_make_another_stage(tmp_path):
    """The first and the last MB are read, the size counts, and a commit says all about a folder of the hub's."""
    base = tmp_path / "base"
    base.mkdir()
    hashes = []
    for content in (b"\0" * (3 << 20), b"\1" + b"\0" * ((3 << 20) - 1), b"\0" * ((3 << 20) - 1) + b"\1", b"\0" * 9):
        (base / "weights").write_bytes(content)
        hashes.append(stages.base_of(SimpleNamespace(checkpoint=base, adapter=None)))
    assert len(set(hashes)) == 4
    hub = tmp_path / "snapshots" / "c0ffee"
    assert stages.base_of(SimpleNamespace(checkpoint=hub, adapter=None)) == stages.digest(["c0ffee"])
    assert stages.base_of(SimpleNamespace(checkpoint=hub, adapter=base)) not in hashes


def test_the_pairs_of_a_file_are_part_of_the_stage_and_the_judge_only_where_it_is_asked(tmp_path):
    labels = tmp_path / "pairs.json"
    found = []
    for winner in (1, 2):
        labels.write_text(json.dumps([{"instruction": "i", "output_1": "a", "output_2": "b", "preference": winner}]))
        cfg = pairs.Config(labels=str(labels))
        found.append(stages.Stage(pairs, cfg, {}, {}, ""))
    assert found[0].contents["labels"] != found[1].contents["labels"]
    assert "judge" not in found[0].settings and "judge" not in stages.Stage(sft, sft.Config(), {}, {}, "").settings
    asking = stages.Stage(pairs, pairs.Config(), {}, {}, "")
    pool = tmp_path / "pool.json"
    asked = []
    for prompt in ("reasons", "hurried"):               # one annotator of the user's own, or another
        pool.write_text(json.dumps([{"prompt": prompt}]))
        asked.append(stages.Stage(pairs, pairs.Config(pool=str(pool)), {}, {}, ""))
    assert asked[0].contents["pool"] != asked[1].contents["pool"]
    assert asking.settings["judge"] == "barn" and asking.contents.keys() == {"model"}


LOSS = '''"""A method."""
from .kit import half


def loss(x):
    """Half of it."""
    return half(x)          # half
'''


@pytest.mark.parametrize("old, new, changed", [
    ("return half(x)", "return 2 * half(x)", {"rlhf/mine.py"}),
    ('"""A method."""', '"""Another docstring."""', set()), ("# half", "# a comment", set()),
    ("    return", "\n    return", set()), ('    """Half of it."""\n', "", set())])
def test_an_edit_that_changes_what_is_computed_is_seen_and_no_other(tmp_path, monkeypatch, old, new, changed):
    monkeypatch.setattr(stages, "FOLDER", tmp_path / "rlhf")
    monkeypatch.setattr(stages, "SEEN", {})
    (tmp_path / "rlhf").mkdir()
    (tmp_path / "rlhf" / "kit.py").write_text("import model\nimport numpy\nfrom data import sets\n")
    (tmp_path / "rlhf" / "late.py").write_text("")
    (tmp_path / "rlhf" / "other.py").write_text("")
    (tmp_path / "model.py").write_text("def f():\n    from rlhf import kit, late\n")
    (tmp_path / "rlhf" / "mine.py").write_text(LOSS)
    before = stages.sources("mine")
    assert before.keys() == {"rlhf/mine.py", "rlhf/kit.py", "rlhf/late.py", "model.py"}
    stages.SEEN.clear()
    (tmp_path / "rlhf" / "mine.py").write_text(LOSS.replace(old, new))
    after = stages.sources("mine")
    assert {file for file in before if before[file] != after[file]} == changed
    (tmp_path / "rlhf" / "kit.py").write_text("half = 0")
    with pytest.raises(InputError, match="rlhf/kit.py has changed since Python loaded it"):    # in a notebook
        stages.sources("mine")


def test_a_method_s_sources_are_all_of_ours_that_it_runs():
    files = {Path(file).stem for file in stages.sources("dpo")}
    assert {"dpo", "pairs", "config", "policy", "sampler", "update", "model"} <= files and "ppo" not in files
    assert all((ROOT / file).exists() for file in stages.sources("expert_iteration"))


def test_the_source_of_the_method_is_compared(tmp_path, monkeypatch):
    run(stage(tmp_path))
    sources = stages.sources("sft")
    monkeypatch.setattr(stages, "sources", lambda method: {**sources, "rlhf/sft.py": "edited", "model.py": "edited"})
    with pytest.raises(InputError, match=r"\(model.py, rlhf/sft.py have changed since\): give --rerun sft") as error:
        run(stage(tmp_path))
    assert "to use it" not in str(error.value)          # no flag makes it the same again


def test_a_stage_of_an_older_version_is_refused(tmp_path):
    run(stage(tmp_path))
    settings = json.loads((tmp_path / "sft" / "config.json").read_text())
    del settings["sources"], settings["contents"]
    (tmp_path / "sft" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "sft" / "result.json").write_text('{"seconds": 1, "metrics": {}}')
    with pytest.raises(InputError, match="an older farm.py"):
        run(stage(tmp_path))


# ---- damage --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["outputs.json", "config.json", "checkpoint/weights", "result.json"])
@pytest.mark.parametrize("how", ["missing", "cut short", "edited"])
def test_a_damaged_file_is_named_and_rerun_heals_it(tmp_path, name, how):
    run(stage(tmp_path))
    before, path = tree(tmp_path), tmp_path / "sft" / name
    if name == "result.json" and how != "cut short":
        return                                          # it knows the others' sizes; without it nothing is finished
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut short" else path.read_bytes() + b" ")
    with pytest.raises(InputError, match=rf"{name}( is|: not).*--rerun sft") as error:
        run(stage(tmp_path))
    assert how != "missing" or "is missing" in str(error.value)
    run(stage(tmp_path), rerun=True)
    assert tree(tmp_path).keys() == before.keys() and weights(tmp_path) == before["sft/checkpoint/weights"].decode()
    run(stage(tmp_path, run=killed))


def test_a_log_that_was_thrown_away_is_no_damage(tmp_path):
    run(stage(tmp_path))
    (tmp_path / "sft" / "metrics.jsonl").unlink()
    run(stage(tmp_path, run=killed))


def test_a_damaged_file_of_an_interrupted_stage_is_named(tmp_path):
    with pytest.raises(Killed):
        run(stage(tmp_path, run=killed))
    (tmp_path / "sft" / "unlabelled.json").write_text("[{")
    with pytest.raises(InputError, match="unlabelled.json is damaged.*--rerun sft"):
        run(stage(tmp_path))
    run(stage(tmp_path), rerun=True)
    assert not (tmp_path / "sft" / "unlabelled.json").exists()


def test_a_stage_that_cannot_be_read_is_told_from_those_that_are_finished(tmp_path):
    for name in ("one", "two", "three"):
        run(stage(tmp_path, name=name))
    (tmp_path / "two" / "outputs.json").unlink()
    (tmp_path / "three" / "config.json").unlink()
    (tmp_path / "three").rename(tmp_path / ".three.old")        # killed while they changed places
    shutil.copytree(tmp_path / "one", tmp_path / "three.new")
    whole, broken = stages.finished(tmp_path)
    assert [folder.name for folder in whole] == ["one", "three"]
    assert not (tmp_path / ".three.old").exists() and not (tmp_path / "three.new").exists()
    assert len(broken) == 1 and re.search("two.outputs.json is missing, so two has no row: --rerun two", broken[0])


# ---- run again -----------------------------------------------------------------------------------------

def test_a_rerun_keeps_the_old_one_until_the_new_one_is_finished(tmp_path):
    run(stage(tmp_path, lr=.5))
    before = tree(tmp_path)
    with pytest.raises(Killed):
        run(stage(tmp_path, run=killed, lr=.25), rerun=True)
    assert {name: data for name, data in tree(tmp_path).items() if name.startswith("sft/")} == before
    run(stage(tmp_path, run=killed, lr=.5))             # which is as good as ever
    run(stage(tmp_path, lr=.25), rerun=True)
    assert weights(tmp_path) == "lr 0.25" and {name.split(os.sep)[0] for name in tree(tmp_path)} == {"sft"}


def exchanges(tmp_path, monkeypatch, at):
    """Run a stage again with another setting, and be killed before the at-th change of a folder; was it?"""
    calls = iter(range(at + 1))

    def dying(change):
        def wrapped(*args):
            if next(calls) == at:
                raise Killed
            return change(*args)
        return wrapped
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(stages.shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(Killed):
            run(stage(tmp_path, lr=.25), rerun=True)
            return False
    return True


@pytest.mark.parametrize("at", range(5))
def test_a_kill_at_any_moment_leaves_one_of_the_two_whole_and_the_same_command_goes_on(tmp_path, monkeypatch, at):
    run(stage(tmp_path, lr=.5))
    assert exchanges(tmp_path, monkeypatch, at) == (at < 4)
    whole = [name for name in ("sft", "sft.new", ".sft.old") if (tmp_path / name / "result.json").exists()
             and not stages.find(tmp_path / name).damage]
    assert whole
    finished = any(weights(tmp_path, name) == "lr 0.25" for name in whole)
    run(stage(tmp_path, run=killed if finished and at < 4 else made, lr=.25), rerun=True)
    assert weights(tmp_path) == "lr 0.25" and {path.name for path in tmp_path.iterdir()} == {"sft", ".sft.lock"}


def chain(out, lr, first=made, second=made, third=made):
    """Three stages with their run(): the second needs the first, the third the second."""
    found, needs = [], {}
    for name, run in (("sft", first), ("second", second), ("third", third)):
        found.append(stage(out, run=run, name=name, needs=needs, **({"lr": lr} if name == "sft" else {})))
        found[-1].method, needs = name, {name: found[-1].id}
    return found


def run_chain(chain, rerun=False):
    """Run three stages as farm.py does; rerun: with --rerun sft."""
    asked = again(chain[0].cfg.out, *chain[:rerun])
    for one in chain:
        stages.place(one, asked)
    asked.begin()
    for one in chain:
        stages.run(one, asked, "stage")
    asked.end()


def count(into):
    def counting(cfg):
        into.append(cfg.stage)
        return made(cfg)
    return counting


def test_what_was_built_on_a_stage_that_is_another_one_now_is_run_again_with_it(tmp_path):
    ran = []
    run_chain(chain(tmp_path, .5, *[count(ran)] * 3))
    run_chain(chain(tmp_path, .5, *[count(ran)] * 3), rerun=True)       # once more the same: no other stage changes
    assert ran == ["sft", "second", "third", "sft"]
    other = chain(tmp_path, .25, *[count(ran)] * 3)
    with pytest.raises(InputError, match="its sft has been made again since"):
        stages.place(other[1], again(tmp_path))
    run_chain(other, rerun=True)
    assert ran[4:] == ["sft", "second", "third"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["needs"] == {"sft": other[0].id}


def test_after_an_interruption_the_same_rerun_repeats_no_finished_stage(tmp_path):
    ran = []
    run_chain(chain(tmp_path, .5))
    with pytest.raises(Killed):
        run_chain(chain(tmp_path, .25, count(ran), count(ran), killed), rerun=True)
    run_chain(chain(tmp_path, .25, *[count(ran)] * 3), rerun=True)
    assert ran == ["sft", "second", "third"] and not (tmp_path / ".rerun").exists()
    run_chain(chain(tmp_path, .25, *[count(ran)] * 3), rerun=True)      # a new command
    assert ran == ["sft", "second", "third", "sft"]


# ---- what an interrupted run leaves --------------------------------------------------------------------

def test_an_interrupted_stage_goes_on_where_it_was_or_is_refused_if_it_is_another(tmp_path):
    def sampling(cfg):
        (cfg.dir() / "unlabelled.json").write_text("[1]")       # took an hour
        raise Killed
    with pytest.raises(Killed):
        run(stage(tmp_path, run=sampling, lr=.5))
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"left from an interrupted run.*lr is 0.5.*--lr 0.5.*--rerun sft.*--name"):
        run(stage(tmp_path, lr=.25))
    assert tree(tmp_path) == before
    run(stage(tmp_path, lr=.5))
    assert (tmp_path / "sft" / "unlabelled.json").read_text() == "[1]"
    with pytest.raises(Killed):
        run(stage(tmp_path, run=sampling, lr=.25), rerun=True)
    with pytest.raises(InputError, match=r"sft.new is left from an interrupted --rerun .*lr is 0.25 there"):
        run(stage(tmp_path, lr=.125), rerun=True)
    assert (tmp_path / "sft.new" / "unlabelled.json").exists() and weights(tmp_path) == "lr 0.5"


def test_logs_alone_are_no_loss(tmp_path):
    def early(cfg):
        (cfg.dir() / "metrics.jsonl").write_text("{}")
        raise Killed
    with pytest.raises(Killed):
        run(stage(tmp_path, run=early, lr=.5))
    run(stage(tmp_path, lr=.25))
    assert weights(tmp_path) == "lr 0.25"


def test_a_kill_before_anything_was_written_leaves_nothing_to_refuse(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / ".config.json.tmp-1").write_text("{")
    run(stage(tmp_path))
    assert weights(tmp_path) == "lr 0.001"


def test_a_copy_that_a_user_keeps_is_never_touched(tmp_path):
    run(stage(tmp_path))
    (tmp_path / "sft").rename(tmp_path / "sft.old")
    run(stage(tmp_path, lr=.5))
    run(stage(tmp_path, lr=.25), rerun=True)
    assert weights(tmp_path, "sft.old") == "lr 0.001" and weights(tmp_path) == "lr 0.25"
    assert [folder.name for folder in stages.finished(tmp_path)[0]] == ["sft", "sft.old"]


@pytest.mark.parametrize("file", ["config.json", "notes.txt"])
def test_a_folder_that_is_no_stage_s_is_never_touched(tmp_path, file):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / file).write_text('{"model_type": "llama"}')
    for rerun in (False, True):
        with pytest.raises(InputError, match="is not a stage of a run"):
            run(stage(tmp_path), rerun)
    assert tree(tmp_path).keys() == {f"sft/{file}"} or tree(tmp_path).keys() == {f"sft{os.sep}{file}"}


# ---- one process at a time -----------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from rlhf import stages\n" \
       "with stages.alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_process_waits_for_the_first_says_for_whom_and_then_reuses(tmp_path, monkeypatch):
    run(stage(tmp_path))
    said, waiting = [], threading.Event()
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: (said.append(args[0]), waiting.set()))
    with child([sys.executable, "-c", HOLD, str(tmp_path / "sft")], cwd=ROOT, stdin=subprocess.PIPE,
               stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        second = threading.Thread(target=run, args=(stage(tmp_path, run=killed),), daemon=True)
        second.start()
        assert waiting.wait(60) and second.is_alive()
        holder.stdin.close()
        second.join(60)
        assert not second.is_alive() and holder.wait(60) == 0
    assert re.match(f"sft: process {holder.pid} works on it; waiting", said[0])
    assert said[1].startswith("sft: reused")


def test_a_lock_ends_with_its_block_and_with_its_process(tmp_path):
    for _ in range(2):
        with stages.alone(tmp_path / "dpo"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".dpo.lock"]
    code = HOLD.replace("sys.stdin.read()", "sys.stdout.flush(); import os; os._exit(9)")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "dpo")], cwd=ROOT, timeout=120)
    assert killed.returncode == 9
    with stages.alone(tmp_path / "dpo"):
        assert (tmp_path / ".dpo.lock").read_text() == str(os.getpid())


# ---- small things --------------------------------------------------------------------------------------

def test_a_run_that_returns_nothing_is_fine_and_the_first_three_metrics_are_shown(tmp_path, capsys):
    run(stage(tmp_path, run=lambda cfg: None, name="silent"))
    assert re.search(r"^silent: done in 0 s$", capsys.readouterr().out, re.MULTILINE)
    run(stage(tmp_path, run=lambda cfg: {"rewards/a": 1., "b": None, "c": .12345, "d": 3, "e": 4}, name="many"))
    assert capsys.readouterr().out.endswith("many: done in 0 s | a 1 | c 0.1235 | d 3\n")


def test_every_setting_is_compared_or_listed_as_one_that_changes_nothing():
    one = stage("runs/x")
    own = {name for name in inspect.signature(sft.Config).parameters}
    assert one.settings.keys() == own - config.ELSEWHERE - config.ASKED - {"judge", "pool", "start", "lora_alpha"}


# ---- the day of a run ----------------------------------------------------------------------------------

def test_a_run_keeps_the_day_of_its_first_stage_and_is_reused_on_another(tmp_path, monkeypatch, capsys):
    """What templates take for today, in every stage of the run and when its checkpoint is served."""
    def day(out, name="sft", **settings):
        one = stage(out, name=name, **settings)
        run(one)
        assert json.loads((out / name / "config.json").read_text())["day"] == one.cfg.day
        return one.cfg.day
    monkeypatch.setattr(stages, "TODAY", "2026-11-30")
    assert day(tmp_path / "run") == "2026-11-30"
    monkeypatch.setattr(stages, "TODAY", "2026-12-01")
    assert day(tmp_path / "run") == "2026-11-30" and "sft: reused" in capsys.readouterr().out
    assert day(tmp_path / "run", "sft_b", lr=.5) == "2026-11-30"
    assert day(tmp_path / "other") == "2026-12-01"
    (tmp_path / "run" / "sft_b" / "config.json").write_text("{")                # find() has a sentence about it
    assert stages.first_day(tmp_path / "run") == "2026-11-30"


def test_the_variables_of_the_template_are_part_of_what_made_a_stage(tmp_path):
    run(stage(tmp_path, model=str(config.BASE), template='{"enable_thinking": false, "a": 1}'))
    same = stage(tmp_path, model=str(config.BASE), template='{"a":1,"enable_thinking":false}')
    assert stages.place(same, again(tmp_path)) is None
    with pytest.raises(InputError, match="finished and was made otherwise .template is"):
        run(stage(tmp_path, model=str(config.BASE)))


@pytest.mark.parametrize("said", ["enable_thinking=false", "[1]", "3", "{", '{"a": 1'])
def test_variables_that_are_no_json_object_are_refused(said):
    with pytest.raises(InputError, match="^--template .* is no JSON object: write it as in --template"):
        sft.Config(template=said)


def test_variables_without_a_template_would_change_nothing(tmp_path):
    shutil.copytree(config.BASE, tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": None}))
    with pytest.raises(InputError, match="--template would change nothing: .*base has no chat template"):
        sft.Config(model=str(tmp_path / "base"), template='{"a": 1}').text()
    assert sft.Config(template='{"a": 1}').text().variables == {"a": 1}
