"""Grouping by expert and preparing rows in one launch: held to what ``align`` and ``prepare_rows`` do by themselves."""

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import DTYPES, activations
from test_moe import Layer
from test_opencl_moe_kernels import GUARD, Output, input_buffer

cl = pytest.importorskip("pyopencl")

from opencl_devices import each_device, runtime_of  # noqa: E402
from test_opencl_mma import CONFIGURATIONS, EMULATING, emulating  # noqa: E402

from marlin_cy.opencl import moe  # noqa: E402
from marlin_cy.opencl.buffers import TYPE_CODES  # noqa: E402
from marlin_cy.opencl.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES  # noqa: E402

ALIGN_ITEMS = 256
GROUP_SHIFT = 5
INPUT_OFFSET = 8
SIZES = [  # tokens, experts a token, experts, slots of a block, elements of a row
    (1, 1, 1, 1, 32),
    (1, 8, 128, 8, 2048),
    (70, 2, 3, 16, 96),
    (5, 3, 300, 4, 2080),  # more turns than one, the last of a few work-items
    (300, 8, 7, 64, 32),
]


class Case:
    """Pairs to align and rows to prepare, with where the results go."""

    def __init__(self, device, rng, sizes, dtype, prepared_type, order=None):
        tokens, top_k, experts, block_size, k = sizes
        self.runtime, self.tokens, self.experts = runtime_of(device), tokens, experts
        self.prepared_type, self.dtype, self.order, self.k = prepared_type, dtype, order, k
        self.ids = rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int32)
        self.rows = activations(rng, tokens, k, dtype)
        self.block_size = block_size

    def run(self, together):
        """Bytes of every result, in one launch or in two."""
        runtime, packed_k = self.runtime, self.k if self.order is None else len(self.order)
        capacity = self.ids.size + self.experts * (self.block_size - 1)
        groups = -(-packed_k >> GROUP_SHIFT)
        sizes = {FLOAT32_ROWS: 4 * packed_k, FLOAT16_ROWS: 2 * packed_k, PLANES: 2 * packed_k + 16 * -(-groups // 2)}
        outputs = sorted_ids, expert_ids, past, rows, factors = [
            Output(runtime, (capacity,), np.int32),
            Output(runtime, (-(-capacity // self.block_size),), np.int32),
            Output(runtime, (1,), np.int32),
            Output(runtime, (self.tokens, sizes[self.prepared_type]), np.uint8, before=0),
            Output(runtime, (self.tokens,), np.float32, before=0),
        ]
        align = (
            input_buffer(runtime, self.ids, before=5),
            np.uint64(5),
            np.uint32(self.ids.size),
            np.uint32(self.experts),
            np.uint32(self.block_size),
            *(argument for output in (sorted_ids, expert_ids, past) for argument in (output.buffer, np.uint64(GUARD))),
            cl.LocalMemory(4 * self.experts),
        )
        prepare = (
            input_buffer(runtime, self.rows, before=INPUT_OFFSET),
            np.uint64(INPUT_OFFSET),
            rows.buffer,
            factors.buffer,
            np.uint32(self.k),
            np.uint32(packed_k),
            None if self.order is None else runtime.buffer(self.order),
        )
        macros = {
            "INPUT_TYPE": TYPE_CODES[np.dtype(self.dtype)],
            "PREPARED_TYPE": self.prepared_type,
            "GATHER": int(self.order is not None),
            "GROUP_SHIFT": GROUP_SHIFT,
            "ALIGNED": 1,
        }
        if together:
            self.launch(
                "align_prepare", "align_prepare", macros, self.experts + self.tokens, ALIGN_ITEMS, align + prepare
            )
        else:
            self.launch("align", "align", {}, self.experts, ALIGN_ITEMS, align)
            self.launch("prepare", "prepare_rows", macros, self.tokens, 32, prepare)
        return [output.read() for output in outputs]

    def launch(self, file, name, macros, groups, items, arguments):
        kernel = self.runtime.programs.kernel(file, name, macros)
        kernel(self.runtime.queue, (groups * items,), (items,), *arguments)

    def check(self):
        """The results of one launch, which are those of two."""
        together, apart = self.run(True), self.run(False)
        for one, other in zip(together, apart, strict=True):
            assert_same_bits(one, other)
        assert together[3].any()
        return together


@each_device
@pytest.mark.parametrize("prepared_type", [FLOAT32_ROWS, FLOAT16_ROWS, PLANES])
class TestKernel:
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_to_the_last_bit(self, device, rng, sizes, dtype, prepared_type):
        Case(device, rng, sizes, dtype, prepared_type).check()

    @pytest.mark.parametrize("sizes", SIZES)
    def test_by_one_order_with_padding(self, device, rng, sizes, prepared_type):
        k = sizes[-1]
        order = np.full(k + 64, -1, np.int32)
        order[rng.permutation(k + 64)[:k]] = rng.permutation(k)
        Case(device, rng, sizes, DTYPES["float32"], prepared_type, order).check()

    def test_a_nan_stays_in_its_row(self, device, rng, prepared_type):
        case = Case(device, rng, (9, 2, 4, 8, 96), DTYPES["float32"], prepared_type)
        clean = case.check()
        case.rows[4, 70], case.rows[7, 5] = np.nan, np.inf
        bad = case.check()
        others = [0, 1, 2, 3, 5, 6, 8]
        assert_same_bits(bad[3][others], clean[3][others])
        assert (bad[3][[4, 7]] != clean[3][[4, 7]]).any(axis=1).all()

    def test_no_expert_is_chosen(self, device, rng, prepared_type):
        case = Case(device, rng, (9, 2, 4, 8, 96), DTYPES["float32"], prepared_type)
        case.ids[:] = -1
        assert case.check()[2].tolist() == [0]


def run_layer(backend, rng, dtype, tokens=9, top_k=2, **options):
    """``(output, labels)`` of a layer."""
    layer, ctx = Layer(rng, **options).on(backend, top_k), backend.new_context()
    x = backend.from_host(activations(rng, tokens, layer.hidden_size, dtype))
    logits = backend.from_host(rng.standard_normal((tokens, layer.num_experts)).astype(np.float32))
    with ctx.profile() as events:
        result = backend.to_host(layer(ctx, x, logits))
    return result, [label for label, _ in events]


def assert_one_launch_less(backend, seed, monkeypatch, dtype, **options):
    """Rows are prepared where pairs are aligned, and are what they are if prepared by themselves."""
    result, labels = run_layer(backend, np.random.default_rng(seed), dtype, **options)
    with monkeypatch.context() as patch:
        patch.setattr(moe, "ordered_alike", lambda store: False)
        expected, apart = run_layer(backend, np.random.default_rng(seed), dtype, **options)
    assert_same_bits(result, expected)
    assert np.isfinite(result).all()
    assert "align, gate_up: prepare_rows" in labels
    assert "gate_up: prepare_rows" not in labels
    assert [part for label in labels for part in label.split(", ")] == apart


class TestLayer:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("options", [{}, {"shared": 64, "gate": True}, {"weigh_input": True, "shared": 64}])
    def test_experts_of_one_order(self, device_alone, monkeypatch, dtype, options):
        assert_one_launch_less(device_alone, 1, monkeypatch, dtype, g_idx="common", **options)

    def test_orders_of_their_own(self, device_alone, rng):
        """Which order a row is in says its expert: rows are prepared when these are known."""
        _, labels = run_layer(device_alone, rng, np.float32, g_idx="per_expert")
        assert labels.index("align") < labels.index("gate_up: prepare_rows")

    def test_slices(self, device_alone, monkeypatch):
        monkeypatch.setattr(moe, "SLICE_BYTES", 20_000)
        assert_one_launch_less(device_alone, 2, monkeypatch, np.float32, tokens=20, g_idx="common", shared=160)

    @pytest.mark.parametrize("dtype", [DTYPES["float32"], DTYPES["bfloat16"]], ids=["float32", "bfloat16"])
    @pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
    def test_emulated_tensor_cores(self, monkeypatch, dtype):
        """Which read float16: other rows are prepared, in K's own order, too."""
        backend = emulating(CONFIGURATIONS["direct"])
        for options in ({}, {"g_idx": "common"}, {"weigh_input": True}):
            assert_one_launch_less(backend, 3, monkeypatch, dtype, **options)
        _, labels = run_layer(backend, np.random.default_rng(3), np.float16)
        assert labels == ["route", "align", "gate_up", "down: prepare_rows", "down", "combine"]
