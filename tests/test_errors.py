"""Every bad input is refused before any kernel runs, in words that name it and the shapes."""

import re

import pytest
import torch

from pykernels import _backends, functional


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """Choosing a backend comes after the checks; here it is a failure."""

    def reached(*args, **options):
        raise AssertionError("a backend was chosen for a bad input")

    monkeypatch.setattr(_backends, "select", reached)


GATES = {"rnn": 1, "gru": 3, "lstm": 4}
Z = torch.zeros


def arguments(op, rows=False, **changes):
    """Right ones, but for the changes."""
    T, B, I, H, G = 4, 3, 5, 7, GATES[op]
    made = {
        "x": Z(6, I) if rows else Z(T, B, I),
        "w_ih": Z(G * H, I),
        "w_hh": Z(G * H, H),
        "b_ih": Z(G * H),
        "b_hh": Z(G * H),
        "h0": Z(B, H),
    }
    if op == "lstm":
        made["c0"] = Z(B, H)
    if rows:
        made["batch_sizes"] = [3, 2, 1]
    return made | changes


# Of all three ops; {G}H stands for the rows of the weights, {n} for their number.
RECURRENT = [
    ({"x": [1.0]}, TypeError, "`x` must be a Tensor, got list"),
    (
        {"x": Z(4, 3, 5, dtype=torch.int64)},
        TypeError,
        "`x` must have a floating-point dtype, got torch.int64",
    ),
    (
        {"x": Z(4, 3, 5, dtype=torch.complex64)},
        TypeError,
        "`x` must have a floating-point dtype, got torch.complex64",
    ),
    (
        {"x": Z(4, 3, 5).to_sparse()},
        TypeError,
        "`x` must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"x": Z(4, 5)}, ValueError, "`x` must be [T, B, I], got 2 dimensions: [4, 5]"),
    ({"x": Z(4, 3, 6)}, ValueError, "`w_ih` must be [{G}H, I] = [{n}, 6], got [{n}, 5]"),
    ({"x": Z(4, 3, 0)}, ValueError, "`input size` must be at least 1, got 0"),
    ({"w_ih": None}, TypeError, "`w_ih` must be a Tensor, got NoneType"),
    ({"w_hh": None}, TypeError, "`w_hh` must be a Tensor, got NoneType"),
    ({"w_hh": Z(7, 7).to_sparse()}, TypeError, "`w_hh` must be a dense tensor, got layout"),
    (
        {"w_ih": Z(7, 5).double()},
        TypeError,
        "`w_ih` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ({"w_ih": Z(5, 7)}, ValueError, "`w_ih` must be [{G}H, I] = [{n}, 5], got [5, 7]"),
    ({"w_hh": Z(7)}, ValueError, "`w_hh` must be [{G}H, H], got 1 dimensions: [7]"),
    ({"w_hh": Z(0, 0)}, ValueError, "`hidden size` must be at least 1, got 0"),
    (
        {"w_hh": Z(7, 7).half()},
        TypeError,
        "`w_hh` must have the dtype of the input, torch.float32, got torch.float16",
    ),
    (
        {"w_hh": Z(7, 7, device="meta")},
        ValueError,
        "`w_hh` must be on the device of the input, cpu, got meta",
    ),
    ({"b_ih": Z(8)}, ValueError, "`b_ih` must be [{G}H] = [{n}], got [8]"),
    ({"b_hh": Z(7, 1)}, ValueError, "`b_hh` must be [{G}H] = [{n}], got [7, 1]"),
    (
        {"b_hh": Z(7).bfloat16()},
        TypeError,
        "`b_hh` must have the dtype of the input, torch.float32, got torch.bfloat16",
    ),
    ({"h0": Z(1, 3, 7)}, ValueError, "`h0` must be [B, H] = [3, 7], got [1, 3, 7]"),
    ({"h0": Z(4, 7)}, ValueError, "`h0` must be [B, H] = [3, 7], got [4, 7]"),
    (
        {"h0": Z(3, 7, device="meta")},
        ValueError,
        "`h0` must be on the device of the input, cpu, got meta",
    ),
    (
        {"h0": Z(3, 7).double()},
        TypeError,
        "`h0` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ({"h0": 0.0}, TypeError, "`h0` must be a Tensor, got float"),
    ({"reverse": 1}, TypeError, "`reverse` must be True or False, got int"),
    ({"packed": {}}, TypeError, "`packed` must be a PackedWeights, got dict"),
    # --- lengths
    ({"lengths": 4}, TypeError, "`lengths` must be a Tensor or list, got int"),
    ({"lengths": [4.0, 2, 1]}, TypeError, "`lengths` must hold integers alone: 'float' object"),
    (
        {"lengths": torch.tensor([4, 2, 1], dtype=torch.int32)},
        TypeError,
        "`lengths` must have dtype torch.int64, got torch.int32",
    ),
    ({"lengths": Z(3)}, TypeError, "`lengths` must have dtype torch.int64, got torch.float32"),
    (
        {"lengths": torch.ones(3, dtype=torch.int64, device="meta")},
        ValueError,
        "`lengths` must be on the cpu, got meta",
    ),
    (
        {"lengths": torch.ones(3, 1, dtype=torch.int64)},
        ValueError,
        "`lengths` must be [B], got 2 dimensions: [3, 1]",
    ),
    ({"lengths": [4, 2]}, ValueError, "`lengths` must be [B] = [3], got [2]"),
    ({"lengths": []}, ValueError, "`lengths` must be [B] = [3], got [0]"),
    ({"lengths": [4, 0, 1]}, ValueError, "`lengths` must be between 1 and T = 4, got 0"),
    ({"lengths": [4, -2, 1]}, ValueError, "`lengths` must be between 1 and T = 4, got -2"),
    ({"lengths": [4, 5, 1]}, ValueError, "`lengths` must be between 1 and T = 4, got 5"),
    (
        {"lengths": [1, 1, 1], "x": Z(0, 3, 5)},
        ValueError,
        "`lengths` must be between 1 and T = 0, got 1",
    ),
]

PACKED = [
    ({"x": Z(4, 3, 5)}, ValueError, "`x` must be [N, I], got 3 dimensions: [4, 3, 5]"),
    (
        {"lengths": [1, 2, 3]},
        ValueError,
        "`lengths` must be None where `batch_sizes` is given, got [1, 2, 3]",
    ),
    ({"batch_sizes": 6}, TypeError, "`batch_sizes` must be a Tensor or list, got int"),
    ({"batch_sizes": [3, 2.0, 1]}, TypeError, "`batch_sizes` must hold integers alone"),
    ({"batch_sizes": Z(3)}, TypeError, "`batch_sizes` must have dtype torch.int64, got torch.f"),
    (
        {"batch_sizes": torch.ones(1, 1, dtype=torch.int64)},
        ValueError,
        "`batch_sizes` must be [T], got 2 dimensions: [1, 1]",
    ),
    ({"batch_sizes": []}, ValueError, "`batch_sizes` must be of at least 1 step, got []"),
    ({"batch_sizes": [3, 1, 2]}, ValueError, "`batch_sizes` must be non-increasing, got 2 after 1"),
    ({"batch_sizes": [3, 3, 0]}, ValueError, "`batch_sizes` must be at least 1, got 0"),
    ({"batch_sizes": [4, 3, -1]}, ValueError, "`batch_sizes` must be at least 1, got -1"),
    (
        {"batch_sizes": [3, 2]},
        ValueError,
        "`batch_sizes` must be of sum N = 6, the rows of the input, got 5",
    ),
    ({"h0": Z(2, 7)}, ValueError, "`h0` must be [B, H] = [3, 7], got [2, 7]"),
]


def words_of(op, words, suffix=""):
    """What the message of an op, or of its cell, starts with, as a pattern."""
    G = GATES[op]
    return re.escape(
        f"{op}{suffix}: "
        + words.replace("{G}", "" if G == 1 else str(G)).replace("{n}", str(7 * G))
    )


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(
    ("changes", "error", "words"), RECURRENT, ids=[words for *_, words in RECURRENT]
)
def test_recurrent(op, changes, error, words):
    with pytest.raises(error, match=words_of(op, words)):
        getattr(functional, op)(**arguments(op, **changes))


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(("changes", "error", "words"), PACKED, ids=[words for *_, words in PACKED])
def test_packed(op, changes, error, words):
    with pytest.raises(error, match=words_of(op, words)):
        getattr(functional, op)(**arguments(op, rows=True, **changes))


OWN = [
    (
        "rnn",
        {"w_hh": Z(7, 6)},
        ValueError,
        "rnn: `w_hh` must be [H, H] = [7, 7], got [7, 6]",
    ),
    (
        "rnn",
        {"nonlinearity": "gelu"},
        ValueError,
        "rnn: `nonlinearity` must be one of 'tanh', 'relu', got 'gelu'",
    ),
    ("gru", {"w_hh": Z(7, 21)}, ValueError, "gru: `w_hh` must be [3H, H] = [21, 7], got [7, 21]"),
    ("gru", {"w_hh": Z(28, 7)}, ValueError, "gru: `w_hh` must be [3H, H] = [27, 9], got [28, 7]"),
    ("lstm", {"w_hh": Z(7, 28)}, ValueError, "lstm: `w_hh` must be [4H, H] = [28, 7], got [7, 28]"),
    ("lstm", {"c0": Z(4, 7)}, ValueError, "lstm: `c0` must be [B, H] = [3, 7], got [4, 7]"),
    (
        "lstm",
        {"c0": Z(3, 7).double()},
        TypeError,
        "lstm: `c0` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ("lstm", {"w_hr": Z(2)}, ValueError, "lstm: `w_hr` must be [R, H], got 1 dimensions: [2]"),
    (
        "lstm",
        {"w_hr": Z(2, 7)},
        ValueError,
        "lstm: `w_hh` must be [4H, R] = [28, 2], got [28, 7]",
    ),
    (
        "lstm",
        {"w_hr": Z(2, 6)},
        ValueError,
        "lstm: `w_hh` must be [4H, R] = [24, 2], got [28, 7]",
    ),
    ("lstm", {"w_hr": Z(0, 7)}, ValueError, "lstm: `projection size` must be at least 1, got 0"),
    (
        "lstm",
        {"w_hr": Z(2, 7), "w_hh": Z(28, 2)},
        ValueError,
        "lstm: `h0` must be [B, R] = [3, 2], got [3, 7]",
    ),
    (
        "lstm",
        {"w_hr": Z(2, 7), "w_hh": Z(28, 2), "h0": Z(3, 2), "c0": Z(3, 2)},
        ValueError,
        "lstm: `c0` must be [B, H] = [3, 7], got [3, 2]",
    ),
    ("lstm", {"w_hr": "x"}, TypeError, "lstm: `w_hr` must be a Tensor, got str"),
    (
        "lstm",
        {"return_cell_states": "yes"},
        TypeError,
        "lstm: `return_cell_states` must be True or False, got str",
    ),
]


@pytest.mark.parametrize(("op", "changes", "error", "words"), OWN, ids=[case[-1] for case in OWN])
def test_of_one_op(op, changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        getattr(functional, op)(**arguments(op, **changes))


CELL = [
    (
        {"input": Z(4, 3, 5)},
        ValueError,
        "`input` must be [B, I] or [I], got 3 dimensions: [4, 3, 5]",
    ),
    ({"input": 1.0}, TypeError, "`input` must be a Tensor, got float"),
    (
        {"input": Z(3, 5).int()},
        TypeError,
        "`input` must have a floating-point dtype, got torch.int32",
    ),
    ({"hx": Z(2, 7)}, ValueError, "`{hx}` must be [B, H] = [3, 7], got [2, 7]"),
    ({"input": Z(5)}, ValueError, "`{hx}` must be [H] = [7], got [3, 7]"),
    (
        {"hx": Z(3, 7).half()},
        TypeError,
        "`{hx}` must have the dtype of the input, torch.float32, got torch.float16",
    ),
    ({"w_ih": Z(7, 4)}, ValueError, "`w_ih` must be [{G}H, I] = [{n}, 5], got [7, 4]"),
    ({"w_hh": Z(7)}, ValueError, "`w_hh` must be [{G}H, H], got 1 dimensions"),
    ({"packed": True}, TypeError, "`packed` must be a PackedWeights, got bool"),
]


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(("changes", "error", "words"), CELL, ids=[words for *_, words in CELL])
def test_cell(op, changes, error, words):
    made = arguments(op)
    made = {"input": Z(3, 5), "hx": Z(3, 7)} | {
        k: made[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")
    }
    made |= changes
    if op == "lstm":
        made["hx"] = (made["hx"], Z(3, 7))
    words = words.replace("{hx}", "hx[0]" if op == "lstm" else "hx")
    with pytest.raises(error, match=words_of(op, words, "_cell")):
        getattr(functional, f"{op}_cell")(**made)


def test_cells_of_one_op():
    w_ih, w_hh = Z(7, 5), Z(7, 7)
    with pytest.raises(
        ValueError, match="rnn_cell: `nonlinearity` must be one of 'tanh', 'relu', got None"
    ):
        functional.rnn_cell(Z(3, 5), None, w_ih, w_hh, nonlinearity=None)
    w_ih, w_hh = Z(28, 5), Z(28, 7)
    for hx, got in ((Z(3, 7), "Tensor"), ((Z(3, 7),), "1"), ([], "0")):
        with pytest.raises(
            TypeError, match=rf"lstm_cell: `hx` must be a pair \(h, c\) of Tensors, got {got}"
        ):
            functional.lstm_cell(Z(3, 5), hx, w_ih, w_hh)
    with pytest.raises(
        ValueError, match=r"lstm_cell: `hx\[1\]` must be \[B, H\] = \[3, 7\], got \[3, 6\]"
    ):
        functional.lstm_cell(Z(3, 5), (Z(3, 7), Z(3, 6)), w_ih, w_hh)


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
    (
        {"alibi_slopes": torch.zeros(2, 5)},
        ValueError,
        r"attention: `alibi_slopes` must be \[N\] or \[B, N\] = \[4\] or \[2, 4\], got \[2, 5\]",
    ),
    (
        {"alibi_slopes": torch.zeros(4, requires_grad=True)},
        ValueError,
        "attention: `alibi_slopes` must be without a gradient: pass a learned bias as attn_mask",
    ),
    (
        {"alibi_slopes": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "attention: `alibi_slopes` must have a floating-point dtype, got torch.int64",
    ),
    ({"dropout_p": 1.1}, ValueError, r"attention: `dropout_p` must be between 0 and 1, got 1.1"),
    ({"dropout_p": "a"}, TypeError, "attention: `dropout_p` must be"),
    ({"sinks": 1.0}, TypeError, "attention: `sinks` must be a Tensor, got float"),
    *(
        ({name: 1}, TypeError, f"attention: `{name}` must be True or False, got int")
        for name in ("is_causal", "enable_gqa", "return_lse")
    ),
    (
        {"sinks": torch.zeros(5)},
        ValueError,
        r"attention: `sinks` must be \[N\] = \[4\], got \[5\]",
    ),
    ({"softcap": "5"}, TypeError, "attention: `softcap` must be a number, got str"),
    ({"softcap": -1.0}, ValueError, "attention: `softcap` must be at least 0 and finite, got -1.0"),
    ({"window": 3}, TypeError, r"attention: `window` must be a pair \(left, right\), got 3"),
    ({"window": (1, 2, 3)}, TypeError, r"attention: `window` must be a pair \(left, right\)"),
    ({"window": (1.0, 2)}, TypeError, r"attention: `window` must be of integers or None"),
    (
        {"window": (3, -1)},
        ValueError,
        r"attention: `window` must be of sides of at least 0, or None, got \(3, -1\)",
    ),
    (
        {"causal_alignment": "left"},
        ValueError,
        "attention: `causal_alignment` must be .*top-left.*, got 'left'",
    ),
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
    ({"is_causal": 1}, TypeError, "`is_causal` must be True or False, got int"),
    ({"enable_gqa": 1}, TypeError, "`enable_gqa` must be True or False, got int"),
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


LOSS = [
    ({"x": [1.0]}, TypeError, "`x` must be a Tensor, got list"),
    ({"x": Z(())}, ValueError, "`x` must be [..., H], got 0 dimensions: []"),
    ({"x": Z(2, 3, 4).long()}, TypeError, "`x` must have a floating-point dtype, got torch.int64"),
    ({"x": Z(2, 3, 0)}, ValueError, "`hidden size H` must be at least 1, got 0"),
    ({"weight": Z(0, 4)}, ValueError, "`vocabulary size V` must be at least 1, got 0"),
    ({"weight": Z(4)}, ValueError, "`weight` must be [V, H], got 1 dimensions: [4]"),
    ({"weight": Z(7, 5)}, ValueError, "`weight` must be [V, H] = [7, 4], got [7, 5]"),
    (
        {"weight": Z(7, 4).double()},
        TypeError,
        "`weight` must have the dtype of the input, torch.float32, got torch.float64",
    ),
    ({"bias": Z(6)}, ValueError, "`bias` must be [V] = [7], got [6]"),
    ({"class_weight": Z(6)}, ValueError, "`class_weight` must be [V] = [7], got [6]"),
    (
        {"class_weight": Z(7, requires_grad=True)},
        ValueError,
        "`class_weight` must be without gradient, got requires_grad=True",
    ),
    ({"target": Z(2, 3)}, TypeError, "`target` must have dtype torch.int64, got torch.float32"),
    ({"target": Z(3, 2).long()}, ValueError, "`target` must be [...] = [2, 3], got [3, 2]"),
    ({"reduction": "max"}, ValueError, "`reduction` must be one of 'mean', 'sum', 'none', got"),
    ({"label_smoothing": 1.1}, ValueError, "`label_smoothing` must be between 0 and 1, got 1.1"),
    ({"label_smoothing": "no"}, TypeError, "`label_smoothing` must be a number, got str"),
    ({"z_loss": -1.0}, ValueError, "`z_loss` must be at least 0 and finite, got -1.0"),
    ({"ignore_index": 0.5}, TypeError, "`ignore_index` must be an integer, got float"),
    ({"return_lse": 1}, TypeError, "`return_lse` must be True or False, got int"),
    ({"return_argmax": None}, TypeError, "`return_argmax` must be True or False, got NoneType"),
]


@pytest.mark.parametrize(("changes", "error", "words"), LOSS, ids=[words for *_, words in LOSS])
def test_linear_cross_entropy(changes, error, words):
    made = {"x": Z(2, 3, 4), "weight": Z(7, 4), "target": Z(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=re.escape(f"linear_cross_entropy: {words}")):
        functional.linear_cross_entropy(**made | changes)


def test_unknown_spec_lists_the_known():
    from pykernels.testing.specs import find, with_layout

    with pytest.raises(KeyError, match=r"no spec is called 'rnn'; known: .*rnn-plain"):
        find("rnn")
    with pytest.raises(ValueError, match=r"layout must be one of contiguous, .*, got 'diagonal'"):
        with_layout(Z(2), "diagonal")
