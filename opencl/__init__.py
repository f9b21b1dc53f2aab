"""The OpenCL backend.

In the order in which a call goes through the files::

    backend.py    the backend                             factory.py, command_line.py   what works without PyOpenCL
    device.py     platforms and devices, and the selection of a device
    context.py    a queue and its workspace               stack.py    stacks and linear layers
    store.py      packed weights in device memory         layout.py   their layout in plain NumPy
    buffers.py    checks of device arrays                 memory.py   errors of the driver, uploads
    tiers/        which kernels suit a device: wave_tiled.py (any vendor), mma.py (NVIDIA)
    gemm/         one product: kernels, grid, and the rows of each expert
    layer/        a MoE layer: routing, grouping of tokens by expert, both products, combination
    decoder/      a whole model, by launches that recording.py keeps: program.py is the way of a step
    kernels/      the device's code                       launch.py   launches with little overhead
    program.py    compiles programs and keeps them        tuning.py   measures the fastest configurations
    selfcheck.py  checks a tier's kernels against NumPy   timing.py   times from events
    surroundings.py  folders, where the user's cache folder cannot be written
    doctor.py, layer_measurement.py                       what the commands `doctor` and `run` show

PyOpenCL is imported when the backend is made, not before.
"""

from __future__ import annotations

from marlin_cy.opencl.surroundings import provide_folders

__all__ = ["availability"]


def availability() -> str | None:
    """Whether the backend can run here.

    Returns
    -------
    str or None
        None if it can. Otherwise a message that names the missing part (PyOpenCL, a platform, a device or a working
        driver) and the remedy.
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


provide_folders()  # before PyOpenCL is imported
