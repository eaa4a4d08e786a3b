"""The `gru` op: every spec on every backend, then what is special to it."""

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import functional
from pykernels.testing import GRU_SPECS, GRUSpec, stock
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases.cases(*GRU_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    cases.check(spec, backend, dtype)


@pytest.mark.parametrize(
    ("spec", "backend"), cases.gradcheck_cases(GRU_SPECS, {"gru-plain", "gru-bare"})
)
def test_gradcheck(spec, backend):
    cases.gradcheck(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "gru-plain",
        "gru-bare",
        "gru-t0",
        "gru-b0",
        "gru-transposed",
        "gru-expanded",
        "gru-ragged",
        "gru-ragged-reverse",
    ],
)
def test_each_gradient_alone(name, backend):
    cases.gradient_alone(find(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "gru-plain",
        "gru-reverse",
        "gru-t1",
        "gru-h340",
        "gru-rows",  # without gradients, several chunks of steps
        "gru-strided",
        "gru-offset",
        "gru-ragged",
        "gru-ragged-one-long",
    ],
)
def test_leaves_inputs_alone(name, backend):
    cases.leaves_inputs_alone(find(name), backend)
    cases.without_gradients(find(name), backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "gru-50x32x300x512",
        "gru-h340",
        "gru-b1",
        "gru-b33",
        "gru-rows",
        "gru-all1",
        "gru-ragged-one-long",
        "gru-ragged-wide",
    ],
)
def test_threads(name, count, threads):
    """One, two, and more threads than there are rows: right, and the same bits twice."""
    threads(count)
    cases.check(find(name), "cpp", torch.float32)
    cases.repeats_bitwise(find(name), "cpp", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gru-h340", "gru-long", "gru-ragged-wide"])
def test_threads_of_other_dtypes(name, dtype, threads):
    threads(2)
    cases.check(find(name), "cpp", dtype)
    cases.repeats_bitwise(find(name), "cpp", dtype)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("gru-t2", cases.gradient_alone),
        ("gru-t0", cases.gradient_alone),
        ("gru-plain", cases.leaves_inputs_alone),
        ("gru-transposed", cases.without_gradients),
        ("gru-plain", cases.last_states_are_copies),
        ("gru-plain", cases.nan_stays_in_its_row_and_shows),
        ("gru-t1", cases.cell_is_one_step),
        ("gru-t1", cases.cell_gradients),
    ],
)
def test_triton(name, check):
    """What the other backends pass below and above, on fewer inputs: the interpreter is slow."""
    check(find(name), "triton")


@pytest.mark.parametrize("name", ["gru-plain", "gru-b17"])
def test_repeats_bitwise_triton(name):
    cases.repeats_bitwise(find(name), "triton", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["gru-h321", "gru-ragged-wide"])
def test_concurrent_calls(name, count, threads):
    threads(count)
    cases.concurrently(find(name), "cpp", torch.float32)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=cases.RECURRENT_SIZES,
    bias=st.booleans(),
    h0=st.booleans(),
    reverse=st.booleans(),
    ends=st.none() | st.lists(st.integers(1, 12), min_size=20, max_size=20),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "offset", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_sizes(sizes, bias, h0, reverse, ends, layout, dtype):
    t, b, *_ = sizes
    spec = GRUSpec(
        "gru-any",
        "drawn",
        *sizes,
        bias=bias,
        h0=h0,
        reverse=reverse,
        lengths=None if ends is None else tuple(min(end, t) for end in ends[:b]),
        layout=layout,
    )
    cases.check(spec, "cpp", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gru-plain", "gru-reverse"])
def test_last_states_are_copies(backend, name):
    cases.last_states_are_copies(find(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_shows(backend):
    spec = GRUSpec("gru-nan", "drawn", 5, 3, 6, 17)
    cases.nan_stays_in_its_row_and_shows(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_is_one_step(backend):
    cases.cell_is_one_step(find("gru-t1"), backend)
    cases.cell_gradients(find("gru-t1"), backend)


@pytest.mark.parametrize("name", ["gru-t2", "gru-bare", "gru-ragged", "gru-ragged-bare"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative(name, backend):
    cases.gradcheck(find(name), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gru-plain", "gru-ragged-reverse"])
def test_gradient_penalty_is_torchs(name, backend):
    cases.gradient_penalty_is_torchs(find(name), backend, stock.gru)


@pytest.mark.parametrize("name", ["gru-long"])
def test_one_long_sequence_in_pieces(name):
    cases.in_pieces(find(name), "cpp")


@pytest.mark.parametrize("name", ["gru-reverse"])
def test_reverse_is_a_flip_of_time(name):
    cases.reverse_is_a_flip_of_time(find(name), "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["gru-ragged", "gru-ragged-reverse", "gru-ragged-b1", "gru-ragged-one-long"]
)
def test_lengths(name, backend):
    spec = find(name)
    cases.padding_does_not_matter(spec, backend)
    cases.each_alone(spec, backend)
    cases.packed_rows(spec, backend)
    cases.lengths_in_any_form(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_inputs_saturate(backend):
    """Gates at +-1e30 and +-inf are 0 or 1, and their gradients zero, not NaN."""
    cases.need(find("gru-plain"), backend, torch.float32)
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf]).reshape(1, 4, 1).requires_grad_()
    weights = torch.tensor([[1.0], [-1.0], [1.0]])  # n = +-1 is taken where z = 0
    h0 = torch.full((4, 1), 0.5)
    y, _ = functional.gru(x, weights, torch.zeros(3, 1), h0=h0, backend=backend)
    assert y.flatten().tolist() == [1, 0.5, 1, 0.5]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == 0).all()


def test_harness_rejects_mutants(monkeypatch):
    cases.rejects_mutants(find("gru-plain"), monkeypatch, cases.recurrent_mutants("gru", 6, 2))
