"""Times the CPU core's blocked product on one thread: C = A B, all [512, 512], packing included.

    python benchmarks/product.py

It is what every op's large products run on, and has no op of its own. Timed in turn with
torch.matmul, after a comparison; the share is that of the multiply-adds that registers alone reach,
measured in the same run.
"""

from __future__ import annotations

import argparse

import records
import timing
import torch
from commandline import add_output, add_seconds, make_parser
from progress import make_console
from workload import DTYPES

from pykernels import _backends
from pykernels.testing import assert_close, exact

N = 512
KEY = ("dtype", "implementation")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(1)
    extension = _backends.load_extension()
    common = records.provenance()
    path = options.output or records.default_path(common, "product", records.KEPT)
    rows = []
    for dtype in ("float32", "float64"):
        a, b = (torch.randn(N, N, dtype=DTYPES[dtype]) for _ in range(2))
        c = torch.full_like(a, torch.nan)
        pointers = [tensor.data_ptr() for tensor in (a, b, c)]
        rates: list[float] = []
        extension.gemm(dtype, N, N, N, *pointers)
        assert_close(c, exact.matmul(a.double(), b.double()), a @ b, "product")
        timed = timing.interleave(
            {
                "ours": lambda dtype=dtype, pointers=pointers: extension.gemm(
                    dtype, N, N, N, *pointers
                ),
                "torch": lambda a=a, b=b: a @ b,
            },
            options.seconds,
            between=lambda dtype=dtype, rates=rates: rates.append(
                extension.fma_rate(dtype, 1, 0.02)
            ),
        )
        for implementation, samples in timed.items():
            low, high = samples.quartiles
            share = 2 * N**3 / samples.median / max(rates)
            rows.append(
                {
                    "dtype": dtype,
                    "implementation": implementation,
                    "median_ms": f"{samples.median * 1e3:.5g}",
                    "q1_ms": f"{low * 1e3:.5g}",
                    "q3_ms": f"{high * 1e3:.5g}",
                    "samples": str(len(samples.seconds)),
                    "fma_gflop_per_s": f"{max(rates) / 1e9:.4g}",
                    "fma_share": f"{share:.4g}",
                    **common,
                }
            )
            console.print(
                f"{dtype} {implementation:6} {samples.median * 1e3:.3f} ms "
                f"[{low * 1e3:.3f}, {high * 1e3:.3f}], {share:.1%} of the multiply-add rate",
                markup=False,
            )
    records.merge(path, rows, KEY)
    console.print(f"Rows written to {path}", soft_wrap=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_seconds(parser, 10.0, "one dtype")
    add_output(parser, KEY)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
