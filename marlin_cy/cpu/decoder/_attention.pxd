"""Attention over a paged cache, as phases of a decoder's step."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dispatch cimport MAX_QUERIES, attention_scratch, ukernel_table
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu.decoder._batch cimport batch

# Keys and values in pages. The keys of page p of head h are at keys + h * key_head + p * key_page; strides are in bytes.
cdef struct kv_pool:
    char *keys                  # of a page and a head: [head_dim][KV_BLOCK]
    char *values                # of a page and a head: [KV_BLOCK][value_dim]
    int64_t key_head
    int64_t key_page
    int64_t value_head
    int64_t value_page
    int dtype

# Consecutive rows of one segment, and the chunks of the cache that any of the rows sees.
cdef struct attention_tile:
    int64_t segment
    int64_t row
    int64_t count
    int64_t first_chunk
    int64_t end_chunk
    int64_t first_partial       # split: the tile's first partial result

# A thread's memory for one unit.
cdef struct attention_area:
    attention_scratch scratch
    int32_t[MAX_QUERIES] begin  # the positions of the chunk that each query sees
    int32_t[MAX_QUERIES] end
    float[MAX_QUERIES] max      # over the chunks so far
    float[MAX_QUERIES] sum      # 0: the query has seen no chunk yet
    float[MAX_QUERIES] chunk_max
    float[MAX_QUERIES] chunk_sum

# Query head h of a row reads head h // (num_heads // num_kv_heads) of the pool.
cdef struct attention_job:
    const ukernel_table *table
    int num_threads
    kv_pool pool
    int64_t num_heads
    int64_t num_kv_heads
    int64_t head_dim
    int64_t value_dim
    int64_t window              # positions that a row sees, or 0: all up to its own
    float scale
    float soft_cap
    const float *sinks          # [num_heads], or NULL
    const float *q              # query h of row r is at q + r * q_row + h * q_head
    int64_t q_row
    int64_t q_head
    float *output               # [rows, num_heads, value_dim]
    # The cut into units, which begin_attention sets.
    const batch *rows
    const int32_t *needed       # [num_needed] the rows whose output is needed, ascending; NULL: all rows
    int64_t num_needed
    bint split                  # a unit is one chunk of one row; merge_row joins the results of a row's chunks
    int64_t heads_a_unit        # query heads, all of one head of the pool
    int64_t num_tiles
    int64_t num_units
    queue units
    # Memory that carve_attention takes.
    attention_tile *tiles       # [max_rows]
    attention_area *areas       # [num_threads]
    float *buffers              # [num_threads][buffer_floats]
    int64_t max_partials        # chunks of all rows that are split
    float *partial_max          # [max_partials][num_heads]
    float *partial_sum
    float *partial_out          # [max_partials][num_heads][value_dim]

cdef void store_position(const kv_pool *pool, const ukernel_table *table, const int32_t *pages, int64_t position,
                         int64_t head, const float *k, int64_t head_dim, const float *v, int64_t value_dim) noexcept nogil
cdef int64_t first_visible(const attention_job *job, int64_t position) noexcept nogil
cdef int64_t chunks_of(int64_t tokens) noexcept nogil
cdef void carve_attention(arena *memory, attention_job *job, int64_t max_rows, int64_t max_chunks) noexcept nogil
cdef void begin_attention(attention_job *job, const batch *rows, const int32_t *needed,
                          int64_t num_needed) noexcept nogil
cdef void run_attention(attention_job *job, member *m) noexcept nogil
cdef void finish_row(const attention_job *job, int64_t index) noexcept nogil
