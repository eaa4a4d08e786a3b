"""Times what an eager call costs beside its kernel: checks, the choice of a backend, autograd.

    python benchmarks/overhead.py

Inputs are as small as can be, on one thread. The overhead is all that a call of the public function
takes but the time of the C++ function under it, which is timed on the very arguments of the call
(which includes to read and check the places of packed sequences and targets):
without gradients, with gradients (the call is recorded for autograd), and in training, where the
backward of the op's autograd Function is added, called as torch's engine calls it. What the engine
adds to any backward pass is not the op's: the whole with it stands beside, and stock torch's
equivalent. The least of the samples counts, as whatever else the machine does only adds to such
short times.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from unittest import mock

import records
import timing
import torch
from commandline import add_output, add_seconds, make_parser
from progress import make_console, progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as stock

import pykernels.nn
from pykernels import _backends, functional

#: What a call of a function may cost beside its kernel, microseconds, by the pass.
LIMITS = {"forward": 6.0, "forward with gradients": 15.0, "training": None}
#: What has no limit: it is more than one call.
LAYER = "nn.LSTM of two layers"
KEY = ("op", "pass")
#: What the names of calls end with that are timed under it. Copies in another dtype are made there
#: for ours and torch's, so they have no limit either.
AUTOCAST = " (autocast)"

#: Torch has nothing like these on a CPU: its plain attention stands beside them, for scale alone.
FOR_SCALE = ("attention_backward", "attention_varlen")

Call = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(1)
    common = records.provenance()
    path = options.output or records.default_path(common, "overhead", records.KEPT)
    cases = {
        (which, op): pair for which in LIMITS for op, pair in calls(which != "forward").items()
    }
    rows: list[records.Row] = []
    with progress(console, len(cases)) as advance:
        for (which, op), (ours, theirs) in cases.items():
            advance(f"{op}, {which}", 0)
            new = measured(which, op, ours, theirs, options.seconds)
            rows.append({**new, **common})
            advance(f"{op}, {which}: {new['overhead_us']} us", 1)
    records.merge(path, rows, KEY)
    table = Table(caption="microseconds; overhead = ours - kernel")
    columns = [column for column in rows[0] if column not in common]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)
    console.print(f"Rows written to {path}", soft_wrap=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_seconds(parser, 1.5, "one call")
    add_output(parser, KEY)
    return parser.parse_args(arguments)


def measured(which: str, op: str, ours: Call, theirs: Call, seconds: float) -> records.Row:
    """The figures of one call in one pass."""
    whole = {"whole": ours, "torch": theirs}
    if which == "training":
        whole = {name: functools.partial(trained, call) for name, call in whole.items()}
        ours = functools.partial(recorded, ours)
    with torch.autocast("cpu", enabled=op.endswith(AUTOCAST)):
        timed = timing.interleave({"ours": ours} | whole, seconds)
        took = {name: min(samples.seconds) * 1e6 for name, samples in timed.items()}
        if which == "training":
            took["ours"] -= bare(ours, seconds / 5) * 1e6
        took["kernel"] = kernels(ours, seconds / 5) * 1e6
    limit = None if op == LAYER or op.endswith(AUTOCAST) else LIMITS[which]
    row: dict[str, object] = {"op": op, "pass": which}
    row |= {"overhead_us": took["ours"] - took["kernel"]}
    row |= {"limit_us": "" if limit is None else limit}
    row |= {f"{name}_us": took[name] for name in took}
    return {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()}


def calls(grad: bool) -> dict[str, tuple[Call, Call]]:
    """By op: ours and stock torch's."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=grad)

    found: dict[str, tuple[Call, Call]] = {}
    x, h, c = made(1, 1, 2), made(1, 2), made(1, 2)
    for op, rows in (("rnn", 2), ("gru", 6), ("lstm", 8)):
        weights = [made(rows, 2), made(rows, 2), made(rows), made(rows)]
        hx = (h, c) if op == "lstm" else h
        flat = (h, c) if op == "lstm" else (h,)
        layer = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}[op]
        cell = {"rnn": torch.rnn_tanh_cell, "gru": torch.gru_cell, "lstm": torch.lstm_cell}[op]
        states = tuple(t[None] for t in flat) if op == "lstm" else h[None]
        rest = (weights, True, 1, 0.0, False, False, False)
        found[op] = (
            functools.partial(getattr(functional, op), x, *weights, *flat),
            functools.partial(layer, x, states, *rest),
        )
        found[f"{op}_cell"] = (
            functools.partial(getattr(functional, f"{op}_cell"), x[0], hx, *weights),
            functools.partial(cell, x[0], hx, *weights),
        )
    q, rows = made(1, 1, 1, 2), made(1, 1, 2)
    sdpa = functools.partial(stock.scaled_dot_product_attention, q, q, q)
    own = functional.scaled_dot_product_attention
    found["attention"] = functools.partial(functional.attention, q, q, q), sdpa
    found["scaled_dot_product_attention"] = functools.partial(own, q, q, q), sdpa
    found[f"scaled_dot_product_attention{AUTOCAST}"] = found["scaled_dot_product_attention"]
    if not grad:  # one Function's backward is not that of both layers
        two = [library.LSTM(2, 2, num_layers=2) for library in (pykernels.nn, torch.nn)]
        run = [torch.no_grad()(functools.partial(layer, made(1, 1, 2))) for layer in two]
        found[LAYER] = run[0], run[1]
    if not grad:  # its own gradient is a formula, not a kernel
        lse = made(1, 1, 1)
        found["attention_backward"] = (
            functools.partial(functional.attention_backward, q, q, q, q, q, lse),
            sdpa,
        )
    found["attention_varlen"] = (
        functools.partial(functional.attention_varlen, rows, rows, rows, torch.tensor([0, 1])),
        sdpa,
    )
    x, weight, target = made(1, 2), made(2, 2), torch.tensor([1])
    found["linear_cross_entropy"] = (
        functools.partial(functional.linear_cross_entropy, x, weight, target),
        lambda: stock.cross_entropy(stock.linear(x, weight), target),
    )
    return found


def first(call: Call) -> Tensor:
    """The first output of a call."""
    found = call()
    while not isinstance(found, Tensor):
        found = found[0]
    return found


def recorded(call: Call, backward: Callable[..., object] | None = None) -> None:
    """A forward pass, and the backward of its Function without torch's engine; or another."""
    out = first(call)
    node = out.grad_fn
    backward = backward or node._forward_cls.backward
    grads: list[Tensor | None] = [None] * len(node._input_metadata)
    grads[out.output_nr] = upstream(out.shape)
    with torch.no_grad():
        backward(node, *grads)


def bare(ours: functools.partial[None], seconds: float) -> float:
    """Seconds that `recorded` takes beside the two passes of a call."""
    out = first(*ours.args)
    run = functools.partial(recorded, lambda: out, lambda *_: None)
    return min(timing.interleave({"bare": run}, seconds)["bare"].seconds)


def trained(call: Call) -> None:
    """A forward pass, and torch's backward."""
    out = first(call)
    out.backward(upstream(out.shape))


@functools.cache
def upstream(shape: torch.Size) -> Tensor:
    """The gradient of an output, made once."""
    return torch.ones(shape)


def kernels(call: Call, seconds: float) -> float:
    """Seconds that a call is in C++ kernels; each is timed while the call goes on, for its memory
    is the call's.
    """
    extension, spent = _backends.load_extension(), []

    def spy(real: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            timed = timing.interleave({"kernel": functools.partial(real, *args)}, seconds)
            spent.append(min(timed["kernel"].seconds))
            return real(*args)

        return run

    with contextlib.ExitStack() as patched:
        for name in dir(extension):
            if name.endswith(("_forward", "_backward")):
                real = getattr(extension, name)
                patched.enter_context(mock.patch.object(extension, name, spy(real)))
        call()
    return sum(spent)


if __name__ == "__main__":
    main()
