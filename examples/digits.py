#!/usr/bin/env python
"""Write scikit-learn's handwritten digits, 1,797 images of 8x8, as folders of images to fine-tune with.

python examples/digits.py digits
python examples/finetune.py digits-model --data digits --recipe examples/recipes/digits.json
python examples/evaluate.py digits digits.json --model digits-model
"""

from pathlib import Path

import numpy as np
from command import Parser, run
from PIL import Image


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="new folder: train and validation (a fifth), each a folder per digit")
    args = parser.parse_args(arguments)
    if args.output.exists():
        raise ValueError(f"{args.output} exists already")

    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.random.default_rng(0).permutation(len(digits.images)) < len(digits.images) // 5
    for i, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = args.output / ("validation" if held_out[i] else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).save(folder / f"{i:04}.png")
    print(f"{args.output}: {np.sum(~held_out)} images to train on, {np.sum(held_out)} held out")


if __name__ == "__main__":
    run(main)
