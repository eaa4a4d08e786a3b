"""Gradients of attention on Hopper."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._attention_sm90 import LN_2, ROWS, _keys, _narrow, _place


@gluon.jit
def _dq_loader(descs, buffers, barriers, sizes, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    qs, dos, ks, vs = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    S_q, S_k, S_pad, N, group, heads, chunk = sizes
    tiles = gl.cdiv(S_q, 2 * ROWS)
    step = gl.to_tensor(0)
    done = gl.to_tensor(0)
    piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)
    while piece < tiles * heads:
        for g in gl.static_range(2):
            row = m * 2 * ROWS + g * ROWS
            mbarrier.wait(q_free.index(g), (done & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [b, n, row, 0], q_full.index(g), qs.index(g))
            tma.async_copy_global_to_shared(do_desc, [b, n, row, 0], q_full.index(g), dos.index(g))
        count = _keys(m, S_k, CAUSAL, 2 * ROWS, BLOCK_N)
        for i in range(count):
            key = (count - 1 - i) * BLOCK_N
            at = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(at), phase)
            mbarrier.expect(k_full.index(at), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [b, n // group, key, 0], k_full.index(at), ks.index(at))
            mbarrier.wait(v_free.index(at), phase)
            mbarrier.expect(v_full.index(at), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [b, n // group, key, 0], v_full.index(at), vs.index(at))
            step += 1
        done += 1
        piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)


@gluon.jit
def _seen(row, key, S_k, M: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    keys = key + gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    seen = (keys < S_k)[None, :]
    if CAUSAL:
        rows = row + gl.arange(0, M, layout=gl.SliceLayout(1, LAYOUT))
        seen = seen & (keys[None, :] <= rows[:, None])
    return seen


@gluon.jit
def _dq_consumer(
    descs, buffers, barriers, sizes, lse_ptr, delta_ptr, factor, G: gl.constexpr, CAUSAL: gl.constexpr,
    WHOLE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    qs, dos, ks, vs = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    S_q, S_k, S_pad, N, group, heads, chunk = sizes
    D: gl.constexpr = q_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    dtype: gl.constexpr = q_desc.dtype
    EDGES: gl.constexpr = 2 * ROWS // BLOCK_N if CAUSAL and 2 * ROWS > BLOCK_N else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_layout)
    q = qs.index(G).reshape([ROWS, D])
    do = dos.index(G).reshape([ROWS, DV])
    tiles = gl.cdiv(S_q, 2 * ROWS)
    step = gl.to_tensor(0)
    done = gl.to_tensor(0)
    piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)
    while piece < tiles * heads:
        row = m * 2 * ROWS + G * ROWS
        count = _keys(m, S_k, CAUSAL, 2 * ROWS, BLOCK_N)
        at_row = (b * N + n).to(gl.int64) * S_pad + row + gl.arange(0, ROWS, layout=row_layout)
        lse = gl.load(lse_ptr + at_row)
        delta = gl.load(delta_ptr + at_row)
        dq = gl.full([ROWS, D], 0.0, gl.float32, acc_layout)
        mbarrier.wait(q_full.index(G), done & 1)

        at = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(at), phase)
        s = warpgroup_mma(q, ks.index(at).reshape([BLOCK_N, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(at), phase)
        dp = warpgroup_mma(do, vs.index(at).reshape([BLOCK_N, DV]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        if not WHOLE:
            s = gl.where(_seen(row, (count - 1) * BLOCK_N, S_k, ROWS, BLOCK_N, CAUSAL, s_layout), s, float("-inf"))
        p = gl.exp2(gl.fma(s, factor, -lse[:, None]))
        dp, p = warpgroup_mma_wait(0, deps=(dp, p))
        mbarrier.arrive(v_free.index(at), count=1)
        ds = gl.convert_layout(_narrow(p * (dp - delta[:, None]), dtype), a_layout)
        for PART in gl.static_range(2):
            if PART == 1 or EDGES > 1:
                for i in range(1 if PART == 0 else EDGES, gl.minimum(EDGES, count) if PART == 0 else count):
                    before = at
                    step += 1
                    at = step % STAGES
                    phase = step // STAGES & 1
                    mbarrier.wait(k_full.index(at), phase)
                    mbarrier.wait(v_full.index(at), phase)
                    dq = warpgroup_mma(ds, ks.index(before).reshape([BLOCK_N, D]), dq, is_async=True)
                    s = warpgroup_mma(q, ks.index(at).reshape([BLOCK_N, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
                    dp = warpgroup_mma(do, vs.index(at).reshape([BLOCK_N, DV]).permute((1, 0)), nothing, use_acc=False, is_async=True)
                    dq, s, ds = warpgroup_mma_wait(1, deps=(dq, s, ds))
                    mbarrier.arrive(k_free.index(before), count=1)
                    if PART == 0:
                        s = gl.where(_seen(row, (count - 1 - i) * BLOCK_N, S_k, ROWS, BLOCK_N, CAUSAL, s_layout), s, float("-inf"))
                    p = gl.exp2(gl.fma(s, factor, -lse[:, None]))
                    mbarrier.wait(v_full.index(at), phase)
                    dp, p = warpgroup_mma_wait(0, deps=(dp, p))
                    mbarrier.arrive(v_free.index(at), count=1)
                    ds = gl.convert_layout(_narrow(p * (dp - delta[:, None]), dtype), a_layout)
        dq = warpgroup_mma(ds, ks.index(at).reshape([BLOCK_N, D]), dq, is_async=True)
        step += 1
        done += 1
        dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
        mbarrier.arrive(k_free.index(at), count=1)
        q.store((dq * (factor * LN_2)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [b, n, row, 0], qs.index(G))
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(G), count=1)
        piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)


@gluon.jit
def attention_bwd_dq_sm90_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, lse_ptr, delta_ptr, S_q, S_k, S_pad, N, group, heads, chunk, factor,
    CAUSAL: gl.constexpr, WHOLE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    qs = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    dos = gl.allocate_shared_memory(q_desc.dtype, [2] + do_desc.block_type.shape, do_desc.layout)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    descs = (q_desc, do_desc, k_desc, v_desc, dq_desc)
    buffers = (qs, dos, ks, vs)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    sizes = (gl.to_tensor(S_q), gl.to_tensor(S_k), gl.to_tensor(S_pad), gl.to_tensor(N), gl.to_tensor(group), gl.to_tensor(heads), gl.to_tensor(chunk))
    factor = gl.to_tensor(factor)
    gl.warp_specialize(
        [
            (_dq_consumer, (descs, buffers, barriers, sizes, lse_ptr, delta_ptr, factor, 0, CAUSAL, WHOLE, BLOCK_N, STAGES)),
            (_dq_consumer, (descs, buffers, barriers, sizes, lse_ptr, delta_ptr, factor, 1, CAUSAL, WHOLE, BLOCK_N, STAGES)),
            (_dq_loader, (descs, buffers, barriers, sizes, CAUSAL, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _dkv_loader(descs, buffers, barriers, sizes, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    k_desc, v_desc, q_desc, do_desc, lse_desc, dk_desc, dv_desc = descs
    ks, vs, qs, dos, lses, deltas, cols = buffers
    kv_full, q_full, q_free, do_full, do_free = barriers
    S_q, S_pad, N, group = sizes
    t = gl.program_id(0)
    n_kv = gl.program_id(1)
    b = gl.program_id(2)
    for g in gl.static_range(2):
        key = t * 2 * ROWS + g * ROWS
        mbarrier.expect(kv_full.index(g), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, n_kv, key, 0], kv_full.index(g), ks.index(g))
        tma.async_copy_global_to_shared(v_desc, [b, n_kv, key, 0], kv_full.index(g), vs.index(g))
    start = t * 2 * ROWS // BLOCK_M if CAUSAL else 0
    span = gl.maximum(gl.cdiv(S_q, BLOCK_M) - start, 0)
    for i in range(group * span):
        n = n_kv * group + i // span
        row = (start + i % span) * BLOCK_M
        line = (b * N + n) * S_pad + row
        at = i % STAGES
        phase = (i // STAGES & 1) ^ 1
        mbarrier.wait(q_free.index(at), phase)
        mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes + 4 * BLOCK_M)
        tma.async_copy_global_to_shared(q_desc, [b, n, row, 0], q_full.index(at), qs.index(at))
        tma.async_copy_global_to_shared(lse_desc, [line], q_full.index(at), lses.index(at))
        mbarrier.wait(do_free.index(at), phase)
        mbarrier.expect(do_full.index(at), do_desc.block_type.nbytes + 4 * BLOCK_M)
        tma.async_copy_global_to_shared(do_desc, [b, n, row, 0], do_full.index(at), dos.index(at))
        tma.async_copy_global_to_shared(lse_desc, [line + gl.num_programs(2) * N * S_pad], do_full.index(at), deltas.index(at))


@gluon.jit
def _dkv_consumer(
    descs, buffers, barriers, sizes, factor, G: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    k_desc, v_desc, q_desc, do_desc, lse_desc, dk_desc, dv_desc = descs
    ks, vs, qs, dos, lses, deltas, cols = buffers
    kv_full, q_full, q_free, do_full, do_free = barriers
    S_q, S_pad, N, group = sizes
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv_layout, k_width=2)
    col_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    nothing = gl.full([ROWS, BLOCK_M], 0.0, gl.float32, s_layout)
    k = ks.index(G).reshape([ROWS, D])
    v = vs.index(G).reshape([ROWS, DV])
    t = gl.program_id(0)
    n_kv = gl.program_id(1)
    b = gl.program_id(2)
    key = t * 2 * ROWS + G * ROWS
    start = t * 2 * ROWS // BLOCK_M if CAUSAL else 0
    span = gl.maximum(gl.cdiv(S_q, BLOCK_M) - start, 0)
    dk = gl.full([ROWS, D], 0.0, gl.float32, dk_layout)
    dv = gl.full([ROWS, DV], 0.0, gl.float32, dv_layout)
    mbarrier.wait(kv_full.index(G), 0)
    row = start * BLOCK_M
    for i in range(group * span):
        at = i % STAGES
        phase = i // STAGES & 1
        mbarrier.wait(q_full.index(at), phase)
        s = warpgroup_mma(k, qs.index(at).reshape([BLOCK_M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(at), phase)
        dp = warpgroup_mma(v, dos.index(at).reshape([BLOCK_M, DV]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lses.index(at).load(col_layout)
        s = warpgroup_mma_wait(1, deps=(s,))
        if CAUSAL:
            if row <= key:
                rows = row + cols.load(col_layout)
                keys = key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
                s = gl.where(keys[:, None] <= rows[None, :], s, float("-inf"))
            row += BLOCK_M
            row = gl.where(row < S_q, row, start * BLOCK_M)
        p = gl.exp2(gl.fma(s, factor, -lse[None, :]))
        mbarrier.wait(do_full.index(at), phase)
        dp, p = warpgroup_mma_wait(0, deps=(dp, p))
        delta = deltas.index(at).load(col_layout)
        pb = gl.convert_layout(_narrow(p, dtype), p_layout)
        dv = warpgroup_mma(pb, dos.index(at).reshape([BLOCK_M, DV]), dv, is_async=True)
        ds = gl.convert_layout(_narrow(p * (dp - delta[None, :]), dtype), ds_layout)
        dk = warpgroup_mma(ds, qs.index(at).reshape([BLOCK_M, D]), dk, is_async=True)
        dv, pb = warpgroup_mma_wait(1, deps=(dv, pb))
        mbarrier.arrive(do_free.index(at), count=1)
        dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
        mbarrier.arrive(q_free.index(at), count=1)
    k.store((dk * (factor * LN_2)).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, n_kv, key, 0], ks.index(G))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [b, n_kv, key, 0], vs.index(G))
    tma.store_wait(0)


@gluon.jit
def attention_bwd_dkv_sm90_kernel(
    k_desc, v_desc, q_desc, do_desc, lse_desc, dk_desc, dv_desc, S_q, S_pad, N, group, factor,
    CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    ks = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    vs = gl.allocate_shared_memory(k_desc.dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    qs = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    dos = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout)
    cols = gl.allocate_shared_memory(gl.int32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    cols.store(gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0])))
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_free.index(i), count=2)
    fence_async_shared()
    descs = (k_desc, v_desc, q_desc, do_desc, lse_desc, dk_desc, dv_desc)
    buffers = (ks, vs, qs, dos, lses, deltas, cols)
    barriers = (kv_full, q_full, q_free, do_full, do_free)
    sizes = (gl.to_tensor(S_q), gl.to_tensor(S_pad), gl.to_tensor(N), gl.to_tensor(group))
    factor = gl.to_tensor(factor)
    gl.warp_specialize(
        [
            (_dkv_consumer, (descs, buffers, barriers, sizes, factor, 0, CAUSAL, BLOCK_M, STAGES)),
            (_dkv_consumer, (descs, buffers, barriers, sizes, factor, 1, CAUSAL, BLOCK_M, STAGES)),
            (_dkv_loader, (descs, buffers, barriers, sizes, CAUSAL, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
