"""Attention of a batch over a cache in blocks: :class:`BlockBatch`.

Servers keep the cache of many sequences in blocks of more positions than a page of the kernels has. A block holds, for
each of its heads, pages of ``KV_BLOCK`` positions, each with its keys before its values::

    block b    head 0                                                      head 1
               page 0 keys | page 0 values | page 1 keys | page 1 values   page 0 keys | ...

    keys of a page [head_dim][KV_BLOCK], values of a page [KV_BLOCK][head_dim]

So the pages of the whole cache are numbered in the order of memory: page p of head h of block b is number
``(b * kv_heads + h) * pages_a_block + p``, and the kernels read the cache in place.
"""

import numpy as np

from libc.stdint cimport INT32_MAX, int32_t, int64_t, uintptr_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve, take_floats
from marlin_cy.cpu._buffers cimport element_bytes, float_matrix, matrix, tensor_dtype
from marlin_cy.cpu._dispatch cimport KV_BLOCK, LANES, MAX_HEAD_DIM
from marlin_cy.cpu._team cimport barrier, member, run_team
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport (
    attention_job, begin_attention, carve_attention, chunks_of, finish_row, run_attention, store_position,
)
from marlin_cy.cpu.decoder._batch cimport batch, segment

from marlin_cy.errors import UnsupportedError

# Rows of heads in a tensor: head h of row r is at data + (r * stride + h * head_dim) * element_bytes(dtype).
cdef struct head_rows:
    char *data
    int64_t stride
    int dtype

cdef struct operation:
    attention_job attend        # q and output are the same memory
    batch rows
    int64_t longest             # positions of the longest sequence
    head_rows q
    head_rows k
    head_rows v
    head_rows out
    float *heads                # [rows, num_heads, head_dim], as float32
    float *key_values           # [num_threads][2][head_dim]


def are_supported(int64_t head_dim, int64_t block_size):
    """Whether :class:`BlockBatch` can attend to heads of ``head_dim`` values in blocks of ``block_size`` positions."""
    return head_dim % LANES == 0 and 0 < head_dim <= MAX_HEAD_DIM and block_size > 0 and block_size % KV_BLOCK == 0


cdef class BlockBatch:
    """The sequences of one step, for the attention of each layer.

    Parameters
    ----------
    query_starts : ndarray
        int32 ``[sequences + 1]``: the first row of each sequence, and the number of rows.
    lengths : ndarray
        int32 ``[sequences]``: the positions of each sequence, with those of its rows, which are the last.
    block_table : ndarray
        int32 ``[sequences, blocks]``: the blocks of each sequence.
    block_size : int
        Positions of a block, a multiple of ``KV_BLOCK``.
    kv_heads : int
        Heads of the cache.

    Raises
    ------
    ValueError
        The arrays do not fit each other.
    IndexError
        A negative block.
    """

    cdef batch rows
    cdef int64_t longest
    cdef int64_t blocks         # that a cache must have
    cdef int64_t block_size
    cdef int64_t kv_heads
    cdef object memory          # of the arrays that `rows` points to

    def __init__(self, query_starts, lengths, block_table, int64_t block_size, int64_t kv_heads):
        cdef const int32_t[::1] starts = query_starts, totals = lengths
        cdef const int32_t[:, :] blocks = block_table
        cdef int64_t sequences = totals.shape[0], pages_a_block = block_size // KV_BLOCK, used, s, page, block, step
        if block_size < 1 or block_size % KV_BLOCK or kv_heads < 1:
            raise ValueError(f"block_size: got {block_size} and {kv_heads} heads, expected a multiple of {KV_BLOCK}")
        if starts.shape[0] != sequences + 1 or blocks.shape[0] != sequences:
            raise ValueError(f"query_starts: got {starts.shape[0]} and {blocks.shape[0]} rows of block_table, expected "
                             f"one more than the {sequences} lengths, and as many")
        if starts[0] != 0:
            raise ValueError(f"query_starts: got {starts[0]} at [0], expected 0")
        step = kv_heads * pages_a_block
        cdef int32_t[:, ::1] pages = np.empty((sequences, max(blocks.shape[1], 1) * pages_a_block), np.int32)
        cdef char[::1] segments = np.empty(max(sequences, 1) * sizeof(segment), np.int8)
        cdef segment *part = <segment *>&segments[0]
        self.block_size, self.kv_heads = block_size, kv_heads
        for s in range(sequences):
            if starts[s + 1] < starts[s] or totals[s] < starts[s + 1] - starts[s]:
                raise ValueError(f"lengths: got {totals[s]} at [{s}] for the rows {starts[s]} to {starts[s + 1]}")
            used = (totals[s] + block_size - 1) // block_size
            if used > blocks.shape[1]:
                raise ValueError(f"block_table: got {blocks.shape[1]} blocks, expected {used} at [{s}]")
            for block in range(used):
                if blocks[s, block] < 0 or (<int64_t>blocks[s, block] + 1) * step > INT32_MAX:
                    raise IndexError(f"block_table: got {blocks[s, block]} at [{s}, {block}], expected 0 to "
                                     f"{INT32_MAX // step - 1}")
                self.blocks = max(self.blocks, <int64_t>blocks[s, block] + 1)
                for page in range(pages_a_block):
                    pages[s, block * pages_a_block + page] = <int32_t>(blocks[s, block] * step + page)
            part[s].row, part[s].count, part[s].state = starts[s], starts[s + 1] - starts[s], -1
            part[s].position, part[s].pages = totals[s] - part[s].count, &pages[s, 0]
            self.longest = max(self.longest, <int64_t>totals[s])
        segment_of = np.repeat(np.arange(sequences, dtype=np.int32), np.diff(query_starts))
        cdef const int32_t[::1] of_row = segment_of if segment_of.size else np.zeros(1, np.int32)
        self.rows.rows, self.rows.num_segments, self.rows.segments = starts[sequences], sequences, part
        self.rows.segment_of = &of_row[0]
        self.memory = (pages, segments, of_row)

    def attend(self, Workspace workspace, q, k, v, cache, out, float scale, int64_t window, sinks, float soft_cap):
        """Store the keys and values of a layer's rows in the cache; write the rows' attention to ``out``.

        Parameters
        ----------
        workspace : Workspace
        q, out : Tensor
            ``[rows, num_heads, head_dim]``: more rows than the batch has are ignored, and may lie apart.
        k, v : Tensor
            ``[rows, kv_heads, head_dim]``, likewise.
        cache : Tensor
            ``[blocks, kv_heads, block_size, 2 * head_dim]``, contiguous. Only this class reads its blocks.
        scale : float
        window : int
            Positions that a row sees, or 0: all up to its own.
        sinks : Tensor or None
            float32 ``[num_heads]``.
        soft_cap : float
            0: none.
        """
        cdef operation op
        cdef attention_job *job = &op.attend
        cdef int64_t head_dim = q.size(-1)
        cdef matrix pool = float_matrix(cache, "cache", 2 * head_dim, True), logits
        cdef int64_t page_bytes = 2 * KV_BLOCK * head_dim * element_bytes(pool.dtype)
        if not are_supported(head_dim, self.block_size):
            raise UnsupportedError(f"q: got heads of {head_dim} values; the CPU's kernels do multiples of {LANES}, at "
                                   f"most {MAX_HEAD_DIM}")
        if cache.ndim != 4 or cache.size(1) != self.kv_heads or cache.size(2) != self.block_size:
            raise ValueError(f"cache: got shape {tuple(cache.shape)}, expected [blocks, {self.kv_heads}, "
                             f"{self.block_size}, {2 * head_dim}]")
        if cache.size(0) < self.blocks:
            raise IndexError(f"block_table: got {self.blocks - 1}, expected at most {cache.size(0) - 1}")
        memset(&op, 0, sizeof(operation))
        job.num_heads, job.num_kv_heads, job.head_dim, job.value_dim = q.size(-2), self.kv_heads, head_dim, head_dim
        if job.num_heads % self.kv_heads:
            raise ValueError(f"q: got {job.num_heads} heads, expected a multiple of {self.kv_heads}, the heads of cache")
        op.q, op.out = self.heads_of(q, "q", job.num_heads, head_dim), self.heads_of(out, "out", job.num_heads, head_dim)
        op.k, op.v = self.heads_of(k, "k", self.kv_heads, head_dim), self.heads_of(v, "v", self.kv_heads, head_dim)
        if sinks is not None:
            logits = float_matrix(sinks, "sinks", job.num_heads, False)
            if logits.rows != 1 or sinks.element_size() != sizeof(float):
                raise ValueError(f"sinks: got {logits.rows} rows of {sinks.dtype}, expected one of float32")
            job.sinks = <const float *>logits.data
        job.table, job.num_threads = workspace.table, workspace.num_threads
        job.scale, job.window, job.soft_cap = scale, window, soft_cap
        job.pool.keys, job.pool.values, job.pool.dtype = pool.data, pool.data + page_bytes // 2, pool.dtype
        job.pool.key_page = job.pool.value_page = page_bytes
        job.pool.key_head = job.pool.value_head = self.block_size // KV_BLOCK * page_bytes
        job.q_row, job.q_head = job.num_heads * head_dim, head_dim
        op.rows, op.longest = self.rows, self.longest
        if not op.rows.rows:
            return
        workspace.enter()
        try:
            carve(workspace, &workspace.scratch, carve_operation, &op)
            job.q, job.output = op.heads, op.heads
            with nogil:
                begin_attention(job, &op.rows, NULL, op.rows.rows)
                run_team(workspace.num_threads, run_operation, &op)
        finally:
            workspace.leave()

    cdef head_rows heads_of(self, tensor, str name, int64_t heads, int64_t head_dim) except *:
        """The rows of a tensor ``[rows, heads, head_dim]``, which may lie apart."""
        cdef head_rows found
        cdef tuple strides = tensor.stride()
        if tensor.ndim != 3 or tensor.size(0) < self.rows.rows or tensor.size(1) != heads or tensor.size(2) != head_dim:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{self.rows.rows}, {heads}, {head_dim}]")
        if strides[2] != 1 or strides[1] != head_dim:
            raise ValueError(f"{name}: got strides {strides}, expected contiguous heads")
        found.dtype, found.stride = tensor_dtype(tensor, name), strides[0]
        found.data = <char *><uintptr_t>tensor.data_ptr()
        return found


cdef void carve_operation(arena *memory, void *address) noexcept nogil:
    cdef operation *op = <operation *>address
    cdef attention_job *job = &op.attend
    op.heads = take_floats(memory, op.rows.rows * job.num_heads * job.head_dim)
    op.key_values = take_floats(memory, job.num_threads * 2 * job.head_dim)
    carve_attention(memory, job, op.rows.rows, chunks_of(op.longest))


cdef void run_operation(void *address, member *m) noexcept nogil:
    cdef operation *op = <operation *>address
    cdef attention_job *job = &op.attend
    cdef int64_t first = op.rows.rows * m.thread // m.num_threads, end = op.rows.rows * (m.thread + 1) // m.num_threads
    cdef int64_t row, width = job.num_heads * job.head_dim
    for row in range(first, end):
        place_row(op, row, op.key_values + m.thread * 2 * job.head_dim)
    barrier(m)
    run_attention(job, m)
    barrier(m)
    for row in range(first, end):
        finish_row(job, row)
        job.table.narrow(op.out.data + row * op.out.stride * element_bytes(op.out.dtype), op.heads + row * width,
                         op.out.dtype, width)


cdef void place_row(const operation *op, int64_t row, float *key_value) noexcept nogil:
    """Convert a row's queries, and write its keys and values to the cache."""
    cdef const attention_job *job = &op.attend
    cdef const segment *part = op.rows.segments + op.rows.segment_of[row]
    cdef int64_t head, d = job.head_dim
    job.table.widen(op.heads + row * job.num_heads * d, op.q.data + row * op.q.stride * element_bytes(op.q.dtype),
                    op.q.dtype, job.num_heads * d)
    for head in range(job.num_kv_heads):
        job.table.widen(key_value, op.k.data + (row * op.k.stride + head * d) * element_bytes(op.k.dtype), op.k.dtype, d)
        job.table.widen(key_value + d, op.v.data + (row * op.v.stride + head * d) * element_bytes(op.v.dtype),
                        op.v.dtype, d)
        store_position(&job.pool, job.table, part.pages, part.position + row - part.row, head, key_value, d,
                       key_value + d, d)
