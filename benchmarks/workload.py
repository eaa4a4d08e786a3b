"""What is timed: one spec at one dtype, as calls of ours, of the reference and of stock torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pykernels import __main__ as about
from pykernels import cost, functional
from pykernels.testing import evaluate, stock
from pykernels.testing.specs import ATTENTION_SPECS, RNN_SPECS, Spec
from pykernels.testing.tolerance import Measured, measure

SPECS: dict[str, list[Spec]] = {"rnn": [*RNN_SPECS], "attention": [*ATTENTION_SPECS]}
IMPLEMENTATIONS = ("ours", "torch", "reference")
PASSES = ("forward", "forward+backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def full_precision() -> None:
    """float32 means float32: cuDNN's recurrent layers would round it to TF32 by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Setting:
    """One spec at one dtype on one backend; None is the fastest backend that serves it."""

    spec: Spec
    dtype: str
    device: str = "cpu"
    backend: str | None = None

    def check(self) -> dict[str, Measured]:
        """The error of ours in every output and gradient, and what the tolerance rule allows."""
        spec, dtype = self.spec, DTYPES[self.dtype]
        truth, stocks = (get(spec, dtype, self.device) for get in (evaluate.truth, evaluate.stock))
        actual = evaluate.ours(spec, dtype, self.backend, self.device)
        floor = evaluate.floor(spec, dtype)
        return {
            name: measure(actual[name], truth[name], stocks[name], dtype, floor=floor[name])
            for name in truth
        }

    def backend_of(self, implementation: str) -> str:
        """The backend behind an implementation's calls; empty for stock torch."""
        if implementation != "ours":
            return "reference" if implementation == "reference" else ""
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        features = self.spec.features(dtype)
        return about.serving(self.spec.op, self.backend, device, dtype, features)

    def flops(self, which: str) -> int:
        """Floating-point operations of one call."""
        return count(self.spec, which, DTYPES[self.dtype].itemsize).flops

    def calls(self, which: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Calls without arguments, by implementation, on tensors that they share.

        They return the outputs if `which` is "forward", else the gradients of all inputs but the
        mask under random upstream gradients. Attention is asked for no log-sum-exp: torch's gives
        none.
        """
        inputs = self.spec.inputs(DTYPES[self.dtype], self.device)
        ours = functools.partial(getattr(functional, self.spec.op), **self.spec.options)
        torchs = functools.partial(getattr(stock, self.spec.op), **self.spec.options)
        functions = {
            "ours": functools.partial(ours, backend=self.backend),
            "torch": torchs,
            "reference": functools.partial(ours, backend="reference"),
        }
        if which == "forward":
            return {name: _forward(f, inputs) for name, f in functions.items()}
        upstream = [torch.randn_like(out) for out in _forward(torchs, inputs)()]
        return {name: _both(f, inputs, upstream) for name, f in functions.items()}


def count(spec: Spec, which: str, itemsize: int) -> cost.Cost:
    """The cost of one call of `spec`."""
    if spec.op == "rnn":
        rest = {"bias": spec.bias, "initial_state": spec.h0}
    else:
        rest = {"is_causal": spec.is_causal}
    return getattr(cost, spec.op)(**spec.sizes, **rest, itemsize=itemsize, which=which)


def _forward(function: Callable, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return _tuple(function(**inputs))

    return forward


def _both(
    function: Callable, inputs: dict[str, Tensor], upstream: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if n != "attn_mask"}

    def both() -> tuple[Tensor, ...]:
        outputs = _tuple(function(**{**inputs, **leaves}))
        return torch.autograd.grad(outputs, list(leaves.values()), upstream)

    return both


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
