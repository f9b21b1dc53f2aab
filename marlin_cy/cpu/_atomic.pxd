"""Atomics shared by prange bodies."""

from libc.stdint cimport int64_t

cdef extern from *:
    """
    #ifdef _MSC_VER
    #include <intrin.h>
    static __forceinline int64_t fetch_add(int64_t *value, int64_t increment)
    {
        return _InterlockedExchangeAdd64(value, increment);
    }
    static __forceinline int64_t load(const int64_t *value)
    {
        return *(const volatile int64_t *)value;
    }
    static __forceinline void wait_until(const int64_t *value, int64_t least)
    {
        while (*(const volatile int64_t *)value < least)
            _mm_pause();
        _ReadWriteBarrier();
    }
    #else
    #include <sched.h>
    static inline int64_t fetch_add(int64_t *value, int64_t increment)
    {
        return __atomic_fetch_add(value, increment, __ATOMIC_ACQ_REL);
    }
    static inline int64_t load(const int64_t *value)
    {
        return __atomic_load_n(value, __ATOMIC_RELAXED);
    }
    static inline void wait_until(const int64_t *value, int64_t least)
    {
        int turns = 0;
        while (__atomic_load_n(value, __ATOMIC_ACQUIRE) < least) {
            if (++turns > 2000) /* the other thread may not be running */
                sched_yield();
    #if defined(__x86_64__) || defined(__i386__)
            else
                __builtin_ia32_pause();
    #endif
        }
    }
    #endif
    """
    # Returns the value before the addition. Writes before an addition are visible after later additions to the value.
    int64_t fetch_add(int64_t *value, int64_t increment) nogil
    # A plain load. It fetches the cache line in shared state; an addition would fetch it in exclusive state.
    int64_t load(const int64_t *value) nogil
    # Wait until additions by other threads have made the value at least `least`; their earlier writes are then visible.
    void wait_until(const int64_t *value, int64_t least) nogil
