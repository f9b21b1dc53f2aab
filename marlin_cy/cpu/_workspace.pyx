"""Growable scratch memory, owned by a context and reused by its calls.

A call reserves its memory before it releases the GIL. Nothing is allocated inside a parallel loop.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

from marlin_cy.cpu._dispatch cimport KernelTable, kernel_table

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
    """The number of CPUs in this process's affinity mask.

    This is OpenMP's own count: with ``OMP_PROC_BIND``, the thread that loads OpenMP is bound to a single CPU, and the
    operating system would count only that CPU.
    """
    return omp_get_num_procs()


cdef class Workspace:
    """Scratch memory and settings of one context.

    Parameters
    ----------
    num_threads : int
        At least 1.
    compute_dtype : {"int16", "int8"}
        The type that activations are quantised to.
    isa : str, KernelTable or None
        Name of the ISA to use, or its kernels; None for the one that ``MARLIN_CY_ISA`` names, or else the best.

    Attributes
    ----------
    kernels : KernelTable
    num_threads : int
    planes : int
        Bytes of a quantised activation.

    Raises
    ------
    ValueError
        An ISA that does not exist or cannot run here.
    """

    def __cinit__(self, int num_threads, str compute_dtype, isa=None):
        if isinstance(isa, KernelTable):
            self.kernels = isa
        else:
            self.kernels = kernel_table(choose_isa()[0] if isa is None else isa)
        self.table = &self.kernels.table
        self.num_threads = num_threads
        self.planes = PLANES[compute_dtype]

    def __dealloc__(self):
        PyMem_RawFree(self.lists.base)
        PyMem_RawFree(self.scratch.base)

    cdef void *reserve(self, buffer *which, size_t size) except NULL:
        """At least ``size`` bytes, aligned to 64. A buffer that grows loses its contents."""
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
        """Claim the workspace for one call. The GIL makes this atomic."""
        if self.busy:
            raise ContextInUse(
                "ctx: in use by another thread; a context serves one thread at a time, so make one for each thread"
            )
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False

    def zero_scratch(self):
        """Zero the scratch memory, including the split-K slots."""
        self.enter()
        if self.scratch.data is not NULL:
            memset(self.scratch.data, 0, self.scratch.size)
        self.leave()

    @property
    def isa(self):
        """Name of the instruction set in use."""
        return self.kernels.name

    @property
    def nbytes(self):
        """Bytes held."""
        return self.lists.size + self.scratch.size
