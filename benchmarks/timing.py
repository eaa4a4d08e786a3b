"""How it is timed: every implementation in turn, round after round."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: A sample repeats a short call until it takes this long, so that the clock's grain is nothing.
SAMPLE_SECONDS = 0.005
#: An implementation that is only there for scale may take this share of the time.
SLOW_SHARE = 0.25


@dataclass
class Samples:
    """Seconds a call, one number a sample."""

    calls: int  # a sample
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the samples lie between these two."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    slow: Iterable[str] = (),
    apart: Mapping[str, Callable[[int], float]] | None = None,
    rounds: int = 5,
    between: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, Samples]:
    """Times `calls` for about `seconds`, each once a round, another one first in every round.

    What disturbs the machine for a while then disturbs all of them alike, and their ratio stands.
    The garbage collector is off meanwhile.

    Args:
        calls: by name; each runs twice before the first sample, to warm up and to be sized.
        seconds: for all of them together.
        slow: the names that stand back when they have had `SLOW_SHARE` of the time.
        apart: those of other processes, by name; they take a number of calls and return the
            seconds. This process sleeps meanwhile: whoever follows runs once before it is timed.
        rounds: at least as many, whatever they take.
        between: is called before each fifth of the time, to measure what the machine can do.
        clock: the seconds that a call takes a number of times; by default this process's.
    """
    apart = apart or {}

    def take(name: str, count: int) -> float:
        return apart[name](count) if name in apart else (clock or _time)(calls[name], count)

    names, stand_back = [*calls, *apart], set(slow)
    samples = {name: Samples(_calls_a_sample(functools.partial(take, name))) for name in names}
    spent, asleep = dict.fromkeys(names, 0.0), False
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        elapsed, turn, fifths = 0.0, 0, 0
        while turn < rounds or elapsed < seconds:
            if fifths <= 5 * elapsed / seconds and fifths < 5:
                between()
                fifths += 1
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if name in stand_back and turn and spent[name] > SLOW_SHARE * elapsed:
                    continue
                if asleep and name in calls:
                    take(name, 1)
                asleep = name in apart
                count = samples[name].calls
                took = take(name, count)
                spent[name] += took
                samples[name].seconds.append(took / count)
            elapsed = time.perf_counter() - start
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def in_turn(
    calls: Sequence[Callable[[], object]], turns: Iterator[int] | None = None
) -> Callable[[], object]:
    """A call that makes the next of `calls`, round and round.

    `turns` says which one is next. Implementations that share it never come to what another one
    has just had, and left in the processor's caches.
    """
    turns = turns or itertools.cycle(range(len(calls)))
    return lambda: calls[next(turns)]()


def _calls_a_sample(take: Callable[[int], float]) -> int:
    take(1)
    once = take(1)
    return max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))


def _time(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start
