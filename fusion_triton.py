"""Convolutions and what follows them, as Triton kernels for inference on CUDA and ROCm devices.

`finish`: cuDNN writes the bare convolution. Its bias, BatchNorm and the activation, which torch takes one after the
other, are bound by memory: three passes over a map become one.

`convolve_images`: the stem's first convolution, with all that, in one pass. It has too few channels for cuDNN, which
wants the images copied into channels_last, and then multiplies without the GPU's matrix units.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .operators import define
from .selective_scan_triton import launch, on_device  # says what is missing where there is no Triton


try:  # inside `try`, or transformers' loader of remote code would demand it of everyone
    import triton
    import triton.language as tl
except ImportError:
    raise


MOST_CHANNELS, MOST_FILTERS = 7, 64  # of `convolve_images`: there are then 63 numbers around a pixel

_ELEMENTS = 4096  # of a program
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_PIXELS = 256  # of a program, of a map made from images
_IMAGE_OPTIONS = {**_OPTIONS, "num_warps": 8}


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
    vectors = (offset, *_vectors(norm))
    with on_device(x.device):
        launch(
            _finish_kernel,
            -(-pixels // tile["ROWS"]),
            (x, *(x if vector is None else vector for vector in vectors)),
            (0.0 if norm is None else norm.eps, pixels),
            WIDTH=width,
            **tile,
            **_has(*vectors),
            ACTIVATION=activation,
            **_OPTIONS,
        )
    return x


def convolve_images(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """activation(norm(conv(x))) of images (B, C, H, W) in any layout, as a map in channels_last.

    An operator of torch.library, of which torch.compile makes one graph. Nothing is checked. Images and filters are
    rounded to `dtype`; sums, norm and activation are float32, rounded to `dtype` once.

    Args:
        x: of fewer than 2**31 pixels in all.
        conv: 3x3 with stride 2, padded by 1, from at most MOST_CHANNELS channels to at most MOST_FILTERS; with a bias
            (N,) or none.
        norm, activation: as in `finish`.
        dtype: half precision.
    """
    eps = 0.0 if norm is None else norm.eps
    return _convolve_images(x, conv.weight, conv.bias, *_vectors(norm), eps, activation, dtype)


def _convolve(
    x: Tensor,
    filters: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    y = _empty_map(x, filters, offset, mean, variance, weight, bias, eps, activation, dtype)
    _, width, rows, columns = y.shape
    pixels = y.numel() // width
    if pixels == 0:
        return y
    vectors = (offset, mean, variance, weight, bias)
    with on_device(x.device):
        launch(
            _convolve_images_kernel,
            -(-pixels // _PIXELS),
            (x, filters, *(x if vector is None else vector for vector in vectors), y),
            (eps, *x.stride(), *filters.stride(), *x.shape[2:], rows, columns, pixels),
            **_image_tile(x.shape[1], width),
            **_has(*vectors),
            ACTIVATION=activation,
            **_IMAGE_OPTIONS,
        )
    return y


def _empty_map(x, filters, offset, mean, variance, weight, bias, eps, activation, dtype):
    batch, _, height, width = x.shape
    shape = (batch, (height + 1) // 2, (width + 1) // 2, filters.shape[0])
    return x.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


_convolve_images = define(__name__, "convolve_images", _convolve, _empty_map)


def _vectors(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else (norm.running_mean, norm.running_var, norm.weight, norm.bias)


def _has(offset, mean, variance, weight, bias) -> dict[str, bool]:
    """What the kernels are told of vectors that are there or not."""
    return {"HAS_OFFSET": offset is not None, "HAS_NORM": mean is not None, "HAS_BIAS": bias is not None}


def _tile(width: int) -> dict[str, int]:
    """Pixels of a program, and of its channels as many as it takes at a time: no lane idle where that can be."""
    block = next((size for size in (64, 32, 16) if width % size == 0), 32)
    return {"ROWS": _ELEMENTS // block, "BLOCK": block}


def _image_tile(channels: int, width: int) -> dict[str, int]:
    """What `_convolve_images_kernel` is compiled for; its sides are those that matrix units take."""
    taps, block = (max(16, triton.next_power_of_2(size)) for size in (9 * channels, width))
    return {"CHANNELS": channels, "TAPS": taps, "WIDTH": width, "BLOCK": block, "PIXELS": _PIXELS}


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
        scale, shift = _scale_and_shift(
            offset, mean, variance, weight, bias, eps, channels, known, HAS_OFFSET, HAS_NORM, HAS_BIAS
        )
        places = x + rows[:, None] * WIDTH + channels[None, :]
        mask = exists[:, None] & known[None, :]
        y = tl.load(places, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        tl.store(places, _activated(y, ACTIVATION).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def _convolve_images_kernel(
    x,
    filters,  # (WIDTH, CHANNELS, 3, 3)
    offset,
    mean,
    variance,
    weight,
    bias,
    y,  # (pixels, WIDTH)
    eps,
    x_batch,
    x_channel,
    x_row,
    x_column,
    filters_width,
    filters_channel,
    filters_row,
    filters_column,
    height,
    width,
    rows,
    columns,
    pixels,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,  # CHANNELS * 9, rounded up to a power of two
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The product (filters, taps) x (taps, pixels)."""
    HALF: tl.constexpr = y.dtype.element_ty
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = pixel % columns * 2 - 1
    row = pixel // columns % rows * 2 - 1
    image = x + (pixel // (columns * rows)).to(tl.int64) * x_batch
    image += row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
    tap = tl.arange(0, TAPS)
    channel, down, right = tap // 9, tap // 3 % 3, tap % 3
    exists = tap < 9 * CHANNELS
    n = tl.arange(0, BLOCK)
    known = n < WIDTH
    taps = filters + channel * filters_channel + down * filters_row + right * filters_column
    a = tl.load(taps[None, :] + n[:, None] * filters_width, mask=known[:, None] & exists[None, :], other=0.0)
    # which of the nine pixels around are within the image, as bits
    within = tl.where(column >= 0, 3, 2) + tl.where(column + 2 < width, 4, 0)
    within *= tl.where(row >= 0, 9, 8) + tl.where(row + 2 < height, 64, 0)
    within = tl.where(pixel < pixels, within, 0)
    inside = within[None, :] & tl.where(exists, 1 << tap % 9, 0)[:, None]
    around = channel.to(tl.int64) * x_channel + down.to(tl.int64) * x_row + right * x_column
    places = image[None, :] + around[:, None]
    # as vectors: of a matrix some releases of Triton would let the lanes of a warp take the taps
    b = tl.load(places.reshape(TAPS * PIXELS), mask=inside.reshape(TAPS * PIXELS) != 0, other=0.0).reshape(TAPS, PIXELS)
    scale, shift = _scale_and_shift(offset, mean, variance, weight, bias, eps, n, known, HAS_OFFSET, HAS_NORM, HAS_BIAS)
    z = tl.dot(a.to(HALF), b.to(HALF)) * scale[:, None] + shift[:, None]
    out = y + pixel.to(tl.int64)[None, :] * WIDTH + n[:, None]
    tl.store(out, _activated(z, ACTIVATION).to(HALF), mask=known[:, None] & (pixel < pixels)[None, :])


@triton.jit
def _scale_and_shift(
    offset,
    mean,
    variance,
    weight,
    bias,
    eps,
    channels,
    known,
    HAS_OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Of a norm behind an offset, for each of `channels`."""
    scale = tl.full(channels.shape, 1.0, tl.float32)
    shift = tl.zeros(channels.shape, tl.float32)
    if HAS_OFFSET:
        shift += tl.load(offset + channels, mask=known, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.load(variance + channels, mask=known, other=1.0).to(tl.float32) + eps)
        scale *= tl.load(weight + channels, mask=known, other=0.0).to(tl.float32)
        shift = (shift - tl.load(mean + channels, mask=known, other=0.0).to(tl.float32)) * scale
    if HAS_BIAS:
        shift += tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # what is no number stays so
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # (1 + tanh(a)) / 2 = sigmoid(2 a)
    return y
