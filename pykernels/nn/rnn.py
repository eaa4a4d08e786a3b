"""`RNN` and `RNNCell` with the interface of torch.nn, over `functional.rnn` and `rnn_cell`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _checks, functional
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


class RNN(Layers, torch.nn.RNN):
    r"""`torch.nn.RNN` on fused kernels.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh, \mathrm{relu}

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.RNN`: layers,
    directions, dropout between layers, `batch_first`, unbatched input, PackedSequence.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        num_layers: how many layers; each takes the y of the one below.
        nonlinearity: "tanh" or "relu".
        bias: whether there are b_ih and b_hh.
        batch_first: x and y are [B, T, .] instead of [T, B, .]; hx and its like stay as they are.
        dropout: the probability, in training, of dropping a value between two layers.
        bidirectional: a second pass from the last step to the first; y holds both.
        device, dtype: of the parameters.

    Parameters, of each layer k and, with the suffix ``_reverse``, of its second direction:
        weight_ih_l[k]: W_ih, [H, I]; above the first layer [H, directions * H].
        weight_hh_l[k]: W_hh, [H, H].
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh, [H].

    Example::

        layer = pykernels.nn.RNN(10, 20, num_layers=2)
        y, h_n = layer(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]
    """

    _name, _op, _gates = "RNN", "rnn", 1

    @property
    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def _layer(
        self,
        x: Tensor,
        weights: Weights,
        states: States | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, States]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        h0 = None if states is None else states[0]
        y, h_n = functional.rnn(x, w_ih, w_hh, b_ih, b_hh, h0, **options)
        return y, (h_n,)


class RNNCell(Packing, torch.nn.RNNCell):
    r"""`torch.nn.RNNCell` on fused kernels: one step of `RNN`.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}), \quad f = \tanh \text{ or relu}

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.RNNCell`.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        bias: whether there are b_ih and b_hh.
        nonlinearity: f, "tanh" or "relu".
        device, dtype: of the parameters.

    Parameters:
        weight_ih, weight_hh: W_ih, [H, I], and W_hh, [H, H].
        bias_ih, bias_hh: b_ih and b_hh, [H].

    Example::

        cell = pykernels.nn.RNNCell(10, 20)
        h = cell(torch.randn(3, 10))  # [B, I] -> [B, H]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `torch.nn.RNNCell`.

        Raises:
            TypeError: a size is no integer.
            ValueError: a size is not positive, or there is no such nonlinearity.
        """
        check_sizes("RNNCell", input_size, hidden_size)
        _checks.choice("RNNCell", "nonlinearity", nonlinearity, ("tanh", "relu"))
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: x [B, I] or [I].
            hx: the state before, [B, H] or [H]; zeros by default.

        Returns:
            The state after, [B, H] or [H].

        Raises:
            TypeError, ValueError: as `functional.rnn_cell`.
        """
        after = packed_step(self, input, (hx,), relu=self.nonlinearity == "relu")
        if after is not None:
            return after[0]
        arguments = cell_arguments(self, "RNNCell", input, hx)
        return functional.rnn_cell(*arguments, nonlinearity=self.nonlinearity, packed=frozen(self))
