"""Configuration of MambaVision, and the settings of the eleven published models.

Source: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", CVPR 2025, arXiv 2407.08083.
"""

import math
from numbers import Real

from transformers import PretrainedConfig


try:  # transformers 5
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:
    from transformers.utils.backbone_utils import BackboneConfigMixin


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# PIL's resampling filters by the names that timm gives them
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_T = dict(dim=80, in_dim=32, depths=[1, 3, 8, 4], num_heads=[2, 4, 8, 16], drop_path_rate=0.2, layer_scale=None)
_T2 = dict(_T, depths=[1, 3, 11, 4], crop_pct=0.98)
_S = dict(_T, dim=96, in_dim=64, depths=[3, 3, 7, 5], crop_pct=0.93)
_B = dict(_S, dim=128, depths=[3, 3, 10, 5], crop_pct=1.0, drop_path_rate=0.3, layer_scale=1e-5)
_L = dict(_B, dim=196, num_heads=[4, 8, 16, 32])
_L2 = dict(_L, depths=[3, 3, 12, 5])
_L3 = dict(_L, dim=256, depths=[3, 3, 20, 10], drop_path_rate=0.5)
_AT_256 = dict(resolution=256, window_size=[8, 8, 16, 8])
_AT_512 = dict(resolution=512, window_size=[8, 8, 32, 16], crop_pct=0.93, crop_mode="squash")

# What each published model sets beside the defaults of MambaVisionConfig. The 21K models were pre-trained on
# ImageNet-21K and fine-tuned on ImageNet-1K: all eleven classify the 1000 classes.
VARIANTS = {
    "MambaVision-T-1K": _T,
    "MambaVision-T2-1K": _T2,
    "MambaVision-S-1K": _S,
    "MambaVision-B-1K": _B,
    "MambaVision-L-1K": _L,
    "MambaVision-L2-1K": _L2,
    "MambaVision-B-21K": _B,
    "MambaVision-L-21K": _L,
    "MambaVision-L2-512-21K": dict(_L2, **_AT_512),
    "MambaVision-L3-256-21K": dict(_L3, **_AT_256),
    "MambaVision-L3-512-21K": dict(_L3, **_AT_512),
}

# Under which of transformers' Auto classes the classes of this repository load
AUTO_MAP = {
    "AutoConfig": "configuration_mambavision.MambaVisionConfig",
    "AutoModel": "modeling_mambavision.MambaVisionModel",
    "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
    "AutoBackbone": "modeling_mambavision.MambaVisionBackbone",
}


def imagenet_labels() -> dict[int, str]:
    """Class index to name for the 1000 classes of ImageNet-1K, as timm lists them (294 is "brown bear, bruin, ...")."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            "the 1000 ImageNet labels come from timm: `pip install timm`, or pass id2label={...} or num_labels=N"
        ) from error
    info = ImageNetInfo("imagenet-1k")
    return {i: info.index_to_description(i) for i in range(info.num_classes())}


class MambaVisionConfig(BackboneConfigMixin, PretrainedConfig):
    """Settings of a MambaVision model. The defaults are those of MambaVision-T-1K.

    Args:
        dim: channels of the first stage; stage i has `dim * 2**i`.
        in_dim: channels between the two convolutions of the stem.
        depths: blocks per stage. Stages 0 and 1 are convolutional; in stages 2 and 3 the first half of the blocks,
            rounded up, mixes tokens with a selective scan, the rest with attention.
        num_heads: attention heads per stage; the first two are not used.
        window_size: side of the square token windows per stage, in pixels of that stage's map; the first two are
            not used. Maps are zero-padded to whole windows.
        mlp_ratio: hidden width of the MLPs over their input width.
        resolution: side of the square input image that the preprocessing produces, in pixels. The model itself
            takes any size.
        in_chans: channels of the input image.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        qkv_bias: whether the attention's query, key and value have a bias.
        layer_scale: initial value of the token blocks' per-channel residual scale; None for no scale.
        layer_scale_conv: the same for the convolution blocks.
        mean, std: per-channel normalisation of images in [0, 1].
        crop_mode: "center" resizes the shorter edge and crops; "squash" resizes both edges and crops.
        crop_pct: part of the resized image that the crop keeps, in (0, 1].
        interpolation: resampling filter, one of "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming".
        out_features, out_indices: the stages whose maps `MambaVisionBackbone` gives, by name ("stage1" ... "stage4")
            or by index (0 ... 3); the last one where neither is given.
        out_norm: whether `MambaVisionBackbone` normalises each map with a LayerNorm over its channels, as the
            published detection and segmentation backbones do.
        kwargs: `num_labels` or `id2label` (1000 labels where neither is given), and all that transformers'
            `PretrainedConfig` takes; `num_channels` and `image_size` are its names of `in_chans` and `resolution`.

    Raises:
        ValueError: a value that no model can have; the message names the field and the value.
    """

    model_type = "mambavision"
    attribute_map = {"num_channels": "in_chans", "image_size": "resolution"}

    def __init__(
        self,
        dim=80,
        in_dim=32,
        depths=(1, 3, 8, 4),
        num_heads=(2, 4, 8, 16),
        window_size=(8, 8, 14, 7),
        mlp_ratio=4,
        resolution=224,
        in_chans=3,
        drop_path_rate=0.2,
        qkv_bias=True,
        layer_scale=None,
        layer_scale_conv=None,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_mode="center",
        crop_pct=1.0,
        interpolation="bicubic",
        out_features=None,
        out_indices=None,
        out_norm=False,
        **kwargs,
    ):
        in_chans, resolution = kwargs.pop("num_channels", in_chans), kwargs.pop("image_size", resolution)
        if kwargs.get("id2label") is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = 1000
        _check_labels(kwargs.get("num_labels"), kwargs.get("id2label"))
        kwargs.pop("stage_names", None)  # follow from the architecture
        # all of them, whichever class saves the configuration: a fine-tuned classifier is a feature extractor too
        self.auto_map = {**AUTO_MAP, **(kwargs.pop("auto_map", None) or {})}
        super().__init__(**kwargs)
        self.dim = dim
        self.in_dim = in_dim
        self.depths = _plain_list(depths)
        self.num_heads = _plain_list(num_heads)
        self.window_size = _plain_list(window_size)
        self.mlp_ratio = mlp_ratio
        self.resolution = resolution
        self.in_chans = in_chans
        self.drop_path_rate = drop_path_rate
        self.qkv_bias = qkv_bias
        self.layer_scale = layer_scale
        self.layer_scale_conv = layer_scale_conv
        self.mean = _plain_list(mean)
        self.std = _plain_list(std)
        self.crop_mode = crop_mode
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.out_norm = out_norm
        self.stage_names = ["stage1", "stage2", "stage3", "stage4"]
        self.validate_settings()
        self._set_out_stages(out_features, out_indices)

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "MambaVisionConfig":
        """The settings of a published model, by its repository's name ("MambaVision-T-1K", with or without "nvidia/").

        `overrides` replace single fields. Without `num_labels` or `id2label` the 1000 ImageNet labels are set, which
        needs timm.

        Raises:
            ValueError: no published model has this name.
            ImportError: the labels are needed and timm is not installed.
        """
        variant = name.removeprefix("nvidia/") if isinstance(name, str) else name
        if variant not in VARIANTS:
            raise ValueError(f"{name=} is not a published MambaVision; choose one of {', '.join(VARIANTS)}")
        if overrides.get("id2label") is None and overrides.get("num_labels") is None:
            overrides["id2label"] = imagenet_labels()
            overrides["label2id"] = {label: i for i, label in overrides["id2label"].items()}
        return cls(**{**VARIANTS[variant], **overrides})

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the four stages."""
        return [self.dim * 2**i for i in range(4)]

    @property
    def hidden_size(self) -> int:
        """Channels of the pooled features."""
        return self.hidden_sizes[-1]

    def image_processor_settings(self) -> dict:
        """The content of `preprocessor_config.json`: transformers' `BitImageProcessor` doing what timm's evaluation
        transform does for this model's `resolution`, `crop_pct`, `crop_mode`, `interpolation`, `mean` and `std`.
        """
        edge = math.floor(self.resolution / self.crop_pct)
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": self.in_chans == 3,
            "do_resize": True,
            "size": {"shortest_edge": edge} if self.crop_mode == "center" else {"height": edge, "width": edge},
            "resample": RESAMPLE[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.resolution, "width": self.resolution},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }

    def to_diff_dict(self) -> dict:
        """What is saved: always with the labels, for transformers leaves out its own default, two, and ours is 1000."""
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}

    def _set_out_stages(self, out_features, out_indices):
        for field, value, known in (
            ("out_features", out_features, self.stage_names),
            ("out_indices", out_indices, list(range(-4, 4))),
        ):
            if value is None:
                continue
            is_list = isinstance(value, (list, tuple, range)) and len(value) > 0
            if not is_list or any(isinstance(v, (bool, float)) or v not in known for v in value):
                raise ValueError(f"{field} must be a list of one or more of {known}, got {value!r}")
        if out_features is not None:
            self.out_features = _plain_list(out_features)  # the mixin's setters keep the two aligned
            if out_indices is not None and [i % 4 for i in out_indices] != [i % 4 for i in self.out_indices]:
                raise ValueError(f"{out_features=} and {out_indices=} name different stages; give one of them")
        else:
            self.out_indices = out_indices

    def validate_settings(self) -> None:
        """Raises ValueError for what no model can have; the message names the field and the value."""
        for field in ("dim", "in_dim", "resolution", "in_chans"):
            value = getattr(self, field)
            if not _is_count(value):
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        for field in ("depths", "num_heads", "window_size"):
            value = getattr(self, field)
            if not (isinstance(value, list) and len(value) == 4 and all(_is_count(v) for v in value)):
                raise ValueError(f"{field} must be four positive integers, one per stage, got {value!r}")
        for stage in (2, 3):
            if self.hidden_sizes[stage] % self.num_heads[stage]:
                raise ValueError(
                    f"num_heads must divide the channels, but num_heads={self.num_heads} gives stage {stage} "
                    f"{self.num_heads[stage]} heads for {self.hidden_sizes[stage]} channels (dim={self.dim})"
                )
        if not (_is_number(self.mlp_ratio) and self.mlp_ratio * self.dim * 4 >= 1):
            expected = f"a number that gives the MLPs at least one hidden channel (dim={self.dim})"
            raise ValueError(f"mlp_ratio must be {expected}, got {self.mlp_ratio!r}")
        if not (_is_number(self.drop_path_rate) and 0 <= self.drop_path_rate < 1):
            raise ValueError(f"drop_path_rate must be a number in [0, 1), got {self.drop_path_rate!r}")
        for field in ("qkv_bias", "out_norm"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False, got {getattr(self, field)!r}")
        for field in ("layer_scale", "layer_scale_conv"):
            value = getattr(self, field)
            if value is not None and not _is_number(value):
                raise ValueError(f"{field} must be a number or None, got {value!r}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if not (isinstance(value, list) and value and all(_is_number(v) for v in value)):
                raise ValueError(f"{field} must be a list of numbers, one per channel, got {value!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} must have the same length")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"crop_mode must be 'center' or 'squash', got {self.crop_mode!r}")
        if not (_is_number(self.crop_pct) and 0 < self.crop_pct <= 1):
            raise ValueError(f"crop_pct must be a number in (0, 1], got {self.crop_pct!r}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )
        if self.interpolation not in RESAMPLE:
            raise ValueError(f"interpolation must be one of {', '.join(RESAMPLE)}, got {self.interpolation!r}")


def _check_labels(num_labels, id2label) -> None:
    if num_labels is not None and num_labels != 0 and not _is_count(num_labels):
        raise ValueError(f"num_labels must be a number of classes, got {num_labels!r}")
    if id2label is not None:
        indices = {str(i) for i in range(len(id2label))} if isinstance(id2label, dict) else None
        if indices is None or {str(key) for key in id2label} != indices:
            raise ValueError(f"id2label must be a dictionary from 0, 1, ... to labels, got {str(id2label)[:100]}")


def _plain_list(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


MambaVisionConfig.register_for_auto_class()
