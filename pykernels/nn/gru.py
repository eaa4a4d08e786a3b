"""`GRU` and `GRUCell` with the interface of torch.nn, over `functional.gru` and `gru_cell`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, functional
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


class GRU(Layers, torch.nn.GRU):
    r"""`torch.nn.GRU` on fused kernels; the sources stand at `functional.gru`.

    .. math::
        r = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}), \quad
        z = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}), \\
        n = \tanh(W_{in} x_t + b_{in} + r (W_{hn} h_{t-1} + b_{hn})), \quad
        h_t = (1 - z) n + z h_{t-1}

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.GRU`: layers,
    directions, dropout between layers, `batch_first`, unbatched input, PackedSequence.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        num_layers: how many layers; each takes the y of the one below.
        bias: whether there are b_ih and b_hh.
        batch_first: x and y are [B, T, .] instead of [T, B, .]; hx and its like stay as they are.
        dropout: the probability, in training, of dropping a value between two layers.
        bidirectional: a second pass from the last step to the first; y holds both.
        device, dtype: of the parameters.

    Parameters, of each layer k and, with the suffix ``_reverse``, of its second direction:
        weight_ih_l[k]: W_ih, [3H, I]; above the first layer [3H, directions * H].
        weight_hh_l[k]: W_hh, [3H, H].
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh, [3H].

    Example::

        layer = pykernels.nn.GRU(10, 20, num_layers=2)
        y, h_n = layer(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]
    """

    _name, _op, _gates = "GRU", "gru", 3
    _composed = (True, True)

    def _layer(
        self,
        x: Tensor,
        weights: Weights,
        states: States | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, States]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        h0 = None if states is None else states[0]
        y, h_n = functional.gru(x, w_ih, w_hh, b_ih, b_hh, h0, **options)
        return y, (h_n,)


class GRUCell(Packing, torch.nn.GRUCell):
    """`torch.nn.GRUCell` on fused kernels: one step of `GRU`, by its equations.

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.GRUCell`.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.

    Parameters:
        weight_ih, weight_hh: W_ih, [3H, I], and W_hh, [3H, H].
        bias_ih, bias_hh: b_ih and b_hh, [3H].

    Example::

        cell = pykernels.nn.GRUCell(10, 20)
        h = cell(torch.randn(3, 10))  # [B, I] -> [B, H]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `torch.nn.GRUCell`.

        Raises:
            TypeError: a size is no integer.
            ValueError: a size is not positive.
        """
        check_sizes("GRUCell", input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: x [B, I] or [I].
            hx: the state before, [B, H] or [H]; zeros by default.

        Returns:
            The state after, [B, H] or [H].

        Raises:
            TypeError, ValueError: as `functional.gru_cell`.
        """
        after = packed_step(self, input, (hx,))
        if after is not None:
            return after[0]
        h = functional.gru_cell(*cell_arguments(self, "GRUCell", input, hx), packed=frozen(self))
        return _autocast.carried(input if hx is None else hx, h)[0]
