"""Verifying: the folder as a user loads it against what was read, and against the published package."""

import contextlib
import hashlib
import sys
import types
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..selective_scan import selective_scan_reference
from .errors import ConversionError, first_sentence, listed
from .folder import Written, tensor_bytes
from .plan import BACKBONE, CLASSIFICATION, SEGMENTATION, Plan


# In standard deviations of the output: the same float32 arithmetic in another order.
OFFICIAL_TOLERANCE = 1e-4


@torch.inference_mode()
def verify(folder: Path, plan: Plan, written: dict[str, Written], official: bool) -> dict:
    """Load the folder back, compare its tensors with the source's bit for bit, and run it on a random image.

    Args:
        official: whether to compare the outputs with the mambavision package's too.

    Returns:
        the figures of `conversion.json`.

    Raises:
        ConversionError: something is not as it should be.
    """
    model = _load(folder, plan, written)
    different = []
    for name, tensor in tqdm(model.state_dict().items(), desc="verifying", unit="tensor", delay=1):
        if tensor.dtype != written[name].dtype:  # transformers casts BatchNorm's statistics: see the file itself
            with safe_open(folder / written[name].file, "pt") as file:
                tensor = file.get_tensor(name)
        if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != written[name].sha256:
            different.append(name)
    if different:
        raise ConversionError(f"loaded back, {listed(different)} are not what was read")
    # A dense model pads any image to its windows, which are far larger than this.
    side = min(plan.backbone.resolution, 512) if plan.task is CLASSIFICATION else 128
    image = torch.randn(1, plan.backbone.in_chans, side, side, generator=torch.Generator().manual_seed(0))
    output = model(image)
    outputs = output.feature_maps if plan.task is BACKBONE else [output.logits]
    if not all(values.isfinite().all() for values in outputs):
        raise ConversionError(f"loaded back, the model's outputs on a random image of {side} pixels are not finite")
    figures = {
        "tensors_equal_bit_for_bit": len(written),
        "random_image": list(image.shape),
        "outputs_finite": True,
        "largest_output": float(f"{max(values.abs().max().item() for values in outputs):.4g}"),
    }
    if official:
        figures["difference_from_official"] = _compare_with_official(model.float(), plan, image)
    return figures


def _load(folder: Path, plan: Plan, written: dict[str, Written]) -> torch.nn.Module:
    options = {"torch_dtype": "auto", "output_loading_info": True}
    try:
        with _quiet_transformers():
            if plan.task is BACKBONE:  # AutoBackbone of transformers 5 loads nothing from a folder
                loader = get_class_from_dynamic_module(plan.task.auto_map["AutoBackbone"], str(folder))
                model, info = loader.from_pretrained(folder, **options)
            else:
                loader = getattr(transformers, plan.task.auto_class)
                model, info = loader.from_pretrained(folder, trust_remote_code=True, **options)
    except Exception as error:
        raise ConversionError(f"the written folder does not load: {first_sentence(error)}") from error
    wrong = {str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]}
    if wrong := wrong | (model.state_dict().keys() ^ written.keys()):
        raise ConversionError(f"the written folder does not load whole: {listed(sorted(wrong))}")
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers():
    """Without its bars and warnings: what they would tell is checked."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _compare_with_official(model: torch.nn.Module, plan: Plan, image: torch.Tensor) -> dict[str, float]:
    """Largest differences of maps, pooled features and logits, in standard deviations of the package's."""
    ours = model.backbone.model if plan.task is SEGMENTATION else model.model
    names = ("dim", "in_dim", "depths", "window_size", "mlp_ratio", "num_heads", "in_chans", "qkv_bias")
    settings = {name: getattr(plan.backbone, name) for name in (*names, "layer_scale", "layer_scale_conv")}
    classes = plan.config.num_labels if plan.task is CLASSIFICATION else 0
    theirs = import_official().MambaVision(num_classes=classes, **settings).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    if missing := [name for name in missing if classes or not name.startswith("norm.")]:  # no backbone has the norm
        raise ConversionError(f"the mambavision package has tensors of its own: {listed(missing)}")
    if unexpected:
        raise ConversionError(f"the mambavision package lacks tensors: {listed(unexpected)}")

    expected = {}
    for i, level in enumerate(theirs.levels):  # a stage's map is what goes into its downsampling
        if level.downsample is None:
            level.register_forward_hook(lambda module, inputs, output, i=i: expected.update({f"map{i}": output}))
        else:
            level.downsample.register_forward_pre_hook(lambda _, inputs, i=i: expected.update({f"map{i}": inputs[0]}))
    pooled = theirs.forward_features(image)
    actual = {f"map{i}": stage_map for i, stage_map in enumerate(ours.forward_maps(image))}
    if classes:
        expected |= {"pooled": pooled, "logits": theirs.head(pooled)}
        actual |= {"pooled": ours.pool(actual["map3"]), "logits": model(image).logits}
    found = {name: ((actual[name] - value).abs().max() / value.std()).item() for name, value in expected.items()}
    if off := [f"{name} by {value:.1e}" for name, value in found.items() if not value <= OFFICIAL_TOLERANCE]:
        raise ConversionError(f"the mambavision package computes otherwise (standard deviations): {listed(off)}")
    return {name: float(f"{value:.1e}") for name, value in found.items()}


def import_official() -> types.ModuleType:
    """The published package, with the scan's definition in the place of mamba_ssm's kernel, which needs a GPU.

    Raises:
        ConversionError: the package, or one that it needs, is not installed.
    """

    def scan(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        u, delta, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
        return selective_scan_reference(u, delta, A, B, C, D, delta_bias).transpose(1, 2)

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    replaced = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].__dict__["selective_scan_fn"] = scan
    try:
        import mambavision.models.mamba_vision as official
    except ImportError as error:
        raise ConversionError(
            "--verify-against-official needs `pip install timm einops` and `pip install --no-deps mambavision`:"
            f" {first_sentence(error)}"
        ) from error
    finally:
        for name, module in replaced.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    official.selective_scan_fn = scan  # where it had been imported before
    return official
