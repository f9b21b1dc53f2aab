"""Attention by tensor cores on devices without them, with its PTX emulated; see ``test_opencl_mma.py``."""

import warnings

import numpy as np
import pytest
from conftest import OPENCL_PLACES

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import EMULATING, emulating_backend  # noqa: E402

from marlin_cy.opencl.checks import attention  # noqa: E402
from marlin_cy.opencl.decoder import attention_mma  # noqa: E402
from marlin_cy.opencl.decoder.attention import Shape  # noqa: E402
from marlin_cy.opencl.decoder.attention_mma import TilesKernel  # noqa: E402
from marlin_cy.opencl.tiers.configuration import BFLOAT16, FLOAT16, FLOAT32  # noqa: E402

needs_emulation = pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
BOUNDS = {FLOAT16: 1e-3, BFLOAT16: 8e-3}
KERNELS = {
    "two strips, queries in local memory": (TilesKernel(64, 32, 4, 2, 2, 32, True, FLOAT16), FLOAT32),
    "heads that do not divide the queries": (TilesKernel(32, 48, 5, 2, 1, 16, False, FLOAT16), FLOAT16),
    "bfloat16": (TilesKernel(64, 64, 16, 2, 1, 48, False, BFLOAT16), BFLOAT16),
}


@needs_emulation
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_reference(name):
    """All settings; the rows of a tile and a half, and few rows; positions that are not written are NaN."""
    kernel, output_type = KERNELS[name]
    backend = emulating_backend()
    for number, settings in enumerate((*attention.SETTINGS, {"window": 5}, {"sinks": True}, {"gated": True})):
        actual, expected = attention.results(backend, kernel, output_type, np.random.default_rng(number), **settings)
        error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert (error < 4 * BOUNDS[kernel.cache_type]).all(), settings


def test_candidates():
    """Which shapes the kernel takes, and that local memory and the operands' sizes allow their builds."""
    for shape in (Shape(32, 4, 128, 128), Shape(64, 8, 64, 64), Shape(16, 2, 256, 256), Shape(96, 8, 128, 128)):
        for kernel in attention_mma.candidates(shape, FLOAT16):
            assert shape.num_heads // shape.num_kv_heads % kernel.heads == 0
            assert kernel.rows >= 1
            assert kernel.waves % 2 == 0
            assert kernel.local_bytes <= 99 << 10
    for shape, cache_type in ((Shape(32, 4, 128, 128), FLOAT32), (Shape(128, 1, 576, 512), FLOAT16)):
        assert attention_mma.candidates(shape, cache_type) == []
    assert attention_mma.candidates(Shape(4, 4, 80, 80), FLOAT16) == []


@needs_emulation
def test_wrong_kernels_are_left_out(monkeypatch):
    """The next build is taken with a warning, and None if there is no other."""
    backend = emulating_backend()
    shape, reasons = Shape(8, 2, 64, 64), {}
    found = attention_mma.candidates(shape, FLOAT16)
    reasons[found[0]] = "its results are wrong"
    monkeypatch.setattr(attention, "reason_wrong", lambda backend, kernel, output_type: reasons.get(kernel))
    with pytest.warns(RuntimeWarning, match="attention by tensor cores.* is not used: its results are wrong"):
        assert attention_mma.tiles_kernel(shape, FLOAT16, FLOAT32, backend) == found[1]
    reasons |= dict.fromkeys(attention_mma.candidates(Shape(12, 2, 64, 64), FLOAT16), "wrong")
    with pytest.warns(RuntimeWarning, match="is not used: wrong"):
        assert attention_mma.tiles_kernel(Shape(12, 2, 64, 64), FLOAT16, FLOAT32, backend) is None


def test_other_tiers_have_no_kernel(device_alone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_mma.tiles_kernel(Shape(8, 2, 64, 64), FLOAT16, FLOAT32, device_alone) is None
