"""GGUF's types: codes, scales and minima of blocks, equal to the last bit to the values of the package gguf."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed")

import gguf  # noqa: E402
from gguf_files import BLOCK_TYPES as NAMES  # noqa: E402
from gguf_files import random_blocks, values_of  # noqa: E402

from marlin_cy import get_backend  # noqa: E402
from marlin_cy.checkpoints.gguf._blocks import BLOCK_KINDS, decode_blocks, pack_blocks  # noqa: E402
from marlin_cy.checkpoints.gguf.blocks import BLOCK_TYPES, StoredBlocks, one_level  # noqa: E402
from marlin_cy.checkpoints.gguf.source import rows_of  # noqa: E402
from marlin_cy.reference import dequantize_weight  # noqa: E402
from marlin_cy.weights.canonical import unpack_words  # noqa: E402
from marlin_cy.weights.code_types import code_type  # noqa: E402
from marlin_cy.weights.tile_layout import TileLayout  # noqa: E402


def decoded(kind, rows, k):
    row = BLOCK_TYPES[kind]
    return row.decode(rows, row.arrays(k, len(rows)))


def values_in_float32(weight):
    """Float32 ``[N, K]``, in the steps of the package gguf: products are rounded, then differences."""
    row, flat = code_type(weight.codes), one_level(weight)
    scale, zero, minimum = (
        None if part is None else np.repeat(part.astype(np.float32), flat.group_size, axis=0)
        for part in (flat.scale, flat.zero, flat.minimum)
    )
    values = row.decode_table[unpack_words(flat.words, row.bits)]
    if zero is not None:
        values = values - zero
    values = values * scale
    return (values if minimum is None else values - minimum).T


def values_in_float64(weight):
    """Float64 ``[N, K]``, by the reference."""
    return dequantize_weight(weight).T


def test_every_type_is_a_row():
    assert set(BLOCK_TYPES) == set(BLOCK_KINDS) == set(NAMES)
    for name, row in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (row.block, row.nbytes)


@pytest.mark.parametrize("n", [8, 16, 24, 40])
@pytest.mark.parametrize("kind", NAMES)
def test_values_are_those_of_the_package(kind, n):
    rng = np.random.default_rng(n)
    rows = random_blocks(rng, kind, (n, 512))
    weight = decoded(kind, rows, 512)
    assert (weight.k, weight.n, weight.codes, weight.scales) == (
        512,
        n,
        BLOCK_TYPES[kind].codes,
        BLOCK_TYPES[kind].scales,
    )
    # Also for codes of 0, whose sign gguf may give another way.
    np.testing.assert_array_equal(values_in_float32(weight), values_of(rows, kind))
    np.testing.assert_array_equal(BLOCK_TYPES[kind].values(rows), values_of(rows, kind))


@pytest.mark.parametrize("kind", NAMES)
def test_extreme_scales(kind):
    rng = np.random.default_rng(0)
    rows = random_blocks(rng, kind, (8, 256))
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    cut = rows.reshape(8, -1, block)
    if kind == "MXFP4":
        cut[..., 0] = np.resize([0, 1, 2, 127, 240], cut.shape[:2])  # gguf's own values overflow above
    else:
        place = 208 if kind == "Q6_K" else 0
        cut[..., place : place + 2] = np.resize(
            np.array([0, -0.0, 6e-8, -6e-8, 1.0, -1.0, 65504, -65504], np.float16), cut.shape[:2]
        )[..., None].view(np.uint8)
    np.testing.assert_array_equal(values_in_float32(decoded(kind, rows, 256)), values_of(rows, kind))
    np.testing.assert_array_equal(BLOCK_TYPES[kind].values(rows), values_of(rows, kind))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", NAMES)
def test_a_scale_that_is_not_finite(kind, value):
    rows = random_blocks(np.random.default_rng(0), kind, (8, 256))
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    cut = rows.reshape(8, -1, block)[3, -1]
    if kind == "MXFP4":
        cut[0] = 255
    else:
        place = 208 if kind == "Q6_K" else 0
        cut[place : place + 2] = np.array([value], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="scale: got"):
        decoded(kind, rows, 256)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_a_minimum_that_is_not_finite(kind):
    rows = random_blocks(np.random.default_rng(0), kind, (8, 256))
    rows[2, 2:4] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="minimum: got"):
        decoded(kind, rows, 256)


def test_rows_beyond_the_last_are_not_written():
    """Guards around every output."""
    rng = np.random.default_rng(0)
    for number, kind in enumerate(BLOCK_KINDS):
        row, n, k = BLOCK_TYPES[kind], 9, 512
        rows = random_blocks(rng, kind, (n, k))
        guarded, inner = {}, {}
        for name, array in row.arrays(k, n).items():
            guarded[name] = np.full((array.shape[0] + 2, n), 0x5A, array.view(f"u{array.itemsize}").dtype)
            inner[name] = guarded[name][1:-1]
        first, second = ("block_scale", "block_minimum") if row.record.has_blocks else ("scale", "minimum")
        subs = [inner.get("scale"), inner.get("minimum")] if row.record.has_blocks else []
        decode_blocks(number, rows, inner["words"], inner[first], inner.get(second), *subs)
        for array in guarded.values():
            assert (array[[0, -1]] == 0x5A).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 11}, "number: got 11, expected 0 to 10"),
        ({"rows": np.zeros((8, 19), np.uint8)}, "rows: got"),
        ({"words": np.zeros((4, 8), np.uint32)}, "words: got"),
        ({"scale": np.zeros((2, 7), np.uint16)}, "scale: got"),
        ({"minimum": np.zeros((3, 8), np.uint16)}, "minimum: got"),
        ({"sub_scale": np.zeros((2, 8), np.uint8)}, "sub_scale: got"),
    ],
)
def test_arrays_that_do_not_fit(changes, message):
    arguments = {
        "number": 0,
        "rows": np.zeros((8, 36), np.uint8),
        "words": np.zeros((8, 8), np.uint32),
        "scale": np.zeros((2, 8), np.uint16),
    }
    with pytest.raises(ValueError, match=message):
        decode_blocks(**arguments | changes)


# ---------------------------------------------------------------------------------------------
# Packed tiles


def builder_for(kind, k, n):
    row = BLOCK_TYPES[kind]
    return get_backend("cpu").new_stack_builder(2, k, n, group_size=row.group_size, codes=row.codes, scales=row.scales)


@pytest.mark.parametrize("kind", NAMES)
def test_packed_directly_as_through_the_canonical_form(kind):
    """Parts that begin within a tile or end there, side by side; the other expert stays empty."""
    rng = np.random.default_rng(1)
    rows = random_blocks(rng, kind, (72, 512))
    directly, through = builder_for(kind, 512, 72), builder_for(kind, 512, 72)
    for begin, n in ((0, 24), (24, 8), (32, 40)):
        part = StoredBlocks(BLOCK_TYPES[kind], rows).part(begin, n)
        directly.add_stored(1, begin, part)
        through.add(1, begin, part.canonical())
    np.testing.assert_array_equal(directly._store.data, through._store.data)
    assert directly._store.data.any()
    with pytest.raises(ValueError, match="columns 24 to 32 of expert 1 were added before"):
        directly.add_stored(1, 24, StoredBlocks(BLOCK_TYPES[kind], rows[:8]))


@pytest.mark.parametrize(("kind", "name"), [("Q4_0", "scale"), ("Q4_1", "minimum"), ("Q4_K", "block_minimum")])
def test_packing_refuses_a_scale_that_is_not_finite(kind, name):
    rows = random_blocks(np.random.default_rng(0), kind, (24, 256))
    place = 2 if "minimum" in name else 0
    rows[17, place : place + 2] = np.array([np.inf], np.float16).view(np.uint8)
    builder = builder_for(kind, 256, 24)
    with pytest.raises(ValueError, match=f"{name}: got -?inf at \\[0, 17\\]"):
        builder.add_stored(0, 0, StoredBlocks(BLOCK_TYPES[kind], rows))


def test_packing_refuses_arguments_that_do_not_fit():
    layout = TileLayout(64, 16, 32)
    places = [layout.part_places("scale")[0], None, None, None, layout.part_places("zero")[0]]
    arguments = {
        "number": 0,
        "rows": np.zeros((8, 36), np.uint8),
        "expert": np.zeros(layout.expert_stride, np.uint8),
        "column": 8,
        "layout": layout,
        "places": places,
    }
    assert pack_blocks(**arguments)
    for changes, message in (
        ({"number": -1}, "number: got -1, expected 0 to 10"),
        ({"rows": np.zeros((8, 37), np.uint8)}, "rows: got"),
        ({"rows": np.zeros((8, 54), np.uint8)}, "layout: got"),
        ({"expert": np.zeros(layout.expert_stride - 1, np.uint8)}, "expert: got"),
        ({"column": 16}, "column: got columns 16 to 24, expected a part of 0 to 16"),
        ({"column": -8}, "column: got columns -8 to 0"),
        ({"places": [None, *places[1:]]}, "places: got 0 of scale, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_blocks(**arguments | changes)


# ---------------------------------------------------------------------------------------------
# Other forms


PAIRS = [(kind, other) for kind in NAMES for other in NAMES if kind != other]
TABLES = ("IQ4_NL", "IQ4_XS", "MXFP4")


@pytest.mark.parametrize(("kind", "other"), PAIRS)
def test_two_types_in_one_stack(kind, other):
    common = BLOCK_TYPES[kind].in_common(BLOCK_TYPES[other])
    if kind in TABLES or other in TABLES:
        assert common is None
        return
    rows = random_blocks(np.random.default_rng(1), kind, (16, 512))
    weight = common.converted(decoded(kind, rows, 512))
    assert common.forms == BLOCK_TYPES[other].in_common(BLOCK_TYPES[kind]).forms
    assert (weight.codes, weight.scales, weight.group_size) == common.forms
    # A zero point that became a minimum is subtracted after the product, with another rounding.
    expected = values_of(rows, kind)
    np.testing.assert_allclose(values_in_float64(weight), expected, rtol=0, atol=2**-23 * np.abs(expected).max())


def test_codes_of_four_bits_as_codes_of_eight():
    for kind, wide in (("Q4_0", "Q8_0"), ("Q4_0", "Q5_0"), ("Q4_1", "Q5_1"), ("Q4_K", "Q5_K")):
        rows = random_blocks(np.random.default_rng(1), kind, (16, 512))
        weight, common = decoded(kind, rows, 512), BLOCK_TYPES[kind].in_common(BLOCK_TYPES[wide])
        assert common is BLOCK_TYPES[wide]
        converted = common.converted(weight)
        np.testing.assert_array_equal(unpack_words(converted.words, 8), unpack_words(weight.words, 4))
        np.testing.assert_array_equal(values_in_float32(converted), values_of(rows, kind))


@pytest.mark.parametrize("kind", NAMES)
def test_rows_of_k_in_another_order(kind):
    rng = np.random.default_rng(2)
    rows = random_blocks(rng, kind, (8, 512))
    order = (32 * rng.permutation(16)[:, None] + np.arange(32)).ravel()
    np.testing.assert_array_equal(
        values_in_float32(rows_of(decoded(kind, rows, 512), order)), values_of(rows, kind)[:, order]
    )
