"""The selective scan of MambaVision's mixer as Triton kernels, for CUDA and ROCm devices; its two convolutions with it.

`scan` computes what selective_scan.py's docstring defines. `scan_concat` gives that and, beside it on the channels, the
mixer's other branch, silu(depthwise convolution of z), written where it belongs instead of concatenated. `convolve` is
that branch alone. All are differentiable in every tensor, and operators of torch.library, of which torch.compile makes
one graph.

    u, dt      (batch, length, channels)    input and step before softplus
    A          (channels, states)           negative: the decay rates; a power of two states
    B, C       (batch, length, states)      input and output weights of each step
    D, dt_bias (channels,)                  skip weight, and what is added to dt
    z          (batch, length, width)       the other branch, before its convolution
    weight     (width, 1, 3)                taps of the convolution: zero padding, not causal

The last dimension of u, dt, B, C and z should be contiguous (else it is copied); the others may have any stride, so
slices of a projection's output are read where they are. Accumulation is in float32, or float64 where u is. Gradients
are deterministic: what several programs contribute to is written apart and added in a fixed order, without atomics.

How it works. A program, which is one warp, has one sequence, or a chunk of one, and a block of its channels, and walks
the steps with the state (states, block) in registers. Where there are too few sequences to fill the device, a first
pass scans all chunks but the last from zero, keeping their last states and sums of steps; then the chunks are scanned,
each from the state that those before it leave (the decay over a chunk is exp(A * sum of steps): a product of decays,
never a quotient). The backward pass does the same from the end. It starts from the states that the forward pass
saved every `_INTERVAL` steps and recomputes those between.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import compute_dtype, define, needs_gradient


try:  # inside `try`, or transformers' loader of remote code would demand it of everyone
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("selective_scan_triton.py needs triton: pip install triton, or use backend='torch'") from error
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # the first whose kernels may hold tuples
    raise ImportError(
        f"selective_scan_triton.py needs triton 3.3 or newer, got {triton.__version__}: "
        "install torch 2.7 or newer, which brings it, or use backend='torch'"
    )


_STEPS = 4  # steps whose loads are in flight together
_INTERVAL = 8  # steps between the states saved for the backward pass; a multiple of _STEPS
_LANES = 32  # channels of a program
_SHORTEST_CHUNK = 64

# Triton 3.10 turns the fusing of multiplications and additions off by default; both give correct results.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """y (batch, length, channels) in u's dtype; shapes as in the module's docstring."""
    return _scan(u, dt, A, B, C, D, dt_bias, None, None, needs_gradient(u, dt, A, B, C, D, dt_bias))[0]


def scan_concat(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor, weight: Tensor
) -> Tensor:
    """cat([scan(u, ...), convolve(z, weight)], -1), (batch, length, channels + width)."""
    save_states = needs_gradient(u, dt, A, B, C, D, dt_bias, z, weight)
    return _scan(u, dt, A, B, C, D, dt_bias, z, weight, save_states)[0]


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """silu of the depthwise convolution along the steps, (batch, length, width) in x's dtype."""
    return _convolve(x, weight)


def runs_on(device: torch.device) -> bool:
    """Whether to try the kernels there: a ROCm device, a CUDA device from compute capability 7.0 on (as torch.compile
    does), or the CPU under TRITON_INTERPRET=1."""
    if not isinstance(_scan_kernel, triton.JITFunction):
        return device.type == "cpu"
    return device.type == "cuda" and (bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (7, 0))


class Plan(NamedTuple):
    block: int  # channels of a program
    blocks: int
    chunk: int  # steps of a program, a multiple of _INTERVAL unless there is one chunk
    chunks: int


@functools.lru_cache
def plan(batch: int, length: int, channels: int, processors: int) -> Plan:
    """How a scan is divided among programs of one warp each, on a device with so many multiprocessors.

    Chunks are worth their second reading of the inputs where whole sequences leave most of the device idle. Two warps
    for each of a multiprocessor's four schedulers fill it.
    """
    blocks = _cdiv(channels, _LANES)
    chunks = min(8 * processors // max(1, batch * blocks), length // _SHORTEST_CHUNK)
    chunk = length if chunks < 4 else _cdiv(length, chunks * _INTERVAL) * _INTERVAL
    return Plan(_LANES, blocks, chunk, _cdiv(length, max(1, chunk)))


def _walk_options(states: int, chunks: int) -> dict:
    """What the kernels that walk along the steps are compiled with.

    Told of a limit, ptxas uses all of it to begin loads a whole group of steps ahead; left alone, it may put one right
    before its use. 168 registers leave room for three warps on each scheduler of a multiprocessor. They are enough for
    8 states; more states may have all that a warp can, and so may chunks, of which a scheduler has two at most.
    """
    if torch.version.hip:  # whose compiler has no such option
        return _OPTIONS
    return {**_OPTIONS, "maxnreg": 168 if states <= 8 and chunks == 1 else 255}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: the scan
#
# What the compiler knows decides how it spreads a tile (states, block) over the lanes of a warp. It must not learn that
# `channels` is a multiple of 16, or one load spreads a channel's states over many lanes, and every sum over them
# becomes talk between lanes. It does learn the strides of steps, which are widths: offsets within a group of steps are
# then part of the instructions. Inner loops load whole groups of steps without masks, ahead of their use.
#
# Offsets that grow with the batch or the length are 64 bits wide. Rates are kept times log2(e): powers of two are what
# the hardware computes.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last digits where it is small too; x itself above 20, as torch has it."""
    EXACT: tl.constexpr = x.dtype == tl.float64
    TERMS: tl.constexpr = 17 if EXACT else 7
    e = tl.exp2(tl.abs(x) * -_LOG2_E)
    if EXACT:
        s = e / (2.0 + e)  # log(1 + e) = 2 atanh(s), and s <= 1/3
    else:
        root = tl.rsqrt(2.0 + e)  # fewer instructions than a division
        s = e * root * root
    square = s * s
    series = tl.full(x.shape, 1.0 / (2 * TERMS - 1), x.dtype)
    for i in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * i - 1)
    y = tl.maximum(x, 0.0) + 2.0 * s * series
    return tl.where(x > 20.0, x, y) if EXACT else y  # float32 rounds it to x there


@triton.jit
def _load_rates(A, d, mask, STATES: tl.constexpr, COMPUTE: tl.constexpr):
    """A log2(e) as (states, block). Row by row: loaded at once, its layout in memory would become that of the state."""
    n = tl.arange(0, STATES)[:, None]
    rates = tl.zeros((STATES, d.shape[0]), COMPUTE)
    for i in tl.static_range(STATES):
        row = tl.load(A + d * STATES + i, mask=mask, other=0.0).to(COMPUTE) * _LOG2_E
        rates = tl.where(n == i, row[None, :], rates)
    return rates


@triton.jit
def _within(index, width, t, last):
    """Mask of the elements of row t that exist. (A scalar mask is beyond the interpreter.)"""
    return index < tl.where(t < last, width, 0)


@triton.jit
def _widened(x, COMPUTE: tl.constexpr):
    """x in the precision of the arithmetic."""
    if x.dtype == tl.bfloat16:  # by its bits, and before a loop carries it: one instruction for each half of a word
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def _load_steps(
    ptr, stride: tl.constexpr, t, last, STEPS: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Rows t ... t + STEPS - 1 of a sequence. From `last` on the last row again, unless all are known to exist."""
    rows = ()
    for i in tl.static_range(STEPS):
        if WHOLE:
            row = tl.cast(t, tl.int64) * stride + i * stride
        else:
            row = tl.cast(tl.minimum(t + i, last - 1), tl.int64) * stride
        rows += (_widened(tl.load(ptr + row), COMPUTE),)
    return rows


@triton.jit
def _advance(h, u, dt, B, rates, bias):
    """The state after a step."""
    delta = _softplus(dt + bias)
    return tl.exp2(rates * delta[None, :]) * h + B[:, None] * (delta * u)[None, :]


@triton.jit
def _save_state(starts, h, t, channels, mask, STATES: tl.constexpr, INTERVAL: tl.constexpr):
    if t % INTERVAL == 0:
        offset = tl.cast(t // INTERVAL, tl.int64) * STATES * channels
        tl.store(starts + offset, h, mask=mask[None, :])


@triton.jit
def _carried(ends, totals, b, k, chunks, channels, d, rates, COMPUTE: tl.constexpr, BACKWARD: tl.constexpr):
    """The state before chunk k, of the ends of the chunks before it (backward: the gradient of the state after it)."""
    GROUP: tl.constexpr = 4  # whose loads are in flight together
    STATES: tl.constexpr = rates.shape[0]
    n = tl.arange(0, STATES)
    mask = d < channels
    first = chunks - 1 if BACKWARD else 0
    ends += (b * chunks + first) * STATES * channels + n[:, None] * channels + d[None, :]
    totals += (b * chunks + first) * channels + d
    h = tl.zeros(rates.shape, COMPUTE)
    count = chunks - 1 - k if BACKWARD else k
    for _ in range(0, count // GROUP):
        inflows = ()
        steps = ()
        for i in tl.static_range(GROUP):
            offset = -i * channels if BACKWARD else i * channels
            inflows += (tl.load(ends + offset * STATES, mask=mask[None, :], other=0.0),)
            steps += (tl.load(totals + offset, mask=mask, other=0.0),)
        for i in tl.static_range(GROUP):
            h = tl.exp2(rates * steps[i][None, :]) * h + inflows[i]
        offset = -GROUP * channels if BACKWARD else GROUP * channels
        ends += offset * STATES
        totals += offset
    for _ in range(0, count % GROUP):
        step = tl.load(totals, mask=mask, other=0.0)
        h = tl.exp2(rates * step[None, :]) * h + tl.load(ends, mask=mask[None, :], other=0.0)
        offset = -channels if BACKWARD else channels
        ends += offset * STATES
        totals += offset
    return h


@triton.jit(do_not_specialize=["length", "channels", "chunk", "chunks", "blocks"])
def _scan_kernel(
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    y,
    starts,  # (batch, ceil(length / INTERVAL), states, channels): the states before every INTERVAL-th step
    ends,  # of the chunks, where there are several: see _chunk_ends_kernel
    totals,
    u_batch,
    u_step: tl.constexpr,
    dt_batch,
    dt_step: tl.constexpr,
    B_batch,
    B_step: tl.constexpr,
    C_batch,
    C_step: tl.constexpr,
    y_batch,
    y_step: tl.constexpr,
    length,
    channels,
    chunk,
    chunks,
    blocks,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    INTERVAL: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNKED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """y, and the states to start from again, of one chunk of one sequence and a block of channels."""
    program = tl.program_id(0)
    b = (program // (blocks * chunks)).to(tl.int64)
    k = program // blocks % chunks
    first = k * chunk
    last = tl.minimum(first + chunk, length)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = d < channels

    rates = _load_rates(A, d, mask, STATES, COMPUTE)
    skip = tl.load(D + d, mask=mask, other=0.0).to(COMPUTE)
    bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(COMPUTE)
    state_offsets = n[:, None] * channels + d[None, :]
    channel = tl.minimum(d, channels - 1)  # lanes beyond the last channel compute it again, without masks
    h = tl.zeros((STATES, BLOCK), COMPUTE)
    if CHUNKED:
        h = _carried(ends, totals, b, k, chunks, channels, d, rates, COMPUTE, BACKWARD=False)
    starts += b * tl.cdiv(length, INTERVAL) * STATES * channels + state_offsets

    t = first.to(tl.int64)
    u += b * u_batch + channel
    dt += b * dt_batch + channel
    B = tl.multiple_of(B + b * B_batch, ALIGN) + n
    C = tl.multiple_of(C + b * C_batch, ALIGN) + n
    y += b * y_batch + t * y_step + d
    next_u = _load_steps(u, u_step, first, last, STEPS, COMPUTE)
    next_dt = _load_steps(dt, dt_step, first, last, STEPS, COMPUTE)
    next_B = _load_steps(B, B_step, first, last, STEPS, COMPUTE)
    next_C = _load_steps(C, C_step, first, last, STEPS, COMPUTE)
    whole = first + (last - first) // STEPS * STEPS
    for t in range(first, whole, STEPS):
        # the loads of the next steps travel while these are computed
        these_u, these_dt, these_B, these_C = next_u, next_dt, next_B, next_C
        later = tl.minimum(t + STEPS, whole - STEPS)
        next_u = _load_steps(u, u_step, later, last, STEPS, COMPUTE, WHOLE=True)
        next_dt = _load_steps(dt, dt_step, later, last, STEPS, COMPUTE, WHOLE=True)
        next_B = _load_steps(B, B_step, later, last, STEPS, COMPUTE, WHOLE=True)
        next_C = _load_steps(C, C_step, later, last, STEPS, COMPUTE, WHOLE=True)
        if SAVE:
            _save_state(starts, h, t, channels, mask, STATES, INTERVAL)
        for i in tl.static_range(STEPS):
            h = _advance(h, these_u[i], these_dt[i], these_B[i], rates, bias)
            out = tl.sum(these_C[i][:, None] * h, 0) + skip * these_u[i]
            tl.store(y + i * y_step, out.to(y.dtype.element_ty), mask=mask)
        y += STEPS * y_step
    for t in range(whole, last):
        if SAVE:
            _save_state(starts, h, t, channels, mask, STATES, INTERVAL)
        (this_u,) = _load_steps(u, u_step, t, last, 1, COMPUTE, WHOLE=True)
        (this_dt,) = _load_steps(dt, dt_step, t, last, 1, COMPUTE, WHOLE=True)
        (this_B,) = _load_steps(B, B_step, t, last, 1, COMPUTE, WHOLE=True)
        (this_C,) = _load_steps(C, C_step, t, last, 1, COMPUTE, WHOLE=True)
        h = _advance(h, this_u, this_dt, this_B, rates, bias)
        out = tl.sum(this_C[:, None] * h, 0) + skip * this_u
        tl.store(y, out.to(y.dtype.element_ty), mask=mask)
        y += y_step


@triton.jit
def _end_step(h, total, x, dt, W, rates, bias, BACKWARD: tl.constexpr):
    """One step of a chunk's end, and of its sum of steps."""
    delta = _softplus(dt + bias)
    decay = tl.exp2(rates * delta[None, :])
    W = W[:, None]
    h = decay * (h + W * x[None, :]) if BACKWARD else decay * h + W * (delta * x)[None, :]
    return h, total + delta


@triton.jit(do_not_specialize=["length", "channels", "chunk", "chunks", "blocks"])
def _chunk_ends_kernel(
    x,  # u; grad_y in the backward pass
    dt,
    A,
    W,  # B; C in the backward pass
    dt_bias,
    ends,  # (batch, chunks, states, channels)
    totals,  # (batch, chunks, channels)
    x_batch,
    x_step: tl.constexpr,
    dt_batch,
    dt_step: tl.constexpr,
    W_batch,
    W_step: tl.constexpr,
    length,
    channels,
    chunk,
    chunks,
    blocks,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Of a chunk scanned from zero: the state after it (backward: the gradient before it), and the sum of its steps.

    Of all chunks but the last (backward: the first), from which nothing is carried on.
    """
    program = tl.program_id(0)
    b = (program // (blocks * (chunks - 1))).to(tl.int64)
    k = program // blocks % (chunks - 1) + (1 if BACKWARD else 0)
    first = k * chunk
    last = tl.minimum(first + chunk, length)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = d < channels

    rates = _load_rates(A, d, mask, STATES, COMPUTE)
    bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(COMPUTE)
    h = tl.zeros((STATES, BLOCK), COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    channel = tl.minimum(d, channels - 1)  # lanes beyond the last channel compute it again, without masks
    x += b * x_batch + channel
    dt += b * dt_batch + channel
    W = tl.multiple_of(W + b * W_batch, ALIGN) + n
    whole = first + (last - first) // STEPS * STEPS
    if BACKWARD:  # only the last chunk has other steps
        for j in range(0, last - whole):
            (this_x,) = _load_steps(x, x_step, last - 1 - j, last, 1, COMPUTE, WHOLE=True)
            (this_dt,) = _load_steps(dt, dt_step, last - 1 - j, last, 1, COMPUTE, WHOLE=True)
            (this_W,) = _load_steps(W, W_step, last - 1 - j, last, 1, COMPUTE, WHOLE=True)
            h, total = _end_step(h, total, this_x, this_dt, this_W, rates, bias, BACKWARD)
    t = tl.maximum(whole - STEPS, first) if BACKWARD else first
    next_x = _load_steps(x, x_step, t, last, STEPS, COMPUTE)
    next_dt = _load_steps(dt, dt_step, t, last, STEPS, COMPUTE)
    next_W = _load_steps(W, W_step, t, last, STEPS, COMPUTE)
    for j in range(0, whole - first, STEPS):
        these_x, these_dt, these_W = next_x, next_dt, next_W
        later = tl.maximum(whole - 2 * STEPS - j, first) if BACKWARD else tl.minimum(first + STEPS + j, whole - STEPS)
        next_x = _load_steps(x, x_step, later, last, STEPS, COMPUTE, WHOLE=True)
        next_dt = _load_steps(dt, dt_step, later, last, STEPS, COMPUTE, WHOLE=True)
        next_W = _load_steps(W, W_step, later, last, STEPS, COMPUTE, WHOLE=True)
        for i in tl.static_range(STEPS - 1 if BACKWARD else 0, -1 if BACKWARD else STEPS, -1 if BACKWARD else 1):
            h, total = _end_step(h, total, these_x[i], these_dt[i], these_W[i], rates, bias, BACKWARD)
    chunk_index = b * chunks + k
    tl.store(ends + (chunk_index * STATES + n[:, None]) * channels + d[None, :], h, mask=mask[None, :])
    tl.store(totals + chunk_index * channels + d, total, mask=mask)


@triton.jit(do_not_specialize=["length", "channels", "chunk", "chunks", "blocks", "batch"])
def _scan_backward_kernel(
    grad_y,
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    starts,  # as the forward pass saved them
    ends,  # of the chunks, where there are several
    totals,
    grad_u,
    grad_dt,
    grad_weights,  # (blocks, batch, length, 2, states): each block's part of B's and C's gradients
    grad_parameters,  # (batch, chunks, states + 2, channels): each chunk's part of those of A, D and dt_bias
    grad_y_batch,
    grad_y_step: tl.constexpr,
    u_batch,
    u_step: tl.constexpr,
    dt_batch,
    dt_step: tl.constexpr,
    B_batch,
    B_step: tl.constexpr,
    C_batch,
    C_step: tl.constexpr,
    batch,
    length,
    channels,
    chunk,
    chunks,
    blocks,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    INTERVAL: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The gradients of one chunk of one sequence and a block of channels, from its last steps to its first.

    With h_t = decay_t h_(t-1) + B_t delta_t u_t and G_t the gradient of h_t, G_t = C_t grad_y_t + decay_(t+1) G_(t+1).
    """
    channels = channels * UNIT  # told so, the compiler gives a lane UNIT neighbouring channels of a tile
    program = tl.program_id(0)
    b = (program // (blocks * chunks)).to(tl.int64)
    k = program // blocks % chunks
    block = program % blocks
    first = k * chunk
    last = tl.minimum(first + chunk, length)
    d = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = d < channels

    rates = _load_rates(A, d, mask, STATES, COMPUTE)
    skip = tl.load(D + d, mask=mask, other=0.0).to(COMPUTE)
    bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(COMPUTE)
    state_offsets = n[:, None] * channels + d[None, :]
    channel = tl.minimum(d, channels - 1)  # lanes beyond the last channel compute it again, without masks
    # decay_(t+1) G_(t+1)
    carry = _carried(ends, totals, b, k, chunks, channels, d, rates, COMPUTE, BACKWARD=True)
    grad_A = tl.zeros((STATES, BLOCK), COMPUTE)
    grad_D = tl.zeros((BLOCK,), COMPUTE)
    grad_bias = tl.zeros((BLOCK,), COMPUTE)

    grad_y += b * grad_y_batch + channel
    u += b * u_batch + channel
    dt += b * dt_batch + channel
    B = tl.multiple_of(B + b * B_batch, ALIGN) + n
    C = tl.multiple_of(C + b * C_batch, ALIGN) + n
    starts += b * tl.cdiv(length, INTERVAL) * STATES * channels + state_offsets
    grad_u += b * length * channels + d
    grad_dt += b * length * channels + d
    grad_weights += (block * batch + b) * length * 2 * STATES + n
    for j in range(0, last - first, STEPS):
        t = first + (last - first - 1) // STEPS * STEPS - j
        offset = tl.cast(t, tl.int64)
        these_u = _load_steps(u, u_step, t, last, STEPS, COMPUTE)
        these_dt = _load_steps(dt, dt_step, t, last, STEPS, COMPUTE)
        these_grad_y = _load_steps(grad_y, grad_y_step, t, last, STEPS, COMPUTE)
        these_B = _load_steps(B, B_step, t, last, STEPS, COMPUTE)
        these_C = _load_steps(C, C_step, t, last, STEPS, COMPUTE)
        h = tl.load(starts + tl.cast(t // INTERVAL, tl.int64) * STATES * channels, mask=mask[None, :], other=0.0)
        for s in range(t // INTERVAL * INTERVAL, t, STEPS):  # from the saved state to the one before step t
            earlier_u = _load_steps(u, u_step, s, last, STEPS, COMPUTE, WHOLE=True)
            earlier_dt = _load_steps(dt, dt_step, s, last, STEPS, COMPUTE, WHOLE=True)
            earlier_B = _load_steps(B, B_step, s, last, STEPS, COMPUTE, WHOLE=True)
            for i in tl.static_range(STEPS):
                h = _advance(h, earlier_u[i], earlier_dt[i], earlier_B[i], rates, bias)
        states = (h,)  # before step t, and after each of the STEPS
        for i in tl.static_range(STEPS):
            h = _advance(h, these_u[i], these_dt[i], these_B[i], rates, bias)
            states += (h,)
        for i in tl.static_range(STEPS - 1, -1, -1):
            mask_d, mask_n = _within(d, channels, t + i, last), _within(n, STATES, t + i, last)
            x = these_u[i]
            g = tl.where(mask_d, these_grad_y[i], 0.0)
            B_ = these_B[i][:, None]
            C_ = these_C[i][:, None]
            step = these_dt[i] + bias
            delta = _softplus(step)
            G = C_ * g[None, :] + carry
            grad_delta_x = tl.sum(B_ * G, 0)
            carry = tl.exp2(rates * delta[None, :]) * G
            grad_exponent = carry * states[i]  # of delta A
            grad_A += grad_exponent * delta[None, :]
            grad_delta = tl.sum(rates * grad_exponent, 0) * _LN_2 + grad_delta_x * x
            grad_step = grad_delta * tl.where(step > 20.0, 1.0, tl.sigmoid(step))
            grad_D += g * x
            grad_bias += grad_step
            row = (offset + i) * channels
            grad_x = grad_delta_x * delta + g * skip
            tl.store(grad_u + row, grad_x.to(grad_u.dtype.element_ty), mask=mask_d)
            tl.store(grad_dt + row, grad_step.to(grad_dt.dtype.element_ty), mask=mask_d)
            weights = grad_weights + (offset + i) * 2 * STATES
            tl.store(weights, tl.sum(G * (delta * x)[None, :], 1), mask=mask_n)
            tl.store(weights + STATES, tl.sum(states[i + 1] * g[None, :], 1), mask=mask_n)
    grad_parameters += (b * chunks + k) * (STATES + 2) * channels
    tl.store(grad_parameters + state_offsets, grad_A, mask=mask[None, :])
    tl.store(grad_parameters + STATES * channels + d, grad_D, mask=mask)
    tl.store(grad_parameters + (STATES + 1) * channels + d, grad_bias, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: the convolution. A program has a tile of (steps, channels) of one sequence.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(ptr, stride, t, d, length, width, COMPUTE: tl.constexpr):
    """Rows t of a sequence and channels d, as (steps, block); zero outside."""
    mask = ((t >= 0) & (t < length))[:, None] & (d < width)[None, :]
    return tl.load(ptr + t.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _load_taps(weight, d, width, COMPUTE: tl.constexpr):
    taps = ()
    for i in tl.static_range(3):
        taps += (tl.load(weight + d * 3 + i, mask=d < width, other=0.0).to(COMPUTE)[None, :],)
    return taps


@triton.jit
def _tile_of(program, length, width, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sequence, steps and channels."""
    blocks = tl.cdiv(width, BLOCK)
    tiles = tl.cdiv(length, STEPS)
    t = program // blocks % tiles * STEPS + tl.arange(0, STEPS)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // (blocks * tiles)).to(tl.int64), t, d


@triton.jit(do_not_specialize=["length"])
def _convolve_kernel(
    x,
    weight,
    y,
    x_batch,
    x_step,
    y_batch,
    y_step,
    length,
    width,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """y = silu(p), p_t = w_0 x_(t-1) + w_1 x_t + w_2 x_(t+1)."""
    b, t, d = _tile_of(tl.program_id(0), length, width, STEPS, BLOCK)
    taps = _load_taps(weight, d, width, COMPUTE)
    x += b * x_batch
    p = tl.zeros((STEPS, BLOCK), COMPUTE)
    for i in tl.static_range(3):
        p += taps[i] * _load_tile(x, x_step, t + (i - 1), d, length, width, COMPUTE)
    out = y + b * y_batch + t.to(tl.int64)[:, None] * y_step + d[None, :]
    mask = (t < length)[:, None] & (d < width)[None, :]
    tl.store(out, (p * tl.sigmoid(p)).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length"])
def _convolve_backward_kernel(
    grad_y,
    x,
    weight,
    grad_x,
    grad_weight,  # (programs along batch and steps, 3, width): each program's part
    grad_y_batch,
    grad_y_step,
    x_batch,
    x_step,
    length,
    width,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """With g_t the gradient of p_t: grad_x_t = w_2 g_(t-1) + w_1 g_t + w_0 g_(t+1), grad_w_i = sum_t g_t x_(t+i-1)."""
    program = tl.program_id(0)
    b, t, d = _tile_of(program, length, width, STEPS, BLOCK)
    taps = _load_taps(weight, d, width, COMPUTE)
    x += b * x_batch
    grad_y += b * grad_y_batch
    part = (program // tl.cdiv(width, BLOCK)).to(tl.int64)
    total = tl.zeros((STEPS, BLOCK), COMPUTE)
    for i in tl.static_range(3):
        s = t + (1 - i)  # the step whose output reads x_t through tap i
        p = tl.zeros((STEPS, BLOCK), COMPUTE)
        for j in tl.static_range(3):
            p += taps[j] * _load_tile(x, x_step, s + (j - 1), d, length, width, COMPUTE)
        sigmoid = tl.sigmoid(p)
        g = _load_tile(grad_y, grad_y_step, s, d, length, width, COMPUTE) * sigmoid * (1.0 + p * (1.0 - sigmoid))
        total += taps[i] * g
        grad = tl.sum(g * _load_tile(x, x_step, t, d, length, width, COMPUTE), 0)
        tl.store(grad_weight + (part * 3 + i) * width + d, grad, mask=d < width)
    out = grad_x + (b * length + t.to(tl.int64)[:, None]) * width + d[None, :]
    mask = (t < length)[:, None] & (d < width)[None, :]
    tl.store(out, total.to(grad_x.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------

_TILE = {"STEPS": 32, "BLOCK": 32, "num_warps": 2, "enable_fp_fusion": True}
_BACKWARD_TILE = {**_TILE, "STEPS": 16}  # or its registers spill


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """The output, with z's branch beside it if there is one, and the saved states (empty unless asked for)."""
    batch, length, channels = u.shape
    states = A.shape[1]
    if states & (states - 1):
        raise ValueError(f"A must have a power of two states for backend='triton', got {states}; use backend='torch'")
    u, dt, B, C, A, D, dt_bias = map(_rows, (u, dt, B, C, A, D, dt_bias))
    dtype = compute_dtype(u)
    out = u.new_empty(batch, length, channels + (0 if z is None else z.shape[2]))
    intervals = _cdiv(length, _INTERVAL) if save_states else 0
    starts = u.new_empty(batch, intervals, states, channels, dtype=dtype)
    if out.numel() == 0:
        return out, starts
    division = plan(batch, length, channels, _processors(u.device))
    block, blocks, chunk, chunks = division
    with on_device(u.device):
        ends = _chunk_ends(u, dt, A, B, dt_bias, division, backward=False) if chunks > 1 else (starts, starts)
        launch(
            _scan_kernel,
            batch * chunks * blocks,
            (u, dt, A, B, C, D, dt_bias, out, starts, *ends),
            (*_strides(u, dt, B, C, out), length, channels, chunk, chunks, blocks),
            STATES=states,
            BLOCK=block,
            STEPS=_STEPS,
            INTERVAL=_INTERVAL,
            ALIGN=_alignment(B, C),
            COMPUTE=_triton_dtype(dtype),
            CHUNKED=chunks > 1,
            SAVE=save_states,
            **_walk_options(states, chunks),
        )
    if z is not None:
        _run_convolve(z, weight, out[:, :, channels:])
    return out, starts


def _backward(
    grad_y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u; of dt; of B and C, (batch, length, 2, states); of A.T, D and dt_bias, (states + 2, channels)."""
    batch, length, channels = u.shape
    states = A.shape[1]
    grad_y, u, dt, B, C, A, D, dt_bias = map(_rows, (grad_y, u, dt, B, C, A, D, dt_bias))
    grad_u, grad_dt = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt))
    if u.numel() == 0:
        return grad_u, grad_dt, starts.new_zeros(batch, length, 2, states), starts.new_zeros(states + 2, channels)
    if starts.shape[1] == 0:
        raise RuntimeError("the scan kept no states for its backward pass; it does where an input requires a gradient")
    division = plan(batch, length, channels, _processors(u.device))
    block, blocks, chunk, chunks = division
    grad_weights = starts.new_empty(blocks, batch, length, 2, states)
    grad_parameters = starts.new_empty(batch * chunks, states + 2, channels)
    unit = 1 if channels % 2 else 2
    with on_device(u.device):
        ends = _chunk_ends(grad_y, dt, A, C, dt_bias, division, backward=True) if chunks > 1 else (starts, starts)
        launch(
            _scan_backward_kernel,
            batch * chunks * blocks,
            (grad_y, u, dt, A, B, C, D, dt_bias, starts, *ends, grad_u, grad_dt, grad_weights, grad_parameters),
            (*_strides(grad_y, u, dt, B, C), batch, length, channels // unit, chunk, chunks, blocks),
            STATES=states,
            BLOCK=block,
            STEPS=_STEPS,
            INTERVAL=_INTERVAL,
            ALIGN=_alignment(B, C),
            COMPUTE=_triton_dtype(starts.dtype),
            UNIT=unit,
            **_OPTIONS,
        )
    return grad_u, grad_dt, grad_weights.sum(0), grad_parameters.sum(0)


def _chunk_ends(
    x: Tensor, dt: Tensor, A: Tensor, W: Tensor, dt_bias: Tensor, division: Plan, backward: bool
) -> tuple[Tensor, Tensor]:
    """What `_chunk_ends_kernel` gives, (batch, chunks, states, channels) and (batch, chunks, channels)."""
    batch, length, channels = x.shape
    states = A.shape[1]
    block, blocks, chunk, chunks = division
    dtype = compute_dtype(x)
    ends = x.new_empty(batch, chunks, states, channels, dtype=dtype)
    totals = x.new_empty(batch, chunks, channels, dtype=dtype)
    launch(
        _chunk_ends_kernel,
        batch * (chunks - 1) * blocks,
        (x, dt, A, W, dt_bias, ends, totals),
        (*_strides(x, dt, W), length, channels, chunk, chunks, blocks),
        STATES=states,
        BLOCK=block,
        STEPS=_INTERVAL,
        ALIGN=_alignment(W),
        COMPUTE=_triton_dtype(dtype),
        BACKWARD=backward,
        **_walk_options(states, chunks),
    )
    return ends, totals


def _convolve_forward(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _run_convolve(x, weight, y)
    return y


def _run_convolve(x: Tensor, weight: Tensor, y: Tensor) -> None:
    batch, length, width = x.shape
    if x.numel() == 0:
        return
    x, weight = _rows(x), weight.contiguous()
    programs = batch * _cdiv(length, _TILE["STEPS"]) * _cdiv(width, _TILE["BLOCK"])
    with on_device(x.device):
        numbers = (*_strides(x, y), length, width)
        compute = _triton_dtype(compute_dtype(x))
        launch(_convolve_kernel, programs, (x, weight, y), numbers, COMPUTE=compute, **_TILE)


def _run_convolve_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight as (3, width)."""
    batch, length, width = x.shape
    dtype = compute_dtype(x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_x, x.new_zeros(3, width, dtype=dtype)
    grad_y, x, weight = _rows(grad_y), _rows(x), weight.contiguous()
    tiles = batch * _cdiv(length, _BACKWARD_TILE["STEPS"])
    grad_weight = x.new_empty(tiles, 3, width, dtype=dtype)
    with on_device(x.device):
        launch(
            _convolve_backward_kernel,
            tiles * _cdiv(width, _BACKWARD_TILE["BLOCK"]),
            (grad_y, x, weight, grad_x, grad_weight),
            (*_strides(grad_y, x), length, width),
            COMPUTE=_triton_dtype(dtype),
            **_BACKWARD_TILE,
        )
    return grad_x, grad_weight.sum(0)


def _fake_forward(u, dt, A, B, C, D, dt_bias, z, weight, save_states):
    batch, length, channels = u.shape
    intervals = _cdiv(length, _INTERVAL) if save_states else 0
    starts = u.new_empty(batch, intervals, A.shape[1], channels, dtype=compute_dtype(u))
    return u.new_empty(batch, length, channels + (0 if z is None else z.shape[2])), starts


def _fake_backward(grad_y, u, dt, A, B, C, D, dt_bias, starts):
    batch, length, channels = u.shape
    states = A.shape[1]
    grad_u, grad_dt = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt))
    return grad_u, grad_dt, starts.new_empty(batch, length, 2, states), starts.new_empty(states + 2, channels)


def _fake_convolve_forward(x, weight):
    return x.new_empty(x.shape)


def _fake_convolve_backward(grad_y, x, weight):
    grad_weight = x.new_empty(3, x.shape[2], dtype=compute_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_weight


def _save_for_scan(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made for the states, which nobody takes from here


def _gradients_of_scan(ctx, grad_out, grad_starts):
    if grad_out is None:
        return (None,) * 10
    _refuse_second_derivatives()
    u, dt, A, B, C, D, dt_bias, z, weight, starts = ctx.saved_tensors
    channels, states = A.shape
    grad_y = grad_out[:, :, :channels]
    grad_u, grad_dt, grad_weights, grad_parameters = _scan_backward(grad_y, u, dt, A, B, C, D, dt_bias, starts)
    grad_B, grad_C = grad_weights.to(torch.promote_types(B.dtype, C.dtype)).unbind(2)
    grad_A, grad_D, grad_bias = grad_parameters.split([states, 1, 1])
    gradients = [
        grad_u,
        grad_dt,
        grad_A.T.to(A.dtype),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        grad_D[0].to(D.dtype),
        grad_bias[0].to(dt_bias.dtype),
    ]
    grad_z = grad_weight = None
    if z is not None:
        grad_z, grad_weight = _gradients_of_taps(grad_out[:, :, channels:], z, weight)
    return *gradients, grad_z, grad_weight, None


def _save_for_convolve(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True: backend='triton' has no second derivatives; use backend='torch'"
                           " (MAMBAVISION_SCAN=torch)")  # fmt: skip


def _gradients_of_convolve(ctx, grad_y):
    _refuse_second_derivatives()
    return _gradients_of_taps(grad_y, *ctx.saved_tensors)


def _gradients_of_taps(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _convolve_backward(grad_y, x, weight)
    return grad_x, grad_weight.T.unsqueeze(1).to(weight.dtype)


_scan = define(__name__, "scan", _forward, _fake_forward, _save_for_scan, _gradients_of_scan)
_scan_backward = define(__name__, "scan_backward", _backward, _fake_backward)
_convolve = define(
    __name__, "convolve", _convolve_forward, _fake_convolve_forward, _save_for_convolve, _gradients_of_convolve
)
_convolve_backward = define(__name__, "convolve_backward", _run_convolve_backward, _fake_convolve_backward)


# ---------------------------------------------------------------------------------------------------------------------


_launched = {}  # kernels that were launched, compiled, and what they were given besides tensors
_MOST_LAUNCHED = 4096  # each size of an image, and of a batch, adds some


def launch(kernel: triton.JITFunction, programs: int, tensors: tuple, numbers: tuple, **constants) -> None:
    """kernel[(programs,)](*tensors, *numbers, **constants), from the second time on in a third of Triton's own time.

    It binds and examines every argument at every launch, which takes longer than a small scan. So the compiled
    kernel is kept by what Triton would see: types, alignment and values. Debugging or instrumentation of Triton's that
    is switched on later is not seen.
    """
    if torch.version.hip:  # where Triton looks at the tensors' sizes too
        kernel[(programs,)](*tensors, *numbers, **constants)
        return
    types, alignments = [x.dtype for x in tensors], [x.data_ptr() % 16 for x in tensors]
    key = (kernel.fn, tensors[0].device, *types, *alignments, *numbers, *constants.values())
    compiled, rest = _launched.get(key, (None, ()))
    if compiled is not None:
        compiled[programs, 1, 1](*tensors, *rest)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, **constants)
    if not isinstance(compiled, triton.compiler.CompiledKernel):  # interpreted, or not compiled yet
        return
    if len(_launched) >= _MOST_LAUNCHED:
        _launched.clear()
    given = len(tensors) + len(numbers)
    _launched[key] = compiled, (*numbers, *[constants[name] for name in kernel.arg_names[given:]])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv is a function of kernels, and takes 5 us


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows; vectors and matrices are read as contiguous altogether."""
    return x if x.ndim == 3 and x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of the sequences and steps of (batch, length, width) tensors, in elements."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _alignment(*tensors: Tensor) -> int:
    """The power of two, at most 16, of bytes on which every row of all of them begins."""
    places = 16
    for x in tensors:
        size, (batch, step, _) = x.element_size(), x.stride()
        places |= x.data_ptr() | batch * size | step * size
    return places & -places  # the lowest bit that any of them has


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device):
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
