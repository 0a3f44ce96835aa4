"""A decoder for many families of open weights, with LoRA adapters worn by role.

Llama and its heirs (Mistral, Qwen, Phi, OLMo, SmolLM, Gemma), GPT-2 and GPT-NeoX, under the checkpoint's own names.
GPTConfig lists how families differ, data/families.py reads it from config.json. The KV cache is in rlhf/sampler.py.
Left out: dropout, mixtures of experts.

Rows are right-padded: causal attention never looks right, so neither a padding mask nor position ids are needed. All
layers but attention treat every token alone, so tokens may come as rows (B, T) or in any other shape; how they see each
other is a function: `causal` for rows, a Packing for rows without their padding, a KVCache for rows that go on.
Letters: B batch, T tokens, V vocabulary, D width, H heads, K kv heads, hd head size, r LoRA rank.
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

from data import families
from data.text import read_json
from data.weights import WeightsError, assign, check, load_weights

# PyTorch might prefer cuDNN's attention, which makes a plan for every new shape; ours change with every micro-batch.
torch.backends.cuda.enable_cudnn_sdp(False)

# Only the kernel of these cards, for 16 bits and without a mask, reads grouped keys and values as they are; what torch
# falls back to holds B x H x T x T.
FLASH = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@dataclass
class GPTConfig:
    """What changes the mathematics, as in config.json where that has a word for it; the defaults are Llama's."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0            # 0: as many as attention heads
    head_dim: int = 0                       # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False       # the head is the embedding
    scaled_embedding: bool = False          # embeddings are multiplied by sqrt(hidden_size)
    learned_positions: bool = False         # positions are embedded, and added

    norm: str = "rms"                       # rms; rms+1, which is stored less 1; or layer, LayerNorm
    rms_norm_eps: float = 1e-6
    norm_before: bool = True                # a norm before attention, and one before the MLP
    norm_after: bool = False                # a norm after each of them
    parallel_residual: bool = False         # the MLP reads what attention reads, not its result

    attention_bias: bool = False            # of queries, keys and values
    o_bias: bool = False                    # of attention's output
    fused_qkv: str = ""                     # one layer for the three: rows (all q, all k, all v) or heads (qkv of each)
    qk_norm: str = ""                       # a norm of queries and keys: of each head, or of all heads together
    query_scale: float = 0                  # queries are divided by its root; 0: head_dim
    windows: tuple = ()                     # how many tokens each layer sees, its own included; 0: all before it
    ropes: tuple = ({"rope_type": "default", "rope_theta": 10000.},)        # the kinds of RoPE that layers use
    layer_ropes: tuple = ()                 # and which of them each layer uses; -1: none
    rotary_dim: int = 0                     # the numbers of a head that it turns; 0: all

    hidden_act: str = "silu"                # silu, gelu, gelu_tanh
    gated: bool = True                      # the MLP's activation multiplies a second projection
    fused_gate_up: bool = False             # one layer for both
    mlp_bias: bool = False

    names: dict = field(default_factory=lambda: families.LLAMA_NAMES)       # {ours: the checkpoint's} of parts
    transposed: bool = False                # linear layers are stored as (in, out)

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.query_scale = self.query_scale or self.head_dim
        self.rotary_dim = self.rotary_dim or self.head_dim
        self.windows = self.windows or (0,) * self.num_hidden_layers
        self.layer_ropes = self.layer_ropes or (0,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, config):
        """Read a config.json dict; ValueError names whatever would change the mathematics and is not implemented."""
        return cls(**families.fields(config))


# -- rotary positions ---

def frequencies(rope, dim):
    """(radians a position (dim / 2,), the factor of cos and sin) of rotary embeddings: the default (Su et al. 2021),
    linear (positions are divided), llama3 (only slow ones are), yarn (Peng et al. 2023, section 3.2)."""
    freq = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)                        # (dim / 2,)
    kind = rope["rope_type"]
    if kind == "default":
        return freq, 1.
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    if kind == "linear":
        return freq / factor, 1.
    if kind == "llama3":                    # how far each is kept: by its turns in the context of pretraining
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return freq * (kept + (1 - kept) / factor), 1.

    def place(turns):                       # of the frequency that makes so many turns in that context
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
    """Rotary embedding (Su et al. 2021), halves convention of HF: x (..., heads, hd), cos and sin (..., 1, rotary_dim),
    the first half of sin for the negative angle. What is beyond rotary_dim stays."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


# -- linear ---

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

    @torch.no_grad()
    def merge(self, role):
        """Add the adapter of `role` to W, and forget it. In fp32: rounding the sum to bf16 would lose most of it."""
        assert self.weight.dtype == torch.float32
        self.weight += self.delta(role)
        del self.lora_A[role], self.lora_B[role], self.scale[role]

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


# -- norms

class RMSNorm(nn.Module):
    def __init__(self, size, eps, offset=0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(size)), eps, offset

    def forward(self, x):
        if self.offset:                     # the sum would round in 16 bits
            weight = self.weight.float() + self.offset
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)                   # sums in fp32, whatever x is


def norm(c, size, there=True):
    """The family's norm over vectors of this size, None if it is not there."""
    if not there:
        return None
    return nn.LayerNorm(size, c.rms_norm_eps) if c.norm == "layer" else RMSNorm(size, c.rms_norm_eps, c.norm == "rms+1")


def through(norm, x):
    return x if norm is None else norm(x)


# -- how tokens see each other: q (..., H, hd), k and v (..., K, hd) -> (..., H, hd) ---------------------------------

def causal(q, k, v, window=0):
    """Rows (B, T, heads, hd) from their first token on: each token sees itself and those before it, `window` in all."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                    # (B, heads, T, hd)
    mask, T, groups = None, q.shape[2], q.shape[1] // k.shape[1]
    if 0 < window < T:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    if groups > 1 and q.is_cuda and not (FLASH and mask is None and q.dtype != torch.float32):
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=groups > 1).transpose(1, 2)


class Packing:
    """Rows (B, T) as N tokens: without their padding, and with a prompt that several rows share only once.

    `at` (B, T) is the token that stands at each place of the rows (any, where there is padding); `source` (N,) is one
    place, in the rows laid end to end, of each token.
    """

    def __init__(self, at, source):
        self.at, self.source = at, source

    def __call__(self, q, k, v, window=0):
        """Linear layers have met N tokens; attention meets the rows. They are looked up as embeddings are, since the
        gradient of plain indexing is far slower."""
        q, k, v = (F.embedding(self.at, x.flatten(1)).unflatten(-1, x.shape[1:]) for x in (q, k, v))     # (B, T, ...)
        return causal(q, k, v, window).flatten(0, 1)[self.source]                                # (N, H, hd)


# -- the decoder ---------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.hd, self.fused, self.window, self.rope = c.head_dim, c.fused_qkv, c.windows[layer], c.layer_ropes[layer]
        self.scale = (c.head_dim / c.query_scale) ** .5
        self.sizes = [heads * c.head_dim for heads in (c.num_attention_heads, *2 * [c.num_key_value_heads])]
        if self.fused:
            self.qkv_proj = LoRALinear(c.hidden_size, sum(self.sizes), c.attention_bias)
            self.qkv = Together(self.qkv_proj)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                LoRALinear(c.hidden_size, size, c.attention_bias) for size in self.sizes)
            self.qkv = Together(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = LoRALinear(self.sizes[0], c.hidden_size, c.o_bias)
        self.out = Together(self.o_proj)
        self.q_norm, self.k_norm = (
            norm(c, c.head_dim if c.qk_norm == "head" else size, c.qk_norm) for size in self.sizes[:2])

    def forward(self, x, ropes, role, attend, where):
        q, k, v = self.heads(self.qkv(x, role))
        rope = ropes[self.rope]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q if self.scale == 1 else q * self.scale, k, v, self.window).flatten(-2)              # (..., H * hd)
        y, = self.out(y if where is None else places(y, where), role)                    # (..., D) or (N, D)
        return y

    def heads(self, outputs):
        """Of one layer's output or of three: queries (..., H, hd), keys and values (..., K, hd)."""
        shape = *outputs[0].shape[:-1], -1
        if self.fused == "heads":
            q, k, v = outputs[0].view(*shape, 3, self.hd).unbind(-2)
        else:
            outputs = outputs[0].split(self.sizes, -1) if self.fused else outputs
            q, k, v = (y.view(*shape, self.hd) for y in outputs)
        if self.q_norm is not None:         # over each head, or over all of them: its weight says which
            q, k = (norm(x.flatten(-2).unflatten(-1, (-1, len(norm.weight)))).view(x.shape)
                    for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v


def places(x, where):
    """Of x (..., D) those at the places `where` (N,), counted over all tokens: (N, D)."""
    return x.flatten(0, -2).index_select(0, where)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size
        self.act, self.fused = ACTIVATIONS[c.hidden_act], c.fused_gate_up
        if self.fused:
            self.gate_up_proj = LoRALinear(D, 2 * inner, c.mlp_bias)
            self.gate_up = Together(self.gate_up_proj)
        elif c.gated:
            self.gate_proj, self.up_proj = LoRALinear(D, inner, c.mlp_bias), LoRALinear(D, inner, c.mlp_bias)
            self.gate_up = Together(self.gate_proj, self.up_proj)
        else:
            self.up_proj = LoRALinear(D, inner, c.mlp_bias)
            self.gate_up = Together(self.up_proj)
        self.down_proj = LoRALinear(inner, D, c.mlp_bias)
        self.down = Together(self.down_proj)

    def forward(self, x, role):
        outputs = self.gate_up(x, role)
        gate, *up = outputs[0].chunk(2, -1) if self.fused else outputs                   # (..., F)
        y, = self.down(self.act(gate) * up[0] if up else self.act(gate), role)           # (..., D)
        return y


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.parallel = c.parallel_residual
        self.input_layernorm = norm(c, c.hidden_size, c.norm_before)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = norm(c, c.hidden_size, c.norm_after)
        self.pre_feedforward_layernorm = norm(c, c.hidden_size, c.norm_before)
        self.mlp = MLP(c)
        self.post_feedforward_layernorm = norm(c, c.hidden_size, c.norm_after)

    def forward(self, x, ropes, role, attend, where=None):
        y = self.self_attn(through(self.input_layernorm, x), ropes, role, attend, where)
        x = x if where is None else places(x, where)
        if self.parallel:
            return x + y + self.mlp(self.pre_feedforward_layernorm(x), role)
        x = x + through(self.post_attention_layernorm, y)
        return x + through(self.post_feedforward_layernorm, self.mlp(through(self.pre_feedforward_layernorm, x), role))


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
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.role = None                        # which adapter is on; None is the raw base
        self.checkpointing = False              # recompute each block's activations in the backward pass
        self.train_block = run_block            # what calls a block when gradients are on
        self.ropes = None                       # frequencies of each kind of RoPE, once they are needed

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

    def name(self, path):
        """What the checkpoint calls a parameter or module of ours."""
        return ".".join(self.config.names.get(part, part) for part in path.split("."))

    def renamed(self, tensors):
        """{our parameter name: tensor} -> the same under the checkpoint's names and in its layout, as views."""
        return {self.name(name): x.mT if self.config.transposed and name.endswith("_proj.weight") else x
                for name, x in tensors.items()}

    def weights(self):
        """The base under its checkpoint names, without any adapter."""
        return self.renamed({name: w for name, w in self.state_dict().items() if ".lora_" not in name})

    def linears(self):
        """(path in the checkpoint, layer) of every linear layer that a role adapts, in the checkpoint's order."""
        return [(self.name(path), m) for path, m in self.named_modules() if isinstance(m, LoRALinear)]

    def targets(self):
        """What PEFT calls these layers: the last parts of their paths."""
        return sorted({path.rpartition(".")[2] for path, _ in self.linears()})

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

    def merge(self, role):
        """Add the adapter of `role` to the base, for good."""
        for _, linear in self.linears():
            linear.merge(role)

    def embed(self, ids, pos=None):
        """Ids (...) at positions `pos` of the same shape (default: rows (B, T) from their beginning) -> their
        embeddings (..., D), and for each kind of RoPE, and for none, what rotate() needs."""
        c = self.config
        if pos is None:
            assert not c.learned_positions or ids.shape[-1] <= c.max_position_embeddings, "longer than what is known"
            pos = torch.arange(ids.shape[-1], device=ids.device)                         # (T,)
        x = self.model.embed_tokens(ids)                                                 # (..., D)
        if c.scaled_embedding:                  # by a number that is rounded as the weights are, or Gemma is not itself
            x = x * torch.tensor(c.hidden_size ** .5).to(x.dtype).item()
        if c.learned_positions:                 # a row that has ended goes on a little before it is seen to have
            x = x + self.model.embed_positions(pos.clamp(max=c.max_position_embeddings - 1))
        if self.ropes is None or self.ropes and self.ropes[0][0].device != ids.device:
            self.ropes = [(torch.cat((-freq, freq)).to(ids.device), factor)              # (rotary_dim,)
                          for freq, factor in (frequencies(rope, c.rotary_dim) for rope in c.ropes)]
        turned = []
        for freq, factor in self.ropes:
            angle = pos[..., None, None] * freq                                          # (..., 1, rotary_dim)
            cos, sin = (angle.cos(), angle.sin()) if factor == 1 else (factor * angle.cos(), factor * angle.sin())
            turned.append((cos.to(x.dtype), sin.to(x.dtype)))
        return x, [*turned, None]

    def hidden(self, ids, pos=None, attends=None, where=None):
        """Final hidden states (..., D) of ids (...), at positions `pos` as in embed(), that see each other through
        `attends`, a function for each layer (default: causal).

        where (N,): only the states at these places, counted over all ids, are wanted: (N, D). After its attention the
        last block has no use for the others.
        """
        x, ropes = self.embed(ids, pos)
        *blocks, last = self.model.layers
        for block, attend in zip((*blocks, last), attends or repeat(causal)):
            # the role travels as an argument: the recomputation happens when the context manager has long exited
            args = block, x, ropes, self.role, attend, where if block is last else None
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
    """A frozen GPT from a Hugging Face folder (config.json, safetensors), strictly: WeightsError says what is wrong.

    Tensors are mapped from the files one at a time, and copied to where they belong: a second copy never exists."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint folder")
    try:
        config = GPTConfig.from_hf(read_json(path))
        with torch.device("meta"):
            gpt = GPT(config)
    except (ValueError, RuntimeError) as error:         # RuntimeError: more bytes than can be counted
        raise WeightsError(f"{path}: {error}") from None
    names, loaded = gpt.weights().keys(), load_weights(folder)
    prefix, head = gpt.name("model."), gpt.name("lm_head.weight")
    if not any(name.startswith(prefix) for name in loaded):             # saved without its head, as GPT-2 was
        loaded.data = {name if name == head else prefix + name: place for name, place in loaded.data.items()}
    for name in [name for name in loaded if name not in names and families.BUFFERS.fullmatch(name)]:
        del loaded[name]
    if config.tie_word_embeddings and head in loaded:                   # some files hold the tied head twice
        if not torch.equal(loaded.pop(head), loaded.get(gpt.name("model.embed_tokens.weight"), torch.empty(0))):
            raise WeightsError(f"{folder}: config.json ties the head to the embedding, but the two tensors differ")
    check(gpt.weights(), loaded, str(folder))                           # before memory is taken
    gpt = gpt.to(dtype).to_empty(device=device)
    gpt.adjoin()
    assign(gpt.weights(), loaded, str(folder))
    return gpt.requires_grad_(False)

