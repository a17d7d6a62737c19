#!/usr/bin/env python
"""Turn results files into tables, between two marks in Markdown files, and into a plot of speed against accuracy.

benchmarks/README.md gets all of them; README.md those of whole models, of the CPU and the GPU that were measured last.
Without arguments: of each machine in benchmarks/results the newest file. Where a file holds a group twice, the later
one counts. Runs with --quick count for nothing.
"""

import json
import re
from pathlib import Path

import common
from common import number


BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# Top-1 accuracy on ImageNet-1K, %, as published: arXiv 2201.03545, 2103.14030, 2110.00476. MambaVision's: conversion/.
PEERS_TOP1 = {"convnext_tiny": 82.1, "swin_tiny": 81.3, "resnet50": 80.4}
SERIES = [  # of the plot: kind, label, matplotlib's format
    ("ours", "MambaVision, this repository", "o-g"),
    ("published", "MambaVision, published package", "s-k"),
    ("peer", "timm", "^b"),
]


def main(arguments=None):
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS", help="(default: each machine's newest)")
    parser.add_argument("--readme", type=Path, default=common.ROOT / "README.md", help="(default: README.md)")
    parser.add_argument("--report", type=Path, default=common.ROOT / "benchmarks" / "README.md", help="for all tables"
                        " (default: benchmarks/README.md)")  # fmt: skip
    parser.add_argument("--plot", type=Path, default=common.RESULTS / "throughput.svg", help="SVG file (default:"
                        " benchmarks/results/throughput.svg)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not up to date")
    args = parser.parse_args(arguments)

    paths = args.results or newest(common.RESULTS)
    if not paths:
        raise ValueError(f"{common.RESULTS} holds no results; run scan.py and throughput.py first")
    machines = [load(path) for path in paths]
    texts = {
        path: replace_between_marks(path.read_text(), content, path)
        for path, content in ((args.readme, summary(machines, args.plot, args.readme)), (args.report, report(machines)))
    }
    if args.check:
        old = [str(path) for path, text in texts.items() if path.read_text() != text]
        return f"error: the tables of {old[0]} differ from the results; run benchmarks/table.py" if old else 0
    plot(machines, args.plot)
    for path, text in texts.items():
        common.write_whole(path, text)
    return 0


def newest(folder: Path) -> list[Path]:
    """The results file with the latest date of each machine."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        if match := re.fullmatch(r"(.+)-\d{4}-\d{2}-\d{2}", path.stem):
            files[match.group(1)] = path
    return list(files.values())


def load(path: Path) -> dict:
    """The machine, and the groups of its file by program and mode, each with its run's date, commit and versions.

    Raises:
        ValueError: it is no results file, or has nothing but quick runs.
    """
    try:
        content = json.loads(path.read_text())
        groups = {}
        for run in content["runs"]:
            for group in [] if run["settings"].get("quick") else run["groups"]:
                key = [run["program"], *(group.get(name) for name in GROUP_KEY)]
                # contenders that were timed apart are groups apart
                key.append(tuple(group["contenders"]))
                groups.pop(str(key), None)
                groups[str(key)] = {**group, "run": run}
        machine = content["machine"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file of the benchmarks") from error
    if not groups:
        raise ValueError(f"{path} holds no results but of quick runs, which measure nothing: name the files to take")
    return {"machine": machine, "groups": list(groups.values())}


GROUP_KEY = ["mode", "variant", "precision", "length", "batch", "image_size"]


def select(machine: dict, program: str, mode: str) -> list[dict]:
    return [group for group in machine["groups"] if (group["run"]["program"], group["mode"]) == (program, mode)]


def replace_between_marks(text: str, content: str, path: Path) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must have the lines {BEGIN} and {END}, once each, where the tables belong")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def report(machines: list[dict]) -> str:
    parts = []
    for machine in machines:
        parts += [f"## {machine['machine']['name']}", provenance(machine), inference_table(machine)]
        parts.append(training_table(machine))
        parts += [scan_table(machine, mode) for mode in ("forward", "training")]
        parts.append(resolution_table(machine))
    return "\n\n".join(part for part in parts if part)


def summary(machines: list[dict], plot_path: Path, readme: Path) -> str:
    """Whole models on the CPU and on the GPU of the latest dates, and the plot of all machines."""
    latest = {}
    for machine in sorted(machines, key=lambda machine: machine["groups"][-1]["run"]["date"]):
        if select(machine, "throughput", "inference"):
            latest["gpu" in machine["machine"]] = machine
    parts = []
    for machine in latest.values():
        parts += [f"On {machine['machine']['name']}:", inference_table(machine), training_table(machine)]
    if latest:
        path = plot_path.resolve()
        if path.is_relative_to(readme.resolve().parent):
            path = path.relative_to(readme.resolve().parent)
        parts.append(f"![Images per second, measured, against top-1 accuracy, as published]({path.as_posix()})")
    return "\n\n".join(part for part in parts if part)


def provenance(machine: dict) -> str:
    runs = [group["run"] for group in machine["groups"]]
    rounds = [group["rounds"] for group in machine["groups"]]
    accepted, rejected = (sum(x[name] for x in rounds) for name in ("accepted", "rejected"))
    names = (run["commit"] for run in runs if run["commit"])
    commits = dict.fromkeys(f"`{name[:7]}{'-dirty' * name.endswith('-dirty')}`" for name in names)
    versions = {name: version for run in runs for name, version in run["versions"].items()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{runs[-1]['date'][:10]}, commit {' '.join(commits) or 'unknown'}; {listed}."
        f" Medians of interleaved rounds, {accepted} in all, {rejected} rejected."
    )


def inference_table(machine: dict) -> str:
    """Images per second, percent of the matrix peak, and the speed over the published package's: on a CPU that of its
    float32, but under autocast.
    """
    is_on_gpu = "gpu" in machine["machine"]
    cells = {}
    for group in select(machine, "throughput", "inference"):
        for label, entry in group["contenders"].items():
            name, precision = label.split()
            text = "did not run"
            if "ms" in entry:
                text = f"{number(entry['images_per_s']['median'])} ({entry['percent_of_peak']['median']:.0f} %)"
                baseline = precision if is_on_gpu or precision.startswith("autocast") else "fp32"
                text += speedup(group, label, f"published {baseline}")
            row = f"{name}, {group['variant']}" if name.startswith(("ours", "published")) else name
            cells[row, f"{precision}, batch {group['batch']}"] = text
    baseline = "in the same precision" if is_on_gpu else "fp32 (under autocast: published under autocast)"
    return grid(f"images/s (% of matrix peak), × published {baseline}", cells)


def training_table(machine: dict) -> str:
    cells = {}
    for group in select(machine, "throughput", "training"):
        for label, entry in group["contenders"].items():
            name, precision = label.split()
            text = "did not run"
            if "ms" in entry:
                text = number(entry["images_per_s"]["median"])
                if entry["call_mb"] is not None:
                    text += f", {(entry['weights_mb'] + entry['call_mb']) / 1e3:.2f} GB"
                text += speedup(group, label, f"published {precision}")
            row = f"{name}, {group['variant']}" if name.startswith(("ours", "published")) else name
            cells[row, f"{precision}, batch {group['batch']}"] = text
    return grid("training: images/s, peak memory, × published", cells)


def scan_table(machine: dict, mode: str) -> str:
    cells = {}
    for group in select(machine, "scan", mode):
        for name, entry in group["contenders"].items():
            text = "did not run"
            if "ms" in entry:
                text = f"{number(entry['ms']['median'])} ms"
                if entry["memory_mb"] is not None:
                    text += f", {number(entry['memory_mb'])} MB"
                baselines = ("mamba_ssm-native-graph", "mamba_ssm-native", "loop")
                text += next((x for baseline in baselines if (x := speedup(group, name, baseline))), "")
            column = "{batch} × {length} × {channels} {precision}".format(**group)
            cells[name, column] = text
    what = "forward" if mode == "forward" else "forward and backward"
    return grid(f"scan, {what}: × mamba_ssm-native, or loop", cells)


def resolution_table(machine: dict) -> str:
    cells = {}
    for group in select(machine, "throughput", "resolution"):
        for label, entry in group["contenders"].items():
            if "ms" in entry:
                text = f"{number(entry['images_per_s']['median'])} ({number(entry['over_linear']['median'])})"
                cells["{variant}, {precision}, batch {batch}".format(**group), f"{label.split()[1]} px"] = text
    return grid("images/s (time over linear in pixels)", cells)


def speedup(group: dict, contender: str, against: str) -> str:
    for x in group["speedups"]:
        if (x["contender"], x["against"]) == (contender, against):
            return f" ×{number(x['speedup']['median'])}"
    return ""


def grid(title: str, cells: dict[tuple[str, str], str]) -> str:
    """A markdown table of {(row, column): text}; empty where there is nothing."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if not rows:
        return ""
    lines = [[title, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Plot
# ---------------------------------------------------------------------------------------------------------------------


def points(machine: dict) -> list[dict]:
    """Each model at its fastest, at the largest batch that was measured, and its published accuracy."""
    known = json.loads((common.ROOT / "conversion" / "published.json").read_text())["classification"]
    groups = select(machine, "throughput", "inference")
    groups = [group for group in groups if group["image_size"] == published_size(group["variant"])]
    batch = max((group["batch"] for group in groups), default=0)
    best = {}
    for group in (group for group in groups if group["batch"] == batch):
        for label, entry in group["contenders"].items():
            if "ms" not in entry:
                continue
            name = label.split("-")[0].split()[0]
            if name in PEERS_TOP1:
                if group["image_size"] != 224:
                    continue
                model, top1 = name, PEERS_TOP1[name]
            else:
                model, top1 = group["variant"], known[f"MambaVision-{group['variant']}"]["top1"]
            speed = entry["images_per_s"]["median"]
            if speed > best.get((name, model), {"speed": 0})["speed"]:
                kind = "peer" if name in PEERS_TOP1 else name
                best[name, model] = {"kind": kind, "model": model, "speed": speed, "top1": top1, "how": label}
                best[name, model]["compiled"] = bool(re.search("-(compiled|graphs) ", label))
    return [{**point, "batch": batch} for point in best.values()]


def published_size(variant: str) -> int:
    """Pixels a side of the images that the published accuracy was measured on."""
    match = re.search(r"-(\d{3})-", variant)
    return int(match.group(1)) if match else 224


def plot(machines: list[dict], path: Path) -> None:
    """One panel for each machine: images per second, measured, against top-1 accuracy, as published."""
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "mambavision", "svg.fonttype": "none", "font.size": 9})
    panels = [(machine, found) for machine in machines if (found := points(machine))]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (machine, found) in zip(axes[0], panels, strict=True):
        for kind, label, style in SERIES:
            chosen = sorted((x for x in found if x["kind"] == kind), key=lambda x: x["speed"])
            axis.plot([x["speed"] for x in chosen], [x["top1"] for x in chosen], style, label=label)
            for x in chosen:
                text = f"{x['model']} ({x['how'].split(' ')[-1]}{', compiled' * x['compiled']})"
                axis.annotate(text, (x["speed"], x["top1"]), (4, 5), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.margins(0.4, 0.2)  # room for the texts
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_title(machine["machine"]["name"])
        axis.set_xlabel(f"images/s at batch {found[0]['batch']}, measured, each at its fastest")
        axis.set_ylabel("top-1 on ImageNet-1K, %, as published")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="svg", metadata={"Date": None})
    plt.close(figure)
    unfinished.replace(path)


if __name__ == "__main__":
    common.run(main)
