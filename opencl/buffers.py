"""Checked access to the device arrays that callers pass in.

All checks of a call's buffers are here. Each message names the argument, what it got, and what was expected, in the
same words as the CPU backend's messages. Nothing here reads a device's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyopencl as cl
from pyopencl.array import Array

__all__ = [
    "TYPES",
    "TYPE_CODES",
    "WEIGHT_CODES",
    "Rows",
    "Vector",
    "array_info",
    "as_bytes",
    "check_contiguous",
    "float_rows",
    "flush_queues",
    "int32_vector",
    "mark_written",
    "memory_of",
    "refuse_overlap",
    "wait_list",
]

# The kernels' names for element types (common.cl), and back.
TYPE_CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
TYPES = tuple(TYPE_CODES)
WEIGHT_CODES = TYPE_CODES | {np.dtype(ml_dtypes.float8_e4m3fn): 3, np.dtype(np.int8): 4}
"""Element types of weights that are not quantised."""
INT32 = np.dtype(np.int32)
KEPT = "_marlin_cy_array_info"  # name of the attribute in which an array keeps its ArrayInfo
MAX_INT32 = 2**31 - 1


class Rows(NamedTuple):
    """An array as rows of ``width`` floats."""

    data: cl.Buffer | None  # None where there are no elements
    offset: int  # elements before the first
    type_code: int
    rows: int
    width: int


class Vector(NamedTuple):
    """A contiguous array of int32."""

    data: cl.Buffer | None
    offset: int  # elements before the first
    length: int


class ArrayInfo:
    """The properties of an array that the checks of a call use, read once.

    Querying the OpenCL objects in every call would take longer than a launch. The record is kept as an attribute of
    the array, and is valid as long as the array's own attributes are the same objects.
    """

    __slots__ = (
        *("begin", "context", "data", "dtype", "end", "offset", "rows", "shape", "strides", "vector", "whole"),
        "writer",  # the event of the last call that wrote the array, and that call's queue
    )

    def __init__(self, array: Array, name: str, context: cl.Context) -> None:
        self.data, self.offset, self.context = array.base_data, array.offset, context
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.rows: dict[tuple[int, bool], Rows] = {}
        self.vector: Vector | None = None
        self.writer: tuple[cl.Event | None, cl.CommandQueue | None] = (None, None)
        self.whole = self.begin = self.end = 0
        data = self.data
        if not array.dtype.isnative:
            raise TypeError(f"{name}: got dtype {array.dtype.str!r}, which is not in this machine's byte order")
        if data is None:
            return
        if not isinstance(data, cl.MemoryObjectHolder):
            raise TypeError(f"{name}: got an array in {type(data).__name__}, expected an array in a pyopencl.Buffer")
        if data.context != context:
            raise ValueError(f"{name}: got an array of another OpenCL context, expected the backend's")
        if array.offset % array.dtype.itemsize:
            raise ValueError(f"{name}: got data that is not aligned to its dtype {array.dtype}")
        # Non-contiguous arrays are rejected by the callers, whose messages can name the reason.
        if array.flags.c_contiguous and array.offset + array.nbytes > data.size:
            raise ValueError(
                f"{name}: got shape {array.shape} from byte {array.offset} on, which its buffer of {data.size} bytes "
                "is too small for"
            )
        # Two sub-buffers overlap if their ranges in the buffer that both belong to overlap.
        memory: Any = data  # PyOpenCL's annotations lack `associated_memobject`, and the result of `get_info`
        whole = memory.associated_memobject
        self.whole = (memory if whole is None else whole).int_ptr
        self.begin = array.offset + (0 if whole is None else memory.get_info(cl.mem_info.OFFSET))
        self.end = self.begin + array.nbytes

    def is_current(self, array: Array, context: cl.Context) -> bool:
        """Whether the array's attributes have not changed since they were read."""
        return (
            self.data is array.base_data
            and self.offset == array.offset
            and self.shape is array.shape
            and self.strides is array.strides
            and self.dtype is array.dtype
            and self.context is context
        )


def memory_of(array: Array) -> cl.Buffer | None:
    """The buffer of a device array; None if the array has no elements.

    PyOpenCL also has arrays in other kinds of memory: :func:`array_info` rejects them.
    """
    return cast("cl.Buffer | None", array.base_data)


def array_info(array: Any, name: str, context: cl.Context) -> ArrayInfo:
    """The :class:`ArrayInfo` of an array; refuses objects that are not device arrays of this context."""
    if not isinstance(array, Array):
        if isinstance(array, np.ndarray):
            raise TypeError(
                f"{name}: got a numpy.ndarray, which lies on the host, expected a pyopencl.array.Array; "
                "Backend.from_host makes one"
            )
        raise TypeError(f"{name}: got {type(array).__name__}, expected a pyopencl.array.Array")
    found: ArrayInfo | None = array.__dict__.get(KEPT)
    if found is None or not found.is_current(array, context):
        found = ArrayInfo(array, name, context)
        setattr(array, KEPT, found)
    return found


def float_rows(array: Any, name: str, width: int, context: cl.Context, writeable: bool = False) -> Rows:
    """``array`` as rows of ``width`` floats: ``[rows, width]``, or flat with a whole number of rows."""
    found = array_info(array, name, context)
    rows = found.rows.get((width, writeable))
    if rows is None:
        rows = found.rows[width, writeable] = new_rows(array, name, width, writeable)
    return rows


def new_rows(array: Array, name: str, width: int, writeable: bool) -> Rows:
    """:func:`float_rows` of an array that has not been checked for this width."""
    shape, type_code = array.shape, TYPE_CODES.get(array.dtype)
    if type_code is None:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if len(shape) not in (1, 2):
        raise ValueError(f"{name}: got shape {shape}, expected [rows, {width}] or flat")
    check_contiguous(array, name)
    data = memory_of(array)
    if writeable and data is not None and data.flags & cl.mem_flags.READ_ONLY:
        raise ValueError(f"{name}: got a read-only buffer, expected a writeable one")
    if len(shape) == 2 and shape[1] != width:
        raise ValueError(f"{name}: got shape {shape}, expected [rows, {width}]")
    rows, rest = divmod(array.size, width)
    if rest:
        raise ValueError(f"{name}: got {array.size} elements, expected a multiple of {width}, the row length")
    if rows > MAX_INT32:
        raise ValueError(f"{name}: got {rows} rows, expected fewer than 2**31")
    return Rows(data, array.offset // array.dtype.itemsize, type_code, rows, width)


def check_contiguous(array: Array, name: str) -> None:
    """Refuse an array whose rows are not contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: got strides {array.strides} for shape {array.shape}, expected C-contiguous rows")


def int32_vector(array: Any, name: str, context: cl.Context) -> Vector:
    """``array`` as a vector of int32; one of a single element may have any shape."""
    found = array_info(array, name, context)
    if found.vector is None:
        if array.dtype != INT32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
        if (len(array.shape) != 1 and array.size != 1) or not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: got shape {array.shape} with strides {array.strides}, expected a contiguous vector"
            )
        found.vector = Vector(memory_of(array), array.offset // 4, array.size)
    return found.vector


def refuse_overlap(output: Array, input: Array, name: str) -> None:
    """Refuse an output that shares bytes with an input; :func:`array_info` has checked both."""
    out, inp = getattr(output, KEPT), getattr(input, KEPT)
    if out.whole == inp.whole and out.begin < inp.end and inp.begin < out.end:
        raise ValueError(f"{name}: shares memory with the input, expected separate arrays")


def mark_written(array: Array, event: cl.Event, queue: cl.CommandQueue) -> None:
    """Note the event and the queue of a call that writes an array, so that :func:`wait_list` need not query them."""
    found = array.__dict__.get(KEPT)
    if found is not None:
        found.writer = event, queue


def wait_list(queue: cl.CommandQueue, arrays: Iterable[Array]) -> list[cl.Event] | None:
    """Events that a command on the in-order ``queue`` must wait for before it touches ``arrays``, or None.

    The caller's queues are flushed (:func:`flush_queues`). A queue of this library's contexts is not flushed, because
    each call has flushed it already.
    """
    events: list[cl.Event] = []
    foreign: list[cl.Event] = []
    for array in arrays:
        if not array.events:
            continue
        writer, its_queue = array.__dict__[KEPT].writer if KEPT in array.__dict__ else (None, None)
        for event in array.events:
            if event is writer:
                if its_queue != queue:
                    events.append(event)
            elif not same_queue(event, queue):
                events.append(event)
                foreign.append(event)
    flush_queues(foreign)
    return events or None


def same_queue(event: cl.Event, queue: cl.CommandQueue) -> bool:
    """Whether an event belongs to a command on ``queue``."""
    try:
        return bool(event.command_queue == queue)
    except cl.Error:  # its queue was released, and not every driver's events keep their queue
        return False


def flush_queues(events: Iterable[cl.Event]) -> None:
    """Flush the queues of some events, as OpenCL requires before another queue waits for them.

    Some drivers submit no command before a flush, so the wait would never end (see ``OpenClContext._submit``).
    """
    for event in events:
        # A user event has no queue; releasing a queue has flushed it.
        with contextlib.suppress(cl.Error):
            queue = event.command_queue
            if queue is not None:
                queue.flush()


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A C-contiguous ndarray as uint8, for PyOpenCL's copies: NumPy's buffer protocol does not support bfloat16."""
    return array.reshape(-1).view(np.uint8)
