"""Training in steps that can be interrupted, saved and gone on with as if nothing had happened."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import program
import torch
from text import IGNORED, Corpus
from torch import Tensor, nn

SAVE_EVERY = 100  # steps


@dataclass
class Run:
    """One model in training, and what was seen of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float = 1.0  # the norm that the gradient of a step is cut down to
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of that gradient, before it is cut
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Run:
        return cls(model, torch.optim.Adam(p for p in model.parameters() if p.requires_grad))

    def step(self, inputs: Tensor, targets: Tensor, rate: float) -> None:
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, so that the clock sees all
        self.norms.append(norm.item())
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(int((targets != IGNORED).sum()))

    @property
    def tokens_a_second(self) -> float:
        """Of the median step: the layers, all around them and the optimizer, padding not counted.

        Of a sum the first steps would be much on a GPU, where kernels are compiled in them.
        """
        return statistics.median(
            tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)
        )


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is kept, and what it is of: the options and sizes that shape it.

    With `resume` it goes on from what is there. Of other settings that would be another model: the
    program ends as soon as the two have been held together, before any work.
    """

    path: Path
    settings: dict[str, Any]
    resume: bool

    def __post_init__(self) -> None:
        self.state()

    def state(self) -> dict[str, Any] | None:
        """What to go on from; None to start anew."""
        if not self.resume or not self.path.exists():
            return None
        state = load(self.path)
        saved, asked = state["about"]["settings"], self.settings
        differing = [
            f"{name}: saved {saved.get(name, 'nothing')}, asked {asked.get(name, 'nothing')}"
            for name in {**saved, **asked}
            if name not in saved or name not in asked or saved[name] != asked[name]
        ]
        if differing:
            raise SystemExit(
                f"error: {self.path} is of other options ({'; '.join(differing)}): "
                "ask for what was saved, or delete the file to train anew"
            )
        return state


def train(
    runs: dict[str, Run],
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    advance: Callable[[str], None],
    *,
    B: int,
    steps: int,
    rate: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Trains `runs` on the same batches, `batch(B, draw)` each, in turn step by step.

    It goes on from what `checkpoint` has. There it saves the runs and, beside the settings, `about`
    (plain numbers and strings) at the end, every `SAVE_EVERY` steps and on Ctrl-C; what an earlier
    training has left stays until then.
    """
    draw = torch.Generator().manual_seed(seed)
    start = checkpoint.state() if checkpoint else None
    first = restore(runs, draw, start) if start else 0
    for _ in range(first):
        advance("read from the checkpoint")
    with program.whole_steps() as interrupted:
        for step in range(first, steps):
            inputs, targets = batch(B, draw)
            now = rate * min(1, 10 * (step + 1) / steps, 2 - 2 * step / steps)
            for name in runs if step % 2 else reversed(runs):
                runs[name].step(inputs, targets, now)
            advance("loss " + ", ".join(f"{k} {run.losses[-1]:.4f}" for k, run in runs.items()))
            last = interrupted() or step + 1 == steps
            if checkpoint and (last or not (step + 1) % SAVE_EVERY):
                kept = {"settings": checkpoint.settings, **(about or {})}
                save(checkpoint.path, runs, draw, step + 1, kept)
            if interrupted():
                raise KeyboardInterrupt(
                    f"{step + 1} steps are kept in {checkpoint.path}: --resume"
                    if checkpoint
                    else ""
                )


def save(
    path: Path, runs: dict[str, Run], draw: torch.Generator, step: int, about: dict[str, Any]
) -> None:
    """Writes a checkpoint beside its place first: an older one stands until the new is whole."""
    state = {
        "about": about,
        "step": step,
        "draw": draw.get_state(),
        "runs": {
            name: {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "seen": [run.losses, run.norms, run.seconds, run.tokens],
            }
            for name, run in runs.items()
        },
    }
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, path)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint: tensors, numbers and strings, since a file must not be able to run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        whole = {"about", "step", "draw", "runs"} <= state.keys()
        if whole and isinstance(state["about"]["settings"], dict):
            return state
    except Exception:  # of any type, on bytes that mean nothing
        pass
    raise SystemExit(
        f"error: {path} cannot be read: it is damaged or no checkpoint of these programs; "
        "delete it and train anew"
    )


def restore(runs: dict[str, Run], draw: torch.Generator, state: dict[str, Any]) -> int:
    """Puts all that `save` wrote back into place; returns the step to go on with."""
    for name, run in runs.items():
        saved = state["runs"][name]
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.losses, run.norms, run.seconds, run.tokens = saved["seen"]
    draw.set_state(state["draw"])
    return state["step"]


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """The loss of all targets together, in nats, and their number."""
    total, count = 0.0, 0
    for inputs, targets in batches:
        n = int((targets != IGNORED).sum())
        total += float(model(inputs, targets)) * n
        count += n
    return total, count


def judge(model: nn.Module, corpus: Corpus, B: int) -> tuple[float, float]:
    """Perplexity (of a token) and bits a character on the text that was not learned from."""
    nats, tokens = evaluate(model, corpus.held_out(B))
    return math.exp(nats / tokens), nats / math.log(2) / corpus.characters
