"""Writing: weights, configuration, preprocessing, code, licence, report and model card."""

import hashlib
import json
import math
import re
import shutil
import string
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from tqdm import tqdm

from .errors import ConversionError, listed
from .plan import BACKBONE, DATA, DENSE, PUBLISHED, SEGMENTATION, Plan
from .source import Source


ROOT = DATA.parent
CODE = (
    "configuration_mambavision.py",
    "fusion_mambavision.py",
    "fusion_triton.py",
    "modeling_mambavision.py",
    "operators.py",
    "selective_scan*.py",
    "winograd.py",
)

# The recurrence's own parameters and the BatchNorm statistics stay as they are when the rest is cast.
NEVER_CAST = ("A_log", "D", "running_mean", "running_var")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass
class Written:
    """A tensor as the folder stores it."""

    dtype: torch.dtype
    count: int
    file: str
    sha256: str  # of its bytes in row-major order


def write_weights(
    folder: Path, plan: Plan, source: Source, dtype: torch.dtype | None, max_shard_size: str
) -> dict[str, Written]:
    """model.safetensors, or shards and their index under the names that transformers gives them.

    The tensors are read, cast and written one at a time. (safetensors' own writer wants all of a file's at once: a
    second copy of the model where they are cast.)

    Returns:
        what was written, by our names of the tensors.

    Raises:
        ConversionError: a value is not finite, or not in the range of `dtype`.
    """
    sketch = {}
    for name, theirs in plan.table.items():
        tensor = source.tensors[theirs]
        keep = dtype is None or not tensor.is_floating_point() or name.endswith(NEVER_CAST)
        sketch[name] = torch.empty(tensor.shape, dtype=tensor.dtype if keep else dtype, device="meta")
    if not re.match(r"\s*0*[1-9]", max_shard_size):
        raise ConversionError(f"--max-shard-size {max_shard_size} is no size, such as 5GB")
    try:
        split = huggingface_hub.split_torch_state_dict_into_shards(sketch, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConversionError(f"--max-shard-size {max_shard_size}: {error}") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    loaded_in = dtype or common_dtype({name: tensor.dtype for name, tensor in sketch.items()})
    written, not_finite = {}, []
    total = sum(tensor.nbytes for tensor in sketch.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=1) as bar:
        for file, names in split.filename_to_tensors.items():
            names = sorted(names, key=lambda name: -sketch[name].element_size())  # aligns every tensor to its width
            with (folder / file).open("wb") as out:
                out.write(_safetensors_header({name: sketch[name] for name in names}))
                for name in names:
                    tensor = source.tensors[plan.table[name]]
                    # also where it is not cast: transformers casts what it loads to the model's dtype
                    if tensor.is_floating_point() and not _is_finite(tensor.to(loaded_in)):
                        not_finite.append(plan.table[name])
                    data = tensor_bytes(tensor.to(sketch[name].dtype))
                    out.write(data)
                    sha256 = hashlib.sha256(data).hexdigest()
                    written[name] = Written(sketch[name].dtype, tensor.numel(), file, sha256)
                    bar.set_postfix_str(f"tensor {len(written)} of {len(sketch)}", refresh=False)
                    bar.update(len(data))
    if not_finite:
        raise ConversionError(f"{source.name} has values that are not finite in {loaded_in}: in {listed(not_finite)}")
    return written


def common_dtype(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """What most weights are in: transformers casts to it what it loads."""
    weights = [dtype for name, dtype in dtypes.items() if name.endswith(".weight")]
    return max(set(weights), key=weights.count)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(math.isfinite(bound.item()) for bound in tensor.aminmax())  # a NaN anywhere is both bounds


def _safetensors_header(tensors: dict[str, torch.Tensor]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it has that order."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_rest(folder: Path, plan: Plan, written: dict[str, Written]) -> None:
    """All that loads the weights: configuration, preprocessing, code, requirements; and the licence."""
    settings = plan.config.to_diff_dict()
    if plan.task is SEGMENTATION:
        settings["backbone_config"] = plan.backbone.to_diff_dict()
    settings.pop("dtype", None)
    dtype = common_dtype({name: tensor.dtype for name, tensor in written.items()})
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")  # all versions read this
    settings["architectures"] = [plan.task.model.__name__]
    settings["auto_map"] = plan.task.auto_map
    write_json(folder / "config.json", settings)
    write_json(folder / "preprocessor_config.json", plan.processor)
    files = [file for pattern in CODE for file in ROOT.glob(pattern)]
    if plan.task is SEGMENTATION:
        files.append(ROOT / "modeling_mambavision_upernet.py")
    for file in [*files, ROOT / "requirements.txt", DATA / "LICENSE"]:
        shutil.copyfile(file, folder / file.name)


FIGURES = {
    "params_m": "parameters (M)",
    "gmacs": "multiply-adds (G)",
    "top1": "ImageNet-1K top-1 (%)",
    "top5": "ImageNet-1K top-5 (%)",
    "a100_images_per_s": "images/s on an A100",
    "miou": "ADE20K mIoU (%)",
    "box_map": "COCO box mAP",
    "mask_map": "COCO mask mAP",
}
DATASETS = {None: "ILSVRC/imagenet-1k", "ADE20K": "zhoubolei/scene_parse_150", "COCO": "detection-datasets/coco"}


def write_report(folder: Path, plan: Plan, report: dict, title: str) -> None:
    """conversion.json, and the model card made from it and from the variant's published figures.

    Args:
        title: what the card's example calls the model: the Hub id, or the folder's name.
    """
    write_json(folder / "conversion.json", report)
    figures = PUBLISHED["classification"].get(plan.variant) or DENSE[plan.variant]
    values = {
        "title": title,
        "variant": plan.variant,
        # of a backbone none: the pipeline of features would load it as the model with pooled ones, and lack their norm
        "pipeline_tag": "" if plan.task is BACKBONE else f"pipeline_tag: {plan.task.name}",
        "dataset": DATASETS[figures.get("dataset")],
        "base_model": f"nvidia/{figures.get('backbone', plan.variant)}",
        "published": "\n".join(f"| {text} | {figures[key]} |" for key, text in FIGURES.items() if figures.get(key)),
        "usage": _usage(plan, title),
        "decisions": _bullets(plan.notes) or "- Nothing had to be decided.",
        "verification": _bullets(f"{key.replace('_', ' ')}: {value}" for key, value in report["verification"].items())
        or "- Not verified.",
        "source": _bullets(f"`{file['name']}`, sha256 `{file['sha256']}`" for file in report["source"]["files"]),
        "converter": report["converter"],
    }
    (folder / "README.md").write_text(_fill("model_card.md", values), encoding="utf-8")


def _usage(plan: Plan, title: str) -> str:
    channels = plan.backbone.in_chans
    values = {
        "name": json.dumps(title, ensure_ascii=False),
        "edge": plan.backbone.resolution,
        "channels": channels,
        "model_class": plan.task.auto_map[plan.task.auto_class],
    }
    where = "" if "/" in title else "In the folder that holds this one:\n\n"
    return where + _fill(f"usage-{plan.task.name if channels == 3 else 'other-channels'}.md", values)


def _fill(template: str, values: dict) -> str:
    return string.Template((DATA / template).read_text(encoding="utf-8")).substitute(values)


def _bullets(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
