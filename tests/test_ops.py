"""The ops inside torch: opcheck, compile, export, autocast, checkpoint, vmap, functorch, graphs, threads, host time."""

from __future__ import annotations

import copy
import pickle
import statistics
import threading
import time
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.attention
import torch.nn.functional as F
from reference import INF, eager, make, upcoming_seed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sdpa
from sdpa import SDPBackend, sdpa_kernel
from sdpa import scaled_dot_product_attention as attention

FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
TORCHS_MATH = torch.nn.attention.SDPBackend.MATH
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALL = sdpa._C.ALL_BACKENDS


def inputs(device="cpu", dtype=SINGLE, B=2, H=4, L=5, S=7, E=8, Ev=8, key_heads=None, grad=True):
    heads = H if key_heads is None else key_heads
    shapes = (B, H, L, E), (B, heads, S, E), (B, heads, S, Ev)
    return [make(*shape, dtype=dtype, device=device, grad=grad) for shape in shapes]


def gradients(call, tensors):
    return torch.autograd.grad(call(*tensors).square().sum(), [t for t in tensors if t.requires_grad])


def same(actual, expected, **tolerances):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


# opcheck


def transposed(t):
    return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(t.requires_grad)


CASES = {
    "plain": ({}, {}),
    "no grad": ({"grad": False}, {}),
    "half": ({"dtype": HALF}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "gqa": ({"key_heads": 2}, {"enable_gqa": True}),
    "dropout": ({}, {"dropout_p": 0.3}),
    "bool mask": ({}, {"attn_mask": torch.rand(5, 7) > 0.3}),
    "float mask": ({"dtype": HALF}, {"attn_mask": torch.randn(4, 1, 7, requires_grad=True)}),
    "all but causal": (
        {"key_heads": 1},
        {"attn_mask": torch.randn(1, 7), "dropout_p": 0.3, "scale": -1.0, "enable_gqa": True},
    ),
}
LAYOUTS = {
    "contiguous": lambda tensors: tensors,
    "transposed": lambda tensors: [transposed(t) for t in tensors],
    "broadcast": lambda tensors: [tensors[0], *(t.detach()[:1].requires_grad_(t.requires_grad) for t in tensors[1:])],
    "no heads": lambda tensors: [t.detach()[0, 0].requires_grad_(t.requires_grad) for t in tensors],
}


def case(name, layout, device):
    sizes, kwargs = CASES[name]
    if layout == "no heads" and ("gqa" in name or kwargs.get("enable_gqa") or name == "float mask"):
        pytest.skip("has heads")
    tensors = LAYOUTS[layout](inputs(device, **sizes))
    kwargs = {
        k: v.detach().to(device).requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for k, v in kwargs.items()
    }
    return tensors, kwargs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, name, layout):
    tensors, kwargs = case(name, layout, device)
    random = kwargs.get("dropout_p", 0) > 0
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not random:  # the compiled run draws other numbers
        tests += ("test_aot_dispatch_dynamic",)
    mask, p = kwargs.get("attn_mask"), kwargs.get("dropout_p", 0.0)
    rest = (p, kwargs.get("is_causal", False), kwargs.get("scale"), kwargs.get("enable_gqa", False), ALL)
    torch.library.opcheck(torch.ops.sdpa.attention, tuple(tensors), kwargs, test_utils=tests)
    # What autograd records is the output's alone; LSE and the seed are not differentiable.
    torch.library.opcheck(torch.ops.sdpa.attention_forward, (*tensors, mask, *rest), test_utils=tests)
    query, key, value = (t.detach() for t in tensors)
    mask = mask if mask is None else mask.detach()
    output, lse, lse_rest, seed = torch.ops.sdpa.attention_forward(query, key, value, mask, *rest, True)
    for wanted in ([True] * 4, [False, True, False, False]):
        arguments = (torch.randn_like(output), query, key, value, mask, output, lse, lse_rest, seed, *rest, wanted)
        torch.library.opcheck(
            torch.ops.sdpa.attention_backward, arguments, test_utils=(*tests[:3], "test_aot_dispatch_dynamic")
        )


def test_opcheck_of_the_switches():
    torch.library.opcheck(torch.ops.sdpa._set_switches, (ALL,))


def test_opcheck_of_dropout(device):
    rows = torch.randn(2, 3, 5, device=device, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sdpa._dropout_seed, (rows,), test_utils=tests)
    torch.library.opcheck(torch.ops.sdpa._dropout_keep, (torch.ops.sdpa._dropout_seed(rows), rows, 7, 0.3))


# torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    if "compile" in request.node.name or "export" in request.node.name:
        torch._dynamo.reset()
    yield


@pytest.mark.parametrize("name", [name for name in CASES if "dropout_p" not in CASES[name][1]])
def test_compile(device, name):
    tensors, kwargs = case(name, "transposed", device)
    mask = kwargs.pop("attn_mask", None)
    tensors = [*tensors, *([] if mask is None else [mask])]
    compiled = torch.compile(lambda *args: attention(*args, **kwargs) * 2, fullgraph=True, backend="aot_eager")
    plain = attention(*tensors, **kwargs) * 2
    output = compiled(*tensors)
    same([output], [plain])
    assert output.stride() == plain.stride()
    if tensors[0].requires_grad:
        same(gradients(compiled, tensors), gradients(lambda *args: attention(*args, **kwargs) * 2, tensors))


def test_compile_with_inductor(device):
    tensors = inputs(device, L=16, S=16, grad=False)  # without its backward, which takes as long again to compile

    def f(query, key, value):
        return attention(query.sin(), key.cos(), value, is_causal=True) + 1

    compiled = torch.compile(f, fullgraph=True)
    same([compiled(*tensors)], [f(*tensors)], rtol=1e-4, atol=1e-5)


def test_compile_with_dropout_follows_the_generator(device):
    tensors = inputs(device)
    compiled = torch.compile(lambda *args: attention(*args, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = gradients(lambda *args: attention(*args, dropout_p=0.5), tensors)
    for _ in range(2):
        torch.manual_seed(3)
        same(gradients(compiled, tensors), expected)


@pytest.mark.parametrize("op", [attention, torch.ops.sdpa.attention], ids=["function", "op"])
def test_compile_with_dynamic_shapes(device, op):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op(*args, is_causal=True), fullgraph=True, backend=counter)
    for L, S in ((5, 7), (6, 9), (11, 10), (16, 33), (40, 8)):
        tensors = inputs(device, L=L, S=S)
        same(gradients(compiled, tensors), gradients(lambda *args: attention(*args, is_causal=True), tensors))
    assert counter.frame_count <= 2


def refuses(call):
    """Whether the call finds no backend: on the CPU all but math refuse, and float64 does it on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError as error:
            assert "No available kernel" in str(error)
            return True
    return False


@pytest.mark.parametrize("op", [attention, torch.ops.sdpa.attention], ids=["function", "op"])
def test_compile_with_switches_inside(device, op):
    tensors = inputs(device, DOUBLE, grad=False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args):
        first = op(*args)
        with sdpa_kernel(FLASH):
            second = op(*args)
        return first, second

    @torch.compile(fullgraph=True, backend="aot_eager")
    def allowed(*args):
        with sdpa_kernel([FLASH, MATH]):
            first = op(*args)
        return first, op(*args)

    assert refuses(lambda: compiled(*tensors))
    assert len(sdpa.backends.decode(sdpa._C.current_switches())) == 3
    same(allowed(*tensors), [attention(*tensors)] * 2)


def test_compile_with_torchs_members(device):
    tensors = inputs(device, DOUBLE, grad=False)

    def f(query, key, value, one=TORCHS_MATH):
        with sdpa_kernel(TORCHS_MATH):
            first = attention(query, key, value)
        with sdpa_kernel([one, torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
            return first + attention(query, key, value)

    same([torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors)], [f(*tensors)])


def test_compile_with_switches_outside(device):
    tensors = inputs(device, DOUBLE, grad=False)
    compiled = torch.compile(lambda *args: attention(*args), fullgraph=True, backend="aot_eager")
    expected = attention(*tensors)
    with sdpa_kernel(MATH):
        same([compiled(*tensors)], [expected])
    with sdpa_kernel(EFFICIENT):
        assert refuses(lambda: compiled(*tensors))
    same([compiled(*tensors)], [expected])


def test_compile_of_the_op_keeps_the_switches_of_its_trace(device):
    tensors = inputs(device, DOUBLE, grad=False)
    for backend in (MATH, EFFICIENT):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args: torch.ops.sdpa.attention(*args), fullgraph=True, backend="aot_eager")
        with sdpa_kernel(backend):
            assert refuses(lambda: compiled(*tensors)) == (backend == EFFICIENT)  # noqa: B023
    with sdpa_kernel(FLASH):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args: torch.ops.sdpa.attention(*args), fullgraph=True, backend="aot_eager")
        assert refuses(lambda: compiled(*tensors))
    assert refuses(lambda: compiled(*tensors))


def inside(tensors, op, untraced):
    with sdpa_kernel(FLASH):
        untraced()
        return op(*tensors)


@sdpa_kernel(FLASH)
def decorated(tensors, op, untraced):
    untraced()
    return op(*tensors)


def entered(tensors, op, untraced):
    manager = sdpa_kernel(FLASH)
    manager.__enter__()
    try:
        untraced()
        return op(*tensors)
    finally:
        manager.__exit__(None, None, None)


def state():
    return sdpa.backends.current_switches(), sdpa._C.current_switches()


@pytest.mark.parametrize("backend_of_compile", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("op", [attention, torch.ops.sdpa.attention], ids=["function", "op"])
def test_compile_with_a_graph_break_among_switches(device, op, backend_of_compile):
    tensors = inputs(device, DOUBLE, grad=False)
    seen = []
    for f in (inside, decorated, entered):
        for untraced in (torch._dynamo.graph_break, torch.compiler.disable(lambda: seen.append(state()))):
            torch._dynamo.reset()
            compiled = torch.compile(f, backend=backend_of_compile)
            assert [refuses(lambda: compiled(tensors, op, untraced)) for _ in range(2)] == [True, True]  # noqa: B023
            assert state() == (ALL, ALL)
    assert all(own == below != ALL for own, below in seen)
    same([op(*tensors)], [eager(*tensors)])

    def enabling(*args):
        sdpa.enable_math_sdp(False)
        torch._dynamo.graph_break()
        sdpa.enable_math_sdp(True)
        return op(*args)

    same([torch.compile(enabling, backend=backend_of_compile)(*tensors)], [eager(*tensors)])
    assert state() == (ALL, ALL)


@pytest.mark.parametrize("backend_of_compile", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("op", [attention, torch.ops.sdpa.attention], ids=["function", "op"])
def test_compile_errors_restore_the_switches(device, op, backend_of_compile):
    tensors = inputs(device, DOUBLE, grad=False)

    def untraceable(*args):
        with sdpa_kernel(FLASH):
            return op(*args) + len(open("/dev/null").read())

    assert refuses(lambda: torch.compile(inside, backend=backend_of_compile)(tensors, op, lambda: None))
    assert state() == (ALL, ALL)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(untraceable, backend=backend_of_compile, fullgraph=True)(*tensors)
    assert state() == (ALL, ALL)
    same([op(*tensors)], [eager(*tensors)])


def test_compiled_backward_keeps_the_switches(device):
    tensors = inputs(device, DOUBLE)
    compiled = torch.compile(lambda *args: attention(*args), fullgraph=True, backend="aot_eager")
    with sdpa_kernel(MATH):
        output = compiled(*tensors)
    with sdpa_kernel(FLASH):
        grads = torch.autograd.grad(output.square().sum(), tensors)
    same(grads, gradients(attention, tensors))


# torch.export


class Attend(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, query, key, value):
        return attention(query * self.scale, key, value, **self.kwargs)


def test_export_carries_the_switches(device):
    tensors = inputs(device, DOUBLE, grad=False)
    module = Attend(is_causal=True).to(device)
    length = torch.export.Dim("length", min=2, max=1000)
    with sdpa_kernel(MATH):
        math = torch.export.export(module, tuple(tensors), dynamic_shapes=({2: length}, {}, {}))
    with sdpa_kernel(FLASH):
        flash = torch.export.export(module, tuple(tensors))
    longer = inputs(device, DOUBLE, L=9, grad=False)
    with sdpa_kernel(FLASH):
        same([math.module()(longer[0], *tensors[1:])], [eager(longer[0], *tensors[1:], is_causal=True)])
    assert refuses(lambda: flash.module()(*tensors))


# Autocast, checkpoint, inference


def test_autocast(device):
    dtype = BRAIN if device == "cpu" else HALF
    tensors = inputs(device)
    mask = make(5, 7, device=device)
    with torch.autocast(device, dtype=dtype):
        output = attention(*tensors, mask)
        theirs = F.scaled_dot_product_attention(*tensors, mask.to(dtype))
    assert output.dtype == theirs.dtype == dtype
    cast = [t.detach().to(dtype) for t in tensors]
    assert torch.equal(output, attention(*cast, mask.detach()))
    grads = torch.autograd.grad(output.float().square().sum(), [*tensors, mask])
    assert all(g.dtype == SINGLE for g in grads)
    with torch.autocast(device, dtype=dtype), torch.autocast(device, enabled=False):
        assert attention(*tensors).dtype == SINGLE


def test_autocast_makes_mixed_dtypes_one(device):
    dtype = BRAIN if device == "cpu" else HALF
    query, key, value = inputs(device, grad=False)
    with torch.autocast(device, dtype=dtype):
        assert attention(query, key.to(dtype), value).dtype == dtype


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    tensors = inputs(device)

    def f(*args):
        return attention(*args, dropout_p=0.4)

    torch.manual_seed(5)
    expected = gradients(f, tensors)
    torch.manual_seed(5)
    output = checkpoint(f, *tensors, use_reentrant=use_reentrant)
    torch.rand(3, device=device)  # the generator has moved on when the forward is run again
    same(
        torch.autograd.grad(output.square().sum(), tensors) if not use_reentrant else backward(output, tensors),
        expected,
    )


def backward(output, tensors):
    output.square().sum().backward()
    return [t.grad for t in tensors]


def test_inference_mode(device):
    tensors = inputs(device)
    with torch.no_grad():  # with gradients it may be another kernel's
        expected = attention(*tensors)
    with torch.inference_mode():
        output = attention(*tensors, dropout_p=0.0)
        assert output.is_inference() and not output.requires_grad
        attention(*tensors, dropout_p=0.5)
    assert torch.equal(output, expected)
    with torch.no_grad():
        assert not attention(*tensors).requires_grad


def test_inference_tensors_as_inputs(device):
    with torch.inference_mode():
        tensors = inputs(device, grad=False)
    assert torch.equal(attention(*tensors), attention(*(t.clone() for t in tensors)))


# vmap and functorch


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0), (2, 0, None), (-2, None, -1)], ids=str)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_vmap(device, in_dims, rank):
    shapes = [(2, 4, 5, 8)[-rank:], (2, 4, 7, 8)[-rank:], (2, 4, 7, 6)[-rank:]]
    whole = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        t = make(*([] if dim is None else [3]), *shape, device=device, grad=False)
        whole.append(t if dim is None else t.movedim(0, dim))
    output = torch.vmap(attention, in_dims)(*whole)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(whole, in_dims, strict=True)]
        torch.testing.assert_close(output[i], attention(*one))


@pytest.mark.parametrize(
    "mask", [((3, 5, 7), 0), ((5, 7), None), ((7, 3), 1), ((3,), 0), ((3, 2, 1, 5, 7), 0)], ids=str
)
@pytest.mark.parametrize("boolean", [False, True])
def test_vmap_with_masks(device, mask, boolean):
    shape, dim = mask
    tensors = [make(3, *t.shape, device=device, grad=False) for t in inputs()]
    m = torch.rand(shape, device=device) > 0.3 if boolean else make(*shape, device=device, grad=False)
    output = torch.vmap(attention, (0, 0, 0, dim))(*tensors, m)
    for i in range(3):
        expected = attention(*(t[i] for t in tensors), m if dim is None else m.select(dim, i))
        torch.testing.assert_close(output[i], expected)


def test_vmap_with_groups_twice_over(device):
    query, key, value = (make(3, 2, *t.shape[1:], device=device, grad=False) for t in inputs(key_heads=2))
    f = torch.vmap(torch.vmap(lambda *args: attention(*args, enable_gqa=True, is_causal=True)))
    torch.testing.assert_close(f(query, key, value), attention(query, key, value, is_causal=True, enable_gqa=True))


def test_vmap_with_dropout(device):
    tensors = [make(3, *t.shape, device=device, grad=False) for t in inputs(L=32, S=32)]

    def f(*args):
        return attention(*args, dropout_p=0.5)

    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=f"randomness='different'.*'{randomness}'"):
            torch.vmap(f, randomness=randomness)(*tensors)
    same_inputs = [t[:1].expand_as(t) for t in tensors]
    output = torch.vmap(f, randomness="different")(*same_inputs)
    assert not torch.equal(output[0], output[1])


def test_vmap_over_grad(device):
    tensors = [make(3, *t.shape, device=device, grad=False) for t in inputs()]
    mask = make(5, 7, device=device, grad=False)

    def loss(query, key, value, mask):
        return attention(query, key, value, mask).square().sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), (0, 0, 0, None))(*tensors, mask)
    for i in range(3):
        leaves = [t.detach().clone().requires_grad_() for t in (*(t[i] for t in tensors), mask)]
        same([g[i] for g in grads], torch.autograd.grad(loss(*leaves), leaves))


def test_vmap_over_grad_with_groups(device):
    tensors = [make(3, *t.shape, device=device, grad=False) for t in inputs(key_heads=2)]

    def loss(*args):
        return attention(*args, is_causal=True, enable_gqa=True).square().sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), (0, None, 0))(tensors[0], tensors[1][0], tensors[2])
    for i in range(3):
        leaves = [t.clone().requires_grad_() for t in (tensors[0][i], tensors[1][0], tensors[2][i])]
        same([g[i] for g in grads], torch.autograd.grad(loss(*leaves), leaves))


def test_functional_transforms(device):
    query, key, value = inputs(device, DOUBLE, grad=False)

    def f(query):
        return attention(query, key, value, is_causal=True)

    def g(query):
        return eager(query, key, value, is_causal=True)

    tangent = torch.randn_like(query)
    same(torch.func.jvp(f, (query,), (tangent,)), torch.func.jvp(g, (query,), (tangent,)))
    same([torch.func.grad(lambda q: f(q).sin().sum())(query)], [torch.func.grad(lambda q: g(q).sin().sum())(query)])
    small = query[:1, :1, :2, :3], key[:1, :1, :2, :3], value[:1, :1, :2, :3]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        same([jacobian(attention)(*small)], [jacobian(eager)(*small)])
    same(
        [torch.func.hessian(lambda q: attention(q, *small[1:]).sum())(small[0])],
        [torch.func.hessian(lambda q: eager(q, *small[1:]).sum())(small[0])],
    )


def seeded(f):
    def run(*args):
        torch.manual_seed(11)
        return f(*args)

    return run


def test_functional_transforms_with_dropout(device):
    query, key, value = (t.detach() for t in inputs(device, DOUBLE))
    leaf, cotangents = query.clone().requires_grad_(), torch.randn(3, 2, 4, 5, 8, dtype=DOUBLE, device=device)

    def f(query):
        return attention(query, key, value, dropout_p=0.3)

    def loss(query):
        return f(query).square().sum()

    output = seeded(f)(leaf)
    (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf, retain_graph=True)
    func = torch.func
    same([seeded(func.grad(loss))(query)], [first])
    same([seeded(func.grad(lambda query: func.grad(loss)(query).sum()))(query)], [second])
    plain, tangent = seeded(lambda: func.jvp(f, (query,), (query,)))()
    numeric = (seeded(f)(query * (1 + 1e-6)) - seeded(f)(query * (1 - 1e-6))) / 2e-6
    same([plain, tangent], [output, numeric], rtol=1e-6, atol=1e-6)
    each = torch.stack([torch.autograd.grad(output, leaf, t, retain_graph=True)[0] for t in cotangents])
    vjps = [torch.vmap(lambda t: torch.autograd.grad(output, leaf, t, retain_graph=True)[0])(cotangents)]
    vjps += [seeded(lambda: torch.vmap(func.vjp(f, query)[1])(cotangents)[0])()]
    same(vjps, [each, each])


@pytest.mark.parametrize("which", range(3))
def test_vmap_of_transforms_with_dropout(device, which):
    tensors = [t.detach() for t in inputs(device, DOUBLE)]
    batch = torch.randn(3, *tensors[which].shape, dtype=DOUBLE, device=device)

    def f(x):
        return attention(*tensors[:which], x, *tensors[which + 1 :], dropout_p=0.3)

    def vmap(f, randomness="different"):
        return seeded(torch.vmap(f, randomness=randomness))

    leaf = batch.clone().requires_grad_()
    output = vmap(f)(leaf)
    expected = torch.autograd.grad(output.square().sum(), leaf)
    same([vmap(torch.func.grad(lambda x: f(x).square().sum()))(batch)], expected)
    same([vmap(lambda x: torch.func.jvp(f, (x,), (x,))[0])(batch)], [output])
    with pytest.raises(RuntimeError, match=r"randomness='different'.*'error'"):
        vmap(lambda x: torch.func.jvp(f, (x,), (x,))[0], "error")(batch)


def test_compile_of_transforms_with_dropout(device):
    query, key, value = (t.detach() for t in inputs(device))

    def f(query):
        return attention(query, key, value, dropout_p=0.3)

    for transform in (
        lambda x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda x: torch.func.jvp(f, (x,), (x,)),
    ):
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(seeded(compiled)(query), seeded(transform)(query))


# Derivatives of every order


@pytest.mark.parametrize(
    "name",
    ["plain", "causal", "gqa", "dropout", "mask", "broadcast mask", "bool mask", "hidden rows", "broadcast keys"],
)
def test_gradcheck(device, name):
    tensors = inputs(
        device, DOUBLE, B=1, H=4 if name == "gqa" else 2, L=3, S=4, E=2, Ev=3, key_heads=2 if name == "gqa" else None
    )
    kwargs = {
        "is_causal": name == "causal",
        "enable_gqa": name == "gqa",
        "dropout_p": 0.4 if name == "dropout" else 0.0,
    }
    if name == "mask":
        tensors.append(make(1, 2, 3, 4, dtype=DOUBLE, device=device))
    if name == "broadcast mask":
        tensors.append(make(3, 1, dtype=DOUBLE, device=device))
    if name == "broadcast keys":
        tensors[1] = make(4, 2, dtype=DOUBLE, device=device)
    mask = None
    if name in ("bool mask", "hidden rows"):
        mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0] * 4], device=device)
        mask = mask.bool() if name == "bool mask" else torch.zeros(3, 4, device=device).masked_fill(mask == 0, -INF)

    def f(*args):
        return attention(*args, **kwargs) if mask is None else attention(*args, mask, **kwargs)

    f = seeded(f)
    torch.autograd.gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=False, fast_mode=True)
    torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("leads", [((3,), (3,), (2, 3)), ((2, 1), (2, 1), (2, 3)), ((1, 1), (2, 3), (2, 3))], ids=str)
def test_differentiable_backward_drops_the_same(device, leads):
    sizes = (5, 8), (7, 8), (7, 4)
    tensors = [make(*lead, *size, dtype=DOUBLE, device=device) for lead, size in zip(leads, sizes, strict=True)]
    torch.manual_seed(3)
    output = attention(*tensors, dropout_p=0.5)
    first = torch.autograd.grad(output.square().sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_in_half(device):
    tensors = inputs(device, HALF)
    grads = torch.autograd.grad(attention(*tensors).square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    assert all(g.isfinite().all() and g.dtype == HALF for g in second)


def test_derivatives_copy_no_grouped_keys(device):
    query, key, value = inputs(device, H=8, L=1, S=64, E=32, Ev=32, key_heads=1)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.numel() for t in tensors)])
            return result

    def f(*args):
        return attention(*args, enable_gqa=True).square().sum()

    with Sizes():
        grads = torch.autograd.grad(f(query, key, value), (query, key, value), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), (query, key, value))
        torch.func.jvp(lambda query: f(query, key, value), (query,), (query,))
    assert largest == key.numel()


def test_higher_derivatives_need_math(device):
    query, key, value = inputs(device, HALF)
    with sdpa_kernel([FLASH, EFFICIENT]):
        with pytest.raises(RuntimeError, match=r"forward-mode AD goes through the math backend.*Enable it"):
            torch.func.jvp(lambda q: attention(q, key, value), (query,), (query,))
        if device == "cuda":
            output = attention(query, key, value)
            with pytest.raises(RuntimeError, match=r"derivative of the backward goes through the math backend"):
                torch.autograd.grad(output.sum(), query, create_graph=True)


# Saved tensors, modules, subclasses, threads


def test_saved_tensors_hooks(device):
    tensors = inputs(device, L=33, S=65, E=4, Ev=4)
    expected = gradients(attention, tensors)
    packed = []

    def pack(t):
        packed.append(t)
        return t.cpu()

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(device)):
        output = attention(*tensors)
        attention(*tensors, dropout_p=0.5)
    assert packed and max(t.numel() for t in packed) < 2 * 4 * 33 * 65, "a score matrix is stored"
    same(torch.autograd.grad(output.square().sum(), tensors), expected)


def test_copies_of_modules(device):
    module = Attend(is_causal=True).to(device)
    tensors = inputs(device)
    expected = module(*tensors)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*tensors), expected)
    assert pickle.loads(pickle.dumps(attention)) is attention and copy.deepcopy(attention) is attention


def test_tensor_subclass_through_torch_function():
    seen = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is attention:
                seen.append((types, kwargs))
                args = [a.as_subclass(torch.Tensor) if isinstance(a, Own) else a for a in args]
                return func(*args, **kwargs)
            return super().__torch_function__(func, types, args, kwargs)

    query, key, value = inputs(grad=False)
    expected = attention(query, key, value, scale=0.2)
    assert torch.equal(attention(query.as_subclass(Own), key, value, scale=0.2), expected)
    assert Own in seen[0][0] and seen[0][1]["scale"] == 0.2
    mask = torch.zeros(5, 7).as_subclass(Own)
    attention(query.as_subclass(Own), key, value, torch.zeros(5, 7))
    with pytest.raises(TypeError, match="scaled_dot_product_attention"):
        attention(query, key, value, Refusing(mask))
    assert len(seen) == 2


class Refusing:
    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, *_):
        return NotImplemented


def test_backward_in_another_thread(device):
    tensors = inputs(device, DOUBLE)
    expected = gradients(attention, tensors)
    with sdpa_kernel(MATH):
        output = attention(*tensors)
    found = {}

    def run():
        with sdpa_kernel(FLASH):  # the backward takes what its forward was allowed
            found["grads"] = torch.autograd.grad(output.square().sum(), tensors)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    same(found["grads"], expected)


def test_arguments_of_the_backward_op_are_checked():
    query, key, value = inputs(grad=False)
    rest = (0.0, False, None, False, ALL)
    output, lse, lse_rest, seed = torch.ops.sdpa.attention_forward(query, key, value, None, *rest, True)
    call = torch.ops.sdpa.attention_backward
    for wrong, text in (
        ((output[..., :3], output, lse, lse_rest, seed), r"\[2, 4, 5, 8\].*\[2, 4, 5, 3\]"),
        ((output, output.half(), lse, lse_rest, seed), "Half"),
        ((output, output, lse[:1], lse_rest, seed), r"\[1, 4, 5\]"),
        ((output, output, lse, lse_rest[:1], seed), r"\[1, 4, 5\]"),
        ((output, output, lse, lse_rest, torch.zeros(1, dtype=torch.int64)), r"\[1\].*dropout_p 0"),
    ):
        grad_output, *saved = wrong
        with pytest.raises(RuntimeError, match=text):
            call(grad_output, query, key, value, None, *saved, *rest, [True] * 4)


# The GPU's own


@only_cuda
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_cuda_graph(p):
    for backend in SDPBackend:
        tensors = inputs("cuda", HALF, L=64, S=64, E=32, Ev=32)
        with sdpa_kernel(backend):
            if sdpa.explain(*tensors, dropout_p=p).chosen is None:
                continue
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                gradients(lambda *args: attention(*args, dropout_p=p), tensors)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = attention(*tensors, dropout_p=p)
                grads = torch.autograd.grad(output.square().sum(), tensors)
            replays = []
            for _ in range(2):
                graph.replay()
                replays.append([output.clone(), *(g.clone() for g in grads)])
            if p == 0:
                same(replays[0], replays[1], rtol=1e-2, atol=1e-2)
                same(replays[0], [attention(*tensors), *gradients(attention, tensors)], rtol=1e-2, atol=1e-2)
            else:
                assert not torch.equal(replays[0][0], replays[1][0]), f"{backend.name}: replays draw the same mask"
            with torch.no_grad():  # new inputs in the same memory
                tensors[2].zero_()
            graph.replay()
            assert (output == 0).all()


@only_cuda
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_cuda_graph_of_decoding(dtype):
    tensors = inputs("cuda", dtype, L=1, S=5000, E=64, Ev=64, grad=False)
    for backend in (FLASH, EFFICIENT):
        with sdpa_kernel(backend):
            if sdpa.explain(*tensors).chosen is None:
                continue
            expected = attention(*tensors)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                first = attention(*tensors)
                second = attention(first, *tensors[1:])  # begins while the kernels before it end
            expected_second = attention(expected, *tensors[1:])
            for _ in range(3):
                first.fill_(torch.nan), second.fill_(torch.nan)
                graph.replay()
                assert torch.equal(first, expected) and torch.equal(second, expected_second)


@only_cuda
def test_backward_op_wants_one_device():
    query, key, value = inputs("cuda", grad=False)
    rest = (0.0, False, None, False, ALL)
    output, *saved = torch.ops.sdpa.attention_forward(query, key, value, None, *rest, True)
    with pytest.raises(RuntimeError, match="on the query's device, cuda:0, got one on cpu"):
        torch.ops.sdpa.attention_backward(output.cpu(), query, key, value, None, output, *saved, *rest, [True] * 4)


@only_cuda
def test_runs_on_the_current_stream():
    tensors = inputs("cuda", HALF, L=512, S=512, E=64, Ev=64, grad=False)
    expected = attention(*tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [t.clone() for t in tensors]
        output = attention(*late)
    stream.synchronize()
    assert torch.equal(output, expected)


@only_cuda
def test_same_seed_same_mask_on_every_backend():
    tensors = inputs("cuda", HALF, L=64, S=64, E=32, Ev=32, grad=False)
    results = []
    for backend in SDPBackend:
        torch.manual_seed(4)
        with sdpa_kernel(backend):
            if sdpa.explain(*tensors, dropout_p=0.5).chosen is not None:
                results.append(attention(*tensors, dropout_p=0.5))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-2, atol=1e-2)


def test_seed_of_the_op_is_the_generators(device):
    tensors, expected = inputs(device, grad=False), upcoming_seed(device)
    _, _, _, seed = torch.ops.sdpa.attention_forward(*tensors, None, 0.5, False, None, False, ALL)
    assert seed.item() == expected


@only_cuda
def test_host_time_is_at_most_torchs():
    tensors = inputs("cuda", HALF, B=1, H=1, L=16, S=16, E=64, Ev=64, grad=False)

    def host_time(call):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call(*tensors)
        return (time.perf_counter() - start) / 100

    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(flash), sdpa_kernel(FLASH):
        calls = attention, F.scaled_dot_product_attention
        for call in calls:
            host_time(call)
        rounds = [[host_time(call) for call in calls] for _ in range(31)]  # in turn, so that both see the same noise
    ours, theirs = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
    print(f"host time of a call: sdpa {ours:.1f} us, torch {theirs:.1f} us")
    assert ours <= 1.1 * theirs
