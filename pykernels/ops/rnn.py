"""The Elman recurrence: a whole sequence (`rnn`) or one step (`rnn_cell`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, _checks
from pykernels.ops import _autograd

NONLINEARITIES = ("tanh", "relu")


class RNNFunction(torch.autograd.Function):
    """Autograd over one backend's ``rnn_fwd`` and ``rnn_bwd``; differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, options: dict[str, Any], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _autograd.forward(ctx, "rnn", backend, options, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _autograd.backward(ctx, "rnn", grads)


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One layer of the Elman recurrence over a whole sequence.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh, \mathrm{relu}

    The parametrisation is that of `torch.nn.RNN`; the recurrence is J. L. Elman's ("Finding
    structure in time", 1990). Only the states are kept for the backward pass.

    Args:
        x: the input, [T, B, I], any floating dtype.
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H] each, or None.
        h0: the first state, [B, H]; zeros if None.
        nonlinearity: "tanh" or "relu".
        reverse: walk from the last step to the first; y stays in the order of x.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``(y, h_n)``: all states, [T, B, H], and the last one computed, [B, H], in the dtype of x.

    Raises:
        TypeError: something is no tensor, or the dtypes differ or are not floating.
        ValueError: a rank, size, device, nonlinearity or backend is wrong; I or H is zero.
    """
    _checks.tensor("rnn", "x", x)
    _checks.floating("rnn", "x", x)
    _checks.rank("rnn", "x", x, "T, B, I")
    _checks.choice("rnn", "nonlinearity", nonlinearity, NONLINEARITIES)
    _check_weights("rnn", x, x.shape[2], w_ih, w_hh, b_ih, b_hh)
    if h0 is not None:
        _checks.tensor("rnn", "h0", h0, x)
        _checks.shape("rnn", "h0", h0, "B, H", (x.shape[1], w_hh.shape[0]))
    chosen = _backends.select("rnn", backend, x.device, x.dtype)
    options = {"nonlinearity": nonlinearity, "reverse": bool(reverse)}
    return _run(chosen, options, x, w_ih, w_hh, b_ih, b_hh, h0)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    r"""One step of the Elman recurrence.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input: [B, I] or [I], any floating dtype.
        hx: the state, [B, H] or [H] as the input; zeros if None.
        w_ih, w_hh, b_ih, b_hh, nonlinearity, backend: as in `rnn`.

    Returns:
        The next state, of the shape of `hx`.

    Raises:
        TypeError, ValueError: as `rnn`.
    """
    _checks.tensor("rnn_cell", "input", input)
    _checks.floating("rnn_cell", "input", input)
    _checks.rank("rnn_cell", "input", input, "B, I", "I")
    _checks.choice("rnn_cell", "nonlinearity", nonlinearity, NONLINEARITIES)
    _check_weights("rnn_cell", input, input.shape[-1], w_ih, w_hh, b_ih, b_hh)
    batched = input.dim() == 2
    if hx is not None:
        _checks.tensor("rnn_cell", "hx", hx, input)
        axes, sizes = ("B, H", (len(input), len(w_hh))) if batched else ("H", (len(w_hh),))
        _checks.shape("rnn_cell", "hx", hx, axes, sizes)
        hx = hx if batched else hx[None]
    x = input[None] if batched else input[None, None]
    chosen = _backends.select("rnn", backend, x.device, x.dtype)
    options = {"nonlinearity": nonlinearity, "reverse": False}
    y, _ = _run(chosen, options, x, w_ih, w_hh, b_ih, b_hh, hx)
    return y[0] if batched else y[0, 0]


def _check_weights(
    op: str,
    x: Tensor,
    I: int,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    _checks.tensor(op, "w_hh", w_hh, x)
    _checks.rank(op, "w_hh", w_hh, "H, H")
    H = w_hh.shape[0]
    _checks.positive(op, "input size", I)
    _checks.positive(op, "hidden size", H)
    _checks.shape(op, "w_hh", w_hh, "H, H", (H, H))
    _checks.tensor(op, "w_ih", w_ih, x)
    _checks.shape(op, "w_ih", w_ih, "H, I", (H, I))
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _checks.tensor(op, name, bias, x)
            _checks.shape(op, name, bias, "H", (H,))


def _run(
    backend: ModuleType, options: dict[str, Any], *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _autograd.wanted(tensors):
        return RNNFunction.apply(backend, options, *tensors)
    return _autograd.run(backend, "rnn", options, tensors)[0]
