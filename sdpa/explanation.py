"""Which backend takes a call, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import _C
from .backends import NUMBER, SDPAParams, SDPBackend, current_switches, decode


@dataclass(frozen=True)
class Constraint:
    """One thing a backend asks of a call: what it got, what it needs, and how to get there."""

    name: str
    holds: bool
    got: str
    needs: str
    fix: str


@dataclass(frozen=True)
class BackendExplanation:
    """One backend: whether it is enabled, all its constraints, and the kernels it would launch."""

    backend: SDPBackend
    enabled: bool
    constraints: tuple[Constraint, ...]
    kernels: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return self.enabled and all(c.holds for c in self.constraints)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` is a table."""

    chosen: SDPBackend | None
    backends: tuple[BackendExplanation, ...]
    math_scratch_bytes: int  # what the math backend takes, or would
    math_matrix_bytes: int  # one float32 score matrix for all heads, which math does not make
    problem: str

    def __str__(self) -> str:
        chosen = self.chosen.name if self.chosen is not None else "none: No available kernel."
        lines = [self.problem, f"chosen: {chosen}"]
        for b in self.backends:
            state = "chosen" if b.backend == self.chosen else "usable" if b.usable else "not usable"
            lines.append(f"\n{b.backend.name}: {state if b.enabled else 'disabled'}")
            if b.kernels:
                lines.append(f"  kernels: {', '.join(b.kernels)}")
            width = max(len(c.name) for c in b.constraints)
            for c in b.constraints:
                lines.append(f"  {'ok  ' if c.holds else 'FAIL'} {c.name:<{width}}  got {c.got}; needs {c.needs}")
                if not c.holds:
                    lines.append(f"       {'':<{width}}  -> {c.fix}")
        mib = 2**20
        lines.append(
            f"\nmath's scratch memory: {self.math_scratch_bytes / mib:.1f} MiB "
            f"(a whole float32 score matrix would be {self.math_matrix_bytes / mib:.1f} MiB)"
        )
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    capability: tuple[int, int] | None = None,
) -> Explanation:
    """Says which backend :func:`scaled_dot_product_attention` takes for a call, under this thread's switches, and why.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of the call.
        capability: ask for a chip of this compute capability, ``(7, 0)`` for a V100, wherever the tensors are and
            whatever this build was compiled for.

    Returns:
        An :class:`Explanation`: for every backend every constraint with what it got, what it needs and how to fix it,
        and the bytes of scratch memory that math would take. Printing it gives a table.

    Raises:
        RuntimeError: for inputs that do not fit together, as the call itself.
    """
    params = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, capability=capability)
    problem = params.problem(scale)
    switches = current_switches()
    enabled = decode(switches)
    order = enabled + [backend for backend in NUMBER if backend not in enabled]
    found = []
    for backend in order:
        rows = tuple(Constraint(**row) for row in _C.constraints(problem, NUMBER[backend]))  # type: ignore[arg-type]
        kernels = tuple(
            name
            for backward in ((False, True) if problem.grad_wanted else (False,))
            if (name := _C.variant_for(problem, NUMBER[backend], backward)) and all(row.holds for row in rows)
        )
        found.append(BackendExplanation(backend, backend in enabled, rows, kernels))
    number = _C.select(problem, switches)
    return Explanation(
        next((backend for backend, own in NUMBER.items() if own == number), None),
        tuple(found),
        _C.math_scratch_bytes(problem),
        4 * problem.scores,
        repr(problem),
    )
