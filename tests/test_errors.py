"""Every bad input is refused before any kernel runs, in words that name it and the shapes."""

import pytest
import torch

from pykernels import _backends, functional


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """Choosing a backend comes after the checks; here it is a failure."""

    def reached(*args, **options):
        raise AssertionError("a backend was chosen for a bad input")

    monkeypatch.setattr(_backends, "select", reached)


def rnn_arguments(**changes):
    T, B, I, H = 4, 3, 5, 7
    made = {
        "x": torch.zeros(T, B, I),
        "w_ih": torch.zeros(H, I),
        "w_hh": torch.zeros(H, H),
        "b_ih": torch.zeros(H),
        "b_hh": torch.zeros(H),
        "h0": torch.zeros(B, H),
    }
    return made | changes


Z = torch.zeros
RNN = [
    ({"x": [1.0]}, TypeError, "rnn: `x` must be a Tensor, got list"),
    (
        {"x": Z(4, 3, 5, dtype=torch.int64)},
        TypeError,
        "rnn: `x` must have a floating-point dtype, got torch.int64",
    ),
    (
        {"x": Z(4, 3, 5, dtype=torch.complex64)},
        TypeError,
        "rnn: `x` must have a floating-point dtype, got torch.complex64",
    ),
    (
        {"x": Z(4, 3, 5).to_sparse()},
        TypeError,
        "rnn: `x` must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"x": Z(4, 5)}, ValueError, r"rnn: `x` must be \[T, B, I\], got 2 dimensions: \[4, 5\]"),
    ({"x": Z(4, 3, 6)}, ValueError, r"rnn: `w_ih` must be \[H, I\] = \[7, 6\], got \[7, 5\]"),
    ({"x": Z(4, 3, 0)}, ValueError, "rnn: `input size` must be at least 1, got 0"),
    ({"w_ih": None}, TypeError, "rnn: `w_ih` must be a Tensor, got NoneType"),
    (
        {"w_ih": Z(7, 5).double()},
        TypeError,
        "rnn: `w_ih` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ({"w_ih": Z(5, 7)}, ValueError, r"rnn: `w_ih` must be \[H, I\] = \[7, 5\], got \[5, 7\]"),
    ({"w_hh": Z(7)}, ValueError, r"rnn: `w_hh` must be \[H, H\], got 1 dimensions: \[7\]"),
    ({"w_hh": Z(7, 21)}, ValueError, r"rnn: `w_hh` must be \[H, H\] = \[7, 7\], got \[7, 21\]"),
    ({"w_hh": Z(0, 0)}, ValueError, "rnn: `hidden size` must be at least 1, got 0"),
    (
        {"w_hh": Z(7, 7).half()},
        TypeError,
        "rnn: `w_hh` must have the dtype of the input, torch.float32, got torch.float16",
    ),
    (
        {"w_hh": Z(7, 7, device="meta")},
        ValueError,
        "rnn: `w_hh` must be on the device of the input, cpu, got meta",
    ),
    ({"b_ih": Z(8)}, ValueError, r"rnn: `b_ih` must be \[H\] = \[7\], got \[8\]"),
    ({"b_hh": Z(7, 1)}, ValueError, r"rnn: `b_hh` must be \[H\] = \[7\], got \[7, 1\]"),
    (
        {"b_hh": Z(7).bfloat16()},
        TypeError,
        "rnn: `b_hh` must have the dtype of the input, torch.float32, got torch.bfloat16",
    ),
    ({"h0": Z(1, 3, 7)}, ValueError, r"rnn: `h0` must be \[B, H\] = \[3, 7\], got \[1, 3, 7\]"),
    ({"h0": Z(4, 7)}, ValueError, r"rnn: `h0` must be \[B, H\] = \[3, 7\], got \[4, 7\]"),
    (
        {"h0": Z(3, 7, device="meta")},
        ValueError,
        "rnn: `h0` must be on the device of the input, cpu, got meta",
    ),
    (
        {"h0": Z(3, 7).double()},
        TypeError,
        "rnn: `h0` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ({"h0": 0.0}, TypeError, "rnn: `h0` must be a Tensor, got float"),
    (
        {"nonlinearity": "gelu"},
        ValueError,
        "rnn: `nonlinearity` must be one of 'tanh', 'relu', got 'gelu'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), RNN, ids=[words for *_, words in RNN])
def test_rnn(changes, error, words):
    with pytest.raises(error, match=words):
        functional.rnn(**rnn_arguments(**changes))


CELL = [
    (
        {"input": Z(4, 3, 5)},
        ValueError,
        r"rnn_cell: `input` must be \[B, I\] or \[I\], got 3 dimensions: \[4, 3, 5\]",
    ),
    ({"input": 1.0}, TypeError, "rnn_cell: `input` must be a Tensor, got float"),
    (
        {"input": Z(3, 5).int()},
        TypeError,
        "rnn_cell: `input` must have a floating-point dtype, got torch.int32",
    ),
    ({"hx": Z(2, 7)}, ValueError, r"rnn_cell: `hx` must be \[B, H\] = \[3, 7\], got \[2, 7\]"),
    ({"input": Z(5)}, ValueError, r"rnn_cell: `hx` must be \[H\] = \[7\], got \[3, 7\]"),
    ({"w_ih": Z(7, 4)}, ValueError, r"rnn_cell: `w_ih` must be \[H, I\] = \[7, 5\], got \[7, 4\]"),
    ({"w_hh": Z(7, 6)}, ValueError, r"rnn_cell: `w_hh` must be \[H, H\] = \[7, 7\], got \[7, 6\]"),
    (
        {"nonlinearity": None},
        ValueError,
        "rnn_cell: `nonlinearity` must be one of 'tanh', 'relu', got None",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), CELL, ids=[words for *_, words in CELL])
def test_rnn_cell(changes, error, words):
    made = rnn_arguments()
    made = {"input": Z(3, 5), "hx": Z(3, 7)} | {
        k: made[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")
    }
    with pytest.raises(error, match=words):
        functional.rnn_cell(**made | changes)


def attention_arguments(**changes):
    made = {"q": Z(2, 4, 5, 8), "k": Z(2, 4, 6, 8), "v": Z(2, 4, 6, 8)}
    return made | changes


ATTENTION = [
    ({"q": "q"}, TypeError, "attention: `q` must be a Tensor, got str"),
    (
        {"q": Z(4, 5, 8)},
        ValueError,
        r"attention: `q` must be \[B, N, S_q, D\], got 3 dimensions: \[4, 5, 8\]",
    ),
    (
        {"k": Z(2, 4, 6, 8, 1)},
        ValueError,
        r"attention: `k` must be \[B, N_kv, S_k, D\], got 5 dimensions",
    ),
    (
        {"q": Z(2, 4, 5, 8).int()},
        TypeError,
        "attention: `k` must have the dtype of the input, torch.int32",
    ),
    (
        {"q": Z(2, 4, 5, 8).int(), "k": Z(2, 4, 6, 8).int(), "v": Z(2, 4, 6, 8).int()},
        TypeError,
        "attention: `q` must have a floating-point dtype, got torch.int32",
    ),
    (
        {"k": Z(2, 4, 6, 8).double()},
        TypeError,
        "attention: `k` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    (
        {"v": Z(2, 4, 6, 8).half()},
        TypeError,
        "attention: `v` must have the dtype of the input, torch.float32, got torch.float16",
    ),
    (
        {"v": Z(2, 4, 6, 8, device="meta")},
        ValueError,
        "attention: `v` must be on the device of the input, cpu, got meta",
    ),
    (
        {"k": Z(3, 4, 6, 8)},
        ValueError,
        r"attention: `k` must be \[B, N_kv, S_k, D\] = \[2, 4, 6, 8\], got \[3, 4, 6, 8\]",
    ),
    (
        {"k": Z(2, 4, 6, 7)},
        ValueError,
        r"attention: `k` must be \[B, N_kv, S_k, D\] = \[2, 4, 6, 8\], got \[2, 4, 6, 7\]",
    ),
    (
        {"v": Z(2, 4, 7, 8)},
        ValueError,
        r"attention: `v` must be \[B, N_kv, S_k, D_v\] = \[2, 4, 6, 8\], got \[2, 4, 7, 8\]",
    ),
    (
        {"v": Z(2, 2, 6, 8)},
        ValueError,
        r"attention: `v` must be \[B, N_kv, S_k, D_v\] = \[2, 4, 6, 8\], got \[2, 2, 6, 8\]",
    ),
    (
        {"k": Z(2, 2, 6, 8), "v": Z(2, 2, 6, 8)},
        ValueError,
        r"attention: `k` must be of N = 4 heads unless enable_gqa is True, got \[2, 2, 6, 8\]",
    ),
    (
        {"k": Z(2, 3, 6, 8), "v": Z(2, 3, 6, 8), "enable_gqa": True},
        ValueError,
        r"attention: `q` must be of a multiple of N_kv = 3 heads, got \[2, 4, 5, 8\]",
    ),
    (
        {"k": Z(2, 0, 6, 8), "v": Z(2, 0, 6, 8), "enable_gqa": True},
        ValueError,
        r"attention: `q` must be of a multiple of N_kv = 0 heads",
    ),
    (
        {"q": Z(2, 4, 5, 0), "k": Z(2, 4, 6, 0)},
        ValueError,
        "attention: `head dim D` must be at least 1, got 0",
    ),
    (
        {"attn_mask": Z(5, 5)},
        ValueError,
        r"attention: `attn_mask` must be broadcastable to .* = \[2, 4, 5, 6\], got \[5, 5\]",
    ),
    (
        {"attn_mask": Z(1, 2, 4, 5, 6)},
        ValueError,
        r"attention: `attn_mask` must be broadcastable to .*, got \[1, 2, 4, 5, 6\]",
    ),
    (
        {"attn_mask": Z(2, 5, 6)},
        ValueError,
        r"attention: `attn_mask` must be broadcastable to .*, got \[2, 5, 6\]",
    ),
    (
        {"attn_mask": Z(5, 6).int()},
        TypeError,
        "attention: `attn_mask` must have the dtype of the input, torch.float32, got torch.int32",
    ),
    (
        {"attn_mask": Z(5, 6).double()},
        TypeError,
        "attention: `attn_mask` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    (
        {"attn_mask": Z(5, 6, dtype=torch.bool, device="meta")},
        ValueError,
        "attention: `attn_mask` must be on the device of the input, cpu, got meta",
    ),
    ({"attn_mask": [[True]]}, TypeError, "attention: `attn_mask` must be a Tensor, got list"),
    ({"scale": "big"}, TypeError, "attention: `scale` must be a number, got str"),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), ATTENTION, ids=[words for *_, words in ATTENTION]
)
def test_attention(changes, error, words):
    with pytest.raises(error, match=words):
        functional.attention(**attention_arguments(**changes))


SDPA = [
    (
        {"query": None},
        TypeError,
        "scaled_dot_product_attention: `query` must be a Tensor, got NoneType",
    ),
    (
        {"query": Z(8)},
        ValueError,
        r"scaled_dot_product_attention: `query` must be \[..., S, D\], got \[8\]",
    ),
    (
        {"key": Z(2, 4, 6, 7)},
        ValueError,
        r"`key` must be \[..., S_k, D\] = \[2, 4, 6, 8\], got \[2, 4, 6, 7\]",
    ),
    (
        {"value": Z(2, 4, 7, 8)},
        ValueError,
        r"`value` must be \[..., S_k, D_v\] = \[2, 4, 6, 8\], got \[2, 4, 7, 8\]",
    ),
    (
        {"key": Z(3, 4, 6, 8)},
        ValueError,
        r"`key` must be broadcastable with query \[2, 4, 5, 8\] and value .*, got \[3, 4, 6, 8\]",
    ),
    ({"dropout_p": 1.5}, ValueError, "`dropout_p` must be between 0 and 1, got 1.5"),
    ({"dropout_p": "no"}, TypeError, "`dropout_p` must be a number, got str"),
    (
        {"key": Z(2, 3, 6, 8), "value": Z(2, 3, 6, 8), "enable_gqa": True},
        ValueError,
        "`query` must be of a multiple of the equal heads of key and value",
    ),
    (
        {"attn_mask": Z(4, 4)},
        ValueError,
        r"`attn_mask` must be broadcastable to \[..., N, S_q, S_k\]",
    ),
    (
        {"key": Z(2, 4, 6, 8).double()},
        TypeError,
        "`key` must have the dtype of the input, torch.float32, got torch.float64",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), SDPA, ids=[words for *_, words in SDPA])
def test_scaled_dot_product_attention(changes, error, words):
    made = {"query": Z(2, 4, 5, 8), "key": Z(2, 4, 6, 8), "value": Z(2, 4, 6, 8)}
    with pytest.raises(error, match=words):
        functional.scaled_dot_product_attention(**made | changes)


def test_unknown_spec_lists_the_known():
    from pykernels.testing.specs import find, with_layout

    with pytest.raises(KeyError, match=r"no spec is called 'rnn'; known: .*rnn-plain"):
        find("rnn")
    with pytest.raises(ValueError, match=r"layout must be one of contiguous, .*, got 'diagonal'"):
        with_layout(Z(2), "diagonal")
