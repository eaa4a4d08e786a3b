"""A call is checked once for all that look like it, and no other is taken for one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as stock
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pykernels import _backends, functional, use_backend
from pykernels.cpp import attention as cpp_attention
from pykernels.ops import _calls

needs_signatures = pytest.mark.skipif(
    not _calls._signer().sign((), None, ()),
    reason="a torch before 2.10 does not say where tensors are",
)


@pytest.fixture
def checks(monkeypatch):
    """The ops whose backend has been chosen, as that happens where a call is checked."""
    found, select = [], _backends.select
    monkeypatch.setattr(
        _backends, "select", lambda op, *rest: found.append(op) or select(op, *rest)
    )
    return found


def tensor(*sizes, **options):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*sizes, generator=generator, **options)


def size():
    """One that no call has had."""
    size.last += 1
    return size.last


size.last = 100

CALLS = {
    "rnn": lambda n: functional.rnn(tensor(3, 2, n), tensor(4, n), tensor(4, 4)),
    "rnn_cell": lambda n: functional.rnn_cell(tensor(2, n), None, tensor(4, n), tensor(4, 4)),
    "gru": lambda n: functional.gru(tensor(6, n), tensor(12, n), tensor(12, 4), batch_sizes=(4, 2)),
    "gru_cell": lambda n: functional.gru_cell(tensor(n), None, tensor(12, n), tensor(12, 4)),
    "lstm": lambda n: functional.lstm(tensor(3, 2, n), tensor(8, n), tensor(8, 2)),
    "lstm_cell": lambda n: functional.lstm_cell(tensor(2, n), None, tensor(16, n), tensor(16, 4)),
    "attention": lambda n: functional.attention(*[tensor(1, 2, n, 4)] * 3, window=(1, None)),
    "scaled_dot_product_attention": lambda n: functional.scaled_dot_product_attention(
        *[tensor(n, 4)] * 3, attn_mask=tensor(n)
    ),
    "attention_varlen": lambda n: functional.attention_varlen(
        *[tensor(n, 2, 4)] * 3, torch.tensor([0, 1, n])
    ),
    "attention_backward": lambda n: functional.attention_backward(
        *[tensor(1, 2, n, 4)] * 5, tensor(1, 2, n)
    ),
    "linear_cross_entropy": lambda n: functional.linear_cross_entropy(
        tensor(2, 1, n), tensor(4, n), torch.tensor([[1], [3]])
    ),
}


@needs_signatures
@pytest.mark.parametrize("run", CALLS.values(), ids=CALLS)
def test_once(run, checks):
    """The second call of a kind finds what was found of the first, and does the same."""
    n = size()
    first, second = run(n), run(n)
    assert len(checks) == 1
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    run(size())
    assert len(checks) == 2


@needs_signatures
def test_lengths_are_not_remembered(checks):
    """They come with indices of a batch's size, and seldom come back; nor do many batch sizes."""
    x, n = tensor(3, 2, size()), size()
    weights = tensor(n, x.shape[2]), tensor(n, n)
    for _ in range(2):
        functional.rnn(x, *weights, lengths=(3, 1))
    assert len(checks) == 2
    for _ in range(2):
        functional.rnn(tensor(300, x.shape[2]), *weights, batch_sizes=(1,) * 300)
    assert len(checks) == 4


@needs_signatures
@pytest.mark.parametrize("layer", [torch.nn.RNN, torch.nn.LSTM])
def test_gradients_that_come_and_go(layer, checks):
    """Which outputs have a gradient is no part of what is remembered of a call."""
    op = layer.__name__.lower()
    n = size()
    made = layer(3, n)
    weights = [w.detach().requires_grad_() for w in made.parameters()]
    x = tensor(4, 2, 3)
    for use in (
        lambda y, h: y.sum(),
        lambda y, h: h.square().sum(),
        lambda y, h: y.sum() + h.sum(),
    ):
        y, last = getattr(functional, op)(x, *weights)
        h = last[0] if op == "lstm" else last
        found = torch.autograd.grad(use(y, h), weights)
        y, last = made(x)
        h = last[0][0] if op == "lstm" else last[0]
        for mine, theirs in zip(
            found, torch.autograd.grad(use(y, h), list(made.parameters())), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    assert len(checks) == 1


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor of a class of its own."""


def attention(n, **options):
    return functional.attention(*[tensor(1, 2, n, 4)] * 3, **options)


AROUND = {
    "dual level": forward_ad.dual_level,
    "dispatch mode": Watched,
    "another backend": lambda: use_backend("reference"),
}


@needs_signatures
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_looks_on_is_seen(around, checks):
    """A call is checked anew where something looks on, or asks for another backend."""
    n = size()
    attention(n)
    with around():
        attention(n)
    assert len(checks) == 2
    attention(n)
    assert len(checks) == 2


@needs_signatures
def test_under_autocast(checks):
    """One that casts nothing is one call to all calls of its dtype."""
    n = size()
    with torch.autocast("cpu"):
        found = [attention(n) for _ in range(2)]
    found.append(attention(n))
    assert len(checks) == 1
    assert all(torch.equal(out, found[0]) for out in found)
    x, w, target = tensor(3, n).bfloat16(), tensor(5, n).bfloat16(), torch.arange(3)
    weights = torch.ones(5)
    for _ in range(2):  # where x's own dtype is no longer that of the loss, so may weights' be
        with pytest.raises(TypeError, match="`class_weight` "):
            functional.linear_cross_entropy(x, w, target, class_weight=weights)
        with torch.autocast("cpu"):
            loss = functional.linear_cross_entropy(x, w, target, class_weight=weights)
        assert loss.dtype == torch.float32


@needs_signatures
def test_a_trace_is_seen(checks):
    """Sizes are tensors of its own there."""
    n = size()
    traced = torch.jit.trace(attention_of_one, tensor(1, 2, n, 4), check_trace=False)
    assert traced(tensor(1, 2, n, 4)).shape == (1, 2, n, 4)
    assert len(checks) == 1
    attention_of_one(tensor(1, 2, n, 4))
    assert len(checks) == 2


def attention_of_one(x):
    return functional.attention(x, x, x)


@needs_signatures
def test_a_transform_is_seen(checks):
    n = size()
    attention(n)
    torch.func.vmap(lambda x: functional.attention(x, x, x))(tensor(2, 1, 2, n, 4))
    assert len(checks) == 2


@needs_signatures
@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.double,
        lambda t: t.transpose(2, 3).contiguous(),
        lambda t: t.as_subclass(Own),
        lambda t: t.clone().requires_grad_(),
    ],
    ids=["dtype", "shape", "class", "requires_grad"],
)
def test_other_tensors_are_checked(change, checks):
    q = tensor(1, 2, size(), 4)
    functional.attention(q, q, q)
    functional.attention(*[change(q)] * 3)
    assert len(checks) == 2


@needs_signatures
def test_strides_and_parameters_are_the_same_call(checks):
    """Checks do not hang on them; the memory is found anew in every call."""
    n = size()
    q = tensor(1, 2, n, 4)
    lying = tensor(1, 2, 4, n).transpose(2, 3).copy_(q)
    with torch.no_grad():
        found = [functional.attention(t, t, t) for t in (q, lying)]
        functional.attention(*[torch.nn.Parameter(q, requires_grad=False)] * 3)
    assert len(checks) == 1
    assert torch.equal(*found)


@needs_signatures
def test_with_a_record_and_without(checks):
    """The grad mode and what requires a gradient say whether autograd records a call."""
    q = tensor(1, 2, size(), 4, requires_grad=True)
    for _ in range(2):
        for mode, recorded in ((torch.no_grad, False), (torch.enable_grad, True)):
            with mode():
                assert functional.attention(q, q, q).requires_grad == recorded
        assert not functional.attention(*[q.detach()] * 3).requires_grad
    assert len(checks) == 3


LOOKALIKES = [
    ({"softcap": 0.0}, {"softcap": False}, TypeError, "`softcap` must be a number, got bool"),
    ({"scale": 1}, {"scale": True}, TypeError, "`scale` must be a number, got bool"),
    ({"dropout_p": 0}, {"dropout_p": False}, TypeError, "`dropout_p` must be a number, got bool"),
    ({"window": (1, 0)}, {"window": (True, 0)}, TypeError, "`window` must be of integers or None"),
    ({"window": (1, 0)}, {"window": (1.0, 0)}, TypeError, "`window` must be of integers or None"),
    (
        {"causal_alignment": "top-left"},
        {"causal_alignment": "top-left\ud800"},
        ValueError,
        "`causal_alignment` must be one of",
    ),
    (
        {"alibi_slopes": tensor(2)},
        {"alibi_slopes": tensor(2, requires_grad=True)},
        ValueError,
        "`alibi_slopes` must be without a gradient",
    ),
]


@pytest.mark.parametrize(
    ("good", "bad", "error", "words"), LOOKALIKES, ids=[words for *_, words in LOOKALIKES]
)
def test_what_looks_alike_to_python_alone(good, bad, error, words):
    """True equals 1 in Python; a call that has passed lets no such other pass."""
    n = size()
    attention(n, **good)
    for _ in range(2):  # nor is a bad call remembered
        with pytest.raises(error, match=words):
            attention(n, **bad)
    attention(n, **good)


@needs_signatures
@pytest.mark.parametrize("kind", ["sparse", "nested", "meta", "class", "list", "huge number"])
def test_out_of_the_ordinary(kind):
    """Of such a call nothing is known."""
    made = {
        "sparse": torch.ones(2, 3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": torch.ones(2, device="meta"),
        "class": torch.ones(2).as_subclass(Own),
    }
    option = {"list": [1, 2], "huge number": 2**80}.get(kind, 1)
    sign = _calls._signer().sign
    assert not sign((made.get(kind), None), None, (option,))
    assert sign((torch.ones(2), None), None, (1, 0.5, "a", None, (1, (True,))))


@needs_signatures
def test_signatures_tell_calls_apart():
    """No two ways to put the same bytes together."""
    a, b = torch.ones(2), torch.ones(2, 1)
    calls = [
        ((), ()),
        ((None,), ()),
        ((), (None,)),
        *(((t,), ()) for t in (a, b, a.double(), a.long(), a.bool(), a.to(torch.uint8), a.half())),
        ((a, a), ()),
        *(((), (option,)) for option in (0, 0.0, -0.0, False, "", "0", (), (0,), ((),), (0, 0))),
        ((), ("a", "b")),
        ((), ("ab", "")),
    ]
    sign = _calls._signer().sign
    found = {sign(tensors, None, options) for tensors, options in calls}
    found |= {sign((), "cpp", ()), sign((), "triton", ()), sign((), 1, ())}
    assert len(found) == len(calls) + 3
    with use_backend("cpp"):
        assert sign((), None, ()) == sign((), "cpp", ())


def test_what_a_transform_has_left():
    """A tensor that got out of a transform is taken for the one it wraps, recorded or not."""
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(tensor(1, 2, 5, 4))
    x = kept[0]
    expected = stock.scaled_dot_product_attention(*[tensor(1, 2, 5, 4)] * 3)
    torch.testing.assert_close(functional.attention(x, x, x), expected)
    q = tensor(1, 2, 5, 4).requires_grad_()
    out = functional.attention(q, x, x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert q.grad.any()


@needs_signatures
def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    """Sizes that never repeat push out what they find, and calls go on being right."""
    monkeypatch.setattr(_calls, "CAPACITY", 2)
    checked = []

    @_calls.once
    def check(tensors, backend, number):
        checked.append(number)
        return Found()

    class Found:
        def unseen(self, is_recorded):
            return self

    for number in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        check((), None, number)
    assert checked == [1, 2, 3, 2]  # what was asked for last stays


def test_without_signatures(monkeypatch):
    """A torch before 2.10, or no C++ kernels: every call is checked."""
    monkeypatch.setattr(_calls, "_signer", lambda: _calls.NO_SIGNATURES)
    n = size()
    for run in CALLS.values():
        torch.testing.assert_close(run(n), run(n), rtol=0, atol=0)


def test_tensors_that_dispatch_by_themselves():
    """They see the operator, as in the modes that made them: they have no memory to read."""
    with FakeTensorMode():
        fake = tensor(1, 2, 5, 4)
    plain = tensor(1, 2, 5, 4)
    assert isinstance(functional.attention(fake, fake, fake), FakeTensor)
    assert functional.attention(*[fake.clone().requires_grad_()] * 3).requires_grad
    pair = TwoTensor(plain, -plain)
    found = functional.attention(pair, pair, pair)
    for one, t in ((found.a, plain), (found.b, -plain)):
        torch.testing.assert_close(one, functional.attention(t, t, t), rtol=0, atol=0)


def test_memory_that_is_not_there():
    """As where weights are gathered for a layer and given back."""
    q = tensor(1, 2, 5, 4)
    gone = torch.empty_like(q)
    gone.untyped_storage().resize_(0)
    for recorded in (False, True):
        given = q.clone().requires_grad_(recorded)
        with pytest.raises(ValueError, match=r"of a tensor of shape \[1, 2, 5, 4\] is not there"):
            functional.attention(given, q, gone, backend="cpp")


def test_zeros_that_torch_keeps_to_itself():
    q = tensor(1, 2, 5, 4).requires_grad_()
    out = functional.attention(q, q, q, backend="cpp")
    zeros = torch._efficientzerotensor(out.shape)
    assert (torch.autograd.grad(out, q, zeros)[0] == 0).all()


@needs_signatures
def test_a_plan_is_of_so_many_tensors():
    q = tensor(1, 2, 5, 4)
    given = (q, q, q, None, None, None, None)
    options = {"band": (None, None), "scale": 1.0, "keep": False}
    planned = cpp_attention.attention_fwd_pass(*given, **options)
    with pytest.raises(ValueError, match="more tensors than planned"):
        planned.run((*given, q))


@needs_signatures
@pytest.mark.parametrize("recorded", [False, True], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize("op", ["attention", "rnn_cell", "gru_cell", "lstm_cell"])
def test_what_the_caller_takes_not_is_not_made(op, recorded, monkeypatch):
    """Nor does its absence change what the caller does take."""
    made, outputs = [], _calls._Unseen.outputs
    monkeypatch.setattr(
        _calls._Unseen, "outputs", lambda *a, **k: made.append(outputs(*a, **k)) or made[-1]
    )
    n = size()
    if op == "attention":
        tensors = [tensor(1, 2, n, 4).requires_grad_(recorded) for _ in range(3)]
        out, _ = functional.attention(*tensors, return_lse=True)
        assert all(t is not None for t in made[-1])
        found = functional.attention(*tensors)
        torch.testing.assert_close(found, out, rtol=0, atol=0)
    else:
        rows = {"rnn_cell": 4, "gru_cell": 12, "lstm_cell": 16}[op]
        weights = [t.requires_grad_(recorded) for t in (tensor(rows, n), tensor(rows, 4))]
        getattr(functional, op)(tensor(2, n), None, *weights)
    assert made[-1][1] is None
    assert all(t is not None for t in (made[-1][0], *made[-1][2:]))
