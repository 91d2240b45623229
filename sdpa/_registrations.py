"""Fake kernels and batching rules of the ops. They do not depend on the backend that will be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Dims = tuple[int | None, ...]
Function = TypeVar("Function", bound=Callable[..., Any])

# torch's own are not typed.
_register_fake: Callable[[str], Callable[[Function], Function]] = torch.library.register_fake
_register_vmap: Callable[[str], Callable[[Function], Function]] = torch.library.register_vmap
_check: Callable[[bool, Callable[[], str]], None] = torch._check
_broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes


def _empty_in_layout_of(query: Tensor, sizes: list[int]) -> Tensor:
    """A dense tensor in the query's order of dims; mirrors empty_in_layout_of of csrc/ops/inputs.cpp."""
    order = list(range(len(sizes)))
    own_lead = query.dim() == len(sizes) and all(
        query.size(d) == sizes[d] and not (query.stride(d) == 0 and query.size(d) > 1) for d in order[:-1]
    )
    if own_lead:
        order[:-1] = sorted(order[:-1], key=query.stride, reverse=True)
    return torch.empty_permuted(sizes, order, dtype=query.dtype, device=query.device)


def _lead(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[int]:
    def lead(t: Tensor) -> list[int]:
        sizes = list(t.shape[:-2])
        if enable_gqa and t is not query:
            sizes[-1] = query.size(-3)
        return sizes

    return list(_broadcast_shapes(lead(query), lead(key), lead(value)))


def _accumulation_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> list[int]:
    """What `check` of csrc/ops/inputs.cpp refuses, but for sizes that are symbolic: a guard for each costs recompiles.

    Returns the leading dims.
    """

    def need(holds: bool, text: str) -> None:
        if not holds:
            raise RuntimeError(f"scaled_dot_product_attention: {text}")

    tensors = {"query": query, "key": key, "value": value} | ({} if attn_mask is None else {"attn_mask": attn_mask})

    def got(what: Callable[[Tensor], Any]) -> str:
        return ", ".join(f"{name} {what(t)}" for name, t in tensors.items())

    def sizes() -> str:
        return got(lambda t: list(t.shape))

    three = (query, key, value)
    hint = "" if enable_gqa else " (with fewer key than query heads, pass enable_gqa=True)"
    need(all(t.dim() >= 2 for t in three), f"query, key and value need 2 dims or more, got {sizes()}")
    need(query.dtype in _TYPES, f"query must be float64, float32, float16 or bfloat16, got {query.dtype}")
    need(
        all(t.dtype == query.dtype for t in three),
        f"query, key and value must have one dtype, got {got(lambda t: t.dtype)}",
    )
    need(
        all(t.device == query.device for t in tensors.values()),
        f"all tensors must be on one device, got {got(lambda t: t.device)}",
    )
    # A symbolic float is not looked at.
    need(type(dropout_p) is not float or 0 <= dropout_p <= 1, f"dropout_p must be in [0, 1], got {dropout_p}")
    largest = torch.finfo(torch.promote_types(query.dtype, torch.float32))
    need(
        type(scale) is not float or abs(scale) <= largest.max,
        f"scale must be finite in {largest.dtype}, in which scores are computed, got {scale}",
    )
    _check(
        query.size(-1) == key.size(-1),
        lambda: f"scaled_dot_product_attention: query and key must have the same head dim E, got {sizes()}",
    )
    _check(
        key.size(-2) == value.size(-2),
        lambda: f"scaled_dot_product_attention: key and value must have the same length S, got {sizes()}",
    )
    if enable_gqa:
        need(all(t.dim() > 2 for t in three), f"enable_gqa needs a heads dim (3 dims or more), got {sizes()}")
        heads = [t.size(-3) for t in three]
        if all(type(n) is int for n in heads):
            need(
                all(heads[0] == 0 if n == 0 else heads[0] % n == 0 for n in heads[1:]),
                f"enable_gqa needs query heads to be a multiple of key and value heads, got {sizes()}",
            )
            need(
                heads[1] == heads[2] or 1 in heads[1:],
                f"key and value must have the same number of heads (or one), got {sizes()}",
            )
    try:
        lead = _lead(query, key, value, enable_gqa)
    except RuntimeError:
        need(
            any(type(n) is not int for t in three for n in t.shape),
            f"the leading dims do not broadcast: {sizes()}{hint}",
        )
        raise
    if attn_mask is not None:
        need(not is_causal, f"is_causal=True and attn_mask (of shape {list(attn_mask.shape)}) must not both be set")
        need(
            attn_mask.dtype in (torch.bool, *_TYPES)
            and (attn_mask.dtype != torch.float64 or query.dtype == torch.float64),
            "attn_mask must be bool, float32, float16 or bfloat16 (float64 with float64 inputs), "
            f"got {attn_mask.dtype} with query {query.dtype}",
        )
        full = [*lead, query.size(-2), key.size(-2)]
        pairs = list(zip(reversed(attn_mask.shape), reversed(full), strict=False))
        need(
            attn_mask.dim() <= len(full)
            and all(type(n) is not int or type(whole) is not int or n in (1, whole) for n, whole in pairs),
            f"attn_mask of shape {list(attn_mask.shape)} does not broadcast to (N, ..., L, S) = {full}",
        )
    return lead


@_register_fake("sdpa::attention_forward")
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backends: int,
    grad_wanted: bool = False,
    mask_grad_wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead = _check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    output = _empty_in_layout_of(query, [*lead, query.size(-2), value.size(-1)])
    lse_shape = [*lead, query.size(-2)] if grad_wanted else [0]
    return (
        output,
        query.new_empty(lse_shape, dtype=_accumulation_type(query)),
        query.new_empty(lse_shape, dtype=_accumulation_type(query)),
        query.new_empty([1 if dropout_p > 0 else 0], dtype=torch.int64),
    )


@_register_fake("sdpa::attention_backward")
def _backward_fake(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    logsumexp_rest: Tensor,
    seed: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backends: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    lead = _lead(query, key, value, enable_gqa)
    heads = lead[-1] if lead else 0
    key_heads = max(key.size(-3) if key.dim() > 2 else 1, value.size(-3) if value.dim() > 2 else 1)

    def like(t: Tensor, want: bool) -> Tensor:
        if not want:
            return query.new_empty([0])
        expanded = [*lead[:-1], heads if t is query else key_heads] if lead else []
        own_lead = list(t.shape[:-2]) == expanded
        return torch.empty_like(t) if own_lead else t.new_empty(t.shape)

    mask = attn_mask if attn_mask is not None and wanted[3] and attn_mask.dtype != torch.bool else None
    return (
        like(query, wanted[0]),
        like(key, wanted[1]),
        like(value, wanted[2]),
        query.new_empty([0]) if mask is None else mask.new_empty(mask.shape),
    )


# Batching: the vmapped dim becomes the outermost leading dim of every tensor (a view; what is not batched is expanded,
# which the ops do not copy), and dims of 1 line the examples' leading dims up behind it.


def _fold(t: Tensor | None, dim: int | None, rank: int, size: int) -> Tensor | None:
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.reshape(size, *[1] * (rank + 1 - t.dim()), *t.shape[1:])


def _example_shape(t: Tensor, dim: int | None) -> list[int]:
    return [n for d, n in enumerate(t.shape) if d != dim]


def _check_randomness(info: Any, dropout_p: float) -> None:
    if dropout_p > 0 and info.randomness != "different":
        raise RuntimeError(
            "vmap over scaled_dot_product_attention with dropout draws a different mask for each example: "
            f"pass randomness='different' to vmap (got {info.randomness!r})"
        )


def _rank(tensors: tuple[Tensor | None, ...], dims: Dims) -> int:
    # At least 3: with enable_gqa dim -3 is the heads, and the batch must not stand there.
    return max(3, *(len(_example_shape(t, d)) for t, d in zip(tensors, dims, strict=True) if t is not None))


# One seed for all examples: as where the forward folds them into the batch, each has numbers of its own under it.


@_register_vmap("sdpa::_dropout_seed")
def _seed_vmap(info: Any, in_dims: Dims, rows: Tensor) -> tuple[Tensor, None]:
    _check_randomness(info, 1.0)
    return torch.ops.sdpa._dropout_seed(rows), None


@_register_vmap("sdpa::_dropout_keep")
def _keep_vmap(info: Any, in_dims: Dims, seed: Tensor, rows: Tensor, S: int, dropout_p: float) -> tuple[Tensor, int]:
    assert in_dims[0] is None and in_dims[1] is not None
    return torch.ops.sdpa._dropout_keep(seed, rows.movedim(in_dims[1], 0), S, dropout_p), 0


@_register_vmap("sdpa::attention_forward")
def _forward_vmap(
    info: Any,
    in_dims: Dims,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    *rest: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    _check_randomness(info, dropout_p)
    tensors, dims, size = (query, key, value, attn_mask), in_dims[:4], info.batch_size
    rank = _rank(tensors, dims)
    folded = [_fold(t, d, rank, size) for t, d in zip(tensors, dims, strict=True)]
    output, lse, rest_of_lse, seed = torch.ops.sdpa.attention_forward(*folded, dropout_p, *rest)
    inputs_rank = max(len(_example_shape(t, d)) for t, d in zip(tensors[:3], dims[:3], strict=True) if t is not None)
    output = output.reshape(size, *output.shape[output.dim() - inputs_rank :])
    if lse.dim() == 1:  # not asked for
        return (output, lse, rest_of_lse, seed), (0, None, None, None)
    rows = (size, *lse.shape[lse.dim() - inputs_rank + 1 :])
    return (output, lse.reshape(rows), rest_of_lse.reshape(rows), seed), (0, 0, 0, None)


@_register_vmap("sdpa::attention_backward")
def _backward_vmap(
    info: Any,
    in_dims: Dims,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    logsumexp_rest: Tensor,
    *rest: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    tensors, size = (grad_output, query, key, value, attn_mask, output), info.batch_size
    if rest[1] > 0 and in_dims[5] is None:  # dropout that was drawn once for all examples: not to be folded
        args = (*tensors, logsumexp, logsumexp_rest)
        calls = [
            [t if t is None or d is None else t.select(d, i) for t, d in zip(args, in_dims[:8], strict=True)]
            for i in range(size)
        ]
        each = [torch.ops.sdpa.attention_backward(*call, *rest) for call in calls]
        return tuple(torch.stack(grads) for grads in zip(*each, strict=True)), (0, 0, 0, 0)
    rank = _rank(tensors, in_dims[:6])
    folded = [_fold(t, d, rank, size) for t, d in zip(tensors, in_dims[:6], strict=True)]
    rows = [_fold(t, d, rank - 1, size) for t, d in zip((logsumexp, logsumexp_rest), in_dims[6:8], strict=True)]
    grads = torch.ops.sdpa.attention_backward(*folded, *rows, *rest)
    results: list[Tensor] = []
    out_dims: list[int | None] = []
    for grad, t, dim in zip(grads, tensors[1:5], in_dims[1:5], strict=True):
        wanted = t is not None and grad.dim() > 1
        results.append(grad.reshape(size, *_example_shape(t, dim)) if wanted and t is not None else grad)
        out_dims.append(0 if wanted else None)
    return tuple(results), tuple(out_dims)
