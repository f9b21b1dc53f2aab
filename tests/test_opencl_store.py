"""The OpenCL store: packing on the device against plain NumPy, parts, threads, and too little memory."""

import gc

import numpy as np
import pytest
from problems import DTYPES, G_IDX_MODES, WEIGHT_KINDS, add_in_parts, random_problem

cl = pytest.importorskip("pyopencl")

from opencl_devices import each_device, runtime_of  # noqa: E402

from marlin_cy.errors import DeviceError, DeviceMemoryError, UnsupportedError  # noqa: E402
from marlin_cy.opencl import memory  # noqa: E402
from marlin_cy.opencl import store as store_module  # noqa: E402
from marlin_cy.opencl.gemm.codes import SUPPORTED_CODES  # noqa: E402
from marlin_cy.opencl.layout import ExpertLayout, expert_layout, pack_expert, unpack_expert  # noqa: E402
from marlin_cy.opencl.store import OpenClGptqStore, OpenClStackBuilder  # noqa: E402
from marlin_cy.reference import dequantize  # noqa: E402
from marlin_cy.weights.canonical import CanonicalWeight  # noqa: E402
from marlin_cy.weights.order import group_order  # noqa: E402
from marlin_cy.weights.sizes import StackSizes  # noqa: E402

BFLOAT16 = DTYPES["bfloat16"]


def builder_for(runtime, problem):
    shape = problem.num_experts, problem.k, problem.n, problem.group
    return OpenClStackBuilder(
        runtime, StackSizes(*shape, normalised(problem), problem.codes, problem.canonical(0).scales)
    )


def normalised(problem):
    """``g_idx`` as a backend hands it on: None where it says nothing."""
    plain = np.arange(problem.k) // problem.group
    return [None if g_idx is None or np.array_equal(g_idx, plain) else g_idx for g_idx in problem.g_idx]


def store_of(runtime, problem):
    builder = builder_for(runtime, problem)
    for expert in range(problem.num_experts):
        builder.add(expert, 0, problem.canonical(expert))
    return builder.finish()


def assert_packed(runtime, store, problem):
    for expert in range(problem.num_experts):
        order = store.group_orders[store.order_of[expert]]
        parts = {name: getattr(problem, name)[expert] for name in store.layout.places}
        scale = store.layout.places["scale"].dtype
        parts["scale"] = (parts["scale"].astype(np.float64) / store.weight_factor).astype(scale)
        expected = pack_expert(problem.q[expert], parts, order, store.layout)
        np.testing.assert_array_equal(store.read(runtime.queue, expert), expected, f"expert {expert}")


class TestLayout:
    @pytest.mark.parametrize(
        ("packed_k", "n", "group", "expected"),
        [  # strips, k_blocks, groups, scale_offset, zero_offset, expert_words
            (32, 8, 32, (1, 1, 1, 128, 136, 192)),
            (96, 24, 96, (2, 2, 1, 512, 528, 576)),
            (2048, 1536, 128, (96, 32, 16, 393216, 405504, 411648)),
        ],
    )
    def test_sizes(self, packed_k, n, group, expected):
        layout = expert_layout(packed_k, n, group)
        names = ("strips", "k_blocks", "groups", "scale_offset", "zero_offset", "expert_words")
        assert tuple(getattr(layout, name) for name in names) == expected

    @pytest.mark.parametrize(("group_size", "shift"), [(32, 5), (64, 6), (96, 7), (128, 7)])
    def test_group_shift(self, group_size, shift):
        assert expert_layout(96, 8, group_size).group_shift == shift

    @pytest.mark.parametrize(("packed_k", "n", "expert_words"), [(32, 8, 192), (2880, 5760, 2332800)])
    def test_sizes_without_zero_points(self, packed_k, n, expert_words):
        layout = expert_layout(packed_k, n, 32, "e2m1")
        assert layout.expert_words == expert_words
        assert layout.zero_offset == expert_layout(packed_k, n, 32).zero_offset

    def test_sizes_beyond_32_bits(self):
        assert ExpertLayout(2**20, 2**18, 7).expert_words > 2**34

    def test_by_hand(self):
        """Lane 4g + t of step s: rows 64 b + 32 (s / 2) + 8 t + 4 (s % 2) + 0..3 of columns g and g + 8."""
        q = np.zeros((128, 32), np.uint8)
        q[64 + 32 + 8 * 3 + 4 + 2, 16 + 8 + 5] = 9  # block 1, step 3, t 3, the third row; strip 1, g 5, upper half
        scale, zero = np.zeros((1, 32), np.float16), np.zeros((1, 32), np.uint8)
        scale[0, 16 + 8 + 5], zero[0, 16 + 8 + 5] = 1, 7
        layout = expert_layout(128, 32, 128)
        expert = pack_expert(q, {"scale": scale, "zero": zero}, group_order(None, 128, 128), layout)
        expected = np.zeros_like(expert)
        expected[(1 * 2 + 1) * 128 + 4 * (4 * 5 + 3) + 3] = 9 << 4 * 3
        expected[layout.scale_offset + 8 + 5] = 0x3C00 << 16
        expected[layout.zero_offset + 4 + 5 // 2] = 7 << 24
        np.testing.assert_array_equal(expert, expected)

    @pytest.mark.sampled(12)
    @pytest.mark.parametrize("codes", SUPPORTED_CODES)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    @pytest.mark.parametrize("group_size", [32, 128, -1])
    def test_unpacks_to_what_was_packed(self, rng, group_size, g_idx, codes):
        problem = random_problem(rng, 1, 160, 24, group_size, g_idx=g_idx, codes=codes)
        order = group_order(normalised(problem)[0], problem.k, problem.group)
        layout = expert_layout(order.packed_k + 32, problem.n, min(problem.group, 128), codes)
        expert = pack_expert(problem.q[0], {name: getattr(problem, name)[0] for name in layout.places}, order, layout)
        q, parts = unpack_expert(expert, order, layout, problem.k)
        np.testing.assert_array_equal(q, problem.q[0])
        # Scales and zero points come back row by row.
        zero = parts.get("zero")
        np.testing.assert_array_equal(dequantize(q, parts["scale"], zero, 1, codes=codes), problem.dense(0))


@each_device
class TestPacking:
    @pytest.mark.sampled(7)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    @pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize(("k", "n"), [(32, 8), (96, 24), (288, 40), (352, 16)])
    def test_equals_plain_numpy(self, device, rng, k, n, group_size, g_idx):
        runtime = runtime_of(device)
        problem = random_problem(rng, 3, k, n, group_size, g_idx=g_idx)
        assert_packed(runtime, store_of(runtime, problem), problem)

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    @pytest.mark.parametrize("group_size", [32, -1])
    @pytest.mark.parametrize("kind", WEIGHT_KINDS)
    def test_other_kinds_of_weights(self, device, rng, kind, group_size, g_idx):
        """4-bit floats have no zero points: the next expert begins where the scales end."""
        runtime = runtime_of(device)
        problem = random_problem(rng, 3, 288, 40, group_size, g_idx=g_idx, **WEIGHT_KINDS[kind])
        store = store_of(runtime, problem)
        assert (store.codes, store.layout.has_zeros) == (problem.codes, problem.zero is not None)
        assert store.nbytes == 3 * 4 * store.layout.expert_words == sum(part.size for part in store.parts)
        assert_packed(runtime, store, problem)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("codes", SUPPORTED_CODES)
    @pytest.mark.parametrize("g_idx", ["none", "per_expert"])
    def test_columns_in_parts(self, device, rng, g_idx, codes):
        """Half strips, in any order, from several threads."""
        runtime = runtime_of(device)
        problem = random_problem(rng, 3, 96, 120, 32, g_idx=g_idx, codes=codes)
        builder = builder_for(runtime, problem)
        add_in_parts(builder, problem, rng)
        assert_packed(runtime, builder.finish(), problem)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("codes", SUPPORTED_CODES)
    @pytest.mark.parametrize("g_idx", ["none", "unequal"])
    def test_staging_of_fewer_columns(self, device, rng, monkeypatch, g_idx, codes):
        monkeypatch.setattr(store_module, "STAGING_BYTES", 1)
        runtime = runtime_of(device)
        problem = random_problem(rng, 2, 96, 56, 32, g_idx=g_idx, codes=codes)
        builder = builder_for(runtime, problem)
        assert builder._staging.columns == 16
        for expert in range(2):
            builder.add(expert, 40, problem.canonical(expert, slice(40, 56)))
            builder.add(expert, 0, problem.canonical(expert, slice(0, 40)))
        assert_packed(runtime, builder.finish(), problem)

    def test_arrays_of_any_strides(self, device, rng):
        runtime = runtime_of(device)
        problem = random_problem(rng, 1, 64, 24, 32)
        weight = problem.canonical(0)
        builder = builder_for(runtime, problem)
        builder.add(
            0, 0, CanonicalWeight(*(np.asfortranarray(a) for a in (weight.words, weight.scale, weight.zero)), 32)
        )
        assert_packed(runtime, builder.finish(), problem)

    def test_no_columns(self, device, rng):
        runtime = runtime_of(device)
        problem = random_problem(rng, 1, 32, 8, 32)
        builder = builder_for(runtime, problem)
        builder.add(0, 8, problem.canonical(0, slice(8, 8)))
        builder.add(0, 0, problem.canonical(0))
        assert_packed(runtime, builder.finish(), problem)

    def test_finished_too_early(self, device, rng):
        problem = random_problem(rng, 2, 32, 16, 32)
        builder = builder_for(runtime_of(device), problem)
        builder.add(0, 0, problem.canonical(0))
        with pytest.raises(ValueError, match="finish: column 0 of expert 1 was not added"):
            builder.finish()

    def test_a_weight_that_could_not_be_packed_may_be_added_again(self, device, rng, monkeypatch):
        runtime = runtime_of(device)
        problem = random_problem(rng, 1, 32, 16, 32)
        builder = builder_for(runtime, problem)
        with monkeypatch.context() as patch:
            patch.setattr(cl, "enqueue_copy", fails_from(1))
            with pytest.raises(DeviceMemoryError, match=r"staging of weights: \d+ bytes do not fit"):
                builder.add(0, 0, problem.canonical(0))
        builder.add(0, 0, problem.canonical(0))
        assert_packed(runtime, builder.finish(), problem)

    @pytest.mark.parametrize("g_idx", G_IDX_MODES)
    def test_orders(self, device, rng, g_idx):
        runtime = runtime_of(device)
        problem = random_problem(rng, 3, 96, 8, 32, g_idx=g_idx)
        store = store_of(runtime, problem)
        if g_idx == "none":
            assert store.order is None
            assert not store.act_order
            return
        assert store.act_order
        assert len(set(store.order_of)) == (1 if g_idx == "common" else 3)
        rows = np.empty((1 if g_idx == "common" else 3, store.packed_k), np.int32)
        assert store.order.size == rows.nbytes
        cl.enqueue_copy(runtime.queue, rows, store.order)
        for expert, row in enumerate(rows):
            order = store.group_orders[store.order_of[expert]]
            expected = np.arange(96) if order.rows is None else order.rows
            np.testing.assert_array_equal(row[: len(expected)], expected)
            assert (row[len(expected) :] == -1).all()


@each_device
class TestSymmetric:
    def test_all_zeros_are_8(self, device, rng):
        problem = random_problem(rng, 2, 64, 16, 32, sym=True)
        assert store_of(runtime_of(device), problem).symmetric

    def test_there_are_none(self, device, rng):
        problem = random_problem(rng, 2, 64, 16, 32, codes="e2m1")
        assert store_of(runtime_of(device), problem).symmetric

    def test_one_is_not(self, device, rng):
        problem = random_problem(rng, 2, 64, 16, 32, sym=True)
        problem.zero[1, 1, 15] = 9
        assert not store_of(runtime_of(device), problem).symmetric


@each_device
class TestScales:
    """The largest scale is stored as 2**14 or more and below 2**15; ``weight_factor`` has the inverse factor."""

    @pytest.mark.parametrize(
        ("largest", "factor"),
        [(0.0, 1), (2**-24, 2**-38), (-0.01, 2**-21), (1, 2**-14), (1.999, 2**-14), (32752, 1), (-65504, 2)],
    )
    def test_factor(self, device, rng, largest, factor):
        """Two parts, the second with one expert."""
        problem = random_problem(rng, 3, 64, 24, 32)
        problem.scale[:] *= np.float16(abs(largest) / 4)
        problem.scale[2, 1, 7] = largest
        expert_bytes = 4 * expert_layout(64, 24, 32).expert_words
        runtime = runtime_of(device, max_alloc_bytes=2 * expert_bytes)
        store = store_of(runtime, problem)
        assert (store.weight_factor, len(store.parts)) == (factor, 2)
        assert_packed(runtime, store, problem)

    @pytest.mark.parametrize(
        ("largest", "factor"),
        [(2.0**-133, 2**-147), (2.0**-106, 2**-120), (-1, 2**-14), (1.75 * 2.0**117, 2**103), (-(2.0**60), 2**46)],
    )
    def test_factor_of_bfloat16(self, device, rng, largest, factor):
        problem = random_problem(rng, 3, 64, 24, 32, scales="bfloat16")
        problem.scale[:] = problem.scale.astype(np.float64) * abs(largest) / 4
        problem.scale[2, 1, 7] = largest
        runtime = runtime_of(device, max_alloc_bytes=2 * 4 * expert_layout(64, 24, 32).expert_words)
        store = store_of(runtime, problem)
        assert (store.weight_factor, len(store.parts)) == (factor, 2)
        assert_packed(runtime, store, problem)

    @pytest.mark.parametrize("largest", [2.0**-100, 1.0, 2.0**100])
    def test_bfloat16_in_float16(self, device, rng, largest):
        """Scales of at least 2**-31 of the largest keep their bits; smaller scales are approximated."""
        problem = random_problem(rng, 1, 2048, 8, 32, scales="bfloat16")
        scale = largest * rng.uniform(0.5, 1, problem.scale.shape) * 2.0 ** -rng.integers(0, 60, problem.scale.shape)
        problem.scale[:] = scale
        problem.scale[0, 0, 0] = -largest
        runtime = runtime_of(device)
        store = store_of(runtime, problem)
        order = store.group_orders[0]
        _, parts = unpack_expert(store.read(runtime.queue, 0), order, store.layout, problem.k)
        stored, given = (
            parts["scale"][::32].astype(np.float64) * store.weight_factor,
            problem.scale[0].astype(np.float64),
        )
        kept = np.abs(given) >= largest / 2**31
        np.testing.assert_array_equal(stored[kept], given[kept])
        assert (np.abs(stored - given) <= 2.0**-39 * largest).all()
        assert (stored[np.abs(given) < largest / 2**41] == 0).all()

    @pytest.mark.parametrize("scale", [2.0**118, -(2.0**127), np.nan, np.inf])
    def test_bfloat16_beyond_what_kernels_multiply(self, device, rng, scale):
        """Refused before anything is packed: the columns may be added again."""
        runtime = runtime_of(device)
        problem = random_problem(rng, 1, 32, 16, 32, scales="bfloat16")
        before, problem.scale[0, 0, 3] = problem.scale[0, 0, 3], scale
        builder = builder_for(runtime, problem)
        with pytest.raises(
            UnsupportedError, match=r"weight.scale: got (nan|inf|\d.*), expected magnitudes below 2\*\*118"
        ):
            builder.add(0, 0, problem.canonical(0))
        problem.scale[0, 0, 3] = before
        builder.add(0, 0, problem.canonical(0))
        assert_packed(runtime, builder.finish(), problem)

    def test_small_ones_keep_their_bits(self, device, rng):
        problem = random_problem(rng, 1, 32, 8, 32)
        problem.scale[0, 0] = np.arange(1, 9).astype(np.uint16).view(np.float16)  # the smallest there are
        problem.scale[0, 0, 0] = 1
        assert_packed(runtime := runtime_of(device), store_of(runtime, problem), problem)

    def test_finishing_again_changes_nothing(self, device, rng):
        runtime = runtime_of(device)
        problem = random_problem(rng, 1, 32, 8, 32)
        builder = builder_for(runtime, problem)
        builder.add(0, 0, problem.canonical(0))
        factor = builder.finish().weight_factor
        store = builder.finish()
        assert store.weight_factor == factor
        assert_packed(runtime, store, problem)


@each_device
class TestParts:
    @pytest.mark.parametrize(
        ("num_experts", "most", "distinct", "pointers", "experts_per_part"),
        [(3, 3, 1, 1, 3), (3, 2, 2, 2, 2), (5, 2, 3, 4, 2), (3, 1, 3, 4, 1), (9, 2, 5, 8, 2), (8, 1, 8, 8, 1)],
    )
    def test_experts_are_spread(self, device, rng, num_experts, most, distinct, pointers, experts_per_part):
        problem = random_problem(rng, num_experts, 32, 16, 32)
        expert_bytes = 4 * expert_layout(32, 16, 32).expert_words
        runtime = runtime_of(device, max_alloc_bytes=(most + 1) * expert_bytes - 1)
        store = store_of(runtime, problem)
        assert (len(store.parts), store.experts_per_part) == (pointers, experts_per_part)
        assert len({part.int_ptr for part in store.parts}) == distinct
        assert sum({part.int_ptr: part.size for part in store.parts}.values()) == store.nbytes
        assert all(part.size <= runtime.max_alloc_bytes for part in store.parts)
        assert_packed(runtime, store, problem)


def fails_from(call, error=cl.status_code.MEM_OBJECT_ALLOCATION_FAILURE, function=None):
    """A function of OpenCL that runs out of memory at its ``call``-th call."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) >= call:
            raise cl.MemoryError(cl._cl._ErrorRecord("clSomething", error, ""))
        return function(*args, **kwargs)

    return fail


@each_device
class TestTooLittleMemory:
    def test_more_than_eight_buffers(self, device):
        runtime = runtime_of(device, max_alloc_bytes=4 * expert_layout(32, 16, 32).expert_words)
        with pytest.raises(
            DeviceMemoryError,
            match=r"packed weights: 9 experts of \[32, 16\] in at most 8 buffers: 6912 bytes .* buffers of at most 768",
        ):
            OpenClGptqStore(runtime, StackSizes(9, 32, 16, 32, [None] * 9))

    def test_more_than_the_device_has(self, device):
        runtime = runtime_of(device, max_alloc_bytes=2**62)
        with pytest.raises(DeviceMemoryError, match=r"packed weights: 1048576 experts of \[131072, 131072\]"):
            OpenClGptqStore(runtime, StackSizes(2**20, 2**17, 2**17, 128, [None] * 2**20))

    @pytest.mark.parametrize("error", ["MEM_OBJECT_ALLOCATION_FAILURE", "OUT_OF_RESOURCES", "OUT_OF_HOST_MEMORY"])
    @pytest.mark.parametrize("function", ["Buffer", "enqueue_fill_buffer"])
    def test_what_was_allocated_is_released(self, device, rng, monkeypatch, function, error):
        problem = random_problem(rng, 4, 32, 16, 32)
        expert_bytes = 4 * expert_layout(32, 16, 32).expert_words
        runtime = runtime_of(device, max_alloc_bytes=expert_bytes)
        made, make = [], cl.Buffer

        def recorded(*args, **kwargs):
            made.append(make(*args, **kwargs))
            return made[-1]

        code = getattr(cl.status_code, error)
        with monkeypatch.context() as patch:
            patch.setattr(cl, "Buffer", recorded)
            patch.setattr(cl, function, fails_from(3, code, getattr(cl, function)))
            with pytest.raises(
                DeviceMemoryError, match=r"packed weights: 4 experts of \[32, 16\] in at most 8 buffers: 3072 bytes"
            ):
                builder_for(runtime, problem)
        assert len(made) == (2 if function == "Buffer" else 3)
        for buffer in made:
            with pytest.raises(cl.LogicError):
                buffer.release()
        assert_packed(runtime, store_of(runtime, problem), problem)

    def test_staging_that_does_not_fit(self, device, rng, monkeypatch):
        runtime, make = runtime_of(device), cl.Buffer
        problem = random_problem(rng, 1, 32, 16, 32)
        held = memory.live_stores.nbytes(device)
        with monkeypatch.context() as patch:
            patch.setattr(cl, "Buffer", fails_from(2, function=make))
            with pytest.raises(DeviceMemoryError, match="staging of weights"):
                builder_for(runtime, problem)
        assert memory.live_stores.nbytes(device) == held

    def test_other_errors_are_not_taken_for_it(self, device, rng, monkeypatch):
        monkeypatch.setattr(cl, "enqueue_fill_buffer", fails_from(1, cl.status_code.DEVICE_NOT_AVAILABLE))
        with pytest.raises(DeviceError, match="clSomething"):
            builder_for(runtime_of(device), random_problem(rng, 1, 32, 16, 32))

    def test_says_what_packed_weights_hold(self, device, rng):
        gc.collect()
        runtime = runtime_of(device)
        before = memory.live_stores.nbytes(device)
        store = store_of(runtime, random_problem(rng, 2, 32, 16, 32))
        assert memory.live_stores.nbytes(device) == before + store.nbytes
        with pytest.raises(DeviceMemoryError, match=f"of which packed weights hold {before + store.nbytes},|free,"):
            OpenClGptqStore(runtime, StackSizes(2**20, 2**17, 2**17, 128, [None] * 2**20))
        del store
        gc.collect()
        assert memory.live_stores.nbytes(device) == before
