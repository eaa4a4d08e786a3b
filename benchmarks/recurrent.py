"""Times and weighs what the table of run.py does not show of the recurrent layers, beside torch's.

    python benchmarks/recurrent.py                      everything, in float32 on the CPU
    python benchmarks/recurrent.py --quick              the first shapes, briefly
    python benchmarks/recurrent.py --part ragged cells --op lstm

    cells      one step of RNNCell, GRUCell, LSTMCell
    ragged     sequences of different lengths, a valid token, against a token of a dense batch
    layers     two layers or two directions in one module, against one after the other
    streaming  a module in evaluation that is fed one step at a time
    memory     the peak of a training step, in a process of its own

Results are compared with torch's first: what breaks the tolerance rule of `pykernels.testing` is
not timed, and the exit code is 1. Turns and the share of the FMA floor are those of run.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import environment
import records
import timing
import torch
from commandline import add_output, add_threads, make_parser, positive
from progress import make_console, progress
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from workload import PASSES, RECURRENT, SPECS, fma_rate

import pykernels.nn
from pykernels import cost, functional
from pykernels.testing.evaluate import flat
from pykernels.testing.tolerance import measure

KEY = ("part", "op", "shape", "pass", "threads", "implementation")
LIBRARIES = {"ours": "pykernels", "torch": "torch"}
STATES = {"rnn": 1, "gru": 1, "lstm": 2}
STREAM_STEPS = 32  # steps a call, so that the state is carried on
MEMORY = Path(__file__).with_name("memory.py")

#: T, B, I, H; the first of each is the quick one.
SHAPES = {
    "cells": [(1, 1, 64, 64), (1, 32, 300, 512)],
    "ragged": [(50, 8, 128, 128), (50, 32, 300, 512)],
    "layers": [(50, 1, 300, 512), (50, 4, 300, 512), (1024, 1, 64, 64), (1024, 4, 64, 64)],
    "streaming": [(1, 1, 300, 512)],
    "memory": [
        tuple(spec.sizes[axis] for axis in "TBIH")
        for spec in reversed(SPECS["rnn"])
        if "bench" in spec.tags
    ],
}

Shape = tuple[int, int, int, int]
Count = Callable[[str], int]  # floating-point operations of a pass


@dataclass(frozen=True)
class Work:
    """One implementation on its tensors."""

    run: Callable[[], tuple[Tensor, ...]]
    leaves: list[Tensor]  # the input, the parameters
    upstream: list[Tensor]  # gradients of the outputs
    #: Gives the first output, and the gradient of the first leaf, the layout of the others'.
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def call(self, which: str) -> Callable[[], tuple[Tensor, ...]]:
        if which == "forward":
            return torch.no_grad()(self.run)
        return lambda: torch.autograd.grad(self.run(), self.leaves, self.upstream)

    def results(self, which: str) -> list[Tensor]:
        first, *rest = self.call(which)()
        return [self.view(first), *rest]


@dataclass(frozen=True)
class Way:
    """One implementation of a case."""

    build: Callable[[torch.dtype], Work]
    flops: Count
    stock: str = "torch"  # torch's way to the same result
    base: str = ""  # another way that its time is set beside, unit by unit


@dataclass(frozen=True)
class Case:
    """Ways to do the same, and in how many units each is counted."""

    part: str
    op: str
    shape: str
    unit: str
    ways: dict[str, Way]  # none: what is asked is the memory, not the time
    units: dict[str, int] = field(default_factory=dict)  # 1 where there is none
    passes: tuple[str, ...] = PASSES


Ways = dict[str, Way]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(options.threads)
    cases = [(case, which) for case in choose(options) for which in case.passes]
    common = records.provenance()
    folder = records.SCRATCH if options.quick else records.KEPT
    path = options.output or records.default_path(common, "recurrent", folder)
    rows: list[records.Row] = []
    failures: list[str] = []
    interrupted = False
    try:
        with progress(console, len(cases)) as advance:
            for case, which in cases:
                name = f"{case.part} {case.op} {case.shape} {which}"
                advance(name, 0)
                if wrong := check(case, which):
                    failures += [f"{name} {line}" for line in wrong]
                    advance(f"{name}: wrong results", 1)
                    continue
                new = (timed if case.ways else weighed)(case, which, options)
                rows += [each | common for each in new]
                advance(f"{name}: {summary(new)}", 1)
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        records.merge(path, rows, KEY)
        for drawn in tables(rows):
            console.print(drawn)
        console.print(f"Rows written to {path}", soft_wrap=True)
    for failure in failures:
        console.print(f"WRONG, not timed: {failure}", style="red", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; what was measured until then is kept.")
        return 130
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=[*PARTS], help="which parts (default: all)")
    add("--op", nargs="+", choices=RECURRENT, default=[*RECURRENT], help="which ops (default: all)")
    add(
        "--sizes",
        nargs=4,
        type=positive(int),
        metavar=("T", "B", "I", "H"),
        help="in place of the shapes",
    )
    add_threads(parser)
    add("--seconds", type=positive(float), help="to time one case (default: 2, with --quick 0.1)")
    add_output(parser, KEY)
    add("--quick", action="store_true", help="few shapes, briefly; the figures are rough")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 2.0
    return options


def choose(options: argparse.Namespace) -> Iterator[Case]:
    for part in options.part:
        shapes = [tuple(options.sizes)] if options.sizes else SHAPES[part]
        for op in options.op:
            for shape in shapes[:1] if options.quick else shapes:
                yield from PARTS[part](op, shape)


# --- the parts: Case(s) of one op and shape


def cells(op: str, shape: Shape) -> Iterator[Case]:
    _, B, I, H = shape

    def build(library: ModuleType, dtype: torch.dtype) -> Work:
        cell = seeded(getattr(library, f"{op.upper()}Cell"), dtype, I, H).eval()
        x, *states = draw(dtype, (B, I), *[(B, H)] * STATES[op])
        hx = tuple(states) if op == "lstm" else states[0]
        return work(lambda: flat(cell(x, hx)), [x, *states, *cell.parameters()])

    yield Case("cells", op, f"{B}x{I}x{H}", "step", both(build, counted(op, (1, B, I, H))))


def ragged(op: str, shape: Shape) -> Iterator[Case]:
    T, B, I, H = shape
    lengths = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    lengths[0] = T

    def rows(padded: Tensor) -> Tensor:
        """[T, B, ...] -> the valid steps [N, ...], as a PackedSequence keeps them."""
        return pack_padded_sequence(padded, lengths, enforce_sorted=False).data

    def parts(library: ModuleType, dtype: torch.dtype) -> tuple[torch.nn.Module, list[Tensor]]:
        layer = seeded(getattr(library, op.upper()), dtype, I, H)
        return layer, draw(dtype, (T, B, I), (T, B, H), *[(1, B, H)] * STATES[op])

    def dense(library: ModuleType, dtype: torch.dtype) -> Work:
        layer, (x, *upstream) = parts(library, dtype)
        return Work(lambda: flat(layer(x)), [x, *layer.parameters()], upstream)

    def packed(library: ModuleType, dtype: torch.dtype) -> Work:
        layer, (x, dy, *rest) = parts(library, dtype)
        shaped = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
        data = shaped.data.requires_grad_()
        sequence = PackedSequence(data, *shaped[1:])

        def run() -> tuple[Tensor, ...]:
            y, last = layer(sequence)
            return (y.data, *flat(last))

        return Work(run, [data, *layer.parameters()], [rows(dy), *rest])

    def padded(dtype: torch.dtype) -> Work:
        layer, (x, dy, *rest) = parts(pykernels.nn, dtype)
        weights, op_of = [*layer.parameters()], getattr(functional, op)
        return Work(
            lambda: flat(op_of(x, *weights, lengths=lengths)),
            [x, *weights],
            [dy, *(state[0] for state in rest)],
            view=rows,
        )

    full, valid = counted(op, shape), counted(op, shape, lengths=lengths.tolist())
    ways = {
        "ours dense": Way(partial(dense, pykernels.nn), full, "torch dense"),
        "ours lengths=": Way(padded, valid, "torch packed", "ours dense"),
        "ours packed": Way(partial(packed, pykernels.nn), valid, "torch packed", "ours dense"),
        "torch dense": Way(partial(dense, torch.nn), full, "torch dense"),
        "torch packed": Way(partial(packed, torch.nn), valid, "torch packed", "torch dense"),
    }
    tokens = {name: T * B if "dense" in name else int(lengths.sum()) for name in ways}
    yield Case("ragged", op, f"{T}x{B}x{I}x{H}", "token", ways, tokens)


def layers(op: str, shape: Shape) -> Iterator[Case]:
    T, B, I, H = shape
    for what, rest in (("2 layers", {"num_layers": 2}), ("2 directions", {"bidirectional": True})):

        def parts(library: ModuleType, dtype: torch.dtype, rest: dict = rest) -> tuple:
            layer = seeded(getattr(library, op.upper()), dtype, I, H, **rest)
            (x,) = draw(dtype, (T, B, I))
            return layer, x, [x, *layer.parameters()]

        def whole(library: ModuleType, dtype: torch.dtype, parts: Callable = parts) -> Work:
            layer, x, leaves = parts(library, dtype)
            return work(lambda: flat(layer(x)), leaves)

        def single(dtype: torch.dtype, parts: Callable = parts) -> Work:
            layer, x, leaves = parts(pykernels.nn, dtype)
            op_of, weights = getattr(functional, op), leaves[1:]
            first, second = weights[:4], weights[4:]

            def run() -> tuple[Tensor, ...]:
                y, *last = flat(op_of(x, *first))
                if layer.bidirectional:
                    z, *more = flat(op_of(x, *second, reverse=True))
                    y = torch.cat((y, z), -1)
                else:
                    y, *more = flat(op_of(y, *second))
                return (y, *(torch.stack(pair) for pair in zip(last, more, strict=True)))

            return work(run, leaves)

        count = counted(op, shape, (T, B, H if what == "2 layers" else I, H))
        ways = both(whole, count, base="ours one by one")
        ways["ours one by one"] = Way(single, count)
        yield Case("layers", op, f"{T}x{B}x{I}x{H} {what}", "call", ways)


def streaming(op: str, shape: Shape) -> Iterator[Case]:
    _, B, I, H = shape

    def build(library: ModuleType, dtype: torch.dtype) -> Work:
        layer = seeded(getattr(library, op.upper()), dtype, I, H).eval()
        (x,) = draw(dtype, (STREAM_STEPS, B, I))
        steps = x.detach().split(1)

        def run() -> tuple[Tensor, ...]:
            state = None
            for step in steps:
                y, state = layer(step, state)
            return (y, *flat(state))

        return work(run, [x])

    units = dict.fromkeys(LIBRARIES, STREAM_STEPS)
    ways = both(build, counted(op, (STREAM_STEPS, B, I, H)))
    yield Case("streaming", op, f"1x{B}x{I}x{H}", "step", ways, units, PASSES[:1])


def memory(op: str, shape: Shape) -> Iterator[Case]:
    yield Case("memory", op, "x".join(map(str, shape)), "", {}, passes=PASSES[1:])


PARTS = {
    "cells": cells,
    "ragged": ragged,
    "layers": layers,
    "streaming": streaming,
    "memory": memory,
}


# --- what they share


def seeded(kind: type[torch.nn.Module], dtype: torch.dtype, *sizes: int, **rest: object) -> Any:
    """A module with the same weights each time, rounded to float32 at every dtype."""
    torch.manual_seed(0)
    return kind(*sizes, **rest).to(dtype)


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """The same numbers each time; they take gradients."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def work(run: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> Work:
    """A `Work` with random upstream gradients."""
    with torch.no_grad():
        outputs = run()
    return Work(run, leaves, draw(outputs[0].dtype, *(out.shape for out in outputs)))


def both(build: Callable[[ModuleType, torch.dtype], Work], flops: Count, base: str = "") -> Ways:
    """Ours and torch's, built alike."""
    return {
        "ours": Way(partial(build, pykernels.nn), flops, base=base),
        "torch": Way(partial(build, torch.nn), flops),
    }


def counted(op: str, *shapes: Shape, **rest: Any) -> Count:
    """Floating-point operations of a pass over layers of such shapes."""
    return lambda which: sum(
        getattr(cost, op)(*shape, **rest, which=which).flops for shape in shapes
    )


# --- measuring


def check(case: Case, which: str) -> list[str]:
    """What is wrong with the results of ours."""
    wrong = []
    expected = {
        name: [
            case.ways[name].build(dtype).results(which) for dtype in (torch.float64, torch.float32)
        ]
        for name in {way.stock for way in case.ways.values()}
    }
    for name, way in case.ways.items():
        if way.stock == name:
            continue
        results = way.build(torch.float32).results(which)
        for place, triple in enumerate(zip(results, *expected[way.stock], strict=True)):
            # a state has an axis for layers in a module, and none in a function
            found = measure(*(t.reshape(triple[1].shape) for t in triple))
            if not found.ok:
                wrong.append(
                    f"{name}, result {place}: error {found.error:.2e}, allowed {found.limit:.2e}"
                )
    return wrong


def timed(case: Case, which: str, options: argparse.Namespace) -> list[records.Row]:
    """A row for each way."""
    rates: list[float] = []
    samples = timing.interleave(
        {name: way.build(torch.float32).call(which) for name, way in case.ways.items()},
        options.seconds,
        rounds=3 if options.quick else 5,
        between=lambda: rates.extend(fma_rate("float32", options.threads)),
    )
    unit = {name: each.median / case.units.get(name, 1) for name, each in samples.items()}
    rows = []
    for name, way in case.ways.items():
        taken, scale = samples[name], 1e6 / case.units.get(name, 1)
        rate = way.flops(which) / taken.median
        rows.append(
            row(case, which, options, name)
            | {
                "unit": f"us a {case.unit}",
                **quartiles([seconds * scale for seconds in taken.seconds]),
                "calls_a_sample": str(taken.calls),
                "times_torch": f"{unit[way.stock] / unit[name]:.4g}",
                "base": way.base,
                "times_base": f"{unit[way.base] / unit[name]:.4g}" if way.base else "",
                "gflop_per_s": f"{rate / 1e9:.4g}",
                "fma_gflop_per_s": f"{max(rates) / 1e9:.4g}" if rates else "",
                "fma_share": f"{rate / max(rates):.4g}" if rates else "",
            }
        )
    return rows


def weighed(case: Case, which: str, options: argparse.Namespace) -> list[records.Row]:
    """A row for each library; none where the system does not tell the peak."""
    found: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    # Memory as users find it: what is given back may leave the process.
    usual = {name: value for name, value in os.environ.items() if name not in environment.MEMORY}
    for _ in range(1 if options.quick else 3):
        for name, library in LIBRARIES.items():
            command = [library, case.op, *case.shape.split("x"), str(options.threads)]
            program = [sys.executable, MEMORY, *command]
            # In a session of its own it does not see Ctrl-C; it ends when this one waits no more.
            peak = subprocess.check_output(program, env=usual, text=True, start_new_session=True)
            found[name] += [int(peak) / 1e6] if peak else []
    if not all(found.values()):
        return []
    middle = {name: statistics.median(peaks) for name, peaks in found.items()}
    return [
        row(case, which, options, name)
        | {
            "unit": "MB",
            **quartiles(peaks),
            "times_torch": f"{middle['torch'] / middle[name]:.4g}" if middle[name] else "",
        }
        for name, peaks in found.items()
    ]


def row(case: Case, which: str, options: argparse.Namespace, name: str) -> records.Row:
    return {
        "part": case.part,
        "op": case.op,
        "shape": case.shape,
        "pass": which,
        "threads": str(options.threads),
        "implementation": name,
    }


def quartiles(values: list[float]) -> records.Row:
    samples = timing.Samples(1, values)
    low, high = samples.quartiles
    return {
        "median": f"{samples.median:.5g}",
        "q1": f"{low:.5g}",
        "q3": f"{high:.5g}",
        "samples": str(len(values)),
    }


def summary(rows: list[records.Row]) -> str:
    if not rows:
        return "this system does not tell the peak"
    return ", ".join(f"{r['implementation']} {records.number(r['median'])}" for r in rows) + (
        f" {rows[0]['unit']}"
    )


def tables(rows: list[records.Row]) -> Iterator[Table]:
    """A table a part, one line a way."""
    for part in dict.fromkeys(each["part"] for each in rows):
        chosen = [each for each in rows if each["part"] == part]
        drawn = Table(title=f"{part}: {chosen[0]['unit']}", title_justify="left", box=SIMPLE_HEAD)
        for column in ("op", "shape", "pass", "implementation"):
            drawn.add_column(column, overflow="fold")
        for column in ("median", "middle half", "torch / this", "of FMA floor"):
            drawn.add_column(column, justify="right")
        drawn.add_column("times as fast as" if any(each.get("base") for each in chosen) else "")
        before: list[str] = []
        for each in chosen:
            case = [each[name] for name in ("op", "shape", "pass")]
            share, base = each.get("fma_share"), each.get("base")
            drawn.add_row(
                *(case if case != before else [""] * 3),
                each["implementation"],
                records.number(each["median"]),
                f"{records.number(each['q1'])} .. {records.number(each['q3'])}",
                f"{float(each['times_torch']):.2f}" if each["times_torch"] else "-",
                f"{float(share):.0%}" if share else "-",
                f"{float(each['times_base']):.2f} {base}" if base else "",
            )
            before = case
        yield drawn


if __name__ == "__main__":
    environment.hold()
    sys.exit(main())
