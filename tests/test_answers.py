"""What stages sample: the pairs, and the answers that are judged."""
import json

import pytest
import tiny
import torch
import toy

from data import InputError
from rlhf import answers, pairs, policy, sampler, sft, update

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return toy.run_folders(tmp_path_factory)


def test_no_answer_is_in_two_pairs(folders, monkeypatch):
    """Six answers to a prompt make three pairs, each answer in one of them, all to the prompt that was asked."""
    def numbered(model, prompts, text, cfg, seed, n, logps, kept):
        return [(prompt, [10 + 6 * i % 42 + j]) for i, prompt in enumerate(prompts) for j in range(n)], None
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


def test_fewer_pairs_are_a_random_part_of_more(folders):
    def some(most, seed=0):
        return pairs.sample_pairs(toy.settings(folders["full"], "full", pairs.Config, judge="barn", max_pairs=most,
                                               pairs_per_prompt=3, seed=seed))
    every = some(0)
    few, more = some(5), some(9)
    assert (len(few), len(more)) == (5, 9) and some(10 ** 6) == every
    assert [pair for pair in more if pair in few] == few and [pair for pair in every if pair in more] == more
    places = [every.index(pair) for pair in more]
    assert places != list(range(9)) and places != [every.index(pair) for pair in pairs.drawn(every, 9, 1)]


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
    rows, _ = sampled[0]
    assert (len(sampled) == 1) == (asked == {"eval_temperature": 1.5})
    for prompt, response in sampled[-1][0]:
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


# ---- what is cut or dropped is counted -----------------------------------------------------------------

def test_a_question_that_is_too_long_keeps_both_ends_and_is_counted(tmp_path, capsys):
    toy.base(tmp_path)
    ids = [10 + i % 40 for i in range(2100)]
    long = toy.sentence(ids)
    records = [{"instruction": said, "output": "w1"} for said in (long, "w1 w2", "w3")]
    (tmp_path / "eval.json").write_text(json.dumps(records))
    cfg = toy.settings(tmp_path, "full", sft.Config, data="barn", eval_data=str(tmp_path / "eval.json"))
    model, text = policy.fresh(cfg, "sft"), toy.text(cfg)
    room = model.gpt.config.max_position_embeddings - cfg.max_new_tokens
    for _ in range(2):
        asked, prompts = answers.questions(model, text, cfg)
        assert [record["instruction"] for record in asked] == [long, "w1 w2", "w3"]     # the judge sees all of it
        assert prompts[1:] == [[1, 2], [3]] and room - 3 <= len(prompts[0]) <= room
        assert prompts[0][:999] == ids[:999] and prompts[0][-999:] == ids[-999:]
    assert capsys.readouterr().out == f"1 of 3 prompts are longer than {room} tokens: cut in the middle\n"
    answers.show_sample(0, model, text, cfg, records, update.Log(cfg, 1, ()))     # fits, too
    cfg.max_new_tokens = model.gpt.config.max_position_embeddings
    with pytest.raises(InputError, match="leave no room for a prompt in .* tokens: lower --max_new_tokens$"):
        answers.questions(model, text, cfg)


def test_demonstrations_that_teach_nothing_or_have_no_end_are_counted(tmp_path, capsys, monkeypatch):
    toy.base(tmp_path)
    said = ["w9", "", "w9 " * 5, "w9 " * 6, "w9 " * 7, " "]                  # with EOS: 2, -, 6, 7, 8 tokens
    splits = {"sft": [{"instruction": "w1", "input": "", "output": each} for each in said], "val": []}
    cfg = toy.settings(tmp_path, "full", sft.Config)
    rows = []
    monkeypatch.setattr(sft.Config, "splits", lambda self: splits)
    monkeypatch.setattr(sft, "train", lambda model, given, *args: rows.extend(given) or {})
    monkeypatch.setattr(sft, "answer", lambda *args: {})
    sft.run(cfg)
    assert [len(response) for _, response in rows] == [2, 6, 6, 6]
    shown = capsys.readouterr().out
    assert "2 of 6 demonstrations are empty and left out" in shown
    assert "2 of 4 demonstrations are cut off at 6 tokens and have no end" in shown


def test_pairs_that_teach_nothing_are_counted(tmp_path, capsys):
    toy.base(tmp_path)
    made = [{"instruction": "w1", "output_1": one, "output_2": two, "preference": 1, "logp_1": -1., "logp_2": -2.}
            for one, two in (("w30", "w31"), ("w30", "w30"), ("w30 w9 w9 w9 w9 w9", "w30 w9 w9 w9 w9 w9 w31"))]
    (tmp_path / "pairs.json").write_text(json.dumps(made))
    cfg = toy.settings(tmp_path, "full", pairs.Config, labels=str(tmp_path / "pairs.json"))
    pair, = pairs.released(cfg)
    assert not {"logp_1", "logp_2"} & pair.keys()                   # they are another model's
    shown = capsys.readouterr().out
    for line in ("1 of 3 pairs are ties or have two equal answers, and are left out",
                 "2 of 4 answers are cut off at 6 tokens and have no end", "1 of 2 pairs have two equal answers"):
        assert line in shown


THOUGHTS = "{{ messages[0].content }}{% if add_generation_prompt %} <think> {% endif %}"


def test_a_thought_has_room_of_its_own_and_is_not_judged(tmp_path, monkeypatch, capsys):
    toy.base(tmp_path, THOUGHTS)
    cfg = toy.settings(tmp_path, "full", sft.Config, max_thought_tokens=9)
    model, text = policy.fresh(cfg, "sft"), toy.text(cfg)
    assert text.thinks and len(answers.generate(model, [[1]], text, cfg, 0)[0][1]) <= 15
    limits = []
    monkeypatch.setattr(sampler, "sample", lambda model, prompts, stops, limit, *rest, **more: limits.append(limit))
    answers.generate(model, [[1]], text, cfg, 0)
    assert limits == [15]
    monkeypatch.setattr(cfg, "splits", lambda: {"eval": [{"instruction": "w1"}] * 3}, raising=False)
    monkeypatch.setattr(answers, "generate", lambda *args, **kwargs: ([([1], [9, 8])] * 3, None))
    answers.answer(model, text, cfg)
    assert "sft: 3 of 3 answers are empty: thoughts that did not end, perhaps" in capsys.readouterr().out
