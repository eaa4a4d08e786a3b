"""What kernels in Gluon for Hopper (sm_90) share.

A program is three warpgroups. Two, the readers, compute, each on 64 rows of a tile, as many as one
wgmma instruction has. In the third a single warp, the loader, fills rings of shared memory through
the tensor memory accelerator (TMA). Each slot of a ring has two barriers: `full`, which the bytes
that arrive complete, and `free`, which the readers complete. A barrier's phase is the parity of the
lap, the round through the ring that a slot is on.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._common import LAUNCH, cdiv

# Triton 3.9 renamed both.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_load") else tma.async_copy_shared_to_global

#: Rows of a tile that one warpgroup takes, and those of a program's two.
ROWS = gl.constexpr(64)
BLOCK = gl.constexpr(128)

#: Registers of a thread at launch, 12 warps' even share of 64 K, which the warpgroups then trade:
#: the loader keeps few, and the readers get what it gave up.
LAUNCH_SM90 = {**LAUNCH, "num_warps": 4, "maxnreg": 168}
READER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def ring(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """The barriers (full, free) of `SLOTS` slots that `READERS` warpgroups read."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=READERS)
    return full, free


@gluon.jit
def room(desc, SLOTS: gl.constexpr):
    """Shared memory for `SLOTS` blocks of a descriptor."""
    shape: gl.constexpr = [SLOTS] + desc.block_type.shape
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def matrix(slot):
    """A slot without the leading axes of size one: [rows, columns]."""
    return slot.reshape([slot.shape[-2], slot.shape[-1]])


@gluon.jit
def expect(bars, slot, lap, BYTES: gl.constexpr):
    """The loader: once a slot is free, announce so many bytes."""
    full, free = bars
    mbarrier.wait(free.index(slot), (lap & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)


@gluon.jit
def arrived(bars, slot, lap):
    """A reader: wait until a slot is full."""
    mbarrier.wait(bars[0].index(slot), lap & 1)


@gluon.jit
def release(bars, slot):
    """A reader: it has read the slot."""
    mbarrier.arrive(bars[1].index(slot), count=1)


@gluon.jit
def place(turn, tiles, heads, chunk, LAST_FIRST: gl.constexpr):
    """What a persistent program does in its turn-th turn: (tile, head of all batches).

    There is nothing left where head >= heads. Tiles that cost the same go head by head. Where the
    last ones cost the most, a `chunk` of heads, whose keys and values L2 holds, is done tile by
    tile, the longest first. Programs go through the pieces of a chunk forth and back, so that who
    has the longest of one lap has the shortest of the next, or none where the chunk ends. Each
    chunk starts with a lap of its own: if all were one row of pieces, their period and that of the
    laps would give the same programs the longest pieces again and again.
    """
    programs = gl.num_programs(0)
    pid = gl.program_id(0)
    if LAST_FIRST:
        laps = chunk * tiles // programs  # of all programs; the last one is of some
        last = gl.where(laps % 2 == 0, pid, programs - 1 - pid)
        turns = laps + gl.where(last < chunk * tiles % programs, 1, 0)
        lap = turn % turns
        first = turn // turns * chunk
        size = gl.minimum(chunk, heads - first)
        piece = lap * programs + gl.where(lap % 2 == 0, pid, programs - 1 - pid)
        over = piece >= size * tiles  # the last chunk may be smaller
        size = gl.maximum(size, 1)
        return tiles - 1 - piece // size, gl.where(over, heads, first + piece % size)
    else:
        piece = turn * programs + pid
        return piece % tiles, piece // tiles


@gluon.jit
def narrow(x, dtype: gl.constexpr):
    """`x` [M, N] in float32 rounded to `dtype`, two numbers by one instruction.

    Without it the compiler rounds one at a time, and then needs registers to join them.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.constexpr_function
def accumulator(columns):
    """The layout of one warpgroup's float32 [ROWS, columns]."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.constexpr_function
def operand(columns):
    """The layout of a 16-bit left operand in registers, whose product has `columns` columns."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(columns), k_width=2)


_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """What TMA copies blocks [1, ..., *block] of a `reachable` tensor by."""
    block = (1,) * (tensor.dim() - len(block)) + block
    # The stride of an axis of size one is never used, but it is checked.
    unit = 16 // tensor.element_size()
    sizes = list(tensor.shape)
    strides = [s if n > 1 else unit for n, s in zip(sizes, tensor.stride(), strict=True)]
    return TensorDescriptor(
        tensor, sizes, [*strides[:-1], 1], list(block), _layout(block, tensor.dtype)
    )


def reachable(tensor: Tensor) -> bool:
    """Whether TMA can address the tensor: rows without gaps, all else in steps of 16 bytes."""
    unit = 16 // tensor.element_size()
    axes = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return (
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(n == 1 or (s > 0 and s % unit == 0) for n, s in axes)
    )


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once; one where no GPU is there to ask."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


#: Bytes of keys and values that programs side by side read again and again: they stay in an L2 of
#: 50 MB, each half of which may hold its own copy.
_REREAD = 16 * 2**20


def heads_together(k: Tensor, v: Tensor, N: int, tiles: int, programs: int) -> int:
    """How many query heads, of so many tiles each, `place` does at a time: those whose keys and
    values [B, N_kv, S_k, D] and [..., D_v] L2 holds, for an even number of laps."""
    B, N_kv, S_k, D = k.shape
    head = S_k * (D + v.shape[-1]) * k.element_size()
    laps = _REREAD // head * (N // N_kv) * tiles // programs
    return min(max(max(laps // 2, 1) * 2 * programs // tiles, 1), B * N)


def grid(q: Tensor) -> tuple[int, int]:
    """How many tiles of BLOCK queries [B, N, S_q, D] a head has, and how many programs do them."""
    B, N, S_q, _ = q.shape
    tiles = cdiv(S_q, BLOCK.value)
    return tiles, min(tiles * B * N, multiprocessors(q.device))
