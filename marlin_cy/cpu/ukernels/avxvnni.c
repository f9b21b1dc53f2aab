/* AVX2 with AVX-VNNI: vpdpbusd multiplies 32 unsigned weights by 32 signed activations and adds the four products of
 * each 32-bit lane to the lane's sum.
 *
 * Registers, of 16: `rows * planes` (6) times two halves of 32-bit sums, 2 weights, activation, mask.
 */
#include "isa.h"

#ifdef MARLIN_CY_X86
#include "x86.h"

#ifdef COMPILER_HAS_AVXVNNI
#include "ymm.h"

#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define KERNEL static inline __attribute__((always_inline, target("avx2,fma,f16c,avxvnni")))

enum { PLANE_ROWS = 6 };

/* rows, planes, source and codes are constants wherever this is inlined. */
KERNEL void micro_kernel(const gemm_task *task, const group_view *view, const group_header *header, int row, int rows,
                         int planes, int source, int codes)
{
    const int8_t *a[PLANE_ROWS];
    __m256i sum[PLANE_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows * planes; i++)
        a[i] = view->a + task->rows[row + i / planes] * task->a_row_stride + i % planes * view->blocks * LANE_K;
#pragma GCC unroll 8
    for (int i = 0; i < rows * planes; i++)
        sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (int block = 0; block < view->blocks; block++) {
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++) {
            __m256i w[2];
            load_quad(w, view, block, quad, source, codes);
#pragma GCC unroll 8
            for (int i = 0; i < rows * planes; i++) {
                const __m256i x = broadcast_quad(a[i] + block * LANE_K + 4 * quad);
                for (int half = 0; half < 2; half++) {
                    sum[i][half] = _mm256_dpbusd_avx_epi32(sum[i][half], w[half], x);
                    KEEP(sum[i][half]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const act_meta *meta = view->meta + task->rows[row + r];
        for (int half = 0; half < 2; half++) {
            __m256i total = sum[r * planes][half];
            if (planes == 2)
                total = _mm256_add_epi32(_mm256_slli_epi32(total, 8), sum[r * planes + 1][half]);
            total = _mm256_add_epi32(total, zero_term(header, meta, half, codes));
            add_group(view->sums + (row + r) * PAIR_N + 8 * half, total, header->scale[half],
                      _mm256_set1_ps(meta->scale));
        }
    }
}

#include "ymm_driver.h"

TARGET static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

TARGET static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

TARGET static void gemm_iq4_i8(const gemm_task *task) { gemm(task, 1, CODES_IQ4_NL); }

TARGET static void gemm_iq4_i16(const gemm_task *task) { gemm(task, 2, CODES_IQ4_NL); }

TARGET static void gemm_u8_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT8); }

TARGET static void gemm_u8_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT8); }

TARGET static int64_t peak(int64_t steps)
{
    enum { ACCUMULATORS = 12, OPS = 8 * 8 }; /* 8 lanes of four products and four additions */
    const __m256i w = _mm256_set1_epi8(3), a = _mm256_set1_epi8(5);
    __m256i sums[ACCUMULATORS];
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; i++)
        sums[i] = _mm256_setzero_si256();
    for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++) {
            sums[i] = _mm256_dpbusd_avx_epi32(sums[i], w, a);
            KEEP(sums[i]);
        }
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; i++)
        USE(sums[i]);
    return steps * ACCUMULATORS * OPS;
}

static isa_support probe(void)
{
    const int cpu = cpuid_has(7, 1, CPUID_EAX, 1u << 4);
    return x86_support(cpu, os_saves(XCR0_YMM), "AVX2 and AVX-VNNI", "the CPU lacks AVX-VNNI");
}
#else
static isa_support probe(void) { return (isa_support){0, "built by a compiler that does not know AVX-VNNI"}; }
#endif

const isa_descriptor isa_avxvnni = {
    .name = "avxvnni",
    .parent = &isa_avx2,
    .probe = probe,
#ifdef COMPILER_HAS_AVXVNNI
    .peak = peak,
    .kernels = {.gemm = {[CODES_UINT4] = {gemm_u4_i8, gemm_u4_i16},
                         [CODES_E2M1] = {gemm_e2m1_i8, gemm_e2m1_i16},
                         [CODES_IQ4_NL] = {gemm_iq4_i8, gemm_iq4_i16},
                         [CODES_UINT8] = {gemm_u8_i8, gemm_u8_i16}}},
#endif
};
#endif
