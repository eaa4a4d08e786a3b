"""Large matrix products, C = A B + bias: those around a recurrence, all time steps at once, and
those of a loss over a large vocabulary.

Written here rather than left to torch.matmul for three reasons: float32 stays float32 whatever
torch.backends.cuda.matmul.allow_tf32 says, on tensor cores too (`_common.dot`); 16-bit operands
leave their float32 sums unrounded for what comes after; and Triton's interpreter proves the value
without a GPU.

Tiles are read through pointers, which know any stride, or through tensor descriptors on chips whose
tensor memory accelerator takes them, from matrices that it can address.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _configs
from ._common import (
    LAUNCH,
    TRITON_DTYPES,
    capability,
    cdiv,
    compute_dtype,
    dot,
    load_tile,
    multiprocessors,
    to_storage,
)
from ._launch import Call, launch, once


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and column of the tile of C [M, N] that is the program's.

    Programs next to each other share columns of B for GROUP_M rows of tiles: both stay in L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    band_rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return (band * GROUP_M + within % band_rows) * BLOCK_M, within // band_rows * BLOCK_N


@triton.jit
def turns(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr):
    """The range of the tiles of C [M, N] that are the program's.

    Where not FLAT the compiler must see that it is one, and that there is no loop.
    """
    tile = tl.program_id(0)
    if FLAT:
        return tile, tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)
    else:
        return tile, tile + 1, 1


@triton.jit
def tile_product(
    acc,  # [BLOCK_M, BLOCK_N]
    a,  # [M, K]: a pointer, or a descriptor of it or its transpose
    b,  # [K, N]: likewise
    m,
    n,
    first,
    last,
    M,
    N,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    DESCRIBED: tl.constexpr,
    A_TURNED: tl.constexpr,  # what is described is the transpose
    B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc` plus rows m ... of A times columns n ... of B, over k in [first, last)."""
    if DESCRIBED:
        for k in range(first, last, BLOCK_K):
            a_tile = a.load([k, m]).T if A_TURNED else a.load([m, k])
            b_tile = b.load([n, k]).T if B_TURNED else b.load([k, n])
            acc = dot(a_tile, b_tile, acc, PRECISION)
    else:
        rows = m + tl.arange(0, BLOCK_M)
        cols = n + tl.arange(0, BLOCK_N)
        rows_ok = (rows < M)[:, None]
        cols_ok = (cols < N)[None, :]
        ks = tl.arange(0, BLOCK_K)
        stride_ak = tl.cast(stride_ak, tl.int64)  # one step along K may pass 2^31
        stride_bk = tl.cast(stride_bk, tl.int64)
        a_ptrs = a + rows[:, None].to(tl.int64) * stride_am + (first + ks)[None, :] * stride_ak
        b_ptrs = b + (first + ks)[:, None] * stride_bk + cols[None, :].to(tl.int64) * stride_bn
        for k in range(first, last, BLOCK_K):
            k_ok = k + ks < last
            a_tile = load_tile(a_ptrs, rows_ok, k_ok[None, :], True, True)
            b_tile = load_tile(b_ptrs, k_ok[:, None], cols_ok, True, True)
            acc = dot(a_tile, b_tile, acc, PRECISION)
            a_ptrs += BLOCK_K * stride_ak
            b_ptrs += BLOCK_K * stride_bk
    return acc


@triton.jit
def columns(tile, PARTS: tl.constexpr):
    """The columns of a tile from left to right, in 1, 2 or 4 parts, each thread's own its own."""
    if PARTS == 1:
        return (tile,)
    else:
        left, right = tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))
        return columns(left, PARTS // 2) + columns(right, PARTS // 2)


@triton.jit
def _tile_ptrs(c, m, n, M, N, stride_cm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to a tile of C, whose own offsets fit 32 bits, and which of them are inside."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < M - m) & (cols < N - n)
    return c + (m.to(tl.int64) * stride_cm + n) + (rows * stride_cm + cols), inside


@triton.jit
def _load_c(
    c,
    m,
    n,
    M,
    N,
    stride_cm,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if DESCRIBED:
        tile = c.load([m, n])
    else:
        ptrs, inside = _tile_ptrs(c, m, n, M, N, stride_cm, BLOCK_M, BLOCK_N)
        tile = tl.load(ptrs, mask=inside, other=0.0)
    return tile


@triton.jit
def _store_c(c, tile, m, n, M, N, stride_cm, DESCRIBED: tl.constexpr):
    if DESCRIBED:
        c.store([m, n], tile)
    else:
        WIDTH: tl.constexpr = min(tile.shape[1], 64)  # at a time: pointers take registers
        parts = columns(tile, tile.shape[1] // WIDTH)
        for part in tl.static_range(tile.shape[1] // WIDTH):
            first = n + part * WIDTH
            ptrs, inside = _tile_ptrs(c, m, first, M, N, stride_cm, tile.shape[0], WIDTH)
            tl.store(ptrs, parts[part], mask=inside)


@triton.jit
def product_kernel(
    a,  # [M, K], see tile_product
    b,  # [K, N]
    bias0_ptr,  # [N]
    bias1_ptr,  # [N]
    scale_ptr,  # one number
    c,  # [splits, M, N], each split M rows on, for its own rows of K; with a rest a descriptor
    rest,  # [M, N], a descriptor; what rounding took from c
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
    DESCRIBED: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    HAS_BIAS0: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_REST: tl.constexpr,
    KEEP_REST: tl.constexpr,  # or only add what it holds
    C_DESCRIBED: tl.constexpr,
    ADD: tl.constexpr,  # to what c, and rest, hold
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
):
    split = tl.program_id(1)
    first = split * split_k
    last = tl.minimum(K, first + split_k)
    # With a rest there would be pointers to three tiles, too many for the registers.
    if not C_DESCRIBED:
        c += split.to(tl.int64) * M * stride_cm
    start, end, step = turns(M, N, BLOCK_M, BLOCK_N, FLAT)
    for tile in tl.range(start, end, step, flatten=FLAT):
        m, n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if ADD:
            acc += _load_c(c, m, n, M, N, stride_cm, C_DESCRIBED, BLOCK_M, BLOCK_N).to(ACC)
            if HAS_REST:
                acc += _load_c(rest, m, n, M, N, stride_cm, C_DESCRIBED, BLOCK_M, BLOCK_N).to(ACC)
        acc = tile_product(
            acc,
            a,
            b,
            m,
            n,
            first,
            last,
            M,
            N,
            stride_am,
            stride_ak,
            stride_bk,
            stride_bn,
            DESCRIBED,
            A_TURNED,
            B_TURNED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        cols = n + tl.arange(0, BLOCK_N)
        if HAS_BIAS0:
            acc += tl.load(bias0_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
        if HAS_BIAS1:
            acc += tl.load(bias1_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
        if HAS_SCALE:
            acc *= tl.load(scale_ptr).to(ACC)
        storage: tl.constexpr = c.dtype if C_DESCRIBED else c.dtype.element_ty
        rounded = to_storage(acc, storage)
        _store_c(c, rounded, m, n, M, N, stride_cm, C_DESCRIBED)
        if KEEP_REST:
            lost = to_storage(acc - rounded.to(ACC), storage)
            _store_c(rest, lost, m, n, M, N, stride_cm, C_DESCRIBED)


def describe(matrix: Tensor, block: tuple[int, int]) -> tuple[TensorDescriptor, bool] | None:
    """A descriptor of the matrix in tiles of `block`, or of its transpose and True; None where the
    tensor memory accelerator cannot address it."""
    sizes, strides = list(matrix.shape), matrix.stride()
    turned = strides[1] != 1
    if turned:
        sizes, strides, block = sizes[::-1], strides[::-1], block[::-1]
    step, one = strides
    size = matrix.element_size()
    if one != 1 or step < sizes[1] or step * size % 16 or matrix.data_ptr() % 16:
        return None
    return TensorDescriptor(matrix, sizes, [step, 1], list(block)), turned


def operands(
    a: Tensor, b: Tensor, *outputs: Tensor, crowded: bool = False, columns: int | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """How a kernel is to read a [M, K] and b [K, N], and write `outputs` [M, N].

    Args:
        crowded: what comes after the product takes many registers.
        columns: how many of a tile, at most, are written at once; None for all.

    Returns:
        ``([a, b, *outputs], constants)``: as descriptors where all can be described, else as they
        are; and what a launch with `tile_product` is given besides.
    """
    config = _configs.described(capability(a.device), a.dtype, a.shape[0], crowded)
    found: list[Any] = []
    if config is not None:
        m, n, k = config.block_m, config.block_n, config.block_k
        found = [describe(a, (m, k)), describe(b, (k, n))]
        found += [describe(c, (m, min(n, columns or n))) for c in outputs]
    described = bool(found) and None not in found
    turned = [False, False]
    if described:
        found, turned = zip(*found, strict=True)
    else:
        found, config = [a, b, *outputs], _configs.product(a.dtype, a.shape[0], crowded)
    constants = {
        "ACC": TRITON_DTYPES[compute_dtype(a.dtype)],
        "DESCRIBED": described,
        "A_TURNED": turned[0],
        "B_TURNED": turned[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": config.precision,
        "GROUP_M": config.group_m,
        "FLAT": config.flat and capability(a.device) < 100,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **LAUNCH,
    }
    return list(found), constants


def programs(device: torch.device, M: int, N: int, constants: dict[str, Any]) -> int:
    """How many programs a launch with `constants` has for its tiles of C [M, N]."""
    tiles = cdiv(M, constants["BLOCK_M"]) * cdiv(N, constants["BLOCK_N"])
    return min(tiles, multiprocessors(device)) if constants["FLAT"] else tiles


def can_describe(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether `product` reads and writes these through descriptors, as it must to keep a rest."""
    return once(_described, (a, b, out))


def _described(a: Tensor, b: Tensor, out: Tensor) -> bool:
    return operands(a, b, out)[1]["DESCRIBED"]


def _plan(
    a: Tensor,
    b: Tensor,
    bias0: Tensor | None,
    bias1: Tensor | None,
    scale: Tensor | None,
    c: Tensor,
    rest: Tensor | None,
    split_k: int,
    add: bool,
    final: bool,
) -> Call:
    *splits, M, N = c.shape
    if rest is None:
        given, constants = operands(a, b, crowded=add)
        block = constants["BLOCK_M"], constants["BLOCK_N"]
        alone = constants["DESCRIBED"] and not splits and not add and c.dtype == a.dtype
        target = describe(c, block) if alone else None
        given += [target[0] if target else c, None]
        c_described = target is not None
    else:
        given, constants = operands(a, b, c, rest)
        c_described = True
    if add or c.element_size() > 2:
        constants["FLAT"] = False
    args = (
        *given[:2],
        bias0,
        bias1,
        scale,
        *given[2:],
        M,
        N,
        a.shape[1],
        split_k,
        *a.stride(),
        *b.stride(),
        c.stride(-2),
    )
    constants |= {
        "HAS_BIAS0": bias0 is not None,
        "HAS_BIAS1": bias1 is not None,
        "HAS_SCALE": scale is not None,
        "HAS_REST": rest is not None,
        "KEEP_REST": rest is not None and not final,
        "ADD": add,
        "C_DESCRIBED": c_described,
    }
    grid = (programs(a.device, M, N, constants), *splits)
    return Call(product_kernel, grid, args, constants)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias0: Tensor | None = None,
    bias1: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    rest: Tensor | None = None,
    add: bool = False,
    final: bool = False,
) -> Tensor:
    """``out = (a @ b + bias0 + bias1) * scale``, summed in the compute dtype and rounded once.

    Args:
        a: [M, K], any strides.
        b: [K, N], any strides.
        out: [M, N], each row contiguous.
        bias0, bias1: [N], contiguous, or None.
        scale: one number, or None for 1.
        rest: [M, N] as `out`, or None; served if `can_describe`. It gets what rounding takes from
            `out`: the two together hold a sum of products twice as precisely as `out` alone.
        add: to what `out` holds, and `rest`.
        final: nothing is to be added to `out` any more, and `rest` is left as it is.
    """
    if out.numel() > 0:
        tensors = (a, b, bias0, bias1, scale, out, rest)
        launch(_plan, tensors, a.shape[1], add, final)
    return out


def _split_product(a: Tensor, b: Tensor, partial: Tensor, split_k: int) -> None:
    """Products of `split_k` rows of K each: [splits, M, N]."""
    if partial.numel() > 0:
        launch(_plan, (a, b, None, None, None, partial, None), split_k, False, False)


def deep_product(a: Tensor, b: Tensor, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """`product` over so many rows of K that programs share them where tiles of C are few."""
    M, N = out.shape
    K = a.shape[1]
    tiles = cdiv(M, 128) * cdiv(N, 128)
    splits = min(_configs.SPLIT_PROGRAMS // max(tiles, 1), cdiv(K, _configs.SPLIT_LEAST))
    if splits < 2:
        return product(a, b, out, scale=scale)
    split_k = cdiv(K, _configs.SPLIT_STEP * splits) * _configs.SPLIT_STEP
    shape = (cdiv(K, split_k), M, N)
    partial = torch.empty(shape, dtype=compute_dtype(a.dtype), device=a.device)
    _split_product(a, b, partial, split_k)
    total = partial.sum(0)
    return out.copy_(total if scale is None else total * scale)


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
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    plan = []
    for a, b in pairs:
        K = a.shape[1]
        splits = max(
            cdiv(K, _configs.SPLIT_MOST),
            cdiv(_configs.SPLIT_PROGRAMS, tiles),
        )
        splits = min(splits, cdiv(K, _configs.SPLIT_LEAST), _configs.SPLITS)
        split_k = cdiv(K, _configs.SPLIT_STEP * max(splits, 1)) * _configs.SPLIT_STEP
        if K > 0:
            plan.append((a, b, split_k, cdiv(K, split_k)))
    total = sum(splits for *_, splits in plan)
    partial = torch.empty(total, M, N, dtype=compute_dtype(like.dtype), device=like.device)
    start = 0
    for a, b, split_k, splits in plan:
        _split_product(a, b, partial[start : start + splits], split_k)
        start += splits
    return partial.sum(0).to(like.dtype)
