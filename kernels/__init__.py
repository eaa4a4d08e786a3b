"""The Triton backend: kernels for GPUs, one module per op. Installs as `pykernels.kernels`.

Every op module reads downwards: jitted kernels, then the launchers `<op>_fwd` and `<op>_bwd` that
allocate the outputs and choose block sizes from `_configs`. Nothing here imports the rest of
pykernels; torch and triton are all it needs. On CPU tensors the kernels run in Triton's
interpreter, if TRITON_INTERPRET=1 was set before the first import.
"""

from typing import NoReturn

if __name__ == "pykernels.kernels":
    from . import _common as _common  # says what to do where triton is absent or too old
else:
    # Found as a top-level package (the repository root is on sys.path), it is empty: programs that
    # look for another project's package of that name, as Hugging Face transformers does, find here
    # a package without a version and go on without it.
    __path__: list[str] = []  # type: ignore[no-redef]

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(
            f"no {name!r} in package {__name__!r}, which is pykernels' Triton backend: import "
            "pykernels.kernels"
        )
