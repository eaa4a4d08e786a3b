"""Launches that are worked out once for each layout of their tensors.

What a launcher makes of a call, its block sizes, strides, descriptors and grid, and which compiled
kernel Triton then finds for these arguments, hangs on the layout of the tensors alone: dtypes,
sizes, strides, the device, and whether an address is a multiple of 16 bytes. To work it out takes
the host 20 to 100 us on a fast machine, more than many a kernel runs. So launchers are written as
plans, which see tensors and options and return a `Call`, and `launch` remembers what came of it:
the next call with the same layouts hands the compiled kernel its new addresses.
"""

import inspect
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import driver

from ._common import AMD, INTERPRETED, RELEASE, on_device_of

#: Layouts remembered; the oldest goes first.
CAPACITY = 2048

#: Tensor maps remembered of each argument.
MAPS = 64

#: Whether what a compiled kernel's `run` takes is known, which is Triton's own affair: true of 3.6
#: to 3.9. On AMD a kernel also hangs on the size of the memory that a tensor is a view of.
_DIRECT = not INTERPRETED and not AMD and RELEASE < (3, 10)

_ready: dict[Any, "_Ready"] = {}
_found: dict[Any, Any] = {}
_lock = threading.Lock()


class Call(NamedTuple):
    """``kernel[grid](*args, **constants)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


Plan = Callable[..., Call]


def launch(plan: Plan, tensors: tuple[Tensor | None, ...], *options: Any, **now: int) -> None:
    """Launches ``plan(*tensors, *options, **now)`` on the device of the first tensor.

    Args:
        plan: looks at nothing of the tensors but what the head of this file names. It gives each to
            the kernel as it is, in a tuple, or as the base of a descriptor.
        tensors: the first is no None.
        options: hashable; all else that the plan needs.
        now: numbers that change from launch to launch, by the names of arguments of the kernel,
            which it does not specialize.

    Raises:
        RuntimeError: nothing can run Triton kernels on that device.
    """
    places, key = _layouts(plan, tensors, options)
    ready = _ready.get(key)
    with on_device_of(tensors[0]):
        if ready is not None and not _watched():
            ready(places, tensors, now)
            return
        # other objects of the same memory, each given once: so that a plan's can be told apart
        given = [None if t is None else t.detach() for t in tensors]
        call = plan(*given, *options, **now)
        compiled = call.kernel[call.grid](*call.args, **call.constants)
    if _DIRECT and not _watched() and _is_known(call, compiled):
        _keep(_ready, key, _Ready(call, given, compiled))


def once(function: Callable[..., Any], tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
    """``function(*tensors, *options)``, called once for each layout: it looks at no more."""
    _, key = _layouts(function, tensors, options)
    found = _found.get(key)
    if found is None:
        found = function(*tensors, *options)
        _keep(_found, key, found)
    return found


def _layouts(
    function: Callable[..., Any], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[list[int], Any]:
    """The addresses of the tensors, and what stands for a call in all that may be looked at."""
    places: list[int] = []
    key: list[Any] = [function, tensors[0].device, options]  # type: ignore[union-attr]
    for t in tensors:
        if t is None:
            places.append(0)
            key.append(None)
        else:
            place = t.data_ptr()
            places.append(place)
            key += t.dtype, t.shape, t.stride(), place % 16
    return places, tuple(key)


def _keep(among: dict[Any, Any], key: Any, value: Any) -> None:
    with _lock:
        if len(among) >= CAPACITY:
            del among[next(iter(among))]
        among[key] = value


def _watched() -> bool:
    """Whether someone looks at Triton's launches, or has it compile other kernels than usual."""
    runtime = triton.knobs.runtime
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
    )


def _is_known(call: Call, compiled: Any) -> bool:
    """Whether `_Ready` knows how to launch the kernel: its descriptors, if any, have maps."""
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return False
    maps = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    return len(maps) == sum(hasattr(arg, "block_shape") for arg in call.args)


class _Ready:
    """A call whose kernel is compiled, without its addresses."""

    def __init__(self, call: Call, tensors: list[Tensor | None], compiled: Any) -> None:
        """`tensors` are those that the plan saw."""
        index = {id(t): i for i, t in enumerate(tensors) if t is not None}
        names = call.kernel.arg_names
        rest = [call.constants[name] for name in names[len(call.args) :]]
        self.grid = (*call.grid, 1, 1)[:3]
        self.compiled, self.run = compiled, compiled.run
        self.args: list[Any] = []
        self.at: dict[str, int] = {}
        # where in `args` which tensor's address goes; or those of several; or its tensor map
        self.pointers: list[tuple[int, int]] = []
        self.tuples: list[tuple[int, list[int | None]]] = []
        self.maps: list[tuple[int, int, Any, dict[int, Any]]] = []
        for name, arg in zip(names, [*call.args, *rest], strict=True):
            at = self.at[name] = len(self.args)
            if isinstance(arg, Tensor):
                self.pointers.append((at, index[id(arg)]))
                self.args.append(None)
            elif isinstance(arg, tuple):
                self.tuples.append((at, [None if t is None else index[id(t)] for t in arg]))
                self.args.append(None)
            elif hasattr(arg, "block_shape"):
                make = _map_maker(arg, compiled.metadata.tensordesc_meta[len(self.maps)])
                self.maps.append((at, index[id(arg.base)], make, {}))
                self.args += [None, *arg.shape, *arg.strides]
            else:
                self.args.append(arg)
        if self.maps:
            self.run = _map_launcher(compiled)

    def __call__(
        self, places: list[int], tensors: tuple[Tensor | None, ...], now: dict[str, int]
    ) -> None:
        args = self.args.copy()
        for at, i in self.pointers:
            args[at] = places[i]
        for at, indices in self.tuples:
            args[at] = tuple([None if i is None else places[i] for i in indices])
        for at, i, make, known in self.maps:
            found = known.get(places[i])
            if found is None:
                if len(known) >= MAPS:
                    known.clear()
                found = known[places[i]] = make(tensors[i])
            args[at] = found
        for name, value in now.items():
            args[self.at[name]] = value
        stream = driver.active.get_current_stream(tensors[0].device.index)  # type: ignore
        compiled = self.compiled
        self.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args
        )


def _map_maker(descriptor: Any, meta: Any) -> Callable[[Tensor], Any]:
    """What makes the tensor map of a tensor of the descriptor's layout.

    It is a matter of the layout and the address, whose memory it does not own.
    """
    from triton.backends.nvidia.driver import make_tensordesc_arg

    kind, fields = type(descriptor), {**vars(descriptor), "base": None}
    more = [None] * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)

    def make(tensor: Tensor) -> Any:
        return make_tensordesc_arg(kind(**{**fields, "base": tensor}), meta, *more)[0]

    return make


def _map_launcher(compiled: Any) -> Any:
    """`compiled.run`, but that it takes a descriptor as its map, its sizes and its strides."""
    kinds: list[Any] = []
    for kind in compiled.src.signature.values():
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            rank = kind[: kind.index("]")].count(",") + 1
            kinds += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank]
        else:
            kinds.append(kind)
    source = types.SimpleNamespace(signature=dict(enumerate(kinds)), constants={})
    return type(compiled.run)(source, compiled.metadata._replace(tensordesc_meta=None))
