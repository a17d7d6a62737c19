"""The repository under the newest transformers, under the oldest that it supports, and under some between.

Each check is a function that needs nothing but its arguments. It runs in this process under the installed transformers,
and in a new one under the older versions. The model card's snippets have their own file, test_published_usage.py.
"""

import inspect
import json
import shutil

import numpy as np
import pytest
import transformers
from conftest import SMALL, copy_code, run_python
from PIL import Image
from repository.configuration_mambavision import MambaVisionConfig
from repository.modeling_mambavision import MambaVisionModelForImageClassification
from safetensors.torch import save_file
from weights import filled


def check_classification_pipeline(folder):
    """Single images and batches, of every mode, against timm's transform, the model called directly, and a softmax."""
    from pathlib import Path

    import torch
    from PIL import Image
    from timm.data.transforms_factory import create_transform
    from transformers import AutoModelForImageClassification, __version__, pipeline

    files = sorted(Path(folder).glob("*.png"))
    processor = {"image_processor": folder} if __version__ == "4.50.0" else {}  # that version does not find it
    classify = pipeline("image-classification", model=folder, trust_remote_code=True, **processor)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    config = model.config
    transform = create_transform(
        (3, config.resolution, config.resolution),
        mean=config.mean,
        std=config.std,
        crop_mode=config.crop_mode,
        crop_pct=config.crop_pct,
    )
    single = []
    for file in files:
        with torch.no_grad():
            logits = model(transform(Image.open(file).convert("RGB"))[None]).logits[0]
        expected = dict(zip(config.id2label.values(), logits.softmax(-1).tolist(), strict=True))
        predictions = classify(str(file), top_k=config.num_labels)
        assert [p["label"] for p in predictions] == sorted(expected, key=lambda label: -expected[label])
        for prediction in predictions:  # the image processor on torchvision rounds to whole grey levels
            assert abs(prediction["score"] - expected[prediction["label"]]) < 0.02, (file.name, predictions, expected)
        single.append(predictions)
    for batch_size in (1, 2, 3, 4):
        batched = classify([Image.open(file) for file in files], batch_size=batch_size, top_k=config.num_labels)
        for one, other in zip(single, batched, strict=True):
            for p, q in zip(one, other, strict=True):
                assert p["label"] == q["label"] and abs(p["score"] - q["score"]) < 1e-5, (batch_size, p, q)


def check_feature_pipeline(folder):
    """The pooled features of single images and batches, of every mode."""
    from pathlib import Path

    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, __version__, pipeline

    files = sorted(Path(folder).glob("*.png"))
    processor = {"image_processor": folder} if __version__ == "4.50.0" else {}
    extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, **processor)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    process = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        expected, _ = model(**process(images, return_tensors="pt"))
    for batch_size in (1, 2, 3, 4):
        for pool in (False, True):
            features = extract([Image.open(file) for file in files], batch_size=batch_size, pool=pool)
            assert torch.allclose(torch.tensor(features).squeeze(1), expected, rtol=1e-4, atol=1e-5), (batch_size, pool)
    assert torch.allclose(extract(str(files[0]), return_tensors=True), expected[:1], rtol=1e-4, atol=1e-5)


def check_backbone(folder):
    """`AutoBackbone` from the configuration gives the chosen stages' maps, equal to the feature extractor's."""
    import torch
    from transformers import AutoBackbone, AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, out_features=["stage2", "stage4"])
    backbone = AutoBackbone.from_config(config, trust_remote_code=True).eval()
    assert backbone.channels == [32, 128] and backbone.out_indices in ([1, 3], (1, 3))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    backbone.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("model.norm.")})
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        maps = backbone(x).feature_maps
        expected = model(x).feature_maps
    assert len(maps) == 2 and torch.equal(maps[0], expected[1]) and torch.equal(maps[1], expected[3])


def check_gradient_checkpointing(folder):
    """Loss, every gradient and every statistic are the same with it."""
    import torch
    from transformers import AutoModelForImageClassification

    results = []
    for enable in (False, True):
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, drop_path_rate=0.0)
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enable
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        loss = model.train()(x, labels=torch.tensor([1, 2])).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        results.append({"loss": loss.detach(), **gradients, **statistics})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-6), name


def check_bfloat16(folder):
    """Loading in bfloat16 converts all but the recurrence's own parameters, and the outputs stay close."""
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for auto_class in (AutoModel, AutoModelForImageClassification):
        exact = auto_class.from_pretrained(folder, trust_remote_code=True)
        half = auto_class.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
        for name, parameter in half.named_parameters():
            kept = name.endswith((".A_log", ".D"))
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
            assert not kept or torch.equal(parameter, exact.get_parameter(name)), name
        with torch.no_grad():
            expected, output = exact(x)[0], half(x.bfloat16())[0]
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().max() < 0.1 * expected.std(), auto_class


def check_scan_backend(folder):
    """The kernels' file has come along with the others."""
    import sys

    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.scan_backend == "torch"
    missing = sys.modules[type(model).__module__.replace("modeling_mambavision", "selective_scan")]._triton_missing
    assert missing is None or "needs triton" in missing, missing


def check_saving(folder):
    """Another head, saved with the code as FOLDER-VERSION, and its answers kept beside it; see `check_reloading`."""
    import torch
    from transformers import AutoModelForImageClassification, __version__

    model = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=3, ignore_mismatched_sizes=True
    )
    with torch.no_grad():
        model.model.head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model.save_pretrained(f"{folder}-{__version__}")
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        torch.save((x, model(x).logits), f"{folder}-{__version__}/answers.pt")


def check_reloading(folder):
    """The same answers from the folder alone."""
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    x, expected = torch.load(f"{folder}/answers.pt")
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    features = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(x).logits, expected)
        assert torch.allclose(model.model.head(features(x)[0]), expected, atol=1e-5)


def check_detector(folder):
    """DETR renames every `out_proj` of a checkpoint in transformers 5, and the mixers have one of their own."""
    import torch
    from transformers import AutoBackbone, AutoConfig, DetrConfig, DetrForObjectDetection, __version__

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoBackbone.from_config(config, trust_remote_code=True)
    AutoConfig.register("mambavision", type(config), exist_ok=True)
    AutoBackbone.register(type(config), type(backbone), exist_ok=True)
    config = DetrConfig(
        backbone_config=config,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    model = DetrForObjectDetection(config)
    model.save_pretrained(f"{folder}-detr-{__version__}")
    again, info = DetrForObjectDetection.from_pretrained(f"{folder}-detr-{__version__}", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = model.state_dict()
    assert "mixer.out_proj" in str(weights.keys())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


CHECKS = [
    check_classification_pipeline,
    check_feature_pipeline,
    check_backbone,
    check_gradient_checkpointing,
    check_bfloat16,
    check_scan_backend,
    check_saving,
]


def run_checks(checks, folder, overlay=None):
    """In one new process: starting it takes longer than the checks."""
    calls = "".join(f"{inspect.getsource(check)}\n{check.__name__}(sys.argv[1])\n" for check in checks)
    run_python(f"import sys\n{calls}", folder, overlay=overlay)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with code, weights and an image processor's settings, and images of every mode."""
    folder = copy_code(tmp_path_factory.mktemp("versions") / "small-model")
    config = MambaVisionConfig(**SMALL, crop_pct=0.875)
    tensors = MambaVisionModelForImageClassification(config).state_dict()
    tensors = filled({name: tensor.shape for name, tensor in tensors.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {
        "AutoConfig": "configuration_mambavision.MambaVisionConfig",
        "AutoModel": "modeling_mambavision.MambaVisionModel",
        "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
        "AutoBackbone": "modeling_mambavision.MambaVisionBackbone",
    }
    labels = {i: f"class {i}" for i in range(SMALL["num_labels"])}
    settings = {**SMALL, "crop_pct": 0.875, "model_type": "mambavision", "auto_map": auto_map, "id2label": labels}
    del settings["num_labels"]
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(config.image_processor_settings()))
    y, x = np.mgrid[0:120, 0:160] / 120
    pixels = np.stack([x / 1.4, y, 0.5 + 0.5 * np.sin(6 * x * y), 1 - 0.5 * x], -1)
    colour = Image.fromarray((255 * pixels).astype(np.uint8), "RGBA")
    for mode in ("L", "RGB", "RGBA"):
        colour.convert(mode).save(folder / f"{mode}.png")
    colour.convert("RGB").quantize(16).save(folder / "P.png")
    colour.convert("L").resize((64, 200)).save(folder / "tall.png")
    return folder


def test_images_have_the_modes_they_should(folder):
    modes = {file.stem: Image.open(file).mode for file in folder.glob("*.png")}
    assert modes == {"L": "L", "RGB": "RGB", "RGBA": "RGBA", "P": "P", "tall": "L"}


@pytest.mark.parametrize("check", CHECKS[:-1])
def test_newest(check, folder):
    check(str(folder))


def moved(folder, version, tmp_path):
    """What `check_saving` wrote, under a name that the cache of remote code has not seen before."""
    return shutil.move(f"{folder}-{version}", tmp_path / f"moved-{version.replace('.', '-')}")


def test_newest_reloads_what_it_saved(folder, tmp_path):
    """From a moved folder, in a new process."""
    check_saving(str(folder))
    run_checks([check_reloading], moved(folder, transformers.__version__, tmp_path))


def test_newest_detector(folder):
    run_checks([check_detector], folder)


def test_older(folder, older_transformers, tmp_path):
    """All checks; then the older version reloads what it saved, as above, and so does the newest."""
    run_checks([*CHECKS, check_detector], folder, older_transformers)
    saved = moved(folder, older_transformers.name.removeprefix("transformers-"), tmp_path)
    run_checks([check_reloading], saved, older_transformers)
    check_reloading(str(saved))
