"""Times every contender on one case, side by side, and checks each against float64."""

from __future__ import annotations

import math
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch
import torch.nn.attention
from torch import Tensor

from bench.cases import Case

BACKENDS = {
    "default": None,
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "memory-efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
MIN_SAMPLES = 3
HOST_CALLS = 50  # in a sample of the host's time: so few that the GPU's queue does not fill up and hold the host back
REFERENCE_CHUNK = 2**22  # float64 scores held at a time: 32 MiB


class DeviceLost(RuntimeError):
    """A CUDA error that every later call would report again."""


@dataclass(frozen=True)
class Contender:
    library: str
    backend: str

    def __str__(self) -> str:
        return f"{self.library}:{self.backend}"

    def attend(self, inputs: Inputs) -> Tensor:
        return self._module().scaled_dot_product_attention(*inputs.arguments, **inputs.options)

    def switched_on(self) -> AbstractContextManager:
        if self.backend == "default":
            return nullcontext()
        api = torch.nn.attention if self.library == "torch" else self._module()
        return api.sdpa_kernel([getattr(api.SDPBackend, BACKENDS[self.backend])])

    def chosen(self, inputs: Inputs) -> str:
        """The backend that is taken; for 'default' the library's own choice."""
        if self.backend != "default":
            return self.backend
        if self.library == "torch":
            choice = torch._fused_sdp_choice(*inputs.arguments, **inputs.options)
            name = torch.nn.attention.SDPBackend(choice).name
        else:
            name = self._module().explain(*inputs.arguments, **inputs.options).chosen.name
        return next((ours for ours, theirs in BACKENDS.items() if theirs == name), name)

    def _module(self) -> ModuleType:
        if self.library == "torch":
            return torch.nn.functional
        import sdpa  # late, so that torch can be timed alone where sdpa is not built

        return sdpa


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    grad_out: Tensor | None
    options: dict[str, object]

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return (self.query, self.key, self.value, self.mask)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    @property
    def nbytes(self) -> int:
        tensors = (*self.arguments, self.grad_out)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    dtype = getattr(torch, case.dtype)

    def heads(count: int, length: int, dim: int, grad: bool) -> Tensor:
        if case.layout == "BHLD":
            tensor = torch.randn(case.B, count, length, dim, device=device, dtype=dtype)
        else:
            tensor = torch.randn(case.B, length, count, dim, device=device, dtype=dtype).transpose(1, 2)
        return tensor.requires_grad_(grad)

    mask = None
    if case.mask == "bool":
        mask = torch.rand(case.B, 1, case.L, case.S, device=device) > 0.2
    elif case.mask == "bias":
        mask = torch.randn(1, case.H, case.L, case.S, device=device, dtype=dtype).requires_grad_(case.backward)
    elif case.mask == "documents":
        number = [torch.arange(n, device=device) * 8 // n for n in (case.L, case.S)]
        mask = (number[0][:, None] == number[1]).expand(case.B, 1, -1, -1).contiguous()
    elif case.mask == "padding":
        # Three quarters of the keys of all batches together.
        lengths = case.S * (0.5 + (torch.arange(case.B, device=device).view(-1, 1, 1, 1) + 0.5) / (2 * case.B))
        mask = torch.arange(case.S, device=device) < lengths
    options: dict[str, object] = {"dropout_p": case.dropout, "is_causal": case.causal}
    if case.Hkv != case.H:
        options["enable_gqa"] = True
    return Inputs(
        query=heads(case.H, case.L, case.E, case.backward),
        key=heads(case.Hkv, case.S, case.E, case.backward),
        value=heads(case.Hkv, case.S, case.Ev, case.backward),
        mask=mask,
        grad_out=heads(case.H, case.L, case.Ev, False) if case.backward else None,
        options=options,
    )


class Reference:
    """Attention in float64 for the first and last batch and key head: enough to see a wrong index at either end."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        group = case.H // case.Hkv
        # A bias is shared by the batches, so that its gradient needs them all.
        bias_grad = case.mask == "bias" and case.backward
        self.batches = list(range(case.B)) if bias_grad else sorted({0, case.B - 1})
        self.kv_heads = sorted({0, case.Hkv - 1})
        self.heads = [kv * group + member for kv in self.kv_heads for member in range(group)]
        self.mask_rows = min(case.L, max(1, REFERENCE_CHUNK // case.S))  # the bias gradient is compared on these
        with torch.no_grad():
            self.expected = self._attend(case, inputs, bias_grad)

    def errors(self, actual: dict[str, Tensor]) -> dict[str, float]:
        """Relative error, norm of the difference over norm of the reference, of each tensor."""
        return {
            name: (
                (self._slice(name, tensor).double() - self.expected[name]).norm() / self.expected[name].norm()
            ).item()
            for name, tensor in actual.items()
        }

    def _slice(self, name: str, tensor: Tensor) -> Tensor:
        if name == "mask":
            return tensor[0, self.heads, : self.mask_rows]
        return tensor[self.batches][:, self.kv_heads if name in ("key", "value") else self.heads]

    def _attend(self, case: Case, inputs: Inputs, bias_grad: bool) -> dict[str, Tensor]:
        query, key, value = (
            self._slice(name, tensor).double()
            for name, tensor in (("query", inputs.query), ("key", inputs.key), ("value", inputs.value))
        )
        mask = None if inputs.mask is None else inputs.mask.expand(case.B, case.H, case.L, case.S)
        grad_out = None if inputs.grad_out is None else self._slice("out", inputs.grad_out).double()
        out = query.new_zeros(*query.shape[:-1], case.Ev)
        grads = {"query": torch.zeros_like(query), "key": torch.zeros_like(key), "value": torch.zeros_like(value)}
        if bias_grad:
            grads["mask"] = query.new_zeros(len(self.heads), self.mask_rows, case.S)
        scale = 1 / math.sqrt(case.E)
        columns = torch.arange(case.S, device=query.device)
        group = case.H // case.Hkv
        for b, batch in enumerate(self.batches):
            for h, head in enumerate(self.heads):
                k, v = key[b, h // group], value[b, h // group]
                for start in range(0, case.L, self.mask_rows):
                    rows = slice(start, min(start + self.mask_rows, case.L))
                    scores = query[b, h, rows] @ k.T * scale
                    if case.causal:
                        scores.masked_fill_(
                            columns > torch.arange(rows.start, rows.stop, device=k.device)[:, None], -math.inf
                        )
                    if mask is not None and mask.dtype == torch.bool:
                        scores.masked_fill_(~mask[batch, head, rows], -math.inf)
                    elif mask is not None:
                        scores += mask[batch, head, rows]
                    nothing = (scores == -math.inf).all(-1, keepdim=True)  # such a row gives 0
                    weights = torch.softmax(scores, -1).masked_fill_(nothing, 0)
                    out[b, h, rows] = weights @ v
                    if grad_out is None:
                        continue
                    grad_weights = grad_out[b, h, rows] @ v.T
                    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
                    grads["query"][b, h, rows] = grad_scores @ k * scale
                    grads["key"][b, h // group] += grad_scores.T @ query[b, h, rows] * scale
                    grads["value"][b, h // group] += weights.T @ grad_out[b, h, rows]
                    if bias_grad and start == 0:
                        grads["mask"][h] += grad_scores
        return grads if case.backward else {"out": out}


class Clock:
    """Microseconds between start and stop: CUDA events, or the host's clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        if self.cuda:
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        if self.cuda:
            self.begin.record()
        else:
            self.host = time.perf_counter()

    def stop(self) -> float:
        if not self.cuda:
            return (time.perf_counter() - self.host) * 1e6
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e3


@dataclass
class Record:
    """One line of the JSON: what one contender did on one case."""

    name: str
    case: Case
    library: str
    backend: str
    chosen: str | None = None
    us: float | None = None  # median of the samples
    us_min: float | None = None
    us_max: float | None = None
    samples: int = 0
    calls_per_sample: int = 0
    tflops: float | None = None
    mib: float | None = None  # peak above the inputs: outputs, what is kept for backward, gradients, workspace
    error: float | None = None  # the largest of errors; None with dropout, which has no reference
    errors: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reason: str | None = None  # why there is no time
    detail: str | None = None  # the whole error

    def as_json(self) -> dict[str, object]:
        def no_nan(value: object) -> object:  # JSON has no word for it
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        fields = asdict(self) | {"errors": {name: no_nan(error) for name, error in self.errors.items()}}
        return {name: no_nan(value) for name, value in fields.items()}


class Run:
    """One contender on one case."""

    def __init__(self, case: Case, contender: Contender, sets: list[Inputs], device: torch.device, host: bool) -> None:
        self.case, self.contender, self.sets, self.device, self.host = case, contender, sets, device, host
        self.record = Record(str(case), case, contender.library, contender.backend)
        self.clock = Clock(device.type == "cuda" and not host)
        self.turn = 0
        self.calls = 1
        self.times: list[float] = []
        self.spent = 0.0

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Whatever a contender raises or warns becomes part of its record, and the run goes on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                self.fail(error, _lines(caught))
            else:
                self.record.warnings = list(dict.fromkeys([*self.record.warnings, *_lines(caught)]))

    def prepare(self, reference: Reference | None, sample_seconds: float) -> None:
        """First call (checked), memory, warm-up, and how many calls make one sample."""
        record, inputs = self.record, self.sets[0]
        with self._outcome():
            with self.contender.switched_on():
                self._poison(inputs)
                result = self._once(inputs)
                record.chosen = self.contender.chosen(inputs)
            if reference is not None:
                record.errors = reference.errors(result)
                # max() alone would drop a nan
                record.error = math.nan if any(map(math.isnan, record.errors.values())) else max(record.errors.values())
            del result
            if self.device.type == "cuda":
                self._measure_memory(inputs)
            started = time.perf_counter()
            self.sample()
            estimate = self.sample()
            while time.perf_counter() - started < sample_seconds:
                estimate = self.sample()
            if self.host:
                self.calls = HOST_CALLS
            elif not self.case.backward:
                self.calls = max(1, min(1000, round(sample_seconds * 1e6 / estimate)))

    def sample(self) -> float:
        """Microseconds a call. Every call takes the next input set, so that L2 does not hold its input."""
        with self.contender.switched_on():
            if self.host:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.clock.start()
                for _ in range(self.calls):
                    self._once(self._next())
                return self.clock.stop() / self.calls
            if self.case.backward:
                inputs = self._next()
                # The forward is not timed; running ahead of the GPU, it also hides the backward's launch.
                out = self.contender.attend(inputs)
                self.clock.start()
                torch.autograd.grad(out, list(inputs.differentiable.values()), inputs.grad_out)
                return self.clock.stop()
            self.contender.attend(self._next())  # as above: the first timed launch is hidden
            self.clock.start()
            for _ in range(self.calls):
                self.contender.attend(self._next())
            return self.clock.stop() / self.calls

    def advance(self, repeats: int, seconds: float) -> bool:
        """Takes one sample; True when this contender has enough, or failed."""
        started = time.perf_counter()
        with self._outcome():
            self.times.append(self.sample())
        self.spent += time.perf_counter() - started
        enough = len(self.times) >= repeats or (self.spent >= seconds and len(self.times) >= MIN_SAMPLES)
        return enough or self.record.reason is not None

    def finish(self) -> Record:
        record = self.record
        if record.reason is None and not self.times:
            record.reason = "the run was stopped before this was timed"
        if record.reason is None:
            record.us = statistics.median(self.times)
            record.us_min, record.us_max = min(self.times), max(self.times)
            record.samples, record.calls_per_sample = len(self.times), self.calls
            record.tflops = None if self.host else self.case.flops / record.us / 1e6
        return record

    def _next(self) -> Inputs:
        self.turn += 1
        return self.sets[self.turn % len(self.sets)]

    def _once(self, inputs: Inputs) -> dict[str, Tensor]:
        out = self.contender.attend(inputs)
        if not self.case.backward:
            return {"out": out}
        wanted = inputs.differentiable
        return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), inputs.grad_out), strict=True))

    def _poison(self, inputs: Inputs) -> None:
        """Leaves NaN in freed memory of the outputs' sizes, which an element never written would then show."""
        shape = (*inputs.query.shape[:-1], self.case.Ev)
        poison = [inputs.query.new_full(shape, math.nan)]
        poison += [torch.full_like(tensor, math.nan) for tensor in inputs.differentiable.values()]
        del poison

    def _measure_memory(self, inputs: Inputs) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with self.contender.switched_on():
            self._once(inputs)
        torch.cuda.synchronize()
        self.record.mib = (torch.cuda.max_memory_allocated() - before) / 2**20

    def fail(self, error: Exception, warned: list[str]) -> None:
        text = str(error).strip() or repr(error)
        first = text.splitlines()[0]
        # The asked-for backend's own reasons; that the others were switched off is what was asked for.
        reasons = [line for line in warned if "not used because" not in line and "runtime disabled" not in line]
        if isinstance(error, torch.cuda.OutOfMemoryError):
            first = "out of memory: " + text.removeprefix("CUDA out of memory. ").split(" If reserved")[0]
        elif reasons and ("No available kernel" in text or "No viable backend" in text):
            first = "; ".join(reasons)
        else:
            first = "; ".join([f"{type(error).__name__}: {first}", *reasons])
        self.record.reason = first
        self.record.detail = "".join(traceback.format_exception(error)) + "\n".join(warned)
        # The traceback's frames hold tensors.
        error.__traceback__ = None
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{self.contender} on '{self.case}' broke the CUDA context: {first}") from lost
            torch.cuda.empty_cache()


def _lines(caught: list[warnings.WarningMessage]) -> list[str]:
    texts = (re.sub(r"\s*\(Triggered internally at [^)]*\)\.?", "", str(warning.message)) for warning in caught)
    return list(dict.fromkeys(text.strip() for text in texts))


def run_cases(
    cases: tuple[Case, ...],
    contenders: list[Contender],
    device: torch.device,
    repeats: int,
    seconds: float,
    tick: Callable[[str], None],
    records: list[Record],
    host: bool = False,
) -> None:
    """Adds a record for each case and contender, also when it is stopped half-way. tick is called twice for each."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the last case left cached may not fit this one's sizes
    runs: list[Run] = []
    active: list[Run] = []
    try:
        for case in cases:
            sets: list[Inputs] = []
            own = [Run(case, contender, sets, device, host) for contender in contenders]
            runs += own
            try:
                sets.append(make_inputs(case, device))
                if device.type == "cuda":
                    # Enough sets that the next one's data has left L2; a CPU keeps one, as its caches would after a
                    # matmul.
                    cache = torch.cuda.get_device_properties(device).L2_cache_size
                    sets += [make_inputs(case, device) for _ in range(min(64, math.ceil(cache / sets[0].nbytes)))]
                reference = None if case.dropout else Reference(case, sets[0])
            except torch.cuda.OutOfMemoryError as error:
                for run in own:
                    run.fail(error, ["The inputs or the reference did not fit."])
                continue
            for run in own:
                tick(f"{case}: {run.contender}")
                run.prepare(reference, seconds / repeats)
                if run.record.reason is None:
                    active.append(run)
                else:
                    tick(f"{case}: {run.contender}")
        while active:
            # One sample each in turn, so that a clock or a temperature that moves, moves for all.
            for run in list(active):
                if run.advance(repeats, seconds):
                    active.remove(run)
                    tick(f"{run.case}: {run.contender}")
    finally:
        records.extend(run.finish() for run in runs)
