"""Families of open weights: translates the config.json of each family into the fields of model.GPTConfig.

model.py has one decoder for all families. Three tables describe a family:
    DEFAULTS   the keys that its config.json may have, and their values where config.json leaves them out
    FIELDS     the fields of GPTConfig in which it differs from Llama
    NAMES      its names of the parts of the model, as in the tensors' names
RoPE's keys are read in both spellings, that of transformers 5 and the one before. A checkpoint that needs mathematics
which model.py does not have (dynamic RoPE, multipliers that the family does not know) is refused, and the error names
the key. Of a model that also sees images (WRAPPERS), the language model alone is read. Source: transformers,
models/<family>/configuration_<family>.py.
"""
import re

SPELLINGS = {  # {family: {its key: the key that Llama has for the same thing}}
    "gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
             "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta",
                 "rotary_pct": "partial_rotary_factor"},
    "gemma2": {"hidden_activation": "hidden_act"},
    "gemma3_text": {"hidden_activation": "hidden_act"},
}
# Families that also see images: their language model, unless config.json names another one.
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
ARCHITECTURES = {  # {language model: its class in transformers when it is saved alone}
    "gemma3_text": "Gemma3ForCausalLM", "mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu2": "relu2"}
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
    "ministral3": {**LLAMA, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
                   "head_dim": 128, "sliding_window": None, "rope_theta": 1e6,
                   "rope_parameters": {"rope_type": "yarn", "factor": 16., "original_max_position_embeddings": 16384,
                                       "mscale": 1., "mscale_all_dim": 1., "llama_4_scaling_beta": .1}},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {**LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 4, "attention_bias": False,
                  "sliding_window": 4096, "use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768, "norm_topk_prob": False},
    "olmoe": {**LLAMA, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": False,
              "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    "phi3": {**LLAMA, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
             "sliding_window": None, "partial_rotary_factor": 1.},
    "olmo2": {**LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False},
    "olmo3": {**LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False, "sliding_window": 4096, "layer_types": None,
              "rope_theta": 5e5},
    "granite": {**LLAMA, "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.,
                "residual_multiplier": 1., "attention_multiplier": 1., "logits_scaling": 1.},
    "smollm3": {**LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
                "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
                "use_sliding_window": False, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma": {**GEMMA, "max_position_embeddings": 8192, "num_key_value_heads": 16},
    "gemma2": {**GEMMA, "max_position_embeddings": 8192, "num_key_value_heads": 4, "sliding_window": 4096,
               "layer_types": None, "query_pre_attn_scalar": 256., "attn_logit_softcapping": 50.,
               "final_logit_softcapping": 30.},
    "gemma3_text": {**GEMMA, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
                    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                    "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None,
                    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                    "query_pre_attn_scalar": 256.},
    "nanochat": {**LLAMA, "hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.},
    "gpt2": {**COMMON, "max_position_embeddings": 1024, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5,
             "tie_word_embeddings": True},
    "gpt_neox": {**COMMON, **ROTARY, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "attention_bias": True,
                 "partial_rotary_factor": .25, "use_parallel_residual": True},
}
OLMO2 = {"qk_norm": "all", "norm_before": False, "norm_after": True}
FIELDS = {
    "llama": {}, "mistral": {}, "ministral3": {}, "smollm3": {}, "granite": {}, "olmo2": OLMO2, "olmo3": OLMO2,
    "qwen2": {"attention_bias": True, "o_bias": False},          # fixed in Qwen2, without a key
    "qwen3": {"qk_norm": "head"}, "qwen3_moe": {"qk_norm": "head"}, "olmoe": {"qk_norm": "all"},
    "phi3": {"fused_qkv": "rows", "fused_gate_up": True},
    "gemma": {"norm": "rms+1"}, "gemma2": {"norm": "rms+1", "norm_after": True},
    "gemma3_text": {"norm": "rms+1", "qk_norm": "head", "norm_after": True},
    "gpt2": {"norm": "layer", "gated": False, "attention_bias": True, "o_bias": True, "mlp_bias": True,
             "fused_qkv": "rows", "learned_positions": True, "transposed": True},
    "gpt_neox": {"norm": "layer", "gated": False, "mlp_bias": True, "fused_qkv": "heads"},
    # nanochat norms queries and keys after RoPE: the same, since a norm without weights commutes with a rotation.
    "nanochat": {"norm": "bare", "norm_embedding": True, "qk_norm": "head", "backwards": True, "gated": False},
}
LLAMA_NAMES = {"pre_feedforward_layernorm": "post_attention_layernorm"}     # the norm between attention and MLP
NAMES = {
    "olmo2": {}, "olmo3": {}, "gemma2": {}, "gemma3_text": {},
    "gpt2": {"model": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
             "input_layernorm": "ln_1", "pre_feedforward_layernorm": "ln_2", "self_attn": "attn", "qkv_proj": "c_attn",
             "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj"},
    "nanochat": {**LLAMA_NAMES, "up_proj": "fc1", "down_proj": "fc2"},
    "gpt_neox": {**LLAMA_NAMES, "model": "gpt_neox", "embed_tokens": "embed_in", "norm": "final_layer_norm",
                 "self_attn": "attention", "qkv_proj": "query_key_value", "o_proj": "dense",
                 "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h", "lm_head": "embed_out"},
}
SCORE = "score.weight"                  # the head of a reward model
# Names of tensors that old files contain although they are not weights.
BUFFERS = re.compile(r".*((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")
# Keys that change the mathematics, unless they are absent, null, false or empty; those in FACTORS may also be 1. Each
# family refuses the keys that it does not have in DEFAULTS, even where transformers ignores them: the weights may have
# been trained with what they ask for.
UNSUPPORTED = (
    "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "num_experts",
    "num_local_experts", "n_routed_experts", "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx",
    "add_cross_attention", "is_encoder_decoder", "rope_interleaved", "alibi", "use_qk_norm", "qk_layernorm",
    "attention_multiplier", "query_pre_attn_scalar", "attention_chunk_size", "attn_temperature_tuning",
    "attn_output_gate", "llama_4_scaling_beta", "layer_scale_init_value", "layerscale_value", "use_layer_scale",
    "kv_lora_rank", "num_kv_shared_layers", "hidden_size_per_layer_input", "lm_head_bias", "mlp_only_layers")
FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier",
           "key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "embedding_scale", "scale_emb",
           "decoder_sparse_step")
# Keys for which null means off; for all other keys it means the default.
OFF_BY_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
GEMMAS = ("gemma", "gemma2", "gemma3_text")     # their embeddings are multiplied by the root of hidden_size
# Whether layer i attends only to a window of tokens; used if config.json has no layer_types.
IS_SLIDING = {
    **dict.fromkeys(("mistral", "ministral3", "phi3", "qwen3_moe"), lambda c, i: True),
    "qwen2": lambda c, i: i >= c["max_window_layers"], "qwen3": lambda c, i: i >= c["max_window_layers"],
    "smollm3": lambda c, i: not has_rope(c, i), "gemma3_text": lambda c, i: (i + 1) % c["sliding_window_pattern"] != 0,
    "olmo3": lambda c, i: (i + 1) % 4 != 0, "gemma2": lambda c, i: i % 2 == 0,
}
TWO_ROPES = ("gemma3_text", "olmo3")            # one kind of RoPE in full layers, another one in sliding layers
# The kinds of RoPE, and the numbers that each must have.
ROPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
         "yarn": ("factor",), "longrope": ("factor",)}
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor",
                "llama_4_scaling_beta")


def text_config(config):
    """The config.json (a dict) of the language model alone. Most files are that already. A model that also sees images
    has it under text_config; three of the keys outside of that count for the language model, too."""
    if config.get("model_type") not in tuple(WRAPPERS) or not isinstance(config.get("text_config"), dict):
        return config
    part = {"model_type": WRAPPERS[config["model_type"]], **config["text_config"]}
    outside = {key: config[key] for key in ("eos_token_id", "quantization_config", "auto_map") if config.get(key)}
    return {**part, **outside, "architectures": [ARCHITECTURES.get(part["model_type"])]}


def text_name(name):
    """Translate a tensor's name in a model that also sees images to its name in the language model alone; None if the
    tensor belongs to the image encoder. In older files names begin with language_model, in newer ones with
    model.language_model."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return None
    return re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name).removeprefix("language_model.")


def fields(config):
    """The fields of model.GPTConfig, as a dict, for the dict of a config.json.

    ValueError names the key that is missing, malformed, or asks for something that model.py does not compute.
    """
    wrapper = "language_model" if config.get("model_type") in tuple(WRAPPERS) else ""
    if wrapper:
        expect(isinstance(config.get("text_config"), dict), "text_config", config.get("text_config"), "an object")
    config = text_config(config)
    family = config.get("model_type")
    if family == "qwen3_moe":                                       # transformers 5 renamed the key
        config = {"num_experts" if key == "num_local_experts" else key: value for key, value in config.items()}
    require_supported("model_type", family, DEFAULTS)
    refuse_other_mathematics(config, family)
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
    layer_ropes = [-1] * len(layers)        # -1: no RoPE in this layer; 1: the second kind, of sliding layers; else 0
    for i in layers:
        if ropes and has_rope(c, i):
            layer_ropes[i] = int(len(ropes) > 1 and slides[i])
    limit = known_positions(c, ropes)
    return {
        **{key: c[key] for key in (*SIZES, *COMMON, "num_key_value_heads", "head_dim")},
        "max_position_embeddings": limit or c["max_position_embeddings"], "limited": bool(limit),
        "hidden_act": ACTIVATIONS[c["hidden_act"]],
        "attention_bias": c.get("attention_bias", False), "o_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False), "parallel_residual": c.get("use_parallel_residual", False),
        "embedding_multiplier": c.get("embedding_multiplier", c["hidden_size"] ** .5 if family in GEMMAS else 1.),
        "residual_multiplier": c.get("residual_multiplier", 1.), "logits_scaling": c.get("logits_scaling", 1.),
        "attn_logit_softcapping": c.get("attn_logit_softcapping") or 0,
        "final_logit_softcapping": c.get("final_logit_softcapping") or 0,
        "query_scale": c["attention_multiplier"] ** -2 if family == "granite" else c.get("query_pre_attn_scalar", 0),
        "windows": tuple(window if slides[i] else 0 for i in layers),
        "ropes": ropes, "rotary_dim": rotary_dim, "layer_ropes": tuple(layer_ropes),
        **read_mixture(c),
        "names": NAMES.get(family, LLAMA_NAMES), "wrapper": wrapper, **FIELDS[family],
    }


def is_outside_decoder(name, classifier=False):
    """Whether a tensor of a checkpoint does not belong to the decoder: a buffer, or the head of a classifier."""
    return BUFFERS.fullmatch(name) is not None or classifier and name == SCORE


def known_positions(c, ropes):
    """The most positions that model.py computes correctly; 0: any number.

    Beyond these LongRoPE uses its long factors, and Ministral 3 scales its queries. model.py does neither.
    """
    rope = ropes[0] if ropes else {}
    if rope.get("rope_type") == "longrope" or rope.get("llama_4_scaling_beta"):
        return min(rope["original_max_position_embeddings"], c["max_position_embeddings"])
    return 0


def read_mixture(c):
    """The fields of a mixture of experts, {} for a model without."""
    if "num_experts" not in c:
        return {}
    k, most = c["num_experts_per_tok"], c["num_experts"]
    expect(k <= most, "num_experts_per_tok", k, f"at most {most}, the number of experts")
    return {"num_experts": most, "num_experts_per_tok": k, "norm_topk_prob": c["norm_topk_prob"],
            "moe_intermediate_size": c.get("moe_intermediate_size", c["intermediate_size"])}


def read_keys(config, family):
    """The keys of a config.json that a family uses, in Llama's spelling, with the family's defaults filled in.

    Other keys are dropped. ValueError names a value of the wrong type.
    """
    spellings, c = SPELLINGS.get(family, {}), dict(DEFAULTS[family])
    replaced = spellings.values()                                   # Llama's spelling means nothing in this family
    given = {spellings.get(key, key): value for key, value in config.items() if key not in replaced}
    c |= {key: value for key, value in given.items() if key in c and value is not None}
    c |= {key: given[key] for key in OFF_BY_NULL if key in given and key in c}
    c |= {key: given.get(key, c.get(key)) for key in SIZES}
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
        expect(is_positive(value) or value is None and key in OFF_BY_NULL, name, value, "a number above 0")
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


def refuse_other_mathematics(config, family):
    """Raise ValueError for a key that asks for something that the family does not compute."""
    for key in (*UNSUPPORTED, *FACTORS):
        if key not in DEFAULTS[family]:
            neutral = key in FACTORS and config.get(key) == 1
            require_supported(key, None if neutral else config.get(key) or None, (None,))
    require_supported("scale_attn_weights", config.get("scale_attn_weights", True), (True,))


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

    There is one kind for all layers; families in TWO_ROPES have one for full and another one for sliding layers.
    """
    if FIELDS[family].get("learned_positions"):
        return (), 0
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    kinds = [given]
    if family in TWO_ROPES:
        nested = {"full_attention", "sliding_attention"} & given.keys()
        if c["rope_parameters"] and not nested:
            raise ValueError("rope_parameters must be those of full_attention and those of sliding_attention")
        kinds = [given.get("full_attention", {} if nested else given),
                 given.get("sliding_attention") or {"rope_theta": c.get("rope_local_base_freq", c["rope_theta"])}]
    ropes = tuple(read_rope(c, family, given) for given in kinds)
    part = 1
    if "partial_rotary_factor" in c:
        part = ropes[0].get("partial_rotary_factor", c["partial_rotary_factor"])
    rotary_dim = int(c["head_dim"] * part)
    even = 2 <= rotary_dim <= c["head_dim"] and rotary_dim % 2 == 0
    expect(even, "head_dim x partial_rotary_factor =", rotary_dim, "an even number up to head_dim")
    for rope in ropes:
        if rope["rope_type"] == "longrope":
            check_factors(rope, rotary_dim // 2)
    return ropes, rotary_dim


def check_factors(rope, n):
    """Raise ValueError unless LongRoPE has a factor for each of n frequencies."""
    factors = rope.get("short_factor")
    enough = isinstance(factors, list) and len(factors) == n and all(map(is_positive, factors))
    expect(enough, "RoPE's short_factor", factors, f"a list of {n} numbers above 0")


def read_rope(c, family, given):
    """The checked parameters of one kind of RoPE; `given` is what config.json has for it."""
    expect(given is None or isinstance(given, dict), "the rope_parameters of a kind of layer", given, "an object")
    given = {key: value for key, value in (given or {}).items() if value is not None}
    rope = {"rope_theta": c["rope_theta"], "rope_type": given.get("type", "default"),
            "original_max_position_embeddings": c["max_position_embeddings"], **given}
    if c["original_max_position_embeddings"]:                       # Phi has this key outside of rope_scaling
        rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    kind = rope["rope_type"] = "longrope" if rope["rope_type"] == "su" else rope["rope_type"]       # an old name
    # Phi computes yarn in another way, and only Phi is known to use longrope.
    supported = ("default", "longrope") if family == "phi3" else [kind for kind in ROPES if kind != "longrope"]
    require_supported("rope_type", kind, supported)
    original = rope["original_max_position_embeddings"]
    if kind in ("yarn", "longrope") and is_positive(original):
        rope.setdefault("factor", c["max_position_embeddings"] / original)
    for key in ROPE_NUMBERS:
        if key in rope or key in ROPES[kind]:
            expect(is_positive(rope.get(key)), f"RoPE's {key}", rope.get(key), "a number above 0")
    expect(rope["rope_theta"] > 1, "rope_theta", rope["rope_theta"], "above 1")
    expect(isinstance(rope.get("truncate", True), bool), "RoPE's truncate", rope.get("truncate"), "true or false")
    return rope
