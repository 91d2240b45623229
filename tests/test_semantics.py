"""Every line of the semantics on every backend that takes the case, forward and backward against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reference import (
    INF,
    assert_close_to_reference,
    check,
    dropout_keep,
    dropout_rescale,
    eager,
    formula,
    make,
    poison,
    require,
    strided,
    upcoming_seed,
)

import sdpa
from sdpa import SDPBackend
from sdpa import scaled_dot_product_attention as attention

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
dtypes = pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
all_dtypes = pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE], ids=str)


def inputs(device, dtype=SINGLE, B=2, H=3, L=5, S=7, E=8, Ev=8, key_heads=None, grad=True):
    heads = H if key_heads is None else key_heads
    shapes = (B, H, L, E), (B, heads, S, E), (B, heads, S, Ev)
    return [make(*shape, dtype=dtype, device=device, grad=grad) for shape in shapes]


def all_of(backend, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Output, LSE and seed, from the op underneath."""
    require(backend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    with sdpa.sdpa_kernel(backend):
        switches = sdpa.backends.current_switches()
    return torch.ops.sdpa.attention_forward(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, switches, True
    )


# Shapes


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 4)],
        [(3, 5, 8), (3, 7, 8), (3, 7, 4)],
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)],
        [(2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 4)],
        [(2, 3, 5, 8), (3, 7, 8), (7, 4)],
        [(5, 8), (2, 3, 7, 8), (3, 7, 4)],
        [(2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 4)],
        [(1, 1, 5, 8), (2, 3, 7, 8), (1, 3, 7, 4)],
        [(2, 3, 5, 8), (2, 3, 7, 8), (4, 1, 1, 7, 4)],
        [(2, 1, 3, 5, 8), (1, 2, 3, 7, 8), (2, 2, 1, 7, 4)],
        [(0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 4)],
        [(0, 2, 3, 5, 8), (1, 2, 3, 7, 8), (0, 2, 3, 7, 4)],
    ],
    ids=str,
)
@dtypes
def test_ranks_and_broadcasting(device, backend, dtype, shapes):
    check(backend, *(make(*shape, dtype=dtype, device=device) for shape in shapes))


@pytest.mark.parametrize("dims", [*itertools.product((0, 1, 6), repeat=4), (33, 65, 17, 9), (17, 3, 31, 33)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@dtypes
def test_lengths_and_head_dims(device, backend, dtype, dims, is_causal):
    L, S, E, Ev = dims
    check(backend, *inputs(device, dtype, 1, 2, L, S, E, Ev), is_causal=is_causal)


def test_empty_calls_give_zeros_and_lse_of_nothing(device, backend):
    output, lse, *_ = all_of(backend, *inputs(device, S=0, grad=False))
    assert (output == 0).all() and output.shape == (2, 3, 5, 8)
    assert (lse == -INF).all() and lse.shape == (2, 3, 5)


@pytest.mark.parametrize(
    "heads, enable_gqa", [((0, 0, 0), True), ((0, 2, 2), True), ((0, 0, 1), True), ((0, 1, 0), False)], ids=str
)
def test_no_heads_give_an_empty_output(device, heads, enable_gqa):
    query, key, value = (torch.ones(2, n, 5, 8, device=device, requires_grad=True) for n in heads)
    output = attention(query, key, value, enable_gqa=enable_gqa)
    assert output.shape == (2, 0, 5, 8)
    for create_graph in (False, True):
        grads = torch.autograd.grad(output.sum(), (query, key, value), retain_graph=True, create_graph=create_graph)
        assert all((g == 0).all() for g in grads)
    assert sdpa.explain(query, key, value, enable_gqa=enable_gqa).chosen is not None


# Scale and causality


@pytest.mark.parametrize("scale", [None, 0, 0.0, -0.7, 2.5, 1e-3, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@dtypes
def test_scale(device, backend, dtype, scale, is_causal):
    check(backend, *inputs(device, dtype), is_causal=is_causal, scale=scale)


def test_scale_beyond_float32(device):
    query, key, value = inputs(device, DOUBLE, grad=False)
    torch.testing.assert_close(attention(query / 1e200, key, value, scale=1e200), attention(query, key, value, scale=1))


def test_scale_by_position(device):
    query, key, value = inputs(device, grad=False)
    ours = attention(query, key, value, None, 0.0, False, 0.3)
    assert torch.equal(ours, attention(query, key, value, scale=0.3))


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 7), (7, 1), (65, 130), (130, 65)], ids=str)
@dtypes
def test_causal_is_top_left(device, backend, dtype, lengths):
    L, S = lengths
    query, key, value = inputs(device, dtype, L=L, S=S)
    output, *_ = check(backend, query, key, value, is_causal=True)
    first = value[:, :, 0].detach()  # query 0 sees key 0 alone
    torch.testing.assert_close(output[:, :, 0].detach(), first)


# Masks


def mask_of(kind, shape, device):
    if kind == "bool":
        return torch.rand(shape).to(device) > 0.4
    return make(*shape, dtype=kind, device=device)


MASK_SHAPES = [(), (1,), (7,), (5, 1), (1, 7), (5, 7), (3, 1, 1), (3, 5, 7), (2, 1, 1, 7), (2, 1, 5, 1), (1, 3, 5, 7)]
MASK_SHAPES += [(2, 3, 5, 7), (1, 1, 1, 1)]
mask_kinds = pytest.mark.parametrize("kind", ["bool", HALF, BRAIN, SINGLE], ids=str)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@mask_kinds
@dtypes
def test_mask_shapes(device, backend, dtype, kind, shape):
    check(backend, *inputs(device, dtype), mask_of(kind, shape, device))


@pytest.mark.parametrize("how", ["expanded", "transposed", "columns", "step", "odd"])
@mask_kinds
def test_mask_strides(device, backend, kind, how):
    if how == "expanded":
        mask = mask_of(kind, (3, 1, 7), device).detach().expand(2, 3, 5, 7)
        mask.requires_grad_(kind != "bool")
    elif kind == "bool" and how in ("step", "odd"):
        wide = mask_of(kind, (2, 3, 5, 15), device)
        mask = wide[..., ::2][..., :7] if how == "step" else wide[..., 1:8]
    else:
        mask = strided(mask_of(kind, (2, 3, 5, 7), device), how)
    check(backend, *inputs(device, HALF), mask)


@pytest.mark.parametrize("kind", ["bool", SINGLE, DOUBLE], ids=str)
def test_mask_with_float64(device, backend, kind):
    check(backend, *inputs(device, DOUBLE), mask_of(kind, (3, 5, 7), device))


def test_mask_with_rank_5_that_does_not_fold(device, backend):
    shapes = (2, 1, 3, 5, 8), (1, 2, 3, 7, 8), (2, 2, 1, 7, 4), (2, 1, 1, 5, 7)
    check(backend, *(make(*shape, dtype=HALF, device=device) for shape in shapes))


def test_rank_6_around_a_dim_of_one(device, backend):
    """Dims 0 and 2 do not fold, though each folds with the dim of one between them."""
    query = make(4, 3, 1, 2, 5, 8, dtype=HALF, device=device, grad=False).permute(1, 2, 0, 3, 4, 5).requires_grad_()
    key, value = (make(3, 1, 4, 2, 7, 8, dtype=HALF, device=device) for _ in range(2))
    check(backend, query, key, value)
    mask = make(3, 1, 1, 1, 5, 7, device=device)
    check(backend, query.detach().contiguous(), key, value, mask)


def test_deterministic_gradient_of_a_mask_that_calls_share(device, backend, deterministic):
    """The leading dims do not fold because of the mask, and what each call gives its gradient is added up."""
    tensors = [make(2, 3, 4, n, 64, dtype=HALF, device=device) for n in (40, 50, 50)]
    check(backend, *tensors, make(3, 1, 40, 50, device=device))


@pytest.mark.parametrize("kind", ["bool", HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("rows", [[1], [0, 4], [0, 1, 2, 3, 4]], ids=str)
@dtypes
def test_rows_with_nothing_to_attend_to(device, backend, dtype, kind, rows):
    mask = mask_of(kind, (5, 7), device).detach()
    mask[:, 0] = True if kind == "bool" else 0
    mask[rows] = False if kind == "bool" else -INF
    mask.requires_grad_(kind != "bool")
    query, key, value = inputs(device, dtype)
    output, grad_query, *_, grad_last = check(backend, query, key, value, mask)
    assert (output[:, :, rows] == 0).all() and (grad_query[:, :, rows] == 0).all()
    if kind != "bool":
        assert (grad_last[rows] == 0).all()
    with torch.no_grad():
        _, lse, *_ = all_of(backend, query, key, value, mask)
        _, expected = formula(query.double(), key.double(), value.double(), mask if kind == "bool" else mask.double())
    assert torch.equal(lse == -INF, expected == -INF) and (lse[:, :, rows] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_scores_of_minus_infinity_without_a_mask(dtype, grad):
    """On a CPU, whose softmax finds such rows by itself."""
    query, key, value = (make(2, 3, 16, 64, dtype=dtype, grad=False) for _ in range(3))
    query[0, 1, 5, 0], key[..., 0] = float("inf"), -1
    expected = eager(*(t.double() for t in (query, key, value)))
    rows = torch.zeros(2, 3, 16, dtype=torch.bool)
    rows[0, 1, 5] = True
    tensors = [t.requires_grad_(grad) for t in (query, key, value)]
    for shape in (slice(None), (0, 1)):  # of two dims, too
        output = attention(*(t[shape] for t in tensors)).detach()
        assert (output[rows[shape]] == 0).all()
        torch.testing.assert_close(output[~rows[shape]].double(), expected[shape][~rows[shape]], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@dtypes
def test_rows_of_lowest_finite_values_are_uniform(device, backend, dtype, kind, grad):
    mask = torch.zeros(5, 7, dtype=kind, device=device)
    mask[2] = torch.finfo(kind).min
    query, key, value = inputs(device, dtype, grad=grad)
    with torch.no_grad():
        query[:, :, 2] = 0  # so that adding it to the scores leaves a constant, whatever the mask's precision
    output, *_ = check(backend, query, key, value, mask)
    exact = value.detach()
    assert_close_to_reference(output[:, :, 2].detach(), exact.double().mean(2), exact.mean(2))


@dtypes
def test_lse_is_natural_log_in_float32(device, backend, dtype):
    query, key, value = inputs(device, dtype, L=33, S=65, grad=False)
    for kwargs in ({}, {"is_causal": True}, {"scale": -0.3}, {"attn_mask": mask_of(SINGLE, (33, 65), device).detach()}):
        _, lse, *_ = all_of(backend, query, key, value, **kwargs)
        double = {k: v.double() if torch.is_tensor(v) else v for k, v in kwargs.items()}
        _, expected = formula(query.double(), key.double(), value.double(), **double)
        _, near = formula(query.float(), key.float(), value.float(), **kwargs)
        assert lse.dtype == SINGLE
        assert_close_to_reference(lse, expected, near, "LSE")


# Dropout


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("is_causal", [False, True])
@dtypes
def test_dropout(device, backend, dtype, p, is_causal):
    check(backend, *inputs(device, dtype, L=33, S=37), dropout_p=p, is_causal=is_causal)


@pytest.mark.parametrize(
    "shapes", [[(5, 8), (7, 8), (7, 4)], [(2, 1, 3, 5, 8), (1, 2, 3, 7, 8), (2, 2, 1, 7, 4)]], ids=str
)
def test_dropout_of_other_ranks(device, backend, shapes):
    check(backend, *(make(*shape, device=device) for shape in shapes), dropout_p=0.4)


def test_dropout_with_mask_and_groups(device, backend):
    check(
        backend,
        *inputs(device, H=4, key_heads=2, L=19, S=33),
        mask_of(SINGLE, (19, 33), device),
        dropout_p=0.25,
        enable_gqa=True,
    )


@pytest.mark.parametrize("E", [32, 64, 80, 96, 128, 160, 256])
def test_dropout_over_many_keys(device, backend, E):
    check(backend, *inputs(device, HALF, B=1, H=2, L=40, S=200, E=E), dropout_p=0.4)


def test_dropout_follows_the_generator(device, backend):
    args = inputs(device, L=64, S=64, grad=False)
    require(backend, *args, dropout_p=0.5)

    def run():
        with sdpa.sdpa_kernel(backend):
            return attention(*args, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    again = run()
    assert torch.equal(first, again) and not torch.equal(first, second)
    with sdpa.sdpa_kernel(backend):
        assert (attention(*args, dropout_p=1.0) == 0).all()


def test_dropout_mask_and_rate(device, backend):
    # Queries of zeros weigh all keys alike, and values of a unit matrix show the weights: the mask can be read off.
    n, p = 128, 0.3
    query, key = torch.zeros(2, 3, n, 8, device=device), torch.randn(2, 3, n, 8, device=device)
    value = torch.eye(n, device=device).expand(2, 3, n, n)
    seed = upcoming_seed(device)
    require(backend, query, key, value, dropout_p=p)
    with sdpa.sdpa_kernel(backend):
        weights = attention(query, key, value, dropout_p=p)
    expected = dropout_keep(seed, p, 6, n, n).view(2, 3, n, n)
    assert torch.equal(weights.cpu() != 0, expected)
    torch.testing.assert_close(weights.cpu()[expected] * n, torch.full((int(expected.sum()),), dropout_rescale(p)))
    kept = expected.double().mean()
    deviations = abs(kept - (1 - p)) / math.sqrt(p * (1 - p) / expected.numel())
    assert deviations < 5


def test_no_dropout_leaves_the_generator_alone(device, backend):
    args = inputs(device, HALF, grad=False)
    require(backend, *args)
    before = upcoming_seed(device)
    with sdpa.sdpa_kernel(backend):
        attention(*args)
    assert upcoming_seed(device) == before


# Gradients


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
def test_only_wanted_gradients(device, backend, wanted):
    tensors = [*inputs(device, HALF), mask_of(SINGLE, (5, 1), device)]
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(want)
    check(backend, *tensors)


@dtypes
def test_gradients_of_expanded_inputs(device, backend, dtype):
    query, key, value = inputs(device, dtype)
    key, value = (t.detach()[:1, :1].expand(2, 3, -1, -1).requires_grad_() for t in (key, value))
    check(backend, query, key, value)


def test_second_backward_needs_retained_graph(device):
    query, key, value = inputs(device)
    output = attention(query, key, value)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_inputs_changed_in_place_before_backward_are_noticed(device):
    query, key, value = inputs(device)
    output = attention(query, key, value)
    with torch.no_grad():
        key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Grouped queries


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@dtypes
def test_grouped_queries(device, backend, dtype, heads, is_causal):
    check(
        backend,
        *inputs(device, dtype, H=heads[0], key_heads=heads[1], L=17, S=19),
        is_causal=is_causal,
        enable_gqa=True,
    )


@pytest.mark.parametrize("shapes", [[(4, 5, 8), (2, 7, 8), (2, 7, 8)], [(2, 2, 4, 5, 8), (1, 2, 2, 7, 8), (2, 7, 8)]])
def test_grouped_queries_of_other_ranks(device, backend, shapes):
    check(backend, *(make(*shape, dtype=HALF, device=device) for shape in shapes), enable_gqa=True)


@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 1, 2)], ids=str)
def test_key_or_value_of_one_head(device, backend, heads):
    q, k, v = heads
    check(
        backend,
        make(2, q, 5, 8, dtype=HALF, device=device),
        make(2, k, 7, 8, dtype=HALF, device=device),
        make(2, v, 7, 8, dtype=HALF, device=device),
        enable_gqa=True,
    )


def test_grouped_masks_and_their_gradients(device, backend):
    for shape in [(2, 4, 5, 7), (4, 1, 1), (1, 4, 5, 7)]:
        check(backend, *inputs(device, HALF, H=4, key_heads=2), mask_of(SINGLE, shape, device), enable_gqa=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the CUDA allocator")
@pytest.mark.parametrize("how", ["gqa", "expanded"])
def test_keys_are_not_copied(how):
    for backend in SDPBackend:
        query = torch.randn(4, 16, 1, 64, device="cuda", dtype=HALF)
        key = torch.randn(4, 1, 32768, 64, device="cuda", dtype=HALF)
        value = torch.randn_like(key)
        if how == "expanded":
            key, value = key.expand(-1, 16, -1, -1), value.expand(-1, 16, -1, -1)
        with sdpa.sdpa_kernel(backend):
            attention(query, key[:, :, :8], value[:, :, :8], enable_gqa=how == "gqa")  # cuBLAS takes its workspace
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            attention(query, key, value, enable_gqa=how == "gqa")
        one_copy = 4 * 32768 * 64 * 2
        scores = sdpa.explain(query, key, value, enable_gqa=how == "gqa").math_scratch_bytes
        extra = torch.cuda.max_memory_allocated() - before - (scores if backend == SDPBackend.MATH else 0)
        assert extra < one_copy, f"{backend.name} took {extra} bytes; the keys of one head each are {one_copy}"


# Layout


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@dtypes
def test_output_has_the_querys_layout(device, backend, dtype, order):
    _, key, value = inputs(device, dtype)
    shape = (2, 3, 5, 8)
    query = torch.randn([shape[d] for d in order] + [8]).to(device, dtype)
    query = query.permute(*(order.index(d) for d in range(3)), 3).requires_grad_()
    assert query.shape == shape
    output, *_ = check(backend, query, key, value)
    assert output.stride() == query.stride()
    if backend == SDPBackend.MATH:
        assert torch.func.jvp(lambda q: attention(q, key, value), (query,), (query,))[0].stride() == query.stride()
    wider = torch.cat([value, value], -1).detach()
    output, *_ = check(backend, query.detach(), key.detach(), wider)
    assert output.permute(*order, 3).is_contiguous()


def test_layout_without_a_querys_own(device, backend):
    _, key, value = inputs(device, HALF)
    for query in (
        make(5, 8, dtype=HALF, device=device),
        make(1, 1, 5, 8, dtype=HALF, device=device).expand(2, 3, 5, 8),
    ):
        require(backend, query, key, value)
        with sdpa.sdpa_kernel(backend):
            assert attention(query, key, value).is_contiguous()


@pytest.mark.parametrize("how", ["transposed", "columns", "step", "odd", "packed"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@dtypes
def test_strides_and_offsets(device, backend, dtype, how, which):
    tensors = inputs(device, dtype, L=19, S=21, E=9, Ev=8)
    check(backend, *(strided(t, how) if i in which else t for i, t in enumerate(tensors)))


@pytest.mark.parametrize("how", ["transposed", "columns", "expanded"])
def test_strides_of_the_outputs_gradient(device, backend, how):
    query, key, value = inputs(device, HALF)
    require(backend, query, key, value)
    grad = make(2, 3, 5, 8, dtype=HALF, device=device, grad=False)
    other = grad[:, :, :1, :1].expand_as(grad) if how == "expanded" else strided(grad, how).detach()
    results = []
    for g in (other.contiguous(), other):
        with sdpa.sdpa_kernel(backend):
            results.append(torch.autograd.grad(attention(query, key, value), (query, key, value), g))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# Determinism, dtypes


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_forward_is_bitwise_repeatable(device, backend, dtype):
    args = inputs(device, dtype, L=130, S=257, E=40, grad=False)
    require(backend, *args)
    results = []
    for _ in range(4):
        poison(device, (2, 3, 130, 8))
        with sdpa.sdpa_kernel(backend):
            results.append(attention(*args))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mask_shape", [None, (2, 3, 130, 257), (130, 257)], ids=str)
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_backward_is_bitwise_repeatable_if_asked_for(device, backend, dtype, mask_shape, deterministic):
    args = inputs(device, dtype, L=130, S=257)
    if mask_shape is not None:
        args.append(make(*mask_shape, device=device))
    results = []
    for _ in range(4):
        torch.manual_seed(0)
        results.append(check(backend, *args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
@all_dtypes
def test_dtypes(device, backend, dtype, is_causal):
    check(backend, *inputs(device, dtype, L=70, S=90, E=40, Ev=24), is_causal=is_causal)


@all_dtypes
def test_accuracy_of_long_rows(device, backend, dtype):
    check(backend, *inputs(device, dtype, B=1, H=1, L=4, S=4096, E=64, Ev=16))


# Adversarial inputs. Where scores are exact in every dtype eager is accurate, and the comparison sharp.


def exact_scores(scores, dtype, device, E=8):
    """Query and key with these scores at scale 1; (L, S), constant along L."""
    query = torch.zeros(1, 1, scores.size(0), E, dtype=dtype, device=device)
    query[..., 0] = 1
    key = torch.zeros(1, 1, scores.size(1), E, dtype=dtype, device=device)
    key[0, 0, :, 0] = scores[0].to(device, dtype)
    assert torch.equal(key[0, 0, :, 0].double().cpu(), scores[0].double())
    return query, key, make(1, 1, scores.size(1), E, dtype=dtype, device=device, grad=False)


PROFILES = {
    "growing": torch.arange(200) / 2,
    "growing fast": torch.arange(200) * 32.0 - 3200,
    "falling": 100 - torch.arange(200) / 2,
    "alternating": 10240.0 * (1 - 2 * (torch.arange(200) % 2)),
    "high": torch.full((200,), 10240.0),
    "low": torch.full((200,), -10240.0),
    "late jump": torch.where(torch.arange(200) == 150, 10240.0, -10240.0),
    "first tiles low": torch.where(torch.arange(200) < 130, -10240.0, 0.0),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
@dtypes
def test_adversarial_scores(device, backend, dtype, profile, is_causal):
    query, key, value = exact_scores(PROFILES[profile].expand(70, -1), dtype, device)
    check(backend, query, key, value, scale=1.0, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@dtypes
def test_gradients_at_large_logits(device, backend, dtype, is_causal):
    query, key, value = inputs(device, dtype, L=70, S=90, E=16)
    check(backend, query, key, value, scale=1000.0, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["bool", SINGLE], ids=str)
@dtypes
def test_first_tiles_all_masked(device, backend, dtype, kind):
    mask = torch.zeros(40, 200, dtype=torch.bool, device=device)
    mask[:, 140:] = True
    if kind != "bool":
        mask = torch.zeros(40, 200, device=device).masked_fill(~mask, -INF).requires_grad_()
    check(backend, *inputs(device, dtype, L=40, S=200), mask)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@dtypes
def test_keys_that_a_bool_mask_hides_do_not_matter(device, backend, dtype, bad):
    query, key, value = inputs(device, dtype, L=20, S=90, grad=False)
    hidden = torch.rand(90, device=device) > 0.5
    hidden[0] = False
    clean = check(backend, query, key, value, ~hidden)[0]
    key[:, :, hidden] = bad
    assert torch.equal(check(backend, query, key, value, ~hidden)[0], clean)


def test_nan_spreads_to_its_own_row_alone(device, backend):
    query, key, value = inputs(device, HALF, L=70, S=90, grad=False)
    require(backend, query, key, value)
    with sdpa.sdpa_kernel(backend):
        clean = attention(query, key, value)
        query[1, 2, 33, 3] = math.nan
        output = attention(query, key, value)
    assert output[1, 2, 33].isnan().all()
    output[1, 2, 33] = clean[1, 2, 33]
    assert torch.equal(output, clean)


# The math backend's memory


@pytest.mark.parametrize("limit", [1, 1000, 20_000])
@pytest.mark.parametrize("is_causal", [False, True])
def test_math_scratch_limit_changes_no_answer(device, limit, is_causal):
    args = inputs(device, H=4, key_heads=2, L=23, S=29)
    mask = None if is_causal else mask_of(SINGLE, (4, 23, 1), device)
    before = sdpa.math_scratch_limit()
    assert before == 256 * 2**20
    kwargs = {"is_causal": is_causal, "dropout_p": 0.2, "enable_gqa": True}
    try:
        sdpa.set_math_scratch_limit(limit)
        assert sdpa.math_scratch_limit() == limit
        check(SDPBackend.MATH, *args, mask, **kwargs)
        row_of_scores = 2 * 29  # of the heads that share a key head: always allowed
        assert sdpa.explain(*args, mask, **kwargs).math_scratch_bytes <= max(limit, row_of_scores * 13)
    finally:
        sdpa.set_math_scratch_limit(before)


@pytest.mark.parametrize("mask_shape", [(), (2, 6, 65, 70), (6, 65, 70), (2, 1, 65, 70), (65, 70), (70,)])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_math_on_several_threads(dtype, mask_shape):
    """Each takes heads of its own, but for what adds to the same gradient of a mask."""
    query, key, value = inputs("cpu", dtype, B=2, H=6, key_heads=3, L=65, S=70)
    mask = mask_of(SINGLE, mask_shape, "cpu") if mask_shape else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        kwargs = {"is_causal": mask is None, "dropout_p": 0.2, "enable_gqa": True}
        check(SDPBackend.MATH, query, key, value, mask, **kwargs)
        check(SDPBackend.MATH, query, *(t[:, :1] for t in (key, value)), mask, **kwargs)
        with torch.inference_mode():
            output = sdpa.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        assert output.is_inference()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [0, -5])
def test_math_scratch_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match=str(limit)):
        sdpa.set_math_scratch_limit(limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the CUDA allocator")
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_math_memory_stays_bounded(grad):
    shape = 1, 32, 16384, 64
    tensors = [torch.randn(shape, device="cuda", dtype=HALF, requires_grad=grad) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa.sdpa_kernel(SDPBackend.MATH):
        output = attention(*tensors)
        if grad:
            torch.autograd.grad(output, tensors, output.detach())
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2**30, f"{extra / 2**20:.0f} MiB"


# Bad input: an error, with the values in it


def bad(*shapes, **kwargs):
    defaults = [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
    return [make(*s, grad=False) for s in [*shapes, *defaults[len(shapes) :]]], kwargs


BAD = {
    "head dims": (bad((2, 3, 5, 8), (2, 3, 7, 9)), ["8", "9"]),
    "lengths": (bad((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 6, 8)), ["7", "6"]),
    "leading dims": (bad((2, 3, 5, 8), (4, 3, 7, 8)), ["[2, 3, 5, 8]", "[4, 3, 7, 8]"]),
    "heads": (bad((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), ["[2, 4, 5, 8]", "[2, 2, 7, 8]", "enable_gqa"]),
    "rank": (bad((8,)), ["[8]"]),
    "groups": (bad((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), enable_gqa=True), ["4", "3"]),
    "no heads": (bad((2, 4, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8), enable_gqa=True), ["4", "0"]),
    "key and value heads": (bad((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 8), enable_gqa=True), ["3", "2"]),
    "no heads dim": (bad((5, 8), (7, 8), (7, 8), enable_gqa=True), ["[5, 8]", "[7, 8]"]),
    "p high": (bad(dropout_p=1.5), ["1.5"]),
    "p low": (bad(dropout_p=-0.1), ["-0.1"]),
    "p nan": (bad(dropout_p=math.nan), ["nan"]),
    "scale inf": (bad(scale=INF), ["inf"]),
    "scale nan": (bad(scale=math.nan), ["nan"]),
    "scale high": (bad(scale=1e39), ["1e+39", "float32"]),
    "scale low": (bad(scale=-1e300), ["-1e+300", "float32"]),
    "causal and mask": (bad(is_causal=True, attn_mask=torch.ones(5, 7)), ["is_causal", "[5, 7]"]),
    "mask shape": (bad(attn_mask=torch.ones(5, 6)), ["[5, 6]", "[2, 3, 5, 7]"]),
    "mask rank": (bad(attn_mask=torch.ones(1, 2, 3, 5, 7)), ["[1, 2, 3, 5, 7]", "[2, 3, 5, 7]"]),
    "mask int": (bad(attn_mask=torch.ones(5, 7, dtype=torch.int64)), ["Long"]),
    "mask float64": (bad(attn_mask=torch.ones(5, 7, dtype=DOUBLE)), ["Double", "Float"]),
    "mask device": (bad(attn_mask=torch.ones(5, 7, device="meta")), ["meta", "cpu"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    (tensors, kwargs), values = BAD[name]
    for call in (attention, sdpa.explain):
        with pytest.raises(RuntimeError) as error:
            call(*tensors, **kwargs)
        missing = [v for v in values if v not in str(error.value)]
        assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_for_meta_tensors(name):
    (tensors, kwargs), values = BAD[name]
    meta = {k: v.to("meta") if torch.is_tensor(v) and name != "mask device" else v for k, v in kwargs.items()}
    if name == "mask device":
        meta["attn_mask"] = torch.ones(5, 7)
    with pytest.raises(RuntimeError) as error:
        attention(*(t.to("meta") for t in tensors), **meta)
    spelled = {"Long": "int64", "Double": "float64", "Float": "float32"}
    missing = [v for v in values if spelled.get(v, v) not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_tensor_is_named():
    dense = make(2, 3, 5, 8)
    nested = torch.nested.nested_tensor([make(3, 5, 8, grad=False), make(3, 4, 8, grad=False)])
    for wrong, text in (
        (None, "must be a Tensor, got None"),
        ([1], r"must be a Tensor, got \[1\]"),
        (dense.to_sparse(), "must be a dense tensor, got one of layout torch.sparse_coo"),
        (nested, "must be a dense tensor, got a nested one"),
    ):
        for position, name in enumerate(("query", "key", "value", "attn_mask")):
            args = [dense] * 3 + [None]
            args[position] = wrong
            if wrong is not None or name != "attn_mask":
                with pytest.raises(TypeError, match=f"{name} {text}"):
                    attention(*args)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_integer_dtypes_are_refused(device, dtype):
    args = [torch.ones(2, 3, 5, 8, dtype=dtype, device=device) for _ in range(3)]
    name = {torch.int32: "Int", torch.bool: "Bool", torch.complex64: "ComplexFloat"}[dtype]
    with pytest.raises(RuntimeError, match=f"got {name}"):
        attention(*args)


@pytest.mark.parametrize("which", [1, 2])
def test_mixed_dtypes_and_devices_are_refused(device, which):
    args = inputs(device, grad=False)
    args[which] = args[which].half()
    with pytest.raises(RuntimeError, match=r"Float.*Half"):
        attention(*args)
    with pytest.raises(RuntimeError, match=r"float32.*float16"):
        attention(*(t.to("meta") for t in args))
    args = inputs(device, grad=False)
    args[which] = args[which].to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        attention(*args)


def test_bad_input_is_not_blamed_on_backends(device, recwarn):
    query, key, value = inputs(device, grad=False)
    with sdpa.sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="same head dim"):
        attention(query, key[..., :4], value)
    assert not recwarn.list
