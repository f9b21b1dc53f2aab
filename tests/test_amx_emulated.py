"""The kernels of AVX-512, and those of AMX on machines without AMX: compiled against ``amx_emulation.h``.

Their results are compared with those of the generic kernels, task by task. ``test_numerics_cpu.py`` compares the
generic kernels with the reference, and AMX itself if the machine has it. Each array of a task ends at a page that
cannot be read, so that a read past the end crashes. Other tests let the framework make the tasks, whose rows must be
consecutive. On machines without AVX-512, ``emulated.sh`` runs these tests.
"""

import ctypes
import mmap
import sys

import numpy as np
import pytest
from asserts import assert_same_bits
from conftest import ISAS
from kernel_libraries import COMPILER, context_with, emulated_amx_library, kernel_table
from problems import G_IDX_MODES, activations, random_problem

import marlin_cy
from marlin_cy.cpu._dispatch import CONSTANTS, KERNEL_CODE_TYPES, KERNEL_SCALE_RECORDS
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS
from marlin_cy.weights.tile_layout import TileLayout

TILE_N, PAIR_N, LANE_K, GROUP_K_STEP, MAX_GROUP_K, MAX_MC = (
    CONSTANTS[name] for name in ("TILE_N", "PAIR_N", "LANE_K", "GROUP_K_STEP", "MAX_GROUP_K", "MAX_MC")
)
SIZES = (GROUP_K_STEP, *range(32, MAX_GROUP_K + 1, 32))
GROUP_SIZES = [(size,) for size in SIZES] + [(size, size, last) for size in SIZES for last in SIZES if last <= size]
CODES = [row["number"] for row in KERNEL_CODE_TYPES.values()]
CODES_BY_NUMBER = {row["number"]: CODE_TYPES[name] for name, row in KERNEL_CODE_TYPES.items()}
RECORDS_BY_NUMBER = {row["number"]: SCALE_RECORDS[name] for name, row in KERNEL_SCALE_RECORDS.items()}
META = np.dtype([("scale", np.float32), ("sum_split", np.int32), ("symmetric_sum", np.int32)])

if sys.platform != "linux":
    pytest.skip("AMX is supported on Linux only", allow_module_level=True)
if COMPILER is None:
    pytest.skip("no C compiler", allow_module_level=True)
if not ISAS.get("avx512vnni", {"available": False})["available"]:
    pytest.skip("AMX inherits kernels of AVX-512, which this machine lacks: use emulated.sh", allow_module_level=True)


class Task(ctypes.Structure):
    """``gemm_task`` of ``ukernel.h``."""

    _fields_ = [
        ("header", ctypes.c_void_p * 2),
        ("body", ctypes.c_void_p * 2),
        ("next", ctypes.c_void_p * 2),
        ("scales", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("group_blocks", ctypes.c_int),
        ("last_group_blocks", ctypes.c_int),
        ("a", ctypes.c_void_p),
        ("a_group_stride", ctypes.c_ssize_t),
        ("a_row_stride", ctypes.c_ssize_t),
        ("meta", ctypes.c_void_p),
        ("meta_group_stride", ctypes.c_ssize_t),
        ("rows", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("accumulate", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]


class Table(ctypes.Structure):
    """The first entries of ``ukernel_table``."""

    _fields_ = [
        ("gemm", ctypes.CFUNCTYPE(None, ctypes.POINTER(Task)) * 2 * len(CODES)),
        ("mr", ctypes.c_int),
        ("mc", ctypes.c_int),
        ("min_matrix_rows", ctypes.c_int),
    ]


class Descriptor(ctypes.Structure):
    """``isa_descriptor`` of ``isa.h``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("parent", ctypes.c_void_p),
        ("probe", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("kernels", Table),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated_amx_library(tmp_path_factory.mktemp("amx"))


def own_kernels(library, isa):
    """The kernels that an ISA of the library does not inherit."""
    return Descriptor.in_dll(library, f"isa_{isa}").kernels


def at_the_end_of_memory(values):
    """A copy behind which nothing can be read."""
    values = np.ascontiguousarray(values)
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = memory[size - values.nbytes : size]
    copy[:] = values.reshape(-1).view(np.uint8)
    return copy


def aligned(nbytes):
    memory = np.empty(nbytes + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:nbytes]


def random_header(rng, layout):
    """The scale records of a tile."""
    row, record = CODE_TYPES[layout.codes], SCALE_RECORDS[layout.scales]
    header = np.zeros(
        layout.num_groups * layout.group_bytes + layout.packed_k // 256 * layout.scale_block_bytes, np.uint8
    )
    for name in (*record.group_parts(row), *record.block_parts()):
        places, dtype = layout.part_places(name)
        for place in places:
            if name == "zero":
                values = rng.integers(0, row.max_zero + 1, TILE_N) if row.has_zero_points else row.symmetric_zero
                values = row.symmetric_zero if rng.random() < 0.3 else values
            else:
                values = rng.integers(0, 128, TILE_N) if dtype.kind in "iu" else rng.standard_normal(TILE_N)
            header[place : place + TILE_N * dtype.itemsize] = np.full(TILE_N, values).astype(dtype).view(np.uint8)
    return header


class Problem:
    """A random task, with all arrays that it points to."""

    def __init__(self, rng, m, planes, codes, *, tiles=2, group_sizes=(128, 128), scales=0, rows=None):
        self.planes, self.codes, self.tiles, self.m = planes, codes, tiles, m
        groups, group_size, k = len(group_sizes), group_sizes[0], sum(group_sizes)
        rows = np.arange(3, 3 + m) if rows is None else rows  # the last of them ends where memory does
        num_rows = rows.max() + 1
        a = rng.integers(-128, 128, (groups, num_rows, group_size * planes)).astype(np.int8)
        a[rng.random(a.shape) < 0.1] = -128
        for group, size in enumerate(group_sizes):
            np.maximum(a[group, :, :size], -127, out=a[group, :, :size])  # plane 0: a value is at most 32639
        meta = np.empty((groups, num_rows), META)
        meta["scale"] = rng.standard_normal(meta.shape) ** 2
        meta["scale"][-1, rows[m // 2]] = np.nan
        for group, size in enumerate(group_sizes):
            values = a[group, :, :size].astype(np.int32)
            if planes == 2:
                values = 256 * values + a[group, :, size : 2 * size]
            total = values.sum(axis=1)
            meta["sum_split"][group] = total & 255 | total >> 8 << 16
            meta["symmetric_sum"][group] = -8 * total
        used = a.size - (group_size - group_sizes[-1]) * planes
        row = CODES_BY_NUMBER[codes]
        headers = [
            random_header(rng, TileLayout(k, TILE_N, group_size, row.name, RECORDS_BY_NUMBER[scales].name))
            for _ in range(2)
        ]
        bodies = rng.integers(0, 256, (2, k // LANE_K, TILE_N * row.bits)).astype(np.uint8)
        self.parts = {
            "a": at_the_end_of_memory(a.reshape(-1)[:used]),
            "meta": at_the_end_of_memory(meta),
            "rows": at_the_end_of_memory(rows.astype(np.int32)),
        }
        self.header = [at_the_end_of_memory(part) for part in headers]
        self.body = [at_the_end_of_memory(part) for part in bodies]
        self.sizes = {
            "scales": scales,
            "num_groups": groups,
            "group_blocks": group_size // LANE_K,
            "last_group_blocks": group_sizes[-1] // LANE_K,
            "a_group_stride": a.strides[0],
            "a_row_stride": a.strides[1],
            "meta_group_stride": num_rows,
            "m": m,
        }

    def result(self, table, accumulate=None):
        """The output of a table's kernel, float32 ``[m, columns]``; it is added to ``accumulate``."""
        memory = aligned((MAX_MC + 2) * PAIR_N * 4).view(np.float32).reshape(-1, PAIR_N)
        memory[:] = 12345
        out = memory[1 : self.m + 1]
        columns = self.tiles * TILE_N
        if accumulate is not None:
            out[:, :columns] = accumulate
        scratch = aligned(MAX_GROUP_K * PAIR_N * 2 + MAX_MC * PAIR_N * 4 + MAX_MC * MAX_GROUP_K * 2 + 64)
        scratch[:] = 0xFF
        task = Task(**self.sizes, accumulate=accumulate is not None)
        for name, part in {**self.parts, "out": out, "scratch": scratch}.items():
            setattr(task, name, part.ctypes.data)
        for tile in range(self.tiles):
            task.header[tile], task.body[tile] = self.header[tile].ctypes.data, self.body[tile].ctypes.data
        table.gemm[self.codes][self.planes - 1](task)
        result = out[:, :columns].copy()
        out[:, :columns] = 12345
        assert (memory == 12345).all(), "written outside the task's columns"
        assert (scratch[-64:] == 0xFF).all(), "written behind the scratch"
        return result

    def check(self, library):
        generic = own_kernels(library, "generic")
        expected = self.result(generic)
        added = self.result(generic, expected)
        assert np.isnan(expected).any(axis=1).sum() == 1
        for isa in "avx512vnni", "amx":
            kernels = own_kernels(library, isa)
            assert_same_bits(self.result(kernels), expected)
            assert_same_bits(self.result(kernels, expected), added)


@pytest.mark.parametrize("m", range(1, MAX_MC + 1))
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codes", CODES)
def test_every_number_of_rows(library, rng, m, planes, codes):
    for tiles in 1, 2:
        Problem(rng, m, planes, codes, tiles=tiles).check(library)


@pytest.mark.sampled(240)
@pytest.mark.parametrize("group_sizes", GROUP_SIZES, ids=str)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("m", [16, 17, 37])
def test_every_group_size(library, rng, group_sizes, planes, codes, tiles, m):
    if any(size % CODES_BY_NUMBER[codes].min_group for size in group_sizes):
        pytest.skip("the code type has no such groups")
    scales = int(rng.integers(0, 3))
    Problem(rng, m, planes, codes, tiles=tiles, group_sizes=group_sizes, scales=scales).check(library)


@pytest.mark.parametrize("scales", RECORDS_BY_NUMBER)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_every_scale_record(library, rng, scales, planes, codes, group_size):
    row, record = CODES_BY_NUMBER[codes], RECORDS_BY_NUMBER[scales]
    if group_size < row.min_group or (record.has_minimum and not row.has_zero_points):
        pytest.skip("the code type has no such weights")
    for tiles in 1, 2:
        for m in 1, 3, 16, 37:
            groups = (group_size,) * (512 // group_size)
            Problem(rng, m, planes, codes, tiles=tiles, group_sizes=groups, scales=scales).check(library)


@pytest.mark.parametrize("planes", [1, 2])
def test_few_rows_may_lie_anywhere(library, rng, planes):
    few = own_kernels(library, "amx").min_matrix_rows - 1
    assert few > 0
    Problem(rng, few, planes, 0, rows=rng.permutation(20)[:few]).check(library)


@pytest.mark.parametrize("planes", [1, 2])
def test_other_users_find_no_tiles(library, rng, planes):
    """Tiles are released, so that a context switch has none to save."""
    Problem(rng, 20, planes, 0).check(library)
    assert not library.amx_is_configured()


@pytest.fixture
def emulated_context(library, cpu_backend):
    """Makes a context with the emulated kernels. They get the same tasks as the kernels of AMX."""
    return lambda **options: context_with(cpu_backend, kernel_table(library, "amx"), **options)


@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("n", [16, 56, 96])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_products(emulated_context, cpu_backend, rng, compute_dtype, g_idx, n, num_threads):
    """Rows that several experts share, few and many; with one panel of columns, an odd number of them, and a view."""
    k = 1056
    stack = random_problem(rng, 4, k, n, 32, g_idx=g_idx).stack(cpu_backend)
    x = activations(rng, 120, k)
    x[70, 5] = np.nan
    dispatches = [(2, 60, 0, 16), (0, 0, 16, 96), (1, 65, 112, 7), (3, 62, 119, 49), (0, 119, 168, 1)]
    view = stack.make_expert_linear(n + 8, n - 8)
    results = []
    generic = cpu_backend.new_context(num_threads=1, isa="generic", compute_dtype=compute_dtype)
    for ctx in generic, emulated_context(num_threads=num_threads, compute_dtype=compute_dtype):
        out, of_view = np.full((169, n), 5, np.float32), np.full((120, n - 8), 5, np.float32)
        stack.gemm_phase_batched(ctx, x, dispatches, out, k)
        view.forward(ctx, x, of_view, 120)
        results.append(np.concatenate([out, np.pad(of_view, [(0, 0), (0, 8)])]))
    assert np.isnan(results[0]).any(axis=1).sum() == 5
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("g_idx", G_IDX_MODES)
@pytest.mark.parametrize("tokens", [5, 40, 150])
def test_layer(emulated_context, cpu_backend, rng, compute_dtype, g_idx, tokens):
    gate_up = random_problem(rng, 5, 96, 192, 32, g_idx=g_idx).stack(cpu_backend)
    down = random_problem(rng, 5, 96, 96, 32, g_idx=g_idx).stack(cpu_backend)
    layer = marlin_cy.MoeLayer(gate_up, down, top_k=2)
    x, logits = activations(rng, tokens, 96), rng.standard_normal((tokens, 5)).astype(np.float32)
    generic = cpu_backend.new_context(num_threads=1, isa="generic", compute_dtype=compute_dtype)
    expected = layer(generic, x, logits)
    assert_same_bits(layer(emulated_context(num_threads=2, compute_dtype=compute_dtype), x, logits), expected)
