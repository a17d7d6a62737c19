"""The README: its code runs, its commands exist, its figures are those of the files that they are said to come from."""

import hashlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, published_style_folder, run_python
from huggingface_hub import ModelCard
from processes import run_forked
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.selective_scan import backend_on


TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
RESULTS = json.loads((ROOT / "examples" / "recipes" / "fashion-mnist.results.json").read_text())
PUBLISHED = json.loads((FIXTURES / "variants.json").read_text())


def table(heading: str) -> list[list[str]]:
    """The cells of the first table whose header row starts with `heading`, without header and rule."""
    lines = TEXT[TEXT.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]


def test_metadata_is_a_model_cards():
    data = ModelCard(TEXT, ignore_metadata_errors=False).data
    assert data.library_name == "transformers" and data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["zalando-datasets/fashion_mnist"] and "mambavision" in data.tags
    assert len(data.widget) >= 3
    for example in data.widget:
        assert example.keys() == {"src", "example_title"} and (ROOT / example["src"]).is_file()
    (result,) = data.eval_results
    assert result.task_type == data.pipeline_tag and result.dataset_type == data.datasets[0]
    assert result.metric_type == "accuracy" and result.metric_value == RESULTS["accuracy"]
    # what a parser other than huggingface_hub's may stumble over
    assert TEXT.startswith("---\n") and not re.search(r"\t| \n|\r", TEXT)


def test_measured_figures_are_those_of_the_results_file():
    weights = RESULTS["weights"]["files"]["model.safetensors"]
    content = (ROOT / "model.safetensors").read_bytes()
    assert weights["sha256"] == hashlib.sha256(content).hexdigest(), "measure again: see examples/evaluate.py"
    assert RESULTS["count"] == 10_000 and RESULTS["data"] == "Fashion-MNIST, test images"
    figures = [row[1] for row in table("Measured or tested here")]
    variants = [RESULTS["variants"][name]["accuracy"] for name in ("inverted", "coloured", "inverted and coloured")]
    assert figures[:4] == [
        f"{100 * RESULTS['accuracy']:.2f} %",
        ", ".join(f"{100 * accuracy:.2f}" for accuracy in variants) + " %",
        f"{RESULTS['weights']['parameters'] / 1e6:.2f} M parameters, {len(content) / 1e6:.1f} MB",
        f"{RESULTS['images_per_second']:.0f} images/s",
    ]
    assert RESULTS["device"] in TEXT and f"batch {RESULTS['batch_size']}" in TEXT


def test_benchmark_tables_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_variants_are_the_configurations_and_their_figures_the_published_ones():
    rows = table("Model")
    assert [row[0] for row in rows] == list(VARIANTS) == list(PUBLISHED)
    for name, *cells in rows:
        config, figures = MambaVisionConfig(**VARIANTS[name]), PUBLISHED[name]["published"]
        throughput = figures["a100_images_per_s"]
        assert cells == [
            f"{config.hidden_sizes[0]} to {config.hidden_sizes[3]}",
            str(config.resolution),
            *(str(figures[field]) for field in ("params_m", "gmacs", "top1", "top5")),
            "–" if throughput is None else f"{throughput:,}",
        ]


RUN_BLOCKS = """
import contextlib, io, json, sys
outputs = []
for block in json.load(open(sys.argv[1])):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, block, "exec"), {})
    outputs.append(printed.getvalue())
json.dump(outputs, open(sys.argv[2], "w"))
"""


def run_blocks(blocks: list[str], folder, tmp_path) -> list[str]:
    """What each block prints, run in `folder`."""
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    prefix = f"import os; os.chdir({str(folder)!r})\n"
    run_python(prefix + RUN_BLOCKS, tmp_path / "blocks.json", tmp_path / "outputs.json")
    return json.loads((tmp_path / "outputs.json").read_text())


def test_python_runs_on_this_folder(tmp_path):
    outputs = run_blocks(PYTHON, ROOT, tmp_path)
    first, classification, features, training, head, channels, backbone, fast, export = outputs
    assert first.splitlines()[0].endswith("%  Ankle boot") and len(first.splitlines()) == 5
    assert len(PYTHON[0].strip().splitlines()) <= 5
    assert classification == "Predicted class: Pullover\n"
    config = MambaVisionConfig(**json.loads((ROOT / "config.json").read_text()))
    side = config.resolution
    shapes = [
        (1, channels, -(-side // 2 ** (i + 2)), -(-side // 2 ** (i + 2)))
        for i, channels in enumerate(config.hidden_sizes)
    ]
    assert features.splitlines() == [
        f"Pooled features: (1, {config.hidden_size})",
        *(f"Stage {i + 1}: {shape}" for i, shape in enumerate(shapes)),
    ]
    assert backbone == "(1, 150, 128, 128)\n"
    assert fast == f"{backend_on(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}\n"
    assert training == head == channels == export == ""


def test_python_runs_on_a_converted_model(tmp_path):
    folder = published_style_folder(tmp_path / "MambaVision-T-1K", "MambaVision-T-1K")
    config = MambaVisionConfig.from_variant("MambaVision-T-1K")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "id2label": config.id2label}))
    (folder / "preprocessor_config.json").write_text(json.dumps(config.image_processor_settings()))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = [block for block in PYTHON if '# or "./MambaVision-T-1K"' in block]
    assert len(blocks) == 3
    blocks = [re.sub(r'"\."  # or ("\S+")', r"\1", block) for block in blocks]
    classification, features, backbone = run_blocks(blocks, tmp_path, tmp_path)
    assert classification.removeprefix("Predicted class: ").strip() in config.id2label.values()
    assert features.splitlines() == [
        "Pooled features: (1, 640)",
        "Stage 1: (1, 80, 56, 56)",
        "Stage 2: (1, 160, 28, 28)",
        "Stage 3: (1, 320, 14, 14)",
        "Stage 4: (1, 640, 7, 7)",
    ]
    assert backbone == "(1, 150, 128, 128)\n"


def test_commands_that_set_up_a_machine():
    main, tests = (line for line in COMMANDS if line.startswith("python3 -m venv"))
    for line in (main, tests):
        assert line.split(" && ")[0] == "python3 -m venv .venv"
    # what comes after the installation, which .ci/run does on a fresh machine
    command = main.split(" && ")[-1].replace(".venv/bin/python", shlex.quote(sys.executable))
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    files = sorted(f"examples/images/{file.name}" for file in (ROOT / "examples" / "images").iterdir())
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == files
    assert tests.endswith("&& .venv/bin/python -m pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci and "pytest" in ci


SCRIPTS = sorted({line for line in COMMANDS if re.match(r"\.venv/bin/python \S+\.py( |$)", line)})


@pytest.mark.parametrize("line", SCRIPTS, ids=lambda line: line.split()[1])
def test_commands_name_scripts_options_and_files_that_exist(line):
    _, script, *arguments = shlex.split(line)
    done = run_forked(ROOT / script, "--help")
    assert done.returncode == 0, done.stderr
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in done.stdout, argument
        if argument.startswith("examples/"):
            assert (ROOT / argument).is_file(), argument


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|json|png|jpg))`", TEXT):
        places = (ROOT, ROOT / "examples" / "images")
        elsewhere = ("astronaut.png", "conversion.json")  # in scikit-image, in a converted folder
        assert name in elsewhere or any((place / name).is_file() for place in places), name


def test_licence_is_apaches():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
