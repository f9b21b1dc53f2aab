"""Checked access to the arrays and tensors that callers pass in.

All checks of a call's buffers are here, so that their messages have one form: the argument, what it got, what was
expected.
"""

import ml_dtypes
import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memcpy

from marlin_cy.cpu._dispatch cimport DTYPE_BF16, DTYPE_F16, DTYPE_F32

from marlin_cy.errors import UnsupportedError

cnp.import_array()

cdef int BFLOAT16_NUM = np.dtype(ml_dtypes.bfloat16).num

# PyTorch's class of tensors, and the numbers of its dtypes, once PyTorch is in use.
cdef object tensor_type = None
cdef dict tensor_dtypes = {}


def accept_tensors(new_type, dict names):
    """Read host tensors of PyTorch in place from now on, wherever ``float_matrix`` takes an array.

    A tensor costs a tenth of the time that its NumPy view does. PyTorch is not imported here, because most users of
    the library do not need it.

    Parameters
    ----------
    new_type : type
        ``torch.Tensor``.
    names : dict
        From PyTorch's dtypes to their names: "float32", "float16", "bfloat16".
    """
    global tensor_type, tensor_dtypes
    numbers = {"float32": DTYPE_F32, "float16": DTYPE_F16, "bfloat16": DTYPE_BF16}
    tensor_dtypes = {dtype: numbers[name] for dtype, name in names.items()}
    tensor_type = new_type


cdef matrix float_matrix(object array, str name, int64_t width, bint writeable) except *:
    """``array`` as rows of ``width`` floats: ``[rows, width]``, or flat with a whole number of rows.

    A tensor of PyTorch may have any number of dimensions, the last of which is ``width``.
    """
    if tensor_type is not None and isinstance(array, tensor_type):
        return tensor_matrix(array, name, width)
    check_ndarray(array, name)
    cdef cnp.ndarray a = <cnp.ndarray>array
    cdef matrix m
    cdef int num = cnp.PyArray_TYPE(a)
    if num == cnp.NPY_FLOAT32:
        m.dtype = DTYPE_F32
    elif num == cnp.NPY_FLOAT16:
        m.dtype = DTYPE_F16
    elif num == BFLOAT16_NUM:
        m.dtype = DTYPE_BF16
    else:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    cdef int ndim = cnp.PyArray_NDIM(a)
    if ndim != 1 and ndim != 2:
        raise ValueError(f"{name}: got shape {array.shape}, expected [rows, {width}] or flat")
    if not cnp.PyArray_IS_C_CONTIGUOUS(a):
        raise ValueError(f"{name}: got strides {array.strides} for shape {array.shape}, expected C-contiguous rows")
    if not cnp.PyArray_ISALIGNED(a):
        raise ValueError(f"{name}: got data that is not aligned to its dtype {array.dtype}")
    if writeable and not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name}: got a read-only array, expected a writeable one")
    cdef int64_t size = cnp.PyArray_SIZE(a)
    if ndim == 2 and cnp.PyArray_DIM(a, 1) != width:
        raise ValueError(f"{name}: got shape {array.shape}, expected [rows, {width}]")
    if size % width:
        raise ValueError(f"{name}: got {size} elements, expected a multiple of {width}, the row length")
    m.data = <char *>cnp.PyArray_DATA(a)
    m.rows = size // width
    m.width = width
    m.nbytes = cnp.PyArray_NBYTES(a)
    return m


cdef int tensor_dtype(object tensor, str name) except -1:
    """The dtype of a host tensor of PyTorch."""
    dtype = tensor_dtypes.get(tensor.dtype)
    if dtype is None:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, float16 or bfloat16")
    if not tensor.is_cpu or tensor.requires_grad:
        raise UnsupportedError(f"{name}: packed layers need host tensors without gradients")
    return dtype


cdef matrix tensor_matrix(object tensor, str name, int64_t width) except *:
    cdef matrix m
    m.dtype = tensor_dtype(tensor, name)
    if not tensor.ndim or tensor.size(-1) != width:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [..., {width}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected "
                         "contiguous rows")
    m.width, m.rows = width, <int64_t>tensor.numel() // width
    m.nbytes = m.rows * width * element_bytes(m.dtype)
    m.data = <char *><uintptr_t>tensor.data_ptr()
    return m


cdef int refuse_overlap(matrix output, matrix input, str name) except -1:
    cdef uintptr_t out = <uintptr_t>output.data, inp = <uintptr_t>input.data
    if out < inp + input.nbytes and inp < out + output.nbytes:
        raise ValueError(f"{name}: shares memory with the input, expected separate arrays")
    return 0


cdef const int32_t[::1] int32_copy(object array, str name, int64_t count):
    """A private copy of the first ``count`` elements of an int32 vector; of all if it has fewer."""
    check_ndarray(array, name)
    cdef cnp.ndarray a = <cnp.ndarray>array
    if cnp.PyArray_TYPE(a) != cnp.NPY_INT32:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
    if cnp.PyArray_NDIM(a) != 1 or not cnp.PyArray_IS_C_CONTIGUOUS(a) or not cnp.PyArray_ISALIGNED(a):
        raise ValueError(f"{name}: got shape {array.shape} with strides {array.strides}, expected a contiguous vector")
    cdef int64_t length = min(max(count, 0), <int64_t>cnp.PyArray_SIZE(a))
    copy = np.empty(length, np.int32)
    if length:
        memcpy(cnp.PyArray_DATA(<cnp.ndarray>copy), cnp.PyArray_DATA(a), length * sizeof(int32_t))
    return copy


cdef int check_ndarray(object array, str name) except -1:
    if not cnp.PyArray_Check(array):
        raise TypeError(f"{name}: got {type(array).__name__}, expected a numpy.ndarray")
    if not cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>array):
        raise TypeError(f"{name}: got dtype {array.dtype.str!r}, which is not in this machine's byte order")
    return 0
