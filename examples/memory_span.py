"""How far back four kinds of layers remember, and how far back their gradients reach.

    python examples/memory_span.py             some minutes on two cores
    python examples/memory_span.py --quick     seconds: to see that it runs, not what it learns
    python examples/memory_span.py --resume    goes on after Ctrl-C

Two questions are asked after k words of real text, Python's own language reference:

    <note> method  ...k words...  <recall>     which word stood behind <note>?     one of 16
    the methods that  ...k words...  <verb>    "is" or "are": what agrees?         one of 2

The words between have nouns of their own, which must not be mistaken for the one that is asked for.
One model of each kind learns both. A recurrence can learn only what its gradient tells it of: the
norm of dh_T/dh_t over the steps T - t between shows how far that is, in the trained models and in
plain RNNs whose W_hh shrinks or stretches every state. Clipping leaves that norm as it is; it keeps
the step of the weights small where the gradient has exploded. A step that takes such a gradient
whole throws the weights so far off that all states saturate: hardly a gradient comes back then, and
the model does no better than a guess.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import statistics
import sys
from dataclasses import asdict, dataclass

import models
import program
import text
import torch
import training
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import Checkpoint, Run

from pykernels.diagnostics import gradient_flow

ONE = ("object", "method", "name", "value", "type", "function", "statement", "argument")
MANY = tuple(f"{noun}s" for noun in ONE)
NOUNS = ONE + MANY
MARKS = ("<pad>", "<note>", "<recall>", "<verb>", "<other>", "the", "that", "is", "are")
TASKS = ("recall", "agreement")
GUESSED = (math.log(len(NOUNS)) + math.log(2)) / 2  # the loss of all answers being equally likely
#: By kind of layers; later ones are drawn smaller, so that those of equal values all show.
STYLES = {
    "rnn": {"color": "#d1495b", "marker": "o", "linestyle": "-", "markersize": 11},
    "gru": {"color": "#edae49", "marker": "s", "linestyle": "--", "markersize": 9},
    "lstm": {"color": "#00798c", "marker": "^", "linestyle": "-.", "markersize": 7},
    "transformer": {"color": "#4b2e83", "marker": "D", "linestyle": ":", "markersize": 4},
}


@dataclass(frozen=True)
class Sizes:
    """How much is learned and measured."""

    learned: tuple[int, ...]  # the k that models learn from
    asked: tuple[int, ...]  # the k that they are judged by
    width: int
    batch: int
    steps: int
    questions: int  # to judge by, for each k
    back: int  # steps that gradients are followed


FULL = Sizes((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64, 128, 256), 64, 64, 300, 512, 100)
QUICK = Sizes((1, 2, 4), (1, 2, 4, 8), 16, 8, 10, 32, 10)


class Questions:
    """Rows of words that end in a question, whose answer alone is a target."""

    def __init__(self, distances: tuple[int, ...], device: str, words: int = 500) -> None:
        learned, judged = text.paragraphs()
        streams = [re.findall("[a-z]+", " ".join(part).lower()) for part in (learned, judged)]
        common = [word for word, _ in collections.Counter(streams[0]).most_common(words)]
        self.words = list(dict.fromkeys([*MARKS, *NOUNS, *common]))
        self.number = {word: i for i, word in enumerate(self.words)}
        other = self.number["<other>"]
        self.learned, self.judged = (
            torch.tensor([self.number.get(word, other) for word in stream]) for stream in streams
        )
        self.distances, self.device = distances, device  # the k of `batch`

    def ask(
        self, task: str, k: int, B: int, draw: torch.Generator, stream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """B rows [B, T] with k words of `stream` before the question, and the answers [B]."""
        nouns = torch.randint(len(NOUNS), (B,), generator=draw)
        starts = torch.randint(len(stream) - k, (B, 1), generator=draw)
        between = stream[starts + torch.arange(k)]
        asked = torch.tensor([self.number[noun] for noun in NOUNS])[nouns]
        if task == "recall":
            # <pad> makes these rows as long as the others.
            before = [self._fill("<pad>", B), self._fill("<note>", B), asked]
            after, answers = "<recall>", asked
        else:
            before = [self._fill("the", B), asked, self._fill("that", B)]
            after = "<verb>"
            verbs = torch.tensor([self.number["is"], self.number["are"]])
            answers = verbs[(nouns >= len(ONE)).long()]
        rows = torch.cat([*(x[:, None] for x in before), between, self._fill(after, B)[:, None]], 1)
        return rows.to(self.device), answers.to(self.device)

    def _fill(self, word: str, B: int) -> Tensor:
        return torch.full((B,), self.number[word])

    def batch(self, B: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both questions at one distance, half of the rows each, [B, T]; targets as in `text`."""
        k = self.distances[int(torch.randint(len(self.distances), (), generator=draw))]
        halves = [self.ask(task, k, B // 2, draw, self.learned) for task in TASKS]
        rows, answers = (torch.cat(parts) for parts in zip(*halves, strict=True))
        targets = torch.full_like(rows, text.IGNORED)
        targets[:, -1] = answers
        return rows, targets


@torch.no_grad()
def accuracy(model: nn.Module, questions: Questions, sizes: Sizes, seed: int) -> Tensor:
    """The share of right answers, [tasks, distances], on text that was not learned from."""
    draw = torch.Generator().manual_seed(seed)
    shares = torch.zeros(len(TASKS), len(sizes.asked))
    for i, task in enumerate(TASKS):
        for j, k in enumerate(sizes.asked):
            rows, answers = questions.ask(task, k, sizes.questions, draw, questions.judged)
            said = model.head.logits(model.states(rows)[:, -1]).argmax(-1)
            shares[i, j] = (said == answers).float().mean()
    return shares


def reach(model: nn.Module, questions: Questions, sizes: Sizes) -> Tensor:
    """|d(last state)/d(state t)|, [T + 1], t = 0 first, on real text; as a share of the last.

    Attention has no states that follow each other: for it, it is |dy_T/dx_t| of the vectors x_t
    that its first block reads, and all of them are one step away. Estimated along random directions
    v, as E|v^T J|^2 = |J|^2.
    """
    rows = questions.judged[: 8 * sizes.back].view(8, -1).to(questions.device)
    x = model.embed(rows).detach()
    if isinstance(model.body, nn.RNNBase):
        norms = gradient_flow(model.body, x, samples=8).norms
    else:
        x.requires_grad_()
        last = model.body(x)[:, -1]
        draw = torch.Generator().manual_seed(0)
        squares = torch.zeros(x.shape[1], device=x.device)
        for _ in range(8):
            v = torch.randint(2, last.shape, generator=draw).to(last) * 2 - 1
            (dx,) = torch.autograd.grad(last, x, v, retain_graph=True)
            squares += dx.square().sum((0, 2))
        norms = (squares / (8 * len(rows))).sqrt()
    return norms.cpu() / norms[-1].cpu()


def plain_rnn(gain: float, questions: Questions, sizes: Sizes, seed: int) -> nn.Module:
    """An RNN model not yet trained, whose W_hh turns a state and stretches it `gain` times."""
    torch.manual_seed(seed)
    model = models.LanguageModel("ours", "rnn", len(questions.words), sizes.width)
    nn.init.orthogonal_(model.body.weight_hh_l0, gain)
    return model.to(questions.device)


def checkpoint(kind: str, sizes: Sizes, options: argparse.Namespace) -> Checkpoint:
    path = program.OUTPUT / f"memory_span-{kind}{'-quick' * options.quick}.pt"
    return Checkpoint(path, {**asdict(sizes), "seed": options.seed}, options.resume)


def learn(
    kind: str,
    questions: Questions,
    sizes: Sizes,
    checkpoint: Checkpoint,
    options: argparse.Namespace,
    console: Console,
) -> nn.Module:
    """A model of one kind that has learned both questions, or goes on where it was interrupted."""
    torch.manual_seed(options.seed)
    model = models.LanguageModel("ours", kind, len(questions.words), sizes.width)
    runs = {kind: Run.of(model.to(options.device))}
    with program.progress(console, kind, sizes.steps) as advance:
        training.train(
            runs,
            questions.batch,
            advance,
            B=sizes.batch,
            steps=sizes.steps,
            rate=5e-3,
            seed=options.seed,
            checkpoint=checkpoint,
        )
    return model


def clipping(questions: Questions, sizes: Sizes, seed: int, console: Console) -> dict[str, Run]:
    """An RNN that begins with an exploding gradient, trained by plain steps, clipped and not.

    Both take the rate at which the clipped one learns well.
    """
    runs = {}
    for name, clip in (("clipped", 0.5), ("not clipped", math.inf)):
        model = plain_rnn(2.0, questions, sizes, seed)
        runs[name] = Run(model, torch.optim.SGD(model.parameters()), clip)
    with program.progress(console, "clipping", sizes.steps) as advance:
        training.train(
            runs,
            questions.batch,
            advance,
            B=sizes.batch,
            steps=sizes.steps,
            rate=2.0,
            seed=seed,
        )
    return runs


def show_accuracy(console: Console, sizes: Sizes, shares: dict[str, Tensor]) -> None:
    table = Table(title=f"Right answers after k words; learned from k up to {max(sizes.learned)}")
    for column in ("question", "layers", *(f"k = {k}" for k in sizes.asked)):
        table.add_column(column, justify="right" if "=" in column else "left")
    for i, task in enumerate(TASKS):
        for kind, share in shares.items():
            table.add_row(task, kind, *(f"{value:.0%}" for value in share[i]))
        table.add_section()
    console.print(table)


def show_reach(console: Console, norms: dict[str, Tensor]) -> None:
    steps = len(next(iter(norms.values()))) - 1
    shown = [k for k in (1, 3, 10, 30, 100) if k < steps]
    table = Table(title="Norm of the last state's gradient, at the state T - t steps before it")
    for column in ("layers", *(f"T - t = {k}" for k in shown)):
        table.add_column(column, justify="right" if "=" in column else "left")
    for name, norm in norms.items():
        table.add_row(name, *(f"{norm[-1 - k]:.1e}" for k in shown))
    console.print(table)


def show_clipping(console: Console, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        last = statistics.mean(run.losses[-len(run.losses) // 10 :])  # steps differ in their k
        stretch = torch.linalg.matrix_norm(run.model.body.weight_hh_l0.detach(), 2)
        console.print(
            f"An RNN that explodes, {name}: loss {run.losses[0]:.2f} -> {last:.2f}, at most "
            f"{max(run.losses):.2f}; norm of the gradient before clipping at most "
            f"{max(run.norms):.0e}; W_hh stretches a state up to {stretch:.1f} times",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"A guess among the answers has a loss of {GUESSED:.2f}\n", highlight=False)


def draw(
    console: Console,
    sizes: Sizes,
    shares: dict[str, Tensor],
    norms: dict[str, Tensor],
    runs: dict[str, Run],
) -> None:
    """One picture: accuracy by distance, gradients by distance, training clipped and not."""
    figure, axes = plt.subplot_mosaic(
        [[*TASKS], ["reach", "reach"], ["loss", "norm"]], figsize=(11, 12)
    )
    for row, task in enumerate(TASKS):
        axis = axes[task]
        for kind, share in shares.items():
            axis.plot(sizes.asked, share[row], label=kind, **STYLES[kind])
        chance = 1 / len(NOUNS) if task == "recall" else 1 / 2
        axis.axhline(chance, color="gray", linestyle=(0, (1, 3)), label="chance")
        axis.axvline(max(sizes.learned), color="gray", linewidth=0.8, label="longest k learned")
        axis.set(title=task, xlabel="k, words between", ylabel="right answers", ylim=(0, 1.05))
        program.logarithmic(axis, sizes.asked)
    for i, (name, norm) in enumerate(norms.items()):
        plain = {"color": f"C{i}", "linestyle": (0, (4, 1, 1, 1)), "linewidth": 1}
        style = STYLES.get(name, plain)
        every = (i, max(1, sizes.back // 10))
        axes["reach"].plot(range(len(norm)), norm.flip(0), label=name, markevery=every, **style)
    axes["reach"].set(
        title="how far gradients reach", xlabel="T - t, steps back", yscale="log",
        ylabel="norm of dh_T/dh_t, as a share of that at T", ylim=(1e-12, 1e8),
    )  # fmt: skip
    for name, run in runs.items():
        axes["loss"].plot(run.losses, linewidth=0.8, label=name)
        axes["norm"].plot(run.norms, linewidth=0.8, label=name)
    axes["loss"].axhline(GUESSED, color="gray", linestyle=(0, (1, 3)), label="a guess")
    axes["loss"].set(title="an RNN that explodes", xlabel="step", ylabel="loss, nats", yscale="log")
    axes["norm"].axhline(runs["clipped"].clip, color="gray", linewidth=0.8, label="clipped to this")
    axes["norm"].set(
        title="its gradient before clipping", xlabel="step", ylabel="norm", yscale="log"
    )
    for name, axis in axes.items():
        axis.grid(alpha=0.3)
        if name != "recall":  # agreement has the same lines
            axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    program.save(console, figure, "memory_span.png")


def work(options: argparse.Namespace, console: Console) -> None:
    sizes = QUICK if options.quick else FULL
    checkpoints = {kind: checkpoint(kind, sizes, options) for kind in models.KINDS}
    questions = Questions(sizes.learned, options.device)
    shares, norms = {}, {}
    for kind in models.KINDS:
        model = learn(kind, questions, sizes, checkpoints[kind], options, console)
        shares[kind] = accuracy(model, questions, sizes, options.seed)
        norms[kind] = reach(model, questions, sizes)
    show_accuracy(console, sizes, shares)
    for gain in (0.5, 1.5, 2.0):
        norms[f"W_hh times {gain}"] = reach(
            plain_rnn(gain, questions, sizes, options.seed), questions, sizes
        )
    runs = clipping(questions, sizes, options.seed, console)
    for name, run in runs.items():
        norms[f"times 2.0, {name}"] = reach(run.model, questions, sizes)
    show_reach(console, norms)
    show_clipping(console, runs)
    draw(console, sizes, shares, norms, runs)


def main(arguments: list[str] | None = None) -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    return program.run(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
