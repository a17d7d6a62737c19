#!/usr/bin/env python
"""Classify images."""

import json

from command import ROOT, Parser, load_model, positive, preprocessed, quiet, run
from data import check_image, read_image


BATCH_SIZE = 8


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file; transparent parts are taken as white")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id of an image classifier, whose code is run"
                        " (default: this repository)")  # fmt: skip
    parser.add_argument("--top-k", type=positive, default=5, help="labels to give for each image (default: 5)")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each image")
    args = parser.parse_args(arguments)

    quiet()
    for path in args.images:  # the wrong files are found before the model is loaded
        check_image(path)
    model, processor = load_model(args.model)
    predictions = classify(args.images, model, processor, args.top_k)
    show = as_json if args.json else as_text
    print("\n".join(show(path, best) for path, best in zip(args.images, predictions, strict=True)))


def classify(paths: list[str], model, processor, top_k: int) -> list[list[dict]]:
    """For each image file the `top_k` best labels, `{"label": ..., "score": ...}`, best first."""
    import torch
    from tqdm import tqdm

    several_labels = model.config.problem_type == "multi_label_classification"
    predictions = []
    with tqdm(total=len(paths), unit="image", delay=2, disable=None, leave=False) as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            pixel_values = preprocessed(map(read_image, batch), processor)
            with torch.inference_mode():
                logits = model(pixel_values.to(model.device)).logits.float()
            for scores in logits.sigmoid() if several_labels else logits.softmax(-1):
                best = scores.argsort(descending=True)[:top_k].tolist()
                predictions.append([{"label": model.config.id2label[i], "score": scores[i].item()} for i in best])
            progress.update(len(batch))
    return predictions


def as_json(path: str, predictions: list[dict]) -> str:
    return json.dumps({"image": path, "predictions": predictions})


def as_text(path: str, predictions: list[dict]) -> str:
    return "\n".join([path, *(f"  {p['score']:6.1%}  {p['label']}" for p in predictions)])


if __name__ == "__main__":
    run(main)
