"""Attention of sequences of different lengths, one behind the other: each of them by itself.

Rows begin[b] to begin[b + 1] of q are sequence b. Its keys and values lie so too, or, through a
table of pages, in pages of a few rows each. Axes: T_q, T_k rows of all sequences, N heads, D head
dim, B sequences.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from pykernels.reference import attention as one

DTYPES = one.DTYPES
FEATURES = one.FEATURES - {"mask_grad"}


def attention_varlen(*tensors, **options):
    """``out [T_q, N, D_v]`` and ``lse [N, T_q]``; differentiable by autograd.

    Rows behind the last sequence get out = 0 and lse = -inf.
    """
    q, _, v = tensors[:3]
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[-1])], [q.new_zeros(q.shape[1], 0)]
    for _, _, given, own in sequences(tensors, **options):
        out, lse = one.attention(*given, return_lse=True, **own)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    lse = torch.cat(lses, 1)
    behind = q.shape[0] - lse.shape[1]
    return padded(outs, q.shape[0]), F.pad(lse, (0, behind), value=-math.inf)


def attention_varlen_fwd(*tensors, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    with torch.no_grad():
        out, lse = attention_varlen(*tensors, **options)
        lse = lse.to(torch.promote_types(out.dtype, torch.float32))
    return (out, lse), (*tensors, out, lse)


def attention_varlen_extras(q, *others, **options):
    """See `pykernels._backends` for the contract."""
    return (q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32)),)


def attention_varlen_bwd(saved, grads, *, needs, **options):
    """The gradients of each sequence, put together; those of the sinks are added up."""
    *tensors, out, _ = saved
    q, k, v, sinks = tensors[:4]
    places = tensors[6:]
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = [q[:0]], [k[:0]], [v[:0]]
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    for b, rows, given, own in sequences(tensors, **options):
        upstream = heads_first(dout[rows]), None if dlse is None else dlse[None, :, rows]
        kept = (*given, heads_first(out[rows]), None)
        needed = (True, True, True, False, sinks is not None, False, False)
        found = one.attention_bwd(kept, upstream, needs=needed, **own)
        dq.append(found[0][0].transpose(0, 1))
        owned = slot(places, b).stop - slot(places, b).start
        for grad, parts in ((found[1], dk), (found[2], dv)):
            parts.append(padded([grad[0].transpose(0, 1)], owned))
        dsinks = None if sinks is None else dsinks + found[4]
    dq, dk, dv = padded(dq, q.shape[0]), padded(dk, k.shape[0]), padded(dv, v.shape[0])
    return dq, dk, dv, dsinks, None, None, *(None for _ in places)


def padded(parts, rows):
    """The parts one behind the other, and zeros behind them."""
    whole = torch.cat(parts)
    return F.pad(whole, (0, 0, 0, 0, 0, rows - whole.shape[0]))


def sequences(tensors, *, band, ends_meet, dropout_p=0.0, **options):
    """(b, its rows of q, what `attention` takes for it, with what options) of each sequence b.

    With `ends_meet` the band, and the own places of ALiBi, are from where the last query stands at
    the last key.
    """
    q, k, v, sinks, alibi_slopes, seed, *places = tensors
    cu_seqlens_q, _, seqused_k, block_table = places
    starts = cu_seqlens_q.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        if block_table is None:
            keys, values = k[slot(places, b)], v[slot(places, b)]
        else:
            pages = block_table[b, : -(-int(seqused_k[b]) // max(1, k.shape[1]))].long()
            keys, values = (pool[pages].flatten(0, 1) for pool in (k, v))
        if seqused_k is not None:
            keys, values = keys[: seqused_k[b]], values[: seqused_k[b]]
        shift = keys.shape[0] - (end - begin) if ends_meet else 0
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() > 1:
            slopes = slopes[b : b + 1]
        given = (*map(heads_first, (q[begin:end], keys, values)), None, sinks, slopes, seed)
        own = {"band": tuple(None if x is None else x + shift for x in band), "diagonal": shift}
        if dropout_p:
            own |= {"dropout_p": dropout_p, "sequence": b}
        yield b, slice(begin, end), given, options | own


def slot(places, b):
    """The rows of sequence b in k and v."""
    starts = places[1]
    return slice(0, 0) if starts is None else slice(int(starts[b]), int(starts[b + 1]))


def heads_first(rows):
    """``[S, N, D]`` as ``[1, N, S, D]``."""
    return rows.transpose(0, 1)[None]
