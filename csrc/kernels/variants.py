"""The one table of kernel variants.

Run by CMake at configure time. For each variant and the chips asked for it writes a translation unit, and for all of
them the table that the C++ selector and the tests read (variants.inc), compiled or not.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

CPP_TYPE = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
CPP_DTYPE = {"float16": "kFloat16", "bfloat16": "kBFloat16", "float32": "kFloat32"}
HEADER = {
    ("flash", "forward"): "flash/flash_fwd.cuh",
    ("flash", "backward"): "flash/flash_bwd.cuh",
    ("flash", "decode"): "flash/flash_decode.cuh",
    ("efficient", "forward"): "mem_efficient/efficient_fwd.cuh",
    ("efficient", "backward"): "mem_efficient/efficient_bwd.cuh",
    ("efficient", "decode"): "mem_efficient/efficient_decode.cuh",
}
HOPPER = 90  # wgmma: machine code for 90a alone, and beside path 80, for it does not take every call
OTHER_KERNELS = ("dropout_mask", "float32_product", "mask_blocks", "softmax_rows")


@dataclass(frozen=True)
class Variant:
    backend: str  # flash | efficient
    direction: str  # forward | backward | decode: forward for short queries, without LSE
    path: int  # the Arch template parameter: code path, not the chip it is compiled for
    dtype: str
    head_dim: int  # tile width: E and Ev up to this (flash), chunk width (efficient)

    @property
    def name(self) -> str:
        return f"{self.backend}_{self.direction}_sm{self.path}_{self.dtype}_{self.head_dim}"

    @property
    def sums_grad_query(self) -> bool:
        """Whether blocks of all key tiles add to dQ in float32 scratch (flash: unless it has to be in order)."""
        on_tensor_cores = self.backend == "flash" or (self.path >= 80 and self.dtype == "float32")
        return self.direction == "backward" and on_tensor_cores

    @property
    def signature(self) -> str:
        params = "BackwardParams" if self.direction == "backward" else "ForwardParams"
        return f"cudaError_t {self.name}(const {params}& params, cudaStream_t stream)"

    @property
    def source(self) -> str:
        """The translation unit that compiles it."""
        arch = "_sm90<" if self.path == HOPPER else f"<Sm{self.path}, "
        launcher = f"{self.backend}_{self.direction}{arch}{CPP_TYPE[self.dtype]}, {self.head_dim}>"
        return (
            f"// Written by csrc/kernels/variants.py.\n"
            f'#include "{self.header}"\n\n'
            f"namespace sdpa {{\n{self.signature} {{\n"
            f"  return {launcher}(params, stream);\n"
            f"}}\n}}  // namespace sdpa\n"
        )

    @property
    def header(self) -> str:
        header = HEADER[self.backend, self.direction]
        return header.replace(".cuh", "_sm90.cuh") if self.path == HOPPER else header


VARIANTS = (
    [
        Variant("flash", direction, 80, dtype, head_dim)
        for direction, head_dims in (
            ("forward", (32, 64, 128, 256, 512)),
            ("backward", (32, 64, 128, 256)),
            ("decode", (64, 128)),
        )
        for dtype in ("float16", "bfloat16")
        for head_dim in head_dims
    ]
    + [
        Variant("flash", direction, HOPPER, dtype, head_dim)
        for direction, head_dims in (("forward", (128, 256)), ("backward", (128,)))
        for dtype in ("float16", "bfloat16")
        for head_dim in head_dims
    ]
    + [
        Variant("flash", direction, 75, "float16", head_dim)
        for direction in ("forward", "backward")
        for head_dim in (32, 64, 128, 256)
    ]
    + [
        Variant("efficient", direction, path, dtype, head_dim)
        for direction in ("forward", "backward")
        for path, dtypes, head_dims in (
            (70, ("float32", "float16"), (32, 64, 128)),
            (75, ("float32", "float16"), (64,)),  # 64 KB of shared memory
            (80, ("float32",), (32, 64, 128)),
            (80, ("float16", "bfloat16"), (128,)),  # for what flash's kernels do not take
        )
        for dtype in dtypes
        for head_dim in head_dims
    ]
    + [
        Variant("efficient", "decode", path, dtype, head_dim)
        for path, dtypes in ((70, ("float32", "float16")), (75, ("float32", "float16")), (80, ("float32",)))
        for dtype in dtypes
        for head_dim in (64, 128, 256)
    ]
)


@dataclass(frozen=True)
class Target:
    """A chip to compile for, as TORCH_CUDA_ARCH_LIST spells it: 8.0, 9.0a, 9.0+PTX."""

    capability: int
    suffix: str
    ptx: bool

    @staticmethod
    def parse(text: str) -> Target:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {text!r}; expected entries such as 8.0, 9.0a or 9.0+PTX")
        major, minor, suffix, ptx = match.groups()
        return Target(int(major) * 10 + int(minor), suffix, bool(ptx))

    @property
    def gencode(self) -> list[str]:
        arch = f"{self.capability}{self.suffix}"
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
        return flags


def targets_of(variant: Variant, targets: list[Target], all_paths: bool) -> list[Target]:
    """The chips for which this code path is compiled: those whose newest path it is, or all that can run it."""
    chosen = []
    for target in targets:
        if variant.path == HOPPER:
            chosen += [Target(90, "a", False)] * (target.capability == 90)
            continue
        newest = newest_path(variant, target)
        if newest == variant.path or (all_paths and variant.path <= target.capability):
            chosen.append(machine_code_for(variant.path, target))
    return merged(chosen)


def newest_path(variant: Variant, target: Target) -> int | None:
    """The newest code path that takes every call, for a chip, among variants of the same backend and direction."""
    same = [v.path for v in VARIANTS if (v.backend, v.direction) == (variant.backend, variant.direction)]
    return max((path for path in same if path <= target.capability and path != HOPPER), default=None)


def merged(targets: list[Target]) -> list[Target]:
    chosen: dict[tuple[int, str], Target] = {}
    for target in targets:
        same = chosen.get((target.capability, target.suffix), target)
        chosen[target.capability, target.suffix] = Target(target.capability, target.suffix, target.ptx or same.ptx)
    return list(chosen.values())


def machine_code_for(path: int, target: Target) -> Target:
    """What is compiled for a chip. ptxas 13.0 spills registers when it schedules the sm80 path for any chip but sm80
    and sm90, so sm86, sm87 and sm89 get sm80's machine code, which they run, and newer chips than Hopper its PTX."""
    if path == 80 and target.capability // 10 == 8:
        return Target(80, "", target.ptx)
    if path == 80 and target.capability >= 100:
        return Target(90, "", True)
    return target


def cpp_bool(value: bool) -> str:
    return "true" if value else "false"


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the generated files")
    parser.add_argument("--archs", default="", help="TORCH_CUDA_ARCH_LIST; empty: a build without CUDA kernels")
    parser.add_argument("--all-paths", action="store_true", help="also the older paths of every chip, for tests")
    args = parser.parse_args()
    targets = [Target.parse(text) for text in re.split(r"[ ;,]+", args.archs) if text]

    declarations, rows, cmake = [], [], ["set(SDPA_KERNEL_LIBRARIES)"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for v in VARIANTS:
        compiled = targets_of(v, targets, args.all_paths)
        launch = "nullptr"
        if compiled:
            launch = v.name
            declarations.append(f"{v.signature};")
            source = args.out / f"{v.name}.cu"
            write_if_changed(source, v.source)
            flags = tuple(flag for target in compiled for flag in target.gencode)
            groups.setdefault(flags, []).append(source.as_posix())
        listed = ", ".join(f"{{{t.capability}, {cpp_bool(t.suffix == 'a')}, {cpp_bool(t.ptx)}}}" for t in compiled)
        forward, backward = ("nullptr", launch) if v.direction == "backward" else (launch, "nullptr")
        rows.append(
            f'{{"{v.name}", Backend::k{v.backend.capitalize()}, Direction::k{v.direction.capitalize()}, {v.path}, '
            f"DType::{CPP_DTYPE[v.dtype]}, {v.head_dim}, {cpp_bool(v.sums_grad_query)}, {forward}, {backward}, "
            f"{{{listed}}}}},"
        )
    # The small kernels beside the variants run on every chip.
    chips = merged([machine_code_for(80, target) for target in targets])
    flags = tuple(flag for target in chips for flag in target.gencode)
    if flags:
        sources = [(Path(__file__).parent / "attn" / f"{name}.cu").as_posix() for name in OTHER_KERNELS]
        groups.setdefault(flags, []).extend(sources)
    for number, (flags, sources) in enumerate(groups.items()):
        name = f"sdpa_kernels_{number}"
        cmake.append(f"add_library({name} OBJECT\n  " + "\n  ".join(sources) + ")")
        cmake.append(f'target_compile_options({name} PRIVATE "' + '" "'.join(flags) + '")')
        cmake.append(f"list(APPEND SDPA_KERNEL_LIBRARIES {name})")
    write_if_changed(args.out / "variants.cmake", "\n".join(cmake) + "\n")
    write_if_changed(
        args.out / "variants.inc",
        "// Written by csrc/kernels/variants.py.\n#if defined(SDPA_WITH_CUDA)\n"
        + "\n".join(declarations)
        + "\n#endif\nconst std::vector<Variant>& variants() {\n  static const std::vector<Variant> table = {\n    "
        + "\n    ".join(rows)
        + "\n  };\n  return table;\n}\n",
    )


if __name__ == "__main__":
    main()
