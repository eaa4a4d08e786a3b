"""Long short-term memory: a whole sequence (`lstm`) or one step (`lstm_cell`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from pykernels import _checks
from pykernels.ops import _autograd, _calls, _recurrent
from pykernels.ops._packed import PackedWeights, check_packed


class LSTMFunction(_autograd.Function):
    """Autograd over one backend's ``lstm_fwd`` and ``lstm_bwd``; differentiable twice."""


_recurrent.define("lstm", options="bool return_cell_states", extras="gates cells unprojected")


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    lengths: Any,
    batch_sizes: Any,
    reverse: bool,
    return_cell_states: bool,
) -> Any:
    x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr = tensors
    B, lengths, batch_sizes = _recurrent.check_input("lstm", x, lengths, batch_sizes)
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    H, R = _recurrent.check_tensors("lstm", 4, x, weights, (h0, c0), ("h0", "c0"))
    if h0 is not None:
        _checks.shape("lstm", "h0", h0, "B, H" if w_hr is None else "B, R", (B, R))
    if c0 is not None:
        _checks.shape("lstm", "c0", c0, "B, H", (B, H))
    _checks.flags("lstm", reverse=reverse, return_cell_states=return_cell_states)
    options = {"reverse": reverse, "return_cell_states": return_cell_states}
    return _recurrent.call("lstm", LSTMFunction, tensors, backend, options, lengths, batch_sizes)


@overload
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    return_cell_states: Literal[False] = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
@overload
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    return_cell_states: Literal[True],
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...
@overload
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    return_cell_states: bool,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Any:
    r"""One layer of long short-term memory over a whole sequence.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \quad \text{or } W_{hr} (o_t \odot \tanh(c_t))
        \text{ with a projection}

    The memory is that of S. Hochreiter and J. Schmidhuber ("Long short-term memory", 1997), with
    forget gates and no peepholes, in the parametrisation of `torch.nn.LSTM`; the projection is that
    of H. Sak, A. Senior and F. Beaufays ("Long short-term memory recurrent neural network
    architectures for large scale acoustic modeling", 2014). The gates lie in the weights in the
    order i, f, g, o. R is H, or the size that `w_hr` projects to.

    Args:
        x: the input, [T, B, I], any floating dtype; with `batch_sizes` the rows [N, I] of a
            PackedSequence.
        w_ih: [4H, I].
        w_hh: [4H, R].
        b_ih, b_hh: [4H] each, or None.
        h0: the first state, [B, R]; zeros if None.
        c0: the first cell state, [B, H]; zeros if None.
        w_hr: the projection, [R, H], or None.
        lengths: how many steps of each sequence count, [B] integers from 1 to T in any order (a
            list, or an int64 tensor on the CPU); all if None. The steps after them may hold
            anything: y and c are zero there and x gets zero gradient. None is computed, but where
            torch.compile is given a tensor, whose numbers it does not see.
        batch_sizes: how many of the rows x each step has, T integers that sum to N and never
            grow; row b of every step is of sequence b, and B is the first of them.
        reverse: walk from the last step of each sequence to the first; y stays in the order of x.
        return_cell_states: return the cell states of all steps too.
        packed: a `PackedWeights` that keeps what a call without gradients packs of the weights.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``(y, (h_n, c_n))``: all states, [T, B, R] or [N, R] as x, and the last ones computed of
        each sequence, [B, R] and [B, H], in the dtype of x. With `return_cell_states`
        ``(y, (h_n, c_n), c)``, c of [T, B, H] or [N, H].

    Raises:
        TypeError: something is no tensor, or the dtypes differ or are not floating, or lengths or
            batch sizes are not integers, or `packed` is no PackedWeights, or a flag no bool.
        ValueError: a rank, size, length, device or backend is wrong; I, H or R is zero; both
            `lengths` and `batch_sizes` are given.
    """
    tensors = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
    check_packed("lstm", packed)
    call = _checked(tensors, backend, lengths, batch_sizes, reverse, return_cell_states)
    if return_cell_states:
        y, h_n, c_n, c = call.outputs(tensors, packed=packed)
        return y, (h_n, c_n), c
    y, h_n, c_n = call.outputs(tensors, packed=packed)
    return y, (h_n, c_n)


@_calls.once
def _checked_cell(tensors: tuple[Any, ...], backend: str | None) -> Any:
    options = {"return_cell_states": False}
    return _recurrent.cell_call(
        "lstm", LSTMFunction, 4, tensors, ("hx[0]", "hx[1]"), backend, options
    )


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of long short-term memory, by the equations of `lstm`.

    Args:
        input: [B, I] or [I], any floating dtype.
        hx: the state and the cell state, a pair of [B, H] or [H] as the input; zeros if None.
        w_ih, w_hh, b_ih, b_hh, packed, backend: as in `lstm`.

    Returns:
        ``(h, c)`` after the step, of the shapes of `hx`.

    Raises:
        TypeError, ValueError: as `lstm`; also where `hx` is no pair.
    """
    if hx is not None:
        _checks.pair("lstm_cell", "hx", hx, "(h, c)")
    tensors = (input, w_ih, w_hh, b_ih, b_hh, *(hx or (None, None)))
    h, c = _recurrent.step("lstm_cell", _checked_cell, tensors, packed, backend)
    return h, c
