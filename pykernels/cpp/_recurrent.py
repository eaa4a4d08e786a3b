"""What the launchers of rnn, gru and lstm share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, addresses

#: (T, B, I, H, R), batch sizes, whether time runs backwards; the arguments of the op
Call = tuple[Any, ...]
Sizes = tuple[int, int, int, int, int]

Maybe = Tensor | None

#: The tensors and the options of a call.
Forward = tuple[tuple[Maybe, ...], dict[str, Any]]
#: What it saved, the gradients of its outputs, which tensors need theirs, the options.
Backward = tuple[tuple[Maybe, ...], tuple[Maybe, ...], tuple[bool, ...], dict[str, Any]]
#: Its outputs and what it saved.
Kept = tuple[tuple[Tensor, ...], tuple[Maybe, ...]]


class Packed(NamedTuple):
    """What `pack` leaves."""

    values: Tensor
    H: int


def sizes(x: Tensor, w_hh: Tensor, gates: int, batch_sizes: tuple[int, ...] | None) -> Sizes:
    """T, B, I, H, R."""
    if batch_sizes is None:
        T, B, I = x.shape
    else:
        T, B, I = len(batch_sizes), batch_sizes[0], x.shape[1]
    rows, R = w_hh.shape
    return T, B, I, rows // gates, R


class Made(NamedTuple):
    """A call with room for its results, ready to run."""

    call: Call
    results: Sequence[Maybe]  # outputs, or gradients
    saved: tuple[Maybe, ...]  # of the forward pass for the backward pass
    held: object  # must outlive the run


def forward(
    op: str,
    make: Callable[..., Made],
    calls: Sequence[Forward],
    *options: object,
    chained: bool,
    keep: bool,
) -> list[Made]:
    """Runs calls side by side.

    Args:
        op: the name of the op.
        make: makes one of the tensors and options of a call.
        calls: these.
        options: what the kernel of the op takes once for all calls.
        chained: whether the input of each call is the y of the one before.
        keep: as the contract has it.
    """
    made: list[Made] = []
    for (x, *tensors), own in calls:
        x = made[-1].results[0] if chained and made else x
        made.append(make(x, *tensors, keep=keep, **own))
    launch(f"{op}_forward", calls[0][0][0], made, *options, chained)
    return made


def backward(
    op: str, make: Callable[..., Made], calls: Sequence[Backward], *options: object, chained: bool
) -> list[Made]:
    """The backward passes of calls, side by side.

    As `forward`; `make` takes what a call saved, the gradients of its outputs, what is needed, and
    options. If `chained`, the gradient of each y is that of the input of the call before.
    """
    made: list[Made] = []
    for saved, (dy, *grads), needs, own in calls:
        dy = made[-1].results[0] if chained and made else dy
        made.append(make(saved, (dy, *grads), needs=needs, **own))
    launch(f"{op}_backward", calls[0][0][0], made, *options, chained)
    return made


def launch(name: str, x: Tensor, made: Sequence[Made], *options: object) -> None:
    """Runs what is made: several calls side by side, one on all threads."""
    run = getattr(_backends.load_extension(), name)
    run(cpp.DTYPES[x.dtype], torch.get_num_threads(), *options, [each.call for each in made])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on tensors stored as `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_gates(x: Tensor, H: int) -> Tensor:
    """Room for four gates of each unit in every row of `x`, in the order of the kernels."""
    dtype = compute_dtype(x)
    row = _backends.load_extension().kept_row(cpp.DTYPES[dtype], 4, H)
    return x.new_empty(*x.shape[:-1], row, dtype=dtype)


def pack(
    op: str, gates: int, w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe, w_hr: Maybe
) -> Packed:
    """The weights of `op` as its forward passes read them."""
    extension = _backends.load_extension()
    H = len(w_hh) // gates
    sizes = (1, 1, w_ih.shape[1], H, w_hh.shape[1])
    dtype = cpp.DTYPES[w_hh.dtype]
    size = getattr(extension, f"{op}_packed_size")(dtype, sizes, w_hr is not None)
    packed = w_hh.new_empty(size, dtype=compute_dtype(w_hh))
    _kept, inputs = addresses((w_ih, w_hh, b_ih, b_hh, w_hr))
    getattr(extension, f"{op}_pack")(dtype, torch.get_num_threads(), sizes, inputs, address(packed))
    return Packed(packed, H)


def step(
    op: str, packed: Packed, w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe
) -> Callable[..., Any] | None:
    """The step of a cell of `op`, from tensors to tensors without Python between (csrc/ops/step.h).

    None where torch does not tell C where its tensors are: before 2.10.
    """
    make = getattr(_backends.load_extension(), f"{op}_step")
    weights = (w_ih, w_hh, b_ih, b_hh)
    return make(Tensor, weights, packed.values, cpp.DTYPES[w_hh.dtype], w_ih.shape[1], packed.H)


def gradients(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    sizes: tuple[int, ...],
    needs: Sequence[bool],
    *,
    one_bias: bool,
) -> list[Maybe]:
    """Empty gradients of x, w_ih, w_hh, b_ih, b_hh, h0.

    With `one_bias` the two biases have the same gradient, and only the first is made.
    """
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_h0 = needs
    _, B, I, _, R = sizes
    if one_bias:
        need_b_ih, need_b_hh = need_b_ih or need_b_hh, False
    rows, empty = len(w_ih), x.new_empty  # of sizes one by one: it takes them in half the time
    return [
        empty(*x.shape) if need_x else None,
        empty(rows, I) if need_w_ih else None,
        empty(rows, R) if need_w_hh else None,
        empty(rows) if need_b_ih else None,
        empty(rows) if need_b_hh else None,
        empty(B, R) if need_h0 else None,
    ]


def with_second_bias(grads: Sequence[Maybe], needs: Sequence[bool]) -> tuple[Maybe, ...]:
    """The gradients with that of the second bias, where only one of the two was computed."""
    first = grads[3]
    second = None if not needs[4] else first.clone() if needs[3] else first
    return (*grads[:4], second, *grads[5:])
