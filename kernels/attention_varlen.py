"""Attention of sequences that lie one behind the other: the kernels of `attention.py`, whose tiles
find their sequence by where those start.

No length is asked for on the host: as many programs start as tiles there may be, at most one more
for each sequence than there are.
"""

from collections.abc import Sequence

from torch import Tensor

from . import attention
from ._common import compute_dtype
from .attention import Places

DTYPES = attention.DTYPES
FEATURES = attention.FEATURES - {"mask_grad"}


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    *,
    band: tuple[int | None, int | None],
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Attention of each sequence and the log-sum-exp of its scores.

    Args:
        q: [T_q, N, D].
        k: [T_k, N_kv, D]; with `block_table` [P, page_size, N_kv, D].
        v: [T_k, N_kv, D_v]; with `block_table` [P, page_size, N_kv, D_v].
        cu_seqlens_q, cu_seqlens_k: [B + 1], the first row of each sequence, and the end.
        seqused_k: [B], how many keys of a sequence count; None for all.
        block_table: [B, pages], where the keys of a sequence are.
        sinks, alibi_slopes, seed, band, scale, softcap, dropout_p: as in `attention.attention_fwd`,
            of each sequence; with `ends_meet` the band and the own places of its queries are from
            where the last one stands at its last key.

    Returns:
        ``((out [T_q, N, D_v], lse [N, T_q]), saved)``; 0 and -inf in rows of no sequence.
    """
    given = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    heads, places = _as_heads((q, k, v), given, ends_meet)
    outputs, _ = attention.attention_fwd(
        *heads,
        None,
        sinks,
        alibi_slopes,
        seed,
        band=band,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        places=places,
    )
    out, lse = _as_rows(outputs[0]), outputs[1][0]
    return (out, lse), (q, k, v, sinks, alibi_slopes, seed, *given, out, lse)


def attention_varlen_extras(q: Tensor, *_: Tensor | None, **options: object) -> tuple[Tensor]:
    """Room for what `attention_varlen_fwd` saves behind out."""
    return (q.new_empty(q.shape[1::-1], dtype=compute_dtype(q.dtype)),)


def attention_varlen_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    band: tuple[int | None, int | None],
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and the sinks: zeros in rows of no sequence, and of keys that do not
    count."""
    q, k, v, *rule, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, out, lse = saved
    given = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    dout, dlse = grads
    heads, places = _as_heads((q, k, v), given, ends_meet)
    kept = (*heads, None, *rule, _as_head(out), lse[None])
    upstream = (
        None if dout is None else _as_head(dout),
        None if dlse is None else dlse[None],
    )
    *made, _, dsinks, _, _ = attention.attention_bwd(
        kept,
        upstream,
        band=band,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        needs=(*needs[:3], False, needs[3], False, False),
        places=places,
    )
    grads = (None if t is None else _as_rows(t) for t in made)
    return (*grads, dsinks, *(None for _ in saved[4:-2]))


def _as_head(rows: Tensor) -> Tensor:
    """[T, N, D] as [1, N, T, D]."""
    return rows.transpose(0, 1)[None]


def _as_rows(head: Tensor) -> Tensor:
    """[1, N, T, D] as [T, N, D], dense."""
    return head[0].transpose(0, 1).contiguous()


def _as_heads(
    tensors: tuple[Tensor, ...], given: Sequence[Tensor | None], ends_meet: bool
) -> tuple[list[Tensor], Places]:
    """q, k and v, or pages of them, as `attention` takes them, and where the sequences are."""
    q, *keys = tensors
    starts_q, starts_k, used, table = (None if t is None else t.contiguous() for t in given)
    size = 0
    if table is not None:
        size = keys[0].shape[1]
        keys = [t.flatten(0, 1) for t in keys]
    places = Places(starts_q, starts_k, used, table, size, ends_meet)
    return [_as_head(t) for t in (q, *keys)], places
