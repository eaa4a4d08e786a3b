"""Results of C++ passes are made past torch's dispatcher, unless torch is to fill them.

It is in every other test (`conftest.poison`), so here alone the quick way runs.
"""

import pytest
import torch

from pykernels import cpp, functional, nn

quick, is_filled = cpp.ALLOCATOR
pytestmark = pytest.mark.skipif(quick is None, reason="this torch has no quick way")


@pytest.fixture
def made(monkeypatch):
    """What the quick way is asked for."""
    asked = []

    def spy(*how):
        asked.append(how)
        return quick(*how)

    monkeypatch.setattr(cpp, "ALLOCATOR", (spy, is_filled))
    return asked


def lengthy(op, n):
    """Tensors of a call, of which one has a size that no other test has; and the call."""

    def t(*sizes):
        return torch.randn(*sizes, requires_grad=op != "attention_backward")

    if op in ("rnn", "gru", "lstm"):
        rows = {"rnn": 2, "gru": 6, "lstm": 8}[op]
        return (t(3, 2, n), t(rows, n), t(rows, 2), t(rows), t(rows)), getattr(functional, op)
    if op == "attention":
        call = lambda *qkv: functional.attention(*qkv, is_causal=True, return_lse=True)  # noqa: E731
        return (t(1, 2, n, 4), t(1, 2, n, 4), t(1, 2, n, 6)), call
    if op == "attention_backward":
        call = functional.attention_backward
        return (*(t(1, 2, n, 4) for _ in range(5)), t(1, 2, n)), call
    if op == "attention_varlen":
        starts = torch.tensor([0, 2, n - 1])
        call = lambda *qkv: functional.attention_varlen(*qkv, starts, return_lse=True)  # noqa: E731
        return (t(n, 2, 4), t(n, 2, 4), t(n, 2, 4)), call
    target = torch.arange(4)
    call = lambda x, w, b: functional.linear_cross_entropy(  # noqa: E731
        x, w, target, b, return_argmax=True
    )
    return (t(4, n), t(9, n), t(9)), call


def flat(found):
    """All tensors of a result."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for each in found if each is not None for t in flat(each)]


def results(tensors, call):
    """The outputs and all gradients."""
    out = flat(call(*tensors))
    ours = [t for t in out if t.requires_grad]
    if not ours:
        return out
    return [*out, *torch.autograd.grad(ours, tensors, [torch.full_like(t, 0.5) for t in ours])]


def assert_alike(found, expected):
    """The same bits, laid out in the same way."""
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
        assert (one.stride(), one.dtype) == (two.stride(), two.dtype)


OPS = ("rnn", "gru", "lstm", "attention", "attention_backward", "attention_varlen")
OPS += ("linear_cross_entropy",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_is_as_torchs(op, dtype, made):
    tensors, call = lengthy(op, 37 if dtype == torch.float32 else 41)
    wide = {2: torch.float32} if op == "attention_backward" else {}
    tensors = tuple(
        t.detach().to(wide.get(len(t.shape) - 1, dtype)).requires_grad_(t.requires_grad)
        for t in tensors
    )
    expected = results(tensors, call)
    assert not made
    torch.use_deterministic_algorithms(False)
    found = results(tensors, call)
    assert len(made) > len(flat(call(*tensors))) / 2
    assert_alike(found, expected)


@pytest.mark.parametrize("sizes", [(3, 5), (5,), (0, 5)])
@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell])
@torch.no_grad()
def test_a_step_on_packed_weights(cell, sizes, made):
    layer, x = cell(5, 7).eval(), torch.randn(sizes)
    expected = [flat(layer(x)) for _ in range(2)]
    assert not made
    torch.use_deterministic_algorithms(False)
    found = flat(layer(x))
    assert len(made) == (2 if cell is nn.LSTMCell else 1)
    assert_alike(found, expected[1])


def test_a_torch_without_it(monkeypatch):
    monkeypatch.setattr(cpp, "ALLOCATOR", (None, is_filled))
    torch.use_deterministic_algorithms(False)
    x, w_ih, w_hh = torch.randn(3, 2, 43), torch.randn(8, 43), torch.randn(8, 2)
    found = functional.lstm(x, w_ih, w_hh)
    expected = functional.lstm(x, w_ih, w_hh, backend="reference")
    torch.testing.assert_close(flat(found), flat(expected))
