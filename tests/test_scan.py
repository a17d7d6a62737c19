"""The selective scan in plain torch against its definition in float64, one step after the other."""

import math
import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from repository import selective_scan as scan_module
from repository.selective_scan import selective_scan, selective_scan_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


LENGTHS = [1, 2, 7, 49, 196, 500, 1024, 4096, 12544]
NAMES = ["u", "dt", "A", "B", "C", "D", "dt_bias"]

# Largest error over the standard deviation of what is compared.
TOLERANCE = {
    torch.float64: 1e-12,  # the same sums in another order
    torch.float32: 1e-5,  # float32's 6e-8, accumulated over the memory of the recurrence
}
FORMS = {"blocked": selective_scan, "chunked": scan_module._scan_traceable}


@pytest.fixture(autouse=True)
def plans_of_this_test():
    """Which may be told other sizes."""
    plans = scan_module._divide, scan_module._divide_backward
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def random_inputs(batch, length, channels, states=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [
        normal(batch, length, channels),
        normal(batch, length, channels) - 3,
        -torch.exp(normal(channels, states)),
        normal(batch, length, states),
        normal(batch, length, states),
        normal(channels),
        normal(channels),
    ]
    return [x.to(dtype) for x in inputs]


def sequential_float64(u, dt, A, B, C, D, dt_bias):
    """The recurrence as architecture papers write it, on (channels, states), independent of the module under test."""
    u, dt, A, B, C, D, dt_bias = (x.double() for x in (u, dt, A, B, C, D, dt_bias))
    delta = torch.log1p(torch.exp(-(dt + dt_bias).abs())) + (dt + dt_bias).clamp(min=0)
    h, outputs = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64), []
    for t in range(u.shape[1]):
        h = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A)) * h
        h = h + torch.einsum("bd,bn,bd->bdn", delta[:, t], B[:, t], u[:, t])
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(outputs, 1) + D * u


def relative_error(value, expected):
    return ((value.double() - expected).abs().max() / expected.std().clamp(min=1e-30)).item()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("form", "by_mkl"), [("blocked", False), ("blocked", True), ("chunked", False)])
def test_equals_the_float64_recurrence(monkeypatch, form, length, by_mkl):
    monkeypatch.setattr(scan_module, "_MKL_IS_FAST", by_mkl)
    inputs = random_inputs(2 if length < 4096 else 1, length, 20)
    expected = sequential_float64(*inputs)
    if length <= 500:
        assert relative_error(selective_scan_reference(*inputs), expected) < TOLERANCE[torch.float64]
    for dtype in (torch.float64, torch.float32):
        value = FORMS[form](*(x.to(dtype) for x in inputs))
        assert value.dtype == dtype and value.shape == inputs[0].shape
        assert relative_error(value, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 49, 63, 500])
@pytest.mark.parametrize("elements", [1, 2 * 8 * 20, 24 * 8 * 20, 2**30])  # three sequences in two tiles, or in one
@pytest.mark.parametrize("part", [1, 3 * 20 * 50, 2**30])
@pytest.mark.parametrize("kept", [0, 2**30])
def test_the_division_into_chunks_does_not_matter(monkeypatch, elements, part, kept, length):
    monkeypatch.setattr(scan_module, "_KEPT_ELEMENTS", kept)
    monkeypatch.setattr(scan_module, "_SLICE_ELEMENTS", elements)
    monkeypatch.setattr(scan_module, "_PART_ELEMENTS", part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    u, *others = random_inputs(3, length, 20)
    expected = sequential_float64(u, *others)
    assert relative_error(selective_scan(u, *others), expected) < TOLERANCE[torch.float64]
    both = torch.cat([u, u], dim=-1)  # in whose first half the result takes u's place
    scan_module.infer_scan_(both[..., :20], *others)
    assert relative_error(both[..., :20], expected) < TOLERANCE[torch.float64] and both[..., 20:].equal(u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs_are_scanned_in_float32(form, dtype):
    inputs = random_inputs(2, 196, 20, dtype=dtype)
    value = FORMS[form](*inputs)
    assert value.dtype == dtype
    # no error but the output's own rounding
    expected = sequential_float64(*inputs)
    torch.testing.assert_close(value.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_rounded_once(dtype):
    """Each to the dtype of its own tensor, where these differ."""
    inputs = [
        x.to(dtype if name in ("u", "C") else torch.float32)
        for name, x in zip(NAMES, random_inputs(2, 53, 20), strict=True)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(2, 53, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(selective_scan(*inputs), inputs, weight)
    expected = torch.autograd.grad(sequential_float64(*exact), exact, weight.double())
    for x, gradient, reference in zip(inputs, gradients, expected, strict=True):
        assert gradient.dtype == x.dtype
        rounding = torch.finfo(dtype).eps if x.dtype == dtype else 0
        torch.testing.assert_close(gradient.double(), reference, rtol=rounding, atol=1e-5 * reference.std().item())


# One block, several, and blocks shorter than a step's row needs; batches in one tile and in several.
@pytest.mark.parametrize("block_elements, part", [(2**19, 2**20), (288, 60), (128, 2**20), (1, 2**20), (2**19, 1)])
@pytest.mark.parametrize(("kept", "by_mkl"), [(0, False), (2**30, True)])
def test_gradients_by_finite_differences(monkeypatch, block_elements, part, kept, by_mkl):
    monkeypatch.setattr(scan_module, "_KEPT_ELEMENTS", kept)
    monkeypatch.setattr(scan_module, "_MKL_IS_FAST", by_mkl)
    monkeypatch.setattr(scan_module, "_BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(scan_module, "_PART_ELEMENTS", part)
    inputs = [x.requires_grad_() for x in random_inputs(3, 8, 4)]
    for form in FORMS.values():
        assert torch.autograd.gradcheck(form, inputs)


@pytest.mark.parametrize("length", [1, 7, 23, 48])
@pytest.mark.parametrize("segment", [1, 3, 8])
@pytest.mark.parametrize(("block", "blocks"), [(1, 1), (12 * 3 * 20 * 8, 1), (12 * 3 * 20 * 8, 2**30), (2**30, 2**30)])
@pytest.mark.parametrize("elements", [1, 24 * 8 * 20, 2**30])
def test_the_division_of_the_backward_pass_does_not_matter(monkeypatch, elements, block, blocks, segment, length):
    """Into tiles of one sequence, two or three, parts, blocks and segments, of which the last may fall short."""
    monkeypatch.setattr(scan_module, "_LEAST_STEPS", 1 if block > 1 else 2**20)
    monkeypatch.setattr(scan_module, "_SLICE_ELEMENTS", elements)
    monkeypatch.setattr(scan_module, "_SEGMENT_STEPS", segment)
    monkeypatch.setattr(scan_module, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(scan_module, "_BACKWARD_PART_ELEMENTS", blocks)
    inputs = [x.requires_grad_() for x in random_inputs(5, length, 20)]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((sequential_float64(*inputs) * weight).sum(), inputs)
    for name, gradient, reference in zip(
        NAMES, torch.autograd.grad((selective_scan(*inputs) * weight).sum(), inputs), expected, strict=True
    ):
        assert relative_error(gradient, reference) < 10 * TOLERANCE[torch.float64], name


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_by_finite_differences(form):
    inputs = [x.requires_grad_() for x in random_inputs(2, 5, 3)]
    assert torch.autograd.gradgradcheck(FORMS[form], inputs)
    some = [x.detach().requires_grad_(name in ("dt", "C")) for name, x in zip(NAMES, inputs, strict=True)]
    assert torch.autograd.gradgradcheck(FORMS[form], some)
    # the first ones stay the same, of a tensor that is both u and dt too
    twice = FORMS[form](inputs[0], inputs[0], *inputs[2:]).square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(twice, inputs[0], create_graph=True), torch.autograd.grad(twice, inputs[0])
    )


@pytest.mark.parametrize("batch, length, channels", [(1, 1, 16), (3, 49, 40), (2, 500, 24), (40, 196, 64)])
def test_gradients_equal_autograd_through_the_recurrence(batch, length, channels):
    inputs = [x.requires_grad_() for x in random_inputs(batch, length, channels)]
    weight = torch.randn_like(inputs[0])
    expected = torch.autograd.grad((sequential_float64(*inputs) * weight).sum(), inputs)
    for dtype in (torch.float64, torch.float32):
        casts = [x.detach().to(dtype).requires_grad_() for x in inputs]
        gradients = torch.autograd.grad((selective_scan(*casts) * weight.to(dtype)).sum(), casts)
        for name, gradient, reference in zip(NAMES, gradients, expected, strict=True):
            scale = reference.abs().max() if reference.numel() == 1 else reference.std()
            error = ((gradient.double() - reference).abs().max() / scale.clamp(min=1e-30)).item()
            assert gradient.dtype == dtype
            assert error < 10 * TOLERANCE[dtype], name


@pytest.mark.parametrize("form", FORMS)
def test_long_steps_and_fast_decay_stay_finite_and_right(form):
    """Steps up to 20 and A down to -64: a step's decay is then 0 in float32, next to steps whose decay is near 1."""
    u, dt, A, B, C, D, dt_bias = random_inputs(2, 300, 16)
    generator = torch.Generator().manual_seed(1)
    step = torch.rand(dt.shape, generator=generator, dtype=torch.float64) ** 8 * 20 + 1e-4
    dt = step + torch.log(-torch.expm1(-step))
    A = -torch.linspace(1e-3, 64, A.numel(), dtype=torch.float64).view_as(A)
    inputs = [u, dt, A, B, C, D, torch.zeros_like(dt_bias)]
    casts = [x.float().requires_grad_() for x in inputs]
    value = FORMS[form](*casts)
    assert relative_error(value, sequential_float64(*inputs)) < TOLERANCE[torch.float32]
    for gradient in torch.autograd.grad(value.sum(), casts):
        assert gradient.isfinite().all()


def test_inputs_may_be_views_and_stay_untouched():
    inputs = random_inputs(2, 60, 12, dtype=torch.float32)
    expected = selective_scan(*inputs)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    copies = [x.clone() for x in strided]
    assert torch.equal(selective_scan(*strided), expected)
    assert all(torch.equal(x, copy) for x, copy in zip(strided, copies, strict=True))


def test_batches_are_independent():
    inputs = random_inputs(70, 30, 40, dtype=torch.float32)
    whole = selective_scan(*inputs)
    for b in (0, 33, 69):
        alone = [x[b : b + 1] if x.ndim == 3 else x for x in inputs]
        torch.testing.assert_close(selective_scan(*alone), whole[b : b + 1], rtol=1e-5, atol=1e-5)


def test_empty_batch_and_empty_sequence():
    for batch, length in ((0, 5), (3, 0)):
        inputs = [x.requires_grad_() for x in random_inputs(batch, length, 4)]
        value = selective_scan(*inputs)
        assert value.shape == (batch, length, 4)
        assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(value.sum(), inputs))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_operator_is_registered_correctly(monkeypatch, needs_grad):
    """Schema, fake tensors and autograd registration agree with what the operator does, as torch checks them."""
    monkeypatch.setattr(scan_module, "_BLOCK_ELEMENTS", 5 * 4 * 8)  # several segments
    assert scan_module._plan(torch.empty(2, 9, 4), 8, is_training=True).saved(9) == 10
    inputs = [x.requires_grad_(needs_grad) for x in random_inputs(2, 9, 4, dtype=torch.float32)]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if needs_grad:
        tests.append("test_aot_dispatch_static")
    torch.library.opcheck(scan_module._blocked_scan.operator, (*inputs, needs_grad), test_utils=tests)


@pytest.mark.parametrize(
    ("threads", "batch", "length", "channels", "steps", "chunks"),
    [
        (1, 8, 196, 160, 28, 7),
        (1, 8, 49, 320, 49, 1),
        (2, 1, 49, 320, 7, 7),
        (2, 8, 49, 320, 7, 7),
        (2, 1, 196, 160, 7, 28),
        (2, 8, 196, 160, 14, 14),
        (2, 128, 196, 160, 49, 1),
        (2, 3, 211, 160, 8, 27),
        (2, 1, 12544, 160, 64, 98),
        (64, 8, 4096, 160, 14, 49),
    ],
)
def test_chunks_are_of_a_size_that_the_caches_hold(monkeypatch, threads, batch, length, channels, steps, chunks):
    """And divide the sequences, where such a size does; batches that are large enough need none."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plan = scan_module._plan(torch.empty(batch, length, channels), 8, is_training=False)
    assert (plan.steps, plan.chunks) == (steps, chunks)
    assert plan.rows * chunks * channels * 8 < 2 * threads * scan_module._SLICE_ELEMENTS
    assert plan.rows * chunks * steps * channels < 1.1 * scan_module._PART_ELEMENTS


@pytest.mark.parametrize(
    ("batch", "length", "channels", "segment", "lanes"),
    [
        (1, 49, 320, 7, 7),
        (8, 49, 320, 7, 1),
        (1, 196, 160, 7, 28),
        (8, 196, 160, 7, 4),
        (32, 196, 160, 7, 2),
        (8, 1024, 160, 8, 4),
        (1, 12544, 160, 8, 32),
        (3, 211, 160, 8, 9),
        (1, 154, 320, 7, 21),  # where 22 were all segments
    ],
)
def test_blocks_are_of_a_size_that_the_caches_hold(batch, length, channels, segment, lanes):
    """And so many segments, that torch shares them among threads: from 2**15 elements on."""
    plan = scan_module._plan(torch.empty(batch, length, channels), 8, is_training=True)
    found, blocks = scan_module._divide_backward(plan, length, channels, 8, "cpu")
    assert (plan.segment, found) == (segment, lanes)
    assert plan.steps % segment == 0
    step = plan.rows * channels * 8
    assert lanes * segment * step <= scan_module._BLOCK_ELEMENTS
    assert blocks * lanes * segment * plan.rows * channels <= scan_module._BACKWARD_PART_ELEMENTS
    assert lanes in (1, -(-length // segment)) or lanes * step > 2**15


@pytest.mark.parametrize("threads", [1, 64])
def test_graphs_of_training_hold_for_any_number_of_threads(monkeypatch, threads):
    u = torch.empty(8, 196, 160)
    expected = scan_module._plan(u, 8, is_training=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert scan_module._plan(u, 8, is_training=True) == expected


def test_other_devices_take_whole_batches():
    u = torch.empty(128, 196, 160, device="meta")
    for is_training in (False, True):
        assert scan_module._plan(u, 8, is_training).rows == 128


class Count(TorchDispatchMode):
    """How often the operators are called that compute the states."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "addcmul" in function.name() or "exp2" in function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "times"), [(8, 2), (128, 6)])
def test_sizes_of_other_devices(monkeypatch, batch, times):
    """Each operator costs a launch there, whatever its size: so many times fewer of them, and the same numbers."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(scan_module, "_MKL_IS_FAST", False)  # it is for the CPU alone
    inputs = random_inputs(batch, 196, 160, dtype=torch.float32)
    expected, counts = selective_scan_reference(*inputs), []
    for kind in ("", "_GPU"):
        for name in ("_BLOCK_ELEMENTS", "_SLICE_ELEMENTS", "_PART_ELEMENTS"):
            monkeypatch.setattr(scan_module, name, getattr(scan_module, kind + name))
        scan_module._divide.cache_clear()
        with Count() as counted:
            value, _ = scan_module._forward(*inputs, False)
        counts.append(counted.count)
        assert relative_error(value, expected) < TOLERANCE[torch.float32]
    assert counts[0] > times * counts[1] and counts[1] < 60


def test_gradients_with_the_sizes_of_other_devices(monkeypatch):
    for name in ("_BLOCK_ELEMENTS", "_BACKWARD_PART_ELEMENTS", "_SLICE_ELEMENTS", "_PART_ELEMENTS"):
        monkeypatch.setattr(scan_module, name, getattr(scan_module, "_GPU" + name))
    inputs = [x.requires_grad_() for x in random_inputs(8, 196, 40)]
    expected = torch.autograd.grad(sequential_float64(*inputs).sum(), inputs)
    for name, x, reference in zip(
        NAMES, torch.autograd.grad(selective_scan(*inputs).sum(), inputs), expected, strict=True
    ):
        assert relative_error(x, reference) < 10 * TOLERANCE[torch.float64], name


class Layouts(TorchDispatchMode):
    """Of what the pointwise operators are given that the states are made of."""

    def __init__(self):
        super().__init__()
        self.are_dense = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in ("softplus", "exp2", "mul_", "addcmul_")):
            self.are_dense.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [0, 2**30])
def test_threads_keep_to_their_chunks(monkeypatch, kept):
    """They share operators by the order in memory, and what another core has written comes slowly."""
    monkeypatch.setattr(scan_module, "_KEPT_ELEMENTS", kept)
    with Layouts() as layouts:
        scan_module._forward(*random_inputs(3, 49, 20, dtype=torch.float32), False)
    assert len(layouts.are_dense) > 20 and all(layouts.are_dense)


class Exponentials(TorchDispatchMode):
    """Of how many numbers which of them are computed."""

    def __init__(self):
        super().__init__()
        self.counts = {"aten::exp_": 0, "aten::exp2_": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in self.counts:
            self.counts[function.name()] += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "times"), [(1, 1), (8, 2)])
@pytest.mark.parametrize("by_mkl", [False, True])
def test_few_sequences_keep_their_decays(monkeypatch, batch, times, by_mkl):
    monkeypatch.setattr(scan_module, "_MKL_IS_FAST", by_mkl)
    with Exponentials() as counted:
        scan_module._forward(*random_inputs(batch, 196, 160, dtype=torch.float32), False)
    count = sum(counted.counts.values()) / (batch * 196 * 160 * 8)
    assert times <= count < times + 0.25  # beside the steps, the chunks as a whole, and a part of softplus


@pytest.mark.parametrize(
    ("shift", "rate", "is_taken"),
    [(0, 1, True), (-200, 1, True), (100, 0.01, False), (0, 100, False), (math.inf, 1, False)],
)
def test_mkl_computes_exponentials_where_it_is_fast(monkeypatch, shift, rate, is_taken):
    """Not where they overflow or underflow. Any way gives the same."""
    monkeypatch.setattr(scan_module, "_MKL_IS_FAST", True)
    u, dt, A, *others = random_inputs(2, 49, 20, dtype=torch.float32)
    if shift == math.inf:
        dt[0, 7, 3] = math.nan
    else:
        dt += shift
    inputs = (u, dt, A * rate, *others)
    expected = sequential_float64(*inputs)
    with Exponentials() as counted:
        value, _ = scan_module._forward(*inputs, False)
    assert counted.counts["aten::exp2_"] > 0  # of whole chunks
    assert (counted.counts["aten::exp_"] > u.numel() * A.shape[1]) == is_taken
    assert torch.equal(value.isnan(), expected.isnan())
    assert relative_error(value.nan_to_num(), expected.nan_to_num()) < TOLERANCE[torch.float32]


class PassingOn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_whoever_looks_on_sees_one_operator():
    """It costs time, so nobody else gets one."""
    plain = random_inputs(2, 9, 4, dtype=torch.float32)
    recorded = [x.clone().requires_grad_() for x in plain]
    subclass = type("Own", (torch.Tensor,), {})
    for inputs, mode, is_seen in (
        (plain, nullcontext(), False),
        (plain, torch.device("cpu"), False),  # a default, which is a mode too
        (plain, Watching(), True),
        (plain, PassingOn(), True),
        *(([*plain[:i], plain[i].as_subclass(subclass), *plain[i + 1 :]], nullcontext(), True) for i in range(7)),
        (recorded, nullcontext(), False),
        (recorded, Watching(), True),
        (recorded, torch.no_grad(), False),
        ([torch.nn.Parameter(x) for x in plain], torch.inference_mode(), False),
    ):
        with mode, torch.profiler.profile() as profile:
            y = selective_scan(*inputs)
        assert torch.equal(y, selective_scan(*plain))
        assert any("::blocked_scan" in event.key for event in profile.key_averages()) == is_seen
    on_meta = [x.to("meta") for x in plain]
    with torch.profiler.profile() as profile:
        y = selective_scan(*on_meta)
    assert y.shape == plain[0].shape and y.is_meta
    assert not any(event.key == "aten::exp2_" for event in profile.key_averages())  # shapes alone


def test_gradients_in_batches():
    """Many gradients of one scan that was recorded before, in each way in which torch computes them at once."""
    inputs = [x.requires_grad_() for x in random_inputs(2, 9, 4)]
    y = selective_scan(*inputs)
    weights = torch.randn(3, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, inputs, weight, retain_graph=True) for weight in weights]

    def gradients(weight):
        return torch.autograd.grad(y, inputs, weight, retain_graph=True)

    legacy = torch.autograd.grad(y, inputs, weights, retain_graph=True, is_grads_batched=True)
    for batched in (legacy, torch.vmap(gradients)(weights)):
        for value, single in zip(batched, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(value, torch.stack(single))
    u, *others = (x.detach() for x in random_inputs(1, 3, 2))
    results = [torch.autograd.functional.jacobian(lambda u: selective_scan(u, *others), u, vectorize=x) for x in (0, 1)]
    torch.testing.assert_close(*results)
    results = [
        torch.autograd.functional.hessian(lambda u: selective_scan(u, *others).square().sum(), u, vectorize=x)
        for x in (False, True)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(form, dtype):
    inputs = [x.requires_grad_() for x in random_inputs(2, 50, 6, dtype=torch.float32)]
    expected = FORMS[form](*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    with torch.autocast("cpu", dtype):
        y = FORMS[form](*inputs)
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    for value, gradient in zip(torch.autograd.grad(y.square().sum(), inputs), gradients, strict=True):
        assert torch.equal(value, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lacks", ["oneDNN", "oneDNN's fast code, as an ARM does"])
def test_convolution_in_half_precision_without_onednn(monkeypatch, dtype, autocast, lacks):
    """In float32 up to the end, also under autocast; compiled, it stays one graph."""
    monkeypatch.setattr(scan_module, "ONEDNN_DTYPES", (torch.float32, *(() if lacks == "oneDNN" else (dtype,))))
    monkeypatch.setattr(scan_module, "_IS_ARM", lacks != "oneDNN")
    torch.compiler.reset()  # of one function torch compiles a few forms only
    x, weight = torch.randn(2, 49, 16).to(dtype), torch.randn(16, 1, 3).to(dtype)
    exact = F.silu(F.conv1d(x.double().transpose(1, 2), weight.double(), padding=1, groups=16)).transpose(1, 2)
    with torch.autocast("cpu", dtype, enabled=autocast):
        for convolve in (
            scan_module.silu_convolve,
            torch.compile(scan_module.silu_convolve, backend="eager", fullgraph=True),
        ):
            value = convolve(x, weight)
            assert value.dtype == dtype
            assert ((value - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("length", [1, 2, 7, 196])
def test_convolution_of_recorded_and_of_other_tokens(length):
    """Two forms: one torch differentiates, and one in less time."""
    x, weight = torch.randn(2, length, 48)[..., 8:24], torch.randn(16, 1, 3)
    exact = F.silu(F.conv1d(x.double().transpose(1, 2), weight.double(), padding=1, groups=16)).transpose(1, 2)
    kept = x.clone()
    for recorded in ((False, False), (True, False), (False, True)):
        tensors = [y.clone().requires_grad_(is_recorded) for y, is_recorded in zip((x, weight), recorded, strict=True)]
        with torch.profiler.profile() as profile:
            value = scan_module.silu_convolve(*tensors)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
        assert value.requires_grad == any(recorded)
        assert ("aten::conv2d" in {event.key for event in profile.key_averages()}) == any(recorded)
    assert torch.equal(x, kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert scan_module.silu_convolve(x, weight).dtype == torch.bfloat16
    with torch.profiler.profile() as profile:  # rounded once, not after each tap
        scan_module.silu_convolve(x.bfloat16(), weight.bfloat16())
    is_fast = torch.bfloat16 in scan_module.ONEDNN_DTYPES and not scan_module._IS_ARM
    assert ("aten::conv2d" in {event.key for event in profile.key_averages()}) == is_fast


def test_compiled_convolution_is_pointwise():
    """Without the updates in place, of which torch.compile makes several kernels."""
    graphs, x, weight = [], torch.randn(2, 7, 16), torch.randn(16, 1, 3)
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = torch.compile(scan_module.silu_convolve, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, weight), scan_module.silu_convolve(x, weight))
    assert not any("addcmul" in str(node.target) for node in graphs[0].graph.nodes)


HEAP = """
import re, sys, types, torch
if sys.argv[1:]:
    package = types.ModuleType("repository"); package.__path__ = sys.argv[1:]; sys.modules["repository"] = package
    import repository.selective_scan
block = torch.empty(30 * 2**20, dtype=torch.uint8)
address, maps = block.data_ptr(), open("/proc/self/maps").read()
heap = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*\\[heap\\]$", maps, re.MULTILINE)
print(any(int(start, 16) <= address < int(end, 16) for start, end in heap))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the C library of Linux")
def test_freed_memory_is_kept():
    """A block of 30 MiB is mapped from the system, and unmapped later; with the module, it is a part of the heap."""
    is_kept = [run_python(HEAP, *folders).stdout.strip() for folders in ((), (Path(scan_module.__file__).parent,))]
    assert is_kept == ["False", "True"]


def test_compiled_scan_keeps_one_graph_and_gives_the_same():
    inputs = [x.requires_grad_() for x in random_inputs(2, 49, 12, dtype=torch.float32)]
    compiled = torch.compile(lambda *x: F.silu(selective_scan(*x)), fullgraph=True)
    expected = F.silu(selective_scan(*inputs))
    torch.testing.assert_close(compiled(*inputs), expected)
    gradients = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_one_graph_of_training_for_batches_of_any_size():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        inputs = [x.requires_grad_() for x in random_inputs(batch, 49, 12, dtype=torch.float32)]
        expected = torch.autograd.grad(selective_scan(*inputs).sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).sum(), inputs), expected)
    assert counter.frame_count == 1


MEMORY = """
import sys, types, torch
package = types.ModuleType("repository"); package.__path__ = [sys.argv[1]]; sys.modules["repository"] = package
from repository.selective_scan import selective_scan
torch.manual_seed(0)
training = sys.argv[2] == "training"
def memory(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024
def run(length):
    inputs = [torch.randn(1, length, 160), torch.randn(1, length, 160) - 3, -torch.rand(160, 8) - 0.1,
              torch.randn(1, length, 8), torch.randn(1, length, 8), torch.ones(160), torch.zeros(160)]
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = memory("VmRSS")
    with torch.set_grad_enabled(training):
        for x in inputs: x.requires_grad_(training)
        y = selective_scan(*inputs)
        if training: y.sum().backward()
    return memory("VmHWM") - before
run(64)
print(run(12544))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_memory_at_length_12544(mode, capsys):
    """Peak of the process beyond its inputs; the states of all steps would be 64 MB, and autograd keeps several."""
    megabytes = float(run_python(MEMORY, Path(scan_module.__file__).parent, mode).stdout)
    output = 12544 * 160 * 4 / 2**20
    with capsys.disabled():
        print(
            f"\nscan of (1, 12544, 160), {mode}: peak {megabytes:.1f} MiB beyond its inputs; its output is {output:.1f}"
        )
    assert megabytes > 0.9 * output  # or the measurement saw nothing
    if mode == "inference":
        assert megabytes - output < 32
    else:  # the output, its gradient, those of u and dt, and the blocks' start states
        assert megabytes - 4 * output < 48


@pytest.mark.parametrize(
    "name, shape",
    [
        ("u", (2, 5)),
        ("dt", (2, 5, 3)),
        ("dt", (1, 5, 4)),
        ("A", (5, 8)),
        ("A", (4,)),
        ("B", (2, 5, 7)),
        ("C", (2, 4, 8)),
        ("D", (1,)),
        ("dt_bias", (4, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    inputs = dict(zip(NAMES, random_inputs(2, 5, 4), strict=True))
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        selective_scan(**inputs)


@pytest.mark.parametrize("channels, states", [(0, 8), (4, 0)])
def test_a_scan_of_nothing_is_refused(channels, states):
    with pytest.raises(ValueError, match=rf"^A must have at least one .*\({channels}, {states}\)"):
        selective_scan(*random_inputs(2, 5, channels, states))


def test_backend_is_chosen_by_name_or_by_environment(monkeypatch):
    inputs = random_inputs(1, 5, 4)
    assert torch.equal(selective_scan(*inputs, backend="torch"), selective_scan(*inputs))
    with pytest.raises(ValueError, match="backend='cuda'"):
        selective_scan(*inputs, backend="cuda")
    monkeypatch.setenv("MAMBAVISION_SCAN", "fast")
    with pytest.raises(ValueError, match="backend='fast'"):
        selective_scan(*inputs)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_alone(form):
    """On a device that has no autocast."""
    shapes = [(2, 9, 6), (2, 9, 6), (6, 8), (2, 9, 8), (2, 9, 8), (6,), (6,)]
    y = FORMS[form](*(torch.empty(shape, device="meta") for shape in shapes))
    assert y.shape == (2, 9, 6) and y.device.type == "meta"
