"""GPTQ tensors to canonical form: the meaning of the bits, and refusals."""

import numpy as np
import pytest
from checkpoint_files import random_weight

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.weights.canonical import unpack_words
from marlin_cy.weights.sizes import g_idx_per_expert

K, N, GROUP = 64, 16, 32


def arguments(**changes):
    """Valid keyword arguments of ``to_canonical``, changed."""
    valid = {
        "qweight": np.zeros((K // 8, N), np.int32),
        "scales": np.ones((K // GROUP, N), np.float16),
        "qzeros": np.zeros((K // GROUP, N // 8), np.int32),
        "bits": 4,
        "group_size": GROUP,
        "k": K,
        "n": N,
    }
    return valid | changes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("checkpoint_format", gptq.ZERO_OFFSETS)
@pytest.mark.parametrize(
    ("k", "n", "group_size"), [(32, 8, 32), (96, 40, 64), (256, 24, 128), (160, 8, 128), (64, 16, 256), (96, 8, -1)]
)
def test_round_trip(seed, checkpoint_format, k, n, group_size):
    print(f"seed {seed}")
    size = k if group_size == -1 else group_size
    q, scale, zero = random_weight(np.random.default_rng(seed), k, n, size, checkpoint_format=checkpoint_format)
    tensors = gptq.pack_gptq(q, scale, zero, checkpoint_format=checkpoint_format)
    weight = gptq.to_canonical(*tensors, bits=4, group_size=group_size, k=k, n=n, checkpoint_format=checkpoint_format)
    np.testing.assert_array_equal(unpack_words(weight.words), q)
    np.testing.assert_array_equal(weight.scale, scale)
    np.testing.assert_array_equal(weight.zero, zero)
    assert (weight.k, weight.n, weight.group_size, weight.g_idx) == (k, n, size, None)
    assert (weight.words.dtype, weight.scale.dtype, weight.zero.dtype) == (np.uint32, np.float16, np.uint8)


def test_bits_by_hand():
    """One word of each tensor, written out: nibbles from the low end, along K and along N."""
    qweight, qzeros = np.zeros((4, 8), np.uint32), np.zeros((1, 1), np.uint32)
    qweight[1, 3] = 0x76543210
    qzeros[0, 0] = 0xF7654321
    kwargs = {"bits": 4, "group_size": 32, "k": 32, "n": 8}
    weight = gptq.to_canonical(qweight, np.ones((1, 8), np.float16), qzeros, **kwargs)
    assert unpack_words(weight.words)[8:16, 3].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # Stored minus one: a stored 15 is 16 and is not wrapped to 0.
    assert weight.zero[0].tolist() == [2, 3, 4, 5, 6, 7, 8, 16]
    weight = gptq.to_canonical(qweight, np.ones((1, 8), np.float16), qzeros, checkpoint_format="gptq_v2", **kwargs)
    assert weight.zero[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 15]


@pytest.mark.parametrize(("checkpoint_format", "word"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888)])
def test_symmetric_words(checkpoint_format, word):
    qzeros = np.full((K // GROUP, N // 8), word, np.uint32)
    weight = gptq.to_canonical(**arguments(qzeros=qzeros, checkpoint_format=checkpoint_format))
    assert (weight.zero == 8).all()
    _, _, packed = gptq.pack_gptq(
        unpack_words(weight.words), weight.scale, weight.zero, checkpoint_format=checkpoint_format
    )
    assert (packed.view(np.uint32) == word).all()


def test_nothing_but_zeros_is_copied():
    given = arguments()
    weight = gptq.to_canonical(**given)
    assert np.shares_memory(weight.words, given["qweight"])
    assert np.shares_memory(weight.scale, given["scales"])


def test_other_layouts_are_made_contiguous():
    rng = np.random.default_rng(0)
    q, scale, zero = random_weight(rng, K, N, GROUP)
    tensors = [np.asfortranarray(tensor) for tensor in gptq.pack_gptq(q, scale, zero)]
    for tensor in tensors:
        tensor.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + tensors[0].tobytes(), np.int32, offset=1).reshape(K // 8, N)
    for qweight in (tensors[0], unaligned):
        weight = gptq.to_canonical(qweight, *tensors[1:], bits=4, group_size=GROUP, k=K, n=N)
        np.testing.assert_array_equal(unpack_words(weight.words), q)
        np.testing.assert_array_equal(weight.zero, zero)
        assert weight.words.flags.c_contiguous
        assert weight.words.flags.aligned


def test_g_idx():
    ordinary = np.arange(K, dtype=np.int32) // GROUP
    assert gptq.to_canonical(**arguments(g_idx=ordinary)).g_idx is None
    shuffled = ordinary[::-1].copy()
    np.testing.assert_array_equal(gptq.to_canonical(**arguments(g_idx=shuffled)).g_idx, shuffled)
    assert gptq.to_canonical(**arguments(g_idx=shuffled.view(np.uint32))).g_idx.dtype == np.int32


def test_g_idx_per_expert():
    one = np.zeros(K, np.int32)
    assert g_idx_per_expert(None, 3, K) == [None] * 3
    assert all(entry is one for entry in g_idx_per_expert(one, 3, K))
    assert g_idx_per_expert([one, None, one], 3, K) == [one, None, one]
    assert [len(entry) for entry in g_idx_per_expert(np.zeros((3, K), np.int32), 3, K)] == [K] * 3
    for wrong in ([one] * 2, np.zeros((2, K), np.int32), np.zeros(K - 1, np.int32), np.zeros((3, 1, K), np.int32), []):
        with pytest.raises(ValueError, match=r"g_idx: got .*expected .*(expert|64)"):
            g_idx_per_expert(wrong, 3, K)


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


VALID = arguments()
G_IDX = np.arange(K, dtype=np.int32) // GROUP


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"bits": 3}, UnsupportedError, "bits: got 3, supported: 4, 8"),
        ({"bits": "4"}, TypeError, "bits: got '4', expected an int"),
        ({"group_size": 0}, ValueError, "group_size: got 0, expected a positive number"),
        ({"group_size": -2}, ValueError, "group_size: got -2"),
        ({"group_size": 16}, UnsupportedError, "group_size: got 16, supported are 32, 64, multiples of 128"),
        ({"group_size": 192}, UnsupportedError, "group_size: got 192"),
        ({"group_size": 32.0}, TypeError, "group_size: got 32.0, expected an int"),
        ({"group_size": 128}, ValueError, r"scales: got shape \(2, 16\), expected float16 \(1, 16\)"),
        ({"k": 72}, ValueError, "k: got 72, expected a positive multiple of 32"),
        ({"k": 0}, ValueError, "k: got 0"),
        ({"n": 12}, ValueError, "n: got 12, expected a positive multiple of 8"),
        ({"n": -8}, ValueError, "n: got -8"),
        ({"n": 24}, ValueError, r"qweight: got shape \(8, 16\), expected int32 \(8, 24\)"),
        ({"checkpoint_format": "marlin"}, ValueError, "checkpoint_format: got 'marlin', expected one of gptq, gptq_v2"),
        ({"checkpoint_format": ["gptq"]}, ValueError, "checkpoint_format: got"),
        (
            {"qweight": VALID["qweight"].astype(np.int64)},
            TypeError,
            r"qweight: got dtype int64, expected int32 or uint32 \(8, 16\)",
        ),
        ({"qweight": VALID["qweight"].astype(">i4")}, TypeError, "qweight: got big-endian dtype >i4, expected native"),
        ({"qweight": VALID["qweight"].astype(np.float32)}, TypeError, "qweight: got dtype float32"),
        ({"qweight": VALID["qweight"].T}, ValueError, r"qweight: got shape \(16, 8\)"),
        ({"qweight": None}, TypeError, "qweight: got dtype object"),
        ({"qweight": [[1], [2, 3]]}, TypeError, "qweight: got list"),
        ({"scales": VALID["scales"].astype(np.float64)}, TypeError, "scales: got dtype float64, expected float16"),
        ({"scales": VALID["scales"].astype(">f2")}, TypeError, "scales: got big-endian"),
        ({"scales": VALID["scales"][:1]}, ValueError, r"scales: got shape \(1, 16\)"),
        ({"scales": with_value(VALID["scales"], (1, 5), np.nan)}, ValueError, r"scales: got nan at \[1, 5\]"),
        ({"scales": with_value(VALID["scales"], (0, 7), np.inf)}, ValueError, r"scales: got inf at \[0, 7\]"),
        ({"scales": with_value(VALID["scales"], (1, 0), -np.inf)}, ValueError, r"scales: got -inf at \[1, 0\]"),
        ({"qzeros": VALID["qzeros"].astype(np.uint8)}, TypeError, "qzeros: got dtype uint8"),
        ({"qzeros": VALID["qzeros"][:, :1]}, ValueError, r"qzeros: got shape \(2, 1\), expected int32 \(2, 2\)"),
        ({"g_idx": G_IDX.astype(np.int64)}, TypeError, "g_idx: got dtype int64"),
        ({"g_idx": G_IDX[:-1]}, ValueError, r"g_idx: got shape \(63,\), expected int32 \(64,\)"),
        ({"g_idx": with_value(G_IDX, 17, 2)}, IndexError, "g_idx: got 2 at row 17, expected 0 to 1"),
        ({"g_idx": with_value(G_IDX, 3, -1)}, IndexError, "g_idx: got -1 at row 3, expected 0 to 1"),
        ({"bits": 2, "label": " of expert 3"}, UnsupportedError, "bits of expert 3: got 2"),
        ({"bits": 8}, ValueError, r"qweight: got shape \(8, 16\), expected int32 \(16, 16\)"),
        ({"qzeros": VALID["qzeros"][0], "label": " of expert 3"}, ValueError, r"qzeros of expert 3: got shape \(2,\)"),
    ],
)
def test_refused(changes, exception, message):
    with pytest.raises(exception, match=message):
        gptq.to_canonical(**arguments(**changes))


@pytest.mark.parametrize(
    ("q", "zero", "checkpoint_format", "message"),
    [
        (16, 8, "gptq", "q: got 16 to 16, gptq holds 0 to 15"),
        (0, 0, "gptq", "zero: got 0 to 0, gptq holds 1 to 16"),
        (0, 16, "gptq_v2", "zero: got 16 to 16, gptq_v2 holds 0 to 15"),
    ],
)
def test_packer_refuses_what_the_format_cannot_hold(q, zero, checkpoint_format, message):
    with pytest.raises(ValueError, match=message):
        gptq.pack_gptq(np.full((32, 8), q), np.ones((1, 8)), np.full((1, 8), zero), checkpoint_format=checkpoint_format)
