"""The choice between the scan's backends, and mamba_ssm's, with stand-ins for what this machine need not have."""

import copy
import importlib.util
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python, skip_where_tritons_interpreter_is_broken
from repository import selective_scan as scan_module
from repository.modeling_mambavision import MambaVisionMixer, MambaVisionModel, MambaVisionModelForImageClassification
from repository.selective_scan import (
    backend_on,
    choose_backend,
    infer_scan_,
    selective_scan,
    selective_scan_reference,
    silu_convolve,
)
from torch._subclasses.fake_tensor import FakeTensorMode


CPU = torch.device("cpu")
GPU = (
    torch.cuda.is_available()
    and scan_module._triton_missing is None
    and scan_module._triton_runs_on(torch.device("cuda"))
)


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing remembered of other tests."""
    scan_module._failure.cache_clear()
    yield
    scan_module._failure.cache_clear()


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(3, 7, 6), (3, 7, 6), (6, 8), (3, 7, 8), (3, 7, 8), (6,), (6,)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[2] = -tensors[2].float().exp()
    return [x.requires_grad_() for x in tensors]


def test_transforms_take_no_kernel(monkeypatch):
    """The kernels know nothing of torch.func's."""

    def refuse(*_):
        raise AssertionError("a kernel")

    monkeypatch.setattr(scan_module, "backend_on", lambda *_: "triton")
    for name in ("_triton_scan", "_triton_scan_concat", "_triton_convolve"):
        monkeypatch.setattr(scan_module, name, refuse, raising=False)
    mixer = MambaVisionMixer(16).requires_grad_(False)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="a kernel"):
        mixer(x)
    gradient = torch.func.grad(lambda x: mixer(x).sum())(x)
    monkeypatch.undo()
    (expected,) = torch.autograd.grad(mixer(x.requires_grad_()).sum(), x)
    assert (gradient - expected).abs().max() < 1e-5 * expected.std()


class TestChoice:
    def test_auto(self):
        assert choose_backend("auto", "cuda", lambda name: None) == "triton"
        assert choose_backend("auto", "cuda", lambda name: "no compiler") == "torch"
        # off CUDA nothing is tried
        assert choose_backend("auto", "cpu", None) == choose_backend("auto", "meta", None) == "torch"

    def test_by_name(self):
        for name in ("triton", "mamba_ssm"):
            assert choose_backend(name, "cuda", lambda name: None) == name
            with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run on cuda: no compiler"):
                choose_backend(name, "cuda", lambda name: "no compiler")
        assert choose_backend("torch", "cuda", None) == "torch"
        with pytest.raises(ValueError, match=r"backend='fast'.*auto, torch, triton, mamba_ssm"):
            choose_backend("fast", "cuda", None)

    def test_environment(self, monkeypatch):
        assert backend_on(CPU) == "torch"
        monkeypatch.setenv("MAMBAVISION_SCAN", "mamba_ssm")
        for scan in (selective_scan, infer_scan_):
            with pytest.raises(RuntimeError, match="mamba_ssm needs a CUDA device"):
                scan(*inputs())
        assert backend_on(CPU, "torch") == "torch"
        monkeypatch.setenv("MAMBAVISION_SCAN", "")
        assert backend_on(CPU) == "torch"

    def test_triton_is_tried_twice(self, monkeypatch):
        """A kernel's second launch goes another way than its first."""
        reasons = iter([None, "the second launch failed"])
        monkeypatch.setattr(scan_module, "_triton_missing", None)
        monkeypatch.setattr(scan_module, "_triton_runs_on", lambda device: True, raising=False)
        monkeypatch.setattr(scan_module, "_triton_scan", None, raising=False)
        monkeypatch.setattr(scan_module, "_scan_difference", lambda scan, device: next(reasons))
        assert scan_module._triton_failure(CPU) == "the second launch failed"

    def test_what_cannot_run_is_said_once(self, caplog):
        with caplog.at_level(logging.INFO, logger=scan_module.__name__):
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"compute capability|needs triton"):
                    selective_scan(*inputs(), backend="triton")
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_a_lack_of_memory_is_no_verdict(self, monkeypatch):
        """A program that catches it, halves its batch and comes again gets the backend that it had asked for."""
        monkeypatch.setattr(scan_module, "_triton_missing", None)
        monkeypatch.setattr(scan_module, "_triton_runs_on", lambda device: True, raising=False)

        def lacks(*inputs):
            raise torch.cuda.OutOfMemoryError("out of memory")

        monkeypatch.setattr(scan_module, "_triton_scan", lacks, raising=False)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            selective_scan(*inputs(), backend="triton")
        monkeypatch.setattr(scan_module, "_triton_scan", scan_module._torch_scan)
        assert backend_on(CPU, "triton") == "triton"

    def test_the_callers_modes_are_not_those_of_the_probe(self, monkeypatch):
        """Fake tensors have no numbers to judge a backend by, and the verdict holds for the whole process."""

        def probe(device):
            is_right = torch.ones(1, device=device).item() == 1 and not torch.is_inference_mode_enabled()
            return None if is_right else "off"

        monkeypatch.setitem(scan_module._PROBES, "mamba_ssm", probe)
        with FakeTensorMode(), torch.inference_mode():
            assert backend_on(CPU, "mamba_ssm") == "mamba_ssm"

    def test_compiled_code_knows_the_choice(self):
        """One graph, and no probe in it."""
        compiled = torch.compile(lambda *x: selective_scan(*x), backend="eager", fullgraph=True)
        tensors = inputs()
        torch.testing.assert_close(compiled(*tensors), selective_scan(*tensors))

    def test_triton_where_it_runs(self):
        """In Triton's interpreter, which has to be switched on before triton is imported."""
        skip_where_tritons_interpreter_is_broken()
        code = """
import sys, types, torch
package = types.ModuleType("repository"); package.__path__ = [sys.argv[1]]; sys.modules["repository"] = package
from repository import selective_scan as scan
x = torch.randn(2, 5, 4)
inputs = x, x, -torch.rand(4, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(4), torch.randn(4)
compiled = torch.compile(lambda *x: scan.selective_scan(*x, backend="triton"), backend="eager", fullgraph=True)
expected = scan.selective_scan(*inputs, backend="torch")
torch.testing.assert_close(compiled(*inputs), expected)
torch.testing.assert_close(scan.selective_scan(*inputs, backend="triton"), expected)
scan._failure.cache_clear()
scan._triton_scan = lambda *inputs: scan._torch_scan(*inputs) + 0.1
print(scan.backend_on(torch.device("cpu")), scan._failure("triton", torch.device("cpu")))
"""
        done = run_python(code, scan_module.__file__.rsplit("/", 1)[0], TRITON_INTERPRET="1")
        assert done.stdout.startswith("torch its result on a small input is off by 0.1")


class TestMambaSsm:
    @pytest.fixture
    def stand_in(self, monkeypatch):
        """A module with mamba_ssm's interface, on any device; keywords only, so that no position can be mistaken."""
        calls = []

        def selective_scan_fn(*, u, delta, A, B, C, D, delta_bias, delta_softplus, z=None, return_last_state=False):
            assert u.shape == delta.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
            assert u.dtype == delta.dtype == B.dtype == C.dtype != torch.float64
            assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
            assert delta_softplus and z is None and not return_last_state
            calls.append(u.shape)
            u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
            return selective_scan_reference(u, delta, A, B, C, D, delta_bias).transpose(1, 2)

        interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
        interface.selective_scan_fn = selective_scan_fn
        monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
        monkeypatch.setitem(
            scan_module._PROBES,
            "mamba_ssm",
            lambda device: scan_module._scan_difference(scan_module._mamba_ssm_scan, device),
        )
        interface.calls = calls
        return interface

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gives_the_same(self, stand_in, dtype):
        tensors = inputs(dtype)
        expected = selective_scan(*tensors, backend="torch")
        value = selective_scan(*tensors, backend="mamba_ssm")
        assert value.dtype == dtype
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(value, expected, **tolerance)
        for ours, theirs in zip(
            torch.autograd.grad(value.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)

    def test_is_tried_once(self, stand_in):
        for _ in range(3):
            selective_scan(*inputs(), backend="mamba_ssm")
        assert len(stand_in.calls) == 1 + 3

    def test_installed_without_its_extension(self, stand_in, monkeypatch):
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
        with pytest.raises(RuntimeError, match=r"mamba_ssm.*selective_scan_cuda.*pip install mamba-ssm"):
            selective_scan(*inputs(), backend="mamba_ssm")

    def test_that_raises(self, stand_in):
        def broken(**kwargs):
            raise AttributeError("'NoneType' object has no attribute 'fwd'")

        stand_in.selective_scan_fn = broken
        with pytest.raises(RuntimeError, match="AttributeError: 'NoneType' object has no attribute 'fwd'"):
            selective_scan(*inputs(), backend="mamba_ssm")

    def test_that_is_wrong(self, stand_in):
        right = stand_in.selective_scan_fn
        stand_in.selective_scan_fn = lambda **kwargs: right(**{**kwargs, "D": 2 * kwargs["D"]})
        with pytest.raises(RuntimeError, match="its result on a small input is off by"):
            selective_scan(*inputs(), backend="mamba_ssm")

    def test_takes_no_float64(self, stand_in):
        tensors = [x.detach().double() for x in inputs()]
        with pytest.raises(TypeError, match="no float64"):
            selective_scan(*tensors, backend="mamba_ssm")

    def test_needs_a_cuda_device(self):
        with pytest.raises(RuntimeError, match="mamba_ssm needs a CUDA device"):
            selective_scan(*inputs(), backend="mamba_ssm")


class TestCausalConv1d:
    """The mixer's convolutions where the backend is mamba_ssm."""

    @pytest.fixture
    def stand_in(self, monkeypatch):
        def causal_conv1d_fn(*, x, weight, bias, activation):
            assert x.stride(2) == 1 and weight.shape == (x.shape[1], 3) and weight.dtype == x.dtype
            assert bias is None and activation == "silu"
            calls.append(x.shape)
            x = F.pad(x, (2, 0))
            return F.silu(F.conv1d(x, weight.unsqueeze(1), groups=len(weight)))

        package, calls = types.ModuleType("causal_conv1d"), []
        package.causal_conv1d_fn, package.calls = causal_conv1d_fn, calls
        monkeypatch.setitem(sys.modules, "causal_conv1d", package)
        monkeypatch.setattr(scan_module, "backend_on", lambda device: "mamba_ssm")
        monkeypatch.setitem(
            scan_module._PROBES,
            "causal_conv1d",
            lambda device: scan_module._convolution_difference(scan_module._causal_conv1d, device),
        )
        return package

    def test_gives_the_same(self, stand_in):
        x = torch.randn(2, 7, 10)[:, :, 3:].requires_grad_()
        weight = torch.randn(7, 1, 3, requires_grad=True)
        expected = F.silu(F.conv1d(x.transpose(1, 2), weight, padding=1, groups=7)).transpose(1, 2)
        value = silu_convolve(x, weight)
        assert len(stand_in.calls) == 2  # the probe and this
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (value, expected)]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("broken", ["absent", "raises", "wrong"])
    def test_does_without_what_does_not_work(self, stand_in, monkeypatch, broken, caplog):
        if broken == "absent":
            monkeypatch.setitem(sys.modules, "causal_conv1d", None)
        elif broken == "raises":
            stand_in.causal_conv1d_fn = None
        else:
            stand_in.causal_conv1d_fn = lambda x, **_: x
        x, weight = torch.randn(2, 5, 3), torch.randn(3, 1, 3)
        for _ in range(2):
            value = silu_convolve(x, weight)
        torch.testing.assert_close(
            value, F.silu(F.conv1d(x.transpose(1, 2), weight, padding=1, groups=3)).transpose(1, 2)
        )
        assert len(caplog.records) == 1 and "causal_conv1d cannot run on cpu" in caplog.text


def test_a_model_tells_its_backend(small_config, monkeypatch):
    model = MambaVisionModel(small_config)
    assert model.scan_backend == "torch"
    monkeypatch.setenv("MAMBAVISION_SCAN", "triton")
    with pytest.raises(RuntimeError, match="triton"):
        _ = model.scan_backend


def test_an_altered_convolution_is_called():
    """What adapters, hooks and offloading put in the place of the convolutions is not passed by."""
    mixer = MambaVisionMixer(16)
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 9, 16)
    expected = mixer(x)
    for name in ("conv1d_x", "conv1d_z"):
        conv, called = getattr(mixer, name), []
        handle = conv.register_forward_hook(lambda *arguments, called=called: called.append(1))
        torch.testing.assert_close(mixer(x), expected)
        handle.remove()
        setattr(mixer, name, torch.nn.Sequential(conv))
        torch.testing.assert_close(mixer(x), expected)
        setattr(mixer, name, conv)
        assert called == [1]


def test_the_mixer_on_triton():
    """The same values and gradients, with the convolutions as kernels too; in Triton's interpreter."""
    skip_where_tritons_interpreter_is_broken()
    code = """
import os, sys, types, torch
package = types.ModuleType("repository"); package.__path__ = [sys.argv[1]]; sys.modules["repository"] = package
from repository import selective_scan as scan
from repository.modeling_mambavision import MambaVisionMixer, MambaVisionModel
calls, kernel = [], scan._triton_scan_concat
scan._triton_scan_concat = lambda *inputs: (calls.append(1), kernel(*inputs))[1]
torch.manual_seed(0)
mixer = MambaVisionMixer(20).double()
for parameter in mixer.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
x = torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
results = []
for backend in ("torch", "triton"):
    os.environ["MAMBAVISION_SCAN"] = backend
    y = mixer(x)
    results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # A and D pass through float32
with torch.autocast("cpu", torch.bfloat16):
    y = mixer.float()(x.float())
assert y.dtype == torch.bfloat16
assert (y.double() - results[0][0]).norm() < 0.05 * results[0][0].norm()
print(len(calls))
"""
    done = run_python(code, scan_module.__file__.rsplit("/", 1)[0], TRITON_INTERPRET="1")
    assert done.stdout.split() == ["2"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a ROCm device, or a CUDA device of compute capability 7.0")
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def exact(self, monkeypatch):
        """Convolutions in float32: by default they are in TensorFloat32."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    @pytest.fixture
    def models(self, small_config):
        """The same model on the CPU and on the GPU, and images."""
        torch.manual_seed(0)
        model = MambaVisionModelForImageClassification(small_config).eval()
        return model, copy.deepcopy(model).cuda(), torch.randn(3, 3, 70, 100)

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_triton_is_chosen_whatever_torch_may_round(self, precision):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            assert scan_module._failure("triton", torch.device("cuda", 0)) is None
            assert backend_on(torch.device("cuda")) == "triton"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_a_model_gives_what_it_gives_on_a_cpu(self, models):
        on_cpu, on_gpu, images = models
        assert on_gpu.scan_backend == "triton"
        labels, results = torch.tensor([0, 1, 2]), []
        for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
            output = model(images.to(device), labels=labels.to(device))
            output.loss.backward()
            gradients = [parameter.grad.cpu() for parameter in model.parameters()]
            results.append([output.logits.detach().cpu(), output.loss.detach().cpu(), *gradients])
        for expected, ours in zip(*results, strict=True):
            assert (ours - expected).norm() <= 1e-3 * expected.norm() + 1e-6
        with torch.inference_mode():
            fused = on_gpu.fuse()(images.cuda()).logits.cpu()
        assert (fused - results[0][0]).abs().max() < 1e-4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_model_trains_under_autocast(self, models, dtype):
        _, model, images = models
        with torch.autocast("cuda", dtype):
            logits = model(images.cuda()).logits
        assert (logits.float() - model(images.cuda()).logits).norm() < 0.1 * logits.float().norm()
        logits.float().square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_a_model_is_captured_in_a_graph(self, models):
        _, model, images = models
        images = images.cuda()
        with torch.inference_mode():
            expected = model(images).logits
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(images)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(images).logits
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(logits, expected)

    @pytest.mark.skipif(importlib.util.find_spec("selective_scan_cuda") is None, reason="needs mamba_ssm's CUDA scan")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("length", [49, 196, 1024, 4096])
    def test_mamba_ssm_gives_the_same(self, length, dtype):
        torch.manual_seed(0)
        u, dt, B, C = (torch.randn(2, length, width, device="cuda").to(dtype) for width in (40, 40, 8, 8))
        A = -torch.arange(1.0, 9.0, device="cuda").repeat(40, 1)
        D, dt_bias = torch.randn(2, 40, device="cuda")
        tensors = [x.clone().requires_grad_() for x in (u, dt - 3, A, B, C, D, dt_bias)]
        exact = [x.detach().double().requires_grad_() for x in tensors]
        results = []
        for given, backend in ((tensors, "mamba_ssm"), (tensors, "triton"), (exact, "torch")):
            y = selective_scan(*given, backend=backend)
            results.append([y, *torch.autograd.grad(y.square().sum(), given)])
        for theirs, ours, expected in zip(*results, strict=True):
            tolerance = (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()
            assert (theirs.double() - expected).norm() < tolerance and (ours.double() - expected).norm() < tolerance
