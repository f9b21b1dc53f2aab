"""The CPU's context: threads, precision and workspace of calls."""

import os

from marlin_cy.arguments import integer
from marlin_cy.cpu._workspace import PLANES, Workspace, available_cpus
from marlin_cy.interface import Context

__all__ = ["CpuContext", "default_num_threads", "workspace_of"]


def default_num_threads():
    """``OMP_NUM_THREADS`` if it is set to a number, else the CPUs that this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.strip().isdecimal() and int(wanted) > 0:
        return int(wanted)
    return available_cpus()


class CpuContext(Context):
    """Threads, precision and workspace of CPU calls.

    Parameters
    ----------
    backend : CpuBackend
    num_threads : int, optional
        Threads a call uses; the CPUs that this process may run on (or ``OMP_NUM_THREADS``) unless given.
    compute_dtype : {"int16", "int8"}
        What activations are quantised to, per row and group of K. "int16": relative error 2.5e-5 of a
        product on normal data. "int8": 6.5e-3, and up to twice as fast where arithmetic is the limit.
    isa : str, optional
        Instruction set to use; the best of this machine (or ``MARLIN_CY_ISA``) unless given.

    Raises
    ------
    TypeError, ValueError
        An option that is not one of these.
    """

    def __init__(self, backend, num_threads=None, compute_dtype="int16", isa=None):
        threads = default_num_threads() if num_threads is None else integer("num_threads", num_threads)
        if not 1 <= threads <= 4096:
            raise ValueError(f"num_threads: got {threads}, expected 1 to 4096")
        if not isinstance(compute_dtype, str) or compute_dtype not in PLANES:
            raise ValueError(f"compute_dtype: got {compute_dtype!r}, expected one of {', '.join(PLANES)}")
        if isa is not None and not isinstance(isa, str):
            raise TypeError(f"isa: got {type(isa).__name__}, expected str or None")
        self._backend = backend
        self._compute_dtype = compute_dtype
        self.workspace = Workspace(threads, compute_dtype, isa)

    def __repr__(self):
        return f"CpuContext(num_threads={self.num_threads}, compute_dtype={self.compute_dtype!r}, isa={self.isa!r})"

    @property
    def backend(self):
        return self._backend

    @property
    def num_threads(self):
        """Threads a call uses."""
        return self.workspace.num_threads

    @property
    def compute_dtype(self):
        """ "int16" or "int8"."""
        return self._compute_dtype

    @property
    def isa(self):
        """Name of the instruction set in use."""
        return self.workspace.isa


def workspace_of(ctx):
    """The workspace of a CPU context."""
    if not isinstance(ctx, CpuContext):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected a CpuContext from CpuBackend.new_context")
    return ctx.workspace
