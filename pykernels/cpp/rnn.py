"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import Maybe, Pass, Result, _recurrent, at, make_pass, planned, these, without
from pykernels.cpp._recurrent import Backward, Forward, Kept

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def rnn_fwd(*tensors: Any, keep: bool = True, packed: Maybe = None, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    found: Kept = rnn_fwd_pass(*tensors, keep=keep, **options).run((*tensors, packed))
    return found


@planned
def rnn_fwd_pass(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *_: Maybe,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool,
    skip: tuple[int, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract."""
    sizes = _recurrent.sizes(x, w_hh, 1, batch_sizes)
    _, B, _, H, _ = sizes
    results = without(skip, Result((*x.shape[:-1], H)), Result((B, H)))
    # the tensors, packed weights; y, h_n
    memory = at(0, 1, 2, 3, 4, 5, None, 6), at(7, 8)
    shape, relu = (sizes, batch_sizes, reverse), nonlinearity == "relu"
    arguments = _recurrent.arguments(shape, memory, relu)
    returns = these(7, 8), these(0, 1, 2, 3, 4, 5, 7)
    return make_pass("rnn_forward", x, 7, results, arguments, returns)


def rnn_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.forward(rnn_fwd_pass, calls, chained=chained, keep=keep)


def rnn_bwd(
    saved: tuple[Any, ...], grads: tuple[Maybe, ...], *, needs: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Maybe, ...] = rnn_bwd_pass(*saved, needs=needs, **options).run((*saved, *grads))
    return found


@planned
def rnn_bwd_pass(
    *saved: Any,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> Pass:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, *_ = saved
    sizes = _recurrent.sizes(x, w_hh, 1, batch_sizes)
    results = _recurrent.gradients(x, w_ih, w_hh, sizes, needs)
    # the tensors, y, the gradients of y and h_n; the gradients of the tensors
    memory = at(0, 1, 2, 5, None, 6, 7, 8), at(9, 10, 11, 12, 13, 14, None)
    shape, relu = (sizes, batch_sizes, reverse), nonlinearity == "relu"
    arguments = _recurrent.arguments(shape, memory, relu)
    return make_pass("rnn_backward", x, 9, results, arguments, these(*range(9, 15)))


def rnn_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.backward(rnn_bwd_pass, calls, chained=chained)


def rnn_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Tensor:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("rnn", 1, w_ih, w_hh, b_ih, b_hh, None)


def rnn_step(packed: Tensor, weights: tuple[Any, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("rnn", packed, *weights)
