"""Timing of several sides against each other in one process, on a machine whose clock speed varies.

A *side* is a callable that measures one block and returns a figure (seconds per call, or bytes per second).
:func:`alternate` measures one block of each side per round: A B C, then C B A, and so on, so that a slow drift of the
clock favours no side. A ratio is taken within a round, then the median over rounds: two blocks of a round are tens of
milliseconds apart, while the medians of two whole runs may come from different clock speeds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "Call",
    "CallTimer",
    "Spread",
    "alternate",
    "exact",
    "median_interval",
    "pause_check",
    "ratios",
    "spread",
]

# A warm-up wakes sleeping threads and raises the clock speed. Long calls do both in their first milliseconds.
WARM_UP_SECONDS = 0.003
LONG_CALL_SECONDS = 0.05

Call = Callable[[int], object]
"""``call(i)`` runs the timed code; ``i`` counts the calls, so that each call can use other operands."""

Name = TypeVar("Name")


class Spread(NamedTuple):
    """The median of some figures, and their 10th and 90th percentiles."""

    median: float
    p10: float
    p90: float


def spread(figures: npt.ArrayLike) -> Spread:
    """The :class:`Spread` of one or more figures."""
    p10, median, p90 = np.percentile(np.asarray(figures, np.float64), (10, 50, 90))
    return Spread(float(median), float(p10), float(p90))


def exact(figure: float) -> Spread:
    """A figure that does not vary."""
    return Spread(figure, figure, figure)


def ratios(numerators: npt.ArrayLike, denominators: npt.ArrayLike, factor: float = 1.0) -> Spread:
    """The :class:`Spread` of ``factor * numerators[i] / denominators[i]``, where i is a round."""
    return spread(factor * np.asarray(numerators) / np.asarray(denominators))


def median_interval(figures: npt.ArrayLike) -> tuple[float, float]:
    """The 95% confidence interval of the median, for any distribution of the figures.

    The number of figures below the true median is binomial with probability 1/2, so both ends are order statistics:
    the narrowest pair that misses the median in at most 5% of cases. Fewer than 6 figures give all of their range,
    whose confidence is lower.
    """
    ordered = np.sort(np.asarray(figures, np.float64))
    count, rank, below = len(ordered), 0, 1.0
    while rank + 1 < count:  # `below`: in how many of 2**count cases at most `rank` figures are below the median
        below += math.comb(count, rank + 1)
        if below > 0.025 * 2**count:
            break
        rank += 1
    return float(ordered[rank]), float(ordered[-1 - rank])


class CallTimer:
    """A side that returns seconds per call.

    A block is a short warm-up (left out if calls are long), then calls until they took ``min_seconds`` together. Its
    figure is the median of its calls, so a few calls that other processes slow down do not count.

    Parameters
    ----------
    call : Call
    min_seconds : float
        Least length of a block.
    """

    def __init__(self, call: Call, min_seconds: float) -> None:
        self._call, self._min_seconds = call, min_seconds
        self._index, self._last = 0, 0.0

    def __call__(self) -> float:
        if self._last < LONG_CALL_SECONDS:
            self.block(WARM_UP_SECONDS)
        self._last = statistics.median(self.block(self._min_seconds))
        return self._last

    def block(self, min_seconds: float) -> list[float]:
        """Seconds of each of several calls that take at least ``min_seconds`` together; at least one call."""
        call, clock = self._call, time.perf_counter
        seconds: list[float] = []
        total = 0.0
        while not seconds or total < min_seconds:
            start = clock()
            call(self._index)
            seconds.append(clock() - start)
            total += seconds[-1]
            self._index += 1
        return seconds


def alternate(sides: Mapping[Name, Callable[[], float]], repeats: int, pause_seconds: float) -> dict[Name, list[float]]:
    """Measure one block of every side per round, in alternating order.

    Parameters
    ----------
    sides : dict of str to callable
    repeats : int
        Rounds that count. One more round precedes them.
    pause_seconds : float
        Sleep before each block: idle OpenMP threads spin for some milliseconds after their last call, and two
        libraries may have a thread pool each.

    Returns
    -------
    dict of str to list of float
        The figures of each side, one per round.
    """
    figures: dict[Name, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for round_number in range(-1, repeats):
        for name in order:
            time.sleep(pause_seconds)
            figure = sides[name]()
            if round_number >= 0:
                figures[name].append(figure)
        order.reverse()
    return figures


def pause_check(
    side: CallTimer, other: CallTimer, pause_seconds: float, repeats: int = 9, block_seconds: float = 0.004
) -> dict[str, float]:
    """Check that the pause keeps ``other``'s idle threads out of ``side``'s time.

    Parameters
    ----------
    side, other : CallTimer
    pause_seconds : float
    repeats : int
    block_seconds : float
        Length of a block. Short, because idle threads do not spin for long.

    Returns
    -------
    dict
        Slowdown of ``side`` ``right_after`` a call of ``other`` and ``after_pause``, relative to a block that starts
        20 pauses after anything else. A block's figure is the mean of its calls; the median of the rounds is returned.
    """
    seconds: dict[str, list[float]] = {"alone": [], "right_after": [], "after_pause": []}
    for _ in range(repeats):
        for name, wait, interfere in (
            ("alone", 20 * pause_seconds, False),
            ("right_after", 0.0, True),
            ("after_pause", pause_seconds, True),
        ):
            if interfere:
                other.block(WARM_UP_SECONDS)
            time.sleep(wait)
            seconds[name].append(statistics.fmean(side.block(block_seconds)))
    return {name: ratios(seconds[name], seconds["alone"]).median for name in ("right_after", "after_pause")}
