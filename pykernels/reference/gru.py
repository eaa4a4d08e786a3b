"""The gated recurrent unit and its backpropagation through time, as the formulas stand.

    r_t = s(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)             reset
    z_t = s(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)             update
    q_t = W_hn h_{t-1} + b_hn
    n_t = tanh(W_in x_t + b_in + r_t * q_t)                    new
    h_t = (1 - z_t) * n_t + z_t * h_{t-1},   s the logistic sigmoid

K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
translation", EMNLP (2014), in the variant of ``torch.nn.GRU``, which resets after the product with
W_hn. The gates lie in the weights in the order r, z, n. Axes: T time, B batch, I input, H hidden.
"""

import torch

from . import _time
from ._products import linear

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES = frozenset({"ragged"})


def gates(x, h, w_ih, w_hh, b_ih, b_hh):
    """r, z, q and n [rows, H] for the input [rows, I] and the states before it [rows, H]."""
    a_r, a_z, a_n = linear(x, w_ih, b_ih).chunk(3, 1)
    q_r, q_z, q = linear(h, w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(a_r + q_r), torch.sigmoid(a_z + q_z)
    return r, z, q, torch.tanh(a_n + r * q)


def gru(x, w_ih, w_hh, b_ih=None, b_hh=None, h0=None, *, reverse=False, batch_sizes=None):
    """``y [T, B, H]`` and ``h_n [B, H]`` for ``x [T, B, I]``; differentiable by autograd.

    With `batch_sizes`, x and y are the rows [N, I] and [N, H] of a PackedSequence.
    """
    H = w_hh.shape[1]
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    h, y = x.new_zeros(B, H) if h0 is None else h0, []
    for step in steps:
        before = _time.first(h, step)
        _, z, _, n = gates(rows[step], before, w_ih, w_hh, b_ih, b_hh)
        h_t = (1 - z) * n + z * before
        h = _time.advance(h, h_t)
        y.append(h_t)
    return _time.join(y, reverse, H, x).reshape(*x.shape[:-1], H), h


def gru_fwd(x, w_ih, w_hh, b_ih, b_hh, h0, *, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    inputs = (x, w_ih, w_hh, b_ih, b_hh, h0)
    with torch.no_grad():
        y, h_n = gru(*inputs, **options)
    return (y, h_n.clone()), (*inputs, y)


def gru_bwd(saved, grads, *, needs, reverse, batch_sizes):
    """Backpropagation through time; da is the gradient of what a gate's function is applied to:

    dh_t = dy_t + what step t+1 sends back
    da_n = dh_t (1 - z) (1 - n^2)    da_z = dh_t (h_{t-1} - n) z (1 - z)    da_r = da_n q r (1 - r)
    da = [da_r, da_z, da_n] reaches W_ih, b_ih, x_t;   dq = [da_r, da_z, r da_n] W_hh, b_hh, h_{t-1}
    sent back: dh_{t-1} = z dh_t + W_hh^T dq
    """
    x, w_ih, w_hh, b_ih, b_hh, h0 = inputs = saved[:6]
    dy, dh_n = grads
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    y, _ = gru(*inputs, reverse=reverse, batch_sizes=batch_sizes)
    y = y.reshape(-1, w_hh.shape[1])
    zeros = x.new_zeros(B, w_hh.shape[1])
    h = _time.before(y, zeros if h0 is None else h0, steps, reverse)
    r, z, q, n = gates(rows, h, w_ih, w_hh, b_ih, b_hh)
    slope_n, slope_z = (1 - z) * (1 - n**2), (h - n) * z * (1 - z)
    slope_r = q * r * (1 - r)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(y.shape)

    dh, da, dq = zeros if dh_n is None else dh_n, [], []
    for step in reversed(steps):
        dh_t = dy[step] + _time.first(dh, step)
        da_n, da_z = dh_t * slope_n[step], dh_t * slope_z[step]
        da_r = da_n * slope_r[step]
        da.append(torch.cat([da_r, da_z, da_n], 1))
        dq.append(torch.cat([da_r, da_z, r[step] * da_n], 1))
        dh = _time.advance(dh, z[step] * dh_t + dq[-1] @ w_hh)
    da, dq = (_time.join(found, not reverse, w_hh.shape[0], y) for found in (da, dq))
    dx = linear(da, w_ih.T).reshape(x.shape)
    return dx, da.T @ rows, dq.T @ h, da.sum(0), dq.sum(0), dh
