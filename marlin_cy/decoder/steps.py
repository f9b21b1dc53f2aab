"""Steps of a call: the tokens of several sequences, cut into batches."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["cut_into_steps"]


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
