"""Timing several sides against each other in one process, on a machine whose speed wanders.

A *side* is a callable that measures one block and returns a figure (seconds a call, bytes a second).
:func:`alternate` measures one block of each side a round, A B C, then C B A, and so on, so that a slow
drift of the clock favours none. Ratios are taken within a round and then their median: two blocks of
one round lie tens of milliseconds apart, two medians of a whole run may come from different clocks.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np

__all__ = ["CallTimer", "Spread", "alternate", "median_interval", "pause_check", "ratios", "spread"]

# Wakes sleeping threads and brings the clock up. Long calls do both in their first milliseconds.
WARM_UP_SECONDS = 0.003
LONG_CALL_SECONDS = 0.05


class Spread(NamedTuple):
    """The median of some figures, and where the middle 80% of them lie."""

    median: float
    p10: float
    p90: float


def spread(figures):
    """The :class:`Spread` of one or more figures."""
    p10, median, p90 = np.percentile(np.asarray(figures, np.float64), (10, 50, 90))
    return Spread(float(median), float(p10), float(p90))


def ratios(numerators, denominators, factor=1.0):
    """The :class:`Spread` of ``factor * numerators[i] / denominators[i]``, the figures of round i."""
    return spread(factor * np.asarray(numerators) / np.asarray(denominators))


def median_interval(figures):
    """The interval that holds the median of what the figures are drawn from, in 95% of cases: two of the figures.

    The number of figures below the true median is binomial with chance 1/2, whatever their distribution is. With
    fewer than 6 figures the interval is all of them, and holds the median less often.
    """
    ordered = np.sort(np.asarray(figures, np.float64))
    below = int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2)
    first = min(max(below, 0), (len(ordered) - 1) // 2)
    return float(ordered[first]), float(ordered[-1 - first])


class CallTimer:
    """A side: seconds a call of ``call(i)``, where i counts all calls, so that a call can rotate its operands.

    A block is a short warm-up, unless calls are long, then calls until they have taken ``min_seconds`` together.
    Its figure is the median of its calls: what another process takes from a few of them does not count.
    """

    def __init__(self, call, min_seconds):
        self._call, self._min_seconds = call, min_seconds
        self._index, self._last = 0, 0.0

    def __call__(self):
        if self._last < LONG_CALL_SECONDS:
            self.block(WARM_UP_SECONDS)
        self._last = statistics.median(self.block(self._min_seconds))
        return self._last

    def block(self, min_seconds):
        """Seconds of each of some calls that take at least ``min_seconds`` together; at least one call."""
        call, clock = self._call, time.perf_counter
        seconds, total = [], 0.0
        while not seconds or total < min_seconds:
            start = clock()
            call(self._index)
            seconds.append(clock() - start)
            total += seconds[-1]
            self._index += 1
        return seconds


def alternate(sides, repeats, pause_seconds):
    """One block of every side a round, in turn forwards and backwards.

    Parameters
    ----------
    sides : dict of str to callable
    repeats : int
        Rounds that count; one more goes before them.
    pause_seconds : float
        Sleep before each block: idle OpenMP threads spin for some milliseconds after their last call,
        and two libraries may each have a pool of them.

    Returns
    -------
    dict of str to list of float
        The figures of each side, one a round.
    """
    figures = {name: [] for name in sides}
    order = list(sides)
    for round_number in range(-1, repeats):
        for name in order:
            time.sleep(pause_seconds)
            figure = sides[name]()
            if round_number >= 0:
                figures[name].append(figure)
        order.reverse()
    return figures


def pause_check(side, other, pause_seconds, repeats=9, block_seconds=0.004):
    """Whether the pause keeps ``other``'s idle threads out of ``side``'s time.

    Parameters
    ----------
    side, other : CallTimer
    pause_seconds : float
    repeats : int
    block_seconds : float
        Length of a block; short, as the threads do not spin for long.

    Returns
    -------
    dict
        Slowdown of ``side``: ``right_after`` a call of ``other`` and ``after_pause``, each over a block
        that comes 20 pauses after anything. Means of a block, medians of the rounds.
    """
    seconds = {"alone": [], "right_after": [], "after_pause": []}
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
