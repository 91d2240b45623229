"""Loads the extension, after checking that it was built for the torch that is here."""

from __future__ import annotations

import importlib

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir"


def check_torch(built: str, running: str) -> None:
    """Raises ImportError if an extension built for one torch would be loaded into another (major.minor)."""
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"sdpa was built for torch {built}, but torch {running} is installed. torch's C++ interface changes "
            f"between minor versions, so rebuild it: {REBUILD} sdpa (or, from the source folder, {REBUILD} .)"
        )


def extension() -> None:
    try:
        info = importlib.import_module("sdpa._build_info")
    except ModuleNotFoundError as error:
        raise ImportError(
            "sdpa's extension is not built. In the source folder: pip install --no-build-isolation ."
        ) from error
    check_torch(info.torch, torch.__version__)
    importlib.import_module("sdpa._C")
