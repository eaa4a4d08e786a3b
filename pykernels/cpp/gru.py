"""Launches csrc/ops/gru.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import _recurrent, addresses
from pykernels.cpp._recurrent import Backward, Forward, Kept, Made, Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def gru_fwd(*tensors: Maybe, keep: bool = True, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    made = _forward(*tensors, keep=keep, **options)
    _recurrent.launch("gru_forward", made.results[0], [made], False)
    return made.results, made.saved


def gru_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    made = _recurrent.forward("gru", _forward, calls, chained=chained, keep=keep)
    return [(each.results, each.saved) for each in made]


def gru_extras(x: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract."""
    return (_recurrent.empty_gates(x, w_hh.shape[1]),)


def gru_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    **options: Any,
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    made = _backward(saved, grads, needs=needs, **options)
    _recurrent.launch("gru_backward", saved[0], [made], False)
    return tuple(made.results)


def gru_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    made = _recurrent.backward("gru", _backward, calls, chained=chained)
    return [tuple(each.results) for each in made]


def gru_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("gru", 3, w_ih, w_hh, b_ih, b_hh, None)


def gru_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("gru", packed, *weights)


def _forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool,
    packed: Packed | None = None,
) -> Made:
    sizes = _recurrent.sizes(x, w_hh, 3, batch_sizes)
    T, B, _, H, _ = sizes
    rows = (T, B) if batch_sizes is None else (len(x),)
    y, h_n = x.new_empty(*rows, H), x.new_empty(B, H)
    gates = gru_extras(x, w_ih, w_hh)[0] if keep else None
    values = None if packed is None else packed.values
    held, at = addresses((x, w_ih, w_hh, b_ih, b_hh, h0, None, values, y, h_n, gates))
    call = (sizes, batch_sizes or (), reverse, at[:8], at[8:10], at[10])
    return Made(call, (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y, gates), held)


def _backward(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> Made:
    x, w_ih, w_hh, _, _, h0, y, gates = saved
    sizes = _recurrent.sizes(x, w_hh, 3, batch_sizes)
    found = _recurrent.gradients(x, w_ih, w_hh, sizes, needs, one_bias=False)
    held, at = addresses((x, w_ih, w_hh, h0, None, y, *grads, *found, None, gates))
    call = (sizes, batch_sizes or (), reverse, at[:8], at[8:15], at[15])
    return Made(call, found, (), held)
