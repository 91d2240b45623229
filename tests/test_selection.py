"""Which backend takes a call: constraints of every chip, order, switches, warnings, and what explain says."""

from __future__ import annotations

import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.attention
from reference import make

import sdpa
from sdpa import SDPBackend, explain, sdp_kernel, sdpa_kernel
from sdpa import scaled_dot_product_attention as attention

FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
DEFAULT = [FLASH, EFFICIENT, MATH]
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
capabilities = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm{10 * c[0] + c[1]}")


def inputs(dtype=HALF, E=64, Ev=64, grad=False, L=16, S=24):
    return [make(*s, dtype=dtype, grad=grad) for s in ((2, 4, L, E), (2, 4, S, E), (2, 4, S, Ev))]


def row(explanation, backend):
    return next(b for b in explanation.backends if b.backend == backend)


def order_now():
    return sdpa.backends.decode(sdpa.backends.current_switches())


# What each takes, on every chip


def takes(backend, capability, dtype, E=64, Ev=64, mask=None, p=0.0, grad=False):
    """The documented limits of this version, written down a second time."""
    if backend == MATH:
        return True
    if backend == FLASH:
        turing = capability < (8, 0)
        return (
            capability >= (7, 5)
            and (dtype == HALF or (dtype == BRAIN and not turing))
            and 1 <= E <= 256
            and 1 <= Ev <= 256
            and mask != DOUBLE
        )
    brain = dtype == BRAIN and capability >= (8, 0)
    wide = dtype == SINGLE and E > 256 and capability < (8, 0)
    return (dtype in (HALF, SINGLE) or brain) and E >= 1 and Ev >= 1 and not wide and mask != DOUBLE


CALLS = [
    *({"dtype": dtype} for dtype in (HALF, BRAIN, SINGLE, DOUBLE)),
    *(
        {"dtype": HALF, "E": E, "Ev": Ev}
        for E, Ev in ((0, 8), (8, 0), (1, 1), (128, 128), (129, 8), (8, 129), (256, 256), (257, 8), (8, 257), (512, 9))
    ),
    *({"dtype": SINGLE, "E": E, "Ev": 512} for E in (256, 257)),
    *({"dtype": dtype, "mask": m} for dtype in (HALF, SINGLE) for m in (torch.bool, HALF, BRAIN, SINGLE)),
    {"dtype": DOUBLE, "mask": DOUBLE},
    {"dtype": HALF, "p": 0.1},
    {"dtype": HALF, "grad": True},
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(f"{k}={v}" for k, v in call.items()))
@capabilities
def test_constraints_and_choice(capability, call):
    tensors = inputs(call["dtype"], call.get("E", 64), call.get("Ev", 64), call.get("grad", False))
    mask = torch.ones(24, dtype=call["mask"]) if "mask" in call else None
    p = call.get("p", 0.0)
    expected = [b for b in DEFAULT if takes(b, capability, **call)]
    found = explain(*tensors, mask, p, capability=capability)
    assert [b.backend for b in found.backends] == DEFAULT
    assert [b.backend for b in found.backends if b.usable] == expected
    assert found.chosen == expected[0]
    for backend in DEFAULT:
        with sdpa_kernel(backend):
            assert explain(*tensors, mask, p, capability=capability).chosen == (
                backend if backend in expected else None
            )
    params = sdpa.SDPAParams(*tensors, mask, p, capability=capability)
    assert sdpa.can_use_flash_attention(params) == (FLASH in expected)
    assert sdpa.can_use_efficient_attention(params) == (EFFICIENT in expected)


@pytest.mark.parametrize(
    "capability, dtype, which, kernel",
    [
        ((7, 0), SINGLE, EFFICIENT, "efficient_decode_sm70_float32"),
        ((7, 0), HALF, EFFICIENT, "efficient_decode_sm70_float16"),
        ((7, 5), SINGLE, EFFICIENT, "efficient_decode_sm75_float32"),
        ((7, 5), HALF, EFFICIENT, "efficient_decode_sm75_float16"),
        ((9, 0), SINGLE, EFFICIENT, "efficient_decode_sm80_float32"),
        ((9, 0), HALF, EFFICIENT, "flash_decode_sm80_float16"),
        ((9, 0), BRAIN, FLASH, "flash_decode_sm80_bfloat16"),
    ],
)
def test_short_queries_have_kernels_of_their_own(capability, dtype, which, kernel):
    def kernels(*args, **kwargs):
        with sdpa_kernel(which):
            return row(explain(*inputs(dtype, **kwargs), *args, capability=capability), which).kernels

    assert kernels() == (f"{kernel}_64",) and kernels(L=1, E=65) == (f"{kernel}_128",)
    assert dtype != SINGLE or kernels(Ev=129) == (f"{kernel}_256",)
    longer, dropping, wide, trained = kernels(L=17), kernels(None, 0.1), kernels(Ev=257), kernels(grad=True)
    assert not any("decode" in name for name in (*longer, *dropping, *wide, *trained))


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("mask_shape", [None, (2, 4, 16, 24), (16, 24)], ids=str)
def test_deterministic_switch_is_a_constraint(mask_shape, dtype, deterministic):
    tensors = inputs(dtype, grad=True)
    mask = None if mask_shape is None else make(*mask_shape)
    found = explain(*tensors, mask, capability=(9, 0))
    assert row(found, FLASH).usable == (dtype == HALF)
    assert row(found, EFFICIENT).usable == (dtype == HALF or mask_shape != (16, 24))
    if mask is not None:  # expanded by the caller: the gradient has its shape
        found = explain(*tensors, mask.detach().expand(2, 4, 16, 24).requires_grad_(), capability=(9, 0))
        assert row(found, EFFICIENT).usable
    with torch.no_grad():
        assert row(explain(*tensors, mask, capability=(9, 0)), EFFICIENT).usable


def test_lengths_beyond_32_bits():
    query = torch.empty(1, 1, 1, 8, dtype=HALF).expand(1, 1, 2**31, 8)
    key = torch.empty(1, 1, 4, 8, dtype=HALF)
    found = explain(query, key, key, capability=(9, 0))
    assert found.chosen == MATH
    for backend in (FLASH, EFFICIENT):
        (failed,) = (c for c in row(found, backend).constraints if not c.holds)
        assert failed.name == "lengths" and failed.got == f"L={2**31}, S=4, B*H=1"


def test_cpu_calls_go_to_math():
    found = explain(*inputs())
    assert found.chosen == MATH
    for backend in (FLASH, EFFICIENT):
        failed = [c for c in row(found, backend).constraints if not c.holds]
        assert [c.name for c in failed if c.got == "cpu" and c.needs == "cuda" and c.fix]


@pytest.mark.parametrize("shape", [(0, 4, 16, 64), (2, 4, 0, 64), (2, 0, 16, 64), (0, 2, 4, 16, 64), (16, 64)])
def test_explaining_empty_and_other_ranks(shape):
    tensors = [torch.empty(shape) for _ in range(3)]
    assert explain(*tensors).chosen == MATH
    assert attention(*tensors).shape == shape


def test_hopper_has_kernels_of_its_own():
    def kernels(capability=(9, 0), mask=None, scale=None, E=64, Ev=None, L=1100, **kwargs):
        tensors = inputs(BRAIN, E=E, L=L, grad=True, **kwargs)
        return row(explain(*tensors, mask, scale=scale, capability=capability), FLASH).kernels

    def older(width):
        return (f"flash_forward_sm80_bfloat16_{width}", f"flash_backward_sm80_bfloat16_{width}")

    for E, width in ((40, 64), (64, 64), (72, 128), (128, 128), (136, 256), (256, 256)):
        backward = "flash_backward_sm90_bfloat16_128" if width <= 128 else older(width)[1]
        assert kernels(E=E) == (f"flash_forward_sm90_bfloat16_{max(128, width)}", backward)
        assert kernels((10, 0), E=E) == kernels((8, 0), E=E) == older(width)
    assert kernels(mask=torch.ones(1100, 1, dtype=torch.bool)) == older(64)
    assert kernels(scale=-1.0) == older(64) and kernels(E=63) == older(64)
    assert kernels(L=511) == older(64) and kernels(L=512)[0] == "flash_forward_sm90_bfloat16_128"
    assert kernels(L=1023)[1] == older(64)[1] and kernels(L=255, E=128) == older(128)
    query, key, value = inputs(BRAIN, L=1100)
    for case in (
        (query[..., 1:57], key[..., :56]),
        (query[..., ::2], key[..., :32]),
        (query, key[:1].expand(2, -1, -1, -1)),
    ):
        found = row(explain(*case, value, capability=(9, 0)), FLASH)
        assert "sm80" in found.kernels[0]


def test_explanation_data():
    found = explain(*inputs(SINGLE, E=200), capability=(7, 0))
    failed = {c.name: c for c in row(found, FLASH).constraints if not c.holds}
    assert failed["architecture"].got == "sm70" and "sm75" in failed["architecture"].needs
    assert failed["dtype"].got == "float32" and "float16" in failed["dtype"].needs
    assert "head dims" not in failed
    assert all(c.fix for b in found.backends for c in b.constraints)
    assert found.math_matrix_bytes == 2 * 4 * 16 * 24 * 4
    assert 0 < found.math_scratch_bytes <= sdpa.math_scratch_limit()
    assert not row(found, FLASH).kernels
    assert row(found, EFFICIENT).kernels == ("efficient_decode_sm70_float32_256",)
    both = row(explain(*inputs(BRAIN, grad=True), capability=(8, 6)), FLASH).kernels
    assert both == ("flash_forward_sm80_bfloat16_64", "flash_backward_sm80_bfloat16_64")
    for E, width in ((100, 128), (129, 256), (256, 256)):
        turing = explain(*inputs(HALF, E=E, grad=True), capability=(7, 5))  # flash's kernels serve both
        both = (f"flash_forward_sm75_float16_{width}", f"flash_backward_sm75_float16_{width}")
        assert row(turing, FLASH).kernels == row(turing, EFFICIENT).kernels == both
    wider = row(explain(*inputs(HALF, E=257), capability=(7, 5)), FLASH)
    (failed,) = (c for c in wider.constraints if not c.holds)
    assert failed.name == "head dims" and failed.got == "E=257, Ev=64" and failed.needs == "1 to 256"


@pytest.mark.parametrize(
    "capability, E, grad, kernel",
    [
        ((8, 0), 512, False, "flash_forward_sm80_float16_512"),
        ((9, 0), 257, False, "flash_forward_sm80_float16_512"),
        ((8, 6), 512, False, "efficient_forward_sm80_float16_128"),  # 99 KB of shared memory
        ((12, 0), 512, False, "efficient_forward_sm80_float16_128"),
        ((9, 0), 512, True, "efficient_forward_sm80_float16_128"),  # it has a backward
        ((9, 0), 513, False, "efficient_forward_sm80_float16_128"),
    ],
)
def test_kernel_for_wide_heads(capability, E, grad, kernel):
    found = explain(*inputs(HALF, E=E, grad=grad), capability=capability)
    assert row(found, EFFICIENT).kernels[0] == kernel
    assert found.chosen == EFFICIENT


def test_bytes_count_leading_dims_that_do_not_fold():
    query, key = torch.empty(5, 2, 4, 16, 64), torch.empty(2, 4, 24, 64)
    key = key.expand(5, 2, 4, 24, 64)  # stride 0 and another: not one batch dim
    assert explain(query, key, key).math_matrix_bytes == 5 * 2 * 4 * 16 * 24 * 4


def test_scratch_of_the_large_call_is_bounded():
    tensors = [torch.empty(1, 32, 16384, 64, dtype=HALF, device="meta") for _ in range(3)]
    found = explain(*tensors, capability=(9, 0))
    assert found.math_matrix_bytes == 32 * 16384 * 16384 * 4
    assert found.math_scratch_bytes <= sdpa.math_scratch_limit()
    before = sdpa.math_scratch_limit()
    try:
        sdpa.set_math_scratch_limit(4 * before)  # to give it more than the default has an effect
        more = explain(*tensors, capability=(9, 0)).math_scratch_bytes
        assert before < more <= 4 * before
    finally:
        sdpa.set_math_scratch_limit(before)


def test_explanation_prints_a_table():
    with sdpa_kernel([EFFICIENT, MATH]):
        found = explain(*inputs(SINGLE, E=200), capability=(7, 0))
    text = str(found)
    for part in (
        "chosen: EFFICIENT_ATTENTION",
        "FLASH_ATTENTION: disabled",
        "MATH: usable",
        "float32",
        "math's scratch",
    ):
        assert part in text
    for b in found.backends:
        for c in b.constraints:
            line = next(n for n in text.splitlines() if c.name in n and n.endswith(f"got {c.got}; needs {c.needs}"))
            assert line.lstrip().startswith("ok" if c.holds else "FAIL")
            assert c.holds or c.fix in text
    with sdpa_kernel([]):
        assert "No available kernel" in str(explain(*inputs()))


def test_nothing_is_printed_unasked(capfd, recwarn):
    tensors = inputs()
    attention(*tensors)
    explain(*tensors)
    sdpa.can_use_flash_attention(sdpa.SDPAParams(*tensors))
    with sdpa_kernel([EFFICIENT, MATH]):
        attention(*tensors)
    assert capfd.readouterr() == ("", "") and not recwarn.list


# Switches


def test_default_order():
    assert order_now() == DEFAULT
    assert explain(*inputs(), capability=(9, 0)).chosen == FLASH


def test_priority_order():
    tensors = inputs()
    with sdpa_kernel([MATH, EFFICIENT, FLASH]):  # not asked to keep the order
        assert order_now() == DEFAULT
    with sdpa_kernel([MATH, FLASH], set_priority=True):
        assert order_now() == [MATH, FLASH]
        assert explain(*tensors, capability=(9, 0)).chosen == MATH
        assert [b.backend for b in explain(*tensors, capability=(9, 0)).backends] == [MATH, FLASH, EFFICIENT]
        sdpa.enable_mem_efficient_sdp(True)
        assert set(order_now()) == set(DEFAULT)
        assert [b for b in order_now() if b != EFFICIENT] == [MATH, FLASH]


def test_nesting_and_errors():
    with sdp_kernel(enable_flash=False):
        assert order_now() == [EFFICIENT, MATH]
        with pytest.raises(KeyError), sdpa_kernel(FLASH):
            assert order_now() == [FLASH]
            raise KeyError
        assert order_now() == [EFFICIENT, MATH]
        with sdp_kernel(False, False, False):
            assert order_now() == []
        assert order_now() == [EFFICIENT, MATH]
    assert order_now() == DEFAULT


def test_sdp_kernel_by_position():
    with sdp_kernel(True, False, True):
        assert order_now() == [FLASH, EFFICIENT]


def test_restored_on_early_return_and_closed_generator():
    def early():
        with sdpa_kernel(MATH):
            return order_now()

    def generator():
        with sdpa_kernel(MATH):
            yield order_now()
            yield order_now()

    assert early() == [MATH]
    steps = generator()
    assert next(steps) == [MATH]
    steps.close()
    assert order_now() == DEFAULT


def test_decorator():
    @sdpa_kernel(MATH)
    def decorated():
        return order_now()

    assert [decorated(), decorated()] == [[MATH], [MATH]] and order_now() == DEFAULT


def test_switches_belong_to_the_thread():
    seen = {}

    def other():
        seen["start"] = order_now()
        sdpa.enable_flash_sdp(False)
        seen["end"] = order_now()
        with pytest.raises(RuntimeError, match="No available kernel"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdpa.enable_math_sdp(False)
            attention(*inputs())

    with sdpa_kernel(MATH):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert order_now() == [MATH]
        attention(*inputs())
    assert seen == {"start": DEFAULT, "end": [EFFICIENT, MATH]}


@pytest.mark.parametrize(
    "enable, enabled, which",
    [
        (sdpa.enable_flash_sdp, sdpa.flash_sdp_enabled, FLASH),
        (sdpa.enable_mem_efficient_sdp, sdpa.mem_efficient_sdp_enabled, EFFICIENT),
        (sdpa.enable_math_sdp, sdpa.math_sdp_enabled, MATH),
    ],
)
def test_enable_functions(enable, enabled, which):
    assert enabled()
    enable(False)
    enable(False)
    assert not enabled() and order_now() == [b for b in DEFAULT if b != which]
    enable(True)
    assert enabled() and order_now() == DEFAULT


def test_torchs_members_are_taken():
    theirs = torch.nn.attention.SDPBackend
    for wanted in (theirs.MATH, [theirs.MATH], (theirs.MATH,), {theirs.MATH}):
        with sdpa_kernel(wanted):
            assert order_now() == [MATH]
    with sdpa_kernel([theirs.EFFICIENT_ATTENTION, MATH]):
        assert order_now() == [EFFICIENT, MATH]
    for backend in SDPBackend:
        assert theirs.__members__[backend.name].value == backend.value


@pytest.mark.parametrize(
    "wanted, text",
    [
        (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, "CUDNN_ATTENTION"),
        ("flash", "'flash'"),
        ([MATH, 7], "7"),
        ([MATH, MATH], "twice"),
    ],
    ids=str,
)
def test_what_is_no_backend(wanted, text):
    with pytest.raises(ValueError, match=text), sdpa_kernel(wanted):
        pass
    assert order_now() == DEFAULT


def test_any_iterable_of_backends():
    with sdpa_kernel(iter([FLASH, MATH])):
        assert order_now() == [FLASH, MATH]


def test_pickle():
    assert all(pickle.loads(pickle.dumps(member)) is member for member in SDPBackend)


@pytest.mark.parametrize("switches", [0x4, 0x11, -1, 0x301])
def test_bad_switches_of_the_op_are_named(switches):
    with pytest.raises((ValueError, RuntimeError), match=str(switches)):
        torch.ops.sdpa.attention_forward(*inputs(), None, 0.0, False, None, False, switches)


# Warnings and errors

SM70 = "Flash attention only supports sm75 and newer gpu architectures. Attempting to run on a sm 7.0 gpu."


def problem_of(capability, dtype=HALF, E=64, **kwargs):
    return sdpa.SDPAParams(*inputs(dtype, E), capability=capability, **kwargs).problem()


def test_the_seeds_warnings_on_sm70():
    problem = problem_of((7, 0))
    with sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False):
        switches = sdpa.backends.current_switches()
    assert sdpa._C.select(problem, switches) == 0
    assert sdpa._C.reasons(problem, switches)[:4] == [
        "Memory efficient kernel not used because:",
        "Memory Efficient attention has been runtime disabled.",
        "Flash attention kernel not used because:",
        SM70,
    ]


@capabilities
def test_warnings_name_the_chip(capability):
    lines = sdpa._C.reasons(problem_of(capability), 1)
    sentence = f"Attempting to run on a sm {capability[0]}.{capability[1]} gpu."
    assert any(sentence in line for line in lines) == (capability < (7, 5))


def test_one_warning_for_each_reason():
    lines = sdpa._C.reasons(problem_of((8, 0), SINGLE, E=300), 1)
    flash = lines[lines.index("Flash attention kernel not used because:") + 1 :]
    flash = flash[: flash.index("Math attention kernel not used because:")]
    assert len(flash) == 2 and "float32" in flash[0] and "300" in flash[1]


def test_no_available_kernel(device):
    tensors = [t.to(device, DOUBLE) for t in inputs()]
    with (
        sdpa_kernel([FLASH, EFFICIENT]),
        pytest.warns(UserWarning) as caught,
        pytest.raises(RuntimeError, match=r"^No available kernel\. Aborting execution\."),
    ):
        attention(*tensors)
    texts = [str(w.message) for w in caught]
    for expected in (
        "Memory efficient kernel not used because:",
        "Flash attention kernel not used because:",
        "Math attention has been runtime disabled.",
        "dtype: got float64",
    ):
        assert any(text.startswith(expected) for text in texts), texts
    assert all(w.category is UserWarning for w in caught)


def test_warnings_as_errors_stop():
    with sdpa_kernel(FLASH), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="kernel not used because"):
            attention(*inputs())


def test_params_of_torch_or_of_nobody():
    params = torch.backends.cuda.SDPAParams(*inputs(), None, 0.0, False, False)
    assert not sdpa.can_use_flash_attention(params) and not sdpa.can_use_efficient_attention(params)
    with pytest.raises(TypeError, match=r"SDPAParams.*got <class 'int'>"):
        sdpa.can_use_flash_attention(3)


def test_debug_gives_one_backends_reasons():
    params = sdpa.SDPAParams(*inputs(), capability=(7, 0))
    with pytest.warns(UserWarning) as caught:
        assert not sdpa.can_use_flash_attention(params, debug=True)
    assert [str(w.message) for w in caught] == ["Flash attention kernel not used because:", SM70]
    with sdp_kernel(enable_mem_efficient=False), pytest.warns(UserWarning) as caught:
        assert not sdpa.can_use_efficient_attention(params, debug=True)
    assert [str(w.message) for w in caught] == [
        "Memory efficient kernel not used because:",
        "Memory Efficient attention has been runtime disabled.",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sdpa.can_use_efficient_attention(params, debug=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SDPA_FORCE_ARCH concerns CUDA tensors")
def test_forced_architecture(monkeypatch):
    tensors = [t.cuda() for t in inputs()]
    monkeypatch.setenv("SDPA_FORCE_ARCH", "70")
    assert not row(explain(*tensors), FLASH).usable
    monkeypatch.setenv("SDPA_FORCE_ARCH", "71")
    with pytest.raises(RuntimeError, match=r"one of .*70.*; got '71'"):
        attention(*tensors)
