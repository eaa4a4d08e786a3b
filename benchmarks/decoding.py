"""Times decoding against the rate at which memory can be read: one query, 4096 keys, eight heads.

    python benchmarks/decoding.py

A model's layers have a cache of keys and values each, and a new token goes through them all: by the
time that it comes back to the first one, that is out of the processor's caches. Here too caches
take turns that are far larger together than the last level holds. Every key and value is read once,
and that is nearly all of the work: the floor is a loop that reads the same memory and does nothing
with it, on as many threads, timed in turn with ours and with stock torch.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import environment
import records
import timing
import torch
from commandline import add_output, add_seconds, add_threads, make_parser
from progress import make_console, progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as stock
from workload import DTYPES

from pykernels import _backends, functional
from pykernels.testing import assert_close

HEADS, KEYS, D = 8, 4096, 64
TIMED = ("float32", "bfloat16")
#: Bytes of all caches together.
TOTAL = 2**29
KEY = ("dtype", "threads", "implementation")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(options.threads)
    common = records.provenance()
    path = options.output or records.default_path(common, "decoding", records.KEPT)
    table = Table("dtype", "implementation", "us", "spread", "GB/s", "of the read rate")
    rows = []
    with progress(console, len(TIMED)) as advance:
        for dtype in TIMED:
            advance(f"{dtype}: timing, about {options.seconds:g} s", 0)
            with torch.no_grad():
                timed = timing.interleave(calls(DTYPES[dtype]), options.seconds)
            for implementation, samples in timed.items():
                row = row_of(samples, dtype, implementation, timed["read"], options.threads)
                rows.append({**row, **common})
                low, high = samples.quartiles
                spread = f"{(high - low) / samples.median:.0%}"
                share = f"{float(row['read_share']):.0%}"
                table.add_row(
                    dtype, implementation, row["median_us"], spread, row["gb_per_s"], share
                )
            advance(f"{dtype}: ours {timed['ours'].median * 1e6:.3g} us", 1)
    records.merge(path, rows, KEY)
    console.print(table)
    console.print(f"Rows written to {path}", soft_wrap=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_threads(parser)
    add_seconds(parser, 20.0, "one dtype")
    add_output(parser, KEY)
    return parser.parse_args(arguments)


def row_of(
    samples: timing.Samples, dtype: str, implementation: str, read: timing.Samples, threads: int
) -> records.Row:
    low, high = samples.quartiles
    moved = 2 * HEADS * KEYS * D * DTYPES[dtype].itemsize
    return {
        "dtype": dtype,
        "threads": str(threads),
        "implementation": implementation,
        "median_us": f"{samples.median * 1e6:.4g}",
        "q1_us": f"{low * 1e6:.4g}",
        "q3_us": f"{high * 1e6:.4g}",
        "samples": str(len(samples.seconds)),
        "gb_per_s": f"{moved / samples.median / 1e9:.4g}",
        "read_share": f"{read.median / samples.median:.4g}",
    }


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A token's attention in the next cache, and the reading of it alone, by implementation."""
    count = TOTAL // (2 * HEADS * KEYS * D * dtype.itemsize)
    caches = torch.randn(count, 2, 1, HEADS, KEYS, D).to(dtype)
    query = torch.randn(1, HEADS, 1, D).to(dtype)
    read, threads = _backends.load_extension().read, torch.get_num_threads()
    numbers = caches[0].nbytes // 4

    def attend(function: Callable[..., Tensor], cache: Tensor) -> Tensor:
        return function(query, *cache)

    ours, theirs = functional.scaled_dot_product_attention, stock.scaled_dot_product_attention
    truth = attend(lambda *qkv: theirs(*(t.double() for t in qkv)), caches[0])
    assert_close(attend(ours, caches[0]), truth, attend(theirs, caches[0]), "decoding")
    made = {
        "ours": [partial(attend, ours, cache) for cache in caches],
        "torch": [partial(attend, theirs, cache) for cache in caches],
        "read": [partial(read, threads, cache.data_ptr(), numbers) for cache in caches],
    }
    turns = itertools.cycle(range(count))
    return {name: timing.in_turn(each, turns) for name, each in made.items()}


if __name__ == "__main__":
    environment.hold()
    main()
