"""The offline methods against TRL, closed forms and brute force; and that each learns."""
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny
import torch
import toy
from quick import few

from data import InputError
from rlhf import cdpo, dpo, ipo, kto, logprobs, orpo, policy, simpo
from rlhf.pairs import load_pairs

torch.set_num_threads(1)
METHODS = {"simpo": simpo, "ipo": ipo, "cdpo": cdpo, "orpo": orpo, "kto": kto}


def numbers(b=8):
    """Log-probs and reference log-probs (2, b), and lengths (2, b) from 1 to 40."""
    r = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 41, (2, b), generator=r)
    logp, ref_logp = -lengths * torch.rand(2, 2, b, generator=r) * 2
    return logp.requires_grad_(), ref_logp, lengths


def equal(ours, theirs, *inputs):
    """The same value, and the same gradients with respect to the inputs."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert mine.abs().max() > 1e-4


# --- TRL on the same random tensors: its own loss functions, with a model that returns given log-probs -----------

def trainer(**settings):
    """What TRL's loss functions read of a trainer."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
                           precompute_ref_logps=True, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
                           _tp_size=1, **settings)


def tokens(logp, lengths):
    """What TRL's trainers read of a batch and of a model's output, for answers with these log-probs (2, b) and lengths
    (2, b); prompts have one token."""
    at = torch.arange(lengths.max() + 1)                                                 # (T,)
    mask = ((at > 0) & (at <= lengths.flatten()[:, None])).long()                        # (2b, T)
    each = logp.flatten()[:, None] / lengths.flatten()[:, None] * mask[:, 1:]            # (2b, T-1)
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    only_logged = {"entropy": mask[:, 1:], "mean_logits": mask[:, 1:], "is_top1": mask[:, 1:].bool()}
    return batch, lambda **_: SimpleNamespace(log_probs=each, **only_logged)


def trl_dpo(loss_type, logp, ref_logp, lengths, beta, label_smoothing=0.):
    trl = pytest.importorskip("trl")
    batch, model = tokens(logp, lengths)
    batch |= {"ref_chosen_logps": ref_logp[0], "ref_rejected_logps": ref_logp[1]}
    mine = trainer(beta=beta, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.],
                   label_smoothing=label_smoothing, use_weighting=False)
    return trl.DPOTrainer._compute_loss(mine, model, batch, False)


def test_ipo_equals_trl():
    logp, ref_logp, lengths = numbers()
    losses, _ = ipo.ipo_loss(logp, ref_logp, lengths, ipo.Config(beta=.3))
    equal(losses.mean(), trl_dpo("ipo", logp, ref_logp, lengths, .3), logp)


def test_robust_dpo_equals_trl():
    logp, ref_logp, lengths = numbers()
    losses, _ = cdpo.cdpo_loss(logp, ref_logp, lengths, cdpo.Config(beta=.3, label_smoothing=.2, robust=True))
    equal(losses.mean(), trl_dpo("robust", logp, ref_logp, lengths, .3, .2), logp)


def trl_cpo(loss_type, chosen, rejected, **settings):
    """Losses (b,) and rewards (2, b) of TRL's CPOTrainer without the NLL."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    given = {"alpha": 0., "label_smoothing": 0., **settings}
    losses, *rewards = cpo.CPOTrainer.cpo_loss(trainer(loss_type=loss_type, **given), chosen, rejected)
    return losses, torch.stack(rewards)


def test_simpo_equals_trl():
    logp, _, lengths = numbers()
    losses, rewards = simpo.simpo_loss(logp, None, lengths, simpo.Config(beta=2.5, gamma=.7))
    theirs, their_rewards = trl_cpo("simpo", *logp / lengths, beta=2.5, simpo_gamma=.7)
    torch.testing.assert_close(rewards, their_rewards)
    torch.testing.assert_close(losses, theirs, atol=1e-5, rtol=1e-5)
    equal(losses.mean(), theirs.mean(), logp)


@pytest.mark.parametrize("beta", [.1, .3])
def test_conservative_dpo_equals_trl_s_smoothing(beta):
    """TRL's DPO has none; its CPO has, on log-probs without a reference."""
    logp, ref_logp, lengths = numbers()
    losses, _ = cdpo.cdpo_loss(logp, ref_logp, lengths, cdpo.Config(beta=beta, label_smoothing=.2))
    theirs, _ = trl_cpo("sigmoid", *logp - ref_logp, beta=beta, label_smoothing=.2)
    equal(losses.mean(), theirs.mean(), logp)


def test_orpo_equals_trl():
    """The odds ratio is TRL's; the NLL is the answer's own, without the prompt."""
    trl_orpo = pytest.importorskip("trl.experimental.orpo")
    logp, _, lengths = numbers()
    losses, rewards = orpo.orpo_loss(logp, None, lengths, orpo.Config(beta=.7))
    ratio, *their_rewards, _, _ = trl_orpo.ORPOTrainer.odds_ratio_loss(trainer(beta=.7), *logp / lengths)
    nll = -logp[0] / lengths[0]
    torch.testing.assert_close(rewards, torch.stack(their_rewards))
    equal(losses.mean(), (nll - ratio).mean(), logp)


@pytest.mark.parametrize("drift", [1., -1.])
def test_kto_equals_trl(drift):
    """With a reference point above 0, and with an estimate below 0, which is clamped."""
    trl = pytest.importorskip("trl")
    logp, ref_logp, lengths = numbers()
    ref_kl_logp = torch.full((16,), -20.)
    batch, model = tokens(logp, lengths)
    batch |= {"label": torch.arange(16) < 8, "ref_logps": ref_logp.flatten(), "ref_KL_logps": ref_kl_logp}
    mine = trainer(beta=.3, loss_type="kto", desirable_weight=1.2, undesirable_weight=.8, calculate_KL=True,
                   _compute_kl_logps=lambda *args: ref_kl_logp + drift)
    theirs = trl.KTOTrainer._compute_loss(mine, model, batch, False)
    cfg = kto.Config(beta=.3, desirable_weight=1.2, undesirable_weight=.8)
    losses, _ = kto.kto_loss(logp, ref_logp, lengths, cfg, torch.tensor(max(0., drift)))
    equal(losses.mean(), theirs, logp)


# --- closed forms ---------------------------------------------------------------------------------------

def test_the_losses_by_hand():
    """Means over 2 and 4 tokens; 1 nat above the reference, and 3 below it."""
    logp, ref_logp = torch.tensor([[-2.], [-12.]]), torch.tensor([[-3.], [-9.]])
    lengths = torch.tensor([[2], [4]])

    def loss(f, cfg, *more):
        losses, rewards = f(logp, ref_logp, lengths, cfg, *more)
        return losses.item(), rewards.flatten().tolist()

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))
    value, rewards = loss(simpo.simpo_loss, simpo.Config(beta=2., gamma=.5))
    assert rewards == [-2, -6] and value == pytest.approx(-log_sigmoid(4 - .5))
    value, rewards = loss(ipo.ipo_loss, ipo.Config(beta=.2))
    assert rewards == pytest.approx([.1, -.15]) and value == pytest.approx((.5 + .75 - 2.5) ** 2)
    value, rewards = loss(cdpo.cdpo_loss, cdpo.Config(beta=.5, label_smoothing=.25))
    assert rewards == [.5, -1.5] and value == pytest.approx(-.75 * log_sigmoid(2) - .25 * log_sigmoid(-2))
    value, rewards = loss(orpo.orpo_loss, orpo.Config(beta=.1))
    odds = [p / (1 - p) for p in (math.exp(-1), math.exp(-3))]
    assert rewards == pytest.approx([-.1, -.3])
    assert value == pytest.approx(1 - .1 * log_sigmoid(math.log(odds[0] / odds[1])))
    value, rewards = loss(kto.kto_loss, kto.Config(beta=.5), torch.tensor(.4))
    good, bad = 1 - math.exp(log_sigmoid(.5 * (1 - .4))), 1 - math.exp(log_sigmoid(.5 * (.4 + 3)))
    assert rewards == [.5, -1.5] and value == pytest.approx((good + bad) / 2)


def test_robust_dpo_on_flipped_labels_is_dpo_on_true_ones():
    """The mean over which labels are flipped, of value and gradient; the conservative loss has a finite best margin."""
    logp, ref_logp, lengths = numbers()
    cfg = cdpo.Config(beta=.3, label_smoothing=.2, robust=True)
    right, wrong = (cdpo.cdpo_loss(*pairs, lengths, cfg)[0] for pairs in (
        (logp, ref_logp), (logp.flip(0), ref_logp.flip(0))))
    equal((.8 * right + .2 * wrong).mean(), dpo.dpo_loss(logp, ref_logp, lengths, cfg)[0].mean(), logp)
    margin = torch.tensor([[math.log(.8 / .2) / .3], [0.]], requires_grad=True)
    losses, _ = cdpo.cdpo_loss(margin, torch.zeros(2, 1), lengths, cdpo.Config(beta=.3, label_smoothing=.2))
    assert torch.autograd.grad(losses.sum(), margin)[0].abs().max() < 1e-7


@pytest.mark.parametrize("mean, expected", [(-1e-4, 9.21029), (-.5, .43275), (-30., -30.)])
def test_log_odds_are_accurate_near_both_ends(mean, expected):
    assert orpo.log_odds(torch.tensor(mean)).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_swapped_answers_cost_more_and_no_gradient_comes_through_rewards(name):
    logp, ref_logp, lengths = torch.tensor([[-2.], [-8.]]), torch.tensor([[-4.], [-4.]]), torch.full((2, 1), 4)
    method = METHODS[name]
    loss_fn, more = getattr(method, f"{name}_loss"), [torch.tensor(.1)] * (name == "kto")
    losses, rewards = loss_fn(logp.requires_grad_(), ref_logp, lengths, method.Config(), *more)
    swapped, _ = loss_fn(logp.flip(0), ref_logp, lengths, method.Config(), *more)
    gradient, = torch.autograd.grad(losses.sum(), logp)
    assert losses < swapped and gradient[0] < 0 < gradient[1] and not rewards.requires_grad


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="label_smoothing 0.5"):
        cdpo.Config(label_smoothing=.5)
    with pytest.raises(InputError, match="batch_size 1"):
        kto.Config(batch_size=1)


# --- whole runs, on a tiny model --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders whose stages sft and pairs are done, for both kinds of training."""
    return toy.run_folders(tmp_path_factory, pairs=True)


def ran(folders, kind, method, **changes):
    """(settings, metrics of each step, what run() returned)."""
    usual = {"lr": 3e-3, "epochs": 8, "batch_size": 20, "max_new_tokens": 8}
    cfg = toy.settings(folders[kind], kind, method.Config, **usual | changes)
    result = method.run(cfg)
    return cfg, toy.lines(cfg), result


@pytest.mark.parametrize("name, kind", few([(name, kind) for name in METHODS for kind in toy.KINDS],
                                           *((name, "full") for name in METHODS)))
def test_it_learns_what_the_preferred_answers_have_in_common(name, kind, folders):
    cfg, metrics, result = ran(folders, kind, METHODS[name])
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"] + .02
    assert metrics[-1]["rewards/accuracies"] > .9 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert result.keys() >= {"loss", "rewards/margins", "eval/mean_length", "objective/kl"}


@pytest.mark.parametrize("name, start", [("ipo", (1 / (2 * .1)) ** 2), ("cdpo", math.log(2)), ("kto", .5)])
def test_a_run_starts_at_its_reference(name, start, folders):
    _, metrics, _ = ran(folders, "lora", METHODS[name], epochs=1, micro_batch_tokens=60)
    assert metrics[0]["loss"] == pytest.approx(start, rel=1e-5)
    assert abs(metrics[0]["rewards/margins"]) < 1e-5 < abs(metrics[1]["rewards/margins"])


@pytest.mark.parametrize("name", ["simpo", "orpo"])
@pytest.mark.parametrize("kind", toy.KINDS)
def test_no_reference_is_computed_while_it_trains(kind, name, folders, monkeypatch):
    """The first loss in closed form, from log-probs and lengths that are counted here. The KL at the end needs a
    reference: with adapters that is another adapter, else a second model that is loaded then."""
    loaded, load = [], policy.load
    monkeypatch.setattr(policy, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(dpo, "all_logps", lambda *args: pytest.fail("a reference was computed"))
    cfg, metrics, result = ran(folders, kind, METHODS[name], batch_size=40, epochs=1, micro_batch_tokens=60)
    start, losses = load(cfg, "sft"), []
    for pair in load_pairs(cfg, toy.text(cfg)):
        with torch.no_grad():
            chosen, rejected = (logprobs.token_logps(start, *logprobs.pack([row])).sum() / len(row[1]) for row in pair)
        if name == "simpo":
            losses.append(torch.log1p(torch.exp(-2 * (chosen - rejected) + .5)))
        else:
            odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
            losses.append(-chosen + .1 * torch.log1p(odds[1] / odds[0]))
    assert len(loaded) == {"lora": 1, "full": 2}[kind] and result["objective/kl"] != 0
    assert metrics[0]["loss"] == pytest.approx(sum(losses).item() / 40, rel=1e-5)


@pytest.mark.parametrize("name", few(["ipo", "kto"], "kto"))
def test_the_micro_batch_size_changes_nothing(name, folders):
    """KTO's reference point is of the whole step."""
    runs = [ran(folders, "full", METHODS[name], epochs=2, micro_batch_tokens=tokens)[1] for tokens in (1, 60, 10_000)]
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            assert toy.known(a) == pytest.approx(toy.known(b), rel=1e-3, abs=1e-5)


def test_the_reference_point_is_the_kl_on_mismatched_answers():
    """By brute force: every prompt with the answers of the pair before it; 0 if that is negative."""
    cfg, ref = kto.Config(), tiny.policy()
    model = ref.copy("policy")
    toy.moved(model.trainable(), 3)
    prompts = tiny.texts([3, 5, 2])
    pairs = [tuple((prompt, response) for response in responses) for prompt, *responses in zip(
        prompts, tiny.texts([4, 1, 6], seed=10), tiny.texts([2, 7, 3], seed=20))]
    h = []
    for i, prompt in enumerate(prompts):
        for _, response in pairs[i - 1]:
            ids, mask = logprobs.pack([(prompt, response)])
            h.append(tiny.plain_logps(model, ids, mask).sum() - tiny.plain_logps(ref, ids, mask).sum())
    mean = sum(h).item() / 6
    assert abs(mean) > .1
    there, back = kto.reference_point(model, ref, pairs, cfg), kto.reference_point(ref, model, pairs, cfg)
    assert (there.item(), back.item()) == pytest.approx((max(0, mean), max(0, -mean)), rel=1e-4)
    assert not there.requires_grad
    assert kto.reference_point(model, ref, pairs[:1], cfg).item() == 0      # its own answers say nothing in general


def test_the_kl_is_logged(folders):
    _, metrics, _ = ran(folders, "full", kto, epochs=4)
    assert metrics[0]["kl"] == 0 and all(step["kl"] >= 0 for step in metrics) and any(step["kl"] for step in metrics)
