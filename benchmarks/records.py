"""What is kept: one CSV file a day and machine, one row a shape, pass and implementation."""

from __future__ import annotations

import csv
import datetime
import os
import re
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from pykernels import __main__ as about

HERE = Path(__file__).parent
KEPT = HERE / "results"
SCRATCH = HERE / "output"  # ignored by git: quick runs, which prove nothing

Row = dict[str, str]
#: What tells rows apart, in the files of all benchmarks together; those of each have their own.
IDENTITY = {
    *("op", "shape", "pass", "dtype", "device", "threads", "implementation", "backend"),
    *("spec", "tensor", "part", "curve", "value"),
}


def provenance(device: str = "cpu") -> Row:
    """The columns that every row ends with: when, where and by what it was made."""
    versions = about.versions()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": about.processor(),
        "cores": str(os.cpu_count()),
        "isa": about.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        **{name: versions[name] for name in ("python", "torch", "triton", "pykernels", "compiler")},
    }


def commit() -> str:
    """The commit of the code that runs, with a + where the code differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown"
    return head + (
        "+" if git("status", "--porcelain", "--", "csrc", "kernels", "pykernels") else ""
    )


def threads(count: int | str) -> str:
    return f"{count} thread{'' if int(count) == 1 else 's'}"


def commits(rows: list[Row]) -> str:
    """The commits that rows are of, in their order."""
    found = dict.fromkeys(row["commit"] for row in rows)
    return f"commit{'' if len(found) == 1 else 's'} {', '.join(found)}"


def number(text: str) -> str:
    """Three digits, or all that are before the point: 0.123, 12.3, 1,234."""
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: str) -> str:
    """A share in whole percent; what is less than one is not nothing."""
    return "<1%" if 0 < float(share) < 0.01 else f"{float(share):.0%}"


def default_path(row: Row, kind: str, folder: Path) -> Path:
    """<folder>/<date>-<processor>-<isa>-<kind>.csv"""
    where = row["gpu"] or f"{row['cpu']}-{row['isa']}"
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    return folder / f"{row['date'][:10]}-{slug}-{kind}.csv"


def newest(kind: str, folder: Path = KEPT) -> Path | None:
    """The kept file of "speed", "errors" ... with the newest row; None where there is none."""
    return max(folder.glob(f"*-{kind}.csv"), default=None, key=_date)


def of_gpus(folder: Path = KEPT) -> list[Path]:
    """The newest kept file of each GPU, the newest of them first."""
    oldest_first = sorted(folder.glob("*-gpu.csv"), key=_date)
    newest_of = {read(path)[0]["gpu"]: path for path in oldest_first}
    return sorted(newest_of.values(), key=_date, reverse=True)


def _date(path: Path) -> str:
    """That of a file's newest row."""
    return max(row["date"] for row in read(path))


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def merge(path: Path, rows: Iterable[Row], key: Iterable[str]) -> None:
    """Writes `rows` to `path`; a row there already is replaced where its `key` columns agree."""
    key = tuple(key)
    old = read(path) if path.exists() else []
    kept = {tuple(row[name] for name in key): row for row in (*old, *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as lines:
        columns = list(dict.fromkeys(name for row in kept.values() for name in row))
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


#: No mean counts shapes with these in their names: torch is given a window as a mask of all scores,
#: and one query is no sequence. A few such ratios would be most of the mean.
NOT_IN_MEANS = ("window", "decode")


def means(rows: list[Row]) -> dict[tuple[str, ...], tuple[int, float, float]]:
    """How many times as fast ours is, by geometric mean, for each op, dtype and pass.

    The number of shapes, and the means over them against torch and against the best peer. Those of
    attention are of whole sequences without a window, and say so in the op's place.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["implementation"] != "ours" or any(part in row["shape"] for part in NOT_IN_MEANS):
            continue
        op = row["op"] + (" (whole sequences, no window)" if row["op"] == "attention" else "")
        groups.setdefault((op, row["dtype"], row["pass"]), []).append(row)

    def mean(each: list[Row], ratio: str) -> float:
        return statistics.geometric_mean(float(row[ratio]) for row in each)

    return {
        group: (len(each), mean(each, "times_torch"), mean(each, "times_best_peer"))
        for group, each in groups.items()
    }
