"""What the benchmark programs have in common: how they time, which rounds they reject, what they record.

Import this module before torch: it sets how OpenMP's threads wait, for all contenders alike.

Timing. The contenders of a group run one after the other, A B C A B C ..., each for at least a given time a turn. Where
two are compared, the ratio is formed within each round, and the median over the rounds is given: what slows the machine
for a while slows both. A round during which other processes used more than a share of the machine's processors that
is fixed beforehand is thrown away, and counted.
"""

import argparse
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path


# How long OpenMP's threads wait busily for the next operator: about 0.3 ms. By default they do for some 5 ms, which
# multiplies the time of code with many operators as soon as another process runs. If they slept at once, then on a
# virtual machine it would be their waking, 0.1 ms an operator, that is timed.
os.environ["GOMP_SPINCOUNT"] = "20000"
os.environ.pop("OMP_WAIT_POLICY", None)

import torch
import torch.nn.functional as F


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MAX_ROUNDS = 3  # times the rounds asked for: so often are rejected rounds tried again
MEGABYTE = 1e6


# ---------------------------------------------------------------------------------------------------------------------
# The programs' frame
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """A type of command-line arguments: an integer of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def add_common_arguments(parser: Parser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="of a CPU (default: torch's choice)")
    parser.add_argument("--rounds", type=positive, help="accepted rounds for each group")
    parser.add_argument("--seconds", type=float, help="least time of a contender's turn (default: 0.2, on a GPU 0.05)")
    parser.add_argument("--max-other-cpu", type=float, metavar="PERCENT", help="reject a round in which"
                        " other processes used more of all CPU time (default: 5; 100 rejects none)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER",
                        help="where MACHINE-DATE.json is written (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny settings: to see that the program runs, not to time")


def prepare(args) -> None:
    """Settle what the arguments leave open, and torch's settings.

    Raises:
        ValueError: there is no such device.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.seconds is None:
        args.seconds = 0 if args.quick else 0.2 if args.device == "cpu" else 0.05
    if args.max_other_cpu is None:
        args.max_other_cpu = 100 if args.quick else 5
    # so that fp32 is float32 in convolutions as it is in matrix products
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def run(main) -> None:
    """Call `main()` as the program: what a user can get wrong ends it with one line on stderr and exit code 1."""
    try:
        sys.exit(main())
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def quiet() -> None:
    """Keep the libraries' warnings and progress bars off the terminal."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()


def one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, (OSError, ValueError, ImportError)):
        text = f"{type(error).__name__}: {text}"
    return textwrap.shorten(text, 200, placeholder=" ...")


def repository(module: str):
    """A module of this repository: they import each other relatively, so they need a package."""
    name = "mambavision_repository"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT)]
    return importlib.import_module(f"{name}.{module}")


def loop(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What stands in for mamba_ssm's `selective_scan_fn` where there is none: the scan in the form of its reference.

    Decays and inflows of all tokens first, then a loop over the tokens. u, delta (batch, channels, length);
    A (channels, states); B, C (batch, states, length); D, delta_bias (channels,).
    """
    assert delta_softplus and z is None and not return_last_state
    steps = F.softplus(delta.float() + delta_bias.float()[:, None])
    decays = torch.exp(torch.einsum("bdl,dn->bdln", steps, A))
    inflows = torch.einsum("bdl,bnl,bdl->bdln", steps, B.float(), u.float())
    state, outputs = A.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        state = decays[:, :, t] * state + inflows[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t].float()))
    return (torch.stack(outputs, dim=2) + D[:, None] * u).to(u.dtype)


def published_package(folder: Path, device: str):
    """The module `mambavision.models.mamba_vision` in `folder`, and what scans in it.

    On a GPU that is mamba_ssm's CUDA scan (see cuda_scan.py), on a CPU, for which mamba_ssm has nothing, the loop.

    Raises:
        ImportError: on a GPU without mamba_ssm's scan.
    """
    scan = cuda_scan() if device == "cuda" else None
    installed = _mamba_ssm_modules()
    module = _tests_module("published").import_published(folder)
    for name in _mamba_ssm_modules():  # the oracle's stand-ins: what is installed must be found again
        del sys.modules[name]
    sys.modules.update(installed)
    module.selective_scan_fn = scan or loop
    return module, "mamba_ssm" if scan else "loop"


def cuda_scan() -> Callable:
    """mamba_ssm's `selective_scan_fn`, known to have its CUDA extension.

    Raises:
        ImportError: it is not here.
    """
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        hint = "benchmarks/cuda_scan.py builds it from mamba_ssm's sources"
        raise ImportError(f"mamba_ssm's CUDA scan is not installed ({one_line(error)}); {hint}") from error
    return selective_scan_fn


def _mamba_ssm_modules() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mamba_ssm"}


def _tests_module(name: str):
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "tests"))


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def cpu_times() -> tuple[float, float, float] | None:
    """Seconds of CPU time since the machine, or this process, started: all there was, all used, used by this process.

    None where there is no /proc/stat. Time that a hypervisor gave to others counts as used.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(x) / os.sysconf("SC_CLK_TCK") for x in fields)
    used = user + nice + system + irq + softirq + steal
    own = os.times()
    return used + idle + iowait, used, own.user + own.system + own.children_user + own.children_system


def share_of_others(before: tuple | None, after: tuple | None) -> float | None:
    """The part of the machine's CPU time between two readings of `cpu_times` that other processes used."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    total, used, own = (b - a for a, b in zip(before, after, strict=True))
    return min(1.0, max(0.0, used - own) / total)


def is_rejected(share: float | None, max_other_cpu: float) -> bool:
    """The rule: other processes used more than `max_other_cpu` percent. What cannot be known rejects nothing."""
    return share is not None and 100 * share > max_other_cpu


def rejection_rule(max_other_cpu: float) -> str:
    if cpu_times() is None:
        return "none: this system does not tell what other processes use"
    return f"other processes used more than {max_other_cpu:g} % of the machine's CPU time during the round"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable, repeats: int, device: str) -> float:
    """Seconds that one of `repeats` calls takes."""
    synchronize(device)
    start = _clock(device)
    for _ in range(repeats):
        call()
    end = _clock(device)
    synchronize(device)
    return (start.elapsed_time(end) / 1e3 if device == "cuda" else end - start) / repeats


def _clock(device: str):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def repeats_for(call: Callable, seconds: float, device: str) -> int:
    """Warms the call up; how many times it must be called to take that long."""
    for _ in range(3 if device == "cuda" else 1):  # compiles, chooses algorithms, fills caches
        call()
    return max(1, round(seconds / max(timed(call, 1, device), 1e-7)))


def run_rounds(
    calls: dict[str, Callable],
    device: str,
    rounds: int,
    seconds: float,
    max_other_cpu: float,
    title: str = "",
    read_cpu: Callable = cpu_times,
) -> tuple[dict[str, list[float]], dict]:
    """Times each call in `rounds` accepted rounds, or in those accepted of three times as many.

    Returns:
        times: seconds per call, one entry for each accepted round.
        record: the rounds accepted and rejected, and the rule.
    """
    from tqdm import tqdm

    repeats = {name: repeats_for(call, seconds, device) for name, call in calls.items()}
    times, shares, accepted = {name: [] for name in calls}, [], 0
    with tqdm(total=rounds, desc=title, unit="round", disable=None, leave=False) as progress:
        while accepted < rounds and len(shares) < MAX_ROUNDS * rounds:
            before = read_cpu()
            turns = {name: timed(call, repeats[name], device) for name, call in calls.items()}
            shares.append(share_of_others(before, read_cpu()))
            if not is_rejected(shares[-1], max_other_cpu):
                accepted += 1
                progress.update()
                for name, turn in turns.items():
                    times[name].append(turn)
    record = {
        "accepted": accepted,
        "rejected": len(shares) - accepted,
        "rejected_if": rejection_rule(max_other_cpu),
        "other_cpu_percent": [None if share is None else round(100 * share, 1) for share in shares],
    }
    return times, record


def problems(group: dict, own: tuple[str, ...]) -> list[str]:
    """What makes a group worthless: no round counted, or one of our `own` contenders did not run."""
    found = [f"{name} did not run: {entry['did_not_run']}" for name, entry in group["contenders"].items()
             if name.split()[0].startswith(own) and "did_not_run" in entry]  # fmt: skip
    if not group["rounds"]["accepted"]:
        found.append("every round was rejected, for other processes kept the CPU busy; see --max-other-cpu")
    return found


def spread(values) -> dict:
    values = list(values)
    return {name: significant(f(values)) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def ratios(numerators: list[float], denominators: list[float], factor: float = 1.0) -> dict:
    """Median and spread of the ratios formed within each round, times `factor`."""
    return spread(factor * a / b for a, b in zip(numerators, denominators, strict=True))


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable, device: str) -> int | None:
    """Bytes that a call takes at its peak beyond those in use before it; None where they cannot be measured.

    On a GPU as torch's allocator counts, on Linux as the peak of the process's resident memory.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, so that using it again counts
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def memory_method(device: str) -> str:
    if device == "cuda":
        return "peak of torch's CUDA allocator beyond what was allocated before the call"
    if peak_memory(lambda: None, device) is None:
        return "not measured: the peak of the resident memory cannot be reset on this system"
    return "peak of the process's resident memory beyond that before the call"


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE).group(1))


def megabytes(count: int | None) -> float | None:
    return None if count is None else significant(count / MEGABYTE)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


class Results:
    """The results file of a machine and a day: a list of runs, each with its groups, written whole after each group."""

    def __init__(self, folder: Path, program: str, device: str, settings: dict, published: Path | None = None):
        now = datetime.datetime.now(datetime.timezone.utc)
        machine = describe_machine(device)
        self.path = folder / f"{slug(machine['name'])}-{now.date()}.json"
        self.content = {"machine": machine, "runs": []}
        if self.path.exists():
            try:
                self.content["runs"] = json.loads(self.path.read_text())["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is not a results file; move it away") from error
        self.run = {
            "program": program,
            "date": now.isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(published),
            "settings": settings,
            "groups": [],
        }
        self.content["runs"].append(self.run)

    def add(self, group: dict) -> None:
        self.run["groups"].append(group)
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def describe_machine(device: str) -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    cpu = model.group(1).strip() if model else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()  # processors of one name differ in it
    if capability == "AVX512" and "amx_tile" in cpuinfo:
        capability += " and AMX"
    machine = {"cpu": cpu, "cores": cores, "cpu_capability": capability}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {"name": machine.get("gpu") or f"{cpu}, {cores} core{'s' * (cores > 1)}, {capability}", **machine}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions(published: Path | None = None) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    for name in ("triton", "transformers", "timm", "mamba_ssm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for package in importlib.metadata.distributions(name="mambavision", path=[str(published)]) if published else ():
        found["mambavision"] = package.version
    return found


def commit() -> str | None:
    """What $COMMIT says, or the commit that is checked out, with "-dirty" where files other than results differ from
    it; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    if os.environ.get("COMMIT"):  # of a copy of the files, which the checkout around them knows nothing of
        return os.environ["COMMIT"]
    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + "-dirty" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def report(title: str, header: list[str], rows: list[list[str]], group: dict) -> str:
    """A group's table with its title, its rejected rounds, and what did not run."""
    notes = [f"{name} did not run: {entry['did_not_run']}" for name, entry in group["contenders"].items()
             if "did_not_run" in entry]  # fmt: skip
    rounds = "{accepted} rounds, {rejected} rejected".format(**group["rounds"])
    return "\n".join([f"{title}: {rounds}", table(header, rows), *notes])


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns for a terminal; the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        line[0] = line[0].ljust(widths[0])
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def number(value: float | None) -> str:
    """Two or three significant digits, without exponents: what a table needs."""
    if value is None:
        return "-"
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.0995 else 3
    return f"{value:.{decimals}f}"
