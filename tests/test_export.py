"""Export: graphs for other runtimes, free in the batch and in the image's sides, with the numbers of the model."""

import numpy as np
import pytest
import torch
from conftest import SMALL, run_python
from repository.configuration_mambavision import MambaVisionConfig
from repository.modeling_mambavision import MambaVisionModel, MambaVisionModelForImageClassification
from weights import filled, image


# Windows that are whole and that are padded, on either side, one and several
SIZES = [(1, 64, 64), (3, 70, 129), (2, 128, 33)]


@pytest.fixture
def features(small_config):
    model = MambaVisionModel(small_config)
    model.load_state_dict(filled({name: t.shape for name, t in model.state_dict().items()}))
    return model.eval()


def assert_same(outputs, pixel_values, model):
    with torch.no_grad():
        pooled, maps = model(pixel_values)
    for ours, expected in zip(outputs, [pooled, *maps], strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), expected, rtol=1e-3, atol=1e-4)


def assert_exports(model, example, sizes, **settings):
    program = torch.export.export(model, (image(example),), **settings)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert operators and not any("mambavision" in name for name in operators), "standard operators alone"
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert operators.count("aten.linear.default") == len(layers), "each layer once"
    for size in sizes:
        pixel_values = image(size)
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(program.module()(pixel_values).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_program_of_any_batch(classifier, strict):
    shapes = ({0: torch.export.Dim("batch")},)
    assert_exports(classifier, (2, 3, 70, 96), [(1, 3, 70, 96), (5, 3, 70, 96)], dynamic_shapes=shapes, strict=strict)


def test_program_of_a_fused_model(classifier):
    assert_exports(classifier.fuse(), (2, 3, 70, 96), [(2, 3, 70, 96)], strict=False)


# Windows of the last stage are of 96 pixels, and of 64 in the one before
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sides", [(192, 192), (160, 224)], ids=["whole", "padded"])
def test_program_of_any_size_of_several_windows(classifier, sides, strict):
    """Torch takes a side of one window for another case than a side of several, but not whole ones for another."""
    free = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
    sizes = [(1, 3, 129, 140), (3, 3, 300, 129), (1, 3, 192, 384), (2, 3, 288, 100)]
    assert_exports(classifier, (2, 3, *sides), sizes, dynamic_shapes=free, strict=strict)


def test_program_of_sides_in_bounds(classifier):
    free = ({0: torch.export.Dim("batch"), **{i: torch.export.Dim(f"side_{i}", min=97, max=1024) for i in (2, 3)}},)
    settings = dict(strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    assert_exports(classifier, (2, 3, 192, 192), [(1, 3, 97, 1024), (3, 3, 300, 129)], dynamic_shapes=free, **settings)


LOADED = """
import sys, torch
folder = sys.argv[1]
pixel_values, *expected = torch.load(folder + "/expected.pt")
for model in torch.export.load(folder + "/program.pt2").module(), torch.jit.load(folder + "/traced.pt"):
    pooled, maps = model(pixel_values)
    torch.testing.assert_close([pooled, *maps], expected, rtol=1e-3, atol=1e-4)
assert not any("mambavision" in name for name in sys.modules)
"""


@torch.no_grad()
def test_features_traced_and_in_a_saved_program(features, tmp_path):
    """As plain tuples, which need none of this code where they are loaded."""
    features.config.return_dict = False
    example, pixel_values = image((2, 3, 70, 96)), image((3, 3, 70, 96), seed=1)
    batch = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(features, (example,), dynamic_shapes=batch), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.trace(features, example, strict=False), tmp_path / "traced.pt")
    pooled, maps = features(pixel_values)
    torch.save([pixel_values, pooled, *maps], tmp_path / "expected.pt")
    run_python(LOADED, tmp_path)


def test_onnx_of_any_size(features, tmp_path):
    import onnxruntime

    program = torch.onnx.export(
        features,
        (image((2, 3, 64, 96)),),
        input_names=["pixel_values"],
        output_names=["pooler_output", *(f"feature_map_{i}" for i in range(4))],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in SIZES:
        pixel_values = image((size[0], 3, *size[1:]))
        outputs = session.run(None, {"pixel_values": pixel_values.numpy()})
        assert_same(outputs[:5], pixel_values, features)
        assert all(np.isfinite(output).all() for output in outputs)


def test_onnx_prepared_for_quantisation(tmp_path):
    """ONNX Runtime infers all shapes then; of a map cut by slices it took unknown sizes for equal."""
    import onnxruntime
    from onnxruntime.quantization.shape_inference import quant_pre_process

    config = MambaVisionConfig(**{**SMALL, "window_size": [8, 8, 14, 7]})
    model = MambaVisionModelForImageClassification(config).eval()
    program = torch.onnx.export(
        model,
        (image((2, 3, 56, 56)),),
        input_names=["pixel_values"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    quant_pre_process(tmp_path / "model.onnx", tmp_path / "prepared.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "prepared.onnx")
    for size in ((2, 3, 56, 56), (1, 3, 33, 70), (2, 3, 224, 130)):
        (logits,) = session.run(None, {"pixel_values": image(size).numpy()})
        with torch.no_grad():
            expected = model(image(size)).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4 * expected.std().item())
