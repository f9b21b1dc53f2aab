"""Launching one kernel again and again at little cost to the host."""

from operator import itemgetter

import pyopencl as cl

__all__ = ["Launch"]


class Launch:
    """A kernel of its own, whose first arguments stay and whose other numbers rarely change.

    Setting thirty arguments takes a host longer than enqueuing the kernel. So numbers are set when one of them
    differs from the last call's; buffers always are, as none is kept alive (or found again) by being remembered.

    Parameters
    ----------
    kernel : pyopencl.Kernel
        Used by nobody else.
    argument_types : tuple
        As for ``pyopencl.Kernel.set_arg_types``: None for a buffer, else a NumPy type.
    constants : tuple
        The first arguments.
    """

    def __init__(self, kernel, argument_types, constants):
        kernel.set_arg_types(argument_types)
        self._kernel, self._constants, self._last = kernel, constants, None
        rest = argument_types[len(constants) :]
        self._buffers = [(len(constants) + i, i) for i, kind in enumerate(rest) if kind is None]
        self._numbers = itemgetter(*(i for i, kind in enumerate(rest) if kind is not None))

    def __call__(self, queue, global_size, local_size, arguments, waits=None):
        """Enqueue it; returns the event.

        Parameters
        ----------
        queue : pyopencl.CommandQueue
        global_size, local_size : tuple of int
        arguments : tuple
            Those after the constants.
        waits : list of pyopencl.Event, optional
        """
        kernel, numbers = self._kernel, self._numbers(arguments)
        if numbers == self._last:
            for position, index in self._buffers:
                kernel.set_arg(position, arguments[index])
        else:
            self._last = None
            kernel.set_args(*self._constants, *arguments)
            self._last = numbers
        return cl.enqueue_nd_range_kernel(queue, kernel, global_size, local_size, None, waits)
