"""What python -m bench is given and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bars
from bench.cases import GROUPS, parse, select

ROOT = Path(__file__).parents[1]


def test_cases_joined_come_together():
    first, second = "B1 H2 L64 D32 float32", "B1 H2 L64 D32 float32 causal"
    assert select(f"{first} & {second},{first},{first}") == [(parse(first), parse(second)), (parse(first),)]
    assert select("decode") == [(case,) for case in GROUPS["decode"]]
    with pytest.raises(ValueError, match="B1 H2 L64"):
        select("B1 H2 L64 & " + first)


def test_bars_measure_partners_together():
    together = select(bars.cases(bars.BARS["flash"]))
    for bar in bars.BARS["flash"]:
        assert any({bar.case, bar.other or bar.case} <= set(group) for group in together), bar
    assert sum(map(len, together)) == len({case for group in together for case in group})


def test_run_of_two_cases_in_turn(tmp_path):
    out = tmp_path / "out.json"
    cases = "B1 H2 L64 D32 float32 & B1 H2 L64 D32 float32 causal"
    command = [sys.executable, "-m", "bench", "--device", "cpu", "--backend", "math", "--seconds", "0.01"]
    subprocess.run([*command, "--cases", cases, "--out", str(out)], check=True, cwd=ROOT, capture_output=True)
    records = json.loads(out.read_text())["records"]
    assert [(r["name"], r["library"]) for r in records] == [
        (name, library) for name in cases.split(" & ") for library in ("torch", "sdpa")
    ]
    assert all(r["us"] > 0 and r["error"] < 1e-5 for r in records)
