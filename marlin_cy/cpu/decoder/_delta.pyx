"""Gated DeltaNet, from normalised rows to the output projection.

``DeltaNetPlan`` has the formulas. Phases, each of which ends at a barrier:

1. *project*: queries, keys and values as one row of channels; gates;
2. *mix*: the convolution over each sequence's tokens, and the gates of the delta rule;
3. *normalise* queries and keys by heads;
4. *recur*: the delta rule, token by token, of each sequence and head;
5. *output*: heads are normalised and gated as they are quantised; then the output projection, which the caller's
   barrier ends.

On several hosts, each has some heads. A row's heads are normalised and gated before an exchange, and quantised after it.
"""

import numpy as np

from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, take_floats
from marlin_cy.cpu._dispatch cimport delta_task
from marlin_cy.cpu._exchange cimport Hosts, begin_rows, carve_rows, run_exchange
from marlin_cy.cpu._team cimport barrier, member
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._batch cimport batch, segment
from marlin_cy.cpu.decoder._cache cimport StatePool
from marlin_cy.cpu.decoder._projections cimport begin_group, carve_group, plain_rows, run_group, run_rows, set_group

cdef enum:
    CHANNELS = 256      # of an item of the convolution: a multiple of a cache line


# ---------------------------------------------------------------------------------------------
# Setting up

cdef int set_delta(delta_job *job, Workspace workspace, plan, pool, list owners, Hosts hosts) except -1:
    """Set the members that the workspace and a ``DeltaNetPlan`` determine."""
    transposed = np.ascontiguousarray(plan.conv.T)
    cdef const float[:, ::1] conv = transposed
    cdef const float[::1] a_log = plan.a_log
    cdef const float[::1] dt_bias = plan.dt_bias
    cdef const float[::1] norm = plan.norm
    cdef StatePool layer = pool
    owners += [plan, transposed]
    memset(job, 0, sizeof(delta_job))
    job.table = workspace.table
    set_group(&job.projections, workspace, [plan.qkv, plan.z, plan.b, plan.a], owners)
    set_group(&job.out, workspace, [plan.o], owners)
    job.conv, job.a_log, job.dt_bias, job.norm = &conv[0, 0], &a_log[0], &dt_bias[0], &norm[0]
    job.norm_eps, job.num_k_heads, job.num_v_heads = plan.norm_eps, plan.num_k_heads, plan.num_v_heads
    job.key_dim, job.value_dim, job.conv_width = plan.key_dim, plan.value_dim, plan.conv_width
    job.channels = 2 * job.num_k_heads * job.key_dim + job.num_v_heads * job.value_dim
    job.conv_state, job.state = layer.conv_data, layer.state_data
    if plan.values is None:
        job.out.prepare, job.out.prepared = finish_delta, job
    else:
        job.divided, job.out.gathered = True, hosts.set_rows(&job.values, plan.values)
    return 0


cdef void set_delta_rows(delta_job *job, plain_rows *rows, plain_rows *out_rows) noexcept nogil:
    job.projections.rows, job.out.rows = rows, out_rows


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_delta(arena *memory, delta_job *job, int64_t max_rows, int64_t max_out_rows) noexcept nogil:
    """The layout of a layer's memory; the caller owns the projections' input and the output of ``out``."""
    cdef int64_t values = job.num_v_heads * job.value_dim
    job.qkv = job.projections.projections[0].output = take_floats(memory, max_rows * job.channels)
    job.z = job.projections.projections[1].output = take_floats(memory, max_rows * values)
    job.b = job.projections.projections[2].output = take_floats(memory, max_rows * job.projections.projections[2].n)
    job.a = job.projections.projections[3].output = take_floats(memory, max_rows * job.projections.projections[3].n)
    job.beta = take_floats(memory, max_rows * job.num_v_heads)
    job.decay = take_floats(memory, max_rows * job.num_v_heads)
    job.y = take_floats(memory, max_rows * values)
    job.out.input = take_floats(memory, max_out_rows * job.out.k)
    if job.divided:
        carve_rows(memory, &job.values, max_out_rows)
    carve_group(memory, &job.projections, max_rows)
    carve_group(memory, &job.out, max_out_rows)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_delta(delta_job *job, const batch *rows, int64_t out_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_delta`."""
    job.rows = rows
    job.mixed.next = job.gated.next = job.normed_rows.next = job.heads.next = job.finished.next = 0
    if job.divided:
        begin_rows(&job.values, out_rows)
    begin_group(&job.projections, rows.rows)
    begin_group(&job.out, out_rows)


cdef void run_delta(delta_job *job, member *m) noexcept nogil:
    cdef int64_t rows = job.rows.rows, segments = job.rows.num_segments
    run_group(&job.projections, m)
    barrier(m)
    run_rows(&job.mixed, segments * channel_blocks(job), mix_channels, job, m)
    run_rows(&job.gated, rows, gate_row, job, m)
    barrier(m)
    run_rows(&job.normed_rows, rows, normalize_row, job, m)
    barrier(m)
    run_rows(&job.heads, segments * job.num_v_heads, recur, job, m)
    barrier(m)
    if job.out.num_rows == 0:  # only the state was wanted
        return
    if job.divided:
        run_rows(&job.finished, job.out.num_rows, finish_delta, job, m)
        run_exchange(&job.values, m)
    run_group(&job.out, m)


cdef inline int64_t channel_blocks(const delta_job *job) noexcept nogil:
    return (job.channels + CHANNELS - 1) // CHANNELS


cdef void mix_channels(void *delta, int64_t item, int thread) noexcept nogil:
    """The convolution of some channels, over the tokens of one sequence."""
    cdef delta_job *job = <delta_job *>delta
    cdef const segment *part = job.rows.segments + item // channel_blocks(job)
    cdef int64_t channel = item % channel_blocks(job) * CHANNELS, row
    cdef float *state = job.conv_state + part.state * (job.conv_width - 1) * job.channels + channel
    cdef float *x
    for row in range(part.row, part.row + part.count):
        x = job.qkv + row * job.channels + channel
        job.table.short_conv(x, state, x, job.conv + channel, job.channels,
                             min(<int64_t>CHANNELS, job.channels - channel), <int>job.conv_width)


cdef void gate_row(void *delta, int64_t row, int thread) noexcept nogil:
    cdef delta_job *job = <delta_job *>delta
    cdef int64_t gates = row * job.num_v_heads
    job.table.delta_gates(job.decay + gates, job.beta + gates, job.a + row * job.projections.projections[3].n,
                          job.b + row * job.projections.projections[2].n, job.a_log, job.dt_bias, job.num_v_heads)


cdef void normalize_row(void *delta, int64_t row, int thread) noexcept nogil:
    """Normalise the heads of a row's query and key."""
    cdef delta_job *job = <delta_job *>delta
    cdef float *q = job.qkv + row * job.channels
    cdef float *k = q + job.num_k_heads * job.key_dim
    cdef float factor = <float>(1 / sqrt(<double>job.key_dim))
    cdef int64_t head
    for head in range(job.num_k_heads):
        job.table.l2_normalize(q + head * job.key_dim, factor, job.key_dim)
        job.table.l2_normalize(k + head * job.key_dim, 1, job.key_dim)


cdef void recur(void *delta, int64_t item, int thread) noexcept nogil:
    """The delta rule of one head, over the tokens of one sequence."""
    cdef delta_job *job = <delta_job *>delta
    cdef const segment *part = job.rows.segments + item // job.num_v_heads
    cdef int64_t head = item % job.num_v_heads, key_head = head // (job.num_v_heads // job.num_k_heads)
    cdef float *row = job.qkv + part.row * job.channels
    cdef delta_task task
    task.tokens, task.key_dim, task.columns = part.count, job.key_dim, job.value_dim
    task.q = row + key_head * job.key_dim
    task.k = task.q + job.num_k_heads * job.key_dim
    task.v = row + 2 * job.num_k_heads * job.key_dim + head * job.value_dim
    task.q_stride = task.k_stride = task.v_stride = job.channels
    task.decay = job.decay + part.row * job.num_v_heads + head
    task.beta = job.beta + part.row * job.num_v_heads + head
    task.gate_stride = job.num_v_heads
    task.state = job.state + (part.state * job.num_v_heads + head) * job.key_dim * job.value_dim
    task.state_stride = job.value_dim
    task.y, task.y_stride = job.y + (part.row * job.num_v_heads + head) * job.value_dim, job.num_v_heads * job.value_dim
    job.table.delta_rule(&task)


cdef void finish_delta(void *delta, int64_t out_row, int thread) noexcept nogil:
    """Fill a row of the output projection's input, or of this host's part of it."""
    cdef delta_job *job = <delta_job *>delta
    cdef int64_t row = out_row if job.out_rows is NULL else job.out_rows[out_row], head, at
    cdef float *values = <float *>job.values.sections[0].local if job.divided else job.out.input
    for head in range(job.num_v_heads):
        at = (row * job.num_v_heads + head) * job.value_dim
        job.table.gated_rms_norm(values + (out_row * job.num_v_heads + head) * job.value_dim, job.y + at,
                                 job.norm, job.z + at, job.norm_eps, job.value_dim)
