"""`GRU` and `GRUCell` with the interface of torch.nn, over `functional.gru` and `gru_cell`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import functional
from pykernels.nn._recurrent import Layers, States, Weights, cell_arguments, frozen, packed_step


class GRU(Layers, torch.nn.GRU):
    r"""`torch.nn.GRU` on fused kernels; the equations stand at `functional.gru`.

    Constructor, parameters, state_dict and forms of call are those of `torch.nn.GRU`: layers,
    directions, dropout between layers, `batch_first`, unbatched input, PackedSequence. One thing
    differs: an empty sequence (T = 0), which torch refuses, returns `hx` as `h_n`.
    """

    _name, _op, _gates = "GRU", "gru", 3

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


class GRUCell(torch.nn.GRUCell):
    """`torch.nn.GRUCell` on fused kernels: one step of `GRU`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: x [B, I] or [I].
            hx: the state before, [B, H] or [H]; zeros by default.

        Returns:
            The state after, [B, H] or [H].
        """
        after = packed_step(self, input, (hx,))
        if after is not None:
            return after[0]
        return functional.gru_cell(*cell_arguments(self, "GRUCell", input, hx), packed=frozen(self))
