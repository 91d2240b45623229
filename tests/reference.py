"""What every backend is held against: the seed's formula in float64, and in the inputs' own dtype (eager).

A result passes if its error against float64 is at most twice eager's. `check` runs one call, forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sdpa
from sdpa import SDPBackend

BACKENDS = {"cpu": [SDPBackend.MATH], "cuda": list(SDPBackend)}
INF = math.inf
# Units in the last place, at the reference's magnitude, that any result may be off: eager is sometimes exact by luck.
# In float64 the reference itself is as inexact as what it judges.
FLOOR = {torch.float64: 64, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Tensor | None = None,
    rescale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Output and LSE in the inputs' dtype; `keep` (lead..., L, S) says which weights dropout leaves."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(max(query.size(-1), 1)) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril().logical_not(), -INF)
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -INF) if attn_mask.dtype == torch.bool else scores + cast(attn_mask, scores)
        )
    hidden = (scores == -INF).all(-1, keepdim=True)  # rows with nothing to attend to
    lse = scores.masked_fill(hidden, 0).logsumexp(-1).masked_fill(hidden[..., 0], -INF)
    weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    if keep is not None:
        weights = weights * keep * rescale
    return weights.to(value.dtype) @ value, lse


def cast(mask: Tensor, like: Tensor) -> Tensor:
    """In the scores' dtype; what is finite stays so."""
    narrow = mask.to(like.dtype)
    return torch.where(narrow.isinf() & mask.isfinite(), torch.finfo(like.dtype).min, narrow)


def eager(*args: Any, **kwargs: Any) -> Tensor:
    return formula(*args, **kwargs)[0]


def dropout_threshold(p: float) -> int:
    return int((1.0 - float(np.float32(p))) * 32768 + 0.5)


def dropout_rescale(p: float) -> float:
    """The inverse of the chance to be kept, which is a multiple of 1 / 32768."""
    return 32768 / dropout_threshold(p) if dropout_threshold(p) else 0.0


def dropout_keep(seed: int, p: float, batch_heads: int, rows: int, columns: int) -> Tensor:
    """(batch_heads, rows, columns), True where a score is kept: csrc/kernels/attn/dropout.h written again in numpy."""
    batch_head, row, col = np.meshgrid(*map(np.arange, (batch_heads, rows, columns)), indexing="ij")
    u32 = np.uint64(0xFFFFFFFF)
    low, high = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)
    c0, c1, c3 = (n.astype(np.uint64) for n in (batch_head, row // 32, col // 32 * 64 + row % 8 * 8 + col % 8))
    c0, c2 = c0 ^ low, np.full_like(c0, high)
    for number in range(7):
        k0, k1 = (np.uint64(number * key & 0xFFFFFFFF) for key in (0x9E3779B9, 0xBB67AE85))
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & u32, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & u32
    word = np.choose(row // 16 % 2 * 2 + col // 16 % 2, (c0, c1, c2, c3)).astype(np.int64)
    byte = row // 8 % 2 + col // 8 % 2 * 2
    number = (word >> 8 * byte) % 128 * 256 + (word >> (byte + 3) % 4 * 8) % 256
    kept = dropout_threshold(p)
    return torch.from_numpy(number < kept if kept < 16384 else number >= 32768 - kept)


def upcoming_seed(device: str | torch.device) -> int:
    """The seed that the next call with dropout will draw from torch's generator."""
    with torch.random.fork_rng(devices=["cuda"] if torch.device(device).type == "cuda" else []):
        return int(torch.empty(1, dtype=torch.int64, device=device).random_())


def cancellation_noise(
    tensors: list[Tensor],
    grad_output: Tensor,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Tensor | None = None,
    rescale: float = 1.0,
    **kwargs: Any,
) -> list[Tensor]:
    """What arithmetic leaves of a gradient that is zero by cancellation alone (of a mask that is constant along the
    keys, of a query with one key). Its terms are of float32, and of the output, rounded to its dtype for the backward.
    """
    q, k, v, *mask = (t.detach().double() if t.is_floating_point() else t for t in tensors)
    scale = 1 / math.sqrt(max(q.size(-1), 1)) if scale is None else scale
    unit = torch.eye(k.size(-2), dtype=torch.float64, device=k.device).expand(*k.shape[:-2], -1, -1)
    weights = eager(q, k, unit, *mask, scale=scale, enable_gqa=enable_gqa, **kwargs)
    kept = weights if keep is None else weights * keep * rescale
    output = kept @ (v.repeat_interleave(q.size(-3) // v.size(-3), -3) if enable_gqa else v)
    leaves = [t.abs().requires_grad_() for t in (q, k, v)]
    leaves += [torch.zeros_like(m, dtype=torch.float64).requires_grad_() for m in mask]
    q, k, v, *mask = leaves
    if enable_gqa:
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    grad, own = grad_output.double().abs(), tensors[0].dtype
    sums = torch.float64 if own == torch.float64 else torch.float32
    error = FLOOR[sums] * torch.finfo(sums).eps
    by_output = weights * (grad * (kept @ v)).sum(-1, keepdim=True)
    rounded = weights * (grad * output.abs()).sum(-1, keepdim=True) * torch.finfo(own).eps / 2
    grad_scores = (error * ((grad @ v.mT) * kept + by_output) + rounded).detach()
    scores = q @ k.mT * abs(scale) + (mask[0] if mask else 0)
    total = (grad_scores * scores).sum() + error * (grad * (kept @ v)).sum()
    return list(torch.autograd.grad(total, leaves))


def assert_close_to_reference(
    actual: Tensor,
    reference: Tensor,
    eager: Tensor,
    what: str = "output",
    noise: Callable[[], Tensor] | None = None,
) -> None:
    """The rule. `noise`, which any result may be off besides, is asked for where the rest does not allow the error."""
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    dtype, unit = actual.dtype, FLOOR[actual.dtype] * torch.finfo(actual.dtype).eps
    actual, reference, eager = (t.detach().double() for t in (actual, reference, eager))
    finite = reference.isfinite()
    same = (actual == reference) | finite
    lost = finite & ~actual.isfinite()
    errors = [torch.where(finite, t, 0) for t in (actual - reference, eager - reference, reference)]
    norms = [torch.linalg.vector_norm(t, order) for order in (INF, 2) for t in errors]
    # All at once: on a GPU that tests share, each look at a number is a wait for one's turn.
    is_same, not_finite, *figures = torch.stack([same.all().double(), lost.sum().double(), *norms]).tolist()
    assert is_same, f"{what}: infinite elsewhere"
    assert not not_finite, f"{what}: {int(not_finite)} not finite"
    for name, order, (got, of_eager, size) in (
        ("largest error", INF, figures[:3]),
        ("norm of the error", 2, figures[3:]),
    ):
        allowed = 2 * of_eager + unit * size
        if noise is not None and not got <= allowed:
            allowed += float(torch.linalg.vector_norm(noise(), order))
        assert got <= allowed, (
            f"{what}: {name} {got:.3g}, allowed {allowed:.3g} ({dtype}; eager's {of_eager:.3g}, the reference's size "
            f"{size:.3g})"
        )


def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype).requires_grad_(grad)


def strided(t: Tensor, how: str) -> Tensor:
    """The same numbers in another memory layout."""
    grad = t.requires_grad
    t = t.detach()
    if how == "transposed":  # (N, L, H, E) seen as (N, H, L, E)
        t = t.transpose(-3, -2).contiguous().transpose(-3, -2)
    elif how == "columns":  # unit stride along the rows
        t = t.mT.contiguous().mT
    elif how == "step":  # every second element of wider rows
        t = torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]
    elif how == "odd":  # odd row strides from an odd offset, NaN around
        rows = t.shape[-2:]
        wide = torch.full((*t.shape[:-2], rows[0] + 1, rows[1] + 3 + rows[1] % 2), math.nan, dtype=t.dtype)
        wide = wide.to(t.device)
        wide[..., 1:, 1 : 1 + rows[1]] = t
        t = wide[..., 1:, 1 : 1 + rows[1]]
    elif how == "packed":  # as cut from one fused projection
        t = torch.cat([torch.full_like(t, math.nan), t, torch.full_like(t, math.nan)], -1)[
            ..., t.size(-1) : 2 * t.size(-1)
        ]
    else:
        assert how == "contiguous"
    return t.requires_grad_(grad)


def poison(device: str | torch.device, *shapes: tuple[int, ...]) -> None:
    """Fresh memory is often zeros, which hides what a kernel forgets to write. torch's allocators hand freed blocks
    back, so fill blocks of the sizes that the call will ask for with NaN and free them."""
    dtypes = (torch.float16, torch.float32, torch.float64)
    dirty = [torch.full(s, math.nan, dtype=d, device=device) for s in shapes for d in dtypes for _ in range(3)]
    del dirty


def require(backend: SDPBackend, *args: Any, **kwargs: Any) -> None:
    """Skips, with the reason, what a backend says it does not take."""
    with sdpa.sdpa_kernel(backend):
        explanation = sdpa.explain(*args, **kwargs)
    for row in explanation.backends:
        failed = [c for c in row.constraints if not c.holds]
        if row.backend == backend and failed:
            pytest.skip("; ".join(f"{c.name}: got {c.got}, needs {c.needs}" for c in failed))


def check(
    backend: SDPBackend | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Runs the call on a backend; holds output and the gradients of what requires them against the reference."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if backend is not None:
        require(backend, query, key, value, attn_mask, dropout_p, **kwargs)
    names = [n for n, t in zip(("query", "key", "value", "attn_mask"), tensors, strict=False) if t.requires_grad]

    def leaves(double: bool) -> list[Tensor]:
        return [
            (t.detach().double() if double and t.is_floating_point() else t.detach().clone()).requires_grad_(
                t.requires_grad
            )
            for t in tensors
        ]

    truth, naive = leaves(True), leaves(False)
    own = kwargs
    if dropout_p > 0:
        with torch.no_grad():
            shape = (*eager(*truth, **kwargs).shape[:-1], key.size(-2))
        keep = dropout_keep(upcoming_seed(query.device), dropout_p, math.prod(shape[:-2]), *shape[-2:])
        own = {**kwargs, "keep": keep.view(shape).to(query.device), "rescale": dropout_rescale(dropout_p)}
    expected, close = eager(*truth, **own), eager(*naive, **own)
    poison(query.device, expected.shape, *(t.shape for t in tensors), expected.shape[:-1])
    with sdpa.sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        output = sdpa.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
    assert output.dtype == query.dtype and output.device == query.device
    assert_close_to_reference(output, expected, close)
    if not names:
        assert not output.requires_grad
        return (output,)
    grad_output = torch.randn(expected.shape, dtype=torch.float64, device=query.device).to(query.dtype)
    wanted = [[t for t in leaf if t.requires_grad] for leaf in (tensors, truth, naive)]
    grads = torch.autograd.grad(output, wanted[0], grad_output)
    true = torch.autograd.grad(expected, wanted[1], grad_output.double())
    eagers = torch.autograd.grad(close, wanted[2], grad_output)
    noise = functools.cache(lambda: cancellation_noise(tensors, grad_output, **own))
    places = [i for i, t in enumerate(tensors) if t.requires_grad]
    for name, t, *three, i in zip(names, wanted[0], grads, true, eagers, places, strict=True):
        assert three[0].dtype == t.dtype
        assert_close_to_reference(*three, f"gradient of {name}", lambda i=i: noise()[i])
    return (output, *grads)
