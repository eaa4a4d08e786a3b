r"""What an op, a layer or a small model costs: operations, bytes, parameters, and the least time.

A recurrent layer of T steps on a vector of d inputs and h hidden units takes

.. math:: T (h^2 + h d) \text{ multiply-adds, that is } O(T (h^2 + h d)),

linear in the length and quadratic in the width, a GRU three and an LSTM four times that;
self-attention over T positions takes O(T^2 d).
Counted are the products of matrices, which are nearly all of the work: element-wise steps (tanh,
softmax, biases) are O(T h) and O(T^2). One multiply-add is two floating-point operations. Bytes
are the compulsory traffic: every input read once and every output written once.

>>> rnn(T=50, B=1, I=300, H=512).multiply_adds
20787200

With an output projection onto a vocabulary of V words, y_t = W_hy h_t, it is

.. math:: O(T (h^2 + h d + V h)) \text{ forward, and twice that backward through time,}

as each product gives two: the gradient of its matrix and that of its vector. The projection is
most of a language model:

>>> parts = recurrent_language_model("rnn", T=50, B=1, V=30_000, d=300, h=512, bias=False)
>>> (parts["recurrence"] + parts["output"]).parameters
15775744
>>> {name: part.multiply_adds for name, part in parts.items()}
{'embedding': 0, 'recurrence': 20787200, 'output': 768000000}

Ops count one call, layers (`recurrent_layers`, `multihead_attention`, `transformer_block`) and
models (`recurrent_language_model`, `transformer_language_model`) add up the ops in them, each with
traffic of its own: what one op writes the next one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: The passes that can be counted and timed.
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Cost:
    """The cost of one call of an op."""

    multiply_adds: int
    bytes: int
    #: Learned numbers; they are the same for every pass.
    parameters: int

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two of them."""
        return 2 * self.multiply_adds

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other, with weights of their own."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.bytes + other.bytes,
            self.parameters + other.parameters,
        )

    def floor(self, machine: Machine) -> float:
        """The least seconds that `machine` can take: see `floor_seconds`."""
        return floor_seconds(self.flops, self.bytes, machine.flop_rate, machine.byte_rate)


@dataclass(frozen=True)
class Machine:
    """What a machine was measured to do in a second; ``float("inf")`` leaves one out."""

    flop_rate: float
    byte_rate: float = float("inf")


def total(parts: Iterable[Cost]) -> Cost:
    """The sum of `parts`, as ``total(model.values())``."""
    return sum(parts, Cost(0, 0, 0))


def rnn(
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    bias: bool = True,
    initial_state: bool = False,
    lengths: Sequence[int] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    r"""One direction of one layer of ``h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``.

    Forward: :math:`B T (H^2 + H I)` multiply-adds, one pair of products a step. Backward: twice as
    many, since each product gives two, the gradient of its matrix and that of its vector.

    Args:
        T, B, I, H: steps, batch, input size, hidden size.
        bias: whether there are b_ih and b_hh.
        initial_state: whether h0 is given, and so read and given a gradient.
        lengths: steps of each of the B sequences, and only these count; T each if None.
        itemsize: bytes of a number.
        which: one of `PASSES`.
    """
    steps = _steps(T, B, lengths)
    return _recurrence(1, steps, B, I, H, bias, initial_state, itemsize, which)


def gru(
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    bias: bool = True,
    initial_state: bool = False,
    lengths: Sequence[int] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    r"""One direction of one layer of gated recurrent units: three times the products of `rnn`.

    Forward: :math:`3 B T (H^2 + H I)` multiply-adds; backward twice as many. The arguments are
    those of `rnn`.
    """
    steps = _steps(T, B, lengths)
    return _recurrence(3, steps, B, I, H, bias, initial_state, itemsize, which)


def lstm(
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    proj_size: int = 0,
    bias: bool = True,
    initial_state: bool = False,
    lengths: Sequence[int] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    r"""One direction of one layer of long short-term memory: four times the products of `rnn`.

    Forward: :math:`4 B T (H R + H I)` multiply-adds for a state of R = H numbers; a state of
    R = `proj_size` takes :math:`B T H R` more. Backward: twice as many.

    Args:
        proj_size: size of the state that W_hr projects to; 0 is none.
        initial_state: whether h0 and c0 are given.
        T, B, I, H, bias, lengths, itemsize, which: as in `rnn`.
    """
    steps = _steps(T, B, lengths)
    return _recurrence(
        4, steps, B, I, H, bias, initial_state, itemsize, which, proj_size=proj_size, cells=True
    )


def _steps(T: int, B: int, lengths: Sequence[int] | None) -> int:
    """Steps of all sequences together."""
    if lengths is None:
        return T * B
    if len(lengths) != B or not all(0 <= length <= T for length in lengths):
        raise ValueError(f"`lengths` must be {B} numbers from 0 to {T}, got {list(lengths)}")
    return int(sum(lengths))


def _recurrence(
    gates: int,
    steps: int,
    B: int,
    I: int,
    H: int,
    bias: bool,
    initial_state: bool,
    itemsize: int,
    which: str,
    *,
    proj_size: int = 0,
    cells: bool = False,
) -> Cost:
    """One layer of `gates` products a step; `cells` says that H numbers stand beside the state.

    What a forward pass keeps for its backward pass is left out: that is the kernel's choice.
    """
    R = proj_size or H
    products = gates * H * (R + I) + proj_size * H
    weights = products + (2 * gates * H if bias else 0)
    last = B * R + (B * H if cells else 0)
    first = last if initial_state else 0
    x, y = steps * I, steps * R
    return _total(
        which,
        products=(steps * products, 2 * steps * products),
        # Forward reads x, the weights and the first states, and writes y and the last states.
        # Backward reads these but the last states, and the gradients of y and of the last states,
        # and writes those of all that forward reads.
        traffic=(
            (x + weights + first + y + last) * itemsize,
            (x + weights + first + y + y + last + x + weights + first) * itemsize,
        ),
        parameters=weights,
    )


def attention(
    B: int,
    N: int,
    S_q: int,
    S_k: int,
    D: int,
    *,
    D_v: int | None = None,
    N_kv: int | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    r"""``softmax(Q K^T / sqrt(D)) V`` over the pairs of query and key that see each other.

    Forward: :math:`B N P (D + D_v)` multiply-adds for P visible pairs. Backward:
    :math:`B N P (3 D + 2 D_v)`: the scores once more, as no kernel may store them, then dV, dP, dQ
    and dK. A mask given as a tensor does not lower the count: it may hold anything.

    Args:
        B, N, S_q, S_k, D: batch, heads, queries, keys, head dim.
        D_v: head dim of the values; D if None.
        N_kv: heads of K and V; N if None.
        is_causal, window: which keys a query sees, as in `visible_pairs`.
        itemsize: bytes of a number.
        which: one of `PASSES`.
    """
    D_v = D if D_v is None else D_v
    N_kv = N if N_kv is None else N_kv
    pairs = B * N * visible_pairs(S_q, S_k, is_causal=is_causal, window=window)
    q, out = B * N * S_q * D, B * N * S_q * D_v
    k, v = B * N_kv * S_k * D, B * N_kv * S_k * D_v
    lse = B * N * S_q * max(itemsize, 4)
    return _total(
        which,
        products=(pairs * (D + D_v), pairs * (3 * D + 2 * D_v)),
        # Forward reads q, k, v and writes out, lse. Backward reads all of these and dout, and
        # writes dq, dk, dv.
        traffic=(
            (q + k + v + out) * itemsize + lse,
            (2 * (q + k + v) + 2 * out) * itemsize + lse,
        ),
        parameters=0,
    )


def attention_varlen(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    N: int,
    D: int,
    *,
    D_v: int | None = None,
    N_kv: int | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    """`attention` of sequences packed one behind the other: each costs what it would alone.

    Args:
        lengths_q, lengths_k: the queries and the keys of each sequence.
        N, D, D_v, N_kv, is_causal, window, itemsize, which: as in `attention`.
    """
    shared: dict[str, Any] = {"D_v": D_v, "N_kv": N_kv, "is_causal": is_causal, "window": window}
    return total(
        attention(1, N, S_q, S_k, D, **shared, itemsize=itemsize, which=which)
        for S_q, S_k in zip(lengths_q, lengths_k, strict=True)
    )


def linear_cross_entropy(
    N: int, H: int, V: int, *, bias: bool = True, itemsize: int = 4, which: str = "forward"
) -> Cost:
    r"""The cross-entropy of ``W x_i + b`` over a vocabulary of V words, for N rows x_i.

    Forward: :math:`N H V` multiply-adds, the logits. Backward: twice as many, dx and dW, as the
    gradients of the logits can be made where the logits are; a kernel that computes these anew in
    its backward pass makes four products of the three.

    Args:
        N, H, V: rows, hidden size, vocabulary.
        bias: whether there is a b.
        itemsize: bytes of a number; a target has eight.
        which: one of `PASSES`.
    """
    x, weights, target = N * H, H * V + (V if bias else 0), 8 * N
    return _total(
        which,
        products=(N * H * V, 2 * N * H * V),
        # Forward reads x, the weights and the targets, and writes the loss. Backward reads all of
        # these, and writes the gradients of x and of the weights.
        traffic=(
            (x + weights + 1) * itemsize + target,
            (2 * (x + weights) + 1) * itemsize + target,
        ),
        parameters=weights,
    )


def visible_pairs(
    S_q: int,
    S_k: int,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
) -> int:
    """How many pairs of query i and key j there are, under the rules of `functional.attention`.

    Args:
        S_q, S_k: queries, keys.
        is_causal: only those of j <= i.
        window: (left, right): only those of i - left <= j <= i + right; None for no bound.
    """
    left, right = (None, None) if window is None else window
    if is_causal:
        right = 0
    pairs = 0
    for i in range(S_q):
        first = 0 if left is None else max(0, i - left)
        end = S_k if right is None else min(S_k, i + right + 1)
        pairs += max(0, end - first)
    return pairs


def linear(
    rows: int, I: int, O: int, *, bias: bool = True, itemsize: int = 4, which: str = "forward"
) -> Cost:
    r"""``y = W x + b`` on each of so many rows x: a projection, as that onto a vocabulary.

    Forward: rows * I * O multiply-adds; backward: twice as many, for dW and dx.

    Args:
        rows, I, O: vectors, their size and that of y.
        bias, itemsize, which: as in `rnn`.
    """
    weights = I * O + (O if bias else 0)
    x, y = rows * I, rows * O
    return _total(
        which,
        products=(x * O, 2 * x * O),
        # Backward reads x, W and dy, and writes dx, dW and db.
        traffic=((x + weights + y) * itemsize, (x + I * O + y + x + weights) * itemsize),
        parameters=weights,
    )


def embedding(rows: int, V: int, D: int, *, itemsize: int = 4, which: str = "forward") -> Cost:
    """A row of a [V, D] matrix for each of so many tokens: no product, only traffic.

    Forward reads the numbers of the tokens (8 bytes each) and their rows, and writes these;
    backward reads their gradients and writes that of the matrix, all V rows of it.
    """
    found = rows * D * itemsize
    return _total(
        which,
        products=(0, 0),
        traffic=(8 * rows + 2 * found, 8 * rows + found + V * D * itemsize),
        parameters=V * D,
    )


def layer_norm(rows: int, D: int, *, itemsize: int = 4, which: str = "forward") -> Cost:
    """``(x - mean) / std * weight + bias`` on each of so many rows: no product, only traffic."""
    x, weights = rows * D, 2 * D
    return _total(
        which,
        products=(0, 0),
        # Backward reads x, dy and the weight, and writes dx and both gradients.
        traffic=((2 * x + weights) * itemsize, (3 * x + D + weights) * itemsize),
        parameters=weights,
    )


def recurrent_layers(
    op: str,
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    proj_size: int = 0,
    bias: bool = True,
    initial_state: bool = False,
    lengths: Sequence[int] | None = None,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    """`nn.RNN`, `nn.GRU` or `nn.LSTM`: all layers and directions.

    Args:
        op: "rnn", "gru" or "lstm".
        num_layers, bidirectional, proj_size: as torch.nn has them.
        T, B, I, H, bias, initial_state, lengths, itemsize, which: as in `rnn`.
    """
    count = _recurrent(op)
    if proj_size and op != "lstm":
        raise ValueError(f"`proj_size` is for lstm alone, got {proj_size} for {op}")
    directions = 2 if bidirectional else 1
    inputs = [I, *[directions * (proj_size or H)] * (num_layers - 1)]
    shared: dict[str, Any] = {"bias": bias, "initial_state": initial_state, "lengths": lengths}
    if proj_size:
        shared["proj_size"] = proj_size
    return total(
        count(T, B, size, H, **shared, itemsize=itemsize, which=which)
        for size in inputs
        for _ in range(directions)
    )


def multihead_attention(
    B: int,
    S_q: int,
    S_k: int,
    E: int,
    N: int,
    *,
    is_causal: bool = False,
    bias: bool = True,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    """`nn.MultiheadAttention` of width E and N heads: four projections and `attention`.

    Args:
        B, S_q, S_k, E, N: batch, queries, keys, width, heads.
        is_causal, itemsize, which: as in `attention`.
        bias: whether the projections have one.
    """
    if E % N:
        raise ValueError(f"the width E must be a multiple of the heads N, got {E} and {N}")
    project = [
        linear(B * S, E, E, bias=bias, itemsize=itemsize, which=which)
        for S in (S_q, S_k, S_k, S_q)  # to Q, K and V, and back
    ]
    sizes = (B, N, S_q, S_k, E // N)
    attend = attention(*sizes, is_causal=is_causal, itemsize=itemsize, which=which)
    return total([*project, attend])


def transformer_block(
    B: int,
    T: int,
    E: int,
    N: int,
    F: int,
    *,
    is_causal: bool = False,
    bias: bool = True,
    itemsize: int = 4,
    which: str = "forward",
) -> Cost:
    """Self-attention and a feed-forward pair E -> F -> E, each behind a norm, as
    `torch.nn.TransformerEncoderLayer` has them.

    Args:
        B, T, E, N, F: batch, positions, width, heads, width between the pair.
        is_causal, bias, itemsize, which: as in `multihead_attention`; without bias the norms keep
            theirs.
    """
    return total(
        [
            layer_norm(B * T, E, itemsize=itemsize, which=which),
            multihead_attention(
                B, T, T, E, N, is_causal=is_causal, bias=bias, itemsize=itemsize, which=which
            ),
            layer_norm(B * T, E, itemsize=itemsize, which=which),
            linear(B * T, E, F, bias=bias, itemsize=itemsize, which=which),
            linear(B * T, F, E, bias=bias, itemsize=itemsize, which=which),
        ]
    )


def recurrent_language_model(
    op: str,
    T: int,
    B: int,
    V: int,
    d: int,
    h: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    tied: bool = False,
    itemsize: int = 4,
    which: str = "forward",
) -> dict[str, Cost]:
    r"""Tokens to vectors of d, a recurrence of h units, scores of V words: its parts by name.

    ``total(parts.values())`` is all of it: for an RNN, forward,
    :math:`B T (h^2 + h d + V h)` multiply-adds; backward, twice as many.

    Args:
        op: "rnn", "gru" or "lstm".
        T, B, V, d, h: steps, batch, vocabulary, width of the embedding, hidden units.
        num_layers, bias, itemsize, which: as in `recurrent_layers`.
        tied: the output's matrix is the embedding's; d must be h.
    """
    if tied and d != h:
        raise ValueError(f"tied weights need d = h, got {d} and {h}")
    return {
        "embedding": embedding(T * B, V, d, itemsize=itemsize, which=which),
        "recurrence": recurrent_layers(
            op, T, B, d, h, num_layers=num_layers, bias=bias, itemsize=itemsize, which=which
        ),
        "output": _output(T * B, V, h, bias, tied, itemsize, which),
    }


def transformer_language_model(
    T: int,
    B: int,
    V: int,
    E: int,
    N: int,
    F: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    tied: bool = False,
    itemsize: int = 4,
    which: str = "forward",
) -> dict[str, Cost]:
    """Tokens to vectors of E, causal blocks, a last norm, scores of V words: its parts by name.

    Positions come from a formula and cost no parameters.

    Args:
        T, B, V, E, N, F: positions, batch, vocabulary, width, heads, width between the pair.
        num_layers: blocks.
        bias, tied, itemsize, which: as in `recurrent_language_model`.
    """
    block = transformer_block(
        B, T, E, N, F, is_causal=True, bias=bias, itemsize=itemsize, which=which
    )
    last = layer_norm(B * T, E, itemsize=itemsize, which=which)
    return {
        "embedding": embedding(T * B, V, E, itemsize=itemsize, which=which),
        "blocks": total([*[block] * num_layers, last]),
        "output": _output(T * B, V, E, bias, tied, itemsize, which),
    }


def _output(rows: int, V: int, h: int, bias: bool, tied: bool, itemsize: int, which: str) -> Cost:
    """The projection onto a vocabulary; a tied one has no matrix of its own."""
    scores = linear(rows, h, V, bias=bias, itemsize=itemsize, which=which)
    own = scores.parameters - (V * h if tied else 0)
    return Cost(scores.multiply_adds, scores.bytes, own)


def _recurrent(op: str) -> Callable[..., Cost]:
    """The count of a recurrent op by its name."""
    counts: dict[str, Callable[..., Cost]] = {"rnn": rnn, "gru": gru, "lstm": lstm}
    if op not in counts:
        raise ValueError(f"`op` must be one of {', '.join(counts)}, got {op!r}")
    return counts[op]


def floor_seconds(flops: float, bytes: float, flop_rate: float, byte_rate: float) -> float:
    """The roofline: no call is faster than its arithmetic or its traffic at full rate.

    Args:
        flops, bytes: what the call must do and move.
        flop_rate, byte_rate: what the machine does and moves in a second; ``float("inf")`` leaves
            that side out.
    """
    if not (flop_rate > 0 and byte_rate > 0):
        raise ValueError(f"rates must be positive, got {flop_rate} and {byte_rate}")
    return max(flops / flop_rate, bytes / byte_rate)


def _total(
    which: str, products: tuple[int, int], traffic: tuple[int, int], parameters: int
) -> Cost:
    """Picks or adds up what is given as (forward, backward)."""
    if which not in PASSES:
        raise ValueError(f"`which` must be one of {', '.join(PASSES)}, got {which!r}")
    forward, backward = "forward" in which, "backward" in which
    return Cost(
        forward * products[0] + backward * products[1],
        forward * traffic[0] + backward * traffic[1],
        parameters,
    )
