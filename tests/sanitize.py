"""Small calls of every kind of kernel, for compute-sanitizer, which is too slow for the test suite:

compute-sanitizer --tool memcheck python tests/sanitize.py
compute-sanitizer --tool racecheck python tests/sanitize.py --few

The second needs a build with NVCC_APPEND_FLAGS=-DSDPA_RACECHECK (csrc/kernels/arch/barrier.h says why) and
CCACHE_DISABLE=1, since ccache does not look at the former.
"""

from __future__ import annotations

import argparse
import os

import torch

import sdpa
from sdpa import SDPBackend

FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
MANY_HEADS = 80  # so that every multiprocessor has work: there are kernels for that case


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
    elif kind == "bias":
        mask = torch.randn(1, heads, L, S, device="cuda", requires_grad=True)
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
    for D in (32, 64, 96, 128, 192, 256):
        dtype = HALF if D == 32 else BRAIN
        kinds = ("plain", "causal", "dropout") if few else ("plain", "causal", "bool", "bias", "dropout", "padding")
        yield from ((FLASH, None, dtype, D, 300, 200, 5, kind) for kind in kinds)
        yield FLASH, None, BRAIN, D, 513, 512, MANY_HEADS, "causal"
        if D in (96, 128):
            kinds_of_ring = ("causal", "padding", "dropout")
            yield from ((FLASH, 80, BRAIN, D, 300, 1100, MANY_HEADS, kind) for kind in kinds_of_ring)
        if not few:
            yield FLASH, 86, BRAIN, D, 200, 260, 5, "causal"
            yield FLASH, None, BRAIN, D, 130, 200, 3, "plain", False, True
    for D in (64, 80, 128, 192, 256):  # where a multiprocessor of these chips has room for other blocks
        kinds = ("causal", "dropout") if few else ("causal", "bool", "bias", "dropout", "padding")
        yield from ((FLASH, path, BRAIN, D, 200, 260, MANY_HEADS, kind) for path in (80, 86) for kind in kinds)
    for D in (160, 256) if few else (64, 128, 160, 256):
        kinds = ("plain", "bias") if few else ("plain", "bool", "bias", "dropout")
        yield from ((FLASH, 75, HALF, D, 200, 140, 3, kind) for kind in kinds)
        yield FLASH, 75, HALF, D, 100, 140, 3, "causal", False, True
    for D in (64, 128, 200) if few else (32, 64, 128, 200, 300):
        for tf32 in (False, True):
            kinds = ("plain", "causal", "bool") if few else ("plain", "causal", "bool", "bias", "dropout", "ranges")
            yield from ((EFFICIENT, None, FLOAT, D, 150, 170, 3, kind, tf32) for kind in kinds)
            yield EFFICIENT, None, FLOAT, D, 300, 200, MANY_HEADS, "causal", tf32
        yield EFFICIENT, None, FLOAT, D, 150, 170, 3, "plain", False, True
    yield from ((MATH, None, dtype, D, 150, 170, 3, "causal") for dtype, D in ((FLOAT, 80), (FLOAT, 256), (BRAIN, 64)))
    for D in (64, 128):  # without gradients such few queries have kernels of their own
        yield from ((FLASH, path, BRAIN, D, 3, 700, 5, "bool") for path in (None, 86))
        yield EFFICIENT, None, FLOAT, D, 3, 700, 5, "bool"
    if not few:
        for path, dtype in ((70, HALF), (70, FLOAT), (75, FLOAT), (75, HALF)):
            yield from ((EFFICIENT, path, dtype, D, 90, 130, 3, "bias") for D in (32, 64, 128))
        yield EFFICIENT, None, HALF, 512, 100, 130, 2, "plain"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="fewer calls, for racecheck")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    some = list(calls(parser.parse_args().few))
    for arguments in some:
        print(*arguments, flush=True)
        call(*arguments)
    print(f"{len(some)} calls")


if __name__ == "__main__":
    main()
