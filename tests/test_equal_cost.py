"""Methods at equal cost, and the speedrun: what fits into a budget, what is chosen where, what is refused."""
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, refused

from data import InputError
from studies import equal_cost, kit, speedrun

torch.set_num_threads(1)
farm = functools.partial(command, "farm.py")


@pytest.mark.parametrize("seconds, size", [(10, 16), (2, 0), (2.49, 0), (2.5, 1), (1, 0)])
def test_the_largest_size_that_fits(seconds, size):
    fixed, slope = equal_cost.line_through((2, 3.), (6, 5.))
    assert (fixed, slope) == (2, .5) and equal_cost.size_for(seconds, fixed, slope) == size


def test_seconds_that_fall_with_the_size_are_noise():
    fixed, slope = equal_cost.line_through((2, 3.), (6, 2.9))
    assert 0 < slope < 1e-6 and fixed == pytest.approx(3)


@pytest.mark.parametrize("flags, why", [
    ("--methods ppo,gropo", "did you mean grpo"), ("--budgets 10;20", "are no seconds"),
    ("--budgets -5", "more than 0"), ("--budgets nan", "more than 0"), ("--tuning 0", "more than 0"),
    ("--lr 1", "--lr is not")])
def test_wrong_flags_of_equal_cost(flags, why):
    with pytest.raises(InputError, match=why):
        kit.parse("equal_cost", flags.split())


class World:
    """Instead of training: a run takes 2 s, and 0.5 s for each unit of its size; on val, which has fewer prompts, half
    of it. Each method has a learning rate that is best for it, as a multiple of the default; the win rate falls with
    the distance to it, and grows with the size. On the split eval all learning rates but the best are better."""
    BEST = {"ppo": .5, "grpo": 1., "online_dpo": 2.}

    def __init__(self, monkeypatch):
        self.runs, self.trained, self.judged = {}, [], []
        for name in ("train", "seconds_of", "rates", "verdicts", "true_reward_of"):
            monkeypatch.setattr(kit, name, getattr(self, name))
        monkeypatch.setattr(equal_cost.run_folders, "costs_of", self.costs_of)

    def train(self, cfg, seed, line):
        method, flags = line.split()[0], dict(re.findall(r"--(\w+) (\S+)", line))
        folder = cfg.runs(seed) / flags.get("name", method)
        run = {"method": method, "size": int(flags.get(equal_cost.SPENDS.get(method, ["n"])[0], 0)),
               "lr": float(flags.get("lr", "nan")), "val": "val" in Path(cfg.out).parts, "seed": seed}
        if folder not in self.runs:
            self.trained.append(run)
        self.runs[folder] = run
        return folder

    def seconds_of(self, folder):
        run = self.runs[folder]
        return (2 + .5 * run["size"]) / (1 + run["val"])

    def costs_of(self, folder):
        run = self.runs[folder]
        calls = 10 * run["size"] if run["method"] == "online_dpo" else 300
        return {"cpu_seconds": self.seconds_of(folder) + 30, "judge_calls": calls, "kl": 1.}

    def rates(self, cfg, seed, folders):
        found = {}
        for folder in folders:
            run = self.runs[folder]
            self.judged.append((run, seed))
            off = 0. if run["method"] == "best_of_n" else np.log2(run["lr"] / 5e-4 / self.BEST[run["method"]])
            rate = .3 + run["size"] / 1000 + (.1 * abs(off) if not run["val"] else -.1 * abs(off)) + seed / 1e4
            found[folder.name] = np.array([1 + rate - .02, 1 + rate + .02])
        return found

    def verdicts(self, cfg, seed, folders):
        return {folder.name: [{"preference": 2}, {"preference": 1}] for folder in folders}

    def true_reward_of(self, folder):
        return 7. + self.runs[folder]["size"] / 100


@pytest.fixture
def found(monkeypatch, tmp_path):
    """(the pretended world, the Result of a study in it) for four methods and two budgets."""
    world = World(monkeypatch)
    argv = f"--methods ppo,grpo,online_dpo,best_of_n --budgets 5,20 --seeds 0,3 --tuning 10 --out {tmp_path}"
    return world, equal_cost.run(kit.parse("equal_cost", argv.split()))


def test_tuning_is_equal_for_all_and_never_sees_eval(found):
    world, result = found
    assert not any(run["val"] for run in world.trained if run["seed"] != 100)
    assert {(run["val"], seed) for run, seed in world.judged} == {(True, 100), (False, 0), (False, 3)}
    for method, best in World.BEST.items():
        chosen = result.numbers["settings"][method]
        assert chosen["lr"] == pytest.approx(best * 5e-4)
        assert {row["lr"] for row in chosen["tried"]} == {2.5e-4, 5e-4, 1e-3}
        assert {(row["size"], row["seconds"]) for row in chosen["tried"]} == {(16, 5.)}
        assert {run["lr"] for run in world.trained if run["method"] == method and run["seed"] != 100} == {chosen["lr"]}
    assert result.numbers["settings"]["best_of_n"]["lr"] is None


def test_every_run_fills_its_budget_and_online_dpo_has_one_with_the_calls_of_the_pairs(found):
    world, result = found
    rows = result.rows["equal_cost"]
    assert {(row["method"], row["budget"]): row["seconds"] for row in rows if row["budget"] != "calls"} == {
        (method, budget): budget for method in ("ppo", "grpo", "online_dpo", "best_of_n") for budget in (5., 20.)}
    called = [row for row in rows if row["budget"] == "calls"]
    assert [(row["method"], row["judge_calls"], row["size"]) for row in called] == 2 * [("online_dpo", 300, 30)]
    assert len(rows) == 2 * 9


def test_cells_are_means_over_seeds_and_differences_are_paired(found):
    _, result = found
    cells = {(cell["method"], cell["budget"]): cell for cell in result.numbers["cells"]}
    ppo, grpo = cells["ppo", 20.], cells["grpo", 20.]
    assert ppo["size"] == 36 and ppo["win_rate"] == pytest.approx(30 + 3.6 + 0. + .015)
    assert ppo["spread"] == pytest.approx(.03 / 2 ** .5) and ppo["standard_error"] == pytest.approx(2)
    assert grpo["difference"]["difference"] == pytest.approx(0) and grpo["difference"]["standard_error"] < 1e-9
    assert cells["best_of_n", 5.]["difference"]["n_runs"] == 2 and ppo["difference"] is None
    order = result.numbers["paper_order"]
    assert list(order) == ["ppo - best_of_n"]           # of those that ran
    assert order["ppo - best_of_n"]["difference"] == pytest.approx(0) and order["ppo - best_of_n"]["n_runs"] == 2
    assert max(map(len, result.text.splitlines())) <= 80
    for shown in ("33.6 ± 2.0 (0.0)", "online_dpo (calls)", "0.00025 *"):
        assert shown in result.text, result.text
    assert result.figures.keys() == {"equal_cost", "equal_cost_truth"}


def test_a_budget_into_which_nothing_fits_is_refused(monkeypatch, tmp_path):
    World(monkeypatch)
    argv = f"--methods ppo,best_of_n --budgets 1,2 --out {tmp_path}"
    with pytest.raises(InputError, match="the shortest run takes 2.5 s"):
        equal_cost.run(kit.parse("equal_cost", argv.split()))


@pytest.mark.slow
def test_equal_cost_runs_as_a_whole(tmp_path):
    argv = ("--study", "equal_cost", "--quick", "--methods", "online_dpo,best_of_n", "--seeds", "0", "--out", tmp_path)
    result = farm(*argv)
    assert result.code == 0 and not result.err, result.err
    document = json.loads((tmp_path / "quick" / "equal_cost.json").read_text())
    assert {cell["method"] for cell in document["numbers"]["cells"]} == {"online_dpo", "best_of_n"}
    assert (tmp_path / "quick" / "equal_cost.svg").read_text().startswith("<svg")
    folders = {path.name for path in (tmp_path / "quick" / "seed0").iterdir() if path.is_dir()}
    assert folders >= {"sft", "pairs", "reward"}


# ---- the speedrun --------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, why", [
    ("--pairs.flip 0", "--pairs.flip is not allowed in this race: pairs is given"), ("--method sft", "is not known"),
    ("--sft.epochs 9", "sft is given"), ("--reward true", "nobody knows the true reward"),
    ("--stps 3", "did you mean steps"), ("--seconds nan", "more than 0"),
    ("--on_val --results", "leave out --results")])
def test_the_race_has_rules(flags, why, tmp_path):
    refused(farm("--study", "speedrun", "--out", tmp_path / "runs", *flags.split()), 2, why)
    assert not list(tmp_path.glob("runs/*"))


def test_settings_have_names_of_their_own_and_are_shown_as_they_were_given():
    one, two, three = (kit.parse("speedrun", argv.split()) for argv in (
        "--method dpo", "--method dpo --beta .3 --limit 9", "--method ppo --reward.epochs 1 --steps 3"))
    assert len({speedrun.line(cfg) for cfg in (one, two, three)}) == 3
    assert speedrun.command(two) == "dpo --beta 0.3 --limit 9"
    made = kit.configs(three, 0, speedrun.line(three))
    assert (made["ppo"].steps, made["reward"].epochs) == (3, 1) and made["reward"].stage.startswith("reward_")
    again = f"--method {speedrun.command(three)}".split()
    assert kit.parse("speedrun", again).passed == three.passed


@pytest.mark.parametrize("slowest, flags, said", [
    (60, "", "| +1.0 |"), (60.1, "", "slowest seed took 60.1 s, and 60 s"), (70, "--seconds 80", "| +1.0 |"),
    (9, "--on_val", "the board is about all prompts of eval"), (9, "--limit 100", "with --limit it is another race"),
    (9, "--eval_data x.json", "with --eval_data it is another race"), (9, "--slots 8", "| +1.0 |")])
def test_what_took_longer_has_no_row(slowest, flags, said):
    found = speedrun.verdict(kit.parse("speedrun", flags.split()), slowest, "| +1.0 |")
    assert said in found and ("No row" in found) == ("|" not in found)


@pytest.mark.slow
def test_a_speedrun_counts_all_but_sft_and_pairs(tmp_path):
    result = farm("--study", "speedrun", "--method", "best_of_n", "--n", "3", "--quick", "--seeds", "0,1", "--out",
                  tmp_path)
    assert result.code == 0 and not result.err, result.err
    numbers = json.loads((tmp_path / "quick" / "speedrun.json").read_text())["numbers"]["best_of_n --n 3"]
    seconds, points = [], []
    for seed in ("seed0", "seed1"):
        folders = {path.name.partition("_best")[0]: path for path in (tmp_path / "quick" / seed).iterdir()}
        took = {name: json.loads((folders[name] / "result.json").read_text())["cpu_seconds"]
                for name in ("reward", "speedrun")}
        seconds.append(sum(took.values()))
    points = [found["difference"] for found in numbers["by_seed"].values()]
    assert numbers["slowest"] == pytest.approx(max(seconds))
    assert numbers["difference"] == pytest.approx(sum(points) / 2)
    assert f"mean {numbers['difference']:+.1f} ± {numbers['standard_error']:.1f}" in result.out
