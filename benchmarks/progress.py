"""What a person sees while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def make_console() -> Console:
    """Plain and wide where there is no terminal, so that a log keeps the table's lines whole."""
    return Console() if sys.stdout.isatty() else Console(width=200)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields advance(message, steps): a bar on a terminal, else a line for each finished step."""
    if not console.is_terminal:
        done = 0

        def say(message: str, steps: int) -> None:
            nonlocal done
            done += steps
            if steps:
                console.print(f"[{done}/{total}] {message}", markup=False, soft_wrap=True)

        yield say
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda message, steps: bar.update(task, description=message, advance=steps)
