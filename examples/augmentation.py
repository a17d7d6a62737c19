"""Training images: random changes of each, cheap ones, as functions of the seed, the epoch and the image's index.

So neither a resumed training nor one with other numbers of processes or workers sees other images than an unbroken one.
"""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Transpose
from torch import Tensor


class TrainingImages(torch.utils.data.Dataset):
    """Batches of augmented images, for keys `epoch * len(dataset) + index` (see `EpochOrder`).

    Gives `pixel_values` (B, 3, S, S), normalised, and `labels`: (B,) indices, or (B, classes) weights of mixed images.

    Args:
        dataset: gives (RGB image, class index), and raises ValueError for what is no image.
        settings: the recipe's "augmentation".
        config: the model's configuration: size, interpolation and normalisation.
        unreadable: called with the error of an image that cannot be read; the next one takes its place, so that
            batches keep their size and no process waits for another.
    """

    def __init__(self, dataset, settings: dict, config, seed: int, unreadable):
        from timm.data import Mixup
        from timm.data.auto_augment import rand_augment_transform
        from timm.data.random_erasing import RandomErasing

        self.dataset, self.settings, self.seed, self.unreadable = dataset, settings, seed, unreadable
        self.side = config.resolution
        self.squash = config.crop_mode == "squash"
        self.resample = Image.Resampling[config.interpolation.upper()]
        self.mean, self.std = torch.tensor(config.mean), torch.tensor(config.std)
        fill = settings["fill"]
        self.fill = tuple(round(255 * m) for m in config.mean) if fill is None else (fill,) * len(config.mean)
        self.randaugment = None
        if settings["randaugment"]:
            try:
                self.randaugment = rand_augment_transform(settings["randaugment"], {"img_mean": self.fill})
            except Exception as error:  # timm asserts
                raise ValueError(f"augmentation.randaugment={settings['randaugment']!r} is not timm's notation, which"
                                 " is like rand-m6-mstd0.5") from error  # fmt: skip
        self.erase = RandomErasing(settings["erase"], 0.02, 0.25, device="cpu") if settings["erase"] else None
        self.mix = None
        if settings["mixup"] or settings["cutmix"]:
            classes = config.num_labels
            self.mix = Mixup(settings["mixup"], settings["cutmix"], prob=settings["mix_probability"],
                             label_smoothing=0.0, num_classes=classes)  # fmt: skip

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, keys: list[int]) -> dict[str, Tensor]:
        pixels, low, high, labels = zip(*(self.sample(key) for key in keys), strict=True)
        # uint8 to normalised floats, inversion and colours are one multiplication and one addition per channel:
        # (low + (high - low) * x / 255 - mean) / std
        low, high = torch.tensor(low), torch.tensor(high)
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        scale, offset = (high - low) / (255 * self.std), (low - self.mean) / self.std
        x.mul_(scale[:, :, None, None]).add_(offset[:, :, None, None])
        off = self.settings["off_epoch"]
        is_plain = off is not None and keys[0] // len(self.dataset) >= off
        if self.erase and not is_plain:
            for image, key in zip(x, keys, strict=True):
                self._draw_for(key, stage=1)
                self.erase(image)
        labels = torch.tensor(labels)
        if self.mix and not is_plain:
            self._draw_for(keys[0], stage=2)
            x, labels = self.mix(x, labels)
        return {"pixel_values": x, "labels": labels}

    def sample(self, key: int) -> tuple[np.ndarray, list[float], list[float], int]:
        """One image as (S, S, 3) bytes, the levels in [0, 1] that its black and its white take, its label."""
        index = key % len(self.dataset)
        for attempt in range(len(self.dataset)):
            try:
                image, label = self.dataset[(index + attempt) % len(self.dataset)]
                break
            except ValueError as error:
                self.unreadable(error)
        else:
            raise ValueError("none of the training images can be read")
        self._draw_for(key, stage=0)
        settings = self.settings
        if random.random() < settings["flip"]:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        small = max(image.size) <= self.side  # then it is cheaper to change it before it is resized
        if self.randaugment and small:
            image = self.randaugment(image)
        image = self._cut_out(image)
        if self.randaugment and not small:
            image = self.randaugment(image)
        return np.asarray(image), *self._levels(), label

    def _draw_for(self, key: int, stage: int) -> None:
        """Seed what timm draws from; the model draws from torch's generator, which nothing here touches."""
        epoch, index = divmod(key, len(self.dataset))
        entropy = ((self.seed * 2**20 + epoch) * 2**34 + index) * 4 + stage
        random.seed(entropy)
        if stage == 2 or self.randaugment:
            np.random.seed([entropy >> shift & 0xFFFFFFFF for shift in (0, 32, 64)])

    def _cut_out(self, image: Image.Image) -> Image.Image:
        """A random box of the image at the model's size, in one resampling; around the image there is `fill`."""
        width, height = image.size
        if crop := self.settings["crop"]:
            from timm.data.transforms import RandomResizedCropAndInterpolation

            top, left, h, w = RandomResizedCropAndInterpolation.get_params(image, crop["scale"], crop["ratio"])
        else:
            low, high = self.settings["rescale"] or (1.0, 1.0)
            zoom, shift = math.exp(random.uniform(math.log(low), math.log(high))), self.settings["shift"]
            shorter = min(width, height)
            w, h = (width / zoom, height / zoom) if self.squash else (shorter / zoom, shorter / zoom)
            left = (width - w) / 2 + random.uniform(-shift, shift) * shorter
            top = (height - h) / 2 + random.uniform(-shift, shift) * shorter
        border = [math.ceil(max(0, out)) for out in (-left, -top, left + w - width, top + h - height)]
        if any(border):
            image = ImageOps.expand(image, tuple(border), self.fill)
            left, top = left + border[0], top + border[1]
        box = (max(left, 0), max(top, 0), min(left + w, image.width), min(top + h, image.height))
        return image.resize((self.side, self.side), self.resample, box)

    def _levels(self) -> tuple[list[float], list[float]]:
        low, high = [0.0] * 3, [1.0] * 3
        colour = self.settings["colour"]
        if colour and random.random() < colour["probability"]:
            dark, light = (colour["strength"] * random.random() for _ in range(2))
            low = [dark * random.random() for _ in range(3)]
            high = [1 - light * random.random() for _ in range(3)]
        if random.random() < self.settings["invert"]:
            low, high = high, low
        return low, high


class EpochOrder(torch.utils.data.Sampler):
    """Keys of `count` of `length` images, in epoch `epoch`; the seed and the epoch decide their order."""

    def __init__(self, length: int, count: int, seed: int):
        self.length, self.count, self.seed, self.epoch = length, count, seed, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[: self.count]
        return iter((order + self.epoch * self.length).tolist())
