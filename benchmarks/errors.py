"""Measures the error of ours and of stock torch against the reference in float64, spec by spec.

    python benchmarks/errors.py                   every spec, in every dtype that ours serves
    python benchmarks/errors.py --op rnn --dtype bfloat16

One row an output or gradient; the exit code is 1 where the tolerance rule is broken. The large
shapes are left out in float64: the exact products of the truth would take long.
"""

from __future__ import annotations

import argparse
import sys

import records
import torch
from commandline import add_output, add_threads, make_parser
from progress import make_console, progress
from workload import DTYPES, SPECS, Setting, full_precision

from pykernels import _backends
from pykernels.testing.specs import Spec

KEY = ("op", "spec", "dtype", "tensor", "backend", "device")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(options.threads)
    full_precision()
    common = records.provenance(options.device)
    path = options.output or records.default_path(common, "errors", records.KEPT)
    chosen = choose(options)
    rows: list[records.Row] = []
    broken: list[str] = []
    interrupted = False
    try:
        with progress(console, len(chosen)) as advance:
            for spec, dtype in chosen:
                setting = Setting(spec, dtype, options.device, options.backend)
                for tensor, measured in setting.check().items():
                    if not measured.ok:
                        broken.append(
                            f"{spec.name} {dtype} {tensor}: error {measured.error:.2e}, "
                            f"allowed {measured.limit:.2e}, stock torch's {measured.stock:.2e}"
                        )
                    rows.append(
                        {
                            "op": spec.op,
                            "spec": spec.name,
                            "dtype": dtype,
                            "tensor": tensor,
                            "backend": setting.backend_of("ours"),
                            "device": options.device,
                            "error": f"{measured.error:.3e}",
                            "torch_error": f"{measured.stock:.3e}",
                            "limit": f"{measured.limit:.3e}",
                            "scale": f"{measured.scale:.3e}",
                            **common,
                        }
                    )
                advance(f"{spec.name} {dtype}", 1)
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        records.merge(path, rows, KEY)
        better = sum(float(row["error"]) <= float(row["torch_error"]) for row in rows)
        console.print(
            f"{len(rows)} tensors: {better} at most as far from the truth as stock torch's, "
            f"{len(broken)} beyond the tolerance rule. Rows written to {path}",
            soft_wrap=True,
        )
    for line in broken:
        console.print(f"WRONG: {line}", style="red", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; what was measured until then is kept.")
        return 130
    return 1 if broken else 0


def choose(options: argparse.Namespace) -> list[tuple[Spec, str]]:
    """The specs and dtypes that were asked for and that the backend serves."""

    def served(spec: Spec, dtype: str) -> bool:
        if options.backend is None:
            return True
        name, kind = options.backend, DTYPES[dtype]
        return not _backends.refusal(name, spec.op, options.device, kind, spec.features(kind))

    return [
        (spec, dtype)
        for op in options.op
        for spec in SPECS[op]
        if options.shapes in spec.name
        for dtype in options.dtype
        if not ("bench" in spec.tags and dtype == "float64") and served(spec, dtype)
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--op", nargs="+", choices=SPECS, default=[*SPECS], help="which ops (default: all)")
    add("--shapes", default="", help="only specs whose name contains this")
    add("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES], help="which dtypes (default: all)")
    add("--backend", choices=_backends.BACKENDS, help="ours (default: the fastest)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add_threads(parser)
    add_output(parser, KEY)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    if not choose(options):
        parser.error("no spec has such a name and dtype on this backend")
    return options


if __name__ == "__main__":
    sys.exit(main())
