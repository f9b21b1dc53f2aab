"""What threads of a parallel loop tell each other."""

from libc.stdint cimport int64_t

cdef extern from *:
    """
    #ifdef _MSC_VER
    #include <intrin.h>
    static __forceinline int64_t fetch_add(int64_t *value, int64_t increment)
    {
        return _InterlockedExchangeAdd64(value, increment);
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
    static inline void wait_until(const int64_t *value, int64_t least)
    {
        int turns = 0;
        while (__atomic_load_n(value, __ATOMIC_ACQUIRE) < least) {
            if (++turns > 2000) /* whom this waits for may have no CPU */
                sched_yield();
    #if defined(__x86_64__) || defined(__i386__)
            else
                __builtin_ia32_pause();
    #endif
        }
    }
    #endif
    """
    # What a thread wrote before can be read by threads whose own addition comes after.
    int64_t fetch_add(int64_t *value, int64_t increment) nogil
    # Wait until additions by others have made the value at least so large; what they wrote before can be read then.
    void wait_until(const int64_t *value, int64_t least) nogil
