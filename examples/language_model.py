"""Two small language models, each trained with stock torch.nn layers and with pykernels.nn ones.

    python examples/language_model.py             under five minutes on two cores
    python examples/language_model.py --quick     seconds: to see that it runs, not what it learns

The text is the English of Python's own language reference, which ships with every interpreter; the
models read and write single characters. The same model code takes its layers from `torch.nn` or
from `pykernels.nn`, starts from the same weights and sees the same batches, in turn step by step,
so that curves and speeds can be compared: the curves should lie on each other, the speeds not.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import pykernels.nn
from pykernels import __main__ as about

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
LAYERS: dict[str, ModuleType] = {"stock": torch.nn, "ours": pykernels.nn}
PROMPT = "The "


class RecurrentModel(nn.Module):
    """Characters [B, T] in, scores of each next character [B, T, V] out, through a recurrence."""

    def __init__(self, layers: ModuleType, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.recurrence = layers.RNN(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrence(self.embed(tokens))
        return self.head(states)


class AttentionModel(nn.Module):
    """The same through two blocks of causal self-attention."""

    def __init__(self, layers: ModuleType, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.register_buffer("place", waves(length, width))
        self.blocks = nn.ModuleList(Block(layers, width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        hidden = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.embed(tokens) + self.place[:T]
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(x)


def waves(length: int, width: int) -> Tensor:
    """Sines and cosines of each position, [length, width]: a shift looks the same anywhere."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); x is [B, T, width]."""

    def __init__(self, layers: ModuleType, width: int, heads: int = 4) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = layers.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        n = self.before(x)
        x = x + self.attention(n, n, n, attn_mask=hidden, is_causal=True, need_weights=False)[0]
        return x + self.feed_forward(x)


@dataclass(frozen=True)
class Task:
    """One of the two comparisons."""

    name: str
    model: Callable[[ModuleType, int, int, int], nn.Module]
    width: int
    batch: int
    length: int
    steps: int
    rate: float


@dataclass
class Run:
    """One model in training, and what was seen of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    perplexity: float = math.nan

    def step(self, inputs: Tensor, targets: Tensor, rate: float) -> None:
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, so that the clock sees all
        self.seconds.append(time.perf_counter() - start)


class Text:
    """The topics of Python's language reference as numbers, one a character."""

    def __init__(self, device: str) -> None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[title] for title in sorted(topics))
        self.characters = sorted(set(text))
        self.number = {character: i for i, character in enumerate(self.characters)}
        tokens = torch.tensor([self.number[character] for character in text], device=device)
        cut = len(tokens) * 9 // 10
        self.training, self.validation = tokens[:cut], tokens[cut:]

    def batch(self, rows: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Characters and the ones that follow them, [rows, length] each, from random places."""
        starts = torch.randint(len(self.training) - length, (rows, 1), generator=draw)
        spans = self.training[(starts + torch.arange(length + 1)).to(self.training.device)]
        return spans[:, :-1], spans[:, 1:]


def train(task: Task, text: Text, seed: int, progress: Any) -> dict[str, Run]:
    """Trains the model of `task` with both kinds of layers, in turn step by step."""
    runs = {}
    for name, layers in LAYERS.items():
        torch.manual_seed(seed)
        model = task.model(layers, len(text.characters), task.width, task.length)
        model.to(text.training.device)
        runs[name] = Run(model, torch.optim.Adam(model.parameters()))
    draw = torch.Generator().manual_seed(seed)
    with progress(task.name, task.steps) as advance:
        for step in range(task.steps):
            inputs, targets = text.batch(task.batch, task.length, draw)
            rate = task.rate * min(1, 10 * (step + 1) / task.steps, 2 - 2 * step / task.steps)
            for name in LAYERS if step % 2 else reversed(LAYERS):
                runs[name].step(inputs, targets, rate)
            advance(", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items()))
    for run in runs.values():
        run.perplexity = perplexity(run.model, text.validation, task)
    return runs


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, task: Task) -> float:
    """exp of the mean loss over text that was not trained on, cut into spans."""
    rows = (len(tokens) - 1) // task.length
    inputs = tokens[: rows * task.length].view(rows, task.length).split(task.batch)
    targets = tokens[1 : rows * task.length + 1].view(rows, task.length).split(task.batch)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(inputs, targets, strict=True)
    ]
    return math.exp(torch.stack(losses).sum().item() / (rows * task.length))


@torch.no_grad()
def write(model: nn.Module, text: Text, length: int, seed: int, characters: int = 90) -> str:
    """Lets `model` go on from `PROMPT`, characters drawn from its softmax at temperature 0.5."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[text.number[c] for c in PROMPT]], device=text.training.device)
    for _ in range(characters):
        chances = (model(tokens[:, -length:])[0, -1] / 0.5).softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=draw)
        tokens = torch.cat([tokens, drawn[None].to(tokens.device)], 1)
    return " ".join("".join(text.characters[i] for i in tokens[0]).split())


def compare(console: Console, task: Task, runs: dict[str, Run], text: Text, seed: int) -> None:
    """Prints how the two runs of a task differ."""
    stock, ours = runs["stock"], runs["ours"]
    table = Table(
        title=f"{task.name}: {task.steps} steps of {task.batch} x {task.length} characters"
    )
    for column in ("layers", "last loss", "validation perplexity", "tokens/s", "ratio"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, run in runs.items():
        speed = tokens_a_second(task, run)
        table.add_row(
            f"{name} ({LAYERS[name].__name__})",
            f"{run.losses[-1]:.4f}",
            f"{run.perplexity:.3f}",
            f"{speed:,.0f}",
            f"{speed / tokens_a_second(task, stock):.2f}",
        )
    console.print(table)
    apart = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    console.print(f"Largest difference of the two curves: {apart[worst]:.2e}, at step {worst + 1}")
    for name, run in runs.items():
        line = write(run.model, text, task.length, seed)
        console.print(f"{name} writes: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def tokens_a_second(task: Task, run: Run) -> float:
    """Of whole training steps: the layer, all around it and the optimizer."""
    return task.batch * task.length / statistics.median(run.seconds)


def draw(results: dict[Task, dict[str, Run]], path: Path) -> None:
    """Saves a picture of the loss curves."""
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axis, (task, runs) in zip(axes[0], results.items(), strict=True):
        axis.plot(runs["stock"].losses, color="#f2a65a", linewidth=4, label="stock torch.nn")
        axis.plot(runs["ours"].losses, color="#1d4e89", linewidth=1.2, label="pykernels.nn")
        ratio = tokens_a_second(task, runs["ours"]) / tokens_a_second(task, runs["stock"])
        axis.set_title(f"{task.name}: ours trains {ratio:.2f} times as fast")
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, nats a character")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(console: Console) -> Any:
    """A progress bar on a terminal, ten plain lines elsewhere."""

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Callable[[str], None]]:
        if console.is_terminal:
            columns = (
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("", total=total)
                yield lambda losses: bar.update(task, advance=1, description=f"loss {losses}")
            return
        done = 0

        def say(losses: str) -> None:
            nonlocal done
            done += 1
            if done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{name}: step {done}/{total}, loss {losses}")

        yield say

    return progress


def benchmark(quick: bool, device: str) -> int:
    """Prints the quick table of the benchmark."""
    output = ROOT / "examples" / "output" / "benchmark.csv"
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--device", device]
    command += ["--output", output]
    smallest = ["--shapes", "rnn-1024x1x64x64", "--seconds", "0.1"] if quick else []
    return subprocess.run([*command, *smallest], check=False).returncode


def kernels(device: str) -> str:
    """What runs inside our layers."""
    backend = about.serving("rnn", None, torch.device(device), torch.float32)
    return f"{backend} ({about.instruction_set()})" if backend == "cpp" else backend


def tasks(quick: bool) -> list[Task]:
    if quick:
        return [
            Task("RNN", RecurrentModel, width=32, batch=4, length=32, steps=20, rate=1e-2),
            Task(
                "self-attention", AttentionModel, width=32, batch=4, length=32, steps=20, rate=1e-2
            ),
        ]
    return [
        Task("RNN", RecurrentModel, width=256, batch=32, length=128, steps=500, rate=5e-3),
        Task(
            "self-attention", AttentionModel, width=128, batch=4, length=256, steps=1000, rate=4e-3
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, with tiny models")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and writing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    console = Console() if sys.stdout.isatty() else Console(width=110)
    picture = ROOT / "examples" / "output" / "language_model.png"
    torch.backends.cudnn.allow_tf32 = False  # stock layers on a GPU: float32 as ours is
    try:
        text = Text(options.device)
        console.print(
            f"{len(text.training):,} characters to learn from, {len(text.validation):,} to judge "
            f"by, {len(text.characters)} different ones; {torch.get_num_threads()} threads; ours: "
            f"{kernels(options.device)}"
        )
        results = {}
        for task in tasks(options.quick):
            results[task] = train(task, text, options.seed, bars(console))
            compare(console, task, results[task], text, options.seed)
        draw(results, picture)
        console.print(f"Picture of the curves: {picture}\n", soft_wrap=True)
        return benchmark(options.quick, options.device)
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
