"""A copy of a MambaVision model for inference: what can be computed beforehand is, and memory is read less often.

BatchNorm becomes a part of the convolution before it or of the head behind it, layer scale of the layer before it. On
a CPU, where torch has oneDNN, its convolutions and linear layers then add the bias and apply the activation to results
that are still in the cache; GELU and the linear layers only where AVX-512 is, for without it torch's own are faster.
"""

import copy

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fused_copy(model: nn.Module) -> nn.Module:
    """
    Raises:
        ValueError: the model is in training mode, in which BatchNorm depends on the batch.
    """
    if model.training:
        raise ValueError("fuse() is for inference, and this model is in training mode: call model.eval() first")
    fused = copy.deepcopy(model).requires_grad_(False)
    stem, norm, head = fused.model.patch_embed.conv_down, fused.model.norm, fused.model.head
    for i in (0, 3) if isinstance(stem, nn.Sequential) and len(stem) == 6 else ():
        if not (_is_plain(stem[i]) and _is_plain(stem[i + 1]) and type(stem[i + 2]) is nn.ReLU):
            continue
        stem[i] = _with_activation(fuse_conv_bn_eval(stem[i], stem[i + 1]), stem[i + 2])
        stem[i + 1], stem[i + 2] = nn.Identity(), nn.Identity()
    for level in fused.model.levels:
        reduction = getattr(level.downsample, "reduction", None)
        if isinstance(reduction, nn.Sequential) and len(reduction) == 1 and _is_plain(reduction[0]):
            reduction[0] = _with_activation(reduction[0], nn.Identity())
        for block in level.blocks:
            if all(_is_plain(getattr(block, name, None)) for name in ("conv1", "norm1", "conv2", "norm2")):
                _fuse_conv_block(block)
            elif hasattr(block, "mixer") and hasattr(block, "mlp"):
                _fuse_token_block(block)
    if _is_plain(norm) and _is_plain(head):  # the average between them is linear
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        if head.bias is None:
            head.bias = nn.Parameter(head.weight.new_zeros(len(head.weight)), requires_grad=False)
        head.bias += head.weight @ (norm.bias - norm.running_mean * scale)
        head.weight *= scale
        fused.model.norm = nn.Identity()
    fused.train = lambda mode=True: _refuse() if mode else fused
    fused.save_pretrained = _refuse
    return fused


def _refuse(*args, **kwargs):
    raise ValueError("a fused model is for inference only: train or save the model that fuse() was called on")


def _fuse_conv_block(block: nn.Module) -> None:
    block.conv1 = _with_activation(fuse_conv_bn_eval(block.conv1, block.norm1), block.act1)
    conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
    if block.gamma is not None:
        _scale(conv2, block.gamma)
        block.gamma = None
    block.conv2 = _with_activation(conv2, nn.Identity())
    block.norm1, block.act1, block.norm2 = nn.Identity(), nn.Identity(), nn.Identity()


def _fuse_token_block(block: nn.Module) -> None:
    mixer, mlp = block.mixer, block.mlp
    ends = "proj" if hasattr(mixer, "proj") else "out_proj"
    if block.gamma_1 is not None and _is_plain(getattr(mixer, ends)) and _is_plain(mlp.fc2):
        _scale(getattr(mixer, ends), block.gamma_1)
        _scale(mlp.fc2, block.gamma_2)
        block.gamma_1 = block.gamma_2 = None
    if _is_plain(mlp.fc1):
        mlp.fc1, mlp.act = _with_activation(mlp.fc1, mlp.act), nn.Identity()
    for module, name in ((mixer, "qkv"), (mixer, "in_proj"), (mixer, ends), (mlp, "fc2")):
        if _is_plain(getattr(module, name, None)):
            setattr(module, name, _with_activation(getattr(module, name), nn.Identity()))


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is torch's own, neither quantised nor adapted nor hooked: the others stay as they are."""
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.BatchNorm2d) or type(layer.weight) is not nn.Parameter:
        return False
    return is_untouched(layer)


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer may be computed by other means than calling it: nobody hooked it or replaced its forward."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and "forward" not in layer.__dict__


def _scale(layer: nn.Module, gamma: Tensor) -> None:
    """Multiply a layer's output channels."""
    layer.weight *= gamma.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias *= gamma


def _with_activation(layer: nn.Module, activation: nn.Module) -> nn.Module:
    return (FusedConv2d if isinstance(layer, nn.Conv2d) else FusedLinear)(layer, activation)


class _Fused(nn.Module):
    """A layer and the activation behind it (none: nn.Identity), in one pass over memory where oneDNN runs."""

    def __init__(self, layer: nn.Module, activation: nn.Module):
        super().__init__()
        self.layer, self.activation = layer, activation
        # oneDNN's name of the activation, and of the way to compute it
        self.names = {
            nn.Identity: ("none", ""),
            nn.ReLU: ("relu", ""),
            nn.GELU: ("gelu", getattr(activation, "approximate", "")),
        }[type(activation)]
        # without AVX-512, oneDNN's GELU and its matrix products take longer than what one pass less saves
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        self.one_pass_pays = wide or not (isinstance(layer, nn.Linear) or isinstance(activation, nn.GELU))

    def forward(self, x: Tensor) -> Tensor:
        if self.one_pass_pays and _onednn_takes(x, self.layer.weight):
            return self.in_one_pass(x, *self.names)
        return self.activation(self.layer(x))

    def __getattr__(self, name: str):
        """`weight`, `bias`, `in_channels`, ...: what code reads from the layer that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


class FusedLinear(_Fused):
    def in_one_pass(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.layer.weight, self.layer.bias, activation, [], algorithm)


class FusedConv2d(_Fused):
    def __init__(self, layer: nn.Module, activation: nn.Module):
        super().__init__(layer.to(memory_format=torch.channels_last), activation)  # or each call copies the weights

    def in_one_pass(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        c = self.layer
        return torch.ops.mkldnn._convolution_pointwise(
            x, c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups, activation, [], algorithm
        )


def _onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused operators, which are not differentiable, can run on a CPU's eager tensors like these."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return x.dtype in _onednn_dtypes()


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
