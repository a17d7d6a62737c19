"""Faster inference: convolutions and linear layers computed together with what follows them, in the model as it is
(`convolution`, `linear`) and, once for all calls, in a copy of it (`fused_copy`).

BatchNorm becomes a part of the convolution before it, in the copy also of the head behind it, and layer scale of the
layer before it. On a CPU oneDNN then adds the bias and applies GELU to results that are still in the cache.
"""

import copy
import functools

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from .selective_scan import is_transformed


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
        stem[i] = FusedConv2d(fuse_conv_bn_eval(stem[i], _in_float(stem[i + 1])))
        stem[i + 1], stem[i + 2] = nn.Identity(), nn.ReLU(inplace=True)  # oneDNN's makes 0 of what is no number
    for level in fused.model.levels:
        reduction = getattr(level.downsample, "reduction", None)
        if isinstance(reduction, nn.Sequential) and len(reduction) == 1 and _is_plain(reduction[0]):
            reduction[0] = FusedConv2d(reduction[0])
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
    conv1 = fuse_conv_bn_eval(block.conv1, _in_float(block.norm1))
    if type(block.act1) is nn.GELU and is_untouched(block.act1):
        block.conv1, block.act1 = FusedConv2d(conv1, block.act1), nn.Identity()
    else:
        block.conv1 = FusedConv2d(conv1)
    conv2 = fuse_conv_bn_eval(block.conv2, _in_float(block.norm2))
    if block.gamma is not None:
        _scale(conv2, block.gamma)
        block.gamma = None
    block.conv2 = FusedConv2d(conv2)
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()


def _in_float(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Of half precision, so that the convolution's weights are rounded once, after their product with the norm's."""
    return norm.to(torch.promote_types(norm.weight.dtype, torch.float32))


def _fuse_token_block(block: nn.Module) -> None:
    mixer, mlp = block.mixer, block.mlp
    ends = "proj" if hasattr(mixer, "proj") else "out_proj"
    if block.gamma_1 is not None and _is_plain(getattr(mixer, ends)) and _is_plain(mlp.fc2):
        _scale(getattr(mixer, ends), block.gamma_1)
        _scale(mlp.fc2, block.gamma_2)
        block.gamma_1 = block.gamma_2 = None
    for name in ("in_proj", "out_proj", "qkv", "proj"):
        if _is_plain(getattr(mixer, name, None)):
            setattr(mixer, name, FusedLinear(getattr(mixer, name)))
    if _is_plain(mlp.fc1) and type(mlp.act) is nn.GELU and is_untouched(mlp.act):
        mlp.fc1, mlp.act = FusedLinear(mlp.fc1, mlp.act), nn.Identity()
    if _is_plain(mlp.fc2):
        mlp.fc2 = FusedLinear(mlp.fc2)


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is torch's own, neither quantised nor adapted nor hooked: the others stay as they are."""
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.BatchNorm2d) or type(layer.weight) is not nn.Parameter:
        return False
    return is_untouched(layer)


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer may be computed by other means than calling it: nobody hooked it or replaced its forward."""
    torch_wide = nn.modules.module  # hooks of all modules
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_wide._global_forward_hooks
        or torch_wide._global_forward_pre_hooks
        or torch_wide._global_backward_hooks
        or torch_wide._global_backward_pre_hooks
        or "forward" in layer.__dict__
    )


def _scale(layer: nn.Module, gamma: Tensor) -> None:
    """Multiply a layer's output channels."""
    layer.weight *= gamma.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias *= gamma


class _Fused(nn.Module):
    """A layer, and a GELU behind it or none, in one pass over memory where oneDNN runs.

    There it also keeps the weights a second time, in the order in which oneDNN reads them, from the first call on:
    bringing them into it takes up to half of a layer's time for one image.
    """

    def __init__(self, layer: nn.Module, gelu: nn.GELU | None = None):
        super().__init__()
        self.layer, self.gelu, self.packed = layer, gelu, None

    def forward(self, x: Tensor) -> Tensor:
        if not _onednn_takes(x, self.layer) or not self._pays(x):
            return self.layer(x) if self.gelu is None else self.gelu(self.layer(x))
        if self.packed is None:
            self.packed = self._pack(x)
        return self._compute(x, self.packed, self.layer.bias, *_pointwise(self.gelu))

    def _apply(self, *args, **kwargs):
        self.packed = None  # the weights move, or change their precision
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "packed": None}  # neither copied nor saved

    def __getattr__(self, name: str):
        """`weight`, `bias`, `in_channels`, ...: what code reads from the layer that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


class FusedConv2d(_Fused):
    def __init__(self, layer: nn.Conv2d, gelu: nn.GELU | None = None):
        super().__init__(layer.to(memory_format=torch.channels_last), gelu)  # or each call copies the weights

    def _pays(self, x: Tensor) -> bool:
        return self.gelu is None or _has_avx512()

    def _pack(self, x: Tensor) -> Tensor:
        c = self.layer
        return torch.ops.mkldnn._reorder_convolution_weight(
            c.weight, c.padding, c.stride, c.dilation, c.groups, list(x.shape)
        )

    def _compute(self, x: Tensor, *weights) -> Tensor:
        return _convolve(x, self.layer, *weights)


class FusedLinear(_Fused):
    def _pays(self, x: Tensor) -> bool:
        return _pays(x, self.layer)

    def _pack(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.layer.weight)

    def _compute(self, x: Tensor, *weights) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, *weights)


def convolution(x: Tensor, conv: nn.Module, norm: nn.Module, activation: nn.Module | None = None) -> Tensor:
    """activation(norm(conv(x))), with the norm folded into the convolution where only the time tells the two apart."""
    if not _folds(x, conv, norm):
        x = norm(conv(x))
        return x if activation is None else activation(x)
    mean, variance, scale, shift = (t.float() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    with torch.no_grad():  # in float32, so that weights in half precision are rounded once
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, scale, shift)
    weight = weight.contiguous(memory_format=torch.channels_last)
    gelu = activation if type(activation) is nn.GELU and is_untouched(activation) and _has_avx512() else None
    x = _convolve(x, conv, weight, bias, *_pointwise(gelu))
    return x if activation is gelu else activation(x)


# Numbers in a map from which on BatchNorm and the activation take longer than folding
_LEAST_MAP = 2**16


def _folds(x: Tensor, conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or not (_is_plain(conv) and _is_plain(norm)):
        return False
    if norm.training or norm.running_var is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    pays = _onednn_takes(x, conv) and x.numel() >= max(_LEAST_MAP, conv.weight.numel())
    return pays and _onednn_takes(x, norm)


def _convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, *pointwise) -> Tensor:
    """A convolution of these weights, with the strides and so on of `conv`."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, *pointwise
    )


def linear(x: Tensor, layer: nn.Module, activation: nn.Module | None = None) -> Tensor:
    """activation(layer(x)), in one pass over memory where that is faster and only the time tells the two apart."""
    fits = activation is None or (type(activation) is nn.GELU and is_untouched(activation))
    if fits and type(layer) is nn.Linear and _onednn_takes(x, layer) and _pays(x, layer) and _is_plain(layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *_pointwise(activation))
    x = layer(x)
    return x if activation is None else activation(x)


# Multiplications of a linear layer from which on oneDNN gains more than a call of it costs
_LEAST_WORK = 2**23


def _pays(x: Tensor, layer: nn.Linear) -> bool:
    return x.numel() * layer.out_features >= _LEAST_WORK and _has_avx512()


def _pointwise(gelu: nn.GELU | None) -> tuple[str, list, str]:
    """What oneDNN's operators do to their results: the function, its numbers, and the way to compute it."""
    return ("none", [], "") if gelu is None else ("gelu", [], gelu.approximate)


def _has_avx512() -> bool:
    """Without it, oneDNN's GELU and matrix products take longer than torch's own."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _onednn_takes(x: Tensor, layer: nn.Module) -> bool:
    """Whether oneDNN's fused operators can run: on a CPU's plain tensors, with nobody who differentiates or records.

    To be asked before anything about sizes, which in a graph would bind it to these.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.numel() == 0:
        return False
    tensors = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
    if any(t.device.type != "cpu" or t.layout != torch.strided or t.dtype != x.dtype for t in tensors):
        return False
    if layer.bias is not None and layer.bias.stride() != (1,):  # they read it as if it were dense
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():  # modes that count, for one
        return False
    return torch.backends.mkldnn.enabled and x.dtype in _onednn_dtypes()


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
