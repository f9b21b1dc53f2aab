"""The row operations of a table of kernels (``ukernels/operations.h``), called on NumPy arrays, and on every ISA.

Strides come from the arrays: a row of an array may be followed by memory that does not belong to it.
"""

import ctypes

import ml_dtypes
import numpy as np
from asserts import GuardedArray, assert_same_bits
from conftest import ISAS

from marlin_cy.cpu._dispatch import CONSTANTS
from marlin_cy.cpu.backend import CpuBackend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    np.dtype(np.float32): CONSTANTS["DTYPE_F32"],
    np.dtype(np.float16): CONSTANTS["DTYPE_F16"],
    BFLOAT16: CONSTANTS["DTYPE_BF16"],
}
SCALED_DTYPES = {
    np.dtype(np.int8): CONSTANTS["DTYPE_I8"],
    np.dtype(ml_dtypes.float8_e4m3fn): CONSTANTS["DTYPE_F8"],
}
"""Of weights of dense products, with scales."""
LANES, KV_BLOCK, CHUNK_PAGES, ATTENTION_CHUNK, MAX_QUERIES, MAX_HEAD_DIM = (
    CONSTANTS[name] for name in ("LANES", "KV_BLOCK", "CHUNK_PAGES", "ATTENTION_CHUNK", "MAX_QUERIES", "MAX_HEAD_DIM")
)
SCRATCH_BYTES = 4 * (MAX_QUERIES * ATTENTION_CHUNK + MAX_HEAD_DIM * KV_BLOCK)

POINTER, INT, LONG, FLOAT, STRIDE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_ssize_t,
)


class DenseTask(ctypes.Structure):
    _fields_ = [
        ("x", POINTER),
        ("x_stride", STRIDE),
        ("m", LONG),
        ("w", POINTER),
        ("dtype", INT),
        ("w_stride", STRIDE),
        ("n", LONG),
        ("k", LONG),
        ("scales", POINTER),
        ("scale_stride", STRIDE),
        ("scale_k", LONG),
        ("bias", POINTER),
        ("out", POINTER),
        ("out_stride", STRIDE),
    ]


class AttentionTask(ctypes.Structure):
    _fields_ = [
        ("m", INT),
        ("d", INT),
        ("dv", INT),
        ("q", POINTER),
        ("q_stride", STRIDE),
        ("keys", POINTER),
        ("values", POINTER),
        ("key_stride", STRIDE),
        ("value_stride", STRIDE),
        ("pages", POINTER),
        ("dtype", INT),
        ("scale", FLOAT),
        ("soft_cap", FLOAT),
        ("begin", POINTER),
        ("end", POINTER),
        ("max", POINTER),
        ("sum", POINTER),
        ("out", POINTER),
        ("out_stride", STRIDE),
        ("scratch", POINTER),
    ]


class DeltaTask(ctypes.Structure):
    _fields_ = [
        ("tokens", LONG),
        ("key_dim", LONG),
        ("columns", LONG),
        ("q", POINTER),
        ("k", POINTER),
        ("q_stride", STRIDE),
        ("k_stride", STRIDE),
        ("v", POINTER),
        ("v_stride", STRIDE),
        ("decay", POINTER),
        ("beta", POINTER),
        ("gate_stride", STRIDE),
        ("state", POINTER),
        ("state_stride", STRIDE),
        ("y", POINTER),
        ("y_stride", STRIDE),
    ]


def function(*arguments):
    return ctypes.CFUNCTYPE(None, *arguments)


class Table(ctypes.Structure):
    """``ukernel_table`` of ``ukernel.h``."""

    _fields_ = [
        ("gemm", POINTER * (CONSTANTS["CODES_COUNT"] * CONSTANTS["MAX_PLANES"])),
        ("sizes", INT * 3),
        ("quantize_row", POINTER),
        ("widen", POINTER),
        ("narrow", function(POINTER, POINTER, INT, LONG)),
        ("store_rows", POINTER),
        ("glu_epilogue", POINTER),
        ("axpy", POINTER),
        ("softmax", POINTER),
        ("sigmoid", POINTER),
        ("rms_norm", function(POINTER, POINTER, POINTER, FLOAT, LONG)),
        ("gated_rms_norm", function(POINTER, POINTER, POINTER, POINTER, FLOAT, LONG)),
        ("l2_normalize", function(POINTER, FLOAT, LONG)),
        ("add", function(POINTER, POINTER, LONG)),
        ("rope", function(POINTER, POINTER, POINTER, LONG, INT)),
        ("sigmoid_gate", function(POINTER, POINTER, LONG)),
        ("glu_rows", function(POINTER, POINTER, POINTER, LONG, INT)),
        ("dense", function(ctypes.POINTER(DenseTask))),
        ("attention", function(ctypes.POINTER(AttentionTask))),
        ("attention_merge", function(POINTER, POINTER, POINTER, FLOAT, FLOAT, POINTER, LONG)),
        ("attention_finish", function(POINTER, FLOAT, FLOAT, POINTER, LONG)),
        ("store_keys", function(POINTER, POINTER, INT, INT, INT)),
        ("short_conv", function(POINTER, POINTER, POINTER, POINTER, STRIDE, LONG, INT)),
        ("delta_gates", function(POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, LONG)),
        ("delta_rule", function(ctypes.POINTER(DeltaTask))),
    ]


def address(array):
    return None if array is None else array.ctypes.data


def stride(array):
    """Elements from a row of an array to the next."""
    return array.strides[0] // array.itemsize


class RowOperations:
    """The operations of one table; outputs are arguments, as in C."""

    def __init__(self, kernels):
        self.owner, self.table = kernels, Table.from_address(kernels.address)
        self.scratch = np.empty(SCRATCH_BYTES // 4, np.float32)

    def rms_norm(self, dst, src, weight, eps):
        self.table.rms_norm(address(dst), address(src), address(weight), eps, len(src))

    def gated_rms_norm(self, dst, src, weight, gate, eps):
        self.table.gated_rms_norm(address(dst), address(src), address(weight), address(gate), eps, len(src))

    def l2_normalize(self, x, factor):
        self.table.l2_normalize(address(x), factor, len(x))

    def add(self, dst, src):
        self.table.add(address(dst), address(src), len(src))

    def rope(self, x, cos, sin, interleaved):
        self.table.rope(address(x), address(cos), address(sin), len(cos), interleaved)

    def sigmoid_gate(self, x, gate):
        self.table.sigmoid_gate(address(x), address(gate), len(x))

    def glu_rows(self, dst, gate, up, activation):
        self.table.glu_rows(address(dst), address(gate), address(up), len(gate), activation)

    def dense(self, out, x, w, bias=None, scales=None, scale_k=0):
        task = DenseTask(
            x=address(x),
            x_stride=stride(x),
            m=len(x),
            w=address(w),
            dtype=(DTYPES | SCALED_DTYPES)[w.dtype],
            w_stride=stride(w),
            n=len(w),
            k=x.shape[1],
            scales=address(scales),
            scale_stride=0 if scales is None else stride(scales),
            scale_k=scale_k,
            bias=address(bias),
            out=address(out),
            out_stride=stride(out),
        )
        self.table.dense(task)

    def attention(self, out, largest, total, q, keys, values, pages, begin, end, *, scale, soft_cap=0.0):
        """``keys`` is ``[pages, d, KV_BLOCK]`` and ``values`` ``[pages, KV_BLOCK, dv]``."""
        task = AttentionTask(
            m=len(q),
            d=q.shape[1],
            dv=out.shape[1],
            q=address(q),
            q_stride=stride(q),
            keys=address(keys),
            values=address(values),
            key_stride=keys.strides[0],
            value_stride=values.strides[0],
            pages=address(pages),
            dtype=DTYPES[keys.dtype],
            scale=scale,
            soft_cap=soft_cap,
            begin=address(begin),
            end=address(end),
            max=address(largest),
            sum=address(total),
            out=address(out),
            out_stride=stride(out),
            scratch=address(self.scratch),
        )
        self.table.attention(task)

    def attention_merge(self, largest, total, out, largest2, total2, out2):
        """``largest`` and ``total`` are arrays of one value."""
        self.table.attention_merge(
            address(largest), address(total), address(out), largest2, total2, address(out2), len(out)
        )

    def attention_finish(self, out, largest, total, sink=None):
        self.table.attention_finish(address(out), largest, total, address(sink), len(out))

    def narrow(self, dst, src):
        self.table.narrow(address(dst), address(src), DTYPES[dst.dtype], len(src))

    def store_keys(self, page, k, position):
        self.table.store_keys(address(page), address(k), position, DTYPES[page.dtype], len(k))

    def short_conv(self, dst, state, x, weight):
        width, channels = weight.shape
        self.table.short_conv(
            address(dst), address(state), address(x), address(weight), stride(weight), channels, width
        )

    def delta_gates(self, decay, beta, a, b, a_log, dt_bias):
        self.table.delta_gates(*map(address, (decay, beta, a, b, a_log, dt_bias)), len(a))

    def delta_rule(self, y, state, q, k, v, decay, beta):
        task = DeltaTask(
            tokens=len(q),
            key_dim=q.shape[1],
            columns=v.shape[1],
            q=address(q),
            k=address(k),
            q_stride=stride(q),
            k_stride=stride(k),
            v=address(v),
            v_stride=stride(v),
            decay=address(decay),
            beta=address(beta),
            gate_stride=stride(decay),
            state=address(state),
            state_stride=stride(state),
            y=address(y),
            y_stride=stride(y),
        )
        self.table.delta_rule(task)


OPERATIONS = {
    name: RowOperations(CpuBackend().new_context(isa=name, num_threads=1).workspace.kernels)
    for name, isa in ISAS.items()
    if isa["available"]
}
"""The operations of each ISA that runs here."""


def names(dtypes):
    """Ids of parametrised tests."""
    return [dtype.name for dtype in dtypes]


def spaced(array, gap=3):
    """A copy of a matrix whose rows have NaN between them; int8: large numbers."""
    memory = np.full((len(array), array.shape[1] + gap), 127 if array.dtype == np.int8 else np.nan, array.dtype)
    memory[:, : array.shape[1]] = array
    return memory[:, : array.shape[1]]


def floats(rng, *shape):
    """Normally distributed float32."""
    return rng.standard_normal(shape).astype(np.float32)


def run_all(call, *outputs):
    """The outputs of a call, equal on all ISAs; each of ``outputs`` is what an output holds before the call."""
    results = []
    for operations in OPERATIONS.values():
        guarded = []
        for initial in outputs:
            guarded.append(GuardedArray(initial.shape, initial.dtype))
            guarded[-1].array[...] = initial
        call(operations, *(output.array for output in guarded))
        for output in guarded:
            output.assert_guards()
        results.append([output.array.copy() for output in guarded])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)
    return results[0][0] if len(outputs) == 1 else results[0]


def unset(*shape):
    """An output that holds nothing yet."""
    return np.full(shape, np.nan, np.float32)
