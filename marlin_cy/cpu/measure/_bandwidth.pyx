"""The read bandwidth of memory: an upper bound for memory-bound kernels."""

import mmap
import statistics
import time

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

# The reader must be as fast as the machine allows, because other figures are given as shares of its speed. Each thread cuts
# its part into STREAMS runs, and reads a vector of each run in turn, with one accumulator for each run: more runs keep
# more prefetchers busy. The runs start at distances of an odd number of pages plus one line (the skew), so that they do
# not compete for cache sets and memory banks. Measured on two Zen 3 cores over 512 MiB in huge pages, GB/s, medians of
# 31 alternating passes:
#
#                                             1 thread   2 threads
#     1 run,  4 accumulators of 32 bytes        18.3       28.9
#     8 runs, skewed, of 8 bytes                16.7       28.4
#     8 runs, skewed, of 16 bytes               23.2       28.6    <- this one
#     8 runs, skewed, of 32 bytes (AVX2)        22.9       32.2
#
# The order of the last two varies between measurements (22.4 to 23.6 with 2 threads a minute earlier), so a separate
# function for AVX2 is not worth its code. Without the skew, 8 runs of 32 bytes are a sixth slower with one thread.
# Software prefetches are a fifth slower.
cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define STREAMS 8
    #define LINE_BYTES 64
    #define SKEW_PERIOD_LINES 8192
    #define SKEW_LINES 4161

    #if defined(__GNUC__)
    typedef uint64_t read_vector __attribute__((vector_size(16)));
    #else
    typedef uint64_t read_vector;
    #endif

    /* XOR of all 64-bit words of STREAMS consecutive runs of run_bytes bytes.
       Aligned to 16 bytes; run_bytes is a multiple of 16. */
    static uint64_t xor_streams(const void *part, int64_t run_bytes) {
        const read_vector *runs = (const read_vector *)part;
        const int64_t vectors = run_bytes / (int64_t)sizeof(read_vector);
        read_vector sums[STREAMS];
        uint64_t words[sizeof(sums) / 8];
        uint64_t sum = 0;
        memset(sums, 0, sizeof(sums));
        for (int64_t i = 0; i < vectors; i++) {
            sums[0] ^= runs[0 * vectors + i];
            sums[1] ^= runs[1 * vectors + i];
            sums[2] ^= runs[2 * vectors + i];
            sums[3] ^= runs[3 * vectors + i];
            sums[4] ^= runs[4 * vectors + i];
            sums[5] ^= runs[5 * vectors + i];
            sums[6] ^= runs[6 * vectors + i];
            sums[7] ^= runs[7 * vectors + i];
        }
        memcpy(words, sums, sizeof(sums));
        for (size_t i = 0; i < sizeof(sums) / 8; i++)
            sum ^= words[i];
        return sum;
    }
    """
    const int64_t STREAMS
    const int64_t LINE_BYTES
    const int64_t SKEW_PERIOD_LINES
    const int64_t SKEW_LINES
    uint64_t xor_streams(const void *part, int64_t run_bytes) noexcept nogil


cdef void touch_parts(char *memory, int64_t part_bytes, int num_threads) noexcept nogil:
    """Write every part from the thread that will read it, so that its pages are in memory near that thread."""
    cdef int part
    for part in prange(num_threads, num_threads=num_threads, schedule="static"):
        memset(memory + part * part_bytes, 0x5A, part_bytes)


cdef uint64_t read_parts(const char *memory, int64_t part_bytes, int num_threads) noexcept nogil:
    """XOR of all words of all parts. It is 0, because an even number of equal words was written."""
    cdef int part
    cdef uint64_t checksum = 0
    for part in prange(num_threads, num_threads=num_threads, schedule="static"):
        checksum ^= xor_streams(memory + part * part_bytes, part_bytes // STREAMS)
    return checksum


def read_bandwidth(num_threads, size_bytes=None, repeats=9):
    """Bytes per second at which ``num_threads`` threads together read memory, streaming.

    The figure is the median of ``repeats`` passes over a new buffer, in huge pages if the system provides them.

    Parameters
    ----------
    num_threads : int
        At least 1. Each reads its own contiguous part.
    size_bytes : int, optional
        Bytes read in a pass, rounded down by less than 4 MiB for each thread; at least 8 MiB for each thread. It
        should be many times the size of the last-level cache. Default: 512 MiB, or 16 MiB for each thread if that is
        more.
    repeats : int
        Passes; at least 1.

    Returns
    -------
    float
        Bytes per second.

    Raises
    ------
    ValueError
        An argument below its minimum.
    MemoryError, OSError
        The buffer cannot be allocated.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    if size_bytes is None:
        size_bytes = max(512 << 20, num_threads * (16 << 20))
    if size_bytes < num_threads * (8 << 20):
        raise ValueError(f"size_bytes: got {size_bytes}, expected at least 8 MiB per thread: {num_threads * (8 << 20)}")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")

    run_lines = size_bytes // num_threads // STREAMS // LINE_BYTES
    run_lines -= (run_lines - SKEW_LINES) % SKEW_PERIOD_LINES
    cdef int64_t part_bytes = run_lines * LINE_BYTES * STREAMS
    cdef int threads = num_threads

    memory = mmap.mmap(-1, part_bytes * threads)
    try:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return part_bytes * threads / median_pass_seconds(memory, part_bytes, threads, repeats)
    finally:
        memory.close()


cdef median_pass_seconds(memory, int64_t part_bytes, int threads, repeats):
    """Median duration of a pass over ``memory``."""
    cdef uint64_t checksum
    cdef Py_buffer buffer
    seconds = []
    PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE)
    try:
        with nogil:
            touch_parts(<char *>buffer.buf, part_bytes, threads)
        for _ in range(repeats):
            start = time.perf_counter()
            with nogil:
                checksum = read_parts(<const char *>buffer.buf, part_bytes, threads)
            seconds.append(time.perf_counter() - start)
            if checksum != 0:
                raise RuntimeError("memory: the data read differ from the data written")
    finally:
        PyBuffer_Release(&buffer)
    return statistics.median(seconds)
