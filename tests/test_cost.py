"""The counts of `pykernels.cost` against hand counts, and against the shapes of real tensors."""

import doctest
import math

import pytest
import torch

from pykernels import __main__ as about
from pykernels import cost


def test_recurrence_of_fifty_steps():
    """T = 50 steps of d = 300 inputs into h = 512 units: T (h^2 + h d)."""
    count = cost.rnn(T=50, B=1, I=300, H=512)
    assert count.multiply_adds == 50 * (512 * 512 + 512 * 300) == 20_787_200
    assert count.flops == 2 * 20_787_200


def test_language_model_of_thirty_thousand_words():
    """The same with V = 30,000 words: h^2 + h d + V h weights, T of that forward, 2 T backward."""
    sizes = {"T": 50, "B": 1, "V": 30_000, "d": 300, "h": 512}
    parts = cost.recurrent_language_model("rnn", **sizes, bias=False)
    assert parts["recurrence"].multiply_adds == 20_787_200
    own = parts["recurrence"] + parts["output"]
    assert own.parameters == 512 * 512 + 512 * 300 + 30_000 * 512 == 15_775_744
    assert parts["embedding"].parameters == 30_000 * 300
    forward = cost.total(parts.values())
    assert forward.multiply_adds == 50 * 15_775_744
    backward = cost.recurrent_language_model("rnn", **sizes, bias=False, which="backward")
    assert cost.total(backward.values()).multiply_adds == 2 * forward.multiply_adds
    assert parts["output"].multiply_adds / forward.multiply_adds == pytest.approx(0.974, abs=5e-4)


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


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("rnn", {"num_layers": 3}),
        ("gru", {"num_layers": 2, "bidirectional": True, "bias": False}),
        ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ],
)
def test_layers_are_those_of_torch(op, options):
    """Parameters by torch's own tensors; products by the shapes of its matrices, one a step."""
    layers = getattr(torch.nn, op.upper())(7, 5, **options)
    count = cost.recurrent_layers(op, T=4, B=2, I=7, H=5, **options)
    assert count.parameters == sum(p.numel() for p in layers.parameters())
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert count.multiply_adds == 4 * 2 * matrices


def test_refusals_of_layers():
    with pytest.raises(ValueError, match="`op` must be one of rnn, gru, lstm, got 'elman'"):
        cost.recurrent_layers("elman", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="`proj_size` is for lstm alone, got 2 for gru"):
        cost.recurrent_layers("gru", 1, 1, 1, 4, proj_size=2)
    with pytest.raises(ValueError, match="E must be a multiple of the heads N, got 9 and 2"):
        cost.multihead_attention(1, 1, 1, 9, 2)
    with pytest.raises(ValueError, match="tied weights need d = h, got 3 and 4"):
        cost.recurrent_language_model("rnn", 1, 1, 9, 3, 4, tied=True)


@pytest.mark.parametrize("bias", [True, False])
def test_block_is_that_of_torch(bias):
    """Every matrix meets every row once; the rest is Q K^T and P V."""
    B, T, E, N, F = 2, 6, 8, 4, 20
    block = torch.nn.TransformerEncoderLayer(E, N, F, bias=bias)
    norms = 2 * 2 * E  # torch drops their biases too
    matrices = [p.numel() for p in block.parameters() if p.dim() == 2]
    biases = sum(p.numel() for n, p in block.named_parameters() if p.dim() == 1 and "norm" not in n)
    count = cost.transformer_block(B, T, E, N, F, bias=bias)
    assert count.parameters == sum(matrices) + biases + norms
    assert count.multiply_adds == B * T * sum(matrices) + 2 * B * T * T * E
    causal = cost.transformer_block(B, T, E, N, F, bias=bias, is_causal=True)
    assert count.multiply_adds - causal.multiply_adds == 2 * B * E * (T * T - T * (T + 1) // 2)


def test_bytes_of_linear_embedding_and_norm():
    rows, I, O = 6, 5, 3
    x, y = torch.empty(rows, I), torch.empty(rows, O)
    layer = torch.nn.Linear(I, O)
    parameters = [layer.weight, layer.bias]
    assert cost.linear(rows, I, O).bytes == nbytes(x, *parameters, y)
    backward = cost.linear(rows, I, O, which="backward")
    assert backward.bytes == nbytes(x, layer.weight, y) + nbytes(x, *parameters)
    tokens, table, vectors = torch.empty(rows, dtype=torch.int64), torch.empty(9, I), x
    assert cost.embedding(rows, 9, I).bytes == nbytes(tokens, vectors, vectors)
    assert cost.embedding(rows, 9, I, which="backward").bytes == nbytes(tokens, vectors, table)
    norm = torch.nn.LayerNorm(I)
    assert cost.layer_norm(rows, I).bytes == nbytes(x, x, norm.weight, norm.bias)
    backward = cost.layer_norm(rows, I, which="backward")
    assert backward.bytes == nbytes(x, x, norm.weight) + nbytes(x, norm.weight, norm.bias)


def test_models_add_up_their_parts():
    sizes = {"T": 5, "B": 2, "V": 40, "num_layers": 2}
    parts = cost.recurrent_language_model("lstm", **sizes, d=6, h=6)
    whole = cost.total(parts.values())
    assert whole.multiply_adds == sum(part.multiply_adds for part in parts.values())
    assert whole.bytes == sum(part.bytes for part in parts.values())
    tied = cost.recurrent_language_model("lstm", **sizes, d=6, h=6, tied=True)
    assert whole.parameters - cost.total(tied.values()).parameters == 40 * 6
    assert cost.total(tied.values()).multiply_adds == whole.multiply_adds
    blocks = cost.transformer_language_model(**sizes, E=8, N=2, F=16)["blocks"]
    one = cost.transformer_block(2, 5, 8, 2, 16, is_causal=True)
    assert blocks.multiply_adds == 2 * one.multiply_adds
    assert blocks.parameters == 2 * one.parameters + 16
    with pytest.raises(TypeError):
        whole + 1


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


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (3, 1), (None, 2), (4, None), (100, 100)])
@pytest.mark.parametrize(("S_q", "S_k"), [(1, 1), (5, 9), (9, 5), (7, 7), (3, 0)])
def test_windows_count_only_visible_pairs(S_q, S_k, window, is_causal):
    left, right = window
    visible = sum(
        (left is None or j >= i - left)
        and (right is None or j <= i + right)
        and (not is_causal or j <= i)
        for i in range(S_q)
        for j in range(S_k)
    )
    assert cost.visible_pairs(S_q, S_k, is_causal=is_causal, window=window) == visible
    counted = cost.attention(1, 1, S_q, S_k, 2, is_causal=is_causal, window=window)
    assert counted.multiply_adds == 4 * visible


def test_every_op_is_counted():
    assert all(callable(getattr(cost, op)) for op in about._OPS)


@pytest.mark.parametrize("which", cost.PASSES)
def test_packed_sequences_cost_what_they_cost_alone(which):
    rest = {"N": 4, "D": 8, "N_kv": 2, "is_causal": True, "window": (2, None), "which": which}
    packed = cost.attention_varlen([5, 0, 3], [7, 2, 3], **rest)
    alone = [cost.attention(1, S_q=q, S_k=k, **rest) for q, k in ((5, 7), (0, 2), (3, 3))]
    assert packed == cost.total(alone)
    assert cost.attention_varlen([5] * 3, [7] * 3, **rest) == cost.attention(
        3, S_q=5, S_k=7, **rest
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_that_of_its_tensors(dtype, bias):
    """The logits forward, dx and dW backward; bytes of the tensors read and written."""
    N, H, V = 6, 5, 9
    layer = torch.nn.Linear(H, V, bias=bias, dtype=dtype)
    x, target, loss = torch.empty(N, H, dtype=dtype), torch.empty(N).long(), layer.weight[0, 0]
    sizes = {"N": N, "H": H, "V": V, "bias": bias, "itemsize": x.element_size()}
    forward = cost.linear_cross_entropy(**sizes)
    assert forward.multiply_adds == N * H * V
    assert forward.parameters == sum(p.numel() for p in layer.parameters())
    assert forward.bytes == nbytes(x, *layer.parameters(), target, loss)
    backward = cost.linear_cross_entropy(**sizes, which="backward")
    assert backward.multiply_adds == 2 * N * H * V
    read, written = [x, *layer.parameters(), target, loss], [x, *layer.parameters()]
    assert backward.bytes == nbytes(*read, *written)


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
        (cost.linear_cross_entropy, {"N": 4, "H": 3, "V": 7}),
        (cost.linear, {"rows": 4, "I": 3, "O": 2}),
        (cost.embedding, {"rows": 4, "V": 9, "D": 3}),
        (cost.layer_norm, {"rows": 4, "D": 3}),
        (cost.transformer_block, {"B": 2, "T": 3, "E": 4, "N": 2, "F": 8}),
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
    call = cost.Cost(multiply_adds=50, bytes=10, parameters=0)
    assert call.floor(cost.Machine(flop_rate=50, byte_rate=10)) == 2
    assert call.floor(cost.Machine(flop_rate=50)) == 2
    assert call.floor(cost.Machine(flop_rate=1000, byte_rate=10)) == 1


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)
