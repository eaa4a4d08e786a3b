"""What the launchers of rnn, gru and lstm share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous

#: dtype code, threads, (T, B, I, H, R), batch sizes, whether time runs backwards
Call = tuple[int, int, tuple[int, int, int, int, int], Sequence[int], bool]

Maybe = Tensor | None


class Packed(NamedTuple):
    """What `pack` leaves."""

    values: Tensor
    H: int


def describe(
    x: Tensor, w_hh: Tensor, gates: int, batch_sizes: tuple[int, ...] | None, reverse: bool
) -> Call:
    """The arguments that every call into the extension starts with."""
    T, B = x.shape[:2] if batch_sizes is None else (len(batch_sizes), batch_sizes[0])
    rows, R = w_hh.shape
    sizes = (T, B, x.shape[-1], rows // gates, R)
    return cpp.DTYPES[x.dtype], torch.get_num_threads(), sizes, batch_sizes or (), reverse


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on tensors stored as `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_gates(x: Tensor, H: int) -> Tensor:
    """Room for four gates of each unit in every row of `x`, in the order of the kernels."""
    dtype = compute_dtype(x)
    row = _backends.load_extension().kept_row(cpp.DTYPES[dtype], 4, H)
    return x.new_empty(*x.shape[:-1], row, dtype=dtype)


def addresses(tensors: Sequence[Maybe]) -> tuple[list[Maybe], list[int]]:
    """Contiguous versions, which must outlive the call, and where they are."""
    dense = [contiguous(t) for t in tensors]
    return dense, [address(t) for t in dense]


def forward_addresses(*tensors: Maybe, packed: Packed | None) -> tuple[list[Maybe], list[int]]:
    """`addresses` of x, w_ih, w_hh, b_ih, b_hh, h0, w_hr and of what `pack` left, if anything."""
    return addresses((*tensors, None if packed is None else packed.values))


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
    _, B, _, _, R = sizes
    if one_bias:
        need_b_ih, need_b_hh = need_b_ih or need_b_hh, False
    return [
        x.new_empty(x.shape) if need_x else None,
        x.new_empty(w_ih.shape) if need_w_ih else None,
        x.new_empty(w_hh.shape) if need_w_hh else None,
        x.new_empty(len(w_ih)) if need_b_ih else None,
        x.new_empty(len(w_ih)) if need_b_hh else None,
        x.new_empty(B, R) if need_h0 else None,
    ]


def share_bias(grads: list[Maybe], needs: Sequence[bool]) -> None:
    """Gives the second bias the gradient of the first, where only one was computed."""
    if needs[4]:
        grads[4] = grads[3].clone() if needs[3] else grads[3]
