"""Test images as users may have them: the same ones inverted, coloured, shifted or rescaled, always in the same way."""

import colorsys
import random

from PIL import Image, ImageOps


def invert(image: Image.Image, index: int) -> Image.Image:
    return ImageOps.invert(image)


def colour(image: Image.Image, index: int) -> Image.Image:
    """The grey image between two colours: a dark one for black, a light one for white, of hues that `index` draws."""
    draw = random.Random(index)
    dark = colorsys.hsv_to_rgb(draw.random(), draw.uniform(0.2, 0.8), draw.uniform(0.0, 0.3))
    light = colorsys.hsv_to_rgb(draw.random(), draw.uniform(0.2, 0.8), draw.uniform(0.8, 1.0))
    ends = [tuple(round(255 * level) for level in end) for end in (dark, light)]
    return ImageOps.colorize(image.convert("L"), *ends)


def invert_and_colour(image: Image.Image, index: int) -> Image.Image:
    """Light background, coloured object: a product photograph."""
    return colour(invert(image, index), index)


def shift(image: Image.Image, index: int) -> Image.Image:
    """Moved by up to a tenth of the side along each axis; the corner's colour comes after."""
    draw = random.Random(index)
    offset = [round(draw.uniform(-0.1, 0.1) * side) for side in image.size]
    canvas = Image.new("RGB", image.size, image.getpixel((0, 0)))
    canvas.paste(image, tuple(offset))
    return canvas


def rescale(image: Image.Image, index: int) -> Image.Image:
    """The object at 0.8 to 1.2 times its size in an image of the same size; the corner's colour around it."""
    factor = random.Random(index).uniform(0.8, 1.2)
    size = [max(1, round(factor * side)) for side in image.size]
    canvas = Image.new("RGB", image.size, image.getpixel((0, 0)))
    offset = [(side - new) // 2 for side, new in zip(image.size, size, strict=True)]
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), tuple(offset))
    return canvas


VARIANTS = {
    "inverted": invert,
    "coloured": colour,
    "inverted and coloured": invert_and_colour,
    "shifted": shift,
    "rescaled": rescale,
}


class Rendered:
    """A data set of (RGB image, class index) with every image changed; `count` limits it to the first images."""

    def __init__(self, dataset, change, count: int | None = None):
        self.dataset, self.change = dataset, change
        self.length = len(dataset) if count is None else min(count, len(dataset))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.change(image, index), label
