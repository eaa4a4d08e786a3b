"""The `attention_varlen` op: packed sequences and pages of keys."""

import re

import pytest
import torch
from cases import (
    ALL,
    EXACT,
    bits,
    call,
    cases,
    check,
    concurrently,
    device,
    gradcheck,
    gradcheck_cases,
    leaves,
    leaves_inputs_alone,
    need,
    rejects_mutants,
    repeats_bitwise,
    some,
)

from pykernels import _backends, functional
from pykernels.testing import ATTENTION_VARLEN_SPECS, AttentionVarlenSpec, evaluate
from pykernels.testing.specs import find


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases(*ATTENTION_VARLEN_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    check(spec, backend, dtype)


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("dtype", EXACT)
def test_few_keys(dtype, keys):
    """`test_few_keys` of `attention`, where sequences are packed."""
    spec = AttentionVarlenSpec(
        *("attention_varlen-few-keys", "", (33, 5, 20), 6, 126, (keys, keys, 0)),
        n_kv=3,
        sinks=keys > 1,
    )
    for seed in range(5):
        check(spec, "cpp", dtype, seed=seed)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("rest", [{}, {"is_causal": True, "used": (600, 70, 0, 2, 800)}])
def test_few_queries(rest, dtype):
    """Keys and values are read unpacked, forward and backward: spans, none, no query."""
    spec = AttentionVarlenSpec(
        *("attention_varlen-few", "", (1, 2, 1, 0, 2), 4, 20, (600, 70, 0, 3, 1100)), n_kv=2, **rest
    )
    check(spec, "cpp", dtype)


def test_scratch_of_a_few_queries_goes_by_the_keys_there_are(threads):
    """One long sequence among short ones: its spans are not theirs."""
    threads(1)
    extension = _backends.load_extension()
    peaks = []
    for others in (0, 400):
        starts = torch.arange(others + 2)
        keys = torch.cat([torch.zeros(1, dtype=torch.int64), 20000 + starts[: others + 1]])
        q = torch.randn(others + 1, 4, 64, requires_grad=True)
        k, v = (torch.randn(20000 + others, 4, 64, requires_grad=True) for _ in range(2))
        extension.scratch_peak()
        out = functional.attention_varlen(q, k, v, starts, keys, backend="cpp")
        peaks.append(extension.scratch_peak())
        out.sum().backward()
        peaks.append(extension.scratch_peak())
    part = 4 * 2 * 64  # bytes of a row of a span, padded
    assert min(peaks) > 0
    assert peaks[2] - peaks[0] <= 400 * 4 * part
    assert peaks[3] - peaks[1] <= 400 * 4 * part


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", ["ones", "one", "pages", "pages-decode", "used"])
def test_without_gradients(name, dtype):
    check(find(f"attention_varlen-{name}"), "cpp", dtype, gradients=False)


@pytest.mark.parametrize(("spec", "backend"), gradcheck_cases(ATTENTION_VARLEN_SPECS, set()))
def test_gradcheck(spec, backend):
    gradcheck(spec, backend)


@pytest.mark.parametrize("name", ["causal", "used"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_second_derivative(name, backend):
    gradcheck(find(f"attention_varlen-{name}"), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize(
    ("spec", "backend"), some(["attention_varlen-gqa", "attention_varlen-used"])
)
def test_leaves_inputs_alone(spec, backend):
    leaves_inputs_alone(spec, backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["tiles", "all", "pages-all"])
def test_threads(name, count, threads):
    threads(count)
    check(find(f"attention_varlen-{name}"), "cpp", torch.float32)
    repeats_bitwise(find(f"attention_varlen-{name}"), "cpp", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls(count, threads):
    threads(count)
    concurrently(find("attention_varlen-tiles"), "cpp", torch.float32)


def test_mutants(monkeypatch):
    def zeros(right, *given, **options):
        (out, lse), saved = right(*given, **options)
        return (torch.zeros_like(out), lse), saved

    def no_gradients(right, *given, **options):
        return tuple(None if g is None else torch.zeros_like(g) for g in right(*given, **options))

    rejects_mutants(
        find("attention_varlen-causal"),
        monkeypatch,
        [("attention_varlen_fwd", zeros), ("attention_varlen_bwd", no_gradients)],
    )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_is_attention_of_each_sequence(backend):
    spec = find("attention_varlen-causal")
    made = spec.inputs(torch.float64)
    out, lse = call(spec, made, backend)
    q_at, k_at = (made[f"cu_seqlens_{name}"].tolist() for name in "qk")
    for b in range(3):
        q = made["q"][q_at[b] : q_at[b + 1]]
        k, v = (made[name][k_at[b] : k_at[b + 1]] for name in "kv")
        alone, alone_lse = functional.attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)),
            is_causal=True,
            causal_alignment="bottom-right",
            return_lse=True,
            backend=backend,
        )
        torch.testing.assert_close(out[q_at[b] : q_at[b + 1]], alone[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, q_at[b] : q_at[b + 1]], alone_lse[0])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_rows_behind_the_last_sequence(backend):
    """They get zeros, and give no gradient."""
    q, k, v = (torch.randn(10, 2, 4, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 3, 8])
    out, lse = functional.attention_varlen(q, k, v, starts, return_lse=True, backend=backend)
    assert (out[8:] == 0).all()
    assert (lse[:, 8:] == -torch.inf).all()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert (grad[8:] == 0).all()
        assert (grad[:8] != 0).any()


def test_a_cache_that_grows_is_causal_attention():
    """One query at a time over pages, against all of them at once."""
    steps, size = 21, 4
    q, k, v = torch.randn(3, steps, 2, 8)
    whole = functional.attention_varlen(q, k, v, torch.tensor([0, steps]), is_causal=True)
    pools = torch.full((2, 6, size, 2, 8), torch.nan)
    table = torch.tensor([[5, 2, 0, 1, 4, 3]])
    for step in range(steps):
        for pool, new in zip(pools, (k, v), strict=True):
            pool[table[0, step // size], step % size] = new[step]
        out = functional.attention_varlen(
            q[step : step + 1],
            *pools,
            torch.tensor([0, 1]),
            seqused_k=torch.tensor([step + 1]),
            block_table=table,
            is_causal=True,
        )
        torch.testing.assert_close(out[0], whole[step])


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_known_lengths_change_nothing(name):
    spec = find("attention_varlen-causal")
    made = leaves(spec, torch.float32, "cpp")
    need(spec, "cpp", torch.float32)
    out = functional.attention_varlen(**made, **spec.options)
    again = functional.attention_varlen(**made, **spec.options, **{name: 9})
    assert torch.equal(bits(out), bits(again))


STARTS = torch.tensor([0, 3, 7])
PAGED = {
    "k": torch.zeros(3, 4, 2, 4),
    "v": torch.zeros(3, 4, 2, 4),
    "block_table": torch.tensor([[0, 1], [2, 0]]),
    "seqused_k": torch.tensor([7, 4]),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(7, 4)}, ValueError, "`q` must be [T_q, N, D], got 2 dimensions: [7, 4]"),
        ({"k": torch.zeros(7, 3, 4)}, ValueError, "`k` must be of N = 2 heads unless enable_gqa"),
        ({"v": torch.zeros(6, 2, 4)}, ValueError, "`v` must be [T_k, N_kv, D_v] = [7, 2, 4]"),
        ({"cu_seqlens_q": [0, 3, 7]}, TypeError, "`cu_seqlens_q` must be a Tensor, got list"),
        (
            {"cu_seqlens_q": STARTS.float()},
            TypeError,
            "`cu_seqlens_q` must be of int32 or int64, got torch.float32",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 5, 3])},
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got [0, 5, 3]",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 3, 8])},
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got [0, 3, 8]",
        ),
        (
            {"cu_seqlens_q": torch.tensor([1, 3, 7])},
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got [1, 3, 7]",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 7])},
            ValueError,
            "`cu_seqlens_k` must be [B + 1] = [3], got [2]",
        ),
        (
            {"seqused_k": torch.tensor([3, 5])},
            ValueError,
            "`seqused_k` must be from 0 to [3, 4], the keys that are there, got [3, 5]",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, -1, 7]), "max_seqlen_q": 3},
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got [0, -1, 7]",
        ),
        (
            {"cu_seqlens_q": torch.empty(0, dtype=torch.int64)},
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got []",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 3, 8])},
            ValueError,
            "`cu_seqlens_k` must be from 0 on, never decreasing, up to 7 rows, got [0, 3, 8]",
        ),
        (
            {"seqused_k": torch.tensor([-1, 4])},
            ValueError,
            "`seqused_k` must be from 0 to [3, 4], the keys that are there, got [-1, 4]",
        ),
        (
            {
                "q": torch.zeros(7, 2, 4, requires_grad=True),
                "cu_seqlens_q": torch.tensor([0, 5, 3]),
            },
            ValueError,
            "`cu_seqlens_q` must be from 0 on, never decreasing, up to 7 rows, got [0, 5, 3]",
        ),
        (
            PAGED | {"max_seqlen_k": 6},
            ValueError,
            "`max_seqlen_k` must be at least the longest sequence, 7",
        ),
        (
            PAGED | {"block_table": torch.tensor([[0, 1], [-1, 0]])},
            ValueError,
            "`block_table` must be of pages from 0 to 2, got -1 in row 1",
        ),
        (
            PAGED | {name: torch.zeros(3, 0, 2, 4) for name in "kv"},
            ValueError,
            "`seqused_k` must be from 0 to [0, 0], the keys that are there, got [7, 4]",
        ),
        (
            PAGED | {"block_table": torch.empty(2, 0, dtype=torch.int64)},
            ValueError,
            "`seqused_k` must be from 0 to [0, 0], the keys that are there, got [7, 4]",
        ),
        (
            {"max_seqlen_q": 3},
            ValueError,
            "`max_seqlen_q` must be at least the longest sequence, 4",
        ),
        (
            {"q": torch.zeros(7, 4, 4), "v": torch.zeros(7, 1, 4), "enable_gqa": True},
            ValueError,
            "`v` must be [T_k, N_kv, D_v] = [7, 2, 4], got [7, 1, 4]",
        ),
        *(
            ({name: 1}, TypeError, f"`{name}` must be True or False, got int")
            for name in ("is_causal", "enable_gqa", "return_lse")
        ),
        ({"window": (-1, 0)}, ValueError, "`window` must be of sides of at least 0"),
        (PAGED | {"seqused_k": None}, ValueError, "`seqused_k` must be given with block_table"),
        (PAGED | {"cu_seqlens_k": STARTS}, ValueError, "`cu_seqlens_k` must be None with block"),
        (
            PAGED | {"seqused_k": torch.tensor([9, 4])},
            ValueError,
            "`seqused_k` must be from 0 to [8, 8], the keys that are there, got [9, 4]",
        ),
        (
            PAGED | {"block_table": torch.tensor([[0, 3], [2, 0]])},
            ValueError,
            "`block_table` must be of pages from 0 to 2, got 3 in row 0",
        ),
        (
            PAGED | {"block_table": torch.tensor([[0, 1]])},
            ValueError,
            "`block_table` must be [B, pages] = [2, 2], got [1, 2]",
        ),
        (
            PAGED | {"q": torch.zeros(7, 2, 4, requires_grad=True)},
            ValueError,
            "`block_table` must be None where a gradient is wanted",
        ),
        (
            {"backend": "triton"} | {name: torch.zeros(7, 2, 300) for name in "qkv"},
            ValueError,
            "backend 'triton' cannot serve this call",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change, error, words):
    given = {name: torch.zeros(7, 2, 4) for name in "qkv"} | {"cu_seqlens_q": STARTS} | change
    narrow = {
        name: t.int() if isinstance(t, torch.Tensor) and t.dtype == torch.int64 else t
        for name, t in given.items()
    }
    for each in (given, given, narrow):  # twice: what is remembered of a call is not its values
        with pytest.raises(error, match="attention_varlen: " + re.escape(words)):
            functional.attention_varlen(**each)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_page_that_no_key_is_in_may_be_anything(backend):
    need(find("attention_varlen-pages"), backend, torch.float32)
    q, where = torch.randn(7, 2, 4), device(backend)
    found = []
    for beyond in (0, 99, -1):
        table = torch.tensor([[0, 1, beyond], [2, beyond, beyond]])
        given = {"q": q, "cu_seqlens_q": STARTS, **PAGED, "block_table": table}
        given = {name: t.to(where) for name, t in given.items()}
        found.append(functional.attention_varlen(**given, backend=backend))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_evaluates_what_it_says():
    """A spec in pages asks for no gradient, any other for those of q, k and v."""
    for spec in ATTENTION_VARLEN_SPECS:
        found = evaluate.differentiable(spec, spec.inputs(torch.float32))
        assert found[:3] == ([] if spec.page_size else ["q", "k", "v"])
