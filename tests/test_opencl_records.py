"""Every code type and scale record on OpenCL: the layout, the packer, and products of each tier with float64."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from asserts import GuardedBuffer, assert_close, product_bound, relative_error
from conftest import OPENCL_PLACES, USABLE_PLACES, backend_called
from problems import CPU_KINDS, TWO_LEVEL_KINDS, WEIGHT_KINDS, activations, add_in_parts, random_problem

import marlin_cy
from marlin_cy.errors import UnsupportedError

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import each_device, runtime_of, unless_the_driver_is_wrong  # noqa: E402
from test_opencl_store import assert_packed, builder_for, store_of  # noqa: E402

from marlin_cy.opencl.layout import expert_layout, pack_expert, unpack_expert  # noqa: E402
from marlin_cy.opencl.tiers import mma, wave_tiled  # noqa: E402
from marlin_cy.opencl.tiers.configuration import Problem  # noqa: E402
from marlin_cy.weights.order import group_order  # noqa: E402

KINDS = {kind: options for kind, options in (CPU_KINDS | TWO_LEVEL_KINDS).items() if kind not in WEIGHT_KINDS}
# Kinds that together have every branch of records.cl, and the groups that Q4_K and Q6_K have.
FEW_KINDS = {"uint4-two_level_min": 32, "uint8-two_level": 16, "uint8-float32": 128, "uint4-float16_min": 64}
SUBGROUP_PLACES = [place for place in USABLE_PLACES.values() if place.tier == "subgroup"]

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


def groups_of(kind):
    """Group sizes of a kind: 16 needs codes of 8 bits."""
    return (16, 32, 128) if kind.startswith("uint8") else (32, 64, 128)


CASES = [(kind, group) for kind in KINDS for group in groups_of(kind)]
FEW_CASES = list(FEW_KINDS.items())
SWEPT = [pytest.param(*case, marks=() if case in FEW_CASES[:3] else pytest.mark.sweep) for case in CASES]


def problem_of(rng, kind, group, experts=3, k=512, n=40, **options):
    return random_problem(rng, experts, k, n, group, **KINDS[kind], **options)


class TestLayout:
    def test_codes_of_8_bits_by_hand(self):
        """Lane 4 g + t of step s: bytes 0 and 2 of two words for column g, 1 and 3 for column g + 8."""
        q = np.zeros((128, 32), np.uint8)
        q[64 + 32 + 8 * 3 + 4 + 2, 16 + 8 + 5] = 201  # block 1, half 1, step 1, t 3, the third row; strip 1, g 5, upper
        layout = expert_layout(128, 32, 128, "uint8")
        parts = {"scale": np.zeros((1, 32), np.float16), "zero": np.full((1, 32), 256, np.uint16)}
        expert = pack_expert(q, parts, group_order(None, 128, 128), layout)
        expected = np.zeros_like(expert)
        expected[256 * 3 + 128 + 4 * (4 * 5 + 3) + 2 * 1 + 1] = 201 << 8
        expected[layout.zero_offset : layout.zero_offset + 16] = 256 << 16 | 256
        np.testing.assert_array_equal(expert, expected)

    def test_groups_of_16_by_hand(self):
        """Lane 4 g + t of step s: rows 4 t on of a group."""
        q = np.zeros((64, 16), np.uint8)
        q[32 + 16 + 4 * 2 + 1, 3] = 77  # half 1, step 1, t 2, the second row
        layout = expert_layout(64, 16, 16, "uint8", "float32")
        parts = {"scale": np.zeros((4, 16), np.float32), "zero": np.zeros((4, 16), np.uint16)}
        parts["scale"][3, 8 + 5] = 1
        expert = pack_expert(q, parts, group_order(None, 64, 16), layout)
        expected = np.zeros_like(expert)
        expected[128 + 4 * (4 * 3 + 2) + 2] = 77 << 16
        expected[layout.scale_offset + (3 * 8 + 5) * 2 + 1] = 0x3F800000
        np.testing.assert_array_equal(expert, expected)

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize(("kind", "group"), CASES)
    def test_unpacks_to_what_was_packed(self, rng, kind, group):
        problem = problem_of(rng, kind, group, 1, 256, 8)
        order, layout = group_order(None, 256, group), expert_layout(256, 8, group, *kind.split("-"))
        given = {name: getattr(problem, name)[0] for name in layout.places}
        q, parts = unpack_expert(pack_expert(problem.q[0], given, order, layout), order, layout, 256)
        np.testing.assert_array_equal(q, problem.q[0])
        for name, part in parts.items():
            np.testing.assert_array_equal(part, given[name].repeat(256 // len(given[name]), axis=0))

    @pytest.mark.parametrize(
        ("kind", "group", "bits"),
        [("uint8-float16", 128, 8.25), ("uint4-two_level_min", 32, 4.625), ("uint8-two_level", 16, 8.5625)],
    )
    def test_bits_of_a_weight(self, kind, group, bits):
        """As many as in GGUF's blocks, where Q6_K has codes of 8 bits."""
        layout = expert_layout(2048, 1024, group, *kind.split("-"))
        assert 32 * layout.expert_words == bits * 2048 * 1024


@pytest.mark.parametrize(
    ("kind", "group", "expected"),
    [
        ("uint8-float16", 128, 40),
        ("uint8-two_level", 16, 52),
        ("uint4-two_level_min", 32, 32),
        ("uint8-float32", 16, 80),
    ],
)
def test_stages_of_tensor_cores(kind, group, expected):
    """A lane's words, and 4 bytes for each value of a record, for the zero points, and for a block scale."""
    codes, scales = kind.split("-")
    problem = Problem(64, 8, 8, 2048, 512, group, None, codes, scales)
    assert mma.bytes_of_lane(problem) == expected
    first, *others = mma.mma_configurations(
        problem._replace(device=SimpleNamespace(compute_units=132, compute_capability=(9, 0)))
    )
    sizes = dict(first.macros)
    assert first.local_bytes == sizes["DEPTH"] * (
        128 * first.rows + 32 * sizes["WAVES"] * sizes["STRIPS_PER_WAVE"] * expected
    )
    assert others


@each_device
class TestPacking:
    @pytest.mark.sampled(5)
    @pytest.mark.parametrize(("kind", "group"), CASES)
    def test_equals_plain_numpy(self, device, rng, kind, group):
        """Scales are stored as they are, except float16 and bfloat16 scales without minima."""
        runtime = runtime_of(device)
        problem = problem_of(rng, kind, group, 2, 256, 24)
        store = store_of(runtime, problem)
        assert (store.codes, store.scales) == (problem.codes, KINDS[kind]["scales"])
        assert store.scales == "float16" or store.weight_factor == 1
        assert_packed(runtime, store, problem)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("g_idx", ["common", "per_expert", "unequal"])
    @pytest.mark.parametrize("kind", ["uint8-float32", "uint4-float32_min"])
    def test_orders_of_k(self, device, rng, kind, g_idx):
        runtime = runtime_of(device)
        problem = problem_of(rng, kind, 32, 3, 288, g_idx=g_idx)
        assert_packed(runtime, store_of(runtime, problem), problem)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("kind", FEW_KINDS)
    def test_columns_in_parts(self, device, rng, kind):
        """Half strips, in any order, from several threads."""
        runtime = runtime_of(device)
        problem = problem_of(rng, kind, FEW_KINDS[kind], 2, 256, 120)
        builder = builder_for(runtime, problem)
        add_in_parts(builder, problem, rng)
        assert_packed(runtime, builder.finish(), problem)

    @pytest.mark.parametrize("part", ["scale", "minimum"])
    @pytest.mark.parametrize("value", [2.0**118, -np.inf, np.nan])
    def test_scales_beyond_what_kernels_multiply(self, device, rng, part, value):
        problem = problem_of(rng, "uint4-float32_min", 32, 1, 32, 16)
        getattr(problem, part)[0, 0, 3] = value
        with pytest.raises(UnsupportedError, match=rf"weight.{part}: got .*, expected magnitudes below 2\*\*118"):
            builder_for(runtime_of(device), problem).add(0, 0, problem.canonical(0))


def check(backend, rng, problem):
    """Routed rows, listed rows, and a view."""
    ctx, x = backend.new_context(), activations(rng, 13, problem.k)
    with unless_the_driver_is_wrong(backend.device):
        stack = problem.stack(backend)
        ids = rng.integers(0, problem.num_experts, (13, 1))
        routing = map(backend.from_host, marlin_cy.moe_align_block_size(ids, 8, problem.num_experts))
        routed, listed = (GuardedBuffer(backend, (14, problem.n), np.float32) for _ in range(2))
        stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, routed.buffer, 13, 8, 1)
        dispatches = [(expert, row, row, 1) for row, expert in enumerate(ids[:, 0])]
        stack.gemm_phase_batched(ctx, backend.from_host(x), dispatches, listed.buffer, problem.k)
        for out in (routed, listed):
            result = out.result()
            out.assert_untouched([13])
            for row, expert in enumerate(ids[:, 0]):
                one = x[row, None]
                expected = one.astype(np.float64) @ problem.dense(expert)
                assert_close(result[row, None], expected, product_bound(backend, one, problem.terms(expert)))


class TestProducts:
    @pytest.mark.sampled(1)
    @pytest.mark.parametrize(("kind", "group"), SWEPT)
    def test_every_kind(self, opencl_backend, rng, kind, group):
        check(opencl_backend, rng, problem_of(rng, kind, group))

    @pytest.mark.sweep
    @pytest.mark.parametrize("g_idx", ["common", "per_expert"])
    @pytest.mark.parametrize("kind", ["uint8-float16", "uint8-float32_min"])
    @pytest.mark.parametrize("group", [16, 64])
    def test_orders_of_k(self, opencl_backend, rng, kind, group, g_idx):
        check(opencl_backend, rng, problem_of(rng, kind, group, g_idx=g_idx))

    @pytest.mark.sweep
    @pytest.mark.parametrize(("kind", "group"), FEW_CASES)
    @pytest.mark.parametrize(
        "configuration",
        [wave_tiled.PORTABLE_TABLE.few[-1], wave_tiled.tiled(16, column_waves=2, row_waves=2, wave_strips=1)],
        ids=["few rows", "tiled"],
    )
    def test_configurations_of_gpus(self, rng, kind, group, configuration):
        place = next(place for place in USABLE_PLACES.values() if place.tier == "portable")
        backend = backend_called(place.label)
        tier = dataclasses.replace(backend.tier, configurations=lambda problem: [configuration])
        check(backend._unchecked(tier), rng, problem_of(rng, kind, group))

    @pytest.mark.sweep
    @pytest.mark.skipif(not SUBGROUP_PLACES, reason="no device here has sub-groups and cl_khr_fp16")
    @pytest.mark.parametrize(("kind", "group"), FEW_CASES)
    def test_without_the_integer_dot_product(self, rng, kind, group):
        backend = copy.copy(backend_called(SUBGROUP_PLACES[0].label))
        lacking = dataclasses.replace(backend.runtime.capabilities, integer_dot_product=False)
        backend.runtime = dataclasses.replace(backend.runtime, capabilities=lacking)
        check(backend, rng, problem_of(rng, kind, group))

    @pytest.mark.parametrize("exponent", [-90, 100])
    def test_float32_scales_are_exact(self, opencl_backend, rng, exponent):
        """Rows with one value: a product is one weight, of 24 bits, without the rounding of float16."""
        problem = problem_of(rng, "uint8-float32", 128, 1, 256, 16)
        problem.scale[:] = problem.scale.astype(np.float64) * 2.0**exponent * (1 + 2.0**-20)
        x, w = np.eye(256, dtype=np.float32)[::8], problem.dense(0)[::8]
        out = GuardedBuffer(opencl_backend, (32, 16), np.float32)
        stack = problem.stack(opencl_backend)
        stack.gemm_phase_batched(
            opencl_backend.new_context(), opencl_backend.from_host(x), [(0, 0, 0, 32)], out.buffer, 256
        )
        np.testing.assert_allclose(out.result(), w, rtol=2.0**-14)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("kind", ["uint8-float16", "iq4_nl-float16"])
    def test_every_code(self, opencl_backend, rng, kind):
        """Each code at every place of a block: rows with one value and zeros."""
        problem = problem_of(rng, kind, 32, 1, 64, 256)
        bits = 8 if kind.startswith("uint8") else 4
        problem.q[0] = (np.arange(256) + 5 * np.arange(64)[:, None]) % 2**bits
        x, w = np.eye(64, dtype=np.float32), problem.dense(0)
        out = GuardedBuffer(opencl_backend, (64, 256), np.float32)
        problem.stack(opencl_backend).gemm_phase_batched(
            opencl_backend.new_context(), opencl_backend.from_host(x), [(0, 0, 0, 64)], out.buffer, 64
        )
        assert_close(out.result(), w, product_bound(opencl_backend, x, w))


@pytest.mark.sweep
def test_layer(device_alone, cpu_backend, rng):
    """A whole layer whose products differ in kind, as on the CPU."""
    gate_up = problem_of(rng, "uint4-two_level_min", 32, 4, 256, 512)
    down = problem_of(rng, "uint8-two_level", 16, 4, 256, 256)
    for problem in (gate_up, down):  # so that activations stay near 1
        problem.block_scale[:] = 3e-3 * np.sign(problem.block_scale)
    gate_up.block_minimum[:] = 3e-4
    x = rng.standard_normal((5, 256)).astype(np.float32)
    ids = np.argsort(rng.random((5, 4)), axis=1)[:, :2].astype(np.int32)
    weights = rng.random((5, 2)).astype(np.float32)
    found = []
    for backend in (cpu_backend, device_alone):
        layer = marlin_cy.MoeLayer(gate_up.stack(backend), down.stack(backend), top_k=2)
        rows = x if backend is cpu_backend else backend.from_host(x)
        found.append(np.asarray(backend.to_host(layer.forward_routed(backend.new_context(), rows, ids, weights))))
    assert relative_error(found[1], found[0]) < 2e-3
