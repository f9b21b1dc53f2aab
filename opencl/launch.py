"""Launching one kernel many times at little cost to the host."""

from collections.abc import Collection, Mapping
from operator import itemgetter
from typing import Any

import pyopencl as cl

from marlin_cy.opencl.arguments import Arguments, is_local, is_pointer, numpy_types

__all__ = ["Launch"]


class Launch:
    """A kernel that is launched many times, with arguments by name.

    Setting thirty arguments takes the host longer than enqueuing the kernel. So numbers, and sizes of local memory,
    are set only when one of them differs from the last call's. Buffers are set in every call: remembering them would
    keep them alive, and a buffer that was freed may be followed by another at the same address.

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
        changing: Collection[str] = (),
    ) -> None:
        kernel.set_arg_types(numpy_types(arguments))
        self._kernel, self._arguments, self._constants = kernel, arguments, dict(constants or {})
        self._last: Any = None
        given = [(position, name) for position, name in enumerate(arguments) if name not in self._constants]
        self._set_always = [
            (position, name)
            for position, name in given
            if name in changing or (is_pointer(arguments[name]) and not is_local(arguments[name]))
        ]
        always = {name for _, name in self._set_always}
        self._numbers = itemgetter(*(name for _, name in given if name not in always))

    def __call__(
        self,
        queue: cl.CommandQueue,
        global_size: tuple[int, ...],
        local_size: tuple[int, ...] | None,
        arguments: Mapping[str, Any],
        waits: list[cl.Event] | None = None,
    ) -> cl.Event:
        """Enqueue the kernel.

        Parameters
        ----------
        queue : pyopencl.CommandQueue
        global_size, local_size : tuple of int
        arguments : mapping of str to object
            Every argument but the constants: a buffer or None for a global pointer, a number of bytes for a local one.
        waits : list of pyopencl.Event, optional

        Raises
        ------
        TypeError
            An argument that the kernel does not have, or one that is missing.
        """
        kernel = self._kernel
        try:
            numbers = self._numbers(arguments)
        except KeyError:
            raise self._wrong_names(arguments) from None
        if numbers == self._last:
            for position, name in self._set_always:
                kernel.set_arg(position, arguments[name])
        else:
            self._last = None
            self._set_all(arguments)
            self._last = numbers
        return cl.enqueue_nd_range_kernel(queue, kernel, global_size, local_size, None, waits)

    def _set_all(self, arguments: Mapping[str, Any]) -> None:
        values = {**self._constants, **arguments}
        if values.keys() != self._arguments.keys():
            raise self._wrong_names(arguments)
        in_order: list[Any] = [
            cl.LocalMemory(values[name]) if is_local(kind) else values[name] for name, kind in self._arguments.items()
        ]
        self._kernel.set_args(*in_order)

    def _wrong_names(self, arguments: Mapping[str, Any]) -> TypeError:
        expected = [name for name in self._arguments if name not in self._constants]
        return TypeError(
            f"arguments of {self._kernel.function_name}: got {', '.join(arguments)}, expected {', '.join(expected)}"
        )
