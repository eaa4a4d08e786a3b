"""The Elman recurrence on a GPU: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu.

Only the product with W_hh lives in the time loop. W_ih goes over all T * B rows at once before it;
dx, dW_ih, dW_hh and db are large products over the gradients of the sums inside f after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common, _configs
from ._common import LAUNCH, TRITON_DTYPES, capability, compute_dtype, on_device_of, tanh
from ._product import long_product, product
from ._recurrence import recurrence

DTYPES = _common.DTYPES
FEATURES: frozenset[str] = frozenset()


@triton.jit
def _cell(z, aux, KIND: tl.constexpr):
    if KIND == "tanh":
        return tanh(z)
    else:
        return tl.where(z < 0, 0.0, z)  # not maximum, which drops a NaN


@triton.jit
def _cell_grad(dh, h, KIND: tl.constexpr):
    if KIND == "tanh":
        return dh * (1 - h * h)
    else:
        return tl.where(h <= 0, 0.0, dh)


@triton.jit
def rnn_fwd_kernel(
    z_ptr,  # [T, B, H], W_ih x + b_ih + b_hh; may be y itself
    w_hh_ptr,  # [H, H]
    h0_ptr,  # [B, H]
    y_ptr,  # [T, B, H]
    T,
    B,
    H,
    ACC: tl.constexpr,
    KIND: tl.constexpr,
    HAS_H0: tl.constexpr,
    REVERSE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    recurrence(
        z_ptr,
        None,
        h0_ptr,
        None,
        w_hh_ptr,
        y_ptr,
        T,
        B,
        H,
        1,  # M = W_hh^T
        H,
        CELL=_cell,
        KIND=KIND,
        ACC=ACC,
        HAS_INPUT=True,
        HAS_ADD=False,
        HAS_START=HAS_H0,
        HAS_AUX=False,
        FROM_END=REVERSE,
        RESIDENT=RESIDENT,
        BLOCK_B=BLOCK_B,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )


@triton.jit
def rnn_bwd_kernel(
    dy_ptr,  # [T, B, H]
    dh_n_ptr,  # [B, H]
    y_ptr,  # [T, B, H]
    w_hh_ptr,  # [H, H]
    dz_ptr,  # [T, B, H], gradients of the sums inside f
    T,
    B,
    H,
    ACC: tl.constexpr,
    KIND: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DH_N: tl.constexpr,
    REVERSE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    recurrence(
        dy_ptr,
        dh_n_ptr,
        None,
        y_ptr,
        w_hh_ptr,
        dz_ptr,
        T,
        B,
        H,
        H,  # M = W_hh
        1,
        CELL=_cell_grad,
        KIND=KIND,
        ACC=ACC,
        HAS_INPUT=HAS_DY,
        HAS_ADD=HAS_DH_N,
        HAS_START=False,
        HAS_AUX=True,
        FROM_END=not REVERSE,
        RESIDENT=RESIDENT,
        BLOCK_B=BLOCK_B,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )


def _loop_options(x: Tensor, H: int) -> tuple[tuple[int], dict[str, object]]:
    """The grid and the constants of a time loop."""
    config = _configs.recurrence(capability(x.device), x.dtype, H)
    options = {
        "ACC": TRITON_DTYPES[compute_dtype(x.dtype)],
        "RESIDENT": config.resident,
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **LAUNCH,
    }
    return (triton.cdiv(x.shape[1], config.block_b),), options


def rnn_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: None = None,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """The whole sequence.

    Args:
        x: [T, B, I].
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H], or None.
        h0: [B, H], or None for zeros.
        nonlinearity: "tanh" or "relu".
        reverse: walk from t = T - 1 to 0.
        batch_sizes: None, as no ragged batch is served.

    Returns:
        ``((y [T, B, H], h_n [B, H]), saved)``.
    """
    T, B, I = x.shape
    H = w_hh.shape[0]
    y = torch.empty(T, B, H, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        # The time loop overwrites each sum with its state where both have one dtype.
        acc = compute_dtype(x.dtype)
        z = y if acc == x.dtype else torch.empty_like(y, dtype=acc)
        flat = x.contiguous().view(T * B, I)
        product(flat, w_ih.t(), z.view(T * B, H), _dense(b_ih), _dense(b_hh))
        grid, options = _loop_options(x, H)
        with on_device_of(x):
            rnn_fwd_kernel[grid](
                z,
                w_hh.contiguous(),
                _dense(h0),
                y,
                T,
                B,
                H,
                KIND=nonlinearity,
                HAS_H0=h0 is not None,
                REVERSE=reverse,
                **options,
            )
    if T > 0:
        h_n = y[0 if reverse else T - 1].clone()
    else:
        h_n = x.new_zeros(B, H) if h0 is None else h0.clone()
    return (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y)


def rnn_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: None = None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Backward through time.

    Args:
        saved: what `rnn_fwd` returned: its six tensors, then y.
        grads: (dy [T, B, H], dh_n [B, H]), None for zeros.
        nonlinearity, reverse, batch_sizes: as in `rnn_fwd`.
        needs: which of the six gradients are wanted.

    Returns:
        ``(dx, dw_ih, dw_hh, db_ih, db_hh, dh0)``, None where not wanted.
    """
    x, w_ih, w_hh, _, _, h0, y = saved
    dy, dh_n = grads
    T, B, I = x.shape
    H = w_hh.shape[0]
    need_dx, need_dw_ih, need_dw_hh, need_db_ih, need_db_hh, need_dh0 = needs

    dz = torch.empty(T, B, H, dtype=x.dtype, device=x.device)
    if dz.numel() > 0:
        grid, options = _loop_options(x, H)
        with on_device_of(x):
            rnn_bwd_kernel[grid](
                _dense(dy),
                _dense(dh_n),
                y,
                w_hh.contiguous(),
                dz,
                T,
                B,
                H,
                KIND=nonlinearity,
                HAS_DY=dy is not None,
                HAS_DH_N=dh_n is not None,
                REVERSE=reverse,
                **options,
            )
    flat = dz.view(T * B, H)
    dx = dw_ih = dw_hh = db_ih = db_hh = dh0 = None
    if need_dx:
        dx = torch.empty(T, B, I, dtype=x.dtype, device=x.device)
        product(flat, w_ih, dx.view(T * B, I))
    if need_dw_ih:
        dw_ih = long_product([(flat.t(), x.contiguous().view(T * B, I))], like=w_ih)
    if need_dw_hh:
        # Step s multiplies the state of step s - 1: y moved by one step, h0 at the first.
        later, earlier = (dz[:-1], y[1:]) if reverse else (dz[1:], y[:-1])
        pairs = [(later.reshape(-1, H).t(), earlier.reshape(-1, H))]
        if h0 is not None and T > 0:
            pairs.append((dz[T - 1 if reverse else 0].t(), h0))
        dw_hh = long_product(pairs, like=w_hh)
    if need_db_ih or need_db_hh:
        db = flat.sum(0, dtype=compute_dtype(x.dtype)).to(x.dtype)
        db_ih = db if need_db_ih else None
        db_hh = db.clone() if need_db_hh else None
    if need_dh0:
        if T > 0:
            dh0 = torch.empty(B, H, dtype=x.dtype, device=x.device)
            product(dz[T - 1 if reverse else 0], w_hh, dh0)
        else:
            dh0 = x.new_zeros(B, H) if dh_n is None else dh_n.clone()
    return dx, dw_ih, dw_hh, db_ih, db_hh, dh0


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
