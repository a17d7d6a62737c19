"""Checkpoints in the formats in which weights are published or saved by training, and the converter run on them."""

import argparse
import contextlib
import io
import math
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from conftest import SHAPES, SMALL
from repository import convert_checkpoint
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.modeling_mambavision import MambaVisionModelForImageClassification
from weights import fill, filled


# The settings of `SMALL` as if they were a published variant, so that most tests convert 0.3 M parameters.
SMALL_VARIANT = {name: value for name, value in SMALL.items() if name != "num_labels"}


@dataclass
class Run:
    code: int
    out: str
    err: str


def convert(*arguments) -> Run:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = convert_checkpoint.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Run(code, out.getvalue(), err.getvalue())


def converted(*arguments) -> Run:
    run = convert(*arguments)
    assert run.code == 0, run.err
    return run


def small_weights(seed: int = 0, **overrides) -> dict[str, torch.Tensor]:
    """The small variant's tensors under the published names, without the prefix `model.`."""
    with torch.device("meta"):
        model = MambaVisionModelForImageClassification(MambaVisionConfig(**{**SMALL, **overrides}))
    return filled({name.removeprefix("model."): t.shape for name, t in model.state_dict().items()}, seed)


def published_weights(variant: str) -> dict[str, torch.Tensor]:
    """As `filled`, but the large matrices are stretches of one table of random numbers: 740 M are there in seconds."""
    table = torch.randn(2**25, generator=torch.Generator().manual_seed(0))

    def tensor(name, shape):
        size = math.prod(shape)
        if size < 2**16:
            return fill(name, shape)
        start = zlib.crc32(name.encode()) % (len(table) - size)
        return table[start : start + size].view(shape) / math.sqrt(math.prod(shape[1:]))

    return {name: tensor(name, shape) for name, shape in SHAPES[variant].items()}


def shapes_only(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that occupy no memory."""
    return {
        name: torch.zeros((), dtype=torch.long if name.endswith("num_batches_tracked") else None).expand(shape)
        for name, shape in shapes.items()
    }


def training_state(weights: dict[str, torch.Tensor], **more) -> dict:
    """What timm's training loop saves: the weights, and an optimizer, a namespace and numbers of numpy beside them."""
    parameters = [torch.nn.Parameter(t.clone()) for t in list(weights.values())[:3] if t.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    return {
        "epoch": 309,
        "arch": "mamba_vision_T",
        "state_dict": weights,
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="mamba_vision_T", lr=5e-4, output=Path("runs"), mean=(0.5, 0.5, 0.5)),
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "metric": np.float64(82.3),
        **more,
    }


def save(path: Path, content: dict, **options) -> Path:
    torch.save(content, path, **options)
    return path


def save_mm(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """As mmengine's training loop saves, its log included: instances of a class that is not there when it is read."""
    modules = {name: types.ModuleType(name) for name in ("mmengine", "mmengine.logging", HISTORY)}

    class HistoryBuffer:
        def min(self):
            pass

    HistoryBuffer.__module__ = HistoryBuffer.min.__module__ = HISTORY
    HistoryBuffer.__qualname__, HistoryBuffer.min.__qualname__ = "HistoryBuffer", "HistoryBuffer.min"
    modules[HISTORY].HistoryBuffer = HistoryBuffer
    log = HistoryBuffer()
    log.__dict__.update(_log_history=np.arange(3.0), _statistics_methods={"min": HistoryBuffer.min})
    content = {
        "meta": {"epoch": 127, "iter": 160000, "cfg": "model = dict(...)", "dataset_meta": {"classes": ("wall",)}},
        "state_dict": weights,
        "message_hub": {"log_scalars": {"train/loss": log}, "runtime_info": {"loss": np.float32(0.1)}},
        "optimizer": {"state": {}, "param_groups": []},
    }
    sys.modules.update(modules)
    try:
        return save(path, content)
    finally:
        for name in modules:
            del sys.modules[name]


HISTORY = "mmengine.logging.history_buffer"


# Run on a file of pixels and folders: each model's outputs, put into its folder.
RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
for folder in map(Path, sys.argv[2:]):
    model, info = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        output = model.eval()(torch.load(sys.argv[1]), output_hidden_states=True)
        pooled = model.model.pool(output.hidden_states[-1])
    maps = {f"map{i}": stage_map for i, stage_map in enumerate(output.hidden_states)}
    save_file({"logits": output.logits, "pooled": pooled, **maps}, folder / "outputs.safetensors")
"""


def published_model(module, variant: str, weights: dict) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """The published package's model, as a function from pixels to its logits, pooled features and four maps."""
    name = variant.replace("MambaVision-", "mamba_vision_").replace("-1K", "").replace("-21K", "_21k").replace("-", "_")
    with patch.object(torch.nn.init, "kaiming_uniform_"), patch.object(module, "trunc_normal_"):  # all of it is loaded
        model = getattr(module, name)(layer_scale=VARIANTS[variant]["layer_scale"]).eval()
    model.load_state_dict(weights, assign=True)
    maps = {}
    for i, level in enumerate(model.levels):
        if level.downsample is None:
            level.register_forward_hook(lambda module, inputs, output, i=i: maps.update({f"map{i}": output}))
        else:  # the level gives only what comes after the downsampling
            level.downsample.register_forward_pre_hook(lambda module, inputs, i=i: maps.update({f"map{i}": inputs[0]}))

    @torch.inference_mode()
    def outputs(pixels):
        pooled = model.forward_features(pixels)
        return {"logits": model.head(pooled), "pooled": pooled, **maps}

    return outputs
