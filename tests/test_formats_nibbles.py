"""The compiled transpositions, compared with NumPy versions."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_cy.formats import marlin
from marlin_cy.weights._nibbles import group_values_of_tiles, transpose, words_of_awq, words_of_marlin, words_of_tiles
from marlin_cy.weights.canonical import pack_words

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SIDES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


def random_words(seed, rows, columns):
    return np.random.default_rng(seed).integers(0, 2**32, (rows, columns), np.uint32)


def unpack_awq(words):
    """``q``, ``[K, N]``."""
    q = np.empty((words.shape[0], 8 * words.shape[1]), np.uint8)
    for i, column in enumerate(AWQ_ORDER):
        q[:, column::8] = words >> np.uint32(4 * i) & 15
    return q


def unpack_marlin(words):
    """``q``, ``[K, N]``, word by word as the module's drawing says."""
    tiles, width = words.shape
    q = np.empty((16 * tiles, width // 2), np.uint8)
    for t in range(tiles):
        for w in range(width):
            block, (lane, tile) = w // 128, divmod(w % 128, 4)
            row, column = 2 * (lane % 4), lane // 4
            for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)]):
                q[16 * t + row + down, 64 * block + 16 * tile + column + right] = words[t, w] >> np.uint32(4 * i) & 15
    return q


@given(SEEDS, SIDES, SIDES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_transpose(dtype, seed, rows, columns):
    array = random_words(seed, rows, columns).astype(dtype)
    result = transpose(array)
    np.testing.assert_array_equal(result, array.T)
    assert result.dtype == dtype
    assert result.flags.c_contiguous


@given(SEEDS, st.integers(1, 5), SIDES)
def test_awq(seed, blocks, width):
    words = random_words(seed, 8 * blocks, width)
    np.testing.assert_array_equal(words_of_awq(words), pack_words(unpack_awq(words)))


@given(SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_marlin(seed, tiles, blocks):
    words = random_words(seed, tiles, 128 * blocks)
    q = unpack_marlin(words)
    np.testing.assert_array_equal(words_of_marlin(words), pack_words(q))
    packed, _ = marlin.pack_marlin(q, np.ones((1, 64 * blocks)))
    np.testing.assert_array_equal(packed.view(np.uint32), words)


def unpack_tiles(tiles, header_bytes):
    """``q``, ``[packed K, N]``: byte ``4*c + t`` of a block is column ``c``, rows ``t`` and ``t + 4``."""
    body = tiles[:, header_bytes:].reshape(len(tiles), -1, 16, 4)
    halves = np.stack([body & 15, body >> 4])  # [half, tile, block, column, t]
    return halves.transpose(2, 0, 4, 1, 3).reshape(8 * body.shape[1], 16 * len(tiles))


@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 15))
def test_tiles(seed, tiles, blocks, headers, missing):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (tiles, 64 * (headers + blocks)), np.uint8)
    k, n = 8 * blocks, 16 * tiles - missing
    q = unpack_tiles(packed, 64 * headers)[:, :n]
    np.testing.assert_array_equal(words_of_tiles(packed, 64 * headers, k, n), pack_words(q))
    positions = rng.integers(0, k, k, np.int32)
    np.testing.assert_array_equal(words_of_tiles(packed, 64 * headers, k, n, positions), pack_words(q[positions]))


@given(SEEDS, st.integers(1, 3), st.integers(1, 2), st.integers(1, 6), st.integers(0, 15))
def test_tiles_of_bytes(seed, tiles, headers, blocks, missing):
    """Codes of 8 bits: a block is rows 0 to 3 of 16 columns, then rows 4 to 7."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (tiles, 64 * (headers + 2 * blocks)), np.uint8)
    k, n = 8 * blocks, 16 * tiles - missing
    lanes = packed[:, 64 * headers :].reshape(tiles, 2 * blocks, 16, 4)
    q = lanes.transpose(1, 3, 0, 2).reshape(k, 16 * tiles)[:, :n]
    words = words_of_tiles(packed, 64 * headers, k, n, bits=8)
    np.testing.assert_array_equal(words, pack_words(q, 8))
    positions = rng.integers(0, k, k, np.int32)
    words = words_of_tiles(packed, 64 * headers, k, n, positions, bits=8)
    np.testing.assert_array_equal(words, pack_words(q[positions], 8))


@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.integers(0, 15), st.sampled_from([(0, 2), (32, 1)]))
def test_group_values(seed, tiles, groups, missing, place):
    rng = np.random.default_rng(seed)
    (offset, size), n = place, 16 * tiles - missing
    packed = rng.integers(0, 256, (tiles, 48 * groups + 16), np.uint8)
    rows = rng.permutation(groups + 1)[:groups].astype(np.int32)
    stored = packed[:, : 48 * groups].reshape(tiles, groups, 48)[:, :, offset : offset + 16 * size]
    expected = np.zeros((groups + 1, n * size), np.uint8)
    expected[rows] = stored.swapaxes(0, 1).reshape(groups, -1)[:, : n * size]
    places = 48 * np.arange(groups) + offset
    np.testing.assert_array_equal(group_values_of_tiles(packed, places, size, rows, groups + 1, n), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 48], 2, [0, 1], 2, 16), "tiles: got 1 of 64 bytes, expected 16 columns and 80 bytes"),
        (([0], 2, [0], 1, 17), "tiles: got 1 of 64 bytes"),
        (([40], 2, [0], 1, 16), "tiles: got 1 of 64 bytes"),
        (([-1], 2, [0], 1, 16), "tiles: got 1 of 64 bytes"),
        (([0], 2, [0, 0], 1, 16), "places: got 1, expected 2, one for each of rows"),
        (([0], 2, [1], 1, 16), "rows: got 1 to 1, expected 0 to 0"),
        (([0], 2, [-1], 1, 16), "rows: got -1 to -1"),
    ],
)
def test_group_values_out_of_bounds(arguments, message):
    places, size, rows, groups, n = arguments
    places, rows = np.array(places, np.int64), np.array(rows, np.int32)
    with pytest.raises(ValueError, match=message):
        group_values_of_tiles(np.zeros((1, 64), np.uint8), places, size, rows, groups, n)


@pytest.mark.parametrize("function", [transpose, words_of_awq, words_of_marlin])
def test_nothing_and_read_only_arrays(function):
    for shape in ((0, 128), (16, 0)):
        assert function(np.empty(shape, np.uint32)).size == 0
    words = random_words(0, 16, 128)
    expected = function(words)
    words.flags.writeable = False
    np.testing.assert_array_equal(function(words), expected)
    with pytest.raises(ValueError, match="contiguous"):
        function(np.asfortranarray(words))


def test_from_several_threads():
    """The GIL is not held: every thread has its own result."""
    words = [random_words(seed, 512, 256) for seed in range(4)]
    results = [None] * 4

    def work(i):
        results[i] = words_of_awq(words[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, given_words in zip(results, words, strict=True):
        np.testing.assert_array_equal(result, pack_words(unpack_awq(given_words)))
