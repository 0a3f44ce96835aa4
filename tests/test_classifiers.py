"""Reward models as others keep them: what --merge writes, held against transformers; and what --reward reads."""
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import toy
from commands import command, refused
from quick import few
from test_farm import farm
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data import InputError, classifiers
from data.adapters import merge
from data.text import Text
from data.weights import load_weights
from rlhf import policy, ppo, reward, rewards, stages
from rlhf.logprobs import pack

torch.set_num_threads(1)
COMMON = {"bos_token_id": None, "eos_token_id": toy.STOPS, "pad_token_id": None}
LLAMA = {**tiny.SHAPE, **COMMON, "max_position_embeddings": 64}
FAMILIES = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": {**LLAMA, "head_dim": 12}, "phi3": LLAMA,
    "olmo2": LLAMA, "smollm3": LLAMA, "gemma": {**LLAMA, "head_dim": 8}, "gemma3_text": {**LLAMA, "head_dim": 8},
    "gpt2": {**COMMON, "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": LLAMA}
ROWS = list(zip(tiny.texts([3, 5, 1, 4]), [[*ids, 0] for ids in tiny.texts([4, 1, 7, 2], seed=9)]))


def base_of(folder, family, dtype=torch.float32, **options):
    """The base of a family, as transformers writes it, with the tokenizer of toy.base()."""
    transformers = pytest.importorskip("transformers")
    toy.base(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / "base" / name).unlink()
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = tiny.randomise(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    model.save_pretrained(folder / "base", **options)
    settings = folder / "base" / "tokenizer_config.json"
    named = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named))
    (folder / "run").mkdir()


def trained(folder, kind, **changes):
    """(settings of a finished reward stage, its model)."""
    cfg = toy.settings(folder, kind, reward.Config, max_prompt_tokens=12, max_new_tokens=8, **changes)
    model = reward.fresh(policy.fresh(cfg, "reward"))
    toy.moved(model.trainable(), 1)
    toy.moved(model.trainable(), 2)                     # of an adapter, A and B have to move
    reward.save(model, cfg)
    return cfg, model


def theirs(folder):
    auto = pytest.importorskip("transformers").AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model, rows, pad=None):
    """Their scores (B,) of rows in one batch, padded with their padding token; ours has a constant more."""
    ids, mask = pack(rows)
    ends = torch.tensor([len(prompt + response) for prompt, response in rows])
    real = torch.arange(ids.shape[1]) < ends[:, None]
    ids[~real] = model.config.pad_token_id if pad is None else pad
    return model(ids, attention_mask=real.long()).logits[:, 0] + model.config.score_bias


# --- written ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family, kind", few([
    *((family, "lora") for family in FAMILIES), ("llama", "full"), ("gpt2", "full"), ("gpt_neox", "full")],
    ("qwen3", "lora"), ("gpt2", "full")))
def test_transformers_scores_as_the_reward_model_does(family, kind, tmp_path):
    base_of(tmp_path, family, max_shard_size="12KB")
    cfg, model = trained(tmp_path, kind)
    said, folder = policy.merge(cfg), cfg.dir() / "merged"
    other, mine = theirs(folder), reward.scores(model, ROWS, cfg)
    assert str(folder) in said and type(other).__name__ == other.config.architectures[0]
    assert other.num_labels == 1 and other.score.weight.shape[0] == 1 and mine.std() > .02
    torch.testing.assert_close(logits(other, ROWS), mine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(other, ROWS[::-1]), mine.flip(0), atol=1e-5, rtol=1e-5)
    assert (logits(other, ROWS, pad=0) - mine).abs().max() > 1e-3       # zeros count, as they are no padding


@pytest.mark.slow
def test_trl_goes_on_from_it(tmp_path):
    """Its loss on pairs before the first step is ours."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base_of(tmp_path, "qwen3")
    cfg, model = trained(tmp_path, "lora")
    policy.merge(cfg)
    rows = [{"prompt": "w9 w20 ", "chosen": "w30 w31 ", "rejected": "w40 "},
            {"prompt": "w11 ", "chosen": "w33 ", "rejected": "w41 w42 w43 "}]
    settings = trl.RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False,
                                gradient_checkpointing=False, disable_tqdm=True)
    trainer = trl.RewardTrainer(str(cfg.dir() / "merged"), settings, train_dataset=datasets.Dataset.from_list(rows))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    loss = trainer.compute_loss(trainer.model.float(), batch).item()
    sides = [([9, 20], [30, 31, 0]), ([11], [33, 0]), ([9, 20], [40, 0]), ([11], [41, 42, 43, 0])]
    good, bad = reward.scores(model, sides, cfg).chunk(2)
    assert loss == pytest.approx(reward.bradley_terry(good, bad).mean().item(), abs=1e-5)


def test_the_tokenizer_pads_with_the_token_that_the_model_skips(tmp_path):
    transformers = pytest.importorskip("transformers")
    base_of(tmp_path, "llama")
    cfg, _ = trained(tmp_path, "full")
    policy.merge(cfg)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.dir() / "merged")
    assert tokenizer.pad_token_id == theirs(cfg.dir() / "merged").config.pad_token_id == 60
    assert tokenizer(["w9 w8", "w7"], padding=True)["input_ids"] == [[9, 8], [7, 60]]


@pytest.mark.parametrize("own, special, stops, token", [
    ("pad", ["pad", "end"], ["end"], "pad"), ("end", ["pad", "end"], ["end"], "pad"),
    (None, ["end", "a", "b"], ["end", "b"], "a"), (None, ["end"], ["end"], "z"), ("gone", [], ["z"], "y"),
    ("end", ["end"], ["end", "z"], "y")])
def test_rows_are_padded_with_what_no_answer_ends_in(own, special, stops, token):
    words = {word: i for i, word in enumerate([*(word for word in special), *"xyz"])}
    tokenizer = Tokenizer(models.WordLevel(words | {"end": words.get("end", 9)}, unk_token="x"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    text = SimpleNamespace(tokenizer=tokenizer, specials={"pad_token": own} if own else {}, vocab=len(words),
                           stops=[words[stop] for stop in stops])
    assert classifiers.padding(text) == (token, words[token])


@pytest.mark.parametrize("family, files, names", [
    ("llama", ["model.norm.weight", "lm_head.weight"], {"model.norm.weight": "model.norm.weight"}),
    ("gpt2", ["wte.weight", "h.0.attn.bias"], {"transformer.wte.weight": "wte.weight",
                                               "transformer.h.0.attn.bias": "h.0.attn.bias"}),
    ("gpt_neox", ["gpt_neox.embed_in.weight", "embed_out.weight"],
     {"gpt_neox.embed_in.weight": "gpt_neox.embed_in.weight"})])
def test_names_have_their_first_part_and_the_language_model_s_head_is_left_out(family, files, names):
    assert classifiers.decoder_names(files, {"model_type": family}) == names


def test_rounding_is_said_and_float32_loses_nothing(tmp_path):
    base_of(tmp_path, "llama", torch.bfloat16, max_shard_size="12KB")
    cfg, model = trained(tmp_path, "lora")
    with torch.no_grad():
        for name, p in model.gpt.adapter("reward").items():
            p *= 1e-3 if name.endswith("lora_B") else 1
    reward.save(model, cfg)
    mine, folder = reward.scores(model, ROWS, cfg), cfg.dir() / "merged"
    said = policy.merge(cfg)
    assert "--merge_dtype float32" in said and all(len(line) < 80 + len(str(folder)) for line in said.splitlines())
    assert {str(w.dtype) for name, w in load_weights(folder).items() if name != "score.weight"} == {"torch.bfloat16"}
    cfg.merge_dtype = "float32"
    said = policy.merge(cfg)
    assert "rounding lost 0.0%" in said and "--merge_dtype" not in said
    tensors = load_weights(folder)
    assert {str(w.dtype) for w in tensors.values()} == {"torch.float32"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in tensors.values())
    other = theirs(folder)
    assert other.dtype == torch.float32
    torch.testing.assert_close(logits(other, ROWS), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("updates, lost", [
    ((1e-3,), 1.), ((1.,), 0.), ((1., 1e-3), 1e-3), ((1e-3, 1e-3), 1.), ((2 ** -7,), 0.), ((1.5 * 2 ** -7,), 1 / 3)])
def test_the_share_that_rounding_loses_by_hand(updates, lost, tmp_path):
    """bf16 next to 1 has steps of 2^-7: less than half a step is lost, and of one and a half steps two arrive."""
    from data.adapters import save_adapter
    from data.weights import save_pretrained
    ones = {f"{i}.m.weight": torch.ones(4, 4, dtype=torch.bfloat16) for i in range(len(updates))}
    save_pretrained(tmp_path / "base", ones, {}, tmp_path)
    lora = {f"{i}.m.lora_A": torch.ones(1, 4) for i in range(len(updates))}
    lora |= {f"{i}.m.lora_B": torch.full((4, 1), value) for i, value in enumerate(updates)}
    save_adapter(tmp_path / "adapter", lora, 1, 1, ["m"], "base")
    assert merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "base") == pytest.approx(lost, rel=1e-3)
    whole = merge(tmp_path / "whole", tmp_path / "adapter", tmp_path / "base", torch.float32)
    assert whole < 1e-4 and math.isclose(load_weights(tmp_path / "whole")["0.m.weight"][0, 0], 1 + updates[0],
                                         rel_tol=1e-6)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["torch_dtype"] == "float32"


# --- the command -----------------------------------------------------------------------------------------

SMALL = ("--limit", "16", "--max_new_tokens", "8")


@pytest.mark.parametrize("argv, said", [
    ("--method best_of_n --lora_rank 4 --merge", "--merge would change nothing: this method trains nothing"),
    ("--method dpo --lora_rank 4 --merge_dtype float32", "--merge_dtype would change nothing: without --merge"),
    ("--method sft --merge", "--merge would change nothing: there are no adapters"),
    ("--method sft --lora_rank 4 --merge --merge_dtype float8", "--merge_dtype 'float8' is not known")])
def test_a_merge_that_makes_no_sense_is_refused_before_anything_is_trained(argv, said, tmp_path):
    refused(farm(*argv.split(), "--out", tmp_path / "run"), 2, said)
    assert not (tmp_path / "run").exists()


def test_the_command_merges_a_reward_model_of_which_all_weights_were_trained(tmp_path):
    result = farm("--method", "reward", *SMALL, "--scale_answers", "8", "--judge", "barn", "--merge", "--out", tmp_path)
    assert result.code == 0 and f"the reward model: {tmp_path / 'reward' / 'merged'}" in result.out, result.err
    assert theirs(tmp_path / "reward" / "merged").config.model_type == "llama"


# --- read ------------------------------------------------------------------------------------------------

TURNS = ("{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }}{{ ' <end> nl ' }}"
         "{% endfor %}{{ '<a> ' if add_generation_prompt }}")


def other_model(folder, labels=1, length=64, template=TURNS):
    """A Qwen3 classifier as transformers writes it, with more words than the policy has, in another order."""
    transformers = pytest.importorskip("transformers")
    words = {word: i for i, word in enumerate(["<u>", "<a>", "<end>", "nl", "<pad>", "<unk>", "<eos>"])}
    words |= {f"w{i}": 100 - i for i in range(90)}
    shape = {**tiny.SHAPE, "vocab_size": 101, "head_dim": 12, "max_position_embeddings": length}
    config = transformers.AutoConfig.for_model("qwen3", **shape, num_labels=labels, bos_token_id=None, eos_token_id=6,
                                               pad_token_id=4)
    model = tiny.randomise(transformers.AutoModelForSequenceClassification.from_config(config), 3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": template,
                "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy.run_folder(tmp_path_factory.mktemp("ready_made"), "full")


def rows_of(cfg):
    """(rows, records, the answers as texts); one answer was cut off."""
    records, text = cfg.splits()["unlabeled"][:6], toy.text(cfg)
    answers = [[30 + i, *range(40, 40 + i), 0] for i in range(6)]
    answers[2] = answers[2][:-1]
    rows = [(text.prompt(record), answer) for record, answer in zip(records, answers)]
    return rows, records, [toy.sentence([i for i in answer if i]) for answer in answers]


def scored(run, name, **changes):
    cfg = toy.settings(run, "full", ppo.Config, reward=str(name), **changes)
    return rewards.scorer(cfg, toy.text(cfg), policy.load(cfg, "sft"))(rows_of(cfg)[0])


@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_model_of_another_family_scores_as_in_transformers(run, tokens, tmp_path):
    folder = other_model(tmp_path)
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    cfg = toy.settings(run, "full", ppo.Config)
    _, records, answers = rows_of(cfg)
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": record["instruction"]},
                                            {"role": "assistant", "content": answer}], tokenize=False)
             for record, answer in zip(records, answers)]
    with torch.no_grad():
        wanted = theirs(folder)(**tokenizer(chats, padding=True, return_tensors="pt", return_token_type_ids=False))
    torch.testing.assert_close(scored(run, folder, micro_batch_tokens=tokens), wanted.logits[:, 0], atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize("kind", toy.KINDS)
def test_a_model_that_was_trained_here_scores_as_in_its_own_run(kind, tmp_path):
    """As the stage that it was, and as the folder that --merge has made of it."""
    run = toy.run_folder(tmp_path, kind)
    cfg = toy.settings(run, kind, reward.Config)
    policy.merge(cfg)
    own = toy.settings(run, kind, ppo.Config)
    wanted = rewards.scorer(own, toy.text(own), policy.load(own, "sft"))(rows_of(own)[0])
    for name in ("checkpoint", "merged"):
        torch.testing.assert_close(scored(run, cfg.dir() / name), wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std() > .01


def test_what_is_too_long_loses_its_middle_and_that_is_said_once(run, tmp_path, capsys):
    folder, cfg = other_model(tmp_path, length=8), toy.settings(run, "full", ppo.Config)
    rows, _, _ = rows_of(cfg)
    score = rewards.scorer(toy.settings(run, "full", ppo.Config, reward=str(folder)), toy.text(cfg),
                           policy.load(cfg, "sft"))
    assert score(rows).isfinite().all() and torch.equal(score(rows), score(rows))
    assert capsys.readouterr().out.count("too long for the reward model: it reads 8 tokens") == 1
    assert rewards.without_middle(list(range(9)), 5) == [0, 1, 6, 7, 8]
    assert rewards.without_middle(list(range(5)), 5) == [0, 1, 2, 3, 4]


def broken(folder, what):
    if what == "two labels":
        return other_model(folder, labels=2)
    if what == "template":
        return other_model(folder, template="{{ messages[")
    if what == "policy":
        toy.base(folder)
        return folder / "base"
    folder = other_model(folder)
    if what == "family":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    elif what == "head":
        (folder / "model.safetensors").unlink()
    elif what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("what, said", [
    ("two labels", r"no reward model, which gives one score: its score.weight is \[2, 32\]"),
    ("policy", "is no reward model: its config.json names no ...ForSequenceClassification"),
    ("family", "model_type 'bert' is not supported"), ("head", "there is no model.safetensors"),
    ("tokenizer", "no tokenizer.json"), ("template", "the chat template fails")])
def test_what_cannot_score_is_said_before_anything_is_trained(what, said, tmp_path):
    folder = broken(tmp_path / "model", what)
    refused(farm("--method", "best_of_n", "--reward", folder, *SMALL, "--out", tmp_path / "run"), 2, said)
    assert not (tmp_path / "run" / "sft").exists()


def test_a_name_that_is_nothing_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = farm("--method", "ppo", "--reward", "org/no-such-model", "--out", tmp_path / "run")
    refused(result, 1, "there is no folder org/no-such-model, and as a name on the hub")
    assert not ppo.Config(reward="rule").ready_made and ppo.Config(reward=str(tmp_path)).ready_made
    with pytest.raises(InputError, match="ORG/NAME"):
        ppo.Config(reward="rules")


@pytest.mark.slow
def test_the_command_trains_no_reward_model_where_there_is_one(tmp_path):
    """And other weights under the same name make another stage."""
    folder = other_model(tmp_path / "model")
    argv = ("--method", "best_of_n", "--n", "2", "--reward", folder, *SMALL, "--out", tmp_path / "run")
    result = farm(*argv)
    assert result.code == 0 and not result.err, result.err
    made = json.loads((tmp_path / "run" / "best_of_n" / "config.json").read_text())
    assert made["needs"].keys() == {"sft"} and not (tmp_path / "run" / "reward").exists()
    assert "best_of_n: reused" in farm(*argv).out
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    refused(farm(*argv), 2, "the content of --reward has changed")


def test_a_reward_model_answers_nobody(tmp_path):
    refused(command("serve.py", other_model(tmp_path), "--port", "0"), 2, "is a reward model, which scores texts")


def test_the_weights_of_a_served_judge_make_a_stage(tmp_path):
    from rlhf import pairs
    judge = other_model(tmp_path / "judge")
    found = []
    for change in (b"", b"x"):
        with open(judge / "model.safetensors", "ab") as file:
            file.write(change)
        cfg = pairs.Config(judge=f"serve:{judge}")
        cfg.stage = "pairs"
        found.append(stages.Stage(pairs, cfg, {}, {}, ""))
    assert found[0].contents["judge"] != found[1].contents["judge"] and found[0].id != found[1].id
    assert "judge" not in pairs.Config(judge="barn").reads()
    assert "judge" not in ppo.Config(judge=f"serve:{judge}").reads()        # the reward model is asked, not the judge
    assert ppo.Config(judge=f"serve:{judge}", reward="judge").reads()["judge"] == judge


def test_prompts_of_our_own_form_need_no_chat_template(tmp_path):
    assert Text(other_model(tmp_path, template="")).template in ("", None)
