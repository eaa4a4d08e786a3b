"""Times how the work grows with T, h, d and V, beside what `pykernels.cost` says of it.

    python benchmarks/scaling.py              every curve, some ten minutes
    python benchmarks/scaling.py --quick      short curves, briefly: seconds
    python benchmarks/scaling.py --curve rnn-T attention-T

A curve moves one size of an RNN, of self-attention or of a language model and keeps the others;
ours and stock torch run in turn at every point, after their results have been compared. The model's
line is the roofline: the counted operations at the rate of multiply-adds that registers reach, or
the compulsory bytes at the rate of a copy, both measured in the same run. Traffic that a cache
serves may beat the copy, arithmetic nothing. The exponent of a curve is the slope of its upper half
on logarithmic axes, to be read beside the model's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import environment
import gpu
import numpy as np
import records
import timing
import torch
import torch.nn.functional as F
from commandline import add_output, add_threads, make_parser, positive
from progress import make_console, progress
from rich.table import Table
from torch import Tensor
from workload import DTYPES, PASSES, Setting, copy_rate, count, fma_rate, full_precision

import pykernels.nn
from pykernels import cost
from pykernels.testing import evaluate
from pykernels.testing.specs import AttentionSpec, RNNSpec
from pykernels.testing.tolerance import Measured, measure

KEY = ("curve", "value", "pass", "dtype", "device", "threads", "implementation")
LAYERS = {"ours": pykernels.nn, "torch": torch.nn}
DTYPE = "float32"
#: Sizes of the models of curve "-V", and of the others where they stand still.
BATCH, STEPS, INPUT, HIDDEN, HEADS = 8, 50, 300, 512, 8


class LinearThenLoss(torch.nn.Linear):
    """Stock torch's way from vectors to their loss, through the logits."""

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x).flatten(0, 1), targets.flatten())


class Model(torch.nn.Module):
    """Tokens [B, T] to their loss as a language model: embedding, layer, output projection."""

    def __init__(self, layers: object, kind: str, V: int, E: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(V, E)
        self.kind = kind
        if kind == "rnn":
            self.layer = layers.RNN(E, HIDDEN, batch_first=True)
        else:
            self.layer = layers.MultiheadAttention(E, HEADS, batch_first=True)
        ours = layers is pykernels.nn
        head = pykernels.nn.LinearCrossEntropyLoss if ours else LinearThenLoss
        self.head = head(HIDDEN, V, bias=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.kind == "rnn":
            x, _ = self.layer(x)
        else:
            T = tokens.shape[1]
            hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            x, _ = self.layer(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)
        return self.head(x, targets)


@dataclass(frozen=True)
class ModelPoint:
    """A `Model` of V words, with the calls, checks and cost of a `workload.Setting`."""

    kind: str
    V: int
    device: str

    @property
    def width(self) -> int:
        return INPUT if self.kind == "rnn" else HIDDEN

    def _models(self) -> tuple[dict[str, Model], Tensor, Tensor]:
        torch.manual_seed(0)
        models = {
            name: Model(layers, self.kind, self.V, self.width) for name, layers in LAYERS.items()
        }
        models["ours"].load_state_dict(models["torch"].state_dict())
        tokens = torch.randint(self.V, (BATCH, STEPS + 1)).to(self.device)
        models = {name: model.to(self.device) for name, model in models.items()}
        return models, tokens[:, :-1], tokens[:, 1:]

    def check(self) -> dict[str, Measured]:
        """The loss and the gradient of every weight, by the one tolerance rule."""
        models, *tokens = self._models()
        truth = Model(torch.nn, self.kind, self.V, self.width).double().to(self.device)
        truth.load_state_dict(models["torch"].state_dict())
        found = {
            name: _loss_and_gradients(m, *tokens) for name, m in (*models.items(), ("", truth))
        }
        return {
            name: measure(found["ours"][name], exact, found["torch"][name])
            for name, exact in found[""].items()
        }

    def calls(self, which: str) -> dict[str, Callable[[], object]]:
        models, *tokens = self._models()

        def call(model: Model) -> Callable[[], object]:
            if which == "forward":
                model.eval()
                return torch.no_grad()(lambda: model(*tokens))
            return lambda: torch.autograd.grad(model(*tokens), list(model.parameters()))

        return {name: call(model) for name, model in models.items()}

    def cost(self, which: str) -> cost.Cost:
        if self.kind == "rnn":
            sizes = {"T": STEPS, "B": BATCH, "V": self.V, "d": INPUT, "h": HIDDEN}
            return cost.total(cost.recurrent_language_model("rnn", **sizes, which=which).values())
        rows = BATCH * STEPS
        layer = cost.multihead_attention(
            BATCH, STEPS, STEPS, HIDDEN, HEADS, is_causal=True, which=which
        )
        ends = [
            cost.embedding(rows, self.V, HIDDEN, which=which),
            cost.linear(rows, HIDDEN, self.V, which=which),
        ]
        return cost.total([layer, *ends])


@dataclass(frozen=True)
class OpPoint:
    """One op on one spec."""

    setting: Setting

    def check(self) -> dict[str, Measured]:
        return self.setting.check()

    def calls(self, which: str) -> dict[str, Callable[[], object]]:
        return {name: call for name, call in self.setting.calls(which).items() if name in LAYERS}

    def cost(self, which: str) -> cost.Cost:
        return count(self.setting.spec, which, DTYPES[DTYPE].itemsize)


Point = OpPoint | ModelPoint


def _loss_and_gradients(model: Model, *tokens: Tensor) -> dict[str, Tensor]:
    loss = model(*tokens)
    names, weights = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach()} | dict(
        zip(names, torch.autograd.grad(loss, weights), strict=True)
    )


def rnn(device: str, **moved: int) -> OpPoint:
    sizes = {"t": STEPS, "b": BATCH, "i": INPUT, "h": HIDDEN} | moved
    spec = RNNSpec(f"rnn-{moved}", "a point of a curve", **sizes, h0=False)
    return OpPoint(Setting(spec, DTYPE, device))


def attention(device: str, **moved: int) -> OpPoint:
    sizes = {"b": 1, "n": HEADS, "s_q": 512, "d": 64} | moved
    spec = AttentionSpec(f"attention-{moved}", "a point of a curve", **sizes)
    return OpPoint(Setting(spec, DTYPE, device))


@dataclass(frozen=True)
class Curve:
    """One size that moves, and what moves with it."""

    title: str
    values: tuple[int, ...]
    point: Callable[[int, str], Point]


VOCABULARIES = (500, 1000, 2000, 5000, 10_000, 20_000, 30_000)
#: By "<what>-<size that moves>"; the attention of h units has heads of 64.
CURVES = {
    "rnn-T": Curve(
        f"RNN: steps T (B={BATCH}, d={INPUT}, h={HIDDEN})",
        (16, 32, 64, 128, 256, 512, 1024),
        lambda T, device: rnn(device, t=T),
    ),
    "rnn-h": Curve(
        f"RNN: hidden units h (B={BATCH}, T={STEPS}, d={INPUT})",
        (64, 128, 256, 512, 1024, 2048),
        lambda h, device: rnn(device, h=h),
    ),
    "rnn-d": Curve(
        f"RNN: inputs d (B={BATCH}, T={STEPS}, h={HIDDEN})",
        (64, 128, 256, 512, 1024, 2048),
        lambda d, device: rnn(device, i=d),
    ),
    "rnn-V": Curve(
        f"RNN language model: vocabulary V (B={BATCH}, T={STEPS}, d={INPUT}, h={HIDDEN})",
        VOCABULARIES,
        lambda V, device: ModelPoint("rnn", V, device),
    ),
    "attention-T": Curve(
        f"attention: positions T (B=1, {HEADS} heads of 64)",
        (64, 128, 256, 512, 1024, 2048),
        lambda T, device: attention(device, s_q=T),
    ),
    "attention-h": Curve(
        "attention: width h, in heads of 64 (B=1, T=512)",
        (64, 128, 256, 512, 1024, 2048),
        lambda h, device: attention(device, n=h // 64),
    ),
    "attention-V": Curve(
        f"attention language model: vocabulary V (B={BATCH}, T={STEPS}, h={HIDDEN})",
        VOCABULARIES,
        lambda V, device: ModelPoint("attention", V, device),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = make_console()
    torch.set_num_threads(options.threads)
    full_precision()
    common = records.provenance(options.device)
    folder = records.SCRATCH if options.quick else records.KEPT
    path = options.output or records.default_path(common, "scaling", folder)
    cases = [
        (name, value, which)
        for name in options.curve
        for value in (CURVES[name].values[:2] if options.quick else CURVES[name].values)
        for which in PASSES
    ]
    rows: list[records.Row] = []
    failures: list[str] = []
    interrupted = False
    try:
        with progress(console, len(cases)) as advance:
            for name, value, which in cases:
                label = f"{name}={value} {which}"
                advance(label, 0)
                point = CURVES[name].point(value, options.device)
                if which == PASSES[0] and not _right(point, label, failures):
                    break
                new = measured(point, name, value, which, options)
                rows += [{**row, **common} for row in new]
                advance(f"{label}: " + ", ".join(summary(row) for row in new), 1)
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        records.merge(path, rows, KEY)
        console.print(table(rows))
        console.print(f"Rows written to {path}", soft_wrap=True)
    for failure in failures:
        console.print(f"WRONG, ended here: {failure}", style="red", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; what was measured until then is kept.")
        return 130
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--curve", nargs="+", choices=CURVES, default=[*CURVES], help="which curves (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add_threads(parser)
    add("--seconds", type=positive(float), help="to time one point (default: 2, with --quick 0.1)")
    add_output(parser, KEY)
    add("--quick", action="store_true", help="two points a curve, briefly; rough figures")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 2.0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    return options


def _right(point: Point, label: str, failures: list[str]) -> bool:
    wrong = {what: error for what, error in point.check().items() if not error.ok}
    failures += [
        f"{label} {what}: error {error.error:.2e}, allowed {error.limit:.2e}, "
        f"stock torch's {error.stock:.2e}"
        for what, error in wrong.items()
    ]
    evaluate.truth.cache_clear()  # the large ones are not needed twice
    evaluate.stock.cache_clear()
    return not wrong


def measured(
    point: Point, name: str, value: int, which: str, options: argparse.Namespace
) -> list[records.Row]:
    """Times one point; a row for each implementation."""
    counted = point.cost(which)
    rates: list[float] = []
    on_cpu = options.device == "cpu"
    samples = timing.interleave(
        point.calls(which),
        options.seconds,
        between=lambda: rates.extend(fma_rate(DTYPE, options.threads)) if on_cpu else None,
        clock=None if on_cpu else gpu.seconds,
    )
    # Whatever disturbs the measurement lowers it: the best of the five counts.
    best = cost.Machine(max(rates), copy_rate(options.threads)) if rates else None
    rows = []
    for implementation, sample in samples.items():
        low, high = sample.quartiles
        rows.append(
            {
                "curve": name,
                "value": str(value),
                "pass": which,
                "dtype": DTYPE,
                "device": options.device,
                "threads": str(options.threads),
                "implementation": implementation,
                "median_ms": f"{sample.median * 1e3:.5g}",
                "q1_ms": f"{low * 1e3:.5g}",
                "q3_ms": f"{high * 1e3:.5g}",
                "samples": str(len(sample.seconds)),
                "multiply_adds": str(counted.multiply_adds),
                "bytes": str(counted.bytes),
                "parameters": str(counted.parameters),
                "model_ms": f"{counted.floor(best) * 1e3:.5g}" if best else "",
                "fma_gflop_per_s": f"{best.flop_rate / 1e9:.4g}" if best else "",
                "copy_gbyte_per_s": f"{best.byte_rate / 1e9:.4g}" if best else "",
            }
        )
    return rows


def summary(row: records.Row) -> str:
    return f"{row['implementation']} {float(row['median_ms']):.3g} ms"


def exponent(rows: list[records.Row], column: str) -> float:
    """The slope of the upper half of a curve on logarithmic axes; nan of fewer than two points."""
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    if len(upper) < 2 or not upper[0][column]:
        return float("nan")
    sizes = np.log([float(row["value"]) for row in upper])
    return float(np.polyfit(sizes, np.log([float(row[column]) for row in upper]), 1)[0])


def curves(rows: list[records.Row]) -> dict[tuple[str, str], dict[str, list[records.Row]]]:
    """Rows by curve and pass, then by implementation, each in the order of its sizes."""
    found: dict[tuple[str, str], dict[str, list[records.Row]]] = {}
    for row in sorted(rows, key=lambda row: float(row["value"])):
        of_curve = found.setdefault((row["curve"], row["pass"]), {})
        of_curve.setdefault(row["implementation"], []).append(row)
    return {
        (name, which): found[name, which]
        for name in CURVES
        for which in PASSES
        if (name, which) in found
    }


def table(rows: list[records.Row]) -> Table:
    drawn = Table(caption="growth: t ~ size^exponent over the upper half of the sizes")
    for column in ("curve", "pass", "model", *LAYERS, "torch / ours, largest"):
        drawn.add_column(column, justify="left" if column in ("curve", "pass") else "right")
    for (name, which), by in curves(rows).items():
        ours, torchs = by["ours"], by["torch"]
        ratio = float(torchs[-1]["median_ms"]) / float(ours[-1]["median_ms"])
        drawn.add_row(
            name,
            which,
            f"{exponent(ours, 'multiply_adds'):.2f}",
            *(f"{exponent(by[each], 'median_ms'):.2f}" for each in LAYERS),
            f"{ratio:.2f}",
        )
    return drawn


if __name__ == "__main__":
    environment.hold()
    sys.exit(main())
