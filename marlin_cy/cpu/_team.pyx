"""Teams of threads that go through the phases of a call together.

A call has one parallel region. All threads run the same function, which separates phases by :func:`barrier`: a barrier
takes less than a microsecond, the end of one region and the start of another several. OpenMP may give fewer threads
than a region asks for (nested regions, ``OMP_THREAD_LIMIT``), so the number of threads that run is known only inside::

    prange index     0     1     2     3          num_threads asked for
    OpenMP thread    0     1     0     1          two run: the indices from two on do nothing
"""

from cython.parallel cimport prange
from libc.stdint cimport int64_t

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    static int omp_get_num_threads(void) { return 1; }
    #endif
    """
    int omp_get_num_threads() nogil


cdef void run_team(int num_threads, member_fn *run, void *job) noexcept nogil:
    """Call ``run(job, member)`` on each thread of a team of at most ``num_threads``, and wait for all of them."""
    cdef team group
    cdef int thread
    group.arrivals = 0
    if num_threads == 1:
        run_member(&group, 0, 1, run, job)
        return
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
        run_member(&group, thread, omp_get_num_threads(), run, job)


cdef void run_member(team *group, int thread, int num_threads, member_fn *run, void *job) noexcept nogil:
    cdef member m
    if thread >= num_threads:
        return
    m.group, m.thread, m.num_threads, m.barriers = group, thread, num_threads, 0
    run(job, &m)


# ---------------------------------------------------------------------------------------------
# For tests

cdef struct rounds:
    int64_t count
    int64_t max_threads
    int64_t *marks              # [max_threads] the round that each thread has begun
    int64_t *faults             # rounds in which a thread saw another one behind


cdef void run_rounds(void *job, member *m) noexcept nogil:
    cdef rounds *r = <rounds *>job
    cdef int64_t number
    cdef int other
    for number in range(1, r.count + 1):
        r.marks[m.thread] = number
        barrier(m)
        for other in range(m.num_threads):
            if load(r.marks + other) != number:
                fetch_add(r.faults, 1)
        barrier(m)


def count_faults(int num_threads, int64_t rounds_to_run, int64_t[::1] marks):
    """Run a team through ``rounds_to_run`` rounds of two barriers; the number of stale marks that threads read.

    ``marks`` is int64 ``[num_threads]`` of zeros. For tests.
    """
    cdef rounds r
    cdef int64_t faults = 0
    r.count, r.max_threads, r.marks, r.faults = rounds_to_run, num_threads, &marks[0], &faults
    with nogil:
        run_team(num_threads, run_rounds, &r)
    return faults
