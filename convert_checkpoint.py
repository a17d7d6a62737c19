"""Published MambaVision weights in, a complete and verified repository folder out.

    python convert_checkpoint.py mambavision_tiny_1k.pth.tar MambaVision-T-1K
    python convert_checkpoint.py nvidia/MambaVision-L3-256-21K L3 --dtype bfloat16
    python convert_checkpoint.py mamba_vision_160k_ade20k-512x512_tiny.pth T-ade20k

The stages, each a file of `conversion/`: read the source without running code from it (source.py); recognise the
published model and match every tensor by a table, strictly both ways (plan.py); write the folder beside its place
(folder.py); load it back and verify it (verify.py); put it in its place whole (workshop.py).

Tensors stay views of the memory-mapped source until they are written, one at a time: the peak is one copy of them.
"""

import argparse
import hashlib
import signal
import sys
import time
import types
import zipfile
from pathlib import Path


if not __package__:  # run as a script: the model files import each other relatively, and need a package
    __package__ = "mambavision_repository"
    sys.modules[__package__] = types.ModuleType(__package__)
    sys.modules[__package__].__path__ = [str(Path(__file__).resolve().parent)]

import huggingface_hub
import torch
import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tqdm import tqdm

from .conversion.errors import ConversionError, first_sentence, one_line, size
from .conversion.folder import write_report, write_rest, write_weights
from .conversion.plan import FLOATS, make_plan, read_labels
from .conversion.source import read_source
from .conversion.verify import import_official, verify
from .conversion.workshop import Workshop


__version__ = "1.0.0"

# What libraries also raise over broken archives and numbers beyond all bounds
OF_HOSTILE_FILES = (zipfile.BadZipFile, RuntimeError, ArithmeticError, MemoryError)


def convert(args: argparse.Namespace) -> str:
    """All stages; gives the line that says what was written and how close it is.

    Raises:
        ConversionError, OSError, ValueError, ImportError: what a user can get wrong; nothing is left behind.
    """
    start = time.monotonic()
    origin = Path(args.source).resolve()
    workshop = Workshop(Path(args.output).resolve(), args.overwrite)
    check_outside([Path(args.source)], workshop)
    if args.verify_against_official:
        import_official()
    labels = read_labels(args.labels) if args.labels else None

    with workshop:
        source = read_source(args.source, args.ema)
        check_outside(source.files, workshop)
        plan = make_plan(source, args.variant, labels, args.backbone_only)
        if args.ema:
            plan.notes.append("took the exponential average of the weights")
        if args.dtype:
            plan.notes.append(f"cast all but A_log, D and the BatchNorm statistics to {args.dtype}")
        for note in plan.notes:
            print(f"note: {one_line(note)}", file=sys.stderr)
        written = write_weights(workshop.new, plan, source, FLOATS.get(args.dtype), args.max_shard_size)
        write_rest(workshop.new, plan, written)
        in_source = len(source.tensors)
        source.release()  # before the written folder is mapped
        figures = {} if args.no_verify else verify(workshop.new, plan, written, args.verify_against_official)
        report = {
            "converter": f"convert_checkpoint.py {__version__}",
            "source": {
                "name": origin.name if origin.exists() else args.source,
                "weights": "exponential average" if args.ema else "as trained",
                "files": [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in source.files],
            },
            "variant": plan.variant,
            "task": plan.task.name,
            "decisions": plan.notes,
            "dtype": args.dtype or "as in the source",
            "tensors": {"source": in_source, "converted": len(written), "left_out": in_source - len(written)},
            "values": sum(tensor.count for tensor in written.values()),
            "verification": figures,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_report(workshop.new, plan, report, args.push_to_hub or workshop.target.name)
        source.check_unchanged()
        total = sum(file.stat().st_size for file in workshop.new.iterdir())
        workshop.publish()

    close = "all of them equal bit for bit when loaded back, outputs finite" if figures else "not verified"
    if "difference_from_official" in figures:
        furthest = max(figures["difference_from_official"].values())
        close += f" and within {furthest:.0e} standard deviations of the mambavision package's"
    seconds = time.monotonic() - start
    return (
        f"wrote {args.output}: {plan.variant}, {plan.task.name}, {size(total)} in {seconds:.0f} s,"
        f" {len(written)} tensors, {close}"
    )


def check_outside(sources: list[Path], workshop: Workshop) -> None:
    """
    Raises:
        ConversionError: a source is, maybe by a link, where the result goes or is made, and would be deleted.
    """
    for source in sources:
        real = source.resolve()
        for place in (workshop.target, workshop.path):
            if real.exists() and place in (real, *real.parents):
                raise ConversionError(f"{source} lies in {place}, whose place the result takes: choose another")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    length = path.stat().st_size
    with path.open("rb") as file, tqdm(total=length, desc="hashing", unit="B", unit_scale=True, delay=1) as bar:
        while block := file.read(2**22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def check_hub(repo_id: str, private: bool) -> str:
    """Before any work: will the Hub take the folder, as far as can be known?

    Returns:
        the repository's name with its owner's, which may be left out.

    Raises:
        ConversionError: no.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {repo_id!r}: {first_sentence(error)}") from error
    if not huggingface_hub.get_token():
        raise ConversionError("--push-to-hub needs a Hugging Face token: log in with `hf auth login`, or set HF_TOKEN")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConversionError("--push-to-hub needs the Hub, which HF_HUB_OFFLINE forbids to ask: unset it")
    api = huggingface_hub.HfApi()
    try:
        owner = api.whoami()["name"]
        name = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
        public = private and api.repo_exists(name) and not api.repo_info(name).private
    except Exception as error:  # of the network, the Hub, the token: each with its own class
        raise ConversionError(
            f"--push-to-hub: the Hub does not answer, or not to this token (`hf auth login` takes a new one):"
            f" {first_sentence(error)}"
        ) from error
    if public:
        raise ConversionError(
            f"--private: {name} is there and public: make it private in its settings, or choose another name"
        )
    return name


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload the folder; gives its URL.

    Raises:
        ConversionError: the Hub does not take it.
    """
    api = huggingface_hub.HfApi()
    # What an earlier upload left would be loaded with this one's files, or instead of them.
    weights = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the owner's settings say
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, commit_message="Converted weights", delete_patterns=weights
        )
    except Exception as error:  # as above
        raise ConversionError(f"{folder} is written, but its upload failed: {first_sentence(error)}") from error
    return str(url)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Turn published MambaVision weights into a complete, verified repository folder.",
        epilog="The converted weights keep NVIDIA's licences; see LICENSE in the folder.",
    )
    parser.add_argument("source", help="a .pth.tar, .pth or .safetensors file, a folder, or a Hub id")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--variant", help="the published model, instead of recognising it by its tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, if it holds a model and nothing else")
    parser.add_argument("--dtype", choices=list(FLOATS), help="cast all but A_log, D and the BatchNorm statistics")
    parser.add_argument("--ema", action="store_true", help="take the exponential-average weights (state_dict_ema)")
    parser.add_argument("--labels", type=Path, help="names of the classes: a text with one on each line, or JSON")
    parser.add_argument("--backbone-only", action="store_true", help="of a segmentation checkpoint, the backbone alone")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger weights into files of this size (5GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not load the folder back")
    parser.add_argument("--verify-against-official", action="store_true", help="compare with the mambavision package")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the folder to this Hub repository")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    args = parser.parse_args(argv)
    if args.no_verify and args.verify_against_official:
        parser.error("--no-verify and --verify-against-official exclude each other")
    if args.private and args.push_to_hub is None:
        parser.error("--private is about the repository of --push-to-hub, which is not given")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be none in the terminal's encoding
    try:
        if args.push_to_hub is not None:
            args.push_to_hub = check_hub(args.push_to_hub, args.private)
        print(convert(args))
        if args.push_to_hub is not None:
            print(push(Path(args.output).resolve(), args.push_to_hub, args.private))
    except (ConversionError, OSError, ValueError, ImportError, *OF_HOSTILE_FILES) as error:
        print(f"error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # unwinds, and so clears up
    sys.exit(main())
