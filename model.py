"""A Llama-style decoder whose parameters are named as in the Hugging Face checkpoint, with LoRA adapters worn by role.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied or untied head; a KV cache in which every row
has its own position; gradient checkpointing per block. Left out: dropout, other families, quantisation.

Rows are right-padded: causal attention never looks right, so neither a padding mask nor position ids are needed.
Letters: B batch, T tokens, S cache length, V vocabulary, D width, H heads, K kv heads, hd head size, r LoRA rank.
"""
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.weights import WeightsError, assign, load_weights

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class GPTConfig:
    """The keys of config.json that change the mathematics, under their own names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0            # 0: as many as attention heads
    head_dim: int = 0                       # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config):
        """Read a config.json dict; ValueError names whatever would change the mathematics and is not implemented."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}     # transformers 5, or before
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        for key, value, known in (("model_type", config.get("model_type"), "llama"),
                                  ("hidden_act", config.get("hidden_act", "silu"), "silu"),
                                  ("rope_type", rope_type, "default")):
            if value != known:
                raise ValueError(f"{key} {value!r} is not supported; supported: {known}")
        known = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        known["rope_theta"] = float(rope.get("rope_theta") or known.get("rope_theta", 10000.0))
        wrong = [f.name for f in fields(cls)[:5] if f.name not in known]
        wrong += [f.name for f in fields(cls) if f.type is int and type(known.get(f.name, 0)) is not int]
        if wrong:
            raise ValueError(f"missing or not a whole number: {', '.join(wrong)}")
        return cls(**known)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()                                                                    # low precision would overflow
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x, with one (A, B) per role and W shared by all (Hu et al. 2021, eq. 3)."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)
        self.lora_A, self.lora_B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}

    def add_role(self, role, rank, alpha):
        A = torch.empty(rank, self.in_features, device=self.weight.device)               # fp32 whatever W is
        self.lora_A[role] = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B[role] = nn.Parameter(A.new_zeros(self.out_features, rank))           # so a fresh role = the base
        self.scale[role] = alpha / rank

    def delta(self, role):
        return self.scale[role] * self.lora_B[role] @ self.lora_A[role]                  # (out, in)

    def forward(self, x, role=None):
        y = super().forward(x)
        if role is not None:
            A, B = self.lora_A[role], self.lora_B[role]
            y = y + (self.scale[role] * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
        return y


class KVCache:
    """Keys and values of every layer, (B, K, S, hd) each; row b is filled up to its own position."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]

    def write(self, layer, k, v, pos):
        """Store k, v (B, K, T, hd) at columns pos .. pos+T-1 of each row; pos None means 0 for all."""
        if pos is None:
            self.k[layer][:, :, :k.shape[2]], self.v[layer][:, :, :k.shape[2]] = k, v
        else:
            rows = torch.arange(len(pos), device=pos.device)[:, None]                    # (B, 1)
            at = pos[:, None] + torch.arange(k.shape[2], device=pos.device)              # (B, T)
            self.k[layer][rows, :, at] = k.transpose(1, 2)
            self.v[layer][rows, :, at] = v.transpose(1, 2)

    def keep(self, rows):
        """Drop every row but these (a mask or indices)."""
        for layer in range(len(self.k)):                # one at a time: never the old and the new cache as a whole
            self.k[layer], self.v[layer] = self.k[layer][rows], self.v[layer][rows]


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), halves convention of HF: x (B, heads, T, hd), cos and sin (..., T, hd/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.K, self.hd, self.layer = c.num_key_value_heads, c.head_dim, layer
        self.q_proj = LoRALinear(c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = LoRALinear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)

    def forward(self, x, rope, role, cache=None, pos=None, span=None, seen=None):
        B, T, _ = x.shape
        q, k, v = (proj(x, role).view(B, T, -1, self.hd).transpose(1, 2)                 # (B, heads, T, hd)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache.write(self.layer, k, v, pos)
        if pos is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != self.K)
        else:  # query heads of one kv head become query rows: the cache is read once and never repeated
            q = q.reshape(B, self.K, -1, self.hd)                                        # (B, K, H/K * T, hd)
            k, v = cache.k[self.layer][:, :, :span], cache.v[self.layer][:, :, :span]    # (B, K, S, hd)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).reshape(B, -1, T, self.hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1), role)                    # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = LoRALinear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = LoRALinear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = LoRALinear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x, role):
        return self.down_proj(F.silu(self.gate_proj(x, role)) * self.up_proj(x, role), role)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, role, *cached):
        x = x + self.self_attn(self.input_layernorm(x), rope, role, *cached)
        return x + self.mlp(self.post_attention_layernorm(x), role)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.role = None                        # which adapter is on; None is the raw base
        self.checkpointing = False              # recompute each block's activations in the backward pass

    @property
    def head(self):
        """The output matrix (V, D)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self):
        return self.head.device

    @contextmanager
    def wear(self, role):
        """Switch on the adapter of `role` (None: the raw base) inside a with block."""
        before, self.role = self.role, role
        try:
            yield self
        finally:
            self.role = before

    def linears(self):
        """(path, layer) of every linear layer that a role adapts, in the checkpoint's order."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, LoRALinear)]

    def add_role(self, role, rank, alpha, start=None):
        """Give every linear layer an adapter for `role`: fresh (the base as it is), or a copy of role `start`."""
        assert role not in self.linears()[0][1].scale, f"there is a role {role!r} already"
        for _, linear in self.linears():
            linear.add_role(role, rank, alpha)
            if start is not None:
                linear.lora_A[role].data.copy_(linear.lora_A[start].data)
                linear.lora_B[role].data.copy_(linear.lora_B[start].data)

    def adapter(self, role):
        """{module path + '.lora_A' or '.lora_B': parameter} of one role: (r, in) and (out, r)."""
        return {f"{path}.{ab}": getattr(m, ab)[role] for path, m in self.linears() for ab in ("lora_A", "lora_B")}

    def weights(self):
        """The base under its checkpoint names, without any adapter."""
        return {name: w for name, w in self.state_dict().items() if ".lora_" not in name}

    def merged(self, role):
        """The base with one role's adapter added in, in fp32: rounding the sum to bf16 would lose most of it."""
        weights = {name: w.float() for name, w in self.weights().items()}
        for path, linear in self.linears():
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + linear.delta(role).detach()
        return weights

    def hidden(self, ids, cache=None, pos=None, span=None):
        """Final hidden states (B, T, D) of ids (B, T).

        cache alone: the rows begin here, and their keys and values are stored from column 0.
        cache and pos (B,): row b goes on at column pos[b]; `span` columns of the cache are read (all by default).
        """
        B, T = ids.shape
        c = self.config
        assert pos is None or cache is not None, "a position without a cache has no past to attend to"
        at = torch.arange(T, device=ids.device)                                          # (T,)
        seen = None
        if pos is not None:
            at = pos[:, None] + at                                                       # (B, T)
            span = span or cache.k[0].shape[2]
            seen = torch.arange(span, device=ids.device) <= at[:, None, :, None]         # (B, 1, T, S)
            seen = seen.repeat(1, 1, c.num_attention_heads // c.num_key_value_heads, 1)  # (B, 1, H/K * T, S)
            at = at[:, None]                                                             # (B, 1, T), for all heads
        freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=ids.device) / c.head_dim)
        angle = at[..., None] * freq                                                     # (..., T, hd/2)
        x = self.model.embed_tokens(ids)                                                 # (B, T, D)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.model.layers:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                # the role travels as an argument: the recomputation happens when the context manager has long exited
                x = checkpoint(block, x, rope, self.role, use_reentrant=False)
            else:
                x = block(x, rope, self.role, cache, pos, span, seen)
        return self.model.norm(x)

    def forward(self, ids):
        """Logits (B, T, V) in fp32."""
        return F.linear(self.hidden(ids), self.head).float()


def load(folder, device="cpu", dtype=torch.float32):
    """A frozen GPT from a Hugging Face folder (config.json, safetensors), strictly: WeightsError says what is wrong."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint folder")
    try:
        config = GPTConfig.from_hf(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: {error}") from None
    with torch.device("meta"):
        gpt = GPT(config)
    gpt = gpt.to(dtype).to_empty(device=device)
    loaded = load_weights(folder)
    if config.tie_word_embeddings and "lm_head.weight" in loaded:       # some files hold the tied head twice
        if not torch.equal(loaded.pop("lm_head.weight"), loaded.get("model.embed_tokens.weight", torch.empty(0))):
            raise WeightsError(f"{folder}: config.json ties the head to the embedding, but the two tensors differ")
    assign(gpt.weights(), loaded, str(folder))
    return gpt.requires_grad_(False)
