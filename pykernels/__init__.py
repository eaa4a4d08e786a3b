"""Fused recurrent and self-attention kernels for PyTorch: C++ on CPUs, Triton on GPUs."""

import torch  # noqa: F401  torch's OpenMP runtime must be loaded before the C++ kernels are

from pykernels import functional, nn
from pykernels._backends import use_backend
from pykernels._version import __version__
from pykernels.patch import activate, deactivate, replace_modules, restore_modules

__all__ = [
    "__version__",
    "activate",
    "deactivate",
    "functional",
    "nn",
    "replace_modules",
    "restore_modules",
    "use_backend",
]
