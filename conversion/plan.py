"""Recognising: which published model the tensors are, what folder that makes, and what each tensor is called in it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..configuration_mambavision import AUTO_MAP, IMAGENET_MEAN, IMAGENET_STD, VARIANTS, MambaVisionConfig
from ..modeling_mambavision import MambaVisionBackbone, MambaVisionModelForImageClassification
from ..modeling_mambavision_upernet import MambaVisionUperNetConfig, UperNetForSemanticSegmentation
from .errors import ConversionError, listed
from .source import Source, read_json


DATA = Path(__file__).parent
PUBLISHED = json.loads((DATA / "published.json").read_text())
DENSE = PUBLISHED["dense"]

# The heads of the dense-prediction checkpoints, by method
HEADS = {"UPerNet": ("decode_head.", "auxiliary_head."), "Cascade Mask R-CNN": ("neck.", "rpn_head.", "roi_head.")}
# Every image is padded to whole windows, at the cost of the fourth power of their sides. The published reach 160.
LARGEST_WINDOW = 256
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """A kind of folder: the class that loads it, by which auto class, and what its tensors are called in the source."""

    name: str
    model: type
    auto_class: str
    auto_map: dict[str, str]
    renames: tuple[tuple[str, str], ...]  # patterns in our names, and what the source has there; applied in order

    def published(self, name: str) -> str:
        """What the source calls our tensor."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


CLASSIFICATION = Task(
    name="image-classification",
    model=MambaVisionModelForImageClassification,
    auto_class="AutoModelForImageClassification",
    auto_map=AUTO_MAP,
    renames=((r"^model\.", ""),),
)
BACKBONE = Task(
    name="backbone",
    model=MambaVisionBackbone,
    auto_class="AutoBackbone",
    auto_map={name: AUTO_MAP[name] for name in ("AutoConfig", "AutoBackbone")},
    renames=((r"^model\.", "backbone."), (r"^outnorm", "backbone.outnorm")),
)
SEGMENTATION = Task(
    name="image-segmentation",
    model=UperNetForSemanticSegmentation,
    auto_class="AutoModelForSemanticSegmentation",
    auto_map={
        "AutoConfig": "modeling_mambavision_upernet.MambaVisionUperNetConfig",
        "AutoModelForSemanticSegmentation": "modeling_mambavision_upernet.UperNetForSemanticSegmentation",
    },
    renames=(
        (r"^backbone\.model\.", "backbone."),
        (r"^(decode_head|auxiliary_head)\.classifier\.", r"\1.conv_seg."),
        (r"\.batch_norm\.", ".bn."),
    ),
)


@dataclass
class Plan:
    """What the folder will be."""

    variant: str
    task: Task
    config: PretrainedConfig
    processor: dict
    notes: list[str]  # what had to be decided
    left_out: tuple[str, ...] = ()  # prefixes of the source's tensors that have no place in the folder
    table: dict[str, str] = field(default_factory=dict)  # our tensors' names to the source's

    @property
    def backbone(self) -> MambaVisionConfig:
        return getattr(self.config, "backbone_config", self.config)


def make_plan(source: Source, variant: str | None, labels: list[str] | None, backbone_only: bool) -> Plan:
    """Recognise the model and match every tensor.

    Args:
        variant: the published model's name, where the tensors are not to decide.
        labels: names of the classes, where they are not ImageNet's or ADE20K's.
        backbone_only: of a segmentation checkpoint, convert the backbone alone.

    Raises:
        ConversionError: no published model has these tensors, or the labels are not as many as the classes, or the
            settings beside the weights are none that a model can have.
    """
    for task, prefix in ((SEGMENTATION, "backbone.model."), (BACKBONE, "outnorm")):
        if any(name.startswith(prefix) for name in source.tensors):  # our names: this converter wrote the folder
            source.tensors = {task.published(name): tensor for name, tensor in source.tensors.items()}
    dense = any(name.startswith("backbone.") for name in source.tensors)
    sizes = _sizes(source, "backbone." if dense else "")
    config = source.config.get("backbone_config", source.config)
    parts = ("dim", "in_dim", "depths")
    of_another = isinstance(config, dict) and any(config.get(part, sizes[part]) != sizes[part] for part in parts)
    if of_another:
        source.config = {}
    variant, notes = _recognise(source, variant, sizes, dense)
    if of_another:
        notes.append("left out the config.json beside the weights: it is another model's")
    if not dense:
        if backbone_only:
            raise ConversionError(f"--backbone-only is for dense-prediction checkpoints, and {source.name} is none")
        plan = _plan_classification(source, variant, sizes["in_chans"], labels, notes)
    else:
        backbone_only |= DENSE[variant]["method"] != "UPerNet" or _method(source) is None
        plan = _plan_dense(source, variant, sizes["in_chans"], labels, notes, backbone_only)
    plan.table = match_tensors(plan, source)
    return plan


def _sizes(source: Source, prefix: str) -> dict:
    """dim, in_dim, depths and in_chans, read off the tensors."""
    first, second = (source.tensors.get(f"{prefix}patch_embed.conv_down.{i}.weight") for i in (0, 3))
    if first is None or second is None or first.ndim != 4 or second.ndim != 4:
        raise ConversionError(
            f"{source.name} is not a MambaVision: among its {len(source.tensors)} tensors ({listed(source.tensors)})"
            f" there are no convolutions {prefix}patch_embed.conv_down.0.weight and .3.weight"
        )
    pattern = re.compile(re.escape(prefix) + r"levels\.([0-3])\.blocks\.(\d+)\.")
    blocks = {match.groups() for name in source.tensors if (match := pattern.match(name))}
    depths = [sum(stage == str(i) for stage, _ in blocks) for i in range(4)]
    return {"dim": second.shape[0], "in_dim": first.shape[0], "depths": depths, "in_chans": first.shape[1]}


def _method(source: Source) -> str | None:
    return next((method for method, heads in HEADS.items() if any(n.startswith(heads) for n in source.tensors)), None)


def _recognise(source: Source, wanted: str | None, sizes: dict, dense: bool) -> tuple[str, list[str]]:
    """The published model's name, and a note where the tensors alone do not say it."""
    # its name: (its backbone's settings, the method it belongs to)
    models = {name: (VARIANTS[model["backbone"]], model["method"]) for name, model in DENSE.items()}
    if not dense:
        models = {name: (settings, None) for name, settings in VARIANTS.items()}
    if wanted is not None:
        if wanted.removeprefix("nvidia/") in models:
            return wanted.removeprefix("nvidia/"), []
        raise ConversionError(
            f"--variant {wanted} is none that these tensors can be: choose one of {', '.join(models)}"
        )
    candidates = [
        name
        for name, (settings, method) in models.items()
        if all(settings[key] == sizes[key] for key in ("dim", "in_dim", "depths"))
        and (not dense or _method(source) in (None, method))
    ]
    if not candidates:
        found = ", ".join(f"{key}={sizes[key]}" for key in ("dim", "in_dim", "depths"))
        raise ConversionError(f"{source.name} has {found}, as no published MambaVision has")
    if len(candidates) == 1:
        return candidates[0], []
    chosen, reason = _choose(candidates, source)
    return chosen, [f"the tensors fit {' and '.join(candidates)}: took {chosen}, {reason}"]


def _choose(candidates: list[str], source: Source) -> tuple[str, str]:
    """One of several models with equal tensors: by config.json, by a name that tells them apart, or the first."""
    windows = {name: MambaVisionConfig(num_labels=1, **_settings(name)).window_size for name in candidates}
    fitting = [name for name in candidates if windows[name] == source.config.get("window_size")]
    if len(fitting) == 1:
        return fitting[0], "by the window_size in its config.json"
    candidates = fitting or candidates
    path = source.files[0].absolute()
    places = [Path(source.name).name, path.name, path.parent.name]
    if path.parent.parent.name == "snapshots":  # of the Hub's cache
        places.append(path.parents[2].name)
    words = {name: _words(name) for name in candidates}
    own = {name: words[name].difference(*(words[n] for n in candidates if n != name)) for name in candidates}
    for place in places:
        said = {name: len(own[name] & _words(place)) for name in candidates}
        best = max(candidates, key=lambda name: said[name])
        if list(said.values()).count(said[best]) == 1:
            return best, f"by the name {place}"
    return candidates[0], "as no name tells which (--variant does)"


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _settings(variant: str) -> dict:
    """A published model's, or its backbone's."""
    if variant in VARIANTS:
        return VARIANTS[variant]
    model = DENSE[variant]
    return {
        **VARIANTS[model["backbone"]],
        "window_size": model["window_size"],
        "resolution": model["image_size"] or 800,  # the usual shorter side of a detector's images
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _plan_classification(source: Source, variant: str, in_chans: int, labels, notes: list[str]) -> Plan:
    overrides = _overrides(source, variant, in_chans, notes)
    count = _rows(source, "head.weight")
    fields = _label_fields(source, labels, count, None, notes)
    if fields == {"num_labels": 1000}:
        fields = {}  # ImageNet's labels come with the variant
    try:
        config = MambaVisionConfig.from_variant(variant, in_chans=in_chans, **overrides, **fields)
    except ImportError as error:
        raise ConversionError(
            "the names of ImageNet's classes come from timm: pip install it, or give --labels"
        ) from error
    return Plan(variant, CLASSIFICATION, config, config.image_processor_settings(), notes)


def _overrides(source: Source, variant: str, in_chans: int, notes: list[str]) -> dict:
    """The settings that are not the variant's: what config.json says, and what other input channels ask for."""
    overrides = _settings_beside_the_weights(source, variant, notes)
    if in_chans != 3 and "mean" not in overrides:
        overrides["mean"] = [sum(IMAGENET_MEAN) / 3] * in_chans
        overrides["std"] = [sum(IMAGENET_STD) / 3] * in_chans
        notes.append(f"the mean and std of {in_chans} input channels are a guess: check preprocessor_config.json")
    return overrides


def _settings_beside_the_weights(source: Source, variant: str, notes: list[str]) -> dict:
    """What no tensor shows and a folder's config.json says otherwise than the variant, as a fine-tuned model's may."""
    config = source.config.get("backbone_config", source.config)
    if not isinstance(config, dict) or config.get("model_type") != "mambavision":
        return {}
    settings = _settings(variant)
    published = MambaVisionConfig(num_labels=1, **settings)
    names = ("num_heads", "window_size", "resolution", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    names += ("drop_path_rate", "problem_type")
    other = {n: config[n] for n in names if n in config and config[n] != getattr(published, n)}
    if not other:
        return {}
    try:
        checked = MambaVisionConfig(num_labels=1, **{**settings, **other})
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{source.name} has a config.json that no model can have: {error}") from error
    if checked.resolution / checked.crop_pct > 4096 or max(checked.window_size) > LARGEST_WINDOW:
        raise ConversionError(
            f"{source.name} has a config.json for images larger than any (resolution above 4096, or window_size above"
            f" {LARGEST_WINDOW}): {other}"
        )
    notes.append(f"kept from its config.json, other than in {variant}: {listed(other)}")
    return other


def _plan_dense(source: Source, variant: str, in_chans: int, labels, notes: list[str], backbone_only: bool) -> Plan:
    model = DENSE[variant]
    settings = {**_settings(variant), **_overrides(source, variant, in_chans, notes)}
    settings |= {"out_indices": [0, 1, 2, 3], "out_norm": True, "num_labels": 0}
    backbone = MambaVisionConfig(in_chans=in_chans, **settings)
    # The published evaluation scales the shorter side to `edge` and crops nothing. Of transformers' processors this
    # one does that, and turns logits into maps of classes, as the segmentation pipeline asks.
    processor = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": backbone.resolution},
        "resample": 2,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": backbone.mean,
        "image_std": backbone.std,
    }
    if backbone_only:
        if labels is not None:
            raise ConversionError("--labels names classes, and a backbone has none: leave it out")
        left_out = HEADS[model["method"]]
        if _method(source):
            notes.append(f"converted the backbone only, not {', '.join(left_out).replace('.', '')}")
        return Plan(variant, BACKBONE, backbone, processor, notes, left_out)
    count = _rows(source, "decode_head.conv_seg.weight")
    fields = _label_fields(source, labels, count, (DATA / "ade20k_labels.txt").read_text().splitlines(), notes)
    has_auxiliary_head = any(name.startswith("auxiliary_head.") for name in source.tensors)
    config = MambaVisionUperNetConfig(backbone, use_auxiliary_head=has_auxiliary_head, **fields)
    return Plan(variant, SEGMENTATION, config, processor, notes)


def _rows(source: Source, name: str) -> int:
    """Number of classes, by the rows of a classifier; one that is missing is an error when the tensors are matched."""
    return source.tensors[name].shape[0] if name in source.tensors and source.tensors[name].ndim else 1


def _label_fields(
    source: Source, labels: list[str] | None, count: int, usual: list[str] | None, notes: list[str]
) -> dict:
    """The configuration's fields for `count` classes: the labels given, saved beside the weights, usual, or generic."""
    if labels is not None and len(labels) != count:
        raise ConversionError(f"--labels names {len(labels)} classes, and {source.name} has {count}")
    saved = source.config.get("id2label")
    if labels is None and saved is not None:
        names = [saved.get(str(i)) for i in range(count)] if isinstance(saved, dict) and len(saved) == count else [None]
        if not all(isinstance(name, str) for name in names):
            notes.append(f"left out the id2label of config.json, which does not name {count} classes")
        elif names != [f"LABEL_{i}" for i in range(count)]:
            labels = names
    if labels is None and usual is not None and len(usual) == count:
        labels = usual
    if labels is None:
        return {"num_labels": count}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def read_labels(path: Path) -> list[str]:
    """Labels in a text with one on each line, or in JSON: a list, an object from index to label or from label to index,
    or an object (a config.json) with one of these under `id2label` or `label2id`.

    Raises:
        ConversionError: the file holds nothing of the kind.
    """
    try:
        if path.suffix.lower() == ".json":
            labels = read_json(path)
            if isinstance(labels, dict):
                labels = labels.get("id2label") or labels.get("label2id") or labels
            if isinstance(labels, dict):
                if all(isinstance(value, int) for value in labels.values()):
                    labels = {str(index): label for label, index in labels.items()}
                if missing := [i for i in range(len(labels)) if str(i) not in labels]:
                    raise ValueError(f"it has {len(labels)} classes, and none of index {missing[0]}")
                labels = [labels[str(i)] for i in range(len(labels))]
        else:
            labels = path.read_text(encoding="utf-8-sig").splitlines()
        if not isinstance(labels, list) or not labels or not all(isinstance(x, str) and x.strip() for x in labels):
            raise ValueError("it must name each class, none empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"--labels {path} is not a list of labels: {error}") from error
    return [label.strip() for label in labels]


def match_tensors(plan: Plan, source: Source) -> dict[str, str]:
    """Our names to the source's, one to one.

    Raises:
        ConversionError: tensors are left over, missing, misshapen, or of a dtype that weights do not have.
    """
    with torch.device("meta"):
        ours = plan.task.model(plan.config).state_dict()
    table, problems = {name: plan.task.published(name) for name in ours}, []
    if missing := [theirs for theirs in table.values() if theirs not in source.tensors]:
        problems.append(f"lacks {listed(missing)}")
    known = set(table.values())
    if extra := [n for n in source.tensors if n not in known and not (plan.left_out and n.startswith(plan.left_out))]:
        problems.append(f"has {listed(extra)} beside them")
    for name, theirs in table.items():
        if theirs in source.tensors:
            tensor, shape = source.tensors[theirs], ours[name].shape
            dtypes = FLOATS.values() if ours[name].is_floating_point() else [ours[name].dtype]
            if tensor.shape != shape:
                problems.append(f"has {theirs} of shape {list(tensor.shape)}, not {list(shape)}")
            if tensor.dtype not in dtypes:
                problems.append(f"has {theirs} in {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    if problems:
        raise ConversionError(f"{source.name} does not hold the tensors of {plan.variant}: it {listed(problems)}")
    return table
