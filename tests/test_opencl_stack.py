"""What is OpenCL's own in stacks, contexts and layers; ``test_contract.py`` and ``test_moe.py`` have the rest."""

import copy
import dataclasses
import gc
import threading
import time

import numpy as np
import pytest
from asserts import GuardedBuffer, assert_close, assert_same_bits, product_bound
from conftest import OPENCL_PLACES, USABLE_PLACES, backend_called
from layers import Layer
from problems import DTYPES, WEIGHT_KINDS, activations, as_given, random_problem

import marlin_cy
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.errors import BackendUnavailable, ContextInUse

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import unless_the_driver_is_wrong  # noqa: E402
from pyopencl.array import Array, to_device  # noqa: E402

from marlin_cy.opencl import selfcheck, tiers  # noqa: E402
from marlin_cy.opencl import store as store_module  # noqa: E402
from marlin_cy.opencl.backend import OpenClBackend  # noqa: E402
from marlin_cy.opencl.gemm.codes import SUPPORTED_CODES  # noqa: E402
from marlin_cy.opencl.gemm.work import TileList  # noqa: E402
from marlin_cy.opencl.layer import forward as moe  # noqa: E402
from marlin_cy.opencl.tiers import wave_tiled  # noqa: E402
from marlin_cy.opencl.tiers.configuration import Problem, fitting  # noqa: E402
from marlin_cy.opencl.timing import times_of  # noqa: E402

PORTABLE_PLACES = [place for place in USABLE_PLACES.values() if place.tier == "portable"]
SUBGROUP_PLACES = [place for place in USABLE_PLACES.values() if place.tier == "subgroup"]
K, N, E, ROWS = 96, 24, 3, 6


@pytest.fixture
def backend(opencl_backend):
    return opencl_backend


@pytest.fixture(params=PORTABLE_PLACES, ids=lambda place: place.label)
def portable(request):
    """One backend a device: for what does not depend on the tier."""
    return backend_called(request.param.label)


@pytest.fixture
def problem(rng):
    return random_problem(rng, E, K, N, 32)


def product(stack, ctx, x, out=None, expert=1):
    """``x @ W[expert]``; ``x`` and ``out`` are buffers."""
    backend = ctx.backend
    rows = x.size // stack.k
    out = backend.empty((rows, stack.n_per_expert), np.float32) if out is None else out
    stack.gemm_phase_batched(ctx, x, [(expert, 0, 0, rows)], out, stack.k)
    return backend.to_host(out)


def keeps_times(backend):
    """Whether the driver keeps the times of a queue without profiling, as some do (rusticl)."""
    queue = cl.CommandQueue(backend.context, backend.device)
    event = cl.enqueue_marker(queue)
    event.wait()
    try:
        return event.profile.end >= 0
    except cl.Error as error:
        assert error.code == cl.status_code.PROFILING_INFO_NOT_AVAILABLE
        return False


def placed(backend, x, before):
    """``x`` on the device, ``before`` elements from the beginning of its buffer."""
    memory = np.concatenate([np.full(before, 7, x.dtype), x.reshape(-1)])
    whole = backend.from_host(memory)
    offset = before * x.dtype.itemsize
    return Array(whole.queue, x.shape, x.dtype, data=whole.base_data, offset=offset, events=whole.events)


class TestBuffers:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("before", [1, 8])
    def test_input_within_a_larger_buffer(self, backend, rng, problem, dtype, before):
        stack, ctx = problem.stack(backend), backend.new_context()
        x = activations(rng, ROWS, K, DTYPES[dtype])
        result, w = product(stack, ctx, placed(backend, x, before)), problem.dense(1)
        assert_close(result, as_given(x) @ w, product_bound(backend, as_given(x), w))

    def test_slices_of_an_array(self, portable, rng, problem):
        stack, ctx, x = problem.stack(portable), portable.new_context(), activations(rng, ROWS, K)
        expected = product(stack, ctx, portable.from_host(x))
        assert_same_bits(product(stack, ctx, portable.from_host(x)[2:]), expected[2:])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_to_host_and_back(self, portable, rng, dtype):
        x = rng.standard_normal((5, 7)).astype(DTYPES[dtype])
        assert_same_bits(portable.to_host(portable.from_host(x)), x)
        assert_same_bits(portable.to_host(portable.from_host(x.T)), np.ascontiguousarray(x.T))
        assert portable.to_host(portable.empty((0, 3), x.dtype)).shape == (0, 3)

    def test_from_host_copies(self, portable):
        x = np.ones(4, np.float32)
        buffer = portable.from_host(x)
        x[:] = 0
        assert (portable.to_host(buffer) == 1).all()

    def test_an_array_that_became_another(self, portable, rng, problem):
        """What was found out about it is not taken for granted."""
        stack, ctx, x = problem.stack(portable), portable.new_context(), activations(rng, 2 * ROWS, K)
        buffer, other = portable.from_host(x[:ROWS]), portable.from_host(x[ROWS:])
        product(stack, ctx, buffer)
        buffer.base_data = other.base_data
        assert_same_bits(product(stack, ctx, buffer), product(stack, ctx, other))


class TestRefused:
    """What ``test_bad_input.py`` and ``test_opencl_faults.py`` do not have."""

    @pytest.fixture
    def stack(self, portable, problem):
        return problem.stack(portable)

    @pytest.mark.parametrize("by", ["offset", "sub-buffer"])
    @pytest.mark.parametrize("shared", [0, 1])
    def test_overlap(self, portable, rng, stack, by, shared):
        memory = portable.from_host(np.zeros(4 * ROWS * K, np.float32))
        x = Array(memory.queue, (ROWS, K), np.float32, data=memory.base_data, events=memory.events)
        begin = 4 * (ROWS * K - shared * K)
        alignment = portable.runtime.capabilities.alignment
        if by == "sub-buffer":
            begin = -(-begin // alignment) * alignment if not shared else begin // alignment * alignment
            data, offset = memory.base_data.get_sub_region(begin, 4 * ROWS * N), 0
        else:
            data, offset = memory.base_data, begin
        out = Array(memory.queue, (ROWS, N), np.float32, data=data, offset=offset)
        if shared:
            with pytest.raises(ValueError, match="^output: shares memory with the input"):
                product(stack, portable.new_context(), x, out)
        else:
            assert (product(stack, portable.new_context(), x, out) == 0).all()

    def test_a_bias_of_another_shape(self, stack):
        with pytest.raises(ValueError, match=rf"bias: got shape \({N},\), expected \({E}, {N}\)"):
            type(stack)(stack.store, E, N, K, np.zeros(N, np.float32))

    @pytest.mark.parametrize("past", [np.zeros(2, np.int32), np.zeros(1, np.int64)], ids=["two", "int64"])
    def test_counts_on_the_device(self, portable, rng, stack, past):
        x, out = portable.from_host(activations(rng, ROWS, K)), GuardedBuffer(portable, (12, N), np.float32)
        sorted_ids, experts = np.arange(12, dtype=np.int32), np.zeros(3, np.int32)
        routing = map(portable.from_host, (sorted_ids, experts, past))
        with pytest.raises((TypeError, ValueError), match="num_tokens_past_padded: got (dtype|shape)"):
            stack.gemm_phase_vllm(portable.new_context(), x, *routing, out.buffer, ROWS, 4, 2)
        out.assert_untouched()

    def test_contexts(self, portable, cpu_backend, stack, problem, rng):
        x = portable.from_host(activations(rng, ROWS, K))
        for ctx in (None, cpu_backend.new_context()):
            with pytest.raises(TypeError, match=r"ctx: got \w+, expected an OpenClContext"):
                stack.zero_workspace(ctx)
        with pytest.raises(TypeError, match="ctx: got OpenClContext, expected a CpuContext"):
            problem.stack(cpu_backend).gemm_phase_batched(portable.new_context(), x, [], x, K)


class TestRoutingArrays:
    """Whatever they hold on the device, nothing is read or written out of bounds."""

    def test_nonsense_is_skipped(self, backend, rng, problem):
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, ROWS, K)
        extremes = [-1, -(2**31), 2**31 - 1, E, ROWS, 12345678]
        sorted_ids = np.array([0, -1, 2, 2**31 - 1, *rng.choice(extremes, 8)], np.int32)
        experts = np.array([1, -(2**31), E], np.int32)
        for past in (12, 2**31 - 1, -5):
            out = GuardedBuffer(backend, (ROWS, N), np.float32)
            arrays = (backend.from_host(np.array(a, np.int32)) for a in (sorted_ids, experts, [past]))
            stack.gemm_phase_vllm(ctx, backend.from_host(x), *arrays, out.buffer, ROWS, 4, 1)
            result, done = out.result(), [0, 2] if past > 0 else []
            w = problem.dense(1)
            assert_close(result[done], x[done].astype(np.float64) @ w, product_bound(backend, x[done], w))
            out.assert_untouched([row for row in range(ROWS) if row not in done])

    def test_a_count_on_the_host_limits(self, backend, rng, problem):
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, ROWS, K)
        out = GuardedBuffer(backend, (ROWS, N), np.float32)
        arrays = map(backend.from_host, (np.arange(8, dtype=np.int32), np.zeros(2, np.int32)))
        stack.gemm_phase_vllm(ctx, backend.from_host(x), *arrays, 4, out.buffer, ROWS, 4, 1)
        assert np.isfinite(out.result()[:4]).all()
        out.assert_untouched([4, 5])


class TestQueues:
    def test_a_context_of_the_callers(self, portable, rng, problem):
        context = cl.Context([portable.device])
        queue = cl.CommandQueue(context)
        backend = marlin_cy.get_backend("opencl", context=context, tier="portable")
        assert backend.context == context
        ctx = backend.new_context(queue=queue)
        assert ctx.queue is queue
        x = activations(rng, ROWS, K)
        buffer = to_device(queue, x)
        out = Array(queue, (ROWS, N), np.float32)
        problem.stack(backend).gemm_phase_batched(ctx, buffer, [(1, 0, 0, ROWS)], out, K)
        w = problem.dense(1)
        assert_close(out.get(), x.astype(np.float64) @ w, product_bound(backend, x, w))

    def test_a_queue_of_the_callers(self, portable):
        queue = cl.CommandQueue(portable.context, portable.device)
        backend = marlin_cy.get_backend("opencl", queue=queue)
        assert backend.new_context().queue is queue
        assert backend.context == portable.context

    def test_what_is_written_is_waited_for_by_other_queues(self, portable, rng, problem):
        """By ``Array.get`` of another queue, and by a context of another."""
        stack, x = problem.stack(portable), portable.from_host(activations(rng, 200, K))
        first, second = portable.new_context(), portable.new_context()
        chained = random_problem(rng, 1, N + 8, 16, 32).stack(portable)
        expected = None
        for _ in range(5):
            between = portable.from_host(np.zeros((200, N + 8), np.float32))
            size = (200 * (N + 8) // N * N,)
            part = Array(between.queue, size, np.float32, data=between.base_data, events=list(between.events))
            out = portable.empty((200, 16), np.float32)
            stack.gemm_phase_batched(first, x, [(1, 0, 0, 200)], part, K)
            between.events.extend(part.events)
            chained.gemm_phase_batched(second, between, [(0, 0, 0, 200)], out, N + 8)
            result = out.get()
            expected = result if expected is None else expected
            assert_same_bits(result, expected)

    def test_a_queue_that_is_gone(self, portable, rng, problem):
        """What it wrote, and where it wrote it, can be used by others."""
        stack, x = problem.stack(portable), portable.from_host(activations(rng, ROWS, K))
        out = portable.empty((ROWS, N), np.float32)
        expected = product(stack, portable.new_context(), x)
        for _ in range(3):
            assert_same_bits(product(stack, portable.new_context(), x, out), expected)
            gc.collect()
        chained, result = random_problem(rng, 1, 32, 16, 32).stack(portable), portable.empty((1, 16), np.float32)
        chained.gemm_phase_batched(portable.new_context(), out.reshape(-1)[:32], [(0, 0, 0, 1)], result, 32)
        assert np.isfinite(portable.to_host(result)).all()

    def test_queues_that_are_refused(self, portable):
        out_of_order = cl.command_queue_properties.OUT_OF_ORDER_EXEC_MODE_ENABLE
        if portable.device.queue_properties & out_of_order:
            with pytest.raises(ValueError, match="queue: got an out-of-order queue"):
                portable.new_context(queue=cl.CommandQueue(portable.context, properties=out_of_order))
        other = cl.Context([portable.device])  # kept: not every driver's queues keep theirs
        with pytest.raises(ValueError, match="queue: got a queue of another OpenCL context"):
            portable.new_context(queue=cl.CommandQueue(other))
        with pytest.raises(TypeError, match="queue: got int, expected a pyopencl.CommandQueue"):
            portable.new_context(queue=3)
        without = cl.CommandQueue(portable.context)
        with pytest.raises(ValueError, match="profiling: the queue was made without PROFILING_ENABLE"):
            portable.new_context(queue=without, profiling=True)
        assert portable.new_context(queue=without).queue is without

    def test_profile(self, portable, rng):
        problem = random_problem(rng, E, K, N, 32, g_idx="per_expert")
        stack, ctx = problem.stack(portable), portable.new_context(profiling=True)
        x = portable.from_host(activations(rng, ROWS, K))
        with ctx.profile() as events:
            product(stack, ctx, x)
            ctx.finish()
        labels = [label for label, _ in events]
        assert labels == [
            "upload row map",
            "gemm_phase_batched: prepare_rows",
            "upload row tiles",
            "gemm_phase_batched",
        ]
        assert all(event.profile.end >= event.profile.start for _, event in events)
        product(stack, ctx, x)
        assert len(events) == 4

    def test_events_without_times(self, portable, rng, problem):
        ctx = portable.new_context()
        with ctx.profile() as events:
            product(problem.stack(portable), ctx, portable.from_host(activations(rng, ROWS, K)))
            ctx.finish()
        assert [label for label, _ in events if ": " not in label][-1] == "gemm_phase_batched"
        if keeps_times(portable):
            assert times_of(events).kernels >= 0
        else:
            with pytest.raises(ValueError, match="make the context with profiling=True"):
                times_of(events)

    def test_more_calls_than_uploads_are_kept(self, portable, rng, problem):
        stack, ctx = problem.stack(portable), portable.new_context()
        x = portable.from_host(activations(rng, ROWS, K))
        expected = product(stack, ctx, x)
        outs = [portable.empty((ROWS, N), np.float32) for _ in range(200)]
        for out in outs:
            stack.gemm_phase_batched(ctx, x, [(1, 0, 0, ROWS)], out, K)
        for out in outs[::50]:
            assert_same_bits(portable.to_host(out), expected)

    def test_the_workspace_grows_and_is_kept(self, portable, rng):
        stack, ctx = random_problem(rng, 2, K, N, 32, g_idx="common").stack(portable), portable.new_context()
        sizes = []
        for rows in (1, 300, 2, 300):
            product(stack, ctx, portable.from_host(activations(rng, rows, K)))
            sizes.append(ctx.workspace_bytes)
        assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


class TestThreads:
    def test_two_contexts(self, backend, rng, problem):
        stack = problem.stack(backend)
        inputs = [activations(rng, rows, K) for rows in (5, 40)]
        expected = [product(stack, backend.new_context(), backend.from_host(x)) for x in inputs]
        errors = []

        def work(x, right):
            try:
                ctx, buffer = backend.new_context(), backend.from_host(x)
                for _ in range(50):
                    assert_same_bits(product(stack, ctx, buffer), right)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=args) for args in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "hangs"
        assert not errors, errors[0]

    def test_a_context_of_two_threads(self, portable, rng, problem):
        stack, ctx = problem.stack(portable), portable.new_context()
        x, out = portable.from_host(activations(rng, ROWS, K)), GuardedBuffer(portable, (ROWS, N), np.float32)
        layer = Layer(rng).on(portable)
        ids = portable.from_host(np.zeros(4, np.int32))
        calls = [
            lambda: stack.gemm_phase_batched(ctx, x, [(0, 0, 0, 1)], out.buffer, K),
            lambda: stack.gemm_phase_vllm(ctx, x, ids, ids, 4, out.buffer, 1, 1, 1),
            lambda: stack.make_expert_linear(0, N).forward(ctx, x, out.buffer, 1),
            lambda: stack.zero_workspace(ctx),
            lambda: layer.route(ctx, portable.from_host(np.zeros((1, 5), np.float32))),
        ]
        with ctx:
            for call in calls:
                with pytest.raises(ContextInUse, match="ctx: in use by another thread"):
                    call()
        out.assert_untouched()
        assert np.isfinite(product(stack, ctx, x)).all()


class TestParts:
    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("parts", [2, 4, 8])
    def test_same_results(self, portable, rng, parts):
        problem = random_problem(rng, 7, 64, 16, 32)
        whole = problem.stack(portable)
        most = 4 * whole.store.expert_words * -(-7 // parts)
        place = next(place for place in PORTABLE_PLACES if backend_called(place.label) is portable)
        small = OpenClBackend(device=place.device, tier="portable", max_alloc_bytes=most)
        stack = problem.stack(small)
        assert len(stack.store.parts) == parts
        x = activations(rng, 3, 64)
        for expert in range(7):
            expected = product(whole, portable.new_context(), portable.from_host(x), expert=expert)
            assert_same_bits(product(stack, small.new_context(), small.from_host(x), expert=expert), expected)

    @pytest.mark.parametrize(("value", "exception"), [(0, ValueError), (1.5, TypeError)])
    def test_refused(self, value, exception):
        with pytest.raises(exception, match="max_alloc_bytes: got"):
            OpenClBackend(max_alloc_bytes=value)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("codes", SUPPORTED_CODES)
def test_scales_far_apart(backend, rng, codes):
    """Each is off by at most 2**-39 of the largest, whatever the rest."""
    problem = random_problem(rng, 1, 1024, 24, 32, codes=codes, scales="bfloat16")
    problem.scale[:] = problem.scale.astype(np.float64) * 2.0 ** -rng.integers(0, 70, problem.scale.shape)
    x, w = activations(rng, 5, 1024), problem.dense(0)
    result = product(problem.stack(backend), backend.new_context(), backend.from_host(x), expert=0)
    off = 2.0**-39 * np.abs(problem.scale.astype(np.float64)).max() * 256 * np.abs(x).sum(axis=1, keepdims=True)
    assert_close(result, x.astype(np.float64) @ w, product_bound(backend, x, w) + off)


def with_configuration(backend, configuration):
    """The backend, with one configuration for everything."""
    return backend._unchecked(dataclasses.replace(backend.tier, configurations=lambda problem: [configuration]))


class TestConfigurations:
    """Those for GPUs work on any device, and K may be split."""

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize(
        "configuration",
        [
            wave_tiled.PORTABLE_TABLE.few[0],
            wave_tiled.PORTABLE_TABLE.few[-1],
            wave_tiled.PORTABLE_TABLE.many[0],
            dataclasses.replace(wave_tiled.PORTABLE_TABLE.cpu[0], splits=4),
            dataclasses.replace(wave_tiled.PORTABLE_TABLE.cpu[0], groups_per_unit=1),
        ],
        ids=["few rows, 1", "few rows, 16", "many rows", "splits", "few work-groups"],
    )
    def test_portable(self, portable, rng, configuration):
        device = portable.runtime.capabilities
        if not fitting([configuration], device):
            pytest.skip("its work-groups are too large for this device")
        with unless_the_driver_is_wrong(portable.device):
            self.check(with_configuration(portable, configuration), rng)

    @pytest.mark.parametrize("splits", [1, 2])
    def test_tiled(self, portable, rng, splits):
        """Rows and weights in local memory; tiles of both waves of rows and of columns that are not full."""
        configuration = wave_tiled.tiled(16, column_waves=2, row_waves=2, wave_strips=1)
        backend = with_configuration(portable, dataclasses.replace(configuration, splits=splits))
        with unless_the_driver_is_wrong(portable.device):
            self.check(backend, rng)

    def test_splits(self, backend, rng):
        problem = Problem(rows=4, runs=4, most_runs=4, k=1056, n=40, group_rows=32, device=None)
        problem = problem._replace(device=backend.runtime.capabilities)
        configuration = dataclasses.replace(backend.tier.configurations(problem)[0], splits=3)
        self.check(with_configuration(backend, configuration), rng)

    def check(self, backend, rng, bias=False, **kind):
        problem = random_problem(rng, 4, 1056, 40, 32, bias=bias, **kind)
        stack, ctx, x = problem.stack(backend), backend.new_context(), activations(rng, 45, 1056)
        ids = rng.integers(0, 4, (45, 1))
        routing = map(backend.from_host, marlin_cy.moe_align_block_size(ids, 20, 4))
        routed, listed = (GuardedBuffer(backend, (46, 40), np.float32) for _ in range(2))
        stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, routed.buffer, 45, 20, 1)
        dispatches = [(expert, row, row, 1) for row, expert in enumerate(ids[:, 0])]
        stack.gemm_phase_batched(ctx, backend.from_host(x), dispatches, listed.buffer, 1056)
        for out in (routed, listed):
            result = out.result()
            out.assert_untouched([45])
            for row, expert in enumerate(ids[:, 0]):
                one, w, added = x[row, None], problem.dense(expert), problem.bias[expert] if bias else 0
                bound = product_bound(backend, one, w) + 2.0**-23 * np.abs(added)
                assert_close(result[row, None], one.astype(np.float64) @ w + added, bound)

    @pytest.mark.skipif(not SUBGROUP_PLACES, reason="no device here has sub-groups and cl_khr_fp16")
    @pytest.mark.parametrize("place", SUBGROUP_PLACES or [None], ids=lambda place: place and place.label)
    @pytest.mark.parametrize("kind", WEIGHT_KINDS)
    def test_without_the_integer_dot_product(self, place, rng, kind):
        backend = copy.copy(backend_called(place.label))
        lacking = dataclasses.replace(backend.runtime.capabilities, integer_dot_product=False)
        backend.runtime = dataclasses.replace(backend.runtime, capabilities=lacking)
        self.check(backend, rng, bias=True, **WEIGHT_KINDS[kind])

    def test_splits_with_views_and_biases(self, portable, rng):
        configuration = dataclasses.replace(wave_tiled.PORTABLE_TABLE.cpu[0], splits=2)
        backend = with_configuration(portable, configuration)
        problem = random_problem(rng, 2, 1056, 40, 32)
        x, bias = activations(rng, 11, 1056), rng.standard_normal(48).astype(np.float32)
        view = problem.stack(backend).make_expert_linear(24, 48, bias)
        out = GuardedBuffer(backend, (11, 48), np.float32)
        view.forward(backend.new_context(), backend.from_host(x), out.buffer, 11)
        w = np.concatenate(problem.dense_all(), axis=1)[:, 24:72]
        bound = product_bound(backend, x, w) + 2.0**-21
        assert_close(out.result(), x.astype(np.float64) @ w + bias, bound)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("splits", [1, 3])
    def test_bias_of_a_stack(self, backend, rng, splits):
        """Added once for all runs of K, whether rows are routed or listed."""
        problem = Problem(rows=4, runs=4, most_runs=4, k=1056, n=40, group_rows=32, device=None)
        problem = problem._replace(device=backend.runtime.capabilities)
        configuration = dataclasses.replace(backend.tier.configurations(problem)[0], splits=splits)
        self.check(with_configuration(backend, configuration), rng, bias=True)

    def test_choice(self, portable):
        """What fits a device, for every size; splits only where there are few tiles."""
        device = dataclasses.replace(portable.runtime.capabilities, type="GPU", compute_units=100)
        small = dataclasses.replace(device, max_work_group_size=32)
        for tier in tiers.TIERS:
            for rows in (1, 2, 7, 8, 9, 64, 1000):
                problem = Problem(rows, 8, 8, 4096, 512, 128, device)
                first, *_ = tier.configurations(problem)
                assert first.rows >= min(rows, 32)
                assert first.splits * 256 <= 4096
                many = tier.configurations(problem._replace(runs=5000, most_runs=5000))[0]
                assert many.splits == 1
                if tier.name != "mma":
                    assert tier.configurations(problem._replace(device=small))[0].local_size == 32


class TestTiers:
    """The best tier that works is used; why others are not is said."""

    @pytest.fixture(autouse=True)
    def fresh_checks(self, monkeypatch):
        monkeypatch.setattr(selfcheck, "_known", {})

    def test_a_nan_anywhere_is_seen(self, portable, monkeypatch):
        assert portable.tier  # checked before
        results = iter([portable.to_host, lambda buffer: np.full(buffer.shape, np.nan, buffer.dtype), portable.to_host])
        monkeypatch.setattr(portable, "to_host", lambda buffer: next(results)(buffer))
        assert np.isnan(selfcheck.relative_error(portable))

    def test_4_bit_floats_are_checked(self, portable, monkeypatch):
        assert selfcheck.relative_error(portable) < 1e-4
        right = store_module.code_macros
        monkeypatch.setattr(store_module, "code_macros", lambda codes, *others: right("uint4", *others))
        assert selfcheck.relative_error(portable) > 0.1

    @pytest.fixture
    def place(self):
        return PORTABLE_PLACES[0]

    def test_names(self, portable):
        named = tiers.explain(portable.runtime.capabilities)
        assert [name for name, _ in named] == ["mma", "subgroup", "portable"]
        assert named[-1][1] is None

    def test_a_tier_that_computes_wrongly(self, monkeypatch, place):
        right = selfcheck.relative_error
        best = dataclasses.replace(tiers.tier_named("portable"), name="best")
        monkeypatch.setattr(tiers, "TIERS", (best, tiers.tier_named("portable")))
        monkeypatch.setattr(
            selfcheck, "relative_error", lambda backend: np.nan if backend.tier.name == "best" else right(backend)
        )
        backend = OpenClBackend(device=place.device)
        with pytest.warns(RuntimeWarning, match=r"tier 'best' is not used on .*: its results are wrong: .* error nan"):
            assert backend.tier.name == "portable"

    def test_a_tier_that_does_not_compile(self, monkeypatch, place, rng):
        portable = tiers.tier_named("portable")
        broken = dataclasses.replace(wave_tiled.PORTABLE_TABLE.cpu[0], macros=(("K_WAVES", 0),))
        best = dataclasses.replace(portable, name="best", configurations=lambda problem: [broken])
        monkeypatch.setattr(tiers, "TIERS", (best, portable))
        backend = OpenClBackend(device=place.device)
        with pytest.warns(RuntimeWarning, match="tier 'best' is not used on .*: its program does not compile"):
            assert backend.tier.name == "portable"
        stack = random_problem(rng, E, K, N, 32).stack(backend)
        assert np.isfinite(product(stack, backend.new_context(), backend.from_host(activations(rng, 3, K)))).all()

    def test_no_tier_works(self, monkeypatch, place):
        monkeypatch.setattr(selfcheck, "relative_error", lambda backend: 0.5)
        with pytest.raises(BackendUnavailable, match="tier 'portable' is not used on .*: its results are wrong"):
            _ = OpenClBackend(device=place.device, tier="portable").tier

    @pytest.mark.parametrize(
        "place", [place for place in OPENCL_PLACES if place.missing], ids=lambda place: place.label
    )
    def test_forced_where_it_cannot_run(self, place):
        with pytest.raises(BackendUnavailable, match=f"tier '{place.tier}' cannot run on .*: "):
            OpenClBackend(device=place.device, tier=place.tier)

    @pytest.mark.parametrize(("tier", "exception"), [("fastest", ValueError), (3, TypeError)])
    def test_no_such_tier(self, tier, exception):
        with pytest.raises(exception, match="tier: got"):
            OpenClBackend(tier=tier)


class TestLayer:
    def test_chosen_on_the_device(self, backend, rng):
        """The same as from the host; ids out of range take no part."""
        layer, ctx = Layer(rng).on(backend), backend.new_context()
        x = backend.from_host(activations(rng, 12, 96))
        ids = rng.integers(-1, 5, (12, 3)).astype(np.int32)
        weights = rng.standard_normal((12, 3)).astype(np.float32)
        expected = backend.to_host(layer.forward_routed(ctx, x, ids, weights))
        ids[ids < 0] = rng.choice([-7, 5, 2**31 - 1, -(2**31)], (ids < 0).sum())
        given = backend.from_host(ids), placed(backend, weights, 3)
        assert_same_bits(backend.to_host(layer.forward_routed(ctx, x, *given)), expected)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations_and_biases(self, backend, rng, activation):
        """Both products have their expert's bias. No activation is steeper than 1.2 times ``up`` (which swigluoai
        limits to 7, and adds 1 to)."""
        row_of_table = ACTIVATIONS[activation]
        gate_up, down = (
            random_problem(rng, 4, k, n, 32, bias=True) for k, n in ((96, 128 if row_of_table.gated else 64), (64, 40))
        )
        layer = marlin_cy.MoeLayer(gate_up.stack(backend), down.stack(backend), top_k=2, activation=activation)
        x, ids = activations(rng, 12, 96), rng.integers(0, 4, (12, 2)).astype(np.int32)
        weights = rng.standard_normal((12, 2)).astype(np.float32)
        out = layer.forward_routed(backend.new_context(), backend.from_host(x), ids, weights)
        expected, bound = np.zeros((12, 40)), np.full((12, 40), 2.0**-24)
        for token, row in enumerate(x[:, None].astype(np.float64)):
            for expert, weight in zip(ids[token], weights[token], strict=True):
                w1, w2 = gate_up.dense(expert), down.dense(expert)
                off = product_bound(backend, row, w1) + 2.0**-23 * np.abs(gate_up.bias[expert])
                parts = 2 if row_of_table.gated else 1
                (gate, *_, up), (off_gate, *_, off_up) = (
                    [*np.split(a, parts, axis=1)] * (3 - parts) for a in (row @ w1 + gate_up.bias[expert], off)
                )
                inner = row_of_table.reference(gate, up)
                off = 1.2 * off_gate * (np.abs(up) + off_up + 1) + (np.abs(gate) + off_gate) * off_up
                off += 2.0**-18 * np.abs(inner)
                product = np.abs(inner @ w2 + down.bias[expert])
                expected[token] += weight * (inner @ w2 + down.bias[expert])[0]
                off = off @ np.abs(w2) + product_bound(backend, np.abs(inner) + off, w2) + 2.0**-20 * product
                bound[token] += np.abs(weight) * (off + 2.0**-23 * np.abs(down.bias[expert]))[0]
        assert_close(backend.to_host(out), expected, bound)

    def test_slices(self, portable, rng, monkeypatch):
        # One configuration for all sizes: another could add in another order.
        portable = with_configuration(portable, wave_tiled.PORTABLE_TABLE.cpu[0])
        layer, ctx = Layer(rng).on(portable), portable.new_context()
        x = portable.from_host(activations(rng, 50, 96))
        logits = portable.from_host(rng.standard_normal((50, 5)).astype(np.float32))
        expected = portable.to_host(layer(ctx, x, logits))
        monkeypatch.setattr(moe, "SLICE_BYTES", 20_000)
        with ctx.profile() as events:
            result = portable.to_host(layer(ctx, x, logits))
        assert sum(label == "combine" for label, _ in events) > 3
        assert_same_bits(result, expected)

    @pytest.mark.parametrize("block_size", [1, 4, 8, 32, 64])
    def test_block_sizes(self, portable, rng, monkeypatch, block_size):
        layer, ctx = Layer(rng), portable.new_context()
        tier = dataclasses.replace(portable.tier, block_size=lambda average_rows: block_size)
        monkeypatch.setattr(portable, "_tier", tier)
        x, ids = activations(rng, 30, 96), rng.integers(-1, 5, (30, 2))
        weights = np.ones((30, 2), np.float32)
        result = portable.to_host(layer.on(portable).forward_routed(ctx, portable.from_host(x), ids, weights))
        assert_close(result, layer.expected(x, ids, weights), layer.bound(portable, x, ids, weights))

    @pytest.mark.parametrize(
        ("ids", "weights", "exception", "message"),
        [
            (np.zeros((4, 2), np.int64), np.ones((4, 2), np.float32), TypeError, "topk_ids: got dtype int64"),
            (np.zeros((4, 2), np.int32), np.ones((4, 2)), TypeError, "topk_weights: got dtype float64"),
            (np.zeros(8, np.int32), np.ones(8, np.float32), ValueError, r"topk_ids: got shape \(8,\)"),
            (np.zeros((4, 2), np.int32), np.ones((4, 1), np.float32), ValueError, r"topk_weights: got shape \(4, 1\)"),
            (np.zeros((3, 2), np.int32), np.ones((3, 2), np.float32), ValueError, "topk_ids: got 3 rows, expected 4"),
            (np.zeros((4, 0), np.int32), np.ones((4, 0), np.float32), ValueError, "expected at least one expert"),
        ],
    )
    def test_refused(self, portable, rng, ids, weights, exception, message):
        layer, x = Layer(rng).on(portable), portable.from_host(activations(rng, 4, 96))
        with pytest.raises(exception, match=message):
            layer.forward_routed(portable.new_context(), x, portable.from_host(ids), portable.from_host(weights))

    def test_ids_and_weights_of_two_sides(self, portable, rng):
        layer, x = Layer(rng).on(portable), portable.from_host(activations(rng, 4, 96))
        ids, weights = np.zeros((4, 2), np.int32), np.ones((4, 2), np.float32)
        for given in ((portable.from_host(ids), weights), (ids, portable.from_host(weights))):
            with pytest.raises(TypeError, match="topk_(ids|weights): got a numpy.ndarray, which lies on the host"):
                layer.forward_routed(portable.new_context(), x, *given)

    def test_stacks_of_another_backend(self, portable, cpu_backend, rng):
        layer = Layer(rng)
        x, logits = activations(rng, 4, 96), np.zeros((4, 5), np.float32)
        with pytest.raises(TypeError, match="ctx: got an OpenCL context, but the layer's gate_up is a CpuMarlin"):
            layer.on(cpu_backend)(portable.new_context(), *map(portable.from_host, (x, logits)))
        with pytest.raises(TypeError, match="ctx: got a CPU context, but the layer's gate_up is a OpenClMarlin"):
            layer.on(portable)(cpu_backend.new_context(), x, logits)


def test_tiles_of_runs():
    """One tile an entry, cut at multiples of its rows."""
    runs = np.array([[2, 0, 24, 0, 5, 10, 7], [1, 8, 16, 24, 0, 0, 3]], np.int32)
    expected = [[2, 0, 24, 0, 5, 10, 3, 0], [2, 0, 24, 0, 8, 13, 3, 0], [2, 0, 24, 0, 11, 16, 1, 0]]
    expected.append([1, 8, 16, 24, 0, 0, 3, 0])
    np.testing.assert_array_equal(TileList(runs).tiles(3), expected)


def test_host_time_of_a_warm_call(portable, rng):
    """What a call costs before its kernel is enqueued: a bound that notices blunders, not the figure itself."""
    problem = random_problem(rng, E, K, N, 32)
    stack, ctx = problem.stack(portable), portable.new_context()
    x, out = portable.from_host(activations(rng, ROWS, K)), portable.empty((ROWS, N), np.float32)
    ids = rng.integers(0, E, (ROWS, 1))
    routing = list(map(portable.from_host, marlin_cy.moe_align_block_size(ids, 4, E)))

    def call():
        stack.gemm_phase_vllm(ctx, x, *routing, out, ROWS, 4, 1)

    with ctx.profile() as events:
        call()
    event = events[-1][1]
    plans = ctx.plans_of(stack.store)
    for key, plan in plans.items():
        plans[key] = plan._replace(gemm=lambda *args, **others: event)
    times = []
    for _ in range(20):
        begin = time.thread_time()
        for _ in range(100):
            call()
        times.append((time.thread_time() - begin) / 100)
    print(f"{min(times) * 1e6:.1f} us")
    assert min(times) < 100e-6
