"""Real text as numbers: tokenizers trained from scratch, and padded batches of paragraphs.

The text is the English of Python's own language reference, which ships with every interpreter. A
paragraph becomes <bos> token token ... <eos>; rows of a batch that are shorter than the longest end
in <pad>, whose targets are `IGNORED`: the loss leaves them out, and as models see no future,
nothing that comes before is touched by them.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import re
from collections.abc import Sequence
from functools import cache

import installed  # noqa: F401  (before what may be missing)
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would fight torch's

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
IGNORED = -100  # what torch's losses leave out by default, and ours too

#: A word with the blank before it, a run of signs, or of what is left: together they are the text.
WORDS = r" ?\w+| ?[^\w\s]+|\s+"
#: By kind: the model, its trainer, what the text is cut into before it.
KINDS = {
    "character": (models.WordLevel, trainers.WordLevelTrainer, r"[\s\S]"),
    "word": (models.WordLevel, trainers.WordLevelTrainer, WORDS),
    "bpe": (models.BPE, trainers.BpeTrainer, WORDS),
    "wordpiece": (models.WordPiece, trainers.WordPieceTrainer, WORDS),
    "unigram": (models.Unigram, trainers.UnigramTrainer, WORDS),
}


@cache
def paragraphs() -> tuple[list[str], list[str]]:
    """The text in paragraphs, each once: those to learn from, and every tenth, to judge by."""
    topics = pydoc_data.topics.topics
    found = [p.strip("\n") for title in sorted(topics) for p in re.split(r"\n\s*\n", topics[title])]
    unique = [p for p in dict.fromkeys(found) if p]
    return [p for i, p in enumerate(unique) if i % 10], unique[::10]


def train_tokenizer(kind: str, size: int, texts: list[str]) -> Tokenizer:
    """A tokenizer of at most `size` tokens, learned from `texts`.

    "character" and "word" know the commonest of theirs; BPE and WordPiece merge neighbours that
    are common together, Unigram keeps the pieces under which the text is likeliest. The library
    breaks ties of the last two in an order that no seed fixes: train one and keep it.
    """
    model, trainer, cut = KINDS[kind]
    extra = {"unk_token": "<unk>"} if kind == "unigram" else {}
    longest = {"max_input_chars_per_word": 10_000} if kind == "wordpiece" else {}
    tokenizer = Tokenizer(model() if kind == "unigram" else model(unk_token="<unk>", **longest))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "isolated")
    # "##" marks WordPiece's pieces that go on a word; nowhere does the text have it.
    parts = [decoders.Replace("##", "")] if kind == "wordpiece" else []
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Fuse()])
    # Words and characters that are left out are <unk>; the other kinds can spell all of the text.
    least = len(SPECIAL) + (0 if kind in ("character", "word") else len(set().union(*texts)))
    if size >= least:
        tokenizer.train_from_iterator(
            texts,
            trainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False, **extra),
        )
        least = tokenizer.get_vocab_size()
    if least > size:
        raise SystemExit(
            f"error: a vocabulary of {size} is too small for {kind}, which needs more than "
            f"{max(size, least - 1)} tokens to spell this text"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tensor]:
    """<bos>, the tokens and <eos> of each text."""
    return [torch.tensor([BOS, *row.ids, EOS]) for row in tokenizer.encode_batch(texts)]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] of rows of tokens: each token is followed by its target."""
    inputs = pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=PAD)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    return inputs, targets


class Corpus:
    """The text under one tokenizer, in batches of at most `length` steps.

    `more` are paragraphs to learn from beside the text's own.
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, device: str = "cpu", more: Sequence[str] = ()
    ) -> None:
        training, validation = paragraphs()
        self.tokenizer, self.length, self.device = tokenizer, length, device
        self.training = encode(tokenizer, [*training, *more])
        self.validation = encode(tokenizer, validation)
        self.characters = sum(len(p) + 1 for p in validation)  # <eos> stands for the empty line

    def batch(self, B: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of B paragraphs; of a long one, a span from a random place."""
        rows = []
        for i in torch.randint(len(self.training), (B,), generator=draw).tolist():
            row = self.training[i]
            spare = max(0, len(row) - self.length - 1)
            start = int(torch.randint(spare + 1, (), generator=draw))
            rows.append(row[start : start + self.length + 1])
        inputs, targets = pad(rows)
        return inputs.to(self.device), targets.to(self.device)

    def held_out(self, B: int) -> list[tuple[Tensor, Tensor]]:
        """The text to judge by in batches: every token is a target once."""
        spans = [
            row[start : start + self.length + 1]
            for row in self.validation
            for start in range(0, len(row) - 1, self.length)
        ]
        batches = [pad(spans[i : i + B]) for i in range(0, len(spans), B)]
        return [(x.to(self.device), y.to(self.device)) for x, y in batches]

    @property
    def tokens_a_word(self) -> float:
        """In the text to judge by, without <bos> and <eos>; words are runs between blanks."""
        words = sum(len(p.split()) for p in paragraphs()[1])
        return sum(len(row) - 2 for row in self.validation) / words

    @property
    def unknown(self) -> float:
        """The share of <unk> in the text to judge by: what a model need not spell is cheap."""
        ids = torch.cat(self.validation)
        return float((ids == UNK).float().mean())
