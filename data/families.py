"""Families of open weights: translates the config.json of each family into the fields of model.GPTConfig.

model.py has one decoder for all families. Three tables describe a family:
    DEFAULTS   the keys that its config.json may have, and their values where config.json leaves them out
    FIELDS     the fields of GPTConfig in which it differs from Llama
    NAMES      its names of the parts of the model, as in the tensors' names
RoPE's keys are read in both spellings, that of transformers 5 and the one before. A checkpoint that needs mathematics
which model.py does not have (mixtures of experts, the capped logits of Gemma 2, dynamic RoPE) is refused, and the error
names the key. Source: transformers, models/<family>/configuration_<family>.py.
"""
import re

SPELLINGS = {  # {family: {its key: the key that Llama has for the same thing}}
    "gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
             "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta",
                 "rotary_pct": "partial_rotary_factor"},
    "gemma3_text": {"hidden_activation": "hidden_act"},
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = {"max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ROTARY = {"rope_theta": 1e4, "rope_parameters": None, "rope_scaling": None, "original_max_position_embeddings": None}
LLAMA = {**COMMON, **ROTARY, "num_key_value_heads": None, "head_dim": None}
QWEN = {**LLAMA, "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 28, "layer_types": None}
GEMMA = {**LLAMA, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
         "attention_bias": False}
DEFAULTS = {
    "llama": {**LLAMA, "attention_bias": False, "mlp_bias": False},
    "mistral": {**LLAMA, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128, "attention_bias": False},
    "phi3": {**LLAMA, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
             "partial_rotary_factor": 1.},
    "olmo2": {**LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False},
    "smollm3": {**LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
                "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
                "use_sliding_window": False, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma": {**GEMMA, "max_position_embeddings": 8192, "num_key_value_heads": 16},
    "gemma3_text": {**GEMMA, "max_position_embeddings": 131072, "num_key_value_heads": 4, "sliding_window": 4096,
                    "layer_types": None, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                    "query_pre_attn_scalar": 256.},
    "gpt2": {**COMMON, "max_position_embeddings": 1024, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5,
             "tie_word_embeddings": True},
    "gpt_neox": {**COMMON, **ROTARY, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "attention_bias": True,
                 "partial_rotary_factor": .25, "use_parallel_residual": True},
}
FIELDS = {
    "llama": {}, "mistral": {}, "smollm3": {},
    "qwen2": {"attention_bias": True, "o_bias": False},          # fixed in Qwen2, without a key
    "qwen3": {"qk_norm": "head"},
    "phi3": {"fused_qkv": "rows", "fused_gate_up": True},
    "olmo2": {"qk_norm": "all", "norm_before": False, "norm_after": True},
    "gemma": {"norm": "rms+1", "scaled_embedding": True},
    "gemma3_text": {"norm": "rms+1", "scaled_embedding": True, "qk_norm": "head", "norm_after": True},
    "gpt2": {"norm": "layer", "gated": False, "attention_bias": True, "o_bias": True, "mlp_bias": True,
             "fused_qkv": "rows", "learned_positions": True, "transposed": True},
    "gpt_neox": {"norm": "layer", "gated": False, "mlp_bias": True, "fused_qkv": "heads"},
}
LLAMA_NAMES = {"pre_feedforward_layernorm": "post_attention_layernorm"}     # the norm between attention and MLP
NAMES = {
    "olmo2": {}, "gemma3_text": {},
    "gpt2": {"model": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
             "input_layernorm": "ln_1", "pre_feedforward_layernorm": "ln_2", "self_attn": "attn", "qkv_proj": "c_attn",
             "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj"},
    "gpt_neox": {**LLAMA_NAMES, "model": "gpt_neox", "embed_tokens": "embed_in", "norm": "final_layer_norm",
                 "self_attn": "attention", "qkv_proj": "query_key_value", "o_proj": "dense",
                 "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h", "lm_head": "embed_out"},
}
SCORE = "score.weight"                  # the head of a reward model
# Names of tensors that old files contain although they are not weights.
BUFFERS = re.compile(r".*((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")
UNSUPPORTED = (  # keys that ask for other mathematics, unless they are absent, null, false or empty
    "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "num_experts",
    "num_local_experts", "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
    "is_encoder_decoder", "rope_interleaved")
# Whether layer i attends only to a window of tokens; used if config.json has no layer_types.
IS_SLIDING = {
    "mistral": lambda c, i: True, "phi3": lambda c, i: True,
    "qwen2": lambda c, i: i >= c["max_window_layers"], "qwen3": lambda c, i: i >= c["max_window_layers"],
    "smollm3": lambda c, i: not has_rope(c, i), "gemma3_text": lambda c, i: (i + 1) % c["sliding_window_pattern"] != 0,
}
# The kinds of RoPE, and the numbers that each must have.
ROPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
         "yarn": ("factor",)}
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor")


def fields(config):
    """The fields of model.GPTConfig, as a dict, for the dict of a config.json.

    ValueError names the key that is missing, malformed, or asks for something that model.py does not compute.
    """
    family = config.get("model_type")
    require_supported("model_type", family, DEFAULTS)
    for key in UNSUPPORTED:
        require_supported(key, config.get(key) or None, (None,))
    require_supported("scale_attn_weights", config.get("scale_attn_weights", True), (True,))
    refuse_custom_code(config.get("auto_map") or {}, family)
    c = read_keys(config, family)
    if family == "gemma" and c["hidden_act"] == "gelu":
        c["hidden_act"] = "gelu_pytorch_tanh"                       # the first files of Gemma call it gelu
    require_supported(spelling("hidden_act", family), c["hidden_act"], ACTIVATIONS)
    c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    require_multiple(c, "num_attention_heads", "num_key_value_heads", family)
    if not c.get("head_dim"):
        require_multiple(c, "hidden_size", "num_attention_heads", family)
        c["head_dim"] = c["hidden_size"] // c["num_attention_heads"]

    layers = range(c["num_hidden_layers"])
    slides = [kind == "sliding_attention" for kind in layer_types(c, family)]
    window = (c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    ropes, rotary_dim = read_ropes(c, family)
    layer_ropes = [-1] * len(layers)                                # -1: no RoPE in this layer
    for i in layers:
        if ropes and has_rope(c, i):
            layer_ropes[i] = int(len(ropes) > 1 and slides[i])
    return {
        **{key: c[key] for key in (*SIZES, *COMMON, "num_key_value_heads", "head_dim")},
        "hidden_act": ACTIVATIONS[c["hidden_act"]],
        "attention_bias": c.get("attention_bias", False), "o_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False), "parallel_residual": c.get("use_parallel_residual", False),
        "query_scale": c.get("query_pre_attn_scalar", 0),
        "windows": tuple(window if slides[i] else 0 for i in layers),
        "ropes": ropes, "rotary_dim": rotary_dim, "layer_ropes": tuple(layer_ropes),
        "names": NAMES.get(family, LLAMA_NAMES), **FIELDS[family],
    }


def is_no_part(name, classifier=False):
    """Whether a tensor of a checkpoint is no part of the decoder: a buffer, or the head of a classifier."""
    return BUFFERS.fullmatch(name) is not None or classifier and name == SCORE


def read_keys(config, family):
    """The keys of a config.json that a family uses, in Llama's spelling, with the family's defaults filled in.

    Other keys are dropped. ValueError names a value of the wrong type.
    """
    spellings, c = SPELLINGS.get(family, {}), dict(DEFAULTS[family])
    replaced = spellings.values()                                   # Llama's spelling means nothing in this family
    given = {spellings.get(key, key): value for key, value in config.items() if key not in replaced}
    c |= {key: value for key, value in given.items() if key in c and value is not None}
    if "sliding_window" in given and "sliding_window" in c:
        c["sliding_window"] = given["sliding_window"]               # null means no window, not the default
    c |= {key: given.get(key) for key in SIZES}
    if family == "gpt2" and c["intermediate_size"] is None:
        c["intermediate_size"] = 4 * c["hidden_size"] if type(c["hidden_size"]) is int else None
    for key in c:
        check_value(c, key, family)
    return c


def check_value(c, key, family):
    """Raise ValueError if the value of a key does not have the type of the family's default for it."""
    value, default, name = c[key], DEFAULTS[family].get(key), spelling(key, family)
    if key in ("rope_parameters", "rope_scaling"):
        expect(value is None or isinstance(value, dict), name, value, "an object")
    elif key in ("layer_types", "no_rope_layers"):
        enough = isinstance(value, list) and len(value) >= c["num_hidden_layers"]
        expect(value is None or enough, name, value, f"a list for {c['num_hidden_layers']} layers")
    elif isinstance(default, bool):
        expect(isinstance(value, bool), name, value, "true or false")
    elif isinstance(default, float):
        expect(is_positive(value), name, value, "a number above 0")
    elif not isinstance(default, str):
        zero = type(value) is int and value == 0 and key == "max_window_layers"
        absent = value is None and key not in SIZES
        expect(is_positive(value, int) or zero or absent, name, value, "a whole number above 0, below 2^31")


def require_multiple(c, whole, part, family):
    """Raise ValueError unless the value of the key `whole` is a multiple of that of the key `part`."""
    if c[whole] % c[part]:
        raise ValueError(f"{spelling(whole, family)} {c[whole]} is no multiple of {spelling(part, family)} {c[part]}")


def is_positive(value, kind=(int, float)):
    """Whether this is a number above 0 and below 2^31. JSON's true does not count as 1."""
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 1 << 31


def expect(holds, name, value, wanted):
    """Raise ValueError unless `holds`: the key `name` has this value, and should be `wanted`."""
    if not holds:
        raise ValueError(f"{name} {value!r:.99} is not {wanted}" if value is not None else f"{name} is missing")


def spelling(key, family):
    """A family's spelling of Llama's key, for messages to the user."""
    for theirs, ours in SPELLINGS.get(family, {}).items():
        if ours == key:
            return theirs
    return key


def refuse_custom_code(auto_map, family):
    """Raise ValueError if a checkpoint needs Python code that is downloaded with it: such code is never run.

    Old checkpoints name a file like modeling_phi3.py, which has become a part of transformers; these are accepted.
    """
    expect(isinstance(auto_map, dict), "auto_map", auto_map, "an object")
    for what, place in auto_map.items():
        if what.startswith(("AutoConfig", "AutoModel")):
            module = str(place).rpartition("--")[2].partition(".")[0]
            in_transformers = module in (f"configuration_{family}", f"modeling_{family}")
            require_supported("auto_map", place, (place,) if in_transformers else ())


def llama_config(c):
    """The config.json, as a dict, of a Llama with the sizes of the GPTConfig c."""
    keys = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "attention_bias", "mlp_bias")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            **{key: getattr(c, key) for key in keys}, "rope_theta": c.ropes[0]["rope_theta"]}


def require_supported(key, value, supported):
    """Raise ValueError unless the value of a key is one of the supported ones."""
    if not isinstance(value, (str, bool, type(None))) or value not in supported:
        also = ", ".join(supported) if any(supported) and supported != (True,) else ""
        raise ValueError(f"{key} {value!r:.99} is not supported" + (f"; supported: {also}" if also else ""))


def has_rope(c, i):
    """Whether layer i applies RoPE to queries and keys; every fourth layer of SmolLM3 does not."""
    if c.get("no_rope_layers"):
        return bool(c["no_rope_layers"][i])
    return "no_rope_layer_interval" not in c or (i + 1) % c["no_rope_layer_interval"] != 0


def layer_types(c, family):
    """The kind of attention of each layer: "full_attention" or "sliding_attention"."""
    is_sliding, layers = IS_SLIDING.get(family, lambda c, i: False), range(c["num_hidden_layers"])
    kinds = c.get("layer_types") or ["sliding_attention" if is_sliding(c, i) else "full_attention" for i in layers]
    for kind in kinds:
        require_supported("layer_types", kind, ("full_attention", "sliding_attention"))
    return kinds


def read_ropes(c, family):
    """(ropes, rotary_dim): the parameters of each kind of RoPE, and how many numbers of each head RoPE rotates.

    There is one kind for all layers; Gemma 3 has one for full layers and another one for sliding layers.
    """
    if FIELDS[family].get("learned_positions"):
        return (), 0
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    kinds = [given]
    if family == "gemma3_text":
        nested = {"full_attention", "sliding_attention"} & given.keys()
        if c["rope_parameters"] and not nested:
            raise ValueError("rope_parameters must be those of full_attention and those of sliding_attention")
        kinds = [given.get("full_attention", {} if nested else given),
                 given.get("sliding_attention") or {"rope_theta": c["rope_local_base_freq"]}]
    ropes = tuple(read_rope(c, family, given) for given in kinds)
    part = 1
    if "partial_rotary_factor" in c:
        part = ropes[0].get("partial_rotary_factor", c["partial_rotary_factor"])
    rotary_dim = int(c["head_dim"] * part)
    even = 2 <= rotary_dim <= c["head_dim"] and rotary_dim % 2 == 0
    expect(even, "head_dim x partial_rotary_factor =", rotary_dim, "an even number up to head_dim")
    return ropes, rotary_dim


def read_rope(c, family, given):
    """The checked parameters of one kind of RoPE; `given` is what config.json has for it."""
    expect(given is None or isinstance(given, dict), "the rope_parameters of a kind of layer", given, "an object")
    given = {key: value for key, value in (given or {}).items() if value is not None}
    rope = {"rope_theta": c["rope_theta"], "rope_type": given.get("type", "default"),
            "original_max_position_embeddings": c["max_position_embeddings"], **given}
    if c["original_max_position_embeddings"]:                       # Phi has this key outside of rope_scaling
        rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    kind = rope["rope_type"]
    supported = ("default",) if family == "phi3" else ROPES         # Phi's yarn is computed in another way
    require_supported("rope_type", kind, supported)
    original = rope["original_max_position_embeddings"]
    if kind == "yarn" and is_positive(original):
        rope.setdefault("factor", c["max_position_embeddings"] / original)
    for key in ROPE_NUMBERS:
        if key in rope or key in ROPES[kind]:
            expect(is_positive(rope.get(key)), f"RoPE's {key}", rope.get(key), "a number above 0")
    expect(rope["rope_theta"] > 1, "rope_theta", rope["rope_theta"], "above 1")
    expect(isinstance(rope.get("truncate", True), bool), "RoPE's truncate", rope.get("truncate"), "true or false")
    return rope
