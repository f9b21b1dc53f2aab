"""``prepare_rows`` alone: activations of gate and up, as rows of every type."""

import numpy as np
import pytest
from asserts import assert_close, unit_roundoff
from problems import DTYPES, as_given

from marlin_cy.activations import ACTIVATIONS

cl = pytest.importorskip("pyopencl")

from opencl_devices import each_device, runtime_of  # noqa: E402

from marlin_cy.opencl.buffers import TYPE_CODES, as_bytes  # noqa: E402
from marlin_cy.opencl.gemm import prepare  # noqa: E402
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES  # noqa: E402

FLOAT32 = unit_roundoff(np.float32)
# An activation's relative error grows with that of what an exponential (or erfc) is taken of: so many roundings of it.
ARGUMENT = {
    "silu": lambda gate: 0 * gate,
    "gelu": lambda gate: 2 * gate**2,
    "gelu_tanh": lambda gate: 6 * np.abs(1.6 * gate * (1 + 0.045 * gate**2)),
    "swigluoai": lambda gate: 2 * np.abs(1.702 * gate),
    "silu_clamp10": lambda gate: 0 * gate,
    "relu2": lambda gate: 0 * gate,
}
ROUNDINGS = 48  # of erfc (16 ulps), of exp, of the rest
SMALL = 2.0**-118  # where exp overflows (beyond gates of 20 at the least: see above), what is left is 0
GROUP_SHIFT = 5


def parts_of(activation):
    """How many numbers of a row make a value: a gate and an up, or one."""
    return 2 if activation is not None and ACTIVATIONS[activation].gated else 1


def prepared(device, rows, activation, prepared_type=FLOAT32_ROWS, order=None):
    """The kernel's result for rows of any dtype, as float64."""
    runtime = runtime_of(device)
    count, k = len(rows), rows.shape[1] // parts_of(activation)
    macros = {
        "INPUT_TYPE": TYPE_CODES[rows.dtype],
        "PREPARED_TYPE": prepared_type,
        "ACTIVATION": prepare.activation_number(activation),
        "GATHER": int(order is not None),
        "GROUP_SHIFT": GROUP_SHIFT,
    }
    kernel = runtime.programs.kernel("prepare", "prepare_rows", macros)
    groups = -(-k // (1 << GROUP_SHIFT))
    row_bytes = {FLOAT32_ROWS: 4 * k, FLOAT16_ROWS: 2 * k, PLANES: 2 * k + 16 * -(-groups // 2)}[prepared_type]
    output, factor = np.zeros((count, row_bytes), np.uint8), np.zeros((count, 1), np.float32)
    buffers = [runtime.buffer(as_bytes(np.ascontiguousarray(array))) for array in (rows, output, factor)]
    kernel(
        runtime.queue,
        (32 * count,),
        (32,),
        buffers[0],
        np.uint64(0),
        *buffers[1:],
        np.uint32(k),
        np.uint32(k),
        None if order is None else runtime.buffer(order),
    )
    for array, buffer in zip((output, factor), buffers[1:], strict=True):
        cl.enqueue_copy(runtime.queue, array, buffer)
    if prepared_type == FLOAT32_ROWS:
        return output.view(np.float32).astype(np.float64)
    if prepared_type == FLOAT16_ROWS:
        return output.view(np.float16).astype(np.float64) * factor
    eights = output[:, : 2 * k].view(np.int8).reshape(count, k // 8, 2, 2, 4)[..., [0, 2, 1, 3]].astype(np.float64)
    values = (256 * eights[:, :, 0] + eights[:, :, 1]).reshape(count, k)
    scales = output[:, 2 * k :].view(np.float32).reshape(count, -1)[:, : 2 * groups : 2]
    return values * np.repeat(scales.astype(np.float64), 1 << GROUP_SHIFT, axis=1)[:, :k]


def expected(rows, activation):
    """``(result, bound)`` in float64, whose own ``1 + erf`` and ``1 + tanh`` cancel."""
    parts = np.split(as_given(rows).astype(np.float64), parts_of(activation), axis=1)
    gate, up = parts[0], parts[-1]
    result = ACTIVATIONS[activation].reference(gate, up)
    off = (ROUNDINGS + ARGUMENT[activation](np.clip(gate, -20, 20))) * FLOAT32 * np.abs(result)
    return result, off + 4 * unit_roundoff(np.float64) * np.abs(gate * up) + SMALL * (1 + np.abs(up))


@each_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestActivations:
    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("ordered", [False, True])
    def test_matches_the_reference(self, device, rng, activation, dtype, ordered):
        """In steps of eight elements and of one; gates from far below 0 to far above it."""
        k = 96
        shape = 40, parts_of(activation) * k
        rows = (rng.standard_normal(shape) * rng.choice([0.01, 1, 5, 30], shape)).astype(DTYPES[dtype])
        result, bound = expected(rows, activation)
        order = rng.permutation(k).astype(np.int32) if ordered else None
        if ordered:
            result, bound = result[:, order], bound[:, order]
        assert_close(prepared(device, rows, activation, order=order), result, bound)

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("prepared_type", [FLOAT16_ROWS, PLANES])
    def test_rows_of_other_kinds(self, device, rng, activation, prepared_type):
        rows = rng.standard_normal((7, parts_of(activation) * 96)).astype(np.float32)
        result, bound = expected(rows, activation)
        largest = np.abs(result).max(axis=1, keepdims=True)
        step = 2.0**-11 * np.abs(result) + 2.0**-37 * largest if prepared_type == FLOAT16_ROWS else largest / 65000
        assert_close(prepared(device, rows, activation, prepared_type), result, bound + step)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("at", [3, 96 + 3])
    @pytest.mark.parametrize("ordered", [False, True])
    def test_a_nan_stays_one(self, device, rng, activation, at, ordered):
        rows = rng.standard_normal((3, parts_of(activation) * 96)).astype(np.float32)
        order = np.arange(96, dtype=np.int32) if ordered else None
        clean = prepared(device, rows, activation, order=order)
        rows[1, at % rows.shape[1]] = np.nan
        result = prepared(device, rows, activation, order=order)
        assert np.isnan(result[1, 3])
        result[1, 3] = clean[1, 3]
        np.testing.assert_array_equal(result, clean)

    def test_extreme_gates(self, device, activation):
        """The result is the gate for large gates, up to the activation's limit, and 0 for gates far below 0."""
        if activation == "relu2":
            pytest.skip("it has no gate")
        gates = np.array([0, 20, 90, 3e4, 1e18, 3e38, -90, -3e4, -1e18, -3e38, -0.0, 1e-30, -1e-30], np.float32)
        gate = np.resize(gates, 32).astype(np.float32)
        result = prepared(device, np.concatenate([gate, np.ones(32, np.float32)])[None], activation)[0]
        limit, factor = {"swigluoai": (7, 2), "silu_clamp10": (10, 1)}.get(activation, (np.inf, 1))
        kept = {"swigluoai": 1 / (1 + np.exp(-1.702 * 7)), "silu_clamp10": 1 / (1 + np.exp(-10))}.get(activation, 1)
        right = np.where(gate >= 20, np.minimum(gate.astype(np.float64), limit) * kept, 0) * factor
        assert_close(result, right, 1e-6 * right + 1e-29)


@pytest.mark.sampled(1)
@each_device
@pytest.mark.parametrize("prepared_type", [FLOAT32_ROWS, FLOAT16_ROWS, PLANES])
def test_without_activation(device, rng, prepared_type):
    rows = rng.standard_normal((5, 96)).astype(np.float32)
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    step = {FLOAT32_ROWS: 0 * rows, FLOAT16_ROWS: 2.0**-11 * np.abs(rows) + 2.0**-37 * largest, PLANES: largest / 65000}
    assert_close(prepared(device, rows, None, prepared_type), rows, step[prepared_type])
