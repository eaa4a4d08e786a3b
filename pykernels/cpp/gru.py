"""Launches csrc/ops/gru.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import Maybe, Pass, Result, _recurrent, at, planned
from pykernels.cpp._recurrent import Backward, Forward, Kept, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def gru_fwd(*tensors: Any, keep: bool = True, packed: Packed | None = None, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    return gru_fwd_pass(*tensors, keep=keep, **options)(tensors, packed)


@planned
def gru_fwd_pass(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *_: Maybe,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool,
) -> Pass:
    """See `pykernels._backends` for the contract."""
    sizes = _recurrent.sizes(x, w_hh, 3, batch_sizes)
    _, B, _, H, _ = sizes
    gates = _recurrent.gates_of(x, H) if keep else None
    results = [Result((*x.shape[:-1], H)), Result((B, H)), gates]
    # the tensors, packed weights; y, h_n; gates
    memory = at(0, 1, 2, 3, 4, 5, None, 6), at(7, 8), *at(9)
    plan = _recurrent.plan(7, results, (sizes, batch_sizes, reverse), memory)
    return Pass("gru_forward", x, plan, _kept, _recurrent.with_packed)


def _kept(tensors: tuple[Any, ...], results: tuple[Any, ...]) -> Kept:
    y, h_n, gates = results
    return (y, h_n), (*tensors[:6], y, gates)


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
    return gru_bwd_pass(*saved, needs=needs, **options)((*saved, *grads))


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
    plan = _recurrent.plan(10, results, (sizes, batch_sizes, reverse), memory)
    return Pass("gru_backward", x, plan, lambda _, results: results)


def gru_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.backward(gru_bwd_pass, calls, chained=chained)


def gru_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("gru", 3, w_ih, w_hh, b_ih, b_hh, None)


def gru_step(packed: Packed, weights: tuple[Any, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("gru", packed, *weights)
