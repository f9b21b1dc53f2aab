"""Constants that both C and Python define have equal values.

Sizes and offsets of C structures need no test: Cython takes them from the headers.
"""

import pytest

from marlin_cy import reference
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.cpu import _dispatch
from marlin_cy.cpu._dispatch import CONSTANTS, KERNEL_CODE_TYPES, KERNEL_SCALE_RECORDS
from marlin_cy.cpu._workspace import PLANES
from marlin_cy.formats import arrays
from marlin_cy.weights import order, scale_records, sizes, tile_layout
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS


@pytest.mark.parametrize("name", ["TILE_N", "LANE_K", "LINE_BYTES"])
def test_layout(name):
    assert getattr(tile_layout, name) == CONSTANTS[name]


def test_groups():
    assert CONSTANTS["MAX_GROUP_K"] == order.MAX_GROUP_K
    assert CONSTANTS["GROUP_K_STEP"] == min(row.min_group for row in CODE_TYPES.values()) == sizes.SMALL_GROUPS[0]
    assert sizes.K_STEP % CONSTANTS["GROUP_K_STEP"] == 0


def test_chunks():
    assert CONSTANTS["CHUNK_K"] == reference.CHUNK_K
    assert CONSTANTS["CHUNK_K"] % CONSTANTS["MAX_GROUP_K"] == 0


def test_quantisation():
    assert {name: CONSTANTS[f"QMAX_{name.upper()}"] for name in PLANES} == reference.QMAX
    assert CONSTANTS["QUANTIZE_MIN_AMAX"] == reference.MIN_AMAX
    assert max(PLANES.values()) == CONSTANTS["MAX_PLANES"]


def test_symmetric_zero():
    assert CONSTANTS["SYMMETRIC_ZERO"] == CODE_TYPES["uint4"].symmetric_zero == arrays.SYMMETRIC_ZERO
    assert CONSTANTS["SYMMETRIC_ZERO"] == reference.SUM_FACTOR


def test_names_of_code_types():
    assert set(KERNEL_CODE_TYPES) == set(CODE_TYPES)
    assert [row["number"] for row in KERNEL_CODE_TYPES.values()] == list(range(CONSTANTS["CODES_COUNT"]))


@pytest.mark.parametrize("name", CODE_TYPES)
def test_rows_of_code_types(name):
    row = CODE_TYPES[name]
    multiplicands = row.multiplicands.tolist()
    assert KERNEL_CODE_TYPES[name] == {
        "number": KERNEL_CODE_TYPES[name]["number"],  # defined in C only
        "bits": row.bits,
        "multiplicands": multiplicands,
        "is_identity": multiplicands == list(range(2**row.bits)),
        "max_multiplicand": max(multiplicands),
        "has_zero_points": row.has_zero_points,
        "zero_bytes": row.zero_dtype.itemsize,
        "symmetric_zero": row.symmetric_zero,
        "units_per_one": row.units_per_one,
        "min_group": row.min_group,
    }


@pytest.mark.parametrize("name", CODE_TYPES)
def test_products_fit_32_bits(name):
    """Sums over the largest group, with the largest activations and any zero point."""
    row = CODE_TYPES[name]
    factor = max(row.multiplicands.max(), row.max_zero, row.symmetric_zero)
    assert CONSTANTS["MAX_GROUP_K"] * int(factor) * CONSTANTS["QMAX_INT16"] < 1 << 31
    assert row.units_per_one & (row.units_per_one - 1) == 0, "scales are divided exactly by powers of two only"


def test_scale_records():
    assert {name: (row.scale.itemsize, row.has_minimum, row.has_blocks) for name, row in SCALE_RECORDS.items()} == {
        name: (row["scale_bytes"], row["has_minimum"], row["has_blocks"]) for name, row in KERNEL_SCALE_RECORDS.items()
    }
    assert [row["number"] for row in KERNEL_SCALE_RECORDS.values()] == list(range(CONSTANTS["SCALES_COUNT"]))
    assert CONSTANTS["SCALE_BLOCK_K"] == scale_records.BLOCK_ROWS
    assert CONSTANTS["CHUNK_K"] % CONSTANTS["SCALE_BLOCK_K"] == 0


def test_activations():
    numbers = {name: CONSTANTS[f"ACTIVATION_{name.upper()}"] for name in ACTIVATIONS}
    assert numbers == {name: row.number for name, row in ACTIVATIONS.items()} == _dispatch.ACTIVATIONS
    assert sum(name.startswith("ACTIVATION_") for name in CONSTANTS) == len(ACTIVATIONS)
