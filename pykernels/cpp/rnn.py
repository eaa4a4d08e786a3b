"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import Maybe, Pass, Result, _recurrent, at, planned
from pykernels.cpp._recurrent import Backward, Forward, Kept, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def rnn_fwd(*tensors: Any, keep: bool = True, packed: Packed | None = None, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    return rnn_fwd_pass(*tensors, keep=keep, **options)(tensors, packed)


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
) -> Pass:
    """See `pykernels._backends` for the contract."""
    sizes = _recurrent.sizes(x, w_hh, 1, batch_sizes)
    _, B, _, H, _ = sizes
    results = [Result((*x.shape[:-1], H)), Result((B, H))]
    # the tensors, packed weights; y, h_n
    memory = at(0, 1, 2, 3, 4, 5, None, 6), at(7, 8)
    shape, relu = (sizes, batch_sizes, reverse), nonlinearity == "relu"
    plan = _recurrent.plan(7, results, shape, memory, relu)
    return Pass("rnn_forward", x, plan, _kept, _recurrent.with_packed)


def _kept(tensors: tuple[Any, ...], results: tuple[Any, ...]) -> Kept:
    return results, (*tensors[:6], results[0])


def rnn_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.forward(rnn_fwd_pass, calls, chained=chained, keep=keep)


def rnn_bwd(
    saved: tuple[Any, ...], grads: tuple[Maybe, ...], *, needs: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    return rnn_bwd_pass(*saved, needs=needs, **options)((*saved, *grads))


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
    plan = _recurrent.plan(9, results, shape, memory, relu)
    return Pass("rnn_backward", x, plan, lambda _, results: results)


def rnn_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.backward(rnn_bwd_pass, calls, chained=chained)


def rnn_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("rnn", 1, w_ih, w_hh, b_ih, b_hh, None)


def rnn_step(packed: Packed, weights: tuple[Any, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("rnn", packed, *weights)
