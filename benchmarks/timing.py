"""How it is timed: every implementation in turn, round after round, in one process."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
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
    rounds: int = 5,
    between: Callable[[], object] = lambda: None,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Times `calls` for about `seconds`, each once a round, another one first in every round.

    What disturbs the machine for a while then disturbs all of them alike, and their ratio stands.
    The garbage collector is off meanwhile.

    Args:
        calls: by name; each runs twice before the first sample, to warm up and to be sized.
        seconds: for all of them together.
        slow: the names that stand back when they have had `SLOW_SHARE` of the time.
        rounds: at least as many, whatever they take.
        between: is called before each fifth of the time, to measure what the machine can do.
        synchronize: waits until the device has done what it was given.
    """
    samples = {name: Samples(_calls_a_sample(call, synchronize)) for name, call in calls.items()}
    spent = dict.fromkeys(calls, 0.0)
    names, stand_back = list(calls), set(slow)
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
                count = samples[name].calls
                took = _time(calls[name], count, synchronize)
                spent[name] += took
                samples[name].seconds.append(took / count)
            elapsed = time.perf_counter() - start
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _calls_a_sample(call: Callable[[], object], synchronize: Callable[[], object]) -> int:
    call()
    once = _time(call, 1, synchronize)
    return max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))


def _time(call: Callable[[], object], count: int, synchronize: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return time.perf_counter() - start
