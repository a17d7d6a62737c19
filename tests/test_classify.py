"""examples/classify.py: what it prints, the images that it reads, and what it says about wrong ones."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from processes import run_forked
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification


sys.path.insert(0, str(ROOT / "examples"))

from data import read_image


IMAGES = ROOT / "examples" / "images"
LABELS = ["Ankle boot", "Bag", "Pullover", "Trouser"]  # of the files in the order of their names


def classify(*arguments, check: bool = True):
    done = run_forked(ROOT / "examples" / "classify.py", *arguments)
    assert not check or done.returncode == 0, done.stderr
    return done


def says(done, *words: str) -> bool:
    """Whether a command ended with one line `error: ...` that holds the words, and printed nothing else."""
    assert done.returncode != 0 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), (
        done.stderr
    )
    return all(word in done.stderr for word in words)


def test_scan_that_cannot_run_ends_in_one_line(monkeypatch):
    monkeypatch.setenv("MAMBAVISION_SCAN", "mamba_ssm")
    assert says(classify(IMAGES / "bag.png", check=False), "mamba_ssm", "cannot run")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder of the default model's files, for tests that break them."""
    folder = tmp_path_factory.mktemp("model")
    for file in [*ROOT.glob("*.json"), *ROOT.glob("*.py"), ROOT / "model.safetensors"]:
        shutil.copy(file, folder)
    return folder


def test_several_labels_for_an_image(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    (line,) = classify(IMAGES / "bag.png", "--model", folder, "--json", "--top-k", 10).stdout.splitlines()
    scores = {p["label"]: p["score"] for p in json.loads(line)["predictions"]}
    single = expected_scores(IMAGES / "bag.png")
    # sigmoid and softmax rank alike, and odds of the former are in the ratios of the latter
    assert scores["Bag"] == max(scores.values()) > 0.5
    for label in ("Shirt", "Sneaker"):
        ratio = scores[label] / (1 - scores[label]) / (scores["Bag"] / (1 - scores["Bag"]))
        assert ratio == pytest.approx(single[label] / single["Bag"], rel=0.2)


def test_names_of_files_that_the_terminal_cannot_write(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")  # Latin-1, as old archives have it
    shutil.copy(IMAGES / "bag.png", file)
    done = classify(file, "--top-k", 1)
    assert done.stderr == "" and "caf\\udce9.png" in done.stdout and "Bag" in done.stdout


def expected_scores(path) -> dict[str, float]:
    """By label, without the image processor: for the square example images a resize by Pillow and a normalisation."""
    model = AutoModelForImageClassification.from_pretrained(ROOT, trust_remote_code=True)
    config = model.config
    image = Image.open(path).convert("RGB").resize((config.resolution, config.resolution), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image) / 255 - config.mean) / config.std
    with torch.inference_mode():
        logits = model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).logits[0]
    return dict(zip(config.id2label.values(), logits.softmax(-1).tolist(), strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_the_default_model_in_half_precision(dtype, tolerance):
    """All of its values fit, the statistics of its norms too. Logits have a standard deviation of 1.6."""
    model = AutoModelForImageClassification.from_pretrained(ROOT, trust_remote_code=True)
    half = AutoModelForImageClassification.from_pretrained(ROOT, trust_remote_code=True, torch_dtype=dtype)
    assert all(tensor.isfinite().all() for tensor in half.state_dict().values())
    images = [Image.open(path).convert("RGB") for path in sorted(IMAGES.glob("*.png"))]
    pixels = AutoImageProcessor.from_pretrained(ROOT)(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        assert (half(pixels).logits.float() - model(pixels).logits).abs().max() < tolerance


def test_json_gives_a_line_for_each_image_and_nothing_else():
    files = sorted(map(str, IMAGES.iterdir()))
    done = classify(*files, "--json", "--top-k", 99)  # more than there are
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == files
    for line in lines:
        assert line.keys() == {"image", "predictions"}
        expected = expected_scores(line["image"])
        assert {p["label"] for p in line["predictions"]} == set(expected)
        scores = [p["score"] for p in line["predictions"]]
        assert scores == sorted(scores, reverse=True)
        for prediction in line["predictions"]:  # the image processor on torchvision rounds to whole grey levels
            assert prediction.keys() == {"label", "score"}
            assert abs(prediction["score"] - expected[prediction["label"]]) < 0.02, line["image"]
    best = [line["predictions"][0]["label"] for line in lines if line["image"].endswith(".png")]
    assert best == LABELS


def test_text_gives_the_asked_number_of_labels():
    files = [str(IMAGES / "bag.png")] * 9  # more than a batch
    done = classify(*files, "--top-k", 2)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 9 * 3 and lines[::3] == files
    assert lines[1].endswith("%  Bag") and float(lines[1].split("%")[0]) > float(lines[2].split("%")[0])
    assert lines[:3] * 9 == lines


def test_runs_without_a_network_from_any_folder(tmp_path):
    code = """
import runpy, socket, sys
def refuse(*arguments): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    arguments = [ROOT / "examples" / "classify.py", IMAGES / "bag.png", "--json"]
    done = run_python(code, *arguments, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert json.loads(done.stdout)["predictions"][0]["label"] == "Bag"


def test_help_and_wrong_arguments_need_no_model():
    assert "--top-k" in classify("--help").stdout
    assert says(classify(check=False), "IMAGE")
    image = IMAGES / "bag.png"
    for wrong in ("0", "-1", "2.5", "many"):
        assert says(classify(image, "--top-k", wrong, check=False), "--top-k", "positive integer", wrong)
    assert says(classify(image, "--model", "./no-such-model", check=False), "./no-such-model", "neither")
    assert says(classify(image, "--model", IMAGES, check=False), str(IMAGES), "without config.json")


def png_header(width: int, height: int) -> bytes:
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_files_that_are_no_images(tmp_path):
    """Told apart before the model is loaded; a good image beside a wrong one gives no half output."""
    good = IMAGES / "bag.png"
    wrong = {"text.png": b"not an image", "empty.jpg": b"", "bomb.png": png_header(60000, 60000)}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        assert says(classify(good, tmp_path / name, check=False), str(tmp_path / name)), name
    assert says(classify(tmp_path / "bomb.png", check=False), "3600000000 pixels")
    assert says(classify(tmp_path / "missing.png", good, check=False), "missing.png does not exist")
    assert says(classify(IMAGES, check=False), str(IMAGES), "is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    assert says(classify(tmp_path / "pipe.png", check=False), "is a pipe or a device")
    assert says(classify(tmp_path / "a\nb.png", check=False), "a b.png")


@pytest.mark.parametrize("name, keep", [("astronaut.jpg", 0.5), ("bag.png", 0.6)])
def test_truncated_image(tmp_path, name, keep):
    content = (IMAGES / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image: .*truncated"):
        read_image(tmp_path / name)
    if name.endswith("jpg"):
        assert says(classify(IMAGES / "bag.png", tmp_path / name, check=False), name, "truncated")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken metadata
def test_bytes_changed_anywhere_never_give_another_kind_of_error(tmp_path):
    rng = np.random.default_rng(0)
    photograph = Image.open(IMAGES / "astronaut.jpg").resize((40, 30))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ico", "ppm", "tga", "pcx"):
        photograph.save(tmp_path / "image", kind)
        content = (tmp_path / "image").read_bytes()
        for _ in range(40):
            broken = bytearray(content[: rng.integers(1, len(content) + 1)])
            for place in rng.integers(0, len(broken), 3):
                broken[place] = rng.integers(256)
            (tmp_path / "image").write_bytes(broken)
            try:
                assert read_image(tmp_path / "image").mode == "RGB"
            except ValueError as error:
                assert str(tmp_path / "image") in str(error)


def broken_models(folder):
    """Breaks the folder in one way after another, and yields the words that the error must hold."""
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    yield ["not fully covered"]
    (folder / "model.safetensors").unlink()
    yield ["no file named model.safetensors"]
    tensors = load_file(ROOT / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.head.bias"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    yield ["1 tensors", "model.head.bias"]
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    yield ["1 tensors", "model.norm.weight"]
    (folder / "model.safetensors").write_bytes(weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[: len(config) // 2])
    yield ["config.json"]
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "dim": -1}))
    yield ["dim", "-1"]
    (folder / "config.json").write_text(config)
    (folder / "preprocessor_config.json").write_text("{")
    yield ["preprocessor_config.json"]
    (folder / "preprocessor_config.json").unlink()
    yield ["without preprocessor_config.json"]
    shutil.copy(ROOT / "preprocessor_config.json", folder)
    (folder / "modeling_mambavision.py").unlink()
    yield ["modeling_mambavision.py"]


LOAD_BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from command import load_model, one_line, quiet
quiet()
for line in sys.stdin:
    try:
        load_model(line.strip())
        print("loaded")
    except ValueError as error:
        print(one_line(error))
    sys.stdout.flush()
"""


def test_corrupt_model_folders(model_folder, tmp_path):
    first = broken_models(shutil.copytree(model_folder, tmp_path / "first"))
    words = next(first)
    assert says(
        classify(IMAGES / "bag.png", "--model", tmp_path / "first", check=False), str(tmp_path / "first"), *words
    )
    # the others in one process, which saves starting an interpreter for each
    command = [sys.executable, "-c", LOAD_BROKEN, str(ROOT / "examples")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ, **pipes) as process:
        for i, words in enumerate(broken_models(shutil.copytree(model_folder, tmp_path / "model"))):
            folder = shutil.copytree(tmp_path / "model", tmp_path / f"broken-{i}")
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line.startswith(f"model {folder} ") and all(word in line for word in words), (words, line)
        process.stdin.close()
        assert process.stderr.read() == ""


# Images as people have them, against what they look like.

PHOTOGRAPH = np.asarray(Image.open(IMAGES / "astronaut.jpg").resize((48, 32)))  # (32, 48, 3)
GREY = PHOTOGRAPH.mean(2).astype(np.uint8)


def saved(image: Image.Image, path, **options) -> np.ndarray:
    image.save(path, **options)
    read = read_image(path)
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


def test_grey_and_palette_images(tmp_path):
    grey = np.repeat(GREY[..., None], 3, 2)
    assert (saved(Image.fromarray(GREY), tmp_path / "grey.png") == grey).all()
    palette = Image.fromarray(PHOTOGRAPH).quantize(64)
    assert (saved(palette, tmp_path / "palette.png") == np.asarray(palette.convert("RGB"))).all()
    two = Image.fromarray(GREY).convert("1")
    assert set(np.unique(saved(two, tmp_path / "two.png"))) == {0, 255}


def test_transparent_parts_are_white(tmp_path):
    alpha = np.zeros(GREY.shape, np.uint8)
    alpha[:, 16:32] = 128
    alpha[:, 32:] = 255
    opacity = alpha[..., None] / 255
    expected = PHOTOGRAPH * opacity + 255 * (1 - opacity)
    rgba = Image.fromarray(np.dstack([PHOTOGRAPH, alpha]))
    assert abs(saved(rgba, tmp_path / "rgba.png") - expected).max() <= 1
    grey = Image.fromarray(np.dstack([GREY, alpha]))
    assert abs(saved(grey, tmp_path / "grey.png") - (GREY[..., None] * opacity + 255 * (1 - opacity))).max() <= 1
    palette = Image.new("P", (48, 32))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(1, (0, 0, 24, 32))
    pixels = saved(palette, tmp_path / "palette.gif", transparency=0)
    assert (pixels[:, :24] == [10, 20, 30]).all() and (pixels[:, 24:] == 255).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_keep_their_range(tmp_path, kind):
    deep = (GREY.astype(np.uint16) << 8) + 77
    pixels = saved(Image.fromarray(deep), tmp_path / f"deep.{kind}")
    assert abs(pixels - deep[..., None] / 257).max() <= 0.5
    with pytest.raises(ValueError, match=r"float\.tiff .* floating-point"):
        saved(Image.fromarray(GREY / np.float32(255)), tmp_path / "float.tiff")


def test_cmyk(tmp_path):
    flat = Image.new("RGB", (48, 32), (200, 60, 20)).convert("CMYK")
    assert abs(saved(flat, tmp_path / "cmyk.jpg", quality=100) - [200, 60, 20]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera(tmp_path, orientation):
    """The stored pixels are turned so that the EXIF tag turns them back."""
    # the place of the stored first row and first column in the upright image, from the EXIF standard
    stored = {
        1: PHOTOGRAPH,
        2: PHOTOGRAPH[:, ::-1],
        3: PHOTOGRAPH[::-1, ::-1],
        4: PHOTOGRAPH[::-1],
        5: PHOTOGRAPH.transpose(1, 0, 2),
        6: PHOTOGRAPH.transpose(1, 0, 2)[::-1],
        7: PHOTOGRAPH.transpose(1, 0, 2)[::-1, ::-1],
        8: PHOTOGRAPH.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "turned.png", exif=exif)
    assert pixels.shape == (32, 48, 3) and (pixels == PHOTOGRAPH).all()


def test_frames_and_extreme_shapes(tmp_path):
    first, second = Image.fromarray(PHOTOGRAPH), Image.new("RGB", (48, 32), "red")
    first.save(tmp_path / "two.tiff", save_all=True, append_images=[second])
    assert (np.asarray(read_image(tmp_path / "two.tiff")) == PHOTOGRAPH).all()
    Image.new("RGB", (1, 1), "red").save(tmp_path / "pixel.png")
    line = Image.new("RGB", (1, 900_000), "red")
    line.paste("blue", (0, 0, 1, 450_000))
    line.save(tmp_path / "line.png")
    middle = np.asarray(read_image(tmp_path / "line.png"))
    assert middle.shape == (100, 1, 3) and (middle[:50] == [0, 0, 255]).all() and (middle[50:] == [255, 0, 0]).all()
    processor = AutoImageProcessor.from_pretrained(ROOT)
    for name in ("pixel.png", "line.png"):
        pixel_values = processor(read_image(tmp_path / name), return_tensors="pt").pixel_values
        assert pixel_values.shape == (1, 3, processor.crop_size["height"], processor.crop_size["width"])
