"""rlhf/logprobs.py: response_mask(rows, T), which tokens of a row the policy wrote."""
import torch

from rlhf import logprobs

ROWS = [([5, 6, 7], [8, 9]), ([3], [4]), ([2, 2], [1, 1, 1])]      # prompts and responses as token ids
T = 6


def padded(row):
    prompt, response = row
    return prompt + response + [0] * (T - len(prompt) - len(response))


def mask_of(rows, width=T):
    return logprobs.response_mask(rows, width)


def test_shape_and_type():
    mask = mask_of(ROWS)
    assert mask.shape == (3, T - 1), "there is one column less than tokens: the first token is predicted by nothing"
    assert mask.dtype == torch.bool, "the mask holds True and False"


def test_it_marks_exactly_the_tokens_of_the_response():
    for (_, response), row, mask in zip(ROWS, map(padded, ROWS), mask_of(ROWS)):
        marked = [token for token, on in zip(row[1:], mask.tolist()) if on]
        assert len(marked) == len(response), "as many places are marked as the response has tokens, its last one too"
        assert marked == response, "index t of the mask speaks of token t + 1, the one that position t predicts"


def test_what_the_tokens_are_does_not_matter():
    others = [([0] * len(prompt), [0] * len(response)) for prompt, response in ROWS]
    assert torch.equal(mask_of(others), mask_of(ROWS)), "padding is told by lengths, not by the id 0: EOS may be 0"


def test_padding_changes_nothing():
    wide = mask_of(ROWS, T + 3)
    assert torch.equal(wide[:, :T - 1], mask_of(ROWS)), "three more columns of padding move no mark"
    assert not wide[:, T - 1:].any(), "padding is never marked"


def test_a_longer_prompt_moves_the_marks():
    (prompt, response), *_ = ROWS
    before, after = mask_of([(prompt, response)]), mask_of([([1, *prompt], response)])
    assert torch.equal(after[:, 1:], before[:, :-1]), "with one more token in the prompt all marks move by one"


def test_rows_do_not_depend_on_each_other():
    alone = torch.cat([mask_of([row]) for row in ROWS])
    assert torch.equal(alone, mask_of(ROWS)), "a row has the same mask alone and in a batch"
