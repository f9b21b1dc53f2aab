"""The tensor-core kernels on devices without tensor cores, with their PTX emulated (``kernels/ptx.cl``).

Intel's CPU runtime has what that takes, sub-groups of 32 with shuffles; the README says how to run it. On an
NVIDIA GPU the contract tests run the kernels as they are.
"""

import dataclasses

import numpy as np
import pytest
from asserts import GuardedBuffer, assert_close, product_bound
from conftest import OPENCL_PLACES
from problems import activations, random_problem

import marlin_cy
from marlin_cy import reference

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import EMULATING, emulating_backend  # noqa: E402

from marlin_cy.opencl import selfcheck  # noqa: E402
from marlin_cy.opencl.tiers import mma  # noqa: E402

CONFIGURATIONS = {
    "direct": mma.direct(8, 1, 2, 2),
    "direct, K split": dataclasses.replace(mma.direct(8, 2, 2, 1), splits=2),
    "direct, 16 rows": mma.direct(16, 2, 3, 1),  # work-items that do not divide the tile
    "tiled": mma.tiled(16, 1, 2, 2),
}
KINDS = {
    "zero points": {"group_size": 32},
    "symmetric": {"group_size": 128, "checkpoint_format": "gptq_v2", "sym": True},
    "e2m1": {"group_size": 32, "codes": "e2m1", "scales": "bfloat16"},
    "8 bits": {"group_size": 128, "codes": "uint8"},
    "8 bits, groups of 16": {"group_size": 16, "codes": "uint8", "scales": "float32"},
}
TWO_LEVEL_KINDS = {
    "Q4_K": {"group_size": 32, "scales": "two_level_min"},
    "Q6_K": {"group_size": 16, "codes": "uint8", "scales": "two_level"},
}


def emulating(configuration):
    """A backend whose products use one configuration of the tier."""

    def configurations(problem):
        group_32 = ("GROUP_32", int(problem.group_rows == 32))
        return [dataclasses.replace(configuration, macros=(*configuration.macros, group_32))]

    return emulating_backend(configurations=configurations)


@pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
class TestEmulated:
    def test_routed(self, rng, configuration, kind):
        """A block without an expert, and rows that no id names."""
        backend = emulating(configuration)
        problem = random_problem(rng, 4, 352, 40, **kind, bias=True)
        stack, ctx = problem.stack(backend), backend.new_context()
        x = activations(rng, 19, 352, np.float16)
        ids = rng.integers(0, 4, (19, 2))
        sorted_ids, experts, past = marlin_cy.moe_align_block_size(ids, 12, 4)
        experts[1] = -1
        expected = np.zeros((40, 40))
        reference.gemm_phase_vllm(
            x.astype(np.float64), problem.dense_all(), sorted_ids, experts, past[0], expected, 19, 12, 2
        )
        bound = np.zeros((40, 40))
        for slot in range(past[0]):
            pair, expert = sorted_ids[slot], experts[slot // 12]
            if expert >= 0 and pair < 38:
                bound[pair] = product_bound(backend, x[pair // 2][None], problem.dense(expert))[0]
                bound[pair] += 2.0**-23 * np.abs(problem.bias[expert])
                expected[pair] += problem.bias[expert]
        routing = [backend.from_host(array) for array in (sorted_ids, experts, past)]
        for _ in range(2):  # counters are as they were
            out = GuardedBuffer(backend, (40, 40), np.float32)
            stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, out.buffer, 19, 12, 2)
            result = out.result().copy()
            named = bound.any(axis=1)
            assert_close(result[named], expected[named], bound[named])
            out.assert_untouched(np.flatnonzero(~named))

    def test_view_with_bias_in_another_order(self, rng, configuration, kind):
        backend = emulating(configuration)
        problem = random_problem(rng, 2, 256, 56, **kind, g_idx="common")
        bias = rng.standard_normal(64).astype(np.float32)
        view, ctx = problem.stack(backend).make_expert_linear(24, 64, bias), backend.new_context()
        x = activations(rng, 21, 256)
        out = GuardedBuffer(backend, (21, 64), np.float32)
        view.forward(ctx, backend.from_host(x), out.buffer, 21)
        w = np.concatenate(problem.dense_all(), axis=1)[:, 24:88]
        assert_close(out.result(), x.astype(np.float64) @ w + bias, 2 * product_bound(backend, x, w) + 2.0**-20)


@pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
@pytest.mark.parametrize("configuration", ["direct", "tiled"])
@pytest.mark.parametrize("kind", TWO_LEVEL_KINDS)
def test_two_levels(rng, kind, configuration):
    backend = emulating(CONFIGURATIONS[configuration])
    problem = random_problem(rng, 2, 512, 40, **TWO_LEVEL_KINDS[kind])
    x, out = activations(rng, 9, 512, np.float16), GuardedBuffer(backend, (9, 40), np.float32)
    problem.stack(backend).gemm_phase_batched(
        backend.new_context(), backend.from_host(x), [(1, 0, 0, 9)], out.buffer, 512
    )
    expected = x.astype(np.float64) @ problem.dense(1)
    assert_close(out.result(), expected, product_bound(backend, x, problem.terms(1)))


@pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
def test_check_at_first_use():
    """Every kernel of the tier is checked, not only the one that small products use."""
    backend = emulating(None)
    backend._tier = dataclasses.replace(backend._tier, checked=(mma.direct(8, 1, 2, 1), mma.tiled(16, 1, 2, 2)))
    assert selfcheck.relative_error(backend) < 1e-3
