"""The Triton kernels: in Triton's interpreter against float64 references, compiled for GPUs that need not be there, and
on a GPU where there is one.

The interpreter is switched on by TRITON_INTERPRET=1 before triton is first imported, for the whole process, in which
nothing can be compiled then; and torch itself imports triton. So the tests of TestInterpreted run in a process of their
own, in which `test_in_the_interpreter` runs this file again. To see them one by one:

    TRITON_INTERPRET=1 pytest tests/test_kernels.py
"""

import copy
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, copy_code, run_python, skip_where_tritons_interpreter_is_broken
from repository.selective_scan import selective_scan_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.dynamic_module_utils import get_imports


triton = pytest.importorskip("triton", minversion="3.3", reason="torch comes without triton on this platform")

from repository import fusion_mambavision, fusion_triton  # noqa: E402
from repository import modeling_mambavision as modeling  # noqa: E402
from repository import selective_scan as scan  # noqa: E402
from repository import selective_scan_triton as kernels  # noqa: E402
from repository.configuration_mambavision import MambaVisionConfig  # noqa: E402


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and kernels.runs_on(torch.device("cuda"))

# Relative error in the Euclidean norm. float64 and float32: rounding, over up to 500 steps. bfloat16: that the result
# has 8 bits; the state has 24.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LEAVES = ("u and z", "dt", "A", "B and C", "D", "dt_bias", "weight")
STEM = nn.Conv2d(3, 8, 3, 2, 1, bias=False, dtype=torch.bfloat16), nn.BatchNorm2d(8).eval()


def make(batch, length, channels, dtype, states=8, longest_step=None, fastest_decay=8.0, device="cpu", width=None):
    """The tensors that gradients are taken of, and scan_concat's arguments made of them, laid out as in the mixer.

    u and z are the halves of one projection's output, B and C parts of another's: their rows have gaps. The parameters
    are float32 where the rest is half precision.
    """
    generator = torch.Generator().manual_seed(batch + length + channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = channels if width is None else width
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    dt, dt_bias = normal(batch, length, channels), normal(channels)
    if longest_step:  # about half of the steps are tiny, half are long
        dt = torch.rand(batch, length, channels, generator=generator, dtype=torch.float64) * 2 * longest_step
        dt -= longest_step
    A = -fastest_decay * torch.rand(channels, states, generator=generator, dtype=torch.float64)
    leaves = [
        normal(batch, length, channels + width).to(dtype),
        dt.to(dtype),
        A.to(exact),
        normal(batch, length, 3 + 2 * states).to(dtype),
        normal(channels).to(exact),
        dt_bias.to(exact),
        normal(width, 1, 3).to(exact),
    ]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    return leaves, arguments(leaves, channels, states)


def arguments(leaves, channels, states):
    uz, dt, A, projected, D, dt_bias, weight = leaves
    u, z = uz.split([channels, uz.shape[2] - channels], -1)
    _, B, C = projected.split([projected.shape[2] - 2 * states, states, states], -1)
    return u, dt, A, B, C, D, dt_bias, z, weight


def reference(u, dt, A, B, C, D, dt_bias, z, weight):
    y = selective_scan_reference(u, dt, A, B, C, D, dt_bias)
    z = F.conv1d(z.transpose(1, 2), weight, padding=1, groups=len(weight)).transpose(1, 2)
    return torch.cat([y, F.silu(z)], -1)


def check(batch, length, channels, dtype, states=8, device="cpu", **options):
    """scan_concat and all its gradients, against the reference in float64 on the same numbers."""
    leaves, inputs = make(batch, length, channels, dtype, states, device=device, **options)
    out = kernels.scan_concat(*inputs)
    assert out.dtype == dtype
    grad_out = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(out)
    actual = torch.autograd.grad(out, leaves, grad_out)

    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    expected_out = reference(*arguments(exact, channels, states))
    expected = torch.autograd.grad(expected_out, exact, grad_out.double().cpu())

    tolerance = TOLERANCE[dtype]
    assert error(out[..., :channels], expected_out[..., :channels]) < tolerance
    assert error(out[..., channels:], expected_out[..., channels:]) < tolerance
    for name, leaf, ours, theirs in zip(LEAVES, leaves, actual, expected, strict=True):
        assert ours.dtype == leaf.dtype, name
        # a GPU's powers of two are off by up to 2e-7, all to one side maybe, and slow decays multiply hundreds of them
        slack = 10 if name == "A" and dtype == torch.float32 and device == "cuda" else 1
        assert error(ours, theirs) < slack * tolerance, f"gradient of {name}"


def error(actual, expected):
    """NaN passes no comparison."""
    scale = expected.norm().item()
    return (actual.detach().double().cpu() - expected.detach()).norm().item() / (scale or 1.0)


ACTIVATIONS = {"none": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}


def random_norm(width, generator):
    norm = nn.BatchNorm2d(width, eps=0.1).eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_(generator=generator)
    norm.running_var.uniform_(0.1, 2.0, generator=generator)
    return norm


def normed_and_activated(x, norm, activation):
    """In float64."""
    if norm is not None:
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = F.batch_norm(x, *(tensor.double() for tensor in tensors), eps=norm.eps)
    return ACTIVATIONS[activation](x)


def check_finish(shape, dtype, activation, parts="both", device="cpu"):
    """What follows a convolution, in the place of its result: the offset, the norm, both, and an activation."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    norm = random_norm(shape[1], generator) if parts != "offset" else None
    offset = torch.randn(shape[1], generator=generator) if parts != "norm" else None
    with torch.no_grad():
        expected = x.double() if offset is None else x.double() + offset.double().view(1, -1, 1, 1)
        expected = normed_and_activated(expected, norm, activation)
        there = x.to(device)
        inputs = (None if offset is None else offset.to(device), norm and norm.to(device))
        y = fusion_triton.finish(there, *inputs, activation)
    assert y is there and y.dtype == dtype
    assert error(y, expected) < TOLERANCE[dtype]


def check_images(shape, filters, dtype, activation="relu", parts="norm", given=None, strides=None, device="cpu"):
    """The stem's first convolution and what follows it, of images in any layout, against float64."""
    generator = torch.Generator().manual_seed(shape[1] + filters)
    norm = random_norm(filters, generator) if parts != "offset" else None
    conv = nn.Conv2d(shape[1], filters, 3, 2, 1, bias=parts != "norm")
    for parameter in conv.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(shape, generator=generator).to(given or dtype)
    if isinstance(strides, tuple):
        x = x.as_strided(shape, strides)
        conv.weight = nn.Parameter(conv.weight.data.repeat(2, 1, 1, 1)[::2])  # with gaps between the filters
    elif strides is not None:
        x = x.contiguous(memory_format=strides)
    with torch.no_grad():
        bias = None if conv.bias is None else conv.bias.double()
        expected = F.conv2d(x.to(dtype).double(), conv.weight.to(dtype).double(), bias, 2, 1)
        expected = normed_and_activated(expected, norm, activation)
        layers = (conv.to(device, memory_format=torch.channels_last if given else None), norm and norm.to(device))
        y = fusion_triton.convolve_images(x.to(device), *layers, activation, dtype)
    assert y.shape == expected.shape and y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    # the interpreter cuts bfloat16 off where a GPU rounds
    assert error(y, expected) < (2 if INTERPRETED and dtype == torch.bfloat16 else 1) * TOLERANCE[dtype]


def divided(monkeypatch, block=None, chunk=None):
    """Make the kernels divide the work so: channels and steps of a program."""

    def plan(batch, length, channels, processors):
        own = kernels_plan(batch, length, channels, processors)
        b, c = block or own.block, chunk or own.chunk
        return kernels.Plan(b, -(-channels // b), c, -(-length // c))

    kernels_plan = kernels.plan
    monkeypatch.setattr(kernels, "plan", plan)


@pytest.fixture
def poisoned(monkeypatch):
    """New buffers hold NaN, so that whatever is left unwritten shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


# ---------------------------------------------------------------------------------------------------------------------
# In the interpreter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True, scope="class")
    def faster_interpreter(self):
        """Triton's interpreter patches triton.language again for every call within a kernel: half of its time."""
        from triton.runtime import interpreter

        if not hasattr(interpreter, "_patch_lang"):  # of another release
            return
        patched = set()
        start, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

        def call_kernel(self, *args, **kwargs):
            patched.clear()
            return start(self, *args, **kwargs)

        def call_function(self, *args, **kwargs):
            if id(self.fn.__globals__) not in patched:
                patched.add(id(self.fn.__globals__))
                patch(self.fn)
            return self.rewrite()(*args, **kwargs)

        interpreter.GridExecutor.__call__ = call_kernel
        interpreter.InterpretedFunction.__call__ = call_function

    @pytest.mark.parametrize(
        ("batch", "length", "channels", "dtype", "block", "chunk"),
        [
            (3, 1, 20, torch.float64, None, None),
            (2, 7, 40, torch.float64, None, None),
            (1, 49, 160, torch.float32, 64, None),
            (1, 196, 392, torch.float32, 512, None),
            # in chunks: one short of several, all full, many
            (1, 49, 40, torch.float64, 64, 16),
            (1, 48, 20, torch.float32, None, 24),
            (1, 500, 20, torch.float32, None, 64),
            (3, 7, 392, torch.bfloat16, 512, None),
            (1, 49, 40, torch.bfloat16, 64, 8),
        ],
    )
    def test_forward_and_gradients(self, monkeypatch, batch, length, channels, dtype, block, chunk):
        divided(monkeypatch, block, chunk)
        check(batch, length, channels, dtype)

    @pytest.mark.parametrize(("chunk", "dtype"), [(None, torch.float64), (8, torch.float32)])
    def test_long_steps_and_fast_decay(self, monkeypatch, chunk, dtype):
        divided(monkeypatch, chunk=chunk)
        check(1, 20, 20, dtype, longest_step=20.0, fastest_decay=64.0)

    @pytest.mark.parametrize("states", [1, 16])
    def test_numbers_of_states(self, monkeypatch, states):
        divided(monkeypatch, chunk=8)
        check(1, 11, 5, torch.float64, states=states)

    def test_states_that_are_no_power_of_two(self):
        _, inputs = make(1, 3, 4, torch.float32, states=6)
        with pytest.raises(ValueError, match=r"power of two states.*got 6"):
            kernels.scan(*inputs[:7])

    @pytest.mark.parametrize("length", [1, 2, 17, 35])
    def test_convolve(self, length):
        x = torch.randn(3, length, 70, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(70, 1, 3, dtype=torch.float64, requires_grad=True)
        y = kernels.convolve(x, weight)
        expected = F.silu(F.conv1d(x.transpose(1, 2), weight, padding=1, groups=70)).transpose(1, 2)
        grad = torch.randn_like(y)
        assert error(y, expected) < 1e-12
        gradients = torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad)
        for ours, theirs in zip(*gradients, strict=True):
            assert error(ours, theirs) < 1e-12

    @pytest.mark.parametrize("chunk", [None, 8])
    def test_every_layout_gives_the_same(self, monkeypatch, chunk):
        divided(monkeypatch, chunk=chunk)
        leaves, inputs = make(2, 9, 20, torch.float32)
        inputs = inputs[:7]
        plain = kernels.scan(*(x.contiguous() for x in inputs))
        columns = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 3 else x for x in inputs]
        steps_first = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in inputs]
        for other in (inputs, columns, steps_first):
            assert torch.equal(kernels.scan(*other), plain)
        # a gradient without memory of its own, as sum() gives it
        ours = torch.autograd.grad(kernels.scan(*inputs).sum(), leaves[:6])
        exact = [x.detach().double().requires_grad_() for x in leaves]
        theirs = torch.autograd.grad(selective_scan_reference(*arguments(exact, 20, 8)[:7]).sum(), exact[:6])
        for name, a, b in zip(LEAVES[:6], ours, theirs, strict=True):
            assert error(a, b) < 1e-5, name

    @pytest.mark.parametrize("chunk", [None, 8])
    def test_gradients_of_some_tensors_only(self, monkeypatch, chunk):
        divided(monkeypatch, chunk=chunk)
        leaves, inputs = make(1, 9, 20, torch.float64)
        out = kernels.scan_concat(*inputs)
        grad = torch.randn_like(out)
        every = torch.autograd.grad(out, leaves, grad)
        _, frozen = make(1, 9, 20, torch.float64)
        frozen = [x.detach() for x in frozen]
        for index, wanted in ((4, None), (5, 4), (8, 6)):  # C, D, weight
            some = list(frozen)
            some[index] = frozen[index].clone().requires_grad_()
            (ours,) = torch.autograd.grad(kernels.scan_concat(*some), some[index], grad)
            assert torch.equal(ours, every[3][..., -8:] if wanted is None else every[wanted])

    @pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
    def test_empty(self, shape):
        leaves, inputs = make(*shape, torch.float32)
        out = kernels.scan_concat(*inputs)
        assert out.shape == (*shape[:2], 16)
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape and not grad.any()

    @pytest.mark.parametrize("far", ["sequences", "steps"])
    def test_offsets_beyond_32_bits(self, monkeypatch, far):
        from triton.runtime.interpreter import GridExecutor

        # the memory is the kernels' own, and writing it back to itself would touch all of it
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        divided(monkeypatch, chunk=8)
        _, inputs = make(3, 10, 5, torch.float16)
        inputs = [x.detach() for x in inputs]
        parameters = [inputs[i].requires_grad_() for i in (2, 5, 8)]  # A, D, weight

        def outputs(inputs):
            out = kernels.scan_concat(*inputs)
            return out, *torch.autograd.grad(out.float().sum(), parameters)

        expected = outputs(inputs)
        memory = torch.empty(2**31 + 2**13, dtype=torch.float16)  # reserved, but only used where it is written
        # indices and strides that fit into 32 bits, and products that do not
        strides = {"sequences": (2**30, 64, 1), "steps": (64, 2**31 // 9 + 1, 1)}[far]
        for start, index in enumerate((0, 1, 3, 4, 7)):  # u, dt, B, C, z
            there = memory.as_strided(inputs[index].shape, strides, 2**10 * start)
            inputs[index] = there.copy_(inputs[index])
        assert all(torch.equal(a, b) for a, b in zip(outputs(inputs), expected, strict=True))

    def test_operators_are_well_formed(self):
        _, inputs = make(2, 3, 4, torch.float32)
        inputs = [x.detach().requires_grad_() for x in inputs]
        torch.library.opcheck(kernels._scan.operator, (*inputs, True))
        torch.library.opcheck(kernels._scan.operator, (*inputs[:7], None, None, True))
        torch.library.opcheck(kernels._convolve.operator, inputs[7:])
        inputs = [x.detach() for x in inputs]
        starts = kernels._scan(*inputs[:7], None, None, True)[1]
        torch.library.opcheck(kernels._scan_backward.operator, (inputs[0], *inputs[:7], starts))
        torch.library.opcheck(kernels._convolve_backward.operator, (inputs[7], *inputs[7:]))

    def test_compiles_to_one_graph(self):
        def loss(*inputs):
            convolved = kernels.convolve(inputs[0], inputs[8])
            return kernels.scan_concat(convolved, *inputs[1:]).square().mean()

        leaves, inputs = make(1, 5, 4, torch.float32)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        expected = torch.autograd.grad(loss(*inputs), leaves)
        for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_compiled_convolution_is_the_compilers_in_inference(self, monkeypatch):
        monkeypatch.setenv("MAMBAVISION_SCAN", "triton")
        _, inputs = make(2, 7, 20, torch.bfloat16)
        for is_recorded in (False, True):
            z, weight = (x.detach().requires_grad_(is_recorded) for x in inputs[7:])
            torch.compiler.reset()
            graphs = []
            backend = lambda graph, _, graphs=graphs: graphs.append(graph) or graph  # noqa: E731
            compiled = torch.compile(scan.silu_convolve, fullgraph=True, backend=backend)
            value, expected = compiled(z, weight), F.conv1d(z.mT.double(), weight.double(), padding=1, groups=20).mT
            assert value.dtype == z.dtype and error(value, F.silu(expected)) < TOLERANCE[z.dtype]
            if not is_recorded:  # rounded once
                assert (value == F.silu(expected).to(z.dtype)).float().mean() > 0.99
            assert any("mambavision" in str(node.target) for node in graphs[0].graph.nodes) == is_recorded

    @pytest.mark.parametrize("width", [20, 32, 80, 196])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_what_follows_a_convolution(self, width, activation):
        for dtype, parts in itertools.product((torch.float32, torch.bfloat16), ("both", "norm", "offset")):
            check_finish((2, width, 23, 13), dtype, activation, parts)

    @pytest.fixture
    def exact_products(self, monkeypatch):
        """The interpreter multiplies bfloat16's bits as if they were integers."""
        from triton.runtime.interpreter import InterpreterBuilder

        multiply, half, wide = InterpreterBuilder.create_dot, triton.language.bfloat16, triton.language.float32

        def create_dot(self, a, b, *args):
            widened = [self.create_fp_ext(x, wide) if x.dtype.scalar == half else x for x in (a, b)]
            return multiply(self, *widened, *args)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

    @pytest.mark.usefixtures("exact_products")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_images(self, dtype):
        for parts, activation in itertools.product(("both", "norm", "offset"), ACTIVATIONS):
            check_images((2, 3, 17, 22), 20, dtype, activation, parts)
        for shape, filters in (((1, 3, 1, 1), 64), ((2, 1, 9, 2), 5), ((1, 7, 8, 11), 32), ((3, 4, 1, 16), 48)):
            check_images(shape, filters, dtype)
        check_images((2, 3, 16, 16), 32, dtype, strides=torch.channels_last)
        check_images((2, 3, 9, 9), 32, dtype, given=torch.float32)  # images and filters, as under autocast
        check_images((2, 3, 9, 9), 32, dtype, strides=(0, 9, 27, 1))
        assert fusion_triton.convolve_images(torch.empty(0, 3, 8, 8), *STEM, "relu", dtype).shape == (0, 8, 4, 4)

    @torch.no_grad()
    @pytest.mark.usefixtures("exact_products")
    def test_the_stem_is_computed_by_it(self, monkeypatch):
        """As on a GPU: in the model as it is and fused, compiled or not, in half precision and under autocast."""
        calls = []
        monkeypatch.setattr(modeling, "image_convolution", fusion_mambavision._convolve_images)
        monkeypatch.setattr(
            fusion_mambavision,
            "convolve_images",
            lambda *args: (calls.append(1), fusion_triton.convolve_images(*args))[1],
        )
        config = MambaVisionConfig(dim=16, in_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_labels=4)
        model = modeling.MambaVisionModelForImageClassification(config).eval()
        for norm in (model.model.patch_embed.conv_down[i] for i in (1, 4)):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                tensor.normal_()
        x = torch.randn(2, 3, 19, 32)
        expected = model.model.patch_embed(x)
        assert not calls  # in float32
        half, half_fused = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().fuse()
        graphs = []
        compiled = torch.compile(half.model.patch_embed, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
        for stem in (half.model.patch_embed, half_fused.model.patch_embed, compiled):
            assert error(stem(x.bfloat16()), expected) < 0.02 and len(calls) == 1
            calls.clear()
        assert sum("convolve_images" in str(node.target) for node in graphs[0].graph.nodes) == 1
        for stem in (model.model.patch_embed, model.fuse().model.patch_embed):
            with torch.autocast("cpu", torch.bfloat16):
                y = stem(x)
            assert y.dtype == torch.bfloat16 and error(y, expected) < 0.02 and len(calls) == 1
            calls.clear()
        exported = torch.export.export(half.model.patch_embed, (x.bfloat16(),))
        traced = torch.jit.trace(half.model.patch_embed, x.bfloat16(), check_trace=False)
        assert not calls and "convolve_images" not in str(exported.graph) + str(traced.inlined_graph)
        with torch.enable_grad():
            half.model.patch_embed(x.bfloat16()).sum().backward()
        assert not calls and all(p.grad is not None for p in half.model.patch_embed.parameters())

    @torch.no_grad()
    def test_what_is_no_number_stays_so(self):
        x = torch.full((1, 16, 2, 2), torch.nan).contiguous(memory_format=torch.channels_last)
        for activation in ACTIVATIONS:
            assert fusion_triton.finish(x.clone(), torch.ones(16), None, activation).isnan().all()

    @torch.no_grad()
    def test_layers_are_computed_by_it(self, monkeypatch):
        """As on a GPU: whatever may follow a convolution, in the model and in a fused copy."""
        calls = []
        monkeypatch.setattr(fusion_mambavision, "_may_finish", fusion_mambavision._can_finish)
        monkeypatch.setattr(
            fusion_mambavision, "finish", lambda *args: (calls.append(args[3]), fusion_triton.finish(*args))[1]
        )
        hooked = nn.GELU()
        hooked.register_forward_hook(lambda module, args, output: output + 1)
        names = {nn.ReLU(): "relu", nn.GELU(): "gelu", nn.GELU("tanh"): "gelu_tanh", None: "none"}
        names |= {hooked: "none", nn.ReLU6(): "none", nn.Identity(): "none"}
        for (activation, name), bias, groups in itertools.product(names.items(), (True, False), (1, 2)):
            conv, norm = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, bias=bias), nn.BatchNorm2d(6).eval()
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                tensor.normal_()
            x = torch.randn(2, 4, 7, 5)
            follow = activation or nn.Identity()
            calls.clear()
            y = fusion_mambavision.convolution(x, conv, norm, activation)
            torch.testing.assert_close(y, follow(norm(conv(x))), rtol=1e-4, atol=1e-5)
            fused = fusion_mambavision.FusedConv2d(conv, activation)(x)
            torch.testing.assert_close(fused, follow(conv(x)), rtol=1e-4, atol=1e-5)
            assert calls == [name] * (2 if bias or name != "none" else 1)
            norm.bias = None
            y = fusion_mambavision.convolution(x, conv, norm, activation)
            torch.testing.assert_close(y, follow(norm(conv(x))), rtol=1e-4, atol=1e-5)

    def test_a_trace_keeps_the_operator(self):
        x, weight = torch.randn(2, 5, 4), torch.randn(4, 1, 3)
        traced = torch.jit.trace(kernels.convolve, (x, weight))
        torch.testing.assert_close(traced(x + 1, weight), kernels.convolve(x + 1, weight))

    def test_second_derivatives_are_refused(self):
        _, inputs = make(1, 3, 4, torch.float32)
        for y in (kernels.scan(*inputs[:7]), kernels.convolve(*inputs[7:])):
            with pytest.raises(RuntimeError, match="MAMBAVISION_SCAN=torch"):
                torch.autograd.grad(y.sum(), inputs[0] if y.shape == inputs[0].shape else inputs[7], create_graph=True)

    def test_runs_on_the_cpu(self):
        assert kernels.runs_on(torch.device("cpu")) and not kernels.runs_on(torch.device("meta"))


# ---------------------------------------------------------------------------------------------------------------------
# Without the interpreter: the choice, what the loader sees, and compiled code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreter_process():
    """Runs TestInterpreted beside the other tests of this file."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("interpreter_process")
class TestChoice:
    __test__ = not INTERPRETED

    def test_covers_every_step_and_channel_once(self):
        assert kernels._INTERVAL % kernels._STEPS == 0
        sizes = ((1, 2, 7, 64, 128, 4096), (1, 7, 49, 196, 500, 1024, 12544), (20, 160, 392), (16, 132))
        for batch, length, channels, processors in itertools.product(*sizes):
            block, blocks, chunk, chunks = kernels.plan(batch, length, channels, processors)
            assert (blocks - 1) * block < channels <= blocks * block
            assert (chunks - 1) * chunk < length <= chunks * chunk
            assert chunks == 1 or chunk % kernels._INTERVAL == 0
            assert chunks == 1 or batch * blocks * chunks <= 8 * processors  # _walk_options counts on it

    def test_sequences_that_fill_the_device_stay_whole(self):
        assert kernels.plan(128, 196, 160, 132).chunks == 1
        assert kernels.plan(128, 12544, 160, 132).chunks == 1

    def test_short_sequences_stay_whole(self):
        assert kernels.plan(1, 49, 160, 132).chunks == 1
        assert kernels.plan(1, 196, 160, 132).chunks == 1

    @pytest.mark.parametrize("length", [1024, 4096, 12544])
    def test_few_long_sequences_are_cut(self, length):
        _, blocks, chunk, chunks = kernels.plan(1, length, 160, 132)
        assert blocks * chunks >= 0.5 * 132
        assert chunk >= 64
        smaller_device = kernels.plan(1, length, 160, 4)
        assert smaller_device.chunks < chunks

    def test_nothing_to_do(self):
        assert kernels.plan(0, 0, 160, 132).chunks == 0

    def test_does_not_run_on_the_cpu(self):
        assert not kernels.runs_on(torch.device("cpu"))

    @pytest.mark.skipif(bool(torch.version.hip), reason="ROCm's devices are all tried")
    def test_which_gpus(self, monkeypatch):
        for capability, runs in (((6, 1), False), ((7, 0), True), ((7, 5), True), ((12, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, its=capability: its)
            assert kernels.runs_on(torch.device("cuda")) == runs


class Onlooker(TorchDispatchMode):
    """A mode that is told of every operator, and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_images_in_the_ordinary_way(monkeypatch):
    """What the kernel would compute wrongly, and where somebody records or looks on."""
    taken = []
    monkeypatch.setattr(fusion_mambavision, "convolve_images", lambda *args: taken.append(args[3:]) or args[0])

    def takes(x=None, conv=None, norm=None, activation=None):
        taken.clear()
        given = (torch.randn(2, 3, 8, 6).bfloat16() if x is None else x, conv or STEM[0], norm or STEM[1])
        return fusion_mambavision._convolve_images(*given, activation or nn.ReLU()) is not None

    def conv(*args, **settings):
        return nn.Conv2d(*args, **{"dtype": torch.bfloat16, "stride": 2, "padding": 1, "bias": False, **settings})

    assert takes() and taken == [("relu", torch.bfloat16)]
    assert fusion_mambavision.image_convolution(torch.zeros(1, 3, 8, 8).bfloat16(), *STEM, None) is None  # on a CPU
    x = torch.randn(2, 3, 8, 6)
    assert not takes(x) and not takes(x.half()) and not takes(x.double())
    assert not takes(x[0].bfloat16()) and not takes(x[:0].bfloat16()) and not takes(x[:, :2].bfloat16())
    assert not takes(torch.zeros(1, 1).bfloat16().expand(2**31, 1)[:, :, None, None].expand(-1, 3, 1, 1))
    for wrong in (
        conv(3, 8, 5), conv(3, 8, 3, padding=0), conv(3, 8, 3, stride=1), conv(3, 8, 3, dilation=2),
        conv(3, 9, 3, groups=3), conv(3, 65, 3), conv(3, 8, 3, padding_mode="reflect"), conv(3, 8, 3, device="meta"),
    ):  # fmt: skip
        assert not takes(conv=wrong, norm=nn.BatchNorm2d(wrong.out_channels).eval())
    assert takes(torch.randn(2, 7, 8, 6).bfloat16(), conv(7, 8, 3))
    assert not takes(torch.randn(2, 8, 8, 6).bfloat16(), conv(8, 8, 3))
    assert not takes(norm=nn.BatchNorm2d(8)) and not takes(norm=nn.Identity()) and not takes(activation=nn.SiLU())
    hooked = copy.deepcopy(STEM[0])
    hooked.register_forward_hook(lambda *_: None)
    assert not takes(conv=hooked)
    with torch.autocast("cpu", torch.float16):
        assert takes() and takes(x) and takes(x, conv(3, 8, 3, dtype=None)) and taken == [("relu", torch.float16)]
        assert not takes(x.double())
    with torch.enable_grad():
        assert not takes()
    with Onlooker():
        assert not takes()
    torch.func.vmap(lambda x: [x, takes(x) and pytest.fail("transformed")][0])(x[None].bfloat16())
    monkeypatch.setattr(fusion_mambavision, "_is_on_gpu", lambda x: True)
    for capability, backend, runs in (((7, 5), "triton", False), ((8, 0), "torch", False), ((8, 0), "triton", True)):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, its=capability: its)
        monkeypatch.setattr(fusion_mambavision, "backend_on", lambda device, its=backend: its)
        y = fusion_mambavision.image_convolution(torch.zeros(1, 3, 8, 8).bfloat16(), *STEM, None)
        assert (y is not None) == runs
    fused = fusion_mambavision.FusedConv2d(STEM[0], nn.ReLU())
    assert takes(conv=fused, norm=nn.Identity(), activation=nn.Identity()) and not takes(conv=fused)
    fused.register_forward_hook(lambda *_: None)
    assert not takes(conv=fused, norm=nn.Identity(), activation=nn.Identity())


@torch.no_grad()
def test_what_follows_a_convolution_in_the_ordinary_way():
    """What the kernel would read wrongly, and where somebody records or looks on."""
    can = fusion_mambavision._can_finish
    x, conv, norm = torch.randn(2, 4, 7, 5), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6).eval()
    assert can(x, conv, norm) and can(x, conv, None)
    assert not can(x[0], conv, None) and not can(x[:0], conv, norm) and not can(x.double(), conv, norm)
    assert not can(x, conv, nn.BatchNorm2d(3).eval()) and not can(x, conv, nn.BatchNorm2d(6))
    assert not can(x, nn.Conv2d(4, 6, 3, padding="same"), norm)
    with torch.enable_grad():
        assert not can(x, conv, norm)
    with FlopCounterMode(display=False):
        assert not can(x, conv, norm)
    with torch.device("cpu"):
        assert can(x, conv, norm)
    torch.func.vmap(lambda x: [x, can(x, conv, norm) and pytest.fail("transformed")][0])(x[None])
    sparse, single = torch.randn(12)[::2], torch.randn(1).expand(6)
    for vector in (sparse, single, torch.randn(6, device="meta")):
        for module, name in (
            (conv, "bias"),
            (norm, "running_mean"),
            (norm, "running_var"),
            (norm, "weight"),
            (norm, "bias"),
        ):
            kept = getattr(module, name)
            value = nn.Parameter(vector) if isinstance(kept, nn.Parameter) else vector
            setattr(module, name, value)
            assert not can(x, conv, norm)
            setattr(module, name, kept)
    assert can(x, conv, norm)


def test_alignment():
    whole = torch.empty(2, 5, 24, dtype=torch.bfloat16)  # rows of 48 bytes
    assert kernels._alignment(whole[..., 8:16], whole[..., 16:]) == 16
    assert kernels._alignment(whole[..., 4:12]) == 8
    assert kernels._alignment(whole[..., 8:16], whole[..., 3:11]) == 2
    assert kernels._alignment(torch.empty(2, 5, 19, dtype=torch.bfloat16)[..., 8:16]) == 2
    assert kernels._alignment(torch.empty(2, 5, 19)[..., 8:16]) == 4


class TestLoading:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize("name", ["selective_scan_triton", "fusion_triton", "operators"])
    def test_remote_code_requires_torch_alone(self, name):
        assert set(get_imports(ROOT / f"{name}.py")) <= {"torch", *sys.stdlib_module_names}

    @pytest.mark.parametrize("version", [None, "3.2.0"])
    def test_without_a_triton_that_serves(self, tmp_path, version):
        copy_code(tmp_path / "folder")
        if version:
            (tmp_path / "triton").mkdir()
            (tmp_path / "triton" / "__init__.py").write_text(f"__version__ = '{version}'\n")
            (tmp_path / "triton" / "language.py").touch()
        code = """
import importlib, sys
import torch  # with the real triton
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
if sys.argv[1] == "None":
    sys.modules["triton"] = None
sys.path.insert(0, sys.argv[2])
try:
    importlib.import_module("folder.selective_scan_triton")
except ImportError as error:
    print(error)
"""
        done = run_python(code, version, tmp_path)
        expected = "needs triton 3.3 or newer, got 3.2.0" if version else "needs triton: pip install triton"
        assert expected in done.stdout and "backend='torch'" in done.stdout

    def test_two_copies_live_side_by_side(self, tmp_path, monkeypatch):
        """As when two model folders are loaded, each with its own copy of the code."""
        copy_code(tmp_path / "another_folder")
        monkeypatch.syspath_prepend(tmp_path)
        other = importlib.import_module("another_folder.selective_scan_triton")
        names = [module._scan.operator._qualname for module in (kernels, other)]
        assert names[0] != names[1] and all(name.endswith("::scan") and name.isascii() for name in names)


# What the compiler is told of each kernel: which arguments point to what. The rest are integers.
INPUTS = ("u", "dt", "B", "C", "dt_bias", "x", "y", "W", "z", "weight", "grad_y", "grad_u", "grad_dt", "grad_x")
INPUTS += ("offset", "mean", "variance", "bias", "filters")
EXACT = ("starts", "ends", "totals", "grad_weights", "grad_parameters", "grad_weight", "A", "D")
FINISH = {"HAS_OFFSET": True, "HAS_NORM": True, "HAS_BIAS": True}
SCAN = {"STATES": 8, "BLOCK": kernels._LANES, "STEPS": kernels._STEPS}
VARIANTS = [
    *(
        ("_scan_kernel", {**SCAN, "INTERVAL": kernels._INTERVAL, "CHUNKED": c, "SAVE": s})
        for c in (0, 1)
        for s in (0, 1)
    ),
    *(("_scan_backward_kernel", {**SCAN, "INTERVAL": kernels._INTERVAL, "UNIT": u}) for u in (1, 2)),
    *(("_chunk_ends_kernel", {**SCAN, "STEPS": kernels._INTERVAL, "BACKWARD": b}) for b in (0, 1)),
    ("_convolve_kernel", {name: kernels._TILE[name] for name in ("STEPS", "BLOCK")}),
    ("_convolve_backward_kernel", {name: kernels._BACKWARD_TILE[name] for name in ("STEPS", "BLOCK")}),
    *(
        ("_finish_kernel", {**FINISH, "WIDTH": width, **fusion_triton._tile(width), "ACTIVATION": activation})
        for width, activation in itertools.product((80, 160, 196), ACTIVATIONS)
    ),
]
IMAGES = [  # for GPUs with matrix units for both half precisions
    ("_convolve_images_kernel", {**FINISH, **fusion_triton._image_tile(*shape), "ACTIVATION": "relu"})
    for shape in ((3, 32), (3, 64), (1, 16), (7, 64))
]


def compile_for(arch, name, constants, inputs, exact="fp32", integers="i32", align=None, row=36):
    """A kernel compiled for compute capability `arch`; its registers and bytes of stack (what registers spill to)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_fusion = name in ("_finish_kernel", "_convolve_images_kernel")
    kernel = getattr(fusion_triton if is_fusion else kernels, name)
    if "COMPUTE" in kernel.arg_names:
        constants = {**constants, "COMPUTE": triton.language.float64 if exact == "fp64" else triton.language.float32}
    if "ALIGN" in kernel.arg_names:
        constants["ALIGN"] = align or 16
    types = {n: f"*{inputs}" if n in INPUTS else f"*{exact}" if n in EXACT else integers for n in kernel.arg_names}
    types["eps"] = "fp32"
    steps = {"u_step": 160, "dt_step": 160, "x_step": 160, "y_step": 320, "grad_y_step": 320}
    steps |= dict.fromkeys(("B_step", "C_step", "W_step"), row)  # by default as in T's third stage
    constants |= {p.name: steps[p.name] for p in kernel.params if p.is_constexpr and p.name in steps}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    positions = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    known = (*EXACT, "y", "grad_u", *(("x",) if is_fusion else ()))
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in known}
    source = ASTSource(kernel, signature, constexprs=positions, attrs=aligned)
    options = fusion_triton._OPTIONS if name == "_finish_kernel" else kernels._OPTIONS
    options = fusion_triton._IMAGE_OPTIONS if name == "_convolve_images_kernel" else options
    if name in ("_scan_kernel", "_chunk_ends_kernel"):
        options = kernels._walk_options(constants["STATES"], chunks=2 if constants.get("CHUNKED", 1) else 1)
    if name in ("_convolve_kernel", "_convolve_backward_kernel"):
        options = {**options, "num_warps": kernels._TILE["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, folder):
    """Registers of a thread, and bytes of its stack: what did not fit."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()))


def shortest_wait(compiled, folder):
    """In the longest loop, how many instructions pass at least between a load and the first that needs its number."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    listing = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout
    instructions, labels, loop = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            target = re.search(r"BRA.*(\.L_x_\d+)", instruction[1])
            if target and len(body := instructions[labels.get(target[1], len(instructions)) :]) > len(loop):
                loop = body
    waits = []
    for place, instruction in enumerate(loop):
        if load := re.match(r"(?:@!?U?P\d+ )?LDG\.E(\S*) R(\d+),", instruction):
            size = {".64": 2, ".128": 4}.get(re.sub(r"\.U16|\.CONSTANT", "", load[1]), 1)
            registers = "|".join(str(int(load[2]) + i) for i in range(size))
            later = [*loop[place + 1 :], *loop[:place]]
            waits.append(next(i for i, other in enumerate(later, 1) if re.search(rf"\bR({registers})\b", other)))
    return min(waits)


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    @pytest.mark.parametrize("arch", [80, 90])
    @pytest.mark.parametrize(("name", "constants"), VARIANTS + IMAGES, ids=lambda x: x if isinstance(x, str) else "")
    def test_every_kernel_compiles(self, tmp_path, arch, name, constants):
        flags = {key: value for key, value in constants.items() if key in ("CHUNKED", "SAVE", "BACKWARD", "UNIT")}
        for inputs in ("bf16", "fp16" if (name, constants) in IMAGES else "fp32"):
            compiled = compile_for(arch, name, constants, inputs)
            registers, stack = resources(compiled, tmp_path)
            print(f"sm_{arch} {name} {flags} {inputs}: {registers} registers, {stack} bytes spilled")
            assert stack == 0
            if name == "_scan_kernel" and not constants["CHUNKED"]:
                assert 12 * 32 * registers <= 65536  # three warps on each of a multiprocessor's four schedulers
            assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])  # their order would change the last digits
            if name in ("_scan_kernel", "_chunk_ends_kernel"):
                # for two warps in turns 160 instructions, some of which take two cycles; the L2 cache takes 250 cycles
                assert shortest_wait(compiled, tmp_path) > 80

    @pytest.mark.parametrize(("name", "constants"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "")
    def test_every_kernel_compiles_for_older_gpus(self, tmp_path, name, constants):
        """V100 (7.0); T4 and RTX 20 (7.5), which have no instructions for bfloat16 either."""
        for arch, inputs in ((70, "fp16"), (75, "bf16"), (75, "fp32")):
            compiled = compile_for(arch, name, constants, inputs)
            _, stack = resources(compiled, tmp_path)
            assert stack == 0 or arch == 70  # a few registers of the scan spill there
            assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])

    @pytest.mark.parametrize("integers", ["i32", "i64"])
    def test_rows_that_no_vector_load_can_read_and_wide_strides(self, tmp_path, integers):
        for name, constants in (VARIANTS[3], VARIANTS[5], VARIANTS[6]):
            compiled = compile_for(90, name, constants, "bf16", integers=integers, align=2)
            assert "ld.global" in compiled.asm["ptx"]

    def test_images_are_read_along_their_rows(self):
        """Lanes of a warp take pixels side by side, and write all of a pixel's channels at once."""
        compiled = compile_for(90, *IMAGES[0], "bf16")
        loads = re.search(
            rf"tt\.load .*tensor<{32 * fusion_triton._PIXELS}x!tt\.ptr<bf16>, (#\w+)>", compiled.asm["ttgir"]
        )
        layout = re.search(rf"^{loads[1]} = .*", compiled.asm["ttgir"], re.MULTILINE)[0]
        assert "sizePerThread = [1], threadsPerWarp = [32]" in layout
        assert "mma" in compiled.asm["ptx"] and "st.global.v4.b32" in compiled.asm["ptx"]

    def test_aligned_rows_are_read_by_vector_loads(self):
        loads = [
            len(re.findall(r"ld\.global", compile_for(90, *VARIANTS[0], "bf16", align=align, row=row).asm["ptx"]))
            for align, row in ((2, 56), (16, 56), (8, 36))
        ]
        rows = 2 * (2 * kernels._STEPS + 1)  # of B and C: before the loop, in it, and in the loop over what is left
        assert loads[0] - loads[1] == 7 * rows  # one load for a row instead of eight
        assert loads[0] - loads[2] == 6 * rows  # two where rows begin at multiples of 8 bytes

    def test_the_number_of_channels_is_nothing_to_compile_for(self):
        """Known as a multiple of 16, as the models' are, it spreads a channel's states over many lanes."""
        for name in ("_scan_kernel", "_chunk_ends_kernel", "_scan_backward_kernel"):
            (channels,) = (p for p in getattr(kernels, name).params if p.name == "channels")
            assert channels.do_not_specialize and not channels.is_constexpr

    def test_double_precision_compiles(self):
        for name, constants in (VARIANTS[3], VARIANTS[5], VARIANTS[10]):
            compile_for(90, name, constants, "fp64", exact="fp64")


class Launches:
    """A driver of Triton's for a GPU that is not there: kernels are compiled for it, and their launches noted."""

    class utils:
        @staticmethod
        def load_binary(name, binary, *_):
            # handles of the module and of the function, registers, spills; from Triton 3.4 on, threads
            loaded = (0, hash((name, binary)), 32, 0, 1024)
            return loaded if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 3) else loaded[:4]

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448}

        @staticmethod
        def unload_module(module):
            pass

    devices = itertools.count(99)

    def __init__(self):
        self.noted = []
        self.limits = []  # of registers, launch by launch
        self.device = next(self.devices)  # by which Triton keeps kernels, and what launches them

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
            given = [(a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in arguments]
            self.noted.append(((x, y, z), function, given))
            self.limits.append(metadata.maxnreg)

        return launch

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class TestLaunched:
    """A kernel's second launch, which goes past Triton's own, is the same as its first."""

    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def launches(self, monkeypatch):
        launches = Launches()
        driver = triton.runtime.driver
        monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", launches)
        monkeypatch.setattr(kernels, "_launched", {})
        return launches

    @staticmethod
    def noted_twice(launches, monkeypatch, run):
        """What two runs launch, the second of which must not ask Triton for a kernel."""
        noted = []
        for is_second in (False, True):
            launches.noted.clear()
            with monkeypatch.context() as patch:
                if is_second:
                    patch.delattr(triton.JITFunction, "run")
                run()
            noted.append(list(launches.noted))
        return noted

    @pytest.mark.parametrize("chunk", [None, 64])
    def test_scan(self, launches, monkeypatch, chunk):
        divided(monkeypatch, chunk=chunk)
        leaves, inputs = make(2, 130, 32, torch.bfloat16)
        first, second = self.noted_twice(
            launches, monkeypatch, lambda: torch.autograd.grad(kernels.scan_concat(*inputs).sum(), leaves)
        )
        assert first == second and len(first) == (4 if chunk is None else 6)

    @pytest.mark.parametrize(("chunk", "states", "limits"), [(None, 8, [168]), (64, 8, [255, 255]), (None, 16, [255])])
    def test_registers(self, launches, monkeypatch, chunk, states, limits):
        divided(monkeypatch, chunk=chunk)
        _, inputs = make(2, 130, 32, torch.float32, states=states)
        with torch.no_grad():
            kernels.scan(*inputs[:7])
        assert launches.limits == limits

    def test_scan_with_and_without_gradients(self, launches):
        _, inputs = make(2, 9, 32, torch.float32)
        functions = []
        for needed in (True, False, True, False):
            launches.noted.clear()
            with torch.set_grad_enabled(needed):
                kernels.scan(*inputs[:7])
            functions += [function for _, function, _ in launches.noted]
        assert functions[:2] == functions[2:] and functions[0] != functions[1]

    def test_images(self, launches, monkeypatch):
        conv, norm = STEM
        for x in (torch.zeros(2, 3, 9, 8).bfloat16(), torch.zeros(2, 3, 9, 9)):
            first, second = self.noted_twice(
                launches,
                monkeypatch,
                lambda x=x: fusion_triton.convolve_images(x, conv, norm, "relu", torch.bfloat16),
            )
            assert first == second and len(first) == 1

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_finish(self, launches, monkeypatch, activation):
        x = torch.zeros(2, 32, 5, 5).contiguous(memory_format=torch.channels_last)
        norm = nn.BatchNorm2d(32).eval().requires_grad_(False)
        for inputs in ((torch.zeros(32), norm), (None, norm), (torch.zeros(32), None)):
            first, second = self.noted_twice(
                launches, monkeypatch, lambda inputs=inputs: fusion_triton.finish(x, *inputs, activation)
            )
            assert first == second and len(first) == 1

    def test_whatever_triton_distinguishes(self, launches):
        """Of inputs in all orders, each launches what it would launch alone."""
        x = torch.zeros(4000)

        def views(offset, batch, length, width, step):
            size = (batch, length, width)
            return x[offset:].as_strided(size, (length * step, step, 1)), torch.zeros(width, 1, 3)

        cases = [
            views(0, 2, 9, 32, 32),
            views(1, 2, 9, 32, 32),  # no vector loads
            views(0, 2, 9, 32, 33),  # a step of no power of two
            views(0, 2, 9, 31, 32),
            views(0, 2, 9, 1, 32),  # Triton makes a constant of 1
            (views(0, 2, 9, 32, 32)[0], torch.zeros(32, 1, 3).bfloat16()),
            tuple(tensor.bfloat16() for tensor in views(0, 2, 9, 32, 32)),
            tuple(tensor.double() for tensor in views(0, 2, 9, 32, 32)),
        ]
        alone = []
        for case in cases:
            kernels._launched.clear()
            launches.noted.clear()
            kernels.convolve(*case)
            alone += launches.noted
        # two may be the same code, which loads number by number
        assert len({function for _, function, _ in alone}) >= len(cases) - 1
        for _ in range(2):
            launches.noted.clear()
            for case in cases:
                kernels.convolve(*case)
            assert launches.noted == alone

    def test_not_kept_on_rocm(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.0")
        kernels.convolve(torch.zeros(1, 9, 32), torch.zeros(32, 1, 3))
        assert not kernels._launched

    def test_not_kept_without_end(self, launches, monkeypatch):
        monkeypatch.setattr(kernels, "_MOST_LAUNCHED", 3)
        for length in range(1, 9):
            kernels.convolve(torch.zeros(1, length, 32), torch.zeros(32, 1, 3))
            assert 1 <= len(kernels._launched) <= 3
        assert len(launches.noted) == 8


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a ROCm device, or a CUDA device of compute capability 7.0")
class TestOnGpu:
    __test__ = not INTERPRETED

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("chunk", [None, 64])
    @pytest.mark.parametrize("shape", [(3, 1, 20), (3, 7, 40), (5, 49, 320), (3, 196, 160), (1, 500, 392)])
    def test_forward_and_gradients(self, monkeypatch, shape, chunk, dtype):
        divided(monkeypatch, chunk=chunk)
        check(*shape, dtype, device="cuda")

    @pytest.mark.parametrize("chunk", [None, 64])
    def test_long_steps_and_fast_decay(self, monkeypatch, chunk):
        divided(monkeypatch, chunk=chunk)
        check(3, 500, 40, torch.float32, longest_step=20.0, fastest_decay=64.0, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_what_follows_a_convolution(self, activation, dtype):
        for width, parts in itertools.product((20, 32, 80, 160, 196), ("both", "norm", "offset")):
            check_finish((3, width, 57, 31), dtype, activation, parts, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_images(self, dtype):
        for parts, activation in itertools.product(("both", "norm", "offset"), ACTIVATIONS):
            check_images((2, 3, 70, 101), 32, dtype, activation, parts, device="cuda")
        for shape, filters in (((1, 3, 1, 1), 64), ((2, 1, 9, 2), 5), ((1, 7, 8, 11), 32), ((3, 4, 1, 16), 48)):
            check_images(shape, filters, dtype, device="cuda")
        check_images((2, 3, 224, 224), 64, dtype, strides=torch.channels_last, device="cuda")
        check_images((2, 3, 224, 224), 32, dtype, given=torch.float32, device="cuda")

    @torch.no_grad()
    def test_a_model_takes_images_as_they_lie(self):
        """In half precision and under autocast, as it is and fused; and what is written anew where it is compiled."""
        config = MambaVisionConfig(dim=16, in_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_labels=4)
        model = modeling.MambaVisionModelForImageClassification(config).eval().cuda()
        x = torch.randn(2, 3, 70, 90, device="cuda")
        expected = model(x).logits.double().cpu()
        for half in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().fuse()):
            stem = list(half.model.patch_embed.conv_down)
            assert fusion_mambavision.image_convolution(x.bfloat16(), *stem[:3]) is not None
            assert error(half(x.bfloat16()).logits, expected) < 0.02
        with torch.autocast("cuda", torch.float16):
            assert error(model(x).logits, expected) < 0.01
        half, tokens = copy.deepcopy(model).bfloat16().model, torch.randn(2, 9, 64, device="cuda")
        pairs = (
            (model.model.patch_embed, half.patch_embed, x),
            (model.model.levels[0].blocks[0], half.levels[0].blocks[0], torch.randn(2, 16, 9, 8, device="cuda")),
            (model.model.levels[2].blocks[0].mlp, half.levels[2].blocks[0].mlp, tokens),
        )
        for layer, its_half, inputs in pairs:
            compiled = torch.compile(its_half, fullgraph=True)
            assert error(compiled(inputs.bfloat16()), layer(inputs).double().cpu()) < 0.02

    @pytest.mark.parametrize("shape", [(64, 196, 160), (1, 4096, 160)])
    def test_twice_gives_the_same_bits(self, shape):
        leaves, inputs = make(*shape, torch.bfloat16, device="cuda")
        results = []
        for _ in range(2):
            out = kernels.scan_concat(*inputs)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_compiles_to_one_graph(self):
        def loss(*inputs):
            return kernels.scan_concat(kernels.convolve(inputs[0], inputs[8]), *inputs[1:]).float().square().mean()

        leaves, inputs = make(2, 49, 40, torch.float32, device="cuda")
        expected = torch.autograd.grad(loss(*inputs), leaves)
        compiled = torch.compile(loss, fullgraph=True)
        for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_maps_of_more_than_32_bits_of_elements(self):
        shape = (1, 16, 2**14, 2**13 + 1)
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last).zero_()
        assert x.numel() > 2**31
        y = fusion_triton.finish(x, torch.ones(16, device="cuda"), None, "none")
        assert y.min() == y.max() == 1

    def test_images_of_more_than_32_bits_of_elements(self):
        image = torch.randn(1, 3, 500, 500, device="cuda").bfloat16()
        x = image.expand(2900, -1, -1, -1).contiguous()
        assert x.numel() > 2**31
        conv, norm = (layer.to("cuda") for layer in copy.deepcopy(STEM))
        with torch.no_grad():
            y, expected = (fusion_triton.convolve_images(z, conv, norm, "relu", torch.bfloat16) for z in (x, image))
        assert torch.equal(y[0], expected[0]) and torch.equal(y[-1], expected[0])

    def test_more_than_32_bits_of_elements(self):
        if torch.cuda.get_device_properties(0).total_memory < 70e9:
            pytest.skip("needs a GPU of 70 GB")
        batch, length, channels = 1100, 12544, 160
        assert batch * length * channels > 2**31
        _, inputs = make(1, length, channels, torch.bfloat16, device="cuda", width=0)
        u, dt, A, B, C, D, dt_bias = (x.detach() for x in inputs[:7])
        repeated = [x.repeat(batch, 1, 1).requires_grad_() for x in (u, dt, B, C)]
        y = kernels.scan(repeated[0], repeated[1], A, repeated[2], repeated[3], D, dt_bias)
        assert torch.equal(y[0], y[-1]) and torch.equal(y[0], y[batch // 2])
        for grad in torch.autograd.grad(y, repeated, torch.ones_like(y)):
            assert torch.equal(grad[0], grad[-1]) and torch.equal(grad[0], grad[batch // 2])


# ---------------------------------------------------------------------------------------------------------------------


class TestInItsOwnProcess:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self, interpreter_process):
        skip_where_tritons_interpreter_is_broken()
        output, _ = interpreter_process.communicate(timeout=900)
        assert interpreter_process.returncode == 0, output[-5000:]
        assert re.search(r"\d+ passed", output) and "skipped" not in output, output[-5000:]
