"""Weights packed once for many calls of a recurrent op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pykernels import _backends
from pykernels.ops import _library


class PackedWeights:
    """What a kernel packs of the weights of one recurrent layer, kept for the calls to come.

    Give the same object as ``packed=`` to every call with the same weights: `functional.rnn`,
    `gru`, `lstm` and their cells then pack them in the first call alone. It serves calls of which
    autograd keeps no record, on backends that pack; others leave it alone. It holds memory of the
    size of the weights, in float32 for half precision.

    Weights that have changed are packed anew. A change is known by the version that torch counts
    up as it writes to a tensor, by the memory that it has, and by the step of any
    `torch.optim.Optimizer`, as fused ones count no version. Other writes that count none are not
    seen, those through ``.data``, NumPy or a pointer, and what torch.distributed receives: call
    `clear` after one. The layers do so whenever `train` or `eval` is called. Weights in memory that
    processes share are never kept. Copying or pickling it gives an empty one.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets the weights."""
        # Backend, epoch, states and memory of the weights, what it packed: one tuple, as threads
        # may meet.
        self._kept: tuple[ModuleType, object, list[Any], list[Any], Any] | None = None
        self._step: tuple[object, Callable[..., tuple[Tensor, ...] | None] | None] = None, None

    def get(self, op: str, backend: ModuleType, weights: tuple[Tensor | None, ...]) -> Any:
        """What ``<op>_pack`` of `backend` makes of `weights`.

        None where the backend packs nothing, or where nobody would see a tensor change: one made
        under `torch.inference_mode`, or in memory that other processes write to.
        """
        if (kept := self._find(backend, weights)) is not None:
            return kept
        pack = getattr(backend, f"{op}_pack", None)
        if pack is None or any(w is not None and _changes_unseen(w) for w in weights):
            return None
        self.clear()
        _watch_optimizers()
        epoch = _epoch
        states = [w if w is None else _state(w) for w in weights]
        packed = pack(*weights)
        # Holds the memory, so that nothing else can come to lie there and be taken for it.
        memory = [w if w is None else w.detach() for w in weights]
        self._kept = (backend, epoch, states, memory, packed)
        self._step = epoch, getattr(backend, f"{op}_step")(packed, weights)
        return packed

    def option(self, op: str, backend: ModuleType, tensors: tuple[Any, ...]) -> dict[str, Any]:
        """What tells `backend` of the packed weights among the tensors of a call of `op`."""
        found = self.get(op, backend, (*tensors[1:5], *tensors[7:]))
        return {} if found is None else {"packed": found}

    def step(
        self,
        weights: tuple[Tensor | None, ...],
        input: Any,
        states: tuple[Any, ...],
        *,
        relu: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, ...] | None:
        """The states after one step of a cell, unchecked: a check takes longer than a step.

        None where there are no packed weights for that, where a dispatch mode looks on, or where
        any argument is out of the ordinary: the way through all checks then says what.
        """
        epoch, step = self._step
        if step is None or epoch is not _epoch or torch.is_grad_enabled():
            return None
        if _library.in_forward_mode() or torch._C._len_torch_dispatch_stack():
            return None
        if _backends.asked_for(backend) not in (None, "cpp"):
            return None
        return step(weights, torch.get_num_threads(), input, states, relu)

    def _find(self, backend: ModuleType, weights: tuple[Tensor | None, ...]) -> Any:
        """What there is for `backend` of just these weights, unchanged; None if nothing."""
        found = self._kept
        if found is None:
            return None
        maker, epoch, states, _, packed = found
        if backend is not maker or epoch is not _epoch or len(weights) != len(states):
            return None
        for weight, state in zip(weights, states, strict=True):
            if (state is not None) if weight is None else state != _state(weight):
                return None
        return packed

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()


def check_packed(op: str, packed: Any) -> None:
    """`packed` is None or a `PackedWeights`."""
    if packed is not None and not isinstance(packed, PackedWeights):
        got = type(packed).__name__
        raise TypeError(f"{op}: `packed` must be a PackedWeights, got {got}")


def _state(weight: Tensor) -> tuple[object, ...]:
    """What differs once the tensor has been written to, or has other memory."""
    if weight.is_inference():
        return ()  # has no version
    return weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _changes_unseen(weight: Tensor) -> bool:
    """Whether it can change without a trace in this process."""
    return weight.is_inference() or weight.untyped_storage().is_shared()


#: Another object after each step of an optimizer.
_epoch = object()


@functools.cache
def _watch_optimizers() -> None:
    """From now on steps of optimizers are seen."""

    def after_step(*_: Any) -> None:
        global _epoch
        _epoch = object()

    register_optimizer_step_post_hook(after_step)
