"""Best-of-n against brute force over all subsets, and expert iteration, which learns from its winners."""
import itertools
import json
import math

import pytest
import torch
import toy

import model
from data import InputError, sets
from rlhf import best_of_n, expert_iteration, logprobs, policy, reward, sft
from rlhf.answers import answer
from rlhf.best_of_n import best_of_k, kl_bound

torch.set_num_threads(1)
kinds = pytest.mark.parametrize("kind", toy.KINDS)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- the curve from one pool -----------------------------------------------------------------------------

SCORES, WORTH = (torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def test_best_of_k_is_the_mean_over_all_subsets_of_k():
    expected = []
    for k in range(1, 7):
        subsets = [list(subset) for subset in itertools.combinations(range(6), k)]
        expected.append(sum(WORTH[row, subset][SCORES[row, subset].argmax()].item()
                            for row in range(3) for subset in subsets) / (3 * len(subsets)))
    assert best_of_k(SCORES, WORTH).mean(0).tolist() == pytest.approx(expected)


def test_the_best_of_1_is_the_mean_and_the_best_of_n_the_winner():
    curve, winners = best_of_k(SCORES, WORTH), WORTH[range(3), SCORES.argmax(1)]
    close(curve[:, 0], WORTH.double().mean(1))
    close(curve[:, -1], winners.double())


def test_by_its_own_scores_more_is_never_worse_and_by_the_opposite_never_better():
    curve = best_of_k(SCORES, SCORES)
    assert (curve.diff(dim=1) > 0).all()
    close(curve[:, -1], SCORES.max(1).values.double())
    close(best_of_k(SCORES, -SCORES), -curve)


def test_of_many_even_scores_the_best_of_k_is_k_in_k_plus_1():
    k, scores = torch.arange(1, 257), (torch.arange(256)[None] + .5) / 256
    assert (best_of_k(scores, scores) - k / (k + 1)).abs().max() < 1 / 256


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_kl_bound_is_what_enumeration_finds_where_ties_are_rare(n):
    """M equally likely answers, each better than the one before: two tie with probability 1/M."""
    for M, gap in ((4, None), (20_000, 1e-3)):
        i = torch.arange(1, M + 1, dtype=torch.double)
        p = (i / M) ** n - ((i - 1) / M) ** n           # that the best of n is the i-th
        if M == 4:                                      # really enumerated: all n-tuples of 4 answers
            best = [max(answers) for answers in itertools.product(range(M), repeat=n)]
            assert p.tolist() == pytest.approx([best.count(answer) / M ** n for answer in range(M)])
        kl = (p * (p * M).log()).sum().item()
        assert kl <= kl_bound(n) + 1e-12 and (gap is None or kl == pytest.approx(kl_bound(n), abs=gap))


# --- the run ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return toy.run_folders(tmp_path_factory)


def ran(folders, kind, method, score_fn=None, **changes):
    cfg = toy.settings(folders[kind], kind, method.Config, **changes)
    return cfg, method.run(cfg, score_fn)


def outputs(cfg):
    return [record["output"] for record in json.loads((cfg.dir() / "outputs.json").read_text())]


@kinds
def test_what_is_written_is_the_answer_with_the_highest_score(kind, folders, monkeypatch):
    """Scored here once more, one answer at a time."""
    pools, real = [], best_of_n.generate
    monkeypatch.setattr(best_of_n, "generate", lambda *args, **kind: pools.append(real(*args, **kind)) or pools[-1])
    cfg, metrics = ran(folders, kind, best_of_n, n=5)
    judge = reward.load(cfg, policy.load(cfg, "sft"))
    with torch.no_grad():
        scores = [reward.score(judge, *logprobs.pack([row])).item() for row in pools[0]]
    best = [max(range(i, i + 5), key=scores.__getitem__) for i in range(0, 40, 5)]
    assert len(pools[0]) == 40 and outputs(cfg) == [toy.text(cfg).decode(pools[0][i][1]) for i in best]
    assert len({i % 5 for i in best}) > 2
    assert metrics["objective/scores"] == pytest.approx(sum(scores[i] for i in best) / 8, rel=1e-4)
    assert metrics["objective/kl"] == pytest.approx(math.log(5) - .8)
    curve = json.loads((cfg.dir() / "curve.json").read_text())
    assert curve.keys() == {"n", "kl", "score", "random_score"}         # nobody knows the truth of this data
    ends = [curve["random_score"][0], curve["score"][0], curve["score"][-1]]
    assert ends == pytest.approx([sum(scores) / 40] * 2 + [metrics["objective/scores"]], rel=1e-4)
    assert curve["kl"] == [kl_bound(k) for k in curve["n"]] and curve["n"] == [1, 2, 3, 4, 5]


@kinds
def test_the_best_of_1_is_what_the_sft_model_says(kind, folders):
    cfg, metrics = ran(folders, kind, best_of_n, n=1)
    best = outputs(cfg)
    asked = toy.settings(folders[kind], kind, sft.Config)
    answer(policy.load(asked, "sft"), toy.text(asked), asked)
    assert best == outputs(asked) and len(set(best)) > 5 and metrics["objective/kl"] == 0


def test_neither_answers_nor_choices_depend_on_slots_and_micro_batches(folders):
    seen = []
    for slots, tokens in ((1, 10), (7, 40), (16, 4096), (200, 10 ** 6)):
        cfg, _ = ran(folders, "full", best_of_n, n=4, slots=slots, micro_batch_tokens=tokens)
        seen.append((outputs(cfg), json.loads((cfg.dir() / "curve.json").read_text())["score"]))
    assert all(said == seen[0][0] and curve == pytest.approx(seen[0][1]) for said, curve in seen)


@pytest.mark.parametrize("slots", [5, 12, 64])
def test_a_prompt_goes_through_the_model_once_for_all_its_answers(slots, folders, monkeypatch):
    prefilled, real = [], model.GPT.hidden

    def hidden(self, ids, pos=None, attends=None, where=None):
        if where is not None and not len(where):        # nothing is wanted but what goes into the cache
            prefilled.extend(ids.tolist())
        return real(self, ids, pos, attends, where)
    monkeypatch.setattr(model.GPT, "hidden", hidden)
    cfg, _ = ran(folders, "lora", best_of_n, n=4, slots=slots)
    prompts = [toy.text(cfg).prompt(record)[:-1] for record in sets.load(cfg.data, cfg.eval_data, cfg.limit)["eval"]]
    assert len(prefilled) == 8 == len(prompts)
    assert all(any(row[:len(prompt)] == prompt for row in prefilled) for prompt in prompts)


# --- expert iteration ------------------------------------------------------------------------------------

EXIT = {"n": 4, "epochs": 2, "batch_size": 16, "lr": 1e-3}


@pytest.fixture
def watched(monkeypatch):
    """What expert iteration samples, and what it trains on: lists of one entry a round."""
    seen = {name: [] for name in ("by", "prompts", "rows", "scores", "seed", "from", "kept", "after")}
    generate, scorer, train = expert_iteration.generate, reward.scorer, sft.train

    def watch_generate(model, prompts, text, cfg, seed, n, kept):
        rows = generate(model, prompts, text, cfg, seed, n, kept=kept)
        for name, value in (("by", state(model)), ("prompts", prompts), ("rows", rows), ("seed", seed)):
            seen[name].append(value)
        return rows

    def watch_scorer(*args):
        score = scorer(*args)

        def watched_score(rows):
            seen["scores"].append(score(rows))
            return seen["scores"][-1]
        return watched_score

    def watch_train(model, rows, cfg, log, start):
        seen["from"].append(state(model)), seen["kept"].append(rows)
        metrics = train(model, rows, cfg, log, start=start)
        seen["after"].append(state(model))
        return metrics
    monkeypatch.setattr(expert_iteration, "generate", watch_generate)
    monkeypatch.setattr(reward, "scorer", watch_scorer)
    monkeypatch.setattr(expert_iteration.sft, "train", watch_train)
    return seen


def state(model):
    """All that is trained of a policy, as one vector."""
    params = model.gpt.adapter(model.role).values() if model.role else model.gpt.parameters()
    return torch.cat([p.detach().flatten() for p in params])


@kinds
def test_it_imitates_the_winners_that_ended_and_nothing_else(kind, folders, watched):
    cfg, metrics = ran(folders, kind, expert_iteration, **EXIT)
    rows, scores, kept = (watched[name][0] for name in ("rows", "scores", "kept"))
    scores = scores.view(80, 4)
    winners = [rows[4 * i + max(range(4), key=scores[i].tolist().__getitem__)] for i in range(80)]
    assert len(rows) == 320 and kept == [row for row in winners if row[1][-1] in toy.STOPS]
    assert 10 < len(kept) < 70 and metrics.keys() >= {"loss", "eval/finished", "objective/kl"}


@kinds
def test_it_starts_from_the_sft_model_which_stays_as_it_is(kind, folders, watched):
    cfg, _ = ran(folders, kind, expert_iteration, **EXIT)
    before = state(policy.load(cfg, "sft"))
    assert torch.equal(watched["from"][0], before) and torch.equal(watched["by"][0], before)
    assert torch.equal(watched["after"][0].sort().values, torch.cat(
        [w.flatten() for w in toy.saved(cfg).values()]).sort().values)
    assert (watched["after"][0] - before).abs().max() > 1e-3


@kinds
def test_a_second_round_samples_from_the_newest_model_and_starts_from_sft_again(kind, folders, watched):
    """On the prompts that come next, with other random numbers."""
    cfg, _ = ran(folders, kind, expert_iteration, **EXIT, rounds=3, prompts=30)
    sft_model = state(policy.load(cfg, "sft"))
    assert all(torch.equal(start, sft_model) for start in watched["from"])
    for round in (1, 2):
        assert torch.equal(watched["by"][round], watched["after"][round - 1])
    assert not torch.equal(*watched["after"][1:])
    order = sum(watched["prompts"], [])
    assert [len(prompts) for prompts in watched["prompts"]] == [30] * 3 and order[80:] == order[:10]
    assert len(set(watched["seed"])) == 3 and len({tuple(prompt) for prompt in order[:80]}) > 60
    saved = torch.cat([w.flatten() for w in toy.saved(cfg).values()])
    assert torch.equal(saved.sort().values, watched["after"][2].sort().values)


def test_the_log_keeps_all_rounds(folders):
    steps, shown = [], []
    for rounds in (1, 2):
        cfg, _ = ran(folders, "full", expert_iteration, **EXIT, rounds=rounds, prompts=20)
        steps.append(len(toy.lines(cfg)))
        shown.append({sample["step"] for sample in toy.lines(cfg, "samples.jsonl")})
    assert steps[1] >= 2 * steps[0] - 1 > 0 and shown == [{0}, {0, 1}]


def test_where_no_winner_ended_the_user_is_told(folders, monkeypatch):
    monkeypatch.setattr(expert_iteration, "generate", lambda model, prompts, *args, **kept: [
        (prompt, [20]) for prompt in prompts for _ in range(4)])
    with pytest.raises((InputError, FloatingPointError)):
        ran(folders, "full", expert_iteration, **EXIT)


def test_imitating_winners_raises_the_reward(folders, watched):
    """The reward is a rule here, and no reward model is needed."""
    ran(folders, "full", expert_iteration, toy.thirties, **EXIT | {"n": 8, "lr": 1e-2, "epochs": 8}, rounds=2)
    means = [toy.thirties(rows).mean().item() for rows in watched["rows"]]
    assert means[1] > means[0] + .2, means
