"""The time loop: one launch walks a whole sequence, forwards or backwards.

    state_s = CELL(input_s + state_{s-1} M)          s = 0 ... T - 1

Forward, M = W_hh^T and the input is W_ih x_t + b; backward through time, M = W_hh, the state is the
gradient of the sum inside f, and the input is dy_t. Batch rows do not depend on each other: a
program owns BLOCK_B of them for all steps and no two programs ever meet.
"""

import triton
import triton.language as tl

from ._common import dot, load_tile, to_storage


@triton.jit
def _load_step(
    input_ptr,
    aux_ptr,
    here,  # [BLOCK_B, BLOCK_N], offsets
    rows_ok,
    n_ok,
    ACC: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_AUX: tl.constexpr,
):
    """What one step reads besides the last state, in storage dtypes: a conversion would wait."""
    z = tl.zeros(here.shape, ACC)
    if HAS_INPUT:
        z = load_tile(input_ptr + here, rows_ok, n_ok, True, True)
    aux = z
    if HAS_AUX:
        aux = load_tile(aux_ptr + here, rows_ok, n_ok, True, True)
    return z, aux


@triton.jit
def recurrence(
    input_ptr,  # [T, B, H], or unused
    add_ptr,  # [B, H], added to the input of the first step, or unused
    start_ptr,  # [B, H], the state before the first step, or unused (zeros)
    aux_ptr,  # [T, B, H], the second argument of CELL, or unused
    m_ptr,  # [H, H]
    state_ptr,  # [T, B, H], written; where streamed, each step reads the last one from it
    T,
    B,
    H,
    stride_mk,
    stride_mn,
    CELL: tl.constexpr,  # CELL(z, aux, KIND): the state from the sum z, in z's dtype
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_AUX: tl.constexpr,
    FROM_END: tl.constexpr,  # step 0 is t = T - 1
    RESIDENT: tl.constexpr,  # M stays on the chip for all steps; then BLOCK_N = BLOCK_K >= H
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows_ok = (rows < B)[:, None]
    ks = tl.arange(0, BLOCK_K)
    ns = tl.arange(0, BLOCK_N)
    tile_rows = rows[:, None].to(tl.int64) * H  # offset of a row in [B, H]
    step_size = tl.cast(B, tl.int64) * H
    m_ptrs = m_ptr + ks[:, None].to(tl.int64) * stride_mk + ns[None, :].to(tl.int64) * stride_mn
    storage: tl.constexpr = state_ptr.dtype.element_ty

    if RESIDENT:
        n_ok = (ns < H)[None, :]
        inside = rows_ok & n_ok
        tile = tile_rows + ns[None, :]
        m = load_tile(m_ptrs, (ks < H)[:, None], n_ok, True, True)
        state = tl.zeros([BLOCK_B, BLOCK_N], storage)
        if HAS_START:
            state = load_tile(start_ptr + tile, rows_ok, n_ok, True, True)
        here = (T - 1 if FROM_END else 0) * step_size + tile
        z, aux = _load_step(input_ptr, aux_ptr, here, rows_ok, n_ok, ACC, HAS_INPUT, HAS_AUX)
        for s in range(T):
            # The next step's loads are under way while this step computes. The last step has no
            # next one, loads its own again and drops it.
            ahead = tl.minimum(s + 1, T - 1)
            there = (T - 1 - ahead if FROM_END else ahead) * step_size + tile
            z_ahead, aux_ahead = _load_step(
                input_ptr, aux_ptr, there, rows_ok, n_ok, ACC, HAS_INPUT, HAS_AUX
            )
            total = z.to(ACC)
            if HAS_ADD:
                total += tl.load(add_ptr + tile, mask=inside & (s == 0), other=0.0).to(ACC)
            total = dot(state, m, total)
            state = to_storage(CELL(total, aux.to(ACC), KIND), storage)
            tl.store(state_ptr + here, state, mask=inside)
            here = there
            z = z_ahead
            aux = aux_ahead
    else:
        for s in range(T):
            now = (T - 1 - s if FROM_END else s) * step_size
            last_ptr = state_ptr + (now + step_size if FROM_END else now - step_size)
            depth = H
            if HAS_START:
                if s == 0:
                    last_ptr = start_ptr
            else:
                depth = tl.where(s == 0, 0, H)
            for n in range(0, H, BLOCK_N):
                n_ok = (n + ns < H)[None, :]
                inside = rows_ok & n_ok
                tile = tile_rows + n + ns[None, :]
                here = now + tile
                z, aux = _load_step(
                    input_ptr, aux_ptr, here, rows_ok, n_ok, ACC, HAS_INPUT, HAS_AUX
                )
                total = tl.zeros([BLOCK_B, BLOCK_N], ACC)
                for k in range(0, depth, BLOCK_K):
                    k_ok = k + ks < H
                    last_ptrs = last_ptr + tile_rows + k + ks[None, :]
                    last = load_tile(last_ptrs, rows_ok, k_ok[None, :], True, True)
                    corner = tl.cast(k, tl.int64) * stride_mk + tl.cast(n, tl.int64) * stride_mn
                    m = load_tile(m_ptrs + corner, k_ok[:, None], n_ok, True, True)
                    total = dot(last, m, total)
                total += z.to(ACC)
                if HAS_ADD:
                    total += tl.load(add_ptr + tile, mask=inside & (s == 0), other=0.0).to(ACC)
                state = to_storage(CELL(total, aux.to(ACC), KIND), storage)
                tl.store(state_ptr + here, state, mask=inside)
            # The next step reads rows of `state_ptr` that other threads of this program wrote.
            tl.debug_barrier()
