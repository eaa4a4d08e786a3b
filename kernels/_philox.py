"""Random numbers as a function of where they are used: Philox4x32 with 7 rounds.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). The
numbers, and which of them is whose, are those of `csrc/core/philox.h` and the reference.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def philox(key_0, key_1, c0, c1, c2, c3):
    """Four words of 32 bits from a key and four counters, all uint32.

    Counters of sizes that broadcast do so as late as the rounds allow.
    """
    for _ in tl.static_range(ROUNDS):
        p = c0.to(tl.uint64) * 0xD2511F53
        q = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (q >> 32).to(tl.uint32) ^ c1 ^ key_0
        c1 = q.to(tl.uint32)
        c2 = (p >> 32).to(tl.uint32) ^ c3 ^ key_1
        c3 = p.to(tl.uint32)
        key_0 = (key_0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_1 = (key_1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def draw_of(head, seed_ptr, least, growth):
    """What `kept` takes for the weights of a head, which is numbered over the whole batch: a weight
    is dropped where its number is below `least`, and the others are to grow. Without a seed nothing
    of use."""
    seed = tl.full([], 0, tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    key_0 = (seed & WORD).to(tl.uint32)
    key_1 = ((seed >> 32) & WORD).to(tl.uint32)
    return key_0, key_1, head.to(tl.uint32), least, growth


@triton.jit
def kept(draw, rows, key_0, BLOCK_N: tl.constexpr):
    """Which weights [M, BLOCK_N] dropout keeps, of queries `rows` [M] and the keys from key_0 on.

    The number of query i and key j is word w of counter (16 blk + lane, i, head, 0), where
    j = 64 blk + 16 w + lane: all four words of a counter are used, if BLOCK_N is 64 or more. It is
    a power of two of at least 16, and key_0 a multiple of it.
    """
    seed_0, seed_1, head, least, _ = draw
    BLOCKS: tl.constexpr = max(BLOCK_N // 64, 1)
    WORDS: tl.constexpr = min(BLOCK_N // 16, 4)
    lanes = key_0 // 64 * 16 + tl.arange(0, 16 * BLOCKS)
    nothing = tl.full([], 0, tl.uint32)
    numbers = philox(
        seed_0, seed_1, lanes.to(tl.uint32)[None, :], rows.to(tl.uint32)[:, None], head, nothing
    )
    # a bit for each word, [M, BLOCKS, 1, 16], then for each key its own
    bits = tl.zeros([rows.shape[0], 16 * BLOCKS], tl.int32)
    for w in tl.static_range(4):
        bits += tl.where(numbers[w] >= least, 1 << w, 0)
    bits = bits.reshape([rows.shape[0], BLOCKS, 1, 16])
    bits = bits.broadcast_to([rows.shape[0], BLOCKS, WORDS, 16])
    words = key_0 % 64 // 16 + tl.arange(0, WORDS)
    bits = (bits >> words[None, None, :, None]) & 1
    return bits.reshape([rows.shape[0], BLOCK_N]) != 0
