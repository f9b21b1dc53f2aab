"""The measurement of read bandwidth."""

import pytest

from marlin_cy.cpu.measure._bandwidth import read_bandwidth

MIB = 1 << 20


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_is_a_plausible_figure(num_threads):
    assert 1e8 < read_bandwidth(num_threads, size_bytes=64 * MIB, repeats=3) < 1e13


@pytest.mark.parametrize("size_bytes", [8 * MIB, 8 * MIB + 1, 9 * MIB + 12345])
def test_any_size_from_8_mib_a_thread_on(size_bytes):
    assert read_bandwidth(1, size_bytes=size_bytes, repeats=1) > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_threads": 0}, "num_threads: got 0"),
        ({"num_threads": -1}, "num_threads: got -1"),
        ({"num_threads": 2, "size_bytes": 16 * MIB - 1}, "size_bytes: got 16777215"),
        ({"num_threads": 1, "repeats": 0}, "repeats: got 0"),
    ],
)
def test_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        read_bandwidth(**arguments)
