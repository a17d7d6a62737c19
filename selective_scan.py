"""The selective scan of MambaVision's mixer: a reference, fast forms in plain torch, and the choice between backends.

For every sequence b, step t, channel d and state n, with h starting at 0 (Gu and Dao, "Mamba", arXiv 2312.00752):

    delta[b, t, d] = softplus(dt[b, t, d] + dt_bias[d])
    h[b, t, n, d]  = exp(delta[b, t, d] * A[d, n]) * h[b, t-1, n, d] + delta[b, t, d] * B[b, t, n] * u[b, t, d]
    y[b, t, d]     = sum_n C[b, t, n] * h[b, t, n, d] + D[d] * u[b, t, d]

Shapes, the same for every function here:

    u, dt      (batch, length, channels)    input and step before softplus
    A          (channels, states)           negative: the decay rates
    B, C       (batch, length, states)      input and output weights of each step
    D, dt_bias (channels,)                  skip weight, and what is added to dt
    y          (batch, length, channels)    output, in u's dtype

The arithmetic is float32, or float64 where u is, whatever the inputs' dtypes: in half precision the state overflows.
"""

import functools
import logging
import math
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import (
    compute_dtype,
    define,
    evenly,
    is_traced_for_export,
    is_transformed,
    misreads_layouts,
    needs_gradient,
)


try:
    from .selective_scan_triton import convolve as _triton_convolve
    from .selective_scan_triton import runs_on as _triton_runs_on
    from .selective_scan_triton import scan as _triton_scan
    from .selective_scan_triton import scan_concat as _triton_scan_concat

    _triton_missing = None
except ImportError as error:
    _triton_missing = str(error)


BACKENDS = ("torch", "triton", "mamba_ssm")
HALVES = (torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)

_LOG2_E = math.log2(math.e)
# Elements of one step of all chunks for each thread, two of which stay in its core's cache
_SLICE_ELEMENTS = 2**16
# Elements (steps, batch, channels) at a time, in all chunks: 4 MiB of float32 for each of the inputs
_PART_ELEMENTS = 2**20
# Fewer chunks than this gain less than it costs to compute their decays twice
_LEAST_CHUNKS = 4
# Decays of a few sequences, 1 MiB of float32, are computed all at once and kept for the second walk
_KEPT_ELEMENTS = 2**18
# Elements of each of the three buffers that the backward pass works in: 1.5 MiB of float32
_BLOCK_ELEMENTS = 3 * 2**17
# Elements (steps, batch, channels) at a time there, in some blocks: 1 MiB of float32 for each tensor
_BACKWARD_PART_ELEMENTS = 2**18
# From one saved state to the next. Of so few steps, a block has enough segments for torch to share them among threads;
# and all states that are saved take as much memory as u.
_SEGMENT_STEPS = 8
# Fewer steps than this are not worth the fixed cost of a block; rather take fewer sequences at a time.
_LEAST_STEPS = 16
# On a GPU, where each operator costs a launch of some 10 us, in which a slow one moves 3 MB: worked out, not timed
_GPU_SLICE_ELEMENTS, _GPU_PART_ELEMENTS, _GPU_BLOCK_ELEMENTS, _GPU_BACKWARD_PART_ELEMENTS = 2**22, 2**24, 2**24, 2**24


def _touch_constants() -> None:
    """Keep softplus fast on AMD's processors with AVX-512, where it takes six times as long in a new process.

    Its logarithm (Sleef's log1p) loads a constant under a mask, which only a negative zero sets. As long as nothing has
    touched that page of torch's, the processor suppresses a page fault in microcode at every such load.
    """
    torch.log1p(torch.tensor([-0.0], device="cpu", dtype=torch.float32))


def _keep_freed_memory() -> None:
    """Keep what a forward pass frees for the next one, which would otherwise fetch it from the system page by page.

    At the end of a thread's heap, glibc gives memory back as soon as twice the size of the largest block that it has
    unmapped is free, counting blocks of up to 32 MiB. So free one of nearly that size, which nobody has written to:
    from then on up to 64 MiB stay. For one image, a thousand page faults took 3 % of the time.
    """
    torch.empty(2**25 - 2**16, device="cpu", dtype=torch.uint8)


_touch_constants()
_keep_freed_memory()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_touch_constants)


def cpuinfo() -> str:
    """What Linux says of the processor; nothing on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""


_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
# Whether MKL's exp and log1p take two thirds of the time of torch's own: on other makers' processors they take longer
_MKL_IS_FAST = torch.backends.mkl.is_available() and "GenuineIntel" in cpuinfo()


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    has = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if _IS_ARM and "asimdfhm" not in cpuinfo():  # oneDNN then multiplies it by its slow reference code
        has[torch.float16] = False
    return tuple(dtype for dtype in has if has[dtype])


# In which oneDNN, and with it torch's fast operators, computes on this CPU
ONEDNN_DTYPES = _onednn_dtypes()


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, backend: str = "auto"
) -> Tensor:
    """The selective scan, differentiable in every tensor; shapes as in the module's docstring.

    Args:
        backend: "torch", "triton", "mamba_ssm", or "auto" for the best of those that can run here. The environment
            variable MAMBAVISION_SCAN replaces "auto" for the process. In export, under the transforms of torch.func and
            on Apple's GPUs a form in torch's own operators takes the place of all of them.

    Raises:
        ValueError: the shapes do not fit, or there is no such backend, or "triton" is to compute a number of states
            that is no power of two.
        TypeError: "mamba_ssm" is to compute float64.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    _check_shapes(u, dt, A, B, C, D, dt_bias)
    if is_traced_for_export() or is_transformed() or misreads_layouts(u.device):
        return _scan_traceable(u, dt, A, B, C, D, dt_bias)
    inputs = (u, dt, A, B, C, D, dt_bias)
    backend = backend_on(u.device, backend)
    if backend == "triton":
        return _triton_scan(*inputs)
    if backend == "mamba_ssm":
        return _mamba_ssm_scan(*inputs)
    return _torch_scan(*inputs)


def infer_scan_(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """`selective_scan` in the place of u, which is in float32, of shapes that fit, on a CPU without autocast, where
    nobody records, traces or looks on: what it asks takes a tenth of the time for one image."""
    backend_on(u.device)  # raises where another than torch was asked for
    _scan_into(u, u.new_empty(0, len(u)), u, dt, A, B, C, D, dt_bias)
    return u


def silu_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """silu of the mixer's depthwise convolution along the steps: x (batch, length, width), taps (width, 1, 3)."""
    backend = "torch" if is_transformed() else backend_on(x.device)
    if backend == "triton":
        is_fused_by_compiler = torch.compiler.is_compiling() and not needs_gradient(x, weight)
        return _convolve_by_taps(x, weight) if is_fused_by_compiler else _triton_convolve(x, weight)
    if backend == "mamba_ssm" and has_causal_conv1d(x.device):
        return _causal_conv1d(x, weight)
    return _convolve(x, weight)


def scan_concat(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor, weight: Tensor
) -> Tensor:
    """cat([selective_scan(u, ...), silu_convolve(z, weight)], -1), written by the kernels where it belongs on a GPU."""
    if backend_on(u.device) == "triton" and not is_transformed():
        return _triton_scan_concat(u, dt, A, B, C, D, dt_bias, z, weight)
    return torch.cat([selective_scan(u, dt, A, B, C, D, dt_bias), silu_convolve(z, weight)], dim=-1)


@torch.compiler.assume_constant_result
def backend_on(device: torch.device, backend: str = "auto") -> str:
    """The backend that `selective_scan` takes for tensors on a device; arguments and errors as there."""
    if backend == "auto":
        backend = os.environ.get("MAMBAVISION_SCAN") or "auto"
    return choose_backend(backend, device.type, lambda name: _failure(name, device))


def choose_backend(backend: str, device_type: str, failure: Callable[[str], str | None]) -> str:
    """The backend that runs where `backend` is asked for; `failure` says why one of the others than torch's cannot."""
    if backend == "auto":
        return "triton" if device_type == "cuda" and failure("triton") is None else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} is not a scan backend; choose one of auto, {', '.join(BACKENDS)}")
    reason = None if backend == "torch" else failure(backend)
    if reason is not None:
        raise RuntimeError(f"{backend=} cannot run on {device_type}: {reason}; use 'torch' (MAMBAVISION_SCAN=torch)")
    return backend


def selective_scan_reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """The definition, one step after the other: what the tests compare with. Never chosen."""
    dtype = compute_dtype(u)
    x, A, B, C, D = (tensor.to(dtype) for tensor in (u, A, B, C, D))
    delta = F.softplus(dt.to(dtype) + dt_bias.to(dtype))
    h = x.new_zeros(u.shape[0], A.shape[1], u.shape[2])
    y = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, None] * A.T)
        h = decay * h + B[:, t, :, None] * (delta[:, t] * x[:, t])[:, None]
        y.append((C[:, t, :, None] * h).sum(1) + D * x[:, t])
    return torch.stack(y, 1).to(u.dtype) if y else torch.zeros_like(u)


# ---------------------------------------------------------------------------------------------------------------------
# The other backends. That a package is installed does not mean that it works: mamba_ssm may lack its CUDA extension,
# and Triton a C compiler. So each is tried once on a scan so small that it costs nothing.
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _failure(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None where it can; says once, in the log, what it found."""
    with ThreadPoolExecutor(1) as thread:  # without the caller's modes: of fake tensors no result can be read
        reason = thread.submit(_PROBES[backend], device).result()
    if reason is None:
        _log.info("selective scan: %s works on %s", backend, device)
    else:
        _log.warning("selective scan: %s cannot run on %s: %s", backend, device, reason)
    return reason


def _triton_failure(device: torch.device) -> str | None:
    if _triton_missing is not None:
        return _triton_missing
    if not _triton_runs_on(device):
        return "Triton needs a ROCm device, or a CUDA device of compute capability 7.0 or higher"
    # twice: kernels are launched another way from the second time on
    return _scan_difference(_triton_scan, device) or _scan_difference(_triton_scan, device)


def _mamba_ssm_failure(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "mamba_ssm needs a CUDA device"
    return _scan_difference(_mamba_ssm_scan, device)


@torch.compiler.assume_constant_result
def has_causal_conv1d(device: torch.device) -> bool:
    """Whether causal_conv1d's kernel, which goes with the backend mamba_ssm, works on a device."""
    return _failure("causal_conv1d", device) is None


def _causal_conv1d_failure(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "causal_conv1d needs a CUDA device"
    return _convolution_difference(_causal_conv1d, device)


_PROBES = {
    "triton": _triton_failure,
    "mamba_ssm": _mamba_ssm_failure,
    "causal_conv1d": _causal_conv1d_failure,
}


def _scan_difference(scan: Callable[..., Tensor], device: torch.device) -> str | None:
    values = torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float32, device=device)
    u, B = values.view(2, 5, 8), values.flip(0).view(2, 5, 8)
    A, D = -1 - values[:64].view(8, 8).exp(), values[:8]
    return _difference(scan, _torch_scan, u, u.flip(1), A, B, B.flip(1), D, D.flip(0))


def _convolution_difference(convolve: Callable[..., Tensor], device: torch.device) -> str | None:
    x = torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float32, device=device).view(2, 5, 8)
    return _difference(convolve, _convolve, x, x[0, :3].T.unsqueeze(1))


@torch.no_grad()
def _difference(function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> str | None:
    """What keeps `function` from giving what `reference` does; None if it does."""
    try:
        # on the CPU, for the device's own products may be allowed to round: TensorFloat32
        error = (function(*inputs).cpu() - reference(*(x.cpu() for x in inputs))).abs().max().item()
    except torch.cuda.OutOfMemoryError:  # says nothing about the backend: the caller may free memory and come again
        raise
    except Exception as exception:  # a broken installation may raise anything
        return f"{type(exception).__name__}: {exception}".strip().splitlines()[0]
    return None if error < 1e-4 else f"its result on a small input is off by {error:.2g}"


@torch.compiler.disable
def _mamba_ssm_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """mamba_ssm's CUDA kernel: (batch, channels, length), everything along the steps in u's dtype."""
    try:
        import selective_scan_cuda  # noqa: F401 (the package imports without it, and then fails when called)
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError(f"{error}; pip install mamba-ssm builds it") from error
    if u.dtype == torch.float64:
        raise TypeError("backend='mamba_ssm' takes no float64, got u in float64; use backend='torch'")
    u_, dt_, B_, C_ = (x.to(u.dtype).transpose(1, 2) for x in (u, dt, B, C))
    y = selective_scan_fn(
        u=u_, delta=dt_, A=A.float(), B=B_, C=C_, D=D.float(), delta_bias=dt_bias.float(), delta_softplus=True
    )
    return y.transpose(1, 2)


@torch.compiler.disable
def _causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """causal_conv1d's kernel looks back two steps; ours looks at both neighbours, so it is that, a step later."""
    from_right = F.pad(x.transpose(1, 2), (0, 1)).contiguous()
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        raise ImportError(f"{error}; pip install causal-conv1d builds it") from error
    y = causal_conv1d_fn(x=from_right, weight=weight[:, 0].to(x.dtype), bias=None, activation="silu")
    return y[:, :, 1:].transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The scan in plain torch, in chunks of steps that all go on together.
#
# One step of a sequence is too small for an operator, and all steps at once are too large for the caches. So sequences
# are cut into as many chunks as make one step of all of them a good size, (chunks, batch, states, channels), and the
# chunks are walked twice: from a state of zero, for what each adds to the state that it starts with; then, those states
# known, for the outputs, which one small matrix product per step makes of the states. Of every operator a thread gets
# the same chunks. Long sequences are taken in parts, so that memory beyond the output does not grow with the length.
#
# The backward pass goes through blocks of steps from the last to the first, and computes their states once more. Some
# were saved, each the start of a segment, and so all segments of a block are walked at once.
# ---------------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # torch 2.9's torch.compile cannot look inside
def _knows_autocast(device_type: str) -> bool:
    """Whether autocast can be asked about a device at all: torch 2.4 raises for Apple's GPUs, any torch for `meta`."""
    return torch.amp.is_autocast_available(device_type)


def _in_full_precision(scan: Callable) -> Callable:
    """Without autocast, which would give the matrix products inside a scan half precision."""

    @functools.wraps(scan)
    def run(u, *others):
        device_type = u.device.type
        on = _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if on else nullcontext():
            return scan(u, *others)

    return run


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, save_states: bool
) -> tuple[Tensor, Tensor]:
    """Outputs y, and the states that segments start with and the last (segments + 1, batch, states, channels), empty
    unless saved.
    """
    batch, length, channels = u.shape
    states = A.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    saved = _plan(u, states, is_training=True).saved(length) if save_states else 0
    starts = u.new_empty(saved, batch, states, channels, dtype=compute_dtype(u))
    _scan_into(y, starts, u, dt, A, B, C, D, dt_bias)
    return y, starts


def _scan_into(
    y: Tensor, starts: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> None:
    """Writes the outputs to y, which may be u itself, and to `starts`, unless it is empty, the states."""
    batch, length, _ = u.shape
    dtype = compute_dtype(u)
    plan = _plan(u, A.shape[1], is_training=len(starts) > 0)
    A, D, dt_bias = A.to(dtype).T.contiguous(), D.to(dtype), dt_bias.to(dtype)
    for tile in _slices(batch, plan.rows):
        state = 0.0
        unsaved = starts[:, tile]
        for part in _slices(length, plan.steps * plan.chunks):
            x, dt_, B_, C_ = (_by_steps(tensor[tile, part], plan.steps).to(dtype) for tensor in (u, dt, B, C))
            delta = torch.add(dt_, dt_bias, out=dt_.new_empty(dt_.shape))
            decays = _softplus_(delta, A)
            steps, chunks = delta.shape[:2]
            padding = steps * chunks - (part.stop - part.start)  # behind the last step of all, whose state nobody needs
            delta_x = torch.mul(delta, x, out=x.new_empty(x.shape))
            saved, unsaved = unsaved.tensor_split([chunks * (steps // plan.segment)])
            out, state = _scan_chunks(delta, delta_x, A, decays, B_, C_, state, saved, plan.segment)
            if padding:
                out.addcmul_(x, D)
                y[tile, part] = out.permute(2, 1, 0, 3).flatten(1, 2)[:, :-padding]
            else:
                torch.addcmul(out, x, D, out=_by_steps(y[tile, part], steps))
        if len(unsaved):
            unsaved[0] = state


def _softplus_(steps: Tensor, A: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Softplus in place, of steps (..., channels); gives the function that computes exp(steps * A), where A is (states,
    channels), of some or all of the steps as (..., 1, channels), and the tensor (..., states, channels) to write to, or
    None.

    By MKL where it is fast, which it is not where an exponential overflows or underflows: there it takes up to sixty
    times as long. Elsewhere with exp2, which is vectorised in torch itself, where exp is MKL's.
    """
    if _MKL_IS_FAST and steps.is_cpu:
        most = steps.amax().item()
        if most < 80 and (max(most, 0) + 1) * A.amin().item() > -80:  # not if it is no number
            steps.exp_().log1p_()
            return lambda steps, out: torch.mul(steps, A, out=out).exp_()
    torch.ops.aten.softplus.out(steps, out=steps)
    A_log2e = A * _LOG2_E
    return lambda steps, out: torch.mul(steps, A_log2e, out=out).exp2_()


def _scan_chunks(
    delta: Tensor,
    delta_x: Tensor,
    A: Tensor,
    decays: Callable[[Tensor, Tensor | None], Tensor],
    B: Tensor,
    C: Tensor,
    state: Tensor | float,
    starts: Tensor,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """What the states put out, (steps, chunks, batch, channels), of chunks that follow one another, and the last state.

    delta, delta_x (steps, chunks, batch, channels); A (states, channels); `decays` from `_softplus_`; B, C (steps,
    chunks, batch, states); `state` before them (batch, states, channels). Writes to `starts`, unless it is empty, the
    states that segments of so many steps start with.
    """
    steps, chunks, batch, channels = delta.shape
    # `ends` are the state before, and those behind each chunk
    decay, ends = delta.new_empty(2 * chunks + 1, batch, len(A), channels).tensor_split([chunks])
    ends[0] = state
    rates, weights, values = (x.unbind(0) for x in (delta.unsqueeze(-2), B.unsqueeze(-1), delta_x.unsqueeze(-2)))
    kept = None
    if delta.numel() * len(A) <= _KEPT_ELEMENTS:
        kept = decays(delta.unsqueeze(-2), None).unbind(0)

    def advance(h: Tensor, t: int) -> None:
        h.mul_(decays(rates[t], decay) if kept is None else kept[t]).addcmul_(weights[t], values[t])

    if chunks > 1:
        h = torch.mul(weights[0], values[0], out=ends[1:])
        for t in range(1, steps):
            advance(h, t)
        # of a whole chunk, which may well underflow
        torch.mul(delta.sum(0).unsqueeze(-2), A * _LOG2_E, out=decay).exp2_()
        end, lasting = ends.unbind(0), decay.unbind(0)
        for k in range(chunks - 1):
            end[k + 1].addcmul_(lasting[k], end[k])
    h = ends[:-1]
    out = torch.empty_like(delta)
    rows, matrices, products = (x.flatten(-4, -3) for x in (C.contiguous().unsqueeze(-2), h, out.unsqueeze(-2)))
    for t, (row, product) in enumerate(zip(rows.unbind(0), products.unbind(0), strict=True)):
        if len(starts) and t % segment == 0:
            starts[t // segment :: steps // segment].copy_(h)
        advance(h, t)
        torch.bmm(row, matrices, out=product)
    return out, h[-1]


def _backward(
    grad_y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D and dt_bias; `starts` are the states that the forward pass saved."""
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u)
    A_, D_, bias = A.to(dtype).T.contiguous(), D.to(dtype), dt_bias.to(dtype)
    plan = _plan(u, states, is_training=True)
    lanes, blocks = _divide_backward(plan, length, channels, states, u.device.type)
    grads, totals = [], [torch.zeros_like(x) for x in (A_, D_, bias)]

    def outputs():
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, B, C)]

    for tile in _slices(batch, plan.rows):
        inputs = [x[tile].transpose(0, 1) for x in (u, dt, B, C, grad_y)]
        work = _Work(A_, tile.stop - tile.start, plan.segment, lanes)
        for part in reversed(_slices(length, plan.segment * lanes * blocks)):
            x, dt_, B_, C_, gy = (tensor[part].to(dtype) for tensor in inputs)
            saved = starts[part.start // plan.segment :, tile]
            delta, grad_delta_x, B_, C_, grad_delta, added_A = _walk_back(x, dt_, B_, C_, gy, A_, bias, saved, work)
            if part.start == 0:
                work = None  # whose memory the gradients may take
            grads = grads or outputs()
            grad_u, grad_dt, grad_B, grad_C = (grad[tile].transpose(0, 1)[part] for grad in grads)
            grad_B.copy_(B_)
            grad_C.copy_(C_)
            grad_delta.addcmul_(grad_delta_x, x)
            torch.addcmul(grad_delta_x.mul_(delta), gy, D_, out=grad_u)
            grad_dt.copy_(grad_delta.mul_(torch.add(dt_, bias, out=delta).sigmoid_()))
            added = added_A, torch.mul(gy, x, out=delta).sum((0, 1)), grad_delta.sum((0, 1))
            for total, of_part in zip(totals, added, strict=True):
                total += of_part
            del delta, grad_delta_x, grad_delta  # before the next ones are made
    grad_u, grad_dt, grad_B, grad_C = grads or outputs()
    grad_A, grad_D, grad_bias = totals
    grad_A = grad_A.T.to(A.dtype).contiguous()
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D.to(D.dtype), grad_bias.to(dt_bias.dtype)


def _walk_back(
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    grad_y: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
    work: "_Work",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """delta of some blocks of steps, and the gradients of delta * u, B, C, delta by way of the decays, and A.

    All but the last, and u, dt, B, C and grad_y are (steps, batch, width); A is (states, channels). `starts` are the
    states that segments start with, from the first of these on (segments, batch, states, channels).
    """
    # in the order of the states, to be replaced by gradients
    delta, delta_x, B, C, g = (x.clone(memory_format=torch.contiguous_format) for x in (dt, u, B, C, grad_y))
    decays = _softplus_(delta.add_(dt_bias), A)
    delta_x.mul_(delta)
    tokens = u.shape[1] * work.segment * work.lanes
    blocks = zip(*(x.flatten(0, 1).split(tokens) for x in (delta, delta_x, B, C, g)), strict=True)
    grad_A = torch.zeros_like(A)
    for index, block in reversed(list(enumerate(blocks))):
        grad_A += _block_backward(*block, starts[index * work.lanes :], A, decays, work)
    return delta, delta_x, B, C, g, grad_A


def _block_backward(
    delta: Tensor,
    delta_x: Tensor,
    B: Tensor,
    C: Tensor,
    grad_y: Tensor,
    starts: Tensor,
    A: Tensor,
    decays: Callable[[Tensor, Tensor | None], Tensor],
    work: "_Work",
) -> Tensor:
    """What one block adds to the gradient of A (states, channels). Its tokens' tensors are (steps * batch, width),
    `starts` as `_walk_back` is given them but from the block's first segment on, and `decays` from `_softplus_`.

    The gradients of delta_x, B and C take their places, and that of delta by way of the decays the place of grad_y.
    """
    a, before, after, g, known, segments, steps = work.views(len(delta))
    rates = delta.unsqueeze(-2)
    decays(rates, a)
    torch.mul(B.unsqueeze(-1), delta_x.unsqueeze(-2), out=after)
    known.copy_(starts[: len(known)])
    lasting, h = segments  # with what lies behind the last step, where that ends no segment: nobody reads it
    for t in range(1, len(h)):
        h[t].addcmul_(lasting[t - 1], h[t - 1])

    # grad_h[t] = C[t] grad_y[t] + decay[t+1] grad_h[t+1]
    torch.mul(C.unsqueeze(-1), grad_y.unsqueeze(-2), out=g)
    lasting, grad_h = steps
    grad_h[-1].add_(work.carry)
    for t in range(len(grad_h) - 1, 0, -1):
        grad_h[t - 1].addcmul_(lasting[t], grad_h[t])
    torch.mul(lasting[0], grad_h[0], out=work.carry)

    # rows times matrices: of matrices times columns torch copies each column first
    grad_B = torch.bmm(delta_x.unsqueeze(-2), g.mT).squeeze(-2)
    torch.bmm(B.unsqueeze(-2), g, out=delta_x.unsqueeze(-2))
    B.copy_(grad_B)
    torch.bmm(grad_y.unsqueeze(-2), after.mT, out=C.unsqueeze(-2))
    g.mul_(before).mul_(a)  # now the gradient of delta * A
    grad_A = _sum_of_tokens(torch.mul(g, rates, out=a))
    torch.sum(g.mul_(A), -2, out=grad_y)
    return grad_A


def _sum_of_tokens(x: Tensor) -> Tensor:
    """x.sum(0) in two halves, if there are: of one sum each thread takes some columns, which others have written."""
    return x.unflatten(0, (2, -1)).sum(1).sum(0) if len(x) % 2 == 0 else x.sum(0)


class _Work:
    """The memory that the backward pass of a tile works in, block after block: for decays, states and their gradients,
    of which `views` gives parts.

    carry: the gradient of the state behind the block (batch, states, channels).
    """

    def __init__(self, A: Tensor, batch: int, segment: int, lanes: int):
        self.batch, self.segment, self.lanes = batch, segment, lanes
        tokens = batch * segment * lanes
        memory = A.new_empty(3 * tokens + 2 * batch, *A.shape)
        *self._buffers, self.carry = memory.split([tokens, tokens + batch, tokens, batch])
        self.carry.zero_()
        self._views = {}

    def views(self, tokens: int) -> tuple:
        """For a block of so many tokens; made once, for making one takes half as long as a step's arithmetic:

        decay, h before each step, h behind it, grad_h: (tokens, states, channels).
        h before each segment and behind the last (segments + 1, batch, states, channels).
        decay and h: of each segment's first step (segments, batch, states, channels), of its second, and so on.
        decay and grad_h: of each step (batch, states, channels).
        """
        if tokens not in self._views:
            batch, segment = self.batch, self.segment
            count = -(-tokens // (batch * segment))
            decay, h, grad_h = self._buffers
            known = h.unflatten(0, (-1, batch))[::segment][: count + 1]
            decay_, h_ = (
                x[: batch * segment * count].unflatten(0, (count, segment, batch)).unbind(1) for x in (decay, h)
            )
            decay, before, after, grad_h = decay[:tokens], h[:tokens], h[batch : batch + tokens], grad_h[:tokens]
            steps = decay.split(batch), grad_h.split(batch)
            self._views[tokens] = decay, before, after, grad_h, known, (decay_, h_), steps
        return self._views[tokens]


def _by_steps(tensor: Tensor, steps: int) -> Tensor:
    """(batch, length, width) as (steps, chunks, batch, width), with zeros where the last chunk falls short."""
    padding = -tensor.shape[1] % steps
    if padding:
        tensor = F.pad(tensor, (0, 0, 0, padding))
    return tensor.unflatten(1, (-1, steps)).permute(2, 1, 0, 3)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _Plan(NamedTuple):
    """How a scan is divided."""

    rows: int  # sequences at a time
    steps: int  # of a chunk
    chunks: int  # at a time
    segment: int  # steps of a chunk from one saved state to the next

    def saved(self, length: int) -> int:
        """How many states are: those that segments start with, and the last."""
        return -(-length // self.steps) * (self.steps // self.segment) + 1


def _plan(u: Tensor, states: int, is_training: bool) -> _Plan:
    """In training, where a graph may be made of it, the same for any number of threads."""
    divide = _divide if type(u) is Tensor else _divide.__wrapped__  # the sizes of a fake tensor may have no hash
    return divide(*u.shape, states, u.device.type, is_training, 2 if is_training else torch.get_num_threads())


@functools.lru_cache
def _divide(
    batch: int, length: int, channels: int, states: int, device_type: str, is_training: bool, threads: int
) -> _Plan:
    """Worked out once for each size, which takes as long as a small operator."""
    if device_type == "cpu":
        most, part, block = threads * _SLICE_ELEMENTS, _PART_ELEMENTS, _BLOCK_ELEMENTS
    else:
        most, part, block = _GPU_SLICE_ELEMENTS, _GPU_PART_ELEMENTS, _GPU_BLOCK_ELEMENTS
    row = channels * states
    rows = evenly(batch, block // (row * _LEAST_STEPS) if is_training else 2 * most // row)
    row *= rows
    length = evenly(length, part // (rows * channels))
    chunks = min(most // row, 2 * math.isqrt(length))
    steps = _near_divisor(length, -(-length // chunks) if chunks >= _LEAST_CHUNKS else length)
    segment = _near_divisor(steps, min(steps, _SEGMENT_STEPS))
    if is_training:
        steps = segment * -(-steps // segment)
    return _Plan(rows, steps, -(-length // steps), segment)


@functools.lru_cache
def _divide_backward(plan: _Plan, length: int, channels: int, states: int, device_type: str) -> tuple[int, int]:
    """How many segments make a block of the backward pass, and how many blocks are taken at a time."""
    is_on_cpu = device_type == "cpu"
    block = _BLOCK_ELEMENTS if is_on_cpu else _GPU_BLOCK_ELEMENTS
    blocks = _BACKWARD_PART_ELEMENTS if is_on_cpu else _GPU_BACKWARD_PART_ELEMENTS
    tokens = plan.rows * plan.segment
    segments = -(-length // plan.segment)
    most = max(1, min(segments, block // max(1, tokens * channels * states)))
    lanes = min(most, _near_divisor(segments, most))
    return lanes, evenly(-(-segments // lanes), blocks // (lanes * tokens * channels))


def _near_divisor(length: int, steps: int) -> int:
    """The divisor of `length` that is nearest to `steps` if one is near: zeros for chunks that fall short cost time."""
    near = [n for n in range(-(-steps // 2), min(length, 2 * steps) + 1) if length % n == 0]
    return min(near, key=lambda n: abs(n - steps), default=steps)


def _fake_forward(u, dt, A, B, C, D, dt_bias, save_states):
    batch, _, channels = u.shape
    saved = _plan(u, A.shape[1], is_training=True).saved(u.shape[1]) if save_states else 0
    starts = u.new_empty(saved, batch, A.shape[1], channels, dtype=compute_dtype(u))
    return torch.empty_like(u, memory_format=torch.contiguous_format), starts


def _fake_backward(grad_y, u, dt, A, B, C, D, dt_bias, starts):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, A, B, C, D, dt_bias))


def _save_for_backward(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made for the states, which nobody takes from here


def _gradients(ctx, grad_y, grad_starts):
    if grad_y is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # by `create_graph`: second derivatives, through torch's own operators
        inputs = [x.view_as(x) for x in ctx.saved_tensors[:-1]]  # apart, even where one tensor was given twice
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(_scan_traceable(*inputs), wanted, grad_y, create_graph=True))
        return *(next(grads) if x.requires_grad else None for x in inputs), None
    return *_blocked_scan_backward(grad_y, *ctx.saved_tensors), None


# An operator, so that torch.compile does not unroll the loop over the steps
_blocked_scan = define(
    __name__, "blocked_scan", _in_full_precision(_forward), _fake_forward, _save_for_backward, _gradients
)
_blocked_scan_backward = define(__name__, "blocked_scan_backward", _in_full_precision(_backward), _fake_backward)


def _torch_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    inputs = (u, dt, A, B, C, D, dt_bias)
    return _blocked_scan(*inputs, needs_gradient(*inputs))[0]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """As a convolution of images one pixel high: for those, torch has kernels for the layout of x, channels last.

    On a CPU without gradients tap by tap, which takes half the time; in float32 alone, for each tap would be rounded.
    """
    if misreads_layouts(x.device):
        return _convolve_by_taps(x, weight)
    is_on_cpu = x.device.type == "cpu"
    if is_on_cpu and x.dtype in HALVES and (_IS_ARM or x.dtype not in ONEDNN_DTYPES):
        # torch's own convolutions in half precision take 20 times as long; on ARM these are oneDNN's reference code
        return _in_full_precision(_convolve)(x.float(), weight.float()).to(x.dtype)
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if is_on_cpu and is_float32 and not needs_gradient(x, weight):
        if torch.compiler.is_compiling():
            return _convolve_by_taps(x, weight)
        before, at, after = weight[:, 0].T.contiguous()
        y = x * at
        y[:, 1:].addcmul_(x[:, :-1], before)
        y[:, :-1].addcmul_(x[:, 1:], after)
        return F.silu(y, inplace=True)
    image = x.transpose(1, 2).unsqueeze(2)
    taps = weight.unflatten(1, (1, 1))  # not unsqueezed, or the gradient would have strides that DDP warns of
    return F.silu(F.conv2d(image, taps, padding=(0, 1), groups=len(weight)).squeeze(2).transpose(1, 2))


def _convolve_by_taps(x: Tensor, weight: Tensor) -> Tensor:
    """In pointwise operators, rounded once. torch.compile fuses them into one kernel, and launches it on a GPU in less
    time than ours, which is behind an operator in Python.
    """
    dtype = compute_dtype(x)
    before, at, after = weight[:, 0].to(dtype).unbind(1)
    padded, length = F.pad(x.to(dtype), (0, 0, 1, 1)), x.shape[1]
    y = padded.narrow(1, 0, length) * before + x.to(dtype) * at + padded.narrow(1, 2, length) * after
    return F.silu(y).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The chunked scan: standard torch operators and few of them, for export and for transforms such as torch.func.grad.
# ---------------------------------------------------------------------------------------------------------------------


@_in_full_precision
def _scan_traceable(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """About 2 sqrt(length) steps in place of length: scan all chunks at once, then carry the state across chunks.

    Within a chunk only products of decays are formed, never their quotients or differences of sums of logarithms,
    which lose all digits where steps are long.
    """
    length = u.shape[1]
    size = math.isqrt(length - 1) + 1
    chunks = -(-length // size)
    dtype = compute_dtype(u)
    x = u.to(dtype)
    delta = F.softplus(dt.to(dtype) + dt_bias.to(dtype))

    def chunked(tensor):  # (batch, length, width) -> (batch, chunks, size, width); a zero step leaves the state alone
        return F.pad(tensor, (0, 0, 0, chunks * size - length)).unflatten(1, (chunks, size))

    step = chunked(delta).unsqueeze(-2)
    decay = torch.exp(step * A.to(dtype).T)
    inflow = chunked(B.to(dtype)).unsqueeze(-1) * chunked(delta * x).unsqueeze(-2)
    h, a = [inflow[:, :, 0]], [decay[:, :, 0]]  # state from a chunk's start, and product of decays since
    for t in range(1, size):
        h.append(decay[:, :, t] * h[-1] + inflow[:, :, t])
        a.append(decay[:, :, t] * a[-1])
    states = torch.stack(h, 2)
    if chunks > 1:
        starts = [h[-1][:, 0]]  # state that each chunk but the first starts with
        for k in range(1, chunks - 1):
            starts.append(a[-1][:, k] * starts[-1] + h[-1][:, k])
        # zeros for the first, padded: as a tensor of their own, torch's older exporter would fix their batch
        starts = F.pad(torch.stack(starts, 1), (0, 0, 0, 0, 1, 0))
        states = states + torch.stack(a, 2) * starts.unsqueeze(2)
    y = torch.matmul(chunked(C.to(dtype)).unsqueeze(-2), states).squeeze(-2).flatten(1, 2)[:, :length]
    return (y + D.to(dtype) * x).to(u.dtype)


# ---------------------------------------------------------------------------------------------------------------------


def _check_shapes(u, dt, A, B, C, D, dt_bias) -> None:
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, length, channels), got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (channels={channels}, states), got {tuple(A.shape)}")
    states = A.shape[1]
    if channels == 0 or states == 0:
        raise ValueError(f"A must have at least one channel and one state, got {tuple(A.shape)}")
    for name, tensor, shape in (
        ("dt", dt, (batch, length, channels)),
        ("B", B, (batch, length, states)),
        ("C", C, (batch, length, states)),
        ("D", D, (channels,)),
        ("dt_bias", dt_bias, (channels,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
