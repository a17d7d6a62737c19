"""Recipes of finetune.py: one JSON file of settings, each of which a command line can replace."""

import contextlib
import json
from dataclasses import fields
from pathlib import Path


# Every setting there is, with its value where a recipe does not name it. A recipe's "notes" are for readers.
DEFAULTS = {
    "seed": 0,
    "start_epoch": 0,  # the epochs that the model was trained before with this seed, whose random changes not to repeat
    "validation": 0.1,  # part of the training images held out, where the data has no validation images of its own
    "base_model": None,  # what --model says, for --resume to know it
    "model": None,  # configuration fields of a new model (and "variant": a published model to take the others from)
    "even_stem": False,  # start a new model blind to colour and to inversion (see finetune.py)
    "config": {},  # configuration fields to change in a loaded model (or any), such as drop_path_rate
    "augmentation": {
        "crop": None,  # {"scale": [low, high], "ratio": [low, high]}: a random part of the image (else the middle)
        "shift": 0.0,  # moves the middle by up to this part of its side
        "rescale": None,  # [low, high]: enlarges the middle by a factor in this range
        "fill": None,  # grey level 0 ... 255 around the image; None for the configuration's mean colour
        "flip": 0.0,  # probability of mirroring left and right
        "randaugment": None,  # timm's notation, such as "rand-m6-mstd0.5"
        "colour": None,  # {"probability": p, "strength": s}: moves black and white by up to s in each channel
        "invert": 0.0,  # probability of the negative
        "erase": 0.0,  # probability of erasing a rectangle
        "mixup": 0.0,  # alpha of the Beta distribution that mixes pairs of images; 0 for none
        "cutmix": 0.0,  # the same for pasting a rectangle of one image into another
        "mix_probability": 1.0,  # of mixing a batch, where mixup or cutmix is on
        "off_epoch": None,  # epochs, those of start_epoch among them, after which images are neither erased nor mixed
    },
    "label_smoothing": 0.0,
    "optimizer": "adamw",  # or "muon": timm's, of matrices and kernels, with NAdamW of the rest
    "weight_decay": 0.05,  # of matrices and kernels; norms, biases, A_log, D and gammas have none
    "layer_decay": 1.0,  # factor of the learning rate from each block to the one before it
    "ema": 0.0,  # decay per step of the averaged weights, which are the ones validated and saved; 0 for no average
    "freeze_backbone": False,  # train the head alone: a linear probe
    "lora": None,  # {"rank": r, "alpha": a}: train low-rank additions to the linear layers (peft), and the head
    "sync_batchnorm": False,  # BatchNorm over the images of all processes and not of each its own
    "training": {  # transformers' TrainingArguments, all of them
        "num_train_epochs": 10,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
        "max_grad_norm": 1.0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
    },
}
NESTED = {
    "augmentation.crop": {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]},
    "augmentation.colour": {"probability": 0.5, "strength": 0.5},
    "lora": {"rank": 8, "alpha": 16},
}
# The values that they can have, where they have one
NUMBERS = {
    **dict.fromkeys(["validation", "ema"], (0, 0.999999)),
    **dict.fromkeys(["label_smoothing", "layer_decay"], (0, 1)),
    **dict.fromkeys([f"augmentation.{key}" for key in ("flip", "invert", "erase", "mix_probability")], (0, 1)),
    **dict.fromkeys(["augmentation.colour.probability", "augmentation.colour.strength"], (0, 1)),
    **dict.fromkeys(["augmentation.shift", "augmentation.mixup", "augmentation.cutmix"], (0, 10)),
    **dict.fromkeys(["weight_decay", "lora.alpha", "training.learning_rate"], (0, 1e38)),
    "training.num_train_epochs": (1e-6, 1e6),
}
INTEGERS = {
    **dict.fromkeys(["seed", "augmentation.off_epoch"], (0, 2**31 - 1)),
    "start_epoch": (0, 10**5),
    "augmentation.fill": (0, 255),
    **dict.fromkeys([f"training.per_device_{part}_batch_size" for part in ("train", "eval")], (1, 2**20)),
    "training.gradient_accumulation_steps": (1, 2**20),
    "lora.rank": (1, 2**16),
}
PAIRS = {
    "augmentation.crop.scale": (1e-6, 1),
    "augmentation.crop.ratio": (1e-3, 1e3),
    "augmentation.rescale": (1e-3, 1e3),
}
# What TrainingArguments also has, under the name that it has here
ELSEWHERE = {"seed": "seed", "weight_decay": "weight_decay", "label_smoothing_factor": "label_smoothing"}


def read(path: Path | None, changes: list[str]) -> dict:
    """The recipe in a file (None for the defaults alone), whole, with changes in the form KEY=VALUE, KEY dotted.

    A value is JSON, or else a text: `training.learning_rate=1e-3`, `augmentation.randaugment=rand-m6`.

    Raises:
        ValueError: no JSON, a setting that does not exist, or a value that it cannot have; the message names it.
    """
    try:
        recipe = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(recipe).__name__}")
    recipe.pop("notes", None)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: must be KEY=VALUE, such as training.learning_rate=1e-3")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        *parents, last = key.split(".")
        place = recipe
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    recipe = _complete(recipe, DEFAULTS, "")
    _check(recipe)
    return recipe


def _complete(given: dict, defaults: dict, prefix: str) -> dict:
    """`given` over `defaults`, level by level."""
    if unknown := sorted(given.keys() - defaults.keys()):
        existing = ", ".join(prefix + key for key in defaults)
        raise ValueError(f"there is no setting {prefix + unknown[0]}; there are {existing}")
    whole = {}
    for key, default in defaults.items():
        value, name = given.get(key, default), prefix + key
        nested = NESTED.get(name, default if key == "augmentation" else None)
        if nested and value is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be an object of {', '.join(nested)}, got {value!r}")
            value = _complete(value, nested, name + ".")
        whole[key] = value
    if not prefix and isinstance(whole["training"], dict):
        whole["training"] = {**defaults["training"], **whole["training"]}
        other_schedule = whole["training"]["lr_scheduler_type"] != defaults["training"]["lr_scheduler_type"]
        if other_schedule and "lr_scheduler_kwargs" not in given["training"]:
            del whole["training"]["lr_scheduler_kwargs"]
    return whole


def _check(recipe: dict) -> None:
    from transformers import TrainingArguments

    for key in ("model", "config", "training"):
        if not isinstance(recipe[key], dict) and (key, recipe[key]) != ("model", None):
            raise ValueError(f"{key} must be an object, got {recipe[key]!r}")
    if recipe["base_model"] is not None and not isinstance(recipe["base_model"], str):
        raise ValueError(f"base_model must be a folder or a name, got {recipe['base_model']!r}")
    for key in ("even_stem", "freeze_backbone", "sync_batchnorm"):
        if not isinstance(recipe[key], bool):
            raise ValueError(f"{key} must be true or false, got {recipe[key]!r}")
    for ranges, kind in ((NUMBERS, "a number"), (INTEGERS, "an integer"), (PAIRS, "a pair [low, high]")):
        for key, (low, high) in ranges.items():
            value, default = _at(recipe, key), _at(DEFAULTS, key)
            if (value, default) != (None, None) and not _is(kind, value, low, high):
                raise ValueError(f"{key} must be {kind} in {low} ... {high}, got {value!r}")
    if recipe["optimizer"] not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {recipe['optimizer']!r}")
    augmentation = recipe["augmentation"]
    if augmentation["crop"] and (augmentation["rescale"] or augmentation["shift"]):
        raise ValueError("augmentation.crop cannot go together with shift and rescale: it does both already")
    if recipe["even_stem"] and recipe["model"] is None:
        raise ValueError("even_stem is for a new model, and the recipe has no model")
    if recipe["lora"] and recipe["freeze_backbone"]:
        raise ValueError("lora and freeze_backbone exclude each other: LoRA freezes the backbone and adapts it")
    existing = {field.name: field.default for field in fields(TrainingArguments) if field.init}
    del existing["output_dir"]
    for key, value in recipe["training"].items():
        if key in ELSEWHERE:
            raise ValueError(f"training.{key} is set outside of training, as {ELSEWHERE[key]}")
        if key not in existing:
            raise ValueError(f"there is no setting training.{key}; transformers' TrainingArguments has"
                             f" {', '.join(sorted(existing))}")  # fmt: skip
        # what TrainingArguments would take, and Trainer fail on
        if isinstance(existing[key], int | float) and not isinstance(value, int | float | None):
            kind = "true or false" if isinstance(existing[key], bool) else "a number"
            raise ValueError(f"training.{key} must be {kind}, got {value!r}")
        if key.endswith("_kwargs") and not isinstance(value, dict | None):
            raise ValueError(f"training.{key} must be an object, got {value!r}")


def _at(settings, key: str):
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _is(kind: str, value, low: float, high: float) -> bool:
    if kind.startswith("a pair"):
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(_is("a number", v, low, high) for v in value)
            and value[0] <= value[1]
        )
    types = int if kind == "an integer" else (int, float)
    return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high
