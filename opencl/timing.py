"""What OpenCL's events say about time; all in seconds."""

import statistics
from typing import NamedTuple

import pyopencl as cl

from marlin_cy.opencl.memory import memory_errors

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


def times_of(events):
    """The :class:`Times` of what a context's ``profile()`` collected; the queue must have finished.

    Parameters
    ----------
    events : list of (str, pyopencl.Event)
        On one queue with profiling, at least one.

    Raises
    ------
    ValueError
        The queue has no profiling.
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


def copy_bandwidth(ctx, nbytes=256 << 20, repeats=7):
    """Bytes a second that a copy within the device's memory reads and writes.

    Parameters
    ----------
    ctx : OpenClContext
        Its queue must have profiling.
    nbytes : int
        How much is copied, at most a thirty-second part of the memory; far more than the caches hold.
    repeats : int
        Copies that count; one more goes before them, and the median is taken.
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
