"""Launches csrc/ops/lstm.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import _recurrent, address
from pykernels.cpp._recurrent import Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged", "projection"})


def lstm_fwd(
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
    keep: bool = True,
    packed: Packed | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    call = _recurrent.describe(x, w_hh, 4, batch_sizes, reverse)
    _, B, _, H, R = call[2]
    rows, dtype = x.shape[:-1], _recurrent.compute_dtype(x)
    y, h_n, c_n = x.new_empty(*rows, R), x.new_empty(B, R), x.new_empty(B, H)
    gates = _recurrent.empty_gates(x, H) if keep else None
    cells = x.new_empty(*rows, H, dtype=dtype) if keep or return_cell_states else None
    unprojected = x.new_empty(*rows, H, dtype=dtype) if keep and w_hr is not None else None
    _kept, inputs = _recurrent.forward_addresses(x, w_ih, w_hh, b_ih, b_hh, h0, w_hr, packed=packed)
    first = cpp.contiguous(c0)
    _backends.load_extension().lstm_forward(
        *call,
        inputs,
        (address(y), address(h_n)),
        address(first),
        address(c_n),
        [address(t) for t in (gates, cells, unprojected)],
    )
    outputs = (y, h_n, c_n)
    if return_cell_states:
        # what is saved for backward must not be what the caller may write to
        outputs = (*outputs, cells.to(x.dtype, copy=keep))
    saved = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, y, gates, cells, unprojected)
    return outputs, saved


def lstm_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe, w_hr: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("lstm", 4, w_ih, w_hh, b_ih, b_hh, w_hr)


def lstm_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    *others, w_hr = weights
    return _recurrent.step("lstm", packed, *others) if w_hr is None else None


def lstm_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    return_cell_states: bool,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, _, _, h0, c0, w_hr, y, gates, cells, unprojected = saved
    dy, dh_n, dc_n, *rest = grads
    dcells = rest[0] if return_cell_states else None
    call = _recurrent.describe(x, w_hh, 4, batch_sizes, reverse)
    _, B, _, H, _ = call[2]
    found = _recurrent.gradients(x, w_ih, w_hh, call[2], needs[:6], one_bias=True)
    dc0 = x.new_empty(B, H) if needs[6] else None
    dw_hr = x.new_empty(w_hr.shape) if needs[7] else None
    _kept, inputs = _recurrent.addresses((x, w_ih, w_hh, h0, w_hr, y, dy, dh_n))
    _cells, cell_inputs = _recurrent.addresses((c0, dcells, dc_n))
    _backends.load_extension().lstm_backward(
        *call,
        inputs,
        [address(t) for t in (*found, dw_hr)],
        (*cell_inputs, address(dc0)),
        [address(t) for t in (gates, cells, unprojected)],
    )
    _recurrent.share_bias(found, needs)
    return (*found, dc0, dw_hr)
