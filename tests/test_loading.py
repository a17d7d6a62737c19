"""Loading, initialising, saving and adapting, as users of transformers do it."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, ROOT, SHAPES, SMALL, published_style_folder, run_python
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.modeling_mambavision import MambaVisionModelForImageClassification
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from weights import filled, image


AUTO_CLASSES = [AutoModel, AutoModelForImageClassification]


def load(auto_class, folder, **kwargs):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)


def edit_tensors(folder, edit):
    """Rewrite a folder's checkpoint with what `edit` makes of its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = edit(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_loads_all_and_nothing_else(small_folder, auto_class):
    model, report = load(auto_class, small_folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["unexpected_keys"]
    assert not model.training
    stored = load_file(small_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_published_checkpoint_loads_without_conversion(tmp_path):
    folder = published_style_folder(tmp_path / "MambaVision-T-1K", "MambaVision-T-1K")
    model, report = load(AutoModelForImageClassification, folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 1000 and model.config.crop_mode == "center"


# What initialisation should give


def is_normal(t):
    return 0.75 * 0.02 < t.std() < 1.25 * 0.02 and t.mean().abs() < 0.3 * 0.02


def is_step(bias):
    steps = F.softplus(2 * bias)
    return steps.min() >= 0.999e-3 and steps.max() <= 0.1001 and steps.std() > 0.005


def is_kaiming(weight):
    bound = (weight[0].numel()) ** -0.5  # torch's default for convolutions
    return weight.abs().max() <= bound and weight.abs().max() > 0.8 * bound


INITIAL = {
    r"(patch_embed\.conv_down\.[03]|conv[12]|conv1d_[xz]|reduction\.0)\.weight": is_kaiming,
    r"(in_proj|x_proj|dt_proj|out_proj|qkv|proj|fc[12]|head)\.weight": is_normal,
    r"(patch_embed\.conv_down\.[14]|norm[12]?)\.(weight|running_var)": lambda t: (t == 1).all(),
    r"(patch_embed\.conv_down\.[14]|norm[12]?)\.(bias|running_mean|num_batches_tracked)": lambda t: (t == 0).all(),
    r"(conv[12]|out_proj|qkv|proj|fc[12]|head)\.bias": lambda t: (t == 0).all(),
    r"dt_proj\.bias": is_step,
    r"A_log": lambda t: torch.allclose(t.exp(), torch.arange(1.0, 9.0).expand_as(t)),
    r"D": lambda t: (t == 1).all(),
    r"gamma_[12]": lambda t: (t == SMALL["layer_scale"]).all(),
    r"gamma": lambda t: (t == 0.25).all(),
}


def is_initial(name, tensor):
    """Exactly one row of the table is about each tensor."""
    (check,) = (check for pattern, check in INITIAL.items() if re.search(rf"(^|\.){pattern}$", name))
    return check(tensor)


ALL_KINDS = MambaVisionConfig(**SMALL, layer_scale_conv=0.25)
# a tensor of each kind: of those whose names differ in a stage's or a block's number alone, the first
KINDS = {re.sub(r"\b(levels|blocks)\.\d", "", name): name
         for name in reversed(MambaVisionModelForImageClassification(ALL_KINDS).state_dict())}  # fmt: skip


def test_model_from_configuration_is_initialised_everywhere():
    torch.manual_seed(0)
    settings = {**SMALL, "layer_scale_conv": 0.25}
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **settings)
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        assert is_initial(name, tensor), name


@pytest.fixture(scope="module")
def folder_of_all_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "model"
    model = MambaVisionModelForImageClassification(ALL_KINDS)
    model.save_pretrained(folder)
    return folder, filled({name: t.shape for name, t in model.state_dict().items()})


@pytest.mark.parametrize("name", KINDS.values())
def test_tensor_missing_from_a_checkpoint_is_initialised_and_the_rest_stays(folder_of_all_kinds, name):
    folder, tensors = folder_of_all_kinds
    stored = {other: tensor for other, tensor in tensors.items() if other != name}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    model, report = load(AutoModelForImageClassification, folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    state = model.state_dict()
    assert is_initial(name, state[name])
    for other, tensor in stored.items():
        assert torch.equal(state[other], tensor), other


def test_random_model_passes_a_signal(small_config):
    """Logits differ between images and are of a sensible size."""
    torch.manual_seed(0)
    model = MambaVisionModelForImageClassification(small_config).eval()
    with torch.inference_mode():
        logits = model(image((8, 3, 64, 64))).logits
    assert logits.isfinite().all() and 1e-4 < logits.std(0).mean() < 1


RELOAD = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.inference_mode():
    logits = model(torch.load(sys.argv[2])).logits
torch.save(logits, sys.argv[3])
print(type(model).__module__)
"""


def test_saved_copied_and_reloaded_in_a_new_process(small_folder, tmp_path):
    model = load(AutoModelForImageClassification, small_folder)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "elsewhere" / "модель-1.5 копия")
    shutil.rmtree(tmp_path / "saved")
    shutil.rmtree(small_folder)
    pixel_values = image((2, 3, 64, 64))
    torch.save(pixel_values, tmp_path / "input.pt")
    run_python(RELOAD, tmp_path / "elsewhere" / "модель-1.5 копия", tmp_path / "input.pt", tmp_path / "output.pt")
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "output.pt"), model(pixel_values).logits, rtol=0, atol=0)


def test_two_folders_in_one_process_keep_apart(small_folder, tmp_path):
    """Each folder's code is a module of its own; their operators must not get into each other's way."""
    shutil.copytree(small_folder, tmp_path / "other")
    models = [load(AutoModelForImageClassification, folder) for folder in (small_folder, tmp_path / "other")]
    assert type(models[0]) is not type(models[1])
    pixel_values = image((2, 3, 64, 64))
    outputs = [model(pixel_values, labels=torch.tensor([0, 1])) for model in models]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_loading_keeps_the_recurrence_exact(small_folder, dtype):
    model = load(AutoModelForImageClassification, small_folder, torch_dtype=dtype)
    stored = load_file(small_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.endswith((".A_log", ".D")):
            assert torch.equal(tensor, stored[name])
        elif tensor.is_floating_point():
            assert tensor.dtype == dtype, name
    assert model.dtype == dtype
    with torch.inference_mode():
        assert model(image((1, 3, 64, 64))).logits.dtype == dtype


def test_another_number_of_labels(small_folder):
    model = load(AutoModelForImageClassification, small_folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model(image((2, 3, 64, 64))).logits.shape == (2, 3)
    assert is_normal(model.model.head.weight) and len(model.config.id2label) == 3
    stored = load_file(small_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert "head" in name or torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("in_chans", [1, 2, 4, 13])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_rgb_weights_into_another_channel_count(small_folder, auto_class, in_chans, tmp_path):
    from timm.models import adapt_input_conv

    model = load(auto_class, small_folder, in_chans=in_chans)
    stored = load_file(small_folder / "model.safetensors")
    stem = model.model.patch_embed.conv_down[0]
    expected = adapt_input_conv(in_chans, stored["model.patch_embed.conv_down.0.weight"])
    torch.testing.assert_close(stem.weight, expected)
    assert model.config.in_chans == stem.in_channels == in_chans and stem.weight.requires_grad
    config = AutoConfig.from_pretrained(small_folder, trust_remote_code=True, in_chans=in_chans)
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "sub").symlink_to(small_folder)
    for again in (
        load(auto_class, small_folder, num_channels=in_chans),
        type(model).from_pretrained(small_folder, num_channels=in_chans),
        type(model).from_pretrained(small_folder, config=config),
        type(model).from_pretrained(tmp_path / "parent", subfolder="sub", in_chans=in_chans),
    ):
        assert again.config.in_chans == in_chans
        assert torch.equal(again.model.patch_embed.conv_down[0].weight, stem.weight)
    assert config.in_chans == in_chans  # the caller's own
    for name, tensor in model.state_dict().items():
        assert "conv_down.0" in name or torch.equal(tensor, stored[name]), name
    output = model(image((2, in_chans, 32, 32)))
    model.save_pretrained(tmp_path / "saved")
    again = load(auto_class, tmp_path / "saved")
    torch.testing.assert_close(again(image((2, in_chans, 32, 32)))[0], output[0])


def test_grey_images_give_what_their_rgb_copies_gave(small_folder):
    model = load(AutoModel, small_folder).eval()
    grey = image((2, 1, 48, 48))
    expected = model(grey.expand(-1, 3, -1, -1)).pooler_output
    model.requires_grad_(False).set_input_channels(1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(grey).pooler_output, expected, rtol=1e-4, atol=1e-5)
    assert len(model.config.mean) == len(model.config.std) == 1
    with pytest.raises(ValueError, match="in_chans must be a positive integer, got 0"):
        model.set_input_channels(0)
    without_numbers = model.to("meta")
    without_numbers.set_input_channels(4)
    assert without_numbers.get_input_embeddings().conv_down[0].weight.shape[1] == 4


def test_weights_without_the_prefix_load_too(small_folder):
    """As in the published .pth.tar files."""
    stored = load_file(small_folder / "model.safetensors")
    edit_tensors(small_folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    state = load(AutoModelForImageClassification, small_folder).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


def test_device_map_and_offloading_to_disk(small_folder, tmp_path):
    """Offloaded parameters are there only while their own module runs."""
    from accelerate import disk_offload

    pixel_values = image((2, 3, 64, 64))
    with torch.inference_mode():
        expected = load(AutoModelForImageClassification, small_folder)(pixel_values).logits
        mapped = load(AutoModelForImageClassification, small_folder, device_map="cpu")
        torch.testing.assert_close(mapped(pixel_values).logits, expected)
        offloaded = disk_offload(load(AutoModelForImageClassification, small_folder), tmp_path / "offload")
        torch.testing.assert_close(offloaded(pixel_values).logits, expected)
    with pytest.raises(ValueError, match=r"in_chans=1 .*offloaded: keep model\.patch_embed"):
        offloaded.set_input_channels(1)


def test_backbone_loads_a_classifiers_weights(small_folder):
    config = AutoConfig.from_pretrained(small_folder, trust_remote_code=True, out_indices=[0, 3])
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    backbone_class = get_class_from_dynamic_module("modeling_mambavision.MambaVisionBackbone", str(small_folder))
    backbone, report = backbone_class.from_pretrained(small_folder, config=config, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixel_values = image((1, 3, 64, 64))
    _, maps = load(AutoModel, small_folder)(pixel_values)
    output = backbone(pixel_values)
    assert len(output.feature_maps) == 2
    assert torch.equal(output.feature_maps[0], maps[0]) and torch.equal(output.feature_maps[1], maps[3])
    assert AutoBackbone.from_config(config, trust_remote_code=True).channels == [16, 128]


WRONG_SETTINGS = [
    ("dim", 0),
    ("dim", 80.0),
    ("in_dim", True),
    ("depths", [1, 3, 8]),
    ("depths", [1, 3, 8, 0]),
    ("depths", 4),
    ("num_heads", [2, 4, 7, 16]),
    ("num_heads", [2, 4, 8, "16"]),
    ("window_size", [8, 8, -14, 7]),
    ("mlp_ratio", 0),
    ("mlp_ratio", "4"),
    ("resolution", 0),
    ("resolution", None),
    ("in_chans", -3),
    ("drop_path_rate", 1.0),
    ("drop_path_rate", float("nan")),
    ("qkv_bias", "yes"),
    ("layer_scale", "1e-5"),
    ("layer_scale_conv", [1.0]),
    ("mean", [0.5, "a", 0.5]),
    ("mean", [0.5]),
    ("std", [0.2, 0.0, 0.2]),
    ("std", 0.2),
    ("crop_mode", "border"),
    ("crop_pct", 0),
    ("crop_pct", 1.5),
    ("interpolation", "cubic"),
    ("out_norm", 1),
    ("out_features", ["stem"]),
    ("out_features", []),
    ("out_indices", [4]),
    ("out_indices", []),
    ("out_indices", [True]),
    ("out_indices", [1.0]),
    ("out_indices", 3),
    ("out_indices", ["0"]),
    ("num_labels", -1),
    ("num_labels", "5"),
    ("id2label", ["a"]),
    ("id2label", {0: "a", 2: "b"}),
    ("problem_type", "ranking"),
]


@pytest.mark.parametrize("field, value", WRONG_SETTINGS)
def test_wrong_configuration_values_are_named(field, value):
    with pytest.raises(ValueError) as caught:
        MambaVisionConfig(**{field: value})
    assert field in str(caught.value) and (repr(value) in str(caught.value) or str(value) in str(caught.value))


@pytest.mark.parametrize(
    "field, value", [("window_size", [4, 4, 0, 2]), ("depths", [1, 2, 4]), ("drop_path_rate", 2.0), ("qkv_bias", "no")]
)
def test_wrong_values_given_while_loading_are_named(small_folder, field, value):
    with pytest.raises(ValueError, match=field):
        AutoModel.from_pretrained(small_folder, trust_remote_code=True, **{field: value})


def test_transformers_names_of_fields():
    config = MambaVisionConfig(num_channels=1, image_size=96, num_labels=2)
    assert (config.in_chans, config.resolution) == (config.num_channels, config.image_size) == (1, 96)


def test_variants_have_the_published_settings():
    for name, settings in VARIANTS.items():
        config = MambaVisionConfig.from_variant(name)
        assert config.num_labels == 1000 and config.id2label[294] == "brown bear, bruin, Ursus arctos"
        assert SHAPES[name]["head.weight"] == [1000, config.hidden_size]
        recorded = json.loads((FIXTURES / "variants.json").read_text())[name]
        published = {field: value for field, value in recorded.items() if hasattr(config, field)}
        assert {"dim", "window_size", "crop_pct", "crop_mode", "mean", "interpolation"} < published.keys()
        assert settings.keys() <= published.keys()
        assert all(getattr(config, field) == value for field, value in published.items()), name
        again = MambaVisionConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
        assert again.to_diff_dict() == config.to_diff_dict()
    assert MambaVisionConfig.from_variant("nvidia/MambaVision-B-1K", num_labels=7).num_labels == 7
    with pytest.raises(ValueError, match=r"MambaVision-X.*MambaVision-T-1K"):
        MambaVisionConfig.from_variant("MambaVision-X")
