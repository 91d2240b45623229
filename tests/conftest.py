"""Devices, seeds, and that no test leaves the switches changed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from reference import BACKENDS

import sdpa._C
from sdpa import backends

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's deterministic switch asks for it
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

GPU_WORKERS = 7  # of xdist's: the more processes there are on one GPU, the longer they wait for each other


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        config.option.loadgroup = True
    elif getattr(config.option, "dist", None) == "load":
        config.option.dist = "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [i for i in items if "cuda" in i.name or i.path.name == "test_kernels.py"]
    for number, item in enumerate(on_gpu if torch.cuda.is_available() else []):
        item.add_marker(pytest.mark.xdist_group(f"gpu{number % GPU_WORKERS}"))


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device`: every device here. `device, backend`: and every backend that there may be on it."""
    if "backend" in metafunc.fixturenames:
        pairs = [(d, b) for d in DEVICES for b in BACKENDS[d]]
        metafunc.parametrize("device, backend", pairs, ids=[f"{d}-{b.name}" for d, b in pairs])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20230511)


@pytest.fixture(autouse=True)
def memory_returned() -> Iterator[None]:
    """The workers share a GPU, and some tests want much of it."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def switches_restored() -> Iterator[None]:
    before = backends.current_switches()
    yield
    after, below = backends.current_switches(), sdpa._C.current_switches()
    backends._set_switches(before)
    assert (after, below) == (before, before), f"switches left changed: {after:#x} in Python, {below:#x} in C++"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
