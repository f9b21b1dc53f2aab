"""The CPU's context: threads, precision and workspace of calls."""

from marlin_cy.cpu._workspace import PLANES, Workspace
from marlin_cy.interface import Backend, Context
from marlin_cy.threads import checked_num_threads

__all__ = ["CpuContext", "workspace_of"]


class CpuContext(Context):
    """Threads, precision and workspace of CPU calls.

    Parameters
    ----------
    backend : CpuBackend
    num_threads : int, optional
        Threads that a call uses, 1 to 4096. By default ``OMP_NUM_THREADS``, or else the CPUs that this process may
        use, see :func:`marlin_cy.threads.default_num_threads`.
    compute_dtype : {"int16", "int8"}
        The type that activations are quantised to, per row and group of K. "int16": the relative error of a product
        is 2.5e-5 on normal data. "int8": 6.5e-3; up to twice as fast if arithmetic is the limit.
    isa : str, optional
        Instruction set to use. By default ``MARLIN_CY_ISA``, or else the best of this machine.

    Raises
    ------
    TypeError, ValueError
        An invalid option.
    """

    def __init__(
        self, backend: Backend, num_threads: int | None = None, compute_dtype: str = "int16", isa: str | None = None
    ) -> None:
        threads = checked_num_threads(num_threads)
        if not isinstance(compute_dtype, str) or compute_dtype not in PLANES:
            raise ValueError(f"compute_dtype: got {compute_dtype!r}, expected one of {', '.join(PLANES)}")
        if isa is not None and not isinstance(isa, str):
            raise TypeError(f"isa: got {type(isa).__name__}, expected str or None")
        self._backend = backend
        self._compute_dtype = compute_dtype
        self.workspace = Workspace(threads, compute_dtype, isa)

    def __repr__(self) -> str:
        return f"CpuContext(num_threads={self.num_threads}, compute_dtype={self.compute_dtype!r}, isa={self.isa!r})"

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def num_threads(self) -> int:
        """Threads that a call uses."""
        return self.workspace.num_threads

    @property
    def compute_dtype(self) -> str:
        """ "int16" or "int8"."""
        return self._compute_dtype

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return self.workspace.isa


def workspace_of(ctx: Context) -> Workspace:
    """The workspace of a CPU context.

    Raises
    ------
    TypeError
        ``ctx`` is not a CPU context.
    """
    if not isinstance(ctx, CpuContext):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected a CpuContext from CpuBackend.new_context")
    return ctx.workspace
