"""DPO against TRL and closed forms."""
import ast
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import toy
from quick import few

import model
from rlhf import dpo, logprobs, pairs, policy
from rlhf.dpo import dpo_loss
from rlhf.pairs import load_pairs
from rlhf.policy import Policy
from rlhf.update import Updater

torch.set_num_threads(1)
PROMPTS = tiny.texts([3, 5, 2])
CHOSEN = list(zip(PROMPTS, tiny.texts([4, 1, 6], seed=10)))
REJECTED = list(zip(PROMPTS, tiny.texts([2, 7, 3], seed=20)))
PAIRS = list(zip(CHOSEN, REJECTED))


def losses_and_margins(model, ref, beta=.1):
    cfg = dpo.Config(beta=beta)
    losses, rewards = dpo_loss(dpo.logps(model, PAIRS, cfg), dpo.logps(ref, PAIRS, cfg), None, cfg)
    return losses, rewards[0] - rewards[1]


def loss(logp, ref_logp, beta):
    return dpo_loss(logp, ref_logp, None, dpo.Config(beta=beta))


def numbers(seed):
    """Log-probs (2, 8) of eight pairs."""
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)) * 10


def llama(folder, seed):
    """A random transformers model, and our policy with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**tiny.SHAPE, bos_token_id=None, eos_token_id=0)
    theirs = tiny.randomise(transformers.LlamaForCausalLM(config), seed)
    theirs.save_pretrained(folder)
    return theirs, Policy(model.load(folder))


def test_loss_and_gradients_equal_trl(tmp_path):
    """The same pairs, the same two random models, pad = eos: the loss and all its gradients."""
    transformers, trl, datasets = (pytest.importorskip(name) for name in ("transformers", "trl", "datasets"))
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(61)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w60"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    (policy, mine), (reference, ref) = (llama(tmp_path / str(seed), seed) for seed in (0, 1))

    rows = [{side: "".join(f"w{i} " for i in ids) for side, ids in zip(("prompt", "chosen", "rejected"), row)}
            for row in zip(PROMPTS, *([response for _, response in side] for side in (CHOSEN, REJECTED)))]
    settings = trl.DPOConfig(output_dir=str(tmp_path), beta=.1, report_to="none", use_cpu=True, bf16=False,
                             gradient_checkpointing=False, disable_tqdm=True)
    trainer = trl.DPOTrainer(policy, reference, settings, train_dataset=datasets.Dataset.from_list(rows),
                             processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs = trainer._compute_loss(policy, batch, False)

    with_eos = [tuple((prompt, [*response, 0]) for prompt, response in pair) for pair in PAIRS]
    params, cfg = mine.trainable(), dpo.Config()
    losses, _ = loss(dpo.logps(mine, with_eos, cfg), dpo.logps(ref, with_eos, cfg), .1)
    assert abs(theirs.item() - math.log(2)) > .1               # it is not the start that is compared
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    losses.mean().backward()
    theirs.backward()
    assert len(params) == len(list(policy.parameters()))
    for name, p in mine.gpt.named_parameters():
        torch.testing.assert_close(p.grad, policy.get_parameter(mine.gpt.name(name)).grad, atol=1e-4, rtol=1e-4)


def test_the_loss_by_hand():
    losses, rewards = loss(torch.tensor([[-10.], [-12.]]), torch.tensor([[-11.], [-9.]]), .5)
    assert rewards.tolist() == [[.5], [-1.5]]                   # 1 nat above the reference, and 3 below it
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_starts_at_log_2(kind):
    """A policy that is a copy of the reference has no margin, whatever the answers are."""
    ref = tiny.policy(kind)
    losses, _ = losses_and_margins(ref.copy("policy"), ref)
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)), atol=1e-6, rtol=0)


def test_gradients_pull_up_the_chosen_and_push_down_the_rejected():
    """In closed form: -beta sigmoid(-margin) and its opposite (eq. 7's gradient), none through rewards."""
    logp = numbers(1).requires_grad_()
    losses, rewards = loss(logp, numbers(2), .3)
    losses.sum().backward()
    assert not rewards.requires_grad
    torch.testing.assert_close(logp.grad[0], -.3 * torch.sigmoid(rewards[1] - rewards[0]))
    assert (logp.grad[0] < 0).all() and torch.equal(logp.grad[1], -logp.grad[0])


def test_swapping_chosen_and_rejected_mirrors_the_loss():
    """-log sigmoid(m) and -log sigmoid(-m) differ by m, and their probabilities add up to 1."""
    logp, ref_logp = numbers(1), numbers(2)
    (losses, rewards), (mirrored, swapped) = loss(logp, ref_logp, .3), loss(logp.flip(0), ref_logp.flip(0), .3)
    assert torch.equal(rewards, swapped.flip(0))
    torch.testing.assert_close(mirrored - losses, rewards[0] - rewards[1])
    torch.testing.assert_close((-losses).exp() + (-mirrored).exp(), torch.ones(8))


def test_margins_of_thousands_of_nats_stay_finite():
    losses, _ = loss(torch.tensor([[-1e4, -9e4], [-9e4, -1e4]]), torch.full((2, 2), -1e4), .1)
    assert losses.tolist() == [0, 8000]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_small_step_raises_the_margin_and_leaves_the_reference(kind):
    ref = tiny.policy(kind)
    model, before = ref.copy("policy"), dpo.logps(ref, PAIRS, dpo.Config())
    updater = Updater(model.trainable(), lr=1e-4, steps=1)
    losses, _ = losses_and_margins(model, ref)
    updater.add(losses.sum(), 3)
    updater.step()
    after, margins = losses_and_margins(model, ref)
    assert margins.mean() > 0 and after.mean() < losses.mean()
    assert torch.equal(dpo.logps(ref, PAIRS, dpo.Config()), before)


def test_the_preferred_answer_is_the_chosen_one(tmp_path):
    cfg = dpo.Config(out=str(tmp_path))
    cfg.dir("pairs").mkdir()
    pair = {"prompt": [1, 2], "ids_1": [3, 0], "ids_2": [4, 4, 0]}
    pairs = [pair | {"preference": preference} for preference in (1, 2)]
    (cfg.dir("pairs") / "pairs.json").write_text(json.dumps(pairs))
    one, two = ([1, 2], [3, 0]), ([1, 2], [4, 4, 0])
    assert load_pairs(cfg, SimpleNamespace(prompt=lambda pair: pair["prompt"])) == [(one, two), (two, one)]


# --- a whole run, on a tiny model --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders whose stages sft and pairs are done, for both kinds of training."""
    return toy.run_folders(tmp_path_factory, pairs=True)


def ran(folders, kind, **changes):
    """(settings, metrics of each step, what run() returned)."""
    usual = {"lr": 1e-3, "epochs": 2, "batch_size": 16, "max_new_tokens": 8}
    cfg = toy.settings(folders[kind], kind, dpo.Config, **usual | changes)
    result = dpo.run(cfg)
    return cfg, toy.lines(cfg), result


@pytest.mark.parametrize("temperature", [1., 2.])
@pytest.mark.parametrize("kind", toy.KINDS)
def test_a_run_starts_at_its_reference(kind, temperature, folders):
    """The SFT model with its adapter, at the same temperature, pair by pair: no answer has a reward yet."""
    _, metrics, _ = ran(folders, kind, temperature=temperature, micro_batch_tokens=60)
    first = metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert max(abs(first[name]) for name in ("rewards/chosen", "rewards/rejected", "rewards/margins")) < 1e-5
    assert abs(metrics[1]["rewards/chosen"]) > 1e-4                       # and then it moves


@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_reference_is_not_asked_about_pairs_that_it_sampled(kind, tmp_path, monkeypatch):
    folder, how = toy.run_folder(tmp_path, kind), {"temperature": 1.5, "judge": "barn"}
    made = pairs.sample_pairs(toy.settings(folder, kind, pairs.Config, **how))
    toy.write_pairs(folder, [pair | {"preference": 1 + i % 2} for i, pair in enumerate(made)])
    cfg = toy.settings(folder, kind, dpo.Config, **how)
    ref, there = policy.load(cfg, "sft"), load_pairs(cfg, toy.text(cfg))
    expected = dpo.all_logps(ref, there, cfg)
    monkeypatch.setattr(dpo, "all_logps", lambda *args: pytest.fail("the reference was asked again"))
    torch.testing.assert_close(dpo.reference_logps(ref, there, cfg), expected, atol=5e-5, rtol=0)


def trained_pairs(model, pairs, cfg):
    """What logps() is asked for with gradients, so not by the reference."""
    return [str(pair) for pair in pairs] if torch.is_grad_enabled() else []


@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_first_log_probs_are_means_over_the_batch(kind, folders, monkeypatch):
    batches = toy.steps_of(monkeypatch, dpo, "logps", trained_pairs)
    cfg, metrics, _ = ran(folders, kind, epochs=1, micro_batch_tokens=60)
    start, first = policy.load(cfg, "sft"), [ast.literal_eval(pair) for pair in batches[0]]
    assert len(first) == 16
    for side, name in enumerate(("logps/chosen", "logps/rejected")):
        with torch.no_grad():
            alone = [logprobs.token_logps(start, *logprobs.pack([pair[side]])).sum().item() for pair in first]
        assert metrics[0][name] == pytest.approx(sum(alone) / 16, rel=1e-5)


@pytest.mark.parametrize("kind", few(toy.KINDS, "full"))
def test_the_micro_batch_size_changes_nothing(kind, folders):
    runs = []
    for tokens in (1, 60, 10_000):
        cfg, metrics, _ = ran(folders, kind, micro_batch_tokens=tokens)
        runs.append((metrics, torch.cat([w.flatten() for w in toy.saved(cfg).values()])))
    for metrics, weights in runs[1:]:
        for a, b in zip(metrics, runs[0][0], strict=True):
            assert toy.known(a) == pytest.approx(toy.known(b), rel=1e-3, abs=1e-5)
        torch.testing.assert_close(weights, runs[0][1], atol=1e-4, rtol=1e-4)


def test_it_learns_what_the_preferred_answers_have_in_common(folders):
    cfg, metrics, result = ran(folders, "full", epochs=8)
    assert metrics[-1]["rewards/accuracies"] > .9 and metrics[-1]["loss"] < .4
    assert result.keys() >= {"loss", "rewards/margins", "eval/mean_length", "objective/kl"}
    ref, trained = policy.load(cfg, "sft"), policy.open_checkpoint(cfg.dir() / "checkpoint")[0]
    margins = dpo.logps(trained, load_pairs(cfg, toy.text(cfg)), cfg) - dpo.logps(
        ref, load_pairs(cfg, toy.text(cfg)), cfg)
    assert (margins[0] > margins[1]).float().mean() > .9


def test_every_epoch_has_an_order_of_its_own(folders, monkeypatch):
    batches = toy.steps_of(monkeypatch, dpo, "logps", trained_pairs)
    ran(folders, "full", epochs=3, batch_size=20)
    assert len(batches) == 6 == len(set(batches))
    assert all(sorted(batches[i] + batches[i + 1]) == sorted(batches[0] + batches[1]) for i in (2, 4))


def test_there_is_no_accuracy_before_any_pair_is_ranked():
    loss, zero, noise, some = 4 * math.log(2), 0., 2e-6, .02
    for chosen, rejected, right, wanted in ((zero, zero, 0, None), (noise, -noise, 3, None), (some, zero, 3, .75),
                                            (some, some, 1, .25), (-some, some, 0, 0)):
        sums = torch.tensor([loss, chosen, rejected, chosen - rejected, right, -9., -8.])
        assert dpo.means(sums, 4)["rewards/accuracies"] == wanted
