"""The switches: which backends may be taken, in which order. They belong to the thread that sets them."""

from __future__ import annotations

import enum
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.backends.cuda
import torch.nn.attention
from torch import Tensor

from . import _C


class SDPBackend(enum.IntEnum):
    """The backends of :func:`scaled_dot_product_attention`, with the names and numbers of ``torch.nn.attention``."""

    MATH = 0
    FLASH_ATTENTION = 1
    EFFICIENT_ATTENTION = 2


# The C++ selector's numbers (csrc/select/select.h), best first by default.
NUMBER = {SDPBackend.FLASH_ATTENTION: 1, SDPBackend.EFFICIENT_ATTENTION: 2, SDPBackend.MATH: 3}
BY_NUMBER = {int(backend): backend for backend in SDPBackend}  # a plain dict: torch.compile cannot trace SDPBackend(0)
BACKEND = {number: backend for backend, number in NUMBER.items()}


class _Switches:
    def __init__(self) -> None:
        self.value: int = _C.ALL_BACKENDS


class _Thread(threading.local):
    def __init__(self) -> None:  # once per thread
        self.switches = _Switches()


# The only place where the switches are. torch.compile guards on an attribute of a plain object, and writes it where the
# compiled code ends or breaks; what is assigned to the threading.local itself it loses.
_thread = _Thread()


def current_switches() -> int:
    return _thread.switches.value


_C.set_switches_source(current_switches)


def _set_switches(value: int) -> None:
    _thread.switches.value = value
    if torch.compiler.is_compiling():
        # Goes into the graph, so that torch.ops.sdpa.attention is traced under these switches.
        torch.ops.sdpa._set_switches(value)
    else:
        _C.forget_traced_switches()


def _encode(backends: Iterable[SDPBackend]) -> int:
    return sum(NUMBER[backend] << (4 * position) for position, backend in enumerate(backends))


def decode(switches: int) -> list[SDPBackend]:
    """The enabled backends, best first."""
    backends = []
    while switches:
        backends.append(BACKEND[switches & 0xF])
        switches >>= 4
    return backends


def is_backend(backend: Any) -> bool:
    return isinstance(backend, (SDPBackend, torch.nn.attention.SDPBackend))


def _own(backend: Any) -> SDPBackend:
    """Ours, for one of ours or of torch.nn.attention's."""
    # By the number: of torch's members torch.compile cannot trace the name on every version.
    if not is_backend(backend) or int(backend) not in BY_NUMBER:
        raise ValueError(f"backends must be of {', '.join(SDPBackend.__members__)}, got {backend!r}")
    return BY_NUMBER[int(backend)]


def _enable(backend: SDPBackend, enabled: bool) -> None:
    now = [b for b in decode(current_switches()) if b != backend]
    if enabled:
        # Back to its place in the default order; an order that was set stays among the others.
        before = NUMBER[backend]
        position = next((i for i, b in enumerate(now) if NUMBER[b] > before), len(now))
        now.insert(position, backend)
    _set_switches(_encode(now))


def enable_flash_sdp(enabled: bool) -> None:
    """Enables or disables flash attention for this thread; as ``torch.backends.cuda.enable_flash_sdp``."""
    if flash_sdp_enabled() != enabled:
        _enable(SDPBackend.FLASH_ATTENTION, enabled)


def enable_mem_efficient_sdp(enabled: bool) -> None:
    """Enables or disables memory-efficient attention for this thread; as
    ``torch.backends.cuda.enable_mem_efficient_sdp``."""
    if mem_efficient_sdp_enabled() != enabled:
        _enable(SDPBackend.EFFICIENT_ATTENTION, enabled)


def enable_math_sdp(enabled: bool) -> None:
    """Enables or disables math attention for this thread; as ``torch.backends.cuda.enable_math_sdp``."""
    if math_sdp_enabled() != enabled:
        _enable(SDPBackend.MATH, enabled)


def flash_sdp_enabled() -> bool:
    """Whether flash attention may be taken by this thread."""
    return SDPBackend.FLASH_ATTENTION in decode(current_switches())


def mem_efficient_sdp_enabled() -> bool:
    """Whether memory-efficient attention may be taken by this thread."""
    return SDPBackend.EFFICIENT_ATTENTION in decode(current_switches())


def math_sdp_enabled() -> bool:
    """Whether math attention may be taken by this thread."""
    return SDPBackend.MATH in decode(current_switches())


@contextmanager
def _switched(value: int) -> Iterator[None]:
    before = current_switches()
    _set_switches(value)
    try:
        yield
    finally:
        _set_switches(before)


@contextmanager
def sdpa_kernel(backends: SDPBackend | Iterable[SDPBackend], set_priority: bool = False) -> Iterator[None]:
    """Takes only the given backends inside the ``with`` block, in this thread.

    Args:
        backends: one or several of :class:`SDPBackend` (torch's members of these names are taken as well).
        set_priority: prefer them in the order given, instead of flash, memory-efficient, math.

    Raises:
        ValueError: for something that is not one of our backends, or a backend given twice.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html
    """
    one = is_backend(backends) or isinstance(backends, (str, int))
    wanted = [_own(b) for b in ([backends] if one else backends)]  # type: ignore[union-attr]
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"a backend is given twice: {[b.name for b in wanted]}")
    if not set_priority:
        wanted.sort(key=lambda backend: NUMBER[backend])
    with _switched(_encode(wanted)):
        yield


@contextmanager
def sdp_kernel(
    enable_flash: bool = True, enable_math: bool = True, enable_mem_efficient: bool = True
) -> Iterator[None]:
    """Enables or disables each backend inside the ``with`` block, in this thread.

    Source: https://pytorch.org/docs/stable/backends.html#torch.backends.cuda.sdp_kernel
    """
    flags = {
        SDPBackend.FLASH_ATTENTION: enable_flash,
        SDPBackend.EFFICIENT_ATTENTION: enable_mem_efficient,
        SDPBackend.MATH: enable_math,
    }
    with _switched(_encode(backend for backend, enabled in flags.items() if enabled)):
        yield


class SDPAParams:
    """The arguments of a call, for :func:`can_use_flash_attention` and its like; as ``torch.backends.cuda.SDPAParams``.

    Args:
        query, key, value, attn_mask, dropout, is_causal, enable_gqa: as of :func:`scaled_dot_product_attention`.
        capability: ask for a chip of this compute capability, ``(8, 0)`` say, instead of the tensors' device.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
        *,
        capability: tuple[int, int] | None = None,
    ) -> None:
        self.query, self.key, self.value, self.attn_mask = query, key, value, attn_mask
        self.dropout, self.is_causal, self.enable_gqa = dropout, is_causal, enable_gqa
        self.capability = capability

    def problem(self, scale: float | None = None) -> _C.Problem:
        tensors = [self.query, self.key, self.value] + ([] if self.attn_mask is None else [self.attn_mask])
        return _C.problem(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout,
            self.is_causal,
            scale,
            self.enable_gqa,
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
            None if self.capability is None else 10 * self.capability[0] + self.capability[1],
        )


def _can_use(backend: SDPBackend, params: Any, debug: bool) -> bool:
    if isinstance(params, torch.backends.cuda.SDPAParams):
        p = params
        params = SDPAParams(p.query, p.key, p.value, p.attn_mask, p.dropout, p.is_causal, p.enable_gqa)
    if not isinstance(params, SDPAParams):
        raise TypeError(f"params must be SDPAParams, sdpa's or torch.backends.cuda's, got {type(params)}")
    problem = params.problem()
    only = NUMBER[backend] if backend in decode(current_switches()) else 0
    usable = _C.select(problem, only) != 0
    if debug and not usable:
        lines = _C.reasons(problem, only)
        title = {SDPBackend.FLASH_ATTENTION: "Flash", SDPBackend.EFFICIENT_ATTENTION: "Memory efficient"}[backend]
        ours = False
        for line in lines:
            if line.endswith("kernel not used because:"):
                ours = line.startswith(title)
            if ours:
                warnings.warn(line, stacklevel=3)
    return usable


def can_use_flash_attention(params: SDPAParams, debug: bool = False) -> bool:
    """Whether flash attention takes the call; with ``debug`` the reasons why not are given as warnings.

    Source: https://pytorch.org/docs/stable/backends.html#torch.backends.cuda.can_use_flash_attention
    """
    return _can_use(SDPBackend.FLASH_ATTENTION, params, debug)


def can_use_efficient_attention(params: SDPAParams, debug: bool = False) -> bool:
    """Whether memory-efficient attention takes the call; with ``debug`` the reasons why not are given as warnings.

    Source: https://pytorch.org/docs/stable/backends.html#torch.backends.cuda.can_use_efficient_attention
    """
    return _can_use(SDPBackend.EFFICIENT_ATTENTION, params, debug)


def math_scratch_limit() -> int:
    """Bytes of scratch memory that one call of the math backend allows itself; 256 MiB unless set."""
    return _C.math_scratch_limit()


def set_math_scratch_limit(bytes: int) -> None:
    """Sets :func:`math_scratch_limit`, for the whole process. One query row of scores is always allowed.

    Raises:
        ValueError: if it is not positive.
    """
    _C.set_math_scratch_limit(bytes)
