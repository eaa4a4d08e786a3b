"""The gradients of attention on Hopper in Gluon.

    P = exp(S - lse)    dV = P^T dout    dS = P * (dout V^T - delta)    dQ = dS K    dK = dS^T Q

as in `attention.py`, with scores in the units of log2. One kernel sums dQ over the keys, another
dK and dV over the queries: each sum is made by one warpgroup in one order. Both compute S and dS,
which stay in registers. lse and delta come in `units`, padded to whole tiles: what lies beyond the
last query has lse = +inf, so that its P is 0.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import _configs
from ._attention_sm90 import SIZES, hide, key_tiles
from ._common import LN_2, LOG2_E, cdiv, empty_rows_like
from ._hopper import (
    BLOCK,
    LAUNCH_SM90,
    LOADER_REGISTERS,
    READER_REGISTERS,
    ROWS,
    accumulator,
    arrived,
    descriptor,
    expect,
    grid,
    heads_together,
    matrix,
    narrow,
    operand,
    place,
    release,
    ring,
    room,
    tma_load,
    tma_store,
)
from ._launch import Call, launch


@gluon.jit
def _dq_load(descs, slots, bars, sizes, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    q_desc, dout_desc, k_desc, v_desc = descs
    qs, douts, ks, vs = slots
    q_bars, k_bars, v_bars = bars
    S_q, S_k, N, group, heads, chunk = sizes
    STAGES: gl.constexpr = ks.shape[0]
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes + dout_desc.block_type.nbytes
    tiles = gl.cdiv(S_q, BLOCK)
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    m, head = place(turn, tiles, heads, chunk, CAUSAL)
    while head < heads:
        b = head // N
        n = head % N
        count = key_tiles(m, S_k, CAUSAL, BLOCK_N)
        for i in range(count):
            at = [b, n // group, (count - 1 - i) * BLOCK_N, 0]
            slot = step % STAGES
            expect(k_bars, slot, step // STAGES, k_desc.block_type.nbytes)
            tma_load(k_desc, at, k_bars[0].index(slot), ks.index(slot))
            if i == 0:  # as in forward
                for g in gl.static_range(2):
                    rows = [b, n, m * BLOCK + g * ROWS, 0]
                    expect(q_bars, g, turn, Q_BYTES)
                    tma_load(q_desc, rows, q_bars[0].index(g), qs.index(g))
                    tma_load(dout_desc, rows, q_bars[0].index(g), douts.index(g))
            expect(v_bars, slot, step // STAGES, v_desc.block_type.nbytes)
            tma_load(v_desc, at, v_bars[0].index(slot), vs.index(slot))
            step += 1
        turn += 1
        m, head = place(turn, tiles, heads, chunk, CAUSAL)


@gluon.jit
def _dq_step(
    dq,  # [ROWS, D], sum of dS K up to the tile before the last
    ds,  # [ROWS, BLOCK_N], dS of the last tile
    step,
    i,  # which tile of keys, counted from the last one
    q,
    dout,
    slots,
    bars,
    lse,
    delta,
    factor,
    row,
    count,
    S_k,
    FIRST: gl.constexpr,  # there is no last tile yet
    EDGE: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    _qs, _douts, ks, vs = slots
    _q_bars, k_bars, v_bars = bars
    STAGES: gl.constexpr = ks.shape[0]
    LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, LAYOUT)
    slot = step % STAGES
    before = (step - 1) % STAGES
    arrived(k_bars, slot, step // STAGES)
    arrived(v_bars, slot, step // STAGES)
    if not FIRST:
        dq = warpgroup_mma(ds, matrix(ks.index(before)), dq, is_async=True)
    k = matrix(ks.index(slot)).permute((1, 0))
    v = matrix(vs.index(slot)).permute((1, 0))
    s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    dp = warpgroup_mma(dout, v, nothing, use_acc=False, is_async=True)
    if FIRST:
        s = warpgroup_mma_wait(1, deps=(s,))
    else:
        dq, s, ds = warpgroup_mma_wait(1, deps=(dq, s, ds))
        release(k_bars, before)
    if EDGE:
        s = hide(s, row, (count - 1 - i) * BLOCK_N, S_k, CAUSAL, LAYOUT)
    p = gl.exp2(gl.fma(s, factor, -lse[:, None]))
    arrived(v_bars, slot, step // STAGES)  # a fence, as in forward
    dp, p = warpgroup_mma_wait(0, deps=(dp, p))
    release(v_bars, slot)
    ds = gl.convert_layout(narrow(p * (dp - delta[:, None]), q.dtype), operand(dq.shape[1]))
    return dq, ds, step + 1


@gluon.jit
def _dq_compute(
    descs,
    slots,
    bars,
    sizes,
    dq_desc,
    lse_ptr,
    delta_ptr,
    factor,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    WHOLE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    qs, douts, ks, _vs = slots
    q_bars, k_bars, _v_bars = bars
    S_q, S_k, N, _group, heads, chunk = sizes
    D: gl.constexpr = qs.shape[-1]
    STAGES: gl.constexpr = ks.shape[0]
    EDGES: gl.constexpr = BLOCK // BLOCK_N if CAUSAL else 1
    q = matrix(qs.index(GROUP))
    dout = matrix(douts.index(GROUP))
    tiles = gl.cdiv(S_q, BLOCK)
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    m, head = place(turn, tiles, heads, chunk, CAUSAL)
    while head < heads:
        row = m * BLOCK + GROUP * ROWS
        count = key_tiles(m, S_k, CAUSAL, BLOCK_N)
        at = head.to(gl.int64) * tiles * BLOCK + row
        rows = at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator(BLOCK_N)))
        lse = gl.load(lse_ptr + rows)
        delta = gl.load(delta_ptr + rows)
        dq = gl.full([ROWS, D], 0.0, gl.float32, accumulator(D))
        ds = gl.full([ROWS, BLOCK_N], 0.0, q.dtype, operand(D))
        arrived(q_bars, GROUP, turn)
        dq, ds, step = _dq_step(
            dq, ds, step, 0, q, dout, slots, bars, lse, delta, factor, row, count, S_k,
            True, not WHOLE, CAUSAL, BLOCK_N,
        )  # fmt: skip
        if EDGES > 1:
            for i in range(1, gl.minimum(EDGES, count)):
                dq, ds, step = _dq_step(
                    dq, ds, step, i, q, dout, slots, bars, lse, delta, factor, row, count, S_k,
                    False, True, CAUSAL, BLOCK_N,
                )  # fmt: skip
        for i in range(EDGES, count):
            dq, ds, step = _dq_step(
                dq, ds, step, i, q, dout, slots, bars, lse, delta, factor, row, count, S_k,
                False, False, CAUSAL, BLOCK_N,
            )  # fmt: skip
        slot = (step - 1) % STAGES
        dq = warpgroup_mma(ds, matrix(ks.index(slot)), dq, is_async=True)
        turn += 1
        dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
        release(k_bars, slot)
        q.store(narrow(dq * (factor * LN_2), q.dtype))  # where the queries were
        fence_async_shared()
        tma_store(dq_desc, [head // N, head % N, row, 0], qs.index(GROUP))
        tma.store_wait(0)
        release(q_bars, GROUP)
        m, head = place(turn, tiles, heads, chunk, CAUSAL)


@gluon.jit(do_not_specialize=SIZES)
def attention_bwd_dq_sm90_kernel(
    q_desc,  # [B, N, S_q, D] in blocks of ROWS
    dout_desc,  # [B, N, S_q, D_v] in blocks of ROWS
    k_desc,  # [B, N_kv, S_k, D] in blocks of BLOCK_N
    v_desc,  # [B, N_kv, S_k, D_v] in blocks of BLOCK_N
    dq_desc,  # [B, N, S_q, D] in blocks of ROWS
    lse_ptr,  # [B, N, S_q to whole tiles], in units
    delta_ptr,  # [B, N, S_q to whole tiles]
    S_q,
    S_k,
    N,
    group,  # N // N_kv
    heads,  # B * N
    chunk,  # heads that L2 holds
    factor,  # the scale in the units of log2, above zero
    CAUSAL: gl.constexpr,
    WHOLE: gl.constexpr,  # no tile of keys takes a comparison
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    descs = (q_desc, dout_desc, k_desc, v_desc)
    slots = (room(q_desc, 2), room(dout_desc, 2), room(k_desc, STAGES), room(v_desc, STAGES))
    bars = (ring(2, 1), ring(STAGES, 2), ring(STAGES, 2))
    fence_async_shared()
    sizes = (S_q, S_k, N, group, heads, chunk)
    gl.warp_specialize(
        [
            (_dq_compute, (
                descs, slots, bars, sizes, dq_desc, lse_ptr, delta_ptr, factor,
                0, CAUSAL, WHOLE, BLOCK_N,
            )),
            (_dq_compute, (
                descs, slots, bars, sizes, dq_desc, lse_ptr, delta_ptr, factor,
                1, CAUSAL, WHOLE, BLOCK_N,
            )),
            (_dq_load, (descs, slots, bars, sizes, CAUSAL, BLOCK_N)),
        ],
        [4, 1],
        [READER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _dkv_load(descs, slots, bars, sizes, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr):
    k_desc, v_desc, q_desc, dout_desc, units_desc = descs
    ks, vs, qs, douts, lses, deltas = slots
    kv_bars, q_bars, dout_bars = bars
    S_q, N, group = sizes
    STAGES: gl.constexpr = qs.shape[0]
    KV_BYTES: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes + units_desc.block_type.nbytes
    DOUT_BYTES: gl.constexpr = dout_desc.block_type.nbytes + units_desc.block_type.nbytes
    t = gl.program_id(0)
    n_kv = gl.program_id(1)
    b = gl.program_id(2)
    padded = gl.cdiv(S_q, BLOCK) * BLOCK
    for g in gl.static_range(2):
        at = [b, n_kv, t * BLOCK + g * ROWS, 0]
        expect(kv_bars, g, 0, KV_BYTES)
        tma_load(k_desc, at, kv_bars[0].index(g), ks.index(g))
        tma_load(v_desc, at, kv_bars[0].index(g), vs.index(g))
    start = t * BLOCK // BLOCK_M if CAUSAL else 0
    span = gl.maximum(gl.cdiv(S_q, BLOCK_M) - start, 0)
    for step in range(group * span):
        n = n_kv * group + step // span
        row = (start + step % span) * BLOCK_M
        line = (b * N + n) * padded + row
        slot = step % STAGES
        expect(q_bars, slot, step // STAGES, Q_BYTES)
        tma_load(q_desc, [b, n, row, 0], q_bars[0].index(slot), qs.index(slot))
        tma_load(units_desc, [0, line], q_bars[0].index(slot), lses.index(slot))
        expect(dout_bars, slot, step // STAGES, DOUT_BYTES)
        tma_load(dout_desc, [b, n, row, 0], dout_bars[0].index(slot), douts.index(slot))
        tma_load(units_desc, [1, line], dout_bars[0].index(slot), deltas.index(slot))


@gluon.jit
def _dkv_compute(
    slots,
    bars,
    sizes,
    dk_desc,
    dv_desc,
    numbers,  # [BLOCK_M], 0, 1, 2, ... in shared memory
    factor,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    ks, vs, qs, douts, lses, deltas = slots
    kv_bars, q_bars, dout_bars = bars
    S_q, _N, group = sizes
    STAGES: gl.constexpr = qs.shape[0]
    D: gl.constexpr = ks.shape[-1]
    D_V: gl.constexpr = vs.shape[-1]
    # Tiles of scores are transposed, keys by queries: P and dS are left operands as they come.
    LAYOUT: gl.constexpr = accumulator(BLOCK_M)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    nothing = gl.full([ROWS, BLOCK_M], 0.0, gl.float32, LAYOUT)
    k = matrix(ks.index(GROUP))
    v = matrix(vs.index(GROUP))
    key = gl.program_id(0) * BLOCK + GROUP * ROWS
    start = gl.program_id(0) * BLOCK // BLOCK_M if CAUSAL else 0
    span = gl.maximum(gl.cdiv(S_q, BLOCK_M) - start, 0)
    row = start * BLOCK_M
    dk = gl.full([ROWS, D], 0.0, gl.float32, accumulator(D))
    dv = gl.full([ROWS, D_V], 0.0, gl.float32, accumulator(D_V))
    arrived(kv_bars, GROUP, 0)
    for step in range(group * span):
        slot = step % STAGES
        q = matrix(qs.index(slot))
        dout = matrix(douts.index(slot))
        arrived(q_bars, slot, step // STAGES)
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        arrived(dout_bars, slot, step // STAGES)
        dp = warpgroup_mma(v, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lses.index(slot).reshape([BLOCK_M]).load(COLUMNS)
        s = warpgroup_mma_wait(1, deps=(s,))
        if CAUSAL:
            if row <= key:
                # Numbers of queries from memory: the compiler would keep those of `arange` in
                # registers all through the loop, which has none to spare.
                rows = row + numbers.load(COLUMNS)
                keys = key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
                s = gl.where(keys[:, None] <= rows[None, :], s, float("-inf"))
            row = gl.where(row + BLOCK_M < S_q, row + BLOCK_M, start * BLOCK_M)
        p = gl.exp2(gl.fma(s, factor, -lse[None, :]))
        arrived(dout_bars, slot, step // STAGES)  # a fence, as in forward
        dp, p = warpgroup_mma_wait(0, deps=(dp, p))
        p16 = gl.convert_layout(narrow(p, k.dtype), operand(D_V))
        dv = warpgroup_mma(p16, dout, dv, is_async=True)
        delta = deltas.index(slot).reshape([BLOCK_M]).load(COLUMNS)
        ds = gl.convert_layout(narrow(p * (dp - delta[None, :]), k.dtype), operand(D))
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dv, p16 = warpgroup_mma_wait(1, deps=(dv, p16))
        release(dout_bars, slot)
        dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
        release(q_bars, slot)
    k.store(narrow(dk * (factor * LN_2), k.dtype))  # where the keys and values were
    v.store(narrow(dv, k.dtype))
    fence_async_shared()
    at = [gl.program_id(2), gl.program_id(1), key, 0]
    tma_store(dk_desc, at, ks.index(GROUP))
    tma_store(dv_desc, at, vs.index(GROUP))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["S_q", "N", "group"])
def attention_bwd_dkv_sm90_kernel(
    k_desc,  # [B, N_kv, S_k, D] in blocks of ROWS
    v_desc,  # [B, N_kv, S_k, D_v] in blocks of ROWS
    q_desc,  # [B, N, S_q, D] in blocks of BLOCK_M
    dout_desc,  # [B, N, S_q, D_v] in blocks of BLOCK_M
    units_desc,  # [2, B * N * S_q to whole tiles], lse in units and delta, in blocks of BLOCK_M
    dk_desc,  # [B, N_kv, S_k, D] in blocks of ROWS
    dv_desc,  # [B, N_kv, S_k, D_v] in blocks of ROWS
    S_q,
    N,
    group,  # N // N_kv
    factor,  # the scale in the units of log2, above zero
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    descs = (k_desc, v_desc, q_desc, dout_desc, units_desc)
    slots = (
        room(k_desc, 2), room(v_desc, 2), room(q_desc, STAGES), room(dout_desc, STAGES),
        room(units_desc, STAGES), room(units_desc, STAGES),
    )  # fmt: skip
    numbers = gl.allocate_shared_memory(gl.int32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    numbers.store(gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0])))
    bars = (ring(2, 1), ring(STAGES, 2), ring(STAGES, 2))
    fence_async_shared()
    sizes = (S_q, N, group)
    gl.warp_specialize(
        [
            (_dkv_compute, (
                slots, bars, sizes, dk_desc, dv_desc, numbers, factor, 0, CAUSAL, BLOCK_M
            )),
            (_dkv_compute, (
                slots, bars, sizes, dk_desc, dv_desc, numbers, factor, 1, CAUSAL, BLOCK_M
            )),
            (_dkv_load, (descs, slots, bars, sizes, CAUSAL, BLOCK_M)),
        ],
        [4, 1],
        [READER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def _dq_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    causal: bool,
    factor: float,
) -> Call:
    B, N, S_q, D = q.shape
    S_k, D_v = v.shape[2:]
    config = _configs.ATTENTION_DQ_SM90[D, D_v]
    tiles, programs = grid(q)
    args = (
        descriptor(q, ROWS.value, D),
        descriptor(dout, ROWS.value, D_v),
        descriptor(k, config.block, D),
        descriptor(v, config.block, D_v),
        descriptor(dq, ROWS.value, D),
        lse,
        delta,
        S_q,
        S_k,
        N,
        N // k.shape[1],
        B * N,
        heads_together(k, v, N, tiles, programs),
        factor,
    )
    constants = {
        "CAUSAL": causal,
        "WHOLE": not causal and S_k % config.block == 0,
        "BLOCK_N": config.block,
        "STAGES": config.num_stages,
        **LAUNCH_SM90,
    }
    return Call(attention_bwd_dq_sm90_kernel, (programs,), args, constants)


def _dkv_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    units: Tensor,
    dk: Tensor,
    dv: Tensor,
    causal: bool,
    factor: float,
) -> Call:
    B, N, S_q, D = q.shape
    N_kv, S_k, D_v = v.shape[1:]
    config = _configs.ATTENTION_DKV_SM90[D, D_v]
    args = (
        descriptor(k, ROWS.value, D),
        descriptor(v, ROWS.value, D_v),
        descriptor(q, config.block, D),
        descriptor(dout, config.block, D_v),
        descriptor(units, config.block),
        descriptor(dk, ROWS.value, D),
        descriptor(dv, ROWS.value, D_v),
        S_q,
        N,
        N // N_kv,
        factor,
    )
    constants = {
        "CAUSAL": causal,
        "BLOCK_M": config.block,
        "STAGES": config.num_stages,
        **LAUNCH_SM90,
    }
    grid = (cdiv(S_k, BLOCK.value), N_kv, B)
    return Call(attention_bwd_dkv_sm90_kernel, grid, args, constants)


def attention_bwd_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    units: Tensor,
    causal: bool,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q, k and v that `needs` asks for, where `attention.py` finds them served.

    Args:
        units: [2, B, N, S_q to whole tiles], lse in units and delta.
    """
    factor = scale * LOG2_E.value
    dq = dk = dv = None
    if needs[0]:
        dq = empty_rows_like(q)
        launch(_dq_plan, (q, k, v, dout, units[0], units[1], dq), causal, factor)
    if needs[1] or needs[2]:
        dk, dv = empty_rows_like(k), empty_rows_like(v)
        launch(_dkv_plan, (q, k, v, dout, units.flatten(1), dk, dv), causal, factor)
    return dq, dk, dv
