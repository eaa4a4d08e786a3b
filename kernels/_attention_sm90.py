"""Attention on Hopper, after FlashAttention-3 (J. Shah et al., 2024), in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

#: Rows of a tile of queries that one warpgroup takes, those of the tensor core's instruction.
ROWS = gl.constexpr(64)

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _narrow(x, dtype: gl.constexpr):
    """`x` in float32 as `dtype`, two by one instruction; the compiler would take one each."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _place(turn, tiles, heads, chunk, N, CAUSAL: gl.constexpr):
    """Which piece of work this program does in its turn-th turn: its number, tile of queries, batch
    and head. The direction changes from turn to turn, so that all programs get alike."""
    P = gl.num_programs(0)
    pid = gl.program_id(0)
    piece = turn * P + gl.where(turn % 2 == 0, pid, P - 1 - pid)
    first = piece // (chunk * tiles) * chunk
    size = gl.minimum(chunk, heads - first)
    rest = piece - first * tiles
    m = rest // size
    head = first + rest % size
    if CAUSAL:
        m = tiles - 1 - m
    return piece, m, head // N, head % N


@gluon.jit
def _keys(m, S_k, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many tiles of keys queries m * BLOCK_M ... see."""
    end = S_k
    if CAUSAL:
        end = gl.minimum(S_k, (m + 1) * BLOCK_M)
    return gl.cdiv(end, BLOCK_N)


@gluon.jit
def _loader(
    descs, buffers, barriers, sizes, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc = descs
    qs, ks, vs, outs = buffers
    q_full, q_free, k_full, k_free, v_full, v_free, turn = barriers
    S_q, S_k, N, group, heads, chunk = sizes
    tiles = gl.cdiv(S_q, BLOCK_M)
    step = gl.to_tensor(0)
    done = gl.to_tensor(0)
    piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)
    while piece < tiles * heads:
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(g), (done & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [b, n, m * BLOCK_M + g * ROWS, 0], q_full.index(g), qs.index(g)
            )
        count = _keys(m, S_k, CAUSAL, BLOCK_M, BLOCK_N)
        for i in range(count):
            key = (count - 1 - i) * BLOCK_N
            at = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(at), phase)
            mbarrier.expect(k_full.index(at), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, n // group, key, 0], k_full.index(at), ks.index(at)
            )
            mbarrier.wait(v_free.index(at), phase)
            mbarrier.expect(v_full.index(at), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, n // group, key, 0], v_full.index(at), vs.index(at)
            )
            step += 1
        done += 1
        piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)


@gluon.jit
def _softmax(s, highest, total, factor, first_row, key, S_k, CAUSAL: gl.constexpr, EDGE: gl.constexpr, LAYOUT: gl.constexpr):
    if EDGE:
        keys = key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        seen = (keys < S_k)[None, :]
        if CAUSAL:
            rows = first_row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT))
            seen = seen & (keys[None, :] <= rows[:, None])
        s = gl.where(seen, s, float("-inf"))
    now = gl.maximum(highest, gl.max(s, 1) * factor)
    anchor = now
    if EDGE:
        anchor = gl.where(now == float("-inf"), 0.0, now)
    p = gl.exp2(gl.fma(s, factor, -anchor[:, None]))
    fade = gl.exp2(highest - anchor)
    total = total * fade + gl.sum(p, 1)
    return p, now, total, fade


@gluon.jit
def _attend(
    descs, buffers, barriers, sizes, lse_ptr, factor, G: gl.constexpr,
    CAUSAL: gl.constexpr, WHOLE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, PINGPONG: gl.constexpr, SHARE: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc = descs
    qs, ks, vs, outs = buffers
    q_full, q_free, k_full, k_free, v_full, v_free, turn = barriers
    S_q, S_k, N, group, heads, chunk = sizes
    D: gl.constexpr = q_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    dtype: gl.constexpr = q_desc.dtype
    EDGES: gl.constexpr = BLOCK_M // BLOCK_N if CAUSAL and BLOCK_M > BLOCK_N else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_layout)
    q = qs.index(G).reshape([ROWS, D])
    tiles = gl.cdiv(S_q, BLOCK_M)
    step = gl.to_tensor(0)
    done = gl.to_tensor(0)
    piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)
    while piece < tiles * heads:
        row = m * BLOCK_M + G * ROWS
        count = _keys(m, S_k, CAUSAL, BLOCK_M, BLOCK_N)
        highest = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        total = gl.full([ROWS], 0.0, gl.float32, row_layout)
        mbarrier.wait(q_full.index(G), done & 1)

        # the last keys, the only ones at an edge
        at = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(at), phase)
        k = ks.index(at).reshape([BLOCK_N, D]).permute((1, 0))
        s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(at), count=1)
        x, highest, total, fade = _softmax(
            s, highest, total, factor, row, (count - 1) * BLOCK_N, S_k, CAUSAL, not WHOLE, s_layout
        )
        p = gl.convert_layout(x.to(dtype), p_layout)
        acc = gl.full([ROWS, DV], 0.0, gl.float32, o_layout)
        mbarrier.wait(v_full.index(at), phase)
        for PART in gl.static_range(2):
            if PART == 1 or EDGES > 1:
                for i in range(1 if PART == 0 else EDGES, gl.minimum(EDGES, count) if PART == 0 else count):
                    v_at = at
                    step += 1
                    at = step % STAGES
                    phase = step // STAGES & 1
                    mbarrier.wait(k_full.index(at), phase)
                    if PINGPONG:
                        mbarrier.wait(turn.index(G), (step - done - 1) & 1)
                    k = ks.index(at).reshape([BLOCK_N, D]).permute((1, 0))
                    s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
                    v = vs.index(v_at).reshape([BLOCK_N, DV])
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    if PINGPONG:
                        mbarrier.arrive(turn.index(1 - G), count=1)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    mbarrier.arrive(k_free.index(at), count=1)
                    x, highest, total, fade = _softmax(
                        s, highest, total, factor, row, (count - 1 - i) * BLOCK_N, S_k, CAUSAL, PART == 0, s_layout
                    )
                    mbarrier.wait(v_full.index(at), phase)
                    acc, p, x = warpgroup_mma_wait(0, deps=(acc, p, x))
                    mbarrier.arrive(v_free.index(v_at), count=1)
                    p = gl.convert_layout(x.to(dtype), p_layout)
                    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        if not SHARE:
            mbarrier.arrive(q_free.index(G), count=1)
        v = vs.index(at).reshape([BLOCK_N, DV])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        step += 1
        done += 1
        blind = total == 0
        safe = gl.where(blind, 1.0, total)
        lse = (highest + gl.log2(safe)) * LN_2
        lse = gl.where(blind, float("-inf"), lse)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_free.index(at), count=1)
        acc = acc / gl.convert_layout(safe, gl.SliceLayout(1, o_layout))[:, None]
        out = outs.index(G)
        tma.store_wait(0)
        out.reshape([ROWS, DV]).store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [b, n, row, 0], out)
        if SHARE:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(G), count=1)
        rows = row + gl.arange(0, ROWS, layout=row_layout)
        gl.store(lse_ptr + (b * N + n).to(gl.int64) * S_q + rows, lse, mask=rows < S_q)
        piece, m, b, n = _place(done, tiles, heads, chunk, N, CAUSAL)
    tma.store_wait(0)


@gluon.jit
def attention_fwd_sm90_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, S_q, S_k, N, group, heads, chunk, factor,
    CAUSAL: gl.constexpr, WHOLE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, SHARE: gl.constexpr, CONSUMER_REGS: gl.constexpr = 240,
):
    GROUPS: gl.constexpr = BLOCK_M // ROWS
    qs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    vs = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    if SHARE:
        outs = qs
    else:
        outs = gl.allocate_shared_memory(o_desc.dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    mbarrier.arrive(turn.index(0), count=1)
    fence_async_shared()
    descs = (q_desc, k_desc, v_desc, o_desc)
    buffers = (qs, ks, vs, outs)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free, turn)
    sizes = (gl.to_tensor(S_q), gl.to_tensor(S_k), gl.to_tensor(N), gl.to_tensor(group), gl.to_tensor(heads), gl.to_tensor(chunk))
    factor = gl.to_tensor(factor)
    gl.warp_specialize(
        [
            (_attend, (descs, buffers, barriers, sizes, lse_ptr, factor, 0, CAUSAL, WHOLE, BLOCK_M, BLOCK_N, STAGES, GROUPS, PINGPONG, SHARE)),
            (_attend, (descs, buffers, barriers, sizes, lse_ptr, factor, 1, CAUSAL, WHOLE, BLOCK_M, BLOCK_N, STAGES, GROUPS, PINGPONG, SHARE)),
            (_loader, (descs, buffers, barriers, sizes, CAUSAL, BLOCK_M, BLOCK_N, STAGES, GROUPS)),
        ],
        [4, 1], [CONSUMER_REGS, 24],
    )
