"""Launching one kernel many times with little host time."""

from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any, cast

import pyopencl as cl

from marlin_cy.opencl.arguments import Arguments, is_local, is_pointer, numpy_types

__all__ = ["Launch", "Recorder", "bound_kernel"]

NOTHING = object()  # equal to no values


class Recorder:
    """Takes the place of a queue where a launch is to be kept for later, not enqueued."""

    def add(
        self, kernel: cl.Kernel, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: Any
    ) -> None:
        """Keep a launch of a kernel object that nothing else uses, and whose arguments are set."""
        raise NotImplementedError


def bound_kernel(kernel: cl.Kernel, table: Arguments, values: Mapping[str, Any]) -> cl.Kernel:
    """A kernel object with all of its arguments set, by name. Sizes of local memory are numbers of bytes."""
    kernel.set_arg_types(numpy_types(table))
    in_order: list[Any] = [
        cl.LocalMemory(values[name]) if is_local(kind) else values[name] for name, kind in table.items()
    ]
    kernel.set_args(*in_order)
    return kernel


class Launch:
    """A kernel that is launched many times.

    Setting thirty arguments takes the host longer than enqueuing the kernel. So numbers, and sizes of local memory,
    are set only if one of them has changed since the last call, and a NULL pointer is set once. Buffers are set in
    every call: remembering them would keep them alive, and a new buffer may have the address of a freed one.

    Parameters
    ----------
    kernel : pyopencl.Kernel
        Not used by anything else.
    arguments : mapping of str to str
        The kernel's table in :mod:`marlin_cy.opencl.arguments`.
    constants : mapping of str to object, optional
        Arguments that are the same in every call.
    changing : collection of str, optional
        Numbers that differ from call to call. They are NumPy scalars of their type, and set in every call, as buffers
        are.
    """

    def __init__(
        self,
        kernel: cl.Kernel,
        arguments: Arguments,
        constants: Mapping[str, Any] | None = None,
        *,
        changing: Collection[str] = (),
    ) -> None:
        self._kernel, self._arguments, self._constants = kernel, arguments, dict(constants or {})
        self._given = [name for name in arguments if name not in self._constants]
        positions = {name: position for position, name in enumerate(arguments)}
        # Of arguments that are set in every call: the position in the kernel, and in a call's arguments.
        self._always: list[tuple[int, int]] = []
        self._numbers: list[int] = []
        for place, name in enumerate(self._given):
            if name in changing or (is_pointer(arguments[name]) and not is_local(arguments[name])):
                self._always.append((positions[name], place))
            else:
                self._numbers.append(place)
        self._set = self._always  # without the NULLs of the last call that set all arguments
        self._remembered = getter([])  # the numbers and the NULLs of that call
        self._last: Any = NOTHING

    def __call__(
        self,
        queue: cl.CommandQueue,
        global_size: tuple[int, ...],
        local_size: tuple[int, ...] | None,
        arguments: tuple[Any, ...],
        waits: list[cl.Event] | None = None,
    ) -> cl.Event:
        """Enqueue the kernel.

        Parameters
        ----------
        queue : pyopencl.CommandQueue or Recorder
        global_size, local_size : tuple of int
        arguments : tuple
            Every argument but the constants, in the order of the table: a buffer or None for a global pointer, a number
            of bytes for a local one. The functions that :func:`~marlin_cy.opencl.arguments.by_name` made give this
            order to arguments by name.
        waits : list of pyopencl.Event, optional

        Raises
        ------
        TypeError
            The number of arguments is wrong. Checked whenever all arguments are set, as in the first call.
        """
        if isinstance(queue, Recorder):
            self._record(queue, global_size, local_size, arguments)
            return cast("cl.Event", None)  # there is no event yet
        kernel = self._kernel
        if self._remembered(arguments) == self._last:
            for position, place in self._set:
                kernel.set_arg(position, arguments[place])
        else:
            self._set_all(arguments)
        return cl.enqueue_nd_range_kernel(queue, kernel, global_size, local_size, None, waits)

    def _record(
        self,
        recorder: Recorder,
        global_size: tuple[int, ...],
        local_size: tuple[int, ...] | None,
        arguments: tuple[Any, ...],
    ) -> None:
        """Give the recorder a kernel object of its own, with all arguments set."""
        values = {**self._constants, **dict(zip(self._given, arguments, strict=True))}
        kernel = cl.Kernel(self._kernel.program, self._kernel.function_name)
        recorder.add(bound_kernel(kernel, self._arguments, values), global_size, local_size, list(values.values()))

    def _set_all(self, arguments: tuple[Any, ...]) -> None:
        if len(arguments) != len(self._given):
            raise TypeError(
                f"arguments of {self._kernel.function_name}: got {len(arguments)}, expected {len(self._given)}: "
                f"{', '.join(self._given)}"
            )
        values = {**self._constants, **dict(zip(self._given, arguments, strict=True))}
        self._last = NOTHING
        bound_kernel(self._kernel, self._arguments, values)
        nulls = [place for _, place in self._always if arguments[place] is None]
        self._set = [(position, place) for position, place in self._always if arguments[place] is not None]
        self._remembered = getter([*self._numbers, *nulls])
        self._last = self._remembered(arguments)


def getter(places: list[int]) -> Callable[[tuple[Any, ...]], Any]:
    """A function that takes some of a tuple's elements."""
    return itemgetter(*places) if places else lambda values: None
