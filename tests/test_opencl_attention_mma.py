"""Attention by tensor cores on devices without them, with its PTX emulated; see ``test_opencl_mma.py``."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import OPENCL_PLACES

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
if not OPENCL_PLACES:
    pytest.skip("no OpenCL device", allow_module_level=True)

from opencl_devices import EMULATING, emulating_backend  # noqa: E402

from marlin_cy.opencl.checks import attention  # noqa: E402
from marlin_cy.opencl.checks.attention import SETTINGS, Setting  # noqa: E402
from marlin_cy.opencl.decoder.attention import Attend, Kernels, Shape  # noqa: E402
from marlin_cy.opencl.decoder.attention_mma import (  # noqa: E402
    MOST_SPLITS,
    RowsKernel,
    TilesKernel,
    chosen,
    rows_kernels,
    tiles_kernels,
)
from marlin_cy.opencl.tiers.configuration import BFLOAT16, FLOAT16, FLOAT32  # noqa: E402

needs_emulation = pytest.mark.skipif(not EMULATING, reason="no device here has sub-groups of 32 with shuffles")
BOUNDS = {FLOAT16: 1e-3, BFLOAT16: 8e-3}
SETTINGS = (*SETTINGS, Setting(window=5), Setting(sinks=True, splits=4), Setting(gated=True, splits=9))
KERNELS = {
    "tiles of two strips, queries in local memory": (TilesKernel(64, 32, 4, 2, FLOAT16, 2, 32, True), FLOAT32),
    "tiles of heads that do not divide them, segments": (
        TilesKernel(32, 48, 5, 2, FLOAT16, 1, 16, False, segments=8),
        FLOAT16,
    ),
    "split tiles, queries in local memory": (TilesKernel(64, 64, 4, 2, FLOAT16, 1, 32, True, split=True), FLOAT32),
    "split tiles of heads that do not divide them": (
        TilesKernel(32, 96, 5, 2, BFLOAT16, 1, 16, False, split=True),
        FLOAT16,
    ),
    "tiles, bfloat16": (TilesKernel(64, 64, 16, 2, BFLOAT16, 1, 48, False), BFLOAT16),
    "rows of five heads, segments": (RowsKernel(96, 64, 5, 2, FLOAT16, segments=8), FLOAT16),
    "rows of twelve heads, bfloat16": (RowsKernel(32, 128, 12, 2, BFLOAT16), FLOAT32),
}


@needs_emulation
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_reference(name):
    """Tiles that are full, and not; splits without positions; positions that are not written, which are NaN."""
    kernel, output_type = KERNELS[name]
    backend = emulating_backend()
    for number, setting in enumerate(SETTINGS):
        actual, expected = attention.results(backend, kernel, output_type, setting, np.random.default_rng(number))
        error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert (error < 4 * BOUNDS[kernel.cache_type]).all(), setting


def test_builds():
    """Which shapes the kernels take, and that their operands and local memory hold these."""
    for shape in (Shape(32, 4, 128, 128), Shape(64, 8, 64, 64), Shape(16, 2, 256, 256), Shape(96, 8, 128, 128)):
        for kernel in (*tiles_kernels(shape, FLOAT16), *rows_kernels(shape, BFLOAT16)):
            assert shape.num_heads // shape.num_kv_heads % kernel.heads == 0
            assert kernel.local_bytes <= 99 << 10
            if isinstance(kernel, TilesKernel):
                assert kernel.rows >= 1
                assert kernel.waves % 2 == 0
            else:
                # The factors of splits take the room of the waves' sums.
                assert kernel.heads <= 16
                assert 4 * kernel.heads * MOST_SPLITS <= kernel.local_bytes
    for shape, cache_type in (
        (Shape(32, 4, 128, 128), FLOAT32),
        (Shape(128, 1, 576, 512), FLOAT16),
        (Shape(4, 4, 80, 80), FLOAT16),
    ):
        assert tiles_kernels(shape, cache_type) == rows_kernels(shape, cache_type) == []


@needs_emulation
def test_wrong_kernels_are_left_out(monkeypatch):
    """The next build is taken with a warning, and None if there is no other."""
    backend, reasons = emulating_backend(), {}
    monkeypatch.setattr(attention, "reason_wrong", lambda backend, kernel, output_type: reasons.get(kernel))
    for builds in (tiles_kernels(Shape(8, 2, 64, 64), FLOAT16), rows_kernels(Shape(8, 2, 128, 128), FLOAT16)):
        reasons[builds[0]] = "its results are wrong"
        with pytest.warns(RuntimeWarning, match="attention by tensor cores.* is not used: its results are wrong"):
            assert chosen(builds, FLOAT32, backend) == builds[1]
    builds = tiles_kernels(Shape(12, 2, 64, 64), FLOAT16)
    reasons |= dict.fromkeys(builds, "wrong")
    with pytest.warns(RuntimeWarning, match="is not used: wrong"):
        assert chosen(builds, FLOAT32, backend) is None


def test_other_tiers_have_no_kernel(device_alone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(tiles_kernels(Shape(8, 2, 64, 64), FLOAT16), FLOAT32, device_alone) is None


@pytest.mark.parametrize(("rows", "strips"), [(16, 1), (512, 1), (1024, 2)])
def test_tiles_by_rows(rows, strips):
    """Larger tiles where there are enough of them for 132 compute units."""
    shape = Shape(32, 4, 128, 128)
    attend, kernels = Attend(shape, None, 1.0), Kernels(None, tiles_kernels(shape, FLOAT16))
    device = SimpleNamespace(compute_units=132, local_memory=48 << 10)
    kernel = attend.tiles_kernel(device, kernels, rows)
    assert kernel.wave_strips == strips
    assert attend.tile_rows(device, kernels, rows) == kernel.rows
    portable = Kernels(None, [])
    assert attend.tiles_kernel(device, portable, rows) is None
    assert attend.tile_rows(device, portable, rows) == shape.tile_rows(device)
