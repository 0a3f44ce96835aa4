"""One optimizer step: exact accumulation, AdamW by hand, the schedule, and steps that must not be taken."""
import inspect
import io
import json
import math
import re
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from data import InputError, OutOfMemory, progress
from rlhf import config, sft, update
from rlhf.update import Updater, batches, masked_mean, micro_batches

torch.set_num_threads(1)


# --- batches -----------------------------------------------------------------------------------------------

@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_example_comes_once_an_epoch(n, batch_size, epochs, seed):
    steps = batches(n, batch_size, epochs, seed)
    per_epoch = math.ceil(n / batch_size)
    assert len(steps) == epochs * per_epoch and max(map(len, steps)) <= batch_size
    for epoch in range(epochs):
        assert sorted(sum(steps[epoch * per_epoch:][:per_epoch], [])) == list(range(n))


def test_order_changes_with_epoch_and_seed_but_not_with_the_process():
    """A run that is continued tomorrow meets the same batches, whatever PYTHONHASHSEED is."""
    first, second = batches(50, 50, 2, seed=3)
    assert first != second != batches(50, 50, 1, seed=4)[0] != first
    program = f"import random\n{inspect.getsource(batches)}\nprint(batches(50, 50, 2, seed=3))"
    for hash_seed in "12":
        out = subprocess.check_output([sys.executable, "-c", program], env={"PYTHONHASHSEED": hash_seed}, timeout=60)
        assert json.loads(out) == [first, second]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200), st.randoms())
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_each_index_once_within_the_token_budget(lengths, tokens, r):
    indices = r.sample(range(len(lengths)), r.randint(1, len(lengths)))
    out = micro_batches(indices, lengths, tokens)
    assert sorted(sum(out, [])) == sorted(indices)
    assert all(len(micro) * max(lengths[i] for i in micro) <= tokens or len(micro) == 1 for micro in out)
    ordered = [lengths[i] for micro in out for i in micro]
    assert ordered == sorted(ordered)                           # neighbours pad each other little


# --- accumulation ------------------------------------------------------------------------------------------

def keep_losses(losses):
    """A log that only keeps the losses."""
    return toy.log(lambda metrics: losses.append(metrics["loss"]))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_micro_batches_of_unequal_rows_equal_one_big_batch(kind):
    """Three steps of SFT on rows of 1 to 30 answer tokens, one row at a time and all at once."""
    rows = list(zip(tiny.texts([2, 5, 3, 1, 9, 4, 2, 8]), tiny.texts([1, 30, 2, 17, 1, 3, 25, 2], seed=50)))
    results = []
    for tokens in (1, 60, 100_000):
        model, losses = tiny.policy(kind), []
        cfg = sft.Config(epochs=3, batch_size=8, lr=3e-4, micro_batch_tokens=tokens)
        sft.train(model, rows, cfg, keep_losses(losses), show=lambda step: None)
        results.append((torch.cat([p.detach().flatten() for p in model.trainable()]), losses))
    (one, loss_one), (some, _), (big, loss_big) = results
    assert (big - torch.cat([p.flatten() for p in tiny.policy(kind).trainable()])).abs().max() > 5e-4
    assert loss_big[2] < loss_big[0] and loss_one == pytest.approx(loss_big, rel=1e-5)
    assert (one - big).abs().max() < 3e-6 and (some - big).abs().max() < 3e-6        # a hundredth of one step


def test_the_first_loss_is_the_mean_over_answer_tokens():
    """Not over prompts, and not the mean of the rows' means."""
    rows, model, losses = list(zip(tiny.texts([2, 5]), tiny.texts([1, 9], seed=50))), tiny.policy(), []
    nll = []
    for prompt, response in rows:
        logp = model.gpt(torch.tensor([prompt + response])).log_softmax(-1)[0]
        nll += [-logp[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
    cfg = sft.Config(epochs=1, batch_size=2)
    sft.train(model, rows, cfg, keep_losses(losses), show=lambda step: None)
    assert losses == [pytest.approx(sum(nll) / 10, rel=1e-5)]


def test_masked_mean_counts_marked_entries_only():
    x, mask = torch.tensor([[1., 2, 9], [6, 9, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask) == masked_mean(x, mask.bool()) == 3


# --- the step ----------------------------------------------------------------------------------------------

def steps_by_hand(p, gradients, lr, steps, max_grad_norm):
    """Adam (Kingma & Ba) with clipping, warm-up over 5 % and a cosine to a tenth."""
    m = v = 0.
    for t, g in enumerate(gradients):
        g = g * min(1, max_grad_norm / g.norm().item())
        m, v = .9 * m + .1 * g, .98 * v + .02 * g ** 2
        warm = min(1, (t + 1) / max(1, round(.05 * steps)))
        rate = lr * warm * (.1 + .45 * (1 + math.cos(math.pi * t / steps)))
        p = p - rate * (m / (1 - .9 ** (t + 1))) / ((v / (1 - .98 ** (t + 1))).sqrt() + 1e-8)
    return p


def test_steps_equal_clipped_adamw_by_hand():
    """Gradients of very unequal size, above and below the clip; each is a sum over 4 and divided by that."""
    r = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, generator=r) * size for size in (100, 1, .01, 5)]
    p = torch.nn.Parameter(torch.arange(5.))
    updater = Updater([p], lr=.1, steps=40, max_grad_norm=2.)
    for g in gradients:
        updater.add((p * g).sum() * 3, 3)
        updater.add((p * g).sum(), 1)
        assert updater.step()["grad_norm"] == pytest.approx(g.norm().item(), rel=1e-5)       # before clipping
    by_hand = steps_by_hand(torch.arange(5.), gradients, .1, 40, 2.)
    torch.testing.assert_close(p.detach(), by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_the_rate_warms_up_and_decays_to_a_tenth(steps):
    p = torch.nn.Parameter(torch.ones(3))
    updater, rates = Updater([p], lr=.5, steps=steps), []
    for _ in range(steps):
        updater.add(p.sum(), 1)
        rates.append(updater.step()["lr"])
    warm, peak = max(1, steps // 20), max(rates)
    assert rates[warm - 1] == peak == pytest.approx(.5, rel=.01)
    assert rates[:warm] == pytest.approx([.5 * (t + 1) / warm for t in range(warm)], rel=.01)
    assert rates[warm - 1:] == sorted(rates[warm - 1:], reverse=True)
    if steps == 100:
        assert rates[-1] == pytest.approx(.05, rel=.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_taken(bad):
    params = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(3))]
    updater = Updater(params, lr=.1, steps=10)
    updater.add(sum(p.sum() for p in params), 1)
    updater.step()
    before = [p.detach().clone() for p in params]
    updater.add((params[0] * torch.tensor([1, bad, 1, 1])).sum() + params[1].sum(), 1)
    with pytest.raises(FloatingPointError, match="step 1"):
        updater.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_in_fp16_the_loss_is_scaled_and_a_step_that_overflows_is_left_out():
    """The scale halves until gradients fit, doubles while they do, and never shows in the step that is taken."""
    p, bad = torch.nn.Parameter(torch.arange(5.)), torch.tensor([1, math.inf, 1, 1, 1])
    updater = Updater([p], lr=.1, steps=40, max_grad_norm=2., fp16=True)
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for g in gradients:
        updater.add((p * g).sum() * 4, 4)
        assert updater.step()["grad_norm"] == pytest.approx(g.norm().item(), rel=1e-5)
    torch.testing.assert_close(p.detach(), steps_by_hand(torch.arange(5.), gradients, .1, 40, 2.), atol=1e-5, rtol=0)
    before = p.detach().clone()
    for halved in (512., 256.):
        updater.add((p * bad).sum(), 1)
        assert updater.step() == {"lr": pytest.approx(.1, rel=.1), "grad_norm": None, "loss_scale": halved}
    assert torch.equal(p, before)
    for _ in range(100):
        updater.add(p.sum(), 1)
        metrics = updater.step()
    assert metrics["loss_scale"] == 512. and not torch.equal(p, before)
    with pytest.raises(FloatingPointError, match="the gradient is inf|the gradient is nan"):
        for _ in range(20):
            assert updater.overflows < 20
            updater.add((p * bad).sum(), 1)
            updater.step()
    assert updater.overflows == 20


def test_a_parameter_without_gradient_stays():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    updater = Updater([used, unused], lr=.1, steps=2)
    updater.add(used.sum(), 1)
    updater.step()
    assert (used < 1).all() and (unused == 1).all()


def stage(out, name, **flags):
    """The Config of a stage of this name in the run folder `out`."""
    cfg = config.Config(out=str(out), **flags)
    cfg.stage = name
    return cfg


def test_metrics_are_written_one_object_a_step(tmp_path, capsys):
    log = update.Log(stage(tmp_path, "dpo"), steps=2, shown=("loss",))
    for step in range(2):
        log.step(step, {"loss": 1.5 - step, "lr": .1}, tokens=100)
    log.sample(1, "Say moo", "moo", score=.25)
    first, second = (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 0, "loss": 1.5, "lr": .1}
    assert json.loads(second) == {"step": 1, "loss": .5, "lr": .1}
    sample = json.loads((tmp_path / "dpo" / "samples.jsonl").read_text())
    assert sample == {"step": 1, "instruction": "Say moo", "output": "moo", "score": .25}
    shown = capsys.readouterr().out
    assert "dpo 2/2 | loss 0.5 | " in shown
    assert "    'Say moo'\n    -> 'moo' (score 0.25)\n" in shown


class Writer:
    """In place of TensorBoard's SummaryWriter."""

    def __init__(self, folder):
        self.folder, self.kept, self.written = folder, [], []
        Writer.last = self

    def add_scalar(self, *scalar):
        self.kept.append(scalar)

    def flush(self):
        self.written += self.kept
        self.kept = []


@pytest.fixture
def tensorboard(monkeypatch):
    package = ModuleType("tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))


def test_metrics_go_to_tensorboard_on_demand_and_are_not_lost_in_a_kill(tmp_path, tensorboard):
    log = update.Log(stage(tmp_path, "dpo", tensorboard=True), steps=2, shown=("loss",))
    for step in range(2):
        log.step(step, {"loss": 1.5 - step, "rewards/margins": None}, tokens=100)
        assert Writer.last.written == [("loss", 1.5 - each, each) for each in range(step + 1)]
    assert Writer.last.folder == tmp_path / "dpo"
    Writer.last = None
    interrupted = tmp_path / "dpo" / "events.out.tfevents.1"
    interrupted.touch()
    update.Log(stage(tmp_path, "dpo"), steps=2, shown=("loss",)).step(0, {"loss": 1.}, tokens=1)
    assert Writer.last is None and not interrupted.exists()


def test_without_the_package_tensorboard_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match="^--tensorboard needs the package tensorboard: pip install tensorboard$"):
        stage(tmp_path, "dpo", tensorboard=True)


class Terminal(io.StringIO):
    """What stands on the screen: a line that begins with a carriage return overwrites the one before."""

    def isatty(self):
        return True

    def screen(self):
        return [line.rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when the test says so; and 80 columns."""
    clock = SimpleNamespace(now=100.)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setenv("COLUMNS", "80")
    yield clock
    progress.Progress.drawn = False


def test_a_training_line_is_updated_in_place_on_a_terminal(tmp_path, monkeypatch, clock):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    log = update.Log(stage(tmp_path, "dpo"), steps=4, shown=("loss",))
    for step in range(4):
        clock.now += 5
        log.step(step, {"loss": 4. - step}, tokens=100)
        if step == 2:
            assert terminal.screen()[-1].startswith("dpo 3/4 | loss 2 | ") and terminal.screen()[-1].endswith("eta 5s")
            log.sample(2, "Say moo", "moo")
    assert [line[:16] for line in terminal.screen()] == [
        "dpo 1/4 | loss 4", "    'Say moo'", "    -> 'moo'", "dpo 4/4 | loss 1", ""]


def test_elsewhere_a_training_line_is_printed_every_ten_seconds_and_for_the_first_and_last_step(
        tmp_path, capsys, clock):
    log = update.Log(stage(tmp_path, "dpo"), steps=30, shown=("loss",))
    for step in range(30):
        clock.now += 1
        log.step(step, {"loss": 1.}, tokens=100)
    shown = capsys.readouterr().out
    assert "\r" not in shown and re.findall(r"^dpo +(\d+)/30", shown, re.MULTILINE) == ["1", "11", "21", "30"]


def test_lines_fit_the_screen_and_lose_whole_numbers_only(tmp_path, capsys, clock):
    names = [f"objective/{name}" for name in ("scores", "kl", "rlhf_reward", "clipfrac_avg", "entropy")]
    log = update.Log(stage(tmp_path, "expert_iteration"), steps=1000, shown=names)
    log.step(0, dict.fromkeys(names, -1.2345e-5), tokens=100)
    log.sample(0, "word " * 30, "other\n" * 30, score=-12.5)
    line, asked, answered = capsys.readouterr().out.splitlines()
    assert max(map(len, (line, asked, answered))) <= 79
    assert re.fullmatch(r"expert_iteration    1/1000 \| scores -1.234e-05 \| kl -1.234e-05 \| eta 0s", line)
    assert asked.endswith("...") and re.search(r"other\\nother.*\.\.\. \(score -12.50\)$", answered)


def test_short_work_shows_no_progress_and_what_is_closed_leaves_no_trace(monkeypatch, clock):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    work = progress.Progress("sft: sampling", 100)
    work.update(1)
    assert terminal.getvalue() == ""
    clock.now += 7000
    work.update(50, "3.2k tok/s")
    assert terminal.screen() == ["sft: sampling  50/100 | 3.2k tok/s | eta 1.9h"]
    progress.Progress.close()
    print("and then")
    assert terminal.screen() == ["and then", ""]


def test_without_the_resource_module_memory_is_not_counted(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    windows = runpy.run_path(update.__file__)
    assert windows["resource"] is None and (torch.cuda.is_available() or windows["peak_gb"]() == 0)
    assert update.peak_gb() > 0
    with pytest.raises(OutOfMemory, match="^out of memory; less"), windows["plainly"]("less"):
        raise MemoryError


@pytest.mark.parametrize("speed, said", [(.4, "0"), (41.3, "41"), (999, "999"), (3210, "3.2k"), (41_000, "41.0k")])
def test_a_slow_model_s_speed_is_a_number(speed, said):
    assert progress.amount(speed) == said


def test_the_line_leaves_out_what_is_not_known(tmp_path, capsys):
    log = update.Log(stage(tmp_path, "dpo"), 1, ("loss", "rewards/accuracies"))
    log.step(0, {"loss": .5, "rewards/accuracies": None}, 9)
    assert "dpo 1/1 | loss 0.5 | " in (shown := capsys.readouterr().out) and "accuracies" not in shown
    assert json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text())["rewards/accuracies"] is None
