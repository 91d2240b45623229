"""Scaled dot-product attention for PyTorch: three backends behind one op, and it says which one ran.

    import sdpa
    out = sdpa.scaled_dot_product_attention(query, key, value, is_causal=True)
    print(sdpa.explain(query, key, value, is_causal=True))
"""

from pkgutil import extend_path

# The source tree's package, imported from the repository's root, finds the extension of the installed one.
__path__ = extend_path(__path__, __name__)

import torch  # noqa: E402  the extension needs torch's libraries loaded

from . import _load  # noqa: E402
from ._version import __version__  # noqa: E402

_load.extension()

from . import _registrations as _registrations  # noqa: E402
from .backends import (  # noqa: E402
    SDPAParams,
    SDPBackend,
    can_use_efficient_attention,
    can_use_flash_attention,
    enable_flash_sdp,
    enable_math_sdp,
    enable_mem_efficient_sdp,
    flash_sdp_enabled,
    math_scratch_limit,
    math_sdp_enabled,
    mem_efficient_sdp_enabled,
    sdp_kernel,
    sdpa_kernel,
    set_math_scratch_limit,
)
from .explanation import Explanation, explain  # noqa: E402
from .functional import scaled_dot_product_attention  # noqa: E402
from .patch import patch_torch  # noqa: E402

__all__ = [
    "Explanation",
    "SDPAParams",
    "SDPBackend",
    "__version__",
    "can_use_efficient_attention",
    "can_use_flash_attention",
    "enable_flash_sdp",
    "enable_math_sdp",
    "enable_mem_efficient_sdp",
    "explain",
    "flash_sdp_enabled",
    "math_scratch_limit",
    "math_sdp_enabled",
    "mem_efficient_sdp_enabled",
    "patch_torch",
    "scaled_dot_product_attention",
    "sdp_kernel",
    "sdpa_kernel",
    "set_math_scratch_limit",
]
