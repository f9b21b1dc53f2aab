"""The peak rate of integer operations: an upper bound for compute-bound kernels.

The loops are those of the ISAs' descriptors, ``peak`` in ``ukernels/isa.h``.
"""

import statistics
import time

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from marlin_cy.cpu._dispatch cimport kernel_table, peak_fn

cdef int64_t STEPS = 1 << 16


def int8_peak(str isa, int num_threads, int repeats=9):
    """Operations per second of an ISA's dot products of unsigned 4-bit with signed 8-bit values.

    A multiplication and an addition are two operations. The figure is the median of ``repeats`` passes of about
    a millisecond each. The first pass is a warm-up and is not counted.

    Parameters
    ----------
    isa : str
        A name of :func:`marlin_cy.cpu._dispatch.isas`.
    num_threads : int
        At least 1.
    repeats : int
        At least 1.

    Returns
    -------
    float or None
        None for an ISA without such a loop: "generic" has no suitable instruction, and "amx" has no loop yet.

    Raises
    ------
    ValueError
        An ISA that this machine cannot run, or an argument below its minimum.
    """
    cdef peak_fn *loop = kernel_table(isa).peak
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    cdef int64_t operations
    if loop is NULL:
        return None
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with nogil:
            operations = run_threads(loop, STEPS, num_threads)
        rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates[1:])


cdef int64_t run_threads(peak_fn *loop, int64_t steps, int num_threads) noexcept nogil:
    """Run a loop on every thread; returns the total number of operations."""
    cdef int _thread
    cdef int64_t operations = 0
    for _thread in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
        operations += loop(steps)
    return operations
