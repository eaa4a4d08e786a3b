"""`RNN` and `RNNCell` with the interface of torch.nn, over `functional.rnn` and `rnn_cell`."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels import _autocast, _checks, functional


class RNN(torch.nn.RNN):
    r"""`torch.nn.RNN` on fused kernels.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh, \mathrm{relu}

    Constructor, parameters and state_dict are those of `torch.nn.RNN`: layers, directions, dropout
    between layers, `batch_first`, unbatched input. Two things differ. A `PackedSequence` is a
    TypeError. An empty sequence (T = 0), which torch refuses, returns `hx` as `h_n`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            input: x [T, B, I], or [B, T, I] with `batch_first`, or [T, I].
            hx: the first state of every layer and direction, [layers * directions, B, H], or
                [layers * directions, H] for an unbatched input; zeros by default. Layer 0 forward
                comes first, then layer 0 backward, then layer 1.

        Returns:
            y [T, B, directions * H] in the layout of `input`, and h_n of the shape of `hx`.
        """
        directions = 2 if self.bidirectional else 1
        _checks.not_packed("RNN", "input", input)
        _checks.tensor("RNN", "input", input)
        axes = "B, T, I" if self.batch_first else "T, B, I"
        _checks.rank("RNN", "input", input, axes, "T, I")
        batched = input.dim() == 3
        sizes = (*input.shape[:-1], self.input_size)
        _checks.shape("RNN", "input", input, axes if batched else "T, I", sizes)
        if hx is not None:
            _checks.tensor("RNN", "hx", hx)
        input, hx = _autocast.cast(input, hx)
        x = input[:, None] if not batched else input.transpose(0, 1) if self.batch_first else input

        if hx is not None:
            _checks.tensor("RNN", "hx", hx, input)
            count, B, H = self.num_layers * directions, x.shape[1], self.hidden_size
            axes, sizes = "layers * directions, H", (count, H)
            if batched:
                axes, sizes = "layers * directions, B, H", (count, B, H)
            _checks.shape("RNN", "hx", hx, axes, sizes)
            hx = hx if batched else hx[:, None]

        states = []
        for layer in range(self.num_layers):
            if layer:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            sides = []
            for reverse in range(directions):
                y, h_n = functional.rnn(
                    x,
                    *_autocast.cast(*self._weights(layer, reverse)),
                    h0=None if hx is None else hx[len(states)],
                    nonlinearity=self.nonlinearity,
                    reverse=bool(reverse),
                )
                sides.append(y)
                states.append(h_n)
            x = sides[0] if directions == 1 else torch.cat(sides, -1)
        h_n = torch.stack(states)
        if not batched:
            return x[:, 0], h_n[:, 0]
        return (x.transpose(0, 1) if self.batch_first else x), h_n

    def _weights(self, layer: int, reverse: int) -> list[Tensor | None]:
        """w_ih [H, I], w_hh [H, H], b_ih and b_hh [H] of one layer and direction, by their names.

        Not from torch's flat list: a parametrised weight is computed when its name is read.
        """
        suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self, name + suffix, None) for name in names]


class RNNCell(torch.nn.RNNCell):
    r"""`torch.nn.RNNCell` on fused kernels: one step of `RNN`.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}), \quad f = \tanh \text{ or relu}
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: x [B, I] or [I].
            hx: the state before, [B, H] or [H]; zeros by default.

        Returns:
            The state after, [B, H] or [H].
        """
        _checks.tensor("RNNCell", "input", input)
        _checks.rank("RNNCell", "input", input, "B, I", "I")
        axes = "B, I" if input.dim() == 2 else "I"
        _checks.shape("RNNCell", "input", input, axes, (*input.shape[:-1], self.input_size))
        return functional.rnn_cell(
            *_autocast.cast(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh),
            nonlinearity=self.nonlinearity,
        )
