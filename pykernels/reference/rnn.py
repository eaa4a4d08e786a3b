"""The Elman recurrence and its backpropagation through time, as the textbook writes them.

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    h_t = f(a_t),   f = tanh or relu

J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990), in the parametrisation of
``torch.nn.RNN``. Axes: T time, B batch, I input, H hidden.
"""

import torch

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES: frozenset[str] = frozenset()

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def rnn(x, w_ih, w_hh, b_ih=None, b_hh=None, h0=None, *, nonlinearity="tanh", reverse=False):
    """``y [T, B, H]`` and ``h_n [B, H]`` for ``x [T, B, I]``; differentiable by autograd."""
    f = ACTIVATIONS[nonlinearity]
    T, B, _ = x.shape
    h = x.new_zeros(B, w_hh.shape[0]) if h0 is None else h0
    bias = sum(b for b in (b_ih, b_hh) if b is not None)
    y = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = f(x[t] @ w_ih.T + h @ w_hh.T + bias)
        y[t] = h
    return torch.stack(y) if T else x.new_empty(0, B, w_hh.shape[0]), h


def rnn_fwd(x, w_ih, w_hh, b_ih, b_hh, h0, *, nonlinearity, reverse):
    """See `pykernels._backends` for the contract."""
    with torch.no_grad():
        y, h_n = rnn(x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity=nonlinearity, reverse=reverse)
    return (y, h_n.clone()), (x, w_ih, w_hh, h0, y)


def rnn_bwd(saved, grads, *, nonlinearity, reverse, needs):
    """Backpropagation through time, with delta_t = dL/da_t:

    dh_t    = dy_t + W_hh^T delta_{t+1}
    delta_t = dh_t * f'(a_t),   f' = 1 - h_t^2 (tanh) or [h_t > 0] (relu)
    dW_ih = sum_t delta_t x_t^T     dW_hh = sum_t delta_t h_{t-1}^T     db = sum_t delta_t
    dx_t  = W_ih^T delta_t          dh_0  = W_hh^T delta_1
    """
    x, w_ih, w_hh, h0, y = saved
    dy, dh_n = grads
    T, B, H = y.shape
    h0 = y.new_zeros(B, H) if h0 is None else h0
    steps = list(reversed(range(T)) if reverse else range(T))
    before = dict(zip(steps, [h0, *(y[t] for t in steps)], strict=False))

    dh = y.new_zeros(B, H) if dh_n is None else dh_n
    dx, dw_ih, dw_hh = torch.zeros_like(x), torch.zeros_like(w_ih), torch.zeros_like(w_hh)
    db = y.new_zeros(H)
    for t in reversed(steps):
        dh = dh if dy is None else dh + dy[t]
        delta = dh * (1 - y[t] ** 2) if nonlinearity == "tanh" else dh * (y[t] > 0)
        dx[t] = delta @ w_ih
        dw_ih += delta.T @ x[t]
        dw_hh += delta.T @ before[t]
        db += delta.sum(0)
        dh = delta @ w_hh
    return dx, dw_ih, dw_hh, db, db.clone(), dh
