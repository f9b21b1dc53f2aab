"""Packed tiles without a backend: conversion to canonical weights, and refusals."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import CPU_KINDS, G_IDX_MODES, PARTS, TWO_LEVEL_KINDS, activations, random_problem

from marlin_cy.errors import UnsupportedError
from marlin_cy.stacks.builder import check_weight
from marlin_cy.weights._nibbles import words_of_tiles
from marlin_cy.weights.packed_tiles import PackedTiles
from marlin_cy.weights.sizes import normalised_g_idx


def tiles_of(problem, backend, bias=None):
    """The packed tiles that the CPU backend makes of a problem's experts."""
    store = problem.stack(backend).store
    return PackedTiles(
        store.data.reshape(store.num_experts, -1),
        store.num_experts,
        store.k,
        store.n,
        store.weight_group_size,
        [None if groups is None else groups.astype(np.int32) for groups in problem.g_idx],
        store.codes,
        store.scales,
        bias,
    ), store


@pytest.mark.sampled(75)
@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
@pytest.mark.parametrize(("k", "n"), [(352, 72), (32, 8), (544, 40)])
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_canonical_weights(cpu_backend, rng, k, n, group_size, g_idx, kind):
    """They equal the packed weights."""
    problem = random_problem(rng, 3, k, n, group_size, g_idx=g_idx, **CPU_KINDS[kind])
    tiles, _ = tiles_of(problem, cpu_backend)
    for expert in range(3):
        groups = slice(None) if g_idx != "unequal" else np.unique(problem.g_idx[expert])
        actual, expected = tiles.canonical(expert), problem.canonical(expert)
        check_weight(actual)
        for name in ("k", "n", "group_size", "codes"):
            assert getattr(actual, name) == getattr(expected, name)
        own_g_idx = normalised_g_idx(expected.g_idx, k, expected.group_size)
        assert_same_or_none(actual.words, expected.words)
        for name in PARTS:
            assert_same_or_none(
                *(None if part is None else part[groups] for part in parts_named(name, actual, expected))
            )
        assert_same_or_none(actual.g_idx, own_g_idx)


@pytest.mark.parametrize("kind", TWO_LEVEL_KINDS)
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_two_levels(cpu_backend, rng, kind, group_size):
    if group_size == 16 and not kind.startswith("uint8"):
        group_size = 64
    problem = random_problem(rng, 2, 512, 40, group_size, **TWO_LEVEL_KINDS[kind])
    tiles, _ = tiles_of(problem, cpu_backend)
    assert tiles.symmetric == (not kind.endswith("_min"))
    for expert in range(2):
        actual, expected = tiles.canonical(expert), problem.canonical(expert)
        check_weight(actual)
        for name in ("words", *PARTS):
            assert_same_or_none(*parts_named(name, actual, expected))


def parts_named(name, *weights):
    return [getattr(weight, name) for weight in weights]


def assert_same_or_none(actual, expected):
    if expected is None:
        assert actual is None
    else:
        assert_same_bits(actual, expected)


def test_groups_without_rows_are_zero(cpu_backend, rng):
    problem = random_problem(rng, 1, 128, 8, 32, g_idx="common")
    problem.g_idx[0] = np.where(problem.g_idx[0] == 2, 3, problem.g_idx[0])
    weight = tiles_of(problem, cpu_backend)[0].canonical(0)
    assert not weight.scale[2].any()
    assert not weight.zero[2].any()


def test_a_stack_over_them_computes_the_same(cpu_backend, rng):
    problem = random_problem(rng, 2, 160, 40, 32, g_idx="per_expert")
    bias = rng.standard_normal((2, 40)).astype(np.float32)
    tiles, store = tiles_of(problem, cpu_backend, bias)
    stack = cpu_backend.stack_from_packed(tiles)
    assert np.shares_memory(stack.store.data, store.data)
    assert stack.bias is bias
    builder = problem.builder(cpu_backend)
    for expert in range(2):
        builder.add(expert, 0, problem.canonical(expert))
    x, outputs = activations(rng, 3, 160), []
    for each in (stack, builder.finish(bias)):
        outputs.append(np.empty((3, 40), np.float32))
        each.gemm_phase_batched(cpu_backend.new_context(num_threads=1), x, [(1, 0, 0, 3)], outputs[-1], 160)
    assert_same_bits(*outputs)


@pytest.mark.parametrize("g_idx", ["none", "unequal"])
def test_symmetric(cpu_backend, rng, g_idx):
    """True only if every zero point is 8. Here the last zero point of the last expert is 7."""
    problem = random_problem(rng, 2, 160, 40, 32, g_idx=g_idx, sym=True)
    assert tiles_of(problem, cpu_backend)[0].symmetric
    last = problem.g_idx[1].max() if problem.g_idx[1] is not None else 4
    problem.zero[1, last, 39] = 7
    assert not tiles_of(problem, cpu_backend)[0].symmetric
    floats = random_problem(rng, 2, 64, 16, 32, codes="e2m1", scales="bfloat16")
    assert tiles_of(floats, cpu_backend)[0].symmetric


REFUSED = [
    ({"data": lambda data: data[:, :-64]}, ValueError, "data: got shape"),
    ({"data": lambda data: data[::-1]}, ValueError, "data: got shape .* expected contiguous"),
    ({"data": lambda data: data.view(np.int8)}, TypeError, "data: got int8, expected uint8"),
    ({"data": lambda data: data.tolist()}, TypeError, "data: got list, expected uint8"),
    ({"num_experts": 1}, ValueError, "data: got shape|g_idx: got 2 entries"),
    ({"k": 72}, ValueError, "k: got 72, expected a positive multiple of 32"),
    ({"n": 12}, ValueError, "n_per_expert: got 12"),
    ({"group_size": 48}, UnsupportedError, "group_size: got 48"),
    ({"group_size": 64}, ValueError, "data: got shape"),
    ({"g_idx": [None]}, ValueError, "g_idx: got 1 entries"),
    ({"g_idx": [np.full(64, 2, np.int32), None]}, IndexError, "g_idx of expert 0: got 2 at row 0"),
    ({"codes": "uint3"}, ValueError, "codes: got 'uint3'"),
    ({"scales": "float8"}, ValueError, "scales: got 'float8'"),
]


@pytest.mark.parametrize(("changes", "exception", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(cpu_backend, rng, changes, exception, message):
    tiles, _ = tiles_of(random_problem(rng, 2, 64, 16, 32), cpu_backend)
    changes = {
        name: change(tiles.data) if callable(change) and name == "data" else change for name, change in changes.items()
    }
    with pytest.raises(exception, match=message):
        replace(tiles, **changes)


def test_no_such_expert(cpu_backend, rng):
    tiles, _ = tiles_of(random_problem(rng, 2, 64, 16, 32), cpu_backend)
    for expert in (-1, 2):
        with pytest.raises(IndexError, match=f"expert: got {expert}, expected 0 to 1"):
            tiles.canonical(expert)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 72, 16), r"tiles: got 64 rows of 16 columns, expected \[72, 16\]"),
        ((0, 64, 17), r"tiles: got 64 rows of 16 columns, expected \[64, 17\]"),
        ((64, 64, 16), r"tiles: got 56 rows of 16 columns"),
        ((0, 64, 16, np.full(64, 64, np.int32)), "positions: got 64 entries, expected 64 of 0 to 63"),
        ((0, 64, 16, np.full(64, -1, np.int32)), "positions: got 64 entries"),
        ((0, 64, 16, np.zeros(8, np.int32)), "positions: got 8 entries, expected 64"),
    ],
)
def test_words_out_of_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        words_of_tiles(np.zeros((1, 512), np.uint8), *arguments)


def test_reading_needs_no_backend():
    """The reader of packed folders imports no backend."""
    program = (
        "import sys, marlin_cy.checkpoints.packed\n"
        "found = [name for name in sys.modules if name.startswith(('marlin_cy.cpu', 'marlin_cy.opencl'))]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_data_at_any_address(cpu_backend, rng):
    """A memory map, or a view, need not begin at a multiple of 4 bytes."""
    tiles, _ = tiles_of(random_problem(rng, 2, 64, 16, 32), cpu_backend)
    for shift in range(4):
        room = np.empty(tiles.data.size + 3, np.uint8)
        data = room[shift : shift + tiles.data.size].reshape(tiles.data.shape)
        data[:] = tiles.data
        moved = replace(tiles, data=data)
        assert_same_bits(moved.canonical(1).words, tiles.canonical(1).words)
