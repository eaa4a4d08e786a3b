"""The time loop: one kernel walks a whole sequence, forwards or backwards.

    sum_s[a]         = product over the state of step s - 1             (see `_product`)
    state_s, carry_s = CELL(sum_s, inputs_s, carry_{s-1})               s = 0 ... T - 1

Forward, the state is h, and there is a sum for each gate: h W_g^T. Backward through time, the state
is the gradient of each gate's sum, the operands of one sum: what they send to h_{t-1} through W_g.
Either way a program that owns some units needs the same slice of W_hh, [GATES, H, units], and the
state of all units. `carry` stays with its units: c, or what the backward pass sends on elementwise.

Batch rows do not depend on each other; units do, through the state. So a program owns a tile of
batch rows and units for all steps, and the forms differ in how the others' state reaches it:

* alone: there are no others. The state stays in registers, W_hh too.
* together: all programs are on the chip at once (a cooperative launch). A program that needs the
  state of step s - 1 reads it until it is there. Its memory was filled with a bit pattern that no
  program writes, so each number is its own flag: neither a barrier nor an order of the writes is
  needed.
* by steps: a launch for each step, where not all programs fit on the chip, and in the interpreter,
  which runs one program after the other.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import _configs
from ._common import (
    AMD,
    LAUNCH,
    TRITON_DTYPES,
    block_size,
    capability,
    cdiv,
    compute_dtype,
    dot,
    multiprocessors,
    to_storage,
)
from ._launch import Call, launch


@triton.jit
def read(ptr, row, n, ok, H, slot: tl.constexpr, SLOTS: tl.constexpr):
    """The tile [BLOCK_B, BLOCK_N] of one slot of [rows, SLOTS, H], as stored; 0 without `ptr`."""
    if ptr is None:
        return tl.zeros(ok.shape, tl.float32)
    else:
        seen = ok != 0  # the interpreter of Triton 3.9 widens what `&` makes of a scalar
        return tl.load(ptr + (row * SLOTS + slot) * H + n, mask=seen, other=0.0)


@triton.jit
def write(ptr, row, n, ok, H, slot: tl.constexpr, SLOTS: tl.constexpr, value):
    """`read`, the other way; nothing without `ptr`."""
    if ptr is not None:
        value = to_storage(value, ptr.dtype.element_ty)
        tl.store(ptr + (row * SLOTS + slot) * H + n, value, mask=ok)


@triton.jit
def _bits(x):
    """The bits of `x` as a signed integer: -1 where all are set."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    elif x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int64, bitcast=True)


@triton.jit
def _missing(tiles, COUNT: tl.constexpr):
    """Whether any number in `tiles` was not written yet."""
    found = _bits(tiles[0]) == -1
    for i in tl.static_range(1, COUNT):
        found |= _bits(tiles[i]) == -1
    return tl.max(found.to(tl.int32)) > 0


@triton.jit
def _state_tiles(
    ptr, rows, k, D, H, SLOTS: tl.constexpr, COUNT: tl.constexpr, BLOCK_K: tl.constexpr, FRESH
):
    """COUNT tiles [BLOCK_B, BLOCK_K] of the state from its number k on.

    Read past the first cache, which may have a line's neighbours from before they were written; if
    FRESH, also anew each time.
    """
    tiles = ()
    for c in tl.static_range(COUNT):
        ks = k + c * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        at = ptr + rows[0] * SLOTS * H + ks
        ok = rows[1] & (ks < D)
        if FRESH:
            tiles = tiles + (tl.load(at, mask=ok, other=0.0, volatile=True),)
        else:
            tiles = tiles + (tl.load(at, mask=ok, other=0.0, cache_modifier=".cg"),)
    return tiles


@triton.jit
def _matrix_tiles(
    ptr,
    k,
    n,
    stride_ma,
    stride_mk,
    stride_mn,
    SUMS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """For each sum COUNT tiles [BLOCK_K, BLOCK_N] of its matrix from row k on, in SPLITS parts.

    `n` counts from where `ptr` points to.
    """
    tiles = ()
    for a in tl.static_range(SUMS):
        for c in tl.static_range(COUNT):
            ks = (k + c * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
            base = ptr + a * tl.cast(stride_ma, tl.int64)
            m = tl.load(base + ks * stride_mk + n * stride_mn)
            if SPLITS > 1:
                m = tl.reshape(m, [SPLITS, BLOCK_K // SPLITS, m.shape[1]])
            tiles = tiles + (m,)
    return tiles


@triton.jit
def _deep(tile, SPLITS: tl.constexpr):
    """[M, K] as SPLITS parts of K, [SPLITS, M, K / SPLITS]: a warp multiplies one of them."""
    if SPLITS > 1:
        tile = tl.reshape(tile, [tile.shape[0], SPLITS, tile.shape[1] // SPLITS])
        tile = tl.permute(tile, (1, 0, 2))
    return tile


@triton.jit
def _zeros(COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, ACC):
    """COUNT sums [M, N], each of SPLITS parts."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if SPLITS > 1:
            sums = sums + (tl.zeros([SPLITS, M, N], ACC),)
        else:
            sums = sums + (tl.zeros([M, N], ACC),)
    return sums


@triton.jit
def _multiply(
    state,
    m,
    sums,
    first: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds the products of COUNT tiles of the state and those of the matrices to the sums."""
    found = ()
    for a in tl.static_range(SUMS):
        total = sums[a]
        for c in tl.static_range(COUNT):
            total = dot(_deep(state[c], SPLITS), m[a * CHUNKS + first + c], total)
        found = found + (total,)
    return found


@triton.jit
def _over_splits(x, SPLITS: tl.constexpr):
    """The sum over the first axis, in pairs.

    Written so that the parts of a number come into the registers of one thread, which then has a
    share of the tile: `tl.sum` would shuffle them, and leave each warp with the whole tile.
    """
    half: tl.constexpr = SPLITS // 2
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    if len(x.shape) == 3:
        a, b = tl.split(tl.permute(tl.reshape(x, [2, half, M, N]), (1, 2, 3, 0)))
        if half == 1:
            return tl.reshape(a + b, [M, N])
        else:
            return _over_splits(a + b, half)
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [2, half, M, N, 2, 2]), (1, 2, 3, 4, 5, 0)))
        if half == 1:
            return tl.reshape(a + b, [M, N, 2, 2])
        else:
            return _over_splits(a + b, half)


@triton.jit
def _joined(sums, SUMS: tl.constexpr, SPLITS: tl.constexpr):
    """The sums of the SPLITS parts: of 3 or 4 tensors at once, as warps must meet for each."""
    if SPLITS == 1:
        return sums
    elif SUMS == 1:
        return (_over_splits(sums[0], SPLITS),)
    else:
        both = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[SUMS - 1]))
        left, right = tl.split(_over_splits(both, SPLITS))
        a, b = tl.split(left)
        c, d = tl.split(right)
        return (a, b, c, d)


@triton.jit
def _row(s, T, B, batch, FROM_END: tl.constexpr):
    """The rows of [T * B] that step s of the walk is at."""
    return tl.cast(T - 1 - s if FROM_END else s, tl.int64) * B + batch


@triton.jit
def _inputs(LOAD: tl.constexpr, io, s, T, B, batch, n, ok, H, FROM_END: tl.constexpr):
    """What step s reads besides the state, in storage dtypes: a conversion would wait."""
    here = _row(s, T, B, batch, FROM_END)
    after = _row(tl.minimum(s + 1, T - 1), T, B, batch, FROM_END)
    return LOAD(io, here, after, batch, n, ok, H, s == 0, s == T - 1)


@triton.jit(do_not_specialize=["first"])
def recurrence_kernel(
    io,  # pointers that LOAD and CELL know
    state_ptr,  # [T, B, SLOTS, H], written; the first D numbers of a row are the state
    start_ptr,  # [B, SLOTS, H], the state before the first step; None for zeros
    final_ptr,  # [B, SLOTS, H], written: the state after the last step; or None
    carry_ptr,  # [B, H], the carry before the first step; None for zeros
    carry_n_ptr,  # [B, H], written: the carry after the last step; or None
    m_ptr,  # [SUMS, D, H], both axes padded to whole tiles; alone, the part of each slot of D
    T,
    B,
    H,
    D,
    row0,  # the first batch row of this launch
    first,  # the first step of this launch
    count,  # and its number of steps
    stride_ma,
    stride_mk,
    stride_mn,
    LOAD: tl.constexpr,  # LOAD(io, here, after, batch, n, ok, H, is_first, is_last) -> inputs
    CELL: tl.constexpr,  # CELL(io, here, n, ok, H, sums, inputs, carry, storage) -> slots, carry
    ACC: tl.constexpr,
    SUMS: tl.constexpr,
    SLOTS: tl.constexpr,
    FROM_END: tl.constexpr,  # step 0 is t = T - 1
    FORM: tl.constexpr,  # "alone", "together" or "steps"
    CHUNKS: tl.constexpr,  # tiles that the held slice of W_hh is deep; 0: it is read at each step
    GROUP: tl.constexpr,  # tiles of the state that are read at once
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides H
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % tiles_n * BLOCK_N
    own = tl.arange(0, BLOCK_N)[None, :]
    n = n0 + own
    m_ptr += tl.cast(n0, tl.int64) * stride_mn
    batch = (row0 + pid // tiles_n * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    H = H // ALIGN * ALIGN  # as the compiler does not know it, and loads whole vectors then
    D = D // ALIGN * ALIGN
    ok = (batch < B) & (n < H)
    rows = (batch, batch < B)
    storage: tl.constexpr = state_ptr.dtype.element_ty
    together: tl.constexpr = FORM == "together"

    if CHUNKS > 0:
        m = _matrix_tiles(
            m_ptr, 0, own, stride_ma, stride_mk, stride_mn, SUMS, CHUNKS, BLOCK_K, SPLITS
        )
    carry = tl.zeros([BLOCK_B, BLOCK_N], ACC)
    if carry_ptr is not None:
        carry = read(carry_ptr, batch, n, ok, H, 0, 1).to(ACC)
    begin_ptr = state_ptr
    begin = (batch, batch < (0 if start_ptr is None else B))
    if start_ptr is not None:
        begin_ptr = start_ptr
    if FORM == "alone":
        state = _state_tiles(begin_ptr, begin, 0, D, H, SLOTS, CHUNKS, BLOCK_K, False)
    inputs = _inputs(LOAD, io, first, T, B, batch, n, ok, H, FROM_END)
    for s in range(first, first + count):
        sums = _zeros(SUMS, BLOCK_B, BLOCK_N, SPLITS, ACC)
        if FORM == "alone":
            sums = _multiply(state, m, sums, 0, CHUNKS, CHUNKS, SUMS, SPLITS)
        else:
            last_ptr = begin_ptr
            if s > 0:
                last_ptr = state_ptr + _row(s - 1, T, B, 0, FROM_END) * SLOTS * H
            if start_ptr is None:
                rows = (batch, batch < tl.where(s > 0, B, 0))
            if CHUNKS > 0:
                for c in tl.static_range(0, CHUNKS, GROUP):
                    k = c * BLOCK_K
                    last = _state_tiles(last_ptr, rows, k, D, H, SLOTS, GROUP, BLOCK_K, together)
                    if together:
                        while (s > 0) & _missing(last, GROUP):
                            last = _state_tiles(
                                last_ptr, rows, k, D, H, SLOTS, GROUP, BLOCK_K, True
                            )
                    sums = _multiply(last, m, sums, c, GROUP, CHUNKS, SUMS, SPLITS)
            else:
                if together:
                    for k in range(0, D, BLOCK_K):
                        waits = s > 0
                        while waits:
                            last = _state_tiles(last_ptr, rows, k, D, H, SLOTS, 1, BLOCK_K, True)
                            waits = _missing(last, 1)
                for k in range(0, D, BLOCK_K):
                    last = _state_tiles(last_ptr, rows, k, D, H, SLOTS, 1, BLOCK_K, False)
                    m = _matrix_tiles(
                        m_ptr, k, own, stride_ma, stride_mk, stride_mn, SUMS, 1, BLOCK_K, SPLITS
                    )
                    sums = _multiply(last, m, sums, 0, 1, 1, SUMS, SPLITS)
        # The next step's loads are under way while this one ends. The last step has no next one,
        # loads its own again and drops it. They come after the product, whose layout of registers
        # the compiler would else choose for what follows: each warp would have the whole tile.
        ahead = tl.minimum(s + 1, first + count - 1)
        inputs_ahead = _inputs(LOAD, io, ahead, T, B, batch, n, ok, H, FROM_END)
        sums = _joined(sums, SUMS, SPLITS)
        here = _row(s, T, B, batch, FROM_END)
        found, carry = CELL(io, here, n, ok, H, sums, inputs, carry, storage)
        state = ()
        for i in tl.static_range(SLOTS):
            value = to_storage(found[i], storage)
            if together:
                # a NaN of any bits is as good as another, but for those that mean "not yet"
                value = tl.where(_bits(value) == -1, float("nan"), value)
            tl.store(state_ptr + (here * SLOTS + i) * H + n, value, mask=ok)
            if final_ptr is not None:
                ends = ok & (n < tl.where(s == T - 1, H, 0))
                tl.store(final_ptr + (batch * SLOTS + i) * H + n, value, mask=ends)
            if i < CHUNKS:
                state = state + (value,)
        inputs = inputs_ahead
    if carry_n_ptr is not None:
        write(carry_n_ptr, batch, n, ok, H, 0, 1, carry)


@dataclass(frozen=True, eq=False)  # told apart by identity: each is made once
class Cell:
    """The jitted functions LOAD and CELL of the kernel."""

    load: Callable[..., Any]
    step: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Form:
    """How a time loop is shared out."""

    name: str  # the kernel's FORM
    config: _configs.RecurrenceConfig
    gates: int
    H: int
    depth: int  # numbers of the state that a sum is over
    block_b: int
    block_k: int
    chunks: int
    group: int
    tiles_n: int
    rows: int  # of the batch in one launch


@functools.lru_cache(1024)
def _form(
    name: str,
    config: _configs.RecurrenceConfig,
    gates: int,
    B: int,
    H: int,
    size: int,  # bytes of a number of the state
    programs: int,  # that run at the same time
    backward: bool,
) -> _Form:
    # alone, as few rows as keep all programs on the chip: rows cost time, and multiprocessors idle
    rows = cdiv(B, programs) if name == "alone" else B
    block_b = min(config.block_b, block_size(rows))
    tiles_n = cdiv(H, config.block_n)
    # together, as many rows in one launch as fit on the chip at once
    rows = programs // tiles_n * block_b if name == "together" else B
    depth = gates * H if backward else H
    block_k, chunks, group = config.block_k, 0, 1
    if name == "alone":
        chunks = depth // H
    elif config.held:
        # tiles as large as cover the depth with no more waste than the smallest
        padded = cdiv(depth, block_k) * block_k
        while padded % (2 * block_k) == 0 and block_k < config.most_k:
            block_k *= 2
        chunks = padded // block_k
        most = max(config.group // (block_b * block_k * size), 1)
        group = max(
            count for count in range(1, chunks + 1) if count <= most and chunks % count == 0
        )
    return _Form(name, config, gates, H, depth, block_b, block_k, chunks, group, tiles_n, rows)


def _plan(
    state: Tensor,
    start: Tensor | None,
    final: Tensor | None,
    carry: Tensor | None,
    carry_n: Tensor | None,
    m: Tensor,
    *more: Any,
    first: int,
) -> Call:
    """`more` are what LOAD and CELL know, and the options."""
    *io, cell, form, backward, from_end, row0, steps = more
    config = form.config
    T, B, width = state.shape
    n_axis = 2 if backward else 1
    constants = {
        "LOAD": cell.load,
        "CELL": cell.step,
        "ACC": TRITON_DTYPES[compute_dtype(state.dtype)],
        "SUMS": 1 if backward else form.gates,
        "SLOTS": width // form.H,
        "FROM_END": from_end,
        "FORM": form.name,
        "CHUNKS": form.chunks,
        "GROUP": form.group,
        "BLOCK_B": form.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_K": form.block_k,
        "SPLITS": config.splits,
        "ALIGN": math.gcd(form.H, 16),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_cooperative_grid": form.name == "together",
        **LAUNCH,
    }
    if not AMD:
        constants["maxnreg"] = min(255, 2048 // config.num_warps)
    args = (
        tuple(io),
        state,
        start,
        final,
        carry,
        carry_n,
        m,
        T,
        B,
        form.H,
        form.depth,
        row0,
        first,
        steps,
        m.stride(0),
        m.stride(3 - n_axis),
        m.stride(n_axis),
    )
    tiles_b = cdiv(min(form.rows, B - row0), form.block_b)
    return Call(recurrence_kernel, (form.tiles_n * tiles_b,), args, constants)


def walk(
    cell: Cell,
    io: tuple[Tensor | None, ...],
    state: Tensor,
    w_hh: Tensor,
    *,
    start: Tensor | None = None,
    final: Tensor | None = None,
    carry: Tensor | None = None,
    carry_n: Tensor | None = None,
    backward: bool,
    from_end: bool,
) -> None:
    """Runs the time loop.

    Args:
        cell: what a step does.
        io: contiguous tensors that it knows.
        state: [T, B, SLOTS * H], contiguous and not empty, written.
        w_hh: [GATES * H, H], contiguous.
        start: [B, SLOTS * H], contiguous, the state before the first step, or None for zeros.
        final: likewise, written: the state after the last step, or None.
        carry: [B, H], contiguous, the carry before the first step, or None for zeros.
        carry_n: likewise, written: the carry after the last step, or None.
        backward: one sum over the state of all gates, instead of a sum for each.
        from_end: walk from t = T - 1 to 0.
    """
    T, B, _ = state.shape
    H = w_hh.shape[1]
    gates, programs = w_hh.shape[0] // H, multiprocessors(state.device)
    name, config = _configs.recurrence(capability(state.device), state.dtype, gates, B, H, programs)
    if T == 1 and name == "together":
        name = "steps"
    form = _form(name, config, gates, B, H, state.element_size(), programs, backward)
    if name == "together":
        state.view(torch.uint8).fill_(255)  # all bits set means that a number is not there
    # [matrices, output units, state units] of the weights, transposed in memory for backward
    m = w_hh.view(gates, H, H) if name == "alone" or not backward else w_hh.view(1, gates * H, H)
    more_n, more_k = -H % config.block_n, -m.shape[1 if backward else 2] % form.block_k
    if more_n or more_k:
        m = pad(m, (0, more_n, 0, more_k) if backward else (0, more_k, 0, more_n))
    options = (cell, form, backward, from_end)
    if name == "steps" and T > 1:
        # the carry goes from launch to launch in memory of its own, not rounded
        between = state.new_zeros(B, H, dtype=compute_dtype(state.dtype))
        if carry is not None:
            between.copy_(carry)
        tensors = (state, start, final, between, between, m, *io)
        for first in range(T):
            launch(_plan, tensors, *options, 0, 1, first=first)
        if carry_n is not None:
            carry_n.copy_(between)
        return
    tensors = (state, start, final, carry, carry_n, m, *io)
    for row0 in range(0, B, form.rows):
        launch(_plan, tensors, *options, row0, T, first=0)
