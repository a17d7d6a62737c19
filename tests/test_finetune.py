"""examples/finetune.py: what it trains, that a killed training goes on exactly, several processes, and wrong input."""

import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, ROOT, SMALL, run_python
from PIL import Image
from processes import run_forked
from repository.modeling_mambavision import MambaVisionModelForImageClassification
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification


EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import augmentation  # noqa: E402
import data  # noqa: E402
import digits  # noqa: E402
import evaluate  # noqa: E402
import finetune  # noqa: E402
import recipe as recipes  # noqa: E402
import training  # noqa: E402
import variants  # noqa: E402


# A model of 0.1 M parameters with both mixers, and everything random that a recipe can have
TINY = dict(dim=8, in_dim=8, depths=[1, 1, 2, 2], num_heads=[1, 1, 2, 2], window_size=[4, 4, 4, 2], resolution=32)
RECIPE = {
    "validation": 0.2,
    "model": {**TINY, "drop_path_rate": 0.2},
    "augmentation": {
        "shift": 0.1,
        "rescale": [0.8, 1.2],
        "flip": 0.5,
        "randaugment": "rand-m6-mstd0.5",
        "colour": {},
        "invert": 0.5,
        "erase": 0.3,
        "mixup": 0.2,
        "cutmix": 1.0,
        "mix_probability": 0.7,
    },
    "label_smoothing": 0.1,
    "ema": 0.9,
    "layer_decay": 0.8,
    "training": {
        "max_steps": 13,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "use_cpu": True,
    },
}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """A hundred images in the place of Fashion-MNIST's training images."""
    folder = tmp_path_factory.mktemp("fashion")
    for file in (FIXTURES / "fashion-mnist").glob("t10k-*"):
        shutil.copy(file, folder / file.name.replace("t10k", "train"))
    return folder


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    digits.main([str(folder)])
    return folder


@pytest.fixture(autouse=True)
def spoken():
    """Undoes what the commands do to their process: they silence the libraries."""
    level, places = logging.root.manager.disable, os.environ.get("TENSORBOARD_LOGGING_DIR")
    with warnings.catch_warnings():
        yield
    logging.disable(level)
    if places is None:
        os.environ.pop("TENSORBOARD_LOGGING_DIR", None)


@pytest.fixture
def command():
    """finetune.py's main() in this process."""
    return lambda *arguments: finetune.main([str(argument) for argument in arguments])


@pytest.fixture
def one_thread():
    """As `start` has it: sums in another order would differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(*arguments, launcher=(sys.executable,)) -> subprocess.Popen:
    command = [str(part) for part in (*launcher, EXAMPLES / "finetune.py", *arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> str:
    """What it wrote to stderr."""
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]
    return errors


def recipe_file(folder: Path, **changes) -> Path:
    (folder / "recipe.in.json").write_text(json.dumps({**RECIPE, **changes}))
    return folder / "recipe.in.json"


def log(output: Path, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((output / "log.json").read_text()) if key in entry]


def test_digits_from_the_default_model(digits_folder, tmp_path):
    """The documented example, in one epoch."""
    output = tmp_path / "trained"
    done = run_forked(EXAMPLES / "finetune.py", output, "--data", digits_folder,
                      "--recipe", EXAMPLES / "recipes" / "digits.json",
                      "--set", "training.num_train_epochs=1", "--set", "training.warmup_steps=10",
                      "--set", "training.learning_rate=0.003")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"trained: {output}" and "100%" in done.stderr  # the progress bar

    evaluate.main([str(digits_folder), str(tmp_path / "results.json"), "--model", str(output)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["count"] == 359 and results["accuracy"] >= 0.97
    assert log(output, "eval_accuracy")[-1] == pytest.approx(results["accuracy"], abs=0.003)
    assert [row["label"] for row in results["classes"]] == list("0123456789")

    with Image.open(output / "curves.png") as curves:
        curves.load()
        assert min(curves.size) > 300
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "runs"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/accuracy"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("eval/accuracy")]
    assert values == pytest.approx(log(output, "eval_accuracy"))


def test_linear_probe_and_lora(digits_folder, tmp_path, command):
    settings = ["--data", digits_folder, "--set", "training.max_steps=12", "--set", "training.logging_steps=4"]
    settings += ["--set", "training.learning_rate=0.01", "--set", "validation=0", "--set", "ema=0.5"]
    before = load_file(ROOT / "model.safetensors")
    changed = {}
    for name, option in (("probe", ["--freeze-backbone"]), ("lora", ["--lora", "4"])):
        command(tmp_path / name, *settings, *option)
        assert log(tmp_path / name, "loss")[-1] < log(tmp_path / name, "loss")[0]
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert model.config.id2label[7] == "7"
        after = model.state_dict()
        assert after.keys() == before.keys()  # the additions are part of the weights
        changed[name] = {key for key in before if not torch.equal(before[key], after[key])}
    head = {"model.head.weight", "model.head.bias"}
    assert changed["probe"] == head  # and no statistic of a BatchNorm
    linear = {f"model.{n}.weight" for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed["lora"] == linear | head


@pytest.mark.usefixtures("one_thread")
def test_killed_training_goes_on_to_the_same_weights(fashion, tmp_path, command):
    arguments = ["--data", fashion, "--recipe", recipe_file(tmp_path), "--set", "training.save_strategy=steps",
                 "--set", "training.save_steps=3", "--set", "training.gradient_accumulation_steps=2",
                 "--set", "optimizer=muon"]  # fmt: skip
    killed = start(tmp_path / "killed", *arguments)  # 5 steps in an epoch: step 6 is the first of the second
    while not (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").exists():
        assert killed.poll() is None, killed.communicate()[1][-3000:]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    command(tmp_path / "whole", *arguments)
    # a checkpoint that the kill cut off is not gone on from
    (tmp_path / "killed" / "checkpoint-12").mkdir(exist_ok=True)
    (tmp_path / "killed" / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 1')
    wait(start(tmp_path / "killed", *arguments, "--resume"))
    assert log(tmp_path / "killed", "loss") == log(tmp_path / "whole", "loss")
    for file in ("model.safetensors", "checkpoint-13/model.safetensors", "checkpoint-13/ema.safetensors"):
        first, second = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), file
    raw = load_file(tmp_path / "whole" / "checkpoint-13" / "model.safetensors")
    assert any(not torch.equal(load_file(tmp_path / "whole" / "model.safetensors")[name], raw[name]) for name in raw)


def test_training_in_pieces_of_time(fashion, tmp_path, command, capsys):
    arguments = ["--data", fashion, "--recipe", recipe_file(tmp_path), "--set", "training.max_steps=6"]
    command(tmp_path / "whole", *arguments)
    command(tmp_path / "pieces", *arguments, "--max-minutes", "1e-9")
    assert "stopped after step 1 of 6" in capsys.readouterr().out
    assert not (tmp_path / "pieces" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="--resume"):
        command(tmp_path / "pieces", *arguments)
    command(tmp_path / "pieces", "--data", fashion, "--resume")  # with the same recipe
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    recipe = recipe_file(tmp_path, model=None, augmentation={})
    command(tmp_path / "more", "--data", fashion, "--recipe", recipe, "--set", "training.max_steps=2",
            "--model", tmp_path / "pieces", "--max-minutes", "1e-9")  # fmt: skip
    command(tmp_path / "more", "--data", fashion, "--resume", "--recipe", recipe, "--set", "training.max_steps=2")
    # from the same model, whose shapes are not the default's
    assert load_file(tmp_path / "more" / "model.safetensors").keys() == first.keys()


def test_resuming_with_other_settings(fashion, tmp_path, command, capsys):
    """The rates are the new recipe's, and what does not fit the checkpoint is refused in one line."""
    schedule = {**RECIPE["training"], "lr_scheduler_type": "linear", "max_steps": 4}
    arguments = ["--data", fashion, "--recipe", recipe_file(tmp_path, training=schedule)]
    command(tmp_path / "first", *arguments, "--max-minutes", "1e-9")
    for name in ("same", "slower", "muon", "linear", "cut", "lost", "classes"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    command(tmp_path / "same", *arguments, "--resume")
    command(tmp_path / "slower", *arguments, "--resume", "--set", "training.learning_rate=0.0003",
            "--set", "weight_decay=0.5")  # fmt: skip
    rates = [log(tmp_path / name, "learning_rate") for name in ("same", "slower")]
    assert rates[1][1:] == pytest.approx([rate / 10 for rate in rates[0][1:]])
    optimizer = torch.load(tmp_path / "slower" / "checkpoint-4" / "optimizer.pt")
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.5}

    (tmp_path / "cut" / "checkpoint-1" / "scheduler.pt").write_bytes(b"")
    config = tmp_path / "classes" / "checkpoint-1" / "config.json"
    config.write_text(config.read_text().replace("Sandal", "Boot"))
    shutil.copytree(tmp_path / "classes", tmp_path / "half")
    (tmp_path / "half" / "checkpoint-1" / "config.json").write_text(config.read_text()[:99])
    with pytest.raises(ValueError, match=r"checkpoint-1/config.json is damaged: delete"):
        command(tmp_path / "half", *arguments, "--resume")
    for name, setting, message in [
        ("cut", "seed=0", "cut/checkpoint-1 does not load into this training"),
        ("linear", "freeze_backbone=true", "linear/checkpoint-1 does not load into this training"),
        ("muon", "optimizer=muon", "optimizer must stay adamw for .*/muon/checkpoint-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            command(tmp_path / name, *arguments, "--resume", "--set", setting)
    with pytest.raises(ValueError, match=r"trained on other classes than the data's: .*Boot"):
        command(tmp_path / "classes", *arguments, "--resume")

    (tmp_path / "lost" / "checkpoint-1" / "optimizer.pt").unlink()
    capsys.readouterr()
    command(tmp_path / "lost", *arguments, "--resume")
    assert "no whole checkpoint" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "lost" / "checkpoint-4")
    with pytest.raises(ValueError, match="holds a model already and no whole checkpoint"):
        command(tmp_path / "lost", *arguments, "--resume")


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_curve_of_one(tmp_path, command, capfd):
    """With BatchNorm over both processes' images. One of the images is broken, and both trainings finish."""
    images = data.FashionMNIST(FIXTURES / "fashion-mnist", "t10k")
    for i in range(60):
        image, label = images[i]
        folder = tmp_path / "images" / f"{label % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:02}.png")
    broken = tmp_path / "images" / "0" / "cut.png"
    broken.write_bytes((folder / f"{i:02}.png").read_bytes()[:-60])
    without_mixing = {**RECIPE["augmentation"], "mixup": 0, "cutmix": 0}  # it mixes the images of one process
    recipe = recipe_file(tmp_path, model={**TINY, "drop_path_rate": 0}, augmentation=without_mixing, validation=0,
                         sync_batchnorm=True)  # fmt: skip
    arguments = ["--data", tmp_path / "images", "--recipe", recipe]
    # on a machine without GPUs too, --multi_gpu is how accelerate is asked for several processes
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", "0"]  # fmt: skip
    half = ["--set", "training.per_device_train_batch_size=4"]
    command(tmp_path / "one", *arguments)
    errors = [capfd.readouterr().err, wait(start(tmp_path / "two", *arguments, *half, launcher=launcher))]
    curves = [log(tmp_path / name, "loss") for name in ("one", "two")]
    assert len(curves[0]) == 13 and curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert len(set(curves[0])) == 13
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    # Not biases that a BatchNorm takes away: Adam makes steps of their noise, which its mean holds. The stem has none.
    for name in first:
        telling = first[name].ndim > 1 or "running_var" in name or "patch_embed" in name
        if telling and first[name].is_floating_point():
            assert (second[name] - first[name]).norm() < 1e-3 * first[name].norm(), name
    for error, name in zip(errors, ("one", "two"), strict=True):
        assert error.count(f"skipped: {broken}") == 1
        assert (tmp_path / name / "unreadable.txt").read_text().count("\n") == 1


@pytest.fixture
def tiny_trainer(fashion, tmp_path, command):
    def make(**changes):
        recipe = recipes.read(recipe_file(tmp_path, **changes), [])
        train, validation = data.training_data(str(fashion), recipe["validation"], recipe["seed"])
        torch.manual_seed(0)
        model = finetune.make_model(None, train.classes, recipe)
        (tmp_path / "out").mkdir(exist_ok=True)
        return finetune.make_trainer(
            model, train, validation, recipe, SimpleNamespace(output=tmp_path / "out", max_minutes=None)
        )

    return make


def test_averaged_weights_are_validated_and_saved(tiny_trainer, tmp_path):
    from transformers import TrainerCallback

    trainer, states = tiny_trainer(), []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer.add_callback(Keep())
    trainer.train()
    assert len(states) == 13
    expected = states[0]
    for step, state in enumerate(states[1:], 2):
        decay = min(0.9, 1 - step ** (-2 / 3))  # grows with the steps up to the recipe's
        for name, tensor in state.items():
            floating = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if floating else tensor
    result = trainer.result.state_dict()
    for name, tensor in expected.items():  # the statistics of BatchNorm too
        torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=1e-6)

    finetune.finish(trainer, tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    held_out = [trainer.eval_dataset.dataset[i] for i in range(20)]
    with torch.no_grad():
        logits = model(processor([image for image, _ in held_out], return_tensors="pt").pixel_values).logits
    labels = torch.tensor([label for _, label in held_out])
    assert log(tmp_path / "out", "eval_loss")[-1] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert log(tmp_path / "out", "eval_accuracy")[-1] == pytest.approx((logits.argmax(-1) == labels).double().mean())
    assert log(tmp_path / "out", "eval_inverted_accuracy") and log(tmp_path / "out", "eval_coloured_accuracy")


def test_the_best_average_is_loaded_at_the_end(tiny_trainer):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = tiny_trainer(training={**RECIPE["training"], **settings, "save_steps": 4, "eval_steps": 4,
                                     "eval_strategy": "steps", "save_strategy": "steps"})  # fmt: skip
    trainer.train()
    best, result = Path(trainer.state.best_model_checkpoint), trainer.result.state_dict()
    assert best.name != "checkpoint-13"  # the highest loss is not the last one
    expected = load_file(best / "ema.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_a_validation_batch_without_a_readable_image_counts_for_nothing(tmp_path, command):
    """All of them unreadable is an error."""
    images = data.FashionMNIST(FIXTURES / "fashion-mnist", "t10k")
    for i in range(24):
        file = tmp_path / "data" / ("val" if i < 4 else "train") / str(i % 2) / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        images[i][0].save(file)
    last = tmp_path / "data" / "val" / "1" / "03.png"
    last.write_bytes(last.read_bytes()[:-60])
    arguments = ["--data", tmp_path / "data", "--recipe", recipe_file(tmp_path, augmentation={}), "--set",
                 "training.max_steps=2", "--set", "training.per_device_eval_batch_size=1"]  # fmt: skip
    command(tmp_path / "some", *arguments)
    (loss,) = log(tmp_path / "some", "eval_loss")
    assert 0 < loss < 4 and log(tmp_path / "some", "eval_accuracy")[0] in (0, 1 / 3, 2 / 3, 1)
    for file in (tmp_path / "data" / "val").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="none of the validation images can be read"):
        command(tmp_path / "none", *arguments)


def test_unreadable_images_are_named_whatever_they_are_called(tmp_path, capfd):
    report = finetune.Report(tmp_path / "unreadable.txt")
    name = os.fsdecode(b"caf\xe9.jpg")  # Latin-1, as old archives have it
    for _ in range(2):
        report(ValueError(f"{name} is not an image"))
    assert (tmp_path / "unreadable.txt").read_bytes() == b"caf\xe9.jpg is not an image\n"
    assert capfd.readouterr().err.count("skipped") == 1


def test_a_recipe_is_utf8_whatever_the_locale(tmp_path):
    """Windows's is not."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"notes": ["größer"], "seed": 3}, ensure_ascii=False), encoding="utf-8")
    code = "import pathlib, sys; sys.path.append(sys.argv[1]); import recipe\n"
    code += "print(recipe.read(pathlib.Path(sys.argv[2]), []))"
    done = run_python(code, EXAMPLES, path, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert "'seed': 3" in done.stdout


def recipe_and_log(name: str) -> tuple[dict, list[dict], str]:
    """Settings, log and notes of a recipe of this repository, the log being that of these settings."""
    path = EXAMPLES / "recipes" / f"{name}.json"
    recipe, history = recipes.read(path, []), json.loads(path.with_suffix(".log.json").read_text())
    assert history[-1]["epoch"] == recipe["training"]["num_train_epochs"]
    highest = max(entry["learning_rate"] for entry in history if "learning_rate" in entry)
    assert 0.97 * recipe["training"]["learning_rate"] < highest <= recipe["training"]["learning_rate"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == history[-1]["step"] // recipe["training"]["logging_steps"] and all(map(math.isfinite, losses))
    return recipe, history, " ".join(json.loads(path.read_text())["notes"])


def held_out(history: list[dict]) -> list[float]:
    """The last accuracies in percent: of held-out images as they are, inverted, coloured."""
    keys = [f"eval_{kind}accuracy" for kind in ("", "inverted_", "coloured_")]
    return [100 * [entry[key] for entry in history if key in entry][-1] for key in keys]


def results_of(name: str) -> dict:
    return json.loads((EXAMPLES / "recipes" / f"{name}.results.json").read_text())


def compared(results: dict, others: dict) -> list[str]:
    """What notes say of the accuracies of test images and their variants."""
    texts = [f"{100 * results['accuracy']:.2f} % against {100 * others['accuracy']:.2f}"]
    for variant, value in results["variants"].items():
        name = {"inverted and coloured": "both"}.get(variant, variant)
        texts.append(
            f"{name} {100 * value['accuracy']:.2f} against {100 * others['variants'][variant]['accuracy']:.2f}"
        )
    return texts


def test_recipes_of_the_default_model_are_those_of_its_logs():
    (first, history, notes), (second, last_history, last_notes) = (
        recipe_and_log(name) for name in ("fashion-mnist", "fashion-mnist-2")
    )
    for accuracies, text in ((held_out(history), notes), (held_out(last_history), last_notes)):
        assert "{:.1f} %, inverted {:.1f}, coloured {:.1f}".format(*accuracies) in text
    start, results, before = results_of("earlier/first"), results_of("fashion-mnist"), results_of("earlier/small")
    assert f"{100 * start['accuracy']:.2f} % of the test images" in notes
    assert all(text in last_notes for text in compared(results, before))
    config = json.loads((ROOT / "config.json").read_text())
    model = first["model"] | second["config"]
    assert {name: config[name] for name in model} == model
    epochs = [recipe["training"]["num_train_epochs"] for recipe in (first, second)]
    assert second["start_epoch"] == epochs[0]
    assert f"{epochs[0]} epochs, and {epochs[1]} more" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["fashion-mnist-3", "fashion-mnist-84px"])
def test_later_trainings_were_as_their_notes_say(name):
    """They go on from the default model, and gained nothing."""
    recipe, history, notes = recipe_and_log(name)
    before, before_history, _ = recipe_and_log("fashion-mnist-2")
    assert recipe["start_epoch"] == before["start_epoch"] + before["training"]["num_train_epochs"]
    values = (*held_out(history), *held_out(before_history))
    assert (
        "{:.1f} %, inverted {:.1f}, coloured {:.1f}, against {:.1f}, {:.1f} and {:.1f} before".format(*values) in notes
    )
    losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry][-1] for log in (history, before_history)]
    assert "their loss as they are {:.3f} against {:.3f}".format(*losses) in notes
    if name == "fashion-mnist-3":
        assert all(text in notes for text in compared(results_of(name), results_of("fashion-mnist")))


def test_the_second_seed_is_what_the_notes_say():
    recipe, history, notes = recipe_and_log("fashion-mnist")
    other = json.loads((EXAMPLES / "recipes" / "fashion-mnist.seed-1.log.json").read_text())
    assert other[-1]["epoch"] == recipe["training"]["num_train_epochs"]
    seeds = [results_of(name) for name in ("fashion-mnist.seed-1", "earlier/first")]
    assert abs(seeds[0]["accuracy"] - seeds[1]["accuracy"]) < 0.003
    assert all(text in notes for text in compared(*seeds))
    text = "got {:.2f} % of the test images right, the first seed {:.2f} %"
    assert text.format(*(100 * seed["accuracy"] for seed in seeds)) in (ROOT / "README.md").read_text()
    accuracies = zip(held_out(other), held_out(history), strict=True)
    text = "{} % against {}, inverted {} against {}, coloured {} against {}"
    assert text.format(*(f"{accuracy:.1f}" for pair in accuracies for accuracy in pair)) in notes


def test_earlier_trainings_were_as_their_notes_say():
    """The one at 84 pixels all of it in bfloat16, without a loss that was not finite."""
    for name in ("small-2", "small-3"):
        recipe_and_log(f"earlier/{name}")
    seeds = [100 * results_of(f"earlier/small.seed-{i}")["accuracy"] for i in (0, 1)]
    assert abs(seeds[0] - seeds[1]) < 0.3
    assert "{1:.2f} % of the test images against {0:.2f}".format(*seeds) in recipe_and_log("earlier/small")[2]
    recipe, history, notes = recipe_and_log("earlier/small-84px")
    assert recipe["training"]["bf16"]
    assert "{:.1f} % against".format(*held_out(history)) in notes
    assert all(text in notes for text in compared(results_of("earlier/small-84px"), results_of("earlier/small")))


def test_parameter_groups(small_config):
    small_config.layer_scale_conv = 0.5
    model = MambaVisionModelForImageClassification(small_config)  # depths 1, 1, 3, 2
    groups = training.parameter_groups(model, 1.0, 0.05, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, expected in {
        "patch_embed.conv_down.0.weight": (2**-8, 0.05),
        "patch_embed.conv_down.1.weight": (2**-8, 0),
        "levels.0.blocks.0.conv1.weight": (2**-7, 0.05),
        "levels.0.blocks.0.conv1.bias": (2**-7, 0),
        "levels.0.blocks.0.gamma": (2**-7, 0),
        "levels.0.downsample.reduction.0.weight": (2**-7, 0.05),
        "levels.1.blocks.0.norm2.weight": (2**-6, 0),
        "levels.2.blocks.0.mixer.A_log": (2**-5, 0),
        "levels.2.blocks.1.mixer.D": (2**-4, 0),
        "levels.2.blocks.1.mixer.conv1d_x.weight": (2**-4, 0.05),
        "levels.2.blocks.2.mixer.qkv.weight": (2**-3, 0.05),
        "levels.3.blocks.0.mixer.dt_proj.bias": (2**-2, 0),
        "levels.3.blocks.1.gamma_1": (2**-1, 0),
        "levels.3.blocks.1.mlp.fc2.weight": (2**-1, 0.05),
        "norm.weight": (1, 0),
        "head.weight": (1, 0.05),
        "head.bias": (1, 0),
    }.items():
        assert found[f"model.{name}"] == expected, name
    assert groups[0]["lr"] == 1.0  # the one that the log names
    assert all(group["use_fallback"] == (group["weight_decay"] == 0) for group in groups)
    model.requires_grad_(False)
    model.model.head.requires_grad_(True)
    groups = training.parameter_groups(model, 1.0, 0.05, 0.5)
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert training.frozen_modules(model) == [model.model.patch_embed, *[model.model.levels], model.model.norm]


def test_muon_turns_matrices_and_kernels(tiny_trainer):
    """Its steps are orthogonal matrices, of the length that AdamW's have; the other parameters' steps are NAdam's."""
    trainer = tiny_trainer(optimizer="muon", weight_decay=0.0, layer_decay=1.0)
    optimizer = trainer.create_optimizer()
    parameters = dict(trainer.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.manual_seed(0)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name in ("levels.0.blocks.0.conv2.weight", "levels.2.blocks.0.mlp.fc1.weight", "levels.3.blocks.0.mixer.A_log"):
        step = (parameters[f"model.{name}"] - before[f"model.{name}"]).detach().flatten(1) / 3e-3
        if name.endswith("A_log"):
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1.9), rtol=1e-3, atol=0)  # 1 + beta1
        else:
            lengths = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
            assert ((lengths > 0.6) & (lengths < 1.3)).all(), lengths


def test_even_stem_sees_neither_inversion_nor_hue():
    recipe = recipes.read(None, ["even_stem=true", f"model={json.dumps(TINY)}"])
    model = finetune.make_model(None, ["cat", "dog"], recipe).eval()
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    colours = torch.tensor([1.5, 0.2, 1.3]).view(1, 3, 1, 1)  # of the same brightness
    with torch.no_grad():
        expected = model(grey.expand(-1, 3, -1, -1)).logits
        assert expected.std() > 0 and not torch.allclose(expected[0], expected[1])
        for images in (-grey.expand(-1, 3, -1, -1), grey * colours):
            torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-6)


def test_learning_rate_warms_up_and_falls_to_its_minimum(tiny_trainer):
    trainer = tiny_trainer(training={**RECIPE["training"], "max_steps": 20, "warmup_steps": 4})
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(21):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rates = np.array(rates)
    factors = [step / 4 for step in range(4)]
    factors += [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / 16)) for step in range(17)]
    scale = 3e-3 * 0.8 ** np.unique(np.round(np.log(rates[4] / 3e-3) / np.log(0.8)))
    assert scale.max() == 3e-3 and scale.min() == pytest.approx(3e-3 * 0.8**7)  # 6 blocks between stem and head
    np.testing.assert_allclose(rates, np.outer(factors, rates[4]), rtol=1e-6)


def make_images(settings: dict, images: list, side: int = 16, **config):
    defaults = dict(resolution=side, crop_mode="center", interpolation="bicubic", mean=[0.5] * 3, std=[0.25] * 3)
    config = SimpleNamespace(**{**defaults, "num_labels": 4, **config})
    settings = recipes._complete(settings, recipes.DEFAULTS["augmentation"], "augmentation.")
    return augmentation.TrainingImages(images, settings, config, 0, lambda error: None)


def grey(array) -> Image.Image:
    return Image.fromarray(np.asarray(array, np.uint8)).convert("RGB")


def test_without_augmentation_training_images_are_those_of_the_image_processor(tmp_path):
    from transformers import BitImageProcessor

    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((480, 320))
    (x,) = make_images({}, [(image, 2)], side=64).__getitems__([0])["pixel_values"]
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=3,
                                  image_mean=[0.5] * 3, image_std=[0.25] * 3)  # fmt: skip
    expected = processor(image, return_tensors="pt").pixel_values[0]
    assert (x - expected).abs().max() < 0.1 and (x - expected).abs().mean() < 0.01  # of a range of 4


def test_augmentation_follows_from_seed_epoch_and_index():
    images = [(grey(np.random.default_rng(i).integers(0, 256, (20, 20))), i % 4) for i in range(6)]
    unmixed = {**RECIPE["augmentation"], "mixup": 0.0, "cutmix": 0.0}
    first = make_images(unmixed, images)
    batch = first.__getitems__([3, 4, 10])  # 10: image 4 in the second epoch
    torch.rand(7), random.random(), np.random.rand()
    again = make_images(unmixed, images).__getitems__([4, 10, 5])
    assert torch.equal(batch["pixel_values"][1:], again["pixel_values"][:2])
    assert not torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])
    assert batch["labels"].tolist() == [3, 0, 0]

    mixed = make_images(RECIPE["augmentation"] | {"mix_probability": 1.0}, images).__getitems__([0, 1, 2, 3])["labels"]
    assert mixed.shape == (4, 4) and torch.allclose(mixed.sum(1), torch.ones(4))

    order = augmentation.EpochOrder(10, 8, 0)
    epochs = []
    for order.epoch in (0, 1):
        epochs.append(list(order))
    assert [len(set(keys)) for keys in epochs] == [8, 8] == [len(order)] * 2
    assert all(key // 10 == epoch for epoch, keys in enumerate(epochs) for key in keys)
    assert [key % 10 for key in epochs[0]] != [key % 10 for key in epochs[1]]


def test_each_augmentation_does_what_its_name_says():
    ramp = grey(np.add.outer(np.arange(16) * 2, np.arange(16) * 10))
    plain = make_images({}, [(ramp, 0)]).__getitems__([0])["pixel_values"][0]
    values = lambda settings, keys=range(1): make_images(settings, [(ramp, 0)]).__getitems__(list(keys))["pixel_values"]  # noqa: E731
    black, white = -2.0, 2.0
    torch.testing.assert_close(values({"flip": 1.0})[0], plain.flip(-1))
    torch.testing.assert_close(values({"invert": 1.0})[0], black + white - plain)
    coloured = values({"colour": {"probability": 1.0, "strength": 0.5}}, range(50))
    t = (plain - black) / (white - black)
    for x in coloured:  # each channel is an affine function of the grey level, from a dark level to a light one
        for channel in x:
            slope = (channel[0, 15] - channel[0, 0]) / (t[0, 0, 15] - t[0, 0, 0])
            torch.testing.assert_close(channel, channel[0, 0] + slope * (t[0] - t[0, 0, 0]), rtol=1e-3, atol=1e-3)
            assert slope > 0 and channel.min() >= black and channel.max() <= white
    assert (coloured.std(1).mean((1, 2)) > 0.02).float().mean() > 0.8  # the channels differ
    shifted = values({"shift": 0.25, "fill": 255}, range(20))
    assert not torch.equal(shifted[0], shifted[1]) and any((x[:, :, 0] == white).all() for x in shifted)
    larger, smaller = values({"rescale": [2, 2]})[0], values({"rescale": [0.5, 0.5], "fill": 0})[0]
    assert larger.max() < plain.max() and (smaller[:, :3] == black).all() and (smaller[:, 5:11, 5:11] > black).all()
    cropped = values({"crop": {"scale": [0.2, 0.4]}}, range(20))
    assert all(x.max() - x.min() < plain.max() - plain.min() for x in cropped)
    erased = values({"erase": 1.0}, range(8))
    assert all((x == 0).all(0).sum() >= 4 for x in erased) and not (plain == 0).all(0).any()


def test_the_last_epochs_are_neither_erased_nor_mixed():
    images = [(grey(np.full((16, 16), 50 * i)), i) for i in (1, 2)]
    settings = {"erase": 1.0, "cutmix": 1.0, "off_epoch": 1}
    first, last = (make_images(settings, images).__getitems__([2 * epoch, 2 * epoch + 1]) for epoch in (0, 1))
    plain = make_images({}, images).__getitems__([2, 3])
    assert first["labels"].ndim == 2 and not torch.equal(first["pixel_values"], plain["pixel_values"])
    assert torch.equal(last["pixel_values"], plain["pixel_values"]) and last["labels"].tolist() == [1, 2]


def test_a_later_training_draws_on(tiny_trainer):
    trainer, epochs = tiny_trainer(start_epoch=3), set()
    images = trainer.train_dataset
    batches = images.__getitems__

    def recorded(keys):
        epochs.update(key // len(images) for key in keys)
        return batches(keys)

    images.__getitems__ = recorded
    trainer.train()
    assert sorted(epochs) == list(range(3, 3 + math.ceil(trainer.state.epoch)))


def test_wrong_settings_are_named(fashion, tmp_path, command):
    (tmp_path / "text.json").write_text("seed: 1")
    (tmp_path / "list.json").write_text("[]")
    base = ["--data", fashion, "--recipe", recipe_file(tmp_path)]
    for arguments, words in [
        ([*base, "--set", "augmentation.mixupp=1"], "augmentation.mixupp.*augmentation.mixup,"),
        ([*base, "--set", "epochs=3"], "no setting epochs; there are seed, start_epoch"),
        ([*base, "--set", "training.learn=3"], "training.learn;.*learning_rate"),
        ([*base, "--set", "training.weight_decay=1"], "set outside of training, as weight_decay"),
        ([*base, "--set", "model.width=3"], "model.width; there are dim"),
        ([*base, "--set", "model.dim=-3"], "dim must be a positive integer, got -3"),
        ([*base, "--set", "augmentation.flip=2"], "augmentation.flip must be a number in 0 ... 1, got 2"),
        ([*base, "--set", "augmentation.rescale=1.5"], "augmentation.rescale must be a pair"),
        ([*base, "--set", "augmentation.colour.amount=1"], "augmentation.colour.amount; .*colour.strength"),
        ([*base, "--set", "augmentation.crop.scale=[0.5,1]"], "augmentation.crop cannot go together with"),
        ([*base, "--set", "augmentation.randaugment=strong"], "randaugment='strong'"),
        ([*base, "--set", "training.per_device_train_batch_size=7"], "must be even, got 7"),
        ([*base, "--set", "training.per_device_train_batch_size=128"], "80 training images do not fill"),
        ([*base, "--set", "seed"], "must be KEY=VALUE"),
        ([*base, "--set", "training.eval_strategy=often"], "TrainingArguments does not take .*often"),
        ([*base, "--set", "training=3"], "training must be an object, got 3"),
        ([*base, "--set", "model=MambaVision-T-1K"], "model must be an object, got 'MambaVision-T-1K'"),
        ([*base, "--set", "training.per_device_eval_batch_size=0"], "eval_batch_size must be an integer in 1"),
        ([*base, "--set", "training.num_train_epochs=0"], "training.num_train_epochs must be a number in 1e-06"),
        ([*base, "--set", "training.max_steps=x"], "training.max_steps must be a number, got 'x'"),
        ([*base, "--set", "training.bf16=yes"], "training.bf16 must be true or false, got 'yes'"),
        ([*base, "--set", "training.lr_scheduler_kwargs=3"], "training.lr_scheduler_kwargs must be an object, got 3"),
        ([*base, "--set", "augmentation.flip=null"], "augmentation.flip must be a number in 0 ... 1, got None"),
        ([*base, "--set", "seed=-1"], "seed must be an integer in 0 ... 2147483647, got -1"),
        ([*base, "--set", "lora.rank=0"], "lora.rank must be an integer in 1"),
        ([*base, "--set", "ema=1"], "ema must be a number in 0 ... 0.999999, got 1"),
        ([*base, "--set", "optimizer=adam"], "optimizer must be adamw or muon, got 'adam'"),
        ([*base, "--set", "model=null", "--set", "even_stem=true"], "even_stem is for a new model"),
        ([*base, "--set", "freeze_backbone=maybe"], "freeze_backbone must be true or false, got 'maybe'"),
        ([*base, "--set", "training.learning_rate=[1]"], "training.learning_rate must be a number"),
        ([*base, "--lora", "4", "--freeze-backbone"], "exclude each other"),
        ([*base, "--model", ROOT], "leave out --model"),
        (["--data", fashion, "--model", tmp_path], "does not load"),
        (["--data", fashion, "--recipe", tmp_path / "text.json"], "text.json is not JSON"),
        (["--data", fashion, "--recipe", tmp_path / "list.json"], "must hold a JSON object"),
        (["--data", tmp_path / "none"], "neither a folder nor the Hub id"),
    ]:
        with pytest.raises(ValueError, match=words):
            command(tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_loss_that_is_not_finite_stops_the_training(fashion, tmp_path, command):
    arguments = ["--data", fashion, "--recipe", recipe_file(tmp_path), "--set", "training.learning_rate=1e30"]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in step \d+: .*--resume and a smaller"):
        command(tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_new_models_by_variant_and_loaded_ones_with_a_fitting_head(tmp_path):
    complete = recipes.read(None, [])
    model = finetune.make_model("MambaVision-T-1K", ["cat", "dog", "emu"], complete)
    assert model.config.depths == [1, 3, 8, 4] and model.config.dim == 80
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"} and model.model.head.out_features == 3

    before = load_file(ROOT / "model.safetensors")["model.head.weight"]
    heads = []
    for classes in (data.FASHION_MNIST_LABELS, list("0123456789"), ["a", "b"]):
        model = finetune.make_model(None, classes, recipes.read(None, ["config.drop_path_rate=0.25"]))
        assert model.config.drop_path_rate == 0.25 and model.model.levels[3].blocks[-1].drop_path.rate == 0.25
        heads.append(model.model.head.weight)
    assert torch.equal(heads[0], before)  # the same classes: a restart
    assert heads[1].shape == before.shape and heads[1].std().item() == pytest.approx(0.02, rel=0.2)  # as many others
    assert heads[2].shape[0] == 2

    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert finetune.make_model(str(tmp_path), ["a", "b"], complete).dtype == torch.float32
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.levels.1.blocks.0.conv1.weight"], weights["model.head.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its weights, the first is model.levels.1.blocks.0.conv1"):
        finetune.make_model(str(tmp_path), ["a", "b"], complete)


WITHOUT = """
import sys
sys.path.insert(0, sys.argv[1])
for name in ("tensorboard", "peft", "datasets", "matplotlib", "sklearn"):
    for module in [module for module in sys.modules if module.startswith(name + ".")]:
        del sys.modules[module]
    sys.modules[name] = None
import command, digits, finetune
finetune.main(sys.argv[2:])
sys.argv[1:] = ["anywhere"]
command.run(digits.main)
"""


def test_without_the_packages_that_it_can_do_without(fashion, tmp_path):
    recipe = recipe_file(tmp_path, training={**RECIPE["training"], "max_steps": 2})
    arguments = [tmp_path / "out", "--data", fashion, "--recipe", recipe]
    done = run_python(WITHOUT, EXAMPLES, *arguments, check=False, OMP_NUM_THREADS="1")
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "curves.png").exists()
    assert "curves.png is not drawn: that needs matplotlib" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: this needs the package scikit-learn: pip install scikit-learn"
    assert done.returncode == 1


def test_data_with_splits_and_data_of_the_datasets_library(tmp_path):
    import datasets

    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("ant", "bee"):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                grey(np.full((9, 9), 50 * i)).save(folder / f"{i}.png")
    train, validation = data.training_data(str(tmp_path / "folders"), 0.5, 0)
    assert (len(train), len(validation), train.classes) == (6, 4, ["ant", "bee"])
    assert len(data.test_data(str(tmp_path / "folders"))) == 2
    assert data.training_data(str(tmp_path / "folders"), 0, 0)[1] is None
    with pytest.raises(ValueError, match="no split dev; its splits are test, train, val"):
        data.test_data(str(tmp_path / "folders"), "dev")
    # as other people name and pack them
    (tmp_path / "folders" / "train").rename(tmp_path / "folders" / "Training")
    for litter in ("__MACOSX", ".ipynb_checkpoints", "Training/.git", "val/ant/__MACOSX", "unlabelled"):
        (tmp_path / "folders" / litter).mkdir()
        grey(np.zeros((9, 9))).save(tmp_path / "folders" / litter / "._0.png")
    train, validation = data.training_data(str(tmp_path / "folders"), 0.5, 0)
    assert (len(train), len(validation), train.classes) == (6, 4, ["ant", "bee"])
    for name in ("bus", "train"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        grey(np.zeros((9, 9))).save(tmp_path / "vehicles" / name / "0.png")
    assert data.test_data(str(tmp_path / "vehicles")).classes == ["bus", "train"]
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "vehicles").rename(tmp_path / "wrapped" / "vehicles")
    with pytest.raises(ValueError, match="has one class, vehicles"):
        data.training_data(str(tmp_path / "wrapped"), 0.5, 0)

    files = sorted((tmp_path / "folders" / "Training").glob("[ab]*/*.png"))
    contents = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    contents[4]["bytes"] = contents[4]["bytes"][:50]
    columns = {"photo": contents, "kind": [0, 0, 0, 1, 1, 1], "weight": [0.5] * 6}
    features = datasets.Features(photo=datasets.Image(), kind=datasets.ClassLabel(names=["ant", "bee"]),
                                 weight=datasets.Value("float32"))  # fmt: skip
    made = datasets.Dataset.from_dict(columns, features)
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    made.save_to_disk(tmp_path / "arrow")
    for source in ("parquet", "arrow"):
        train, validation = data.training_data(str(tmp_path / source), 0.34, 0)
        assert (len(train), len(validation), train.classes) == (4, 2, ["ant", "bee"])
        whole = data.test_data(str(tmp_path / source))
        assert whole[3][1] == 1 and whole[2][0].getpixel((4, 4)) == (100, 100, 100)
        with pytest.raises(ValueError, match="image 4 cannot be read as an image"):
            whole[4]
    columns["kind"] = [0, 0, 0, 1, -1, None]
    columns["photo"] = [*contents[:3], None, *contents[4:]]
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    whole = data.test_data(str(tmp_path / "parquet"))
    for i, absent in ((3, "image"), (4, "class"), (5, "class")):
        with pytest.raises(ValueError, match=f"image {i}: there is no {absent}"):
            whole[i]
    columns["kind"] = [-1] * 6
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    with pytest.raises(ValueError, match="no image of this split has a class"):
        data.test_data(str(tmp_path / "parquet"))
    made.remove_columns("kind").to_parquet(tmp_path / "parquet" / "train-0.parquet")
    with pytest.raises(ValueError, match="one column of type ClassLabel, and has none among"):
        data.test_data(str(tmp_path / "parquet"))


def test_variants_of_images_are_always_the_same():
    image = grey(np.pad(np.full((12, 12), 200), 8))
    for name, change in variants.VARIANTS.items():
        first, again, other = change(image, 3), change(image, 3), change(image, 5)
        assert first.size == image.size and first.mode == "RGB"
        assert first.tobytes() == again.tobytes() != image.tobytes(), name
        assert name == "inverted" or first.tobytes() != other.tobytes()
    pixels = {name: np.asarray(change(image, 3)).astype(int) for name, change in variants.VARIANTS.items()}
    assert (pixels["inverted"] == 255 - np.asarray(image)).all()
    dark, light = pixels["coloured"][0, 0], pixels["coloured"][14, 14]
    assert dark.max() < 90 < light.max() and np.ptp(light) > 20
    assert pixels["inverted and coloured"][0, 0].max() > 180 > pixels["inverted and coloured"][14, 14].max()
    for name in ("shifted", "rescaled"):  # a grey square elsewhere, or of another size
        rows, columns = np.nonzero(pixels[name][..., 0] > 100)
        assert 8 <= np.ptp(rows) + 1 <= 15 and np.ptp(rows) == np.ptp(columns)
    assert np.ptp(np.nonzero(pixels["shifted"][..., 0])[0]) + 1 == 12


def test_scan_makes_nothing_infinite_of_what_is_finite(monkeypatch):
    """Under bf16, with ten times the usual learning rate and inputs: forward and backward, in every step."""
    from repository import modeling_mambavision as modeling

    sizes, checked = [], []

    def finite(tensors) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def watch(scan):
        def watched(*inputs):
            inputs = [tensor.view_as(tensor) for tensor in inputs]  # a parameter would keep its hook
            y = scan(*inputs)
            assert not finite(inputs) or finite([y])
            sizes.append(max(tensor.abs().max().item() for tensor in inputs))
            arriving = []
            y.register_hook(lambda gradient: arriving.append(gradient))
            for tensor in inputs:
                tensor.register_hook(
                    lambda gradient: checked.append(not finite([*inputs, *arriving]) or finite([gradient]))
                )
            return y

        return watched

    for name in ("selective_scan", "scan_concat"):  # with and without the other half of the mixer
        monkeypatch.setattr(modeling, name, watch(getattr(modeling, name)))
    torch.manual_seed(0)
    model = MambaVisionModelForImageClassification(modeling.MambaVisionConfig(**{**SMALL, "num_labels": 2})).train()
    for name, parameter in model.named_parameters():
        if name.endswith("norm1.weight"):  # the norms would take the images' scale away before the scan
            parameter.data.fill_(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=10 * 1e-3)
    for _ in range(30):
        labels = torch.randint(2, (8,))
        images = 10 * (torch.randn(8, 3, 64, 64) + labels.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert len(sizes) == 30 * 3 and len(checked) >= 30 * 3 * 7 and all(checked)
    assert max(sizes) > 30  # as they are without all this: 8
