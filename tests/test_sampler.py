"""Sampled answers: greedy against a full forward pass per token, frequencies against the softmax."""
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import InputError
from rlhf import kv_cache, sampler
from rlhf.logprobs import pack, token_logps
from rlhf.sampler import CHECK_EVERY, draw, likely, sample

torch.set_num_threads(1)
PROMPTS = tiny.texts([3, 9, 1, 5, 5, 2, 7])
UNUSED = [61]                                                   # not in the vocabulary: nothing stops


def greedy(policy, prompt, stops, max_new_tokens):
    """The definition: the whole text through the model again for each token."""
    response = []
    while len(response) < max_new_tokens and (not response or response[-1] not in stops):
        with policy.gpt.using(policy.role):
            response.append(policy.gpt(torch.tensor([prompt + response]))[0, -1].argmax().item())
    return response


def cut(response, stops):
    """A response up to its first stop id, that one included."""
    ends = [i + 1 for i, token in enumerate(response) if token in stops]
    return response[:min(ends, default=len(response))]


# --- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("slots", [2, 100])
def test_greedy_answers_equal_a_full_forward_pass_per_token(kind, slots):
    """Ragged prompts, rows that stop at different times and are dropped, with and without an adapter."""
    policy = tiny.policy(kind)
    longest = [greedy(policy, prompt, UNUSED, 15) for prompt in PROMPTS]
    stops = sorted({longest[0][2], longest[3][7]})
    expected = [greedy(policy, prompt, stops, 15) for prompt in PROMPTS]
    assert len({len(response) for response in expected}) > 2    # so that the test sees rows end apart
    assert sample(policy, PROMPTS, stops, 15, temperature=0, slots=slots) == list(zip(PROMPTS, expected))


@pytest.mark.parametrize("slots", [1, 3, 5, 100])
def test_answers_do_not_depend_on_slots(slots):
    policy, stops = tiny.policy(), [1, 2, 3, 4]
    few, eight = (sample(policy, PROMPTS, stops, 20, n=2, slots=slots) for slots in (slots, 8))
    assert few == eight


def test_answers_do_not_depend_on_the_rows_beside_them():
    """Neither on prompts that come after, nor on whether n answers share a prefill or each has its own."""
    policy, stops = tiny.policy(), [1, 2, 3, 4]
    rows = sample(policy, PROMPTS, stops, 20, n=3)
    assert sample(policy, PROMPTS[:4], stops, 20, n=3) == rows[:12]
    assert sample(policy, [prompt for prompt in PROMPTS for _ in range(3)], stops, 20) == rows


def test_the_n_answers_to_a_prompt_lie_side_by_side_and_differ():
    rows = sample(tiny.policy(), PROMPTS, UNUSED, 8, n=3, slots=4)
    assert [prompt for prompt, _ in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(response) for _, response in rows}) == len(rows)


def test_the_seed_decides():
    policy = tiny.policy()
    first, again, other = (sample(policy, PROMPTS, UNUSED, 8, seed=seed) for seed in (1, 1, 2))
    assert first == again and all(a != b for a, b in zip(first, other))


@pytest.mark.parametrize("stops", [[5], [5, 17, 33, 60], list(range(40))])
def test_a_response_ends_with_its_first_stop_id_and_is_not_changed_by_it(stops):
    """Any of the stops ends it, right at the start too; without one it has exactly max_new_tokens."""
    policy, n = tiny.policy(), 4
    free = sample(policy, PROMPTS, UNUSED, 12, temperature=1.5, n=n)
    assert all(len(response) == 12 for _, response in free)
    expected = [(prompt, cut(response, stops)) for prompt, response in free]
    assert len({len(response) for _, response in expected}) > 2
    assert sample(policy, PROMPTS, stops, 12, temperature=1.5, n=n) == expected


def test_one_long_prompt_is_read_apart_and_changes_no_answer(monkeypatch):
    policy, columns, real = tiny.policy(max_position_embeddings=600), [], kv_cache.KVCache.read
    short, long = tiny.texts([3, 9, 12] * 10), tiny.texts([500])
    alone = sample(policy, short, [5], 12, 0, slots=31) + sample(policy, long, [5], 12, 0)

    def read(self, layer, slots, q, bias, cap):
        columns.append(len(q) * bias.shape[-1] if layer == 0 else 0)
        return real(self, layer, slots, q, bias, cap)
    monkeypatch.setattr(kv_cache.KVCache, "read", read)
    sample(policy, short, [5], 12, 0, slots=31)
    those, columns[:] = sum(columns), []
    together = sample(policy, short + long, [5], 12, 0, slots=31)
    assert together == alone and those < sum(columns) < those + 3 * 12 * 520


def test_spans_cover_every_row():
    r = torch.Generator().manual_seed(0)
    for n in range(1, 40):
        needs = dict(enumerate((10 + 300 * torch.rand(n, generator=r) ** 6).int().tolist()))
        span, long = kv_cache.apart(needs)
        reached = dict.fromkeys(needs, span) | {slot: far for slots, far in long for slot in slots}
        assert all(reached[slot] >= need for slot, need in needs.items())
        assert n * span + 3 * sum(len(slots) * far for slots, far in long) <= n * max(needs.values())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("temperature", [.7, 2.])
def test_log_probs_are_those_that_training_computes(kind, temperature):
    policy = tiny.policy(kind)
    rows, logps = sample(policy, PROMPTS, [5, 17], 12, temperature, n=3, slots=4, logps=True)
    assert rows == sample(policy, PROMPTS, [5, 17], 12, temperature, n=3, slots=4)
    for (_, response), logp, row in zip(rows, logps, rows, strict=True):
        ids, mask = pack([row])
        with torch.no_grad():
            torch.testing.assert_close(logp, token_logps(policy, ids, mask, temperature)[mask], atol=2e-5, rtol=0)
        assert len(logp) == len(response)


def test_there_are_no_log_probs_where_training_would_compute_others():
    low = tiny.policy()
    low.gpt.to(torch.bfloat16)
    for policy, how in ((low, {}), (tiny.policy(), {"top_p": .9}), (tiny.policy(), {"temperature": 0})):
        assert sample(policy, PROMPTS, UNUSED, 3, logps=True, **how)[1] is None


@pytest.mark.parametrize("temperature", [1., 2.])
def test_frequencies_match_the_probabilities_that_learners_will_compute(temperature):
    """20,000 answers of two tokens, chi-square over all 49: each token has its probability and own dice."""
    policy, N = tiny.policy(vocab_size=7), 20_000
    counts = torch.zeros(7, 7)
    for _, (first, second) in sample(policy, [[3, 1]], [7], 2, temperature, n=N, slots=N):
        counts[first, second] += 1
    ids, mask = pack([([3, 1], [first, second]) for first in range(7) for second in range(7)])
    expected = N * token_logps(policy, ids, mask, temperature).sum(1).exp().view(7, 7)
    assert expected.sum().item() == pytest.approx(N, rel=1e-4)
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    assert chi2 < 1.8 * often.sum().item()                      # 49 cells: p < .001
    assert counts[~often].sum() < 3 * expected[~often].sum() + 20


# --- one draw ----------------------------------------------------------------------------------------------

def test_draw_inverts_the_cdf_by_hand():
    """Four tokens of probability 1/4 among three of 0; a token owns [its start, its end)."""
    probs = torch.tensor([0, .25, 0, .25, .25, .25, 0])
    u = torch.tensor([0, .2499, .25, .4999, .5, .7499, .75, .99999994])
    assert draw(probs.expand(8, 7), u).tolist() == [1, 1, 3, 3, 4, 4, 5, 5]


@given(st.integers(0, 10_000), st.integers(2, 3000), st.sampled_from([.3, 1., 3.]))
@settings(max_examples=40, deadline=None)
def test_draw_never_returns_a_token_of_probability_0(seed, V, temperature):
    r = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, V, generator=r) * 5
    logits[:, torch.randperm(V, generator=r)[:V // 2]] = -torch.inf
    u = torch.cat((torch.rand(3, generator=r), torch.tensor([0, 2 ** -24, 1 - 2 ** -24])))
    token = draw((logits / temperature).softmax(-1), u)
    assert logits.gather(1, token[:, None]).isfinite().all()


@pytest.mark.parametrize("top_p, shares", [(1., [.15, .5, .05, .3]), (.81, [.15 / .95, .5 / .95, 0, .3 / .95]),
                                           (.8, [0, .625, 0, .375]), (.5, [0, 1, 0, 0]), (.01, [0, 1, 0, 0])])
def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it(top_p, shares):
    """Each with its share of what they have together; a temperature comes first."""
    logits = torch.tensor([.15, .5, .05, .3]).log()
    u = (torch.arange(2000) + .5) / 2000
    for temperature in (1., 2.):
        narrowed = likely((temperature * logits).expand(2000, 4) / temperature, top_p - 1e-6, 0, 0.)
        drawn = draw(narrowed.softmax(-1), u)
        torch.testing.assert_close(drawn.bincount(minlength=4) / 2000, torch.tensor(shares).float(), atol=1e-3, rtol=0)


def test_top_p_ranks_all_tokens_where_a_few_do_not_reach_it(monkeypatch):
    monkeypatch.setattr(sampler, "CANDIDATES", 5)
    logits = torch.arange(100.)[torch.randperm(100, generator=torch.Generator().manual_seed(0))] / 1000
    narrowed = likely(logits.expand(900, 100), .8, 0, 0.)
    drawn = draw(narrowed.softmax(-1), (torch.arange(900) + .5) / 900)
    fewest = (logits.softmax(-1).sort(descending=True).values.cumsum(-1) < .8).sum() + 1
    assert set(drawn.tolist()) == set(logits.topk(fewest).indices.tolist()) and 70 < fewest < 85


def test_learned_positions_may_be_used_up_and_no_more(monkeypatch):
    """A row that ends at the last position goes on beside others until it is seen to have ended; on a GPU, that is
    several steps."""
    monkeypatch.setitem(CHECK_EVERY, "cpu", 8)
    model = tiny.policy(learned_positions=True, ropes=(), layer_ropes=(-1, -1), max_position_embeddings=16)
    prompts, limits = tiny.texts([15, 3]), [1, 13]
    rows = sample(model, prompts, UNUSED, limits, temperature=0)
    assert [len(response) for _, response in rows] == limits
    assert rows == [row for prompt, limit in zip(prompts, limits)
                    for row in sample(model, [prompt], UNUSED, limit, temperature=0)]
    with pytest.raises(InputError, match="may have 17 tokens, and the model has 16 positions"):
        sample(model, prompts, UNUSED, 2)
