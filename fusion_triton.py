"""What follows a convolution, in one pass over its result: a Triton kernel for inference on CUDA and ROCm devices.

cuDNN writes the bare convolution. Its bias, BatchNorm and the activation, which torch takes one after the other, are
bound by memory: three passes over a map become one.
"""

import torch.nn as nn
from torch import Tensor

from .selective_scan_triton import launch, on_device  # says what is missing where there is no Triton


try:  # inside `try`, or transformers' loader of remote code would demand it of everyone
    import triton
    import triton.language as tl
except ImportError:
    raise


_ELEMENTS = 4096  # of a program
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def finish(x: Tensor, offset: Tensor | None, norm: nn.BatchNorm2d | None, activation: str) -> Tensor:
    """activation(norm(x + offset)) of a map (B, C, H, W) in channels_last layout, in its place.

    Nothing is checked. The arithmetic is float32, rounded once to x's dtype, which is that or half precision.

    Args:
        offset: (C,), of the convolution; dense, as all vectors here.
        norm: in evaluation mode, with weights (C,).
        activation: "none", "relu", "gelu" or "gelu_tanh".
    """
    width = x.shape[1]
    pixels = x.numel() // width
    tile = _tile(width)
    mean, variance, weight, bias, eps = x, x, x, None, 0.0
    if norm is not None:
        mean, variance, weight, bias, eps = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    with on_device(x.device):
        launch(
            _finish_kernel,
            -(-pixels // tile["ROWS"]),
            (x, x if offset is None else offset, mean, variance, weight, x if bias is None else bias),
            (eps, pixels),
            WIDTH=width,
            **tile,
            HAS_OFFSET=offset is not None,
            HAS_NORM=norm is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            **_OPTIONS,
        )
    return x


def _tile(width: int) -> dict[str, int]:
    """Pixels of a program, and of its channels as many as it takes at a time: no lane idle where that can be."""
    block = next((size for size in (64, 32, 16) if width % size == 0), 32)
    return {"ROWS": _ELEMENTS // block, "BLOCK": block}


@triton.jit(do_not_specialize=["pixels"])
def _finish_kernel(
    x,  # (pixels, WIDTH)
    offset,
    mean,
    variance,
    weight,
    bias,
    eps,
    pixels,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    x += first * WIDTH
    exists = rows < pixels - first
    for start in range(0, WIDTH, BLOCK):
        channels = start + tl.arange(0, BLOCK)
        known = channels < WIDTH
        scale = tl.full((BLOCK,), 1.0, tl.float32)
        shift = tl.zeros((BLOCK,), tl.float32)
        if HAS_OFFSET:
            shift += tl.load(offset + channels, mask=known, other=0.0).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.load(variance + channels, mask=known, other=1.0).to(tl.float32) + eps)
            scale *= tl.load(weight + channels, mask=known, other=0.0).to(tl.float32)
            shift = (shift - tl.load(mean + channels, mask=known, other=0.0).to(tl.float32)) * scale
        if HAS_BIAS:
            shift += tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)
        places = x + rows[:, None] * WIDTH + channels[None, :]
        mask = exists[:, None] & known[None, :]
        y = tl.load(places, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if ACTIVATION == "relu":
            y = tl.where(y < 0.0, 0.0, y)  # what is no number stays so
        elif ACTIVATION == "gelu":
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # (1 + tanh(a)) / 2 = sigmoid(2 a)
        tl.store(places, y.to(x.dtype.element_ty), mask=mask)
