"""Random numbers as a function of where they are used: Philox4x32 with 7 rounds.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import torch

ROUNDS = 7
WORD = 0xFFFFFFFF


def philox(seed, c0, c1, c2, c3):
    """Four words, each in [0, 2^32), from a 64-bit seed and four counters; int64 tensors."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c1, c2, c3 = (
            ((q >> 32) & WORD) ^ c1 ^ k0,
            q & WORD,
            ((p >> 32) & WORD) ^ c3 ^ k1,
            p & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def keep_mask(seed, dropout_p, B, N, S_q, S_k, sequence=0):
    """Which weights are kept, ``[B, N, S_q, S_k]``; each is dropped with probability `dropout_p`.

    The sequences b are numbered from `sequence` on. The word of weight (b, n, i, j) is word w of
    counter (16 blk + lane, i, b N + n, 0), where j = 64 blk + 16 w + lane: kernels draw for 64 keys
    at a time.
    """
    heads = (sequence * N + torch.arange(B * N, device=seed.device))[:, None, None]
    i = torch.arange(S_q, device=seed.device)[:, None]
    j = torch.arange(S_k, device=seed.device)
    counters = torch.broadcast_tensors(j // 64 * 16 + j % 16, i, heads)
    words = torch.stack(philox(seed, *counters, torch.zeros_like(counters[0])))
    drawn = words.gather(0, (j % 64 // 16).expand(1, B * N, S_q, S_k))
    return (drawn >= min(int(dropout_p * 2**32), WORD)).view(B, N, S_q, S_k)
