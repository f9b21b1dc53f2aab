"""The contract of ``ukernels/ukernel.h`` and the tables of kernels, for the other extensions of this package.

Cython takes names and types from these declarations. Sizes, offsets and values come from the C headers. The C compiler
rejects a declaration that does not match its header.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

cdef extern from "ukernel.h" nogil:
    enum:
        TILE_N
        PAIR_N
        LANE_K
        LINE_BYTES
        MAX_GROUP_K
        GROUP_K_STEP
        CHUNK_K
        MAX_MC
        MAX_PLANES
        QMAX_INT8
        QMAX_INT16
        SYMMETRIC_ZERO
        DTYPE_F32
        DTYPE_F16
        DTYPE_BF16
        DTYPE_I8
        DTYPE_F8
        CODES_COUNT
        SCALES_COUNT
        SCALE_BLOCK_K
        ACTIVATION_SILU
        ACTIVATION_GELU
        ACTIVATION_GELU_TANH
        ACTIVATION_SWIGLUOAI
        ACTIVATION_SILU_CLAMP10
        ACTIVATION_RELU2

        LANES
        KV_BLOCK
        CHUNK_PAGES
        ATTENTION_CHUNK
        MAX_QUERIES
        MAX_HEAD_DIM

    const double QUANTIZE_MIN_AMAX

    ctypedef struct code_type:
        const char *name
        int bits
        uint8_t multiplicands[16]
        int is_identity
        int max_multiplicand
        int has_zero_points
        int zero_bytes
        int symmetric_zero
        int units_per_one
        int min_group

    const code_type code_types[CODES_COUNT]

    ctypedef struct scale_record:
        const char *name
        int8_t scale_bytes
        int8_t has_minimum
        int8_t has_blocks

    const scale_record scale_records[SCALES_COUNT]

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
        int scales
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

    ctypedef struct dense_task:
        const float *x
        ptrdiff_t x_stride
        int64_t m
        const void *w
        int dtype
        ptrdiff_t w_stride
        int64_t n
        int64_t k
        const float *scales
        ptrdiff_t scale_stride
        int64_t scale_k
        const float *bias
        float *out
        ptrdiff_t out_stride

    ctypedef struct attention_scratch:
        pass

    ctypedef struct attention_task:
        int m
        int d
        int dv
        const float *q
        ptrdiff_t q_stride
        const char *keys
        const char *values
        ptrdiff_t key_stride
        ptrdiff_t value_stride
        const int32_t *pages
        int dtype
        float scale
        float soft_cap
        const int32_t *begin
        const int32_t *end
        float *max
        float *sum
        float *out
        ptrdiff_t out_stride
        attention_scratch *scratch

    ctypedef struct delta_task:
        int64_t tokens
        int64_t key_dim
        int64_t columns
        const float *q
        const float *k
        ptrdiff_t q_stride
        ptrdiff_t k_stride
        const float *v
        ptrdiff_t v_stride
        const float *decay
        const float *beta
        ptrdiff_t gate_stride
        float *state
        ptrdiff_t state_stride
        float *y
        ptrdiff_t y_stride

    ctypedef void rms_norm_fn(float *dst, const float *src, const float *weight, float eps, int64_t n) noexcept nogil
    ctypedef void gated_rms_norm_fn(
        float *dst, const float *src, const float *weight, const float *gate, float eps, int64_t n) noexcept nogil
    ctypedef void l2_normalize_fn(float *x, float factor, int64_t n) noexcept nogil
    ctypedef void add_fn(float *dst, const float *src, int64_t n) noexcept nogil
    ctypedef void rope_fn(
        float *x, const float *cos, const float *sin, int64_t pairs, int interleaved) noexcept nogil
    ctypedef void sigmoid_gate_fn(float *x, const float *gate, int64_t n) noexcept nogil
    ctypedef void glu_rows_fn(
        float *dst, const float *gate, const float *up, int64_t n, int activation) noexcept nogil
    ctypedef void dense_fn(const dense_task *task) noexcept nogil
    ctypedef void attention_fn(const attention_task *task) noexcept nogil
    ctypedef void attention_merge_fn(
        float *max, float *sum, float *out, float max2, float sum2, const float *out2, int64_t n) noexcept nogil
    ctypedef void attention_finish_fn(
        float *out, float max, float sum, const float *sink, int64_t n) noexcept nogil
    ctypedef void store_keys_fn(void *page, const float *k, int position, int dtype, int d) noexcept nogil
    ctypedef void short_conv_fn(
        float *dst, float *state, const float *x, const float *weight, ptrdiff_t stride, int64_t channels,
        int width) noexcept nogil
    ctypedef void delta_gates_fn(
        float *decay, float *beta, const float *a, const float *b, const float *a_log, const float *dt_bias,
        int64_t n) noexcept nogil
    ctypedef void delta_rule_fn(const delta_task *task) noexcept nogil

    ctypedef struct ukernel_table:
        gemm_fn *gemm[CODES_COUNT][MAX_PLANES]
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
        rms_norm_fn *rms_norm
        gated_rms_norm_fn *gated_rms_norm
        l2_normalize_fn *l2_normalize
        add_fn *add
        rope_fn *rope
        sigmoid_gate_fn *sigmoid_gate
        glu_rows_fn *glu_rows
        dense_fn *dense
        attention_fn *attention
        attention_merge_fn *attention_merge
        attention_finish_fn *attention_finish
        store_keys_fn *store_keys
        short_conv_fn *short_conv
        delta_gates_fn *delta_gates
        delta_rule_fn *delta_rule

cdef extern from "isa.h" nogil:
    ctypedef struct isa_support:
        int available
        const char *reason

    ctypedef isa_support isa_probe_fn() noexcept nogil
    ctypedef int64_t peak_fn(int64_t steps) noexcept nogil

    ctypedef struct isa_descriptor:
        const char *name
        const isa_descriptor *parent
        isa_probe_fn *probe
        peak_fn *peak
        ukernel_table kernels

    const isa_descriptor *isa_at(int index)
    isa_support isa_probe(const isa_descriptor *isa)
    void isa_merge(ukernel_table *table, const isa_descriptor *isa)

cdef class KernelTable:
    cdef ukernel_table table    # complete; written once, before anyone can see this object
    cdef peak_fn *peak
    cdef readonly str name
    cdef object owner           # keeps the kernels' code loaded, where it is not this extension's

cdef KernelTable kernel_table(str name)
