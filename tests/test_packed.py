"""Weights that are packed once: used again, packed anew once they change, never copied along."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pykernels.nn
from pykernels import _backends, functional
from pykernels.functional import PackedWeights

OPS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}

pytestmark = pytest.mark.skipif(
    _backends.available("cpp") is not None, reason="no C++ kernels are built"
)


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture
def packings(op, monkeypatch):
    """The weights of every packing so far."""
    backend, made = _backends.module("cpp", op), []
    pack = getattr(backend, f"{op}_pack")
    monkeypatch.setattr(backend, f"{op}_pack", lambda *w: made.append(w) or pack(*w))
    return made


def layers(op, dtype=torch.float32, **options):
    """Ours and torch's with the same weights, in evaluation."""
    ours = getattr(pykernels.nn, OPS[op])(5, 7, dtype=dtype, **options).eval()
    stock = getattr(torch.nn, OPS[op])(5, 7, dtype=dtype, **options).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def same(ours, stock, x):
    with torch.no_grad():
        got, want = ours(x), stock(x)
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def flat(results):
    results = results if isinstance(results, tuple | list) else (results,)
    return [t for r in results for t in (r if isinstance(r, tuple) else (r,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_packs_once(op, packings, dtype):
    ours, stock = layers(op, dtype, num_layers=2, bidirectional=True)
    for T in (1, 4, 1):
        same(ours, stock, torch.randn(T, 3, 5, dtype=dtype))
    assert len(packings) == 4


def test_a_projection_is_packed(packings, op):
    if op != "lstm":
        pytest.skip("only an lstm projects")
    ours, stock = layers(op, proj_size=3)
    for _ in range(2):
        same(ours, stock, torch.randn(4, 3, 5))
    assert len(packings) == 1


def test_packed_sequences(op, packings):
    ours, stock = layers(op)
    for _ in range(2):
        same(ours, stock, torch.randn(4, 3, 5))
        x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 5), [4, 2, 1])
        with torch.no_grad():
            got, want = ours(x)[0].data, stock(x)[0].data
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(packings) == 1


def write(p):
    p.mul_(1.5)


def assign(p):
    p.data = p.data * 1.5


@pytest.mark.parametrize("change", [write, assign])
def test_changed_weights_are_packed_anew(op, packings, change):
    ours, stock = layers(op)
    x = torch.randn(4, 3, 5)
    same(ours, stock, x)
    before = ours(x)[0].detach()
    with torch.no_grad():
        for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
            change(p)
            change(q)
    same(ours, stock, x)
    assert not torch.equal(before, ours(x)[0])
    assert len(packings) == 2


@pytest.mark.parametrize("op", ["rnn"])  # no other op has a square matrix
def test_weights_turned_in_place_are_packed_anew(op, packings):
    ours, stock = layers(op)
    x = torch.randn(4, 3, 5)
    same(ours, stock, x)
    for layer in (ours, stock):
        layer.weight_hh_l0.data = layer.weight_hh_l0.data.t()  # the same memory and version
    same(ours, stock, x)
    assert len(packings) == 2


def test_load_state_dict_and_steps_of_an_optimizer(op, packings):
    ours, stock = layers(op)
    x = torch.randn(4, 3, 5)
    same(ours, stock, x)
    other, _ = layers(op)
    ours.load_state_dict(other.state_dict())
    stock.load_state_dict(other.state_dict())
    same(ours, stock, x)
    for layer in (ours, stock):
        layer(x)[0].sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()
    same(ours, stock, x)
    assert len(packings) == 3


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_steps_of_fused_optimizers(op, optimizer, cell):
    """They count no version."""
    ours, stock = cell_and_stock(op) if cell else layers(op)
    steps = [
        getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1, fused=True)
        for layer in (ours, stock)
    ]
    x = torch.randn(3, 5) if cell else torch.randn(4, 3, 5)
    for _ in range(3):
        same(ours, stock, x)
        for layer, step in zip((ours, stock), steps, strict=True):
            step.zero_grad()
            flat(layer(x))[0].sum().backward()
            step.step()
    same(ours, stock, x)


@pytest.mark.parametrize("cell", [False, True])
def test_shared_weights_are_not_kept(op, packings, cell):
    """Another process may write to them."""
    ours, stock = cell_and_stock(op) if cell else layers(op)
    x = torch.randn(3, 5) if cell else torch.randn(4, 3, 5)
    same(ours, stock, x)
    ours.share_memory()
    before = len(packings)
    for _ in range(2):
        same(ours, stock, x)
    assert len(packings) == before == 1


def test_other_weights_are_let_go(op):
    """`to`, `half` and their like leave nothing packed of what was there before."""
    ours, _ = layers(op)
    with torch.no_grad():
        ours(torch.randn(4, 3, 5))
    assert ours.__dict__["_packed_weights"]
    ours.to(torch.float64)
    assert "_packed_weights" not in ours.__dict__


def test_a_dispatch_mode_sees_a_packed_step(op):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    ours, _ = cell_and_stock(op)
    x, found = torch.randn(3, 5), []
    with torch.no_grad():
        for _ in range(2):
            names = []
            with Seen():
                ours(x)
            found.append(names)
            ours(x)  # packs
    assert f"pykernels.{op}.default" in found[0]
    assert found[0] == found[1]


def test_nothing_is_kept_in_training_or_with_gradients(op, packings):
    ours, _ = layers(op)
    x = torch.randn(4, 3, 5)
    ours(x)
    with torch.no_grad():
        ours.train()(x)
    assert not packings


@pytest.mark.parametrize("cell", [False, True])
def test_training_forgets(op, packings, cell):
    """Optimizers that write through ``.data`` count no version: the next evaluation sees them."""
    kinds = [getattr(where, OPS[op] + "Cell" * cell) for where in (pykernels.nn, torch.nn)]
    ours, stock = (kind(5, 7).eval() for kind in kinds)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5) if cell else torch.randn(4, 3, 5)
    for _ in range(2):
        same(ours, stock, x)
        for model in (ours, stock):
            for p in torch.nn.Sequential(model).train().parameters():
                p.data.mul_(1.5)
            model.eval()
    assert len(packings) == 2


def test_copies_and_pickles_are_empty(op, packings):
    ours, stock = layers(op)
    x = torch.randn(4, 3, 5)
    same(ours, stock, x)
    clone = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    with torch.no_grad():
        for p, q in zip(clone.parameters(), stock.parameters(), strict=True):
            p.add_(0.1)
            q.add_(0.1)
    same(clone, stock, x)
    assert len(packings) == 2
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_inference_mode(op, packings):
    """Tensors made there have no version, so that a change could not be seen."""
    with torch.inference_mode():
        ours, stock = layers(op)
        x = torch.randn(4, 3, 5)
        same(ours, stock, x)
        for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
            p.mul_(1.5)
            q.mul_(1.5)
        same(ours, stock, x)
    assert not packings


def test_weights_of_inference_mode_after_others(op, packings):
    layer, _ = layers(op)
    weights, x, packed = (
        [p.detach() for p in layer.parameters()],
        torch.randn(4, 3, 5),
        PackedWeights(),
    )
    call = getattr(functional, op)
    want = call(x, *weights, packed=packed)[0]
    with torch.inference_mode():
        unversioned = [w.clone() for w in weights]
        assert torch.equal(call(x, *unversioned, packed=packed)[0], want)
    assert len(packings) == 1


@pytest.mark.parametrize("hx", [False, True])
def test_cells(op, packings, hx):
    ours, stock = cell_and_stock(op)
    wide = torch.randn(5, 3).t()  # no row is contiguous
    minus = torch.view_as_complex(torch.randn(3, 5, 2)).conj().imag  # the sign is not in memory
    for x in (torch.randn(3, 5), torch.randn(3, 5), wide, minus, torch.randn(5)):
        state = torch.randn(*x.shape[:-1], 7) if hx else None
        if hx and op == "lstm":
            state = (state, torch.randn(*x.shape[:-1], 7))
        same_step(ours, stock, x, state)
    assert len(packings) == 1


@pytest.fixture
def long_ways(op, monkeypatch):
    """The inputs of every cell's step that went through all checks so far."""
    name, taken = f"{op}_cell", []
    cell = getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda *a, **o: taken.append(a[0]) or cell(*a, **o))
    return taken


def cell_and_stock(op, **options):
    ours = getattr(pykernels.nn, OPS[op] + "Cell")(5, 7, **options).eval()
    stock = getattr(torch.nn, OPS[op] + "Cell")(5, 7, **options)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def same_step(ours, stock, x, state=None):
    with torch.no_grad():
        got, want = ours(x, state), stock(x, state)
    for a, b in zip(flat([got]), flat([want]), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch is too old"
)
@pytest.mark.parametrize("bias", [False, True])
def test_cells_take_the_short_way_once_packed(op, long_ways, bias):
    ours, stock = cell_and_stock(op, bias=bias)
    x = torch.randn(3, 5)
    same_step(ours, stock, x)
    assert len(long_ways) == 1  # packs
    for x in (torch.randn(3, 5), torch.randn(5), torch.randn(1, 5), torch.randn(0, 5)):
        h, c = torch.randn(2, *x.shape[:-1], 7)
        for state in (None, (h, c) if op == "lstm" else h):
            same_step(ours, stock, x, state)
    assert len(long_ways) == 1
    with torch.no_grad():
        for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
            p.mul_(1.5)
            q.mul_(1.5)
    same_step(ours, stock, x)
    assert len(long_ways) == 2


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch is too old"
)
def test_cells_take_the_long_way_where_they_must(op, long_ways):
    ours, stock = cell_and_stock(op)
    x = torch.randn(3, 5)
    same_step(ours, stock, x)
    with pykernels.use_backend("reference"):
        same_step(ours, stock, x)
    with torch.autocast("cpu"), torch.no_grad():
        assert flat([ours(x)])[0].dtype == flat([stock(x)])[0].dtype
    assert ours(x.clone().requires_grad_())[0].requires_grad
    assert len(long_ways) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_both_ways_of_a_cell_are_one_kernel(op, dtype):
    ours, _ = cell_and_stock(op, dtype=dtype)
    x, packed = torch.randn(3, 5, dtype=dtype), PackedWeights()
    states = tuple(torch.randn(2, 3, 7, dtype=dtype))[: 1 + (op == "lstm")]
    weights = tuple(ours.parameters())
    with torch.no_grad():
        long = ours(x, states if op == "lstm" else states[0])
        getattr(functional, f"{op}_cell")(x, None, *weights, packed=packed)  # packs
        short = packed.step(weights, x, states)
    assert all(map(torch.equal, short, flat([long])))


def test_cells_without_the_short_way(op, packings, monkeypatch):
    """As with a torch that does not tell C where its tensors are."""
    monkeypatch.setattr(_backends.module("cpp", op), f"{op}_step", lambda packed, weights: None)
    ours, stock = cell_and_stock(op)
    for _ in range(2):
        same_step(ours, stock, torch.randn(3, 5))
    assert len(packings) == 1


def test_a_relu_cell():
    ours, stock = cell_and_stock("rnn", nonlinearity="relu")
    for _ in range(2):
        same_step(ours, stock, torch.randn(3, 5), torch.randn(3, 7))


def test_cells_check_what_they_are_given(op):
    ours = getattr(pykernels.nn, OPS[op] + "Cell")(5, 7).eval()
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    pair = (lambda h: (h, torch.randn(3, 7))) if op == "lstm" else (lambda h: h)
    with torch.no_grad():
        ours(x, pair(h))  # packs
        for wrong in (torch.randn(3, 6), torch.randn(2, 7), torch.randn(3, 7).half()):
            with pytest.raises((TypeError, ValueError), match="hx"):
                ours(x, pair(wrong))
        with pytest.raises(TypeError, match="dtype"):
            ours(x.double(), pair(h))
        with pytest.raises(ValueError, match=r"\[3, 5\]"):
            ours(torch.randn(3, 4), pair(h))


def test_functional(op, packings):
    ours, _ = layers(op)
    weights = [p.detach() for p in ours.parameters()]
    x, packed = torch.randn(4, 3, 5), PackedWeights()
    call = getattr(functional, op)
    plain = call(x, *weights)[0]
    for _ in range(2):
        assert torch.equal(call(x, *weights, packed=packed)[0], plain)
    assert len(packings) == 1
    packed.clear()
    call(x, *weights, packed=packed)
    assert len(packings) == 2
    weights[0].requires_grad_()
    call(x, *weights, packed=packed)[0].sum().backward()
    assert weights[0].grad.abs().sum() > 0
    reference = call(x, *weights, packed=packed, backend="reference")[0]
    torch.testing.assert_close(reference.detach(), plain, rtol=1e-4, atol=1e-5)
    assert len(packings) == 2
