"""Reading: a checkpoint file, a folder or a Hub repository becomes named tensors, and no code of theirs runs.

The tensors are views of memory-mapped files: what is not used is never read.
"""

import contextlib
import ctypes
import json
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file
from tqdm import tqdm

from .errors import ConversionError, first_sentence, listed, size


# How files of torch.save are called, the likeliest first
PICKLES = (".pth.tar", ".pth", ".ckpt", "pytorch_model.bin", ".bin")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # data parallelism or averaging, torch.compile, the published class


@dataclass
class Source:
    """What was read: the tensors, by their names without common prefixes (`module.`, `model.`)."""

    name: str  # as the user gave it
    files: list[Path]
    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)  # the config.json beside the files
    stamps: list[tuple] = field(default_factory=list)  # of the files, before they were read

    def release(self) -> None:
        """Unmap the tensors, and free those that could not be mapped: of files older than torch's zip format."""
        self.tensors.clear()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # glibc keeps freed memory, here as much as the whole model's

    def check_unchanged(self) -> None:
        """
        Raises:
            ConversionError: a file was written to or replaced since it was read, by a training that goes on.
        """
        for path, stamp in zip(self.files, self.stamps, strict=True):
            if _stamp(path) != stamp:
                raise ConversionError(f"{path} was changed while it was converted: try again")


def read_source(source: str, ema: bool) -> Source:
    """
    Args:
        source: a file of safetensors or torch.save, a folder with one such file or with shards, or a Hub id.
        ema: whether to take the exponential-average weights, `state_dict_ema`.

    Raises:
        ConversionError: there is no such source, or it is not a whole checkpoint of plain tensors.
    """
    path = Path(source)
    if path.is_file():
        return _read_files(source, [path], _config_beside(path), ema)
    if path.is_dir():
        return _read_folder(source, path, ema)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ConversionError(f"{source} is neither a file, a folder nor the id of a Hub repository (OWNER/NAME)")
    return _read_folder(source, _download(source, ema), ema)


def _download(repo_id: str, ema: bool) -> Path:
    """The repository's folder in the Hub's cache, with its safetensors, or else its files of torch.save."""
    safetensors = ["*.safetensors", "*.safetensors.index.json"]
    pickles = [f"*{suffix}" for suffix in PICKLES]
    try:
        for patterns in (pickles,) if ema else (safetensors, pickles):
            wanted = {"allow_patterns": ["config.json", *patterns], "ignore_patterns": ["*/*"]}
            folder = Path(huggingface_hub.snapshot_download(repo_id, **wanted))
            if any(file for pattern in patterns for file in folder.glob(pattern)):
                return folder
    except Exception as error:  # of the network, the Hub, the cache: each with its own class
        reason = first_sentence(error)
        if isinstance(error, GatedRepoError):
            reason = "it is gated: accept its terms on its page there, and log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "it has no such repository, or a private one: log in with `hf auth login`"
        raise ConversionError(f"{repo_id} is no file or folder here, and the Hub does not give it: {reason}") from error
    raise ConversionError(f"{repo_id} has no checkpoint, or only its cache was asked, as the Hub was not reached")


def _read_folder(source: str, folder: Path, ema: bool) -> Source:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() and not ema:
        files = [folder / "model.safetensors"]
    elif index.is_file() and not ema:
        files = _shards(index)
    else:
        kinds = PICKLES if ema else (".safetensors", *PICKLES)
        inside = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        files = next((found for kind in kinds if (found := [p for p in inside if p.name.lower().endswith(kind)])), [])
        if not files:
            raise ConversionError(f"{source} holds no checkpoint: no file ends in {' or '.join(kinds)}")
        if len(files) > 1:
            raise ConversionError(
                f"{source} must hold one checkpoint, and holds {listed(file.name for file in files)}: name one file,"
                " or give their index, model.safetensors.index.json, where they are shards"
            )
    return _read_files(source, files, config if isinstance(config, dict) else {}, ema)


def _config_beside(path: Path) -> dict:
    """A file's config.json, if that is one of this kind of model: it may belong to another file."""
    with contextlib.suppress(ConversionError, OSError):
        config = read_json(path.with_name("config.json"))
        if isinstance(config, dict) and str(config.get("model_type")).startswith("mambavision"):
            return config
    return {}


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ConversionError(f"{index} names {name!r}, which is no safetensors file in the same folder")
    return [index.parent / name for name in names]


def _read_files(source: str, files: list[Path], config: dict, ema: bool) -> Source:
    tensors, stamps = {}, [_stamp(path) for path in files]
    for path in files:
        _check_start(path)
        part = _read_safetensors(path, ema) if _is_safetensors(path) else _read_pickle(path, ema)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ConversionError(f"{source} holds {listed(twice)} in {path.name} and in another file")
        tensors.update(part)
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"the weights of {source} hold {name!r}, which is not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.numel() == 0:
            raise ConversionError(f"{name} of {source} is empty, or not a plain dense tensor")
    # A view can repeat a single stored value a billion times; written out, it would fill the disk.
    claimed, stored = sum(t.nbytes for t in tensors.values()), sum(path.stat().st_size for path in files)
    if claimed > stored:
        raise ConversionError(f"the tensors of {source} claim {size(claimed)}, and its files hold {size(stored)}")
    tensors = {name: tensor.detach().resolve_neg() for name, tensor in tensors.items()}  # no minus that is still to do
    return Source(source, files, without_prefixes(tensors), config, stamps)


def _stamp(path: Path) -> tuple:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def without_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Less the names of wrappers that all of them start with, and what torch's AveragedModel counts."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    while tensors and (wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), None)):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _check_start(path: Path) -> None:
    """
    Raises:
        ConversionError: the file is what is often downloaded in a checkpoint's place, or torch cannot open its name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConversionError(f"{str(path)!a} is no name in UTF-8: rename it") from None
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a pointer of Git LFS, not the file itself: `git lfs pull` gets that")
    if start.startswith((b"<!doctype", b"<html")):
        raise ConversionError(f"{path} is a web page, not a checkpoint: download the file itself")


def _is_safetensors(path: Path) -> bool:
    """By its name or its start, the header's length and the header: files of the Hub's cache have no suffix."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path, ema: bool) -> dict[str, torch.Tensor]:
    if ema:
        raise ConversionError(f"--ema needs a checkpoint of a training loop, and {path.name} holds one set of weights")
    try:
        return load_file(path)
    except Exception as error:
        raise ConversionError(
            f"{path} is not a whole safetensors file (truncated or foreign): {first_sentence(error)}"
        ) from error


class _Ignored:
    """Stands for what a checkpoint holds beside its tensors; keeps nothing and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# What the training loops of timm and mmengine save beside the weights: each is read as an `_Ignored` of that name, so
# that nothing of these modules is imported or called.
STAND_INS = [
    type(name, (_Ignored,), {"__module__": module})
    for module, names in {
        "argparse": "Namespace",
        "builtins": "getattr",
        "collections": "defaultdict",
        "mmengine.config.config": "ConfigDict",
        "mmengine.logging.history_buffer": "HistoryBuffer",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.dtypes": "Float32DType Float64DType Int64DType",
        "pathlib": "Path PosixPath WindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath",  # Python 3.13's
    }.items()
    for name in names.split()
]


def _read_pickle(path: Path, ema: bool) -> dict:
    """The weights in a file of torch.save, by torch's unpickler that builds tensors and calls nothing else."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    others = torch.serialization.get_safe_globals()  # of the process: neither to meet the stand-ins nor to replace them
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(STAND_INS)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConversionError(
                f"{path} is a pickle that asks for {unsafe[1]}, which is no part of weights: refused, nothing was run"
            ) from error
        raise ConversionError(
            f"{path} is not a whole PyTorch checkpoint (truncated or foreign): {first_sentence(error)}"
        ) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
    saved = saved if isinstance(saved, dict) else {}
    keys = ("state_dict_ema",) if ema else ("state_dict", "model")
    for key in keys:
        if isinstance(saved.get(key), dict):
            return saved[key]
    if not ema and any(isinstance(value, torch.Tensor) for value in saved.values()):
        return saved  # the weights themselves
    raise ConversionError(f"{path} has no weights under {' or '.join(keys)}, only {listed(saved) or 'nothing'}")


def _check_archive(path: Path) -> None:
    """torch.save compresses nothing, no two of its entries share bytes, and their checksums are right.

    What is memory-mapped is read past the archive's checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = sum(entry.file_size for entry in entries)
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ConversionError(f"{path} is compressed, as no checkpoint of torch.save is (TorchScript is none)")
            if stored > path.stat().st_size:
                raise ConversionError(
                    f"{path} unpacks to {size(stored)}, more than it holds: no checkpoint of torch.save"
                )
            with tqdm(total=stored, desc="checking", unit="B", unit_scale=True, delay=1) as bar:
                for entry in entries:
                    if entry.CRC == 0:
                        continue  # torch computes none after set_crc32_options(False)
                    with archive.open(entry) as content:
                        while block := content.read(2**22):
                            bar.update(len(block))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ConversionError(f"{path} is damaged, copy or download it again: {first_sentence(error)}") from error


def read_json(path: Path):
    """
    Raises:
        ConversionError: the file is not JSON, or larger than any configuration.
    """
    try:
        if path.stat().st_size > 2**26:
            raise ValueError(f"it has {size(path.stat().st_size)}")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not the JSON file it should be: {first_sentence(error)}") from error
