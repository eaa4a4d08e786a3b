"""The C++ core, in every build that this processor runs: functions, matrix product, rates."""

import functools
import importlib
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from pykernels import _backends, functional
from pykernels.testing import evaluate
from pykernels.testing.specs import find

HEADER = Path(__file__).parents[1] / "csrc" / "core" / "vec_math.h"
EXHAUSTIVE = os.environ.get("PYKERNELS_EXHAUSTIVE") == "1"


def bounds():
    """The bounds in ulp, as vec_math.h states them to its readers."""
    text = HEADER.read_text()
    names, numbers = re.search(r"//((?: +[a-z]\w*)+)\n// +bound((?: +[\d.]+)+)\n", text).groups()
    return dict(zip(names.split(), map(float, numbers.split()), strict=True))


BOUNDS = bounds()


@pytest.fixture(params=_backends.ISAS)
def extension(request):
    """The build for one instruction set."""
    if importlib.util.find_spec(f"pykernels._C_{request.param}") is None:
        pytest.skip(f"no {request.param} build on this kind of machine, or nothing is built")
    if not importlib.import_module("pykernels._C_baseline").cpu_runs(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    return importlib.import_module(f"pykernels._C_{request.param}")


def apply(extension, name, x):
    out = np.full_like(x, np.nan)
    extension.vec_math(name, str(x.dtype), x.ctypes.data, out.ctypes.data, x.size)
    return out


# --- elementary functions ------------------------------------------------------------------------

WIDE = {  # float32's truth, in float64
    "exp": np.exp,
    "exp2_normal": np.exp2,
    "exp2_softmax": np.exp2,
    "tanh": np.tanh,
    "sigmoid": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x))),
}


def domain(name, x):
    """exp2_normal is for x whose power is a normal number, exp2_softmax for one that is no more."""
    info = np.finfo(x.dtype)
    if name == "exp2_normal":
        return x[(x >= info.minexp) & (x < info.maxexp)]
    return x[~(x > info.maxexp - 1)] if name == "exp2_softmax" else x


def ulps32(name, x, out):
    """|out - truth| in ulp of the correctly rounded truth, infinity counted as 2^128."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        truth = np.minimum(WIDE[name](x.astype(np.float64)), 2.0**128)
        if name in ("exp2_softmax", "sigmoid"):  # 0 may stand for what is no normal number
            truth = np.where((truth < np.finfo(np.float32).tiny) & (out == 0), 0, truth)
        top = np.finfo(np.float32).max
        unit = np.spacing(np.minimum(np.abs(truth).astype(np.float32), top)).astype(np.float64)
        error = np.abs(np.minimum(out.astype(np.float64), 2.0**128) - truth) / unit
    return np.where(
        np.isnan(x), np.where(np.isnan(out), 0, np.inf), np.where(np.isnan(out), np.inf, error)
    )


def floats32(first, last, step):
    """Floats by their bits, so that denormals, infinities and NaNs are among them."""
    return np.arange(first, last, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("name", BOUNDS)
def test_float32(extension, name):
    """Every 2003rd float and all around the edges; PYKERNELS_EXHAUSTIVE=1 takes every float."""
    step, chunk = (1, 1 << 24) if EXHAUSTIVE else (2003, 1 << 32)
    worst, at = 0.0, None
    edges = [
        0,
        2**-149,
        2**-126,
        0.5,
        1,
        2,
        9,
        10,
        17,
        87.33654,
        88.72284,
        103.97208,
        126,
        128,
        149,
        150,
        3.4e38,
    ]
    near = np.concatenate(
        [np.float32(edge).view(np.int32) + np.arange(-2000, 2001, dtype=np.int32) for edge in edges]
    )
    near = near[near >= 0].view(np.float32)
    for first in range(0, 1 << 32, chunk):
        x = floats32(first, min(first + chunk, 1 << 32), step)
        if first == 0:
            x = np.concatenate([x, near, -near, np.float32([np.inf, -np.inf, np.nan, -0.0, 0.0])])
        x = domain(name, x)
        if not x.size:
            continue
        error = ulps32(name, x, apply(extension, name, x))
        if error.max() > worst:
            worst, at = error.max(), x[error.argmax()]
    print(f"{extension.__name__} {name}: {worst:.3f} ulp at {at!r}")
    assert worst <= BOUNDS[name], f"{worst:.3f} ulp at {at!r}, stated are {BOUNDS[name]}"


EXACT = {
    "exp": mpmath.exp,
    "exp2_normal": lambda x: mpmath.power(2, x),
    "exp2_softmax": lambda x: mpmath.power(2, x),
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_float64(extension, name):
    """Doubles drawn where the functions bend, over all exponents, and around the edges."""
    random = np.random.default_rng(0)
    count = 200_000 if EXHAUSTIVE else 1500
    edges = [
        2.0**-1074,
        2.0**-1022,
        0.5,
        1,
        2,
        19,
        20,
        40,
        708.396,
        709.7827,
        745.13,
        1022,
        1024,
        1074,
    ]
    positive = np.concatenate(
        [
            random.uniform(0, 2, count),
            random.uniform(0, 45, count),
            random.uniform(0, 1100, count),
            random.integers(0, 0x7FF0 << 48, count // 3).view(np.float64),
            *(edge + np.arange(-8, 9) * math.ulp(edge) for edge in edges),
        ]
    )
    x = domain(name, np.concatenate([positive, -positive]))
    out = apply(extension, name, x)
    assert not np.isnan(out).any()
    worst, at = 0.0, None
    with mpmath.workprec(120):
        for value, got in zip(x.tolist(), out.tolist(), strict=True):
            if (name == "exp2_softmax" and value < -1022 and got == 0) or (
                name == "sigmoid" and value < -708 and got == 0
            ):
                truth = mpmath.mpf(0)
            elif name == "tanh" and abs(value) < 1e-12:  # 120 bits would cancel
                truth = mpmath.mpf(value) - mpmath.mpf(value) ** 3 / 3
            else:
                truth = min(EXACT[name](mpmath.mpf(value)), mpmath.mpf(2) ** 1024)
            unit = mpmath.mpf(math.ulp(min(abs(float(truth)), sys.float_info.max)))
            got = mpmath.mpf(2) ** 1024 if got == np.inf else mpmath.mpf(got)
            error = float(abs(got - truth) / unit)
            if error > worst:
                worst, at = error, value
    print(f"{extension.__name__} {name}: {worst:.3f} ulp at {at!r}")
    assert worst <= BOUNDS[name], f"{worst:.3f} ulp at {at!r}, stated are {BOUNDS[name]}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits(extension, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1e30, -0.0, 0.0, 1e30, inf, nan], dtype)
    expected = {
        "exp": [0, 0, 1, 1, inf, inf, nan],
        "tanh": [-1, -1, -0.0, 0.0, 1, 1, nan],
        "sigmoid": [0, 0, 0.5, 0.5, 1, 1, nan],
        "exp2_softmax": [0, 0, 1, 1, 1, 1, nan],
    }
    for name, values in expected.items():
        served = np.where(x > 0, 0, x).astype(dtype) if name == "exp2_softmax" else x
        out = apply(extension, name, served)
        np.testing.assert_array_equal(out, np.array(values, dtype), name)
        signs = np.signbit(out[:-1]), np.signbit(np.array(values[:-1], dtype))
        np.testing.assert_array_equal(*signs, name)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
def test_lengths_and_misaligned_pointers(extension, size):
    """Nothing is written past the end, and no load needs an aligned pointer."""
    storage = np.full(size + 40, 7, np.float32)
    x = np.linspace(-3, 3, size + 1, dtype=np.float32)[1:]
    for offset in (0, 1, 3):
        storage[:] = 7
        extension.vec_math("tanh", "float32", x.ctypes.data, storage[offset:].ctypes.data, size)
        np.testing.assert_allclose(storage[offset : offset + size], np.tanh(x), rtol=1e-6)
        assert (storage[:offset] == 7).all()
        assert (storage[offset + size :] == 7).all()


def test_unknown_names(extension):
    for call in (
        lambda: extension.vec_math("cosh", "float32", 0, 0, 0),
        lambda: extension.vec_math("exp", "int8", 0, 0, 0),
        lambda: extension.gemm("float16", 1, 1, 1, 0, 0, 0),
    ):
        with pytest.raises(ValueError, match=r"cosh|int8|float16"):
            call()


# --- the matrix product --------------------------------------------------------------------------


def product(extension, a, b):
    """a @ b, with NaN around both operands in memory and a guard around the result."""

    def surrounded(t):
        storage = torch.full((t.numel() + 128,), torch.nan, dtype=t.dtype)
        inner = storage[63 : 63 + t.numel()].view(t.shape)
        return inner.copy_(t)

    (m, k), n = a.shape, b.shape[1]
    a, b = surrounded(a), surrounded(b)
    storage = torch.full((m * n + 128,), 7.0, dtype=a.dtype)
    c = storage[63 : 63 + m * n].view(m, n)
    extension.gemm(str(a.dtype)[6:], m, n, k, a.data_ptr(), b.data_ptr(), c.data_ptr())
    outside = torch.cat([storage[:63], storage[63 + m * n :]])
    assert (outside == 7).all(), "written out of bounds"
    return c.clone()


def assert_product(c, a, b):
    """Every element is within k eps |a||b| of the exact one: it is for any order of summation.

    Twice stock torch's error is no measure here: of a product of two numbers torch's may be
    nothing by luck.
    """
    wide_a, wide_b = (np.asarray(t, np.longdouble) for t in (a, b))
    error = np.abs(np.asarray(c, np.longdouble) - wide_a @ wide_b)
    bound = a.shape[1] * torch.finfo(a.dtype).eps * (np.abs(wide_a) @ np.abs(wide_b))
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"{tuple(a.shape)} @ {tuple(b.shape)}: {error.flat[worst]} > {bound.flat[worst]}"
    )


SIZES = (1, 5, 6, 7, 8, 13, 14, 15, 17, 33, 97)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2, 7, 64, 65, 128, 129, 160, 161, 320, 321, 600])
def test_gemm(extension, dtype, depth):
    """Sizes around the register tile, depths around a blocked step: parts of one product."""
    a, b = torch.randn(max(SIZES), depth, dtype=dtype), torch.randn(depth, max(SIZES), dtype=dtype)
    whole = product(extension, a, b)
    assert_product(whole, a, b)
    for m in SIZES:
        for n in SIZES:
            part = product(extension, a[:m], b[:, :n])
            # the tile's place does not change the order of a sum
            assert torch.equal(part, whole[:m, :n]), f"{m}x{n}x{depth}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(300, 700, 120), (336, 3100, 10), (700, 33, 1100), (1, 3073, 330), (400, 1, 321)]
)
def test_gemm_across_blocks(extension, dtype, shape):
    m, n, k = shape
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    ours = product(extension, a, b)
    assert_product(ours, a, b)
    assert torch.equal(ours, product(extension, a, b))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_gemm_of_nothing(extension, shape):
    m, n, k = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    assert torch.equal(product(extension, a, b), a @ b)


def test_gemm_keeps_nan_and_infinity(extension):
    a, b = torch.randn(9, 20), torch.randn(20, 11)
    a[3, 5], b[7, 2] = torch.nan, torch.inf
    c = product(extension, a, b)
    assert c[3].isnan().all()
    assert not c[:3].isnan().any()
    assert not c[4:].isnan().any()
    assert torch.equal(c[:, 2].isinf(), (a @ b)[:, 2].isinf())


# --- denormal numbers ----------------------------------------------------------------------------

TINY = 2.0**-140  # denormal in float32


def keeps_denormals(threads):
    """Whether each thread of the team, as torch runs it, tells a denormal product from zero."""
    n = 32768 * threads  # torch gives a thread this many elements and more
    return [part.sum().item() > 0 for part in (torch.full((n,), TINY) * 0.5).chunk(threads)]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot set the mode here")
@pytest.mark.parametrize("count", [1, 2])
def test_denormals_are_zero_inside_and_the_mode_returns(count, threads):
    """A kernel takes denormals for zero, on all its threads, and leaves each one's mode alone."""
    threads(count)
    weights, tiny = torch.eye(8), torch.full((1, 64, 8), TINY)
    for flush in (False, True):
        assert torch.set_flush_denormal(flush)
        try:
            before = keeps_denormals(count)
            y, _ = functional.rnn(tiny, weights, weights, nonlinearity="relu", backend="cpp")
            after = keeps_denormals(count)
        finally:
            torch.set_flush_denormal(False)
        assert before[0] is not flush  # torch sets the mode of the thread that calls
        assert after == before
        assert (y == 0).all()


@pytest.mark.parametrize("op", ["rnn", "gru", "lstm"])
def test_a_denormal_state_becomes_zero(op):
    """Gates and weights would keep it where it is, and on many processors every step be slow."""
    H, gates = 64, {"rnn": 1, "gru": 3, "lstm": 4}[op]
    x, w_ih, w_hh = torch.zeros(3, 8, H), torch.zeros(gates * H, H), torch.ones(gates * H, H) / H
    keeping = torch.zeros(gates, H)
    if op != "rnn":
        keeping[1] = 100.0  # the gate of the state before: z or f
    states = [torch.full((8, H), TINY)] * (2 if op == "lstm" else 1)
    options = {"nonlinearity": "relu"} if op == "rnn" else {}
    run = functools.partial(getattr(functional, op), x, w_ih, w_hh, keeping.flatten(), None)
    _, last = run(*states, **options, backend="cpp")
    assert all((state == 0).all() for state in (last if op == "lstm" else [last]))
    _, last = run(*states, **options, backend="reference")
    assert all((state > 0).all() for state in (last if op == "lstm" else [last]))


# --- rates ---------------------------------------------------------------------------------------


def test_gemm_is_near_the_arithmetic_rate():
    """benchmarks/product.py measures the share, which is about nine tenths; half leaves room for a
    machine that does other things, and a build with accumulators in memory reaches a tenth."""
    if reason := _backends.available("cpp"):
        pytest.skip(reason)
    extension, n = _backends.load_extension(), 512
    a, b, c = (torch.randn(n, n) for _ in range(3))
    best, rate = 0.0, 0.0
    for _ in range(12):
        rate = max(rate, extension.fma_rate("float32", 1, 0.01))
        start = time.perf_counter()
        extension.gemm("float32", n, n, n, a.data_ptr(), b.data_ptr(), c.data_ptr())
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    assert best > 0.5 * rate, f"{best / 1e9:.1f} of {rate / 1e9:.1f} GFLOP/s"


def test_rates_are_rates(extension):
    assert extension.fma_rate("float64", 1, 0.01) > 1e8
    assert extension.copy_rate(1, 1 << 20, 0.01) > 1e8


@pytest.mark.parametrize("seed", [1, 5, 8])
@pytest.mark.parametrize("op", ["rnn", "gru", "lstm"])
def test_long_sums(op, seed):
    """Of 600 products that cancel: in one chain they break the rule at some of these seeds."""
    evaluate.check(find(f"{op}-i600"), torch.float32, "cpp", seed=seed)


# --- threads -------------------------------------------------------------------------------------


def test_a_thread_that_is_always_late_has_no_core(extension):
    assert extension.two_are_crowded(10, 3000, 200)


def test_a_thread_with_more_to_do_has_one(extension):
    """Its share of each step may be larger by a block, which the others wait for."""
    assert not extension.two_are_crowded(20, 300, 100_000)


def test_a_thread_may_be_late_now_and_then(extension):
    assert not extension.two_are_crowded(3, 3000, 200)
