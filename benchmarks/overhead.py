"""Times what an eager call costs beside its kernel: checks, the choice of a backend, autograd.

    python benchmarks/overhead.py

Inputs are as small as can be, on one thread. The overhead is the time of a call of the public
function less that of the backend's own `<op>_fwd` on what the call hands to it, in turn in one run;
stock torch's equivalent stands beside the call. The least of the samples counts, as whatever else
the machine does only adds to such short times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import records
import timing
import torch
from progress import make_console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as stock

from pykernels import functional
from pykernels.cpp import (
    attention,
    attention_backward,
    attention_varlen,
    gru,
    linear_cross_entropy,
    lstm,
    rnn,
)

SECONDS = 1.5
#: What a call may cost beside its kernel, microseconds.
LIMITS = {"forward": 6.0, "recorded": 15.0}
KEY = ("op", "pass")

Call = Callable[[], object]


def main() -> None:
    console = make_console()
    torch.set_num_threads(1)
    common = records.provenance()
    rows: list[records.Row] = []
    for which, limit in LIMITS.items():
        for op, (ours, theirs, kernel) in calls(grad=which == "recorded").items():
            timed = timing.interleave(
                {"ours": ours, "torch": theirs, "kernel": launched(ours, *kernel)}, SECONDS
            )
            took = {name: min(samples.seconds) * 1e6 for name, samples in timed.items()}
            row = {"op": op, "pass": which, "overhead_us": took["ours"] - took["kernel"]}
            row |= {"limit_us": limit} | {f"{name}_us": took[name] for name in took}
            shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
            rows.append({**shown, **common})
    records.merge(records.default_path(common, "overhead", records.KEPT), rows, KEY)
    table = Table(caption="microseconds; overhead = ours - kernel")
    columns = [column for column in rows[0] if column not in common]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)


def calls(grad: bool) -> dict[str, tuple[Call, Call, tuple[object, str]]]:
    """By op: ours, stock torch's, and where the launcher of its kernel is."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=grad)

    found: dict[str, tuple[Call, Call, tuple[object, str]]] = {}
    x, h, c = made(1, 1, 2), made(1, 2), made(1, 2)
    for module, rows in ((rnn, 2), (gru, 6), (lstm, 8)):
        op = module.__name__.rpartition(".")[2]
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
            (module, f"{op}_fwd"),
        )
        found[f"{op}_cell"] = (
            functools.partial(getattr(functional, f"{op}_cell"), x[0], hx, *weights),
            functools.partial(cell, x[0], hx, *weights),
            (module, f"{op}_fwd"),
        )
    q, rows = made(1, 1, 1, 2), made(1, 1, 2)
    sdpa = functools.partial(stock.scaled_dot_product_attention, q, q, q)
    own = functional.scaled_dot_product_attention
    launch = (attention, "attention_fwd")
    found["attention"] = functools.partial(functional.attention, q, q, q), sdpa, launch
    found["scaled_dot_product_attention"] = functools.partial(own, q, q, q), sdpa, launch
    lse = made(1, 1, 1)
    found["attention_backward"] = (
        functools.partial(functional.attention_backward, q, q, q, q, q, lse),
        sdpa,  # torch keeps its own to itself
        (attention_backward, "attention_backward_fwd"),
    )
    found["attention_varlen"] = (
        functools.partial(functional.attention_varlen, rows, rows, rows, torch.tensor([0, 1])),
        sdpa,  # torch has its varlen on GPUs alone
        (attention_varlen, "attention_varlen_fwd"),
    )
    x, weight, target = made(1, 2), made(2, 2), torch.tensor([1])
    found["linear_cross_entropy"] = (
        functools.partial(functional.linear_cross_entropy, x, weight, target),
        lambda: stock.cross_entropy(stock.linear(x, weight), target),
        (linear_cross_entropy, "linear_cross_entropy_fwd"),
    )
    return found


def launched(call: Call, module: object, name: str) -> Call:
    """The backend's function `name` on what `call` gives to it, without autograd."""
    with mock.patch.object(module, name, wraps=getattr(module, name)) as spy:
        call()
    args, options = spy.call_args
    return torch.no_grad()(functools.partial(getattr(module, name), *args, **options))


if __name__ == "__main__":
    main()
