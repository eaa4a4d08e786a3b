"""Fills the blocks of README.md that no hand writes: what is supported, how fast, how exact.

    python benchmarks/readme.py             writes them
    python benchmarks/readme.py --check     exits with 1 where the README is not current

The support table comes from the backends and from the list of specs that tests run through; figures
come from the newest kept files in benchmarks/results. A block lies between <!-- begin:name --> and
<!-- end:name -->.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import records
import torch
from commandline import make_parser
from overhead import FOR_SCALE
from workload import DTYPES, IMPLEMENTATIONS, SPECS

from pykernels import _backends
from pykernels.testing.specs import ATTENTION_VARLEN_SPECS, Spec

README = Path(__file__).parent.parent / "README.md"
NO_RESULTS = "No results are kept yet: `make bench` makes them."
NO_GPU_RESULTS = (
    "No figures of a GPU are kept yet: `make gpu` makes them on a machine that has one."
)

RECURRENT: dict[str, Callable[[Spec], bool]] = {
    "backwards in time": lambda s: s.reverse,
    "without bias": lambda s: not s.bias,
    "initial state and its gradient": lambda s: s.h0,
    "no step, or an empty batch": lambda s: s.t == 0 or s.b == 0,
    "any strides": lambda s: s.layout != "contiguous",
}
#: What a spec must have to count as a case of the line.
CAPABILITIES: dict[str, dict[str, Callable[[Spec], bool]]] = {
    "rnn": {
        "tanh": lambda s: s.nonlinearity == "tanh",
        "relu": lambda s: s.nonlinearity == "relu",
        **RECURRENT,
    },
    "gru": RECURRENT,
    "lstm": RECURRENT | {"all cell states": lambda s: s.return_cell_states},
    "attention": {
        "full": lambda s: s.band == (None, None) and s.mask is None,
        "causal": lambda s: s.is_causal,
        "boolean mask, broadcast": lambda s: s.mask == "bool",
        "additive mask, broadcast": lambda s: s.mask == "float" and not s.learned,
        "lengths of queries and keys differ": lambda s: s.s_q != s.s_k,
        "grouped or shared key heads": lambda s: s.n != s.n_kv,
        "queries that see no key": lambda s: s.dead_rows or s.s_k == 0,
        "log-sum-exp and its gradient": lambda s: True,
        "any strides": lambda s: s.layout != "contiguous",
    },
    "attention_varlen": {
        "causal": lambda s: s.is_causal,
        "grouped or shared key heads": lambda s: s.n != s.n_kv,
        "slots that are not full": lambda s: s.used and not s.page_size,
        "pages of keys and values (no gradient)": lambda s: s.page_size,
        "queries that see no key": lambda s: s.name.endswith(("blind", "empty", "used")),
        "any strides": lambda s: s.layout != "contiguous",
    },
    "linear_cross_entropy": {
        "mean": lambda s: s.reduction == "mean",
        "sum": lambda s: s.reduction == "sum",
        "a loss for each row": lambda s: s.reduction == "none",
        "without bias": lambda s: not s.bias,
        "ignored targets": lambda s: s.ignored > 0,
        "label smoothing": lambda s: s.label_smoothing > 0,
        "class weights": lambda s: s.class_weight,
        "z-loss": lambda s: s.z_loss > 0,
        "log-sum-exp and its gradient": lambda s: s.return_lse,
        "no row": lambda s: 0 in s.lead,
        "any strides": lambda s: s.layout != "contiguous",
    },
}
PROVED = SPECS | {"attention_varlen": ATTENTION_VARLEN_SPECS}
NO_TORCH = {("torch_us", op) for op in FOR_SCALE}
FEATURES = {
    "ragged": "sequences of different lengths",
    "projection": "projected state",
    "v_head_dim": "values of another head size",
    "large_head": "head dims above 256 (float64: 128)",
    "mask_grad": "learned additive mask",
    "dropout": "dropout",
    "softcap": "capped scores",
    "sinks": "sinks",
    "alibi": "ALiBi slopes",
    "window": "window, causal rule aligned at the last key",
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if old == new:
        print("README.md is current.")
        return 0
    if options.check:
        print("README.md is not current: run `make readme`.")
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md is written.")
    return 0


def render(text: str) -> str:
    """`text` with every block filled."""
    blocks = {
        "support": support,
        "means": means,
        "speed": speed,
        "decoding": decoding,
        "memory": memory,
        "overhead": overhead,
        "scaling": growth,
        "gpu": gpu,
        "accuracy": accuracy,
    }
    for name, fill in blocks.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        block = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"README.md must hold {begin} ... {end} once")
        filled = f"{begin}\n{fill()}\n{end}"
        text = block.sub(lambda _, filled=filled: filled, text)
    return text


def support() -> str:
    """What each backend serves, and how many specs prove it: a table an op."""
    return "\n\n".join("\n".join(support_of(op)) for op in PROVED)


def support_of(op: str) -> list[str]:
    modules = [
        _backends.module(name, op) if _backends.has(name, op) else None
        for name in _backends.BACKENDS
    ]

    def served(cases: list[Spec]) -> list[str]:
        return [
            yes(module is not None and any(needs(spec) <= module.FEATURES for spec in cases))
            for module in modules
        ]

    lines = row(f"`{op}`", *(f"`{name}`" for name in _backends.BACKENDS), "cases", first=True)
    lines += row("dtypes", *map(dtypes, modules), "")
    for line, has in CAPABILITIES[op].items():
        cases = [spec for spec in PROVED[op] if has(spec)]
        lines += row(line, *served(cases), len(cases))
    features = [frozenset() if module is None else module.FEATURES for module in modules]
    for feature in (feature for feature in FEATURES if feature in frozenset().union(*features)):
        cases = [spec for spec in PROVED[op] if feature in needs(spec)]
        lines += row(
            FEATURES[feature],
            *(yes(feature in each) for each in features),
            len(cases) or "own test",
        )
    return lines


def needs(spec: Spec) -> frozenset[str]:
    return spec.features(torch.float32)


def dtypes(module: ModuleType | None) -> str:
    if module is None:
        return "none yet"
    return ", ".join(name for name, dtype in DTYPES.items() if dtype in module.DTYPES)


def yes(served: bool) -> str:
    return "yes" if served else "no"


def means() -> str:
    """The geometric means of the newest kept speeds."""
    path = records.newest("speed")
    if path is None:
        return NO_RESULTS
    lines = row("op", "dtype", "pass", "shapes", "torch / ours", "best peer / ours", first=True)
    for group, (count, torchs, bests) in sorted(records.means(records.read(path)).items()):
        lines += row(*group, count, f"{torchs:.2f}", f"{bests:.2f}")
    return "\n".join(lines)


def speed() -> str:
    """The picture and the table of the newest kept speeds."""
    path = records.newest("speed")
    if path is None:
        return NO_RESULTS
    cases = by_case(path)
    peers = any(by["ours"].get("best_peer") for by in cases.values())
    timed = [name for name in IMPLEMENTATIONS if any(name in by for by in cases.values())]
    lines = row(
        "shape", "dtype", "pass", *(f"{name}, ms" for name in timed), "torch / ours",
        *["best peer / ours"][:peers], "share of FMA floor", first=True,
    )  # fmt: skip
    for key, by in cases.items():
        ours = by["ours"]
        times = (records.number(by[name]["median_ms"]) if name in by else "-" for name in timed)
        share = records.percent(ours["fma_share"]) if ours["fma_share"] else "-"
        best = ours.get("best_peer")
        beside = [f"{float(ours['times_best_peer']):.2f} ({best})" if best else "-"][:peers]
        lines += row(*key, *times, f"{float(ours['times_torch']):.2f}", *beside, share)
    return "\n".join([picture("speed"), *lines, "", made_by(path, records.read(path))])


def decoding() -> str:
    """The table of the newest kept times of decoding."""
    path = records.newest("decoding")
    if path is None:
        return NO_RESULTS
    rows = records.read(path)
    times: dict[str, dict[str, records.Row]] = {}
    for each in rows:
        times.setdefault(each["dtype"], {})[each["implementation"]] = each
    lines = row(
        "dtype", "ours, us", "torch, us", "reading alone, us", "torch / ours",
        "ours, of the read rate", first=True,
    )  # fmt: skip
    for dtype, by in times.items():
        median = {name: each["median_us"] for name, each in by.items()}
        lines += row(
            dtype,
            *(records.number(median[name]) for name in ("ours", "torch", "read")),
            f"{float(median['torch']) / float(median['ours']):.2f}",
            records.percent(by["ours"]["read_share"]),
        )
    return "\n".join([*lines, "", made_by(path, rows)])


def memory() -> str:
    """The table of the newest kept peaks of memory."""
    path = records.newest("recurrent")
    rows = [] if path is None else [r for r in records.read(path) if r["part"] == "memory"]
    if not rows:
        return NO_RESULTS
    peaks: dict[tuple[str, str], dict[str, records.Row]] = {}
    for each in rows:
        peaks.setdefault((each["op"], each["shape"]), {})[each["implementation"]] = each
    lines = row("shape", "ours, MB", "torch, MB", "torch / ours", first=True)
    for (op, shape), by in peaks.items():
        both = (records.number(by[name]["median"]) for name in ("ours", "torch"))
        ratio = by["ours"]["times_torch"]
        lines += row(f"{op}-{shape}", *both, f"{float(ratio):.2f}" if ratio else "-")
    return "\n".join([*lines, "", made_by(path, rows)])


def growth() -> str:
    """The picture of the newest kept curves."""
    path = records.newest("scaling")
    if path is None:
        return NO_RESULTS
    return "\n".join([picture("scaling"), made_by(path, records.read(path))])


def overhead() -> str:
    """The table of the newest kept overheads of calls."""
    path = records.newest("overhead")
    if path is None:
        return NO_RESULTS
    rows = records.read(path)
    times: dict[str, dict[str, records.Row]] = {}
    for each in rows:
        times.setdefault(each["op"], {})[each["pass"]] = each
    passes = dict.fromkeys(each["pass"] for each in rows)
    shown = {"overhead_us": "overhead", "whole_us": "whole call", "torch_us": "torch's"}
    lines = row(
        "call", *(f"{which}: {what}, us" for which in passes for what in shown.values()), first=True
    )
    for op, by in times.items():
        cells = (
            "-" if which not in by or (column, op) in NO_TORCH else by[which][column]
            for which in passes
            for column in shown
        )
        lines += row(op, *cells)
    return "\n".join([*lines, "", made_by(path, rows)])


def gpu() -> str:
    """The pictures and tables of the newest speeds kept of each GPU."""
    return "\n\n".join(map(of_gpu, records.of_gpus())) or NO_GPU_RESULTS


def of_gpu(path: Path) -> str:
    """The picture and the table of what is kept of one GPU."""
    lines = row(
        "shape", "dtype", "pass", "ours, ms", "torch, ms", "best peer / ours", "TFLOP/s",
        "share of the matrix rate", "share of the copy rate", first=True,
    )  # fmt: skip
    for key, by in by_case(path).items():
        ours, torchs = by["ours"], by["torch"]
        lines += row(
            *key,
            *(records.number(each["median_ms"]) for each in (ours, torchs)),
            f"{float(ours['times_best_peer']):.2f} ({ours['best_peer']})",
            f"{float(ours['gflop_per_s']) / 1e3:.3g}",
            *(records.percent(ours[share]) for share in ("fma_share", "copy_share")),
        )
    return "\n".join([picture(path.stem), *lines, "", made_by(path, records.read(path))])


def by_case(path: Path) -> dict[tuple[str, ...], dict[str, records.Row]]:
    """The rows of each shape, dtype and pass, by implementation."""
    cases: dict[tuple[str, ...], dict[str, records.Row]] = {}
    for each in records.read(path):
        key = (each["shape"], each["dtype"], each["pass"])
        cases.setdefault(key, {})[each["implementation"]] = each
    return cases


def accuracy() -> str:
    """The picture and a summary of the newest kept errors."""
    path = records.newest("errors")
    if path is None:
        return NO_RESULTS
    groups: dict[tuple[str, str], list[records.Row]] = {}
    for each in records.read(path):
        groups.setdefault((each["op"], each["dtype"]), []).append(each)
    lines = row(
        "op", "dtype", "outputs and gradients", "no further from the truth than torch",
        "largest error as a share of what is allowed", first=True,
    )  # fmt: skip
    for key, rows in groups.items():
        near = sum(float(r["error"]) <= float(r["torch_error"]) for r in rows)
        shares = [float(r["error"]) / float(r["limit"]) for r in rows if float(r["limit"]) > 0]
        lines += row(*key, len(rows), near, f"{max(shares, default=0):.0%}")
    return "\n".join([picture("errors"), *lines, "", made_by(path, records.read(path))])


def row(*cells: object, first: bool = False) -> list[str]:
    line = "| " + " | ".join(map(str, cells)) + " |"
    return [line, "|" + " --- |" * len(cells)] if first else [line]


def picture(name: str) -> str:
    """A Markdown image with an empty line below, once the picture is there."""
    path = records.KEPT / f"{name}.png"
    return f"![{name}]({path.relative_to(README.parent)})\n" if path.exists() else ""


def made_by(path: Path, rows: list[records.Row]) -> str:
    row = rows[0]
    machine = row["gpu"] if row.get("device") == "cuda" else f"{row['cpu']}, {row['isa']} kernels"
    threads = f", {records.threads(row['threads'])}" if "threads" in row else ""
    uses = f" with {row['torch_isa']}" if row.get("torch_isa") else ""
    dates = ", ".join(sorted({each["date"][:10] for each in rows}))
    return (
        f"Measured {dates} on {machine}{threads}, torch {row['torch']}{uses}, "
        f"{records.commits(rows)}; all of it in [{path.name}]({path.relative_to(README.parent)})."
    )


if __name__ == "__main__":
    sys.exit(main())
