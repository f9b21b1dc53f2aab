"""The times of commands, from OpenCL's events; all in seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyopencl as cl

from marlin_cy.opencl.memory import memory_errors

if TYPE_CHECKING:
    from marlin_cy.opencl.context import OpenClContext

__all__ = ["Times", "copy_bandwidth", "times_of"]

NANOSECOND = 1e-9


class Times(NamedTuple):
    """The time of some commands.

    Attributes
    ----------
    kernels : float
        The sum of their durations.
    span : float
        From the start of the first to the end of the last.
    """

    kernels: float
    span: float


def times_of(events: Sequence[tuple[str, cl.Event]]) -> Times:
    """The :class:`Times` of the events of a context's ``profile()``; the queue must have finished.

    Parameters
    ----------
    events : list of (str, pyopencl.Event)
        At least one, on one queue with profiling.

    Raises
    ------
    ValueError
        The queue was made without profiling and the driver keeps no times for it. Some drivers keep them anyway.
    """
    try:
        stamps = [(event.profile.start, event.profile.end) for _, event in events]
    except cl.Error as error:
        if error.code != cl.status_code.PROFILING_INFO_NOT_AVAILABLE:
            raise
        raise ValueError("events: their queue keeps no times; make the context with profiling=True") from error
    return Times(
        kernels=sum(end - start for start, end in stamps) * NANOSECOND,
        span=(max(end for _, end in stamps) - min(start for start, _ in stamps)) * NANOSECOND,
    )


def copy_bandwidth(ctx: OpenClContext, nbytes: int = 256 << 20, repeats: int = 7) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, added up.

    Parameters
    ----------
    ctx : OpenClContext
        Its queue must have profiling.
    nbytes : int
        Size of the copy, far more than the caches hold; at most 1/32 of the device's memory is used.
    repeats : int
        Number of timed copies, after one that is not timed; the result is from their median.
    """
    runtime = ctx.backend.runtime
    nbytes = min(nbytes, runtime.max_alloc_bytes, runtime.capabilities.global_memory // 32)
    with memory_errors(runtime, 2 * nbytes, "measuring bandwidth"):
        source, target = (cl.Buffer(runtime.context, cl.mem_flags.READ_WRITE, nbytes) for _ in range(2))
        try:
            cl.enqueue_fill(ctx.queue, source, b"\0" * 4, nbytes // 4 * 4)
            events = [cl.enqueue_copy(ctx.queue, target, source, byte_count=nbytes) for _ in range(repeats + 1)]
            ctx.finish()
        finally:
            source.release()
            target.release()
    return 2 * nbytes / statistics.median(times_of([("copy", event)]).kernels for event in events[1:])
