"""A decoder's step: from the tokens of a batch to logits, in one parallel region.

::

    x       [rows, hidden]      the residual stream
    delta   [rows, hidden]      the output of the last mixer or feed-forward network, not yet added to x
    normed  [rows, hidden]      the input of the next one

    embed_row             x = embedding of the token                       in the first norm
    norm_row              x = x + delta;  normed = rms_norm(x)             as a layer's rows are quantised: _norm.pyx
    mixer                 delta = mixer(normed)                            _grouped.pyx, _latent.pyx, _delta.pyx
    norm_row, network     delta = network(normed)                          _ffn.pyx
    head                  logits of the wanted rows

In the last layer, only the rows whose logits are wanted go on after the mixer's keys and values are in the cache.

On several hosts, ``delta`` and the logits are this host's columns; an exchange gives all columns (``_exchange.pyx``).
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree

from marlin_cy.cpu._arena cimport arena, carve, take
from marlin_cy.cpu._buffers cimport float_matrix, matrix
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._exchange cimport (
    Hosts, begin_rows, carve_rows, exchange, has_failed, load_row, run_exchange,
)
from marlin_cy.cpu._team cimport member, queue, run_team
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport chunks_of
from marlin_cy.cpu.decoder._batch cimport batch, segment
from marlin_cy.cpu.decoder._delta cimport (
    begin_delta, carve_delta, delta_job, run_delta, set_delta, set_delta_rows,
)
from marlin_cy.cpu.decoder._ffn cimport (
    begin_mlp, begin_moe, carve_mlp, carve_moe, mlp_job, moe_job, run_mlp, run_moe, set_mlp, set_mlp_rows, set_moe,
)
from marlin_cy.cpu.decoder._grouped cimport begin_grouped, carve_grouped, grouped_job, run_grouped, set_grouped
from marlin_cy.cpu.decoder._latent cimport (
    begin_latent, carve_latent, latent_job, run_latent, set_latent, set_latent_rows,
)
from marlin_cy.cpu.decoder._norm cimport add_delta, norm_job, norm_row
from marlin_cy.cpu.decoder._projections cimport (
    begin_group, carve_group, carve_plain, plain_rows, plan_plain, projection_group, run_group, run_rows, set_group,
)

from marlin_cy.decoder.plan import AttentionPlan, LatentAttentionPlan, MoeFfnPlan

cdef enum:
    CHUNK_STEP = 16             # memory is reserved for a depth of a multiple of so many chunks


cdef struct layer_step:
    norm_job mixer_norm
    grouped_job *grouped        # one of these three; the others are NULL
    latent_job *latent
    delta_job *delta
    norm_job ffn_norm
    moe_job *moe                # one of these two
    mlp_job *mlp


cdef struct step_job:
    const ukernel_table *table
    int64_t num_layers
    layer_step *layers
    norm_job head_norm
    projection_group head
    batch rows
    int64_t max_rows
    int64_t max_wanted
    int64_t max_chunks
    int64_t hidden
    int64_t num_wanted
    const int32_t *wanted       # [num_wanted] rows of the batch
    # Several hosts: each has some columns of the outputs of mixers and networks, and of the logits.
    bint divided
    exchange delta_rows
    exchange last_delta_rows    # of the wanted rows
    exchange logits
    queue stored
    float *result               # [num_wanted, vocab_size]
    int64_t vocab_size
    # Memory that carve_step takes.
    float *x
    float *last_x               # the wanted rows of x
    float *delta
    float *normed
    plain_rows all_rows
    plain_rows wanted_rows


cdef class CpuStep:
    """The program of a plan: :meth:`run` is one step.

    Parameters
    ----------
    workspace : Workspace
    plan : DecoderPlan
    pools : list of KvPool or StatePool
        The memory of each layer.
    state_lengths : int64 ``[slots]``
        Number of tokens that each slot of recurrent state has seen: a step sets it.
    """

    cdef step_job job
    cdef Workspace workspace
    cdef list owners
    cdef Hosts hosts            # None: all of the model is on one host
    cdef int64_t vocab_size
    cdef int64_t[::1] state_lengths
    cdef void *carved           # the memory that the jobs point into

    def __cinit__(self, Workspace workspace, plan, list pools, int64_t[::1] state_lengths):
        self.state_lengths = state_lengths
        self.workspace, self.owners = workspace, [plan, pools]
        self.vocab_size = plan.vocab_size
        self.hosts = None if plan.group is None else Hosts(plan.group)
        memset(&self.job, 0, sizeof(step_job))
        self.job.vocab_size = plan.vocab_size
        self.job.table, self.job.hidden = workspace.table, plan.hidden_size
        self.job.layers = <layer_step *>allocate(len(plan.layers) * sizeof(layer_step))
        self.job.num_layers = len(plan.layers)
        for index, layer in enumerate(plan.layers):
            self.set_layer_step(&self.job.layers[index], plan, layer, pools[index])
        set_group(&self.job.head, workspace, [plan.head], self.owners)
        self.set_norm(&self.job.head_norm, plan, plan.final_norm)
        self.job.head.prepare, self.job.head.prepared = head_row, &self.job
        if self.hosts is not None:
            self.job.divided = True
            self.hosts.set_rows(&self.job.delta_rows, plan.hidden)
            self.job.head_norm.gathered_delta = self.hosts.set_rows(&self.job.last_delta_rows, plan.hidden)
            self.hosts.set_rows(&self.job.logits, plan.vocabulary)
        self.set_embedding(&self.job.layers[0].mixer_norm, plan.embedding)

    def __dealloc__(self):
        cdef int64_t index
        if self.job.layers is NULL:
            return
        for index in range(self.job.num_layers):
            PyMem_RawFree(self.job.layers[index].grouped)
            PyMem_RawFree(self.job.layers[index].latent)
            PyMem_RawFree(self.job.layers[index].delta)
            PyMem_RawFree(self.job.layers[index].moe)
            PyMem_RawFree(self.job.layers[index].mlp)
        PyMem_RawFree(self.job.layers)

    cdef int set_layer_step(self, layer_step *step, plan, layer, pool) except -1:
        cdef projection_group *first
        self.set_norm(&step.mixer_norm, plan, layer.mixer_norm)
        self.set_norm(&step.ffn_norm, plan, layer.ffn_norm)
        if isinstance(layer.mixer, AttentionPlan):
            step.grouped = <grouped_job *>allocate(sizeof(grouped_job))
            set_grouped(step.grouped, self.workspace, layer.mixer, pool, plan.norm_eps, self.owners, self.hosts)
            first = &step.grouped.qkv
        elif isinstance(layer.mixer, LatentAttentionPlan):
            step.latent = <latent_job *>allocate(sizeof(latent_job))
            set_latent(step.latent, self.workspace, layer.mixer, pool, self.owners, self.hosts)
            first = &step.latent.first
        else:
            step.delta = <delta_job *>allocate(sizeof(delta_job))
            set_delta(step.delta, self.workspace, layer.mixer, pool, self.owners, self.hosts)
            first = &step.delta.projections
        first.prepare, first.prepared = norm_row, &step.mixer_norm
        if isinstance(layer.ffn, MoeFfnPlan):
            step.moe = <moe_job *>allocate(sizeof(moe_job))
            set_moe(step.moe, self.workspace, layer.ffn, self.owners, self.hosts)
            step.moe.prepare, step.moe.prepared = norm_row, &step.ffn_norm
        else:
            step.mlp = <mlp_job *>allocate(sizeof(mlp_job))
            set_mlp(step.mlp, self.workspace, layer.ffn, self.owners, self.hosts)
            step.mlp.gate_up.prepare, step.mlp.gate_up.prepared = norm_row, &step.ffn_norm
        return 0

    cdef int set_norm(self, norm_job *norm, plan, weight) except -1:
        cdef const float[::1] values = weight
        self.owners.append(weight)
        norm.table, norm.weight, norm.eps, norm.width = (
            self.workspace.table, &values[0], plan.norm_eps, plan.hidden_size)
        return 0

    cdef int set_embedding(self, norm_job *norm, embedding) except -1:
        cdef matrix rows = float_matrix(embedding, "plan: embedding", self.job.hidden, False)
        norm.embedded, norm.embedding, norm.embedding_dtype = &self.job.rows, rows.data, rows.dtype
        return 0

    def run(self, const int32_t[::1] tokens, const int64_t[:, ::1] segments, const int32_t[:, ::1] pages,
            const int32_t[::1] wanted):
        """Run a step.

        The caller has checked the arguments, and no other thread may write to them.

        Parameters
        ----------
        tokens : int32 ``[rows]``
            At least one; each below the vocabulary's size.
        segments : int64 ``[segments, 4]``
            The first row, the number of rows, the position of the first row, the slot of recurrent state.
        pages : int32 ``[segments, any number]``
            The pages of each segment's sequence, in order.
        wanted : int32 ``[wanted]``
            Rows of the batch, ascending.

        Returns
        -------
        float32 ``[wanted, vocab_size]``
        """
        cdef int64_t rows = tokens.shape[0], num_segments = segments.shape[0], s, row, chunks = 1
        parts = np.empty(num_segments * sizeof(segment), np.uint8)
        segment_of = np.empty(rows, np.int32)
        logits = np.empty((wanted.shape[0], self.vocab_size), np.float32)
        cdef unsigned char[::1] memory = parts
        cdef segment *part = <segment *>&memory[0]
        cdef int32_t[::1] owner = segment_of
        cdef float[:, ::1] result = logits
        for s in range(num_segments):
            part[s].row, part[s].count, part[s].position = segments[s, 0], segments[s, 1], segments[s, 2]
            part[s].state = segments[s, 3]
            part[s].pages = &pages[s, 0]
            chunks = max(chunks, chunks_of(part[s].position + part[s].count))
            for row in range(part[s].row, part[s].row + part[s].count):
                owner[row] = <int32_t>s
        self.job.rows.rows, self.job.rows.num_segments, self.job.rows.segments = rows, num_segments, part
        self.job.rows.segment_of, self.job.rows.tokens = &owner[0], &tokens[0]
        self.job.num_wanted = wanted.shape[0]
        self.job.wanted = &wanted[0] if self.job.num_wanted else NULL
        self.workspace.enter()
        try:
            self.reserve(rows, self.job.num_wanted, chunks)
            self.job.result = &result[0, 0] if self.job.num_wanted else NULL
            if self.hosts is not None:
                self.hosts.begin()
            with nogil:
                begin_step(&self.job)
                run_team(self.workspace.num_threads, run_step, &self.job)
                # Python raises a KeyboardInterrupt after this call at the earliest.
                for s in range(num_segments):
                    if part[s].state >= 0:
                        self.state_lengths[part[s].state] = length_after(&self.job, &part[s])
            if self.hosts is not None:
                self.hosts.finish()
        finally:
            self.workspace.leave()
        return logits

    cdef int reserve(self, int64_t rows, int64_t wanted, int64_t chunks) except -1:
        """Carve the memory of a step, unless the last step's carving still holds."""
        cdef step_job *job = &self.job
        if (rows == job.max_rows and wanted == job.max_wanted and chunks <= job.max_chunks
                and self.carved == self.workspace.scratch.data and self.carved is not NULL):
            return 0
        job.max_rows, job.max_wanted = rows, wanted
        job.max_chunks = (chunks + CHUNK_STEP - 1) // CHUNK_STEP * CHUNK_STEP
        self.carved = NULL  # a carving that fails has no addresses
        carve(self.workspace, &self.workspace.scratch, carve_step, job)
        self.carved = self.workspace.scratch.data
        return 0


cdef void *allocate(size_t size) except NULL:
    cdef void *memory = PyMem_RawCalloc(1, size)
    if memory is NULL:
        raise MemoryError(f"decoder: could not allocate {size} bytes")
    return memory


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_step(arena *memory, void *step) noexcept nogil:
    """The layout of a step's memory. Layers run in turn and share memory."""
    cdef step_job *job = <step_job *>step
    cdef int64_t row_bytes = job.hidden * <int64_t>sizeof(float), index, begin, end
    job.all_rows.max_rows, job.wanted_rows.max_rows = job.max_rows, job.max_wanted
    carve_plain(memory, &job.all_rows, job.table)
    carve_plain(memory, &job.wanted_rows, job.table)
    job.x = <float *>take(memory, job.max_rows * row_bytes)
    job.last_x = <float *>take(memory, job.max_wanted * row_bytes)
    if job.divided:
        carve_rows(memory, &job.delta_rows, job.max_rows)
        carve_rows(memory, &job.last_delta_rows, job.max_wanted)
        carve_rows(memory, &job.logits, job.max_wanted)
    else:
        job.delta = <float *>take(memory, job.max_rows * row_bytes)
    job.normed = <float *>take(memory, job.max_rows * row_bytes)
    begin = end = memory.used
    for index in range(job.num_layers):
        carve_layer_step(memory, job, &job.layers[index], index + 1 == job.num_layers)
        end, memory.used = max(end, memory.used), begin
    job.head.input, job.head.rows = job.normed, &job.wanted_rows
    carve_group(memory, &job.head, job.max_wanted)
    memory.used = max(end, memory.used)


cdef void carve_layer_step(arena *memory, step_job *job, layer_step *step, bint last) noexcept nogil:
    cdef int64_t begin = memory.used, end, out_rows = job.max_wanted if last else job.max_rows
    cdef plain_rows *rows = &job.wanted_rows if last else &job.all_rows
    cdef float *delta = delta_of(job, last)
    step.mixer_norm.x, step.mixer_norm.normed = job.x, job.normed
    step.ffn_norm.x, step.ffn_norm.normed = job.last_x if last else job.x, job.normed
    step.ffn_norm.source = job.x
    if step.grouped is not NULL:
        step.grouped.qkv.input, step.grouped.out.projections[0].output = job.normed, delta
        step.grouped.qkv.rows, step.grouped.out.rows = &job.all_rows, rows
        carve_grouped(memory, step.grouped, job.max_rows, out_rows, job.max_chunks)
    elif step.latent is not NULL:
        step.latent.first.input, step.latent.out.projections[0].output = job.normed, delta
        set_latent_rows(step.latent, &job.all_rows, rows)
        carve_latent(memory, step.latent, job.max_rows, out_rows, job.max_chunks)
    else:
        step.delta.projections.input, step.delta.out.projections[0].output = job.normed, delta
        set_delta_rows(step.delta, &job.all_rows, rows)
        carve_delta(memory, step.delta, job.max_rows, out_rows)
    end, memory.used = memory.used, begin
    if step.moe is not NULL:
        step.moe.input, step.moe.output = job.normed, delta
        set_mlp_rows(&step.moe.shared, rows)
        carve_moe(memory, step.moe, out_rows)
    else:
        step.mlp.gate_up.input, step.mlp.down.projections[0].output = job.normed, delta
        set_mlp_rows(step.mlp, rows)
        carve_mlp(memory, step.mlp, out_rows)
    memory.used = max(end, memory.used)


cdef float *delta_of(const step_job *job, bint last) noexcept nogil:
    """Where mixers and networks write their outputs, or this host's columns of them."""
    if not job.divided:
        return job.delta
    return <float *>(job.last_delta_rows.send if last else job.delta_rows.send)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_step(step_job *job) noexcept nogil:
    """Set the rows of all phases, before any thread calls :func:`run_step`."""
    cdef int64_t index, out_rows = job.rows.rows
    cdef layer_step *step
    plan_plain(&job.all_rows, job.table, job.rows.rows)
    plan_plain(&job.wanted_rows, job.table, job.num_wanted)
    for index in range(job.num_layers):
        step = &job.layers[index]
        step.mixer_norm.delta = job.delta if index else NULL
        step.ffn_norm.delta = job.delta
        if job.divided:
            step.mixer_norm.gathered_delta = &job.delta_rows.sections[0] if index else NULL
            step.ffn_norm.gathered_delta = (
                &job.last_delta_rows.sections[0] if index + 1 == job.num_layers else &job.delta_rows.sections[0])
        if index + 1 == job.num_layers:
            out_rows = job.num_wanted
            step.ffn_norm.gathered = job.wanted
        begin_mixer(step, &job.rows, out_rows, step.ffn_norm.gathered)
        if step.moe is not NULL:
            begin_moe(step.moe, out_rows)
        else:
            begin_mlp(step.mlp, out_rows)
    job.head_norm.delta = job.delta
    if job.divided:
        begin_rows(&job.delta_rows, job.rows.rows)
        begin_rows(&job.last_delta_rows, job.num_wanted)
        begin_rows(&job.logits, job.num_wanted)
        job.stored.next = 0
    job.head.projections[0].output = <float *>job.logits.send if job.divided else job.result
    begin_group(&job.head, job.num_wanted)


cdef void run_step(void *step, member *m) noexcept nogil:
    cdef step_job *job = <step_job *>step
    cdef layer_step *layer
    cdef int64_t index
    cdef bint last
    for index in range(job.num_layers):
        layer = &job.layers[index]
        last = index + 1 == job.num_layers
        run_mixer(layer, m)
        if complete_delta(job, last, m) or (last and job.num_wanted == 0):
            return
        if layer.moe is not NULL:
            run_moe(layer.moe, m)
        else:
            run_mlp(layer.mlp, m)
        if complete_delta(job, last, m):
            return
    run_group(&job.head, m)
    if job.divided:
        run_exchange(&job.logits, m)
        run_rows(&job.stored, job.num_wanted, store_logits, job, m)


cdef bint complete_delta(step_job *job, bint last, member *m) noexcept nogil:
    """Wait for the outputs of all threads and hosts. Returns whether an exchange has failed."""
    run_exchange(&job.last_delta_rows if last else &job.delta_rows, m)
    return job.divided and has_failed(&job.delta_rows)


cdef void store_logits(void *step, int64_t row, int thread) noexcept nogil:
    cdef step_job *job = <step_job *>step
    load_row(&job.logits.sections[0], row, job.result + row * job.vocab_size)


cdef int64_t length_after(const step_job *job, const segment *part) noexcept nogil:
    """Tokens that a slot of recurrent state has seen after a step; -1 if the step has failed."""
    if job.divided and has_failed(&job.delta_rows):
        return -1
    return part.position + part.count


cdef void begin_mixer(layer_step *step, const batch *rows, int64_t num_out, const int32_t *out_rows) noexcept nogil:
    if step.grouped is not NULL:
        step.grouped.out_rows = out_rows
        begin_grouped(step.grouped, rows, num_out)
    elif step.latent is not NULL:
        step.latent.out_rows = out_rows
        begin_latent(step.latent, rows, num_out)
    else:
        step.delta.out_rows = out_rows
        begin_delta(step.delta, rows, num_out)


cdef void run_mixer(layer_step *step, member *m) noexcept nogil:
    if step.grouped is not NULL:
        run_grouped(step.grouped, m)
    elif step.latent is not NULL:
        run_latent(step.latent, m)
    else:
        run_delta(step.delta, m)


cdef void head_row(void *step, int64_t row, int thread) noexcept nogil:
    """Complete a wanted row of the residual stream, and normalise it for the head."""
    cdef step_job *job = <step_job *>step
    cdef float *x = job.last_x + row * job.hidden
    add_delta(&job.head_norm, row, x)
    job.table.rms_norm(job.normed + row * job.hidden, x, job.head_norm.weight, job.head_norm.eps, job.hidden)
