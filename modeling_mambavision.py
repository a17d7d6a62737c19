"""MambaVision: a hybrid Mamba-Transformer vision backbone, as transformers models.

Source: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", CVPR 2025, arXiv 2407.08083.
The function computed, and the names of modules and tensors, are those of the published weights.

Read top-down, in the order in which the image flows: stem, convolution stages, token stages, backbone; then the three
transformers models around the backbone. B is the batch, C the channels of a stage, L the tokens of a window.
"""

import copy
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention
from transformers.utils import ModelOutput

from .configuration_mambavision import MambaVisionConfig
from .fusion_mambavision import (
    activated,
    convolution,
    fused_copy,
    image_convolution,
    in_turn,
    is_linear,
    is_plain,
    is_untouched,
    layer_norm,
    linear,
)
from .operators import dense, is_traced, is_traced_for_export, is_transformed, misreads_layouts
from .selective_scan import (
    backend_on,
    infer_scan_,
    scan_concat,
    selective_scan,
    silu_convolve,
)


with suppress(ImportError):  # named for transformers 4, which takes along what this file itself imports
    from .fusion_triton import finish  # noqa: F401
    from .selective_scan_triton import scan  # noqa: F401
    from .winograd import winograd_convolution  # noqa: F401

try:  # transformers 5
    from transformers.backbone_utils import BackboneMixin
except ImportError:
    from transformers.utils.backbone_utils import BackboneMixin


STATES = 8  # of the selective scan, per channel
# Of fewer than these a convolution along the tokens takes longer in half precision than in float32
_FEW_NUMBERS = 2**17
# Where a checkpoint comes from, among the arguments of `from_pretrained`
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class PatchEmbed(nn.Module):
    """The stem: an image (B, in_chans, H, W) to a map (B, dim, H/4, W/4), sides rounded up."""

    def __init__(self, in_chans: int, in_dim: int, dim: int):
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self._checked(pixel_values)
        if type(self.conv_down) is not nn.Sequential or len(self.conv_down) != 6 or not is_untouched(self.conv_down):
            return self.conv_down(_laid_out(x))
        conv1, norm1, act1, conv2, norm2, act2 = self.conv_down
        y = image_convolution(x, conv1, norm1, act1)
        if y is None:
            y = convolution(_laid_out(x), conv1, norm1, act1)
        return convolution(y, conv2, norm2, act2)

    def _checked(self, pixel_values: Tensor) -> Tensor:
        """The input in the weights' precision; reads only what a tracer knows too, so it costs a graph nothing."""
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}")
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be normalised, floating-point images, got {pixel_values.dtype}")
        layers = [*self.conv_down.children()]
        channels = getattr(layers[0], "in_channels", None) if layers else None  # code may put another module there
        if pixel_values.ndim != 4 or (channels is not None and pixel_values.shape[1] != channels):
            expected = f"(batch, {channels or 'channels'}, height, width)"
            raise ValueError(f"pixel_values must have shape {expected}, got {tuple(pixel_values.shape)}")
        if pixel_values.shape[2] == 0 or pixel_values.shape[3] == 0:
            raise ValueError(f"pixel_values must have sides of at least 1 pixel, got {tuple(pixel_values.shape)}")
        for module in self.conv_down.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point():
                return pixel_values.to(weight.dtype)
        return pixel_values


def _laid_out(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in the layout that all maps then have."""
    if misreads_layouts(x.device):
        return x.contiguous()
    if is_transformed():  # vmap knows no layouts
        return x
    # channels_last: the faster one of the convolutions, and the one in which windows of tokens are a view
    return x.contiguous(memory_format=torch.channels_last)


class Downsample(nn.Module):
    """Between stages: a map (B, C, H, W) to (B, 2C, H/2, W/2), sides rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        if type(self.reduction) is not nn.Sequential or len(self.reduction) != 1 or not is_untouched(self.reduction):
            return self.reduction(x)
        return convolution(x, self.reduction[0], None)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a residual branch for whole samples."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def _is_off(drop_path: nn.Module) -> bool:
    """Whether stochastic depth leaves everything as it is."""
    return type(drop_path) is DropPath and not drop_path.training and is_untouched(drop_path)


class ConvBlock(nn.Module):
    """A residual pair of 3x3 convolutions on a map (B, C, H, W)."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-5)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-5)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = convolution(x, self.conv1, self.norm1, self.act1)
        may_add = not is_traced() and type(x) is Tensor and not x.requires_grad and x.dtype == y.dtype
        if may_add and self.gamma is None and _is_off(self.drop_path):
            return convolution(y, self.conv2, self.norm2, residual=x)
        y = convolution(y, self.conv2, self.norm2)
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


class StepProjection(nn.Linear):
    """dt_proj of the mixer: a linear layer whose bias starts in its own way (see `_init_weights`)."""


class MambaVisionMixer(nn.Module):
    """Mixes the tokens of a window (B, L, C) along their row-major order with a selective scan.

    One half of the channels, x, is scanned; the other, z, only convolved. The convolutions look at both neighbours.
    """

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.dt_rank = dim, dim, STATES, 3, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * STATES, bias=False)
        self.dt_proj = StepProjection(self.dt_rank, half)
        self.A_log = nn.Parameter(torch.empty(half, STATES))
        self.D = nn.Parameter(torch.empty(half))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, C/2)
        x = _silu_convolve(self.conv1d_x, x)
        dt, B, C = self.x_proj(x).split([self.dt_rank, STATES, STATES], dim=-1)
        # the published weights were trained with the bias of dt_proj counted twice
        inputs = (x, self.dt_proj(dense(dt)), self._rates(), B, C, self.D.float(), self._dt_bias(dt))
        if _is_depthwise(self.conv1d_z) and is_untouched(self.conv1d_z):
            mixed = scan_concat(*inputs, z, self.conv1d_z.weight)
        else:
            mixed = torch.cat([selective_scan(*inputs), _silu_convolve(self.conv1d_z, z)], dim=-1)
        return self.out_proj(mixed)

    def infer(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """self(x), or its sum with a residual, both (B, L, C), where `is_plain`.

        In few operators, which count on a CPU: one convolution, and the result in the place of what it is made of.
        """
        convs, projections = (self.conv1d_x, self.conv1d_z), (self.x_proj, self.dt_proj)
        if not (all(map(_is_depthwise, convs)) and all(map(is_linear, projections))) or self.dt_proj.bias is None:
            return in_turn(x, self, residual=residual)
        xz = linear(x, self.in_proj)
        if xz.numel() < _FEW_NUMBERS:
            xz = xz.float()
        xz = silu_convolve(xz, torch.cat([conv.weight for conv in convs]).to(xz.dtype))
        u = xz.chunk(2, dim=-1)[0]
        wide = u.float()  # as the scan is computed; products so small gain nothing in half precision
        dt, B, C = linear(wide, self.x_proj).split([self.dt_rank, STATES, STATES], dim=-1)
        dt = dt @ self.dt_proj.weight.T.float()  # the scan adds the bias, which counts twice
        infer_scan_(wide, dt, self._rates(), B, C, self.D.float(), 2 * self.dt_proj.bias.float())
        if wide is not u:
            u.copy_(wide)
        return linear(xz.to(x.dtype), self.out_proj, residual=residual)

    def _rates(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _dt_bias(self, dt: Tensor) -> Tensor:
        """What the scan adds to each step, (C/2,): the bias of dt_proj, whatever hooks make of that layer's result."""
        layer = self.dt_proj
        bias = layer._parameters.get("bias") if isinstance(layer, StepProjection) else None
        is_there = type(bias) is nn.Parameter and not bias.is_meta and bias.shape == self.D.shape
        if bias is not None and (is_there or is_untouched(layer)):
            return bias
        # what adapters and quantisers put in its place may have none, offloading and sharding only while it is called
        return layer(dt.new_zeros(1, self.dt_rank))[0]


def _silu_convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """silu of a convolution along the tokens of (B, L, C)."""
    if _is_depthwise(conv) and is_untouched(conv):
        return silu_convolve(x, conv.weight)
    return dense(F.silu(conv(dense(x.transpose(1, 2)))).transpose(1, 2))


def _is_depthwise(conv: nn.Module) -> bool:
    """Whether a convolution is the mixer's own kind, which has kernels of its own."""
    if type(conv) is not nn.Conv1d or is_traced_for_export():
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3,), (1,), (1,), (1,))
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return shape and depthwise and conv.bias is None and conv.padding_mode == "zeros"


class Attention(nn.Module):
    """Softmax self-attention among the tokens of a window (B, L, C), without position bias."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        # nothing in the published models, but code that draws maps of the attention, or has one of its own, calls them
        self.scale, self.q_norm, self.k_norm = self.head_dim**-0.5, nn.Identity(), nn.Identity()
        self.proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.qkv(x))
        return self.proj_drop(self.proj(_attend(self.q_norm(q), self.k_norm(k), v)))

    def infer(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """self(x), or its sum with a residual, both (B, L, C), where `is_plain`."""
        if any(type(layer) is not nn.Identity for layer in (self.q_norm, self.k_norm, self.proj_drop)):
            return in_turn(x, self, residual=residual)
        return linear(_attend(*self._heads(linear(x, self.qkv))), self.proj, residual=residual)

    def _heads(self, qkv: Tensor) -> Tensor:
        """(B, L, 3C) as queries, keys and values, (3, B, heads, L, C/heads)."""
        return dense(qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(channels)) v of heads (B, heads, L, channels), side by side: (B, L, C)."""
    is_half, is_short = q.dtype in (torch.bfloat16, torch.float16), q.shape[-2] <= 256
    if q.device.type == "cpu" and is_half and is_short and q.requires_grad and not torch.jit.is_tracing():
        # the gradients of torch's own are slow here: with them it takes 2 to 8 times as long (torch 2.15)
        x = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated(self.fc1(x), self.act))

    def infer(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """self(x), or its sum with a residual, both (B, L, C), where `is_plain`."""
        return linear(linear(x, self.fc1, self.act), self.fc2, residual=residual)


class TokenBlock(nn.Module):
    """A pre-norm residual block on the tokens of a window (B, L, C): a mixer, then an MLP."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(x, *self._modules.values()) and self.is_usual():
            return self.infer(x)
        x = self._add(x, self.norm1, self.mixer, self.gamma_1)
        return self._add(x, self.norm2, self.mlp, self.gamma_2)

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, gamma: Tensor | None) -> Tensor:
        residual = branch(norm(x))
        return x + self.drop_path(residual if gamma is None else gamma * residual)

    def is_usual(self) -> bool:
        """Whether its branches are of those that can `infer`, and nothing but a fixed scale is done to them."""
        gammas = (self.gamma_1, self.gamma_2)
        if torch.is_grad_enabled() and any(gamma is not None and gamma.requires_grad for gamma in gammas):
            return False
        return type(self.mixer) in (MambaVisionMixer, Attention) and type(self.mlp) is Mlp and _is_off(self.drop_path)

    def infer(self, x: Tensor) -> Tensor:
        """self(x) where `is_plain` and `is_usual`."""
        for norm, branch, gamma in (
            (self.norm1, self.mixer, self.gamma_1),
            (self.norm2, self.mlp, self.gamma_2),
        ):
            if gamma is None:
                x = branch.infer(layer_norm(x, norm), residual=x)  # whose last layer adds it
            else:
                x = torch.addcmul(x, gamma, branch.infer(layer_norm(x, norm)))
        return x


class ConvStage(nn.Module):
    """Convolution blocks. Takes a map (B, C, H, W); gives the next stage's input (B, 2C, H/2, W/2), and its own map."""

    conv, transformer_block = True, False  # read by code that tells the stages apart

    def __init__(self, config: MambaVisionConfig, stage: int, drop_path: list[float]):
        super().__init__()
        dim = config.hidden_sizes[stage]
        self.blocks = nn.ModuleList(ConvBlock(dim, rate, config.layer_scale_conv) for rate in drop_path)
        self.downsample = Downsample(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x), x


class TokenStage(nn.Module):
    """Token blocks in non-overlapping square windows, the first half of them (rounded up) Mamba, the rest attention.

    Takes a map (B, C, H, W); gives the next stage's input, (B, 2C, H/2, W/2) or the last stage's own map, and its map.
    """

    conv, transformer_block = False, True

    def __init__(self, config: MambaVisionConfig, stage: int, drop_path: list[float]):
        super().__init__()
        dim, depth = config.hidden_sizes[stage], config.depths[stage]
        self.window_size = config.window_size[stage]
        mixers = [
            MambaVisionMixer(dim)
            if i < math.ceil(depth / 2)
            else Attention(dim, config.num_heads[stage], config.qkv_bias)
            for i in range(depth)
        ]
        self.blocks = nn.ModuleList(
            TokenBlock(dim, mixer, config.mlp_ratio, rate, config.layer_scale)
            for mixer, rate in zip(mixers, drop_path, strict=True)
        )
        self.downsample = Downsample(dim) if stage < 3 else None
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, C, H, W = x.shape
        side = self.window_size
        x = dense(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        rows, columns = (H + side - 1) // side, (W + side - 1) // side
        bottom, right = rows * side - H, columns * side - W
        if is_traced_for_export() or bottom or right:  # an exported graph pads always, to take any H and W
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.reshape(B, rows, side, columns, side, C).transpose(2, 3)  # (B, rows, columns, side, side, C)
        x = dense(x.reshape(B * rows * columns, side * side, C))
        blocks = list(self.blocks)
        is_inferred = is_plain(x, *blocks) and all(type(block) is TokenBlock and block.is_usual() for block in blocks)
        for block in blocks:
            if is_inferred:  # asked once for all of them
                x = block.infer(x)
            elif self.gradient_checkpointing and self.training:
                if torch.is_grad_enabled() and not x.requires_grad:
                    # behind a frozen stem torch's older form, transformers 4's default, sees nothing to differentiate
                    x = x.detach().requires_grad_(any(p.requires_grad for p in block.parameters()))
                x = self._gradient_checkpointing_func(block.__call__, x)
            else:
                x = block(x)
        x = x.reshape(B, rows, columns, side, side, C).transpose(2, 3).reshape(B, rows * side, columns * side, C)
        if is_traced_for_export() and not torch.jit.is_tracing():
            # of a cut map torch.export would ask whether it was padded, and refuse images that differ in that
            x = x.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
        else:
            x = x.narrow(1, 0, H).narrow(2, 0, W)  # slices would have unknown sizes in torch 2.11
        x = dense(x.permute(0, 3, 1, 2))
        return (x if self.downsample is None else self.downsample(_in_layout_of_weights(x, self.downsample))), x


def _in_layout_of_weights(x: Tensor, layer: nn.Module) -> Tensor:
    """The map (B, C, H, W), in the layout of the convolution's weights where these are more.

    For a map in channels_last, a CPU would bring the weights into that layout at every call.
    """
    if x.device.type != "cpu" or is_traced():
        return x
    weight = next(layer.parameters(), None)
    copies = weight is not None and weight.is_contiguous() and x.numel() < weight.numel()
    return x.contiguous() if copies else x


class MambaVision(nn.Module):
    """The bare backbone, under the names that published checkpoints and code built on them use.

    An image (B, in_chans, H, W), any H, W >= 1, becomes four maps: `hidden_sizes[i]` channels, sides halved i + 2 times
    and rounded up.

    Args:
        num_labels: width of the linear head; 0 for none, and then calling the backbone gives the pooled features.
    """

    def __init__(self, config: MambaVisionConfig, num_labels: int = 0):
        super().__init__()
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)]
        self.patch_embed = PatchEmbed(config.in_chans, config.in_dim, config.dim)
        self.levels = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            kind = ConvStage if stage < 2 else TokenStage
            self.levels.append(kind(config, stage, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.BatchNorm2d(config.hidden_size, eps=1e-5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(config.hidden_size, num_labels) if num_labels > 0 else nn.Identity()
        self.head.in_features = config.hidden_size  # read by code that puts a head of its own here

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, num_labels) logits, or (B, C) pooled features where there is no head."""
        x = self.patch_embed(pixel_values)
        for level in self.levels:
            x = level(x)[0]
        return self.head(self.pool(x))

    def forward_features(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pooled features (B, C) and the four stages' maps."""
        maps = self.forward_maps(pixel_values)
        return self.pool(maps[-1]), [x.contiguous() for x in maps]

    def forward_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The four stages' maps, in channels_last layout."""
        x = self.patch_embed(pixel_values)
        maps = []
        for level in self.levels:
            x, stage_map = level(x)
            maps.append(stage_map)
        return maps

    def pool(self, last_map: Tensor) -> Tensor:
        """The fourth map (B, C, H, W) to features (B, C): normalised, and averaged over the image."""
        return self.avgpool(self.norm(last_map)).flatten(1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """`load_state_dict`, without the classifier where there is none.

        The published feature extractor has one that it does not use, and so have checkpoints of programs built on it.
        """
        if isinstance(self.head, nn.Identity):
            for name in ("head.weight", "head.bias"):
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MambaVisionPreTrainedModel(PreTrainedModel):
    config_class = MambaVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ConvBlock", "TokenBlock"]
    # Loading in half precision leaves the recurrence's own parameters exact; its arithmetic is float32 in any case.
    _keep_in_fp32_modules = ["A_log", "D"]
    _keep_in_fp32_modules_strict = ["A_log", "D"]
    all_tied_weights_keys = {}  # none; some programs replace the base class's, for models older than transformers 5
    accepts_loss_kwargs = False  # or transformers' Trainer would take `**absent` for it, and scale the loss otherwise
    is_fused = False  # True for what `fuse` gives

    def __init__(self, config: MambaVisionConfig, *args, **kwargs):
        config.validate_settings()  # once more: what `from_pretrained` is given is set after the construction
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """transformers' `from_pretrained`; `in_chans` may differ from the checkpoint's (see `set_input_channels`)."""
        if "num_channels" in kwargs:  # transformers' name
            kwargs["in_chans"] = kwargs.pop("num_channels")
        wanted = kwargs.get("in_chans") if config is None else getattr(config, "in_chans", None)
        load = partial(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        if wanted is None or pretrained_model_name_or_path is None:
            return load(config=config)
        source = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        stored = cls.config_class.get_config_dict(pretrained_model_name_or_path, **source)[0].get("in_chans", 3)
        if stored == wanted:
            return load(config=config)
        if config is None:
            loaded = load(in_chans=stored)
        else:
            config = copy.deepcopy(config)
            config.in_chans = stored
            loaded = load(config=config)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_input_channels(wanted)
        return loaded

    @property
    def scan_backend(self) -> str:
        """What scans on the model's device: "torch", "triton" or "mamba_ssm" (see `selective_scan`)."""
        return backend_on(self.device)

    def get_input_embeddings(self) -> nn.Module:
        """The stem: where adapters on a frozen model make gradients start when blocks are checkpointed."""
        return self.model.patch_embed

    def set_input_channels(self, in_chans: int) -> None:
        """Make the first convolution take `in_chans` channels, keeping what it learnt, as timm does.

        One channel: the sum of the kernels over the channels, so that a grey image gives what its RGB copy gave.
        More: the kernels repeated in order and scaled by old / new count, which keeps the size of the response.
        The configuration's mean and std go along: averaged, or repeated.

        Raises:
            ValueError: `in_chans` is not a positive integer, this is a fused copy, or the stem's weights are offloaded.
        """
        if not isinstance(in_chans, int) or isinstance(in_chans, bool) or in_chans < 1:
            raise ValueError(f"in_chans must be a positive integer, got {in_chans!r}")
        self._refuse_if_fused()
        stem = self.model.patch_embed.conv_down
        old = stem[0]
        if old.weight.is_meta and hasattr(old, "_hf_hook"):  # which would bring the weights back as they were
            raise ValueError(
                f"in_chans={in_chans} changes the stem's weights, which are offloaded: keep model.patch_embed on a"
                " device in device_map"
            )
        kernels, count = old.weight.detach().float(), old.in_channels
        if in_chans == 1:
            kernels = kernels.sum(1, keepdim=True)
        else:
            kernels = kernels.repeat(1, -(-in_chans // count), 1, 1)[:, :in_chans] * (count / in_chans)
        new = copy.deepcopy(old)
        new.in_channels = in_chans
        new.weight = nn.Parameter(kernels.to(old.weight.dtype), requires_grad=old.weight.requires_grad)
        stem[0] = new
        self.config.in_chans = in_chans
        for name in ("mean", "std"):
            values = getattr(self.config, name)
            values = [sum(values) / len(values)] if in_chans == 1 else (values * in_chans)[:in_chans]
            setattr(self.config, name, values)

    def fuse(self):
        """A copy for inference, with the norms folded into the convolutions, and activations into their layers.

        The copy computes the same up to rounding, on a CPU in less time; it can neither be trained nor saved. On a CPU
        it keeps its weights a second time, in the order and precision of the fastest kernels, from the first call on;
        those for Winograd's algorithm, of wide 3x3 convolutions in float32, take four times their size. It follows
        `load_state_dict` and in-place changes of the weights, but not those through `.data` or, in shared memory, of
        other processes.

        Raises:
            ValueError: the model is in training mode, in which BatchNorm depends on the batch.
        """
        return fused_copy(self, (PatchEmbed, ConvBlock, TokenBlock, MambaVisionMixer, Attention, Mlp))

    def train(self, mode: bool = True):
        if mode:
            self._refuse_if_fused()
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs):
        self._refuse_if_fused()
        return super().save_pretrained(*args, **kwargs)

    def _refuse_if_fused(self) -> None:
        if self.is_fused:
            raise ValueError("a fused model is for inference only: train, change or save the one fuse() was called on")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter and statistic from scratch; of a module that a checkpoint fills in part, only the rest."""
        if isinstance(module, nn.Linear):
            _init(module.weight, nn.init.trunc_normal_, std=0.02)
            _init(module.bias, _init_dt_bias_ if isinstance(module, StepProjection) else nn.init.zeros_)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            _init(module.weight, nn.init.kaiming_uniform_, a=math.sqrt(5))
            _init(module.bias, nn.init.zeros_)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            _init(module.weight, nn.init.ones_)
            _init(module.bias, nn.init.zeros_)
            if isinstance(module, nn.BatchNorm2d):
                _init(module.running_mean, nn.init.zeros_)
                _init(module.running_var, nn.init.ones_)
                _init(module.num_batches_tracked, nn.init.zeros_)
        elif isinstance(module, MambaVisionMixer):
            _init(module.A_log, lambda A_log: A_log.copy_(torch.arange(1, STATES + 1).log().expand_as(A_log)))
            _init(module.D, nn.init.ones_)
        elif isinstance(module, ConvBlock):
            _init(module.gamma, nn.init.constant_, val=self.config.layer_scale_conv)
        elif isinstance(module, TokenBlock):
            _init(module.gamma_1, nn.init.constant_, val=self.config.layer_scale)
            _init(module.gamma_2, nn.init.constant_, val=self.config.layer_scale)


def _init(tensor: Tensor | None, fill, **kwargs) -> None:
    if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):  # set on what a checkpoint filled
        fill(tensor, **kwargs)


def _init_dt_bias_(bias: Tensor) -> Tensor:
    """So that softplus of the bias, counted twice, gives steps log-uniform in [0.001, 0.1], as in Mamba.

    The published code draws such a bias without the doubling in mind, and then overwrites it with zeros, which makes
    every first step 0.69: a memory of a token or two.
    """
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    return bias.copy_((step + torch.log(-torch.expm1(-step))) / 2)  # the inverse of softplus, halved


def _check_absent(arguments: dict) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


@dataclass
class MambaVisionModelOutput(ModelOutput):
    """Features of a batch of images, by name; unpacked or indexed by number, the published pair (pooled, maps).

    That makes iteration differ from other model outputs', which go over their keys. `torch.nn.DataParallel` relies on
    the latter: use `return_dict=False` under it.

    Args:
        pooler_output: (B, C) the last map, normalised and averaged over the image.
        hidden_states: the four stages' maps, (B, hidden_sizes[i], H / 2**(i+2), W / 2**(i+2)), sides rounded up.
        last_hidden_state: the fourth map, before the final norm.
    """

    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None

    @property
    def feature_maps(self) -> tuple[Tensor, ...]:
        return self.hidden_states

    def __len__(self):
        return 2

    def __iter__(self):
        return iter(self[:])

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else (self.pooler_output, list(self.hidden_states))[key]


class MambaVisionModel(MambaVisionPreTrainedModel):
    """The backbone without a head: pooled features and the maps of the four stages."""

    # the classifier of a checkpoint
    _keys_to_ignore_on_load_unexpected = [r"head\.(weight|bias)"]

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.model = MambaVision(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **absent: None,
    ) -> MambaVisionModelOutput | tuple[Tensor, list[Tensor]]:
        """
        Args:
            pixel_values: (B, in_chans, H, W) normalised images, any H, W >= 1.
            output_hidden_states: accepted for the sake of transformers' callers; the maps are always given.
            return_dict: False for the plain tuple (pooled, maps).
            absent: what callers such as peft give to any model, without a value.

        Raises:
            TypeError, ValueError: `pixel_values` is not such a tensor, or there is another argument.
        """
        _check_absent(absent)
        pooled, maps = self.model.forward_features(pixel_values)
        if not (self.config.return_dict if return_dict is None else return_dict):
            return pooled, maps
        return MambaVisionModelOutput(pooled, tuple(maps), maps[-1])


class MambaVisionModelForImageClassification(MambaVisionPreTrainedModel):
    """The backbone with a linear head on its pooled features."""

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MambaVision(config, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **absent: None,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """
        Args:
            pixel_values: (B, in_chans, H, W) normalised images, any H, W >= 1.
            labels: (B,) class indices, -100 to leave an image out; (B, num_labels) floats for several labels an image;
                (B,) or (B, 1) floats for regression, where num_labels is 1. `config.problem_type` overrides.
            output_hidden_states: whether to give the maps of the four stages.
            return_dict: False for a plain tuple without the absent parts.
            absent: what callers such as peft give to any model, without a value.

        Raises:
            TypeError, ValueError: the inputs are not such tensors, or there are others. Class indices are looked at on
                the CPU only.
        """
        _check_absent(absent)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = None
        if output_hidden_states:
            pooled, hidden_states = self.model.forward_features(pixel_values)
            logits, hidden_states = self.model.head(pooled), tuple(hidden_states)
        else:
            logits = self.model(pixel_values)
        loss = None if labels is None else self._loss(logits, labels)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of transformers' classifiers, for as many classes as the head has: it may be one put there later."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
        if labels.is_complex():
            raise TypeError(f"labels must be real numbers, got {labels.dtype}")
        kind, (batch, count) = self.config.problem_type, logits.shape
        if kind is None and count == 1:
            kind = "regression"
        elif kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            loss = F.cross_entropy(logits, self._checked_classes(labels, batch, count).to(logits.device))
        else:
            shapes = [(batch, 1), (batch,)] if count == 1 else [(batch, count)]
            if tuple(labels.shape) not in shapes:
                raise ValueError(f"labels must have shape {shapes[0]}, got {tuple(labels.shape)}")
            labels = labels.to(logits.device, torch.promote_types(logits.dtype, torch.float32)).view_as(logits)
            distance = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
            loss = distance(logits, labels)
        self.config.problem_type = kind  # saved with the weights: it tells pipelines what the logits are
        return loss

    @staticmethod
    def _checked_classes(labels: Tensor, batch: int, count: int) -> Tensor:
        if labels.is_floating_point() or labels.shape not in ((batch,), (batch, 1)):
            raise ValueError(f"labels must be {batch} integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        labels = labels.long().view(-1)
        # a look would stall other devices, and where a graph is made or a batch hidden there is nothing to see
        has_numbers = type(labels) is Tensor and not torch.compiler.is_compiling() and not is_transformed()
        if has_numbers and labels.device.type == "cpu":
            wrong = labels[((labels < 0) | (labels >= count)) & (labels != -100)]
            if len(wrong):
                raise ValueError(f"labels must be in 0 ... {count - 1} (or -100), got {wrong[0].item()}")
        return labels


class MambaVisionBackbone(BackboneMixin, MambaVisionPreTrainedModel):
    """The maps of chosen stages, for the detectors and segmenters of transformers: see `out_features`, `out_norm`."""

    # what only pooled features need
    _keys_to_ignore_on_load_unexpected = [r"model\.norm\.", r"model\.head\."]
    has_attentions = False

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4
            self._init_backbone(config)
        self.num_features = config.hidden_sizes
        self.model = MambaVision(config)
        self.model.norm = nn.Identity()
        for i, name in enumerate(self.stage_names if config.out_norm else []):
            if name in self.out_features:
                self.add_module(f"outnorm{i}", nn.LayerNorm(config.hidden_sizes[i], eps=1e-5))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """
        Args:
            pixel_values: (B, in_chans, H, W) normalised images, any H, W >= 1.
            output_hidden_states: whether to give all four maps too, before `out_norm`.
            output_attentions: accepted for the sake of transformers' callers; there are none to give.
            return_dict: False for a plain tuple (maps,) or (maps, all maps).

        Raises:
            TypeError, ValueError: `pixel_values` is not such a tensor, or `out_features` were changed to a map that has
                no `out_norm`.
        """
        maps = self.model.forward_maps(pixel_values)
        chosen = [i for i, name in enumerate(self.stage_names) if name in self.out_features]
        feature_maps = tuple(self._normalised(maps[i], i).contiguous() for i in chosen)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = tuple(x.contiguous() for x in maps) if output_hidden_states else None
        output = BackboneOutput(feature_maps, hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _normalised(self, x: Tensor, stage: int) -> Tensor:
        if not self.config.out_norm:
            return x
        norm = getattr(self, f"outnorm{stage}", None)
        if norm is None:  # out_features were changed since
            raise ValueError(f"{self.stage_names[stage]} has no norm: name all out_features when the model is made")
        return norm(dense(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


MambaVisionModel.register_for_auto_class("AutoModel")
MambaVisionModelForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MambaVisionBackbone.register_for_auto_class("AutoBackbone")

with suppress(ImportError):  # transformers 5
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    class _NameOfTheMixer(WeightRenaming):
        """DETR and its kin rename every `out_proj` of a checkpoint: the mixer's is loaded and saved under its name."""

        def reverse_transform(self):
            return self

    # by the type, not by the class, which transformers before 5.9 does not look for
    register_checkpoint_conversion_mapping(
        MambaVisionConfig.model_type, [_NameOfTheMixer(r"mixer\.o_proj\.", "mixer.out_proj.")], overwrite=True
    )
