"""Checked access to the device arrays that callers pass in.

Every check that a call makes on its buffers is here, so that messages read alike (and like the CPU's):
the argument, what it got, what was expected. Nothing here reads a device's memory.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pyopencl as cl
from pyopencl.array import Array

__all__ = [
    "TYPES",
    "TYPE_CODES",
    "Rows",
    "Vector",
    "as_bytes",
    "check_contiguous",
    "array_info",
    "float_rows",
    "int32_vector",
    "mark_written",
    "refuse_overlap",
    "wait_list",
]

# The kernels' names for element types (common.cl), and back.
TYPE_CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
TYPES = tuple(TYPE_CODES)
INT32 = np.dtype(np.int32)
KEPT = "_marlin_cy_examined"  # the attribute of an array that holds its ArrayInfo
MAX_INT32 = 2**31 - 1


class Rows(NamedTuple):
    """An array as rows of ``width`` floats."""

    data: cl.MemoryObjectHolder | None  # None where there are no elements
    offset: int  # elements before the first
    type_code: int
    rows: int
    width: int


class Vector(NamedTuple):
    """An array of int32 in a row."""

    data: cl.MemoryObjectHolder | None
    offset: int  # elements before the first
    length: int


class ArrayInfo:
    """What was found out about an array, once: queries of OpenCL objects add up to more than a launch costs.

    It is kept with the array, and holds as long as the array's own attributes are the same objects.
    """

    __slots__ = (
        *("begin", "context", "data", "dtype", "end", "offset", "rows", "shape", "strides", "vector", "whole"),
        "writer",  # the event of the last call that wrote the array, and that call's queue
    )

    def __init__(self, array, name, context):
        self.data, self.offset, self.context = array.base_data, array.offset, context
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.rows, self.vector, self.writer = {}, None, (None, None)
        self.whole = self.begin = self.end = 0
        data = self.data
        if not array.dtype.isnative:
            raise TypeError(f"{name}: got dtype {array.dtype.str!r}, which is not in this machine's byte order")
        if data is None:
            return
        if not isinstance(data, cl.MemoryObjectHolder):
            raise TypeError(f"{name}: got an array in {type(data).__name__}, expected one in a pyopencl.Buffer")
        if data.context != context:
            raise ValueError(f"{name}: got an array of another OpenCL context, expected one of the backend's")
        if array.offset % array.dtype.itemsize:
            raise ValueError(f"{name}: got data that is not aligned to its dtype {array.dtype}")
        # Others than contiguous arrays are refused, for what they are, by all who use them.
        if array.flags.c_contiguous and array.offset + array.nbytes > data.size:
            raise ValueError(
                f"{name}: got shape {array.shape} from byte {array.offset} on, which its buffer of {data.size} bytes "
                "is too small for"
            )
        # Sub-buffers are parts of what they were cut from.
        whole = data.associated_memobject
        self.whole = (data if whole is None else whole).int_ptr
        self.begin = array.offset + (0 if whole is None else data.get_info(cl.mem_info.OFFSET))
        self.end = self.begin + array.nbytes

    def is_of(self, array, context):
        """Whether the array is what it was."""
        return (
            self.data is array.base_data
            and self.offset == array.offset
            and self.shape is array.shape
            and self.strides is array.strides
            and self.dtype is array.dtype
            and self.context is context
        )


def array_info(array, name, context):
    """The :class:`ArrayInfo` of an array; refuses what is no array of this context."""
    if not isinstance(array, Array):
        if isinstance(array, np.ndarray):
            raise TypeError(
                f"{name}: got a numpy.ndarray, which lies on the host, expected a pyopencl.array.Array; "
                "Backend.from_host makes one"
            )
        raise TypeError(f"{name}: got {type(array).__name__}, expected a pyopencl.array.Array")
    found = array.__dict__.get(KEPT)
    if found is None or not found.is_of(array, context):
        found = ArrayInfo(array, name, context)
        setattr(array, KEPT, found)
    return found


def float_rows(array, name, width, context, writeable=False):
    """``array`` as rows of ``width`` floats: ``[rows, width]``, or flat with a whole number of rows."""
    found = array_info(array, name, context)
    rows = found.rows.get((width, writeable))
    if rows is None:
        rows = found.rows[width, writeable] = new_rows(array, name, width, writeable)
    return rows


def new_rows(array, name, width, writeable):
    shape, type_code = array.shape, TYPE_CODES.get(array.dtype)
    if type_code is None:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if len(shape) not in (1, 2):
        raise ValueError(f"{name}: got shape {shape}, expected [rows, {width}] or flat")
    check_contiguous(array, name)
    if writeable and array.base_data is not None and array.base_data.flags & cl.mem_flags.READ_ONLY:
        raise ValueError(f"{name}: got a read-only buffer, expected a writeable one")
    if len(shape) == 2 and shape[1] != width:
        raise ValueError(f"{name}: got shape {shape}, expected [rows, {width}]")
    rows, rest = divmod(array.size, width)
    if rest:
        raise ValueError(f"{name}: got {array.size} elements, expected a multiple of {width}, the row length")
    if rows > MAX_INT32:
        raise ValueError(f"{name}: got {rows} rows, expected fewer than 2**31")
    return Rows(array.base_data, array.offset // array.dtype.itemsize, type_code, rows, width)


def check_contiguous(array, name):
    """Refuse rows that do not follow each other."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: got strides {array.strides} for shape {array.shape}, expected C-contiguous rows")


def int32_vector(array, name, context):
    """``array`` as a vector of int32; one of a single element may have any shape."""
    found = array_info(array, name, context)
    if found.vector is None:
        if array.dtype != INT32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
        if (len(array.shape) != 1 and array.size != 1) or not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: got shape {array.shape} with strides {array.strides}, expected a contiguous vector"
            )
        found.vector = Vector(array.base_data, array.offset // 4, array.size)
    return found.vector


def refuse_overlap(output, input, name):
    """Refuse an output that shares bytes with an input; both were array_info before."""
    out, inp = getattr(output, KEPT), getattr(input, KEPT)
    if out.whole == inp.whole and out.begin < inp.end and inp.begin < out.end:
        raise ValueError(f"{name}: shares memory with the input, expected separate arrays")


def mark_written(array, event, queue):
    """Remember that a call on a queue wrote an array, so that :func:`wait_list` need not ask the driver."""
    found = array.__dict__.get(KEPT)
    if found is not None:
        found.writer = event, queue


def wait_list(queue, arrays):
    """Events that a command on the in-order ``queue`` must wait for before it touches ``arrays``; None for none."""
    events = None
    for array in arrays:
        for event in array.events:
            found = array.__dict__.get(KEPT)
            if found is not None and found.writer[0] is event and found.writer[1] is queue:
                continue
            try:
                here = event.command_queue == queue
            except cl.Error:  # its queue is gone, and not every driver's events keep theirs
                here = False
            if not here:
                events = [event] if events is None else [*events, event]
    return events


def as_bytes(array):
    """The bytes of a C-contiguous ndarray, which PyOpenCL takes whatever the dtype (NumPy's buffer protocol
    knows no bfloat16)."""
    return array.reshape(-1).view(np.uint8)
