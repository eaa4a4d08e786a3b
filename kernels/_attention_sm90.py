"""Attention on Hopper in Gluon, after FlashAttention-3 (J. Shah et al., 2024).

The formulas and tiles are those of `attention.py`; what is new is who does what and when. A loader
warp copies tiles through TMA. Each of two warpgroups issues the products of one tile of scores,
S = Q K^T, and of the tile before, out += P V with P in registers, and computes exponentials under
the second. Scores are in the units of log2. Programs are persistent: while one tile of queries
ends, the loader fetches for the next.
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
from ._common import LN_2, LOG2_E
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
from ._launch import Call

#: Arguments of any value: one program serves them all.
SIZES = ["S_q", "S_k", "N", "group", "heads", "chunk"]


@gluon.jit
def key_tiles(m, S_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many tiles of keys the m-th tile of queries sees."""
    end = S_k
    if CAUSAL:
        end = gl.minimum(S_k, (m + 1) * BLOCK)
    return gl.cdiv(end, BLOCK_N)


@gluon.jit
def hide(s, row, key, S_k, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf where query row + i does not see key key + j."""
    keys = key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    seen = (keys < S_k)[None, :]
    if CAUSAL:
        # min(i + row, S_k - 1) is the last key that query row + i sees: one comparison for both
        rows = row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        seen = keys[None, :] <= gl.minimum(rows, S_k - 1)[:, None]
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _load(descs, slots, bars, sizes, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    q_desc, k_desc, v_desc, _ = descs
    qs, ks, vs, _ = slots
    q_bars, k_bars, v_bars = bars
    S_q, S_k, N, group, heads, chunk = sizes
    STAGES: gl.constexpr = ks.shape[0]
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
            if i == 0:  # behind the first keys, which find room before the queries do
                for g in gl.static_range(2):
                    row = m * BLOCK + g * ROWS
                    expect(q_bars, g, turn, q_desc.block_type.nbytes)
                    tma_load(q_desc, [b, n, row, 0], q_bars[0].index(g), qs.index(g))
            expect(v_bars, slot, step // STAGES, v_desc.block_type.nbytes)
            tma_load(v_desc, at, v_bars[0].index(slot), vs.index(slot))
            step += 1
        turn += 1
        m, head = place(turn, tiles, heads, chunk, CAUSAL)


#: The highest score before any, finite so that it may be subtracted from itself.
_LOWEST = gl.constexpr(-3.0e38)


@gluon.jit
def _softmax(s, highest, total, factor):
    """One tile of the online softmax: P relative to exp2(highest), and how far that moved."""
    now = gl.maximum(highest, gl.max(s, 1) * factor)
    p = gl.exp2(gl.fma(s, factor, -now[:, None]))
    fade = gl.exp2(highest - now)
    return p, now, total * fade + gl.sum(p, 1), fade


@gluon.jit
def _compute(
    descs,
    slots,
    bars,
    sizes,
    lse_ptr,
    factor,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    WHOLE: gl.constexpr,
    OWN_ROOM: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    o_desc = descs[3]
    qs, ks, vs, outs = slots
    q_bars, k_bars, v_bars = bars
    S_q, S_k, N, _group, heads, chunk = sizes
    STAGES: gl.constexpr = ks.shape[0]
    S_LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    O_LAYOUT: gl.constexpr = accumulator(vs.shape[-1])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    EDGES: gl.constexpr = BLOCK // BLOCK_N if CAUSAL else 1  # tiles of keys at the diagonal
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
    q = matrix(qs.index(GROUP))
    tiles = gl.cdiv(S_q, BLOCK)
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    m, head = place(turn, tiles, heads, chunk, CAUSAL)
    while head < heads:
        row = m * BLOCK + GROUP * ROWS
        count = key_tiles(m, S_k, CAUSAL, BLOCK_N)
        highest = gl.full([ROWS], _LOWEST, gl.float32, ROW_LAYOUT)
        total = gl.full([ROWS], 0.0, gl.float32, ROW_LAYOUT)
        acc = gl.full([ROWS, vs.shape[-1]], 0.0, gl.float32, O_LAYOUT)

        # The last keys come first: theirs are the tiles that take a comparison.
        arrived(q_bars, GROUP, turn)
        slot = step % STAGES
        arrived(k_bars, slot, step // STAGES)
        s = warpgroup_mma(
            q, matrix(ks.index(slot)).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=(s,))
        release(k_bars, slot)
        if not WHOLE:
            s = hide(s, row, (count - 1) * BLOCK_N, S_k, CAUSAL, S_LAYOUT)
        e, highest, total, _fade = _softmax(s, highest, total, factor)
        p = gl.convert_layout(narrow(e, q.dtype), operand(vs.shape[-1]))
        arrived(v_bars, slot, step // STAGES)
        for i in range(1, count):
            before = step % STAGES
            step += 1
            slot = step % STAGES
            arrived(k_bars, slot, step // STAGES)
            k = matrix(ks.index(slot)).permute((1, 0))
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            acc = warpgroup_mma(p, matrix(vs.index(before)), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            release(k_bars, slot)
            if EDGES > 1:  # noqa: SIM102  (known when it compiles, the next is not)
                if i < EDGES:
                    s = hide(s, row, (count - 1 - i) * BLOCK_N, S_k, CAUSAL, S_LAYOUT)
            e, highest, total, fade = _softmax(s, highest, total, factor)
            # Also a fence: the assembler would move the exponentials past the wait for P V, which
            # they are to overlap, but not past a loop. P is in use until then: `e` waits as well.
            arrived(v_bars, slot, step // STAGES)
            acc, p, e = warpgroup_mma_wait(0, deps=(acc, p, e))
            release(v_bars, before)
            p = gl.convert_layout(narrow(e, q.dtype), operand(vs.shape[-1]))
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
        if OWN_ROOM:
            release(q_bars, GROUP)
        slot = step % STAGES
        acc = warpgroup_mma(p, matrix(vs.index(slot)), acc, is_async=True)
        step += 1
        turn += 1

        blind = total == 0  # saw no key
        total = gl.where(blind, 1.0, total)
        lse = gl.where(blind, float("-inf"), (highest + gl.log2(total)) * LN_2)
        rows = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        gl.store(lse_ptr + head.to(gl.int64) * S_q + rows, lse, mask=rows < S_q)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        release(v_bars, slot)
        acc = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        out = narrow(acc, q.dtype)
        if OWN_ROOM:
            tma.store_wait(0)  # the one before
        matrix(outs.index(GROUP)).store(out)
        fence_async_shared()
        tma_store(o_desc, [head // N, head % N, row, 0], outs.index(GROUP))
        if not OWN_ROOM:
            tma.store_wait(0)
            release(q_bars, GROUP)
        m, head = place(turn, tiles, heads, chunk, CAUSAL)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def attention_fwd_sm90_kernel(
    q_desc,  # [B, N, S_q, D] in blocks of ROWS
    k_desc,  # [B, N_kv, S_k, D] in blocks of BLOCK_N
    v_desc,  # [B, N_kv, S_k, D_v] in blocks of BLOCK_N
    o_desc,  # [B, N, S_q, D_v] in blocks of ROWS
    lse_ptr,  # [B, N, S_q], contiguous
    S_q,
    S_k,
    N,
    group,  # N // N_kv
    heads,  # B * N
    chunk,  # heads that L2 holds
    factor,  # the scale in the units of log2, above zero
    CAUSAL: gl.constexpr,
    WHOLE: gl.constexpr,  # no tile of keys takes a comparison
    OWN_ROOM: gl.constexpr,  # results have memory of their own: the next queries come earlier
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    qs = room(q_desc, 2)
    ks = room(k_desc, STAGES)
    vs = room(v_desc, STAGES)
    outs = qs  # what is as large as a tile of queries may take its place
    if OWN_ROOM:
        outs = room(o_desc, 2)
    descs = (q_desc, k_desc, v_desc, o_desc)
    slots = (qs, ks, vs, outs)
    bars = (ring(2, 1), ring(STAGES, 2), ring(STAGES, 2))
    fence_async_shared()
    sizes = (S_q, S_k, N, group, heads, chunk)
    gl.warp_specialize(
        [
            (_compute, (
                descs, slots, bars, sizes, lse_ptr, factor, 0, CAUSAL, WHOLE, OWN_ROOM, BLOCK_N
            )),
            (_compute, (
                descs, slots, bars, sizes, lse_ptr, factor, 1, CAUSAL, WHOLE, OWN_ROOM, BLOCK_N
            )),
            (_load, (descs, slots, bars, sizes, CAUSAL, BLOCK_N)),
        ],
        [4, 1],
        [READER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Call:
    """`attention_fwd` of `attention.py` into `out` and `lse`, where `_on_hopper` is true."""
    B, N, S_q, D = q.shape
    S_k, D_v = v.shape[2:]
    config = _configs.ATTENTION_FWD_SM90[D, D_v]
    tiles, programs = grid(q)
    args = (
        descriptor(q, ROWS.value, D),
        descriptor(k, config.block, D),
        descriptor(v, config.block, D_v),
        descriptor(out, ROWS.value, D_v),
        lse,
        S_q,
        S_k,
        N,
        N // k.shape[1],
        B * N,
        heads_together(k, v, N, tiles, programs),
        scale * LOG2_E.value,
    )
    constants = {
        "CAUSAL": causal,
        "WHOLE": not causal and S_k % config.block == 0,
        "OWN_ROOM": D_v != D or D <= 128,  # of 256 there would be more than a multiprocessor has
        "BLOCK_N": config.block,
        "STAGES": config.num_stages,
        **LAUNCH_SM90,
    }
    return Call(attention_fwd_sm90_kernel, (programs,), args, constants)
