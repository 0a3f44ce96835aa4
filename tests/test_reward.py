"""The reward model: where it reads, what it learns, how its scores are scaled and kept."""
import json
import math
import shutil

import pytest
import tiny
import torch
import toy
from quick import few
from test_farm import farm
from torch.nn.functional import pad

from data import InputError
from rlhf import logprobs, policy, reward
from rlhf.logprobs import pack
from rlhf.pairs import load_pairs
from rlhf.reward import (agreement, bradley_terry, calibration_error, hold_out, normalise, score, scores,
                         validate)
from rlhf.update import Updater

torch.set_num_threads(1)
kinds = pytest.mark.parametrize("kind", toy.KINDS)
ROWS = [([3, 4, 9], [5, 0, 6, 0]), ([7], [0]), ([0, 0], [8, 9, 0, 0]), ([5] * 6, [3, 2]),
        ([1, 2], [4] * 9 + [0])]
CFG = reward.Config(micro_batch_tokens=8)


def critic(kind="full", seed=0):
    """A reward model with a random head, on a random body."""
    model = reward.fresh(tiny.policy(kind, seed))
    tiny.randomise(model.head, seed)
    return model


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- where the score is read -----------------------------------------------------------------------------

@kinds
def test_a_score_is_the_head_at_the_last_response_token(kind):
    """EOS and padding have the id 0 here, and 0 is written inside answers too."""
    model, (ids, mask) = critic(kind), pack(ROWS)
    read = score(model, ids, mask)
    for row, (prompt, response) in enumerate(ROWS):
        with model.gpt.using(model.role):
            h = model.gpt.hidden(torch.tensor([prompt + response]))[0, -1]
        close(read[row], model.head.weight[0] @ h + model.head.bias[0])
        states = model.values(pad(ids, (0, 1)), torch.ones_like(ids, dtype=torch.bool))    # as if one more followed
        close(read[row], states[row, len(prompt + response) - 1])


@kinds
def test_a_score_depends_on_no_other_row_and_on_no_padding(kind):
    model, (ids, mask) = critic(kind), pack(ROWS)
    read = score(model, ids, mask)
    close(score(model, pad(ids, (0, 7), value=5), pad(mask, (0, 7))), read)
    close(torch.cat([score(model, *pack([row])) for row in ROWS]), read)
    for tokens in (1, 10, 1000):
        order = reward.Config(micro_batch_tokens=tokens)
        close(scores(model, ROWS, order), read)
        close(scores(model, ROWS[::-1], order), read.flip(0))


def test_a_score_depends_on_the_eos_and_on_every_token_before_it():
    model, (prompt, response) = critic(), ROWS[0]
    variants = [(prompt, response), (prompt, response[:-1]), (prompt, response[:-1] + [1]),
                ([30, *prompt[1:]], response),
                *((prompt, response[:i] + [30] + response[i + 1:]) for i in range(3))]
    read = scores(model, variants, CFG)
    assert (read[:, None] - read).abs().fill_diagonal_(9).min() > 1e-4


# --- what it learns --------------------------------------------------------------------------------------

def test_the_loss_by_hand_and_its_gradient_in_closed_form():
    good, bad = torch.tensor([1., -2, 0, 500]), torch.tensor([0., 1, 0, -500])
    good.requires_grad_(), bad.requires_grad_()
    losses = bradley_terry(good, bad)
    close(losses, torch.tensor([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3)), math.log(2), 0]))
    losses.sum().backward()
    close(good.grad, -torch.sigmoid(bad - good).detach())
    assert torch.equal(bad.grad, -good.grad)


def test_loss_and_gradients_equal_trl(tmp_path):
    """The same model, the same pairs: the loss and every gradient. Theirs needs a pad that is not EOS."""
    transformers, trl, datasets = (pytest.importorskip(name) for name in ("transformers", "trl", "datasets"))
    config = transformers.LlamaConfig(**tiny.SHAPE, bos_token_id=None, eos_token_id=0, pad_token_id=60,
                                      num_labels=1)
    theirs = tiny.randomise(transformers.LlamaForSequenceClassification(config))
    mine = critic()
    with torch.no_grad():
        for name, w in mine.gpt.model.named_parameters():
            w.copy_(theirs.model.get_parameter(mine.gpt.name(name)))
        mine.head.weight.copy_(theirs.score.weight), mine.head.bias.zero_()

    toy.base(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "base" / "tokenizer.json"), eos_token="w0", pad_token="w60")
    triples = list(zip(*(tiny.texts(lengths, seed, 60) for lengths, seed in (
        ([3, 5, 2], 1), ([4, 1, 6], 10), ([2, 7, 3], 20)))))
    rows = [dict(zip(("prompt", "chosen", "rejected"), (toy.sentence(ids) + " " for ids in triple)))
            for triple in triples]
    settings = trl.RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False,
                                gradient_checkpointing=False, disable_tqdm=True)
    trainer = trl.RewardTrainer(theirs, settings, train_dataset=datasets.Dataset.from_list(rows),
                                processing_class=tokenizer)
    loss = trainer.compute_loss(theirs, trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))

    mine.trainable()
    sides = [[(triple[0], [*triple[side], 0]) for triple in triples] for side in (1, 2)]
    losses = bradley_terry(*score(mine, *pack(sides[0] + sides[1])).chunk(2))
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5) != pytest.approx(math.log(2), abs=.1)
    loss.backward(), losses.mean().backward()
    for name, p in mine.gpt.model.named_parameters():
        close(p.grad, theirs.model.get_parameter(mine.gpt.name(name)).grad, 1e-4)
    close(mine.head.weight.grad, theirs.score.weight.grad, 1e-4)


@kinds
def test_a_fresh_head_gives_0_to_everything_and_one_step_raises_the_margin(kind):
    model = reward.fresh(tiny.policy(kind).copy("reward"))
    params, chosen, rejected = model.trainable(), ROWS[:2], ROWS[2:4]

    def losses():
        return bradley_terry(score(model, *pack(chosen)), score(model, *pack(rejected)))
    assert (scores(model, ROWS, CFG) == 0).all()
    assert losses().tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    for _ in range(2):                                  # the first step can only move the head
        updater = Updater(params, lr=1e-3, steps=1)
        updater.add(losses().sum(), 2)
        updater.step()
    margins = scores(model, chosen, CFG) - scores(model, rejected, CFG)
    assert (margins > 0).all() and losses().mean() < math.log(2)
    assert all(p.grad is None or not p.grad.any() for p in params)


def pairs(n=60, better=9):
    """Pairs of which the preferred answer has the word w9 in it; the first and the second equally often."""
    out = []
    for i, (prompt, one, two) in enumerate(zip(tiny.texts([1 + i % 5 for i in range(n)], 1),
                                               *(tiny.texts([2 + (i + j) % 6 for i in range(n)], 10 ** j * 99)
                                                 for j in (1, 2)))):
        preferred = [better if j == len(one) // 2 else 10 + t % 50 for j, t in enumerate(one)]
        two = [10 + t % 50 for t in two]
        one, two = (preferred, two)[::1 - 2 * (i % 2)]
        out.append({"instruction": toy.sentence(prompt), "input": "", "ids_1": one, "ids_2": two,
                    "preference": 1 + i % 2})
    return out


@pytest.fixture(scope="module", params=few(toy.KINDS, "full"))
def folder(request, tmp_path_factory):
    """A run folder whose sft stage is done."""
    made = toy.run_folder(tmp_path_factory.mktemp("run"), request.param)
    return made, request.param


def trained(folder, written, **changes):
    """reward.run on these pairs: its settings and metrics."""
    usual = {"lr": 1e-2, "batch_size": 16, "scale_answers": 32}
    cfg = toy.settings(*folder, reward.Config, **usual | changes)
    cfg.dir("pairs").mkdir(exist_ok=True)
    (cfg.dir("pairs") / "pairs.json").write_text(json.dumps(written))
    return cfg, reward.run(cfg)


def test_it_learns_what_the_preferred_answers_have_in_common(folder):
    cfg, metrics = trained(folder, pairs(400), held_out=.2, epochs=4)
    steps = toy.lines(cfg)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["margin"] == 0
    assert metrics["eval_accuracy"] > .85 and metrics["eval_margin"] > 1 and metrics["eval_loss"] < .4
    assert len(steps) == 4 * 20 and "true_accuracy" not in metrics


def test_the_micro_batch_size_changes_nothing(folder, monkeypatch):
    """Three real steps on ragged pairs: the same losses, and in the end the same scores."""
    seen, real, room = [], logprobs.pack, []

    def pack(rows, device):
        ids, mask = real(rows, device)
        if torch.is_grad_enabled():
            assert ids.numel() <= room[-1] or len(ids) == 2             # a pair is the least
        return ids, mask
    monkeypatch.setattr(logprobs, "pack", pack)
    for tokens in (1, 60, 10_000):
        room.append(tokens)
        cfg, metrics = trained(folder, pairs(50), epochs=1, held_out=.04, lr=1e-3, micro_batch_tokens=tokens)
        model = reward.load(cfg, policy.load(cfg, "sft"))
        seen.append(([step["loss"] for step in toy.lines(cfg)], scores(model, ROWS, CFG), model.head.weight))
    assert len(seen[0][0]) == 3 and len(set(seen[0][0])) == 3
    for losses, values, weight in seen[1:]:
        assert losses == pytest.approx(seen[0][0], abs=1e-6)
        close(values, seen[0][1], 1e-4), close(weight, seen[0][2], 1e-4)


def test_what_is_held_out_is_not_learned_from(folder):
    """Turning its labels round changes no weight, and mirrors the accuracy."""
    written = pairs(40)
    cfg, before = trained(folder, written, held_out=.25)
    weights, text = toy.saved(cfg), toy.text(cfg)
    held_out = {tuple(pair[0][0]) for pair in hold_out(load_pairs(cfg, text), .25, cfg.seed)[1]}
    turned = [pair for pair in written if tuple(text.prompt(pair)) in held_out]
    assert len(turned) in (10, 11) and turned != written[-len(turned):]
    for pair in turned:
        pair["preference"] = 3 - pair["preference"]
    _, after = trained(folder, written, held_out=.25)
    assert all(torch.equal(w, weights[name]) for name, w in toy.saved(cfg).items())
    assert after["eval_accuracy"] == pytest.approx(1 - before["eval_accuracy"])
    assert after["eval_margin"] == pytest.approx(-before["eval_margin"])
    assert after["eval_loss"] - before["eval_loss"] == pytest.approx(before["eval_margin"], abs=1e-5)


@pytest.mark.parametrize("share, least, most", [(0, 0, 0), (.1, 9, 11), (.5, 45, 47), (.999, 87, 89)])
def test_whole_prompts_are_held_out_at_random(share, least, most):
    """Pairs to the same prompt would leak; the last ones of a file, or the first, are no sample of all."""
    written = [(([i // 3], [i]), ([i // 3], [i + 1000])) for i in range(90)]        # three pairs to each of 30 prompts
    rest, held_out = hold_out(written, share, 0)
    assert sorted(rest + held_out) == written and least <= len(held_out) <= most
    prompts = {pair[0][0][0] for pair in held_out}
    assert not prompts & {pair[0][0][0] for pair in rest} and len(prompts) * 3 == len(held_out)
    if 0 < share < .9:
        seeds = [{pair[0][0][0] for pair in hold_out(written, share, seed)[1]} for seed in range(20)]
        assert len(set().union(*seeds)) > 25 and len(set(map(frozenset, seeds))) > 15


def test_every_epoch_has_an_order_of_its_own(folder, monkeypatch):
    batches = toy.steps_of(monkeypatch, reward, "rows_of", lambda pairs: [str(pair) for pair in pairs])
    trained(folder, pairs(40), epochs=3, batch_size=20, held_out=0.)
    assert len(batches) == 6 == len(set(batches))
    assert all(sorted(batches[i] + batches[i + 1]) == sorted(batches[0] + batches[1]) for i in (2, 4))


def test_weight_decay_pulls_the_weights_to_zero(folder):
    """By lr * weight_decay of themselves in a step, beside what the gradient does, which is little in one step."""
    sizes = {}
    for decay in (0., 5.):
        cfg, _ = trained(folder, pairs(40), lr=1e-3, batch_size=40, epochs=1, held_out=0., weight_decay=decay)
        sizes[decay] = torch.cat([w.flatten() for w in toy.saved(cfg).values()])
    shrunk = (sizes[0.] - sizes[5.]) / sizes[0.]
    assert shrunk.median().item() == pytest.approx(1e-3 * 5, rel=.05)


def test_swapped_pairs_give_1_minus_the_accuracy():
    model, pairs = critic(), list(zip(ROWS[:3], [ROWS[3], ROWS[4], ROWS[0]]))
    metrics, swapped = validate(model, pairs, CFG), validate(model, [pair[::-1] for pair in pairs], CFG)
    assert 0 < metrics["eval_accuracy"] == pytest.approx(1 - swapped["eval_accuracy"])
    assert metrics["eval_margin"] == pytest.approx(-swapped["eval_margin"])
    assert swapped["eval_loss"] - metrics["eval_loss"] == pytest.approx(metrics["eval_margin"], abs=1e-5)
    assert metrics["length_correlation"] == pytest.approx(swapped["length_correlation"], abs=1e-6)


# --- the scale of its scores -----------------------------------------------------------------------------

@kinds
def test_normalise_gives_mean_0_and_deviation_1_and_moves_nothing_but_the_head(kind):
    model = critic(kind)
    before, body = scores(model, ROWS, CFG), {k: v.clone() for k, v in model.gpt.state_dict().items()}
    normalise(model, ROWS, CFG)
    after = scores(model, ROWS, CFG)
    assert after.mean().abs() < 1e-5 and after.std().item() == pytest.approx(1, abs=1e-5)
    close(after, (before - before.mean()) / before.std())
    assert all(torch.equal(model.gpt.state_dict()[k], v) for k, v in body.items())


@pytest.mark.parametrize("answers", [8, 32])
def test_what_run_saves_is_normalised_over_fresh_answers_of_the_sft_model(folder, monkeypatch, answers):
    """Spread over the 8 prompts of val; an answer that is shown stands beside its own prompt."""
    rows, by, ids, real = [], [], tiny.ids(2, 5), reward.generate

    def generate(model, *rest, **kept):
        by.append(model.hidden(ids))
        rows.extend(real(model, *rest, **kept))
        return rows
    monkeypatch.setattr(reward, "generate", generate)
    cfg, _ = trained(folder, pairs(20), scale_answers=answers)
    assert torch.equal(by[0], policy.load(cfg, "sft").hidden(ids))
    values = scores(reward.load(cfg, policy.load(cfg, "sft")), rows, CFG)
    assert len(rows) == answers and len({tuple(prompt) for prompt, _ in rows}) == 8
    assert values.mean().abs() < 1e-4 and values.std().item() == pytest.approx(1, abs=1e-4)
    said = {(toy.sentence(prompt), toy.text(cfg).decode(response)) for prompt, response in rows}
    assert {(shown["instruction"], shown["output"]) for shown in toy.samples(cfg)} <= said


@pytest.mark.parametrize("bias", [0, .1, math.pi])
def test_a_model_that_scores_everything_alike_is_refused(bias):
    model = reward.fresh(tiny.policy())
    model.head.bias.data.fill_(bias)
    rows = [ROWS[i % 5] for i in range(333)]
    with pytest.raises(FloatingPointError, match="same score"):
        normalise(model, rows, CFG)


@pytest.mark.parametrize("value", [0, math.nan, math.inf])
def test_nothing_is_saved_where_the_scores_are_alike_or_not_finite(folder, monkeypatch, value):
    checkpoint = toy.settings(*folder, reward.Config).dir() / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    monkeypatch.setattr(reward, "scores", lambda model, rows, cfg: torch.full((len(rows),), float(value)))
    with pytest.raises(FloatingPointError):
        trained(folder, pairs(20))
    assert not checkpoint.exists()


def test_metrics_are_numbers_also_where_a_correlation_has_none():
    """A single pair of equally long answers: NaN is no JSON."""
    assert all(map(math.isfinite, validate(critic(), [(([7], [1, 0]), ([7], [2, 0]))], CFG).values()))


def test_the_command_leaves_numbers_also_with_an_answer_to_each_prompt(tmp_path):
    """With one answer a prompt there are no neighbours to compare with the truth."""
    result = farm("--method", "reward", "--limit", "8", "--max_new_tokens", "8", "--scale_answers", "8",
                  "--out", tmp_path)
    assert result.code == 0 and not result.err, result.err
    text = (tmp_path / "reward" / "result.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(text))


@pytest.mark.parametrize("share", [1., 1.5])
def test_nothing_left_to_train_on_is_refused(share):
    with pytest.raises(InputError, match="held_out"):
        reward.Config(held_out=share)


# --- what it says about itself ---------------------------------------------------------------------------

def simulated(stretch, n=200_000):
    """Margins of a model whose true margins are stretched; the labels come from the true ones."""
    r = torch.Generator().manual_seed(0)
    true = torch.randn(n, generator=r) * 2
    right = torch.rand(n, generator=r) < torch.sigmoid(true)
    return torch.where(right, true, -true) * stretch


def test_calibration_error_is_0_for_honest_margins_and_large_for_boasting_and_for_timid_ones():
    assert calibration_error(simulated(1)) < .005
    assert calibration_error(simulated(5)) > .1 and calibration_error(simulated(.1)) > .1


def test_calibration_error_by_hand():
    """Two bins: 3 of 4 right where .75 is said is honest; none of 1 right where .9 is said is off by .9."""
    margin = torch.tensor([1., 1, 1, -1, 0]) * math.log(3)
    margin[4] = -math.log(9)
    assert calibration_error(margin) == pytest.approx(.9 / 5, abs=1e-6)
    assert calibration_error(-margin[4:]) == pytest.approx(.1)
    assert calibration_error(torch.tensor([50., 90, 1e4])) == 0


def test_agreement_by_hand():
    """Neighbours: right, (equal in truth: not asked), wrong; right, wrong, wrong."""
    scores = torch.tensor([[0., 1, 2, 1], [0, -1, -2, -1]])
    truth = torch.tensor([[0., 5, 5, 6], [0, -5, -4, -5]])
    assert agreement(scores, truth) == pytest.approx(2 / 5)


# --- on disk ---------------------------------------------------------------------------------------------

@kinds
def test_a_saved_reward_model_comes_back_frozen_and_equal(kind, tmp_path):
    folder = toy.run_folder(tmp_path, kind)
    cfg = toy.settings(folder, kind, reward.Config)
    ref = policy.load(cfg, "sft")
    model = reward.load(cfg, ref)
    toy.moved([*model.trainable()], 5)
    before = scores(model, ROWS, CFG)
    reward.save(model, cfg)
    other = policy.load(cfg, "sft")
    back = reward.load(cfg, other)
    assert torch.equal(scores(back, ROWS, CFG), before) and before.std() > .01
    assert not any(p.requires_grad for p in (*back.gpt.parameters(), *back.head.parameters()))
    assert (back.gpt is other.gpt) == (kind == "lora")          # an adapter shares the base
    with torch.no_grad():
        alone, beside = (logprobs.token_logps(p, *pack(ROWS)) for p in (policy.load(cfg, "sft"), other))
    assert torch.equal(alone, beside)
    value = back.copy("value")
    params = value.trainable()
    assert torch.equal(scores(value, ROWS, CFG), before)
    toy.moved(params, 6)
    assert (scores(value, ROWS, CFG) - before).abs().min() > 1e-4
    assert torch.equal(scores(back, ROWS, CFG), before)         # the value function moves alone, head and all


def test_scores_that_are_all_equal_have_no_accuracy():
    scores = torch.tensor([1., 2., 3.])
    assert reward.accuracy(scores, scores) is None
    assert reward.accuracy(scores, torch.tensor([1., 1., 4.])) == pytest.approx(1 / 3)
