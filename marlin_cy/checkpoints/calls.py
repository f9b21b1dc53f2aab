"""Calling functions: all of them although some raise, and many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from marlin_cy.checkpoints.families import Family, MoeSpec
from marlin_cy.errors import MarlinError

__all__ = ["Describe", "ForEach", "Progress", "call_in_parallel", "errors_of"]

ForEach = Callable[[Callable[[int], None], int, "str | None"], None]
"""``for_each(work, count, description)`` calls ``work(i)`` for each ``i`` below ``count``, in parallel.

Progress is reported under the description, if there is one."""

Progress = Callable[[int, int, str], object]
"""Called as ``progress(done, total, description)``."""

Describe = Callable[[list[str]], tuple[Family, MoeSpec, list[int]]]
"""The parameter ``describe`` of :func:`~marlin_cy.open_checkpoint`."""


def errors_of(checks: Iterable[Callable[[], None]]) -> Iterator[MarlinError]:
    """The errors that checks raise."""
    for check in checks:
        try:
            check()
        except MarlinError as error:
            yield error


def call_in_parallel(
    work: Callable[[int], None], total: int, num_threads: int, report: Callable[[int], object]
) -> None:
    """Call ``work(i)`` for each ``i`` below ``total``, in parallel. The first exception cancels the rest.

    ``report(done)`` is called on this thread after each call.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        pending = [pool.submit(work, index) for index in range(total)]
        for done, future in enumerate(as_completed(pending), start=1):
            future.result()
            report(done)
    finally:
        pool.shutdown(cancel_futures=True)
