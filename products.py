"""Matrix products of the decoder: by oneDNN where it is quicker, of int8 weights, of 16 bits with an fp32 result.

On CPUs torch multiplies fp32 matrices with MKL, whose kernels for AMD's processors do without AVX-512. oneDNN, which is
in torch as well, takes half the time there. It also multiplies by packed weights: a copy in the order in which it
reads them, which pays where few rows are multiplied, as in sampling.
Letters: N rows; a weight W is (out, in).
"""
import os
import time
from functools import lru_cache

import torch
import torch.nn.functional as F

# Whether torch can multiply 16-bit tensors on CUDA with an fp32 result (since 2.8). Elsewhere, and for gradients,
# exact_product() converts the head to fp32, VOCABULARY_PART of its rows at a time.
FP32_PRODUCTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
VOCABULARY_PART = 8192
WIDE = 512                              # rows and columns of the products that are tried
# oneDNN makes a kernel for every new shape, in a third of a millisecond, and nearly every batch has its own shape. Only
# large products make up for it. (So do packed weights: while sampling, a shape stays for some steps of all layers.)
LEAST_SIDE = 256                        # of a weight
LARGE = 1 << 26                         # multiplications in a product
MOST_COPIED = 3 << 29                   # bytes of layers packed or stacked for sampling, or of a head in fp32
# A kernel takes a megabyte, and torch and oneDNN would keep a thousand of them, each.
for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")


# -- oneDNN --------------------------------------------------------------------------------------------------------

def least_seconds(product, dtype):
    """The least time of three that a product of two matrices takes on this CPU."""
    x, seconds = torch.ones(WIDE, WIDE, dtype=dtype, device="cpu"), []
    for _ in range(4):                                  # the first product also chooses a kernel
        start = time.perf_counter()
        product(x, x)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@lru_cache
def onednn_pays():
    """Whether oneDNN is quicker in fp32 than what torch uses on this CPU. It is either about as quick or twice as
    quick: a short trial tells, with a bound between the two."""
    return torch.backends.mkldnn.is_available() and (
        1.4 * least_seconds(onednn, torch.float32) < least_seconds(F.linear, torch.float32))


@lru_cache
def bf16_pays():
    """Whether this CPU is quicker in bf16 than in fp32. Some are twice as quick, and those that have to emulate it take
    ten times as long: the bound is between the two."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        least_seconds(F.linear, torch.bfloat16) < 2 * least_seconds(F.linear, torch.float32))


def onednn(x, W, bias=None):
    """x W' + bias (N, out) of x (N, in) and W (out, in), perhaps packed; without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def product(x, W):
    """x W' (N, out) of x (N, in) and W (out, in), by what is quickest; without a gradient."""
    return onednn(x, W) if to_onednn(x, W) else x @ W.T


def to_onednn(x, W):
    """Whether oneDNN should multiply x (..., in) by W (out, in). Never while compiling: a question about the size of x
    would make the compiler build two graphs."""
    return W.is_mkldnn or (W.dtype == torch.float32 and W.device.type == "cpu" and not torch.compiler.is_compiling()
                           and x.numel() * W.size(0) >= LARGE and min(W.shape) >= LEAST_SIDE and onednn_pays())


class OneDNNProduct(torch.autograd.Function):
    """x W' with its gradients: x (N, in), W (out, in) -> (N, out)."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return onednn(x, W)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, W = ctx.saved_tensors
        dx, dW = ctx.needs_input_grad
        return product(grad, W.T) if dx else None, product(grad.T, x.T) if dW else None


def packs(dtype, size):
    """Whether weights in this dtype, of `size` bytes in all, are packed for sampling on this CPU. For those of a large
    model there may be no room."""
    pays = {torch.float32: onednn_pays, torch.bfloat16: bf16_pays}.get(dtype)
    return pays is not None and size <= MOST_COPIED and pays()


def packed(W):
    """W as oneDNN reads it; W itself if it is small or not of a floating type."""
    if W.is_floating_point() and min(W.shape) >= LEAST_SIDE:
        return torch.ops.mkldnn._reorder_linear_weight(W.detach())
    return W


# -- linear layers and the head ------------------------------------------------------------------------------------

def linear(x, W, bias=None, int8_scale=None):
    """W x + bias (..., out) for x (..., in), of a W in int8 if there are scales for it."""
    if int8_scale is None and not to_onednn(x, W):
        return F.linear(x, W, bias)
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], W.shape[0])                # (N, in)
    if W.is_mkldnn:
        return onednn(rows, W, bias).view(shape)
    y = OneDNNProduct.apply(rows, W) if int8_scale is None else Int8Product.apply(rows, W, int8_scale)
    return y.view(shape) if bias is None else y.view(shape) + bias


class Int8Product(torch.autograd.Function):
    """x W' for an int8 W with one scale per row: x (N, in), W (out, in), scale (out, 1) -> (N, out).

    The outputs are scaled and not W (except in fp16). This moves half the memory and rounds less: bf16 holds all int8.
    The backward pass converts W a second time. Autograd would keep the converted copy of every layer in memory.
    """

    @staticmethod
    def forward(ctx, x, W, scale):
        ctx.save_for_backward(W, scale)
        W, scale = Int8Product.factors(W, scale, x.dtype)
        return product(x, W) * scale

    @staticmethod
    def backward(ctx, grad):
        W, scale = Int8Product.factors(*ctx.saved_tensors, grad.dtype)
        return product(grad * scale, W.T), None, None

    @staticmethod
    def factors(W, scale, dtype):
        """W in this dtype, and the scale (1, out) of the outputs; in fp16, which has no room for sums that are not
        scaled yet, a scaled W and 1."""
        W = W.to(dtype)
        return (W * scale, 1) if dtype == torch.float16 else (W, scale.T)


def exact_product(h, W):
    """h W' (..., V) in fp32, for h (..., D) and W (V, D) in any precision. A product in bf16 would round a log-prob by
    0.03 nats, which is much beside PPO's cliprange of 0.2."""
    if W.dtype == torch.float32:
        return linear(h.float(), W)
    if FP32_PRODUCTS and W.is_cuda and not torch.is_grad_enabled():                      # it has no gradient
        return torch.mm(h.flatten(0, -2), W.T, out_dtype=torch.float32).view(*h.shape[:-1], len(W))
    return torch.cat([linear(h.float(), part.float()) for part in W.split(VOCABULARY_PART)], -1)
