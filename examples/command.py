"""What the example commands have in common: errors in one line, quiet libraries, and a model that is whole."""

import argparse
import logging
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent  # the default model's folder
MOST_PIXELS = 2**24  # of images in memory at their full size, beyond the last one


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """A type of command-line arguments: an integer of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A type of command-line arguments: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def run(main) -> None:
    """Call `main()` as the program: what a user can get wrong ends it with one line on stderr and exit code 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be none in the terminal's encoding
    try:
        main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        package = {"sklearn": "scikit-learn"}.get(package, package)
        sys.exit(f"error: this needs the package {package}: pip install {package}" if package else f"error: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at the end fails again
        sys.exit(1)
    except (OSError, ValueError, ImportError, FloatingPointError, RuntimeError) as error:  # torch's own are the last
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # which is no OSError, even where the disk is full
            raise
        sys.exit(f"error: {one_line(error)}")


def one_line(error: Exception) -> str:
    message = str(error).strip() or type(error).__name__
    if message.startswith("Caught "):  # in a process that loads data: its traceback, and then its message
        message = message.splitlines()[-1].partition(": ")[2]
    return textwrap.shorten(message, 500)


def quiet() -> None:
    """Keep the libraries' warnings off the terminal; what concerns the user is raised as an error."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def preprocessed(images, processor):
    """`pixel_values` of an iterable of PIL images, None if there is none.

    They are taken a few at a time if they are large: a batch of photographs could fill the memory.
    """
    import torch

    done, held, pixels = [], [], 0
    for image in images:
        held.append(image)
        pixels += image.width * image.height
        if pixels >= MOST_PIXELS:
            done.append(processor(held, return_tensors="pt").pixel_values)
            held, pixels = [], 0
    if held:
        done.append(processor(held, return_tensors="pt").pixel_values)
    return torch.cat(done) if done else None


def load_class(name: str):
    """A class of this repository's model code, by "MODULE.CLASS"; saved with a model, its files go along."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, str(ROOT))


def load_model(name: str):
    """The image classifier in a folder or Hub repository, and its image processor.

    Its weights must be complete: transformers would fill what is missing with random numbers and only warn.

    Returns:
        model: in evaluation mode, on a GPU where there is one.
        processor: PIL images to `pixel_values`.

    Raises:
        ValueError: there is no such model, or it does not load; the message names it and the reason.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"model {name} is neither a folder nor a Hub id (OWNER/NAME)")
    for file in ("config.json", "preprocessor_config.json"):
        if is_folder and not (Path(name) / file).is_file():
            raise ValueError(f"model {name} is a folder without {file}")

    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging as transformers_logging

    if is_folder:  # a download keeps its progress bar
        transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            name, trust_remote_code=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # the files are the user's, and each can be broken in its own way
        raise ValueError(f"model {name} does not load: {one_line(error)}") from error
    wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"model {name} does not load: {len(wrong)} tensors of its weights are missing or do not fit config.json,"
            f" the first is {wrong[0]}"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor
