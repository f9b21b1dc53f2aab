"""The compiled transpositions against what they mean, in NumPy."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_cy.formats import marlin
from marlin_cy.weights._nibbles import transpose, words_of_awq, words_of_marlin
from marlin_cy.weights.int4 import pack_words

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
