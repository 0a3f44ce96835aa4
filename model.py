"""A Llama-style decoder whose parameters are named as in the Hugging Face checkpoint, with LoRA adapters worn by role.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied or untied head; gradient checkpointing per block;
linear layers in int8. Left out: dropout, other families. The KV cache is in rlhf/rollout.py.

Rows are right-padded: causal attention never looks right, so neither a padding mask nor position ids are needed. All
layers but attention treat every token alone, so tokens may come as rows (B, T) or in any other shape; how they see each
other is a function: `causal` for rows, a Packing for rows without their padding, a KVCache for rows that go on.
Letters: B batch, T tokens, V vocabulary, D width, H heads, K kv heads, hd head size, r LoRA rank.
"""
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise, repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.weights import WeightsError, assign, load_weights

# PyTorch might prefer cuDNN's attention, which makes a plan for every new shape; ours change with every micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)                   # sums in fp32, whatever x is


class Int8Product(torch.autograd.Function):
    """x W' for an int8 W with one scale per row: x (N, in), W (out, in), scale (out, 1) -> (N, out).

    W is made 16-bit once more in the backward pass: autograd would keep that copy of every layer.
    """

    @staticmethod
    def forward(ctx, x, W, scale):
        ctx.save_for_backward(W, scale)
        return x @ (W.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx, grad):
        W, scale = ctx.saved_tensors
        return grad @ (W.to(grad.dtype) * scale), None, None


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x, with one (A, B) per role and W shared by all (Hu et al. 2021, eq. 3)."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)
        self.lora_A, self.lora_B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        self.register_buffer("int8_scale", None, persistent=False)                       # (out, 1) once W is int8

    def add_role(self, role, rank, alpha):
        A = torch.empty(rank, self.in_features, device=self.weight.device)               # fp32 whatever W is
        self.lora_A[role] = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B[role] = nn.Parameter(A.new_zeros(self.out_features, rank))           # so a fresh role = the base
        self.scale[role] = alpha / rank

    def delta(self, role):
        return self.scale[role] * self.lora_B[role] @ self.lora_A[role]                  # (out, in)

    def quantise(self):
        """Keep W as int8 with a scale per row: half of 16 bits, rounded to 1/254 of the row's largest weight."""
        W = self.weight.data
        self.int8_scale = (W.abs().amax(1, keepdim=True) / 127).clamp(min=1e-7)          # fp16 knows nothing smaller
        W = (W.float() / self.int8_scale.float()).round().clamp(-127, 127)
        self.weight = nn.Parameter(W.to(torch.int8), requires_grad=False)

    def forward(self, x, role=None):
        y = product(x, self.weight, self.bias, self.int8_scale)
        if role is None:
            return y
        low = F.linear(x, self.lora_A[role].to(x.dtype))                                 # (..., r)
        return plus(y, low, self.lora_B[role].to(x.dtype), self.scale[role])


def product(x, W, bias, int8_scale):
    """W x + bias."""
    if int8_scale is None:
        return F.linear(x, W, bias)
    y = Int8Product.apply(x.flatten(0, -2), W, int8_scale).view(*x.shape[:-1], len(W))
    return y if bias is None else y + bias


def plus(y, x, W, scale):
    """y + scale W x in one kernel."""
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), W.T, alpha=scale).view(y.shape)


def behind(x, y):
    """Whether the numbers of y come right behind those of x in memory."""
    stored = [z.untyped_storage().data_ptr() for z in (x, y)]
    return stored[0] == stored[1] and x.storage_offset() + x.numel() == y.storage_offset()


class Together:
    """LoRALinears that read the same input. For sampling they are one product; training keeps them apart, so that
    parameters stay what they are in the checkpoint."""

    def __init__(self, *linears):
        self.linears, self.settled = linears, None

    def __call__(self, x, role):
        """(..., in) -> the output (..., out) of each."""
        if self.settled is None:
            return [linear(x, role) for linear in self.linears]
        W, bias, int8_scale, A, B, sizes = self.settled
        y = product(x, W, bias, int8_scale)
        y = y if A is None else plus(y, F.linear(x, A), B, 1.)
        return y.split_with_sizes(sizes, -1)

    def adjoin(self):
        """Lay the weights behind each other in memory, where one product can read them all without a copy."""
        rows = torch.cat([linear.weight.data for linear in self.linears])
        for linear, W in zip(self.linears, rows.split([linear.out_features for linear in self.linears])):
            linear.weight.data = W

    def settle(self, role):
        """Do once what each token would do again: put weights together, and the adapter into them; or beside them, as
        A and B, where rounding would lose it (a bf16 sum drops most of it)."""
        weights = [linear.weight.detach() for linear in self.linears]
        if all(behind(*neighbours) for neighbours in pairwise(weights)):
            W = weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
        else:
            W = torch.cat(weights)
        bias, scale = (None if x[0] is None else torch.cat(x) for x in (
            [linear.bias for linear in self.linears], [linear.int8_scale for linear in self.linears]))
        A = B = None
        if role is not None and W.dtype == torch.float32:
            W = W + torch.cat([linear.delta(role) for linear in self.linears])
        elif role is not None:
            dtype = W.dtype if scale is None else scale.dtype
            A = torch.cat([linear.lora_A[role] for linear in self.linears]).to(dtype)    # (r + r + ..., in)
            B = torch.block_diag(*(linear.scale[role] * linear.lora_B[role] for linear in self.linears)).to(dtype)
        self.settled = W, bias, scale, A, B, [linear.out_features for linear in self.linears]


# -- how tokens see each other: q (..., H, hd), k and v (..., K, hd) -> (..., H, hd) ---------------------------------

def causal(q, k, v):
    """Rows (B, T, heads, hd) from their first token on: each token sees those before it and itself."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                    # (B, heads, T, hd)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class Packing:
    """Rows (B, T) as N tokens: without their padding, and with a prompt that several rows share only once.

    `at` (B, T) is the token that stands at each place of the rows (any, where there is padding); `source` (N,) is one
    place, in the rows laid end to end, of each token.
    """

    def __init__(self, at, source):
        self.at, self.source = at, source

    def __call__(self, q, k, v):
        """Linear layers have met N tokens; attention meets the rows. They are looked up as embeddings are, since the
        gradient of plain indexing is far slower."""
        q, k, v = (F.embedding(self.at, x.flatten(1)).unflatten(-1, x.shape[1:]) for x in (q, k, v))     # (B, T, ...)
        return causal(q, k, v).flatten(0, 1)[self.source]                                # (N, H, hd)


# -- the decoder ---------------------------------------------------------------------------------------------------

def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), halves convention of HF: x (..., heads, hd), cos and sin (..., 1, hd), the
    first half of sin for the negative angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.hd = c.head_dim
        self.q_proj = LoRALinear(c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = LoRALinear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.qkv, self.out = Together(self.q_proj, self.k_proj, self.v_proj), Together(self.o_proj)

    def forward(self, x, rope, role, attend, where):
        q, k, v = (y.view(*y.shape[:-1], -1, self.hd) for y in self.qkv(x, role))        # (..., heads, hd)
        y = attend(rotate(q, *rope), rotate(k, *rope), v).flatten(-2)                    # (..., H * hd)
        y, = self.out(y if where is None else places(y, where), role)                    # (..., D) or (N, D)
        return y


def places(x, where):
    """Of x (..., D) those at the places `where` (N,), counted over all tokens: (N, D)."""
    return x.flatten(0, -2).index_select(0, where)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = LoRALinear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = LoRALinear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = LoRALinear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.gate_up, self.down = Together(self.gate_proj, self.up_proj), Together(self.down_proj)

    def forward(self, x, role):
        gate, up = self.gate_up(x, role)                                                 # (..., F)
        y, = self.down(F.silu(gate) * up, role)                                          # (..., D)
        return y


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, role, attend, where=None):
        y = self.self_attn(self.input_layernorm(x), rope, role, attend, where)
        x = y + (x if where is None else places(x, where))
        return x + self.mlp(self.post_attention_layernorm(x), role)


def run_block(block, *args):
    return block(*args)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.role = None                        # which adapter is on; None is the raw base
        self.checkpointing = False              # recompute each block's activations in the backward pass
        self.train_block = run_block            # what calls a block when gradients are on
        self.freq = None                        # rotary frequencies, once they are needed

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

    @contextmanager
    def settled(self, role):
        """Inside a with block that learns nothing, wear an adapter in the form that is fastest."""
        for together in self.togethers():
            together.settle(role)
        try:
            with self.wear(role):
                yield self
        finally:
            for together in self.togethers():
                together.settled = None

    def togethers(self):
        return [each for block in self.model.layers for each in (
            block.self_attn.qkv, block.self_attn.out, block.mlp.gate_up, block.mlp.down)]

    def adjoin(self):
        """Lay weights so in memory that settled() need not copy them; moving or copying a model undoes it."""
        for together in self.togethers():
            together.adjoin()

    def compile_blocks(self):
        """Compile the blocks for training: minutes once, then faster. One function serves all blocks and shapes.
        Sampling is left as it is: there a CUDA graph has done away with what a compiler could save."""
        torch._dynamo.config.cache_size_limit = 64      # roles, stages, packed rows and single ones: a few graphs each
        self.train_block = torch.compile(run_block, dynamic=True)

    def quantise(self):
        """Keep the frozen linear layers in int8 (not the embedding, not the head)."""
        for _, linear in self.linears():
            linear.quantise()

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

    def embed(self, ids, pos=None):
        """Ids (...) at positions `pos` of the same shape (default: rows (B, T) from their beginning) -> their
        embeddings (..., D), and what rotate() needs."""
        if pos is None:
            pos = torch.arange(ids.shape[-1], device=ids.device)                         # (T,)
        if self.freq is None or self.freq.device != ids.device:
            hd = self.config.head_dim
            freq = self.config.rope_theta ** (-torch.arange(0, hd, 2, device=ids.device) / hd)
            self.freq = torch.cat((-freq, freq))                                         # (hd,)
        angle = pos[..., None, None] * self.freq                                         # (..., 1, hd)
        x = self.model.embed_tokens(ids)                                                 # (..., D)
        return x, (angle.cos().to(x.dtype), angle.sin().to(x.dtype))

    def hidden(self, ids, pos=None, attends=None, where=None):
        """Final hidden states (..., D) of ids (...), at positions `pos` as in embed(), that see each other through
        `attends`, a function for each layer (default: causal).

        where (N,): only the states at these places, counted over all ids, are wanted: (N, D). After its attention the
        last block has no use for the others.
        """
        x, rope = self.embed(ids, pos)
        *blocks, last = self.model.layers
        for block, attend in zip((*blocks, last), attends or repeat(causal)):
            # the role travels as an argument: the recomputation happens when the context manager has long exited
            args = block, x, rope, self.role, attend, where if block is last else None
            if not torch.is_grad_enabled():
                x = run_block(*args)
            elif self.checkpointing:
                x = checkpoint(self.train_block, *args, use_reentrant=False)
            else:
                x = self.train_block(*args)
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
    gpt.adjoin()
    return gpt.requires_grad_(False)
