"""The exception types that are this library's own.

A caller's mistake (wrong dtype, shape, range) is a built-in ``TypeError``, ``ValueError`` or
``IndexError`` whose message names the argument, what it got and what was expected. The classes
below say what those three cannot.
"""

__all__ = [
    "BackendUnavailable",
    "BuildError",
    "CheckpointError",
    "ContextInUse",
    "DeviceError",
    "DeviceMemoryError",
    "MarlinError",
    "UnsupportedError",
]


class MarlinError(Exception):
    """Base class of this library's own exceptions."""


class UnsupportedError(MarlinError, NotImplementedError):
    """The request is well formed, but this backend or format cannot do it (3-bit weights, say)."""


class BackendUnavailable(MarlinError, ImportError):
    """A backend cannot run on this machine. The message says why and what to install."""


class ContextInUse(MarlinError, RuntimeError):
    """A :class:`~marlin_cy.interface.Context` was entered by two threads at once."""


class BuildError(MarlinError, RuntimeError):
    """A device's compiler refused a program.

    Parameters
    ----------
    program : str
        The file whose program it was.
    options : sequence of str
        The compiler's options.
    device : str
        The device's name.
    log : str
        What the compiler said.
    """

    def __init__(self, program, options, device, log):
        self.program = program
        self.options = tuple(options)
        self.device = device
        self.log = log
        super().__init__(f"{program} does not build on {device} with options {' '.join(options) or '(none)'}:\n{log}")

    def __reduce__(self):
        return type(self), (self.program, self.options, self.device, self.log)


class DeviceError(MarlinError, RuntimeError):
    """A device fails, or is gone. The message names it, and what its driver says; ``__cause__`` is the driver's error.

    What the failed call would have written may hold anything. Nothing else has changed: the same call may be
    made again. If the device was lost, so are all buffers and stacks on it, and every call says so again.
    """


class DeviceMemoryError(MarlinError, MemoryError):
    """A device has too little memory. The message says what was asked for and what there is."""


class CheckpointError(MarlinError, ValueError):
    """A checkpoint is damaged, or contradicts itself.

    Parameters
    ----------
    reason : str
        What is wrong, with what was found and what was expected.
    file : path-like, optional
        The file in which it was found.
    tensor : str, optional
        The tensor that is wrong or missing.
    """

    def __init__(self, reason, *, file=None, tensor=None):
        self.reason = reason
        self.file = None if file is None else str(file)
        self.tensor = tensor
        where = [self.file] if file is not None else []
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)
