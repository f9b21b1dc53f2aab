"""``codes.cl`` for every code type, against the type's row."""

import re

import numpy as np
import pytest

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import BLOCK_ROWS, SCALE_RECORDS

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from opencl_devices import DEVICES, each_device, runtime_of  # noqa: E402

from marlin_cy.opencl import layout  # noqa: E402
from marlin_cy.opencl.arguments import arguments_of  # noqa: E402
from marlin_cy.opencl.buffers import TYPE_CODES  # noqa: E402
from marlin_cy.opencl.gemm import multiply, prepare  # noqa: E402
from marlin_cy.opencl.gemm.codes import SUPPORTED_CODES, code_macros  # noqa: E402
from marlin_cy.opencl.layer import align, forward, routing  # noqa: E402
from marlin_cy.opencl.program import KERNELS, source  # noqa: E402
from marlin_cy.opencl.store import PARTS  # noqa: E402
from marlin_cy.opencl.tiers import configuration  # noqa: E402

if not DEVICES:
    pytest.skip("no OpenCL device", allow_module_level=True)

# NVIDIA's compiler reports what it did.
pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")

# Each work-item decodes one word. `units`: CODE_UNIT, or 1 with zero points.
DECODE = """
__kernel void decode(__global const uint *words, __global uint *integers, __global float *halves, __global uint *bytes,
                     __global float *units)
{
    const size_t i = get_global_id(0);
    const uint word = words[i];
#if HAS_ZERO_POINTS
    integers[i] = code_integers(word);
    units[0] = 1;
#else
    const uint4 pairs = code_halves(word);
    const uint pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    for (uint p = 0; p < 4; p++)
        for (uint high = 0; high < 2; high++) {
            const ushort bits = pair[p] >> 16 * high;
            halves[8 * i + p + 4 * high] = vload_half(0, (const half *)&bits);
        }
    uint2 low, high;
    code_bytes((uint2)(word), &low, &high);
    bytes[2 * i] = low.x;
    bytes[2 * i + 1] = high.x;
    units[0] = CODE_UNIT;
#endif
}
"""


@each_device
@pytest.mark.parametrize("name", [name for name in SUPPORTED_CODES if CODE_TYPES[name].bits == 4])
def test_every_code_at_every_nibble(device, rng, name):
    row, runtime = CODE_TYPES[name], runtime_of(device)
    codes = np.concatenate(
        [np.repeat(np.arange(16), 8).reshape(16, 8), rng.integers(0, 16, (100, 8)), np.arange(8)[None]]
    )
    words = (codes.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
    options = [f"-D{macro}={value}" for macro, value in code_macros(name, True).items()]
    program = cl.Program(runtime.context, source("codes") + DECODE).build(options, devices=[device], cache_dir=False)
    count = len(words)
    results = [np.zeros(count, np.uint32), np.zeros((count, 8), np.float32), np.zeros((count, 2), np.uint32)]
    results.append(np.zeros(1, np.float32))
    buffers = [runtime.buffer(array) for array in (words, *results)]
    cl.Kernel(program, "decode")(runtime.queue, (count,), None, *buffers)
    for array, buffer in zip(results, buffers[1:], strict=True):
        cl.enqueue_copy(runtime.queue, array, buffer)
    integers, halves, bytes_, unit = results
    if row.has_zero_points:
        nibbles = integers[:, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        np.testing.assert_array_equal(nibbles, row.multiplicands[codes])
    else:
        assert np.log2(unit[0]) % 1 == 0
        np.testing.assert_array_equal(halves, row.decode_table[codes] * unit[0])
        expected = row.multiplicands[codes]
        np.testing.assert_array_equal(bytes_.view(np.uint8).reshape(count, 2, 4)[:, 0], expected[:, ::2])
        np.testing.assert_array_equal(bytes_.view(np.uint8).reshape(count, 2, 4)[:, 1], expected[:, 1::2])


@pytest.mark.parametrize("name", SUPPORTED_CODES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_macros_are_the_row_s(name, symmetric):
    row, macros = CODE_TYPES[name], code_macros(name, symmetric)
    assert [macro for macro in macros if macro.startswith("CODES_")] == [f"CODES_{name.upper()}"]
    assert macros["CODE_BITS"] == row.bits
    assert macros["SYMMETRIC"] == (symmetric or not row.has_zero_points)
    assert (macros["SYMMETRIC_ZERO"], macros["UNITS_PER_ONE"]) == (row.symmetric_zero, row.units_per_one)


@pytest.mark.parametrize("scales", SCALE_RECORDS)
def test_macros_are_the_record_s(scales):
    record, macros = SCALE_RECORDS[scales], code_macros("uint4", False, scales, 4)
    assert (macros["SCALE_BITS"], macros["MINIMA"]) == (8 * record.scale.itemsize, record.has_minimum)
    assert (macros["SYMMETRIC"] == 0) == record.has_zero_points(CODE_TYPES["uint4"])
    assert macros["SYMMETRIC_ZERO"] == record.constant_zero(CODE_TYPES["uint4"])
    assert [code_macros("uint8", True, scales, shift)["GROUP_16"] for shift in (4, 5, 7)] == [1, 0, 0]


# Constants that Python and the .cl files both name ------------------------------------------------


def defined(file):
    """``{name: value}`` of a file's ``#define``s of integers; with several of one name, the first."""
    found = {}
    for name, value in re.findall(r"^#define (\w+) (\d+)\b", (KERNELS / f"{file}.cl").read_text(), re.MULTILINE):
        found.setdefault(name, int(value))
    return found


def numbered(file, prefix):
    return {name: value for name, value in defined(file).items() if name.startswith(prefix)}


def test_branches_of_code_types():
    branches = re.findall(r"^#(?:el)?if defined\(CODES_(\w+)\)$", (KERNELS / "codes.cl").read_text(), re.MULTILINE)
    assert branches == [name.upper() for name in SUPPORTED_CODES]


def test_numbers_of_activations():
    expected = {f"ACTIVATION_{name.upper()}": prepare.activation_number(name) for name in ACTIVATIONS}
    assert numbered("activation", "ACTIVATION_") == {"ACTIVATION_NONE": prepare.activation_number(None), **expected}
    assert set(expected.values()) == {row.number + 1 for row in ACTIVATIONS.values()}


def test_numbers_of_routing():
    assert numbered("route_token", "SCORING_") == {f"SCORING_{name.upper()}": n for name, n in routing.SCORING.items()}
    expected = {f"GROUPING_{name.upper()}": n for name, n in routing.GROUPING.items()}
    assert numbered("route_token", "GROUPING_") == {"GROUPING_NONE": 0, **expected}


def test_numbers_of_rows():
    assert numbered("prepare", "GATHER_") == {
        "GATHER_NO_ORDER": prepare.NO_ORDER,
        "GATHER_ONE_ORDER": prepare.ONE_ORDER,
        "GATHER_BY_SLOT": prepare.BY_SLOT,
        "GATHER_MAPPED": prepare.MAPPED,
    }
    assert numbered("prepare", "PREPARED_") == {
        "PREPARED_FLOAT32": configuration.FLOAT32_ROWS,
        "PREPARED_FLOAT16": configuration.FLOAT16_ROWS,
        "PREPARED_PLANES": configuration.PLANES,
    }
    assert numbered("common", "BIAS_") == {
        "BIAS_NONE": multiply.NO_BIAS,
        "BIAS_OF_OUTPUT": multiply.OUTPUT_BIAS,
        "BIAS_OF_EXPERT": multiply.EXPERT_BIAS,
    }


def test_element_types():
    names = {"float": "float32", "half": "float16", "ushort": "bfloat16"}
    text = (KERNELS / "common.cl").read_text()
    found = {names[kind]: int(code) for code, kind in re.findall(r"^#define TYPE_(\d) (\w+)$", text, re.MULTILINE)}
    assert found == {dtype.name: code for dtype, code in TYPE_CODES.items()}
    codes = configuration.FLOAT32, configuration.FLOAT16, configuration.BFLOAT16
    assert tuple(found.values()) == codes
    assert frozenset(codes) == configuration.ALL_TYPES


def test_sizes_of_work_groups():
    """The files' defaults, with which the compile check builds them, are what the host passes."""
    assert defined("align")["ALIGN_ITEMS"] == align.ALIGN_ITEMS
    assert defined("route_token")["ROUTE_ITEMS"] == routing.ROUTE_ITEMS
    assert defined("moe")["FACTOR_ITEMS"] == forward.FACTOR_ITEMS
    assert defined("prepare")["MAX_LOCAL"] == prepare.MAX_ITEMS


def test_the_layout():
    sizes = defined("common")
    names = "STRIP_N", "BLOCK_K", "BLOCK_WORDS"
    assert [sizes[name] for name in names] == [getattr(layout, name) for name in names]
    assert 1 << defined("records")["BLOCK_SHIFT"] == BLOCK_ROWS


def test_weights_come_in_as_many_parts_as_kernels_take():
    text = (KERNELS / "common.cl").read_text()
    assert tuple(map(int, re.findall(r"if PARTS == (\d)\n#define WEIGHT_PARTS", text))) == PARTS
    for parts in PARTS:
        assert [name for name in arguments_of("gemm", {"PARTS": parts}) if re.fullmatch(r"w\d", name)] == [
            f"w{part}" for part in range(parts)
        ]
