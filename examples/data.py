"""What the examples read: image files as people have them, folders of images by class, data sets of the Hub, and
Fashion-MNIST's files."""

import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


FASHION_MNIST_LABELS = (
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
)  # fmt: skip


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, the way a viewer on a white page shows it: upright, and without transparency.

    Images of 16 bits per channel keep their full range. Of several frames the first is taken, and of an image that is
    more than 100 times longer than wide the middle: resized by its shorter edge, the whole could fill the memory.

    Raises:
        ValueError: the file is missing, is a folder, cannot be decoded to its end, or holds more than about 179 million
            pixels (Pillow's limit against decompression bombs); the message starts with the path.
    """
    return _decode(path, _as_rgb)


def check_image(path: str | Path) -> None:
    """Read no more than the file's header; raises what `read_image` would for a file that is no image at all."""
    _decode(path, lambda image: None)


def _decode(path, use, file=None):
    """`use` of the opened image; of `file`, where it is not in the file system, and `path` then names it in errors."""
    if file is None and Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give image files")
    if file is None and Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is a pipe or a device: give image files")
    try:
        with Image.open(path if file is None else file) as image:
            return use(image)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image, or of a format that Pillow does not read") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("the range of its floating-point pixels is not known; save it with 8 or 16 bits per channel")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    left, top = (max(0, side - 100 * min(image.size)) // 2 for side in image.size)
    return image.convert("RGB").crop((left, top, image.width - left, image.height - top))


class FashionMNIST:
    """Fashion-MNIST's IDX files (Debian's package dataset-fashion-mnist), as (RGB image of 28x28, class index).

    Args:
        folder: holds `{split}-images-idx3-ubyte.gz` and `{split}-labels-idx1-ubyte.gz`.
        split: "train" (60,000 images) or "t10k" (the 10,000 test images).
    """

    classes = FASHION_MNIST_LABELS

    def __init__(self, folder: Path, split: str):
        self.split = split
        self.labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
        self.images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")

    @staticmethod
    def is_in(folder: Path) -> bool:
        return any(folder.glob("*-images-idx3-ubyte.gz"))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8), the number of axes, each axis' length, the values."""
    try:
        with gzip.open(path) as file:
            data = file.read()
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (EOFError, IndexError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file: {error}") from error


class ImageFolder:
    """A folder with one folder per class, as (RGB image, class index); the classes are in the names' order.

    Raises:
        ValueError: there is no class, or a class without images.
    """

    def __init__(self, folder: Path):
        self.classes = folders(folder)
        if not self.classes:
            raise ValueError(f"{folder} holds neither Fashion-MNIST's files nor a folder per class")
        self.files = []
        for label, name in enumerate(self.classes):
            files = image_files(folder / name)
            if not files:
                raise ValueError(f"{folder / name} holds no images")
            self.files += [(file, label) for file in files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file, label = self.files[index]
        return read_image(file), label


class ListedImages:
    """A folder of images whose classes stand in a file, as (RGB image, class index).

    Args:
        folder: of the images.
        listing: a line for each image: its file's name, with or without the suffix, and its class, between them spaces
            or a comma. Caffe's `val.txt` of ImageNet is of this form, and Kaggle's `LOC_val_solution.csv`. The class
            numbers alone, as in the development kit's `ILSVRC2012_validation_ground_truth.txt`, are not: they count
            ImageNet's classes in an order of their own.

    Raises:
        ValueError: a line is not of this form, or there is no such image in the folder.
    """

    def __init__(self, folder: str, listing: Path):
        files, several = {}, set()
        for file in image_files(Path(folder)):
            names = {file.name, file.stem}
            several |= names & files.keys()
            files |= dict.fromkeys(names, file)
        try:
            lines = listing.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{listing} is not a text: {error}") from error
        rows = [re.split(r"[\s,]+", line.strip()) for line in lines if line.strip()]
        rows = [row for row in rows if row[0] != "ImageId"]  # the header of Kaggle's file
        for row in rows:
            if len(row) < 2:
                raise ValueError(f"{listing}: lines must be an image file's name and its class, got {row[0]!r}")
            if row[0] not in files:
                raise ValueError(f"{listing}: there is no image {row[0]} in {folder}")
            if row[0] in several:
                raise ValueError(f"{listing}: there are several images {row[0]} in {folder}")
        if not rows:
            raise ValueError(f"{listing} is empty")
        self.classes = sorted({row[1] for row in rows})
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.files = [(files[row[0]], numbers[row[1]]) for row in rows]

    __len__, __getitem__ = ImageFolder.__len__, ImageFolder.__getitem__


NO_CLASS = (-1, None)  # of an image, in a column of classes


class HubImages:
    """A split of a data set of the `datasets` library, as (RGB image, class index).

    Args:
        name: of the data set, for messages.
        split: `datasets.Dataset` with one column of images and one of classes.

    Raises:
        ValueError: it has none, or several, of such columns, or no image has a class.
    """

    def __init__(self, name: str, split):
        from datasets import ClassLabel, Image

        self.name = name
        self.image, self.label = (self._column(split, kind) for kind in (Image, ClassLabel))
        self.classes = list(split.features[self.label].names)
        if len(split) and set(split.unique(self.label)) <= set(NO_CLASS):
            raise ValueError(f"data {name}: no image of this split has a class")
        # read_image decides what an image is, and a broken one is an error of its own
        self.split = split.cast_column(self.image, Image(decode=False))

    def _column(self, split, kind) -> str:
        columns = [column for column, feature in split.features.items() if isinstance(feature, kind)]
        if len(columns) != 1:
            raise ValueError(f"data {self.name} must have one column of type {kind.__name__}, and has"
                             f" {columns or 'none'} among {list(split.features)}")  # fmt: skip
        return columns[0]

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        row = self.split[index]
        stored, label = row[self.image], row[self.label]
        if stored is None or label in NO_CLASS:
            raise ValueError(f"{self.name}, image {index}: there is no {'image' if stored is None else 'class'}")
        file = None if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        path = stored["path"] if file is None else f"{self.name}, image {index}"
        return _decode(path, _as_rgb, file), label


class Part:
    """Some images of a data set, by their indices."""

    def __init__(self, dataset, indices: list[int]):
        self.dataset, self.indices, self.classes = dataset, indices, dataset.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


# Names of splits, in any case
TRAIN, VALIDATION, TEST = ("train", "training"), ("validation", "val", "valid"), ("test", "testing")


def training_data(source: str, validation: float, seed: int):
    """The images to train on, and those to validate with: the data's own, or a random part that `seed` chooses.

    Args:
        source: a folder of Fashion-MNIST's files, of one folder per class, of `train` and `val` folders with these,
            of Parquet or Arrow files; or the Hub id of a data set.
        validation: the part that is held out where the data has no validation images; Fashion-MNIST's test images
            are not for this.

    Returns:
        Two data sets of (RGB image, class index) with `classes`; the second is None where `validation` is 0.

    Raises:
        ValueError: there is no such data, it has one class, or the splits' classes differ.
        ImportError: the data needs the package `datasets`.
    """
    splits = _splits(source)
    train, held_out = _first(splits, TRAIN), _first(splits, VALIDATION)
    if train is None:
        raise ValueError(f"data {source} has no split {TRAIN[0]}; its splits are {', '.join(splits)}")
    train = train()
    if len(train.classes) < 2:
        raise ValueError(f"data {source} has one class, {train.classes[0]}, which leaves nothing to tell apart")
    if not validation:
        return train, None
    if held_out:
        held_out = held_out()
        if held_out.classes != train.classes:
            other = sorted(set(held_out.classes) ^ set(train.classes))
            raise ValueError(f"data {source}: its splits differ in the classes {', '.join(other)}")
        return train, held_out
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    count = max(1, round(len(train) * validation))
    return Part(train, order[count:]), Part(train, order[:count])


def test_data(source: str, split: str | None = None):
    """The images to measure with, as (RGB image, class index): the split of that name, or the data's test images,
    else its validation images, else all; sources and errors as in `training_data`.
    """
    splits = _splits(source)
    if split is not None and split not in splits:
        raise ValueError(f"data {source} has no split {split}; its splits are {', '.join(splits)}")
    return (splits[split] if split else _first(splits, (*TEST, *VALIDATION)) or next(iter(splits.values())))()


def _first(splits: dict, names: tuple[str, ...]):
    """The split that has the first of the names."""
    return next((splits[split] for name in names for split in splits if split.lower() == name), None)


def _splits(source: str) -> dict:
    """The data's splits by name, each a function that opens it."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            raise ValueError(f"data {source} is neither a folder nor the Hub id of a data set (OWNER/NAME)")
        return _hub_splits(source)
    if FashionMNIST.is_in(folder):
        return {"train": lambda: FashionMNIST(folder, "train"), "test": lambda: FashionMNIST(folder, "t10k")}
    if any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow")):
        return _hub_splits(source)
    names = folders(folder)
    # classes may be called so too, such as the train among the vehicles: it holds images and not folders of them
    if names and (
        all(name.lower() in TRAIN + VALIDATION + TEST for name in names)
        or any(name.lower() in TRAIN and folders(folder / name) for name in names)
    ):
        return {name: lambda name=name: ImageFolder(folder / name) for name in names}
    return {"train": lambda: ImageFolder(folder)}


def _hub_splits(source: str) -> dict:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data {source} is read by the package datasets: pip install datasets") from error

    saved = Path(source, "dataset_dict.json").exists() or Path(source, "state.json").exists()
    try:
        splits = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:  # of the network, the files, or the Hub
        raise ValueError(f"data {source} does not load: {error}") from error
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    return {name: lambda split=split: HubImages(source, split) for name, split in splits.items()}


def image_files(folder: Path) -> list[Path]:
    """The files in a folder, and in those within, that are images by their names, in order."""
    known = Image.registered_extensions()
    files = (file for file in folder.rglob("*") if file.suffix.lower() in known)
    return sorted(file for file in files if not any(map(_is_litter, file.relative_to(folder).parts)))


def folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_litter(entry.name))


def _is_litter(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind: macOS in archives, notebooks, version control."""
    return name.startswith(".") or name == "__MACOSX"
