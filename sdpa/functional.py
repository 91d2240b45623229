"""The function that stands in for ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from . import _C
from .backends import current_switches


def resolve_bias(bias: CausalBias, is_causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """The attn_mask and is_causal that say what torch's bias says: its own memory is not filled."""
    L, S = bias.seq_len_q, bias.seq_len_kv
    if is_causal:
        raise RuntimeError(f"scaled_dot_product_attention: is_causal=True and a CausalBias ({L}, {S}) are both set")
    if L == S or bias.variant == CausalVariant.UPPER_LEFT:
        return None, True
    return torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L), False


def _check_kinds(**arguments: object) -> None:
    """Names the argument that is no dense tensor."""
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            if t is not None or name != "attn_mask":
                raise TypeError(f"scaled_dot_product_attention: {name} must be a Tensor, got {t!r}") from None
        elif t.is_nested or t.layout != torch.strided:
            kind = "a nested one" if t.is_nested else f"one of layout {t.layout}"
            raise TypeError(f"scaled_dot_product_attention: {name} must be a dense tensor, got {kind}") from None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Computes ``dropout(softmax(query @ key^T * scale + attn_mask)) @ value``.

    Args:
        query: (N, ..., L, E); float64, float32, float16 or bfloat16.
        key: (N, ..., S, E), the query's dtype and device. Leading dims broadcast.
        value: (N, ..., S, Ev), likewise.
        attn_mask: broadcasts to (N, ..., L, S). bool: True takes part. float16, bfloat16 or float32 (whatever the
            query's dtype): added to the scaled scores. Read in place; its gradient has its own shape. The causal biases
            of ``torch.nn.attention.bias`` are taken as well.
        dropout_p: probability in [0, 1] to drop a softmax weight; drawn from torch's generator.
        is_causal: query i sees keys j <= i, also when L != S. Not together with ``attn_mask``.
        scale: any number that is finite in float32 (in float64 with such inputs); 1 / sqrt(E) if None.
        enable_gqa: query heads (dim -3) may be a multiple of the key and value heads, which are not copied.

    Returns:
        (N, ..., L, Ev) in the query's dtype and memory layout. A row with nothing to attend to is 0.

    Raises:
        RuntimeError: for inputs that do not fit together, with their values; "No available kernel. Aborting
            execution." with a warning for each reason if every backend that :func:`sdpa.sdpa_kernel` allows refuses.

    Backends are tried in the order flash, memory-efficient, math; :func:`sdpa.explain` says which one takes a call and
    why. Sources: https://pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html,
    Dao 2023 (https://arxiv.org/abs/2307.08691), Rabe and Staats 2021 (https://arxiv.org/abs/2112.05682).
    """
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if has_torch_function(tensors):
        if isinstance(attn_mask, CausalBias):
            attn_mask, is_causal = resolve_bias(attn_mask, is_causal, query.device)
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        result: Tensor = handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return result
    if torch.compiler.is_compiling():
        output: Tensor = torch.ops.sdpa.attention_forward(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, current_switches()
        )[0]
        return output
    try:
        return _C.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, current_switches())
    except (TypeError, NotImplementedError):
        _check_kinds(query=query, key=key, value=value, attn_mask=attn_mask)
        raise
