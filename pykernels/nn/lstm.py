"""`LSTM` and `LSTMCell` with the interface of torch.nn, over `functional.lstm` and `lstm_cell`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, _checks, functional
from pykernels.nn._recurrent import (
    Layers,
    Packing,
    States,
    Weights,
    cell_arguments,
    check_sizes,
    frozen,
    packed_step,
)


class LSTM(Layers, torch.nn.LSTM):
    r"""`torch.nn.LSTM` on fused kernels; the sources stand at `functional.lstm`.

    .. math::
        (i, f, g, o) = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}, \quad
        c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.LSTM`: layers,
    directions, dropout between layers, `batch_first`, projections (`proj_size`), unbatched input,
    PackedSequence.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state and the cell state.
        num_layers: how many layers; each takes the y of the one below.
        bias: whether there are b_ih and b_hh.
        batch_first: x and y are [B, T, .] instead of [T, B, .]; hx and its like stay as they are.
        dropout: the probability, in training, of dropping a value between two layers.
        bidirectional: a second pass from the last step to the first; y holds both.
        proj_size: R, the size that h is projected to (W_hr h, y and h_n have R columns); 0, none.
        device, dtype: of the parameters.

    Parameters, of each layer k and, with the suffix ``_reverse``, of its second direction:
        weight_ih_l[k]: W_ih, [4H, I]; above the first layer [4H, directions * R or H].
        weight_hh_l[k]: W_hh, [4H, R or H].
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh, [4H].
        weight_hr_l[k]: W_hr, [R, H], with `proj_size` alone.

    Example::

        layer = pykernels.nn.LSTM(10, 20, num_layers=2)
        y, (h_n, c_n) = layer(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]
    """

    _name, _op, _gates = "LSTM", "lstm", 4
    _composed = (False, True)

    def _named(self, hx: Any) -> list[tuple[str, str, int, Any]]:
        _checks.pair("LSTM", "hx", hx, "(h_0, c_0)")
        letter, width = ("R", self.proj_size) if self.proj_size else ("H", self.hidden_size)
        return [("hx[0]", letter, width, hx[0]), ("hx[1]", "H", self.hidden_size, hx[1])]

    def _returned(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        h_n, c_n = states
        return h_n, c_n

    def _layer(
        self,
        x: Tensor,
        weights: Weights,
        states: States | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, States]:
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        h0, c0 = (None, None) if states is None else states
        y, after = functional.lstm(x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr=w_hr, **options)
        return y, after


class LSTMCell(Packing, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on fused kernels: one step of `LSTM`, by its equations.

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.LSTMCell`.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.

    Parameters:
        weight_ih, weight_hh: W_ih, [4H, I], and W_hh, [4H, H].
        bias_ih, bias_hh: b_ih and b_hh, [4H].

    Example::

        cell = pykernels.nn.LSTMCell(10, 20)
        h, c = cell(torch.randn(3, 10))  # [B, I] -> [B, H], [B, H]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `torch.nn.LSTMCell`.

        Raises:
            TypeError: a size is no integer.
            ValueError: a size is not positive.
        """
        check_sizes("LSTMCell", input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            input: x [B, I] or [I].
            hx: the state and the cell state before, (h, c), each [B, H] or [H]; zeros by default.

        Returns:
            ``(h, c)`` after the step, each [B, H] or [H].

        Raises:
            TypeError, ValueError: as `functional.lstm_cell`.
        """
        if hx is None or type(hx) is tuple:
            after = packed_step(self, input, hx or (None, None))
            if after is not None:
                h, c = after
                return h, c
        if hx is not None:
            _checks.pair("LSTMCell", "hx", hx, "(h, c)")
        x, h, c, *weights = cell_arguments(self, "LSTMCell", input, *(hx or (None, None)))
        h, c = functional.lstm_cell(
            x, None if hx is None else (h, c), *weights, packed=frozen(self)
        )
        h, c = _autocast.carried(input if hx is None else hx[1], h, c)
        return h, c
