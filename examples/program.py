"""What every example does: options, a progress bar, a picture, and a clean end on Ctrl-C."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import installed  # noqa: F401  (before what may be missing)
import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OUTPUT = Path(__file__).parent / "output"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all examples have; `doc` begins with what the program does."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, with tiny models")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def positive(value: str) -> int:
    """The type of an option that counts something."""
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def run(
    work: Callable[[argparse.Namespace, Console], int | None],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
) -> int:
    """Calls `work` with the options and a console; the exit status is its, or 130 on Ctrl-C."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    torch.backends.cudnn.allow_tf32 = False  # stock layers on a GPU: float32 as ours is
    try:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=OUTPUT).close()
    except OSError as error:
        parser.error(f"nothing can be written to {OUTPUT}: {error.strerror}")
    # Plain and wide where there is no terminal, so that a log keeps a table's lines whole.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        return work(options, console) or 0
    except KeyboardInterrupt as interrupt:
        console.print(f"\nInterrupted. {interrupt}".rstrip(), soft_wrap=True, highlight=False)
        return 130


@contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields advance(message), to be called `total` times: a bar on a terminal, else ten lines."""
    if console.is_terminal:
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda message: bar.update(task, advance=1, description=message)
        return
    done = 0

    def say(message: str) -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            console.print(f"{name}: step {done}/{total}, {message}", highlight=False)

    yield say


@contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Yields asked(): whether Ctrl-C was pressed, which waits so that a step is never cut in two.

    A second Ctrl-C does not wait.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def wait(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, wait)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float]]:
    """Yields peak(): the bytes that were taken at most since then; NaN where no system tells.

    On a CPU it is the resident set of the process, which Linux alone tells the peak of.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed but kept would be taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
    except OSError:
        before = math.nan
    yield lambda: resident("VmHWM") - before


def resident(name: str) -> float:
    """A number of bytes in /proc/self/status; NaN where there is no such line."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024.0 * int(x.split()[1]) for x in lines if x.startswith(f"{name}:")), math.nan)


def logarithmic(axis: Axes, values: Sequence[int]) -> None:
    """Makes x logarithmic, with `values` as its ticks, as they are read, and none between."""
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(values, [f"{value:,}" for value in values])


def save(console: Console, figure: Figure, name: str) -> None:
    """Saves the picture among the outputs and says where."""
    figure.set_layout_engine("constrained")
    figure.savefig(OUTPUT / name, dpi=150, bbox_inches="tight")
    plt.close(figure)
    console.print(f"Picture: {OUTPUT / name}\n", soft_wrap=True)
