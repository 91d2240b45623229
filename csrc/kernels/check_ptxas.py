"""Compiler launcher: runs nvcc, keeps what ptxas says of each kernel beside the object file, and fails on a spill.

    check_ptxas.py [ccache] nvcc ... -Xptxas=-v ... -o kernel.o

A kernel.o.kernels file has one line per kernel and chip: chip, registers, bytes spilled, static shared memory, name.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def kernels(text: str) -> list[tuple[str, int, int, int, str]]:
    rows = []
    entry, spilled = None, 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            entry, spilled = match.groups(), 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            rows.append((entry[1], int(match[1]), spilled, int(shared[1]) if shared else 0, entry[0]))
            entry = None
    return rows


def main() -> int:
    command = sys.argv[1:]
    done = subprocess.run(command, capture_output=True, text=True)
    noise = re.compile(r"ptxas info|bytes stack frame|^\s*$|Function properties|Compile time")
    for line in (done.stdout + done.stderr).splitlines():
        if not noise.search(line) or "are serialized" in line:  # wgmma that wait for each other: right, but slow
            print(line, file=sys.stderr)
    if done.returncode != 0 or "-o" not in command:
        return done.returncode
    output = Path(command[command.index("-o") + 1])
    found = kernels(done.stdout + done.stderr)
    spills = [row for row in found if row[2] > 0]
    if spills:
        for chip, registers, spilled, _, name in spills:
            print(f"error: {name} spills {spilled} bytes on {chip} with {registers} registers", file=sys.stderr)
        output.unlink(missing_ok=True)
        return 1
    Path(f"{output}.kernels").write_text("".join("\t".join(map(str, row)) + "\n" for row in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
