"""Launches that fuse aligning with routing or preparation, against separate launches of the same kernels."""

import dataclasses

import numpy as np
import pytest
from asserts import assert_same_bits
from conftest import OPENCL_PLACES
from layers import Layer
from problems import DTYPES, activations

cl = pytest.importorskip("pyopencl")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import DEVICES, each_device, runtime_of  # noqa: E402
from test_opencl_device import error  # noqa: E402
from test_opencl_mma import CONFIGURATIONS, EMULATING, emulating  # noqa: E402
from test_opencl_moe_kernels import GUARD, ROUTE_ITEMS, Output, input_buffer, route, route_call  # noqa: E402

from marlin_cy import Routing, reference  # noqa: E402
from marlin_cy.errors import DeviceError  # noqa: E402
from marlin_cy.opencl.arguments import arguments_of  # noqa: E402
from marlin_cy.opencl.buffers import TYPE_CODES  # noqa: E402
from marlin_cy.opencl.context import ARRIVAL_BITS, ARRIVED, MAX_ARRIVAL_LAUNCH  # noqa: E402
from marlin_cy.opencl.device import capabilities  # noqa: E402
from marlin_cy.opencl.layer import align  # noqa: E402
from marlin_cy.opencl.layer import forward as moe  # noqa: E402
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES  # noqa: E402

ALIGN_ITEMS = 256
GROUP_SHIFT = 5
INPUT_OFFSET = 8
PREPARED_TYPES = {"float32 rows": FLOAT32_ROWS, "float16 rows": FLOAT16_ROWS, "planes": PLANES}
SIZES = [  # tokens, experts a token, experts, slots of a block, elements of a row
    (1, 1, 1, 1, 32),
    (1, 8, 128, 8, 2048),
    (70, 2, 3, 16, 96),
    (5, 3, 300, 4, 2080),  # more turns than one, the last of a few work-items
    (300, 8, 8, 64, 32),
]

each_prepared_type = pytest.mark.parametrize("prepared_type", PREPARED_TYPES.values(), ids=PREPARED_TYPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Not the CPU runtimes of OpenCL 1.2, nor oclgrind.
each_ordering_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            device,
            id=device.platform.name.strip(),
            marks=pytest.mark.skipif(
                capabilities(device).device_atomics is None, reason="work-groups do not see what others wrote"
            ),
        )
        for device in DEVICES
    ],
)


def launch(runtime, file, name, macros, groups, items, arguments, options=()):
    kernel = runtime.programs.kernel(file, name, macros, options)
    kernel(runtime.queue, (groups * items,), (items,), *arguments)


class Aligned:
    """Output buffers for the routing arrays."""

    def __init__(self, runtime, pairs, experts, block_size, before=GUARD):
        capacity = pairs + experts * (block_size - 1)
        sizes = capacity, -(-capacity // block_size), 1
        self.block_size = block_size
        self.outputs = [Output(runtime, (size,), np.int32, before) for size in sizes]

    def read(self):
        """``(sorted_ids, expert_ids, past)``, cut off at past."""
        sorted_ids, expert_ids, past = (output.read() for output in self.outputs)
        return sorted_ids[: past[0]], expert_ids[: past[0] // self.block_size], past


class Preparation:
    """A call of ``prepare_rows``, with one order of K or none."""

    def __init__(self, runtime, rows, prepared_type, order=None):
        self.runtime, (self.tokens, k) = runtime, rows.shape
        packed_k = k if order is None else len(order)
        groups = -(-packed_k >> GROUP_SHIFT)
        sizes = {FLOAT32_ROWS: 4 * packed_k, FLOAT16_ROWS: 2 * packed_k, PLANES: 2 * packed_k + 16 * -(-groups // 2)}
        self.outputs = [
            Output(runtime, (self.tokens, sizes[prepared_type]), np.uint8, before=0),
            Output(runtime, (self.tokens,), np.float32, before=0),
        ]
        self.macros = {
            "INPUT_TYPE": TYPE_CODES[rows.dtype],
            "PREPARED_TYPE": prepared_type,
            "GATHER": int(order is not None),
            "GROUP_SHIFT": GROUP_SHIFT,
            "ALIGNED": 1,
        }
        self.arguments = (
            input_buffer(runtime, rows, before=INPUT_OFFSET),
            np.uint64(INPUT_OFFSET),
            *(output.buffer for output in self.outputs),
            np.uint32(k),
            np.uint32(packed_k),
            None if order is None else runtime.buffer(order),
        )

    def alone(self):
        """The result of ``prepare_rows`` alone; the outputs are then refilled for another kernel."""
        launch(self.runtime, "prepare", "prepare_rows", self.macros, self.tokens, 32, self.arguments)
        result = self.read()
        for output in self.outputs:
            output.refill()
        return result

    def read(self):
        return [output.read() for output in self.outputs]


def padded_order(rng, k):
    """An order of K with 64 places of padding."""
    order = np.full(k + 64, -1, np.int32)
    order[np.sort(rng.permutation(k + 64)[:k])] = rng.permutation(k)
    return order


def assert_same(results, expected):
    for result, right in zip(results, expected, strict=True):
        assert_same_bits(result, right)


def right_arrays(ids, block_size, experts):
    """The expected result of :meth:`Aligned.read`."""
    sorted_ids, expert_ids, past = reference.moe_align_block_size(ids, block_size, experts)
    return sorted_ids[: past[0]], expert_ids[: past[0] // block_size], past


@each_device
@each_prepared_type
class TestAlignPrepare:
    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("sizes", SIZES)
    @each_dtype
    def test_to_the_last_bit(self, device, rng, sizes, dtype, prepared_type):
        self.check(device, rng, sizes, activations(rng, sizes[0], sizes[-1], dtype), prepared_type)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_by_one_order_with_padding(self, device, rng, sizes, prepared_type):
        tokens, *_, k = sizes
        self.check(device, rng, sizes, activations(rng, tokens, k), prepared_type, padded_order(rng, k))

    @pytest.mark.sampled(1)
    def test_a_nan_stays_in_its_row(self, device, rng, prepared_type):
        sizes, rows = (9, 2, 4, 8, 96), activations(rng, 9, 96)
        clean = self.check(device, rng, sizes, rows, prepared_type)
        rows[4, 70], rows[7, 5] = np.nan, np.inf
        bad = self.check(device, rng, sizes, rows, prepared_type)
        assert (bad != clean).any(axis=1).tolist() == [False] * 4 + [True, False, False, True, False]

    @pytest.mark.sampled(1)
    def test_no_expert_is_chosen(self, device, rng, prepared_type):
        ids = np.full((9, 2), -1, np.int32)
        self.check(device, rng, (9, 2, 4, 8, 96), activations(rng, 9, 96), prepared_type, ids=ids)

    def check(self, device, rng, sizes, rows, prepared_type, order=None, ids=None):
        """One launch writes the same as two; returns the bytes of rows."""
        tokens, top_k, experts, block_size, _ = sizes
        runtime = runtime_of(device)
        if ids is None:
            ids = rng.integers(-1, experts, (tokens, top_k)).astype(np.int32)
        preparation, aligned = (
            Preparation(runtime, rows, prepared_type, order),
            Aligned(runtime, ids.size, experts, block_size),
        )
        expected = preparation.alone()
        arguments = (
            input_buffer(runtime, ids, before=5),
            np.uint64(5),
            np.uint32(ids.size),
            np.uint32(experts),
            np.uint32(block_size),
            *(argument for output in aligned.outputs for argument in (output.buffer, np.uint64(GUARD))),
            cl.LocalMemory(4 * experts),
            *preparation.arguments,
        )
        launch(runtime, "align_prepare", "align_prepare", preparation.macros, experts + tokens, ALIGN_ITEMS, arguments)
        assert_same(preparation.read(), expected)
        assert_same(aligned.read(), right_arrays(ids, block_size, experts))
        return expected[0]


class RouteAlign:
    """A call of ``route_align`` that can be repeated."""

    def __init__(self, runtime, logits, how, block_size, dtype="float32", preparation=None):
        pairs = len(logits) * how.top_k
        self.runtime, self.preparation = runtime, preparation
        macros, arguments, *self.routed = route_call(runtime, logits, how, dtype)
        self.aligned = Aligned(runtime, pairs, how.num_experts, block_size, before=0)
        self.arrived = runtime.buffer(np.zeros(1, np.uint32))
        program, options = align.arrival_program(capabilities(runtime.device))
        arguments = (
            *arguments,
            np.uint32(block_size),
            *(output.buffer for output in self.aligned.outputs),
            cl.LocalMemory(align.mark_bytes(pairs, how.num_experts)),
            self.arrived,
            np.uint32(0),
        )
        macros = {**macros, **program}
        if preparation is not None:
            macros, arguments = {**macros, **preparation.macros, "PREPARES": 1}, arguments + preparation.arguments
        self.kernel = runtime.programs.kernel("route_align", "route_align", macros, options)
        self.arguments = list(arguments)
        self.launch_base_at, self.launches = list(arguments_of("route_align", macros)).index("launch_base"), 0
        self.tokens = len(logits)

    def call(self):
        self.launches += 1
        self.arguments[self.launch_base_at] = np.uint32(self.launches << ARRIVAL_BITS)
        self.kernel(self.runtime.queue, (self.tokens * ROUTE_ITEMS,), (ROUTE_ITEMS,), *self.arguments)

    def run(self):
        """``[ids, weights, sorted_ids, expert_ids, past]``, written into refilled buffers."""
        for output in (*self.routed, *self.aligned.outputs):
            output.refill()
        self.call()
        arrived = np.empty(1, np.uint32)
        cl.enqueue_copy(self.runtime.queue, arrived, self.arrived)
        assert arrived == (self.launches << ARRIVAL_BITS) + self.tokens
        return [*(output.read() for output in self.routed), *self.aligned.read()]


@each_ordering_device
class TestRouteAlign:
    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("block_size", [1, 8, 48])
    @pytest.mark.parametrize("tokens", [1, 3, 64, 70])
    @pytest.mark.parametrize(
        ("experts", "top_k", "groups", "dtype"),
        [(1, 1, 1, "float32"), (7, 3, 1, "float16"), (128, 8, 8, "bfloat16"), (300, 4, 1, "float32")],
    )
    def test_to_the_last_bit(self, device, rng, tokens, experts, top_k, groups, dtype, block_size):
        how = Routing(experts, top_k, num_groups=groups, topk_groups=(groups + 1) // 2)
        self.check(device, rng.standard_normal((tokens, experts)), how, block_size, dtype)

    def test_experts_of_all_tokens_and_of_none(self, device, rng):
        logits = rng.standard_normal((60, 40))
        logits[:, [0, 17, 39]] += 100
        self.check(device, logits, Routing(40, 3), 16)

    def test_more_pairs_of_an_expert_than_work_items(self, device, rng):
        self.check(device, rng.standard_normal((500, 2)), Routing(2, 2), 64)

    def test_bad_logits(self, device, rng):
        logits = rng.standard_normal((9, 20))
        logits[4, 3], logits[8] = np.nan, -np.inf
        _, weights, *_ = self.check(device, logits, Routing(20, 3, scoring="sigmoid"), 4)
        assert np.isnan(weights).any(axis=1).tolist() == [False] * 4 + [True] + [False] * 3 + [True]

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("k", [32, 1120])  # fewer than a work-group takes at a time, and more
    @pytest.mark.parametrize(
        ("dtype", "prepared_type", "ordered"),
        [
            ("float32", FLOAT16_ROWS, False),
            ("bfloat16", FLOAT16_ROWS, True),
            ("float16", PLANES, True),
            ("bfloat16", FLOAT32_ROWS, False),
        ],
    )
    def test_rows_besides(self, device, rng, dtype, prepared_type, ordered, k):
        """Preparation and group-limited routing use the same local memory."""
        order = padded_order(rng, k) if ordered else None
        rows = activations(rng, 33, k, DTYPES[dtype])
        rows[3, 30], rows[32, 2] = np.nan, -np.inf
        how = Routing(64, 6, num_groups=8, topk_groups=3, group_score="top2_sum")
        preparation = Preparation(runtime_of(device), rows, prepared_type, order)
        expected = preparation.alone()
        self.check(device, rng.standard_normal((33, 64)), how, 8, "float32", preparation)
        assert_same(preparation.read(), expected)

    def test_again_and_again(self, device, rng):
        """The last work-group, whichever it is, sees the choices of all others."""
        runtime, how = runtime_of(device), Routing(64, 4)
        calls = [RouteAlign(runtime, rng.standard_normal((64, 64)), how, 8) for _ in range(4)]
        expected = [call.run() for call in calls]
        for number in range(200):
            assert_same(calls[number % 4].run(), expected[number % 4])

    def check(self, device, logits, how, block_size, dtype="float32", preparation=None):
        """One launch writes the same as two; returns the result."""
        runtime, logits = runtime_of(device), logits.astype(np.float32)
        call = RouteAlign(runtime, logits, how, block_size, dtype, preparation)
        ids, weights = route(runtime, logits, how, dtype)
        expected = ids, weights, *right_arrays(ids, block_size, how.num_experts)
        for _ in range(2):  # whatever the first launch leaves in the counter
            assert_same(call.run(), expected)
        return expected


def run_layer(backend, seed, dtype, *, routed=False, tokens=9, top_k=2, **options):
    """``(output, labels)`` of a random layer; with ``routed`` the caller chooses the experts."""
    rng = np.random.default_rng(seed)
    layer, ctx = Layer(rng, **options).on(backend, top_k), backend.new_context()
    x = backend.from_host(activations(rng, tokens, layer.hidden_size, dtype))
    logits = backend.from_host(rng.standard_normal((tokens, layer.num_experts)).astype(np.float32))
    chosen = layer.route(ctx, logits)
    with ctx.profile() as events:
        out = layer.forward_routed(ctx, x, *chosen) if routed else layer(ctx, x, logits)
    return backend.to_host(out), [label for label, _ in events]


def check_layer(backend, monkeypatch, first, dtype=np.float32, **options):
    """The first launches have these labels, and the output is that of separate launches."""
    result, labels = run_layer(backend, 1, dtype, **options)
    with monkeypatch.context() as patch:
        patch.setattr(moe, "aligns_as_it_routes", lambda *args: False)
        patch.setattr(align, "has_one_order", lambda store: False)
        expected, apart = run_layer(backend, 1, dtype, **options)
    assert_same_bits(result, expected)
    assert np.isfinite(result.astype(np.float32)).all()
    assert labels[: len(first)] == first
    assert sorted(part for label in labels for part in label.split(", ")) == sorted(apart)
    assert not any(", " in label for label in apart)


@pytest.fixture
def without_order(device_alone, monkeypatch):
    """A device without atomics of device scope: its work-groups do not see the writes of others."""
    plain = dataclasses.replace(device_alone.runtime.capabilities, features=frozenset(), compute_capability=None)
    monkeypatch.setattr(device_alone, "runtime", dataclasses.replace(device_alone.runtime, capabilities=plain))
    return device_alone


@pytest.fixture
def with_order(device_alone):
    if device_alone.runtime.capabilities.device_atomics is None:
        pytest.skip("work-groups do not see what others wrote")
    return device_alone


class TestLayer:
    @pytest.mark.sampled(1)
    @each_dtype
    @pytest.mark.parametrize("options", [{}, {"shared": 64, "gate": True}])
    def test_all_in_one_launch(self, with_order, monkeypatch, dtype, options):
        first = ["route, align, gate_up: prepare_rows", "gate_up"]
        check_layer(with_order, monkeypatch, first, dtype, g_idx="common", **options)

    @pytest.mark.sampled(1)
    @each_dtype
    @pytest.mark.parametrize("options", [{}, {"shared": 64, "gate": True}])
    def test_without_order(self, without_order, monkeypatch, dtype, options):
        first = ["route", "align, gate_up: prepare_rows", "gate_up"]
        check_layer(without_order, monkeypatch, first, dtype, g_idx="common", **options)

    def test_chosen_by_the_caller(self, device_alone, monkeypatch):
        first = ["align, gate_up: prepare_rows", "gate_up"]
        check_layer(device_alone, monkeypatch, first, g_idx="common", routed=True)

    @pytest.mark.sweep
    def test_weighed_rows_wait_for_their_weights(self, with_order, monkeypatch):
        first = ["route, align", "weigh_tokens", "gate_up: prepare_rows", "gate_up"]
        check_layer(with_order, monkeypatch, first, g_idx="common", weigh_input=True, shared=64)

    @pytest.mark.sweep
    def test_weighed_rows_without_order(self, without_order, monkeypatch):
        first = ["route", "weigh_tokens", "align, gate_up: prepare_rows", "gate_up"]
        check_layer(without_order, monkeypatch, first, g_idx="common", weigh_input=True, shared=64)

    @pytest.mark.sweep
    def test_orders_of_their_own(self, with_order, monkeypatch):
        """A row's order of K depends on its expert."""
        first = ["route, align", "gate_up: prepare_rows", "gate_up"]
        check_layer(with_order, monkeypatch, first, g_idx="per_expert")

    @pytest.mark.sweep
    def test_more_tokens_than_one_work_group_aligns(self, with_order, monkeypatch):
        """The largest number of tokens that one work-group has marks for, and one more."""
        experts = 200
        words = align.MAX_MARK_BYTES // 4 // experts
        most = 32 * (words - 1 + words % 2)  # of an odd number of words
        options = {"top_k": 1, "experts": experts, "hidden": 64, "inner": 32, "g_idx": "common"}
        check_layer(with_order, monkeypatch, ["route, align, gate_up: prepare_rows"], tokens=most, **options)
        check_layer(with_order, monkeypatch, ["route", "align, gate_up: prepare_rows"], tokens=most + 1, **options)

    @pytest.mark.sweep
    def test_slices(self, device_alone, monkeypatch):
        """All tokens are routed in one launch, and aligned slice by slice."""
        monkeypatch.setattr(moe, "SLICE_BYTES", 20_000)
        first = ["route", "align, gate_up: prepare_rows", "gate_up"]
        check_layer(device_alone, monkeypatch, first, tokens=20, g_idx="common", shared=160)

    @pytest.mark.sweep
    def test_little_local_memory(self, with_order, monkeypatch):
        little = dataclasses.replace(with_order.runtime.capabilities, local_memory=5200)
        monkeypatch.setattr(with_order, "runtime", dataclasses.replace(with_order.runtime, capabilities=little))
        check_layer(with_order, monkeypatch, ["route, align"], tokens=9)
        check_layer(with_order, monkeypatch, ["route", "align"], tokens=4000)

    @pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
    def test_emulated_tensor_cores(self, monkeypatch):
        """They read float16 directly; rows of other types are prepared, even in K's own order."""
        backend = emulating(CONFIGURATIONS["direct"])
        for dtype in (np.float32, DTYPES["bfloat16"]):
            check_layer(backend, monkeypatch, ["route, align, gate_up: prepare_rows", "gate_up"], dtype)
            check_layer(backend, monkeypatch, ["align, gate_up: prepare_rows", "gate_up"], dtype, routed=True)
        first = ["route, align", "gate_up", "down: prepare_rows", "down", "combine"]
        check_layer(backend, monkeypatch, first, np.float16)


class TestAfterAFailure:
    """A launch of ``route_align`` that fails midway leaves some work-groups counted as arrived."""

    TOKENS = 24

    def layer(self, backend):
        rng = np.random.default_rng(3)
        layer = Layer(rng, experts=7).on(backend, 2)
        inputs = [
            (activations(rng, self.TOKENS, layer.hidden_size), rng.standard_normal((self.TOKENS, 7))) for _ in range(3)
        ]
        inputs = [tuple(backend.from_host(np.float32(array)) for array in pair) for pair in inputs]
        return layer, inputs, [backend.to_host(layer(backend.new_context(), *pair)) for pair in inputs]

    def leave_arrivals(self, backend, ctx, count):
        """Count ``count`` work-groups, as a launch does whose other work-groups never run."""
        arrived = np.zeros(1, np.uint32)
        cl.enqueue_copy(ctx.queue, arrived, ctx.reserve(ARRIVED, 4))
        cl.enqueue_copy(ctx.queue, ctx.reserve(ARRIVED, 4), arrived + np.uint32(count))

    @pytest.mark.parametrize("count", [1, TOKENS // 2, TOKENS - 1])
    def test_later_calls_use_their_own_routing_arrays(self, with_order, count):
        """With a wrong counter a work-group that is not the last would align, and miss the choices of others."""
        layer, inputs, expected = self.layer(with_order)
        ctx = with_order.new_context()
        assert_same_bits(with_order.to_host(layer(ctx, *inputs[0])), expected[0])
        self.leave_arrivals(with_order, ctx, count)
        for pair, right in zip(inputs[1:], expected[1:], strict=True):
            assert_same_bits(with_order.to_host(layer(ctx, *pair)), right)

    def test_a_call_that_raises(self, with_order, monkeypatch):
        """The launch is enqueued, some work-groups arrive, and the driver reports a failure."""
        layer, inputs, expected = self.layer(with_order)
        ctx = with_order.new_context()
        enqueue = moe.enqueue_route_align

        def fails(*arguments):
            enqueue(*arguments)
            self.leave_arrivals(with_order, ctx, 5)
            raise error(cl.status_code.OUT_OF_RESOURCES)

        with monkeypatch.context() as patch:
            patch.setattr(moe, "enqueue_route_align", fails)
            with pytest.raises(DeviceError):
                layer(ctx, *inputs[0])
        for pair, right in zip(inputs[1:], expected[1:], strict=True):
            assert_same_bits(with_order.to_host(layer(ctx, *pair)), right)

    def test_more_launches_than_numbers(self, with_order):
        """After the last number of a launch, the counter starts again at zero."""
        layer, inputs, expected = self.layer(with_order)
        ctx = with_order.new_context()
        ctx._arrival_launch = MAX_ARRIVAL_LAUNCH - 1
        for pair, right in zip(inputs, expected, strict=True):
            assert_same_bits(with_order.to_host(layer(ctx, *pair)), right)
        assert ctx._arrival_launch == 2
