"""From open weights to open weights: any family through farm.py, adapters in and out, a look at what is written."""
import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import toy
from commands import command, refused
from quick import few

from data import InputError, hub, sets
from data.adapters import load_adapter
from data.text import Text
from data.weights import load_weights
from rlhf import ask, pairs, policy, sft
from rlhf.config import BASE, resolve
from rlhf.sampler import sample

torch.set_num_threads(1)
CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
needs_checkpoints = pytest.mark.skipif(not CHECKPOINTS.exists(), reason="needs the checkpoints in ../shared")
SIZE = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": toy.STOPS, "pad_token_id": None}
FAMILIES = {                                            # one that is fused and transposed, one that is neither
    "gpt2": {**SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {**tiny.SHAPE, **SIZE, "head_dim": 12, "max_position_embeddings": 64},
}
TRAIN = ("--data", "{}/data.json", "--max_prompt_tokens", 12, "--max_new_tokens", 8, "--device", "cpu",
         "--judge", "none", "--method", "sft", "--epochs", 1, "--lr", .05)


@pytest.fixture(params=few(FAMILIES, "qwen3"))
def world(request, tmp_path):
    """A folder with data and the base of a family, in bf16, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    toy.base(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "base" / name).unlink()
    config = transformers.AutoConfig.for_model(request.param, **FAMILIES[request.param])
    model = tiny.randomise(transformers.AutoModelForCausalLM.from_config(config)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    records = [{"instruction": toy.sentence(ids), "output": toy.sentence([30, 31, 32])}
               for ids in tiny.texts([1 + i % 7 for i in range(220)])]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def train(world, out, *flags):
    alpha = () if flags[:2] == ("--lora_rank", 0) else ("--lora_alpha", 8)
    flags = (*TRAIN, *alpha, "--out", world / out, *flags)
    return command("farm.py", *(str(flag).replace("{}", str(world)) for flag in flags))


def theirs(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    if isinstance(model, policy.Policy):
        with model.gpt.using(model.role):
            return model.gpt(ids)
    return model(ids).logits


def digests(folder):
    return {name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in load_weights(folder).items()}


def test_a_run_ends_in_an_adapter_that_peft_loads_and_a_checkpoint_that_transformers_loads(world):
    peft, ids = pytest.importorskip("peft"), tiny.ids(2, 9)
    base, merged = world / "base", world / "run" / "sft" / "merged"
    result = train(world, "run", "--lora_rank", 4, "--merge", "--model", base)
    assert result.code == 0 and f"merged into its base: {merged}" in result.out and "nobody has judged" in result.out
    ours, cfg, settings = policy.open_checkpoint(world / "run" / "sft")
    worn = peft.PeftModel.from_pretrained(theirs(base), world / "run" / "sft" / "checkpoint")
    torch.testing.assert_close(logits(ours, ids), logits(worn, ids), atol=2e-5, rtol=2e-5)
    assert (logits(ours, ids) - logits(theirs(base), ids)).abs().max() > .1
    whole, mine = worn.merge_and_unload().state_dict(), theirs(merged).state_dict()
    for name, w in mine.items():                        # rounded once; the last bit of a sum may decide how
        torch.testing.assert_close(w, whole[name], atol=1e-4, rtol=2 ** -8)
        assert (w != whole[name].bfloat16()).float().mean() < .01, name

    before, after, adapter = digests(base), digests(merged), load_adapter(world / "run" / "sft" / "checkpoint")[0]
    touched = {name.rpartition(".")[0] + ".weight" for name in adapter}
    assert before.keys() == after.keys() and {name for name in before if before[name] != after[name]} == touched
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()

    again = train(world, "run", "--lora_rank", 4, "--model", base)          # a finished stage, and what is asked later
    shutil.rmtree(merged)
    assert again.code == 0 and train(world, "run", "--lora_rank", 4, "--merge", "--model", base).code == 0
    assert digests(merged) == after


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_is_a_start(world, rank):
    """Training goes on from what it answers: as an adapter of the same base, or merged into all weights."""
    ids, adapter = tiny.ids(2, 9), world / "run" / "sft" / "checkpoint"
    assert train(world, "run", "--lora_rank", 4, "--model", world / "base").code == 0
    trained, _, _ = policy.open_checkpoint(adapter)
    cfg = sft.Config(model=str(adapter), lora_rank=rank, lora_alpha=8., max_prompt_tokens=12, max_new_tokens=8)
    start = policy.fresh(cfg, "sft")
    torch.testing.assert_close(logits(start, ids), logits(trained, ids), atol=2e-5, rtol=2e-5)
    assert bool(start.role) == bool(rank) and cfg.checkpoint == world / "base"
    assert start.trainable()
    assert train(world, "on", "--lora_rank", rank, "--model", adapter).code == 0
    on, cfg, _ = policy.open_checkpoint(world / "on" / "sft")
    assert (logits(on, ids) - logits(trained, ids)).abs().max() > .05
    if rank:
        assert load_adapter(world / "on" / "sft" / "checkpoint")[1]["base_model_name_or_path"] == str(world / "base")
        refused(train(world, "other", "--lora_rank", 2, "--model", adapter), 2, "--lora_rank 4 --lora_alpha 8")
    else:
        torch.testing.assert_close(logits(on, ids), logits(theirs(world / "on" / "sft" / "checkpoint"), ids),
                                   atol=2e-5, rtol=2e-5)


def test_an_adapter_of_any_scale_can_be_continued(world):
    """Of rank-stabilised LoRA alpha is no round number; what the refusal proposes has to work."""
    assert train(world, "run", "--lora_rank", 4, "--model", world / "base").code == 0
    adapter = world / "run" / "sft" / "checkpoint"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True, "lora_alpha": 7}))
    result = train(world, "on", "--lora_rank", 4, "--model", adapter, "--limit", 16)
    refused(result, 2, "--lora_rank 4 --lora_alpha 14$")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4, "use_rslora": True, "lora_alpha": 7.1}))
    advice = train(world, "anew", "--lora_rank", 4, "--model", adapter, "--limit", 16).err.split()[-4:]
    assert train(world, "anew", "--model", adapter, "--limit", 16, *advice).code == 0


def test_a_start_that_covers_a_few_layers_is_completed_by_fresh_ones(world):
    peft, ids = pytest.importorskip("peft"), tiny.ids(2, 9)
    model = theirs(world / "base")
    target = "c_attn" if model.config.model_type == "gpt2" else "v_proj"
    worn = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target],
                                                      fan_in_fan_out=target == "c_attn"))
    for name, p in worn.named_parameters():
        p.data += .1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * ("lora" in name)
    worn.peft_config["default"].base_model_name_or_path = str(world / "base")
    worn.save_pretrained(world / "few")
    cfg = sft.Config(model=str(world / "few"), lora_rank=4, lora_alpha=8., max_prompt_tokens=12, max_new_tokens=8)
    start = policy.fresh(cfg, "sft")
    torch.testing.assert_close(logits(start, ids), logits(worn, ids), atol=2e-5, rtol=2e-5)
    assert len(start.trainable()) == 2 * len(start.gpt.linears())


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_in_fp16_every_learner_scales_its_loss(world, method):
    labels = [{"instruction": toy.sentence(prompt), "output_1": toy.sentence(one), "output_2": toy.sentence(two),
               "preference": 1 + i % 2} for i, (prompt, one, two) in enumerate(zip(
                   tiny.texts([1, 4, 2, 3] * 4), tiny.texts([2, 5] * 8, 50), tiny.texts([4, 1] * 8, 90)))]
    (world / "labels.json").write_text(json.dumps(labels))
    small = {"dpo": (), "ppo": ("--steps", 2, "--rollout_batch", 8, "--batch_size", 4, "--val_prompts", 4,
                                "--reward.scale_answers", 8)}
    result = command("farm.py", "--method", method, "--model", world / "base", "--data", world / "data.json", "--limit",
                     16, "--max_prompt_tokens", 12, "--max_new_tokens", 8, "--device", "cpu", "--judge", "none",
                     "--lora_rank", 4, "--dtype", "float16", "--pairs.labels", world / "labels.json", "--out",
                     world / "half", *small[method])
    assert result.code == 0, result.err
    for stage in {"dpo": ("sft", "dpo"), "ppo": ("sft", "reward", "ppo")}[method]:
        first, *_ = (world / "half" / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(first)["loss_scale"] > 0


def test_texts_longer_than_the_model_knows_are_refused(world):
    result = train(world, "run", "--lora_rank", 4, "--model", world / "base", "--max_prompt_tokens", 60)
    refused(result, 2, "knows 64 positions, but a prompt and its answer may take 68: lower --max_prompt_tokens")


def test_a_name_that_is_no_folder_is_looked_up_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "checkpoint", lambda name: {"org/name@v1": tmp_path}[name])
    assert resolve.__wrapped__("org/name@v1") == tmp_path and resolve.__wrapped__("barn") == BASE
    assert resolve.__wrapped__(str(tmp_path)) == tmp_path
    for error in InputError, hub.HubError:
        def nothing(name, error=error):
            raise error("no such repository")
        monkeypatch.setattr(hub, "checkpoint", nothing)
        with pytest.raises(error, match="no folder org/name, and as a name on the hub: no such repository"):
            resolve.__wrapped__("org/name")
        for path in (str(tmp_path / "none"), "./none", "../none", "a/b/c", "-x"):
            with pytest.raises(InputError, match=f"there is no folder {path}$"):
                resolve.__wrapped__(path)


def test_an_adapter_s_own_tokenizer_goes_where_the_adapter_goes(world):
    """As TRL saves it: with the chat template that it was trained on."""
    assert train(world, "run", "--lora_rank", 4, "--model", world / "base").code == 0
    own = world / "own"
    shutil.copytree(world / "run" / "sft" / "checkpoint", own)
    shutil.copy(world / "base" / "tokenizer.json", own)
    template = {"eos_token": "w0", "chat_template": "w7 {{ messages[0].content }} w8"}
    (own / "tokenizer_config.json").write_text(json.dumps(template))
    assert train(world, "on", "--lora_rank", 4, "--merge", "--model", own, "--limit", 16).code == 0
    assert train(world, "full", "--lora_rank", 0, "--model", own, "--limit", 16).code == 0
    for folder in (own, world / "on" / "sft", world / "on" / "sft" / "merged", world / "full" / "sft"):
        _, cfg, _ = policy.open_checkpoint(folder)
        text = cfg.text()
        assert text.prompt({"instruction": "w1"}) == [7, 1, 8] and text.stops == toy.STOPS
    assert policy.open_checkpoint(world / "run" / "sft")[1].text().prompt({"instruction": "w1"}) == [1]


def test_a_stage_of_a_run_is_a_model_and_a_run_is_found_from_anywhere(world, monkeypatch):
    monkeypatch.chdir(world)
    assert train(world, "run", "--lora_rank", 4, "--model", "base", "--limit", 16).code == 0
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    resolve.cache_clear()
    trained = policy.open_checkpoint(world / "run" / "sft")[0]
    for path in ("run/sft", "run/sft/checkpoint"):
        start = policy.fresh(sft.Config(model=f"../{path}", lora_rank=4, lora_alpha=8., max_prompt_tokens=12,
                                        max_new_tokens=8), "sft")
        assert torch.equal(logits(start, tiny.ids(2, 9)), logits(trained, tiny.ids(2, 9)))
    with pytest.raises(InputError, match="run is a whole run: choose a stage, as in ../run/sft"):
        resolve("../run")
    (world / "base").rename(world / "gone")
    resolve.cache_clear()
    with pytest.raises(InputError, match="adapts .*: there is no folder .*base_model_name_or_path in .*_config.json"):
        policy.open_checkpoint(world / "run" / "sft")
    resolve.cache_clear()


def test_who_judges_binds_only_those_who_ask(world):
    """Answers that nobody has judged may be judged later, by the same command with a judge."""
    assert train(world, "run", "--lora_rank", 4, "--model", world / "base", "--limit", 16).code == 0
    result = train(world, "run", "--lora_rank", 4, "--model", world / "base", "--limit", 16, "--judge", "barn")
    assert result.code == 0 and "sft: reused (" in result.out and "win rate" in result.out


def test_a_model_from_the_hub_stays_the_commit_that_was_trained_on(world, monkeypatch):
    """The adapter names its base as PEFT does, with the revision; a run does not go on with another one."""
    commits = [str(i) * 40 for i in (1, 2)]
    for commit in commits:
        shutil.copytree(world / "base", world / "snapshots" / commit)
    asked, heads = [], list(commits)

    def checkpoint(name):
        asked.append(name)
        return world / "snapshots" / (name.partition("@")[2] or heads[0])
    monkeypatch.setattr(hub, "checkpoint", checkpoint)
    resolve.cache_clear()
    assert train(world, "run", "--lora_rank", 4, "--model", "org/name").code == 0
    adapter = load_adapter(world / "run" / "sft" / "checkpoint")[1]
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/name", commits[0])
    assert json.loads((world / "run" / "sft" / "config.json").read_text())["revision"] == commits[0]
    assert asked == ["org/name"]
    heads.pop(0)
    resolve.cache_clear()
    cfg = policy.open_checkpoint(world / "run" / "sft")[1]
    assert cfg.checkpoint.name == commits[0] and asked[-1] == f"org/name@{commits[0]}"
    refused(train(world, "run", "--lora_rank", 4, "--model", "org/name"), 2, f"revision is '{commits[0]}' there")
    resolve.cache_clear()


# --- python serve.py --ask ---------------------------------------------------------------------------------------

@needs_checkpoints
def test_stories_gives_its_known_answer():
    result = command("serve.py", CHECKPOINTS / "stories260K", "--ask", "Once upon a time", "--temperature", 0,
                     "--max_new_tokens", 70)
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red "
        "ball. She wanted to play with it, but it was too high.")


@pytest.mark.parametrize("flags, form", [
    ((), "{}"), (("--form", "chat"), "{}"), (("--form", "alpaca"), None), (("--form", "text"), "plain")])
def test_a_prompt_is_asked_in_the_form_that_is_wanted(flags, form):
    """Barn has a chat template, which is the default; n answers have numbers."""
    result = command("serve.py", "barn", "--ask", "What do cows eat?", "--n", 3, "--seed", 5, "--max_new_tokens", 9,
                     *flags)
    text, base = Text(BASE), policy.open_checkpoint("barn")[0]
    record = {"instruction": "What do cows eat?"}
    if form is None:
        text.template = None
    ids = text.plain(record["instruction"]) if form == "plain" else text.prompt(record)
    rows = sample(base, [ids], text.stops, 9, 1., 5, 3)
    assert (result.code, result.err) == (0, "")
    assert result.out == "".join(f"[{i}] {text.decode(row)}\n" for i, (_, row) in enumerate(rows, 1))


def test_an_answer_ends_where_the_context_does(monkeypatch):
    asked = []
    monkeypatch.setattr(ask, "sample", lambda policy, prompts, stops, limits, *_, **__: asked.append(
        (len(prompts[0]), *limits)) or [(prompts[0], [5])])
    for cows in (3, 240):
        assert command("serve.py", "barn", "--ask", "cow " * cows, "--form", "text", "--max_new_tokens", 50).code == 0
    (_, short), (long, rest) = asked
    assert short == 50 and long + rest == 256


@pytest.mark.parametrize("argv, said", [
    (("nowhere/at all", "x"), "there is no folder nowhere/at all"), (("barn", ""), "0 tokens"),
    (("barn", "cow " * 300), "has room for 256"), (("barn", "x", "--n", 0), "--n must be 1 or more"),
    (("barn", "x", "--temperature", "nan"), "--temperature"), (("barn", "x", "--seed", 1 << 64), "--seed"),
    (("barn", "\udcff"), "not UTF-8"), (("barn", "x", "--dtype", "float8"), "float8"),
    (("barn", "x", "--port", 0), "--port would change nothing")])
def test_a_question_that_is_not_possible_is_one_sentence(argv, said):
    checkpoint, question, *flags = argv
    refused(command("serve.py", checkpoint, "--ask", question, *(flags or ("--form", "text"))), 2, said)


def test_flags_of_a_question_do_not_go_with_a_server():
    refused(command("serve.py", "barn", "--n", 3), 2, "--n would change nothing without --ask")


# --- preferences that others have collected ----------------------------------------------------------------

PAIRS = [{"instruction": "w1 w2", "input": "", "output_1": "w30", "output_2": "w40 w41", "preference": 2},
         {"instruction": "w3", "input": "w4", "output_1": "w31", "output_2": "w42", "preference": 1},
         {"instruction": "w5", "output_1": "w33", "output_2": "w33", "preference": 1},            # equal
         {"instruction": "w5", "output_1": "w33", "output_2": "w34", "preference": 1.5}]          # a tie
USER, GOOD, BAD = ({"role": role, "content": said} for role, said in (
    ("user", "w1 w2"), ("assistant", "w40 w41"), ("assistant", "w30")))
TRL = {"texts": {"prompt": "w1 w2", "chosen": "w40 w41", "rejected": "w30"},
       "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
       "a prompt inside": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
       "a prompt twice": {"prompt": "w1 w2", "chosen": [USER, GOOD], "rejected": [USER, BAD]}}


@pytest.fixture
def farm_files(tmp_path, monkeypatch):
    """AlpacaFarm's files as the hub would have left them."""
    folder = tmp_path / "alpaca_farm"
    files = {**sets.SPLITS, **sets.RELEASED}
    for name, file in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        rows = PAIRS if name in sets.RELEASED else [
            {"instruction": f"w{i} w{n}", "input": "", "output": f"{name} w{n}"} for i, n in enumerate(range(12))]
        (folder / file).write_text(json.dumps(rows))
    asked = []
    monkeypatch.setattr(hub, "data_files", lambda repo, names: asked.append((repo, *names)) or folder)
    sets.alpaca_farm.cache_clear()
    yield asked
    sets.alpaca_farm.cache_clear()


def test_alpaca_farm_is_the_paper_s_own_splits(farm_files):
    splits = sets.load("alpaca_farm")
    assert list(splits) == ["sft", "preference", "unlabeled", "val", "eval"]
    assert all(record["output"].startswith(split) for split, records in splits.items() for record in records)
    assert sets.load("alpaca_farm", limit=3)["eval"][2]["instruction"] == "w2 w2"
    assert farm_files == [("tatsu-lab/alpaca_farm", *sets.SPLITS.values())]        # once, all together


def test_released_preferences_need_no_judge(farm_files, tmp_path):
    toy.base(tmp_path)
    for labels, used in (("", "human"), ("gpt4", "gpt4"), ("noisy", "noisy")):
        cfg = toy.settings(tmp_path, "full", pairs.Config, data="alpaca_farm", judge="none", labels=labels)
        pairs.run(cfg)
        made, text = json.loads((cfg.dir() / "pairs.json").read_text()), toy.text(cfg)
        assert farm_files[-1] == ("tatsu-lab/alpaca_farm", sets.RELEASED[used])
        assert [(pair["instruction"], pair["preference"]) for pair in made] == [("w1 w2", 2), ("w3", 1)]
        chosen, rejected = zip(*pairs.load_pairs(cfg, text))
        assert [response for _, response in chosen] == [[40, 41, 0], [31, 0]]
        assert [response for _, response in rejected] == [[30, 0], [42, 0]]
    short = toy.settings(tmp_path, "full", pairs.Config, data="alpaca_farm", max_new_tokens=1)
    (tmp_path / "alpaca_farm" / sets.RELEASED["human"]).write_text(json.dumps(
        [*PAIRS, {"instruction": "w9", "output_1": "w30 w31", "output_2": "w30 w32", "preference": 1}]))
    assert pairs.run(short)["pairs"] == 2                   # the last two differ only beyond the longest answer
    with pytest.raises(InputError, match="--judge none labels no pairs"):
        toy.settings(tmp_path, "full", pairs.Config, judge="none")


def test_preferences_that_are_not_there_are_missed_before_anything_runs(tmp_path):
    result = command("farm.py", "--method", "dpo", "--pairs.labels", tmp_path / "none.json", "--out", tmp_path / "run")
    refused(result, 2, "none.json: No such file")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*/config.json"))


@pytest.mark.parametrize("form", TRL)
def test_a_file_of_chosen_and_rejected_is_as_good(tmp_path, form):
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps(TRL[form]) + "\n")
    assert sets.preferences(tmp_path / "pairs.jsonl.gz") == [PAIRS[0] | {
        "output_1": "w40 w41", "output_2": "w30", "preference": 1}]


@pytest.mark.parametrize("row, said", [
    ({"instruction": "x", "output_1": "a", "preference": 1}, "row 1 has no text under 'output_2'"),
    ({**PAIRS[0], "preference": True}, "row 1 has no number under 'preference'"),
    ({**PAIRS[0], "preference": "2"}, "row 1 has no number under 'preference'"),
    ({"chosen": "a", "rejected": "b"}, "row 1: expected a prompt"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "row 1: .*end with the assistant's"),
    ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "w9"}, BAD]}, "row 1: .*the same prompt"),
    ({"prompt": "x", "chosen": [{"role": "assistant"}], "rejected": "b"}, "row 1: expected a prompt"),
    ([], "row 1 is no record")])
def test_a_malformed_pair_is_named(tmp_path, row, said):
    (tmp_path / "pairs.json").write_text(json.dumps([PAIRS[0], row]))
    with pytest.raises(InputError, match=f"pairs.json: {said}"):
        sets.preferences(tmp_path / "pairs.json")
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS[2:]))
    (tmp_path / "zero.json").write_text(json.dumps([{**PAIRS[0], "preference": i} for i in (0, 1)]))
    with pytest.raises(InputError, match="zero.json: the preferences are 0 and 1"):
        sets.preferences(tmp_path / "zero.json")
    with pytest.raises(InputError, match="no pair of different answers"):
        sets.preferences(tmp_path / "pairs.json")
