"""Drives CMake: finds torch, CUTLASS, nvcc and the chips to compile for, and says what was built.

Environment: SDPA_CUDA=auto|1|0, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, SDPA_ALL_PATHS=1; ccache is used if found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def say(text: str) -> None:
    print(f"sdpa: {text}", file=sys.stderr, flush=True)


def use_installed_torch() -> None:
    """In an isolated build, take the torch of the environment installed into, if it has one.

    Otherwise `pip install .` would compile against the newest torch and then not load beside the one in use.
    """
    site = sysconfig.get_paths()["purelib"]
    if (Path(site) / "torch" / "version.py").exists() and site not in sys.path:
        sys.path.insert(0, site)


@dataclass(frozen=True)
class Cuda:
    home: Path
    version: tuple[int, int]
    archs: str
    cudart: Path


def find_cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, else that of the nvcc on PATH (which may be a wrapper), else /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    found = shutil.which("nvcc")
    candidates = [Path(found).resolve().parent.parent] if found else []
    for candidate in [*candidates, Path("/usr/local/cuda")]:
        if (candidate / "bin" / "nvcc").exists() and (candidate / "include" / "cuda_runtime_api.h").exists():
            return candidate
    return None


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        raise SystemExit(f"sdpa: cannot read the version from {nvcc} --version:\n{text}")
    return int(match[1]), int(match[2])


def all_archs(version: tuple[int, int]) -> str:
    """All chips that we have kernels for and this nvcc can compile for, with PTX for the newest."""
    return ("7.0;" if version < (13, 0) else "") + "7.5;8.0;8.6;8.9;9.0+PTX"


# torch.utils.cpp_extension's.
NAMED_ARCHS = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


def visible_archs(torch: object) -> str:
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}  # type: ignore[attr-defined]
    return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))


def spelt_out(archs: str, nvcc: Path, version: tuple[int, int], torch: object) -> str:
    """TORCH_CUDA_ARCH_LIST with torch's names as numbers; exits if there is one that cannot be compiled for."""
    native = visible_archs(torch) if "native" in archs else ""  # which starts CUDA
    names = NAMED_ARCHS | dict.fromkeys(("All", "Common"), all_archs(version)) | {"native": native}
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    result = []
    for entry in re.split(r"[ ,;]+", archs):
        for arch in names.get(entry, entry).split(";"):
            said = f"sdpa: TORCH_CUDA_ARCH_LIST has {entry!r}" + (f", {arch}" if entry in names and arch else "")
            match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
            if not match:
                raise SystemExit(
                    f"{said}, but no GPU is visible"
                    if entry == "native"
                    else f"{said}; expected entries such as 8.0, 9.0a or 9.0+PTX, or of {', '.join(names)}"
                )
            capability = int(match[1] + match[2])
            if capability < 70:
                raise SystemExit(f"{said}; there are kernels for 7.0 and newer")
            # Newer chips than Hopper get its PTX, unless the older paths are asked for, too.
            compiled = match[1] + match[2] if capability < 100 or os.environ.get("SDPA_ALL_PATHS") == "1" else "90"
            if compiled not in known:
                raise SystemExit(f"{said}, which nvcc {version[0]}.{version[1]} ({nvcc}) does not compile for")
            result.append(arch)
    return ";".join(result)


def find_cuda(torch: object) -> Cuda | str:
    """The CUDA to build with, or why the build goes without, which is said."""
    choice = os.environ.get("SDPA_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"sdpa: SDPA_CUDA must be auto, 1 or 0; got {choice!r}")

    def without(reason: str, remedy: str) -> str:
        if choice == "1":
            raise SystemExit(f"sdpa: SDPA_CUDA=1, but {reason}. {remedy}")
        note = f"WITHOUT CUDA kernels, the math backend alone: {reason}. {remedy}"
        say(f"building {note}")
        return f"built {note}"

    if choice == "0":
        return without("SDPA_CUDA=0", "Build with SDPA_CUDA=1 to get the GPU kernels.")

    home = find_cuda_home()
    nvcc = home / "bin" / "nvcc" if home else None
    torch_cuda: str | None = torch.version.cuda  # type: ignore[attr-defined]
    if torch_cuda is None:
        return without("the installed torch is a CPU build", "Install a CUDA build of torch.")
    if home is None or nvcc is None or not nvcc.exists():
        return without(
            f"there is no nvcc (CUDA_HOME={os.environ.get('CUDA_HOME', 'not set')})",
            "Install the CUDA toolkit, or set CUDA_HOME to one, to get the GPU kernels.",
        )
    version = nvcc_version(nvcc)
    if str(version[0]) != torch_cuda.split(".")[0]:
        return without(
            f"nvcc is {version[0]}.{version[1]} ({nvcc}) and torch was built for CUDA {torch_cuda}",
            f"Set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit.",
        )
    if version < (12, 4):
        return without(f"nvcc is {version[0]}.{version[1]}", "CUDA 12.4 or newer is needed.")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ,;")
    if archs:
        archs = spelt_out(archs, nvcc, version, torch)
    elif choice == "auto":
        if not torch.cuda.is_available():  # type: ignore[attr-defined]
            return without(
                "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set",
                "Set SDPA_CUDA=1 for all chips, or TORCH_CUDA_ARCH_LIST for some, to build the GPU kernels anyway.",
            )
        archs = visible_archs(torch)
    libraries = [home / "lib64", home / "lib"]
    if spec := importlib.util.find_spec("nvidia"):
        for place in spec.submodule_search_locations or []:
            libraries += [Path(place) / f"cu{version[0]}" / "lib", Path(place) / "cuda_runtime" / "lib"]
    names = ("libcudart.so", f"libcudart.so.{version[0]}")
    found = [folder / name for folder in libraries for name in names if (folder / name).exists()]
    if not found:
        return without(f"there is no libcudart.so in {', '.join(map(str, libraries))}", "Install the CUDA runtime.")
    return Cuda(home, version, archs or all_archs(version), found[0])


def tool(name: str, folder: str) -> str:
    """The Python package's program, which is on PATH only in an activated environment, else the system's."""
    if importlib.util.find_spec(name):
        return str(Path(getattr(importlib.import_module(name), folder)) / name)
    if found := shutil.which(name):
        return found
    raise SystemExit(f"sdpa: there is no {name}: pip install {name}")


def find_cutlass() -> tuple[Path, str]:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        raise SystemExit("sdpa: CUTLASS's headers are needed for the GPU kernels: pip install nvidia-cutlass")
    include = Path(spec.origin).parent / "source" / "include"
    if not (include / "cute").exists():
        raise SystemExit(
            f"sdpa: nvidia-cutlass is installed but has no headers in {include}; pip install nvidia-cutlass"
        )
    return include, importlib.metadata.version("nvidia-cutlass")


class CMakeBuild(build_ext):
    def copy_extensions_to_source(self) -> None:  # of an editable install
        super().copy_extensions_to_source()
        (ROOT / "sdpa" / "_build_info.py").write_text(self.build_info)

    def build_extension(self, ext: Extension) -> None:
        start = time.monotonic()
        use_installed_torch()
        import pybind11
        import torch
        from torch.utils import cpp_extension

        found = find_cuda(torch)
        cuda = found if isinstance(found, Cuda) else None
        cutlass_version = "not needed"
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{cuda.archs if cuda else 'cpu'}"
        if os.environ.get("SDPA_ALL_PATHS") == "1":
            tag += "-all"
        build = Path(os.environ.get("SDPA_BUILD_DIR", ROOT / "build")) / re.sub(r"[^\w.+-]+", "-", tag)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_FLAGS": f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            "SDPA_PYTHON": sys.executable,
            "SDPA_PYTHON_INCLUDE": ";".join([pybind11.get_include(), sysconfig.get_paths()["include"]]),
            "SDPA_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
            "SDPA_TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
            "SDPA_CUDA_ARCHS": "",
            "SDPA_ALL_PATHS": "ON" if os.environ.get("SDPA_ALL_PATHS") == "1" else "OFF",
        }
        if ccache := shutil.which("ccache"):
            options["CMAKE_CXX_COMPILER_LAUNCHER"] = options["SDPA_CCACHE"] = ccache
        if cuda:
            cutlass, cutlass_version = find_cutlass()
            options |= {
                "SDPA_CUDA_ARCHS": re.sub(r"[ ,;]+", " ", cuda.archs),
                "SDPA_CUTLASS_INCLUDE": str(cutlass),
                "SDPA_CUDA_INCLUDE": str(cuda.home / "include"),
                "SDPA_CUDART": str(cuda.cudart),
                "CMAKE_CUDA_COMPILER": str(cuda.home / "bin" / "nvcc"),
            }
        build.mkdir(parents=True, exist_ok=True)
        # With another nvcc CMake starts anew by itself, but forgets the options given here.
        cache = build / "CMakeCache.txt"
        if cuda and cache.exists() and f"={options['CMAKE_CUDA_COMPILER']}\n" not in cache.read_text():
            cache.unlink()
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        options["CMAKE_MAKE_PROGRAM"] = tool("ninja", "BIN_DIR")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not over the file itself, which a running process may have mapped.
        fresh = target.with_suffix(".new")
        shutil.copy2(build / "_C.so", fresh)
        os.replace(fresh, target)
        # A folder that was built in before may hold kernels that are no more.
        sources = (build / "generated" / "variants.cmake").read_text()
        files = [file for file in build.rglob("*.kernels") if file.name.removesuffix(".o.kernels") in sources]
        kernels = {row.split("\t")[4] for file in files for row in file.read_text().splitlines()}
        info = {
            "torch": torch.__version__,
            "cuda": f"{cuda.version[0]}.{cuda.version[1]}" if cuda else "none (CPU and math only)",
            "cutlass": cutlass_version,
            "archs": cuda.archs.replace(";", " ") if cuda else "none",
            "kernels": len(kernels),
            "seconds": round(time.monotonic() - start),
            "note": "" if isinstance(found, Cuda) else found,
        }
        lines = [f"{key} = {value!r}" for key, value in info.items()]
        self.build_info = '"""What setup.py built; written by it."""\n\n' + "\n".join(lines) + "\n"
        (target.parent / "_build_info.py").write_text(self.build_info)
        width = max(map(len, info))
        say("built\n" + "\n".join(f"  {key:<{width}}  {value}" for key, value in info.items() if value != ""))


setup(ext_modules=[Extension("sdpa._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
