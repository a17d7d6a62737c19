"""3x3 convolutions on a CPU with a quarter of the multiplications.

Source: Winograd's minimal filtering F(4x4, 3x3), of Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", CVPR 2016, arXiv 1509.09308. A tile of 4x4 outputs depends on a patch of 6x6 inputs. Multiplied by a matrix
on both sides, the 36 numbers of a patch need one multiplication each, by 36 numbers made of the filter, instead of
16 * 9; the products are summed up over the channels, and another matrix brings the sums to the 4x4 outputs.

In float32 the rounding errors are about five times those of the direct sum: 1e-6 of the outputs' usual size. An input
that is not finite spreads to all outputs of the tiles that read it, not to its 3x3 neighbours alone.
"""

import functools
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .operators import evenly


TILE, KERNEL = 4, 3
PATCH = TILE + KERNEL - 1
# Where polynomials are evaluated, beside infinity. Of the symmetric choices this one has about the least rounding
# errors; with the usual 1 and 2 they are twice as large.
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
# Transformed numbers for each thread at a time: few enough for its cache, enough for its matrix products
PIECE = 2**19
MIN_TILES = 256  # but no fewer tiles: each piece reads all filters, megabytes of them
LARGEST_PIECE = 2**23  # in all, for two of them are kept: 64 MiB
# What the rest costs, in multiplications of a direct convolution in the same time (measured with AVX-512, 2 threads):
# a channel of a tile, a number of the filters, and a call. The first is a tenth more than of 128 to 196 channels, which
# leaves alone the layers that gain little: a virtual machine may move its cores apart for a while without a sign of it.
TILE_COST, FILTER_COST, CALL_COST = 5300, 1500, 1e7
TILE_COST_OF_SEVERAL_CACHES = 10000  # where the threads have no last-level cache in common
SHARED_CACHE = "/sys/devices/system/cpu/cpu{}/cache/index3/shared_cpu_list"  # which cores have that core's cache


@functools.cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for flat patches: of inputs (36, 36), of filters (36, 9), and of the sums to a flat tile (16, 36)."""

    def powers(count: int) -> Tensor:
        """Row i: the powers 0 ... count - 1 of point i; of infinity the highest alone."""
        finite = torch.tensor(POINTS, dtype=torch.float64, device="cpu")[:, None] ** torch.arange(count, device="cpu")
        return torch.cat([finite, torch.eye(count, dtype=torch.float64, device="cpu")[-1:]])

    # Polynomials are multiplied by their values, from which the inverse of all powers makes coefficients again. The
    # transposed map is a convolution.
    with torch.inference_mode(False):
        inputs, filters, outputs = torch.linalg.inv(powers(PATCH)).T, powers(KERNEL), powers(TILE).T
        return tuple(torch.kron(matrix, matrix).float() for matrix in (inputs, filters, outputs))


def winograd_pays(x: Tensor, conv: nn.Conv2d, is_prepared: bool) -> bool:
    """Whether `winograd_convolution` computes a layer on a map (B, C, H, W), and is faster than the direct convolution.

    Args:
        is_prepared: the filters are transformed already.
    """
    if x.dtype != torch.float32 or conv.groups != 1 or not _products_are_exact():
        return False
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
        return False
    B, C, H, W = x.shape
    K = conv.out_channels
    is_shared = torch.get_num_threads() == 1 or _cores_share_a_cache()
    tile = PATCH**2 * C * K + (TILE_COST if is_shared else TILE_COST_OF_SEVERAL_CACHES) * (C + K)
    cost = B * -(-H // TILE) * -(-W // TILE) * tile + CALL_COST + (0 if is_prepared else FILTER_COST * C * K)
    return cost < KERNEL**2 * B * H * W * C * K


def _products_are_exact() -> bool:
    """Whether torch may not round the factors of products in float32, whose errors the transforms would multiply."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    return matmul.fp32_precision in ("none", "ieee") if matmul else torch.get_float32_matmul_precision() == "highest"


@functools.cache
def _cores_share_a_cache() -> bool:
    """Whether this process runs on cores of one last-level cache, as far as Linux tells.

    Threads hand each other what they transformed. Between two chiplets of an AMD, each with a cache of its own, that
    doubles the time of 80 to 160 channels, in which direct convolutions take the same.
    """
    if not hasattr(os, "sched_getaffinity"):
        return True
    caches = set()
    for core in os.sched_getaffinity(0):
        with suppress(OSError):  # which Linux may keep to itself
            caches.add(Path(SHARED_CACHE.format(core)).read_text())
    return len(caches) <= 1


def winograd_filters(weight: Tensor) -> Tensor:
    """Filters (K, C, 3, 3) as `winograd_convolution` takes them: (36, C, K), in memory (C, 36, K) or (36, K, C).

    Either way the filters are read, and what becomes of them is written, as it lies: to bring it in another order would
    take as long again. The first is one product for each channel, the faster way where MKL computes them all in one
    call; elsewhere torch makes a call for each.
    """
    (K, C), from_filters = weight.shape[:2], _transforms()[1]
    if torch.backends.mkl.is_available():
        filters = weight.reshape(K, C, KERNEL**2).permute(1, 2, 0)
        return torch.bmm(from_filters.expand(C, -1, -1), filters).transpose(0, 1)
    return torch.mm(from_filters, weight.reshape(K * C, KERNEL**2).T).view(PATCH**2, K, C).transpose(1, 2)


def winograd_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride 1 and a border of one zero.

    Args:
        x: map (B, C, H, W), float32.
        weight: (36, C, K), from `winograd_filters`.
        bias: (K,), or None.

    Returns:
        The map (B, K, H, W), in channels_last.
    """
    (B, C, H, W), K = x.shape, weight.shape[2]
    x = x.permute(0, 2, 3, 1)
    rows, columns = -(-H // TILE), -(-W // TILE)
    y = x.new_empty(B, rows * TILE, columns * TILE, K)
    tiles = y.view(B, rows, TILE, columns, TILE, K).permute(2, 4, 0, 1, 3, 5)  # (4, 4, B, rows, columns, K)

    # as many images at a time, or rows of tiles of one image, as a piece holds, and about as many in the last one
    width = PATCH**2 * max(C, K)
    most = min(max(PIECE * torch.get_num_threads(), MIN_TILES * width), LARGEST_PIECE) // width
    images, strip = evenly(B, most // (rows * columns)), evenly(rows, most // columns)
    one, two = _scratch(2 * images * strip * columns * width).chunk(2)  # in turn what is read and what is written
    from_inputs, _, to_outputs = _transforms()
    for image in range(0, B, images):
        for row in range(0, rows, strip):
            target = tiles[:, :, image : image + images, row : row + strip]
            source = _patches(x[image : image + images], row, target.shape[3], columns)
            count = source.numel() // (PATCH**2 * C)
            patch = one[: source.numel()].view(source.shape).copy_(source)
            factors = torch.mm(from_inputs, patch.view(PATCH**2, -1), out=two[: source.numel()].view(PATCH**2, -1))
            sums = one[: PATCH**2 * count * K].view(PATCH**2, count, K)
            torch.bmm(factors.view(PATCH**2, count, C), weight, out=sums)
            outputs = two[: target.numel()].view(target.shape)
            torch.mm(to_outputs, sums.view(PATCH**2, -1), out=outputs.view(TILE**2, -1))
            if bias is None:
                target.copy_(outputs)
            else:
                torch.add(outputs, bias, out=target)
    if y.shape[1:3] != (H, W):
        y = y[:, :H, :W].contiguous()
    return y.permute(0, 3, 1, 2)


def _patches(x: Tensor, row: int, rows: int, columns: int) -> Tensor:
    """The patches (6, 6, B, rows, columns, C) of some rows of tiles of (B, H, W, C), with zeros around it."""
    top, bottom = row * TILE - 1, (row + rows) * TILE + 1
    first, last = max(top, 0), min(bottom, x.shape[1])
    padded = F.pad(x[:, first:last], (0, 0, 1, columns * TILE + 1 - x.shape[2], first - top, bottom - last))
    return padded.unfold(1, PATCH, TILE).unfold(2, PATCH, TILE).permute(4, 5, 0, 1, 2, 3)


_threads = threading.local()


def _scratch(size: int) -> Tensor:
    """Memory of each thread that is kept, 4 MiB for each core that it uses, and more for wide maps, but 64 MiB at most
    where a row of tiles is no more: new memory would be fetched from the system at every call, page by page."""
    if getattr(_threads, "scratch", None) is None or _threads.scratch.numel() < size:
        with torch.inference_mode(False):
            _threads.scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    return _threads.scratch[:size]
