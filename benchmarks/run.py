"""Times our ops, stock torch, the naive reference and the peers on named shapes, in one run.

    python benchmarks/run.py                      every benchmark shape in float32
    python benchmarks/run.py --quick              a few shapes, briefly
    python benchmarks/run.py --op attention --shapes causal --dtype float32 bfloat16

A shape's name holds its sizes: T x B x I x H, steps, batch, inputs and hidden units, for recurrent
layers; B x heads x T x D for attention, and in decoding B x heads x 1 x S x D, one query on S keys;
rows x H x V, hidden units and words, for the loss. window256: a query sees 256 keys back.

Ours and torch share one thread pool and are timed in turn, round after round, after their results
have been compared: a kernel whose error breaks the tolerance rule of `pykernels.testing` is not
timed, and the exit code is 1. The share of the FMA floor is the arithmetic of the op (see
`pykernels.cost`) at the rate of multiply-adds that registers alone reach, over the time taken. That
rate is measured five times between the rounds; the best of the five counts, as whatever disturbs
the measurement can only lower it, so the share is never flattered.

The scratch is what our C++ kernels take beside inputs, outputs and what is kept for the backward
pass, at its most during one call. Geometric means over the shapes of an op close the table; those
of attention leave windows and decoding out. On a narrow terminal the table has fewer columns.

With ``PYKERNELS_ISA=avx2`` the others are held to AVX2 too, but for ONNX Runtime, which takes what
the processor has; and memory that is given back stays in the process (`environment.py`).

The peers (`peers.py`: ONNX Runtime and OpenVINO; recurrent layers and attention, forward) have a
process each and take part in the turns; one that is wrong by the same rule, or not installed, is
left out with a word.

    python benchmarks/run.py --device cuda        the GPU's shapes, in bfloat16

On a GPU (`gpu.py`) events on the device are the clock, and sets of inputs that its cache does not
hold together take turns. Large shapes are compared on fewer heads, rows and words than are timed.
Beside stock torch's default stand its attention backends by name and torch.compile of the loss. The
floor is the rate of torch's large matrix product in that dtype; the bytes that must be moved are
held against the rate of a copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import environment
import gpu
import peers
import records
import timing
import torch
from commandline import add_output, add_threads, make_parser, positive
from progress import make_console, progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from workload import (
    DTYPES,
    IMPLEMENTATIONS,
    PASSES,
    SPECS,
    Setting,
    fma_rate,
    full_precision,
    timed_on,
)

from pykernels import _backends

KEY = ("op", "shape", "pass", "dtype", "device", "threads", "implementation", "backend")
#: What ours is measured by; the best of them is the best peer.
RIVALS = ("torch", *gpu.PEERS, *peers.PEERS)

Case = tuple[Setting, str]  # and the pass


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(options.threads)
    full_precision()
    cases = choose(options)
    common = records.provenance(options.device)
    folder = records.SCRATCH if options.quick else records.KEPT
    kind = "gpu" if options.device == "cuda" else "speed"
    path = options.output or records.default_path(common, kind, folder)
    cpu = f"{common['cpu']}, {common['isa']} kernels, {records.threads(options.threads)}"
    console.print(
        f"{len(cases)} cases on {common['gpu'] if options.device == 'cuda' else cpu}, "
        f"torch {common['torch']}; about {len(cases) * options.seconds:.0f} s and the checks"
    )
    asked = {*options.peers} if options.device == "cpu" else set()
    for missing in sorted(asked - {*peers.installed()}):
        console.print(f"{missing} is not installed and left out; the extra [bench] has it")
    rows: list[records.Row] = []
    failures: list[str] = []
    left_out: list[str] = []
    interrupted = False
    try:
        with progress(console, len(cases)) as advance:
            for case in checked(cases, failures, advance):
                new = [{**row, **common} for row in measure(case, options, left_out)]
                records.merge(path, new, KEY)  # at once: what ends the run early ends no more
                rows += new
                advance(f"{name(case)}: {summary(new)}", 1)
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        console.print(fitting(rows, console))
        for line in means(rows):
            console.print(line, soft_wrap=True)
        console.print(f"Rows written to {path}", soft_wrap=True)
    for peer in left_out:
        console.print(f"Left out: {peer}", markup=False, soft_wrap=True)
    for failure in failures:
        console.print(f"WRONG, not timed: {failure}", style="red", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; what was measured until then is kept.")
        return 130
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--op", nargs="+", choices=SPECS, default=[*SPECS], help="which ops (default: all)")
    add("--shapes", default="", help="only shapes whose name contains this")
    add("--dtype", nargs="+", choices=DTYPES, help="which (default: float32, on cuda bfloat16)")
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=[*PASSES],
        help="which passes (default: both)",
    )
    add("--backend", choices=_backends.BACKENDS, help="ours (default: the fastest)")
    add(
        "--peers",
        nargs="*",
        choices=peers.PEERS,
        default=[*peers.PEERS],
        help="which peers (default: all; a bare --peers: none)",
    )
    add("--no-reference", action="store_true", help="do not time the naive reference")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add_threads(parser)
    add("--seconds", type=positive(float), help="to time one case (default: 4, with --quick 0.4)")
    add_output(parser, KEY)
    add("--quick", action="store_true", help="few shapes, briefly; the figures are rough")
    options = parser.parse_args(arguments)
    if options.dtype is None:
        options.dtype = ["bfloat16" if options.device == "cuda" else "float32"]
    if options.seconds is None:
        options.seconds = 0.4 if options.quick else 4.0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    chosen = choose(options)
    if not chosen:
        known = ", ".join(spec.name for op in options.op for spec in timed_on(options.device)[op])
        parser.error(f"--shapes {options.shapes!r} matches none of {known}")
    try:
        for setting, _ in chosen:
            setting.backend_of("ours")
    except ValueError as error:
        parser.error(str(error))
    return options


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases, with all passes of one shape and dtype together."""
    known = timed_on(options.device)
    return [
        (Setting(spec, dtype, options.device, options.backend), which)
        for op in options.op
        for spec in known[op]
        if options.shapes in spec.name and ("quick" in spec.tags or not options.quick)
        for dtype in options.dtype
        for which in options.passes
    ]


def checked(
    cases: Iterable[Case], failures: list[str], advance: Callable[[str, int], None]
) -> Iterator[Case]:
    """The cases whose results are right; what is wrong with the others goes to `failures`."""
    verdicts: dict[Setting, bool] = {}
    for case in cases:
        setting, _ = case
        if setting not in verdicts:
            advance(f"{setting.spec.name} {setting.dtype}: comparing the results", 0)
            wrong = {what: error for what, error in setting.check().items() if not error.ok}
            verdicts[setting] = not wrong
            failures += [
                f"{setting.spec.name} {setting.dtype} {what}: error {error.error:.2e}, "
                f"allowed {error.limit:.2e}, stock torch's {error.stock:.2e}"
                for what, error in wrong.items()
            ]
        if verdicts[setting]:
            advance(f"{name(case)}: timing", 0)
            yield case
        else:
            advance(f"{name(case)}: wrong results", 1)


def measure(case: Case, options: argparse.Namespace, left_out: list[str]) -> list[records.Row]:
    """Times one case; a row for each implementation. Why a peer has none goes to `left_out`."""
    with ExitStack() as stack:
        started = start_peers(case, options, left_out, stack)
        return measure_beside(started, case, options, left_out)


def start_peers(
    case: Case, options: argparse.Namespace, left_out: list[str], stack: ExitStack
) -> dict[str, peers.Peer]:
    """The peers whose results are right, until `stack` closes."""
    setting, which = case
    started = {}
    for each in options.peers if setting.takes_peers(which) else ():
        if each not in peers.installed():
            continue
        try:
            peer = stack.enter_context(setting.peer(each, options.threads))
        except (RuntimeError, EOFError) as error:
            left_out.append(f"{each}, {setting.spec.name}: {error}")
            continue
        wrong = {what: found for what, found in setting.check_peer(peer).items() if not found.ok}
        if not wrong:
            started[each] = peer
        left_out += [
            f"{each}, {setting.spec.name} {what}: error {found.error:.2e}, "
            f"allowed {found.limit:.2e}"
            for what, found in wrong.items()
        ]
    return started


def measure_beside(
    started: dict[str, peers.Peer],
    case: Case,
    options: argparse.Namespace,
    left_out: list[str],
) -> list[records.Row]:
    setting, which = case
    cpu = options.device == "cpu"
    rates = [] if cpu else [gpu.matrix_rate(DTYPES[setting.dtype])]

    def fma() -> None:
        if cpu:
            rates.extend(fma_rate(setting.dtype, options.threads))

    calls = setting.calls(which)
    if options.no_reference:
        del calls["reference"]
    for each in () if cpu else calls.keys() - {"ours", "torch"}:
        try:  # not every backend of torch serves every shape, and the naive scores may be too large
            calls[each]()
        except RuntimeError as error:
            del calls[each]
            left_out.append(f"{each}, {name(case)}: {str(error).partition(chr(10))[0]}")
    timed = timing.interleave(
        calls,
        options.seconds,
        slow=["reference"],
        apart={each: peer.seconds for each, peer in started.items()},
        rounds=3 if options.quick else 5,
        between=fma,
        clock=None if cpu else gpu.seconds,
    )
    held = scratch(calls["ours"]) if setting.backend_of("ours") == "cpp" else None
    cost = setting.cost(which)
    flops = cost.flops
    others = {each: samples.median for each, samples in timed.items() if each in RIVALS}
    best = min(others, key=others.get)
    rows = []
    for each, samples in timed.items():
        low, high = samples.quartiles
        rows.append(
            {
                "op": setting.spec.op,
                "shape": setting.spec.name,
                "pass": which,
                "dtype": setting.dtype,
                "device": options.device,
                "threads": str(options.threads),
                "implementation": each,
                "backend": setting.backend_of(each),
                "median_ms": f"{samples.median * 1e3:.5g}",
                "q1_ms": f"{low * 1e3:.5g}",
                "q3_ms": f"{high * 1e3:.5g}",
                "samples": str(len(samples.seconds)),
                "calls_a_sample": str(samples.calls),
                "times_torch": f"{timed['torch'].median / samples.median:.4g}",
                "best_peer": best,
                "times_best_peer": f"{others[best] / samples.median:.4g}",
                "peer_version": peers.installed().get(each, ""),
                "gflop": f"{flops / 1e9:.5g}",
                "gflop_per_s": f"{flops / samples.median / 1e9:.4g}",
                "fma_gflop_per_s": f"{max(rates) / 1e9:.4g}" if rates else "",
                "fma_share": f"{flops / samples.median / max(rates):.4g}" if rates else "",
                "scratch_mb": f"{held / 1e6:.4g}" if held is not None and each == "ours" else "",
                "copy_share": "" if cpu else f"{cost.bytes / samples.median / gpu.copy_rate():.4g}",
            }
        )
    return rows


def scratch(call: Callable[[], object]) -> int:
    """The most bytes that our C++ kernels held at once for themselves during a call."""
    extension = _backends.load_extension()
    extension.scratch_peak()  # what came before
    call()
    held: int = extension.scratch_peak()
    return held


def name(case: Case) -> str:
    setting, which = case
    return f"{setting.spec.name} {setting.dtype} {which}"


def summary(rows: list[records.Row]) -> str:
    by = {row["implementation"]: row for row in rows}
    return (
        f"ours {time(by['ours'])} ms, torch {time(by['torch'])} ms, "
        f"{float(by['ours']['times_torch']):.2f} times as fast"
    )


def time(row: records.Row, short: bool = True) -> str:
    """The median, and the width of the middle half of the samples in percent of it."""
    median = records.number(row["median_ms"])
    if short:
        return median
    if row["samples"] == "1":
        return f"{median} (-)"
    spread = (float(row["q3_ms"]) - float(row["q1_ms"])) / float(row["median_ms"])
    return f"{median} ({spread:.0%})"


def coloured(ratio: float) -> str:
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]"


def fitting(rows: list[records.Row], console: Console) -> Table:
    """The whole table where the console has room for its lines, else the short one."""
    whole = table(rows)
    needed = console.measure(whole, options=console.options.update_width(1000)).maximum
    return whole if needed <= console.width else table(rows, short=True)


def table(rows: list[records.Row], short: bool = False) -> Table:
    """One line a case; the dtype is named where there are several.

    A short one leaves out the spread, the scratch and all times but those of ours and torch.
    """
    beside = "" if short else ", and how wide the middle half of the samples is"
    drawn = Table(caption=f"times in ms: the median{beside}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cases: dict[tuple[str, ...], dict[str, records.Row]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["dtype"], row["pass"])
        cases.setdefault(key, {})[row["implementation"]] = row
    several = len({row["dtype"] for row in rows}) > 1
    drawn.add_column("shape", overflow="fold")  # what gives way where even this has no room
    drawn.add_column("pass", no_wrap=True)
    shown = [
        each
        for each in dict.fromkeys((*IMPLEMENTATIONS, *RIVALS))
        if any(row["implementation"] == each for row in rows)
        and (not short or each in ("ours", "torch"))
    ]
    ratios = ("torch\n/ ours", "best\npeer\n/ ours", "of FMA\nfloor")
    for column in (*shown, *ratios, *([] if short else ["scratch,\nMB"])):
        drawn.add_column(column, justify="right", no_wrap=True)
    before = None
    for (op, shape, dtype, which), by in cases.items():
        if before not in (None, op):
            drawn.add_section()
        before = op
        share = by["ours"]["fma_share"]
        times = [time(by[each], short) if each in by else "-" for each in shown]
        drawn.add_row(
            f"{shape} {dtype}" if several else shape,
            which,
            *times,
            *(coloured(float(by["ours"][ratio])) for ratio in ("times_torch", "times_best_peer")),
            f"{float(share):.0%}" if share else "-",
            *([] if short else [by["ours"]["scratch_mb"] or "-"]),
        )
    return drawn


def means(rows: list[records.Row]) -> Iterator[str]:
    """A line for each op, dtype and pass: how many times as fast ours is, by geometric mean."""
    for group, (count, torchs, bests) in records.means(rows).items():
        yield (
            f"{' '.join(group)}, mean of {count}: {torchs:.2f} times as fast as torch, "
            f"{bests:.2f} as the best peer"
        )


if __name__ == "__main__":
    environment.hold()
    sys.exit(main())
