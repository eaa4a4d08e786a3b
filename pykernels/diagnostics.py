r"""How far back the gradient of a recurrent module reaches.

The state after the last step depends on every state before it through a product of Jacobians,

.. math:: \frac{\partial h_T}{\partial h_t}
          = \prod_{k=t+1}^{T} \frac{\partial h_k}{\partial h_{k-1}}, \qquad
          \frac{\partial h_k}{\partial h_{k-1}} = \mathrm{diag}(f'(a_k)) W_{hh}
          \text{ for } h_k = f(a_k),

whose norm tends to shrink or to grow with T - t as a power does: the gradient vanishes or explodes,
and what was seen at step t is hard to learn from, or swamps all else. S. Hochreiter,
"Untersuchungen zu dynamischen neuronalen Netzen" (1991); Y. Bengio, P. Simard, P. Frasconi,
"Learning long-term dependencies with gradient descent is difficult" (1994); R. Pascanu, T. Mikolov,
Y. Bengio, "On the difficulty of training recurrent neural networks" (2013), equation 5.

`gradient_flow` measures it on any RNN, GRU or LSTM, of torch.nn or of pykernels.nn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pykernels import _checks

_OP = "gradient_flow"


@dataclass(frozen=True)
class GradientFlow:
    """A norm for each step of a sequence; ``norms[k]`` is that of `distances[k]`."""

    #: T - t, the steps between h_t and the last state: T, T - 1, ..., 0.
    distances: Tensor
    #: [T + 1] (with a loss: dL/dh_t) or, without, of dh_T/dh_t; in the dtype of the module, but for
    #: half precision in float32.
    norms: Tensor

    @property
    def rate(self) -> float:
        r"""The geometric mean of a step's factor, :math:`(n_0 / n_T)^{1/T}`, of the norms at t = 0
        and t = T: below 1 the gradient vanishes, above 1 it explodes. nan without a step."""
        T = len(self.norms) - 1
        return float((self.norms[0] / self.norms[-1]) ** (1 / T)) if T else float("nan")


def gradient_flow(
    module: torch.nn.RNNBase,
    x: Tensor,
    hx: Any = None,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> GradientFlow:
    r"""The norm of the gradient of the last state, or of a loss, with respect to each state h_t.

    Without `loss` it is the Frobenius norm of the Jacobian, averaged over the batch as the root of
    the mean square:

    .. math:: n_t = \sqrt{\tfrac1B \sum_b \lVert \partial h_T^{(b)} / \partial h_t^{(b)} \rVert_F^2}

    which is exactly sqrt(H) at t = T. It takes one backward pass for each of the H units; with
    `samples` = K, only K, along random directions v of independent signs: as
    :math:`E \lVert v^T J \rVert^2 = \lVert J \rVert_F^2` (M. F. Hutchinson, 1990), the mean of so
    many estimates n_t^2. With `loss` it is the root of the sum of squares over the batch, of

    .. math:: \frac{\partial L}{\partial h_t} = \sum_{k \ge t}
              \frac{\partial L}{\partial y_k} \frac{\partial h_k}{\partial h_t},

    one backward pass through time. h_t is the state that step t + 1 reads and the y_t that `loss`
    reads: a gradient counts both ways. An LSTM's state is the pair (h_t, c_t), and its norm is that
    of the two together; its h_T depends on both. The states are walked one step at a time through
    the module itself, a call a step, and no parameter's gradient is touched.

    Args:
        module: a `torch.nn.RNN`, `GRU` or `LSTM`, or those of `pykernels.nn`, of one layer and one
            direction.
        x: the input, in the module's layout: [T, B, I], [B, T, I] with `batch_first`, or [T, I].
        hx: the first state, as the module takes it; zeros if None.
        loss: from y, in the module's layout, to a scalar.
        samples: random directions, at least 1; None takes every unit.
        seed: of the directions.

    Returns:
        A `GradientFlow` with T + 1 norms, t = 0 (the first state) to T.

    Raises:
        TypeError: `module` is no such layer, x is no tensor, `loss` returns no tensor.
        ValueError: there are several layers or directions, a shape is wrong, there is no batch, the
            loss is no scalar, `samples` is below 1 or given with `loss`.
        RuntimeError: under `torch.inference_mode`, which keeps nothing for a backward pass.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{_OP}: torch.inference_mode keeps no record to go back along")
    _check(module, x, loss, samples)
    batched = x.dim() == 3
    axis = 1 if batched and module.batch_first else 0
    training = module.training
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    try:
        # Dropout lies between layers, of which there is one: the mode changes no value, but in
        # evaluation stock layers on a GPU keep nothing for a backward pass.
        module.train()
        module.requires_grad_(False)
        with torch.enable_grad():
            states = _walk(module, x.detach(), hx, axis, batched)
            if loss is None:
                norms = _jacobians(states, samples, seed)
            else:
                norms = _of_loss(states, axis, loss)
    finally:
        module.train(training)
        for parameter, flag in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
    distances = torch.arange(len(states) - 1, -1, -1)
    return GradientFlow(distances, norms)


def _check(
    module: Any, x: Any, loss: Callable[[Tensor], Tensor] | None, samples: int | None
) -> None:
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"{_OP}: `module` must be an RNN, GRU or LSTM, got {type(module).__name__}")
    for name, value, only in (
        ("num_layers", module.num_layers, 1),
        ("bidirectional", module.bidirectional, False),
    ):
        if value != only:
            _checks.fail(_OP, f"module.{name}", str(only), value)
    _checks.tensor(_OP, "x", x)
    axes = "B, T, I" if module.batch_first else "T, B, I"
    _checks.rank(_OP, "x", x, axes, "T, I")
    if x.shape[-1] != module.input_size:
        names = axes if x.dim() == 3 else "T, I"
        _checks.shape(_OP, "x", x, names, (*x.shape[:-1], module.input_size))
    if x.dim() == 3 and x.shape[0 if module.batch_first else 1] == 0:
        _checks.fail(_OP, "x", "of a batch of at least 1", list(x.shape))
    if samples is not None and loss is not None:
        _checks.fail(_OP, "samples", "None with a loss, which takes one pass", samples)
    if samples is not None and samples < 1:
        _checks.fail(_OP, "samples", "at least 1", samples)


def _walk(
    module: torch.nn.RNNBase, x: Tensor, hx: Any, axis: int, batched: bool
) -> list[tuple[Tensor, ...]]:
    """The states before every step and after the last, each [1, B, H], or [1, H] unbatched."""
    if hx is None:
        sizes = (1, x.shape[1 - axis]) if batched else (1,)
        widths = [module.proj_size or module.hidden_size]
        widths += [module.hidden_size] * isinstance(module, torch.nn.LSTM)
        state = tuple(x.new_zeros(*sizes, width) for width in widths)
    else:
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    state = tuple(part.detach().clone().requires_grad_() for part in state)
    states = [state]
    for t in range(x.shape[axis]):
        _, after = module(x.narrow(axis, t, 1), state if len(state) > 1 else state[0])
        state = after if isinstance(after, tuple) else (after,)
        states.append(state)
    return states


def _jacobians(states: list[tuple[Tensor, ...]], samples: int | None, seed: int) -> Tensor:
    """sqrt(mean over the batch of |dh_T/dh_t|_F^2) for each t."""
    last = states[-1][0]
    H = last.shape[-1]
    if samples is None:
        directions = torch.eye(H, dtype=last.dtype, device=last.device)
    else:
        draw = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(2, (samples, *last.shape), generator=draw, device="cpu") * 2 - 1
        directions = signs.to(last)
    squares = torch.stack([_squares(last, states, v.expand_as(last)) for v in directions]).sum(0)
    rows = last.numel() // H
    return (squares / (rows * (samples or 1))).sqrt()


def _of_loss(
    states: list[tuple[Tensor, ...]], axis: int, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """|dL/dh_t| for each t, with y made of the states, so that both ways of h_t count."""
    y = torch.cat([states[0][0][:0], *(h for h, *_ in states[1:])])
    value = loss(y.transpose(0, 1) if axis else y)
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: `loss` must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        _checks.fail(_OP, "loss", "a function that returns a scalar", list(value.shape))
    return _squares(value, states, None).sqrt()


def _squares(target: Tensor, states: list[tuple[Tensor, ...]], upstream: Tensor | None) -> Tensor:
    """|gradient of `target`, times `upstream`, at each state|^2, [T + 1], in float32 at least."""
    flat = [part for state in states for part in state]
    grads = torch.autograd.grad(
        target, flat, upstream, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    per = len(states[0])
    wide = torch.promote_types(flat[0].dtype, torch.float32)
    sums = torch.stack([grad.to(wide).square().sum() for grad in grads])
    return sums.view(-1, per).sum(1)
