"""Launches that are prepared once and enqueued many times: kernel objects with all arguments set."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.opencl._launches import enqueue_launches
from marlin_cy.opencl.arguments import Arguments
from marlin_cy.opencl.context import ARRIVED, OpenClContext
from marlin_cy.opencl.launch import Recorder, bound_kernel
from marlin_cy.opencl.memory import uploaded

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["GlobalSize", "Recording", "RecordingContext"]

GlobalSize: TypeAlias = tuple[int, ...] | Callable[[Any], "tuple[int, ...] | None"]
"""A launch's number of work-items; or a function from what is known at the time of the call, which returns None to
leave the launch out."""


class Recording(Recorder):
    """A list of launches.

    Attributes
    ----------
    labels : list of str
        Of each launch.
    """

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._launches: list[tuple[cl.Kernel, GlobalSize, tuple[int, ...] | None]] = []
        # OpenCL's kernel objects do not keep the buffers of their arguments alive.
        self._kept: list[Any] = []
        self._table: npt.NDArray[np.uintp] | None = None
        self._known: Any = UNKNOWN  # that of the sizes in the table
        self._sized: list[tuple[int, Callable[[Any], tuple[int, ...] | None]]] = []

    def __len__(self) -> int:
        return len(self._launches)

    def add(
        self, kernel: cl.Kernel, global_size: GlobalSize, local_size: tuple[int, ...] | None, arguments: Any
    ) -> None:
        self._launches.append((kernel, global_size, local_size))
        self.labels.append(kernel.function_name)
        self._kept.append(arguments)

    def keep(self, thing: Any) -> None:
        """Keep an object alive as long as the recording."""
        self._kept.append(thing)

    def enqueue(self, queue: cl.CommandQueue, known: Any = None) -> None:
        """Enqueue all launches. No launch is added after the first call.

        ``known`` is passed to the functions among the sizes. Its type compares by value.
        """
        table = self._sized_for(known)
        function, handle, end = enqueue_function(), queue.int_ptr, len(table)
        begin = 0
        while (begin := enqueue_launches(function, handle, table, begin)) < end:
            # PyOpenCL repeats a launch that failed: it frees memory first, or raises the error.
            kernel, _, local = self._launches[begin]
            dimensions = int(table[begin, 1])
            cl.enqueue_nd_range_kernel(queue, kernel, tuple(table[begin, 2 : 2 + dimensions].tolist()), local)
            begin += 1

    def enqueue_with_events(self, queue: cl.CommandQueue, known: Any = None) -> list[tuple[str, cl.Event]]:
        """As :meth:`enqueue`. Returns the label and the event of each launch."""
        launch, events = cl.enqueue_nd_range_kernel, []
        for (kernel, size, local), label in zip(self._launches, self.labels, strict=True):
            found = size if isinstance(size, tuple) else size(known)
            if found is not None:
                events.append((label, launch(queue, kernel, found, local)))
        return events

    def _sized_for(self, known: Any) -> npt.NDArray[np.uintp]:
        """The table of :func:`enqueue_launches`, with the sizes for ``known``."""
        table = self._table
        if table is None:
            table = self._table = np.zeros((len(self._launches), 8), np.uintp)
            for place, (kernel, size, local) in enumerate(self._launches):
                table[place, 0] = kernel.int_ptr
                if local is not None:
                    table[place, 5 : 5 + len(local)] = local
                if isinstance(size, tuple):
                    set_size(table[place], size)
                else:
                    self._sized.append((place, size))
        if self._known is UNKNOWN or known != self._known:
            for place, sized in self._sized:
                set_size(table[place], sized(known))
            self._known = known
        return table


UNKNOWN = object()


def set_size(row: npt.NDArray[np.uintp], size: tuple[int, ...] | None) -> None:
    """Set the global size of a launch; None: it is left out."""
    row[1] = 0 if size is None else len(size)
    if size is not None:
        row[2 : 2 + len(size)] = size


@functools.cache
def enqueue_function() -> int:
    """The address of clEnqueueNDRangeKernel in the OpenCL library that PyOpenCL uses.

    On Windows, a handle does not give the functions of the libraries that it depends on.
    """
    library = ctypes.CDLL("OpenCL.dll" if os.name == "nt" else cl._cl.__file__)
    address = ctypes.cast(library.clEnqueueNDRangeKernel, ctypes.c_void_p).value
    assert address is not None
    return address


class RecordingContext(OpenClContext):
    """A context whose calls are recorded, not enqueued. It has a workspace of its own.

    Parameters
    ----------
    backend : OpenClBackend
    queue : pyopencl.CommandQueue
        The queue on which the recordings will be enqueued.

    Attributes
    ----------
    recording : Recording
        The launches since the last :meth:`begin`.
    grown : bool
        Whether a buffer of the workspace was replaced by a larger one since the last :meth:`begin`. Recordings refer to
        the buffer that was replaced.
    """

    def __init__(self, backend: OpenClBackend, queue: cl.CommandQueue) -> None:
        super().__init__(backend, queue)
        self.begin()

    def begin(self) -> None:
        """Begin a new recording."""
        self.recording, self.grown = Recording(), False

    @property
    def queue(self) -> cl.CommandQueue:
        """The recording, in place of a queue: a :class:`~marlin_cy.opencl.launch.Launch` recognises it."""
        return cast("cl.CommandQueue", self.recording)

    def reserve(self, purpose: str, nbytes: int) -> cl.Buffer:
        before = self._workspace.get(purpose)
        buffer = super().reserve(purpose, nbytes)
        self.grown = self.grown or (before is not None and buffer is not before)
        return buffer

    def upload(self, purpose: str, array: npt.NDArray[Any]) -> cl.Buffer:
        """A constant buffer, which the recording keeps."""
        return uploaded(self.backend.runtime, array, purpose)

    def arrival_counter(self) -> tuple[cl.Buffer, int]:
        """A launch before the one that counts sets the counter to 0: see ``norm_rows``."""
        return self.reserve(ARRIVED, 4), 0

    def log(self, label: str, event: cl.Event) -> cl.Event:
        """Name the last launch."""
        self.recording.labels[-1] = label
        return event

    def record(
        self,
        file: str,
        name: str,
        macros: Mapping[str, int],
        global_size: GlobalSize,
        local_size: tuple[int, ...] | None,
        table: Arguments,
        values: Mapping[str, Any],
        label: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Record a launch of a kernel.

        Parameters
        ----------
        file, name : str
            A ``.cl`` file without its suffix, and a kernel in it.
        macros : dict of str to int
        global_size : tuple of int, or callable
        local_size : tuple of int or None
        table : mapping of str to str
            The kernel's arguments.
        values : mapping of str to object
            The value of each.
        label : str, optional
        options : sequence of str, optional
            Of the compiler.
        """
        if values.keys() != table.keys():
            raise TypeError(f"arguments of {name}: got {sorted(values)}, expected {sorted(table)}")
        program = self.backend.runtime.programs.program(file, macros, options)
        kernel = bound_kernel(cl.Kernel(program, name), table, values)
        self.recording.add(kernel, global_size, local_size, list(values.values()))
        if label is not None:
            self.recording.labels[-1] = label
