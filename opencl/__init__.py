"""The OpenCL backend.

``stack.py`` implements the interface; below it, in the order in which a call goes through them::

    device.py     platforms, devices, which one is taken and what it can do
    tiers.py      which kernels suit it: wave_tiled.py (any vendor), mma.py (NVIDIA), configuration.py (their sizes)
    store.py      packed weights in device memory         layout.py   the same in plain NumPy
    buffers.py    checks arrays
    context.py    queue and workspace                     program.py  compiles and keeps programs
    gemm.py       one product: which kernels, which grid  work.py     which rows, with which experts
                                                          prepare.py  rows as a kernel reads them
                                                          launch.py   launches at little cost
    moe.py        a layer: both products, combination     routing.py  which experts tokens go to
                                                          align.py    pairs grouped by expert
    kernels/      the device's code
    selfcheck.py  a tier's kernels against NumPy
    tuning.py     which configurations are fastest here
    timing.py     what events say

PyOpenCL is imported when the backend is asked for, not before.
"""

from marlin_cy.errors import BackendUnavailable

__all__ = ["availability", "backend"]


def availability():
    """Whether the backend can run here.

    Returns
    -------
    str or None
        None if it can; else what is missing, and what to do: PyOpenCL, a platform, a device, or a
        driver that works.
    """
    try:
        from marlin_cy.opencl.device import reason_unavailable
    except ModuleNotFoundError as error:
        if error.name not in ("pyopencl", "platformdirs"):
            raise
        return "PyOpenCL is not installed; pip install 'marlin-cy[opencl]'"
    except ImportError as error:
        return f"PyOpenCL is installed but cannot be imported ({error}); pip install --force-reinstall pyopencl"
    return reason_unavailable()


def backend(**options):
    """The OpenCL backend.

    Parameters
    ----------
    **options
        Those of :class:`~marlin_cy.opencl.backend.OpenClBackend`.

    Raises
    ------
    BackendUnavailable
        It cannot run here: see :func:`availability`.
    """
    if reason := availability():
        raise BackendUnavailable(f"backend 'opencl': {reason}")
    from marlin_cy.opencl.backend import OpenClBackend

    return OpenClBackend(**options)
