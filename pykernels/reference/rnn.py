"""The Elman recurrence and its backpropagation through time, as the textbook writes them.

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    h_t = f(a_t),   f = tanh or relu

J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990), in the parametrisation of
``torch.nn.RNN``. Axes: T time, B batch, I input, H hidden.
"""

import torch

from . import _time
from ._products import linear

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES = frozenset({"ragged"})

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def rnn(
    x,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    h0=None,
    *,
    nonlinearity="tanh",
    reverse=False,
    batch_sizes=None,
):
    """``y [T, B, H]`` and ``h_n [B, H]`` for ``x [T, B, I]``; differentiable by autograd.

    With `batch_sizes`, x and y are the rows [N, I] and [N, H] of a PackedSequence.
    """
    f, H = ACTIVATIONS[nonlinearity], w_hh.shape[1]
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    h, y = x.new_zeros(B, H) if h0 is None else h0, []
    for step in steps:
        h_t = f(linear(rows[step], w_ih, b_ih) + linear(_time.first(h, step), w_hh, b_hh))
        h = _time.advance(h, h_t)
        y.append(h_t)
    return _time.join(y, reverse, H, x).reshape(*x.shape[:-1], H), h


def rnn_fwd(x, w_ih, w_hh, b_ih, b_hh, h0, *, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    inputs = (x, w_ih, w_hh, b_ih, b_hh, h0)
    with torch.no_grad():
        y, h_n = rnn(*inputs, **options)
    return (y, h_n.clone()), (*inputs, y)


def rnn_bwd(saved, grads, *, needs, nonlinearity, reverse, batch_sizes):
    """Backpropagation through time, with delta_t = dL/da_t:

    dh_t    = dy_t + W_hh^T delta_{t+1}
    delta_t = dh_t * f'(a_t),   f' = 1 - h_t^2 (tanh) or [h_t > 0] (relu)
    dW_ih = sum_t delta_t x_t^T     dW_hh = sum_t delta_t h_{t-1}^T     db = sum_t delta_t
    dx_t  = W_ih^T delta_t          dh_0  = W_hh^T delta_1
    """
    x, w_ih, w_hh, *_, h0 = inputs = saved[:6]
    dy, dh_n = grads
    options = {"nonlinearity": nonlinearity, "reverse": reverse, "batch_sizes": batch_sizes}
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    y, _ = rnn(*inputs, **options)
    y = y.reshape(-1, w_hh.shape[1])
    zeros = x.new_zeros(B, w_hh.shape[1])
    h = _time.before(y, zeros if h0 is None else h0, steps, reverse)
    slope = 1 - y**2 if nonlinearity == "tanh" else (y > 0).to(y.dtype)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(y.shape)

    dh, delta = zeros if dh_n is None else dh_n, []
    for step in reversed(steps):
        delta_t = (dy[step] + _time.first(dh, step)) * slope[step]
        dh = _time.advance(dh, delta_t @ w_hh)
        delta.append(delta_t)
    delta = _time.join(delta, not reverse, *y.shape[1:], y)
    db = delta.sum(0)
    dx = linear(delta, w_ih.T).reshape(x.shape)
    return dx, delta.T @ rows, delta.T @ h, db, db.clone(), dh
