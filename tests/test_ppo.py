"""PPO: its functions against brute force and enumeration, its loop on a toy reward, and the command."""
import itertools
import math
import shutil

import pytest
import tiny
import torch
import toy
from quick import few
from test_farm import farm, leaderboard, results, reused
from torch.nn.functional import pad

import model
from data import InputError, sets
from rlhf import experience, logprobs, policy, ppo, reward, update
from rlhf.experience import collect
from rlhf.ppo import KL, explained_variance, gae, policy_loss, shape_rewards, value_loss, whiten

torch.set_num_threads(1)
LENGTHS = [(2, 5), (1, 1), (4, 3), (1, 7)]              # (prompt, response), in tokens
MASK = logprobs.pack([([1] * prompt, [2] * response) for prompt, response in LENGTHS])[1]


def noise(*seeds):
    """Tensors (B, T-1), also where the mask is 0: whatever is there must not matter."""
    return [torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- rewards and advantages ------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1, .95), (.9, .8), (1, 1), (.9, 0)])
def test_gae_is_the_sum_over_all_later_errors(gamma, lam):
    """Schulman et al. 2016, eq. 16, as it is written: a double sum, row by row, over the response alone."""
    rewards, values = noise(1, 2)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    expected = torch.zeros(MASK.shape)
    for row, (prompt, response) in enumerate(LENGTHS):
        r, v = (x[row][MASK[row]].tolist() for x in (rewards, values))
        delta = [r[t] + gamma * (v + [0])[t + 1] - v[t] for t in range(response)]
        for t in range(response):
            later = ((gamma * lam) ** k * delta[t + k] for k in range(response - t))
            expected[row, prompt - 1 + t] = sum(later)
    close(advantages, expected)
    close(returns, (expected + values) * MASK)


def test_without_discount_and_values_the_advantage_is_the_reward_to_go():
    score, kl = torch.tensor([1., -2, 3, .5]), noise(1)[0]
    rewards = shape_rewards(score, kl, MASK, .3)
    advantages, returns = gae(rewards, torch.zeros(MASK.shape), MASK, 1, 1)
    to_go = score[:, None] - .3 * (kl * MASK).flip(1).cumsum(1).flip(1)
    close(advantages, to_go * MASK)
    close(returns, to_go * MASK)


def test_a_perfect_value_function_leaves_no_advantage():
    rewards = noise(1)[0] * MASK
    values = rewards.flip(1).cumsum(1).flip(1) + noise(2)[0] * ~MASK
    advantages, returns = gae(rewards, values, MASK, 1, .95)
    close(advantages, torch.zeros(MASK.shape))
    close(returns, values * MASK)


def test_the_score_is_paid_at_the_last_token_and_the_kl_at_each():
    score, kl = torch.tensor([10., 20, 30, 40]), noise(1)[0]
    rewards = shape_rewards(score, kl, MASK, .5)
    assert (rewards[~MASK] == 0).all()
    for row, (prompt, response) in enumerate(LENGTHS):
        paid = (rewards + .5 * kl * MASK)[row]
        assert paid[prompt + response - 2].item() == pytest.approx(score[row].item(), rel=1e-6)
        assert (paid.abs() > 1e-5).sum() == 1
    close(rewards.sum(1), score - .5 * (kl * MASK).sum(1))


def test_whitening_by_masked_mean_and_deviation():
    x = noise(1)[0] * 3 + 2
    white = whiten(x, MASK)
    assert white[MASK].mean().abs() < 1e-6
    assert white[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (white[~MASK] == 0).all()
    close(whiten(x + 7, MASK), white), close(whiten(5 * x, MASK), white)
    scaled = whiten(x, MASK, shift_mean=False)
    close(scaled[MASK].mean(), x[MASK].mean())
    close(scaled[MASK] - x[MASK].mean(), white[MASK])
    assert (whiten(torch.ones(MASK.shape), MASK) == 0).all()            # and no NaN


def test_padding_to_twice_the_length_changes_nothing():
    """Neither an advantage, a return, a loss nor a metric."""
    logp, old, values, old_values, kl = noise(1, 2, 3, 4, 5)
    score, outcomes, T = torch.tensor([1., -2, 3, .5]), [], MASK.shape[1]
    narrow = logp, old, values, old_values, kl, MASK
    for lp, ol, v, ov, k, mask in (narrow, [pad(x, (0, T), value=0 if x is MASK else 9) for x in narrow]):
        rewards = shape_rewards(score, k, mask, .1)
        a, r = gae(whiten(rewards, mask, shift_mean=False), v, mask, .99, .95)
        a = whiten(a, mask)
        assert not any(x[:, T:].any() for x in (rewards, a, r))
        outcomes.append([rewards[:, :T], a[:, :T], r[:, :T], *policy_loss(lp, ol, a, mask, .2),
                         *value_loss(v, ov, r, mask, .2), torch.tensor(explained_variance(v, r, mask))])
    for one, padded in zip(*outcomes):
        close(one, padded, 1e-6)


def test_explained_variance_is_1_for_a_perfect_and_0_for_a_constant_value_function():
    returns = noise(1)[0]
    garbage = noise(2)[0] * 100 * ~MASK
    assert explained_variance(returns + garbage, returns, MASK) == pytest.approx(1)
    assert explained_variance(garbage + 3, returns, MASK) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns + garbage, returns, MASK) == pytest.approx(-3, rel=1e-5)


# --- KL --------------------------------------------------------------------------------------------------

LOGITS, REF = (torch.randn(6, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))


def enumerated(name, logits, ref=REF):
    """An estimator's mean over a policy of six tokens, and the KL."""
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    p, d = logp.exp(), logp - ref
    return (p * KL[name](d)).sum(), (p * d).sum()


def test_k1_and_k3_are_unbiased_and_clamping_is_biased_upward():
    for name, bias in (("k1", 0), ("k3", 0), ("clamped", 1)):
        mean, kl = enumerated(name, LOGITS)
        assert kl > .3 and (mean - kl > .05 if bias else (mean - kl).abs() < 1e-12), name


def test_k2_is_right_to_second_order_only():
    """A tenth of the distance makes about a tenth of the relative error."""
    errors = []
    for near in (1, .1, .01):
        mean, kl = enumerated("k2", REF + near * (LOGITS - REF))
        errors.append(((mean - kl) / kl).abs().item())
    assert errors[0] > .05 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


def test_k2_k3_and_clamped_are_never_negative_but_k1_may_be():
    d = torch.linspace(-3, 3, 61).double()
    assert all(KL[name](d).min() > -1e-12 for name in ("k2", "k3", "clamped")) and KL["k1"](d).min() == -3


def test_only_k1_as_a_reward_has_the_gradient_of_the_true_kl():
    """The gradient of the policy loss over all six answers of one token, each as often as it is sampled."""
    mask, wrong = torch.ones(6, 1, dtype=torch.bool), {}
    for name in KL:
        logits = LOGITS.clone().requires_grad_()
        true, = torch.autograd.grad(enumerated(name, logits)[1], logits)
        logp = logits.log_softmax(0)[:, None]                                            # (6, 1)
        kl = KL[name](logp.detach() - REF.log_softmax(0)[:, None])
        rewards = shape_rewards(torch.zeros(6), kl, mask, kl_coef=1.)
        advantages = gae(rewards, torch.zeros(6, 1), mask, 1, 1)[0] * logp.detach().exp()
        mine, = torch.autograd.grad(policy_loss(logp, logp.detach(), advantages, mask, .2)[0], logits)
        wrong[name] = ((mine - true).norm() / true.norm()).item()
    assert wrong.pop("k1") < 1e-6 and min(wrong.values()) > .2, wrong


# --- losses ----------------------------------------------------------------------------------------------

def row(*numbers):
    return torch.tensor([numbers], requires_grad=True)


ONES = torch.ones(1, 5, dtype=torch.bool)


def test_policy_loss_by_hand():
    """Ratios 1.5 and .5 of good and bad tokens: only a step too far in the direction wanted is held back."""
    ratio, advantage = row(1.5, .5, 1.5, .5, 1.), torch.tensor([[2., 2, -2, -2, 3]])
    loss, held = policy_loss(ratio.log(), torch.zeros(1, 5), advantage, ONES, .2)
    assert loss.item() == pytest.approx(-2 * 1.2 - 2 * .5 + 2 * 1.5 + 2 * .8 - 3) and held == 2
    gradient, = torch.autograd.grad(loss, ratio)
    assert gradient[0].tolist() == pytest.approx([0, -2, 2, 0, -3])     # raise good tokens, lower bad ones


def test_a_mask_of_weights_weighs_tokens_and_leaves_their_ratios():
    """The loss is the weighted sum of each token's own loss: a weight must not reach into the ratio."""
    logp, old, a = (torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    weights = torch.tensor([[.5, 2., 0., .25, 1.]])
    alone = [policy_loss(*(x[:, i:i + 1] for x in (logp, old, a, ONES)), .2)[0].item() for i in range(5)]
    loss, _ = policy_loss(logp, old, a, weights, .2)
    assert loss.item() == pytest.approx(sum(w * x for w, x in zip(weights[0].tolist(), alone)), rel=1e-5)


def test_value_loss_by_hand():
    """Old value 2, return 3: half the square of the value's error, or of the value held near the old one."""
    values = row(2.1, 2.7, 1.5, 5., 3.)
    loss, held = value_loss(values, torch.full((1, 5), 2.), torch.full((1, 5), 3.), ONES, .2)
    assert loss.item() == pytest.approx(.5 * (.9 ** 2 + .8 ** 2 + 1.5 ** 2 + 2 ** 2 + .8 ** 2)) and held == 2
    gradient, = torch.autograd.grad(loss, values)
    assert gradient[0].tolist() == pytest.approx([-.9, 0, -1.5, 2, 0], abs=1e-6)


def test_nothing_outside_the_mask_has_a_gradient():
    logp, old, values, old_values, a, r = noise(1, 2, 3, 4, 5, 6)
    logp.requires_grad_(), values.requires_grad_()
    (policy_loss(logp, old, a, MASK, .2)[0] + value_loss(values, old_values, r, MASK, .2)[0]).backward()
    assert not logp.grad[~MASK].any() and not values.grad[~MASK].any()
    assert logp.grad[MASK].any() and values.grad[MASK].any()


def test_log_probs_far_apart_outside_the_mask_make_no_nan():
    """exp overflows at 89 nats: 0 * inf would be NaN."""
    logp = (1000. * ~MASK).requires_grad_()
    loss, _ = policy_loss(logp, torch.zeros(MASK.shape), torch.ones(MASK.shape), MASK, .2)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()


# --- the loop, on a tiny model ---------------------------------------------------------------------------

kinds = pytest.mark.parametrize("kind", toy.KINDS)
full_quickly = pytest.mark.parametrize("kind", few(toy.KINDS, "full"))
USUAL = {"steps": 3, "rollout_batch": 20, "batch_size": 10, "lr": 1e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders whose stages sft and reward are done, for both kinds of training."""
    return toy.run_folders(tmp_path_factory)


@pytest.fixture
def train(folders, tmp_path):
    """PPO on a copy of such a folder -> its settings (with .result, .metrics: of run and of each step)."""
    counter = itertools.count()

    def trained(kind, score_fn=None, **changes):
        folder = tmp_path / f"{kind}{next(counter)}"
        shutil.copytree(folders[kind], folder)
        cfg = toy.settings(folder, kind, ppo.Config, **{                # base and data stay where they are
            "model": str(folders[kind] / "base"), "data": str(folders[kind] / "data.json")} | USUAL | changes)
        cfg.result = ppo.run(cfg, score_fn)
        cfg.metrics = toy.lines(cfg)
        return cfg
    return trained


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def weights(cfg):
    return flat(toy.saved(cfg).values())


def start(folders, kind, **changes):
    """(settings, prompts, the four roles at the start of a run)."""
    cfg = toy.settings(folders[kind], kind, ppo.Config, **changes)
    ref = policy.load(cfg, "sft")
    reward_model = reward.load(cfg, ref)
    return cfg, tiny.texts([3, 1, 6, 2, 5, 4] * 4, 500), (ref.copy("policy"), ref, reward_model,
                                                          reward_model.copy("value"))


def collected(cfg, prompts, roles, seed):
    model, ref, reward_model, _ = roles
    return collect(prompts, toy.text(cfg), model, ref, reward.scorer(reward_model, cfg), cfg, seed)


@kinds
@pytest.mark.parametrize("temperature", [1., 2.])
def test_a_rollout_is_what_each_role_says_of_each_answer_alone(kind, temperature, folders):
    cfg, prompts, roles = start(folders, kind, temperature=temperature, micro_batch_tokens=30, missing_eos_penalty=0.)
    toy.moved(roles[3].trainable(), 9)                          # so that it is not the reward model any more
    roll = collected(cfg, prompts, roles, seed=3)
    values = roll.per_token(roles[3].values, cfg)
    assert 0 < sum(roll.finished) < len(prompts)
    for i, prompt in enumerate(prompts):
        response = roll.ids[i, len(prompt):roll.lengths[i]].tolist()
        assert roll.ids[i, :len(prompt)].tolist() == prompt
        assert roll.finished[i] == (response[-1] in toy.STOPS)
        ids, mask = logprobs.pack([(prompt, response)])
        t = mask.shape[1]
        with torch.no_grad():
            close(roll.logp[i, :t], logprobs.token_logps(roles[0], ids, mask, temperature)[0])
            close(roll.ref_logp[i, :t], logprobs.token_logps(roles[1], ids, mask, temperature)[0])
            states = [roles[3].values(ids[:, :k + 1], torch.ones(1, k, dtype=torch.bool))[0, -1].item()
                      for k in range(len(prompt), t + 1)]                           # each from the text before it
            own = reward.score(roles[2], ids, mask)[0]
        assert values[i, len(prompt) - 1:t].tolist() == pytest.approx(states, abs=1e-5)
        assert torch.equal(roll.mask[i, :t], mask[0]) and not roll.mask[i, t:].any()
        assert not any(x[i][~roll.mask[i]].any() for x in (roll.logp, roll.ref_logp, values))
        close(roll.score[i], own)
    assert roll.kl() == pytest.approx(0, abs=1e-5)                  # the policy is still the reference


def test_the_numbers_of_a_rollout_that_are_kept_add_up(train):
    """Its rewards are the score less the price of the KL, and there are none before the answer."""
    cfg = train("full", steps=3, eval_every=2, kl_coef=.3)
    rows = [line for line in toy.lines(cfg, "samples.jsonl") if "tokens" in line]
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        assert sum(row["reward"]) == pytest.approx(row["scores"][0] - .3 * sum(row["kl"]), abs=1e-4)
        assert row["mask"] == [0] * (row["prompt"] - 1) + [1] * (row["length"] - row["prompt"])
        for name in ("kl", "value", "reward", "advantage"):
            assert len(row[name]) == len(row["mask"]) == len(row["tokens"]) - 1
            assert not any(x for x, learned in zip(row[name], row["mask"]) if not learned)
    first, second = (max(map(abs, row["kl"])) for row in rows)
    assert first < 1e-4 < .01 < second                                  # the policy begins as the reference


def test_an_answer_that_did_not_end_scores_exactly_the_penalty_lower(train, rolls):
    """In the rollout and in the look at val."""
    means = []
    for penalty in (0., 1.5):
        cfg = train("full", missing_eos_penalty=penalty, steps=1, lr=0.)
        means.append([cfg.metrics[0]["objective/scores"], toy.samples(cfg)[0]["val_score"]])
    for free, charged, roll in zip(*means, rolls):
        unfinished = (~roll.finished).float().mean().item()
        assert unfinished > 0 and free - charged == pytest.approx(1.5 * unfinished, abs=1e-5)


@pytest.fixture
def rolls(monkeypatch):
    """All that a run collects, in order."""
    seen, real = [], ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *args: seen.append(real(*args)) or seen[-1])
    return seen


@kinds
@pytest.mark.parametrize("temperature", [1., 2.])
def test_the_first_ratio_is_1_and_nothing_is_clipped(kind, temperature, train, monkeypatch):
    """Whatever shares the micro-batch: it is the forward pass after sampling, at the same temperature."""
    seen, tokens, real, add = [], [], ppo.policy_loss, update.Updater.add
    monkeypatch.setattr(update.Updater, "add", lambda self, loss, n, rows=(): tokens.append(n) or add(self, loss, n))
    monkeypatch.setattr(ppo, "policy_loss", lambda logp, old, a, mask, cliprange: seen.append(
        ((logp - old) * mask).detach().abs().max().item()) or real(logp, old, a, mask, cliprange))
    cfg = train(kind, temperature=temperature, steps=1, num_ppo_epochs=1, batch_size=20,
                micro_batch_tokens=40)
    first = cfg.metrics[0]
    assert sum(tokens) == pytest.approx(20 * first["response_length"])  # the loss is a mean over tokens
    assert len(seen) > 3 and max(seen) < 2e-5
    assert first["policy/clipfrac_avg"] == 0 and first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6) and first["policy/approxkl_avg"] < 1e-10


@full_quickly
def test_padding_to_twice_the_length_changes_no_metric_of_a_run(kind, train, monkeypatch):
    plain, real = train(kind), experience.pack

    def wide(rows, device="cpu"):
        ids, mask = real(rows, device)
        return pad(ids, (0, ids.shape[1]), value=5), pad(mask, (0, ids.shape[1]))
    monkeypatch.setattr(experience, "pack", wide)
    padded = train(kind)
    for a, b in zip(plain.metrics, padded.metrics, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    close(weights(padded), weights(plain), 1e-4)


@full_quickly
def test_neither_micro_batches_nor_checkpointing_change_a_metric_of_a_run(kind, train):
    all_at_once = train(kind, micro_batch_tokens=10_000)
    one = train(kind, micro_batch_tokens=1, checkpointing=True)
    for a, b in zip(one.metrics, all_at_once.metrics, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    close(weights(one), weights(all_at_once), 1e-4)


@pytest.fixture
def at_once(train, rolls, monkeypatch):
    """One step that is paid by the score alone -> the rollout, and what the losses get: lists of advantages and of
    returns, (tokens,) of each answer."""
    def trained(**changes):
        seen, policy_loss, value_loss = ([], []), ppo.policy_loss, ppo.value_loss

        def watched_policy_loss(logp, old, advantages, mask, cliprange):
            assert not advantages[~mask].any()
            seen[0].extend(row[own] for row, own in zip(advantages, mask))
            return policy_loss(logp, old, advantages, mask, cliprange)

        def watched_value_loss(values, old, returns, mask, cliprange):
            seen[1].extend(row[own] for row, own in zip(returns, mask))
            return value_loss(values, old, returns, mask, cliprange)
        monkeypatch.setattr(ppo, "policy_loss", watched_policy_loss)
        monkeypatch.setattr(ppo, "value_loss", watched_value_loss)
        train("full", steps=1, num_ppo_epochs=1, batch_size=20, kl_coef=0., missing_eos_penalty=0., lam=1., **changes)
        return rolls[0], *seen
    return trained


def test_advantages_are_whitened_and_returns_are_not(at_once):
    """Without discount and KL the return of every token is the answer's score."""
    roll, advantages, returns = at_once()
    assert torch.cat(advantages).mean().abs() < 1e-5 and len(advantages) == 20
    assert torch.cat(advantages).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert all((row - row[0]).abs().max() < 1e-4 for row in returns)
    close(torch.stack([row[0] for row in returns]).sort().values, roll.score.sort().values, 1e-4)


def test_whitened_rewards_keep_their_mean(at_once):
    """Score s at the last of n tokens, 0 at the others, mean m and deviation d of all: the first token's return is
    (s - n m) / d + n m."""
    roll, _, returns = at_once(whiten_rewards=True)
    tokens = roll.mask.sum(1)                                             # (B,)
    rewards = torch.cat([torch.tensor([0.] * (n - 1) + [s]) for n, s in zip(tokens.tolist(), roll.score.tolist())])
    m, d = rewards.mean(), rewards.std(correction=0)
    assert m.abs() > .01
    first = torch.stack([row[0] for row in returns])
    close(first.sort().values, ((roll.score - tokens * m) / d + tokens * m).sort().values, 1e-4)


def test_every_pass_over_a_rollout_has_an_order_of_its_own(train, monkeypatch):
    """Within a step and from step to step: three steps of two passes in two batches."""
    batches = toy.steps_of(monkeypatch, experience.Experience, "cut", lambda roll, indices, *per_token: (
        indices if per_token else ()))
    train("full", micro_batch_tokens=40)
    assert [len(batch) for batch in batches] == [10] * 12 and len(set(batches)) == 12
    assert all(sorted(batches[i] + batches[i + 1]) == list(range(20)) for i in range(0, 12, 2))


def test_metrics_say_what_their_names_say(train, rolls):
    """TRL's names. The KL that is shown is unbiased, whatever the estimator that is paid for."""
    cfg = train("full", kl_estimator="k3", kl_coef=.3, lr=1e-2)
    for roll, step in zip(rolls, cfg.metrics):
        d = [(roll.logp - roll.ref_logp)[i, mask] for i, mask in enumerate(roll.mask)]
        assert step["objective/kl"] == pytest.approx(sum(x.sum().item() for x in d) / 20, abs=1e-5)
        k3 = sum(((-x).exp() - 1 + x).sum().item() for x in d) / 20
        assert step["objective/non_score_reward"] == pytest.approx(-.3 * k3, abs=1e-5)
        assert step["objective/scores"] == pytest.approx(roll.score.mean().item())
        assert step["objective/rlhf_reward"] == pytest.approx(roll.score.mean().item() - .3 * k3, abs=1e-5)
        assert step["objective/entropy"] == pytest.approx(-roll.logp[roll.mask].sum().item() / 20)
        assert step["response_length"] == pytest.approx(roll.mask.sum().item() / 20)
        assert step["val/num_eos_tokens"] == sum(roll.finished)
    assert abs(cfg.metrics[2]["objective/kl"] + cfg.metrics[2]["objective/non_score_reward"] / .3) > .01


def test_every_rollout_is_whole_and_every_prompt_comes_once_a_pass(train, monkeypatch):
    """Also where the 80 prompts end within a rollout. So the schedule ends where it should: at a tenth."""
    asked, real = [], ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda prompts, *rest: asked.append(prompts) or real(prompts, *rest))
    cfg = train("full", steps=5, rollout_batch=24, batch_size=8, eval_every=5)
    assert [len(prompts) for prompts in asked] == [24] * 5 + [8]        # the last are val's
    unlabeled = [toy.text(cfg).prompt(record) for record in sets.load(cfg.data)["unlabeled"]]
    assert sorted(sum(asked, [])[:80]) == sorted(unlabeled)
    assert cfg.metrics[-1]["lr"] == pytest.approx(cfg.lr / 10, rel=.1)


@kinds
def test_reference_and_reward_model_stay_bit_for_bit_as_they_are(kind, train, monkeypatch):
    """And with adapters, so does the base, of which all four share the very same tensors."""
    kept, collect, scorer, trainable = [], ppo.collect, reward.scorer, reward.Critic.trainable
    monkeypatch.setattr(ppo, "collect", lambda *args: kept.append(args[2:4]) or collect(*args))
    monkeypatch.setattr(reward, "scorer", lambda model, cfg: kept.append(model) or scorer(model, cfg))
    monkeypatch.setattr(reward.Critic, "trainable", lambda self: kept.append(self) or trainable(self))
    cfg = train(kind, lr=1e-2)
    reward_model, value, *_, (model, ref) = kept
    fresh = policy.load(cfg, "sft")
    judge = reward.load(cfg, fresh)
    ids = tiny.ids(4, 9)
    for role, original in ((ref, fresh), (reward_model, judge)):
        assert torch.equal(role.hidden(ids), original.hidden(ids))
        for name, w in original.gpt.state_dict().items():
            if ".lora_" not in name or f".{role.role}" in name:
                assert torch.equal(role.gpt.state_dict()[name], w), name
    assert torch.equal(reward_model.head.weight, judge.head.weight)
    for role, original in ((model, fresh), (value, judge)):
        assert (role.hidden(ids) - original.hidden(ids)).abs().max() > 1e-2
    assert (value.head.weight - judge.head.weight).abs().max() > 1e-3
    assert len({id(role.gpt) for role in (model, ref, reward_model, value)}) == (1 if kind == "lora" else 4)
    if kind == "full":
        assert all(p.grad is None for role in (ref, reward_model) for p in role.gpt.parameters())


def test_four_roles_of_a_7b_model_cost_a_twentieth_more_than_one():
    """Llama-2-7B's shape, base in bf16, adapters of rank 16 and heads in fp32: parameters and bytes."""
    with torch.device("meta"):
        base = model.GPT(model.GPTConfig(32000, 4096, 11008, 32, 32)).to(torch.bfloat16)
    alone = [sum(p.numel() * size for p in base.parameters()) for size in (1, 2)]
    base.add_role("sft", 16, 32)
    ref = policy.Policy(base.requires_grad_(False), "sft")
    critic = reward.fresh(ref.copy("reward"))
    roles = ref.copy("policy"), ref, critic, critic.copy("value")
    assert all(role.gpt is base for role in roles) and len({role.role for role in roles}) == 4
    everything = [*base.parameters(), *critic.head.parameters(), *roles[3].head.parameters()]
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
               for p in (*roles[0].trainable(), *roles[3].trainable()))
    together = [sum(p.numel() for p in everything), sum(p.numel() * p.element_size() for p in everything)]
    assert alone[0] > 6.7e9 and alone[1] == 2 * alone[0]
    assert 1.02 < together[0] / alone[0] < 1.03 and 1.04 < together[1] / alone[1] < 1.05


# --- the loop, on a toy reward ---------------------------------------------------------------------------

TOY = {"lr": 1e-2, "steps": 10, "rollout_batch": 40, "batch_size": 20, "init_value": "sft", "kl_coef": 0.,
       "missing_eos_penalty": 0., "eval_every": 10}


@full_quickly
def test_it_learns_to_say_more_of_what_is_rewarded(kind, train):
    cfg = train(kind, toy.thirties, **TOY)
    scores = [step["objective/scores"] for step in cfg.metrics]
    assert scores[0] < .7 and min(scores[-3:]) > 1.3
    assert cfg.result["val/rlhf_reward"] > 1


@pytest.mark.slow
def test_the_lower_its_price_the_further_the_policy_goes(train):
    free, dear = (train("full", toy.thirties, **TOY | {"kl_coef": kl_coef}).metrics for kl_coef in (0., 1.))
    assert free[0]["objective/kl"] == dear[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    far, near = (sum(step["objective/kl"] for step in steps[-3:]) / 3 for steps in (free, dear))
    assert far > 1.5 * near > 0


def test_adaptive_kl_moves_kl_coef_towards_its_target_within_a_clip(train, monkeypatch):
    """Ziegler et al. 2019, 2.2: a fifth of the relative error at most, a tenth of it is taken."""
    measured, real = iter((12, 6.6, 6, 5.4, 0, -3)), ppo.collect

    def collect(prompts, *rest):
        roll = real(prompts, *rest)
        if len(prompts) != 8:                                           # a rollout, not a look at val
            kl = next(measured)
            roll.kl = lambda: kl
        return roll
    monkeypatch.setattr(ppo, "collect", collect)
    cfg = train("full", adaptive_kl=6., steps=6, rollout_batch=10)
    coefs = [step["objective/kl_coef"] for step in cfg.metrics]
    assert coefs[0] == .05
    assert [b / a for a, b in itertools.pairwise(coefs)] == pytest.approx([1.02, 1.01, 1, .99, .98])


def test_max_kl_stops_and_saves(train):
    cfg = train("full", max_kl=.05, steps=20, lr=1e-2)
    kls = [step["objective/kl"] for step in cfg.metrics]
    assert 1 < len(kls) < 20 and kls[-1] > .05 >= max(kls[:-1])
    assert cfg.result["chosen_step"] == len(kls) - 1 and weights(cfg).isfinite().all()


@pytest.mark.parametrize("best, kind", few([(best, kind) for best in (0, 1, 3) for kind in toy.KINDS],
                                           (0, "full"), (1, "full"), (3, "full")))
def test_the_policy_that_did_best_on_val_is_saved(kind, best, train, monkeypatch):
    """The score at one look is made the highest; what is saved is the policy of that look alone."""
    looks, real = [], ppo.collect

    def collect(prompts, text, model, *rest):
        roll = real(prompts, text, model, *rest)
        if len(prompts) == 8:                                           # val; a rollout has 20
            looks.append(flat(model.trainable()).detach().sort().values)
            roll.score += 100 * (len(looks) - 1 == best)
        return roll
    monkeypatch.setattr(ppo, "collect", collect)
    cfg = train(kind, steps=4, eval_every=1)
    assert len(looks) == 4 and cfg.result["chosen_step"] == best and cfg.result["val/rlhf_reward"] > 50
    written = weights(cfg).sort().values                                # files and modules differ in order
    assert [torch.equal(look, written) for look in looks] == [look == best for look in range(4)]


@pytest.mark.slow
def test_snapshots_are_the_answers_of_every_look_and_change_nothing(train):
    plain, cfg = (train("full", steps=5, eval_every=2, lr=1e-2, snapshots=snapshots) for snapshots in (False, True))
    assert torch.equal(weights(cfg), weights(plain))
    found = {path.name: path.read_text() for path in cfg.dir().glob("outputs*.json")}
    assert found.keys() == {"outputs.json", "outputs_2.json", "outputs_4.json", "outputs_5.json"}
    chosen = found[f"outputs_{cfg.result['chosen_step'] + 1}.json"]
    assert found["outputs.json"] == chosen and len(set(found.values())) == 3
    assert [path.name for path in plain.dir().glob("outputs*.json")] == ["outputs.json"]


def test_what_is_best_on_val_is_the_score_less_the_price_of_the_kl(train):
    """The learning rate is far too high: the policy gets worse, and an early one is kept."""
    cfg = train("full", toy.thirties, **TOY | {"lr": .3, "steps": 6, "kl_coef": 1., "eval_every": 1})
    looks = [shown["val_score"] - shown["val_kl"] for shown in toy.samples(cfg)]
    assert len(looks) == 6 and max(looks) > looks[-1] + 1
    assert cfg.result["chosen_step"] == looks.index(max(looks))
    assert cfg.result["val/rlhf_reward"] == pytest.approx(max(looks))


def test_looks_are_priced_alike_while_kl_coef_moves(train, monkeypatch):
    """At the kl_coef of the settings, 1, the looks are worth 0, .5 and 1. At the moving one, which is 1.02, 1.04 and
    1.06 by then, they would be worth 0, -1.5 and -5."""
    looks, real = iter([(0., 0.), (50.5, 50.), (101., 100.)]), ppo.collect

    def collect(prompts, *rest):
        roll, kl = real(prompts, *rest), 1e3                            # far above its target
        if len(prompts) == 8:
            score, kl = next(looks)
            roll.score.fill_(score)
        roll.kl = lambda: kl
        return roll
    monkeypatch.setattr(ppo, "collect", collect)
    cfg = train("full", adaptive_kl=1., kl_coef=1., steps=3, eval_every=1, missing_eos_penalty=0.)
    assert cfg.metrics[-1]["objective/kl_coef"] == pytest.approx(1.02 ** 2)
    assert cfg.result["chosen_step"] == 2 and cfg.result["val/rlhf_reward"] == pytest.approx(1)


@pytest.mark.parametrize("whose, at", [("reward", 1), ("reward", 2), ("reward", 3), ("reward", 4),
                                       ("value", 1), ("value", 2)])
def test_a_number_that_is_not_finite_stops_the_run_unsaved(whose, at, train, monkeypatch, tmp_path):
    """A reward in the first rollout, in the first look at val, in the next rollout and in the last look; a value in
    each rollout."""
    calls, owner, name = itertools.count(1), *((reward, "score") if whose == "reward" else (reward.Critic, "values"))
    real = getattr(owner, name)

    def spoilt(*args):
        x = real(*args)
        if not torch.is_grad_enabled() and next(calls) == at:
            x[0] = math.nan                                             # of one answer alone
        return x
    monkeypatch.setattr(owner, name, spoilt)
    with pytest.raises(FloatingPointError, match=whose):
        train("full", steps=2, eval_every=1, micro_batch_tokens=10_000)
    assert not [*tmp_path.glob("*/run/ppo/checkpoint"), *tmp_path.glob("*/run/ppo/outputs.json")]


OPTIONS = {"kl_estimator": ["k2", "k3", "clamped"], "whiten_rewards": [True], "adaptive_kl": [.01],
           "init_value": ["sft"], "gamma": [.9], "lam": [.5], "cliprange": [.001], "cliprange_value": [.001],
           "vf_coef": [1.], "missing_eos_penalty": [0.], "num_ppo_epochs": [1], "kl_coef": [.5],
           "batch_size": [20]}
SHORT = {"steps": 2, "eval_every": 2}


@pytest.mark.parametrize("name, value", few([(name, value) for name in OPTIONS for value in OPTIONS[name]], *(
    (name, OPTIONS[name][0]) for name in ("adaptive_kl", "lam", "cliprange", "cliprange_value", "missing_eos_penalty",
                                          "num_ppo_epochs", "kl_coef", "kl_estimator"))))
def test_every_option_changes_the_policy(name, value, train, plain):
    other = train("full", **SHORT | {name: value})
    assert (weights(other) - plain).abs().max() > 1e-6


@pytest.fixture(scope="module")
def plain(folders):
    cfg = toy.settings(folders["full"], "full", ppo.Config, **USUAL | SHORT)
    ppo.run(cfg)
    return weights(cfg)


@pytest.mark.parametrize("name", ["kl_estimator", "init_value"])
def test_a_choice_that_does_not_exist_is_refused(name):
    with pytest.raises(InputError, match=name):
        ppo.Config(**{name: "k4"})


# --- the command -----------------------------------------------------------------------------------------

SMALL = ("--limit", "16", "--max_new_tokens", "8", "--reward.scale_answers", "32")
OWN = {"ppo": ("--steps", "2", "--rollout_batch", "16", "--batch_size", "8"), "best_of_n": ("--n", "3"),
       "expert_iteration": ("--n", "3")}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_three_methods_share_their_stages_and_one_seed_makes_the_same_bytes(rank, tmp_path):
    for out in "ab":
        printed = ""
        for method, own in OWN.items():
            result = farm("--method", method, *SMALL, *own, "--lora_rank", rank, "--out", tmp_path / out)
            assert result.code == 0 and not result.err, result.err
            printed += result.out
        for stage in ("sft", "pairs", "reward"):
            assert reused(printed).count(stage) == 2
        assert leaderboard(tmp_path / out).keys() == {"base", "sft", *OWN}
    a, b = (results(tmp_path / out) for out in "ab")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []
    heads = [name for name in a if name.endswith("head.safetensors")]
    kind = "adapter_model" if rank else "model"
    trained = {f"{stage}/checkpoint/{kind}.safetensors" for stage in ("sft", "reward", *OWN)}
    assert heads == ["reward/checkpoint/head.safetensors"] and trained - a.keys() == {
        f"best_of_n/checkpoint/{kind}.safetensors"}                     # which trains nothing
