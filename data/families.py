"""Families of open weights: what config.json means in each of them, as the fields of model.GPTConfig.

All are one decoder. FIELDS says how a family differs from Llama, DEFAULTS what a key means that its config.json lacks,
NAMES what it calls the parts. Keys are read in their spelling before and since transformers 5. What would change
the mathematics and is not computed is refused by name: mixtures of experts, capped logits (Gemma 2), dynamic RoPE.
"""
import re

WORDS = {  # what a family calls what the others call otherwise
    "gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
             "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta",
                 "rotary_pct": "partial_rotary_factor"},
    "gemma3_text": {"hidden_activation": "hidden_act"},
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GEMMA = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
QWEN = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
DEFAULTS = {
    "llama": {},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, **QWEN},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, **QWEN},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {"max_position_embeddings": 32768, "use_sliding_window": False, "num_key_value_heads": 4,
                "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    "gemma": {**GEMMA, "max_position_embeddings": 8192, "num_key_value_heads": 16},
    "gemma3_text": {**GEMMA, "max_position_embeddings": 131072, "num_key_value_heads": 4, "sliding_window": 4096,
                    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                    "query_pre_attn_scalar": 256},
    "gpt2": {"max_position_embeddings": 1024, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5,
             "tie_word_embeddings": True},
    "gpt_neox": {"hidden_act": "gelu", "rms_norm_eps": 1e-5, "attention_bias": True, "partial_rotary_factor": .25,
                 "use_parallel_residual": True},
}
FIELDS = {
    "llama": {}, "mistral": {}, "smollm3": {},
    "qwen2": {"attention_bias": True, "o_bias": False},          # no key of its config.json says so
    "qwen3": {"qk_norm": "head"},
    "phi3": {"fused_qkv": "rows", "fused_gate_up": True},
    "olmo2": {"qk_norm": "all", "norm_before": False, "norm_after": True},
    "gemma": {"norm": "rms+1", "scaled_embedding": True},
    "gemma3_text": {"norm": "rms+1", "scaled_embedding": True, "qk_norm": "head", "norm_after": True},
    "gpt2": {"norm": "layer", "gated": False, "attention_bias": True, "o_bias": True, "mlp_bias": True,
             "fused_qkv": "rows", "learned_positions": True, "transposed": True},
    "gpt_neox": {"norm": "layer", "gated": False, "mlp_bias": True, "fused_qkv": "heads"},
}
LLAMA_NAMES = {"pre_feedforward_layernorm": "post_attention_layernorm"}     # for the norm that stands between the two
NAMES = {
    "olmo2": {}, "gemma3_text": {},
    "gpt2": {"model": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
             "input_layernorm": "ln_1", "pre_feedforward_layernorm": "ln_2", "self_attn": "attn", "qkv_proj": "c_attn",
             "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj"},
    "gpt_neox": {**LLAMA_NAMES, "model": "gpt_neox", "embed_tokens": "embed_in", "norm": "final_layer_norm",
                 "self_attn": "attention", "qkv_proj": "query_key_value", "o_proj": "dense",
                 "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h", "lm_head": "embed_out"},
}
BUFFERS = re.compile(r".*((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")      # that old files keep as tensors
PLAIN = {  # keys that change the mathematics, and the one value that is computed; absent and null are fine as well
    **dict.fromkeys(("quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv",
                     "num_experts", "num_local_experts")),
    **dict.fromkeys(("use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
                     "is_encoder_decoder", "rope_interleaved"), False),
    "scale_attn_weights": True,
}
# whether layer i sees only a window of tokens, where config.json has no layer_types
SLIDES = {
    "mistral": lambda c, i: True, "phi3": lambda c, i: True,
    "qwen2": lambda c, i: i >= c["max_window_layers"], "qwen3": lambda c, i: i >= c["max_window_layers"],
    "smollm3": lambda c, i: not turns(c, i), "gemma3_text": lambda c, i: (i + 1) % c["sliding_window_pattern"] != 0,
}
ROPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
         "yarn": ("factor",)}            # and the numbers that each needs


def fields(config):
    """GPTConfig's fields from a config.json dict; ValueError names what is missing, or not computed here."""
    family = config.get("model_type")
    require("model_type", family, DEFAULTS)
    words = WORDS.get(family, {})
    said = {ours: theirs for theirs, ours in words.items()}         # which words of the others it does not know
    own = {f"{module}_{family}" for module in ("configuration", "modeling")}    # before transformers had the family
    for place in (config.get("auto_map") or {}).values():
        require("auto_map", place, (), isinstance(place, str) and place.partition(".")[0] in own)
    c = {"max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
         **DEFAULTS[family],
         **{words.get(key, key): value for key, value in config.items() if value is not None and key not in said}}
    if "sliding_window" in config:
        c["sliding_window"] = config["sliding_window"]              # null: none
    for key, plain in PLAIN.items():
        require(key, c.get(key, plain), (plain,))
    if family == "gemma" and c["hidden_act"] == "gelu":
        c["hidden_act"] = "gelu_pytorch_tanh"                       # what it means in the first files of that family
    require(said.get("hidden_act", "hidden_act"), c["hidden_act"], ACTIVATIONS)
    if family == "gpt2":
        c.setdefault("intermediate_size", 4 * c.get("hidden_size", 0))

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wrong = [key for key in (*sizes, "max_position_embeddings") if type(c.get(key)) is not int or c[key] < 1]
    wrong += [key for key in ("num_key_value_heads", "head_dim") if type(c.get(key, 1)) is not int or c.get(key, 1) < 1]
    if wrong:
        raise ValueError(f"missing or not a whole number: {', '.join(said.get(key, key) for key in wrong)}")
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise ValueError(f"num_attention_heads {c['num_attention_heads']} is no multiple of num_key_value_heads "
                         f"{c['num_key_value_heads']}")

    layers = range(c["num_hidden_layers"])
    for key in ("layer_types", "no_rope_layers"):
        if key in c and (not isinstance(c[key], list) or len(c[key]) < len(layers)):
            raise ValueError(f"{key} does not list the {len(layers)} layers")
    slides = [kind == "sliding_attention" for kind in layer_types(c, family)]
    window = (c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    ropes, rotary_dim = read_ropes(c, family)
    return {
        **{key: c[key] for key in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings")},
        "rms_norm_eps": float(c["rms_norm_eps"]), "hidden_act": ACTIVATIONS[c["hidden_act"]],
        "tie_word_embeddings": bool(c.get("tie_word_embeddings")),
        "attention_bias": bool(c.get("attention_bias")), "o_bias": bool(c.get("attention_bias")),
        "mlp_bias": bool(c.get("mlp_bias")), "parallel_residual": bool(c.get("use_parallel_residual")),
        "query_scale": c.get("query_pre_attn_scalar", 0),
        "windows": tuple(window if slides[i] else 0 for i in layers),
        "ropes": ropes, "rotary_dim": rotary_dim,
        "layer_ropes": tuple(int(len(ropes) > 1 and slides[i]) if ropes and turns(c, i) else -1 for i in layers),
        "names": NAMES.get(family, LLAMA_NAMES), **FIELDS[family],
    }


def llama(c):
    """The config.json of a Llama with the sizes of a GPTConfig."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "attention_bias", "mlp_bias")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            **{key: getattr(c, key) for key in keys}, "rope_theta": c.ropes[0]["rope_theta"]}


def require(key, value, known, holds=None):
    """ValueError unless the value is one of the known ones, or `holds`."""
    if not (value in known if holds is None else holds):
        raise ValueError(f"{key} {value!r:.99} is not supported" + (f"; supported: {', '.join(map(str, known))}"
                                                                    if any(known) else ""))


def turns(c, i):
    """Whether layer i rotates queries and keys: SmolLM3 leaves out every fourth."""
    if "no_rope_layers" in c:
        return bool(c["no_rope_layers"][i])
    return "no_rope_layer_interval" not in c or (i + 1) % c["no_rope_layer_interval"] != 0


def layer_types(c, family):
    slides, layers = SLIDES.get(family, lambda c, i: False), range(c["num_hidden_layers"])
    kinds = ["sliding_attention" if slides(c, i) else "full_attention" for i in layers]
    if family not in ("mistral", "phi3"):
        kinds = c.get("layer_types", kinds)
    for kind in kinds:
        require("layer_types", kind, ("full_attention", "sliding_attention")[:1 + (family in SLIDES)])
    return kinds


def read_ropes(c, family):
    """The parameters of each kind of RoPE (of full layers, then of sliding ones if theirs differ), and how many numbers
    of a head it turns."""
    if FIELDS[family].get("learned_positions"):
        return (), 0
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kinds = [given]
    if family == "gemma3_text":
        if c.get("rope_parameters") and not {"full_attention", "sliding_attention"} & c["rope_parameters"].keys():
            raise ValueError("rope_parameters must be those of full_attention and those of sliding_attention")
        kinds = [given.get("full_attention", {} if "sliding_attention" in given else given),
                 given.get("sliding_attention") or {"rope_theta": c["rope_local_base_freq"]}]
    ropes = []
    for given in kinds:
        given = {key: value for key, value in (given or {}).items() if value is not None}
        rope = {"rope_theta": c["rope_theta"], "rope_type": given.get("type", "default"),
                "original_max_position_embeddings": c["max_position_embeddings"], **given}
        if "original_max_position_embeddings" in c:                 # beside the others in Phi's config.json
            rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        require("rope_type", rope["rope_type"], ("default",) if family == "phi3" else ROPES)   # Phi's yarn is another
        if rope["rope_type"] == "yarn":
            rope.setdefault("factor", c["max_position_embeddings"] / rope["original_max_position_embeddings"])
        wrong = [key for key in ("rope_theta", "original_max_position_embeddings", *ROPES[rope["rope_type"]])
                 if type(rope.get(key)) not in (int, float) or rope[key] <= 0]
        if wrong:
            raise ValueError(f"of RoPE, missing or not a number above 0: {', '.join(wrong)}")
        ropes.append(rope)
    part = ropes[0].get("partial_rotary_factor", c.get("partial_rotary_factor", 1))
    if family not in ("gpt_neox", "phi3"):
        require("partial_rotary_factor", part, (1,))
    rotary_dim = int(c["head_dim"] * part)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"RoPE turns {rotary_dim} numbers of each head, which is not even")
    return tuple(ropes), rotary_dim
