"""What the launchers of rnn, gru and lstm share: the large products around the time loop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import compute_dtype
from ._product import deep_product, long_product, product

Maybe = Tensor | None


class Ragged:
    """Packed rows in a padded batch, and back.

    Each sequence begins at step 0 of the padded batch and lies there in the order in which it is
    walked, so that every walk is forwards. What follows its end reaches no result, and no gradient
    comes from there: backward it is zero until the sequence's own last step.
    """

    def __init__(self, batch_sizes: Sequence[int], reverse: bool, device: torch.device) -> None:
        """`batch_sizes` are [T], not increasing and positive."""
        sizes = torch.tensor(batch_sizes)
        self.T, self.B = len(batch_sizes), int(batch_sizes[0])
        sequences = torch.arange(self.B)
        step = torch.arange(self.T).repeat_interleave(sizes)
        own = torch.cat([sequences[:size] for size in batch_sizes])
        ends = (sizes[:, None] > sequences).sum(0) - 1
        if reverse:
            step = ends[own] - step
        self.rows = (step * self.B + own).to(device)  # [N], of T * B
        self.last = (ends * self.B + sequences).to(device)  # [B], likewise

    def pad(self, packed: Tensor) -> Tensor:
        """[N, I] -> [T, B, I], zeros behind the ends."""
        padded = packed.new_zeros(self.T * self.B, packed.shape[1])
        return padded.index_copy_(0, self.rows, packed).view(self.T, self.B, -1)

    def pick(self, padded: Tensor) -> Tensor:
        """[T, B, H] -> [N, H]."""
        return padded.flatten(0, 1).index_select(0, self.rows)

    def final(self, padded: Tensor) -> Tensor:
        """[T, B, H] -> [B, H], the last step of each sequence."""
        return padded.flatten(0, 1).index_select(0, self.last)

    def gradient(self, every: Maybe, last: Maybe) -> Maybe:
        """What reaches all steps, [N, H], and the last ones, [B, H] -> [T, B, H], not rounded."""
        given = last if every is None else every
        if given is None:
            return None
        shape, dtype = (self.T * self.B, given.shape[1]), compute_dtype(given.dtype)
        padded = given.new_zeros(shape, dtype=dtype)
        for grad, rows in ((every, self.rows), (last, self.last)):
            if grad is not None:
                padded[rows] += grad
        return padded.view(self.T, self.B, -1)


def ragged_forward(
    forward: Callable[..., Any],
    tensors: tuple[Maybe, ...],
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
    **options: Any,
) -> tuple[tuple[Tensor, ...], tuple[Maybe, ...]]:
    """`forward`, which is <op>_fwd, of packed rows x [N, I]: y and all cell states are packed too.

    What is saved behind y is that of the padded batch.
    """
    T, B = len(batch_sizes), batch_sizes[0]
    if tensors[0].shape[0] == T * B:  # all of one length
        x = tensors[0].reshape(T, B, -1)
        (y, h_n, *more), saved = forward(x, *tensors[1:], reverse=reverse, **options)
        found = (y.flatten(0, 1), h_n, *more[:1], *(t.flatten(0, 1) for t in more[1:]))
        return found, (*tensors, found[0], *saved[len(tensors) + 1 :])
    rows = Ragged(batch_sizes, reverse, tensors[0].device)
    cells = options.get("return_cell_states")
    if cells is not None:
        options["return_cell_states"] = True
    x = rows.pad(tensors[0])
    (y, _, *more), saved = forward(x, *tensors[1:], reverse=False, **options)
    outputs = [rows.pick(y), rows.final(y)]
    if more:
        outputs.append(rows.final(more[1]))
    if cells:
        outputs.append(rows.pick(more[1]))
    return tuple(outputs), (*tensors, outputs[0], *saved[len(tensors) + 1 :])


def ragged_backward(
    backward: Callable[..., Any],
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
    needs: tuple[bool, ...],
    **options: Any,
) -> tuple[Maybe, ...]:
    """`backward`, which is <op>_bwd, of what `ragged_forward` saved."""
    T, B, count = len(batch_sizes), batch_sizes[0], len(needs)
    dy, dh_n, *more = grads
    if saved[0].shape[0] == T * B:

        def steps(rows: Maybe) -> Maybe:
            return None if rows is None else rows.reshape(T, B, -1)

        given = (steps(dy), dh_n, *more[:1], *map(steps, more[1:]))
        own = (steps(saved[0]), *saved[1:count], steps(saved[count]), *saved[count + 1 :])
        dx, *rest = backward(own, given, reverse=reverse, needs=needs, **options)
        return None if dx is None else dx.flatten(0, 1), *rest
    rows = Ragged(batch_sizes, reverse, saved[0].device)
    given = (rows.gradient(dy, dh_n), None)
    if more:
        dc_n, dcells = (*more, None)[:2]
        given = (*given, None, rows.gradient(dcells, dc_n))
        options["return_cell_states"] = True
    padded = (rows.pad(saved[0]), *saved[1:count], rows.pad(saved[count]), *saved[count + 1 :])
    dx, *rest = backward(padded, given, reverse=False, needs=needs, **options)
    return None if dx is None else rows.pick(dx), *rest


def padded_sizes(x: Tensor, batch_sizes: Sequence[int] | None) -> tuple[int, int]:
    """T and B of x, [T, B, I] or packed [N, I]."""
    return x.shape[:2] if batch_sizes is None else (len(batch_sizes), batch_sizes[0])


def dense(tensor: Maybe) -> Maybe:
    """The tensor, contiguous."""
    return None if tensor is None else tensor.contiguous()


def input_sums(x: Tensor, w_ih: Tensor, b_ih: Maybe, b_hh: Maybe, width: int) -> Tensor:
    """W_ih x + b_ih + b_hh for all steps: the first columns of [T, B, width], in the compute dtype.

    Args:
        x: [T, B, I], not empty.
        w_ih: [G H, I].
        b_ih, b_hh: [G H], or None.
        width: columns to make room for.
    """
    T, B, _ = x.shape
    sums = torch.empty(T, B, width, dtype=compute_dtype(x.dtype), device=x.device)
    out, rows = sums.view(T * B, width), w_ih.shape[0]
    out = out if rows == width else out[:, :rows]
    product(x.flatten(0, 1), w_ih.t(), out, dense(b_ih), dense(b_hh))
    return sums


def state_after(before: Maybe, B: int, H: int, like: Tensor, steps: int) -> Tensor:
    """A state [B, H] in memory of its own: room for it, or after no step the one before them."""
    if steps > 0:
        return torch.empty(B, H, dtype=like.dtype, device=like.device)
    return like.new_zeros(B, H) if before is None else before.clone()


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
        found[1] = long_product([(a.t(), x.flatten(0, 1))], like=w_ih)
    if needs[2]:
        # Step s multiplies the state of step s - 1: y moved by one step, h0 at the first.
        later, earlier = (dq[:-1], y[1:]) if reverse else (dq[1:], y[:-1])
        pairs = [(later.flatten(0, 1).t(), earlier.reshape(-1, H))]
        if h0 is not None and T > 0:
            pairs.append((dq[first].t(), h0))
        found[2] = long_product(pairs, like=w_hh)
    if needs[3]:
        found[3] = a.sum(0)  # torch adds in the compute dtype and rounds once
    if needs[4]:
        found[4] = found[3].clone() if needs[3] and dq is da else q.sum(0)
    if needs[5]:
        through = torch.zeros(B, H, dtype=compute_dtype(x.dtype), device=x.device)
        if T > 0:
            deep_product(dq[first], w_hh, through)
        found[5] = (through if dh is None else through + dh).to(x.dtype)
    return found
