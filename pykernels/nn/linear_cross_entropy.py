"""`LinearCrossEntropyLoss`, a linear layer and its loss, over `functional.linear_cross_entropy`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykernels import functional


class LinearCrossEntropyLoss(torch.nn.Linear):
    r"""`torch.nn.Linear` under a `torch.nn.CrossEntropyLoss`, without the logits in memory.

    .. math:: \mathrm{loss} = \mathrm{CrossEntropy}(W x + b, \mathrm{target})

    Parameters and state_dict are those of ``torch.nn.Linear(in_features, num_classes, bias)``, so
    that W may be shared with an embedding and the layer still be called for logits as
    `logits`. The arguments are those of torch's layer of this name, which newer versions have, but
    for `out_features` and `options`; its state_dict loads too, class weights included.

    Args:
        in_features: H, the size of x.
        num_classes: V, the number of classes.
        bias: whether there is a b.
        weight: the class weights, [V]; a buffer `class_weight` that state_dict leaves out.
        reduction, ignore_index, label_smoothing, z_loss: as `functional.linear_cross_entropy`.
        device, dtype: of the parameters.

    Parameters:
        weight: W, [V, H].
        bias: b, [V].

    Example::

        loss = pykernels.nn.LinearCrossEntropyLoss(20, 1000)
        loss(torch.randn(5, 3, 20), torch.randint(1000, (5, 3)))  # [..., H], [...] -> []
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, num_classes, bias, device, dtype)
        self.register_buffer("class_weight", weight, persistent=False)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    @property
    def num_classes(self) -> int:
        return self.out_features

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_lse: bool = False,
        return_argmax: bool = False,
    ) -> Any:
        """The loss.

        Args:
            input: x, [..., H].
            target: the classes, [...], int64.
            return_lse, return_argmax: as `functional.linear_cross_entropy`.

        Returns:
            A number, or [...] with reduction "none"; a tuple with what else is asked for.

        Raises:
            TypeError, ValueError: as `functional.linear_cross_entropy`.
        """
        return functional.linear_cross_entropy(
            input,
            self.weight,
            target,
            self.bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            return_lse=return_lse,
            return_argmax=return_argmax,
        )

    def logits(self, input: Tensor) -> Tensor:
        """W x + b, [..., V], as `torch.nn.Linear`: to sample from, not to train with."""
        return super().forward(input)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        if f"{prefix}linear.weight" in state_dict:  # of torch's layer, which keeps a Linear
            _rename(state_dict, f"{prefix}weight", f"{prefix}class_weight")
            _rename(state_dict, f"{prefix}linear.weight", f"{prefix}weight")
            _rename(state_dict, f"{prefix}linear.bias", f"{prefix}bias")
        with _persistent(self, f"{prefix}class_weight" in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest, **options)


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    if old in state_dict:
        state_dict[new] = state_dict.pop(old)


@contextlib.contextmanager
def _persistent(layer: torch.nn.Module, has_class_weight: bool) -> Iterator[None]:
    """Within, torch loads the class weights too, if there are any to load."""
    if has_class_weight:
        layer._non_persistent_buffers_set.discard("class_weight")
    try:
        yield
    finally:
        layer._non_persistent_buffers_set.add("class_weight")
