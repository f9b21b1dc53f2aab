"""ggml's C functions, called through ctypes, and objects that own what these functions allocate."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.interface import Array

__all__ = ["LIBRARY_VARIABLE", "Backend", "Context", "Functions", "Graph", "Weights", "library_folder"]

LIBRARY_VARIABLE = "GGML_LIBRARY_DIR"
TYPE_F32, TYPE_Q4_0, TYPE_Q4_K, TYPE_I32 = 0, 2, 12, 26  # enum ggml_type
LEVEL_WARN, LEVEL_ERROR = 3, 4  # enum ggml_log_level
SPARE_BYTES = 4096  # of a context, for the alignment of its objects

POINTER, INT, INT64, SIZE, BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool
LOG_CALLBACK = ctypes.CFUNCTYPE(None, INT, ctypes.c_char_p, POINTER)
TO_FLOAT = ctypes.CFUNCTYPE(None, POINTER, POINTER, INT64)


def library_folder() -> Path | None:
    """The folder of ggml's shared libraries: ``GGML_LIBRARY_DIR``, or the folder of the package llama_cpp, or None."""
    if os.environ.get(LIBRARY_VARIABLE):
        return Path(os.environ[LIBRARY_VARIABLE])
    package = importlib.util.find_spec("llama_cpp")  # not imported: that needs libllama
    return None if package is None or package.origin is None else Path(package.origin).parent / "lib"


class Backend:
    """ggml's CPU backend.

    Parameters
    ----------
    folder : Path
        Where ggml's shared libraries are.
    num_threads : int

    Attributes
    ----------
    ggml : Functions
    pointer : int
    buffer_types : list of int
        Buffer types that rearrange weights, in ggml's order of preference, then the plain one.
    """

    def __init__(self, folder: Path, num_threads: int) -> None:
        ggml: Any = Functions(folder)
        self.ggml = ggml
        ggml.ggml_log_set(log_problems, None)
        self.pointer = ggml.ggml_backend_cpu_init()
        self._owned = weakref.finalize(self, ggml.ggml_backend_free, self.pointer)
        ggml.ggml_backend_cpu_set_n_threads(self.pointer, num_threads)
        self.buffer_types = [*self._extra_buffer_types(), ggml.ggml_backend_get_default_buffer_type(self.pointer)]

    def _extra_buffer_types(self) -> Iterator[int]:
        device = self.ggml.ggml_backend_get_device(self.pointer)
        registry = self.ggml.ggml_backend_dev_backend_reg(device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return
        ends_with_null = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(device)
        for buffer_type in ends_with_null:
            if buffer_type is None:
                return
            yield buffer_type


class Weights:
    """Weights in the buffer type for which ggml's CPU backend has its fastest kernels.

    Parameters
    ----------
    backend : Backend
    quantized : int
        The ``enum ggml_type`` of the blocks.
    packed : ndarray
        Blocks: ``[N, K / block]``, or ``[E, N, K / block]`` for experts.
    k : int

    Attributes
    ----------
    tensor : int
        2-D for one weight, 3-D for experts.
    buffer_type : str
        ggml's name of it: "CPU_REPACK" or "AMX" if weights are rearranged, "CPU" if they are stored as given.
    """

    def __init__(self, backend: Backend, quantized: int, packed: Array, k: int) -> None:
        ggml = backend.ggml
        self.k, self.n = k, packed.shape[-2]
        for buffer_type in backend.buffer_types:
            self.context = Context(ggml, 1)
            new = ggml.ggml_new_tensor_2d if packed.ndim == 2 else ggml.ggml_new_tensor_3d
            self.tensor = new(self.context.pointer, quantized, k, *packed.shape[-2::-1])
            self.context.allocate(ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context.pointer, buffer_type))
            if self._has_kernels(backend, packed.ndim):
                break
        else:
            raise RuntimeError(f"ggml's CPU backend has no buffer type that supports type {quantized}")
        self.buffer_type: str = ggml.ggml_backend_buft_name(buffer_type).decode()
        self.context.set(self.tensor, packed)

    def _has_kernels(self, backend: Backend, ndim: int) -> bool:
        """Whether the backend can multiply by these weights in this buffer. The product is described, not computed."""
        ggml, trial = backend.ggml, Context(backend.ggml, 3)
        if ndim == 2:
            x = ggml.ggml_new_tensor_2d(trial.pointer, TYPE_F32, self.k, 1)
            product = ggml.ggml_mul_mat(trial.pointer, self.tensor, x)
        else:
            x = ggml.ggml_new_tensor_3d(trial.pointer, TYPE_F32, self.k, 1, 1)
            ids = ggml.ggml_new_tensor_2d(trial.pointer, TYPE_I32, 1, 1)
            product = ggml.ggml_mul_mat_id(trial.pointer, self.tensor, x, ids)
        return bool(ggml.ggml_backend_supports_op(backend.pointer, product))


class Graph:
    """A graph with its inputs set and its output allocated.

    Parameters
    ----------
    backend : Backend
    weights : list of Weights
        Are kept alive as long as the graph.
    build : callable
        ``build(context)`` returns the output tensor and a list of ``(input tensor, values)``.
    tensors : int
        At least the number of tensors that ``build`` makes.
    shape : tuple
        Shape of the output, in NumPy's order.
    """

    def __init__(
        self,
        backend: Backend,
        weights: Sequence[Weights],
        build: Callable[[int], tuple[int, list[tuple[int, Array]]]],
        tensors: int,
        shape: tuple[int, ...],
    ) -> None:
        self.backend, self.weights, self.shape = backend, weights, shape
        ggml = backend.ggml
        self.context = Context(ggml, tensors)
        self.output, inputs = build(self.context.pointer)
        self.graph = ggml.ggml_new_graph(self.context.pointer)
        ggml.ggml_build_forward_expand(self.graph, self.output)
        self.context.allocate(ggml.ggml_backend_alloc_ctx_tensors(self.context.pointer, backend.pointer))
        for tensor, values in inputs:
            self.context.set(tensor, values)

    def compute(self) -> Graph:
        """Compute the output; returns this graph."""
        status = self.backend.ggml.ggml_backend_graph_compute(self.backend.pointer, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: got status {status}, expected 0")
        return self

    def read(self) -> Array:
        """The output, float32."""
        values = np.empty(self.shape, np.float32)
        self.backend.ggml.ggml_backend_tensor_get(self.output, values.ctypes.data, 0, values.nbytes)
        return values


class Context:
    """A ggml context: descriptions of tensors, and the buffer that holds their data once it is allocated."""

    def __init__(self, ggml: Any, tensors: int) -> None:
        self.ggml = ggml
        size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead() + SPARE_BYTES
        self.pointer = ggml.ggml_init(InitParams(size, None, True))
        self._owned = weakref.finalize(self, ggml.ggml_free, self.pointer)
        self._buffer: Any = None

    def allocate(self, buffer: int | None) -> None:
        """Own ``buffer``, which was allocated for this context's tensors."""
        if not buffer:
            raise MemoryError("ggml cannot allocate a buffer")
        self._buffer = weakref.finalize(self, self.ggml.ggml_backend_buffer_free, buffer)

    def set(self, tensor: int, values: Array) -> None:
        """Copy a contiguous array into a tensor."""
        self.ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


class Functions:
    """ggml's functions, by name, as attributes."""

    def __init__(self, folder: Path) -> None:
        for library, functions in (("libggml-base.so", BASE_FUNCTIONS), ("libggml-cpu.so", CPU_FUNCTIONS)):
            loaded = ctypes.CDLL(str(folder / library))
            for name, (result, arguments) in functions.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", BOOL)]


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``, up to the function that dequantises a type's blocks."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", INT64),
        ("blck_size_interleave", INT64),
        ("type_size", SIZE),
        ("is_quantized", BOOL),
        ("to_float", TO_FLOAT),
    ]


# Result and argument types by name. Source: ggml's headers, version 0.25.
BASE_FUNCTIONS = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_log_set": (None, [LOG_CALLBACK, POINTER]),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [INT]),
    "ggml_quantize_chunk": (SIZE, [INT, POINTER, POINTER, INT64, INT64, INT64, POINTER]),
    "ggml_init": (POINTER, [InitParams]),
    "ggml_free": (None, [POINTER]),
    "ggml_tensor_overhead": (SIZE, []),
    "ggml_graph_overhead": (SIZE, []),
    "ggml_new_tensor_2d": (POINTER, [POINTER, INT, INT64, INT64]),
    "ggml_new_tensor_3d": (POINTER, [POINTER, INT, INT64, INT64, INT64]),
    "ggml_view_2d": (POINTER, [POINTER, POINTER, INT64, INT64, SIZE, SIZE]),
    "ggml_mul_mat": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_mul_mat_id": (POINTER, [POINTER, POINTER, POINTER, POINTER]),
    "ggml_swiglu": (POINTER, [POINTER, POINTER]),
    "ggml_mul": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_add": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_cont": (POINTER, [POINTER, POINTER]),
    "ggml_new_graph": (POINTER, [POINTER]),
    "ggml_build_forward_expand": (None, [POINTER, POINTER]),
    "ggml_backend_alloc_ctx_tensors": (POINTER, [POINTER, POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, [POINTER, POINTER]),
    "ggml_backend_buffer_free": (None, [POINTER]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [POINTER]),
    "ggml_backend_tensor_set": (None, [POINTER, POINTER, SIZE, SIZE]),
    "ggml_backend_tensor_get": (None, [POINTER, POINTER, SIZE, SIZE]),
    "ggml_backend_graph_compute": (INT, [POINTER, POINTER]),
    "ggml_backend_supports_op": (BOOL, [POINTER, POINTER]),
    "ggml_backend_free": (None, [POINTER]),
    "ggml_backend_get_device": (POINTER, [POINTER]),
    "ggml_backend_get_default_buffer_type": (POINTER, [POINTER]),
    "ggml_backend_dev_backend_reg": (POINTER, [POINTER]),
    "ggml_backend_reg_get_proc_address": (POINTER, [POINTER, ctypes.c_char_p]),
}
CPU_FUNCTIONS = {
    "ggml_backend_cpu_init": (POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [POINTER, INT]),
}


def print_problems(level: int, text: bytes, _: object) -> None:
    """Print warnings and errors only. By default ggml writes a line for each weight that it rearranges."""
    if level in (LEVEL_WARN, LEVEL_ERROR):
        print(text.decode(errors="replace"), end="", file=sys.stderr)


log_problems = LOG_CALLBACK(print_problems)  # ggml keeps a pointer to it
