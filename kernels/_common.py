"""What every kernel here shares: elementwise functions, the tile product, masked loads, guards.

Arithmetic runs in the accumulator type, float64 for float64 tensors and float32 for all others;
a tensor of 16-bit floats is storage and an operand of tensor-core products, nothing else.
"""

import contextlib
import functools
import re

import torch
from torch import Tensor

MINIMUM_TRITON = (3, 6)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend needs triton: pip install 'triton>=3.6'") from error

#: Triton's, (3, 6) for 3.6.0.
RELEASE = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])

if RELEASE < MINIMUM_TRITON:
    raise ImportError(
        f"the triton backend needs triton 3.6 or newer, found {triton.__version__}: "
        "pip install --upgrade 'triton>=3.6'"
    )

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

#: Whether the kernels below run in Triton's interpreter: fixed when they are decorated.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: The precision of `dot` that is not said; a string that is no constexpr is none to Triton 3.6.
IEEE = tl.constexpr("ieee")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = IEEE):
    """``acc + a @ b``, [M, N] or [S, M, N], with every product exact to the operands' precision.

    "ieee" forbids TF32: float32 operands are multiplied as float32. "bf16x6" splits each of them in
    three of bfloat16, whose digits together are its own, and multiplies those on tensor cores: six
    products, without the three that are too small to matter.
    """
    if INTERPRETED and a.dtype == acc.dtype:
        # A GPU adds up each entry in the order of k, whatever the tiles: backward then recomputes
        # the very scores of forward. The interpreter's numpy asks a BLAS, whose order varies.
        if len(a.shape) == 3:
            return acc + tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)
        return acc + tl.sum(a[:, :, None] * b[None, :, :], 1)
    if INTERPRETED:
        # numpy has no bfloat16
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    if acc.dtype == tl.float64 and len(a.shape) == 2:
        # Tile by tile, as cuBLAS sums: one chain of additions along all of k loses several times as
        # much. A plain sum of both would become that chain. [S, M, N] has its S parts, and more
        # registers it has not.
        part = tl.dot(a, b, input_precision="ieee", out_dtype=acc.dtype)
        return tl.fma(part, 1.0, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def to_storage(x, dtype: tl.constexpr):
    """`x` rounded to the nearest `dtype`, ties to even, as the hardware's conversion does."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates: round in the bits first, where no NaN's payload can wrap
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(bits & 0x7FFFFFFF > 0x7F800000, bits, rounded).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh to about one ulp in float32 and float64, for every size of `x`; NaN stays NaN.

    1 - 2 / (exp(2|x|) + 1) loses digits near 0, where an odd polynomial serves instead:
    x + x^3 P(x^2), P interpolating (tanh(x)/x - 1)/x^2 in the Chebyshev nodes of [0, 0.6^2]
    (float32, relative error 4e-10) and of [0, 0.55^2] (float64, 3e-18).
    """
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    z = x * x
    if x.dtype == tl.float64:
        p = -2.06027653763463395e-05 * z + 8.51131368557767122e-05
        p = p * z - 2.34634741088723713e-04
        p = p * z + 5.88936052007405776e-04
        p = p * z - 1.45566183010071603e-03
        p = p * z + 3.59211037868902388e-03
        p = p * z - 8.86323439781435484e-03
        p = p * z + 2.18694884936669419e-02
        p = p * z - 5.39682539674340145e-02
        p = p * z + 1.33333333333327148e-01
        p = p * z - 3.33333333333333326e-01
    else:
        p = 2.37076564049778786e-03 * z - 8.41007080153073644e-03
        p = p * z + 2.17883219971085213e-02
        p = p * z - 5.39615517813426909e-02
        p = p * z + 1.33333128668617992e-01
        p = p * z - 3.33333332312079250e-01
    return tl.where(size < 0.55, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def _exp(x):
    """exp to about two ulp in float32 and float64; inf and 0 far out, NaN stays NaN.

    A GPU's exp2 is its only exponential of float32, and rounding x log2(e) would cost |x| / 2 ulp.
    So exp(x) = 2^n exp(r) with n the integer nearest to it and r = x - n log(2), where log(2) is
    355 / 512, whose products with n are exact, and the rest.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x > 104, 104.0, tl.where(x < -104, -104.0, x))  # where all is inf or 0
        n = tl.floor(x * LOG2_E + 0.5)
        r = x - n * 0.693359375 + n * 2.12194440054690583e-4
        return tl.exp2(r * LOG2_E) * tl.exp2(n)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to a few ulp; 0 and 1 far out, NaN stays NaN."""
    return 1 / (1 + _exp(-x))


@triton.jit
def load_tile(ptrs, rows_ok, cols_ok, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """A 2-D tile; 0 where a checked `rows_ok` [M, 1] or `cols_ok` [1, N] is false.

    An axis that cannot leave the tensor is not checked, so that its loads need no predicate.
    """
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(ptrs, mask=rows_ok & cols_ok, other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=rows_ok, other=0.0)
    elif CHECK_COLS:
        return tl.load(ptrs, mask=cols_ok, other=0.0)
    else:
        return tl.load(ptrs)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel on `dtype` computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Options of every launch. Products and polynomials count on fused multiply-adds, whatever the
#: default of a Triton release is. The bound on registers is the hardware's own: without one the
#: assembler spills to make room for a second program on a multiprocessor. On AMD there is none.
AMD = torch.version.hip is not None
LAUNCH = {"enable_fp_fusion": True} | ({} if AMD else {"maxnreg": 255})

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


_HERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels launch on the tensor's device.

    Raises:
        RuntimeError: nothing can run Triton kernels on that device.
    """
    if tensor.is_cuda:
        if tensor.device.index == torch.cuda.current_device():
            return _HERE
        return torch.cuda.device(tensor.device)
    if not INTERPRETED:
        raise RuntimeError(
            f"the triton backend needs CUDA tensors, got one on {tensor.device}; on cpu tensors "
            "it runs with TRITON_INTERPRET=1 set before Python starts"
        )
    return _HERE


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability, 90 for sm_90; where interpreted, or AMD's, 80, the lowest served."""
    if device.type != "cuda" or AMD:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of any size run at the same time; where interpreted one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`; Triton's own takes microseconds on the host."""
    return -(-size // block)


def block_size(size: int, least: int = 1) -> int:
    """The smallest power of two that covers `size`, and `least` at least."""
    return max(1 << (size - 1).bit_length(), least)


def empty_rows_like(tensor: Tensor) -> Tensor:
    """`torch.empty_like` with a contiguous last axis, which overlapping views do not give it."""
    made = torch.empty_like(tensor)
    return made if with_dense_rows(made) is made else tensor.new_empty(tensor.shape)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last axis is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
