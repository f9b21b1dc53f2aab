"""OpenCL in a child of ``fork``: refused with a message, in every entry, and not used half."""

import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import DEVICE_LABELS
from problems import activations, random_problem

import marlin_cy
from marlin_cy.errors import BackendUnavailable, DeviceError

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if DEVICE_LABELS == ["cpu"]:
    pytest.skip("no OpenCL device", allow_module_level=True)
if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

K, N, E, ROWS = 96, 24, 3, 6
SECONDS = 60
MESSAGE = "OpenCL was in use when this process was forked"


def in_child(function):
    """What a function returns (a text) in a child of fork; fails if the child hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = function()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("the child hangs")
        return os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


def refusal(call):
    """The type and the text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "returned"


def test_every_entry_of_a_child_is_refused(device_alone, rng):
    backend = device_alone
    problem = random_problem(rng, E, K, N, 32)
    stack, ctx = problem.stack(backend), backend.new_context()
    x, out = backend.from_host(activations(rng, ROWS, K)), backend.empty((ROWS, N), np.float32)
    linear = stack.make_expert_linear(0, N)

    def product():
        stack.gemm_phase_batched(ctx, x, [(1, 0, 0, ROWS)], out, K)

    product()
    expected = backend.to_host(out)
    entries = {
        "from_host": lambda: backend.from_host(np.ones(3, np.float32)),
        "to_host": lambda: backend.to_host(out),
        "empty": lambda: backend.empty((3,), np.float32),
        "new_context": lambda: backend.new_context(),
        "new_stack_builder": lambda: problem.builder(backend),
        "gemm_phase_batched": product,
        "linear": lambda: linear.forward(ctx, x, out, ROWS),
        "zero_workspace": lambda: stack.zero_workspace(ctx),
        "finish": ctx.finish,
    }
    said = in_child(lambda: "\n".join(f"{name}: {refusal(entry)}" for name, entry in entries.items()))
    for line, name in zip(said.splitlines(), entries, strict=True):
        assert line.startswith(f"{name}: {DeviceError.__name__}: {MESSAGE}")
    product()  # the parent goes on
    np.testing.assert_array_equal(backend.to_host(out), expected)


def test_a_child_cannot_open_a_device(device_alone):
    """Nor are platforms listed there, which may hang in the driver."""
    said = in_child(lambda: refusal(lambda: marlin_cy.get_backend("opencl")))
    assert said.startswith(f"{BackendUnavailable.__name__}: backend 'opencl': {MESSAGE}")
    assert in_child(lambda: str(marlin_cy.available_backends()["opencl"])).startswith(MESSAGE)
    device = device_alone.device
    said = in_child(lambda: refusal(lambda: marlin_cy.get_backend("opencl", device=device)))
    assert MESSAGE in said


def test_grandchildren_are_refused(device_alone):
    assert MESSAGE in in_child(lambda: in_child(lambda: refusal(lambda: marlin_cy.get_backend("opencl"))))


def test_a_child_of_a_parent_without_opencl():
    """The parent has imported the library, and asked for no device."""
    code = """
import os, sys
import marlin_cy
import marlin_cy.opencl.device
pid = os.fork()
if pid == 0:
    os._exit(0 if marlin_cy.available_backends()["opencl"] is None else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
