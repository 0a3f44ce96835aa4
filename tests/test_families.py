"""Every family of models equals transformers and peft: logits, greedy answers, gradients, exports and adapters.

A variant is made by transformers from its configuration, with random weights so loud that every tensor shows in the
logits; transformers then reads the folder again, so that it alone says what a config.json means.
"""
import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from quick import few

import model
from data import InputError, adapters, families
from data.weights import WeightsError
from rlhf import policy as policies
from rlhf.logprobs import pack, token_logps
from rlhf.policy import Policy
from rlhf.sampler import sample

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
REAL = Path(__file__).parents[2] / "shared" / "checkpoints" / "real_configs"

# --- what there is to get wrong ----------------------------------------------------------------------------

VOCAB = 61
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LEAST = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, **NO_TOKENS}
LLAMA = {**LEAST, "num_key_value_heads": 2, "rms_norm_eps": .01, "max_position_embeddings": 512}
WIDE = {"head_dim": 12}                     # 4 heads of 12 on 32 channels
THREE = {"num_hidden_layers": 3}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, SLIDING]


def rope(kind="default", theta=300., **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def yarn(theta=100., **more):
    """On heads of 16 channels: some are not scaled, some in between, some scaled."""
    return {"head_dim": 16, **rope("yarn", theta, factor=4., original_max_position_embeddings=64, **more)}


LLAMA3 = rope("llama3", 100., factor=8., low_freq_factor=1., high_freq_factor=4.,
              original_max_position_embeddings=64)      # wavelengths 6 to 199: 2 of 8 kept, 3 between, 3 scaled
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
       "image_size": 28, "patch_size": 14}
LONGROPE = {"short_factor": [1, 1.5, 2., 3., 1., 1.2, 1., 2.5], "long_factor": [9.] * 8}
MINISTRAL3 = LLAMA | yarn(mscale=1., mscale_all_dim=1., llama_4_scaling_beta=.1)
MINISTRAL3["rope_parameters"]["original_max_position_embeddings"] = 128
FAMILIES = {                                # model_type: what its variants begin with
    "llama": LLAMA | rope(),
    "mistral": LLAMA | {"sliding_window": None} | rope(),
    "qwen2": LLAMA | THREE | rope(),
    "qwen3": LLAMA | THREE | WIDE | rope(),
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
             "layer_norm_epsilon": .01, **NO_TOKENS},
    "gpt_neox": {**LEAST, "num_attention_heads": 2, "layer_norm_eps": .01, "max_position_embeddings": 512},
    "gemma": LLAMA | WIDE | rope(),
    "gemma3_text": LLAMA | THREE | WIDE | {
        "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 20,
        "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 40.},
                            FULL: {"rope_type": "default", "rope_theta": 900.}}},
    "gemma2": LLAMA | THREE | WIDE | rope() | {
        "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2., "final_logit_softcapping": 3.},
    "granite": LLAMA | rope() | {"embedding_multiplier": 3., "residual_multiplier": .4, "attention_multiplier": .1,
                                 "logits_scaling": .6},
    "ministral3": MINISTRAL3,
    "olmoe": LLAMA | rope() | {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA | rope() | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                   "norm_topk_prob": True},
    "nanochat": LLAMA | rope() | {"final_logit_softcapping": 3.},
    "olmo2": LLAMA | rope(),
    "olmo3": LLAMA | THREE | {"sliding_window": 8, "layer_types": MIXED},
    "phi3": LLAMA | {"hidden_size": 64} | rope(),
    "smollm3": LLAMA | THREE | {"no_rope_layers": [1, 0, 1]} | rope(),
}
FAMILIES |= {
    "gemma3": {"text_config": FAMILIES["gemma3_text"], "vision_config": EYE | {"model_type": "siglip_vision_model"}},
    "mistral3": {"text_config": MINISTRAL3 | {"model_type": "ministral3"},
                 "vision_config": EYE | {"model_type": "pixtral"}},
}


def neox(share, theta=300.):
    return rope(theta=theta, partial_rotary_factor=share)


def only(*left):
    """Take out of a config.json everything but the sizes and these: the defaults of the family hold."""
    return lambda config: {key: value for key, value in config.items() if key in (*LEAST, "model_type", *left)}


def put(**changes):
    return lambda config: config | changes


def masks(prefix, path, layers=2):
    """Old files hold the causal mask of every layer, which is not a weight."""
    mask = torch.ones(128, 128).tril().bool()[None, None]
    names = {"attn": ("bias", "masked_bias"), "attention": ("bias", "masked_bias", "rotary_emb.inv_freq")}[path]
    buffers = {"bias": mask, "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.rand(2)}
    return {f"{prefix}{i}.{path}.{name}": buffers[name].clone() for i in range(layers) for name in names}


def hub(tensors):
    """GPT-2 as it lies on the hub."""
    return {name.removeprefix("transformer."): x for name, x in tensors.items()} | masks("h.", "attn")


def newer(tensors):
    """A model that also sees images as transformers names its parts today, though it still saves the old names."""
    names = {name: re.sub("^language_model.lm_head", "lm_head", name) for name in tensors}
    names = {name: new.replace("language_model.model.", "model.language_model.") for name, new in names.items()}
    return {re.sub("^(vision_tower|multi_modal)", r"model.\1", new): tensors[name] for name, new in names.items()}


def both(full=None, sliding_theta=5e5):
    """RoPE of Olmo 3: scaled in full layers only."""
    return {"rope_parameters": {FULL: full or rope(theta=5e5)["rope_parameters"],
                                SLIDING: rope(theta=sliding_theta)["rope_parameters"]}}


GEMMA3_LINEAR = {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 40.},
                                   FULL: {"rope_type": "linear", "rope_theta": 900., "factor": 4.}}}
# name: (model_type, changes of the configuration, of the config.json as saved, of the tensors in the file)
VARIANTS = {
    "llama": ("llama", {}),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, attention_bias": ("llama", {"attention_bias": True}),
    "llama, mlp_bias": ("llama", {"mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", WIDE),
    "llama, odd vocabulary": ("llama", {"vocab_size": 97}),
    "llama, theta 20": ("llama", rope(theta=20.)),
    "llama, linear": ("llama", rope("linear", factor=4.)),
    "llama, llama3": ("llama", {"head_dim": 16} | LLAMA3),
    "llama, yarn": ("llama", yarn()),
    "llama, yarn, attention_factor": ("llama", yarn(attention_factor=.7)),
    "llama, yarn, mscale": ("llama", yarn(mscale=.7, mscale_all_dim=1.6)),
    "llama, yarn, mscale alone": ("llama", yarn(mscale=2.)),
    "llama, yarn, beta": ("llama", yarn(beta_fast=5., beta_slow=.8)),
    "llama, yarn, not truncated": ("llama", yarn(beta_fast=5., beta_slow=.8, truncate=False)),
    "llama, yarn, all channels between": ("llama", yarn(theta=3.)),
    "llama, yarn, of max_position_embeddings": (
        "llama", {"head_dim": 16, "max_position_embeddings": 128} | rope("yarn", 100., factor=4.)),
    "llama, defaults": ("llama", {"rms_norm_eps": 1e-6, "num_key_value_heads": 4} | rope(theta=1e4), only()),
    "mistral": ("mistral", {}),
    "mistral, short window": ("mistral", {"sliding_window": 8}),
    "mistral, window of 2": ("mistral", {"sliding_window": 2}),
    "mistral, long window": ("mistral", {"sliding_window": 200}),
    "mistral, wide heads": ("mistral", WIDE | {"sliding_window": 5}),
    "mistral, defaults": ("mistral", {"rms_norm_eps": 1e-6} | rope(theta=1e4), only("num_key_value_heads")),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding from layer 1": ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                                              "max_window_layers": 1}),
    "qwen2, sliding by layer_types": ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                                                "layer_types": MIXED}),
    "qwen2, a window not used": ("qwen2", {"max_window_layers": 1}, put(sliding_window=8)),
    "qwen2, a window for no layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                                               "max_window_layers": 3}),
    "qwen2, yarn": ("qwen2", rope("yarn", 100., factor=4., original_max_position_embeddings=64)),
    "qwen2, defaults": ("qwen2", {"rms_norm_eps": 1e-6} | rope(theta=1e4), only("num_key_value_heads")),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, attention_bias": ("qwen3", {"attention_bias": True}),
    "qwen3, sliding": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3, defaults": ("qwen3", {"rms_norm_eps": 1e-6, "head_dim": 128} | rope(theta=1e4),
                        only("num_key_value_heads")),
    "gpt2": ("gpt2", {}),
    "gpt2, n_inner": ("gpt2", {"n_inner": 40}),
    "gpt2, of the hub": ("gpt2", {}, None, hub),
    "gpt2, with masks": ("gpt2", {}, None, lambda tensors: tensors | masks("transformer.h.", "attn")),
    "gpt2, defaults": ("gpt2", {"layer_norm_epsilon": 1e-5}, only("n_embd", "n_layer", "n_head", "n_positions")),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True} | neox(.25)),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False} | neox(.25)),
    "gpt_neox, all channels rotate": ("gpt_neox", neox(1.)),
    "gpt_neox, 6 of 16 channels rotate": ("gpt_neox", neox(.4)),
    "gpt_neox, no attention_bias": ("gpt_neox", {"attention_bias": False} | neox(.25)),
    "gpt_neox, tied": ("gpt_neox", {"tie_word_embeddings": True} | neox(.5)),
    "gpt_neox, linear": ("gpt_neox", rope("linear", 300., factor=4., partial_rotary_factor=.5)),
    "gpt_neox, with masks": ("gpt_neox", neox(.25), None,
                             lambda tensors: tensors | masks("gpt_neox.layers.", "attention")),
    "gpt_neox, defaults": ("gpt_neox", {"layer_norm_eps": 1e-5} | neox(.25, 1e4), only()),
    "gemma": ("gemma", {}),
    "gemma, multi-query": ("gemma", {"num_key_value_heads": 1}),
    "gemma, hidden_act gelu": ("gemma", {}, put(hidden_act="gelu")),
    "gemma, hidden_act gelu, hidden_activation null": ("gemma", {}, put(hidden_act="gelu", hidden_activation=None)),
    "gemma, both": ("gemma", {}, put(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")),
    "gemma, defaults": ("gemma", {"rms_norm_eps": 1e-6, "head_dim": 256} | rope(theta=1e4),
                        only("num_key_value_heads")),
    "gemma3": ("gemma3_text", {}),
    "gemma3, linear": ("gemma3_text", GEMMA3_LINEAR),
    "gemma3, attention_bias": ("gemma3_text", {"attention_bias": True}),
    "gemma3, full first": ("gemma3_text", {"layer_types": [FULL, FULL, SLIDING]}),
    "gemma3, default query_pre_attn_scalar": ("gemma3_text", {"query_pre_attn_scalar": 256}, lambda config: {
        key: value for key, value in config.items() if key != "query_pre_attn_scalar"}),
    "gemma3, defaults": ("gemma3_text", {
        "num_hidden_layers": 6, "layer_types": None, "rms_norm_eps": 1e-6, "head_dim": 256, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "rope_parameters": None}, only("num_key_value_heads")),
    "gemma3, with eyes": ("gemma3", {}),
    "gemma3, with eyes, newer names": ("gemma3", {}, None, newer),
    "gemma2": ("gemma2", {}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2, one kv head, attention cap": ("gemma2", {"num_key_value_heads": 1, "final_logit_softcapping": None}),
    "gemma2, by layer_types": ("gemma2", {"layer_types": [FULL, SLIDING, FULL]}),
    "gemma2, defaults": ("gemma2", {
        "rms_norm_eps": 1e-6, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50., "final_logit_softcapping": 30.} | rope(theta=1e4), only("num_key_value_heads")),
    "granite": ("granite", {}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite, defaults": ("granite", {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "embedding_multiplier": 1.,
                                      "residual_multiplier": 1., "attention_multiplier": 1., "logits_scaling": 1.}
                          | rope(theta=1e4), only()),
    "ministral3": ("ministral3", {}),
    "ministral3, sliding": ("ministral3", {"sliding_window": 8}),
    "ministral3, defaults": ("ministral3", {
        "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "rope_parameters": None},
        only("num_key_value_heads")),
    "mistral3": ("mistral3", {}),
    "mistral3, of mistral, untied": ("mistral3", {"text_config": LLAMA | rope() | {
        "model_type": "mistral", "head_dim": 16, "sliding_window": None}, "tie_word_embeddings": False}, None, newer),
    "nanochat": ("nanochat", {}),
    "nanochat, tied, no cap": ("nanochat", {"tie_word_embeddings": True, "final_logit_softcapping": None}),
    "nanochat, linear, attention_bias": ("nanochat", {"attention_bias": True} | rope("linear", factor=4.)),
    "nanochat, defaults": ("nanochat", {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "final_logit_softcapping": 15.}
                           | rope(theta=1e4), only()),
    "olmoe": ("olmoe", {}),
    "olmoe, normalised": ("olmoe", {"norm_topk_prob": True}),
    "olmoe, defaults": ("olmoe", {"rms_norm_eps": 1e-5, "num_key_value_heads": 4, "num_experts": 10,
                                  "num_experts_per_tok": 8} | rope(theta=1e4), only("num_experts")),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, older name, sliding": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, lambda config: {
        "num_experts" if key == "num_local_experts" else key: value for key, value in config.items()}),
    "qwen3_moe, defaults": ("qwen3_moe", {
        "rms_norm_eps": 1e-6, "num_experts": 10, "num_experts_per_tok": 8, "norm_topk_prob": False} | rope(theta=1e4),
        only("num_key_value_heads", "num_local_experts", "moe_intermediate_size")),
    "olmo3": ("olmo3", {}),
    "olmo3, yarn in full layers": ("olmo3", both(yarn(5e5)["rope_parameters"]) | {"head_dim": 16}),
    "olmo3, two thetas": ("olmo3", both(rope(theta=40.)["rope_parameters"], 90.)),
    "olmo3, defaults": ("olmo3", {"num_hidden_layers": 4, "rms_norm_eps": 1e-5, "num_key_value_heads": 4,
                                  "sliding_window": 4096, "layer_types": None}, only()),
    "olmo2": ("olmo2", {}),
    "olmo2, multi-head": ("olmo2", {"num_key_value_heads": 4}),
    "olmo2, attention_bias": ("olmo2", {"attention_bias": True}),
    "olmo2, llama3": ("olmo2", LLAMA3),
    "olmo2, defaults": ("olmo2", {"rms_norm_eps": 1e-5, "num_key_value_heads": 4} | rope(theta=1e4), only()),
    "phi3": ("phi3", {}),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": .5} | rope(partial_rotary_factor=.5)),
    "phi3, short window": ("phi3", {"sliding_window": 8}),
    "phi3, longrope": ("phi3", {"original_max_position_embeddings": 128} | rope("longrope", **LONGROPE)),
    "phi3, longrope, attention_factor": ("phi3", {"original_max_position_embeddings": 128} | rope(
        "longrope", attention_factor=.7, **LONGROPE)),
    "phi3, longrope, partial rotary, tied": ("phi3", {
        "original_max_position_embeddings": 128, "partial_rotary_factor": .5, "tie_word_embeddings": True} | rope(
        "longrope", partial_rotary_factor=.5, **{key: factors[:4] for key, factors in LONGROPE.items()})),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3, defaults": ("phi3", {"rms_norm_eps": 1e-5, "num_key_value_heads": 4} | rope(theta=1e4), only()),
    "smollm3": ("smollm3", {}),
    "smollm3, every second layer": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    "smollm3, sliding where nothing rotates": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "smollm3, mlp_bias": ("smollm3", {"mlp_bias": True}),
    "smollm3, attention_bias": ("smollm3", {"attention_bias": True, "no_rope_layers": [1, 1, 1]}),
    "smollm3, untied, yarn": ("smollm3", {"tie_word_embeddings": False} | rope(
        "yarn", 100., factor=4., original_max_position_embeddings=64)),
    "smollm3, defaults": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None, "rms_norm_eps": 1e-6}
                          | rope(theta=2e6), only("num_key_value_heads")),
}
NOT_APART = {"mistral, long window", "qwen2, a window not used", "qwen2, a window for no layer", "gpt2, of the hub",
             "gpt2, with masks", "gpt_neox, with masks", "gemma, hidden_act gelu", "gemma, both",
             "gemma, hidden_act gelu, hidden_activation null", "smollm3, every second layer",
             "gemma3, with eyes, newer names"}
PLAIN = {kind: name for name, (kind, *_) in reversed(VARIANTS.items())}     # the first variant of each kind
QUICK = ("llama", "qwen3", "gpt2", "gemma3", "qwen3_moe")       # as different from each other as can be
every = pytest.mark.parametrize("name", few(VARIANTS, *QUICK))
every_kind = pytest.mark.parametrize("name", few(PLAIN.values(), *QUICK))
OTHER_NUMBERS = re.compile("yarn|theta|linear|llama3|longrope|window|sliding|layer_types|normalised")   # same tensors
ROPES = {name for name, (kind, changes, *_) in VARIANTS.items()
         if "factor" in str({**FAMILIES[kind], **changes}.get("rope_parameters"))}
NEW_ONLY = {"olmo3, two thetas"}            # one rope_theta was for both kinds of layers
# where layers differ, "rope_type" is known only; elsewhere "type" is the older word; all the same if nothing is scaled
SPELLINGS = [(name, key) for name, (kind, *_) in VARIANTS.items() for key in (None, "type", "rope_type")
             if key is None or "defaults" not in name and name not in NEW_ONLY and (
                 (key == "rope_type") == (name in ROPES) or name in ROPES and kind not in families.TWO_ROPES)]

OLD = [("llama, yarn", "type"), ("gemma3", "type"), ("gemma3, linear", "rope_type")]     # spelled as some years ago


# --- making and comparing ----------------------------------------------------------------------------------

@torch.no_grad()
def loud(theirs, seed=0):
    """Weights that nothing hides behind: norms are off their neutral value, and so is every bias."""
    r, seen = torch.Generator().manual_seed(seed), set()
    for module in theirs.modules():
        for p in [p for p in module.parameters(recurse=False) if p not in seen]:   # a tied head is the embedding
            seen.add(p)
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=r), alpha=.3)         # from 1, or from 0
            else:
                fan_in = p.shape[0 if "Conv1D" in type(module).__name__ else -1]
                scale = .5 if hasattr(module, "embed_scale") else 1.5           # Gemma's embeddings are multiplied
                p.copy_(torch.randn(p.shape, generator=r) * scale * fan_in ** -.5)
    theirs.tie_weights()
    return theirs


def configured(kind, changes):
    return transformers.AutoConfig.for_model(kind, **FAMILIES[kind] | changes)


def auto(kind):
    return transformers.AutoModelForImageTextToText if kind == "mistral3" else transformers.AutoModelForCausalLM


def read(folder, more=""):
    """transformers' model of a folder that must hold exactly what it wants, and may hold what is named like `more`."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    theirs, info = auto(kind).from_pretrained(folder, output_loading_info=True)
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not more or more not in name]
    assert not any(info.values()), info
    return theirs.eval()


def old(config, key):
    """A config.json as transformers before 5 wrote it; `key` names the kind of RoPE."""
    if "text_config" in config:
        return config | {"text_config": old(config["text_config"], key)}
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")} | {
        "torch_dtype": "float32", "transformers_version": "4.40.0"} | old_rope(config, key)
    if config["model_type"] == "gemma3_text":
        config["sliding_window_pattern"] = 2
        config.pop("_sliding_window_pattern", None)
    for derived in ("layer_types", "no_rope_layers"):       # old files leave out what follows from the rest
        without = {name: value for name, value in config.items() if name != derived}
        if derived in config and transformers.AutoConfig.for_model(**without).to_dict()[derived] == config[derived]:
            config = without
    return config


def old_rope(config, key):
    given, kind = config.get("rope_parameters"), config["model_type"]
    if given is None:
        return {}
    base = {"rope_theta": None}
    if kind == "gemma3_text":
        base["rope_local_base_freq"] = given[SLIDING]["rope_theta"]
    if kind in families.TWO_ROPES:
        given = given[FULL]
    scaling = {key if name == "rope_type" else name: value for name, value in given.items()}
    base["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        base["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if kind == "gpt_neox":
        base = {"rotary_emb_base": base["rope_theta"], "rotary_pct": base["partial_rotary_factor"]}
    return base | {"rope_scaling": None if scaling[key] == "default" else scaling}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> the folder of a variant, transformers' model of it, its logits of IDS; made(name, key) -> the same
    in the old spelling."""
    cache = {}

    def make(name, key=None):
        if (name, key) in cache:
            return cache[name, key]
        kind, changes, edit, tensors = (*VARIANTS[name], None, None)[:4]
        folder = tmp_path_factory.mktemp("variant") / "model"
        if key is None:
            loud(auto(kind).from_config(configured(kind, changes))).save_pretrained(folder)
            if tensors:
                file = folder / "model.safetensors"
                safetensors.save_file(tensors(safetensors.load_file(file)), file, {"format": "pt"})
        else:
            shutil.copytree(make(name).folder, folder)
            edit = lambda config: old(config, key)                                      # noqa: E731
        if edit:
            rewrite(folder, edit)
        theirs = auto(kind).from_pretrained(folder).eval()
        with torch.no_grad():
            logits = theirs(IDS).logits
        if key is not None:
            assert torch.equal(logits, make(name).logits), "the old spelling must mean the same to transformers"
        cache[name, key] = SimpleNamespace(folder=folder, theirs=theirs, logits=logits, kind=kind)
        return cache[name, key]
    return make


def rewrite(folder, edit):
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


LENGTHS = (40, 23, 9, 1)                    # longer than the windows, and padded with what looks like text
IDS = tiny.ids(4, 40)
REAL_TOKEN = torch.arange(40) < torch.tensor(LENGTHS)[:, None]                           # (4, 40)


def off(a, b):
    """How far a is from b, of the largest number in b."""
    assert a.shape == b.shape and a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


def off_at_real_tokens(a, b):
    assert a.shape == b.shape and a.dtype == torch.float32
    return off(a[REAL_TOKEN], b[REAL_TOKEN])


def loss(logits):
    targets = IDS.masked_fill(~REAL_TOKEN, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def gradients(gpt):
    """Of loss(), under the checkpoint's names."""
    gpt.requires_grad_()
    loss(gpt(IDS)).backward()
    return gpt.renamed({name: p.grad for name, p in gpt.named_parameters()})


def bare(names):
    """On the hub GPT-2 has no prefix; in files GPT-NeoX has another name for its head than in transformers, and experts
    are apart; of a model that also sees images the language model."""
    names = {name.removeprefix("transformer.").replace("embed_out.", "lm_head."): x for name, x in names.items()}
    names = dict(part for name, x in names.items() for part in experts(name, x))
    return {name.replace("model.language_model.", "model."): x for name, x in names.items() if not is_eye(name)}


def experts(name, x):
    """transformers joins the weights of all experts, and those of gate and up; files hold them one by one."""
    before, _, kind = name.partition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        return [(name, x)]
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    return [(f"{before}.experts.{e}.{part}.weight", y) for e in range(len(x))
            for part, y in zip(parts, x[e].chunk(len(parts)))]


def is_eye(name):
    return "vision_tower" in name or "multi_modal_projector" in name


def far(pairs, tolerance):
    """{name: how far} of the tensors that differ by more."""
    ours, theirs = map(bare, pairs)
    assert ours.keys() == theirs.keys()
    return {name: distance for name, x in theirs.items() if not (distance := off(ours[name], x)) <= tolerance}


# --- that these tests can fail -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", few([name for name in VARIANTS if not OTHER_NUMBERS.search(name)], *QUICK))
@torch.no_grad()
def test_every_tensor_shows_in_the_logits(name, made):
    theirs = made(name).theirs
    assert .9 < made(name).logits.abs().max() < 20
    for tensor, p in theirs.named_parameters():
        if is_eye(tensor):
            continue
        before = p.clone()
        p.copy_(p.flatten().roll(1).view_as(p))
        assert off_at_real_tokens(theirs(IDS).logits, made(name).logits) > 1e-3, tensor
        p.copy_(before)


@pytest.mark.parametrize("name", few([name for name in VARIANTS if name not in PLAIN.values()], "llama, yarn"))
@torch.no_grad()
def test_the_same_tensors_mean_something_else_in_another_variant(name, made):
    """Whoever overlooks what is special about a variant either finds tensors that do not fit, or other logits."""
    kind = made(name).kind
    other = auto(kind).from_config(configured(*VARIANTS[PLAIN[kind]][:2])).eval()
    shapes, shapes_there = ({key: p.shape for key, p in m.named_parameters()} for m in (made(name).theirs, other))
    if shapes == shapes_there:
        other.load_state_dict(made(name).theirs.state_dict())
        difference = off_at_real_tokens(other(IDS).logits, made(name).logits)
        assert difference < 1e-6 if name in NOT_APART else difference > 1e-3
    else:
        assert name not in NOT_APART


# --- the model ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, key", few(SPELLINGS, *((name, None) for name in PLAIN.values()), *OLD))
@torch.no_grad()
def test_logits_of_padded_rows(name, key, made):
    gpt = model.load(made(name, key).folder)
    assert off_at_real_tokens(gpt(IDS), made(name).logits) < 1e-5
    for length in (1, 8, 9):                        # about as long as a window
        assert off(gpt(IDS[:1, :length]), made(name).logits[:1, :length]) < 1e-5


@every
@torch.no_grad()
def test_greedy_answers(name, made):
    """Four prompts in three slots, so that rows stand at different positions and one slot is used twice. Every token
    is the likeliest after those before it, as transformers computes without a cache."""
    prompts = tiny.texts((12, 3, 1, 25))
    answers = sample(Policy(model.load(made(name).folder)), prompts, [VOCAB + 99], 64, temperature=0., slots=3)
    assert [prompt for prompt, _ in answers] == prompts
    for prompt, answer in answers:
        assert len(answer) == 64
        logits = made(name).theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]       # (64, V)
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        likeliest = logits.max(1).values            # rounding may decide between two tokens
        assert (likeliest - chosen <= 2e-5 * logits.abs().amax(1)).all()
    assert len({token for _, answer in answers for token in answer}) > 5


@every
def test_gradients(name, made):
    theirs = made(name).theirs
    theirs.zero_grad()
    loss(theirs(IDS).logits).backward()
    wanted = {tensor: p.grad for tensor, p in theirs.named_parameters()}
    assert not far((gradients(model.load(made(name).folder)), wanted), 1e-4)


@every_kind
def test_checkpointing_changes_no_bit_of_a_gradient(name, made):
    plain, other = model.load(made(name).folder), model.load(made(name).folder)
    other.checkpointing = True
    before, after = gradients(plain), gradients(other)
    assert before.keys() == after.keys() and all(torch.equal(before[tensor], after[tensor]) for tensor in before)


@every
def test_packed_rows_that_share_prompts(name, made):
    """Their log-probs are transformers', whether a prompt is computed twice or once, and so are their gradients."""
    prompts, answers = tiny.texts((14, 5)), tiny.texts((20, 7, 3, 18), seed=7)
    ids, mask = pack(list(zip(prompts * 2, answers)))
    with torch.no_grad():
        logp = made(name).theirs(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask
    results = []
    for shared in (1, 2):
        gpt = model.load(made(name).folder).requires_grad_()
        found = token_logps(Policy(gpt), ids, mask, shared=shared)
        assert off(found, logp) < 1e-5
        found.sum().backward()
        results.append(gpt.renamed({tensor: p.grad for tensor, p in gpt.named_parameters()}))
    assert not far(results[::-1], 1e-4)


@torch.no_grad()
def test_all_experts_compute_what_the_chosen_ones_do(made):
    """The first is what a GPU does for few tokens; a step may also have none."""
    mixture = model.load(made("qwen3_moe").folder).model.layers[0].mlp
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    share, chosen = mixture.gate(x).softmax(-1).topk(2)
    wanted = sum(share[:, [i]] * torch.stack([mixture.experts[e](row) for e, row in zip(chosen[:, i], x)])
                 for i in range(2))
    for compute in (mixture.all_experts, mixture.chosen_experts):
        assert off(compute(x, share, chosen), wanted) < 1e-6
        assert compute(x[:0], share[:0], chosen[:0]).shape == (0, 32)


@pytest.mark.parametrize("name", ["phi3, longrope", "ministral3"])
@torch.no_grad()
def test_no_text_is_longer_than_what_is_computed(name, made):
    """Beyond 128 positions Phi changes its frequencies and Ministral its queries, which is refused, not left out."""
    gpt, theirs, ids = model.load(made(name).folder), made(name).theirs, tiny.ids(1, 129)
    assert gpt.config.max_position_embeddings == 128 < theirs.config.max_position_embeddings
    assert off(gpt(ids[:, :128]), theirs(ids[:, :128]).logits) < 1e-5
    with pytest.raises(AssertionError, match="longer than the model's positions"):
        gpt(ids)
    with pytest.raises(InputError, match="129 tokens, and the model has 128"):
        sample(Policy(gpt), tiny.texts((100,)), [VOCAB + 99], 29)


# --- on disk -----------------------------------------------------------------------------------------------

@every
@torch.no_grad()
def test_transformers_loads_what_we_save(name, made, tmp_path):
    folder, gpt = made(name).folder, model.load(made(name).folder)
    assert not far((gpt.weights(), dict(made(name).theirs.named_parameters())), 0.)
    policies.save(Policy(gpt), SimpleNamespace(dir=lambda: tmp_path, checkpoint=folder, tokenizer=(folder,)))
    assert torch.equal(read(tmp_path / "checkpoint")(IDS).logits, made(name).logits)
    assert torch.equal(model.load(tmp_path / "checkpoint")(IDS), gpt(IDS))


@every
@torch.no_grad()
def test_peft_loads_an_adapter_of_ours_and_it_can_be_merged(name, made, tmp_path):
    peft = pytest.importorskip("peft")
    folder, theirs = made(name).folder, copy.deepcopy(made(name).theirs)
    gpt = model.load(folder)
    gpt.add_role("sft", rank=4, alpha=6)
    shake(gpt.adapter("sft").values())
    adapters.save_adapter(tmp_path / "adapter", gpt.adapter("sft"), 4, 6, gpt.targets(), str(folder),
                         fan_in_fan_out=made(name).kind == "gpt2")
    linears = {path for path, m in theirs.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    ours = {path for path, _ in gpt.linears()}
    assert ours == {path for path in linears - {"lm_head", "embed_out"} if not is_eye(path)}
    worn = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with gpt.using("sft"):
        ours = gpt(IDS)
    wanted = worn(IDS).logits
    assert off_at_real_tokens(wanted, made(name).logits) > .01
    assert off_at_real_tokens(ours, wanted) < 1e-5
    adapted = {path for path, m in worn.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {path for path, _ in gpt.linears()}
    x = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(0))
    for path, linear in gpt.linears():
        x_in = x.repeat(1, 1, 8)[..., :linear.lora_A["sft"].shape[1]]
        assert off(linear(x_in, "sft"), worn.base_model.model.get_submodule(path)(x_in)) < 1e-6, path
    adapters.merge(tmp_path / "merged", tmp_path / "adapter", folder)
    assert off_at_real_tokens(read(tmp_path / "merged", "masked_bias")(IDS).logits, wanted) < 1e-5
    assert off_at_real_tokens(model.load(tmp_path / "merged")(IDS), wanted) < 1e-5
    for prompt, answer in sample(Policy(gpt, "sft"), tiny.texts((12, 3)), [VOCAB + 99], 12, temperature=0.):
        assert answer == worn(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].argmax(-1).tolist()


@every_kind
@torch.no_grad()
def test_an_adapter_of_peft_on_some_of_the_layers_is_put_on(name, made, tmp_path):
    peft = pytest.importorskip("peft")
    gpt = model.load(made(name).folder)
    some = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "o_proj"],
            **dict.fromkeys(families.WRAPPERS, r".*language_model.*\.[qv]_proj")}
    lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules=some.get(made(name).kind, ["q_proj", "v_proj"]),
                           fan_in_fan_out=made(name).kind == "gpt2", task_type="CAUSAL_LM")
    worn = peft.get_peft_model(copy.deepcopy(made(name).theirs), lora).eval()
    shake(p for tensor, p in worn.named_parameters() if "lora_" in tensor)
    worn.save_pretrained(tmp_path)
    policy = policies.with_adapter(gpt, "theirs", tmp_path)
    with gpt.using(policy.role):
        ours = gpt(IDS)
    assert off_at_real_tokens(worn(IDS).logits, made(name).logits) > .01
    assert off_at_real_tokens(ours, worn(IDS).logits) < 1e-5
    file = tmp_path / "adapter_model.safetensors"
    older = {name.replace("model.language_model.", "language_model.model."): x
             for name, x in safetensors.load_file(file).items()}
    safetensors.save_file(older, file)
    assert adapters.load_adapter(tmp_path)[0].keys() <= gpt.adapter("theirs").keys()


@torch.no_grad()
def shake(tensors):
    r = torch.Generator().manual_seed(1)
    for p in tensors:
        p.copy_(torch.randn(p.shape, generator=r) * .15)


# --- real configurations -----------------------------------------------------------------------------------

@pytest.mark.skipif(not REAL.exists(), reason="needs the configurations in ../shared/checkpoints/real_configs")
@pytest.mark.parametrize("name", sorted(path.parent.name for path in REAL.glob("*/config.json")))
def test_a_real_configuration_means_a_model_of_the_same_tensors(name):
    config = model.GPTConfig.from_hf(json.loads((REAL / name / "config.json").read_text()))
    wanted = transformers.AutoConfig.from_pretrained(REAL / name)
    assert (config.vocab_size, config.num_hidden_layers) == (wanted.vocab_size, wanted.num_hidden_layers)
    with torch.device("meta"):
        ours, theirs = model.GPT(config), transformers.AutoModelForCausalLM.from_config(wanted)
    assert {tensor: x.shape for tensor, x in bare(ours.weights()).items()} == {
        tensor: p.shape for tensor, p in bare(dict(theirs.named_parameters())).items()}


HUB = {                                     # config.json as on the hub, with two layers
    "gemma-3-4b-it": {
        "model_type": "gemma3", "eos_token_id": [1, 106], "mm_tokens_per_image": 256, "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 2,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "vision_config": EYE | {"model_type": "siglip_vision_model"}},
    "Phi-4-mini-instruct": {
        "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu",
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "hidden_size": 3072,
        "interpolate_factor": 1, "intermediate_size": 8192, "lm_head_bias": False, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 2, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": .75, "rms_norm_eps": 1e-5,
        "rope_scaling": {"long_factor": [2.] * 48, "short_factor": [1.] * 48, "type": "longrope"}, "rope_theta": 1e4,
        "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
    "granite-3.3-2b-instruct": {
        "model_type": "granite", "attention_bias": False, "attention_multiplier": .015625, "embedding_multiplier": 12.0,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "mlp_bias": False,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8,
        "residual_multiplier": .22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1e7,
        "tie_word_embeddings": True, "vocab_size": 49159},
    "gemma-2-2b-it": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "head_dim": 256,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 2, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rope_theta": 1e4,
        "sliding_window": 4096, "vocab_size": 256000},
    "Mistral-Small-3.1-24B-Instruct-2503": {
        "model_type": "mistral3", "multimodal_projector_bias": False, "spatial_merge_size": 2, "text_config": {
            "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072},
        "tie_word_embeddings": False, "vision_config": EYE | {"model_type": "pixtral"}},
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936},
}


@pytest.mark.parametrize("name", HUB)
def test_a_configuration_of_the_hub_means_a_model_of_the_same_tensors(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    wanted = transformers.AutoConfig.from_pretrained(tmp_path)
    config = model.GPTConfig.from_hf(HUB[name])
    with torch.device("meta"):
        ours, theirs = model.GPT(config), auto(HUB[name]["model_type"]).from_config(wanted)
    assert {tensor: x.shape for tensor, x in ours.weights().items()} == {
        tensor: p.shape for tensor, p in bare(dict(theirs.named_parameters())).items()}


# --- what is refused, and what is not ----------------------------------------------------------------------

def strange_rope(kind, **more):
    return rope(kind, factor=2., **more)


FACTORS = {"short_factor": [1.] * 8, "long_factor": [2.] * 8, "original_max_position_embeddings": 64}
REFUSED = [                                 # (variant, changes of its config.json, what the message names)
    *(("llama", {"model_type": kind}, ("model_type", kind)) for kind in (
        "strange", "gemma4_text", "mixtral", "qwen2_moe", "llama4_text", "deepseek_v3", "phimoe", "gpt_oss",
        "gpt_neo", "qwen3_next", "qwen3_5", "granitemoehybrid")),
    ("llama", {"model_type": None}, ("model_type",)),
    *((name, {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, ("auto_map", "modeling_own.Own"))
      for name in ("llama", "gpt2")),
    *((name, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantization_config", "gptq"))
      for name in ("llama", "qwen3")),
    *((name, strange_rope(kind, **FACTORS), ("rope_type", kind))
      for name in ("llama", "qwen2", "gpt_neox") for kind in ("dynamic", "longrope", "proportional")),
    *(("llama", {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {key: kind, "factor": 2., **FACTORS}},
       ("rope", kind)) for key in ("type", "rope_type") for kind in ("dynamic", "longrope", "ntk")),
    *(("phi3", strange_rope(kind), ("rope_type", kind)) for kind in ("linear", "yarn", "llama3", "dynamic")),
    *(("phi3", strange_rope("longrope", short_factor=factors), ("short_factor",)) for factors in (
        None, 2., [1.] * 7, [1.] * 7 + [0.], [1.] * 7 + ["1"])),
    ("gemma3", {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 40.},
                                    FULL: {"rope_type": "dynamic", "rope_theta": 900., "factor": 2.}}},
     ("rope_type", "dynamic")),
    ("llama", rope("llama3", factor=8., low_freq_factor=1., original_max_position_embeddings=64),
     ("high_freq_factor",)),
    ("llama", rope("linear"), ("factor",)),
    *((name, {key: "relu6"}, (key, "relu6")) for name, key in (
        ("llama", "hidden_act"), ("gpt2", "activation_function"), ("gpt_neox", "hidden_act"),
        ("gemma", "hidden_act"), ("gemma3", "hidden_activation"), ("phi3", "hidden_act"))),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx", "True")),
    ("gpt2", {"scale_attn_weights": False}, ("scale_attn_weights", "False")),
    ("gpt2", {"add_cross_attention": True}, ("add_cross_attention", "True")),
    ("gemma3", {"final_logit_softcapping": 30.}, ("final_logit_softcapping", "30.0")),
    ("gemma3", {"attn_logit_softcapping": 50.}, ("attn_logit_softcapping", "50.0")),
    ("gemma3", {"use_bidirectional_attention": True}, ("use_bidirectional_attention", "True")),
    ("gemma", {"use_bidirectional_attention": True}, ("use_bidirectional_attention", "True")),
    *((name, {key: value}, (key, str(value))) for name in ("llama", "gpt2", "phi3", "gemma2") for key, value in (
        ("residual_multiplier", .22), ("embedding_multiplier", 12.), ("logits_scaling", 8),
        ("attention_multiplier", .1), ("logit_scale", .06), ("layer_scale_init_value", .1), ("use_qk_norm", True),
        ("num_experts", 4))),
    *((name, {key: 30.}, (key, "30.0")) for name in ("llama", "qwen3", "granite", "olmo3")
      for key in ("final_logit_softcapping", "attn_logit_softcapping")),
    ("qwen3_moe", {"decoder_sparse_step": 2}, ("decoder_sparse_step", "2")),
    ("qwen3_moe", {"mlp_only_layers": [1]}, ("mlp_only_layers", "[1]")),
    ("qwen3_moe", {"num_experts_per_tok": 7}, ("num_experts_per_tok", "7")),
    ("olmoe", {"clip_qkv": 8.}, ("clip_qkv", "8.0")),
    ("nanochat", {"attn_logit_softcapping": 30.}, ("attn_logit_softcapping", "30.0")),
    ("gemma3, with eyes", {"text_config": 3}, ("text_config", "3")),
    ("gemma3, with eyes", {"text_config": {"model_type": "llama4_text"}}, ("model_type", "llama4_text")),
    ("gemma3, with eyes", {"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "fp8")),
    ("granite", {"residual_multiplier": "1"}, ("residual_multiplier", "1")),
    ("qwen3", {"layer_types": ["linear_attention", FULL, FULL]}, ("layer_types", "linear_attention")),
    *(("llama", {key: None}, (key,)) for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")),
    ("gpt2", {"n_embd": None}, ("n_embd",)),
    *((name, {"num_key_value_heads": 3}, ("num_key_value_heads", "3")) for name in ("llama", "qwen3", "phi3")),
]


@pytest.mark.parametrize("name, changes, named", REFUSED, ids=[f"{r[0]} {r[2]}" for r in REFUSED])
def test_what_would_compute_something_else_is_refused_by_name(name, changes, named, made, tmp_path):
    shutil.copytree(made(name).folder, tmp_path / "model")
    rewrite(tmp_path / "model", lambda config: {key: value for key, value in (config | changes).items()
                                                if value is not None})
    with pytest.raises(WeightsError) as error:
        model.load(tmp_path / "model")
    assert all(part in str(error.value) for part in named), str(error.value)


@pytest.mark.parametrize("name, changes", [
    ("llama", {"attention_dropout": .1, "pretraining_tp": 1, "use_cache": False}),
    ("llama", {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}}),
    ("llama", {"quantization_config": None, "rope_scaling": None, "num_experts": None}),
    ("gpt2", {"reorder_and_upcast_attn": True, "resid_pdrop": .3, "attn_pdrop": .3, "embd_pdrop": .3}),
    ("gpt_neox", {"hidden_dropout": .1, "attention_dropout": .1, "classifier_dropout": .1}),
    ("gemma3", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "cache_implementation": "hybrid"}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 0, "use_mrope": False}),
    ("llama", {"residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_scaling": None, "alibi": False}),
    ("phi3", {"rope_scaling": None, "resid_pdrop": .1, "embd_pdrop": .1, "attention_bias": False}),
], ids=str)
@torch.no_grad()
def test_what_changes_nothing_is_not_refused(name, changes, made, tmp_path):
    shutil.copytree(made(name).folder, tmp_path / "model")
    rewrite(tmp_path / "model", put(**changes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(theirs(IDS).logits, made(name).logits)
    assert off_at_real_tokens(model.load(tmp_path / "model")(IDS), made(name).logits) < 1e-5


@pytest.mark.parametrize("name, key, changes", [
    ("llama", None, rope(factor=3.)),
    ("llama", None, {"layer_norm_eps": .5}),
    ("llama", None, {"partial_rotary_factor": .5}),
    ("llama", None, {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING] * 2}),
    ("llama, yarn", None, {"rope_parameters": yarn(beta_fast=1, beta_slow=8)["rope_parameters"]}),
    ("gemma", None, {"hidden_activation": "silu"}),
    ("gemma3", None, {"hidden_act": "silu"}),
    ("gpt2", None, {"hidden_act": "silu"}),
    ("gpt_neox", "type", {"partial_rotary_factor": .5, "rope_theta": 70.}),
], ids=str)
@torch.no_grad()
def test_a_key_that_the_family_does_not_have_is_ignored_or_refused(name, key, changes, made, tmp_path):
    """But never obeyed: transformers is the judge of what such a config.json means."""
    shutil.copytree(made(name, key).folder, tmp_path / "model")
    rewrite(tmp_path / "model", put(**changes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    try:
        ours = model.load(tmp_path / "model")
    except WeightsError as error:
        assert any(word in str(error) for word in changes)
    else:
        assert off_at_real_tokens(ours(IDS), theirs(IDS).logits) < 1e-5
