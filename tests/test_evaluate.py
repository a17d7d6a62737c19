"""examples/evaluate.py on a hundred of Fashion-MNIST's test images, as the data set's own files and as folders; its
measures against scikit-learn's."""

import gzip
import hashlib
import json
import logging
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image
from processes import run_forked
from transformers import AutoImageProcessor, AutoModelForImageClassification


sys.path.insert(0, str(ROOT / "examples"))

import command as shared
import data
import evaluate as command


DATA = FIXTURES / "fashion-mnist"


def evaluate(*arguments, check: bool = True):
    done = run_forked(ROOT / "examples" / "evaluate.py", *arguments)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def spoken():
    """Undoes that the command silences the libraries of its process."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        yield
    logging.disable(level)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.frombuffer(gzip.open(DATA / "t10k-images-idx3-ubyte.gz").read()[16:], np.uint8).reshape(-1, 28, 28)


@pytest.fixture(scope="module")
def classes() -> np.ndarray:
    return np.frombuffer(gzip.open(DATA / "t10k-labels-idx1-ubyte.gz").read()[8:], np.uint8)


def test_top_1_of_the_default_model(images, classes, tmp_path):
    output = tmp_path / "results.json"
    output.write_text("old")
    done = evaluate(DATA, output, "--batch-size", 30)
    assert done.stderr == "" and done.stdout.startswith("top-1 ")
    results = json.loads(output.read_text())

    # without the image processor: a resize by Pillow and a normalisation
    model = AutoModelForImageClassification.from_pretrained(ROOT, trust_remote_code=True)
    side, mean, std = model.config.resolution, model.config.mean, model.config.std
    inputs = [
        np.asarray(Image.fromarray(x).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for x in images
    ]
    pixel_values = torch.from_numpy((np.stack(inputs) / 255 - mean) / std).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        correct = int((model(pixel_values).logits.argmax(-1).numpy() == classes).sum())
    assert abs(results["correct"] - correct) <= 1  # torchvision's resize rounds to whole grey levels
    assert correct >= 85

    assert results["count"] == 100 and results["accuracy"] == results["correct"] / 100
    assert results["data"] == "Fashion-MNIST, test images"
    assert 100 / results["images_per_second"] == pytest.approx(
        results["seconds"],
        abs=0.06 + 0.0005 * results["seconds"] ** 2,  # both are rounded to 0.1
    )
    assert results["weights"]["parameters"] == sum(p.numel() for p in model.parameters())
    content = (ROOT / "model.safetensors").read_bytes()
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert results["weights"]["files"] == {"model.safetensors": expected}
    assert results["versions"]["torch"] == torch.__version__ and results["device"]
    assert results["unreadable"] == 0 and "variants" not in results
    assert [row["label"] for row in results["classes"]] == data.FASHION_MNIST_LABELS
    assert list(tmp_path.iterdir()) == [output]


def test_folder_per_class_in_another_order(images, classes, tmp_path):
    names = ["Trouser", "Bag", "Ankle boot"]  # in the folder's order Ankle boot, Bag, Trouser; the model has others too
    labels = {"Trouser": 1, "Bag": 8, "Ankle boot": 9}
    count = 0
    for name in names:
        (tmp_path / "data" / name / "more").mkdir(parents=True)
        for i in np.flatnonzero(classes == labels[name])[:6]:
            Image.fromarray(images[i]).save(tmp_path / "data" / name / ("more" if i % 2 else "") / f"{i}.png")
            count += 1
    (tmp_path / "data" / "notes.txt").write_text("no image")
    evaluate(tmp_path / "data", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["count"] == count and results["correct"] >= count - 2
    assert results["data"] == "data"


def test_wrong_data_ends_in_one_line(tmp_path):
    output = tmp_path / "results.json"
    (tmp_path / "cut").mkdir()
    for file in DATA.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    (tmp_path / "class" / "Bag").mkdir(parents=True)
    (tmp_path / "other" / "Umbrella").mkdir(parents=True)
    Image.new("L", (28, 28)).save(tmp_path / "other" / "Umbrella" / "1.png")
    os.mkfifo(tmp_path / "pipe")
    for arguments, words in [
        ([tmp_path / "missing", output], ["missing"]),
        ([tmp_path / "cut", output], ["cut", "not a whole IDX file"]),
        ([tmp_path / "empty", output], ["empty", "neither"]),
        ([tmp_path / "class", output], ["Bag", "no images"]),
        ([tmp_path / "other", output], ["Umbrella", "not a label of the model"]),
        ([DATA, tmp_path / "nowhere" / "results.json"], ["nowhere", "does not exist"]),
        ([DATA, output, "--batch-size", "0"], ["--batch-size", "positive integer"]),
        ([DATA, tmp_path / "pipe"], ["pipe is a folder or a device"]),
        ([DATA, tmp_path], ["is a folder or a device"]),
        ([DATA, output, "--confusion-matrix", output], ["would both be"]),
    ]:
        done = evaluate(*arguments, check=False)
        assert done.returncode != 0 and done.stdout == "", done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
        assert not output.exists()


def test_errors_of_processes_that_load_data_are_told_by_their_message():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nValueError: no image: a.png\n"
    assert shared.one_line(ValueError(text)) == "no image: a.png"


def test_measures_are_scikit_learns():
    from sklearn import metrics

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 12, (400,), generator=generator)  # class 0 has no image
    logits = torch.randn(400, 12, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 12)
    logits[:, 3] -= 100  # nothing is taken for class 3
    names = [f"class {i}" for i in range(12)]
    results, confusion = command.metrics(logits, labels, names)
    predicted, probabilities = logits.argmax(-1), logits.softmax(-1).numpy()
    assert results["count"] == 400 and results["correct"] == metrics.accuracy_score(labels, predicted, normalize=False)
    assert results["accuracy"] == metrics.accuracy_score(labels, predicted)
    assert results["top_5_accuracy"] == metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(12))
    assert confusion == metrics.confusion_matrix(labels, predicted, labels=range(12)).tolist()
    precision, recall, _, count = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(12), zero_division=np.nan
    )
    assert [row["label"] for row in results["classes"]] == names[1:]
    for i, row in enumerate(results["classes"], 1):
        assert row["count"] == count[i] and row["recall"] == pytest.approx(recall[i])
        assert row["precision"] == (None if i == 3 else pytest.approx(precision[i]))


def test_calibration_error():
    # twenty images at 0.65 of which half are right, ten at 0.95 of which nine are: (20 * 0.15 + 10 * 0.05) / 30
    confidence = torch.tensor([0.65] * 20 + [0.95] * 10).double()
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    labels = torch.tensor([0, 1] * 10 + [0] * 9 + [1])
    assert command.metrics(logits, labels, ["a", "b"])[0]["calibration_error"] == pytest.approx(3.5 / 30)
    # as numpy's histograms give it
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(500, 4, generator=generator) * 2, torch.randint(4, (500,), generator=generator)
    confidence, right = logits.softmax(-1).max(-1).values.numpy(), (logits.argmax(-1) == labels).numpy()
    edges = np.linspace(0, 1, 16)
    sums = [np.histogram(confidence, edges, weights=weights)[0] for weights in (confidence, right.astype(float))]
    expected = np.abs(sums[0] - sums[1]).sum() / 500
    results, _ = command.metrics(logits, labels, list("abcd"))
    assert results["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert results["top_5_accuracy"] is None  # of four classes


def test_variants_confusion_matrix_and_an_unreadable_image(images, classes, tmp_path, capsys, spoken):
    for i in range(20):  # folders by class index, as ImageNet's are too
        (tmp_path / "data" / str(classes[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / "data" / str(classes[i]) / f"{i}.png")
    broken = tmp_path / "data" / str(classes[0]) / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    figure = tmp_path / "confusion.png"
    outcomes = []
    for _ in range(2):
        command.main(
            [str(tmp_path / "data"), str(tmp_path / "out.json"), "--variants", "--confusion-matrix", str(figure)]
        )
        outcomes.append(json.loads((tmp_path / "out.json").read_text()))
    printed = capsys.readouterr()
    assert printed.err.count("skipped: ") == 2 and str(broken) in printed.err  # once in each run
    results = outcomes[0]
    assert results["count"] == 19 and results["unreadable"] == 1 and results["correct"] >= 15
    assert results["variants"] == outcomes[1]["variants"]
    assert list(results["variants"]) == ["inverted", "coloured", "inverted and coloured", "shifted", "rescaled"]
    for variant in results["variants"].values():
        assert variant["accuracy"] == variant["correct"] / 19
    assert f"shifted: {results['variants']['shifted']['accuracy']:.2%}" in printed.out
    with Image.open(figure) as image:
        image.load()
        assert min(image.size) > 500


def test_imagenets_validation_images(images, tmp_path):
    """Synsets and indices name ImageNet's classes; a file says them for images that are in no folders by class."""
    labels = {i: f"label {i}" for i in range(1000)} | {134: "crane", 517: "crane"}  # the bird and the machine
    assert command.label_indices(["n01440764", "n02132136", "n15075141"], labels, False) == [0, 294, 999]
    assert command.label_indices(["n02012849", "n03126707"], labels, False) == [134, 517]
    assert command.label_indices([f"class {i}" for i in range(1000)], labels, True) == list(range(1000))
    with pytest.raises(ValueError, match="several labels of the model are 'crane'"):
        command.label_indices(["crane"], labels, False)
    assert command.label_indices(["7", "0012"], labels, False) == [7, 12]
    assert command.label_indices(["label 7"], labels, False) == [7]
    assert command.label_indices(["x", "y"], {0: "a", 1: "b"}, True) == [0, 1]
    for names, few, by_index in ((["n01440764"], {0: "a"}, False), (["1000"], labels, False), (["x"], labels, True)):
        with pytest.raises(ValueError, match=r"n01440764|1000"):
            command.label_indices(names, few, by_index)

    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"ILSVRC2012_val_0000000{i}.JPEG")
    caffe = "ILSVRC2012_val_00000002.JPEG 65\nILSVRC2012_val_00000000.JPEG 970\nILSVRC2012_val_00000001.JPEG 65\n"
    kaggle = "ImageId,PredictionString\nILSVRC2012_val_00000002,n03995372 85 1 499 272 n03995372 1 2 3 4 \n"
    (tmp_path / "val.txt").write_text(caffe)
    listed = data.ListedImages(str(tmp_path), tmp_path / "val.txt")
    assert listed.classes == ["65", "970"] and [label for _, label in listed.files] == [0, 1, 0]
    assert abs(np.asarray(listed[0][0])[..., 0].astype(int) - images[2]).mean() < 10  # JPEG
    (tmp_path / "val.csv").write_text(kaggle)
    listed = data.ListedImages(str(tmp_path), tmp_path / "val.csv")
    assert listed.classes == ["n03995372"] and listed.files == [(tmp_path / "ILSVRC2012_val_00000002.JPEG", 0)]
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbf" + caffe.encode())
    assert len(data.ListedImages(str(tmp_path), tmp_path / "val.txt")) == 3
    (tmp_path / "again").mkdir()
    Image.fromarray(images[1]).save(tmp_path / "again" / "ILSVRC2012_val_00000000.JPEG")
    with pytest.raises(ValueError, match=r"several images ILSVRC2012_val_00000000.JPEG in"):
        data.ListedImages(str(tmp_path), tmp_path / "val.txt")
    for text, message in (("490\n361\n", "lines must be .*'490'"), ("x.JPEG 3", "no image x.JPEG"), ("", "empty")):
        (tmp_path / "wrong.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            data.ListedImages(str(tmp_path), tmp_path / "wrong.txt")


@pytest.mark.usefixtures("spoken")
def test_splits_classes_by_index_and_a_file_of_classes(images, classes, tmp_path):
    for split, count in (("train", 1), ("test", 2)):
        for label in range(10):
            (tmp_path / "data" / split / f"class {label}").mkdir(parents=True)
            for i in np.flatnonzero(classes == label)[:count]:
                Image.fromarray(images[i]).save(tmp_path / "data" / split / f"class {label}" / f"{split}-{i}.png")
    (tmp_path / "listing.txt").write_text(
        "\n".join(f"{file.name} {file.parent.name[-1]}" for file in (tmp_path / "data" / "train").glob("*/*"))
    )
    for options, name, count in [
        (["--by-index"], "data", 20),
        (["--by-index", "--split", "train"], "data, train", 10),
        (["--ground-truth", tmp_path / "listing.txt"], "data", 10),
    ]:
        command.main([str(x) for x in (tmp_path / "data", tmp_path / "results.json", *options)])
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["data"] == name and results["count"] == count and results["correct"] >= 0.7 * count


def test_large_images_are_preprocessed_a_few_at_a_time(images, monkeypatch):
    processor = AutoImageProcessor.from_pretrained(ROOT)
    pictures = [Image.fromarray(x).convert("RGB") for x in images[:7]]
    whole = processor(pictures, return_tensors="pt").pixel_values
    calls = []

    def counting(held, **kwargs):
        calls.append(len(held))
        return processor(held, **kwargs)

    monkeypatch.setattr(shared, "MOST_PIXELS", 3 * 28 * 28)
    assert torch.equal(shared.preprocessed(iter(pictures), counting), whole)
    assert calls == [3, 3, 1]
    assert shared.preprocessed(iter([]), counting) is None


def test_summary_names_the_worst_classes():
    rows = [{"label": f"c{i}", "count": 10, "recall": i / 30, "precision": None} for i in range(30)]
    results = {
        "accuracy": 0.5,
        "top_5_accuracy": 0.75,
        "count": 300,
        "images_per_second": 12.3,
        "calibration_error": 0.1,
    }
    lines = command.summary({**results, "classes": rows[::-1]}).splitlines()
    assert lines[0] == "top-1 50.00%, top-5 75.00% of 300 images, 12 images/s" and "worst 20" in lines[2]
    assert [line.split()[0] for line in lines[3:]] == [f"c{i}" for i in range(20)]
