"""torch.compile: one graph, and the numbers of the model as it is."""

import copy

import pytest
import torch
from repository import fusion_mambavision, modeling_mambavision
from repository.modeling_mambavision import MambaVisionModel, MambaVisionModelForImageClassification
from weights import filled, image


@pytest.fixture
def shallow_classifier(small_config):
    """One block of each kind, for compilation takes its time by the block; no stochastic depth, to compare with."""
    torch.compiler.reset()  # sizes that another test compiled for would make this one's symbolic
    small_config.depths, small_config.drop_path_rate = [1, 1, 2, 1], 0.0
    model = MambaVisionModelForImageClassification(small_config)
    model.load_state_dict(filled({name: t.shape for name, t in model.state_dict().items()}))
    return model.eval()


def test_compiled_inference_is_one_graph_and_equal(shallow_classifier):
    compiled, pixel_values = torch.compile(shallow_classifier, fullgraph=True), image((2, 3, 70, 64))
    with torch.inference_mode():
        expected = shallow_classifier(pixel_values).logits
        torch.testing.assert_close(compiled(pixel_values).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_for_gpus(monkeypatch, approximate, dtype):
    """Of every number in half precision: rounded as exactly as torch's own."""
    monkeypatch.setattr(fusion_mambavision, "_is_on_gpu", lambda x: True)
    graphs, gelu = [], torch.nn.GELU(approximate)
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    torch.compiler.reset()
    compiled = torch.compile(
        fusion_mambavision.activated, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    with torch.no_grad():
        y, exact = compiled(x, gelu), gelu(x.double())
        assert y.dtype == dtype and "gelu" not in graphs[0].code
        assert compiled(torch.tensor([torch.inf, torch.nan], dtype=dtype), gelu).isnan().tolist() == [False, True]
        assert torch.equal(compiled(x.float(), gelu), gelu(x.float())) and "gelu" in graphs[-1].code
        assert torch.equal(fusion_mambavision.activated(x, gelu), gelu(x))  # where nobody compiles
        layer = fusion_mambavision.FusedLinear(torch.nn.Linear(4, 4, dtype=dtype), gelu)
        assert "gelu" in torch.export.export(layer, (x[:4],)).graph_module.code
    assert ((y - exact).abs() <= 2 * (exact.to(dtype) - exact).abs() + 1e-4 * exact.abs() + 1e-7).all()
    assert (y == exact.to(dtype)).float().mean() >= (gelu(x) == exact.to(dtype)).float().mean()
    assert torch.equal(compiled(x, gelu), gelu(x)) and "gelu" in graphs[-1].code  # where gradients are recorded


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_s_gelus_for_gpus(shallow_classifier, monkeypatch, fused):
    """In blocks of both kinds; the images' convolution, which is for GPUs too, has tests of its own."""
    monkeypatch.setattr(modeling_mambavision, "image_convolution", lambda *_: None)
    model, graphs = shallow_classifier.bfloat16(), []
    pixel_values = image((1, 3, 64, 64)).bfloat16()
    for is_on_gpu in (True, False):
        monkeypatch.setattr(fusion_mambavision, "_is_on_gpu", lambda x, it=is_on_gpu: it)
        torch.compiler.reset()
        backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
        with torch.inference_mode():
            torch.compile(model.fuse() if fused else model, fullgraph=True, backend=backend)(pixel_values)
    assert ["gelu" in graph.code for graph in graphs] == [False, True]


def test_compiled_training_step_is_one_graph_and_equal(shallow_classifier):
    pixel_values, labels = image((3, 3, 64, 64)), torch.tensor([0, 4, 2])
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, fullgraph=True)):
        model = copy.deepcopy(shallow_classifier).train()
        loss = wrap(model)(pixel_values, labels=labels).loss
        loss.backward()
        gradients.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, gradient in gradients[1].items():
        scale = gradients[0][name].abs().max()
        assert (gradient - gradients[0][name]).abs().max() < 1e-3 * scale + 1e-5, name


def test_features_are_captured_as_one_graph(shallow_classifier):
    """Unpacking included, with batches and images whose sizes change; without the C++ compiler, which takes minutes."""
    model = MambaVisionModel(shallow_classifier.config).eval()
    captured = torch.compile(lambda x: tuple(model(x)), fullgraph=True, backend="eager", dynamic=True)
    for batch, height, width in ((2, 64, 64), (3, 70, 64), (5, 64, 90)):
        pixel_values = image((batch, 3, height, width))
        with torch.no_grad():
            pooled, maps = captured(pixel_values)
            expected_pooled, expected_maps = model(pixel_values)
        torch.testing.assert_close(pooled, expected_pooled, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-5)


def test_the_scan_stays_one_operator(shallow_classifier):
    """The form that exports get, which makes graphs of a hundred operators, would be several times slower."""
    graphs, pixel_values = [], image((1, 3, 64, 64))
    compiled = torch.compile(shallow_classifier, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(pixel_values).logits, shallow_classifier(pixel_values).logits)
    scans = [node for node in graphs[0].graph.nodes if "blocked_scan" in str(node.target)]
    assert len(scans) == 2  # the first block of both stages of tokens


@pytest.mark.parametrize("fuse", [False, True])
def test_nothing_is_asked_of_the_layers(shallow_classifier, monkeypatch, fuse):
    """torch.compile would ask it again at every call, as a guard: a thousand more of them than the layers need."""
    model, pixel_values = shallow_classifier.fuse() if fuse else shallow_classifier, image((1, 3, 64, 64))
    with torch.inference_mode():
        expected = model(pixel_values).logits
        for name in ("_are_plain", "_is_exactly"):
            monkeypatch.delattr(fusion_mambavision, name)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixel_values).logits, expected, rtol=1e-3, atol=1e-4)
