"""`gradient_flow` against Jacobians by brute force: every state to the last, one by one."""

import math

import pytest
import torch

import pykernels.nn
from pykernels.diagnostics import gradient_flow
from pykernels.testing import assert_close

LAYERS = {"stock": torch.nn, "ours": pykernels.nn}
KINDS = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "GRU": {},
    "LSTM": {},
    "LSTM projected": {"proj_size": 3},
}
T, B, I, H = 6, 3, 4, 5


def make(kind, layers, dtype, **options):
    torch.manual_seed(0)
    stock = getattr(torch.nn, kind.split()[0])(I, H, **KINDS[kind], **options)
    made = getattr(layers, kind.split()[0])(I, H, **KINDS[kind], **options)
    made.load_state_dict(stock.state_dict())
    return made.to(dtype)


def draw(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def states(module, x):
    """(h_t, c_t) or (h_t,) for t = 0 ... T, by stock torch's own calls on the first t steps."""
    widths = [module.proj_size or H] + [H] * isinstance(module, torch.nn.LSTM)
    found = [tuple(x.new_zeros(1, x.shape[1], width) for width in widths)]
    for t in range(1, len(x) + 1):
        _, after = module(x[:t])
        found.append(after if isinstance(after, tuple) else (after,))
    return [tuple(part.detach() for part in state) for state in found]


def after(module, x, state):
    """y of the steps x from `state` on, and the last h."""
    if not len(x):
        return state[0][:0], state[0]
    y, last = module(x, state if len(state) > 1 else state[0])
    return y, last[0] if isinstance(last, tuple) else last


def by_brute_force(module, x):
    norms = []
    for t, state in enumerate(states(module, x)):
        jacobians = torch.autograd.functional.jacobian(
            lambda *s, t=t: after(module, x[t:], s)[1], state
        )
        norms.append(sum(j.square().sum() for j in jacobians) / x.shape[1])
    return torch.stack(norms).sqrt()


def loss_by_brute_force(module, x, loss):
    every, norms = states(module, x), []
    for t, state in enumerate(every):
        leaves = tuple(part.clone().requires_grad_() for part in state)
        y = [h for h, *_ in every[1:t]] + [leaves[0]] * (t > 0) + [after(module, x[t:], leaves)[0]]
        value = loss(torch.cat(y))
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        norms.append(sum(g.square().sum() for g in grads))
    return torch.stack(norms).sqrt()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_jacobians(kind, layers):
    x = draw(torch.float32, T, B, I)
    truth = by_brute_force(make(kind, torch.nn, torch.float64), x.double())
    usual = by_brute_force(make(kind, torch.nn, torch.float32), x)
    flow = gradient_flow(make(kind, LAYERS[layers], torch.float32), x)
    assert_close(flow.norms, truth, usual, f"{layers} {kind}")
    assert flow.distances.tolist() == [*range(T, -1, -1)]
    width = KINDS[kind].get("proj_size", H)
    assert flow.norms[-1].item() == pytest.approx(math.sqrt(width))
    assert flow.rate == pytest.approx((flow.norms[0] / flow.norms[-1]).item() ** (1 / T))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss(kind, layers):
    def loss(y):
        weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y) / y.numel()
        return (y.square() * weights).sum()

    x = draw(torch.float32, T, B, I)
    truth = loss_by_brute_force(make(kind, torch.nn, torch.float64), x.double(), loss)
    usual = loss_by_brute_force(make(kind, torch.nn, torch.float32), x, loss)
    flow = gradient_flow(make(kind, LAYERS[layers], torch.float32), x, loss=loss)
    assert_close(flow.norms, truth, usual, f"{layers} {kind}")


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_power_vanishes_or_explodes(factor, layers):
    """At rest tanh has slope 1, and dh_T/dh_t is W_hh^(T - t): here a power of `factor`."""
    module = LAYERS[layers].RNN(I, H, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(factor * torch.eye(H))
    flow = gradient_flow(module, torch.zeros(T, B, I))
    expected = math.sqrt(H) * factor ** flow.distances.double()
    assert_close(flow.norms, expected, expected.float())
    assert flow.rate == pytest.approx(factor)


@pytest.mark.parametrize("layers", LAYERS)
def test_forms_of_input_agree(layers):
    x = draw(torch.float64, T, B, I)
    made = make("LSTM", LAYERS[layers], torch.float64)
    first = make("LSTM", LAYERS[layers], torch.float64, batch_first=True)
    usual = gradient_flow(made, x).norms
    torch.testing.assert_close(gradient_flow(first, x.transpose(0, 1)).norms, usual)
    alone = torch.stack([gradient_flow(made, x[:, b]).norms.square() for b in range(B)])
    torch.testing.assert_close(alone.mean(0).sqrt(), usual)

    def total(y):
        return y[..., 0].square().sum()

    torch.testing.assert_close(
        gradient_flow(first, x.transpose(0, 1), loss=total).norms,
        gradient_flow(made, x, loss=total).norms,
    )


def test_a_given_state_moves_the_curve():
    x, module = draw(torch.float64, T, B, I), make("GRU", pykernels.nn, torch.float64)
    h = torch.ones(1, B, H, dtype=torch.float64)
    split = gradient_flow(module, x[2:], module(x[:2])[1]).norms
    torch.testing.assert_close(split, gradient_flow(module, x).norms[2:])
    assert not torch.allclose(gradient_flow(module, x, h).norms, gradient_flow(module, x).norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """256 ones for each of 300 rows: bfloat16 has no such number, float16 none so large."""
    layer = pykernels.nn.RNN(2, 256, dtype=dtype)
    flow = gradient_flow(layer, torch.zeros(1, 300, 2, dtype=dtype))
    assert flow.norms.dtype == torch.float32
    assert flow.norms[-1] == 16


def test_a_state_may_be_a_list():
    layer, x = pykernels.nn.LSTM(I, H), draw(torch.float32, T, B, I)
    hx = draw(torch.float32, 2, 1, B, H)
    of_list, of_pair = (gradient_flow(layer, x, kind(hx)).norms for kind in (list, tuple))
    assert torch.equal(of_list, of_pair)


def test_directions_are_drawn_on_the_cpu_whatever_the_default():
    layer, x = pykernels.nn.RNN(I, H), draw(torch.float32, T, B, I)
    want = gradient_flow(layer, x, samples=3).norms
    with torch.device("meta"):
        assert torch.equal(gradient_flow(layer, x, samples=3).norms, want)


def test_inference_mode_is_refused():
    layer, x = pykernels.nn.RNN(I, H), draw(torch.float32, T, B, I)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gradient_flow"):
        gradient_flow(layer, x)


def test_random_directions_estimate_the_norm():
    x, module = draw(torch.float64, T, B, I), make("GRU", torch.nn, torch.float64)
    exact = gradient_flow(module, x).norms
    estimate = gradient_flow(module, x, samples=1000).norms
    assert (estimate / exact - 1).abs().max() < 0.1
    again = gradient_flow(module, x, samples=1000).norms
    assert torch.equal(again, estimate)
    other = gradient_flow(module, x, samples=1000, seed=1).norms
    assert not torch.equal(other, estimate)


def test_the_module_is_left_as_it_was():
    module = make("RNN", pykernels.nn, torch.float32).eval()
    module.bias_hh_l0.requires_grad_(False)
    flow = gradient_flow(module, torch.zeros(0, B, I))
    assert flow.norms.tolist() == pytest.approx([math.sqrt(H)])
    assert math.isnan(flow.rate)
    gradient_flow(module, draw(torch.float32, T, B, I), loss=lambda y: y.sum())
    assert not module.training
    assert [p.requires_grad for p in module.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"module": torch.nn.Linear(I, H)}, TypeError, "`module` must be an RNN, GRU or LSTM"),
        ({"module": torch.nn.GRU(I, H, 2)}, ValueError, "`module.num_layers` must be 1, got 2"),
        (
            {"module": torch.nn.GRU(I, H, bidirectional=True)},
            ValueError,
            "`module.bidirectional` must be False, got True",
        ),
        ({"x": [1.0]}, TypeError, "`x` must be a Tensor, got list"),
        ({"x": torch.zeros(T, B, I + 1)}, ValueError, r"`x` must be \[T, B, I\] = \[6, 3, 4\]"),
        ({"x": torch.zeros(T, 0, I)}, ValueError, "`x` must be of a batch of at least 1"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1, got 0"),
        ({"samples": 2, "loss": torch.sum}, ValueError, "`samples` must be None with a loss"),
        ({"loss": lambda y: 1.0}, TypeError, "`loss` must return a tensor, got float"),
        ({"loss": lambda y: y}, ValueError, "`loss` must be a function that returns a scalar"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"module": torch.nn.GRU(I, H), "x": torch.zeros(T, B, I)} | change
    with pytest.raises(error, match=words):
        gradient_flow(**arguments)
