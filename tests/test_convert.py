"""The converter: published formats in, repository folders out; and every way in which that can go wrong."""

import argparse
import ast
import ctypes
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock, patch

import huggingface_hub
import numpy as np
import pytest
import torch
from checkpoints import (
    RELOAD,
    SMALL_VARIANT,
    convert,
    converted,
    published_model,
    published_weights,
    save,
    save_mm,
    shapes_only,
    small_weights,
    training_state,
)
from conftest import FIXTURES, ROOT, SHAPES, run_python
from huggingface_hub import ModelCard
from PIL import Image
from repository import convert_checkpoint
from repository.configuration_mambavision import VARIANTS, imagenet_labels
from repository.conversion import plan as plan_module
from repository.conversion.errors import ConversionError
from repository.conversion.source import Source
from safetensors.torch import load_file, save_file
from weights import image


SMALL_NAME = "MambaVision-Small-1K"
FILES = {
    "LICENSE",
    "README.md",
    "config.json",
    "configuration_mambavision.py",
    "conversion.json",
    "fusion_mambavision.py",
    "fusion_triton.py",
    "model.safetensors",
    "modeling_mambavision.py",
    "operators.py",
    "preprocessor_config.json",
    "requirements.txt",
    "selective_scan.py",
    "selective_scan_triton.py",
    "winograd.py",
}


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    """Makes the small settings a published variant, recognised as the others are."""
    monkeypatch.setitem(VARIANTS, SMALL_NAME, SMALL_VARIANT)
    monkeypatch.setitem(plan_module.PUBLISHED["classification"], SMALL_NAME, {"top1": 12.3})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The small variant as timm saves it, in a folder of its own."""
    (tmp_path / "source").mkdir()
    return save(tmp_path / "source" / "small_1k.pth.tar", training_state(small_weights()))


def assert_error(run, *words: str) -> None:
    """One line `error: ...` on stderr that has the words, after notes and progress at most."""
    assert run.code not in (0, None)
    others = ("note: ", "checking: ", "writing: ", "verifying: ", "hashing: ")
    errors = [line for line in re.split(r"[\n\r]", run.err) if line and not line.startswith(others)]
    assert [line[:7] for line in errors] == ["error: "], run.err
    for word in words:
        assert word in errors[0]


def assert_fails_and_leaves_nothing(target: Path, words: list[str], *arguments) -> None:
    before = sorted(target.parent.iterdir())
    assert_error(convert(*arguments), *words)
    assert sorted(target.parent.iterdir()) == before


def assert_holds(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The folder's weights are these, bit for bit."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored.update(load_file(file))
    assert stored.keys() == {f"model.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(stored[f"model.{name}"], tensor) and stored[f"model.{name}"].dtype == tensor.dtype, name


# ---------------------------------------------------------------------------------------------------------------------
# The published models
# ---------------------------------------------------------------------------------------------------------------------

MODELS = [name for name in VARIANTS if name.endswith("-1K")]
# and L3-256-21K in test_convert_large.py


@pytest.fixture(scope="module")
def published_models(tmp_path_factory, published):
    """Each model's outputs by the published package on a checkpoint, and by the folder made from that checkpoint."""
    base = tmp_path_factory.mktemp("published")
    pixels = image((1, 3, 64, 96))
    torch.save(pixels, base / "pixels.pt")
    files = json.loads((ROOT / "conversion" / "published.json").read_text())["classification"]
    expected, lines = {}, {}
    for variant in MODELS:
        weights = published_weights(variant)
        path = save(base / files[variant]["checkpoint_file"], {"state_dict": weights, "arch": variant, "epoch": 300})
        expected[variant] = published_model(published, variant, weights)(pixels)
        del weights
        lines[variant] = converted(path, base / variant)
        path.unlink()
    folders = [base / variant for variant in MODELS]
    run_python(RELOAD, base / "pixels.pt", *folders)
    yield {
        variant: (expected[variant], load_file(base / variant / "outputs.safetensors"), lines[variant])
        for variant in MODELS
    }
    shutil.rmtree(base)


@pytest.mark.parametrize("variant", MODELS)
def test_published_checkpoint_reloads_to_the_published_numbers(published_models, variant):
    expected, actual, run = published_models[variant]
    assert run.out.startswith("wrote ") and variant in run.out and "equal bit for bit" in run.out
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4 * value.std().item(), msg=name)


def test_verify_against_official(published, tmp_path, monkeypatch):
    path = save(tmp_path / "mambavision_tiny_1k.pth.tar", {"state_dict": published_weights("MambaVision-T-1K")})
    run = converted(path, tmp_path / "out", "--verify-against-official")
    differences = json.loads((tmp_path / "out" / "conversion.json").read_text())["verification"][
        "difference_from_official"
    ]
    assert differences.keys() == {"map0", "map1", "map2", "map3", "pooled", "logits"}
    assert all(0 <= value < 1e-4 for value in differences.values())
    assert "of the mambavision package's" in run.out

    monkeypatch.setattr(published.Attention, "forward", lambda self, x: 1.001 * x)  # another function
    arguments = (path, tmp_path / "other", "--verify-against-official")
    assert_fails_and_leaves_nothing(tmp_path / "other", ["mambavision package computes otherwise", "map2"], *arguments)


def test_verify_against_official_where_it_is_not_installed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mambavision.models.mamba_vision", None)
    arguments = (checkpoint, tmp_path / "out", "--verify-against-official")
    assert_fails_and_leaves_nothing(tmp_path / "out", ["pip install --no-deps mambavision"], *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def _prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


SOURCES = {
    "timm": lambda path, w: save(path / "a.pth.tar", training_state(w)),
    "under model": lambda path, w: save(path / "a.pth", {"model": w, "epoch": 3}),
    "parallel": lambda path, w: save(path / "a.pth.tar", {"state_dict": _prefixed(w, "module.")}),
    "with prefix": lambda path, w: save(path / "a.pth.tar", {"state_dict": _prefixed(w, "model.")}),
    "parallel with prefix": lambda path, w: save(path / "a.pth.tar", {"model": _prefixed(w, "module.model.")}),
    "compiled": lambda path, w: save(path / "a.pth.tar", {"state_dict": _prefixed(w, "_orig_mod.")}),
    "bare": lambda path, w: save(path / "a.bin", w),
    "before zip": lambda path, w: save(path / "a.pth", training_state(w), _use_new_zipfile_serialization=False),
    "channels last": lambda path, w: save(path / "a.pth", {"state_dict": _channels_last(w)}),
    "of mmengine": lambda path, w: save_mm(path / "a.pth", w),
    "parameters": lambda path, w: save(path / "a.pth", {"state_dict": _parameters(w)}),
    "safetensors": lambda path, w: _save_file(path / "a.safetensors", w),
    "safetensors with prefix": lambda path, w: _save_file(path / "a.safetensors", _prefixed(w, "model.")),
    "folder": lambda path, w: _save_file(path / "model.safetensors", _prefixed(w, "model.")).parent,
    "folder of a .pth.tar": lambda path, w: save(path / "a.pth.tar", {"state_dict": w}).parent,
    "sharded folder": lambda path, w: _save_shards(path, w),
    "upper case": lambda path, w: _save_file(path / "A.SAFETENSORS", w),
    "folder of upper case": lambda path, w: save(path / "A.PTH", {"state_dict": w}).parent,
    "folder of Lightning": lambda path, w: save(path / "a.ckpt", {"state_dict": _prefixed(w, "model.")}).parent,
    "safetensors without a suffix": lambda path, w: _save_file(path / "0a1b2c", w),
    "without a suffix": lambda path, w: save(path / "0a1b2c", {"state_dict": w}),
    "negated views": lambda path, w: save(path / "a.pth", {"state_dict": {**w, NAME: torch._neg_view(-w[NAME])}}),
    "of Python 3.13": lambda path, w: _with_a_path_of_python_3_13(path / "a.pth", w),
    "without checksums": lambda path, w: _without_checksums(path / "a.pth", w),
}


def _with_a_path_of_python_3_13(path: Path, weights: dict) -> Path:
    module = types.ModuleType("pathlib._local")

    class PosixPath:
        def __reduce__(self):
            return PosixPath, ("runs", "last")

    PosixPath.__module__, PosixPath.__qualname__ = module.__name__, "PosixPath"
    module.PosixPath = PosixPath
    with patch.dict(sys.modules, {module.__name__: module}):
        return save(path, training_state(weights, args=argparse.Namespace(output=PosixPath())))


def _without_checksums(path: Path, weights: dict) -> Path:
    torch.serialization.set_crc32_options(False)
    try:
        return save(path, {"state_dict": weights})
    finally:
        torch.serialization.set_crc32_options(True)


def _channels_last(weights: dict) -> dict:
    return {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in weights.items()}


def _parameters(weights: dict) -> dict:
    return {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in weights.items()}


def _save_file(path: Path, weights: dict) -> Path:
    save_file(weights, path, metadata={"format": "pt"})
    return path


def _save_shards(folder: Path, weights: dict) -> Path:
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({f"model.{name}": weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {f"model.{name}": file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", SOURCES)
def test_reads_every_format(kind, tmp_path):
    weights = small_weights()
    (tmp_path / "source").mkdir()
    source = SOURCES[kind](tmp_path / "source", weights)
    converted(source, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def test_takes_the_average_on_request(tmp_path):
    content = training_state(small_weights(0), state_dict_ema=_prefixed(small_weights(1), "module."))
    path = save(tmp_path / "last.pth.tar", content)
    converted(path, tmp_path / "plain")
    converted(path, tmp_path / "average", "--ema")
    assert_holds(tmp_path / "plain", small_weights(0))
    assert_holds(tmp_path / "average", small_weights(1))
    assert json.loads((tmp_path / "average" / "conversion.json").read_text())["source"]["weights"] == (
        "exponential average"
    )
    bare = save(tmp_path / "bare.pth.tar", {"state_dict": small_weights()})
    assert_fails_and_leaves_nothing(tmp_path / "no", ["state_dict_ema", "state_dict"], bare, tmp_path / "no", "--ema")


def test_its_own_folder_converts_again(checkpoint, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    converted(checkpoint, tmp_path / "first", "--labels", labels, "--dtype", "bfloat16")
    converted(tmp_path / "first", tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Recognition
# ---------------------------------------------------------------------------------------------------------------------


def recognised(name: str, tensors: dict, config: dict | None = None, variant: str | None = None):
    source = Source(name, [Path(name)], tensors, config or {})
    return plan_module.make_plan(source, variant, None, backbone_only=False)


@pytest.mark.parametrize("variant", SHAPES)
def test_recognises_every_published_model(variant):
    tensors = shapes_only(SHAPES[variant])
    checkpoint_file = plan_module.PUBLISHED["classification"][variant]["checkpoint_file"]
    for name in (checkpoint_file, f"nvidia/{variant}", f"{variant}/model.safetensors"):
        plan = recognised(name, tensors)
        assert plan.variant == variant
        assert plan.config.id2label == imagenet_labels()
        for field, value in VARIANTS[variant].items():
            assert getattr(plan.config, field) == value
    assert recognised("x", tensors, variant=f"nvidia/{variant}").variant == variant
    snapshot = f"models--nvidia--{variant}/snapshots/{'0' * 40}/model.safetensors"
    assert recognised(snapshot, tensors).variant == variant


def test_says_what_it_decided_without_a_name():
    for shapes, expected in (
        ("MambaVision-B-21K", "MambaVision-B-1K"),
        ("MambaVision-L-21K", "MambaVision-L-1K"),
        ("MambaVision-L2-512-21K", "MambaVision-L2-1K"),
        ("MambaVision-L3-512-21K", "MambaVision-L3-256-21K"),
    ):
        plan = recognised("best.pth", shapes_only(SHAPES[shapes]))
        assert plan.variant == expected
        assert plan.notes == [f"the tensors fit {expected} and {shapes}: took {expected}, as no name tells which"
                              " (--variant does)"]  # fmt: skip
    config = {"model_type": "mambavision", "window_size": [8, 8, 32, 16]}
    plan = recognised("best.pth", shapes_only(SHAPES["MambaVision-L3-512-21K"]), config)
    assert plan.variant == "MambaVision-L3-512-21K" and "config.json" in plan.notes[0]


def test_wrong_variants_are_refused():
    tensors = shapes_only(SHAPES["MambaVision-T-1K"])
    with pytest.raises(ConversionError, match=r"does not hold the tensors of MambaVision-T2-1K: it lacks levels.2.bl"):
        recognised("x", tensors, variant="MambaVision-T2-1K")
    with pytest.raises(ConversionError, match=r"--variant T is none .* MambaVision-T-1K"):
        recognised("x", tensors, variant="T")
    shapes = {name: shape for name, shape in SHAPES["MambaVision-T-1K"].items() if "levels.2.blocks.7." not in name}
    with pytest.raises(ConversionError, match=r"dim=80, in_dim=32, depths=\[1, 3, 7, 4\], as no published"):
        recognised("x", shapes_only(shapes))


def test_settings_of_a_fine_tuned_folder_are_kept(tmp_path):
    folder = _save_file(tmp_path / "model.safetensors", small_weights()).parent
    settings = {"model_type": "mambavision", "resolution": 96, "window_size": [8, 8, 6, 3], "mean": [0.1, 0.2, 0.3],
                "num_heads": [1, 1, 4, 8], "drop_path_rate": 0.35}  # fmt: skip
    labels = {str(i): f"kind {i}" for i in range(5)}
    (folder / "config.json").write_text(json.dumps({**settings, "id2label": labels}))
    run = converted(folder, tmp_path / "out" / "deep")
    kept = "num_heads, window_size, resolution, mean, drop_path_rate"
    assert f"note: kept from its config.json, other than in MambaVision-Small-1K: {kept}" in run.err
    config = json.loads((tmp_path / "out" / "deep" / "config.json").read_text())
    assert {name: config[name] for name in settings} == settings
    assert config["id2label"] == labels
    processor = json.loads((tmp_path / "out" / "deep" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 96, "width": 96} and processor["image_mean"] == [0.1, 0.2, 0.3]


def test_settings_beside_a_file_are_kept_if_they_are_its_own(tmp_path):
    path = _save_file(tmp_path / "model.safetensors", small_weights())
    settings = {"model_type": "mambavision", "window_size": [8, 8, 2, 2], "num_heads": [1, 1, 4, 8]}
    labels = {str(i): f"kind {i}" for i in range(5)}

    def config_with(name, **settings):
        (tmp_path / "config.json").write_text(json.dumps({"id2label": labels, **settings}))
        run = converted(path, tmp_path / name, "--no-verify", "--overwrite")
        return json.loads((tmp_path / name / "config.json").read_text()), run.err

    config, notes = config_with("own", **settings, dim=SMALL_VARIANT["dim"])
    assert config["window_size"] == [8, 8, 2, 2] and config["num_heads"] == [1, 1, 4, 8]
    assert config["id2label"] == labels and "note: kept from its config.json" in notes
    assert "left out" not in notes
    for wrong in ({**labels, "4": 4}, {"0": "a"}, list(labels)):
        config, notes = config_with("own", **settings, dim=SMALL_VARIANT["dim"], id2label=wrong)
        assert "LABEL_0" in config["id2label"].values() and "does not name 5 classes" in notes
    for other in ({**settings, "depths": [1, 3, 8, 4]}, {"model_type": "swin"}):
        config, notes = config_with(f"other-{other['model_type']}", **other)
        assert config["window_size"] == SMALL_VARIANT["window_size"] and "LABEL_0" in config["id2label"].values()
        assert ("it is another model's" in notes) == (other["model_type"] == "mambavision")


@pytest.mark.parametrize("prefix", ["model.model.", "model._orig_mod.", "model.module.", "module.model.model."])
def test_wrappers_in_any_order(tmp_path, prefix):
    weights = small_weights()
    path = save(tmp_path / "a.pth", {"state_dict": {"n_averaged": torch.tensor(3), **_prefixed(weights, prefix)}})
    converted(path, tmp_path / "out", "--no-verify")
    assert_holds(tmp_path / "out", weights)


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin"])
def test_folders_with_other_files(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save(folder / name, {"state_dict": small_weights()})
    for other in ("._model.ckpt", "training_args.bin", "optimizer.pt"):
        (folder / other).write_bytes(b"")
    converted(folder, tmp_path / "out", "--no-verify")
    assert_holds(tmp_path / "out", small_weights())
    (folder / name).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").touch()
    assert_error(convert(folder, tmp_path / "x"), "holds model-00001-of-00002.safetensors, model-00002", "index")
    (tmp_path / "empty").mkdir()
    assert_error(convert(tmp_path / "empty", tmp_path / "x"), "holds no checkpoint", ".safetensors or .pth.tar or")


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuned models: classes, labels, input channels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text",
    [
        ("labels.txt", "cat\ndog\nowl\n"),
        ("labels.json", '["cat", "dog", "owl"]'),
        ("config.json", '{"id2label": {"0": "cat", "1": "dog", "2": "owl"}}'),
        ("map.json", '{"0": "cat", "2": "owl", "1": "dog"}'),
        ("list.JSON", '{"id2label": ["cat", "dog", "owl"]}'),
        ("map.json", '\ufeff{"label2id": {"cat": 0, "owl": 2, "dog": 1}}'),
        ("map.json", '{"cat": 0, "owl": 2, "dog": 1}'),
    ],
)
def test_labels_are_taken_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    path = save(tmp_path / "a.pth", {"state_dict": small_weights(num_labels=3)})
    converted(path, tmp_path / "out", "--no-verify", "--labels", tmp_path / name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    assert config["label2id"] == {"cat": 0, "dog": 1, "owl": 2}


def test_imagenets_labels_need_timm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    path = save(tmp_path / "a.pth", {"state_dict": small_weights(num_labels=1000)})
    assert_fails_and_leaves_nothing(tmp_path / "out", ["pip install", "timm", "--labels"], path, tmp_path / "out")


def test_labels_are_generic_otherwise_and_imagenets_for_a_thousand(tmp_path):
    for count, first in ((3, "LABEL_0"), (1000, imagenet_labels()[0])):
        path = save(tmp_path / f"{count}.pth", {"state_dict": small_weights(num_labels=count)})
        converted(path, tmp_path / str(count), "--no-verify")
        labels = json.loads((tmp_path / str(count) / "config.json").read_text())["id2label"]
        assert len(labels) == count and labels["0"] == first


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.txt", "cat\ndog", ["2 classes", "5"]),
        ("a.txt", "cat\n\ndog\n\nowl\n", ["not a list of labels"]),
        ("a.json", '{"0": "cat", "7": "dog"}', ["not a list of labels"]),
        ("a.json", "[1, 2, 3, 4, 5]", ["not a list of labels"]),
        ("a.json", "not json", ["not the JSON file"]),
        ("missing.txt", None, ["missing.txt"]),
    ],
)
def test_wrong_labels_are_refused(checkpoint, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    arguments = (checkpoint, tmp_path / "out", "--labels", tmp_path / name)
    assert_fails_and_leaves_nothing(tmp_path / "out", words, *arguments)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_input_channels(tmp_path, in_chans):
    weights = small_weights(in_chans=in_chans)
    path = save(tmp_path / "a.pth", {"state_dict": weights})
    run = converted(path, tmp_path / "out")  # verified: a forward of images with these channels
    assert "note: the mean and std of" in run.err
    assert_holds(tmp_path / "out", weights)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert len(processor["image_mean"]) == in_chans and not processor["do_convert_rgb"]


# ---------------------------------------------------------------------------------------------------------------------
# Strictness and precision
# ---------------------------------------------------------------------------------------------------------------------


def _changed(name: str, change) -> dict:
    weights = small_weights()
    weights[name] = change(weights[name])
    return weights


def _with_value(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


NAME = "levels.2.blocks.0.mixer.in_proj.weight"
WRONG = {
    "missing": (lambda: {n: t for n, t in small_weights().items() if n != NAME}, ["lacks " + NAME]),
    "extra": (lambda: {**small_weights(), "levels.9.extra": torch.ones(3)}, ["levels.9.extra"]),
    "misshapen": (lambda: _changed(NAME, lambda t: t[:, :5]), [NAME, "[64, 5]", "[64, 64]"]),
    "transposed": (lambda: _changed("head.weight", lambda t: t.T.contiguous()), ["head.weight", "[128, 5]"]),
    "not finite": (lambda: _changed(NAME, _with_value(float("nan"))), [NAME, "not finite"]),
    "infinite": (lambda: _changed("levels.3.blocks.0.mixer.D", _with_value(float("-inf"))), ["mixer.D", "not finite"]),
    "integers": (lambda: _changed(NAME, lambda t: t.to(torch.int8)), [NAME, "torch.int8"]),
    "doubles": (lambda: _changed(NAME, lambda t: t.double()), [NAME, "torch.float64"]),
    "complex": (lambda: _changed(NAME, lambda t: t.to(torch.complex64)), [NAME, "torch.complex64"]),
    "a counter as float": (lambda: _changed("norm.num_batches_tracked", lambda t: t.float()), ["tracked in torch.flo"]),
    "sparse": (lambda: _changed(NAME, lambda t: t.to_sparse()), [NAME, "plain dense"]),
    "quantised": (
        lambda: _changed(NAME, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        [NAME, "plain dense"],
    ),
    "no tensor": (lambda: {**small_weights(), NAME: "hello"}, [NAME, "not a tensor"]),
    "no name": (lambda: {**small_weights(), 7: torch.ones(2)}, ["7", "not a tensor"]),
    "empty tensor": (lambda: _changed("head.weight", lambda t: t.new_empty(10**9, 0)), ["head.weight", "empty"]),
    "a view that grows": (
        lambda: _changed("head.weight", lambda t: torch.ones(1, 1).expand(10**10, 128)),
        ["claim", "GB"],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_are_named(tmp_path, kind):
    make, words = WRONG[kind]
    path = save(tmp_path / "a.pth", {"state_dict": make()})
    assert_fails_and_leaves_nothing(tmp_path / "out", words, path, tmp_path / "out")


NEVER_CAST = re.compile(r"A_log$|\.D$|running_mean$|running_var$|num_batches_tracked$")


@pytest.mark.parametrize("name, dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_casts_what_may_be_cast(checkpoint, tmp_path, name, dtype):
    converted(checkpoint, tmp_path / "out", "--dtype", name)
    expected = {n: t if NEVER_CAST.search(n) else t.to(dtype) for n, t in small_weights().items()}
    assert sum(t.dtype == dtype for t in expected.values()) > len(expected) / 2
    assert_holds(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == name


@pytest.mark.parametrize("name", [NAME, "norm.running_var"])  # the latter is cast at loading, not here
def test_values_out_of_range_of_the_dtype_are_named(tmp_path, name):
    path = save(tmp_path / "a.pth", {"state_dict": _changed(name, _with_value(1e6))})
    converted(path, tmp_path / "bfloat16", "--dtype", "bfloat16")
    arguments = (path, tmp_path / "float16", "--dtype", "float16")
    assert_fails_and_leaves_nothing(tmp_path / "float16", [name, "torch.float16"], *arguments)


def test_weights_stay_in_the_sources_half_precision(tmp_path):
    weights = {n: t if NEVER_CAST.search(n) else t.bfloat16() for n, t in small_weights().items()}
    converted(save(tmp_path / "a.pth", {"state_dict": weights}), tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def test_what_half_precision_cannot_hold_is_named_where_it_is_loaded_in_it(tmp_path):
    """A head in float32 on a body in float16, which transformers loads in float16."""
    weights = {n: t if NEVER_CAST.search(n) or "head" in n else t.half() for n, t in small_weights().items()}
    converted(save(tmp_path / "a.pth", {"state_dict": weights}), tmp_path / "out")
    assert_holds(tmp_path / "out", weights)
    weights["head.weight"] = 1e6 * weights["head.weight"]
    path = save(tmp_path / "b.pth", {"state_dict": weights})
    words = ["head.weight", "not finite in torch.float16"]
    assert_fails_and_leaves_nothing(tmp_path / "no", words, path, tmp_path / "no", "--no-verify")


def test_verification_finds_a_changed_byte(checkpoint, tmp_path, monkeypatch):
    original = convert_checkpoint.write_rest

    def write_and_flip(folder, plan, written):
        original(folder, plan, written)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(convert_checkpoint, "write_rest", write_and_flip)
    assert_fails_and_leaves_nothing(
        tmp_path / "out", ["loaded back", "not what was read"], checkpoint, tmp_path / "out"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def test_the_folder_is_complete_and_its_card_runs(checkpoint, tmp_path):
    out = tmp_path / "MambaVision-Small"
    run = converted(checkpoint, out)
    assert re.fullmatch(
        rf"wrote {out}: {SMALL_NAME}, image-classification, [\d.]+ MB in \d+ s, {len(small_weights())} tensors,"
        r" all of them equal bit for bit when loaded back, outputs finite\n",
        run.out,
    )
    assert {path.name for path in out.iterdir()} == FILES
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MambaVisionModelForImageClassification"]
    assert config["auto_map"]["AutoModelForImageClassification"] == (
        "modeling_mambavision.MambaVisionModelForImageClassification"
    )
    report = json.loads((out / "conversion.json").read_text())
    assert report["source"]["files"] == [
        {
            "name": checkpoint.name,
            "bytes": checkpoint.stat().st_size,
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        }
    ]
    count = len(small_weights())
    assert report["tensors"] == {"source": count, "converted": count, "left_out": 0}
    assert report["variant"] == SMALL_NAME and report["converter"].split()[1]
    assert report["verification"]["tensors_equal_bit_for_bit"] == count

    card = ModelCard((out / "README.md").read_text())
    assert "- Nothing had to be decided." in card.text
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert "nvidia-source-code-license-nc" in card.data.license_name and "cc-by-nc-sa-4.0" in card.data.license_name
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert "| ImageNet-1K top-1 (%) | 12.3 |" in card.text and "Published by NVIDIA" in card.text
    for text in ("Nvidia Source Code License-NC", "CC-BY-NC-SA-4.0", "Apache License"):
        assert text in (out / "LICENSE").read_text()

    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    assert "## Use\n\nIn the folder that holds this one:\n\n```python" in card.text
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}")
    assert done.stdout.strip() in {f"LABEL_{i}" for i in range(5)}


@pytest.mark.parametrize("in_chans", [1, 4])
def test_the_card_for_other_channels_runs(tmp_path, in_chans):
    path = save(tmp_path / "a.pth", {"state_dict": small_weights(in_chans=in_chans)})
    converted(path, tmp_path / "out", "--no-verify")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    assert f"torch.rand(1, {in_chans}, " in snippet
    assert "logits" in run_python(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}").stdout


def test_the_card_says_what_was_chosen_and_calls_the_folder_by_its_name(tmp_path):
    state = {"state_dict": small_weights(), "state_dict_ema": small_weights(1)}
    out = tmp_path / 'the "best" \\ é'
    converted(save(tmp_path / "a.pth", state), out, "--no-verify", "--ema", "--dtype", "bfloat16")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- took the exponential average of the weights" in card
    assert "- cast all but A_log, D and the BatchNorm statistics to bfloat16" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert {out.name} == {n.value for n in ast.walk(ast.parse(snippet)) if getattr(n, "value", None) == out.name}


def test_a_bar_shows_tensors_and_bytes(checkpoint, tmp_path, monkeypatch):
    from repository.conversion import folder

    bar = folder.tqdm
    monkeypatch.setattr(folder, "tqdm", lambda **options: bar(**{**options, "delay": 0}))
    err = converted(checkpoint, tmp_path / "out", "--no-verify").err
    count = len(small_weights())
    done = f"{sum(tensor.nbytes for tensor in small_weights().values()) / 1e6:.2f}M"
    assert re.search(rf"writing: 100%\|.*{done}/{done} .*tensor {count} of {count}", err), err


def test_published_data_are_complete():
    """What the cards say and what is recognised covers all that is published, and nothing else."""
    published = plan_module.PUBLISHED["classification"]
    assert published.keys() == VARIANTS.keys()
    recorded = json.loads((FIXTURES / "variants.json").read_text())
    for name in SHAPES:
        assert published[name] == {"checkpoint_file": recorded[name]["checkpoint_file"], **recorded[name]["published"]}
    assert len(plan_module.DENSE) == 7 and all(model["backbone"] in VARIANTS for model in plan_module.DENSE.values())


def test_shards_above_the_size(checkpoint, tmp_path):
    converted(checkpoint, tmp_path / "out", "--max-shard-size", "500KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 540e3 for shard in shards)
    assert_holds(tmp_path / "out", small_weights())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in small_weights().values())
    for wrong in ("big", "0GB", "-1GB"):
        arguments = (checkpoint, tmp_path / "no", f"--max-shard-size={wrong}")
        assert_fails_and_leaves_nothing(tmp_path / "no", [f"--max-shard-size {wrong}"], *arguments)


CONVERT_SMALL = f"""
import sys, types
package = types.ModuleType("repository")
package.__path__ = [{str(ROOT)!r}]
sys.modules["repository"] = package
from repository import convert_checkpoint
from repository.configuration_mambavision import VARIANTS
from repository.conversion.plan import PUBLISHED
VARIANTS[{SMALL_NAME!r}] = {SMALL_VARIANT!r}
PUBLISHED["classification"][{SMALL_NAME!r}] = {{"top1": 12.3}}
"""


def test_converts_under_older_transformers(older_transformers, checkpoint, tmp_path):
    code = CONVERT_SMALL + "assert not convert_checkpoint.main(sys.argv[1:])"
    run_python(code, checkpoint, tmp_path / "old", "--dtype", "float16", overlay=older_transformers)
    converted(checkpoint, tmp_path / "new", "--dtype", "float16")
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("old", "new"))
    fields = [*SMALL_VARIANT, "id2label", "torch_dtype", "auto_map", "mean", "crop_mode"]
    assert {name: old[name] for name in fields} == {name: new[name] for name in fields}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new")]
    assert weights[0] == weights[1]
    reload = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype="auto")
print(model.dtype, model(torch.ones(1, 3, 64, 64)).logits.isfinite().all().item())
"""
    assert run_python(reload, tmp_path / "new", overlay=older_transformers).stdout.split() == ["torch.float16", "True"]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile and broken sources
# ---------------------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickling an instance calls the function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _malicious(path: Path, where: str, call: Runs, **options) -> Path:
    content = training_state(small_weights())
    if where == "weights":
        content["state_dict"][NAME] = call
    elif where == "arguments":
        content["args"].hook = call
    else:
        content = call
    return save(path, content, **options)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["weights", "arguments", "everything"])
def test_a_pickle_runs_no_code(tmp_path, where, legacy):
    marker = tmp_path / "marker"
    options = {"_use_new_zipfile_serialization": not legacy}
    for call, word in (
        (Runs(os.system, f"touch {marker}"), "posix.system"),
        (Runs(exec, f"open({str(marker)!r}, 'w')"), "builtins.exec"),
        (Runs(Path.touch, marker), "getattr" if where == "everything" else ""),
    ):
        path = _malicious(tmp_path / "a.pth.tar", where, call, **options)
        run = convert(path, tmp_path / "out")
        assert not marker.exists()
        if word != "":
            assert_error(run, "a.pth.tar")
        path.unlink()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    raw = tmp_path / "raw.pth"
    raw.write_bytes(pickle.dumps(Runs(os.system, f"touch {marker}")))
    assert_fails_and_leaves_nothing(tmp_path / "out", ["raw.pth"], raw, tmp_path / "out")
    assert not marker.exists()


def test_torch_loads_afterwards_what_it_loaded_before(checkpoint, tmp_path):
    """A checkpoint of the Trainer holds NumPy's random state, which the converter reads as stand-ins."""
    torch.save({"state": np.random.default_rng(0).bit_generator.state["state"], "array": np.zeros(3)}, tmp_path / "rng")
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]
    ):
        converted(checkpoint, tmp_path / "out")
        assert (torch.load(tmp_path / "rng")["array"] == 0).all()


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path, suffix, fraction):
    whole = tmp_path / "whole"
    if suffix == ".safetensors":
        save_file(small_weights(), whole)
    else:
        save(whole, training_state(small_weights()))
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * fraction)])
    assert_fails_and_leaves_nothing(tmp_path / "out", [path.name], path, tmp_path / "out")


def test_a_truncated_legacy_file(tmp_path):
    path = save(tmp_path / "a.pth", training_state(small_weights()), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_fails_and_leaves_nothing(tmp_path / "out", ["a.pth"], path, tmp_path / "out")


def test_a_flipped_byte_in_the_weights(checkpoint, tmp_path):
    """The archive's checksums are compared, though memory-mapping does not ask for them."""
    data = bytearray(checkpoint.read_bytes())
    data[data.index(small_weights()[NAME].numpy().tobytes()) + 100] ^= 1
    checkpoint.write_bytes(data)
    assert_fails_and_leaves_nothing(tmp_path / "out", ["small_1k.pth.tar is damaged"], checkpoint, tmp_path / "out")


FOREIGN = {
    "text": lambda path: path.write_text("hello"),
    "picture": lambda path: Image.new("RGB", (9, 9)).save(path, format="png"),
    "zeros": lambda path: path.write_bytes(bytes(10_000)),
    "zip of something": lambda path: _zip(path, {"a.txt": b"hello"}),
    "zip with a false pickle": lambda path: _zip(path, {"archive/data.pkl": b"hello", "archive/version": b"3\n"}),
    "another model": lambda path: torch.save(torch.nn.Linear(3, 3).state_dict(), path),
    "a list": lambda path: torch.save([torch.ones(3)], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "no weights": lambda path: torch.save({"epoch": 3}, path),
    "no tensors": lambda path: torch.save({"state_dict": {}}, path),
    "only names": lambda path: torch.save({"state_dict": dict.fromkeys(small_weights())}, path),
    "flat stem": lambda path: torch.save({f"patch_embed.conv_down.{i}.weight": torch.ones(3) for i in (0, 3)}, path),
}


def _zip(path: Path, entries: dict, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_foreign_files(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    with path.open("wb"):
        FOREIGN[kind](path)
    assert_fails_and_leaves_nothing(tmp_path / "out", [path.name], path, tmp_path / "out")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["Git LFS", "git lfs pull"]),
        (b"\n<!DOCTYPE html><html>", ["web page"]),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_downloaded_instead_of_a_checkpoint(tmp_path, content, words, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert_fails_and_leaves_nothing(tmp_path / "out", [path.name, *words], path, tmp_path / "out")


def test_zip_bombs(tmp_path):
    path = save(tmp_path / "a.pth", {"state_dict": small_weights()})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    bomb = {**entries, pickled: entries[pickled] + bytes(2**28)}  # 256 MiB of zeros in 256 KiB
    _zip(tmp_path / "compressed.pth", bomb, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "compressed.pth").stat().st_size < 2**23
    arguments = (tmp_path / "compressed.pth", tmp_path / "out")
    assert_fails_and_leaves_nothing(tmp_path / "out", ["compressed"], *arguments)

    # the directory names one stored entry many times
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    length, start = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[start : start + length] * 50
    count = struct.unpack("<H", data[end + 10 : end + 12])[0] * 50
    tail = bytearray(data[end:])
    tail[8:20] = struct.pack("<HHII", count, count, len(directory), start)
    (tmp_path / "overlapping.pth").write_bytes(data[:start] + directory + tail)
    arguments = (tmp_path / "overlapping.pth", tmp_path / "out")
    assert_fails_and_leaves_nothing(tmp_path / "out", ["overlapping.pth", "unpacks to", "MB"], *arguments)


def test_a_storage_that_claims_more_than_is_there(tmp_path):
    weights = small_weights()
    path = save(tmp_path / "a.pth", {"state_dict": weights})
    data = path.read_bytes()
    numel = weights["head.weight"].numel()
    small, large = b"K\x05K\x80\x86", b"M\xff\xffM\xff\xff\x86"  # the shape (5, 128) in the pickle, and a larger one
    assert data.count(small) >= 1 and numel == 640
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    entries[pickled] = entries[pickled].replace(small, large)
    _zip(path, entries)
    assert_fails_and_leaves_nothing(tmp_path / "out", ["a.pth"], path, tmp_path / "out")


def test_a_safetensors_header_that_lies(tmp_path):
    path = _save_file(tmp_path / "a.safetensors", small_weights())
    data = path.read_bytes()
    for header in (struct.pack("<Q", 2**62), struct.pack("<Q", 10**8), struct.pack("<Q", 3)):
        path.write_bytes(header + data[8:])
        assert_fails_and_leaves_nothing(tmp_path / "out", ["a.safetensors"], path, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "sub/secret.safetensors", "ABSOLUTE", "missing.safetensors", "..", "config.json", 7],
)
def test_a_shard_index_cannot_leave_its_folder(tmp_path, name):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.safetensors", folder / "sub" / "secret.safetensors"):
        _save_file(secret, small_weights())
    (folder / "config.json").write_text("{}")
    name = str(tmp_path / "secret.safetensors") if name == "ABSOLUTE" else name
    index = {"weight_map": {"head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ["model.safetensors.index.json", str(name), "same folder"]
    assert_fails_and_leaves_nothing(tmp_path / "out", words, folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 200_000, "\x00\xff"])
def test_a_broken_shard_index(tmp_path, text):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(text)
    assert_fails_and_leaves_nothing(tmp_path / "out", ["index.json"], folder, tmp_path / "out")


def test_a_tensor_in_two_shards(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    _save_shards(folder, small_weights())
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(first), **load_file(second)}, second)
    assert_fails_and_leaves_nothing(tmp_path / "out", ["in another file"], folder, tmp_path / "out")


@pytest.mark.parametrize(
    "config, words",
    [
        ("[" * 200_000, ["config.json"]),
        ('{"model_type": "mambavision", "window_size": [8, 8, 1000000, 7]}', ["larger than any"]),
        ('{"model_type": "mambavision", "window_size": [8, 8, 4096, 7]}', ["window_size above 256"]),
        ('{"model_type": "mambavision", "window_size": "a"}', ["window_size"]),
        ('{"model_type": "mambavision", "resolution": 1' + "0" * 400 + "}", ["too large"]),
        ('{"model_type": "mambavision", "resolution": -3}', ["resolution"]),
        ('{"model_type": "mambavision", "crop_pct": 1e-320}', ["larger than any"]),
        ('{"model_type": "mambavision", "std": [0, 0, 0]}', ["std"]),
        ('{"model_type": "mambavision", "interpolation": ["x"]}', ["config.json"]),
    ],
)
def test_hostile_settings_beside_the_weights(tmp_path, config, words):
    folder = tmp_path / "source"
    folder.mkdir()
    _save_file(folder / "model.safetensors", small_weights())
    (folder / "config.json").write_text(config)
    assert_fails_and_leaves_nothing(tmp_path / "out", words, folder, tmp_path / "out")


def test_names_cannot_reach_the_terminal(tmp_path):
    path = save(tmp_path / "a.pth", {"state_dict": {**small_weights(), "x\x1b[2J\nerror: all is well": torch.ones(1)}})
    run = convert(path, tmp_path / "out")
    assert_error(run, "x?[2J error: all is well")
    assert "\x1b" not in run.err


def test_a_source_that_changes_meanwhile(checkpoint, tmp_path, monkeypatch):
    original = convert_checkpoint.write_rest

    def write_and_replace(folder, plan, written):
        original(folder, plan, written)
        save(tmp_path / "next", {"state_dict": small_weights(1)}).rename(checkpoint)  # as timm saves

    monkeypatch.setattr(convert_checkpoint, "write_rest", write_and_replace)
    assert_fails_and_leaves_nothing(tmp_path / "out", ["changed while"], checkpoint, tmp_path / "out")


def test_code_beside_the_weights_does_not_run(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    _save_file(folder / "model.safetensors", small_weights())
    config = {"model_type": "mambavision", "auto_map": {"AutoConfig": "configuration_mambavision.MambaVisionConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_mambavision.py", "modeling_mambavision.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    converted(folder, tmp_path / "out")
    assert not (tmp_path / "marker").exists()
    assert (tmp_path / "out" / "modeling_mambavision.py").read_bytes() == (
        (ROOT / "modeling_mambavision.py").read_bytes()
    )


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        save(tmp_path / "two" / name, {})
    os.mkfifo(tmp_path / "fifo")
    for source, words in (
        (tmp_path / "missing.pth.tar", ["neither a file"]),
        ("no-such-thing", ["neither a file"]),
        ("../../etc", ["holds no checkpoint"] if Path("../../etc").is_dir() else ["neither a file"]),
        (tmp_path / "empty", ["holds no checkpoint"]),
        (tmp_path / "two", ["a.pth, b.pth"]),
        (tmp_path / "fifo", ["neither a file"]),
        ("/dev/zero", ["neither a file"]),
    ):
        assert_fails_and_leaves_nothing(tmp_path / "out", words, source, tmp_path / "out")


def test_wrong_arguments(checkpoint, tmp_path):
    both = ("--no-verify", "--verify-against-official")
    assert_error(convert(checkpoint, tmp_path / "out", *both), "exclude each other")
    assert_error(convert(checkpoint, tmp_path / "out", "--private"), "--push-to-hub")
    assert_error(convert(checkpoint, tmp_path / "out", "--backbone-only"), "dense-prediction")
    assert_error(convert(checkpoint), "output")
    assert_error(convert(checkpoint, tmp_path / "out", "--dtype", "int8"), "int8")


# ---------------------------------------------------------------------------------------------------------------------
# The target
# ---------------------------------------------------------------------------------------------------------------------


def test_an_existing_target_is_replaced_on_request_only(checkpoint, tmp_path):
    out = tmp_path / "out"
    converted(checkpoint, out)
    (out / "note.txt").write_text("mine")
    assert_fails_and_leaves_nothing(out, ["exists", "--overwrite"], checkpoint, out)
    arguments = (checkpoint, out, "--overwrite")
    assert_fails_and_leaves_nothing(out, ["would delete: note.txt;", "another folder"], *arguments)
    assert (out / "note.txt").exists()
    (out / "note.txt").unlink()
    other = save(tmp_path / "other.pth", {"state_dict": small_weights(1)})
    broken = save(tmp_path / "broken.pth", {"state_dict": {}})
    assert_fails_and_leaves_nothing(out, ["broken.pth"], broken, out, "--overwrite")
    assert_holds(out, small_weights())
    converted(other, out, "--overwrite")
    assert_holds(out, small_weights(1))
    assert not (tmp_path / ".out.partial").exists()


def test_only_a_models_folder_is_ever_replaced(checkpoint, tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("documents", "file"):
        arguments = (checkpoint, tmp_path / name, "--overwrite")
        assert_fails_and_leaves_nothing(tmp_path / name, [name, "not a model's folder"], *arguments)
    assert (tmp_path / "documents" / "thesis.txt").exists()
    # a clone, a download of the repository, a training, a folder in a file's place
    for name in (".git", "conversion", "checkpoint-10", "README.md"):
        (tmp_path / name[1:] / name).mkdir(parents=True)
        (tmp_path / name[1:] / "config.json").write_text("{}")
        arguments = (checkpoint, tmp_path / name[1:], "--overwrite")
        assert_fails_and_leaves_nothing(tmp_path / name[1:], [f"would delete: {name};"], *arguments)
        assert (tmp_path / name[1:] / name).is_dir()
    out = checkpoint.parent
    (out / "config.json").write_text("{}")
    for source in (checkpoint, out):
        assert_fails_and_leaves_nothing(out, ["lies in"], source, out, "--overwrite")


def test_a_source_is_never_where_the_result_goes(checkpoint, tmp_path):
    out = tmp_path / "out"
    converted(checkpoint, out)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to("../out/model.safetensors")
    for source in (tmp_path / "linked", tmp_path / "linked" / "model.safetensors"):
        assert_fails_and_leaves_nothing(out, [f"lies in {out}"], source, out, "--overwrite")
    assert_holds(out, small_weights())
    # what a killed run left whole in its workshop
    (tmp_path / ".new.partial").mkdir()
    rescued = out.rename(tmp_path / ".new.partial" / "mambavision")
    arguments = (rescued, tmp_path / "new")
    assert_fails_and_leaves_nothing(tmp_path / "new", ["lies in", ".new.partial"], *arguments)
    assert_holds(rescued, small_weights())


def test_the_current_folder_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "in")
    for output in (".", "", "..", tmp_path / "here" / "in"):
        assert_error(convert(checkpoint, output), "current folder")
        assert_error(convert(checkpoint, output, "--overwrite"), "current folder")
    assert sorted(tmp_path.rglob("*in*")) == [tmp_path / "here" / "in"]


def test_a_mount_point_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    assert_fails_and_leaves_nothing(tmp_path / "volume", ["mount point"], checkpoint, tmp_path / "volume")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_names_that_are_not_utf_8(checkpoint, tmp_path):
    out = tmp_path / os.fsdecode(b"mod\xe8le")
    assert_fails_and_leaves_nothing(out, ["no name in UTF-8", "mod\\udce8le"], checkpoint, out)
    source = checkpoint.rename(checkpoint.with_name(os.fsdecode(b"caf\xe9.pth")))
    assert_fails_and_leaves_nothing(out, ["no name in UTF-8", "caf\\udce9.pth"], source, tmp_path / "out")


def test_names_that_the_terminal_cannot_show(checkpoint, tmp_path):
    code = CONVERT_SMALL + "sys.exit(convert_checkpoint.main(sys.argv[1:]))"
    done = run_python(code, checkpoint, tmp_path / "modèle", "--no-verify", PYTHONIOENCODING="ascii")
    assert "mod\\xe8le: MambaVision" in done.stdout
    assert_holds(tmp_path / "modèle", small_weights())


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_empty_folder_is_used(tmp_path, options):
    from repository.conversion.workshop import Workshop

    target = tmp_path / "out"
    target.mkdir()
    with Workshop(target, bool(options)) as workshop:
        (workshop.new / "config.json").write_text("new")
        workshop.publish()
    assert (target / "config.json").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fills_up_meanwhile_is_kept(tmp_path):
    from repository.conversion.workshop import Workshop

    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OSError), Workshop(target, overwrite=False) as workshop:
        (target / "thesis.txt").write_text("mine")
        workshop.publish()
    assert (target / "thesis.txt").exists() and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EACCES])
def test_folders_are_renamed_where_they_cannot_be_exchanged(tmp_path, monkeypatch, code):
    from repository.conversion import workshop as module

    def refuses(*arguments):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *a, **o: types.SimpleNamespace(renameat2=refuses))
    if code == errno.EACCES:
        with pytest.raises(PermissionError):
            module.exchange(tmp_path / "a", tmp_path / "b")
    else:
        assert not module.exchange(tmp_path / "a", tmp_path / "b")


def test_links_that_go_round(checkpoint, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert_error(convert(tmp_path / "loop", tmp_path / "out"), "loop")
    assert_error(convert(checkpoint, tmp_path / "loop"), "loop")


def test_a_link_keeps_pointing_at_the_new_folder(checkpoint, tmp_path):
    converted(checkpoint, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    other = save(tmp_path / "other.pth", {"state_dict": small_weights(1)})
    converted(other, tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    assert_holds(tmp_path / "real", small_weights(1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_between_the_two_renames_leaves_the_old_folder(tmp_path, monkeypatch, error):
    from repository.conversion import workshop as module

    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    monkeypatch.setattr(module, "exchange", lambda a, b: False)
    rename = Path.rename

    def fails(path, other):
        if path.name == "mambavision":
            raise error
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(error), module.Workshop(target, overwrite=True) as workshop:
        (workshop.new / "config.json").write_text("new")
        workshop.publish()
    assert (target / "config.json").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_planted_link_in_the_workshops_place_is_not_followed(checkpoint, tmp_path):
    (tmp_path / "victim" / "mambavision").mkdir(parents=True)
    (tmp_path / "victim" / "mambavision" / "precious").touch()
    (tmp_path / ".out.partial").symlink_to("victim")
    assert_error(convert(checkpoint, tmp_path / "out"))
    assert (tmp_path / "victim" / "mambavision" / "precious").exists() and not (tmp_path / "out").exists()


def test_targets_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    assert_fails_and_leaves_nothing(tmp_path / "x", ["file"], checkpoint, tmp_path / "file" / "out")
    assert_error(convert(checkpoint, "/proc/out"), "/proc")
    assert_error(convert(checkpoint, tmp_path / ("x" * 300)), "name too long")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_error(convert(checkpoint, tmp_path / "closed" / "out"), "closed")


def test_leftovers_that_cannot_be_deleted_are_named(checkpoint, tmp_path, monkeypatch):
    from repository.conversion import workshop as module

    converted(checkpoint, tmp_path / "out")

    def refuses(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EPERM, "Operation not permitted", "weights")

    monkeypatch.setattr(module.shutil, "rmtree", refuses)
    left = tmp_path / ".out.partial" / "mambavision"
    assert f"note: {left} could not be deleted" in converted(checkpoint, tmp_path / "out", "--overwrite").err
    run = convert(checkpoint, tmp_path / "out", "--overwrite")
    assert f"error: {left} is left from an earlier run and cannot be deleted: Operation not permitted" in run.err


def test_a_file_system_without_locks(checkpoint, tmp_path, monkeypatch):
    from repository.conversion import workshop as module

    flock = MagicMock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(module, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    converted(checkpoint, tmp_path / "out", "--no-verify")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"] and flock.called
    flock.side_effect = OSError(errno.EIO, "Input/output error")
    assert_error(convert(checkpoint, tmp_path / "again", "--no-verify"), "Input/output error")


def test_the_workshop_of_the_run_before_vanishes_meanwhile(checkpoint, tmp_path, monkeypatch):
    from repository.conversion import workshop as module

    opened = os.open

    def opens(path, *arguments, **options):
        if Path(path).name == ".out.partial" and not calls:
            calls.append(Path(path).rmdir())
        return opened(path, *arguments, **options)

    calls = []
    monkeypatch.setattr(module.os, "open", opens)
    converted(checkpoint, tmp_path / "out", "--no-verify")
    assert calls


def test_missing_parents_are_made_and_unmade(checkpoint, tmp_path):
    broken = save(tmp_path / "broken.pth", {"state_dict": {}})
    assert_fails_and_leaves_nothing(tmp_path / "a", ["broken.pth"], broken, tmp_path / "a" / "b" / "out")
    converted(checkpoint, tmp_path / "a" / "b" / "out")
    assert_holds(tmp_path / "a" / "b" / "out", small_weights())


def test_two_runs_to_one_target_exclude_each_other(checkpoint, tmp_path):
    from repository.conversion.workshop import Workshop

    with Workshop(tmp_path / "out", overwrite=False) as workshop:
        assert_error(convert(checkpoint, tmp_path / "out"), "another conversion", "running")
        assert workshop.new.is_dir()
    converted(checkpoint, tmp_path / "out")


# Forks from a process that has imported everything, so that a run takes a fraction of a second. argv: source, another,
# work folder. Every line printed is one kill.
KILLS = (
    CONVERT_SMALL
    + """
import os, random, shutil, signal, threading, time
from pathlib import Path
from tqdm import tqdm

source, other, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.stderr = open(os.devnull, "w")
# Forks share the lock of tqdm's bars: a run killed with it in hand would stop all others. Users' runs are no forks.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())


def start(*arguments):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        os._exit(convert_checkpoint.main([other, str(work / "out"), *arguments]))
    return child


def content(folder):
    # the report and the card tell whether the folder was verified
    return {path.name: path.name in ("conversion.json", "README.md") or path.read_bytes() for path in folder.iterdir()}


def state(folder):
    if not folder.exists():
        return "absent"
    return next((name for name, whole in known.items() if whole == content(folder)), "half")


known = {}
for name, path in (("old", source), ("new", other)):
    assert not convert_checkpoint.main([path, str(work / "out"), "--overwrite"])
    known[name] = content(work / "out")
    shutil.copytree(work / "out", work / name)
shutil.rmtree(work / "out")


def prepare(existing):
    shutil.rmtree(work / "out", ignore_errors=True)
    if existing:
        shutil.copytree(work / "old", work / "out")


prepare(True)
begin = time.monotonic()
os.waitpid(start("--overwrite"), 0)
duration, kills = time.monotonic() - begin, 0
while kills < 20:
    existing = kills % 2 == 0
    prepare(existing)
    child = start("--overwrite")
    time.sleep(duration * random.random())
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    killed_at = state(work / "out")
    os.waitpid(start("--no-verify"), 0)  # the next run, which may not overwrite, finds the target as it was; clears up
    print(existing, killed, killed_at, state(work / "out"), sorted(path.name for path in work.iterdir()))
    kills += killed
    if not killed:  # it ended first: the machine is less busy than when its duration was taken
        duration *= 0.8
"""
)


def assert_old_or_new(lines: list[str], two_renames: bool = False) -> list[list[str]]:
    """Of each kill: was there a folder, was the run killed, and the target's state then and after the next run."""
    kills = [line.split(" ", 4) for line in lines if not line.startswith("wrote ")]
    for existing, _, before, after, left in kills:
        allowed = {"old", "new"} if existing == "True" else {"absent", "new"}
        if two_renames and existing == "True":
            allowed.add("absent")  # between two renames; the next run puts the old folder back
        assert before in allowed
        assert after in ({"old", "new"} if existing == "True" else {"new"})
        assert left == "['new', 'old', 'out']"  # nothing lies beside the target
    return kills


def test_killed_at_twenty_random_moments(tmp_path, checkpoint):
    other = save(checkpoint.parent / "other.pth", {"state_dict": small_weights(1)})
    (tmp_path / "work").mkdir()
    # of a copy of the repository: the folders are compared byte for byte, whatever is edited meanwhile
    only_converter = shutil.ignore_patterns(".*", "tests", "examples", "benchmarks", "demo", "*.safetensors")
    shutil.copytree(ROOT, tmp_path / "repository", ignore=only_converter)
    code = KILLS.replace(repr(str(ROOT)), repr(str(tmp_path / "repository")))
    done = run_python(code, checkpoint, other, tmp_path / "work", OMP_NUM_THREADS="1")
    kills = assert_old_or_new(done.stdout.splitlines())
    assert sum(killed == "True" for _, killed, *_ in kills) == 20


# The workshop alone, which needs no torch: each run is a fork of a few milliseconds. argv: work folder, whether folders
# can be exchanged, the signal. Every line printed is one signal.
AT_EVERY_LINE = f"""
import os, shutil, signal, sys, types
from pathlib import Path
package = types.ModuleType("conversion")
package.__path__ = [{str(ROOT / "conversion")!r}]
sys.modules["conversion"] = package
from conversion import workshop

work, atomic, number = Path(sys.argv[1]), sys.argv[2] == "exchange", signal.Signals[sys.argv[3]]
if not atomic:
    workshop.exchange = lambda a, b: False
for name in ("old", "new"):
    (work / name).mkdir()
    for file in ("config.json", "model.safetensors"):
        (work / name / file).write_text(name)


def run(overwrite, trace=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # as the command does
    sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        sys.settrace(trace)
        with workshop.Workshop(work / "out", overwrite) as made:
            shutil.copytree(work / "new", made.new, dirs_exist_ok=True)
            made.publish()
        code = 0
    finally:
        os._exit(code)


def state(folder):
    if not folder.exists():
        return "absent"
    content = [path.read_text() for path in folder.iterdir()]
    return content[0] if len(content) == 2 and content[0] == content[1] else "half"


for existing in (True, False):
    line, reached = 0, True
    while reached:
        line += 1
        shutil.rmtree(work / "out", ignore_errors=True)
        if existing:
            shutil.copytree(work / "old", work / "out")
        left, reader, writer = line, *os.pipe()

        def trace(frame, event, argument):
            global left
            if not frame.f_code.co_filename.endswith("workshop.py"):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.write(writer, b"x")
                    os.kill(os.getpid(), number)
            return trace

        ended = run(True, trace)
        os.close(writer)
        reached = os.read(reader, 1) == b"x"
        os.close(reader)
        before, beside = state(work / "out"), sorted(path.name for path in work.iterdir())
        if number is signal.SIGKILL:
            run(False)
            beside = sorted(path.name for path in work.iterdir())
        print(existing, ended != 0, before, state(work / "out"), beside)
"""


def at_every_line(*arguments) -> list[str]:
    command = [sys.executable, "-c", AT_EVERY_LINE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("exchange", ["exchange", "two renames"])
def test_killed_at_every_line_of_publishing(tmp_path, exchange):
    kills = assert_old_or_new(at_every_line(tmp_path, exchange, "SIGKILL"), two_renames=exchange != "exchange")
    assert len(kills) > 40
    states = {(existing, before) for existing, _, before, *_ in kills}
    assert {("True", "old"), ("True", "new"), ("False", "absent"), ("False", "new")} <= states


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_interrupted_at_every_line_of_publishing(tmp_path, number):
    """Whatever is interrupted clears up itself, without a next run, and never loses the old folder."""
    lines = at_every_line(tmp_path, "two renames", number)
    assert len(lines) > 80
    for line in lines:
        existing, _, state, _, left = line.split(" ", 4)
        assert state in ({"old", "new"} if existing == "True" else {"absent", "new"}), line
        assert left == ("['new', 'old']" if state == "absent" else "['new', 'old', 'out']"), line


FULL_DISK = (
    CONVERT_SMALL
    + """
import resource
from pathlib import Path
file, limited, disk = sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for work, limit in ((limited, 1000), (limited, 200_000), (disk, None)):
    if work:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))
        assert convert_checkpoint.main([file, work + "/out", "--no-verify"]) == 1
        assert not list(Path(work).iterdir()), list(Path(work).iterdir())
"""
)


def test_full_disk(tmp_path, checkpoint):
    """A limit on the size of files stands for a full disk everywhere; where mounting is permitted, a small disk too."""
    limited, disk = tmp_path / "limited", tmp_path / "disk"
    limited.mkdir()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    try:
        errors = run_python(FULL_DISK, checkpoint, limited, disk if mounted else "").stderr.splitlines()
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    errors = [line for line in errors if line.startswith("error: ")]
    reasons = ["File too large"] * 2 + ["No space left on device"] * bool(mounted)
    assert len(errors) == len(reasons) and all(map(str.__contains__, errors, reasons)), errors


def test_terminated_it_clears_up(tmp_path, checkpoint):
    """SIGTERM to the real command, while it writes: an error, and nothing left."""
    big = save(tmp_path / "mambavision_tiny_1k.pth.tar", {"state_dict": published_weights("MambaVision-T-1K")})
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), str(big), str(tmp_path / "work" / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    weights = tmp_path / "work" / ".out.partial" / "mambavision" / "model.safetensors"
    while process.poll() is None and not weights.exists():
        time.sleep(0.001)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.splitlines()[-1] == "error: terminated"
    assert not list((tmp_path / "work").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

MEMORY = (
    CONVERT_SMALL
    + """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

small, large, work, *options = sys.argv[1:]
assert not convert_checkpoint.main([small, work + "/small", *options])  # brings in what libraries load late
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = peak()
assert not convert_checkpoint.main([large, work + "/large", *options])
print("peak", before, peak())
"""
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    "options, zipped",
    [([], True), (["--dtype", "bfloat16"], True), ([], False)],
    ids=["as it is", "bfloat16", "before zip"],
)
def test_peak_memory(tmp_path, checkpoint, options, zipped):
    """At most 1.3 times the checkpoint beyond what the interpreter and the libraries take."""
    content = {"state_dict": published_weights("MambaVision-B-1K")}
    large = save(tmp_path / "mambavision_base_1k.pth.tar", content, _use_new_zipfile_serialization=zipped)
    done = run_python(MEMORY, checkpoint, large, tmp_path, *options)
    before, after = map(int, done.stdout.split()[-2:])
    ratio = (after - before) / large.stat().st_size
    print(f"peak {ratio:.2f} times the checkpoint's {large.stat().st_size / 1e6:.0f} MB")
    shutil.rmtree(tmp_path)
    assert 0.5 < ratio < 1.3


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    """A Hub of two repositories: what huggingface_hub asks when it downloads a snapshot and when it uploads a folder.

    nvidia/MambaVision-Small-1K holds `files`; me/converted, once `created`, holds what is named by `there`. Requests
    for names in `refuses` are answered by an error of that code.
    """
    state = types.SimpleNamespace(files={}, uploaded={}, deleted=[], created=None, there=None, refuses={})
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes, code=200, **headers):
            self.send_response(code)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value, code=200):
            self.answer(json.dumps(value).encode(), code)

        def do_GET(self):
            if refused := next((code for name, code in state.refuses.items() if name in self.path), None):
                self.answer(b"{}", 401 if refused == "RepoNotFound" else 403, **{"X-Error-Code": refused})
            elif "/api/whoami" in self.path:
                self.answer_json({"name": "me", "type": "user"})
            elif "/api/models/me/converted" in self.path:
                if state.there is None:
                    self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})
                elif "/tree/" in self.path:
                    self.answer_json([{"type": "file", "path": n, "size": 1, "oid": "1"} for n in state.there])
                else:
                    self.answer_json({"id": "me/converted", "private": True, "sha": commit})
            elif "/api/models/nvidia/MambaVision-Small-1K" in self.path:
                siblings = [{"rfilename": name} for name in state.files]
                tree = [{"type": "file", "path": n, "size": len(d), "oid": "1"} for n, d in state.files.items()]
                self.answer_json(
                    tree if "/tree/" in self.path else {"id": "nvidia/x", "sha": commit, "siblings": siblings}
                )
            elif "/resolve/" in self.path and (name := self.path.rsplit("/", 1)[1]) in state.files:
                etag = hashlib.sha256(state.files[name]).hexdigest()
                self.answer(state.files[name], **{"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
            else:
                self.answer_json({"error": "not found"}, 404)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            base = f"http://127.0.0.1:{self.server.server_port}"
            if self.path.startswith("/api/repos/create"):
                state.created = json.loads(body)
                state.there = state.there or []
                self.answer_json({"url": f"{base}/me/converted", "name": "me/converted", "id": "me/converted"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer_json({"files": files})
            elif "/commit/" in self.path:
                import base64

                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        state.deleted.append(line["value"]["path"])
                self.answer_json({"success": True, "commitOid": commit, "commitUrl": f"{base}/me/converted/commit/0"})
            else:
                self.answer_json({})

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()


def test_from_the_hub_and_back(hub, tmp_path):
    """A Hub id is downloaded into the cache, found there offline, converted, and uploaded."""
    _save_file(tmp_path / "model.safetensors", _prefixed(small_weights(), "model."))
    hub.files = {
        "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
        "config.json": b'{"model_type": "mambavision"}',
        "huge_unused.bin": b"never asked for",
    }
    code = CONVERT_SMALL + "sys.exit(convert_checkpoint.main(sys.argv[1:]))"
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    push = ["--push-to-hub", "me/converted", "--private"]
    source = "nvidia/MambaVision-Small-1K"
    done = run_python(code, source, tmp_path / "out", *push, HF_TOKEN="hf_secret", **online)
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/converted"
    assert_holds(tmp_path / "out", small_weights())
    assert hub.created["name"] == "converted" and "private" in (
        hub.created.get("visibility"),
        *(key for key, value in hub.created.items() if value is True),
    )
    assert hub.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert not hub.deleted
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"me/converted"' in card and "In the folder that holds this one" not in card
    assert "hf_secret" not in (tmp_path / "out" / "conversion.json").read_text() + done.stdout + done.stderr
    assert not list((tmp_path / "home").rglob("huge_unused.bin"))

    # over an earlier upload in shards, of which none stays beside the one file
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    hub.there = [*old, "model.safetensors", "adapter_model.safetensors", "notes.md"]
    push = ["--push-to-hub", "me/converted", "--private", "--overwrite", "--no-verify"]
    run_python(code, source, tmp_path / "out", *push, HF_TOKEN="hf_secret", **online)
    assert sorted(hub.deleted) == old

    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run_python(code, source, tmp_path / "again", **offline)
    assert_holds(tmp_path / "again", small_weights())


def test_what_the_hub_gives_and_does_not(hub, tmp_path):
    code = CONVERT_SMALL + "sys.exit(convert_checkpoint.main(sys.argv[1:]))"
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    source, config = "nvidia/MambaVision-Small-1K", {"config.json": b'{"model_type": "mambavision"}'}

    def fails(source, home, **environment):
        environment = {**online, "HF_HOME": str(tmp_path / home), **environment}
        done = run_python(code, source, tmp_path / "x", "--no-verify", check=False, **environment)
        assert done.returncode == 1 and not (tmp_path / "x").exists()
        return done.stderr.splitlines()[-1]

    hub.files = config
    assert f"{source} has no checkpoint" in fails(source, "bare")
    assert "the Hub was not reached" in fails(source, "bare", HF_HUB_OFFLINE="1")  # the configuration is in the cache
    hub.refuses["someone/hidden"] = "RepoNotFound"
    hub.refuses["someone/gated"] = "GatedRepo"
    assert "no such repository, or a private one" in fails("someone/hidden", "hidden")
    assert "accept its terms" in fails("someone/gated", "gated")

    path = save(tmp_path / "pytorch_model.bin", {"state_dict": small_weights()})
    hub.files = {**config, "pytorch_model.bin": path.read_bytes(), "checkpoint-5/model.safetensors": b"not asked for"}
    run_python(code, source, tmp_path / "out", "--no-verify", **online)
    assert_holds(tmp_path / "out", small_weights())
    assert not list((tmp_path / "home").rglob("checkpoint-5"))


def test_a_hub_id_that_cannot_be_had(tmp_path):
    arguments = ("nvidia/MambaVision-T-1K", tmp_path / "out")  # offline, and not in the cache
    assert_fails_and_leaves_nothing(tmp_path / "out", ["nvidia/MambaVision-T-1K", "the Hub"], *arguments)


def test_pushing_without_a_token_says_how_to_log_in_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = ("no-such-file.pth", tmp_path / "out", "--push-to-hub", "me/converted")
    assert_fails_and_leaves_nothing(tmp_path / "out", ["hf auth login", "HF_TOKEN"], *arguments)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    arguments = ("no-such-file.pth", tmp_path / "out", "--push-to-hub", "not/a/name")
    assert_fails_and_leaves_nothing(tmp_path / "out", ["not/a/name"], *arguments)


@pytest.fixture
def hub_api(monkeypatch):
    """huggingface_hub's client of an account that has a public repository, me/public."""
    api = MagicMock()
    api.whoami.return_value = {"name": "me"}
    api.repo_exists.side_effect = lambda name: name == "me/public"
    api.repo_info.return_value.private = False
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return api


def test_what_the_hub_will_refuse_is_found_before_any_work(hub_api, tmp_path, monkeypatch):
    def assert_refused(repo_id, words, *options):
        arguments = ("no-such-file.pth", tmp_path / "out", "--push-to-hub", repo_id, *options)
        assert_fails_and_leaves_nothing(tmp_path / "out", words, *arguments)

    assert_refused("", ["--push-to-hub ''"])
    assert convert_checkpoint.check_hub("new", private=True) == "me/new"
    for name in ("public", "me/public"):
        assert_refused(name, ["--private: me/public is there and public"], "--private")
    assert_refused("me/public", ["no-such-file.pth"])  # nothing to refuse but the source
    assert_refused("me/new", ["no-such-file.pth"], "--private")
    hub_api.whoami.side_effect = OSError("401 Client Error: Unauthorized")
    assert_refused("me/new", ["hf auth login", "401 Client Error"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused("me/new", ["HF_HUB_OFFLINE"])


def test_a_failed_upload_keeps_the_folder(hub_api, checkpoint, tmp_path, monkeypatch):
    hub_api.upload_folder.side_effect = OSError("503 Server Error")
    monkeypatch.chdir(tmp_path)
    run = convert(checkpoint, "out", "--no-verify", "--push-to-hub", "converted")
    assert '("me/converted", ' in (tmp_path / "out" / "README.md").read_text()
    assert_error(run, "written", "upload failed", "503")
    assert_holds(tmp_path / "out", small_weights())
    hub_api.create_repo.assert_called_once_with("me/converted", private=None, exist_ok=True)
    assert hub_api.upload_folder.call_args.kwargs["folder_path"] == tmp_path / "out"
