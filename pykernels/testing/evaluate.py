"""One spec run by us, by stock torch or by the reference: outputs and gradients by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pykernels import functional
from pykernels.testing import exact
from pykernels.testing import stock as _stock
from pykernels.testing.specs import Spec
from pykernels.testing.tolerance import Measured, assert_close, measure

Results = dict[str, Tensor]


def ours(
    spec: Spec,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    seed: int = 0,
    *,
    gradients: bool = True,
    op: Callable[..., Any] | None = None,
) -> Results:
    """Outputs and gradients of `functional.<op>`, or of an `op` in its place, on `backend`.

    Without `gradients` the call is not recorded, which may be another road. The reference in
    float64 is the truth, and so has the truth's products.
    """
    op = functools.partial(op or getattr(functional, spec.op), backend=backend)
    with _products(dtype if backend == "reference" else None):
        return _evaluate(
            op, spec, spec.inputs(dtype, device, seed), dtype, seed, gradients=gradients
        )


@functools.lru_cache(maxsize=16)  # several backends are measured against one result
def stock(spec: Spec, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Results:
    """The same from stock torch, at the same dtype on the same input."""
    return _evaluate(getattr(_stock, spec.op), spec, spec.inputs(dtype, device, seed), dtype, seed)


@functools.lru_cache(maxsize=16)
def truth(spec: Spec, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Results:
    """The same from the reference in float64, on the input as `dtype` rounds it.

    Where float64 itself is judged, the truth's products are exact: see `exact`.
    """
    op = functools.partial(getattr(functional, spec.op), backend="reference")
    inputs = {
        name: t.double() if t.is_floating_point() else t
        for name, t in spec.inputs(dtype, device, seed).items()
    }
    with _products(dtype):
        return _evaluate(op, spec, inputs, dtype, seed)


def _products(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return exact.ExactProducts() if dtype == torch.float64 else contextlib.nullcontext()


def check(
    spec: Spec,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    seed: int = 0,
    *,
    gradients: bool = True,
    op: Callable[..., Any] | None = None,
) -> dict[str, Measured]:
    """`assert_close` on every output and gradient of `ours`; the measured errors by name."""
    # first, so that nothing a test does to a backend reaches them
    expected, usual = truth(spec, dtype, device, seed), stock(spec, dtype, device, seed)
    actual = ours(spec, dtype, backend, device, seed, gradients=gradients, op=op)
    if not gradients:
        expected, usual = ({name: r[name] for name in spec.outputs} for r in (expected, usual))
    return compare(spec, actual, expected, usual, dtype)


def compare(
    spec: Spec, actual: Results, expected: Results, usual: Results, dtype: torch.dtype
) -> dict[str, Measured]:
    """`assert_close` on every tensor of `actual`."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"{spec.name}: got {sorted(actual)}, expected {sorted(expected)}")
    least = floor(spec, dtype)
    return {
        name: assert_close(
            actual[name],
            expected[name],
            usual[name],
            f"{spec.name} {name} ({dtype})",
            dtype,
            floor=least[name],
        )
        for name in expected
    }


def check_truth(spec: Spec, device: str = "cpu") -> None:
    """Stock torch's results in float64 are the truth, but for the roundings of stock torch's."""
    expected = stock(spec, torch.float64, device)
    exact = truth(spec, torch.float64, device)
    for name, t in exact.items():
        finite = t[t.isfinite()]
        scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            expected[name],
            t,
            rtol=1e-12,
            atol=1e-13 * scale,
            msg=lambda words, name=name: f"{spec.name} {name}: {words}",  # type: ignore[misc]
        )


@functools.lru_cache(maxsize=64)
def floor(spec: Spec, dtype: torch.dtype) -> dict[str, float]:
    """What stock torch's error counts as at least, by name, in relation to max|truth|.

    Zero but in float64, of which stock torch's error is a matter of luck: there float32's error
    says how a rounding grows in this formula, and counts in units of float64.
    """
    if dtype != torch.float64:
        return dict.fromkeys(truth(spec, dtype), 0.0)
    units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    expected, found = truth(spec, torch.float32), stock(spec, torch.float32)
    measured = {name: measure(found[name], expected[name], found[name]) for name in expected}
    return {name: units * m.error / m.scale if m.scale else 0.0 for name, m in measured.items()}


def flat(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of nested tuples in one: (y, (h_n, c_n)) -> (y, h_n, c_n)."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(t for part in outputs for t in flat(part))


def differentiable(spec: Spec, inputs: Mapping[str, Tensor]) -> list[str]:
    """The inputs that have a gradient: a float mask where it is learned, nothing in pages."""
    constant = {"alibi_slopes", "class_weight"} | (
        set() if getattr(spec, "learned", False) else {"attn_mask"}
    )
    if getattr(spec, "page_size", 0):
        return []
    return [name for name, t in inputs.items() if t.is_floating_point() and name not in constant]


def _evaluate(
    op: Callable[..., Any],
    spec: Spec,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    seed: int,
    *,
    gradients: bool = True,
) -> Results:
    """Outputs, and the gradient "d<argument>" of each floating argument, by name.

    The upstream gradients are random, for every output.
    """
    wanted = differentiable(spec, inputs) if gradients else []
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    options = spec.options | ({"return_lse": True} if spec.op.startswith("attention") else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)  # of dropout
        outputs = dict(zip(spec.outputs, flat(op(**leaves, **options)), strict=True))
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [
        # rounded as the inputs are, so that every dtype of computation is given the same numbers
        torch.randn(out.shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .to(dtype=out.dtype, device=out.device)
        for out in outputs.values()
    ]
    # an output that depends on no input (the state after no step) has no gradient to send back
    sent = [
        (out, d) for out, d in zip(outputs.values(), upstream, strict=True) if out.requires_grad
    ]
    grads = [torch.zeros_like(leaves[name]) for name in wanted]
    if sent:
        outs, ds = zip(*sent, strict=True)
        grads = torch.autograd.grad(
            outs, [leaves[name] for name in wanted], ds, materialize_grads=True
        )
    return {name: out.detach() for name, out in outputs.items()} | {
        f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)
    }
