"""Which instruction set the kernels use: what this machine has, and what the user wants.

This extension holds the C files of ``ukernels/``; the others reach them through the table that
:func:`table_of` returns.
"""

import os

import numpy as np


cdef extern from "isa.h" nogil:
    enum:
        ISA_MAX

    ctypedef struct isa_info:
        const char *name
        int available
        const char *reason

    int isa_list(isa_info *info)
    const ukernel_table *isa_table(const char *name)

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

ACTIVATIONS = {
    "silu": ACTIVATION_SILU,
    "gelu": ACTIVATION_GELU,
    "gelu_tanh": ACTIVATION_GELU_TANH,
    "swigluoai": ACTIVATION_SWIGLUOAI,
}
"""The kernels' number of each activation of :class:`~marlin_cy.moe.MoeLayer`."""


def isas():
    """The ISAs of this architecture, most general first: dicts of ``name``, ``available`` and ``reason``."""
    cdef isa_info[ISA_MAX] info
    cdef int count = isa_list(info)
    return [
        {"name": info[i].name.decode(), "available": bool(info[i].available), "reason": info[i].reason.decode()}
        for i in range(count)
    ]


cdef const ukernel_table *table_of(str name) except NULL:
    cdef const ukernel_table *table
    reasons = {isa["name"]: isa["reason"] for isa in isas()}
    if name not in reasons:
        raise ValueError(f"isa: got {name!r}, expected one of {', '.join(reasons)}")
    table = isa_table(name.encode())
    if table is NULL:
        raise ValueError(f"isa: got {name!r}, which this machine cannot run: {reasons[name]}")
    return table


def choose_isa():
    """``(name, why)`` of the ISA that a context uses when it is not told which.

    Raises
    ------
    ValueError
        The environment variable ``MARLIN_CY_ISA`` names an ISA that does not exist or cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted:
        try:
            table_of(wanted)
        except ValueError as error:
            raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: {error}") from None
        return wanted, f"{ENVIRONMENT_VARIABLE} asks for it"
    *_, best = (isa for isa in isas() if isa["available"])
    return best["name"], f"the most specific that runs here: {best['reason']}"


def activate(str isa, str activation, const float[:, ::1] sums, const float[::1] bias=None):
    """What an ISA's ``glu_epilogue`` makes of sums, float32 ``[rows, 16]``; for tests and inspection.

    Parameters
    ----------
    isa, activation : str
    sums : float32 ``[rows, 32]``
        16 gates, then 16 ups.
    bias : float32 ``[32]``, optional
        Added to the sums.
    """
    cdef const ukernel_table *table = table_of(isa)
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
        table.glu_epilogue(&to[0, 0], TILE_N, &places[0], m, &sums[0, 0], gate_bias, up_bias, code)
    return out


def openmp_report():
    """``{"enabled": bool, "version": int}``; the version is OpenMP's ``_OPENMP`` date, 0 without it."""
    return {"enabled": openmp_version() != 0, "version": openmp_version()}
