#!/usr/bin/env python
"""Measure an image classifier: top-1, top-5, each class, calibration and speed, on a folder per class, ImageNet's
validation images, a data set of the Hub, or Fashion-MNIST's test images.

The figures of this repository's default model came out of:

    python examples/evaluate.py FOLDER_OF_FASHION_MNIST examples/recipes/fashion-mnist.results.json --variants
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

from command import ROOT, Parser, load_model, positive, preprocessed, quiet, run
from data import FashionMNIST, ListedImages, test_data
from variants import VARIANTS, Rendered


BINS = 15  # of confidence, for the calibration error


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="folder of one folder per class, named as the model's labels are, or ImageNet's"
                        " synsets, or class indices; of test, val or train folders with these; of Fashion-MNIST's"
                        " files; of Parquet files; or Hub id of a data set")  # fmt: skip
    parser.add_argument("output", type=Path, help="JSON file for the results; an existing one is replaced")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id of an image classifier, whose code is run"
                        " (default: this repository)")  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time (default: 64)")
    parser.add_argument("--split", help="of the data (default: test, else validation, else all there is)")
    parser.add_argument("--ground-truth", type=Path, metavar="FILE", help="lines of an image file's name and its class;"
                        " DATA is then the folder of these, such as ImageNet's validation images as they are published"
                        )  # fmt: skip
    parser.add_argument("--by-index", action="store_true", help="the data's classes are the model's in the same order,"
                        " whatever their names")  # fmt: skip
    parser.add_argument("--variants", action="store_true", help="also the accuracy on the images inverted, coloured,"
                        " shifted and rescaled")  # fmt: skip
    parser.add_argument("--confusion-matrix", type=Path, metavar="PNG", help="draw the confusion matrix")
    args = parser.parse_args(arguments)

    quiet()
    for path in filter(None, (args.output, args.confusion_matrix)):  # found out now and not after the work
        if not path.parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a folder or a device: name a file")
    # where a link leads, which stays one
    args.output, args.confusion_matrix = (path and path.resolve() for path in (args.output, args.confusion_matrix))
    if args.output == args.confusion_matrix:
        raise ValueError(f"the results and the confusion matrix would both be {args.output}")
    if args.confusion_matrix:
        import matplotlib  # noqa: F401
    dataset = ListedImages(args.data, args.ground_truth) if args.ground_truth else test_data(args.data, args.split)
    model, processor = load_model(args.model)
    indices = label_indices(dataset.classes, model.config.id2label, args.by_index)
    logits, labels, seconds = predict(dataset, indices, model, processor, args.batch_size)
    names = [model.config.id2label[i] for i in range(logits.shape[1])]
    results, confusion = metrics(logits, labels, names)
    results |= {
        "batch_size": args.batch_size,
        "seconds": round(seconds, 1),
        "images_per_second": round(results["count"] / seconds, 1),
        "unreadable": len(dataset) - results["count"],
        "data": "Fashion-MNIST, test images" if is_fashion_mnist_test(dataset) else data_name(args.data, args.split),
        "weights": weights(args.model, model),
        **environment(model),
    }
    if args.variants:
        results["variants"] = {}
        for name, change in VARIANTS.items():
            rendered = Rendered(dataset, change)
            logits, labels, _ = predict(rendered, indices, model, processor, args.batch_size, report=False)
            correct = int((logits.argmax(-1) == labels).sum())
            results["variants"][name] = {"accuracy": correct / len(labels), "correct": correct}

    unfinished = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(args.output)
    if args.confusion_matrix:
        draw_confusion(confusion, names, args.confusion_matrix)
    print(summary(results))


def label_indices(classes: list[str], id2label: dict[int, str], by_index: bool) -> list[int]:
    """The model's index of each of the data's classes: by name, as ImageNet's synset (n01440764), or by number.

    Raises:
        ValueError: a class of the data is none of the model's, or several.
    """
    if by_index:
        if len(classes) != len(id2label):
            raise ValueError(f"--by-index: the data has {len(classes)} classes and the model {len(id2label)}")
        return list(range(len(classes)))
    indices = {label: i for i, label in id2label.items()}
    if not set(classes) <= indices.keys():
        if all(re.fullmatch(r"n\d{8}", name) for name in classes) and len(id2label) == 1000:
            from timm.data import ImageNetInfo

            indices = {synset: i for i, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
        elif all(name.isdecimal() and int(name) in id2label for name in classes):
            indices = {name: int(name) for name in classes}
    for name in classes:
        if name not in indices:
            raise ValueError(f"the data's class {name!r} is not a label of the model; its labels are {list(indices)}")
        if list(id2label.values()).count(name) > 1:  # the crane that flies, and the one that lifts
            raise ValueError(f"several labels of the model are {name!r}: name the data's classes by ImageNet's synsets"
                             " or by numbers, or say --by-index")  # fmt: skip
    return [indices[name] for name in classes]


def predict(dataset, indices: list[int], model, processor, batch_size: int, report: bool = True):
    """The images through processor and model; what cannot be read is skipped, and named on stderr.

    Returns:
        logits (images, labels) and labels (images,), in the model's order, on the CPU; the seconds that reading,
        preprocessing and the model took together.
    """
    import torch
    from tqdm import tqdm

    logits, labels, start = [], [], time.perf_counter()

    def images(batch: range):
        for i in batch:
            try:
                image, label = dataset[i]
            except ValueError as error:
                if report:
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            labels.append(indices[label])
            yield image

    with tqdm(total=len(dataset), unit="image", delay=2, disable=None, leave=False) as progress:
        for first in range(0, len(dataset), batch_size):
            batch = range(first, min(first + batch_size, len(dataset)))
            pixel_values = preprocessed(images(batch), processor)
            if pixel_values is not None:
                with torch.inference_mode():
                    logits.append(model(pixel_values.to(model.device)).logits.float().cpu())
            progress.update(len(batch))
    if not logits:
        raise ValueError("none of the images can be read")
    return torch.cat(logits), torch.tensor(labels), time.perf_counter() - start


def metrics(logits, labels, names: list[str]) -> tuple[dict, list[list[int]]]:
    """What the logits (images, labels) are worth, given the right labels (images,).

    Returns:
        Top-1 and, where there are more than five labels, top-5 accuracy; the expected calibration error (Guo et al.,
        arXiv 1706.04599), which is the difference between the confidence and the accuracy of the images in each of 15
        bins of confidence, weighted by their number; each class of the data with its images, the part of them that is
        found (recall), and the part of the images taken for it that are (precision, None where there are none).
        And the confusion matrix: rows by the right label, columns by the predicted one.
    """
    import torch

    count, classes = logits.shape
    confidence, predicted = logits.softmax(-1).max(-1)
    right = predicted == labels
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    error = 0.0
    bins = (confidence * BINS).ceil().long().clamp(1, BINS)  # (0, 1/15], (1/15, 2/15], ...
    for i in range(1, BINS + 1):
        if (inside := bins == i).any():
            error += float((confidence[inside].double().mean() - right[inside].double().mean()).abs() * inside.sum())
    found, present, taken = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    top_5 = (logits.topk(min(5, classes)).indices == labels[:, None]).any(-1)
    return {
        "accuracy": int(right.sum()) / count,
        "correct": int(right.sum()),
        "count": count,
        "top_5_accuracy": int(top_5.sum()) / count if classes > 5 else None,
        "calibration_error": error / count,
        "classes": [
            {
                "label": names[i],
                "count": present[i],
                "recall": found[i] / present[i],
                "precision": found[i] / taken[i] if taken[i] else None,
            }
            for i in range(classes)
            if present[i]
        ],
    }, confusion.tolist()


def summary(results: dict) -> str:
    top_5 = "" if results["top_5_accuracy"] is None else f", top-5 {results['top_5_accuracy']:.2%}"
    classes = sorted(results["classes"], key=lambda row: row["recall"])
    width = max(len(row["label"]) for row in classes[:20])
    lines = [
        f"top-1 {results['accuracy']:.2%}{top_5} of {results['count']} images,"
        f" {results['images_per_second']:.0f} images/s",
        f"calibration error {results['calibration_error']:.2%}",
        f"{'the worst 20 classes' if len(classes) > 20 else 'class':{width}}  images  recall  precision",
        *(
            f"{row['label']:{width}}  {row['count']:6}  {row['recall']:6.1%}  {row['precision'] or 0:9.1%}"
            for row in classes[:20]
        ),
        *(f"{name}: {row['accuracy']:.2%}" for name, row in results.get("variants", {}).items()),
    ]
    return "\n".join(lines)


def draw_confusion(confusion: list[list[int]], names: list[str], path: Path) -> None:
    """Each row as parts of the images of that class; numbers and names where there is room for them."""
    from matplotlib.figure import Figure

    few = len(names) <= 30
    side = max(6, 0.55 * len(names)) if few else 12
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    parts = [[count / max(1, sum(row)) for count in row] for row in confusion]
    figure.colorbar(axes.imshow(parts, cmap="Blues", vmin=0, vmax=1), label="part of the class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    if few:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, row in enumerate(confusion):
            for j, count in enumerate(row):
                if count:
                    axes.text(j, i, count, ha="center", va="center", size=8, color="w" if parts[i][j] > 0.5 else "k")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)


def is_fashion_mnist_test(dataset) -> bool:
    return isinstance(dataset, FashionMNIST) and dataset.split == "t10k"


def data_name(source: str, split: str | None) -> str:
    name = Path(source).resolve().name if Path(source).is_dir() else source
    return name if split is None else f"{name}, {split}"


def weights(name: str, model) -> dict:
    """What was measured: the number of parameters, and each file of weights with its size and SHA-256."""
    files = {}
    for file in sorted(Path(name).glob("*.safetensors")):
        content = file.read_bytes()
        files[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    source = {"files": files} if files else {"hub": name, "revision": model.config._commit_hash}
    return {"parameters": sum(p.numel() for p in model.parameters()), **source}


def environment(model) -> dict:
    """The machine and the versions."""
    import PIL
    import torch
    import transformers

    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
