"""Linear layers: an adapter (LoRA) for each role, weights in int8, and several layers that are sampled as one product.

Letters: r LoRA rank; shapes (..., in) and (..., out) stand for any number of tokens.
"""
import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


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
