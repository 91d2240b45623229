"""Warps a multiprocessor holds of each flash kernel, and what binds its main loop, for chips that are not at hand.

On a GPU, with a build that has all paths (SDPA_ALL_PATHS=1), what each kernel is launched with:

    python -m bench.occupancy --record launches.json

Anywhere, with registers and machine code from csrc/kernels/compile_matrix.py's report:

    python -m bench.occupancy --launches launches.json --matrix bench/results/compile-matrix.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("plain", "bool", "bias", "padding", "dropout")
LENGTHS = (512, 1100)  # there are kernels for up to 1024 keys
HEADS = 80  # so that every multiprocessor has work


@dataclass(frozen=True)
class Chip:
    """From the CUDA programming guide and NVIDIA's whitepapers."""

    path: str  # SDPA_FORCE_ARCH of the launches
    machine_code: str  # what builds ship for it
    shared: int  # bytes of a multiprocessor
    warps: int  # at most, of a multiprocessor
    clocks: dict[str, int]  # in which a quarter of a multiprocessor issues one mma with float32 sums


CHIPS = {
    "sm75 (T4)": Chip("75", "sm75", 64 * 1024, 32, {"HMMA.1688": 8}),
    "sm80 (A100)": Chip("80", "sm80", 164 * 1024, 64, {"HMMA.16816": 8}),
    "sm86 (A10), sm89 (L4)": Chip("86", "sm80", 100 * 1024, 48, {"HMMA.16816": 16}),
    "sm86, sm89 (GeForce)": Chip("86", "sm80", 100 * 1024, 48, {"HMMA.16816": 32}),
}
RESERVED = 1024  # bytes of shared memory that the system takes of every block, since sm80


def short(name: str) -> str:
    """As compile_matrix.py has it."""
    text = re.sub(r"\(anonymous namespace\)::|sdpa::|^void ", "", name)
    return re.sub(r"\((Forward|Backward)Params.*$", "", text)


def record() -> Iterator[dict[str, object]]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    import sdpa

    def call(dtype: torch.dtype, head_dim: int, kind: str, length: int) -> None:
        query, key, value = (
            torch.randn(1, HEADS, length, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)
        )
        mask = None
        if kind == "bool":
            mask = torch.rand(1, 1, length, length, device="cuda") > 0.3
        elif kind == "bias":
            mask = torch.randn(1, HEADS, length, length, device="cuda", dtype=dtype, requires_grad=True)
        elif kind == "padding":
            mask = torch.arange(length, device="cuda")[None, None, None] < length * 3 // 4
        with sdpa.sdpa_kernel(sdpa.SDPBackend.FLASH_ATTENTION):
            dropout_p = 0.2 * (kind == "dropout")
            output = sdpa.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout_p)
            output.backward(torch.randn_like(output))
        torch.cuda.synchronize()

    for path, dtype in (("75", torch.float16), ("80", torch.bfloat16), ("86", torch.bfloat16)):
        os.environ["SDPA_FORCE_ARCH"] = path
        for head_dim in (32, 64, 80, 96, 128, 160, 192, 256):
            for kind in KINDS:
                for length in LENGTHS:
                    with profile(activities=[ProfilerActivity.CUDA]) as trace, tempfile.TemporaryDirectory() as folder:
                        call(dtype, head_dim, kind, length)
                    file = Path(folder).with_suffix(".json")
                    trace.export_chrome_trace(str(file))
                    events = json.loads(file.read_text())["traceEvents"]
                    file.unlink()
                    for event in events:
                        if event.get("cat") == "kernel" and "sdpa::" in event["name"]:
                            yield {
                                "path": path,
                                "case": f"D{head_dim} {kind} S{length}",
                                "kernel": short(event["name"]),
                                "threads": event["args"]["block"][0],
                                "shared": event["args"]["shared memory"],
                            }


def matrix(path: Path) -> dict[tuple[str, str], tuple[int, dict[str, int]]]:
    """Registers and the main loop's instructions, by chip and kernel."""
    found = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[3].isdecimal():
            loop = {name: int(count) for count, name in re.findall(r"(\d+) ([A-Za-z0-9.]+)", cells[6])}
            found[cells[1], cells[2]] = (int(cells[3]), loop)
    return found


def units(loop: dict[str, int], clocks: dict[str, int]) -> dict[str, int]:
    """Clocks that a warp's loop takes of each unit of a quarter multiprocessor, all quarters doing alike."""
    return {
        "tensor cores": sum(loop.get(name, 0) * each for name, each in clocks.items()),
        "issue": loop.get("instructions", 0),
        "shared memory": 4 * loop.get("shared", 0),  # which has 128 bytes a clock for all four
        "exp2": 8 * loop.get("MUFU", 0),  # 16 lanes a clock for all four
    }


def report(launches: list[dict], compiled: dict[tuple[str, str], tuple[int, dict[str, int]]]) -> Iterator[str]:
    for title, chip in CHIPS.items():
        cases: dict[tuple[str, int, int], list[str]] = {}
        for launch in launches:
            if launch["path"] == chip.path and not re.search("delta|convert|mask_blocks", launch["kernel"]):
                key = launch["kernel"], launch["threads"], launch["shared"]
                cases.setdefault(key, []).append(launch["case"])
        yield f"\n## {title}\n"
        yield "| kernel | for | registers | shared memory, KB | warps | clocks of the main loop | of peak |"
        yield "|---|---|---|---|---|---|---|"
        for (kernel, threads, shared), names in cases.items():
            if (chip.machine_code, kernel) not in compiled:
                raise SystemExit(f"{kernel} is not in the matrix for {chip.machine_code}")
            registers, loop = compiled[chip.machine_code, kernel]
            warps = threads // 32
            of_warp = (registers * 32 + 255) // 256 * 256
            reserved = RESERVED if chip.machine_code != "sm75" else 0
            blocks = min(chip.shared // (shared + reserved), 65536 // (of_warp * warps), chip.warps // warps)
            used = units(loop, chip.clocks)
            binds = max(used, key=lambda unit: used[unit])
            clocks = ", ".join(f"**{n} {u}**" if u == binds else f"{n} {u}" for u, n in used.items())
            share = used["tensor cores"] / used[binds]
            kinds: dict[str, None] = dict.fromkeys(" ".join(name.split()[:2]) for name in names)
            yield (
                f"| {kernel} | {', '.join(kinds)} | {registers} | {shared / 1024:.1f} | {blocks * warps} | {clocks} | "
                f"{share:.0%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.occupancy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="OUT.json")
    parser.add_argument("--launches", type=Path)
    parser.add_argument("--matrix", type=Path)
    options = parser.parse_args()
    if options.record:
        options.record.write_text("[\n" + ",\n".join(map(json.dumps, record())) + "\n]\n")
    elif options.launches and options.matrix:
        print("\n".join(report(json.loads(options.launches.read_text()), matrix(options.matrix))))
    else:
        parser.error("either --record, or --launches and --matrix")


if __name__ == "__main__":
    main()
