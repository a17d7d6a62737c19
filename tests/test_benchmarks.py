"""The benchmark programs: that they run, how they time, what they reject, and what becomes of their results."""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ElementTree
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, install
from published import sequential_scan
from repository.configuration_mambavision import VARIANTS, MambaVisionConfig
from repository.modeling_mambavision import MambaVision
from repository.selective_scan import selective_scan_reference


BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import cuda_scan  # noqa: E402
import scan  # noqa: E402
import table  # noqa: E402
import throughput  # noqa: E402


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


def program(name, *arguments):
    """Runs the program as a user does; what it printed."""
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a program in this process; gives the line with which it ended, "" where all went well."""
    monkeypatch.setattr(common, "quiet", lambda: None)
    monkeypatch.setenv("HF_MODULES_CACHE", "")

    def call(module, *arguments):
        with pytest.raises(SystemExit) as stopped:
            common.run(partial(module.main, [str(x) for x in arguments]))
        code = stopped.value.code
        return capsys.readouterr().err if isinstance(code, int) else code

    return call


def results_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def assert_is_a_spread(value):
    assert 0 < value["min"] <= value["median"] <= value["max"] < math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def test_rounds_interleave_the_contenders():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ABC"}
    times, rounds = common.run_rounds(calls, "cpu", rounds=4, seconds=0, max_other_cpu=100)
    assert "".join(turns).endswith("ABC" * 4)
    assert {name: len(values) for name, values in times.items()} == {"A": 4, "B": 4, "C": 4}
    assert (rounds["accepted"], rounds["rejected"]) == (4, 0)


def test_a_turn_is_as_long_as_asked_for(monkeypatch):
    """By a clock on which each call takes a millisecond."""
    count = 0

    def call():
        nonlocal count
        count += 1

    monkeypatch.setattr(common, "_clock", lambda device: count / 1000)
    times, _ = common.run_rounds({"A": call}, "cpu", rounds=3, seconds=0.05, max_other_cpu=100)
    assert count == 3 * 50 + 2, "three turns, and two calls to warm up"
    assert times["A"] == pytest.approx([0.001] * 3), "seconds for each call, not for each turn"


@pytest.mark.parametrize(
    ("own", "used", "share"), [(2.0, 2.0, 0.0), (1.5, 2.0, 0.25), (0.0, 2.0, 1.0), (2.1, 2.0, 0.0), (0.5, 0.5, 0.0)]
)
def test_share_of_the_cpu_that_others_used(own, used, share):
    """Of 2 s of CPU time between the readings, `used` by all processes and `own` by this one."""
    before = (100.0, 40.0, 7.0)
    after = (102.0, 40.0 + used, 7.0 + own)
    assert common.share_of_others(before, after) == pytest.approx(share)


def test_no_reading_rejects_nothing():
    assert common.share_of_others(None, None) is None
    assert not common.is_rejected(None, 0)


def test_a_round_is_rejected_where_others_used_more_than_the_limit():
    assert common.is_rejected(0.06, 5)
    assert not common.is_rejected(0.05, 5)
    assert not common.is_rejected(1.0, 100)


@pytest.mark.parametrize("busy_rounds", [{1, 2}, set(range(100))])
def test_rejected_rounds_are_counted_and_tried_again(busy_rounds):
    """Others keep the CPU busy in the rounds given, of which each takes two readings."""

    def readings():
        total = used = 0.0
        for index in itertools.count():
            yield total, used, 0.0
            total, used = total + 1, used + 0.5 * (index in busy_rounds)
            yield total, used, 0.0

    read_cpu = partial(next, readings())
    calls = {"A": lambda: None}
    times, rounds = common.run_rounds(calls, "cpu", 3, 0, max_other_cpu=5, read_cpu=read_cpu)
    if len(busy_rounds) == 2:
        assert (rounds["accepted"], rounds["rejected"], len(times["A"])) == (3, 2, 3)
        assert rounds["other_cpu_percent"] == [0, 50, 50, 0, 0]
    else:
        assert (rounds["accepted"], rounds["rejected"], times["A"]) == (0, 9, [])
        group = {"contenders": {"ours fp32": {}}, "rounds": rounds}
        assert "rejected" in common.problems(group, ("ours",))[0]


def test_times_of_another_scan_than_tritons_on_a_gpu_are_no_result():
    group = {"contenders": {"ours bf16": {"scan": "torch"}, "ours-fused bf16": {"scan": "triton"}, "resnet50 bf16": {}}}
    assert throughput.slow_scans(group, "cpu") == []
    assert throughput.slow_scans(group, "cuda") == [
        "ours bf16 scanned in plain torch: Triton's kernels do not run here"
    ]


@linux
def test_another_process_shows_in_the_share_and_ones_own_work_does_not():
    before, start = common.cpu_times(), time.process_time()
    while time.process_time() < start + 0.3:
        pass
    after = common.cpu_times()
    assert after[2] - before[2] == pytest.approx(0.3, abs=0.05)
    assert after[1] - before[1] > 0.2, "used by all, and so by this process"
    spin = "import time\nend = time.monotonic() + 8\nwhile time.monotonic() < end: pass"
    allowed = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(allowed)]
    try:
        time.sleep(0.5)
        before = common.cpu_times()
        time.sleep(1)
        busy = common.share_of_others(before, common.cpu_times())
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert busy > 0.8 * allowed / os.cpu_count()


def test_ratios_are_formed_within_the_rounds():
    """A machine that slows down by ten in the middle of the run does not change what is measured."""
    ours, theirs = [1.0, 10.0, 10.0], [2.0, 20.0, 2.0]
    assert common.ratios(theirs, ours)["median"] == 2.0
    assert statistics.median(theirs) / statistics.median(ours) != 2.0


@linux
@pytest.mark.parametrize("megabytes", [30, 100])
def test_peak_memory_of_a_call(megabytes):
    def call():
        kept = torch.ones(megabytes * 125_000)  # half of it for good, half for the product
        return (kept * 2).sum()

    call()
    assert common.peak_memory(call, "cpu") == pytest.approx(megabytes * 1e6, abs=5e6)


def test_openmp_waits_the_same_for_all_contenders():
    """The setting is there before torch, and with it OpenMP, is imported."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
__import__(sys.argv[2])
"""
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for name in ("scan", "throughput", "cuda_scan"):
        command = [sys.executable, "-c", code, str(BENCHMARKS), name]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert done.stdout == "20000\n", (name, done.stderr[-1000:])


# ---------------------------------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------------------------------


def test_scan_program(tmp_path):
    printed = program("scan.py", "--quick", "--device", "cpu", "--results", tmp_path)
    content = results_in(tmp_path)
    assert content["machine"]["cores"] >= 1
    (run,) = content["runs"]
    assert run["program"] == "scan" and run["versions"]["torch"] == torch.__version__
    assert [(group["mode"], group["length"]) for group in run["groups"]] == [
        ("forward", 7), ("forward", 49), ("training", 7), ("training", 49)]  # fmt: skip
    for group in run["groups"]:
        assert group["rounds"]["accepted"] == 2
        expected = {"loop", "torch"} | ({"autograd"} if group["mode"] == "training" else set())
        assert set(group["contenders"]) == expected
        for name, entry in group["contenders"].items():
            assert entry["difference"] < 1e-5, "all compute the same"
            for key in ("ms", "gb_per_s", "percent_of_copy"):
                assert_is_a_spread(entry[key])
            assert f"\n{name} " in printed
        against = {(x["contender"], x["against"]) for x in group["speedups"]}
        assert ("torch", "loop") in against and (("torch", "autograd") in against) == (group["mode"] == "training")


def test_throughput_program(tmp_path):
    published = install("mambavision-1.2.0", "--no-deps", "mambavision==1.2.0")
    printed = program("throughput.py", "--quick", "--device", "cpu", "--results", tmp_path, "--published", published)
    (run,) = results_in(tmp_path)["runs"]
    assert run["program"] == "throughput" and run["settings"]["quick"]
    assert run["versions"]["mambavision"] == "1.2.0" and run["versions"]["timm"]
    inference, training, resolution = run["groups"]

    assert list(inference["peak_tflops"]) == ["float32", "bfloat16"]
    with torch.device("meta"):  # T with the quick settings' one block of each kind
        small = MambaVision(MambaVisionConfig(**{**VARIANTS["MambaVision-T-1K"], "depths": [1, 1, 2, 2]}), 1000)
    expected_mb = 4 * sum(parameter.numel() for parameter in small.parameters()) / 1e6
    names = ["ours", "ours-fused", "published", "resnet50"]
    assert list(inference["contenders"]) == [f"{name} {x}" for x in ("fp32", "bf16") for name in names]
    for label, entry in inference["contenders"].items():
        for key in ("ms", "images_per_s", "percent_of_peak"):
            assert_is_a_spread(entry[key])
        weights_mb = 102.4 if "resnet" in label else expected_mb
        assert entry["weights_mb"] == pytest.approx(weights_mb / (1 + ("bf16" in label)), 0.01)
        if label.startswith("ours"):
            assert entry["difference"] < (1e-3 if "fp32" in label else 0.3), "the published model's function"
    pairs = {(x["contender"], x["against"]) for x in inference["speedups"]}
    assert {("ours fp32", "published fp32"), ("ours-fused bf16", "published fp32")} <= pairs
    assert ("ours bf16", "published bf16") in pairs

    assert list(training["contenders"]) == ["ours fp32", "published fp32", "resnet50 fp32"]
    for entry in training["contenders"].values():
        assert_is_a_spread(entry["images_per_s"])

    assert list(resolution["contenders"]) == ["ours 32", "ours 64"]
    assert resolution["contenders"]["ours 32"]["over_linear"]["median"] == 1
    assert_is_a_spread(resolution["contenders"]["ours 64"]["over_linear"])
    assert "x published fp32" in printed


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (scan, ["--lengths", "0"], "positive"),
        (throughput, ["--variants", "X"], "T2-1K"),
        (throughput, ["--quick", "--published", "/nowhere"], "pip install"),
        (table, ["/nowhere.json"], "nowhere.json"),
        (cuda_scan, ["/nowhere"], "source distribution"),
    ],
)
def test_errors_are_one_line(module, arguments, message, call):
    error = call(module, *arguments)
    assert error.startswith("error: ") and "\n" not in error.strip() and message in error


def test_the_device_that_is_not_there(monkeypatch, call):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU here" in call(scan, "--device", "cuda")


def test_what_does_not_run_is_a_result(tmp_path, call):
    """A missing contender is recorded with the reason; one of ours that is missing ends the program with an error."""
    arguments = ["--quick", "--device", "cpu", "--modes", "forward", "--lengths", 7]
    command = [*arguments, "--results", tmp_path, "--contenders"]
    assert call(scan, *command, "torch", "mamba_ssm-native") == ""
    error = call(scan, *command, "loop", "torch-graph")
    first, second = (run["groups"][0]["contenders"] for run in results_in(tmp_path)["runs"])
    assert "CUDA scan is not installed" in first["mamba_ssm-native"]["did_not_run"] and "ms" in first["torch"]
    assert second["torch-graph"]["did_not_run"] and "ms" in second["loop"]
    assert error.startswith("error: torch-graph did not run: ")


def test_a_results_file_keeps_earlier_runs_and_no_broken_file_is_overwritten(tmp_path):
    for _ in range(2):
        results = common.Results(tmp_path, "scan", "cpu", {})
        results.add({"mode": "forward"})
    assert [run["groups"] for run in results_in(tmp_path)["runs"]] == [[{"mode": "forward"}]] * 2
    assert re.fullmatch(r"[a-z0-9-]+-\d{4}-\d{2}-\d{2}\.json", results.path.name)
    results.path.write_text("{")
    with pytest.raises(ValueError, match="not a results file"):
        common.Results(tmp_path, "scan", "cpu", {})


# ---------------------------------------------------------------------------------------------------------------------
# The contenders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 10, 33])
def test_scan_contenders_have_the_reference_outputs_and_gradients(length, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", 2 * 12 * 8 * 4)  # several blocks
    inputs = scan.make_inputs(2, length, 12, torch.float32, "cpu")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = selective_scan_reference(*exact)
    expected = [y, *torch.autograd.grad(y, exact, torch.ones_like(y))]
    for name in ("loop", "autograd", "torch"):
        function = scan.contender(name)
        own = scan.layout(inputs, name)
        values = [scan.output(function, own, name), *scan.training(function, own)]
        for value, reference in zip(values, expected, strict=True):
            if value.shape != reference.shape:
                value = value.transpose(1, 2)
            error = (value - reference).abs().max() / reference.abs().max().clamp(min=1e-3)
            assert error < 1e-5, name


def test_compiled_contenders_are_known_by_their_suffix(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: modes.append(mode) or model)
    models = SimpleNamespace(built={}, _build=lambda name, dtype: name)
    models.get = partial(throughput.Models.get, models)
    for name in ("ours-fused", "ours-fused-compiled", "ours-fused-graphs"):
        assert throughput.eager_name(name) == "ours-fused"
        assert models.get(name, "bf16", training=False) == "ours-fused"
    assert modes == ["default", "reduce-overhead"]


def test_the_commit_tells_of_changes_but_not_of_new_results(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("COMMIT", "of a copy")
    assert common.commit() == "of a copy"
    monkeypatch.delenv("COMMIT")
    assert common.commit() is None
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    files = [tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "machine.json"]
    for file in files:
        file.write_text("1")
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = common.commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    files[1].write_text("2")
    assert common.commit() == clean
    files[0].write_text("2")
    assert common.commit() == f"{clean}-dirty"


def test_bytes_that_a_scan_must_move():
    inputs = scan.make_inputs(2, 10, 12, torch.bfloat16, "cpu")
    tokens, weights = 2 * (2 * 2 * 10 * 12 + 2 * 2 * 10 * 8), 4 * (12 * 8 + 12 + 12)
    y = 2 * 2 * 10 * 12
    assert scan.bytes_moved(inputs, "forward") == tokens + weights + y
    assert scan.bytes_moved(inputs, "training") == 3 * (tokens + weights) + 2 * y


def test_operations_of_a_model_are_those_published(tmp_path):
    """4.4 billion multiply-adds for T at 224 pixels, without the products inside attention, and 4.1 for ResNet-50."""
    args = SimpleNamespace(device="cpu", image_size=None, quick=False)
    models = throughput.Models("T-1K", args, tmp_path, None, "not installed")
    assert models.flops_per_image("published", 224) / 2e9 == pytest.approx(4.4, rel=0.05)
    assert models.flops_per_image("resnet50", 224) / 2e9 == pytest.approx(4.1, abs=0.05)
    with pytest.raises(ImportError, match="not installed"):
        models.get("published", "fp32", training=False)


def test_the_stand_in_of_mamba_ssm_gives_the_extension_what_it_takes(monkeypatch):
    """The extension's place is taken by the loop, which checks the shapes that the CUDA code would check."""

    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        batch, channels, length = u.shape
        states = A.shape[1]
        assert B.shape == C.shape == (batch, 1, states, length) and z is None
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C))
        y = sequential_scan(u, delta, A, B[:, 0], C[:, 0], D, None, delta_bias, delta_softplus)
        return y, torch.zeros(batch, channels, 1, 2 * states)

    def bwd(u, delta, A, B, C, D, z, delta_bias, grad, states, out, dz, delta_softplus, recompute):
        assert z is out is dz is None and recompute is False and states.ndim == 4 and grad.stride(-1) == 1
        inputs = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, delta_bias)]
        with torch.enable_grad():
            u, delta, A, B, C, D, delta_bias = inputs
            y = sequential_scan(u, delta, A, B[:, 0], C[:, 0], D, None, delta_bias, delta_softplus)
        return torch.autograd.grad(y, inputs, grad)

    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.SimpleNamespace(fwd=fwd, bwd=bwd))
    interface = {}
    exec(cuda_scan.INTERFACE, interface)
    inputs = scan.layout(scan.make_inputs(2, 5, 6, torch.float32, "cpu"), "mamba_ssm-native")
    values = []
    for function in (interface["selective_scan_fn"], sequential_scan):
        u, delta, A, B, C, D, bias = inputs
        y = function(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        values.append([y, *torch.autograd.grad(y, inputs, torch.arange(5.0).expand_as(y))])
    torch.testing.assert_close(*values)


def test_the_published_package_leaves_no_stand_in_behind():
    """A fake mamba_ssm that stayed importable would pass for an installed one."""
    folder = install("mambavision-1.2.0", "--no-deps", "mambavision==1.2.0")
    before = {name for name in sys.modules if name.split(".")[0] == "mamba_ssm"}
    module, scans_with = common.published_package(folder, "cpu")
    assert scans_with == "loop" and module.MambaVision
    assert {name for name in sys.modules if name.split(".")[0] == "mamba_ssm"} == before


def test_on_a_gpu_the_published_package_scans_with_mamba_ssm(monkeypatch):
    folder = install("mambavision-1.2.0", "--no-deps", "mambavision==1.2.0")
    module, _ = common.published_package(folder, "cpu")
    monkeypatch.setattr(module, "selective_scan_fn", module.selective_scan_fn)  # and back again after the test
    installed = types.SimpleNamespace(selective_scan_fn=object())
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", installed)
    module, scans_with = common.published_package(folder, "cuda")
    assert scans_with == "mamba_ssm" and module.selective_scan_fn is installed.selective_scan_fn
    assert sys.modules["mamba_ssm.ops.selective_scan_interface"] is installed


# ---------------------------------------------------------------------------------------------------------------------
# The README's tables and the plot
# ---------------------------------------------------------------------------------------------------------------------


def spread(median):
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median}


def example_results():
    rounds = {"accepted": 7, "rejected": 2, "rejected_if": "busy", "other_cpu_percent": [0.0]}

    def entry(speed, **more):
        return {"ms": spread(8e3 / speed), "images_per_s": spread(speed), "percent_of_peak": spread(70.0), **more}

    memory = {"weights_mb": 1000.0, "call_mb": 500.0}
    inference = {
        "mode": "inference", "variant": "T-1K", "image_size": 224, "batch": 8, "rounds": rounds,
        "contenders": {
            "ours fp32": entry(12.5, **memory),
            "ours-fused fp32": entry(15.5, **memory),
            "published fp32": entry(10.0, **memory),
            "published bf16": {"did_not_run": "no such kernel"},
            "convnext_tiny fp32": entry(9.5, **memory),
        },
        "speedups": [{"contender": "ours fp32", "against": "published fp32", "speedup": spread(1.25)}],
    }  # fmt: skip
    training = {
        "mode": "training", "variant": "T-1K", "image_size": 224, "batch": 8, "rounds": rounds,
        "contenders": {"ours fp32": entry(3.21, **memory)}, "speedups": [],
    }  # fmt: skip
    resolution = {
        "mode": "resolution", "variant": "T-1K", "precision": "fp32", "batch": 1, "rounds": rounds,
        "contenders": {"ours 896": entry(0.77, over_linear=spread(1.11))},
    }  # fmt: skip
    forward = {
        "mode": "forward", "precision": "fp32", "variant": "T", "length": 196, "channels": 160, "batch": 8,
        "rounds": rounds,
        "contenders": {"torch": {"ms": spread(4.44), "memory_mb": 5.55},
                       "loop": {"ms": spread(22.2), "memory_mb": 1.0}},
        "speedups": [{"contender": "torch", "against": "loop", "speedup": spread(5.01)}],
    }  # fmt: skip
    old = {**inference, "contenders": {name: entry(99.9, **memory) if "ours" in name else value
                                       for name, value in inference["contenders"].items()}}  # fmt: skip

    def run(program, groups, quick=False):
        return {
            "program": program, "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "groups": groups,
            "versions": {"torch": "2.15.0"}, "settings": {"quick": quick},
        }  # fmt: skip

    return {
        "machine": {"name": "Example, 2 cores"},
        "runs": [
            run("throughput", [old]),
            run("throughput", [inference, training, resolution]),
            run("scan", [forward]),
            run("throughput", [old], quick=True),
        ],
    }


@pytest.fixture
def example(tmp_path):
    (tmp_path / "example-2026-01-02.json").write_text(json.dumps(example_results()))
    for name in ("README.md", "report.md"):
        (tmp_path / name).write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    return tmp_path


@pytest.fixture
def make_table(example, call):
    """Runs table.py on the example; the error it ended with."""
    arguments = [*example.glob("*.json"), "--readme", example / "README.md", "--report", example / "report.md",
                 "--plot", example / "plot.svg"]  # fmt: skip
    return partial(call, table, *arguments)


def cell(text, row, column):
    """Of the first markdown table that has both."""
    for block in text.split("\n\n"):
        lines = [[x.strip() for x in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"]
        for line in lines:
            if line[0] == row and column in lines[0]:
                return line[lines[0].index(column)]
    raise AssertionError(f"no cell {row}, {column} in\n{text}")


def test_results_become_tables(example, make_table):
    assert not make_table()
    readme, report = ((example / name).read_text() for name in ("README.md", "report.md"))
    for text in (readme, report):
        assert text.startswith(f"before\n\n{table.BEGIN}\n") and text.endswith(f"\n{table.END}\n\nafter\n")
        assert "old" not in text and "99.9" not in text, "neither what stood there, nor earlier groups, nor quick runs"
        assert cell(text, "ours, T-1K", "fp32, batch 8") == "12.5 (70 %) ×1.25"
        assert cell(text, "ours-fused, T-1K", "fp32, batch 8") == "15.5 (70 %)"
        assert cell(text, "published, T-1K", "bf16, batch 8") == "did not run"
        assert cell(text, "convnext_tiny", "fp32, batch 8") == "9.50 (70 %)"
        assert "3.21, 1.50 GB" in text
    assert "On Example, 2 cores:" in readme and "](plot.svg)" in readme and "8 × 196 × 160" not in readme
    assert "## Example, 2 cores\n\n2026-01-02, commit `0123456`; torch 2.15.0" in report
    assert "28 in all, 8 rejected" in report
    assert cell(report, "T-1K, fp32, batch 1", "896 px") == "0.77 (1.11)"
    assert cell(report, "torch", "8 × 196 × 160 fp32") == "4.44 ms, 5.55 MB ×5.01"
    assert not make_table("--check")
    assert not make_table()
    assert [(example / name).read_text() for name in ("README.md", "report.md")] == [readme, report]


def test_the_readme_shows_the_machines_that_were_measured_last(example, make_table):
    for name, day, gpu in (("Old, 2 cores", "01", {}), ("Some GPU", "01", {"gpu": "Some GPU"}), ("New", "03", {})):
        content = example_results()
        content["machine"] = {"name": name, **gpu}
        for run in content["runs"]:
            run["date"] = f"2026-01-{day}T03:04:05+00:00"
        (example / f"{name[:3].lower()}-2026-01-{day}.json").write_text(json.dumps(content))
    assert not table.main([*map(str, example.glob("*.json")), "--readme", str(example / "README.md"),
                           "--report", str(example / "report.md"), "--plot", str(example / "plot.svg")])  # fmt: skip
    machines = re.findall(r"^On (.*):$", (example / "README.md").read_text(), re.MULTILINE)
    assert sorted(machines) == ["New", "Some GPU"]
    machines = re.findall(r"^## (.*)$", (example / "report.md").read_text(), re.MULTILINE)
    assert sorted(machines) == ["Example, 2 cores", "New", "Old, 2 cores", "Some GPU"]


@pytest.mark.parametrize(
    ("machine", "precision", "factor"),
    [({}, "bf16", "×4.00"), ({}, "autocast-bf16", "×2.00"), ({"gpu": "Some GPU"}, "bf16", "×2.00")],
)
def test_what_the_factors_are_against(example, make_table, machine, precision, factor):
    content = example_results()
    (group,) = content["runs"][1]["groups"][:1]
    label, same = f"ours {precision}", f"published {precision}"
    group["contenders"][label] = group["contenders"]["ours fp32"]
    for against, speedup in (("published fp32", 4.0), (same, 2.0)):
        group["speedups"].append({"contender": label, "against": against, "speedup": spread(speedup)})
    content["machine"] |= machine
    next(example.glob("*.json")).write_text(json.dumps(content))
    assert not make_table()
    text = (example / "README.md").read_text()
    assert cell(text, "ours, T-1K", f"{precision}, batch 8").endswith(factor)


def test_the_plot_shows_each_model_at_its_fastest(example, make_table):
    assert not make_table()
    first = (example / "plot.svg").read_text()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "T-1K (fp32)" in first and "convnext_tiny (fp32)" in first and "as published" in first
    assert not make_table()
    assert (example / "plot.svg").read_text() == first, "the same results give the same file"
    ours, theirs, peer = table.points(table.load(next(example.glob("*.json"))))
    assert (ours["speed"], ours["top1"]) == (15.5, 82.3)
    assert (theirs["speed"], theirs["top1"]) == (10.0, 82.3)
    assert (peer["speed"], peer["top1"]) == (9.5, 82.1)


def test_check_finds_a_readme_that_is_out_of_date(example, make_table):
    assert make_table("--check").startswith("error: the tables of ")
    assert "\nold\n" in (example / "README.md").read_text() and not (example / "plot.svg").exists()


def test_a_readme_without_marks_is_left_alone(example, make_table):
    (example / "README.md").write_text("no marks\n")
    assert table.BEGIN in make_table()
    assert (example / "README.md").read_text() == "no marks\n"


def test_quick_runs_alone_are_no_results(example, make_table):
    content = example_results()
    content["runs"] = content["runs"][-1:]
    next(example.glob("*.json")).write_text(json.dumps(content))
    assert "quick" in make_table()


def test_the_newest_file_of_each_machine_counts(tmp_path):
    for name in ("a-2026-01-02", "a-2025-12-31", "b-1-2025-01-01", "notes"):
        (tmp_path / f"{name}.json").touch()
    assert [path.stem for path in table.newest(tmp_path)] == ["a-2026-01-02", "b-1-2025-01-01"]


# ---------------------------------------------------------------------------------------------------------------------
# The GPU programme
# ---------------------------------------------------------------------------------------------------------------------

GPU = BENCHMARKS / "gpu.sh"
STEPS = ["gpu-tests", "mamba_ssm-tests", "scan", "models", "compiled", "fused-compiled", "training", "sizes"]


def gpu_programme(folder, python, **environment):
    """Runs gpu.sh with a shell script in the place of Python."""
    stub = folder / "python"
    stub.write_text(f"#!/bin/sh\n{python}\n")
    stub.chmod(0o755)
    (folder / "mamba_ssm").mkdir(exist_ok=True)
    places = {"PYTHON": str(stub), "MAMBA_SSM_SRC": str(folder / "mamba_ssm"), "MAMBA_SSM": str(folder / "built")}
    variables = {**os.environ, **places, **environment}
    command = ["bash", GPU, folder / "out"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_the_gpu_programme_stops_where_there_is_no_gpu(tmp_path):
    done = gpu_programme(tmp_path, "exit 1")
    assert done.returncode == 1 and done.stderr == "error: torch finds no GPU here\n"


def test_the_gpu_programme_goes_on_after_a_failing_step(tmp_path):
    """The tests fail, and so does throughput.py; the log keeps what each step wrote."""
    python = 'echo "$@" >> "$0.calls"; echo "output of $2"; case "$*" in *"-m pytest"*|*throughput*) exit 3;; esac'
    done = gpu_programme(tmp_path, python, PUBLISHED=str(tmp_path))
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert re.findall(r"^== (\S+), at most", log, re.MULTILINE) == STEPS
    assert done.returncode == 7, "as many as failed: all but the build and the scan"
    assert "gpu-tests (3)" in done.stderr and "scan (0)" not in done.stderr
    calls = (tmp_path / "python.calls").read_text()
    assert calls.index("cuda_scan.py") < calls.index("scan.py --device") < calls.index("--published")
    assert f"--results {tmp_path / 'out'}" in calls and f"--published {tmp_path}" in calls
    assert "output of" in (tmp_path / "out" / "build.log").read_text()


def test_the_gpu_programme_leaves_mamba_ssm_out_where_it_does_not_build(tmp_path):
    done = gpu_programme(tmp_path, 'case "$*" in *cuda_scan*) echo wrong compiler; exit 1;; esac')
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert re.findall(r"^== (\S+), at most", log, re.MULTILINE) == [x for x in STEPS if x != "mamba_ssm-tests"]
    assert done.returncode == 1 and "wrong compiler" in log


def test_the_gpu_programme_takes_a_scan_that_is_built(tmp_path):
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "selective_scan_cuda.so").touch()
    done = gpu_programme(tmp_path, 'echo "$@" >> "$0.calls"')
    assert done.returncode == 0 and "cuda_scan.py" not in (tmp_path / "python.calls").read_text()


def test_the_gpu_programme_keeps_to_its_time(tmp_path):
    text = GPU.read_text()
    seconds = {name: int(value) for name, value in re.findall(r"^(\w+)=(?:\$\{TOTAL:-)?(\d+)", text, re.MULTILINE)}
    before = max(seconds["build"], seconds["warming"], seconds["gpu_tests"])
    steps = sum(seconds[name.replace("-", "_")] for name in STEPS[1:])
    assert before + steps <= seconds["total"] <= 540 - 10
    done = gpu_programme(tmp_path, "", TOTAL="0")
    assert done.returncode == len(STEPS) and done.stdout.count("no time left") == len(STEPS)


def test_the_gpu_programme_s_calls_are_understood(tmp_path, monkeypatch):
    """Every option that it passes to the programs is one they take."""
    monkeypatch.setattr(common, "prepare", lambda args: None)
    python = 'echo "$@" >> "$0.calls"'
    gpu_programme(tmp_path, python, PUBLISHED=str(tmp_path))
    calls = [line.split() for line in (tmp_path / "python.calls").read_text().splitlines()]
    parsed = []

    def stop(self, arguments=None, namespace=None):
        parsed.append(original(self, arguments, namespace))
        raise KeyboardInterrupt

    original = common.Parser.parse_args
    monkeypatch.setattr(common.Parser, "parse_args", stop)
    for module in (scan, throughput, cuda_scan):
        for call in calls:
            if call[0] == f"benchmarks/{module.__name__}.py":
                with pytest.raises(KeyboardInterrupt):
                    module.main(call[1:])
    assert len(parsed) == 7 + 5  # five compile ahead
