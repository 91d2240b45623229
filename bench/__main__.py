"""python -m bench: sdpa and torch side by side; the seed's comparison first. See --help."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bench import cases as known

if importlib.util.find_spec("rich") is None:
    sys.exit("python -m bench needs rich for its table and progress bar: pip install rich")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report
from bench.measure import BACKENDS, Contender, DeviceLost, Record, run_cases


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--cases",
        help="groups and cases, comma-separated; a case is written like 'B4 H32/8 L4096 D128 bfloat16 causal' "
        "(also S, D192/128, p=0.1, mask=bool|bias|padding, backward, BHLD), listed or not; 'CASE & CASE' times both in "
        "turn, for a ratio that a moving clock leaves alone "
        "(default: seed,quick; without a GPU: cpu)",
    )
    parser.add_argument("--list", action="store_true", help="print groups and cases, and stop")
    parser.add_argument(
        "--backend",
        default="torch,sdpa",
        help=f"comma-separated: a library (torch, sdpa), a backend of both ({', '.join(BACKENDS)}), "
        "or one of one, as sdpa:flash (default: everything)",
    )
    parser.add_argument("--dtype", choices=known.DTYPES, help="time every case in this dtype")
    parser.add_argument("--backward", action="store_true", help="time the backward of every case")
    parser.add_argument(
        "--host",
        action="store_true",
        help="time the host until a call returns, which is what small calls take; with backward forward and backward "
        "(cases by default: host)",
    )
    parser.add_argument("--tf32", action="store_true", help="allow float32 products in TF32")
    parser.add_argument("--repeats", type=int, default=50, help="samples of one measurement at most (default 50)")
    parser.add_argument(
        "--seconds", type=float, default=0.25, help="time for one measurement, at least 3 samples (default 0.25)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, help="JSON (default bench/results/DEVICE-COMMIT.json)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="bar chart; needs matplotlib")
    options = parser.parse_args()
    if options.repeats < 1 or options.seconds <= 0:
        parser.error(f"--repeats {options.repeats} and --seconds {options.seconds} must be positive")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    if options.plot and options.host:
        parser.error("--plot draws TFLOP/s, which --host does not measure")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        options.contenders = contenders(options.backend, options.device)
        default = "host" if options.host else "seed,quick" if options.device.type == "cuda" else "cpu"
        options.cases = known.select(options.cases or default)
        changes = ({"dtype": options.dtype} if options.dtype else {}) | ({"backward": True} if options.backward else {})
        options.cases = list(
            dict.fromkeys(tuple(replace(case, **changes) for case in together) for together in options.cases)
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def contenders(names: str, device: torch.device) -> list[Contender]:
    # cudnn is torch's alone, and on a GPU.
    everyone = [
        Contender(library, backend)
        for backend in BACKENDS
        for library in ("torch", "sdpa")
        if backend != "cudnn" or (library == "torch" and device.type == "cuda")
    ]
    picked: set[Contender] = set()
    for name in names.split(","):
        found = {one for one in everyone if name.strip() in (one.library, one.backend, str(one))}
        if not found:
            raise ValueError(f"--backend '{name}' is none of torch, sdpa, {', '.join(map(str, everyone))}")
        picked |= found
    return [one for one in everyone if one in picked]


def sdpa_version() -> str:
    try:
        import sdpa

        sdpa.scaled_dot_product_attention  # noqa: B018 (an unbuilt checkout imports as an empty package)
    except (ImportError, AttributeError) as error:
        sys.exit(f"sdpa cannot be used: {error}\nBuild it first, or time torch alone with --backend torch.")
    return sdpa.__version__


def main() -> int:
    options = arguments()
    if options.list:
        for group, members in known.GROUPS.items():
            print(group + "".join(f"\n  {case}" for case in members if group != "all"))
        return 0
    version = sdpa_version() if any(one.library == "sdpa" for one in options.contenders) else None
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    torch.seed()  # fresh inputs each run; the JSON holds the seed
    facts = report.environment(options.device, version, options.host)
    out = options.out or report.default_path(facts)

    records: list[Record] = []
    stopped = None
    errors = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("", total=2 * len(options.contenders) * sum(map(len, options.cases)))
            for number, together in enumerate(options.cases, 1):
                if not errors.is_terminal:
                    names = " & ".join(map(str, together))
                    print(f"[{number}/{len(options.cases)}] {names}", file=sys.stderr, flush=True)

                def tick(text: str) -> None:
                    progress.update(task, advance=1, description=text)

                run_cases(
                    together,
                    options.contenders,
                    options.device,
                    options.repeats,
                    options.seconds,
                    tick,
                    records,
                    options.host,
                )
                report.write_json(out, facts, records)  # a run that is killed keeps what it has
    except DeviceLost as lost:
        stopped = str(lost)
    except KeyboardInterrupt:
        stopped = "interrupted"

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    report.print_tables(console, facts, records)
    report.write_json(out, facts, records)
    print(f"written: {out}")
    if options.plot:
        report.plot(options.plot, facts, records)
        print(f"written: {options.plot}")
    if stopped:
        print(f"stopped before the end: {stopped}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
