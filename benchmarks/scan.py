#!/usr/bin/env python
"""Time the selective scan alone: each backend, forward and with all gradients, over lengths and the models' widths.

The contenders, which all compute y from the same numbers:

    loop              the form of mamba_ssm's reference, which people put in its place where there is no GPU
    autograd          a scan in blocks of steps, in operators that autograd differentiates; in training only
    torch, triton, mamba_ssm    the backends of `selective_scan`
    mamba_ssm-native  mamba_ssm's CUDA kernels, given their own layout (batch, channels, length)
    NAME-graph        any of them replayed from a CUDA graph: the kernels without the time to launch them

Bytes are those that must move, each input read once and each output written once, so a short scan that stays in the
cache can beat the copy. Memory is what a call takes beyond its inputs, outputs included.
"""

import itertools
from functools import partial

import common  # before torch
import torch
import torch.nn.functional as F
from common import number, ratios, spread
from torch import Tensor


CONTENDERS = {
    "cpu": ["loop", "autograd", "torch"],
    "cuda": ["triton", "mamba_ssm", "mamba_ssm-native", "triton-graph", "mamba_ssm-graph", "mamba_ssm-native-graph"],
}
NAMES = ["loop", "autograd", "torch", "triton", "mamba_ssm", "mamba_ssm-native"]
BASELINES = ["loop", "autograd", "mamba_ssm-native"]
NATIVE = ["loop", "mamba_ssm-native"]  # take (batch, channels, length)
MODES = ["forward", "training"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIMS = {"T": 80, "S": 96, "B": 128, "L": 196, "L3": 256}  # channels of the first stage
STATES = 8
BLOCK_ELEMENTS = 2**19  # of a block of `blocked_autograd`


def main(arguments=None):
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=common.positive, nargs="+", help="(default: 49 196 1024 4096 12544)")
    parser.add_argument("--variants", choices=DIMS, nargs="+", default=["T"], help="whose widths (default: T)")
    parser.add_argument(
        "--batch", type=common.positive, help="sequences (default: 8, on a GPU 128, fewer of great length)"
    )
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", help="(default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--contenders", choices=[*NAMES, *(f"{name}-graph" for name in NAMES)], nargs="+",
                        metavar="NAME", help=f"of {', '.join(NAMES)}, each also NAME-graph")  # fmt: skip
    common.add_common_arguments(parser)
    args = parser.parse_args(arguments)

    common.prepare(args)
    args.lengths = args.lengths or ([7, 49] if args.quick else [49, 196, 1024, 4096, 12544])
    args.rounds = args.rounds or (2 if args.quick else 7 if args.device == "cpu" else 15)
    args.precisions = args.precisions or ["fp32" if args.device == "cpu" else "bf16"]
    args.contenders = args.contenders or CONTENDERS[args.device]
    settings = {name: value for name, value in vars(args).items() if name != "results"}
    results = common.Results(args.results, "scan", args.device, {**settings, "threads": torch.get_num_threads()})
    print(f"{results.content['machine']['name']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    problems = []
    for what in itertools.product(args.modes, args.precisions, args.variants, args.lengths):
        group = time_group(args, *what)
        results.add(group)
        print(f"\n{show(group)}", flush=True)
        problems += common.problems(group, own=("torch", "triton"))
    print(f"\nwritten to {results.path}")
    return f"error: {problems[0]}" if problems else 0


def time_group(args, mode: str, precision: str, variant: str, length: int) -> dict:
    """Times the contenders on one size; see `benchmarks/table.py` for what becomes of the group."""
    device = args.device
    channels = DIMS[variant] * (4 if length < 196 else 2)  # half the width of stage 3, or of stage 2
    batch = args.batch or batch_for(length, mode, device)
    inputs = make_inputs(batch, length, channels, PRECISIONS[precision], device)
    moved = bytes_moved(inputs, mode)
    elements = 2**16 if args.quick else 2**24 if device == "cpu" else 2**28
    source, target = torch.ones(elements, device=device), torch.ones(elements, device=device)
    calls, entries, expected = {"copy": lambda: target.copy_(source)}, {}, None
    for name in args.contenders:
        kind = name.removesuffix("-graph")
        if kind == "autograd" and mode == "forward":
            continue
        if kind == "loop" and mode == "training" and length > 196:
            continue  # each token's gradient fills tensors of all tokens: half a minute a call at 1024
        try:
            scan = contender(kind)
            call = partial(forward if mode == "forward" else training, scan, layout(inputs, kind))
            y = output(scan, layout(inputs, kind), kind)
            expected = y if expected is None else expected
            call()
            entries[name] = {
                "difference": common.significant(((y - expected).abs().max() / expected.std()).item(), 2),
                "memory_mb": common.megabytes(common.peak_memory(call, device)),
            }
            if name != kind:
                call = captured(call)
        except Exception as error:  # a contender that does not run here is a result
            entries[name] = {"did_not_run": common.one_line(error)}
            continue
        calls[name] = call
    title = f"{mode}, {precision}, L = {length}"
    times, rounds = common.run_rounds(calls, device, args.rounds, args.seconds, args.max_other_cpu, title)
    speedups = []
    if rounds["accepted"]:
        copied = 2 * source.nbytes
        for name, entry in entries.items():
            if name not in times:
                continue
            entry["ms"] = spread(1e3 * t for t in times[name])
            entry["gb_per_s"] = spread(moved / t / 1e9 for t in times[name])
            entry["percent_of_copy"] = ratios(times["copy"], times[name], 100 * moved / copied)
            for baseline in baselines(name, times):
                ratio = ratios(times[baseline], times[name])
                speedups.append({"contender": name, "against": baseline, "speedup": ratio})
        copy = {"gb_per_s": spread(copied / t / 1e9 for t in times["copy"])}
    else:
        copy = None
    return {
        "mode": mode,
        "precision": precision,
        "variant": variant,
        "length": length,
        "channels": channels,
        "batch": batch,
        "memory": common.memory_method(device),
        "rounds": rounds,
        "copy": copy,
        "contenders": entries,
        "speedups": speedups,
    }


def batch_for(length: int, mode: str, device: str) -> int:
    """Sequences: on a GPU as many as keep the tokens of 128 windows of 196, on a CPU 8, or 1 if very long."""
    if device != "cpu":
        return max(1, min(128, 128 * 196 // length))
    return 8 if length <= (4096 if mode == "forward" else 1024) else 1


def make_inputs(batch: int, length: int, channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """u, dt, A, B, C, D, dt_bias as `selective_scan` takes them: per-token tensors in `dtype`, the rest in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    A = -torch.arange(1.0, STATES + 1).expand(channels, STATES)
    u, dt, B, C = (normal(batch, length, width).to(dtype) for width in (channels, channels, STATES, STATES))
    inputs = [u, dt - 3, A, B, C, normal(channels), normal(channels)]
    return [x.to(device).contiguous().requires_grad_() for x in inputs]


def bytes_moved(inputs: list[Tensor], mode: str) -> int:
    """Forward: all inputs and y. The backward pass reads the inputs and y's gradient and writes the other gradients."""
    read = sum(x.nbytes for x in inputs)
    forward = read + inputs[0].nbytes
    return forward if mode == "forward" else forward + read + inputs[0].nbytes + read


def layout(inputs: list[Tensor], name: str) -> list[Tensor]:
    """The inputs in the layout of the contender: its own (batch, width, length), where it has one."""
    if name not in NATIVE:
        return inputs
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() if x.ndim == 3 else x for x in inputs]


def contender(name: str):
    """The scan of that name, as a function of the seven tensors.

    Raises:
        ImportError, RuntimeError: it cannot run here; the latter from the call, if not from here.
    """
    if name in NATIVE:
        scan = common.loop if name == "loop" else common.cuda_scan()
        return lambda u, dt, A, B, C, D, dt_bias: scan(u, dt, A, B, C, D, delta_bias=dt_bias, delta_softplus=True)
    if name == "autograd":
        return blocked_autograd
    return partial(common.repository("selective_scan").selective_scan, backend=name)


def forward(scan, inputs: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return scan(*inputs)


def training(scan, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    y = scan(*inputs)
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


def captured(call):
    """The call as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what happens in first calls only is no part of the graph
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def baselines(name: str, times: dict) -> list[str]:
    """What the contender is compared with, launched as it is."""
    kind = name.removesuffix("-graph")
    if kind in NATIVE:
        return []
    return [x for x in (baseline + name.removeprefix(kind) for baseline in BASELINES) if x in times and x != name]


def output(scan, inputs: list[Tensor], name: str) -> Tensor:
    y = forward(scan, inputs).float()
    return y.transpose(1, 2) if name in NATIVE else y


def blocked_autograd(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan in blocks of steps with autograd's gradients: out of place, all that is computed kept."""
    batch, length, _ = u.shape
    A = A.T
    x, dt, B_, C_ = (tensor.transpose(0, 1).float() for tensor in (u, dt, B, C))
    delta = F.softplus(dt + dt_bias)
    h, outputs = x.new_zeros(batch, *A.shape), []
    block = max(1, BLOCK_ELEMENTS // (batch * A.numel()))
    for start in range(0, length, block):
        run = slice(start, start + block)
        decay = torch.exp(delta[run].unsqueeze(-2) * A)
        inflow = B_[run].unsqueeze(-1) * (delta[run] * x[run]).unsqueeze(-2)
        states = []
        for a, b in zip(decay.unbind(0), inflow.unbind(0), strict=True):
            h = torch.addcmul(b, a, h)
            states.append(h)
        outputs.append(torch.matmul(C_[run].unsqueeze(-2), torch.stack(states)).squeeze(-2))
    return (torch.cat(outputs) + D * x).transpose(0, 1).to(u.dtype)


def show(group: dict) -> str:
    """The group as text."""
    speedups = {(x["contender"], x["against"].removesuffix("-graph")): x["speedup"] for x in group["speedups"]}
    against = [name for name in BASELINES if any(key[1] == name for key in speedups)]
    header = ["", "ms", "min", "max", "GB/s", "% of copy", "MB", *(f"x {name}" for name in against)]
    rows = []
    for name, entry in group["contenders"].items():
        if "ms" not in entry:
            continue
        ms = [number(entry["ms"][key]) for key in ("median", "min", "max")]
        rates = [number(entry[key]["median"]) for key in ("gb_per_s", "percent_of_copy")]
        factors = [number(speedups.get((name, baseline), {}).get("median")) for baseline in against]
        rows.append([name, *ms, *rates, number(entry["memory_mb"]), *factors])
    title = "{mode}, {precision}: {batch} x {length} tokens, {channels} channels".format(**group)
    return common.report(title, header, rows, group)


if __name__ == "__main__":
    common.run(main)
