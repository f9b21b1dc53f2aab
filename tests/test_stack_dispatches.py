"""Dispatches are copied before they are checked, so that no other thread can change a checked value."""

import numpy as np
import pytest

from marlin_cy.stacks.dispatches import as_dispatches, check_disjoint, check_dispatches

VALID = [(0, 0, 0, 2), (1, 2, 2, 3)]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_result_is_private(dtype, order):
    given = np.array(VALID, dtype, order=order)
    own = as_dispatches(given)
    assert not np.shares_memory(own, given)
    assert own.dtype == np.int64
    assert own.flags.c_contiguous
    np.testing.assert_array_equal(own, VALID)


def test_a_buffer_that_changes_after_the_check():
    """The checked copy is used, so writes of another thread to the caller's memory have no effect."""
    memory = bytearray(np.array(VALID, np.int64).tobytes())
    given = np.frombuffer(memory, np.int64).reshape(2, 4)
    own = as_dispatches(given)
    check_dispatches(own, 2, 5, 5)
    check_disjoint(own)
    np.frombuffer(memory, np.int64)[:] = 2**40
    check_dispatches(own, 2, 5, 5)
    np.testing.assert_array_equal(own, VALID)


class Resized(np.ndarray):
    """An array that has another shape each time it is read, as if another thread reshaped it."""

    reads = 0

    @property
    def shape(self):
        Resized.reads += 1
        return (2, 4) if Resized.reads == 1 else (4, 2)


def test_the_copy_is_checked():
    """A wrong shape is found in the copy, not in the caller's array."""
    given = np.array(VALID, np.int64).reshape(4, 2).view(Resized)
    with pytest.raises(ValueError, match=r"dispatches: got shape \(4, 2\), expected \[D, 4\]"):
        as_dispatches(given)


def test_a_stack_uses_the_copy(cpu_backend, monkeypatch):
    """The CPU's products read the copy: the caller's array is out of bounds by then."""
    from problems import random_problem

    from marlin_cy.cpu import stack as cpu_stack

    problem = random_problem(np.random.default_rng(0), 2, 64, 16, 32)
    stack, ctx = problem.stack(cpu_backend), cpu_backend.new_context()
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    expected, out = np.zeros((5, 16), np.float32), np.zeros((5, 16), np.float32)
    stack.gemm_phase_batched(ctx, x, VALID, expected, 64)
    given = np.array(VALID, np.int64)

    def changed_afterwards(dispatches):
        own = as_dispatches(dispatches)
        given[:] = 2**40
        return own

    monkeypatch.setattr(cpu_stack, "as_dispatches", changed_afterwards)
    stack.gemm_phase_batched(ctx, x, given, out, 64)
    np.testing.assert_array_equal(out, expected)
