"""The build's own Python: the table of variants, the reader of ptxas, setup.py's choices, the check at import."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sdpa

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


variants = load(KERNELS / "variants.py")
check_ptxas = load(KERNELS / "check_ptxas.py")


# variants.py


@pytest.mark.parametrize(
    "text, expected",
    {
        "8.0": (80, "", False, ["-gencode=arch=compute_80,code=sm_80"]),
        "9.0a": (90, "a", False, ["-gencode=arch=compute_90a,code=sm_90a"]),
        "12.0+PTX": (
            120,
            "",
            True,
            ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"],
        ),
    }.items(),
)
def test_targets(text, expected):
    target = variants.Target.parse(text)
    assert (target.capability, target.suffix, target.ptx, target.gencode) == expected


@pytest.mark.parametrize("text", ["80", "sm_80", "8.0x", "9.0+ptx", "Hopper", "8.", "8.0+PTX+PTX"])
def test_bad_targets_are_named(text):
    with pytest.raises(SystemExit, match=re.escape(repr(text))):
        variants.Target.parse(text)


CHIPS = ("7.0", "7.5", "8.0", "8.6", "9.0a", "10.0", "12.0+PTX")


@pytest.mark.parametrize("all_paths", [False, True])
@pytest.mark.parametrize("v", variants.VARIANTS, ids=lambda v: v.name)
def test_chips_of_each_path(v, all_paths):
    targets = [variants.Target.parse(text) for text in CHIPS]
    chosen = variants.targets_of(v, targets, all_paths)
    rivals = [o.path for o in variants.VARIANTS if (o.backend, o.direction) == (v.backend, v.direction)]

    def wants(target):
        if v.path == variants.HOPPER:
            return target.capability == 90
        newer = any(v.path < path <= target.capability and path != variants.HOPPER for path in rivals)
        return (
            v.path <= target.capability
            and not (v.dtype == "bfloat16" and target.capability < 80)
            and (all_paths or not newer)
        )

    # Machine code runs on its own chip, and unless specific on later ones of its generation; PTX on every later one.
    def runs(code, target):
        if code.suffix:
            return (code.capability, code.suffix) == (target.capability, target.suffix)
        same_generation = code.capability // 10 == target.capability // 10
        return code.capability <= target.capability and (code.ptx or same_generation)

    for target in targets:
        assert any(runs(code, target) for code in chosen) or not wants(target), target
    for code in chosen:
        assert any(runs(code, target) and wants(target) for target in targets), code


@pytest.mark.parametrize("chips", [CHIPS, ("8.0", "8.6", "8.9"), ("8.0", "8.6+PTX"), ("8.6+PTX", "8.9")], ids=str)
@pytest.mark.parametrize("all_paths", [False, True])
def test_no_chip_is_compiled_for_twice(chips, all_paths):
    targets = [variants.Target.parse(text) for text in chips]
    for v in variants.VARIANTS:
        flags = [flag for code in variants.targets_of(v, targets, all_paths) for flag in code.gencode]
        assert len(set(flags)) == len(flags), v.name


def test_names_are_unique_and_headers_exist():
    names = [v.name for v in variants.VARIANTS]
    assert len(set(names)) == len(names)
    for v in variants.VARIANTS:
        assert (KERNELS / v.header).is_file()
    forward = {(v.backend, v.dtype, v.head_dim) for v in variants.VARIANTS if v.direction == "forward"}
    backward = {(v.backend, v.dtype, v.head_dim) for v in variants.VARIANTS if v.direction == "backward"}
    assert {row[:2] for row in forward} == {row[:2] for row in backward}


def test_ci_compiles_every_variant():
    script = (ROOT / ".ci" / "run").read_text()
    lines = [(re.findall(r"TORCH_CUDA_ARCH_LIST=(\S+)", script), "")]
    for line in re.findall(r"compile_matrix.py .*", script):
        only = re.search(r"--only (\S+)", line)
        lines.append((re.findall(r" (\d\.\da?)", line), only[1].strip("'") if only else ""))
    compiled = {
        v.name
        for chips, only in lines
        for v in variants.VARIANTS
        if re.search(only, v.name) and variants.targets_of(v, [variants.Target.parse(text) for text in chips], False)
    }
    assert compiled == {v.name for v in variants.VARIANTS}


@pytest.mark.parametrize("chip", ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_one_chip_has_at_most_60_translation_units(tmp_path, chip):
    assert generate(tmp_path, "--archs", chip).returncode == 0
    kernels = re.findall(r"\.cu$", (tmp_path / "variants.cmake").read_text().replace(")", ""), re.MULTILINE)
    host = re.findall(r"^  csrc/\S+\.cpp", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert len(host) >= 14 and len(kernels) + len(host) <= 60


def generate(folder, *args):
    command = [sys.executable, str(KERNELS / "variants.py"), "--out", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_generated_files(tmp_path):
    assert generate(tmp_path, "--archs", "7.0 9.0a;12.0+PTX").returncode == 0
    table = (tmp_path / "variants.inc").read_text()
    cmake = (tmp_path / "variants.cmake").read_text()
    targets = [variants.Target.parse(text) for text in ("7.0", "9.0a", "12.0+PTX")]
    for v in variants.VARIANTS:
        assert f'"{v.name}"' in table
        compiled = bool(variants.targets_of(v, targets, False))
        source = tmp_path / f"{v.name}.cu"
        assert source.exists() == (source.as_posix() in cmake) == compiled
        if compiled:
            assert f'#include "{v.header}"' in source.read_text()
    assert "code=sm_90a" in cmake and "code=compute_90" in cmake
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert generate(tmp_path, "--archs", "7.0 9.0a;12.0+PTX").returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, "unchanged files were rewritten"


def test_generated_files_without_cuda(tmp_path):
    assert generate(tmp_path).returncode == 0
    assert not list(tmp_path.glob("*.cu")) and "add_library" not in (tmp_path / "variants.cmake").read_text()
    assert all(f'"{v.name}"' in (tmp_path / "variants.inc").read_text() for v in variants.VARIANTS)


def test_bad_arch_list_fails_generation(tmp_path):
    done = generate(tmp_path, "--archs", "8.0 Ampere")
    assert done.returncode != 0 and "'Ampere'" in done.stderr


def test_extension_knows_the_table():
    rows = sdpa._C.variants()
    number = {"flash": 1, "efficient": 2}
    assert [(r["name"], r["backend"], r["direction"], r["path"], r["dtype"], r["head_dim"]) for r in rows] == [
        (v.name, number[v.backend], v.direction, v.path, v.dtype, v.head_dim) for v in variants.VARIANTS
    ]


# check_ptxas.py

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
CLEAN = PTXAS.format(stack=0, stores=0, loads=0, registers=168)
SPILLS = PTXAS.format(stack=24, stores=16, loads=20, registers=255)


def test_what_ptxas_says():
    b = ("sm_90a", 40, 0, 0, "_Z1bPf")
    assert check_ptxas.kernels(CLEAN) == [("sm_80", 168, 0, 1024, "_Z1aPf"), b]
    assert check_ptxas.kernels(SPILLS) == [("sm_80", 255, 36, 1024, "_Z1aPf"), b]
    assert check_ptxas.kernels("nothing of ours") == []


@pytest.mark.parametrize("text, code", [(CLEAN, 0), (SPILLS, 1), (CLEAN, 3)], ids=["clean", "spill", "error"])
def test_compiler_launcher(tmp_path, text, code):
    output = tmp_path / "kernel.o"
    broken = code if code != 1 else 0  # a spill fails although the compiler did not
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        f"import sys\nopen(sys.argv[2], 'w').write('object')\nprint({text + 'warning: hm'!r}, file=sys.stderr)\n"
        f"sys.exit({broken})"
    )
    launcher = [sys.executable, str(KERNELS / "check_ptxas.py")]
    done = subprocess.run([*launcher, sys.executable, str(compiler), "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == code
    assert "warning: hm" in done.stderr and "ptxas info" not in done.stderr
    rows = Path(f"{output}.kernels")
    assert rows.exists() == (code == 0)
    if code == 0:
        assert rows.read_text().splitlines() == ["sm_80\t168\t0\t1024\t_Z1aPf", "sm_90a\t40\t0\t0\t_Z1bPf"]
    if code == 1:
        assert not output.exists()
        assert re.search(r"_Z1aPf spills 36 bytes on sm_80 with 255 registers", done.stderr)


def test_missing_instructions_of_flash():
    compile_matrix = load(KERNELS / "compile_matrix.py")
    held = dict.fromkeys(compile_matrix.INSTRUCTIONS, 1)
    turing, ampere, efficient = (
        next(v for v in variants.VARIANTS if (v.backend, v.path) == row)
        for row in (("flash", 75), ("flash", 80), ("efficient", 80))
    )
    assert not compile_matrix.missing(ampere, "flash_forward_kernel", 128, held)
    held["LDGSTS"] = 0
    assert compile_matrix.missing(ampere, "flash_forward_kernel", 128, held) == ["LDGSTS"]
    assert not compile_matrix.missing(turing, "flash_forward_kernel", 128, held)
    for v, name, registers in ((ampere, "flash_delta", 128), (ampere, "flash_forward", 4), (efficient, "forward", 128)):
        assert not compile_matrix.missing(v, name, registers, held)


# The rooms


def test_kernels_include_no_torch():
    forbidden = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11)\b')
    sources = [path for path in KERNELS.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(sources) > 10
    found = [f"{path.relative_to(ROOT)}: {line}" for path in sources for line in path.read_text().splitlines()]
    assert not [line for line in found if forbidden.search(line)]


# Import


@pytest.mark.parametrize("built, running", [("2.8.0+cu126", "2.11.0+cu130"), ("2.11.0", "2.1.0"), ("3.11.0", "2.11.1")])
def test_import_for_another_torch_is_refused(built, running):
    with pytest.raises(ImportError) as error:
        sdpa._load.check_torch(built, running)
    assert built in str(error.value) and running in str(error.value)
    command = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"
    assert f"rebuild it: {command} sdpa (or, from the source folder, {command} .)" in str(error.value)


@pytest.mark.parametrize("built, running", [("2.11.0+cu130", "2.11.1+cpu"), ("2.8.0", "2.8.0")])
def test_import_for_the_same_minor_version(built, running):
    sdpa._load.check_torch(built, running)


# setup.py


LISTED = " ".join(f"compute_{n}" for n in (50, 60, 70, 72, 75, 80, 86, 87, 89, 90, 100, 120))  # by nvcc 12.8


@pytest.fixture
def setup_py(monkeypatch, tmp_path):
    """setup.py's names, with a toolkit of CUDA 12.8 in tmp_path and a clean environment."""
    setuptools = pytest.importorskip("setuptools")
    for name in ("SDPA_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    names = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    for folder, name, text in (
        ("bin", "nvcc", f"#!/bin/sh\n[ $1 = --version ] && echo 'release 12.8, V12.8.61' || echo '{LISTED}'\n"),
        ("lib64", "libcudart.so", ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return SimpleNamespace(**names)


def torch_of(cuda="12.8", gpus=()):
    devices = SimpleNamespace(
        is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=devices)


def test_cuda_for_the_gpus_that_are_here(setup_py, tmp_path):
    found = setup_py.find_cuda(torch_of(gpus=[(9, 0), (8, 0), (9, 0)]))
    assert (found.home, found.version, found.archs) == (tmp_path, (12, 8), "8.0;9.0")
    assert found.cudart == tmp_path / "lib64" / "libcudart.so"


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_cuda_for_an_arch_list(setup_py, monkeypatch, choice):
    monkeypatch.setenv("SDPA_CUDA", choice)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6+PTX")
    assert setup_py.find_cuda(torch_of()).archs == "8.6+PTX"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Volta Turing,Ampere;Ada", "7.0+PTX;7.5+PTX;8.0;8.6+PTX;8.9+PTX"),
        ("Ampere+Tegra;9.0a", "8.7;9.0a"),
        ("Blackwell", "10.0;10.3;12.0;12.1+PTX"),
        ("All", "7.0;7.5;8.0;8.6;8.9;9.0+PTX"),
        ("native", "8.0;9.0"),
    ],
)
def test_named_archs(setup_py, monkeypatch, text, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert setup_py.find_cuda(torch_of(gpus=[(9, 0), (8, 0)])).archs == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("8.0 Pascal", r"'Pascal', 6\.0; there are kernels for 7\.0 and newer"),
        ("8.8", r"'8\.8', which nvcc 12\.8 .* does not compile for"),
        ("Rubin", r"'Rubin'; expected .*9\.0a.*Hopper.*native"),
        ("native", "'native', but no GPU is visible"),
    ],
)
def test_archs_that_cannot_be_built_are_named(setup_py, monkeypatch, text, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(SystemExit, match=message):
        setup_py.find_cuda(torch_of())


def test_all_paths_of_a_chip_that_nvcc_does_not_know(setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.3")
    monkeypatch.setenv("SDPA_ALL_PATHS", "1")
    with pytest.raises(SystemExit, match=r"'10\.3', which nvcc 12\.8"):
        setup_py.find_cuda(torch_of())


def test_cuda_for_all_chips(setup_py, monkeypatch):
    monkeypatch.setenv("SDPA_CUDA", "1")
    assert setup_py.find_cuda(torch_of()).archs == setup_py.all_archs((12, 8))
    for version, has, has_not in ((12, 4), "7.0", "10.0"), ((12, 8), "7.0", "10.0"), ((13, 0), "9.0+PTX", "7.0"):
        archs = setup_py.all_archs(version).split(";")
        assert has in archs and has_not not in archs and archs[-1].endswith("+PTX")


@pytest.mark.parametrize(
    "what, torch, expected",
    [
        ("no nvcc", torch_of(gpus=[(9, 0)]), "no nvcc"),
        ("CPU torch", torch_of(cuda=None), "CPU build"),
        ("other major", torch_of(cuda="13.0", gpus=[(9, 0)]), "13.0"),
        ("old", torch_of(cuda="12.1", gpus=[(9, 0)]), "12.3"),
        ("no runtime", torch_of(gpus=[(9, 0)]), "libcudart"),
        ("no GPU", torch_of(), "no GPU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("choice", ["auto", "1"])
def test_without_cuda_says_why(setup_py, monkeypatch, tmp_path, capsys, what, torch, expected, choice):
    monkeypatch.setenv("SDPA_CUDA", choice)
    if what == "no nvcc":
        (tmp_path / "bin" / "nvcc").unlink()
    if what == "no runtime":
        (tmp_path / "lib64" / "libcudart.so").unlink()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if what == "old":
        (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho 'release 12.3, V12.3.1'\n")
    if choice == "auto":
        result, said = setup_py.find_cuda(torch), capsys.readouterr().err
        assert not isinstance(result, setup_py.Cuda)
        assert "WITHOUT CUDA" in said and expected in said and len(said.splitlines()) == 1
    elif what == "no GPU":
        assert isinstance(setup_py.find_cuda(torch), setup_py.Cuda)
    else:
        with pytest.raises(SystemExit, match=f"SDPA_CUDA=1, but .*{expected}"):
            setup_py.find_cuda(torch)


def test_cuda_switched_off(setup_py, monkeypatch, capsys):
    monkeypatch.setenv("SDPA_CUDA", "0")
    assert not isinstance(setup_py.find_cuda(torch_of(gpus=[(9, 0)])), setup_py.Cuda)
    assert "SDPA_CUDA=0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["yes", "", "2"])
def test_bad_choice_is_named(setup_py, monkeypatch, value):
    monkeypatch.setenv("SDPA_CUDA", value)
    with pytest.raises(SystemExit, match=f"auto, 1 or 0; got {value!r}"):
        setup_py.find_cuda(torch_of())
