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
def test_rnn_parameters_are_those_of_the_layer(bias):
    layer = torch.nn.RNN(300, 512, bias=bias)
    count = cost.rnn(T=3, B=2, I=300, H=512, bias=bias)
    assert count.parameters == sum(p.numel() for p in layer.parameters())


def test_rnn_bytes_are_the_tensors_read_and_written():
    T, B, I, H = 5, 3, 7, 4
    x, y, h = torch.empty(T, B, I), torch.empty(T, B, H), torch.empty(B, H)
    weights = list(torch.nn.RNN(I, H).parameters())
    read, written = [x, h, *weights], [y, h]
    assert cost.rnn(T, B, I, H, initial_state=True).bytes == nbytes(*read, *written)
    read, written = [x, h, *weights, y, y, h], [x, h, *weights]
    backward = cost.rnn(T, B, I, H, initial_state=True, which="backward")
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
