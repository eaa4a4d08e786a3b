"""The gated recurrent unit: a whole sequence (`gru`) or one step (`gru_cell`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pykernels import _checks
from pykernels.ops import _autograd, _calls, _recurrent
from pykernels.ops._packed import PackedWeights, check_packed


class GRUFunction(_autograd.Function):
    """Autograd over one backend's ``gru_fwd`` and ``gru_bwd``; differentiable twice."""


_recurrent.define("gru", extras="gates")


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    lengths: Any,
    batch_sizes: Any,
    reverse: bool,
) -> Any:
    x, w_ih, w_hh, b_ih, b_hh, h0 = tensors
    B, lengths, batch_sizes = _recurrent.check_input("gru", x, lengths, batch_sizes)
    weights = (w_ih, w_hh, b_ih, b_hh)
    H, _ = _recurrent.check_tensors("gru", 3, x, weights, (h0,), ("h0",))
    if h0 is not None:
        _checks.shape("gru", "h0", h0, "B, H", (B, H))
    _checks.flags("gru", reverse=reverse)
    options = {"reverse": reverse}
    return _recurrent.call("gru", GRUFunction, tensors, backend, options, lengths, batch_sizes)


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One layer of gated recurrent units over a whole sequence.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    The unit is that of K. Cho et al. ("Learning phrase representations using RNN encoder-decoder
    for statistical machine translation", 2014), in the variant and parametrisation of
    `torch.nn.GRU`: the reset gate applies after the product with :math:`W_{hn}`. The gates lie in
    the weights in the order r, z, n.

    Args:
        x: the input, [T, B, I], any floating dtype; with `batch_sizes` the rows [N, I] of a
            PackedSequence.
        w_ih: [3H, I].
        w_hh: [3H, H].
        b_ih, b_hh: [3H] each, or None.
        h0: the first state, [B, H]; zeros if None.
        lengths: how many steps of each sequence count, [B] integers from 1 to T in any order (a
            list, or an int64 tensor on the CPU); all if None. The steps after them may hold
            anything: y is zero there and x gets zero gradient. None is computed, but where
            torch.compile is given a tensor, whose numbers it does not see.
        batch_sizes: how many of the rows x each step has, T integers that sum to N and never
            grow; row b of every step is of sequence b, and B is the first of them.
        reverse: walk from the last step of each sequence to the first; y stays in the order of x.
        packed: a `PackedWeights` that keeps what a call without gradients packs of the weights.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``(y, h_n)``: all states, [T, B, H] or [N, H] as x, and the last one computed of each
        sequence, [B, H], in the dtype of x.

    Raises:
        TypeError: something is no tensor, or the dtypes differ or are not floating, or lengths or
            batch sizes are not integers, or `packed` is no PackedWeights, or a flag no bool.
        ValueError: a rank, size, length, device or backend is wrong; I or H is zero; both
            `lengths` and `batch_sizes` are given.
    """
    tensors = (x, w_ih, w_hh, b_ih, b_hh, h0)
    check_packed("gru", packed)
    call = _checked(tensors, backend, lengths, batch_sizes, reverse)
    y, h_n = call.outputs(tensors, packed=packed)
    return y, h_n


@_calls.once
def _checked_cell(tensors: tuple[Any, ...], backend: str | None) -> Any:
    options: dict[str, Any] = {}
    return _recurrent.cell_call("gru", GRUFunction, 3, tensors, ("hx",), backend, options)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One step of a gated recurrent unit, by the equations of `gru`.

    Args:
        input: [B, I] or [I], any floating dtype.
        hx: the state, [B, H] or [H] as the input; zeros if None.
        w_ih, w_hh, b_ih, b_hh, packed, backend: as in `gru`.

    Returns:
        The next state, of the shape of `hx`.

    Raises:
        TypeError, ValueError: as `gru`.
    """
    tensors = (input, w_ih, w_hh, b_ih, b_hh, hx)
    (h,) = _recurrent.step("gru_cell", _checked_cell, tensors, packed, backend)
    return h
