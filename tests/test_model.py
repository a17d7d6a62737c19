"""The function that the model computes: against the published package, recorded and live, and at the edges."""

import copy
import io
import json
import math
from collections import Counter
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from checkpoints import published_model, published_weights
from conftest import FIXTURES, ROOT, SHAPES, norms_of_maps, run_python
from repository import fusion_mambavision, modeling_mambavision, selective_scan, winograd
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.modeling_mambavision import (
    Attention,
    ConvBlock,
    DropPath,
    MambaVision,
    MambaVisionMixer,
    MambaVisionModel,
    MambaVisionModelForImageClassification,
    Mlp,
    PatchEmbed,
    StepProjection,
    TokenBlock,
)
from safetensors import safe_open
from timm.layers import GluMlp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from weights import filled, image


# Largest difference over the standard deviation of the published output, in float32.
TOLERANCE = 1e-4

GOLDEN = safe_open(FIXTURES / "official_outputs.safetensors", "pt")
CASES = sorted({name.split(".")[0] for name in GOLDEN.keys()})  # noqa: SIM118


def assert_close(name, value, reference):
    assert value.shape == reference.shape, name
    error = ((value - reference).abs().max() / reference.std()).item()
    assert error < TOLERANCE, f"{name}: {error:.1e} of the reference's standard deviation"


def backbone(variant, weights):
    """The published model's architecture with these weights."""
    with torch.device("meta"):
        model = MambaVision(MambaVisionConfig(**VARIANTS[variant]), 1000)
    model.load_state_dict(weights, assign=True)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_equals_recorded_outputs_of_the_published_package(case):
    metadata = GOLDEN.metadata()
    variant = metadata[f"{case}.variant"]
    model = backbone(variant, filled(SHAPES[variant]))
    pixel_values = image(json.loads(metadata[f"{case}.input_shape"]))
    pooled, maps = model.forward_features(pixel_values)
    assert_close("logits", model(pixel_values), GOLDEN.get_tensor(f"{case}.logits"))
    assert_close("pooled", pooled, GOLDEN.get_tensor(f"{case}.pooled"))
    for i, stage_map in enumerate(maps):
        assert list(stage_map.shape) == json.loads(metadata[f"{case}.map{i}.shape"])
        assert_close(f"map{i}", stage_map[:, ::4, ::3, ::3], GOLDEN.get_tensor(f"{case}.map{i}"))


@pytest.mark.parametrize("variant", ["T", "T2", "S", "B", "L"])
@torch.inference_mode()
def test_equals_the_published_package(published, variant):
    variant = f"MambaVision-{variant}-1K"
    weights = published_weights(variant)
    theirs, ours = published_model(published, variant, weights), backbone(variant, weights)
    for shape in ((1, 3, 224, 224), (2, 3, 97, 131), (1, 3, 40, 250)):
        pixel_values = image(shape)
        expected = theirs(pixel_values)
        pooled, maps = ours.forward_features(pixel_values)
        actual = {"logits": ours(pixel_values), "pooled": pooled, **{f"map{i}": maps[i] for i in range(4)}}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(name, actual[name], value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_names_and_shapes_are_the_published_ones(variant):
    with torch.device("meta"):
        model = MambaVision(MambaVisionConfig(**VARIANTS[variant]), 1000)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == SHAPES[variant]


def test_mixer_kinds_alternate_in_halves(small_config):
    kinds = [
        [isinstance(b.mixer, MambaVisionMixer) for b in MambaVision(small_config).levels[i].blocks] for i in (2, 3)
    ]
    assert kinds == [[True, True, False], [True, False]]


@pytest.mark.parametrize(("batch", "last", "is_plain"), [(1, False, True), (128, False, False), (1, True, False)])
@torch.inference_mode()
def test_small_maps_spare_the_copy_of_the_last_downsamplings_weights(classifier, batch, last, is_plain):
    """With weights in channels_last there is nothing to spare."""
    reduction, seen = classifier.model.levels[2].downsample.reduction, []
    reduction.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    if last:
        reduction.to(memory_format=torch.channels_last)
    classifier(image((batch, 3, 64, 64)))
    assert seen == [is_plain]


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 3, 1, 1), (2, 3, 1, 77), (1, 3, 33, 2), (3, 3, 64, 64)])
@torch.inference_mode()
def test_any_batch_and_any_side(classifier, shape):
    output = classifier(image(shape), output_hidden_states=True)
    assert output.logits.shape == (shape[0], 5)
    height, width = shape[2:]
    for i, stage_map in enumerate(output.hidden_states):
        sides = [-(-side // 2 ** (i + 2)) for side in (height, width)]
        assert stage_map.shape == (shape[0], 16 * 2**i, *sides)
        assert stage_map.isfinite().all() and stage_map.is_contiguous()


@torch.inference_mode()
def test_images_of_a_batch_do_not_mix(classifier):
    batch = image((4, 3, 70, 50))
    together = classifier(batch).logits
    alone = torch.cat([classifier(batch[i : i + 1]).logits for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_memory_layout_and_precision_of_the_input_do_not_matter(classifier):
    pixel_values = image((2, 3, 64, 48))
    expected = classifier(pixel_values).logits
    for same in (
        pixel_values.contiguous(memory_format=torch.channels_last),
        pixel_values.double(),
        pixel_values.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(classifier(same).logits, expected, rtol=1e-4, atol=1e-5)
    channels_last = classifier.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_outputs_unpack_index_and_convert(small_config):
    model = MambaVisionModel(small_config).eval()
    pixel_values = image((2, 3, 64, 64))
    output = model(pixel_values)
    pooled, maps = output
    assert isinstance(maps, list) and len(maps) == 4 and pooled.shape == (2, 128)
    assert output.pooler_output is pooled and output[0] is pooled and output["pooler_output"] is pooled
    assert output.last_hidden_state is maps[3] and output.hidden_states == output.feature_maps == tuple(maps)
    plain = model(pixel_values, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 2 and isinstance(plain[1], list)
    torch.testing.assert_close(pooled, model.model.norm(maps[3]).mean((2, 3)))
    torch.testing.assert_close(model.model(pixel_values), pooled)
    assert list(output.keys()) == ["pooler_output", "hidden_states", "last_hidden_state"]
    assert len(model(pixel_values, output_hidden_states=True).hidden_states) == 4


def test_the_classifier_calls_its_backbone(classifier):
    """So that hooks on it, and what is put in its place, are not passed by."""
    called = []
    classifier.model.register_forward_hook(lambda *arguments: called.append(1))
    pixel_values = image((2, 3, 64, 64))
    logits = classifier(pixel_values).logits
    assert called == [1]
    output = classifier(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.logits, logits)
    assert len(output.hidden_states) == 4 and all(x.is_contiguous() for x in output.hidden_states)


BAD_INPUTS = {
    "a list": (lambda: [[0.0]], TypeError, "must be a torch.Tensor, got list"),
    "nothing": (lambda: None, TypeError, "must be a torch.Tensor, got NoneType"),
    "integers": (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8"),
    "complex": (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.complex64), TypeError, "torch.complex64"),
    "no batch": (lambda: torch.zeros(3, 8, 8), ValueError, r"\(batch, 3, height, width\), got \(3, 8, 8\)"),
    "five dimensions": (lambda: torch.zeros(1, 1, 3, 8, 8), ValueError, r"got \(1, 1, 3, 8, 8\)"),
    "channels last": (lambda: torch.zeros(1, 8, 8, 3), ValueError, r"got \(1, 8, 8, 3\)"),
    "one channel": (lambda: torch.zeros(1, 1, 8, 8), ValueError, r"got \(1, 1, 8, 8\)"),
    "no height": (lambda: torch.zeros(1, 3, 0, 8), ValueError, "at least 1 pixel"),
    "no width": (lambda: torch.zeros(1, 3, 8, 0), ValueError, "at least 1 pixel"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_input_that_is_no_image_batch_is_refused_in_one_sentence(classifier, kind):
    make, error, message = BAD_INPUTS[kind]
    with pytest.raises(error, match=message) as caught:
        classifier(make())
    assert str(caught.value).startswith("pixel_values must") and "\n" not in str(caught.value)


BAD_LABELS = {
    "above": (torch.tensor([0, 5]), ValueError, r"0 ... 4 \(or -100\), got 5"),
    "negative": (torch.tensor([-1, 0]), ValueError, "got -1"),
    "too few": (torch.tensor([0]), ValueError, r"must be 2 integers, got torch.int64 of shape \(1,\)"),
    "scalar": (torch.tensor(0), ValueError, "of shape"),
    "floats of a class each": (torch.tensor([0.0, 1.0]), ValueError, r"must have shape \(2, 5\), got \(2,\)"),
    "a list": ([0, 1], TypeError, "must be a torch.Tensor, got list"),
    "complex": (torch.zeros(2, 5, dtype=torch.complex64), TypeError, "must be real numbers, got torch.complex64"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused_in_one_sentence(classifier, kind):
    labels, error, message = BAD_LABELS[kind]
    with pytest.raises(error, match=message) as caught:
        classifier(image((2, 3, 32, 32)), labels=labels)
    assert str(caught.value).startswith("labels must") and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_single_label_loss(classifier, dtype):
    pixel_values, labels = image((3, 3, 32, 32)), torch.tensor([4, 0, 2], dtype=dtype)
    output = classifier(pixel_values, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels.long()))
    assert classifier.config.problem_type == "single_label_classification"
    loss, logits = classifier(pixel_values, labels, return_dict=False)
    assert torch.equal(loss, output["loss"]) and torch.equal(logits, output["logits"])


def test_label_of_minus_100_leaves_an_image_out(classifier):
    pixel_values = image((2, 3, 32, 32))
    loss = classifier(pixel_values, labels=torch.tensor([3, -100])).loss
    torch.testing.assert_close(loss, classifier(pixel_values[:1], labels=torch.tensor([3])).loss)


def test_multi_label_loss(classifier):
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    output = classifier(image((2, 3, 32, 32)), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))
    assert classifier.config.problem_type == "multi_label_classification"
    integers = classifier(image((2, 3, 32, 32)), labels=labels.long()).loss  # the kind is known by now
    assert torch.equal(integers, output.loss)
    soft = labels.double() * 0.9  # not rounded to float32
    output = classifier.double()(image((2, 3, 32, 32)).double(), labels=soft)
    assert torch.equal(output.loss, F.binary_cross_entropy_with_logits(output.logits, soft))


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_regression_loss(small_config, shape):
    small_config.num_labels = 1
    model = MambaVisionModelForImageClassification(small_config).eval()
    labels = torch.tensor([0.5, -2.0]).view(shape)
    output = model(image((2, 3, 32, 32)), labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.flatten(), labels.flatten()))
    assert model.config.problem_type == "regression"
    # NumPy's labels; Apple's GPUs have no float64
    doubles = model(image((2, 3, 32, 32)), labels=labels.double()).loss
    assert torch.equal(doubles, output.loss) and doubles.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses_of_single_images_and_without_numbers(classifier):
    """Per-sample gradients, and shapes alone."""
    pixel_values, labels = image((3, 3, 32, 32)), torch.tensor([4, 0, 2])
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}

    def loss(parameters, x, y):
        return torch.func.functional_call(classifier, parameters, (x[None], y[None])).loss

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, pixel_values, labels)
    classifier(pixel_values, labels).loss.backward()
    for name, parameter in classifier.named_parameters():
        expected = parameter.grad
        assert (gradients[name].mean(0) - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-7, name
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert classifier(torch.empty(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)).loss.shape == ()


def test_maps_by_the_configuration(classifier):
    classifier.config.output_hidden_states = True
    output = classifier(image((1, 3, 64, 64)))
    assert len(output.hidden_states) == 4
    assert classifier(image((1, 3, 64, 64)), output_hidden_states=False).hidden_states is None


def test_every_parameter_gets_a_gradient(small_config):
    small_config.layer_scale_conv = 0.1
    for model in (MambaVisionModelForImageClassification(small_config), MambaVisionModel(small_config)):
        output = model(image((2, 3, 64, 80)))
        output[0].square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing


def test_second_derivatives(classifier):
    """Those of a penalty of gradients, by finite differences along a direction."""
    model = copy.deepcopy(classifier).double()
    x, direction = (image((1, 3, 64, 64), seed).double() for seed in (0, 1))

    def gradient(x, **options):
        return torch.autograd.grad(model(x).logits.square().sum(), x, **options)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        x.requires_grad_()
        penalty = gradient(x, create_graph=True).square().sum()
        slope = (torch.autograd.grad(penalty, x)[0] * direction).sum().item()
    step = 1e-5
    values = [gradient((x + sign * step * direction).detach().requires_grad_()).square().sum() for sign in (1, -1)]
    assert abs(slope / ((values[0] - values[1]).item() / (2 * step)) - 1) < 1e-4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(classifier, use_reentrant):
    """Loss, gradients and BatchNorm's statistics, under stochastic depth."""
    states, calls = [], Counter()
    for module in classifier.modules():
        if isinstance(module, DropPath):
            module.rate = 0.3
        if type(module).__name__ in ("ConvBlock", "TokenBlock"):
            module.register_forward_pre_hook(lambda module, *_: calls.update([type(module).__name__]))
    start = {name: t.clone() for name, t in classifier.state_dict().items()}
    pixel_values, labels = image((4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])
    for checkpointing in (False, True):
        classifier.load_state_dict(start)
        classifier.zero_grad()
        if checkpointing:
            classifier.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert classifier.is_gradient_checkpointing
        classifier.train()
        torch.manual_seed(3)
        calls.clear()
        loss = classifier(pixel_values, labels=labels).loss
        loss.backward()
        # the convolution blocks' BatchNorm would count its batch twice
        assert calls == {"ConvBlock": 2, "TokenBlock": 10 if checkpointing else 5}
        gradients = {name: p.grad.clone() for name, p in classifier.named_parameters()}
        statistics = {name: b.clone() for name, b in classifier.named_buffers()}
        states.append((loss.detach(), gradients, statistics))
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_behind_a_frozen_front(classifier, use_reentrant):
    for module in (classifier.model.patch_embed, *classifier.model.levels[:2]):
        module.requires_grad_(False)
    gradients = []
    for checkpointing in (False, True):
        classifier.zero_grad()
        if checkpointing:
            classifier.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        classifier.train()(image((2, 3, 64, 64))).logits.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in classifier.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["conv1d_x", "conv1d_z"])
@pytest.mark.parametrize(
    "change",
    [dict(bias=True), dict(dilation=2, padding=2), dict(padding_mode="circular"), dict(kernel_size=5, padding=2)],
)
@torch.no_grad()
def test_another_convolution_in_the_mixer_is_called(name, change):
    torch.manual_seed(0)
    mixer, x, seen = MambaVisionMixer(32), torch.randn(2, 9, 32), []
    nn.init.normal_(mixer.A_log)
    nn.init.normal_(mixer.D)
    conv = nn.Conv1d(16, 16, **{**dict(kernel_size=3, padding=1, groups=16, bias=False), **change})
    setattr(mixer, name, conv)
    value = mixer(x)
    conv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(value, mixer(x))
    assert seen


@pytest.mark.parametrize("change", [None, "module", "adapter", "subclass", "none", "hook", "forward", "gathered"])
@torch.no_grad()
def test_the_bias_of_dt_proj_counts_twice_whatever_stands_there(change, monkeypatch):
    """Read from the layer, whatever it computes, as the published code does; asked of what else is in its place."""
    weights, forward, product = [], StepProjection.forward, F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: weights.append(weight) or product(x, weight, bias))
    mixer, x = MambaVisionMixer(32).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    expected, own, more = copy.deepcopy(mixer), mixer.dt_proj, 0  # more: on each of the two, so 0.5 where 1 counts once
    if change == "module":
        mixer.dt_proj = nn.Sequential(own)
    elif change == "adapter":
        mixer.dt_proj = nn.Sequential(own)
        mixer.dt_proj.register_forward_hook(lambda module, args, output: output + 1)
        more = 1
    elif change == "none":
        own.bias = None
        more = -expected.dt_proj.bias.clone()
    elif change == "subclass":
        own.__class__ = type("Adapted", (StepProjection,), {"forward": lambda self, dt: forward(self, dt) + 1})
        more = 0.5
    elif change == "hook":
        own.register_forward_hook(lambda module, args, output: output + 1)
        more = 0.5
    elif change == "forward":
        own.forward = lambda dt: F.linear(dt, own.weight, own.bias + 1)
        more = 0.5
    elif change == "gathered":  # as by sharding: numbers only while the layer is called
        bias, own.bias.data = own.bias.data, own.bias.data[:0]
        own.register_forward_pre_hook(lambda module, args: setattr(own.bias, "data", bias))
        own.register_forward_hook(lambda module, args, output: setattr(own.bias, "data", bias[:0]))
    value = mixer(x)
    assert change or sum(weight is own.weight for weight in weights) == 1
    expected.dt_proj.bias += more
    torch.testing.assert_close(value, expected(x))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1000), (torch.float16, 1)])
@torch.inference_mode()
def test_half_precision_of_a_published_size_stays_finite(dtype, scale):
    model = backbone("MambaVision-T-1K", published_weights("MambaVision-T-1K")).to(dtype)
    pooled, maps = model.forward_features(scale * image((1, 3, 64, 64)))
    assert all(x.isfinite().all() and x.dtype == dtype for x in (pooled, model.head(pooled), *maps))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1000), (torch.float16, 1)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_stays_finite_and_close(classifier, dtype, scale, autocast):
    pixel_values = scale * image((2, 3, 64, 64))
    with torch.inference_mode():
        expected = classifier(pixel_values).logits
    model = classifier if autocast else classifier.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = model(pixel_values, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # a bf16 step is 0.8 %, an fp16 step 0.1 %; a dozen layers in a row
    bound = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (output.logits.float() - expected).abs().max() < bound * expected.std()


@pytest.fixture(params=["AVX2", "AVX512", "AVX512 and AMX"])
def processor(request, monkeypatch):
    """What the model takes the processor for.

    Without AVX-512 it leaves more of the layers to torch, and without AMX it computes half precision in float32.
    """
    capability = request.param.split()[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        has_avx512 = fusion_mambavision._has_avx512.__wrapped__()
    monkeypatch.setattr(fusion_mambavision, "_has_avx512", lambda: has_avx512)
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: "AMX" not in request.param)
    if capability == "AVX2":
        for module in (fusion_mambavision, selective_scan):
            monkeypatch.setattr(module, "ONEDNN_DTYPES", selective_scan.ONEDNN_DTYPES[:1])
    return capability


@pytest.fixture(params=["direct", "winograd"])
def any_size_pays(request, monkeypatch):
    """Small models too are computed by oneDNN, and their convolution blocks by it or by Winograd's algorithm."""
    for name in ("_LEAST_WORK", "_LEAST_WIDTH", "_LEAST_MAP", "_LEAST_USES"):
        monkeypatch.setattr(fusion_mambavision, name, 0)
    monkeypatch.setattr(winograd, "CALL_COST", math.inf if request.param == "direct" else -math.inf)
    monkeypatch.setattr(winograd, "_cores_share_a_cache", lambda: True)
    return request.param


@torch.inference_mode()
def test_the_faster_operators_are_taken(classifier, processor, any_size_pays):
    has_onednn = torch.backends.mkldnn.is_available()
    for model in (classifier, classifier.fuse()):
        with torch.profiler.profile(record_shapes=True) as profile:
            model(image((2, 3, 128, 128)))
        called = {event.key: event.count for event in profile.key_averages()}
        has_linear = has_onednn and processor == "AVX512"
        assert ("mkldnn::_linear_pointwise" in called) == has_linear
        convolutions = called.get("mkldnn::_convolution_pointwise", 0)
        if model.is_fused:
            assert (convolutions > 0) == has_onednn
        else:  # the stem's, and those of the blocks
            blocks = sum(model.config.depths[:2]) if any_size_pays == "direct" else 0
            assert convolutions == (2 + 2 * blocks) * has_linear
        assert ("aten::unfold" in called) == (has_onednn and any_size_pays == "winograd")  # of maps into patches
        if has_onednn:  # the one behind the last map alone is not folded
            assert norms_of_maps(profile) == 1
        if model.is_fused and has_onednn and any_size_pays == "direct":  # blocks' inputs are added by their layers
            mixers = sum(isinstance(module, MambaVisionMixer) for module in model.modules())
            by_torch = 0 if has_linear else 2 * sum(model.config.depths[2:])
            assert called["aten::add"] - mixers == by_torch
            assert called.get("aten::add_", 0) == (0 if has_linear else sum(model.config.depths[:2]))


@torch.inference_mode()
def test_large_and_wide_products_alone_are_onednns(monkeypatch):
    monkeypatch.setattr(fusion_mambavision, "_has_avx512", torch.backends.mkldnn.is_available)
    for tokens, width, is_onednns in ((400, 160, True), (300, 160, False), (3000, 36, False)):
        with torch.profiler.profile() as profile:
            fusion_mambavision.linear(torch.randn(tokens, 160), nn.Linear(160, width))
        by_onednn = "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
        assert by_onednn == (is_onednns and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("has_gamma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_convolution_norm_and_layer_scale_are_rounded_once(dtype, has_gamma, layout):
    conv, norm = nn.Conv2d(8, 16, 3).to(dtype, memory_format=layout), nn.BatchNorm2d(16).to(dtype).eval()
    gamma = torch.rand(16).to(dtype) if has_gamma else None
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        tensor.uniform_(0.5, 2)
    folded = fusion_mambavision._folded(conv, norm, gamma)
    assert folded.weight.is_contiguous(memory_format=layout)
    exact_conv, exact_norm = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    exact_gamma = gamma.double() if has_gamma else torch.ones(16).double()
    factor = exact_gamma * exact_norm.weight / (exact_norm.running_var + norm.eps).sqrt()
    bias = exact_gamma * exact_norm.bias + (exact_conv.bias - exact_norm.running_mean) * factor
    for value, expected in ((folded.weight, exact_conv.weight * factor[:, None, None, None]), (folded.bias, bias)):
        assert value.dtype == dtype and not value.requires_grad
        assert ((value - expected).abs() <= 0.5 * torch.finfo(dtype).eps * expected.abs() + 5e-7).all()


@pytest.mark.usefixtures("any_size_pays")
@pytest.mark.parametrize("change", ["buffer", "attribute", "deleted"])
@torch.no_grad()
def test_a_layer_whose_bias_is_no_parameter_is_called(change):
    linear, conv = nn.Linear(8, 16), nn.Conv2d(8, 8, 3, padding=1)
    norm, x, pixels = nn.BatchNorm2d(8).eval(), torch.randn(2, 5, 8), torch.randn(1, 8, 9, 9)
    for layer in (linear, conv, norm):
        bias = layer.bias.detach()
        del layer.bias
        if change == "buffer":
            layer.register_buffer("bias", bias)
        else:
            layer.bias = bias if change == "attribute" else None
    torch.testing.assert_close(fusion_mambavision.linear(x, linear), linear(x))
    torch.testing.assert_close(fusion_mambavision.convolution(pixels, conv, norm), norm(conv(pixels)))


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.PReLU(), "hooked", None])
@torch.no_grad()
def test_any_activation_follows_a_convolution(activation):
    if activation == "hooked":
        activation = nn.GELU("tanh")
        activation.register_forward_hook(lambda module, args, output: output + 1)
    conv, norm, x = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16).eval(), torch.randn(2, 8, 13, 9)
    expected = norm.double()(conv.double()(x.double()))
    expected = expected if activation is None else activation.double()(expected)
    conv, norm, activation = conv.float(), norm.float(), activation and activation.float()
    value = fusion_mambavision.convolution(x, conv, norm, activation)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    if type(activation) is nn.GELU:
        value = fusion_mambavision.FusedConv2d(fusion_mambavision._folded(conv, norm), activation)(x)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    x[1] = float("nan")
    value = fusion_mambavision.convolution(x, conv, norm, activation)
    assert value[1].isnan().all() and not value[0].isnan().any()


def test_blocks_are_traced_symbolically(classifier):
    """By torch.fx, which gives them proxies in the place of tensors."""
    for block, x in (
        (classifier.model.levels[0].blocks[0], torch.randn(1, 16, 8, 8)),
        (classifier.model.levels[2].blocks[0].mlp, torch.randn(1, 4, 64)),
    ):
        torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))


@torch.no_grad()
def test_norms_behind_large_maps_alone_are_folded():
    conv, norm = nn.Conv2d(160, 160, 3, padding=1), nn.BatchNorm2d(160).eval()  # T's second stage
    for side, is_folded in ((28, True), (14, False)):
        with torch.profiler.profile(record_shapes=True) as profile:
            fusion_mambavision.convolution(image((1, 160, side, side)), conv, norm)
        assert norms_of_maps(profile) != (is_folded and torch.backends.mkldnn.is_available())


@pytest.mark.usefixtures("any_size_pays")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.inference_mode()
def test_a_default_device_changes_nothing(classifier, device):
    """It is where new tensors go, and a mode that torch asks at every function."""
    pixel_values = image((2, 3, 64, 64))
    for model in (classifier, classifier.fuse()):
        expected = model(pixel_values).logits
        winograd._transforms.cache_clear()
        with torch.device(device), torch.profiler.profile(record_shapes=True) as profile:
            logits = model(pixel_values).logits
        assert torch.equal(logits, expected)
        # the one behind the last map alone is not folded
        assert (norms_of_maps(profile) == 1) == torch.backends.mkldnn.is_available()


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_onednn_can_be_turned_off(classifier, monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    classifier.to(dtype)
    for model in (classifier, classifier.fuse()):
        with torch.profiler.profile() as profile:
            model(image((2, 3, 64, 64)))
        assert not any("mkldnn" in event.key for event in profile.key_averages())


@pytest.mark.usefixtures("processor", "any_size_pays")
def test_the_faster_operators_compute_the_same(classifier):
    """With gradients none of them can run."""
    pixel_values = image((2, 3, 70, 50))
    expected = classifier(pixel_values).logits.detach()
    with torch.no_grad():
        assert (classifier(pixel_values).logits - expected).abs().max() < 1e-5 * expected.std()
    expected = classifier.to(torch.bfloat16)(pixel_values).logits.detach().float()
    with torch.no_grad():
        assert (classifier(pixel_values).logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.usefixtures("any_size_pays")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_fused", [False, True])
@torch.no_grad()
def test_slow_half_precision_is_computed_in_float32(monkeypatch, dtype, is_fused):
    """Each layer's result is the exact one of its weights, rounded once: in float64, plus float32's errors."""
    seen, largest, step = [], torch.finfo(dtype).max, torch.finfo(dtype).eps
    has_onednn = torch.backends.mkldnn.is_available()
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: True)
    for name in ("_linear", "_convolve", "winograd_convolution"):
        function = getattr(fusion_mambavision, name)
        monkeypatch.setattr(
            fusion_mambavision, name, lambda x, *args, function=function: (seen.append(x.dtype), function(x, *args))[1]
        )

    def assert_rounded_once(value, exact):
        assert value.dtype == dtype and exact.abs().max() < largest
        assert not has_onednn or ((value - exact).abs() <= 0.5 * step * exact.abs() + 1e-5 * exact.std()).all()

    def exact(layer):
        return copy.deepcopy(layer).double()

    layer, gelu = nn.Linear(64, 96).to(dtype), nn.GELU()
    x = torch.randn(2, 49, 64).to(dtype)
    fast = fusion_mambavision.FusedLinear(copy.deepcopy(layer), gelu) if is_fused else None
    for least_work in (0, math.inf):  # by oneDNN's operator, and by torch's
        monkeypatch.setattr(fusion_mambavision, "_LEAST_WORK", least_work)
        with torch.profiler.profile() as profile:
            value = fast(x) if is_fused else fusion_mambavision.linear(x, layer, gelu)
        assert_rounded_once(value, gelu(exact(layer)(x.double())))
        by_onednn = "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
        assert by_onednn == (has_onednn and fusion_mambavision._has_avx512() and least_work == 0)

    x = torch.randn(2, 16, 30, 20).to(dtype, memory_format=torch.channels_last)
    conv, norm, tanh = nn.Conv2d(16, 24, 3, 1, 1).to(dtype), nn.BatchNorm2d(24).to(dtype).eval(), nn.GELU("tanh")
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        tensor.uniform_(0.5, 2)
    down = nn.Conv2d(16, 24, 3, 2, 1, bias=False).to(dtype)
    if is_fused:  # the folded weights are kept in half precision
        conv = fusion_mambavision._folded(conv, norm)
        assert_rounded_once(fusion_mambavision.FusedConv2d(copy.deepcopy(conv))(x), exact(conv)(x.double()))
        assert_rounded_once(fusion_mambavision.FusedConv2d(copy.deepcopy(down))(x), exact(down)(x.double()))
    else:
        assert_rounded_once(
            fusion_mambavision.convolution(x, conv, norm, tanh), tanh(exact(norm)(exact(conv)(x.double())))
        )
        assert_rounded_once(fusion_mambavision.convolution(x, down, None), exact(down)(x.double()))
    assert seen == [torch.float32] * 4 * has_onednn
    torch.testing.assert_close(fusion_mambavision.convolution(x[0], down, None), down(x[0]))  # a map without a batch


OLDER_PROCESSOR = """
import functools, platform, sys, torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

is_x86, weights = platform.machine() == "x86_64", []
assert not (is_x86 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def note(function, x, weight, *args):  # what torch's own layers call
    weights.append(weight)
    return function(x, weight, *args)


F.linear, F.conv2d = functools.partial(note, F.linear), functools.partial(note, F.conv2d)
torch.manual_seed(0)
pixel_values = torch.randn(2, 3, 56, 56)
load = AutoModelForImageClassification.from_pretrained
with torch.inference_mode():
    expected = load(sys.argv[1], trust_remote_code=True)(pixel_values).logits
    for dtype in (torch.bfloat16, torch.float16):
        half = load(sys.argv[1], trust_remote_code=True, dtype=dtype)
        for model in (half, half.fuse()):
            weights.clear()
            with torch.profiler.profile() as profile:
                logits = model(pixel_values).logits
            assert logits.dtype == dtype and (logits - expected).abs().max() < 0.1 * expected.std()
            called = {id(weight) for weight in weights}
            in_half = {name.split(".")[-2] for name, weight in model.named_parameters() if id(weight) in called}
            assert not is_x86 or in_half == {"head"}, in_half
            assert not any("slow_conv" in event.key for event in profile.key_averages())
"""


def test_half_precision_on_a_processor_without_it():
    """Torch's own operators take 8 times as long in half precision, 20 times for convolutions: small ones alone."""
    run_python(OLDER_PROCESSOR, ROOT, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")


@torch.no_grad()
def test_small_layers_in_half_precision_stay_in_it(monkeypatch):
    """Bringing their weights to float32 would take longer; those of a fused copy are kept in it."""
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: True)
    monkeypatch.setattr(fusion_mambavision, "ONEDNN_DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    precision = fusion_mambavision._precision
    for dtype in (torch.bfloat16, torch.float16):
        layer, conv = nn.Linear(64, 96).to(dtype), nn.Conv2d(64, 96, 3, 2, 1).to(dtype)
        for positions, expected in ((99, dtype), (100, torch.float32)):
            assert precision(torch.zeros(1, positions, 64, dtype=dtype), layer) == expected
            assert precision(torch.zeros(1, 64, 4, positions, dtype=dtype), conv) == expected
        assert precision(torch.zeros(1, 1, 64, dtype=dtype), layer, is_prepared=True) == torch.float32
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(fusion_mambavision, "is_plain", lambda x, *layers: True)
        patch.setattr(fusion_mambavision, "_linear", lambda x, weight, *_: seen.extend((x, weight)) or x)
        fusion_mambavision.FusedLinear(layer)(torch.zeros(1, 4, 64, dtype=dtype))
    assert [x.dtype for x in seen] == [torch.float32] * 2
    monkeypatch.setattr(fusion_mambavision, "ONEDNN_DTYPES", (torch.float32,))
    assert precision(torch.zeros(1, 1, 64, dtype=dtype), layer) == torch.float32
    assert precision(torch.zeros(1, 999, 64), nn.Linear(64, 96)) == torch.float32
    assert precision(torch.zeros(1, 999, 64).double(), nn.Linear(64, 96).double()) == torch.float64


@pytest.mark.parametrize(
    "cpuinfo, bfloat16, float16",
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16 avx512_fp16", True, True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16 amx_bf16 amx_tile avx512_fp16", False, True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: amx_bf16 avx512_fp16 amx_fp16", False, False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512f", True, True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f avx512_bf16", False, True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f", True, True),
        ("CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16", False, False),
        (None, False, False),
    ],
)
def test_where_half_precision_is_slow(monkeypatch, cpuinfo, bfloat16, float16):
    def read_text(self, **_):
        assert str(self) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError
        return f"processor\t: 0\n{cpuinfo}\nbugs\t: none\n"

    monkeypatch.setattr(selective_scan.Path, "read_text", read_text)
    monkeypatch.setattr(fusion_mambavision, "_flags", fusion_mambavision._flags.__wrapped__)
    is_slow = fusion_mambavision._is_slow.__wrapped__
    for knows in (True, False):
        monkeypatch.setattr(fusion_mambavision, "ONEDNN_DTYPES", (torch.bfloat16, torch.float16) if knows else ())
        assert is_slow(torch.bfloat16) == (bfloat16 or not knows)
        assert is_slow(torch.float16) == (float16 or not knows)


@torch.no_grad()
def test_weights_stay_as_they_are_where_onednn_would_be_slower(monkeypatch):
    """With what they are packed by is noted, for a processor without bfloat16 cannot."""
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: False)
    monkeypatch.setattr(fusion_mambavision, "_onednn_is_faster", lambda x, layer: True)
    monkeypatch.setattr(fusion_mambavision, "ONEDNN_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(fusion_mambavision.FusedLinear, "_pack", lambda self, pack, dtype: pack)
    packed = []
    monkeypatch.setattr(
        fusion_mambavision, "_linear", lambda x, pack, *rest: packed.append(pack is not torch.Tensor.contiguous) or x
    )
    for flags, dtype, tokens, expected in (
        ("amx_tile", torch.bfloat16, 48, True),
        ("amx_tile", torch.bfloat16, 49, False),
        ("amx_tile", torch.bfloat16, 95, False),
        ("amx_tile", torch.bfloat16, 96, True),
        ("amx_tile", torch.float32, 49, True),
        ("avx512f", torch.bfloat16, 49, True),
    ):
        monkeypatch.setattr(fusion_mambavision, "_flags", lambda flags=flags: {flags})
        fusion_mambavision.FusedLinear(nn.Linear(32, 96).to(dtype))(torch.zeros(1, tokens, 32, dtype=dtype))
        assert packed.pop() == expected, (flags, dtype, tokens)


@torch.no_grad()
@pytest.mark.parametrize("least", [0, math.inf])
def test_convolutions_as_products_of_patches(monkeypatch, least):
    monkeypatch.setattr(fusion_mambavision, "_LEAST_WEIGHTS_AS_THEY_LIE", least)
    x = image((2, 8, 7, 5)).contiguous(memory_format=torch.channels_last)
    for conv in (nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, (3, 2), (1, 2), (0, 1), bias=False)):
        y = fusion_mambavision._multiply_patches(x, conv, conv.weight, conv.bias)
        torch.testing.assert_close(y, conv(x))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_where_patches_are_faster(monkeypatch):
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: False)
    conv = nn.Conv2d(8, 16, 3, 2, 1)  # 1152 weights
    for flags, dtype, most in (
        ("amx_tile", torch.float32, 115),
        ("avx512f", torch.bfloat16, 115),
        ("amx_tile", torch.bfloat16, 384),
    ):
        monkeypatch.setattr(fusion_mambavision, "_flags", lambda flags=flags: {flags})
        for pixels in range(1, 60):
            x = torch.zeros(1, 8, 1, pixels, dtype=dtype)
            assert fusion_mambavision._patches_pay(x, conv.to(dtype)) == (8 * pixels <= most)


@pytest.mark.parametrize("is_arm", [True, False])
@pytest.mark.parametrize("features", ["fp asimd fphp asimdhp", "fp asimd fphp asimdhp asimdfhm"])
def test_float16_on_an_arm_that_multiplies_it_by_reference_code(monkeypatch, is_arm, features):
    """Though oneDNN says that it supports float16 there."""
    supported = SimpleNamespace(
        _linear_pointwise=None, _is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: True
    )
    monkeypatch.setattr(torch.ops, "mkldnn", supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(selective_scan, "_IS_ARM", is_arm)
    monkeypatch.setattr(selective_scan, "cpuinfo", lambda: f"processor\t: 0\nFeatures\t: {features}\n")
    has_float16 = not is_arm or "asimdfhm" in features
    expected = (torch.float32, torch.bfloat16) + (torch.float16,) * has_float16
    assert selective_scan._onednn_dtypes() == expected


@pytest.mark.usefixtures("processor", "any_size_pays")
@torch.no_grad()
def test_who_looks_on_sees_every_layer(classifier, monkeypatch):
    """Hooks of single modules and of all, and what counts or records operators."""
    pixel_values, seen = image((1, 3, 64, 64)), []
    kinds = (nn.Linear, nn.GELU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    layers = {module for module in classifier.modules() if type(module) in kinds}

    def note(module, *_):
        seen.append(module)

    handles = [layer.register_forward_hook(note) for layer in layers]
    classifier(pixel_values)
    assert len(seen) == len(layers) and set(seen) == layers
    for handle in handles:
        handle.remove()
    leaves = {module for module in classifier.modules() if not list(module.children())}
    for kind in ("forward", "forward_pre"):
        seen.clear()
        handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(note)
        try:
            classifier(pixel_values)
        finally:
            handle.remove()
        assert set(seen) >= leaves
    for kind in ("_global_backward_hooks", "_global_backward_pre_hooks"):  # which run where gradients are recorded
        with monkeypatch.context() as patch:
            patch.setitem(getattr(nn.modules.module, kind), 0, note)
            assert not any(map(fusion_mambavision.is_untouched, layers))
    seen.clear()
    inner = [m for name, m in classifier.named_modules() if name.endswith(("conv1d_x", "conv1d_z", "reduction.0"))]
    for module in inner:
        module.register_full_backward_hook(note)
    with torch.enable_grad():
        classifier(pixel_values).logits.sum().backward()
    assert len(seen) == len(inner) and set(seen) == set(inner)
    for module in inner:
        module._backward_hooks.clear()
    with FlopCounterMode(display=False) as counter:
        classifier(pixel_values)
    with torch.enable_grad(), FlopCounterMode(display=False) as plain:
        classifier(pixel_values)
    assert counter.get_total_flops() == plain.get_total_flops()
    with CountLinear() as functions:
        classifier(pixel_values)
    with torch.enable_grad(), CountLinear() as all_functions:
        classifier(pixel_values)
    assert functions.count == all_functions.count > 0
    with ListOperators() as operators:
        classifier(pixel_values)
    assert "aten::addmm" in operators.names and "aten::convolution" in operators.names
    assert not [name for name in operators.names if name.startswith("mkldnn")]


class ListOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


class CountLinear(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is F.linear
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("fused", [False, True])
def test_what_the_faster_operators_would_get_wrong_is_left_to_torch(classifier, fused):
    """Gradients of biases alone; biases that are a view; sparse weights; other activations; what is not a number."""
    mlp, block = classifier.model.levels[2].blocks[0].mlp, classifier.model.levels[0].blocks[0]
    pixel_values = image((1, 3, 64, 64))
    mlp.fc2.bias = nn.Parameter(torch.randn(1).expand(len(mlp.fc2.bias)))
    block.act1 = nn.SiLU()
    expected = classifier(pixel_values).logits.detach()  # parameters that want gradients keep the operators away
    model = classifier.requires_grad_(False)
    model = model.fuse() if fused else model
    fc1 = model.model.levels[2].blocks[0].mlp.fc1
    fc1 = fc1.layer if fused else fc1
    fc1.weight = nn.Parameter(fc1.weight.to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        assert (model(pixel_values).logits - expected).abs().max() < 1e-5 * expected.std()
        assert model(pixel_values.fill_(float("nan"))).logits.isnan().all()
    bias = model.model.levels[2].blocks[1].mlp.fc1.bias.requires_grad_()
    assert torch.autograd.grad(model(image((1, 3, 64, 64))).logits.sum(), bias)[0].abs().sum() > 0


CHANGES = {
    "padding of a mirror": lambda net: setattr(net.levels[0].blocks[0].conv1, "padding_mode", "reflect"),
    "padding by name": lambda net: setattr(net.levels[0].blocks[0].conv1, "padding", "same"),
    "norm in training": lambda net: net.levels[0].blocks[0].norm1.train(),
    "last norm in training": lambda net: net.norm.train(),
    "norm without statistics": lambda net: without_statistics(net.levels[0].blocks[0].norm2),
    "last norm without statistics": lambda net: without_statistics(net.norm),
    "norm without weights": lambda net: setattr(net.levels[0].blocks[0], "norm2", nn.BatchNorm2d(16, affine=False)),
    "norm without biases": lambda net: setattr(net.levels[0].blocks[0].norm2, "bias", None),
    "another norm": lambda net: setattr(net.levels[0].blocks[0], "norm1", nn.GroupNorm(2, 16)),
    "no norm": lambda net: setattr(net.levels[0].blocks[0], "norm1", nn.Identity()),
    "replaced forward": lambda net: setattr(net.levels[0].blocks[0].norm2, "forward", torch.sin),
    "bias without a stride": lambda net: expand(net.levels[0].blocks[0].norm1, "bias"),
    "weight without a stride": lambda net: expand(net.levels[2].blocks[0].mlp.fc2, "weight"),
    "other activation in the stem": lambda net: setattr(net.patch_embed.conv_down[2], "forward", torch.sigmoid),
    "other activation in a block": lambda net: setattr(net.levels[0].blocks[0].act1, "forward", torch.sigmoid),
    "largest in place of the average": lambda net: take_largest(net),
    "gated MLP": lambda net: setattr(net.levels[2].blocks[0], "mlp", GluMlp(64, 128, act_layer=nn.GELU)),
    "norm before the convolution": lambda net: net.levels[0].blocks.insert(1, PreActivationBlock(16).eval()),
    "other MLP": lambda net: setattr(net.levels[2].blocks[0], "mlp", nn.Tanh()),
    "longer step between stages": lambda net: net.levels[0].downsample.reduction.append(nn.Tanh()),
    "other step between stages": lambda net: setattr(
        net.levels[0].downsample, "reduction", nn.Conv2d(16, 32, 2, 2, padding=1)
    ),
    "longer stem": lambda net: net.patch_embed.conv_down.append(nn.Tanh()),
    "one convolution as stem": lambda net: setattr(net.patch_embed, "conv_down", nn.Sequential(nn.Conv2d(3, 16, 4, 4))),
    "wrapped convolution in the stem": lambda net: net.patch_embed.conv_down.insert(
        3, nn.Sequential(net.patch_embed.conv_down.pop(3))
    ),
    "other average": lambda net: setattr(net.avgpool, "forward", lambda x: x.amax((2, 3), keepdim=True)),
    "replaced forward of an MLP": lambda net: setattr(
        net.levels[2].blocks[0].mlp, "forward", partial(half_an_mlp, net.levels[2].blocks[0].mlp)
    ),
    "other stochastic depth": lambda net: setattr(net.levels[2].blocks[0], "drop_path", nn.Tanh()),
    "other stochastic depth of convolutions": lambda net: setattr(net.levels[0].blocks[0], "drop_path", nn.Tanh()),
    "hooked stochastic depth": lambda net: net.levels[2].blocks[0].drop_path.register_forward_hook(bent),
    "hooked mixer": lambda net: net.levels[2].blocks[0].mixer.register_forward_hook(bent),
    "hooked attention": lambda net: net.levels[2].blocks[-1].mixer.register_forward_hook(bent),
    "other end of the attention": lambda net: setattr(net.levels[2].blocks[-1].mixer, "proj_drop", nn.Tanh()),
    "hooked end of the attention": lambda net: net.levels[2].blocks[-1].mixer.proj_drop.register_forward_hook(bent),
    "norm of the keys": lambda net: setattr(net.levels[2].blocks[-1].mixer, "k_norm", nn.Tanh()),
    "another block of tokens": lambda net: net.levels[2].blocks.insert(1, nn.Tanh()),
    "wider convolution of tokens": lambda net: setattr(
        net.levels[2].blocks[0].mixer, "conv1d_z", nn.Conv1d(32, 32, 5, padding=2, groups=32, bias=False)
    ),
    "wrapped projection of steps": lambda net: wrap(net.levels[2].blocks[0].mixer, "dt_proj"),
    "projection of steps without a bias": lambda net: setattr(net.levels[2].blocks[0].mixer.dt_proj, "bias", None),
    "kind of attention": lambda net: setattr(net.levels[2].blocks[-1].mixer, "__class__", NegativeAttention),
    "layer scale": lambda net: setattr(net.levels[2].blocks[0], "gamma_1", nn.Parameter(torch.randn(64))),
    "layer scale of convolutions": lambda net: setattr(net.levels[0].blocks[0], "gamma", nn.Parameter(torch.randn(16))),
    "shared convolutions": lambda net: setattr(net.levels[1].blocks[0], "conv2", net.levels[1].blocks[0].conv1),
    "shared MLPs": lambda net: setattr(net.levels[2].blocks[0], "mlp", net.levels[2].blocks[1].mlp),
}


def wrap(parent, name):
    setattr(parent, name, nn.Sequential(getattr(parent, name)))


def half_an_mlp(mlp, x):
    return mlp.fc2(mlp.fc1(x))


def bent(module, inputs, output):
    return output.sin()


class NegativeAttention(Attention):
    def forward(self, x):
        return -super().forward(x)


class PreActivationBlock(nn.Module):
    """With the names of the model's own layers, in another order."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1), nn.Conv2d(dim, dim, 3, 1, 1)
        nn.init.uniform_(self.norm1.bias)

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu()).relu()))


def without_statistics(norm):
    norm.running_mean = norm.running_var = None


def take_largest(net):
    net.avgpool = nn.AdaptiveMaxPool2d(1)
    net.norm.weight.data.neg_()  # or the largest before the norm is the largest behind it


def expand(layer, name):
    parameter = getattr(layer, name)
    setattr(layer, name, nn.Parameter(torch.randn_like(parameter[:1]).expand_as(parameter)))


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_compute_what_they_say(classifier, change, fused):
    pixel_values = image((2, 3, 64, 64))
    CHANGES[change](classifier.model)
    model = classifier.fuse() if fused else classifier
    with torch.enable_grad():  # parameters that want gradients keep the operators away
        expected = classifier(pixel_values).logits.detach()
    with torch.no_grad():
        assert (model(pixel_values).logits - expected).abs().max() < 1e-5 * expected.std()


BRANCHES = [name for name in CHANGES if "attention" in name or name.startswith(("hooked", "replaced"))]


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("change", BRANCHES)
def test_changed_branches_without_layer_scale_compute_what_they_say(classifier, change):
    """Whose last layers would otherwise add the block's input."""
    for level in classifier.model.levels[2:]:
        for block in level.blocks:
            block.gamma_1 = block.gamma_2 = None
    test_changed_layers_compute_what_they_say(classifier, change, fused=False)


@pytest.mark.parametrize("fused", [False, True])
def test_what_hooks_are_given_stays_as_it_was(classifier, fused):
    """Without gradients a mixer writes over what it needs no more."""
    model = classifier.fuse() if fused else classifier
    projection = model.model.levels[2].blocks[0].mixer.x_proj
    seen, plain = [], model(image((2, 3, 64, 64))).logits.detach()
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            logits = model(image((2, 3, 64, 64))).logits
            assert (logits - plain).abs().max() < 1e-5 * plain.std()
            torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-5)
    handle.remove()
    assert len(seen) == 3


@pytest.mark.usefixtures("any_size_pays")
@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize(
    "kind, name",
    [
        (nn.Linear, "forward"),
        (nn.Conv1d, "forward"),
        (nn.Conv1d, "_conv_forward"),
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.GELU, "forward"),
        (MambaVisionMixer, "forward"),
        (Attention, "forward"),
        (Mlp, "forward"),
        (DropPath, "forward"),
    ],
)
def test_layers_whose_code_was_replaced_are_called(classifier, monkeypatch, kind, name, where):
    pixel_values, plain = image((2, 3, 64, 64)), classifier(image((2, 3, 64, 64))).logits.detach()
    original = getattr(kind, name)

    @wraps(original)
    def halved(self, *args):
        return original(self, *args) / 2

    if where == "class":
        monkeypatch.setattr(kind, name, halved)
    for layer in classifier.modules() if where == "instance" else ():
        if type(layer) is kind:
            setattr(layer, name, halved.__get__(layer))
    expected = classifier(pixel_values).logits.detach()
    assert (expected - plain).abs().max() > 1e-3 * plain.std()
    with torch.inference_mode():
        for model in (classifier, classifier.fuse()):
            assert (model(pixel_values).logits - expected).abs().max() < 1e-5 * expected.std()


def leave_no_numbers_behind():
    """Memory that is free now holds what shows in sums."""
    for tensor in [torch.empty(100_000) for _ in range(8)]:
        tensor.fill_(math.nan)


@pytest.mark.parametrize("size", [(300, 32), (230, 5), (36, 4), (15, 1), (999, 1)])
@pytest.mark.parametrize("how", ["direct", "fused", "recorded", "autocast"])
def test_maps_of_one_or_two_columns_in_half_precision(classifier, size, how):
    """oneDNN's convolutions with AMX read beyond them."""
    pixel_values = image((2, 3, *size))
    expected = classifier(pixel_values).logits.detach()
    model = classifier if how == "autocast" else classifier.bfloat16()
    model = model.fuse() if how == "fused" else model
    leave_no_numbers_behind()
    with torch.set_grad_enabled(how == "recorded"), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        value = model(pixel_values).logits
    assert (value - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiled_convolution_of_two_columns(classifier):
    """In a graph of free width, too, which has a second form for these."""
    patch_embed = classifier.bfloat16().model.patch_embed
    torch.compiler.reset()
    compiled = torch.compile(patch_embed, backend="aot_eager", fullgraph=True)
    for width in (64, 2):
        pixel_values = image((2, 3, 300, width)).bfloat16()
        torch._dynamo.maybe_mark_dynamic(pixel_values, 3)
        expected = copy.deepcopy(patch_embed).float()(pixel_values.float())
        leave_no_numbers_behind()
        assert (compiled(pixel_values) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("size", [(36, 4), (36, 2), (15, 1), (999, 1)])
def test_training_on_maps_of_one_or_two_columns_under_autocast(classifier, size):
    """The same, with the statistics of a batch, and weights' gradients."""
    stem, other = classifier.model.patch_embed.train(), copy.deepcopy(classifier.model.patch_embed)
    pixel_values = image((4, 3, *size))
    expected = other(pixel_values)
    weight = image(expected.shape)
    (expected * weight).sum().backward()
    leave_no_numbers_behind()
    with torch.autocast("cpu", torch.bfloat16):
        value = stem(pixel_values)
    leave_no_numbers_behind()
    (value * weight).sum().backward()
    assert (value - expected).norm() < 0.03 * expected.norm()
    for x, y in zip(stem.buffers(), other.buffers(), strict=True):
        assert (x - y).abs().max() < 0.03 * y.abs().max()
    for x, y in zip(stem.parameters(), other.parameters(), strict=True):
        assert (x.grad - y.grad).norm() < 0.3 * y.grad.norm()  # up to 0.15 of maps of one row, too


REPLACED_CODE = {  # that computes something else, were it fused as if it were the model's own
    PatchEmbed: lambda self, x: self.conv_down[3:](self.conv_down[:3](x) + self.conv_down[0](x)),
    ConvBlock: lambda self, x: x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x) + x)))),
    TokenBlock: lambda self, x: x + self.mlp(self.norm2(self.norm1(x) + self.mixer(x))),
    Mlp: lambda self, x: self.fc2(self.act(self.fc1(x)) + self.fc1(x)),
}


@pytest.mark.parametrize("kind", REPLACED_CODE)
def test_fused_copy_runs_code_put_into_a_class(classifier, monkeypatch, kind):
    before = classifier(image((2, 3, 64, 64))).logits.detach()
    monkeypatch.setattr(kind, "forward", REPLACED_CODE[kind])
    with torch.inference_mode():
        expected, value = (model(image((2, 3, 64, 64))).logits for model in (classifier, classifier.fuse()))
    assert (expected - before).abs().max() > 1e-3 * before.std()
    assert (value - expected).abs().max() < 1e-5 * expected.std()


def test_fused_copy_calls_a_stem_of_another_class(classifier):
    class Stem(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[5](self[4](self[3](x + self[2](self[1](x)))))

    classifier.model.patch_embed.conv_down = Stem(*classifier.model.patch_embed.conv_down)
    with torch.inference_mode():
        expected, value = (model(image((2, 3, 64, 64))).logits for model in (classifier, classifier.fuse()))
    assert (value - expected).abs().max() < 1e-5 * expected.std()


def test_who_watches_all_calls_sees_all(classifier, monkeypatch):
    seen, call = [], nn.Module.__call__

    def watched(module, *args, **kwargs):
        seen.append(type(module))
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", watched)
    classifier(image((2, 3, 64, 64)))
    expected = Counter(seen)
    seen.clear()
    with torch.inference_mode():
        classifier(image((2, 3, 64, 64)))
    assert Counter(seen) == expected and expected[nn.Linear] > 10


def test_code_of_layers_is_known_by_its_names(monkeypatch):
    """Not by what it was when the model's code was loaded."""
    layers = (nn.Linear(2, 2), StepProjection(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    for layer in (*layers, nn.GELU(), nn.ReLU(), nn.Sequential(), nn.AdaptiveAvgPool2d(1)):
        assert fusion_mambavision.is_untouched(layer)
    for other in (lambda self, x: x, partial(F.gelu), nn.Sigmoid.forward):
        monkeypatch.setattr(nn.GELU, "forward", other)
        assert not fusion_mambavision.is_untouched(nn.GELU())


def test_fused_copy_of_shared_weights_and_replaced_stages(classifier):
    for module in classifier.modules():
        if isinstance(module, MambaVisionMixer):
            module.out_proj.weight = module.in_proj.weight

    class Stage(nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2].repeat(1, 2, 1, 1), x

    classifier.model.levels[0] = Stage()
    with torch.inference_mode():
        expected, value = (model(image((2, 3, 64, 64))).logits for model in (classifier, classifier.fuse()))
    assert (value - expected).abs().max() < 1e-5 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"padding": (3, 0), "stride": (1, 2)}]
)
def test_convolutions_of_few_pixels(settings, dtype, monkeypatch):
    """As a product with the weights as they lie."""
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: False)
    conv, x = nn.Conv2d(64, 128, (3, 2), **settings).to(dtype), image((2, 64, 5, 6)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def takes_patches(x, conv, expected, relative):
        with torch.profiler.profile() as profile:
            y = fusion_mambavision.convolution(x, conv, None)
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert (y - expected).abs().max() < relative * expected.std()
        return "aten::unfold" in {event.name for event in profile.events()}, y

    expected = copy.deepcopy(conv).double()(x.double())
    taken, y = takes_patches(x, conv, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    if dtype not in selective_scan.ONEDNN_DTYPES:  # torch's own convolution may make patches too
        return
    assert taken
    assert y.is_contiguous(memory_format=torch.channels_last)
    others = (
        (image((2, 64, 50, 60)).to(dtype), conv),
        (x, nn.Conv2d(64, 256, 3, groups=2).to(dtype)),
        (x, nn.Conv2d(64, 128, (3, 2), dilation=(2, 1)).to(dtype)),
        (x, nn.Conv2d(64, 256, 3).to(dtype, memory_format=torch.channels_last)),  # the product would copy its weights
        (x.double(), copy.deepcopy(conv).double()),
    )
    for other, layer in others:
        assert not takes_patches(other, layer, layer(other), 1e-5)[0]
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: True)
    monkeypatch.setattr(fusion_mambavision, "_LEAST_USES", 10**9)  # too few to leave half precision
    assert takes_patches(x, conv, expected, 2e-2)[0] == (dtype == torch.float32)


@pytest.mark.usefixtures("processor", "any_size_pays")
def test_gradients_of_single_biases(classifier):
    block = classifier.requires_grad_(False).model.levels[0].blocks[0]
    for bias in (block.conv2.bias, block.norm1.bias):
        bias.requires_grad_()
        assert torch.autograd.grad(classifier(image((2, 3, 64, 64))).logits.sum(), bias)[0].abs().sum() > 0
        bias.requires_grad_(False)


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("name", ["gamma_1", "mixer.A_log", "mixer.dt_proj.bias", "mlp.fc2.weight", "norm1.weight"])
def test_gradients_of_one_parameter_alone(classifier, name):
    """Of which the rest, and the operators for inference, know nothing."""
    pixel_values, parameter = image((2, 3, 64, 64)), f"model.levels.2.blocks.0.{name}"
    parameters = dict(classifier.named_parameters())

    def gradient():
        return torch.autograd.grad(classifier(pixel_values).logits.square().sum(), parameters[parameter])[0]

    expected = gradient()  # where all are recorded
    classifier.requires_grad_(False)
    parameters[parameter].requires_grad_()
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.usefixtures("processor", "any_size_pays")
def test_gradients_of_a_blocks_input_alone(classifier):
    """Behind a first convolution that passes none on."""
    block = classifier.requires_grad_(False).model.levels[0].blocks[0]
    block.gamma, block.conv1, block.norm1 = None, Detached(), nn.Identity()
    x = torch.randn(2, 16, 16, 16, requires_grad=True)
    assert torch.equal(torch.autograd.grad(block(x).sum(), x)[0], torch.ones_like(x))


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.usefixtures("any_size_pays")
@pytest.mark.parametrize("few", [0, math.inf])
@torch.no_grad()
def test_few_tokens_are_convolved_in_float32(classifier, monkeypatch, few):
    seen, convolve, mixer = [], modeling_mambavision.silu_convolve, classifier.model.levels[2].blocks[0].mixer
    mixer.bfloat16().D.uniform_(-1, 1)  # with 1, as in a fresh model, the scan gives little but what it is given
    x = torch.randn(2, 49, mixer.d_model).bfloat16()
    expected = copy.deepcopy(mixer).double()(x.double())
    monkeypatch.setattr(modeling_mambavision, "_FEW_NUMBERS", few)
    monkeypatch.setattr(
        modeling_mambavision, "silu_convolve", lambda x, weight: (seen.append(x.dtype), convolve(x, weight))[1]
    )
    is_plain = modeling_mambavision.is_plain(x, mixer)
    assert is_plain == torch.backends.mkldnn.is_available()
    value = mixer.infer(x) if is_plain else mixer(x)
    assert (value - expected).abs().max() < 0.03 * expected.std()  # rounded in several places, each by up to 0.004
    if is_plain:
        assert seen == [torch.float32 if few else torch.bfloat16]


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("name", ["x_proj", "dt_proj", "in_proj", "out_proj"])
@torch.no_grad()
def test_wrapped_projections_are_given_their_own_precision(classifier, name):
    pixel_values = image((2, 3, 64, 64))
    expected = classifier(pixel_values).logits
    wrap(classifier.bfloat16().model.levels[2].blocks[0].mixer, name)
    assert (classifier(pixel_values).logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("name", ["fc2.weight", "fc2.bias"])
def test_another_precision_in_a_layer_is_refused_as_torch_does(classifier, name):
    parameter = classifier.bfloat16().model.levels[2].blocks[0].mlp.get_parameter(name)
    parameter.data = parameter.data.double()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match="type"):
            classifier(image((1, 3, 64, 64)))


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*weight_norm")
@torch.no_grad()
def test_scripted_and_parametrized_layers_are_called(classifier):
    """Kinds of modules that keep their layers or weights otherwise."""
    pixel_values, blocks = image((2, 3, 64, 64)), classifier.model.levels[2].blocks
    blocks[0].norm1 = torch.jit.script(nn.Sequential(nn.LayerNorm(64), nn.Tanh()))
    blocks[0].mixer.in_proj = nn.utils.parametrizations.weight_norm(blocks[0].mixer.in_proj)
    blocks[1].mlp.fc1 = nn.utils.weight_norm(blocks[1].mlp.fc1)
    blocks[-1].mlp = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    value = classifier(pixel_values).logits
    with torch.enable_grad():
        expected = classifier(pixel_values).logits.detach()
    assert (value - expected).abs().max() < 1e-5 * expected.std()


@torch.inference_mode()
def test_packed_weights_are_kept_for_each_algorithm(monkeypatch):
    """Images of two sizes in turn, of which one is for Winograd's and one is not."""
    packed, winograd_filters = [], fusion_mambavision.winograd_filters
    monkeypatch.setattr(
        fusion_mambavision, "winograd_filters", lambda weight: (packed.append(weight), winograd_filters(weight))[1]
    )
    monkeypatch.setattr(fusion_mambavision, "winograd_pays", lambda x, conv, is_prepared: x.shape[2] > 20)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    fused = fusion_mambavision.FusedConv2d(copy.deepcopy(conv))
    for side in (32, 16, 32, 16):
        x = torch.randn(2, 8, side, side).to(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x), conv(x), rtol=1e-4, atol=1e-5)
    assert len(packed) == torch.backends.mkldnn.is_available()


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.parametrize("swaps", [False, True])
@torch.inference_mode()
def test_copies_fused_in_inference_mode_follow_their_weights(classifier, request, swaps):
    """Also where torch exchanges tensors in place of copying them, which it refuses for those with weak references."""
    request.addfinalizer(partial(torch.__future__.set_swap_module_params_on_conversion, False))
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    pixel_values = image((2, 3, 64, 64))
    fused = classifier.fuse()
    fused(pixel_values)
    state = {
        name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in fused.state_dict().items()
    }
    again = classifier.fuse()
    for model in (fused, again):  # the latter has packed nothing yet
        model.load_state_dict(state)
    torch.testing.assert_close(fused(pixel_values).logits, again(pixel_values).logits)


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fused_copy_follows_its_weights(classifier):
    """They are kept in another order from the first call on: as it was then, at other sizes, and after changes."""
    pixel_values, other = image((2, 3, 64, 64)), image((1, 3, 40, 90))
    fused = classifier.fuse()
    with torch.inference_mode():
        expected, expected_other = (classifier(x).logits.clone() for x in (pixel_values, other))
        fused(pixel_values)
    clone, file = copy.deepcopy(fused), io.BytesIO()
    assert clone.eval() is clone
    torch.save(fused, file)
    file.seek(0)
    traced = torch.jit.trace(fused, pixel_values, strict=False, check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    for model in (fused, clone, torch.load(file, weights_only=False)):
        for x, y in ((pixel_values, expected), (other, expected_other)):
            assert (model(x).logits - y).abs().max() < 1e-5 * y.std()
    x = pixel_values.clone().requires_grad_()
    fused(x).logits.sum().backward()
    assert x.grad.abs().sum() > 0

    def assert_follows(model):  # gradients keep the operators away
        result = model(pixel_values).logits
        expected = model(pixel_values.clone().requires_grad_()).logits.detach()
        assert (result - expected).abs().max() < 1e-5 * expected.std()
        return result

    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.1)
        changed = assert_follows(fused)
        assert (
            torch.func.functional_call(fused, state, pixel_values).logits - expected
        ).abs().max() < 1e-5 * expected.std()
        assert torch.equal(assert_follows(fused), changed)
        fused.model.levels[0].blocks[0].conv1.layer.weight = nn.Parameter(torch.randn(16, 16, 3, 3))
        fused.model.levels[2].blocks[0].mlp.fc1.layer.weight.data = torch.randn(256, 64)
        assert not torch.equal(assert_follows(fused), changed)
        fused.load_state_dict(state)
        assert (assert_follows(fused) - expected).abs().max() < 1e-5 * expected.std()
        layer = fused.model.levels[0].blocks[0].conv1.layer
        layer.weight = nn.Parameter(layer.weight.data)
        before = assert_follows(fused)
        layer.weight.data.mul_(2)
        layer.weight = nn.Parameter(layer.weight.data)  # in the place of the old one
        assert not torch.equal(assert_follows(fused), before)
        fused.load_state_dict(state)
        half = fused.to(torch.bfloat16)
        assert (half(pixel_values).logits - expected).abs().max() < 0.1 * expected.std()
        called = []
        half.model.levels[2].blocks[0].mlp.fc1.layer.register_forward_hook(lambda *_: called.append(1))
        half(pixel_values)
        assert called


@pytest.mark.usefixtures("processor", "any_size_pays")
@torch.inference_mode()
def test_fused_copy_computes_the_same(classifier, small_config, tmp_path):
    pixel_values = image((2, 3, 70, 50))
    output = classifier(pixel_values, output_hidden_states=True)
    fused = classifier.fuse()
    fused_output = fused(pixel_values, output_hidden_states=True)
    for value, expected in zip(
        (fused_output.logits, *fused_output.hidden_states), (output.logits, *output.hidden_states), strict=True
    ):
        assert (value - expected).abs().max() < 1e-5 * expected.std()
    assert [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)] == [fused.model.avgpool[1]]
    pooled, expected = (model.model.forward_features(pixel_values)[0] for model in (fused, classifier))
    assert (pooled - expected).abs().max() < 1e-5 * expected.std()
    assert torch.equal(classifier(pixel_values).logits, output.logits)  # the original is as it was
    assert fused.eval() is fused and torch.equal(fused(pixel_values).logits, fused_output.logits)
    features = MambaVisionModel(small_config).eval()
    for value, expected in zip(features.fuse()(pixel_values)[1], features(pixel_values)[1], strict=True):
        assert (value - expected).abs().max() < 1e-5 * expected.std()
    for refused in (
        lambda: fused.train(),
        lambda: fused.save_pretrained(tmp_path),
        lambda: fused.set_input_channels(1),
        lambda: classifier.train().fuse(),
    ):
        with pytest.raises(ValueError, match="inference"):
            refused()


@pytest.mark.usefixtures("processor", "any_size_pays")
def test_fused_copy_computes_the_same_wherever_a_model_does(classifier):
    """Where oneDNN's fused operators cannot run: gradients, autocast, empty batches, compiled graphs."""
    pixel_values = image((2, 3, 64, 64))
    fused = classifier.fuse()

    gradients = []
    for model in (classifier, fused):
        x = pixel_values.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(x).logits.square().sum(), x)[0])
    assert (gradients[1] - gradients[0]).abs().max() < 1e-4 * gradients[0].abs().max()
    assert not any(parameter.requires_grad for parameter in fused.parameters())

    with torch.no_grad():
        expected = classifier(pixel_values).logits
        assert fused(pixel_values[:0]).logits.shape == (0, expected.shape[1])
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        assert (compiled(pixel_values).logits - expected).abs().max() < 1e-5 * expected.std()
        with torch.autocast("cpu", torch.bfloat16):
            assert (fused(pixel_values).logits - expected).abs().max() < 0.1 * expected.std()
        half = classifier.to(torch.bfloat16).fuse()
        assert (half(pixel_values).logits - expected).abs().max() < 0.1 * expected.std()


def test_fused_copy_leaves_quantised_and_hooked_layers_alone(classifier):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    pixel_values, called = image((2, 3, 64, 64)), []
    quantize_(classifier, Int8WeightOnlyConfig())
    classifier.model.levels[2].blocks[0].mlp.fc1.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        expected = classifier(pixel_values).logits
        value = classifier.fuse()(pixel_values).logits
    assert (value - expected).abs().max() < 1e-4 * expected.std() and len(called) == 2


def test_fused_copy_leaves_replaced_and_hooked_convolutions_alone(classifier):
    pixel_values, net, called = image((2, 3, 64, 64)), classifier.model, []
    net.head = nn.Linear(net.head.in_features, 4, bias=False)
    net.patch_embed.conv_down[0] = nn.Sequential(net.patch_embed.conv_down[0])
    net.levels[0].blocks[0].conv1.register_forward_hook(lambda module, inputs, output: called.append(1) or 2 * output)
    with torch.no_grad():
        expected = classifier(pixel_values).logits
        fused = classifier.fuse()
        value, again = fused(pixel_values).logits, fused.fuse()(pixel_values).logits
    assert (value - expected).abs().max() < 1e-4 * expected.std() and len(called) == 3
    assert torch.equal(value, again)


def test_fused_copy_calls_the_hooks_of_its_activations(classifier):
    pixel_values, called = image((2, 3, 64, 64)), []
    fused = classifier.fuse()
    for layer in (fused.model.levels[0].blocks[0].conv1, fused.model.levels[2].blocks[0].mlp.fc1):
        layer.activation.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        value, expected = fused(pixel_values).logits, classifier(pixel_values).logits
    assert (value - expected).abs().max() < 1e-5 * expected.std() and len(called) == 2


@pytest.mark.usefixtures("processor", "any_size_pays")
def test_fused_copy_forgets_its_packed_weights_where_they_move(classifier):
    """In half precision and back, float32 weights often lie where the first ones lay."""
    pixel_values = image((2, 3, 64, 64))
    for _ in range(20):
        fused = classifier.fuse()
        with torch.no_grad():
            fused(pixel_values)
            value = fused.bfloat16().float()(pixel_values).logits
        expected = fused(pixel_values.clone().requires_grad_()).logits.detach()  # gradients keep the operators away
        assert (value - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.usefixtures("processor", "any_size_pays")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("fused", [False, True])
def test_transforms_of_torch_func(classifier, fused):
    """Gradients of single images under vmap, and forward-mode differentiation, against reverse mode."""
    model = classifier.requires_grad_(False)
    model = model.fuse() if fused else model
    pixel_values, direction = image((3, 3, 64, 64)), image((3, 3, 64, 64)).flip(-1)

    def score(x):
        return model(x, return_dict=False)[0].square().sum(1)

    x = pixel_values.clone().requires_grad_()
    expected = torch.autograd.grad(score(x).sum(), x)[0]
    single = torch.func.vmap(torch.func.grad(lambda x: score(x[None])[0]))(pixel_values)
    assert (single - expected).abs().max() < 1e-4 * expected.abs().max()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's others have no forward mode
        value, slope = torch.func.jvp(score, (pixel_values,), (direction,))
    torch.testing.assert_close(value, score(pixel_values))
    torch.testing.assert_close(slope, (expected * direction).sum((1, 2, 3)), rtol=1e-3, atol=1e-4 * slope.abs().max())
