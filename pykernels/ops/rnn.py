"""The Elman recurrence: a whole sequence (`rnn`) or one step (`rnn_cell`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pykernels import _checks
from pykernels.ops import _autograd, _calls, _recurrent
from pykernels.ops._packed import PackedWeights, check_packed

NONLINEARITIES = ("tanh", "relu")


class RNNFunction(_autograd.Function):
    """Autograd over one backend's ``rnn_fwd`` and ``rnn_bwd``; differentiable twice."""


_recurrent.define("rnn", options="str nonlinearity")


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    nonlinearity: str,
    lengths: Any,
    batch_sizes: Any,
    reverse: bool,
) -> Any:
    x, w_ih, w_hh, b_ih, b_hh, h0 = tensors
    B, lengths, batch_sizes = _recurrent.check_input("rnn", x, lengths, batch_sizes)
    _checks.choice("rnn", "nonlinearity", nonlinearity, NONLINEARITIES)
    weights = (w_ih, w_hh, b_ih, b_hh)
    H, _ = _recurrent.check_tensors("rnn", 1, x, weights, (h0,), ("h0",))
    if h0 is not None:
        _checks.shape("rnn", "h0", h0, "B, H", (B, H))
    _checks.flags("rnn", reverse=reverse)
    options = {"nonlinearity": nonlinearity, "reverse": reverse}
    return _recurrent.call("rnn", RNNFunction, tensors, backend, options, lengths, batch_sizes)


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One layer of the Elman recurrence over a whole sequence.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh, \mathrm{relu}

    The parametrisation is that of `torch.nn.RNN`; the recurrence is J. L. Elman's ("Finding
    structure in time", 1990). Only the states are kept for the backward pass, and with
    `lengths` the rows of x that count.

    Args:
        x: the input, [T, B, I], any floating dtype; with `batch_sizes` the rows [N, I] of a
            PackedSequence.
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H] each, or None.
        h0: the first state, [B, H]; zeros if None.
        nonlinearity: "tanh" or "relu".
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
        ValueError: a rank, size, length, device, nonlinearity or backend is wrong; I or H is zero;
            both `lengths` and `batch_sizes` are given.
    """
    tensors = (x, w_ih, w_hh, b_ih, b_hh, h0)
    check_packed("rnn", packed)
    call = _checked(tensors, backend, nonlinearity, lengths, batch_sizes, reverse)
    y, h_n = call.outputs(tensors, packed=packed)
    return y, h_n


@_calls.once
def _checked_cell(tensors: tuple[Any, ...], backend: str | None, nonlinearity: str) -> Any:
    options = {"nonlinearity": nonlinearity}
    return _recurrent.cell_call("rnn", RNNFunction, 1, tensors, ("hx",), backend, options)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One step of the Elman recurrence of `rnn`.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input: [B, I] or [I], any floating dtype.
        hx: the state, [B, H] or [H] as the input; zeros if None.
        w_ih, w_hh, b_ih, b_hh, nonlinearity, packed, backend: as in `rnn`.

    Returns:
        The next state, of the shape of `hx`.

    Raises:
        TypeError, ValueError: as `rnn`.
    """
    _checks.choice("rnn_cell", "nonlinearity", nonlinearity, NONLINEARITIES)
    tensors = (input, w_ih, w_hh, b_ih, b_hh, hx)
    (h,) = _recurrent.step("rnn_cell", _checked_cell, tensors, packed, backend, nonlinearity)
    return h
