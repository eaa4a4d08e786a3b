"""A linear layer and its cross-entropy in one: `linear_cross_entropy`."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pykernels import _autocast, _backends, _checks
from pykernels.ops import _autograd, _calls, _library
from pykernels.ops._calls import Call

REDUCTIONS = ("mean", "sum", "none")
#: The target that does not count, if none is named.
IGNORED = -100


def _makes_ahead(backend: ModuleType, options: dict[str, Any]) -> bool:
    """Whether a forward pass may make the gradients for an upstream gradient of 1.

    It has the logits, which backward would have to make again. Only of a loss that is one number
    are all upstream gradients a multiple of that.
    """
    return _is_one_number(options) and "ahead" in backend.FEATURES


def _is_one_number(options: dict[str, Any]) -> bool:
    return options["reduction"] != "none" and not options["return_lse"]


class LinearCrossEntropyFunction(_autograd.Function):
    """Autograd over one backend's ``linear_cross_entropy_fwd`` and ``_bwd``; differentiable twice.

    A backend with the feature "ahead" takes ``ahead=needs``, and then saves dx, dweight and dbias
    for an upstream gradient of 1 behind all else; its ``linear_cross_entropy_scale(made, dloss)``
    multiplies them where they lie. They belong to the first backward pass: a second one finds none,
    and has them made again.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        if "ahead" not in call.options and _makes_ahead(call.backend, call.options):
            call = call.with_options(ahead=ctx.needs_input_grad[1:])
        outputs: tuple[Tensor | None, ...]
        outputs, saved = call.forward(tensors)
        ctx.made = None
        if "ahead" in call.options:
            saved, ctx.made = saved[:-3], saved[-3:]
        _autograd.keep(ctx, call, saved)
        if outputs[2] is not None:  # argmax
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, dloss, made = ctx.call, grads[0], ctx.made
        ctx.made = None
        again = torch.is_grad_enabled() or _autograd.mapped(grads)
        if "ahead" not in call.options or dloss is None or again:
            return _autograd.Function.backward(ctx, *grads)
        tensors = ctx.saved_tensors[:5]
        if made is None:
            made = call.forward(tensors)[1][-3:]
        call.backend.linear_cross_entropy_scale(made, dloss)
        dtype = tensors[0].dtype
        dx, dw, db = (t if t is None or t.dtype == dtype else t.to(dtype) for t in made)
        return None, dx, dw, None, db, None


class _OfTensors:
    """A backend's module whose gradients made ahead are among the tensors that it saves.

    Its option says which gradients that would be, by input; none where it is empty.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def linear_cross_entropy_fwd(
        self, *tensors: Any, ahead: tuple[bool, ...] = (), **options: Any
    ) -> tuple[Any, Any]:
        if ahead and "ahead" in self.module.FEATURES:
            options["ahead"] = ahead
        outputs, saved = self.module.linear_cross_entropy_fwd(*tensors, **options)
        made: Any = (None, None, None)
        if "ahead" in options:
            saved, made = saved[:-3], saved[-3:]
        elif ahead:
            made = self._gradients(saved, (outputs[0].new_ones(()), None, None), ahead, options)
        made = [None if t is None else t.to(_held(tensors[0])) for t in made]
        return outputs, (*saved[:5], *made, *saved[5:])

    def linear_cross_entropy_bwd(
        self,
        saved: tuple[Any, ...],
        grads: tuple[Any, ...],
        *,
        needs: tuple[bool, ...],
        ahead: tuple[bool, ...] = (),
        **options: Any,
    ) -> tuple[Any, ...]:
        inputs, made, rest = saved[:5], saved[5:8], saved[8:]
        if ahead:
            dx, dw, db = (t if t is None else (t * grads[0]).to(inputs[0].dtype) for t in made)
        else:
            dx, dw, db = self._gradients((*inputs, *rest), grads, needs, options)
        return dx, dw, None, db, None

    def linear_cross_entropy_extras(
        self, *tensors: Any, ahead: tuple[bool, ...] = (), **options: Any
    ) -> tuple[Any, ...]:
        make = getattr(self.module, "linear_cross_entropy_extras", None)
        made: Any = (None, None, None)
        if ahead:
            like = (tensors[0], tensors[1], tensors[3])
            needs = (ahead[0], ahead[1], ahead[3])
            made = (
                t.new_empty(t.shape, dtype=_held(t)) if need else None
                for t, need in zip(like, needs, strict=True)
            )
        return (*made, *(() if make is None else make(*tensors, **options)))

    def _gradients(self, saved: Any, grads: Any, needs: Any, options: Any) -> tuple[Any, ...]:
        found = self.module.linear_cross_entropy_bwd(saved, grads, needs=needs, **options)
        return found[0], found[1], found[3]


def _held(like: Tensor) -> torch.dtype:
    """The dtype of gradients made ahead: float16 has not the range, before they are scaled."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _empty(
    x: Tensor, *others: Any, reduction: str, return_lse: bool, return_argmax: bool, **options: Any
) -> tuple[Any, ...]:
    N, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty((N,) if reduction == "none" else (), dtype=wide)
    lse = x.new_empty(N, dtype=wide) if return_lse else None
    return loss, lse, x.new_empty(N, dtype=torch.int64) if return_argmax else None


def _formula(
    *tensors: Any, return_lse: bool, return_argmax: bool, **options: Any
) -> tuple[Tensor, ...]:
    reference = _backends.module("reference", "linear_cross_entropy")
    loss, lse, argmax = reference.linear_cross_entropy(*tensors, **options)
    return loss.to(lse.dtype), lse, argmax


def _axes(
    *tensors: Any, reduction: str, return_lse: bool, return_argmax: bool, **options: Any
) -> Any:
    if reduction != "none":
        return None  # one number of all rows
    outputs = (0, 0 if return_lse else None, 0 if return_argmax else None)
    return (0, None, 0, None, None), (*outputs, None, None, None, 1)


def _check_values(
    x: Tensor, weight: Tensor, target: Tensor, *others: Any, ignore_index: int, **options: Any
) -> None:
    _checks.classes("linear_cross_entropy", "target", target, weight.shape[0], ignore_index)


_library.Operator(
    "linear_cross_entropy",
    tensors="Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight",
    options="int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "bool return_lse, bool return_argmax, bool[] ahead=[]",
    outputs="loss lse argmax",
    extras="ahead_x ahead_weight ahead_bias softmax",
    saves=0,
    empty=_empty,
    formula=_formula,
    axes=_axes,
    check=_check_values,
    adapt=_OfTensors,
)


class _Call(Call):
    """One whose pass is planned along with the gradients that it makes ahead."""

    def __init__(self, *args: Any, tensors: tuple[Tensor | None, ...]) -> None:
        super().__init__(*args)
        self.needs = tuple(t is not None and t.requires_grad for t in tensors)

    def unseen(self, is_recorded: bool) -> Call:
        call: Call = self
        if is_recorded and _makes_ahead(self.backend, self.options):
            call = self.with_options(ahead=self.needs)
        return Call.unseen(call, is_recorded)


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    return_argmax: bool,
    loss_is_wide: bool,
) -> Call:
    op = "linear_cross_entropy"
    x, weight, target, bias, class_weight = tensors
    _checks.tensor(op, "x", x)
    _checks.floating(op, "x", x)
    if x.dim() == 0:
        _checks.fail(op, "x", "[..., H]", "0 dimensions: []")
    _checks.tensor(op, "weight", weight, x)
    if bias is not None:
        _checks.tensor(op, "bias", bias, x)
    if class_weight is not None:
        _checks.tensor(op, "class_weight", class_weight)
        _checks.device(op, "class_weight", class_weight, x)
        if class_weight.dtype not in (x.dtype, _loss_dtype(x, loss_is_wide)):
            _checks.tensor(op, "class_weight", class_weight, x)
    _checks.rank(op, "weight", weight, "V, H")
    H, V = x.shape[-1], weight.shape[0]
    _checks.positive(op, "hidden size H", H)
    _checks.positive(op, "vocabulary size V", V)
    _checks.shape(op, "weight", weight, "V, H", (V, H))
    for name, value in (("bias", bias), ("class_weight", class_weight)):
        if value is not None:
            _checks.shape(op, name, value, "V", (V,))
    if class_weight is not None and class_weight.requires_grad and torch.is_grad_enabled():
        _checks.fail(op, "class_weight", "without gradient", "requires_grad=True")
    _checks.tensor(op, "target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: `target` must have dtype torch.int64, got {target.dtype}")
    _checks.device(op, "target", target, x)
    _checks.shape(op, "target", target, "...", x.shape[:-1])
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    _checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        _checks.fail(op, "label_smoothing", "between 0 and 1", label_smoothing)
    _checks.number(op, "z_loss", z_loss)
    if not 0 <= z_loss < float("inf"):
        _checks.fail(op, "z_loss", "at least 0 and finite", z_loss)
    _checks.integer(op, "ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        _checks.fail(op, "ignore_index", "of 64 bits", ignore_index)
    _checks.flags(op, return_lse=return_lse, return_argmax=return_argmax)
    chosen = _backends.select(op, backend, x.device, x.dtype)
    options: dict[str, Any] = {
        "ignore_index": int(ignore_index),
        "reduction": reduction,
        "label_smoothing": float(label_smoothing),
        "z_loss": float(z_loss),
        "return_lse": return_lse,
        "return_argmax": return_argmax,
    }
    if torch.compiler.is_compiling() and _is_one_number(options) and _autograd.wanted(tensors):
        options["ahead"] = [t is not None and t.requires_grad for t in tensors]
    return _Call(op, LinearCrossEntropyFunction, chosen, options, tensors=tensors)


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int | None = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: Literal[False] = False,
    return_argmax: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int | None = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    return_argmax: bool = False,
    backend: str | None = None,
) -> Any: ...
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int | None = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    return_argmax: bool = False,
    backend: str | None = None,
) -> Any:
    r"""The cross-entropy of a linear layer's outputs, which are never all in memory.

    .. math::
        z_i = W x_i + b, \quad \log p_{ic} = z_{ic} - \log \sum_k e^{z_{ik}}, \quad
        l_i = -(1 - s)\, w_{t_i} \log p_{i t_i} - \frac{s}{V} \sum_c w_c \log p_{ic}

    It equals ``F.cross_entropy(F.linear(x, weight, bias), target, class_weight, ...)`` with label
    smoothing s (C. Szegedy et al., "Rethinking the Inception architecture for computer vision",
    2016); `z_loss` adds a multiple of the squared log-sum-exp (A. Chowdhery et al., "PaLM", 2022).
    The logits exist for a few rows at a time. Under "mean" and "sum" their gradients are made
    along with the loss, where a gradient is asked for, so that backward has only to scale them; not
    so under `torch.func`. Under torch.compile the values of `target` are checked where the graph
    runs, with the same error, which then counts rows of all leading axes. On a GPU they are a
    device-side assertion, as of torch's cross_entropy: the host does not wait to see them.

    Args:
        x: [..., H], any floating dtype.
        weight: W, [V, H].
        target: the classes t, [...] as x, int64, each from 0 to V - 1 or `ignore_index`.
        bias: [V], or None.
        class_weight: w, [V] of x's dtype; ones if None. It has no gradient.
        ignore_index: rows with this target have no loss and no gradient, and the mean is not over
            them; None is -100, as torch has it.
        reduction: "mean", divided by the sum of the w_t that count, "sum" or "none".
        label_smoothing: s, from 0 to 1.
        z_loss: adds ``z_loss * lse**2`` to each row's loss; its mean is over the rows that count,
            whatever their weights.
        return_lse: return the log-sum-exp of each row's logits too, in float32 (float64 for
            float64). As it is differentiable, backward then computes the logits anew.
        return_argmax: return the class of the largest logit of each row too, int64.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        The loss in x's dtype (in float32 under autocast): a number, or [...] with reduction
        "none". With `return_lse` and `return_argmax` a tuple ``(loss, lse, argmax)`` of those asked
        for, the others [...]. The mean over no row is NaN, as torch's.

    Raises:
        TypeError: something is no tensor, dtypes differ, are not floating or, of target, not int64;
            a flag is no bool.
        ValueError: a rank, size, device, reduction or backend is wrong; H or V is zero; a target is
            out of range; label_smoothing is not from 0 to 1, or z_loss is negative; class_weight
            requires a gradient. On a GPU targets are not looked at here.
    """
    x, weight, bias = _autocast.cast(x, weight, bias)
    loss_is_wide = _autocast.on(x.device) if isinstance(x, Tensor) else False
    ignore_index = IGNORED if ignore_index is None else ignore_index
    call = _checked(
        (x, weight, target, bias, class_weight),
        backend,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        return_lse,
        return_argmax,
        loss_is_wide,
    )
    rows, classes, lead = x, target, x.shape[:-1]
    if len(lead) != 1:
        rows, classes = x.reshape(-1, x.shape[-1]), target.reshape(-1)

    def check(*_: Any, **__: Any) -> None:  # the targets as they came: errors name their places
        _check_values(x, weight, target, ignore_index=ignore_index)

    loss, lse, argmax = call.outputs((rows, weight, classes, bias, class_weight), check=check)
    loss_dtype = _loss_dtype(x, loss_is_wide)
    loss = loss if loss.dtype == loss_dtype else loss.to(loss_dtype)
    outputs = (
        loss.reshape(lead) if reduction == "none" else loss,
        *((lse.reshape(lead),) if return_lse else ()),
        *((argmax.reshape(lead),) if return_argmax else ()),
    )
    return outputs if len(outputs) > 1 else outputs[0]


def _loss_dtype(x: Tensor, is_wide: bool) -> torch.dtype:
    """That of x unless it `is_wide`: autocast has torch's cross_entropy take float32."""
    return torch.promote_types(x.dtype, torch.float32) if is_wide else x.dtype
