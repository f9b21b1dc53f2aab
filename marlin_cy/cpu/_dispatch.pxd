"""The micro-kernel table, for the other extensions of this package."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

cdef extern from "ukernel.h" nogil:
    enum:
        TILE_N
        PAIR_N
        BLOCK_K
        BLOCK_BYTES
        GROUP_HEADER_BYTES
        MAX_GROUP_K
        GROUP_K_STEP
        MAX_MC
        DTYPE_F32
        DTYPE_F16
        DTYPE_BF16
        CODES_UINT4
        CODES_E2M1
        E2M1_ZERO
        ACTIVATION_SILU
        ACTIVATION_GELU
        ACTIVATION_GELU_TANH
        ACTIVATION_SWIGLUOAI

    ctypedef struct act_meta:
        float scale
        int32_t sum_split
        int32_t symmetric_sum

    ctypedef struct gemm_scratch:
        pass

    ctypedef struct gemm_task:
        const uint8_t *header[2]
        const uint8_t *body[2]
        const uint8_t *next[2]
        int scale_dtype
        int num_groups
        int group_blocks
        int last_group_blocks
        const int8_t *a
        ptrdiff_t a_group_stride
        ptrdiff_t a_row_stride
        const act_meta *meta
        ptrdiff_t meta_group_stride
        const int32_t *rows
        int m
        int accumulate
        float *out
        gemm_scratch *scratch

    ctypedef void gemm_fn(const gemm_task *task) noexcept nogil
    ctypedef void quantize_row_fn(
        const float *x, int64_t k, int group_size, int planes, int8_t *a, ptrdiff_t a_group_stride,
        act_meta *meta, ptrdiff_t meta_group_stride) noexcept nogil
    ctypedef void widen_fn(float *dst, const void *src, int dtype, int64_t n) noexcept nogil
    ctypedef void narrow_fn(void *dst, const float *src, int dtype, int64_t n) noexcept nogil
    ctypedef void store_rows_fn(
        char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums, const float *bias, int n,
        int dtype) noexcept nogil
    ctypedef void glu_epilogue_fn(
        float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums, const float *gate_bias,
        const float *up_bias, int activation) noexcept nogil
    ctypedef void axpy_fn(float *dst, const float *src, float weight, int64_t n) noexcept nogil

    ctypedef void softmax_fn(float *x, int64_t n) noexcept nogil
    ctypedef void sigmoid_fn(float *x, int64_t n) noexcept nogil

    ctypedef struct ukernel_table:
        const char *name
        gemm_fn *gemm[2][2]
        int mr
        int mc
        int min_matrix_rows
        quantize_row_fn *quantize_row
        widen_fn *widen
        narrow_fn *narrow
        store_rows_fn *store_rows
        glu_epilogue_fn *glu_epilogue
        axpy_fn *axpy
        softmax_fn *softmax
        sigmoid_fn *sigmoid

cdef const ukernel_table *table_of(str name) except NULL
