"""Operators of our own: one node of a graph for torch.compile, and a plain call where nobody looks on. Also `dense`,
for operators of torch's that misread layouts, and `evenly`, by which work is divided."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._device import DeviceContext


def define(
    module: str,
    name: str,
    function: Callable,
    fake: Callable,
    save: Callable | None = None,
    gradients: Callable | None = None,
) -> Callable:
    """`function` as an operator of torch.library, called as such only where somebody looks on.

    Through torch's dispatcher an operator in Python takes 15 us more, and 100 us with its gradients, which is longer
    than what it computes takes on a GPU. So where nobody compiles, traces, transforms or watches, it is called
    directly, or as an autograd.Function.

    Args:
        module: `__name__` of the module that defines it. A part of the operator's name, for transformers loads each
            model folder's code as modules of its own.
        name: of the operator within the module.
        function: from tensors, numbers and None to one tensor or more; its annotations are the operator's schema.
        fake: the same for tensors without data.
        save, gradients: `setup_context` and `backward` of torch.library's `register_autograd`; None where it has no
            derivative.

    Returns:
        a function of the same arguments, and as its attribute `operator` what torch.library knows.
    """
    namespace = "mambavision_" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}" for c in module)
    operator = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=())
    operator.register_fake(fake)
    recorded = None
    if gradients is not None:
        operator.register_autograd(gradients, setup_context=save)

        def forward(ctx, *args):  # in one: a `setup_context` apart costs 30 us, for the arguments are bound to names
            output = function(*args)
            save(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        recorded = type(name, (torch.autograd.Function,), methods)

    @functools.wraps(function)
    def call(*args):
        if _is_watched(args):
            return operator(*args)
        if recorded is not None and needs_gradient(*args):
            return recorded.apply(*args)
        return function(*args)

    call.operator = operator
    return call


def needs_gradient(*args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def is_traced() -> bool:
    """Whether what runs now becomes a graph. What is asked of a layer then, torch.compile asks again at every call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_traced_for_export() -> bool:
    """Whether what runs now becomes a graph for elsewhere: of standard operators, free in the batch and the image."""
    # not `is_exporting()`, which torch.compile takes for true up to torch 2.11; the oldest have neither
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are at work: no operator of ours follows them."""
    if torch.compiler.is_compiling():  # which refuses by itself what it cannot transform
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _is_watched(args: tuple) -> bool:
    """Whether somebody makes a graph, transforms, or is told of every operator."""
    if is_traced() or has_modes():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(x, Tensor) and not _is_plain(x) for x in args)


def misreads_layouts(device: torch.device) -> bool:
    """Whether torch's operators compute something else, without an error, from tensors that are not contiguous.

    On Apple's GPUs, by torch's issues of 2025 and 2026: convolutions of slices of channels (pytorch/pytorch#180984),
    attention of permuted tensors (#163597, #181133), gradients of BatchNorm in channels_last (#175189).
    """
    return device.type == "mps"


def dense(x: Tensor) -> Tensor:
    """x, and what comes back as its gradient, contiguous where layouts are misread."""
    if not misreads_layouts(x.device):
        return x
    x = x.contiguous()
    if x.grad_fn is not None and not is_traced():
        x.register_hook(Tensor.contiguous)
    return x


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of the arithmetic on x, whatever it is stored in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def evenly(total: int, most: int) -> int:
    """The size of equal parts, but for the last, of as few as hold no more than `most` each, and at least one."""
    return max(1, -(-total // max(1, -(-total // max(1, most)))))


def has_modes() -> bool:
    """Whether modes are told of operators, other than the one that sets a default device."""
    return bool(torch._C._len_torch_dispatch_stack()) or (
        bool(torch._C._len_torch_function_stack())
        and any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())
    )


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is torch's own, holds numbers, and is no batch of gradients (`is_grads_batched`)."""
    is_own = type(x) in (Tensor, torch.nn.Parameter)
    return is_own and not x.is_meta and not torch._C._functorch.is_legacy_batchedtensor(x)
