#!/usr/bin/env python
"""Time whole models in one run: ours, the published package, and peers from timm; inference and training steps.

The contenders, each in every precision asked for:

    ours              as `from_pretrained` loads it
    ours-fused        the same after `fuse()`; inference only
    published         the package mambavision, with mamba_ssm's CUDA scan on a GPU and a loop over the tokens on a CPU
    convnext_tiny, swin_tiny, resnet50    timm's, in channels_last, with inputs in channels_last
    NAME-compiled     any of them under torch.compile
    NAME-graphs       the same in its mode "reduce-overhead": launched from CUDA graphs

fp32, bf16 and fp16 are weights and inputs of that dtype; autocast-bf16 and autocast-fp16 are float32 weights under
torch.autocast. A training step is forward, cross-entropy, backward and AdamW. All contenders of a group, with all
precisions, take turns. Ours and the published model have the same weights; `difference` says how far apart their logits
are. The peak is that of a large matrix product of the same precision in the same rounds; a training step counts as
three forward passes.
"""

import argparse
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import common  # before torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import number, ratios, spread
from torch import Tensor


OURS = ["ours", "ours-fused"]
PEERS = {
    "convnext_tiny": "convnext_tiny",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "resnet50": "resnet50",
}
CONTENDERS = [*OURS, "published", *PEERS]
COMPILED = {"-compiled": "default", "-graphs": "reduce-overhead"}  # modes of torch.compile
PRECISIONS = {  # dtype of the weights, dtype of autocast
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
}
MODES = ["inference", "training", "resolution"]
RESOLUTIONS = [224, 448, 672, 896]
PUBLISHED = "mambavision==1.2.0"
PUBLISHED_ARGUMENTS = ["dim", "in_dim", "depths", "window_size", "mlp_ratio", "num_heads", "resolution",
                       "drop_path_rate", "layer_scale"]  # fmt: skip

# What runs where nothing else is asked for
DEFAULTS = {
    "cpu": dict(
        batches=[8, 1],
        training_batch=8,
        resolution_batch=1,
        precisions=["fp32", "bf16", "autocast-bf16"],
        rounds=7,
    ),
    "cuda": dict(
        batches=[128, 8, 1],
        training_batch=128,
        resolution_batch=16,
        precisions=["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"],
        rounds=15,
    ),
    "quick": dict(
        batches=[1],
        training_batch=1,
        resolution_batch=1,
        precisions=["fp32", "bf16"],
        rounds=1,
        image_size=64,
        resolutions=[32, 64],
        contenders=["ours", "ours-fused", "published", "resnet50"],
    ),
}


def main(arguments=None):
    with tempfile.TemporaryDirectory(prefix="mambavision-benchmark-") as folder:
        os.environ["HF_MODULES_CACHE"] = folder  # where transformers copies the code of the models it loads
        args = parse(arguments)
        common.quiet()
        return compare(args, Path(folder))


def compare(args, scratch: Path):
    published, reason = None, None
    if any(name.startswith("published") for name in args.contenders):
        published, reason = published_folder(args.published)
    settings = {name: value for name, value in vars(args).items() if name not in ("results", "published")}
    settings["threads"] = torch.get_num_threads()
    results = common.Results(args.results, "throughput", args.device, settings, published)
    print(f"{results.content['machine']['name']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    problems = []
    for variant in args.variants:
        models = Models(variant, args, scratch / variant, published, reason)
        for mode in args.modes:
            for batch in args.batches if mode == "inference" else [getattr(args, f"{mode}_batch")]:
                time_mode = time_resolutions if mode == "resolution" else time_models
                group = time_mode(args, models, mode, batch)
                results.add(group)
                print(f"\n{show(group)}", flush=True)
                problems += common.problems(group, own=("ours",)) + slow_scans(group, args.device)
            models.clear()
    print(f"\nwritten to {results.path}")
    return f"error: {problems[0]}" if problems else 0


def parse(arguments):
    parser = common.Parser(description=__doc__.split("\n")[0])
    names = [f"{name}{suffix}" for suffix in ("", *COMPILED) for name in CONTENDERS]
    parser.add_argument("--variants", type=variant_name, nargs="+", default=["T-1K"], metavar="NAME",
                        help="T, T2, S, B, L, L2, B-21K, ... (default: T)")  # fmt: skip
    parser.add_argument("--contenders", choices=names, nargs="+", metavar="NAME", help=f"of {', '.join(CONTENDERS)}"
                        " (the default), each also NAME-compiled and NAME-graphs")  # fmt: skip
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", metavar="NAME",
                        help=f"of {', '.join(PRECISIONS)} (default: all, on a CPU without fp16's)")  # fmt: skip
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES, help="(default: all; resolution is ours"
                        " alone, by image size)")  # fmt: skip
    parser.add_argument("--batches", type=common.positive, nargs="+", help="for inference (default: 8 1, on a GPU also"
                        " 128)")  # fmt: skip
    parser.add_argument("--training-batch", type=common.positive, help="(default: 8, on a GPU 128)")
    parser.add_argument("--resolution-batch", type=common.positive, help="(default: 1, on a GPU 16)")
    parser.add_argument("--image-size", type=common.positive, help="pixels a side (default: the variant's resolution)")
    parser.add_argument("--resolutions", type=common.positive, nargs="+", metavar="PIXELS", help="image sizes of the"
                        f" mode resolution (default: {' '.join(map(str, RESOLUTIONS))})")  # fmt: skip
    parser.add_argument("--published", type=Path, metavar="FOLDER", help=f"that {PUBLISHED} is installed in (default:"
                        " .cache/mambavision-1.2.0, filled by pip where it is missing)")  # fmt: skip
    common.add_common_arguments(parser)
    args = parser.parse_args(arguments)

    common.prepare(args)
    defaults = {"contenders": CONTENDERS, "resolutions": RESOLUTIONS, **DEFAULTS[args.device]}
    if args.quick:
        defaults |= DEFAULTS["quick"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def variant_name(text: str) -> str:
    """A type of command-line arguments: a published model's name without "MambaVision-", from a short form of it."""
    variants = common.repository("configuration_mambavision").VARIANTS
    for name in (text, f"{text}-1K"):
        if f"MambaVision-{name}" in variants:
            return name
    known = ", ".join(name.removeprefix("MambaVision-") for name in variants)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")


def published_folder(folder: Path | None) -> tuple[Path | None, str | None]:
    """Where the published package is, or None and why it is nowhere.

    It is installed without its dependencies, which need a CUDA compiler.
    """
    if folder is not None:
        if not (folder / "mambavision").is_dir():
            raise ValueError(f"--published: {folder} holds no mambavision; fill it with `pip install --no-deps --target"
                             f" {folder} {PUBLISHED}`")  # fmt: skip
        return folder, None
    folder = common.ROOT / ".cache" / PUBLISHED.replace("==", "-")
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PUBLISHED]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, f"pip could not install {PUBLISHED}; see --published"
        (folder / "complete").touch()
    return folder, None


# ---------------------------------------------------------------------------------------------------------------------
# The contenders
# ---------------------------------------------------------------------------------------------------------------------


class Models:
    """The contenders of one variant, built where they are first used and kept until `clear`."""

    def __init__(self, variant: str, args, folder: Path, published: Path | None, no_published: str | None):
        self.variant, self.device = variant, args.device
        self.folder, self.published, self.no_published = folder, published, no_published
        self.config_class = common.repository("configuration_mambavision").MambaVisionConfig
        self.settings = dict(common.repository("configuration_mambavision").VARIANTS[f"MambaVision-{variant}"])
        if args.quick:
            self.settings["depths"] = [1, 1, 2, 2]  # one block of each kind a stage
        self.image_size = args.image_size or self.settings.get("resolution", 224)
        self.built, self.flops = {}, {}
        torch.manual_seed(0)
        config = self.config_class(**self.settings, num_labels=1000)
        model = common.repository("modeling_mambavision").MambaVisionModelForImageClassification(config)
        model.save_pretrained(folder)
        self.state_dict = model.model.state_dict()

    def clear(self) -> None:
        self.built.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def get(self, name: str, precision: str, training: bool) -> nn.Module:
        """Raises whatever keeps the contender from running here."""
        dtype = PRECISIONS[precision][0]
        key = (name, precision if training else dtype, training)  # two trainings must not share weights
        if key not in self.built:
            if name != eager_name(name):
                mode = COMPILED[name.removeprefix(eager_name(name))]
                eager = self.get(eager_name(name), precision, training)
                self.built[key] = torch.compile(eager, dynamic=False, mode=mode)
            else:
                model = self._build(name, dtype)
                self.built[key] = model.train() if training else model
        return self.built[key]

    def _build(self, name: str, dtype: torch.dtype) -> nn.Module:
        """In evaluation mode, on the device."""
        if name in OURS:
            from transformers import AutoModelForImageClassification

            load = AutoModelForImageClassification.from_pretrained
            model = load(self.folder, trust_remote_code=True, dtype=dtype).to(self.device)
            return model.fuse() if name == "ours-fused" else model
        if name == "published":
            return self._build_published(dtype).to(self.device).eval()
        import timm

        size = {"img_size": self.image_size} if name == "swin_tiny" else {}
        model = timm.create_model(PEERS[name], **size).to(self.device, dtype, memory_format=torch.channels_last)
        return model.eval()

    def _build_published(self, dtype: torch.dtype) -> nn.Module:
        if self.published is None:
            raise ImportError(self.no_published)
        module, scan = common.published_package(self.published, self.device)
        config = self.config_class(**self.settings)
        model = module.MambaVision(**{field: getattr(config, field) for field in PUBLISHED_ARGUMENTS})
        model.load_state_dict(self.state_dict)
        model.scan_backend = scan
        return model.to(dtype)

    def inputs(self, name: str, precision: str, batch: int, size: int | None = None) -> Tensor:
        """Images (batch, 3, size, size), the same ones for all, in the dtype of the weights."""
        size = size or self.image_size
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
        layout = torch.channels_last if eager_name(name) in PEERS else torch.contiguous_format
        return images.to(self.device, PRECISIONS[precision][0]).contiguous(memory_format=layout)

    def flops_per_image(self, name: str, size: int) -> int:
        """Of convolutions, matrix products and attention in a forward pass, a multiplication and an addition each."""
        name = eager_name(name)
        name = "ours" if name in (*OURS, "published") else name  # the same function
        if (name, size) not in self.flops:
            from torch.utils.flop_counter import FlopCounterMode

            model = self.get(name, "fp32", training=False)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(self.inputs(name, "fp32", 1, size))
            self.flops[name, size] = counter.get_total_flops()
        return self.flops[name, size]


def eager_name(name: str) -> str:
    """A contender's name without what says that it is compiled."""
    return next((name.removesuffix(suffix) for suffix in COMPILED if name.endswith(suffix)), name)


def autocast(precision: str, device: str):
    dtype = PRECISIONS[precision][1]
    return torch.autocast(device, dtype) if dtype else contextlib.nullcontext()


def inference(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(precision, images.device.type):
        return logits(model(images))


def training_step(model: nn.Module, optimizer, images: Tensor, labels: Tensor, precision: str) -> None:
    with autocast(precision, images.device.type):
        loss = F.cross_entropy(logits(model(images)).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(output) -> Tensor:
    return getattr(output, "logits", output)


def tensor_bytes(model: nn.Module, optimizer=None) -> int:
    """Of the weights and buffers, and of the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values() if optimizer else ():
        tensors += [x for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in tensors)


def matrix_product(precision: str, device: str, quick: bool):
    """A call that multiplies two large matrices in the precision's arithmetic, and its floating-point operations."""
    n = 128 if quick else 2048 if device == "cpu" else 8192
    weights, cast = PRECISIONS[precision]
    a, b = (torch.randn(n, n, device=device).to(cast or weights) for _ in range(2))
    target = torch.empty_like(a)
    return partial(torch.mm, a, b, out=target), 2 * n**3


# ---------------------------------------------------------------------------------------------------------------------
# The groups
# ---------------------------------------------------------------------------------------------------------------------


def time_models(args, models: Models, mode: str, batch: int) -> dict:
    """All contenders in all precisions on one batch."""
    device, training = args.device, mode == "training"
    calls, entries, peaks = {}, {}, {}
    for precision in args.precisions:
        if training and PRECISIONS[precision][0] != torch.float32:
            continue  # cast weights are for inference
        cast = PRECISIONS[precision][1] or PRECISIONS[precision][0]
        peaks[precision] = f"peak {str(cast).removeprefix('torch.')}"
        calls[peaks[precision]], peak_flops = matrix_product(precision, device, args.quick)
        for name in args.contenders:
            if training and "fused" in name:
                continue
            try:
                call, entry = prepare(models, name, precision, batch, training)
            except Exception as error:  # a contender that does not run here is a result
                entries[f"{name} {precision}"] = {"did_not_run": common.one_line(error)}
                continue
            calls[f"{name} {precision}"], entries[f"{name} {precision}"] = call, entry
    if not training:
        add_differences(calls, entries)
    title = f"{mode}, batch {batch}"
    times, rounds = common.run_rounds(calls, device, args.rounds, args.seconds, args.max_other_cpu, title)
    speedups = []
    for label, entry in entries.items() if rounds["accepted"] else ():
        if label not in times:
            continue
        name, precision = label.split()
        flops = entry["gflop_per_image"] * 1e9 * batch * (3 if training else 1)
        entry["ms"] = spread(1e3 * t for t in times[label])
        entry["images_per_s"] = spread(batch / t for t in times[label])
        entry["percent_of_peak"] = ratios(times[peaks[precision]], times[label], 100 * flops / peak_flops)
        for baseline in baselines(name, precision, times):
            speedups.append({"contender": label, "against": baseline, "speedup": ratios(times[baseline], times[label])})
    return {
        "mode": mode,
        "variant": models.variant,
        "image_size": models.image_size,
        "batch": batch,
        "memory": common.memory_method(device),
        "rounds": rounds,
        "peak_tflops": {
            label.removeprefix("peak "): spread(peak_flops / t / 1e12 for t in times[label])
            for label in dict.fromkeys(peaks.values())
            if times[label]
        },
        "contenders": entries,
        "speedups": speedups,
    }


def prepare(models: Models, name: str, precision: str, batch: int, training: bool):
    """The call to time, warm, and what is known of the contender without timing it."""
    model = models.get(name, precision, training)
    images = models.inputs(name, precision, batch)
    optimizer = None
    if training:
        labels = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(images.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        call = partial(training_step, model, optimizer, images, labels, precision)
    else:
        call = partial(inference, model, images, precision)
    call()
    entry = {
        "gflop_per_image": common.significant(models.flops_per_image(name, models.image_size) / 1e9),
        "weights_mb": common.megabytes(tensor_bytes(model, optimizer)),  # in training with the optimizer's state
        "call_mb": common.megabytes(common.peak_memory(call, images.device.type)),
    }
    scan = getattr(model, "scan_backend", None)
    return call, entry | ({"scan": str(scan)} if scan else {})


def slow_scans(group: dict, device: str) -> list[str]:
    """Ours that scanned in plain torch on a GPU: what kept Triton's kernels from running makes the times worthless."""
    slow = [name for name, entry in group["contenders"].items() if device == "cuda" and entry.get("scan") == "torch"]
    return [f"{name} scanned in plain torch: Triton's kernels do not run here" for name in slow]


def add_differences(calls: dict, entries: dict) -> None:
    """Largest difference of ours from the published model's float32 logits, over their standard deviation."""
    if "published fp32" not in calls:
        return
    expected = calls["published fp32"]().float()
    for label, call in calls.items():
        if label.startswith("ours"):
            error = (call().float() - expected).abs().max() / expected.std()
            entries[label]["difference"] = common.significant(error.item(), 2)


def baselines(name: str, precision: str, times: dict) -> list[str]:
    """What the contender is compared with: the published model in float32 and as it is cast, and ConvNeXt as cast."""
    if eager_name(name) not in OURS:
        return []
    labels = ["published fp32", f"published {precision}", f"convnext_tiny {precision}"]
    return [label for label in dict.fromkeys(labels) if label in times]


def time_resolutions(args, models: Models, mode: str, batch: int) -> dict:
    """Ours on images of growing size, and how far the time is from growing with the pixels."""
    device, precision = args.device, args.precisions[0]
    model = models.get("ours", precision, training=False)
    calls = {}
    for size in args.resolutions:
        calls[f"ours {size}"] = partial(inference, model, models.inputs("ours", precision, batch, size), precision)
    title = f"{mode}s, batch {batch}"
    times, rounds = common.run_rounds(calls, device, args.rounds, args.seconds, args.max_other_cpu, title)
    first = args.resolutions[0]
    entries = {}
    for size, label in zip(args.resolutions, calls, strict=True):
        entries[label] = {"call_mb": common.megabytes(common.peak_memory(calls[label], device))}
        if rounds["accepted"]:
            entries[label]["ms"] = spread(1e3 * t for t in times[label])
            entries[label]["images_per_s"] = spread(batch / t for t in times[label])
            entries[label]["over_linear"] = ratios(times[label], times[f"ours {first}"], (first / size) ** 2)
    return {
        "mode": mode,
        "variant": models.variant,
        "precision": precision,
        "batch": batch,
        "memory": common.memory_method(device),
        "rounds": rounds,
        "contenders": entries,
    }


def show(group: dict) -> str:
    """The group as text."""
    against = {"published fp32": "x published fp32", "published": "x published", "convnext_tiny": "x convnext_tiny"}
    header = ["", "ms", "min", "max", "images/s", "% of peak", "MB", *against.values()]
    if group["mode"] == "resolution":
        header = ["", "ms", "min", "max", "images/s", "MB", "x linear in pixels"]
    rows = []
    for label, entry in group["contenders"].items():
        if "ms" not in entry:
            continue
        row = [label, *(number(entry["ms"][key]) for key in ("median", "min", "max"))]
        row.append(number(entry["images_per_s"]["median"]))
        if group["mode"] == "resolution":
            rows.append([*row, number(entry["call_mb"]), number(entry["over_linear"]["median"])])
            continue
        total = None if entry["call_mb"] is None else entry["weights_mb"] + entry["call_mb"]
        row += [number(entry["percent_of_peak"]["median"]), number(total)]
        precision = label.split()[1]
        speedups = {x["against"]: x["speedup"]["median"] for x in group["speedups"] if x["contender"] == label}
        rows.append([*row, *(number(speedups.get(name if " " in name else f"{name} {precision}")) for name in against)])
    title = "{variant}, {mode}, batch {batch}".format(**group)
    for dtype, peak in group.get("peak_tflops", {}).items():
        title += f", matrix peak {number(peak['median'])} TFLOP/s {dtype}"
    return common.report(title, header, rows, group)


if __name__ == "__main__":
    common.run(main)
