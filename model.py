"""A decoder for many families of open weights, with LoRA adapters that are switched by role.

Families: Llama and its relatives (Mistral, Qwen, Phi, OLMo, SmolLM, Granite, Gemma, nanochat), GPT-2 and GPT-NeoX.
GPTConfig lists how they differ; data/families.py reads it from config.json. Mixtures of experts are in mixture.py, the
KV cache is in rlhf/kv_cache.py.
Left out: dropout.

Rows are right-padded. Causal attention only looks left, so pads change nothing, and neither a padding mask nor position
ids are needed. Every layer but attention treats each token by itself, so tokens may come as rows (B, T) or in any other
shape. Which tokens attend to which is decided by a function `attend`: `causal` for rows, PackedRows for rows without
their padding, and those of the KVCache for sampling.
Letters: B batch, T tokens, V vocabulary, D width, F MLP width, H heads, K kv heads, hd head size, r LoRA rank. A shape
(..., D) stands for any number of tokens.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import families, read_json
from data.weights import WeightsError, assign, check, load_weights
from mixture import Mixture
from products import LEAST_SIDE, MOST_COPIED, exact_product, linear, packed, packs

# cuDNN's attention compiles a plan for every new shape, and our shapes change with every micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)

# On CUDA only FlashAttention (compute capability 8.0 or later, 16 bits, no mask) reads grouped keys and values without
# repeating them. Otherwise torch would choose a fallback that holds B x H x T x T numbers, so causal() repeats them.
FLASH = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
# On CPUs torch's kernel takes four times as long in bf16 as the parts of attention do for rows of up to so many tokens.
SHORT = 128
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
               "relu2": lambda x: F.relu(x).square()}


@dataclass
class GPTConfig:
    """What the forward pass depends on. Names are those of config.json where it has one; the defaults are Llama's."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0            # 0: as many as attention heads
    head_dim: int = 0                       # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    limited: bool = False                   # whether longer rows are an error: model.py would compute them wrongly
    tie_word_embeddings: bool = False       # the head is the embedding
    embedding_multiplier: float = 1.        # embeddings are multiplied by it
    learned_positions: bool = False         # positions are embedded, and added
    norm: str = "rms"                       # rms (RMSNorm); rms+1 (weight stored minus 1); bare (no weight); layer
    rms_norm_eps: float = 1e-6
    norm_embedding: bool = False            # the final norm, which is then bare, is also applied to the embeddings
    norm_before: bool = True                # a norm before attention, and one before the MLP
    norm_after: bool = False                # a norm after each of them
    parallel_residual: bool = False         # attention and MLP read the same input; both outputs are added to it
    residual_multiplier: float = 1.         # outputs of attention and MLP are multiplied by it before they are added

    attention_bias: bool = False            # of queries, keys and values
    o_bias: bool = False                    # of attention's output
    fused_qkv: str = ""                     # one linear layer for q, k, v. rows: all q, all k, all v; heads: by head
    qk_norm: str = ""                       # norm of queries and keys. head: over each head; all: over all heads
    query_scale: float = 0                  # scores are divided by sqrt(query_scale); 0: head_dim
    attn_logit_softcapping: float = 0       # scores become cap x tanh(score / cap); 0: they do not
    windows: tuple = ()                     # of each layer: how many tokens a token attends to, itself included; 0: all
    ropes: tuple = ({"rope_type": "default", "rope_theta": 10000.},)        # kinds of RoPE, as in config.json
    layer_ropes: tuple = ()                 # of each layer: the index of its kind in `ropes`; -1: no RoPE
    rotary_dim: int = 0                     # how many of a head's numbers are rotated; 0: all
    backwards: bool = False                 # RoPE rotates by the negative angle
    hidden_act: str = "silu"                # one of ACTIVATIONS
    gated: bool = True                      # the MLP is down(act(gate(x)) * up(x)), else down(act(up(x)))
    fused_gate_up: bool = False             # one linear layer for gate and up
    mlp_bias: bool = False
    num_experts: int = 0                    # how many experts replace the MLP of each layer; 0: no mixture of experts
    num_experts_per_tok: int = 0            # how many of them compute a token
    moe_intermediate_size: int = 0          # MLP width of one expert
    norm_topk_prob: bool = False            # the weights of a token's experts are divided by their sum
    logits_scaling: float = 1.              # logits are divided by it
    final_logit_softcapping: float = 0      # then they become cap x tanh(logit / cap); 0: they do not

    names: dict = field(default_factory=lambda: families.LLAMA_NAMES)       # {part of our name: the checkpoint's}
    transposed: bool = False                # the checkpoint stores linear weights as (in, out)
    wrapper: str = ""                       # transformers' name for the decoder within a model that also sees images

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.query_scale = self.query_scale or self.head_dim
        self.rotary_dim = self.rotary_dim or self.head_dim
        self.limited = self.limited or self.learned_positions
        self.windows = self.windows or (0,) * self.num_hidden_layers
        self.layer_ropes = self.layer_ropes or (0,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, config):
        """Read a config.json dict; ValueError names a setting that changes the result and is not implemented."""
        return cls(**families.fields(config))


# -- rotary positions ----------------------------------------------------------------------------------------------

def frequencies(rope, dim):
    """How fast each pair of numbers is rotated: radians per position (dim / 2,), and a factor for cos and sin.

    Types: default (Su et al. 2021); linear (all frequencies are divided by the factor); llama3 (only slow ones are);
    longrope (Ding et al. 2024) for texts within the original context; yarn (Peng et al. 2023, section 3.2). Left out:
    dynamic, which depends on the length of the text.
    """
    freq = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)                        # (dim / 2,)
    kind = rope["rope_type"]
    if kind == "default":
        return freq, 1.
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    if kind == "linear":
        return freq / factor, 1.
    if kind == "longrope":
        above = math.log(max(factor, 1)) / math.log(context)
        return freq / torch.tensor(rope["short_factor"]), rope.get("attention_factor", math.sqrt(1 + above))
    if kind == "llama3":                    # `kept` is 1 for frequencies that turn often in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return freq * (kept + (1 - kept) / factor), 1.

    def place(turns):                       # index of the frequency with so many turns in the original context
        return dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))
    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    kept = 1 - ((torch.arange(dim // 2) - low) / (high - low or .001)).clamp(0, 1)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    above, below = (above, below) if above and below else (1, 0)
    log = .1 * math.log(max(factor, 1))
    return freq * kept + freq / factor * (1 - kept), rope.get("attention_factor", (above * log + 1) / (below * log + 1))


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021) of x (..., heads, hd). As in HF, numbers i and i + dim / 2 are a pair.

    cos and sin (..., 1, dim): the first half of sin is negated. Numbers of a head beyond dim are not rotated. With dim
    4 the pairs are 0, 2 and 1, 3: x0 becomes x0 cos0 - x2 sin0, and x2 becomes x2 cos0 + x0 sin0.
    """
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


# -- linear layers with LoRA ---------------------------------------------------------------------------------------

class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x (Hu et al. 2021, eq. 3). All roles share W; each role has its own A and B."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)
        self.lora_A, self.lora_B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}
        self.register_buffer("int8_scale", None, persistent=False)                       # (out, 1) once W is int8

    def add_role(self, role, rank, alpha):
        """A fresh adapter in fp32. B is 0, so that it changes nothing yet."""
        A = torch.empty(rank, self.in_features, device=self.weight.device)               # (r, in)
        self.lora_A[role] = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B[role] = nn.Parameter(A.new_zeros(self.out_features, rank))           # (out, r)
        self.scale[role] = alpha / rank

    def delta(self, role):
        """What the adapter adds to W."""
        return self.scale[role] * self.lora_B[role] @ self.lora_A[role]                  # (out, in)

    @torch.no_grad()
    def merge(self, role):
        """Add the adapter to W and remove it. W must be fp32: rounding the sum to bf16 would lose most of it."""
        assert self.weight.dtype == torch.float32
        self.weight += self.delta(role)
        del self.lora_A[role], self.lora_B[role], self.scale[role]

    def quantise(self):
        """Store W as int8 with one scale per row. A weight is off by at most 1/254 of the row's largest one."""
        W = self.weight.data
        self.int8_scale = (W.abs().amax(1, keepdim=True) / 127).clamp(min=1e-7)          # above 0 in fp16, too
        W = (W.float() / self.int8_scale.float()).round().clamp(-127, 127)
        self.weight = nn.Parameter(W.to(torch.int8), requires_grad=False)

    def forward(self, x, role=None):
        y = linear(x, self.weight, self.bias, self.int8_scale)                           # (..., out)
        if role is None:
            return y
        return adapted(y, x, self.lora_A[role].to(x.dtype), self.lora_B[role].to(x.dtype), self.scale[role])


def adapted(y, x, A, B, scale):
    """y + scale B A x: x (..., in), A (r, in), B (out, r), and y (..., out), what the layer gives without adapter. The
    product B A (out, in) is never made."""
    return add_product(y, F.linear(x, A), B, scale)


def add_product(y, x, W, scale):
    """y + scale W x, in one kernel."""
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), W.T, alpha=scale).view(y.shape)


def is_adjacent(x, y):
    """Whether y begins in memory where x ends."""
    stored = [z.untyped_storage().data_ptr() for z in (x, y)]
    return stored[0] == stored[1] and x.storage_offset() + x.numel() == y.storage_offset()


class FusedLinears:
    """LoRALinears that read the same input: one matrix product while sampling, separate layers in training."""

    def __init__(self, *layers):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.fused = None               # while sampling: (W, bias, int8 scale, A, B), each of all layers

    def __call__(self, x, role):
        """x (..., in) -> the output (..., out) of each layer."""
        if self.fused is None:
            return [layer(x, role) for layer in self.layers]
        W, bias, int8_scale, A, B = self.fused
        y = linear(x, W, bias, int8_scale)                                               # (..., out + out + ...)
        if B is not None:                               # A is None if it is below W: y then ends with A x
            y, z = (y, F.linear(x, A)) if A is not None else (y[..., :len(B)], y[..., len(B):])
            y.view(-1, len(B)).addmm_(z.flatten(0, -2), B.T)
        return y.split_with_sizes(self.sizes, -1)

    def make_contiguous(self):
        """Store the weights one after the other, so that fuse() need not copy them."""
        rows = torch.cat([layer.weight.data for layer in self.layers])
        for layer, W in zip(self.layers, rows.split(self.sizes)):
            layer.weight.data = W

    def fuse(self, role, pack=False, stack=False):
        """Join the layers' weights, and add the adapter to them if they are fp32. In lower precision rounding would
        lose most of it: it stays a separate product, and its A and B are joined, too. pack: see products.packed().
        stack: copy W with A below it, so that W x and A x are one product."""
        weights = [layer.weight.detach() for layer in self.layers]
        if all(is_adjacent(*neighbours) for neighbours in pairwise(weights)):
            W = weights[0].as_strided((sum(self.sizes), weights[0].shape[1]), weights[0].stride())
        else:
            W = torch.cat(weights)                                                       # (out + out + ..., in)
        bias = scale = A = B = None
        if self.layers[0].bias is not None:
            bias = torch.cat([layer.bias for layer in self.layers])
        if self.layers[0].int8_scale is not None:
            scale = torch.cat([layer.int8_scale for layer in self.layers])
        if role is not None and W.dtype == torch.float32:
            W = W + torch.cat([layer.delta(role) for layer in self.layers])
        elif role is not None:
            dtype = W.dtype if scale is None else scale.dtype
            A = torch.cat([layer.lora_A[role] for layer in self.layers]).to(dtype)       # (r + r + ..., in)
            B = torch.block_diag(*(layer.scale[role] * layer.lora_B[role] for layer in self.layers)).to(dtype)
            if stack and scale is None and len(A) % 8 == 0:         # kernels want rows of multiples of 16 bytes
                W, bias, A = torch.cat((W, A)), None if bias is None else F.pad(bias, (0, len(A))), None
        self.fused = packed(W) if pack else W, bias, scale, A, B


# -- the decoder ---------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, size, eps, kind):
        super().__init__()
        self.size, self.eps, self.kind = size, eps, kind
        self.weight = None if kind == "bare" else nn.Parameter(torch.ones(size))

    def forward(self, x):
        if self.kind == "rms+1":            # in fp32: weight + 1 would round in 16 bits
            return F.rms_norm(x.float(), (self.size,), self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, (self.size,), self.weight, self.eps)                        # sums in fp32, whatever x is


def norm(c, size, there=True):
    """The family's norm over the last dimension, of this size; None if the family has none at this place."""
    if not there:
        return None
    return nn.LayerNorm(size, c.rms_norm_eps) if c.norm == "layer" else RMSNorm(size, c.rms_norm_eps, c.norm)


def normed(norm, x):
    return x if norm is None else norm(x)


def causal(q, k, v, window=0, cap=0.):
    """Causal attention within rows: q (B, T, H, hd), k and v (B, T, K, hd) -> (B, T, H, hd).

    A token attends to itself and the tokens before it; with a window, to that many tokens, itself included.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                    # (B, heads, T, hd)
    mask, T, groups = None, q.shape[2], q.shape[1] // k.shape[1]
    in_parts = cap or q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT
    if 0 < window < T or in_parts:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - (window or T))
    if in_parts:
        bias = torch.zeros(T, T, device=q.device).masked_fill(~mask, -torch.inf)
        q = q.unflatten(1, (-1, groups))                                                 # (B, K, H/K, T, hd)
        return attention_in_parts(q, k[:, :, None], v[:, :, None], bias, cap).flatten(1, 2).transpose(1, 2)
    if groups > 1 and q.is_cuda and not (FLASH and mask is None and q.dtype != torch.float32):
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    grouped = {"enable_gqa": True} if groups > 1 else {}    # a literal: torch 2.5 compiles no other
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **grouped).transpose(1, 2)


def attention_in_parts(q, k, v, bias, cap):
    """Attention as it is written: q (..., n, hd), k and v (..., S, hd), and a bias (..., n, S), 0 where a query attends
    and -inf elsewhere -> (..., n, hd). With a cap, tanh squeezes the scores into (-cap, cap), which no kernel of torch
    does."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -.5                                     # (..., n, S)
    if cap:
        scores = cap * (scores / cap).tanh()
    return (scores + bias).softmax(-1).to(v.dtype) @ v


class PackedRows:
    """Causal attention for rows that are given as N tokens: without padding, a shared prompt only once.

    token (B, T): which of the N tokens stands at each place of the rows (any token where there is padding).
    place (N,): one place of each token, as an index into the rows laid end to end. logprobs.encode() has an example.
    """

    def __init__(self, token, place):
        self.token, self.place = token, place

    def __call__(self, q, k, v, window=0, cap=0.):
        """q (N, H, hd), k, v (N, K, hd) -> (N, H, hd). Gathers with F.embedding: indexing has a far slower gradient."""
        q, k, v = (F.embedding(self.token, x.flatten(1)).unflatten(-1, x.shape[1:]) for x in (q, k, v))  # (B, T, ...)
        return causal(q, k, v, window, cap).flatten(0, 1)[self.place]                    # (N, H, hd)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.hd, self.fused, self.window, self.rope = c.head_dim, c.fused_qkv, c.windows[layer], c.layer_ropes[layer]
        self.scale, self.cap = (c.head_dim / c.query_scale) ** .5, c.attn_logit_softcapping
        self.sizes = [heads * c.head_dim for heads in (c.num_attention_heads, *2 * [c.num_key_value_heads])]
        if self.fused:
            self.qkv_proj = LoRALinear(c.hidden_size, sum(self.sizes), c.attention_bias)
            self.qkv = FusedLinears(self.qkv_proj)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                LoRALinear(c.hidden_size, size, c.attention_bias) for size in self.sizes)
            self.qkv = FusedLinears(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = LoRALinear(self.sizes[0], c.hidden_size, c.o_bias)
        self.out = FusedLinears(self.o_proj)
        self.linears = self.qkv, self.out
        self.q_norm, self.k_norm = (
            norm(c, c.head_dim if c.qk_norm == "head" else size, c.qk_norm) for size in self.sizes[:2])

    def forward(self, x, ropes, role, attend, where):
        q, k, v = self.heads(self.qkv(x, role))
        rope = ropes[self.rope]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q = q if self.scale == 1 else q * self.scale
        y = attend(q, k, v, self.window, self.cap).flatten(-2)                           # (..., H * hd)
        y, = self.out(y if where is None else at_places(y, where), role)                    # (..., D) or (N, D)
        return y

    def heads(self, outputs):
        """Queries (..., H, hd), keys and values (..., K, hd), from the output of one fused layer or of three."""
        shape = *outputs[0].shape[:-1], -1
        if self.fused == "heads":
            q, k, v = outputs[0].view(*shape, 3, self.hd).unbind(-2)
        else:
            outputs = outputs[0].split(self.sizes, -1) if self.fused else outputs
            q, k, v = (y.view(*shape, self.hd) for y in outputs)
        if self.q_norm is not None:         # over each head or over all: the size of the norm says which
            q, k = (norm(x.flatten(-2).unflatten(-1, (-1, norm.size))).view(x.shape)
                    for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v


def at_places(x, where):
    """The vectors (N, D) of x (..., D) at the places `where` (N,), which count through all tokens: token t of row b is
    at place b T + t."""
    return x.flatten(0, -2).index_select(0, where)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size
        self.act, self.fused = ACTIVATIONS[c.hidden_act], c.fused_gate_up
        if self.fused:
            self.gate_up_proj = LoRALinear(D, 2 * inner, c.mlp_bias)
            self.gate_up = FusedLinears(self.gate_up_proj)
        elif c.gated:
            self.gate_proj, self.up_proj = LoRALinear(D, inner, c.mlp_bias), LoRALinear(D, inner, c.mlp_bias)
            self.gate_up = FusedLinears(self.gate_proj, self.up_proj)
        else:
            self.up_proj = LoRALinear(D, inner, c.mlp_bias)
            self.gate_up = FusedLinears(self.up_proj)
        self.down_proj = LoRALinear(inner, D, c.mlp_bias)
        self.down = FusedLinears(self.down_proj)
        self.linears = self.gate_up, self.down

    def forward(self, x, role):
        outputs = self.gate_up(x, role)
        gate, *up = outputs[0].chunk(2, -1) if self.fused else outputs                   # (..., F)
        y, = self.down(self.act(gate) * up[0] if up else self.act(gate), role)           # (..., D)
        return y


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.parallel, self.multiplier = c.parallel_residual, c.residual_multiplier
        self.input_layernorm = norm(c, c.hidden_size, c.norm_before)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = norm(c, c.hidden_size, c.norm_after)
        self.pre_feedforward_layernorm = norm(c, c.hidden_size, c.norm_before)
        self.mlp = Mixture(c, ACTIVATIONS[c.hidden_act]) if c.num_experts else MLP(c)
        self.post_feedforward_layernorm = norm(c, c.hidden_size, c.norm_after)

    def forward(self, x, ropes, role, attend, where=None):
        y = self.self_attn(normed(self.input_layernorm, x), ropes, role, attend, where)
        x = x if where is None else at_places(x, where)
        if self.parallel:
            return x + y + self.mlp(self.pre_feedforward_layernorm(x), role)
        x = torch.add(x, normed(self.post_attention_layernorm, y), alpha=self.multiplier)
        y = self.mlp(normed(self.pre_feedforward_layernorm, x), role)
        return torch.add(x, normed(self.post_feedforward_layernorm, y), alpha=self.multiplier)


def logits(h, W, divisor=1., cap=0.):
    """Logits (..., V) in fp32, a new tensor, from final hidden states h (..., D) and a head W (V, D): h W' / divisor.
    With a cap, tanh squeezes them into (-cap, cap)."""
    x = exact_product(h, W)
    if divisor != 1:
        x = x / divisor
    return cap * (x / cap).tanh() if cap else x


def run_block(block, *args):
    return block(*args)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.learned_positions:
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = norm(c, c.hidden_size)


class GPT(nn.Module):
    """A decoder, frozen or trained, and the adapters of all roles that share it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.role = None                        # the adapter that is switched on; None: the base alone
        self.checkpointing = False              # recompute each block's activations in the backward pass
        self.train_block = run_block            # calls a block when gradients are on; perhaps compiled
        self.ropes = None                       # frequencies of each kind of RoPE, made when first needed
        self.fused_head = None                  # on CPUs while sampling: the head in fp32, perhaps packed

    @property
    def head(self):
        """The output matrix (V, D)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self):
        return self.head.device

    @contextmanager
    def using(self, role):
        """Switch on the adapter of `role` (None: the base alone) inside a with block."""
        before, self.role = self.role, role
        try:
            yield self
        finally:
            self.role = before

    @contextmanager
    def fused(self, role):
        """using(role), for sampling: weights and adapter are fused inside the with block, and apart again after it."""
        pack, stack, convert = self.copies(self.head.dtype, self.device.type)
        try:
            for layers in self.fused_linears():
                layers.fuse(role, pack, stack)
            if pack or convert:                         # to fp32 once, and not in every step
                head = self.head.float() if convert else self.head
                self.fused_head = packed(head) if pack else head
            with self.using(role):
                yield self
        finally:
            self.fused_head = None
            for layers in self.fused_linears():
                layers.fused = None

    def copies(self, dtype, device):
        """What fused() copies if the weights are in this dtype: (pack, stack, convert). pack: the linear layers and the
        head, for oneDNN. stack: the layers, to put adapters below them; on GPUs. convert: the head, to fp32."""
        layers, head = dtype.itemsize * sum(x.weight.numel() for _, x in self.linears()), 4 * self.head.numel()
        if device != "cpu":
            return False, layers <= MOST_COPIED, False
        pack = min(self.head.shape) >= LEAST_SIDE and packs(dtype, layers + head)
        return pack, False, dtype != torch.float32 and head <= MOST_COPIED

    def fused_linears(self):
        """The FusedLinears of all blocks."""
        return [layers for block in self.model.layers for layers in (*block.self_attn.linears, *block.mlp.linears)]

    def make_contiguous(self):
        """Store q, k, v (and gate, up) one after the other, so that fusing is a view. Moving or copying undoes it."""
        for layers in self.fused_linears():
            layers.make_contiguous()

    def compile_blocks(self):
        """Compile the blocks for training: takes minutes once, then training is faster. One compiled function serves
        all blocks and shapes. Sampling is not compiled: a CUDA graph already saves what a compiler could save there."""
        torch._dynamo.config.cache_size_limit = 64      # one graph for each role, stage and form of rows
        self.train_block = torch.compile(run_block, dynamic=True)

    def quantise(self):
        """Store the frozen linear layers in int8. Embedding and head stay as they are."""
        for _, layer in self.linears():
            layer.quantise()

    def name(self, path):
        """The checkpoint's name of one of our parameters or modules."""
        return ".".join(self.config.names.get(part, part) for part in path.split("."))

    def renamed(self, tensors):
        """{our name: tensor} -> {the checkpoint's name: view of it in the checkpoint's layout}."""
        return {self.name(name): x.mT if self.config.transposed and name.endswith("_proj.weight") else x
                for name, x in tensors.items()}

    def weights(self):
        """{the checkpoint's name: tensor} of the base, without adapters."""
        return self.renamed({name: w for name, w in self.state_dict().items() if ".lora_" not in name})

    def linears(self):
        """[(transformers' name, layer)] of all LoRALinear layers, in order."""
        prefix = f"model.{self.config.wrapper}." if self.config.wrapper else ""
        return [(prefix + self.name(path).removeprefix("model." if prefix else ""), m)
                for path, m in self.named_modules() if isinstance(m, LoRALinear)]

    def targets(self):
        """PEFT's target_modules: the last parts of the names of linears(). Of a model that also sees images it is a
        pattern for the language model alone, as the image encoder has layers of the same names."""
        last = sorted({path.rpartition(".")[2] for path, _ in self.linears()})
        return rf"model\.{self.config.wrapper}\..*\.({'|'.join(last)})" if self.config.wrapper else last

    def add_role(self, role, rank, alpha, start=None):
        """Give every LoRALinear an adapter for `role`: a fresh one, or a copy of that of role `start`."""
        assert role not in self.linears()[0][1].scale, f"there is a role {role!r} already"
        for _, layer in self.linears():
            layer.add_role(role, rank, alpha)
            if start is not None:
                layer.lora_A[role].data.copy_(layer.lora_A[start].data)
                layer.lora_B[role].data.copy_(layer.lora_B[start].data)

    def adapter(self, role):
        """{the checkpoint's name + ".lora_A" (r, in) or ".lora_B" (out, r): parameter} of one role."""
        return {f"{path}.{ab}": getattr(m, ab)[role] for path, m in self.linears() for ab in ("lora_A", "lora_B")}

    def merge(self, role):
        """Add the adapter of `role` to the base weights and remove it."""
        for _, layer in self.linears():
            layer.merge(role)

    def embed(self, ids, pos=None):
        """ids (...) at positions pos (...) -> embeddings (..., D), and a list with (cos, sin) of each kind of RoPE.

        Its last entry is None, for layers without RoPE, whose index is -1. Without pos, ids are rows (B, T) from
        position 0 on.
        """
        c = self.config
        if pos is None:
            assert not c.limited or ids.shape[-1] <= c.max_position_embeddings, "longer than the model's positions"
            pos = torch.arange(ids.shape[-1], device=ids.device)                         # (T,)
        x = self.model.embed_tokens(ids)                                                 # (..., D)
        if c.embedding_multiplier != 1:         # Gemma rounds the factor to the precision of the weights
            x = x * torch.tensor(c.embedding_multiplier).to(x.dtype).item()
        if c.learned_positions:                 # the sampler runs finished rows a few steps past the last position
            x = x + self.model.embed_positions(pos.clamp(max=c.max_position_embeddings - 1))
        if c.norm_embedding:
            x = self.model.norm(x)
        if self.ropes is None or self.ropes and self.ropes[0][0].device != ids.device:
            sign = -1 if c.backwards else 1
            self.ropes = [(torch.cat((-freq, freq)).to(ids.device) * sign, factor)       # (rotary_dim,)
                          for freq, factor in (frequencies(rope, c.rotary_dim) for rope in c.ropes)]
        turned = []
        for freq, factor in self.ropes:
            angle = pos[..., None, None] * freq                                          # (..., 1, rotary_dim)
            cos, sin = (angle.cos(), angle.sin()) if factor == 1 else (factor * angle.cos(), factor * angle.sin())
            turned.append((cos.to(x.dtype), sin.to(x.dtype)))
        return x, [*turned, None]

    def hidden(self, ids, pos=None, attends=None, where=None):
        """Final hidden states (..., D) of ids (...).

        pos (...): positions, as in embed().
        attends: an attention function for each layer (default: causal).
        where (N,): the places whose states are wanted, as in at_places(); the result is (N, D). The last block then
        computes only these after its attention.
        """
        x, ropes = self.embed(ids, pos)
        blocks = self.model.layers
        for block, attend in zip(blocks, attends or repeat(causal)):
            # the role is an argument, since checkpointing recomputes a block after using() has switched it back
            args = block, x, ropes, self.role, attend, where if block is blocks[-1] else None
            if not torch.is_grad_enabled():
                x = run_block(*args)
            elif self.checkpointing:
                x = checkpoint(self.train_block, *args, use_reentrant=False)
            else:
                x = self.train_block(*args)
        return self.model.norm(x)

    def logits(self, h):
        """Logits (..., V) in fp32 of final hidden states h (..., D)."""
        head = self.head if self.fused_head is None else self.fused_head
        return logits(h, head, self.config.logits_scaling, self.config.final_logit_softcapping)

    def forward(self, ids):
        """Logits (B, T, V) in fp32."""
        return self.logits(self.hidden(ids))


def unwrap(config, loaded):
    """Keep in `loaded` only the language model of a model that also sees images, named as if it had been saved alone.

    The head is tied if the files have none. Versions of config.json differ in where they say so.
    """
    names = {families.text_name(name): name for name in loaded.data}
    loaded.data = {name: loaded.data[old] for name, old in names.items() if name is not None}
    config.tie_word_embeddings = "lm_head.weight" not in loaded


def load(folder, device="cpu", dtype=torch.float32, classifier=False):
    """A frozen GPT from a Hugging Face folder (config.json, *.safetensors); of a classifier, the decoder without its
    head. WeightsError says which file, setting or tensor is missing, left over or not supported.

    Tensors are mapped from the files and copied to the device one at a time, so memory never holds a second copy.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint folder")
    try:
        config = GPTConfig.from_hf(read_json(path) | ({"tie_word_embeddings": True} if classifier else {}))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    loaded = load_weights(folder)
    if config.wrapper:
        unwrap(config, loaded)
    try:
        with torch.device("meta"):
            gpt = GPT(config)
    except RuntimeError as error:                       # torch raises it for absurd sizes
        raise WeightsError(f"{path}: {error}") from None
    names = gpt.weights().keys()
    prefix, head = gpt.name("model."), gpt.name("lm_head.weight")
    if not any(name.startswith(prefix) for name in loaded):             # the decoder was saved alone, as that of GPT-2
        loaded.data = {name if name == head else prefix + name: place for name, place in loaded.data.items()}
    for name in [name for name in loaded if name not in names and families.is_outside_decoder(name, classifier)]:
        del loaded[name]
    if config.tie_word_embeddings and head in loaded:                   # some files hold a tied head as well
        if not torch.equal(loaded.pop(head), loaded.get(gpt.name("model.embed_tokens.weight"), torch.empty(0))):
            raise WeightsError(f"{folder}: config.json ties the head to the embedding, but the two tensors differ")
    check(gpt.weights(), loaded, str(folder))                           # before memory is allocated
    gpt = gpt.to(dtype).to_empty(device=device)
    gpt.make_contiguous()
    assign(gpt.weights(), loaded, str(folder))
    return gpt.requires_grad_(False)

