"""The `rnn` op: every spec on every backend, then what is special to it."""

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import functional
from pykernels.testing import RNN_SPECS, RNNSpec, evaluate, stock
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases.cases(*RNN_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    cases.check(spec, backend, dtype)


@pytest.mark.parametrize(
    ("spec", "backend"), cases.gradcheck_cases(RNN_SPECS, {"rnn-plain", "rnn-bare"})
)
def test_gradcheck(spec, backend):
    cases.gradcheck(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    cases.some(
        ["rnn-plain", "rnn-bare", "rnn-t0", "rnn-b0", "rnn-transposed", "rnn-expanded"],
        ["rnn-t2", "rnn-t0"],
    ),
)
def test_each_gradient_alone(spec, backend):
    cases.gradient_alone(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    cases.some(
        ["rnn-plain", "rnn-relu", "rnn-t1", "rnn-h340", "rnn-rows", "rnn-strided", "rnn-offset"],
        ["rnn-plain", "rnn-transposed"],
    ),
)
def test_leaves_inputs_alone(spec, backend):
    cases.leaves_inputs_alone(spec, backend)
    cases.without_gradients(spec, backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "rnn-50x32x300x512",
        "rnn-1024x1x64x64",
        "rnn-h340",
        "rnn-b1",
        "rnn-b33",
        "rnn-rows",
        "rnn-all1",
    ],
)
def test_threads(name, count, threads):
    """One, two, and more threads than there are rows: right, and the same bits twice."""
    threads(count)
    cases.check(find(name), "cpp", torch.float32)
    cases.repeats_bitwise(find(name), "cpp", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["rnn-h340", "rnn-long"])
def test_threads_of_other_dtypes(name, dtype, threads):
    threads(2)
    cases.check(find(name), "cpp", dtype)
    cases.repeats_bitwise(find(name), "cpp", dtype)


@pytest.mark.parametrize("name", ["rnn-plain", "rnn-b17"])
def test_repeats_bitwise_triton(name):
    cases.repeats_bitwise(find(name), "triton", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls(count, threads):
    threads(count)
    cases.concurrently(find("rnn-h321"), "cpp", torch.float32)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=cases.RECURRENT_SIZES,
    bias=st.booleans(),
    h0=st.booleans(),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    reverse=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "offset", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_sizes(sizes, bias, h0, nonlinearity, reverse, layout, dtype):
    spec = RNNSpec(
        "rnn-any",
        "drawn",
        *sizes,
        bias=bias,
        h0=h0,
        nonlinearity=nonlinearity,
        reverse=reverse,
        layout=layout,
    )
    cases.check(spec, "cpp", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rnn-plain", "rnn-no-h0", "rnn-reverse"])
def test_saves_the_states_and_nothing_else(name, backend):
    spec = find(name)
    cases.need(spec, backend, torch.float32)
    kept, (y, _) = cases.saved_bytes(spec, backend, torch.float32)
    assert kept == y.numel() * y.element_size()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rnn-plain", "rnn-reverse"])
def test_h_n_is_a_copy_of_the_last_state(backend, name):
    cases.last_states_are_copies(find(name), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_stays_in_its_row_and_shows(backend, nonlinearity):
    spec = RNNSpec("rnn-nan", "drawn", 5, 3, 6, 17, nonlinearity=nonlinearity)
    cases.nan_stays_in_its_row_and_shows(spec, backend)


class FarFromZero(RNNSpec):
    """A relu whose arguments are all 1/2 and more away from the jump of its derivative."""

    def inputs(self, dtype, device="cpu", seed=0):
        made = super().inputs(torch.float64, "cpu", seed)
        made["x"] = made["x"].sign() * (1 + made["x"].abs() / 4)
        made["w_ih"] = torch.eye(self.h, dtype=torch.float64)
        made["w_hh"] = made["w_hh"] / 32
        made["b_ih"] = made["b_ih"] / 8
        made["b_hh"] = made["b_hh"] / 8
        return {name: t.to(device, dtype) for name, t in made.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_in_16_bits(backend, dtype):
    spec = FarFromZero("rnn-far", "drawn", 5, 3, 8, 8, nonlinearity="relu")
    truth = evaluate.truth(spec, torch.float64)
    assert 0.2 < (truth["y"] > 0).double().mean() < 0.8
    cases.check(spec, backend, dtype)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, of the infinities in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_inputs_saturate(backend):
    """tanh of +-1e30 and of +-inf is +-1, and its gradient zero, not NaN."""
    cases.need(find("rnn-plain"), backend, torch.float32)
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 0.0], device=cases.device(backend))
    x = x.reshape(1, 5, 1).requires_grad_()
    one, zero = torch.ones(1, 1, device=x.device), torch.zeros(1, 1, device=x.device)
    y, _ = functional.rnn(x, one, zero, backend=backend)
    assert y.flatten().tolist() == [1, -1, 1, -1, 0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten().tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_is_one_step(backend):
    cases.cell_is_one_step(find("rnn-t1"), backend)
    cases.cell_gradients(find("rnn-t1"), backend)


@pytest.mark.parametrize("name", ["rnn-t2", "rnn-bare", "rnn-ragged", "rnn-ragged-bare"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_second_derivative(name, backend):
    cases.gradcheck(find(name), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rnn-plain", "rnn-ragged-reverse"])
def test_gradient_penalty_is_torchs(name, backend):
    cases.gradient_penalty_is_torchs(find(name), backend, stock.rnn)


def test_one_long_sequence_in_pieces():
    cases.in_pieces(find("rnn-long"), "cpp")


@pytest.mark.parametrize("name", ["rnn-reverse", "rnn-long-relu"])
def test_reverse_is_a_flip_of_time(name):
    cases.reverse_is_a_flip_of_time(find(name), "cpp")


@pytest.mark.parametrize(
    ("spec", "backend"),
    cases.some(
        ["rnn-ragged", "rnn-ragged-reverse", "rnn-ragged-b1", "rnn-ragged-one-long"],
        ["rnn-ragged", "rnn-ragged-reverse", "rnn-ragged-b1"],
    ),
)
def test_lengths(spec, backend):
    cases.padding_does_not_matter(spec, backend)
    cases.each_alone(spec, backend)
    cases.packed_rows(spec, backend)
    cases.lengths_in_any_form(spec, backend)


def test_harness_rejects_mutants(monkeypatch):
    cases.rejects_mutants(find("rnn-plain"), monkeypatch, cases.recurrent_mutants("rnn", 6, 2))


def test_poison_is_on():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()
