"""What can go wrong on a device alone: buffers that are none, drivers that fail, memory that is short.

After each the context is free, and the same call gives the right result.
"""

import threading

import numpy as np
import pytest
from asserts import assert_same_bits
from calls import CALLS, ROWS, E, K, N
from conftest import DEVICE_LABELS
from problems import activations, random_problem

from marlin_cy.errors import (
    BackendUnavailable,
    BuildError,
    ContextInUse,
    DeviceError,
    DeviceMemoryError,
    MarlinError,
)

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if DEVICE_LABELS == ["cpu"]:
    pytest.skip("no OpenCL device", allow_module_level=True)

from pyopencl.array import Array, to_device  # noqa: E402

from marlin_cy.opencl import program, selfcheck, tiers  # noqa: E402
from marlin_cy.opencl.backend import OpenClBackend  # noqa: E402


@pytest.fixture
def backend(device_alone):
    return device_alone


@pytest.fixture(params=CALLS)
def call(request, backend, rng):
    return CALLS[request.param](backend, rng)


# Buffers ----------------------------------------------------------------------------------------


class OnHost(np.ndarray):
    """What a :class:`~calls.Call` leaves where it is."""


def foreign(backend, x):
    context = cl.Context([backend.device])
    array = to_device(cl.CommandQueue(context), x)
    array.its_context = context  # kept: not every driver's queues keep theirs
    return array


def too_small(backend, x):
    copy = backend.from_host(x.reshape(-1)[:-1])
    return Array(copy.queue, x.shape, x.dtype, data=copy.base_data, events=copy.events)


def too_far(backend, x):
    copy = backend.from_host(x)
    return Array(copy.queue, x.shape, x.dtype, data=copy.base_data, offset=x.itemsize, events=copy.events)


def read_only(backend, x):
    flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
    return Array(backend.from_host(x).queue, x.shape, x.dtype, data=cl.Buffer(backend.context, flags, hostbuf=x))


BUFFERS = {
    "host": (lambda backend, x: x.view(OnHost), TypeError, "got a numpy.ndarray, which lies on the host, .*from_host"),
    "pyopencl": (lambda backend, x: backend.from_host(x).base_data, TypeError, "got Buffer, expected a pyopencl.array"),
    "foreign": (foreign, ValueError, "got an array of another OpenCL context, expected the backend's"),
    "too small": (too_small, ValueError, r"got shape .*, which its buffer of \d+ bytes is too small for"),
    "too far": (too_far, ValueError, r"got shape .* from byte 4 on, which its buffer of \d+ bytes is too small for"),
    "read-only": (read_only, ValueError, "got a read-only buffer, expected a writeable one"),
}


def buffer_cases():
    for call, kind in CALLS.items():
        for name in (*kind.inputs, *kind.others, kind.output):
            for case in BUFFERS:
                if case != "read-only" or name == kind.output:
                    yield pytest.param(call, name, *BUFFERS[case], id=f"{call}-{name}-{case}")


@pytest.mark.sampled(27)
@pytest.mark.parametrize(("call", "name", "wrong", "exception", "message"), list(buffer_cases()), indirect=["call"])
def test_buffers(call, name, wrong, exception, message):
    call.refused(lambda args: {name: wrong(call.backend, args[name])}, exception, f"^{name}: {message}")


# Drivers that fail ------------------------------------------------------------------------------

FAILURES = ["DEVICE_NOT_AVAILABLE", "OUT_OF_RESOURCES", "INVALID_COMMAND_QUEUE", "INVALID_CONTEXT"]


def patch_launches(patch, wrapped):
    """Replace both ways in which kernels are launched by what ``wrapped`` makes of them."""
    for owner, name in ((cl.Kernel, "__call__"), (cl, "enqueue_nd_range_kernel")):
        patch.setattr(owner, name, wrapped(getattr(owner, name)))


def failing(code, after=0, function=None, calls=None):
    """A function of OpenCL that fails, from its ``after``-th call on (of all that share ``calls``)."""
    calls = [] if calls is None else calls

    def fail(*args, **others):
        calls.append(args)
        if len(calls) <= after:
            return function(*args, **others)
        kind = cl.MemoryError if code in ("OUT_OF_RESOURCES", "MEM_OBJECT_ALLOCATION_FAILURE") else cl.LogicError
        raise kind(cl._cl._ErrorRecord("clEnqueueSomething", getattr(cl.status_code, code), ""))

    return fail


def assert_device_error(error, backend, code):
    assert isinstance(error, MarlinError)
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, cl.Error)
    for words in (backend.device.name.strip(), code, "make a new backend"):
        assert words in str(error)


@pytest.mark.parametrize("code", FAILURES)
def test_a_launch_that_fails(call, monkeypatch, code):
    with monkeypatch.context() as patch:
        patch_launches(patch, lambda function: failing(code))
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                call.make_call(call.args)
            assert_device_error(caught.value, call.backend, code)
        call.guard.assert_untouched()
    assert_same_bits(call.right(), call.expected)


@pytest.mark.parametrize("call", ["layer", "routed"], indirect=True)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_later_launch_that_fails(call, monkeypatch, after):
    """Half of a layer has been enqueued."""
    calls = []
    with monkeypatch.context() as patch:
        patch_launches(patch, lambda function: failing("DEVICE_NOT_AVAILABLE", after, function, calls))
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            call.make_call(call.args)
    call.guard.assert_guards()
    assert_same_bits(call.right(), call.expected)


@pytest.mark.parametrize("function", ["enqueue_fill", "enqueue_fill_buffer"])
def test_a_first_call_that_fails(backend, rng, monkeypatch, function):
    """What a context makes for its first call is made again, not used half made."""
    call = CALLS["vllm"](backend, rng)
    call.ctx = call.args["ctx"] = backend.new_context()
    with monkeypatch.context() as patch:
        patch.setattr(cl, function, failing("DEVICE_NOT_AVAILABLE"))
        with pytest.raises(DeviceError):
            call.make_call(call.args)
    call.guard.assert_untouched()
    assert_same_bits(call.right(), call.expected)


def test_copies_and_waits_that_fail(backend, rng, monkeypatch):
    code = "DEVICE_NOT_AVAILABLE"
    x, ctx = activations(rng, ROWS, K), backend.new_context()
    buffer = backend.from_host(x)
    with monkeypatch.context() as patch:
        patch.setattr(cl, "enqueue_copy", failing(code))
        patch.setattr(cl.CommandQueue, "finish", failing(code))
        for attempt in (lambda: backend.from_host(x), lambda: backend.to_host(buffer), ctx.finish):
            with pytest.raises(DeviceError) as caught:
                attempt()
            assert_device_error(caught.value, backend, code)
        with pytest.raises(DeviceError, match=code):
            random_problem(rng, E, K, N, 32).stack(backend)
    ctx.finish()
    assert_same_bits(backend.to_host(buffer), x)


def test_a_queue_that_is_not_made(backend, monkeypatch):
    monkeypatch.setattr(cl, "CommandQueue", failing("DEVICE_NOT_AVAILABLE"))
    with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
        backend.new_context()


# Memory that is short ---------------------------------------------------------------------------


def test_more_than_there_is(backend):
    with pytest.raises(DeviceMemoryError, match=rf"array of shape .*: {2**42} bytes do not fit; .* has \d+ bytes"):
        backend.empty((1 << 20, 1 << 20), np.float32)


def buffers_of_at_most(most):
    """``pyopencl.Buffer`` on a device with little memory."""
    make = cl.Buffer

    def new_buffer(context, flags, size=0, hostbuf=None):
        return failing("MEM_OBJECT_ALLOCATION_FAILURE")() if size > most else make(context, flags, size, hostbuf)

    return new_buffer


@pytest.mark.parametrize("g_idx", ["common", "per_expert"])
def test_a_workspace_that_does_not_fit(backend, rng, monkeypatch, g_idx):
    """Prepared rows of many tokens; fewer of them fit."""
    stack = random_problem(rng, E, K, N, 32, g_idx=g_idx).stack(backend)
    ctx, few, many = backend.new_context(), activations(rng, ROWS, K), activations(rng, 3000, K)
    few, many = backend.from_host(few), backend.from_host(many)
    outs = backend.empty((ROWS, N), np.float32), backend.from_host(np.full((3000, N), 7, np.float32))
    # The first use of a configuration checks it, which needs memory of its own: in another context, before.
    stack.gemm_phase_batched(backend.new_context(), many, [(1, 0, 0, 3000)], backend.empty((3000, N), np.float32), K)
    stack.gemm_phase_batched(ctx, few, [(1, 0, 0, ROWS)], outs[0], K)
    expected, held = backend.to_host(outs[0]), ctx.workspace_bytes
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(cl, "Buffer", buffers_of_at_most(200_000))
            with pytest.raises(DeviceMemoryError) as caught:
                stack.gemm_phase_batched(ctx, many, [(1, 0, 0, 3000)], outs[1], K)
        there = f"{backend.device.name.strip()} has {backend.device.global_mem_size} bytes"
        for words in ("workspace (prepared rows): ", " bytes do not fit; ", there):
            assert words in str(caught.value)
        assert ctx.workspace_bytes <= held + 65536  # a smaller buffer of another purpose may have grown
        assert (backend.to_host(outs[1]) == 7).all()
        stack.gemm_phase_batched(ctx, few, [(1, 0, 0, ROWS)], outs[0], K)
        assert_same_bits(backend.to_host(outs[0]), expected)
    stack.gemm_phase_batched(ctx, many, [(1, 0, 0, 3000)], outs[1], K)
    assert (backend.to_host(outs[1]) != 7).any()


def test_a_launch_that_runs_out_of_memory(call, monkeypatch):
    """Some drivers allocate when a buffer is first used."""
    with monkeypatch.context() as patch:
        patch_launches(patch, lambda function: failing("MEM_OBJECT_ALLOCATION_FAILURE"))
        with pytest.raises(DeviceMemoryError, match="the buffers of a call do not fit .* has"):
            call.make_call(call.args)
    assert_same_bits(call.right(), call.expected)


def test_a_bias_that_does_not_fit(backend, rng, monkeypatch):
    stack = random_problem(rng, 1, K, N, 32).stack(backend)
    with monkeypatch.context() as patch:
        patch.setattr(cl, "Buffer", failing("MEM_OBJECT_ALLOCATION_FAILURE"))
        with pytest.raises(DeviceMemoryError, match=rf"bias: {4 * N} bytes do not fit"):
            stack.make_expert_linear(0, N, np.ones(N, np.float32))


def test_a_bias_of_a_stack_that_does_not_fit(backend, rng, monkeypatch):
    """The weights are kept: the builder may be asked again."""
    problem = random_problem(rng, 2, K, N, 32, bias=True)
    builder = problem.builder(backend)
    for expert in range(2):
        builder.add(expert, 0, problem.canonical(expert))
    with monkeypatch.context() as patch:
        patch.setattr(cl, "Buffer", failing("MEM_OBJECT_ALLOCATION_FAILURE"))
        with pytest.raises(DeviceMemoryError, match=rf"bias: {8 * N} bytes do not fit"):
            builder.finish(problem.bias)
    assert (builder.finish(problem.bias).bias == problem.bias).all()


def test_a_device_without_queues(backend, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cl, "CommandQueue", failing("OUT_OF_RESOURCES"))
        with pytest.raises(BackendUnavailable, match="has no command queue .*OUT_OF_RESOURCES"):
            OpenClBackend(device=backend.device)


# Programs that do not compile -------------------------------------------------------------------


GEMMS = [name for name in program.kernel_files() if name.startswith("gemm_")]


def broken(names):
    """``program.source``, with an error in some files."""
    right = program.source

    def source(file, *folder):
        return right(file, *folder) + ("\nint broken = no_such_name;\n" if file in names else "")

    return source


@pytest.fixture
def fresh_checks(monkeypatch):
    monkeypatch.setattr(selfcheck, "_known", {})


def test_a_forced_tier_that_does_not_compile(backend, rng, monkeypatch, fresh_checks):
    monkeypatch.setattr(program, "source", broken(GEMMS))
    forced = OpenClBackend(device=backend.device, tier=backend.tier.name)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=r"(?s)does not compile: .*no_such_name"):
            _ = forced.tier


@pytest.mark.filterwarnings("ignore:tier .* is not used on:RuntimeWarning")
def test_no_tier_compiles(backend, monkeypatch, fresh_checks):
    chosen = OpenClBackend(device=backend.device)
    monkeypatch.setattr(program, "source", broken(GEMMS))
    with pytest.raises(BackendUnavailable) as caught:
        _ = chosen.tier
    for name, missing in tiers.explain(chosen.runtime.capabilities):
        assert (f"tier {name!r} is not used on" in str(caught.value)) == (missing is None)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("files", [["moe"], ["routing", "route_align"], ["align", "route_align"]], ids=" ".join)
def test_a_layer_whose_program_does_not_compile(backend, rng, monkeypatch, files):
    """The tier is right, but not all that a layer needs: the log is shown, and the context is free."""
    fresh = OpenClBackend(device=backend.device, tier=backend.tier.name)
    with monkeypatch.context() as patch:
        patch.setattr(program, "source", broken(files))
        with pytest.raises(BuildError, match="no_such_name") as caught:
            CALLS["layer"](fresh, rng)
        assert caught.value.program.removesuffix(".cl") in files
    call = CALLS["layer"](fresh, rng)
    assert_same_bits(call.right(), call.expected)


# Threads ----------------------------------------------------------------------------------------


def test_a_context_of_two_threads(call, monkeypatch):
    """While one thread's call is being enqueued, another's is refused; then both are right."""
    entered, leave = threading.Event(), threading.Event()
    results = []
    first = threading.Thread(target=lambda: results.append(call.right()))

    def held(launch):
        def launch_when_told(*args, **others):
            if threading.current_thread() is first:
                entered.set()
                assert leave.wait(60)
            return launch(*args, **others)

        return launch_when_told

    with monkeypatch.context() as patch:
        patch_launches(patch, held)
        first.start()
        assert entered.wait(60)
        try:
            with pytest.raises(ContextInUse, match="ctx: in use by another thread"):
                call.make_call(call.args)
            call.guard.assert_untouched()
        finally:
            leave.set()
            first.join(60)
    assert_same_bits(results[0], call.expected)
    assert_same_bits(call.right(), call.expected)
