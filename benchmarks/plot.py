"""Draws the newest kept results.

    python benchmarks/plot.py
    python benchmarks/plot.py --speed some.csv --errors other.csv --output folder

They become speed.png, errors.png and scaling.png in benchmarks/results, and a picture of each
GPU's, named as its file. Where files are named, they alone are drawn.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import records
import run
import scaling
import torch
from commandline import kept_file, make_parser
from errors import KEY as ERRORS_KEY

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

COLOURS = {"forward": "#1d4e89", "forward+backward": "#00a6a6"}
DTYPE_COLOURS = {
    "float64": "#6b7280",
    "float32": "#1d4e89",
    "bfloat16": "#d97706",
    "float16": "#00a6a6",
}
#: The program whose file a picture is drawn from, and what tells the rows of that apart.
SOURCES = {
    "speed": ("run.py", run.KEY),
    "gpu": ("run.py --device cuda", run.KEY),
    "errors": ("errors.py", ERRORS_KEY),
    "scaling": ("scaling.py", scaling.KEY),
}
#: What a share is of, in short and in full.
FLOORS = {"cpu": ("floor", "FMA floor"), "cuda": ("rate", "measured matrix rate")}
#: Errors beyond these, in ulp, are drawn at the edge: none at all, and those of a gradient that is
#: zero but for rounding, which are 10^15 ulp of it.
LEAST, MOST = 0.02, 1e4
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    for kind, (program, key) in SOURCES.items():
        parser.add_argument(
            f"--{kind}",
            type=partial(kept_file, key=key),
            help=f"CSV file of {program} (default: the newest kept)",
        )
    parser.add_argument(
        "--output", type=Path, default=records.KEPT, help="folder (default: benchmarks/results)"
    )
    options = parser.parse_args(arguments)
    for kind, device in (("speed", "cpu"), ("gpu", "cuda")):
        path = getattr(options, kind)
        if path and records.read(path)[0]["device"] != device:
            parser.error(f"--{kind}: {path} has no rows of a {device} device")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    kinds = {"speed": speed, "gpu": speed, "errors": errors, "scaling": growth}
    given = any(getattr(options, kind) for kind in kinds)
    drawn = 0
    for kind, draw in kinds.items():
        own = getattr(options, kind)
        for source in [own] if own else [] if given else kept(kind):
            target = options.output / f"{source.stem if kind == 'gpu' else kind}.png"
            with plt.rc_context(STYLE):
                figure = draw(records.read(source))
                figure.savefig(target, dpi=150, bbox_inches="tight")
                plt.close(figure)
            print(f"{source} -> {target}")
            drawn += 1
    if not drawn:
        print(f"There are no results in {records.KEPT}; benchmarks/run.py makes them.")
    return 0 if drawn else 1


def kept(kind: str) -> list[Path]:
    """The newest kept file of a kind, or of each GPU; none where there is none."""
    if kind == "gpu":
        return records.of_gpus()
    newest = records.newest(kind)
    return [] if newest is None else [newest]


def speed(rows: list[records.Row]) -> plt.Figure:
    """Bars of torch's time over ours, a pair a shape, each with its share of the floor."""
    ours = [row for row in rows if row["implementation"] == "ours"]
    first = ours[0]
    dtypes = {row["dtype"] for row in ours}
    cases: dict[str, dict[str, records.Row]] = {}
    for row in ours:
        label = row["shape"] if len(dtypes) == 1 else f"{row['shape']} {row['dtype']}"
        cases.setdefault(label, {})[row["pass"]] = row
    figure, axis = plt.subplots(figsize=(9.5, 1.2 + 0.52 * len(cases)))
    floor, floor_in_full = FLOORS[first["device"]]
    height = 0.38
    ratios = [float(row["times_torch"]) for row in ours]
    for place, by_pass in enumerate(cases.values()):
        for k, (which, colour) in enumerate(COLOURS.items()):
            if which not in by_pass:
                continue
            row = by_pass[which]
            ratio, y = float(row["times_torch"]), place + (k - 0.5) * height
            axis.barh(y, ratio - 1, height * 0.92, left=1, color=colour)
            share = f" · {float(row['fma_share']):.0%} of {floor}" if shows_share(row) else ""
            axis.text(max(ratio, 1) * 1.02, y, f"{ratio:.2f}x{share}", va="center", fontsize=8)
    axis.axvline(1, color="#b91c1c", linewidth=1.2)
    axis.set_xscale("log", base=2)
    least, most = min(0.5, min(ratios) / 1.2), max(2.0, max(ratios))
    axis.set_xlim(least, most * (most / least) ** 0.27)  # the longest bar leaves a label's room
    axis.set_ylim(-0.6, len(cases) - 0.4)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_yticks(range(len(cases)), list(cases))
    axis.invert_yaxis()
    axis.set_xlabel(
        "stock torch's time over ours (log scale): right of the red line ours is faster;\n"
        f"beside the bars, the share of the {floor_in_full} that ours reaches, if 1% or more"
    )
    kind = f"{first['dtype']}, " if len(dtypes) == 1 else ""
    above = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axis.annotate("Speed against stock torch", xytext=(0, 20), weight="bold", **above)
    axis.annotate(f"{kind}{where(ours)}", xytext=(0, 6), fontsize=8, **above)
    patches = [Patch(color=colour, label=which) for which, colour in COLOURS.items()]
    axis.legend(
        handles=patches,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=1.2,  # as high as the title, over the line below it
        ncols=2,
    )
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    return figure


def shows_share(row: records.Row) -> bool:
    """Whether a row has a share of the floor that is more than none."""
    return bool(row["fma_share"]) and float(row["fma_share"]) >= 0.01


def errors(rows: list[records.Row]) -> plt.Figure:
    """Our error over stock torch's, a dot for each output and gradient, in ulp of the largest."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = plt.subplots(1, len(ops), figsize=(5.4 * len(ops), 5), squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        scatter(axis, [row for row in rows if row["op"] == op])
        axis.set_title(op)
    axes[0][0].set_ylabel("error of ours, ulp of the largest value")
    figure.suptitle(f"Distance from the truth in float64: {where(rows)}", fontsize=11)
    return figure


def scatter(axis: Axes, rows: list[records.Row]) -> None:
    least, most = LEAST, 10.0
    for dtype, colour in DTYPE_COLOURS.items():
        eps = torch.finfo(getattr(torch, dtype)).eps
        pairs = np.array(
            [
                [
                    float(row[name]) / (eps * float(row["scale"]))
                    for name in ("torch_error", "error")
                ]
                for row in rows
                if row["dtype"] == dtype
                and float(row["scale"]) > 0
                and math.isfinite(float(row["torch_error"]))
            ]
        ).reshape(-1, 2)
        if len(pairs):
            shown = pairs.clip(least, MOST)
            most = max(most, np.nanmax(shown))
            dots = {"s": 14, "alpha": 0.5, "linewidths": 0, "clip_on": False}  # whole at the edge
            axis.scatter(*shown.T, color=colour, label=dtype, **dots)
    line = np.geomspace(least, min(most * 1.5, MOST), 200)
    top = min(line[-1] * 3, MOST)
    axis.plot(line, line, color="#111827", linewidth=1, label="as stock torch")
    axis.plot(line, 2 * line + 4, color="#b91c1c", linewidth=1.2, label="the limit: twice, + 4 ulp")
    axis.fill_between(
        line, 2 * line + 4, top, where=2 * line + 4 < top, color="#b91c1c", alpha=0.07, linewidth=0
    )
    axis.set(xscale="log", yscale="log", xlim=(least, line[-1]), ylim=(least, top))
    beyond = f", {MOST:,.0f} and more" if most == MOST else ""
    axis.set_xlabel(f"error of stock torch ({least:g} and less{beyond}: at the edge)")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def growth(rows: list[records.Row]) -> plt.Figure:
    """Time against the size that moves, a panel a curve, with the model's line below."""
    by_curve: dict[str, dict[str, dict[str, list[records.Row]]]] = {}
    for (name, which), by in scaling.curves(rows).items():
        by_curve.setdefault(name, {})[which] = by
    columns = min(4, len(by_curve))
    lines = math.ceil(len(by_curve) / columns)
    size = (4.4 * columns, 4.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(by_curve) :]:
        axis.axis("off")
    for axis, (name, passes) in zip(axes.flat, by_curve.items(), strict=False):
        moved = name.partition("-")[2]
        for which, by in passes.items():
            for implementation, points in by.items():
                style = "o-" if implementation == "ours" else "s:"
                slope = scaling.exponent(points, "median_ms")
                axis.plot(
                    *columns_of(points, "median_ms"),
                    style,
                    color=COLOURS[which],
                    markersize=4,
                    label=f"{implementation} {which}: {moved}^{slope:.2f}",
                )
            if points[0]["model_ms"]:
                slope = scaling.exponent(points, "model_ms")
                axis.plot(
                    *columns_of(points, "model_ms"),
                    color=COLOURS[which],
                    alpha=0.4,
                    linewidth=1,
                    label=f"model's floor of it: {moved}^{slope:.2f}",
                )
        axis.set(xscale="log", yscale="log", xlabel=moved, ylabel="ms")
        axis.set_xticks(columns_of(points, "value")[0])
        axis.xaxis.set_minor_locator(NullLocator())
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
        axis.set_title(scaling.CURVES[name].title.replace(" (", "\n("), fontsize=9)
        axis.grid(alpha=0.25)
        # below the panel: nowhere in it is there room beside the curves
        axis.legend(
            frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.26)
        )
    figure.suptitle(
        f"Measured time and the cost model, with exponents of growth: {where(rows)}", fontsize=11
    )
    figure.tight_layout()
    return figure


def columns_of(points: list[records.Row], name: str) -> tuple[list[float], list[float]]:
    return [float(row["value"]) for row in points], [float(row[name]) for row in points]


def where(rows: list[records.Row]) -> str:
    """The machine and versions that rows are of."""
    row = rows[0]
    machine = row["gpu"] if row["device"] == "cuda" else row["cpu"]
    threads = f", {records.threads(row['threads'])}" if "threads" in row else ""
    kernels = f", {row['isa']} kernels" if row["device"] == "cpu" else ""
    return f"{machine}{threads}{kernels}, torch {row['torch']}, {records.commits(rows)}"


if __name__ == "__main__":
    sys.exit(main())
