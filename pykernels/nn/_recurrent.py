"""What the recurrent layers share: every form of call, and one loop over layers and directions."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pykernels import _autocast, _checks
from pykernels.functional import PackedWeights, recurrent_group

#: The first or last states of all layers and directions: h, or h and c.
States = tuple[Tensor, ...]
#: w_ih, w_hh, b_ih, b_hh and w_hr.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
#: The weights of a layer and direction, its first states, the options of its op.
Call = tuple[Weights, States | None, dict[str, Any]]
Self = TypeVar("Self", bound=torch.nn.Module)


class Packing(torch.nn.Module):
    """A module that keeps its weights packed in evaluation, as `frozen` does."""

    def train(self: Self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; packed weights are forgotten.

        So a step of training shows that writes through ``.data``, which leave no trace.
        """
        self.__dict__.pop("_packed_weights", None)
        return super().train(mode)

    def _apply(self: Self, *args: Any, **options: Any) -> Self:
        """What ``to``, ``half`` and their like do; what is packed of the old weights is let go."""
        self.__dict__.pop("_packed_weights", None)
        applied: Self = super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        return applied


class Layers(Packing, torch.nn.RNNBase):
    """The forward pass of `RNN`, `GRU` and `LSTM`, which come after it in the order of bases."""

    _name: str  # what errors call the layer
    _op: str
    _gates: int
    #: Whether torch's layer has no kernel of its own on a CPU: for a padded batch, for packed rows.
    _composed = (False, False)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run all layers.

        Args:
            input: x [T, B, I], or [B, T, I] with `batch_first`, or [T, I], or a PackedSequence.
            hx: the first state of every layer and direction, [layers * directions, B, H], or
                [layers * directions, H] for an unbatched input; zeros by default. Layer 0 forward
                comes first, then layer 0 backward, then layer 1. An LSTM takes the pair
                (h_0, c_0); with projections h_0 has `proj_size` columns.

        Returns:
            y [T, B, directions * H] in the layout of `input`, and h_n of the shape of `hx`; an
            LSTM returns (h_n, c_n).

        Raises:
            TypeError: `input` or `hx` is no tensor (of an LSTM, no pair of them), or the dtypes of
                input, states and weights differ.
            ValueError: a rank, size or device is wrong; T is zero.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        _checks.tensor(self._name, "input", input)
        axes = "B, T, I" if self.batch_first else "T, B, I"
        _checks.rank(self._name, "input", input, axes, "T, I")
        batched = input.dim() == 3
        sizes = (*input.shape[:-1], self.input_size)
        _checks.shape(self._name, "input", input, axes if batched else "T, I", sizes)
        if input.shape[batched and self.batch_first] == 0:
            _checks.fail(self._name, "input", "of one step at least", list(input.shape))
        (x,) = _autocast.cast(input)
        _checks.floating(self._name, "input", x)
        if not batched:
            x = x[:, None]
        elif self.batch_first:
            x = x.transpose(0, 1)
        states = self._first_states(hx, x, x.shape[1], batched)
        x, states = self._run(x, states, None)
        if self._composed[0]:
            x, *states = _autocast.carried(self._first(input, hx), x, *states)
        if not batched:
            return x[:, 0], self._returned([t[:, 0] for t in states])
        return x.transpose(0, 1) if self.batch_first else x, self._returned(states)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        """`forward` of a PackedSequence. Its rows may be sorted: then hx and h_n are not."""
        data, batch_sizes, order, place = input
        _checks.tensor(self._name, "input.data", data)
        _checks.rank(self._name, "input.data", data, "N, I")
        _checks.shape(self._name, "input.data", data, "N, I", (data.shape[0], self.input_size))
        sizes = _checks.batch_sizes(self._name, batch_sizes, data.shape[0])
        (data,) = _autocast.cast(data)
        _checks.floating(self._name, "input.data", data)
        states = self._first_states(hx, data, sizes[0], True)
        if states is not None and order is not None:
            states = [t.index_select(1, order) for t in states]
        y, states = self._run(data, states, sizes)
        if self._composed[1]:
            y, *states = _autocast.carried(self._first(input.data, hx), y, *states)
        if place is not None:
            states = [t.index_select(1, place) for t in states]
        return PackedSequence(y, batch_sizes, order, place), self._returned(states)

    def _first_states(self, hx: Any, x: Tensor, B: int, batched: bool) -> list[Tensor] | None:
        """`hx` checked, each of its tensors [layers * directions, B, .]."""
        if hx is None:
            return None
        count = self.num_layers * (2 if self.bidirectional else 1)
        found = []
        for name, letter, width, state in self._named(hx):
            _checks.tensor(self._name, name, state)
            (state,) = _autocast.cast(state)
            _checks.tensor(self._name, name, state, x)
            axes = f"layers * directions, {'B, ' if batched else ''}{letter}"
            sizes = (count, B, width) if batched else (count, width)
            _checks.shape(self._name, name, state, axes, sizes)
            found.append(state if batched else state[:, None])
        return found

    def _named(self, hx: Any) -> list[tuple[str, str, int, Any]]:
        """The tensors of `hx`, each with its name, its last axis and the size of that."""
        return [("hx", "H", self.hidden_size, hx)]

    def _first(self, x: Tensor, hx: Any) -> Any:
        """The last of the first states, or the input if there is none."""
        return x if hx is None else self._named(hx)[-1][-1]

    def _returned(self, states: list[Tensor]) -> Any:
        """The last states as the layer returns them."""
        return states[0]

    def _run(
        self, x: Tensor, first: list[Tensor] | None, batch_sizes: tuple[int, ...] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers on x [T, B, I], or on the rows [N, I] with `batch_sizes` -> y, last states."""
        directions = 2 if self.bidirectional else 1
        passes = [
            (layer, reverse) for layer in range(self.num_layers) for reverse in range(directions)
        ]
        # A layer may follow the one below step by step if nothing comes between the two.
        chained = directions == 1 and not (self.training and self.dropout)
        size = len(passes) if chained else directions
        last: list[States] = []
        for begin in range(0, len(passes), size):
            if begin:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            calls = []
            for i, (layer, reverse) in enumerate(passes[begin : begin + size], begin):
                states = None if first is None else tuple(t[i] for t in first)
                options = self._options | {
                    "reverse": bool(reverse),
                    "batch_sizes": batch_sizes,
                    "packed": frozen(self, (layer, reverse)),
                }
                calls.append((self._weights(layer, reverse), states, options))
            ys, after = self._calls(x, calls, chained)
            x = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
            last += after
        return x, [torch.stack(parts) for parts in zip(*last, strict=True)]

    def _calls(
        self, x: Tensor, calls: list[Call], chained: bool
    ) -> tuple[list[Tensor], list[States]]:
        """Runs layers of a chain, or directions: side by side, or one after the other.

        Returns:
            The y of each direction, or of the last layer, and the last states of each call.
        """
        if len(calls) > 1:
            found = recurrent_group(self._op, self._gates, x, calls, chained=chained)
            if found is not None:
                return found
        ys, last = [], []
        for weights, states, options in calls:
            y, after = self._layer(x, weights, states, options)
            x = y if chained else x
            ys.append(y)
            last.append(after)
        return ys[-1:] if chained else ys, last

    @property
    def _options(self) -> dict[str, Any]:
        """What the op takes beside what all take."""
        return {}

    def _layer(
        self,
        x: Tensor,
        weights: Weights,
        states: States | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, States]:
        """One layer and direction -> y and the states after its last step.

        `options` are those of the function in `functional`.
        """
        raise NotImplementedError

    def _weights(self, layer: int, reverse: int) -> Weights:
        """w_ih, w_hh, b_ih, b_hh and w_hr of one layer and direction, by their names.

        Not from torch's flat list: a parametrised weight is computed when its name is read.
        """
        suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
        names = (
            ("weight_ih", True),
            ("weight_hh", True),
            ("bias_ih", self.bias),
            ("bias_hh", self.bias),
            ("weight_hr", self.proj_size > 0),
        )
        found = (getattr(self, name + suffix) if there else None for name, there in names)
        w_ih, w_hh, b_ih, b_hh, w_hr = _autocast.cast(*found)
        return w_ih, w_hh, b_ih, b_hh, w_hr


def check_sizes(name: str, input_size: Any, hidden_size: Any) -> None:
    """Those of a cell's constructor, which torch takes as they come."""
    for argument, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        _checks.integer(name, argument, size)
        _checks.positive(name, argument, size)


def frozen(module: torch.nn.Module, key: object = None) -> PackedWeights | None:
    """Where a module in evaluation keeps its packed weights, those of each `key` apart."""
    if module.training or torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    kept: dict[object, PackedWeights] = module.__dict__.setdefault("_packed_weights", {})
    return kept.get(key) or kept.setdefault(key, PackedWeights())


def packed_step(
    cell: torch.nn.RNNCellBase, input: Any, states: tuple[Any, ...], *, relu: bool = False
) -> tuple[Tensor, ...] | None:
    """The states after a step of a cell in evaluation; None where all checks are due first."""
    packed = frozen(cell)
    if packed is None or torch.is_autocast_enabled("cpu"):
        return None
    # In torch's order, or not taken for the packed ones.
    return packed.step(tuple(cell._parameters.values()), input, states, relu=relu)


def cell_arguments(cell: torch.nn.RNNCellBase, name: str, input: Any, *states: Any) -> list[Any]:
    """The input, checked, the states and the weights of a cell, cast where autocast is on.

    A step is so short that each microsecond before it counts.
    """
    if not isinstance(input, Tensor) or input.dim() not in (1, 2):
        _checks.tensor(name, "input", input)
        _checks.rank(name, "input", input, "B, I", "I")
    if input.shape[-1] != cell.input_size:
        axes = "B, I" if input.dim() == 2 else "I"
        _checks.shape(name, "input", input, axes, (*input.shape[:-1], cell.input_size))
    # A parametrised weight is no entry of the dictionary: it is computed when its name is read.
    plain = cell._parameters
    weights = (
        plain[weight] if weight in plain else getattr(cell, weight)
        for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    arguments = [input, *states, *weights]
    return _autocast.cast(*arguments) if _autocast.on(input.device) else arguments
