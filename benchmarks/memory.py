"""Prints the peak memory, in bytes, of one training step of a recurrent layer, in a fresh process.

    python benchmarks/memory.py pykernels lstm 50 32 300 512 2

Counted is the resident set at its peak, during forward and backward, beyond what it was before,
when input, weights and upstream gradients were there already. Linux alone tells the peak of a
moment; nothing is printed elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

PROC = Path("/proc/self")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=("pykernels", "torch"))
    parser.add_argument("op", choices=("rnn", "gru", "lstm"))
    sizes = ("T", "B", "I", "H")
    for name in (*sizes, "threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    layer = getattr(importlib.import_module(f"{given.library}.nn"), given.op.upper())
    step(layer, 2, 1, 3, 4)()  # loads what is loaded once
    measured = step(layer, *(getattr(given, name) for name in sizes))
    try:
        (PROC / "clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        measured()
        print(status("VmHWM") - before)
    except OSError:
        pass


def step(layer: type[torch.nn.Module], T: int, B: int, I: int, H: int):
    """A call that runs forward and backward, with every gradient."""
    module = layer(I, H)
    x, dy = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)

    def both() -> None:
        y, _ = module(x)
        y.backward(dy)

    return both


def status(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{name} is not told")


if __name__ == "__main__":
    main()
