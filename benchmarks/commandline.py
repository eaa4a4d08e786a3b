"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import records
import torch


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, with the options after its first line."""
    title, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        description=title,
        epilog=rest.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=positive(int),
        default=torch.get_num_threads(),
        help="CPU threads (default: %(default)s)",
    )


def add_seconds(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=default,
        help=f"to time {what} (default: %(default)g)",
    )


def add_output(parser: argparse.ArgumentParser, key: Collection[str]) -> None:
    """`key`: the columns that tell the rows of this benchmark apart."""
    parser.add_argument(
        "--output",
        type=partial(result_file, key=key),
        help="CSV file (default: one a day and machine)",
    )


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an option that is a number above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError("must be positive and finite")
        return value

    parse.__name__ = kind.__name__  # which argparse says of what is no number
    return parse


def result_file(text: str, key: Collection[str]) -> Path:
    """The type of an option that names a file to write: what is wrong with it is said at once, and
    not after all has been measured.
    """
    path = Path(text)
    if path.exists():
        if path.is_file() and not os.access(path, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} cannot be written to")
        is_empty = path.is_file() and not path.stat().st_size
        return path if is_empty else kept_file(text, key)
    folder = next(each for each in path.absolute().parents if each.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{folder} is not a folder that can be written to")
    return path


def kept_file(text: str, key: Collection[str]) -> Path:
    """The type of an option that names a file with rows that such columns tell apart."""
    path = Path(text)
    try:
        rows = records.read(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or rows[0].keys() & records.IDENTITY != {*key}:
        raise argparse.ArgumentTypeError(f"{text} holds no rows of this benchmark")
    return path
