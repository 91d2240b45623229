"""Compiles every variant for every chip that can run it, and writes what came out as a table.

    python csrc/kernels/compile_matrix.py --chips 7.5 8.0 8.6 8.9 --out bench/results/compile-matrix.md

For each kernel: registers, bytes spilled, and how many of the instructions that matter its machine code and its main
loop hold (with nvdisasm, of the CUDA toolkit or the PyPI package nvidia-cuda-nvdisasm). The main loop is the shortest
with nine tenths of the most mma any loop has, or the shortest with wgmma; "shared" counts its accesses to shared memory
in steps of 128 bytes, and what is jumped over or repeated inside it counts once. Exits with 1 if anything failed or
spilled, or (with nvdisasm) if a kernel of flash lacks the instructions that its code path is made of.

nvcc 13 knows no sm70. Its kernels are compiled by NVRTC 12, which --chips 7.0 wants in a folder:

    pip install --no-deps --target FOLDER nvidia-cuda-{nvrtc,runtime,cccl}-cu12==12.9.*
    python csrc/kernels/compile_matrix.py --chips 7.0 --nvrtc FOLDER --out volta.md
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check_ptxas import kernels
from variants import CPP_TYPE, VARIANTS, Target, Variant, targets_of

HERE = Path(__file__).parent
INSTRUCTIONS = (
    "HMMA.884",
    "HMMA.1688",
    "HMMA.16816",
    "HGMMA",
    "LDSM",
    "LDGSTS",
    "UTMALDG",
    "FFMA",
    "MUFU.EX2",
    "RED",
)
FLASH_INSTRUCTIONS = {75: ("HMMA.1688", "LDSM"), 80: ("HMMA.16816", "LDSM", "LDGSTS"), 90: ("HGMMA", "UTMALDG")}


def missing(v: Variant, kernel: str, registers: int, held: dict[str, int]) -> list[str]:
    """What a kernel that multiplies should hold and does not. With 8 registers it is one that this chip never runs."""
    if v.backend != "flash" or not held or registers <= 8 or re.search("flash_convert|flash_delta|combine", kernel):
        return []
    return [name for name in FLASH_INSTRUCTIONS[v.path] if not held[name]]


def short(name: str) -> str:
    """The kernel's own name and template arguments, without parameters and namespace."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    text = re.sub(r"\(anonymous namespace\)::|sdpa::(efficient::)?|^void ", "", done.stdout.strip())
    text = re.sub(r"\((Forward|Backward)Params.*$", "", text)
    return re.sub(r"\((?!.*>).*$", "", text).replace("|", "/")


def main_loop(code: list[tuple[str, str]], labels: dict[str, int]) -> dict[str, int]:
    """Of instructions and their operands; labels: the number of the instruction that follows."""
    mma = "HGMMA" if any(name.startswith("HGMMA") for name, _ in code) else "HMMA"
    loops = []
    for i, (name, operands) in enumerate(code):
        target = re.search(r"`\((\S+)\)", operands) if name.startswith("BRA") else None
        if target and labels.get(target[1], i + 1) <= i:
            body = [name for name, _ in code[labels[target[1]] : i + 1]]
            loops.append((sum(name.startswith(mma) for name in body), body))
    most = max((count for count, _ in loops), default=0)
    if most == 0:
        return {}
    least = 1 if mma == "HGMMA" else 0.9 * most
    body = min((body for count, body in loops if count >= least), key=len)
    found = {"instructions": len(body), "shared": 0, "MUFU": 0}
    for name in body:
        if name.startswith(mma):
            kind = ".".join(name.split(".")[:2])
            found[kind] = found.get(kind, 0) + 1
        elif name.startswith("MUFU"):
            found["MUFU"] += 1
        elif name.startswith(("LDSM", "LDGSTS", "LDS", "STS")):
            found["shared"] += 4 if ".128" in name or ".4" in name else 2 if ".64" in name or ".M88.2" in name else 1
    return found


def counts(cubin: Path, nvdisasm: str | None) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    if nvdisasm is None:
        return {}
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0 and "deprecated" in done.stderr:  # since 13.1 it knows no sm70
        return {}
    done.check_returncode()
    code: dict[str, tuple[list[tuple[str, str]], dict[str, int]]] = {}
    current: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            current, labels = code.setdefault(match[1], ([], {}))
        elif match := re.match(r"(\.L_\w+):", line):
            labels[match[1]] = len(current)
        elif match := re.search(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)([^;]*);", line):
            current.append((match[1], match[2]))
    found = {}
    for kernel, (lines, labels) in code.items():
        held = dict.fromkeys(INSTRUCTIONS, 0)
        for name, _ in lines:
            if kind := next((i for i in INSTRUCTIONS if name.startswith(i)), None):
                held[kind] += 1
        found[kernel] = held, main_loop(lines, labels)
    return found


# NVRTC compiles no host code, so kernels are named one by one. It has neither the C++ library's headers nor the
# runtime's, only types of the latter.
VOLTA_KERNELS = {
    "decode": ["efficient::decode_kernel<Sm70, {T}, {D}>", "combine_kernel<Sm70, {T}, {D}>"],
    "forward": ["efficient::forward_kernel<Sm70, {T}, {D}>"],
    "backward": [
        "efficient::delta_kernel<{T}>",
        "efficient::grad_key_value_kernel<Sm70, {T}, {D}, efficient::KeyGradients::kKey>",
        "efficient::grad_key_value_kernel<Sm70, {T}, {D}, efficient::KeyGradients::kValue>",
        "efficient::grad_query_kernel<Sm70, {T}, {D}>",
    ],
}
VOLTA_HALF_KERNELS = {  # of float16; heads wider than 128 are for the others
    "forward": ["efficient::volta_forward_kernel<Sm70, {D}>"],
    "backward": [
        "efficient::volta_delta_kernel<Sm70>",
        "efficient::volta_grad_key_value_kernel<Sm70, {D}, true, {both}>",
        "efficient::volta_grad_key_value_kernel<Sm70, {D}, {both}, true>",
        "efficient::volta_grad_query_kernel<Sm70, {D}>",
    ],
}


def volta_kernels(v: Variant) -> list[str]:
    names = VOLTA_HALF_KERNELS.get(v.direction, []) if v.dtype == "float16" else []
    if not names or v.head_dim == 128:
        names = names + VOLTA_KERNELS[v.direction]
    both = "true" if v.head_dim < 128 else "false"
    return list(dict.fromkeys(name.format(T=CPP_TYPE[v.dtype], D=v.head_dim, both=both) for name in names))


STAND_INS = {
    "cuda_runtime.h": "template <class F> __device__ cudaError_t cudaFuncSetAttribute(F, int, int);",
    "cuda_runtime_api.h": "",
    "cfloat": "#define FLT_MAX 3.402823466e+38f",
    "algorithm": """#include <cuda/std/initializer_list>
namespace std {
template <class T> constexpr T max(const T& a, const T& b) { return a < b ? b : a; }
template <class T> constexpr T min(const T& a, const T& b) { return b < a ? b : a; }
template <class T> constexpr T clamp(const T& x, const T& a, const T& b) { return x < a ? a : b < x ? b : x; }
template <class T> constexpr T max(cuda::std::initializer_list<T> all) {
  T best = *all.begin();
  for (const T& x : all) best = max(best, x);
  return best;
}
}""",
} | {
    name: f"#include <cuda/std/{name}>\nnamespace std {{ using namespace cuda::std; }}\n"
    "using cuda::std::int64_t; using cuda::std::uint64_t;"
    for name in ("atomic", "climits", "cmath", "cstddef", "cstdint", "limits", "type_traits", "utility")
}


def table_rows(v: Variant, arch: str, said: str, cubin: Path, nvdisasm: str | None) -> tuple[list[str], bool]:
    instructions = counts(cubin, nvdisasm)
    rows, good = [], True
    for _, registers, spilled, _, name in kernels(said):
        found = instructions.get(name, ({}, {}))
        lacks = missing(v, name, registers, found[0])
        held, loop = (", ".join(f"{n} {i}" for i, n in x.items() if n) for x in found)
        held = " ".join([*(f"NO {i}," for i in lacks), held])
        rows.append(f"| {v.name} | sm{arch} | {short(name)} | {registers} | {spilled} | {held} | {loop} |")
        good = good and spilled == 0 and not lacks
    return rows, good


def compiled_by_nvrtc(v: Variant, folder: Path | None, nvdisasm: str | None) -> tuple[list[str], bool]:
    if folder is None:
        raise SystemExit("--chips 7.0 needs --nvrtc FOLDER; see --help")
    nvrtc = ctypes.CDLL(str(next(folder.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))))
    names = volta_kernels(v)
    text = f'#include "{v.header}"\nnamespace sdpa {{\n'
    text += "".join(f"__device__ auto* kernel_{i} = &{name};\n" for i, name in enumerate(names)) + "}\n"
    with tempfile.TemporaryDirectory() as stand_ins:
        for name, content in STAND_INS.items():
            (Path(stand_ins) / name).write_text(f"#pragma once\n{content}\n")
        includes = [stand_ins, HERE, folder / "nvidia/cuda_runtime/include", folder / "nvidia/cuda_cccl/include"]
        flags = ["--gpu-architecture=sm_70", "-std=c++20", "-default-device", "--ptxas-options=-v"]
        flags += [f"-I{path}" for path in includes]
        program = ctypes.c_void_p()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"volta.cu", 0, None, None)
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        said = log.value.decode()
        if failed:
            error = next((line for line in said.splitlines() if "error" in line), said)
            return [f"| {v.name} | sm70 | FAILED: {error} | | | | |"], False
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        cubin = Path(stand_ins) / "volta.cubin"
        cubin.write_bytes(code.raw)
        rows, good = table_rows(v, "70", said, cubin, nvdisasm)
        return rows, good and len(rows) == len(names)


def compiled(v: Variant, chip: Target, options: argparse.Namespace) -> tuple[list[str], bool]:
    if chip.capability == 70:
        return compiled_by_nvrtc(v, options.nvrtc, options.nvdisasm)
    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder) / f"{v.name}.cu", Path(folder) / f"{v.name}.cubin"
        cu.write_text(v.source)
        arch = f"{chip.capability}{chip.suffix}"
        command = [options.nvcc, "-cubin", "-O3", "-std=c++20", "-Xptxas=-v", "--expt-relaxed-constexpr", f"-I{HERE}"]
        if cutlass := importlib.util.find_spec("cutlass_library"):  # of nvidia-cutlass: Hopper's kernels want it
            command += ["-isystem", str(Path(cutlass.origin or "").parent / "source" / "include")]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(cu), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return [f"| {v.name} | sm{arch} | FAILED: {done.stderr.strip().splitlines()[0]} | | | | |"], False
        return table_rows(v, arch, done.stdout + done.stderr, cubin, options.nvdisasm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["7.5", "8.0", "8.6", "8.9"])
    parser.add_argument("--only", default="", help="variants whose name matches this regular expression")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "nvcc")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    parser.add_argument("--nvrtc", type=Path, help="folder with NVRTC 12, for sm70")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    work = []
    for chip in map(Target.parse, options.chips):
        for v in VARIANTS:
            if targets_of(v, [chip], False) and re.search(options.only, v.name):
                work.append((v, chip))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda item: compiled(*item, options), work))
    version = subprocess.run([options.nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", version)
    nvcc = release[1] if release else "?"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    bad = sum(not good for _, good in results)
    lines = [
        "# Every variant for every chip",
        "",
        f"Written by csrc/kernels/compile_matrix.py at commit {commit.strip()} with nvcc {nvcc} (sm70: NVRTC 12) for "
        f"{', '.join(options.chips)}: {len(results)} translation units, {bad} of them with a spill, an error or "
        "a missing instruction.",
        "Shared memory is checked by static_assert against each path's limit.",
        "",
        "| variant | chip | kernel | registers | bytes spilled | instructions | main loop |",
        "|---|---|---|---|---|---|---|",
        *(row for rows, _ in results for row in rows),
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{options.out}: {len(results)} translation units, {bad} with a spill, an error or a missing instruction")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
