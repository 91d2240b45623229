"""Puts sdpa in the place of torch's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.backends.cuda
import torch.nn.attention
import torch.nn.functional
from torch import Tensor

from . import backends
from .functional import scaled_dot_product_attention

_torch_attention = torch.nn.functional.scaled_dot_product_attention
_torch_sdpa_kernel = torch.nn.attention.sdpa_kernel
# Our switch, and torch's setter and getter of the same name: both are set, for what goes to torch's own function.
_SWITCHES = ("flash", "mem_efficient", "math")
_torch_enable: dict[str, Callable[[bool], None]] = {
    name: getattr(torch.backends.cuda, f"enable_{name}_sdp") for name in _SWITCHES
}
_torch_enabled: dict[str, Callable[[], bool]] = {
    name: getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in _SWITCHES
}


def _ours(t: Any) -> bool:
    """Whether our ops take a tensor of this kind; nested and sparse ones and other devices are torch's."""
    return not isinstance(t, Tensor) or (
        not t.is_nested and t.layout == torch.strided and t.device.type in ("cpu", "cuda", "meta")
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` while :func:`patch_torch` is in force."""
    ours = _ours(query) and _ours(key) and _ours(value) and _ours(attn_mask)
    return (scaled_dot_product_attention if ours else _torch_attention)(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _enable(name: str) -> Callable[[bool], None]:
    def enable(enabled: bool) -> None:
        getattr(backends, f"enable_{name}_sdp")(enabled)
        _torch_enable[name](enabled)

    return enable


@contextmanager
def _sdp_kernel(
    enable_flash: bool = True,
    enable_math: bool = True,
    enable_mem_efficient: bool = True,
    enable_cudnn: bool = True,
) -> Iterator[None]:
    before = {name: enabled() for name, enabled in _torch_enabled.items()}
    wanted = {"flash": enable_flash, "math": enable_math, "mem_efficient": enable_mem_efficient}
    with backends.sdp_kernel(enable_flash, enable_math, enable_mem_efficient):
        try:
            for name, enabled in wanted.items():
                _torch_enable[name](enabled)
            yield
        finally:
            for name, enabled in before.items():
                _torch_enable[name](enabled)


@contextmanager
def _sdpa_kernel(wanted: Any, set_priority: bool = False) -> Iterator[None]:
    every = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    names = [backend.name for backend in every]
    theirs = [torch.nn.attention.SDPBackend.__members__[name] for name in names]
    ours = [backends.SDPBackend[name] for name in names if name in backends.SDPBackend.__members__]
    with backends.sdpa_kernel(ours, set_priority), _torch_sdpa_kernel(theirs, set_priority):
        yield


_REPLACED: list[tuple[ModuleType, str, Any]] = [
    (torch.nn.functional, "scaled_dot_product_attention", _attention),
    (torch.nn.attention, "sdpa_kernel", _sdpa_kernel),
    (torch.backends.cuda, "sdp_kernel", _sdp_kernel),
    (torch.backends.cuda, "SDPAParams", backends.SDPAParams),
    (torch.backends.cuda, "can_use_flash_attention", backends.can_use_flash_attention),
    (torch.backends.cuda, "can_use_efficient_attention", backends.can_use_efficient_attention),
    *[(torch.backends.cuda, f"enable_{name}_sdp", _enable(name)) for name in _SWITCHES],
    *[(torch.backends.cuda, f"{name}_sdp_enabled", getattr(backends, f"{name}_sdp_enabled")) for name in _SWITCHES],
]


class patch_torch:
    """Makes ``F.scaled_dot_product_attention`` and the switches of torch lead to sdpa, for the whole process.

    In force from the call on; undone by :meth:`undo`, or at the end of a ``with`` block::

        sdpa.patch_torch()             # from here on

        with sdpa.patch_torch():       # only inside
            model(x)

    Replaced are ``torch.nn.functional.scaled_dot_product_attention``, ``torch.nn.attention.sdpa_kernel`` and in
    ``torch.backends.cuda`` ``sdp_kernel``, ``SDPAParams``, ``can_use_*_attention``, ``enable_*_sdp`` and
    ``*_sdp_enabled`` of flash, mem_efficient and math. Nested and sparse tensors and devices other than CPU and CUDA
    go to torch's own function. A name imported from torch before the call keeps its old meaning.
    """

    def __init__(self) -> None:
        self._saved = [(module, name, getattr(module, name)) for module, name, _ in _REPLACED]
        for module, name, replacement in _REPLACED:
            setattr(module, name, replacement)

    def undo(self) -> None:
        """Puts back what stood there before; a second call does nothing."""
        for module, name, original in self._saved:
            setattr(module, name, original)
        self._saved = []

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
