"""Block sizes and heuristics as data. Nothing autotunes: the same call always runs the same kernel.

Every entry was chosen so that it compiles for its chips without a register spill and within their
shared memory (tests/test_triton_compile.py holds both); `tuned_on` names the GPU that the entry was
then timed on, None where it never was.

Chips: the "sm_80" tables fit 99 KB of shared memory, so that they serve every chip from sm_80 up,
consumer chips (sm_86, sm_89, sm_120) included; the "sm_90" tables use the 227 KB of the data-centre
chips sm_90 and sm_100.
"""

from dataclasses import dataclass

import torch

#: Bytes of shared memory that one block may use, by table.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}


@dataclass(frozen=True)
class ProductConfig:
    """C [block_m, block_n] by steps of block_k; group_m rows of tiles share columns of B in L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tuned_on: str | None = None


@dataclass(frozen=True)
class RecurrenceConfig:
    """block_b batch rows a program, the state product in tiles [block_k, block_n] of the matrix.

    Where `resident`, one tile is the whole matrix, so that H <= block_n = block_k, and stays on the
    chip, in registers or shared memory, for the whole sequence.
    """

    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    resident: bool = False
    tuned_on: str | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """block_m query rows against block_n key rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tuned_on: str | None = None


def _both(
    block_m: int, block_n: int, num_warps: int, num_stages: int
) -> tuple[AttentionConfig, AttentionConfig]:
    """One entry for both."""
    config = AttentionConfig(block_m, block_n, num_warps, num_stages)
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


#: Split-K of the weight gradients: programs wanted, rows of K a split has at least and at most (the
#: sum inside a split is one chain of float32 additions), and splits (each is a partial [M, N]).
#: Sizes alone decide, not the GPU, so that results repeat on every one.
SPLIT_PROGRAMS = 264
SPLIT_LEAST = 256
SPLIT_MOST = 2048
SPLITS = 64

#: By dtype: the first entry whose block_m covers M, else the last.
PRODUCT = {
    torch.float16: (ProductConfig(16, 64, 64, 4, 3), ProductConfig(128, 128, 32, 8, 3)),
    torch.float32: (ProductConfig(16, 64, 16, 4, 3), ProductConfig(64, 64, 16, 8, 3)),
    torch.float64: (ProductConfig(16, 64, 16, 4, 3), ProductConfig(64, 64, 16, 8, 3)),
}

#: By table and dtype: the first resident entry that covers H, else the last, which streams the
#: matrix. A matrix of float32 or float64, whose products take their operands from registers, is too
#: large to stay there: they stream, from L1 where it is small.
_RESIDENT = (
    RecurrenceConfig(16, 32, 32, 2, 1, resident=True),
    RecurrenceConfig(16, 64, 64, 4, 1, resident=True),
    RecurrenceConfig(16, 128, 128, 4, 1, resident=True),
)
_RESIDENT_256 = RecurrenceConfig(16, 256, 256, 8, 1, resident=True)
_STREAMED = {
    torch.float16: (RecurrenceConfig(16, 128, 64, 4, 3),),
    torch.float32: (RecurrenceConfig(16, 64, 32, 8, 2),),
    torch.float64: (RecurrenceConfig(16, 64, 16, 8, 2),),
}
RECURRENCE = {
    "sm_80": _STREAMED | {torch.float16: (*_RESIDENT, *_STREAMED[torch.float16])},
    "sm_90": _STREAMED | {torch.float16: (*_RESIDENT, _RESIDENT_256, *_STREAMED[torch.float16])},
}

#: By table, dtype and block of head dims: the entry for whole heads without a mask, and the one for
#: the rest. A mask, or a head dim that does not fill its block, takes registers of its own.
_WIDE_FWD = {
    torch.float32: {
        32: _both(64, 32, 8, 2),
        64: (AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 16, 8, 2)),
        128: _both(32, 16, 8, 2),
        256: _both(32, 16, 8, 2),
    },
    torch.float64: {
        32: _both(64, 32, 8, 2),
        64: _both(64, 16, 8, 2),
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
            64: (AttentionConfig(128, 128, 8, 3), AttentionConfig(128, 64, 8, 2)),
            128: (AttentionConfig(128, 128, 8, 2), AttentionConfig(64, 64, 8, 2)),
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
        32: _both(32, 32, 8, 2),
        64: _both(32, 16, 8, 2),
        128: _both(16, 16, 8, 1),
    },
}
ATTENTION_DQ = {
    "sm_80": {
        torch.float16: {
            32: (AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 32, 4, 2)),
            64: (AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 32, 8, 2)),
            128: (AttentionConfig(64, 32, 4, 2), AttentionConfig(32, 32, 4, 2)),
            256: (AttentionConfig(32, 32, 4, 1), AttentionConfig(16, 32, 8, 1)),
        },
        **_WIDE_DQ,
    },
    "sm_90": {
        torch.float16: {
            32: (AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 64, 4, 2)),
            64: (AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 32, 4, 2)),
            128: (AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 32, 8, 2)),
            256: (AttentionConfig(64, 32, 8, 2), AttentionConfig(32, 32, 8, 1)),
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
        32: _both(32, 32, 8, 1),
        64: _both(16, 32, 8, 1),
        128: _both(16, 16, 8, 1),
    },
}
ATTENTION_DKV = {
    "sm_80": {
        torch.float16: {
            32: (AttentionConfig(64, 64, 4, 2), AttentionConfig(32, 64, 4, 2)),
            64: (AttentionConfig(32, 64, 4, 2), AttentionConfig(32, 64, 8, 2)),
            128: (AttentionConfig(32, 64, 8, 2), AttentionConfig(16, 32, 8, 1)),
            256: (AttentionConfig(16, 32, 8, 1), AttentionConfig(16, 16, 8, 1)),
        },
        **_WIDE_DKV,
    },
    "sm_90": {
        torch.float16: {
            32: (AttentionConfig(64, 128, 8, 2), AttentionConfig(64, 64, 8, 2)),
            64: (AttentionConfig(64, 128, 8, 2), AttentionConfig(32, 64, 8, 2)),
            128: (AttentionConfig(64, 64, 8, 2), AttentionConfig(16, 64, 8, 2)),
            256: (AttentionConfig(32, 32, 8, 1), AttentionConfig(16, 16, 8, 1)),
        },
        **_WIDE_DKV,
    },
}

#: The kernels in Gluon for sm_90, 16-bit floats without a mask, by (D, D_v): these and no others.
ATTENTION_FWD_SM90 = {
    (64, 64): HopperConfig(128, 4),
    (128, 128): HopperConfig(128, 2),
    (256, 256): HopperConfig(64, 2),
    (64, 128): HopperConfig(128, 2),
    (128, 64): HopperConfig(128, 2),
}
ATTENTION_DQ_SM90 = {(64, 64): HopperConfig(64, 3), (128, 128): HopperConfig(64, 3)}
ATTENTION_DKV_SM90 = {(64, 64): HopperConfig(64, 3), (128, 128): HopperConfig(64, 2)}

#: Rows of out and dout that one program of the delta kernel takes.
ATTENTION_DELTA = DeltaConfig(16, 8)


def storage(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stands for `dtype` in the tables: both 16-bit floats are tuned as one."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def table(capability: int) -> str:
    """The name of the tables for a compute capability, 90 for sm_90."""
    return "sm_90" if 90 <= capability < 120 else "sm_80"


def product(dtype: torch.dtype, M: int) -> ProductConfig:
    """Block sizes for a product with M rows."""
    configs = PRODUCT[storage(dtype)]
    return next((config for config in configs if config.block_m >= M), configs[-1])


def recurrence(capability: int, dtype: torch.dtype, H: int) -> RecurrenceConfig:
    """Block sizes for a time loop of H units."""
    configs = RECURRENCE[table(capability)][storage(dtype)]
    covering = (config for config in configs if config.resident and config.block_n >= H)
    return next(covering, configs[-1])


def attention(
    tables: dict[str, dict[torch.dtype, dict[int, tuple[AttentionConfig, AttentionConfig]]]],
    capability: int,
    dtype: torch.dtype,
    block_d: int,
    plain: bool,
) -> AttentionConfig:
    """Block sizes from ATTENTION_FWD, _DQ or _DKV for head dims that round up to `block_d`.

    `plain`: there is no mask, and the head dims are `block_d` exactly.
    """
    return tables[table(capability)][storage(dtype)][block_d][0 if plain else 1]
