"""Quark: quantiles, the exact KL, and what is learned under which mark."""
import pytest
import tiny
import torch
import torch.nn.functional as F
import toy
from quick import few

from data import InputError
from rlhf import quark

torch.set_num_threads(1)
FIRST = 50                              # the toy's word for the mark of quantile k is FIRST + k


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return toy.run_folders(tmp_path_factory)


@pytest.fixture(autouse=True)
def marks(monkeypatch):
    monkeypatch.setattr(quark, "mark", lambda k: f"w{FIRST + k} ")


def ran(folders, kind, reward=toy.thirties, **changes):
    """(settings, metrics of each round, what run() returned)."""
    usual = {"lr": 1e-2, "rounds": 8, "rollout_batch": 40, "updates": 8, "batch_size": 20, "missing_eos_penalty": 0.}
    cfg = toy.settings(folders[kind], kind, quark.Config, **usual | changes)
    result = quark.run(cfg, reward)
    return cfg, toy.lines(cfg), result


# --- functions of tensors -------------------------------------------------------------------------------

@pytest.mark.parametrize("n, k", [(10, 5), (11, 4), (7, 7), (40, 3)])
def test_quantiles_are_of_one_size_and_the_last_has_the_highest_scores(n, k):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    found = quark.quantiles_of(scores, k)
    sizes = [(found == each).sum().item() for each in range(1, k + 1)]
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1
    assert (found[scores.argsort()].diff() >= 0).all() and found[scores.argmax()] == k and found[scores.argmin()] == 1


def test_the_kl_is_of_the_reference_to_the_policy():
    """torch's own cross entropy and KL divergence, at temperature 1.5, and their gradients."""
    r = torch.Generator().manual_seed(0)
    h, ref_h, W, ref_W = (torch.randn(*shape, generator=r).requires_grad_()
                          for shape in ((6, 5), (6, 5), (9, 5), (9, 5)))
    targets = torch.randint(9, (6,), generator=r)
    logits, ref_logits = h @ W.T / 1.5, (ref_h @ ref_W.T / 1.5).detach()
    ours = quark.nll_and_kl(logits, ref_logits, targets)
    theirs = (F.cross_entropy(logits, targets, reduction="sum"),
              F.kl_div(logits.log_softmax(-1), ref_logits.softmax(-1), reduction="sum"))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(mine, (h, W), retain_graph=True),
                        torch.autograd.grad(other, (h, W), retain_graph=True)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


PROMPTS, RESPONSES = tiny.texts([3, 5, 2]), [[7, 8, 9, 0], [11, 0], [30, 31, 32, 33, 34, 0]]
PLAIN = list(zip(PROMPTS, RESPONSES))
MARKED = [([FIRST + k, *prompt], response) for k, (prompt, response) in enumerate(PLAIN, 1)]


@pytest.mark.parametrize("kind", toy.KINDS)
@pytest.mark.parametrize("chunk", [2, 5, 1024])
def test_every_token_of_an_answer_is_learned_beside_what_the_reference_says_without_the_mark(kind, chunk, monkeypatch):
    """By brute force, row by row without padding: the first token and EOS too. The gradient is that of one chunk."""
    ref = tiny.policy(kind)
    model = ref.copy("policy")
    params = model.trainable()
    toy.moved(params, 3)
    nll, kl = 0., 0.
    for (prompt, response), (plain, _) in zip(MARKED, PLAIN):
        logp, ref_logp = (logits(role, asked + response)[len(asked) - 1:-1].log_softmax(-1)
                          for role, asked in ((model, prompt), (ref, plain)))
        nll = nll - sum(logp[t, token] for t, token in enumerate(response))
        kl = kl + (ref_logp.exp() * (ref_logp - logp)).sum()
    monkeypatch.setattr(quark, "CHUNK", chunk)
    ours = list(quark.quark_losses(model, ref, MARKED, PLAIN, 1.))
    for mine, other in zip(ours, (nll, kl)):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(mine, params, retain_graph=True),
                        torch.autograd.grad(other, params, retain_graph=True)):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def logits(role, ids):
    """(T, V) of one row."""
    with role.gpt.using(role.role):
        return role.gpt(torch.tensor([ids]))[0]


def test_settings_that_make_no_sense_are_refused():
    for changes in ({"quantiles": 1}, {"quantiles": 9, "rollout_batch": 8}):
        with pytest.raises(InputError, match="--quantiles"):
            quark.Config(**changes)


# --- whole runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", few(toy.KINDS, "full"))
def test_it_learns_what_is_rewarded(kind, folders):
    _, metrics, result = ran(folders, kind, rounds=10)
    scores = [step["objective/scores"] for step in metrics]
    assert scores[0] < .7 and sum(scores[-4:]) / 4 > scores[0] + .3, scores
    assert result["objective/kl"] > .1 and result.keys() >= {"loss/nll", "loss/kl", "eval/mean_length"}


def test_all_quantiles_of_the_whole_pool_are_learned_and_the_best_is_asked_for(folders, monkeypatch):
    asked, learned, scored = [], [], []
    real, losses = quark.generate, quark.quark_losses
    monkeypatch.setattr(quark, "generate", lambda *args: asked.append(args[1]) or real(*args))
    monkeypatch.setattr(quark, "quark_losses", lambda *args: learned.append((len(scored), *args[2:4])) or losses(*args))

    def reward(rows):
        scored.append(rows)
        return toy.thirties(rows) + torch.arange(len(rows)) * 1e-4
    ran(folders, "full", reward, rounds=2, updates=4)                                  # 4 x 20: all of the second pool
    assert [prompt[0] == FIRST + 5 for prompts in asked for prompt in prompts[:1]] == [False, True]
    assert asked[1] == [[FIRST + 5, *prompt] for prompt, _ in scored[1]]
    pool = [(prompt, response) for rows in scored for prompt, response in rows]
    scores = torch.cat([toy.thirties(rows) + torch.arange(40) * 1e-4 for rows in scored])
    rows = [row for round, marked, _ in learned for row in marked if round == 2]
    plain = [row for round, _, without in learned for row in without if round == 2]
    best = [pool[i] for i in scores.argsort(descending=True)[:16]]
    assert sorted(plain) == sorted(pool)
    assert rows == [([row[0][0], *prompt], response) for row, (prompt, response) in zip(rows, plain)]
    assert sorted(prompt[0] - FIRST for prompt, _ in rows) == [k for k in range(1, 6) for _ in range(16)]
    assert sorted(best) == sorted((prompt[1:], response) for prompt, response in rows if prompt[0] == FIRST + 5)
    assert any(response[-1] in toy.STOPS for _, response in rows)                      # EOS is learned, too


def test_an_answer_without_an_end_pays_for_it(folders):
    """All answers have one token; some of them are the end."""
    cfg, metrics, _ = ran(folders, "full", lambda rows: torch.zeros(len(rows)), rounds=1, max_new_tokens=1,
                          missing_eos_penalty=2.)
    ended = metrics[0]["val/num_eos_tokens"]
    assert 0 < ended < 40 and metrics[0]["objective/scores"] == pytest.approx(-2 * (40 - ended) / 40)


@pytest.mark.slow
def test_the_micro_batch_size_changes_nothing(folders):
    runs = [ran(folders, "full", rounds=2, lr=1e-3, micro_batch_tokens=tokens)[1] for tokens in (1, 60, 10_000)]
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_the_kl_holds_the_policy_back(folders):
    free, held = (ran(folders, "full", rounds=4, beta=beta)[1][-1]["loss/kl"] for beta in (0., 5.))
    assert held < free / 2
