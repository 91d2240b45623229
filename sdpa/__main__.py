"""``python -m sdpa``: what is installed, and what it can do here."""

from __future__ import annotations

import torch

import sdpa
from sdpa import _C, _build_info


def main() -> None:
    chips = sorted({chip for variant in _C.variants() for chip in variant["chips"]})  # type: ignore[attr-defined]
    devices = [
        f"{torch.cuda.get_device_name(i)} (sm{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    rows = {
        "sdpa": sdpa.__version__,
        "torch": f"{torch.__version__} (built for {_build_info.torch})",
        "CUDA": _build_info.cuda,
        "CUTLASS": _build_info.cutlass,
        "kernels": f"{_build_info.kernels} for {', '.join('sm' + chip for chip in chips) or 'no chip'}",
        "built in": f"{_build_info.seconds} s",
        "devices": ", ".join(devices) or "cpu only",
    }
    if _build_info.note:
        rows["note"] = _build_info.note
    width = max(map(len, rows))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows.items()))


if __name__ == "__main__":
    main()
