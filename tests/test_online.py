"""GRPO, RLOO, REINFORCE, online and iterated DPO: losses against TRL's code, gradients by enumeration, toy rewards."""
import functools
import itertools
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from quick import few
from torch.nn.functional import pad

from data import InputError
from rlhf import experience, grpo, iterated_dpo, logprobs, online_dpo, policy, reinforce, rewards, rloo
from rlhf.experience import Experience

torch.set_num_threads(1)
RLHF = Path(__file__).parents[1] / "rlhf"
ONLINE = {"grpo": grpo, "rloo": rloo, "reinforce": reinforce, "online_dpo": online_dpo, "iterated_dpo": iterated_dpo}
LENGTHS = [(2, 5), (1, 1), (4, 3), (1, 7)]              # (prompt, response), in tokens
MASK = logprobs.pack([([1] * prompt, [2] * response) for prompt, response in LENGTHS])[1]
kinds = pytest.mark.parametrize("kind", toy.KINDS)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name, most", [("grpo", 90), ("rloo", 60), ("reinforce", 60)])
def test_a_method_is_short(name, most):
    assert len((RLHF / f"{name}.py").read_text().splitlines()) <= most


# --- losses and their gradients against TRL's code -------------------------------------------------------

def drawn(scale=.3):
    """Log-probs (B, T-1) of the policy, of the one that sampled and of the reference, 0 outside the mask; advantages.
    They are far enough apart that ratios are clipped on both sides."""
    logp, old, ref = (torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    logp = -logp.abs()
    advantages = torch.tensor([1., -1.5, .5, -.25])
    return (logp * MASK).requires_grad_(), (logp + scale * old) * MASK, (logp + scale * ref) * MASK, advantages


def trl_self(logp, cfg, **settings):
    """What TRL's trainers ask of themselves in _compute_loss(), with log-probs that are given."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
                                  reduce=lambda x, reduction: x)
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    usual = {"aux_loss_enabled": False, "top_entropy_quantile": 1., "off_policy_mask_threshold": None, "args": args,
             "use_vllm": False, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
             "accelerator": accelerator, "model": SimpleNamespace(training=True), "epsilon_low": cfg.cliprange,
             "epsilon_high": getattr(cfg, "cliprange_high", cfg.cliprange),
             "_metrics": {"train": defaultdict(list)},
             "_get_per_token_logps_and_entropies": lambda *args, **options: (logp, torch.zeros_like(logp), None)}
    return SimpleNamespace(**usual | settings)


def trl_inputs(old, ref, advantages):
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    return {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": MASK.long(),
            "advantages": advantages, "num_items_in_batch": MASK.sum(), "old_per_token_logps": old,
            "old_logps": old.sum(1), "ref_per_token_logps": ref}


def mine(loss_fn, cfg):
    """(loss, its gradient, what is clipped) of drawn()."""
    logp, old, ref, advantages = drawn()
    loss, denominator, clipped = loss_fn(logp, old, ref, advantages, MASK, cfg)
    loss, clipped = loss / denominator, clipped / denominator
    return loss.detach(), torch.autograd.grad(loss, logp)[0], clipped.item()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, high", [(0., .2), (.7, .28)])
def test_grpo_s_loss_and_gradient_equal_trl(loss_type, level, beta, high):
    trainer = pytest.importorskip("trl").GRPOTrainer
    low, high = (.2, high) if level == "token" else (.02, high / 10)
    cfg = grpo.Config(loss_type=loss_type, level=level, beta=beta, cliprange=low, cliprange_high=high,
                      max_new_tokens=11)
    logp, old, ref, advantages = drawn()
    theirs = trl_self(logp, cfg, loss_type=loss_type, importance_sampling_level=level, beta=beta,
                      max_completion_length=11)
    loss = trainer._compute_loss(theirs, None, trl_inputs(old, ref, advantages))
    my_loss, my_gradient, clipped = mine(grpo.grpo_loss, cfg)
    close(my_loss, loss.detach())
    close(my_gradient, torch.autograd.grad(loss, logp)[0])
    assert clipped > 0 and my_gradient[MASK].any() and not my_gradient[~MASK].any()
    if (loss_type, level) == ("dapo", "token"):
        assert clipped == pytest.approx(theirs._metrics["train"]["clip_ratio/region_mean"][0])


def test_rloo_s_loss_and_gradient_equal_trl():
    trainer = pytest.importorskip("trl").RLOOTrainer
    cfg = rloo.Config()
    logp, old, ref, advantages = drawn()
    theirs = trl_self(logp, cfg)
    loss = trainer._compute_loss(theirs, None, trl_inputs(old, ref, advantages))
    my_loss, my_gradient, clipped = mine(rloo.rloo_loss, cfg)
    close(my_loss, loss.detach())
    close(my_gradient, torch.autograd.grad(loss, logp)[0])
    assert 0 < clipped == theirs._metrics["train"]["clip_ratio/region_mean"][0] < 1


def test_reinforce_s_gradient_of_each_token_is_minus_the_advantage_of_its_answer():
    _, gradient, clipped = mine(reinforce.reinforce_loss, reinforce.Config())
    close(gradient, -drawn()[3][:, None] * MASK / len(MASK))
    assert clipped == 0


@pytest.mark.parametrize("loss_fn, cfg", [
    (grpo.grpo_loss, grpo.Config(loss_type=loss_type, level=level, max_new_tokens=9))
    for loss_type in ("grpo", "dapo", "dr_grpo") for level in ("token", "sequence")] + [
    (rloo.rloo_loss, rloo.Config()), (reinforce.reinforce_loss, reinforce.Config())])
def test_neither_padding_nor_the_split_changes_a_loss(loss_fn, cfg):
    """Twice as wide with garbage outside the mask; answers one by one."""
    logp, old, ref, advantages = drawn()
    whole = torch.stack([torch.as_tensor(x) for x in loss_fn(logp, old, ref, advantages, MASK, cfg)])
    wide = [pad(x, (0, MASK.shape[1]), value=value) for x, value in ((logp, 3), (old, -4), (ref, 2), (MASK, 0))]
    close(torch.stack([torch.as_tensor(x) for x in loss_fn(*wide[:3], advantages, wide[3], cfg)]), whole)
    parts = [loss_fn(*(x[i:i + 1] for x in (logp, old, ref, advantages, MASK)), cfg) for i in range(4)]
    close(torch.stack([sum(torch.as_tensor(part[i]) for part in parts) for i in range(3)]), whole)


# --- advantages, and the mean gradient over everything that could be sampled -----------------------------

def rollout(score, kl=0., n=1):
    """An Experience of answers of one token with these scores (B,) and log-ratios to the reference (B,)."""
    score, kl = torch.as_tensor(score), torch.as_tensor(kl)
    logp = torch.zeros(len(score), 1, dtype=score.dtype) + kl.view(-1, 1)
    return Experience([], None, torch.ones(len(score), 1), logp, torch.zeros_like(logp), score, None, n)


SCORE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(6)[:, None] * 10


def test_a_group_s_advantages_have_mean_0_and_deviation_1():
    advantages = grpo.group_advantages(rollout(SCORE.flatten()), grpo.Config(n=4)).view(6, 4)
    close(advantages.mean(1), torch.zeros(6))
    close(advantages.std(1), torch.ones(6), 1e-3)
    centred = grpo.group_advantages(rollout(SCORE.flatten()), grpo.Config(n=4, scale_rewards=False)).view(6, 4)
    close(centred, SCORE - SCORE.mean(1, keepdim=True))


def test_a_group_without_differences_teaches_nothing():
    """And makes no NaN."""
    assert not grpo.group_advantages(rollout(torch.full((8,), 3.)), grpo.Config(n=4)).any()
    assert not rloo.leave_one_out(rollout(torch.full((8,), 3.)), rloo.Config(n=4)).any()


def test_leave_one_out_by_brute_force():
    kl = torch.linspace(-2, 3, 24)
    advantages = rloo.leave_one_out(rollout(SCORE.flatten(), kl), rloo.Config(n=4, kl_coef=.3)).view(6, 4)
    total = SCORE - .3 * kl.view(6, 4)
    for group, i in itertools.product(range(6), range(4)):
        others = [total[group, j].item() for j in range(4) if j != i]
        assert advantages[group, i].item() == pytest.approx(total[group, i].item() - sum(others) / 3, abs=1e-4)
    all_others = reinforce.others_mean(rollout(SCORE.flatten(), kl), reinforce.Config(kl_coef=.3))
    others = [total.sum() - total.flatten()[i] for i in range(24)]
    close(all_others, total.flatten() - torch.stack(others) / 23, 1e-4)


LOGITS, REF, WORTH = (torch.randn(4, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1, 2))


def mean_gradient(advantage_fn, loss_fn, cfg, n):
    """The gradient for the logits of a policy of four answers, averaged over all groups of n that it may sample."""
    mean = torch.zeros(4).double()
    for group in itertools.product(range(4), repeat=n):
        logits, group = LOGITS.clone().requires_grad_(), list(group)
        logp, ref = logits.log_softmax(0)[group, None], REF.log_softmax(0)[group, None]
        roll = rollout(WORTH[group], (logp - ref).detach()[:, 0], n)
        loss, denominator, _ = loss_fn(logp, logp.detach(), ref, advantage_fn(roll, cfg), torch.ones(n, 1), cfg)
        gradient, = torch.autograd.grad(loss / denominator, logits)
        mean += logp.detach().sum().exp() * gradient
    return mean


def true_gradient(kl_coef):
    """Of -(mean reward - kl_coef KL), by autograd."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    return torch.autograd.grad(-(logp.exp() * (WORTH - kl_coef * (logp - REF.log_softmax(0)))).sum(), logits)[0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_and_reinforce_are_unbiased(n):
    cfg = rloo.Config(n=n, kl_coef=.3)
    close(mean_gradient(rloo.leave_one_out, rloo.rloo_loss, cfg, n), true_gradient(.3), 1e-9)
    alone = reinforce.Config(kl_coef=.3)
    close(mean_gradient(reinforce.others_mean, reinforce.reinforce_loss, alone, n), true_gradient(.3), 1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_without_the_division_grpo_is_shorter_by_one_in_n_and_with_it_points_elsewhere(n):
    """The answer itself is in its baseline."""
    cfg = grpo.Config(n=n, beta=0., scale_rewards=False)
    close(mean_gradient(grpo.group_advantages, grpo.grpo_loss, cfg, n), true_gradient(0) * (n - 1) / n, 1e-9)
    divided = mean_gradient(grpo.group_advantages, grpo.grpo_loss, grpo.Config(n=n, beta=0.), n)
    cosine = torch.cosine_similarity(divided, true_gradient(0), dim=0).item()
    assert .5 < cosine < .9999


@pytest.mark.parametrize("estimator, exact", [("k2", True), ("k3", False)])
def test_of_the_kl_as_a_loss_only_k2_has_the_true_gradient(estimator, exact):
    cfg = grpo.Config(beta=.7, kl_estimator=estimator)
    found = mean_gradient(lambda roll, cfg: torch.zeros(2), grpo.grpo_loss, cfg, 2)
    wrong = (found - (true_gradient(.7) - true_gradient(0))).norm().item()
    assert wrong < 1e-6 if exact else wrong > .01


# --- the loops, on a tiny model --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return toy.run_folders(tmp_path_factory)


SMALL = {"grpo": {"steps": 2, "prompts": 6, "n": 4, "batch_size": 12, "lr": 1e-3},
         "rloo": {"steps": 2, "prompts": 6, "n": 4, "batch_size": 12, "lr": 1e-3},
         "reinforce": {"steps": 3, "prompts": 20, "lr": 1e-3},
         "online_dpo": {"steps": 2, "prompts": 16, "batch_size": 8, "lr": 1e-3},
         "iterated_dpo": {"rounds": 2, "prompts": 16, "batch_size": 8, "lr": 1e-3}}


def ran(folders, kind, name, score_fn=toy.thirties, **changes):
    """A run -> (its settings, all metrics of each step, the weights that it saved)."""
    cfg = toy.settings(folders[kind], kind, ONLINE[name].Config, **SMALL[name] | changes)
    cfg.result = ONLINE[name].run(cfg, score_fn)
    return cfg, toy.lines(cfg), torch.cat([w.flatten() for w in toy.saved(cfg).values()])


LEARNS = {"grpo": {"steps": 12, "prompts": 10, "batch_size": 20, "lr": 1e-2, "beta": 0.},
          "rloo": {"steps": 12, "prompts": 10, "batch_size": 20, "lr": 1e-2, "kl_coef": 0.},
          "reinforce": {"steps": 25, "prompts": 20, "lr": 1e-2, "kl_coef": 0.},
          "online_dpo": {"steps": 12, "prompts": 30, "batch_size": 15, "lr": 1e-2},
          "iterated_dpo": {"rounds": 3, "prompts": 80, "batch_size": 16, "lr": 1e-2}}


@pytest.mark.parametrize("name, kind", few([(name, kind) for name in ONLINE for kind in toy.KINDS],
                                           *((name, "full") for name in ONLINE)))
def test_it_learns_what_is_rewarded(name, kind, folders):
    """How often answers to 80 prompts say a word of w30 to w39, before and after."""
    cfg, _, _ = ran(folders, kind, name, **LEARNS[name])
    text, worth = toy.text(cfg), []
    prompts = text.prompts(cfg.splits()["unlabeled"], 100)
    for stage in ("sft", cfg.stage):
        rows = experience.generate(policy.load(cfg, stage), prompts, text, cfg, 5)
        worth.append(toy.thirties(rows).mean().item())
    assert worth[0] < .8 and worth[1] > worth[0] + .6, worth


@pytest.mark.parametrize("name", few(ONLINE, "grpo", "online_dpo"))
def test_the_micro_batch_changes_no_metric(name, folders):
    many = {} if name in ("reinforce", "iterated_dpo") else {"num_iterations": 2}
    if name == "rloo":                  # the advantage of equal answers is 0 only without the rounding of their KL
        many["kl_coef"] = 0.
    runs = [ran(folders, "full", name, **many, micro_batch_tokens=tokens)[1:] for tokens in (1, 40, 10_000)]
    for metrics, weights in runs[1:]:
        for a, b in zip(metrics, runs[0][0], strict=True):
            if abs(a.get("rewards/margins", 1)) < 1e-5:                 # the sign of a rounding error
                a["rewards/accuracies"] = b["rewards/accuracies"]
            assert toy.known(a) == pytest.approx(toy.known(b), rel=1e-3, abs=1e-5)
        close(weights, runs[0][1], 1e-4)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce"])
def test_padding_to_twice_the_length_changes_no_metric(name, folders, monkeypatch):
    plain, real = ran(folders, "full", name), experience.pack

    def wide(rows, device="cpu"):
        ids, mask = real(rows, device)
        return pad(ids, (0, ids.shape[1]), value=5), pad(mask, (0, ids.shape[1]))
    monkeypatch.setattr(experience, "pack", wide)
    for a, b in zip(ran(folders, "full", name)[1], plain[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@kinds
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_first_ratio_is_1_and_the_policy_begins_as_the_reference(name, kind, folders):
    _, metrics, _ = ran(folders, kind, name, steps=1, batch_size=24)
    assert metrics[0]["clip_ratio/region_mean"] == 0 and metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(metrics[0]["loss"]) < 1e-5               # advantages of a group add up to 0


OPTIONS = {"grpo": {"num_iterations": [2], "beta": [5.], "kl_estimator": ["k2"], "cliprange": [.001],
                    "cliprange_high": [.001], "scale_rewards": [False], "loss_type": ["dapo", "dr_grpo"],
                    "level": ["sequence"], "missing_eos_penalty": [0.], "n": [2]},
           "rloo": {"num_iterations": [2], "kl_coef": [1.], "cliprange": [.001], "missing_eos_penalty": [0.], "n": [2]},
           "reinforce": {"kl_coef": [1.], "missing_eos_penalty": [0.], "prompts": [19]},
           "online_dpo": {"num_iterations": [2], "beta": [1.], "batch_size": [5]},
           "iterated_dpo": {"epochs": [1], "beta": [1.], "batch_size": [5]}}


@pytest.fixture(scope="module")
def without(folders):
    """without(method, passes over each rollout) -> the weights that it saves if no further option is given."""
    return functools.lru_cache(None)(lambda name, passes: ran(folders, "full", name, **often(passes))[2])


def often(passes):
    """Steps are long, so that ratios leave their clips in the second pass over a rollout."""
    return {"lr": 1e-2} | ({"num_iterations": passes} if passes > 1 else {})


ASKED = [(name, flag, value) for name in OPTIONS for flag in OPTIONS[name] for value in OPTIONS[name][flag]]


@pytest.mark.parametrize("name, flag, value", few(ASKED, *(
    one for one in ASKED if one[0] == "grpo" or one[1] in ("kl_coef", "cliprange", "beta"))))
def test_every_option_changes_the_policy(name, flag, value, folders, without):
    passes = 2 if flag != "num_iterations" and name in ("grpo", "rloo") else 1
    other = ran(folders, "full", name, **often(passes) | {flag: value})[2]
    assert (other - without(name, passes)).abs().max() > 1e-6


@pytest.mark.parametrize("cls, flags, said", [
    (grpo.Config, {"n": 1}, "--n 1 makes no sense: it is a number from 2 up"), (rloo.Config, {"n": 1}, "--n 1"),
    (reinforce.Config, {"prompts": 1}, "--prompts 1"), (grpo.Config, {"level": "word"}, "--level 'word'.*token"),
    (grpo.Config, {"loss_type": "bnpo"}, "--loss_type"), (grpo.Config, {"kl_estimator": "k1"}, "--kl_estimator")])
def test_settings_that_make_no_sense_are_refused(cls, flags, said):
    with pytest.raises(InputError, match=said):
        cls(**flags)


def test_metrics_say_what_their_names_say(folders, monkeypatch):
    seen, real = [], grpo.collect
    monkeypatch.setattr(grpo, "collect", lambda *args: seen.append(real(*args)) or seen[-1])
    _, metrics, _ = ran(folders, "full", "grpo", missing_eos_penalty=.5)
    for roll, step in zip(seen, metrics, strict=True):
        worth = toy.thirties(roll.rows) - .5 * ~roll.finished
        spread = [torch.std(worth[i:i + 4]).item() for i in range(0, 24, 4)]
        assert step["reward"] == pytest.approx(worth.mean().item(), abs=1e-6)
        assert step["reward_std"] == pytest.approx(sum(spread) / 6, abs=1e-5)
        assert step["frac_reward_zero_std"] == pytest.approx(sum(x == 0 for x in spread) / 6)
        assert step["completions/mean_length"] == pytest.approx(sum(len(r) for _, r in roll.rows) / 24)
        assert step["completions/clipped_ratio"] == pytest.approx(1 - sum(roll.finished).item() / 24)
        assert step["entropy"] == pytest.approx(-roll.logp.sum().item() / roll.mask.sum().item())


@pytest.mark.parametrize("scores, n, spread", [([1., 3., 2., 2.], 2, [2 ** .5, 0.]), ([1., 3.], 1, [2 ** .5]),
                                               ([5.], 1, [0.])])
def test_the_spread_of_rewards_is_that_among_the_answers_that_are_compared(scores, n, spread):
    roll = rollout(scores, n=n)
    assert roll.spread().tolist() == pytest.approx(spread)


def test_answers_to_a_prompt_stand_together(folders, monkeypatch):
    """What is compared with each other answers the same prompt."""
    groups, real = [], grpo.collect
    monkeypatch.setattr(grpo, "collect", lambda *args: groups.append(real(*args).rows) or real(*args))
    ran(folders, "full", "rloo")
    for rows in groups:
        assert all(len({tuple(prompt) for prompt, _ in rows[i:i + 4]}) == 1 for i in range(0, 24, 4))


# --- pairs of the newest policy --------------------------------------------------------------------------

def said(cfg, model, compare):
    prompts = [[3, 4], [5], [7, 8, 9], [3, 4]]
    records = [{"instruction": toy.sentence(prompt)} for prompt in prompts]
    return online_dpo.fresh_pairs(model, records, toy.text(cfg), compare, cfg, seed=1), prompts


def test_the_preferred_answer_is_the_chosen_one_and_ties_are_left_out(folders):
    cfg = toy.settings(folders["full"], "full", online_dpo.Config)
    model, asked = policy.load(cfg, "sft"), []

    def compare(ones, twos):
        asked.extend(zip(ones, twos))
        return [1, 1.8, 1.5, 2]                         # a judge may give its probability
    pairs, prompts = said(cfg, model, compare)
    assert pairs == [asked[0], asked[1][::-1], asked[3][::-1]]
    assert [one[0] for one, _ in asked] == [two[0] for _, two in asked] == prompts
    assert any(one != two for one, two in asked)


def test_scores_compare_answers(folders):
    cfg = toy.settings(folders["full"], "full", online_dpo.Config)
    compare, costs = rewards.comparer(cfg, toy.text(cfg), None, toy.thirties)
    rows = [([1], [30, 0]), ([1], [30, 31, 0]), ([1], [5, 0])]
    assert compare(rows, rows[1:] + rows[:1]) == [2, 1, 2] and compare(rows, rows) == [1.5] * 3 and costs() == {}


def test_the_first_dpo_loss_is_log_2_and_later_pairs_are_of_the_newest_policy(folders, monkeypatch):
    states, real = [], online_dpo.generate
    monkeypatch.setattr(online_dpo, "generate", lambda model, *args, **kept: states.append(
        torch.cat([p.flatten() for p in model.gpt.parameters()]).clone()) or real(model, *args, **kept))
    for name in ("online_dpo", "iterated_dpo"):
        states.clear()
        _, metrics, _ = ran(folders, "full", name, batch_size=16)
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert len(states) == 2 and not torch.equal(*states)


def test_a_step_without_any_preference_is_left_out(folders):
    _, metrics, weights = ran(folders, "full", "online_dpo", lambda rows: torch.zeros(len(rows)))
    start = torch.cat([w.flatten() for w in policy.load(toy.settings(folders["full"], "full", grpo.Config),
                                                        "sft").gpt.weights().values()])
    assert metrics == [] and torch.equal(weights.sort().values, start.sort().values)
    with pytest.raises(InputError, match="no answer of a pair is preferred"):
        ran(folders, "full", "iterated_dpo", lambda rows: torch.zeros(len(rows)))
