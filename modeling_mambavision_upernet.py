"""Semantic segmentation: `MambaVisionBackbone` under transformers' UPerNet, as one repository that loads by itself.

transformers finds a backbone by its registry of model types, which does not know this one. The two classes here hold
the backbone's configuration and the backbone directly, so that a folder with this file in its `auto_map` needs nothing
but `AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)`.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221.
"""

from contextlib import suppress

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.upernet import modeling_upernet as upernet

from .configuration_mambavision import MambaVisionConfig
from .fusion_mambavision import convolution
from .modeling_mambavision import MambaVisionBackbone


with suppress(ImportError):  # named here for transformers 4, which takes along only what this very file imports
    from .fusion_triton import finish  # noqa: F401
    from .operators import define  # noqa: F401
    from .selective_scan import selective_scan  # noqa: F401
    from .selective_scan_triton import scan  # noqa: F401
    from .winograd import winograd_convolution  # noqa: F401


class MambaVisionUperNetConfig(PretrainedConfig):
    """Settings of a MambaVision backbone and of the UPerNet on its four maps.

    Args:
        backbone_config: settings of the backbone: a `MambaVisionConfig` whose `out_indices` are all four stages, or its
            fields, which need not name them.
        hidden_size: channels of the decoder.
        pool_scales: sides of the pooled maps in the decoder's pyramid.
        use_auxiliary_head: whether there is a second, small head on the third stage's map, for training.
        auxiliary_channels, auxiliary_num_convs, auxiliary_concat_input, auxiliary_loss_weight: that head's width,
            depth, whether it sees its input once more before the classifier, and its part in the loss.
        loss_ignore_index: the label of pixels that the loss leaves out.
        initializer_range: standard deviation of new convolutions.
        kwargs: `num_labels` or `id2label`, and all that transformers' `PretrainedConfig` takes.

    Raises:
        ValueError: the backbone's settings are none that it can have, or leave out a stage's map.
    """

    model_type = "mambavision_upernet"
    sub_configs = {"backbone_config": MambaVisionConfig}

    def __init__(
        self,
        backbone_config: dict | PretrainedConfig | None = None,
        hidden_size=512,
        pool_scales=(1, 2, 3, 6),
        use_auxiliary_head=True,
        auxiliary_channels=256,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
        auxiliary_loss_weight=0.4,
        loss_ignore_index=255,
        initializer_range=0.02,
        **kwargs,
    ):
        if not isinstance(backbone_config, PretrainedConfig):
            fields = {"out_indices": [0, 1, 2, 3], "num_labels": 0, **(backbone_config or {})}
            backbone_config = MambaVisionConfig(**fields)
        chosen = getattr(backbone_config, "out_indices", None)
        if list(chosen or []) != [0, 1, 2, 3]:
            raise ValueError(f"backbone_config.out_indices must be all four stages, [0, 1, 2, 3], got {chosen}")
        self.backbone_config = backbone_config
        self.hidden_size = hidden_size
        self.pool_scales = list(pool_scales)
        self.use_auxiliary_head = use_auxiliary_head
        self.auxiliary_in_channels = backbone_config.hidden_sizes[2]
        self.auxiliary_channels = auxiliary_channels
        self.auxiliary_num_convs = auxiliary_num_convs
        self.auxiliary_concat_input = auxiliary_concat_input
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.loss_ignore_index = loss_ignore_index
        self.initializer_range = initializer_range
        kwargs.pop("auxiliary_in_channels", None)  # follows from the backbone
        super().__init__(**kwargs)


class UperNetForSemanticSegmentation(upernet.UperNetForSemanticSegmentation):
    """transformers' class with a MambaVision as its backbone, under its name: transformers' pipelines know it by that.

    Takes `pixel_values` (B, in_chans, H, W) and, for a loss, `labels` (B, H, W); gives `logits` (B, num_labels, H, W).
    """

    config_class = MambaVisionUperNetConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # its loss is a mean: Trainer divides it by the steps of gradient accumulation
    _no_split_modules = MambaVisionBackbone._no_split_modules
    _keep_in_fp32_modules = MambaVisionBackbone._keep_in_fp32_modules
    _keep_in_fp32_modules_strict = MambaVisionBackbone._keep_in_fp32_modules_strict

    def __init__(self, config: MambaVisionUperNetConfig):
        PreTrainedModel.__init__(self, config)  # not the parent's, which asks transformers' registry for the backbone
        self.backbone = MambaVisionBackbone(config.backbone_config)
        self.decode_head = _Head(config, in_channels=self.backbone.channels)
        self.auxiliary_head = _auxiliary_head(config, self.backbone.channels) if config.use_auxiliary_head else None
        for module in self.modules():
            if type(module) is upernet.UperNetConvModule:
                module.__class__ = _ConvModule
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()


class _Head(upernet.UperNetHead):
    def forward(self, encoder_hidden_states: tuple[Tensor, ...]) -> Tensor:
        return super().forward(encoder_hidden_states).contiguous()  # `view` does not take the convolutions' layout


class _ConvModule(upernet.UperNetConvModule):
    """The heads' convolutions, which take most of the time, by the faster operators where these can run."""

    def forward(self, input: Tensor) -> Tensor:
        return convolution(input, self.conv, self.batch_norm, self.activation)


def _auxiliary_head(config: MambaVisionUperNetConfig, channels: list[int]) -> upernet.UperNetFCNHead:
    try:
        return upernet.UperNetFCNHead(config, in_channels=channels)
    except TypeError:  # transformers 4.50 reads config.auxiliary_in_channels alone
        return upernet.UperNetFCNHead(config)


MambaVisionUperNetConfig.register_for_auto_class()
UperNetForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
