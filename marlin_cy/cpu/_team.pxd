"""Teams of threads that go through the phases of a call together."""

from libc.stdint cimport int64_t

from marlin_cy.cpu._atomic cimport fetch_add, load, wait_until

cdef struct team:
    char[64] before             # keeps the counter, which all threads write, on a cache line of its own
    int64_t arrivals            # of all threads at all barriers of the call so far
    char[64] after

# One thread of a team, on that thread's stack.
cdef struct member:
    team *group
    int thread                  # 0 to num_threads - 1
    int num_threads             # that run; OpenMP may give fewer than were asked for
    int64_t barriers            # that this thread has passed

# Items of a phase that threads take one after another. Zero `next` before the phase.
cdef struct queue:
    int64_t next
    int64_t[7] padding          # to a whole cache line

ctypedef void member_fn(void *job, member *m) noexcept nogil

cdef void run_team(int num_threads, member_fn *run, void *job) noexcept nogil

cdef inline void barrier(member *m) noexcept nogil:
    """Wait for all threads of the team. What they wrote before is visible afterwards."""
    if m.num_threads == 1:
        return
    m.barriers += 1
    fetch_add(&m.group.arrivals, 1)
    wait_until(&m.group.arrivals, m.barriers * m.num_threads)

cdef inline int64_t take_items(queue *items, int64_t count, int64_t turn, const member *m) noexcept nogil:
    """The first of ``turn`` items that no thread has taken, and of fewer at the end; ``count`` or more if none are left."""
    cdef int64_t item
    if m.num_threads == 1:
        item = items.next
        items.next += turn
        return item
    if load(&items.next) >= count:
        return count
    return fetch_add(&items.next, turn)

cdef enum:
    TURNS_PER_THREAD = 8        # a slow or busy thread takes fewer

cdef inline int64_t items_a_turn(int64_t count, const member *m) noexcept nogil:
    """Items that threads take at once where adjacent items write to adjacent memory."""
    return max(<int64_t>1, count // (TURNS_PER_THREAD * m.num_threads))

cdef inline int64_t take_item(queue *items, int64_t count, const member *m) noexcept nogil:
    """The number of an item that no thread has taken; ``count`` or more if there are none left."""
    return take_items(items, count, 1, m)
