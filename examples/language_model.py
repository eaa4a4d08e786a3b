"""Small language models, each trained with stock torch layers and with pykernels ones.

    python examples/language_model.py             under five minutes on two cores
    python examples/language_model.py --quick     seconds: to see that it runs, not what it learns
    python examples/language_model.py --resume    goes on after Ctrl-C
    python examples/language_model.py --prompt "The statement"    writes on, trains nothing
    python examples/language_model.py --sweep     vocabularies of 500 to 30,000 tokens instead
    python examples/language_model.py --extend 200    new words for the models that were saved last

The text is the English of Python's own language reference, which ships with every interpreter, in
the tokens of a tokenizer that is trained on it first. The same model code takes its layers and its
loss from torch.nn or from pykernels.nn, starts from the same weights and sees the same batches, in
turn step by step, so that curves and speeds can be compared: the curves should lie on each other,
the speeds not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import models
import program
import text
import torch
import training
import vocabulary
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import nn
from training import Checkpoint, Run

from pykernels import __main__ as about

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Task:
    """One comparison: a kind of model and how it is trained."""

    kind: str
    width: int
    batch: int
    length: int
    steps: int
    rate: float


def task(kind: str, quick: bool) -> Task:
    if quick:
        return Task(kind, width=32, batch=4, length=32, steps=20, rate=1e-2)
    if kind == "transformer":
        return Task(kind, width=128, batch=16, length=128, steps=300, rate=4e-3)
    return Task(kind, width=256, batch=16, length=64, steps=300, rate=4e-3)


def checkpoint_path(kind: str, quick: bool) -> Path:
    return program.OUTPUT / f"language_model-{kind}{'-quick' * quick}.pt"


def checkpoint(task: Task, options: argparse.Namespace) -> Checkpoint:
    chosen = {name: getattr(options, name) for name in ("tied", "seed", "tokenizer", "vocabulary")}
    path = checkpoint_path(task.kind, options.quick)
    return Checkpoint(path, {**asdict(task), **chosen}, options.resume)


def build(task: Task, rows: int, tied: bool, seed: int, device: str) -> dict[str, Run]:
    """The two models of a task, of the same weights, before their first step."""
    runs = {}
    for layers in models.LAYERS:
        torch.manual_seed(seed)
        model = models.LanguageModel(layers, task.kind, rows, task.width, tied=tied)
        runs[layers] = Run.of(model.to(device))
    return runs


def train(
    task: Task,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Run]:
    """Trains both models of a task, or goes on where a checkpoint has them, and compares them."""
    corpus = text.Corpus(tokenizer, task.length, options.device)
    rows = tokenizer.get_vocab_size()
    runs = build(task, rows, options.tied, options.seed, options.device)
    with program.progress(console, task.kind, task.steps) as advance:
        training.train(
            runs,
            corpus.batch,
            advance,
            B=task.batch,
            steps=task.steps,
            rate=task.rate,
            seed=options.seed,
            checkpoint=checkpoint,
            about={"tokenizer": tokenizer.to_str()},
        )
    compare(console, task, runs, corpus, options.seed)
    return runs


def compare(
    console: Console, task: Task, runs: dict[str, Run], corpus: text.Corpus, seed: int
) -> None:
    """Prints how the two runs of a task differ."""
    stock, ours = runs["stock"], runs["ours"]
    table = Table(
        title=f"{task.kind}: {task.steps} steps of {task.batch} paragraphs, at most {task.length} "
        "tokens of each"
    )
    for column in ("layers", "last loss", "perplexity", "bits/character", "tokens/s", "ratio"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, run in runs.items():
        perplexity, bits = training.judge(run.model, corpus, task.batch)
        table.add_row(
            f"{name} ({models.LAYERS[name].__name__})",
            f"{run.losses[-1]:.4f}",
            f"{perplexity:.3f}",
            f"{bits:.3f}",
            f"{run.tokens_a_second:,.0f}",
            f"{run.tokens_a_second / stock.tokens_a_second:.2f}",
        )
    console.print(table)
    apart = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    console.print(f"Largest difference of the two curves: {apart[worst]:.2e}, at step {worst + 1}")
    for name, run in runs.items():
        say(console, name, write(run.model, corpus.tokenizer, "The ", task.length, seed))
    console.print()


def say(console: Console, name: str, written: str) -> None:
    line = " ".join(written.split())
    console.print(f"{name} writes: {line}", markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def write(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, length: int, seed: int, count: int = 40
) -> str:
    """`prompt` and what `model` makes of it: at most `count` tokens, drawn at temperature 0.5."""
    draw = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = [text.BOS, *tokenizer.encode(prompt).ids]
    for _ in range(count):
        scores = model.logits(torch.tensor([tokens[-length:]], device=device))[0, -1].cpu()
        scores[[text.PAD, text.BOS, text.UNK]] = -torch.inf
        tokens.append(int(torch.multinomial((scores / 0.5).softmax(0), 1, generator=draw)))
        if tokens[-1] == text.EOS:
            break
    return tokenizer.decode(tokens)


def saved(
    options: argparse.Namespace,
) -> Iterator[tuple[Task, nn.Module, Tokenizer, dict[str, Any]]]:
    """The models of ours that the last run has saved, with their settings."""
    for kind in options.models:
        path = checkpoint_path(kind, options.quick)
        if not path.exists():
            there = [
                f"--models {other}{' --quick' * quick}"
                for quick in (False, True)
                for other in models.KINDS
                if checkpoint_path(other, quick).exists()
            ]
            hint = f"ask for what is saved ({', '.join(there)}), or " if there else ""
            raise SystemExit(
                f"error: {path} is not there: {hint}train first, without --prompt and --extend"
            )
    for kind in options.models:
        chosen = task(kind, options.quick)
        state = training.load(checkpoint_path(kind, options.quick))
        tokenizer = Tokenizer.from_str(state["about"]["tokenizer"])
        settings = state["about"]["settings"]
        rows, tied = tokenizer.get_vocab_size(), settings["tied"]
        runs = build(chosen, rows, tied, options.seed, options.device)
        training.restore(runs, torch.Generator(), state)
        yield chosen, runs["ours"].model, tokenizer, settings


def draw(results: dict[str, dict[str, Run]], console: Console) -> None:
    """Saves a picture of the loss curves."""
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axis, (kind, runs) in zip(axes[0], results.items(), strict=True):
        axis.plot(runs["stock"].losses, color="#f2a65a", linewidth=4, label="stock torch.nn")
        axis.plot(runs["ours"].losses, color="#1d4e89", linewidth=1.2, label="pykernels.nn")
        ratio = runs["ours"].tokens_a_second / runs["stock"].tokens_a_second
        axis.set_title(f"{kind}: ours trains {ratio:.2f} times as fast")
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, nats a token")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    program.save(console, figure, "language_model.png")


def benchmark(quick: bool, device: str) -> int:
    """Prints the quick table of the benchmark."""
    output = program.OUTPUT / "benchmark.csv"
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--device", device]
    command += ["--output", output]
    smallest = ["--shapes", "rnn-1024x1x64x64", "--seconds", "0.1"] if quick else []
    return subprocess.run([*command, *smallest], check=False).returncode


def kernels(device: str) -> str:
    """What runs inside our layers."""
    backend = about.serving("rnn", None, torch.device(device), torch.float32)
    return f"{backend} ({about.instruction_set()})" if backend == "cpp" else backend


def work(options: argparse.Namespace, console: Console) -> int:
    if options.sweep:
        vocabulary.sweep(options, console)
        return 0
    if options.extend or options.prompt is not None:
        for chosen, model, tokenizer, settings in saved(options):
            if options.extend:
                tokenizer = vocabulary.extend(model, tokenizer, settings, options, console)
            prompt = "The " if options.prompt is None else options.prompt
            written = write(model, tokenizer, prompt, chosen.length, options.seed, 80)
            say(console, chosen.kind, written)
        return 0
    learned, judged = text.paragraphs()
    tasks = {kind: task(kind, options.quick) for kind in options.models}
    checkpoints = {kind: checkpoint(each, options) for kind, each in tasks.items()}
    # A model goes on with the tokenizer that it began with: no seed fixes those of some kinds.
    tokenizers = {
        kind: Tokenizer.from_str(state["about"]["tokenizer"])
        for kind, each in checkpoints.items()
        if (state := each.state())
    }
    if len(tokenizers) < len(tasks):
        new = text.train_tokenizer(options.tokenizer, options.vocabulary, learned)
        tokenizers = {kind: tokenizers.get(kind, new) for kind in tasks}
    sizes = sorted({tokenizer.get_vocab_size() for tokenizer in tokenizers.values()})
    threads = torch.get_num_threads()
    console.print(
        f"{len(learned):,} paragraphs to learn from, {len(judged):,} to judge by; "
        f"{' or '.join(f'{size:,}' for size in sizes)} tokens ({options.tokenizer}); "
        f"{threads} thread{'s' * (threads > 1)}; ours: {kernels(options.device)}"
    )
    results = {
        kind: train(tasks[kind], checkpoints[kind], tokenizers[kind], options, console)
        for kind in tasks
    }
    draw(results, console)
    return benchmark(options.quick, options.device)


def main(arguments: list[str] | None = None) -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=models.KINDS, default=["rnn", "transformer"])
    parser.add_argument("--tokenizer", choices=text.KINDS, default="bpe")
    parser.add_argument(
        "--vocabulary", type=program.positive, default=2000, metavar="TOKENS", help="at most (2000)"
    )
    parser.add_argument("--tied", action="store_true", help="output rows are the embedding's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--prompt", help="only write on from this text, with the models saved last"
    )
    instead.add_argument("--sweep", action="store_true", help="only try sizes of the vocabulary")
    instead.add_argument(
        "--extend",
        type=program.positive,
        metavar="WORDS",
        help="only add new tokens to the models saved last",
    )
    return program.run(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
