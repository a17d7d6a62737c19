"""The dense-prediction checkpoints: backbones, and UPerNet as mmsegmentation computes it."""

import copy
import importlib.util
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from checkpoints import SMALL_VARIANT, convert, converted, save, save_mm, shapes_only
from conftest import SHAPES, install, norms_of_maps, run_python
from huggingface_hub import ModelCard
from PIL import Image
from repository import fusion_mambavision, winograd
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.conversion import plan as plan_module
from repository.conversion.errors import ConversionError
from repository.conversion.source import Source
from repository.modeling_mambavision import MambaVisionBackbone
from repository.modeling_mambavision_upernet import MambaVisionUperNetConfig, UperNetForSemanticSegmentation
from safetensors.torch import load_file
from transformers import BertConfig, Trainer, TrainingArguments
from weights import filled, image


# ---------------------------------------------------------------------------------------------------------------------
# mmsegmentation's decoder, run from its own source
# ---------------------------------------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """mmcv's: a convolution without bias, BatchNorm and ReLU, under the names `conv` and `bn`."""

    def __init__(
        self, in_channels, out_channels, kernel_size, padding=0, dilation=1, inplace=True, conv_cfg=None, norm_cfg=None,
        act_cfg=None,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, 1, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class BaseDecodeHead(nn.Module):
    """What mmsegmentation's heads take from their base class in inference: the choice of maps, and the classifier."""

    def __init__(self, in_channels, channels, num_classes, in_index, input_transform=None):
        super().__init__()
        self.in_channels, self.channels, self.in_index = in_channels, channels, in_index
        self.conv_cfg, self.norm_cfg, self.act_cfg, self.align_corners = None, None, None, False
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def _transform_inputs(self, inputs):
        return [inputs[i] for i in self.in_index] if isinstance(self.in_index, tuple) else inputs[self.in_index]

    def cls_seg(self, x):
        return self.conv_seg(x)


@pytest.fixture(scope="session")
def mmseg_heads():
    """`UPerHead` and `FCNHead` as the package defines them, on stand-ins for what it imports from compiled packages."""
    folder = install("mmsegmentation-1.2.2", "--no-deps", "mmsegmentation==1.2.2")
    folder = folder / "mmseg" / "models" / "decode_heads"

    def module(name, **content):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(__path__=[], **content)

    before = set(sys.modules)
    module("mmcv")
    module("mmcv.cnn", ConvModule=ConvModule)
    module("stand_in")
    module("mmseg")
    module("mmseg.registry", MODELS=types.SimpleNamespace(register_module=lambda: lambda cls: cls))
    module("stand_in.utils", resize=lambda input, **options: F.interpolate(input, **options))
    module("stand_in.heads")
    module("stand_in.heads.decode_head", BaseDecodeHead=BaseDecodeHead)
    heads = []
    for file, cls in (("psp_head", None), ("uper_head", "UPerHead"), ("fcn_head", "FCNHead")):
        spec = importlib.util.spec_from_file_location(f"stand_in.heads.{file}", folder / f"{file}.py")
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        heads += [getattr(loaded, cls)] if cls else []
    for name in set(sys.modules) - before:
        del sys.modules[name]
    return heads


def mmseg_decoder(heads, channels: list[int], num_classes: int) -> nn.ModuleDict:
    """The published decoder: UPerNet on four maps, and an auxiliary head on the third."""
    uper, fcn = heads
    decoder = nn.ModuleDict(
        {
            "decode_head": uper(in_channels=channels, in_index=(0, 1, 2, 3), channels=512, num_classes=num_classes),
            "auxiliary_head": fcn(
                in_channels=channels[2], in_index=2, channels=256, num_convs=1, concat_input=False,
                num_classes=num_classes,
            ),
        }
    )  # fmt: skip
    return decoder.eval()


def backbone_shapes(variant: str, dim: int) -> dict[str, list[int]]:
    """Of a published dense-prediction backbone: the classifier's, without norm and head, with four LayerNorms."""
    shapes = {f"backbone.{n}": s for n, s in SHAPES[variant].items() if not n.startswith(("norm.", "head."))}
    for i in range(4):
        shapes |= {f"backbone.outnorm{i}.{name}": [dim * 2**i] for name in ("weight", "bias")}
    return shapes


def dense_shapes(heads, name: str) -> dict[str, list[int]]:
    model = plan_module.DENSE[name]
    dim = VARIANTS[model["backbone"]]["dim"]
    shapes = backbone_shapes(model["backbone"], dim)
    if model["method"] == "UPerNet":
        with torch.device("meta"):
            decoder = mmseg_decoder(heads, [dim * 2**i for i in range(4)], 150)
        shapes |= {key: list(tensor.shape) for key, tensor in decoder.state_dict().items()}
    else:  # a few of a detector's other tensors
        shapes |= {
            "neck.lateral_convs.0.conv.weight": [256, dim, 1, 1],
            "rpn_head.rpn_conv.weight": [256, 256, 3, 3],
            "roi_head.bbox_head.0.fc_cls.weight": [81, 1024],
        }
    return shapes


@pytest.mark.parametrize("name", plan_module.DENSE)
@pytest.mark.parametrize("backbone_only", [False, True])
def test_every_published_checkpoint_is_recognised_and_matched(mmseg_heads, name, backbone_only):
    model = plan_module.DENSE[name]
    shapes = dense_shapes(mmseg_heads, name)
    source = Source("iter_160000.pth", [Path("iter_160000.pth")], shapes_only(shapes))
    plan = plan_module.make_plan(source, None, None, backbone_only)
    assert plan.variant == name
    assert (
        plan.backbone.window_size == model["window_size"]
        and plan.backbone.depths == (VARIANTS[model["backbone"]]["depths"])
    )
    segments = model["method"] == "UPerNet" and not backbone_only
    assert plan.config.architectures is None and (plan.task.name == "image-segmentation") == segments
    expected = set(shapes) if segments else {key for key in shapes if key.startswith("backbone.")}
    assert set(plan.table.values()) == expected and len(plan.table) == len(expected)
    if segments:
        labels = plan.config.id2label
        assert len(labels) == 150 and (labels[0], labels[7], labels[149]) == ("wall", "bed", "flag")
        assert plan.processor["size"] == {"shortest_edge": model["image_size"]}


def test_a_bare_dense_backbone_is_told_by_name():
    shapes = backbone_shapes("MambaVision-T-1K", 80)
    for name, expected in (("t_coco.pth", "cascade_mask_rcnn_mamba_vision_tiny_3x_coco"), ("t.pth", None)):
        source = Source(name, [Path(name)], shapes_only(shapes))
        plan = plan_module.make_plan(source, None, None, False)
        assert plan.task.name == "backbone"
        assert plan.variant == (expected or "mamba_vision_160k_ade20k-512x512_tiny")
        assert plan.notes


def test_strange_heads_are_refused(mmseg_heads):
    shapes = dense_shapes(mmseg_heads, "mamba_vision_160k_ade20k-512x512_tiny")
    for change, words in (
        ({"decode_head.extra.weight": [3]}, "decode_head.extra.weight beside"),
        ({"decode_head.conv_seg.weight": [150, 511, 1, 1]}, "decode_head.conv_seg.weight of shape"),
    ):
        source = Source("a.pth", [Path("a.pth")], shapes_only({**shapes, **change}))
        with pytest.raises(ConversionError, match=re.escape(words)):
            plan_module.make_plan(source, None, None, False)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

SMALL_DENSE = {
    "small_ade20k": {"method": "UPerNet", "dataset": "ADE20K", "image_size": 64, "num_labels": 150, "miou": 12.3},
    "small_coco": {"method": "Cascade Mask R-CNN", "dataset": "COCO", "image_size": None, "num_labels": 80},
}


@pytest.fixture
def small_dense(monkeypatch):
    monkeypatch.setitem(VARIANTS, "MambaVision-Small-1K", SMALL_VARIANT)
    for name, model in SMALL_DENSE.items():
        windows = {"backbone": "MambaVision-Small-1K", "window_size": [8, 8, 6, 4]}
        monkeypatch.setitem(plan_module.DENSE, name, {**model, **windows})


def small_checkpoint(path: Path, heads, num_classes: int = 150, decoder: bool = True, seed: int = 0, **settings):
    """A checkpoint of the mm family, its tensors, and mmsegmentation's decoder on them."""
    settings = {**SMALL_VARIANT, "window_size": [8, 8, 6, 4], **settings}
    config = MambaVisionConfig(**settings, out_norm=True, out_indices=range(4))
    with torch.device("meta"):
        backbone = MambaVisionBackbone(config).state_dict()
    shapes = {f"backbone.{name.removeprefix('model.')}": t.shape for name, t in backbone.items()}
    module = mmseg_decoder(heads, config.hidden_sizes, num_classes)
    if decoder:
        shapes |= {name: t.shape for name, t in module.state_dict().items()}
    else:
        shapes |= {"neck.lateral_convs.0.conv.weight": (8, 16, 1, 1), "rpn_head.rpn_conv.bias": (8,)}
    tensors = filled(shapes, seed)
    if decoder:
        module.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("backbone.")})
    return save_mm(path, tensors), tensors, module


def normalised_maps(package, config: dict, tensors: dict, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The published package's maps, each through its LayerNorm."""
    model = package.MambaVision(num_classes=0, **config).eval()
    weights = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    missing, _ = model.load_state_dict({n: t for n, t in weights.items() if not n.startswith("outnorm")}, strict=False)
    assert all(name.startswith("norm.") for name in missing)
    maps = {}
    for i, level in enumerate(model.levels):
        if level.downsample is None:
            level.register_forward_hook(lambda module, inputs, output, i=i: maps.update({i: output}))
        else:
            level.downsample.register_forward_pre_hook(lambda module, inputs, i=i: maps.update({i: inputs[0]}))
    model.forward_features(pixels)
    return [
        F.layer_norm(
            maps[i].permute(0, 2, 3, 1), maps[i].shape[1:2], weights[f"outnorm{i}.weight"], weights[f"outnorm{i}.bias"]
        ).permute(0, 3, 1, 2)
        for i in range(4)
    ]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.std().item())


RELOAD = """
import sys, torch
from transformers import AutoModelForSemanticSegmentation
model, info = AutoModelForSemanticSegmentation.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
with torch.inference_mode():
    torch.save(model.eval()(torch.load(sys.argv[2])).logits, sys.argv[3])
"""

SMALL_SETTINGS = {**SMALL_VARIANT, "window_size": [8, 8, 6, 4], "mlp_ratio": 4}
SMALL_SETTINGS.pop("resolution")


@torch.inference_mode()
def test_segments_as_mmsegmentation_does(mmseg_heads, published, small_dense, tmp_path):
    """A new process gives, at odd sizes, the logits of mmsegmentation's decoder on the published package's maps."""
    path, tensors, decoder = small_checkpoint(tmp_path / "iter_160000.pth", mmseg_heads)
    run = converted(path, tmp_path / "out", "--verify-against-official")
    assert "small_ade20k, image-segmentation" in run.out and "mambavision package" in run.out
    pixels = image((2, 3, 75, 100))
    torch.save(pixels, tmp_path / "pixels.pt")
    run_python(RELOAD, tmp_path / "out", tmp_path / "pixels.pt", tmp_path / "logits.pt")
    maps = normalised_maps(published, SMALL_SETTINGS, tensors, pixels)
    logits = decoder["decode_head"](maps)
    expected = F.interpolate(logits, size=pixels.shape[2:], mode="bilinear", align_corners=False)
    assert_close(torch.load(tmp_path / "logits.pt"), expected)

    # the auxiliary head, which inference does not use
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert_close(model.auxiliary_head(maps), decoder["auxiliary_head"](maps))


@torch.inference_mode()
def test_published_size_segments_as_mmsegmentation_does(mmseg_heads, published, tmp_path):
    """The tiny ADE20K model as published, its windows of 64 and 32 included."""
    name = "mamba_vision_160k_ade20k-512x512_tiny"
    tensors = filled(dense_shapes(mmseg_heads, name))
    path = save_mm(tmp_path / f"{name}.pth", tensors)
    converted(path, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.py")} >= {"modeling_mambavision_upernet.py", "selective_scan.py"}
    pixels = image((1, 3, 64, 96))
    settings = {**VARIANTS["MambaVision-T-1K"], "window_size": [8, 8, 64, 32], "mlp_ratio": 4}
    maps = normalised_maps(published, settings, tensors, pixels)
    decoder = mmseg_decoder(mmseg_heads, [80, 160, 320, 640], 150)
    decoder.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("backbone.")})
    expected = F.interpolate(decoder["decode_head"](maps), size=(64, 96), mode="bilinear", align_corners=False)
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert_close(model(pixels).logits, expected)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(stored) == len(tensors)
    assert torch.equal(
        stored["decode_head.psp_modules.3.1.batch_norm.bias"], tensors["decode_head.psp_modules.3.1.bn.bias"]
    )


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
@torch.inference_mode()
def test_backbones_alone(mmseg_heads, published, small_dense, tmp_path, kind):
    path, tensors, _ = small_checkpoint(tmp_path / "a.pth", mmseg_heads, decoder=kind == "segmenter")
    options = ["--backbone-only"] if kind == "segmenter" else []
    run = converted(path, tmp_path / "out", "--verify-against-official", *options)
    left_out = "decode_head, auxiliary_head" if kind == "segmenter" else "neck, rpn_head, roi_head"
    assert f"note: converted the backbone only, not {left_out}" in run.err
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag is None  # a pipeline of features would load it without the norm of pooled ones
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    torch.save(image((1, 3, 75, 100)), tmp_path / "pixels.pt")
    snippet += "torch.save(model(torch.load('pixels.pt')).feature_maps, 'maps.pt')"
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}")
    assert done.stdout.startswith("[(1, 16, ")
    expected = normalised_maps(published, SMALL_SETTINGS, tensors, image((1, 3, 75, 100)))
    for actual, wanted in zip(torch.load(tmp_path / "maps.pt"), expected, strict=True):
        assert_close(actual, wanted)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["tensors"]["left_out"] == len(tensors) - report["tensors"]["converted"] > 0


def test_other_classes_get_their_labels(mmseg_heads, small_dense, tmp_path):
    path, _, _ = small_checkpoint(tmp_path / "a.pth", mmseg_heads, num_classes=3)
    (tmp_path / "labels.txt").write_text("road\nwater\ntree\n")
    converted(path, tmp_path / "named", "--labels", tmp_path / "labels.txt")
    converted(path, tmp_path / "generic", "--no-verify")
    for name, first in (("named", "road"), ("generic", "LABEL_0")):
        labels = json.loads((tmp_path / name / "config.json").read_text())["id2label"]
        assert len(labels) == 3 and labels["0"] == first
    assert convert(path, tmp_path / "no", "--variant", "MambaVision-T-1K").err.startswith("error: --variant")
    run = convert(path, tmp_path / "no", "--backbone-only", "--labels", tmp_path / "labels.txt")
    assert run.code and "error: --labels names classes, and a backbone has none" in run.err


@pytest.mark.parametrize("decoder", [True, False])
def test_its_own_folder_converts_again(mmseg_heads, small_dense, tmp_path, decoder):
    path, _, _ = small_checkpoint(tmp_path / "small_coco.pth", mmseg_heads, decoder=decoder)
    converted(path, tmp_path / "first", "--no-verify")
    converted(tmp_path / "first", tmp_path / "second", "--no-verify")
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    converted(tmp_path / "second", tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for size in ("500KB", "5GB"):  # in place of one file, and of shards
        converted(tmp_path / "second", tmp_path / "first", "--no-verify", "--overwrite", "--max-shard-size", size)


@pytest.mark.parametrize("decoder", [True, False])
def test_other_input_channels(mmseg_heads, small_dense, tmp_path, decoder):
    path, _, _ = small_checkpoint(tmp_path / "a.pth", mmseg_heads, decoder=decoder, in_chans=4)
    run = converted(path, tmp_path / "out")  # verified: a forward of images with these channels
    assert "note: the mean and std of 4 input channels are a guess" in run.err
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert len(processor["image_mean"]) == len(processor["image_std"]) == 4
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    snippet = snippet.replace("torch.rand(1, 4, 512, 512)", "torch.rand(1, 4, 64, 64)")
    printed = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}").stdout
    assert ("logits" if decoder else "feature_maps") in printed


def test_without_the_auxiliary_head(mmseg_heads, small_dense, tmp_path):
    path, tensors, _ = small_checkpoint(tmp_path / "a.pth", mmseg_heads)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("auxiliary_head.")}
    converted(save(path, {"state_dict": tensors}), tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["use_auxiliary_head"]


PIPELINE = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
folder, photo = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder)
try:
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    segments = segment([photo, photo])
except TypeError:  # transformers 4.50 finds no processor for a model type that it does not know
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True, image_processor=processor)
    segments = segment([photo, photo])
inputs = processor(Image.open(photo).convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits
classes = processor.post_process_semantic_segmentation(type("", (), {"logits": logits}), target_sizes=[(70, 90)])[0]
print(json.dumps({
    "pixels": list(inputs["pixel_values"].shape),
    "segments": [[(s["label"], s["mask"].size) for s in image] for image in segments],
    "labels": sorted(model.config.id2label[i] for i in classes.unique().tolist()),
}))
"""


def _check_pipeline(done):
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["pixels"] == [1, 3, 64, 82]  # the shorter side of 90 x 70 becomes 64, nothing is cropped
    for segments in result["segments"]:
        assert sorted(label for label, _ in segments) == result["labels"]
        assert all(size == [90, 70] for _, size in segments)
    assert "not supported" not in done.stderr


@pytest.fixture
def small_segmenter(mmseg_heads, small_dense, tmp_path):
    path, _, _ = small_checkpoint(tmp_path / "a.pth", mmseg_heads)
    converted(path, tmp_path / "segmenter")
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path / "segmenter", tmp_path / "photo.jpg"


def test_pipeline(small_segmenter):
    _check_pipeline(run_python(PIPELINE, *small_segmenter))


def test_pipeline_of_older_transformers(older_transformers, small_segmenter):
    _check_pipeline(run_python(PIPELINE, *small_segmenter, overlay=older_transformers))


# ---------------------------------------------------------------------------------------------------------------------
# The model class itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return UperNetForSemanticSegmentation(MambaVisionUperNetConfig({**SMALL_VARIANT, "out_norm": True}, num_labels=4))


def test_trains_and_saves_with_its_code(small_model, tmp_path):
    pixels, labels = image((2, 3, 40, 56)), torch.randint(0, 4, (2, 40, 56))
    labels[:, :5] = 255  # left out of the loss
    small_model.train()
    small_model.gradient_checkpointing_enable()
    loss = small_model(pixels, labels=labels).loss
    loss.backward()
    without = [name for name, parameter in small_model.named_parameters() if parameter.grad is None]
    assert loss.isfinite() and not without
    small_model.eval().save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        expected = small_model(pixels).logits
    torch.save(pixels, tmp_path / "pixels.pt")
    run_python(RELOAD, tmp_path / "saved", tmp_path / "pixels.pt", tmp_path / "logits.pt")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_the_heads_convolutions_are_faster_and_the_same(small_model, monkeypatch, algorithm):
    """In inference; with gradients they are torch's own."""
    monkeypatch.setattr(fusion_mambavision, "_LEAST_MAP", 0)
    monkeypatch.setattr(winograd, "CALL_COST", math.inf if algorithm == "direct" else -math.inf)
    monkeypatch.setattr(winograd, "_cores_share_a_cache", lambda: True)
    monkeypatch.setattr(fusion_mambavision, "_is_slow", lambda dtype: True)
    for module in small_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    small_model.eval()
    pixels = image((2, 3, 160, 100))
    expected = copy.deepcopy(small_model).double()(pixels.double()).logits.detach()
    maps = [x.detach() for x in small_model.backbone(pixels).feature_maps]

    def is_faster(head, maps):
        with torch.profiler.profile(record_shapes=True) as profile:
            assert head(maps).is_contiguous() or head is small_model.auxiliary_head
        called = [event.name for event in profile.events()]
        assert algorithm == "direct" or ("aten::unfold" in called) == torch.backends.mkldnn.is_available()
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in head.modules())
        return norms_of_maps(profile) < norms  # of the smallest maps they are not folded

    with torch.no_grad():
        value = small_model(pixels).logits
        assert (value - expected).abs().max() < 1e-5 * expected.std()
        assert is_faster(small_model.decode_head, maps) == torch.backends.mkldnn.is_available()
        half = small_model.to(torch.bfloat16)(pixels).logits
        assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.1 * expected.std()
        maps = [x.bfloat16() for x in maps]
        for head in (small_model.decode_head, small_model.auxiliary_head):
            assert is_faster(head, maps) == torch.backends.mkldnn.is_available()


def test_a_fresh_model_is_finite(small_model):
    assert all(tensor.isfinite().all() for tensor in small_model.state_dict().values())
    A_log = small_model.backbone.model.levels[2].blocks[0].mixer.A_log
    torch.testing.assert_close(A_log[0].exp(), torch.arange(1.0, 9.0))
    # where adapters let gradients start, on transformers 4 too
    assert small_model.get_input_embeddings() is small_model.backbone.model.patch_embed


def test_trainer_divides_its_loss_by_the_accumulated_steps(small_model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert not Trainer(small_model, arguments).model_accepts_loss_kwargs


def test_configuration_takes_fields_or_an_object():
    fields = {**SMALL_VARIANT, "out_norm": True}
    from_fields = MambaVisionUperNetConfig(fields, num_labels=4)
    again = MambaVisionUperNetConfig.from_dict(json.loads(from_fields.to_json_string(use_diff=False)))
    given = MambaVisionUperNetConfig(MambaVisionConfig(**fields, out_indices=range(4), num_labels=0), num_labels=4)
    for config in (from_fields, again, given):
        assert config.backbone_config.out_indices == [0, 1, 2, 3] and config.backbone_config.out_norm
        assert config.num_labels == 4 and config.auxiliary_in_channels == 64
    with pytest.raises(ValueError, match="depths"):
        MambaVisionUperNetConfig({"depths": [1]})
    for chosen, got in (
        (MambaVisionConfig(**fields), "[3]"),
        ({**fields, "out_indices": [1, 2, 3]}, "[1, 2, 3]"),
        (BertConfig(), "None"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"must be all four stages, [0, 1, 2, 3], got {got}")):
            MambaVisionUperNetConfig(chosen)
