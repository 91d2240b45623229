"""python -m bench.bars RESULT.json...: what we mean to reach, beside what a run of python -m bench measured.

The runs: --cases "$(python -m bench.bars --cases)" --backend torch,sdpa:flash,sdpa:memory-efficient,sdpa:default, with
SDPA_FORCE_ARCH=80 where the chip has a newer path; and --cases float32 --tf32.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from bench.cases import GROUPS, Case, parse

COPY_BYTES_PER_US = 4.25e6  # a device-to-device copy on the H200, read plus written


@dataclass(frozen=True)
class Bar:
    case: Case
    ours: str  # backend
    bar: float
    theirs: tuple[str, ...] = ()  # torch's backends: their best time is at least `bar` times ours
    other: Case | None = None  # our time is at most `bar` times what this case takes us, for a share of its work
    work: float = 1.0
    copy: bool = False  # K and V are read at no less than `bar` of the rate of a copy
    tf32: bool = False


def faster(cases: str, ours: str, bar: float, *theirs: str, tf32: bool = False) -> list[Bar]:
    return [Bar(parse(case), ours, bar, theirs, tf32=tf32) for case in cases.split(",")]


def within(case: str, bar: float, other: str, work: float = 1.0) -> Bar:
    return Bar(parse(case), "flash", bar, other=parse(other), work=work)


def flash_bar(case: Case) -> float:
    return 1.15 if case.L <= 1024 and not case.backward else 1.05


EFFICIENT = "memory-efficient"
PLAIN = [
    case
    for case in (*GROUPS["forward"], *GROUPS["backward"])
    if (case.L in (512, 4096, 16384) and case.dtype == "bfloat16") or case.E == 32
]
ODD = [case for case in GROUPS["shapes"] if case.Ev == case.E and case.E in (72, 80, 96, 120, 160, 192)]
BOOL, BIAS = "B4 H16 L4096 D128 bfloat16 mask=bool", "B8 H32 L2048 D64 bfloat16 mask=bias"
WITHOUT = ("B32 H32 L1024 D32 float16", "B4 H32 L4096 D64 bfloat16", "B4 H16 L4096 D128 bfloat16")
FP32, FP32_CAUSAL = "B4 H16 L2048 D64 float32", "B2 H16 L4096 D128 float32 causal"
BARS = {
    "flash": [
        *(Bar(case, "flash", flash_bar(case), ("flash",)) for case in PLAIN),
        *faster(f"{BOOL},{BIAS}", "flash", 2.2, EFFICIENT),
        *faster(f"{BOOL} backward,{BIAS} backward", "flash", 1.8, EFFICIENT),
        *(within(f"{case} mask=padding", 1.10, case, work=0.75) for case in WITHOUT[1:]),
        *(within(f"{case} p=0.1", 1.25, case) for case in WITHOUT),
        *(within(f"{case} p=0.1 backward", 1.15, f"{case} backward") for case in WITHOUT),
        within("B4 H32/8 L4096 D128 bfloat16 causal", 1.0, "B4 H32 L4096 D128 bfloat16 causal"),
        *(Bar(case, "flash", 1.2, ("flash",)) for case in ODD),
    ],
    "memory-efficient": [
        *faster("B4 H32 L4096 D64 bfloat16,B4 H16 L4096 D128 bfloat16", EFFICIENT, 2.0, EFFICIENT),
        *faster("B4 H32 L4096 D64 bfloat16 backward,B4 H16 L4096 D128 bfloat16 backward", EFFICIENT, 1.7, EFFICIENT),
        *faster(f"{FP32},{FP32_CAUSAL}", EFFICIENT, 1.8, EFFICIENT),
        *faster(f"{FP32} backward,{FP32_CAUSAL} backward", EFFICIENT, 1.6, EFFICIENT, "math"),
        *faster(f"{FP32},{FP32_CAUSAL}", EFFICIENT, 3.5, EFFICIENT, tf32=True),
        *faster("B1 H1 L4096 D512 float16,B4 H8 L4096 D512 float16", EFFICIENT, 1.5, EFFICIENT),
        *faster("B32 H32 L1024 D32 float16", EFFICIENT, 2.2, EFFICIENT),
        *(Bar(case, "default", 1.0, ("flash", EFFICIENT, "cudnn", "math")) for case in GROUPS["decode"]),
        *(Bar(case, "default", 0.95, copy=True) for case in GROUPS["decode"]),
        *faster(f"{BOOL},{BIAS}", EFFICIENT, 2.0, EFFICIENT),
        *faster(f"{BOOL} backward,{BIAS} backward", EFFICIENT, 1.6, EFFICIENT),
    ],
}


def line(bar: Bar, us: dict[tuple[str, str, str, bool], float]) -> str:
    """A row of the table; empty where the runs lack the figures."""

    def of(case: Case, library: str, backend: str) -> float | None:
        return us.get((str(case), library, backend, bar.tf32))

    ours = of(bar.case, "sdpa", bar.ours)
    if ours is None:
        return ""
    if bar.copy:
        c = bar.case
        size = c.B * c.Hkv * c.S * (c.E + c.Ev) * (4 if c.dtype == "float32" else 2)
        reached, what, other = size / COPY_BYTES_PER_US / ours, "a copy of K and V", size / COPY_BYTES_PER_US
    elif bar.other is not None:
        own = of(bar.other, "sdpa", bar.ours)
        if own is None:
            return ""
        other = own * bar.work
        reached, what = ours / other, f"{bar.other}" + (f", x {bar.work}" if bar.work != 1 else "")
    else:
        found = {name: of(bar.case, "torch", name) for name in bar.theirs}
        times = {name: time for name, time in found.items() if time is not None}
        if not times:
            return ""
        best = min(times, key=lambda name: times[name])
        reached, what, other = times[best] / ours, f"torch {best}", times[best]
    is_met = reached <= bar.bar if bar.other is not None else reached >= bar.bar
    sign = "at most" if bar.other is not None else "at least"
    name = f"{bar.case}" + (" (TF32)" if bar.tf32 else "")
    figures = f"{ours / 1e3:.3f} | {what}: {other / 1e3:.3f} | {reached:.2f} | {sign} {bar.bar:.2f}"
    return f"| {name} | {figures} | {'yes' if is_met else 'no'} |"


def cases(bars: list[Bar]) -> str:
    """What python -m bench --cases is given for them; those that are compared with each other are timed in turn."""
    groups: dict[Case, list[Case]] = {}
    for bar in bars:
        leader = bar.other or bar.case
        groups.setdefault(leader, [leader]).append(bar.case)
    return ",".join(" & ".join(dict.fromkeys(map(str, group))) for group in groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bars", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--cases", action="store_true", help="print the cases to measure, and stop")
    parser.add_argument("--group", choices=BARS, action="append", help="these alone (default: all)")
    options = parser.parse_args()
    groups = {name: BARS[name] for name in options.group or BARS}
    if options.cases:
        print(cases([bar for bars in groups.values() for bar in bars if not bar.tf32]))
        return
    if not options.results:
        parser.error("either --cases, or the results of a run")
    us: dict[tuple[str, str, str, bool], float] = {}
    for path in options.results:
        content = json.loads(path.read_text())
        tf32 = content["environment"]["float32_matmul_precision"] != "highest"
        for r in content["records"]:
            if r["us"] is not None:
                us[r["name"], r["library"], r["backend"], tf32] = r["us"]
    for group, bars in groups.items():
        rows = [row for row in (line(bar, us) for bar in bars) if row]
        met = sum(row.endswith("yes |") for row in rows)
        print(f"## {group}: {met} of {len(rows)} met, {len(bars) - len(rows)} not measured\n")
        print("| case | ours, ms | compared with, ms | ratio | bar | met |\n|---|---|---|---|---|---|")
        print("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
