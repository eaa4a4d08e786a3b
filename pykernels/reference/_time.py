"""The walk through time that the recurrent formulas share.

A batch of sequences is a matrix of rows [N, I], step after step, and the number of rows that each
step has. These numbers never grow: sequence b is row b of every step that it reaches, so a step of
n rows moves the first n states and leaves the others as they are. Forwards these are the sequences
that have ended; backwards, those that have not begun.
"""

import itertools

import torch


def rows(x, batch_sizes, reverse):
    """``x`` as [N, I], the number of sequences B, and the rows of each step in walking order.

    `x` is [T, B, I], or [N, I] with `batch_sizes`, the T numbers of rows.
    """
    if batch_sizes is None:
        T, B, _ = x.shape
        batch_sizes = (B,) * T
    else:
        B = batch_sizes[0]
    ends = [0, *itertools.accumulate(batch_sizes)]
    steps = [slice(start, end) for start, end in itertools.pairwise(ends)]
    return x.reshape(-1, x.shape[-1]), B, steps[::-1] if reverse else steps


def first(state, step):
    """The states [n, H] that a step of n rows moves."""
    return state[: step.stop - step.start]


def advance(state, moved):
    """The states [B, H] after a step has moved the first of them."""
    return torch.cat([moved, state[len(moved) :]])


def join(found, reverse, size, like):
    """What the steps found, in walking order, as rows [N, size] in order of time."""
    return torch.cat([like.new_empty(0, size), *(found[::-1] if reverse else found)])


def before(after, start, steps, reverse):
    """The state that each row began its step with, given those it ended with: [N, H]."""
    found, state = [], start
    for step in steps:
        found.append(first(state, step))
        state = advance(state, after[step])
    return join(found, reverse, after.shape[1], after)
