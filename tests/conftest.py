"""Fixtures: the repository as a user has it, in a folder of its own, and the packages that it is compared with."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
CACHE = ROOT / ".cache"

# Before transformers is imported: no network, none of the user's settings, and a cache of remote code that no other run
# has written to.
for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
             "MAMBAVISION_SCAN"):  # fmt: skip
    os.environ.pop(name, None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mambavision-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "0"
# The test processes share the processors.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // processes)))

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


# The repository's modules, importable as `repository.NAME` (their relative imports need a package).
repository = types.ModuleType("repository")
repository.__path__ = [str(ROOT)]
sys.modules["repository"] = repository

from processes import run_forked  # noqa: E402
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig  # noqa: E402
from weights import filled  # noqa: E402


MODEL_FILES = [
    "configuration_mambavision.py",
    "fusion_mambavision.py",
    "fusion_triton.py",
    "modeling_mambavision.py",
    "operators.py",
    "selective_scan.py",
    "selective_scan_triton.py",
    "winograd.py",
]
SHAPES = json.loads((FIXTURES / "state_dict_shapes.json").read_text())

# A model of 0.3 M parameters with all there is in it: both mixers, layer scale, padded windows, several windows.
SMALL = dict(
    dim=16,
    in_dim=8,
    depths=[1, 1, 3, 2],
    num_heads=[1, 1, 2, 4],
    window_size=[8, 8, 4, 3],
    resolution=64,
    layer_scale=0.5,
    num_labels=5,
)


def pytest_sessionfinish(session, exitstatus):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def copy_code(folder: Path) -> Path:
    """The model's code alone, as a user's folder that is yet to get a configuration and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def published_style_folder(folder: Path, variant: str, seed: int = 0) -> Path:
    """A folder as NVIDIA's repositories are: their kind of config.json and weights under `model.`, with our code."""
    copy_code(folder)
    settings = VARIANTS[variant]
    config = {
        "architectures": ["MambaVision"],
        "auto_map": {
            "AutoConfig": "configuration_mambavision.MambaVisionConfig",
            "AutoModel": "modeling_mambavision.MambaVisionModel",
            "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
        },
        "model_type": "mambavision",
        "torch_dtype": "float32",
        "transformers_version": "4.34.1",
        "mlp_ratio": 4,
        "window_size": [8, 8, 14, 7],
        "resolution": 224,
        "crop_mode": "center",
        "crop_pct": 1.0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"model.{name}": tensor for name, tensor in filled(SHAPES[variant], seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def skip_where_tritons_interpreter_is_broken() -> None:
    """Triton issue 9171: the interpreter of its releases up to 3.6 does not run under NumPy 2.4 and later."""
    import numpy

    triton = pytest.importorskip("triton", reason="torch comes without triton on this platform")
    numpy_version, triton_version = (tuple(map(int, x.__version__.split(".")[:2])) for x in (numpy, triton))
    if numpy_version >= (2, 4) and triton_version <= (3, 6):
        pytest.skip(f"triton {triton.__version__}'s interpreter does not run under numpy {numpy.__version__}")


def run_python(code: str, *arguments, overlay: Path | None = None, check: bool = True, **environment):
    """Run `code` in a new process: with `overlay`, packages before the installed ones; with an environment of its own,
    in a new interpreter."""
    if environment:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        variables = {**os.environ, "PYTHONPATH": str(overlay or ""), **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    else:
        done = run_forked(code, *arguments, overlay=overlay)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def install(name: str, *requirements: str) -> Path:
    """The packages, in a folder of their own: what the tests compare with and no user needs."""
    target = CACHE / name
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):  # the tests run in several processes
        complete, python = target / "complete", sys.implementation.cache_tag  # whose compiled modules these are
        if not complete.exists() or complete.read_text() != python:
            shutil.rmtree(target, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", target, *requirements]
            subprocess.run(command, check=True, timeout=600)
            complete.write_text(python)
    return target


@pytest.fixture(autouse=True)
def same_random_numbers():
    """In every run, whichever tests ran before in the same process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published():
    """The published package's module (installed without its dependencies, which need a CUDA compiler)."""
    from published import import_published

    return import_published(install("mambavision-1.2.0", "--no-deps", "mambavision==1.2.0"))


@pytest.fixture(scope="session", params=["4.50.0", "4.57.6", "5.4.0"])
def older_transformers(request) -> Path:
    """A folder with an older transformers and its dependencies; for `run_python(..., overlay=...)`."""
    return install(f"transformers-{request.param}", f"transformers=={request.param}")


@pytest.fixture
def small_config() -> MambaVisionConfig:
    return MambaVisionConfig(**SMALL)


@pytest.fixture
def classifier(small_config):
    """A small model with filled weights."""
    from repository.modeling_mambavision import MambaVisionModelForImageClassification

    torch.manual_seed(0)
    model = MambaVisionModelForImageClassification(small_config)
    model.load_state_dict(filled({name: t.shape for name, t in model.state_dict().items()}))
    return model.eval()


@pytest.fixture
def small_folder(classifier, tmp_path) -> Path:
    """A small model with filled weights, saved by transformers, in a folder that holds nothing else."""
    classifier.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def norms_of_maps(profile: torch.profiler.profile) -> int:
    """How many BatchNorms were computed of maps: with a convolution's weights, into which they are folded, is no map.

    The profile must have recorded shapes.
    """
    norms = [event for event in profile.events() if event.name == "aten::native_batch_norm"]
    return sum(len(event.input_shapes[0]) == 4 for event in norms)
