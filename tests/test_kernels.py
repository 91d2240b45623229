"""Every compiled kernel against float64, forward and backward, over a sample of everything that a call can vary."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from reference import INF, assert_close_to_reference, check, eager, make, poison, require, strided

import sdpa
from sdpa import SDPBackend
from sdpa.backends import BACKEND, NUMBER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
VARIANTS = sdpa._C.variants()
PATHS = sorted({(BACKEND[v["backend"]], v["path"], v["dtype"]) for v in VARIANTS}, key=str)

HEAD_DIMS = [(d, d) for d in (1, 8, 17, 32, 40, 64, 72, 80, 96, 100, 128)]
HEAD_DIMS += [(64, 32), (32, 64), (8, 128), (128, 8), (65, 33), (24, 100)]
MIDDLE = [(129, 129), (160, 160), (192, 128), (192, 192), (256, 256), (64, 256), (200, 17)]
WIDE = [(512, 512), (300, 40), (40, 300)]  # memory-efficient alone
LENGTHS = [(1, 1), (1, 300), (300, 1), (7, 129), (129, 7), (63, 65), (64, 64), (65, 63), (128, 128), (127, 257)]
LENGTHS += [(257, 127), (200, 333), (16, 1031), (515, 511)]
LAYOUTS = ["contiguous", "contiguous", "transposed", "columns", "step", "odd", "packed"]
MASKS = ["bool", "float16", "bfloat16", "float32"]
MASK_SHAPES = ["LS", "1S", "L1", "HLS", "B11S", "B1LS", "BHLS", ""]
PLAIN, ALL = 30, 30  # calls of each path: without mask and dropout, and with; all head dims are among them


def sampled(choices, count, dice):
    """Every choice as often as any other, in random order."""
    deck = []
    while len(deck) < count:
        deck += dice.sample(choices, len(choices))
    return deck[:count]


def calls(backend, path, dtype):
    dice = random.Random(f"{backend.name} {path} {dtype}")
    for number, count in enumerate((PLAIN, ALL)):
        dims = HEAD_DIMS + MIDDLE + (WIDE if backend == EFFICIENT else [])
        axes = {
            "dims": dims,
            "lengths": LENGTHS,
            "is_causal": [False, True],
            "group": [1, 4],
            "layout": LAYOUTS,
            "scale": [None, None, 0.3, -0.2, 0.0],
            "mask": [None] if number == 0 else [None, *MASKS],
            "mask_shape": MASK_SHAPES,
            "dropout_p": [0.0] if number == 0 else [0.0, 0.0, 0.3],
        }
        for row in zip(*(sampled(choices, count, dice) for choices in axes.values()), strict=True):
            call = dict(zip(axes, row, strict=True))
            if call["mask"] is not None:
                call["is_causal"] = False
            else:
                call["mask_shape"] = ""
            yield call


def wide_calls(backend, path, dtype):
    """Head dims over 256 without gradients: there may be a kernel that has no backward."""
    dice = random.Random(f"wide {backend.name} {path} {dtype}")
    if backend != EFFICIENT:
        return
    for call in [*calls(backend, path, dtype)][::2]:
        yield call | {"dims": dice.choice([(512, 512), (300, 40), (40, 300), (257, 272), (384, 500)]), "wide": True}


def decode_calls(backend, path, dtype):
    """Short queries without gradients: the keys may be split over blocks."""
    dice = random.Random(f"decode {backend.name} {path} {dtype}")
    axes = {
        "dims": [(64, 64), (128, 128), (128, 64), (40, 100), (8, 17), (256, 256)],
        "lengths": [(1, 1), (1, 63), (1, 64), (1, 2000), (1, 70_001), (3, 5000), (5, 300), (16, 16), (16, 9_999)],
        "is_causal": [False, False, True],
        "group": [1, 2, 4],
        "layout": LAYOUTS,
        "scale": [None, None, 0.3, -0.2, 0.0],
        "mask": [None, None, *MASKS],
        "mask_shape": MASK_SHAPES,
    }
    for row in zip(*(sampled(choices, 30, dice) for choices in axes.values()), strict=True):
        call = dict(zip(axes, row, strict=True), dropout_p=0.0, decode=True)
        if call["mask"] is not None:
            call["is_causal"] = False
        yield call


def hopper_calls(backend, path, dtype):
    """What Hopper's own kernels take."""
    if path != 90:
        return
    dice = random.Random(f"hopper {backend.name} {dtype}")
    dims = [(d, d) for d in (40, 64, 72, 80, 96, 104, 128, 136, 160, 192, 200, 256)]
    axes = {
        "dims": [*dims, (64, 8), (8, 64), (128, 64), (64, 128), (192, 128), (72, 256)],
        "lengths": [(512, 512), (515, 1000), (700, 129), (1031, 64), (1100, 17), (1024, 1), (1024, 385), (1300, 1000)],
        "is_causal": [False, True],
        "group": [1, 2, 4],
        "layout": ["contiguous", "transposed"],
        "scale": [None, None, 0.3],
    }
    for row in zip(*(sampled(choices, 36, dice) for choices in axes.values()), strict=True):
        yield dict(zip(axes, row, strict=True), mask=None, mask_shape="", dropout_p=0.0)


def name_of(call):
    (E, Ev), (L, S) = call["dims"], call["lengths"]
    parts = [f"E{E}-Ev{Ev}-L{L}-S{S}-g{call['group']}-{call['layout']}", "causal" * call["is_causal"]]
    parts += [f"scale{call['scale']}" if call["scale"] is not None else ""]
    parts += [f"{call['mask']}[{call['mask_shape']}]" if call["mask"] else ""]
    parts += [f"p{call['dropout_p']}" if call["dropout_p"] else ""]
    return "-".join(p for p in parts if p)


CASES = [
    pytest.param(backend, path, dtype, call, id=f"{backend.name}-sm{path}-{dtype}-{name_of(call)}")
    for backend, path, dtype in PATHS
    for call in [*calls(backend, path, dtype), *hopper_calls(backend, path, dtype)]
]


def runs_here(variant):
    """By the rules of CUDA's binaries: 90a on 9.0 alone, 80 on 8.x, with PTX on anything newer."""
    major, minor = torch.cuda.get_device_capability()
    device = 10 * major + minor
    for chip in variant["chips"]:
        capability, specific, ptx = re.fullmatch(r"(\d+)(a?)(\+PTX)?", chip).groups()
        capability = int(capability)
        newer = capability <= device and (ptx or capability // 10 == major)
        if capability == device if specific else newer:
            return True
    return False


def rivals(backend, dtype, direction):
    return [v for v in VARIANTS if (v["backend"], v["dtype"], v["direction"]) == (NUMBER[backend], dtype, direction)]


def force_path(monkeypatch, backend, path, dtype):
    """Unless it is the newest one that this chip can run."""
    major, minor = torch.cuda.get_device_capability()
    newest = max(
        (v["path"] for v in rivals(backend, dtype, "forward") if v["path"] <= 10 * major + minor), default=None
    )
    if path != newest:
        # As a chip after Hopper: sm80's kernels, and as much shared memory as here.
        monkeypatch.setenv("SDPA_FORCE_ARCH", "100" if path == 80 and major == 9 else str(path))


@pytest.fixture
def use_path(monkeypatch):
    """Makes the selector take a code path that is not the newest one this chip can run, or the tiles of a chip."""

    def use(backend, path, dtype, chip=None):
        own = [v for v in rivals(backend, dtype, "forward") if v["path"] == path]
        if not any(map(runs_here, own)):
            pytest.skip(f"this build has no sm{path} {backend.name} kernel for this chip")
        force_path(monkeypatch, backend, path, dtype)
        if chip is not None:
            monkeypatch.setenv("SDPA_FORCE_ARCH", str(chip))

    return use


def tensors_of(call, dtype, grad=True, B=2):
    (E, Ev), (L, S), group = call["dims"], call["lengths"], call["group"]
    H = 4
    dtype = getattr(torch, dtype)
    shapes = (B, H, L, E), (B, H // group, S, E), (B, H // group, S, Ev)
    made = [strided(make(*shape, dtype=dtype, device="cuda", grad=grad), call["layout"]) for shape in shapes]
    if call["mask"] is None:
        return made, None
    sizes = {"B": B, "H": H, "L": L, "S": S, "1": 1}
    shape = [sizes[letter] for letter in call["mask_shape"]]
    if call["mask"] == "bool":
        return made, torch.rand(shape, device="cuda") > 0.3
    return made, make(*shape, dtype=getattr(torch, call["mask"]), device="cuda", grad=grad)


def check_call(which, dtype, call, grad=True, B=2):
    tensors, mask = tensors_of(call, dtype, grad, B)
    kwargs = {key: call[key] for key in ("dropout_p", "is_causal", "scale")} | {"enable_gqa": call["group"] > 1}
    check(which, *tensors, mask, **kwargs)


def check_shared_keys(dtype, head_dim, is_causal, lengths, B, H):
    """H query heads and a third as many of keys, (B, L, H, D) in memory, without gradients."""
    L, S = lengths
    shapes = (B, L, H, head_dim), (B, S, H // 3, head_dim), (B, S, H // 3, head_dim)
    tensors = [make(*shape, dtype=getattr(torch, dtype), device="cuda", grad=False).transpose(1, 2) for shape in shapes]
    poison("cuda", tensors[0].shape)
    check(FLASH, *tensors, is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("which, path, dtype, call", CASES)
def test_against_float64(use_path, which, path, dtype, call):
    use_path(which, path, dtype)
    check_call(which, dtype, call)


paths = pytest.mark.parametrize("which, path, dtype", PATHS, ids=lambda v: getattr(v, "name", str(v)))
# The same, and flash with the tiles of chips that have less shared memory than this one.
CHIPS = [(*path, None) for path in PATHS] + [
    (FLASH, 80, dtype, chip) for dtype in ("float16", "bfloat16") for chip in (80, 86)
]
chips = pytest.mark.parametrize("which, path, dtype, chip", CHIPS, ids=lambda v: getattr(v, "name", str(v)))


INFERENCE_CASES = [
    pytest.param(backend, path, dtype, call, id=f"{backend.name}-sm{path}-{dtype}-{name_of(call)}")
    for backend, path, dtype in PATHS
    for call in [*decode_calls(backend, path, dtype), *wide_calls(backend, path, dtype)]
]


@pytest.mark.parametrize("which, path, dtype, call", INFERENCE_CASES)
def test_inference_against_float64(use_path, which, path, dtype, call):
    use_path(which, path, dtype)
    check_call(which, dtype, call, grad=False)


SMALLER_CHIPS = [  # with less shared memory: other tiles, or ways to copy, for heads wider than this
    pytest.param(chip, dtype, call, id=f"sm{chip}-{dtype}-{name_of(call)}")
    for chip, width in ((80, 64), (86, 32))
    for dtype in ("float16", "bfloat16")
    for call in calls(FLASH, 80, dtype)
    if max(call["dims"]) > width
]


@pytest.mark.parametrize("chip, dtype, call", SMALLER_CHIPS)
def test_tiles_of_smaller_chips(use_path, chip, dtype, call):
    use_path(FLASH, 80, dtype, chip)
    check_call(FLASH, dtype, call)


@pytest.mark.parametrize("chip, dtype, call", SMALLER_CHIPS[::2])
def test_more_blocks_than_multiprocessors(use_path, chip, dtype, call):
    """Where a multiprocessor of a smaller chip has room for one block of four warps, it takes one of eight."""
    use_path(FLASH, 80, dtype, chip)
    heads = 4  # of tensors_of
    B = 1 + torch.cuda.get_device_properties("cuda").multi_processor_count // heads
    check_call(FLASH, dtype, call, grad=False, B=B)


@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "holes", "dropout", "causal dropout"])
@pytest.mark.parametrize("head_dim", [88, 96, 120, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_blocks_of_many_queries(use_path, dtype, head_dim, kind):
    """Forward with many keys and many queries, without sm90's tensor copies."""
    use_path(FLASH, 80, dtype, 80)
    dtype = getattr(torch, dtype)
    H, L, S = 1 + torch.cuda.get_device_properties("cuda").multi_processor_count // 8, 385, 1101
    query, key, value = (
        make(2, heads, length, head_dim, dtype=dtype, device="cuda", grad=False)
        for heads, length in ((2 * H, L), (H, S), (H, S))
    )
    query[:, 1] *= 30
    key[:, :, 900:] *= 20
    mask = None
    if kind == "padding":
        mask = torch.arange(S, device="cuda") < torch.tensor([700, 0], device="cuda")[:, None, None, None]
    elif kind == "holes":
        mask = torch.rand(2, 1, 1, S + 3, device="cuda")[..., 3:] > 0.2
        mask[:, :, :, 64:400] = False
        mask[1, :, :, 500:700] = True
    dropout_p = 0.3 * ("dropout" in kind)
    check(FLASH, query, key, value, mask, is_causal="causal" in kind, dropout_p=dropout_p, enable_gqa=True)


@pytest.mark.parametrize("S", [9000, 150_000])
@pytest.mark.parametrize("head_dim, heads", [(64, 2), (128, 140)])
def test_padding_with_keys_far_apart(use_path, head_dim, heads, S):
    """More tiles are hidden in a row than a step in the kernels' list of tiles takes, and are there than it holds."""
    use_path(FLASH, 80, "bfloat16", 80)
    query, key, value = (
        make(1, h, n, head_dim, dtype=torch.bfloat16, device="cuda", grad=False)
        for h, n in ((heads, 20), (1, S), (1, S))
    )
    mask = torch.zeros(1, 1, 1, S, dtype=torch.bool, device="cuda")
    for seen in (slice(70, 80), slice(8900, 8990), slice(149_000, 149_100)):
        mask[..., seen] = True
    check(FLASH, query, key, value, mask, enable_gqa=True)


SMALL_DECODE_CALLS = [  # where there is no room for flash's large blocks, or so many heads that all do not run at once
    pytest.param(dtype, call, id=f"{dtype}-{name_of(call)}")
    for dtype in ("float16", "bfloat16")
    for call in decode_calls(FLASH, 80, dtype)
    if max(call["dims"]) <= 128
]


@pytest.mark.parametrize("dtype, call", SMALL_DECODE_CALLS)
def test_small_blocks_of_decoding(use_path, dtype, call):
    use_path(FLASH, 80, dtype, 86)
    check_call(FLASH, dtype, call, grad=False)


@pytest.mark.parametrize("S", [300, 70_000])
@paths
def test_short_queries_with_masked_keys(use_path, which, path, dtype, S):
    use_path(which, path, dtype)
    dtype = getattr(torch, dtype)
    tensors = [make(2, heads, n, 64, dtype=dtype, device="cuda", grad=False) for heads, n in ((8, 3), (2, S), (2, S))]
    seen = torch.rand(2, 1, 3, S, device="cuda") > 0.5
    seen[0, 0, 1] = False
    seen[:, :, :, S // 3 : S // 2] = False
    output, *_ = check(which, *tensors, seen, enable_gqa=True)
    assert (output[0, :, 1] == 0).all()
    tensors[1][:, :, S // 3 : S // 2] = math.nan
    assert torch.equal(check(which, *tensors, seen, enable_gqa=True)[0], output)
    lowest = torch.full((3, S), torch.finfo(torch.float32).min, device="cuda")
    tensors[1].nan_to_num_(0)
    check(which, *tensors, lowest, enable_gqa=True)  # uniform
    check(which, *tensors, lowest.masked_fill(seen[1, 0], 1.0), enable_gqa=True)
    if (which, path) != (FLASH, 75):  # which has no kernel for short queries
        tensors[2][:, :, S // 4] = math.nan
        with sdpa.sdpa_kernel(which):
            output = sdpa.scaled_dot_product_attention(*tensors, seen, enable_gqa=True)
        assert (output[0, :, 1] == 0).all()


def test_every_kernel_that_runs_here_is_tested(monkeypatch):
    def empty(*shape, grad, **kwargs):
        return torch.empty(shape, requires_grad=grad, **kwargs)

    monkeypatch.setitem(globals(), "make", empty)
    covered = set()
    for backend, path, dtype in PATHS:
        force_path(monkeypatch, backend, path, dtype)
        every = calls, decode_calls, wide_calls, hopper_calls
        for call in (call for some in every for call in some(backend, path, dtype)):
            grad = not (call.get("decode") or call.get("wide"))
            tensors, mask = tensors_of(call, dtype, grad)
            with sdpa.sdpa_kernel(backend):
                found = sdpa.explain(*tensors, mask, call["dropout_p"], call["is_causal"], enable_gqa=call["group"] > 1)
            covered.update(name for b in found.backends if b.backend == found.chosen for name in b.kernels)
        monkeypatch.delenv("SDPA_FORCE_ARCH", raising=False)
    compiled = {v["name"] for v in VARIANTS if runs_here(v)}
    assert compiled, "this build has no kernel for this chip"
    assert compiled == covered


KEYS = 300
PROFILES = {  # of the scores along the keys; exact in every dtype, so that eager is accurate
    "growing": torch.arange(KEYS) // 2 * 1.0,
    "growing fast": (torch.arange(KEYS) // 2 - 75) * 64.0,
    "falling": 150.0 - torch.arange(KEYS) // 2,
    "alternating": 10240.0 * (1 - 2 * (torch.arange(KEYS) % 2)),
    "high": torch.full((KEYS,), 10240.0),
    "low": torch.full((KEYS,), -10240.0),
    "late jump": torch.where(torch.arange(KEYS) == 290, 10240.0, -10240.0),
    "jump inside a tile": torch.where(torch.arange(KEYS) % 64 == 33, 1024.0, -1024.0),
    "first tiles low": torch.where(torch.arange(KEYS) < 260, -10240.0, 0.0),
}


ADVERSARIAL = [  # each profile and each head dim with and without
    (profile, head_dim, (i + j) % 2 == 1)
    for i, profile in enumerate(PROFILES)
    for j, head_dim in enumerate((32, 64, 128, 192, 256))
]


@pytest.mark.parametrize("profile, head_dim, is_causal", ADVERSARIAL)
@chips
def test_adversarial_scores(use_path, which, path, dtype, chip, head_dim, is_causal, profile):
    use_path(which, path, dtype, chip)
    dtype = getattr(torch, dtype)
    query = torch.zeros(1, 2, KEYS, head_dim, dtype=dtype, device="cuda")
    key = torch.zeros_like(query)
    query[..., 3] = 1
    key[..., 3] = PROFILES[profile].to("cuda", dtype)
    assert torch.equal(key[0, 0, :, 3].double().cpu(), PROFILES[profile].double())
    value = make(1, 2, KEYS, head_dim, dtype=dtype, device="cuda", grad=False)
    check(which, query, key, value, scale=1.0, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_rows_that_outgrow_their_references(use_path, dtype, grows, is_causal, head_dim):
    """Some tiles after others, along the keys or against them, and in some rows more than in others."""
    use_path(FLASH, 90, dtype)
    query, key, value = (make(2, 4, 1100, head_dim, dtype=getattr(torch, dtype), device="cuda") for _ in range(3))
    slope = torch.linspace(0, 12, 1100, device="cuda")[:, None]
    slope = slope if grows else slope.flip(0)
    tensors = [(x * factor).detach().to(x.dtype) for x, factor in ((query, slope), (key, slope), (value, 1))]
    assert "sm90" in sdpa.explain(*tensors, is_causal=is_causal).backends[0].kernels[0]
    check(FLASH, *(x.requires_grad_() for x in tensors), is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_takes_one_head(use_path, dtype, is_causal, head_dim):
    """Tensor maps have dims of size 1 then."""
    use_path(FLASH, 90, dtype)
    shapes = (1, 1, 1030, head_dim), (1, 1, 200, head_dim), (1, 1, 200, head_dim)
    check(FLASH, *(make(*shape, dtype=getattr(torch, dtype), device="cuda") for shape in shapes), is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_keeps_nan_in_its_row(use_path, dtype, bad, is_causal, head_dim):
    use_path(FLASH, 90, dtype)
    tensors = [make(2, 4, 700, head_dim, dtype=getattr(torch, dtype), device="cuda", grad=False) for _ in range(3)]
    expected = eager(*(x.double() for x in tensors), is_causal=is_causal)
    close = eager(*tensors, is_causal=is_causal)
    rows = torch.zeros(700, dtype=torch.bool, device="cuda")
    rows[[40, 130, 131, 400, 699]] = True
    tensors[0][..., rows, 5] = bad
    assert "sm90" in sdpa.explain(*tensors, is_causal=is_causal).backends[0].kernels[0]
    with sdpa.sdpa_kernel(FLASH):
        output = sdpa.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    assert output[..., rows, :].isnan().all()
    assert_close_to_reference(output[..., ~rows, :], expected[..., ~rows, :], close[..., ~rows, :])


@pytest.mark.parametrize("lengths", [(256, 256), (700, 200), (513, 600)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 184, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hopper_blocks_take_many_query_tiles(use_path, dtype, head_dim, is_causal, lengths):
    use_path(FLASH, 90, dtype)
    check_shared_keys(dtype, head_dim, is_causal, lengths, B=2, H=60)


@pytest.mark.parametrize("lengths", [(130, 200), (129, 65), (100, 1000)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 72, 96, 128, 184, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_more_query_tiles_than_run_at_once(use_path, dtype, head_dim, is_causal, lengths):
    """Blocks may take several, one after another."""
    use_path(FLASH, 80, dtype)
    check_shared_keys(dtype, head_dim, is_causal, lengths, B=4, H=120)


@pytest.mark.parametrize("shared", ["", "batches", "heads"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dims", [(96, 96), (88, 96), (72, 128), (128, 120), (192, 192), (168, 192)], ids=str)
@pytest.mark.parametrize("lengths", [(336, 300), (96, 449), (640, 128), (16, 8)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_whole_chunks(use_path, dtype, lengths, dims, is_causal, shared):
    """What sm90 copies by tensor maps, from operands that batches or heads share, too."""
    use_path(FLASH, 80, dtype)
    (L, S), (E, Ev) = lengths, dims
    B, H = 1 if shared == "batches" else 2, 1 if shared == "heads" else 2
    shapes = (2, L, 4, E), (B, S, H, E), (B, S, H, Ev)
    made = [make(*shape, dtype=getattr(torch, dtype), device="cuda") for shape in shapes]
    tensors = [x.transpose(1, 2).expand(2, max(2, x.shape[2]), -1, -1) for x in made]
    check(FLASH, *tensors, is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float32"])
@chips
def test_masked_tiles_rows_and_keys(use_path, which, path, dtype, chip, kind):
    use_path(which, path, dtype, chip)
    dtype = getattr(torch, dtype)
    seen = torch.rand(260, 300, device="cuda") > 0.5
    seen[:, :140] = False  # first tiles
    seen[64:128, 192:256] = False  # a tile
    seen[70] = False
    seen[200:] = False  # last rows: nothing
    tensors = [make(2, 2, n, 64, dtype=dtype, device="cuda") for n in (260, 300, 300)]
    mask = seen if kind == "bool" else torch.zeros(260, 300, device="cuda").masked_fill(~seen, -INF).requires_grad_()
    output, grad_query, grad_key, *_ = check(which, *tensors, mask)
    assert (output[:, :, 200:] == 0).all() and (output[:, :, 70] == 0).all()
    assert (grad_query[:, :, 200:] == 0).all() and (grad_key[:, :, :140] == 0).all()
    if kind == "bool":  # what the mask hides may be anything
        hidden = ~seen.any(0)
        assert hidden.any()
        tensors = [t.detach() for t in tensors]
        output = check(which, *tensors, mask)[0]  # without gradients it may be another kernel's
        tensors[1][:, :, hidden] = math.nan
        assert torch.equal(check(which, *tensors, mask)[0], output)


@pytest.mark.parametrize("kind", ["causal", "bool", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@chips
def test_gradients_beside_hidden_nan(use_path, which, path, dtype, chip, head_dim, kind):
    """What no query sees may be anything; the rows that fill up the last tile of queries are none."""
    use_path(which, path, dtype, chip)
    L, S, first = 100, 144, 104
    query, key, value = (make(1, 2, n, head_dim, dtype=getattr(torch, dtype), device="cuda") for n in (L, S, S))
    mask = None
    if kind != "causal":
        mask = (torch.arange(S, device="cuda") < first).expand(L, S).contiguous()
    if kind.startswith("float"):
        mask = torch.zeros(L, S, device="cuda", dtype=getattr(torch, kind)).masked_fill(~mask, -INF)
    grad, results = torch.randn_like(query), []
    for number in (0.0, math.nan, INF):
        with torch.no_grad():
            key[:, :, first:] = number
        with sdpa.sdpa_kernel(which):
            output = sdpa.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal")
            results.append((output, *torch.autograd.grad(output, (key, value), grad)))
    assert all((g[:, :, first:] == 0).all() and g.isfinite().all() for g in results[0][1:])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def structured(kind, L, S):
    """(L, S) masks of which most tiles are all of one kind."""
    row, column = torch.arange(L, device="cuda")[:, None], torch.arange(S, device="cuda")
    if kind == "documents":
        return row * S // L // 150 == column // 150
    if kind == "window":
        return (column <= row + 40) & (column > row - 200)
    holes = torch.rand(L, S, device="cuda") > 0.001
    holes[:, 384:640] = False
    holes[128:256] = False
    return holes


@pytest.mark.parametrize("kind", ["documents", "window", "holes"])
@pytest.mark.parametrize("lengths", [(700, 1088), (513, 1111)], ids=str)
@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (72, 80), (96, 96), (128, 128), (160, 160), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("which, path, dtype, chip", [chip for chip in CHIPS if chip[0] == FLASH])
def test_tiles_of_a_mask_that_heads_share(use_path, which, path, dtype, chip, dims, lengths, kind):
    """So large that its blocks are looked through before (mask_blocks.h)."""
    use_path(which, path, dtype, chip)
    (L, S), (E, Ev), dtype = lengths, dims, getattr(torch, dtype)
    B = 1 if kind == "documents" else 2  # the mask of "window" is every batch's
    tensors = [make(2, h, n, d, dtype=dtype, device="cuda") for h, n, d in ((4, L, E), (2, S, E), (2, S, Ev))]
    mask = torch.stack([structured(kind, L, S) for _ in range(B if kind == "holes" else 1)])[:, None]
    output, *_ = check(which, *tensors, mask, enable_gqa=True)
    if kind != "holes":
        return
    assert (output[:, :, 128:256] == 0).all()
    with torch.no_grad():  # these tiles are not multiplied: else their NaN would be in every product
        tensors[1][:, :, 384:640] = math.nan
        tensors[2][:, :, 384:640] = math.nan
    if path < 80:
        return
    with sdpa.sdpa_kernel(which):
        again = sdpa.scaled_dot_product_attention(*tensors, mask, enable_gqa=True)
        grads = torch.autograd.grad(again, tensors, torch.randn_like(again))
    assert torch.equal(again, output)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("lengths", [(256, 256), (144, 500), (400, 300)], ids=str)
@pytest.mark.parametrize("which, path, dtype, chip", [chip for chip in CHIPS if chip[:2] == (FLASH, 80)])
def test_backward_of_as_many_heads_as_blocks_run(use_path, which, path, dtype, chip, lengths, head_dim, is_causal):
    """Each block then walks over all keys of a head."""
    use_path(which, path, dtype, chip)
    (L, S), H = lengths, 2 * torch.cuda.get_device_properties("cuda").multi_processor_count
    tensors = [make(1, H, n, head_dim, dtype=getattr(torch, dtype), device="cuda") for n in (L, S, S)]
    check(which, *tensors, is_causal=is_causal)


@pytest.fixture
def allow_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)


@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 200])
def test_one_part_if_tf32_is_allowed(allow_tf32, head_dim, kind):
    tensors = [make(2, 40, n, head_dim, device="cuda") for n in (700, 333, 333)]
    mask = torch.rand(700, 333, device="cuda") > 0.3 if kind == "mask" else None
    output = check(EFFICIENT, *tensors, mask, is_causal=kind == "causal")[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    with sdpa.sdpa_kernel(EFFICIENT):
        exact = sdpa.scaled_dot_product_attention(*tensors, mask, is_causal=kind == "causal")
    assert 1e-5 < (output - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 200])
@pytest.mark.parametrize("which, path", [(which, path) for which, path, dtype in PATHS if dtype == "float32"])
def test_rows_of_any_magnitude(use_path, which, path, head_dim, masked):
    """Parts of float16 have little range: each row has its own. What is masked out may hold anything finite."""
    use_path(which, path, "float32")
    lengths, magnitudes = (700, 333, 333), ((-20, 3), (-20, 3), (-20, 20))
    tensors = [
        make(2, 8, n, head_dim, device="cuda", grad=False)
        * torch.randint(*m, (1, 1, n, 1), device="cuda").float().exp2()
        for n, m in zip(lengths, magnitudes, strict=True)
    ]
    mask = None
    if masked:
        mask = torch.rand(700, 333, device="cuda") > 0.3
        mask[:, ::3] = False
        tensors[1][:, :, ::3] *= 1e25
        tensors[2][:, :, ::3] *= 1e24
    check(which, *(t.requires_grad_() for t in tensors), mask)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "dropout", "ranges"])
@pytest.mark.parametrize("chip, heads", [(None, 40), (None, 3), (80, 40), (86, 3)])
@pytest.mark.parametrize("dims", [(256, 256), (160, 72)])
def test_float32_heads_wider_than_128(use_path, monkeypatch, dims, chip, heads, kind):
    """How much shared memory a chip has and how many blocks there are: other kernels, other tiles."""
    use_path(EFFICIENT, 80, "float32")
    if chip is not None:
        monkeypatch.setenv("SDPA_FORCE_ARCH", str(chip))
    shapes = ((515, dims[0]), (270, dims[0]), (270, dims[1]))
    tensors = [make(1, heads, *shape, device="cuda", grad=False) for shape in shapes]
    if kind == "ranges":
        for tensor, highest in zip(tensors, (3, 3, 20), strict=True):
            tensor *= torch.randint(-20, highest, (*tensor.shape[:3], 1), device="cuda").float().exp2()
    mask = torch.rand(515, 270, device="cuda") > 0.3 if kind == "bool" else None
    kwargs = {"dropout_p": 0.3 * (kind == "dropout"), "is_causal": kind == "causal"}
    check(EFFICIENT, *(t.requires_grad_() for t in tensors), mask, **kwargs)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "dropout"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 36), (256, 128), (72, 30), (32, 64)], ids=str)
@pytest.mark.parametrize("lengths", [(200, 333), (64, 70), (130, 1027)], ids=str)
def test_math_in_float32(lengths, dims, kind):
    """Where a chip has the tensor cores for it, its products are a kernel of our own, but for odd or small ones."""
    call = {"dims": dims, "lengths": lengths, "group": 1, "layout": "transposed", "mask_shape": "B1LS"}
    call |= {"mask": "bool" if kind == "bool" else None, "is_causal": kind == "causal", "scale": None}
    check_call(SDPBackend.MATH, "float32", call | {"dropout_p": 0.3 * (kind == "dropout")})


def test_math_in_float32_with_infinities():
    query, key, value = (make(2, 4, n, 64, device="cuda", grad=False) for n in (200, 136, 136))
    query[0, 1, 70, 3], key[1, 2, 9, 60], value[1, 0, 20, 30], value[0, 0, 1, 2] = INF, -INF, INF, 3e38
    query[1, 3, 5], key[1, 3, 6] = 0, 0
    query[1, 3, 5, 0] = key[1, 3, 6, 0] = 2.0**64 - 2.0**51  # its square is finite, that of what TF32 holds is not
    tensors = [t.requires_grad_() for t in (query, key, value)]
    with sdpa.sdpa_kernel(SDPBackend.MATH):
        output = sdpa.scaled_dot_product_attention(*tensors)
    expected = (query @ key.mT / 8).softmax(-1) @ value
    assert expected.isnan().any() and expected.isinf().any()
    assert torch.equal(output.isnan(), expected.isnan()) and torch.equal(output.isinf(), expected.isinf())
    grad = torch.randn_like(output)
    for result, theirs in zip(*(torch.autograd.grad(o, tensors, grad) for o in (output, expected)), strict=True):
        same = result.isfinite() == theirs.isfinite()
        same[0, 0] = True  # eager's sums overflow there
        assert same.all()


@pytest.mark.parametrize(
    "kind", ["group", "small scratch", "few rows", "logits", "expanded", "gradient", "query", "value"]
)
@pytest.mark.parametrize("dims", [(64, 64), (32, 32), (16, 128), (136, 20)], ids=str)
def test_softmax_in_the_products_of_math(dims, kind):
    """In the float32 backward of calls without a mask, dropout and causality."""
    group = 4 if kind in ("group", "small scratch") else 1
    shapes = (8, 515, dims[0]), (8 // group, 333, dims[0]), (8 // group, 333, dims[1])
    tensors = [make(2, *shape, device="cuda", grad=kind not in ("query", "value")) for shape in shapes]
    if kind == "expanded":
        tensors[1:] = [t.detach()[:1, :1].expand(2, 8, -1, -1).requires_grad_() for t in tensors[1:]]
    elif kind in ("query", "value"):
        tensors[0 if kind == "query" else 2].requires_grad_()
    elif kind == "gradient":
        with sdpa.sdpa_kernel(SDPBackend.MATH):
            output = sdpa.scaled_dot_product_attention(*tensors)
        grad = make(2, 8, 515, 1, device="cuda", grad=False).expand_as(output)
        results = [torch.autograd.grad(output, tensors, g, retain_graph=True) for g in (grad, grad.contiguous())]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        return
    limit = sdpa.math_scratch_limit()
    try:
        limits = {"small scratch": 2**20, "few rows": 2**16}  # the latter: too few for these products
        sdpa.set_math_scratch_limit(limits.get(kind, limit))
        scale = 3000.0 if kind == "logits" else None
        check(SDPBackend.MATH, *tensors, scale=scale, enable_gqa=group > 1)
    finally:
        sdpa.set_math_scratch_limit(limit)


@pytest.mark.parametrize("kind", ["bool", "float16", "bfloat16"])
@chips
def test_masks_with_aligned_rows(use_path, which, path, dtype, chip, kind):
    """Kernels may copy such a mask 16 bytes at a time. Rows end inside 16 bytes; batches share the mask."""
    use_path(which, path, dtype, chip)
    tensors = [make(3, 2, n, 64, dtype=getattr(torch, dtype), device="cuda") for n in (333, 589, 589)]
    mask = torch.randn(2, 333, 592, device="cuda")
    mask = (mask > -0.5 if kind == "bool" else mask.to(getattr(torch, kind)))[:, :, :589]
    if kind != "bool":
        mask.requires_grad_()
    check(which, *tensors, mask)


@pytest.mark.parametrize("is_causal", [False, True])
@paths
def test_forward_is_bitwise_repeatable(use_path, which, path, dtype, is_causal):
    use_path(which, path, dtype)
    tensors = [make(4, 8, 515, 64, dtype=getattr(torch, dtype), device="cuda", grad=False) for _ in range(3)]
    results = []
    with sdpa.sdpa_kernel(which):
        for _ in range(10):
            poison("cuda", (4, 8, 515, 64))
            results.append(sdpa.scaled_dot_product_attention(*tensors, is_causal=is_causal))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "broadcast mask", "dropout", "broadcast mask, dropout"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@paths
def test_backward_is_bitwise_repeatable_if_asked_for(use_path, which, path, dtype, head_dim, kind, deterministic):
    use_path(which, path, dtype)
    tensors = [make(2, heads, 515, head_dim, dtype=getattr(torch, dtype), device="cuda") for heads in (4, 2, 2)]
    if "mask" in kind:
        tensors += [make(*((2, 4) if kind == "mask" else (1, 1)), 515, 515, device="cuda")]
    kwargs = {"dropout_p": 0.2 * ("dropout" in kind), "is_causal": kind == "causal", "enable_gqa": True}
    check(which, *tensors, **kwargs)
    results, grad = [], torch.randn_like(tensors[0])
    with sdpa.sdpa_kernel(which):
        for _ in range(20):
            torch.manual_seed(1)
            output = sdpa.scaled_dot_product_attention(*tensors, **kwargs)
            poison("cuda", *(t.shape for t in tensors))
            results.append((output, *torch.autograd.grad(output, tensors, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mask", [None, "bool", "float32"])
@paths
def test_memory_grows_with_length_not_its_square(use_path, which, path, dtype, mask):
    use_path(which, path, dtype)
    B, H, L, E = 2, 4, 4096, 64
    tensors = [make(B, H, L, E, dtype=getattr(torch, dtype), device="cuda") for _ in range(3)]
    if mask == "bool":
        tensors.append(torch.rand(B, 1, L, L, device="cuda") > 0.2)
    elif mask is not None:
        tensors.append(make(1, H, 1, L, device="cuda"))

    def extra(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    matrix = B * H * L * L * tensors[0].element_size()
    with sdpa.sdpa_kernel(which):
        require(which, *tensors)
        output, forward = extra(lambda: sdpa.scaled_dot_product_attention(*tensors))
        forward -= output.nbytes
        wanted = [t for t in tensors if t.requires_grad]
        grad = torch.randn_like(output)
        grads, backward = extra(lambda: torch.autograd.grad(output, wanted, grad))
        backward -= sum(g.nbytes for g in grads)
    assert forward < matrix / 100, f"forward took {forward} bytes beside its output; 1 % of L x S are {matrix // 100}"
    sums = B * H * L * E * 4  # of the query's gradient, in float32
    assert backward < sums + matrix / 100, f"backward took {backward} bytes beside its gradients"


@pytest.mark.parametrize("B, H", [(70_000, 1), (1, 70_000)])
@paths
def test_more_than_one_grid_dimension_holds(use_path, which, path, dtype, B, H):
    use_path(which, path, dtype)
    tensors = [make(B, H, n, 8, dtype=getattr(torch, dtype), device="cuda") for n in (2, 3, 3)]
    check(which, *tensors)


@pytest.mark.parametrize(
    "stride", [(0, 2**31, 128), (2**31, 2**14, 128), (0, 128, 2**25)], ids=["head", "batch", "row"]
)
@paths
def test_offsets_beyond_32_bits(use_path, which, path, dtype, stride):
    """What comes 2^31 elements or more after the first: of the operands, and of a mask."""
    use_path(which, path, dtype)
    dtype, B, L, S = getattr(torch, dtype), 1 + (stride[0] > 0), 70, 66
    far_from = [torch.empty(2**31 + 2**28, dtype=t, device="cuda") for t in (dtype, torch.bool)]

    def far(t, place=0):
        return far_from[t.dtype == torch.bool].as_strided(t.shape, (*stride, 1), place * 2**16).copy_(t)

    for mask in (None, far(torch.rand(B, 2, L, S, device="cuda") > 0.3)):
        made = [make(B, 2, n, 64, dtype=dtype, device="cuda", grad=False) for n in (L, S, S)]
        check(which, *(far(t, i).requires_grad_() for i, t in enumerate(made)), mask)
