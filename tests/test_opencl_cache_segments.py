"""A cache in segments on OpenCL devices: growth, copies between segments, and memory that runs out."""

from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from asserts import relative_error  # noqa: E402

from marlin_cy.decoder.cache import CacheFull  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.errors import DeviceMemoryError  # noqa: E402
from marlin_cy.opencl.decoder import cache  # noqa: E402
from marlin_cy.opencl.decoder.cache import KvPool, Segmentation  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
TEXT = np.frombuffer((FOLDER / "validation.txt").read_bytes()[:100], np.uint8).astype(np.int32)
CACHE_TOKENS = 16 * 28  # eight segments of four pages; the last one would begin behind the end
BOUND = 2e-3  # as in test_opencl_decoder.py

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


@pytest.fixture(scope="module")
def expected():
    """The CPU's logits after each token of TEXT."""
    return load_model(FOLDER, cache_dtype="float32", context_length=256, num_threads=2).forward(TEXT, all_logits=True)


@pytest.fixture
def model(device_alone, monkeypatch):
    """A model whose cache would be one segment but for its size, which counts as large."""
    monkeypatch.setattr(cache, "WHOLE_SHARE", 1 << 60)
    return load_model(FOLDER, device_alone, cache_dtype="float32", context_length=256, cache_tokens=CACHE_TOKENS)


def pools_of(model):
    return [pool for pool in model._program._pools if isinstance(pool, KvPool)]


def provided(model):
    """Pages that have memory, the same number in all layers."""
    (number,) = {pool.provided_pages for pool in pools_of(model)}
    return number


@pytest.mark.sweep
def test_growth(model, expected):
    """Steps before and after a new segment; a fork whose page is copied into another segment; full to the last page."""
    assert model.free_tokens == CACHE_TOKENS
    assert model.cache_bytes == sum(pool.nbytes for pool in pools_of(model))
    assert provided(model) == 4
    first, second = model.new_sequence(), model.new_sequence()
    logits = model.forward(TEXT[:60], sequence=first, all_logits=True)
    assert relative_error(logits, expected[:60]) < BOUND
    assert provided(model) == 4
    fork = model.fork(first)
    assert relative_error(model.forward(TEXT[60:62], sequence=fork), expected[61]) < BOUND
    assert provided(model) == 8
    assert relative_error(model.forward(TEXT, sequence=second), expected[99]) < BOUND
    found = model.forward_batch([(first, TEXT[60:99]), (fork, TEXT[62:99])])
    assert relative_error(found[0], expected[98]) < BOUND
    assert relative_error(found[1], expected[98]) < BOUND
    others = [model.new_sequence() for _ in range(2)]
    pages = model.free_tokens // 16
    for sequence, count in zip(others, (pages // 2, pages - pages // 2), strict=True):
        model.forward(np.resize(TEXT, 16 * count), sequence=sequence)
    assert provided(model) == 28
    assert model.free_tokens == 0
    with pytest.raises(CacheFull, match=r"cache: got 3 pages of 16 tokens to add, 0 are free; free sequences, or load"):
        model.forward(np.resize(TEXT, 60), sequence=second)
    model.free(others[0])
    assert relative_error(model.forward(TEXT[99:100], sequence=first), expected[99]) < BOUND


@pytest.mark.sweep
def test_no_memory_while_growing(model, expected, monkeypatch):
    """Who asked is told, and is as before; others go on; with memory there is growth again. No layer grows alone."""
    asks, other = model.new_sequence(), model.new_sequence()
    model.forward(TEXT[:20], sequence=asks)
    model.forward(TEXT[:10], sequence=other)
    zeroed = cache.zeroed_buffers
    left = [1]  # segments that there is memory for: one layer's

    def few(runtime, sizes, what):
        left[0] -= 1
        if left[0] < 0:
            raise DeviceMemoryError("cache: 640 bytes do not fit")
        return zeroed(runtime, sizes, what)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "zeroed_buffers", few)
        message = "got 2 pages of 16 tokens to add, 1 are free, and there is no memory for others .*do not fit.*; free"
        with pytest.raises(CacheFull, match=message):
            model.forward(TEXT[20:60], sequence=asks)
        assert asks.length == 20
        assert provided(model) == 4
        assert relative_error(model.forward(TEXT[10:30], sequence=other), expected[29]) < BOUND
        assert relative_error(model.forward(TEXT[20:30], sequence=asks), expected[29]) < BOUND
    assert relative_error(model.forward(TEXT[30:60], sequence=asks), expected[59]) < BOUND
    assert provided(model) == 8


@pytest.mark.parametrize(
    ("num_pages", "largest", "expected"),
    [(100, 1 << 30, (1, 100)), (1000, 1 << 30, (8, 128)), (1024, 1 << 30, (8, 128)), (1025, 1 << 30, (8, 256))],
)
def test_segmentation(num_pages, largest, expected):
    """A small cache is whole, unless a buffer would be too large; segments are powers of two."""
    device = SimpleNamespace(global_memory=32 * 100 * 96)
    runtime = SimpleNamespace(capabilities=device, max_alloc_bytes=largest)
    assert Segmentation.of(num_pages, [64, 32], runtime) == expected
    assert Segmentation.of(num_pages, [], runtime) == (1, num_pages)
    runtime.max_alloc_bytes = 64 * 99
    assert Segmentation.of(100, [64, 32], runtime) == (8, 16)
