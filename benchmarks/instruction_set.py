"""Holds the other libraries to the instruction set that is forced on ours."""

from __future__ import annotations

import os
import sys

#: What torch's own kernels, MKL and oneDNN (in torch and in OpenVINO) read as they are loaded. ONNX
#: Runtime takes what the processor has and knows no such variable.
LIMITS = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}


def hold() -> None:
    """Starts this program again with `LIMITS`, where PYKERNELS_ISA forces one of them.

    torch is loaded by then, and reads them no second time.
    """
    limits = LIMITS.get(os.environ.get("PYKERNELS_ISA", ""), {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | limits)
