"""The Triton backend: kernels for GPUs, one module per op. Installs as `pykernels.kernels`.

Every op module reads downwards: jitted kernels, then the launchers `<op>_fwd` and `<op>_bwd` that
allocate the outputs and choose block sizes from `_configs`. Nothing here imports the rest of
pykernels; torch and triton are all it needs. On CPU tensors the kernels run in Triton's
interpreter, if TRITON_INTERPRET=1 was set before the first import.
"""

if __name__ != "pykernels.kernels":
    # Found as a top-level package (the repository root is on sys.path), it would shadow another
    # project's package of that name.
    raise ImportError(
        f"this is pykernels' Triton backend, not a package {__name__!r}: import pykernels.kernels"
    )

from . import _common as _common  # says what to do where triton is absent or too old
