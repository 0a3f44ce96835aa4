"""Knobs: every one has its help, defaults < preset < flags, and what cannot be is refused with its name."""
import importlib
import re
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch

import rlhf
from data import InputError
from rlhf import PARTS, config, lacks, methods, plan
from rlhf.config import PRESETS, Config, build, helps, parse

torch.set_num_threads(1)
CONFIGS = {name: importlib.import_module(f"rlhf.{name}").Config for name in methods()}
every_method = pytest.mark.parametrize("name", CONFIGS)


@dataclass
class Knobs(Config):
    """What a student might write."""
    lr: float = 1e-5                    # peak learning rate, 50% of "it" # a second mark
    epochs: int = 2                     # passes
    greedy: bool = False                # no sampling
    kind: str = "k1"                    # of KL

    BARN = {"lr": 5e-4}


def test_methods_are_the_files_that_have_the_three_parts():
    assert {"sft", "pairs", "dpo"} <= set(methods())
    assert not {"config", "policy", "sampler", "update", "__init__"} & set(methods())
    for name in methods():
        assert all(hasattr(importlib.import_module(f"rlhf.{name}"), part) for part in PARTS)


@pytest.mark.parametrize("source, missing", [
    ("from rlhf.dpo import NEEDS, Config, run", []),
    ("NEEDS: tuple = ()\nclass Config: pass\ndef run(cfg): pass", []),
    ("import rlhf.dpo as Config\nNEEDS, run = (), print", []),
    ("def helper():\n    NEEDS = ()\n    def run(cfg): pass\nclass A:\n    Config = 1", ["NEEDS", "Config", "run"]),
    ("'NEEDS'\nclass Config: pass\n# run", ["NEEDS", "run"])])
def test_what_a_file_lacks_is_read_from_its_top_level_without_importing_it(source, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "FOLDER", tmp_path)
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "broken.py").write_text("def run(:")
    assert lacks("mine") == missing and methods() == ([] if missing else ["mine"])


@every_method
def test_every_knob_has_a_help_and_a_type_that_can_be_typed(name):
    found = helps(CONFIGS[name])
    for field in fields(CONFIGS[name]):
        assert found.get(field.name, "").strip(), f"{name}: no comment behind {field.name}"
        assert field.type in (int, float, str, bool) and type(field.default) is field.type, (name, field.name)


@every_method
def test_help_mentions_every_knob_and_what_the_method_is(name, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(CONFIGS[name], ["--help"], "farm.py", importlib.import_module(f"rlhf.{name}").__doc__)
    shown = capsys.readouterr().out
    joined = " ".join(shown.split())
    assert exit.value.code == 0
    for field in fields(CONFIGS[name]):
        assert re.search(rf"--(no-)?{field.name}\b", shown), field.name
        assert " ".join(helps(CONFIGS[name])[field.name].split()) in joined
        assert str(field.default) in shown
    assert importlib.import_module(f"rlhf.{name}").__doc__.splitlines()[0] in joined
    assert max(map(len, shown.splitlines())) <= 80
    knobs = re.findall(r"^  --(?!no-)(\w+)", shown, re.MULTILINE)
    own = [field.name for field in fields(CONFIGS[name]) if field.name not in {f.name for f in fields(Config)}]
    assert len(knobs) == len(set(knobs)) == len(fields(CONFIGS[name])) and knobs[:len(own)] == own


def test_a_knob_without_a_comment_is_a_flag_without_help(capsys):
    @dataclass
    class Bare(Config):
        bare: int = 7
    assert helps(Bare)["bare"] == "" and parse(Bare, ["--bare", "8"], "p") == {"bare": 8}
    with pytest.raises(SystemExit):
        parse(Bare, ["--help"], "p")
    assert re.search(r"--bare X +\[7\]", capsys.readouterr().out)


def test_a_docstring_s_lines_are_wrapped_and_its_breaks_kept():
    text = "One line.\n\n" + "word " * 23 + "end\ngoes on here.\nA new one, as the one before was short.\n  code  here"
    shown = config.wrapped(text).splitlines()
    assert shown[:2] == ["One line.", ""] and max(map(len, shown)) <= 79
    assert "end goes on here." in " ".join(shown) and shown[-2] == "A new one, as the one before was short."


def test_help_survives_what_a_student_writes_into_a_comment(capsys):
    with pytest.raises(SystemExit):
        parse(Knobs, ["--help"], "farm.py")
    shown = " ".join(capsys.readouterr().out.split())
    assert 'peak learning rate, 50% of "it" # a second mark [1e-05; 0.0005 in barn]' in shown


@every_method
def test_presets_and_barn_only_name_knobs_that_exist(name):
    knobs = {field.name: field.type for field in fields(CONFIGS[name])}
    for tuned in (*PRESETS.values(), CONFIGS[name].BARN):
        assert tuned.keys() <= knobs.keys()
        assert all(type(value) is knobs[knob] for knob, value in tuned.items()), tuned


def test_presets_change_the_machine_and_not_the_mathematics():
    assert {knob for name in ("t4", "24gb", "80gb") for knob in PRESETS[name]} <= config.ELSEWHERE
    assert config.ELSEWHERE - {"shared_prompt"} <= {field.name for field in fields(Config)}


# ---- defaults < preset < flags -------------------------------------------------------------------------

def test_flags_beat_the_preset_and_the_preset_the_defaults():
    assert build(Knobs, {"preset": "24gb"}).lr == 1e-5 and build(Knobs, {"preset": "24gb"}).checkpointing
    assert build(Knobs, {}).lr == 5e-4 and build(Knobs, {}).max_new_tokens == PRESETS["barn"]["max_new_tokens"]
    assert build(Knobs, {"lr": 1., "slots": 3}).lr == 1. and build(Knobs, {"slots": 3}).slots == 3
    assert build(Knobs, {"preset": "80gb", "checkpointing": False}).checkpointing is False
    assert build(Knobs, {"lora_rank": 4}).lora_rank == 4 and build(Knobs, {}).lora_rank == 0


def test_a_switch_is_turned_off_with_underscores_or_dashes():
    for flag in ("--no_graph", "--no-graph"):
        assert config.parse(Config, [flag, "--int8"], "farm.py") == {"graph": False, "int8": True}


@every_method
def test_what_would_change_nothing_is_a_knob_with_a_reason(name):
    """Whatever the settings are; a flag that does change something is never among them."""
    knobs = {field.name for field in fields(CONFIGS[name])}
    for given in ({"judge": "none", "labels": "noisy", "device": "cpu"}, {"lora_rank": 4}):
        cfg = build(CONFIGS[name], {key: value for key, value in given.items() if key in knobs and (
            key != "judge" or not build(CONFIGS[name], {}).asks_judge)})
        assert cfg.idle().keys() <= knobs and all(cfg.idle().values())
        trains = set() if name == "base" else {"temperature"}
        assert not cfg.idle().keys() & {"lr", "seed" if name != "pairs" else "lr", "out", "model", *trains}
    whole = {"lora_alpha", "merge"} - ({"merge"} if name == "reward" else set())    # it is merged with its head
    assert whole <= build(CONFIGS[name], {}).idle().keys()
    adapters = set() if name == "base" else {"lora_alpha"}
    assert not {"pool", "cache", "graph", *adapters} & build(CONFIGS[name], {"lora_rank": 4}).idle().keys()


def test_an_int8_base_cannot_be_trained_itself():
    with pytest.raises(InputError, match="--int8 needs adapters"):
        Config(int8=True, lora_rank=0)
    assert Config(int8=True, lora_rank=4).int8


def test_the_preset_follows_the_model(tmp_path):
    assert build(Knobs, {}).preset == build(Knobs, {"model": "barn"}).preset == "barn"
    other = build(Knobs, {"model": str(tmp_path)})
    assert (other.preset, other.lr, other.lora_rank) == ("cpu", 1e-5, 16)
    assert other.checkpoint == tmp_path
    assert build(Knobs, {"model": "some/folder", "preset": "barn"}).lr == 5e-4
    assert build(Knobs, {}).checkpoint == config.BASE


@pytest.mark.parametrize("there, gigabytes, device, preset", [
    (False, 0, "", "cpu"), (True, 140, "cpu", "cpu"), (True, 15, "", "t4"), (True, 24, "", "24gb"),
    (True, 80, "cuda", "80gb")])
def test_the_preset_of_a_real_model_follows_the_machine(there, gigabytes, device, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    card = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert build(Knobs, {"model": "some/folder", "device": device}).preset == preset
    assert build(Knobs, {"model": "some/folder", "preset": "24gb"}).preset == "24gb"


def test_all_weights_learn_at_a_tenth_of_an_adapter_s_rate():
    assert build(Knobs, {"model": "some/folder", "lora_rank": 0}).lr == pytest.approx(1e-6)
    assert build(Knobs, {"model": "some/folder", "lora_rank": 0, "lr": 1.}).lr == 1
    assert build(Knobs, {"lora_rank": 0}).lr == 5e-4
    assert build(Knobs, {"model": "some/folder", "lora_rank": 8}).lr == 1e-5


def test_a_stage_lives_in_the_folder_of_its_name():
    cfg = CONFIGS["dpo"](out="runs/x")
    cfg.stage, cfg.folders = "simpo", {"pairs": "pairs_coin"}       # its Config may be another method's
    assert [path.as_posix() for path in (cfg.dir(), cfg.dir("sft"), cfg.dir("pairs"))] == [
        "runs/x/simpo", "runs/x/sft", "runs/x/pairs_coin"]
    assert Config.stage == "" and Config.folders == {}


# ---- the command line ----------------------------------------------------------------------------------

def test_only_what_was_given_is_returned_with_its_type():
    assert parse(Knobs, [], "p") == {}
    argv = "--lr 1e-3 --epochs=3 --greedy --kind k2 --no-checkpointing --data a%b.json"
    given = parse(Knobs, argv.split(), "p")
    assert given == {"lr": 1e-3, "epochs": 3, "greedy": True, "kind": "k2", "checkpointing": False,
                     "data": "a%b.json"}
    assert [type(value) for value in given.values()] == [float, int, bool, str, bool, str]


def test_dashes_and_underscores_are_the_same():
    for flag in ("--max_new_tokens", "--max-new-tokens"):
        assert parse(Knobs, [flag, "7"], "p") == {"max_new_tokens": 7}


@pytest.mark.parametrize("argv", [
    "--lrr 1", "--l 1", "--epoch 3", "--max-new_token 3", "--epochs", "--epochs 2.5", "--lr fast",
    "--greedy yes", "--limit 1e3", "extra"])
def test_typos_and_bad_values_are_refused_and_name_the_flag(argv):
    named = "yes" if argv == "--greedy yes" else argv.split()[0].replace("-new", "_new")
    with pytest.raises(InputError, match=f"{named}.*; farm.py --method knobs --help lists all flags"):
        parse(Knobs, argv.split(), "farm.py --method knobs")


@pytest.mark.parametrize("argv, meant", [
    ("--lrr 1", "--lr"), ("--epoch 3", "--epochs"), ("--max-new_token=3", "--max_new_tokens"), ("--no-grap", ""),
    ("--greddy", "--greedy"), ("--zzz 1", "")])
def test_a_typo_of_a_flag_gets_a_suggestion(argv, meant):
    with pytest.raises(InputError) as refused:
        parse(Knobs, argv.split(), "p")
    assert (f"(did you mean {meant}?)" in str(refused.value)) == bool(meant)


@pytest.mark.parametrize("knob, typo, meant", [
    ("pool", "p_singel", "p_single"), ("dtype", "float23", "float32"), ("device", "cud", "cuda"),
    ("preset", "24bg", "24gb")])
def test_a_typo_of_a_choice_gets_a_suggestion(knob, typo, meant):
    with pytest.raises(InputError, match=rf"--{knob} '{typo}' is not known \(did you mean {meant}\?\): choose from "):
        build(Knobs, {knob: typo})


# ---- flags of stages -----------------------------------------------------------------------------------

def test_a_dotted_flag_is_for_its_stage_and_the_rest_for_the_method():
    argv = "--beta 0.2 --sft.lr 1e-3 --sft.epochs=5 --limit 3 --pairs.flip 0 --out runs/a.b"
    assert plan.route([*argv.split(), "--sft.no-checkpointing"], "dpo") == {
        "dpo": {"beta": .2, "limit": 3, "out": "runs/a.b"}, "pairs": {"flip": 0.},
        "sft": {"lr": 1e-3, "epochs": 5, "checkpointing": False}}
    assert plan.route([], "dpo") == {"dpo": {}}
    assert plan.route(["--sft.max-new-tokens", "9"], "dpo")["sft"] == {"max_new_tokens": 9}


@pytest.mark.parametrize("argv, named", [
    ("--sft.beta 1", "--beta"), ("--sft.lr fast", "--lr"), ("--beta", "--beta"), ("--sft.lr", "--lr"),
    ("--sft. 1", "--sft."), ("--sft_lr 1", "--sft_lr")])
def test_a_dotted_typo_is_refused_and_names_the_flag(argv, named):
    with pytest.raises(InputError, match=named):
        plan.route(argv.split(), "dpo")


@pytest.mark.parametrize("stage", ["nope", "../farm"])
def test_an_unknown_method_is_named(stage):
    with pytest.raises(InputError, match=f"method '{stage}' is not known: choose from .*dpo"):
        plan.load(stage)


@pytest.mark.parametrize("stage", ["config", "update"])
def test_a_flag_of_a_file_that_is_no_method_says_what_it_lacks(stage):
    with pytest.raises(InputError, match=f"rlhf/{stage}.py is no method: it has no NEEDS"):
        plan.route([f"--{stage}.lr", "1"], "dpo")


def test_a_plan_has_every_need_once_and_first():
    assert plan.order("dpo") == ["sft", "pairs", "dpo"] and plan.order("sft") == ["sft"]
    for name in methods():
        order = plan.order(name)
        assert order[-1] == name and len(order) == len(set(order))
        for stage in order:
            assert set(plan.needs(stage, build(CONFIGS[stage], {}))) <= set(order[:order.index(stage)])


@pytest.mark.parametrize("given, flip", [({}, .18), ({"judge": "gpt-4"}, .25), ({"data": "x.json"}, .25),
                                         ({"judge": "barn-human"}, 0), ({"judge": "barn-human", "flip": .3}, .3),
                                         ({"pool": "p_single"}, 0), ({"pool": "p_pairwise"}, 0),
                                         ({"pool": "own.json"}, 0), ({"pool": "p_single", "flip": .1}, .1)])
def test_flips_belong_to_the_crowd(given, flip):
    assert build(CONFIGS["pairs"], given).flip == flip
