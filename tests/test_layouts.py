"""Apple's GPUs, whose operators misread layouts (`misreads_layouts`): what these are given, seen on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from repository import fusion_mambavision, modeling_mambavision, operators, selective_scan
from repository.modeling_mambavision_upernet import MambaVisionUperNetConfig, UperNetForSemanticSegmentation
from torch.utils._python_dispatch import TorchDispatchMode
from weights import image


# Sides that need padding in both token stages, so that their maps are cut
SHAPE = (2, 3, 70, 90)


class Watch(TorchDispatchMode):
    """Notes what is not contiguous among the tensors that operators known for misreading them are given."""

    NAMES = ("convolution", "batch_norm", "layer_norm", "mean", "pool")
    FORWARD = ("dot_product",)  # whose gradients are computed otherwise there, by plain products

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        names = self.NAMES if "backward" in name else self.NAMES + self.FORWARD
        if any(part in name for part in names):
            self.note(name, args)
        assert "mambavision" not in name, "the scan's own operator writes into views"
        return function(*args, **(kwargs or {}))

    def note(self, name, args):
        self.seen.add(name)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self.wrong += [(name, tuple(x.shape), x.stride()) for x in tensors if not x.is_contiguous()]


@pytest.fixture
def apple(monkeypatch):
    """As if the tensors were on such a GPU."""

    def begin():
        for module in (fusion_mambavision, modeling_mambavision, operators, selective_scan):
            monkeypatch.setattr(module, "misreads_layouts", lambda device: True)

    return begin


@pytest.fixture
def watch(monkeypatch):
    """To be entered; `F.linear` has been taken apart before the mode is told of it."""
    watch, linear = Watch(), F.linear

    def watched(x, *args):
        if operators.has_modes():
            watch.note("linear", (x, *args))
        return linear(x, *args)

    monkeypatch.setattr(F, "linear", watched)
    return watch


def test_which_devices():
    assert operators.misreads_layouts(torch.device("mps"))
    for name in ("cpu", "cuda", "xpu", "meta"):
        assert not operators.misreads_layouts(torch.device(name))


@pytest.mark.parametrize("pixel_values", [image(SHAPE), image(SHAPE).to(memory_format=torch.channels_last)])
@torch.no_grad()
def test_inference(classifier, apple, watch, pixel_values):
    expected = classifier(pixel_values, output_hidden_states=True)
    apple()
    with watch:
        output = classifier(pixel_values, output_hidden_states=True)
    assert len(watch.seen) >= 6 and not watch.wrong
    assert all(x.is_contiguous() for x in output.hidden_states)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(classifier, apple, watch, checkpointing):
    pixel_values, labels = image(SHAPE), torch.tensor([1, 3])
    classifier.train()
    if checkpointing:
        classifier.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    torch.manual_seed(0)
    expected = torch.autograd.grad(classifier(pixel_values, labels=labels).loss, parameters)
    apple()
    torch.manual_seed(0)  # the same blocks are dropped
    with watch:
        gradients = torch.autograd.grad(classifier(pixel_values, labels=labels).loss, parameters)
    assert {"aten::convolution_backward", "aten::native_batch_norm_backward"} <= watch.seen and not watch.wrong
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("is_moved", [False, True])
@torch.no_grad()
def test_fused(classifier, apple, watch, is_moved):
    """Made there, or moved there."""
    expected = classifier(image(SHAPE)).logits
    if not is_moved:
        apple()
    fused = classifier.fuse()
    if is_moved:
        apple()
        fused = fused.to("cpu")
    with watch:
        logits = fused(image(SHAPE)).logits
    assert "aten::convolution" in watch.seen and not watch.wrong
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fused_copy_with_code_of_others_can_be_moved(classifier):
    expected, fused = classifier(image(SHAPE)).logits, classifier.fuse()
    for module in list(fused.modules()):
        if isinstance(module, fusion_mambavision.FusedConv2d):
            module.layer = torch.nn.Sequential(module.layer)
    torch.testing.assert_close(fused.to("cpu")(image(SHAPE)).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_segmentation(apple, watch):
    config = MambaVisionUperNetConfig(SMALL | {"out_norm": True, "num_labels": 0}, hidden_size=16, num_labels=4)
    model = UperNetForSemanticSegmentation(config).eval()
    expected = model(image(SHAPE)).logits
    apple()
    with watch:
        logits = model(image(SHAPE)).logits
    assert {"aten::convolution", "aten::native_layer_norm"} <= watch.seen and not watch.wrong
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_code_of_others_in_the_mixer(small_config, apple, watch):
    """A convolution that is not the mixer's own is called as it is."""
    model = modeling_mambavision.MambaVisionModel(small_config).eval()
    expected = model(image(SHAPE)).pooler_output
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(lambda *args: None)
    apple()
    with watch:
        pooled = model(image(SHAPE)).pooler_output
    assert {"aten::convolution", "linear"} <= watch.seen and not watch.wrong
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
