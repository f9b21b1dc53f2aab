"""The OpenCL backend's place. It holds no kernels, and says so."""

from importlib.util import find_spec

from marlin_cy.errors import BackendUnavailable

__all__ = ["availability", "backend"]


def availability():
    """Why the backend cannot be used.

    Returns
    -------
    str or None
        The reason; None would mean that it works. PyOpenCL is looked for, not imported.
    """
    pyopencl = "PyOpenCL is installed" if find_spec("pyopencl") else "PyOpenCL is not installed"
    return f"this version of marlin_cy has no OpenCL kernels ({pyopencl})"


def backend(**options):
    """The OpenCL backend.

    Raises
    ------
    BackendUnavailable
        Always: see :func:`availability`.
    """
    raise BackendUnavailable(f"backend 'opencl': {availability()}; use backend 'cpu'")
