"""Small calls of every kind of kernel, for compute-sanitizer, which is too slow for the test suite:

compute-sanitizer --tool memcheck python tests/sanitize.py
compute-sanitizer --tool racecheck python tests/sanitize.py --few

The second needs a build with NVCC_APPEND_FLAGS=-DSDPA_RACECHECK (csrc/kernels/arch/barrier.h says why) and
CCACHE_DISABLE=1, since ccache does not look at the former. Such a build takes the GPU to have 6 multiprocessors, so
that a few heads give all of them work. --part 3/16 makes every 16th call from the third on, for processes side by side.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess

import torch

import sdpa
from sdpa import SDPBackend

FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def call(which, path, dtype, head_dim, L, S, heads, kind, tf32=False, deterministic=False):
    """Forward with and without gradients, and backward. path: SDPA_FORCE_ARCH, None for the newest."""
    os.environ.pop("SDPA_FORCE_ARCH", None)
    if path is not None:
        os.environ["SDPA_FORCE_ARCH"] = str(path)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    query, key, value = (torch.randn(1, heads, n, head_dim, device="cuda", dtype=dtype) for n in (L, S, S))
    mask = None
    if kind == "bool":
        mask = torch.rand(1, 1, L, S, device="cuda") > 0.3
    elif kind == "padding":
        mask = torch.arange(S, device="cuda")[None, None, None] < S * 3 // 4
    elif kind in ("bias", "shared bias", "short bias"):
        shape = (1, heads if kind == "bias" else 1, L, S)
        mask = torch.randn(shape, device="cuda", dtype=dtype if kind == "short bias" else FLOAT, requires_grad=True)
    elif kind == "strided":
        query, key, value = (torch.cat((t, t[..., :1]), -1)[..., 1:] for t in (query, key, value))
    elif kind == "ranges":
        query, key, value = query * 1e-5, key * 1e6, value * 1e-9
    tensors = [t.requires_grad_() for t in (query, key, value)]
    kwargs = {"dropout_p": 0.2 * (kind == "dropout"), "is_causal": kind == "causal"}
    with sdpa.sdpa_kernel(which):
        output = sdpa.scaled_dot_product_attention(*tensors, mask, **kwargs)
        output.backward(torch.randn_like(output))
        with torch.no_grad():
            sdpa.scaled_dot_product_attention(*tensors, mask, **kwargs)
    torch.cuda.synchronize()


def calls(few):
    # So that every multiprocessor has work, and so that it has not: there are kernels for both. `blocks`: as many as
    # run at one time, or twice that.
    many, little, blocks = (8, 1, 12) if few else (80, 5, 264)
    for D in (32, 64, 96, 128, 160, 192, 256):
        dtype = HALF if D == 32 else BRAIN
        kinds = ("plain", "causal", "dropout") if few else ("plain", "causal", "bool", "bias", "dropout", "padding")
        yield from ((FLASH, 100, dtype, D, 300, 200, little, kind) for kind in (*kinds, "strided", "shared bias"))
        yield FLASH, 100, BRAIN, D, 513, 512, many, "causal"
        if D in (64, 128, 192, 256):  # Hopper's own
            heads_and_kinds = [(n, kind) for n in (little, many) for kind in ("plain", "causal")]
            yield from ((FLASH, None, dtype, D, 1030, 200, n, kind) for n, kind in heads_and_kinds)
        # Lengths that whole 16-byte chunks and tensor copies want, and masks that are copied like that.
        kinds = ("plain", "causal", "bool", "short bias")
        yield from ((FLASH, 100, dtype, D, 256, 320, little, kind) for kind in kinds)
        yield from ((FLASH, 100, dtype, D, 256, 320, blocks, kind) for kind in kinds[: 2 if few else 4])
        yield FLASH, None, dtype, D, 600, 640, blocks, "bool"  # its blocks are looked through
        if D in (96, 128):
            kinds_of_ring = ("plain", "causal", "padding", "dropout")
            yield from ((FLASH, 80, BRAIN, D, 300, 1100, many, kind) for kind in kinds_of_ring)
        for kind in ("plain",) if few else ("plain", "shared bias", "bool"):
            yield FLASH, None, BRAIN, D, 130, 200, 3, kind, False, True
    # Where a multiprocessor of these chips has room for other blocks.
    for D in (32, 64, 80, 96, 128, 160, 192, 256):
        kinds = ("causal", "dropout", "bool") if few else ("causal", "bool", "bias", "short bias", "dropout", "padding")
        for path in (80, 86):
            yield from ((FLASH, path, BRAIN, D, 200, 260, many, kind) for kind in (*kinds, "strided"))
            yield from ((FLASH, path, BRAIN, D, 256, 320, heads, "plain") for heads in (little, blocks))
    for D in (64, 160, 256) if few else (32, 64, 128, 160, 256):
        kinds = ("plain", "bias") if few else ("plain", "bool", "bias", "shared bias", "dropout", "padding")
        yield from ((FLASH, 75, HALF, D, 200, 140, 3, kind) for kind in kinds)
        yield from ((FLASH, 75, HALF, D, 100, 140, 3, kind, False, True) for kind in ("causal", "shared bias"))
    for D in (64, 128, 200) if few else (32, 64, 128, 200, 300):
        for tf32 in (False, True):
            kinds = ("plain", "causal", "bool") if few else ("plain", "causal", "bool", "bias", "dropout", "ranges")
            yield from ((EFFICIENT, None, FLOAT, D, 150, 170, 3, kind, tf32) for kind in kinds)
            yield EFFICIENT, None, FLOAT, D, 300, 200, many, "causal", tf32
        yield EFFICIENT, None, FLOAT, D, 150, 170, 3, "plain", False, True
    for kind in ("plain", "causal", "bias", "dropout"):
        yield from ((MATH, None, FLOAT, D, 160, 170, 3, kind) for D in (16, 32, 64, 80, 256))
        yield from ((MATH, None, dtype, 64, 150, S, 3, kind) for dtype in (HALF, BRAIN) for S in (64, 300, 3000, 9000))
    for D in (64, 128, 256):  # without gradients such few queries have kernels of their own
        yield from ((FLASH, path, BRAIN, D, 3, 700, heads, "bool") for path in (None, 86) for heads in (little, many))
        yield EFFICIENT, None, FLOAT, D, 3, 700, little, "bool"
        if not few:
            for path in (70, 75):
                yield from ((EFFICIENT, path, dtype, D, 3, 700, little, "bool") for dtype in (HALF, FLOAT))
    if not few:
        for path, dtype in ((70, HALF), (70, FLOAT), (75, FLOAT), (75, HALF)):
            yield from ((EFFICIENT, path, dtype, D, 90, 130, 3, "bias") for D in (32, 64, 128, 256))
        yield EFFICIENT, None, HALF, 512, 100, 130, 2, "plain"


def plain_name(kernel):
    """Without its namespaces, parameters and 16-bit type."""
    name, depth = "", 0
    for letter in re.sub(r"\(anonymous namespace\)::|sdpa::|void | ", "", kernel.strip()):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            break
        name += letter
    return re.sub(r"__nv_bfloat16|__half", "16-bit", name)


def compiled_kernels():
    usage = subprocess.run(["cuobjdump", "-res-usage", sdpa._C.__file__], capture_output=True, text=True, check=True)
    mangled = re.findall(r"Function (\w+):", usage.stdout)
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return {plain_name(line) for line in names.stdout.splitlines()}


def launched_kernels(some):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for arguments in some:
            call(*arguments)
    return {plain_name(event.name) for event in profile.events()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="fewer calls, for racecheck")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth call, from the Ith on")
    parser.add_argument("--missing", action="store_true", help="name the kernels of this build that no call launches")
    options = parser.parse_args()
    first, every = (int(number) for number in options.part.split("/"))
    if not 1 <= first <= every:
        parser.error(f"--part {options.part}: parts are counted from 1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    some = list(calls(options.few))[first - 1 :: every]
    if options.missing:
        print(*sorted(compiled_kernels() - launched_kernels(some)), sep="\n")
        return
    for arguments in some:
        print(*arguments, flush=True)
        call(*arguments)
    print(f"{len(some)} calls")


if __name__ == "__main__":
    main()
