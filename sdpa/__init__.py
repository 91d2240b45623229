"""Scaled dot-product attention for PyTorch: three backends behind one op, and it says which one ran.

>>> out = sdpa.scaled_dot_product_attention(query, key, value, is_causal=True)
>>> print(sdpa.explain(query, key, value, is_causal=True))
"""

from pkgutil import extend_path

# The source tree's package, imported from the repository's root, finds the extension of the installed one.
__path__ = extend_path(__path__, __name__)

from . import _load
from ._version import __version__

_load.extension()

from . import _registrations as _registrations
from .backends import (
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
from .explanation import Explanation, explain
from .functional import scaled_dot_product_attention
from .patch import patch_torch

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
