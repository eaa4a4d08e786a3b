"""A linear layer under a cross-entropy, and its gradient, as the textbook writes them.

    z_i = W x_i + b        lse_i = log sum_c exp(z_ic)        log p_ic = z_ic - lse_i
    l_i = -(1 - s) w_t log p_it - s / V sum_c w_c log p_ic,    t = target_i

with class weights w and label smoothing s (C. Szegedy et al., "Rethinking the Inception
architecture for computer vision", 2016), as ``torch.nn.functional.cross_entropy`` has it: rows
whose target is `ignore_index` count for nothing, and the mean divides by the sum of their w_t. A
z-loss adds z_loss * lse_i^2 (A. Chowdhery et al., "PaLM", 2022), whose mean is over the rows that
count. The whole [N, V] matrix is built. Axes: N rows, H hidden, V vocabulary.
"""

import torch
from torch.nn.functional import linear

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES = frozenset()


def linear_cross_entropy(
    x,
    weight,
    target,
    bias=None,
    class_weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
):
    """``loss`` (a number, or [N]), ``lse [N]`` and ``argmax [N]`` for ``x [N, H]``.

    Differentiable by autograd.
    """
    z = linear(x, weight, bias)
    w, t, counted = classes(z, target, class_weight, ignore_index)
    log_p, lse = torch.log_softmax(z, -1), torch.logsumexp(z.to(wide(z)), -1)
    rows = -w[t] * log_p.gather(-1, t[:, None])[:, 0]
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing / z.shape[-1] * (log_p * w).sum(-1)
    rows = rows.masked_fill(~counted, 0)
    squares = z_loss * lse.masked_fill(~counted, 0).to(z.dtype) ** 2
    if reduction == "none":
        loss = rows + squares
    elif reduction == "sum":
        loss = (rows + squares).sum()
    else:
        loss = rows.sum() / divisor(w, t, counted)
        loss = loss + squares.sum() / counted.sum() if z_loss else loss
    return loss, lse, z.argmax(-1)


def classes(z, target, class_weight, ignore_index):
    """The weights of all classes, the targets (0 where ignored), and which rows count."""
    w = z.new_ones(z.shape[-1]) if class_weight is None else class_weight.to(z.dtype)
    counted = target != ignore_index
    return w, target.masked_fill(~counted, 0), counted


def divisor(w, t, counted):
    """What the mean divides by: the weights of the targets of all rows that count."""
    return w[t].masked_fill(~counted, 0).sum()


def wide(z):
    """The dtype of a log-sum-exp: float32 at least."""
    return torch.promote_types(z.dtype, torch.float32)


def linear_cross_entropy_fwd(
    x,
    weight,
    target,
    bias,
    class_weight,
    *,
    return_lse,
    return_argmax,
    keep=True,
    **options,
):
    """See `pykernels._backends` for the contract; an output that is not asked for is None."""
    inputs = (x, weight, target, bias, class_weight)
    with torch.no_grad():
        loss, lse, argmax = linear_cross_entropy(*inputs, **options)
    asked = (lse if return_lse else None, argmax if return_argmax else None)
    return (loss.to(wide(x)), *asked), inputs


def linear_cross_entropy_bwd(
    saved,
    grads,
    *,
    needs,
    ignore_index,
    reduction,
    label_smoothing,
    z_loss,
    **_,
):
    """With u_i = dloss, over the divisor for the mean, and 0 in rows that do not count:

    dz_ic = (u_i a_i + 2 z_loss u_i lse_i + dlse_i) p_ic - u_i ((1 - s) w_t [c = t] + s / V w_c)
    a_i = (1 - s) w_t + s / V sum_c w_c
    dx = dz W        dW = dz^T x        db = sum_i dz_i
    """
    x, weight, target, bias, class_weight = saved[:5]
    dloss, dlse, *_ = grads
    z = linear(x, weight, bias)
    w, t, counted = classes(z, target, class_weight, ignore_index)
    dloss = z.new_zeros(()) if dloss is None else dloss.to(z.dtype)
    u = torch.where(counted, dloss, 0)
    u_z = u
    if reduction == "mean":
        u = torch.where(counted, dloss / divisor(w, t, counted), 0)
        u_z = torch.where(counted, dloss / counted.sum(), 0)
    hit, even = u * (1 - label_smoothing) * w[t], u * label_smoothing / z.shape[-1]
    factor = hit + u * (label_smoothing / z.shape[-1] * w).sum()
    if z_loss:
        factor = factor + 2 * z_loss * u_z * torch.logsumexp(z, -1)
    if dlse is not None:
        factor = factor + dlse.to(z.dtype)
    dz = factor[:, None] * torch.softmax(z, -1) - even[:, None] * w
    dz = dz.scatter_add(-1, t[:, None], -hit[:, None])
    return dz @ weight, dz.T @ x, None, dz.sum(0), None
