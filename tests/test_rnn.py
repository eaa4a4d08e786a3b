"""The `rnn` op: every spec on every backend, then what is special to it."""

import functools

import pytest
import torch
from cases import (
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

from pykernels import functional
from pykernels.testing import RNN_SPECS, RNNSpec, evaluate, stock
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases(*RNN_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    check(spec, backend, dtype)


@pytest.mark.parametrize(("spec", "backend"), gradcheck_cases(RNN_SPECS, {"rnn-plain", "rnn-bare"}))
def test_gradcheck(spec, backend):
    gradcheck(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    some(
        ["rnn-plain", "rnn-bare", "rnn-t0", "rnn-b0", "rnn-transposed", "rnn-expanded"],
        ["rnn-t2", "rnn-t0"],
    ),
)
def test_each_gradient_alone(spec, backend):
    gradient_alone(spec, backend)


@pytest.mark.parametrize(
    ("spec", "backend"),
    some(
        ["rnn-plain", "rnn-relu", "rnn-t1", "rnn-h300", "rnn-strided", "rnn-offset"],
        ["rnn-plain", "rnn-transposed"],
    ),
)
def test_leaves_inputs_alone(spec, backend):
    leaves_inputs_alone(spec, backend)
    without_gradients(spec, backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "rnn-50x32x300x512",
        "rnn-1024x1x64x64",
        "rnn-h300",
        "rnn-b1",
        "rnn-b33",
        "rnn-rows",
        "rnn-all1",
    ],
)
def test_threads(name, count, threads):
    """One, two, and more threads than there are rows: right, and the same bits twice."""
    threads(count)
    check(find(name), "cpp", torch.float32)
    repeats_bitwise(find(name), "cpp", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["rnn-h300", "rnn-long"])
def test_threads_of_other_dtypes(name, dtype, threads):
    threads(2)
    check(find(name), "cpp", dtype)
    repeats_bitwise(find(name), "cpp", dtype)


@pytest.mark.parametrize("name", ["rnn-plain", "rnn-b17"])
def test_repeats_bitwise_triton(name):
    repeats_bitwise(find(name), "triton", torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls(count, threads):
    threads(count)
    concurrently(find("rnn-h257"), "cpp", torch.float32)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 40), st.integers(1, 70)),
    bias=st.booleans(),
    h0=st.booleans(),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    reverse=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "offset", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_sizes(sizes, bias, h0, nonlinearity, reverse, layout, dtype):
    spec = RNNSpec("rnn-any", "drawn", *sizes, bias, h0, nonlinearity, reverse, layout)
    check(spec, "cpp", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rnn-plain", "rnn-no-h0", "rnn-reverse"])
def test_saves_the_states_and_nothing_else(name, backend):
    spec = find(name)
    need(spec, backend, torch.float32)
    kept, (y, _) = saved_bytes(spec, backend, torch.float32)
    assert kept == y.numel() * y.element_size()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_h_n_is_a_copy_of_the_last_state(backend, reverse):
    spec = find("rnn-reverse" if reverse else "rnn-plain")
    need(spec, backend, torch.float32)
    y, h_n = call(spec, spec.inputs(torch.float32, device(backend)), backend)
    assert torch.equal(h_n, y[0 if reverse else -1])
    assert h_n.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_stays_in_its_row_and_shows(backend, nonlinearity):
    """A NaN input is neither hidden by the nonlinearity nor spread to other sequences."""
    spec = RNNSpec("rnn-nan", "drawn", 5, 3, 6, 17, nonlinearity=nonlinearity)
    need(spec, backend, torch.float32)
    inputs = spec.inputs(torch.float32, device(backend))
    clean, _ = call(spec, inputs, backend)
    inputs["x"][2, 1, 3] = torch.nan
    y, h_n = call(spec, inputs, backend)
    assert y[2:, 1].isnan().all()
    assert h_n[1].isnan().all()
    assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(y[:2], clean[:2])


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
    check(spec, backend, dtype)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, of the infinities in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_inputs_saturate(backend):
    """tanh of +-1e30 and of +-inf is +-1, and its gradient zero, not NaN."""
    need(find("rnn-plain"), backend, torch.float32)
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 0.0], device=device(backend))
    x = x.reshape(1, 5, 1).requires_grad_()
    one, zero = torch.ones(1, 1, device=x.device), torch.zeros(1, 1, device=x.device)
    y, _ = functional.rnn(x, one, zero, backend=backend)
    assert y.flatten().tolist() == [1, -1, 1, -1, 0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten().tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_is_one_step(backend):
    spec = find("rnn-t1")
    need(spec, backend, torch.float32)
    made = spec.inputs(torch.float32, device(backend))
    weights = [made[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    y, _ = call(spec, made, backend)
    step = functional.rnn_cell(made["x"][0], made["h0"], *weights, backend=backend)
    assert torch.equal(step, y[0])
    row = functional.rnn_cell(made["x"][0, 1], made["h0"][1], *weights, backend=backend)
    torch.testing.assert_close(row, y[0, 1], rtol=1e-6, atol=1e-7)
    without = functional.rnn_cell(made["x"][0], None, *weights, backend=backend)
    zeros = torch.zeros_like(made["h0"])
    assert torch.equal(without, functional.rnn_cell(made["x"][0], zeros, *weights, backend=backend))


@pytest.mark.parametrize("name", ["rnn-t2", "rnn-bare"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_second_derivative(name, backend):
    gradcheck(find(name), backend, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_is_torchs(backend):
    """A penalty on a gradient does not lose its own gradient in silence."""
    spec = find("rnn-plain")
    need(spec, backend, torch.float64)
    results = []
    for op in (functools.partial(functional.rnn, backend=backend), stock.rnn):
        inputs = leaves(spec, torch.float64, backend)
        y, h_n = op(**inputs, **spec.options)
        (dx,) = torch.autograd.grad((y * h_n).sum(), inputs["x"], create_graph=True)
        penalised = y.sum() + dx.square().sum()
        results.append(torch.autograd.grad(penalised, list(inputs.values())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


def test_one_long_sequence_in_pieces():
    """h_n of one piece is h0 of the next: values and gradients of the whole."""
    spec = find("rnn-long")
    need(spec, "cpp", torch.float64)
    made = leaves(spec, torch.float64, "cpp")
    whole, last = call(spec, made, "cpp")
    state, pieces = made["h0"], []
    for x in made["x"].split(37):
        y, state = call(spec, {**made, "x": x, "h0": state}, "cpp")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-13)
    one = torch.autograd.grad(last.sum(), list(made.values()))
    many = torch.autograd.grad(state.sum(), list(made.values()))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_reverse_is_a_flip_of_time():
    spec = find("rnn-reverse")
    need(spec, "cpp", torch.float32)
    made = spec.inputs(torch.float32)
    y, h_n = call(spec, made, "cpp")
    flipped, last = functional.rnn(**{**made, "x": made["x"].flip(0)}, backend="cpp")
    assert torch.equal(bits(y), bits(flipped.flip(0)))
    assert torch.equal(h_n, last)


def test_the_reference_is_torchs_layer():
    """Truth itself against torch.nn.RNN in float64, where both are exact to a few ulp."""
    for name in ("rnn-plain", "rnn-relu", "rnn-reverse", "rnn-no-bias", "rnn-no-h0"):
        spec = find(name)
        truth, stock = evaluate.truth(spec, torch.float64), evaluate.stock(spec, torch.float64)
        for key in truth:
            torch.testing.assert_close(truth[key], stock[key], rtol=1e-12, atol=1e-13)


def test_harness_rejects_mutants(monkeypatch):
    """Zeros for an output or a gradient, one off by 0.1 %, a forgotten upstream one: fail."""

    def zeros(run, *args, **options):
        (y, h_n), saved = run(*args, **options)
        return (torch.zeros_like(y), torch.zeros_like(h_n)), saved

    def stale_h_n(run, *args, **options):
        (y, _h_n), saved = run(*args, **options)
        return (y, y[0].clone()), saved

    mutants = [("rnn_fwd", zeros), ("rnn_fwd", stale_h_n)]
    mutants += [
        ("rnn_bwd", scaled_gradient(i, factor)) for i in range(6) for factor in (0.0, 1.001)
    ]
    mutants += [("rnn_bwd", forget(i)) for i in range(2)]
    rejects_mutants(find("rnn-plain"), monkeypatch, mutants)


def test_poison_is_on():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()
