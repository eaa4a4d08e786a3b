"""The vocabulary of a language model: its size swept, and words added to it after training.

`examples/language_model.py` calls both, as --sweep and --extend.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import itertools
import re
import statistics
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import models
import program
import text
import torch
import training
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from training import Checkpoint, Run

SIZES = (500, 1000, 2000, 4000, 8000, 16_000, 30_000)
LOWER = 3.0  # how far below its first piece a new token's score begins, in nats


@cache
def docstrings() -> list[str]:
    """The paragraphs of all docstrings of the standard library's modules, each once, in order.

    The language reference alone has too few words for a vocabulary of 30,000.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an escape that is none, in code that is not ours
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates, and samples of what is wrong
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found += re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    return [p for p in dict.fromkeys(found) if p.strip()]


@dataclass(frozen=True)
class Size:
    """What one size of the vocabulary gives and costs; a pair is of stock layers and ours."""

    rows: int
    tokens_a_word: float
    unknown: float  # the share of <unk>
    bits: float  # a character of text that was not learned from
    seconds: tuple[float, float]  # a step; each has the same paragraphs whatever the vocabulary
    megabytes: tuple[float, float]  # at the peak of steps: weights, gradients, Adam's state, scores


def sweep(options: argparse.Namespace, console: Console) -> None:
    """Trains one RNN for each size of the vocabulary; prints and draws what that changes."""
    sizes, width, B, steps = ((500, 2000), 16, 4, 10) if options.quick else (SIZES, 128, 16, 100)
    checkpoints = {size: checkpoint(size, steps, options) for size in sizes}
    more = []
    if not options.quick:
        console.print("Reading the docstrings of the standard library")
        more = docstrings()
    texts = [*text.paragraphs()[0], *more]
    found = []
    for size in sizes:
        start = checkpoints[size].state()
        if start:  # its own, as no seed fixes those of some kinds
            tokenizer = Tokenizer.from_str(start["about"]["tokenizer"])
        else:
            console.print(f"V = {size:,}: training a tokenizer ({options.tokenizer})")
            tokenizer = text.train_tokenizer(options.tokenizer, size, texts)
        rows = tokenizer.get_vocab_size()
        if found and rows == found[-1].rows:
            console.print(f"{options.tokenizer} finds no more than {rows:,} tokens in this text")
            break
        corpus = text.Corpus(tokenizer, 128, options.device, more)
        console.print(f"V = {rows:,}: timing steps of stock layers and of ours")
        for _ in range(1 if found else 2):  # the first of all also loads what is loaded once
            costs = [step_cost(layers, rows, width, B, corpus, options) for layers in models.LAYERS]
        torch.manual_seed(options.seed)
        model = models.LanguageModel("ours", "rnn", rows, width).to(options.device)
        learn(f"V = {rows:,}", model, corpus, B, steps, checkpoints[size], options, console)
        _, bits = training.judge(model, corpus, B)
        seconds, megabytes = zip(*costs, strict=True)
        found.append(Size(rows, corpus.tokens_a_word, corpus.unknown, bits, seconds, megabytes))
    show_sweep(console, found, options.tokenizer)
    draw_sweep(console, found)


def checkpoint(size: int, steps: int, options: argparse.Namespace) -> Checkpoint:
    path = program.OUTPUT / f"vocabulary-{size}{'-quick' * options.quick}.pt"
    settings = {"size": size, "tokenizer": options.tokenizer, "steps": steps, "seed": options.seed}
    return Checkpoint(path, settings, options.resume)


def learn(
    name: str,
    model: models.LanguageModel,
    corpus: text.Corpus,
    B: int,
    steps: int,
    checkpoint: Checkpoint,
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Trains one model with a progress bar, or goes on from its checkpoint."""
    with program.progress(console, name, steps) as advance:
        training.train(
            {"ours": Run.of(model)},
            corpus.batch,
            advance,
            B=B,
            steps=steps,
            rate=4e-3,
            seed=options.seed,
            checkpoint=checkpoint,
            about={"tokenizer": corpus.tokenizer.to_str()},
        )


def step_cost(
    layers: str, rows: int, width: int, B: int, corpus: text.Corpus, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of a training step, their median, and the megabytes that training takes."""
    draw = torch.Generator().manual_seed(options.seed)
    with program.peak_memory(options.device) as peak:
        model = models.LanguageModel(layers, "rnn", rows, width).to(options.device)
        run = Run.of(model)
        for _ in range(6):
            run.step(*corpus.batch(B, draw), rate=1e-3)
    return statistics.median(run.seconds[1:]), peak() / 1e6


def show_sweep(console: Console, found: list[Size], tokenizer: str) -> None:
    table = Table(
        title=f"An RNN by the size of its vocabulary ({tokenizer}); times, memory: a step"
    )
    for column in (
        "V", "tokens/word", "unknown", "bits/character", "s, stock", "s, ours", "MB, stock",
        "MB, ours",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for size in found:
        table.add_row(
            f"{size.rows:,}",
            f"{size.tokens_a_word:.2f}",
            f"{size.unknown:.2%}",
            f"{size.bits:.3f}",
            *(f"{seconds:.3f}" for seconds in size.seconds),
            *(f"{megabytes:.0f}" for megabytes in size.megabytes),
        )
    console.print(table)


def draw_sweep(console: Console, found: list[Size]) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 4))
    rows = [size.rows for size in found]
    one = {"tokens a word": "tokens_a_word", "bits a character": "bits"}
    for axis, (title, name) in zip(axes, one.items(), strict=False):
        axis.plot(rows, [getattr(size, name) for size in found], "o-", color="#1d4e89")
        axis.set_title(title)
    pairs = {"seconds a step": "seconds", "megabytes while training": "megabytes"}
    for axis, (title, name) in zip(axes[2:], pairs.items(), strict=True):
        for i, (layers, color) in enumerate((("stock", "#f2a65a"), ("ours", "#1d4e89"))):
            axis.plot(rows, [getattr(size, name)[i] for size in found], "o-", color=color,
                      label=layers)  # fmt: skip
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    for axis in axes:
        program.logarithmic(axis, rows)
        axis.tick_params(axis="x", rotation=45)
        axis.set_xlabel("V, size of the vocabulary")
        axis.grid(alpha=0.3)
    program.save(console, figure, "vocabulary.png")


def add_words(tokenizer: Tokenizer, texts: list[str], count: int) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with `count` tokens more, and of each the piece that it began with before.

    They are the commonest words of `texts` that take more than one token and begin no other word:
    a new token is found before the text is cut, and would tear the longer word apart.
    """
    words = collections.Counter(w for p in texts for w in re.findall(r" [A-Za-z]\w+", p))
    for word, after in itertools.pairwise(sorted(words)):
        if after.startswith(word):
            del words[word]
    split = {word: tokenizer.encode(word).ids for word, _ in words.most_common(50 * count)}
    new = [word for word, ids in split.items() if len(ids) > 1][:count]
    grown = Tokenizer.from_str(tokenizer.to_str())
    grown.add_tokens([AddedToken(word, normalized=False) for word in new])
    return grown, [split[word][0] for word in new]


@torch.no_grad()
def grow(model: models.LanguageModel, first: list[int]) -> None:
    """Adds a row to the embedding and to the output for each new token; old rows stay as they are.

    A new token begins as its first piece, scored `LOWER` less: until it has learned, the
    token that the model finds likeliest is the one it was.
    """
    tied = model.head.weight is model.embed.weight
    for table in (model.embed, model.head):
        table.weight = nn.Parameter(torch.cat([table.weight, table.weight[first]]))
    model.head.bias = nn.Parameter(torch.cat([model.head.bias, model.head.bias[first] - LOWER]))
    model.embed.num_embeddings = len(model.embed.weight)
    model.head.out_features = len(model.head.weight)
    if tied:
        model.head.weight = model.embed.weight


def train_new_rows_alone(model: models.LanguageModel, old: int) -> None:
    """From now on a step moves only the rows from `old` on: all else gets no gradient."""

    def keep_old(grad: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(grad[:old]), grad[old:]])

    growing = {model.embed.weight, model.head.weight, model.head.bias}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in growing)
    for parameter in growing:
        parameter.register_hook(keep_old)


@torch.no_grad()
def old_logits(model: models.LanguageModel, corpus: text.Corpus, old: int) -> Tensor:
    """The scores of the first `old` tokens on one batch of the text to judge by."""
    return model.logits(corpus.held_out(8)[0][0])[..., :old]


def digest(model: models.LanguageModel, tokenizer: Tokenizer) -> str:
    """A name for these weights and tokens that no others have."""
    weights = [p.detach().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join([tokenizer.to_str().encode(), *weights])).hexdigest()[:12]


def extend(
    model: models.LanguageModel,
    tokenizer: Tokenizer,
    base: dict[str, Any],
    options: argparse.Namespace,
    console: Console,
) -> Tokenizer:
    """Gives a trained model `options.extend` words as tokens and trains their rows alone.

    `base` are the settings that the model was trained with.
    """
    kind = base["kind"]
    B, length, steps = (4, 32, 10) if options.quick else (16, 64, 100)
    # New rows fit the model that they were trained on and no other.
    settings = {f"base {name}": value for name, value in base.items()}
    settings |= {"base": digest(model, tokenizer), "words": options.extend, "steps": steps}
    path = program.OUTPUT / f"vocabulary-{kind}-extended{'-quick' * options.quick}.pt"
    kept = Checkpoint(path, {**settings, "seed": options.seed}, options.resume)
    before, old = text.Corpus(tokenizer, length, options.device), tokenizer.get_vocab_size()
    grown, first = add_words(tokenizer, text.paragraphs()[0], options.extend)
    after = text.Corpus(grown, length, options.device)
    logits = old_logits(model, before, old)
    rows = [("before", before, *training.judge(model, before, B))]
    grow(model, first)
    rows.append((f"{len(first)} words added", after, *training.judge(model, after, B)))
    train_new_rows_alone(model, old)
    learn(f"{kind}, new rows", model, after, B, steps, kept, options, console)
    rows.append(("their rows trained", after, *training.judge(model, after, B)))
    table = Table(title=f"{kind}: words added to its vocabulary of {old:,}")
    for column in ("", "tokens/word", "perplexity", "bits/character"):
        table.add_column(column, justify="right" if column else "left")
    for name, corpus, perplexity, bits in rows:
        table.add_row(name, f"{corpus.tokens_a_word:.3f}", f"{perplexity:.2f}", f"{bits:.3f}")
    console.print(table)
    moved = (old_logits(model, before, old) - logits).abs().max()
    console.print(f"Scores of the old tokens moved by {moved:.1e} at most\n", highlight=False)
    return grown
