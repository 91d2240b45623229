"""Puts sdpa in the place of torch's own attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.backends.cuda
import torch.nn.attention
import torch.nn.functional
import torch.overrides
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode, has_torch_function

from . import backends as own
from .functional import resolve_bias, scaled_dot_product_attention

_torch_attention = torch.nn.functional.scaled_dot_product_attention
_torch_sdpa_kernel = torch.nn.attention.sdpa_kernel
# Our switch, and torch's setter and getter of the same name: both are set, for what goes to torch's own function.
_SWITCHES = ("flash", "mem_efficient", "math")
_members: Any = torch.nn.attention.SDPBackend.__members__
_MEMBERS = {
    "flash": _members["FLASH_ATTENTION"],
    "mem_efficient": _members["EFFICIENT_ATTENTION"],
    "math": _members["MATH"],
    "cudnn": _members["CUDNN_ATTENTION"],
}
_torch_enable: dict[str, Callable[[bool], None]] = {
    name: getattr(torch.backends.cuda, f"enable_{name}_sdp") for name in _MEMBERS
}
_torch_enabled: dict[str, Callable[[], bool]] = {
    name: getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in _MEMBERS
}
_torch_member = {int(member): member for member in _members.values()}
_overrides: Any = torch.overrides  # whose functions for the stack of modes are not typed
_torch: Any = torch._C


def _ours(t: Any) -> bool:
    """Whether our ops take a tensor of this kind; nested and sparse ones and other devices are torch's."""
    return not isinstance(t, Tensor) or (
        not t.is_nested and t.layout == torch.strided and t.device.type in ("cpu", "cuda", "meta")
    )


class _Last(TorchFunctionMode):
    """Takes calls of torch's function that the modes and subclasses have seen and passed on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _torch_attention:
            return func(*args, **(kwargs or {}))
        if types:
            return NotImplemented  # the subclasses come first
        return scaled_dot_product_attention(*args, **(kwargs or {}))


@contextmanager
def _below_all_modes() -> Iterator[None]:
    others = _overrides._get_current_function_mode_stack()
    mine = [] if any(isinstance(mode, _Last) for mode in others) else [_Last()]

    def restack(old: list[Any], new: list[Any]) -> None:
        for _ in old:
            _overrides._pop_mode()
        for mode in new:
            _overrides._push_mode(mode)

    restack(others, mine + others)
    try:
        yield
    finally:
        restack(mine + others, others)


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
    if isinstance(attn_mask, CausalBias):
        attn_mask, is_causal = resolve_bias(attn_mask, is_causal, query.device)
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if not (_ours(query) and _ours(key) and _ours(value) and _ours(attn_mask)):
        return _torch_attention(query, key, value, **options)
    if has_torch_function((query, key, value, attn_mask)):
        # They know torch's function.
        with _below_all_modes():
            return _torch_attention(query, key, value, **options)
    return scaled_dot_product_attention(query, key, value, **options)


def _bias_function(
    cls: type[CausalBias], func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """CausalBias's own looks for torch's function where ours now stands."""
    if func is _torch_attention:
        return cls._dispatch(*args, **(kwargs or {}))
    inherited: Any = super(CausalBias, cls).__torch_function__
    return inherited(func, types, args, kwargs or {})


def _enable(name: str) -> Callable[[bool], None]:
    def enable(enabled: bool) -> None:
        getattr(own, f"enable_{name}_sdp")(enabled)
        _torch_enable[name](enabled)

    return enable


@contextmanager
def _torch_switched(members: list[Any], set_priority: bool) -> Iterator[None]:
    """``torch.nn.attention.sdpa_kernel``, which on some versions goes through names that we replace."""
    before, order = {name: enabled() for name, enabled in _torch_enabled.items()}, _torch._get_sdp_priority_order()
    try:
        for name in before:
            _torch_enable[name](_MEMBERS[name] in members)
        if set_priority:
            wanted = list(map(int, members))
            _torch._set_sdp_priority_order(wanted + [number for number in order if number not in wanted])
        yield
    finally:
        for name, enabled in before.items():
            _torch_enable[name](enabled)
        _torch._set_sdp_priority_order(order)


@contextmanager
def _sdpa_kernel(backends: Any, set_priority: bool = False) -> Iterator[dict[str, Any]]:
    every = [backends] if own.is_backend(backends) or isinstance(backends, (str, int)) else backends
    numbers = []
    for backend in every:
        if not own.is_backend(backend):
            raise ValueError(f"backends must be of torch.nn.attention.SDPBackend, got {backend!r}")
        if int(backend) not in numbers:
            numbers.append(int(backend))
    ours = [own.BY_NUMBER[number] for number in numbers if number in own.BY_NUMBER]
    theirs = [_torch_member[number] for number in numbers]
    torchs: AbstractContextManager[Any]
    if not torch.compiler.is_compiling():
        torchs = _torch_switched(theirs, set_priority)
    elif _COMPILES_TORCHS:
        torchs = _torch_sdpa_kernel(theirs, set_priority)
    else:
        torchs = nullcontext()
    with own.sdpa_kernel(ours, set_priority), torchs:
        yield {}


# torch.compile looks here for the function of torch's that it knows; before 2.11 it looks at what we replace.
_sdpa_kernel.__wrapped__ = _torch_sdpa_kernel.__wrapped__  # type: ignore[attr-defined]
_COMPILES_TORCHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@contextmanager
def _sdp_kernel(
    enable_flash: bool = True,
    enable_math: bool = True,
    enable_mem_efficient: bool = True,
    enable_cudnn: bool = True,
) -> Iterator[dict[str, Any]]:
    flags = (enable_math, enable_flash, enable_mem_efficient, enable_cudnn)  # in the order of the members' numbers
    with _sdpa_kernel([_torch_member[number] for number, enabled in enumerate(flags) if enabled]):
        yield {}


def _can_use(name: str) -> Callable[[Any, bool], bool]:
    ours, theirs = getattr(own, name), getattr(torch.backends.cuda, name)

    def can_use(params: Any, debug: bool = False) -> bool:
        mine = all(map(_ours, (params.query, params.key, params.value, params.attn_mask)))
        result: bool = (ours if mine else theirs)(params, debug)
        return result

    return can_use


_CAN_USE = {name: _can_use(name) for name in ("can_use_flash_attention", "can_use_efficient_attention")}
_REPLACED: list[tuple[ModuleType | type, str, Any]] = [
    (CausalBias, "__torch_function__", classmethod(_bias_function)),
    (torch.nn.functional, "scaled_dot_product_attention", _attention),
    (torch.nn.attention, "sdpa_kernel", _sdpa_kernel),
    (torch.backends.cuda, "sdp_kernel", _sdp_kernel),
    *[(module, *item) for module in (torch.backends.cuda, torch.nn.attention) for item in _CAN_USE.items()],
    *[(torch.backends.cuda, f"enable_{name}_sdp", _enable(name)) for name in _SWITCHES],
    *[(torch.backends.cuda, f"{name}_sdp_enabled", getattr(own, f"{name}_sdp_enabled")) for name in _SWITCHES],
]


class patch_torch:
    """Makes ``F.scaled_dot_product_attention`` and the switches of torch lead to sdpa, for the whole process.

    In force from the call on; undone by :meth:`undo`, or at the end of a ``with`` block::

        sdpa.patch_torch()             # from here on

        with sdpa.patch_torch():       # only inside
            model(x)

    Replaced are ``torch.nn.functional.scaled_dot_product_attention``, ``torch.nn.attention.sdpa_kernel`` and in
    ``torch.backends.cuda`` ``sdp_kernel`` and, of flash, mem_efficient and math, ``can_use_*_attention``,
    ``enable_*_sdp`` and ``*_sdp_enabled``. Nested and sparse tensors and devices other than CPU and CUDA
    go to torch's own function. Tensor subclasses and modes see torch's function called. A name imported from torch
    before the call keeps its old meaning. Of several patches the last to be undone puts torch's back.
    """

    _in_force: ClassVar[list[patch_torch]] = []
    _saved: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        if not self._in_force:
            with suppress(ImportError):  # it would import our names when it is first needed, and keep them
                importlib.import_module("torch.nested._internal.sdpa")
            self._saved[:] = [vars(module)[name] for module, name, _ in _REPLACED]
            for module, name, replacement in _REPLACED:
                setattr(module, name, replacement)
        self._in_force.append(self)

    def undo(self) -> None:
        """Puts torch's back, unless another patch is still in force; a second call does nothing."""
        if self not in self._in_force:
            return
        self._in_force.remove(self)
        if not self._in_force:
            for (module, name, _), original in zip(_REPLACED, self._saved, strict=True):
                setattr(module, name, original)

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
