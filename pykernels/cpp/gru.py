"""Launches csrc/ops/gru.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import Maybe, Pass, Result, _recurrent, at, make_pass, planned, these, without
from pykernels.cpp._recurrent import Backward, Forward, Kept

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def gru_fwd(*tensors: Any, keep: bool = True, packed: Maybe = None, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    found: Kept = gru_fwd_pass(*tensors, keep=keep, **options).run((*tensors, packed))
    return found


@planned
def gru_fwd_pass(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *_: Maybe,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool,
    skip: tuple[int, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract."""
    sizes = _recurrent.sizes(x, w_hh, 3, batch_sizes)
    T, B, _, H, _ = sizes
    gates = _recurrent.gates_of(x, H) if keep else None
    results = [*without(skip, Result((*x.shape[:-1], H)), Result((B, H))), gates]
    # the tensors, packed weights; y, h_n; gates
    memory = at(0, 1, 2, 3, 4, 5, None, 6), at(7, 8), *at(9)
    arguments = _recurrent.arguments((sizes, batch_sizes, reverse), memory)
    y = _recurrent.earlier_states(T, 7)
    returns = these(7, 8), these(0, 1, 2, 3, 4, 5, y, 9)
    return make_pass("gru_forward", x, 7, results, arguments, returns)


def gru_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.forward(gru_fwd_pass, calls, chained=chained, keep=keep)


def gru_extras(x: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract."""
    return (_recurrent.gates_of(x, w_hh.shape[1]).like(x),)


def gru_bwd(
    saved: tuple[Any, ...], grads: tuple[Maybe, ...], *, needs: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Maybe, ...] = gru_bwd_pass(*saved, needs=needs, **options).run((*saved, *grads))
    return found


@planned
def gru_bwd_pass(
    *saved: Any,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> Pass:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, *_ = saved
    sizes = _recurrent.sizes(x, w_hh, 3, batch_sizes)
    results = _recurrent.gradients(x, w_ih, w_hh, sizes, needs)
    # the tensors, y, gates, the gradients of y and h_n; the gradients of the tensors
    memory = at(0, 1, 2, 5, None, 6, 8, 9), at(10, 11, 12, 13, 14, 15, None), *at(7)
    arguments = _recurrent.arguments((sizes, batch_sizes, reverse), memory)
    return make_pass("gru_backward", x, 10, results, arguments, these(*range(10, 16)))


def gru_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.backward(gru_bwd_pass, calls, chained=chained)


def gru_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Tensor:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("gru", 3, w_ih, w_hh, b_ih, b_hh, None)


def gru_step(packed: Tensor, weights: tuple[Any, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("gru", packed, *weights)
