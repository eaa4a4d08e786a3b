"""What a benchmark runs in, the same for every implementation.

The other libraries, as far as they can be, are held to the instruction set that is forced on ours,
and the C library to memory that it has. Left to itself, glibc gives large blocks back to the
system, depending on which was freed last, and the next result takes its pages anew, one fault every
4 KB: in a training step of small tensors a good part of the time, and it falls to whoever is next.
"""

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

#: What glibc reads as a program starts, in bytes: no free block goes back to the system, and blocks
#: up to the largest size that glibc would come to by itself are kept.
MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def hold() -> None:
    """Starts this program again in `MEMORY`, and in the `LIMITS` of PYKERNELS_ISA if that is set.

    The C library and torch have started by then, and read them no second time.
    """
    wanted = MEMORY | LIMITS.get(os.environ.get("PYKERNELS_ISA", ""), {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)
