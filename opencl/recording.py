"""Launches that are prepared once and enqueued many times: kernel objects with all arguments set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy.typing as npt
import pyopencl as cl

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

    def enqueue(self, queue: cl.CommandQueue, known: Any = None) -> list[tuple[str, cl.Event]]:
        """Enqueue all launches; ``known`` is passed to the functions among the sizes. Returns labels and events."""
        launch, events = cl.enqueue_nd_range_kernel, []
        for (kernel, size, local), label in zip(self._launches, self.labels, strict=True):
            if not isinstance(size, tuple):
                found = size(known)
                if found is None:
                    continue
                size = found
            events.append((label, launch(queue, kernel, size, local)))
        return events


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
