"""The packed store: the fast packer against plain NumPy, its size, its alignment, its builder."""

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import (
    CPU_KINDS,
    G_IDX_MODES,
    TWO_LEVEL_KINDS,
    activations,
    add_in_parts,
    random_g_idx,
    random_problem,
)

from marlin_cy.cpu import CpuGptqStore, CpuMarlinExpertStack
from marlin_cy.cpu.layout import pack_tiles, unpack_tiles
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.order import group_order
from marlin_cy.weights.sizes import StackSizes
from marlin_cy.weights.tile_layout import TileLayout

CACHE_LINE = 64


def packed(store, expert):
    begin = expert * store.layout.expert_stride
    return store.data[begin : begin + store.layout.expert_stride]


def unpacked(store, expert):
    """``(w, q)`` of an expert, by plain NumPy."""
    order = store.group_orders[store.order_of[expert]]
    return unpack_tiles(packed(store, expert), order, store.layout, store.k)


@pytest.mark.sampled(40)
@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("group_size", [32, 128, 256, -1])
@pytest.mark.parametrize(("k", "n"), [(32, 8), (288, 24), (352, 40), (544, 32)])
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_equals_plain_numpy(cpu_backend, rng, k, n, group_size, g_idx, kind):
    problem = random_problem(rng, 2, k, n, group_size, g_idx=g_idx, **CPU_KINDS[kind])
    store = problem.stack(cpu_backend).store
    for expert in range(2):
        order = store.group_orders[store.order_of[expert]]
        expected = pack_tiles(problem.canonical(expert), order, store.layout)
        np.testing.assert_array_equal(packed(store, expert), expected)


@pytest.mark.sampled(60)
@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_unpacks_to_what_was_packed(cpu_backend, rng, group_size, g_idx, kind):
    problem = random_problem(rng, 2, 352, 40, group_size, g_idx=g_idx, **CPU_KINDS[kind])
    store = problem.stack(cpu_backend).store
    assert {"codes": store.codes, "scales": store.scales} == CPU_KINDS[kind]
    for expert in range(2):
        w, q = unpacked(store, expert)
        np.testing.assert_array_equal(q, problem.q[expert])
        np.testing.assert_array_equal(w, problem.dense(expert))


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("kind", TWO_LEVEL_KINDS)
def test_two_levels(cpu_backend, rng, kind, group_size):
    problem = random_problem(rng, 2, 512, 40, group_size, **TWO_LEVEL_KINDS[kind])
    check_two_levels(cpu_backend, problem)


@pytest.mark.parametrize("scales", ["two_level", "two_level_min", "float16"])
def test_groups_of_16(cpu_backend, rng, scales):
    check_two_levels(cpu_backend, random_problem(rng, 2, 512, 24, 16, codes="uint8", scales=scales))


def check_two_levels(cpu_backend, problem):
    store = problem.stack(cpu_backend).store
    for expert in range(problem.num_experts):
        order = store.group_orders[store.order_of[expert]]
        np.testing.assert_array_equal(packed(store, expert), pack_tiles(problem.canonical(expert), order, store.layout))
        w, q = unpacked(store, expert)
        np.testing.assert_array_equal(q, problem.q[expert])
        np.testing.assert_array_equal(w, problem.dense(expert))


def test_bits_of_a_weight(cpu_backend, rng):
    """Q4_K and Q6_K."""
    for codes, scales, group, bits in (("uint4", "two_level_min", 32, 4.625), ("uint8", "two_level", 16, 8.5625)):
        stack = random_problem(rng, 1, 1024, 64, group, codes=codes, scales=scales).stack(cpu_backend)
        assert stack.metadata.packed_bytes * 8 / (1024 * 64) == pytest.approx(bits, abs=1e-3)


class TestFromPacked:
    """A store over data that another one packed."""

    @pytest.fixture
    def problem(self, rng):
        return random_problem(rng, 3, 160, 40, 32, g_idx="per_expert", codes="e2m1", scales="bfloat16")

    @pytest.fixture
    def arguments(self, cpu_backend, problem):
        store = problem.stack(cpu_backend).store
        return [3, 160, 40, 32, problem.g_idx, "e2m1", "bfloat16", store.data]

    def test_a_memory_map_is_not_copied(self, cpu_backend, rng, problem, arguments, tmp_path):
        arguments[-1].tofile(tmp_path / "packed")
        data = np.memmap(tmp_path / "packed", np.uint8, "r")
        store = CpuGptqStore.from_packed(*arguments[:-1], data)
        assert store.data is data
        assert (store.codes, store.scales, store.nbytes) == ("e2m1", "bfloat16", data.nbytes)
        stack, x = CpuMarlinExpertStack(store, 3, 40, 160), activations(rng, 5, 160)
        del data, store
        out = np.empty((15, 40), np.float32)
        stack.gemm_phase_batched(cpu_backend.new_context(), x, [(e, 0, 5 * e, 5) for e in range(3)], out, 160)
        for expert in range(3):
            assert_same_bits(out[5 * expert : 5 * expert + 5], problem.reference(expert, x))
            np.testing.assert_array_equal(unpacked(stack.store, expert)[1], problem.q[expert])

    def test_is_not_packed_into(self, problem, arguments):
        before = arguments[-1].copy()
        store = CpuGptqStore.from_packed(*arguments[:-1], arguments[-1])
        with pytest.raises(ValueError, match="pack: the store was made from packed data, which is read-only"):
            store.pack(0, 0, problem.canonical(1))
        np.testing.assert_array_equal(arguments[-1], before)

    @pytest.mark.parametrize(
        ("change", "exception", "message"),
        [
            (lambda data: data[:-64], ValueError, r"data: got shape \(\d+,\) with .*expected contiguous \(\d+,\)"),
            (lambda data: np.append(data, data[:64]), ValueError, r"data: got shape"),
            (lambda data: data.reshape(2, -1), ValueError, r"data: got shape \(2, "),
            (lambda data: np.repeat(data, 2)[::2], ValueError, r"data: got shape .*strides \(2,\)"),
            (lambda data: off_by_one(data), ValueError, r"data: got address 0x\w+, expected a multiple of 64"),
            (lambda data: data.view(np.int8), TypeError, "data: got int8, expected a uint8 array"),
            (lambda data: data.tobytes(), TypeError, "data: got bytes, expected a uint8 array"),
            (lambda data: None, TypeError, "data: got NoneType, expected a uint8 array"),
        ],
    )
    def test_refuses(self, arguments, change, exception, message):
        with pytest.raises(exception, match=message):
            CpuGptqStore.from_packed(*arguments[:-1], change(arguments[-1]))

    @pytest.mark.parametrize(
        ("position", "value", "exception", "message"),
        [
            (0, 2, ValueError, "g_idx: got 3 entries, expected one per expert: 2"),
            (1, 161, ValueError, "k: got 161, expected a positive multiple of 32"),
            (2, 56, ValueError, "data: got shape"),
            (3, 48, UnsupportedError, "group_size: got 48"),
            (4, [np.full(160, 5, np.int32)] * 3, IndexError, "g_idx of expert 0: got 5 at row 0"),
            (4, [None] * 2, ValueError, "g_idx: got 2 entries"),
            (5, "int4", ValueError, "codes: got 'int4', expected one of uint4, e2m1, iq4_nl, uint8"),
            (6, "float8", ValueError, "scales: got 'float8', expected one of float16, bfloat16, float32"),
        ],
    )
    def test_refuses_sizes(self, arguments, position, value, exception, message):
        arguments[position] = value
        with pytest.raises(exception, match=message):
            CpuGptqStore.from_packed(*arguments)


def off_by_one(data):
    """The same bytes at an address that is no multiple of 64."""
    memory = np.empty(len(data) + 65, np.uint8)
    begin = -memory.ctypes.data % 64 + 1
    memory[begin : begin + len(data)] = data
    return memory[begin : begin + len(data)]


@pytest.mark.parametrize("g_idx", ["none", "per_expert"])
def test_columns_in_parts(cpu_backend, rng, g_idx):
    """In any cuts at multiples of 8, in any order, from several threads."""
    problem = random_problem(rng, 3, 288, 120, 32, g_idx=g_idx)
    expected = problem.stack(cpu_backend).store.data
    builder = problem.builder(cpu_backend)
    add_in_parts(builder, problem, rng)
    np.testing.assert_array_equal(builder.finish().store.data, expected)


def test_every_tile_starts_a_cache_line(cpu_backend, rng):
    for k, n, group_size in ((32, 8, 32), (288, 24, 32), (160, 40, 64), (96, 56, -1)):
        store = random_problem(rng, 2, k, n, group_size).stack(cpu_backend).store
        assert store.data.ctypes.data % CACHE_LINE == 0
        assert store.layout.tile_stride % CACHE_LINE == 0
        assert store.layout.header_bytes % CACHE_LINE == 0
        assert store.layout.expert_stride == store.layout.tiles * store.layout.tile_stride
        assert store.data.nbytes == 2 * store.layout.expert_stride


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_size_beside_the_checkpoint(cpu_backend, rng, checkpoint_format):
    problem = random_problem(rng, 2, 2048, 1536, 128, checkpoint_format=checkpoint_format)
    checkpoint = sum(array.nbytes for arrays in problem.tensors() for array in arrays)
    assert problem.stack(cpu_backend).metadata.packed_bytes <= 1.05 * checkpoint


def test_stack_of_more_than_2_to_the_31_bytes(cpu_backend, rng):
    """Only the last expert is packed: pages of the others are never touched, and so cost no memory."""
    problem = random_problem(rng, 1, 4096, 64, 128)
    size = TileLayout(4096, 64, 128).expert_stride
    num_experts = 2**31 // size + 2
    store = CpuGptqStore(StackSizes(num_experts, 4096, 64, 128, [None] * num_experts))
    store.pack(num_experts - 1, 0, problem.canonical(0))
    stack = CpuMarlinExpertStack(store, num_experts, 64, 4096)
    x, out = activations(rng, 3, 4096), np.empty((3, 64), np.float32)
    stack.gemm_phase_batched(cpu_backend.new_context(), x, [(num_experts - 1, 0, 0, 3)], out, 4096)
    assert store.data.nbytes > 2**31
    np.testing.assert_array_equal(out, problem.reference(0, x))


def test_refuses_what_memory_cannot_hold(cpu_backend):
    with pytest.raises(MemoryError, match=r"packed weights: could not allocate \d+ bytes"):
        cpu_backend.new_stack_builder(2**20, 2**17, 2**17, group_size=128)


def test_store_shares_equal_orders(cpu_backend, rng):
    assert len(random_problem(rng, 4, 128, 8, 32).stack(cpu_backend).store.group_orders) == 1
    common = random_problem(rng, 4, 128, 8, 32, g_idx="common")
    assert len(common.stack(cpu_backend).store.group_orders) == 1
    copies = [entry.copy() for entry in common.g_idx]
    assert len(cpu_backend.new_stack_builder(4, 128, 8, group_size=32, g_idx=copies)._store.group_orders) == 1


@pytest.mark.parametrize("mode", ["common", "unequal"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_order(rng, mode, group_size):
    """Each row once, in runs of one group that are whole packed groups, padded where they are short."""
    k = 416
    (g_idx,) = random_g_idx(rng, 1, k, group_size, mode)
    order = group_order(g_idx, k, group_size)
    kept = order.rows[order.rows >= 0]
    assert sorted(kept) == list(range(k))
    assert order.packed_k == len(order.rows)
    assert order.packed_k % 32 == 0
    for position, row in enumerate(order.rows):
        if row >= 0:
            assert order.scale_rows[position // group_size] == g_idx[row]


class TestMisuse:
    """A builder that has refused a weight is unchanged."""

    @pytest.fixture
    def problem(self, rng):
        return random_problem(rng, 2, 64, 32, 32)

    @pytest.fixture
    def builder(self, cpu_backend, problem):
        builder = problem.builder(cpu_backend)
        builder.add(0, 0, problem.canonical(0, slice(0, 16)))
        yield builder
        builder.add(0, 16, problem.canonical(0, slice(16, 32)))
        builder.add(1, 0, problem.canonical(1))
        np.testing.assert_array_equal(builder.finish().store.data, problem.stack(cpu_backend).store.data)

    @pytest.mark.parametrize(
        ("expert", "column", "exception", "message"),
        [
            (0, 0, ValueError, "column_offset: columns 0 to 16 of expert 0 were added before"),
            (0, 8, ValueError, "column_offset: columns 8 to 24 of expert 0 were added before"),
            (0, 4, ValueError, "column_offset: got columns 4 to 20, expected multiples of 8"),
            (0, 24, IndexError, "column_offset: got columns 24 to 40, expected a part of 0 to 32"),
            (0, -8, IndexError, "column_offset: got columns -8 to 8, expected a part of 0 to 32"),
            (0, 2**63 - 8, IndexError, "column_offset: got columns"),
            (0, 2**70, ValueError, "column_offset: got a number of 71 bits"),
            (0, 16.0, TypeError, "column_offset: got 16.0, expected an int"),
            (2, 16, IndexError, "expert: got 2, expected 0 to 1"),
            (-1, 16, IndexError, "expert: got -1, expected 0 to 1"),
            (2**70, 16, ValueError, "expert: got a number of 71 bits"),
            (None, 16, TypeError, "expert: got None, expected an int"),
        ],
    )
    def test_place(self, builder, problem, expert, column, exception, message):
        with pytest.raises(exception, match=message):
            builder.add(expert, column, problem.canonical(0, slice(0, 16)))

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            (
                {"words": np.zeros((4, 16), np.uint32)},
                ValueError,
                r"weight.scale: got shape \(2, 16\), expected \(1, 16",
            ),
            (
                {"words": np.zeros((8, 12), np.uint32)},
                ValueError,
                r"weight.scale: got shape \(2, 16\), expected \(2, 12",
            ),
            ({"words": np.zeros((8, 16), np.int64)}, TypeError, "weight.words: got int64, expected uint32"),
            ({"words": np.zeros(16, np.uint32)}, ValueError, r"weight.words: got shape \(16,\), expected two dim"),
            ({"words": [[0] * 16] * 8}, TypeError, "weight.words: got list, expected uint32"),
            ({"scale": np.zeros((1, 16), np.float16)}, ValueError, r"weight.scale: got shape \(1, 16\)"),
            ({"scale": np.zeros((2, 8), np.float16)}, ValueError, r"weight.scale: got shape \(2, 8\)"),
            ({"scale": np.zeros((2, 16), np.float64)}, TypeError, "weight.scale: got float64, expected float16"),
            (
                {"scale": np.zeros((2, 16), np.float32)},
                ValueError,
                "weight: got codes 'uint4' with float32 scales, expected 'uint4' with float16",
            ),
            ({"scale": np.zeros((2, 16), ">f2")}, TypeError, "weight.scale: got >f2, expected float16"),
            ({"zero": np.zeros((3, 16), np.uint8)}, ValueError, r"weight.zero: got shape \(3, 16\)"),
            ({"zero": np.full((2, 16), 17, np.uint8)}, ValueError, "weight.zero: got 17, expected 0 to 16"),
            ({"zero": None}, TypeError, "weight.zero: got NoneType, expected uint8"),
            ({"group_size": 64}, ValueError, r"weight.scale: got shape \(2, 16\), expected \(1, 16\)"),
            ({"group_size": 0}, ValueError, "weight.group_size: got 0, expected at least 1"),
            ({"group_size": "32"}, TypeError, "weight.group_size: got '32', expected an int"),
            (
                {"g_idx": np.zeros(64, np.int32)},
                UnsupportedError,
                "weight.g_idx: differs from the builder's g_idx for expert 0",
            ),
            ({"g_idx": np.full(64, 2, np.int32)}, IndexError, "g_idx: got 2 at row 0, expected 0 to 1"),
            ({"g_idx": np.zeros(63, np.int32)}, ValueError, r"g_idx: got shape \(63,\)"),
        ],
    )
    def test_weight(self, builder, problem, changes, exception, message):
        right = problem.canonical(0, slice(16, 32))
        wrong = CanonicalWeight(**{**vars(right), **changes})
        with pytest.raises(exception, match=message):
            builder.add(0, 16, wrong)

    def test_weight_of_another_size(self, builder, rng):
        wide = random_problem(rng, 1, 96, 16, 32).canonical(0)
        with pytest.raises(ValueError, match="weight: got k 96 and group_size 32, expected 64 and 32"):
            builder.add(0, 16, wide)
        with pytest.raises(TypeError, match="weight: got NoneType, expected CanonicalWeight"):
            builder.add(0, 16, None)

    def test_finished_too_early(self, builder):
        with pytest.raises(ValueError, match="finish: column 16 of expert 0 was not added"):
            builder.finish()

    def test_gate_and_up_in_different_orders(self, cpu_backend, rng):
        first, second = random_g_idx(rng, 1, 64, 32, "common") + random_g_idx(rng, 1, 64, 32, "common")
        weight = random_problem(rng, 1, 64, 16, 32).canonical(0)
        builder = cpu_backend.new_stack_builder(1, 64, 32, group_size=32, g_idx=[first])
        builder.add(0, 0, CanonicalWeight(**{**vars(weight), "g_idx": first}))
        for g_idx in (second, None):
            with pytest.raises(UnsupportedError, match="the same order of K, or be loaded as two stacks"):
                builder.add(0, 16, CanonicalWeight(**{**vars(weight), "g_idx": g_idx}))


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts: got 0, expected a positive multiple of 1"),
        ({"num_experts": 2.0}, TypeError, "num_experts: got 2.0, expected an int"),
        ({"k": 40}, ValueError, "k: got 40, expected a positive multiple of 32"),
        ({"k": 2**70}, ValueError, "k: got a number of 71 bits"),
        ({"n_per_expert": 12}, ValueError, "n_per_expert: got 12, expected a positive multiple of 8"),
        ({"n_per_expert": None}, TypeError, "n_per_expert: got None, expected an int"),
        ({"group_size": 0}, ValueError, "group_size: got 0, expected a positive number"),
        ({"group_size": -5}, ValueError, "group_size: got -5"),
        ({"group_size": 48}, UnsupportedError, "group_size: got 48, supported are 32, 64"),
        ({"g_idx": [None]}, ValueError, "g_idx: got 1 entries, expected one per expert: 2"),
        ({"g_idx": [None] * 3}, ValueError, "g_idx: got 3 entries"),
        ({"g_idx": 7}, TypeError, "g_idx: got int, expected a sequence"),
        ({"g_idx": np.zeros(32, np.int32)}, ValueError, r"g_idx: got shape \(32,\), expected \(64,\)"),
        ({"g_idx": np.full(64, 2, np.int32)}, IndexError, "g_idx of expert 0: got 2 at row 0, expected 0 to 1"),
        ({"g_idx": [None, np.full(64, -1, np.int32)]}, IndexError, "g_idx of expert 1: got -1 at row 0"),
        ({"g_idx": [None, np.zeros(64)]}, TypeError, "g_idx of expert 1: got dtype float64"),
    ],
)
def test_builder_refuses(cpu_backend, changes, exception, message):
    arguments = {"num_experts": 2, "k": 64, "n_per_expert": 16, "group_size": 32, **changes}
    with pytest.raises(exception, match=message):
        cpu_backend.new_stack_builder(**arguments)
