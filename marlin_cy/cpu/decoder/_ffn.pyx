"""Feed-forward networks as phases of a decoder's step: dense ones, and Mixture-of-Experts blocks.

``run_mlp`` and ``run_moe`` are called by all threads of a team. They end without a barrier: outputs are complete after
the caller's next one.

On several hosts, the intermediate values are exchanged; the outputs are this host's columns.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, take_floats
from marlin_cy.cpu._buffers cimport matrix
from marlin_cy.cpu._dense cimport begin_dense, do_dense
from marlin_cy.cpu._dispatch cimport DTYPE_F32, dense_task
from marlin_cy.cpu._exchange cimport Hosts, begin_rows, carve_rows, run_exchange
from marlin_cy.cpu._layer cimport carve_layer, forward, set_layer, set_max_tokens
from marlin_cy.cpu._routing cimport set_routing
from marlin_cy.cpu._team cimport barrier, member
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._projections cimport (
    begin_group, carve_group, plain_rows, run_group, run_rows, set_dense, set_group,
)

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.cpu.stack import CpuMarlinExpertStack


# ---------------------------------------------------------------------------------------------
# Dense networks

cdef int set_mlp(mlp_job *job, Workspace workspace, plan, list owners, Hosts hosts) except -1:
    """Set the members that the workspace and a ``MlpPlan`` determine."""
    memset(job, 0, sizeof(mlp_job))
    set_group(&job.gate_up, workspace, [plan.gate, plan.up], owners)
    set_group(&job.down, workspace, [plan.down], owners)
    job.activation = ACTIVATIONS[plan.activation].number
    if plan.inner is None:
        job.down.prepare, job.down.prepared = activate_row, job
    else:
        job.divided, job.down.gathered = True, hosts.set_rows(&job.inner, plan.inner)
    return 0


cdef void set_mlp_rows(mlp_job *job, plain_rows *rows) noexcept nogil:
    job.gate_up.rows = job.down.rows = rows


cdef void carve_mlp(arena *memory, mlp_job *job, int64_t max_rows) noexcept nogil:
    """The layout; the caller owns the input of ``gate_up`` and the output of ``down``."""
    cdef int64_t values = max_rows * job.gate_up.projections[0].n
    job.down.input = job.gate_up.projections[0].output = take_floats(memory, values)
    job.gate_up.projections[1].output = take_floats(memory, values)
    if job.divided:
        job.down.input = take_floats(memory, max_rows * job.down.k)
        carve_rows(memory, &job.inner, max_rows)
    carve_group(memory, &job.gate_up, max_rows)
    carve_group(memory, &job.down, max_rows)


cdef void begin_mlp(mlp_job *job, int64_t num_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_mlp`."""
    job.activated.next = 0
    begin_group(&job.gate_up, num_rows)
    if job.divided:
        begin_rows(&job.inner, num_rows)
    begin_group(&job.down, num_rows)


cdef void run_mlp(mlp_job *job, member *m) noexcept nogil:
    run_group(&job.gate_up, m)
    barrier(m)
    if job.divided:
        run_rows(&job.activated, job.gate_up.num_rows, activate_row, job, m)
        run_exchange(&job.inner, m)
    run_group(&job.down, m)


cdef void activate_row(void *mlp, int64_t row, int thread) noexcept nogil:
    cdef mlp_job *job = <mlp_job *>mlp
    cdef int64_t n = job.gate_up.projections[0].n
    cdef float *gate = job.gate_up.projections[0].output + row * n
    cdef float *target = <float *>job.inner.sections[0].local + row * n if job.divided else gate
    job.gate_up.table.glu_rows(target, gate, job.gate_up.projections[1].output + row * n, n, job.activation)


# ---------------------------------------------------------------------------------------------
# Mixture-of-Experts blocks

cdef int set_moe(moe_job *job, Workspace workspace, plan, list owners, Hosts hosts) except -1:
    """Set the members that the workspace and a ``MoeFfnPlan`` determine."""
    cdef matrix logits
    cdef const float[::1] gate = plan.shared_gate
    layer = plan.layer.plan
    for name, stack in layer.stacks():
        if not isinstance(stack, CpuMarlinExpertStack):
            raise TypeError(f"plan: got a {type(stack).__name__} for a layer's {name}, expected a CpuMarlinExpertStack")
    owners.append(plan)
    memset(job, 0, sizeof(moe_job))
    set_dense(&job.router, workspace, plan.router, owners)
    memset(&logits, 0, sizeof(matrix))
    logits.dtype, logits.width = DTYPE_F32, layer.num_experts
    set_routing(&job.layer.router, workspace, &logits, layer.routing)
    job.layer.routes, job.layer.input_dtype, job.layer.combine.dtype = True, DTYPE_F32, DTYPE_F32
    set_layer(&job.layer, workspace, layer, layer.top_k, 1, None if layer.shard is None else hosts)
    job.hidden, job.width = layer.hidden_size, layer.down.n_per_expert
    if plan.shared is not None:
        job.has_shared = True
        set_mlp(&job.shared, workspace, plan.shared, owners, hosts)
    if gate is not None:
        job.shared_gate = &gate[0]
    return 0


cdef void carve_moe(arena *memory, moe_job *job, int64_t max_rows) noexcept nogil:
    """The layout; the caller owns input and output."""
    job.logits = take_floats(memory, max_rows * job.router.task.n)
    set_max_tokens(&job.layer, max_rows)
    carve_layer(memory, &job.layer)
    if job.has_shared:
        job.shared.gate_up.input = job.input
        job.shared.down.projections[0].output = take_floats(memory, max_rows * job.width)
        carve_mlp(memory, &job.shared, max_rows)


cdef void begin_moe(moe_job *job, int64_t num_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_moe`."""
    job.num_rows = job.layer.tokens = num_rows
    job.prepared_rows.next = job.added_rows.next = 0
    job.router.task.x, job.router.task.out = job.input, job.logits
    job.layer.router.logits = <const char *>job.logits
    job.layer.input, job.layer.output = <const char *>job.input, <char *>job.output
    if job.has_shared:
        begin_mlp(&job.shared, num_rows)


cdef void run_moe(moe_job *job, member *m) noexcept nogil:
    if m.thread == 0:
        begin_dense(&job.router, job.num_rows)
    run_rows(&job.prepared_rows, job.num_rows, job.prepare, job.prepared, m)
    barrier(m)
    do_dense(&job.router, m)
    barrier(m)
    forward(&job.layer, m)
    if job.has_shared:
        run_mlp(&job.shared, m)
        barrier(m)
        run_rows(&job.added_rows, job.num_rows, add_shared, job, m)


cdef void add_shared(void *moe, int64_t row, int thread) noexcept nogil:
    """Add the shared expert's output to a row, weighted by its gate."""
    cdef moe_job *job = <moe_job *>moe
    cdef const float *shared = job.shared.down.projections[0].output + row * job.width
    cdef float gate = 0, weight = 1
    cdef dense_task task
    if job.shared_gate is not NULL:
        memset(&task, 0, sizeof(task))
        task.x, task.m, task.w, task.dtype, task.n, task.k = (
            job.input + row * job.hidden, 1, job.shared_gate, DTYPE_F32, 1, job.hidden)
        task.x_stride = task.w_stride = job.hidden
        task.out, task.out_stride = &gate, 1
        job.router.table.dense(&task)
        job.router.table.sigmoid_gate(&weight, &gate, 1)
    job.router.table.axpy(job.output + row * job.width, shared, weight, job.width)
