r"""What an op costs: multiply-adds, bytes, parameters, and the least time they can take.

A recurrent layer of T steps on a vector of d inputs and h hidden units takes

.. math:: T (h^2 + h d) \text{ multiply-adds, that is } O(T (h^2 + h d)),

linear in the length and quadratic in the width, a GRU three and an LSTM four times that;
self-attention over T positions takes O(T^2 d).
Counted are the products of matrices, which are nearly all of the work: element-wise steps (tanh,
softmax, biases) are O(T h) and O(T^2). One multiply-add is two floating-point operations. Bytes
are the compulsory traffic: every input read once and every output written once.

>>> rnn(T=50, B=1, I=300, H=512).multiply_adds
20787200
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        is_causal: query i sees keys j <= i only, and only these pairs count.
        itemsize: bytes of a number.
        which: one of `PASSES`.
    """
    D_v = D if D_v is None else D_v
    N_kv = N if N_kv is None else N_kv
    pairs = B * N * visible_pairs(S_q, S_k, is_causal=is_causal)
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


def visible_pairs(S_q: int, S_k: int, *, is_causal: bool = False) -> int:
    """How many (query i, key j) there are; with `is_causal` only those of j <= i."""
    if not is_causal:
        return S_q * S_k
    rising = min(S_q, S_k)  # rows 0, 1, ... see 1, 2, ... keys until all are seen
    return rising * (rising + 1) // 2 + (S_q - rising) * S_k


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
