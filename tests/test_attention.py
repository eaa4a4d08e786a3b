"""The `attention` op: every spec on every backend, then what is special to it."""

import functools
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALL,
    EXACT,
    bits,
    call,
    cases,
    check,
    concurrently,
    device,
    forget,
    gradcheck,
    gradcheck_cases,
    gradient_alone,
    leaves,
    leaves_inputs_alone,
    need,
    rejects_mutants,
    repeats_bitwise,
    saved_bytes,
    scaled_gradient,
    some,
    without_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import _backends, functional
from pykernels.reference import _philox
from pykernels.reference import attention as reference_attention
from pykernels.testing import ATTENTION_SPECS, AttentionSpec, assert_close, evaluate, stock
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases(*ATTENTION_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    check(spec, backend, dtype)


@pytest.mark.parametrize(
    ("spec", "backend"),
    gradcheck_cases(
        ATTENTION_SPECS, {f"attention-{name}" for name in ("causal-kv-longer", "gqa", "mask-dead")}
    ),
)
def test_gradcheck(spec, backend):
    gradcheck(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    some(
        [
            "attention-plain",
            "attention-causal-kv-longer",
            "attention-causal-kv-longer-tiles",
            "attention-window-tiles",
            "attention-gqa",
            "attention-mask-dead",
            "attention-sk0",
        ],
        ["attention-mask-dead"],
    ),
)
def test_each_gradient_alone(spec, backend):
    gradient_alone(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    some(
        [
            "attention-plain",
            "attention-mask-4d",
            "attention-bias-4d",
            "attention-s129-causal",
            "attention-gqa-causal",
        ],
        ["attention-bias-2d", "attention-transposed"],
    ),
)
def test_leaves_inputs_alone(spec, backend):
    """And many queries get the same bits whether or not the call is recorded."""
    leaves_inputs_alone(spec, backend)
    without_gradients(spec, backend)


FEW = [spec for spec in ATTENTION_SPECS if spec.s_q * spec.n <= 4 * spec.n_kv]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("spec", FEW, ids=lambda spec: spec.name)
def test_few_queries_without_gradients(spec, dtype):
    """These read keys and values unpacked, under rules too for which a recorded call does not."""
    check(spec, "cpp", dtype, gradients=False)


#: As many queries and heads as backward reads keys and values unpacked for, over spans of keys.
FEW_WITH_GRADIENTS = [
    AttentionSpec(f"attention-few-{name}", "", *(2, 4, 2, 20), **({"n_kv": 2, "s_k": 1100} | rule))
    for name, rule in {
        "plain": {},
        "narrow": {"d_v": 5},
        "odd": {"d_v": 37, "layout": "offset"},
        "one-span": {"s_k": 300, "is_causal": True, "causal_alignment": "bottom-right"},
        "large-scores": {"gain": 15.0},
        "causal": {"is_causal": True, "causal_alignment": "top-left"},
        "window": {"window": (700, 0), "causal_alignment": "bottom-right"},
        "mask": {"mask": "bool", "dead_rows": True, "layout": "transposed"},
        "softcap": {"softcap": 2.0, "gain": 4.0},
        "alibi": {"alibi": ("N",)},
        "dropout": {"dropout_p": 0.3},
        "everything": {
            "d_v": 9,
            "window": (800, 3),
            "causal_alignment": "bottom-right",
            "softcap": 1.3,
            "mask": "bool",
            "dead_rows": True,
            "alibi": ("B", "N"),
            "dropout_p": 0.25,
            "layout": "strided",
        },
    }.items()
]


#: Columns for every number of registers at a time, and some that are left.
WIDE = AttentionSpec("attention-few-wide", "", *(1, 2, 1, 300), s_k=600, d_v=150)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("spec", [*FEW_WITH_GRADIENTS, WIDE], ids=lambda spec: spec.name)
def test_few_queries_with_gradients(spec, dtype):
    check(spec, "cpp", dtype)


#: Enough queries for panels on every build, over several blocks of keys, under each rule.
PANELS = [
    AttentionSpec(f"attention-panels-{name}", "", *(1, 4, 160, 20), **({"s_k": 420} | rule))
    for name, rule in {
        "plain": {"d_v": 12},
        "grouped": {"n_kv": 2, "d_v": 37},
        "no-values": {"d_v": 0, "is_causal": True},
        "large-scores": {"gain": 40.0},
        "huge-scores": {"gain": 1000.0},
        "causal": {"is_causal": True, "causal_alignment": "bottom-right", "n_kv": 1},
        "causal-large-scores": {"is_causal": True, "s_k": 160, "gain": 40.0},
        "window": {"window": (130, 65), "layout": "transposed"},
        "mask": {"mask": "bool", "dead_rows": True},
        "bias": {"mask": "float", "is_causal": True},
        "softcap": {"softcap": 2.0, "window": (300, None)},
        "sinks": {"sinks": True},
        "alibi": {"alibi": ("N",)},
        "dropout": {"dropout_p": 0.3, "is_causal": True},
        "everything": {
            "dropout_p": 0.3,
            "window": (300, 40),
            "causal_alignment": "bottom-right",
            "softcap": 5.0,
            "mask": "float",
            "mask_shape": ("N", "S_q", "S_k"),
            "dead_rows": True,
            "learned": True,
            "sinks": True,
            "alibi": ("N",),
            "n_kv": 2,
            "d_v": 37,
            "layout": "strided",
        },
    }.items()
]


#: More rows to ask for ahead than are kept in mind.
SHARED = AttentionSpec("attention-panels-shared", "", *(1, 8, 160, 20), s_k=420, n_kv=1)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("spec", [*PANELS, SHARED], ids=lambda spec: spec.name)
def test_panels_of_queries(spec, dtype):
    check(spec, "cpp", dtype)


@pytest.mark.parametrize("window", [None, (30, 7)])
def test_what_memory_held_before_changes_nothing(window):
    """The pairs that a window leaves out are not computed: what lies there is an earlier call's."""

    def gradients(fill=None):
        q, k, v = (draw.clone() if fill is None else torch.full_like(draw, fill) for draw in draws)
        given = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = functional.attention(*given, is_causal=True, window=window, backend="cpp")
        return torch.autograd.grad(out, given, torch.ones_like(out))

    draws = torch.randn(2, 3, 160, 20), torch.randn(2, 3, 300, 20), torch.randn(2, 3, 300, 20)
    expected = gradients()
    assert all(gradient.any() for gradient in expected)
    gradients(fill=math.nan)
    for gradient, before in zip(gradients(), expected, strict=True):
        assert torch.equal(gradient, before)


#: Where dP and delta nearly cancel: no sum but theirs hides what they were rounded by.
FEW_KEYS = [
    AttentionSpec(f"attention-few-keys-{name}", "", *(2, 6, 33, 126), **rule)
    for name, rule in {
        "one": {"s_k": 1, "n_kv": 3},
        "own-and-sink": {"window": (0, 0), "sinks": True},
        "one-and-sink": {"s_k": 1, "sinks": True, "softcap": 2.0},
        "two-and-sink": {"window": (1, 0), "is_causal": True, "sinks": True, "alibi": ("N",)},
        "three-learned": {
            "s_k": 3,
            "mask": "float",
            "mask_shape": ("N", "S_q", "1"),
            "learned": True,
        },
        "learned": {"mask": "float", "mask_shape": ("B", "N", "1", "1"), "learned": True},
    }.items()
]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("spec", FEW_KEYS, ids=lambda spec: spec.name)
def test_few_keys(spec, dtype):
    """Of several draws, as roundings are a matter of luck."""
    for seed in range(5):
        check(spec, "cpp", dtype, seed=seed)


@pytest.mark.parametrize("S", [1, 3, 7, 200])
@pytest.mark.parametrize("dtype", ALL)
def test_one_key(dtype, S):
    """Its value comes out as it is, and nothing about the query or the key changes that."""
    q, k, v = (torch.randn(2, 3, S, 90).to(dtype).requires_grad_() for _ in range(3))
    out, lse = functional.attention(q, k, v, window=(0, 0), return_lse=True, backend="cpp")
    assert torch.equal(out, v)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(dv, dout)
    given = [t.detach() for t in (dout, q, k, v, out, lse)]
    alone = functional.attention_backward(*given, window=(0, 0), backend="cpp")
    for grad in (dq, dk, alone.dq, alone.dk):
        assert not grad.any()


def test_level_of_weights_follows_the_scores():
    """Blocks of keys whose scores are small, large and small again, or far below zero: the number
    that weights are measured from is 0, or near the largest score, and may change in between."""
    torch.manual_seed(0)
    q = torch.randn(1, 1, 160, 16)
    for scales in [(1, 20, 1), (20, 1, 40), (0.1, 1, 10, 30), (1e-20, 50, 1e-3)]:
        k = torch.cat([scale * torch.randn(1, 1, 400, 16) for scale in scales], 2)
        for keys in (k, k.abs() - 2 * scales[0]):
            v = torch.randn(keys.shape)
            exact = functional.attention(q.double(), keys.double(), v.double(), backend="reference")
            found = functional.attention(q, keys, v, backend="cpp")
            assert_close(found, exact, stock.attention(q, keys, v))
    below = functional.attention(q.abs(), -100 * k.abs() - 100, v, backend="cpp")
    assert below.isfinite().all()
    assert (below != 0).any()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["few-all", "few-spans", "decode-1x8x1x4096x64"])
def test_threads_of_few_queries(name, count, threads):
    """The number of threads changes no bit."""
    spec = find(f"attention-{name}")
    threads(1)
    expected = evaluate.ours(spec, torch.float32, "cpp", gradients=False)
    threads(count)
    for name, found in evaluate.ours(spec, torch.float32, "cpp", gradients=False).items():
        assert torch.equal(bits(found), bits(expected[name]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "attention-4x8x512x64-causal",
        "attention-decode-1x8x1x4096x64",
        "attention-few-spans",
        "attention-s513",
        "attention-s513-causal",
        "attention-mqa-decode",
        "attention-mask-gqa",
        "attention-s1",
    ],
)
def test_threads(name, count, threads):
    """One, two, and more threads than there are heads: right, and the same bits twice."""
    threads(count)
    check(find(name), "cpp", torch.float32)
    repeats_bitwise(find(name), "cpp", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention-s513-causal", "attention-mqa-decode"])
def test_threads_of_other_dtypes(name, dtype, threads):
    threads(2)
    check(find(name), "cpp", dtype)
    repeats_bitwise(find(name), "cpp", dtype)


@pytest.mark.parametrize("name", ["attention-plain", "attention-d64", "attention-alibi-all"])
def test_repeats_bitwise_triton(name):
    repeats_bitwise(find(name), "triton", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls(count, threads):
    threads(count)
    concurrently(find("attention-tiles-mask"), "cpp", torch.float32)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_sizes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    def choose(*choices):
        return data.draw(st.sampled_from(choices))

    group, n_kv = draw(1, 3), draw(1, 3)
    d = draw(4, 70)  # not from one: see RECURRENT_SIZES in cases.py
    spec = AttentionSpec(
        "attention-any",
        "drawn",
        draw(1, 3),
        group * n_kv,
        draw(1, 150),
        d,
        s_k=draw(0, 150),
        n_kv=n_kv,
        d_v=choose(d, d, draw(1, 40)),
        is_causal=choose(False, True),
        window=choose(None, None, (draw(0, 60), draw(0, 60)), (draw(0, 200), None)),
        causal_alignment=choose("top-left", "bottom-right"),
        scale=choose(None, 0.1, -0.2),
        softcap=choose(0.0, 0.0, 2.0),
        mask=choose(None, "bool", "float"),
        mask_shape=tuple(choose(letter, "1") for letter in ("B", "N", "S_q", "S_k")),
        dead_rows=choose(False, True),
        layout=choose("contiguous", "transposed", "expanded", "offset", "strided"),
    )
    check(spec, "cpp", choose(torch.float32, torch.float64))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("name", ["attention-plain", "attention-gqa", "attention-d64"])
def test_saves_out_and_a_number_or_two_a_query(name, backend):
    spec = find(name)
    need(spec, backend, torch.float32)
    kept, (out, lse) = saved_bytes(spec, backend, torch.float32)
    # triton: lse itself; cpp: the maximum and the factor that make weights of scores
    numbers = {"cpp": 2, "triton": 1}[backend]
    assert kept == out.numel() * out.element_size() + numbers * lse.numel() * lse.element_size()


@pytest.mark.parametrize("options", ["is_causal=True", "attn_mask=keys"])
def test_never_holds_a_score_matrix(options):
    """Forward and backward over 8192 x 8192 scores, 256 MB: memory grows by less than a quarter."""
    need(find("attention-plain"), "cpp", torch.float32)
    program = """
        import resource, torch
        from pykernels import functional

        def run(S):
            q, k, v = (torch.randn(1, 1, S, 8, requires_grad=True) for _ in range(3))
            keys = torch.ones(1, 1, 1, S, dtype=torch.bool)  # broadcast: no [S, S] here either
            functional.attention(q, k, v, OPTIONS, backend="cpp").sum().backward()

        torch.set_num_threads(2)
        run(64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(8192)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    program = textwrap.dedent(program).replace("OPTIONS", options)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    kilobytes = int(done.stdout)
    assert kilobytes < 64 * 1024, f"peak memory grew by {kilobytes} KB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_tiles_alone(dtype, threads):
    """Four times as many queries and keys: forward takes no byte more for itself.

    Backward takes one number more a query of the head that a thread is at; and dQ in float32 where
    that is not what is returned. Of sequences and heads it takes nothing for those that wait.
    """
    need(find("attention-plain"), "cpp", dtype)
    threads(1)
    held = []
    extension = _backends.load_extension()
    for B, N, S in ((1, 1, 4096), (1, 1, 16384), (2, 3, 4096)):
        q, k, v = (torch.randn(B, N, S, 64).to(dtype).requires_grad_() for _ in range(3))
        extension.scratch_peak()
        out = functional.attention(q, k, v, is_causal=True, window=(8, 0), backend="cpp")
        held.append(extension.scratch_peak())
        out.backward(torch.ones_like(out))
        held.append(extension.scratch_peak())
    rows = 16384 - 4096
    assert held[0] == held[2] == held[4] > 0
    assert held[3] - held[1] == 4 * rows * (1 if dtype == torch.float32 else 1 + 64)
    assert held[5] == held[1]


@pytest.mark.parametrize(("S_q", "S_k"), [(700, 700), (2, 2100)])
@pytest.mark.parametrize("window", [None, (150, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_the_number_of_threads(dtype, window, S_q, S_k, threads):
    """Threads add to the dq of one head in one order: fewer heads than threads, several blocks."""
    need(find("attention-plain"), "cpp", dtype)
    sizes = ((4, S_q), (2, S_k), (2, S_k))
    q, k, v = (torch.randn(1, *size, 24).to(dtype).requires_grad_() for size in sizes)
    out = functional.attention(
        q, k, v, is_causal=window is not None, window=window, enable_gqa=True, backend="cpp"
    )
    grad = torch.randn_like(out)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_has_the_wider_dtype(backend):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        spec = find("attention-plain")
        need(spec, backend, dtype)
        out, lse = call(spec, spec.inputs(dtype, device(backend)), backend)
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blind_rows(backend):
    """A query that sees no key: output 0, lse -inf, and exactly no gradient."""
    spec = find("attention-bias-dead")
    need(spec, backend, torch.float32)
    made = leaves(spec, torch.float32, backend)
    out, lse = call(spec, made, backend)
    blind = (made["attn_mask"] == -math.inf).all(-1)
    assert 0 < blind.sum() < blind.numel()
    assert (out[..., blind, :] == 0).all()
    assert (lse[..., blind] == -math.inf).all()
    assert lse[..., ~blind].isfinite().all()
    grads = torch.autograd.grad(
        (out * torch.randn_like(out)).sum() + lse[..., ~blind].sum(), [made[name] for name in "qkv"]
    )
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][..., blind, :] == 0).all()
    assert (grads[0][..., ~blind, :] != 0).any()


@pytest.mark.parametrize("S", [40, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_the_rows_that_see_it(backend, S):
    spec = AttentionSpec("attention-nan", "drawn", 1, 2, S, 16)
    need(spec, backend, torch.float32)
    clean = spec.inputs(torch.float32, device(backend))
    expected = functional.attention(**clean, is_causal=True, backend=backend)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # all bits of it set
    for name in "qk":
        made = {key: t.clone() for key, t in clean.items()}
        made[name][0, 1, 20, 3] = nan
        out = functional.attention(**made, is_causal=True, backend=backend)
        sees = [20] if name == "q" else range(20, S)
        assert out[0, 1, sees].isnan().all()
        unseen = [i for i in range(S) if i not in sees]
        torch.testing.assert_close(out[0, 1, unseen], expected[0, 1, unseen])
        torch.testing.assert_close(out[0, 0], expected[0, 0])


def test_what_no_query_sees_gets_no_gradient_of_nan():
    """Few queries, whose keys lie in several spans: NaN in what is behind the window."""
    q, k, v = (torch.randn(1, 2, S, 24) for S in (2, 1300, 1300))
    q[0, 0, 1, 3] = k[0, 1, 1299, 5] = v[0, 1, 1299, 5] = torch.nan
    given = [t.requires_grad_() for t in (q, k, v)]
    out = functional.attention(*given, window=(5, 2), backend="cpp")
    dq, dk, dv = torch.autograd.grad(out, given, torch.randn_like(out))
    for grad in (dk, dv):
        assert grad[0, 0, :4].isnan().any()
        assert not grad[0, :, 4:].any()
        assert grad[0, 1].isfinite().all()
    assert dq[0, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_pieces_by_lse(backend):
    """Keys in two pieces, merged by their log-sum-exp, with gradients through it: the whole."""
    spec = find("attention-mqa")
    need(spec, backend, torch.float64)
    made = leaves(spec, torch.float64, backend)
    q, k, v = made["q"], made["k"], made["v"]

    def attend(k, v):
        return functional.attention(q, k, v, enable_gqa=True, return_lse=True, backend=backend)

    whole, whole_lse = attend(k, v)
    (out_a, lse_a), (out_b, lse_b) = (
        attend(k[:, :, part], v[:, :, part]) for part in (slice(4), slice(4, None))
    )
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-13)
    up = torch.randn_like(out)
    for one, two in zip(
        torch.autograd.grad(out, [q, k, v], up),
        torch.autograd.grad(whole, [q, k, v], up),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "mask_shape", [(5, 7), (3, 1, 7), (2, 1, 1, 5, 7), (4, 1, 5, 1), (2, 4, 3, 5, 7)]
)
def test_gradient_of_a_learned_mask_behind_more_batch_axes(mask_shape):
    """[2, 4, N, S, D]: what torch's function adds up over the axes that the mask lacks."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 5, 8)
    k, v = torch.randn(2, 2, 4, 3, 7, 8)
    mask, upstream = torch.randn(mask_shape), torch.randn(2, 4, 3, 5, 8)

    def gradients(op, dtype):
        given = [t.to(dtype).requires_grad_() for t in (q, k, v, mask)]
        return torch.autograd.grad(op(*given), given, upstream.to(dtype))

    stocks = F.scaled_dot_product_attention
    truth, usual = (gradients(stocks, dtype) for dtype in (torch.float64, torch.float32))
    for name, found, *sides in zip(
        ("dq", "dk", "dv", "dattn_mask"),
        gradients(functional.scaled_dot_product_attention, torch.float32),
        truth,
        usual,
        strict=True,
    ):
        assert_close(found, *sides, name)


@pytest.mark.parametrize(
    "name",
    [
        "attention-s1",
        "attention-gqa",
        "attention-mask-dead",
        "attention-learned-2d",
        "attention-sinks",
        "attention-alibi",
        "attention-dropout",
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_second_derivative(name, backend):
    gradcheck(find(name), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_is_torchs(backend):
    """A penalty on a gradient does not lose its own gradient in silence."""
    spec = find("attention-causal")
    need(spec, backend, torch.float64)
    results = []
    for op in (functools.partial(functional.attention, backend=backend), math_attention):
        made = leaves(spec, torch.float64, backend)
        out = op(**made, is_causal=True)
        (dq,) = torch.autograd.grad(out.square().sum(), made["q"], create_graph=True)
        penalised = out.sum() + dq.square().sum()
        results.append(torch.autograd.grad(penalised, list(made.values())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


def math_attention(q, k, v, is_causal):
    """Stock torch where it has a second derivative."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def test_causal_never_looks_ahead():
    """Later keys and values may hold any number, even the largest."""
    need(find("attention-plain"), "cpp", torch.float32)
    q, k, v = (torch.randn(1, 1, 100, 16) for _ in range(3))
    clean = functional.attention(q, k, v, is_causal=True, backend="cpp")
    k[:, :, 60:], v[:, :, 60:] = 1e30, 3e38
    out = functional.attention(q, k, v, is_causal=True, backend="cpp")
    torch.testing.assert_close(out[:, :, :60], clean[:, :, :60])


class TestDropout:
    def test_bits(self):
        """The paper's generator; its authors' known answers are for 10 rounds."""
        whole = _philox.ROUNDS
        try:
            _philox.ROUNDS = 10
            zero = torch.zeros((), dtype=torch.int64)
            ones = zero + 0xFFFFFFFF
            for seed, counter, answer in (
                (zero, zero, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
                (zero - 1, ones, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ):
                found = _philox.philox(seed, counter, counter, counter, counter)
                assert " ".join(f"{int(word):08x}" for word in found) == answer
        finally:
            _philox.ROUNDS = whole

    @pytest.mark.parametrize("dropout_p", [0.01, 0.3, 0.9])
    def test_share(self, dropout_p):
        """Of 800,000 draws, within five standard deviations; rows, keys and heads are unlike."""
        kept = _philox.keep_mask(torch.tensor([7]), dropout_p, 2, 2, 200, 1000).double()
        deviation = math.sqrt(dropout_p * (1 - dropout_p))
        assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(kept.numel())
        centred = (kept - (1 - dropout_p)) / deviation
        for shifted in (
            centred.roll(1, -1),
            centred.roll(16, -1),
            centred.roll(64, -1),
            centred.roll(1, -2),
            centred.roll(1, 1),
            centred.roll(1, 0),
        ):
            assert abs((centred * shifted).mean()) < 5 / math.sqrt(kept.numel())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_seed(self, backend):
        """torch.manual_seed decides; each call draws anew."""
        need(find("attention-dropout"), backend, torch.float32)
        q, k, v = torch.randn(3, 1, 2, 40, 8, device=device(backend))

        def draw():
            return functional.attention(q, k, v, dropout_p=0.5, backend=backend)

        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert torch.equal(first, draw())
        assert not torch.equal(first, second)
        torch.manual_seed(4)
        assert not torch.equal(first, draw())

    @pytest.mark.parametrize("backend", ["cpp", "triton"])
    def test_all_seeds_reach_the_kernel(self, backend):
        """Both halves of the seed, and its sign: all backends draw the same numbers."""
        need(find("attention-dropout"), backend, torch.float64)
        q, k, v = torch.randn(3, 1, 1, 9, 8, dtype=torch.float64, device=device(backend))
        for seed in (0, 1, 1 << 32, -1, -(1 << 63), (1 << 63) - 1):
            found = [
                module.attention_fwd(
                    *(q, k, v, None, None, None, torch.tensor([seed], device=q.device)),
                    band=(None, None),
                    scale=1.0,
                    dropout_p=0.5,
                )[0][0]
                for module in (reference_attention, _backends.module(backend, "attention"))
            ]
            torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


class TestScaledDotProductAttention:
    """Torch's function of that name: the same signature, values and gradients."""

    @pytest.mark.parametrize(
        "shapes",
        [
            [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
            [(3, 5, 4), (3, 7, 4), (3, 7, 4)],
            [(5, 4), (7, 4), (7, 4)],
            [(2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6)],
            [(2, 3, 5, 4), (1, 3, 7, 4), (1, 1, 7, 4)],
            [(0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 4)],
            [(2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)],
        ],
    )
    @pytest.mark.parametrize("kind", ["full", "causal", "bool", "float", "scale"])
    def test_as_torch(self, shapes, kind):
        options = {
            "full": {},
            "causal": {"is_causal": True},
            "bool": {"attn_mask": torch.rand(shapes[0][-2], shapes[1][-2]) < 0.8},
            "float": {"attn_mask": torch.randn(shapes[0][-2], shapes[1][-2], dtype=torch.float64)},
            "scale": {"scale": 0.3},
        }[kind]
        made = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        ours = functional.scaled_dot_product_attention(*made, **options)
        theirs = F.scaled_dot_product_attention(*made, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        up = torch.randn_like(ours)
        if up.numel():
            pairs = (torch.autograd.grad(out, made, up) for out in (ours, theirs))
            for one, two in zip(*pairs, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 3, 1, 7), (3, 5, 1), (1, 7), (2, 3, 5, 7)])
    def test_mask_broadcasts_as_torch(self, shape):
        q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
        mask = torch.randn(shape, dtype=torch.float64)
        ours = functional.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask))

    def test_gqa_as_torch(self):
        q, k, v = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (6, 2, 2))
        ours = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    def test_positional_arguments(self):
        q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
        ours = functional.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, None, 0.0, True))
        ours = functional.scaled_dot_product_attention(
            query=q,
            key=k,
            value=v,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            scale=2.0,
            enable_gqa=False,
        )
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, scale=2.0))

    def test_dropout(self):
        """Weights are dropped with probability p and the others grow by 1/(1-p); the mean stays."""
        q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1000, 4)
        v = torch.eye(1000)[None, None]
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.25)[0, 0, 0] * 1000
        assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert 200 < (out == 0).sum() < 300
        again = functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
        assert (again == 0).all()

    def test_dropout_has_gradients(self):
        q, k, v = (
            torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
        )

        def op(*tensors):
            torch.manual_seed(1)
            return functional.scaled_dot_product_attention(*tensors, dropout_p=0.5, is_causal=True)

        assert torch.autograd.gradcheck(op, (q, k, v))


def test_float_inputs_give_bitwise_what_their_copies_give():
    """Strides change nothing in the result, to the last bit."""
    need(find("attention-plain"), "cpp", torch.float32)
    for name in ("attention-transposed", "attention-strided", "attention-offset"):
        spec = find(name)
        made = spec.inputs(torch.float32)
        dense = {key: t.clone(memory_format=torch.contiguous_format) for key, t in made.items()}
        for one, two in zip(call(spec, made, "cpp"), call(spec, dense, "cpp"), strict=True):
            assert torch.equal(bits(one), bits(two))


def test_harness_rejects_mutants(monkeypatch):
    """Zeros for an output or a gradient, one off by 0.1 %, a forgotten upstream one: fail."""

    def zeros(run, *args, **options):
        (out, lse), saved = run(*args, **options)
        return (torch.zeros_like(out), lse), saved

    def wrong_base(run, *args, **options):
        (out, lse), saved = run(*args, **options)
        return (out, lse / math.log(2)), saved

    def unscaled(run, *args, **options):
        return run(*args, **{**options, "scale": 1.0})

    mutants = [("attention_fwd", wrong) for wrong in (zeros, wrong_base, unscaled)]
    mutants += [
        ("attention_bwd", scaled_gradient(i, factor)) for i in range(3) for factor in (0.0, 1.001)
    ]
    mutants += [("attention_bwd", forget(i)) for i in range(2)]
    rejects_mutants(find("attention-plain"), monkeypatch, mutants)
    mutants = [("attention_bwd", scaled_gradient(3, factor)) for factor in (0.0, 1.001)]
    rejects_mutants(find("attention-learned-2d"), monkeypatch, mutants)
    mutants = [("attention_bwd", scaled_gradient(4, factor)) for factor in (0.0, 1.001)]
    rejects_mutants(find("attention-sinks"), monkeypatch, mutants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_by_the_most_negative_number(dtype):
    """More keys of it, first, than a kernel takes at a time: no trace once a key is seen."""
    need(find("attention-plain"), "cpp", dtype)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype).requires_grad_() for n in (7, 1300, 1300))
    mask = torch.zeros(1300, dtype=dtype)
    mask[:1200] = torch.finfo(dtype).min
    found = functional.attention(q, k, v, mask, backend="cpp")
    seen = functional.attention(q, k[:, :, 1200:], v[:, :, 1200:], backend="cpp")
    d = torch.randn(found.shape).to(dtype)
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, seen, **bound)
    grads = [torch.autograd.grad(out, (q, k, v), d) for out in (found, seen)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, **bound)


def test_large_scores_in_two_blocks_of_keys():
    """Scores 1e5 and 1e5 + 1, exact in float32: what is compared is their difference."""
    need(find("attention-plain"), "cpp", torch.float32)
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1100, 1)
    k[..., 10, :], k[..., 1090, :] = 1e5, 1e5 + 1
    v = torch.zeros(1, 1, 1100, 1)
    v[..., 1090, :] = 1
    options = {"scale": 1.0}
    truth = functional.attention(q.double(), k.double(), v.double(), **options, backend="reference")
    found = functional.attention(q, k, v, **options, backend="cpp")
    assert_close(found, truth, stock.attention(q, k, v, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_subnormals(backend):
    """Upstream gradients below 6e-5 are ordinary, and numbers."""
    need(find("attention-plain"), backend, torch.float16)
    torch.manual_seed(0)
    where = device(backend)
    inputs = [torch.randn(1, 2, 9, 5).half().to(where).requires_grad_() for _ in range(3)]
    upstream = (torch.randn(1, 2, 9, 5) * 2e-5).half().to(where)
    run = functools.partial(functional.attention, backend=backend)
    found = torch.autograd.grad(run(*inputs), inputs, upstream)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out = functional.attention(*wide, backend="reference")
    truth = torch.autograd.grad(out, wide, upstream.double())
    stocked = torch.autograd.grad(stock.attention(*inputs), inputs, upstream)
    for name, *three in zip("qkv", found, truth, stocked, strict=True):
        assert_close(*three, f"d{name}")
        assert three[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-50])
def test_scale_that_float32_flushes_to_zero(backend, scale):
    need(find("attention-plain"), backend, torch.float32)
    q, k, v = (torch.randn(1, 2, 5, 8, device=device(backend)) for _ in range(3))
    out = functional.attention(q, k, v, scale=scale, backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


def test_numbers_of_numpy():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    want = functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    got = functional.scaled_dot_product_attention(
        q, k, v, dropout_p=np.float32(0), scale=np.float32(0.5)
    )
    assert torch.equal(got, want)
    window = (np.int64(2), None)
    want = functional.attention(q, k, v, window=(2, None))
    assert torch.equal(functional.attention(q, k, v, window=window), want)


def test_slopes_that_need_a_gradient():
    """Refused, but where none is asked for."""
    q, slopes = torch.randn(1, 2, 3, 4), torch.rand(2, requires_grad=True)
    want = functional.attention(q, q, q, alibi_slopes=slopes.detach())
    with torch.no_grad():
        assert torch.equal(functional.attention(q, q, q, alibi_slopes=slopes), want)
    with pytest.raises(ValueError, match="alibi_slopes"):
        functional.attention(q, q, q, alibi_slopes=slopes)


def test_lazy_minus():
    """torch may keep a minus sign beside the memory."""
    need(find("attention-plain"), "cpp", torch.float32)
    q, k, v, mask = (torch.randn(1, 2, 5, n) for n in (8, 8, 8, 5))
    lazy = [torch._neg_view(-t) for t in (q, k, v, mask)]
    expected, found = (functional.attention(*ts, backend="cpp") for ts in ((q, k, v, mask), lazy))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}])
def test_autocast(options):
    """Under autocast the drop-in casts as torch's function does; the op itself keeps its dtype."""
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = functional.scaled_dot_product_attention(q, k, v, mask, **options)
        theirs = F.scaled_dot_product_attention(q, k, v, mask, **options)
        kept = functional.attention(q, k, v, mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert kept.dtype == torch.float32
    expected = functional.attention(q, k, v, mask, backend="reference")
    torch.testing.assert_close(kept, expected)
    for out in (ours, kept):
        grads = torch.autograd.grad(out.sum(), (q, k, v, mask))
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_float32_mask_of_a_narrow_query():
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.randn(5, 5).bfloat16()
    expected = functional.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(functional.scaled_dot_product_attention(q, k, v, mask.float()), expected)
    with pytest.raises(TypeError, match="`query` must be"):
        functional.scaled_dot_product_attention(5, k, v, mask.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlapping_views(backend):
    """Sliding windows of one vector: torch.empty_like of them has no dense rows."""
    need(find("attention-plain"), backend, torch.float32)
    windows = torch.randn(1, 2, 20, device=device(backend)).unfold(2, 16, 1)  # [1, 2, 5, 16]
    run = functools.partial(functional.attention, backend=backend)
    results = []
    for made in (windows, windows.contiguous()):
        inputs = [made.detach().requires_grad_() for _ in range(3)]
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
