"""The only place that chooses between reference, cpp and triton.

A backend is a column of modules, one per op: `pykernels.reference`, `pykernels.cpp` and
`pykernels.kernels`. The module of an op exports, under every backend, the same names:

* ``<op>_fwd(*tensors, keep=True, **options) -> (outputs, saved)``: the outputs, and the tensors
  that the backward pass needs; with ``keep=False`` there will be none, and less may be saved;
* ``<op>_bwd(saved, grads, *, needs, **options) -> input grads``: one entry per tensor argument of
  the forward. An entry of `grads` may be None, which stands for zeros; where `needs` is False, the
  entry returned may be None;
* optionally ``<op>_fwd_pass(*tensors, keep, skip, **options)`` and ``<op>_bwd_pass(*saved, needs,
  **options)``, which see no more of a tensor than its shape and dtype and whether it is there:
  their ``.run(tensors)`` and ``.run((*saved, *grads))`` return what the two above return, for all
  tensors that look alike, any gradient there or None; outputs at the places `skip` may be None.
  They may run under autocast, and must use no operation that it casts;
* optionally ``<op>_pack(*weights) -> packed``: what the forward may be given as ``packed=``, along
  with ``keep=False``, and its passes behind the tensors, to spare it the packing of these weights;
  beside it
  ``<op>_step(packed, weights)``: a function ``(weights, threads, input, states, relu) -> states``
  of one step of a cell, which returns None where these are no longer the weights or any tensor is
  out of the ordinary; or None where there is no such function;
* optionally ``<op>_group_fwd(calls, *, chained, keep=True)``, the ``(outputs, saved)`` of several
  calls ``(tensors, options)`` that run side by side; if `chained`, the first tensor of each is the
  first output of the one before; beside it ``<op>_group_bwd(calls, *, chained)``, the gradients of
  calls ``(saved, grads, needs, options)``, if `chained` with the last link first, whose first
  gradient is the first of the next call's;
* optionally ``<op>_extras(*tensors, **options) -> tensors``: what the forward saves behind the
  tensors and the outputs that every backend saves, uninitialised; none where it is missing;
* ``DTYPES``: the dtypes it serves;
* ``FEATURES``: which of the op's optional features it serves;
* optionally ``CHECKS_VALUES``, if true: the run of ``<op>_fwd_pass`` raises an IndexError for
  values of tensors that are out of range, before anything is written, so that nobody need check
  them first.

Tensors reach them checked, but for the values of targets on a GPU, and of any stride.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import platform
from collections.abc import Iterator
from types import ModuleType

import torch

from pykernels import _checks

#: Fastest first.
BACKENDS = ("cpp", "triton", "reference")
_PACKAGES = {"cpp": "cpp", "triton": "kernels", "reference": "reference"}
_NAMES = {package: name for name, package in _PACKAGES.items()}

#: Best first; the last one runs everywhere.
ISAS = ("avx512", "avx2", "baseline")

_environment = os.environ.get("PYKERNELS_BACKEND") or None
#: What `use_backend` asks for.
context: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the block on the backend `name`; None gives the choice back.

    An explicit ``backend=`` argument wins over this, and this over ``PYKERNELS_BACKEND``, which is
    read once at import.

    Args:
        name: "cpp", "triton", "reference" or None.

    Raises:
        ValueError: `name` is none of these.
    """
    if name is not None:
        _checks.choice("use_backend", "name", name, BACKENDS)
    token = context.set(name)
    try:
        yield
    finally:
        context.reset(token)


def select(
    op: str,
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    features: frozenset[str] = frozenset(),
) -> ModuleType:
    """The module that serves `op`: the one requested, or else the fastest that can.

    Raises:
        ValueError: the requested backend is unknown, or cannot serve this device, dtype or
            feature; the message names those that can.
    """
    found = _found(op, requested, device.type, dtype, features)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def check_environment() -> None:
    """Raises the ValueError of a ``PYKERNELS_BACKEND`` or ``PYKERNELS_ISA`` that names nothing."""
    if _environment is not None:
        _checks.choice("pykernels", "PYKERNELS_BACKEND", _environment, BACKENDS)
    with contextlib.suppress(ImportError):
        load_extension()


def asked_for(requested: str | None) -> str | None:
    """The backend that the call or its surroundings ask for; None leaves the choice."""
    return context.get() or _environment if requested is None else requested


def name(module: ModuleType) -> str:
    """The backend that a module is of."""
    return _NAMES[module.__name__.split(".")[1]]


def _found(
    op: str, requested: str | None, device: str, dtype: torch.dtype, features: frozenset[str]
) -> ModuleType | str:
    """What `select` returns, or the message of what it raises."""
    try:
        asked = asked_for(requested)
        if asked is not None:  # here, as what is no string may have no hash
            given = requested is not None or context.get() is not None
            argument = "backend" if given else "PYKERNELS_BACKEND"
            _checks.choice(op, argument, asked, BACKENDS)
        return _select(op, asked, device, dtype, features)
    except ValueError as error:
        return str(error)


# torch.compile does not look into the choice: what is found while it compiles, stays. This is what
# torch.compiler.assume_constant_result does, without the second that the import of Dynamo takes.
_found._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _select(
    op: str,
    requested: str | None,
    device: str,
    dtype: torch.dtype,
    features: frozenset[str],
) -> ModuleType:
    if requested is not None:
        reason = refusal(requested, op, device, dtype, features)
        if reason is None:
            return module(requested, op)
        able = [name for name in BACKENDS if refusal(name, op, device, dtype, features) is None]
        raise ValueError(
            f"{op}: backend {requested!r} cannot serve this call: {reason}; "
            + (f"these can: {', '.join(able)}" if able else "no backend can")
        )
    for name in BACKENDS:
        # Triton's interpreter on a CPU is for proving kernels, hundreds of times too slow to pick.
        if name == "triton" and device == "cpu":
            continue
        if refusal(name, op, device, dtype, features) is None:
            return module(name, op)
    raise ValueError(f"{op}: no backend serves dtype {dtype} on device {device}")


def refusal(
    name: str, op: str, device: str, dtype: torch.dtype, features: frozenset[str]
) -> str | None:
    """Why backend `name` cannot serve this call of `op`; None if it can."""
    if name == "cpp" and device != "cpu":
        return f"it runs on cpu tensors, not {device}"
    if name == "triton" and device not in ("cuda", "cpu"):
        return f"it runs on cuda tensors, not {device}"
    if name == "triton" and device == "cpu" and not _interpreting():
        return "on cpu tensors it needs TRITON_INTERPRET=1 set before Python starts"
    reason = available(name)
    if reason is not None:
        return reason
    if not has(name, op):
        return f"it has no {op}"
    served = module(name, op)
    if dtype not in served.DTYPES:
        return f"it does not serve {dtype}"
    missing = sorted(features - served.FEATURES)
    return f"it does not serve {', '.join(missing)}" if missing else None


def available(name: str) -> str | None:
    """Why backend `name` cannot be used on this machine at all; None if it can."""
    try:
        if name == "cpp":
            load_extension()
        if name == "triton":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed (pip install 'pykernels[triton]')"
            if not torch.cuda.is_available() and not _interpreting():
                return "no GPU is here; TRITON_INTERPRET=1 runs its kernels in Triton's interpreter"
            importlib.import_module("pykernels.kernels")
    except ImportError as error:
        return str(error)
    return None


def has(name: str, op: str) -> bool:
    """Whether there is a module of `op` in the column of backend `name`."""
    column = importlib.util.find_spec(f"pykernels.{_PACKAGES[name]}")
    places = None if column is None else column.submodule_search_locations
    return importlib.machinery.PathFinder.find_spec(op, places) is not None


def module(name: str, op: str) -> ModuleType:
    """The module of `op` in the column of backend `name`."""
    return importlib.import_module(f"pykernels.{_PACKAGES[name]}.{op}")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def load_extension() -> ModuleType:
    """The C++ kernels, built for the best instruction set that this processor runs.

    ``PYKERNELS_ISA=baseline|avx2|avx512``, read at the first call, forces one of them. The import
    of torch at the top of this file comes first, so that the extension finds torch's OpenMP runtime
    already loaded and shares its threads.

    Raises:
        ImportError: the extension is not built, or not for the instruction set that is forced.
        ValueError: PYKERNELS_ISA names no instruction set, or one that this processor lacks.
    """
    forced = os.environ.get("PYKERNELS_ISA") or None
    if forced is not None:
        _checks.choice("pykernels", "PYKERNELS_ISA", forced, ISAS)
    if importlib.util.find_spec("pykernels._C_baseline") is None:
        raise ImportError(
            "the C++ kernels are not built; reinstall pykernels where a C++17 compiler is found"
        )
    baseline = importlib.import_module("pykernels._C_baseline")
    if forced is not None:
        if not baseline.cpu_runs(forced):
            _checks.fail("pykernels", "PYKERNELS_ISA", "a set that this processor runs", forced)
        if importlib.util.find_spec(f"pykernels._C_{forced}") is None:
            raise ImportError(f"no C++ kernels are built for PYKERNELS_ISA={forced}")
        return importlib.import_module(f"pykernels._C_{forced}")
    for isa in ISAS:
        built = importlib.util.find_spec(f"pykernels._C_{isa}") is not None
        if built and baseline.cpu_runs(isa):
            return importlib.import_module(f"pykernels._C_{isa}")
    raise ImportError(f"no C++ kernels run on this processor ({platform.machine()})")


def isa() -> str:
    """The instruction set of the C++ kernels in use: "avx512", "avx2" or "baseline"."""
    return load_extension().__name__.rpartition("_C_")[2]
