"""What stages sample: the pairs, and the answers that are judged."""
import json

import pytest
import tiny
import torch
import toy

from rlhf import answers, pairs, policy

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: toy.run_folder(tmp_path_factory.mktemp(kind), kind) for kind in toy.KINDS}


def test_no_answer_is_in_two_pairs(folders, monkeypatch):
    """Six answers to a prompt make three pairs, each answer in one of them, all to the prompt that was asked."""
    def numbered(model, prompts, text, cfg, seed, n):
        return [(prompt, [10 + 6 * i % 42 + j]) for i, prompt in enumerate(prompts) for j in range(n)]
    monkeypatch.setattr(pairs, "generate", numbered)
    cfg = toy.settings(folders["full"], "full", pairs.Config, pairs_per_prompt=3, judge="barn")
    made, text = pairs.sample_pairs(cfg), toy.text(cfg)
    records = text.fitting(cfg.splits()["preference"], cfg.max_prompt_tokens)
    assert len(made) == 3 * len(records)
    for i, record in enumerate(records):
        mine, first = made[3 * i:3 * i + 3], 10 + 6 * i % 42
        assert {pair["instruction"] for pair in mine} == {record["instruction"]}
        assert [pair["ids_1"] + pair["ids_2"] for pair in mine] == [[first + j, first + j + 1] for j in (0, 2, 4)]
        assert len({pair["seed"] for pair in mine}) == 3        # each is judged by a draw of its own


@pytest.mark.parametrize("asked", [{"eval_temperature": 1.5}, {"eval_temperature": 0.}, {"eval_top_p": .5}])
@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_kl_is_of_the_policy_s_own_answers_and_has_its_sign(kind, asked, folders, monkeypatch):
    """The mean over answers of log pi - log ref, each as the textbook writes it; here far above 0. Judged answers are
    samples of the policy only if they are drawn as those that it learns from; else there are others for the KL."""
    sampled, real = [], answers.generate
    monkeypatch.setattr(answers, "generate", lambda *args, **kind: sampled.append(real(*args, **kind)) or sampled[-1])
    cfg = toy.settings(folders[kind], kind, pairs.Config, judge="barn", temperature=1.5, **asked)
    ref = policy.load(cfg, "sft")
    model = ref.copy("policy")
    toy.moved(model.trainable(), 3)
    metrics = answers.answer(model, toy.text(cfg), cfg, ref)
    kl = []
    rows = sampled[0]
    assert (len(sampled) == 1) == (asked == {"eval_temperature": 1.5})
    for prompt, response in sampled[-1]:
        ids = torch.tensor([prompt + response])
        mask = torch.arange(len(ids[0]) - 1) >= len(prompt) - 1
        with torch.no_grad():
            logp, ref_logp = (tiny.plain_logps(role, ids, mask, 1.5).sum().item() for role in (model, ref))
        kl.append(logp - ref_logp)
    assert metrics["objective/kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4) and sum(kl) / len(kl) > .5
    assert metrics["eval/mean_length"] == sum(len(response) for _, response in rows) / len(rows)
    assert metrics["eval/finished"] == sum(response[-1] in toy.STOPS for _, response in rows) / len(rows)
    written = json.loads((cfg.dir() / "outputs.json").read_text())
    assert [record["output"] for record in written] == [toy.text(cfg).decode(response) for _, response in rows]
