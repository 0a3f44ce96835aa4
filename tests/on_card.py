"""What a GPU does, on a pretend one: nothing is on the wrong device, results are the CPU's, and waits are counted."""
import json

import pytest
import tiny
import torch
import toy
from card import Card
from quick import few

import model
from rlhf import dpo, policy, ppo, reward, sampler, sft, update

torch.set_num_threads(1)
PROMPTS = tiny.texts([3, 9, 1, 5])


@pytest.fixture(autouse=True)
def steps_of_a_gpu(monkeypatch):
    for table in (sampler.CHECK_EVERY, sampler.PREFILL_TOKENS):
        monkeypatch.setitem(table, "card", table["cuda"])
    monkeypatch.setattr(model, "is_adjacent", lambda x, y: False)               # its tensors have no storage


def made(kind, device):
    """The same adapter and base on both devices."""
    policy = tiny.policy("lora")
    if kind == "int8":
        policy.gpt.quantise()
    policy.gpt.to(device)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "int8"])
def test_samples_are_those_of_a_cpu_and_cost_a_wait_for_each_check(kind):
    sample = sampler.sample.__wrapped__                                         # without inference_mode
    with torch.no_grad():
        expected = sample(made(kind, "cpu"), PROMPTS, [5, 17], 40, 1., 3, n=2, slots=5)
    with Card() as waits, torch.no_grad():
        on_card = made(kind, "card")
        checks, real = [], sampler.Engine.first_stops
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler.Engine, "first_stops", lambda *args: checks.append(1) or real(*args))
            waits.clear()
            rows = sample(on_card, PROMPTS, [5, 17], 40, 1., 3, n=2, slots=5)
    assert rows == expected
    assert waits.count("tolist") <= len(checks) + len(rows) and len(checks) < 20, waits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = toy.run_folder(tmp_path_factory.mktemp("card"), "lora")
    toy.write_pairs(folder, toy.preferences(24))
    return folder


# {method: (its file, its settings, waits for each micro-batch: for where tokens are, and where prompts end)}
RUNS = {"sft": (sft, {"epochs": 1, "batch_size": 4}, 1),
        "reward": (reward, {"epochs": 1, "batch_size": 8, "scale_answers": 16}, 1),
        "dpo": (dpo, {"epochs": 1, "batch_size": 8, "sample_every": 100}, 2),
        "ppo": (ppo, {"steps": 2, "rollout_batch": 8, "batch_size": 8, "num_ppo_epochs": 1, "val_prompts": 4}, 2)}


@pytest.mark.parametrize("name, int8", few([(name, int8) for name in RUNS for int8 in (False, True)], ("dpo", False)))
def test_a_run_learns_what_it_learns_on_a_cpu(name, int8, folder, monkeypatch):
    """The same metrics and the same answers; and each step waits for the GPU a few times only."""
    module, how, each = RUNS[name]
    load_base, found, micro_batches, waited = policy.load_base, {}, [0], [0]
    add, step = update.Updater.add, update.Updater.step

    def counted_add(self, *args):
        micro_batches[-1] += 1
        add(self, *args)

    def counted_step(self):
        micro_batches.append(0)
        waited.append(len(waits))
        return step(self)
    monkeypatch.setattr(sampler, "sample", torch.no_grad()(sampler.sample.__wrapped__))
    for device in ("cpu", "card"):
        cfg = toy.settings(folder, "lora", module.Config, **how, int8=int8, max_new_tokens=6, slots=8)
        cfg.stage = f"{name}_{device}"
        cfg.dir().mkdir(exist_ok=True)
        monkeypatch.setattr(policy, "load_base", lambda *args, device=device: load_base(*args).to(device))
        if device == "cpu":
            module.run(cfg)
        else:
            monkeypatch.setattr(update.Updater, "add", counted_add)
            monkeypatch.setattr(update.Updater, "step", counted_step)
            with Card() as waits:
                module.run(cfg)
        found[device] = toy.lines(cfg), *(json.loads(path.read_text()) for path in cfg.dir().glob("outputs.json"))
    for there, here in zip(found["card"][0], found["cpu"][0], strict=True):
        assert toy.known(there) == pytest.approx(toy.known(here), rel=1e-4, abs=1e-5)
    assert [[record["output"] for record in answers] for answers in found["card"][1:]] == \
        [[record["output"] for record in answers] for answers in found["cpu"][1:]]
    if name == "ppo":                                   # with a rollout in between
        assert waited[2] - waited[1] <= 40
    else:                                               # the norm of the gradient and the metrics, besides
        assert [b - a for a, b in zip(waited[2:], waited[3:])] == [2 + each * n for n in micro_batches[2:-1]]
