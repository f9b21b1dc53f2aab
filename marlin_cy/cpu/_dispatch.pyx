"""The instruction sets of this machine, and a complete table of kernels for each.

This extension holds the C files of ``ukernels/``. The other extensions reach their kernels through the
:class:`KernelTable` that :func:`kernel_table` returns.

All tables are built when this module is imported, under the GIL, and never change afterwards: parallel loops of any
thread may read them without a lock.
"""

import os

import numpy as np

from libc.stdint cimport uintptr_t

from marlin_cy import activations

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    static int openmp_version(void) { return _OPENMP; }
    #else
    static int openmp_version(void) { return 0; }
    #endif
    """
    int openmp_version() nogil

ENVIRONMENT_VARIABLE = "MARLIN_CY_ISA"

ACTIVATIONS = {row.name: row.number for row in activations.ACTIVATIONS.values()}
"""The kernels' number of each activation of :class:`~marlin_cy.moe.MoeLayer`."""

CONSTANTS = {
    "TILE_N": TILE_N,
    "PAIR_N": PAIR_N,
    "LANE_K": LANE_K,
    "LINE_BYTES": LINE_BYTES,
    "MAX_GROUP_K": MAX_GROUP_K,
    "GROUP_K_STEP": GROUP_K_STEP,
    "CHUNK_K": CHUNK_K,
    "MAX_MC": MAX_MC,
    "MAX_PLANES": MAX_PLANES,
    "QMAX_INT8": QMAX_INT8,
    "QMAX_INT16": QMAX_INT16,
    "QUANTIZE_MIN_AMAX": QUANTIZE_MIN_AMAX,
    "SYMMETRIC_ZERO": SYMMETRIC_ZERO,
    "DTYPE_F32": DTYPE_F32,
    "DTYPE_F16": DTYPE_F16,
    "DTYPE_BF16": DTYPE_BF16,
    "DTYPE_I8": DTYPE_I8,
    "DTYPE_F8": DTYPE_F8,
    "CODES_COUNT": CODES_COUNT,
    "SCALES_COUNT": SCALES_COUNT,
    "SCALE_BLOCK_K": SCALE_BLOCK_K,
    "ACTIVATION_SILU": ACTIVATION_SILU,
    "ACTIVATION_GELU": ACTIVATION_GELU,
    "ACTIVATION_GELU_TANH": ACTIVATION_GELU_TANH,
    "ACTIVATION_SWIGLUOAI": ACTIVATION_SWIGLUOAI,
    "ACTIVATION_SILU_CLAMP10": ACTIVATION_SILU_CLAMP10,
    "ACTIVATION_RELU2": ACTIVATION_RELU2,
    "LANES": LANES,
    "KV_BLOCK": KV_BLOCK,
    "CHUNK_PAGES": CHUNK_PAGES,
    "ATTENTION_CHUNK": ATTENTION_CHUNK,
    "MAX_QUERIES": MAX_QUERIES,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
}
"""The constants of ``ukernels/*.h`` by name: tests compare them with their Python counterparts."""

KERNEL_CODE_TYPES = {
    code_types[codes].name.decode(): {
        "number": codes,
        "bits": code_types[codes].bits,
        "multiplicands": [
            code_types[codes].multiplicands[code] if code_types[codes].bits == 4 else code
            for code in range(1 << code_types[codes].bits)
        ],
        "is_identity": bool(code_types[codes].is_identity),
        "max_multiplicand": code_types[codes].max_multiplicand,
        "has_zero_points": bool(code_types[codes].has_zero_points),
        "zero_bytes": code_types[codes].zero_bytes,
        "symmetric_zero": code_types[codes].symmetric_zero,
        "units_per_one": code_types[codes].units_per_one,
        "min_group": code_types[codes].min_group,
    }
    for codes in range(CODES_COUNT)
}
"""The rows of ``ukernels/code_types.h`` by name; tests compare them with ``weights/code_types.py``."""

KERNEL_SCALE_RECORDS = {
    scale_records[scales].name.decode(): {
        "number": scales,
        "scale_bytes": scale_records[scales].scale_bytes,
        "has_minimum": bool(scale_records[scales].has_minimum),
        "has_blocks": bool(scale_records[scales].has_blocks),
    }
    for scales in range(SCALES_COUNT)
}
"""The rows of ``ukernels/scale_records.h`` by name; tests compare them with ``weights/scale_records.py``."""

cdef list ISAS = []     # what isas() returns
cdef dict TABLES = {}   # name: KernelTable, of every ISA that this machine can run


cdef class KernelTable:
    """The kernels of one instruction set: its own, and those that it inherits. It never changes.

    Attributes
    ----------
    name : str
    """

    def __init__(self):
        raise TypeError("KernelTable: cannot be made directly; a context's workspace has one")

    @staticmethod
    def from_descriptor(uintptr_t address, owner):
        """A table of kernels that another library holds; for tests, and for trying kernels without a new build.

        The ISA is not probed: the caller knows that this machine can run it.

        Parameters
        ----------
        address : int
            Of an ``isa_descriptor`` (``ukernels/isa.h``) whose ancestors are in the same library.
        owner : object
            Kept alive as long as the table, so that the library stays loaded.
        """
        return complete_table(<const isa_descriptor *>address, owner)

    @property
    def mr(self):
        """Row granularity of the micro-kernel."""
        return self.table.mr

    @property
    def mc(self):
        """Most rows of a task."""
        return self.table.mc

    @property
    def min_matrix_rows(self):
        """The smallest number of rows with which tasks use a matrix unit; 0 if the ISA has no matrix unit."""
        return self.table.min_matrix_rows

    @property
    def address(self):
        """Address of the C structure; for tests."""
        return <uintptr_t>&self.table

    def __bytes__(self):
        """The C structure, byte by byte; for tests."""
        return (<const char *>&self.table)[:sizeof(self.table)]


cdef KernelTable complete_table(const isa_descriptor *isa, object owner):
    cdef KernelTable kernels = KernelTable.__new__(KernelTable)
    isa_merge(&kernels.table, isa)
    kernels.peak, kernels.name, kernels.owner = isa.peak, isa.name.decode(), owner
    return kernels


cdef int build_tables() except -1:
    """Probe every instruction set, and build the tables of the available ones."""
    cdef int index = 0
    cdef const isa_descriptor *isa = isa_at(index)
    cdef isa_support found
    while isa is not NULL:
        found, name = isa_probe(isa), isa.name.decode()
        ISAS.append({"name": name, "available": bool(found.available), "reason": found.reason.decode()})
        if found.available:
            TABLES[name] = complete_table(isa, None)
        index += 1
        isa = isa_at(index)
    return 0


build_tables()


def isas():
    """The ISAs of this architecture, the most general first: dicts of ``name``, ``available`` and ``reason``."""
    return [dict(isa) for isa in ISAS]


cdef KernelTable kernel_table(str name):
    """The table of an ISA; ``ValueError`` if no ISA has this name, or if this machine cannot run it."""
    if name in TABLES:
        return TABLES[name]
    reasons = {isa["name"]: isa["reason"] for isa in ISAS}
    if name not in reasons:
        raise ValueError(f"isa: got {name!r}, expected one of {', '.join(reasons)}")
    raise ValueError(f"isa: got {name!r}, which this machine cannot run: {reasons[name]}")


def choose_isa():
    """``(name, reason)`` of the ISA that a context uses by default.

    Raises
    ------
    ValueError
        The environment variable ``MARLIN_CY_ISA`` names an ISA that does not exist or cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted:
        try:
            kernel_table(wanted)
        except ValueError as error:
            raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: {error}") from None
        return wanted, f"{ENVIRONMENT_VARIABLE} asks for it"
    *_, best = (isa for isa in ISAS if isa["available"])
    return best["name"], f"the most specific that runs here: {best['reason']}"


def activate(str isa, str activation, const float[:, ::1] sums, const float[::1] bias=None):
    """The output of an ISA's ``glu_epilogue``, float32 ``[rows, 16]``, for given sums; for tests and inspection.

    Parameters
    ----------
    isa, activation : str
    sums : float32 ``[rows, 32]``
        16 gates, then 16 ups.
    bias : float32 ``[32]``, optional
        Added to the sums.

    Raises
    ------
    ValueError
        An ISA that this machine cannot run, or another number of columns.
    """
    cdef KernelTable kernels = kernel_table(isa)
    cdef int code = ACTIVATIONS[activation], m = sums.shape[0]
    if sums.shape[1] != PAIR_N or bias is not None and bias.shape[0] != PAIR_N:
        raise ValueError(f"sums, bias: got {sums.shape[1]} columns, expected {PAIR_N} in both")
    out, rows = np.empty((m, TILE_N), np.float32), np.arange(m)
    cdef float[:, ::1] to = out
    cdef const int64_t[::1] places = rows
    cdef const float *gate_bias = NULL
    cdef const float *up_bias = NULL
    if bias is not None:
        gate_bias, up_bias = &bias[0], &bias[TILE_N]
    if m:
        kernels.table.glu_epilogue(&to[0, 0], TILE_N, &places[0], m, &sums[0, 0], gate_bias, up_bias, code)
    return out


def openmp_report():
    """``{"enabled": bool, "version": int}``; the version is the date in the macro ``_OPENMP``, 0 without OpenMP."""
    return {"enabled": openmp_version() != 0, "version": openmp_version()}
