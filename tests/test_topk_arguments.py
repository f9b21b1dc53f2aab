"""The checks of caller-selected experts."""

import threading

import numpy as np
import pytest

from marlin_cy.moe.topk_arguments import as_ids, as_topk

NUM_EXPERTS = 8
OUT_OF_RANGE = 1 << 30


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_that_another_thread_changes_are_never_out_of_range(dtype):
    """The ids are copied before they are checked. Checked first, an id that changes in between is used unchecked."""
    ids = np.zeros((1 << 16, 2), dtype)
    done = threading.Event()

    def change():
        while not done.is_set():
            ids[:] = OUT_OF_RANGE
            ids[:] = 0

    writer = threading.Thread(target=change)
    writer.start()
    checked = refused = 0
    try:
        for _ in range(400):
            try:
                result = as_ids(ids, "topk_ids", NUM_EXPERTS)
            except IndexError:
                refused += 1
            else:
                checked += 1
                assert result.max() < NUM_EXPERTS
    finally:
        done.set()
        writer.join()
    assert checked + refused == 400


@pytest.mark.parametrize("order", ["C", "F"])
def test_results_are_copies(order):
    ids = np.zeros((3, 2), np.int32, order=order)
    weights = np.ones((3, 2), np.float32, order=order)
    checked_ids, checked_weights = as_topk(ids, weights, NUM_EXPERTS)
    assert not np.shares_memory(checked_ids, ids)
    assert not np.shares_memory(checked_weights, weights)
    assert (checked_ids.dtype, checked_weights.dtype) == (np.int32, np.float32)
    assert checked_ids.flags.c_contiguous
    assert checked_weights.flags.c_contiguous
