"""Long short-term memory and its backpropagation through time, as the formulas stand.

    i_t, f_t, o_t = s(W_i. x_t + b_i. + W_h. h_{t-1} + b_h.)     input, forget and output gates
    g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
    c_t = f_t * c_{t-1} + i_t * g_t
    m_t = o_t * tanh(c_t)
    h_t = m_t, or W_hr m_t with a projection,   s the logistic sigmoid

S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), with forget
gates and no peepholes, in the parametrisation of ``torch.nn.LSTM``; the projection is H. Sak,
A. Senior and F. Beaufays', "Long short-term memory recurrent neural network architectures for large
scale acoustic modeling", Interspeech (2014). The gates lie in the weights in the order i, f, g, o.
Axes: T time, B batch, I input, H cells, R outputs (H without a projection).
"""

import torch

from . import _time
from ._products import linear

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES = frozenset({"ragged", "projection"})


def gates(x, h, w_ih, w_hh, b_ih, b_hh):
    """i, f, g and o [rows, H] for the input [rows, I] and the states before it [rows, R]."""
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, 1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm(
    x,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    h0=None,
    c0=None,
    w_hr=None,
    *,
    reverse=False,
    batch_sizes=None,
):
    """``y [T, B, R]``, ``h_n [B, R]``, ``c_n [B, H]`` and all ``c [T, B, H]`` for ``x [T, B, I]``.

    Differentiable by autograd. With `batch_sizes`, x, y and c are the rows [N, .] of a
    PackedSequence.
    """
    H, R = w_hh.shape[0] // 4, w_hh.shape[1]
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    h, y = x.new_zeros(B, R) if h0 is None else h0, []
    cell, c = x.new_zeros(B, H) if c0 is None else c0, []
    for step in steps:
        i, f, g, o = gates(rows[step], _time.first(h, step), w_ih, w_hh, b_ih, b_hh)
        c_t = f * _time.first(cell, step) + i * g
        m_t = o * torch.tanh(c_t)
        h_t = m_t if w_hr is None else m_t @ w_hr.T
        h, cell = _time.advance(h, h_t), _time.advance(cell, c_t)
        y.append(h_t)
        c.append(c_t)
    y, c = _time.join(y, reverse, R, x), _time.join(c, reverse, H, x)
    return y.reshape(*x.shape[:-1], R), h, cell, c.reshape(*x.shape[:-1], H)


def lstm_fwd(x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, *, return_cell_states, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    inputs = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
    with torch.no_grad():
        y, h_n, c_n, c = lstm(*inputs, **options)
    outputs = (y, h_n.clone(), c_n.clone())
    return (*outputs, c) if return_cell_states else outputs, (*inputs, y)


def lstm_bwd(saved, grads, *, needs, reverse, batch_sizes, return_cell_states):
    """Backpropagation through time; da is the gradient of what a gate's function is applied to:

    dh_t = dy_t + W_hh^T da_{t+1}             dm_t = dh_t, or W_hr^T dh_t with a projection
    dc_t = d(c_t as an output) + f_{t+1} dc_{t+1} + dm_t o (1 - tanh(c)^2)
    da_i = dc g i (1 - i)    da_f = dc c_{t-1} f (1 - f)    da_g = dc i (1 - g^2)
    da_o = dm tanh(c) o (1 - o)
    dW_hr = sum_t dh_t m_t^T;   the rest as in any recurrence
    """
    x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr = inputs = saved[:8]
    dy, dh_n, dc_n, dc_all = (*grads, None)[:4]
    H, R = w_hh.shape[0] // 4, w_hh.shape[1]
    rows, B, steps = _time.rows(x, batch_sizes, reverse)
    y, _, _, c = lstm(*inputs, reverse=reverse, batch_sizes=batch_sizes)
    y, c = y.reshape(-1, R), c.reshape(-1, H)
    zero_h, zero_c = x.new_zeros(B, R), x.new_zeros(B, H)
    h = _time.before(y, zero_h if h0 is None else h0, steps, reverse)
    before = _time.before(c, zero_c if c0 is None else c0, steps, reverse)
    i, f, g, o = gates(rows, h, w_ih, w_hh, b_ih, b_hh)
    tanh_c = torch.tanh(c)
    slope_c, slope_o = o * (1 - tanh_c**2), tanh_c * o * (1 - o)
    slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g**2)], 1)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(y.shape)
    dc_all = torch.zeros_like(c) if dc_all is None else dc_all.reshape(c.shape)

    dh, dc = zero_h if dh_n is None else dh_n, zero_c if dc_n is None else dc_n
    da, dr = [], []
    for step in reversed(steps):
        dh_t = dy[step] + _time.first(dh, step)
        dm_t = dh_t if w_hr is None else dh_t @ w_hr
        dc_t = dc_all[step] + _time.first(dc, step) + dm_t * slope_c[step]
        da_ifg = dc_t[:, None] * slopes[step]
        da.append(torch.cat([*da_ifg.unbind(1), dm_t * slope_o[step]], 1))
        dr.append(dh_t)
        dh, dc = _time.advance(dh, da[-1] @ w_hh), _time.advance(dc, dc_t * f[step])
    da, dr = _time.join(da, not reverse, 4 * H, y), _time.join(dr, not reverse, R, y)
    db = da.sum(0)
    dw_hr = None if w_hr is None else dr.T @ (o * tanh_c)
    dx = linear(da, w_ih.T).reshape(x.shape)
    return dx, da.T @ rows, da.T @ h, db, db.clone(), dh, dc, dw_hr
