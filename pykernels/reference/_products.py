"""The matrix products of the recurrent formulas, their long sums made of several short ones.

A library may add up all terms of a sum in one chain, whose error grows with its length. Then the
same formula would be as exact as stock torch's layers on one machine, and less so on another.
"""

from torch.nn import functional

#: Terms of one chain.
DEPTH = 256


def linear(x, w, b=None):
    """``x w^T + b`` [rows, columns] for x [rows, depth], w [columns, depth] and b [columns]."""
    first, *others = zip(x.split(DEPTH, 1), w.split(DEPTH, 1), strict=True)
    return sum((functional.linear(*part) for part in others), functional.linear(*first, b))
