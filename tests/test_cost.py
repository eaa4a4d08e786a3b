"""The counts of `pykernels.cost` against hand counts, and against the shapes of real tensors."""

import doctest
import math

import pytest
import torch

from pykernels import cost


def test_recurrence_of_fifty_steps():
    """T = 50 steps of d = 300 inputs into h = 512 units: T (h^2 + h d)."""
    count = cost.rnn(T=50, B=1, I=300, H=512)
    assert count.multiply_adds == 50 * (512 * 512 + 512 * 300) == 20_787_200
    assert count.flops == 2 * 20_787_200


def test_docstring_examples():
    assert doctest.testmod(cost).failed == 0


def test_rnn_is_linear_in_steps_and_batch():
    one = cost.rnn(T=1, B=1, I=7, H=5).multiply_adds
    assert cost.rnn(T=6, B=4, I=7, H=5).multiply_adds == 6 * 4 * one


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", ["rnn", "gru", "lstm"])
def test_recurrent_parameters_are_those_of_the_layer(op, bias):
    layer = getattr(torch.nn, op.upper())(300, 512, bias=bias)
    count = getattr(cost, op)(T=3, B=2, I=300, H=512, bias=bias)
    assert count.parameters == sum(p.numel() for p in layer.parameters())


def test_projected_parameters_are_those_of_the_layer():
    layer = torch.nn.LSTM(30, 50, proj_size=20)
    count = cost.lstm(T=3, B=2, I=30, H=50, proj_size=20)
    assert count.parameters == sum(p.numel() for p in layer.parameters())


def test_recurrent_products():
    """By hand: three and four gates; W_hh reads and W_hr writes the projected state."""
    sizes = {"T": 50, "B": 32, "I": 300, "H": 512}
    assert cost.gru(**sizes).multiply_adds == 3 * 32 * 20_787_200
    assert cost.lstm(**sizes).multiply_adds == 4 * 32 * 20_787_200
    a_step = 4 * 512 * 300 + 4 * 512 * 128 + 512 * 128
    assert cost.lstm(**sizes, proj_size=128).multiply_adds == 50 * 32 * a_step
    assert cost.lstm(**sizes, which="backward").flops == 2 * cost.lstm(**sizes).flops


@pytest.mark.parametrize("op", [cost.rnn, cost.gru, cost.lstm])
def test_ragged_batch_counts_its_own_steps(op):
    sizes = {"I": 7, "H": 5, "which": "forward+backward"}
    ragged = op(T=6, B=3, lengths=[6, 1, 2], **sizes)
    assert ragged.multiply_adds == op(T=9, B=1, **sizes).multiply_adds
    assert ragged.bytes < op(T=6, B=3, **sizes).bytes
    assert op(T=6, B=3, lengths=[6, 6, 6], **sizes) == op(T=6, B=3, **sizes)
    for wrong in ([6, 1], [6, 1, 7]):
        with pytest.raises(ValueError, match="`lengths` must be 3 numbers from 0 to 6"):
            op(T=6, B=3, lengths=wrong, **sizes)


@pytest.mark.parametrize(
    ("op", "extra"), [("rnn", {}), ("gru", {}), ("lstm", {}), ("lstm", {"proj_size": 2})]
)
def test_recurrent_bytes_are_the_tensors_read_and_written(op, extra):
    T, B, I, H = 5, 3, 7, 4
    R = extra.get("proj_size", H)
    count, layer = getattr(cost, op), getattr(torch.nn, op.upper())(I, H, **extra)
    x, y, weights = torch.empty(T, B, I), torch.empty(T, B, R), list(layer.parameters())
    states = [torch.empty(B, R)] + ([torch.empty(B, H)] if op == "lstm" else [])
    read, written = [x, *states, *weights], [y, *states]
    assert count(T, B, I, H, initial_state=True, **extra).bytes == nbytes(*read, *written)
    read, written = [x, *states, *weights, y, y, *states], [x, *states, *weights]
    backward = count(T, B, I, H, initial_state=True, which="backward", **extra)
    assert backward.bytes == nbytes(*read, *written)


@pytest.mark.parametrize(
    ("itemsize", "dtype"), [(2, torch.bfloat16), (4, torch.float32), (8, torch.float64)]
)
def test_attention_bytes_are_the_tensors_read_and_written(itemsize, dtype):
    B, N, N_kv, S_q, S_k, D, D_v = 2, 4, 2, 3, 5, 8, 6
    q, out = torch.empty(B, N, S_q, D, dtype=dtype), torch.empty(B, N, S_q, D_v, dtype=dtype)
    k, v = torch.empty(B, N_kv, S_k, D, dtype=dtype), torch.empty(B, N_kv, S_k, D_v, dtype=dtype)
    lse = torch.empty(B, N, S_q, dtype=torch.promote_types(dtype, torch.float32))
    sizes = {"D_v": D_v, "N_kv": N_kv, "itemsize": itemsize}
    forward = cost.attention(B, N, S_q, S_k, D, **sizes)
    assert forward.bytes == nbytes(q, k, v, out, lse)
    backward = cost.attention(B, N, S_q, S_k, D, **sizes, which="backward")
    assert backward.bytes == nbytes(q, k, v, out, lse, out) + nbytes(q, k, v)


@pytest.mark.parametrize(("S_q", "S_k"), [(1, 1), (5, 5), (3, 7), (7, 3), (4, 0), (0, 4)])
def test_causal_counts_only_visible_pairs(S_q, S_k):
    visible = torch.ones(S_q, S_k).tril().sum().item()
    assert cost.visible_pairs(S_q, S_k, is_causal=True) == visible
    assert cost.visible_pairs(S_q, S_k) == S_q * S_k


def test_attention_products():
    """Q K^T and P V forward; Q K^T again, dP, dQ, dK, dV backward: 2.5 times as many."""
    sizes = {"B": 1, "N": 8, "S_q": 2048, "S_k": 2048, "D": 64}
    forward = cost.attention(**sizes)
    assert forward.flops == 4 * 8 * 2048**2 * 64
    assert cost.attention(**sizes, which="backward").flops == 2.5 * forward.flops
    assert cost.attention(**sizes, D_v=32).multiply_adds == 8 * 2048**2 * (64 + 32)
    assert cost.attention(**sizes, N_kv=2).flops == forward.flops


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        (cost.rnn, {"T": 5, "B": 4, "I": 3, "H": 2}),
        (cost.gru, {"T": 5, "B": 4, "I": 3, "H": 2}),
        (cost.lstm, {"T": 5, "B": 4, "I": 3, "H": 2, "proj_size": 1}),
        (cost.attention, {"B": 1, "N": 2, "S_q": 3, "S_k": 4, "D": 5}),
    ],
)
def test_passes_add_up(op, sizes):
    forward, backward, both = (op(**sizes, which=which) for which in cost.PASSES)
    assert both.multiply_adds == forward.multiply_adds + backward.multiply_adds
    assert both.bytes == forward.bytes + backward.bytes
    assert both.parameters == forward.parameters
    with pytest.raises(ValueError, match="`which` must be one of forward, backward"):
        op(**sizes, which="sideways")


def test_floor_is_the_slower_of_arithmetic_and_traffic():
    assert cost.floor_seconds(100, 10, flop_rate=50, byte_rate=10) == 2
    assert cost.floor_seconds(100, 10, flop_rate=1000, byte_rate=10) == 1
    assert cost.floor_seconds(100, 10, flop_rate=50, byte_rate=math.inf) == 2
    with pytest.raises(ValueError, match="rates must be positive"):
        cost.floor_seconds(1, 1, 0, 1)


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)
