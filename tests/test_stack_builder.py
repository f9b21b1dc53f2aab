"""Builders that several threads use at once: columns are reserved, then packed, then complete."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from problems import random_g_idx, random_problem

from marlin_cy.stacks.builder import CheckedStackBuilder, checked_stack_sizes

WAIT_SECONDS = 60


class PausedBuilder(CheckedStackBuilder):
    """Packs nothing. Each pack signals its beginning and ends when an event is set."""

    def __init__(self, *args):
        super().__init__(*args)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.packed = []
        self.error = None

    def _pack(self, expert, column_offset, weight):
        self.begun.set()
        assert self.go_on.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error
        self.packed.append((expert, column_offset))

    def _stack(self, bias):
        return list(self.packed)


@pytest.fixture
def weight(rng):
    return random_problem(rng, 1, 64, 16, 32).canonical(0)


@pytest.fixture
def builder():
    return PausedBuilder(checked_stack_sizes(1, 64, 16, 32, None, "uint4", np.float16))


def test_finish_during_a_pack_is_refused(builder, weight):
    """All columns are reserved, none is packed: a stack would still be written to."""
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(builder.add, 0, 0, weight)
        assert builder.begun.wait(WAIT_SECONDS)
        with pytest.raises(ValueError, match="finish: column 0 of expert 0 is still being packed by another thread"):
            builder.finish()
        builder.go_on.set()
        adding.result(WAIT_SECONDS)
    assert builder.finish() == [(0, 0)]


def test_columns_that_are_being_packed_are_taken(builder, weight):
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(builder.add, 0, 0, weight)
        assert builder.begun.wait(WAIT_SECONDS)
        with pytest.raises(ValueError, match="column_offset: columns 0 to 16 of expert 0 were added before"):
            builder.add(0, 0, weight)
        builder.go_on.set()
        adding.result(WAIT_SECONDS)
    assert builder.finish() == [(0, 0)]


def test_a_pack_that_fails_gives_its_columns_back(builder, weight):
    builder.go_on.set()
    builder.error = MemoryError()
    with pytest.raises(MemoryError):
        builder.add(0, 0, weight)
    with pytest.raises(ValueError, match="finish: column 0 of expert 0 was not added"):
        builder.finish()
    builder.error = None
    builder.add(0, 0, weight)
    assert builder.finish() == [(0, 0)]


@pytest.mark.parametrize("form", ["one array", "a list", "two dimensions"])
def test_g_idx_is_private(cpu_backend, rng, form):
    """A caller that writes to ``g_idx`` afterwards changes no order of K: rows of scales are read by it unchecked."""
    (g_idx,) = random_g_idx(rng, 1, 64, 32, "common")
    given = {"one array": g_idx, "a list": [g_idx, None], "two dimensions": np.stack([g_idx, g_idx])}[form]
    kept = checked_stack_sizes(2, 64, 16, 32, given, "uint4", np.float16).g_idx
    expected = g_idx.copy()
    for array in [given] if isinstance(given, np.ndarray) else [g_idx]:
        array[:] = 2**30
    np.testing.assert_array_equal(kept[0], expected)
    assert kept[1] is None if form == "a list" else np.array_equal(kept[1], expected)
