"""A linear layer under a cross-entropy on a GPU.

    z_i = W x_i + b        lse_i = log sum_c exp(z_ic)        log p_ic = z_ic - lse_i
    l_i = -(1 - s) w_t log p_it - s / V sum_c w_c log p_ic,    t = target_i

Forward, each tile of logits stays in registers and leaves its row maxima and sums; a second kernel
adds those up by rows. Where gradients are wanted, the logits of a chunk of rows are stored,
in the dtype of x, and turn into their gradients in place; then dx = dz W, and dW += dz^T x:
three products in all, the fewest there can be. Chunks have so many rows that reading and writing dW
once for each costs little. Every sum is made in one order, so two runs agree bit for bit.

Each row's softmax is kept as its highest logit and log sum_c exp(z_c - highest): their sum, lse,
would round away what is left of the loss of a row that is sure of its target.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common, _configs
from ._common import LAUNCH, TRITON_DTYPES, capability, compute_dtype, to_storage
from ._launch import Call, launch, once
from ._product import (
    can_describe,
    columns,
    deep_product,
    operands,
    product,
    programs,
    tile_of,
    tile_product,
    turns,
)

DTYPES = _common.DTYPES
FEATURES = frozenset({"ahead"})

Maybe = Tensor | None

_OUT_OF_RANGE = "linear_cross_entropy: `target` must be from 0 to V - 1 or ignore_index"


@triton.jit
def linear_cross_entropy_targets_kernel(
    target_ptr,  # [N]
    class_weight_ptr,  # [V]
    rate_ptr,  # [N], written: 1 in rows that count, else 0
    numbers_ptr,  # [3], written: how many they are, the sum of their weights, one over that sum
    valid_ptr,  # one number, written: 0 if a target is out of range, else 1
    N,
    V,
    ignore_index,
    ACC: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: rows are few beside what their logits take."""
    at = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], ACC)
    weights = tl.zeros([BLOCK], ACC)
    valid = tl.full([BLOCK], 1, tl.int32)
    for first in range(0, N, BLOCK):
        rows = first + at
        rows_ok = rows < N
        target = tl.load(target_ptr + rows, mask=rows_ok, other=0)
        counted = rows_ok & (target != ignore_index)
        known = (target >= 0) & (target < V)
        valid = tl.where(counted & ~known, 0, valid)
        one = tl.where(counted, 1.0, 0.0).to(ACC)
        tl.store(rate_ptr + rows, one, mask=rows_ok)
        counts += one
        if HAS_CLASS_WEIGHT:
            weights += tl.load(class_weight_ptr + target, mask=counted & known, other=0.0).to(ACC)
    count = tl.sum(counts, 0)
    divisor = count
    if HAS_CLASS_WEIGHT:
        divisor = tl.sum(weights, 0)
    tl.store(numbers_ptr, count)
    tl.store(numbers_ptr + 1, divisor)
    tl.store(numbers_ptr + 2, tl.where(count > 0, 1 / tl.where(count > 0, divisor, 1.0), 0.0))
    tl.store(valid_ptr, tl.min(valid, 0))


@triton.jit
def linear_cross_entropy_logits_kernel(
    x,  # [N, H], see tile_product
    weight,  # [H, V], the transpose
    bias_ptr,  # [V]
    class_weight_ptr,  # [V]
    target_ptr,  # [N]
    z,  # [N, V], a pointer or a descriptor; written where STORE
    hit_ptr,  # [N], the logit of the target
    highest_ptr,  # [tiles of V, N], and so the next three
    total_ptr,  # sums of exp(z - highest)
    weighted_ptr,  # sums of w_c z_c
    argmax_ptr,
    N,
    V,
    H,
    stride_xn,
    stride_xh,
    stride_wh,
    stride_wv,
    stride_z,
    STORAGE: tl.constexpr,  # dtype of the logits
    ACC: tl.constexpr,
    DESCRIBED: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    SMOOTH: tl.constexpr,
    ARGMAX: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a tile at a time, whose sums go together
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
):
    start, end, step = turns(N, V, BLOCK_M, BLOCK_N, FLAT)
    for turn in tl.range(start, end, step, flatten=FLAT):
        n, first_v = tile_of(turn, N, V, BLOCK_M, BLOCK_N, GROUP_M)
        tile = tile_product(
            tl.zeros([BLOCK_M, BLOCK_N], ACC),
            x,
            weight,
            n,
            first_v,
            0,
            H,
            N,
            V,
            stride_xn,
            stride_xh,
            stride_wh,
            stride_wv,
            DESCRIBED,
            A_TURNED,
            B_TURNED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        rows = n + tl.arange(0, BLOCK_M)
        rows_ok = rows < N
        parts = columns(tile, BLOCK_N // COLUMNS)  # one after the other, for the registers
        for part in tl.static_range(BLOCK_N // COLUMNS):
            tile = parts[part]
            v = first_v + part * COLUMNS
            at = tl.arange(0, COLUMNS)
            cols = v + at
            cols_ok = at < V - v
            if HAS_BIAS:
                tile += tl.load(bias_ptr + cols, mask=cols_ok, other=0.0).to(ACC)[None, :]
            # The sums are those of the logits that backward will see: else its probabilities would
            # not add up to one.
            rounded = to_storage(tile, STORAGE)
            tile = rounded.to(ACC)
            if STORE:
                if DESCRIBED:
                    z.store([n, v], rounded)
                else:
                    z_ptrs = z + rows.to(tl.int64)[:, None] * stride_z + cols[None, :]
                    tl.store(z_ptrs, rounded, mask=rows_ok[:, None] & cols_ok[None, :])
            if SUMS:
                here = (v // COLUMNS).to(tl.int64) * N + rows
                if SMOOTH:
                    weighted = tl.where(cols_ok[None, :], tile, 0.0)
                    if HAS_CLASS_WEIGHT:
                        w = tl.load(class_weight_ptr + cols, mask=cols_ok, other=0.0).to(ACC)
                        weighted = tl.where(cols_ok[None, :], tile * w[None, :], 0.0)
                    tl.store(weighted_ptr + here, tl.sum(weighted, 1), mask=rows_ok)
                # 32 bits tell targets apart; only one that is ignored may have more
                target = tl.load(target_ptr + rows, mask=rows_ok, other=-1).to(tl.int32) - v
                hit = tl.sum(tl.where(at[None, :] == target[:, None], tile, 0.0), 1)
                mine = rows_ok & (target >= 0) & (target < tl.minimum(COLUMNS, V - v))
                tl.store(hit_ptr + rows, hit, mask=mine)
                tile = tl.where(cols_ok[None, :], tile, float("-inf"))
                highest = tl.max(tile, 1)
                if ARGMAX:
                    # tl.argmax would carry a second tile, of numbers
                    first = tl.min(tl.where(tile == highest[:, None], cols[None, :], V), 1)
                    tl.store(argmax_ptr + here, first, mask=rows_ok)
                # where all are -inf, -inf - -inf would be NaN
                anchor = tl.where(highest == float("-inf"), 0.0, highest)
                total = tl.sum(tl.exp(tile - anchor[:, None]), 1)
                tl.store(highest_ptr + here, highest, mask=rows_ok)
                tl.store(total_ptr + here, total, mask=rows_ok)


@triton.jit
def linear_cross_entropy_rows_kernel(
    hit_ptr,  # [N]
    highest_ptr,  # [tiles, N], and so the next three
    total_ptr,
    weighted_ptr,
    argmax_tiles_ptr,
    target_ptr,  # [N]
    class_weight_ptr,  # [V]
    sum_weight_ptr,  # one number, the sum of all class weights
    softmax_ptr,  # [2, N], written
    loss_ptr,  # [N], written, and so the next
    argmax_ptr,
    N,
    V,
    tiles,
    ignore_index,
    smoothing: tl.float64,
    stride_softmax,
    ACC: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = rows < N
    highest = tl.full([BLOCK_R], float("-inf"), ACC)
    total = tl.zeros([BLOCK_R], ACC)
    weighted = tl.zeros([BLOCK_R], ACC)
    best = tl.zeros([BLOCK_R], tl.int64)
    for first in range(0, tiles, BLOCK_V):
        tile = first + tl.arange(0, BLOCK_V)
        here = tile[:, None].to(tl.int64) * N + rows[None, :]
        ok = (tile < tiles)[:, None] & rows_ok[None, :]
        tops = tl.load(highest_ptr + here, mask=ok, other=float("-inf"))
        totals = tl.load(total_ptr + here, mask=ok, other=0.0)
        top = tl.max(tops, 0)
        if ARGMAX:
            words = tl.load(argmax_tiles_ptr + here, mask=ok, other=0)
            chosen = (tl.arange(0, BLOCK_V)[:, None] == tl.argmax(tops, 0)[None, :]) & ok
            found = tl.sum(tl.where(chosen, words, 0), 0)
            best = tl.where(top > highest, found, best)  # of equals, the first
        if SMOOTH:
            weighted += tl.sum(tl.load(weighted_ptr + here, mask=ok, other=0.0), 0)
        highest_now = tl.maximum(highest, top)
        anchor = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        fresh = tl.sum(totals * tl.exp(tops - anchor[None, :]), 0)
        total = total * tl.exp(highest - anchor) + fresh
        highest = highest_now
    highest = tl.where(rows_ok, highest, 0.0)
    log_total = tl.log(tl.where(rows_ok, total, 1.0))
    tl.store(softmax_ptr + rows, highest, mask=rows_ok)
    tl.store(softmax_ptr + stride_softmax + rows, log_total, mask=rows_ok)
    if ARGMAX:
        tl.store(argmax_ptr + rows, best, mask=rows_ok)

    target = tl.load(target_ptr + rows, mask=rows_ok, other=0)
    counted = rows_ok & (target != ignore_index)
    s = tl.full([], smoothing, ACC)
    loss = log_total - (tl.load(hit_ptr + rows, mask=counted, other=0.0) - highest)
    if HAS_CLASS_WEIGHT:
        loss *= tl.load(class_weight_ptr + target, mask=counted, other=0.0).to(ACC)
    if SMOOTH:
        sum_weight = tl.cast(V, ACC)
        if HAS_CLASS_WEIGHT:
            sum_weight = tl.load(sum_weight_ptr)
        even = sum_weight * (highest + log_total) - weighted
        loss = (1 - s) * loss + s / V * even
    tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0), mask=rows_ok)


@triton.jit
def linear_cross_entropy_gradient_kernel(
    z_ptr,  # [N, V], logits, which become their gradients
    softmax_ptr,  # [2, N]
    target_ptr,  # [N]
    class_weight_ptr,  # [V]
    sum_weight_ptr,  # one number
    rate_ptr,  # [N], of the loss, 0 in rows that do not count
    lse_rate_ptr,  # [N], of half the squared lse
    dlse_ptr,  # [N]
    dbias_ptr,  # [splits, V], written
    N,
    V,
    smoothing: tl.float64,
    stride_z,
    stride_softmax,
    ACC: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_LSE_RATE: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dz_c = (u a + lse_rate lse + dlse) p_c - u ((1 - s) w_t [c = t] + s / V w_c), u the rate,
    a = (1 - s) w_t + s / V sum_c w_c."""
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(1)
    cols_ok = (cols < V)[None, :]
    s = tl.full([], smoothing, ACC)
    even = tl.zeros([BLOCK_V], ACC) + s / V
    all_even = s
    if HAS_CLASS_WEIGHT:
        even *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0).to(ACC)
        all_even = s / V * tl.load(sum_weight_ptr)
    dbias = tl.zeros([BLOCK_V], ACC)
    first = split * SPLIT
    for row in range(first, tl.minimum(N, first + SPLIT), BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        rows_ok = rows < N
        rate = tl.load(rate_ptr + rows, mask=rows_ok, other=0.0)
        target = tl.load(target_ptr + rows, mask=rows_ok & (rate != 0), other=-1)
        hit = rate * (1 - s)
        if HAS_CLASS_WEIGHT:
            hit *= tl.load(class_weight_ptr + target, mask=target >= 0, other=0.0).to(ACC)
        highest = tl.load(softmax_ptr + rows, mask=rows_ok, other=0.0)
        log_total = tl.load(softmax_ptr + stride_softmax + rows, mask=rows_ok, other=0.0)
        factor = hit + rate * all_even
        if HAS_LSE_RATE:
            factor += tl.load(lse_rate_ptr + rows, mask=rows_ok, other=0.0) * (highest + log_total)
        if HAS_DLSE:
            factor += tl.load(dlse_ptr + rows, mask=rows_ok, other=0.0)
        z_ptrs = z_ptr + rows.to(tl.int64)[:, None] * stride_z + cols[None, :]
        inside = rows_ok[:, None] & cols_ok
        z = tl.load(z_ptrs, mask=inside, other=0.0).to(ACC)
        p = tl.exp((z - highest[:, None]) - log_total[:, None])
        dz = factor[:, None] * p - rate[:, None] * even[None, :]
        dz -= tl.where(cols[None, :] == target[:, None], hit[:, None], 0.0)
        if HAS_DBIAS:
            dbias += tl.sum(tl.where(rows_ok[:, None], dz, 0.0), 0)
        tl.store(z_ptrs, to_storage(dz, z_ptr.dtype.element_ty), mask=inside)
    if HAS_DBIAS:
        tl.store(dbias_ptr + split.to(tl.int64) * V + cols, dbias, mask=cols < V)


@triton.jit
def linear_cross_entropy_scale_kernel(grad_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    """grad *= scale; nothing where that is 1, which the host does not wait to see."""
    scale = tl.load(scale_ptr)
    if scale != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < size)
        scaled = to_storage(grad.to(scale.dtype) * scale, grad.dtype)
        tl.store(grad_ptr + at, scaled, mask=at < size)


def _targets_plan(
    target: Tensor,
    class_weight: Maybe,
    rate: Tensor,
    numbers: Tensor,
    valid: Tensor,
    V: int,
    ignore_index: int,
) -> Call:
    args = (target, class_weight, rate, numbers, valid, target.shape[0], V, ignore_index)
    constants = {
        "ACC": TRITON_DTYPES[rate.dtype],
        "HAS_CLASS_WEIGHT": class_weight is not None,
        "BLOCK": _configs.LOSS_TARGETS.block_r,
        "num_warps": _configs.LOSS_TARGETS.num_warps,
        **LAUNCH,
    }
    return Call(linear_cross_entropy_targets_kernel, (1,), args, constants)


def _logits_plan(
    x: Tensor,
    weight: Tensor,  # [H, V]
    bias: Maybe,
    class_weight: Maybe,
    target: Tensor,
    z: Maybe,
    hit: Maybe,
    highest: Maybe,
    total: Maybe,
    weighted: Maybe,
    argmax: Maybe,
    crowded: bool,
) -> Call:
    (N, H), V = x.shape, weight.shape[1]
    (a, b, *written), constants = _logits_operands(x, weight, z, crowded)
    args = (
        a,
        b,
        bias,
        class_weight,
        target,
        *(written or [None]),
        hit,
        highest,
        total,
        weighted,
        argmax,
        N,
        V,
        H,
        *x.stride(),
        *weight.stride(),
        0 if z is None else z.stride(0),
    )
    constants |= {
        "STORAGE": TRITON_DTYPES[x.dtype],
        "HAS_BIAS": bias is not None,
        "HAS_CLASS_WEIGHT": class_weight is not None,
        "SUMS": hit is not None,
        "SMOOTH": weighted is not None,
        "ARGMAX": argmax is not None,
        "STORE": z is not None,
    }
    grid = (programs(x.device, N, V, constants),)
    return Call(linear_cross_entropy_logits_kernel, grid, args, constants)


def _logits_operands(
    x: Tensor, weight: Tensor, z: Maybe, crowded: bool
) -> tuple[list[Any], dict[str, Any]]:
    """`operands`, and how many columns of a tile are worked on at once."""
    written = () if z is None else (z,)
    given, constants = operands(x, weight, *written, crowded=crowded, columns=_configs.LOSS_COLUMNS)
    return given, constants | {"COLUMNS": min(constants["BLOCK_N"], _configs.LOSS_COLUMNS)}


def _tiles(x: Tensor, weight: Tensor, z: Maybe, crowded: bool) -> int:
    """How many pieces of a row `_logits_plan` has side by side; the last may lie past V, empty."""
    _, constants = _logits_operands(x, weight, z, crowded)
    parts = constants["BLOCK_N"] // constants["COLUMNS"]
    return _common.cdiv(weight.shape[1], constants["BLOCK_N"]) * parts


def _rows_plan(
    hit: Tensor,
    highest: Tensor,
    total: Tensor,
    weighted: Maybe,
    argmax_tiles: Maybe,
    target: Tensor,
    class_weight: Maybe,
    sum_weight: Maybe,
    softmax: Tensor,
    loss: Tensor,
    argmax: Maybe,
    V: int,
    ignore_index: int,
    smoothing: float,
) -> Call:
    tiles, N = highest.shape
    config = _configs.LOSS_SUMS
    args = (
        hit,
        highest,
        total,
        weighted,
        argmax_tiles,
        target,
        class_weight,
        sum_weight,
        softmax,
        loss,
        argmax,
        N,
        V,
        tiles,
        ignore_index,
        smoothing,
        softmax.stride(0),
    )
    constants = {
        "ACC": TRITON_DTYPES[softmax.dtype],
        "HAS_CLASS_WEIGHT": class_weight is not None,
        "SMOOTH": smoothing > 0,
        "ARGMAX": argmax is not None,
        "BLOCK_R": config.block_r,
        "BLOCK_V": config.block_v,
        "num_warps": config.num_warps,
        **LAUNCH,
    }
    grid = (_common.cdiv(N, config.block_r),)
    return Call(linear_cross_entropy_rows_kernel, grid, args, constants)


def _gradient_plan(
    z: Tensor,
    softmax: Tensor,
    target: Tensor,
    class_weight: Maybe,
    sum_weight: Maybe,
    rate: Tensor,
    lse_rate: Maybe,
    dlse: Maybe,
    dbias: Maybe,
    smoothing: float,
) -> Call:
    N, V = z.shape
    config = _configs.LOSS_GRADIENT[_configs.storage(z.dtype)]
    args = (
        z,
        softmax,
        target,
        class_weight,
        sum_weight,
        rate,
        lse_rate,
        dlse,
        dbias,
        N,
        V,
        smoothing,
        z.stride(0),
        softmax.stride(0),
    )
    constants = {
        "ACC": TRITON_DTYPES[softmax.dtype],
        "HAS_CLASS_WEIGHT": class_weight is not None,
        "HAS_LSE_RATE": lse_rate is not None,
        "HAS_DLSE": dlse is not None,
        "HAS_DBIAS": dbias is not None,
        "BLOCK_R": config.block_r,
        "BLOCK_V": config.block_v,
        "SPLIT": _configs.LOSS_SPLIT,
        "num_warps": config.num_warps,
        **LAUNCH,
    }
    grid = (_common.cdiv(V, config.block_v), _common.cdiv(N, _configs.LOSS_SPLIT))
    return Call(linear_cross_entropy_gradient_kernel, grid, args, constants)


def _scale_plan(grad: Tensor, scale: Tensor) -> Call:
    block = 4096
    args, constants = (grad, scale, grad.numel()), {"BLOCK": block, "num_warps": 8, **LAUNCH}
    grid = (_common.cdiv(grad.numel(), block),)
    return Call(linear_cross_entropy_scale_kernel, grid, args, constants)


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Maybe,
    class_weight: Maybe,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    return_argmax: bool,
    keep: bool = True,
    ahead: tuple[bool, ...] = (),
) -> tuple[tuple[Maybe, ...], tuple[Maybe, ...]]:
    """The loss.

    Args:
        x: [N, H].
        weight: [V, H].
        target: [N], int64.
        bias: [V], or None.
        class_weight: [V], or None for ones.
        ignore_index: the target of rows that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: s.
        z_loss: what multiplies the squares of the lse.
        return_lse, return_argmax: whether these outputs are wanted.
        ahead: which of the five gradients are to be made for an upstream gradient of 1; none if ().

    Returns:
        ``((loss, lse [N] or None, argmax [N] or None), saved)``; the loss is a number or [N], in
        float32 (float64 for float64), as is the lse. With `ahead` the gradients of x, weight and
        bias stand behind what is saved.
    """
    inputs = (x, weight, target, bias, class_weight)
    call = _Call(inputs, ignore_index, reduction, label_smoothing, z_loss)
    softmax, rows = call.per_row(2), call.per_row()
    argmax = torch.empty_like(call.target) if return_argmax else None
    made: tuple[Maybe, ...] = ()
    if ahead:
        made = call.gradients_of_one(softmax, ahead, (rows, argmax))
    else:
        call.sums(None, softmax, (rows, argmax))
    lse = softmax.sum(0) if return_lse or z_loss else None
    loss = rows.sum() / call.divisor if reduction == "mean" else rows
    if z_loss:
        squares = z_loss * lse.masked_fill(~call.counted, 0) ** 2
        loss = loss + (squares.sum() / call.count if reduction == "mean" else squares)
    loss = loss.sum() if reduction == "sum" else loss
    return (loss, lse if return_lse else None, argmax), (*inputs, softmax, *made)


def linear_cross_entropy_scale(made: Sequence[Maybe], dloss: Tensor) -> None:
    """Multiplies gradients made ahead by the upstream gradient, which the host need not know."""
    for grad in made:
        if grad is not None and grad.numel() > 0:
            launch(_scale_plan, (grad, dloss))


def linear_cross_entropy_extras(x: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """Room for what `linear_cross_entropy_fwd` saves behind its tensors: softmax [2, N]."""
    return (x.new_empty(2, x.shape[0], dtype=compute_dtype(x.dtype)),)


def linear_cross_entropy_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    **_: Any,
) -> tuple[Maybe, ...]:
    """The gradients of x, weight and bias.

    Args:
        saved: what `linear_cross_entropy_fwd` returned: its five tensors, then softmax [2, N].
        grads: (dloss, dlse [N], of no meaning), None for zeros.
        needs: which of the five gradients are wanted.
        ignore_index, reduction, label_smoothing, z_loss: as in `linear_cross_entropy_fwd`.

    Returns:
        ``(dx, dweight, None, dbias, None)``, None where not wanted.
    """
    *inputs, softmax = saved
    dloss, dlse, _ = grads
    call = _Call(inputs, ignore_index, reduction, label_smoothing, z_loss)
    made = call.gradients(softmax, dloss, dlse, needs)
    dx, dw, db = (None if grad is None else grad.to(inputs[0].dtype) for grad in made)
    return dx, dw, None, db, None


def _rows(tensor: Maybe, at: slice | None) -> Maybe:
    """The rows `at`, all without it: a view takes the host as long as a kernel."""
    return tensor if tensor is None or at is None else tensor[at]


class _Call:
    """What both passes make of the arguments; numbers are of the dtype of the arithmetic."""

    def __init__(
        self,
        inputs: tuple[Maybe, ...],
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
    ) -> None:
        self.x, self.weight, target, bias, class_weight = inputs
        self.bias, self.class_weight = (
            None if t is None else t.contiguous() for t in (bias, class_weight)
        )
        self.dtype = compute_dtype(self.x.dtype)
        # float16 has not the range of a gradient whose upstream gradient is yet to come
        self.held = self.dtype if self.x.dtype == torch.float16 else self.x.dtype
        self.target = target.contiguous()
        self.ignore_index, self.mean = ignore_index, reduction == "mean"
        self.smoothing, self.z_loss = label_smoothing, z_loss
        self.sum_weight = None
        if class_weight is not None:
            self.sum_weight = class_weight.sum(dtype=torch.float64).to(self.dtype)
        self.unit_rate = self.per_row()  # 1 in rows that count, else 0
        numbers, valid = self.unit_rate.new_empty(3), self.target.new_empty((), dtype=torch.int32)
        own = (self.target, self.class_weight, self.unit_rate, numbers, valid)
        launch(_targets_plan, own, self.weight.shape[0], ignore_index)
        self.count, self.divisor, self.inverse = numbers.unbind()
        # A target out of range stops the device before a kernel reads what it points to. The host,
        # which would have to wait for the answer, does not look.
        torch._assert_async(valid, _OUT_OF_RANGE)

    @functools.cached_property
    def counted(self) -> Tensor:
        """[N], whether a row counts."""
        return self.target != self.ignore_index

    def per_row(self, *lead: int) -> Tensor:
        """Room for a number, or several, for each row."""
        return torch.empty(*lead, len(self.x), dtype=self.dtype, device=self.x.device)

    def gradients_of_one(
        self, softmax: Tensor, needs: tuple[bool, ...], outputs: tuple[Tensor, Maybe]
    ) -> tuple[Maybe, ...]:
        """dx, dweight and dbias of the loss alone, for an upstream gradient of 1.

        The division of the mean comes last, as float16 may have no number so small for one row.
        """
        rate = self.unit_rate
        if not self.mean:
            return self._gradients(softmax, rate, rate, None, None, needs, outputs)
        z_rate = torch.where(self.counted, self.divisor / self.count, 0) if self.z_loss else None
        return self._gradients(softmax, rate, z_rate, None, self.inverse, needs, outputs)

    def gradients(
        self, softmax: Tensor, dloss: Maybe, dlse: Maybe, needs: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        """dx, dweight and dbias from any upstream gradients."""
        dloss = softmax.new_zeros(()) if dloss is None else dloss
        rate = torch.where(self.counted, dloss / self.divisor if self.mean else dloss, 0)
        z_rate = None
        if self.z_loss:
            z_rate = torch.where(self.counted, dloss / self.count if self.mean else dloss, 0)
        return self._gradients(softmax, rate, z_rate, dlse, None, needs)

    def _gradients(
        self,
        softmax: Tensor,  # [2, N], written where there are outputs
        rate: Tensor,  # [N], of the loss
        z_rate: Maybe,  # [N], of the squared lse
        dlse: Maybe,  # [N]
        scale: Maybe,  # what multiplies all gradients, a number
        needs: tuple[bool, ...],
        outputs: tuple[Tensor, Maybe] | None = None,  # as in `sums`
    ) -> tuple[Maybe, ...]:
        (N, H), V = self.x.shape, len(self.weight)
        lse_rate = 2 * self.z_loss * z_rate if self.z_loss else None
        dlse = None if dlse is None else dlse.contiguous()
        parts = _parts(N, H, exact=self.held == self.dtype)
        fill = self.x.new_empty if N else self.x.new_zeros  # no row adds nothing to them
        # rows start at multiples of 16 bytes, as descriptors want
        room = self.x.new_empty(max(map(len, parts), default=0), _common.cdiv(V, 16) * 16)
        dx = fill(N, H, dtype=self.held) if needs[0] else None
        dw = fill(V, H, dtype=self.held) if needs[1] else None
        rest = None
        if needs[1] and len(parts) > 1 and self.held != self.dtype:
            if can_describe(room[:, :V].t(), self.x[: len(room)], dw):
                rest = torch.empty_like(dw)
            else:
                dw = fill(V, H, dtype=self.dtype)
        db = []
        for part in parts:
            at = None if len(part) == N else slice(part.start, part.stop)
            z = room[: len(part), :V]
            if outputs is None:
                self._logits(at, z)
            else:
                self.sums(at, softmax, outputs, z)
            db.append(self._to_gradients(z, at, softmax, (rate, lse_rate, dlse), needs[3]))
            if needs[0]:
                deep_product(z, self.weight, _rows(dx, at), scale)
            if needs[1]:
                final = part.stop == N
                product(
                    z.t(),
                    _rows(self.x, at),
                    dw,
                    scale=scale if final else None,
                    rest=rest,
                    add=part.start > 0,
                    final=final,
                )
        dbias = None
        if needs[3]:
            dbias = torch.cat(db).sum(0) if N else self.x.new_zeros(V, dtype=self.dtype)
            dbias = dbias if scale is None else dbias * scale
        return dx, dw, dbias

    def sums(
        self,
        at: slice | None,
        softmax: Tensor,  # [2, N]
        outputs: tuple[Tensor, Maybe],  # the loss of each row, the arg-max [N]
        z: Maybe = None,  # [rows, V], also written
    ) -> None:
        """What forward keeps of the logits of the rows `at`."""
        loss, argmax = (_rows(t, at) for t in outputs)
        if len(loss) == 0:
            return
        softmax = softmax if at is None else softmax[:, at]
        target = _rows(self.target, at)
        found = self._logits(at, z, True, argmax is not None)
        own = (target, self.class_weight, self.sum_weight, softmax, loss, argmax)
        launch(_rows_plan, (*found, *own), self.weight.shape[0], self.ignore_index, self.smoothing)

    def _logits(
        self, at: slice | None, z: Maybe, sums: bool = False, argmax: bool = False
    ) -> tuple[Maybe, ...]:
        """The logits of the rows `at` into z; with `sums` also what their tiles leave.

        Returns:
            hit [rows], then [tiles, rows] each: highest, total, weighted, arg-max.
        """
        x, weight = _rows(self.x, at), self.weight.t()
        rows = len(x)
        smooth = sums and self.smoothing > 0
        # on sm_100 the sums and the logits to store are too many for the registers already
        full = sums and (self.bias is not None or (z is not None and capability(x.device) >= 100))
        crowded = smooth or argmax or full
        tiles = once(_tiles, (x, weight, z), crowded)

        def room(wanted: bool, *shape: int, dtype: torch.dtype = self.dtype) -> Maybe:
            return x.new_empty(shape, dtype=dtype) if wanted else None

        found = (
            room(sums, rows),
            room(sums, tiles, rows),
            room(sums, tiles, rows),
            room(smooth, tiles, rows),
            room(argmax, tiles, rows, dtype=torch.int32),
        )
        own = (x, weight, self.bias, self.class_weight, _rows(self.target, at), z)
        launch(_logits_plan, (*own, *found), crowded)
        return found

    def _to_gradients(
        self,
        z: Tensor,  # [rows, V], written
        at: slice | None,
        softmax: Tensor,  # [2, N]
        rates: tuple[Tensor, Maybe, Maybe],  # rate, lse_rate, dlse [N]
        sums: bool,
    ) -> Maybe:
        """The logits of the rows `at` become their gradients; with `sums` their [splits, V]."""
        splits = _common.cdiv(len(z), _configs.LOSS_SPLIT)
        dbias = self.x.new_empty(splits, z.shape[1], dtype=self.dtype) if sums else None
        softmax = softmax if at is None else softmax[:, at]
        own = (softmax, _rows(self.target, at), self.class_weight, self.sum_weight)
        own = (*own, *(_rows(rate, at) for rate in rates))
        launch(_gradient_plan, (z, *own, dbias), self.smoothing)
        return dbias


def _parts(N: int, H: int, exact: bool) -> list[range]:
    """Chunks of rows, of about the same size; see `_configs.LOSS_ROWS`.

    Not `exact`: sums over chunks keep as much again as the weight, [V, H], beside its gradient.
    Where the logits of all rows take no more than that and one chunk's, one chunk is all.
    """
    count = _common.cdiv(N, max(_configs.LOSS_ROWS, H))
    rows = _common.cdiv(N, 128 * max(count, 1)) * 128
    if not exact and N - rows <= H:
        rows = N
    return [range(start, min(N, start + rows)) for start in range(0, N, max(rows, 1))]
