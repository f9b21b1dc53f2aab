"""Tokens of several sequences, appended to a program's cache in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from marlin_cy.decoder.cache import Sequence as CachedSequence
from marlin_cy.decoder.program import Batch, DecoderProgram

__all__ = ["Wanted", "append", "cut_into_steps"]

T = TypeVar("T", bound=Sequence[Any])


class Wanted(Enum):
    """The rows of a sequence for which a step gives something."""

    NONE, LAST, ALL = range(3)


def append(
    program: DecoderProgram,
    work: list[tuple[CachedSequence, npt.NDArray[np.int32]]],
    wanted: list[Wanted],
    compute: Callable[[Batch, list[int]], T],
    max_rows: int,
) -> list[list[T]]:
    """Append tokens, in steps of at most ``max_rows`` rows.

    Parameters
    ----------
    program : DecoderProgram
    work : list of (Sequence, int32 array)
        The pool has pages for the tokens.
    wanted : list of Wanted
        Of each of ``work``.
    compute : callable
        ``compute(batch, owners)`` runs a step, and returns what it gives for each wanted row; ``owners`` has the index
        in ``work`` of each of them.
    max_rows : int

    Returns
    -------
    list of list
        For each of ``work``, the parts of the results of ``compute`` that are its own.
    """
    for sequence, tokens in work:
        sequence.grow(len(tokens), program.copy_page)
    found: list[list[T]] = [[] for _ in work]
    for parts in cut_into_steps([len(tokens) for _, tokens in work], max_rows):
        rows, segments = 0, np.empty((len(parts), 4), np.int64)
        counts, wanted_rows, owners = [], list[int](), list[int]()
        for number, (index, begin, end) in enumerate(parts):
            sequence, tokens = work[index]
            segments[number] = rows, end - begin, sequence.length, sequence.state
            rows += end - begin
            complete = end == len(tokens)
            counts.append({Wanted.ALL: end - begin, Wanted.LAST: int(complete), Wanted.NONE: 0}[wanted[index]])
            wanted_rows += range(rows - counts[-1], rows)
            owners += [index] * counts[-1]
        tables = [work[index][0].page_table for index, _, _ in parts]
        results = compute(
            Batch(
                np.concatenate([work[index][1][begin:end] for index, begin, end in parts]),
                segments,
                tables[0][None] if len(tables) == 1 else np.stack(tables),
                np.array(wanted_rows, np.int32),
            ),
            owners,
        )
        row = 0
        for (index, begin, end), count in zip(parts, counts, strict=True):
            work[index][0].length += end - begin
            if count:
                found[index].append(results[row : row + count])  # type: ignore[arg-type]
                row += count
    return found


def cut_into_steps(counts: list[int], max_rows: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut the tokens of several sequences into steps of at most ``max_rows`` rows.

    Yields lists of ``(sequence, begin, end)``: tokens ``begin`` to ``end - 1`` of a sequence.
    """
    step: list[tuple[int, int, int]] = []
    room = max_rows
    for index, count in enumerate(counts):
        begin = 0
        while begin < count:
            end = min(count, begin + room)
            step.append((index, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield step
                step, room = [], max_rows
    if step:
        yield step
