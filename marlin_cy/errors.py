"""The exception types of this library.

An invalid argument (dtype, shape, range) raises a built-in ``TypeError``, ``ValueError`` or ``IndexError``. Its
message names the argument, the value it got and the value that was expected. The classes below are for all other
failures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "BackendUnavailable",
    "BatchError",
    "BuildError",
    "CheckpointError",
    "ContextInUse",
    "DeviceError",
    "DeviceMemoryError",
    "GroupError",
    "MarlinError",
    "UnsupportedError",
]


class MarlinError(Exception):
    """Base class of the exceptions of this library."""


class UnsupportedError(MarlinError, NotImplementedError):
    """A valid request that this backend or format does not support, such as 3-bit weights."""


class BackendUnavailable(MarlinError, ImportError):
    """A backend cannot run on this machine. The message says why, and what to install."""


class ContextInUse(MarlinError, RuntimeError):
    """A :class:`~marlin_cy.interface.Context` was entered by two threads at once."""


class BatchError(MarlinError):
    """Some prompts of a batch failed. All others were continued to their end.

    Parameters
    ----------
    errors : mapping of int to MarlinError
        By the index of the prompt, at least one.

    Attributes
    ----------
    texts : list of str
        From ``generate_batch``: the text of every prompt. That of a prompt that failed ends before the failure.
    """

    def __init__(self, errors: Mapping[int, MarlinError]) -> None:
        self.errors = dict(errors)
        self.texts: list[str] = []
        super().__init__("; ".join(f"prompts[{index}]: {error}" for index, error in sorted(self.errors.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors,), {"texts": self.texts}


class BuildError(MarlinError, RuntimeError):
    """A device's compiler rejected a program.

    Parameters
    ----------
    program : str
        The file of the program.
    options : sequence of str
        The compiler's options.
    device : str
        The device's name.
    log : str
        The compiler's output.
    """

    def __init__(self, program: str, options: Sequence[str], device: str, log: str) -> None:
        self.program = program
        self.options = tuple(options)
        self.device = device
        self.log = log
        super().__init__(f"{program} does not build on {device} with options {' '.join(options) or '(none)'}:\n{log}")

    def __reduce__(self) -> tuple[type[BuildError], tuple[Any, ...]]:
        return type(self), (self.program, self.options, self.device, self.log)


class DeviceError(MarlinError, RuntimeError):
    """A device or its driver fails. The message names the device; ``__cause__`` is the driver's error.

    The outputs of the failed call are undefined. Nothing else has changed, and the call may be repeated. If the
    device was lost, all its buffers and stacks are lost, and every call that uses them raises this error. A whole model
    is not used again after this error: see :class:`~marlin_cy.decoder.model.Model`.
    """


class DeviceMemoryError(MarlinError, MemoryError):
    """A device has too little memory. The message has the requested and the available size."""


class GroupError(MarlinError, RuntimeError):
    """The hosts of a :class:`~marlin_cy.distributed.Group` do not run alike: one is lost, or has other arguments."""


class CheckpointError(MarlinError, ValueError):
    """A checkpoint is damaged or inconsistent.

    Parameters
    ----------
    reason : str
        What is wrong: the value that was found and the value that was expected.
    file : path-like, optional
        The file with the fault.
    tensor : str, optional
        The invalid or missing tensor.
    """

    def __init__(self, reason: str, *, file: str | os.PathLike[str] | None = None, tensor: str | None = None) -> None:
        self.reason = reason
        self.file = None if file is None else str(file)
        self.tensor = tensor
        where = [] if self.file is None else [self.file]
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)
