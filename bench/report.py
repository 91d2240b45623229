"""What a run leaves: the table, the JSON and the chart."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Record

ROOT = Path(__file__).resolve().parent.parent
LARGEST_ERROR = {"float16": 2e-2, "bfloat16": 2e-2, "float32": 1e-3}  # beyond rounding: a wrong result


def _first_line(*command: str) -> tuple[str | None, str | None]:
    """(first line of the output, None) or (None, why not)."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{error} {getattr(error, 'stderr', None) or ''}".strip()
    return done.stdout.partition("\n")[0], None


def environment(device: torch.device, sdpa_version: str | None, host: bool) -> dict[str, object]:
    # SDPA_COMMIT: the code was carried to this machine without its repository.
    carried = os.environ.get("SDPA_COMMIT")
    commit, commit_error = (carried, None) if carried else _first_line("git", "rev-parse", "--short", "HEAD")
    # Earlier results do not make the code dirty; no locks, as others may work in the same checkout.
    status, status_error = _first_line(
        "git", "--no-optional-locks", "status", "--porcelain", "--", ".", ":!bench/results"
    )
    facts: dict[str, object] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if carried or status is None else bool(status),
        "git_error": commit_error or status_error,
        "sdpa": sdpa_version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "timed": "the host, until a call returns; with backward forward and backward" if host else "the device",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "seed": torch.initial_seed(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver, driver_error = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return facts | {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "forced_path": os.environ.get("SDPA_FORCE_ARCH"),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver,
            "driver_error": driver_error,
        }
    return facts | {
        "device": "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def default_path(facts: dict[str, object]) -> Path:
    device = re.sub(r"\W+", "-", str(facts["device"]))
    return ROOT / "bench" / "results" / f"{device}-{facts['commit'] or 'nocommit'}.json"


def write_json(path: Path, facts: dict[str, object], records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": facts, "records": [record.as_json() for record in records]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_tables(console: Console, facts: dict[str, object], records: list[Record]) -> None:
    """One table a case: a row for each backend, torch beside sdpa. Reasons are numbered and follow at the end."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"({notes.setdefault(text, len(notes) + 1)})"

    device = [str(facts["device"]), f"torch {facts['torch']}"]
    device += [f"{name} {facts[name]}" for name in ("cuda", "driver", "sdpa") if facts.get(name)]
    console.print(", ".join(device), highlight=False)
    by_case: dict[str, dict[tuple[str, str], Record]] = {}
    for record in records:
        by_case.setdefault(record.name, {})[record.library, record.backend] = record
    unit = "us" if facts["timed"] == "the device" else "host us"
    libraries = [name for name in ("torch", "sdpa") if any(record.library == name for record in records)]
    for name, cells in by_case.items():
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("backend", min_width=24)
        for library in libraries:
            for title, width in ((f"{library} {unit}", 10), ("TFLOP/s", 7), ("MiB", 8), ("error", 8)):
                table.add_column(title, justify="right", min_width=width, no_wrap=True)
        if len(libraries) == 2:
            table.add_column("sdpa/torch", justify="right")
        for backend in dict.fromkeys(backend for _, backend in cells):
            row = [_label(backend, [cells.get((library, backend)) for library in libraries])]
            for library in libraries:
                row += _figures(cells.get((library, backend)), note)
            if len(libraries) == 2:
                # sdpa has no cudnn: there its default is compared.
                ours = cells.get(("sdpa", backend if backend != "cudnn" else "default"))
                theirs = cells.get(("torch", backend))
                both = ours and theirs and ours.us and theirs.us
                row.append(f"{ours.us / theirs.us:.2f}" if both else "-")
            table.add_row(*row)
        console.print()
        console.print(name, style="bold", highlight=False)
        console.print(table)
    console.print()
    console.print("MiB: peak above the inputs, outputs included. error: against float64, relative.", highlight=False)
    if len(libraries) == 2:
        console.print("sdpa/torch: time over time, below 1 sdpa is faster; beside cudnn stands sdpa's default.")
    for text, number in notes.items():
        console.print(f"({number}) {text}", markup=False, highlight=False)


def _label(backend: str, records: list[Record | None]) -> str:
    """'default (flash)', or torch's choice before sdpa's where they differ."""
    chosen = dict.fromkeys(record.chosen for record in records if record and record.chosen)
    return f"default ({', '.join(chosen)})" if backend == "default" and chosen else backend


def _figures(record: Record | None, note: Callable[[str], str]) -> list[str]:
    if record is None:
        return ["-"] * 4
    if record.us is None:
        return [note(f"{record.library} {record.backend}: {record.reason}"), "-", "-", "-"]
    mark = "".join(note(f"{record.library} {record.backend} warned: {text}") + " " for text in record.warnings)
    error = "-" if record.error is None else f"{record.error:.1e}"
    if record.error is not None and not record.error <= LARGEST_ERROR[record.case.dtype]:
        error += " " + note("this error is too large for rounding: the result is wrong")
    return [
        mark + f"{record.us:.1f}",
        "-" if record.tflops is None else f"{record.tflops:.{1 if record.tflops >= 10 else 3}f}",
        "-" if record.mib is None else f"{record.mib:.1f}",
        error,
    ]


def plot(path: Path, facts: dict[str, object], records: list[Record]) -> None:
    """TFLOP/s, a group of bars for each case; what did not run has no bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record.name for record in records))
    contenders = list(dict.fromkeys((record.library, record.backend) for record in records))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.2 * len(names) * (len(contenders) + 1)), layout="constrained")
    height = 1 / (len(contenders) + 1)
    for index, (library, backend) in enumerate(contenders):
        mine = [record for record in records if (record.library, record.backend) == (library, backend) and record.us]
        if not mine:
            continue
        places = [names.index(record.name) + (index - (len(contenders) - 1) / 2) * height for record in mine]
        palette = matplotlib.colormaps["Oranges" if library == "sdpa" else "Blues"]
        same = [other for other in contenders if other[0] == library]
        color = palette(0.9 - 0.6 * same.index((library, backend)) / len(same))
        bars = axes.barh(places, [record.tflops for record in mine], height, color=color, label=f"{library} {backend}")
        axes.bar_label(bars, [f"{record.us:,.0f} us" for record in mine], padding=2, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("TFLOP/s")
    axes.set_title(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}", fontsize=10)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
