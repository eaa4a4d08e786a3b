"""Launches csrc/ops/lstm.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import Maybe, Pass, Result, _recurrent, at, make_pass, planned, these, without
from pykernels.cpp._recurrent import Backward, Forward, Kept

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged", "projection"})


def lstm_fwd(*tensors: Any, keep: bool = True, packed: Maybe = None, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    found: Kept = lstm_fwd_pass(*tensors, keep=keep, **options).run((*tensors, packed))
    return found


@planned
def lstm_fwd_pass(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    c0: Maybe,
    w_hr: Maybe,
    *_: Maybe,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    return_cell_states: bool,
    keep: bool,
    skip: tuple[int, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract."""
    sizes = _recurrent.sizes(x, w_hh, 4, batch_sizes)
    T, B, _, H, R = sizes
    gates, cells, unprojected = _extras(x, w_hh, w_hr)
    if not keep:
        gates, unprojected = None, None
        cells = cells if return_cell_states else None
    results = without(skip, Result((*x.shape[:-1], R)), Result((B, R)), Result((B, H)))
    results += [gates, cells, unprojected]
    # the tensors, packed weights; y, h_n; c0, c_n; gates, cells, unprojected
    memory = at(0, 1, 2, 3, 4, 5, 7, 8), at(9, 10), at(6, 11), at(12, 13, 14)
    arguments = _recurrent.arguments((sizes, batch_sizes, reverse), memory)
    outputs = (9, 10, 11, 13) if return_cell_states else (9, 10, 11)
    y = _recurrent.earlier_states(T, 9)
    saved = (0, 1, 2, 3, 4, 5, 6, 7, y, 12, 13, 14)
    returns = these(*outputs), these(*saved)
    made = make_pass("lstm_forward", x, 9, results, arguments, returns)
    if not return_cell_states:
        return made

    def run(tensors: tuple[Any, ...]) -> Kept:
        (y, *last, cells), saved = made.run(tensors)
        # what is saved for backward must not be what the caller may write to
        return (y, *last, cells.to(y.dtype, copy=keep)), saved

    return made._replace(run=run)


def _extras(x: Tensor, w_hh: Tensor, w_hr: Maybe) -> tuple[Result, Result, Result | None]:
    """Gates, cells and what is before the projection of every row."""
    H = w_hh.shape[0] // 4
    cells = Result((*x.shape[:-1], H), _recurrent.compute_dtype(x))
    return _recurrent.gates_of(x, H), cells, None if w_hr is None else cells


def lstm_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.forward(lstm_fwd_pass, calls, chained=chained, keep=keep)


def lstm_extras(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, *others: Maybe, **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    return tuple(None if r is None else r.like(x) for r in _extras(x, w_hh, others[-1]))


def lstm_bwd(
    saved: tuple[Any, ...], grads: tuple[Maybe, ...], *, needs: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Maybe, ...] = lstm_bwd_pass(*saved, needs=needs, **options).run((*saved, *grads))
    return found


@planned
def lstm_bwd_pass(
    *saved: Any,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    return_cell_states: bool,
    needs: tuple[bool, ...],
) -> Pass:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, *_ = saved
    w_hr = saved[7]
    sizes = _recurrent.sizes(x, w_hh, 4, batch_sizes)
    _, B, _, H, _ = sizes
    results = _recurrent.gradients(x, w_ih, w_hh, sizes, needs[:6])
    results.append(Result((B, H)) if needs[6] else None)
    results.append(Result(tuple(w_hr.shape)) if needs[7] else None)
    # the tensors, y, gates, cells, unprojected; the gradients of y, h_n, c_n and the cells if they
    # were returned; those of the tensors
    dcells, first = (15, 16) if return_cell_states else (None, 15)
    dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dw_hr = range(first, first + 8)
    memory = (
        at(0, 1, 2, 5, 7, 8, 12, 13),
        at(dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dw_hr),
        at(6, dcells, 14, dc0),
        at(9, 10, 11),
    )
    arguments = _recurrent.arguments((sizes, batch_sizes, reverse), memory)
    returns = these(*range(first, first + 8))
    return make_pass("lstm_backward", x, first, results, arguments, returns)


def lstm_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    return _recurrent.backward(lstm_bwd_pass, calls, chained=chained)


def lstm_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe, w_hr: Maybe) -> Tensor:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("lstm", 4, w_ih, w_hh, b_ih, b_hh, w_hr)


def lstm_step(packed: Tensor, weights: tuple[Any, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    *others, w_hr = weights
    return _recurrent.step("lstm", packed, *others) if w_hr is None else None
