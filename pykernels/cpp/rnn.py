"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pykernels import cpp
from pykernels.cpp import _recurrent, address
from pykernels.cpp._recurrent import Backward, Forward, Kept, Made, Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def rnn_fwd(*tensors: Maybe, keep: bool = True, **options: Any) -> Kept:
    """See `pykernels._backends` for the contract."""
    return rnn_group_fwd([(tensors, options)], chained=False, keep=keep)[0]


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
    return rnn_group_bwd([(saved, grads, needs, options)], chained=False)[0]


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
    _, B, _, H, _ = sizes
    y, h_n = x.new_empty(*x.shape[:-1], H), x.new_empty(B, H)
    held, inputs = _recurrent.forward_addresses(x, w_ih, w_hh, b_ih, b_hh, h0, None, packed=packed)
    call = (sizes, batch_sizes or (), reverse, inputs, (address(y), address(h_n)))
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
    held, inputs = _recurrent.addresses((x, w_ih, w_hh, h0, None, y, *grads))
    outputs = [*map(address, found), 0]
    return Made((sizes, batch_sizes or (), reverse, inputs, outputs), found, (), held)
