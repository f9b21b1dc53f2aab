"""How many integer operations this machine can do: the bar that compute-bound kernels are held against."""

import statistics
import time

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from marlin_cy.cpu._dispatch import isas

# A loop of nothing but the dot products of 8-bit values that an ISA's kernels are made of, on registers: more
# accumulators than a dot product's latency times its throughput, which is 10 on the cores seen. The empty asm
# statements keep the compiler from taking a product out of the loop, or leaving it out.
#
# vpmaddubsw gives 16-bit sums. Weights of 4 bits allow eight of them to be added before vpmaddwd brings them to 32
# bits, so that is counted as the kernels do it (avx2.c).
cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    typedef int64_t (*peak_fn)(int64_t steps);

    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    #include <immintrin.h>

    #define OPAQUE(vector, constraint) __asm__("" : "+" constraint(vector))
    #define USED(vector, constraint) __asm__ volatile("" : : constraint(vector))

    enum { ACCUMULATORS = 12, MADDUBS_ACCUMULATORS = 4, MADDUBS_A_SUM = 8 };
    #define OPS_PER_LANE 8 /* of 32 bits: four products, four additions */

    __attribute__((target("avx512f,avx512vnni"))) static int64_t peak_avx512vnni(int64_t steps)
    {
        __m512i sums[ACCUMULATORS], w = _mm512_set1_epi8(3), a = _mm512_set1_epi8(5);
    #pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++)
            sums[i] = _mm512_setzero_si512();
        for (int64_t step = 0; step < steps; step++)
    #pragma GCC unroll 12
            for (int i = 0; i < ACCUMULATORS; i++) {
                sums[i] = _mm512_dpbusd_epi32(sums[i], w, a);
                OPAQUE(sums[i], "v");
            }
    #pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++)
            USED(sums[i], "v");
        return steps * ACCUMULATORS * 16 * OPS_PER_LANE;
    }

    #if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
    #define HAS_AVXVNNI 1
    __attribute__((target("avx2,avxvnni"))) static int64_t peak_avxvnni(int64_t steps)
    {
        __m256i sums[ACCUMULATORS], w = _mm256_set1_epi8(3), a = _mm256_set1_epi8(5);
    #pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++)
            sums[i] = _mm256_setzero_si256();
        for (int64_t step = 0; step < steps; step++)
    #pragma GCC unroll 12
            for (int i = 0; i < ACCUMULATORS; i++) {
                sums[i] = _mm256_dpbusd_avx_epi32(sums[i], w, a);
                OPAQUE(sums[i], "x");
            }
    #pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++)
            USED(sums[i], "x");
        return steps * ACCUMULATORS * 8 * OPS_PER_LANE;
    }
    #endif

    __attribute__((target("avx2"))) static int64_t peak_avx2(int64_t steps)
    {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sums[MADDUBS_ACCUMULATORS], w = _mm256_set1_epi8(3), a = _mm256_set1_epi8(5);
    #pragma GCC unroll 4
        for (int i = 0; i < MADDUBS_ACCUMULATORS; i++)
            sums[i] = _mm256_setzero_si256();
        for (int64_t step = 0; step < steps; step++) {
            __m256i sums16[MADDUBS_ACCUMULATORS];
    #pragma GCC unroll 8
            for (int j = 0; j < MADDUBS_A_SUM; j++)
    #pragma GCC unroll 4
                for (int i = 0; i < MADDUBS_ACCUMULATORS; i++) {
                    const __m256i product = _mm256_maddubs_epi16(w, a);
                    sums16[i] = j == 0 ? product : _mm256_add_epi16(sums16[i], product);
                    OPAQUE(a, "x");
                    OPAQUE(sums16[i], "x");
                }
    #pragma GCC unroll 4
            for (int i = 0; i < MADDUBS_ACCUMULATORS; i++) {
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(sums16[i], ones));
                OPAQUE(sums[i], "x");
            }
        }
    #pragma GCC unroll 4
        for (int i = 0; i < MADDUBS_ACCUMULATORS; i++)
            USED(sums[i], "x");
        return steps * MADDUBS_ACCUMULATORS * MADDUBS_A_SUM * 8 * OPS_PER_LANE;
    }
    #endif

    /* The loop of an ISA, or NULL where there is none. It returns the operations that it has done. */
    static peak_fn peak_of(const char *isa)
    {
    #if defined(OPS_PER_LANE)
        if (!strcmp(isa, "avx512vnni"))
            return peak_avx512vnni;
    #ifdef HAS_AVXVNNI
        if (!strcmp(isa, "avxvnni"))
            return peak_avxvnni;
    #endif
        if (!strcmp(isa, "avx2"))
            return peak_avx2;
    #endif
        (void)isa;
        return 0;
    }
    """
    ctypedef int64_t (*peak_fn)(int64_t steps) noexcept nogil
    peak_fn peak_of(const char *isa) nogil

cdef int64_t STEPS = 1 << 16


cdef int64_t run_threads(peak_fn loop, int64_t steps, int num_threads) noexcept nogil:
    """Operations of one loop on every thread."""
    cdef int thread
    cdef int64_t operations = 0
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
        operations += loop(steps)
    return operations


def int8_peak(str isa, int num_threads, int repeats=9):
    """Operations a second of an ISA's dot products of unsigned 4-bit with signed 8-bit values.

    A multiplication and an addition are two operations. The figure is the median of ``repeats`` passes of about
    a millisecond, after one that is not counted.

    Parameters
    ----------
    isa : str
        As :func:`marlin_cy.cpu._dispatch.isas` names it.
    num_threads : int
        At least 1.
    repeats : int
        At least 1.

    Returns
    -------
    float or None
        None for an ISA whose peak is not known here: "generic" has no instruction for it, "amx" no loop.

    Raises
    ------
    ValueError
        An ISA that this machine cannot run, or an argument below its least value.
    """
    if isa not in [known["name"] for known in isas() if known["available"]]:
        raise ValueError(f"isa: got {isa!r}, which this machine cannot run")
    if num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads}, expected at least 1")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    cdef peak_fn loop = peak_of(isa.encode())
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
