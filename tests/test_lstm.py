"""The `lstm` op: every spec on every backend, then what is special to it."""

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import functional
from pykernels.testing import LSTM_SPECS, LSTMSpec, stock
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases.cases(*LSTM_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    cases.check(spec, backend, dtype)


@pytest.mark.parametrize(
    ("spec", "backend"), cases.gradcheck_cases(LSTM_SPECS, {"lstm-plain", "lstm-bare"})
)
def test_gradcheck(spec, backend):
    cases.gradcheck(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "lstm-plain",
        "lstm-bare",
        "lstm-t0",
        "lstm-b0",
        "lstm-transposed",
        "lstm-expanded",
        "lstm-ragged",
        "lstm-ragged-reverse",
        "lstm-proj",
        "lstm-proj-ragged",
        "lstm-cells",
        "lstm-cells-ragged-proj",
    ],
)
def test_each_gradient_alone(name, backend):
    cases.gradient_alone(find(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "lstm-plain",
        "lstm-reverse",
        "lstm-t1",
        "lstm-h340",
        "lstm-rows",  # without gradients, several chunks of steps
        "lstm-strided",
        "lstm-offset",
        "lstm-ragged",
        "lstm-ragged-one-long",
        "lstm-proj-wide",
        "lstm-proj-strided",
        "lstm-cells",
        "lstm-cells-ragged-proj",
    ],
)
def test_leaves_inputs_alone(name, backend):
    cases.leaves_inputs_alone(find(name), backend)
    cases.without_gradients(find(name), backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "lstm-50x32x300x512",
        "lstm-1024x1x64x64",
        "lstm-h340",
        "lstm-b1",
        "lstm-b33",
        "lstm-rows",
        "lstm-all1",
        "lstm-ragged-one-long",
        "lstm-ragged-wide",
        "lstm-proj-wide",
        "lstm-proj-ragged-reverse",
        "lstm-cells-h340",
    ],
)
def test_threads(name, count, threads):
    """One, two, and more threads than there are rows: right, and the same bits twice."""
    threads(count)
    cases.check(find(name), "cpp", torch.float32)
    cases.repeats_bitwise(find(name), "cpp", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["lstm-h340", "lstm-long", "lstm-ragged-wide", "lstm-proj-wide"])
def test_threads_of_other_dtypes(name, dtype, threads):
    threads(2)
    cases.check(find(name), "cpp", dtype)
    cases.repeats_bitwise(find(name), "cpp", dtype)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("lstm-t2", cases.gradient_alone),
        ("lstm-t0", cases.gradient_alone),
        ("lstm-plain", cases.leaves_inputs_alone),
        ("lstm-transposed", cases.without_gradients),
        ("lstm-plain", cases.last_states_are_copies),
        ("lstm-plain", cases.nan_stays_in_its_row_and_shows),
        ("lstm-t1", cases.cell_is_one_step),
        ("lstm-t1", cases.cell_gradients),
    ],
)
def test_triton(name, check):
    """What the other backends pass below and above, on fewer inputs: the interpreter is slow."""
    check(find(name), "triton")


@pytest.mark.parametrize("name", ["lstm-plain", "lstm-b17"])
def test_repeats_bitwise_triton(name):
    cases.repeats_bitwise(find(name), "triton", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["lstm-h321", "lstm-ragged-wide", "lstm-proj-wide"])
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
    proj_size=st.just(0) | st.integers(4, 40),
    return_cell_states=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "offset", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_sizes(sizes, bias, h0, reverse, ends, proj_size, return_cell_states, layout, dtype):
    t, b, *_ = sizes
    spec = LSTMSpec(
        "lstm-any",
        "drawn",
        *sizes,
        bias=bias,
        h0=h0,
        reverse=reverse,
        lengths=None if ends is None else tuple(min(end, t) for end in ends[:b]),
        proj_size=proj_size,
        return_cell_states=return_cell_states,
        layout=layout,
    )
    cases.check(spec, "cpp", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lstm-plain", "lstm-reverse", "lstm-cells", "lstm-cells-reverse"])
def test_last_states_are_copies(backend, name):
    cases.last_states_are_copies(find(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_shows(backend):
    spec = LSTMSpec("lstm-nan", "drawn", 5, 3, 6, 17)
    cases.nan_stays_in_its_row_and_shows(spec, backend)
    spec = LSTMSpec("lstm-nan", "drawn", 5, 3, 6, 17, proj_size=5)
    cases.nan_stays_in_its_row_and_shows(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_is_one_step(backend):
    cases.cell_is_one_step(find("lstm-t1"), backend)
    cases.cell_gradients(find("lstm-t1"), backend)


@pytest.mark.parametrize(
    "name",
    [
        "lstm-t2",
        "lstm-bare",
        "lstm-ragged",
        "lstm-ragged-bare",
        "lstm-proj",
        "lstm-proj-bare",
        "lstm-cells",
        "lstm-cells-ragged",
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative(name, backend):
    cases.gradcheck(find(name), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["lstm-plain", "lstm-ragged-reverse", "lstm-proj", "lstm-cells-proj"]
)
def test_gradient_penalty_is_torchs(name, backend):
    cases.gradient_penalty_is_torchs(find(name), backend, stock.lstm)


@pytest.mark.parametrize("name", ["lstm-long"])
def test_one_long_sequence_in_pieces(name):
    cases.in_pieces(find(name), "cpp")


@pytest.mark.parametrize("name", ["lstm-reverse", "lstm-proj-long"])
def test_reverse_is_a_flip_of_time(name):
    cases.reverse_is_a_flip_of_time(find(name), "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "lstm-ragged",
        "lstm-ragged-reverse",
        "lstm-ragged-b1",
        "lstm-ragged-one-long",
        "lstm-proj-ragged",
        "lstm-cells-ragged-proj",
    ],
)
def test_lengths(name, backend):
    spec = find(name)
    cases.padding_does_not_matter(spec, backend)
    cases.each_alone(spec, backend)
    cases.packed_rows(spec, backend)
    cases.lengths_in_any_form(spec, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_far_inputs_saturate(backend):
    """Gates at +-1e30 and +-inf are 0 or 1, and their gradients zero, not NaN."""
    cases.need(find("lstm-plain"), backend, torch.float32)
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf]).reshape(1, 4, 1).requires_grad_()
    one, zero = torch.ones(4, 1), torch.zeros(4, 1)
    c0 = torch.full((4, 1), 0.5)
    y, (_, c_n) = functional.lstm(x, one, zero, c0=c0, backend=backend)
    assert c_n.flatten().tolist() == [1.5, 0, 1.5, 0]
    assert torch.equal(y[0], torch.tensor([[1.0], [0], [1], [0]]) * torch.tanh(c_n))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == 0).all()


def test_harness_rejects_mutants(monkeypatch):
    spec = find("lstm-cells-proj")
    cases.rejects_mutants(spec, monkeypatch, cases.recurrent_mutants("lstm", 8, 4))
