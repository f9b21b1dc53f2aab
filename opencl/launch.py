"""Launching one kernel many times with little host time."""

from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import pyopencl as cl

from marlin_cy.opencl.arguments import Arguments, is_local, is_pointer, numpy_types

__all__ = ["Launch"]

NO_WORK: Mapping[str, Any] = MappingProxyType({})


class Launch:
    """A kernel that is launched many times, with arguments by name.

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
    work : collection of str, optional
        Arguments that calls pass in a mapping of their own, which need not be merged with the others.
    """

    def __init__(
        self,
        kernel: cl.Kernel,
        arguments: Arguments,
        constants: Mapping[str, Any] | None = None,
        *,
        changing: Collection[str] = (),
        work: Collection[str] = (),
    ) -> None:
        kernel.set_arg_types(numpy_types(arguments))
        self._kernel, self._arguments, self._constants = kernel, arguments, dict(constants or {})
        given = [name for name in arguments if name not in self._constants]
        always = [
            name
            for name in given
            if name in changing or (is_pointer(arguments[name]) and not is_local(arguments[name]))
        ]
        numbers = [name for name in given if name not in always]
        self._always = [name for name in always if name not in work]
        self._always_work = [name for name in always if name in work]
        self._numbers = getter([name for name in numbers if name not in work])
        self._work_numbers = getter([name for name in numbers if name in work])
        self._last: Any = None  # the numbers and the NULLs of the last call
        self._nulls = getter([])
        self._set: list[tuple[int, str]] = []
        self._set_work: list[tuple[int, str]] = []

    def __call__(
        self,
        queue: cl.CommandQueue,
        global_size: tuple[int, ...],
        local_size: tuple[int, ...] | None,
        arguments: Mapping[str, Any],
        waits: list[cl.Event] | None = None,
        work: Mapping[str, Any] = NO_WORK,
    ) -> cl.Event:
        """Enqueue the kernel.

        Parameters
        ----------
        queue : pyopencl.CommandQueue
        global_size, local_size : tuple of int
        arguments : mapping of str to object
            Every argument but the constants and the work's: a buffer or None for a global pointer, a number of bytes
            for a local one.
        waits : list of pyopencl.Event, optional
        work : mapping of str to object, optional
            The work's arguments.

        Raises
        ------
        TypeError
            An argument that the kernel does not have, or one that is missing.
        """
        kernel = self._kernel
        try:
            now = self._numbers(arguments), self._work_numbers(work), self._nulls(arguments)
            if now == self._last:
                for position, name in self._set:
                    kernel.set_arg(position, arguments[name])
                for position, name in self._set_work:
                    kernel.set_arg(position, work[name])
            else:
                self._last = None
                self._set_all(arguments, work)
                self._last = *now[:2], self._nulls(arguments)
        except KeyError:
            raise self._wrong_names(arguments, work) from None
        return cl.enqueue_nd_range_kernel(queue, kernel, global_size, local_size, None, waits)

    def _set_all(self, arguments: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        values = {**self._constants, **arguments, **work}
        if values.keys() != self._arguments.keys():
            raise self._wrong_names(arguments, work)
        in_order: list[Any] = [
            cl.LocalMemory(values[name]) if is_local(kind) else values[name] for name, kind in self._arguments.items()
        ]
        self._kernel.set_args(*in_order)
        positions = {name: position for position, name in enumerate(self._arguments)}
        self._nulls = getter([name for name in self._always if values[name] is None])
        self._set = [(positions[name], name) for name in self._always if values[name] is not None]
        self._set_work = [(positions[name], name) for name in self._always_work]

    def _wrong_names(self, arguments: Mapping[str, Any], work: Mapping[str, Any]) -> TypeError:
        expected = [name for name in self._arguments if name not in self._constants]
        given = ", ".join((*arguments, *work))
        return TypeError(f"arguments of {self._kernel.function_name}: got {given}, expected {', '.join(expected)}")


def getter(names: list[str]) -> Callable[[Mapping[str, Any]], Any]:
    """A function that takes the values of some names from a mapping."""
    return itemgetter(*names) if names else lambda mapping: None
