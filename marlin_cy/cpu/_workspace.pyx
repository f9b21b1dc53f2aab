"""Growable scratch memory, owned by a context and reused by its calls.

Nothing is allocated inside a parallel loop: a call reserves what it needs, then releases the GIL.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

from marlin_cy.cpu._dispatch cimport table_of

from marlin_cy.cpu._dispatch import choose_isa
from marlin_cy.errors import ContextInUse

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    static int omp_get_num_procs(void) { return 1; }
    #endif
    """
    int omp_get_num_procs() nogil

cdef enum:
    ALIGNMENT = 64

PLANES = {"int16": 2, "int8": 1}


def available_cpus():
    """CPUs that threads of a call may run on.

    OpenMP's count, as ``OMP_PROC_BIND`` binds the thread that loads OpenMP to a single one of them.
    """
    return omp_get_num_procs()


cdef class Workspace:
    """Scratch memory and settings of one context.

    Parameters
    ----------
    num_threads : int
        At least 1.
    compute_dtype : {"int16", "int8"}
        What activations are quantised to.
    isa : str or None
        Name of the ISA to use; None for the best (or the one that ``MARLIN_CY_ISA`` names).
    """

    def __cinit__(self, int num_threads, str compute_dtype, isa=None):
        self.isa = choose_isa()[0] if isa is None else isa
        self.table = table_of(self.isa)
        self.num_threads = num_threads
        self.planes = PLANES[compute_dtype]

    def __dealloc__(self):
        PyMem_RawFree(self.lists.base)
        PyMem_RawFree(self.scratch.base)

    cdef void *reserve(self, buffer *which, size_t size) except NULL:
        """At least ``size`` bytes, aligned; what the buffer held is lost when it grows."""
        if which.size >= size and which.data is not NULL:
            return which.data
        cdef void *base = PyMem_RawMalloc(size + ALIGNMENT)
        if base is NULL:
            raise MemoryError(f"workspace: could not allocate {size} bytes")
        PyMem_RawFree(which.base)
        which.base = base
        which.data = <void *>(((<uintptr_t>base) + ALIGNMENT - 1) & ~(<uintptr_t>ALIGNMENT - 1))
        which.size = size
        return which.data

    cdef int enter(self) except -1:
        """Claim the workspace for one call; the GIL makes this atomic."""
        if self.busy:
            raise ContextInUse(
                "ctx: in use by another thread; a context serves one thread at a time, so make one for each thread"
            )
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False

    def zero_scratch(self):
        """Zero the scratch memory, the split-K slots among it."""
        self.enter()
        if self.scratch.data is not NULL:
            memset(self.scratch.data, 0, self.scratch.size)
        self.leave()

    @property
    def nbytes(self):
        """Bytes held."""
        return self.lists.size + self.scratch.size
