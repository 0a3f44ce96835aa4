"""Families of open weights: what config.json means in each of them, as the fields of model.GPTConfig.

All are one decoder. FIELDS says how a family differs from Llama, DEFAULTS which keys it knows and what they are where
its config.json lacks them, NAMES what it calls the parts. Keys are read in their spelling before and since transformers
5. What would change the mathematics and is not computed is refused by name: mixtures of experts, capped logits (Gemma
2), dynamic RoPE.
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
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ALL = {"max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ROTARY = {"rope_theta": 1e4, "rope_parameters": None, "rope_scaling": None, "original_max_position_embeddings": None}
LLAMA = {**ALL, **ROTARY, "num_key_value_heads": None, "head_dim": None}
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
    "gpt2": {**ALL, "max_position_embeddings": 1024, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5,
             "tie_word_embeddings": True},
    "gpt_neox": {**ALL, **ROTARY, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "attention_bias": True,
                 "partial_rotary_factor": .25, "use_parallel_residual": True},
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
UNKNOWN = (  # what changes the mathematics and is not computed: absent, null, false and empty are fine
    "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "num_experts",
    "num_local_experts", "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
    "is_encoder_decoder", "rope_interleaved")
# whether layer i sees only a window of tokens, where config.json has no layer_types
SLIDES = {
    "mistral": lambda c, i: True, "phi3": lambda c, i: True,
    "qwen2": lambda c, i: i >= c["max_window_layers"], "qwen3": lambda c, i: i >= c["max_window_layers"],
    "smollm3": lambda c, i: not turns(c, i), "gemma3_text": lambda c, i: (i + 1) % c["sliding_window_pattern"] != 0,
}
ROPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
         "yarn": ("factor",)}            # and the numbers that each needs
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor")


def fields(config):
    """GPTConfig's fields from a config.json dict; ValueError names what is missing, malformed, or not computed here."""
    family = config.get("model_type")
    require("model_type", family, DEFAULTS)
    for key in UNKNOWN:
        require(key, config.get(key) or None, (None,))
    require("scale_attn_weights", config.get("scale_attn_weights", True), (True,))
    own_code(config.get("auto_map") or {}, family)
    c = known(config, family)
    if family == "gemma" and c["hidden_act"] == "gelu":
        c["hidden_act"] = "gelu_pytorch_tanh"                       # what it means in the first files of that family
    require(spelt("hidden_act", family), c["hidden_act"], ACTIVATIONS)
    c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    divided = [("num_attention_heads", "num_key_value_heads")]
    if not c.get("head_dim"):
        divided.append(("hidden_size", "num_attention_heads"))
    for whole, part in divided:
        if c[whole] % c[part]:
            raise ValueError(f"{spelt(whole, family)} {c[whole]} is no multiple of {spelt(part, family)} {c[part]}")
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]

    layers = range(c["num_hidden_layers"])
    slides = [kind == "sliding_attention" for kind in layer_types(c, family)]
    window = (c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    ropes, rotary_dim = read_ropes(c, family)
    return {
        **{key: c[key] for key in (*SIZES, *ALL, "num_key_value_heads", "head_dim")},
        "hidden_act": ACTIVATIONS[c["hidden_act"]],
        "attention_bias": c.get("attention_bias", False), "o_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False), "parallel_residual": c.get("use_parallel_residual", False),
        "query_scale": c.get("query_pre_attn_scalar", 0),
        "windows": tuple(window if slides[i] else 0 for i in layers),
        "ropes": ropes, "rotary_dim": rotary_dim,
        "layer_ropes": tuple(int(len(ropes) > 1 and slides[i]) if ropes and turns(c, i) else -1 for i in layers),
        "names": NAMES.get(family, LLAMA_NAMES), **FIELDS[family],
    }


def known(config, family):
    """The keys that a family knows, in the words of the others, with its defaults: checked, and nothing else."""
    words, c = WORDS.get(family, {}), dict(DEFAULTS[family])
    others = words.values()                                         # these it calls otherwise
    given = {words.get(key, key): value for key, value in config.items() if key not in others}
    c |= {key: value for key, value in given.items() if key in c and value is not None}
    if "sliding_window" in given and "sliding_window" in c:
        c["sliding_window"] = given["sliding_window"]               # null: none
    c |= {key: given.get(key) for key in SIZES}
    if family == "gpt2" and c["intermediate_size"] is None:
        c["intermediate_size"] = 4 * c["hidden_size"] if type(c["hidden_size"]) is int else None
    for key, value in c.items():
        default, name = DEFAULTS[family].get(key), spelt(key, family)
        if key in ("rope_parameters", "rope_scaling"):
            expect(value is None or isinstance(value, dict), name, value, "an object")
        elif key in ("layer_types", "no_rope_layers"):
            enough = isinstance(value, list) and len(value) >= c["num_hidden_layers"]
            expect(value is None or enough, name, value, f"a list for {c['num_hidden_layers']} layers")
        elif isinstance(default, bool):
            expect(isinstance(value, bool), name, value, "true or false")
        elif isinstance(default, float):
            expect(number(value), name, value, "a number above 0")
        elif not isinstance(default, str):
            none = type(value) is int and value == 0 and key == "max_window_layers"
            absent = value is None and key not in SIZES
            expect(number(value, int) or none or absent, name, value, "a whole number above 0, below 2^31")
    return c


def number(value, kind=(int, float)):
    """Whether this is a number above 0 that can be computed with; true is none."""
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 1 << 31


def expect(holds, name, value, wanted):
    if not holds:
        raise ValueError(f"{name} {value!r:.99} is not {wanted}" if value is not None else f"{name} is missing")


def spelt(key, family):
    """How a family spells a key."""
    return next((theirs for theirs, ours in WORDS.get(family, {}).items() if ours == key), key)


def own_code(auto_map, family):
    """Code that comes with a checkpoint is never run, and refused unless it is what transformers has by now."""
    expect(isinstance(auto_map, dict), "auto_map", auto_map, "an object")
    for what, place in auto_map.items():
        if what.startswith(("AutoConfig", "AutoModel")):
            module = str(place).rpartition("--")[2].partition(".")[0]
            require("auto_map", place, (place,) if module in (f"configuration_{family}", f"modeling_{family}") else ())


def llama(c):
    """The config.json of a Llama with the sizes of a GPTConfig."""
    keys = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "attention_bias", "mlp_bias")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            **{key: getattr(c, key) for key in keys}, "rope_theta": c.ropes[0]["rope_theta"]}


def require(key, value, supported):
    if not isinstance(value, (str, bool, type(None))) or value not in supported:
        also = ", ".join(supported) if any(supported) and supported != (True,) else ""
        raise ValueError(f"{key} {value!r:.99} is not supported" + (f"; supported: {also}" if also else ""))


def turns(c, i):
    """Whether layer i rotates queries and keys: SmolLM3 leaves out every fourth."""
    if c.get("no_rope_layers"):
        return bool(c["no_rope_layers"][i])
    return "no_rope_layer_interval" not in c or (i + 1) % c["no_rope_layer_interval"] != 0


def layer_types(c, family):
    slides, layers = SLIDES.get(family, lambda c, i: False), range(c["num_hidden_layers"])
    kinds = c.get("layer_types") or ["sliding_attention" if slides(c, i) else "full_attention" for i in layers]
    for kind in kinds:
        require("layer_types", kind, ("full_attention", "sliding_attention"))
    return kinds


def read_ropes(c, family):
    """The parameters of each kind of RoPE (of full layers, then of sliding ones if theirs differ), and how many numbers
    of a head it turns."""
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
    ropes = []
    for given in kinds:
        expect(given is None or isinstance(given, dict), "the rope_parameters of a kind of layer", given, "an object")
        given = {key: value for key, value in (given or {}).items() if value is not None}
        rope = {"rope_theta": c["rope_theta"], "rope_type": given.get("type", "default"),
                "original_max_position_embeddings": c["max_position_embeddings"], **given}
        if c["original_max_position_embeddings"]:                   # beside the others in Phi's config.json
            rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        kind = rope["rope_type"]
        require("rope_type", kind, ("default",) if family == "phi3" else ROPES)     # Phi's yarn is another one
        if kind == "yarn" and number(before := rope["original_max_position_embeddings"]):
            rope.setdefault("factor", c["max_position_embeddings"] / before)
        for key in ROPE_NUMBERS:
            if key in rope or key in ROPES[kind]:
                expect(number(rope.get(key)), f"of RoPE {key}", rope.get(key), "a number above 0")
        expect(rope["rope_theta"] > 1, "rope_theta", rope["rope_theta"], "above 1")
        expect(isinstance(rope.get("truncate", True), bool), "of RoPE truncate", rope.get("truncate"), "true or false")
        ropes.append(rope)
    part = 1
    if "partial_rotary_factor" in c:
        part = ropes[0].get("partial_rotary_factor", c["partial_rotary_factor"])
    rotary_dim = int(c["head_dim"] * part)
    even = 2 <= rotary_dim <= c["head_dim"] and rotary_dim % 2 == 0
    expect(even, "what RoPE turns of each head,", rotary_dim, "an even part of it")
    return tuple(ropes), rotary_dim
