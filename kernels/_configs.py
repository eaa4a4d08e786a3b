"""Block sizes and heuristics as data. Nothing autotunes: the same call always runs the same kernel.

Every entry was chosen so that it compiles for its chips without a register spill and within their
shared memory (tests/test_triton_compile.py holds both); `tuned_on` names the GPU that the entry was
then timed on, None where it never was.

Chips: the "sm_80" tables fit 99 KB of shared memory, so that they serve every chip from sm_80 up,
consumer chips (sm_86, sm_89, sm_120) included; the "sm_90" tables use the 227 KB of the data-centre
chips sm_90 and sm_100.
"""

import math
from dataclasses import dataclass

import torch

H100 = "NVIDIA H100 80GB HBM3"
H200 = "NVIDIA H200"

#: Bytes of shared memory that one block may use, by table.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}


@dataclass(frozen=True)
class ProductConfig:
    """C [block_m, block_n] by steps of block_k; group_m rows of tiles share columns of B in L2.

    Where `flat`, there are as many programs as run at the same time. Each goes over its tiles of C
    and the steps of all of them in one loop, so that the next tile is read while one is written; on
    sm_90 alone, as that spills on sm_100.
    `precision` as in `_common.dot`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    flat: bool = False
    precision: str = "ieee"
    tuned_on: str | None = None


@dataclass(frozen=True)
class RecurrenceConfig:
    """A program owns block_b batch rows and block_n units.

    The state product goes over tiles of block_k numbers of the state, each split in `splits` parts
    that different warps multiply. Where `held`, the program's slice of W_hh stays on the chip for
    the whole sequence, up to `held` bytes; then tiles are up to most_k deep where that wastes no
    more, and up to `group` bytes of the state are read at once.
    """

    block_b: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int = 1
    held: int = 0
    most_k: int = 1024
    group: int = 96 << 10
    tuned_on: str | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """block_m query rows against block_n key rows.

    `ruled`: what takes its place under a cap, ALiBi or dropout, where those take more registers
    than there are.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tuned_on: str | None = None
    ruled: "AttentionConfig | None" = None


def _both(
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    ruled: AttentionConfig | None = None,
) -> tuple[AttentionConfig, AttentionConfig]:
    """One entry for both."""
    config = AttentionConfig(block_m, block_n, num_warps, num_stages, ruled=ruled)
    return config, config


@dataclass(frozen=True)
class HopperConfig:
    """`block` rows a step, of keys or, for dK and dV, of queries; num_stages steps in memory."""

    block: int
    num_stages: int
    tuned_on: str | None = None


@dataclass(frozen=True)
class DeltaConfig:
    """block_m rows a program."""

    block_m: int
    num_warps: int
    tuned_on: str | None = None


@dataclass(frozen=True)
class LossConfig:
    """block_r rows by block_v words or tiles of words."""

    block_r: int
    block_v: int
    num_warps: int
    tuned_on: str | None = None


#: Split-K of the weight gradients: programs wanted, rows of K a split has at least and at most (the
#: sum inside a split is one chain of float32 additions), and splits (each is a partial [M, N]).
#: Sizes alone decide, not the GPU, so that results repeat on every one.
SPLIT_PROGRAMS = 264
SPLIT_LEAST = 256
SPLIT_MOST = 2048
SPLITS = 64
#: Rows of K that a split is a multiple of, as is this of every block_k: descriptors know the end of
#: K but not that of a split, so a tile must not reach beyond it.
SPLIT_STEP = 64

#: By dtype: the first entry whose block_m covers M, else the last.
PRODUCT = {
    torch.float16: (ProductConfig(16, 64, 64, 4, 3), ProductConfig(128, 128, 32, 8, 3)),
    torch.float32: (
        ProductConfig(16, 64, 16, 4, 3),
        ProductConfig(64, 64, 32, 4, 3, precision="bf16x6", tuned_on=H100),
    ),
    torch.float64: (ProductConfig(16, 64, 16, 4, 3), ProductConfig(64, 64, 16, 8, 3)),
}

#: By table: for 16-bit floats, programs that own all units of their batch rows; the first entry
#: that covers H serves if the matrices of all gates take no more than its `held` bytes.
_SMALL = (
    RecurrenceConfig(8, 32, 32, 1, 2, held=8 << 10),
    RecurrenceConfig(4, 64, 64, 1, 4, held=32 << 10),
)
ALONE = {
    "sm_80": (*_SMALL, RecurrenceConfig(4, 128, 128, 1, 8, held=32 << 10)),
    "sm_90": (
        *_SMALL,
        RecurrenceConfig(4, 128, 128, 1, 8, held=128 << 10),
        RecurrenceConfig(8, 256, 256, 1, 8, held=128 << 10),
    ),
}

#: By table and dtype: those that share the units. Of the entries whose slice of W_hh fits, the
#: first that needs the fewest rounds over the batch; the last holds none of it and fits always.
_STREAMED = RecurrenceConfig(16, 16, 128, 8, 8, 3)
TOGETHER = {
    "sm_80": {
        torch.float16: (
            RecurrenceConfig(16, 16, 128, 8, 8, held=48 << 10),
            RecurrenceConfig(16, 32, 128, 8, 8, held=48 << 10),
            _STREAMED,
        ),
        torch.float32: (
            RecurrenceConfig(8, 16, 128, 8, 8),
            RecurrenceConfig(16, 16, 128, 8, 8),
        ),
        torch.float64: (RecurrenceConfig(16, 16, 64, 4, 4),),
    },
}
TOGETHER["sm_90"] = TOGETHER["sm_80"] | {
    torch.float16: (
        # Few warps, which wait for each other less.
        RecurrenceConfig(8, 16, 128, 4, 4, held=96 << 10, group=16 << 10, tuned_on=H200),
        # Few rows of more units than the registers of few warps hold: twice as many programs each
        # multiply half as much, and read less at once.
        RecurrenceConfig(16, 8, 128, 8, 8, held=64 << 10, group=32 << 10, tuned_on=H100),
        RecurrenceConfig(16, 16, 128, 8, 8, held=128 << 10),
        RecurrenceConfig(32, 16, 128, 8, 8, held=128 << 10, most_k=512, group=32 << 10),
        RecurrenceConfig(16, 32, 128, 8, 8, held=128 << 10),
        _STREAMED,
    ),
}

#: By table, dtype and block of head dims: the entry for whole heads without a mask, the one for the
#: rest, and, where they are not that, the ones for whole heads of packed sequences or in a window,
#: or else under a mask, a cap, ALiBi or dropout. All these, and head dims smaller than their block,
#: take registers.
_WIDE_FWD = {
    torch.float32: {
        32: _both(64, 32, 8, 2),
        64: (AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 16, 8, 2)),
        128: _both(32, 16, 8, 2),
        256: _both(32, 16, 8, 2),
    },
    torch.float64: {
        32: _both(64, 32, 8, 2),
        64: _both(64, 16, 8, 2, ruled=AttentionConfig(32, 16, 8, 2)),
        128: _both(32, 16, 8, 2),
    },
}
ATTENTION_FWD = {
    "sm_80": {
        torch.float16: {
            32: (AttentionConfig(128, 64, 4, 3), AttentionConfig(64, 64, 4, 2)),
            64: (AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 32, 4, 2)),
            128: (AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 32, 8, 2)),
            256: (AttentionConfig(64, 32, 8, 2), AttentionConfig(32, 32, 8, 1)),
        },
        **_WIDE_FWD,
    },
    "sm_90": {
        torch.float16: {
            32: (AttentionConfig(128, 128, 8, 3), AttentionConfig(128, 64, 8, 2)),
            64: (
                AttentionConfig(128, 128, 8, 3),
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(128, 64, 8, 3),
                AttentionConfig(128, 64, 8, 2),
            ),
            128: (
                AttentionConfig(128, 128, 8, 2),
                AttentionConfig(64, 64, 8, 2, ruled=AttentionConfig(32, 32, 8, 2)),
                AttentionConfig(128, 64, 8, 3),
                AttentionConfig(128, 64, 8, 2),
            ),
            256: (AttentionConfig(128, 32, 8, 2), AttentionConfig(32, 32, 8, 1)),
        },
        **_WIDE_FWD,
    },
}

_WIDE_DQ = {
    torch.float32: {
        32: _both(32, 32, 8, 2),
        64: (AttentionConfig(32, 32, 8, 2), AttentionConfig(32, 16, 8, 2)),
        128: _both(32, 16, 8, 2),
        256: _both(16, 16, 8, 1),
    },
    torch.float64: {
        32: _both(32, 32, 8, 2, ruled=AttentionConfig(32, 16, 8, 1)),
        64: _both(32, 16, 8, 2),
        128: _both(16, 16, 8, 1),
    },
}
ATTENTION_DQ = {
    "sm_80": {
        torch.float16: {
            32: (AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 32, 4, 2)),
            64: (
                AttentionConfig(64, 64, 4, 2),
                AttentionConfig(64, 32, 8, 2, ruled=AttentionConfig(32, 32, 8, 1)),
            ),
            128: (AttentionConfig(64, 32, 4, 2), AttentionConfig(32, 32, 8, 2)),
            256: (AttentionConfig(32, 32, 4, 1), AttentionConfig(16, 32, 8, 1)),
        },
        **_WIDE_DQ,
    },
    "sm_90": {
        torch.float16: {
            32: (
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(64, 64, 4, 2, ruled=AttentionConfig(64, 32, 4, 2)),
            ),
            64: (
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(64, 32, 4, 2),
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(128, 64, 8, 2, ruled=AttentionConfig(64, 32, 8, 2)),
            ),
            128: (
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(32, 32, 8, 2),
                AttentionConfig(128, 64, 8, 2),
                AttentionConfig(128, 64, 8, 2, ruled=AttentionConfig(64, 32, 8, 2)),
            ),
            256: (
                AttentionConfig(128, 32, 8, 2, tuned_on=H200),
                AttentionConfig(32, 32, 8, 1),
            ),
        },
        **_WIDE_DQ,
    },
}

_WIDE_DKV = {
    torch.float32: {
        32: _both(32, 32, 8, 1),
        64: _both(32, 32, 8, 1),
        128: _both(16, 32, 8, 1),
        256: _both(16, 16, 8, 1),
    },
    torch.float64: {
        32: _both(32, 32, 8, 1, ruled=AttentionConfig(16, 32, 8, 1)),
        64: _both(16, 32, 8, 1),
        128: _both(16, 16, 8, 1),
    },
}
ATTENTION_DKV = {
    "sm_80": {
        torch.float16: {
            32: (AttentionConfig(64, 64, 4, 2), AttentionConfig(32, 64, 4, 2)),
            64: (
                AttentionConfig(32, 64, 4, 2),
                AttentionConfig(32, 64, 8, 2, ruled=AttentionConfig(16, 64, 8, 1)),
            ),
            128: (AttentionConfig(32, 64, 8, 2), AttentionConfig(16, 32, 8, 1)),
            256: (AttentionConfig(16, 32, 8, 1), AttentionConfig(16, 16, 8, 1)),
        },
        **_WIDE_DKV,
    },
    "sm_90": {
        torch.float16: {
            32: (
                AttentionConfig(64, 128, 8, 2),
                AttentionConfig(64, 64, 8, 2, ruled=AttentionConfig(32, 64, 8, 2)),
            ),
            64: (
                AttentionConfig(64, 128, 8, 2),
                AttentionConfig(32, 64, 8, 2, ruled=AttentionConfig(32, 32, 8, 2)),
                AttentionConfig(64, 128, 8, 2),
                AttentionConfig(32, 128, 8, 2),
            ),
            128: (
                AttentionConfig(64, 64, 8, 2),
                AttentionConfig(16, 64, 8, 2, ruled=AttentionConfig(32, 32, 8, 2)),
                AttentionConfig(64, 64, 8, 2),
                AttentionConfig(32, 64, 8, 2, ruled=AttentionConfig(32, 32, 8, 2)),
            ),
            256: (
                AttentionConfig(64, 32, 8, 2, tuned_on=H200),
                AttentionConfig(16, 16, 8, 1),
            ),
        },
        **_WIDE_DKV,
    },
}

_DMASK = {
    torch.float16: {
        32: _both(64, 64, 8, 1),
        64: _both(64, 32, 8, 1, ruled=AttentionConfig(32, 32, 8, 1)),
        128: _both(32, 32, 8, 1),
        256: _both(16, 16, 8, 1),
    },
    torch.float32: {
        32: _both(32, 32, 8, 1),
        64: _both(32, 32, 8, 1, ruled=AttentionConfig(32, 16, 8, 1)),
        128: _both(32, 16, 8, 1, ruled=AttentionConfig(16, 16, 8, 1)),
        256: _both(16, 16, 8, 1),
    },
    torch.float64: {
        32: _both(32, 16, 8, 1),
        64: _both(16, 16, 8, 1),
        128: _both(16, 16, 8, 1),
    },
}
ATTENTION_DMASK = {"sm_80": _DMASK, "sm_90": _DMASK}

#: The kernels in Gluon for sm_90, 16-bit floats without a mask, by (D, D_v): these and no others.
#: No interpreter runs them, so an entry stands here once its values were compared on a GPU.
ATTENTION_FWD_SM90 = {
    (64, 64): HopperConfig(128, 4, H100),
    (128, 128): HopperConfig(128, 2, H100),
    (64, 128): HopperConfig(128, 2, H100),
    (128, 64): HopperConfig(128, 2, H100),
    (256, 256): HopperConfig(64, 2, H100),
}
ATTENTION_DQ_SM90 = {
    (64, 64): HopperConfig(64, 3, H100),
    (128, 128): HopperConfig(64, 3, H100),
    (64, 128): HopperConfig(64, 3, H100),
    (128, 64): HopperConfig(64, 3, H100),
}
ATTENTION_DKV_SM90 = {
    (64, 64): HopperConfig(64, 3, H100),
    (128, 128): HopperConfig(64, 2, H100),
    (64, 128): HopperConfig(64, 2, H100),
    (128, 64): HopperConfig(64, 2, H100),
}

#: Rows of out and dout that one program of the delta kernel takes.
ATTENTION_DELTA = DeltaConfig(16, 8)

#: By dtype: what takes the place of the large entry of PRODUCT where registers are scarce.
CROWDED = {
    torch.float16: ProductConfig(64, 128, 32, 8, 3),
    torch.float64: ProductConfig(64, 32, 16, 8, 3),
}

#: By table and dtype: products of which all matrices have tensor descriptors, and the same where
#: registers are scarce. Few rows leave such tiles empty: from DESCRIBED_LEAST rows on.
DESCRIBED = {
    "sm_90": {
        torch.float16: (
            ProductConfig(128, 256, 64, 8, 3, flat=True, tuned_on=H100),
            ProductConfig(128, 64, 64, 8, 4, flat=True),
        ),
        torch.float32: (
            # 60 to 63 TFLOP/s; cuBLAS 48 to 50 and a larger error, without tensor cores
            ProductConfig(128, 128, 32, 8, 3, precision="bf16x6", tuned_on=H100),
            ProductConfig(64, 64, 32, 4, 3, precision="bf16x6"),
        ),
    }
}
DESCRIBED_LEAST = 65

#: A linear layer under a cross-entropy, forward and backward, has the logits of this many rows at a
#: time, or of as many as the hidden size if that is more: then they take no more memory than the
#: weight. With fewer rows, reading and writing the weight's gradient for each chunk would take as
#: long as the product that is added to it.
#: `_parts` of the op says when one chunk takes no more than several with what adds them up.
LOSS_ROWS = 2048

#: Rows at a time of the one program that counts them and checks their targets, one word a row.
LOSS_TARGETS = LossConfig(1024, 1, 4)

#: What follows the logits. The sums of tiles become those of rows; by dtype, the logits become
#: gradients, LOSS_SPLIT rows in one program.
LOSS_SUMS = LossConfig(16, 64, 4)
#: Columns of a tile of logits that are taken at a time: what is made of them takes registers too.
LOSS_COLUMNS = 64
LOSS_GRADIENT = {
    torch.float16: LossConfig(8, 512, 4, H100),
    torch.float32: LossConfig(8, 512, 8),
    torch.float64: LossConfig(8, 256, 8),
}
LOSS_SPLIT = 128


def storage(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stands for `dtype` in the tables: both 16-bit floats are tuned as one."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def table(capability: int) -> str:
    """The name of the tables for a compute capability, 90 for sm_90."""
    return "sm_90" if 90 <= capability < 120 else "sm_80"


def product(dtype: torch.dtype, M: int, crowded: bool = False) -> ProductConfig:
    """Block sizes for a product with M rows; `crowded` as in `described`."""
    configs = PRODUCT[storage(dtype)]
    if crowded and configs[0].block_m < M and storage(dtype) in CROWDED:
        return CROWDED[storage(dtype)]
    return next((config for config in configs if config.block_m >= M), configs[-1])


def described(capability: int, dtype: torch.dtype, M: int, crowded: bool) -> ProductConfig | None:
    """Block sizes for a product with M rows through tensor descriptors; None for pointers.

    `crowded`: what comes before or after the product takes many registers.
    """
    if storage(dtype) == torch.float32 and capability >= 100:
        return None  # Triton 3.7 makes an empty kernel of bf16x6 on such tiles
    entries = DESCRIBED.get(table(capability), {}).get(storage(dtype))
    return entries[crowded] if entries and M >= DESCRIBED_LEAST else None


def recurrence(
    capability: int, dtype: torch.dtype, gates: int, B: int, H: int, programs: int
) -> tuple[str, RecurrenceConfig]:
    """The form of a time loop, "alone", "together" or "steps", and its block sizes.

    `programs` is how many run at the same time.
    """
    dtype, size = storage(dtype), gates * dtype.itemsize
    if dtype == torch.float16:
        for config in ALONE[table(capability)]:
            if config.block_n >= H and size * config.block_k * config.block_n <= config.held:
                return "alone", config
    best, fewest = None, math.inf
    for config in TOGETHER[table(capability)][dtype]:
        deep = -(-H // config.block_k) * config.block_k
        if config.held and size * deep * config.block_n > config.held:
            continue
        groups = programs // -(-H // config.block_n)  # of programs, each with a tile of the batch
        rounds = -(-B // (groups * config.block_b)) if groups else math.inf
        if best is None or rounds < fewest:
            best, fewest = config, rounds
    form = "together" if programs >= -(-H // best.block_n) else "steps"
    return form, best


def attention(
    tables: dict[str, dict[torch.dtype, dict[int, tuple[AttentionConfig, ...]]]],
    capability: int,
    dtype: torch.dtype,
    block_d: int,
    whole: bool,
    packed: bool,
    masked: bool,
    ruled: bool,
) -> AttentionConfig:
    """Block sizes from ATTENTION_FWD, _DQ, _DKV or _DMASK for head dims that round up to `block_d`.

    `whole`: the head dims are `block_d` exactly; `packed`: sequences lie one behind the other, or
    there is a window; `masked`: there is a mask; `ruled`: there is a cap, ALiBi or dropout.
    """
    first, rest, *more = tables[table(capability)][storage(dtype)][block_d]
    of_packed, of_more = (*more, rest, rest)[:2]
    if whole and not masked and not ruled:
        return of_packed if packed else first
    found = of_more if whole and not packed else rest
    return found.ruled or found if ruled else found
