"""Faster inference: convolutions and linear layers computed together with what follows them, in the model as it is
(`convolution`, `linear`) and, once for all calls, in a copy of it (`fused_copy`).

BatchNorm becomes a part of the convolution before it, and in the copy layer scale of the layer before it. On a CPU
oneDNN then adds the bias and applies GELU to results that are still in the cache. There the 3x3 convolutions of large
maps are computed by Winograd's algorithm (winograd.py), and layers in half precision in float32 where that is faster.
On a GPU one kernel does all that follows a convolution (fusion_triton.py).
"""

import copy
import functools
import math
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .operators import has_modes, is_traced, is_traced_for_export, is_transformed, misreads_layouts
from .selective_scan import HALVES, ONEDNN_DTYPES, backend_on, cpuinfo
from .winograd import winograd_convolution, winograd_filters, winograd_pays


try:
    from .fusion_triton import MOST_CHANNELS, MOST_FILTERS, convolve_images, finish
except ImportError:  # no Triton
    finish = convolve_images = None


@torch.inference_mode(False)  # whose tensors do not count their changes, by which `_pack` knows old weights
@torch.no_grad()
def fused_copy(model: nn.Module, known: tuple[type[nn.Module], ...]) -> nn.Module:
    """A copy of a MambaVision model that computes the same, on a CPU in less time; see its `fuse`.

    Args:
        known: the classes of the modules that are changed inside. Others, whatever their layers are called, may compute
            something else with them.

    Raises:
        ValueError: the model is in training mode, in which BatchNorm depends on the batch.
    """
    if model.training:
        raise ValueError("fuse() is for inference, and this model is in training mode: call model.eval() first")

    def is_known(module: nn.Module | None) -> bool:
        kind = type(module)
        return kind in known and "forward" not in module.__dict__ and _computes_its_own(kind)

    fused = copy.deepcopy(model).requires_grad_(False)
    fused.is_fused = True
    net = fused.model
    stem, norm, pool = getattr(net.patch_embed, "conv_down", None), net.norm, net.avgpool
    for i in (0, 3) if is_known(net.patch_embed) and type(stem) is nn.Sequential and len(stem) == 6 else ():
        if _can_fold(stem[i], stem[i + 1]) and type(stem[i + 2]) is nn.ReLU:
            stem[i] = FusedConv2d(_folded(stem[i], stem[i + 1]), stem[i + 2])
            stem[i + 1], stem[i + 2] = nn.Identity(), nn.Identity()
    for level in net.levels:
        reduction = getattr(getattr(level, "downsample", None), "reduction", None)
        if isinstance(reduction, nn.Sequential) and len(reduction) == 1 and _can_replace(reduction[0]):
            reduction[0] = FusedConv2d(copy.deepcopy(reduction[0]))
        for block in filter(is_known, getattr(level, "blocks", ())):
            if not hasattr(block, "mixer"):
                _fuse_conv_block(block)
                continue
            if is_known(block.mixer):
                _fuse_branch(block, "mixer", "proj" if hasattr(block.mixer, "proj") else "out_proj", "gamma_1")
            if is_known(block.mlp):
                _fuse_branch(block, "mlp", "fc2", "gamma_2")
    if _is_affine(norm) and is_untouched(norm) and type(pool) is nn.AdaptiveAvgPool2d and is_untouched(pool):
        net.norm, net.avgpool = nn.Identity(), nn.Sequential(pool, norm)  # one number for each channel instead of a map
    return fused


def _fuse_conv_block(block: nn.Module) -> None:
    if not (_can_fold(block.conv1, block.norm1) and _can_fold(block.conv2, block.norm2)):
        return
    gelu = block.act1 if _is_gelu(block.act1) else None
    block.conv1 = FusedConv2d(_folded(block.conv1, block.norm1), gelu)
    block.act1 = block.act1 if gelu is None else nn.Identity()
    block.conv2 = FusedConv2d(_folded(block.conv2, block.norm2, block.gamma))
    block.norm1, block.norm2, block.gamma = nn.Identity(), nn.Identity(), None


def _fuse_branch(block: nn.Module, name: str, last: str, gamma_name: str) -> None:
    """Of a block of tokens: its mixer or its MLP, whose result `last` computes and a layer scale multiplies."""
    branch, gamma = getattr(block, name), getattr(block, gamma_name)
    end = getattr(branch, "proj_drop", None)
    is_last = is_untouched(branch) and (end is None or (type(end) is nn.Identity and is_untouched(end)))
    if gamma is not None and is_last and _is_own_linear(getattr(branch, last)):
        branch = copy.deepcopy(branch)  # another block may use it too
        setattr(block, name, branch)
        _scale(getattr(branch, last), gamma)
        setattr(block, gamma_name, None)
    if name == "mlp" and _is_own_linear(branch.fc1) and _is_gelu(branch.act):
        branch.fc1, branch.act = FusedLinear(branch.fc1, branch.act), nn.Identity()
    for layer in ("in_proj", "qkv", last):
        if _is_own_linear(getattr(branch, layer, None)):
            setattr(branch, layer, FusedLinear(getattr(branch, layer)))


def _is_own_linear(layer: nn.Module | None) -> bool:
    return _is_exactly(layer, nn.Linear) and is_untouched(layer)


def _is_exactly(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a layer is torch's own of a kind, neither quantised nor adapted: others stay as they are."""
    return type(layer) is kind and _has_own_weights(layer)


def _has_own_weights(layer: nn.Module) -> bool:
    return type(layer._parameters.get("weight")) is nn.Parameter and "bias" in layer._parameters


def _can_replace(conv: nn.Module | None) -> bool:
    return _pads_with_zeros(conv) and is_untouched(conv)


def _can_fold(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    return _can_replace(conv) and _is_affine(norm) and is_untouched(norm)


def _pads_with_zeros(conv: nn.Module | None) -> bool:
    """Whether a layer is a convolution of torch's own, and how wide it pads with zeros is told in numbers."""
    return _is_exactly(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _is_affine(norm: nn.Module | None) -> bool:
    """Whether a norm is a BatchNorm that computes with the statistics it has, not with those of the batch."""
    return _is_exactly(norm, nn.BatchNorm2d) and not norm.training and norm.running_var is not None


def _is_gelu(activation: nn.Module | None) -> bool:
    return type(activation) is nn.GELU and is_untouched(activation)


def _folded_weights(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution, the norm and a layer scale in one; to half precision rounded once."""
    weight, bias = _to(dtype, conv.weight, conv.bias)
    mean, variance, scale, shift = vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if gamma is not None or any(x is not None and x.dtype != dtype for x in vectors):
        wide = torch.float32 if dtype in HALVES else dtype  # which torch's batch_norm also takes beside half precision
        mean, variance, scale, shift = _to(wide, *vectors)
    if gamma is not None:
        scale, shift = scale * gamma, None if shift is None else shift * gamma
    zeros = torch.zeros_like(mean)

    def normalized(x: Tensor, mean: Tensor, shift: Tensor | None) -> Tensor:
        """Of numbers for each channel, by what computes the norm itself."""
        y = torch.batch_norm(x.reshape(1, len(x), -1), scale, shift, mean, variance, False, 0.0, norm.eps, False)
        return y.view(x.shape)

    bias = normalized(zeros.to(dtype) if bias is None else bias, mean, shift)
    if weight.is_contiguous():
        return normalized(weight, zeros, None), bias
    return normalized(weight.movedim(1, -1), zeros, None).movedim(-1, 1), bias  # channels_last, as it lies in memory


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, gamma: Tensor | None = None) -> nn.Conv2d:
    """A new convolution: the old one may also be used elsewhere."""
    folded = copy.deepcopy(conv)
    weights = _folded_weights(conv, norm, conv.weight.dtype, gamma)
    folded.weight, folded.bias = (nn.Parameter(x, requires_grad=False) for x in weights)
    return folded


def _scale(layer: nn.Module, gamma: Tensor) -> None:
    """Multiply a layer's output channels, by new parameters: another layer may use the old ones too."""
    layer.weight = nn.Parameter(layer.weight * gamma.view(-1, *[1] * (layer.weight.ndim - 1)), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias * gamma, requires_grad=False)


def is_plain(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether `linear` and `convolution` may compute modules, and all inside them, from x in place of calling them: in
    inference on a CPU that oneDNN knows, of layers that nobody changed or hooked, and with nobody who looks on.

    Asked once for many layers: it takes as long as a small one.
    """
    if type(x) is not Tensor or not x.is_cpu or is_traced() or x.numel() == 0 or x.layout != torch.strided:
        return False
    dtype = torch.float32 if x.dtype in HALVES and _is_slow(x.dtype) else x.dtype
    if dtype not in ONEDNN_DTYPES or not torch.backends.mkldnn.enabled:
        return False
    is_recorded = torch.is_grad_enabled()
    if (is_recorded and x.requires_grad) or torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    if has_modes() or _has_hooks_of_all():  # modes that count operators, for one
        return False
    kinds = set()
    return _are_plain(modules, x.dtype, is_recorded, kinds) and all(map(_computes_its_own, kinds))


def _are_plain(
    modules: Iterable[nn.Module | None], dtype: torch.dtype, is_recorded: bool, kinds: set[type[nn.Module]]
) -> bool:
    """What of that depends on the modules and all inside them, but for the code of their classes, added to `kinds`."""
    for module in modules:
        if module is None:
            continue
        if _is_changed(module):
            return False
        kinds.add(type(module))
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            if name in ("weight", "bias"):
                if tensor.dtype != dtype or tensor.layout != torch.strided:
                    return False
                if name == "bias" and not tensor.is_contiguous():  # oneDNN reads it as if it were dense
                    return False
            if not tensor.is_cpu or (is_recorded and tensor.requires_grad):
                return False
        if module._modules and not _are_plain(module._modules.values(), dtype, is_recorded, kinds):
            return False
    return True


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer may be computed by other means than calling it: nobody hooked it or replaced its forward."""
    return not _is_changed(layer) and not _has_hooks_of_all() and (is_traced() or _computes_its_own(type(layer)))


def _is_changed(layer: nn.Module) -> bool:
    """Whether a layer on its own has hooks, or other code than its class."""
    state = layer.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_conv_forward" in state
    )


def _has_hooks_of_all() -> bool:
    """Whether there are hooks of all modules."""
    module = nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def _computes_its_own(kind: type[nn.Module]) -> bool:
    """Whether a class of layers is called as usual, and nobody put other code into it, or into what a convolution's
    forward calls.
    """
    convolve = getattr(kind, "_conv_forward", None)
    is_called_as_usual = kind.__call__ is nn.Module._wrapped_call_impl
    return is_called_as_usual and _is_its_own(kind.forward, kind) and (convolve is None or _is_its_own(convolve, kind))


@functools.lru_cache
def _is_its_own(method, kind: type[nn.Module]) -> bool:
    """Whether a method of a class of layers is the one that the class was written with: by its names, for whoever
    replaced it may have done so before this module was imported."""
    if hasattr(method, "__wrapped__"):
        return False
    names = (getattr(method, "__module__", None), getattr(method, "__qualname__", "").rpartition(".")[0])
    return names in {(base.__module__, base.__qualname__) for base in kind.__mro__}


class _Fused(nn.Module):
    """A layer, and an activation behind it or none, in one pass over memory where oneDNN runs.

    There it also keeps the weights a second time, in the order in which oneDNN reads them or transformed for Winograd's
    algorithm, from the first call on: to bring them there takes up to half of a layer's time for one image.
    """

    def __init__(self, layer: nn.Module, activation: nn.Module | None = None):
        super().__init__()
        self.layer, self.activation, self.packed = layer, activation, {}

    def forward(self, x: Tensor) -> Tensor:
        # not as attributes, or torch.compile would ask again for all that __getattr__ does to find them
        layer, activation = self._modules["layer"], self._modules.get("activation")
        if is_plain(x, layer, activation):
            return self.compute(x)
        return activated(layer(x), activation)

    def compute(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same where `is_plain`, or in place of an activation the sum with `residual`."""
        layer, activation = self._modules["layer"], self._modules.get("activation")
        if not self._fits(layer):
            return in_turn(x, layer, activation, residual=residual)
        y, bias, added = _to(_precision(x, layer, is_prepared=True), x, _parameters(layer)[1], residual)
        return self._compute(y, layer, bias, activation, added).to(x.dtype)

    def _pack(self, pack, dtype: torch.dtype, *args) -> Tensor:
        """pack(weight, *args) of the weight in a precision, kept until the weights are others."""
        weight = self.layer.weight
        # what tells of other weights; tensors made in inference mode do not count their changes
        state = (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        packed = self.packed.get(pack)  # once: another thread may put its own there
        if packed is None or packed[0] is not weight or packed[1] != state:
            packed = self.packed[pack] = (weight, state, pack(weight.to(dtype), *args))
        return packed[2]

    def _apply(self, *args, **kwargs):
        self.packed = {}  # the weights move, or change their precision
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), "packed": {}}  # that is neither copied nor saved

    def __getattr__(self, name: str):
        """`weight`, `bias`, `in_channels`, ...: what code reads from the layer that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


class FusedConv2d(_Fused):
    def __init__(self, layer: nn.Conv2d, activation: nn.Module | None = None):
        super().__init__(layer, activation)
        self._lay_out()

    def _lay_out(self) -> None:
        """The weights in the layout of the maps, or each call copies them."""
        is_dense = misreads_layouts(self.layer.weight.device)
        self.layer.to(memory_format=torch.contiguous_format if is_dense else torch.channels_last)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if type(self.layer) is nn.Conv2d:  # code may have put another module there
            self._lay_out()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not is_traced() and _may_finish(x, self.layer, None):
            return _convolve_and_finish(x, self.layer, None, self.activation)
        return super().forward(x)

    def _fits(self, layer: nn.Module) -> bool:
        return _pads_with_zeros(layer)

    def _compute(
        self, x: Tensor, c: nn.Conv2d, bias: Tensor | None, activation: nn.Module | None, residual: Tensor | None
    ) -> Tensor:
        if winograd_pays(x, c, is_prepared=True):
            return _then(winograd_convolution(x, self._pack(winograd_filters, x.dtype), bias), activation, residual)
        reorder, shape = torch.ops.mkldnn._reorder_convolution_weight, list(x.shape)
        weight = self._pack(reorder, x.dtype, c.padding, c.stride, c.dilation, c.groups, shape)
        return _convolve(x, c, weight, bias, activation, residual)


class FusedLinear(_Fused):
    def _fits(self, layer: nn.Module) -> bool:
        return is_linear(layer)

    def _compute(
        self, x: Tensor, layer: nn.Linear, bias: Tensor | None, activation: nn.Module | None, residual: Tensor | None
    ) -> Tensor:
        is_faster = _onednn_is_faster(x, layer)
        is_packed = is_faster and not _packing_is_slow(x, layer)
        pack = torch.ops.mkldnn._reorder_linear_weight if is_packed else Tensor.contiguous
        return _linear(x, self._pack(pack, x.dtype), bias, activation, residual, is_faster)


def in_turn(x: Tensor, *layers: nn.Module | None, residual: Tensor | None = None) -> Tensor:
    """What layers make of x one after the other, and its sum with a residual; None for what there is not."""
    for layer in layers:
        x = x if layer is None else layer(x)
    return x if residual is None else residual + x


def convolution(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(norm(conv(x))) of a map (B, C, H, W), with the norm folded into the convolution where that is faster;
    or, in place of an activation, the sum with `residual`.

    Modules are called wherever more than rounding would tell the two apart: gradients, hooks, tracing, other code.
    """
    if _reads_beyond(x, conv):
        y = convolution(F.pad(x, (0, 2)), conv, None)
        return in_turn(y[..., :1], norm, activation, residual=residual)
    is_folded = type(conv) is FusedConv2d and (norm is None or type(norm) is nn.Identity)
    if is_folded and is_plain(x, conv, norm, activation):
        x = conv.compute(x, residual)
        return x if activation is None or type(activation) is nn.Identity else activation(x)
    if norm is not None and _may_finish(x, conv, norm):
        return in_turn(_convolve_and_finish(x, conv, norm, activation), residual=residual)
    if not _is_worth_folding(x, conv, norm):
        return in_turn(activated(in_turn(x, conv, norm), activation), residual=residual)
    dtype = _precision(x, conv)
    y = x.to(dtype)
    is_winograd = winograd_pays(y, conv, is_prepared=False)
    (residual,) = _to(dtype, residual)
    if norm is not None:
        weight, bias = _folded_weights(conv, norm, dtype)
    else:
        weight, bias = _to(dtype, conv.weight, conv.bias)
    if is_winograd:
        y = _then(winograd_convolution(y, winograd_filters(weight), bias), activation, residual)
    elif norm is None and activation is None and _patches_pay(y, conv):
        y = _multiply_patches(y, conv, weight, bias)
    else:
        y = _convolve(y, conv, weight.contiguous(memory_format=torch.channels_last), bias, activation, residual)
    return y.to(x.dtype)


def _reads_beyond(x: Tensor, conv: nn.Module) -> bool:
    """Whether oneDNN's convolution may take what lies behind the map for a part of it, and give numbers that are wrong
    or none: with AMX in bfloat16, at stride 2, where the map has one or two columns (seen in oneDNN 3.12 and 3.13).
    """
    if type(x) is not Tensor or not x.is_cpu or is_traced_for_export():
        return False
    if x.dtype not in HALVES and not torch.is_autocast_enabled("cpu"):
        return False
    return x.ndim == 4 and x.shape[-1] <= 2 and getattr(conv, "stride", None) == (2, 2)  # asked last: a graph's guard


def _may_finish(x: Tensor, conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether a kernel of ours may do what follows a convolution: on a GPU that Triton supports."""
    if finish is None or not _is_on_gpu(x):
        return False
    return _can_finish(x, conv, norm) and backend_on(x.device) == "triton"


def _can_finish(x: Tensor, conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether the kernel would compute what the layers do, and nobody records or looks on."""
    if is_traced() or torch.is_grad_enabled() or is_transformed() or has_modes():
        return False
    if x.ndim != 4 or x.numel() == 0 or x.dtype == torch.float64:
        return False
    return _has_usual_vectors(x.device, conv, norm)


def _has_usual_vectors(device: torch.device, conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether layers are torch's own, and their numbers for each channel lie where and as our kernels read them."""
    if not (_can_replace(conv) if norm is None else _can_fold(conv, norm)):
        return False
    vectors = [conv.bias]
    if norm is not None:
        vectors += [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    usual = (device, conv.weight.shape[:1], (1,))
    return all(y is None or (y.device, y.shape, y.stride()) == usual for y in vectors)


def _convolve_and_finish(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: nn.Module | None
) -> Tensor:
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    name = _name_of(activation)
    if conv.bias is not None or norm is not None or name not in ("none", None):
        y = finish(y.contiguous(memory_format=torch.channels_last), conv.bias, norm, name or "none")
    return activation(y) if name is None else y


def image_convolution(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None
) -> Tensor | None:
    """`convolution` of images (B, C, H, W) in any layout by a kernel of ours, or None where there is none for them."""
    if convolve_images is None or not _is_on_gpu(x):
        return None
    if not _has_matrix_units(x.device) or backend_on(x.device) != "triton":
        return None
    return _convolve_images(x, conv, norm, activation)


def _convolve_images(x: Tensor, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> Tensor | None:
    """That, if the kernel computes what the layers do, and nobody records or looks on."""
    if torch.is_grad_enabled() or is_traced_for_export() or is_transformed() or (not is_traced() and has_modes()):
        return None
    if type(conv) is FusedConv2d:
        if not all(type(y) is nn.Identity and is_untouched(y) for y in (norm, activation)) or not is_untouched(conv):
            return None
        conv, norm, activation = conv._modules["layer"], None, conv._modules.get("activation")
    name = _name_of(activation)
    if name is None or x.numel() == 0 or not _has_usual_vectors(x.device, conv, norm):
        return None
    form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if form != ((3, 3), (2, 2), (1, 1), (1, 1), 1) or conv.weight.device != x.device:
        return None
    if x.ndim != 4 or x.shape[1] != conv.in_channels or x.shape[0] * x.shape[2] * x.shape[3] >= 2**31:
        return None
    is_cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
    if dtype not in HALVES or x.dtype == torch.float64 or not (is_cast or conv.weight.dtype == dtype):
        return None
    if conv.in_channels > MOST_CHANNELS or conv.out_channels > MOST_FILTERS:
        return None
    return convolve_images(x, conv, norm, name, dtype)


@torch.compiler.assume_constant_result
def _has_matrix_units(device: torch.device) -> bool:
    """Whether a GPU multiplies matrices of both half precisions."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def _is_on_gpu(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cuda


def activated(x: Tensor, activation: nn.Module | None) -> Tensor:
    """activation(x), or x where there is none; on a GPU compiled to kernels that take no longer than memory does.

    Of the error function and of tanh torch.compile's kernels compute two branches for every number.
    """
    if not is_traced() or is_traced_for_export() or torch.is_grad_enabled() or x.dtype not in HALVES:
        return in_turn(x, activation)
    name = _name_of(activation) if _is_on_gpu(x) else None
    if name == "gelu":
        return _gelu(x.float()).to(x.dtype)
    if name == "gelu_tanh":
        return _gelu_tanh(x.float()).to(x.dtype)
    return in_turn(x, activation)


def _gelu(x: Tensor) -> Tensor:
    """GELU to 3e-5 of itself, less than a tenth of what rounding to half precision changes.

    Of a normal distribution, what lies beyond |x| is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.375 |x|), fitted.
    """
    distance = x.abs().clamp(max=15.0)  # beyond, nothing is left; and infinity times 0 is no number
    t = 1 / (1 + 0.375 * distance)
    tail = t * (0.14906077 + t * (0.15773643 + t * (0.08355633 + t * (0.20029159 - t * 0.09064726))))
    return x.relu() - distance * tail * torch.exp2(-0.72134752 * distance * distance)


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(a)) / 2 = sigmoid(2 a)


def _name_of(activation: nn.Module | None) -> str | None:
    """What `finish` calls an activation; None for what it does not know, or what calls others."""
    if activation is None:
        return "none"
    if _is_gelu(activation):
        return {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate]
    return "relu" if type(activation) is nn.ReLU and is_untouched(activation) else None


# Numbers in a convolution's input from which on BatchNorm and the activation take longer than folding
_LEAST_MAP = 2**16


def _is_worth_folding(x: Tensor, conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether a convolution and the norm behind it, or none, can be computed as one here, and are faster so."""
    if not is_plain(x, conv, norm) or x.ndim != 4 or not _pads_with_zeros(conv):
        return False
    if norm is not None and not _is_affine(norm):
        return False
    if _precision(x, conv) != x.dtype:
        return True
    if norm is None:
        return _patches_pay(x, conv)
    return x.numel() >= _LEAST_MAP


# Weights of a convolution for each number of its map from which on a product with the map's patches is faster: it takes
# the weights as they lie, and oneDNN's convolution reorders them at every call. With AMX, whose products are the least
# part of the time, the patches of larger maps too, with the weights in an order in which they are quick to copy.
_LEAST_WEIGHTS, _LEAST_WEIGHTS_OF_AMX, _LEAST_WEIGHTS_AS_THEY_LIE = 10, 3, 7


def _patches_pay(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `_multiply_patches` is the faster form."""
    if x.dtype in HALVES and _is_slow(x.dtype):
        return False
    is_usual = conv.groups == 1 and conv.dilation == (1, 1) and conv.weight.is_contiguous()
    least = _LEAST_WEIGHTS_OF_AMX if x.dtype in HALVES and "amx_tile" in _flags() else _LEAST_WEIGHTS
    return is_usual and conv.weight.numel() >= least * x.numel()


def _multiply_patches(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of these weights as one product, in channels_last layout."""
    (top, left), (rows, columns), (down, right) = conv.padding, conv.kernel_size, conv.stride
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    patches = padded.unfold(1, rows, down).unfold(2, columns, right)  # (B, H', W', C, rows, columns)
    if weight.numel() < _LEAST_WEIGHTS_AS_THEY_LIE * x.numel():
        patches, weight = patches.movedim(3, -1), weight.movedim(1, -1)
    return _linear(patches.flatten(3), weight.flatten(1), bias, None, None, _has_avx512()).permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    activation: nn.Module | None,
    residual: Tensor | None,
) -> Tensor:
    """A convolution of these weights, with the strides and so on of `conv`, and an activation or a sum after it."""
    convolve = torch.ops.mkldnn._convolution_pointwise
    args = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if _has_avx512():
        if residual is not None:
            return convolve.binary(x, residual, *args, "add", 1.0, None, [], None)
        if type(activation) in (nn.GELU, nn.ReLU) and is_untouched(activation):
            return convolve(x, *args, *_pointwise(activation))
    if weight.is_mkldnn:
        x = convolve(x, *args, *_pointwise(None))
    else:  # which takes less time to call
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return _then(x, activation, residual)


def _then(x: Tensor, activation: nn.Module | None, residual: Tensor | None) -> Tensor:
    """An activation or a sum, of what nobody else holds."""
    if residual is not None:
        return x.add_(residual)
    if activation is None:
        return x
    return x.relu_() if type(activation) is nn.ReLU and is_untouched(activation) else activation(x)


def linear(x: Tensor, layer: nn.Module, activation: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """activation(layer(x)) of tokens (..., C), or in place of an activation the sum with `residual`, where `is_plain`:
    in one pass over memory where that is faster.
    """
    if type(layer) is FusedLinear:
        x = layer.compute(x, residual)
        return x if activation is None or type(activation) is nn.Identity else activation(x)
    if not is_linear(layer) or not (activation is None or type(activation) is nn.GELU):
        return in_turn(x, layer, activation, residual=residual)
    (weight, bias), dtype, by_onednn = _parameters(layer), _precision(x, layer), _onednn_is_faster(x, layer)
    if x.dtype == weight.dtype == dtype:
        return _linear(x, weight, bias, activation, residual, by_onednn)
    x_, weight, bias, residual = _to(dtype, x, weight, bias, residual)
    return _linear(x_, weight, bias, activation, residual, by_onednn).to(x.dtype)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is torch's own linear one with weights of its own, so that other code may compute it."""
    return type(layer).forward is nn.Linear.forward and _has_own_weights(layer)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x) of tokens (..., C) where `is_plain`."""
    if type(norm) is not nn.LayerNorm:
        return norm(x)
    return torch.layer_norm(x, norm.normalized_shape, *_parameters(norm), norm.eps)


# Multiplications of a linear layer from which on oneDNN gains more than a call of it costs, and how wide it must be:
# products of 36 channels take half as long again as MKL's
_LEAST_WORK, _LEAST_WIDTH = 2**23, 64


def _onednn_is_faster(x: Tensor, layer: nn.Linear) -> bool:
    """Than torch's own linear layer, whose products are MKL's."""
    is_worth_a_call = layer.out_features >= _LEAST_WIDTH and x.numel() * layer.out_features >= _LEAST_WORK
    return is_worth_a_call and _has_avx512()


def _packing_is_slow(x: Tensor, layer: nn.Linear) -> bool:
    """Whether oneDNN takes longer with weights in its own order: half as long again, for some shapes with AMX (3.12).

    Elsewhere they save a tenth of the time, of few tokens a third.
    """
    tokens = x.numel() // layer.in_features
    return tokens < layer.out_features < 2 * tokens and x.dtype in HALVES and "amx_tile" in _flags()


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: nn.Module | None,
    residual: Tensor | None,
    by_onednn: bool,
) -> Tensor:
    if by_onednn and residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    if by_onednn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_pointwise(activation))
    return in_turn(F.linear(x, weight, bias), activation, residual=residual)


def _pointwise(activation: nn.GELU | nn.ReLU | None) -> tuple[str, list, str]:
    """What oneDNN's operators do to their results: the function, its numbers, and the way to compute it."""
    if activation is None:
        return "none", [], ""
    if type(activation) is nn.ReLU:
        # oneDNN's ReLU makes zeros of what is no number; of 1e-30 of a number nothing is left in the next sum
        return "leaky_relu", [1e-30], ""
    return "gelu", [], activation.approximate


@functools.cache
def _has_avx512() -> bool:
    """Without it, oneDNN's linear layers, and its GELU behind convolutions, take longer than torch's own. On ARM they,
    and its sums, may even be oneDNN's reference code, which is slower by far."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain layer, in less time than by its attributes."""
    return layer._parameters["weight"], layer._parameters["bias"]


# Products with each weight from which on float32, where half precision is slow, gains more than bringing the weights to
# it costs (measured with AVX-512)
_LEAST_USES = 100


def _precision(x: Tensor, layer: nn.Linear | nn.Conv2d, is_prepared: bool = False) -> torch.dtype:
    """What a layer, its weights prepared for that or not, is best computed in; the result is rounded to x's dtype."""
    if x.dtype not in HALVES or not _is_slow(x.dtype):
        return x.dtype
    is_convolution = isinstance(layer, nn.Conv2d)
    uses = x.numel() // (layer.in_channels * math.prod(layer.stride) if is_convolution else layer.in_features)
    return torch.float32 if is_prepared or uses >= _LEAST_USES or x.dtype not in ONEDNN_DTYPES else x.dtype


@functools.cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Whether products in a half precision take longer on this CPU than in float32.

    By what the processor has, not by a trial, which would go wrong on a busy one.
    """
    if dtype not in ONEDNN_DTYPES:  # eight times as long
        return True
    flags = _flags()
    if not flags:  # not an x86
        return False
    if dtype == torch.float16:
        return "amx_fp16" not in flags
    # Intel's AVX-512 in bfloat16 reaches half of float32's rate, AMD's twice of it
    return "amx_bf16" not in flags and not ("avx512_bf16" in flags and "AuthenticAMD" in cpuinfo())


@functools.cache
def _flags() -> frozenset[str]:
    """The instruction sets of an x86 with Linux."""
    return frozenset(next((line.split() for line in cpuinfo().splitlines() if line.startswith("flags")), ()))


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    # asking first: at a single image, a hundred calls that change nothing are felt
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]
