"""What a stage is said to hold, counted in another way: in the tensors themselves."""
import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import tiny
import torch
import toy

import products
from rlhf import memory, policy
from rlhf.kv_cache import KVCache
from rlhf.sampler import cache_length
from rlhf.update import Updater


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    toy.base(folder)
    (folder / "data.json").write_text("[]")
    return folder


def settings(folder, method, kind="lora", **changes):
    return toy.settings(folder, kind, importlib.import_module(f"rlhf.{method}").Config, **changes)


def size(tensors):
    return sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize("kind", toy.KINDS)
def test_what_is_counted_is_what_the_tensors_take(folder, kind):
    cfg = settings(folder, "sft", kind)
    found, model = memory.held(cfg, {}), policy.fresh(cfg, "sft")
    if kind == "lora":
        assert found["adapters"] == size(model.trainable())
        assert found["weights"] == size(model.gpt.parameters()) - size(model.trainable())
    else:
        assert found["weights"] == size(model.trainable()) and "adapters" not in found
    updater = Updater(model.trainable(), 1e-3, 1)
    updater.add(model.hidden(torch.ones(1, 3, dtype=torch.long)).sum(), 1)
    moments = [t for state in updater.optimizer.state_dict()["state"].values() for t in state.values()]
    grads = [p.grad for p in model.trainable() if p.grad is not None]
    assert not moments and size(grads) <= found["optimizer"] / 3
    for p in model.trainable():
        p.grad = torch.zeros_like(p)
    updater.optimizer.step()
    moments = [t for state in updater.optimizer.state.values() for name, t in state.items() if name != "step"]
    assert found["optimizer"] == size(moments) + size(p.grad for p in model.trainable())


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "dtype", "int8"), [
    ("lora", "float32", False), ("full", "float32", False), ("lora", "bfloat16", False), ("lora", "bfloat16", True)])
def test_copies_for_sampling_are_the_tensors_that_sampling_makes(kind, dtype, int8, tied, pays, monkeypatch):
    for name in ("onednn_pays", "bf16_pays"):
        monkeypatch.setattr(products, name, lambda: pays)
    model = tiny.policy(kind, hidden_size=256, intermediate_size=256, num_key_value_heads=4, vocab_size=300,
                        tie_word_embeddings=tied)
    cfg = SimpleNamespace(int8=int8, lora_rank=4 * (kind == "lora"))
    said = memory.sampling_copies(model.gpt, getattr(torch, dtype), "cpu", cfg)
    model.gpt.to(getattr(torch, dtype))
    if int8:
        model.gpt.quantise()
    model.gpt.make_contiguous()
    own = {p.untyped_storage().data_ptr() for p in model.gpt.parameters()}
    with torch.inference_mode(), model.gpt.fused(model.role):
        there = [layers.fused[0] for layers in model.gpt.fused_linears()] + [model.gpt.fused_head]
        made = [t for t in there if t is not None and (t.is_mkldnn or t.untyped_storage().data_ptr() not in own)]
    assert said == size(made)


@pytest.mark.parametrize("room", [True, False])
def test_copies_on_a_gpu_are_those_of_the_layers_with_their_adapters(room, monkeypatch):
    gpt, cfg = tiny.gpt().bfloat16(), SimpleNamespace(int8=False, lora_rank=8)
    gpt.make_contiguous()
    gpt.add_role("sft", 8, 8)
    monkeypatch.setattr(type(gpt), "device", torch.device("cuda"))
    if not room:
        monkeypatch.setattr("model.MOST_COPIED", 1000)
    said = memory.sampling_copies(gpt, torch.bfloat16, "cuda", cfg)
    with torch.inference_mode(), gpt.fused("sft"):
        made = size(each.fused[0] for each in gpt.fused_linears() if len(each.fused[0]) > sum(each.sizes))
        A = sum(p.numel() * 2 for name, p in gpt.adapter("sft").items() if name.endswith("lora_A"))
    assert made == said + A * room and bool(said) == room


def test_the_cache_is_that_of_all_slots(folder):
    cfg = settings(folder, "sft", slots=7, max_prompt_tokens=9, max_new_tokens=6)
    gpt = policy.fresh(cfg, "sft").gpt
    cache = KVCache(gpt.config, 7, cache_length(gpt.device, 15), gpt.device, gpt.head.dtype)
    tensors = [t for value in vars(cache).values() for t in (value if isinstance(value, list) else [value])
               if isinstance(t, torch.Tensor) and t.dim() == 4]
    assert memory.held(cfg, {})["cache"] == size(tensors) > 0


def test_who_trains_nothing_holds_no_optimizer(folder):
    found = memory.held(settings(folder, "pairs"), {"sft": ""})
    assert found.keys() == {"weights", "adapters", "cache", "copies for sampling"}


def test_more_models_more_memory_and_what_is_advised_takes_less(folder):
    one, needs = memory.held(settings(folder, "sft", "full"), {}), {"sft": "", "reward": ""}
    cfg = settings(folder, "ppo", "full")
    four = memory.held(cfg, needs)
    assert memory.held(settings(folder, "sft_more", "full"), {})["weights"] == one["weights"]   # has no reference
    assert four["weights"] == 4 * one["weights"] and four["optimizer"] == 2 * one["optimizer"]
    for key, value in (("micro_batch_tokens", cfg.micro_batch_tokens // 2), ("checkpointing", True), ("slots", 32),
                       ("max_new_tokens", 3), ("lora_rank", 16)):
        less = memory.held(dataclasses.replace(cfg, **{key: value}), needs)
        assert sum(less.values()) < sum(four.values()), key
        assert f"--{key}" in memory.advice(cfg)
    assert "--int8" in memory.advice(settings(folder, "ppo")) and "--int8" not in memory.advice(cfg)
    lora = settings(folder, "ppo")
    assert memory.held(dataclasses.replace(lora, int8=True), needs)["weights"] < memory.held(lora, needs)["weights"]


def test_the_lines_fit_the_terminal(folder):
    found = {**memory.held(settings(folder, "ppo"), {"reward": ""}), "weights": 14_000_000_000, "cache": 10 ** 12}
    lines = memory.said(settings(folder, "ppo"), found).splitlines()
    assert all(len(line) <= 79 for line in lines) and "weights 14.0 GB" in lines[0]


def test_of_a_model_that_cannot_be_loaded_nothing_is_said(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert memory.held(settings(folder, "sft", model=str(tmp_path)), {}) == {}
