/* AVX2 with AVX-VNNI: vpdpbusd multiplies 32 unsigned weights by 32 signed activations and adds the
 * four products of each lane to its 32-bit sum.
 *
 * Registers, of 16: `rows * planes` (6) times two halves of 32-bit sums, 2 weights, activation, mask.
 */
#include "ukernel.h"

#ifdef MARLIN_CY_AVXVNNI
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
        a[i] = view->a + task->rows[row + i / planes] * task->a_row_stride + i % planes * view->blocks * BLOCK_K;
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
                const __m256i x = broadcast_quad(a[i] + block * BLOCK_K + 4 * quad);
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
        const __m256i sum_split = _mm256_set1_epi32(meta->sum_split);
        for (int half = 0; half < 2; half++) {
            __m256i total = sum[r * planes][half];
            if (planes == 2)
                total = _mm256_add_epi32(_mm256_slli_epi32(total, 8), sum[r * planes + 1][half]);
            total = _mm256_add_epi32(total, _mm256_madd_epi16(header->minus_zero[half], sum_split));
            add_group(view->sums + (row + r) * PAIR_N + 8 * half, total, header->scale[half], meta->scale);
        }
    }
}

#include "ymm_driver.h"

TARGET static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

TARGET static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

const ukernel_table ukernels_avxvnni = {
    .name = "avxvnni",
    .gemm = {{gemm_u4_i8, gemm_u4_i16}, {gemm_e2m1_i8, gemm_e2m1_i16}},
};
#endif
