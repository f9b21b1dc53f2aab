"""Which instruction set the kernels use: what this machine has, and what the user wants.

This extension holds the C files of ``ukernels/``; the others reach them through the table that
:func:`table_of` returns.
"""

import os


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


def openmp_report():
    """``{"enabled": bool, "version": int}``; the version is OpenMP's ``_OPENMP`` date, 0 without it."""
    return {"enabled": openmp_version() != 0, "version": openmp_version()}
