"""Attention of sequences of different lengths, one behind the other: each of them by itself.

Rows begin[b] to begin[b + 1] of q are sequence b. Its keys and values lie so too, or, through a
table of pages, in pages of a few rows each. Axes: T_q, T_k rows of all sequences, N heads, D head
dim, B sequences.
"""

import itertools

import torch
import torch.nn.functional as F

from pykernels.reference import attention as one

DTYPES = one.DTYPES
FEATURES = one.FEATURES - {"mask_grad"}


def attention_varlen_fwd(q, k, v, sinks, alibi_slopes, seed, *places, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    tensors = (q, k, v, sinks, alibi_slopes, seed, *places)
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    for _, rows, given, own in sequences(tensors, **options):
        (out_b, lse_b), _ = one.attention_fwd(*given, **own)
        out[rows], lse[:, rows] = out_b[0].transpose(0, 1), lse_b[0]
    return (out, lse), (*tensors, out, lse)


def attention_varlen_bwd(saved, grads, *, needs, **options):
    """The gradients of each sequence, put together; those of the sinks are added up."""
    *tensors, out, _ = saved
    sinks, places = tensors[3], tensors[6:]
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = [], [], [], None if sinks is None else torch.zeros_like(sinks)
    for b, rows, given, own in sequences(tensors, **options):
        upstream = heads_first(dout[rows]), None if dlse is None else dlse[None, :, rows]
        kept = (*given, heads_first(out[rows]), None)
        needed = (True, True, True, False, sinks is not None, False, False)
        found = one.attention_bwd(kept, upstream, needs=needed, **own)
        dq.append(found[0][0].transpose(0, 1))
        unused = slot(places, b).stop - slot(places, b).start - given[1].shape[2]
        for grad, parts in ((found[1], dk), (found[2], dv)):
            parts.append(F.pad(grad[0].transpose(0, 1), (0, 0, 0, 0, 0, unused)))
        dsinks = None if sinks is None else dsinks + found[4]
    dq, dk, dv = (torch.cat(parts) if parts else None for parts in (dq, dk, dv))
    return dq, dk, dv, dsinks, None, None, *(None for _ in places)


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
            keys, values = (pool[block_table[b].long()].flatten(0, 1) for pool in (k, v))
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
