"""winograd.py against torch's convolution in float64."""

import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from repository import winograd
from repository.winograd import winograd_convolution, winograd_filters, winograd_pays


CORES_SHARE_A_CACHE = winograd._cores_share_a_cache.__wrapped__


@pytest.fixture(autouse=True)
def one_cache(monkeypatch):
    """Of the cores, whatever machine this is."""
    monkeypatch.setattr(winograd, "_cores_share_a_cache", lambda: True)


def layer(C: int, K: int, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(C, K, **{"kernel_size": 3, "padding": 1, **settings}).requires_grad_(False)


def map_of(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).to(memory_format=torch.channels_last)


def error(y: torch.Tensor, x: torch.Tensor, conv: nn.Conv2d) -> float:
    """The greatest, in standard deviations of what is right."""
    expected = F.conv2d(x.double(), conv.weight.double(), conv.bias if conv.bias is None else conv.bias.double(), 1, 1)
    assert y.shape == expected.shape and y.dtype == torch.float32
    return ((y - expected).abs().max() / expected.std()).item()


@pytest.fixture(params=["MKL", "another BLAS"])
def blas(request, monkeypatch):
    """Which the filters are transformed for, in an order of their own."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: request.param == "MKL")


@pytest.mark.usefixtures("blas")
@pytest.mark.parametrize("piece", [1, 2**10, 2**13, 2**19])  # single rows of tiles, several, several images, all
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape, K",
    [
        ((1, 3, 1, 1), 5),
        ((5, 8, 4, 8), 8),
        ((3, 16, 7, 13), 24),
        ((2, 20, 50, 9), 12),
        ((1, 1, 3, 2), 1),
        ((2, 4, 64, 64), 1),
    ],
)
def test_equals_the_direct_sum(shape, K, bias, piece, monkeypatch):
    monkeypatch.setattr(winograd, "PIECE", piece)
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    x, conv = map_of(*shape), layer(shape[1], K, bias=bias)
    y = winograd_convolution(x, winograd_filters(conv.weight), conv.bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, x, conv) < 1e-5


def test_errors_are_a_few_times_those_of_the_direct_sum():
    x, conv = map_of(2, 160, 28, 28), layer(160, 160)
    ours = error(winograd_convolution(x, winograd_filters(conv.weight), conv.bias), x, conv)
    assert ours < 10 * error(conv(x), x, conv)


@pytest.mark.usefixtures("blas")
def test_any_layout_of_map_and_filters():
    conv, whole = layer(8, 8), map_of(2, 16, 20, 20)
    for x in (whole[:, :8, 3:17, ::2], whole[:, :8, 3:17, ::2].contiguous(memory_format=torch.channels_last)):
        for weight in (conv.weight, conv.weight.contiguous(memory_format=torch.channels_last)):
            assert error(winograd_convolution(x, winograd_filters(weight), conv.bias), x, conv) < 1e-5


@pytest.mark.parametrize("channels", [1, 8])
def test_filters_take_one_call_without_a_product_of_batches(channels, monkeypatch):
    """Torch makes a call of each matrix then."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    winograd._transforms()  # made once for all
    with torch.profiler.profile() as profile:
        winograd_filters(layer(channels, 8).weight)
    called = {event.key: event.count for event in profile.key_averages()}
    assert called["aten::mm"] == 1 and "aten::bmm" not in called and "aten::copy_" not in called


@pytest.mark.parametrize(
    "shape, largest, tiles",
    [
        ((8, 2, 28, 28), 2**23, [4 * 49, 4 * 49]),
        ((11, 2, 28, 28), 2**23, [4 * 49, 4 * 49, 3 * 49]),
        ((1, 2, 80, 80), 2**23, [10 * 20, 10 * 20]),
        ((1, 2, 8, 1200), 2**23, [300, 300]),
        ((3, 2, 28, 28), 36 * 2 * 60, [49, 49, 49]),  # which takes no more than 60 tiles
    ],
)
def test_pieces_are_even_and_not_too_small(shape, largest, tiles, monkeypatch):
    """All filters are read for each."""
    monkeypatch.setattr(winograd, "PIECE", 1)
    monkeypatch.setattr(winograd, "LARGEST_PIECE", largest)
    x, conv = map_of(*shape), layer(2, 2)
    weight = winograd_filters(conv.weight)
    with torch.profiler.profile(record_shapes=True) as profile:
        winograd_convolution(x, weight, conv.bias)
    assert [event.input_shapes[0][1] for event in profile.events() if event.name == "aten::bmm"] == tiles


def test_an_image_does_not_depend_on_those_beside_it():
    x, conv = map_of(7, 32, 12, 12), layer(32, 32)
    weight = winograd_filters(conv.weight)
    together = winograd_convolution(x, weight, conv.bias)
    alone = torch.cat([winograd_convolution(one, weight, conv.bias) for one in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_threads_keep_their_own_memory():
    conv = layer(16, 16)
    weight, inputs = winograd_filters(conv.weight), [map_of(4, 16, 8 * i, 8) for i in range(1, 5)]
    wrong = []

    def work(x):
        for _ in range(50):
            if error(winograd_convolution(x, weight, conv.bias), x, conv) > 1e-5:
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_from_inference_mode_serves_outside_of_it(monkeypatch):
    monkeypatch.setattr(winograd, "_threads", threading.local())
    x, conv = map_of(1, 8, 8, 8), layer(8, 8)
    winograd._transforms.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            winograd_convolution(x, winograd_filters(conv.weight), conv.bias)
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(winograd_convolution(x, winograd_filters(conv.weight), conv.bias), x, conv) < 1e-5


def test_pays_for_wide_convolutions_of_large_maps_alone():
    def pays(C, K, B, side, is_prepared=True, dtype=torch.float32, **settings):
        return winograd_pays(torch.empty(B, C, side, side, dtype=dtype), layer(C, K, **settings), is_prepared)

    assert pays(128, 128, 8, 56) and pays(160, 160, 1, 28) and pays(392, 392, 1, 28, is_prepared=False)
    assert pays(160, 160, 1, 28, is_prepared=False)  # T's for one image
    assert not pays(80, 80, 8, 56) and not pays(160, 160, 1, 7) and not pays(160, 160, 1, 14, is_prepared=False)
    for settings in (dict(stride=2), dict(padding=0), dict(dilation=2), dict(groups=2), dict(kernel_size=5),
                     dict(padding="same")):  # fmt: skip
        assert not pays(160, 160, 8, 28, **settings)
    assert not pays(160, 160, 8, 28, dtype=torch.bfloat16)


def test_cores_of_one_cache(monkeypatch, tmp_path):
    """Where threads write into each other's caches it pays for very wide convolutions alone."""
    monkeypatch.setattr(winograd, "SHARED_CACHE", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(winograd, "_cores_share_a_cache", CORES_SHARE_A_CACHE)
    cores = {0, 1, 16}
    monkeypatch.setattr(winograd.os, "sched_getaffinity", lambda process: cores, raising=False)

    def pays(threads, C=160):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return winograd_pays(torch.empty(8, C, 28, 28), layer(C, C), True)

    assert pays(2)  # where nothing is told of caches
    for core, shared in ((0, "0-7"), (1, "0-7"), (16, "16-23")):
        (tmp_path / f"cpu{core}").write_text(shared + "\n")
    assert pays(1) and not pays(2) and pays(2, 256)
    (tmp_path / "cpu16").unlink()
    (tmp_path / "cpu16").mkdir()  # nor can it be read
    assert pays(2)
    (tmp_path / "cpu1").write_text("1-15\n")
    assert not pays(2)
    cores.discard(1)
    assert pays(2)
    monkeypatch.delattr(winograd.os, "sched_getaffinity")
    assert pays(2)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_may_be_rounded_are_left_alone(precision):
    x, conv = torch.empty(8, 160, 28, 28), layer(160, 160)
    assert winograd_pays(x, conv, True)
    torch.set_float32_matmul_precision(precision)
    try:
        assert not winograd_pays(x, conv, True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert winograd_pays(x, conv, True)
