"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import _recurrent, addresses
from pykernels.cpp._recurrent import Backward, Forward, Kept, Made, Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def rnn_fwd(*tensors: Maybe, keep: bool = True, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    made = _forward(*tensors, keep=keep, **options)
    relu = options["nonlinearity"] == "relu"
    _recurrent.launch("rnn_forward", made.results[0], [made], relu, False)
    return made.results, made.saved


def rnn_group_fwd(calls: Sequence[Forward], *, chained: bool, keep: bool = True) -> list[Kept]:
    """See `pykernels._backends` for the contract."""
    relu = calls[0][1]["nonlinearity"] == "relu"
    made = _recurrent.forward("rnn", _forward, calls, relu, chained=chained, keep=keep)
    return [(each.results, each.saved) for each in made]


def rnn_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    **options: Any,
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    made = _backward(saved, grads, needs=needs, **options)
    relu = options["nonlinearity"] == "relu"
    _recurrent.launch("rnn_backward", saved[0], [made], relu, False)
    return _recurrent.with_second_bias(made.results, needs)


def rnn_group_bwd(calls: Sequence[Backward], *, chained: bool) -> list[tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    relu = calls[0][3]["nonlinearity"] == "relu"
    made = _recurrent.backward("rnn", _backward, calls, relu, chained=chained)
    return [
        _recurrent.with_second_bias(each.results, needs)
        for each, (_, _, needs, _) in zip(made, calls, strict=True)
    ]


def rnn_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("rnn", 1, w_ih, w_hh, b_ih, b_hh, None)


def rnn_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("rnn", packed, *weights)


def _forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool,
    packed: Packed | None = None,
) -> Made:
    sizes = _recurrent.sizes(x, w_hh, 1, batch_sizes)
    T, B, _, H, _ = sizes
    rows = (T, B) if batch_sizes is None else (len(x),)
    y, h_n = x.new_empty(*rows, H), x.new_empty(B, H)
    values = None if packed is None else packed.values
    held, at = addresses((x, w_ih, w_hh, b_ih, b_hh, h0, None, values, y, h_n))
    call = (sizes, batch_sizes or (), reverse, at[:8], at[8:])
    return Made(call, (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y), held)


def _backward(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> Made:
    x, w_ih, w_hh, _, _, h0, y = saved
    sizes = _recurrent.sizes(x, w_hh, 1, batch_sizes)
    found = _recurrent.gradients(x, w_ih, w_hh, sizes, needs, one_bias=True)
    held, at = addresses((x, w_ih, w_hh, h0, None, y, *grads, *found, None))
    return Made((sizes, batch_sizes or (), reverse, at[:8], at[8:]), found, (), held)
