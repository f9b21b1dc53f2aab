"""Dense products by tensor cores on devices without them, with their PTX emulated; see ``test_opencl_mma.py``."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import OPENCL_PLACES

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import EMULATING, emulating_backend  # noqa: E402

from marlin_cy.opencl.checks import builds, dense  # noqa: E402
from marlin_cy.opencl.decoder.dense_mma import FLOAT8, INT8, DenseKernel, dense_kernel  # noqa: E402
from marlin_cy.opencl.tiers.configuration import BFLOAT16, FLOAT16, FLOAT32  # noqa: E402

needs_emulation = pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
# Two parts of a row leave out 2^-17 or 2^-23 of each value; a sum of float32 numbers has some 2^-23.
BOUNDS = {BFLOAT16: 2.0**-16, FLOAT16: 2.0**-20, FLOAT8: 2.0**-20, INT8: 2.0**-20}


@needs_emulation
@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (DenseKernel(FLOAT32, BFLOAT16, 1, 2, 2), [(19, 70, 200), (5, 1, 8), (16, 64, 128)]),
        (DenseKernel(FLOAT16, FLOAT16, 2, 1, 1), [(35, 33, 72), (1, 31, 64)]),
        (DenseKernel(FLOAT32, FLOAT16, 1, 1, 4), [(17, 40, 1096), (6, 32, 16)]),
        (DenseKernel(FLOAT32, FLOAT8, 2, 1, 1), [(35, 33, 72), (1, 31, 64)]),
        (DenseKernel(FLOAT32, FLOAT8, 1, 1, 4, 128), [(17, 40, 1096), (6, 32, 16)]),
        (DenseKernel(FLOAT16, FLOAT8, 1, 2, 2, 64), [(19, 70, 200)]),
        (DenseKernel(FLOAT32, INT8, 1, 2, 2), [(19, 70, 200)]),
    ],
    ids=str,
)
def test_against_float64(kernel, sizes):
    """Sizes around those of a tile; what lies beside rows and weights is NaN, and nothing else is written."""
    backend = emulating_backend()
    for number, size in enumerate(sizes):
        actual, expected = dense.results(backend, kernel, *size, np.random.default_rng(number))
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < BOUNDS[kernel.weight_type], size


def test_sizes_by_product(monkeypatch):
    """Large tiles where there are enough of them; local memory that every device of the tier has."""
    runtime = SimpleNamespace(verdicts=None, capabilities=SimpleNamespace(compute_units=132, compute_capability=(8, 6)))
    backend = SimpleNamespace(tier=SimpleNamespace(name="mma"), runtime=runtime)
    assert dense_kernel(backend, FLOAT32, BFLOAT16, 64, 151936, 1).row_strips == 4
    assert dense_kernel(backend, FLOAT32, BFLOAT16, 1024, 4096, 1).row_strips == 4
    assert dense_kernel(backend, FLOAT32, BFLOAT16, 1024, 128, 1).k_waves == 8
    assert dense_kernel(backend, FLOAT32, FLOAT16, 512, 512, 16).row_strips == 4
    assert dense_kernel(backend, FLOAT32, FLOAT32, 1024, 4096, 1) is None
    assert dense_kernel(backend, FLOAT32, FLOAT8, 1024, 4096, 1, 128).scale_k == 128
    assert dense_kernel(backend, FLOAT32, FLOAT8, 1024, 4096, 1, 96) is None  # a stage would have several scales
    backend.tier.name = "portable"
    assert dense_kernel(backend, FLOAT32, BFLOAT16, 1024, 4096, 1) is None
    monkeypatch.setattr(builds, "local_limit", lambda device: 0)
    backend.tier.name = "mma"
    assert dense_kernel(backend, FLOAT32, BFLOAT16, 1024, 4096, 1) is None


@needs_emulation
def test_check_finds_errors(monkeypatch):
    """A check whose kernel computes something else says so."""
    kernel, backend = DenseKernel(FLOAT16, FLOAT16, 2, 1, 1), emulating_backend()
    assert dense.reason_wrong(backend, kernel) is None
    results = dense.results

    def wrong(*arguments):
        actual, expected = results(*arguments)
        return actual + 0.05 * (np.arange(actual.size).reshape(actual.shape) == 7) * np.abs(expected).sum(), expected

    monkeypatch.setattr(dense, "results", wrong)
    assert "its results are wrong" in dense.reason_wrong(backend, kernel)
