"""What the launchers of rnn, gru and lstm share: the large products around the time loop."""

import torch
from torch import Tensor

from ._common import compute_dtype
from ._product import deep_product, long_product, product

Maybe = Tensor | None


def dense(tensor: Maybe) -> Maybe:
    """The tensor, contiguous."""
    return None if tensor is None else tensor.contiguous()


def wide(tensor: Maybe, B: int, H: int, like: Tensor) -> Tensor:
    """A copy [B, H] in the compute dtype of `like` for a time loop to write to; None is zero."""
    dtype = compute_dtype(like.dtype)
    if tensor is None:
        return like.new_zeros(B, H, dtype=dtype)
    return torch.empty(B, H, dtype=dtype, device=like.device).copy_(tensor)


def input_sums(x: Tensor, w_ih: Tensor, b_ih: Maybe, b_hh: Maybe, width: int) -> Tensor:
    """W_ih x + b_ih + b_hh for all steps: the first columns of [T, B, width], in the compute dtype.

    Args:
        x: [T, B, I], not empty.
        w_ih: [G H, I].
        b_ih, b_hh: [G H], or None.
        width: columns to make room for.
    """
    T, B, I = x.shape
    sums = torch.empty(T, B, width, dtype=compute_dtype(x.dtype), device=x.device)
    out = sums.view(T * B, width)[:, : w_ih.shape[0]]
    product(x.contiguous().view(T * B, I), w_ih.t(), out, dense(b_ih), dense(b_hh))
    return sums


def last_of(y: Tensor, h0: Maybe, reverse: bool) -> Tensor:
    """h_n [B, H], in memory of its own."""
    if len(y) > 0:
        return y[0 if reverse else -1].clone()
    return y.new_zeros(y.shape[1:]) if h0 is None else h0.clone()


def gradients(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Maybe,
    y: Tensor,
    da: Tensor,
    dq: Tensor,
    dh: Maybe,
    needs: tuple[bool, ...],
    *,
    reverse: bool,
) -> list[Maybe]:
    """Those of x, w_ih, w_hh, b_ih, b_hh, h0, None where not in `needs`.

    Args:
        x, w_ih, w_hh, h0: as in forward; the gates of w_hh in the order of dq.
        y: [T, B, H].
        da, dq: [T, B, G H], gradients of the sums that x and that h enters, each row contiguous.
        dh: [B, H], what reaches h0 without W_hh, or None.
        needs: which are wanted.
        reverse: as in forward.
    """
    T, B, I = x.shape
    H = w_hh.shape[1]
    first = T - 1 if reverse else 0
    a, q = da.flatten(0, 1), dq.flatten(0, 1)
    found: list[Maybe] = [None] * 6
    if needs[0]:
        found[0] = torch.empty(T, B, I, dtype=x.dtype, device=x.device)
        deep_product(a, w_ih, found[0].view(T * B, I))
    if needs[1]:
        found[1] = long_product([(a.t(), x.contiguous().view(T * B, I))], like=w_ih)
    if needs[2]:
        # Step s multiplies the state of step s - 1: y moved by one step, h0 at the first.
        later, earlier = (dq[:-1], y[1:]) if reverse else (dq[1:], y[:-1])
        pairs = [(later.flatten(0, 1).t(), earlier.reshape(-1, H))]
        if h0 is not None and T > 0:
            pairs.append((dq[first].t(), h0))
        found[2] = long_product(pairs, like=w_hh)
    for index, sums in ((3, a), (4, q)):
        if needs[index]:
            found[index] = sums.sum(0, dtype=compute_dtype(x.dtype)).to(x.dtype)
    if needs[5]:
        through = torch.zeros(B, H, dtype=compute_dtype(x.dtype), device=x.device)
        if T > 0:
            deep_product(dq[first], w_hh, through)
        found[5] = (through if dh is None else through + dh).to(x.dtype)
    return found
