"""sdpa.patch_torch(): torch's own names lead here, and back."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
import torch.utils.benchmark as benchmark
from reference import make
from torch.nn.attention import bias

import sdpa
from sdpa import SDPBackend

NAMES = [(module, name) for module, name, _ in sdpa.patch._REPLACED]
torchs = F.scaled_dot_product_attention
theirs = torch.nn.attention.SDPBackend
HALF, SINGLE = torch.float16, torch.float32


def current():
    return [getattr(module, name) for module, name in NAMES]


def test_as_a_context_manager():
    before = current()
    with sdpa.patch_torch():
        assert all(new is not old for new, old in zip(current(), before, strict=True))
    assert current() == before
    with pytest.raises(KeyError), sdpa.patch_torch():
        raise KeyError
    assert current() == before


def test_as_a_call_with_undo():
    before = current()
    patch = sdpa.patch_torch()
    try:
        assert F.scaled_dot_product_attention is not torchs
    finally:
        patch.undo()
    assert current() == before
    patch.undo()
    assert current() == before


def test_nested_patches():
    before = current()
    with sdpa.patch_torch():
        inside = current()
        with sdpa.patch_torch():
            assert current() == inside
        assert current() == inside
    assert current() == before


def test_patches_undone_in_any_order():
    before = current()
    first, second = sdpa.patch_torch(), sdpa.patch_torch()
    first.undo()
    first.undo()
    assert F.scaled_dot_product_attention is not torchs
    second.undo()
    assert current() == before


@pytest.fixture
def patched():
    with sdpa.patch_torch():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often our op ran."""
    counted = []
    real = sdpa._C.attention
    monkeypatch.setattr(sdpa._C, "attention", lambda *args: counted.append(1) or real(*args))
    return counted


def test_the_seeds_program(device, patched, capsys, calls):
    sdp_kernel, SDPBackend = torch.backends.cuda.sdp_kernel, torch.backends.cuda.SDPBackend  # as it imports them

    def benchmark_torch_function_in_microseconds(f, *args, **kwargs):
        t0 = benchmark.Timer(stmt="f(*args, **kwargs)", globals={"args": args, "kwargs": kwargs, "f": f})
        return t0.timeit(2).mean * 1e6

    batch_size, max_sequence_len, num_heads, embed_dimension = 2, 64, 2, 32
    shape = batch_size, num_heads, max_sequence_len, embed_dimension
    query, key, value = (torch.rand(shape, device=device, dtype=torch.float16) for _ in range(3))
    run = benchmark_torch_function_in_microseconds
    print(
        f"The default implementation runs in {run(F.scaled_dot_product_attention, query, key, value):.3f} microseconds"
    )
    backend_map = {
        SDPBackend.MATH: {"enable_math": True, "enable_flash": False, "enable_mem_efficient": False},
        SDPBackend.FLASH_ATTENTION: {"enable_math": False, "enable_flash": True, "enable_mem_efficient": False},
        SDPBackend.EFFICIENT_ATTENTION: {"enable_math": False, "enable_flash": False, "enable_mem_efficient": True},
    }
    ran = 1
    for name, backend in (
        ("math", SDPBackend.MATH),
        ("flash attention", SDPBackend.FLASH_ATTENTION),
        ("memory efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        usable = sdpa.explain(query, key, value).backends
        usable = next(b.usable for b in usable if b.backend.name == backend.name)
        warns = contextlib.nullcontext() if usable else pytest.warns(UserWarning, match="kernel not used because")
        with sdp_kernel(**backend_map[backend]), warns:
            try:
                time = run(F.scaled_dot_product_attention, query, key, value)
                print(f"The {name} implementation runs in {time:.3f} microseconds")
                assert usable
            except RuntimeError as error:
                assert "No available kernel. Aborting execution." in str(error) and not usable
                print(f"{name} is not supported. See warnings for reasons.")
            ran += 1
    assert len(capsys.readouterr().out.splitlines()) == ran == 4
    assert len(calls) >= 4  # ours, each time


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_same_answer_as_torch(device, kwargs):
    query, key, value = (make(2, 4, 9, 16, device=device, grad=False) for _ in range(3))
    if "enable_gqa" in kwargs:
        key, value = key[:, :2], value[:, :2]
    mask = None if "is_causal" in kwargs else make(9, 9, device=device, grad=False)
    expected = F.scaled_dot_product_attention(query, key, value, mask, **kwargs)
    with sdpa.patch_torch():
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, mask, **kwargs), expected)
        torch.testing.assert_close(
            F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask, **kwargs), expected
        )


def test_nested_tensors_go_to_torch(calls):
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    with sdpa.patch_torch():
        output = F.scaled_dot_product_attention(nested, nested, nested)
    assert output.is_nested and not calls
    for ours, theirs in zip(output.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_nested_tensor_after_the_patch():
    program = """
import torch, torch.nn.functional as F, sdpa
def run():
    t = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    assert F.scaled_dot_product_attention(t, t, t).is_nested
with sdpa.patch_torch():
    run()
run()
from torch.nested._internal import sdpa as theirs
assert not [name for name, value in vars(theirs).items() if getattr(value, "__module__", "").startswith("sdpa.")]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(sdpa.__file__).parents[1])


@pytest.mark.parametrize("make_bias", [bias.causal_upper_left, bias.causal_lower_right])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 7)], ids=str)
@pytest.mark.parametrize("where", ["ours", "patched", "torch's while patched"])
def test_causal_biases(device, make_bias, sizes, where, calls):
    L, S = sizes
    tensors = [make(2, 4, n, 8, device=device) for n in (L, S, S)]
    m = torch.ones(L, S, device=device).tril(S - L if make_bias is bias.causal_lower_right else 0).bool()
    expected = torchs(*tensors, m)
    with contextlib.nullcontext() if where == "ours" else sdpa.patch_torch():
        call = {"ours": sdpa.scaled_dot_product_attention, "patched": F.scaled_dot_product_attention}.get(where, torchs)
        output = call(*tensors, make_bias(L, S))
        assert type(output) is torch.Tensor and (calls or call is torchs)
        torch.testing.assert_close(output, expected)
        if call is not torchs:
            with pytest.raises(RuntimeError, match=rf"is_causal=True and a CausalBias \({L}, {S}\)"):
                call(*tensors, make_bias(L, S), is_causal=True)
    output, expected = (torch.autograd.grad(o.square().sum(), tensors) for o in (output, expected))
    for ours, others in zip(output, expected, strict=True):
        torch.testing.assert_close(ours, others)


def test_subclasses_and_modes_see_torchs_function(device, patched, calls):
    seen = []

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    query, key, value = (make(2, 4, 5, 8, device=device, grad=False) for _ in range(3))
    expected = torchs(query, key, value)
    for mode in (contextlib.nullcontext(), Mode(), torch.device(device)):
        for t in (query, query.as_subclass(Subclass), torch.nn.Parameter(query)):
            seen.clear(), calls.clear()
            with mode:
                output = F.scaled_dot_product_attention(t, key, value)
                assert not any(isinstance(m, sdpa.patch._Last) for m in current_modes())
            wanted = [torchs] * (isinstance(mode, Mode) + isinstance(t, Subclass))
            assert [f for f in seen if f.__name__ == torchs.__name__] == wanted and len(calls) == 1
            assert isinstance(output, Subclass) == isinstance(t, Subclass)
            torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)


def current_modes():
    return torch.overrides._get_current_function_mode_stack()


def test_switches_reach_both(patched):
    cuda = torch.backends.cuda
    theirs = dict(sdpa.patch._torch_enabled)
    for name in ("flash", "mem_efficient", "math"):
        enable, enabled = getattr(cuda, f"enable_{name}_sdp"), getattr(cuda, f"{name}_sdp_enabled")
        assert enabled()
        enable(False)
        assert not enabled() and not theirs[name]() and not getattr(sdpa, f"{name}_sdp_enabled")()
        enable(True)
        assert enabled() and theirs[name]() and getattr(sdpa, f"{name}_sdp_enabled")()
    with cuda.sdp_kernel(enable_flash=False):
        assert not sdpa.flash_sdp_enabled() and not theirs["flash"]() and sdpa.math_sdp_enabled()
    assert sdpa.flash_sdp_enabled() and theirs["flash"]()
    with cuda.sdp_kernel(enable_cudnn=False):
        assert not cuda.cudnn_sdp_enabled()
    assert cuda.cudnn_sdp_enabled()
    backends = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(backends=[backends.MATH, backends.CUDNN_ATTENTION, backends.MATH]):
        assert sdpa.backends.decode(sdpa.backends.current_switches()) == [SDPBackend.MATH]
        assert theirs["math"]() and not theirs["flash"]()
    with torch.nn.attention.sdpa_kernel(backends.MATH):
        assert not sdpa.flash_sdp_enabled()
    assert sdpa.flash_sdp_enabled() and theirs["flash"]()


@pytest.mark.parametrize("wanted", ["MATH", 3, [theirs.MATH, None]], ids=str)
def test_what_is_no_backend(patched, wanted):
    with pytest.raises(ValueError, match=repr(wanted[1] if isinstance(wanted, list) else wanted)):
        torch.nn.attention.sdpa_kernel(wanted).__enter__()


def test_compiled_switches(device, patched):
    query, key, value = (make(2, 4, 5, 8, device=device, grad=False, dtype=torch.float64) for _ in range(3))

    def inside(which):
        def f(*args):
            with torch.nn.attention.sdpa_kernel(which):
                return F.scaled_dot_product_attention(*args)

        torch._dynamo.reset()
        return torch.compile(f, fullgraph=True, backend="aot_eager")(query, key, value)

    torch.testing.assert_close(inside([theirs.MATH]), torchs(query, key, value))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="No available kernel"):
        warnings.simplefilter("ignore")
        inside(theirs.FLASH_ATTENTION)
    assert all(enabled() for enabled in sdpa.patch._torch_enabled.values())


def test_can_use_functions(patched):
    tensors = [torch.empty(2, 2, 8, 32, dtype=HALF) for _ in range(3)]
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(*tensors, None, 0.0, False, False)
    assert torch.nn.attention.can_use_flash_attention is cuda.can_use_flash_attention
    assert not cuda.can_use_flash_attention(params) and not cuda.can_use_efficient_attention(params)
    params = sdpa.SDPAParams(*tensors, capability=(9, 0))
    assert cuda.can_use_flash_attention(params) and cuda.can_use_efficient_attention(params)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_modules_agree_with_unpatched_torch(device, train, masked, calls):
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, device=device).train(train)
    own = torch.nn.MultiheadAttention(16, 4, batch_first=True, device=device).train(train)
    x = torch.randn(2, 7, 16, device=device)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7, device=device) if masked else None
    padding = torch.zeros(2, 7, device=device)
    padding[1, 5:] = -math.inf

    def run():
        outputs = [
            layer(x, mask, src_key_padding_mask=padding),
            own(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0],
        ]
        parameters = [p for p in (*layer.parameters(), *own.parameters()) if p.requires_grad]
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)
        return [*outputs, *grads]

    expected = run()
    with sdpa.patch_torch():
        actual = run()
    assert len(calls) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
