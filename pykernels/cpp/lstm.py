"""Launches csrc/ops/lstm.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import cpp
from pykernels.cpp import _recurrent, addresses
from pykernels.cpp._recurrent import Backward, Forward, Kept, Made, Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged", "projection"})


def lstm_fwd(*tensors: Maybe, keep: bool = True, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    made = _forward(*tensors, keep=keep, **options)
    _recurrent.launch("lstm_forward", made.results[0], [made], False)
    return _outputs(made, keep), made.saved


def lstm_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    made = _recurrent.forward("lstm", _forward, calls, chained=chained, keep=keep)
    return [(_outputs(each, keep), each.saved) for each in made]


def _outputs(made: Made, keep: bool) -> tuple[Tensor, ...]:
    y, h_n, c_n, cells = made.results
    if cells is None:
        return y, h_n, c_n
    # what is saved for backward must not be what the caller may write to
    return y, h_n, c_n, cells.to(y.dtype, copy=keep)


def lstm_extras(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, *others: Maybe, **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    H, w_hr = w_hh.shape[0] // 4, others[-1]
    cells = x.new_empty(*x.shape[:-1], H, dtype=_recurrent.compute_dtype(x))
    unprojected = None if w_hr is None else torch.empty_like(cells)
    return _recurrent.empty_gates(x, H), cells, unprojected


def lstm_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    **options: Any,
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    made = _backward(saved, grads, needs=needs, **options)
    _recurrent.launch("lstm_backward", saved[0], [made], False)
    return _recurrent.with_second_bias(made.results, needs)


def lstm_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    made = _recurrent.backward("lstm", _backward, calls, chained=chained)
    return [
        _recurrent.with_second_bias(each.results, needs)
        for each, (_, _, needs, _) in zip(made, calls, strict=True)
    ]


def lstm_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe, w_hr: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("lstm", 4, w_ih, w_hh, b_ih, b_hh, w_hr)


def lstm_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    *others, w_hr = weights
    return _recurrent.step("lstm", packed, *others) if w_hr is None else None


def _forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    c0: Maybe,
    w_hr: Maybe,
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    return_cell_states: bool,
    keep: bool,
    packed: Packed | None = None,
) -> Made:
    """The last of its results are all cell states, where they are asked for."""
    sizes = _recurrent.sizes(x, w_hh, 4, batch_sizes)
    T, B, _, H, R = sizes
    rows = (T, B) if batch_sizes is None else (len(x),)
    y, h_n, c_n = x.new_empty(*rows, R), x.new_empty(B, R), x.new_empty(B, H)
    gates = cells = unprojected = None
    if keep:
        gates, cells, unprojected = lstm_extras(x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
    elif return_cell_states:
        cells = x.new_empty(*rows, H, dtype=_recurrent.compute_dtype(x))
    values = None if packed is None else packed.values
    inputs, kept = (x, w_ih, w_hh, b_ih, b_hh, h0, w_hr, values), (gates, cells, unprojected)
    held, at = addresses((*inputs, y, h_n, c0, c_n, *kept))
    call = (sizes, batch_sizes or (), reverse, at[:8], at[8:10], at[10:12], at[12:])
    saved = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, y, gates, cells, unprojected)
    return Made(call, (y, h_n, c_n, cells if return_cell_states else None), saved, held)


def _backward(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    return_cell_states: bool,
    needs: tuple[bool, ...],
) -> Made:
    x, w_ih, w_hh, _, _, h0, c0, w_hr, y, gates, cells, unprojected = saved
    dy, dh_n, dc_n, *rest = grads
    dcells = rest[0] if return_cell_states else None
    sizes = _recurrent.sizes(x, w_hh, 4, batch_sizes)
    _, B, _, H, _ = sizes
    found = _recurrent.gradients(x, w_ih, w_hh, sizes, needs[:6], one_bias=True)
    dc0 = x.new_empty(B, H) if needs[6] else None
    dw_hr = x.new_empty(*w_hr.shape) if needs[7] else None
    inputs, kept = (x, w_ih, w_hh, h0, w_hr, y, dy, dh_n), (gates, cells, unprojected)
    held, at = addresses((*inputs, *found, dw_hr, c0, dcells, dc_n, dc0, *kept))
    call = (sizes, batch_sizes or (), reverse, at[:8], at[8:15], at[15:19], at[19:])
    return Made(call, (*found, dc0, dw_hr), (), held)
