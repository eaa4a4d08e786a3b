"""Layers and directions that run side by side give what they give one after the other."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import pykernels.nn
from pykernels import _backends
from pykernels.testing.evaluate import flat

OPS = ("RNN", "GRU", "LSTM")
STACKS = {
    "two layers": {"num_layers": 2},
    "five layers": {"num_layers": 5},
    "two directions": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True},
    "no bias": {"num_layers": 3, "bias": False},
}

pytestmark = pytest.mark.skipif(
    _backends.available("cpp") is not None, reason="no C++ kernels are built"
)


@pytest.fixture(params=OPS)
def kind(request):
    return request.param


@pytest.fixture
def groups(kind, monkeypatch):
    """How many calls ran side by side, of each group so far."""
    backend, op, seen = _backends.module("cpp", kind.lower()), kind.lower(), []
    run = getattr(backend, f"{op}_group_fwd")

    def counted(calls, **rest):
        seen.append(len(calls))
        return run(calls, **rest)

    monkeypatch.setattr(backend, f"{op}_group_fwd", counted)
    return seen


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def results(layer, x, hx, threads):
    """The outputs of a layer and all gradients for fixed gradients of the outputs."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    leaves = [x, *flat([hx]), *layer.parameters()]
    outputs = flat(layer(x, hx))
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(t) for t in outputs])
    return [*outputs, *grads]


def draw(kind, layer, T, B, I, dtype):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    hx = [torch.randn(count, B, w, dtype=dtype, requires_grad=True) for w in widths]
    return x, tuple(hx) if kind == "LSTM" else hx[1]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("sizes", [(60, 1, 5, 24), (7, 3, 17, 40), (1, 2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(kind, groups, threads, stack, sizes, dtype):
    T, B, I, H = sizes
    layer = getattr(pykernels.nn, kind)(I, H, dtype=dtype, **STACKS[stack])
    x, hx = draw(kind, layer, T, B, I, dtype)
    got = results(layer, x, hx, threads)
    assert groups[0] > 1  # side by side
    many = len(groups)
    want = results(layer, x, hx, 1)
    assert max(groups[many:], default=1) == 1  # one after the other
    bound = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **bound)


def test_projections(threads):
    layer = pykernels.nn.LSTM(5, 12, num_layers=3, proj_size=7)
    x, hx = draw("LSTM", layer, 9, 2, 5, torch.float32)
    got, want = results(layer, x, hx, threads), results(layer, x, hx, 1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stack", ["two layers", "two directions"])
def test_packed_sequences(kind, groups, stack):
    torch.set_num_threads(2)
    ours = getattr(pykernels.nn, kind)(5, 8, **STACKS[stack])
    stock = getattr(torch.nn, kind)(5, 8, **STACKS[stack])
    stock.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, stock):
        x = torch.linspace(-1, 1, 6 * 3 * 5).view(6, 3, 5).requires_grad_()
        y, last = layer(pack_padded_sequence(x, [2, 6, 3], enforce_sorted=False))
        outputs = [y.data, *flat([last])]
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            outputs, [x, *layer.parameters()], [torch.randn_like(t) for t in outputs]
        )
        found.append([*outputs, *grads])
    assert groups == [2]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stack", ["two layers", "two directions"])
def test_gradients_of_gradients(kind, groups, stack):
    torch.set_num_threads(2)
    layer = getattr(pykernels.nn, kind)(2, 3, dtype=torch.float64, **STACKS[stack])
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        call = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return flat(call)[0]

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *weights))
    # along one random direction: the elements are those of the layers alone, which have tests
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)
    assert 2 in groups


def test_only_some_gradients(kind):
    torch.set_num_threads(2)
    layer = getattr(pykernels.nn, kind)(5, 8, num_layers=3)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in ("weight_hh_l0", "bias_hh_l2"))
    stock = getattr(torch.nn, kind)(5, 8, num_layers=3)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(6, 2, 5)
    layer(x)[0].square().sum().backward()
    stock(x)[0].square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert found.keys() == {"weight_hh_l0", "bias_hh_l2"}
    for name, grad in found.items():
        want = stock.get_parameter(name).grad
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["_l1", "_reverse", "weight_hh_l0"])
def test_gradients_of_gradients_of_some(kind, groups, wanted):
    """Outputs that hang on nothing that needs a gradient are in nobody's way."""
    torch.set_num_threads(2)
    stack = {"bidirectional": True} if wanted == "_reverse" else {"num_layers": 2}
    ours = getattr(pykernels.nn, kind)(5, 4, dtype=torch.float64, **stack)
    stock = getattr(torch.nn, kind)(5, 4, dtype=torch.float64, **stack)
    stock.load_state_dict(ours.state_dict())
    x, found = torch.randn(3, 2, 5, dtype=torch.float64), []
    for layer in (ours, stock):
        for name, p in layer.named_parameters():
            p.requires_grad_(wanted in name)
        weights = [p for p in layer.parameters() if p.requires_grad]
        loss = sum(t.square().sum() for t in flat(layer(x)))
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))
    assert groups == [2]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_of_an_output_that_has_none(kind):
    """Of a forward direction that is frozen: zero of the other's weights, and no error."""
    torch.set_num_threads(2)
    layer = getattr(pykernels.nn, kind)(5, 4, bidirectional=True)
    for name, p in layer.named_parameters():
        p.requires_grad_(name.endswith("_reverse"))
    y = flat(layer(torch.randn(3, 2, 5)))[0]
    weights = [p for p in layer.parameters() if p.requires_grad]
    loss = y[..., :4].square().sum()
    grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@pytest.mark.parametrize("stack", ["two layers", "two directions"])
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_memory(kind, groups, stack, grad):
    """Those of FakeTensorMode, outside of it too, go to the operators."""
    torch.set_num_threads(2)
    with FakeTensorMode():
        layer = getattr(pykernels.nn, kind)(5, 4, **STACKS[stack])
        x = torch.randn(3, 2, 5)
    with torch.set_grad_enabled(grad):
        y, _ = layer(x)
    assert y.shape == (3, 2, 4 * (1 + layer.bidirectional))
    assert not groups


def test_dropout_comes_between_layers(kind, groups):
    torch.set_num_threads(2)
    layer = getattr(pykernels.nn, kind)(5, 8, num_layers=2, dropout=1.0)
    x = torch.randn(6, 2, 5)
    dropped = layer(x)[0]
    assert max(groups, default=1) == 1
    assert not torch.allclose(dropped, layer.eval()(x)[0])
    assert max(groups) == 2


def test_large_weights_take_all_threads_one_after_the_other(kind, groups):
    torch.set_num_threads(2)
    layer = getattr(pykernels.nn, kind)(4, 512, num_layers=2).eval()
    with torch.no_grad():
        layer(torch.randn(2, 1, 4))
    assert not groups
