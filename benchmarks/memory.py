"""Prints the peak memory, in bytes, of one training step of a recurrent layer, in a fresh process.

    python benchmarks/memory.py <pykernels or torch> <rnn, gru or lstm> T B I H threads

Counted is the resident set at its peak, during forward and backward, beyond what it was before,
when input, weights and upstream gradients were there already. Linux alone tells the peak of a
moment; nothing is printed elsewhere.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

PROC = Path("/proc/self")


def main() -> None:
    library, op = sys.argv[1:3]
    T, B, I, H, threads = map(int, sys.argv[3:])
    torch.set_num_threads(threads)
    layer = getattr(importlib.import_module(f"{library}.nn"), op.upper())
    step(layer, 2, 1, 3, 4)()  # loads what is loaded once
    measured = step(layer, T, B, I, H)
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
