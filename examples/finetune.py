#!/usr/bin/env python
"""Train MambaVision, from scratch or from a checkpoint, on your images: a folder of one folder per class, a data set of
the Hub, or Fashion-MNIST's files.

    python examples/finetune.py OUTPUT --data FOLDER                                   # fine-tune the default model
    python examples/finetune.py OUTPUT --data FOLDER --model ./MambaVision-T-1K        # a converted model
    python examples/finetune.py OUTPUT --data FOLDER --model MambaVision-T-1K          # from scratch, by variant
    python examples/finetune.py OUTPUT --data FOLDER --freeze-backbone                 # the head alone
    python examples/finetune.py OUTPUT --data FOLDER --lora 8                          # low-rank additions and the head

All settings are in a recipe, a JSON file (recipe.py lists what there is), and --set replaces single ones. The default
model of this repository came out of two trainings, the second of which goes on from the weights of the first:

    python examples/finetune.py FIRST --data FASHION_MNIST --recipe examples/recipes/fashion-mnist.json
    python examples/finetune.py SECOND --data FASHION_MNIST --recipe examples/recipes/fashion-mnist-2.json --model FIRST

Several GPUs or machines: `accelerate launch` or `torchrun` in the place of `python` (several processes on a CPU:
`accelerate launch --multi_gpu --num_processes 2`). The batch size is each process's own; BatchNorm too looks at the
images of its process alone, unless the recipe says "sync_batchnorm": true.

OUTPUT receives the trained model with its code and preprocessing, `recipe.json`, `log.json`, `curves.png`,
TensorBoard's logs in `runs`, and the checkpoints, from the last of which --resume goes on as if nothing had happened:
on a CPU to the same weights, bit for bit. Images that cannot be read are skipped, and named in `unreadable.txt`.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import recipe as recipes
from command import ROOT, Parser, load_class, positive, positive_number, preprocessed, quiet, run
from data import training_data


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--data", required=True, help="folder of one folder per class (or of train and val folders with"
                        " these), of Fashion-MNIST's files, or of Parquet files; or Hub id of a data set")  # fmt: skip
    parser.add_argument("--recipe", type=Path, help="JSON file of the settings (default: those of recipe.py,"
                        " with --resume those of OUTPUT)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="replace one"
                        " setting of the recipe, such as training.learning_rate=1e-4; repeatable")  # fmt: skip
    parser.add_argument("--model", help="folder or Hub id of a model to go on from, or a published model's name, such"
                        " as MambaVision-T-1K, for a new one like it (default: this repository, or a new model of the"
                        " recipe's)")  # fmt: skip
    parser.add_argument("--freeze-backbone", action="store_true", help="train the head alone (a linear probe)")
    parser.add_argument("--lora", type=positive, metavar="RANK", help="train low-rank additions to the linear layers,"
                        " which become part of the saved weights")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT, if any")
    parser.add_argument("--max-minutes", type=positive_number, help="stop with a checkpoint after this time")
    args = parser.parse_args(arguments)

    quiet()
    changes = [*args.changes, *(["freeze_backbone=true"] if args.freeze_backbone else [])]
    changes += [f"lora.rank={args.lora}"] if args.lora else []
    earlier = args.output / "recipe.json"
    recipe = recipes.read(args.recipe or (earlier if args.resume and earlier.exists() else None), changes)
    if args.model:
        recipe["base_model"] = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    elif args.resume and earlier.exists():
        recipe["base_model"] = recipes.read(earlier, [])["base_model"]
    train, validation = training_data(args.data, recipe["validation"], recipe["seed"])

    import torch
    from training import last_checkpoint
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading and saving, between the lines of the training's own
    torch.manual_seed(recipe["seed"])
    model = make_model(recipe["base_model"], train.classes, recipe)
    checkpoint = last_checkpoint(args.output)
    if checkpoint and not args.resume:
        raise ValueError(f"{args.output} holds checkpoints: go on from the last with --resume, or name another folder")
    if checkpoint is None and (args.output / "model.safetensors").exists():
        without = " and no whole checkpoint to go on from" if args.resume else ""
        raise ValueError(f"{args.output} holds a model already{without}: name another folder")
    if checkpoint:
        check_checkpoint(checkpoint, train.classes, recipe)
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(model, train, validation, recipe, args)
    if trainer.is_world_process_zero():
        write(args.output / "recipe.json", json.dumps(recipe, indent=2))
        if args.resume and not checkpoint:
            print(f"no whole checkpoint in {args.output}: training starts anew")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        finish(trainer, args.output)
    trainer.accelerator.end_training()


def check_checkpoint(checkpoint: Path, classes: list[str], recipe: dict) -> None:
    """Raises a ValueError where it was trained on other classes (LoRA's does not name them) or by another optimizer."""
    config, earlier = checkpoint / "config.json", checkpoint.parent / "recipe.json"
    try:
        labels = (
            json.loads(config.read_text(encoding="utf-8"))["id2label"] if config.exists() else dict(enumerate(classes))
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"{config} is damaged: delete {checkpoint} to go on from the one before") from error
    if list(labels.values()) != classes:
        raise ValueError(f"{checkpoint} was trained on other classes than the data's: {', '.join(labels.values())}")
    optimizer = recipes.read(earlier, [])["optimizer"] if earlier.exists() else recipe["optimizer"]
    if optimizer != recipe["optimizer"]:
        raise ValueError(f"optimizer must stay {optimizer} for {checkpoint}, got {recipe['optimizer']}")


def finish(trainer, output: Path) -> None:
    write(output / "log.json", json.dumps(trainer.state.log_history, indent=1))
    if not trainer.is_complete:
        print(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: go on with --resume")
        return
    model = trainer.result
    if hasattr(model, "merge_and_unload"):  # low-rank additions become part of the weights
        model = model.merge_and_unload()
    model.save_pretrained(output)
    draw_curves(trainer.state.log_history, output / "curves.png")
    print(f"trained: {output}")


def make_model(source: str | None, classes: list[str], recipe: dict):
    """A classifier of these classes: a new one, or a loaded one, with a new head unless its labels are these."""
    import torch
    from transformers import AutoModelForImageClassification

    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    configuration = load_class("configuration_mambavision.MambaVisionConfig")
    variants = sys.modules[configuration.__module__].VARIANTS
    new = dict(recipe["model"] or {})
    if source in variants:
        new, source = {"variant": source, **new}, None
    if new and source is None:
        variant = new.pop("variant", None)
        new |= recipe["config"]
        check_fields("model", new, configuration)
        new |= labels
        config = configuration(**new) if variant is None else configuration.from_variant(variant, **new)
        model = load_class("modeling_mambavision.MambaVisionModelForImageClassification")(config)
        if recipe["even_stem"]:
            make_stem_even(model.model.patch_embed.conv_down)
    else:
        if new:
            raise ValueError(f"the recipe describes a new model: leave out --model {source}, or the recipe's model")
        check_fields("config", recipe["config"], configuration)
        source = source or str(ROOT)
        try:
            model, report = AutoModelForImageClassification.from_pretrained(
                source, trust_remote_code=True, ignore_mismatched_sizes=True, output_loading_info=True,
                torch_dtype=torch.float32,  # small steps are lost on weights in half precision
                **labels, **recipe["config"]
            )  # fmt: skip
        except Exception as error:  # the files are the user's, and each can be broken in its own way
            raise ValueError(f"model {source} does not load: {error}") from error
        absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if absent := sorted(absent - {"model.head.weight", "model.head.bias"}):
            raise ValueError(f"model {source} lacks {len(absent)} tensors of its weights, the first is {absent[0]}")
        new_head(model, source, classes)
    if model.config.in_chans != 3:
        raise ValueError(f"this command reads RGB images, and the model takes {model.config.in_chans} channels")
    if recipe["freeze_backbone"]:
        model.requires_grad_(False)
        model.model.head.requires_grad_(True)
    if recipe["lora"]:
        from training import add_lora

        model = add_lora(model, **recipe["lora"])
    return model


def make_stem_even(stem) -> None:
    """Start with equal features of an image, its negative, and its grey copy, where 0 is the middle grey.

    The first convolution's filters look at brightness, and come in pairs of opposite sign; the second convolution adds
    up what the pairs give. Training may undo this, but need not find it.
    """
    import torch

    with torch.no_grad():
        first, second = stem[0].weight, stem[3].weight
        half = len(first) // 2
        first.copy_(first.sum(1, keepdim=True).expand_as(first) / math.sqrt(first.shape[1]))
        first[half : 2 * half] = -first[:half]
        second[:, half : 2 * half] = second[:, :half]


def new_head(model, source: str, classes: list[str]) -> None:
    """Of a checkpoint with as many classes but others, the head's weights mean nothing."""
    from transformers import PretrainedConfig

    stored = PretrainedConfig.get_config_dict(source)[0].get("id2label", {})
    if [stored.get(str(i)) for i in range(len(classes))] != classes:
        for parameter in model.model.head.parameters():
            parameter._is_hf_initialized = False
        model._init_weights(model.model.head)


def check_fields(key: str, given: dict, configuration) -> None:
    import inspect

    existing = [name for name in inspect.signature(configuration).parameters if name not in ("self", "kwargs")]
    if unknown := sorted(given.keys() - set(existing)):
        raise ValueError(f"there is no setting {key}.{unknown[0]}; there are {', '.join(existing)}")


def make_trainer(model, train, validation, recipe: dict, args):
    import torch
    from augmentation import TrainingImages
    from training import RecipeTrainer, synchronise_batch_norm
    from transformers import AutoImageProcessor, TrainingArguments
    from variants import VARIANTS, Rendered

    config, augmentation = model.config, recipe["augmentation"]
    write(args.output / "preprocessor_config.json", json.dumps(config.image_processor_settings(), indent=2))
    processor = AutoImageProcessor.from_pretrained(args.output)
    settings = {
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "seed": recipe["seed"],
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        **recipe["training"],
    }
    if validation is None:
        settings["eval_strategy"] = "no"
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output / "runs"))
    try:
        arguments = TrainingArguments(str(args.output), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"transformers' TrainingArguments does not take the recipe's training: {error}") from error
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    if len(train) < batch:
        raise ValueError(f"{len(train)} training images do not fill one batch of {batch}: set a smaller"
                         " training.per_device_train_batch_size")  # fmt: skip
    if (augmentation["mixup"] or augmentation["cutmix"]) and arguments.train_batch_size % 2:
        raise ValueError("mixup and cutmix mix pairs: training.per_device_train_batch_size must be even, got"
                         f" {arguments.train_batch_size}")  # fmt: skip
    if recipe["sync_batchnorm"]:
        model = synchronise_batch_norm(model, arguments.device.type)
    report = Report(args.output / "unreadable.txt")
    checked = {}
    if validation:  # by the light background and the colours, where the recipe trains for these
        checked |= {"inverted": VARIANTS["inverted"]} if augmentation["invert"] else {}
        checked |= {"coloured": VARIANTS["coloured"]} if augmentation["colour"] else {}
    return RecipeTrainer(
        model,
        arguments,
        train_dataset=TrainingImages(train, augmentation, config, recipe["seed"], report),
        eval_dataset=ValidationImages(validation, processor, report) if validation else None,
        variants={
            name: ValidationImages(Rendered(validation, change, 1000), processor, report)
            for name, change in checked.items()
        },
        data_collator=whole_batch,
        compute_metrics=accuracy,
        recipe=recipe,
        max_minutes=args.max_minutes,
    )


class ValidationImages:
    """Batches as the shipped image processor makes them; what cannot be read gets the label -100, not to be counted."""

    def __init__(self, dataset, processor, unreadable):
        self.dataset, self.processor, self.unreadable = dataset, processor, unreadable

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict:
        import torch
        from PIL import Image

        labels = []

        def images():
            for index in indices:
                try:
                    image, label = self.dataset[index]
                except ValueError as error:
                    self.unreadable(error)
                    image, label = Image.new("RGB", (8, 8)), -100
                labels.append(label)
                yield image

        pixel_values = preprocessed(images(), self.processor)
        return {"pixel_values": pixel_values, "labels": torch.tensor(labels)}


class Report:
    """Names each unreadable image once, on stderr and in a file, whichever process or epoch meets it."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, error: ValueError) -> None:
        line = " ".join(str(error).split()) + "\n"
        with self.path.open("a+", encoding="utf-8", errors="surrogateescape") as file:  # whatever a file is called
            file.seek(0)
            if line not in file.readlines():
                file.write(line)
                print(f"skipped: {line}", end="", file=sys.stderr)


def whole_batch(batch: dict) -> dict:
    return batch  # the data sets give batches


def accuracy(predictions) -> dict[str, float]:
    counted = predictions.label_ids != -100
    if not counted.any():
        raise ValueError("none of the validation images can be read")
    return {"accuracy": float((predictions.predictions == predictions.label_ids)[counted].mean())}


def draw_curves(history: list[dict], path: Path) -> None:
    """The log as two diagrams over the epochs: the losses, and the accuracies on the validation images."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: that needs matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, ending in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        names = dict.fromkeys(name for entry in history for name in entry if name.endswith(ending))
        for name in names:
            if name != "train_loss":  # the mean of the whole training
                points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
                label = name.replace("_", " ").replace("eval", "validation") if name != "loss" else "training loss"
                axes.plot(*zip(*points, strict=True), label=label, marker=".")
        axes.set_xlabel("epoch")
        axes.set_title(ending)
        axes.grid(alpha=0.3)
        if names:
            axes.legend()
    figure.savefig(path, dpi=120)


def write(path: Path, text: str) -> None:
    """A file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    run(main)
