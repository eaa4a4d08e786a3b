"""What the launchers of rnn, gru and lstm share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import Maybe, Pass, Result, address, contiguous

Sizes = tuple[int, int, int, int, int]

#: Bytes of the widest block of units (csrc/core/recurrence.h).
_BLOCK = 128

#: The tensors and the options of a call.
Forward = tuple[tuple[Maybe, ...], dict[str, Any]]
#: What it saved, the gradients of its outputs, which tensors need theirs, the options.
Backward = tuple[tuple[Maybe, ...], tuple[Maybe, ...], tuple[bool, ...], dict[str, Any]]
#: Its outputs and what it saved.
Kept = tuple[tuple[Tensor, ...], tuple[Maybe, ...]]


def sizes(x: Tensor, w_hh: Tensor, gates: int, batch_sizes: tuple[int, ...] | None) -> Sizes:
    """T, B, I, H, R."""
    if batch_sizes is None:
        T, B, I = x.shape
    else:
        T, B, I = len(batch_sizes), batch_sizes[0], x.shape[1]
    rows, R = w_hh.shape
    return T, B, I, rows // gates, R


def arguments(
    shape: tuple[Sizes, tuple[int, ...] | None, bool], memory: tuple[Any, ...], *options: object
) -> tuple[object, ...]:
    """Those of a kernel for a single call.

    Args:
        shape: `sizes`, the batch sizes, whether time runs backwards.
        memory: holes for addresses.
        options: what the kernel takes once for calls that run side by side.
    """
    sizes, batch_sizes, reverse = shape
    return *options, False, [(sizes, batch_sizes or (), reverse, *memory)]


def side_by_side(
    calls: Sequence[Any],
    make: Callable[[Any, Any], tuple[Pass, tuple[Maybe, ...]]],
    chained: bool,
) -> list[Any]:
    """What the passes of several calls return, each on a thread.

    Args:
        calls: these.
        make: ``(call, before)`` -> its pass and its tensors; `before` is what the call before
            returns if they are `chained`, or else None.
        chained: whether each call takes some of that.
    """
    made: list[tuple[Any, Any, object]] = []
    for call in calls:
        one, tensors = make(call, made[-1][1] if chained and made else None)
        made.append(one.lay_out(tensors))
    *options, _, _ = made[0][0]
    kernel = getattr(_backends.load_extension(), one.plan.kernel)
    singles = [single for (*_, (single,)), _, _ in made]
    kernel(one.plan.code, torch.get_num_threads(), *options, chained, singles)
    return [returned for _, returned, _ in made]


def forward(
    make: Callable[..., Pass], calls: Sequence[Forward], *, chained: bool, keep: bool
) -> list[Kept]:
    """Runs calls side by side.

    Args:
        make: ``(*tensors, keep, **options)`` -> the pass of a call.
        calls: the tensors and options of each.
        chained: whether the input of each call is the y of the one before.
        keep: as the contract has it.
    """

    def one(call: Forward, before: Kept | None) -> tuple[Pass, tuple[Maybe, ...]]:
        (x, *rest), options = call
        tensors = (x if before is None else before[0][0], *rest)
        options = dict(options)
        packed = options.pop("packed", None)
        return make(*tensors, keep=keep, **options), (*tensors, packed)

    return side_by_side(calls, one, chained)


def backward(
    make: Callable[..., Pass], calls: Sequence[Backward], *, chained: bool
) -> list[tuple[Maybe, ...]]:
    """The backward passes of calls, side by side.

    As `forward`; `make` takes what a call saved, what is needed, and options. If `chained`, the
    gradient of each y is that of the input of the call before.
    """

    def one(call: Backward, before: tuple[Maybe, ...] | None) -> tuple[Pass, tuple[Maybe, ...]]:
        saved, (dy, *grads), needs, options = call
        given = (dy if before is None else before[0], *grads)
        return make(*saved, needs=needs, **options), (*saved, *given)

    return side_by_side(calls, one, chained)


def earlier_states(T: int, y: int) -> int | None:
    """`y`, the place of all states, as what backward reads: those before the last.

    Of one step it reads none, so that whoever steps a cell may write to the state that it gives.
    """
    return y if T > 1 else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on tensors stored as `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gates_of(x: Tensor, H: int) -> Result:
    """Room for four gates of each unit in every row of `x`, in blocks as the kernels lay them.

    It is enough for every build of the kernels, which differ in their blocks: a compiled graph has
    the size in it, and may be kept on disk for a process that loads another build.
    """
    dtype = compute_dtype(x)
    block = _BLOCK // dtype.itemsize
    return Result((*x.shape[:-1], 4 * -(-H // block) * block), dtype)


def pack(
    op: str, gates: int, w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe, w_hr: Maybe
) -> Tensor:
    """The weights of `op` as its forward passes read them."""
    extension = _backends.load_extension()
    H = len(w_hh) // gates
    sizes = (1, 1, w_ih.shape[1], H, w_hh.shape[1])
    dtype = cpp.DTYPES[w_hh.dtype]
    size = getattr(extension, f"{op}_packed_size")(dtype, sizes, w_hr is not None)
    packed = w_hh.new_empty(size, dtype=compute_dtype(w_hh))
    weights = [contiguous(t) for t in (w_ih, w_hh, b_ih, b_hh, w_hr)]
    inputs = [address(t) for t in weights]
    getattr(extension, f"{op}_pack")(dtype, torch.get_num_threads(), sizes, inputs, address(packed))
    return packed


def step(
    op: str, packed: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe
) -> Callable[..., Any] | None:
    """The step of a cell of `op`, from tensors to tensors without Python between (csrc/ops/step.h).

    None where torch does not tell C where its tensors are: before 2.10.
    """
    make = getattr(_backends.load_extension(), f"{op}_step")
    weights = (w_ih, w_hh, b_ih, b_hh)
    return make(
        Tensor, cpp.ALLOCATOR, weights, packed, cpp.DTYPES[w_hh.dtype], w_ih.shape[1], w_hh.shape[1]
    )


def gradients(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    sizes: Sizes,
    needs: Sequence[bool],
) -> list[Result | None]:
    """The gradients of x, w_ih, w_hh, b_ih, b_hh, h0."""
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_h0 = needs
    _, B, I, _, R = sizes
    rows = w_ih.shape[0]
    return [
        Result(tuple(x.shape)) if need_x else None,
        Result((rows, I)) if need_w_ih else None,
        Result((rows, R)) if need_w_hh else None,
        Result((rows,)) if need_b_ih else None,
        Result((rows,)) if need_b_hh else None,
        Result((B, R)) if need_h0 else None,
    ]
