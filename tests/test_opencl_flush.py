"""Queues are flushed before another queue, or the host, waits for their events.

OpenCL lets a driver hold commands back until then; Mesa's rusticl does, and a wait without a flush never ends. Other
drivers submit at once, so these tests look at the order of the library's own calls.
"""

import numpy as np
import pytest
from calls import CALLS
from conftest import DEVICE_LABELS
from problems import activations, random_problem

from marlin_cy.errors import DeviceError

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if DEVICE_LABELS == ["cpu"]:
    pytest.skip("no OpenCL device", allow_module_level=True)

from pyopencl.array import Array  # noqa: E402
from test_opencl_faults import failing, patch_launches  # noqa: E402

K, N, E, ROWS = 96, 24, 3, 6
FUNCTIONS = [
    (cl, "enqueue_nd_range_kernel"),
    (cl.Kernel, "__call__"),
    (cl, "enqueue_copy"),
    (cl.CommandQueue, "flush"),
    (cl.CommandQueue, "finish"),
]


@pytest.fixture
def backend(device_alone):
    return device_alone


@pytest.fixture
def calls(monkeypatch):
    """The calls of OpenCL from here on, in order: ``(name, queue of a flush or None)``."""
    made = []

    def recording(name, function):
        def record(*args, **others):
            made.append((name, args[0] if name in ("flush", "finish") else None))
            return function(*args, **others)

        return record

    for owner, name in FUNCTIONS:
        monkeypatch.setattr(owner, name, recording(name, getattr(owner, name)))
    return made


def is_launch(call):
    return call[0] in ("enqueue_nd_range_kernel", "__call__")


@pytest.mark.parametrize("kind", CALLS)
def test_each_call_flushes_its_queue_once(backend, rng, calls, kind):
    """After its last command, however many kernels it launches."""
    call = CALLS[kind](backend, rng)
    call.make_call(call.args)  # the first call makes workspace and plans
    del calls[:]
    call.make_call(call.args)
    del calls[[name for name, _ in calls].index("finish") :]  # then the results are copied back
    flushes = [index for index, made in enumerate(calls) if made[0] == "flush"]
    assert len(flushes) == 1
    assert calls[flushes[0]][1] == call.args["ctx"].queue
    launches = [index for index, made in enumerate(calls) if is_launch(made)]
    assert launches
    assert max(launches) < flushes[0]


def test_a_failed_call_flushes_what_it_enqueued(backend, rng, calls, monkeypatch):
    """Dropping the event of an upload waits for it. The error of the call is the one that is raised."""
    stack, ctx = random_problem(rng, E, K, N, 32).stack(backend), backend.new_context()
    x, out = backend.from_host(activations(rng, ROWS, K)), backend.empty((ROWS, N), np.float32)
    dispatches = [(1, 0, 0, ROWS)]
    stack.gemm_phase_batched(ctx, x, dispatches, out, K)
    del calls[:]
    with monkeypatch.context() as patch:
        patch_launches(patch, lambda function: failing("DEVICE_NOT_AVAILABLE"))
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            stack.gemm_phase_batched(ctx, x, dispatches, out, K)
    assert calls[-1] == ("flush", ctx.queue)
    with monkeypatch.context() as patch:
        patch_launches(patch, lambda function: failing("DEVICE_NOT_AVAILABLE"))
        patch.setattr(cl.CommandQueue, "flush", failing("INVALID_COMMAND_QUEUE"))
        with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
            stack.gemm_phase_batched(ctx, x, dispatches, out, K)


def test_a_flush_that_fails(backend, rng, monkeypatch):
    """It is a device's failure like others, and the context is free afterwards."""
    call = CALLS["batched"](backend, rng)
    with monkeypatch.context() as patch:
        patch.setattr(cl.CommandQueue, "flush", failing("DEVICE_NOT_AVAILABLE"))
        for _ in range(2):
            with pytest.raises(DeviceError, match="DEVICE_NOT_AVAILABLE"):
                call.make_call(call.args)
    call.make_call(call.args)


class TestQueuesOfTheCaller:
    """Arrays that the caller's own queue writes: nobody but the library can know that it must be flushed."""

    @pytest.fixture
    def queue(self, backend):
        return cl.CommandQueue(backend.context, backend.device)

    @pytest.fixture
    def written(self, backend, queue, rng):
        """``(array, what it will hold)``: an array of the backend's that the caller's queue fills."""
        x = activations(rng, ROWS, K)
        array = Array(queue, x.shape, x.dtype, data=backend.empty(x.shape, x.dtype).base_data)
        array.add_event(cl.enqueue_copy(queue, array.base_data, x, is_blocking=False))
        return array, x

    def test_to_host(self, backend, queue, written, calls):
        array, x = written
        np.testing.assert_array_equal(backend.to_host(array), x)
        assert calls.index(("flush", queue)) < [name for name, _ in calls].index("enqueue_copy")

    def test_an_input(self, backend, queue, written, rng, calls):
        array, _ = written
        stack, ctx = random_problem(rng, E, K, N, 32).stack(backend), backend.new_context()
        out = backend.empty((ROWS, N), np.float32)
        other = backend.from_host(activations(rng, ROWS, K))
        stack.gemm_phase_batched(ctx, other, [(1, 0, 0, ROWS)], out, K)
        del calls[:]
        stack.gemm_phase_batched(ctx, array, [(1, 0, 0, ROWS)], out, K)
        launch = next(index for index, made in enumerate(calls) if is_launch(made))
        assert calls.index(("flush", queue)) < launch
        backend.to_host(out)

    def test_a_queue_that_is_gone(self, backend, written):
        """Releasing it has flushed it."""
        array, x = written
        array.queue = None
        event = cl.enqueue_marker(cl.CommandQueue(backend.context, backend.device))
        array.add_event(event)
        np.testing.assert_array_equal(backend.to_host(array), x)

    def test_a_user_event(self, backend, written):
        """It has no queue."""
        array, x = written
        event = cl.UserEvent(backend.context)
        event.set_status(cl.command_execution_status.COMPLETE)
        array.add_event(event)
        np.testing.assert_array_equal(backend.to_host(array), x)
