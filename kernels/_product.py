"""The large matrix products around a recurrence: C = A B + bias, all time steps at once.

Written here rather than left to torch.matmul for three reasons: float32 stays float32 whatever
torch.backends.cuda.matmul.allow_tf32 says; 16-bit operands leave their float32 sums unrounded for
the time loop to add to; and Triton's interpreter proves the value without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._common import (
    LAUNCH,
    TRITON_DTYPES,
    compute_dtype,
    dot,
    load_tile,
    on_device_of,
    to_storage,
)


@triton.jit
def product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    bias0_ptr,  # [N]
    bias1_ptr,  # [N]
    c_ptr,  # [splits, M, N], each split M rows on; each sums its own rows of K
    M,
    N,
    K,
    split_k,  # rows of K a split, a multiple of BLOCK_K
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    ACC: tl.constexpr,
    HAS_BIAS0: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs next to each other share columns of B for GROUP_M rows of tiles: both stay in L2.
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    band_rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    tile_m = band * GROUP_M + within % band_rows
    tile_n = within // band_rows

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = (rows < M)[:, None]
    cols_ok = (cols < N)[None, :]
    ks = tl.arange(0, BLOCK_K)
    first = split * split_k
    last = tl.minimum(K, first + split_k)
    stride_ak = tl.cast(stride_ak, tl.int64)  # one step along K may pass 2^31
    stride_bk = tl.cast(stride_bk, tl.int64)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_am + (first + ks)[None, :] * stride_ak
    b_ptrs = b_ptr + (first + ks)[:, None] * stride_bk + cols[None, :].to(tl.int64) * stride_bn

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(first, last, BLOCK_K):
        k_ok = k + ks < last
        a = load_tile(a_ptrs, rows_ok, k_ok[None, :], True, True)
        b = load_tile(b_ptrs, k_ok[:, None], cols_ok, True, True)
        acc = dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk

    if HAS_BIAS0:
        acc += tl.load(bias0_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    if HAS_BIAS1:
        acc += tl.load(bias1_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    row_of_c = split.to(tl.int64) * M + rows
    c_ptrs = c_ptr + row_of_c[:, None] * stride_cm + cols[None, :]
    tl.store(c_ptrs, to_storage(acc, c_ptr.dtype.element_ty), mask=rows_ok & cols_ok)


def _launch(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    split_k: int,
    bias0: Tensor | None = None,
    bias1: Tensor | None = None,
) -> None:
    splits, M, N = c.shape
    K = a.shape[1]
    if c.numel() == 0:
        return
    config = _configs.product(a.dtype, M)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    with on_device_of(a):
        product_kernel[(tiles, splits)](
            a,
            b,
            bias0,
            bias1,
            c,
            M,
            N,
            K,
            split_k,
            *a.stride(),
            *b.stride(),
            c.stride(1),
            ACC=TRITON_DTYPES[compute_dtype(a.dtype)],
            HAS_BIAS0=bias0 is not None,
            HAS_BIAS1=bias1 is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **LAUNCH,
        )


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias0: Tensor | None = None,
    bias1: Tensor | None = None,
) -> Tensor:
    """``out = a @ b + bias0 + bias1``, summed in the compute dtype and rounded once.

    Args:
        a: [M, K], any strides.
        b: [K, N], any strides.
        out: [M, N], each row contiguous.
        bias0, bias1: [N], contiguous, or None.
    """
    _launch(a, b, out[None], a.shape[1], bias0, bias1)
    return out


def long_product(pairs: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """``sum of a @ b over pairs``, where K is much longer than M and N: [M, N] as `like`.

    Each product is split along K over programs of their own, and the partial results are added in
    a fixed order: no atomics, so two runs agree bit for bit.

    Args:
        pairs: a [M, K], b [K, N], any strides; K may differ between pairs and be 0.
        like: a tensor [M, N] that gives shape, dtype and device.
    """
    M, N = like.shape
    config = _configs.product(like.dtype, M)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    plan = []
    for a, b in pairs:
        K = a.shape[1]
        splits = max(
            triton.cdiv(K, _configs.SPLIT_MOST),
            triton.cdiv(_configs.SPLIT_PROGRAMS, tiles),
        )
        splits = min(splits, triton.cdiv(K, _configs.SPLIT_LEAST), _configs.SPLITS)
        split_k = triton.cdiv(triton.cdiv(K, max(splits, 1)), config.block_k) * config.block_k
        if K > 0:
            plan.append((a, b, split_k, triton.cdiv(K, split_k)))
    total = sum(splits for *_, splits in plan)
    partial = torch.empty(total, M, N, dtype=compute_dtype(like.dtype), device=like.device)
    start = 0
    for a, b, split_k, splits in plan:
        _launch(a, b, partial[start : start + splits], split_k)
        start += splits
    return partial.sum(0).to(like.dtype)
